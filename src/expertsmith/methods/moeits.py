"""MoEITS (Balderas, Lastra, Benítez, arXiv 2604.10603): remove experts whose weights have most mutual information with another expert's.

Data-free. `measure` compares the experts of a layer pair by pair, which is costly and done once. `removal_path` turns the matrix
into an order of removal; the experts removed for any threshold or count are a prefix of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from expertsmith.errors import UserError
from expertsmith.methods.base import Array, Facts, Order, Projections, method
from expertsmith.methods.information import BinRule, Codes, Precision, nmi, nmi_matrix

ROLES = ("gate", "up", "down")
EQUAL = (1.0, 1.0, 1.0)
PRESETS = dict.fromkeys(
    ("qwen2_moe", "deepseek_v2"), (0.2, 0.4, 0.4)
)  # by model_type, as in the authors' code; all others EQUAL
TIE = 1e-12  # relative: closeness values that differ by less are tied; sums of the same terms differ by about 1e-16
NULLS = 4  # pairs of experts for the shuffled baseline
FLAT = 0.05  # IQR / mean; below this, a layer's threshold is not informative
NEAR = 1.1  # ratio to the shuffled baseline; below this, experts share no more than chance


@dataclass(frozen=True)
class Path:
    """E - 1 removals: the removed expert, the largest NMI just before its removal (never increases), and the pair with that NMI."""

    order: list[int]
    height: list[float]
    pair: list[tuple[int, int]]


@dataclass(frozen=True)
class Threshold:
    """tau = max(0, mean + factor * iqr), with its inputs."""

    tau: float
    mean: float
    iqr: float


def measure(
    weights: Projections, facts: Facts, *, bins: BinRule = "numpy2", precision: Precision = "float32"
) -> dict[str, Array]:
    """NMI of the weight matrices of every pair of experts, role by role: entry t of one is paired with entry t of the other.

    NMI = I / sqrt(H H) of the entries in equal-width bins by numpy's rule "auto", each matrix with its own bins: see
    `expertsmith.methods.information`. `bins`: numpy2 caps their number, numpy1 does not. `precision`: of edges and comparisons. For each
    role r of "gate", "up", "down" that the experts have:

        r            [E, E] float64, symmetric, zero diagonal
        entropy_r    [E]    nats, of each expert's matrix
        bins_r       [E]    number of bins
        constant_r   [E]    whether all entries are equal: its NMI, 0 / 0, is taken as 0 (1 between two equal constants)
        baseline_r   [P]    NMI of up to 4 pairs after shuffling one of the two: the chance level at this size

    The codes of one role are in memory at a time: 2 bytes per entry of all experts, and the same amount in the temporary folder or on the
    device that counts (`facts.counting`).

    Deviations from the authors' code: entries are cast from half precision first (their edges stay float16 and can collide); counts are
    integers (they normalise densities); an array is binned once, not once per pair.

    Raises:
        UserError: experts of different shapes, or entries that cannot be binned.
    """
    found: dict[str, Array] = {}
    roles = weights.roles
    for role in roles:
        binned = []
        for expert, matrix in enumerate(weights.of(role)):
            try:
                binned.append(facts.counting.codes(matrix, bins, precision))
            except UserError as error:
                raise UserError(
                    f"decoder layer {facts.layer}, expert {expert}, {role}: {error.message}", error.remedy
                ) from None
        found[role] = nmi_matrix(binned, facts.counting.joint, partial(_tell, facts, len(roles), len(binned)))
        found[f"entropy_{role}"] = np.array([entry.entropy for entry in binned])
        found[f"bins_{role}"] = np.array([entry.k for entry in binned])
        found[f"constant_{role}"] = np.array([entry.constant for entry in binned])
        found[f"baseline_{role}"] = _shuffled(binned)
    return found


def _tell(facts: Facts, roles: int, experts: int, pairs: int) -> None:
    facts.advance(2 * pairs / (experts * (experts - 1) * roles))


def _shuffled(binned: list[Codes]) -> Array:
    pairs = len(binned) - 1
    draw = np.random.default_rng(0)
    values = []
    for i in sorted({round(step * (pairs - 1) / (NULLS - 1)) for step in range(NULLS)} if pairs else ()):
        other = binned[i + 1]
        values.append(nmi(binned[i], replace(other, codes=draw.permutation(other.codes))))
    return np.array(values)


def combine(arrays: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    """The weighted mean of the roles' arrays, over the roles that the experts have (`arrays`); their weights are scaled to sum 1.

    Raises:
        UserError: all roles that the experts have get weight 0.
    """
    total = math.fsum(weights[role] for role in arrays)
    if total <= 0:
        raise UserError(f"weights are 0 for every matrix that the experts have ({', '.join(arrays)})", "use -O weights=1,1,1")
    return np.asarray(sum(weights[role] * array for role, array in arrays.items()) / total)


def threshold(matrix: Array, factor: float) -> Threshold:
    """tau = mean(M) + factor * IQR(M) over all E * E entries, the zero diagonal included, quartiles by linear interpolation; at least 0.

    The zeros weigh more in small layers, so one factor has different effects for different E. A larger factor removes fewer experts.
    Deviation from the authors' code: tau is not below 0, which would remove even the last expert.
    """
    mean = math.fsum(matrix.reshape(-1).tolist()) / matrix.size  # the same for any order of the experts
    upper, lower = np.percentile(matrix, [75, 25])
    iqr = float(upper - lower)
    return Threshold(max(0.0, mean + factor * iqr), mean, iqr)


def removal_path(matrix: Array) -> Path:
    """Remove one expert of the closest pair until one is left; the experts removed for any threshold are a prefix of this path.

    (i, j), i < j: the largest entry of the current matrix, the first in row-major order. closeness(x): mean of x's row in the current
    matrix, zero diagonal included. i is removed if closeness(i) > closeness(j), else j. Closeness values within a relative 1e-12 are tied,
    and j is removed: the same terms added in another order differ in the last bit, which must not decide.
    """
    count = len(matrix)
    # mathematically symmetric, so the first maximum in row-major order lies above the diagonal
    above = np.where(np.triu(np.ones((count, count), bool), 1), matrix, -np.inf)
    left = list(range(count))
    path = Path([], [], [])
    while len(left) > 1:
        i, j = (int(place) for place in np.unravel_index(above.argmax(), above.shape))
        path.height.append(float(above[i, j]))
        path.pair.append((i, j))
        first, second = (math.fsum(matrix[x, left].tolist()) for x in (i, j))  # of equal length, so sums compare like means
        gone = i if first - second > TIE * max(first, second) else j
        path.order.append(gone)
        left.remove(gone)
        above[gone, :] = above[:, gone] = -np.inf
    return path


def grouped_path(matrix: Array, groups: int) -> Path:
    """Our extension to routers with expert_groups, which must stay equal in size: every round removes one expert of each group.

    Each group follows the path of its own experts. All removals of a round get the lowest of the groups' heights, so a round is above a
    threshold only if it is in every group. With one group: `removal_path`.
    """
    size = len(matrix) // groups
    if groups == 1:
        return removal_path(matrix)
    paths = [removal_path(matrix[start : start + size, start : start + size]) for start in range(0, len(matrix), size)]
    merged = Path([], [], [])
    for turn in range(size - 1):
        height = min(path.height[turn] for path in paths)
        for group, path in enumerate(paths):
            i, j = path.pair[turn]
            merged.order.append(group * size + path.order[turn])
            merged.height.append(height)
            merged.pair.append((group * size + i, group * size + j))
    return merged


def choose(path: Path, tau: float, most: int) -> tuple[int, bool]:
    """(number of removals with height > tau, at most `most`; whether that limit prevented some)."""
    asked, most = sum(height > tau for height in path.height), max(0, most)
    return min(asked, most), asked > most


@method(
    "moeits",
    "Remove experts whose weights have high mutual information",
    "arXiv 2604.10603",
    reads="arrays",
    gives="order",
    cost="every pair of experts of a layer is compared once, on all cores or on the GPU; stored next to the plan",
    limits="Ignores what experts compute; two experts that differ by a permutation of neurons look unrelated. Its own threshold gives layers different counts.",
    budgets=("threshold", "uniform", "global", "sensitivity", "esap"),
    measure=measure,
)
def moeits(arrays: Mapping[str, Array], facts: Facts, *, factor: float = 1.5, weights: str = "preset") -> Order:
    """The order of removal from the NMI of the experts' weights (`measure`), and how many experts the layer's own threshold removes.

    M is the mean of the roles' matrices with `weights`: "gate,up,down" such as 0.2,0.4,0.4, or preset: these for qwen2_moe and
    deepseek_v2, equal weights for all others, as in the authors' code. tau = mean(M) + factor * IQR(M), computed once from the whole layer.
    While the largest entry of M exceeds tau, the expert of that pair with the larger row mean is removed (on a tie, the higher id). A
    larger factor removes fewer experts; the order does not depend on it. The router's minimum is always kept (not in the authors' code).

    NMI ignores sign and scale, and two experts that differ only by a permutation of their neurons look unrelated. The measure is most
    meaningful for experts with a common origin. Notes warn if the numbers do not support the decision.

    Raises:
        UserError: `weights` is neither "preset" nor three numbers of at least 0, not all 0.
    """
    shares = _weights(weights, facts.model_type)
    roles = [role for role in ROLES if role in arrays]
    matrix = combine({role: arrays[role] for role in roles}, shares)
    count, groups = len(matrix), facts.rules.groups
    limit = threshold(matrix, factor)
    path = grouped_path(matrix, groups)
    stop, guard = choose(path, limit.tau, count - facts.rules.least)
    off = matrix[np.triu_indices(count, 1)]
    nulls = {role: arrays[f"baseline_{role}"].mean() for role in roles if arrays[f"baseline_{role}"].size}
    baseline = float(combine(nulls, shares)) if nulls else None
    constant = {role: np.flatnonzero(arrays[f"constant_{role}"]).tolist() for role in roles}
    warnings = []
    if count > 1:
        level = math.fsum(off.tolist()) / len(off)
        if limit.iqr < FLAT * limit.mean:
            warnings.append("NMI hardly differs between pairs, so the threshold is not informative")
        if off.min() > limit.tau:
            warnings.append("every pair is above the threshold, which would leave one expert")
        if baseline is not None and level < NEAR * baseline:
            warnings.append("the mean NMI equals that of shuffled weights: pairs share no more than chance")
    for role, experts in constant.items():
        if experts:
            warnings.append(f"all entries of {role} are equal in experts {experts}: NMI taken as 0, or 1 between equal ones")
    why = {
        "threshold": limit.tau,
        "mean": limit.mean,
        "iqr": limit.iqr,
        "factor": factor,
        "weights": {role: shares[role] for role in roles},
        "baseline": baseline,
        "guard": guard,
        "pairs": [list(pair) for pair in path.pair],
        "warnings": warnings,
    }
    return Order(path.order, path.height, stop, why)


def _weights(text: str, model_type: str) -> dict[str, float]:
    if text == "preset":
        return dict(zip(ROLES, PRESETS.get(model_type, EQUAL), strict=True))
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != len(ROLES) or any(not 0 <= value < math.inf for value in values) or not any(values):
        raise UserError(
            f"option weights of moeits is {text!r}", "give preset, or three numbers for gate, up and down, such as 0.2,0.4,0.4"
        )
    return dict(zip(ROLES, values, strict=True))

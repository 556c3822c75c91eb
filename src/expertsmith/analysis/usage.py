"""Dynamic measures from calibration statistics: expert use by domain, load balance, and how many demonstrations are enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expertsmith.calibration.stats import LayerStatistics

Array = np.ndarray[Any, Any]
PERMUTATIONS = 199
SHARE_KEPT = 0.5  # experts that few-shot localisation chooses
DRAWS = 20  # random sets of demonstrations for every size
FLAT = 0.9999  # share of the maximum entropy; above this, router scores are nearly equal and give an order only
SUPER_QUANTILE, SUPER_SHARE, SUPER_TIMES = 0.995, 0.1, 5.0


def share(values: Array) -> Array:
    """values / their sum; zeros if the sum is 0."""
    total = float(values.sum())
    return values / total if total else np.zeros(len(values))


def entropy(p: Array) -> float:
    """-sum p ln p in nats."""
    held = p[p > 0]
    return float(-(held * np.log(held)).sum())


def domain_usage(sums: Mapping[str, Array]) -> dict[str, Any]:
    """The measures of one layer for one domain or all together; names: `catalogue.USAGE`."""
    selections = sums["selections"].astype(np.float64)
    tokens, n = int(sums["tokens"].item()), len(selections)
    load = share(selections)
    h = entropy(load)
    spread = float(sums["entropy_sum"].item()) / tokens if tokens else 0.0
    reached = selections > 0
    return {
        "tokens": tokens,
        "usage": load,
        "mass": share(sums["weight_sum"].astype(np.float64)),
        "energy": share(sums["weighted_norm_sq_sum"].astype(np.float64)),
        "saliency": share(sums["easy_ep"].astype(np.float64)),
        "score": sums["score_sum"] / max(1, tokens),
        "mean_norm": np.divide(sums["norm_sum"], selections, out=np.full(n, np.nan), where=reached),
        "max_norm": sums["norm_max"],
        "routing_entropy": spread,
        "routing_entropy_share": spread / np.log(n) if n > 1 else None,
        "load_entropy_share": h / np.log(n) if n > 1 else None,
        "effective_experts": float(np.exp(h)),
        "load_cv": float(selections.std() / selections.mean()) if selections.sum() else None,
        "load_peak": float(load.max() * n),
        "unused": int((~reached).sum()),
        "turn": float(sums["turn_sum"].item()) / max(1, tokens),
    }


def coselection_lift(coselections: Array) -> Array:
    """The lift [E, E]: how much more often two experts are chosen for one token than by chance. NaN if chance is 0, and on the diagonal.

    Chance: given that a token uses i, its other k - 1 slots go to the others by their share of use (k: slots per token, equal for all
    tokens). The two directions are averaged: e_ij = (N_i m_i N_j / (S - N_i) + N_j m_j N_i / (S - N_j)) / 2,
    m_i = (sum over j of N_ij) / N_i, S = sum N.
    """
    counts = coselections.astype(np.float64)
    n = np.diagonal(counts).copy()
    pairs = counts - np.diag(n)
    others, total = pairs.sum(1), n.sum()
    rest = total - n
    one = np.divide(np.outer(others, n), rest[:, None], out=np.zeros_like(pairs), where=rest[:, None] > 0)
    chance = (one + one.T) / 2
    lift: Array = np.divide(pairs, chance, out=np.full_like(pairs, np.nan), where=chance > 0)
    np.fill_diagonal(lift, np.nan)
    return lift


def information(counts: Array) -> float:
    """Mutual information of expert and domain in nats from counts [D, E], with equal weight for every domain:
    (1/D) sum_d KL(p(e|d) || p(e))."""
    rows = np.stack([share(row) for row in counts])
    mean = rows.mean(0)
    ratio = np.divide(rows, mean, out=np.ones_like(rows), where=(rows > 0) & (mean > 0))
    return float((rows * np.log(ratio)).sum() / len(rows))


def specialisation(entry: LayerStatistics, seed: int = 0) -> dict[str, Any]:
    """The association of experts and domains; empty for fewer than two domains.

    `expert_domain` [E, D]: share of each domain in an expert's use, with equal weight for every domain. `information`: mutual information
    of usage in nats, also as a share of its maximum ln(min(D, E)). `information_bias`: its mean for N independent draws,
    (E - 1)(D - 1) / (2 N) (Miller-Madow). `saliency_information`: the same for EASY-EP saliency mass by sequence. Its null permutes the
    domains of the sequences: the tokens of a sequence are dependent, so only this chance level is fair.
    """
    names = list(entry.domains)
    if len(names) < 2:
        return {}
    counts = np.stack([entry.domains[name]["selections"].astype(np.float64) for name in names])
    rows = np.stack([share(row) for row in counts])
    found = information(counts)
    most = np.log(min(len(names), entry.num_experts)) or 1.0
    mass = [entry.domains[name]["easy_ep_by_sequence"].astype(np.float64) for name in names]
    together = np.concatenate(mass)
    owner = np.repeat(np.arange(len(names)), [len(part) for part in mass])
    observed = information(np.stack([part.sum(0) for part in mass]))
    random = np.random.default_rng(seed)
    null = []
    for _ in range(PERMUTATIONS):
        shuffled = random.permutation(owner)
        null.append(information(np.stack([together[shuffled == d].sum(0) for d in range(len(names))])))
    return {
        "domains": names,
        "expert_domain": np.divide(rows, rows.sum(0), out=np.zeros_like(rows), where=rows.sum(0) > 0).T,
        "information": found,
        "information_share": found / most,
        "information_bias": (entry.num_experts - 1) * (len(names) - 1) / (2 * max(1.0, counts.sum())),
        "saliency_information": observed,
        "saliency_information_null": float(np.mean(null)),
        "saliency_information_p": (1 + sum(value >= observed - 1e-12 for value in null)) / (1 + len(null)),
    }


def stability(by_sequence: Array, seed: int = 0) -> list[dict[str, float]]:
    """How well n demonstrations find the same experts as the other demonstrations (EASY-EP's few-shot localisation; arXiv 2504.06792).

    n = 1, 2, 4, … up to half of the sequences. A: the half of the experts with most saliency on n random sequences; B: the same on the
    other sequences. `overlap`: |A and B| / K, mean of `DRAWS` draws; `deviation`: its standard deviation; `chance`: K / E. Deviation from
    the paper: it compares with all demonstrations, including the n, so its overlap ends at 1.
    """
    count, n = by_sequence.shape
    k = max(1, int(np.ceil(n * SHARE_KEPT)))
    random = np.random.default_rng(seed)
    rows: list[dict[str, float]] = []
    size = 1
    while size <= count // 2:
        overlaps = []
        for _ in range(DRAWS):
            order = random.permutation(count)
            few, rest = (set(_top(by_sequence[part].sum(0), k)) for part in (order[:size], order[size:]))
            overlaps.append(len(few & rest) / k)
        rows.append(
            {"demonstrations": size, "overlap": float(np.mean(overlaps)), "deviation": float(np.std(overlaps)), "chance": k / n}
        )
        size *= 2
    return rows


def _top(values: Array, k: int) -> list[int]:
    return [int(expert) for expert in np.argsort(-values, kind="stable")[:k]]


def measure_usage(entry: LayerStatistics, seed: int = 0) -> dict[str, Any]:
    """All measures of one layer from its statistics."""
    names = (
        "tokens",
        "selections",
        "weight_sum",
        "weighted_norm_sq_sum",
        "easy_ep",
        "score_sum",
        "norm_sum",
        "norm_max",
        "entropy_sum",
    )
    total = {name: entry.total(name) for name in (*names, "turn_sum")}
    found: dict[str, Any] = {
        "all": domain_usage(total),
        "domains": {name: domain_usage(sums) for name, sums in entry.domains.items()},
        "coselection_lift": coselection_lift(entry.total("coselections")),
        "specialisation": specialisation(entry, seed),
        "stability": {},
    }
    for name, sums in entry.domains.items():
        rows = stability(sums["easy_ep_by_sequence"].astype(np.float64), seed)
        if rows:
            found["stability"][name] = rows
    return found


def super_experts(layers: Sequence[LayerStatistics]) -> dict[str, Any] | None:
    """Experts with extreme outputs ("Unveiling Super Experts in Mixture-of-Experts Large Language Models", arXiv 2507.23279).

    An expert is a super expert if its largest output norm is above the 99.5th percentile over all experts of the model and above a tenth of
    the largest. Deviations: the paper uses the largest single entry of a down projection's output, not the norm; and here the norm must
    also be five times the median expert's, because a percentile alone finds an expert in every model.

    Returns:
        The median, the bar that an expert must exceed, and the experts above it, largest first; None if no expert has any output.
    """
    rows = [(entry.layer, expert, float(value)) for entry in layers for expert, value in enumerate(entry.total("norm_max"))]
    values = np.array([row[2] for row in rows])
    if not len(values) or values.max() <= 0:
        return None
    median = float(np.median(values))
    bar = max(float(np.quantile(values, SUPER_QUANTILE)), SUPER_SHARE * float(values.max()), SUPER_TIMES * median)
    found = [
        {"layer": layer, "expert": expert, "max_norm": value, "of_median": value / median if median else None}
        for layer, expert, value in rows
        if value > bar
    ]
    return {"median": median, "bar": bar, "experts": sorted(found, key=lambda row: -float(row["max_norm"]))}

"""Static measures of one layer, from the weights alone. Weights are read once, with one projection of one layer in memory at a time.

Whole matrices are compared exactly. Measures whose cost grows with neurons squared times pairs (matching neurons) or neurons cubed (ranks)
use a seeded sample of neurons and pairs, and are reported with their error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import kendalltau

from expertsmith.analysis import similarity as sim
from expertsmith.analysis.sources import LayerWeights

Array = np.ndarray[Any, Any]
STRIPE = (
    2**20
)  # elements of all experts together that are processed at once: what a CPU's cache holds; 64 times as many on a GPU
NULL_PAIRS = 4


@dataclass(frozen=True)
class Sampling:
    """Sample sizes: neurons per expert, and expert pairs for matching. If there are no more than that, all are used."""

    neurons: int = 128
    pairs: int = 32
    seed: int = 0


class _Role:
    """All experts' matrices of one projection, in their stored dtype, on a device."""

    def __init__(self, weights: LayerWeights, role: str, advance: Callable[[float], object], device: torch.device) -> None:
        self.held = torch.empty(0)  # [experts, neurons, width]
        for place, matrix in enumerate(weights.experts(role)):
            if not place:
                self.held = torch.empty(weights.count, *matrix.shape, dtype=weights.dtype, device=device)
            self.held[place].copy_(matrix.to(weights.dtype))
            advance(1)
        self.experts, self.neurons, self.width = self.held.shape
        self.device = device

    def rows(self, expert: int, places: Array | None = None) -> torch.Tensor:
        value = self.held[expert]
        return (value if places is None else value[torch.from_numpy(places).to(self.device)]).float()

    def stripe(self, rows: int) -> int:
        """How many neurons of `rows` matrices are processed at once."""
        return max(1, STRIPE * (1 if self.device.type == "cpu" else 64) // (rows * self.width))


def measure_layer(
    weights: LayerWeights,
    sampling: Sampling | None = None,
    advance: Callable[[float], object] = lambda _: None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """The static measures of a layer (names: `catalogue.STATIC`). `advance` is called with 1 for every expert matrix read.

    Products of matrices run on `device`; what comes back are sums, Gram matrices and, for each sampled pair, the products of its neurons.
    Assignments, eigenvalues and correlations are small and run on the CPU.

    Raises:
        UserError: NaN or inf in a weight, or packed weights.
    """
    sampling = sampling or Sampling()
    shared, dense = weights.shared(), weights.dense_ffn()
    router = weights.router().numpy().astype(np.float64)
    row_cosine = sim.cosine(router @ router.T)
    found: dict[str, Any] = {
        "router_cosine": row_cosine,
        "router_norm": np.linalg.norm(router, axis=1),
        "router_similarity": sim.mean_of_pairs(row_cosine),
        "projections": {},
    }
    joint: dict[tuple[int, int], Array] = {}
    neuron_cosines = {}
    for role in weights.roles:
        measured = _measure_role(
            _Role(weights, role, advance, torch.device(device)), shared.get(role), dense.get(role), sampling, joint
        )
        found["projections"][role] = measured
        count = len(measured["norm"])
        neuron_cosines[role] = measured["neuron_cosine"][:count, :count]
    if len(weights.roles) > 1:
        taus = [kendalltau(*_joint_order(products)).statistic for products in joint.values()]
        means = [float(_joint_mean(products)) / len(weights.roles) for products in joint.values()]
        found["joint_match"] = {"mean": _mean(means), "error": _error(means), "tau": _mean(taus)}
    found["router_expert"] = _router_expert(row_cosine, neuron_cosines, sampling.seed)
    return found


def _measure_role(
    held: _Role,
    shared: torch.Tensor | None,
    dense: torch.Tensor | None,
    sampling: Sampling,
    joint: dict[tuple[int, int], Array],
) -> dict[str, Any]:
    measured = _projection(held, shared, dense) | _components(held, sampling)
    measured |= _ranks(held, sampling)
    measured |= _matching(held, sampling, joint)
    return measured | _dense_match(held, dense, sampling)


def _projection(held: _Role, shared: torch.Tensor | None, dense: torch.Tensor | None) -> dict[str, Any]:
    """Whole-matrix and mean-neuron cosines and norms, in one pass over stripes of neurons."""
    n = held.experts
    whole = dense if dense is not None and dense.shape == held.held.shape[1:] else None
    members = n + (whole is not None)
    products = torch.zeros(members, members, dtype=torch.float64, device=held.device)
    sums = torch.zeros(n, held.width, dtype=torch.float64, device=held.device)
    rows = held.stripe(members)
    for start in range(0, held.neurons, rows):
        part = held.held[:, start : start + rows].float()
        sums += part.sum(1).double()  # of a few neurons
        if whole is not None:
            part = torch.cat((part, whole[None, start : start + rows].to(part)))
        flat = part.flatten(1)
        products += (flat @ flat.T).double()
    gram = products.cpu().numpy()
    means = [sums.cpu().numpy() / held.neurons]
    others = []
    for name, extra in (("shared", shared), ("dense", dense)):
        if extra is not None and extra.shape[1] == held.width:
            means.append(extra.double().mean(0, keepdim=True).numpy())
            others.append(name)
    neurons = np.concatenate(means)
    cosines = sim.cosine(gram)
    copies = cosines[:n, :n] > 1 - sim.SAME
    neuron_cosine = sim.cosine(neurons @ neurons.T)
    return {
        "neurons": held.neurons,
        "width": held.width,
        "norm": np.sqrt(np.diagonal(gram)[:n]),
        "matrix_cosine": cosines,
        "matrix_members": [*map(str, range(n)), *(["dense"] if whole is not None else [])],
        "matrix_similarity": sim.mean_of_pairs(cosines[:n, :n], copies),
        "neuron_cosine": neuron_cosine,
        "neuron_members": [*map(str, range(n)), *others],
        "neuron_similarity": sim.mean_of_pairs(neuron_cosine[:n, :n], copies),
        "copies": int(np.tril(copies, -1).sum()),
        "zero_experts": int((np.diagonal(gram)[:n] == 0).sum()),
    }


def _components(held: _Role, sampling: Sampling) -> dict[str, Any]:
    """Principal components of the experts' standardised matrices, from the sampled neurons and scaled to all neurons.

    A squared distance of two experts is a sum over entries; s sampled entries give it with a relative error of about 1 / sqrt(s).
    """
    n, size = held.experts, min(sampling.neurons, held.neurons)
    if n < 2:
        return {"pca": np.zeros((n, 2)), "pca_explained": [0.0, 0.0]}
    places = np.sort(np.random.default_rng(sampling.seed).choice(held.neurons, size, replace=False))
    spread = torch.zeros(n, n, dtype=torch.float64, device=held.device)
    rows = held.stripe(n)
    for start in range(0, size, rows):
        part = torch.stack([held.rows(e, places[start : start + rows]).reshape(-1) for e in range(n)])
        part -= part.mean(0)
        scale = part.square().sum(0).div_(n - 1).sqrt_()
        part /= torch.where(scale > 0, scale, 1.0)
        spread += (part @ part.T).double()
    coordinates, explained = sim.principal(spread.cpu().numpy() * (held.neurons / size))
    return {"pca": coordinates, "pca_explained": explained}


def _ranks(held: _Role, sampling: Sampling) -> dict[str, Any]:
    """Effective rank of the sampled neurons of every expert. If not all neurons are used: the mean of two disjoint samples, and half of
    their difference as the error."""
    size = min(sampling.neurons, held.neurons)
    random = np.random.default_rng(sampling.seed)
    draws = 1 if size == held.neurons else min(2, held.neurons // size)
    order = random.permutation(held.neurons)
    grams = []
    for expert in range(held.experts):
        for draw in range(draws):
            rows = held.rows(expert, np.sort(order[draw * size : (draw + 1) * size])).double()
            grams.append(rows @ rows.T if size <= held.width else rows.T @ rows)
    fetched = torch.stack(grams).cpu().numpy()
    ranks = np.array([sim.effective_rank(gram) for gram in fetched]).reshape(held.experts, draws)
    error = np.abs(ranks[:, 0] - ranks[:, 1]) / 2 if draws > 1 else np.zeros(held.experts)
    return {"effective_rank": ranks.mean(1), "effective_rank_error": error, "effective_rank_of": min(size, held.width)}


def _matching(held: _Role, sampling: Sampling, joint: dict[tuple[int, int], Array]) -> dict[str, Any]:
    """Match the neurons of the sampled pairs. For the null, match `NULL_PAIRS` of them with the inputs of one side shuffled: the values
    without any similarity. The cosines are added to `joint`, for one common order over all projections."""
    pairs = sim.sample_pairs(held.experts, sampling.pairs, sampling.seed)
    if not pairs:
        return {"match": None}
    random = np.random.default_rng(sampling.seed + 1)
    size = min(sampling.neurons, held.neurons)
    places = np.sort(random.choice(held.neurons, size, replace=False))
    shuffle = torch.from_numpy(random.permutation(held.width)).to(held.device)
    rows: list[sim.Matching] = []
    null: list[float] = []
    current, other = -1, torch.zeros(0, 0)
    for a, b in pairs:
        if b != current:
            current, other = b, held.rows(b)
        own = held.rows(a, places)
        norms_a, norms_b = (_fetched(torch.linalg.vector_norm(value, dim=1)) for value in (own, other))
        products = _fetched(own @ other.T)
        rows.append(sim.match(products, norms_a, norms_b, places))
        scale = np.outer(norms_a, norms_b)
        cosines = np.divide(products, scale, out=np.zeros_like(scale), where=scale > 0).astype(np.float32)
        joint[a, b] = joint[a, b] + cosines if (a, b) in joint else cosines
        if len(null) < NULL_PAIRS:
            null.append(sim.match(_fetched(own[:, shuffle] @ other.T), norms_a, norms_b, places).mean)
    means = [row.mean for row in rows]
    return {
        "match": {
            "pairs": [list(pair) for pair in pairs],
            "of_pairs": held.experts * (held.experts - 1) // 2,
            "neurons": size,
            "cosine": [row.matched for row in rows],
            "cosine_unordered": [row.unmatched for row in rows],
            "mean": means,
            "tau": [row.tau for row in rows],
            "similarity": _mean(means),
            "error": _error(means),
            "null": _mean(null),
        }
    }


def _fetched(values: torch.Tensor) -> Array:
    """Values of a device as float64."""
    return values.double().cpu().numpy()


def _joint_order(products: Array) -> tuple[Array, Array]:
    rows, columns = linear_sum_assignment(products, maximize=True)
    return rows, columns


def _joint_mean(products: Array) -> float:
    return float(products[_joint_order(products)].mean())


def _dense_match(held: _Role, dense: torch.Tensor | None, sampling: Sampling) -> dict[str, Any]:
    """For every expert, the mean cosine of its sampled neurons with their nearest neuron of the dense FFN; 1 if cut out of it."""
    if dense is None or dense.shape[1] != held.width:
        return {}
    size = min(sampling.neurons, held.neurons)
    places = np.sort(np.random.default_rng(sampling.seed).choice(held.neurons, size, replace=False))
    unit = torch.nn.functional.normalize(dense.to(held.device), dim=1)
    nearest = [
        (torch.nn.functional.normalize(held.rows(e, places), dim=1) @ unit.T).amax(1).mean() for e in range(held.experts)
    ]
    return {"dense_match": torch.stack(nearest).cpu().tolist()}


def _router_expert(row_cosine: Array, neuron_cosines: dict[str, Array], seed: int) -> dict[str, Any]:
    """For every projection: r, R^2, p and the null of R^2 between router-row similarity and mean-neuron similarity."""
    made: dict[str, Any] = {}
    for role, found in zip(
        neuron_cosines, sim.correlate(row_cosine, list(neuron_cosines.values()), seed) if neuron_cosines else [], strict=True
    ):
        if found is None:
            made[role] = None
        else:
            made[role] = {"r": found.r, "r2": found.r2, "p": found.p, "null": found.null, "null_values": found.null_values}
    return made


def _mean(values: list[float]) -> float | None:
    held = [value for value in values if np.isfinite(value)]
    return float(np.mean(held)) if held else None


def _error(values: list[float]) -> float | None:
    """Standard error of the mean over pairs; None for fewer than two values."""
    held = [value for value in values if np.isfinite(value)]
    return float(np.std(held, ddof=1) / np.sqrt(len(held))) if len(held) > 1 else None

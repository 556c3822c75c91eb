"""Neurons → equal disjoint groups without training: at random, by their weights, or by their activations on calibration text.

There are D neurons and E routed experts of width m. The other D - E m neurons always run (the shared part), so no neuron is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expertsmith.conversion.split import activations

Array = np.ndarray[Any, Any]
ITERATIONS = 20


def balanced(cost: Array) -> Array:
    """Labels [rows] of the cheapest assignment of rows to columns with the same number of rows in each column.

    Exact. Starts greedily by regret (the gap between a row's best and second best column), then cancels negative cycles of moves between
    columns until there are none; then a transportation plan is optimal.

    Args:
        cost: [rows, columns]; the number of rows is a multiple of the number of columns.
    """
    rows, columns = cost.shape
    size = rows // columns
    cost = np.asarray(cost, dtype=np.float64)
    labels = greedy(cost)
    if columns == 1:
        return labels
    slack = 1e-12 * (1.0 + float(np.abs(cost).max()))
    for _ in range(100 * rows):
        cycle = _negative_cycle(*_cheapest_moves(cost, labels, columns), slack)
        if cycle is None:
            break
        for row, target in cycle:
            labels[row] = target
    assert (np.bincount(labels, minlength=columns) == size).all()
    return labels


def greedy(cost: Array) -> Array:
    """Labels [rows]: assign rows in descending order of regret, each to the cheapest column with room."""
    rows, columns = cost.shape
    ordered = np.sort(cost, axis=1)
    regret = ordered[:, 1] - ordered[:, 0] if columns > 1 else np.zeros(rows)
    room = np.full(columns, rows // columns)
    labels = np.zeros(rows, dtype=np.int64)
    for row in np.argsort(-regret, kind="stable"):
        column = int(np.argmin(np.where(room > 0, cost[row], np.inf)))
        labels[row], room[column] = column, room[column] - 1
    return labels


def _cheapest_moves(cost: Array, labels: Array, columns: int) -> tuple[Array, Array]:
    """For every pair of columns, the smallest change of cost by moving one row from the first to the second, and that row."""
    change = cost - cost[np.arange(len(cost)), labels][:, None]
    weight = np.empty((columns, columns))
    mover = np.empty((columns, columns), dtype=np.int64)
    for column in range(columns):
        members = np.flatnonzero(labels == column)
        best = change[members].argmin(0)
        weight[column], mover[column] = change[members[best], np.arange(columns)], members[best]
    np.fill_diagonal(weight, np.inf)
    return weight, mover


def _negative_cycle(weight: Array, mover: Array, slack: float) -> list[tuple[int, int]] | None:
    """Rows and their new columns along a cycle of negative total weight (Bellman-Ford), or None."""
    count = len(weight)
    distance, parent = np.zeros(count), np.full(count, -1)
    last = -1
    for _ in range(count):
        through = distance[:, None] + weight
        best = through.argmin(0)
        better = through[best, np.arange(count)] < distance - slack
        if not better.any():
            return None
        parent[better] = best[better]
        distance = np.where(better, through[best, np.arange(count)], distance)
        last = int(np.flatnonzero(better)[0])
    for _ in range(count):  # after this, `last` is on the cycle
        last = int(parent[last])
    nodes = [last]
    while int(parent[nodes[-1]]) != last:
        nodes.append(int(parent[nodes[-1]]))
    return [(int(mover[parent[node], node]), node) for node in nodes]


def balanced_kmeans(features: Array, clusters: int, seed: int, iterations: int = ITERATIONS) -> Array:
    """Labels [rows] of k-means with equal cluster sizes: k-means++ start, then in turns optimal balanced assignment and new centroids."""
    features = np.asarray(features, dtype=np.float64)
    centroids = features[_plus_plus(features, clusters, np.random.default_rng(seed))]
    labels = np.full(len(features), -1)
    for _ in range(iterations):
        new = balanced(_squared_distances(features, centroids))
        if (new == labels).all():
            break
        labels = new
        centroids = np.stack([features[labels == c].mean(0) for c in range(clusters)])
    return labels


def _squared_distances(features: Array, centroids: Array) -> Array:
    cross: Array = (features**2).sum(1)[:, None] - 2 * features @ centroids.T + (centroids**2).sum(1)
    return cross


def _plus_plus(features: Array, clusters: int, draw: np.random.Generator) -> list[int]:
    chosen = [int(draw.integers(len(features)))]
    nearest = _squared_distances(features, features[chosen])[:, 0].clip(0)
    while len(chosen) < clusters:
        total = float(nearest.sum())
        pick = int(draw.choice(len(features), p=nearest / total)) if total > 0 else int(draw.integers(len(features)))
        chosen.append(pick)
        nearest = np.minimum(nearest, _squared_distances(features, features[[pick]])[:, 0].clip(0))
    return chosen


def normalised(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length 1 (zero rows stay zero), float32."""
    made: torch.Tensor = rows.float() / rows.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return made


def grouped(labels: Array, ids: Array, experts: int) -> list[torch.Tensor]:
    """Neuron ids of every expert, ascending."""
    return [torch.from_numpy(np.sort(ids[labels == expert])) for expert in range(experts)]


def random_groups(neurons: int, experts: int, width: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(experts, shared): a seeded shuffle cut into pieces, the baseline."""
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    parts = order[: experts * width].reshape(experts, width).sort(-1).values
    return list(parts), order[experts * width :].sort().values


@torch.no_grad()
def weight_groups(
    gate: torch.Tensor, norms: torch.Tensor, experts: int, width: int, seed: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """MoEfication's parameter clustering (Zhang et al., arXiv 2110.01786): balanced k-means on the normalised gate rows.

    A shared part gets the neurons with the largest ||down column||; to take those with gate rows farthest from all centroids would be
    arbitrary. Deviation: MoEfication has no shared part.
    """
    neurons = len(gate)
    order = norms.argsort(descending=True, stable=True)
    shared = order[: neurons - experts * width].sort().values
    rest = order[neurons - experts * width :].sort().values.numpy()
    labels = balanced_kmeans(normalised(gate)[rest].numpy(), experts, seed)
    return grouped(labels, rest, experts), shared


@torch.no_grad()
def markers(mlp: Any, x: torch.Tensor, top: int, rows: int = 2048) -> torch.Tensor:
    """CMoE's B [tokens, neurons], uint8: whether |h_i| is among the `top` largest of the token, with h = silu(g^ x^) * (u^ x^); all rows
    and x are normalised. Every row sums to exactly `top`."""
    gate, up = normalised(mlp.gate_proj.weight), normalised(mlp.up_proj.weight)
    made = torch.zeros(len(x), len(gate), dtype=torch.uint8)
    for start in range(0, len(x), rows):
        unit = normalised(x[start : start + rows])
        h = (torch.nn.functional.silu(unit @ gate.T) * (unit @ up.T)).abs()
        made[start : start + rows].scatter_(1, h.topk(top, -1).indices.cpu(), 1)
    return made


@torch.no_grad()
def activation_groups(
    marked: torch.Tensor, experts: int, width: int, iterations: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor, list[int]]:
    """CMoE (Pei et al., arXiv 2502.04416): (experts, shared, representative neuron of every expert).

    The D - E m most often marked neurons are shared. The others are grouped by their marker columns: centroids start at the columns of the
    E most often marked ones of them, and optimal balanced assignment by L1 distance runs `iterations` times (once by default). Ties: the
    lower id. Deviation: the authors lose D mod N neurons; here they are shared.
    """
    neurons = marked.shape[1]
    rate = marked.sum(0, dtype=torch.int64)
    order = rate.argsort(descending=True, stable=True)
    shared = order[: neurons - experts * width].sort().values
    rest = order[neurons - experts * width :]  # most often marked first
    columns = marked[:, rest].float()
    centroids = columns[:, :experts]
    labels = np.zeros(len(rest), dtype=np.int64)
    for _ in range(iterations):
        labels = balanced(_l1(columns, centroids).numpy())
        centroids = torch.stack([columns[:, torch.from_numpy(labels == e)].mean(1) for e in range(experts)], 1)
    distance = _l1(columns, centroids).numpy()
    representatives = []
    for e in range(experts):
        members = np.flatnonzero(labels == e)
        representatives.append(int(rest[members[distance[members, e].argmin()]]))
    return grouped(labels, rest.numpy(), experts), shared, representatives


def _l1(columns: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """[neurons, E]: sum_t |b_ti - c_te| for 0/1 columns b and centroids c in [0, 1], = sum_t c + sum_t b (1 - 2 c)."""
    return centroids.sum(0) + columns.T @ (1 - 2 * centroids)


@torch.no_grad()
def profile_groups(
    mlp: Any, x: torch.Tensor, sequences: torch.Tensor, experts: int, width: int, seed: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """ExpertWeaver (arXiv 2602.15521). The neurons with the highest mean |act(gate x)| are shared. The others are grouped by balanced
    k-means on their normalised profiles: mean |act(gate x)| by calibration sequence.

    Args:
        sequences: [tokens], the sequence of each token.

    Deviation: the authors choose a layer's shared width by the coefficient of variation; a stock config has one width for all layers.
    """
    gate = mlp.act_fn(mlp.gate_proj(x)).abs().float()
    place = torch.unique(sequences, return_inverse=True)[1]  # type: ignore[no-untyped-call]
    count = torch.bincount(place).clamp_min(1)
    profile = torch.zeros(len(count), gate.shape[-1]).index_add_(0, place, gate) / count[:, None]
    order = gate.mean(0).argsort(descending=True, stable=True)
    neurons = gate.shape[-1]
    shared = order[: neurons - experts * width].sort().values
    rest = order[neurons - experts * width :].sort().values.numpy()
    labels = balanced_kmeans(normalised(profile.T[rest]).numpy(), experts, seed)
    return grouped(labels, rest, experts), shared


@torch.no_grad()
def importance(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """u [tokens, neurons] = |a_i| ||column i of W_down||: the length of a neuron's contribution to the residual stream. float32."""
    made: torch.Tensor = activations(mlp, x).abs().float() * mlp.down_proj.weight.float().norm(dim=0)
    return made


@dataclass(frozen=True)
class Layer:
    """The inputs of a grouping: one dense MLP and its inputs on calibration text."""

    mlp: Any
    x: torch.Tensor  # [tokens, hidden]
    sequences: torch.Tensor  # [tokens]
    experts: int
    width: int
    seed: int
    markers: int | None  # CMoE's K; None: 1 % of the neurons, at least 10


Groups = tuple[list[torch.Tensor], torch.Tensor, list[int]]  # experts, shared, a representative neuron of every expert (CMoE)


def _random(layer: Layer) -> Groups:
    return *random_groups(layer.mlp.gate_proj.weight.shape[0], layer.experts, layer.width, layer.seed), []


def _moefication(layer: Layer) -> Groups:
    norms = layer.mlp.down_proj.weight.float().norm(dim=0).cpu()
    return *weight_groups(layer.mlp.gate_proj.weight.cpu(), norms, layer.experts, layer.width, layer.seed), []


def _cmoe(layer: Layer) -> Groups:
    top = layer.markers or max(10, layer.mlp.gate_proj.weight.shape[0] // 100)
    return activation_groups(markers(layer.mlp, layer.x, top), layer.experts, layer.width)


def _expertweaver(layer: Layer) -> Groups:
    return *profile_groups(layer.mlp, layer.x, layer.sequences, layer.experts, layer.width, layer.seed), []


GROUPINGS: dict[str, Callable[[Layer], Groups]] = {  # by the method of conversion
    "random": _random,
    "moefication": _moefication,
    "cmoe": _cmoe,
    "expertweaver": _expertweaver,
}

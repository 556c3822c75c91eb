"""The best down projections for the routing that a smaller router does, in closed form.

With phi_t the features of expert e on its tokens T_e (`healing.experts`) and R the residual (what is wanted of the routed output, less what
has been added so far), one step for one expert is the ridge regression

    dW^T = (Phi^T Phi + lambda mean(diag(Phi^T Phi)) I)^-1 Phi^T R[T_e],    W += dW,    R[T_e] -= Phi dW^T,

which pulls towards the weights as they are: an expert with few tokens hardly moves. The experts take turns (block Gauss-Seidel), `sweeps`
times over. lambda is chosen for every step by the held-out tokens, and a step that does not lower the held-out error is not made; an
expert without held-out tokens cannot be judged and stays. Sums and solves in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from expertsmith.healing.experts import LayerExperts, Routed

RIDGES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
ROWS = 4096  # tokens whose features are held in float64 at a time
KEPT = 2**25  # features of an expert that are kept for the update of the residual, instead of being computed again


@dataclass
class Problem:
    """The least-squares problem of one layer: its tokens, what is wanted of the routed output [T, width], float32, and which tokens are held
    out. `strength` [T] weighs a token by how strongly the layer's output follows its routed output; a constant changes nothing."""

    routed: Routed
    wanted: torch.Tensor
    held: torch.Tensor
    strength: torch.Tensor | None = None


@dataclass
class Solution:
    """New down projections of the experts that changed, and the squared held-out error of the routed output, before and after every sweep."""

    down: dict[int, torch.Tensor] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    ridges: dict[int, float] = field(default_factory=dict)


def solve(layer: LayerExperts, problem: Problem, sweeps: int = 2, tick: Callable[[float], None] = lambda _: None) -> Solution:
    """Sweep over the experts of a layer. `tick` is told the share of the work that each step was."""
    rest = problem.wanted.clone()
    found = Solution()
    weight = torch.ones(len(rest), device=rest.device) if problem.strength is None else problem.strength
    weight = weight.square()

    def held_error() -> float:
        return float((rest[problem.held].double().square().sum(1) * weight[problem.held].double()).sum())

    found.errors.append(held_error())
    pairs = [_pairs(problem.routed, expert) for expert in range(layer.count)]
    for _ in range(sweeps):
        for expert, (rows, slots) in enumerate(pairs):
            tick(1 / (sweeps * layer.count))
            held = problem.held[rows]
            if not bool(held.any()) or bool(held.all()):
                continue
            step = _step(layer, problem, expert, rows, slots, rest, weight)
            if step is not None:
                found.down[expert] = found.down.get(expert, layer.down(expert)) + step[0]
                found.ridges[expert] = step[1]
        found.errors.append(held_error())
    return found


def _pairs(routed: Routed, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, slots = (routed.expert == expert).nonzero(as_tuple=True)
    return rows, slots


def _step(  # noqa: C901  (a fallback after another, each for a reason that is said)
    layer: LayerExperts,
    problem: Problem,
    expert: int,
    rows: torch.Tensor,
    slots: torch.Tensor,
    rest: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, float] | None:
    """One expert's step: (dW [outputs, features], its ridge), `rest` updated; None where no ridge lowers the held-out error."""
    sums: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    room = KEPT
    for part, phi in _features(layer, problem.routed, expert, rows, slots):
        for held in (False, True):
            at = problem.held[part] == held
            one, two = phi[at].double(), rest[part[at]].double()
            weighted = one * weight[part[at], None].double()
            gram, moment = weighted.T @ one, weighted.T @ two
            old = sums.get(held)
            sums[held] = (gram, moment) if old is None else (old[0] + gram, old[1] + moment)
        room -= phi.numel()
        if room > 0:
            kept.append((part, phi))
    (gram, moment), (held_gram, held_moment) = sums[False], sums[True]
    mean = gram.diagonal().mean()
    if not bool(mean > 0) or not bool(moment.any()):
        return None
    best: tuple[float, float, torch.Tensor] | None = None
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for ridge in RIDGES:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * mean * eye)
        if int(failed):
            continue
        change = torch.cholesky_solve(moment, factor)  # [features, outputs]
        gained = float((change * (held_gram @ change - 2 * held_moment)).sum())  # change of the squared held-out error
        if gained < 0 and (best is None or gained < best[0]):
            best = (gained, ridge, change)
    if best is None:
        return None
    change = best[2]
    if room <= 0:
        kept = []
    for part, phi in kept or _features(layer, problem.routed, expert, rows, slots):
        rest[part] -= (phi.double() @ change).float()
    return change.T, best[1]


def _features(
    layer: LayerExperts, routed: Routed, expert: int, rows: torch.Tensor, slots: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for part, places in zip(torch.split(rows, ROWS), torch.split(slots, ROWS), strict=True):
        yield part, layer.features(routed, expert, part, places)

"""The best down projections for the pruned router's routing, in closed form.

phi_t are the features of expert e on its tokens T_e (`healing.experts`), and R is the residual: the change wanted of the routed output, minus
the changes made so far. One step for one expert is the ridge regression

    dW^T = (Phi^T Phi + lambda mean(diag(Phi^T Phi)) I)^-1 Phi^T R[T_e],    W += dW,    R[T_e] -= Phi dW^T,

which pulls towards the present weights: an expert with few tokens hardly moves. The mean is over features that are not always 0. The
experts take turns (block Gauss-Seidel), for `sweeps` rounds. The held-out tokens choose lambda for every step, and a step that does not
lower the held-out error is not made; an expert without held-out tokens is left unchanged. Sums and solves use float64.

Phi^T Phi is the same in every sweep, so it is summed and factored once, for several experts and all lambdas in one call, and kept while memory
allows. A sweep never synchronizes with the device: the device decides which steps are made.

Under `torchrun` every rank holds its own tokens, and R of these. What sums over tokens is summed over the ranks before it is used, so all ranks
factor the same matrices, choose the same lambdas and make the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from expertsmith.healing.experts import LayerExperts, Routed
from expertsmith.ranks import current

RIDGES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
ROWS = 4096  # tokens whose features are held in float64 at a time
ROOM = 3 * 2**30  # bytes of factors, sums and features that are kept from sweep to sweep, instead of being made again
AT_ONCE = 2**28  # bytes of matrices that are factored in one call


@dataclass
class Problem:
    """The least-squares problem of one layer: its tokens, the change wanted of the routed output ([T, width], float32), and the held-out mask.
    `strength` [T] weights a token by how strongly the layer's output depends on its routed output; a common factor has no effect."""

    routed: Routed
    wanted: torch.Tensor
    held: torch.Tensor
    strength: torch.Tensor | None = None


@dataclass
class Solution:
    """New down projections of the changed experts, and the squared held-out error of the routed output before the first and after every sweep."""

    down: dict[int, torch.Tensor] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    ridges: dict[int, float] = field(default_factory=dict)


def solve(layer: LayerExperts, problem: Problem, sweeps: int = 2, tick: Callable[[float], None] = lambda _: None) -> Solution:
    """Sweep over the experts of a layer; `tick` receives each step's share of the work."""
    turns = _Turns(layer, problem)
    errors = [turns.held_error()]
    for _ in range(sweeps):
        for group in turns.groups:
            turns.prepare(group)
            for expert in group:
                turns.step(expert)
            tick(len(group) / (sweeps * len(turns.experts)))
        errors.append(turns.held_error())
    made = torch.stack([*turns.made.values()]).tolist() if turns.made else []
    changed = [expert for expert, done in zip(turns.made, made, strict=True) if done]
    down = {expert: layer.down(expert) + turns.change[expert].T for expert in changed}
    return Solution(down, errors, {expert: float(turns.ridge[expert]) for expert in changed})


@dataclass
class _Sums:
    """Phi^T Phi of an expert over its training and its held-out tokens; factors of the former if they all fit in memory."""

    gram: torch.Tensor
    held: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor] | None = None


class _Turns:
    """The state of the sweeps: the residual, and every expert's sums."""

    def __init__(self, layer: LayerExperts, problem: Problem) -> None:
        self.layer, self.routed, self.ranks = layer, problem.routed, current()
        self.rest = problem.wanted.clone()
        device = self.rest.device
        strength = torch.ones(len(self.rest), device=device) if problem.strength is None else problem.strength
        self.weight = strength.double().square()
        self.held = problem.held.nonzero().squeeze(1)
        self.ridges = torch.tensor(RIDGES, dtype=torch.float64, device=device)
        self._sort(problem)
        outputs, width = layer.down(0).shape
        self.shape = width, outputs
        size = width**2 * 8
        number = AT_ONCE // (len(RIDGES) * size)  # experts whose factors are made together; 0: not even those of one
        self.all_at_once = number > 0
        self.groups = [self.experts[start : start + max(1, number)] for start in range(0, len(self.experts), max(1, number))]
        room = ROOM - (2 + len(RIDGES)) * size * len(self.experts)
        self.keeps_sums = room >= 0
        self.keeps_features = (room if self.keeps_sums else ROOM) >= len(self.rows) * width * 4
        self._sums: dict[int, _Sums] = {}
        self._features: dict[int, list[torch.Tensor]] = {}
        self.change: dict[int, torch.Tensor] = {}  # [features, outputs]
        self.ridge: dict[int, torch.Tensor] = {}
        self.made: dict[int, torch.Tensor] = {}

    def _sort(self, problem: Problem) -> None:
        """Sort all (token, slot) pairs by expert, training tokens before held-out ones, and list the experts that have both."""
        count, slots = self.layer.count, problem.routed.expert.shape[1]
        expert = problem.routed.expert
        key = torch.where(expert < 0, 2 * count, 2 * expert + problem.held[:, None]).reshape(-1)
        order = torch.argsort(key, stable=True)
        sizes = torch.bincount(key, minlength=2 * count + 1)[: 2 * count]
        starts = [0, *sizes.cumsum(0).tolist()]
        self.bounds = {e: (starts[2 * e], starts[2 * e + 1], starts[2 * e + 2]) for e in range(count)}
        self.ranks.add_up([sizes])
        both = (sizes.reshape(count, 2) > 0).all(1).tolist()
        self.experts = [e for e in range(count) if both[e]]
        self.rows, self.slots = order // slots, order % slots

    def held_error(self) -> float:
        """The squared error of the routed output on the held-out tokens."""
        error = (self.rest[self.held].double().square().sum(1) * self.weight[self.held]).sum()
        return self.ranks.total(float(error))[0]

    def _parts(self, expert: int) -> Iterator[tuple[bool, torch.Tensor, torch.Tensor]]:
        """Yield (is held out, tokens, features [tokens, features]) of an expert in parts."""
        first, middle, last = self.bounds[expert]
        places = [(False, at, min(at + ROWS, middle)) for at in range(first, middle, ROWS)]
        places += [(True, at, min(at + ROWS, last)) for at in range(middle, last, ROWS)]
        known = self._features.get(expert)
        made = []
        for number, (held, start, end) in enumerate(places):
            rows = self.rows[start:end]
            phi = known[number] if known else self.layer.features(self.routed, expert, rows, self.slots[start:end])
            made.append(phi)
            yield held, rows, phi
        if self.keeps_features:
            self._features[expert] = made

    def prepare(self, group: Sequence[int]) -> None:
        """Compute the sums of experts, and their factors if memory allows all lambdas at once."""
        if group[0] in self._sums:
            return
        if not self.keeps_sums:
            self._sums.clear()
        width = self.shape[0]
        grams = torch.zeros(len(group), 2, width, width, dtype=torch.float64, device=self.rest.device)  # training, held-out
        for expert, pair in zip(group, grams, strict=True):
            for held, rows, phi in self._parts(expert):
                one = phi.double()
                pair[int(held)].addmm_((one * self.weight[rows, None]).T, one)
            self._sums[expert] = _Sums(*pair)
        self.ranks.add_up([grams])
        if self.all_at_once:
            made = _factored(grams[:, 0], self.ridges)
            for expert, *factors in zip(group, *made, strict=True):
                self._sums[expert].factors = (factors[0], factors[1])

    def _factors(self, expert: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield (lambdas, factors, failure codes), all together or one by one."""
        sums = self._sums[expert]
        if sums.factors is not None:
            yield self.ridges, *sums.factors
            return
        for ridge in torch.split(self.ridges, 1):
            yield ridge, *_factored(sums.gram, ridge)

    def step(self, expert: int) -> None:
        """Make one expert's step if it lowers the held-out error."""
        moments = torch.zeros(2, *self.shape, dtype=torch.float64, device=self.rest.device)  # training, held-out
        for held, rows, phi in self._parts(expert):
            moments[int(held)].addmm_(phi.double().T, self.rest.index_select(0, rows).double() * self.weight[rows, None])
        self.ranks.add_up([moments])
        best: list[torch.Tensor] = []  # change of the squared held-out error, lambda, dW^T
        for ridges, factors, failed in self._factors(expert):
            changes = torch.cholesky_solve(moments[0].expand(len(ridges), -1, -1), factors)  # [lambdas, features, outputs]
            gained = (changes * (self._sums[expert].held @ changes - 2 * moments[1])).sum((1, 2))
            gained = torch.where((failed == 0) & gained.isfinite(), gained, torch.inf)
            at = gained.argmin(0, keepdim=True)
            found = [values.index_select(0, at)[0] for values in (gained, ridges, changes)]
            best = [torch.where(found[0] < best[0], *pair) for pair in zip(found, best, strict=True)] if best else found
        made = best[0] < 0
        change = torch.where(made, best[2], 0.0)
        for _, rows, phi in self._parts(expert):
            self.rest.index_add_(0, rows, (phi.double() @ change).float(), alpha=-1)
        self.change[expert] = change + self.change[expert] if expert in self.change else change
        self.ridge[expert] = torch.where(made, best[1], self.ridge.get(expert, best[1]))
        self.made[expert] = made | self.made[expert] if expert in self.made else made


def _factored(gram: torch.Tensor, ridges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cholesky factors [..., lambdas, features, features] of gram + lambda mean(diagonal) I, and a code [..., lambdas] that is 0 if it exists."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    shift = ridges * diagonal.sum(-1, keepdim=True) / (diagonal > 0).sum(-1, keepdim=True).clamp_min(1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram.unsqueeze(-3) + shift[..., None, None] * eye)
    return factor, failed

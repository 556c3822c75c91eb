"""Heal layer by layer, in closed form, and by gradients within a layer between two closed forms; nothing is propagated back through the model.

Both models run the same tokens. The inputs of the student's decoder layer l come from the layers healed before it, and the target is the
original's residual stream after layer l: so a later layer corrects errors of earlier ones. The objective is the relative error, the mean over
tokens of ||target - output||^2 / ||target||^2, because the next norm divides by the length of the stream. A layer's new weights are rounded
to the checkpoint's dtype, and kept only if this error falls on the held-out tokens.

Under `torchrun` every rank runs both models on its share of the batches. Errors and sums are those of all ranks before anything is decided, so
all ranks hold the same weights; this is checked after every layer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from expertsmith.checkpoint.floats import bytes_of
from expertsmith.engine import Batch, LoadedModel, Walk, hidden_of
from expertsmith.engine.walk import Call, HaltingWalk
from expertsmith.evaluation.quality import DomainQuality, Quality, add_batch
from expertsmith.experts.inventory import Inventory
from expertsmith.healing.experts import LayerExperts, Routed, Skip, Tapped
from expertsmith.healing.halted import SMALL, Halted
from expertsmith.healing.least_squares import Problem, Solution, solve
from expertsmith.healing.options import LayerLocal, LeastSquares
from expertsmith.healing.refine import Tokens, Trained, mean_error, refine, trained
from expertsmith.healing.replay import Replay
from expertsmith.healing.tail import wanted_change
from expertsmith.healing.work import Work
from expertsmith.healing.written import into_memory, to_checkpoint
from expertsmith.ranks import current
from expertsmith.views.progress import Progress, timed

DOWN = ("down",)
AT_ONCE = 4096  # held-out tokens that a layer runs on together
SHARES = {"look": 0.1, "solve": 0.15, "refine": 0.5, "again": 0.2}  # of a layer's time, for the bar, until a layer was measured
ALL = ("router", "gate", "up", "down")
_State = tuple[float, dict[str, torch.Tensor]]  # held-out error, and the tensors that differ from the source


@dataclass
class Layerwise:
    """One healing run: the two models, the data of all ranks, and the store of finished layers."""

    student: LoadedModel
    teacher: LoadedModel
    inventory: Inventory
    batches: Sequence[Batch]
    held: Sequence[torch.Tensor]
    options: LeastSquares | LayerLocal
    work: Work
    skips: Mapping[int, Skip]
    progress: Progress
    _advance: Callable[[float], object] = lambda _: None
    _tokens: int = 0
    _left: float = 0.0
    _resumed: bool = False  # the layer was healed by an interrupted run
    _shares: Mapping[str, float] = field(default_factory=lambda: SHARES)

    @property
    def roles(self) -> tuple[str, ...]:
        """The weights that may change."""
        return ALL if isinstance(self.options, LayerLocal) else DOWN

    def run(self) -> Quality:
        """Heal every MoE layer; returns the quality of the healed student against the teacher on the held-out tokens."""
        targets: dict[int, torch.Tensor] = {}
        ranks = current()
        batches, own = ranks.share(self.batches), ranks.share(self.held)
        held = [mask.to(self.student.device) for mask in own]
        masks = [batch.mask.to(self.student.device) for batch in batches]

        def keep(layer: int, number: int, output: Any) -> None:
            targets[number] = hidden_of(output)

        def halt(layer: int, calls: list[Call]) -> list[Any] | None:
            assert self.student.architecture is not None
            experts = LayerExperts(self.student.layers[layer], self.student.architecture, self.skips.get(layer))
            if layer in self.work.rows:
                into_memory(experts, self.inventory, layer, self.work.tensors(layer), self.roles)
                self._resumed = True
                return None
            with experts.grouped():
                return self._heal(Halted(layer, experts, calls, [targets.pop(i) for i in range(len(calls))], masks, held))

        tokens = sum(batch.tokens for batch in batches)
        theirs = Walk(self.teacher, batches, after=keep)
        mine = HaltingWalk(self.student, batches, self.student.moe_layers, halt)
        quality, parts = Quality(has_reference=True), list[Quality]()
        with self.progress.task("heal", tokens * len(self.student.layers), "layer tokens") as advance, theirs, mine:
            self._advance, self._tokens, self._left = advance, tokens, float(tokens)
            for _ in zip(theirs.layers(), mine.layers(), strict=True):
                targets.clear()
                advance(self._left, earlier=self._resumed)
                self._left, self._resumed = float(tokens), False
            outputs = zip(batches, own, mine.outputs(), theirs.outputs(), strict=True)
            for batch, mask, out, reference in outputs:
                parts.append(Quality())
                if bool(mask.any()):
                    judged = Batch(batch.input_ids, mask, batch.domain, batch.sequences)
                    add_batch(parts[-1], judged, out.logits, reference.logits)
        for part in ranks.joined(parts):
            for domain, entry in part.domains.items():
                quality.domains.setdefault(domain, DomainQuality()).add(entry)
        return quality

    @contextmanager
    def _stage(self, name: str, seconds: dict[str, float]) -> Iterator[Callable[[float], None]]:
        """Yield a function that reports a share of a stage of a layer; the stage takes the share of the layer that it took in the last layer."""

        def tick(share: float) -> None:
            amount = min(share * self._shares[name] * self._tokens, self._left)
            self._left -= amount
            self._advance(amount)

        with timed(seconds, name):
            yield tick

    def _heal(self, halted: Halted) -> list[Any]:
        begin = time.perf_counter()
        experts, index = halted.experts, halted.index
        seconds: dict[str, float] = {}
        weights: Trained = ([], [], [])
        replay: Replay | None = None
        with self._stage("look", seconds) as tick:
            if isinstance(self.options, LayerLocal):
                weights = trained(experts, self.inventory, index)
                replay = Replay(halted, [*weights[0], *weights[1], *weights[2]])
            problem, before = look(halted, tick)
        state: _State = (before, {})
        with self._stage("solve", seconds) as tick:
            solution = solve(experts, problem, self.options.sweeps, tick)
            state = self._accept(halted, replay, state, solution, DOWN)
        row: dict[str, Any] = {
            "layer": index,
            "held_out_tokens": int(current().total(int(problem.held.sum()))[0]),
            "experts": experts.count,
            "changed": len(solution.down),
            "sweeps": solution.errors,
            "ridges": sorted(set(solution.ridges.values())),
            "error_before": before,
            "error_least_squares": state[0],
        }
        if replay is not None and isinstance(self.options, LayerLocal):
            pairs = int(current().total(int((problem.routed.expert[~problem.held] >= 0).sum()))[0])
            with self._stage("refine", seconds) as tick:
                row["refined"] = refine(halted, replay, weights, self.options, pairs, tick)
            if "learning_rate" in row["refined"]:
                state = self._accept(halted, replay, state, None, ALL)
                with self._stage("again", seconds):
                    again = solve(experts, look(halted)[0], self.options.sweeps)
                    state = self._accept(halted, replay, state, again, ALL)
        row["error_after"], tensors = state
        outputs = [call() for call in halted.calls]
        check_alike(index, tensors, row)
        row["seconds"] = round(time.perf_counter() - begin, 3)
        self._shares = {name: value / max(row["seconds"], 1e-3) for name, value in seconds.items()}
        self.progress.log({"error_before": before, "error_after": row["error_after"], "seconds": row["seconds"]}, index)
        self.work.save(index, tensors, row)
        self.progress.note(f"decoder layer {index}: held-out error {before:.4g} → {row['error_after']:.4g}")
        return outputs

    def _accept(
        self, halted: Halted, replay: Replay | None, state: _State, solution: Solution | None, roles: Sequence[str]
    ) -> _State:
        """Set a solution, round the layer to the checkpoint's dtypes, and judge it. Back to the weights of `state` unless the error falls:
        rounding can undo a gain. Returns the state of the weights that stay."""
        for expert, down in solution.down.items() if solution is not None else ():
            halted.experts.set_down(expert, down)
        tensors = to_checkpoint(halted.experts, self.inventory, halted.index, roles)
        into_memory(halted.experts, self.inventory, halted.index, tensors, self.roles)
        error = held_mean(halted, replay)
        if error < state[0]:
            return error, tensors
        into_memory(halted.experts, self.inventory, halted.index, state[1], self.roles)
        return state


def held_mean(halted: Halted, replay: Replay | None) -> float:
    """Mean relative squared error of a layer's output on held-out tokens. A replay runs only these, if its layer works token by token."""
    if replay is not None:
        return mean_error(replay, Tokens(halted.held, replay, AT_ONCE))
    return mean_of(halted, sum(halted.held_error(call(), number) for number, call in enumerate(halted.calls)))


def mean_of(halted: Halted, error: float) -> float:
    """The mean over the held-out tokens of all ranks of an error summed over this rank's."""
    count = sum(int(mask.sum()) for mask in halted.held)
    total, tokens = current().total(error, count)
    return total / tokens


def check_alike(index: int, tensors: Mapping[str, torch.Tensor], row: Mapping[str, Any]) -> None:
    """Check that all ranks have healed a layer to the same tensors, with the same entry of the report.

    Raises:
        RuntimeError: they have not.
    """
    ranks = current()
    if ranks.world == 1:
        return
    made = hashlib.sha256(repr(row).encode())
    for name in sorted(tensors):
        made.update(name.encode())
        made.update(bytes_of(tensors[name]))
    if len(set(ranks.gather(made.hexdigest()))) > 1:
        raise RuntimeError(f"decoder layer {index}: the healed weights differ between the ranks, so the result would be wrong")


def look(halted: Halted, tick: Callable[[float], None] = lambda _: None) -> tuple[Problem, float]:
    """Run the layer once; returns its least-squares problem, and its held-out error before healing."""
    parts: list[tuple[Routed, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    error = 0.0
    # a streamed layer's parameters come as they are made; attention that keeps a graph for them may use another kernel than the teacher's, whose
    # rounding looks like an error where there is none
    halted.experts.layer.requires_grad_(False)
    for number, call in enumerate(halted.calls):
        found: list[Tapped] = []
        with halted.experts.tapped(found), torch.enable_grad():
            output = call()
        if len(found) != 1:
            raise RuntimeError(f"decoder layer {halted.index}: its experts ran {len(found)} times, expected once")
        hidden, leaf = hidden_of(output), found[0].leaf
        wrong = halted.error(hidden.detach(), number)
        error += halted.held_error(hidden.detach(), number)
        change, strength = wanted_change(hidden, leaf, wrong)
        size = halted.targets[number].flatten(2).float().square().sum(2).clamp_min(SMALL).sqrt().reshape(-1)
        strength = strength / size
        rows = halted.masks[number].reshape(-1).nonzero().squeeze(1)
        held = halted.held[number].reshape(-1)[rows]
        parts.append((found[0].routed.at(rows), change[rows], strength[rows], held))
        tick(1 / len(halted.calls))
    routed = joined([part[0] for part in parts])
    strength = torch.cat([part[2] for part in parts])
    seen = strength > 0
    # the strength of a token without an error is unknown: it gets the mean
    total, known = current().total(float(strength.double().sum()), int(seen.sum()))
    strength = torch.where(seen, strength, total / known if known else 1.0)
    problem = Problem(routed, torch.cat([part[1] for part in parts]), torch.cat([part[3] for part in parts]), strength)
    return problem, mean_of(halted, error)


def joined(parts: Sequence[Routed]) -> Routed:
    """Concatenate the tokens of several batches."""
    slots = max(part.expert.shape[1] for part in parts)

    def wide(values: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, slots - values.shape[1]), value=fill)

    scales = [part.scale for part in parts]
    return Routed(
        torch.cat([part.x for part in parts]),
        torch.cat([wide(part.expert, -1) for part in parts]),
        torch.cat([wide(part.weight, 0.0) for part in parts]),
        None if scales[0] is None else torch.cat([wide(scale, 0.0) for scale in scales if scale is not None]),
    )

"""Refine one layer by gradients on the squared error of its output: router weights, and gate, up and down projections of its experts.

The loss needs this layer only: its inputs and targets are known, and everything before the experts is computed once (`healing.replay`).
Gradients flow through the routing weights, not through the expert choice. The optimizer is Muon (`healing.muon`).
`healing.amount` says how many steps of how many tokens, and whether there are enough tokens to train at all. The held-out tokens choose the
stopping point, and the start weights are a candidate. Where no look has seen a lower error, a smaller rate is tried from the start.

Under `torchrun` all ranks draw the same steps from the tokens of all, and each runs those that are its own; gradients and held-out errors are
summed. So the ranks take the steps that one process would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from expertsmith.engine.layout import expert_parameters
from expertsmith.experts.inventory import Inventory
from expertsmith.healing.amount import Amount, Layer, amount
from expertsmith.healing.experts import LayerExperts
from expertsmith.healing.halted import Halted
from expertsmith.healing.muon import Muon, living
from expertsmith.healing.options import LayerLocal
from expertsmith.healing.replay import Replay
from expertsmith.healing.written import trainable_router
from expertsmith.ranks import current
from expertsmith.surgery.merge import router_tensor

RATES = (0.03, 0.0075)  # shares of a weight's size that the first step moves; the next is tried where one has lowered no error
LOOKS = 10  # times that a run looks at the held-out tokens,
PATIENCE = 4  # and so many looks in a row without a lower error end it
Trained = tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]  # matrices and biases of experts, the router's
Part = tuple[torch.Tensor, int]  # tokens [rows, length], and the batch that they are of


def refine(
    halted: Halted,
    replay: Replay,
    weights: Trained,
    options: LayerLocal,
    pairs: int,
    tick: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Train the layer and leave the best weights found in it; returns its entry of the report. `tick` receives shares of the work.

    Args:
        replay: of the layer; `weights`: those that `trained` returns.
        pairs: the (token, expert) pairs of the tokens that are not held out, over all ranks.
    """
    matrices, biases, rows = weights
    tokens = sum(int((mask & ~held).sum()) for mask, held in zip(halted.masks, halted.held, strict=True))
    numbers = Layer(
        halted.experts.count,
        sum(int(living(weight).prod(-1).sum()) for weight in matrices) // halted.experts.count
        + sum(weight.numel() for weight in biases) // halted.experts.count,
        sum(weight.numel() for weight in rows),
        max(min(weight.shape[-2:]) for weight in matrices),
        halted.targets[0].flatten(2).shape[2],
        int(current().total(tokens)[0]),
        pairs,
    )
    chosen = amount(numbers, options)
    if not chosen.steps:
        return {"amount": chosen.to_json()}
    run = _Run(halted, replay, matrices, [*biases, *rows], chosen, options.seed, tick)
    begin = run.best
    for rate in (options.learning_rate,) if options.learning_rate else RATES:
        run.descend(rate)
        if run.best_step:
            break
    run.finish()
    return {
        "amount": chosen.to_json(),
        "learning_rate": rate,
        "best_step": run.best_step,
        "last_step": run.last_step,
        "error_before": begin,
        "error_after": run.best,
    }


def trained(layer: LayerExperts, inventory: Inventory, index: int) -> Trained:
    """The weights of a layer that gradients change: matrices of its experts, their biases, and the router's."""
    found = {id(weight): (name, weight) for name, weight in expert_parameters(layer.module)}
    rows = [
        router_tensor(layer.block, claim, layer.record)
        for claim in inventory.by_layer[index]
        if trainable_router(claim, inventory)
    ]
    others = dict.fromkeys(weight for weight in rows if isinstance(weight, nn.Parameter) and id(weight) not in found)
    flat = [weight for name, weight in found.values() if weight.dim() < 2 or name.endswith("bias")]
    return [weight for _, weight in found.values() if all(weight is not one for one in flat)], flat, list(others)


class _Run:
    """The weights, their start values, and the best so far."""

    def __init__(
        self,
        halted: Halted,
        replay: Replay,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        chosen: Amount,
        seed: int,
        tick: Callable[[float], None],
    ) -> None:
        self.steps, self.tick, self.ranks = chosen.steps, tick, current()
        self.experts, self.matrices, self.others = halted.experts, matrices, others
        self.weights = [*matrices, *others]
        self.replay = replay
        train = [mask & ~held for mask, held in zip(halted.masks, halted.held, strict=True)]
        self.train, self.held = (Tokens(masks, self.replay, chosen.step_tokens) for masks in (train, halted.held))
        self.start = [weight.detach().clone() for weight in self.weights]
        self.kept = self.start
        self.best, self.best_step, self.last_step = mean_error(replay, self.held), 0, 0
        self.seed = seed * 1009 + halted.index

    def descend(self, rate: float) -> None:
        """Train from the start weights; ends early where the held-out error has stopped falling."""
        self._set(self.start)
        for weight in self.weights:
            weight.requires_grad_(True)
        optimizer = Muon(self.matrices, self.others, rate, self.steps)
        drawn = self.train.draw(torch.Generator().manual_seed(self.seed))
        every = max(1, -(-self.steps // LOOKS))
        lowest, since = float("inf"), 0  # since: looks without a lower error
        for step in range(1, self.steps + 1):
            self._gradients(*next(drawn))
            optimizer.step()
            self.tick(1 / self.steps)
            if step % every == 0 or step == self.steps:
                error = mean_error(self.replay, self.held)
                since, lowest, self.last_step = 0 if error < lowest else since + 1, min(lowest, error), step
                if error < self.best:
                    self.best, self.best_step = error, step
                    self.kept = [weight.detach().clone() for weight in self.weights]
                if since == PATIENCE:
                    break
        for weight in self.weights:
            weight.requires_grad_(False)

    def finish(self) -> None:
        """Put the best weights into the layer."""
        self._set(self.kept)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    def _gradients(self, parts: Sequence[Part], count: int) -> None:
        for rows, number in parts:
            with torch.enable_grad(), self.experts.fast:
                loss = (self.replay.errors(rows, number) * self.train.counts[rows.reshape(-1)]).sum() / count
            torch.autograd.backward(loss, inputs=self.weights)
        if self.ranks.world > 1:
            for weight in self.weights:
                if weight.grad is None:  # none of the step's tokens is of this rank
                    weight.grad = torch.zeros_like(weight)
            self.ranks.add_up([weight.grad for weight in self.weights if weight.grad is not None])


@torch.no_grad()
def mean_error(replay: Replay, tokens: Tokens) -> float:
    """The mean relative squared error of the layer's output at tokens of all ranks."""
    parts, count = tokens.all()
    found = [(replay.errors(rows, number) * tokens.counts[rows.reshape(-1)]).sum() for rows, number in parts]
    own = float(torch.stack(found).sum()) if found else 0.0
    return current().total(own)[0] / count


class Tokens:
    """The tokens that count, and how steps draw them: any tokens together, or whole batches. All ranks draw the same; a step's parts are this
    rank's of it, and its number of tokens is that of all ranks."""

    def __init__(self, masks: Sequence[torch.Tensor], replay: Replay, size: int) -> None:
        self.batches, self.by_token, self.size = replay.batches, replay.by_token, size
        every = torch.cat([mask.reshape(-1) for mask in masks])
        self.counts = every.float()
        self.places = every.nonzero().squeeze(1)
        self.ranks = current()
        self.sizes = self.ranks.joined([int(mask.sum()) for mask in masks])

    def all(self) -> tuple[list[Part], int]:
        """All tokens of this rank in parts of a step's size, and the number of those of all ranks."""
        if self.by_token:
            return [(part[None], 0) for part in torch.split(self.places, self.size) if len(part)], sum(self.sizes)
        return self._own(number for number, size in enumerate(self.sizes) if size), sum(self.sizes)

    def draw(self, generator: torch.Generator) -> Iterator[tuple[list[Part], int]]:
        """Yield the parts of a step and its number of tokens, in random order, without end."""
        return self._draw_tokens(generator) if self.by_token else self._draw_batches(generator)

    def _draw_tokens(self, generator: torch.Generator) -> Iterator[tuple[list[Part], int]]:
        batch = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))  # of every token
        own = batch % self.ranks.world == self.ranks.rank
        places = torch.where(own, own.cumsum(0) - 1, -1)  # of every token, in `self.places`; -1: another rank has it
        size = min(len(places), self.size)
        while True:
            drawn = places[torch.randperm(len(places), generator=generator)][: len(places) // size * size].numpy()
            counts = (drawn >= 0).reshape(-1, size).sum(1).tolist()
            found = self.places[torch.from_numpy(drawn[drawn >= 0]).to(self.places.device)]
            for part in torch.split(found, counts):
                yield [(part[None], 0)] if len(part) else [], size

    def _draw_batches(self, generator: torch.Generator) -> Iterator[tuple[list[Part], int]]:
        usable = [number for number, size in enumerate(self.sizes) if size]
        size = min(sum(self.sizes[number] for number in usable), self.size)
        taken: list[int] = []
        while True:
            for place in torch.randperm(len(usable), generator=generator).tolist():
                taken.append(usable[place])
                if sum(self.sizes[number] for number in taken) >= size:
                    yield self._own(taken), sum(self.sizes[number] for number in taken)
                    taken = []

    def _own(self, numbers: Iterable[int]) -> list[Part]:
        """This rank's of some batches, which are numbered over all ranks."""
        own = [number // self.ranks.world for number in numbers if number % self.ranks.world == self.ranks.rank]
        return [(self.batches[number], number) for number in own]

"""Refine one layer by gradients: router rows, gate, up and down projections of its experts, on the squared error of the layer's output.

The loss needs this layer only: its inputs and targets are known. Gradients flow through the routing weights, not through the choice of
experts. Adam, with a learning rate that falls linearly to 0; rate and stopping point are those that are best on the held-out tokens, and the
start is one of the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from expertsmith.experts.inventory import Inventory
from expertsmith.healing.halted import Halted
from expertsmith.healing.options import LayerLocal
from expertsmith.healing.written import trainable_router
from expertsmith.surgery.merge import router_tensor

RATES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)  # tried from the highest down, until one is worse than the one before it
TRIAL = 5  # a trial of a learning rate has one step for so many of the full run
LOOKS = 10  # times that a run looks at the held-out tokens


def refine(
    halted: Halted, inventory: Inventory, options: LayerLocal, tick: Callable[[float], None] = lambda _: None
) -> dict[str, Any]:
    """Leave the best weights found in the layer; returns what the report says of it. `tick` is told shares of the work."""
    run = _Run(halted, inventory, options, tick)
    begin = run.best
    rates = (options.learning_rate,) if options.learning_rate else RATES
    trials = {}
    if len(rates) > 1:
        for rate in rates:
            trials[rate] = run.descend(rate, max(1, options.steps // TRIAL), looks=1)
            if trials[rate] > min(trials.values()):
                break
    chosen = min(trials, key=lambda rate: trials[rate]) if trials else rates[0]
    run.descend(chosen, options.steps, LOOKS)
    run.finish()
    return {
        "learning_rate": chosen,
        "trials": {f"{rate:g}": error for rate, error in trials.items()},
        "best_step": run.best_step,
        "error_before": begin,
        "error_after": run.best,
    }


class _Run:
    """The weights, their start, and the best of them so far."""

    def __init__(self, halted: Halted, inventory: Inventory, options: LayerLocal, tick: Callable[[float], None]) -> None:
        self.halted, self.options, self.tick = halted, options, tick
        layer = halted.experts
        rows = [
            router_tensor(layer.block, claim, layer.record)
            for claim in inventory.by_layer[halted.index]
            if trainable_router(claim, inventory)
        ]
        found = [*layer.module.parameters(), *rows]
        self.weights = [weight for weight in dict.fromkeys(found) if isinstance(weight, nn.Parameter)]
        self.train = [mask & ~held for mask, held in zip(halted.masks, halted.held, strict=True)]
        self.start = [weight.detach().clone() for weight in self.weights]
        self.kept = self.start
        self.best, self.best_step = self._held_error(), 0
        self.generator = torch.Generator().manual_seed(options.seed * 1009 + halted.index)

    def descend(self, rate: float, steps: int, looks: int) -> float:
        """One run from the start; returns the best held-out error that it had."""
        self._set(self.start)
        for weight in self.weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(self.weights, lr=rate)
        drawn = self._draw()
        every = max(1, -(-steps // looks))
        best = float("inf")
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - (step - 1) / steps)
            self._gradients(next(drawn))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.tick(1 / (1.6 * self.options.steps))
            if step % every == 0 or step == steps:
                error = self._held_error()
                best = min(best, error)
                if error < self.best:
                    self.best, self.best_step = error, step
                    self.kept = [weight.detach().clone() for weight in self.weights]
        for weight in self.weights:
            weight.requires_grad_(False)
        return best

    def finish(self) -> None:
        """Put the best weights into the layer."""
        self._set(self.kept)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    def _draw(self) -> Iterator[list[int]]:
        """Batches for a step, of `step_tokens` tokens or more, in a random order without end."""
        usable = [number for number, mask in enumerate(self.train) if bool(mask.any())]
        taken: list[int] = []
        while True:
            for place in torch.randperm(len(usable), generator=self.generator).tolist():
                taken.append(usable[place])
                if sum(int(self.train[number].sum()) for number in taken) >= self.options.step_tokens:
                    yield taken
                    taken = []

    def _gradients(self, numbers: list[int]) -> None:
        count = sum(int(self.train[number].sum()) for number in numbers)
        for number in numbers:
            with torch.enable_grad():
                output = self.halted.calls[number]()
                loss = self.halted.share(output, number, self.train[number]) / count
                torch.autograd.backward(loss, inputs=self.weights)

    @torch.no_grad()
    def _held_error(self) -> float:
        total, count = 0.0, 0
        for number, mask in enumerate(self.halted.held):
            if bool(mask.any()):
                total += self.halted.held_error(self.halted.calls[number](), number)
                count += int(mask.sum())
        return total / count

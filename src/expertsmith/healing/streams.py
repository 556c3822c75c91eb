"""Run two models in lockstep over the same tokens: the original (teacher), and the compressed one, which halts at every layer to be healed.

At a halt, every batch's call of the layer is available, with the arguments that the compressed layers before it produced. The layer can run
on them repeatedly, with other weights, before all batches go on to the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from expertsmith.calibration.data import TokenData
from expertsmith.engine import Batch, LoadedModel, Walk
from expertsmith.errors import UserError

HELD_SHARE = 8  # one sequence of so many is held out of the calibration
Call = Callable[[], Any]  # a decoder layer's forward on one batch


class HaltingWalk(Walk):
    """A walk that halts at the decoder layers `at`.

    Args:
        halt: called as halt(layer, calls) when every batch has reached the layer. It may return the outputs of all batches, which then
            replace the layer's; otherwise the layer runs.
    """

    def __init__(
        self,
        model: LoadedModel,
        batches: Sequence[Batch],
        at: Collection[int],
        halt: Callable[[int, list[Call]], list[Any] | None],
        before: Callable[[int, int, Batch], None] | None = None,
    ) -> None:
        super().__init__(model, batches, before)
        self.at, self.halt = frozenset(at), halt
        self._calls: list[Call] = []
        self._ready: dict[int, Any] = {}

    def _pass(self, index: int) -> None:
        super()._pass(index)
        if index in self.at:
            calls, self._calls = self._calls, []
            self._ready = dict(enumerate(self.halt(index, calls) or []))
            super()._pass(index)

    def _run(self, index: int, number: int, call: Call) -> Any:
        if index in self.at:
            self._calls.append(call)
            self._lanes.pause()
            if number in self._ready:
                return self._ready.pop(number)
        return call()


def held_out(data: TokenData, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Masks [rows, length] of every batch: tokens that count and are held out, to judge what is learned on the others.

    Every eighth sequence of a domain is held out, at least one where it has four or more. If no domain has four sequences, the last eighth
    of every sequence is held out.

    Raises:
        UserError: too few tokens to hold some out.
    """
    held = {
        domain: {place for place in range(len(rows)) if (place + 1) % min(HELD_SHARE, max(4, len(rows))) == 0}
        for domain, rows in data.sequences.items()
    }
    any_held = any(held.values())
    made = []
    for batch in batches:
        mask = torch.zeros_like(batch.mask)
        for row, place in enumerate(batch.sequences):
            if place in held[batch.domain]:
                mask[row] = batch.mask[row]
            elif not any_held:
                count = int(batch.mask[row].sum())
                mask[row, count - count // HELD_SHARE : count] = True
        made.append(mask)
    if not any(bool(mask.any()) for mask in made):
        raise UserError("the data is too short to hold any of it out", "give at least four sequences, or longer ones")
    return made


def held_batches(batches: Sequence[Batch], held: Sequence[torch.Tensor]) -> list[Batch]:
    """The batches with only held-out tokens counting; batches without any are left out."""
    return [
        Batch(batch.input_ids, mask, batch.domain, batch.sequences)
        for batch, mask in zip(batches, held, strict=True)
        if bool(mask.any())
    ]

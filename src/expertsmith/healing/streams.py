"""Two models in lock-step over the same tokens: the original (teacher), and the compressed one, which halts at every layer that is healed.

At a halt every batch's call of the layer is in hand, with the arguments that the compressed layers before it produced. The layer can be
run on them as often as wanted, with other weights; then all batches pass for good.
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
        halt: called as halt(layer, calls) when every batch stands before the layer. It may return the outputs of all batches, which are
            then taken as they are; otherwise the layer runs.
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
    """[rows, length] bool of every batch: tokens that count and are held out of the calibration, to judge what is learned on the rest.

    Of each domain every eighth sequence is held out, at least one of four or more; where no domain has as many, the last eighth of
    every sequence.

    Raises:
        UserError: too few tokens to hold any out.
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
    """The same batches with only the held-out tokens counting; those without any are left out."""
    return [
        Batch(batch.input_ids, mask, batch.domain, batch.sequences)
        for batch, mask in zip(batches, held, strict=True)
        if bool(mask.any())
    ]

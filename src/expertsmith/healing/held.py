"""Which tokens of the calibration are held out, to judge what is learned on the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expertsmith.calibration.data import TokenData
from expertsmith.engine import Batch
from expertsmith.errors import UserError

HELD_SHARE = 8  # one sequence of so many is held out of the calibration


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
    """The sequences that have held-out tokens, of which only these count; batches without any are left out."""
    made = []
    for batch, mask in zip(batches, held, strict=True):
        rows = mask.any(1).nonzero().squeeze(1)
        if len(rows):
            sequences = [batch.sequences[row] for row in rows.tolist()]
            made.append(Batch(batch.input_ids[rows], mask[rows], batch.domain, sequences, batch.mask[rows]))
    return made

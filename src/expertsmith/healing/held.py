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


def held_batches(batches: Sequence[Batch], held: Sequence[torch.Tensor], size: int) -> list[Batch]:
    """The sequences that have held-out tokens, of which only these count, in batches of one domain and one length, of up to `size` positions."""
    groups: dict[tuple[str, int], list[tuple[Batch, torch.Tensor, int]]] = {}
    for batch, mask in zip(batches, held, strict=True):
        found = groups.setdefault((batch.domain, batch.input_ids.shape[1]), [])
        found += [(batch, mask, row) for row in mask.any(1).nonzero().squeeze(1).tolist()]
    made = []
    for (domain, length), found in groups.items():
        for start in range(0, len(found), most := max(1, size // length)):
            rows = found[start : start + most]
            ids, counted, read = (
                torch.stack(values)
                for values in zip(*((batch.input_ids[r], mask[r], batch.mask[r]) for batch, mask, r in rows), strict=True)
            )
            made.append(Batch(ids, counted, domain, [batch.sequences[row] for batch, _, row in rows], read))
    return made

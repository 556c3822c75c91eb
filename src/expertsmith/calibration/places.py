"""A seeded sample of the tokens of some batches, and the order in which all ranks and batch sizes see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from expertsmith.calibration.data import TokenData
from expertsmith.calibration.observers import choose_sample
from expertsmith.engine import Batch


@dataclass
class Places:
    """The sampled tokens of the batches, and the place of each of them in the order of (domain, sequence, position)."""

    rows: list[torch.Tensor]  # of every batch: index into its flattened tokens
    places: list[torch.Tensor]  # of every batch: the same tokens' places
    sequence: torch.Tensor  # [tokens] of every place: the sequence, counted over all domains
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = self.sequence.numel()

    def on(self, device: torch.device) -> Places:
        """The same on a device, that of a decoder layer."""
        rows, places = ([each.to(device) for each in held] for held in (self.rows, self.places))
        return Places(rows, places, self.sequence.to(device))


def sample_places(data: TokenData, batches: Sequence[Batch], max_tokens: int, seed: int, device: torch.device) -> Places:
    """A seeded sample of `max_tokens` tokens a domain (0: all), as places in the batches, which may be a part of the data's."""
    wanted: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
    sequence: list[int] = []
    start = 0
    for domain in sorted(data.sequences):
        lengths = [len(row) for row in data.sequences[domain]]
        chosen = choose_sample(lengths, max_tokens, seed, domain) if max_tokens else None
        for number, length in enumerate(lengths):
            taken = np.array([chosen is None or (number, position) in chosen for position in range(length)], dtype=bool)
            wanted[domain, number] = np.where(taken, start + np.cumsum(taken) - 1, -1)
            start += int(taken.sum())
            sequence += [len(wanted) - 1] * int(taken.sum())
    rows: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    for batch in batches:
        table = np.full(tuple(batch.input_ids.shape), -1)
        for row, number in enumerate(batch.sequences):
            held = wanted[batch.domain, number]
            table[row, : len(held)] = held
        flat = torch.from_numpy(table.reshape(-1))
        index = (flat >= 0).nonzero().squeeze(1)
        rows.append(index.to(device))
        places.append(flat[index])
    here = torch.cat(places).sort().values
    owner = torch.tensor(sequence, dtype=torch.int64)[here]
    return Places(rows, [torch.searchsorted(here, each).to(device) for each in places], owner.to(device))

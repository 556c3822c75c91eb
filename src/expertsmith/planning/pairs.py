"""Bins and joint histograms of experts' weights on a torch device: the same integers as `methods.information` gets on CPU cores.

The counts of a pair's table are all that its entropy needs, and how often each count occurs says the same in less: two short lists a pair
leave the device, and the entropy is computed from them as on the CPU, so that plans are equal to the last byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from expertsmith.engine.devices import free_memory
from expertsmith.methods.information import (
    Array,
    BinRule,
    Codes,
    Counting,
    Precision,
    edges,
    edges_between,
    entropy,
    entropy_of,
    renumbered,
)

MOST = 2**26  # entries of pairs counted at once: enough to keep a device busy
EACH = 48  # bytes on the device for each of them: the cell of an entry, or count, place and rank of a cell
SORTED = 3  # times as many where cells are sorted
SHARE = 0.5  # of the free memory that is used


def counting_on(device: torch.device) -> Counting:
    """How moeits bins and counts on a device."""
    return Counting(partial(codes_on, device), partial(joint_entropies, device))


def codes_on(device: torch.device, values: Array, bins: BinRule = "numpy2", precision: Precision = "float32") -> Codes:
    """`methods.information.codes`, computed on a device; the same to the last bit.

    Raises:
        UserError: as `methods.information.edges`.
    """
    if not values.size:
        edges(values)  # refuses it
    flat = torch.from_numpy(np.ascontiguousarray(values, dtype=precision).reshape(-1)).to(device)
    ordered = flat.sort().values

    def ranked(places: list[int]) -> Array:
        found: Array = ordered[torch.tensor(places, device=device)].cpu().numpy()
        return found

    low, high = ranked([0, flat.numel() - 1])
    bounds = edges_between(low, high, ranked, flat.numel(), bins)
    k = len(bounds) - 1
    if k == 1:
        return Codes(np.zeros(flat.numel(), np.uint16), 1, 1, 0.0, True, float(low))
    found = torch.searchsorted(torch.from_numpy(bounds).to(device), flat, right=True).sub_(1).clamp_(max=k - 1)
    tally = torch.zeros(k, dtype=torch.int64, device=device)
    counts: Array = tally.scatter_add_(0, found, found.new_ones(()).expand_as(found)).cpu().numpy()
    number = renumbered(counts)
    used = int(np.count_nonzero(counts))
    found = torch.from_numpy(number.astype(np.int32)).to(device)[found]
    binned = found.cpu().numpy().astype(number.dtype)
    return Codes(binned, k, used, entropy(counts, flat.numel()), False, float(low))


def joint_entropies(device: torch.device, arrays: Sequence[Codes], room: int | None = None) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, H(i, j) in nats) for every pair i < j of arrays of equal size, in the order of their number of bins.

    An array is counted with as many others at once as memory allows, in a few operations; their results are fetched together.

    Args:
        room: bytes of the device's memory that may be used, but at least what two arrays and one pair take; default: half of what is free.
    """
    room = int(SHARE * free_memory(device)) if room is None else room
    size, order = arrays[0].codes.size, sorted(range(len(arrays)), key=lambda e: arrays[e].used)
    used = [arrays[e].used for e in order]
    kind: type[Any] = np.int16 if used[-1] <= 2**15 else np.int32
    most = max(1, min(MOST, room // 2 // EACH))
    tile = room // 2 // (size * np.dtype(kind).itemsize)
    tile = len(arrays) if tile >= len(arrays) else max(1, tile // 3)  # all arrays, or two tiles and the next one

    def brought(first: int) -> torch.Tensor:
        chosen = order[first : first + tile]
        held = torch.empty(len(chosen), size, dtype=torch.int16 if kind is np.int16 else torch.int32, device=device)
        for place, e in enumerate(chosen):
            held[place] = torch.from_numpy(arrays[e].codes.astype(kind))
        return held

    for first in range(0, len(order), tile):
        rows = brought(first)
        for second in range(first, len(order), tile):
            columns = rows if second == first else brought(second)
            for place, row in enumerate(rows):
                start = place + 1 if second == first else 0
                widths = used[second + start : second + len(columns)]
                for offset, often in _row(row, used[first + place], columns[start:], widths, most):
                    for number, found in enumerate(often):
                        i, j = order[first + place], order[second + start + offset + number]
                        yield min(i, j), max(i, j), _entropy(found, size)


def _row(row: torch.Tensor, height: int, columns: torch.Tensor, widths: list[int], most: int) -> Iterator[tuple[int, Array]]:
    """Yield (first column, how often each count occurs) for pieces of the columns, each paired with the row.

    Args:
        row: codes [n], below `height`.
        columns: codes [columns, n]; those of column c are below widths[c], which ascend.
        most: entries of pairs counted at once.
    """
    size = len(row)
    dense = sum(height * width <= min(size, most) for width in widths)  # for the others, a table would be mostly empty
    for first, last, at_once in ((0, dense, most), (dense, len(widths), most // SORTED)):
        step = max(1, at_once // size)
        for start in range(first, last, step):
            stop = min(start + step, last)
            part, width = columns[start:stop], widths[stop - 1]
            table = _table(row, height, part, width, most) if last == dense else _runs(row, part, width)
            yield start, _often(table, size).cpu().numpy()


def _count_kind(size: int) -> torch.dtype:
    return torch.int32 if size < 2**31 else torch.int64


def _table(row: torch.Tensor, height: int, columns: torch.Tensor, width: int, most: int) -> torch.Tensor:
    """How often each code of the row meets each code of a column: [columns, height * width]."""
    table = torch.zeros(len(columns), height * width, dtype=_count_kind(len(row)), device=row.device)
    piece = max(1, most // len(columns))
    for start in range(0, len(row), piece):
        cells = row[start : start + piece].long().mul_(width) + columns[:, start : start + piece]
        table.scatter_add_(1, cells, table.new_ones(()).expand_as(cells))
    return table


def _runs(row: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """The counts of `_table` that are not 0, then zeros: [columns, n]. Cells are sorted, and equal ones counted."""
    cells = (row.long().mul_(width) + columns).sort(1).values
    number = torch.zeros_like(cells)
    torch.cumsum(cells[:, 1:] != cells[:, :-1], 1, out=number[:, 1:])
    table = torch.zeros(cells.shape, dtype=_count_kind(len(row)), device=row.device)
    return table.scatter_add_(1, number, table.new_ones(()).expand_as(number))


def _split(size: int) -> tuple[int, int]:
    """(counts below this are tallied; the larger ones, at most so many in a table of `size` entries, are listed)."""
    few = math.isqrt(size) + 1
    return few, size // few


def _often(table: torch.Tensor, size: int) -> torch.Tensor:
    """How often each count below `few` occurs in each row of a table, then the larger counts themselves: [rows, few + many], see `_split`."""
    few, many = _split(size)
    large = table >= few
    place = torch.where(large, large.cumsum(1).add_(few - 1), table)
    often = table.new_zeros(len(table), few + many)
    return often.scatter_add_(1, place, torch.where(large, table, 1))


def _entropy(often: Array, size: int) -> float:
    """The entropy in nats of a table of `size` entries, from a row of `_often`."""
    few, _ = _split(size)
    small = np.flatnonzero(often[1:few]) + 1
    large, repeats = np.unique(often[few:][often[few:] > 0], return_counts=True)
    return entropy_of(np.concatenate([small, large]).astype(np.int64), np.concatenate([often[small], repeats]), size)

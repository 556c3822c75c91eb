"""Read the experts of a layer straight into the one parameter that holds them.

transformers reads every expert by itself, stacks them, and joins gate and up projections: each byte is copied twice more, and the experts are in
memory twice while that lasts. Here the parameter is made first, and every expert is copied to its place as it is read, unless it was read there.
The numbers are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from expertsmith.engine.stock import Naming, renamer, stacks


class Stack:
    """A parameter [experts, rows, columns] that is read when transformers takes it, by `stack[...].to(device, dtype)`.

    Args:
        parts: (expert, its first row, an object whose `[...]` reads the tensor [rows of it, columns]), in the order of their bytes.
        room: gives the memory of the parameter if its parts may be read into it, else None.
    """

    def __init__(
        self, shape: torch.Size, parts: list[tuple[int, int, Any]], room: Callable[[Stack], torch.Tensor | None]
    ) -> None:
        self.shape, self.parts, self._room = shape, parts, room

    def __getitem__(self, _: Any) -> Stack:
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The parameter."""
        room = self._room(self)
        if room is not None and (room.dtype, room.device) != (dtype, torch.device(device or "cpu")):
            room = None
        whole = torch.empty(self.shape, dtype=dtype, device=device) if room is None else room
        for expert, row, unread in self.parts:
            part = unread[...]
            place = whole[expert, row : row + part.shape[0]]
            if room is None or place.data_ptr() != part.data_ptr():
                place.copy_(part)
        return whole


def in_place(
    naming: Naming,
    state: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    room: Callable[[Stack], torch.Tensor | None] = lambda stack: None,
) -> dict[str, Any]:
    """`state` for `stock.read_in`, with one `Stack` for the experts of each parameter where they fit exactly. What does not fit (an expert
    is missing, a shape is wrong) is left to transformers, which says what is wrong.

    Args:
        state: name → an object whose `[...]` reads the tensor.
        shapes: name → shape of the tensor.
        room: of a `Stack`.
    """
    rename, order, targets = renamer(naming), stacks(naming), naming.module.state_dict()
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted(state, key=_natural):
        target, pattern = rename(name)
        if pattern in order and target in targets:
            found.setdefault(target, {}).setdefault(pattern, []).append(name)
    result = dict(state)
    for target, held in found.items():
        columns = [held.get(pattern, []) for pattern in order[next(iter(held))]]
        shape = targets[target].shape
        if len(shape) != 3 or {len(names) for names in columns} != {shape[0]}:
            continue
        rows = [shapes[names[0]][0] if shapes[names[0]] else 0 for names in columns]
        if sum(rows) != shape[1] or any(
            shapes[n] != (r, shape[2]) for names, r in zip(columns, rows, strict=True) for n in names
        ):
            continue
        parts = [
            (expert, sum(rows[:k]), result.pop(name))
            for expert in range(shape[0])
            for k, name in enumerate(names[expert] for names in columns)
        ]
        result[target] = Stack(shape, parts, room)
    return result


def _natural(name: str) -> list[Any]:
    """Sorts expert 10 after expert 9, as transformers does."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

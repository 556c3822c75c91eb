"""Read the next decoder layer of a streamed model from disk, and copy it to the GPU, while a layer computes.

Only the stored bytes are read ahead; they are renamed, fused, decoded and placed when the layer is needed, as without reading ahead. So the
extra memory is the stored bytes of one decoder layer, in main memory. On a CPU experts are read to where they lie in the fused parameter. For a GPU
they lie in memory from which it copies directly, and it does so at once if it has room for them, beside its computing. Quantised weights wait in
main memory, where they are decoded.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch

from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.ahead import early
from expertsmith.engine.devices import free_memory

SHARE = 0.25  # of the free memory, at most, for the stored bytes of a decoder layer: two models may read ahead
ALIGNED = 64  # bytes


class ReadAhead:
    """The reads of one streamed model.

    Args:
        groups: decoder layer (None: outside the layers) → its tensors in `weights`.
    """

    def __init__(self, weights: Checkpoint, groups: Mapping[int | None, Sequence[str]], device: torch.device) -> None:
        self._view, self._reads = early(weights)
        self._groups, self._device = groups, device
        self._decodes = self._view is not self._reads
        self._copies = None if self._decodes or device.type == "cpu" else Copies(device)  # what is decoded stays in main memory
        self._arenas: list[Arena] = []  # of the layer that computes, and of the next
        self._begun: int | None = None
        self._runs: dict[tuple[str, ...], torch.Tensor] = {}

    def begin(self, index: int, runs: Iterable[tuple[str, ...]] = ()) -> None:
        """Begin to read decoder layer `index`, unless that was begun or there is no memory for it.

        Args:
            runs: tensors that are to lie side by side in main memory, for `room`.
        """
        if index == self._begun:
            return
        self.end()
        if self._copies is not None:
            self._copies.finish()  # the next bytes take the place of those that were copied
        arena, largest = self._arena(), max(map(self._size, self._groups))
        if arena is None:
            return
        self._begun = index
        runs = [] if self._decodes or self._device.type != "cpu" else list(runs)
        places = self._places(index, runs)
        for run in runs:
            nbytes = sum(self._reads.tensors[name].nbytes for name in run)
            self._runs[run] = torch.frombuffer(arena.lend(places[run[0]], nbytes), dtype=torch.uint8)
        memory = partial(_lent, arena, places)
        if self._copies is not None and _fits(largest, self._device):
            self._reads.begin(self._parts(index), memory, self._copies.send)
        else:
            self._reads.begin(self._parts(index), memory)

    def room(self, run: tuple[str, ...]) -> torch.Tensor | None:
        """The bytes in which tensors lie, or will lie, side by side; None if they were not begun so."""
        return self._runs.get(run)

    def take(self, name: str) -> torch.Tensor:
        """A tensor, from memory if it was read ahead, and then no longer held."""
        found = self._view.read(name)
        self._reads.used(self._view.parts(name))
        return found if self._copies is None or found.device.type == "cpu" else self._copies.received(found)

    def holds(self, value: torch.Tensor) -> bool:
        """Whether a tensor lies in memory that is used again for a later layer."""
        return any(arena.begin <= value.data_ptr() < arena.begin + arena.nbytes for arena in self._arenas)

    def end(self) -> None:
        """Stop reading, and drop what was read."""
        self._reads.stop()
        self._runs = {}
        self._begun = None

    def close(self) -> None:
        """As `end`; also return the memory that is used for every layer."""
        self.end()
        if self._copies is not None:
            self._copies.finish()
        for arena in self._arenas:
            arena.close()
        self._arenas = []

    def _arena(self) -> Arena | None:
        """Memory for a decoder layer: what no tensor uses any more, or new memory if there is enough."""
        for arena in self._arenas:
            if arena.is_free():
                return arena
        largest = max(map(self._size, self._groups))
        if not _fits(largest, torch.device("cpu")):
            return None
        try:
            found = Arena(largest, pinned=self._device.type != "cpu")
        except OSError:  # the limit of the process is lower than what the system has
            return None
        for arena in self._arenas[:-1]:
            arena.close()
        self._arenas = [*self._arenas[-1:], found]
        return found

    def _parts(self, group: int | None) -> list[str]:
        return [part for name in self._groups.get(group, ()) for part in self._view.parts(name)]

    def _size(self, group: int | None) -> int:
        if group is None:
            return 0
        return sum(_aligned(self._reads.tensors[name].nbytes) for name in set(self._parts(group)))

    def _places(self, group: int, runs: Sequence[tuple[str, ...]]) -> dict[str, int]:
        """Tensor → its first byte. Those of a run follow each other without a gap."""
        together = {name for run in runs for name in run}
        alone = [(name,) for name in dict.fromkeys(self._parts(group)) if name not in together]
        places, end = {}, 0
        for run in [*runs, *alone]:
            for name in run:
                places[name] = end
                end += self._reads.tensors[name].nbytes
            end = _aligned(end)
        return places


def _lent(arena: Arena, places: Mapping[str, int], name: str, nbytes: int) -> memoryview:
    return arena.lend(places[name], nbytes)


class Copies:
    """Copies to a device beside its computing: on a stream of their own where the device has streams (CUDA), otherwise one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def send(self, value: torch.Tensor) -> torch.Tensor:
        """Begin to copy a tensor of pinned memory, which must stay as it is until `finish`; called in the reading thread."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return value.to(self._device, non_blocking=self._stream is not None)

    def received(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor of `send`, for what is computed from now on: it waits for the copy on the device, not here."""
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            value.record_stream(
                computing
            )  # its memory is of the other stream, and may be used again only after what is computed
        return value

    def finish(self) -> None:
        """Wait until all is copied."""
        if self._stream is not None:
            self._stream.synchronize()


class Arena:
    """Main memory that stays in place, for the tensors of one decoder layer after another: new pages for every layer would take longer than
    reading into them. If it is `pinned`, a GPU copies from it directly."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.nbytes = max(1, nbytes)
        self._pages = mmap.mmap(-1, self.nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system may not have them
                self._pages.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._pages)
        self.begin = torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr()
        self._lent: list[weakref.ref[memoryview]] = []
        # torch's own pinned memory takes the next power of two, and keeps what is freed
        self._pinned = pinned and torch.cuda.is_available() and not int(_cuda().cudaHostRegister(self.begin, self.nbytes, 0))

    def lend(self, begin: int, nbytes: int) -> memoryview:
        """The bytes from `begin` on. They are in use as long as the view, or a tensor made of it, exists."""
        found = self._view[begin : begin + nbytes]
        self._lent.append(weakref.ref(found))
        return found

    def is_free(self) -> bool:
        """Whether nothing of it is in use."""
        self._lent = [view for view in self._lent if view() is not None]
        return not self._lent

    def close(self) -> None:
        """Let the memory go, once no tensor uses it."""
        if self._pinned:
            _cuda().cudaHostUnregister(self.begin)
        self._pinned = False
        del self._view, self._pages


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


def _fits(nbytes: int, device: torch.device) -> bool:
    return nbytes <= SHARE * free_memory(device)

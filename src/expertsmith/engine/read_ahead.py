"""Read the next decoder layer of a streamed model from disk, and copy it to the GPU, while a layer computes.

Only the stored bytes are read ahead; they are renamed, fused, decoded and placed when the layer is needed, as without reading ahead. So the
extra memory is the stored bytes of one decoder layer, in main memory. For a GPU they lie in memory from which it copies directly, and it does so at
once if it has room for them, beside its computing. Quantised weights wait in main memory, where they are decoded.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.ahead import early
from expertsmith.checkpoint.reader import fresh
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
        self._pinned: Pinned | None = None
        self._copies = Copies(device) if self._view is self._reads else None  # what is decoded stays in main memory

    def begin(self, index: int) -> None:
        """Begin to read decoder layer `index`, if there is memory for it."""
        if self._device.type == "cpu":
            if _fits(self._size(index), self._device):
                self._reads.begin(self._parts(index), fresh)
            return
        room = max(map(self._size, self._groups))
        if self._pinned is None and _fits(room, torch.device("cpu")):
            self._pinned = Pinned(room)
        if self._pinned is None:
            return
        if self._copies is not None and _fits(room, self._device):
            self._copies.finish()  # the next bytes take the place of those that were copied
            self._reads.begin(self._parts(index), self._pinned.buffers(), self._copies.send)
        else:
            self._reads.begin(self._parts(index), self._pinned.buffers())

    def take(self, name: str) -> torch.Tensor:
        """A tensor, from memory if it was read ahead, and then no longer held."""
        found = self._view.read(name)
        self._reads.used(self._view.parts(name))
        return found if self._copies is None or found.device.type == "cpu" else self._copies.received(found)

    def end(self) -> None:
        """Stop reading, and drop what was read."""
        self._reads.stop()

    def close(self) -> None:
        """As `end`; also return the memory that is used for every layer."""
        self.end()
        if self._copies is not None:
            self._copies.finish()
        if self._pinned is not None:
            self._pinned.close()
        self._pinned = None

    def _parts(self, group: int | None) -> list[str]:
        return [part for name in self._groups.get(group, ()) for part in self._view.parts(name)]

    def _size(self, group: int | None) -> int:
        if group is None:
            return 0
        return sum(_aligned(self._reads.tensors[name].nbytes) for name in set(self._parts(group)))


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


class Pinned:
    """Main memory that stays in place, so that a GPU copies from it directly, for the tensors of one decoder layer after another."""

    def __init__(self, nbytes: int) -> None:
        self._pages = mmap.mmap(-1, max(1, nbytes))
        self._view = memoryview(self._pages)
        self._place = torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr()
        # torch's own pinned memory takes the next power of two, and keeps what is freed
        self._pinned = torch.cuda.is_available() and not int(_cuda().cudaHostRegister(self._place, len(self._pages), 0))

    def buffers(self) -> Callable[[int], memoryview]:
        """A function: bytes → the next buffer of so many, from the beginning again. What lay there before must no longer be needed."""
        begin = 0

        def following(nbytes: int) -> memoryview:
            nonlocal begin
            found = self._view[begin : begin + nbytes]
            begin += _aligned(nbytes)
            return found

        return following

    def close(self) -> None:
        """Let the memory go, once no tensor uses it."""
        if self._pinned:
            _cuda().cudaHostUnregister(self._place)
        self._pinned = False
        del self._view, self._pages


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


def _fits(nbytes: int, device: torch.device) -> bool:
    return nbytes <= SHARE * free_memory(device)

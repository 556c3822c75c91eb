"""Read tensors of a checkpoint before they are needed, in a background thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from expertsmith.checkpoint.floats import Floats
from expertsmith.checkpoint.reader import Checkpoint, TensorInfo, fill, fresh

if TYPE_CHECKING:
    import torch

BLOCK = 2**26  # bytes read before the thread looks whether it has to stop


@dataclass
class _Reader(Checkpoint):
    """What the thread reads with: into buffers of `memory`, until `stopped`."""

    memory: Callable[[str, int], Any] = field(kw_only=True)
    stopped: bool = field(default=False, kw_only=True)

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """See `Checkpoint.read`. After an error, nothing more is read."""
        try:
            if self.stopped:
                raise CancelledError
            return super().read(name, first, last)
        except BaseException:
            self.stopped = True
            raise

    def _bytes(self, info: TensorInfo, start: int, nbytes: int) -> Any:
        buffer = self.memory(info.name, nbytes)
        view = memoryview(buffer)
        for begin in range(0, nbytes, BLOCK):
            if self.stopped:
                raise CancelledError
            fill(view[begin : begin + BLOCK], info, start + begin)
        return buffer


@dataclass
class EarlyReads(Checkpoint):
    """A checkpoint whose `read` takes a tensor from memory if `begin` has had it read, and waits for it while it is being read.

    Only one set of tensors is held at a time, and each until `used` was called for all its uses, or `stop`. If one cannot be read ahead, no
    further one is: `read` then reads it again itself, so that an error appears where the tensor is needed, and memory that was
    too short for two layers may be enough for one.
    """

    _reads: dict[str, Future[torch.Tensor]] = field(default_factory=dict, repr=False)
    _uses: Counter[str] = field(default_factory=Counter, repr=False)
    _reader: _Reader | None = field(default=None, repr=False)
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    def begin(
        self,
        names: Collection[str],
        memory: Callable[[str, int], Any] = lambda name, nbytes: fresh(nbytes),
        then: Callable[[torch.Tensor], torch.Tensor] = lambda found: found,
    ) -> None:
        """Begin to read tensors in the order of their bytes. A name is given as often as its tensor is used.

        Args:
            memory: gives a writable buffer for a tensor of so many bytes.
            then: called in the thread with each tensor, as read; what it returns is held.
        """
        self.stop()
        self._uses = Counter(names)
        infos = sorted((self.tensors[name] for name in self._uses), key=lambda info: (info.file, info.start))
        reader = _Reader(self.path, self.config, self.tensors, self.source, self._keep_alive, memory=memory)
        self._reader, self._pool = reader, ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._reads = {info.name: self._pool.submit(lambda name: then(reader.read(name)), info.name) for info in infos}

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """See `Checkpoint.read`."""
        held = self._reads.get(name)
        if held is not None:
            try:
                whole = held.result()
            except Exception:
                self.stop()
            else:
                return whole[first:last] if first or last is not None else whole
        return super().read(name, first, last)

    def used(self, names: Iterable[str]) -> None:
        """Drop tensors that were read ahead, once for each use."""
        for name in names:
            self._uses[name] -= 1
            if self._uses[name] == 0:
                self._reads.pop(name, None)

    def stop(self) -> None:
        """End the thread, and drop what it has read."""
        if self._reader is not None:
            self._reader.stopped = True
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._reader = self._pool = None
        self._reads = {}
        self._uses = Counter()


def early(weights: Checkpoint) -> tuple[Checkpoint, EarlyReads]:
    """A view of a checkpoint, and the reads from disk below it, which can begin early."""
    below = weights.raw if isinstance(weights, Floats) else weights
    reads = EarlyReads(below.path, below.config, below.tensors, below.source, below._keep_alive)
    return (replace(weights, raw=reads) if isinstance(weights, Floats) else reads), reads

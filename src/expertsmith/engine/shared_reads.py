"""Read the decoder layers of a streamed model from a shared disk once for all ranks: each reads its share of a layer's bytes, and all gather them.

On one node this loses: the system's file cache gives the bytes to all ranks, and faster than they give them to each other. So it is done if the
ranks are on several nodes that see the same files. All ranks must then need the same layers in the same order, those without batches too.
A rank that cannot read tells the others before they wait for its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.floats import Floats
from expertsmith.checkpoint.reader import TensorInfo, fill, fresh
from expertsmith.engine.devices import free_memory
from expertsmith.engine.loading import LoadedModel
from expertsmith.ranks import Ranks, on_this_machine

ALIGNED = 64  # bytes
SHARE = 0.25  # of the free main memory, at most, for the stored bytes of a decoder layer


@dataclass
class _Gathered(Checkpoint):
    """A checkpoint whose tensors are read from `held`, the bytes of one layer, if `places` says where they begin there."""

    held: Any = field(default=None, repr=False)
    places: dict[str, int] = field(default_factory=dict, repr=False)

    def _bytes(self, info: TensorInfo, start: int, nbytes: int) -> Any:
        place = self.places.get(info.name)
        if place is None:
            return super()._bytes(info, start, nbytes)
        begin = place + start - info.start
        return self.held[begin : begin + nbytes]


class SharedReads:
    """The reads of one streamed model by several ranks. In the order of files, the tensors of a layer lie side by side; each rank reads an equal
    part of their bytes, in a background thread.

    Args:
        groups: decoder layer (None: outside the layers) → its tensors in `weights`.
    """

    def __init__(self, weights: Checkpoint, groups: Mapping[int | None, Sequence[str]], ranks: Ranks) -> None:
        below = weights.raw if isinstance(weights, Floats) else weights
        self._held = _Gathered(below.path, below.config, below.tensors, below.source, below._keep_alive)
        self._view = replace(weights, raw=self._held) if isinstance(weights, Floats) else self._held
        self._groups, self._ranks = groups, ranks
        self._begun: tuple[int, Future[bytearray]] | None = None

    def largest(self) -> int:
        """Bytes of the largest decoder layer."""
        return max((self._layout(group)[1] for group in self._groups if group is not None), default=0)

    def begin(self, index: int) -> None:
        """Begin to read this rank's share of decoder layer `index`."""
        if self._begun is None or self._begun[0] != index:
            self.close()
            with_thread = ThreadPoolExecutor(1, thread_name_prefix="shared-reads")
            self._begun = index, with_thread.submit(self._read_share, index)
            with_thread.shutdown(wait=False)

    def gather(self, index: int) -> None:
        """Bring the bytes of decoder layer `index` together; all ranks call it.

        Raises:
            UserError: on every rank, if one of them cannot read.
        """
        self.begin(index)
        assert self._begun is not None
        mine, self._begun = self._begun[1], None
        self._ranks.refuse_together(mine.exception())
        self._held.held = memoryview(self._ranks.side_by_side(torch.frombuffer(mine.result(), dtype=torch.uint8)).numpy())
        self._held.places = self._layout(index)[0]

    def take(self, name: str) -> torch.Tensor:
        """A tensor, from the gathered bytes if it is of their layer."""
        return self._view.read(name)

    def end(self) -> None:
        """Drop what was gathered."""
        self._held.held, self._held.places = None, {}

    def close(self) -> None:
        """As `end`; also wait for what is being read, and drop it."""
        self.end()
        if self._begun is not None:
            wait([self._begun[1]])
        self._begun = None

    def _layout(self, group: int | None) -> tuple[dict[str, int], int]:
        """Where each tensor on disk of a layer begins, and the bytes of all, an equal number of aligned ones for each rank."""
        names = {part for name in self._groups.get(group, ()) for part in self._view.parts(name)}
        places, end = {}, 0
        for info in sorted((self._held.tensors[name] for name in names), key=lambda info: (info.file, info.start)):
            places[info.name] = end
            end += -(-info.nbytes // ALIGNED) * ALIGNED
        each = -(-end // (ALIGNED * self._ranks.world)) * ALIGNED
        return places, each * self._ranks.world

    def _read_share(self, index: int) -> Any:
        places, whole = self._layout(index)
        each = max(ALIGNED, whole // self._ranks.world)
        first = each * self._ranks.rank
        share = fresh(each)
        view = memoryview(share)
        for name, place in places.items():
            info = self._held.tensors[name]
            begin, end = max(place, first), min(place + info.nbytes, first + each)
            if begin < end:
                fill(view[begin - first : end - first], info, info.start + begin - place)
        return share


@contextmanager
def sharing(models: Sequence[LoadedModel], ranks: Ranks) -> Iterator[bool]:
    """Within the context, the streamed ones of `models` share their reads, if that is worth it; yields whether one does. Then every rank must walk
    through the models alike, also without batches."""
    found = [(model, SharedReads(model.weights, model.groups, ranks)) for model in models if _worth(model, ranks)]
    fits = sum(reads.largest() for _, reads in found) <= SHARE * free_memory(torch.device("cpu"))
    if not found or not all(ranks.gather(fits)):
        yield False
        return
    try:
        for model, reads in found:
            model.shared = reads
        yield True
    finally:
        for model, reads in found:
            model.shared = None
            reads.close()


def _worth(model: LoadedModel, ranks: Ranks) -> bool:
    """Whether several nodes see the same files of a streamed model, by their inodes, so that each would read them all from one disk."""
    if ranks.world == 1 or on_this_machine() == ranks.world:
        return False
    stats = [file.stat() for file in sorted({info.file for info in model.weights.tensors.values()})]
    mine = model.memory == "stream" and not model.reads_on_demand, [(s.st_ino, s.st_size, s.st_mtime_ns) for s in stats]
    return all(theirs == (True, mine[1]) for theirs in ranks.gather(mine))

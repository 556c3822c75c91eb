"""Several processes under `torchrun`: each works on a share of the batches, and what they find is put together.

Objects go over gloo and main memory, so a rank that waits for another keeps no GPU busy. Only sums of tensors on GPUs go over nccl.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import accumulate, count
from typing import Any, TypeVar

from expertsmith.errors import UserError

WAIT = timedelta(days=7)  # the first rank may plan for hours while the others wait; torchrun ends them if it dies
T = TypeVar("T")
Made = TypeVar("Made")


class ApartError(UserError):
    """A rank has failed in the middle of what the others still do, so they cannot go on together."""


@dataclass(frozen=True)
class _Outcome:
    """How a rank's share of some work has ended."""

    error: UserError | None


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together: `rank` of `world`. All of them must make the same calls in the same order. `group`: torch's
    process group over which they exchange objects."""

    rank: int = 0
    world: int = 1
    group: Any = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and decides."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items of this rank r: r, r + world, r + 2 world, …"""
        return list(items[self.rank :: self.world])

    def share_by_size(self, sizes: Sequence[int]) -> range:
        """The positions of this rank's items if all ranks are to have about the same sum of sizes, of neighbours each.

        Item i belongs to rank floor(world * (s_0 + … + s_{i-1} + s_i / 2) / sum s), the one in whose share its middle lies.
        """
        total = max(1, sum(sizes))
        owners = [self.world * (2 * end - size) // (2 * total) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        mine = [position for position, owner in enumerate(owners) if min(owner, self.world - 1) == self.rank]
        return range(mine[0], mine[-1] + 1) if mine else range(0)

    def gather(self, mine: T) -> list[T]:
        """What every rank gives, in the order of the ranks.

        Raises:
            ApartError: one of them has failed meanwhile, and waits in `refuse_together`.
        """
        if self.world == 1:
            return [mine]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        with _answered():
            dist.all_gather_object(found, mine, group=self.group)
        ended = [one for one in found if isinstance(one, _Outcome)]
        if ended and len(ended) < self.world:
            error = next((one.error for one in ended if one.error), None) or UserError("the ranks do different things")
            raise ApartError(error.message, error.remedy)
        return found

    def joined(self, mine: Sequence[T]) -> list[T]:
        """The results of all items in the order of the items, from one result for each item of `share`."""
        parts = self.gather(list(mine))
        return [parts[number % self.world][number // self.world] for number in range(sum(map(len, parts)))]

    def summed(self, value: Any) -> Any:
        """The sum of a tensor over the ranks, in place; the same on every rank."""
        self.add_up([value])
        return value

    def over(self, items: Sequence[T], make: Callable[[T], Made]) -> Iterator[tuple[T, Made]]:
        """Yield (item, what `make` makes of it) in order. The ranks make one item each at a time, and every rank gets all.

        Raises:
            UserError: on every rank, if one of them has a user's mistake.
        """
        for start in range(0, len(items), self.world):
            turn = items[start : start + self.world]
            mine = _tried(partial(make, turn[self.rank])) if self.rank < len(turn) else (None, None)
            for item, (made, error) in zip(turn, self.gather(mine), strict=False):
                if error is not None:
                    raise error
                yield item, made  # type: ignore[misc]

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def total(self, *mine: float) -> list[float]:
        """The sums over the ranks of some numbers, the same bits on all."""
        return [sum(column) for column in zip(*self.gather(mine), strict=True)]

    def add_up(self, tensors: Sequence[Any]) -> None:
        """Sum tensors over the ranks, in place."""
        if self.world == 1:
            return
        import torch.distributed as dist

        with _answered():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def refuse_together(self, mine: BaseException | None) -> None:
        """Raise an error on all ranks if one has any, so that none waits for another that has stopped.

        Raises:
            UserError: of the first rank that has one; any other error is raised where it is, and told as a UserError to the others.
            ApartError: one has an error while others are in the middle of the work, waiting for it in another call.
        """
        if isinstance(mine, ApartError):
            raise mine
        own = mine is None or isinstance(mine, UserError)
        told = mine if own else UserError(f"rank {self.rank} failed: {mine}", "its own message has more")
        errors = [end.error for end in self.gather(_Outcome(told)) if end.error is not None]  # type: ignore[arg-type]
        if not own:
            raise mine  # type: ignore[misc]
        if errors:
            raise errors[0]

    def side_by_side(self, mine: Any) -> Any:
        """The equally long tensors of bytes of all ranks, one after another, in main memory. They go over nccl if the ranks have GPUs."""
        if self.world == 1:
            return mine
        import torch
        import torch.distributed as dist

        over = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend_config() else torch.device("cpu")
        group = None if over.type == "cuda" else self.group
        found = torch.empty(self.world * len(mine), dtype=torch.uint8, device=over)
        with _answered():
            dist.all_gather_into_tensor(found, mine.to(over), group=group)
        return found.cpu()

    def leading(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, for every rank. The others wait; a UserError is raised on all of them."""
        if self.world == 1:
            return work()
        import torch.distributed as dist

        told: list[Any] = [None]
        if self.first:
            token = _NOW.set(ALONE)
            try:
                told = [_tried(work)]
            finally:
                _NOW.reset(token)
        self.wait()  # here the others learn of a rank that has failed
        with _answered():
            dist.broadcast_object_list(told, src=0, group=self.group)
        found, refused = told[0]
        if refused is not None:
            raise refused
        return found  # type: ignore[no-any-return]

    def agree(self, what: str, value: Callable[[], Any]) -> None:
        """Refuse to go on if `value` is not the same on all ranks, such as text from disks that differ. One rank alone does not call it.

        Raises:
            UserError: with the first rank that has another value.
        """
        if self.world == 1:
            return
        mine = value()
        other = [rank for rank, theirs in enumerate(self.gather(mine)) if theirs != mine]
        if other:
            raise UserError(
                f"rank {self.rank} and rank {other[0]} have read another {what}",
                "every node needs the same files under the same paths, such as on a shared disk",
            )


def _tried(make: Callable[[], Made]) -> tuple[Made | None, UserError | None]:
    """What is made, or the user's mistake that prevents it, so that the other ranks learn of it and do not wait."""
    try:
        return make(), None
    except UserError as error:
        return None, error


ALONE = Ranks()
_NOW: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)
_GROUPS = count()  # a program may connect more than once
_FAILED: list[bool] = []  # whether this process was the first to fail, once it has failed


def current() -> Ranks:
    """The ranks that this process works with: those of `connected`. Otherwise itself alone, as within `Ranks.leading`, and in a program that
    has a process group for something else."""
    return _NOW.get()


def on_this_machine() -> int:
    """The number of ranks that share this machine's cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if current().world > 1 else 1


@contextmanager
def _answered() -> Iterator[None]:
    """Say what it means that an exchange fails.

    Raises:
        UserError: the others do not answer.
    """
    try:
        yield
    except RuntimeError as error:
        reason = (
            re.sub(r"^\[\S+\] ", "", str(error).strip()).splitlines()[0].partition(". ")[0]
        )  # without gloo's place in its code
        raise UserError(
            f"another rank no longer answers ({reason})",
            "torchrun's report names it; exit code -9 means that the system ended it, usually for memory",
        ) from error


@contextmanager
def connected(device: str) -> Iterator[tuple[int, str]]:
    """Yield (rank, device of this rank); (0, device) outside `torchrun`.

    Raises:
        UserError: as `own_device`; WORLD_SIZE is set, but not by torchrun.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield 0, device
        return
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise UserError(f"WORLD_SIZE is set, but {absent[0]} is not", "start the command with torchrun, or unset WORLD_SIZE")
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(iter(rendezvous("env://")))
    try:
        where = own_device(device)
        backend = "cpu:gloo,cuda:nccl" if where.startswith("cuda") else "gloo"
        prefixed = PrefixStore(f"group {next(_GROUPS)}", store)
        # with torch's own time limit, which ends a run whose nodes do not reach each other
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=world)
        group = dist.new_group(backend="gloo", timeout=WAIT)
        token = _NOW.set(Ranks(rank, world, group))
        try:
            yield rank, where
        finally:
            _NOW.reset(token)
    except BaseException:
        # before this process ends, since the others fail as soon as it no longer answers; the group is left to torchrun, because
        # closing it may wait for them
        _FAILED[:] = [store.add("failed", 1) == 1]
        raise
    with _answered():
        dist.barrier(group)  # torchrun ends all when one exits with another code than 0, and the first may still be writing
    dist.destroy_process_group()


def tells() -> bool:
    """Whether this process says why the run failed: the first to fail does, or rank 0 where the ranks were not connected yet."""
    return _FAILED[0] if _FAILED else os.environ.get("RANK", "0") == "0"


def own_device(device: str) -> str:
    """The device of this rank.

    Raises:
        UserError: more processes on this machine than GPUs, or one GPU named for all.
    """
    import torch

    if device == "cpu" or not (device.startswith("cuda") or torch.cuda.is_available()):
        return device if device != "auto" else "cpu"
    if ":" in device:
        raise UserError(
            f"--device {device} names one GPU, but each rank has its own",
            "use --device cuda, and CUDA_VISIBLE_DEVICES to choose GPUs",
        )
    own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", own + 1))
    if here > count:
        raise UserError(
            f"torchrun started {here} processes on this machine, but torch sees {count} GPUs",
            f"use --nproc-per-node {count}" if count else "use --device cpu",
        )
    torch.cuda.set_device(own)
    return f"cuda:{own}"


def refuse_several(what: str) -> None:
    """Refuse under `torchrun` what runs as one process only.

    Raises:
        UserError: there are several ranks.
    """
    world = current().world
    if world > 1:
        raise UserError(f"{what} runs as one process, but torchrun started {world}", "run it without torchrun")

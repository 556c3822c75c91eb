"""Work split over ranks under `torchrun`: `ranks` opens the group; the other functions do nothing of note outside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from expertsmith.errors import UserError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


@contextmanager
def ranks(device: str) -> Iterator[tuple[int, str]]:
    """Yield (rank, device of this rank); (0, device) outside `torchrun`. The backend is gloo on CPU, nccl on GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield 0, device
        return
    import torch
    import torch.distributed as dist

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    where = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(where)
    try:
        yield dist.get_rank(), where
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) outside `ranks`."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return 0, 1
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_this_machine() -> int:
    """The number of ranks that share this machine's cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if place()[1] > 1 else 1


def wait() -> None:
    """Wait until all ranks are here."""
    if place()[1] > 1:
        import torch.distributed as dist

        dist.barrier()


def _tried(make: Callable[[], Made]) -> tuple[Made | None, UserError | None]:
    """What is made, or the user's mistake that prevents it, so that the other ranks learn of it and do not wait."""
    try:
        return make(), None
    except UserError as error:
        return None, error


def from_first(make: Callable[[], Made]) -> Made:
    """What the first rank makes, on every rank.

    Raises:
        UserError: on every rank, if the first one has a user's mistake.
    """
    rank, world = place()
    if world == 1:
        return make()
    import torch.distributed as dist

    held: list[Any] = [_tried(make) if rank == 0 else None]
    dist.broadcast_object_list(held, src=0)
    made, error = held[0]
    if error is not None:
        raise error
    result: Made = made
    return result


def gathered(value: Made) -> list[Made]:
    """The value of every rank, on every rank."""
    _, world = place()
    if world == 1:
        return [value]
    import torch.distributed as dist

    held: list[Any] = [None] * world
    dist.all_gather_object(held, value)
    return held


def summed(value: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks, in place; the same on every rank."""
    if place()[1] > 1:
        import torch.distributed as dist

        dist.all_reduce(value)
    return value


def over_ranks(items: Sequence[Item], make: Callable[[Item], Made]) -> Iterator[tuple[Item, Made]]:
    """Yield (item, what `make` makes of it) in order. The ranks make one item each at a time, and every rank gets all.

    Raises:
        UserError: on every rank, if one of them has a user's mistake.
    """
    rank, world = place()
    for start in range(0, len(items), world):
        turn = items[start : start + world]
        mine = _tried(partial(make, turn[rank])) if rank < len(turn) else (None, None)
        for item, (made, error) in zip(turn, gathered(mine), strict=False):
            if error is not None:
                raise error
            yield item, made  # type: ignore[misc]

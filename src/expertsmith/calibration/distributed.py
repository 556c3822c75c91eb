"""Data-parallel work under `torchrun`: every rank processes a share of the batches, and sums are reduced.

Outside `torchrun` there is one rank, and the functions below do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

PATIENCE = timedelta(days=1)  # ranks wait while one loads or writes a large model; a rank that fails ends the others without it
T = TypeVar("T")


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
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    if on_gpu:
        torch.cuda.set_device(where)
    yield dist.get_rank(), where
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks, which wait for this one


def rank_and_world() -> tuple[int, int]:
    """This rank's number, and the number of ranks."""
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's items: those with number rank, rank + world, …"""
    rank, world = rank_and_world()
    return items[rank::world]


def gathered(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    import torch.distributed as dist

    world = rank_and_world()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value)
    return found


def of_all(items: Sequence[T]) -> list[T]:
    """The items of all ranks in the order that they had before `share`."""
    parts = gathered(items)
    return [parts[number % len(parts)][number // len(parts)] for number in range(sum(map(len, parts)))]


def add_up(tensors: Sequence[torch.Tensor]) -> None:
    """Sum tensors over the ranks, in place. Every rank gets the same bits."""
    import torch.distributed as dist

    if rank_and_world()[1] == 1:
        return
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


def sums(*values: float, device: torch.device) -> list[float]:
    """Sum numbers over the ranks, in float64; `device` is this rank's."""
    import torch

    held = torch.tensor(values, dtype=torch.float64, device=device)
    add_up([held])
    return list(map(float, held.tolist()))


def check_alike(what: str, value: object) -> None:
    """Check that all ranks hold the same value.

    Raises:
        RuntimeError: they do not; `what` says which value this is.
    """
    found = gathered(value)
    if any(other != found[0] for other in found):
        raise RuntimeError(f"{what} differ between the ranks, so the result would be wrong: {found}")


def wait() -> None:
    """Wait until all ranks are here."""
    gathered(None)

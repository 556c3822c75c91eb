"""Data-parallel calibration under `torchrun`: every rank processes a share of the batches, and sums are reduced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


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

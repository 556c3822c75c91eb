"""Choose how a model runs: the device, the memory mode by free memory, and the dtype."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from expertsmith.arch import text_config
from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.floats import floats
from expertsmith.engine.spread import ROOM, local_devices, owners, stored_sizes
from expertsmith.errors import UserError
from expertsmith.ranks import ALONE, Ranks

Memory = Literal["resident", "stream"]
GROUP = Path("/sys/fs/cgroup")


def choose_memory(
    memory: str, checkpoints: Sequence[Checkpoint], device: torch.device, dtype: str = "auto", ranks: Ranks = ALONE
) -> Memory:
    """Return the memory mode; `auto` streams if the models together would take more than 70 % of the free memory of any of the `ranks`, and
    cannot be spread over several GPUs either (`engine.spread`), which only a process alone tries. A streamed model holds one decoder layer, and
    in main memory at most the stored bytes of the next (`engine.read_ahead`).

    Raises:
        UserError: another word than auto, resident or stream.
    """
    if memory == "resident":
        return "resident"
    if memory == "stream":
        return "stream"
    if memory != "auto":
        raise UserError(f"memory is {memory!r}", "choose auto, resident or stream")
    if any(checkpoint.converted for checkpoint in checkpoints):
        return "stream"
    parts = [stored_sizes(floats(entry), torch.empty(0, dtype=dtype_of(dtype, entry)).element_size()) for entry in checkpoints]
    free = [free_memory(place) for place in local_devices(device)]
    fits = sum(map(sum, parts)) < ROOM * free[0] or (len(free) > 1 and _fit_spread(parts, free))
    return "resident" if all(ranks.gather(fits)) else "stream"


def one_device(device: torch.device, checkpoints: Sequence[Checkpoint], dtype: str, work: str, remedy: str) -> torch.device:
    """The device on which models stay whole, for `work` that cannot be spread over several: the first GPU, or the CPU.

    Raises:
        UserError: it is a GPU on which their weights have no room.
    """
    chosen = local_devices(device)[0]
    need = sum(floats(entry).numel * torch.empty(0, dtype=dtype_of(dtype, entry)).element_size() for entry in checkpoints)
    free = free_memory(chosen)
    if chosen.type != "cpu" and need > free:
        raise UserError(
            f"{work} runs on one GPU, and the weights take {need / 1e9:.1f} GB, but {chosen} has {free / 1e9:.1f} GB free",
            remedy,
        )
    return chosen


def _fit_spread(models: Sequence[Sequence[int]], free: Sequence[int]) -> bool:
    """Whether models can be spread over devices one after the other, each in the room that those before have left."""
    free = list(free)
    for sizes in models:
        places = owners(sizes, free)
        if places is None:
            return False
        for place, size in zip(places, sizes, strict=True):
            free[place] -= size
    return True


def free_memory(device: torch.device) -> int:
    """Bytes of memory that this process can still use on a device. Processes of torchrun on one machine share its main memory evenly."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return _free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_memory() -> int:
    """Bytes of main memory that this process can still use: the free memory, or less if a control group or process limit leaves less."""
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such control group, or "max"
            left = int((GROUP / limit).read_text()) - int((GROUP / used).read_text())
            free = min(free, left + _reclaimable((GROUP / used).parent / "memory.stat"))
    with contextlib.suppress(ImportError):  # Windows has no limits of this kind
        import resource

        taken = psutil.Process().memory_info()
        for kind, held in ((resource.RLIMIT_AS, taken.vms), (resource.RLIMIT_DATA, getattr(taken, "data", taken.rss))):
            soft = resource.getrlimit(kind)[0]
            if soft != resource.RLIM_INFINITY:
                free = min(free, soft - held)
    return max(0, free)


def _reclaimable(file: Path) -> int:
    """Bytes of a control group that hold files read long ago. They count as used, but the system gives them up; after a model was read, they
    fill the group to its limit."""
    try:
        entries = dict(line.split() for line in file.read_text().splitlines())
    except OSError:
        return 0
    return int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))


def choose_device(device: str) -> torch.device:
    """Return the torch device of a name; `auto` is the GPUs, or else the CPU. A GPU without a number stands for all that this process sees
    (`engine.spread`).

    Raises:
        UserError: a device that torch does not have here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is not supported", "use auto, cpu, cuda or cuda:0") from None
    if chosen.type == "cuda" and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device {device!r} is not available: torch sees {torch.cuda.device_count()} GPUs", "use --device cpu")
    return chosen


def dtype_of(name: str, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of a name; `auto` is that of config.json, or else float32.

    Raises:
        UserError: torch has no such dtype.
    """
    if name == "auto":
        inner = text_config(checkpoint.config)
        name = (
            inner.get("dtype")
            or inner.get("torch_dtype")
            or checkpoint.config.get("dtype")
            or checkpoint.config.get("torch_dtype")
            or "float32"
        )
    value = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(value, torch.dtype):
        raise UserError(f"dtype {name!r} is not supported", "use auto, float32 or bfloat16")
    return value

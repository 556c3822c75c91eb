"""Find the operations for which the host waits for a device, on any device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "bincount"}


class Waits(TorchDispatchMode):
    """Notes operations for which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(getattr(one, "dtype", None) == torch.bool for one in args[1] or ())
        if name in WAITS or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))

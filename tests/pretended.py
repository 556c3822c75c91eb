"""Two devices that are none: tensors on them keep their values on the CPU, but say `pretended:0` or `pretended:1`, and refuse what a GPU refuses.

So the tests that run a model find, without a GPU, a tensor that was made on the CPU and meets one of the device, a tensor of one device that
meets one of the other, and a number or an array taken without fetching it: `EXPERTSMITH_DEVICE=pretended pytest tests/engine/test_spread.py`. What
they cannot find: kernels of CUDA, their rounding, streams, gradients (the engine aborts), and branches on the device's name.

It stands on torch's experimental way to write a backend in Python (`torch.utils.backend_registration`), and is used by tests only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

NAME = "pretended"
COUNT = 2
FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.eye}
CPU = torch.device("cpu")
COPIES = ("aten::copy_", "aten::_to_copy")  # the only operations that may take tensors of several devices
INDEXED = ("aten::index.", "aten::index_put", "aten::_index_put", "aten::_unsafe_index")  # on a GPU, indices may be on the CPU


class Held(torch.Tensor):
    """A tensor on a pretended device. `raw`: its values, on the CPU."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor, device: torch.device) -> Held:
        where = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "device": device}
        made = torch.Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, layout=raw.layout, **where)
        made.raw = raw
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Held({self.raw!r}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made: Any = Held(self.raw.clone(), self.device).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    def __getitem__(self, places: Any) -> Any:
        return super().__getitem__(listed(places))

    def __setitem__(self, places: Any, value: Any) -> None:
        super().__setitem__(listed(places), value)

    def new_tensor(self, data: Any, **kwargs: Any) -> Any:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **kwargs})

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, *args, **(kwargs or {}))


def listed(places: Any) -> Any:
    """An index with tensors in place of lists, which torch cannot make on the device itself."""
    if isinstance(places, tuple):
        return tuple(map(listed, places))
    return torch.tensor(places) if isinstance(places, list) else places


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation of torch: refused if its tensors are on different devices, else done on the CPU."""
    where = place(func.name(), args, kwargs)
    held = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Held)]
    same = {id(value.raw): value for value in held}  # what an operation in place returns is its argument
    own_args, own_kwargs = pytree.tree_map(bare, (args, kwargs))
    if kwargs.get("generator") is not None and where.type == NAME:
        raise RuntimeError(f"{func.name()}: expected a '{NAME}' device type for generator but found 'cpu'")
    if func.name() == "aten::histc" and not own_args[0].is_floating_point():  # which GPUs count, but the CPU does not
        found = func(own_args[0].double(), *own_args[1:], **own_kwargs).to(own_args[0].dtype)
    else:
        found = func(*own_args, **own_kwargs)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or where.type != NAME:
            return value
        known = same.get(id(value))
        assert known is None or known.shape == value.shape, f"{func.name()} has resized a tensor, which is not pretended"
        return Held(value, where) if known is None else known

    return pytree.tree_map(wrapped, found)


def place(name: str, args: Any, kwargs: Any) -> torch.device:
    """Where the result of an operation is.

    Raises:
        RuntimeError: its tensors are on different devices (numbers, tensors without axes, on the CPU go with all).
    """
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if wanted is not None and wanted.type == NAME and wanted.index is None:
        wanted = torch.device(NAME, 0)
    if name.startswith(COPIES):
        return args[0].device if wanted is None else wanted
    counted = [
        t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Held) or (isinstance(t, torch.Tensor) and t.dim())
    ]
    places = {value.device for value in counted}
    if name.startswith(INDEXED) and args[0].device.type == NAME:
        places -= {CPU}
    if len(places) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {sorted(map(str, places))}")
    return wanted or next(iter(places), CPU)


def bare(value: Any) -> Any:
    """An argument as the CPU takes it."""
    if isinstance(value, torch.device) and value.type == NAME:
        return CPU
    return value.raw if isinstance(value, Held) else value


class Devices:
    """What `torch.cuda` is for GPUs. `free`: bytes of memory of each device."""

    free = [2**34] * COUNT

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return COUNT

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free[device.index or 0], 2**34

    def synchronize(self, *_: Any) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False


@cache
def install() -> Devices:
    """Let torch know the devices, for the rest of this process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    devices = Devices()
    _setup_privateuseone_for_python_backend(NAME, devices)
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, "PrivateUse1")
    devices.library = library  # type: ignore[attr-defined]  (its kernels go with it)
    Made().__enter__()
    return devices


class Made(TorchFunctionMode):
    """Makes tensors on the CPU and moves them, where torch cannot fill them from Python numbers on the device, or would resize them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        where = kwargs.get("device")
        if func not in FROM_NUMBERS or where is None or torch.device(where).type != NAME:
            return func(*args, **kwargs)
        del kwargs["device"]
        return func(*args, **kwargs).to(where)

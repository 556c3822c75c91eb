"""Build a transformers model without memory for its weights, and refuse what transformers cannot build or run."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from expertsmith.arch import Architecture, text_config
from expertsmith.checkpoint import Checkpoint
from expertsmith.engine.mtp import lengthen
from expertsmith.engine.stock import quietly, without_initialisation
from expertsmith.engine.trial import why_not_run
from expertsmith.engine.uneven import read_config
from expertsmith.errors import UserError, install_line
from expertsmith.experts.inventory import Inventory

LARGE = 2**22  # elements
OUT_OF_MEMORY = "allocate memory|out of memory"  # torch says it in the text of a RuntimeError
_RUNS: set[str] = set()  # configs whose models can run, as tried by this process


def transformers_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of a checkpoint's config.json, without remote code and without a quantiser, because weights are decoded
    before transformers sees them.

    Raises:
        UserError: transformers does not support it, or has no class for the family.
    """
    import transformers

    try:
        with quietly():  # transformers warns about layers with their own numbers, which are intended
            config = read_config(checkpoint.path)
    except UserError:
        raise
    except Exception as error:  # config classes raise any error for wrong values; strict ones have their own
        package = install_line(error)
        if package or isinstance(error, ImportError):
            raise UserError(
                f"{checkpoint.path}/config.json needs a package that is not installed: {first_line(error)}",
                package or "install the package in this message",
            ) from None
        if isinstance(error, ValueError | KeyError | OSError | TypeError) and "Validation" not in type(error).__name__:
            raise UserError(
                f"{checkpoint.path}/config.json is not supported by transformers {transformers.__version__}: {first_line(error)}"
            ) from None
        raise UserError(f"{checkpoint.path}/config.json is not valid: {first_line(error)}") from None
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    return config


def config_of(
    checkpoint: Checkpoint, architecture: Architecture | None, overrides: Mapping[str, Any] | None, ahead: Inventory | None
) -> Any:
    """The config to build a model from: with the family record's defaults for missing keys, with `overrides`, and with a layer for multi-token prediction."""
    config = transformers_config(checkpoint)
    inner, given = config.get_text_config(), text_config(checkpoint.config)
    for key, other in architecture.same_as if architecture else ():
        if key not in given and other in given:
            setattr(inner, key, given[other])
    for key, value in (overrides or {}).items():
        setattr(inner, key, value)
    if ahead is not None:
        lengthen(inner, len(ahead.mtp_layers))
    return config


class _LargeOnMeta(TorchFunctionMode):
    """While a model is built: put large `torch.empty` on the meta device at once. accelerate moves a parameter there when it is registered,
    so the experts of one layer (15 GB in DeepSeek-V3) would be allocated first, which fails under a limit on the address space."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            size = args[0] if args and not isinstance(args[0], int) else args
            if prod(size or kwargs.get("size") or ()) >= LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def empty(auto: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model without memory for its parameters."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _LargeOnMeta(), without_initialisation():
        module = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    module.tie_weights()  # initialisation does it otherwise
    return module


@contextlib.contextmanager
def refusing(checkpoint: Checkpoint) -> Iterator[None]:
    """While transformers builds a model: turn its errors into errors for users. Wrong values in a config can raise anything."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if re.search(OUT_OF_MEMORY, str(error)):
            raise  # nothing is wrong with the checkpoint
        package = install_line(error)
        if package or isinstance(error, ImportError):
            raise UserError(
                f"{checkpoint.source} needs a package that is not installed: {first_line(error)}",
                package or "install the package in this message",
            ) from None
        raise UserError(
            f"transformers cannot load {checkpoint.source}: {first_line(error)}",
            "check config.json, and for a damaged shard or a tensor with a wrong shape",
        ) from None


def check_runs(
    auto: Any, config: Any, checkpoint: Checkpoint, architecture: Architecture | None, module: Any | None = None
) -> None:
    """Refuse a model that can be built from its config.json, but cannot run. A config is tried once a process.

    Args:
        module: the model without memory, if it is built already.

    Raises:
        UserError: with transformers' message, and the keys that are null in config.json but not by default.
    """
    key = f"{type(config).__name__} {json.dumps(config.to_dict(), sort_keys=True, default=str)}"
    if key in _RUNS:
        return
    if module is None:
        module = empty(auto, config, torch.float32)
    layers = layers_of(module, architecture.layers if architecture else "model.layers")
    why = why_not_run(module, layers, architecture)
    if why is None:
        _RUNS.add(key)
        return
    given, usual = text_config(checkpoint.config), type(module.config.get_text_config())()
    null = sorted(key for key, value in given.items() if value is None and getattr(usual, key, None) is not None)
    raise UserError(
        f"transformers cannot run {checkpoint.source}: {first_line(Exception(why))}",
        f"give a number in config.json instead of null: {', '.join(null)}"
        if null
        else "check config.json: numbers of heads, key-value heads, expert_groups and sizes must fit each other",
    )


def layers_of(module: nn.Module, path: str) -> str:
    """The path of the decoder layers in a model: `path`, or in a composite the same path in its language model.

    Raises:
        UserError: there is none.
    """
    names = dict(module.named_modules())
    if path in names:
        return path
    decoder: Any = module.get_decoder() if hasattr(module, "get_decoder") else None  # type: ignore[operator]
    roots = [name for name, entry in names.items() if entry is decoder]
    places = [f"{root}.{inner}" for root in roots for inner in (path.rpartition(".")[2], path)]
    found = next((place for place in places if place in names), None)
    if found is None:
        raise UserError(f"{type(module).__name__} has no {path}, so it cannot run layer by layer", "use a supported family")
    return found


def first_line(error: Exception) -> str:
    """The first line of an error's text, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # strict config classes give the reason on the second line
        lines[0] += f" {lines[1]}"
    return lines[0][:300] if lines else type(error).__name__

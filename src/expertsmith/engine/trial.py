"""A forward without memory: whether the numbers of a config fit each other, such as attention heads, key-value heads and expert_groups.

A model can have the right tensors and still not run: DeepSeek's attention multiplies keys by heads // key-value heads, which no tensor shows.
"""

from __future__ import annotations

import sys
import traceback
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from expertsmith.arch import Architecture
from expertsmith.engine.layout import experts_of, has_experts

TOKENS = 8
JUDGED = {"transformers", "torch", *sys.stdlib_module_names}  # packages whose errors say something of the config


class _Yes(TorchFunctionMode):
    """Where a forward asks a tensor without memory yes or no, yes: what transformers asks is whether a mask hides nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def why_not_run(module: nn.Module, layers: str, architecture: Architecture | None) -> str | None:
    """Why a model cannot run, found by a forward of `TOKENS` tokens on the meta device with a copy of it, its routed experts left out; None: it
    can, or the meta device cannot tell (operations that depend on values, kernels of other packages).

    Args:
        layers: path of the decoder layers in the module.
    """
    trial = deepcopy(module).to("meta")
    for layer in trial.get_submodule(layers).children() if architecture else ():
        if has_experts(layer, architecture):  # type: ignore[arg-type]
            experts_of(layer, architecture).forward = _same_shape  # type: ignore[arg-type]
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), _Yes():
            trial(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except NotImplementedError:
        return None
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        names = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
        inside = all(name == __name__ or name.partition(".")[0] in JUDGED for name in names)
        return str(error) if inside and "meta" not in str(error) else None
    return None


def _same_shape(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(hidden_states)

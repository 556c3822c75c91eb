"""Find the experts of a decoder layer, and the layout of their weights in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from expertsmith.arch import Architecture
from expertsmith.arch.base import Layout, split
from expertsmith.errors import UserError


def submodule(root: nn.Module, path: str) -> Any:
    """The module at a dotted path; the root itself for an empty path."""
    return root.get_submodule(path) if path else root


def experts_of(layer: nn.Module, architecture: Architecture) -> Any:
    """The experts module of a decoder layer."""
    return submodule(submodule(layer, architecture.block), architecture.experts)


def has_experts(layer: nn.Module, architecture: Architecture) -> bool:
    """Whether a decoder layer holds routed experts where the family's record says."""
    node: Any = layer
    for part in filter(None, f"{architecture.block}.{architecture.experts}".split(".")):
        node = getattr(node, part, None)
    return isinstance(node, nn.Module)


def expert_count(experts: nn.Module) -> int:
    """The number of routed experts in the family's own module (a checkpoint may hold different numbers a layer).

    Raises:
        UserError: a module without a known number.
    """
    for name in ("num_routed_experts", "num_experts"):
        if isinstance(getattr(experts, name, None), int):
            return int(getattr(experts, name))
    raise UserError(f"the experts module {type(experts).__name__} has no known number of experts")


def is_grouped(experts: nn.Module) -> bool:
    """Whether transformers' experts decorator described the module's layout."""
    return all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def routing_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(selected_experts, routing_weights) from the arguments after the hidden states of an experts module; the order differs by family."""
    first, second = [*args, *kwargs.values()][:2]
    return (second, first) if first.is_floating_point() else (first, second)


def expert_parameters(experts: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters whose rows run over the experts: all but the constants in place of others (`engine.novices`)."""
    return [(name, weight) for name, weight in experts.named_parameters() if name != "novices"]


def in_memory(experts: nn.Module, record: Architecture, expert: int, count: int) -> dict[tuple[str, bool], torch.Tensor]:
    """Views of one expert's weights in its experts module by (role, whether it is a matrix)."""
    found: dict[tuple[str, bool], torch.Tensor] = {}
    for name, parameter in expert_parameters(experts):
        matrix = not name.endswith("_bias")
        if matrix and parameter.dim() == 2:  # experts * rows, as DBRX has it
            rows = parameter.shape[0] // count
            part = parameter[expert * rows : (expert + 1) * rows]
        else:
            part = parameter[expert]
        for role, view in split(_memory_layout(experts, name.removesuffix("_bias"), record), part).items():
            found[role, matrix] = view
    return found


def matrix_role(experts: nn.Module, name: str, record: Architecture) -> str | None:
    """The role of a parameter of an experts module: "gate", "up", "gate_up", "alternating" or "down"; None for a bias."""
    if name.endswith("_bias"):
        return None
    return _memory_layout(experts, name, record).removesuffix("_t")


def _memory_layout(experts: Any, name: str, record: Architecture) -> Layout:
    """The layout from transformers' decorator of the module, or from the record of the checkpoint's tensor of that name."""
    if hasattr(experts, "is_transposed") and hasattr(experts, "is_concatenated"):
        stem = {"gate_up_proj": "gate_up" if experts.is_concatenated else "alternating", "up_proj": "up", "down_proj": "down"}
        layout: Any = stem[name] + ("_t" if experts.is_transposed else "")
        return layout  # type: ignore[no-any-return]
    layouts = {record.layout_of(entry.name) for entry in record.stacked if entry.name.endswith(f".{name}")}
    if len(layouts) != 1 or None in layouts:
        raise RuntimeError(f"{type(experts).__name__}.{name}: the record of {record.model_type} has no layout for it")
    return layouts.pop()  # type: ignore[return-value]

"""Experts with fewer neurons than config.json says, a number for each layer or for each expert (method `heapr`).

config.json lists them under `expertsmith_neurons`: decoder layer → the number of neurons that each of its experts has, or a list with a number
for each expert. No stock class can hold that. In memory the experts of a layer are as wide as its widest; tensors of others are filled up with
zeros as they are read (`filled_up`), which only `expertsmith.load` does. Layers whose experts have one number load in plain transformers with
`trust_remote_code=True` too, because a checkpoint carries the source text of `Narrow` (`engine.uneven.shim_of`). That file is never run from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from expertsmith.arch import Architecture
from expertsmith.arch.base import neuron_axis

KEY = "expertsmith_neurons"


class Narrow:
    """Mixin before a causal LM: experts have as many neurons as `config.expertsmith_neurons` says."""

    narrow_layers: str  # path of the decoder layers
    narrow_experts: str  # path from a decoder layer to its experts

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: its modules and tensor names are those of transformers, which only converts weights of its own models."""
        return False

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for layer, said in config.get_text_config().expertsmith_neurons.items():
            experts = self.get_submodule(f"{self.narrow_layers}.{layer}.{self.narrow_experts}")
            self._narrow(experts, max(said) if isinstance(said, list) else said)

    def _narrow(self: Any, experts: Any, width: int) -> None:
        flipped = experts.is_transposed
        before = experts.down_proj.shape[1 if flipped else 2]
        for name, held in list(experts._parameters.items()):
            stem, bias = name.removesuffix("_bias"), name.endswith("_bias")
            if held is None or stem not in ("gate_up_proj", "up_proj", "down_proj") or name == "down_proj_bias":
                continue
            axis = 1 if bias or (stem == "down_proj") == flipped else 2
            part = held.detach().narrow(axis, 0, width * (2 if stem == "gate_up_proj" else 1)).clone()
            experts._parameters[name] = nn.Parameter(part, requires_grad=held.requires_grad)
        for name, number in list(vars(experts).items()):
            if ("inter" in name or name == "expert_dim") and type(number) is int and number == before:
                setattr(experts, name, width)


def widths_of(config: Any) -> dict[int, int | list[int]]:
    """Decoder layer → what a transformers config says of its experts' neurons."""
    return {int(layer): said for layer, said in (getattr(config.get_text_config(), KEY, None) or {}).items()}


def is_ragged(config: Any) -> bool:
    """Whether experts of a layer have different numbers of neurons."""
    return any(isinstance(said, list) for said in widths_of(config).values())


def filled_up(name: str, tensor: torch.Tensor, record: Architecture, widths: Mapping[int, int | list[int]]) -> torch.Tensor:
    """An expert's tensor, filled up with zeros to the layer's widest expert; other tensors as they are."""
    layer, rest = record.locate(name) or (-1, "")
    said, layout = widths.get(layer), record.layout_of(rest)
    axis = neuron_axis(layout, tensor.dim()) if layout is not None else None
    if not isinstance(said, list) or axis is None or record.expert_of(rest) is None:
        return tensor
    lacking = max(said) - tensor.shape[axis]
    return (
        tensor if not lacking else nn.functional.pad(tensor, (0, lacking) if axis == tensor.dim() - 1 else (0, 0, 0, lacking))
    )

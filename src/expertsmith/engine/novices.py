"""Experts that are constants ("novices", method `mone`): the router may select them, and each adds its constant times the routing weight.

config.json lists them under `expertsmith_novices`: decoder layer → `kept` and `novices` (ids of the router, in ascending order) and the
`width` of an output. The experts module holds the kept ones only, and a tensor `novices` [novices, width]. No stock class can hold that. The
classes are self-contained, because a checkpoint carries their source text for plain transformers with `trust_remote_code=True`
(`engine.uneven.shim_of`). That file is never run from here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KEY = "expertsmith_novices"


class WithNovices:
    """Mixin before a stock experts module that holds the kept experts. `place`: id of the router → row of the kept experts, or
    -1 - row of the constants. `pairs`: the stock forward needs more than one slot a token."""

    place: list[int]
    pairs: bool

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The weighted sum over a token's slots: f(x) of a kept expert, as the stock forward computes it, or its constant."""
        first, second = [*args, *kwargs.values()][:2]
        ids_first = not first.is_floating_point()
        selected, weights = (first, second) if ids_first else (second, first)
        x, top_k = hidden_states.reshape(-1, hidden_states.shape[-1]), selected.shape[-1]
        expert, weight = selected.reshape(-1), weights.reshape(-1)
        place = torch.tensor(self.place, device=expert.device)[expert]
        kept, constant = torch.nonzero(place >= 0)[:, 0], torch.nonzero(place < 0)[:, 0]
        out = x.new_empty(expert.numel(), self.novices.shape[-1])
        if kept.numel():  # every slot as a token of its own
            ids, scale, inputs = place[kept, None], weight[kept, None], x[kept // top_k]
            if self.pairs:  # a second slot without weight
                ids, scale = ids.repeat(1, 2), torch.cat((scale, torch.zeros_like(scale)), -1)
            if hidden_states.dim() == 3:
                inputs = inputs[None]
            made = super().forward(inputs, *((ids, scale) if ids_first else (scale, ids)))  # type: ignore[misc]
            out[kept] = made.reshape(kept.numel(), -1).to(out.dtype)
        values = self.novices[-1 - place[constant]]
        out[constant] = (weight[constant, None] * values).to(out.dtype)
        total: torch.Tensor = out.view(-1, top_k, out.shape[-1]).sum(1)
        return total.reshape(*hidden_states.shape[:-1], -1)


class Novices:
    """Mixin before a causal LM: experts are constants as in `config.expertsmith_novices`."""

    novice_layers: str  # path of the decoder layers
    novice_experts: str  # path from a decoder layer to its experts
    novice_pairs: bool  # see WithNovices

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: its modules and tensor names are those of transformers, which only converts weights of its own models."""
        return False

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for layer, said in config.get_text_config().expertsmith_novices.items():
            experts = self.get_submodule(f"{self.novice_layers}.{layer}.{self.novice_experts}")
            self._replace(experts, said["kept"], said["novices"], said["width"])

    def _replace(self: Any, experts: Any, kept: list[int], novices: list[int], width: int) -> None:
        count, like = len(kept) + len(novices), next(experts.parameters())
        for module in experts.modules():
            for name, held in list(module._parameters.items()):
                if held is not None and held.shape[0] % count == 0:  # rows run over the experts
                    part = held.detach()[: held.shape[0] // count * len(kept)].clone()
                    module._parameters[name] = nn.Parameter(part, requires_grad=held.requires_grad)
            for name, number in list(vars(module).items()):
                if "experts" in name and type(number) is int and number == count:
                    setattr(module, name, len(kept))
        places = {
            **{expert: row for row, expert in enumerate(kept)},
            **{expert: -1 - row for row, expert in enumerate(novices)},
        }
        experts.place, experts.pairs = [places[expert] for expert in range(count)], self.novice_pairs
        experts.novices = nn.Parameter(like.new_zeros(len(novices), width), requires_grad=like.requires_grad)
        stock = type(experts)
        experts.__class__ = type(stock.__name__, (WithNovices, stock), {"__module__": stock.__module__})

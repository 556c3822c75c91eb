"""ToMoE's pruned attention: fewer query-key dimensions than value dimensions, and value dimensions chosen for every token.

config.json describes it under `expertsmith_attention`; no stock class can hold it. The classes are self-contained, because a checkpoint
carries their source text for plain transformers with `trust_remote_code=True` (`engine.uneven.shim_of`). That file is never run from here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

KEY = "expertsmith_attention"


class PrunedHeads:
    """Mixin before a stock attention. Queries and keys have only the dimensions `kept` of every head (rotary pairs stay together). With
    `value_width`, every token keeps that many value dimensions, the same in all heads, by its scores from `vo_decoder`.

    The softmax scale stays 1 / sqrt(the full width of a head), and query and key norms divide by the full width, as before pruning.
    """

    kept: list[int]
    value_width: int | None

    def value_mask(self: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The mask [..., head width] of 0 and 1; None if all value dimensions are kept."""
        if self.value_width is None:
            return None
        scores = self.vo_decoder(
            nn.functional.gelu(self.vo_norm(self.vo_router(hidden_states.to(self.vo_router.weight.dtype))))
        )
        chosen = scores.topk(self.value_width, -1).indices
        made: torch.Tensor = torch.zeros_like(scores).scatter_(-1, chosen, 1).to(hidden_states.dtype)
        return made

    def normed(self: Any, states: torch.Tensor, name: str) -> torch.Tensor:
        """The head's own RMS norm, if the family has one; the mean square is over the full width, in which pruned dimensions are zero."""
        norm = getattr(self, name, None)
        if norm is None:
            return states
        square = states.float().pow(2).sum(-1, keepdim=True) / self.head_dim
        made: torch.Tensor = norm.weight * (states.float() * torch.rsqrt(square + norm.variance_epsilon)).to(states.dtype)
        return made

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As in the stock attention."""
        module = sys.modules[type(self).__mro__[2].__module__]  # this class, its mixin, the stock attention
        shape = hidden_states.shape[:-1]
        index = torch.tensor(self.kept, device=hidden_states.device)
        query = self.normed(self.q_proj(hidden_states).view(*shape, -1, len(self.kept)), "q_norm").transpose(1, 2)
        key = self.normed(self.k_proj(hidden_states).view(*shape, -1, len(self.kept)), "k_norm").transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, -1, self.head_dim)
        mask = self.value_mask(hidden_states)
        if mask is not None:
            value = value * mask[..., None, :]
        value = value.transpose(1, 2)
        cos, sin = (part[..., index] for part in position_embeddings)
        query, key = module.apply_rotary_pos_emb(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        run = module.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, module.eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        output, weights = run(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, sliding_window=window, **kwargs
        )
        if mask is not None:
            output = output * mask[..., None, :]
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class PrunedAttention:
    """Mixin before a causal LM: its attentions are pruned as in `config.expertsmith_attention`."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: tensor names are those of transformers, which only converts weights of its own models."""
        return False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        said = config.get_text_config().expertsmith_attention
        for layer, kept, width in zip(self.model.layers, said["query_key"], said["value_width"], strict=True):  # type: ignore[attr-defined]
            self._prune(layer.self_attn, kept, width)

    @staticmethod
    def _prune(attention: Any, kept: list[int], width: int | None) -> None:
        stock = type(attention)
        for name in ("q_proj", "k_proj"):
            full = getattr(attention, name)
            like = {"bias": full.bias is not None, "device": full.weight.device, "dtype": full.weight.dtype}
            heads = full.out_features // attention.head_dim
            setattr(attention, name, nn.Linear(full.in_features, heads * len(kept), **like))
        for name in ("q_norm", "k_norm"):
            norm = getattr(attention, name, None)
            if norm is not None:
                norm.weight = nn.Parameter(norm.weight.detach().new_ones(len(kept)))
        attention.kept, attention.value_width = list(kept), width
        if width is not None:
            hidden, like = (
                attention.v_proj.in_features,
                {"device": attention.v_proj.weight.device, "dtype": attention.v_proj.weight.dtype},
            )
            attention.vo_router = nn.Linear(hidden, 128, **like)
            attention.vo_norm = nn.LayerNorm(128, **like)
            attention.vo_decoder = nn.Linear(128, attention.head_dim, bias=False, **like)
        attention.__class__ = type(stock.__name__, (PrunedHeads, stock), {"__module__": stock.__module__})

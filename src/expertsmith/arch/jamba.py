"""Jamba of AI21."""

from collections.abc import Mapping
from typing import Any

from expertsmith.arch.base import Architecture, Stacked


def dense(config: Mapping[str, Any]) -> str | None:
    """Small Jamba models have one expert only."""
    return "the model has no routed experts (num_experts is 1)" if config.get("num_experts") == 1 else None


FAMILIES = (
    Architecture(
        model_type="jamba",
        title="Jamba (ai21labs/Jamba-v0.1)",
        expert_width_key=("intermediate_size",),
        expert_prefix=("feed_forward.experts.{expert}.",),
        stacked=(
            Stacked("feed_forward.router.weight", "router"),
            Stacked("feed_forward.experts.gate_up_proj"),
            Stacked("feed_forward.experts.down_proj"),
        ),
        block="feed_forward",
        router="router",
        norm="pre_ff_layernorm",
        refusal=dense,
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 4,
            "attn_layer_offset": 3,
            "mamba_d_state": 4,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

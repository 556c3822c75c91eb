"""IBM's Granite families with routed experts."""

from collections.abc import Mapping
from typing import Any

from expertsmith.arch.base import Architecture, Stacked

BASE = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 12.0,
    "logits_scaling": 6.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.125,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FUSED = (  # the in-memory layout
    Stacked("block_sparse_moe.router.weight", "router"),
    Stacked("block_sparse_moe.experts.gate_up_proj"),
    Stacked("block_sparse_moe.experts.down_proj"),
)
STACKED = (
    Stacked("block_sparse_moe.router.layer.weight", "router"),
    Stacked("block_sparse_moe.input_linear.weight", layout="gate_up"),
    Stacked("block_sparse_moe.output_linear.weight", layout="down"),
    *FUSED,
)


def dense(config: Mapping[str, Any]) -> str | None:
    """Granite 4.0 also uses granitemoehybrid for dense models."""
    return None if config.get("num_local_experts", 8) else "the model has no routed experts (num_local_experts is 0)"


FAMILIES = (
    Architecture(
        model_type="granitemoe",
        title="Granite MoE (granite-3.0-1b-a400m-base)",
        notes="Experts are stacked on disk; the block's output is multiplied by residual_multiplier at the residual add.",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=(),
        stacked=STACKED,
        block="block_sparse_moe",
        router="router",
        layer_scale="residual_multiplier",
        tiny=BASE,
    ),
    Architecture(
        model_type="granitemoeshared",
        title="Granite MoE with shared experts (moe-7b-1b-active-shared-experts)",
        notes="The shared expert is a child of the decoder layer, so the layer itself is the block here.",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=(),
        stacked=STACKED,
        block="",
        router="block_sparse_moe.router",
        experts="block_sparse_moe.experts",
        shared="shared_mlp",
        layer_scale="residual_multiplier",
        tiny=dict(BASE, shared_intermediate_size=40),
    ),
    Architecture(
        model_type="granitemoehybrid",
        title="Granite 4.0 hybrid (granite-4.0-h-tiny)",
        notes="Mamba-2 and attention layers; the shared expert is a child of the decoder layer, so the layer itself is the block here.",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=(),
        stacked=STACKED,
        block="",
        router="block_sparse_moe.router",
        experts="block_sparse_moe.experts",
        shared="shared_mlp",
        layer_scale="residual_multiplier",
        refusal=dense,
        tiny=dict(
            BASE,
            shared_intermediate_size=40,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            mamba_n_heads=8,
            mamba_d_state=8,
            mamba_chunk_size=8,
        ),
    ),
    Architecture(
        model_type="granitemoe_swa",
        title="Granite MoE with sliding-window attention (granite-swash-3b-a600m)",
        notes="As granitemoeshared, but the checkpoint keeps the in-memory names.",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=(),
        stacked=FUSED,
        block="",
        router="block_sparse_moe.router",
        experts="block_sparse_moe.experts",
        shared="shared_mlp",
        layer_scale="residual_multiplier",
        tiny=dict(BASE, shared_intermediate_size=40, sliding_window=8),
    ),
)

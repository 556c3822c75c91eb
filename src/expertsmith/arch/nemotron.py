"""Nemotron-H and Nemotron 3 of NVIDIA."""

from collections.abc import Mapping
from typing import Any

from expertsmith.arch.base import Architecture, Stacked


def dense(config: Mapping[str, Any]) -> str | None:
    """The first Nemotron-H models are dense; the layer pattern tells (one letter a layer in original configs)."""
    kinds = config.get("layers_block_type") or config.get("hybrid_override_pattern")
    routed = kinds is None or "moe" in kinds or "E" in kinds
    return None if routed else "the model has no routed experts (no moe layer)"


FAMILIES = (
    Architecture(
        model_type="nemotron_h",
        title="Nemotron-H MoE (nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16)",
        notes="Every layer holds one mixer: Mamba, attention, dense MLP or MoE. Experts have no gate projection and may work "
        "in a latent space (moe_latent_size), with a shared projection back.",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_minimum=2,
        shared_key="n_shared_experts",
        expert_prefix=("mixer.experts.{expert}.",),
        projections=(None, "up_proj", "down_proj"),
        stacked=(
            Stacked("mixer.gate.weight", "router"),
            Stacked("mixer.gate.e_score_correction_bias", "router"),
            Stacked("mixer.experts.up_proj"),
            Stacked("mixer.experts.down_proj"),
        ),
        block="mixer",
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        norm="norm",
        after_experts="fc2_latent_proj",
        refusal=dense,
        tiny={
            "hidden_size": 32,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "moe_latent_size": 16,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

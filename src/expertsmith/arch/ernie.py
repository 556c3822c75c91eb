"""Baidu's ERNIE 4.5."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="ernie4_5_moe",
        title="ERNIE 4.5 MoE (ERNIE-4.5-21B-A3B-PT)",
        notes="The selection bias has the shape [1, experts] and is stored next to the router on disk, inside it in memory.",
        experts_key=("moe_num_experts",),
        top_k_key=("moe_k",),
        shared_key="moe_num_shared_experts",
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.moe_statics.e_score_correction_bias", "router"),
            Stacked("mlp.gate.moe_statics.e_score_correction_bias", "router"),  # in-memory layout
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        shared="shared_experts",
        selection_bias=("gate.moe_statics.e_score_correction_bias",),
        tiny={
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

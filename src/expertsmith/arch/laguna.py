"""Laguna of Poolside."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="laguna",
        title="Laguna (poolside/laguna-XS.2)",
        notes="Routing weights sum to 1; moe_routed_scaling_factor multiplies the routed sum after the experts.",
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.experts.e_score_correction_bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        block_scale="routed_scaling_factor",
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_routed_scaling_factor": 2.5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": 8,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

"""Kolibri of Aleph Alpha."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="kolibri1",
        title="Kolibri 1 (Aleph-Alpha/Kolibri-1)",
        notes="The selection bias is added to the logits, not to the sigmoid scores.",
        experts_key=("num_experts", "num_local_experts"),
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("moe.router.expert_bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        post_norm="post_mlp_layernorm",
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 9,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

"""Command A+ of Cohere."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="cohere2_moe",
        title="Command A+ (CohereLabs/command-a-plus-05-2026)",
        notes="Attention and MLP run side by side on the same norm's output, so the attention's output is missing from the "
        "plain sum. shared_expert_combination_strategy average halves the sum of routed and shared output; "
        "expert_selection_fn may be sigmoid.",
        shared_key="num_shared_experts",
        expert_width_key=("intermediate_size",),
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        shared="shared_experts",
        norm="input_layernorm",
        residual_exact=False,
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "intermediate_size": 24,
            "prefix_dense_intermediate_size": 48,
            "num_experts": 8,
            "num_shared_experts": 1,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": 8,
            "logit_scale": 1.0,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

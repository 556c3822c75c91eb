"""AFMoE (Trinity) of Arcee."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="afmoe",
        title="AFMoE (arcee-ai/Trinity-Mini)",
        notes="The block owns the selection bias and passes it to the router. A fresh model's router weights are all zero.",
        shared_key="num_shared_experts",
        stacked=(
            Stacked("mlp.router.gate.weight", "router"),
            Stacked("mlp.expert_bias", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        router="router",
        shared="shared_experts",
        selection_bias=("expert_bias",),
        score="sigmoid",
        norm="pre_mlp_layernorm",
        post_norm="post_mlp_layernorm",
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_dense_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_shared_experts": 1,
            "num_experts_per_tok": 2,
            "route_scale": 2.5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

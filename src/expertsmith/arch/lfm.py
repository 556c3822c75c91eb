"""LFM2 of Liquid AI."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="lfm2_moe",
        title="LFM2-MoE (LiquidAI/LFM2-8B-A1B)",
        notes="The selection bias belongs to the block, which hands it to the router; it is absent where use_expert_bias is "
        "false.",
        expert_prefix=("feed_forward.experts.{expert}.",),
        projections=("w1", "w3", "w2"),
        stacked=(
            Stacked("feed_forward.gate.weight", "router"),
            Stacked("feed_forward.expert_bias", "router"),
            Stacked("feed_forward.experts.gate_up_proj"),
            Stacked("feed_forward.experts.down_proj"),
        ),
        block="feed_forward",
        selection_bias=("expert_bias",),
        score="sigmoid",
        norm="ffn_norm",
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_dense_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "layer_types": ["conv", "conv", "full_attention"],
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

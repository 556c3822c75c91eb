"""Mellum of JetBrains."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="mellum",
        title="Mellum 2 (JetBrains/Mellum2-12B-A2.5B-Base)",
        experts_key=("num_experts", "num_local_experts"),
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
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

"""MiMo of Xiaomi."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="mimo_v2_flash",
        title="MiMo-V2-Flash (XiaomiMiMo/MiMo-V2-Flash)",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_minimum=2,
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "v_head_dim": 8,
            "vocab_size": 128,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 9,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

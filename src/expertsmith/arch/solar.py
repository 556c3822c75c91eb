"""Solar Open of Upstage."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="solar_open",
        title="Solar Open (upstage/Solar-Open-100B)",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_minimum=2,
        shared_key="n_shared_experts",
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

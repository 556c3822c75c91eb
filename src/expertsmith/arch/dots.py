"""dots.llm of rednote-hilab."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="dots1",
        title="dots.llm1 (rednote-hilab/dots.llm1.base)",
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
            "vocab_size": 128,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

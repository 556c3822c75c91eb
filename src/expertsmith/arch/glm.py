"""Zhipu's GLM families with routed experts."""

from expertsmith.arch.base import Architecture, Stacked

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
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
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
STACKED = (
    Stacked("mlp.gate.weight", "router"),
    Stacked("mlp.gate.e_score_correction_bias", "router"),
    Stacked("mlp.experts.gate_up_proj"),  # fused, in the in-memory layout
    Stacked("mlp.experts.down_proj"),
)

FAMILIES = (
    Architecture(
        model_type="glm4_moe",
        title="GLM-4.5 / 4.6 / 4.7 (GLM-4.5-Air)",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_minimum=2,
        shared_key="n_shared_experts",
        stacked=STACKED,
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        tiny=dict(BASE, num_key_value_heads=2, head_dim=8, first_k_dense_replace=1, use_qk_norm=True),
    ),
    Architecture(
        model_type="glm4_moe_lite",
        title="GLM-4.7-Flash (GLM-4.7-Flash)",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_minimum=2,
        shared_key="n_shared_experts",
        stacked=STACKED,
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        tiny=dict(BASE, **LATENT),
    ),
    Architecture(
        model_type="glm_moe_dsa",
        title="GLM-5 (GLM-5)",
        notes="A decoder layer also returns the sparse-attention indices, which later layers may reuse.",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_minimum=2,
        shared_key="n_shared_experts",
        stacked=STACKED,
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        tiny=dict(BASE, **LATENT, first_k_dense_replace=1, index_topk=8, index_head_dim=16, index_n_heads=2),
    ),
)

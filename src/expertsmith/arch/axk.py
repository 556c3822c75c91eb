"""A.X-K of SK Telecom."""

from expertsmith.arch.base import Architecture, Stacked

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": 128,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STACKED = (
    Stacked("mlp.gate.weight", "router"),
    Stacked("mlp.gate.e_score_correction_bias", "router"),
    Stacked("mlp.experts.gate_up_proj"),
    Stacked("mlp.experts.down_proj"),
)

FAMILIES = (
    Architecture(
        model_type="axk1",
        title="A.X-K1 (skt/A.X-K1)",
        notes="A norm inside the block acts on the sum of routed and shared output; checkpoints keep it on the decoder layer.",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_default=(8, 4),
        group_minimum=2,
        shared_key="n_shared_experts",
        stacked=STACKED,
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        post_norm="mlp.post_mlp_layernorm",
        tiny=BASE,
    ),
    Architecture(
        model_type="axk2",
        title="A.X-K2 (skt/A.X-K2)",
        notes="n_group may be null (no groups). Experts outside the chosen groups compete with the score 0 instead of -inf, so "
        "they can still be selected if selection biases are negative.",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_minimum=2,
        shared_key="n_shared_experts",
        stacked=STACKED,
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        tiny=dict(BASE, gated_norm_rank=4, index_topk=16, index_head_dim=16, index_n_heads=2),
    ),
)

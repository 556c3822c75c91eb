"""DeepSeek V2 to V4, and Moonshot's Kimi, which K2 and VL is DeepSeek V3 under other names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertsmith.arch.base import Architecture, Stacked

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STACKED = (
    Stacked("mlp.gate.weight", "router"),
    Stacked("mlp.experts.gate_up_proj"),  # fused, in the in-memory layout
    Stacked("mlp.experts.down_proj"),
)
BIASED = (Stacked("mlp.gate.e_score_correction_bias", "router"), *STACKED)


def hash_layers(config: Mapping[str, Any]) -> str | None:
    """DeepSeek V4's first MoE layers may look their experts up by token id."""
    kinds = config.get("mlp_layer_types")
    count = config.get("num_hash_layers")  # transformers takes 3 where it is missing
    hashed = "hash_moe" in kinds if kinds is not None else count is None or count > 0
    return "hash routing layers choose experts by a token-id table that names the experts" if hashed else None


OWN_CODE = "its config class is code of its own, which knows one number for all layers"
V3 = Architecture(
    model_type="deepseek_v3",
    title="DeepSeek V3 / R1 (DeepSeek-V3)",
    experts_key=("n_routed_experts",),
    group_key="n_group",
    top_group_key="topk_group",
    group_default=(8, 4),
    group_minimum=2,
    shared_key="n_shared_experts",
    stacked=BIASED,
    shared="shared_experts",
    selection_bias=("gate.e_score_correction_bias",),
    score="sigmoid",
    tiny=BASE,
)

FAMILIES = (
    Architecture(
        model_type="deepseek_v2",
        title="DeepSeek V2 (DeepSeek-V2-Lite)",
        notes="Groups apply only with topk_method group_limited_greedy; a group's score is that of its best expert.",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_active=("topk_method", ("group_limited_greedy",)),
        shared_key="n_shared_experts",
        stacked=STACKED,
        shared="shared_experts",
        tiny=dict(BASE, topk_method="group_limited_greedy", routed_scaling_factor=2.0),
    ),
    V3,
    replace(
        V3,
        model_type="kimi_k2",
        title="Kimi K2 (moonshotai/Kimi-K2-Instruct)",
        notes="DeepSeek V3 under another name, and run as such; all layers have the same number of experts.",
        runs_as="deepseek_v3",
        uneven=OWN_CODE,
    ),
    replace(
        V3,
        model_type="kimi_vl",
        title="Kimi-VL (moonshotai/Kimi-VL-A3B-Instruct)",
        notes="Its language model is DeepSeek V3 and is run as such, on text; the tensors of vision tower and projector do not change.",
        runs_as="deepseek_v3",
        text_prefix="language_model.",
        uneven=OWN_CODE,
    ),
    Architecture(
        model_type="deepseek_v32",
        title="DeepSeek V3.2 (DeepSeek-V3.2-Exp)",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_default=(8, 4),
        group_minimum=2,
        shared_key="n_shared_experts",
        stacked=BIASED,
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        tiny=dict(BASE, index_topk=8, index_head_dim=16, index_n_heads=2),
    ),
    Architecture(
        model_type="deepseek_v4",
        title="DeepSeek V4 (DeepSeek-V4-Flash-Base)",
        status="partial",
        notes="The layer carries several residual streams (hyper-connections) that add the block's output with learned "
        "weights; the norm's input is used as the residual stream. Configs "
        "with hash routing layers, which the published ones have, are refused.",
        experts_key=("n_routed_experts",),
        shared_key="n_shared_experts",
        expert_prefix=("ffn.experts.{expert}.",),
        projections=("w1", "w3", "w2"),
        stacked=(
            Stacked("ffn.gate.weight", "router"),
            Stacked("ffn.gate.bias", "router"),
            *BIASED,
        ),
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sqrtsoftplus",
        residual_exact=False,
        refusal=hash_layers,
        tiny={
            "hidden_size": 32,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 128,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["moe", "moe", "moe"],
            "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "partial_rotary_factor": 0.5,
            "q_lora_rank": 16,
            "o_groups": 2,
            "o_lora_rank": 8,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 4,
            "sliding_window": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    Architecture(
        model_type="kimi_linear",
        title="Kimi Linear (Kimi-Linear-48B-A3B-Instruct)",
        notes="The selection bias and the router are stored below block_sparse_moe, the experts as w1, w3 and w2.",
        top_k_key=("num_experts_per_token",),
        group_key="num_expert_group",
        top_group_key="topk_group",
        group_minimum=2,
        shared_key="num_shared_experts",
        expert_prefix=("block_sparse_moe.experts.{expert}.",),
        projections=("w1", "w3", "w2"),
        stacked=(
            Stacked("block_sparse_moe.gate.weight", "router"),
            Stacked("block_sparse_moe.gate.e_score_correction_bias", "router"),
            *BIASED,
        ),
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        tiny={
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 128,
            "num_experts": 8,
            "num_shared_experts": 1,
            "num_experts_per_token": 2,
            "num_expert_group": 2,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "model_max_length": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

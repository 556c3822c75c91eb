"""Hunyuan of Tencent."""

from collections.abc import Mapping
from typing import Any

from expertsmith.arch.base import Architecture, Stacked

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def listed_experts(config: Mapping[str, Any]) -> str | None:
    """Refuse configs with a list of expert counts."""
    if isinstance(config.get("num_experts"), list):
        return "num_experts is a list with one count a layer; only a single count is supported"
    return None


FAMILIES = (
    Architecture(
        model_type="hunyuan_v1_moe",
        title="Hunyuan-MoE V1 (tencent/Hunyuan-A13B-Instruct)",
        notes="moe_topk may be a list with one number a layer.",
        top_k_key=("moe_topk", "num_experts_per_tok"),
        expert_width_key=("intermediate_size",),
        stacked=(
            Stacked("mlp.gate.wg.weight", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        shared="shared_mlp",
        refusal=listed_experts,
        tiny=dict(BASE, intermediate_size=24, num_experts=8, moe_topk=2, eod_token_id=3, sep_token_id=4),
    ),
    Architecture(
        model_type="hy_v3",
        title="Hy3 (tencent/Hy3-preview)",
        notes="The selection bias belongs to the block, which hands it to the router.",
        shared_key="num_shared_experts",
        stacked=(
            Stacked("mlp.router.gate.weight", "router"),
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.expert_bias", "router"),
            Stacked("mlp.e_score_correction_bias", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        shared="shared_experts",
        selection_bias=("e_score_correction_bias",),
        score="sigmoid",
        tiny=dict(
            BASE,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_experts=8,
            num_shared_experts=1,
            num_experts_per_tok=2,
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
    ),
    Architecture(
        model_type="hy_v4",
        title="Hy4 (tencent/Hy4-preview)",
        notes="Hyper-connections: hc_mult residual streams are mixed into the block's input and its output is spread over them "
        "again, so the norm's input stands for the residual stream. Experts are stored stacked.",
        experts_key=("n_routed_experts",),
        group_key="n_group",
        top_group_key="topk_group",
        group_minimum=2,
        shared_key="n_shared_experts",
        expert_prefix=(),
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        residual_exact=False,
        tiny=dict(
            BASE,
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            index_topk=16,
            index_head_dim=16,
            index_n_heads=2,
            hc_mult=2,
            intermediate_size=48,
            moe_intermediate_size=24,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
    ),
)

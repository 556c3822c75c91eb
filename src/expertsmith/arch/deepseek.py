"""DeepSeek V2 to V4, and Moonshot's Kimi; Kimi K2 and VL are DeepSeek V3 under other names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertsmith.arch.attention import kda_state
from expertsmith.arch.base import Stacked
from expertsmith.arch.kinds import DEEPSEEK, GROUPED, OWN_CODE, SIGMOID


def hash_layers(config: Mapping[str, Any]) -> str | None:
    """DeepSeek V4's first MoE layers may select experts by token id."""
    kinds = config.get("mlp_layer_types")
    count = config.get("num_hash_layers")  # transformers uses 3 if it is missing
    hashed = "hash_moe" in kinds if kinds is not None else count is None or count > 0
    return "hash routing layers choose experts by a token-id table that names the experts" if hashed else None


V3 = replace(DEEPSEEK, model_type="deepseek_v3", title="DeepSeek V3 / R1 (DeepSeek-V3)", group_default=(8, 4))

FAMILIES = (
    replace(
        GROUPED,
        model_type="deepseek_v2",
        title="DeepSeek V2 (DeepSeek-V2-Lite)",
        notes="Groups apply only with topk_method group_limited_greedy; a group's score is that of its best expert.",
        group_active=("topk_method", ("group_limited_greedy",)),
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
    replace(V3, model_type="deepseek_v32", title="DeepSeek V3.2 (DeepSeek-V3.2-Exp)"),
    replace(
        SIGMOID,
        model_type="deepseek_v4",
        cache_unknown="its layers keep compressed keys and values",
        title="DeepSeek V4 (DeepSeek-V4-Flash-Base)",
        width_sizes="more",
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
            *SIGMOID.stacked,
        ),
        shared="shared_experts",
        score="sqrtsoftplus",
        residual_exact=False,
        refusal=hash_layers,
    ),
    replace(
        SIGMOID,
        model_type="kimi_linear",
        state=kda_state,
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
            *SIGMOID.stacked,
        ),
        shared="shared_experts",
    ),
)

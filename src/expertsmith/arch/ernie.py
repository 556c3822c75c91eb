"""Baidu's ERNIE 4.5."""

from expertsmith.arch.base import FUSED, Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="ernie4_5_moe",
        title="ERNIE 4.5 MoE (ERNIE-4.5-21B-A3B-PT)",
        notes="The selection bias has the shape [1, experts] and is stored next to the router on disk, inside it in memory.",
        experts_key=("moe_num_experts",),
        top_k_key=("moe_k",),
        shared_key="moe_num_shared_experts",
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.moe_statics.e_score_correction_bias", "router"),
            Stacked("mlp.gate.moe_statics.e_score_correction_bias", "router"),  # in-memory layout
            *FUSED,
        ),
        shared="shared_experts",
        selection_bias=("gate.moe_statics.e_score_correction_bias",),
    ),
)

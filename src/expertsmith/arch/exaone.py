"""K-EXAONE of LG AI Research."""

from dataclasses import replace

from expertsmith.arch.base import FUSED, Stacked
from expertsmith.arch.kinds import SIGMOID

FAMILIES = (
    replace(
        SIGMOID,
        model_type="exaone_moe",
        title="EXAONE-MoE (LGAI-EXAONE/K-EXAONE-236B-A23B)",
        group_key="n_group",
        top_group_key="topk_group",
        group_minimum=2,
        shared_key="num_shared_experts",
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.e_score_correction_bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            *FUSED,
        ),
        shared="shared_experts",
    ),
)

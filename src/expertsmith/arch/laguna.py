"""Laguna of Poolside."""

from dataclasses import replace

from expertsmith.arch.base import FUSED, Stacked
from expertsmith.arch.kinds import SIGMOID

FAMILIES = (
    replace(
        SIGMOID,
        model_type="laguna",
        title="Laguna (poolside/laguna-XS.2)",
        notes="Routing weights sum to 1; moe_routed_scaling_factor multiplies the routed sum after the experts.",
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.experts.e_score_correction_bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            *FUSED,
        ),
        shared="shared_experts",
        block_scale="routed_scaling_factor",
    ),
)

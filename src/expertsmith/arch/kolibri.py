"""Kolibri of Aleph Alpha."""

from dataclasses import replace

from expertsmith.arch.base import FUSED, Stacked
from expertsmith.arch.kinds import SIGMOID

FAMILIES = (
    replace(
        SIGMOID,
        model_type="kolibri1",
        title="Kolibri 1 (Aleph-Alpha/Kolibri-1)",
        notes="The selection bias is added to the logits, not to the sigmoid scores.",
        experts_key=("num_experts", "num_local_experts"),
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("moe.router.expert_bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            *FUSED,
        ),
        shared="shared_experts",
        post_norm="post_mlp_layernorm",
    ),
)

"""Step of StepFun."""

from dataclasses import replace

from expertsmith.arch.base import Stacked
from expertsmith.arch.kinds import COMPOSITE_NOTE, SIGMOID, WHOLE_ONLY

FAMILIES = (
    replace(
        SIGMOID,
        model_type="step3p5",
        title="Step-3.7-Flash (stepfun-ai/Step-3.7-Flash)",
        notes=COMPOSITE_NOTE + " moe_router_scaling_factor multiplies the routed output after the experts.",
        composite="step3p7",
        experts_key=("moe_num_experts", "n_routed_experts", "num_local_experts"),
        top_k_key=("moe_top_k", "num_experts_per_tok"),
        expert_prefix=(),
        stacked=(
            Stacked("moe.gate.weight", "router"),
            Stacked("moe.router_bias", "router"),
            Stacked("moe.gate_proj.weight"),
            Stacked("moe.up_proj.weight"),
            Stacked("moe.down_proj.weight"),
            *SIGMOID.stacked,  # as in memory
        ),
        shared="shared_experts",
        block_scale="routed_scaling_factor",
        uneven=WHOLE_ONLY,
    ),
)

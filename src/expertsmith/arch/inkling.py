"""Inkling of Thinking Machines (language models)."""

from dataclasses import replace

from expertsmith.arch.attention import inkling_state
from expertsmith.arch.base import Stacked
from expertsmith.arch.kinds import SIGMOID

EXPERTS = (
    Stacked("mlp.experts.w13_weight", layout="alternating"),
    Stacked("mlp.experts.w2_weight", layout="down"),
    Stacked("mlp.experts.gate_up_proj"),
    Stacked("mlp.experts.down_proj"),
)

FAMILIES = (
    replace(
        SIGMOID,
        model_type="inkling_text",
        state=inkling_state,
        title="Inkling (thinkingmachines/Inkling)",
        width_sizes="more",
        notes="The router also has a row for each shared expert, and routed and shared weights sum to one scale. A short "
        "causal convolution acts on the block's output before the residual add, so the plain sum is not the layer's "
        "output.",
        experts_key=("n_routed_experts",),
        shared_key="n_shared_experts",
        expert_prefix=(),
        stacked=(
            Stacked("mlp.gate.weight", "router", extra="n_shared_experts"),
            Stacked("mlp.gate.bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            *EXPERTS,
        ),
        shared="shared_experts",
        residual_exact=False,
    ),
    replace(
        SIGMOID,
        model_type="inkling2_text",
        state=inkling_state,
        title="Inkling 2 (thinkingmachines/Inkling-2-Small-MXFP8)",
        notes="The block's input is an attention over the outputs of earlier layers, not the residual stream, and a short "
        "causal convolution acts on its output, so the plain sum is not the layer's output. scoring_func is sigmoid "
        "unless set otherwise.",
        experts_key=("n_routed_experts",),
        expert_prefix=(),
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.gate.bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            *EXPERTS,
            Stacked("mlp.experts.w13_weight_scale"),  # of MXFP8 checkpoints
            Stacked("mlp.experts.w2_weight_scale"),
            Stacked("mlp.experts.gate_up_proj_scale_inv"),
            Stacked("mlp.experts.down_proj_scale_inv"),
        ),
        residual_exact=False,
    ),
)

"""LFM2 of Liquid AI."""

from dataclasses import replace

from expertsmith.arch.attention import convolution_state
from expertsmith.arch.base import Stacked
from expertsmith.arch.kinds import SIGMOID

FAMILIES = (
    replace(
        SIGMOID,
        model_type="lfm2_moe",
        state=convolution_state,
        title="LFM2-MoE (LiquidAI/LFM2-8B-A1B)",
        notes="The selection bias belongs to the block, which hands it to the router; it is absent where use_expert_bias is "
        "false.",
        expert_prefix=("feed_forward.experts.{expert}.",),
        projections=("w1", "w3", "w2"),
        stacked=(
            Stacked("feed_forward.gate.weight", "router"),
            Stacked("feed_forward.expert_bias", "router"),
            Stacked("feed_forward.experts.gate_up_proj"),
            Stacked("feed_forward.experts.down_proj"),
        ),
        block="feed_forward",
        selection_bias=("expert_bias",),
        norm="ffn_norm",
    ),
)

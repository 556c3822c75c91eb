"""Jamba of AI21."""

from collections.abc import Mapping
from typing import Any

from expertsmith.arch.attention import mamba_state
from expertsmith.arch.base import Architecture, Stacked


def dense(config: Mapping[str, Any]) -> str | None:
    """Small Jamba models have one expert only."""
    return "the model has no routed experts (num_experts is 1)" if config.get("num_experts") == 1 else None


FAMILIES = (
    Architecture(
        model_type="jamba",
        state=mamba_state,
        title="Jamba (ai21labs/Jamba-v0.1)",
        width_sizes="more",
        expert_width_key=("intermediate_size",),
        expert_prefix=("feed_forward.experts.{expert}.",),
        stacked=(
            Stacked("feed_forward.router.weight", "router"),
            Stacked("feed_forward.experts.gate_up_proj"),
            Stacked("feed_forward.experts.down_proj"),
        ),
        block="feed_forward",
        router="router",
        norm="pre_ff_layernorm",
        refusal=dense,
    ),
)

"""IBM's Granite families with routed experts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertsmith.arch.attention import mamba2_state
from expertsmith.arch.base import Architecture, Stacked

FUSED = (  # the in-memory layout
    Stacked("block_sparse_moe.router.weight", "router"),
    Stacked("block_sparse_moe.experts.gate_up_proj"),
    Stacked("block_sparse_moe.experts.down_proj"),
)
STACKED = (
    Stacked("block_sparse_moe.router.layer.weight", "router"),
    Stacked("block_sparse_moe.input_linear.weight", layout="gate_up"),
    Stacked("block_sparse_moe.output_linear.weight", layout="down"),
    *FUSED,
)


def dense(config: Mapping[str, Any]) -> str | None:
    """Granite 4.0 also uses granitemoehybrid for dense models."""
    return None if config.get("num_local_experts", 8) else "the model has no routed experts (num_local_experts is 0)"


GRANITE = Architecture(
    model_type="granitemoe",
    title="Granite MoE (granite-3.0-1b-a400m-base)",
    notes="Experts are stacked on disk; the block's output is multiplied by residual_multiplier at the residual add.",
    experts_key=("num_local_experts",),
    expert_width_key=("intermediate_size",),
    expert_prefix=(),
    stacked=STACKED,
    block="block_sparse_moe",
    router="router",
    layer_scale="residual_multiplier",
)
SHARED = replace(
    GRANITE,
    model_type="granitemoeshared",
    title="Granite MoE with shared experts (moe-7b-1b-active-shared-experts)",
    notes="The shared expert is a child of the decoder layer, so the layer itself is the block here.",
    block="",
    router="block_sparse_moe.router",
    experts="block_sparse_moe.experts",
    shared="shared_mlp",
)

FAMILIES = (
    GRANITE,
    SHARED,
    replace(
        SHARED,
        model_type="granitemoehybrid",
        state=mamba2_state,
        title="Granite 4.0 hybrid (granite-4.0-h-tiny)",
        notes=f"Mamba-2 and attention layers. {SHARED.notes}",
        refusal=dense,
    ),
    replace(
        SHARED,
        model_type="granitemoe_swa",
        title="Granite MoE with sliding-window attention (granite-swash-3b-a600m)",
        notes="As granitemoeshared, but the checkpoint keeps the in-memory names.",
        stacked=FUSED,
    ),
)

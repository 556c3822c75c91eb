"""Gemma 4 of Google (language model)."""

from collections.abc import Mapping
from typing import Any

from expertsmith.arch.base import Architecture, Stacked


def dense(config: Mapping[str, Any]) -> str | None:
    """Most Gemma 4 models have no experts."""
    return None if config.get("enable_moe_block") else "the model has no routed experts (enable_moe_block is not set)"


FAMILIES = (
    Architecture(
        model_type="gemma4_text",
        title="Gemma 4 MoE (google/gemma-4-26B-A4B-it)",
        notes="Router and experts are children of the decoder layer, next to a dense MLP that is used as the shared expert. After "
        "the sum, an optional per-layer input is added and everything is multiplied by layer_scalar, so the plain sum "
        "is not the layer's output.",
        top_k_key=("top_k_experts",),
        expert_prefix=(),
        stacked=(
            Stacked("router.proj.weight", "router"),
            Stacked("router.per_expert_scale", "router"),
            Stacked("experts.gate_up_proj"),
            Stacked("experts.down_proj"),
        ),
        block="",
        router="router",
        shared="post_feedforward_layernorm_1",
        router_output="probabilities",
        norm="pre_feedforward_layernorm",
        after_experts="post_feedforward_layernorm_2",
        post_norm="post_feedforward_layernorm",
        residual_exact=False,
        uneven="its position embeddings need configs that are the same for all layers of one attention type",
        refusal=dense,
    ),
)

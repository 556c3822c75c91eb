"""Nemotron-H and Nemotron 3 of NVIDIA."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertsmith.arch.attention import nemotron_state
from expertsmith.arch.base import Stacked
from expertsmith.arch.kinds import DEEPSEEK


def dense(config: Mapping[str, Any]) -> str | None:
    """The first Nemotron-H models are dense, as the layer pattern shows (one letter per layer in original configs)."""
    kinds = config.get("layers_block_type") or config.get("hybrid_override_pattern")
    routed = kinds is None or "moe" in kinds or "E" in kinds
    return None if routed else "the model has no routed experts (no moe layer)"


FAMILIES = (
    replace(
        DEEPSEEK,
        model_type="nemotron_h",
        state=nemotron_state,
        title="Nemotron-H MoE (nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16)",
        width_sizes="nothing",
        notes="Every layer holds one mixer: Mamba, attention, dense MLP or MoE. Experts have no gate projection and may work "
        "in a latent space (moe_latent_size), with a shared projection back.",
        expert_prefix=("mixer.experts.{expert}.",),
        projections=(None, "up_proj", "down_proj"),
        stacked=(
            Stacked("mixer.gate.weight", "router"),
            Stacked("mixer.gate.e_score_correction_bias", "router"),
            Stacked("mixer.experts.up_proj"),
            Stacked("mixer.experts.down_proj"),
        ),
        block="mixer",
        norm="norm",
        after_experts="fc2_latent_proj",
        refusal=dense,
    ),
)

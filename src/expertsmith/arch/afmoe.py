"""AFMoE (Trinity) of Arcee."""

from dataclasses import replace

from expertsmith.arch.base import FUSED, Stacked
from expertsmith.arch.kinds import SIGMOID

FAMILIES = (
    replace(
        SIGMOID,
        model_type="afmoe",
        title="AFMoE (arcee-ai/Trinity-Mini)",
        notes="The block owns the selection bias and passes it to the router. A fresh model's router weights are all zero.",
        shared_key="num_shared_experts",
        stacked=(
            Stacked("mlp.router.gate.weight", "router"),
            Stacked("mlp.expert_bias", "router"),
            *FUSED,
        ),
        router="router",
        shared="shared_experts",
        selection_bias=("expert_bias",),
        norm="pre_mlp_layernorm",
        post_norm="post_mlp_layernorm",
    ),
)

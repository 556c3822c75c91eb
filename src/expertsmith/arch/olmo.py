"""OLMoE and FlexOlmo."""

from expertsmith.arch.base import Architecture

FAMILIES = (
    Architecture(
        model_type="olmoe",
        title="OLMoE (OLMoE-1B-7B-0924)",
        expert_width_key=("intermediate_size",),
    ),
    Architecture(
        model_type="flex_olmo",
        title="FlexOlmo (FlexOlmo-7x7B-1T)",
        notes="No norm before the block; its output is normalised before the residual add.",
        expert_width_key=("intermediate_size",),
        residual="block_input",
        norm=None,
        post_norm="post_feedforward_layernorm",
    ),
)

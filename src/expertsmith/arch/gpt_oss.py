"""OpenAI's gpt-oss."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="gpt_oss",
        title="gpt-oss (gpt-oss-20b)",
        notes="Experts are stacked on disk, transposed, with gate and up interleaved; the router adds a bias to its logits.",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=(),
        stacked=(
            Stacked("mlp.router.weight", "router"),
            Stacked("mlp.router.bias", "router"),
            Stacked("mlp.experts.gate_up_proj", layout="alternating_t"),
            Stacked("mlp.experts.gate_up_proj_bias", layout="alternating_t"),
            Stacked("mlp.experts.down_proj", layout="down_t"),
            Stacked("mlp.experts.down_proj_bias", layout="down_t"),
            Stacked("mlp.experts.gate_up_proj_blocks"),  # MXFP4, as published
            Stacked("mlp.experts.gate_up_proj_scales"),
            Stacked("mlp.experts.down_proj_blocks"),
            Stacked("mlp.experts.down_proj_scales"),
        ),
        router="router",
        logit_bias=("router.bias",),
    ),
)

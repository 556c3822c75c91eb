"""Aria of Rhymes AI (language model)."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="aria_text",
        title="Aria (rhymes-ai/Aria)",
        notes="Experts are stored stacked and transposed: input axis before output axis.",
        experts_key=("moe_num_experts",),
        top_k_key=("moe_topk",),
        shared_key="moe_num_shared_experts",
        expert_width_key=("intermediate_size",),
        expert_prefix=(),
        stacked=(
            Stacked("mlp.router.weight", "router"),
            Stacked("mlp.experts.fc1.weight", layout="gate_up_t"),
            Stacked("mlp.experts.fc2.weight", layout="down_t"),
            Stacked("mlp.experts.gate_up_proj", layout="gate_up_t"),
            Stacked("mlp.experts.down_proj", layout="down_t"),
        ),
        router="router",
        shared="shared_experts",
    ),
)

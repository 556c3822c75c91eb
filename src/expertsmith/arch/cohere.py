"""Command A+ of Cohere."""

from expertsmith.arch.base import Architecture

FAMILIES = (
    Architecture(
        model_type="cohere2_moe",
        title="Command A+ (CohereLabs/command-a-plus-05-2026)",
        notes="Attention and MLP run side by side on the same norm's output, so the attention's output is missing from the "
        "plain sum. shared_expert_combination_strategy average halves the sum of routed and shared output; "
        "expert_selection_fn may be sigmoid.",
        shared_key="num_shared_experts",
        expert_width_key=("intermediate_size",),
        shared="shared_experts",
        norm="input_layernorm",
        residual_exact=False,
    ),
)

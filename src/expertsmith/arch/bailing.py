"""Ling of inclusionAI (Bailing)."""

from dataclasses import replace

from expertsmith.arch.attention import bailing_state
from expertsmith.arch.base import FUSED, Architecture, Stacked
from expertsmith.arch.kinds import SIGMOID

OWN_CODE = "its classes are code of its own, which knows one number for all layers"
NO_CLASS = "transformers has no class for it, and the code that comes with the checkpoint is not run"
NOTES = "transformers has no class for it, so only commands that do not run the model work: data-free methods, plan, apply, the bytes of verify."
MOE = Architecture(
    model_type="bailing_moe",
    title="Ling 1.0 and 1.5 (inclusionAI/Ling-lite)",
    status="partial",
    notes=f"{NOTES} Ling 2.0 may also have this name; expert_groups and the selection bias apply if present.",
    group_key="n_group",
    top_group_key="topk_group",
    group_minimum=2,
    shared_key="num_shared_experts",
    stacked=(
        Stacked("mlp.gate.weight", "router"),
        Stacked("mlp.gate.expert_bias", "router"),
    ),
    shared="shared_experts",
    selection_bias=("gate.expert_bias",),
    uneven=OWN_CODE,
    no_class=NO_CLASS,
)

FAMILIES = (
    MOE,
    replace(
        MOE,
        model_type="bailing_moe_v2",
        title="Ling 2.0 and Ring 2.0 (inclusionAI/Ling-mini-2.0)",
        notes=NOTES,
        group_default=(8, 4),
        score="sigmoid",
    ),
    replace(
        SIGMOID,
        model_type="bailing_hybrid",
        state=bailing_state,
        title="Ling 3.0 (inclusionAI/Ling-3.0-Flash)",
        notes="transformers also reads n_group and num_experts_per_tok, but writes num_expert_group and num_experts_per_token.",
        top_k_key=("num_experts_per_token", "num_experts_per_tok"),
        group_key="num_expert_group",
        group_alias="n_group",
        top_group_key="topk_group",
        group_default=(8, 4),
        group_minimum=2,
        shared_key="num_shared_experts",
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.gate.expert_bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            *FUSED,
        ),
        shared="shared_experts",
    ),
)

"""Mixtral and the families that share its block_sparse_moe checkpoint layout: Phi-MoE and MiniMax."""

from dataclasses import replace

from expertsmith.arch.attention import lightning_state
from expertsmith.arch.base import Stacked
from expertsmith.arch.kinds import GROUPED, MIXTRAL

FAMILIES = (
    replace(
        MIXTRAL,
        model_type="mixtral",
        title="Mixtral (Mixtral-8x7B-v0.1)",
    ),
    replace(
        MIXTRAL,
        model_type="phimoe",
        title="Phi-3.5-MoE (Phi-3.5-MoE-instruct)",
        notes="The sparsemixer router always uses two experts; its weights do not sum to 1, and -inf logits give NaN.",
        stacked=(Stacked("mlp.router.weight", "router"), *MIXTRAL.stacked),
        router="router",
        mask_value=-1e4,
    ),
    replace(
        MIXTRAL,
        model_type="minimax",
        state=lightning_state,
        title="MiniMax-Text-01 (MiniMax-Text-01-hf)",
        notes="The residual stream is the norm's output, and both sides of the residual add have a factor.",
        residual="norm_output",
        layer_scale="mlp_beta_factor",
        residual_scale="mlp_alpha_factor",
    ),
    replace(
        MIXTRAL,
        model_type="minimax_m2",
        title="MiniMax-M2 (MiniMax-M2)",
        notes="The block owns the selection bias and passes it to the router.",
        stacked=(
            Stacked("block_sparse_moe.e_score_correction_bias", "router"),
            Stacked("mlp.e_score_correction_bias", "router"),
            *MIXTRAL.stacked,
        ),
        selection_bias=("e_score_correction_bias",),
        score="sigmoid",
    ),
    replace(
        MIXTRAL,
        model_type="minimax_m3_vl_text",
        title="MiniMax-M3, text part (MiniMax-M3)",
        notes="routed_scaling_factor multiplies the routed output after the experts; the vision-language checkpoint has one "
        "tensor per expert, the text-only one is fused.",
        stacked=(
            Stacked("block_sparse_moe.e_score_correction_bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            *MIXTRAL.stacked,
        ),
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        block_scale="routed_scaling_factor",
    ),
    replace(
        GROUPED,
        model_type="mistral4",
        title="Mistral Small 4 (mistralai/Mistral-Small-4-119B-2603)",
        group_minimum=2,
    ),
)

"""Hunyuan of Tencent."""

from dataclasses import replace

from expertsmith.arch.base import FUSED, Architecture, Stacked
from expertsmith.arch.kinds import DEEPSEEK, SIGMOID

FAMILIES = (
    Architecture(
        model_type="hunyuan_v1_moe",
        title="Hunyuan-MoE V1 (tencent/Hunyuan-A13B-Instruct)",
        width_sizes="more",
        notes="moe_topk and num_experts may be lists with one number per layer.",
        top_k_key=("moe_topk", "num_experts_per_tok"),
        expert_width_key=("intermediate_size",),
        stacked=(
            Stacked("mlp.gate.wg.weight", "router"),
            *FUSED,
        ),
        shared="shared_mlp",
    ),
    replace(
        SIGMOID,
        model_type="hy_v3",
        title="Hy3 (tencent/Hy3-preview)",
        notes="The block owns the selection bias and passes it to the router.",
        shared_key="num_shared_experts",
        stacked=(
            Stacked("mlp.router.gate.weight", "router"),
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.expert_bias", "router"),
            Stacked("mlp.e_score_correction_bias", "router"),
            *FUSED,
        ),
        shared="shared_experts",
        selection_bias=("e_score_correction_bias",),
    ),
    replace(
        DEEPSEEK,
        model_type="hy_v4",
        title="Hy4 (tencent/Hy4-preview)",
        notes="Hyper-connections: hc_mult residual streams are mixed into the block's input and its output is spread over them "
        "again, so the norm's input is used as the residual stream. Experts are stored stacked.",
        expert_prefix=(),
        residual_exact=False,
    ),
)

"""LongCat of Meituan."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="longcat_flash",
        title="LongCat-Flash (meituan-longcat/LongCat-Flash-Chat)",
        notes="The last zero_expert_num router classes return their input unchanged and are always kept; transformers stores "
        "unused gate and up projections for them as the experts from n_routed_experts on, which published checkpoints leave out. The routed output skips the "
        "layer's second attention and joins at the end, so the plain sum is not the layer's output.",
        experts_key=("n_routed_experts",),
        top_k_key=("moe_topk",),
        expert_width_key=("expert_ffn_hidden_size",),
        same_as=(("head_dim", "qk_rope_head_dim"),),
        stacked=(
            Stacked("mlp.router.classifier.weight", "router", extra="zero_expert_num"),
            Stacked("mlp.router.classifier.bias", "router", extra="zero_expert_num"),
            Stacked("mlp.router.e_score_correction_bias", "router", extra="zero_expert_num"),
            Stacked("mlp.experts.gate_up_proj", extra="zero_expert_num"),
            Stacked("mlp.experts.down_proj"),
        ),
        router="router",
        selection_bias=("router.e_score_correction_bias",),
        norm="post_attention_layernorm.0",
        residual_exact=False,
        call="pairs",
    ),
)

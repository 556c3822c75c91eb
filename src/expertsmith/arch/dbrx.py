"""DBRX of Databricks."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="dbrx",
        title="DBRX (transformers-community/dbrx-instruct)",
        notes="The router returns logits only and the experts take a three-dimensional input. Stacked weights are flattened to "
        "experts * width rows.",
        experts_key=("ffn_config.moe_num_experts",),
        top_k_key=("ffn_config.moe_top_k",),
        expert_width_key=("ffn_config.ffn_hidden_size",),
        expert_prefix=(),
        stacked=(
            Stacked("ffn.router.layer.weight", "router"),
            Stacked("ffn.experts.mlp.w1", layout="gate"),
            Stacked("ffn.experts.mlp.v1", layout="up"),
            Stacked("ffn.experts.mlp.w2", layout="down_t"),
        ),
        layers="transformer.blocks",
        block="ffn",
        router="router",
        router_output="logits_only",
        norm="norm_attn_norm.norm_2",
    ),
)

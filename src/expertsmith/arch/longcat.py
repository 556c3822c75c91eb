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
        tiny={
            "hidden_size": 32,
            "num_layers": 3,  # num_hidden_layers of the built config is twice that
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "vocab_size": 128,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
            "n_routed_experts": 8,
            "zero_expert_num": 4,
            "moe_topk": 2,
            "routed_scaling_factor": 2.5,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

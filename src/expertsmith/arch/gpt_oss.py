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
        tiny={
            "hidden_size": 32,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

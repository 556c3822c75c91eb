"""Beam of Reflection."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="beam",
        title="Beam (reflection/Beam-1.0-501B-A23B)",
        notes="The residual add is depth-scaled: with n = 2 * layer + 3 the stream is multiplied by sqrt((n - 1) / n) and the "
        "block's normed output by 1 / sqrt(n), so the plain sum is not the layer's output.",
        group_key="n_group",
        top_group_key="topk_group",
        group_default=(8, 4),
        group_minimum=2,
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        norm="pre_feedforward_layernorm",
        block_scale="routed_scaling_factor",
        post_norm="post_feedforward_layernorm",
        residual_exact=False,
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": 8,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

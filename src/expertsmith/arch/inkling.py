"""Inkling of Thinking Machines (language models)."""

from expertsmith.arch.base import Architecture, Stacked

BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
    "vocab_size": 128,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = (
    Stacked("mlp.experts.w13_weight", layout="alternating"),
    Stacked("mlp.experts.w2_weight", layout="down"),
    Stacked("mlp.experts.gate_up_proj"),
    Stacked("mlp.experts.down_proj"),
)

FAMILIES = (
    Architecture(
        model_type="inkling_text",
        title="Inkling (thinkingmachines/Inkling)",
        notes="The router also has a row for each shared expert, and routed and shared weights sum to one scale. A short "
        "causal convolution acts on the block's output before the residual add, so the plain sum is not the layer's "
        "output.",
        experts_key=("n_routed_experts",),
        shared_key="n_shared_experts",
        expert_prefix=(),
        stacked=(
            Stacked("mlp.gate.weight", "router", extra="n_shared_experts"),
            Stacked("mlp.gate.bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            *EXPERTS,
        ),
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        residual_exact=False,
        tiny=dict(
            BASE,
            intermediate_size=48,
            n_shared_experts=2,
            mlp_layer_types=["dense", "sparse", "sparse"],
            logits_mup_width_multiplier=1.0,
        ),
    ),
    Architecture(
        model_type="inkling2_text",
        title="Inkling 2 (thinkingmachines/Inkling-2-Small-MXFP8)",
        notes="The block's input is an attention over the outputs of earlier layers, not the residual stream, and a short "
        "causal convolution acts on its output, so the plain sum is not the layer's output. scoring_func is sigmoid "
        "unless set otherwise.",
        experts_key=("n_routed_experts",),
        expert_prefix=(),
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.gate.bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            *EXPERTS,
            Stacked("mlp.experts.w13_weight_scale"),  # of MXFP8 checkpoints
            Stacked("mlp.experts.w2_weight_scale"),
            Stacked("mlp.experts.gate_up_proj_scale_inv"),
            Stacked("mlp.experts.down_proj_scale_inv"),
        ),
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        residual_exact=False,
        tiny=dict(BASE, n_layers_per_attn_res_block=2, unpadded_vocab_size=128),
    ),
)

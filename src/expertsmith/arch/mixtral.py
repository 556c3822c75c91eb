"""Mixtral and the families that share its block_sparse_moe checkpoint layout: Phi-MoE and MiniMax."""

from expertsmith.arch.base import Architecture, Stacked

BASE = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = ("block_sparse_moe.experts.{expert}.",)
PROJECTIONS = ("w1", "w3", "w2")
FUSED = (  # the in-memory layout, in checkpoints that were written fused
    Stacked("mlp.gate.weight", "router"),
    Stacked("mlp.experts.gate_up_proj"),
    Stacked("mlp.experts.down_proj"),
)
STACKED = (Stacked("block_sparse_moe.gate.weight", "router"), *FUSED)

FAMILIES = (
    Architecture(
        model_type="mixtral",
        title="Mixtral (Mixtral-8x7B-v0.1)",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=EXPERTS,
        projections=PROJECTIONS,
        stacked=STACKED,
        tiny=dict(BASE, head_dim=8),
    ),
    Architecture(
        model_type="phimoe",
        title="Phi-3.5-MoE (Phi-3.5-MoE-instruct)",
        notes="The sparsemixer router always uses two experts; its weights do not sum to 1, and -inf logits give NaN.",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=EXPERTS,
        projections=PROJECTIONS,
        stacked=(Stacked("mlp.router.weight", "router"), *STACKED),
        router="router",
        mask_value=-1e4,
        tiny=dict(BASE, attention_bias=True, lm_head_bias=True),
    ),
    Architecture(
        model_type="minimax",
        title="MiniMax-Text-01 (MiniMax-Text-01-hf)",
        notes="The residual stream is the norm's output, and both sides of the residual add have a factor.",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=EXPERTS,
        projections=PROJECTIONS,
        stacked=STACKED,
        residual="norm_output",
        layer_scale="mlp_beta_factor",
        residual_scale="mlp_alpha_factor",
        tiny=dict(
            BASE,
            head_dim=8,
            block_size=8,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            full_attn_alpha_factor=3.5,
            linear_attn_alpha_factor=3.5,
            mlp_alpha_factor=3.5,
        ),
    ),
    Architecture(
        model_type="minimax_m2",
        title="MiniMax-M2 (MiniMax-M2)",
        notes="The selection bias belongs to the block, which passes it to the router.",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=EXPERTS,
        projections=PROJECTIONS,
        stacked=(
            Stacked("block_sparse_moe.e_score_correction_bias", "router"),
            Stacked("mlp.e_score_correction_bias", "router"),
            *STACKED,
        ),
        selection_bias=("e_score_correction_bias",),
        score="sigmoid",
        tiny=dict(BASE, head_dim=8),
    ),
    Architecture(
        model_type="minimax_m3_vl_text",
        title="MiniMax-M3, text part (MiniMax-M3)",
        notes="routed_scaling_factor multiplies the routed output after the experts; the vision-language checkpoint has one "
        "tensor per expert, the text-only one is fused.",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=EXPERTS,
        projections=PROJECTIONS,
        stacked=(
            Stacked("block_sparse_moe.e_score_correction_bias", "router"),
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            *STACKED,
        ),
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        block_scale="routed_scaling_factor",
        tiny=dict(
            BASE,
            head_dim=8,
            dense_intermediate_size=48,
            shared_intermediate_size=40,
            rotary_dim=4,
            mlp_layer_types=["dense", "sparse", "sparse"],
            layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            index_n_heads=2,
            index_head_dim=8,
            index_block_size=4,
            index_topk_blocks=2,
        ),
    ),
)

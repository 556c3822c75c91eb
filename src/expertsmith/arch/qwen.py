"""The Qwen families with routed experts."""

from expertsmith.arch.base import Architecture, Stacked

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STACKED = (
    Stacked("mlp.gate.weight", "router"),
    Stacked("mlp.experts.gate_up_proj"),  # fused, in the in-memory layout
    Stacked("mlp.experts.down_proj"),
)
LINEAR = {
    "shared_expert_intermediate_size": 40,
    "head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SHARED_NOTE = "The shared expert has its own sigmoid gate."

COMPOSITE_NOTE = (
    "The language model runs inside the published class, on text; vision tensors and processor files are copied unchanged."
)
WHOLE_ONLY = "transformers has the language model only as a part of the whole"
VISION_TINY = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [0],
    },
    "image_token_id": 124,
    "video_token_id": 125,
    "vision_start_token_id": 126,
    "vision_end_token_id": 127,
}

FAMILIES = (
    Architecture(
        model_type="qwen2_moe",
        title="Qwen2-MoE (Qwen1.5-MoE-A2.7B)",
        notes=SHARED_NOTE,
        stacked=STACKED,
        shared="shared_expert",
        tiny=dict(BASE, shared_expert_intermediate_size=40),
    ),
    Architecture(
        model_type="qwen3_moe",
        title="Qwen3-MoE (Qwen3-30B-A3B)",
        notes="transformers 5.23 writes num_experts to config.json as num_local_experts.",
        experts_key=("num_experts", "num_local_experts"),
        stacked=STACKED,
        tiny=dict(BASE, head_dim=8, norm_topk_prob=True, mlp_only_layers=[0]),
    ),
    Architecture(
        model_type="qwen3_next",
        title="Qwen3-Next (Qwen3-Next-80B-A3B-Instruct)",
        notes=SHARED_NOTE,
        stacked=STACKED,
        shared="shared_expert",
        tiny=dict(BASE, **LINEAR, layer_types=["linear_attention", "linear_attention", "full_attention"]),
    ),
    Architecture(
        model_type="qwen3_5_moe_text",
        title="Qwen3.5-MoE, text part (Qwen3.5-35B-A3B)",
        notes=SHARED_NOTE,
        stacked=STACKED,
        shared="shared_expert",
        tiny=dict(
            {key: value for key, value in BASE.items() if key != "intermediate_size"},
            **LINEAR,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
        ),
    ),
    Architecture(
        model_type="qwen4_exp_text",
        title="Qwen4-Exp, text part (Qwen4-Exp)",
        notes="The layer carries several residual streams (hyper-connections) that add the block's output with learned "
        "weights; the block's input is used as the residual stream. " + SHARED_NOTE,
        stacked=STACKED,
        shared="shared_expert",
        residual="block_input",
        norm=None,
        residual_exact=False,
        tiny=dict(
            {key: value for key, value in BASE.items() if key != "intermediate_size"},
            **LINEAR,
            layer_types=["linear_attention", "linear_attention", "indexed_attention"],
            hc_count=2,
            hc_lowrank=8,
            ple_layer_ids=[2],
            ple_embed_dim=16,
            ngram_size=2,
            heads_per_ngram=2,
            ngram_vocab_size_base=97,
            make_ngram_vocab_size_divisible_by=8,
            split_ngram_parts=2,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=8,
            indexer_compress_ratio=2,
        ),
    ),
    Architecture(
        model_type="qwen3_vl_moe_text",
        title="Qwen3-VL-MoE (Qwen3-VL-30B-A3B-Instruct)",
        notes=COMPOSITE_NOTE + " Experts are stored stacked and transposed: input axis before output axis.",
        composite="qwen3_vl_moe",
        experts_key=("num_experts", "num_local_experts"),
        expert_prefix=(),
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.experts.gate_up_proj", layout="gate_up_t"),
            Stacked("mlp.experts.down_proj", layout="down_t"),
        ),
        transposed_by_shape=True,
        uneven=WHOLE_ONLY,
        tiny_parts=VISION_TINY,
        tiny=dict(
            BASE,
            num_key_value_heads=2,
            head_dim=8,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        ),
    ),
    Architecture(
        model_type="qwen3_omni_moe_text",
        title="Qwen3-Omni-MoE (Qwen3-Omni-30B-A3B-Instruct)",
        notes="The thinker runs inside its published class, on text; the talker, which has experts of its own, and all tensors of vision and sound "
        "and processor files are copied as they are.",
        composite="qwen3_omni_moe",
        text_prefix="thinker.",
        experts_key=("num_experts", "num_local_experts"),
        stacked=STACKED,
        uneven=WHOLE_ONLY,
        tiny_parts={
            "thinker_config": {
                "vision_config": VISION_TINY["vision_config"],
                "audio_config": {
                    "d_model": 16,
                    "encoder_layers": 1,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 24,
                    "num_mel_bins": 16,
                    "output_dim": 32,
                    "downsample_hidden_size": 8,
                },
                "image_token_id": 124,
                "video_token_id": 125,
                "audio_token_id": 126,
                "vision_start_token_id": 122,
                "vision_end_token_id": 123,
                "audio_start_token_id": 120,
            },
            "enable_audio_output": False,
        },
        tiny=dict(
            BASE,
            num_key_value_heads=2,
            head_dim=8,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "interleaved": True,
            },
        ),
    ),
)

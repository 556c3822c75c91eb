"""Step of StepFun."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="step3p5",
        title="Step-3.7-Flash (stepfun-ai/Step-3.7-Flash)",
        notes="The language model runs inside the published class, on text; vision tensors and processor files are copied unchanged. "
        "moe_router_scaling_factor multiplies the routed output after the experts.",
        composite="step3p7",
        experts_key=("moe_num_experts", "n_routed_experts", "num_local_experts"),
        top_k_key=("moe_top_k", "num_experts_per_tok"),
        expert_prefix=(),
        stacked=(
            Stacked("moe.gate.weight", "router"),
            Stacked("moe.router_bias", "router"),
            Stacked("moe.gate_proj.weight"),
            Stacked("moe.up_proj.weight"),
            Stacked("moe.down_proj.weight"),
            Stacked("mlp.gate.weight", "router"),  # as they are in memory
            Stacked("mlp.gate.e_score_correction_bias", "router"),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        shared="shared_experts",
        selection_bias=("gate.e_score_correction_bias",),
        score="sigmoid",
        block_scale="routed_scaling_factor",
        uneven="transformers has the language model only as a part of the whole",
        tiny_parts={
            "vision_config": {"width": 16, "layers": 1, "heads": 2, "image_size": 16, "patch_size": 4},
            "image_token_id": 124,
        },
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "share_expert_dim": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_sliding_attention_heads": 2,
            "sliding_window": 9,
            "moe_router_scaling_factor": 1.5,
            "swiglu_limits": [None, None, 0.5],
            "swiglu_limits_shared": [None, 0.5, None],
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

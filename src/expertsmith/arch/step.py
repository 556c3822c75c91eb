"""Step 3.5 and 3.7 of StepFun."""

from dataclasses import replace

from expertsmith.arch.base import Architecture, Stacked

STEP_37 = Architecture(
    model_type="step3p7",
    title="Step 3.7 (stepfun-ai/Step-3.7-Flash)",
    notes="The language model runs inside the published class, on text; vision tensors and processor files are copied as they are. "
    "moe_router_scaling_factor multiplies the routed output after the experts; some layers clamp their activations.",
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
        Stacked("mlp.gate.weight", "router"),  # fused, in the in-memory layout
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
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "mlp_ratio": 1.5,
            "image_size": 16,
            "patch_size": 4,
        },
        "image_token_id": 124,
    },
    tiny={
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 8,
        "vocab_size": 128,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "share_expert_dims": 40,
        "moe_num_experts": 8,
        "moe_top_k": 2,
        "moe_router_scaling_factor": 3.0,
        "moe_layers_enum": "1,2",
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "attention_other_setting": {"attention_type": "sliding_attention", "num_attention_heads": 6, "head_dim": 8},
        "sliding_window": 8,
        "rope_theta": [500000.0, 10000.0, 500000.0],
        "partial_rotary_factors": [0.5, 1.0, 0.5],
        "swiglu_limits": [0.0, 0.0, 0.3],
        "swiglu_limits_shared": [0.0, 0.0, 0.3],
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)

FAMILIES = (
    STEP_37,
    replace(
        STEP_37,
        model_type="step3p5",
        title="Step 3.5 (stepfun-ai/Step-3.5-Flash)",
        notes="The language model of Step 3.7, published alone.",
        composite=None,
        no_class="transformers has its class only as a part of Step 3.7, with a vision tower that this checkpoint lacks",
        tiny_parts={},
        tiny={},
    ),
)

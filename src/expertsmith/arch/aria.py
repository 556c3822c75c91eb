"""Aria of Rhymes AI (language model)."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="aria_text",
        title="Aria (rhymes-ai/Aria)",
        notes="Experts are stored stacked and transposed: input axis before output axis.",
        experts_key=("moe_num_experts",),
        top_k_key=("moe_topk",),
        shared_key="moe_num_shared_experts",
        expert_width_key=("intermediate_size",),
        expert_prefix=(),
        stacked=(
            Stacked("mlp.router.weight", "router"),
            Stacked("mlp.experts.fc1.weight", layout="gate_up_t"),
            Stacked("mlp.experts.fc2.weight", layout="down_t"),
            Stacked("mlp.experts.gate_up_proj", layout="gate_up_t"),
            Stacked("mlp.experts.down_proj", layout="down_t"),
        ),
        router="router",
        shared="shared_experts",
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "intermediate_size": 24,
            "moe_num_experts": 8,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

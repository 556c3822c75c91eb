"""OLMoE and FlexOlmo."""

from expertsmith.arch.base import Architecture, Stacked

BASE = {
    "hidden_size": 32,
    "intermediate_size": 24,
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

FAMILIES = (
    Architecture(
        model_type="olmoe",
        title="OLMoE (OLMoE-1B-7B-0924)",
        expert_width_key=("intermediate_size",),
        stacked=STACKED,
        tiny=BASE,
    ),
    Architecture(
        model_type="flex_olmo",
        title="FlexOlmo (FlexOlmo-7x7B-1T)",
        notes="No norm before the block; its output is normalised before the residual add.",
        expert_width_key=("intermediate_size",),
        stacked=STACKED,
        residual="block_input",
        norm=None,
        post_norm="post_feedforward_layernorm",
        tiny=BASE,
    ),
)

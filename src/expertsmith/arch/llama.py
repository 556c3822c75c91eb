"""Llama 4 of Meta (language model)."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="llama4_text",
        title="Llama 4 (meta-llama/Llama-4-Scout-17B-16E)",
        notes="The sigmoid score multiplies the expert's input, and every expert sees every token (zeros where not chosen). "
        "The block adds the routed output in place to the shared expert's output.",
        experts_key=("num_local_experts",),
        expert_width_key=("intermediate_size",),
        expert_prefix=(),
        stacked=(
            Stacked("feed_forward.router.weight", "router"),
            Stacked("feed_forward.experts.gate_up_proj", layout="gate_up_t"),
            Stacked("feed_forward.experts.down_proj", layout="down_t"),
        ),
        block="feed_forward",
        router="router",
        shared="shared_expert",
        router_output="scores_logits",
        score="sigmoid",
        call="dense_inputs",
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "intermediate_size": 24,
            "intermediate_size_mlp": 48,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "moe_layers": [1, 2],
            "no_rope_layers": [1, 1, 0],
            "attention_chunk_size": 8,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

"""Zaya of Zyphra."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="zaya",
        title="Zaya 1 (Zyphra/ZAYA1-8B)",
        notes="Top-1 routing over the experts and a last class that skips the block; the router carries a state from layer to "
        "layer. A learned scale and bias act on stream and block output at the residual add, so the plain sum is not the "
        "layer's output. transformers 5.23 resets the router's balancing biases when it loads a checkpoint; expertsmith runs with "
        "the checkpoint's own.",
        expert_prefix=(),
        stacked=(
            Stacked("mlp.gate.router_mlp.out_proj.weight", "router", extra=1),
            Stacked("mlp.gate.balancing_biases", "router", extra=1),
            Stacked("mlp.experts.gate_up_proj"),
            Stacked("mlp.experts.down_proj"),
        ),
        selection_bias=("gate.balancing_biases",),
        unrouted_zero=True,
        residual_exact=False,
        tiny={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 128,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 1,
            "router_hidden_size": 16,
            "max_position_embeddings": 256,
            "initializer_range": 0.4,  # 0.2 leaves the router's choice too even
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
)

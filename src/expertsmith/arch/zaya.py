"""Zaya of Zyphra."""

from expertsmith.arch.attention import zaya_state
from expertsmith.arch.base import FUSED, Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="zaya",
        state=zaya_state,
        title="Zaya 1 (Zyphra/ZAYA1-8B)",
        notes="Top-1 routing over the experts and a last class that skips the block; the router carries a state from layer to "
        "layer. A learned scale and bias act on stream and block output at the residual add, so the plain sum is not the "
        "layer's output. transformers 5.23 resets the router's balancing biases when it loads a checkpoint; expertsmith runs with "
        "the checkpoint's own.",
        expert_prefix=(),
        stacked=(
            Stacked("mlp.gate.router_mlp.out_proj.weight", "router", extra=1),
            Stacked("mlp.gate.balancing_biases", "router", extra=1),
            *FUSED,
        ),
        selection_bias=("gate.balancing_biases",),
        unrouted_zero=True,
        residual_exact=False,
    ),
)

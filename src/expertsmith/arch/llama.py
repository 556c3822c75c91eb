"""Llama 4 of Meta (language model)."""

from expertsmith.arch.base import Architecture, Stacked

FAMILIES = (
    Architecture(
        model_type="llama4_text",
        title="Llama 4 (meta-llama/Llama-4-Scout-17B-16E)",
        width_sizes="more",
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
    ),
)

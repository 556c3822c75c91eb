"""A.X-K of SK Telecom."""

from dataclasses import replace

from expertsmith.arch.kinds import DEEPSEEK

FAMILIES = (
    replace(
        DEEPSEEK,
        model_type="axk1",
        title="A.X-K1 (skt/A.X-K1)",
        notes="A norm inside the block acts on the sum of routed and shared output; checkpoints keep it on the decoder layer.",
        group_default=(8, 4),
        post_norm="mlp.post_mlp_layernorm",
    ),
    replace(
        DEEPSEEK,
        model_type="axk2",
        title="A.X-K2 (skt/A.X-K2)",
        notes="n_group may be null (no groups). Experts outside the chosen groups compete with the score 0 instead of -inf, so "
        "they can still be selected if selection biases are negative.",
    ),
)

"""Beam of Reflection."""

from dataclasses import replace

from expertsmith.arch.kinds import SIGMOID

FAMILIES = (
    replace(
        SIGMOID,
        model_type="beam",
        title="Beam (reflection/Beam-1.0-501B-A23B)",
        notes="The residual add is depth-scaled: with n = 2 * layer + 3 the stream is multiplied by sqrt((n - 1) / n) and the "
        "block's normed output by 1 / sqrt(n), so the plain sum is not the layer's output.",
        group_key="n_group",
        top_group_key="topk_group",
        group_default=(8, 4),
        group_minimum=2,
        norm="pre_feedforward_layernorm",
        block_scale="routed_scaling_factor",
        post_norm="post_feedforward_layernorm",
        residual_exact=False,
    ),
)

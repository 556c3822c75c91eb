"""Zhipu's GLM families with routed experts."""

from dataclasses import replace

from expertsmith.arch.attention import kda_state
from expertsmith.arch.kinds import COMPOSITE_NOTE, DEEPSEEK, WHOLE_ONLY

FAMILIES = (
    replace(
        DEEPSEEK,
        model_type="glm4_moe",
        title="GLM-4.5 / 4.6 / 4.7 (GLM-4.5-Air)",
    ),
    replace(
        DEEPSEEK,
        model_type="glm4_moe_lite",
        title="GLM-4.7-Flash (GLM-4.7-Flash)",
    ),
    replace(
        DEEPSEEK,
        model_type="glm_moe_dsa",
        title="GLM-5 (GLM-5)",
        notes="A decoder layer also returns the sparse-attention indices, which later layers may reuse.",
    ),
    replace(
        DEEPSEEK,
        model_type="glm4v_moe_text",
        title="GLM-4.5V (zai-org/GLM-4.5V)",
        notes=COMPOSITE_NOTE,
        composite="glm4v_moe",
        uneven=WHOLE_ONLY,
    ),
    replace(
        DEEPSEEK,
        model_type="glm5_next_text",
        state=kda_state,
        title="GLM-5-Next (zai-org/GLM-5-Next)",
        notes="The layer carries several residual streams (hyper-connections) that add the block's output with learned weights; the norm's "
        f"input is used as the residual stream. {COMPOSITE_NOTE}",
        composite="glm5_next",
        residual_exact=False,
        uneven=WHOLE_ONLY,
    ),
)

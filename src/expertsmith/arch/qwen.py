"""The Qwen families with routed experts."""

from dataclasses import replace

from expertsmith.arch.attention import delta_state
from expertsmith.arch.base import Architecture, Stacked
from expertsmith.arch.kinds import COMPOSITE_NOTE, QWEN3, WHOLE_ONLY

SHARED_NOTE = "The shared expert has its own sigmoid gate."

QWEN2 = Architecture(model_type="qwen2_moe", title="Qwen2-MoE (Qwen1.5-MoE-A2.7B)", notes=SHARED_NOTE, shared="shared_expert")

FAMILIES = (
    QWEN2,
    replace(
        QWEN3,
        model_type="qwen3_moe",
        title="Qwen3-MoE (Qwen3-30B-A3B)",
        notes="transformers 5.23 writes num_experts to config.json as num_local_experts.",
    ),
    replace(QWEN2, model_type="qwen3_next", state=delta_state, title="Qwen3-Next (Qwen3-Next-80B-A3B-Instruct)"),
    replace(QWEN2, model_type="qwen3_5_moe_text", state=delta_state, title="Qwen3.5-MoE, text part (Qwen3.5-35B-A3B)"),
    replace(
        QWEN2,
        model_type="qwen4_exp_text",
        cache_unknown="its layers keep states for n-gram embeddings, too",
        title="Qwen4-Exp, text part (Qwen4-Exp)",
        notes="The layer carries several residual streams (hyper-connections) that add the block's output with learned "
        "weights; the block's input is used as the residual stream. " + SHARED_NOTE,
        residual="block_input",
        norm=None,
        residual_exact=False,
    ),
    replace(
        QWEN3,
        model_type="qwen3_vl_moe_text",
        title="Qwen3-VL-MoE (Qwen3-VL-30B-A3B-Instruct)",
        notes=COMPOSITE_NOTE + " Experts are stored stacked and transposed: input axis before output axis.",
        composite="qwen3_vl_moe",
        expert_prefix=(),
        stacked=(
            Stacked("mlp.gate.weight", "router"),
            Stacked("mlp.experts.gate_up_proj", layout="gate_up_t"),
            Stacked("mlp.experts.down_proj", layout="down_t"),
        ),
        transposed_by_shape=True,
        uneven=WHOLE_ONLY,
    ),
    replace(
        QWEN3,
        model_type="qwen3_omni_moe_text",
        title="Qwen3-Omni-MoE (Qwen3-Omni-30B-A3B-Instruct)",
        notes="The thinker runs inside its published class, on text; the talker, which has experts of its own, and all tensors of vision and sound "
        "and processor files are copied as they are.",
        composite="qwen3_omni_moe",
        text_prefix="thinker.",
        uneven=WHOLE_ONLY,
    ),
)

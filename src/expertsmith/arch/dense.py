"""Dense families that `convert` turns into Mixtures of Experts, and the stock architectures that hold the result.

A family's attention, norms and embeddings have the same tensor names in its targets, so only the MLPs are rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal["mixtral", "granite", "qwen"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A stock MoE architecture with bias-free experts.

    The keys are those of the number of experts, the width of an expert, and the width of the always-on part (None: the family has none).
    """

    model_type: str
    architecture: str
    layout: Layout  # of tensor names, see `conversion.export`
    experts_key: str
    width_key: str
    shared_key: str | None = None
    shared_always: bool = False  # the always-on part cannot be left out
    shared_gate: bool = False  # it is multiplied by sigmoid(w x)
    renormalise_key: str | None = None  # config flag for renormalised routing weights; None: always renormalised
    selects_on: Literal["probabilities", "logits"] = "probabilities"  # input of the router's top_k
    head_key: str | None = "head_dim"  # None: heads are hidden_size / num_attention_heads wide
    scale_key: str | None = None  # config key of the factor on attention logits, which is 1 / sqrt(head width) elsewhere
    constants: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # values for keys that the source lacks, if the target's default differs
    drops: tuple[str, ...] = ()  # keys of the source's config that have no meaning here


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense family. `targets`: the first is for conversions without an always-on part, and with it if possible; else the second."""

    model_type: str
    title: str
    targets: tuple[str, ...]
    refusal: Callable[[Mapping[str, Any], str], str | None] = lambda config, target: None  # (config, target) → why not, or None


DROPS = ("_name_or_path", "auto_map", "pretraining_tp", "mlp_bias", "transformers_version")

TARGETS = {
    target.model_type: target
    for target in (
        Target(
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            layout="mixtral",
            experts_key="num_local_experts",
            width_key="intermediate_size",
            defaults={"sliding_window": None},
            drops=("attention_bias",),
        ),
        Target(
            model_type="granitemoeshared",
            architecture="GraniteMoeSharedForCausalLM",
            layout="granite",
            experts_key="num_local_experts",
            width_key="intermediate_size",
            shared_key="shared_intermediate_size",
            selects_on="logits",
            scale_key="attention_multiplier",
            constants={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0},
            drops=("sliding_window",),
        ),
        Target(
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            layout="qwen",
            experts_key="num_experts",
            width_key="moe_intermediate_size",
            shared_key="shared_expert_intermediate_size",
            shared_always=True,
            shared_gate=True,
            renormalise_key="norm_topk_prob",
            head_key=None,
            constants={"decoder_sparse_step": 1, "mlp_only_layers": [], "qkv_bias": True},
        ),
        Target(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            layout="qwen",
            experts_key="num_experts",
            width_key="moe_intermediate_size",
            renormalise_key="norm_topk_prob",
            constants={"decoder_sparse_step": 1, "mlp_only_layers": []},
            drops=("layer_types", "max_window_layers"),
        ),
    )
}


def _llama(config: Mapping[str, Any], target: str) -> str | None:
    if config.get("mlp_bias"):
        return "its MLPs have biases (mlp_bias), and no target architecture has experts with biases"
    if config.get("attention_bias") and target == "mixtral":
        return "its attention has biases (attention_bias), which Mixtral has not: use --target granitemoeshared"
    return None


def _mistral(config: Mapping[str, Any], target: str) -> str | None:
    if target == "granitemoeshared" and config.get("sliding_window"):
        return (
            f"its attention slides over {config['sliding_window']} tokens, which GraniteMoeShared has not: use --target mixtral"
        )
    return None


def _qwen3(config: Mapping[str, Any], target: str) -> str | None:
    if config.get("use_sliding_window"):
        return "some of its layers have sliding-window attention, which Qwen3-MoE has for all layers or none"
    return None


DENSE = {
    family.model_type: family
    for family in (
        Dense(
            model_type="llama",
            title="Llama (Llama-3.2-1B, SmolLM2-135M)",
            targets=("mixtral", "granitemoeshared"),
            refusal=_llama,
        ),
        Dense(
            model_type="mistral",
            title="Mistral (Mistral-7B-v0.3)",
            targets=("mixtral", "granitemoeshared"),
            refusal=_mistral,
        ),
        Dense(
            model_type="qwen2",
            title="Qwen2 and Qwen2.5 (Qwen2.5-0.5B)",
            targets=("qwen2_moe",),
        ),
        Dense(
            model_type="qwen3",
            title="Qwen3 dense (Qwen3-0.6B)",
            targets=("qwen3_moe",),
            refusal=_qwen3,
        ),
    )
}

BLOCKED = {  # dense families that cannot be converted, and why
    "phi": "attention and MLP run in parallel on one LayerNorm with biases, and its two-matrix GELU MLP has biases of its own; no stock MoE "
    "architecture has such a block, and a checkpoint that only custom code loads is what `convert` is there to avoid",
    "phi3": "gate and up projections are one fused tensor and query, key and value another; no stock MoE architecture reads that layout",
    "gemma": "its norms scale by 1 + weight and its embeddings by sqrt(hidden); no stock MoE architecture does",
    "gemma2": "it has norms after attention and MLP and soft-capped logits; no stock MoE architecture does",
    "gemma3_text": "it has norms after attention and MLP; no stock MoE architecture does",
    "gpt2": "its MLP has two matrices with biases and GELU; no stock MoE architecture has such experts",
    "gpt_neox": "attention and MLP run in parallel, with biases and GELU; no stock MoE architecture has such a block",
    "opt": "its MLP has two matrices with biases and ReLU; no stock MoE architecture has such experts",
}

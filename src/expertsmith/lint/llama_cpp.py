"""What llama.cpp and its converter support, from the source of llama.cpp 0c1e57098 (llama-cpp-python 0.3.36)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from expertsmith.lint.base import (
    COMPUTED,
    EVEN,
    FLOATS,
    LAYOUT,
    MORE,
    POWERS,
    ROUTER_KEYS,
    Rule,
    Subject,
    constants,
    disagree,
    lacks,
    make_rule,
    missing,
    nameless,
    names,
    narrowed,
    padded,
    pruned_attention,
    speculative,
    thresholds,
    too_few,
    uneven,
    unknown_method,
)

VERSION = "llama.cpp 0c1e57098 (llama-cpp-python 0.3.36)"
# architectures of the families in expertsmith.arch that the converter's table does not have
UNREGISTERED = names(
    """AriaTextForCausalLM AriaForConditionalGeneration AXK1ForCausalLM AXK2ForCausalLM BailingHybridForCausalLM
    BeamForCausalLM FlexOlmoForCausalLM FlintForCausalLM Inkling2ForCausalLM
    Inkling2ForConditionalGeneration InklingForCausalLM InklingForConditionalGeneration
    Kolibri1ForCausalLM LongcatFlashForCausalLM MiniMaxForCausalLM MiniMaxM3VLForCausalLM
    PhimoeForCausalLM ZayaForCausalLM"""
)
# config keys that name the number of experts, in the order in which the converter looks
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")

METHODS = names("bitnet fp8 gptq compressed-tensors modelopt mxfp4")
NVFP4 = "nvfp4-pack-quantized"
STRATEGIES = {  # compressed-tensors format → strategies that the converter supports
    "float-quantized": ("channel", "block"), "int-quantized": ("channel", "block"), "naive-quantized": ("channel", "block"),
    "pack-quantized": ("group",),
}  # fmt: skip

# families whose multi-token prediction the converter writes
MTP = names(
    """bailing_moe_v2 cohere2_moe deepseek_v32 dots3_note exaone_moe glm4_moe glm4_moe_lite glm_moe_dsa mimo_v2_flash qwen3_5_moe_text
    qwen3_next solar_open"""
)

rule = partial(make_rule, VERSION)


def _unconvertible(s: Subject) -> str | None:
    # the converter prefers the architectures of the text part
    named = s.config.get("architectures")
    return missing("llama.cpp", UNREGISTERED)(replace(s, architectures=tuple(named)) if named else s)


def _groups(s: Subject) -> tuple[int, int | None]:
    """(n_group, topk_group) of config.json. The converter writes them unchanged, in force or not."""
    groups, top = s.config.get("n_group"), s.config.get("topk_group")
    return groups if isinstance(groups, int) else 0, top if isinstance(top, int) else None


def _limit(s: Subject) -> str | None:
    return f"{s.num_experts} experts are more than LLAMA_MAX_EXPERTS, 1024" if s.num_experts > 1024 else None


def _group_count(s: Subject) -> str | None:
    groups, _ = _groups(s)
    return (
        f"{s.num_experts} experts in {groups} expert_groups: there must be fewer groups than experts"
        if groups >= s.num_experts
        else None
    )


def _indivisible(s: Subject) -> str | None:
    groups, _ = _groups(s)
    return (
        f"{s.num_experts} experts do not divide into {groups} expert_groups" if groups > 1 and s.num_experts % groups else None
    )


def _top_groups(s: Subject) -> str | None:
    groups, top = _groups(s)
    if groups > 1 and top is not None and not 0 < top < groups:
        return f"each token uses {top} of {groups} expert_groups, but llama.cpp needs fewer than all"
    return None


def _group_score(s: Subject) -> str | None:
    groups, _ = _groups(s)
    if s.model_type == "deepseek_v2" and groups > 1:
        return "llama.cpp scores an expert_group by its best two experts, but this model by its best one (or not at all)"
    return None


def _group_key(s: Subject) -> str | None:
    if s.groups > 1 and s.group_key not in (None, "n_group"):
        return f"the converter does not read {s.group_key}, so tokens may use experts of any group"
    return None


def _dense_layers(s: Subject) -> str | None:
    if s.model_type not in ("qwen2_moe", "qwen3_moe"):
        return None
    step = s.config.get("decoder_sparse_step", 1)
    layers = range(int(s.config.get("num_hidden_layers", 0)))
    dense = [i for i in layers if i in (s.config.get("mlp_only_layers") or ()) or (i + 1) % step]
    return f"{len(dense)} decoder layers have no experts (the first: {dense[0]})" if dense else None


def _olmoe_keys(s: Subject) -> str | None:
    heads, keys = s.config.get("num_attention_heads"), s.config.get("num_key_value_heads")
    if s.model_type == "olmoe" and keys not in (None, heads):
        return f"{heads} attention heads share {keys} of keys and values"
    return None


def _topk(s: Subject) -> str | None:
    if s.num_experts not in POWERS | {288, 576}:
        return f"on CUDA, {s.num_experts} experts have no fused top-k kernel (powers of two up to 512, 288 and 576 have)"
    return None


def _eight(s: Subject) -> str | None:
    return (
        "llama-quantize gives attention tensors of 8-expert models more bits (Mixtral's rule)" if s.num_experts == 8 else None
    )


def _undecoded(s: Subject) -> str | None:
    """The reason why the converter does not decode the weights, or None."""
    held, groups = s.quantisation, s.quantisation.get("config_groups")
    if s.method == "gptq" and held.get("bits") == 3:
        return "the converter does not decode GPTQ with 3 bits"
    if s.method != "compressed-tensors" or not isinstance(groups, dict) or not groups:
        return None
    kinds = [group.get("format") for group in groups.values()]
    if held.get("format") == NVFP4 or (held.get("format") == "mixed-precision" and set(kinds) == {NVFP4}):
        return None
    if len(groups) > 1:
        return f"the converter decodes compressed-tensors with one config group, but this checkpoint has {len(groups)}"
    weights = next(iter(groups.values())).get("weights") or {}
    strategies = STRATEGIES.get(str(held.get("format")))
    if strategies is None or weights.get("strategy") not in strategies:
        return (
            f"the converter does not decode compressed-tensors {held.get('format')} with strategy {weights.get('strategy')!r}"
        )
    return None


def _mixed(s: Subject) -> str | None:
    groups = s.quantisation.get("config_groups")
    kinds = [g.get("format") for g in groups.values()] if isinstance(groups, dict) else []
    is_nvfp4 = NVFP4 in (s.quantisation.get("format"), *kinds) or str(s.quantisation.get("quant_algo")).endswith("NVFP4")
    return s.mixed if s.mixed and is_nvfp4 else None


RULES: tuple[Rule, ...] = (
    rule(
        "llama.cpp-quant-method",
        "The converter decodes or repacks only bitnet, fp8, gptq, compressed-tensors, modelopt and (for gpt-oss) mxfp4.",
        "conversion/base.py, ModelBase.dequant_model (Quant method is not yet supported); conversion/gpt_oss.py, repack_mxfp4",
        "error",
        unknown_method("llama.cpp's converter", METHODS),
        FLOATS,
    ),
    rule(
        "llama.cpp-quant-format",
        "Of compressed-tensors it decodes one config group: float, int and naive-quantized by channel or block, pack-quantized by group, and "
        "repacks NVFP4; of GPTQ 2, 4 and 8 bits.",
        "conversion/base.py, ModelBase.dequant_model",
        "error",
        _undecoded,
        FLOATS,
    ),
    rule(
        "llama.cpp-mixed",
        "NVFP4 experts of a layer are stacked as found, so an expert in another precision is missing from the stack.",
        "conversion/base.py, ModelBase._generate_nvfp4_tensors and _flush_nvfp4_experts",
        "error",
        _mixed,
        f"quantise all experts of a layer the same way, or {FLOATS}",
    ),
    rule(
        "llama.cpp-nameless",
        "The converter selects the model by the architectures entry of config.json.",
        "conversion/base.py, get_model_architecture",
        "error",
        nameless,
        "copy architectures from the original model's config.json",
    ),
    rule(
        "llama.cpp-registry",
        "The converter supports only the architectures in its table.",
        "conversion/__init__.py, TEXT_MODEL_MAP and get_model_class",
        "error",
        _unconvertible,
        "use another engine (for Phi-3.5-MoE, use the original's name PhiMoEForCausalLM)",
    ),
    rule(
        "llama.cpp-max-experts",
        "A model has at most 1024 experts per layer.",
        "src/llama-hparams.h, LLAMA_MAX_EXPERTS; src/llama-model.cpp, load_hparams",
        "error",
        _limit,
        "keep 1024 experts or fewer",
    ),
    rule(
        "llama.cpp-attention",
        "All layers of these architectures have the same key length and value length, and no value masks per token.",
        "src/llama-model.cpp, load_tensors (LLM_ARCH_LLAMA, LLM_ARCH_QWEN2MOE, LLM_ARCH_QWEN3MOE)",
        "error",
        pruned_attention,
        "convert with --attention none",
    ),
    rule(
        "llama.cpp-constants",
        "The router's classes and the experts with matrices are one number, n_expert.",
        "src/llama-model.cpp, load_tensors (LLM_ARCH_LLAMA, LLM_ARCH_QWEN2MOE, LLM_ARCH_QWEN3MOE)",
        "error",
        constants,
        "use a method that removes experts (not mone), or run it with expertsmith.load",
    ),
    rule(
        "llama.cpp-k-quants",
        "K-quantised types need rows of a multiple of 256 numbers; llama-quantize takes larger types of 32 for others.",
        "src/llama-quant.cpp, llama_tensor_get_type",
        "info",
        lambda s: f"rows of the experts' down projections have {s.width} numbers" if s.width % 256 else None,
        "plan with -O multiple=256 if the result is to be K-quantised",
    ),
    rule(
        "llama.cpp-neurons",
        "All experts have one width, the one in config.json.",
        "src/llama-model.cpp, load_tensors (LLM_ARCH_LLAMA, LLM_ARCH_QWEN2MOE, LLM_ARCH_QWEN3MOE)",
        "error",
        narrowed,
        "plan with -O width=model, or run it with expertsmith.load",
    ),
    rule(
        "llama.cpp-uneven",
        "A model has one number of experts, n_expert, and expects it in every layer's tensors.",
        "src/llama-hparams.h (n_expert); conversion/base.py, TextModel.set_gguf_parameters",
        "error",
        uneven,
        EVEN,
    ),
    rule(
        "llama.cpp-padded",
        "Dead experts are stored and routed like others; a bias added before the selection keeps them from being selected.",
        "src/llama-graph.cpp, build_moe_ffn",
        "info",
        padded,
        "compare outputs first: fused kernels for biased routing were not tried with -inf",
    ),
    rule(
        "llama.cpp-skip",
        "Every token runs all top_k experts of config.json.",
        "src/llama-graph.cpp, build_moe_ffn (n_expert_used)",
        "info",
        thresholds,
        COMPUTED,
    ),
    rule(
        "llama.cpp-top-k",
        "n_expert_used is at most n_expert.",
        "src/llama-model.cpp, load_hparams (GGML_ASSERT(n_expert_used_max <= hparams.n_expert))",
        "error",
        too_few,
        MORE,
    ),
    rule(
        "llama.cpp-group-count",
        "There must be fewer groups than experts, even with one group.",
        "src/llama-model.cpp, load_hparams (GGML_ASSERT(hparams.n_expert_groups < hparams.n_expert))",
        "error",
        _group_count,
        MORE,
    ),
    rule(
        "llama.cpp-groups",
        "The number of experts is divisible by the number of groups.",
        "src/llama-model.cpp, load_hparams (GGML_ASSERT(hparams.n_expert % hparams.n_expert_groups == 0))",
        "error",
        _indivisible,
        LAYOUT,
    ),
    rule(
        "llama.cpp-top-groups",
        "With more than one group, a token uses at least one group but not all.",
        "src/llama-model.cpp, load_hparams (GGML_ASSERT(hparams.n_group_used < hparams.n_expert_groups))",
        "error",
        _top_groups,
        "if a token may use every group, set n_group and topk_group to 1",
    ),
    rule(
        "llama.cpp-group-score",
        "Groups are always scored by the sum of their two best experts.",
        "src/llama-graph.cpp, build_moe_ffn (ggml_argsort_top_k(ctx0, selection_groups, 2)); conversion/base.py",
        "warning",
        _group_score,
        "compare outputs first",
    ),
    rule(
        "llama.cpp-group-key",
        "The converter reads the number of groups from n_group only.",
        "conversion/base.py, TextModel.set_gguf_parameters",
        "warning",
        _group_key,
        "compare outputs first",
    ),
    rule(
        "llama.cpp-scores",
        "Without scoring_func in config.json, DeepSeek V3's scores become softmax and V3.2 does not load. transformers does "
        "not write this key.",
        "conversion/base.py, TextModel.set_gguf_parameters; src/models/deepseek2.cpp and deepseek32.cpp (expert_gating_func)",
        "error",
        lacks("deepseek_v3 deepseek_v32", "scoring_func"),
        ROUTER_KEYS,
    ),
    rule(
        "llama.cpp-keys",
        "The number of experts is the first key found of num_local_experts, num_experts and n_routed_experts.",
        "conversion/base.py, TextModel.set_gguf_parameters",
        "warning",
        disagree(EXPERT_KEYS),
        "make the keys agree, or delete the stale one",
    ),
    rule(
        "llama.cpp-dense-layers",
        "Every decoder layer of Qwen2-MoE and Qwen3-MoE has experts; the converter cannot map the tensors of a dense one.",
        "gguf-py/gguf/constants.py, MODEL_TENSORS (QWEN2MOE, QWEN3MOE: no FFN_DOWN); src/models/qwen2moe.cpp and qwen3moe.cpp, "
        "load_arch_tensors",
        "error",
        _dense_layers,
        "use another engine",
    ),
    rule(
        "llama.cpp-olmoe-keys",
        "OLMoE's key norm has the hidden size, so every attention head needs its own keys.",
        "src/models/olmoe.cpp, load_arch_tensors (attn_k_norm {n_embd})",
        "error",
        _olmoe_keys,
        "use another engine",
    ),
    rule(
        "llama.cpp-topk-kernel",
        "Other numbers of experts use unfused operations.",
        "ggml/src/ggml-cuda/topk-moe.cu, ggml_cuda_should_use_topk_moe",
        "info",
        _topk,
    ),
    rule(
        "llama.cpp-eight",
        "The quantization mix has a rule for exactly 8 experts, so files of the same type are not comparable across expert counts.",
        "src/llama-quant.cpp (n_expert == 8)",
        "info",
        _eight,
    ),
    rule(
        "llama.cpp-mtp",
        "Multi-token prediction of these families is converted as further blocks; that of other families is dropped.",
        "conversion/*.py (supports_mtp_export, add_nextn_predict_layers); conversion/deepseek.py, skip_mtp",
        "info",
        speculative("llama.cpp's converter", MTP, "--spec-type draft-mtp"),
    ),
)

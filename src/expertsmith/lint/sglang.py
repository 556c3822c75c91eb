"""What SGLang supports, from the source of sglang 0.5.23."""

from __future__ import annotations

from functools import partial

from expertsmith.lint.base import (
    COMPUTED,
    EVEN,
    FEWER_RANKS,
    FLOATS,
    LAYOUT,
    MINIMAX_KEYS,
    MORE,
    OWN_TOPK,
    POWERS,
    Rule,
    Subject,
    constants,
    indivisible,
    indivisible_width,
    lacks,
    make_rule,
    missing,
    mixed_experts,
    nameless,
    names,
    narrowed,
    padded,
    pruned_attention,
    small_tp,
    speculative,
    thresholds,
    too_few,
    too_many_groups,
    uneven,
    uneven_ranks,
    unfit_blocks,
    unknown_method,
    without_mtp,
)

VERSION = "sglang 0.5.23"
# architectures of the families in expertsmith.arch that the registry does not have
UNREGISTERED = names(
    """AriaTextForCausalLM AriaForConditionalGeneration AXK1ForCausalLM AXK2ForCausalLM BailingHybridForCausalLM
    Dots1ForCausalLM FlexOlmoForCausalLM FlintForCausalLM Inkling2ForCausalLM
    Inkling2ForConditionalGeneration InklingForCausalLM JambaForCausalLM Kolibri1ForCausalLM
    MiniMaxForCausalLM MiniMaxM3VLForCausalLM PhimoeForCausalLM Qwen4ExpForCausalLM SolarOpenForCausalLM"""
)
# of these, what SGLang's transformers backend refuses: is_backend_compatible() is False in transformers 5.23.0
NO_BACKEND = names(
    """BailingHybridForCausalLM Inkling2ForCausalLM Inkling2ForConditionalGeneration InklingForCausalLM
    JambaForCausalLM Qwen4ExpForCausalLM"""
)
# families whose MoE block refuses a tensor-parallel size above the number of experts
TENSOR_PARALLEL = names(
    """afmoe cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 exaone_moe glm4_moe glm4_moe_lite
    glm_moe_dsa hunyuan_v1_moe laguna lfm2_moe longcat_flash mimo_v2_flash minimax_m2 minimax_m3_vl_text
    qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next zaya"""
)

METHODS = names(
    """fp8 mxfp8 minimax_m3_nvfp4 blockwise_int8 modelopt modelopt_fp8 modelopt_fp4 modelopt_mixed w8a8_int8 w8a8_fp8 awq awq_marlin bitsandbytes
    gguf gptq gptq_marlin moe_wna16 compressed-tensors w4afp8 petit_nvfp4 quark quark_mxfp4 auto-round auto-round-int8 modelslim
    quark_int4fp8_moe humming mxfp_w4a8 mxfp4"""
)

# families whose multi-token prediction is a draft model
MTP = names(
    """bailing_hybrid bailing_moe bailing_moe_v2 deepseek_v3 deepseek_v32 dots3_note ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite glm5_next
    glm_moe_dsa longcat_flash mimo_v2_flash nemotron_h qwen3_5_moe_text qwen3_moe qwen3_next step3p5"""
)
MTP_OPTION = (
    "--speculative-algorithm EAGLE --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2"
)

rule = partial(make_rule, VERSION)


def _keys(s: Subject) -> str | None:
    # V2's config class has a topk_method
    wanted = ("scoring_func",) if s.model_type == "deepseek_v2" else ("topk_method", "scoring_func")
    return lacks("deepseek_v2 deepseek_v3 deepseek_v32 glm_moe_dsa mimo_v2_flash", *wanted)(s)


def _topk(s: Subject) -> str | None:
    if s.group_key is None and s.score == "softmax" and s.model_type not in OWN_TOPK and s.num_experts not in POWERS:
        return f"{s.num_experts} experts have no single-pass top-k kernel (powers of two up to 512 have)"
    return None


def _grouped(s: Subject) -> str | None:
    size = s.num_experts // s.groups
    fits = s.num_experts in POWERS and s.top_k <= 8 and size <= 32 and size * s.top_groups <= 128
    if s.groups > 1 and s.group_minimum == 2 and not fits:
        return f"{s.num_experts} experts in {s.groups} expert_groups are outside flashinfer's fused_topk_deepseek"
    return None


def _shared(s: Subject) -> str | None:
    if s.model_type == "deepseek_v3" and s.config.get("n_shared_experts") == 1 and s.num_experts not in (256, 384):
        return f"with {s.num_experts} experts the shared expert is not fused into the routed ones"
    return None


def _gptq(s: Subject) -> str | None:
    bits, sym = s.quantisation.get("bits"), s.quantisation.get("sym")
    if s.method == "gptq" and (bits, sym) not in ((4, True), (8, True)):
        return f"GPTQ with {bits} bits, {'symmetric' if sym else 'asymmetric'}, has no Marlin kernel, the only kernel for experts on CUDA"
    return None


RULES: tuple[Rule, ...] = (
    rule(
        "sglang-quant-method",
        "Other values of quant_method are refused.",
        "srt/configs/model_config.py, ModelConfig._verify_quantization; srt/layers/quantization/__init__.py, BASE_QUANTIZATION_METHODS",
        "error",
        unknown_method("sglang", METHODS),
        f"use another engine, or {FLOATS}",
    ),
    rule(
        "sglang-gptq",
        "GPTQ experts run in Marlin only, which supports symmetric codes of 4 or 8 bits.",
        "srt/layers/quantization/gptq/gptq.py, GPTQConfig.get_quant_method (does not support MoE) and GPTQMarlinConfig.TYPE_MAP",
        "warning",
        _gptq,
        f"use another engine, or {FLOATS}",
    ),
    rule(
        "sglang-mixed",
        "The experts of a layer are one module with the scheme of expert 0.",
        "srt/layers/quantization/compressed_tensors/compressed_tensors.py, get_moe_scheme; srt/layers/quantization/utils.py, "
        "get_dynamic_override",
        "error",
        mixed_experts,
        f"quantise all experts of a layer the same way, or {FLOATS}",
    ),
    rule(
        "sglang-fp8-blocks",
        "On each tensor-parallel rank, an expert's neurons must be divisible into the blocks.",
        "srt/layers/quantization/fp8.py, Fp8MoEMethod.create_fp8_moe_weight_ (weight quantization block_n, block_k)",
        "error",
        unfit_blocks,
        FEWER_RANKS,
    ),
    rule(
        "sglang-nameless",
        "The model is selected by the architectures entry of config.json.",
        "srt/models/registry.py, resolve_model_cls",
        "error",
        nameless,
        "copy architectures from the original model's config.json",
    ),
    rule(
        "sglang-registry",
        "An architecture outside the registry runs on SGLang's transformers backend.",
        "srt/models (EntryClass); srt/model_loader/utils.py, resolve_transformers_arch",
        "warning",
        missing("sglang", UNREGISTERED - NO_BACKEND),
        "test it first: SGLang falls back to its transformers backend",
    ),
    rule(
        "sglang-no-backend",
        "The transformers backend refuses classes whose is_backend_compatible() is False.",
        "srt/model_loader/utils.py, resolve_transformers_arch; transformers 5.23.0 for the classes",
        "error",
        missing("sglang", NO_BACKEND),
        "use another engine",
    ),
    rule(
        "sglang-attention",
        "Queries, keys and values have the same head_dim, from config.json.",
        "srt/models/mixtral.py, MixtralAttention.__init__ (and the other families' attention)",
        "error",
        pruned_attention,
        "convert with --attention none",
    ),
    rule(
        "sglang-constants",
        "The router's classes and the experts with matrices are one number, the one in config.json.",
        "srt/models/mixtral.py, MixtralMoE.__init__ (and the other families' blocks)",
        "error",
        constants,
        "use a method that removes experts (not mone), or run it with expertsmith.load",
    ),
    rule(
        "sglang-width",
        "Every tensor-parallel rank holds the same number of each expert's neurons.",
        "srt/layers/moe/fused_moe_triton/layer.py, FusedMoE.__init__ (assert intermediate_size % moe_tp_size == 0)",
        "error",
        indivisible_width,
        "use a number of ranks that divides the width, or expert parallelism",
    ),
    rule(
        "sglang-neurons",
        "All experts have one width, the one in config.json.",
        "srt/models/mixtral.py, MixtralMoE.__init__ (and the other families' blocks)",
        "error",
        narrowed,
        "plan with -O width=model, or run it with expertsmith.load",
    ),
    rule(
        "sglang-uneven",
        "Every block is built with the number of experts in config.json.",
        "srt/models/qwen3_moe.py, Qwen3MoeSparseMoeBlock.__init__, and deepseek_v2.py, DeepseekV2MoE.__init__ (and the other "
        "families' blocks)",
        "error",
        uneven,
        EVEN,
    ),
    rule(
        "sglang-padded",
        "Dead experts are stored and routed like others; a bias added before the selection keeps them from being selected.",
        "srt/layers/moe/topk.py, biased_topk_impl",
        "info",
        padded,
        "compare outputs first: fused kernels for biased routing were not tried with -inf",
    ),
    rule(
        "sglang-skip",
        "Every token runs all top_k experts of config.json.",
        "srt/models/qwen3_moe.py, Qwen3MoeSparseMoeBlock.__init__ (num_experts_per_tok)",
        "info",
        thresholds,
        COMPUTED,
    ),
    rule(
        "sglang-top-k",
        "The router takes the top_k of all expert scores, so there must be at least top_k experts.",
        "srt/layers/moe/topk.py, biased_topk_impl (torch.topk); kernels/jit/csrc/moe/moe_topk_sigmoid.cuh (topk <= "
        "num_experts)",
        "error",
        too_few,
        MORE,
    ),
    rule(
        "sglang-groups",
        "The grouped router asserts that the experts divide into the groups.",
        "kernels/ops/moe/moe_fused_gate.py, moe_fused_gate",
        "error",
        indivisible,
        LAYOUT,
    ),
    rule(
        "sglang-top-groups",
        "The grouped router asserts 1 <= topk_group <= num_expert_group.",
        "kernels/ops/moe/moe_fused_gate.py, moe_fused_gate",
        "error",
        too_many_groups,
        "set topk_group to at most n_group",
    ),
    rule(
        "sglang-router-keys",
        "The blocks of the DeepSeek family and of MiMo-V2 read topk_method and scoring_func without a default; "
        "transformers does not write these keys.",
        "srt/models/deepseek_v2.py, MoEGate.__init__ and DeepseekV2MoE.__init__; srt/models/mimo_v2.py",
        "error",
        _keys,
        "copy topk_method and scoring_func from the original model's config.json",
    ),
    rule(
        "sglang-minimax-keys",
        "MiniMax-M2's block reads scoring_func without a default and has a selection bias only with use_routing_bias; "
        "transformers does not write these keys.",
        "srt/models/minimax_m2.py, MiniMaxM2MoE.__init__",
        "error",
        lacks("minimax_m2", "scoring_func", "use_routing_bias"),
        MINIMAX_KEYS,
    ),
    rule(
        "sglang-expert-parallel",
        "Every expert-parallel rank has the same number of experts.",
        "srt/layers/moe/fused_moe_triton/layer.py, FusedMoE.__init__ (assert _num_global_routed % storage_ep_size == 0)",
        "error",
        uneven_ranks,
        "keep a multiple of the expert-parallel size",
    ),
    rule(
        "sglang-tensor-parallel",
        "The block of these families refuses more tensor-parallel ranks than experts.",
        "srt/models/deepseek_v2.py, DeepseekV2MoE.__init__ (and the other families' blocks)",
        "error",
        small_tp(TENSOR_PARALLEL),
        "use fewer tensor-parallel ranks",
    ),
    rule(
        "sglang-topk-kernel",
        "Other numbers of experts use two kernels, softmax and then top-k.",
        "kernels/ops/moe/moe_topk_softmax.py; kernels/jit/csrc/moe/moe_topk_softmax.cuh, topkGatingSoftmaxKernelLauncher",
        "info",
        _topk,
    ),
    rule(
        "sglang-grouped-kernel",
        "flashinfer's grouped kernel supports a power of two of experts, 32 per group, 128 in the selected groups and top_k 8. "
        "Otherwise a Triton kernel runs, which supports any number.",
        "srt/layers/moe/topk.py, biased_grouped_topk_gpu",
        "info",
        _grouped,
    ),
    rule(
        "sglang-shared-fusion",
        "The shared expert is fused into the routed ones for 256 experts (and 384 in one quantization) only.",
        "srt/models/deepseek_v2.py, shared_experts_fusion_disable_reason",
        "info",
        _shared,
    ),
    rule(
        "sglang-mtp",
        "Multi-token prediction of these families is loaded from the same checkpoint as a draft model, with the number of experts in config.json.",
        "srt/configs/model_config.py, ModelConfig._config_draft_model; srt/models/*_nextn.py and *_mtp.py",
        "info",
        speculative("SGLang", MTP, MTP_OPTION),
    ),
    rule(
        "sglang-no-mtp",
        "The number of the draft model's layers is read from config.json.",
        "srt/models/deepseek_nextn.py and others (num_nextn_predict_layers)",
        "info",
        without_mtp,
        "remove --speculative-algorithm, or pass another draft model",
    ),
)

"""What vLLM supports, from the source of vllm 0.32.0."""

from __future__ import annotations

import math
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
    ROUTER_KEYS,
    Rule,
    Subject,
    constants,
    disagree,
    indivisible_width,
    lacks,
    make_rule,
    missing,
    mixed_experts,
    nameless,
    names,
    narrowed,
    out_of_reach,
    padded,
    pruned_attention,
    small_tp,
    sparsemixer,
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

VERSION = "vllm 0.32.0"
MOE = "model_executor/layers/fused_moe"
# architectures of the families in expertsmith.arch that the registry does not have
UNREGISTERED = names(
    """AriaTextForCausalLM AXK2ForCausalLM BailingHybridForCausalLM BeamForCausalLM Dots1ForCausalLM FlintForCausalLM
    Inkling2ForCausalLM Inkling2ForConditionalGeneration Kolibri1ForCausalLM MiniMaxForCausalLM
    MiniMaxM3VLForCausalLM PhimoeForCausalLM SolarOpenForCausalLM ZayaForCausalLM"""
)
# families whose MoE block refuses a tensor-parallel size above the number of experts
TENSOR_PARALLEL = names(
    """cohere2_moe ernie4_5_moe exaone_moe hy_v3 hy_v4 laguna lfm2_moe mimo_v2_flash minimax_m2 minimax_m3_vl_text
    qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp_text"""
)
# config keys that name the number of experts, in the order in which vLLM looks
EXPERT_KEYS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")

FUSED_TOPK = POWERS | {192, 320, 384, 448, 576}
V4_CPU = {64: (6, 8), 128: (6, 8), 256: (6, 8, 9), 384: (6, 8)}
FP32_ROUTER = {(3072, 256), (6144, 128)}
CPU_HEADS = frozenset({32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})

LATENTS = frozenset({320, 512, 576})
# families whose attention runs as MLA, with one latent head
MLA = names("axk1 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear longcat_flash")

METHODS = names(
    """awq auto_awq fp8 fbgemm_fp8 fp_quant modelopt modelopt_fp4 modelopt_mxfp8 modelopt_mixed auto_gptq gptq gptq_marlin awq_marlin humming
    compressed-tensors experts_int8 quark moe_wna16 torchao inc auto-round mxfp4 gpt_oss_mxfp4 deepseek_v4_fp8 mxfp8"""
)

# families whose multi-token prediction is a draft model
MTP = names(
    """bailing_hybrid deepseek_v3 deepseek_v32 dots3_note ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite glm5_next glm_moe_dsa hy_v3 hy_v4
    longcat_flash mimo_v2_flash nemotron_h qwen3_5_moe_text qwen3_next qwen4_exp_text step3p5"""
)
MTP_OPTION = """--speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'"""

rule = partial(make_rule, VERSION)


def _ungrouped(s: Subject) -> str | None:
    if s.groups > 1 and (s.num_experts % s.groups or s.num_experts <= s.groups):
        return f"{s.num_experts} experts in {s.groups} expert_groups: vLLM ignores the groups and routes over all experts"
    return None


def _v2_none(s: Subject) -> str | None:
    absent = [key for key in ("n_group", "topk_group") if s.config.get(key) is None]
    if s.model_type == "deepseek_v2" and absent:
        return f"config.json has no {' and no '.join(absent)}, which its config class sets to None"
    return None


def _v2_greedy(s: Subject) -> str | None:
    groups = s.config.get("n_group")
    if s.model_type == "deepseek_v2" and s.groups == 1 and isinstance(groups, int) and groups > 1:
        return f"without topk_method group_limited_greedy transformers has no groups, but vLLM applies n_group = {groups}"
    return None


def _grouped_kernel(s: Subject) -> str | None:
    if s.groups > 1 and s.group_minimum == 2 and (s.groups > 32 or s.top_k > 32):
        return f"{s.groups} expert_groups and top_k = {s.top_k}: the fused grouped_topk kernel supports at most 32 of each"
    return None


def _small_kernel(s: Subject) -> str | None:
    size = s.num_experts // s.groups
    fits = s.num_experts <= 256 and size <= 32 and size * s.top_groups <= 128 and s.top_k <= 8 and s.top_groups <= 4
    if s.groups > 1 and s.group_minimum == 2 and not fits and s.groups <= 32 and s.top_k <= 32:
        return f"{s.num_experts} experts in {s.groups} expert_groups are outside the small grouped_topk kernel"
    return None


def _topk(s: Subject) -> str | None:
    if s.group_key is None and s.model_type not in OWN_TOPK and s.num_experts not in FUSED_TOPK:
        return f"{s.num_experts} experts have no fused top-k kernel (powers of two up to 512, 192, 320, 384, 448 and 576 have)"
    return None


def _v4(s: Subject) -> str | None:
    if s.model_type == "deepseek_v4" and s.num_experts not in FUSED_TOPK:
        return f"the sqrt(softplus) top-k kernel does not support {s.num_experts} experts"
    return None


def _v4_cpu(s: Subject) -> str | None:
    if s.model_type == "deepseek_v4" and s.top_k not in V4_CPU.get(s.num_experts, ()):
        return f"on a CPU, the sqrt(softplus) top-k kernel does not support {s.num_experts} experts with top_k = {s.top_k}"
    return None


def _fp32_router(s: Subject) -> str | None:
    shape = (s.hidden_size, s.num_experts)
    if s.model_type in ("minimax_m2", "minimax_m3_vl_text") and shape not in FP32_ROUTER:
        return f"hidden size {shape[0]} with {shape[1]} experts has no fp32 router kernel"
    return None


def _align(s: Subject) -> str | None:
    return f"{s.num_experts} experts, but moe_align_block_size supports at most 992" if s.num_experts > 992 else None


def _cpu_sigmoid(s: Subject) -> str | None:
    sigmoid = s.model_type == "laguna" or (s.model_type == "minimax_m2" and s.config.get("scoring_func") == "sigmoid")
    return (
        "on a CPU, vLLM's router asserts softmax scores for ungrouped routing, but this model's are sigmoid"
        if sigmoid
        else None
    )


def _cpu_bias(s: Subject) -> str | None:
    return "on a CPU, vLLM's router ignores the selection bias of this family" if s.model_type == "ernie4_5_moe" else None


def _cpu_heads(s: Subject) -> str | None:
    if s.head_dim and s.head_dim not in CPU_HEADS and s.config.get("kv_lora_rank") is None:
        return f"on a CPU, vLLM's attention kernels do not support head_dim = {s.head_dim}"
    return None


def _latent(s: Subject) -> str | None:
    latent, rotary = s.config.get("kv_lora_rank"), s.config.get("qk_rope_head_dim")
    if s.model_type in MLA and isinstance(latent, int) and isinstance(rotary, int) and latent + rotary not in LATENTS:
        return f"kv_lora_rank + qk_rope_head_dim is {latent + rotary}, but MLA supports 320, 512 or 576"
    return None


def _cpu_latent(s: Subject) -> str | None:
    if s.model_type == "deepseek_v2":
        return "on a CPU, vLLM's attention of this family gives different logits than transformers from the second token on"
    return None


def _blocks(s: Subject) -> str | None:
    return unfit_blocks(s) if _refined(s) < 32 else None


def _refined_blocks(s: Subject) -> str | None:
    found = unfit_blocks(s)
    return (
        f"{found}; they are refined to {_refined(s)} x {_refined(s)}, which only Triton kernels support"
        if found and _refined(s) >= 32
        else None
    )


def _refined(s: Subject) -> int:
    """The size of the finer blocks that fit a rank and divide the checkpoint's blocks."""
    block = s.quantisation.get("weight_block_size")
    return math.gcd(*block, s.width_of_rank, s.hidden_size) if isinstance(block, list) and len(block) == 2 else 0


def _marlin(s: Subject) -> str | None:
    group = s.quantisation.get("group_size")
    if s.method not in ("gptq", "awq") or not isinstance(group, int) or not s.width or not s.hidden_size:
        return None
    if s.hidden_size % 128 == 0 and (group <= 0 or s.width_of_rank % group == 0) and group in (-1, 32, 64, 128):
        return None
    return f"{s.width_of_rank} neurons of an expert on each rank and hidden size {s.hidden_size} do not fit Marlin with groups of {group}"


RULES: tuple[Rule, ...] = (
    rule(
        "vllm-quant-method",
        "Other values of quant_method are refused.",
        "config/model.py, ModelConfig._verify_quantization; model_executor/layers/quantization/__init__.py, QuantizationMethods; "
        "quantization/inc/inc.py (auto-round)",
        "error",
        unknown_method("vllm", METHODS),
        f"use another engine, or {FLOATS}",
    ),
    rule(
        "vllm-mixed",
        "The experts of a layer are one module with one scheme; settings for single experts in the quantisation config are ignored.",
        "model_executor/layers/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe.py (same quantization scheme); "
        "auto_gptq.py, get_moe_quant_method (dynamic, for the prefix of all experts); utils/quant_utils.py, is_layer_skipped",
        "error",
        mixed_experts,
        f"quantise all experts of a layer the same way, or {FLOATS}",
    ),
    rule(
        "vllm-fp8-blocks",
        "On each tensor-parallel rank, an expert's neurons must divide into the blocks, or into finer blocks of at least 32.",
        "model_executor/layers/quantization/utils/fp8_utils.py, validate_fp8_block_shape_moe; "
        f"{MOE}/oracle/fp8.py, refine_fp8_moe_block_shape",
        "error",
        _blocks,
        FEWER_RANKS,
    ),
    rule(
        "vllm-fp8-refined",
        "Blocks that do not fit a rank are refined on loading; only Triton kernels support blocks other than 128 x 128.",
        f"{MOE}/oracle/fp8.py, refine_fp8_moe_block_shape",
        "info",
        _refined_blocks,
        FEWER_RANKS,
    ),
    rule(
        "vllm-marlin",
        "GPTQ and AWQ experts run in Marlin if the hidden size is a multiple of 128 and an expert's neurons on a rank are a multiple of the "
        "group size (32, 64 or 128); others fall back to the WNA16 kernels.",
        "model_executor/layers/quantization/utils/marlin_utils.py, check_moe_marlin_supports_config; auto_gptq.py and auto_awq.py, get_quant_method",
        "info",
        _marlin,
        FEWER_RANKS,
    ),
    rule(
        "vllm-nameless",
        "A config.json without architectures loads the family's base model, which has no language-model head.",
        "transformers_utils/config.py, get_config (MODEL_MAPPING_NAMES)",
        "warning",
        nameless,
        "copy architectures from the original model's config.json",
    ),
    rule(
        "vllm-registry",
        "An architecture outside the registry runs on vLLM's transformers backend, if its transformers class allows that.",
        "model_executor/models/registry.py, _VLLM_MODELS and _ModelRegistry._try_resolve_transformers",
        "warning",
        missing("vllm", UNREGISTERED),
        "test it first: vLLM falls back to its transformers backend",
    ),
    rule(
        "vllm-attention",
        "Queries, keys and values have the same head_dim, from config.json.",
        "model_executor/models/mixtral.py, MixtralAttention.__init__ (and the other families' attention)",
        "error",
        pruned_attention,
        "convert with --attention none",
    ),
    rule(
        "vllm-constants",
        "The router's classes and the experts with matrices are one number, the one in config.json.",
        "model_executor/models/mixtral.py, MixtralMoE.__init__ (and the other families' blocks)",
        "error",
        constants,
        "use a method that removes experts (not mone), or run it with expertsmith.load",
    ),
    rule(
        "vllm-width",
        "Every tensor-parallel rank holds the same number of each expert's neurons.",
        "model_executor/layers/fused_moe/layer.py, FusedMoE.__init__ (assert intermediate_size % tp_size == 0)",
        "error",
        indivisible_width,
        "use a number of ranks that divides the width, or expert parallelism",
    ),
    rule(
        "vllm-neurons",
        "All experts have one width, the one in config.json.",
        "model_executor/models/mixtral.py, MixtralMoE.__init__ (and the other families' blocks)",
        "error",
        narrowed,
        "plan with -O width=model, or run it with expertsmith.load",
    ),
    rule(
        "vllm-uneven",
        "Every block is built with the number of experts in config.json.",
        "model_executor/models/qwen3_moe.py, Qwen3MoeSparseMoeBlock.__init__ (and the other families' blocks); "
        "transformers_utils/model_arch_config_convertor.py, get_num_experts",
        "error",
        uneven,
        EVEN,
    ),
    rule(
        "vllm-padded",
        "Dead experts are stored and routed like others; a bias added before the selection keeps them from being selected.",
        f"{MOE}/router/fused_topk_bias_router.py, fused_topk_bias",
        "info",
        padded,
        "compare outputs first: fused kernels for biased routing were not tried with -inf",
    ),
    rule(
        "vllm-skip",
        "Every token runs all top_k experts of config.json.",
        "model_executor/models/qwen3_moe.py, Qwen3MoeSparseMoeBlock.__init__ (num_experts_per_tok)",
        "info",
        thresholds,
        COMPUTED,
    ),
    rule(
        "vllm-top-k",
        "A CPU router takes the top_k of all scores; the grouped kernel needs top_k experts in the groups that a token "
        "may use.",
        f"{MOE}/router/cpu_router.py, _softmax_topk; csrc/moe/grouped_topk_kernels.cu, grouped_topk",
        "error",
        lambda s: too_few(s) or out_of_reach(s),
        MORE,
    ),
    rule(
        "vllm-top-groups",
        "The grouped kernel needs topk_group <= n_group.",
        "csrc/moe/grouped_topk_kernels.cu, grouped_topk",
        "error",
        too_many_groups,
        "set topk_group to at most n_group",
    ),
    rule(
        "vllm-groups",
        "Groups are ignored without a warning if experts do not divide into them, or if they are not fewer than the experts "
        "(and fail on a CPU).",
        f"{MOE}/router/grouped_topk_router.py, GroupedTopKRouter._compute_routing (valid_grouping); "
        "router/cpu_router.py, _grouped_topk",
        "warning",
        _ungrouped,
        LAYOUT,
    ),
    rule(
        "vllm-router-keys",
        "The block of DeepSeek V3, V3.2 and GLM-5 has sigmoid scores and a selection bias only if config.json sets "
        "them; transformers does not write these keys.",
        "model_executor/models/deepseek_v2.py, DeepseekV2MoE.__init__ (getattr topk_method, scoring_func) and load_weights",
        "error",
        lacks("deepseek_v3 deepseek_v32 glm_moe_dsa", "topk_method", "scoring_func"),
        ROUTER_KEYS,
    ),
    rule(
        "vllm-minimax-keys",
        "MiniMax-M2's block reads scoring_func without a default and has a selection bias only with use_routing_bias; "
        "transformers does not write these keys.",
        "model_executor/models/minimax_m2.py, MiniMaxM2MoE.__init__",
        "error",
        lacks("minimax_m2", "scoring_func", "use_routing_bias"),
        MINIMAX_KEYS,
    ),
    rule(
        "vllm-v2-none",
        "DeepSeek V2's block always uses grouped routing, which needs n_group and topk_group.",
        f"model_executor/models/deepseek_v2.py, DeepseekV2MoE.__init__; {MOE}/router/router_factory.py, "
        "create_fused_moe_router",
        "error",
        _v2_none,
        "set n_group and topk_group to 1",
    ),
    rule(
        "vllm-v2-greedy",
        "DeepSeek V2's block applies n_group for any topk_method.",
        "model_executor/models/deepseek_v2.py, DeepseekV2MoE.__init__ (use_grouped_topk=True)",
        "warning",
        _v2_greedy,
        "set n_group and topk_group to 1",
    ),
    rule(
        "vllm-grouped-kernel",
        "Beyond 32 groups or top_k 32, grouped routing runs in torch.",
        f"{MOE}/router/grouped_topk_router.py, grouped_topk",
        "info",
        _grouped_kernel,
    ),
    rule(
        "vllm-grouped-small",
        "Up to 256 experts, 32 per group, 128 in the selected groups, top_k 8 and 4 selected groups use a faster kernel; "
        "others use the general one.",
        "csrc/moe/grouped_topk_kernels.cu, invokeNoAuxTc (is_multi_group)",
        "info",
        _small_kernel,
    ),
    rule(
        "vllm-topk-kernel",
        "Other numbers of experts use two kernels, softmax or sigmoid and then top-k; on ROCm only powers of two are fused.",
        "csrc/moe/topk_softmax_kernels.cu, topkGatingKernelLauncher",
        "info",
        _topk,
    ),
    rule(
        "vllm-v4-topk",
        "DeepSeek V4's top-k kernel is compiled for certain numbers of experts and has no fallback.",
        "csrc/moe/topk_softplus_sqrt_kernels.cu, topkGatingSoftplusSqrtKernelLauncher (Unsupported expert number), from "
        f"{MOE}/router/fused_topk_bias_router.py, fused_topk_bias",
        "error",
        _v4,
        "keep 512, 448, 384, 320, 256, 192, 128 or 64 experts",
    ),
    rule(
        "vllm-v4-topk-cpu",
        "DeepSeek V4's CPU kernel supports 64, 128, 256 or 384 experts with top_k 6 or 8 (or 9 of 256), with no fallback.",
        "csrc/cpu/sgl-kernels/topk.cpp, biased_topk_cpu",
        "warning",
        _v4_cpu,
        "keep 256, 128 or 64 experts to serve on a CPU",
    ),
    rule(
        "vllm-fp32-router",
        "The fp32 router kernel is compiled for hidden size 3072 with 256 experts and 6144 with 128; other shapes use a "
        "general GEMM.",
        f"{MOE}/router/gate_linear.py, GateLinear.FP32_SUPPORTED_SHAPES and forward; csrc/fp32_router_gemm_entry.cu",
        "info",
        _fp32_router,
    ),
    rule(
        "vllm-align",
        "The CUDA kernel that sorts tokens by expert supports fewer than 1024 experts, padded to a multiple of 32.",
        "csrc/moe/moe_align_sum_kernels.cu, moe_align_block_size (padded_num_experts < 1024)",
        "warning",
        _align,
        "keep 992 experts or fewer",
    ),
    rule(
        "vllm-tensor-parallel",
        "The block of these families refuses more tensor-parallel ranks than experts.",
        "model_executor/models/qwen3_moe.py, Qwen3MoeSparseMoeBlock.__init__ (and the other families' blocks)",
        "error",
        small_tp(TENSOR_PARALLEL),
        "use fewer tensor-parallel ranks",
    ),
    rule(
        "vllm-expert-parallel",
        "Ranks may have different numbers of experts, but load balancing (--enable-eplb) needs equal numbers, including redundant "
        "experts.",
        f"{MOE}/expert_map_manager.py, determine_expert_map; {MOE}/layer.py, FusedMoEFactory (EPLB currently only "
        "supports even distribution)",
        "warning",
        uneven_ranks,
        "serve without --enable-eplb, or set num_redundant_experts so that the sum is divisible",
    ),
    rule(
        "vllm-keys",
        "The number of experts is the first key found of num_experts, moe_num_experts, n_routed_experts and num_local_experts.",
        "transformers_utils/model_arch_config_convertor.py, get_num_experts",
        "warning",
        disagree(EXPERT_KEYS),
        "make the keys agree, or delete the stale one",
    ),
    rule(
        "vllm-sparsemixer",
        "Phi-3.5-MoE's routing function supports top-2 only.",
        "model_executor/models/phimoe.py, phimoe_routing_function (assert topk == 2)",
        "error",
        sparsemixer,
        "set num_experts_per_tok to 2",
    ),
    rule(
        "vllm-cpu-sigmoid",
        "On a CPU, ungrouped routing supports softmax only.",
        f"{MOE}/router/cpu_router.py, CPURouter._compute_routing; model_executor/models/minimax_m2.py and laguna.py (no "
        "grouped top-k)",
        "warning",
        _cpu_sigmoid,
        "serve it on a GPU",
    ),
    rule(
        "vllm-cpu-bias",
        "On a CPU, ungrouped softmax routing does not add the selection bias.",
        f"{MOE}/router/cpu_router.py, CPURouter._compute_routing; model_executor/models/ernie45_moe.py",
        "warning",
        _cpu_bias,
        "serve it on a GPU, or compare outputs first",
    ),
    rule(
        "vllm-latent",
        "The latent head of multi-head latent attention has 320, 512 or 576 values (on a CPU 576).",
        "model_executor/layers/attention/mla_attention.py, MLACommonMetadata.__post_init__ and "
        "MLACommonBackend.get_supported_head_sizes; v1/attention/backends/mla/cpu_mla.py",
        "error",
        _latent,
        "set VLLM_MLA_DISABLE=1, and compare outputs first",
    ),
    rule(
        "vllm-cpu-latent",
        "DeepSeek V2's attention on a CPU agrees with transformers on one token, but not on longer text.",
        "model_executor/models/deepseek_v2.py, DeepseekV2Attention and DeepseekV2MLAAttention (tested, not read: random models in float32)",
        "warning",
        _cpu_latent,
        "serve it on a GPU, or with llama.cpp or transformers",
    ),
    rule(
        "vllm-cpu-heads",
        "CPU attention is compiled for head sizes 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256 and 512.",
        "csrc/cpu/generate_cpu_attn_dispatch.py (HEAD_DIMS_32, HEAD_DIMS_16)",
        "warning",
        _cpu_heads,
        "serve it on a GPU or with transformers",
    ),
    rule(
        "vllm-mtp",
        "Multi-token prediction of these families is loaded from the same checkpoint as a draft model, with the number of experts in config.json.",
        "config/speculative.py, MTPModelTypes and SpeculativeConfig.hf_config_override; model_executor/models/*_mtp.py",
        "info",
        speculative("vLLM", MTP, MTP_OPTION),
    ),
    rule(
        "vllm-no-mtp",
        "The number of layers is read from config.json, and drafting divides by it.",
        "config/speculative.py, SpeculativeConfig.hf_config_override (n_predict)",
        "info",
        without_mtp,
        "remove method mtp from --speculative-config",
    ),
)

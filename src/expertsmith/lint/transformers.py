"""What transformers supports, from the source of transformers 5.23.0."""

from __future__ import annotations

from functools import partial

from expertsmith.arch import config_get
from expertsmith.lint.base import (
    FLOATS,
    LAYOUT,
    MORE,
    Rule,
    Subject,
    constants,
    indivisible,
    make_rule,
    mixed_experts,
    names,
    narrowed,
    out_of_reach,
    pruned_attention,
    ragged,
    sparsemixer,
    thresholds,
    too_few,
    too_many_groups,
    uneven,
    uneven_ranks,
    unknown_method,
)

VERSION = "transformers 5.23.0"
rule = partial(make_rule, VERSION)
METHODS = names(
    """awq bitsandbytes gptq aqlm quanto quark fouroversix fp_quant eetq higgs hqq compressed-tensors fbgemm_fp8 torchao bitnet vptq spqr
    fp8 gguf nvfp4 mxfp8 auto-round mxfp4 metal sinq gemma"""
)
STACKED = names("fp8 mxfp8 compressed-tensors")  # methods whose code for loading experts was read


def _group_default(s: Subject) -> str | None:
    default = s.group_default[0]
    named = any(key is not None and config_get(s.config, key) is not None for key in (s.group_key, s.group_alias))
    if default == 1 or s.group_key is None or named:
        return None
    found = f"config.json has no {s.group_key}, so transformers uses {default}"
    return f"{found}, and {s.num_experts} experts are not divisible by that" if s.num_experts % default else found


def _lonely_group(s: Subject) -> str | None:
    size = s.fewest // s.groups
    if s.groups > 1 and size < s.group_minimum:
        return f"an expert_group has {size} expert, but its score is the sum of its best {s.group_minimum}"
    return None


def _surplus(s: Subject) -> str | None:
    for layer, count in s.counts.items():
        said = s.declared.get(layer, s.num_experts)
        if count != said:
            return f"config.json says {said} experts, but decoder layer {layer} has tensors of {count}"
    return None


def _nvfp4(s: Subject) -> str | None:
    groups = s.quantisation.get("config_groups")
    formats = [s.quantisation.get("format")] + [g.get("format") for g in groups.values()] if isinstance(groups, dict) else []
    if s.method == "compressed-tensors" and "nvfp4-pack-quantized" in formats:
        return "the experts are NVFP4, but their weight_global_scale is ignored: weights become many times too large"
    return None


def _mixed(s: Subject) -> str | None:
    return mixed_experts(s) if s.method in STACKED else None


RULES: tuple[Rule, ...] = (
    rule(
        "transformers-quant-method",
        "An unknown quant_method is skipped with a warning, and codes are loaded as if they were weights.",
        "quantizers/auto.py, AutoHfQuantizer.supports_quant_method and AUTO_QUANTIZER_MAPPING",
        "error",
        unknown_method("transformers", METHODS),
        f"use another engine, or {FLOATS}",
    ),
    rule(
        "transformers-nvfp4",
        "compressed-tensors experts are unpacked from codes, scale and shape only, without NVFP4's global scale.",
        "integrations/compressed_tensors.py, CompressedTensorsDequantize.convert (DummyModule)",
        "error",
        _nvfp4,
        f"use another engine, or {FLOATS}",
    ),
    rule(
        "transformers-mixed",
        "The experts of a layer become one stacked parameter, and scales are matched to experts by order.",
        "integrations/compressed_tensors.py, CompressedTensorsDequantize.convert (zip of weights and scales); "
        "integrations/finegrained_fp8.py, FP8Experts",
        "error",
        _mixed,
        f"quantise all experts of a layer the same way, or {FLOATS}",
    ),
    rule(
        "transformers-count",
        "A decoder layer's experts are one stacked parameter with the number of experts in config.json.",
        "models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3Experts.__init__",
        "error",
        _surplus,
        "config.json and weights do not match",
    ),
    rule(
        "transformers-attention",
        "The stock attention has the same head_dim for queries, keys and values. Only the class in auto_map, or expertsmith.load, applies expertsmith_attention.",
        "models/mixtral/modeling_mixtral.py, MixtralAttention.__init__ (and the other families' attention)",
        "warning",
        pruned_attention,
        "load it with expertsmith.load, or with trust_remote_code=True",
    ),
    rule(
        "transformers-constants",
        "Every class of the router is an expert with its own matrices. Only the class in auto_map, or expertsmith.load, applies expertsmith_novices.",
        "models/mixtral/modeling_mixtral.py, MixtralExperts.__init__ (and the other families' experts)",
        "warning",
        constants,
        "load it with expertsmith.load, or with trust_remote_code=True",
    ),
    rule(
        "transformers-neurons",
        "All experts have one width, the one in the config. Only the class in auto_map, or expertsmith.load, applies expertsmith_neurons.",
        "models/mixtral/modeling_mixtral.py, MixtralExperts.__init__ (and the other families' experts)",
        "warning",
        lambda s: None if ragged(s) else narrowed(s),
        "load it with expertsmith.load, or with trust_remote_code=True",
    ),
    rule(
        "transformers-ragged",
        "The experts of a layer are stacked into one tensor as they are loaded, so they have one width.",
        "modeling_utils.py, from_pretrained: the conversion that stacks the experts of a layer",
        "error",
        ragged,
        "load it with expertsmith.load, which fills them up with zeros; or plan with -O width=layer",
    ),
    rule(
        "transformers-uneven",
        "The stock classes build every decoder layer with the one number of experts in the config. Only the class in "
        "auto_map, or expertsmith.load, applies per_layer_config.",
        "models/mixtral/modeling_mixtral.py, MixtralExperts.__init__ (and the other families' experts)",
        "warning",
        uneven,
        "load it with expertsmith.load, or with trust_remote_code=True",
    ),
    rule(
        "transformers-skip",
        "The router selects the config's top_k experts for every token, and all of them are computed.",
        "models/mixtral/modeling_mixtral.py, MixtralTopKRouter (and the other families' routers)",
        "info",
        thresholds,
        "load it with expertsmith.load to skip",
    ),
    rule(
        "transformers-top-k",
        "The router takes the top_k of all expert scores, so there must be at least top_k experts.",
        "models/deepseek_v2/modeling_deepseek_v2.py, DeepseekV2TopkRouter.forward (torch.topk)",
        "error",
        too_few,
        MORE,
    ),
    rule(
        "transformers-groups",
        "A group-limited router views its scores as n_group groups of equal size.",
        "models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3TopkRouter.forward (scores_for_choice.view)",
        "error",
        indivisible,
        LAYOUT,
    ),
    rule(
        "transformers-top-groups",
        "The router takes topk_group of n_group group scores.",
        "models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3TopkRouter.forward (torch.topk)",
        "error",
        too_many_groups,
        "set topk_group to at most n_group",
    ),
    rule(
        "transformers-group-score",
        "A group's score is the sum of its two best experts, so every group needs two.",
        "models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3TopkRouter.forward (.topk(2, dim=-1))",
        "error",
        _lonely_group,
        f"{MORE}, or plan with --router-groups flatten",
    ),
    rule(
        "transformers-reach",
        "If the selected groups have fewer than top_k experts, the rest are selected from the masked groups.",
        "models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3TopkRouter.forward (masked_fill, torch.topk)",
        "warning",
        out_of_reach,
        f"{MORE}, or plan with --router-groups flatten",
    ),
    rule(
        "transformers-group-default",
        "A config.json without the group keys gets the defaults of the config class, not one group.",
        "models/deepseek_v3/configuration_deepseek_v3.py, DeepseekV3Config (also axk1, bailing_hybrid, beam, deepseek_v32)",
        "warning",
        _group_default,
        "write the number of groups and topk_group into config.json, 1 and 1 for none",
    ),
    rule(
        "transformers-sparsemixer",
        "Phi-3.5-MoE's sparsemixer returns two experts per token for any top_k.",
        "models/phimoe/modeling_phimoe.py, sparsemixer",
        "warning",
        sparsemixer,
        "set num_experts_per_tok to 2",
    ),
    rule(
        "transformers-expert-parallel",
        "Expert parallelism shards the experts evenly or not at all.",
        "distributed/expert_parallel.py, MoEParamShard.shard_param",
        "error",
        uneven_ranks,
        "keep a multiple of the expert-parallel size",
    ),
)

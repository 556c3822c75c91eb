"""Will a serving engine take this checkpoint? Rules read in the engines' sources, tested on config.json and tensor headers.

A rule is data: what it says, where in which version of the engine it was read, and a test on a `Subject`. Where an engine has a
fallback, the finding is a warning or an info, not an error; what was not found in a source is not a rule. What depends on the
hardware says so in its message, since the hardware is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from expertsmith.arch import config_get
from expertsmith.inventory import Inventory
from expertsmith.registry import unknown

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")
ENGINES = {  # engine → the version that was read
    "transformers": "transformers 5.23.0",
    "vllm": "vllm 0.32.0",
    "sglang": "sglang 0.5.23",
    "llama.cpp": "llama.cpp 0c1e57098 (llama-cpp-python 0.3.36)",
}


@dataclass(frozen=True)
class Subject:
    """What the tests see: a checkpoint's router in numbers, and how it is to be served."""

    model_type: str
    num_experts: int
    top_k: int
    groups: int = 1  # expert_groups in force
    top_groups: int = 1
    group_minimum: int = 1
    group_key: str | None = None
    score: str = "softmax"
    architectures: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)  # the text part of config.json
    counts: Mapping[int, int] = field(default_factory=dict)  # experts in the tensors of each decoder layer
    tensor_parallel: int = 1
    expert_parallel: int = 1
    inventory: Inventory | None = None

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream; 0 where config.json does not say."""
        return self._number("hidden_size")

    @property
    def head_dim(self) -> int:
        """Width of an attention head; 0 where config.json does not say."""
        heads = self._number("num_attention_heads")
        return self._number("head_dim") or (self.hidden_size // heads if heads else 0)

    @property
    def reachable(self) -> int:
        """Experts that one token may choose from."""
        return self.num_experts // self.groups * self.top_groups if self.groups > 1 else self.num_experts

    def _number(self, key: str) -> int:
        value = config_get(self.config, key)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0


@dataclass(frozen=True)
class Rule:
    """One fact about an engine; `source` says where it was read."""

    id: str
    engine: str
    says: str
    source: str
    check: Callable[[Subject], Finding | None]


@dataclass(frozen=True)
class Finding:
    """A rule that applies to this checkpoint."""

    rule: Rule
    level: Level
    message: str
    remedy: str

    def to_json(self) -> dict[str, str]:
        """Plain data for `--json`."""
        return {
            "rule": self.rule.id,
            "engine": self.rule.engine,
            "level": self.level,
            "message": self.message,
            "remedy": self.remedy,
            "says": self.rule.says,
            "source": self.rule.source,
        }


def lint(inventory: Inventory, engine: str | None = None, tensor_parallel: int = 1, expert_parallel: int = 1) -> list[Finding]:
    """What stands against serving a checkpoint, errors first; `engine` None asks all of them.

    Raises:
        UserError: an engine without rules.
    """
    if engine is not None and engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    return check(subject_of(inventory, tensor_parallel, expert_parallel), engine)


def check(subject: Subject, engine: str | None = None) -> list[Finding]:
    """`lint` for a subject that is already at hand."""
    found = (rule.check(subject) for rule in RULES if engine in (None, rule.engine))
    return sorted((finding for finding in found if finding), key=lambda finding: LEVELS.index(finding.level))


def subject_of(inventory: Inventory, tensor_parallel: int = 1, expert_parallel: int = 1) -> Subject:
    """The numbers of a checkpoint that the rules need."""
    record, rules, config = inventory.architecture, inventory.rules, inventory.config
    named = inventory.checkpoint.config.get("architectures") or config.get("architectures") or ()
    # zero experts have numbers after the experts' and may have tensors
    zero = max((_extra(entry.extra, config) for entry in record.stacked), default=0)
    seen: dict[int, set[int]] = {layer: set() for layer in inventory.layers}
    for claim in inventory.claims:
        if claim.kind == "expert" and claim.layer in seen and claim.expert is not None:
            seen[claim.layer].add(claim.expert)
    return Subject(
        model_type=record.model_type,
        num_experts=inventory.num_experts,
        top_k=inventory.top_k,
        groups=rules.groups,
        top_groups=rules.top_groups,
        group_minimum=rules.group_minimum,
        group_key=record.group_key,
        score=record.score,
        architectures=tuple(str(name) for name in named),
        config=config,
        # a stacked tensor holds what config.json says, or taking the inventory would have failed
        counts={
            layer: inventory.num_experts + max(0, len(held) - inventory.num_experts - zero) if held else inventory.num_experts
            for layer, held in seen.items()
        },
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
        inventory=inventory,
    )


def _extra(extra: int | str, config: Mapping[str, Any]) -> int:
    return extra if isinstance(extra, int) else int(config_get(config, extra) or 0)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- facts of the engines, as they stand in the sources that the rules name ---

# architectures of the families in expertsmith.arch that an engine's registry does not have
UNREGISTERED = {
    "vllm": _names(
        """AriaTextForCausalLM AXK2ForCausalLM BailingHybridForCausalLM BeamForCausalLM Dots1ForCausalLM FlintForCausalLM
        Inkling2ForCausalLM Inkling2ForConditionalGeneration Kolibri1ForCausalLM MiniMaxForCausalLM
        MiniMaxM3VLForCausalLM PhimoeForCausalLM SolarOpenForCausalLM ZayaForCausalLM"""
    ),
    "sglang": _names(
        """AriaTextForCausalLM AriaForConditionalGeneration AXK1ForCausalLM AXK2ForCausalLM BailingHybridForCausalLM
        Dots1ForCausalLM FlexOlmoForCausalLM FlintForCausalLM Inkling2ForCausalLM
        Inkling2ForConditionalGeneration InklingForCausalLM JambaForCausalLM Kolibri1ForCausalLM
        MiniMaxForCausalLM MiniMaxM3VLForCausalLM PhimoeForCausalLM Qwen4ExpForCausalLM SolarOpenForCausalLM"""
    ),
    "llama.cpp": _names(
        """AriaTextForCausalLM AriaForConditionalGeneration AXK1ForCausalLM AXK2ForCausalLM BailingHybridForCausalLM
        BeamForCausalLM FlexOlmoForCausalLM FlintForCausalLM Inkling2ForCausalLM
        Inkling2ForConditionalGeneration InklingForCausalLM InklingForConditionalGeneration
        Kolibri1ForCausalLM LongcatFlashForCausalLM MiniMaxForCausalLM MiniMaxM3VLForCausalLM
        PhimoeForCausalLM ZayaForCausalLM"""
    ),
}
# of these, what SGLang's transformers backend refuses: is_backend_compatible() is False in transformers 5.23.0
SGLANG_NO_BACKEND = _names(
    """BailingHybridForCausalLM Inkling2ForCausalLM Inkling2ForConditionalGeneration InklingForCausalLM
        JambaForCausalLM Qwen4ExpForCausalLM"""
)
# families whose MoE block refuses a tensor-parallel size above the number of experts
VLLM_TP = _names(
    """cohere2_moe ernie4_5_moe exaone_moe hy_v3 hy_v4 laguna lfm2_moe mimo_v2_flash minimax_m2 minimax_m3_vl_text
        qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp_text"""
)
SGLANG_TP = _names(
    """afmoe cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 exaone_moe glm4_moe glm4_moe_lite
        glm_moe_dsa hunyuan_v1_moe laguna lfm2_moe longcat_flash mimo_v2_flash minimax_m2 minimax_m3_vl_text
        qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next zaya"""
)
# n_group and topk_group that transformers takes where config.json names none
GROUP_DEFAULTS = dict.fromkeys(("axk1", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32"), (8, 4))
# config keys that name the number of experts, in the order in which the engine looks
VLLM_KEYS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
LLAMA_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")

POWERS = frozenset(2**n for n in range(10))  # 1 ... 512
VLLM_TOPK = POWERS | {192, 320, 384, 448, 576}
VLLM_V4_CPU = {64: (6, 8), 128: (6, 8), 256: (6, 8, 9), 384: (6, 8)}
VLLM_FP32_ROUTER = {(3072, 256), (6144, 128)}
VLLM_CPU_HEADS = frozenset({32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
# families that choose experts with other kernels: functions of their own, zero experts, sqrt(softplus) scores, a group of one
OWN_TOPK = _names(
    "afmoe cohere2_moe deepseek_v4 gemma4_text gpt_oss hy_v3 inkling_text lfm2_moe llama4_text longcat_flash phimoe"
)

MOE = "model_executor/layers/fused_moe"  # in vLLM
LAYOUT = "keep a number that divides into the expert_groups, or plan with --router-groups flatten"
MORE = "keep more experts"
# what the sources of the DeepSeek family read from config.json and transformers does not write
ROUTER_KEYS = 'copy "topk_method": "noaux_tc" and "scoring_func": "sigmoid" from the original model\'s config.json'
MINIMAX_KEYS = 'copy "scoring_func": "sigmoid" and "use_routing_bias": true from the original model\'s config.json'


def _rule(id: str, says: str, where: str, level: Level, test: Callable[[Subject], str | None], remedy: str = "") -> Rule:
    def find(subject: Subject) -> Finding | None:
        message = test(subject)
        return Finding(rule, level, message, remedy) if message else None

    engine = id.split("-")[0]
    rule = Rule(id, engine, says, f"{ENGINES[engine]}, {where}", find)
    return rule


# --- tests that several rules share: each returns the message, or None ---


def _top_k(s: Subject) -> str | None:
    return f"a token uses {s.top_k} experts, but there are {s.num_experts}" if s.top_k > s.num_experts else None


def _indivisible(s: Subject) -> str | None:
    return f"{s.num_experts} experts do not divide into {s.groups} expert_groups" if s.num_experts % s.groups else None


def _too_many_groups(s: Subject) -> str | None:
    if s.groups > 1 and not 1 <= s.top_groups <= s.groups:
        return f"a token uses {s.top_groups} expert_groups, but there are {s.groups}"
    return None


def _out_of_reach(s: Subject) -> str | None:
    if s.groups > 1 and s.reachable < s.top_k <= s.num_experts:
        return (
            f"a token uses {s.top_k} experts, but the {s.top_groups} of {s.groups} expert_groups it may use hold {s.reachable}"
        )
    return None


def _uneven_ranks(s: Subject) -> str | None:
    if s.expert_parallel > 1 and s.num_experts % s.expert_parallel:
        return f"{s.num_experts} experts do not divide among {s.expert_parallel} expert-parallel ranks"
    return None


def _small_tp(families: frozenset[str]) -> Callable[[Subject], str | None]:
    def test(s: Subject) -> str | None:
        if s.model_type in families and s.tensor_parallel > s.num_experts:
            return f"tensor-parallel size {s.tensor_parallel} is greater than the number of experts, {s.num_experts}"
        return None

    return test


def _missing(
    engine: str, only: frozenset[str] | None = None, but: frozenset[str] = frozenset()
) -> Callable[[Subject], str | None]:
    def test(s: Subject) -> str | None:
        # llama.cpp's converter prefers what the text part names
        named = (engine == "llama.cpp" and s.config.get("architectures")) or s.architectures
        name = named[0] if named else ""
        if name in UNREGISTERED[engine] and (only is None or name in only) and name not in but:
            return f"{engine} has no model called {name}"
        return None

    return test


def _nameless(s: Subject) -> str | None:
    return None if s.architectures else "config.json names no architectures"


def _disagree(keys: tuple[str, ...]) -> Callable[[Subject], str | None]:
    def test(s: Subject) -> str | None:
        read = next((key for key in keys if isinstance(s.config.get(key), int)), None)
        if read is not None and s.config[read] != s.num_experts:
            return f"config.json says {read} = {s.config[read]}, but the model has {s.num_experts} experts"
        return None

    return test


def _lacks(families: str, *keys: str) -> Callable[[Subject], str | None]:
    names = families.split()

    def test(s: Subject) -> str | None:
        absent = [key for key in keys if s.config.get(key) is None]
        return f"config.json has no {' and no '.join(absent)}" if s.model_type in names and absent else None

    return test


# --- transformers ---


def _group_default(s: Subject) -> str | None:
    default = GROUP_DEFAULTS.get(s.model_type)
    if default is None or s.group_key is None or config_get(s.config, s.group_key) is not None:
        return None
    found = f"config.json has no {s.group_key}, so transformers takes {default[0]}"
    return f"{found}, into which {s.num_experts} experts do not divide" if s.num_experts % default[0] else found


def _lonely_group(s: Subject) -> str | None:
    size = s.num_experts // s.groups
    if s.groups > 1 and size < s.group_minimum:
        return f"an expert_group has {size} expert, but its score is the sum of its best {s.group_minimum}"
    return None


def _surplus(s: Subject) -> str | None:
    wrong = [layer for layer, count in s.counts.items() if count != s.num_experts]
    if wrong:
        return f"config.json says {s.num_experts} experts, but decoder layer {wrong[0]} has tensors of {s.counts[wrong[0]]}"
    return None


def _sparsemixer(s: Subject) -> str | None:
    return (
        f"a token uses {s.top_k} experts, but sparsemixer always chooses 2"
        if s.model_type == "phimoe" and s.top_k != 2
        else None
    )


# --- vLLM ---


def _vllm_ungrouped(s: Subject) -> str | None:
    if s.groups > 1 and (s.num_experts % s.groups or s.num_experts <= s.groups):
        return f"{s.num_experts} experts in {s.groups} expert_groups: vLLM routes over all experts as if there were no groups"
    return None


def _vllm_v2_none(s: Subject) -> str | None:
    absent = [key for key in ("n_group", "topk_group") if s.config.get(key) is None]
    if s.model_type == "deepseek_v2" and absent:
        return f"config.json has no {' and no '.join(absent)}, which its config class leaves at None"
    return None


def _vllm_v2_greedy(s: Subject) -> str | None:
    groups = s.config.get("n_group")
    if s.model_type == "deepseek_v2" and s.groups == 1 and isinstance(groups, int) and groups > 1:
        return f"without topk_method group_limited_greedy transformers has no groups, but vLLM applies n_group = {groups}"
    return None


def _vllm_grouped_kernel(s: Subject) -> str | None:
    if s.groups > 1 and s.group_minimum == 2 and (s.groups > 32 or s.top_k > 32):
        return f"{s.groups} expert_groups and top_k = {s.top_k}: the fused grouped_topk kernel takes at most 32 of each"
    return None


def _vllm_small_kernel(s: Subject) -> str | None:
    size = s.num_experts // s.groups
    fits = s.num_experts <= 256 and size <= 32 and size * s.top_groups <= 128 and s.top_k <= 8 and s.top_groups <= 4
    if s.groups > 1 and s.group_minimum == 2 and not fits and s.groups <= 32 and s.top_k <= 32:
        return f"{s.num_experts} experts in {s.groups} expert_groups are outside the small grouped_topk kernel"
    return None


def _vllm_topk(s: Subject) -> str | None:
    if s.group_key is None and s.model_type not in OWN_TOPK and s.num_experts not in VLLM_TOPK:
        return f"{s.num_experts} experts have no fused top-k kernel (powers of two up to 512, 192, 320, 384, 448 and 576 have)"
    return None


def _vllm_v4(s: Subject) -> str | None:
    if s.model_type == "deepseek_v4" and s.num_experts not in VLLM_TOPK:
        return f"the sqrt(softplus) top-k kernel does not take {s.num_experts} experts"
    return None


def _vllm_v4_cpu(s: Subject) -> str | None:
    if s.model_type == "deepseek_v4" and s.top_k not in VLLM_V4_CPU.get(s.num_experts, ()):
        return f"on a CPU, the sqrt(softplus) top-k kernel does not take {s.num_experts} experts with top_k = {s.top_k}"
    return None


def _vllm_fp32_router(s: Subject) -> str | None:
    shape = (s.hidden_size, s.num_experts)
    if s.model_type in ("minimax_m2", "minimax_m3_vl_text") and shape not in VLLM_FP32_ROUTER:
        return f"hidden size {shape[0]} with {shape[1]} experts has no fp32 router kernel"
    return None


def _vllm_align(s: Subject) -> str | None:
    return f"{s.num_experts} experts, of which moe_align_block_size takes at most 992" if s.num_experts > 992 else None


def _vllm_cpu_sigmoid(s: Subject) -> str | None:
    sigmoid = s.model_type == "laguna" or (s.model_type == "minimax_m2" and s.config.get("scoring_func") == "sigmoid")
    return (
        "on a CPU, vLLM's router asserts softmax scores for ungrouped routing, but this one's are sigmoid" if sigmoid else None
    )


def _vllm_cpu_bias(s: Subject) -> str | None:
    return "on a CPU, vLLM's router ignores the selection bias of this family" if s.model_type == "ernie4_5_moe" else None


def _vllm_cpu_heads(s: Subject) -> str | None:
    if s.head_dim and s.head_dim not in VLLM_CPU_HEADS and s.config.get("kv_lora_rank") is None:
        return f"on a CPU, vLLM's attention kernels do not take head_dim = {s.head_dim}"
    return None


# --- SGLang ---


def _sglang_keys(s: Subject) -> str | None:
    # V2's config class has a topk_method
    wanted = ("scoring_func",) if s.model_type == "deepseek_v2" else ("topk_method", "scoring_func")
    return _lacks("deepseek_v2 deepseek_v3 deepseek_v32 glm_moe_dsa mimo_v2_flash", *wanted)(s)


def _sglang_topk(s: Subject) -> str | None:
    if s.group_key is None and s.score == "softmax" and s.model_type not in OWN_TOPK and s.num_experts not in POWERS:
        return f"{s.num_experts} experts have no single-pass top-k kernel (powers of two up to 512 have)"
    return None


def _sglang_grouped(s: Subject) -> str | None:
    size = s.num_experts // s.groups
    fits = s.num_experts in POWERS and s.top_k <= 8 and size <= 32 and size * s.top_groups <= 128
    if s.groups > 1 and s.group_minimum == 2 and not fits:
        return f"{s.num_experts} experts in {s.groups} expert_groups are outside flashinfer's fused_topk_deepseek"
    return None


def _sglang_shared(s: Subject) -> str | None:
    if s.model_type == "deepseek_v3" and s.config.get("n_shared_experts") == 1 and s.num_experts not in (256, 384):
        return f"with {s.num_experts} experts the shared expert is not fused into the routed ones"
    return None


# --- llama.cpp ---


def _gguf_groups(s: Subject) -> tuple[int, int | None]:
    """The converter writes n_group and topk_group as they stand, in force or not."""
    groups, top = s.config.get("n_group"), s.config.get("topk_group")
    return groups if isinstance(groups, int) else 0, top if isinstance(top, int) else None


def _gguf_limit(s: Subject) -> str | None:
    return f"{s.num_experts} experts are more than LLAMA_MAX_EXPERTS, 1024" if s.num_experts > 1024 else None


def _gguf_group_count(s: Subject) -> str | None:
    groups, _ = _gguf_groups(s)
    return (
        f"{s.num_experts} experts in {groups} expert_groups: there must be fewer groups than experts"
        if groups >= s.num_experts
        else None
    )


def _gguf_indivisible(s: Subject) -> str | None:
    groups, _ = _gguf_groups(s)
    return (
        f"{s.num_experts} experts do not divide into {groups} expert_groups" if groups > 1 and s.num_experts % groups else None
    )


def _gguf_top_groups(s: Subject) -> str | None:
    groups, top = _gguf_groups(s)
    if groups > 1 and top is not None and not 0 < top < groups:
        return f"a token uses {top} of {groups} expert_groups, but llama.cpp wants fewer than there are"
    return None


def _gguf_group_score(s: Subject) -> str | None:
    groups, _ = _gguf_groups(s)
    if s.model_type == "deepseek_v2" and groups > 1:
        return "llama.cpp scores an expert_group by its best two experts, this model by its best one (or not at all)"
    return None


def _gguf_group_key(s: Subject) -> str | None:
    if s.groups > 1 and s.group_key not in (None, "n_group"):
        return f"the converter does not read {s.group_key}, so tokens may use experts of any group"
    return None


def _gguf_topk(s: Subject) -> str | None:
    if s.num_experts not in POWERS | {288, 576}:
        return f"on CUDA, {s.num_experts} experts have no fused top-k kernel (powers of two up to 512, 288 and 576 have)"
    return None


def _gguf_eight(s: Subject) -> str | None:
    return (
        "llama-quantize gives attention tensors of 8-expert models more bits (Mixtral's rule)" if s.num_experts == 8 else None
    )


# fmt: off
RULES: tuple[Rule, ...] = (
    _rule(
        "transformers-count",
        "A decoder layer's experts are one stacked parameter with as many entries as config.json says.",
        "models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3Experts.__init__",
        "error", _surplus, "config.json and weights do not belong together",
    ),
    _rule(
        "transformers-top-k",
        "The router takes the top_k of all expert scores, so there have to be as many.",
        "models/deepseek_v2/modeling_deepseek_v2.py, DeepseekV2TopkRouter.forward (torch.topk)",
        "error", _top_k, MORE,
    ),
    _rule(
        "transformers-groups",
        "A group-limited router views its scores as n_group groups of equal size.",
        "models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3TopkRouter.forward (scores_for_choice.view)",
        "error", _indivisible, LAYOUT,
    ),
    _rule(
        "transformers-top-groups",
        "The router takes topk_group of n_group group scores.",
        "models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3TopkRouter.forward (torch.topk)",
        "error", _too_many_groups, "set topk_group to at most n_group",
    ),
    _rule(
        "transformers-group-score",
        "A group's score is the sum of its two best experts, so a group needs two.",
        "models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3TopkRouter.forward (.topk(2, dim=-1))",
        "error", _lonely_group, f"{MORE}, or plan with --router-groups flatten",
    ),
    _rule(
        "transformers-reach",
        "Where the chosen groups hold fewer than top_k experts, the choice is filled up from the masked groups.",
        "models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3TopkRouter.forward (masked_fill, torch.topk)",
        "warning", _out_of_reach, f"{MORE}, or plan with --router-groups flatten",
    ),
    _rule(
        "transformers-group-default",
        "A config.json without the group keys gets the config class's own, not one group.",
        "models/deepseek_v3/configuration_deepseek_v3.py, DeepseekV3Config (also axk1, bailing_hybrid, beam, deepseek_v32)",
        "warning", _group_default, "write the number of groups and topk_group into config.json, 1 and 1 for none",
    ),
    _rule(
        "transformers-sparsemixer",
        "Phi-3.5-MoE's sparsemixer returns two experts a token whatever top_k is.",
        "models/phimoe/modeling_phimoe.py, sparsemixer",
        "warning", _sparsemixer, "set num_experts_per_tok to 2",
    ),
    _rule(
        "transformers-expert-parallel",
        "Expert parallelism shards the experts evenly or not at all.",
        "distributed/expert_parallel.py, MoEParamShard.shard_param",
        "error", _uneven_ranks, "keep a multiple of the expert-parallel size",
    ),
    _rule(
        "vllm-nameless",
        "A config.json without architectures is taken for the family's base model, which has no language-model head.",
        "transformers_utils/config.py, get_config (MODEL_MAPPING_NAMES)",
        "warning", _nameless, "copy architectures from the original model's config.json",
    ),
    _rule(
        "vllm-registry",
        "An architecture that the registry lacks runs on vLLM's transformers backend, if its transformers class allows "
        "that.",
        "model_executor/models/registry.py, _VLLM_MODELS and _ModelRegistry._try_resolve_transformers",
        "warning", _missing("vllm"), "try it before you rely on it: vLLM falls back to its transformers backend",
    ),
    _rule(
        "vllm-top-k",
        "A CPU router takes the top_k of all scores; the grouped kernel wants top_k experts in the groups that a token "
        "may use.",
        f"{MOE}/router/cpu_router.py, _softmax_topk; csrc/moe/grouped_topk_kernels.cu, grouped_topk",
        "error", lambda s: _top_k(s) or _out_of_reach(s), MORE,
    ),
    _rule(
        "vllm-top-groups",
        "The grouped kernel wants topk_group <= n_group.",
        "csrc/moe/grouped_topk_kernels.cu, grouped_topk",
        "error", _too_many_groups, "set topk_group to at most n_group",
    ),
    _rule(
        "vllm-groups",
        "Groups that the experts do not divide into, or that are not fewer than the experts, are dropped without a word "
        "(and fail on a CPU).",
        f"{MOE}/router/grouped_topk_router.py, GroupedTopKRouter._compute_routing (valid_grouping); "
        "router/cpu_router.py, _grouped_topk",
        "warning", _vllm_ungrouped, LAYOUT,
    ),
    _rule(
        "vllm-router-keys",
        "The block of DeepSeek V3, V3.2 and GLM-5 has sigmoid scores and a selection bias only if config.json names "
        "them; transformers does not write these keys.",
        "model_executor/models/deepseek_v2.py, DeepseekV2MoE.__init__ (getattr topk_method, scoring_func) and load_weights",
        "error", _lacks("deepseek_v3 deepseek_v32 glm_moe_dsa", "topk_method", "scoring_func"), ROUTER_KEYS,
    ),
    _rule(
        "vllm-minimax-keys",
        "MiniMax-M2's block reads scoring_func without a default and has a selection bias only with use_routing_bias; "
        "transformers does not write these keys.",
        "model_executor/models/minimax_m2.py, MiniMaxM2MoE.__init__",
        "error", _lacks("minimax_m2", "scoring_func", "use_routing_bias"), MINIMAX_KEYS,
    ),
    _rule(
        "vllm-v2-none",
        "DeepSeek V2's block always asks for grouped routing, which wants numbers for n_group and topk_group.",
        f"model_executor/models/deepseek_v2.py, DeepseekV2MoE.__init__; {MOE}/router/router_factory.py, "
        "create_fused_moe_router",
        "error", _vllm_v2_none, "set n_group and topk_group to 1",
    ),
    _rule(
        "vllm-v2-greedy",
        "DeepSeek V2's block applies n_group whatever topk_method is.",
        "model_executor/models/deepseek_v2.py, DeepseekV2MoE.__init__ (use_grouped_topk=True)",
        "warning", _vllm_v2_greedy, "set n_group and topk_group to 1",
    ),
    _rule(
        "vllm-grouped-kernel",
        "Beyond 32 groups or top_k 32, grouped routing runs in torch.",
        f"{MOE}/router/grouped_topk_router.py, grouped_topk",
        "info", _vllm_grouped_kernel,
    ),
    _rule(
        "vllm-grouped-small",
        "Up to 256 experts, 32 a group, 128 in the chosen groups, top_k 8 and 4 chosen groups take a faster kernel; "
        "others the general one.",
        "csrc/moe/grouped_topk_kernels.cu, invokeNoAuxTc (is_multi_group)",
        "info", _vllm_small_kernel,
    ),
    _rule(
        "vllm-topk-kernel",
        "Other numbers of experts take two kernels, softmax or sigmoid and then top-k; on ROCm only powers of two are "
        "fused.",
        "csrc/moe/topk_softmax_kernels.cu, topkGatingKernelLauncher",
        "info", _vllm_topk,
    ),
    _rule(
        "vllm-v4-topk",
        "DeepSeek V4's top-k kernel is compiled for certain numbers of experts and has no fallback.",
        "csrc/moe/topk_softplus_sqrt_kernels.cu, topkGatingSoftplusSqrtKernelLauncher (Unsupported expert number), from "
        f"{MOE}/router/fused_topk_bias_router.py, fused_topk_bias",
        "error", _vllm_v4, "keep 512, 448, 384, 320, 256, 192, 128 or 64 experts",
    ),
    _rule(
        "vllm-v4-topk-cpu",
        "DeepSeek V4's CPU kernel takes 64, 128, 256 or 384 experts with top_k 6 or 8 (or 9 of 256), with no fallback.",
        "csrc/cpu/sgl-kernels/topk.cpp, biased_topk_cpu",
        "warning", _vllm_v4_cpu, "keep 256, 128 or 64 experts to serve on a CPU",
    ),
    _rule(
        "vllm-fp32-router",
        "The fp32 router kernel is compiled for hidden size 3072 with 256 experts and 6144 with 128; other shapes take a "
        "general GEMM.",
        f"{MOE}/router/gate_linear.py, GateLinear.FP32_SUPPORTED_SHAPES and forward; csrc/fp32_router_gemm_entry.cu",
        "info", _vllm_fp32_router,
    ),
    _rule(
        "vllm-align",
        "The CUDA kernel that sorts tokens by expert takes fewer than 1024 experts, counted in steps of 32.",
        "csrc/moe/moe_align_sum_kernels.cu, moe_align_block_size (padded_num_experts < 1024)",
        "warning", _vllm_align, "keep 992 experts or fewer",
    ),
    _rule(
        "vllm-tensor-parallel",
        "The block of these families refuses more tensor-parallel ranks than experts.",
        "model_executor/models/qwen3_moe.py, Qwen3MoeSparseMoeBlock.__init__ (and the other families' blocks)",
        "error", _small_tp(VLLM_TP), "use fewer tensor-parallel ranks",
    ),
    _rule(
        "vllm-expert-parallel",
        "Ranks may hold different numbers of experts, but load balancing (--enable-eplb) wants them equal, redundant "
        "ones counted.",
        f"{MOE}/expert_map_manager.py, determine_expert_map; {MOE}/layer.py, FusedMoEFactory (EPLB currently only "
        "supports even distribution)",
        "warning", _uneven_ranks, "serve without --enable-eplb, or set num_redundant_experts so that the sum divides",
    ),
    _rule(
        "vllm-keys",
        "The number of experts is the first found of num_experts, moe_num_experts, n_routed_experts and num_local_experts.",
        "transformers_utils/model_arch_config_convertor.py, get_num_experts",
        "warning", _disagree(VLLM_KEYS), "make the keys agree, or delete the stale one",
    ),
    _rule(
        "vllm-sparsemixer",
        "Phi-3.5-MoE's routing function takes top-2 only.",
        "model_executor/models/phimoe.py, phimoe_routing_function (assert topk == 2)",
        "error", _sparsemixer, "set num_experts_per_tok to 2",
    ),
    _rule(
        "vllm-cpu-sigmoid",
        "On a CPU, ungrouped routing is softmax only.",
        f"{MOE}/router/cpu_router.py, CPURouter._compute_routing; model_executor/models/minimax_m2.py and laguna.py (no "
        "grouped top-k)",
        "warning", _vllm_cpu_sigmoid, "serve it on a GPU",
    ),
    _rule(
        "vllm-cpu-bias",
        "On a CPU, ungrouped softmax routing does not add the selection bias.",
        f"{MOE}/router/cpu_router.py, CPURouter._compute_routing; model_executor/models/ernie45_moe.py",
        "warning", _vllm_cpu_bias, "serve it on a GPU, or compare outputs first",
    ),
    _rule(
        "vllm-cpu-heads",
        "CPU attention is compiled for head sizes 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256 and 512.",
        "csrc/cpu/generate_cpu_attn_dispatch.py (HEAD_DIMS_32, HEAD_DIMS_16)",
        "warning", _vllm_cpu_heads, "serve it on a GPU or with transformers",
    ),
    _rule(
        "sglang-nameless",
        "A model is found by the architectures entry of config.json.",
        "srt/models/registry.py, resolve_model_cls",
        "error", _nameless, "copy architectures from the original model's config.json",
    ),
    _rule(
        "sglang-registry",
        "An architecture that the registry lacks runs on SGLang's transformers backend.",
        "srt/models (EntryClass); srt/model_loader/utils.py, resolve_transformers_arch",
        "warning", _missing("sglang", but=SGLANG_NO_BACKEND),
        "try it before you rely on it: SGLang falls back to its transformers backend",
    ),
    _rule(
        "sglang-no-backend",
        "The transformers backend refuses classes whose is_backend_compatible() is False.",
        "srt/model_loader/utils.py, resolve_transformers_arch; transformers 5.23.0 for the classes",
        "error", _missing("sglang", only=SGLANG_NO_BACKEND), "use another engine",
    ),
    _rule(
        "sglang-top-k",
        "The router takes the top_k of all expert scores, so there have to be as many.",
        "srt/layers/moe/topk.py, biased_topk_impl (torch.topk); kernels/jit/csrc/moe/moe_topk_sigmoid.cuh (topk <= "
        "num_experts)",
        "error", _top_k, MORE,
    ),
    _rule(
        "sglang-groups",
        "The grouped router asserts that the experts divide into the groups.",
        "kernels/ops/moe/moe_fused_gate.py, moe_fused_gate",
        "error", _indivisible, LAYOUT,
    ),
    _rule(
        "sglang-top-groups",
        "The grouped router asserts 1 <= topk_group <= num_expert_group.",
        "kernels/ops/moe/moe_fused_gate.py, moe_fused_gate",
        "error", _too_many_groups, "set topk_group to at most n_group",
    ),
    _rule(
        "sglang-router-keys",
        "The blocks of the DeepSeek family and of MiMo-V2 read topk_method and scoring_func without a default; "
        "transformers does not write these keys.",
        "srt/models/deepseek_v2.py, MoEGate.__init__ and DeepseekV2MoE.__init__; srt/models/mimo_v2.py",
        "error", _sglang_keys,
        "copy topk_method and scoring_func from the original model's config.json",
    ),
    _rule(
        "sglang-minimax-keys",
        "MiniMax-M2's block reads scoring_func without a default and has a selection bias only with use_routing_bias; "
        "transformers does not write these keys.",
        "srt/models/minimax_m2.py, MiniMaxM2MoE.__init__",
        "error", _lacks("minimax_m2", "scoring_func", "use_routing_bias"), MINIMAX_KEYS,
    ),
    _rule(
        "sglang-expert-parallel",
        "Every expert-parallel rank holds the same number of experts.",
        "srt/layers/moe/fused_moe_triton/layer.py, FusedMoE.__init__ (assert _num_global_routed % storage_ep_size == 0)",
        "error", _uneven_ranks, "keep a multiple of the expert-parallel size",
    ),
    _rule(
        "sglang-tensor-parallel",
        "The block of these families refuses more tensor-parallel ranks than experts.",
        "srt/models/deepseek_v2.py, DeepseekV2MoE.__init__ (and the other families' blocks)",
        "error", _small_tp(SGLANG_TP), "use fewer tensor-parallel ranks",
    ),
    _rule(
        "sglang-topk-kernel",
        "Other numbers of experts take two kernels, softmax and then top-k.",
        "kernels/ops/moe/moe_topk_softmax.py; kernels/jit/csrc/moe/moe_topk_softmax.cuh, topkGatingSoftmaxKernelLauncher",
        "info", _sglang_topk,
    ),
    _rule(
        "sglang-grouped-kernel",
        "flashinfer's grouped kernel takes a power of two of experts, 32 a group, 128 in the chosen groups and top_k 8; "
        "else a Triton kernel that takes any number does it.",
        "srt/layers/moe/topk.py, biased_grouped_topk_gpu",
        "info", _sglang_grouped,
    ),
    _rule(
        "sglang-shared-fusion",
        "The shared expert is fused into the routed ones for 256 experts (and 384 in one quantization) only.",
        "srt/models/deepseek_v2.py, shared_experts_fusion_disable_reason",
        "info", _sglang_shared,
    ),
    _rule(
        "llama.cpp-nameless",
        "The converter finds a model by the architectures entry of config.json.",
        "conversion/base.py, get_model_architecture",
        "error", _nameless, "copy architectures from the original model's config.json",
    ),
    _rule(
        "llama.cpp-registry",
        "The converter knows the architectures of its table only.",
        "conversion/__init__.py, TEXT_MODEL_MAP and get_model_class",
        "error", _missing("llama.cpp"),
        "use another engine (for Phi-3.5-MoE, name it PhiMoEForCausalLM as the original does)",
    ),
    _rule(
        "llama.cpp-max-experts",
        "A model has at most 1024 experts a layer.",
        "src/llama-hparams.h, LLAMA_MAX_EXPERTS; src/llama-model.cpp, load_hparams",
        "error", _gguf_limit, "keep 1024 experts or fewer",
    ),
    _rule(
        "llama.cpp-top-k",
        "n_expert_used is at most n_expert.",
        "src/llama-model.cpp, load_hparams (GGML_ASSERT(n_expert_used_max <= hparams.n_expert))",
        "error", _top_k, MORE,
    ),
    _rule(
        "llama.cpp-group-count",
        "There are fewer groups than experts, also where the model has one group.",
        "src/llama-model.cpp, load_hparams (GGML_ASSERT(hparams.n_expert_groups < hparams.n_expert))",
        "error", _gguf_group_count, MORE,
    ),
    _rule(
        "llama.cpp-groups",
        "The experts divide into the groups.",
        "src/llama-model.cpp, load_hparams (GGML_ASSERT(hparams.n_expert % hparams.n_expert_groups == 0))",
        "error", _gguf_indivisible, LAYOUT,
    ),
    _rule(
        "llama.cpp-top-groups",
        "Of more than one group a token uses at least one and not all.",
        "src/llama-model.cpp, load_hparams (GGML_ASSERT(hparams.n_group_used < hparams.n_expert_groups))",
        "error", _gguf_top_groups, "if a token may use every group, set n_group and topk_group to 1",
    ),
    _rule(
        "llama.cpp-group-score",
        "Every model's groups are scored by the sum of their two best experts.",
        "src/llama-graph.cpp, build_moe_ffn (ggml_argsort_top_k(ctx0, selection_groups, 2)); conversion/base.py",
        "warning", _gguf_group_score, "compare outputs first",
    ),
    _rule(
        "llama.cpp-group-key",
        "The converter reads the number of groups from n_group only.",
        "conversion/base.py, TextModel.set_gguf_parameters",
        "warning", _gguf_group_key, "compare outputs first",
    ),
    _rule(
        "llama.cpp-scores",
        "Without scoring_func in config.json DeepSeek V3's scores become softmax, and V3.2 does not load; transformers does "
        "not write this key.",
        "conversion/base.py, TextModel.set_gguf_parameters; src/models/deepseek2.cpp and deepseek32.cpp (expert_gating_func)",
        "error", _lacks("deepseek_v3 deepseek_v32", "scoring_func"), ROUTER_KEYS,
    ),
    _rule(
        "llama.cpp-keys",
        "The number of experts is the first found of num_local_experts, num_experts and n_routed_experts.",
        "conversion/base.py, TextModel.set_gguf_parameters",
        "warning", _disagree(LLAMA_KEYS), "make the keys agree, or delete the stale one",
    ),
    _rule(
        "llama.cpp-topk-kernel",
        "Other numbers of experts take the unfused operations.",
        "ggml/src/ggml-cuda/topk-moe.cu, ggml_cuda_should_use_topk_moe",
        "info", _gguf_topk,
    ),
    _rule(
        "llama.cpp-eight",
        "The quantization mix has a rule for exactly 8 experts, so files of the same type are not comparable across "
        "counts.",
        "src/llama-quant.cpp (n_expert == 8)",
        "info", _gguf_eight,
    ),
)
# fmt: on

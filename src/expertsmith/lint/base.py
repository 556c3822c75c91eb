"""Common parts of the engines' rules: input, text and findings of a rule, and tests and facts for several engines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from expertsmith.arch import config_first, config_get
from expertsmith.checkpoint.floats import quantisation_config, quantisation_of
from expertsmith.errors import UserError
from expertsmith.experts.inventory import MTP_KEYS, NEURONS_KEY, Inventory, novices_of

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Subject:
    """The input of the tests: a checkpoint's router in numbers, and how it will be served."""

    model_type: str
    num_experts: int
    top_k: int
    groups: int = 1  # expert_groups in force
    top_groups: int = 1
    group_minimum: int = 1
    group_key: str | None = None
    group_alias: str | None = None
    group_default: tuple[int, int] = (1, 1)  # transformers' default if config.json has no groups
    score: str = "softmax"
    architectures: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)  # the text part of config.json
    counts: Mapping[int, int] = field(default_factory=dict)  # experts in the tensors of each decoder layer
    declared: Mapping[int, int] = field(default_factory=dict)  # decoder layers' own numbers of experts in config.json
    chosen: Mapping[int, int] = field(default_factory=dict)  # decoder layers' own top_k in config.json
    extras: Mapping[str, Any] = field(default_factory=dict)  # entries of expertsmith itself in config.json
    quantisation: Mapping[str, Any] = field(default_factory=dict)  # its settings in config.json (or hf_quant_config.json)
    mixed: str = ""  # experts of one decoder layer that are stored in different ways
    mtp: bool = False  # there are tensors of multi-token prediction
    width: int = 0  # neurons of an expert; 0 if config.json does not say
    tensor_parallel: int = 1
    expert_parallel: int = 1
    inventory: Inventory | None = None

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream; 0 if config.json does not say."""
        return self._number("hidden_size")

    @property
    def head_dim(self) -> int:
        """Width of an attention head; 0 if config.json does not say."""
        heads = self._number("num_attention_heads")
        return self._number("head_dim") or (self.hidden_size // heads if heads else 0)

    @property
    def method(self) -> str:
        """quant_method; "" if nothing is quantised."""
        return str(self.quantisation.get("quant_method") or "").lower()

    @property
    def width_of_rank(self) -> int:
        """Neurons of an expert on one rank: tensor parallelism splits them, unless expert parallelism distributes whole experts."""
        return self.width if self.expert_parallel > 1 else self.width // self.tensor_parallel

    @property
    def fewest(self) -> int:
        """The smallest number of experts in a layer."""
        return min([self.num_experts, *self.declared.values()])

    @property
    def reachable(self) -> int:
        """The number of experts that one token may select from, in the layer with the fewest."""
        return self.fewest // self.groups * self.top_groups if self.groups > 1 else self.fewest

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


Test = Callable[[Subject], str | None]  # returns the message, or None


def make_rule(version: str, id: str, says: str, where: str, level: Level, test: Test, remedy: str = "") -> Rule:
    """A rule whose findings have one level and one remedy; the id begins with the engine's name."""

    def find(subject: Subject) -> Finding | None:
        message = test(subject)
        return Finding(rule, level, message, remedy) if message else None

    rule = Rule(id, id.split("-")[0], says, f"{version}, {where}", find)
    return rule


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

    def classes(layer: int) -> int:
        """Experts that the router selects from."""
        return inventory.experts_in(layer) + inventory.novices.get(layer, 0)

    return Subject(
        model_type=record.runs_as or record.model_type,  # engines that support the family use the same name
        num_experts=inventory.num_experts,
        top_k=inventory.top_k,
        groups=rules.groups,
        top_groups=rules.top_groups,
        group_minimum=rules.group_minimum,
        group_key=record.group_key,
        group_alias=record.group_alias,
        group_default=record.group_default,
        score=record.score,
        architectures=tuple(str(name) for name in named),
        config=config,
        declared={layer: classes(layer) for layer in inventory.layers if layer in inventory.overrides},
        chosen={layer: inventory.chosen[layer] for layer in inventory.layers if layer in inventory.chosen},
        extras=inventory.checkpoint.config.get("expertsmith") or {},
        # stacked tensors match config.json; otherwise the inventory would have failed
        counts={layer: classes(layer) + max(0, len(held) - inventory.experts_in(layer) - zero) for layer, held in seen.items()},
        quantisation=quantisation_config(inventory.checkpoint),
        mixed=_mixed(inventory),
        mtp=inventory.has_mtp,
        width=_width(inventory),
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
        inventory=inventory,
    )


def _width(inventory: Inventory) -> int:
    found = config_first(inventory.config, inventory.architecture.expert_width_key)
    value = 0 if found is None else max(found[1], default=0) if isinstance(found[1], list) else found[1]
    return value if isinstance(value, int) else 0


def _mixed(inventory: Inventory) -> str:
    """A message about the first decoder layer whose experts are stored in different ways: other tensor names, dtypes or bits."""
    if not quantisation_config(inventory.checkpoint):
        return ""
    try:
        found = quantisation_of(inventory.checkpoint)
    except UserError:  # not decodable: compare names and dtypes only
        found = None
    bits = {
        info.name: entry.settings.get("bits")
        for entry in (found.stored.values() if found else ())
        for info in entry.parts.values()
    }
    for layer, count in inventory.counts.items():
        ways: dict[str, set[tuple[str, str, Any]]] = {}
        for claim in inventory.by_layer[layer]:
            if claim.kind == "expert" and claim.expert is not None and claim.expert < count:
                cut = re.search(r"\.(?=(weight|bias)($|[._]))|\.(?=[^.]+$)", claim.info.name)
                assert cut is not None
                module, leaf = claim.info.name[: cut.start()], claim.info.name[cut.end() :]
                ways.setdefault(module, set()).add((leaf, claim.info.dtype, bits.get(claim.info.name)))
        modules = sorted(ways)
        odd = next((module for module in modules if ways[module] != ways[modules[0]]), None)
        if odd is not None:
            return f"{odd} is stored differently from {modules[0]}"
    return ""


def _extra(extra: int | str, config: Mapping[str, Any]) -> int:
    return extra if isinstance(extra, int) else int(config_get(config, extra) or 0)


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# --- facts that several engines share ---

POWERS = frozenset(2**n for n in range(10))  # 1 ... 512
# families that select experts with other kernels: their own functions, zero experts, sqrt(softplus) scores, a group of one
OWN_TOPK = names(
    "afmoe cohere2_moe deepseek_v4 gemma4_text gpt_oss hy_v3 inkling_text lfm2_moe llama4_text longcat_flash phimoe"
)

EVEN = "plan with --uniform, or apply with --pad (not possible for all families)"
COMPUTED = "the engine computes all top_k experts; serve it from Python with expertsmith.load to skip"
LAYOUT = "keep a number that is divisible by the number of expert_groups, or plan with --router-groups flatten"
MORE = "keep more experts"
# keys that engines read from config.json for the DeepSeek family and transformers does not write
ROUTER_KEYS = 'copy "topk_method": "noaux_tc" and "scoring_func": "sigmoid" from the original model\'s config.json'
MINIMAX_KEYS = 'copy "scoring_func": "sigmoid" and "use_routing_bias": true from the original model\'s config.json'


FLOATS = "write it in bfloat16 first: `expertsmith dequantise`"
FEWER_RANKS = "use fewer tensor-parallel ranks, or expert parallelism, which does not split experts"


# --- tests that several engines share ---


def unknown_method(engine: str, known: frozenset[str]) -> Test:
    """A quant_method that is not among the `known` ones."""

    def test(s: Subject) -> str | None:
        return f"{engine} does not support quant_method {s.method!r}" if s.method and s.method not in known else None

    return test


def mixed_experts(s: Subject) -> str | None:
    """Experts of one decoder layer that are stored in different ways."""
    return s.mixed or None


def unfit_blocks(s: Subject) -> str | None:
    """FP8 blocks into which the neurons of an expert on one rank do not divide."""
    block = s.quantisation.get("weight_block_size")
    if s.method != "fp8" or not isinstance(block, list) or len(block) != 2 or not s.width:
        return None
    rows, columns = block
    if s.width_of_rank % rows == 0 and (s.tensor_parallel == 1 or s.width_of_rank % columns == 0):
        return None
    return f"an expert has {s.width_of_rank} neurons on each rank, which is not divisible into blocks of {rows} x {columns}"


def too_few(s: Subject) -> str | None:
    """There are fewer experts than a token uses."""
    short = []
    for layer in {*s.counts, *s.chosen, *s.declared}:
        top_k, count = s.chosen.get(layer, s.top_k), s.declared.get(layer, s.num_experts)
        if top_k > count:
            place = f" in decoder layer {layer}" if layer in s.chosen or layer in s.declared else ""
            short.append((count, layer, f"each token uses {top_k} experts, but there are {count}{place}"))
    return min(short)[2] if short else None


def indivisible(s: Subject) -> str | None:
    """The experts do not divide into the expert_groups."""
    return f"{s.num_experts} experts do not divide into {s.groups} expert_groups" if s.num_experts % s.groups else None


def too_many_groups(s: Subject) -> str | None:
    """A token uses no expert_group, or more than there are."""
    if s.groups > 1 and not 1 <= s.top_groups <= s.groups:
        return f"each token uses {s.top_groups} expert_groups, but there are {s.groups}"
    return None


def out_of_reach(s: Subject) -> str | None:
    """The expert_groups that a token may use hold fewer than top_k experts."""
    if s.groups > 1 and s.reachable < s.top_k <= s.fewest:
        return f"each token uses {s.top_k} experts, but the {s.top_groups} of {s.groups} expert_groups it may use have {s.reachable}"
    return None


def uneven(s: Subject) -> str | None:
    """Layers have different numbers of experts."""
    counts = {s.num_experts, *s.declared.values()}
    return f"decoder layers have {min(counts)} to {max(counts)} experts" if len(counts) > 1 else None


def pruned_attention(s: Subject) -> str | None:
    """Attention was pruned by `convert`: fewer query-key than value dimensions, or value dimensions chosen for every token."""
    return "attention was pruned (expertsmith_attention in config.json)" if "expertsmith_attention" in s.config else None


def constants(s: Subject) -> str | None:
    """Experts are constants."""
    count = sum(novices_of(s.config).values())
    return f"{count} experts are constants (expertsmith_novices in config.json)" if count else None


def narrowed(s: Subject) -> str | None:
    """Experts have other widths than config.json says."""
    said = [
        number for held in (s.config.get(NEURONS_KEY) or {}).values() for number in (held if isinstance(held, list) else [held])
    ]
    return f"experts have {min(said)} to {max(said)} neurons ({NEURONS_KEY} in config.json)" if said else None


def indivisible_width(s: Subject) -> str | None:
    """The experts' width does not divide into the ranks' parts."""
    if s.expert_parallel > 1 or not s.width or s.width % s.tensor_parallel == 0:
        return None
    return f"experts have {s.width} neurons, which {s.tensor_parallel} ranks cannot share equally"


def ragged(s: Subject) -> str | None:
    """Experts of one layer have different widths."""
    layers = [layer for layer, held in (s.config.get(NEURONS_KEY) or {}).items() if isinstance(held, list)]
    return f"experts of {len(layers)} layers have different numbers of neurons within the layer" if layers else None


def padded(s: Subject) -> str | None:
    """Layers are filled up with dead experts."""
    alive: Mapping[str, int] = s.extras.get("alive") or {}
    dead = {layer: s.num_experts - count for layer, count in alive.items() if count < s.num_experts}
    if not dead:
        return None
    return f"{sum(dead.values())} dead experts in {len(dead)} decoder layers are kept unselected by a bias of -inf (or -1e30)"


def thresholds(s: Subject) -> str | None:
    """There are skipping thresholds."""
    return "config.json has skip thresholds, which only expertsmith applies" if "skip" in s.extras else None


def uneven_ranks(s: Subject) -> str | None:
    """The experts do not divide among the expert-parallel ranks."""
    if s.expert_parallel > 1 and s.num_experts % s.expert_parallel:
        return f"{s.num_experts} experts do not divide among {s.expert_parallel} expert-parallel ranks"
    return None


def small_tp(families: frozenset[str]) -> Test:
    """One of `families`, on more tensor-parallel ranks than experts."""

    def test(s: Subject) -> str | None:
        if s.model_type in families and s.tensor_parallel > s.num_experts:
            return f"tensor-parallel size {s.tensor_parallel} is greater than the number of experts, {s.num_experts}"
        return None

    return test


def missing(engine: str, absent: frozenset[str]) -> Test:
    """The first of `architectures` is among those that the engine's registry does not have."""

    def test(s: Subject) -> str | None:
        name = s.architectures[0] if s.architectures else ""
        return f"{engine} has no model {name}" if name in absent else None

    return test


def speculative(engine: str, families: frozenset[str], option: str) -> Test:
    """There is multi-token prediction: whether the engine decodes speculatively with it, and how."""

    def test(s: Subject) -> str | None:
        if not s.mtp:
            return None
        if s.model_type in families:
            return f"its multi-token prediction serves speculative decoding: {option}"
        return f"{engine} does not use the multi-token prediction of {s.model_type} for speculative decoding, so it only takes disk space"

    return test


def without_mtp(s: Subject) -> str | None:
    """config.json sets the number of multi-token-prediction layers to 0."""
    key = next((key for key in MTP_KEYS if s.config.get(key) == 0 and not isinstance(s.config[key], bool)), None)
    return f"config.json has {key} = 0: there is no multi-token prediction for speculative decoding" if key else None


def nameless(s: Subject) -> str | None:
    """config.json has no architectures."""
    return None if s.architectures else "config.json has no architectures"


def disagree(keys: tuple[str, ...]) -> Test:
    """The first of `keys` that config.json holds is not the model's number of experts."""

    def test(s: Subject) -> str | None:
        read = next((key for key in keys if isinstance(s.config.get(key), int)), None)
        if read is not None and s.config[read] != s.num_experts:
            return f"config.json says {read} = {s.config[read]}, but the model has {s.num_experts} experts"
        return None

    return test


def lacks(families: str, *keys: str) -> Test:
    """One of `families` (names with spaces between), and config.json does not hold all of `keys`."""
    wanted = names(families)

    def test(s: Subject) -> str | None:
        absent = [key for key in keys if s.config.get(key) is None]
        return f"config.json has no {' and no '.join(absent)}" if s.model_type in wanted and absent else None

    return test


def sparsemixer(s: Subject) -> str | None:
    """Phi-3.5-MoE with another top_k than 2."""
    return (
        f"each token uses {s.top_k} experts, but sparsemixer always selects 2"
        if s.model_type == "phimoe" and s.top_k != 2
        else None
    )

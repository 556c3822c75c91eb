"""Everything that expertsmith needs to know about a model family: one declarative record, no code paths.

A record says where to find the routed experts in config.json, in the checkpoint's tensor names and in the module tree, and how the
block's output is added to the residual stream. It has no code for files or forwards; `checkpoint` and `calibration` read it.
Field names use the project's words ("router"); values keep upstream's spelling ("gate").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# the language model's decoder layers only: vision towers and multi-token-prediction stacks have layers too
LAYER_PATTERN = re.compile(
    r"^(?:(?:model|language_model|thinker|backbone|transformer|decoder|llm)\.)*(?:layers|blocks)\.(?P<layer>\d+)\.(?P<rest>.+)$"
)

# decoder layers of a multi-token-prediction stack whose numbers do not continue after the last layer
MTP_LAYER_PATTERN = re.compile(r"^(?:(?:model|language_model)\.)*mtp\.layers\.(?P<number>\d+)\.(?P<rest>.+)$")
MTP_PATTERN = re.compile(r"(^|\.)mtp[._]")  # everything in such a stack


# How one expert's slice of a tensor holds its projections. gate, up: one row per neuron; down: one column per neuron; gate_up: gate rows,
# then up rows; alternating: gate and up rows alternate; _t: the same transposed. A bias has the layout of its weight.
Layout = Literal["gate", "up", "down", "down_t", "gate_up", "gate_up_t", "alternating", "alternating_t"]
LEAVES: dict[str, Layout] = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up"}


def roles_of(layout: Layout) -> tuple[str, ...]:
    """The projections that a tensor of this layout holds."""
    return ("gate", "up") if layout.startswith(("gate_up", "alternating")) else (layout.removesuffix("_t"),)


def split(layout: Layout, tensor: Any) -> dict[str, Any]:
    """Views of one expert's matrix (or bias) by role: gate and up [neurons, inputs], down [outputs, neurons]; biases [neurons], [outputs].

    Writing to a view changes the tensor.
    """
    if layout.endswith("_t") and tensor.dim() == 2:
        tensor = tensor.T
    if layout.startswith("gate_up"):
        half = tensor.shape[0] // 2
        return {"gate": tensor[:half], "up": tensor[half:]}
    if layout.startswith("alternating"):
        return {"gate": tensor[::2], "up": tensor[1::2]}
    return {layout.removesuffix("_t"): tensor}


def neuron_axis(layout: Layout, dims: int) -> int | None:
    """The axis of one expert's matrix or bias that runs over neurons; None for the bias of the down projection."""
    down = layout.startswith("down")
    if dims == 1:
        return None if down else 0
    return int(down != layout.endswith("_t"))


@dataclass(frozen=True)
class Stacked:
    """A checkpoint tensor with rows for all routed experts.

    `name` is relative to the decoder layer. The first axis (after a leading axis of length 1, if any) has
    `num_experts * rows_per_expert + extra` rows; rows_per_expert follows from the shape. The `extra` rows after the experts' (shared
    experts, zero experts, skip classes) are always kept; `extra` is an integer, or the config key with their number. `layout`: of an
    expert's slice, if it does not follow from the name (`LEAVES`).
    """

    name: str
    role: Literal["expert", "router"] = "expert"
    extra: int | str = 0
    layout: Layout | None = None


# all experts of a layer fused: the layout in memory, and in checkpoints saved by transformers
FUSED = (Stacked("mlp.experts.gate_up_proj"), Stacked("mlp.experts.down_proj"))


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model family (`model_type` of config.json).

    Config keys are dotted paths below the text config. The first name is that of original checkpoints, the others are other spellings in
    use (transformers renames some on save).
    """

    model_type: str
    title: str  # for people, with an example checkpoint: "Qwen2-MoE (Qwen1.5-MoE-A2.7B)"
    status: Literal["full", "partial", "refused"] = "full"
    notes: str = ""  # peculiarities, or why the family is refused; one or two plain sentences

    # config.json
    experts_key: tuple[str, ...] = ("num_experts",)
    top_k_key: tuple[str, ...] = ("num_experts_per_tok",)
    group_key: str | None = None  # number of expert_groups of a group-limited router
    group_alias: str | None = None  # another spelling of group_key
    top_group_key: str | None = None  # number of expert_groups that a token may use
    group_minimum: int = 1  # experts that an expert_group needs for its score: 2 if the score is a top-2 sum
    group_default: tuple[int, int] = (1, 1)  # transformers' values if the config lacks the two keys
    group_active: tuple[str, tuple[Any, ...]] | None = None  # (config key, values) with which groups are used; None: always
    shared_key: str | None = None  # number of shared experts, if the config has it
    expert_width_key: tuple[str, ...] = ("moe_intermediate_size",)
    # what else the experts' width in config.json sizes: "shared" experts, as width * shared_key; or modules that nothing else in it can size
    # ("more"); None: shared experts if there is a shared_key, otherwise nothing
    width_sizes: Literal["nothing", "shared", "more"] | None = None
    same_as: tuple[
        tuple[str, str], ...
    ] = ()  # (key, other): if config.json lacks `key`, use the value of `other`, not transformers' guess
    extra_config_keys: tuple[str, ...] = ()  # other keys that repeat the number of experts

    # the checkpoint's tensor names, relative to a decoder layer
    expert_prefix: tuple[str, ...] = ("mlp.experts.{expert}.",)  # prefix of all tensors of that expert
    projections: tuple[str | None, str, str] = (
        "gate_proj",
        "up_proj",
        "down_proj",
    )  # per expert: gate (None: no gate), up, down
    stacked: tuple[Stacked, ...] = (Stacked("mlp.gate.weight", "router"), *FUSED)

    ignored: tuple[str, ...] = ()  # regexes of tensor names that the model's class does not need

    # which class of transformers runs it
    runs_as: str | None = None  # the model_type whose classes run it, if transformers has none of this name; None: its own
    composite: str | None = None  # the model_type of the composite with this language model, if transformers runs only that
    text_prefix: str = ""  # prefix of the language model's tensor names, if those classes expect them without it
    no_class: str | None = (
        None  # why no class runs it; then only plan, data-free scores, apply and the byte comparison of verify work
    )

    transposed_by_shape: bool = False  # layouts with _t apply only if a tensor does not have the class's shape already

    # the KV cache (`arch.attention`)
    state: Callable[[Mapping[str, Any]], int] | None = (
        None  # the numbers that a layer of linear attention, Mamba or convolution keeps of a sequence; None: no such layer
    )
    cache_unknown: str | None = None  # why the config does not tell its size; None: it does

    # the module tree
    layers: str = "model.layers"  # from the causal LM to its decoder layers
    block: str = "mlp"  # from a decoder layer to the module that holds router and experts; "" = the layer itself
    router: str = "gate"  # from the block
    experts: str = "experts"  # from the block
    shared: str | None = None  # from the block: the shared expert(s)
    selection_bias: tuple[
        str, ...
    ] = ()  # from the block: biases that act only on the selection; dropped entries are masked with -inf
    logit_bias: tuple[str, ...] = ()  # from the block: biases added to the logits, so they also change the routing weights
    router_output: Literal["logits", "probabilities", "scores_logits", "logits_only"] = (
        "logits"  # the router's first return value
    )
    score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"  # from logits to full router scores
    mask_value: float = float("-inf")  # a dropped expert's logit in the masked reference
    # experts(x, selected, weights); the same, but never with a single slot; or Llama-4's: one scaled copy of x per expert
    call: Literal["routed", "pairs", "dense_inputs"] = "routed"
    unrouted_zero: bool = False  # a slot with routing weight exactly 0 is "no expert" (the router has a skip class)

    # how the block's routed output r is added to the residual stream x: x_scale * x + post_norm(r_scale * after_experts(r))
    residual: Literal["norm_input", "norm_output", "block_input"] = "norm_input"
    norm: str | None = "post_attention_layernorm"  # from the decoder layer: the norm between residual stream and block
    after_experts: str | None = None  # from the block: a module applied to the routed output
    block_scale: str | None = None  # attribute of the block that multiplies the routed output after the experts
    post_norm: str | None = None  # from the decoder layer: a norm on the block's output before the residual add
    layer_scale: str | None = None  # attribute of the decoder layer that multiplies the block's output before the add
    residual_scale: str | None = None  # attribute of the decoder layer that multiplies the residual stream at the add
    residual_exact: bool = (
        True  # x_scale * x + ... + shared is the decoder layer's output (tested); False with the reason in notes
    )

    uneven: str | None = None  # why decoder layers cannot hold different numbers of experts; None: they can
    refusal: Callable[[Mapping[str, Any]], str | None] | None = None  # the reason if the record does not support a config

    @property
    def sized_by_width(self) -> Literal["nothing", "shared", "more"]:
        """What else the experts' width in config.json sizes."""
        return self.width_sizes or ("shared" if self.shared_key else "nothing")

    @property
    def supported(self) -> bool:
        """Whether checkpoints of this family are supported at all."""
        return self.status != "refused"

    @property
    def one_group(self) -> dict[str, int]:
        """Config keys and values for a router without expert_groups."""
        return {key: 1 for key in (self.group_key, self.top_group_key) if key}

    def locate(self, name: str) -> tuple[int, str] | None:
        """(decoder layer, name below it) of a checkpoint tensor; None for tensors outside the decoder layers."""
        match = LAYER_PATTERN.match(name)
        return (int(match["layer"]), match["rest"]) if match else None

    def locate_mtp(self, name: str, depth: int | None) -> tuple[int | None, str] | None:
        """(layer, name below it) of a multi-token-prediction tensor; its layers are numbered from `depth`, the number of decoder layers.
        (None, "") for such a tensor outside of a layer; None for a tensor of the model itself."""
        located, match = self.locate(name), MTP_LAYER_PATTERN.match(name)
        if located is not None:
            return located if depth is not None and located[0] >= depth else None
        if match and depth is not None:
            return depth + int(match["number"]), match["rest"]
        return (None, "") if MTP_PATTERN.search(name) else None

    def expert_of(self, rest: str) -> tuple[int, str] | None:
        """(expert id, name below the expert) for the name of a single expert's tensor; None for other names."""
        for prefix in self.expert_prefix:
            head, tail = prefix.split("{expert}")
            if rest.startswith(head):
                digits, dot, below = rest[len(head) :].partition(tail)
                if dot and digits.isdigit():
                    return int(digits), below
        return None

    def layout_of(self, rest: str) -> Layout | None:
        """How a routed expert's tensor (or its slice of a stacked one) holds the projections; None for scales, packed codes and others."""
        owner, entry = self.expert_of(rest), self.stacked_of(rest)
        if owner is not None:
            leaf = owner[1].removesuffix(".weight").removesuffix(".bias")
            named: tuple[tuple[str | None, Layout], ...] = tuple(zip(self.projections, ("gate", "up", "down"), strict=True))
            return next((layout for name, layout in named if name == leaf), None)
        if entry is None or entry.role != "expert":
            return None
        return entry.layout or LEAVES.get(entry.name.removesuffix(".weight").removesuffix("_bias").rpartition(".")[2])

    def stacked_of(self, rest: str) -> Stacked | None:
        """The `Stacked` entry with this tensor name, or None."""
        return next((entry for entry in self.stacked if entry.name == rest), None)


def config_get(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Look up a dotted key in nested mappings."""
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return default
        config = config[part]
    return config


def config_set(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dicts, which are made where they are missing."""
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = value


def config_first(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any] | None:
    """(first of `keys` with a value in the config, that value); None if there is none."""
    for key in keys:
        value = config_get(config, key)
        if value is not None:
            return key, value
    return None


def config_present(config: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    """Those of `keys` that have a value in the config."""
    return (key for key in keys if config_get(config, key) is not None)

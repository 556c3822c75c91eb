"""Build a model from a checkpoint, either resident or streamed layer by layer."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from expertsmith.arch import Architecture, config_first, config_get, text_config
from expertsmith.arch.base import MTP_PATTERN, roles_of
from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.floats import Floats, filled, floats
from expertsmith.engine.devices import Memory, choose_device, dtype_of, free_memory
from expertsmith.engine.experts import install
from expertsmith.engine.layout import experts_of, has_experts, is_grouped
from expertsmith.engine.mtp import Ahead, ahead_of, known_names, lengthen, why_not_played
from expertsmith.engine.narrow import filled_up, is_ragged, widths_of
from expertsmith.engine.on_demand import Source, remove
from expertsmith.engine.pages import own_pages, trim
from expertsmith.engine.read_ahead import ReadAhead
from expertsmith.engine.stock import Naming, ignored, naming, quietly, read_in, renamer, splits, without_initialisation
from expertsmith.engine.trial import why_not_run
from expertsmith.engine.uneven import causal_lm, has_novices, key_mapping, read_config
from expertsmith.errors import UserError, install_line
from expertsmith.experts.inventory import Inventory, take_inventory

MOST_TOKENS, LEAST_TOKENS, BUFFER = 8192, 512, 16 * 2**20  # of a batch; bytes
SHARE_OF_A_LAYER = 0.25  # of the free memory, at most, for the experts of one decoder layer
CHECKED_AT_ONCE = 2**22  # elements
_RUNS: set[str] = set()  # configs whose models can run, as tried by this process
WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}  # safetensors' names
OTHER_PARTS = (
    r"^(model\.)?(vision|visual|audio|image|multi_modal|mm_|embed_vision|embed_audio|talker|code2wav)"  # of a composite
)
ALWAYS_LEFT_OUT = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", MTP_PATTERN.pattern)  # computed, or multi-token prediction
OUT_OF_MEMORY = "allocate memory|out of memory"  # torch says it in the text of a RuntimeError


@dataclass
class LoadedModel:
    """A causal LM whose decoder layers can be loaded and released. In `resident` mode they are always loaded.

    `ahead`: set if loaded with multi-token prediction, whose layer is then the last of `layers`, after the model's own `depth` layers.
    """

    module: nn.Module
    layers: list[nn.Module]
    checkpoint: Checkpoint
    architecture: Architecture | None
    memory: Memory
    device: torch.device
    dtype: torch.dtype
    weights: Checkpoint  # the source of the weights: the float view of a quantised checkpoint, else the checkpoint itself
    _groups: dict[int | None, list[str]] = field(default_factory=dict, repr=False)
    _naming: Naming | None = field(default=None, repr=False)
    _prefix: str = ""
    _checked: set[int] = field(default_factory=set, repr=False)
    _names: Mapping[str, str | None] = field(default_factory=dict)  # of multi-token prediction: tensor → its name in the module
    ahead: Ahead | None = None
    _reads: ReadAhead | None = None  # the reads of the layers' weights (stream)
    _experts: Inventory | None = None  # to read routed experts on demand; None: they are loaded with their layer

    @property
    def config(self) -> Any:
        """The transformers config that the model was built from."""
        return self.module.config

    @property
    def depth(self) -> int:
        """Decoder layers without multi-token prediction."""
        return len(self.layers) - (self.ahead is not None)

    @property
    def _selection_biases(self) -> frozenset[str]:
        """Names, below a decoder layer, of tensors that may hold -inf, which marks an expert that is never selected."""
        arch = self.architecture
        return frozenset(f"{arch.block}.{path}".lstrip(".") for path in arch.selection_bias) if arch else frozenset()

    @property
    def moe_layers(self) -> list[int]:
        """Decoder layers that have routed experts."""
        assert self.architecture is not None
        return [i for i, layer in enumerate(self.layers) if has_experts(layer, self.architecture)]

    def batch_tokens(self, given: int | None) -> int:
        """Tokens of a batch: `given`, or by default `MOST_TOKENS`. On a CPU the default is smaller: a buffer of all selected experts' outputs
        should stay below `BUFFER`, so that memory is reused (`pages.kept_pages`), and an expert should get 128 tokens on average."""
        if given is not None or self.device.type != "cpu" or self.architecture is None:
            return given or MOST_TOKENS
        arch, config = self.architecture, text_config(self.checkpoint.config)
        keys = (arch.experts_key, arch.top_k_key, arch.expert_width_key, ("hidden_size", "d_model"))
        found = [config_first(config, key) for key in keys]
        experts, top_k, width, hidden = (
            max(held[1]) if held and isinstance(held[1], list) else held[1] if held else 1 for held in found
        )
        fits = BUFFER // (4 * top_k * max(hidden, 2 * width))
        wanted = min(MOST_TOKENS, max(fits, 128 * experts // top_k, LEAST_TOKENS))
        return int(2 ** (int(wanted).bit_length() - 1))

    def whole(self) -> None:
        """From now on, load all experts of a layer with it, however large: needed to read or change them in memory."""
        self._experts = None
        for index in self.moe_layers if self.architecture else ():
            remove(experts_of(self.layers[index], self.architecture))  # type: ignore[arg-type]

    def bring(self, index: int) -> None:
        """Load decoder layer `index` and check that its weights are finite."""
        if self.memory == "stream":
            try:
                self._load(index)
            finally:
                if self._reads is not None:
                    self._reads.end()
        if index not in self._checked or self.memory == "stream":
            _align(self.layers[index])
        if index not in self._checked:
            _check_finite(self.layers[index], f"decoder layer {index}", selection=self._selection_biases)
            self._checked.add(index)

    def read_ahead(self, index: int) -> None:
        """Begin to read decoder layer `index` in the background, for the next `bring` (stream). Experts that are read on demand are not read
        ahead, nor is a layer beside them: memory is short."""
        if self._reads is not None and self._experts is None:
            self._reads.begin(index)

    def stop_reading(self) -> None:
        """Stop reading ahead, and return the memory that it took."""
        if self._reads is not None:
            self._reads.close()

    def release(self, index: int) -> None:
        """Release the weights of decoder layer `index` (stream)."""
        if self.memory == "stream":
            _to_meta(self.layers[index])
            trim()

    def _load(self, group: int | None) -> None:
        where = "outside the decoder layers" if group is None else f"in decoder layer {group}"
        target = self.module if group is None else self.layers[group]
        names, later = self._groups.get(group, []), set()
        if group is not None and self._experts is not None and self._reads_experts(group):
            assert self.architecture is not None
            experts = experts_of(target, self.architecture)
            names = [name for name in names if name not in self._expert_names(group)]
            install(experts, Source(self._experts, group, self.architecture, self.device))
            later = {id(p) for p in experts.parameters()}
        self._read_in(names, where)
        skipped = {id(p) for layer in self.layers for p in layer.parameters()} if group is None else later
        if group is None:
            self.module.tie_weights()  # type: ignore[operator]
        absent = [name for name, p in target.named_parameters() if p.is_meta and id(p) not in skipped]
        if absent:
            place = absent[0] if group is None else f"{self._prefix}{group}.{absent[0]}"
            raise UserError(f"the checkpoint lacks the weights of {place}", "download it again")

    def _reads_experts(self, index: int) -> bool:
        """Whether a decoder layer has experts that can be read one by one."""
        assert self.architecture is not None
        layer = self.layers[index]
        return has_experts(layer, self.architecture) and is_grouped(experts_of(layer, self.architecture))

    def _expert_names(self, index: int) -> set[str]:
        assert self._experts is not None
        return {claim.info.name for claims in self._experts.expert_claims(index) for claim in claims}

    def _read_in(self, names: Sequence[str], where: str) -> None:
        """Load tensors of the checkpoint into the module, with transformers' own renaming and fusing."""
        assert self._naming is not None
        take = self._reads.take if self._reads is not None else self.weights.read
        if self.architecture is not None and is_ragged(self.config):
            take = partial(_filled_up, take, self.architecture, widths_of(self.config))
        state = {self._names.get(name) or name: _Unread(take, name) for name in names}
        with own_pages():
            outcome = read_in(self._naming, state, self.device)
        _refuse_mismatched(outcome.mismatched)
        if outcome.errors:
            if any(re.search(OUT_OF_MEMORY, str(text)) for text in outcome.errors.values()):
                raise UserError(
                    f"memory ran out while loading the tensors {where}",
                    "use a machine (or limit) with enough memory for one decoder layer",
                )
            raise UserError(
                f"tensors {where} could not be converted: {sorted(map(str, outcome.errors))[0]}",
                "config.json and weights do not match, or a tensor has a wrong shape",
            )


def _filled_up(
    take: Callable[[str], torch.Tensor], record: Architecture, widths: Mapping[int, int | list[int]], name: str
) -> torch.Tensor:
    return filled_up(name, take(name), record, widths)


class _LargeOnMeta(TorchFunctionMode):
    """While a model is built: put large `torch.empty` on the meta device at once. accelerate moves a parameter there when it is registered,
    so the experts of one layer (15 GB in DeepSeek-V3) would be allocated first, which fails under a limit on the address space."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            size = args[0] if args and not isinstance(args[0], int) else args
            if prod(size or kwargs.get("size") or ()) >= CHECKED_AT_ONCE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


class _Unread:
    """A tensor of the checkpoint that is read when transformers takes it (`tensor[...]`, as with a safetensors slice), and not kept. So
    only the tensors being fused (experts' gate and up projections) are in memory twice, not the whole layer."""

    def __init__(self, take: Callable[[str], torch.Tensor], name: str) -> None:
        self.take, self.name = take, name

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.take(self.name)


def transformers_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of a checkpoint's config.json, without remote code and without a quantiser, because weights are decoded
    before transformers sees them.

    Raises:
        UserError: transformers does not support it, or has no class for the family.
    """
    import transformers

    try:
        with quietly():  # transformers warns about layers with their own numbers, which are intended
            config = read_config(checkpoint.path)
    except UserError:
        raise
    except Exception as error:  # config classes raise any error for wrong values; strict ones have their own
        package = install_line(error)
        if package or isinstance(error, ImportError):
            raise UserError(
                f"{checkpoint.path}/config.json needs a package that is not installed: {_first_line(error)}",
                package or "install the package in this message",
            ) from None
        if isinstance(error, ValueError | KeyError | OSError | TypeError) and "Validation" not in type(error).__name__:
            raise UserError(
                f"{checkpoint.path}/config.json is not supported by transformers {transformers.__version__}: {_first_line(error)}"
            ) from None
        raise UserError(f"{checkpoint.path}/config.json is not valid: {_first_line(error)}") from None
    for part in (config, config.get_text_config()):
        part.__dict__.pop("quantization_config", None)
    return config


def load_model(
    checkpoint: Checkpoint,
    architecture: Architecture | None,
    *,
    memory: Memory = "resident",
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    config_overrides: Mapping[str, Any] | None = None,
    mtp: bool = False,
) -> LoadedModel:
    """Build the transformers model of a checkpoint, in eval mode, without gradients and without remote code: the stock class, or one
    that gives every decoder layer its own number of experts if config.json does. Quantised weights are decoded to `dtype` as they are read.

    Args:
        architecture: record of the family, or None for a dense model (then its layers are expected under `model.layers`).
        config_overrides: keys of the text config to change before the model is built.
        mtp: also load the multi-token-prediction layer, if there is one with experts that can be run (`engine.mtp`).

    Raises:
        UserError: transformers cannot build or run the model, the weights do not fit it, or some would not be loaded.
    """
    if memory == "resident" and checkpoint.converted:
        raise UserError("a pickle checkpoint is run with --memory stream only")
    target = torch.device(device)
    chosen = dtype_of(dtype, checkpoint)
    weights = checkpoint if isinstance(checkpoint, Floats) else floats(checkpoint, WORDS.get(chosen, "F32"))
    if architecture is not None:
        weights = filled(weights, _never_used(weights, architecture))
    whole = _ahead_in(weights, architecture) if mtp else None
    auto, config = causal_lm(_config_of(checkpoint, architecture, config_overrides, whole))
    if memory == "stream":
        # oneDNN and torch's layer above it each cache a bfloat16 kernel of 250 KB for each number of tokens that an expert ever had, up to
        # 1024 kernels each (500 MB), so memory grows with depth. Both read their limit when the first kernel is made.
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(name, "64")
    runs_as_another = architecture is not None and architecture.runs_as is not None
    stock = memory == "resident" and not isinstance(weights, Floats) and not runs_as_another and whole is None
    stock = stock and not is_ragged(config)
    with _refusing(checkpoint):
        module: Any = None if stock else _empty(auto, config, chosen)
        _check_runs(auto, config, checkpoint, architecture, module)
        if stock:
            module = _from_pretrained(auto, config, checkpoint, chosen, target)
    module.eval().requires_grad_(False)
    path = layers_of(module, architecture.layers if architecture else "model.layers")
    layers = list(module.get_submodule(path))  # type: ignore[arg-type]
    loaded = LoadedModel(module, layers, checkpoint, architecture, memory, target, chosen, weights)
    loaded._prefix = f"{path}."
    loaded._names = known_names(whole) if whole is not None else {}
    buffers = _group_names(loaded)
    loaded._reads = ReadAhead(weights, loaded._groups, target) if memory == "stream" else None
    if stock:
        # some families initialise buffers again after loading (Zaya's balancing biases in transformers 5.23): use the checkpoint's values
        loaded._read_in(buffers, "of the routers")
    else:
        on_demand = memory == "stream" and architecture is not None and not has_novices(config) and not widths_of(config)
        if on_demand and architecture is not None and _too_large(weights, architecture, chosen, target):
            loaded._experts = take_inventory(weights)
        _load_empty(loaded)
    if whole is not None:
        loaded.ahead = ahead_of(module, path, weights, whole, target, chosen)
    layer_ids = {id(p) for layer in layers for p in layer.parameters()}
    _align(module, skip=layer_ids)
    _check_finite(module, "the model outside its decoder layers", skip=layer_ids)
    return loaded


@contextlib.contextmanager
def _refusing(checkpoint: Checkpoint) -> Iterator[None]:
    """While transformers builds a model: turn its errors into errors for users. Wrong values in a config can raise anything."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if re.search(OUT_OF_MEMORY, str(error)):
            raise  # nothing is wrong with the checkpoint
        package = install_line(error)
        if package or isinstance(error, ImportError):
            raise UserError(
                f"{checkpoint.source} needs a package that is not installed: {_first_line(error)}",
                package or "install the package in this message",
            ) from None
        raise UserError(
            f"transformers cannot load {checkpoint.source}: {_first_line(error)}",
            "check config.json, and for a damaged shard or a tensor with a wrong shape",
        ) from None


def _empty(auto: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model without memory for its parameters."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _LargeOnMeta(), without_initialisation():
        module = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    module.tie_weights()  # initialisation does it otherwise
    return module


def check_model(checkpoint: Checkpoint, architecture: Architecture, overrides: Mapping[str, Any] | None = None) -> None:
    """Build the model of a checkpoint without memory, to report a wrong config.json before any work. Its buffers must be finite, every
    parameter needs a tensor, tensors and parameters must have the same size, and a forward must run.

    Args:
        overrides: keys of the text config to change first.

    Raises:
        UserError: transformers rejects the config, cannot build or run the model, or its tensors do not fit it.
    """
    dtype_of("auto", checkpoint)
    auto, config = causal_lm(_config_of(checkpoint, architecture, overrides, None))
    with _refusing(checkpoint), quietly():
        module = _empty(auto, config, torch.float32)
    for name, buffer in module.named_buffers():
        if not buffer.is_meta and buffer.is_floating_point() and not bool(torch.isfinite(buffer).all()):
            raise UserError(
                f"{checkpoint.path}/config.json makes {name} NaN or inf", "check its numbers, such as those of rope_parameters"
            )
    given = _sizes_given(module, checkpoint, architecture)
    for name, parameter in module.named_parameters():
        if name not in given:
            raise UserError(
                f"the checkpoint lacks the weights of {name}",
                "download it again, and check that config.json is of the same model",
            )
        if given[name] not in (None, parameter.numel()):
            raise UserError(
                f"{name} has a wrong shape: the file has {given[name]} elements, the model {list(parameter.shape)}",
                "config.json and weights do not match, or the tensor is damaged",
            )
    _check_runs(auto, config, checkpoint, architecture, module)


def _check_runs(
    auto: Any, config: Any, checkpoint: Checkpoint, architecture: Architecture | None, module: Any | None = None
) -> None:
    """Refuse a model that can be built from its config.json, but cannot run. A config is tried once a process.

    Args:
        module: the model without memory, if it is built already.

    Raises:
        UserError: with transformers' message, and the keys that are null in config.json but not by default.
    """
    key = f"{type(config).__name__} {json.dumps(config.to_dict(), sort_keys=True, default=str)}"
    if key in _RUNS:
        return
    if module is None:
        module = _empty(auto, config, torch.float32)
    layers = layers_of(module, architecture.layers if architecture else "model.layers")
    why = why_not_run(module, layers, architecture)
    if why is None:
        _RUNS.add(key)
        return
    given, usual = text_config(checkpoint.config), type(module.config.get_text_config())()
    null = sorted(key for key, value in given.items() if value is None and getattr(usual, key, None) is not None)
    raise UserError(
        f"transformers cannot run {checkpoint.source}: {_first_line(Exception(why))}",
        f"give a number in config.json instead of null: {', '.join(null)}"
        if null
        else "check config.json: numbers of heads, key-value heads, expert_groups and sizes must fit each other",
    )


def _sizes_given(module: Any, checkpoint: Checkpoint, architecture: Architecture) -> dict[str, int | None]:
    """Parameter → elements of the tensors that load into it, by transformers' names; None if one tensor is split into several.

    Raises:
        UserError: a tensor that loads unchanged, into a parameter of another shape.
    """
    names = naming(module, key_mapping(architecture), torch.float32)
    to_module, parts_of = renamer(names), splits(names)
    targets, weights = module.state_dict(), floats(checkpoint)
    given: dict[str, int | None] = {}
    for name, info in filled(weights, _never_used(weights, architecture)).tensors.items():
        known, converted = to_module(name)
        parts = [known.replace(first, other) for first, others in parts_of.items() if first in known for other in others]
        given |= dict.fromkeys([known, *parts]) if parts else {known: (given.get(known) or 0) + info.numel}
        place = architecture.locate(name)
        routed = place is not None and architecture.layout_of(place[1]) is not None  # these come in several layouts
        if not converted and not routed and known in targets and tuple(targets[known].shape) != info.shape:
            _refuse_mismatched([(name, info.shape, targets[known].shape)])
    return given


def _ahead_in(weights: Checkpoint, architecture: Architecture | None) -> Inventory | None:
    """The inventory of a checkpoint with a multi-token-prediction layer that can be run, else None."""
    found = take_inventory(weights) if architecture is not None else None
    return found if found is not None and found.mtp_layers and not why_not_played(found) else None


def _config_of(
    checkpoint: Checkpoint, architecture: Architecture | None, overrides: Mapping[str, Any] | None, ahead: Inventory | None
) -> Any:
    """The config to build a model from: with the family record's defaults for missing keys, with `overrides`, and with a layer for multi-token prediction."""
    config = transformers_config(checkpoint)
    inner, given = config.get_text_config(), text_config(checkpoint.config)
    for key, other in architecture.same_as if architecture else ():
        if key not in given and other in given:
            setattr(inner, key, given[other])
    for key, value in (overrides or {}).items():
        setattr(inner, key, value)
    if ahead is not None:
        lengthen(inner, len(ahead.mtp_layers))
    return config


def _from_pretrained(auto: Any, config: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the model with transformers' own `from_pretrained`.

    Raises:
        UserError: weights of wrong shapes, or missing ones.
    """
    with quietly():
        module, info = auto.from_pretrained(
            checkpoint.path,
            config=config,
            dtype=dtype,
            device_map=None if device.type == "cpu" else {"": device},
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below instead
        )
    _refuse_mismatched(info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"the checkpoint lacks the weights of {missing[0]}", "download it again")
    return module


def _load_empty(loaded: LoadedModel) -> None:
    """Load the weights into a model that was built on the meta device: those outside the layers, and in resident mode the layers too."""
    module = loaded.module
    for buffer_name, buffer in module.named_buffers():
        parent, _, leaf = buffer_name.rpartition(".")
        held = torch.empty_like(buffer, device=loaded.device) if buffer.is_meta else buffer.to(loaded.device)
        module.get_submodule(parent)._buffers[leaf] = held
    loaded._load(None)
    for index in range(len(loaded.layers)) if loaded.memory == "resident" else ():
        loaded._load(index)


def load_decoded(
    checkpoint: Checkpoint, architecture: Architecture | None, *, dtype: Any = "auto", device_map: Any = None, **others: Any
) -> nn.Module:
    """Load a quantised checkpoint as a plain model of `dtype` on one device, ready to run or to train.

    Raises:
        UserError: arguments that only `from_pretrained` uses, several devices, or as `load_model`.
    """
    if others:
        raise UserError(
            f"{checkpoint.source} is quantised and loaded decoded, so {sorted(others)[0]} has no effect",
            "remove it, or write a plain checkpoint first with `expertsmith dequantise`",
        )
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {"cpu" if device_map is None else device_map}
    if len(places) > 1:
        raise UserError(f"{checkpoint.source} is quantised and is loaded decoded, on one device", "give one in device_map")
    where = next(iter(places))
    name = str(dtype).removeprefix("torch.")
    device = choose_device(where if isinstance(where, str) else str(torch.device(where)))
    module = load_model(checkpoint, architecture, device=device, dtype=name).module
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module


def check_fits(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Build the family's class without memory, and match every tensor of the checkpoint with it by name and shape.

    Raises:
        UserError: a tensor that the class does not have, or has with another shape, or that is missing.
    """
    from accelerate import init_empty_weights

    weights = floats(checkpoint)
    weights = filled(weights, _never_used(weights, architecture))
    try:
        auto, config = causal_lm(transformers_config(checkpoint))
        with init_empty_weights():
            module = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        layers = list(module.get_submodule(architecture.layers))
        meta = torch.device("meta")
        loaded = LoadedModel(module, layers, checkpoint, architecture, "stream", meta, torch.float32, weights)
        loaded._prefix = f"{architecture.layers}."
        _group_names(loaded)
        state = {
            name: torch.empty(weights.tensors[name].shape, device=meta) for names in loaded._groups.values() for name in names
        }
        assert loaded._naming is not None
        outcome = read_in(loaded._naming, state, meta)
        _refuse_mismatched(outcome.mismatched)
        if outcome.errors:
            raise UserError(_first_line(Exception(sorted(map(str, outcome.errors.values()))[0])))
        tied = {name for name, _ in module.named_parameters(remove_duplicate=False)} - dict(module.named_parameters()).keys()
        for name in sorted(outcome.missing - tied):
            raise UserError(f"the checkpoint lacks {name}")
    except (UserError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        words = error.message if isinstance(error, UserError) else _first_line(error)
        raise UserError(
            f"{checkpoint.source} cannot be treated as {architecture.runs_as or architecture.model_type}: {words}",
            "use the family whose class has tensors of these names and shapes",
        ) from None


def layers_of(module: nn.Module, path: str) -> str:
    """The path of the decoder layers in a model: `path`, or in a composite the same path in its language model.

    Raises:
        UserError: there is none.
    """
    names = dict(module.named_modules())
    if path in names:
        return path
    decoder: Any = module.get_decoder() if hasattr(module, "get_decoder") else None  # type: ignore[operator]
    roots = [name for name, entry in names.items() if entry is decoder]
    places = [f"{root}.{inner}" for root in roots for inner in (path.rpartition(".")[2], path)]
    found = next((place for place in places if place in names), None)
    if found is None:
        raise UserError(f"{type(module).__name__} has no {path}, so it cannot run layer by layer", "use a supported family")
    return found


def _never_used(weights: Checkpoint, architecture: Architecture) -> dict[str, str]:
    """Weights of zero experts (which return their input) that the class has but published checkpoints leave out: name → the same tensor of
    expert 0."""
    config = text_config(weights.config)
    found: dict[str, str] = {}
    for entry in architecture.stacked:
        layout = architecture.layout_of(entry.name)
        if entry.role != "expert" or not entry.extra or layout is None:
            continue
        held = config_first(config, architecture.experts_key)
        count = int(held[1]) if held else 0
        extra = entry.extra if isinstance(entry.extra, int) else int(config_get(config, entry.extra) or 0)
        for name in weights.tensors:
            located = architecture.locate(name)
            owner = architecture.expert_of(located[1]) if located else None
            if located is None or owner is None or owner[0] != 0 or architecture.layout_of(located[1]) not in roles_of(layout):
                continue
            prefix = next(p for p in architecture.expert_prefix if located[1].startswith(p.format(expert=0)))
            head, below = name.removesuffix(located[1]), located[1].removeprefix(prefix.format(expert=0))
            others = [head + prefix.format(expert=count + k) + below for k in range(extra)]
            if not any(other in weights.tensors for other in others):
                found.update(dict.fromkeys(others, name))
    return found


def _too_large(weights: Checkpoint, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the experts of one decoder layer are too large to be in memory together: another model may run at the same time, and fusing
    holds a part of them twice."""
    sizes: Counter[int] = Counter()
    for claim in take_inventory(weights).claims:
        if claim.routed and claim.layer is not None:
            sizes[claim.layer] += claim.info.numel * torch.empty(0, dtype=dtype).element_size()
    return max(sizes.values(), default=0) > SHARE_OF_A_LAYER * free_memory(device)


def _group_names(loaded: LoadedModel) -> list[str]:
    """Group the checkpoint's names by the decoder layer that transformers loads them into (None: outside the layers).

    Returns the names that load into buffers.

    Raises:
        UserError: a tensor that the model does not have, and that is not known to be left out.
    """
    loaded._naming = naming(loaded.module, key_mapping(loaded.architecture), loaded.dtype)
    to_module, targets = renamer(loaded._naming), loaded.module.state_dict()
    is_buffer = {name for name, _ in loaded.module.named_buffers()}
    groups: dict[int | None, list[str]] = {}
    buffers = []
    left_out = _left_out(loaded)
    for name in loaded.weights.tensors:
        known = loaded._names.get(name, name)
        if known is None:
            continue
        renamed, _ = to_module(known)
        if renamed not in targets:
            if left_out(name):
                continue
            raise UserError(
                f"{type(loaded.module).__name__} has no parameter for {name} of {loaded.checkpoint.source}",
                "config.json and weights do not match, or this checkpoint has unsupported parts; please report it",
            )
        if renamed in is_buffer:
            buffers.append(name)
        rest = renamed.removeprefix(loaded._prefix)
        head = rest.partition(".")[0]
        inside = rest != renamed and head.isdigit()
        groups.setdefault(int(head) if inside else None, []).append(name)
    loaded._groups = groups
    return buffers


def _left_out(loaded: LoadedModel) -> Callable[[str], bool]:
    """A function: whether the model correctly ignores a tensor. These are tensors that the class itself declares, buffers that old versions
    saved, tensors that the family's record names, layers after the last (multi-token prediction), and parts besides the language model."""
    record = loaded.architecture
    declared = ignored(loaded.module)
    if (
        text_config(loaded.checkpoint.config) is not loaded.checkpoint.config
        and loaded.config.get_text_config() is loaded.config
    ):
        declared = (*declared, OTHER_PARTS)  # only the language model of a composite
    known = re.compile("|".join(f"(?:{entry})" for entry in (*declared, *ALWAYS_LEFT_OUT, *(record.ignored if record else ()))))
    depth = len(loaded.layers)

    def decide(name: str) -> bool:
        located = record.locate(name) if record else None
        if record and not name.startswith(record.text_prefix):
            return True  # another part of a composite
        return known.search(name) is not None or (located is not None and located[0] >= depth)

    return decide


def _refuse_mismatched(keys: Iterable[Any]) -> None:
    for key in sorted(keys, key=str):
        name, *shapes = key if isinstance(key, tuple) else (key,)
        detail = f": the file has shape {list(shapes[0])}, the model {list(shapes[1])}" if len(shapes) == 2 else ""
        raise UserError(f"{name} has a wrong shape{detail}", "config.json and weights do not match, or the tensor is damaged")


def _to_meta(layer: nn.Module) -> None:
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _align(module: nn.Module, skip: set[int] | frozenset[int] = frozenset()) -> None:
    """Copy weights that do not begin at a multiple of 64 bytes: CPU kernels process them with other rounding, and the place of a tensor in
    a file or buffer must not change the last bit of a statistic."""
    moved: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or id(parameter) in skip or parameter.device.type != "cpu" or parameter.data_ptr() % 64 == 0:
                continue
            if id(parameter) not in moved:  # tied weights stay tied
                moved[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            owner._parameters[name] = moved[id(parameter)]


def _check_finite(
    module: nn.Module, where: str, skip: set[int] | frozenset[int] = frozenset(), selection: frozenset[str] = frozenset()
) -> None:
    """Refuse the first parameter with NaN or inf (`selection`: parameters that may hold -inf). A sum in float32 needs one read, and any NaN
    or inf makes it non-finite."""
    for name, parameter in module.named_parameters():
        if id(parameter) in skip or parameter.is_meta or not parameter.is_floating_point() or parameter.element_size() < 2:
            continue
        # in parts, because a float32 sum of another dtype on a CPU makes a float32 copy of its input
        if all(
            bool(torch.isfinite(part.sum(dtype=torch.float32))) for part in torch.split(parameter.reshape(-1), CHECKED_AT_ONCE)
        ):
            continue
        wrong = ~torch.isfinite(parameter)
        if name in selection:
            wrong &= ~torch.isneginf(parameter)
        if bool(wrong.any()):
            bad = wrong.nonzero()[0].tolist()
            raise UserError(
                f"{name} in {where} has NaN or inf (first at {bad})", "the checkpoint is damaged; download it again"
            )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # strict config classes give the reason on the second line
        lines[0] += f" {lines[1]}"
    return lines[0][:300] if lines else type(error).__name__

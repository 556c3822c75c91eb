"""Load a model from a checkpoint, either resident or streamed layer by layer."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expertsmith.arch import Architecture, config_first, text_config
from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.floats import Floats, floats
from expertsmith.checkpoint.reader import TORCH_DTYPES
from expertsmith.engine.building import OUT_OF_MEMORY, check_runs, config_of, empty, layers_of, refusing
from expertsmith.engine.devices import Memory, choose_device, dtype_of, free_memory
from expertsmith.engine.experts import install
from expertsmith.engine.fusing import Stack, in_place
from expertsmith.engine.layout import experts_of, has_experts, is_grouped
from expertsmith.engine.matching import Match, match, refuse_mismatched, with_unused
from expertsmith.engine.mtp import Ahead, ahead_of, known_names, why_not_played
from expertsmith.engine.narrow import filled_up, is_ragged, widths_of
from expertsmith.engine.on_demand import Source, remove
from expertsmith.engine.pages import own_pages, trim
from expertsmith.engine.parameters import align, check_finite, to_meta
from expertsmith.engine.read_ahead import ReadAhead
from expertsmith.engine.spread import ROOM, built_sizes, local_devices, owners, travel
from expertsmith.engine.stock import quietly, read_in
from expertsmith.engine.uneven import causal_lm, has_novices
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory, take_inventory

if TYPE_CHECKING:
    from expertsmith.engine.shared_reads import SharedReads

MOST_TOKENS, LEAST_TOKENS, BUFFER = 8192, 512, 16 * 2**20  # of a batch; bytes
TRIMMED = 2  # after so many layers free memory goes back to the system: the heap grows a little with each, and every batch would miss the memory
SHARE_OF_A_LAYER = 0.25  # of the free memory, at most, for the experts of one decoder layer
WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}  # safetensors' names


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
    device: torch.device  # of what is outside the decoder layers: token ids go in there, and logits come out
    dtype: torch.dtype
    weights: Checkpoint  # the source of the weights: the float view of a quantised checkpoint, else the checkpoint itself
    _match: Match = field(repr=False)
    _names: Mapping[str, str | None] = field(repr=False)  # of multi-token prediction: tensor → its name in the module
    _path: str = field(repr=False)  # of the decoder layers in the module
    places: Sequence[torch.device]  # of the decoder layers (`engine.spread`)
    _checked: set[int] = field(default_factory=set, repr=False)
    ahead: Ahead | None = None
    _reads: ReadAhead | None = None  # the reads of the layers' weights (stream)
    shared: SharedReads | None = None  # the reads if the ranks share them (`engine.shared_reads`)
    _experts: Inventory | None = None  # to read routed experts on demand; None: they are loaded with their layer
    _begun: tuple[int, dict[str, Any]] | None = None  # a decoder layer that is read ahead, and what goes into the module

    @property
    def config(self) -> Any:
        """The transformers config that the model was built from."""
        return self.module.config

    def device_of(self, name: str) -> torch.device:
        """Where the parameter or buffer of a name is."""
        layer = name.removeprefix(f"{self._path}.").partition(".")[0] if name.startswith(f"{self._path}.") else ""
        return self.places[int(layer)] if layer.isdigit() else self.device

    @property
    def _reading(self) -> ReadAhead | SharedReads | None:
        return self.shared or self._reads

    @property
    def groups(self) -> Mapping[int | None, Sequence[str]]:
        """Decoder layer (None: outside the layers) → its tensors in `weights`."""
        return self._match.groups

    @property
    def reads_on_demand(self) -> bool:
        """Whether routed experts are read when tokens are sent to them."""
        return self._experts is not None

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
            if self.shared is not None:
                self.shared.gather(index)
            else:
                self.read_ahead(index)
            try:
                self._load(index)
            finally:
                self._begun = None
                if self._reading is not None:
                    self._reading.end()
        if index not in self._checked or self.memory == "stream":
            align(self.layers[index])
        if index not in self._checked:
            check_finite(self.layers[index], f"decoder layer {index}", selection=self._selection_biases)
            self._checked.add(index)

    def read_ahead(self, index: int) -> None:
        """Begin to read decoder layer `index` in the background, for the next `bring` (stream). Experts that are read on demand are not read
        ahead, nor is a layer beside them: memory is short."""
        if self._experts is not None:
            return
        if self.shared is not None:
            self.shared.begin(index)
        elif self._reads is not None:
            if self._begun is None or self._begun[0] != index:
                self._begun = index, self._state(self._match.groups.get(index, []))
            self._reads.begin(index, [_names(value) for value in self._begun[1].values() if isinstance(value, Stack)])

    def stop_reading(self) -> None:
        """Stop reading ahead, and return the memory that it took."""
        self._begun = None
        if self._reading is not None:
            self._reading.close()

    def release(self, index: int) -> None:
        """Release the weights of decoder layer `index` (stream)."""
        if self.memory == "stream":
            held = self._reads is not None and all(p.is_meta or self._reads.holds(p) for p in self.layers[index].parameters())
            to_meta(self.layers[index])
            if not held or index % TRIMMED == 0:
                trim()

    def _load(self, group: int | None) -> None:
        where = "outside the decoder layers" if group is None else f"in decoder layer {group}"
        target = self.module if group is None else self.layers[group]
        names, later = self._match.groups.get(group, []), set()
        if group is not None and self._experts is not None and self._reads_experts(group):
            assert self.architecture is not None
            experts = experts_of(target, self.architecture)
            names = [name for name in names if name not in self._expert_names(group)]
            install(experts, Source(self._experts, group, self.architecture, self.device))
            later = {id(p) for p in experts.parameters()}
        begun = self._begun[1] if self._begun is not None and self._begun[0] == group else None
        self._read_in(names, where, self.device if group is None else self.places[group], begun)
        skipped = {id(p) for layer in self.layers for p in layer.parameters()} if group is None else later
        if group is None:
            self.module.tie_weights()  # type: ignore[operator]
        absent = [name for name, p in target.named_parameters() if p.is_meta and id(p) not in skipped]
        if absent:
            place = absent[0] if group is None else f"{self._path}.{group}.{absent[0]}"
            raise UserError(f"the checkpoint lacks the weights of {place}", "download it again")

    def _reads_experts(self, index: int) -> bool:
        """Whether a decoder layer has experts that can be read one by one."""
        assert self.architecture is not None
        layer = self.layers[index]
        return has_experts(layer, self.architecture) and is_grouped(experts_of(layer, self.architecture))

    def _expert_names(self, index: int) -> set[str]:
        assert self._experts is not None
        return {claim.info.name for claims in self._experts.expert_claims(index) for claim in claims}

    def _read_in(self, names: Sequence[str], where: str, device: torch.device, state: Mapping[str, Any] | None = None) -> None:
        """Load tensors of the checkpoint into the module, with transformers' own renaming and fusing."""
        state = self._state(names) if state is None else state
        with own_pages():
            outcome = read_in(self._match.naming, state, device)
        refuse_mismatched(outcome.mismatched)
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

    def _state(self, names: Sequence[str]) -> dict[str, Any]:
        """Tensors of the checkpoint by their names in the module, which are read when transformers takes them."""
        take = self._take
        if self.architecture is not None and is_ragged(self.config):
            take = partial(_filled_up, take, self.architecture, widths_of(self.config))
        known = {self._names.get(name) or name: name for name in names}
        state = {name: _Unread(take, own) for name, own in known.items()}
        shapes = {name: self.weights.tensors[own].shape for name, own in known.items()}
        return in_place(self._match.naming, state, shapes, self._room)

    def _take(self, name: str) -> torch.Tensor:
        return self._reading.take(name) if self._reading is not None else self.weights.read(name)

    def _room(self, stack: Stack) -> torch.Tensor | None:
        """The memory into which the parts of a parameter are read ahead."""
        names = _names(stack)
        room = self._reads.room(names) if self._reads is not None and self.shared is None else None
        dtypes = (
            {getattr(torch, TORCH_DTYPES[self.weights.tensors[name].dtype]) for name in names} if room is not None else set()
        )
        return room.view(dtypes.pop()).view(stack.shape) if room is not None and len(dtypes) == 1 else None


def _names(stack: Stack) -> tuple[str, ...]:
    return tuple(unread.name for _, _, unread in stack.parts)


def _filled_up(
    take: Callable[[str], torch.Tensor], record: Architecture, widths: Mapping[int, int | list[int]], name: str
) -> torch.Tensor:
    return filled_up(name, take(name), record, widths)


class _Unread:
    """A tensor of the checkpoint that is read when transformers takes it (`tensor[...]`, as with a safetensors slice), and not kept. So
    only the tensors being fused are in memory twice, not the whole layer."""

    def __init__(self, take: Callable[[str], torch.Tensor], name: str) -> None:
        self.take, self.name = take, name

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.take(self.name)


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
        device: a GPU without a number: the first of this process, or all of them if a resident model does not fit one (`engine.spread`).

    Raises:
        UserError: transformers cannot build or run the model, the weights do not fit it, or some would not be loaded.
    """
    if memory == "resident" and checkpoint.converted:
        raise UserError("a pickle checkpoint is run with --memory stream only")
    targets = local_devices(torch.device(device))
    chosen = dtype_of(dtype, checkpoint)
    weights = checkpoint if isinstance(checkpoint, Floats) else floats(checkpoint, WORDS.get(chosen, "F32"))
    weights = with_unused(weights, architecture)
    whole = _ahead_in(weights, architecture) if mtp else None
    auto, config = causal_lm(config_of(checkpoint, architecture, config_overrides, whole))
    if memory == "stream":
        # oneDNN and torch's layer above it each cache a bfloat16 kernel of up to 1 MB for each number of tokens that an expert ever had, up to
        # 1024 kernels each, so memory grows with depth. Both read their limit when the first kernel is made. Making a kernel takes about as
        # long as a small product: with 64 in oneDNN's cache a calibration takes 10 to 20 % longer than with 128, and with 256 it takes 150 MB more.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "96")
        os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    runs_as_another = architecture is not None and architecture.runs_as is not None
    stock = memory == "resident" and not isinstance(weights, Floats) and not runs_as_another and whole is None
    stock = stock and not is_ragged(config)
    with refusing(checkpoint):
        several = memory == "resident" and len(targets) > 1
        module: Any = empty(auto, config, chosen) if several or not stock else None
        check_runs(auto, config, checkpoint, architecture, module)
        spread = _spread(module, architecture, checkpoint, targets) if several else None
        target, stock = targets[spread[0]] if spread else targets[0], stock and spread is None
        if stock:
            module = _from_pretrained(auto, config, checkpoint, chosen, target)
    module.eval().requires_grad_(False)
    path, layers = _layers(module, architecture)
    places = [targets[owner] for owner in spread[1:]] if spread else [target] * len(layers)
    if spread:
        travel(layers, places, target)
    names = known_names(whole) if whole is not None else {}
    found = match(module, weights, architecture, path, chosen, names)
    loaded = LoadedModel(module, layers, checkpoint, architecture, memory, target, chosen, weights, found, names, path, places)
    loaded._reads = ReadAhead(weights, found.groups, target) if memory == "stream" else None
    if stock:
        # some families initialise buffers again after loading (Zaya's balancing biases in transformers 5.23): use the checkpoint's values
        loaded._read_in(found.buffers, "of the routers", target)
    else:
        on_demand = memory == "stream" and architecture is not None and not has_novices(config) and not widths_of(config)
        if on_demand and architecture is not None and _too_large(weights, architecture, chosen, target):
            loaded._experts = take_inventory(weights)
        _load_empty(loaded)
    if whole is not None:
        loaded.ahead = ahead_of(module, path, weights, whole, target, chosen)
    layer_ids = {id(p) for layer in layers for p in layer.parameters()}
    align(module, skip=layer_ids)
    check_finite(module, "the model outside its decoder layers", skip=layer_ids)
    return loaded


def _layers(module: nn.Module, architecture: Architecture | None) -> tuple[str, list[nn.Module]]:
    """The path of a model's decoder layers, and the layers."""
    path = layers_of(module, architecture.layers if architecture else "model.layers")
    layers: Any = module.get_submodule(path)
    return path, list(layers)


def _spread(
    module: nn.Module, architecture: Architecture | None, checkpoint: Checkpoint, targets: Sequence[torch.device]
) -> list[int] | None:
    """Which of several devices holds what is outside the decoder layers, and each of them; None if the first has room for all.

    Raises:
        UserError: the devices together have no room for the model.
    """
    sizes, free = built_sizes(module, _layers(module, architecture)[1]), [free_memory(target) for target in targets]
    if sum(sizes) < ROOM * free[0]:
        return None
    found = owners(sizes, free)
    if found is None:
        each = " + ".join(f"{room / 1e9:.0f}" for room in free)
        raise UserError(
            f"{checkpoint.source} has {sum(sizes) / 1e9:.1f} GB of weights, for which {each} GB of free GPU memory have no room",
            "use --memory stream",
        )
    return found


def _ahead_in(weights: Checkpoint, architecture: Architecture | None) -> Inventory | None:
    """The inventory of a checkpoint with a multi-token-prediction layer that can be run, else None."""
    found = take_inventory(weights) if architecture is not None else None
    return found if found is not None and found.mtp_layers and not why_not_played(found) else None


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
    refuse_mismatched(info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"the checkpoint lacks the weights of {missing[0]}", "download it again")
    return module


def _load_empty(loaded: LoadedModel) -> None:
    """Load the weights into a model that was built on the meta device: those outside the layers, and in resident mode the layers too."""
    module = loaded.module
    for buffer_name, buffer in module.named_buffers():
        parent, _, leaf = buffer_name.rpartition(".")
        place = loaded.device_of(buffer_name)
        held = torch.empty_like(buffer, device=place) if buffer.is_meta else buffer.to(place)
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
    device = local_devices(choose_device(where if isinstance(where, str) else str(torch.device(where))))[0]
    module = load_model(checkpoint, architecture, device=device, dtype=name).module
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module


def _too_large(weights: Checkpoint, architecture: Architecture, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the experts of one decoder layer are too large to be in memory together: another model may run at the same time, and fusing
    holds a part of them twice."""
    sizes: Counter[int] = Counter()
    for claim in take_inventory(weights).claims:
        if claim.routed and claim.layer is not None:
            sizes[claim.layer] += claim.info.numel * torch.empty(0, dtype=dtype).element_size()
    return max(sizes.values(), default=0) > SHARE_OF_A_LAYER * free_memory(device)

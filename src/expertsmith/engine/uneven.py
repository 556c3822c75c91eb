"""Models that no stock class can represent: decoder layers with different numbers of experts, from `per_layer_config` in config.json, pruned
attention (`engine.heads`), experts that are constants (`engine.novices`), and experts that lost neurons (`engine.narrow`).

transformers 5.23 reads `per_layer_config` into the config, but its models build every layer from the one config. `PerLayerExperts` makes
them build each layer from its own. A written checkpoint carries the source text of this class (`shim_of`), so that plain transformers with
`trust_remote_code=True` builds the same model. That file is never run from here.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from expertsmith.arch import Architecture, families, record_of, refuse_without_class, text_config
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine.heads import KEY, PrunedAttention, PrunedHeads
from expertsmith.engine.narrow import KEY as NEURONS_KEY
from expertsmith.engine.narrow import Narrow, filled_up, is_ragged, widths_of
from expertsmith.engine.novices import KEY as NOVICES_KEY
from expertsmith.engine.novices import Novices, WithNovices
from expertsmith.engine.stock import own_class
from expertsmith.errors import UserError

SHIM = "modeling_expertsmith.py"


class PerLayerExperts:
    """Mixin before a causal LM: decoder layer i is built from `config.per_layer_config[i]`, so each may have its own number of experts."""

    layer_classes: tuple[Any, ...] = ()

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: its modules and tensor names are those of transformers, which only converts weights of its own models."""
        return False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        stock = {layer: layer.__init__ for layer in self.layer_classes}
        for layer, build in stock.items():
            layer.__init__ = self._of_its_own(build)
        try:
            super().__init__(config.get_text_config(), *args, **kwargs)  # type: ignore[call-arg]
        finally:
            for layer, build in stock.items():
                layer.__init__ = build

    @staticmethod
    def _of_its_own(build: Any) -> Any:
        def init(self: Any, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
            own = config.per_layer_config[layer_idx]
            for name, change in list(vars(own).items()):  # a part of a config is changed in a copy of that part
                part = vars(config).get(name)
                if isinstance(change, dict) and hasattr(part, "to_dict"):
                    vars(own)[name] = type(part)(**{**part.to_dict(), **change})
            build(self, own, layer_idx, *args, **kwargs)

        return init

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the layers' own configs follow."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        self._layers_follow()

    def set_experts_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the layers' own configs follow."""
        super().set_experts_implementation(*args, **kwargs)  # type: ignore[misc]
        self._layers_follow()

    def _layers_follow(self: Any) -> None:
        whole = self.config.get_text_config()
        for module in self.modules():
            own: Any = getattr(module, "config", None)
            if type(own) is type(whole) and own is not whole:
                own._attn_implementation_internal = whole._attn_implementation_internal
                own._experts_implementation_internal = whole._experts_implementation_internal


def is_uneven(config: Any) -> bool:
    """Whether a transformers config gives decoder layers their own numbers of experts or their own top_k."""
    inner = config.get_text_config()
    record = families().get(inner.model_type)
    if record is None or not inner.is_heterogeneous:
        return False
    keys = {key.partition(".")[0] for key in record.experts_key + record.top_k_key}
    return not keys.isdisjoint(inner.per_layer_attributes)


def read_config(path: str | Path, **where: Any) -> Any:
    """`AutoConfig.from_pretrained` without remote code. A checkpoint that runs as another family gets that family's config, made from its
    language model's part. Lists of counts, one number a layer, are converted if the config class rejects them: a list of equal numbers
    becomes that number, any other list `per_layer_config`.

    Raises:
        UserError: transformers has no class for the family.
        Exception: whatever transformers raises.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    held, _ = PreTrainedConfig.get_config_dict(path, **where)
    record = record_of(held)
    refuse_without_class(record, f"{path}/config.json")
    if record is not None and record.runs_as is not None:
        return _as_family(path, held, record.runs_as)
    try:
        read = AutoConfig.from_pretrained(path, trust_remote_code=False, **where)
        thinker = getattr(read, "thinker_config", None)
        if thinker is None:
            return read
        thinker.name_or_path = str(path)  # an omni model, which also speaks, has no forward, but its thinker has
        return thinker
    except Exception as error:  # strict config classes raise their own validation errors
        if "Validation" not in type(error).__name__:
            raise
        config = held
        inner: dict[str, Any] = text_config(config)  # type: ignore[assignment]
        if config.get("model_type") not in CONFIG_MAPPING or inner.get("model_type") not in CONFIG_MAPPING or not _lower(inner):
            raise
        read = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        read.name_or_path = str(path)
        return read


def _as_family(path: str | Path, held: dict[str, Any], model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    inner = {key: value for key, value in text_config(held).items() if key != "auto_map"}
    for key in ("dtype", "torch_dtype", "quantization_config"):  # a composite has them outside its text config
        if key in held:
            inner.setdefault(key, held[key])
    made = CONFIG_MAPPING[model_type].from_dict({**inner, "model_type": model_type})
    made.name_or_path = str(path)
    return made


def _lower(inner: dict[str, Any]) -> bool:
    """Convert lists of counts in a text config to numbers and `per_layer_config`; returns whether there were any."""
    from transformers import CONFIG_MAPPING

    record = families().get(inner["model_type"])
    if record is None:
        return False
    keys = (*record.experts_key, *record.extra_config_keys, *record.top_k_key, *record.expert_width_key)
    found = {key: inner[key] for key in keys if isinstance(inner.get(key), list) and inner[key]}
    layers = {int(layer): dict(own) for layer, own in (inner.get("per_layer_config") or {}).items()}
    names = CONFIG_MAPPING[inner["model_type"]].attribute_map
    for key, numbers in found.items():
        inner[key] = max(numbers)
        if len(set(numbers)) > 1:
            for layer, number in enumerate(numbers):
                layers.setdefault(layer, {})[names.get(key, key)] = number
    if layers:
        inner["per_layer_config"] = {str(layer): own for layer, own in sorted(layers.items())}
        inner["allow_global_per_layer_attribute_access"] = True
    return bool(found)


def key_mapping(record: Architecture | None) -> dict[str, str]:
    """Regex → replacement: from the checkpoint's tensor names to those of the class, if that is of the language model only."""
    return {f"^{re.escape(record.text_prefix)}": ""} if record and record.text_prefix else {}


def stock_class(config: Any) -> Any:
    """The causal LM class of transformers for a config.

    Raises:
        UserError: transformers has none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):  # Mistral 4's causal LM is under the latter only
        found = own_class(auto, config)
        if found is not None:
            return found
    raise UserError(f"transformers has no causal LM for {type(config).__name__}")


def has_pruned_attention(config: Any) -> bool:
    """Whether a transformers config says that attention was pruned (`engine.heads`)."""
    return getattr(config.get_text_config(), KEY, None) is not None


def has_novices(config: Any) -> bool:
    """Whether a transformers config says that experts are constants (`engine.novices`)."""
    return getattr(config.get_text_config(), NOVICES_KEY, None) is not None


def custom_class(config: Any) -> Any:
    """`stock_class`, with decoder layers built from their own configs, pruned attention, constant experts and narrower ones, each if the config says so.
    `save_pretrained` also writes the file for `trust_remote_code`.

    Raises:
        UserError: transformers has no causal LM for the config.
    """
    stock, uneven = stock_class(config), is_uneven(config)

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        self.config.auto_map = auto_map(self.config)
        super(made, self).save_pretrained(save_directory, *args, **kwargs)
        text = shim_of(self.config, uneven, has_novices(self.config), bool(widths_of(self.config)))
        (Path(save_directory) / SHIM).write_text(text, encoding="utf-8")

    def from_config(cls: Any, config: Any, /, trust_remote_code: bool = False, **kwargs: Any) -> Any:
        return cls._from_config(config, **kwargs)

    body = {
        "__module__": stock.__module__,
        "layer_classes": layer_classes(stock),
        "from_config": classmethod(from_config),  # as the Auto classes have it
        "save_pretrained": save_pretrained,
        **(_places(config) if has_novices(config) else {}),
        **(_narrow_places(config) if widths_of(config) else {}),
    }
    made: Any = type(stock.__name__, (*_mixins(config, uneven, has_novices(config), bool(widths_of(config))), stock), body)
    return made


def _mixins(config: Any, uneven: bool, novices: bool, narrow: bool) -> tuple[Any, ...]:
    wanted = (
        (PrunedAttention, has_pruned_attention(config)),
        (Novices, novices),
        (Narrow, narrow),
        (PerLayerExperts, uneven),
    )
    return tuple(mixin for mixin, there in wanted if there)


def _places(config: Any) -> dict[str, Any]:
    """What `Novices` needs to know of the family."""
    record = families()[config.get_text_config().model_type]
    return {
        "novice_layers": record.layers,
        "novice_experts": f"{record.block}.{record.experts}".strip("."),
        "novice_pairs": record.call == "pairs",
    }


def _narrow_places(config: Any) -> dict[str, Any]:
    """What `Narrow` needs to know of the family."""
    record = families()[config.get_text_config().model_type]
    return {"narrow_layers": record.layers, "narrow_experts": f"{record.block}.{record.experts}".strip(".")}


def layer_classes(stock: Any) -> tuple[Any, ...]:
    """The decoder layer classes in the module of a causal LM: those built from (config, layer_idx)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    module = sys.modules[stock.__module__]
    layers = (
        entry for entry in vars(module).values() if isinstance(entry, type) and issubclass(entry, GradientCheckpointingLayer)
    )
    return tuple(layer for layer in layers if list(inspect.signature(layer).parameters) == ["config", "layer_idx"])


def auto_map(config: Any) -> dict[str, str]:
    """The entries of config.json for the class in `shim_of`."""
    return {"AutoModelForCausalLM": f"{SHIM.removesuffix('.py')}.{stock_class(config).__name__}"}


def shim_of(config: Any, uneven: bool, novices: bool, narrow: bool) -> str:
    """Source text of a module that holds the model's class under its stock name and needs nothing but transformers.

    Args:
        uneven: whether decoder layers hold different numbers of experts, which `config` need not say yet.
        novices: whether experts are constants, which it need not say yet either.
        narrow: whether experts have fewer neurons than it says, likewise.
    """
    stock, mixins = stock_class(config), _mixins(config, uneven, novices, narrow)
    layers = sorted(layer.__name__ for layer in layer_classes(stock))
    what: dict[Any, str] = {
        PerLayerExperts: "a different number of experts in each decoder layer, as per_layer_config in config.json says",
        Novices: f"experts that are constants, as {NOVICES_KEY} in config.json says",
        Narrow: f"experts with fewer neurons, as {NEURONS_KEY} in config.json says",
        PrunedAttention: f"pruned attention, as {KEY} in config.json says",
    }
    parts = {PrunedAttention: PrunedHeads, Novices: WithNovices}
    sources = [*(part for mixin, part in parts.items() if mixin in mixins), *mixins]
    places = {**(_places(config) if novices else {}), **(_narrow_places(config) if narrow else {})}
    more = "".join(f"    {name} = {json.dumps(value) if isinstance(value, str) else value}\n" for name, value in places.items())
    text = "\n\n".join(inspect.getsource(source) for source in sources)
    return f'''"""{stock.__name__} with {" and with ".join(what[mixin] for mixin in mixins)}.

Written by expertsmith. AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) uses it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from {stock.__module__} import {", ".join(layers)}
from {stock.__module__} import {stock.__name__} as Stock


{text}

class {stock.__name__}({", ".join(mixin.__name__ for mixin in mixins)}, Stock):
    """The stock model."""

    layer_classes = ({", ".join(layers)},)
    _can_set_experts_implementation_cached_value = {stock._can_set_experts_implementation()}
{more}'''


def load(path: str | Path, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, also for checkpoints whose layers hold different numbers of experts.

    Code in the checkpoint is never run. `kwargs` go to `from_pretrained` (dtype, device_map, …).

    Raises:
        UserError: `trust_remote_code`, which has no effect here, or a family that transformers has no class for.
    """
    from transformers import PreTrainedConfig

    if kwargs.pop("trust_remote_code", False):
        raise UserError("load runs no code from a checkpoint, so trust_remote_code has no effect", "leave it out")
    if "config" not in kwargs:
        where = {
            key: kwargs[key] for key in ("cache_dir", "local_files_only", "revision", "subfolder", "token") if key in kwargs
        }
        kwargs["config"] = read_config(path, **where)
        renamed = key_mapping(record_of(PreTrainedConfig.get_config_dict(path, **where)[0]))
        if renamed:
            kwargs["key_mapping"] = {**renamed, **kwargs.get("key_mapping", {})}
    model_class, kwargs["config"] = causal_lm(kwargs["config"])
    if is_ragged(kwargs["config"]):  # transformers stacks the experts of a layer, so they are filled up first
        held, widths = open_checkpoint(str(path)), widths_of(kwargs["config"])
        record = families()[kwargs["config"].get_text_config().model_type]
        kwargs["state_dict"] = {name: filled_up(name, held.read(name), record, widths) for name in held.tensors}
        return model_class.from_pretrained(None, trust_remote_code=False, **kwargs)
    return model_class.from_pretrained(path, trust_remote_code=False, **kwargs)


def runs_as_a_whole(config: Any) -> bool:
    """Whether a transformers config is of a composite whose language model has no causal LM of its own."""
    from transformers import AutoModelForCausalLM

    return config.get_text_config() is not config and own_class(AutoModelForCausalLM, config) is None


def causal_lm(config: Any) -> tuple[Any, Any]:
    """(class with `from_pretrained` and `from_config`, config to pass to them): transformers' Auto class if one stock config serves all
    layers (that of the whole for a composite without its own language model class), else `custom_class` and the language model's part of
    the config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    if not is_uneven(config) and not has_pruned_attention(config) and not has_novices(config) and not widths_of(config):
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            if own_class(auto, config) is not None:
                return auto, config
        return AutoModelForCausalLM, config  # which raises the error
    inner, whole = config.get_text_config(), getattr(config, "quantization_config", None)
    if whole is not None:
        inner.quantization_config = whole
    return custom_class(config), inner

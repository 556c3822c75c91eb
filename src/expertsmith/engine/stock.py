"""transformers' internal loading helpers and kernels. Only this file uses them.

Why: `from_pretrained` loads a whole model. Streaming needs the same renaming, fusing and dtypes for the tensors of one decoder layer, and
statistics need the same grouped matrix product as the model's own forward, bit for bit. These helpers are private, or public but changed
between minor versions (`core_model_loading`, `conversion_mapping`). Possible replacement: a public API that loads some tensors of a
checkpoint into a module. `tests/surgery/test_families.py` tests that the results equal those of `from_pretrained` bit for bit, and
`make test-newest` tests the newest release.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Naming:
    """The mapping from names and dtypes of a checkpoint to those of a module."""

    module: Any
    mapping: list[Any]
    dtype: torch.dtype
    dtype_plan: dict[str, torch.dtype]


@dataclass
class Outcome:
    """Problems while loading tensors: names and shapes that differ, failed conversions, missing names."""

    mismatched: list[Any]
    errors: dict[str, Any]
    missing: set[str]


def naming(module: Any, key_mapping: Mapping[str, str], dtype: torch.dtype) -> Naming:
    """The `Naming` of a model's class.

    Args:
        key_mapping: regex → replacement, applied to names first.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    return Naming(module, get_model_conversion_mapping(module, dict(key_mapping)), dtype, module._get_dtype_plan(dtype))


def renamer(naming: Naming) -> Callable[[str], tuple[str, str | None]]:
    """A function: name in the checkpoint → (name in the module, name pattern if the tensor is converted). The name is that of the parameter
    that the tensor becomes, or becomes a part of; if the module has none, the name that transformers would give it."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in naming.mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in naming.mapping if isinstance(entry, WeightConverter)]
    targets = naming.module.state_dict()

    def renamed(name: str) -> tuple[str, str | None]:
        found, pattern = rename_source_key(name, renamings, converters, naming.module.base_model_prefix, targets)
        return name if found not in targets and name in targets else found, pattern

    return renamed


def splits(naming: Naming) -> dict[str, list[str]]:
    """For tensors that are split into several parameters: name pattern of the first → those of the others."""
    from transformers.core_model_loading import WeightConverter

    patterns = [entry.target_patterns for entry in naming.mapping if isinstance(entry, WeightConverter)]
    return {first: others for first, *others in patterns if others}


def stacks(naming: Naming) -> dict[str, list[str]]:
    """For parameters that are stacked experts, or such stacks joined in the second dimension: name pattern of a part → those of all, in order."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    found: dict[str, list[str]] = {}
    joined = [(MergeModulelist, 0), (Concatenate, 1)]
    for entry in naming.mapping:
        steps = [(type(step), getattr(step, "dim", None)) for step in getattr(entry, "operations", ())]
        if steps == joined or (steps == joined[:1] and len(entry.source_patterns) == 1):
            found |= dict.fromkeys(entry.source_patterns, entry.source_patterns)
    return found


def read_in(naming: Naming, state: Mapping[str, Any], device: torch.device) -> Outcome:
    """Load tensors into the module, renamed, fused and converted as in `from_pretrained`.

    Args:
        state: name → tensor, or an object whose `[...]` reads the tensor on demand.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    options = LoadStateDictConfig(
        weight_mapping=list(map(copy, naming.mapping)),  # loading marks the entries as used
        dtype=naming.dtype,
        dtype_plan=naming.dtype_plan,
        device_map={"": device},
    )
    with quietly(), _one_by_one():
        info, _ = convert_and_load_state_dict_in_model(naming.module, dict(state), options)
    return Outcome(list(info.mismatched_keys), dict(info.conversion_errors), set(info.missing_keys))


def grouped_linear(
    inputs: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, bias: torch.Tensor | None, is_transposed: bool
) -> torch.Tensor:
    """The product [S, out] of inputs [S, in] and the weight of each row's group, by one grouped matrix product.

    Args:
        weight: [groups, out, in], or [groups, in, out] if `is_transposed`.
        ends: [groups] int32, where each group's rows end.
        bias: [S, out], of each row.
    """
    from transformers.integrations.moe import _grouped_linear

    product: torch.Tensor = _grouped_linear(inputs, weight, ends, bias=bias, is_transposed=is_transposed)
    return product


def own_class(auto: Any, config: Any) -> Any | None:
    """transformers' own class for a config, or None. A class from a checkpoint's code, loaded earlier in this process, does not count."""
    from transformers.models.auto.auto_factory import _get_model_class

    if type(config) not in auto._model_mapping:
        return None
    found = _get_model_class(config, auto._model_mapping)
    return found if found.__module__.startswith("transformers.") else None


def ignored(module: nn.Module) -> tuple[str, ...]:
    """Regexes of names in a checkpoint that the class itself ignores."""
    return tuple(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Keep transformers from reading ahead in threads: it would hold the whole layer before it fuses the first part."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})


@contextmanager
def without_initialisation() -> Iterator[None]:
    """Keep transformers and torch from drawing random weights, which the checkpoint's replace; on the meta device it takes most of the build."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        yield


@contextmanager
def quietly() -> Iterator[None]:
    """Hide transformers' progress bars, loading reports and warnings about layers with their own numbers."""
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    if bar:
        logging.disable_progress_bar()
    if level != logging.ERROR:  # a change empties the caches of all loggers
        logging.set_verbosity_error()
    try:
        yield
    finally:
        if level != logging.ERROR:
            logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()

"""Hold a checkpoint to the class of its family before any work: config, names, shapes, and a forward, all without memory for weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from expertsmith.arch import Architecture
from expertsmith.checkpoint import Checkpoint
from expertsmith.checkpoint.floats import floats
from expertsmith.engine.building import check_runs, config_of, empty, first_line, layers_of, refusing, transformers_config
from expertsmith.engine.devices import dtype_of
from expertsmith.engine.matching import left_out, match, refuse_mismatched, strange, with_unused
from expertsmith.engine.stock import naming, quietly, read_in, renamer, splits
from expertsmith.engine.uneven import causal_lm, key_mapping
from expertsmith.errors import UserError

BESIDE = re.compile(r"(?<=weight)_\w+$")  # a scale beside a weight


def check_model(checkpoint: Checkpoint, architecture: Architecture, overrides: Mapping[str, Any] | None = None) -> None:
    """Build the model of a checkpoint without memory, to report a wrong config.json before any work. Its buffers must be finite, every
    parameter needs a tensor and every tensor outside the experts a parameter, both must have the same size, and a forward must run.

    Args:
        overrides: keys of the text config to change first.

    Raises:
        UserError: transformers rejects the config, cannot build or run the model, or its tensors do not fit it.
    """
    dtype_of("auto", checkpoint)
    auto, config = causal_lm(config_of(checkpoint, architecture, overrides, None))
    with refusing(checkpoint), quietly():
        module = empty(auto, config, torch.float32)
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
    check_runs(auto, config, checkpoint, architecture, module)


def check_fits(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Build the family's class without memory, and match every tensor of the checkpoint with it by name and shape.

    Raises:
        UserError: a tensor that the class does not have, or has with another shape, or that is missing.
    """
    from accelerate import init_empty_weights

    weights = with_unused(floats(checkpoint), architecture)
    try:
        auto, config = causal_lm(transformers_config(checkpoint))
        with init_empty_weights():
            module = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        found, meta = match(module, weights, architecture, architecture.layers, torch.float32), torch.device("meta")
        state = {
            name: torch.empty(weights.tensors[name].shape, device=meta) for names in found.groups.values() for name in names
        }
        outcome = read_in(found.naming, state, meta)
        refuse_mismatched(outcome.mismatched)
        if outcome.errors:
            raise UserError(first_line(Exception(sorted(map(str, outcome.errors.values()))[0])))
        tied = {name for name, _ in module.named_parameters(remove_duplicate=False)} - dict(module.named_parameters()).keys()
        for name in sorted(outcome.missing - tied):
            raise UserError(f"the checkpoint lacks {name}")
    except (UserError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        words = error.message if isinstance(error, UserError) else first_line(error)
        raise UserError(
            f"{checkpoint.source} cannot be treated as {architecture.runs_as or architecture.model_type}: {words}",
            "use the family whose class has tensors of these names and shapes",
        ) from None


def _sizes_given(module: Any, checkpoint: Checkpoint, architecture: Architecture) -> dict[str, int | None]:
    """Parameter → elements of the tensors that load into it, by transformers' names; None if one tensor is split into several.

    Raises:
        UserError: a tensor that loads unchanged, into a parameter of another shape; a tensor outside the experts that the model does not
            have, see `matching.left_out`.
    """
    names = naming(module, key_mapping(architecture), torch.float32)
    to_module, parts_of = renamer(names), splits(names)
    targets, weights = module.state_dict(), floats(checkpoint)
    is_left_out = left_out(module, checkpoint, architecture, len(module.get_submodule(layers_of(module, architecture.layers))))
    given: dict[str, int | None] = {}
    for name, info in with_unused(weights, architecture).tensors.items():
        known, converted = to_module(name)
        place = architecture.locate(name)
        moves = place is not None and architecture.expert_of(place[1]) is not None  # with its expert, whatever it is
        if not moves and BESIDE.sub("", known) not in targets and not is_left_out(name):
            raise strange(module, name, checkpoint)
        parts = [known.replace(first, other) for first, others in parts_of.items() if first in known for other in others]
        given |= dict.fromkeys([known, *parts]) if parts else {known: (given.get(known) or 0) + info.numel}
        routed = place is not None and architecture.layout_of(place[1]) is not None  # these come in several layouts
        if not converted and not routed and known in targets and tuple(targets[known].shape) != info.shape:
            refuse_mismatched([(name, info.shape, targets[known].shape)])
    return given

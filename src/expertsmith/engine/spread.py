"""Spread a resident model that is larger than one GPU over the GPUs of this process, decoder layer by decoder layer.

Embedding, final norm and head are on one GPU, the first of the model, so that token ids go in and logits come out there. A decoder layer is on one GPU with all
its experts. Its inputs are moved when it is called, by a hook of the module: unlike accelerate's, which replaces a module's forward, it stays
when a walk or an observer takes a forward's place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from expertsmith.checkpoint import Checkpoint

ROOM = 0.7  # of a device's free memory for weights; the rest is for activations
LAYER = re.compile(r"(?:^|\.)(\d+)\.")  # the first number in a tensor's name


def local_devices(device: torch.device) -> list[torch.device]:
    """The devices over which a model may be spread: all GPUs that this process sees for a device without a number, such as "cuda"; otherwise the
    device alone, as under `torchrun`, where each rank has its own GPU."""
    if device.type == "cpu" or device.index is not None:
        return [device]
    count = torch.get_device_module(device).device_count()
    return [torch.device(device.type, index) for index in range(count)]


def owners(sizes: Sequence[int], free: Sequence[int]) -> list[int] | None:
    """Which device holds each part of a model: neighbours together, and every device filled to about the same share of its free memory. None if that
    puts more than `ROOM` of it on one.

    Lay the parts side by side, and the devices too, stretched to the same length: a part belongs to the device in whose range its middle lies.
    Part i of sizes s is on the first device d with (s_0 + … + s_{i-1} + s_i / 2) / sum s < (f_0 + … + f_d) / sum f.

    Args:
        sizes: bytes of the parts: first all outside the decoder layers, then each layer.
        free: bytes of free memory of the devices.
    """
    total, room = max(1, sum(sizes)), sum(free)
    bounds = list(accumulate(free))
    middles = [begin + end for begin, end in pairwise(accumulate(sizes, initial=0))]  # times 2
    found = [sum(middle * room >= 2 * total * bound for bound in bounds[:-1]) for middle in middles]
    filled: Counter[int] = Counter()
    for device, size in zip(found, sizes, strict=True):
        filled[device] += size
    return found if all(size <= ROOM * free[device] for device, size in filled.items()) else None


def stored_sizes(weights: Checkpoint, itemsize: int) -> list[int]:
    """The parts of a checkpoint for `owners`, in bytes of weights of `itemsize` bytes, from its headers: a decoder layer is told by the first number
    in a tensor's name."""
    sizes: Counter[int] = Counter()
    for name, info in weights.tensors.items():
        layer = LAYER.search(name)
        sizes[int(layer[1]) + 1 if layer else 0] += info.numel * itemsize
    return [sizes[part] for part in range(max(sizes, default=0) + 1)]


def built_sizes(module: nn.Module, layers: Sequence[nn.Module]) -> list[int]:
    """The parts of a model that was built without memory, for `owners`."""
    inside = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
    return [sum(p.numel() * p.element_size() for p in module.parameters()) - sum(inside), *inside]


def travel(layers: Sequence[nn.Module], places: Sequence[torch.device], home: torch.device) -> None:
    """Let a forward pass from device to device: the inputs of every layer are moved to its place, the outputs of the last to `home`."""

    def arrive(where: torch.device, args: Any, kwargs: Any) -> Any:
        return moved(args, where), {name: moved(value, where) for name, value in kwargs.items()}

    for layer, place in zip(layers, places, strict=True):
        layer.register_forward_pre_hook(lambda _, args, kwargs, where=place: arrive(where, args, kwargs), with_kwargs=True)
    layers[-1].register_forward_hook(lambda _, args, output: moved(output, home))


def moved(value: Any, where: torch.device) -> Any:
    """A value with its tensors on a device. A mapping that layers write to (shared key-value states) stays the same object."""
    if isinstance(value, torch.Tensor):
        return value.to(where)
    if isinstance(value, MutableMapping):
        for key, held in value.items():
            value[key] = moved(held, where)
        return value
    if isinstance(value, Mapping):
        return {key: moved(held, where) for key, held in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved(held, where) for held in value)
    return value

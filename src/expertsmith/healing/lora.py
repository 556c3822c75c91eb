"""LoRA adapters on chosen weights of a student, by peft: on parameters for fused experts, on linear modules for everything else.

The adapters are merged at the end, so that the healed checkpoint has the stock layout. To find the changed tensors, the merged model is saved
in that layout and compared tensor by tensor, after rounding to the checkpoint's dtypes.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expertsmith.arch import Architecture
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.reader import TORCH_DTYPES
from expertsmith.engine import LoadedModel
from expertsmith.engine.layout import expert_parameters, submodule
from expertsmith.engine.stock import quietly
from expertsmith.errors import UserError
from expertsmith.experts.inventory import Inventory
from expertsmith.experts.weights import FLOATS
from expertsmith.healing.options import LORA_TARGETS, Lora

ADAPTER = "default"


def peft() -> Any:
    """Import peft.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft as library
    except ModuleNotFoundError:
        raise UserError("--method lora needs peft", 'pip install "expertsmith[heal]"') from None
    return library


def targets(student: LoadedModel, wanted: str) -> tuple[list[str], list[str]]:
    """Names in the model of the (linear modules, parameters) that `wanted` selects: attention, experts, router, shared, comma-separated.

    Attention means every linear module of a decoder layer outside its MoE block.

    Raises:
        UserError: an unknown word, or one that selects nothing in this model.
    """
    kinds = [word.strip() for word in wanted.split(",") if word.strip()]
    for word in kinds:
        if word not in LORA_TARGETS:
            raise UserError(f"option targets of lora has {word!r}", f"choose among {', '.join(LORA_TARGETS)}")
    record = student.architecture
    assert record is not None
    found: dict[str, list[str]] = {word: [] for word in LORA_TARGETS}
    for index, layer in enumerate(student.layers):
        moe = index in student.moe_layers
        for kind, name in (*(_parameters(layer, record, kinds) if moe else ()), *_linears(layer, record, moe)):
            if kind in kinds:
                found[kind].append(f"{record.layers}.{index}.{name}")
    for word in kinds:
        if not found[word]:
            raise UserError(f"the model has no {word} that LoRA could adapt", "leave it out of -O targets")
    return found["attention"] + found["shared"], found["experts"] + found["router"]


def _place(record: Architecture, path: str | None) -> str:
    """The path from the decoder layer to a part of its MoE block; "" if it has none."""
    return f"{record.block}.{path}".lstrip(".") if path else ""


def _parameters(layer: nn.Module, record: Architecture, kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(kind, name) of the matrices of a layer's experts and router."""
    for kind, path in (("experts", record.experts), ("router", record.router)):
        if kind not in kinds:
            continue
        place = _place(record, path)
        weights = expert_parameters(submodule(layer, place))
        if kind == "experts" and any("." in name for name, _ in weights):
            raise UserError(
                f"peft cannot adapt the experts of {record.model_type}, which are read from outside of the module that holds them",
                "leave experts out of -O targets, or heal with layer_local",
            )
        yield from ((kind, f"{place}.{name}") for name, weight in weights if weight.dim() >= 2 and "bias" not in name)


def _linears(layer: nn.Module, record: Architecture, moe: bool) -> Iterator[tuple[str, str]]:
    """(kind, name) of the linear modules of a layer's shared experts, and outside its MoE block."""
    shared = _place(record, record.shared) if moe else ""
    block = record.block if moe else ""
    parts = [_place(record, path) for path in (record.experts, record.router)] if moe else []
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if _inside(name, shared):
            yield "shared", name
        elif not _inside(name, block) and not any(_inside(name, part) for part in parts):
            yield "attention", name


def _inside(name: str, place: str) -> bool:
    return bool(place) and f"{name}.".startswith(f"{place}.")


class Adapted:
    """A student whose module runs with adapters."""

    def __init__(self, student: LoadedModel, options: Lora) -> None:
        library = peft()
        modules, parameters = targets(student, options.targets)
        torch.manual_seed(options.seed)
        config = library.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=0.0,  # adapters on parameters cannot have any: see below
            bias="none",
            target_modules=modules or None,
            target_parameters=parameters or None,
            task_type="CAUSAL_LM",
        )
        with quietly(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks transformers for things that will be renamed
            self.model: Any = library.get_peft_model(student.module, config)
        self.model.eval()
        for module in self.model.modules():
            if (
                options.dropout
                and isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict)
                and isinstance(module.base_layer, nn.Linear)
            ):
                module.lora_dropout[ADAPTER] = nn.Dropout(options.dropout).train()
        self.weights = {name: weight for name, weight in self.model.named_parameters() if "lora_" in name}
        for weight in self.model.parameters():
            weight.requires_grad_(False)

    def merge(self) -> Any:
        """Merge the adapters into the weights and return the plain model."""
        with quietly():
            return self.model.merge_and_unload()


@contextmanager
def noisy_embeddings(module: Any, alpha: float, seed: int) -> Iterator[None]:
    """NEFTune (arXiv 2310.05914): add uniform noise of up to alpha / sqrt(length * hidden) to the input embeddings while gradients are on."""
    if not alpha:
        yield
        return
    generator = torch.Generator().manual_seed(seed)

    def add(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return out
        size = alpha / (out.shape[-2] * out.shape[-1]) ** 0.5
        noise = torch.rand(out.shape, generator=generator) * 2 - 1
        noisy: torch.Tensor = out + size * noise.to(out)
        return noisy

    handle = module.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def rounded(module: Any, inventory: Inventory) -> None:
    """Round a model's weights to the checkpoint's dtype, if all its floats share one, so that the written values are the ones judged."""
    dtypes = {info.dtype for info in inventory.checkpoint.tensors.values() if info.dtype in FLOATS}
    if len(dtypes) == 1:
        kind = getattr(torch, TORCH_DTYPES[dtypes.pop()])
        for weight in module.parameters():
            weight.copy_(weight.to(kind))


def changed_tensors(module: Any, inventory: Inventory, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model that differ from the checkpoint, under the checkpoint's names and rounded to its dtypes. `folder` holds a
    temporary saved copy."""
    source = inventory.checkpoint
    found: dict[str, torch.Tensor] = {}
    try:
        with quietly():
            module.save_pretrained(folder)
        saved = open_checkpoint(folder)
        for name, info in source.tensors.items():
            if name not in saved.tensors:
                continue  # what transformers does not load
            old = source.read(name)
            new = saved.read(name).to(getattr(torch, TORCH_DTYPES[info.dtype]))
            if not torch.equal(new, old):
                found[name] = new
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found

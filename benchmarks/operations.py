"""Dispatched operations and host synchronisations of a decoder layer, counted on the CPU: what a GPU would launch and wait for.

A small kernel takes a GPU as long to launch as to run, and each synchronisation (a number or a list fetched, a boolean index) lets it run dry. Both
are the same on every device, so they are counted where no GPU is at hand: `calibrate` per batch, a greedy `search` per layer, and a training step of
`heal` layer_local. The plain forward of the same layers is counted beside them.
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import Shape, generate, scratch, table, write_data

WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}
FETCHES = ("cpu", "tolist")  # of a tensor that would be on the device (only one on the CPU can become a numpy array)
FREE = {"aten::view", "aten::_unsafe_view", "aten::t", "aten::transpose.int", "aten::expand", "aten::slice.Tensor", "aten::select.int", "aten::unsqueeze",
        "aten::squeeze.dim", "aten::permute", "aten::detach", "aten::alias", "aten::split.Tensor", "aten::split_with_sizes", "aten::as_strided", "aten::unbind.int",
        "aten::lift_fresh", "aten::scalar_tensor"}  # views and numbers launch nothing  # fmt: skip


@dataclass
class Count(TorchDispatchMode):
    """Operations that launch something, and those that wait."""

    launched: Counter[str] = field(default_factory=Counter)
    waited: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name not in FREE:
            self.launched[name] += 1
        boolean = name.startswith(("aten::index.", "aten::index_put")) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or boolean:
            self.waited["a boolean index" if boolean else name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Count]:
    """Count what runs inside; fetching a tensor counts as a wait, whatever its device."""
    mode, held = Count(), {name: getattr(torch.Tensor, name) for name in FETCHES}

    def counted(name: str) -> Callable[..., Any]:
        def fetch(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            mode.waited[f".{name}()"] += 1
            return held[name](self, *args, **kwargs)

        return fetch

    for name in FETCHES:
        setattr(torch.Tensor, name, counted(name))
    try:
        with mode:
            yield mode
    finally:
        for name, method in held.items():
            setattr(torch.Tensor, name, method)


def row(name: str, mode: Count, share: int) -> list[object]:
    """A line of the table; `share`: batches times layers, layers, or steps."""
    most = ", ".join(f"{key.removeprefix('aten::')} {count / share:.1f}" for key, count in mode.waited.most_common(4))
    return [name, f"{mode.launched.total() / share:.0f}", f"{mode.waited.total() / share:.1f}", most]


def measure(folder: Path, options: argparse.Namespace) -> list[list[object]]:
    from expertsmith.calibration.data import DataOptions, load_tokens
    from expertsmith.calibration.runner import collect
    from expertsmith.calibration.searching import search_layers
    from expertsmith.checkpoint import open_checkpoint
    from expertsmith.engine import load_model
    from expertsmith.experts.inventory import take_inventory
    from expertsmith.methods.base import Choice
    from expertsmith.methods.expert_sparsity import backward

    path = folder / "model"
    generate(path, Shape(options.family, options.layers, 64, 32, options.experts, options.top_k, dtype="float32"))
    write_data(folder / "data.jsonl", options.tokens, 64, 512)
    tokens = load_tokens([str(folder / "data.jsonl")], None, DataOptions(seq_len=64), vocab_size=512)
    inventory = take_inventory(open_checkpoint(path))
    model = load_model(inventory.checkpoint, inventory.architecture)
    size = options.tokens // options.batches
    batches = tokens.batches(size)
    share = len(batches) * options.layers
    module: Any = model.module
    collect(model, tokens, folder / "warm", batch_tokens=size, resume=False)  # what happens once: the check of the weights
    rows = []
    with torch.no_grad(), counting() as plain:
        for batch in batches:
            module.model(**batch.inputs(model.device), use_cache=False)
    rows.append(row("plain forward, a batch and layer", plain, share))
    with counting() as mode:
        collect(model, tokens, folder / "stats", batch_tokens=size, resume=False)
    rows.append(row("calibrate, a batch and layer", mode, share))
    rules = {layer: inventory.rules_of(layer) for layer in inventory.layers}
    count = options.experts // 2

    def choose(probe: Any) -> Choice:
        return Choice(sorted(set(range(options.experts)) - set(backward(probe, count, 1, {}))))

    with counting() as mode:
        list(search_layers(model, tokens, choose, rules=rules, batch_tokens=size))
    rows.append(row(f"search, greedy {options.experts} → {count}, a layer", mode, options.layers))
    rows += healing(path, folder, options)
    shutil.rmtree(path)
    return rows


def healing(path: Path, folder: Path, options: argparse.Namespace) -> list[list[object]]:
    """`least_squares` a layer, and a step of `layer_local`: the difference of two runs that differ in their number of steps only."""
    from expertsmith import api

    data = [str(folder / "data.jsonl")]
    api.apply(path, api.plan(path, "random", options.experts // 2), folder / "half")
    found = {}
    for steps in (0, 8, 16):
        method = "layer_local" if steps else "least_squares"
        chosen: dict[str, Any] = {"steps": steps, "learning_rate": 1e-3, "step_tokens": 512} if steps else {}
        with counting() as found[steps]:
            api.heal(
                folder / "half", path, data, folder / f"healed{steps}", method=method, options=chosen, seq_len=64, device="cpu"
            )
    step = Count(found[16].launched - found[8].launched, found[16].waited - found[8].waited)
    return [
        row("heal least_squares, a layer (loading and writing included)", found[0], options.layers),
        row("heal layer_local, a step of a layer", step, 8 * options.layers),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_moe", choices=["qwen3_moe", "mixtral"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with scratch(None) as folder:
        table(["work", "operations", "synchronisations", "which"], measure(folder, options))


if __name__ == "__main__":
    main()

"""Subset search on one MoE layer: inner products kept once against running the block again for every subset; greedy search of many experts.

    python benchmarks/subset_search.py [--threads 1]

1. 8 experts, 4 dropped: all 70 subsets, by the probe (with everything that it needs: the model's own forward up to the layer, each expert
   once on every token, the search) and by masking the router and running the block once for each subset on kept inputs. Rounds alternate.
   The largest relative difference of the losses shows that both compute the same.
2. 64 experts, 32 kept: backward greedy and exchanges; the loss against that of random sets and of dropping the least used.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from common import Shape, alternate, generate, ratio, scratch, spread, table, verdict, write_data

TARGET, DIFFERENCE = 10.0, 1e-6


def build(folder: Path, shape: Shape, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    from expertsmith.calibration.data import DataOptions, load_tokens
    from expertsmith.checkpoint import open_checkpoint
    from expertsmith.engine import load_model
    from expertsmith.experts.inventory import take_inventory

    generate(folder, shape)
    write_data(folder / "data.jsonl", options.tokens, options.length, shape.vocab)
    data = load_tokens([str(folder / "data.jsonl")], None, DataOptions(seq_len=options.length), vocab_size=shape.vocab)
    inventory = take_inventory(open_checkpoint(folder))
    return load_model(inventory.checkpoint, inventory.architecture), data, inventory.rules


def search(built: tuple[Any, Any, Any], choose: Any) -> Any:
    from expertsmith.calibration.searching import search_layers

    model, data, rules = built
    return next(iter(search_layers(model, data, choose, rules={0: rules}, batch_tokens=2048)))[1]


def against_rerunning(folder: Path, options: argparse.Namespace) -> None:
    import torch

    from expertsmith.methods.expert_sparsity import expert_sparsity
    from expertsmith.surgery.mask import masked

    shape = Shape("mixtral", layers=1, width=1792, experts=8, top_k=2, dtype="float32")
    built = model, data, _ = build(folder / "few", shape, options)
    batches = data.batches(2048)
    losses: dict[str, dict[tuple[int, ...], float]] = {}

    def probed() -> None:
        why = search(built, lambda probe: expert_sparsity(probe, 4)).why
        losses["probe"] = {tuple(entry["drop"]): entry["loss"] for entry in why["subset_losses"]}

    @torch.no_grad()
    def rerun() -> None:
        block, inputs = model.layers[0].mlp, []
        hook = block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for batch in batches:
            model.module.model(**batch.inputs(model.device), use_cache=False)
        hook.remove()
        dense = [block(x) for x in inputs]
        found = {}
        for drop in combinations(range(8), 4):
            with masked(model, {0: [e for e in range(8) if e not in drop]}, 8):
                moved = [block(x) for x in inputs]
            error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(dense, moved, strict=True))
            found[drop] = error**0.5
        losses["rerun"] = found

    cpu: dict[str, list[float]] = {"rerun": [], "probe": []}

    def timed(name: str, work: Callable[[], None]) -> float:
        wall, used = time.perf_counter(), time.process_time()
        work()
        cpu[name].append(time.process_time() - used)
        return time.perf_counter() - wall

    probed()  # warm up: allocator, kernels, the check of the weights
    wall = alternate({"rerun": lambda: timed("rerun", rerun), "probe": lambda: timed("probe", probed)}, options.rounds)
    apart = max(abs(losses["probe"][drop] / loss - 1) for drop, loss in losses["rerun"].items())
    rows: list[list[object]] = []
    for clock, taken in (("wall", wall), ("CPU", cpu)):
        value = ratio(taken["rerun"], taken["probe"])
        rows.append(
            [
                clock,
                *(f"{statistics.median(taken[name]):.2f} s" for name in ("rerun", "probe")),
                f"{value:.1f}",
                spread(taken["rerun"], taken["probe"]),
                f"≥ {TARGET:.0f}",
                "ok" if value >= TARGET else "UNDER",
            ]
        )
    print(f"70 subsets of 8 experts, top 2, hidden {shape.hidden}, width {shape.width}, {options.tokens} tokens")
    table(["clock", "rerun", "probe", "ratio", "range", "target", ""], rows)
    print(f"largest relative difference of the losses {apart:.1e}, target ≤ {DIFFERENCE:.0e}: {verdict(apart, DIFFERENCE)}")


def many_experts(folder: Path, options: argparse.Namespace) -> None:
    from expertsmith.methods.expert_sparsity import expert_sparsity

    shape = Shape("qwen3_moe", layers=1, width=256, experts=64, top_k=8, dtype="float32")
    built = build(folder / "many", shape, options)
    rows: list[list[object]] = []

    def choose(probe: Any) -> Any:
        def timed(name: str, **more: Any) -> Any:
            begin = time.process_time()
            found = expert_sparsity(probe, 32, **more)
            rows.append([name, f"{time.process_time() - begin:.1f} s", found.why["loss"], found.why["evaluated"]])
            return found

        timed("greedy", passes=0)
        found = timed("greedy + exchanges")
        used = sorted(range(64), key=lambda e: (probe.selections[e], e))
        rows.append(["least used dropped", "", probe.loss(used[:32]), ""])
        drawn = [probe.loss(random.Random(seed).sample(range(64), 32)) for seed in range(20)]
        for name, value in (("best", min(drawn)), ("median", statistics.median(drawn))):
            rows.append([f"random, {name} of 20", "", value, ""])
        return found

    begin = time.process_time()
    search(built, choose)
    whole = time.process_time() - begin
    least = rows[1][2]
    print(
        f"\n64 experts, top 8, hidden {shape.hidden}, width {shape.width}, {options.tokens} tokens; 32 kept; in all {whole:.1f} s of CPU"
    )
    table(
        ["search", "CPU", "loss", "/ greedy + exchanges", "subsets"],
        [[name, taken, f"{loss:.4f}", f"{loss / least:.3f}", count] for name, taken, loss, count in rows],  # type: ignore[str-bytes-safe, operator]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for generated files")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    with scratch(options.work) as folder:
        against_rerunning(folder, options)
        many_experts(folder, options)


if __name__ == "__main__":
    main()

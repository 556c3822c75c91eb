"""Throughput in vLLM on a CPU at a fixed memory limit: original against half of the experts (the memory claim of EASY-EP, in small).

The limit holds weights and KV cache. The original fills it with its weights and the cache of a few sequences, so that requests wait for
each other; half of the experts leave their bytes to the cache. A third run has half of the experts and no more cache than the original, so that
what comes of fewer experts alone and what comes of the memory can be told apart. All three stay loaded and run in turns.

The cache is cut to what all requests need, and the original's (`--fit`) is chosen so small that it binds: with a cache that holds all requests of
the original there is nothing to gain but the third run's ratio.

What this cannot show: the weights are random (experts are used evenly), the prompts short, the data type float32, and a CPU is bound by arithmetic
long before a GPU: there a larger batch costs almost nothing until the weights are read once a step, so a GPU gains more from the same cache.
Needs vLLM: see `expertsmith.evaluation.engines`.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from common import MIB, Shape, alternate, generate_in_child, ratio, scratch, spread, table
from expertsmith import api
from expertsmith.checkpoint import open_checkpoint
from expertsmith.evaluation.engines import engine

BLOCK = 32  # tokens of a block of the cache; a CPU wants a multiple of that


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="Python of vLLM's environment (default: $EXPERTSMITH_VLLM)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--fit", type=int, default=2, help="sequences that the original's cache holds")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path)
    options = parser.parse_args()

    shape = Shape("qwen3_moe", layers=options.layers, hidden=512, width=384, experts=options.experts, top_k=4, heads=16, kv_heads=16, vocab=4096, dtype="float32")  # fmt: skip
    length = options.prompt + options.new
    a_token = shape.layers * 2 * shape.kv_heads * shape.head_dim * 4  # bytes of the cache: keys and values
    a_block = a_token * BLOCK
    with scratch(options.scratch) as folder, ExitStack() as stack:
        generate_in_child(folder / "original", shape)
        api.compress(folder / "original", "random", 0.5, out=folder / "half", measure=False)
        weights = {name: open_checkpoint(folder / name, headers_only=True).nbytes for name in ("original", "half")}
        small = options.fit * -(-length // BLOCK)
        limit = weights["original"] + small * a_block
        blocks = {"original": small, "half, same cache": small, "half": (limit - weights["half"]) // a_block}
        blocks = {name: min(count, options.requests * -(-length // BLOCK)) for name, count in blocks.items()}
        asks: dict[str, Any] = {}
        for name, count in blocks.items():
            cache = {"num_gpu_blocks_override": count + 1, "block_size": BLOCK}  # vLLM keeps one block empty
            asks[name] = stack.enter_context(
                engine(
                    "vllm",
                    folder / name.split(",")[0],
                    options.python,
                    dtype="float32",
                    batch=options.requests,
                    length=length,
                    vllm=cache,
                )
            )
        prompts = [[(7 * i + 13 * j) % shape.vocab for j in range(options.prompt)] for i in range(options.requests)]
        found = alternate({name: partial(ask, prompts, options.new) for name, ask in asks.items()}, options.rounds)
    made = options.requests * options.new
    speed = {name: [made / answer["seconds"] for answer in answers] for name, answers in found.items()}
    rows = []
    for name, count in blocks.items():
        cells = [f"{weights[name.split(',')[0]] / MIB:.0f}", f"{count * a_block / MIB:.0f}", f"{count * BLOCK // length}"]
        rows.append([name, *cells, f"{statistics.median(speed[name]):.1f}", f"{ratio(speed[name], speed['original']):.2f} ×", spread(speed[name], speed["original"])])  # fmt: skip
    print(
        f"limit {limit / MIB:.0f} MiB; {options.requests} requests of {options.prompt} + {options.new} tokens, {options.rounds} rounds in turns"
    )
    table(["", "weights MiB", "cache MiB", "sequences at once", "tokens/s", "against original", "least – most"], rows)


if __name__ == "__main__":
    main()

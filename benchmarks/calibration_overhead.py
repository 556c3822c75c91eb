"""Time of a calibration (all default observers) against the plain forward of the same decoder layers over the same tokens.

The plain forward is the stock model's decoder stack (`model.model`) without the head and without hooks; the calibration is
`collect` with everything it does for each batch and layer, statistics files included. Loading the model and the one-time check of the
weights are in neither. Target: at most 1.25 times the plain forward (aim: 1.10).

Three ratios, from the least to the most steady on a machine that others use too:

- wall: times of the two runs;
- CPU: CPU times of the two runs;
- inside: CPU time of one calibration with and without the share that its own bookkeeping took, so both come from one run. It does not see
  a difference between the observed experts' forward and transformers' own. (On a GPU, where kernels run on, only the wall time means
  something.)

The allocator is told to keep freed memory (glibc's MALLOC_*_THRESHOLD_), for both runs: otherwise the page faults of returning and
asking again for 16 MB buffers cost as much as half of the forward, or nothing, by accident of what lies at the end of the heap.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Shape, alternate, generate, ratio, scratch, spread, table, verdict, write_data

TARGET = 1.25
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28)}


def measure(dtype: str, folder: Path, options: argparse.Namespace) -> list[list[object]]:
    import torch

    from expertsmith.calibration import observers
    from expertsmith.calibration.data import DataOptions, load_tokens
    from expertsmith.calibration.runner import collect
    from expertsmith.checkpoint import open_checkpoint
    from expertsmith.engine import load_model
    from expertsmith.experts.inventory import take_inventory

    shape = Shape(options.family, options.layers, options.hidden, options.width, options.experts, options.top_k, dtype=dtype)
    path = folder / dtype
    generate(path, shape)
    write_data(folder / "data.jsonl", options.tokens, options.length, shape.vocab)
    tokens = load_tokens([str(folder / "data.jsonl")], None, DataOptions(seq_len=options.length), vocab_size=shape.vocab)
    inventory = take_inventory(open_checkpoint(path))
    loaded = load_model(inventory.checkpoint, inventory.architecture, device=options.device)
    model: Any = loaded.module
    batches = tokens.batches(options.batch_tokens)
    synchronize: Callable[[], None] = torch.cuda.synchronize if options.device.startswith("cuda") else (lambda: None)
    cpu: dict[str, list[float]] = {"plain": [], "calibrate": []}

    watching = [0.0]
    add = observers._Watch._add

    def timed_add(*arguments: Any) -> None:
        used = time.process_time()
        add(*arguments)
        watching[0] += time.process_time() - used

    def timed(name: str, work: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            synchronize()
            wall, used = time.perf_counter(), time.process_time()
            work()
            synchronize()
            cpu[name].append(time.process_time() - used)
            return time.perf_counter() - wall

        return run

    @torch.no_grad()
    def plain() -> None:
        for batch in batches:
            model.model(**batch.inputs(loaded.device), use_cache=False)

    def calibrate() -> None:
        watching[0] = 0.0
        collect(loaded, tokens, folder / "stats", batch_tokens=options.batch_tokens, resume=False)

    shares: list[float] = []

    def calibrate_and_note() -> float:
        wall = run_calibrate()
        shares.append(watching[0])
        return wall

    run_calibrate = timed("calibrate", calibrate)
    runs = {"plain": timed("plain", plain), "calibrate": calibrate_and_note}
    observers._Watch._add = timed_add  # type: ignore[method-assign]
    alternate(runs, 1)  # warm up: allocator, kernels, the check of the weights
    for values in (*cpu.values(), shares):
        values.clear()
    wall = alternate(runs, options.rounds)
    observers._Watch._add = add  # type: ignore[method-assign]
    shutil.rmtree(path)
    rows: list[list[object]] = []
    without = [total - share for total, share in zip(cpu["calibrate"], shares, strict=True)]
    for clock, taken in (("wall", wall), ("CPU", cpu), ("inside", {"plain": without, "calibrate": cpu["calibrate"]})):
        value = ratio(taken["calibrate"], taken["plain"])
        times = [f"{sorted(taken[name])[len(taken[name]) // 2]:.2f} s" for name in runs]
        rows.append(
            [
                dtype,
                clock,
                *times,
                f"{value:.3f}",
                spread(taken["calibrate"], taken["plain"]),
                f"≤ {TARGET}",
                verdict(value, TARGET),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_moe", choices=["qwen3_moe", "mixtral"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=256, help="of an expert")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="a measurement")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--work", type=Path, help="folder for generated files")
    options = parser.parse_args()
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED})

    import torch

    torch.set_num_threads(options.threads)
    with scratch(options.work) as folder:
        rows = [row for dtype in options.dtypes for row in measure(dtype, folder, options)]
    print(
        f"{options.family}, {options.layers} layers, {options.experts} experts, top {options.top_k}, hidden {options.hidden}, width {options.width}; "
        f"{options.tokens} tokens in batches of {options.batch_tokens}, {options.threads} threads, {options.device}"
    )
    table(["dtype", "ratio of", "plain", "calibrate", "ratio", "range", "target", ""], rows)


if __name__ == "__main__":
    main()

"""`apply` against a plain copy of the bytes that it keeps.

A generated checkpoint of a few GB is pruned to half of its experts (method `random`: no calibration), in turn with and without the look for
NaN, and with two copies of one file that has as many bytes as the output, in chunks of the same size, on the same disk, with the source
in the page cache and without fsync: a loop that reads into one buffer, as `apply` does, and `shutil.copyfileobj`, which takes new memory
for every chunk and is the slower one. Everything that `apply` does counts: opening the checkpoint, its fingerprint, the plan.
Targets: at most 1.5 times the copy; less than 1 GB above a process that only imports what `apply` needs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

from common import (
    MIB,
    Shape,
    alternate,
    generate_in_child,
    peak_now,
    ratio,
    run_child,
    scratch,
    spread,
    table,
    this_script,
    verdict,
    weight_bytes,
)  # fmt: skip

COPIES, APPLIES = ("copy", "copyfileobj"), ("apply", "apply --no-check-values")
TIME_TARGET, MEMORY_TARGET = 1.5, 1000.0


def apply_once(model: Path, plan: Path, out: Path, check_values: bool) -> None:
    from expertsmith import api

    api.apply(model, plan, out, check_values=check_values)


def copy_once(source: Path, target: Path, chunk: int, one_buffer: bool) -> None:
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        if not one_buffer:
            shutil.copyfileobj(reader, writer, chunk)
            return
        buffer = memoryview(bytearray(chunk))
        while count := reader.readinto(buffer):
            writer.write(buffer[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_moe", choices=["qwen3_moe", "mixtral"])
    parser.add_argument("--gigabytes", type=float, default=3.5, help="size of the source checkpoint")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512, help="of an expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for generated files")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        mode, model, plan, out = options.child
        if mode == "baseline":
            from expertsmith import api
            from expertsmith.surgery import apply as surgery  # noqa: F401
        else:
            apply_once(Path(model), Path(plan), Path(out), mode == "check")
        print(json.dumps({"peak": peak_now()}))
        return

    from expertsmith import api
    from expertsmith.checkpoint.writer import CHUNK

    with scratch(options.work) as folder:
        shape = Shape(options.family, 1, options.hidden, options.width, options.experts, 4, heads=16)
        shape = replace(shape, layers=max(1, round(options.gigabytes * 1e9 / shape.layer_bytes)))
        model, plan, out, copy = folder / "model", folder / "plan.json", folder / "out", folder / "copy.bin"
        generate_in_child(model, shape)
        api.plan(model, "random", options.keep, out=plan)
        apply_once(model, plan, out, True)
        kept = weight_bytes(out)
        shutil.rmtree(out)
        bytes_file = folder / "kept.bin"
        with open(bytes_file, "wb") as sink:
            left = kept
            for file in sorted(model.glob("*.safetensors")):
                with open(file, "rb") as source:
                    while left and (block := source.read(min(left, CHUNK))):
                        sink.write(block)
                        left -= len(block)
        cpu: dict[str, list[float]] = {}

        def timed(name: str) -> float:
            os.sync()  # no run pays for the writes of the one before
            begin, used = time.perf_counter(), time.process_time()
            if name in COPIES:
                copy_once(bytes_file, copy, CHUNK, name == "copy")
            else:
                apply_once(model, plan, out, name == "apply")
            taken = time.perf_counter() - begin
            cpu.setdefault(name, []).append(time.process_time() - used)
            copy.unlink(missing_ok=True)
            shutil.rmtree(out, ignore_errors=True)
            return taken

        runs = {name: lambda name=name: timed(name) for name in (*COPIES, *APPLIES)}  # type: ignore[misc]
        alternate(runs, 1)
        cpu.clear()
        wall = alternate(runs, options.rounds)
        peaks = {}
        for mode in ("baseline", "check", "no-check"):
            done = run_child(this_script("--child", mode, model, plan, out))
            if done.code:
                raise SystemExit(f"apply: {done.died}")
            peaks[mode] = done.report["peak"]
            shutil.rmtree(out, ignore_errors=True)
        size = weight_bytes(model)

    rows: list[list[object]] = []
    # how long the kernel takes to find pages for what is written swings by far more than the work differs; the fastest round is least touched
    best = {name: [min(values)] for name, values in wall.items()}
    for clock, taken in (("wall", wall), ("CPU", cpu), ("fastest round", best)):
        for name, base in ((name, base) for name in APPLIES for base in COPIES):
            value = ratio(taken[name], taken[base])
            seconds = statistics.median(taken[name])
            note = f"{seconds:.2f} s ({kept / seconds / 1e9:.2f} GB/s) / {statistics.median(taken[base]):.2f} s; {spread(taken[name], taken[base])}"
            rows.append([f"{name} / {base}, {clock}", f"{value:.3f}", f"≤ {TIME_TARGET}", verdict(value, TIME_TARGET), note])
    for mode, name in (("check", "apply"), ("no-check", "apply --no-check-values")):
        above = (peaks[mode] - peaks["baseline"]) / 1e6
        note = f"peak {peaks[mode] / MIB:.0f} MiB, imports {peaks['baseline'] / MIB:.0f} MiB"
        rows.append(
            [f"{name}, MB above imports", f"{above:.0f}", f"< {MEMORY_TARGET:.0f}", verdict(above, MEMORY_TARGET), note]
        )
    print(f"{options.family}, {size / 1e9:.2f} GB → {kept / 1e9:.2f} GB, keep {options.keep}, chunks of {CHUNK // MIB} MiB")
    table(["measure", "value", "target", "", "detail"], rows)


if __name__ == "__main__":
    main()

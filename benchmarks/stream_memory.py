"""Calibration with `--memory stream`: does its memory depend on the depth of the model, and what does it cost in time?

Two generated checkpoints whose decoder layers are alike (6 and 24 of them) are calibrated on the same tokens, each in a process of its
own. Targets:

- peak memory above a process that only imports torch, transformers and expertsmith: 24 layers at most 1.1 times 6 layers;
- seconds of `calibrate` (loading included, imports not), stream at most 1.3 times resident, 6 layers, in fresh processes in turn;
- every byte of the weights is read once;
- with `--fp8`, the same model with its matrices in FP8 (scales of blocks of 128 × 128): seconds of `calibrate`, streamed, at most 1.5 times those
  of bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

from common import (
    MIB,
    Child,
    Shape,
    alternate,
    generate_in_child,
    ratio,
    run_child,
    scratch,
    spread,
    table,
    this_script,
    verdict,
    write_data,
)

MEMORY_TARGET, TIME_TARGET, READ_TARGET, FP8_TARGET = 1.1, 1.3, 1.01, 1.5


def child(mode: str, model: str, data: str, out: str, batch_tokens: int, length: int) -> None:
    """Import everything, then calibrate (unless mode is "baseline"), and print what it took as JSON."""
    import torch
    import transformers.core_model_loading
    import transformers.models.mixtral.modeling_mixtral
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    from expertsmith import api
    from expertsmith.calibration import runner  # noqa: F401
    from expertsmith.checkpoint import Checkpoint

    if mode == "baseline":
        print(json.dumps({}))
        return
    read = 0
    plain_read = Checkpoint.read

    def counting(self: Checkpoint, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        nonlocal read
        found = plain_read(self, name, first, last)
        read += found.numel() * found.element_size()
        return found

    Checkpoint.read = counting  # type: ignore[method-assign]
    before = _rchar()
    begin, used = time.perf_counter(), time.process_time()
    api.calibrate(model, [data], out, seq_len=length, batch_tokens=batch_tokens, device="cpu", memory=mode)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - begin,
                "cpu": time.process_time() - used,
                "read": read,
                "rchar": _rchar() - before,
            }
        )
    )


def _rchar() -> int:
    """Bytes that this process asked the system to read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_moe", choices=["qwen3_moe", "mixtral"])
    parser.add_argument("--layers", type=int, nargs=2, default=[6, 24])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512, help="of an expert")
    parser.add_argument("--experts", type=int, default=56)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for generated files")
    parser.add_argument("--fp8", action="store_true", help="memory and reads of an FP8 model, and its time beside bfloat16")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        mode, model, data, out, batch_tokens, length = options.child
        child(mode, model, data, out, int(batch_tokens), int(length))
        return

    with scratch(options.work) as folder:
        data = folder / "data.jsonl"
        sizes: dict[int, int] = {}
        for layers in options.layers:
            shape = Shape(
                options.family,
                layers,
                options.hidden,
                options.width,
                options.experts,
                options.top_k,
                heads=16,
                kv_heads=4,
                fp8=options.fp8,
            )
            sizes[layers] = generate_in_child(folder / str(layers), shape)
        if options.fp8:
            generate_in_child(folder / "bfloat16", replace(shape, layers=options.layers[0], fp8=False))
        write_data(data, options.tokens, options.length, shape.vocab)
        runs = 0

        def start(mode: str, layers: int | str) -> Child:
            nonlocal runs
            runs += 1
            model, out = folder / str(layers), folder / f"stats-{runs}"
            done = run_child(
                this_script("--child", mode, model, data, out, options.batch_tokens, options.length), threads=options.threads
            )
            if done.code:
                raise SystemExit(f"{mode}, {layers} layers: {done.died}")
            return done

        small, deep = options.layers
        print(
            f"{options.family}, layers of {shape.layer_bytes / MIB:.0f} MiB {'FP8' if options.fp8 else 'bfloat16'}, {options.tokens} tokens, {options.threads} threads"
        )
        baseline = statistics.median(start("baseline", small).peak for _ in range(2))
        modes = ["resident", "stream", *(["bfloat16"] if options.fp8 else [])]
        results: dict[str, list[Child]] = {mode: [] for mode in modes}

        def timed(mode: str) -> float:
            results[mode].append(start("stream", mode) if mode == "bfloat16" else start(mode, small))
            return float(results[mode][-1].report["seconds"])

        seconds = alternate({mode: lambda mode=mode: timed(mode) for mode in modes}, options.rounds)  # type: ignore[misc]
        deepest = start("stream", deep)

    peaks = {small: statistics.median(run.peak for run in results["stream"]) - baseline, deep: deepest.peak - baseline}
    resident = statistics.median(run.peak for run in results["resident"]) - baseline
    rows: list[list[object]] = []
    grown = peaks[deep] / peaks[small]
    note = ", ".join(
        f"{layers} layers {peak / MIB:.0f} MiB = {peak / shape.layer_bytes:.2f} layers" for layers, peak in peaks.items()
    )
    rows.append(
        [f"peak memory, {deep} / {small} layers", f"{grown:.3f}", f"≤ {MEMORY_TARGET}", verdict(grown, MEMORY_TARGET), note]
    )
    rows.append(
        [f"(resident, {small} layers)", "", "", "", f"{resident / MIB:.0f} MiB = {resident / shape.layer_bytes:.2f} layers"]
    )
    cpu = {mode: [float(run.report["cpu"]) for run in runs] for mode, runs in results.items()}
    for name, taken in (("wall", seconds), ("CPU", cpu)):
        slower = ratio(taken["stream"], taken["resident"])
        note = (
            ", ".join(f"{mode} {statistics.median(values):.2f} s" for mode, values in taken.items())
            + f"; {spread(taken['stream'], taken['resident'])}"
        )
        rows.append(
            [f"{name} time, stream / resident", f"{slower:.3f}", f"≤ {TIME_TARGET}", verdict(slower, TIME_TARGET), note]
        )
        if options.fp8:
            slower = ratio(taken["stream"], taken["bfloat16"])
            note = f"bfloat16 {statistics.median(taken['bfloat16']):.2f} s; {spread(taken['stream'], taken['bfloat16'])}"
            rows.append(
                [f"{name} time, stream, FP8 / bfloat16", f"{slower:.3f}", f"≤ {FP8_TARGET}", verdict(slower, FP8_TARGET), note]
            )
    for layers, run in ((small, results["stream"][0]), (deep, deepest)):
        for name in ("read", "rchar"):
            share = run.report[name] / sizes[layers]
            what = "through Checkpoint.read" if name == "read" else "by the process (rchar: also code, data, headers)"
            limit = READ_TARGET if name == "read" else 1.05
            rows.append([f"bytes read / weights, {layers} layers", f"{share:.4f}", f"≤ {limit}", verdict(share, limit), what])
    print(f"baseline (imports only) {baseline / MIB:.0f} MiB")
    table(["measure", "value", "target", "", "detail"], rows)


if __name__ == "__main__":
    main()

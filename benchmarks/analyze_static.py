"""What the static measures of `analyze` cost on a checkpoint of real width, against one plain read of the weights.

A checkpoint of random weights (64 experts of 1408 x 2048 a layer by default, 5.6 GB) is written; then `plan --method aimer`, which reads every
expert weight once and does little with it, and `analyze` without data run in processes of their own. Processor time counts, and wall time
stands beside it; both grow with the number of layers, so that the time of `--extrapolate` layers is their share. The peak is that of one
projection of one layer and does not grow.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from common import Shape, generate_in_child, run_child, scratch, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1408, help="of an expert")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--extrapolate", type=int, default=26, help="layers of the model that the time is wanted for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for generated files")
    options = parser.parse_args()
    shape = replace(Shape("qwen3_moe", options.layers, options.hidden, options.width, options.experts, 6), heads=16, kv_heads=4)
    with scratch(options.work) as folder:
        total = generate_in_child(folder / "model", shape)
        print(
            f"{total / 1e9:.2f} GB bfloat16, {shape.layers} layers of {shape.layer_bytes / 1e9:.2f} GB, {options.threads} threads"
        )
        base = [sys.executable, "-m", "expertsmith"]
        jobs = {
            "one read (aimer)": ["plan", folder / "model", "-m", "aimer", "-k", "0.5", "-o", folder / "plan.json"],
            "analyze, static": ["analyze", folder / "model", "-o", folder / "look"],
        }
        rows = []
        for name, arguments in jobs.items():
            done = run_child([*base, *map(str, arguments), "--quiet"], threads=options.threads)
            if done.code:
                raise SystemExit(f"{name}: {done.died}")
            share = options.extrapolate / shape.layers
            rows.append(
                [name, f"{done.seconds:.0f} s", f"{done.cpu:.0f} s", f"{done.peak / 1e9:.2f} GB", f"{share * done.cpu:.0f} s"]
            )
        table(["job", "wall", "processor", "peak RSS", f"processor, {options.extrapolate} layers"], rows)
        print(f"page {(folder / 'look' / 'report.html').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

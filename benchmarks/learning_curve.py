"""How much text healing needs: loss increase on held-out text, over the number of calibration tokens.

    EXPERTSMITH_TESTBED=… python benchmarks/learning_curve.py [--models qwen2_moe mixtral] [--tokens 1000 10000 100000]
        [--heal least_squares layer_local:steps=300] [--method reap] [--keep 0.5] [-o learning_curve.json]

The testbed holds `models/NAME` and `data/corpus/DOMAIN/{calib,heldout}.jsonl`. Experts are chosen once a model, on 30 720 tokens of the
calibration text of all domains together; the model is then healed on prefixes of that text, of the given numbers of tokens, rounded to whole
sequences of 256 tokens, the same number in each domain. A cell is the increase of the held-out loss over the original in nats a token, mean over
the domains, its standard error over sequences (paired with the original), the share of the unhealed increase that is left, and the processor and
wall seconds of healing on one thread. A cell that stands in the output file already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from expertsmith import api
from healing import NOTHING, RUN, losses, split_way

LENGTH = 256  # tokens of a sequence
CHOSEN_ON = 24  # sequences a domain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen2_moe", "deepseek_v2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1000, 3000, 10_000, 30_000, 100_000])
    parser.add_argument("--heal", nargs="+", default=["least_squares", "layer_local"], help="METHOD or METHOD:key=value;…")
    parser.add_argument("--method", default="reap", help="how experts are chosen: METHOD or METHOD:key=value;…")
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--windows", type=int, default=30, help="held-out sequences a domain")
    parser.add_argument("--memory", default="resident", choices=["resident", "stream"])
    parser.add_argument("-o", "--out", type=Path, default=Path("learning_curve.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells: dict[str, dict[str, Any]] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.models:
        with tempfile.TemporaryDirectory() as work:
            fill(cells, name, args, Path(work))
    show(cells, args)


def samples_of(tokens: int, domains: int) -> int:
    """Sequences a domain that make about so many tokens."""
    return max(1, round(tokens / (domains * LENGTH)))


def key_of(args: argparse.Namespace, name: str, tokens: int, way: str) -> str:
    return " | ".join((name, args.method, args.keep, NOTHING if way == NOTHING else str(tokens), way))


def fill(cells: dict[str, dict[str, Any]], name: str, args: argparse.Namespace, work: Path) -> None:
    """Every cell of one model that is not there yet."""
    root = Path(os.environ["EXPERTSMITH_TESTBED"])
    model, corpus = root / "models" / name, root / "data" / "corpus"
    domains = sorted(path.name for path in corpus.iterdir() if path.is_dir())
    calib = [f"{d}={corpus / d / 'calib.jsonl'}" for d in domains]
    shape = {"seq_len": LENGTH, "batch_tokens": 2048}
    wanted = [(0, NOTHING), *((tokens, way) for tokens in args.tokens for way in args.heal)]
    missing = [(tokens, way) for tokens, way in wanted if key_of(args, name, tokens, way) not in cells]
    if not missing:
        return
    method, chosen = split_way(args.method)
    made = api.plan(
        model, method, args.keep, options=chosen, data=calib, samples=CHOSEN_ON, work=work / "stats", **shape, **RUN
    )
    api.apply(model, made, work / "chosen")
    for tokens, way in missing:
        out, used, took = work / "chosen", 0, [0.0, 0.0]
        if way != NOTHING:
            out = work / "healed"
            healer, options = split_way(way)
            job = {
                "method": healer,
                "options": options,
                "overwrite": True,
                "resume": False,
                "samples": samples_of(tokens, len(domains)),
            }
            begin = time.process_time(), time.perf_counter()
            report = api.heal(work / "chosen", model, calib, out, **job, **shape, **{**RUN, "memory": args.memory})
            took = [time.process_time() - begin[0], time.perf_counter() - begin[1]]
            used = sum(report["data"]["tokens"].values())
        mean = losses(out, model, corpus, domains, args)["mean"]
        found = {
            "tokens": used,
            "rise": mean["rise"],
            "se": mean["rise_se"],
            "kl": mean["kl"],
            "processor": took[0],
            "wall": took[1],
        }
        cells[key_of(args, name, tokens, way)] = found
        args.out.write_text(json.dumps(cells, indent=1) + "\n")
        print(f"{key_of(args, name, tokens, way)}: {found['rise']:.4f} nats, {took[0]:.0f} s of a processor", flush=True)


def show(cells: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> None:
    """A Markdown table: a row a model and number of tokens, a column a way of healing."""
    print("\n| model | tokens | " + " | ".join(args.heal) + " |\n|" + "---|" * (2 + len(args.heal)))
    for name in args.models:
        base = cells[key_of(args, name, 0, NOTHING)]
        print(f"| {name} | not healed | {base['rise']:.3f} ± {base['se']:.3f} |" + " |" * (len(args.heal) - 1))
        for tokens in args.tokens:
            row = [cells[key_of(args, name, tokens, way)] for way in args.heal]
            told = [f"{c['rise']:.3f} ± {c['se']:.3f} ({c['rise'] / base['rise']:.2f}), {c['processor']:.0f} s" for c in row]
            print(f"| {name} | {row[0]['tokens']:,} | " + " | ".join(told) + " |")


if __name__ == "__main__":
    main()

"""Held-out perplexity of every method on trained test models: half of the experts, chosen for each domain, verified.

    EXPERTSMITH_TESTBED=… python benchmarks/methods_table.py [--models mixtral qwen2_moe] [--keep 0.5] [-o results.json]

The testbed holds `models/NAME` and `corpus/DOMAIN/{calib,heldout}.jsonl` (under `data/`). One calibration a model serves every method and
domain. Data-free methods choose once for all domains. Perplexity is of the domain that the experts were chosen for; lower is better.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from expertsmith import api

METHODS = {
    "frequency": ("frequency", {}),
    "router_score": ("router_score", {}),
    "ean": ("ean", {}),
    "ean weighted": ("ean", {"weighted": True}),
    "man": ("man", {}),
    "msan": ("msan", {}),
    "reap": ("reap", {}),
    "easy_ep": ("easy_ep", {}),
    "aimer": ("aimer", {}),
    "random 0": ("random", {"seed": 0}),
    "random 1": ("random", {"seed": 1}),
    "random 2": ("random", {"seed": 2}),
}
RUN = {"device": "cpu", "dtype": "float32", "memory": "resident"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen2_moe", "deepseek_v2"])
    parser.add_argument("--keep", default="0.5")
    parser.add_argument("--calibration", type=int, default=40, help="sequences of 256 tokens a domain")
    parser.add_argument("--windows", type=int, default=30, help="held-out windows of 256 tokens a domain")
    parser.add_argument("-o", "--out", type=Path, default=Path("methods_table.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(os.environ["EXPERTSMITH_TESTBED"])
    corpus = root / "data" / "corpus"
    domains = sorted(p.name for p in corpus.iterdir() if p.is_dir())
    results: dict[str, dict] = {}
    for name in args.models:
        with tempfile.TemporaryDirectory() as work:
            results[name] = table(root / "models" / name, corpus, domains, args, Path(work))
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        show(name, results[name], domains)


def table(model: Path, corpus: Path, domains: list[str], args: argparse.Namespace, work: Path) -> dict:
    """Loss of every method and domain, and what `verify` found."""
    calib = [f"{d}={corpus / d / 'calib.jsonl'}" for d in domains]
    begin = time.perf_counter()
    statistics = api.calibrate(model, calib, work / "stats", samples=args.calibration, seq_len=256, batch_tokens=2048, **RUN)
    seconds = time.perf_counter() - begin
    loss: dict[str, dict[str, float]] = {"(all experts)": evaluate(model, corpus, domains, args)}
    worst, runs = 0.0, 0
    for label, (method, options) in METHODS.items():
        loss[label] = {}
        groups = [[d] for d in domains] if method not in ("aimer", "random") else [domains]
        for chosen_for in groups:
            out = work / "out"
            use = chosen_for if method not in ("aimer", "random") else []
            made = api.compress(
                model, method, args.keep, out, stats=statistics, domains=use, options=options, measure=False, device="cpu"
            )
            assert made["verify"].passed, (label, chosen_for, made["verify"])
            worst, runs = max(worst, made["verify"].largest), runs + 1
            loss[label] |= evaluate(out, corpus, chosen_for, args)
            shutil.rmtree(out)
        print(f"{model.name} {label}: " + ", ".join(f"{d} {math.exp(v):.1f}" for d, v in loss[label].items()), flush=True)
    return {
        "loss": loss,
        "calibration_seconds": seconds,
        "tokens": statistics.tokens,
        "verified": runs,
        "largest_relative_difference": worst,
    }


def evaluate(model: Path, corpus: Path, domains: list[str], args: argparse.Namespace) -> dict[str, float]:
    data = [f"{d}={corpus / d / 'heldout.jsonl'}" for d in domains]
    quality = api.evaluate(model, data, samples=args.windows, seq_len=256, batch_tokens=2048, **RUN).to_json()["domains"]
    return {d: quality[d]["loss"] for d in domains}


def show(name: str, result: dict, domains: list[str]) -> None:
    """A Markdown table; the random rows as one (mean of losses)."""
    rows = {label: row for label, row in result["loss"].items() if not label.startswith("random")}
    drawn = [row for label, row in result["loss"].items() if label.startswith("random")]
    if drawn:
        rows["random (mean of 3)"] = {d: sum(row[d] for row in drawn) / len(drawn) for d in domains}
    base = rows["(all experts)"]
    print(
        f"\n### {name}: {result['verified']} checkpoints verified, largest relative difference {result['largest_relative_difference']:.1e}\n"
    )
    print("| method | " + " | ".join(domains) + " | mean rise (nats) |\n|---|" + "---|" * (len(domains) + 1))
    for label, row in rows.items():
        rise = sum(row[d] - base[d] for d in domains) / len(domains)
        print(f"| {label} | " + " | ".join(f"{math.exp(row[d]):.1f}" for d in domains) + f" | {rise:+.3f} |")
    print()


if __name__ == "__main__":
    main()

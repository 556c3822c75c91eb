"""Held-out perplexity of every method on trained test models: part of the experts, chosen for each domain, verified.

    EXPERTSMITH_TESTBED=… python benchmarks/methods_table.py [--models mixtral qwen2_moe] [--keep 0.75 0.5] [-o results.json]

The testbed holds `models/NAME` and `corpus/DOMAIN/{calib,heldout}.jsonl` (under `data/`). One calibration a model serves every method that
reads statistics. Data-free methods choose once for all domains. Every method keeps the same number in every layer here; what MoEITS keeps by
its own threshold comes after the table. Perplexity is of the domain that the experts were chosen for; lower is better.
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
from expertsmith.methods import find

METHODS = {
    "frequency": ("frequency", {}),
    "router_score": ("router_score", {}),
    "ean": ("ean", {}),
    "ean weighted": ("ean", {"weighted": True}),
    "man": ("man", {}),
    "msan": ("msan", {}),
    "reap": ("reap", {}),
    "easy_ep": ("easy_ep", {}),
    "expert_sparsity": ("expert_sparsity", {"tokens": 2048, "limit": 1000}),
    "expert_sparsity progressive": ("expert_sparsity", {"tokens": 2048, "limit": 1000, "progressive": True}),
    "hc_smoe": ("hc_smoe", {}),
    "hc_smoe aligned": ("hc_smoe", {"align": True}),
    "m_smoe": ("m_smoe", {}),
    "moeits": ("moeits", {}),
    "aimer": ("aimer", {}),
    "random 0": ("random", {"seed": 0}),
    "random 1": ("random", {"seed": 1}),
    "random 2": ("random", {"seed": 2}),
}
RUN = {"device": "cpu", "dtype": "float32", "memory": "resident"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen2_moe", "deepseek_v2"])
    parser.add_argument("--keep", nargs="+", default=["0.75", "0.5"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="LABEL")
    parser.add_argument("--factors", nargs="*", type=float, default=[3.0, 1.5, 0.5], help="of MoEITS' own threshold")
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
            results[name] = tables(root / "models" / name, corpus, domains, args, Path(work))
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        for keep in args.keep:
            show(f"{name}, keep {keep}", results[name][keep], domains)
        for row in results[name]["thresholds"]:
            print(row)


def tables(model: Path, corpus: Path, domains: list[str], args: argparse.Namespace, work: Path) -> dict:
    """Loss of every method and domain at every ratio, and what `verify` found."""
    calib = {d: f"{d}={corpus / d / 'calib.jsonl'}" for d in domains}
    shape = {"samples": args.calibration, "seq_len": 256, "batch_tokens": 2048}
    begin = time.perf_counter()
    stats = api.calibrate(model, list(calib.values()), work / "stats", all_outputs=True, **shape, **RUN)
    found: dict = {"calibration_seconds": time.perf_counter() - begin, "tokens": stats.tokens}
    base = evaluate(model, corpus, domains, args)
    for keep in args.keep:
        loss: dict[str, dict[str, float]] = {"(all experts)": base}
        worst, runs, seconds = 0.0, 0, {}
        for label, (method, options) in ((label, METHODS[label]) for label in args.methods):
            loss[label] = {}
            begin = time.perf_counter()
            for chosen_for in [domains] if find(method).data_free else [[d] for d in domains]:
                made = plan_for(model, method, keep, options, stats, [calib[d] for d in chosen_for], chosen_for, shape, work)
                worst, runs = max(worst, checked(model, made, work / "out", label)), runs + 1
                loss[label] |= evaluate(work / "out", corpus, chosen_for, args)
                shutil.rmtree(work / "out")
            seconds[label] = time.perf_counter() - begin
            text = ", ".join(f"{d} {math.exp(v):.1f}" for d, v in loss[label].items())
            print(f"{model.name} keep {keep} {label} ({seconds[label]:.0f} s): {text}", flush=True)
        found[keep] = {"loss": loss, "seconds": seconds, "verified": runs, "largest_relative_difference": worst}
    found["thresholds"] = [by_threshold(model, corpus, domains, factor, base, args, work) for factor in args.factors]
    return found


def plan_for(
    model: Path, method: str, keep: str, options: dict, stats, data: list[str], domains: list[str], shape: dict, work: Path
):
    if find(method).reads == "model":
        return api.plan(model, method, keep, data=data, options=options, **shape, **RUN)
    if find(method).data_free:
        return api.plan(model, method, keep, options=options, work=work / "measured" if method == "moeits" else None)
    return api.plan(model, method, keep, stats=stats, domains=domains, options=options)


def checked(model: Path, made, out: Path, label: str) -> float:
    """Write and prove a plan; the largest relative difference."""
    api.apply(model, made, out)
    verdict = api.verify(model, out, device="cpu")
    assert verdict.passed, (label, verdict)
    return verdict.largest


def by_threshold(
    model: Path, corpus: Path, domains: list[str], factor: float, base: dict, args: argparse.Namespace, work: Path
) -> str:
    """MoEITS as published: its own threshold, another number of experts in every layer, and the uniform neighbour."""
    cells = []
    for uniform in (False, True):
        made = api.plan(model, "moeits", options={"factor": factor}, uniform=uniform, work=work / "measured")
        checked(model, made, work / "out", "moeits")
        loss = evaluate(work / "out", corpus, domains, args)
        shutil.rmtree(work / "out")
        rise = sum(loss[d] - base[d] for d in domains) / len(domains)
        cells.append(f"{'uniform' if uniform else 'threshold'} keeps {made.counts}, mean rise {rise:+.3f}")
    return f"{model.name} moeits factor {factor}: " + "; ".join(cells)


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

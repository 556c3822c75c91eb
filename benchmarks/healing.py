"""What healing brings back on trained test models: methods of choosing × ways of healing, on held-out text.

    EXPERTSMITH_TESTBED=… python benchmarks/healing.py [--models qwen2_moe mixtral] [--keep 0.5 0.25] [--methods reap random 'reap@esap:generations=5;samples=20']
        [--heal least_squares layer_local] [--one-domain] [-o healing.json]

The testbed holds `models/NAME` and `data/corpus/DOMAIN/{calib,heldout}.jsonl`. Experts are chosen, and the model healed, on the calibration
text of all domains together; with --one-domain on that of each domain by itself, judged on that domain. A cell is the rise of the held-out loss
over the original, in nats a token, mean over the domains, its standard error over sequences (paired with the original), in brackets the share of the
unhealed rise that is left, and the seconds of the processor, on one thread. A cell that stands in the output file already is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch

from expertsmith import api

NOTHING = "none"
RUN = {"device": "cpu", "memory": "resident"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mixtral", "qwen2_moe", "deepseek_v2"])
    parser.add_argument("--keep", nargs="+", default=["0.5"])
    parser.add_argument("--methods", nargs="+", default=["reap"], help="METHOD[@BUDGET][:key=value;…]")
    parser.add_argument("--heal", nargs="*", default=["least_squares", "layer_local"], help="METHOD or METHOD:key=value;…")
    parser.add_argument("--one-domain", action="store_true")
    parser.add_argument("--samples", type=int, default=24, help="calibration sequences of 256 tokens a domain")
    parser.add_argument("--windows", type=int, default=30, help="held-out windows of 256 tokens a domain")
    parser.add_argument("-o", "--out", type=Path, default=Path("healing.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(os.environ["EXPERTSMITH_TESTBED"])
    corpus = root / "data" / "corpus"
    domains = sorted(path.name for path in corpus.iterdir() if path.is_dir())
    cells: dict[str, dict] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.models:
        for chosen in [[domain] for domain in domains] if args.one_domain else [domains]:
            with tempfile.TemporaryDirectory() as work:
                fill(cells, root / "models" / name, corpus, chosen, args, Path(work))
    show(cells, args)


def fill(cells: dict[str, dict], model: Path, corpus: Path, domains: list[str], args: argparse.Namespace, work: Path) -> None:
    """Every cell of one model and calibration that is not there yet."""
    calib = [f"{d}={corpus / d / 'calib.jsonl'}" for d in domains]
    shape = {"samples": args.samples, "seq_len": 256, "batch_tokens": 2048}
    for method in args.methods:
        for keep in args.keep:
            missing = [way for way in (NOTHING, *args.heal) if key_of(model, domains, method, keep, way) not in cells]
            if not missing:
                continue
            asked, chosen = split_way(method)
            name, _, budget = asked.partition("@")
            text = {} if name == "random" else {"data": calib, "work": work / f"plans-{name}", **shape, **RUN}
            plan = api.plan(model, name, keep, budget=budget or None, options=chosen, **text)
            api.apply(model, plan, work / "chosen", overwrite=True)
            for way in missing:
                begin, out = time.process_time(), work / "chosen"
                report: dict = {}
                if way != NOTHING:
                    healer, options = split_way(way)
                    out = work / "healed"
                    job = {"method": healer, "options": options, "overwrite": True, "resume": False}
                    report = api.heal(work / "chosen", model, calib, out, **job, **shape, **RUN)
                seconds = time.process_time() - begin
                loss = losses(out, model, corpus, domains, args)["domains"]
                cells[key_of(model, domains, method, keep, way)] = {
                    "loss": loss,
                    "rise": sum(row["loss"] - row["reference_loss"] for row in loss.values()) / len(loss),
                    "kl": sum(row["kl"] for row in loss.values()) / len(loss),
                    "seconds": seconds,
                    "tokens": sum(report["data"]["tokens"].values()) if report else 0,
                    "training": report.get("training", {}),
                }
                args.out.write_text(json.dumps(cells, indent=1) + "\n")
                cell = cells[key_of(model, domains, method, keep, way)]
                print(f"{key_of(model, domains, method, keep, way)}: {cell['rise']:.4f} nats, {seconds:.0f} s", flush=True)


def key_of(model: Path, domains: list[str], method: str, keep: str, way: str) -> str:
    return " | ".join((model.name, domains[0] if len(domains) == 1 else "all", method, keep, way))


def split_way(way: str) -> tuple[str, dict[str, str]]:
    """METHOD or METHOD:key=value;… → the method and its options."""
    healer, _, rest = way.partition(":")
    return healer, dict(pair.split("=") for pair in rest.split(";")) if rest else {}


def losses(out: Path, model: Path, corpus: Path, domains: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """The quality on held-out text, by domain and as the mean over the domains."""
    data = [f"{d}={corpus / d / 'heldout.jsonl'}" for d in domains]
    job = {"samples": args.windows, "seq_len": 256, "batch_tokens": 2048, "dtype": "float32"}
    found: dict[str, dict] = api.evaluate(out, data, reference=model, **job, **RUN).to_json()
    return found


def show(cells: dict[str, dict], args: argparse.Namespace) -> None:
    """A Markdown table: a row a model, calibration, method and ratio; a column a way of healing."""
    ways = [NOTHING, *args.heal]
    rows: dict[tuple[str, ...], dict[str, dict]] = {}
    for key, cell in cells.items():
        *row, way = key.split(" | ")
        if row[0] in args.models and row[2] in args.methods and row[3] in args.keep and (row[1] != "all") == args.one_domain:
            rows.setdefault(tuple(row), {})[way] = cell
    titles = ["model", "calibration", "method", "keep", "as it is", *ways[1:]]
    print("\n| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for row, held in rows.items():
        base = held[NOTHING]
        healed = [
            f"{told(held[way])} ({held[way]['rise'] / base['rise']:.2f}), {held[way]['seconds']:.0f} s" if way in held else ""
            for way in ways[1:]
        ]
        print("| " + " | ".join((*row, told(base), *healed)) + " |")


def told(cell: dict) -> str:
    """The rise and its standard error, that of a mean of independent domains."""
    errors = [entry["rise_se"] for entry in cell["loss"].values()]
    return f"{cell['rise']:.3f} ± {math.hypot(*errors) / len(errors):.3f}"


if __name__ == "__main__":
    main()

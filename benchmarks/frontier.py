"""Comparisons of several models and seeds as one table a model: methods × budgets × healing.

    python benchmarks/frontier.py FOLDER … [--keep 0.5]

A FOLDER is the output of `expertsmith compare`; docs/comparison.md has the commands. Folders of one model that differ in the seed are
repetitions. A cell is the increase of the held-out loss in nats per token, mean of the repetitions, ± the paired standard error of one of them
(root of the mean square), and [least, largest] of the repetitions. ≈: within two standard errors of the best of its column with the same
healing, by the paired difference of the two, on the same sequences, in every repetition that has both. Random draws are no candidates.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from expertsmith.evaluation.paired import CLEAR, ratio

Key = tuple[str, str, str]  # method, budget, healing
Column = dict[Key, dict[str, list[dict[str, Any]]]]  # → repetition → its cells (several draws of random)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--keep", nargs="+", type=float, help="only these ratios")
    args = parser.parse_args()
    models: dict[str, dict[float, Column]] = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    for folder in args.folders:
        found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        text = f"{found['calibration'].get('fingerprint')} {found['heldout']['fingerprint']}"
        for group in found["groups"]:
            for row in group["rows"] if not args.keep or group["keep"] in args.keep else ():
                name = "random" if row["method"].startswith("random:") else row["method"]
                column = models[found["model"]["source"]][group["keep"]]
                column[name, group["budget"], row["heal"] or "–"][text].append({**row, **cell_of(folder, row)})
    for model, columns in models.items():
        show(model, columns)


def cell_of(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The file of a cell, which has the increase of every sequence."""
    name = Path(row["plan"]).stem if row["plan"].endswith(".json") else row["plan"]
    file = name if row["heal"] is None else re.sub(r"[^\w.=]+", "-", f"{name}-{row['heal']}")
    return dict(json.loads((folder / "cells" / f"{file}.json").read_text(encoding="utf-8")))


def show(model: str, columns: dict[float, Column]) -> None:
    """One table of a model as Markdown: sorted by healing, then by the increase in the middle column."""
    keeps = sorted(columns, reverse=True)
    middle = [keeps[len(keeps) // 2], *keeps]
    keys = {key for column in columns.values() for key in column}
    order = sorted(
        keys, key=lambda key: (key[2] != "–", key[2], mean(next(columns[k][key] for k in middle if key in columns[k])))
    )
    print(
        f"\n**{model}**\n\n| method | budget | healing | {' | '.join(f'{keep:g} kept' for keep in keeps)} | plan s | heal s |"
    )
    print("|" + "---|" * (len(keeps) + 5))
    for key in order:
        texts = [text_of(columns[keep], key) if key in columns[keep] else "" for keep in keeps]
        rows = [row for keep in keeps for cells in columns[keep].get(key, {}).values() for row in cells]
        healed = [row["healing"]["seconds"] for row in rows if "healing" in row]
        took = [
            f"{statistics.median(row['planning']['seconds'] for row in rows):.1f}",
            f"{statistics.median(healed):.0f}" if healed else "",
        ]
        print(f"| `{key[0]}` | {' | '.join([*key[1:], *texts, *took])} |")


def text_of(column: Column, key: Key) -> str:
    """`increase ± standard error [least, largest]`, bold if it is the best of its healing, ≈ if it ties with that."""
    rows = [row for cells in column[key].values() for row in cells]
    rises = [row["rise"]["mean"][0] for row in rows]
    text = f"{mean(column[key]):+.3f} ± {root_mean_square([row['rise']['mean'][1] for row in rows]):.3f}"
    if len(rows) > 1:
        text += f" [{min(rises):.3f}, {max(rises):.3f}]"
    best = min(
        (other for other in column if other[2] == key[2] and other[0] != "random"),
        key=lambda other: mean(column[other]),
        default=key,
    )
    if best == key:
        return f"**{text}**"
    pairs = [(mine[0], column[best][which][0]) for which, mine in column[key].items() if which in column[best]]
    apart = [difference(mine["rise"]["sequences"], theirs["rise"]["sequences"]) for mine, theirs in pairs]
    tied = apart and abs(statistics.mean(d for d, _ in apart)) <= CLEAR * root_mean_square([error for _, error in apart])
    return f"{text} ≈" if tied and key[0] != "random" else text


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """(mean over domains of the difference on the same sequences, its standard error)."""
    each = [ratio([(n, a - b) for (n, a), (_, b) in zip(mine[name], theirs[name], strict=True)]) for name in mine]
    return statistics.mean(d for d, _ in each), math.hypot(*(error for _, error in each)) / len(each)


def mean(held: dict[str, list[dict[str, Any]]]) -> float:
    return statistics.mean(row["rise"]["mean"][0] for cells in held.values() for row in cells)


def root_mean_square(values: list[float]) -> float:
    return math.sqrt(statistics.mean(value * value for value in values))


if __name__ == "__main__":
    main()

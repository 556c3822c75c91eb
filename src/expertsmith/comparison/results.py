"""Combine finished cells: sorted rows, the random draws as one row, which are best and which worse than chance; as JSON and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertsmith.comparison.cells import BASELINE, CELLS, WORK, Cell, load, short_names
from expertsmith.views.show import byte_count, count

if TYPE_CHECKING:
    from expertsmith.comparison.run import Comparison

Row = dict[str, Any]
WORSE = "†"


def together(job: Comparison, held: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The content of comparison.json: `groups` of rows that keep the same share with the same budget, each sorted by the mean rise."""
    from expertsmith import __version__

    groups: dict[tuple[Any, str], list[Row]] = {}
    names = short_names(cell.contender.label for cell in job.cells)
    for cell in job.cells:
        if cell.name in held:
            groups.setdefault((cell.keep, cell.budget), []).append(_row(cell, names, held[cell.name]))
    told = [f"{name} is {label}" for label, name in names.items() if label != name and not label.startswith(f"{BASELINE}:")]
    inventory, checkpoint = job.inventory, job.inventory.checkpoint
    parameters, nbytes = inventory.size()
    any_row = next(row for rows in groups.values() for row in rows)
    domains = {
        name: {"loss": row["reference_loss"], "perplexity": row["reference_perplexity"]}
        for name, row in any_row["quality"]["domains"].items()
    }
    text = job.calibration
    took = load(statistics_folder(job).with_suffix(".json"), {"model": checkpoint.fingerprint, "data": job.text})
    scores = load(original_file(job), job.original_with) if job.tasks else None
    return {
        "format": "expertsmith.comparison",
        "version": 1,
        "made_by": f"expertsmith {__version__}",
        "model": {
            "source": checkpoint.path.name if Path(checkpoint.source).exists() else checkpoint.source,
            "model_type": inventory.architecture.model_type,
            "fingerprint": checkpoint.fingerprint,
        },
        "calibration": {}
        if text is None
        else {"fingerprint": job.text, "tokens": text.tokens, **(took["calibration"] if took else {})},
        "heldout": {
            "fingerprint": job.heldout.fingerprint,
            "tokens": {name: row["tokens"] for name, row in any_row["quality"]["domains"].items()},
        },
        "dtype": job.where["dtype"],
        "original": {
            "experts": sum(inventory.counts.values()),
            "parameters": parameters,
            "bytes": nbytes,
            "domains": domains,
            **({"tasks": scores["tasks"]} if scores else {}),
        },
        "groups": [_group(share, budget, rows) for (share, budget), rows in groups.items()],
        "notes": [*told, *job.notes],
    }


def _row(cell: Cell, names: Mapping[str, str], held: Mapping[str, Any]) -> Row:
    return {
        "name": names[cell.contender.label],
        "method": cell.contender.label,
        "title": cell.contender.method.title,
        "heal": cell.heal,
        "keep": cell.keep,
        "budget": cell.budget,
        **{key: value for key, value in held.items() if key not in ("format", "version", "made_with")},
    }


def _group(share: float | int | None, budget: str, rows: Iterable[Row]) -> dict[str, Any]:
    """Rows sorted by the mean rise; `random`: for each way of healing the draws' mean, least and largest rise. A row is `worse_than_random` if its
    rise is above the mean of the draws with the same healing (None where there are no draws, as with methods' own thresholds)."""
    rows = sorted(rows, key=lambda row: row["rise"]["mean"][0])
    drawn: dict[Any, list[float]] = {}
    for row in rows:
        if _random(row):
            drawn.setdefault(row["heal"], []).append(row["rise"]["mean"][0])
    chance = [
        {"heal": heal, "mean": math.fsum(v) / len(v), "least": min(v), "largest": max(v), "draws": len(v)}
        for heal, v in drawn.items()
    ]
    means = {entry["heal"]: entry["mean"] for entry in chance}
    for row in rows:
        mean = means.get(row["heal"])
        row["worse_than_random"] = None if mean is None or _random(row) else row["rise"]["mean"][0] > mean
    return {"keep": share, "budget": budget, "random": chance, "rows": rows}


def _random(row: Row) -> bool:
    return bool(row["method"].partition(":")[0] == BASELINE)


def title(group: Mapping[str, Any]) -> str:
    """ "Keep 0.5", "Keep 0.5, budget global", "Thresholds of the methods"."""
    if group["keep"] is None:
        return "Thresholds of the methods"
    share = f"Keep {group['keep']:g}" if isinstance(group["keep"], float) else f"Keep {group['keep']} experts per layer"
    return share if group["budget"] == "uniform" else f"{share}, budget {group['budget']}"


def label(row: Row) -> str:
    """Method and healing of a row."""
    return str(row["name"]) if row["heal"] is None else f"{row['name']} + {row['heal']}"


def shown(group: Mapping[str, Any]) -> list[Row]:
    """The rows of a table: the draws of `random` as one row with the mean of each number (perplexity: exp of the mean loss)."""
    rows = [row for row in group["rows"] if not _random(row)]
    for chance in group["random"]:
        drawn = [row for row in group["rows"] if _random(row) and row["heal"] == chance["heal"]]
        rows.append(_mean_row(drawn, chance))
    return sorted(rows, key=lambda row: row["rise"]["mean"][0])


def _mean_row(drawn: Sequence[Row], chance: Mapping[str, Any]) -> Row:
    def mean(values: Iterable[float]) -> float:
        held = list(values)
        return math.fsum(held) / len(held)

    first = drawn[0]
    domains = {}
    for name in first["quality"]["domains"]:
        held = [row["quality"]["domains"][name] for row in drawn]
        domains[name] = {key: mean(entry[key] for entry in held) for key in ("loss", "kl", "top1_agreement")}
        domains[name]["perplexity"] = math.exp(min(domains[name]["loss"], 700.0))
    overall = {key: mean(row["quality"]["mean"][key] for row in drawn) for key in ("loss", "kl", "top1_agreement")}
    made = {
        **first,
        "name": f"{BASELINE}, mean of {chance['draws']}",
        "method": BASELINE,
        "title": "seeded draws",
        "plan": None,
        "quality": {"domains": domains, "mean": overall},
        "rise": {"mean": [chance["mean"], None], "range": [chance["least"], chance["largest"]]},
        "planning": {key: mean(row["planning"][key] for row in drawn) for key in first["planning"]},
        "worse_than_random": None,
    }
    for key in ("experts", "parameters", "bytes"):
        made[key] = [first[key][0], round(mean(row[key][1] for row in drawn))]
    if "tasks" in first:
        made["tasks"] = {name: mean(row["tasks"][name] for row in drawn) for name in first["tasks"]}
    return made


def sizes(row: Row) -> list[str]:
    """Experts, parameters and bytes that are left."""
    before, after = row["bytes"]
    experts = f"{row['experts'][1]} of {row['experts'][0]}"
    return [experts, count(row["parameters"][1]), f"{byte_count(after)} ({100 * after / before:.0f} %)"]


def alike(rows: Sequence[Row]) -> bool:
    """Whether all rows have the same size, which is then shown in the title."""
    return len({(*row["experts"], *row["parameters"], *row["bytes"]) for row in rows}) == 1


def heading(group: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """`title`, and the size if it is that of all rows."""
    if not alike(rows):
        return title(group)
    experts, parameters, held = sizes(rows[0])
    return f"{title(group)}: {experts} experts, {parameters} parameters, {held}"


def columns(found: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The table's head."""
    size = [] if alike(rows) else ["experts", "parameters", "bytes"]
    return [
        "method",
        *size,
        *found["original"]["domains"],
        "mean increase ± se",
        "KL",
        "top-1",
        *_task_names(found),
        "plan s",
        "memory",
    ]


def _task_names(found: Mapping[str, Any]) -> list[str]:
    return list(found["original"].get("tasks", {}))


def original_cells(found: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The first line: the model as it is."""
    held = found["original"]
    size = [] if alike(rows) else [str(held["experts"]), count(held["parameters"]), byte_count(held["bytes"])]
    scores = [f"{value:.3f}" for value in held.get("tasks", {}).values()]
    return [
        "the original",
        *size,
        *(f"{row['perplexity']:.2f}" for row in held["domains"].values()),
        "0",
        "0",
        "100 %",
        *scores,
        "",
        "",
    ]


def cells(row: Row, found: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """A row's texts, and whether each is the best of its column among `rows`; a row that is worse than chance has a mark behind its name."""

    def of(path: Sequence[str | int], entry: Any) -> float:
        for key in path:
            entry = entry[key]
        return float(entry)

    def judged(text: str, *path: str | int, highest: bool = False) -> tuple[str, bool]:
        return text, of(path, row) == (max if highest else min)(of(path, entry) for entry in rows)

    quality, (rise, error), took = row["quality"], row["rise"]["mean"], row["planning"]
    spread = f" ± {error:.3f}" if error is not None else f" [{row['rise']['range'][0]:.3f}, {row['rise']['range'][1]:.3f}]"
    memory = byte_count(took["memory"]) + (f" + {byte_count(took['cuda_memory'])} GPU" if took.get("cuda_memory") else "")
    name = label(row) + (f" {WORSE}" if row["worse_than_random"] else "")
    return [
        (name, False),
        *((text, False) for text in (() if alike(rows) else sizes(row))),
        *(
            judged(f"{quality['domains'][name]['perplexity']:.2f}", "quality", "domains", name, "perplexity")
            for name in found["original"]["domains"]
        ),
        judged(f"{rise:+.3f}{spread}", "rise", "mean", 0),
        judged(f"{quality['mean']['kl']:.3f}", "quality", "mean", "kl"),
        judged(f"{100 * quality['mean']['top1_agreement']:.1f} %", "quality", "mean", "top1_agreement", highest=True),
        *(judged(f"{row['tasks'][name]:.3f}", "tasks", name, highest=True) for name in _task_names(found)),
        (f"{took['seconds']:.2f}", False),
        (memory, False),
    ]


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What the tables say, in a sentence a group."""
    made = []
    for group in found["groups"]:
        rows = shown(group)
        first, (rise, error) = rows[0], rows[0]["rise"]["mean"]
        text = (
            f"{title(group)}: {label(first)} has the smallest loss increase, {rise:+.3f}"
            + ("" if error is None else f" ± {error:.3f}")
            + " nats per token"
        )
        chance = next((entry for entry in group["random"] if entry["heal"] is None), None)
        if chance:
            text += f"; random draws {chance['mean']:+.3f} [{chance['least']:.3f}, {chance['largest']:.3f}]"
            worse = sum(bool(row["worse_than_random"]) for row in rows if row["heal"] is None)
            text += f", {worse} of {sum(row['heal'] is None for row in rows) - 1} methods are worse than their mean"
        made.append(text + ".")
    return made


def how(found: Mapping[str, Any]) -> list[str]:
    """What was measured, and how to make a cell again."""
    calibration, heldout = found["calibration"], found["heldout"]
    chosen = "Experts chosen without text"
    if calibration:
        took = f"; one pass for all statistics took {calibration['seconds']:.1f} s" if "seconds" in calibration else ""
        chosen = f"Experts chosen on {sum(calibration['tokens'].values()):,} tokens ({', '.join(calibration['tokens'])}){took}"
    return [
        f"{chosen}; evaluated on {sum(heldout['tokens'].values()):,} predicted tokens of held-out text, dtype {found['dtype']}.",
        "Perplexity by domain; mean increase: loss minus the original's in nats per token, mean over domains, with the paired standard error over sequences (random: [least, "
        "largest draw]); KL(original ‖ compressed) in nats; top-1: share of tokens with the same most probable next token.",
        "plan s and memory are for planning alone: seconds, and additional bytes of the process. If a method measures weights, "
        "only its first cell does so, once for all ratios.",
        f"Bold: best of its column. {WORSE}: worse than the mean of the random draws. `expertsmith apply MODEL plans/NAME.json -o OUT` writes any of these models.",
    ]


def markdown(found: Mapping[str, Any]) -> str:
    """comparison.md: the picture, a table a group, and how it was measured."""
    lines = ["![quality over size](comparison.svg)", "", *(f"- {text}" for text in sentences(found)), ""]
    for group in found["groups"]:
        rows = shown(group)
        head = columns(found, rows)
        bold = [[f"**{text}**" if best else text for text, best in cells(row, found, rows)] for row in rows]
        lines += [f"**{heading(group, rows)}**", "", _line(head), "|" + "---|" * len(head)]
        lines += [_line(original_cells(found, rows)), *map(_line, bold), ""]
    return "\n".join([*lines, *(f"{text}\n" for text in how(found)), *(f"- Note: {note}" for note in found["notes"])]) + "\n"


def _line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def original_file(job: Comparison) -> Path:
    """Where the original's own task results lie."""
    return job.folder / CELLS / "original.json"


def statistics_folder(job: Comparison) -> Path:
    """The folder of the statistics; the time and memory of calibration are in a .json file of the same name next to it."""
    everything = any(cell.contender.method.all_outputs for cell in job.cells)
    return job.folder / WORK / ("statistics-all-outputs" if everything else "statistics")

"""The words of a comparison: headings, cells, sentences, Markdown. The page, the table and the picture show them.

`found` is comparison.json from `comparison.results.displayed`: in each group, the `rows` to show, with the draws of `random` as one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from expertsmith.views.show import byte_count, count

Row = Mapping[str, Any]
WORSE = "†"
TIED = "≈"
RISE, ABOVE = "mean increase ± se", "above the best ± se"  # column headings


def title(group: Mapping[str, Any]) -> str:
    """ "Keep 0.5", "Keep 0.5, budget global", "Thresholds of the methods"."""
    if group["keep"] is None:
        return "Thresholds of the methods"
    share = f"Keep {group['keep']:g}" if isinstance(group["keep"], float) else f"Keep {group['keep']} experts per layer"
    return share if group["budget"] == "uniform" else f"{share}, budget {group['budget']}"


def label(row: Row) -> str:
    """The method and healing of a row."""
    return str(row["name"]) if row["heal"] is None else f"{row['name']} + {row['heal']}"


def sizes(row: Row) -> list[str]:
    """The experts, parameters and bytes that are left."""
    before, after = row["bytes"]
    experts = f"{row['experts'][1]} of {row['experts'][0]}"
    return [experts, count(row["parameters"][1]), f"{byte_count(after)} ({100 * after / before:.0f} %)"]


def alike(rows: Sequence[Row]) -> bool:
    """Whether all rows have the same size; then the title shows it."""
    return len({(*row["experts"], *row["parameters"], *row["bytes"]) for row in rows}) == 1


def heading(group: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """`title`, and the size if all rows have the same."""
    if not alike(rows):
        return title(group)
    experts, parameters, held = sizes(rows[0])
    return f"{title(group)}: {experts} experts, {parameters} parameters, {held}"


def columns(found: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The headings of the table."""
    size = [] if alike(rows) else ["experts", "parameters", "bytes"]
    return [
        "method",
        *size,
        *found["original"]["domains"],
        RISE,
        *([ABOVE] if _compared(rows) else []),
        "KL",
        "top-1",
        *_task_names(found),
        "plan s",
        "memory",
    ]


def _compared(rows: Sequence[Row]) -> bool:
    return any(row.get("to_best") for row in rows)


def _above_best(row: Row) -> str:
    if not row["to_best"]:
        return "–"
    difference, error = row["to_best"]
    return "best" if difference == 0.0 == error else f"{difference:+.3f} ± {error:.3f}" + (f" {TIED}" if row["tied"] else "")


def _task_names(found: Mapping[str, Any]) -> list[str]:
    return list(found["original"].get("tasks", {}))


def original_cells(found: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The first line: the original model."""
    held = found["original"]
    size = [] if alike(rows) else [str(held["experts"]), count(held["parameters"]), byte_count(held["bytes"])]
    scores = [f"{value:.3f}" for value in held.get("tasks", {}).values()]
    return [
        "the original",
        *size,
        *(f"{row['perplexity']:.2f}" for row in held["domains"].values()),
        "0",
        *([""] if _compared(rows) else []),
        "0",
        "100 %",
        *scores,
        "",
        "",
    ]


def cells(row: Row, found: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """(text, whether it is the best of its column among `rows`) for each cell of a row. Rows worse than chance have a mark."""

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
        *([(_above_best(row), False)] if _compared(rows) else []),
        judged(f"{quality['mean']['kl']:.3f}", "quality", "mean", "kl"),
        judged(f"{100 * quality['mean']['top1_agreement']:.1f} %", "quality", "mean", "top1_agreement", highest=True),
        *(judged(f"{row['tasks'][name]:.3f}", "tasks", name, highest=True) for name in _task_names(found)),
        (f"{took['seconds']:.2f}", False),
        (memory, False),
    ]


def sentences(found: Mapping[str, Any]) -> list[str]:
    """The result of the tables, in one sentence per group."""
    made = []
    for group in found["groups"]:
        rows = group["rows"]
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
        follow = [row for row in rows if row.get("to_one_shot")]
        shifts = [f"{label(row)} {row['to_one_shot'][0]:+.3f} ± {row['to_one_shot'][1]:.3f}" for row in follow]
        near = [row for row in rows if row["tied"]] if first.get("to_best") else []
        same = [label(row) for row in near if row["to_best"] == [0.0, 0.0]]
        ties = [label(row) for row in near if row["to_best"] != [0.0, 0.0]]
        made.append(f"{text}.")
        if shifts:
            made.append(
                f"{title(group)}: paired difference from the same method without progressive statistics: {', '.join(shifts)}."
            )
        if same:
            verb = "gives" if len(same) == 1 else "give"
            made.append(f"{title(group)}: {_named(same)} {verb} exactly the losses of {label(first)}.")
        if ties:
            made.append(
                f"{title(group)}: {_named(ties)} {'is' if len(ties) == 1 else 'are'} within the noise of {label(first)}: the paired difference is below "
                "two standard errors. Evaluate on more text to tell them apart."
            )
    return made


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def how(found: Mapping[str, Any]) -> list[str]:
    """What was measured, and how to reproduce a cell."""
    calibration, heldout = found["calibration"], found["heldout"]
    chosen = "Experts chosen without text"
    if calibration:
        took = f"; one pass for all statistics took {calibration['seconds']:.1f} s" if "seconds" in calibration else ""
        chosen = f"Experts chosen on {sum(calibration['tokens'].values()):,} tokens ({', '.join(calibration['tokens'])}){took}"
    return [
        f"{chosen}; evaluated on {sum(heldout['tokens'].values()):,} predicted tokens of held-out text, dtype {found['dtype']}.",
        "Perplexity by domain; mean increase: loss minus the original's in nats per token, mean over domains, with the paired standard error over sequences (random: [least, "
        f"largest draw]); above the best: the paired difference to the best method, {TIED} where it is below two standard errors; KL(original ‖ compressed) in nats; top-1: share of tokens with the same most probable next token.",
        "plan s and memory are for planning alone: seconds, and additional bytes of the process. If a method measures weights, "
        "only its first cell does so, once for all ratios. Progressive rows include their own calibration.",
        f"Bold: best of its column. {WORSE}: worse than the mean of the random draws. `expertsmith apply MODEL plans/NAME.json -o OUT` writes any of these models.",
    ]


def markdown(found: Mapping[str, Any]) -> str:
    """comparison.md: the picture, a table per group, and how it was measured."""
    lines = ["![quality over size](comparison.svg)", "", *(f"- {text}" for text in sentences(found)), ""]
    for group in found["groups"]:
        rows = group["rows"]
        head = columns(found, rows)
        bold = [[f"**{text}**" if best else text for text, best in cells(row, found, rows)] for row in rows]
        lines += [f"**{heading(group, rows)}**", "", _line(head), "|" + "---|" * len(head)]
        lines += [_line(original_cells(found, rows)), *map(_line, bold), ""]
    return "\n".join([*lines, *(f"{text}\n" for text in how(found)), *(f"- Note: {note}" for note in found["notes"])]) + "\n"


def _line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"

"""Convert choices of experts between plans and the formats of other tools.

    ordered    JSONL, one line per layer: {"0": [106, 65, …]}, best expert first; a count or ratio of it is kept (vllm-ascend's
               expert_list_file)
    mask       JSON, one row per decoder layer with experts: [[1, 0, …], …], 1 for a kept expert (EASY-EP's expert_mask), or layer → row
    retained   JSON, layer → ids of the kept experts: {"0": [2, 5], …}, or the lists in the order of the MoE layers

A layer is given by its index in the checkpoint, or by a module path that contains it (model.layers.3.mlp). Merges and
skip thresholds, which these formats cannot represent, are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from expertsmith.errors import UserError, parse_json
from expertsmith.experts.inventory import Inventory
from expertsmith.experts.rules import keep_count, parse_keep
from expertsmith.planning.ahead import by_weights
from expertsmith.planning.job import rules_of
from expertsmith.planning.plan import LayerPlan, Method, Plan, Source
from expertsmith.planning.sizes import summary_of
from expertsmith.registry import unknown
from expertsmith.views.progress import Progress, Silent

Format = Literal["ordered", "mask", "retained"]
FORMATS: tuple[Format, ...] = ("ordered", "mask", "retained")
LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?:\.|$)")


def plan_from(
    path: str | Path,
    inventory: Inventory,
    keep: float | int | str | None = None,
    router_groups: str = "keep",
    mtp: Literal["keep", "drop"] = "keep",
    progress: Progress | None = None,
) -> Plan:
    """Make a plan from a file in any of the formats, which is recognised by its content.

    Args:
        keep: for ordered lists, how many experts to keep: a ratio or a count.

    Raises:
        UserError: no such file or format, layers or ids that the model does not have, an expert twice, a row of the wrong length, fewer
            experts than the router needs, or a keep that is missing or has no effect.
    """
    rows, kind = _read(Path(path), inventory)
    rules = rules_of(inventory, router_groups, mtp=True)
    entries = []
    ahead = [layer for layer in inventory.mtp_layers if layer in rows and mtp == "keep"]
    for layer in inventory.layers + ahead:
        count = inventory.experts_in(layer)
        where = f"{path}: layer {layer}"
        ids = _from_mask(rows[layer], count, where) if kind == "mask" else _checked(rows[layer], count, where)
        if kind == "ordered":
            if keep is not None:
                wanted = keep_count(parse_keep(keep), rules[layer], where)
                if wanted > len(ids):
                    raise UserError(f"{where} lists {len(ids)} experts, but {wanted} are to be kept", "keep fewer")
                ids = ids[:wanted]
            elif len(ids) == count:
                raise UserError(f"{path} orders all {count} experts of layer {layer}", "pass --keep to set how many are kept")
        keep_count(len(ids), rules[layer], where)
        entries.append(LayerPlan(layer=layer, num_experts=count, keep=sorted(ids), mtp=True if layer in ahead else None))
    if keep is not None and kind != "ordered":
        raise UserError(f"{path} already says which experts to keep", "leave --keep out")
    notes: list[str] = []
    if mtp == "keep" and inventory.mtp_layers != ahead:
        most, why = max(len(entry.keep) for entry in entries), f"{Path(path).name} does not contain it"
        left = [layer for layer in inventory.mtp_layers if layer not in ahead]
        entries += by_weights(inventory, left, most, router_groups, why, notes, progress or Silent()).values()
    options = {"file": Path(path).name, "format": kind, **({"keep": parse_keep(keep)} if keep is not None else {})}
    return Plan(
        method=Method(name="from_file", options=options),
        model=Source(model_type=inventory.architecture.model_type, fingerprint=inventory.checkpoint.fingerprint),
        router_groups="flatten" if router_groups == "flatten" else "keep",
        mtp=mtp if inventory.has_mtp else None,
        layers=entries,
        summary=summary_of(entries, inventory, mtp),
        notes=notes,
    )


def export(plan: Plan, kind: str) -> str:
    """The text of a plan in another format. In ordered lists the kept experts come first, each part by falling saliency if the plan has it.

    Raises:
        UserError: an unknown format, or a plan that the format cannot represent.
    """
    if kind not in FORMATS:
        raise unknown("format", kind, FORMATS)
    if plan.merges or plan.novices or plan.neurons or plan.skip is not None:
        what = "merges experts" if plan.merges else "makes experts constants" if plan.novices else "has skip thresholds"
        what = "removes neurons" if plan.neurons else what
        raise UserError(f"the plan {what}, which {kind} lists cannot represent", "export a plan that only prunes")
    if kind == "mask":
        rows = [[int(e in entry.keep) for e in range(entry.num_experts)] for entry in plan.layers if not entry.mtp]
        return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    if kind == "retained":
        return "{\n" + ",\n".join(f'"{entry.layer}": {json.dumps(entry.keep)}' for entry in plan.layers) + "\n}\n"
    return "".join(json.dumps({str(entry.layer): _ordered(entry)}) + "\n" for entry in plan.layers)


def _ordered(entry: LayerPlan) -> list[int]:
    values = entry.saliency or [0.0] * entry.num_experts
    return sorted(range(entry.num_experts), key=lambda e: (e not in entry.keep, -values[e], e))


def _read(path: Path, inventory: Inventory) -> tuple[dict[int, Any], Format]:
    """Read (decoder layer → its row, format)."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{path} is not a text file", "give a .json or .jsonl file") from None
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        data = parse_json(text, str(path))
    except UserError:  # or one JSON a line
        data = None
    if data is None or (len(lines) == 1 and path.suffix == ".jsonl"):
        return _complete(
            _merged([_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1)], path), path, inventory
        ), "ordered"
    if isinstance(data, Mapping) and data.get("format") == "expertsmith.plan":
        raise UserError(f"{path} is a plan already", "apply it")
    if isinstance(data, Mapping):
        rows = _merged([data], path)
    elif isinstance(data, list) and data and all(isinstance(row, list) for row in data):
        rows = _numbered(data, path, inventory)
    else:
        raise UserError(f"{path} holds neither a list of lists nor layer → list", f"formats are {', '.join(FORMATS)}")
    rows = _complete(rows, path, inventory)
    return rows, "mask" if all(_is_mask(rows[layer], inventory.experts_in(layer)) for layer in inventory.layers) else "retained"


def _line(text: str, where: str) -> Mapping[str, Any]:
    found = parse_json(text, where)
    if not isinstance(found, Mapping):
        raise UserError(f"{where} is a {type(found).__name__}, but a line must be layer → list of experts")
    return found


def _merged(parts: Sequence[Mapping[str, Any]], path: Path) -> dict[int, Any]:
    rows: dict[int, Any] = {}
    for part in parts:
        for name, row in part.items():
            match = LAYER.search(name)
            number = name if name.isdigit() else match[1] if match else None
            if number is None:
                raise UserError(f"{path}: {name!r} is not a layer", "keys are layer numbers or module paths with layers.N")
            if int(number) in rows:
                raise UserError(f"{path} has layer {int(number)} twice")
            rows[int(number)] = row
    return rows


def _numbered(data: list[Any], path: Path, inventory: Inventory) -> dict[int, Any]:
    """The rows of a plain list: one for each MoE layer, or one for each decoder layer."""
    if len(data) == len(inventory.layers):
        return dict(zip(inventory.layers, data, strict=True))
    if len(data) == inventory.num_layers:
        return {layer: data[layer] for layer in inventory.layers}
    raise UserError(
        f"{path} has {len(data)} rows, but {inventory.checkpoint.source} has {len(inventory.layers)} layers with experts"
    )


def _complete(rows: dict[int, Any], path: Path, inventory: Inventory) -> dict[int, Any]:
    strange, missing = sorted(set(rows) - {*inventory.layers, *inventory.mtp_layers}), sorted(set(inventory.layers) - set(rows))
    if strange:
        raise UserError(
            f"{path} names layer {strange[0]}, but {inventory.checkpoint.source} has experts in layers {inventory.layers}"
        )
    if missing:
        raise UserError(
            f"{path} lacks layer {missing[0]} of {inventory.checkpoint.source}", "every layer with experts needs a row"
        )
    return rows


def _is_mask(row: Any, count: int) -> bool:
    """Whether a row has a zero or one for every expert. In a layer of two experts, a list of the ids 0 and 1 passes too."""
    return isinstance(row, list) and len(row) == count and all(value in (0, 1) for value in row)


def _from_mask(row: list[Any], count: int, where: str) -> list[int]:
    found = [expert for expert in range(count) if row[expert]]
    if not found:
        raise UserError(f"{where} keeps no expert")
    return found


def _checked(row: Any, count: int, where: str) -> list[int]:
    if not isinstance(row, list) or not all(isinstance(e, int) and not isinstance(e, bool) for e in row):
        raise UserError(f"{where} is not a list of expert ids (or of {count} zeros and ones)")
    outside = [e for e in row if not 0 <= e < count]
    if outside:
        raise UserError(f"{where} names expert {outside[0]}, but the ids run from 0 to {count - 1}")
    twice = [e for e in row if row.count(e) > 1]
    if twice:
        raise UserError(f"{where} names expert {twice[0]} twice")
    return list(row)

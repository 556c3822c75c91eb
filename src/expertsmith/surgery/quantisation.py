"""Renumber the names of experts in a checkpoint's quantisation settings.

Mixed precision is configured by module name: `ignore` and `targets` of compressed-tensors, `dynamic` of GPTQModel (regular expressions),
`extra_config` of AutoRound, `modules_to_not_convert` of transformers, `exclude_modules` and `quantized_layers` of modelopt; in config.json and
in files next to it. Every entry follows one rule: a module of the output matches if and only if its module in the source
matches. Entries that already comply do not change; others are replaced by the names of the modules that they match.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from expertsmith.checkpoint.floats import SIDE_FILES, Floats
from expertsmith.errors import UserError, parse_json
from expertsmith.experts.inventory import Inventory

CONFIGS = ("quantization_config", "compression_config", "quantization")  # keys of config.json
PART = re.compile(r"\.(weight|bias|qweight|qzeros|scales|g_idx|input_scale|output_scale)([._].*)?$")  # a module's tensors
NUMBERED = re.compile(r"(?P<before>^|.*\.)experts\.(?P<expert>\d+)(?P<after>\..*)?$")
SPECIAL = frozenset("*?[]^$()|+{}\\")
BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"  # transformers 5.23, quantizers/quantizers_utils.py, should_convert_module

Matches = Callable[[str], bool]


@dataclass(frozen=True)
class Renumbering:
    """The new ids of a source's experts: decoder layer → expert → its ids in the output (none: dropped; several: dead copies, `pad`)."""

    inventory: Inventory
    new: Mapping[int, Mapping[int, tuple[int, ...]]]

    @cached_property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """Modules of routed experts in the source, and experts as a whole → their names in the output."""
        found: dict[str, tuple[str, ...]] = {}
        for claim in self.inventory.claims:
            if claim.kind != "expert" or claim.layer is None or claim.layer not in self.new or claim.expert is None:
                continue
            base = claim.info.name.removesuffix(claim.rest)
            prefix = next(
                p for p in self.inventory.architecture.expert_prefix if claim.rest.startswith(p.format(expert=claim.expert))
            )
            below = PART.sub("", "." + claim.rest.removeprefix(prefix.format(expert=claim.expert)))
            ids = self.new[claim.layer].get(claim.expert, ())
            for tail in {below, ""}:
                names = (base + prefix.format(expert=e).removesuffix(".") + tail for e in (claim.expert, *ids))
                source, *after = names
                found[source] = tuple(after)
        return found

    def literal(self, name: str) -> tuple[str, ...] | None:
        """The output's names for the full name of an expert or of a module in it; None for other names."""
        located, numbered = self.inventory.locate(f"{name}."), NUMBERED.match(name)
        if located is None or numbered is None:
            return None
        ids = self.new.get(located[0])
        if ids is None:  # not a layer whose experts change
            return (name,)
        new = ids.get(int(numbered["expert"]), ())
        return tuple(f"{numbered['before']}experts.{e}{numbered['after'] or ''}" for e in new)

    def matched(self, matches: Matches) -> tuple[bool, list[str]]:
        """(whether a rule selects the same modules in the output as in the source, the output's names of those it selects in the source).
        A rule that selects only dropped experts does not count as the same: it must be dropped too."""
        same, had = True, False
        selected: list[str] = []
        for source, names in self.modules.items():
            chosen = matches(source)
            same = same and all(matches(name) == chosen for name in names)
            if chosen:
                selected += names
                had = True
        return same and not (had and not selected), selected

    @cached_property
    def others(self) -> list[str]:
        """The other modules of the source, which keep their names."""
        names = dict.fromkeys(PART.sub("", name) for name in self.inventory.checkpoint.tensors)
        return [name for name in names if name not in self.modules]


def output_quantisation(config: dict[str, Any], renumbering: Renumbering) -> None:
    """Renumber the names of experts in a config.json that was copied from the source.

    Raises:
        UserError: an entry that matches experts by number and cannot be renumbered exactly.
    """
    for part in (config, config.get("text_config")):
        for key in CONFIGS:
            if isinstance(part, dict) and isinstance(part.get(key), Mapping):
                part[key] = renumbered(part[key], renumbering)


def output_files(renumbering: Renumbering) -> dict[str, str]:
    """Name → text of the files next to config.json that describe the quantisation and change with the experts (hf_quant_config.json,
    quantize_config.json and similar).

    Raises:
        UserError: as `output_quantisation`, or such a file that is not JSON.
    """
    made: dict[str, str] = {}
    if isinstance(renumbering.inventory.checkpoint, Floats):  # these files are not copied
        return made
    for file in (renumbering.inventory.checkpoint.path / name for name in SIDE_FILES):
        if not file.is_file():
            continue
        held = parse_json(file.read_bytes(), str(file), "download it again, or remove it if it is not needed")
        changed = renumbered(held, renumbering)
        if changed != held:
            made[file.name] = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
    return made


def renumbered(value: Any, renumbering: Renumbering, key: str = "", method: str = "") -> Any:
    """A part of a quantisation config with its names of experts renumbered; `key` is its key in the config."""
    if isinstance(value, Mapping):
        method = str(value.get("quant_method") or method)
        if "quantization" in value or "quant_algo" in value:  # hf_quant_config.json names no quant_method
            method = method or "modelopt"
        entries: dict[str, Any] = {}
        earlier: list[Matches] = []
        literals = [name for name in value if renumbering.literal(name) is not None]
        for name, held in value.items():
            changed = renumbered(held, renumbering, name, method)
            names = _entry(name, key, method, renumbering)
            if names != [name] and name not in literals:  # the first matching entry counts, and a name comes before any pattern
                taken = (
                    {new for literal in literals for new in renumbering.literal(literal) or ()} if key != "dynamic" else set()
                )
                names = [
                    new for new in names if _plain(new) not in taken and not any(matches(_plain(new)) for matches in earlier)
                ]
            for new in names:
                entries.setdefault(new, copy.deepcopy(changed))
            earlier += [_exactly(names)] if names != [name] else list(_rules(name, key, method))
        return entries
    if isinstance(value, list):
        made: list[Any] = []
        for held in value:
            made += (
                _entry(held, key, method, renumbering)
                if isinstance(held, str)
                else [renumbered(held, renumbering, key, method)]
            )
        return list(dict.fromkeys(made)) if all(isinstance(held, str) for held in made) else made
    return copy.deepcopy(value)


def _entry(entry: str, key: str, method: str, renumbering: Renumbering) -> list[str]:
    """The output's entries for one name or pattern."""
    rules = list(_rules(entry, key, method))
    if not rules:
        literal = renumbering.literal(entry)
        return [entry] if literal is None else list(literal)
    found = [renumbering.matched(matches) for matches in rules]
    if all(same for same, _ in found):
        return [entry]
    if any(selected != found[0][1] for _, selected in found):
        raise UserError(
            f"{renumbering.inventory.checkpoint.source}: {entry!r} in {key or 'the quantisation config'} matches experts by number, "
            "but matches different ones as a wildcard and as a regular expression",
            "list the full names of the experts in the source's config.json",
        )
    names = [*found[0][1], *(name for name in renumbering.others if rules[0](name))]
    if key == "dynamic":
        sign = entry[:2] if entry[:2] in ("+:", "-:") else ""
        return [f"{sign}^{re.escape(name)}$" for name in names]
    return names


def _rules(entry: str, key: str, method: str) -> Iterator[Matches]:  # noqa: C901  (one case for each notation)
    """Yield tests of module names against an entry, one for each possible reading; nothing for a plain name."""
    if entry.startswith("re:"):  # compressed-tensors
        yield _regex(entry.removeprefix("re:"), "{}", entry)
    elif key == "dynamic":  # GPTQModel
        yield _regex(re.sub(r"^[+-]:", "", entry), "{}", entry)
    elif key == "extra_config":  # AutoRound: a name, or a regular expression that is searched for
        if SPECIAL & set(entry):
            yield _regex(entry, ".*(?:{})", entry)
    elif key in ("exclude_modules", "quantized_layers") or method.startswith("modelopt"):
        if set("*?[") & set(entry):
            yield lambda name: fnmatchcase(name, entry)
    elif SPECIAL & set(entry):
        if set("*?[") & set(entry):
            yield lambda name: fnmatchcase(name, entry)
        try:
            yield _regex(entry, f"(?:{{}}){BOUNDARY}", entry)
        except UserError:
            if not set("*?[") & set(entry):
                raise
    elif method != "compressed-tensors" and NUMBERED.match(entry) and not re.search(r"(^|\.)(layers|blocks)\.\d+\.", entry):
        yield lambda name: f".{entry}." in f".{name}."  # a part of a name: the expert of that number in every layer


def _regex(pattern: str, frame: str, entry: str) -> Matches:
    try:
        compiled = re.compile(frame.replace("{}", pattern))
    except re.error as error:
        raise UserError(
            f"{entry!r} in the quantisation config is not a regular expression: {error}",
            "correct it in the source's config.json",
        ) from None
    return lambda name: compiled.match(name) is not None


def _exactly(names: list[str]) -> Matches:
    plain = frozenset(map(_plain, names))
    return lambda name: name in plain


def _plain(name: str) -> str:
    """The module that an entry written by `_entry` names."""
    match = re.fullmatch(r"(?:[+-]:)?\^(.*)\$", name)
    return re.sub(r"\\(.)", r"\1", match[1]) if match else name

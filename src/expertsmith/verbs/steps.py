"""What of a recipe is finished: `RECIPE.steps.json` beside the recipe has, for every step that is done, what it was made with and what it found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expertsmith.calibration.spec import parse_spec
from expertsmith.errors import UserError

FORMAT, VERSION = "expertsmith.steps", 1
READ_BACK = {"calibrate", "plan", "analyze", "compare"}  # their outputs hold all that they found


def steps_file(recipe: Path) -> Path:
    """`RECIPE.steps.json`."""
    return recipe.with_name(f"{recipe.stem}.steps.json")


class Steps:
    """The finished steps of a recipe.

    Args:
        file: where they are written; None: nowhere.
        anew: forget what is finished. Outputs that are there then may be replaced, by this run and by one that goes on from it.

    Raises:
        UserError: a file that is none of these.
    """

    def __init__(self, file: Path | None, anew: bool = False) -> None:
        self.file = file
        self.held: dict[str, Any] = {}
        self.replace = anew
        if file is None or anew or not file.exists():
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if (found["format"], found["version"]) != (FORMAT, VERSION):
                raise ValueError
            self.held, self.replace = dict(found["steps"]), bool(found["replace"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{file} should have the finished steps of the recipe, but cannot be read", "delete it, or pass --overwrite"
            ) from None

    def unchanged(self, name: str, made_with: Mapping[str, Any], out: str | None) -> bool:
        """Whether a step is finished with the same inputs and options, and its output is as it was left."""
        held = self.held.get(name)
        return held is not None and held["made_with"] == made_with and (out is None or held["output"] == _files(Path(out)))

    def why(self, name: str, made_with: Mapping[str, Any], out: str) -> str:
        """What changed since a step was finished: the end of a sentence."""
        held = self.held.get(name)
        if not held:
            return ""
        before, now = _flat(held["made_with"]), _flat(made_with)
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if not changed:
            return f", and {out} was changed since" if held["output"] != _files(Path(out)) else ""
        return f", and {', '.join(changed[:3])} changed since"

    def result(self, name: str, out: str | None) -> Any:
        """What a finished step returned."""
        from expertsmith.planning.plan import Plan, load_plan

        if name == "calibrate":
            from expertsmith.calibration.stats import load_statistics

            return load_statistics(str(out))
        if name == "plan":
            return load_plan(str(out))
        if name in READ_BACK:
            return json.loads(
                (Path(str(out)) / {"analyze": "measures.json", "compare": "comparison.json"}[name]).read_text("utf-8")
            )
        found = self.held[name]["result"]
        if name == "verify":
            from expertsmith.surgery.verify import Verdict

            return Verdict(**found)
        if name.startswith("evaluate"):
            from expertsmith.evaluation.quality import DomainQuality, Quality

            for row in found["domains"].values():
                row["rises"] = {int(key): tuple(value) for key, value in row["rises"].items()}
            return Quality(**{**found, "domains": {key: DomainQuality(**row) for key, row in found["domains"].items()}})
        return {**found, "plan": Plan.model_validate(found["plan"])} if name == "skip" else found

    def done(self, name: str, made_with: Mapping[str, Any], out: str | None, result: Any) -> None:
        """Write down that a step is finished."""
        if self.file is None:
            return
        if name in READ_BACK:
            result = None
        elif name == "skip":
            result = {**result, "plan": result["plan"].to_json()}
        elif name == "verify" or name.startswith("evaluate"):
            result = asdict(result)
        self.held[name] = {"made_with": made_with, "output": None if out is None else _files(Path(out)), "result": result}
        self._write()

    def end(self) -> None:
        """All steps are done: from now on no output is replaced unasked."""
        if self.replace and self.file is not None:
            self.replace = False
            self._write()

    def _write(self) -> None:
        assert self.file is not None
        partial = self.file.with_name(self.file.name + ".partial")
        held = {"format": FORMAT, "version": VERSION, "replace": self.replace, "steps": self.held}
        partial.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.file)


def made_with(section: Mapping[str, Any], more: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """All that a step depends on: its options, the files that they name, and the steps before it."""
    options = {key: value for key, value in section.items() if key not in ("out", "report", "overwrite")}
    files = {text: _files(place) for text, place in _named(options)}
    before = {name: hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest() for name, held in after.items()}
    held: dict[str, Any] = json.loads(
        json.dumps({"options": options, "the files that it reads": files, **more, "an earlier step": before})
    )
    return held


def _named(value: Any) -> Iterator[tuple[str, Path]]:
    """Files and folders that options name, of themselves or as the source of data."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _named(part)
    elif isinstance(value, str) and value:
        for text in (value, _source(value)):
            if text and Path(text).exists():
                yield text, Path(text)
                return


def _source(text: str) -> str:
    try:
        return parse_spec(text).source
    except UserError:
        return ""


def _files(place: Path) -> Any:
    """What tells whether a file, or the files of a folder, are the same: names, sizes and times; a model card may be written again."""
    if place.is_dir():
        return [[path.name, *_stamp(path)] for path in sorted(place.iterdir()) if path.is_file() and path.name != "README.md"]
    return _stamp(place) if place.exists() else None


def _stamp(path: Path) -> list[int]:
    held = path.stat()
    return [held.st_size, held.st_mtime_ns]


def _flat(held: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, and everything else by what it is."""
    return {**held["options"], **{key: value for key, value in held.items() if key != "options"}}

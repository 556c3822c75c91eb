"""The packaged recipes: one YAML file each in this folder, found by scanning."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from expertsmith.checkpoint.output import check_output
from expertsmith.registry import unknown


@dataclass(frozen=True)
class Shipped:
    """A recipe that comes along. Its first lines are comments: what it does, `needs: …`, `size: …`."""

    name: str
    about: str
    needs: str
    size: str
    text: str


def shipped() -> dict[str, Shipped]:
    """The recipes that come along, by name."""
    found = {}
    for file in sorted(files("expertsmith.recipes").iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".yaml"):
            name, text = file.name.removesuffix(".yaml"), file.read_text(encoding="utf-8")
            head = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
            told = {
                key: line.removeprefix(f"{key}:").strip()
                for key in ("needs", "size")
                for line in head
                if line.startswith(f"{key}:")
            }
            found[name] = Shipped(name, head[0], told["needs"], told["size"], text)
    return found


def copy(name: str, to: str | Path, overwrite: bool = False) -> Path:
    """Write a recipe that comes along to a file of your own.

    Raises:
        UserError: no recipe of that name, the file exists and is not to be replaced, or it cannot be written.
    """
    if name not in shipped():
        raise unknown("recipe", name, shipped())
    target = Path(to)
    if target.is_dir():
        target = target / f"{name}.yaml"
    check_output(target, "file", overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(shipped()[name].text, encoding="utf-8")
    return target

"""The plans inside a checkpoint that was made in several steps: its own, and those of the checkpoints that it was made from.

`expertsmith/plan.json` names the fingerprint of its source. A source that has a plan itself passes it on as
`expertsmith/earlier/FINGERPRINT.json`, under its own fingerprint, with those that it was passed.
"""

from __future__ import annotations

from pathlib import Path

from expertsmith.planning.plan import load_plan

PLAN = "expertsmith/plan.json"
EARLIER = "expertsmith/earlier"


def plans_in(folder: Path) -> dict[str, str]:
    """Relative path → text of all plans inside a checkpoint."""
    files = [folder / PLAN, *sorted((folder / EARLIER).glob("*.json"))]
    return {file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") for file in files if file.is_file()}


def passed_on(source: Path, fingerprint: str) -> dict[str, str]:
    """Relative path → text of the plans that a checkpoint made from `source`, which has this fingerprint, is passed."""
    held = plans_in(source)
    own = held.pop(PLAN, None)
    return held if own is None else {**held, f"{EARLIER}/{_name(fingerprint)}": own}


def originals(folder: Path) -> list[str]:
    """The fingerprints of the models that a checkpoint was made from, the nearest first; empty if it has no plan.

    Raises:
        UserError: a plan that cannot be read.
    """
    found: list[str] = []
    file = folder / PLAN
    while file.is_file():
        fingerprint = load_plan(file).model.fingerprint
        if fingerprint in found:
            break
        found.append(fingerprint)
        file = folder / EARLIER / _name(fingerprint)
    return found


def _name(fingerprint: str) -> str:
    return f"{fingerprint.rpartition(':')[2]}.json"

"""Progressive statistics hold for one choice of experts: which methods can be followed layer by layer, and which plan fits the statistics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from expertsmith.calibration.stats import PROGRESSIVE
from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules, keep_count
from expertsmith.methods.base import Method


def record(method: str, options: Mapping[str, Any], keep: float | int | None) -> dict[str, Any]:
    """What the header of the statistics says of the choice that they follow."""
    made: dict[str, Any] = json.loads(json.dumps({"method": method, "options": dict(options), "keep": keep}))
    return made


def follows(header: Mapping[str, Any]) -> bool:
    """Whether statistics are progressive."""
    return PROGRESSIVE in header


def check(method: Method, keep: object, budget: str | None, router_groups: str) -> None:
    """Refuse a choice that cannot be made layer by layer from statistics.

    Raises:
        UserError: with the reason.
    """
    if method.reads == "model":
        raise UserError(
            f"method {method.name} reads no statistics: it runs the model itself",
            "leave --progressive out and pass -O progressive=true to `plan`",
        )
    if method.reads != "statistics":
        raise UserError(
            f"--progressive has no effect with method {method.name}: its choice does not depend on text", "leave it out"
        )
    if method.neurons:
        raise UserError(
            f"method {method.name} takes gradients through all layers at once, so none can be compressed before the next is seen",
            "leave --progressive out",
        )
    if budget not in (None, "uniform"):
        raise UserError(
            f"--progressive chooses in each layer before the next one is seen, but budget {budget} needs all layers for one choice",
            "use budget uniform, or leave --progressive out",
        )
    if keep is None:
        raise UserError("--progressive needs the number of experts that each layer keeps", "pass --keep, e.g. --keep 0.5")
    if router_groups != "keep":
        raise UserError(
            "--progressive takes the statistics of a layer on the router as it is, with its expert_groups",
            "leave --router-groups out, or leave --progressive out",
        )


def refuse_other(
    header: Mapping[str, Any],
    method: Method,
    options: Mapping[str, Any],
    keep: float | int | None,
    budget: str,
    rules: Mapping[int, Rules],
    router_groups: str,
) -> None:
    """Refuse progressive statistics for another choice than the one that they follow; ordinary statistics serve every choice.

    Raises:
        UserError: with what differs.
    """
    held = header.get(PROGRESSIVE)
    if held is None:
        return
    asked = record(method.name, options, keep)

    def counts(share: float | int) -> list[int]:
        return [keep_count(share, entry) for entry in rules.values()]

    found = next((key for key in ("method", "options") if held[key] != asked[key]), None)
    if found is None and budget != "uniform":
        found, asked = "budget", {"budget": budget}
    elif found is None and (keep is None or counts(held["keep"]) != counts(keep)):
        found = "keep"
    elif found is None and router_groups != "keep":
        found, asked = "router_groups", {"router_groups": router_groups}
    if found is not None:
        raise UserError(
            f"the statistics are progressive: they follow {_told(held)}, but {found.replace('_', ' ')} {asked[found]} is asked for",
            "calibrate for this choice, or without --progressive for every choice",
        )


def refuse(header: Mapping[str, Any]) -> None:
    """Refuse progressive statistics where those of the model as it is are wanted.

    Raises:
        UserError: they are progressive.
    """
    if follows(header):
        raise UserError(
            f"the statistics are progressive: they follow {_told(header[PROGRESSIVE])}, so they are not those of the whole model",
            "calibrate without --progressive",
        )


def _told(held: Mapping[str, Any]) -> str:
    options = "".join(f" -O {key}={value}" for key, value in held["options"].items())
    return f"--method {held['method']}{options} --keep {held['keep']}"

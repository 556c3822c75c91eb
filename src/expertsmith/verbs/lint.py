"""`lint`: will an engine serve this checkpoint?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from expertsmith.checkpoint import open_checkpoint
from expertsmith.experts.inventory import take_inventory
from expertsmith.verbs.definition import LOOK, Opt, verb
from expertsmith.verbs.options import Named, Opening
from expertsmith.views import show

if TYPE_CHECKING:
    from expertsmith.lint import Finding

COLOURS = {"error": "red", "warning": "yellow", "info": "dim"}


def _show(findings: Any, given: Mapping[str, Any]) -> None:
    if not findings:
        engines = given["engine"] or "transformers, vllm, sglang or llama.cpp"
        show.line(f"[green]nothing found[/green]: {engines} should serve this checkpoint")
    for finding in findings:
        text = f"{finding.message}; {finding.remedy}" if finding.remedy else finding.message
        show.line(f"[{COLOURS[finding.level]}]{finding.level:7}[/] {finding.rule.engine}: {show.escape(text)}")
        show.line(f"        [dim]{finding.rule.id} — {show.escape(finding.rule.source)}[/dim]")


@verb(
    LOOK,
    show=_show,
    plain=lambda found, given: {"model": given["model"], "findings": [finding.to_json() for finding in found]},
    passed=lambda found: not any(finding.level == "error" for finding in found),
    headers_only=True,
)
def lint(
    model: Named,
    *,
    engine: Annotated[str | None, Opt("transformers, vllm, sglang or llama.cpp; default: all.")] = None,
    tensor_parallel: Annotated[int, Opt("Tensor-parallel size you will serve with.", "--tp")] = 1,
    expert_parallel: Annotated[int, Opt("Expert-parallel size you will serve with.", "--ep")] = 1,
    **given: Unpack[Opening],
) -> list[Finding]:
    """Check whether an engine will serve this expert count, router and group layout. Exit code 1 if not.

    Reads config and headers only.
    """
    from expertsmith.lint import lint as find

    opened = open_checkpoint(model, headers_only=True, allow_pickle=given["allow_pickle"])
    return find(
        take_inventory(opened, undecodable=True, novices=True),
        engine,
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
    )

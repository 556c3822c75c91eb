"""Will a serving engine load this checkpoint? Rules from the engines' sources, tested on config.json and tensor headers.

A rule is data: its text, its source file and engine version, and a test on a `Subject`. If an engine has a
fallback, the finding is a warning or an info, not an error. Only what was found in a source is a rule. If a rule depends on
the hardware, its message says so, because the hardware is unknown here.
"""

from __future__ import annotations

from expertsmith.experts.inventory import Inventory
from expertsmith.lint import llama_cpp, sglang, transformers, vllm
from expertsmith.lint.base import LEVELS, Finding, Rule, Subject, subject_of
from expertsmith.registry import unknown

__all__ = ["ENGINES", "RULES", "Finding", "Rule", "Subject", "check", "lint", "subject_of"]

ENGINES = {  # engine → the version that was read
    "transformers": transformers.VERSION,
    "vllm": vllm.VERSION,
    "sglang": sglang.VERSION,
    "llama.cpp": llama_cpp.VERSION,
}
RULES: tuple[Rule, ...] = (*transformers.RULES, *vllm.RULES, *sglang.RULES, *llama_cpp.RULES)


def lint(inventory: Inventory, engine: str | None = None, tensor_parallel: int = 1, expert_parallel: int = 1) -> list[Finding]:
    """The findings about serving a checkpoint, errors first; `engine` None checks all engines.

    Raises:
        UserError: an engine without rules.
    """
    if engine is not None and engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    return check(subject_of(inventory, tensor_parallel, expert_parallel), engine)


def check(subject: Subject, engine: str | None = None) -> list[Finding]:
    """`lint` for an existing subject."""
    found = (rule.check(subject) for rule in RULES if engine in (None, rule.engine))
    return sorted((finding for finding in found if finding), key=lambda finding: LEVELS.index(finding.level))

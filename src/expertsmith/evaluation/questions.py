"""Run the same tasks and prompts on a model and its reference, one model in memory at a time. Finished results are kept and reused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from expertsmith.engine import LoadedModel
from expertsmith.evaluation import generation, tasks
from expertsmith.evaluation.generation import Run
from expertsmith.views.progress import Progress


@dataclass(frozen=True)
class Subject:
    """A model to ask: its name, its identity (fingerprint, dtype, tokenizer), and a context that loads it."""

    name: str
    identity: dict[str, Any]
    opened: Callable[[], AbstractContextManager[LoadedModel]]


@dataclass
class Questions:
    """lm-eval tasks, and prompts to continue greedily, as token ids by domain (with the data's answers, if any).

    `formats`: patterns by domain, for answers as text.
    """

    tasks: tasks.Tasks | None = None
    prompts: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    responses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    new_tokens: int = 0
    formats: Mapping[str, re.Pattern[str]] = field(default_factory=dict)


def ask(
    questions: Questions,
    subjects: Sequence[Subject],
    tokenizer: Any | None,
    *,
    batch_tokens: int,
    folder: Path | None,
    resume: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Ask a model (the first subject) and its reference (the second, if any); returns `tasks` and `generation`, if requested.

    Args:
        folder: where finished results of every model are kept, and reused for the same model, task and settings; None: keep nothing.
        resume: False asks everything again.
    """
    answers = [_answers(questions, subject, tokenizer, batch_tokens, folder, resume, progress) for subject in subjects]
    found: dict[str, Any] = {}
    if questions.tasks is not None:
        theirs = answers[1][0] if len(answers) > 1 else None
        found["tasks"] = {"limit": questions.tasks.limit, "rows": tasks.table(questions.tasks, answers[0][0], theirs)}
    if questions.prompts:
        domains = {name: _domain(questions, name, [runs[name] for _, runs in answers], tokenizer) for name in questions.prompts}
        found["generation"] = {"new_tokens": questions.new_tokens, "domains": domains}
    return found


def _answers(
    questions: Questions,
    subject: Subject,
    tokenizer: Any | None,
    batch_tokens: int,
    folder: Path | None,
    resume: bool,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, list[Run]]]:
    """One model's answers by task and its runs by domain. The model is loaded only if a result is not kept yet."""
    with ExitStack() as stack:

        @cache
        def model() -> LoadedModel:
            return stack.enter_context(subject.opened())

        @cache
        def wrapped() -> Any:
            return tasks.language_model(model(), tokenizer, batch_tokens)

        answers: dict[str, Any] = {}
        for name in questions.tasks.tasks if questions.tasks else ():
            assert questions.tasks is not None
            found, label = questions.tasks, f"{name} ({subject.name})"
            answers[name] = _kept(
                folder,
                name,
                {**subject.identity, "task": name, **tasks.settings_of(found, name)},
                lambda found=found, name=name, label=label: tasks.answer(found, name, wrapped(), progress, label),  # type: ignore[misc]
                resume,
            )
        runs: dict[str, list[Run]] = {}
        for domain, prompts in questions.prompts.items():
            label = f"generate {domain} ({subject.name})"
            kept = _kept(
                folder,
                f"generate-{domain}",
                {**subject.identity, "prompts": [list(ids) for ids in prompts], "new_tokens": questions.new_tokens},
                lambda prompts=prompts, label=label: [  # type: ignore[misc]
                    [run.tokens, run.ended]
                    for run in generation.generate(model(), prompts, questions.new_tokens, batch_tokens, progress, label)
                ],
                resume,
            )
            runs[domain] = [Run(tokens, ended) for tokens, ended in kept]
        return answers, runs


def _domain(questions: Questions, name: str, sides: Sequence[list[Run]], tokenizer: Any | None) -> dict[str, Any]:
    """The measures of one domain; with a format, also the share of the data's own answers that match it."""
    pattern = questions.formats.get(name)
    mine, theirs = sides[0], sides[1] if len(sides) > 1 else None
    if pattern is None:
        return generation.of_domain(mine, theirs)
    assert tokenizer is not None
    matches = [[bool(pattern.search(tokenizer.decode(run.tokens))) for run in runs] for runs in sides]
    made = generation.of_domain(mine, theirs, matches)
    expected = [bool(pattern.search(text)) for text in questions.responses[name]]
    made["format"] |= {"pattern": pattern.pattern, "responses": sum(expected) / len(expected)}
    return made


def _kept(folder: Path | None, name: str, identity: Mapping[str, Any], compute: Callable[[], Any], resume: bool) -> Any:
    """The result of `compute`, kept as JSON in `folder` under a name with a hash of the identity. A kept result is read instead."""
    if folder is None:
        return compute()
    text = json.dumps(identity, sort_keys=True)
    target = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if resume and target.exists():
        return json.loads(target.read_text(encoding="utf-8"))["found"]
    found = compute()
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps({"name": name, **identity, "found": found}, ensure_ascii=False), encoding="utf-8")
    partial.replace(target)
    return found

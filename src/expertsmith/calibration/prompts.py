"""Prompts from data: the part of a demonstration before its answer, or the first tokens of a text."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertsmith.calibration.data import conversation, frame, render, tokenize
from expertsmith.calibration.records import FIELDS, in_one_form, read_records
from expertsmith.calibration.spec import parse_spec
from expertsmith.errors import UserError

FIRST = 32  # tokens of a text used as its prompt, but at most half of it


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and its answer in the data, or None if there is none, as for a text."""

    ids: list[int]
    response: str | None


def load_prompts(
    specs: Sequence[str],
    tokenizer: Any | None,
    *,
    samples: int,
    seed: int,
    room: int,
    vocab_size: int | None,
    columns: Mapping[str, str] | None = None,
    said: list[str] | None = None,
) -> dict[str, list[Prompt]]:
    """Prompts by domain, at most `samples` (or the spec's N) of a source, drawn with `seed`.

    Args:
        room: maximum number of tokens of a prompt.
        said: changes to records that the user should know of are appended here.

    Raises:
        UserError: a source without prompts, a prompt longer than `room`, ids out of range, or an error in reading or tokenizing.
    """
    made: dict[str, list[Prompt]] = {}
    for text in specs:
        spec = parse_spec(text)
        found = []
        for place, record in read_records(spec.source, columns, spec.part):
            prompt = _prompt(record, tokenizer, place, said)
            if prompt.ids:
                found.append((place, prompt))
        if not found:
            raise UserError(f"{spec.name} has no prompts", f"its records need {FIELDS}")
        held = made.setdefault(spec.domain, [])
        count = min(spec.limit or samples, len(found))
        for index in sorted(random.Random(f"{seed}/{spec.domain}/{len(held)}").sample(range(len(found)), count)):
            place, prompt = found[index]
            if len(prompt.ids) > room:
                raise UserError(
                    f"the prompt of {place} has {len(prompt.ids)} tokens, but the model's window has room for {room}",
                    "generate fewer tokens, or remove the record",
                )
            if vocab_size is not None and not all(0 <= i < vocab_size for i in prompt.ids):
                raise UserError(f"{place} has token ids out of range: the model's vocabulary has {vocab_size} entries")
            held.append(prompt)
    return dict(sorted(made.items()))


def _prompt(record: Mapping[str, Any], tokenizer: Any | None, place: str, said: list[str] | None) -> Prompt:
    usual = in_one_form(record, place)
    if tokenizer is None or "text" in usual or "input_ids" in usual:
        ids, _ = tokenize(record, tokenizer, place)
        return Prompt(ids[: min(FIRST, (len(ids) + 1) // 2)], None)
    if "prompt" in usual and not getattr(tokenizer, "chat_template", None):
        return Prompt(frame(tokenizer, usual["prompt"], end=False), usual["response"])
    messages = conversation(usual)
    answered = messages[-1]["role"] == "assistant"
    ids = render(tokenizer, messages[:-1] if answered else messages, place, answer=True, tools=usual.get("tools"), said=said)
    return Prompt(ids, messages[-1]["content"] if answered else None)

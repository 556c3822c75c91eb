"""Measures of greedily generated text: repetition, loops, end of text, answer format. By domain, next to a reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from expertsmith.engine import LoadedModel
from expertsmith.errors import UserError
from expertsmith.evaluation.paired import estimate
from expertsmith.views.progress import Progress

NGRAM = 4
TIMES = 3


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """The share of repeated n-grams, 1 - distinct / all; 0 for fewer than n tokens (seq-rep-n of arXiv 1908.04319, section 6.1)."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loop(tokens: Sequence[int], times: int = TIMES) -> tuple[int, int] | None:
    """(period, repeats) of the shortest block that is repeated at least `times` times at the end of the tokens; None without such a block.

    A run that was cut in the middle of a block also ends in whole blocks, with the tokens rotated.
    """
    for period in range(1, len(tokens) // times + 1):
        length = period
        while length < len(tokens) and tokens[-1 - length] == tokens[-1 - length + period]:
            length += 1
        if length >= times * period:
            return period, length // period
    return None


@dataclass(frozen=True)
class Run:
    """The new tokens after a prompt, without the end of text, and whether the end of text was reached."""

    tokens: list[int]
    ended: bool


def generate(
    model: LoadedModel, prompts: Sequence[Sequence[int]], new_tokens: int, batch_tokens: int, progress: Progress, label: str
) -> list[Run]:
    """Greedy runs of at most `new_tokens`, in the order of the prompts. Sampling and repetition penalties of a generation config are not
    used: they would hide what is measured. Prompts of a batch are padded on the left."""
    module: Any = model.module
    config = module.generation_config
    ends = config.eos_token_id if config.eos_token_id is not None else model.config.get_text_config().eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or ())
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    runs: dict[int, Run] = {}
    with progress.task(label, len(prompts), "runs") as advance, torch.no_grad():
        while order:
            longest = len(prompts[order[0]])
            rows = max(1, batch_tokens // (longest + new_tokens))
            batch, order = order[:rows], order[rows:]
            ids = torch.zeros((len(batch), longest), dtype=torch.long, device=model.device)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(batch):
                ids[row, longest - len(prompts[index]) :] = torch.tensor(list(prompts[index]), device=model.device)
                mask[row, longest - len(prompts[index]) :] = 1
            out = module.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                min_new_tokens=0,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
            )
            for row, index in enumerate(batch):
                runs[index] = _until_end(out[row, longest:].tolist(), ends)
            advance(len(batch))
    return [runs[index] for index in range(len(prompts))]


def _until_end(tokens: list[int], ends: Sequence[int]) -> Run:
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    return Run(tokens if stop is None else tokens[:stop], stop is not None)


def of_domain(
    mine: Sequence[Run], theirs: Sequence[Run] | None = None, matches: Sequence[Sequence[bool]] | None = None
) -> dict[str, Any]:
    """The measures of the runs of one domain. Each has a standard error and, with a reference, the difference (`paired.estimate`).

    repetition: mean of `repetition`; loops: share of runs that end in a loop; ended: share that reached the end of text; length: mean new
    tokens; with `matches` also format: share of runs with the answer format. `periods`: median period of the loops, None without loops.
    """
    sides = [mine] if theirs is None else [mine, theirs]
    found = [[loop(run.tokens) for run in runs] for runs in sides]
    columns: dict[str, list[Sequence[float]]] = {
        "repetition": [[repetition(run.tokens) for run in runs] for runs in sides],
        "loops": [[float(entry is not None) for entry in entries] for entries in found],
        "ended": [[float(run.ended) for run in runs] for runs in sides],
        "length": [[float(len(run.tokens)) for run in runs] for runs in sides],
    }
    if matches is not None:
        columns["format"] = [[float(entry) for entry in side] for side in matches]
    made: dict[str, Any] = {
        "prompts": len(mine),
        **{name: estimate(values[0], values[1] if theirs is not None else None) for name, values in columns.items()},
    }
    periods = [median(entry[0] for entry in entries if entry) if any(entries) else None for entries in found]
    return {**made, "periods": dict(zip(("value", "reference"), periods, strict=False))}


def formats_of(formats: Sequence[str], domains: Sequence[str]) -> dict[str, re.Pattern[str]]:
    """`[DOMAIN=]REGEX` → the pattern of each domain that has one; a domain's own pattern overrides one for all. The text before = is a
    domain only if the data has that domain; otherwise it belongs to the regex.

    Raises:
        UserError: not a regular expression.
    """
    of_all: dict[str, re.Pattern[str]] = {}
    of_one: dict[str, re.Pattern[str]] = {}
    for text in formats:
        domain, _, rest = text.partition("=")
        own = domain in domains and bool(rest)
        try:
            pattern = re.compile(rest if own else text, re.DOTALL | re.MULTILINE)
        except re.error as error:
            raise UserError(f"--format {text!r} is not a regular expression: {error}") from None
        if own:
            of_one[domain] = pattern
        else:
            of_all = dict.fromkeys(domains, pattern)
    return {**of_all, **of_one}

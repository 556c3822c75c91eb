"""Time variants of one model in turns, so that other load on the machine affects all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch


def alternate(runs: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, list[Any]]:
    """The results of every run over `rounds` rounds. In a round, all runs come one after the other; a first round does not count."""
    returned: dict[str, list[Any]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            value = run()
            if number:
                returned[name].append(value)
    return returned


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, list[float]]:
    """The seconds of every run, `rounds` times each, in turns."""

    def timed(run: Callable[[], object]) -> Callable[[], float]:
        def go() -> float:
            begin = time.perf_counter()
            run()
            _wait()
            return time.perf_counter() - begin

        return go

    return alternate({name: timed(run) for name, run in runs.items()}, rounds)


def prefill_and_decode(
    module: Any,
    variants: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    prompt: torch.Tensor,
    new_tokens: int = 32,
    rounds: int = 5,
) -> dict[str, dict[str, float]]:
    """Tokens per second of every variant (a context in which the model runs), medians over `rounds`: the prompt [1, length] in one forward,
    and greedy decoding of `new_tokens` with a cache at batch 1."""

    def timed(name: str, run: Callable[[], object]) -> Callable[[], None]:
        def go() -> None:
            with variants[name](), torch.no_grad():
                run()

        return go

    def prefill() -> object:
        return module(input_ids=prompt, use_cache=False)

    def decode() -> object:
        return module.generate(
            prompt[:, :8], max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )

    found: dict[str, dict[str, float]] = {name: {} for name in variants}
    for what, run, tokens in (("prefill", prefill, prompt.numel()), ("decode", decode, new_tokens)):
        seconds = in_turns({name: timed(name, run) for name in variants}, rounds)
        for name, values in seconds.items():
            found[name][f"{what}_tokens_per_second"] = tokens / statistics.median(values)
    return found


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Speed of a model that skips experts against the same model without, on the stock forward.

Two random models with the shapes below, and thresholds that skip about 0, 25 and 50 % of what may be skipped (a token's first expert never is).
Prefill is one forward over a prompt; decode is greedy decoding at batch size 1 with a key-value cache, after its prefill. All variants of
one model run in turns, and ratios are formed within a round. The experts' share of the time without skipping (routers, attention and
head are the rest) bounds what can be gained: with a share f and a part s of all routed slots skipped at most 1 / (1 - f s).

A random router spreads its weights evenly, so with many experts a token the thresholds differ from those of a trained model; the work
that is left out at a given skip rate does not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common import Shape, alternate, generate, ratio, scratch, spread, table

SHAPES = {
    "mixtral": Shape("mixtral", layers=4, hidden=512, width=1792, experts=8, top_k=2),
    "qwen3_moe": Shape("qwen3_moe", layers=4, hidden=512, width=384, experts=64, top_k=8),
}
Phase = Callable[[Callable[[], None]], None]  # calls its argument where the clock is to start
RATES = (0.0, 0.25, 0.5)  # of the slots beyond each token's first


def measure(name: str, dtype: str, folder: Path, options: argparse.Namespace) -> list[list[object]]:
    import torch

    from expertsmith.calibration.data import TokenData
    from expertsmith.calibration.ratios import collect_ratios, thresholds
    from expertsmith.checkpoint import open_checkpoint
    from expertsmith.engine import load_model
    from expertsmith.engine.layout import experts_of
    from expertsmith.engine.skipping import skipping
    from expertsmith.experts.inventory import take_inventory

    shape = replace(SHAPES[name], dtype=dtype)
    path = folder / f"{name}-{dtype}"
    generate(path, shape)
    inventory = take_inventory(open_checkpoint(path))
    loaded = load_model(inventory.checkpoint, inventory.architecture)
    model: Any = loaded.module
    texts = torch.randint(3, shape.vocab, (5, options.prompt), generator=torch.Generator().manual_seed(0))
    weights = collect_ratios(loaded, TokenData({"a": texts[:4].tolist()}, {"a": True}))
    prompt = texts[4:]

    def betas(rate: float) -> dict[int, float]:
        if rate == 0:
            return dict.fromkeys(weights, 0.0)
        if shape.top_k == 2:
            found = thresholds(weights, "ratio", statistic="quantile", quantile=rate)
        else:
            found = thresholds(weights, "tail", active=1 + (shape.top_k - 1) * (1 - rate))
        return {layer: entry.threshold for layer, entry in found.items()}

    @torch.no_grad()
    def prefill(start: Callable[[], None]) -> None:
        start()
        model(input_ids=prompt, use_cache=False)

    @torch.no_grad()
    def decode(start: Callable[[], None]) -> None:
        out = model(input_ids=prompt[:, :32], use_cache=True)
        start()
        for _ in range(options.new_tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)

    def clock(phase: Phase, variant: Callable[[], AbstractContextManager[None]]) -> float:
        begin = [0.0]
        with variant():
            phase(lambda: begin.__setitem__(0, time.perf_counter()))
            return time.perf_counter() - begin[0]

    def share(phase: Phase) -> float:
        """Of the time without skipping, what passes in the experts' forwards."""
        spent: list[float] = []
        modules = [experts_of(loaded.layers[layer], inventory.architecture) for layer in weights]
        for module in modules:

            def timed(*args: Any, own: Callable[..., Any] = module.forward) -> Any:
                begin = time.perf_counter()
                out = own(*args)
                spent.append(time.perf_counter() - begin)
                return out

            module.forward = timed
        total = clock(lambda start: phase(lambda: (spent.clear(), start())), nullcontext)
        for module in modules:
            del module.forward
        return sum(spent) / total

    def skipped(phase: Phase, rate: float) -> float:
        """Share of all slots that are skipped."""
        counters: dict[int, tuple[int, int]] = {}
        with skipping(loaded, betas(rate), rule, counters):
            phase(counters.clear)
        would, ran = (sum(part) for part in zip(*counters.values(), strict=True))
        return 1 - ran / would

    rule = "ratio" if shape.top_k == 2 else "tail"
    rows: list[list[object]] = []
    for label, phase, tokens in (("prefill", prefill, options.prompt), ("decode", decode, options.new_tokens)):
        runs = {"stock": partial(clock, phase, nullcontext)}
        runs |= {f"{rate:.0%}": partial(clock, phase, partial(skipping, loaded, betas(rate), rule)) for rate in RATES}
        alternate(runs, 1)  # warm up
        part = statistics.median(share(phase) for _ in range(3))
        taken = alternate(runs, options.rounds)
        gone = {f"{rate:.0%}": skipped(phase, rate) for rate in RATES}
        for key in runs:
            slots = gone.get(key, 0.0)
            rows.append(
                [
                    name,
                    dtype,
                    label,
                    key,
                    f"{slots / (1 - 1 / shape.top_k):.0%}",
                    f"{slots:.0%}",
                    f"{part:.0%}",
                    f"{statistics.median(taken[key]) / tokens * 1000:.2f} ms",
                    f"{ratio(taken['stock'], taken[key]):.2f}",
                    spread(taken["stock"], taken[key]),
                    f"{1 / (1 - part * slots):.2f}",
                ]
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for generated files")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    with scratch(options.work) as folder:
        rows = [row for name in options.models for dtype in options.dtypes for row in measure(name, dtype, folder, options)]
    for name in options.models:
        shape = SHAPES[name]
        print(
            f"{name}: {shape.layers} layers, {shape.experts} experts, top {shape.top_k}, hidden {shape.hidden}, width {shape.width}; "
            f"prompt of {options.prompt}, {options.new_tokens} new tokens, {options.threads} threads"
        )
    heads = [
        "model",
        "dtype",
        "phase",
        "aimed at",
        "skipped",
        "of all slots",
        "experts' share",
        "a token",
        "speed-up",
        "range",
        "bound",
    ]
    table(heads, rows)


if __name__ == "__main__":
    main()

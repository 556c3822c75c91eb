"""Quality loss and speed-up of skipping experts: one model with and without skipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from expertsmith.engine import Batch, LoadedModel
from expertsmith.evaluation.quality import measure
from expertsmith.evaluation.speed import prefill_and_decode
from expertsmith.views.progress import Progress

Counters = dict[int, tuple[int, int]]
PROMPT = 512  # tokens of the timed prefill, at most


def with_and_without(
    model: LoadedModel,
    reference: LoadedModel,
    in_force: Callable[[LoadedModel, Counters | None], AbstractContextManager[None]],
    batches: Sequence[Batch],
    progress: Progress,
) -> dict[str, Any]:
    """Quality of `model` with skipping against `reference`, the same weights without skipping; the share of skipped routed slots in every
    layer on this text; and, for resident models, tokens per second with and without skipping, measured in turns."""
    counters: Counters = {}
    with in_force(model, counters):
        quality = measure(model, batches, reference, progress).to_json()
    rates = {str(layer): 1 - ran / slots for layer, (slots, ran) in sorted(counters.items()) if slots}
    if model.memory == "stream":
        progress.note("speed is not measured: the model is streamed")
        return {"quality": quality, "skip_rate": rates, "speed": None}
    ids = max((batch.input_ids[0, batch.mask[0]] for batch in batches), key=len)
    progress.note("speed: prefill and decode with and without skipping, alternating")
    variants = {"all": nullcontext, "skipping": lambda: in_force(model, None)}
    prompt: torch.Tensor = ids[None, :PROMPT].to(model.device)
    speed = prefill_and_decode(model.module, variants, prompt)
    speed["ratio"] = {key: speed["skipping"][key] / value for key, value in speed["all"].items()}
    return {"quality": quality, "skip_rate": rates, "speed": speed}

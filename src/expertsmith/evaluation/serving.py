"""Speed, memory and energy of models in a serving engine, each in its own process, alternating within one run."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expertsmith.arch import text_config
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.evaluation.engines import Ask, convert, engine
from expertsmith.evaluation.speed import alternate
from expertsmith.views.progress import Progress


@dataclass(frozen=True)
class Setting:
    """The engine, the requests and the device of a measurement."""

    engine: str = "transformers"
    python: str | Path | None = None  # of the engine's environment; None: see engines.python_of
    converter: str | Path | None = None  # llama.cpp's convert_hf_to_gguf.py
    batch: int = 1  # prompts at once
    prompt_len: int = 128  # tokens each
    new_tokens: int = 32  # generated for each
    rounds: int = 5
    energy: bool = False
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt_len", 1), ("new_tokens", 2), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}", f"speed needs at least {least}")
        if self.engine != "transformers" and self.device != "auto":
            raise UserError(
                f"--device is {self.device}, but {self.engine} runs on the device that it was built for", "remove --device"
            )
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise UserError(f"--dtype is {self.dtype!r}", "choose auto, float32, float16 or bfloat16")


def compare(models: Mapping[str, str | Path], setting: Setting, progress: Progress) -> dict[str, Any]:
    """Name → medians over the rounds. In each round all models get the same random prompts in turn. A first round does not count.

    There are B prompts of P tokens with N new tokens each. t1: seconds until all have their first token; t: seconds until all are
    generated. prefill_tokens_per_second = B P / t1, decode_tokens_per_second = (tokens generated after t1) / (t - t1), time_to_first_token
    = t1. peak_memory and gpu_memory: peak bytes of the model's own process; weight_bytes: of the checkpoint. With `energy`,
    watt_hours_per_1000_tokens: per 1000 of the B N new tokens, including their prompts. With two models, "ratios": the second's value
    divided by the first's, as the median over the rounds of the ratio within a round, which need not be the ratio of the medians;
    "ratio_ranges": the least and largest ratio.

    Raises:
        RefusedError: the engine refuses one of the models.
        UserError: the engine or its converter is not found, or a model has too few positions for the lengths.
    """
    meter = _meter() if setting.energy else None
    sizes: dict[str, int] = {}
    vocab = 2**31
    with ExitStack() as stack:
        asks: dict[str, Ask] = {}
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, model in models.items():
            path, sizes[name], ids = _described(model, setting)
            vocab = min(vocab, ids)
            options: dict[str, Any] = {"batch": setting.batch, "length": setting.prompt_len + setting.new_tokens}
            options |= {"device": setting.device, "dtype": setting.dtype}
            if setting.engine == "transformers" and setting.python is None:
                options["load"] = "expertsmith.load"  # supports uneven layers, and applies skipping
            if setting.engine == "llama.cpp" and path.suffix != ".gguf":
                progress.note(f"{name}: converting to GGUF")
                path = convert(path, work / f"{name}.gguf", setting.python, setting.converter, setting.dtype)
            progress.note(f"{name}: loading into {setting.engine}")
            asks[name] = stack.enter_context(engine(setting.engine, path, setting.python, **options))
        rows = _measure(asks, vocab, setting, meter, progress)
    result: dict[str, Any] = {name: _medians(found) | {"weight_bytes": sizes[name]} for name, found in rows.items()}
    if len(rows) == 2:
        (first, before), (second, after) = rows.items()
        rounds = {
            key: [b[key] / a[key] for a, b in zip(before, after, strict=True)]
            for key in before[0]
            if all(row[key] for row in before)
        }
        result["ratio_ranges"] = {key: [min(held), max(held)] for key, held in rounds.items()}
        result["ratios"] = {key: statistics.median(held) for key, held in rounds.items()} | {
            "weight_bytes": sizes[second] / sizes[first]
        }
    result["setting"] = {key: value for key, value in asdict(setting).items() if key not in ("python", "converter")}
    if meter:
        result["energy"] = _source(meter)
    return result


def _described(model: str | Path, setting: Setting) -> tuple[Path, int, int]:
    """(path, bytes of weights, number of token ids to draw prompts from)."""
    if str(model).endswith(".gguf"):
        if setting.engine != "llama.cpp":
            raise UserError(f"{model} is a GGUF file", "pass --engine llama.cpp, or a checkpoint in Hugging Face layout")
        if not Path(model).is_file():
            raise UserError(f"{model} is not there", "name a GGUF file or a checkpoint")
        return Path(model), Path(model).stat().st_size, 1000
    found = open_checkpoint(model)
    config = text_config(found.config)
    window, length = config.get("max_position_embeddings"), setting.prompt_len + setting.new_tokens
    if isinstance(window, int) and length > window:
        raise UserError(
            f"prompt and new tokens together are {length}, but {model} has {window} positions", "use a smaller --prompt-len"
        )
    return found.path, found.nbytes, int(config.get("vocab_size") or 1000)


def _measure(
    asks: Mapping[str, Ask], vocab: int, setting: Setting, meter: Any, progress: Progress
) -> dict[str, list[dict[str, float]]]:
    """The numbers of every model in every round."""
    draw, batch, made = random.Random(0), setting.batch, setting.batch * setting.new_tokens
    prompts = [
        [[draw.randrange(vocab) for _ in range(setting.prompt_len)] for _ in range(batch)] for _ in range(setting.rounds + 1)
    ]
    with progress.task("speed", (setting.rounds + 1) * len(asks), "runs") as advance:

        def runs_of(ask: Ask) -> Callable[[], dict[str, float]]:
            left = iter(prompts)

            def run() -> dict[str, float]:
                if meter:
                    meter.start_task()
                answer = ask(next(left), setting.new_tokens)
                used = meter.stop_task() if meter else None
                advance(1)
                first, seconds = answer["first"], answer["seconds"]
                row = {
                    "prefill_tokens_per_second": batch * setting.prompt_len / first,
                    "decode_tokens_per_second": answer["after"] / (seconds - first),
                    "time_to_first_token": first,
                    "peak_memory": answer["peak"]["memory"],
                    "gpu_memory": answer["peak"]["gpu_memory"],
                }
                return row if used is None else {**row, "watt_hours_per_1000_tokens": 1e6 * used.energy_consumed / made}  # kWh

            return run

        return alternate({name: runs_of(ask) for name, ask in asks.items()}, setting.rounds)


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _meter() -> Any:
    """An offline tracker of codecarbon for the whole machine, since engines run in separate processes.

    Raises:
        UserError: codecarbon is not installed.
    """
    try:
        from codecarbon import OfflineEmissionsTracker
    except ModuleNotFoundError as error:
        raise UserError("--energy needs codecarbon, which is not installed", "pip install 'expertsmith[energy]'") from error
    where = {"country_iso_code": "USA"}  # for grams of CO2, which are not reported
    quiet = {"save_to_file": False, "log_level": "critical", "allow_multiple_runs": True}
    return OfflineEmissionsTracker(tracking_mode="machine", **where, **quiet)


def _source(meter: Any) -> str:
    """The source of codecarbon's watts: hardware counters, or an estimate without them."""
    parts = ", ".join(part.description() for part in meter._hardware)
    guessed = "Cpu Load" in parts or "W)" in parts or "[generic]" in parts
    how = "; no power counter found, so the CPU's watts are estimated from its rated power and load" if guessed else ""
    return f"codecarbon, whole machine: {parts}{how}"

"""`evaluate --speed`: the arithmetic of its numbers, the processes it runs in, and what is said where an engine is missing or refuses."""

from __future__ import annotations

import json
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest

from conftest import run_cli
from expertsmith import api
from expertsmith.errors import UserError
from expertsmith.evaluation import serving
from expertsmith.evaluation.engines import engine, python_of
from expertsmith.evaluation.engines.runner import answer
from expertsmith.evaluation.serving import Setting
from expertsmith.evaluation.speed import alternate
from expertsmith.views.progress import Silent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(checkpoints, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Mixtral and half of it."""
    out = tmp_path_factory.mktemp("speed") / "half"
    api.compress(checkpoints("mixtral"), "random", 0.5, out=out, measure=False)
    return checkpoints("mixtral"), out


def test_turns():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    assert alternate(runs, 2) == {"a": [3, 5], "b": [4, 6]}  # the first round does not count
    assert order == list("ababab")


def test_first_and_after():
    """Two prompts: all have their first token at 2.0; the four tokens later than that are counted until 5.0."""
    found = answer([], [], 1.0, [[1.5, 3.0, 4.0], [2.0, 4.5, 5.0]])
    assert (found["first"], found["after"], found["seconds"]) == (1.0, 4, 4.0)
    assert found["peak"]["memory"] > 2**20


def fake(seconds: float, first: float, memory: int):
    return lambda prompts, new: {
        "first": first,
        "seconds": seconds,
        "after": len(prompts) * (new - 1),
        "peak": {"memory": memory, "gpu_memory": 0},
    }


def test_the_numbers(monkeypatch, pair):
    """Batch 2, 8 + 5 tokens. Original: first tokens after 0.5 s, all after 2.5 s; the other 0.25 s and 1.25 s."""
    made = {str(pair[0]): fake(2.5, 0.5, 100), str(pair[1]): fake(1.25, 0.25, 80)}
    monkeypatch.setattr(serving, "engine", lambda name, path, python, **_: nullcontext(made[str(path)]))
    found = serving.compare(
        {"reference": pair[0], "model": pair[1]}, Setting(batch=2, prompt_len=8, new_tokens=5, rounds=2), Silent()
    )
    assert found["reference"] | {"weight_bytes": 0} == {
        "prefill_tokens_per_second": 2 * 8 / 0.5,
        "decode_tokens_per_second": 2 * 4 / 2.0,
        "time_to_first_token": 0.5,
        "peak_memory": 100,
        "gpu_memory": 0,
        "weight_bytes": 0,
    }
    assert found["ratio_ranges"]["decode_tokens_per_second"] == [2.0, 2.0]
    assert found["ratios"] == {
        "prefill_tokens_per_second": 2.0,
        "decode_tokens_per_second": 2.0,
        "time_to_first_token": 0.5,
        "peak_memory": 0.8,
        "weight_bytes": found["model"]["weight_bytes"] / found["reference"]["weight_bytes"],
    }


def test_energy(monkeypatch, pair):
    """0.002 kWh a run of 2 × 5 tokens are 200 Wh a 1000; codecarbon says where its watts come from."""

    class Tracker:
        _hardware = (types.SimpleNamespace(description=lambda: "CPU(Cpu Load)"),)

        def __init__(self, **options):
            assert options["tracking_mode"] == "machine"

        def start_task(self):
            pass

        def stop_task(self):
            return types.SimpleNamespace(energy_consumed=0.002)

    monkeypatch.setitem(sys.modules, "codecarbon", types.SimpleNamespace(OfflineEmissionsTracker=Tracker))
    monkeypatch.setattr(serving, "engine", lambda *_, **__: nullcontext(fake(2.5, 0.5, 100)))
    found = serving.compare({"model": pair[0]}, Setting(batch=2, prompt_len=8, new_tokens=5, rounds=1, energy=True), Silent())
    assert found["model"]["watt_hours_per_1000_tokens"] == pytest.approx(200)
    assert "estimate" in found["energy"]
    assert "ratios" not in found


def test_both_models_in_turns(pair, capsys):
    original, half = pair
    size = ["--batch", 2, "--prompt-len", 16, "--new-tokens", 4, "--rounds", 1]
    code, out, _ = run_cli(capsys, "evaluate", half, "-r", original, "--speed", *size, "--device", "cpu", "--json", "-q")
    assert code == 0
    found = json.loads(out)["speed"]
    assert found["ratios"]["weight_bytes"] == pytest.approx(found["model"]["weight_bytes"] / found["reference"]["weight_bytes"])
    assert found["ratios"]["weight_bytes"] < 1
    assert found["model"]["prefill_tokens_per_second"] == pytest.approx(2 * 16 / found["model"]["time_to_first_token"])
    assert found["model"]["peak_memory"] > 50 * 2**20  # torch is in it
    assert found["setting"]["new_tokens"] == 4


@pytest.fixture(scope="module")
def uneven(pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uneven")
    (folder / "kept.json").write_text(json.dumps({"0": [0, 1, 2], "1": [0, 1, 2, 3], "2": [0, 1, 2]}))
    api.apply(pair[0], api.plan_from(pair[0], folder / "kept.json"), folder / "model")
    return folder / "model"


def test_the_models_own_tokens(uneven):
    """Also of layers that differ, which expertsmith.load builds."""
    import torch

    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    with engine("transformers", uneven, dtype="float32", device="cpu", load="expertsmith.load") as ask:
        found = ask(prompts, 3, 2)
    model = api.load(uneven, dtype=torch.float32)
    ids = torch.tensor(prompts)
    for step in range(3):
        with torch.no_grad():
            best = model(ids).logits[:, -1].log_softmax(-1).topk(2)
        assert [row[step] for row in found["tokens"]] == best.indices[:, 0].tolist()
        for row, names, values in zip(found["top"], best.indices.tolist(), best.values.tolist(), strict=True):
            assert row[step] == pytest.approx(dict(zip(map(str, names), values, strict=True)), abs=1e-5)
        ids = torch.cat([ids, best.indices[:, :1]], dim=1)


# ---- wrong input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "vllm"], "pip install vllm=="),
        (["--engine", "llama.cpp", "--gguf-converter", __file__], "gguf sentencepiece xllamacpp"),
        (["--engine", "llama.cpp"], "convert_hf_to_gguf.py"),
        (["--engine", "vllm", "--engine-python", "nowhere/python"], "nowhere/python does not exist"),
        (["--engine", "vlm"], "did you mean vllm"),
        (["--engine", "vllm", "--device", "cpu"], "remove --device"),
        (["--prompt-len", 1000], "has 256 positions"),
        (["--dtype", "int8"], "choose auto, float32, float16 or bfloat16"),
    ],
)
def test_wrong_input(arguments, words, pair, capsys, monkeypatch):
    for name in ("EXPERTSMITH_VLLM", "EXPERTSMITH_LLAMA", "EXPERTSMITH_LLAMA_CONVERTER"):
        monkeypatch.delenv(name, raising=False)
    code, _, err = run_cli(capsys, "evaluate", pair[1], "--speed", *arguments, "-q")
    assert code == 2
    assert words in err


def test_a_gguf_file_is_for_llama_cpp(tmp_path, capsys):
    code, _, err = run_cli(capsys, "evaluate", tmp_path / "model.gguf", "--speed", "-q")
    assert code == 2
    assert "--engine llama.cpp" in err


def test_a_python_without_the_engine(pair):
    with pytest.raises(UserError, match="has no vllm; make an environment with"):
        engine("vllm", pair[1], sys.executable).__enter__()
    assert python_of("transformers") == sys.executable


def test_energy_without_codecarbon(pair, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    code, _, err = run_cli(capsys, "evaluate", pair[1], "--speed", "--energy", "-q")
    assert code == 2
    assert "pip install 'expertsmith[energy]'" in err


def test_a_refusal_is_shown_in_the_engines_words_and_explained(uneven, capsys):
    """transformers itself does not know per_layer_config."""
    code, _, err = run_cli(capsys, "evaluate", uneven, "--speed", "--engine-python", sys.executable, "-q")
    assert code == 2
    assert "RuntimeError: " in err
    assert "size mismatch" in err or "ignore_mismatched_sizes" in err
    assert "lint transformers-uneven: decoder layers have 3 to 4 experts" in err


def test_a_ratio_is_shown_with_its_spread(capsys):
    """Rounds of 1 2 4 and 2 2 12 tokens/s: ratios 2 1 3, median 2 of [1, 3], where the medians' ratio is 1."""
    from expertsmith.views.show import show_speed

    numbers = {"prefill_tokens_per_second": 2.0, "weight_bytes": 100}
    setting = {"engine": "x", "batch": 1, "prompt_len": 1, "new_tokens": 1, "dtype": "float32", "rounds": 3}
    show_speed(
        {
            "reference": numbers,
            "model": numbers,
            "ratios": {"prefill_tokens_per_second": 2.0, "weight_bytes": 0.5},
            "ratio_ranges": {"prefill_tokens_per_second": [1.0, 3.0]},
            "setting": setting,
        }
    )
    out = capsys.readouterr().out
    assert "2.00 × [1.00, 3.00]" in out
    assert "0.50 ×" in out
    assert "ratio: the median over the rounds of the ratio within a round, not the ratio of the two medians" in out

"""Healing in all families: what it changes and what it leaves, files, resumption, progress, memory modes."""

from __future__ import annotations

import importlib.util
import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from conftest import DEVICE, SUPPORTED
from expertsmith import api
from expertsmith.arch import families
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.planning.plan import LayerPlan, Merge, Method, Plan, Source
from expertsmith.views.progress import Silent
from tiny import tiny_config
from to_heal import CORE, METHODS, SHAPE, differing, same_tensors, shaken

EVERY = pytest.mark.parametrize("model_type", SUPPORTED)
# the tails of these layers are no function of the token alone, or weight the routed output very unevenly
HARD = {"inkling_text", "inkling2_text", "ernie4_5_moe", "flint"}


# ---- families


@EVERY
def test_planted_weights_are_found(model_type, checkpoints, brief, tmp_path):
    """With all experts kept and more tokens than neurons there is an exact solution: the original's down projections."""
    noisy = shaken(checkpoints(model_type), tmp_path / "shaken")
    report = api.heal(noisy, checkpoints(model_type), brief, tmp_path / "healed", options={"sweeps": 4}, **SHAPE)
    rows = report["layers"]
    assert all(row["error_after"] <= row["error_before"] for row in rows)
    assert rows[0]["error_after"] < (0.4 if model_type in HARD else 0.12) * rows[0]["error_before"]
    assert report["accepted"]
    assert report["held_out"]["after"]["mean"]["kl"] < 0.9 * report["held_out"]["before"]["mean"]["kl"]
    record = families()[model_type]
    changed = differing(noisy, tmp_path / "healed")
    assert {record.layout_of(record.locate(name)[1]) for name in changed} <= {"down", "down_t"}


@pytest.mark.parametrize("model_type", CORE[:6])
def test_half_of_the_experts(model_type, checkpoints, brief, tmp_path):
    """The held-out error of no layer, and of no sweep, rises."""
    api.apply(checkpoints(model_type), api.plan(checkpoints(model_type), "random", 0.5), tmp_path / "half")
    report = api.heal(tmp_path / "half", checkpoints(model_type), brief, tmp_path / "healed", **SHAPE)
    assert all(row["error_after"] <= row["error_before"] for row in report["layers"])
    assert any(row["error_after"] < 0.995 * row["error_before"] for row in report["layers"])
    for row in report["layers"]:
        assert all(b <= a * (1 + 1e-6) for a, b in zip(row["sweeps"], row["sweeps"][1:], strict=False))
    assert bool(differing(tmp_path / "half", tmp_path / "healed")) == report["accepted"]


@pytest.mark.parametrize("method", ["least_squares", "layer_local"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
def test_nothing_removed_changes_nothing(model_type, method, checkpoints, brief, tmp_path):
    options = {} if method == "least_squares" else {"steps": 2, "learning_rate": 0.001}
    api.heal(
        checkpoints(model_type), checkpoints(model_type), brief[:1], tmp_path / "out", method=method, options=options, **SHAPE
    )
    assert same_tensors(checkpoints(model_type), tmp_path / "out")


def plan_of(model, layers: list[LayerPlan]) -> Plan:
    inventory = take_inventory(open_checkpoint(model))
    source = Source(model_type=inventory.architecture.model_type, fingerprint=inventory.checkpoint.fingerprint)
    return Plan(method=Method(name="by_hand"), model=source, layers=layers)


def test_merged_and_uneven(checkpoints, brief, tmp_path):
    """Layers of different counts, one with merged experts; the output keeps its code and loads."""
    model = checkpoints("mixtral")
    merge = Merge(into=0, **{"from": [0, 1]}, weights=[0.5, 0.5])
    layers = [
        LayerPlan(layer=0, num_experts=8, keep=[0, 2, 3], merge=[merge]),
        LayerPlan(layer=1, num_experts=8, keep=[1, 2, 5, 6, 7]),
        LayerPlan(layer=2, num_experts=8, keep=[0, 4]),
    ]
    api.apply(model, plan_of(model, layers), tmp_path / "uneven")
    report = api.heal(tmp_path / "uneven", model, brief, tmp_path / "healed", **SHAPE)
    assert [row["experts"] for row in report["layers"]] == [3, 5, 2]
    assert report["held_out"]["after"]["mean"]["kl"] < report["held_out"]["before"]["mean"]["kl"]
    code = "modeling_expertsmith.py"
    assert (tmp_path / "healed" / code).read_bytes() == (tmp_path / "uneven" / code).read_bytes()
    assert api.load(tmp_path / "healed") is not None
    if importlib.util.find_spec("peft"):
        options = {"step_tokens": 200, "learning_rate": 0.003, "rank": 2}
        api.heal(tmp_path / "uneven", model, brief, tmp_path / "adapted", method="lora", options=options, **SHAPE)
        assert (tmp_path / "adapted" / code).read_bytes() == (tmp_path / "uneven" / code).read_bytes()
        assert differing(tmp_path / "uneven", tmp_path / "adapted")


def test_a_dense_teacher(checkpoints, brief, tmp_path):
    """A Mixtral with a Mistral's attention learns that Mistral's feed-forward layers."""
    import transformers

    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size")
    tiny = tiny_config("mixtral")
    config = transformers.MistralConfig(
        **{key: tiny[key] for key in keys}, initializer_range=0.2, head_dim=tiny.get("head_dim")
    )
    torch.manual_seed(3)
    dense = transformers.MistralForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    sparse = transformers.AutoModelForCausalLM.from_pretrained(checkpoints("mixtral"))
    missing = sparse.load_state_dict({n: v for n, v in dense.state_dict().items() if ".mlp." not in n}, strict=False)
    assert not missing.unexpected_keys
    sparse.save_pretrained(tmp_path / "sparse")
    report = api.heal(
        tmp_path / "sparse",
        tmp_path / "dense",
        brief,
        tmp_path / "healed",
        method="layer_local",
        options={"steps": 20, "step_tokens": 200, "learning_rate": 0.01},
        **SHAPE,
    )
    assert all(row["error_after"] < 0.95 * row["error_before"] for row in report["layers"])
    assert report["held_out"]["after"]["mean"]["kl"] < report["held_out"]["before"]["mean"]["kl"]


def test_skip_thresholds_are_in_force(checkpoints, brief, tmp_path):
    """The tokens of the calibration skip experts as they will; an expert that is skipped gets nothing of a token."""
    plain = api.skip(
        checkpoints("qwen3_moe"),
        brief,
        tmp_path / "skips",
        quantile=0.8,
        statistic="quantile",
        measure=False,
        device=DEVICE,
        seq_len=24,
        pack=False,
    )
    assert plain["plan"].skip is not None
    report = api.heal(tmp_path / "skips", checkpoints("qwen3_moe"), brief, tmp_path / "healed", **SHAPE)
    assert report["held_out"]["before"]["mean"]["kl"] > 0  # without skipping the two are the same model
    assert all(row["error_after"] <= row["error_before"] for row in report["layers"])
    assert json.loads((tmp_path / "healed" / "config.json").read_text())["expertsmith"]["skip"]


# ---- files


def test_bfloat16_and_shards_stay(checkpoints, brief, tmp_path):
    """Weights are rounded once, to what the checkpoint holds; files keep their names and contents."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints("qwen2_moe"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16", max_shard_size="60KB")
    noisy = shaken(tmp_path / "bf16", tmp_path / "shaken")
    files = sorted(file.name for file in noisy.glob("*.safetensors"))
    assert len(files) > 1
    report = api.heal(noisy, tmp_path / "bf16", brief, tmp_path / "healed", **SHAPE)
    assert sorted(file.name for file in (tmp_path / "healed").glob("*.safetensors")) == files
    for name in files:
        assert load_file(noisy / name).keys() == load_file(tmp_path / "healed" / name).keys()
    assert differing(noisy, tmp_path / "healed")
    quality = api.evaluate(
        tmp_path / "healed", brief, reference=tmp_path / "bf16", dtype="float32", device=DEVICE, seq_len=24
    ).to_json()
    before = api.evaluate(noisy, brief, reference=tmp_path / "bf16", dtype="float32", device=DEVICE, seq_len=24).to_json()
    assert quality["mean"]["kl"] < 0.5 * before["mean"]["kl"]
    assert report["data"]["held_out_tokens"] > 0


def test_report_and_model_card(half, checkpoints, brief, tmp_path):
    report = api.heal(half, checkpoints("mixtral"), brief, tmp_path / "healed", eval_data=brief, **SHAPE)
    stored = json.loads((tmp_path / "healed" / "expertsmith" / "heal.json").read_text())
    assert stored == {key: value for key, value in report.items() if key not in ("out", "quality")}
    assert report["quality"]["after"]["mean"]["kl"] < report["quality"]["before"]["mean"]["kl"]
    assert report["held_out"]["before"]["domains"].keys() == {"a", "b"}
    card = (tmp_path / "healed" / "README.md").read_text()
    assert "## Healed" in card
    assert "are byte for byte those" not in card
    assert (tmp_path / "healed" / "expertsmith" / "plan.json").read_bytes() == (half / "expertsmith" / "plan.json").read_bytes()
    assert not (tmp_path / "healed.work").exists()
    with pytest.raises(UserError, match="was healed"):
        api.verify(checkpoints("mixtral"), tmp_path / "healed")


class Stops(Silent):
    """Ends the run when a number of notes that hold a word have been made."""

    def __init__(self, word: str, count: int) -> None:
        self.word, self.left = word, count

    def note(self, message: str) -> None:
        self.left -= self.word in message
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", list(METHODS))
def test_same_bytes_again_and_when_interrupted(method, half, checkpoints, brief, tmp_path, monkeypatch):
    """The same seed gives the same bytes; an interrupted run goes on and gives them too; --fresh and other options are told apart."""
    if method == "lora":
        pytest.importorskip("peft")
    job = {"method": method, "options": METHODS[method], **SHAPE}
    model = checkpoints("mixtral")
    api.heal(half, model, brief, tmp_path / "one", **job)
    assert differing(half, tmp_path / "one")
    if method in ("router", "lora"):
        from expertsmith.healing import work

        saved = work.Work.save_state
        looks: list[int] = []

        def save_state(self, *args) -> None:
            saved(self, *args)
            looks.append(1)
            if len(looks) == 4:
                raise KeyboardInterrupt

        monkeypatch.setattr(work.Work, "save_state", save_state)
        with pytest.raises(KeyboardInterrupt):
            api.heal(half, model, brief, tmp_path / "two", **job)
        monkeypatch.undo()
    else:
        with pytest.raises(KeyboardInterrupt):
            api.heal(half, model, brief, tmp_path / "two", progress=Stops("decoder layer", 2), **job)
    assert not (tmp_path / "two").exists()
    other = {
        **job,
        "options": {**METHODS[method], **({"sweeps": 9} if "l" in method[:2] and method != "lora" else {"seed": 1})},
    }
    with pytest.raises(UserError, match="other models, data or options"):
        api.heal(half, model, brief, tmp_path / "two", **other)
    notes = Noted()
    api.heal(half, model, brief, tmp_path / "two", progress=notes, **job)
    assert any("resuming" in note for note in notes.said)
    assert same_tensors(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("method", ["least_squares", "layer_local"])
def test_progress_adds_up(method, half, checkpoints, brief, tmp_path):
    """The bar moves within layers, and ends where it should."""
    bar = Counted()
    api.heal(
        half, checkpoints("mixtral"), brief, tmp_path / "out", method=method, options=METHODS[method], progress=bar, **SHAPE
    )
    amounts, total = bar.seen["heal"]
    assert len(amounts) > 3 * 4
    assert min(amounts) >= 0
    assert sum(amounts) == pytest.approx(total)


class Counted(Silent):
    def __init__(self) -> None:
        self.seen: dict[str, tuple[list[float], float]] = {}

    @contextmanager
    def task(self, label: str, total: float, unit: str):
        self.seen[label] = ([], total)
        yield lambda amount, earlier=False: self.seen[label][0].append(amount)


class Noted(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize("method", ["least_squares", "layer_local"])
def test_streamed_is_resident(method, half, checkpoints, brief, tmp_path):
    for memory in ("resident", "stream"):
        api.heal(
            half,
            checkpoints("mixtral"),
            brief,
            tmp_path / memory,
            method=method,
            options=METHODS[method],
            memory=memory,
            **SHAPE,
        )
    assert same_tensors(tmp_path / "resident", tmp_path / "stream")


def test_streamed_is_resident_where_tokens_mix_behind_the_experts(checkpoints, brief, tmp_path):
    """There, noise on a token without an error would give it a weight of many tokens."""
    model = checkpoints("inkling_text")
    api.apply(model, api.plan(model, "random", 0.5), tmp_path / "half")
    for memory in ("resident", "stream"):
        api.heal(tmp_path / "half", model, brief, tmp_path / memory, memory=memory, **SHAPE)
    assert same_tensors(tmp_path / "resident", tmp_path / "stream")

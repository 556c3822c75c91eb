"""Healing: golden checks of the method, every family, resume, bad input, the command line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import DEVICE, SUPPORTED, run_cli, save_tiny
from expertsmith import api
from expertsmith.arch import families
from expertsmith.calibration.data import TokenData
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.experts.weights import layout_of
from expertsmith.healing.experts import Routed
from expertsmith.healing.held import held_out
from expertsmith.healing.least_squares import Problem, solve
from expertsmith.healing.options import parse_healer
from expertsmith.healing.pair import check_pair
from expertsmith.healing.tail import wanted_change
from expertsmith.planning.plan import LayerPlan, Merge, Method, Plan, Source
from expertsmith.views.progress import Silent
from tiny import tiny_config
from to_heal import write_texts

CORE = ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "dbrx", "llama4_text", "longcat_flash", "gemma4_text"]
EVERY = pytest.mark.parametrize("model_type", SUPPORTED)
SHAPE = {"seq_len": 24, "pack": False, "batch_tokens": 300, "device": DEVICE}
# the tails of these layers are no function of the token alone, or weight the routed output very unevenly
HARD = {"inkling_text", "inkling2_text", "ernie4_5_moe", "flint"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[str]:
    """Enough tokens for the tiny models: two domains of twelve sequences each."""
    return write_texts(tmp_path_factory.mktemp("texts"), "a", "b")


@pytest.fixture(scope="module")
def half(checkpoints, tmp_path_factory) -> Path:
    """A Mixtral with 4 of 8 experts."""
    out = tmp_path_factory.mktemp("half") / "half"
    api.apply(checkpoints("mixtral"), api.plan(checkpoints("mixtral"), "random", 4), out)
    return out


def same_tensors(a, b) -> bool:
    return not differing(a, b)


def differing(a, b) -> list[str]:
    """Names of tensors with other bytes; names, dtypes and shapes have to be the same."""
    mine, theirs = open_checkpoint(a), open_checkpoint(b)
    assert {n: (i.dtype, i.shape) for n, i in mine.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in theirs.tensors.items()
    }
    return [name for name in mine.tensors if not torch.equal(mine.read(name), theirs.read(name))]


def shaken(model, out, amount: float = 0.2) -> Path:
    """The same model with noise on the down projections of its routed experts."""
    inventory = take_inventory(open_checkpoint(model))
    shutil.copytree(model, out)
    generator = torch.Generator().manual_seed(5)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for claim in inventory.claims:
            if claim.routed and layout_of(claim, inventory) in ("down", "down_t") and claim.info.name in tensors:
                old = tensors[claim.info.name]
                tensors[claim.info.name] = old + amount * old.std() * torch.randn(old.shape, generator=generator)
        save_file(tensors, file, metadata={"format": "pt"})
    return out


# ---- the method


class Linear:
    """Experts whose hidden activations are their inputs: phi = w x."""

    def __init__(self, down: list[torch.Tensor]) -> None:
        self.weights, self.count = down, len(down)

    def features(self, routed: Routed, expert: int, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return routed.x[rows] * routed.weight[rows, slots, None]

    def down(self, expert: int) -> torch.Tensor:
        return self.weights[expert].double()


def planted(tokens: int = 400, width: int = 6) -> tuple[Linear, Problem, list[torch.Tensor]]:
    """Two experts, both used by every token, and what a change of their down projections wants, without noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    weight = torch.rand(tokens, 2, generator=generator) + 0.1
    routed = Routed(x, torch.tensor([[0, 1]]).expand(tokens, 2), weight)
    changes = [torch.randn(4, width, generator=generator) for _ in range(2)]
    wanted = sum((x * weight[:, [e]]) @ changes[e].T for e in range(2))
    held = torch.arange(tokens) % 8 == 0
    layer = Linear([torch.zeros(4, width), torch.zeros(4, width)])
    return layer, Problem(routed, torch.as_tensor(wanted), held), changes


def test_a_planted_change_is_found():
    layer, problem, changes = planted()
    found = solve(layer, problem, sweeps=60)
    for expert, change in enumerate(changes):
        assert torch.allclose(found.down[expert].float(), change, atol=1e-3)
    assert all(after <= before * (1 + 1e-9) for before, after in zip(found.errors, found.errors[1:], strict=False))
    assert found.errors[-1] < 1e-6 * found.errors[0]


def test_one_step_is_the_ridge_regression():
    """One expert, worked with numpy's formula."""
    layer, problem, _ = planted()
    problem.routed.expert = torch.tensor([[0, -1]]).expand(400, 2)
    problem.wanted += 0.5 * torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    found = solve(layer, problem, sweeps=1)
    train = ~problem.held
    phi = (problem.routed.x * problem.routed.weight[:, :1])[train].double()
    gram = phi.T @ phi
    ridge = found.ridges[0] * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    wanted = torch.linalg.solve(gram + ridge, phi.T @ problem.wanted[train].double()).T
    assert torch.allclose(found.down[0], wanted, atol=1e-9)


def test_what_makes_held_out_tokens_worse_is_not_done():
    """Training tokens want one change, held-out tokens its opposite."""
    layer, problem, _ = planted()
    problem.wanted[problem.held] *= -1
    found = solve(layer, problem, sweeps=2)
    assert not found.down
    assert found.errors[0] == found.errors[-1]


def test_an_expert_without_held_out_tokens_stays():
    layer, problem, _ = planted()
    problem.routed.expert = problem.routed.expert.clone()
    problem.routed.expert[problem.held, 1] = -1
    assert list(solve(layer, problem, sweeps=1).down) == [0]


def test_the_wanted_change_of_a_scaled_tail_is_exact():
    routed = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    error = torch.ones(1, 5, 3)
    error[0, 2] = 0
    change, strength = wanted_change((0.22 * routed).reshape(1, 5, 3), routed, error)
    assert torch.allclose(change, error[0] / 0.22, rtol=1e-5)
    assert strength[2] == 0
    assert torch.allclose(strength[[0, 1, 3, 4]], torch.tensor(0.22), rtol=1e-5)


def test_the_wanted_change_through_a_projection_solves_the_least_squares():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 3, generator=generator)
    routed = torch.randn(4, 3, generator=generator).requires_grad_()
    error = torch.randn(1, 4, 6, generator=generator)
    change, _ = wanted_change((routed @ matrix.T).reshape(1, 4, 6), routed, error)
    assert torch.allclose(change, torch.linalg.lstsq(matrix, error[0].T).solution.T, atol=1e-3)


def test_held_out_sequences():
    data = TokenData({"a": [[1, 2, 3]] * 16, "b": [[1, 2, 3]] * 5, "c": [[1, 2, 3]] * 2}, {})
    batches = data.batches(9)
    held = held_out(data, batches)
    rows = dict.fromkeys("abc", 0)
    for batch, mask in zip(batches, held, strict=True):
        rows[batch.domain] += int(mask.any(1).sum())
    assert rows == {"a": 2, "b": 1, "c": 0}
    single = TokenData({"a": [list(range(32))]}, {})
    (mask,) = held_out(single, single.batches(32))
    assert mask[0].nonzero().squeeze(1).tolist() == [28, 29, 30, 31]
    with pytest.raises(UserError, match="too short"):
        held_out(TokenData({"a": [[1, 2]]}, {}), TokenData({"a": [[1, 2]]}, {}).batches(8))


# ---- families


@EVERY
def test_planted_weights_are_found(model_type, checkpoints, texts, tmp_path):
    """With all experts kept and more tokens than neurons there is an exact solution: the original's down projections."""
    noisy = shaken(checkpoints(model_type), tmp_path / "shaken")
    report = api.heal(noisy, checkpoints(model_type), texts, tmp_path / "healed", options={"sweeps": 4}, **SHAPE)
    rows = report["layers"]
    assert all(row["error_after"] <= row["error_before"] for row in rows)
    assert rows[0]["error_after"] < (0.4 if model_type in HARD else 0.12) * rows[0]["error_before"]
    assert report["accepted"]
    assert report["held_out"]["after"]["mean"]["kl"] < 0.9 * report["held_out"]["before"]["mean"]["kl"]
    record = families()[model_type]
    changed = differing(noisy, tmp_path / "healed")
    assert {record.layout_of(record.locate(name)[1]) for name in changed} <= {"down", "down_t"}


@pytest.mark.parametrize("model_type", CORE[:6])
def test_half_of_the_experts(model_type, checkpoints, texts, tmp_path):
    """The held-out error of no layer, and of no sweep, rises."""
    api.apply(checkpoints(model_type), api.plan(checkpoints(model_type), "random", 0.5), tmp_path / "half")
    report = api.heal(tmp_path / "half", checkpoints(model_type), texts, tmp_path / "healed", **SHAPE)
    assert all(row["error_after"] <= row["error_before"] for row in report["layers"])
    assert any(row["error_after"] < 0.995 * row["error_before"] for row in report["layers"])
    for row in report["layers"]:
        assert all(b <= a * (1 + 1e-6) for a, b in zip(row["sweeps"], row["sweeps"][1:], strict=False))
    assert bool(differing(tmp_path / "half", tmp_path / "healed")) == report["accepted"]


@pytest.mark.parametrize("method", ["least_squares", "layer_local"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text"])
def test_nothing_removed_changes_nothing(model_type, method, checkpoints, texts, tmp_path):
    options = {} if method == "least_squares" else {"steps": 2, "learning_rate": 0.001}
    api.heal(
        checkpoints(model_type), checkpoints(model_type), texts[:1], tmp_path / "out", method=method, options=options, **SHAPE
    )
    assert same_tensors(checkpoints(model_type), tmp_path / "out")


def plan_of(model, layers: list[LayerPlan]) -> Plan:
    inventory = take_inventory(open_checkpoint(model))
    source = Source(model_type=inventory.architecture.model_type, fingerprint=inventory.checkpoint.fingerprint)
    return Plan(method=Method(name="by_hand"), model=source, layers=layers)


def test_merged_and_uneven(checkpoints, texts, tmp_path):
    """Layers of different counts, one with merged experts; the output keeps its code and loads."""
    model = checkpoints("mixtral")
    merge = Merge(into=0, **{"from": [0, 1]}, weights=[0.5, 0.5])
    layers = [
        LayerPlan(layer=0, num_experts=8, keep=[0, 2, 3], merge=[merge]),
        LayerPlan(layer=1, num_experts=8, keep=[1, 2, 5, 6, 7]),
        LayerPlan(layer=2, num_experts=8, keep=[0, 4]),
    ]
    api.apply(model, plan_of(model, layers), tmp_path / "uneven")
    report = api.heal(tmp_path / "uneven", model, texts, tmp_path / "healed", **SHAPE)
    assert [row["experts"] for row in report["layers"]] == [3, 5, 2]
    assert report["held_out"]["after"]["mean"]["kl"] < report["held_out"]["before"]["mean"]["kl"]
    code = "modeling_expertsmith.py"
    assert (tmp_path / "healed" / code).read_bytes() == (tmp_path / "uneven" / code).read_bytes()
    assert api.load(tmp_path / "healed") is not None
    if importlib.util.find_spec("peft"):
        options = {"step_tokens": 200, "learning_rate": 0.003, "rank": 2}
        api.heal(tmp_path / "uneven", model, texts, tmp_path / "adapted", method="lora", options=options, **SHAPE)
        assert (tmp_path / "adapted" / code).read_bytes() == (tmp_path / "uneven" / code).read_bytes()
        assert differing(tmp_path / "uneven", tmp_path / "adapted")


def test_a_dense_teacher(checkpoints, texts, tmp_path):
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
        texts,
        tmp_path / "healed",
        method="layer_local",
        options={"steps": 20, "step_tokens": 200, "learning_rate": 0.01},
        **SHAPE,
    )
    assert all(row["error_after"] < 0.95 * row["error_before"] for row in report["layers"])
    assert report["held_out"]["after"]["mean"]["kl"] < report["held_out"]["before"]["mean"]["kl"]


def test_skip_thresholds_are_in_force(checkpoints, texts, tmp_path):
    """The tokens of the calibration skip experts as they will; an expert that is skipped gets nothing of a token."""
    plain = api.skip(
        checkpoints("qwen3_moe"),
        texts,
        tmp_path / "skips",
        quantile=0.8,
        statistic="quantile",
        measure=False,
        device=DEVICE,
        seq_len=24,
        pack=False,
    )
    assert plain["plan"].skip is not None
    report = api.heal(tmp_path / "skips", checkpoints("qwen3_moe"), texts, tmp_path / "healed", **SHAPE)
    assert report["held_out"]["before"]["mean"]["kl"] > 0  # without skipping the two are the same model
    assert all(row["error_after"] <= row["error_before"] for row in report["layers"])
    assert json.loads((tmp_path / "healed" / "config.json").read_text())["expertsmith"]["skip"]


# ---- files


def test_bfloat16_and_shards_stay(checkpoints, texts, tmp_path):
    """Weights are rounded once, to what the checkpoint holds; files keep their names and contents."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints("qwen2_moe"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16", max_shard_size="60KB")
    noisy = shaken(tmp_path / "bf16", tmp_path / "shaken")
    files = sorted(file.name for file in noisy.glob("*.safetensors"))
    assert len(files) > 1
    report = api.heal(noisy, tmp_path / "bf16", texts, tmp_path / "healed", **SHAPE)
    assert sorted(file.name for file in (tmp_path / "healed").glob("*.safetensors")) == files
    for name in files:
        assert load_file(noisy / name).keys() == load_file(tmp_path / "healed" / name).keys()
    assert differing(noisy, tmp_path / "healed")
    quality = api.evaluate(
        tmp_path / "healed", texts, reference=tmp_path / "bf16", dtype="float32", device=DEVICE, seq_len=24
    ).to_json()
    before = api.evaluate(noisy, texts, reference=tmp_path / "bf16", dtype="float32", device=DEVICE, seq_len=24).to_json()
    assert quality["mean"]["kl"] < 0.5 * before["mean"]["kl"]
    assert report["data"]["held_out_tokens"] > 0


def test_report_and_model_card(half, checkpoints, texts, tmp_path):
    report = api.heal(half, checkpoints("mixtral"), texts, tmp_path / "healed", eval_data=texts, **SHAPE)
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


METHODS = {
    "least_squares": {},
    "layer_local": {"steps": 4, "step_tokens": 64},
    "router": {"step_tokens": 64, "learning_rate": 0.003, "epochs": 3},
    "lora": {"step_tokens": 64, "rank": 4, "epochs": 2},
}


class Stops(Silent):
    """Ends the run when a number of notes that hold a word have been made."""

    def __init__(self, word: str, count: int) -> None:
        self.word, self.left = word, count

    def note(self, message: str) -> None:
        self.left -= self.word in message
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", list(METHODS))
def test_same_bytes_again_and_when_interrupted(method, half, checkpoints, texts, tmp_path, monkeypatch):
    """The same seed gives the same bytes; an interrupted run goes on and gives them too; --fresh and other options are told apart."""
    if method == "lora":
        pytest.importorskip("peft")
    job = {"method": method, "options": METHODS[method], **SHAPE}
    model = checkpoints("mixtral")
    api.heal(half, model, texts, tmp_path / "one", **job)
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
            api.heal(half, model, texts, tmp_path / "two", **job)
        monkeypatch.undo()
    else:
        with pytest.raises(KeyboardInterrupt):
            api.heal(half, model, texts, tmp_path / "two", progress=Stops("decoder layer", 2), **job)
    assert not (tmp_path / "two").exists()
    other = {
        **job,
        "options": {**METHODS[method], **({"sweeps": 9} if "l" in method[:2] and method != "lora" else {"seed": 1})},
    }
    with pytest.raises(UserError, match="other models, data or options"):
        api.heal(half, model, texts, tmp_path / "two", **other)
    notes = Noted()
    api.heal(half, model, texts, tmp_path / "two", progress=notes, **job)
    assert any("resuming" in note for note in notes.said)
    assert same_tensors(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("method", ["least_squares", "layer_local"])
def test_progress_adds_up(method, half, checkpoints, texts, tmp_path):
    """The bar moves within layers, and ends where it should."""
    bar = Counted()
    api.heal(
        half, checkpoints("mixtral"), texts, tmp_path / "out", method=method, options=METHODS[method], progress=bar, **SHAPE
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
def test_streamed_is_resident(method, half, checkpoints, texts, tmp_path):
    for memory in ("resident", "stream"):
        api.heal(
            half,
            checkpoints("mixtral"),
            texts,
            tmp_path / memory,
            method=method,
            options=METHODS[method],
            memory=memory,
            **SHAPE,
        )
    assert same_tensors(tmp_path / "resident", tmp_path / "stream")


def test_streamed_is_resident_where_tokens_mix_behind_the_experts(checkpoints, texts, tmp_path):
    """There, noise on a token without an error would give it a weight of many tokens."""
    model = checkpoints("inkling_text")
    api.apply(model, api.plan(model, "random", 0.5), tmp_path / "half")
    for memory in ("resident", "stream"):
        api.heal(tmp_path / "half", model, texts, tmp_path / memory, memory=memory, **SHAPE)
    assert same_tensors(tmp_path / "resident", tmp_path / "stream")


# ---- gradients


@pytest.mark.parametrize("model_type", CORE[:6])
def test_layer_local_in_families(model_type, checkpoints, texts, tmp_path):
    """It starts from least squares and is never worse; gate, up and router change too."""
    api.apply(checkpoints(model_type), api.plan(checkpoints(model_type), "random", 0.5), tmp_path / "half")
    options = {"steps": 12, "step_tokens": 100, "learning_rate": 0.003}
    report = api.heal(
        tmp_path / "half", checkpoints(model_type), texts, tmp_path / "healed", method="layer_local", options=options, **SHAPE
    )
    rows = report["layers"]
    assert all(row["error_after"] <= row["error_least_squares"] <= row["error_before"] for row in rows)
    assert any(row["error_after"] < 0.999 * row["error_least_squares"] for row in rows)
    record = families()[model_type]
    inventory = take_inventory(open_checkpoint(tmp_path / "half"))
    roles = {claim.info.name: claim for claim in inventory.claims}
    changed = differing(tmp_path / "half", tmp_path / "healed")
    assert all(roles[name].kind in ("expert", "stacked") for name in changed)
    assert any(not roles[name].routed for name in changed)
    assert any((record.layout_of(roles[name].rest) or "down") not in ("down", "down_t") for name in changed)


@pytest.mark.parametrize("model_type", CORE)
def test_router_changes_router_rows_only(model_type, checkpoints, texts, tmp_path):
    """Experts stay byte for byte, and so do biases that act on the selection only."""
    api.apply(checkpoints(model_type), api.plan(checkpoints(model_type), "random", 0.5), tmp_path / "half")
    options = {"step_tokens": 100, "learning_rate": 0.01, "epochs": 3}
    report = api.heal(
        tmp_path / "half", checkpoints(model_type), texts, tmp_path / "healed", method="router", options=options, **SHAPE
    )
    inventory = take_inventory(open_checkpoint(tmp_path / "half"))
    roles = {claim.info.name: claim for claim in inventory.claims}
    changed = differing(tmp_path / "half", tmp_path / "healed")
    assert changed or report["training"]["best_step"] == 0
    assert all(roles[name].kind == "stacked" and not roles[name].routed for name in changed)
    assert not any("correction_bias" in name for name in changed)
    assert report["held_out"]["after"]["mean"]["kl"] <= report["held_out"]["before"]["mean"]["kl"]


def test_router_learns(half, checkpoints, texts, tmp_path):
    report = api.heal(
        half,
        checkpoints("mixtral"),
        texts,
        tmp_path / "healed",
        method="router",
        options={"step_tokens": 100, "epochs": 6},
        **SHAPE,
    )
    assert set(report["training"]["trials"]) == {"0.01", "0.001", "0.0001"}
    curve = [loss for _, loss in report["training"]["held_out_loss"]]
    assert min(curve) < 0.995 * curve[0]
    assert report["training"]["tokens_seen"] > 0


def test_the_distillation_loss_is_that_of_the_whole_vocabulary(half, checkpoints, texts, tmp_path):
    """The loss in parts, at the start, is the KL that evaluation measures in one go."""
    report = api.heal(
        half,
        checkpoints("mixtral"),
        texts,
        tmp_path / "healed",
        method="router",
        options={"learning_rate": 1e-9, "step_tokens": 400},
        **SHAPE,
    )
    rows = report["held_out"]["before"]["domains"].values()
    kl = sum(row["kl"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    assert report["training"]["held_out_loss"][0][1] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "granitemoe"])
def test_lora_is_merged(model_type, checkpoints, texts, tmp_path):
    pytest.importorskip("peft")
    api.apply(checkpoints(model_type), api.plan(checkpoints(model_type), "random", 0.5), tmp_path / "half")
    options = {"step_tokens": 100, "epochs": 4, "rank": 4, "targets": "attention,experts,router"}
    report = api.heal(
        tmp_path / "half", checkpoints(model_type), texts, tmp_path / "healed", method="lora", options=options, **SHAPE
    )
    assert report["held_out"]["after"]["mean"]["kl"] < report["held_out"]["before"]["mean"]["kl"]
    changed = differing(tmp_path / "half", tmp_path / "healed")
    inventory = take_inventory(open_checkpoint(tmp_path / "half"))
    roles = {claim.info.name: claim for claim in inventory.claims}
    assert {roles[name].kind for name in changed} >= {"stacked", "other"}
    quality = api.evaluate(tmp_path / "healed", texts, reference=checkpoints(model_type), device=DEVICE, seq_len=24).to_json()
    before = api.evaluate(tmp_path / "half", texts, reference=checkpoints(model_type), device=DEVICE, seq_len=24).to_json()
    assert quality["mean"]["kl"] < before["mean"]["kl"]


def test_lora_on_experts_that_peft_cannot_reach(checkpoints, texts, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="leave experts out"):
        api.heal(checkpoints("dbrx"), checkpoints("dbrx"), texts, tmp_path / "out", method="lora", **SHAPE)


def test_the_preset_of_moeits():
    """Values of the published recipe; what is given beside the preset wins."""
    chosen = parse_healer("lora", {"preset": "moeits", "rank": 8})
    assert (chosen.rank, chosen.alpha, chosen.dropout, chosen.learning_rate, chosen.warmup) == (8, 16, 0.1, 2e-4, 0.05)
    assert (chosen.kl, chosen.text, chosen.neftune, chosen.cosine, chosen.weight_decay) == (0, 1, 5, True, 0.05)


def test_the_preset_runs(half, checkpoints, texts, tmp_path):
    pytest.importorskip("peft")
    options = {"preset": "moeits", "rank": 2, "step_tokens": 200, "learning_rate": 0.003}
    report = api.heal(half, checkpoints("mixtral"), texts, tmp_path / "healed", method="lora", options=options, **SHAPE)
    curve = [loss for _, loss in report["training"]["held_out_loss"]]
    assert curve[0] == pytest.approx(_text_loss(report["held_out"]["before"]), rel=1e-4)


def _text_loss(quality: dict) -> float:
    rows = quality["domains"].values()
    return sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)


# ---- the rule


def test_heal_says_what_the_rule_chose(half, checkpoints, texts, tmp_path, capsys):
    """In the terminal, in heal.json and on the card."""
    common = ["heal", half, "-t", checkpoints("mixtral"), "-m", "layer_local", "--seq-len", 24, "--no-pack", "--device", DEVICE]
    code, out, err = run_cli(capsys, *common, "-d", texts[0], "-O", "steps=3", "-o", tmp_path / "given")
    assert code == 0, err
    report = json.loads((tmp_path / "given/expertsmith/heal.json").read_text())
    (sentence,) = report["rule"]
    assert sentence.startswith("decoder layers 0, 1, 2: 9,344 weights of router and experts, ")
    assert sentence.endswith("(steps given)")
    assert ": 3 steps of " in sentence
    assert sentence in " ".join(out.split())
    assert f"- **Trained**: {sentence}" in (tmp_path / "given/README.md").read_text()
    much = report["layers"][0]["refined"]["amount"]
    assert (much["steps"], much["given"]) == (3, ["steps"])
    assert much["step_tokens"] == sum(report["data"]["tokens"].values()) - report["data"]["held_out_tokens"]  # fewer than 2048


def test_with_too_few_tokens_nothing_but_down_projections_is_trained(half, checkpoints, tmp_path):
    """16 tokens for 2304 weights an expert; the result is that of least squares."""
    (tmp_path / "few.jsonl").write_text(
        "".join(json.dumps({"input_ids": list(range(4 * i, 4 * i + 8))}) + "\n" for i in range(4))
    )
    made = {}
    for method in ("least_squares", "layer_local"):
        data = [f"a={tmp_path / 'few.jsonl'}"]
        made[method] = api.heal(half, checkpoints("mixtral"), data, tmp_path / method, method=method, **SHAPE)
    (sentence,) = made["layer_local"]["rule"]
    assert "fewer than 1: only down projections are trained, in closed form" in sentence
    assert same_tensors(tmp_path / "least_squares", tmp_path / "layer_local")
    assert "changed the down projections" in (tmp_path / "layer_local/README.md").read_text()


def test_a_smaller_rate_where_the_first_lowers_no_error(half, checkpoints, texts, tmp_path, monkeypatch):
    """Steps of ten times the weights' size do harm."""
    from expertsmith.healing import refine

    monkeypatch.setattr(refine, "RATES", (10.0, 0.01))
    options = {"steps": 10, "step_tokens": 64}
    report = api.heal(half, checkpoints("mixtral"), texts, tmp_path / "out", method="layer_local", options=options, **SHAPE)
    for row in report["layers"]:
        assert row["refined"]["learning_rate"] == 0.01
        assert row["refined"]["error_after"] <= row["refined"]["error_before"]
    assert any(row["refined"]["best_step"] for row in report["layers"])


# ---- the command line, and bad input


def test_compress_heals(checkpoints, texts, tmp_path, capsys):
    arguments = [
        "compress",
        checkpoints("mixtral"),
        "-m",
        "frequency",
        "-k",
        4,
        *(part for text in texts for part in ("-d", text)),
        "-e",
        texts[0],
    ]
    code, out, err = run_cli(
        capsys, *arguments, "--heal", "least_squares", "-o", tmp_path / "out", "--device", DEVICE, "--json", "-q"
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["verify"]["passed"]
    assert result["heal"]["method"] == "least_squares"
    held = result["heal"]["held_out"]
    assert held["after"]["mean"]["kl"] < held["before"]["mean"]["kl"]
    assert "## Healed" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    code, _, err = run_cli(capsys, *arguments, "--heal", "lora", "-o", tmp_path / "other")
    assert code == 2
    assert "layer by layer" in err


def test_the_command(half, checkpoints, texts, tmp_path, capsys):
    common = ["heal", half, "-t", checkpoints("mixtral"), "--seq-len", 24, "--no-pack", "--device", DEVICE]
    code, out, err = run_cli(capsys, *common, "-d", texts[0], "-o", tmp_path / "json", "--json")
    assert code == 0, err
    assert json.loads(out)["out"] == str(tmp_path / "json")
    code, out, err = run_cli(capsys, *common, "-d", texts[0], "-o", tmp_path / "text", "-O", "sweeps=1")
    assert code == 0, err
    assert "healed by least_squares" in out
    assert "KL before" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "least_square"], "did you mean least_squares"),
        (["-O", "sweep=3"], "did you mean sweeps"),
        (["-O", "sweeps=0"], "give 1 or more"),
        (["-m", "router", "-O", "temperature=0"], "give more than 0"),
        (["-m", "router", "-O", "kl=0"], "nothing to learn"),
        (["-m", "layer_local", "--dtype", "bfloat16"], "use --dtype float32"),
        (["-m", "router", "--memory", "stream"], "gradients through the whole model"),
        (["-m", "lora", "-O", "targets=attention,head"], "choose among attention"),
        (["-m", "lora", "-O", "targets=shared"], "has no shared"),
    ],
)
def test_bad_options(arguments, message, half, checkpoints, texts, tmp_path, capsys):
    common = ["heal", half, "-t", checkpoints("mixtral"), "-d", texts[0], "--seq-len", 24, "--no-pack", "--device", DEVICE]
    code, _, err = run_cli(capsys, *common, "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()[-1]) > 0
    assert not (tmp_path / "out").exists()


def test_no_data(half, checkpoints, tmp_path, capsys):
    code, _, err = run_cli(capsys, "heal", half, "-t", checkpoints("mixtral"), "-o", tmp_path / "out")
    assert code == 2
    assert "no data" in err


def test_teacher_and_student_have_to_match(half, checkpoints, texts, tmp_path):
    save_tiny("mixtral", tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(UserError, match=r"decoder layers 4 of .* and 3 of"):
        api.heal(half, tmp_path / "deeper", texts, tmp_path / "out", **SHAPE)
    save_tiny("mixtral", tmp_path / "wider", hidden_size=64)
    with pytest.raises(UserError, match=r"hidden size 64 of .* and 32 of"):
        api.heal(half, tmp_path / "wider", texts, tmp_path / "out", **SHAPE)
    save_tiny("mixtral", tmp_path / "words", vocab_size=256)
    with pytest.raises(UserError, match=r"vocabulary 256 of .* and 128 of"):
        api.heal(half, tmp_path / "words", texts, tmp_path / "out", **SHAPE)
    assert not (tmp_path / "out").exists()


def test_only_the_original_is_a_teacher(half, checkpoints, texts, tmp_path):
    """A twin with one other tensor, and the compressed model itself; a start that failed leaves nothing that blocks the next."""
    shutil.copytree(checkpoints("mixtral"), tmp_path / "twin")
    tensors = load_file(tmp_path / "twin" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "twin" / "model.safetensors", metadata={"format": "pt"})
    for teacher in (tmp_path / "twin", half):
        with pytest.raises(UserError, match="is not the original of"):
            api.heal(half, teacher, texts, tmp_path / "out", **SHAPE)
        assert not list(tmp_path.glob("out*"))
    few = tmp_path / "few.jsonl"
    few.write_text('{"input_ids": [5, 6, 7]}\n')
    with pytest.raises(UserError):
        api.heal(half, checkpoints("mixtral"), [f"a={few}"], tmp_path / "out", **SHAPE)
    assert not list(tmp_path.glob("out*"))
    api.heal(half, checkpoints("mixtral"), texts, tmp_path / "out", **SHAPE)
    assert (tmp_path / "out" / "config.json").exists()


def test_the_original_of_the_original_is_a_teacher_too(checkpoints, half, texts, tmp_path):
    """A → B → healed B → C: what C's plans name may teach C; others may not, and without the earlier plans only its own source may."""
    first, healed, last = checkpoints("mixtral"), tmp_path / "healed", tmp_path / "last"
    api.heal(half, first, texts, healed, **SHAPE)
    api.apply(healed, api.plan(healed, "random", 3), last)
    (earlier,) = (last / "expertsmith" / "earlier").iterdir()
    assert earlier.stem == open_checkpoint(healed).fingerprint.removeprefix("sha256:")
    assert earlier.read_text() == (half / "expertsmith" / "plan.json").read_text()
    for name, teacher in (("a", first), ("b", healed)):
        report = api.heal(last, teacher, texts, tmp_path / name, **SHAPE)
        assert report["teacher"]["fingerprint"] == open_checkpoint(teacher).fingerprint
        assert (tmp_path / name / "expertsmith" / "earlier" / earlier.name).read_text() == earlier.read_text()
    for stranger in (half, last):  # half is not what C was made from: its healed twin is
        with pytest.raises(UserError, match=r"is not the original of .*names sha256:\w+, made from sha256:\w+"):
            api.heal(last, stranger, texts, tmp_path / "out", **SHAPE)
    api.apply(last, api.plan(last, "random", 2), tmp_path / "fourth")
    assert len(list((tmp_path / "fourth" / "expertsmith" / "earlier").iterdir())) == 2
    check_pair(open_checkpoint(tmp_path / "fourth"), open_checkpoint(first))
    earlier.unlink()
    with pytest.raises(UserError, match="is not the original of"):
        api.heal(last, first, texts, tmp_path / "out", **SHAPE)


def test_output_that_exists_or_is_a_model(half, checkpoints, texts, tmp_path):
    for out in (half, checkpoints("mixtral")):
        with pytest.raises(UserError):
            api.heal(half, checkpoints("mixtral"), texts, out, overwrite=True, **SHAPE)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        api.heal(half, checkpoints("mixtral"), texts, tmp_path / "out", **SHAPE)
    (tmp_path / "other.work").mkdir()
    (tmp_path / "other.work" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="contains files that are not"):
        api.heal(half, checkpoints("mixtral"), texts, tmp_path / "other", resume=False, **SHAPE)
    assert (tmp_path / "other.work" / "thesis.txt").exists()


def test_codes_without_scales_are_not_healed(checkpoints, texts, tmp_path):
    model = tmp_path / "fp8"
    shutil.copytree(checkpoints("mixtral"), model)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "experts.0.w2" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is F8_E4M3, but it has no scales and no decoder"):
        api.heal(model, checkpoints("mixtral"), texts, tmp_path / "out", **SHAPE)


def test_peft_missing(half, checkpoints, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install "expertsmith\[heal\]"'):
        api.heal(half, checkpoints("mixtral"), texts, tmp_path / "out", method="lora", **SHAPE)


@pytest.mark.testbed
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_trained_models(model_type, testbed, tmp_path):
    """Half of the experts by REAP: least squares leaves at most half of the loss's rise on held-out text."""
    model, corpus = testbed / "models" / model_type, testbed / "data" / "corpus"
    names = ("math", "spanish")
    calib = [f"{name}={corpus / name / 'calib.jsonl'}" for name in names]
    shape = {"samples": 24, "seq_len": 128, "device": DEVICE}
    stats = api.calibrate(model, calib, tmp_path / "stats", dtype="float32", **shape)
    api.apply(model, api.plan(model, "reap", 0.5, stats=stats), tmp_path / "half")
    held = [f"{name}={corpus / name / 'heldout.jsonl'}" for name in names]
    quality = api.heal(tmp_path / "half", model, calib, tmp_path / "healed", eval_data=held, **shape)["quality"]
    rise = {when: quality[when]["mean"]["loss"] - quality[when]["mean"]["reference_loss"] for when in ("before", "after")}
    assert rise["after"] < 0.5 * rise["before"]


@pytest.mark.testbed
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_trained_models_in_fp8_keep_what_healing_gains(model_type, testbed, tmp_path):
    """Half of the experts of an FP8-block checkpoint by REAP: healed experts in FP8 again keep 0.9 of the gain that bfloat16 has."""
    from quantise import quantise_checkpoint

    corpus = testbed / "data" / "corpus"
    calib = [f"{name}={corpus / name / 'calib.jsonl'}" for name in ("math", "spanish")]
    held = [f"{name}={corpus / name / 'heldout.jsonl'}" for name in ("math", "spanish")]
    shape = {"samples": 24, "seq_len": 128, "device": DEVICE}
    model = tmp_path / "fp8"
    quantise_checkpoint(testbed / "models" / model_type, model, "fp8_block_128")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(testbed / "models" / model_type / file, model / file)
    stats = api.calibrate(model, calib, tmp_path / "stats", dtype="float32", **shape)
    api.apply(model, api.plan(model, "reap", 0.5, stats=stats), tmp_path / "half")
    rise = {}
    for requantise in (False, True):
        target = tmp_path / f"healed-{requantise}"
        found = api.heal(tmp_path / "half", model, calib, target, requantise=requantise, eval_data=held, **shape)["quality"]
        for when in ("before", "after"):
            rise[when, requantise] = found[when]["mean"]["loss"] - found[when]["mean"]["reference_loss"]
    plain, again = (rise["before", kind] - rise["after", kind] for kind in (False, True))
    assert plain > 0
    assert again >= 0.9 * plain


def test_a_measure_that_got_worse_is_said():
    from expertsmith.healing.run import _mixed

    def quality(loss: float, kl: float) -> dict:
        return {"domains": {"a": {"loss": loss, "kl": kl, "tokens": 10}}}

    assert _mixed(quality(2.0, 0.5), quality(1.9, 0.4), "kl") == ""
    said = _mixed(quality(2.0, 0.5), quality(2.1, 0.4), "kl")
    assert said.startswith(
        "KL divergence decides, and fell from 0.5000 to 0.4000 on the held-out tokens; but their loss rose from 2.0000 to 2.1000"
    )
    assert "but their KL divergence rose" in _mixed(quality(2.0, 0.5), quality(1.9, 0.6), "loss")

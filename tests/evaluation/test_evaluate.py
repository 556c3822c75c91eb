"""Perplexity, KL divergence, top-1 agreement and ESAP against a plain float64 reference."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import DEVICE, random_model, save_tiny
from expertsmith import api
from expertsmith.arch import families
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import Batch, load_model
from expertsmith.errors import UserError
from expertsmith.evaluation.quality import measure

CPU = {"device": DEVICE, "memory": "resident", "seq_len": 16}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Mixtral and the same with noise on its weights."""
    root = tmp_path_factory.mktemp("pair")
    save_tiny("mixtral", root / "base")
    model = random_model("mixtral")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(root / "noisy")
    return root / "base", root / "noisy"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, initializer_range=0.2,
        max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dense")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@cache
def plain(folder: Path) -> torch.nn.Module:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_probabilities(folder: Path, row: list[int]) -> np.ndarray:
    """[tokens, vocabulary] of one sequence alone, by plain transformers, softmax in float64."""
    with torch.no_grad():
        logits = plain(folder)(torch.tensor([row])).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def expected(model: Path, reference: Path | None, rows: list[list[int]]) -> dict[str, float]:
    """The definitions, position by position."""
    losses, reference_losses, kl, agree, overlap = [], [], [], [], []
    for row in rows:
        mine = log_probabilities(model, row)
        theirs = log_probabilities(reference, row) if reference else None
        for position, target in enumerate(row[1:]):
            losses.append(-mine[position, target])
            if theirs is None:
                continue
            p, q = np.exp(theirs[position]), np.exp(mine[position])
            reference_losses.append(-theirs[position, target])
            kl.append(sum(p * (theirs[position] - mine[position])))
            agree.append(p.argmax() == q.argmax())
            overlap.append(1 - 0.5 * np.abs(p - q).sum())  # one minus the total variation
    found = {
        "tokens": len(losses),
        "loss": np.mean(losses),
        "loss_se": np.std(losses) / math.sqrt(len(losses)),
        "perplexity": math.exp(np.mean(losses)),
    }
    if reference:
        found |= {
            "reference_loss": np.mean(reference_losses),
            "reference_perplexity": math.exp(np.mean(reference_losses)),
            "rise": np.mean(losses) - np.mean(reference_losses),
            "rise_se": paired_error(np.subtract(losses, reference_losses), [len(row) - 1 for row in rows]),
            "kl": np.mean(kl),
            "top1_agreement": np.mean(agree),
            "esap": np.mean(overlap),
        }
    return found


def paired_error(differences: np.ndarray, lengths: list[int]) -> float:
    """The error of the ratio estimator: sqrt(S / (S - 1) sum_s (d_s - r n_s)^2) / N, over S sequences of n_s tokens."""
    mean, count = differences.mean(), len(lengths)
    parts = np.split(differences, np.cumsum(lengths)[:-1])
    squares = sum((part.sum() - mean * len(part)) ** 2 for part in parts)
    return math.sqrt(count / (count - 1) * squares) / len(differences)


def stream_of(token_file: Path, domain: str) -> list[int]:
    lines = (token_file / f"{domain}.jsonl").read_text().splitlines()
    return [i for line in lines for i in json.loads(line)["input_ids"]]


def windows(stream: list[int], predicted: int) -> list[list[int]]:
    """Windows that predict each token but the first once."""
    return [stream[start : start + predicted + 1] for start in range(0, len(stream) - 1, predicted)]


# ---- against the definitions


def test_a_model_against_a_reference(pair, token_file, data):
    base, noisy = pair
    whole = api.evaluate(noisy, data, reference=base, **CPU).to_json()
    found = whole["domains"]
    assert list(found) == ["a", "b"]
    for domain in ("a", "b"):
        rows = windows(stream_of(token_file, domain), 16)
        wanted = expected(noisy, base, rows)
        assert found[domain] == pytest.approx(wanted, rel=2e-5), domain
        assert list(found[domain]) == list(wanted)
        assert found[domain]["tokens"] == len(stream_of(token_file, domain)) - 1  # every token but the first is predicted once
        assert 0.001 < found[domain]["kl"] < 5  # the noise matters, or this test would show nothing
        assert 0 < found[domain]["top1_agreement"] < 1
    assert whole["mean"]["rise_se"] == pytest.approx(math.sqrt(sum(row["rise_se"] ** 2 for row in found.values())) / 2)


def test_a_model_alone(pair, token_file, data):
    quality = api.evaluate(pair[0], data, **CPU)
    found = quality.to_json()["domains"]
    for domain in ("a", "b"):
        wanted = expected(pair[0], None, windows(stream_of(token_file, domain), 16))
        assert found[domain] == pytest.approx(wanted, rel=2e-5)
        assert list(found[domain]) == ["tokens", "loss", "loss_se", "perplexity"]


def test_the_mean_is_over_domains_not_tokens(pair, token_file):
    data = [f"a={token_file / 'a.jsonl'}:1", f"b={token_file / 'b.jsonl'}"]
    found = api.evaluate(pair[1], data, reference=pair[0], **CPU).to_json()
    rows = found["domains"]
    assert rows["a"]["tokens"] < rows["b"]["tokens"] / 2
    for key in ("loss", "reference_loss", "rise", "kl", "top1_agreement", "esap"):
        assert found["mean"][key] == pytest.approx((rows["a"][key] + rows["b"][key]) / 2)
    assert rows["a"]["rise_se"] is None, "one sequence has no standard error"
    assert found["mean"]["rise_se"] is None
    assert found["mean"]["perplexity"] == pytest.approx(math.exp(found["mean"]["loss"]))
    assert json.loads(json.dumps(found)) == found


def test_a_model_against_itself_is_the_same_model(pair, data):
    for row in api.evaluate(pair[0], data, reference=pair[0], **CPU).to_json()["domains"].values():
        assert row["kl"] == 0
        assert row["top1_agreement"] == 1
        assert row["esap"] == pytest.approx(1, abs=1e-6)
        assert row["loss"] == row["reference_loss"]
        assert row["perplexity"] == row["reference_perplexity"]


def test_kl_takes_the_expectation_over_the_reference(pair, data):
    """KL is not symmetric; overlap and agreement are."""
    there = api.evaluate(pair[1], data, reference=pair[0], **CPU).to_json()["mean"]
    back = api.evaluate(pair[0], data, reference=pair[1], **CPU).to_json()["mean"]
    assert abs(there["kl"] - back["kl"]) > 1e-3 * there["kl"]
    assert there["esap"] == pytest.approx(back["esap"], rel=1e-5)
    assert there["top1_agreement"] == back["top1_agreement"]
    assert there["loss"] == pytest.approx(back["reference_loss"], rel=1e-6)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary(tmp_path, data):
    model = random_model("mixtral")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "flat")
    for row in api.evaluate(tmp_path / "flat", data, **CPU).to_json()["domains"].values():
        assert row["perplexity"] == pytest.approx(128, rel=1e-6)
        assert row["loss_se"] == pytest.approx(0, abs=1e-6)


def test_pinsker_and_bounds(pair, data):
    """0 <= ESAP <= 1, and the total variation 1 - ESAP is at most sqrt(KL / 2) (Pinsker, for the means by Jensen)."""
    for row in api.evaluate(pair[1], data, reference=pair[0], **CPU).to_json()["domains"].values():
        assert 0 < 1 - row["esap"] <= math.sqrt(row["kl"] / 2)


# ---- what must not matter


def batch_of(*rows: list[int], domain: str = "a", pad: int = 0, first: int = 0) -> Batch:
    length = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return Batch(ids, mask, domain, list(range(first, first + len(rows))))


ROWS = ([5, 9, 33, 7, 64, 3, 3, 21, 90, 14], [8, 70, 41, 2])


@pytest.mark.parametrize("pad", [0, 77])
def test_padding_does_not_count(pair, pad):
    model, reference = (load_model(open_checkpoint(path), families()["mixtral"]) for path in reversed(pair))
    together = measure(model, [batch_of(*ROWS, pad=pad)], reference).to_json()["domains"]["a"]
    alone = measure(model, [batch_of(row, first=i) for i, row in enumerate(ROWS)], reference).to_json()["domains"]["a"]
    assert together["tokens"] == alone["tokens"] == 9 + 3
    assert together == pytest.approx(alone, rel=1e-5)


def test_many_rows_at_once_are_measured_in_parts(pair, monkeypatch):
    from expertsmith.evaluation import quality

    model, reference = (load_model(open_checkpoint(path), families()["mixtral"]) for path in reversed(pair))
    whole = measure(model, [batch_of(*ROWS)], reference).to_json()
    monkeypatch.setattr(quality, "ROWS", 5)
    parts = measure(model, [batch_of(*ROWS)], reference).to_json()
    assert parts["domains"]["a"] == pytest.approx(whole["domains"]["a"], rel=1e-9)


def test_streaming_does_not_change_a_digit(pair, data):
    options = {**CPU, "memory": "stream"}
    for reference in (None, pair[0]):
        resident = api.evaluate(pair[1], data, reference=reference, **CPU).to_json()
        assert api.evaluate(pair[1], data, reference=reference, **options).to_json() == resident


def test_the_size_of_batches_hardly_matters(pair, data):
    large = api.evaluate(pair[1], data, reference=pair[0], batch_tokens=4096, **CPU).to_json()["mean"]
    small = api.evaluate(pair[1], data, reference=pair[0], batch_tokens=1, **CPU).to_json()["mean"]
    assert small == pytest.approx(large, rel=1e-5)


def test_the_seed_chooses_the_windows(pair, data):
    def tokens(seed: int) -> dict:
        return api.evaluate(pair[0], data, seed=seed, samples=3, **CPU).to_json()

    assert tokens(1) == tokens(1)
    assert tokens(1)["domains"]["a"]["loss"] != tokens(2)["domains"]["a"]["loss"]


# ---- models of other kinds


def test_a_dense_model_is_measured_and_can_be_the_reference(dense, pair, data, token_file):
    found = api.evaluate(dense, data, reference=pair[0], **CPU).to_json()["domains"]["a"]
    assert found == pytest.approx(expected(dense, pair[0], windows(stream_of(token_file, "a"), 16)), rel=2e-5)
    back = api.evaluate(pair[0], data, reference=dense, **CPU).to_json()["domains"]["a"]
    assert back["loss"] == pytest.approx(found["reference_loss"], rel=1e-6)
    streamed = api.evaluate(dense, data, **{**CPU, "memory": "stream"}).to_json()["domains"]["a"]
    assert streamed["loss"] == pytest.approx(found["loss"], rel=1e-6)


def test_a_reference_with_another_vocabulary_is_refused(pair, data, tmp_path):
    save_tiny("mixtral", tmp_path / "other", vocab_size=130)
    with pytest.raises(UserError, match="predicts 128 tokens, the reference 130; they need the same vocabulary"):
        api.evaluate(pair[0], data, reference=tmp_path / "other", **CPU)


def test_a_pruned_model_is_compared_with_its_source(pair, data, tmp_path):
    api.apply(pair[0], api.plan(pair[0], "random", 4), tmp_path / "half")
    row = api.evaluate(tmp_path / "half", data, reference=pair[0], **CPU).to_json()["mean"]
    assert row["kl"] > 0
    assert row["reference_loss"] == pytest.approx(api.evaluate(pair[0], data, **CPU).to_json()["mean"]["loss"], rel=1e-6)


def test_a_window_has_no_more_tokens_than_the_model_has_positions(tmp_path, token_file, monkeypatch):
    """At full window length, the token that is only predicted must not be a position too many."""
    from expertsmith.engine import walk

    save_tiny("mixtral", tmp_path / "short", max_position_embeddings=16)
    lengths = []
    inputs = walk.Batch.inputs

    def watched(self, device):
        made = inputs(self, device)
        lengths.append(made["input_ids"].shape[1])
        return made

    monkeypatch.setattr(walk.Batch, "inputs", watched)
    for options in ({"seq_len": 16}, {"seq_len": None}):
        lengths.clear()
        found = api.evaluate(tmp_path / "short", [str(token_file / "a.jsonl")], device=DEVICE, **options)
        assert found.domains["default"].tokens == len(stream_of(token_file, "a")) - 1
        assert max(lengths) <= 16


def test_a_window_that_is_too_long_is_refused_with_the_length_that_was_asked_for(pair, data):
    with pytest.raises(UserError, match=r"--seq-len 300 is longer than the model's window of 256 positions; use --seq-len 256"):
        api.evaluate(pair[0], data, device=DEVICE, seq_len=300)


def test_nothing_to_predict_is_refused(pair, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"input_ids": [5]}\n')
    with pytest.raises(UserError):
        api.evaluate(pair[0], [str(tmp_path / "x.jsonl")], **CPU)
    with pytest.raises(UserError, match="no tokens to predict"):
        measure(load_model(open_checkpoint(pair[0]), families()["mixtral"]), [batch_of([5])])

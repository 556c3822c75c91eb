"""The steps of a healing in detail: replayed layers against whole ones, batched factorizations against one at a time, draws of tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from conftest import DEVICE, SUPPORTED
from expertsmith import api
from expertsmith.engine import hidden_of
from expertsmith.healing import layerwise, least_squares, refine
from expertsmith.healing.amount import Amount
from expertsmith.healing.experts import Routed
from to_heal import RandomExperts, write_texts
from waits import Waits

BY_BATCH = {"inkling_text", "inkling2_text"}  # a convolution stands behind their experts


def at_every_layer(check, model_type, checkpoints, tmp_path, monkeypatch, **options) -> None:
    """Heal a halved tiny model with check(run, halted) in place of the training."""
    data = write_texts(tmp_path, "a")
    seen = []

    def instead(halted, replay, weights, chosen, pairs, tick):
        matrices, biases, rows = weights
        run = refine._Run(halted, replay, matrices, [*biases, *rows], Amount(1, chosen.step_tokens, 0, 0.0), chosen.seed, tick)
        for weight in run.weights:
            weight.requires_grad_(True)
        check(run, halted)
        for weight in run.weights:
            weight.requires_grad_(False)
        seen.append(halted.index)
        return {"amount": Amount(0, 0, 0, 0.0).to_json()}

    monkeypatch.setattr(layerwise, "refine", instead)
    model = checkpoints(model_type)
    api.apply(model, api.plan(model, "random", 0.5), tmp_path / "half")
    shape = {"seq_len": 24, "pack": False, "batch_tokens": 130, "device": DEVICE}
    api.heal(tmp_path / "half", model, data, tmp_path / "out", method="layer_local", options=options, **shape)
    assert seen


def gradients(run) -> list[torch.Tensor]:
    """Those of a step on all tokens."""
    run._gradients(*next(run.train.draw(torch.Generator().manual_seed(1))))
    found = [weight.grad.clone() for weight in run.weights]
    for weight in run.weights:
        weight.grad = None
    return found


def distance(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Relative, of all gradients together."""
    wrong = sum(float((a - b).double().square().sum()) for a, b in zip(mine, theirs, strict=True))
    return float((wrong / sum(float(b.double().square().sum()) for b in theirs)) ** 0.5)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_replayed_tokens_have_the_gradient_of_the_whole_layer(model_type, checkpoints, tmp_path, monkeypatch):
    """Everything but router and experts is kept from one run, and tokens come in any order; whole batches give the same bits."""

    def check(run, halted) -> None:
        assert run.replay.by_token == (model_type not in BY_BATCH)
        assert run.replay._outputs
        masks = [mask & ~held for mask, held in zip(halted.masks, halted.held, strict=True)]
        with torch.enable_grad():
            total = sum(halted.share(call(), number, masks[number]) for number, call in enumerate(run.replay.calls))
            whole = torch.autograd.grad(total / sum(int(mask.sum()) for mask in masks), run.weights)
        assert distance(gradients(run), list(whole)) < 1e-3
        with torch.no_grad():
            for again, call in zip(halted.calls, run.replay.calls, strict=True):
                assert torch.equal(hidden_of(again()), hidden_of(call()))

    at_every_layer(check, model_type, checkpoints, tmp_path, monkeypatch, step_tokens=10**6)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_bfloat16_steps_go_the_same_way(model_type, checkpoints, tmp_path, monkeypatch):
    def check(run, halted) -> None:
        whole = gradients(run)
        with halted.experts.grouped(torch.bfloat16):
            assert 0 < distance(gradients(run), whole) < 0.03
        assert distance(gradients(run), whole) == 0

    at_every_layer(check, model_type, checkpoints, tmp_path, monkeypatch, step_tokens=10**6)


def test_a_step_does_not_wait_for_the_device(checkpoints, tmp_path, monkeypatch):
    def check(run, halted) -> None:
        drawn = run.train.draw(torch.Generator().manual_seed(1))
        with halted.experts.grouped(torch.bfloat16), Waits() as mode:
            run._gradients(*next(drawn))
        assert not mode.found

    at_every_layer(check, "qwen2_moe", checkpoints, tmp_path, monkeypatch, step_tokens=64)


def problem() -> least_squares.Problem:
    generator = torch.Generator().manual_seed(0)
    x, weight, strength = (torch.rand(300, width, generator=generator) for width in (4, 2, 1))
    expert = torch.rand(300, 6, generator=generator).topk(2).indices
    expert[:20, 1] = -1
    held = torch.arange(300) % 5 == 0
    return least_squares.Problem(
        Routed(x, expert, weight), torch.randn(300, 3, generator=generator), held, strength[:, 0] + 0.1
    )


def one_at_a_time(layer: RandomExperts, given: least_squares.Problem, sweeps: int) -> dict[int, torch.Tensor]:
    """The method as it is written down."""
    rest, down = given.wanted.double(), {e: layer.down(e) for e in range(layer.count)}
    weight = given.strength.double().square()
    for _ in range(sweeps):
        for expert in range(layer.count):
            rows, slots = (given.routed.expert == expert).nonzero(as_tuple=True)
            phi, held = layer.features(given.routed, expert, rows, slots).double(), given.held[rows]
            gram = (phi * weight[rows, None])[~held].T @ phi[~held]
            moment = (phi * weight[rows, None])[~held].T @ rest[rows][~held]

            def error(change, phi=phi, rows=rows, held=held):
                return float(((rest[rows] - phi @ change).square().sum(1) * weight[rows])[held].sum())

            seen = gram.diagonal()[gram.diagonal() > 0]  # a neuron that is always 0 does not count
            eye = seen.mean() * torch.eye(len(gram), dtype=torch.float64)
            changes = [torch.linalg.solve(gram + ridge * eye, moment) for ridge in least_squares.RIDGES]
            best = min(changes, key=error)
            if error(best) < error(torch.zeros_like(best)):
                down[expert] = down[expert] + best.T
                rest[rows] -= phi @ best
    return down


@pytest.mark.parametrize(("room", "at_once"), [(3 * 2**30, 2**28), (0, 2**28), (3 * 2**30, 0), (0, 0), (2**13, 3000)])
def test_batched_steps_are_those_one_at_a_time(room, at_once, monkeypatch):
    """Whatever is kept, and however many experts are factored in a call."""
    monkeypatch.setattr(least_squares, "ROOM", room)
    monkeypatch.setattr(least_squares, "AT_ONCE", at_once)
    monkeypatch.setattr(least_squares, "ROWS", 16)
    layer = RandomExperts(6)
    found, wanted = least_squares.solve(layer, problem(), 3).down, one_at_a_time(layer, problem(), 3)
    for expert, matrix in wanted.items():
        assert torch.allclose(found.get(expert, layer.down(expert)), matrix, atol=1e-5)


def test_a_turn_does_not_wait_for_the_device():
    turns = least_squares._Turns(RandomExperts(6), problem())
    with Waits() as mode:
        for group in turns.groups:
            turns.prepare(group)
            for expert in group:
                turns.step(expert)
    assert not mode.found


def draws(size: int, seed: int, count: int = 12, by_token: bool = True) -> list[torch.Tensor]:
    """Tokens of some steps, out of four batches of 10 tokens, of which 8 count."""
    batches = [torch.arange(at, at + 10).reshape(2, 5) for at in range(0, 40, 10)]
    masks = [torch.tensor([[True] * 4 + [False]] * 2)] * 4
    tokens = refine.Tokens(masks, SimpleNamespace(batches=batches, by_token=by_token), size)
    drawn = tokens.draw(torch.Generator().manual_seed(seed))
    steps = []
    for _ in range(count):
        parts, number = next(drawn)
        rows = torch.cat([part.reshape(-1) for part, _ in parts])
        assert number == int(tokens.counts[rows].sum())
        steps.append(rows)
    return steps


@pytest.mark.parametrize("by_token", [True, False])
def test_a_step_takes_no_token_twice(by_token):
    """Also where there are fewer than a step asks for."""
    for step in draws(size=2048, seed=0, by_token=by_token):
        assert len(step) == len(set(step.tolist())) == (32 if by_token else 40)

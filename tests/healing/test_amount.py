"""How much a layer is trained, and the steps of Muon: worked by hand, and against references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from expertsmith.healing.amount import ENOUGH, MOST, STEPS, Layer, amount, told
from expertsmith.healing.muon import ITERATIONS, MOMENTUM, SCHULZ, Muon, orthogonal
from expertsmith.healing.options import LayerLocal

QWEN = Layer(experts=8, expert_weights=46_080, other_weights=1280, side=96, width=160, tokens=26_880, pairs=107_520)


def test_the_rule_worked_by_hand():
    """8 experts of 3 · 160 · 96 weights, top-4: 107 520 · 160 equations for 368 640 weights; 1024 · 8 / 4 tokens a step."""
    found = amount(QWEN, LayerLocal())
    assert found.equations == pytest.approx(46.67, abs=0.01)
    assert (found.steps, found.step_tokens, found.weights, found.given) == (200, 2048, 369_920, ())
    many = amount(Layer(8, 46_080, 1280, 96, 160, 400_000, 1_600_000), LayerLocal())
    assert (many.steps, many.step_tokens) == (782, 2048)  # 4 · 400 000 / 2048
    wide = amount(Layer(4, 3 * 4096 * 14_336, 16_384, 4096, 4096, 1_000_000, 2_000_000), LayerLocal())
    assert (wide.steps, wide.step_tokens) == (489, 8192)  # 4096 tokens for each of 4 experts, of which 2 run


def test_too_few_tokens_are_trained_in_closed_form_only():
    few = Layer(4, 3 * 4096 * 14_336, 16_384, 4096, 4096, 30_000, 60_000)
    assert amount(few, LayerLocal()).equations == pytest.approx(0.349, abs=0.001)
    assert amount(few, LayerLocal()).steps == 0
    (said,) = told([{"layer": 3, "refined": {"amount": amount(few, LayerLocal()).to_json()}}])
    assert said.startswith(
        "decoder layer 3: 704,659,456 weights of router and experts, 0.35 equations a weight from the text, fewer than 1"
    )
    assert "only down projections are trained, in closed form" in said


def test_what_is_given_wins():
    few = Layer(4, 10**6, 100, 100, 10, 50, 100)
    chosen = amount(few, LayerLocal(steps=7, step_tokens=20, learning_rate=0.1))
    assert (chosen.steps, chosen.step_tokens) == (7, 20)
    assert chosen.given == ("steps", "step_tokens", "learning_rate")
    assert amount(QWEN, LayerLocal(step_tokens=512)).steps == 210  # 4 · 26 880 / 512


@given(
    experts=st.integers(1, 512),
    weights=st.integers(1, 10**9),
    side=st.integers(1, 8192),
    width=st.integers(1, 8192),
    tokens=st.integers(1, 10**8),
    slots=st.integers(1, 16),
)
def test_bounds_of_the_rule(experts, weights, side, width, tokens, slots):
    layer = Layer(experts, weights, 0, side, width, tokens, tokens * slots)
    chosen = amount(layer, LayerLocal())
    assert 1 <= chosen.step_tokens <= tokens
    assert (chosen.steps == 0) == (layer.equations < ENOUGH)
    assert chosen.steps == 0 or STEPS <= chosen.steps <= MOST


def test_layers_that_got_the_same_are_told_together():
    def row(layer: int, last: int, tokens: int = 26_880) -> dict:
        chosen = amount(Layer(8, 46_080, 1280, 96, 160, tokens, 4 * tokens), LayerLocal())
        return {"layer": layer, "refined": {"amount": chosen.to_json(), "learning_rate": 0.05, "last_step": last}}

    assert told([row(1, 200), row(2, 140), row(4, 200, 1000)]) == [
        "decoder layers 1, 2: 369,920 weights of router and experts, 46.7 equations a weight from the text: 200 steps of 2,048 tokens, learning rate "
        "0.05, 1 of 2 layers ended early",
        "decoder layer 4: 369,920 weights of router and experts, 1.74 equations a weight from the text: 200 steps of 1,000 tokens, learning rate 0.05",
    ]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 6, 4)])
def test_orthogonal_is_the_polynomial_of_the_singular_values(shape):
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, sizes, right = torch.linalg.svd(values, full_matrices=False)
    sizes = sizes / values.norm(dim=(-2, -1), keepdim=True)[..., 0]
    a, b, c = SCHULZ
    for _ in range(ITERATIONS):
        sizes = a * sizes + b * sizes**3 + c * sizes**5
    assert torch.allclose(orthogonal(values), left @ torch.diag_embed(sizes) @ right)
    assert not orthogonal(torch.zeros(shape)).any()


def test_steps_are_relative_to_the_size_of_the_weights():
    """A matrix and a vector, twice with another scale of weights and gradients: the same relative path; the rate falls to 0."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector = torch.randn(2, 4, 6, generator=generator), torch.randn(5, generator=generator)
    slopes = [[torch.randn(part.shape, generator=generator) for part in (matrix, vector)] for _ in range(3)]
    ends = []
    for scale in (1.0, 100.0):
        weights = [nn.Parameter(scale * matrix), nn.Parameter(scale * vector)]
        run = Muon(weights[:1], weights[1:], 0.05, 3)
        for slope in slopes:
            for weight, one in zip(weights, slope, strict=True):
                weight.grad = scale * one
            run.step()
        ends.append([weight.detach() / scale for weight in weights])
        assert all(weight.grad is None for weight in weights)
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    moved, expected = torch.zeros_like(matrix), matrix.clone()
    for number, (slope, _) in enumerate(slopes):
        moved = MOMENTUM * moved + slope
        size = matrix.square().mean((-2, -1), keepdim=True).sqrt() * 6**0.5
        expected -= 0.05 * (1 - number / 3) * size * orthogonal(slope + MOMENTUM * moved)
    assert torch.allclose(ends[0][0], expected, atol=1e-6)


@pytest.mark.parametrize("tall", [True, False])
def test_rows_and_columns_of_zeros_do_not_count(tall):
    """A matrix filled up with zeros takes the steps of the matrix without them, and its zeros stay."""
    generator = torch.Generator().manual_seed(0)
    start, slopes = torch.randn(3, 6, 4, generator=generator), torch.randn(4, 3, 6, 4, generator=generator)
    fill = (0, 0, 0, 5) if tall else (0, 5)
    ends = []
    for filled in (False, True):
        weight = nn.Parameter(nn.functional.pad(start, fill) if filled else start.clone())
        run = Muon([weight], [], 0.05, 4)
        for slope in slopes:
            weight.grad = nn.functional.pad(slope, fill) if filled else slope.clone()
            run.step()
        ends.append(weight.detach())
    assert torch.allclose(ends[1], nn.functional.pad(ends[0], fill), atol=1e-6)
    assert (ends[1] == 0).sum() == ends[1].numel() - start.numel()

"""Least squares: a planted change is found, one step by hand, and the change that is wanted through a layer's tail."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from conftest import DEVICE
from expertsmith.calibration.data import TokenData
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import load_model
from expertsmith.errors import UserError
from expertsmith.evaluation.quality import measure
from expertsmith.experts.inventory import take_inventory
from expertsmith.healing.experts import Routed
from expertsmith.healing.held import held_batches, held_out
from expertsmith.healing.least_squares import Problem, solve
from expertsmith.healing.tail import wanted_change


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


def test_held_out_tokens_are_judged_with_their_context(checkpoints):
    """Only the sequences that hold any are run; where these are the ends of sequences, the model reads what stands before."""
    data = TokenData({"a": [list(range(3, 35)), list(range(40, 64))]}, {})
    (batch,) = data.batches(64)
    (judged,) = held_batches([batch], held_out(data, [batch]), 64)
    assert judged.sequences == [0, 1]
    assert judged.tokens == 4 + 3
    assert [part.sequences for part in held_batches([batch], held_out(data, [batch]), 63)] == [[0], [1]]
    inventory = take_inventory(open_checkpoint(checkpoints("mixtral")))
    model = load_model(inventory.checkpoint, inventory.architecture, device=DEVICE)
    found = measure(model, [judged]).domains["a"]
    losses = []
    with torch.no_grad():
        for row, first in zip(data.sequences["a"], (28, 21), strict=True):
            logits = model.module(torch.tensor([row], device=DEVICE)).logits[0, first:-1]
            losses.append(nn.functional.cross_entropy(logits, torch.tensor(row[first + 1 :], device=DEVICE), reduction="sum"))
    assert found.tokens == 3 + 2
    assert found.loss_sum == pytest.approx(float(sum(losses)), rel=1e-5)
    many = TokenData({"a": [[4, 5, 6, 7]] * 16 + [[4, 5]] * 8, "b": [[4, 5, 6, 7]] * 8}, {})
    batches = many.batches(32)
    made = held_batches(batches, held_out(many, batches), 32)
    assert [(part.domain, part.sequences) for part in made] == [("a", [7, 15]), ("a", [23]), ("b", [7])]

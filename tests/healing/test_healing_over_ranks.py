"""Healing over several ranks is that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conftest import random_model
from expertsmith import api
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import Batch
from expertsmith.errors import UserError
from expertsmith.healing import least_squares, refine
from expertsmith.healing.experts import Routed
from expertsmith.healing.layerwise import check_alike
from expertsmith.healing.run import _refuse_idle_ranks
from expertsmith.ranks import _NOW, Ranks, current
from to_heal import RandomExperts, write_texts

pytestmark = pytest.mark.slow

METHODS = {"least_squares": {"sweeps": 2}, "layer_local": {"sweeps": 2, "steps": 20, "step_tokens": 64}}
SHAPE = {"seq_len": 24, "pack": False, "batch_tokens": 72, "device": "cpu"}


# ---- in one process: ranks are threads


@pytest.fixture
def over(monkeypatch) -> Callable[[int, Callable[[int], Any]], list[Any]]:
    """over(world, job) runs job(rank) on ranks that are threads, and returns what they return."""
    here = threading.local()

    def run(world: int, job: Callable[[int], Any]) -> list[Any]:
        barrier, given, made = threading.Barrier(world), [None] * world, [None] * world
        failed: list[BaseException] = []

        def gather(value: Any) -> list[Any]:
            given[here.rank] = value
            barrier.wait(20)
            found = list(given)
            barrier.wait(20)
            return found

        def all_gather_object(found: list[Any], value: Any, group: Any) -> None:
            found[:] = gather(value)

        def all_reduce(tensor: torch.Tensor, async_op: bool) -> Any:
            tensor.copy_(torch.stack(gather(tensor.clone())).sum(0))
            return SimpleNamespace(wait=lambda: None)

        def work(rank: int) -> None:
            here.rank = rank
            _NOW.set(Ranks(rank, world))  # of this thread
            try:
                made[rank] = job(rank)
            except BaseException as error:  # raised by the test's thread
                failed.append(error)

        with monkeypatch.context() as patch:
            patch.setattr(dist, "all_gather_object", all_gather_object)
            patch.setattr(dist, "all_reduce", all_reduce)
            threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if failed:
            raise failed[0]
        return made

    return run


def test_sums_of_ranks(over):
    def job(rank: int) -> Any:
        tensors = [torch.tensor([1, 2]) * (rank + 1), torch.ones(2, 2)]
        current().add_up(tensors)
        return [tensor.tolist() for tensor in tensors], current().total(0.5, rank)

    assert over(3, job) == [([[6, 12], [[3.0, 3.0], [3.0, 3.0]]], [1.5, 3.0])] * 3
    assert job(0) == ([[1, 2], [[1.0, 1.0], [1.0, 1.0]]], [0.5, 0.0])  # one process


def test_one_bit_of_a_weight_or_a_decision_that_differs_is_found(over):
    tensor, row = torch.ones(3, 2, dtype=torch.bfloat16), {"ridges": [0.1]}
    other = tensor.clone()
    other.view(torch.int16)[2, 1] += 1
    over(2, lambda rank: check_alike(3, {"a": tensor.clone()}, dict(row)))
    for given in (({"a": other}, row), ({"b": tensor}, row), ({"a": tensor}, {"ridges": [0.2]})):
        with pytest.raises(RuntimeError, match="decoder layer 3: the healed weights differ between the ranks"):
            over(2, lambda rank, given=given: check_alike(3, *(given if rank else ({"a": tensor}, row))))


@pytest.mark.parametrize("at_once", [2**28, 0])
def test_least_squares_of_ranks_is_that_of_all_tokens(at_once, over, monkeypatch):
    """Expert 0 has no token on the last rank, and the first rank no held-out one."""
    monkeypatch.setattr(least_squares, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    x, wanted, strength = (torch.randn(300, width, generator=generator) for width in (4, 3, 1))
    weight, expert = torch.rand(300, 2, generator=generator), torch.rand(300, 3, generator=generator).topk(2).indices
    expert[200:] = torch.where(expert[200:] == 0, -1, expert[200:])
    held = (torch.arange(300) % 5 == 0) & (torch.arange(300) >= 100)
    for number, change in enumerate(torch.randn(3, 5, 3, generator=generator)):  # wanted, besides the noise
        rows, slots = (expert == number).nonzero(as_tuple=True)
        wanted[rows] += RandomExperts(3).features(Routed(x, expert, weight), number, rows, slots) @ change

    def solve(part: slice) -> least_squares.Solution:
        routed = Routed(x[part], expert[part], weight[part])
        problem = least_squares.Problem(routed, wanted[part], held[part], strength[part, 0].abs() + 0.1)
        return least_squares.solve(RandomExperts(3), problem, 3)

    whole = solve(slice(None))
    assert len(whole.down) == 3
    for found in over(3, lambda rank: solve(slice(100 * rank, 100 * (rank + 1)))):
        assert found.ridges == whole.ridges
        assert found.errors == pytest.approx(whole.errors, rel=1e-6)
        assert found.down.keys() == whole.down.keys()
        for number, matrix in whole.down.items():
            assert torch.allclose(found.down[number], matrix, rtol=1e-6, atol=1e-6)


BATCHES = [torch.arange(at, at + 10).reshape(2, 5) for at in range(0, 50, 10)]
MASKS = [torch.tensor([[True] * 4 + [False]] * 2)] * 5  # 8 tokens of 10 count


def drawn(by_token: bool) -> list[tuple[list[int], int]]:
    """(tokens by their number in the whole data, number of tokens of all ranks) of this rank in some steps, then all its tokens."""
    own = current().share(BATCHES)
    local = list(torch.split(torch.arange(10 * len(own)), 10))
    replay: Any = SimpleNamespace(batches=[part.reshape(2, 5) for part in local], by_token=by_token)
    tokens = refine.Tokens(current().share(MASKS), replay, 12)
    steps, every = tokens.draw(torch.Generator().manual_seed(3)), torch.cat([part.reshape(-1) for part in own])
    found = [next(steps) for _ in range(7)] + [tokens.all()]
    return [(sorted(int(every[row]) for part, _ in parts for row in part.reshape(-1)), count) for parts, count in found]


@pytest.mark.parametrize("by_token", [True, False])
def test_ranks_draw_the_steps_of_one_process(by_token, over):
    whole = drawn(by_token)
    assert [count for _, count in whole] == ([12] * 7 if by_token else [16] * 7) + [40]
    for steps in zip(*over(2, lambda rank: drawn(by_token)), strict=True):
        tokens, count = whole.pop(0)
        assert sorted(steps[0][0] + steps[1][0]) == tokens
        assert steps[0][1] == steps[1][1] == count
    assert not whole


def test_more_ranks_than_batches_are_refused(over):
    ids = torch.zeros(1, 4, dtype=torch.long)
    batches = [Batch(ids, ids == 0, "a", [0])] * 2
    over(2, lambda rank: _refuse_idle_ranks(batches, 8192))
    with pytest.raises(UserError, match=r"2 batches of up to 8192 tokens, but there are 3 ranks; run fewer ranks"):
        over(3, lambda rank: _refuse_idle_ranks(batches, 8192))


# ---- several processes

SCRIPT = """
import json, sys
from pathlib import Path

from expertsmith import api
from expertsmith.ranks import connected
from expertsmith.errors import UserError
from expertsmith.healing import layerwise
from expertsmith.views.progress import Silent

job, seen = json.loads(sys.argv[1]), {"tokens": 0, "calls": 0}
folder, solve = Path(job["folder"]), layerwise.solve

def watched(experts, problem, *more):
    seen["tokens"] += len(problem.wanted)
    seen["calls"] += 1
    solution = solve(experts, problem, *more)
    if seen.get("spoil") == seen["tokens"] and rank == 1:
        solution.down = {expert: down * 1.01 for expert, down in solution.down.items()}
    return solution

def heal(name, method, **more):
    return api.heal(folder / f"{name}-half", folder / name, job["texts"], out, method=method, progress=Silent(), **job["shape"], **more)

layerwise.solve = watched
with connected("cpu") as (rank, where):
    for name, method, options in job["healings"]:
        out = folder / "two" / method
        seen[method] = heal(name, method, options=options)
    seen["of a layer"] = seen["tokens"] // seen["calls"]
    out = folder / "two" / "spoilt"
    seen["spoil"] = seen["tokens"] + 2 * seen["of a layer"]  # at the second layer
    for method in ("least_squares", "router"):
        try:
            heal("bf16", method)
        except (RuntimeError, UserError) as error:
            seen[f"error of {method}"] = str(error)
    (folder / f"seen.{rank}.json").write_text(json.dumps(seen))
"""

FAILING = """
import os
from expertsmith.cli import main
from expertsmith.healing import layerwise

solve, calls = layerwise.solve, []

def failing(*given):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise RuntimeError("this rank fails")
    return solve(*given)

layerwise.solve = failing
main()
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Mixtral in two dtypes, each with a half of 4 of 8 experts, and the healings by one process."""
    here: Path = tmp_path_factory.mktemp("ranks")
    write_texts(here, "a", "b")
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        random_model("mixtral").to(dtype).save_pretrained(here / name)
        api.apply(here / name, api.plan(here / name, "random", 4), here / f"{name}-half")
    for name, method in HEALINGS:
        out = here / "one" / method
        api.heal(here / f"{name}-half", here / name, texts(here), out, method=method, options=METHODS[method], **SHAPE)
    return here


HEALINGS = (("bf16", "least_squares"), ("float32", "layer_local"))


def texts(folder: Path) -> list[str]:
    return [f"{domain}={folder / f'{domain}.jsonl'}" for domain in "ab"]


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "expertsmith/heal.json").read_text())
    return report


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run."""
    kept = {key: value for key, value in report.items() if key not in ("seconds", "out")}
    return {**kept, "layers": [{key: value for key, value in row.items() if key != "seconds"} for row in report["layers"]]}


def weights_of(place: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(place)
    return {name: opened.read(name) for name in opened.tensors}


@pytest.fixture(scope="module")
def seen(folder) -> list[dict[str, Any]]:
    """What each of two ranks tells of the same healings."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    healings = [(name, method, METHODS[method]) for name, method in HEALINGS]
    done = torchrun(script, json.dumps({"folder": str(folder), "texts": texts(folder), "shape": SHAPE, "healings": healings}))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(2)]


def test_each_rank_has_a_share_of_the_tokens_and_the_whole_report(folder, seen):
    shares = [entry["of a layer"] for entry in seen]
    assert min(shares) > 0.3 * sum(shares)
    assert sum(shares) == sum(report_of(folder / "one/least_squares")["data"]["tokens"].values())
    for _, method in HEALINGS:
        assert timeless(seen[0][method]) == timeless(seen[1][method])
        assert report_of(folder / "two" / method)["layers"] == seen[0][method]["layers"]  # the first rank wrote
        assert not (folder / "two" / f"{method}.work").exists()


def test_least_squares_of_two_ranks_is_that_of_one_process(folder, seen):
    """The same decisions; weights may be rounded to the next bfloat16 value where sums in another order are between two."""
    one, two = (report_of(folder / name / "least_squares") for name in ("one", "two"))
    assert one["accepted"]
    assert len(one["layers"]) == 3
    assert all(row["changed"] == 4 for row in one["layers"])
    for mine, theirs in zip(one["layers"], two["layers"], strict=True):
        assert [mine[key] for key in ("layer", "changed", "ridges", "held_out_tokens")] == [
            theirs[key] for key in ("layer", "changed", "ridges", "held_out_tokens")
        ]
        assert theirs["sweeps"] == pytest.approx(mine["sweeps"], rel=1e-3)
    same_quality(one, two, 1e-3)
    half, first, second = (weights_of(folder / name) for name in ("bf16-half", "one/least_squares", "two/least_squares"))
    changed = [name for name in half if not torch.equal(half[name], first[name])]
    assert changed == [name for name in half if not torch.equal(half[name], second[name])]
    mine, theirs = (torch.cat([held[name].reshape(-1).double() for name in changed]) for held in (first, second))
    assert len(mine) == 3 * 4 * 32 * 24
    assert (mine != theirs).sum() <= 0.01 * len(mine)
    assert ((mine - theirs).abs() <= 2**-7 * mine.abs()).all()


def test_layer_local_of_two_ranks_is_as_good_as_that_of_one_process(folder, seen):
    one, two = (report_of(folder / name / "layer_local") for name in ("one", "two"))
    assert one["accepted"]
    assert two["accepted"]
    for mine, theirs in zip(one["layers"], two["layers"], strict=True):
        assert theirs["refined"]["learning_rate"] == mine["refined"]["learning_rate"]
        assert theirs["error_after"] == pytest.approx(mine["error_after"], rel=1e-3)
        assert theirs["error_after"] < theirs["error_before"]
    assert any(row["refined"]["error_after"] < row["refined"]["error_before"] for row in two["layers"])
    same_quality(one, two, 1e-3)
    assert two["held_out"]["after"]["mean"]["kl"] < two["held_out"]["before"]["mean"]["kl"]


def same_quality(one: dict[str, Any], two: dict[str, Any], within: float) -> None:
    """The held-out tokens are the same, what is measured before healing too, and after it within a relative tolerance."""
    assert one["data"] == two["data"]
    for when, tolerance in (("before", 1e-9), ("after", within)):
        mine, theirs = (report["held_out"][when]["domains"] for report in (one, two))
        assert mine.keys() == theirs.keys() == {"a", "b"}
        for domain, row in mine.items():
            assert theirs[domain]["tokens"] == row["tokens"]
            assert theirs[domain].pop("rise_se") is row.pop("rise_se") is None  # one sequence a domain is held out
            assert theirs[domain] == pytest.approx(row, rel=tolerance), (when, domain)


def test_ranks_with_other_weights_stop_loudly(folder, seen):
    for entry in seen:
        assert "decoder layer 1: the healed weights differ between the ranks" in entry["error of least_squares"]
        assert "heal --method router runs as one process, but torchrun started 2" in entry["error of router"]
    assert not (folder / "two/spoilt").exists()
    kept = [path.name for path in (folder / "two/spoilt.work/healing").glob("layer_*")]
    assert kept == ["layer_0000.safetensors"]


def test_a_rank_that_fails_ends_all_and_the_command_resumes(folder, tmp_path):
    line: list[object] = ["heal", folder / "bf16-half", "-t", folder / "bf16", "-o", tmp_path / "out", "-O", "sweeps=2"]
    line += ["--seq-len", 24, "--no-pack", "--batch-tokens", 72, "--device", "cpu", "--json"]
    for spec in texts(folder):
        line += ["-d", spec]
    (tmp_path / "failing.py").write_text(FAILING)
    failed = torchrun(tmp_path / "failing.py", *line)
    assert failed.returncode != 0
    assert "this rank fails" in failed.stderr
    assert not failed.stdout
    assert not (tmp_path / "out").exists()
    kept = sorted(path.name for path in (tmp_path / "out.work/healing").glob("layer_*"))
    assert kept == ["layer_0000.safetensors", "layer_0001.safetensors"]
    done = torchrun("-m", "expertsmith", *line, "--eval-data", texts(folder)[0])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("resuming: 2 layers are healed already") == 1  # one rank tells
    assert json.loads(done.stdout)["quality"]["after"]["mean"]["loss"] > 0
    assert not (tmp_path / "out.work").exists()
    mine, theirs = weights_of(tmp_path / "out"), weights_of(folder / "one/least_squares")
    assert sum(int((mine[name] != theirs[name]).sum()) for name in mine) <= 0.01 * 3 * 4 * 32 * 24

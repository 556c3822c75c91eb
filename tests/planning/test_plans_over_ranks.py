"""Plans made by two ranks of torchrun: those of one process. All are made in one start of the two (this file, run as a script)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conftest import CALIBRATION, run_cli
from expertsmith import api
from expertsmith.calibration import searching
from expertsmith.calibration.data import TokenData
from expertsmith.calibration.searching import search_layers
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import load_model
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.methods.base import Choice
from expertsmith.methods.expert_sparsity import every_subset
from expertsmith.planning.plan import Plan, parse_plan
from expertsmith.ranks import connected, current

pytestmark = pytest.mark.slow

SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("mixtral", {}),
    "greedy": ("olmoe", {"search": "greedy"}),
    "beam": ("mixtral", {"search": "beam", "beam": 3}),
    "authors": ("mixtral", {"loss": "authors", "batch_size": 5}),
    "progressive": ("mixtral", {"progressive": True}),
    "progressive authors": ("qwen2_moe", {"progressive": True, "loss": "authors", "batch_size": 2, "search": "greedy"}),
    "groups": ("deepseek_v3", {"tokens": 30}),
    "sample": ("mixtral", {"tokens": 3}),  # some batches have none of these tokens
    "one token": ("mixtral", {"tokens": 1}),  # of one domain: a rank has none, and most sets tie
}
WEIGHTS = {"moeits": None, "aimer": 0.5, "random": 0.5}
FROM_STATISTICS = {"frequency": 0.5, "m_smoe": 0.5, "merge_moe": 0.5}


def made(sources: dict[str, str], data: list[str], statistics: str, folder: Path) -> dict[str, Plan]:
    """Every plan."""
    found = {}
    for name, (family, options) in SEARCHES.items():
        text = data[:1] if name == "one token" else data
        found[name] = api.plan(sources[family], "expert_sparsity", 4, data=text, options=options, **CALIBRATION)
    for name, keep in WEIGHTS.items():
        out = folder / f"{name}.json"
        found[name] = api.plan(sources["deepseek_v3"], name, keep, out=out, work=folder / f"{name} work", device="cpu")
    for name, keep in FROM_STATISTICS.items():
        found[name] = api.plan(sources["mixtral"], name, keep, stats=statistics, device="cpu")
    found["from data"] = api.plan(sources["mixtral"], "frequency", 0.5, data=data, out=folder / "data.json", **CALIBRATION)
    quick = {"population": 6, "elites": 2, "generations": 3}
    found["searched"] = api.plan(
        sources["mixtral"], "aimer", 0.5, budget="esap", options=quick, data=data, work=folder / "esap work", **CALIBRATION
    )
    again = folder / "again.json"
    found["resumed"] = api.plan(sources["deepseek_v3"], "moeits", 4, out=again, work=folder / "moeits work", device="cpu")
    return found


def asked(source: str) -> dict[str, Any]:
    """What is added over the ranks in each call of a probe, and what is said when they choose differently."""
    model = take_inventory(open_checkpoint(source))
    loaded = load_model(model.checkpoint, model.architecture, memory="resident")
    rows = torch.randint(3, 120, (4, 16), generator=torch.Generator().manual_seed(3)).tolist()
    told: dict[str, Any] = {}
    reduce, calls = dist.all_reduce, []

    def watched(value, *more, **options):
        calls.append(list(value.shape))
        return reduce(value, *more, **options)

    def look(oracle):
        subsets = np.array(list(every_subset(oracle.rules, 4)))
        for name, ask in (
            ("losses", lambda: oracle.losses(subsets)),
            ("removals", lambda: oracle.removals_of([(0, 1), (2, 3), (4, 6)])),
            ("loss", lambda: oracle.loss((1, 2))),
        ):
            calls.clear()
            ask()
            told[name] = list(calls)
        return Choice([0, 1, 2, 3 + dist.get_rank() * (oracle.layer == 1)])

    dist.all_reduce = watched
    try:
        data = TokenData({"a": rows}, {"a": False})
        list(search_layers(loaded, data, look, rules=dict.fromkeys(range(3), model.rules), batch_tokens=32))
    except RuntimeError as error:
        told["apart"] = str(error)
    finally:
        dist.all_reduce = reduce
    return told


def script(given: dict[str, Any]) -> dict[str, Any]:
    """What a rank makes: the text of each plan, and what it is told."""
    torch.set_num_threads(1)
    with connected("cpu") as (rank, device):
        plans = made(given["sources"], given["data"], given["statistics"], Path(given["folder"]))
        told = asked(given["sources"]["mixtral"])
        with pytest.raises(UserError) as few:
            api.plan(given["sources"]["mixtral"], "expert_sparsity", 4, data=given["one"], **CALIBRATION)
        told["few"] = str(few.value)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(searching, "free_memory", lambda device: 2 * 10**4 if rank == 1 else 10**12)
            with pytest.raises(UserError) as full:
                api.plan(given["sources"]["mixtral"], "expert_sparsity", 4, data=given["data"], **CALIBRATION)
        told["full"] = str(full.value)
        with pytest.raises(UserError) as foreign:  # found by the first rank only
            api.plan(given["sources"]["mixtral"], "moeits", work=Path(given["folder"]).parent, device="cpu")
        told["foreign"] = str(foreign.value)
        with pytest.raises(UserError) as one:
            list(current().over(range(5), broken))
        told["one"] = str(one.value)
    return {"plans": {name: plan.dumps() for name, plan in plans.items()}, "told": {**told, "on": device}}


def broken(item: int) -> int:
    """The fourth is the second rank's."""
    if item == 3:
        raise UserError("item 3 is wrong", "take another")
    return item


def torchrun(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    port = 31500 + os.getpid() % 2000
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), *arguments]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=240
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run


@pytest.fixture(scope="module")
def two(checkpoints, data, tmp_path_factory):
    """(plans of one process, what each of the two ranks made, the ranks' folder)."""
    folder = tmp_path_factory.mktemp("ranks")
    sources = {family: str(checkpoints(family)) for family in ("mixtral", "olmoe", "qwen2_moe", "deepseek_v3")}
    statistics = str(folder / "statistics")
    api.calibrate(sources["mixtral"], data, statistics, **CALIBRATION)
    (folder / "one.jsonl").write_text(json.dumps({"input_ids": [5, 6, 7, 8]}) + "\n")
    for name in ("alone", "together"):
        (folder / name).mkdir()
    given = {"sources": sources, "data": data, "statistics": statistics, "folder": str(folder / "together")}
    given["one"] = [str(folder / "one.jsonl")]
    (folder / "given.json").write_text(json.dumps(given))
    torchrun(__file__, str(folder), PYTHONPATH=os.pathsep.join([*sys.path]))
    both = [json.loads((folder / f"rank {rank}.json").read_text()) for rank in (0, 1)]
    return made(sources, data, statistics, folder / "alone"), both, folder


def test_ranks_agree(two):
    _, (first, second), _ = two
    assert first == second


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_find_what_one_process_finds(name, two):
    alone, (first, _), _ = two
    one, both = alone[name], parse_plan(json.loads(first["plans"][name]), name)
    assert both.kept == one.kept
    for mine, theirs in zip(both.layers, one.layers, strict=True):
        assert mine.why["search"] == theirs.why["search"]
        for key in ("tokens", "selections", "unreached", "evaluated"):
            assert mine.why[key] == theirs.why[key], key
        assert mine.why["loss"] == pytest.approx(theirs.why["loss"], rel=1e-9)
        losses = [{tuple(entry["drop"]): entry["loss"] for entry in why["subset_losses"]} for why in (mine.why, theirs.why)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("name", [*WEIGHTS, *FROM_STATISTICS, "from data", "resumed", "searched"])
def test_other_plans_have_the_same_bytes(name, two):
    alone, (first, _), folder = two
    assert first["plans"][name] == alone[name].dumps()
    if name in WEIGHTS:
        written = [(folder / part / f"{name}.json").read_bytes() for part in ("alone", "together")]
        assert written[0] == written[1]


def test_work_folders_are_kept_or_removed(two):
    _, _, folder = two
    names = [
        sorted(str(path.relative_to(folder / part)) for path in (folder / part).rglob("*")) for part in ("alone", "together")
    ]
    assert names[0] == names[1]
    assert "moeits work/layer_001.safetensors" in names[0]
    assert not any("json.work" in name for name in names[0])


def test_losses_are_added_once_a_call_and_not_once_a_set(two):
    _, (first, _), _ = two
    told = first["told"]
    assert told["losses"] == [[1, 70], [1, 9]]  # 70 subsets by their states, of which 9 are checked one by one
    assert told["removals"] == [[1, 3, 8]]
    assert told["loss"] == [[1, 1]]


def test_what_ranks_cannot_do_is_said(two):
    _, (first, _), _ = two
    told = first["told"]
    assert told["on"] == "cpu"
    assert told["few"].startswith("the text makes 1 batches, which cannot be split over 2 processes")
    assert told["full"].startswith("the inner products of 8 experts' outputs on ")
    assert told["foreign"].endswith("contains files that are not measured weights; choose another output name")
    assert told["one"] == "item 3 is wrong; take another"
    assert told["apart"] == "decoder layer 1: the ranks chose different experts"


def test_the_command_line_prints_and_writes_once(checkpoints, tmp_path, capsys):
    plain = ["plan", checkpoints("mixtral"), "-m", "moeits", "--json", "--device", "cpu", "-o"]
    code, out, _ = run_cli(capsys, *plain, tmp_path / "one.json")
    assert code == 0
    run = torchrun("-m", "expertsmith", *map(str, plain), str(tmp_path / "two.json"))
    assert json.loads(run.stdout) == json.loads(out)
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]
    assert run.stderr.count("measure") <= 1


if __name__ == "__main__":
    where = Path(sys.argv[1])
    result = script(json.loads((where / "given.json").read_text()))
    (where / f"rank {os.environ['RANK']}.json").write_text(json.dumps(result))

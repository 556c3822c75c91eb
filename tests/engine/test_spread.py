"""A resident model over several GPUs: the map by hand, and with pretended devices the same numbers as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pretended
from conftest import CALIBRATION, DEVICE, RUN, kinds_first, run_cli
from expertsmith import api
from expertsmith.arch import families
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import Batch, Walk, load_model
from expertsmith.engine.devices import choose_memory, one_device
from expertsmith.engine.spread import ROOM, moved, owners, stored_sizes
from expertsmith.errors import UserError

IDS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(0))
two_devices = pytest.mark.skipif(DEVICE != pretended.NAME, reason=f"EXPERTSMITH_DEVICE is not {pretended.NAME}")


@pytest.mark.parametrize(
    ("sizes", "free", "expected"),
    [
        ([4, 4, 4, 4], [12, 12], [0, 0, 1, 1]),
        ([4, 4, 4, 4], [11, 11], None),  # 8 of 11 are more than 70 %
        ([2, 4, 4, 4, 4], [30, 10], [0, 0, 0, 0, 1]),  # the first has three quarters: 13.5 of 18; middles 1, 4, 8, 12, 16
        ([1, 8, 1], [10, 20], [0, 1, 1]),  # the middle of 8 is at 5 of 10, the first ends at 3.3
        ([1, 8, 1], [20, 10], [0, 0, 1]),
        ([3, 3], [100, 1, 100], [0, 2]),  # middles 1.5 and 4.5 of 6; the second device is from 2.985 to 3.015
        ([5], [2, 8], [1]),
        ([], [1, 1], []),
    ],
)
def test_which_device_holds_which_part(sizes, free, expected):
    assert owners(sizes, free) == expected


@given(st.lists(st.integers(0, 50), max_size=20), st.lists(st.integers(1, 200), min_size=1, max_size=5))
def test_neighbours_stay_together_and_devices_fill_evenly(sizes, free):
    found = owners(sizes, free)
    if found is None:  # only if the fullest device could be too full: its share, and a part that juts out at each end
        assert any(sum(sizes) * room / sum(free) + max(sizes) > ROOM * room for room in free)
        return
    assert found == sorted(found)
    for device, room in enumerate(free):
        held = sum(size for owner, size in zip(found, sizes, strict=True) if owner == device)
        assert held <= ROOM * room
        assert abs(held - sum(sizes) * room / sum(free)) <= max(sizes, default=0)


def test_the_parts_of_a_checkpoint_are_those_of_the_model(checkpoints):
    """From the headers alone, before the model is built: bytes outside the decoder layers, and of each."""
    opened = open_checkpoint(checkpoints("qwen2_moe"))
    model = load_model(opened, families()["qwen2_moe"])
    inside = [sum(p.numel() * 4 for p in layer.parameters()) for layer in model.layers]
    outside = sum(p.numel() * 4 for p in model.module.parameters()) - sum(inside)
    assert stored_sizes(opened, 4) == [outside, *inside]


def test_a_mapping_that_layers_write_to_stays_the_same_object():
    shared = {"a": torch.ones(1)}
    value = moved((shared, [torch.ones(2), None], "text", (torch.ones(1),)), torch.device("meta"))
    assert value[0] is shared
    assert [shared["a"].device.type, value[1][0].device.type, value[3][0].device.type] == ["meta"] * 3
    assert (value[1][1], value[2]) == (None, "text")


# ---- two devices


@pytest.fixture
def narrow(monkeypatch):
    """Gives the devices so much free memory that a model of `nbytes` needs both."""

    def set_free(nbytes: int) -> None:
        monkeypatch.setattr(pretended.Devices, "free", [nbytes, int(1.5 * nbytes)])

    return set_free


def size_of(path: Path) -> int:
    return sum(stored_sizes(open_checkpoint(path), 4))


@two_devices
@pytest.mark.parametrize("model_type", kinds_first(RUN))
def test_a_spread_model_gives_the_same_logits(model_type, checkpoints, narrow):
    """Through the walk, and through the model's own forward; the layers lie on both devices."""
    opened, record = open_checkpoint(checkpoints(model_type)), families()[model_type]
    batches = [Batch(IDS, torch.ones_like(IDS, dtype=torch.bool), "a", [0, 1])]
    found = []
    for spread in (False, True):
        narrow(size_of(checkpoints(model_type)) if spread else 2**34)
        model = load_model(opened, record, device=pretended.NAME)
        assert (len(set(model.places)) > 1) == spread
        with Walk(model, batches) as walk:
            list(walk.layers())
            found.append(next(walk.outputs()).logits)
        with torch.no_grad():
            found.append(model.module(**batches[0].inputs(model.device), use_cache=False).logits)
        for name, parameter in model.module.named_parameters():
            assert parameter.device == model.device_of(name), name
    assert {value.device for value in found} == {torch.device(pretended.NAME, 0)}
    assert all(torch.equal(found[0], other) for other in found[1:])


@two_devices
def test_a_device_that_is_too_small_for_a_layer_is_refused(checkpoints, monkeypatch):
    monkeypatch.setattr(pretended.Devices, "free", [10_000, 20_000])
    opened = open_checkpoint(checkpoints("mixtral"))
    with pytest.raises(
        UserError, match=r"GB of weights, for which 0 \+ 0 GB of free GPU memory have no room; use --memory stream"
    ):
        load_model(opened, families()["mixtral"], device=pretended.NAME)
    with pytest.raises(
        UserError, match=r"heal lora runs on one GPU, and the weights take 0.0 GB, but pretended:0 has 0.0 GB free"
    ):
        one_device(torch.device(pretended.NAME), [opened], "float32", "heal lora", "use --device cpu")


@two_devices
def test_auto_spreads_before_it_streams(checkpoints, monkeypatch):
    opened = open_checkpoint(checkpoints("mixtral"))
    size, several, one = size_of(checkpoints("mixtral")), torch.device(pretended.NAME), torch.device(pretended.NAME, 0)

    def mode(free: list[float], device: torch.device, models: int = 1) -> str:
        monkeypatch.setattr(pretended.Devices, "free", [int(size * share) for share in free])
        return choose_memory("auto", [opened] * models, device, "float32")

    assert mode([1.5, 0.1], several) == "resident"  # on the first alone
    assert mode([1.2, 1.2], several) == "resident"
    assert mode([1.2, 1.2], one) == "stream"
    assert mode([0.5, 0.5], several) == "stream"
    assert mode([2.4, 2.4], several, models=2) == "resident"
    assert mode([1.2, 1.2], several, models=2) == "stream"


@two_devices
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "llama4_text", "gpt_oss"])
def test_every_command_finds_the_same(model_type, checkpoints, data, tmp_path, narrow, capsys):
    """calibrate, plan with a search, verify, evaluate and analyze: on one device, and over two."""
    source, texts = checkpoints(model_type), [word for spec in data for word in ("-d", spec)]
    shape = {**CALIBRATION, "device": pretended.NAME, "memory": "resident"}
    told = []
    for spread in (False, True):
        narrow(size_of(source) if spread else 2**34)
        out = tmp_path / str(spread)
        api.calibrate(source, data, out / "stats", sample_tokens=8, all_outputs=True, output_moments=True, **shape)
        plan = api.plan(source, "expert_sparsity", 0.5, data=data, seq_len=24, pack=False, device=pretended.NAME)
        api.apply(source, plan, out / "half")
        verdict = api.verify(source, out / "half", device=pretended.NAME, memory="resident", tokens=300)
        assert verdict.passed
        run = ["--seq-len", 23, "--device", pretended.NAME, "--memory", "resident", "--json"]
        code, measured, err = run_cli(capsys, "evaluate", out / "half", "-r", source, *texts, *run)
        assert code == 0, err
        api.analyze(source, out / "page", data=data, all_experts=8, seq_len=24, device=pretended.NAME)
        files = {path.name: path.read_bytes() for path in (out / "stats").glob("layer_*")}
        told.append((files, [entry.keep for entry in plan.layers], json.loads(measured)["domains"], verdict.largest))
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="starts the tests with pretended devices")
def test_what_runs_a_model_holds_on_devices_that_are_not_the_cpu():
    """These tests again in a process of its own, because the devices stay for the rest of a process. None of them goes backwards: torch's engine
    for gradients aborts on a device that has no streams."""
    tests = Path(__file__).parent.parent
    chosen = ["engine/test_spread.py", "engine/test_read_ahead.py", "calibration/test_resume.py", "planning/test_planning.py"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not slow",
            "-k",
            "not recipe",  # whose device is a real one
            "-p",
            "no:cacheprovider",
            *(str(tests / name) for name in chosen),
        ],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "EXPERTSMITH_DEVICE": pretended.NAME,
            "EXPERTSMITH_FAMILIES": "mixtral qwen2_moe deepseek_v3 gpt_oss llama4_text",
            "OMP_NUM_THREADS": "1",
        },
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]

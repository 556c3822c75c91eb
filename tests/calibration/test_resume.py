"""Calibration that is killed, resumed, or spread over ranks ends with the same bytes."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import CALIBRATION, DEVICE
from expertsmith import api
from expertsmith.calibration import stats
from expertsmith.errors import UserError


def same(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    return all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_resumed_calibration_has_the_same_bytes(memory, checkpoints, data, tmp_path, monkeypatch):
    source = checkpoints("deepseek_v2")
    api.calibrate(source, data, tmp_path / "whole", memory=memory, **CALIBRATION)
    saved = stats.save_layer

    def killed(folder, layer, domains):
        saved(folder, layer, domains)
        raise KeyboardInterrupt

    monkeypatch.setattr(stats, "save_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        api.calibrate(source, data, tmp_path / "parts", memory=memory, **CALIBRATION)
    with pytest.raises(UserError, match="not finished"):
        stats.load_statistics(tmp_path / "parts")
    observed = []

    def watched(folder, layer, domains):
        observed.append(layer)
        saved(folder, layer, domains)

    monkeypatch.setattr(stats, "save_layer", watched)
    api.calibrate(source, data, tmp_path / "parts", memory=memory, **CALIBRATION)
    assert observed == [2]  # layer 1 was there, layer 0 is dense
    assert same(tmp_path / "whole", tmp_path / "parts")
    api.calibrate(source, data, tmp_path / "parts", memory=memory, **CALIBRATION)
    assert observed == [2]


@pytest.mark.slow
def test_a_killed_process_resumes(checkpoints, data, tmp_path):
    """SIGKILL while it runs, at whatever point: no half layer is left, and the same command completes the folder."""
    source = checkpoints("mixtral")
    api.calibrate(source, data, tmp_path / "whole", **CALIBRATION)
    slow = (
        "import sys, time; from expertsmith.calibration import stats; save = stats.save_layer\n"
        "def late(*a):\n    save(*a); print('saved', flush=True); time.sleep(60)\n"
        "stats.save_layer = late; from expertsmith.cli import main; main()"
    )
    command = [
        "calibrate",
        str(source),
        "-o",
        str(tmp_path / "s"),
        "--seq-len",
        "24",
        "--no-pack",
        "--batch-tokens",
        "72",
        "--device",
        "cpu",
        "-q",
    ]
    for spec in data:
        command += ["-d", spec]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: other splits of a sum round differently
    process = subprocess.Popen([sys.executable, "-c", slow, *command], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "saved"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert stats.layer_path(tmp_path / "s", 0).exists()
    assert not stats.layer_path(tmp_path / "s", 1).exists()
    subprocess.run([sys.executable, "-m", "expertsmith", *command], check=True, capture_output=True, env=environment)
    assert same(tmp_path / "whole", tmp_path / "s")


def test_another_calibration_in_the_folder_is_refused(checkpoints, data, tmp_path):
    folder = tmp_path / "s"
    api.calibrate(checkpoints("mixtral"), data, folder, **CALIBRATION)
    for change in (
        {"data": data[:1]},
        {"model": checkpoints("olmoe")},
        {"dtype": "bfloat16"},
        {"batch_tokens": 24},
        {"output_sum": True},
    ):
        options = {"model": checkpoints("mixtral"), "data": data, **CALIBRATION, **change}
        with pytest.raises(UserError, match="another calibration"):
            api.calibrate(options.pop("model"), options.pop("data"), folder, **options)
    api.calibrate(checkpoints("mixtral"), data[:1], folder, resume=False, **CALIBRATION)
    assert stats.load_statistics(folder).domains == ["a"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(UserError, match="contains files that are not"):
        api.calibrate(checkpoints("mixtral"), data, tmp_path / "full", resume=False, **CALIBRATION)


def test_a_damaged_layer_is_named(checkpoints, data, tmp_path):
    folder = tmp_path / "s"
    api.calibrate(checkpoints("mixtral"), data, folder, **CALIBRATION)
    stats.layer_path(folder, 1).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"layer_001\.safetensors is damaged"):
        stats.load_statistics(folder)
    (folder / "stats.json").write_text("{}")
    with pytest.raises(UserError, match="is not expertsmith"):
        stats.load_statistics(folder)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_give_the_same_statistics_and_plan(ranks, checkpoints, data, tmp_path):
    source = checkpoints("qwen2_moe")
    one = api.calibrate(source, data, tmp_path / "one", sample_tokens=9, output_sum=True, **CALIBRATION)
    port = 29500 + os.getpid() % 2000 + ranks
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        str(port),
        "-m",
        "expertsmith",
        "calibrate",
        str(source),
    ]
    command += ["-o", str(tmp_path / "many"), "--seq-len", "24", "--no-pack", "--batch-tokens", "72", "--device", DEVICE, "-q"]
    command += ["--sample-tokens", "9", "--output-sum"]
    for spec in data:
        command += ["-d", spec]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    many = stats.load_statistics(tmp_path / "many")
    assert many.header == one.header
    for layer, entry in one.layers.items():
        for domain in "ab":
            for name, value in entry.domains[domain].items():
                assert many.layers[layer].domains[domain][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    for method in ("reap", "easy_ep", "frequency"):
        assert api.plan(source, method, 0.5, stats=one).kept == api.plan(source, method, 0.5, stats=many).kept


def test_same_seed_same_bytes_everywhere(checkpoints, data, tmp_path):
    """Statistics, plan and checkpoint of two independent runs."""
    source = checkpoints("glm4_moe")
    for name in ("x", "y"):
        api.calibrate(source, data, tmp_path / name / "stats", **CALIBRATION)
        api.plan(source, "easy_ep", 0.5, stats=tmp_path / name / "stats", out=tmp_path / name / "plan.json")
        api.apply(source, tmp_path / name / "plan.json", tmp_path / name / "out")
    assert same(tmp_path / "x" / "stats", tmp_path / "y" / "stats")
    assert (tmp_path / "x" / "plan.json").read_bytes() == (tmp_path / "y" / "plan.json").read_bytes()
    assert (tmp_path / "x" / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "y" / "out" / "model.safetensors"
    ).read_bytes()


def test_progress_is_reported(checkpoints, data, tmp_path):
    """The bar reaches its end: what is advanced adds up to what was announced."""
    from contextlib import contextmanager

    totals: dict[str, list[float]] = {}

    class Meter:
        @contextmanager
        def task(self, label, total, unit):
            seen = totals.setdefault(label, [total, 0.0])

            def advance(amount, earlier=False):
                seen[1] += amount

            yield advance

        def note(self, message):
            pass

    begin = time.monotonic()
    api.compress(
        checkpoints("mixtral"), "reap", 0.5, out=tmp_path / "out", data=data, progress=Meter(), **CALIBRATION, memory="stream"
    )
    assert time.monotonic() - begin < 60
    assert {"calibrate", "score", "apply", "compare bytes", "verify", "evaluate"} <= set(totals)
    for label, (total, done) in totals.items():
        assert done == pytest.approx(total), label
    assert json.loads((tmp_path / "out" / "expertsmith" / "verify.json").read_text())["passed"]


def test_models_with_shared_key_value_states_are_run_again(data, tmp_path, monkeypatch):
    """gemma4 can hand keys and values to later layers beside the layers' outputs: nothing is spilled then, and resuming is exact."""
    from conftest import save_tiny
    from expertsmith.calibration import spill

    kinds = ["sliding_attention", "full_attention"] * 2
    sharing = {"num_hidden_layers": 4, "layer_types": kinds, "num_kv_shared_layers": 2}
    source = save_tiny("gemma4_text", tmp_path / "m", **sharing, hidden_size_per_layer_input=8, vocab_size_per_layer_input=128)
    monkeypatch.setattr(spill, "EVERY_SECONDS", 0.0)
    api.calibrate(source, data, tmp_path / "whole", **CALIBRATION)
    saved = stats.save_layer

    def killed(folder, layer, domains):
        saved(folder, layer, domains)
        if layer == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(stats, "save_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        api.calibrate(source, data, tmp_path / "s", **CALIBRATION)
    assert spill.newest(tmp_path / "s") is None
    monkeypatch.setattr(stats, "save_layer", saved)
    api.calibrate(source, data, tmp_path / "s", **CALIBRATION)
    assert same(tmp_path / "whole", tmp_path / "s")


def test_a_full_disk_while_calibrating(checkpoints, data, tmp_path, monkeypatch):
    """States that cannot be spilled do not end a run; statistics that cannot be written do, in words, and resume later."""
    from safetensors import SafetensorError

    from expertsmith.calibration import spill

    def full(tensors, path):
        raise SafetensorError("No space left on device")

    source = checkpoints("mixtral")
    api.calibrate(source, data, tmp_path / "whole", **CALIBRATION)
    monkeypatch.setattr(spill, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(spill, "save_file", full)
    api.calibrate(source, data, tmp_path / "s", **CALIBRATION)
    assert same(tmp_path / "whole", tmp_path / "s")
    save = stats.save_file
    monkeypatch.setattr(stats, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        api.calibrate(source, data, tmp_path / "t", **CALIBRATION)
    monkeypatch.setattr(stats, "save_file", save)
    api.calibrate(source, data, tmp_path / "t", **CALIBRATION)
    assert same(tmp_path / "whole", tmp_path / "t")

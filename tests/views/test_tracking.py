"""Numbers of long runs reach an experiment tracker."""

from __future__ import annotations

from typing import ClassVar

import pytest

from conftest import run_cli
from expertsmith import api
from expertsmith.errors import UserError
from expertsmith.views.progress import Silent
from expertsmith.views.tracking import tracked


class Fake:
    """Stands for a tracker of accelerate's."""

    requires_logging_directory = False
    made: ClassVar[list[Fake]] = []

    def __init__(self, run_name):
        self.rows, self.config, self.finished, self.name = [], None, False, run_name
        Fake.made.append(self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Fake)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["trackio"])
    return Fake


def test_a_training_is_logged_step_by_step(fake, capsys, dense, texts, tmp_path):
    line = ["convert", dense("llama"), "-m", "tomoe", "--experts", 2, "--steps", 3, "--seq-len", 20, "-d", texts[0], "-q"]
    line += ["--max-growth", 9, "--no-measure", "--device", "cpu", "-o", tmp_path / "out", "--track", "trackio"]
    code, _, err = run_cli(capsys, *line)
    assert code == 0, err
    (one,) = fake.made
    assert one.name == "expertsmith"
    assert one.finished
    assert (one.config["verb"], one.config["method"], one.config["steps"]) == ("convert", "tomoe", 3)
    assert [step for step, _ in one.rows] == [1, 2, 3]
    assert all({"kl", "seconds"} <= set(values) for _, values in one.rows)
    assert "kl_written" in one.rows[-1][1]


def test_a_healing_is_logged_layer_by_layer(fake, checkpoints, texts, tmp_path):
    source = checkpoints("mixtral")
    api.apply(source, api.plan(source, "random", 4), tmp_path / "half")
    api.heal(tmp_path / "half", source, texts, tmp_path / "healed", track="trackio", seq_len=40, pack=False, device="cpu")
    (one,) = fake.made
    assert (one.config["verb"], one.config["method"], one.finished) == ("heal", "least_squares", True)
    assert [layer for layer, _ in one.rows] == [0, 1, 2]
    assert all(values["error_after"] <= values["error_before"] for _, values in one.rows)


def test_tensorboard_writes_to_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tracked(Silent(), "tensorboard", {"steps": 2, "data": ["a"]}) as progress:
        progress.log({"loss": 1.5}, 1)
    files = list((tmp_path / "runs" / "expertsmith").rglob("events.*"))
    assert files
    assert b"loss" in b"".join(file.read_bytes() for file in files)


def test_without_a_tracker_nothing_changes():
    silent = Silent()
    with tracked(silent, None, {}) as progress:
        assert progress is silent


def test_a_failed_run_ends_its_tracking(fake):
    with pytest.raises(KeyboardInterrupt), tracked(Silent(), "trackio", {}):
        raise KeyboardInterrupt
    assert fake.made[0].finished


def test_a_tracker_that_is_not_there_is_refused(fake):
    with (
        pytest.raises(UserError, match=r"the tracker wandb is not installed; pip install wandb"),
        tracked(Silent(), "wandb", {}),
    ):
        pass
    with pytest.raises(UserError, match=r"there is no tracker 'wandbb'; did you mean wandb"), tracked(Silent(), "wandbb", {}):
        pass

"""Terminals of other encodings than UTF-8: help, tables, progress, errors and JSON are shown as far as they can be."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from expertsmith import cli
from expertsmith.verbs.definition import VERBS

ENCODINGS = ("cp1252", "ascii", "cp437", "utf-8")
SMALL = ["--seq-len", "24", "--no-pack", "--device", "cpu"]


class Terminal(io.TextIOWrapper):
    """What a terminal (or a pipe) of an encoding is to Python."""

    def __init__(self, encoding: str, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def show(monkeypatch):
    """Exit code, stdout and stderr of a command line whose streams have an encoding."""

    def run(encoding: str, *arguments: object, terminal: bool = False) -> tuple[int, str, str]:
        out, err = Terminal(encoding, terminal), Terminal(encoding, terminal)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr(sys, "argv", ["expertsmith", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        found = code, out.text(), err.text()
        monkeypatch.undo()
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_help_of_every_verb(show, encoding):
    for verb in ([], *([name] for name in VERBS)):
        code, out, err = show(encoding, *verb, "--help")
        assert (code, err) == (0, "")
        assert "Usage: expertsmith" in out
    assert "-calibrate-> statistics" in show("ascii", "--help")[1]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_progress_and_errors(show, encoding, checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    flags = [flag for spec in data for flag in ("-d", spec)]
    for line in (
        ("calibrate", source, *flags, "-o", tmp_path / "stats", *SMALL),
        ("plan", source, "-m", "reap", "-k", "4", "-s", tmp_path / "stats", "-o", tmp_path / "plan.json"),
        ("apply", source, tmp_path / "plan.json", "-o", tmp_path / "out"),
        ("verify", source, tmp_path / "out", "--tokens", "64", "--device", "cpu"),
        ("evaluate", tmp_path / "out", "-r", source, *flags, "--seq-len", "16", "--device", "cpu"),
        ("inspect", source),
        ("lint", source),
        ("methods",),
        ("architectures",),
        ("recipes",),
    ):
        code, out, err = show(encoding, *line, terminal=True)
        assert code == 0, err
        assert out
        assert "Traceback" not in err
    code, _, err = show(encoding, "inspect", tmp_path / "模型 → x")
    assert code == 2
    assert "directory not found" in err
    assert ("模型 → x" if encoding == "utf-8" else "\\u6a21\\u578b -> x") in err
    assert show(encoding, "inspect", source, "--nonsense")[0] == 2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_stays_json(show, encoding):
    code, out, _ = show(encoding, "methods", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(show("utf-8", "methods", "--json")[1])


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="their names of files are always text")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_name_that_is_no_text(show, encoding, tmp_path):
    code, _, err = show(encoding, "inspect", os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert code == 2
    assert "\\udcff" in err


@pytest.mark.slow
def test_the_locale_c_in_a_process_of_its_own():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    done = subprocess.run([sys.executable, "-m", "expertsmith", "--help"], capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"-calibrate-> statistics" in done.stdout


def test_time_left_counts_only_what_this_run_did(monkeypatch):
    """60 of 100 came from an interrupted run; 10 more took 5 s, so the last 30 take 15 s. A slow start and a fast end average out."""
    from expertsmith.views import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    pace = progress.Pace(100.0, "tokens")
    assert pace.left == 0.0
    pace.advance(60.0, earlier=True)
    assert pace.left == 0.0
    now[0] = 5.0
    pace.advance(10.0, earlier=False)
    assert pace.left == pytest.approx(15.0)
    assert pace.rate == "2 tokens/s"
    now[0] = 6.0
    pace.advance(20.0, earlier=False)
    assert pace.left == pytest.approx(2.0)

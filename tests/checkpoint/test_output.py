"""Outputs are checked before any work: by the function itself, through verbs, and on a full disk."""

from __future__ import annotations

import errno
import os
import tempfile

import pytest

from expertsmith import api, cli
from expertsmith.checkpoint.output import check_output, refuse_other_model
from expertsmith.errors import UserError


@pytest.mark.parametrize("writes", ["file", "folder", "into"])
def test_places_that_take_nothing(writes, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is no folder"):
        check_output(tmp_path / "file" / "below" / "out", writes)
    with pytest.raises(UserError, match="takes no new files"):
        check_output(tmp_path / ("x" * 300), writes)
    if os.path.isdir("/proc/self"):
        with pytest.raises(UserError, match="takes no new files"):
            check_output("/proc" / tmp_path.relative_to("/") / "x", writes)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("writes", ["file", "folder", "into"])
def test_a_good_place_stays_as_it_was(writes, tmp_path):
    check_output(tmp_path / "new" / "deep" / "out", writes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writes", ["file", "folder", "into"])
def test_a_place_without_permission(writes, tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match=os.strerror(errno.EROFS)):
        check_output(tmp_path / "out", writes)


def test_what_exists(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        check_output(tmp_path / "file", "file")
    check_output(tmp_path / "file", "file", overwrite=True)
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path / "folder", "file", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file", "into")
    with pytest.raises(UserError, match="link to nothing"):
        check_output(tmp_path / "dangling", "folder")
    check_output(tmp_path / "folder", "into")


@pytest.mark.parametrize(
    "verb",
    [
        lambda model, data, out: api.calibrate(model, data, out),
        lambda model, data, out: api.plan(model, "random", 4, out=out),
        lambda model, data, out: api.compress(model, "reap", 4, out=out, data=data),
        lambda model, data, out: api.analyze(model, out),
        lambda model, data, out: api.dequantise(model, out),
        lambda model, data, out: api.heal(model, model, data, out),
    ],
    ids=["calibrate", "plan", "compress", "analyze", "dequantise", "heal"],
)
def test_verbs_look_before_they_work(verb, tmp_path):
    """The model is not even looked for."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is no folder"):
        verb(tmp_path / "no-such-model", [f"{tmp_path}/no-such-data.jsonl"], tmp_path / "file" / "out")


def test_an_existing_plan_is_replaced_when_asked(checkpoints, tmp_path):
    source, out = checkpoints("mixtral"), tmp_path / "plan.json"
    api.plan(source, "random", 4, out=out)
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        api.plan(source, "random", 5, out=out)
    assert out.read_bytes() == before
    assert set(map(len, api.plan(source, "random", 5, out=out, overwrite=True).kept.values())) == {5}
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "shard"), "the disk is full (shard)"),
        (RuntimeError("safetensors: No space left on device (os error 28)"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "there"), "there cannot be read or written"),
        (MemoryError(), "memory ran out"),
        (RuntimeError("a defect"), None),
        (KeyError("a defect"), None),
    ],
)
def test_what_the_machine_lacks_is_told_and_a_defect_is_not(error, words):
    told = cli._told(error)
    assert told is None if words is None else words in told


def test_results_of_another_model_are_not_replaced_unasked(tmp_path):
    result = tmp_path / "comparison.json"
    refuse_other_model(result, "comparison", "mine", overwrite=False)
    for damaged in ("{", "[]", '{"model": 3}', '{"model": {}}', "[" * 100_000):
        result.write_text(damaged)
        refuse_other_model(result, "comparison", "mine", overwrite=False)
    result.write_text('{"model": {"fingerprint": "theirs", "source": "owner/name"}}')
    with pytest.raises(UserError, match=r"has the comparison of another model, owner/name; .*--overwrite"):
        refuse_other_model(result, "comparison", "mine", overwrite=False)
    refuse_other_model(result, "comparison", "mine", overwrite=True)
    refuse_other_model(result, "comparison", "theirs", overwrite=False)

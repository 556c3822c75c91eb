"""Damage at random places: everything is refused in a sentence with nothing left behind, or does no harm. And runs that are killed anywhere
resume to the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import CALIBRATION, save_tiny
from expertsmith import api
from expertsmith.calibration.data import read_records
from expertsmith.calibration.stats import load_statistics
from expertsmith.errors import UserError, parse_json

WRONG = [
    None,
    "x",
    "3",
    0,
    -1,
    1,
    2,
    10**9,
    1.5,
    float("nan"),
    True,
    [],
    [1, 2],
    {},
    {"a": 1},
]  # in place of a value; also: no value
GONE = "(gone)"
SEEDED = {"derandomize": True, "deadline": None, "database": None}


def runs(examples: int) -> settings:
    return settings(max_examples=examples, suppress_health_check=list(HealthCheck), **SEEDED)


def places(held: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a JSON value, from the outside inwards."""
    for key, value in held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ():
        yield (*above, key)
        yield from places(value, (*above, key))


def damaged(held: Any, place: tuple[Any, ...], value: Any) -> Any:
    made = json.loads(json.dumps(held))
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return made


def bytes_damaged(raw: bytes, place: float, kind: str, byte: int) -> bytes:
    at = int(place * (len(raw) - 1))
    if kind == "cut":
        return raw[:at]
    return raw[:at] + bytes([byte]) + raw[at + (kind == "changed") :]


def refused_or_right(folder: Path, source: Path, plan: Any, also: Any = lambda: None) -> str:
    """Apply a plan: a UserError leaves nothing, and what is written passes `verify`. Anything else that is raised fails the test."""
    out = folder / "above" / "out"
    shutil.rmtree(out.parent, ignore_errors=True)
    try:
        also()
        made = plan()
        api.apply(source, made, out)
    except UserError as error:
        assert not out.parent.exists()
        assert 0 < len(str(error)) < 2000  # noqa: PT017
        return "refused"
    assert api.verify(source, out, plan=made, tokens=16, device="cpu").passed
    return "right"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("damage") / "source", num_hidden_layers=2)


@pytest.fixture(scope="module")
def copy(source, tmp_path_factory) -> Path:
    """One that is damaged, again and again."""
    target = tmp_path_factory.mktemp("copy") / "model"
    shutil.copytree(source, target)
    return target


# ---- config.json


def config_of(checkpoints: Any, model_type: str) -> dict[str, Any]:
    return json.loads((checkpoints(model_type) / "config.json").read_text())


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("num_hidden_layers",), 10**9),
        (("num_hidden_layers",), 4),
        (("num_hidden_layers",), GONE),
        (("num_key_value_heads",), 0),
        (("dtype",), [1, 2]),
        (("torch_dtype",), [1, 2]),
        (("dtype",), 1.5),
        (("rope_parameters",), {"rope_theta": [1, 2], "rope_type": "default"}),
        (("rope_parameters",), {"rope_theta": 0, "rope_type": "default"}),
        (("hidden_size",), "32"),
        (("hidden_size",), None),
        (("hidden_size",), [32]),
        (("hidden_size",), 10**9),
        (("head_dim",), 10**9),
        (("rms_norm_eps",), float("nan")),
        (("vocab_size",), 127),
        (("model_type",), 7),
        (("vision_config",), {"depth": 10**9}),
    ],
)
def test_a_config_that_cannot_be_is_refused(checkpoints, tmp_path, model_type, place, value):
    held = config_of(checkpoints, model_type)
    if value is GONE and model_type == "deepseek_v3":
        pytest.skip("its default is refused with the layers of the class")
    shutil.copytree(checkpoints(model_type), tmp_path / "model")
    if place == ("torch_dtype",):
        held.pop("dtype")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**held, place[0]: value} if value is not GONE else damaged(held, place, GONE)))  # fmt: skip
    assert refused_or_right(tmp_path, tmp_path / "model", lambda: api.plan(tmp_path / "model", "random", 4)) == "refused"


def calibrated(model: Path, text: str, out: Path) -> str:
    """Calibrate: a UserError leaves nothing, and anything else that is raised fails the test."""
    try:
        api.calibrate(model, text, out, **CALIBRATION)
    except UserError as error:
        assert not out.exists()
        assert 0 < len(str(error)) < 2000  # noqa: PT017
        return "refused"
    return "right"


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_a_damaged_config(checkpoints, text, tmp_path_factory, model_type):
    source, copy = checkpoints(model_type), tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(source, copy)
    held = json.loads((source / "config.json").read_text())

    @runs(50)
    @given(data=st.data())
    def damage(data: Any) -> None:
        place, value = data.draw(st.sampled_from(sorted(places(held), key=str))), data.draw(st.sampled_from([*WRONG, GONE]))
        (copy / "config.json").write_text(json.dumps(damaged(held, place, value)))
        found = refused_or_right(copy.parent, copy, lambda: api.plan(copy, "random", 4))
        shutil.rmtree(copy.parent / "stats", ignore_errors=True)
        assert calibrated(copy, text, copy.parent / "stats") == "right" or found == "refused"

    damage()


@pytest.mark.parametrize(
    ("model_type", "changes", "says"),
    [
        ("deepseek_v3", {"num_key_value_heads": 1}, "numbers of heads, key-value heads"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "numbers of heads, key-value heads"),
        ("deepseek_v2", {"num_key_value_heads": 1}, "numbers of heads, key-value heads"),
        ("deepseek_v3", {"n_group": None}, "give a number in config.json instead of null: n_group"),
        ("deepseek_v3", {"topk_group": None}, "give a number in config.json instead of null: topk_group"),
        ("deepseek_v3", {"n_group": None, "topk_group": None}, "instead of null: n_group, topk_group"),
        ("glm4_moe", {"n_group": None}, "Field .n_group. expected int"),
    ],
)
def test_a_model_that_can_be_built_and_not_run(checkpoints, text, tmp_path, monkeypatch, model_type, changes, says):
    """Its tensors fit. It is refused before weights are read, and before anything is written."""
    from expertsmith.checkpoint.reader import Checkpoint

    shutil.copytree(checkpoints(model_type), tmp_path / "model")
    held = config_of(checkpoints, model_type)
    (tmp_path / "model" / "config.json").write_text(json.dumps({**held, **changes}))
    made = api.plan(tmp_path / "model", "random", 4)
    assert refused_or_right(tmp_path, tmp_path / "model", lambda: made) == "refused"
    monkeypatch.setattr(Checkpoint, "read", None)
    for memory in ("resident", "stream"):
        with pytest.raises(UserError, match=says):
            api.calibrate(tmp_path / "model", text, tmp_path / "stats", memory=memory, **CALIBRATION)
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize(("model_type", "changes"), [("deepseek_v4", {"mlp_layer_types": 3}), ("jamba", {"num_experts": "x"})])
def test_a_key_of_a_wrong_kind_that_says_which_layers_have_experts(checkpoints, tmp_path, model_type, changes):
    shutil.copytree(checkpoints(model_type), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config_of(checkpoints, model_type), **changes}))
    with pytest.raises(UserError, match=r"config\.json"):
        api.plan(tmp_path / "model", "random", 4)


def test_groups_that_are_null_where_the_class_does_without_them(checkpoints, text, tmp_path):
    """A router that reads n_group only with its group-limited method runs as one group."""
    shutil.copytree(checkpoints("deepseek_v2"), tmp_path / "model")
    held = config_of(checkpoints, "deepseek_v2")
    (tmp_path / "model" / "config.json").write_text(
        json.dumps({**held, "topk_method": "greedy", "n_group": None, "topk_group": None})
    )
    assert refused_or_right(tmp_path, tmp_path / "model", lambda: api.plan(tmp_path / "model", "random", 3)) == "right"
    assert calibrated(tmp_path / "model", text, tmp_path / "stats") == "right"


@runs(60)
@given(place=st.floats(0, 1), kind=st.sampled_from(["cut", "changed", "added"]), byte=st.integers(0, 255))
def test_a_config_with_damaged_bytes(source, copy, place, kind, byte):
    (copy / "config.json").write_bytes(bytes_damaged((source / "config.json").read_bytes(), place, kind, byte))
    try:
        refused_or_right(copy.parent, copy, lambda: api.plan(copy, "random", 4))
    finally:
        shutil.copyfile(source / "config.json", copy / "config.json")


# ---- the header of a safetensors file


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def checked(copy: Path, source: Path, raw: bytes) -> str:
    (copy / "model.safetensors").write_bytes(raw)
    try:
        return refused_or_right(copy.parent, copy, lambda: api.plan(copy, "random", 4))
    finally:
        shutil.copyfile(source / "model.safetensors", copy / "model.safetensors")


@runs(80)
@given(data=st.data())
def test_a_damaged_header(source, copy, data):
    header, body = header_of(source / "model.safetensors")
    place = data.draw(st.sampled_from(sorted(places(header), key=str)))
    value = data.draw(st.sampled_from([*WRONG, GONE, "0", "F64", "BF16", [0, "4"], ["0", "4"], [1e3, 2e3], [[0], [4]]]))
    checked(copy, source, with_header(damaged(header, place, value), body))


@pytest.mark.parametrize(
    "value", [["0", "4096"], [None, 4], [0.0, 16384.0], "ab", [True, False], [-4, 0], [0], [0, 4, 8], [[], []], {"0": 1}]
)
def test_offsets_that_are_no_numbers(source, copy, value):
    header, body = header_of(source / "model.safetensors")
    name = next(name for name in header if name != "__metadata__")
    assert checked(copy, source, with_header(damaged(header, (name, "data_offsets"), value), body)) == "refused"


@runs(60)
@given(place=st.floats(0, 1), kind=st.sampled_from(["cut", "changed", "added"]), byte=st.integers(0, 255))
def test_a_header_with_damaged_bytes(source, copy, place, kind, byte):
    raw = (source / "model.safetensors").read_bytes()
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    checked(copy, source, bytes_damaged(raw[:size], place, kind, byte) + raw[size:])


# ---- plans


@pytest.fixture(scope="module")
def plans(source, tmp_path_factory, stats) -> list[dict[str, Any]]:
    """One that removes, one that merges, one whose layers differ."""
    made = [
        api.plan(source, "reap", 4, stats=stats),
        api.plan(source, "m_smoe", 4, stats=stats),
        api.plan(source, "reap", 0.5, stats=stats, budget="global"),
    ]
    return [plan.to_json() for plan in made]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "a.jsonl"
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 120, (24,), generator=generator).tolist() for _ in range(4)]
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return f"a={file}"


@pytest.fixture(scope="module")
def stats(source, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stats") / "stats"
    api.calibrate(source, text, folder, **CALIBRATION)
    return folder


@runs(80)
@given(data=st.data())
def test_a_damaged_plan(source, plans, tmp_path_factory, data):
    held = data.draw(st.sampled_from(plans))
    place, value = (
        data.draw(st.sampled_from(sorted(places(held), key=str))),
        data.draw(st.sampled_from([*WRONG, GONE, [0, 0], [7, 1], "reap"])),
    )
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.json").write_text(json.dumps(damaged(held, place, value)))
    refused_or_right(folder, source, lambda: folder / "plan.json")


@runs(40)
@given(data=st.data(), place=st.floats(0, 1), kind=st.sampled_from(["cut", "changed", "added"]), byte=st.integers(0, 255))
def test_a_plan_with_damaged_bytes(source, plans, tmp_path_factory, data, place, kind, byte):
    folder = tmp_path_factory.mktemp("plan")
    raw = json.dumps(data.draw(st.sampled_from(plans))).encode()
    (folder / "plan.json").write_bytes(bytes_damaged(raw, place, kind, byte))
    refused_or_right(folder, source, lambda: folder / "plan.json")


# ---- statistics


def planned(source: Path, folder: Path) -> str:
    """A plan of damaged statistics is one that can be applied, or it is refused."""
    try:
        made = api.plan(source, "reap", 4, stats=folder)
    except UserError as error:
        assert 0 < len(str(error)) < 2000  # noqa: PT017
        return "refused"
    assert [len(entry.keep) for entry in made.layers] == [4, 4]
    return "right"


@runs(80)
@given(data=st.data())
def test_damaged_statistics(source, stats, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "stats"
    shutil.copytree(stats, folder)
    held = json.loads((folder / "stats.json").read_text())
    place, value = data.draw(st.sampled_from(sorted(places(held), key=str))), data.draw(st.sampled_from([*WRONG, GONE]))
    (folder / "stats.json").write_text(json.dumps(damaged(held, place, value)))
    planned(source, folder)


@runs(60)
@given(name=st.sampled_from(["stats.json", "layer_000.safetensors"]), place=st.floats(0, 1), kind=st.sampled_from(["cut", "changed", "added"]), byte=st.integers(0, 255))  # fmt: skip
def test_statistics_with_damaged_bytes(source, stats, tmp_path_factory, name, place, kind, byte):
    folder = tmp_path_factory.mktemp("damaged") / "stats"
    shutil.copytree(stats, folder)
    (folder / name).write_bytes(bytes_damaged((folder / name).read_bytes(), place, kind, byte))
    planned(source, folder)


# ---- JSON


@pytest.mark.parametrize("depth", [101, 900, 3000, 100_000])
def test_json_that_nests_too_deeply(source, copy, stats, tmp_path, depth):
    deep = "[" * depth + "]" * depth
    with pytest.raises(UserError, match="nests more than 100 levels deep"):
        parse_json(deep, "it")
    assert parse_json("[" * 100 + "]" * 100, "it")
    for name, line in (("a.jsonl", f'{{"text": "x", "more": {deep}}}\n'), ("a.json", deep)):
        (tmp_path / name).write_text(line)
        with pytest.raises(UserError, match="nests more than 100 levels deep"):
            list(read_records(str(tmp_path / name)))
    (tmp_path / "plan.json").write_text(deep)
    shutil.copytree(stats, tmp_path / "stats")
    (tmp_path / "stats" / "stats.json").write_text(deep)
    for refused in (
        lambda: api.apply(source, tmp_path / "plan.json", tmp_path / "out"),
        lambda: load_statistics(tmp_path / "stats"),
        lambda: api.plan(source, from_file=tmp_path / "a.json", keep=4),
    ):
        with pytest.raises(UserError):
            refused()
    header, body = header_of(source / "model.safetensors")
    text = json.dumps(header)[:-1] + f', "x": {deep}}}'
    assert checked(copy, source, struct.pack("<Q", len(text)) + text.encode() + body) == "refused"


@pytest.mark.parametrize("text", ["9" * 5000, "{", "\ud800".encode("utf-8", "surrogatepass"), b"\xff\xfe", ""])
def test_what_is_no_json(text):
    with pytest.raises(UserError, match="it is not JSON"):
        parse_json(text, "it")


# ---- killed runs


def killed_at(event: int, job: Any) -> bool:
    """Run a job in a process that is killed at its nth access to a file; whether it came so far. SIGKILL: nothing is tidied up."""
    child = os.fork()
    if child == 0:
        left = [event]

        def watch(name: str, _: Any) -> None:
            if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(watch)
            job()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


JOBS = {
    "calibrate": lambda source, text, out: api.calibrate(source, text, out, **CALIBRATION),
    "compress": lambda source, text, out: api.compress(
        source, "reap", 4, out=out, data=text, measure=False, overwrite=True, **CALIBRATION
    ),
    "plan": lambda source, text, out: api.plan(
        source, "expert_sparsity", 4, data=text, out=out / "p.json", overwrite=True, **CALIBRATION
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is copied")
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_run_resumes_to_the_same_bytes(name, source, text, tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")

    def job(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        JOBS[name](source, text, folder if name == "plan" else folder / "out")

    job(root / "whole")
    timed = ("verify.json", "report.html")  # they have times
    wanted = {key: raw for key, raw in contents(root / "whole").items() if not key.endswith(timed)}
    count = iter(range(10**6))

    @runs(8)
    @given(event=st.integers(1, 400))
    @example(event=1)
    def at(event: int) -> None:
        folder = root / f"run-{next(count)}"
        killed_at(event, lambda: job(folder))
        job(folder)
        found = {key: raw for key, raw in contents(folder).items() if not key.endswith(timed)}
        assert found == wanted

    at()

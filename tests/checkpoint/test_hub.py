"""Models on the hub: what is fetched of a repository, revisions, and the cache without a network. The hub is a folder here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from conftest import run_cli, save_tiny
from expertsmith import api
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.hub import named
from expertsmith.errors import UserError

MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def snapshot(cache: Path, source: Path, commit: str = MAIN, ref: str | None = "main", name: str = "owner/small") -> Path:
    """A repository in the cache, as the hub client lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / commit)
    if ref is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("hub") / "source")


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub whose repositories are folders: `repos[name, revision]`. `fetched` is what left it."""
    found = SimpleNamespace(repos={}, fetched=[], asked=[])

    def snapshot_download(name: str, *, revision: str | None = None, allow_patterns: Any, ignore_patterns: Any) -> str:
        found.asked.append((name, revision))
        if (name, revision) not in found.repos:
            raise OSError(f"404 Client Error: {name} at {revision}")
        repo, commit = found.repos[name, revision]
        files = [str(path.relative_to(repo)) for path in sorted(repo.rglob("*")) if path.is_file()]
        target = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / file, target / file)
            found.fetched.append(file)
        target.mkdir(parents=True, exist_ok=True)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return found


def repository(folder: Path, source: Path, files: dict[str, str]) -> Path:
    shutil.copytree(source, folder)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


SECOND_FORMS = dict.fromkeys(("original/model.safetensors", "original/config.json", "metal/model.bin", "consolidated.safetensors", "consolidated.00.pth", "small-Q4.gguf", "pytorch_model.bin", "model.onnx", "onnx/config.json", "flax_model.msgpack"), "not wanted")  # fmt: skip
COMPANIONS = dict.fromkeys(("tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json", "LICENSE.txt", "LICENCE", "tokenizer.model", "modeling_small.py", "merges.txt", "hf_quant_config.json"), "{}")  # fmt: skip


def test_a_download_is_one_form_of_the_model(source: Path, tmp_path: Path, hub: SimpleNamespace) -> None:
    """With an index the shards that it names; other weights, and other forms in folders, are left where they are."""
    repo = repository(tmp_path / "repo", source, {**SECOND_FORMS, **COMPANIONS})
    (repo / "model.safetensors").rename(repo / "model-00001-of-00001.safetensors")
    names = open_checkpoint(source).tensors
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (repo / "model.safetensors.index.json").write_text(json.dumps(index))
    (repo / "stray.safetensors").write_text("not in the index")
    hub.repos |= {("owner/small", None): (repo, MAIN), ("owner/small", MAIN): (repo, MAIN)}
    checkpoint = open_checkpoint("owner/small")
    assert checkpoint.tensors.keys() == names.keys()
    wanted = {
        *COMPANIONS,
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    }
    assert set(hub.fetched) == wanted
    assert hub.asked == [("owner/small", None), ("owner/small", MAIN)]  # weights and texts are of one commit


@pytest.mark.parametrize("single", [True, False])
def test_a_download_without_an_index(single: bool, source: Path, tmp_path: Path, hub: SimpleNamespace) -> None:
    repo = repository(tmp_path / "repo", source, SECOND_FORMS)
    wanted = "model.safetensors"
    if not single:
        wanted = "part-1.safetensors"
        (repo / "model.safetensors").rename(repo / wanted)
    else:
        (repo / "stray.safetensors").write_text("beside model.safetensors")
    hub.repos |= {("owner/small", None): (repo, MAIN), ("owner/small", MAIN): (repo, MAIN)}
    assert len(open_checkpoint("owner/small").tensors) == len(open_checkpoint(source).tensors)
    assert {name for name in hub.fetched if not name.endswith(".json")} == {wanted}


@pytest.mark.parametrize("revision", ["v1", OLD, "refs/pr/3"])
def test_a_revision(revision: str, source: Path, tmp_path: Path, hub: SimpleNamespace) -> None:
    other = save_tiny("mixtral", tmp_path / "other", num_local_experts=4)
    for name in (None, MAIN):
        hub.repos["owner/small", name] = (source, MAIN)
    for name in (revision, OLD):
        hub.repos["owner/small", name] = (other, OLD)
    assert open_checkpoint("owner/small").config["num_local_experts"] == 8
    assert open_checkpoint("owner/small", revision=revision).config["num_local_experts"] == 4
    assert open_checkpoint(f"owner/small@{revision}").config["num_local_experts"] == 4
    made = api.plan("owner/small", "random", 2, revision=revision, out=tmp_path / "plan.json")
    assert [entry.num_experts for entry in made.layers] == [4, 4, 4]
    api.apply("owner/small", made, tmp_path / "out", revision=revision)
    assert f"`owner/small@{revision}`" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="was made for another checkpoint"):
        api.apply("owner/small", made, tmp_path / "out2")
    with pytest.raises(UserError, match=r"'owner/small@v9' is not a local directory and could not be downloaded.*404"):
        open_checkpoint("owner/small", revision="v9")


def test_a_directory_has_no_revision(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    api.plan(source, "random", 4, out=plan)
    for command in (
        ("inspect", source), ("lint", source), ("plan", source, "-m", "random", "-k", "4"), ("apply", source, plan, "-o", tmp_path / "o"),
        ("calibrate", source, "-d", "x.jsonl", "-o", tmp_path / "s"), ("verify", source, tmp_path / "o"),
        ("compress", source, "-m", "random", "-k", "4", "-o", tmp_path / "o"), ("skip", source, "-d", "x.jsonl", "-o", tmp_path / "o"),
        ("evaluate", source, "-d", "x.jsonl"), ("evaluate", source, "--speed"), ("analyze", source, "-o", tmp_path / "a"),
        ("compare", source, "-m", "random", "-k", "4", "-d", "x.jsonl", "-e", "x.jsonl", "-o", tmp_path / "c"),
        ("convert", source, "-m", "random", "-o", tmp_path / "o"), ("heal", source, "-t", source, "-d", "x.jsonl", "-o", tmp_path / "o"),
        ("inspect", "demo"), ("dequantise", source, "-o", tmp_path / "o"),
    ):  # fmt: skip
        code, _, err = run_cli(capsys, *command, "--revision", "v1")
        assert (code, "is not a hub model" in err) == (2, True), (command, err)
    assert not [path for path in tmp_path.iterdir() if path != plan]
    with pytest.raises(UserError, match="already has a revision"):
        api.inspect("owner/small@v1", revision="v2")


def test_look_without_a_network(source: Path, cache: Path, tmp_path: Path) -> None:
    """inspect and lint read what the cache has; so does a command that needs the weights."""
    snapshot(cache, source)
    old = save_tiny("mixtral", tmp_path / "old", num_local_experts=4)
    snapshot(cache, old, OLD, ref="v1")
    remote, local = api.inspect("owner/small"), api.inspect(source)
    assert {**remote, "model": ""} == {**local, "model": ""}
    assert [f.to_json() for f in api.lint("owner/small")] == [f.to_json() for f in api.lint(source)]
    assert (
        api.inspect("owner/small", revision="v1")["num_experts"] == api.inspect("owner/small", revision=OLD)["num_experts"] == 4
    )
    assert api.inspect("owner/small", revision=MAIN)["num_experts"] == 8
    assert open_checkpoint("owner/small").tensors.keys() == open_checkpoint(source).tensors.keys()
    with pytest.raises(UserError, match="could not be downloaded from the hub"):
        api.inspect("owner/small", revision="v2")
    with pytest.raises(UserError, match="could not be downloaded from the hub"):
        api.inspect("owner/unknown")


def test_a_snapshot_that_is_not_whole_is_named(source: Path, cache: Path) -> None:
    folder = snapshot(cache, source)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \.safetensors files"):
        api.inspect("owner/small")


def test_headers_of_a_repository_without_an_index(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, info: Any) -> None:
            self.dtype, self.shape, self.data_offsets = info.dtype, list(info.shape), (info.start, info.start + info.nbytes)

    part = SimpleNamespace(tensors={name: Entry(info) for name, info in open_checkpoint(source).tensors.items()})

    def none(name: str, revision: str | None = None) -> Any:
        raise huggingface_hub.errors.NotASafetensorsRepoError("no index")

    files = ["config.json", "part-1.safetensors", "consolidated.safetensors", "original/model.safetensors"]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, revision=None: str(source / name))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", none)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision=None: files)
    monkeypatch.setattr(
        huggingface_hub, "parse_safetensors_file_metadata", lambda repo, file, revision=None: {"part-1.safetensors": part}[file]
    )
    assert api.inspect("some/model")["parameters"] == api.inspect(source)["parameters"]


def test_the_own_layout_of_a_publisher_is_left_out(source: Path, tmp_path: Path) -> None:
    """consolidated.safetensors repeats the weights under other names; alone it is not a checkpoint of Hugging Face."""
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    assert {info.file.name for info in open_checkpoint(folder).tensors.values()} == {"part-1.safetensors"}
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"has only consolidated\.safetensors: weights in Mistral's layout"):
        open_checkpoint(folder)


# ---- addresses and uploads


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://huggingface.co/owner/name/", "owner/name"),
        ("huggingface.co/owner/name/tree/v1.0", "owner/name@v1.0"),
        ("https://hf.co/owner/name/tree/main?library=x", "owner/name@main"),
        ("owner/name@v1", "owner/name@v1"),
        ("https://example.com/owner/name", "https://example.com/owner/name"),
        ("https://huggingface.co/datasets/owner/name", "https://huggingface.co/datasets/owner/name"),
    ],
)
def test_an_address_is_a_name(address, name):
    assert named(address) == name


class Uploads:
    """A hub that takes down what it is asked for."""

    def __init__(self, monkeypatch, there=(), fails=None, user=True):
        import huggingface_hub

        self.done = []

        def whoami():
            if not user:
                raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")

        def upload_folder(**given):
            if fails:
                raise ConnectionError(fails)
            self.done.append(given)

        for name, stand_in in {
            "whoami": whoami,
            "repo_exists": lambda name: name in there,
            "create_repo": lambda name, private, exist_ok: self.done.append((name, private)),
            "upload_folder": upload_folder,
        }.items():
            monkeypatch.setattr(huggingface_hub, name, stand_in)


def test_apply_uploads_a_private_repository(monkeypatch, checkpoints, tmp_path, capsys):
    made = Uploads(monkeypatch)
    source = checkpoints("mixtral")
    api.plan(source, "random", 0.5, out=tmp_path / "p.json")
    code, out, _ = run_cli(capsys, "apply", source, tmp_path / "p.json", "-o", tmp_path / "out", "--push", "me/half")
    assert code == 0
    assert "uploaded to https://huggingface.co/me/half" in out
    (repo, private), upload = made.done
    assert (repo, private) == ("me/half", True)
    assert (upload["repo_id"], upload["folder_path"]) == ("me/half", tmp_path / "out")


def test_compress_uploads_what_is_proven(monkeypatch, checkpoints, tmp_path, capsys):
    """With its report inside, healed or not; what verify refuses stays here."""
    made = Uploads(monkeypatch)
    line = ["compress", checkpoints("mixtral"), "-m", "random", "-k", 4, "--device", "cpu"]
    code, out, err = run_cli(capsys, *line, "-o", tmp_path / "out", "--push", "me/half")
    assert (code, "uploaded to https://huggingface.co/me/half" in out) == (0, True), err
    (repo, private), upload = made.done
    assert (repo, private) == ("me/half", True)
    assert (upload["repo_id"], upload["folder_path"]) == ("me/half", tmp_path / "out")
    assert (tmp_path / "out" / "expertsmith" / "report.html").exists()
    code, out, _ = run_cli(capsys, *line, "-o", tmp_path / "again", "--push", "me/half", "--json")
    assert json.loads(out)["pushed"] == "https://huggingface.co/me/half"
    monkeypatch.setattr("expertsmith.verbs.compress.verify", refusing)
    done = len(made.done)
    code, _, err = run_cli(capsys, *line, "-o", tmp_path / "wrong", "--push", "me/wrong")
    assert (code, len(made.done)) == (1, done)
    assert "not uploaded to me/wrong, because verify failed" in err


def refusing(*given, **more):
    from expertsmith.surgery.verify import Verdict

    return Verdict(passed=False, tolerance=1e-4, tensors=3, wrong_tensors=["model.norm.weight"])


@pytest.mark.parametrize(
    ("name", "hub_is", "says"),
    [
        ("half", {}, "no name of a hub repository"),
        ("me/half@v1", {}, "no name of a hub repository"),
        ("me/half", {"user": False}, "Token is required; log in with"),
        ("me/half", {"there": ["me/half"]}, "exists already; choose another name"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_any_work(monkeypatch, checkpoints, tmp_path, name, hub_is, says):
    Uploads(monkeypatch, **hub_is)
    source = checkpoints("mixtral")
    made = api.plan(source, "random", 0.5)
    with pytest.raises(UserError, match=says):
        api.apply(source, made, tmp_path / "out", push=name)
    with pytest.raises(UserError, match=says):
        api.compress(source, "random", 0.5, out=tmp_path / "out", push=name)
    assert not list(tmp_path.glob("out*"))


def test_a_failed_upload_leaves_the_result_and_says_how_to_go_on(monkeypatch, checkpoints, tmp_path):
    Uploads(monkeypatch, fails="the line broke")
    source = checkpoints("mixtral")
    made = api.plan(source, "random", 0.5)
    with pytest.raises(
        UserError, match="is complete, but could not be uploaded to me/half: the line broke; upload it with `hf upload"
    ):
        api.apply(source, made, tmp_path / "out", push="me/half")
    assert (tmp_path / "out" / "config.json").exists()


def test_heal_uploads_too(monkeypatch, checkpoints, data, tmp_path):
    made = Uploads(monkeypatch)
    source = checkpoints("mixtral")
    api.apply(source, api.plan(source, "random", 0.5), tmp_path / "half")
    report = api.heal(tmp_path / "half", source, data, tmp_path / "healed", push="me/healed", seq_len=24, device="cpu")
    assert report["pushed"] == "https://huggingface.co/me/healed"
    assert made.done[-1]["folder_path"] == tmp_path / "healed"

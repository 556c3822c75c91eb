"""The model card of an output, and which files of the source come along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from conftest import CALIBRATION, DEVICE, run_cli
from expertsmith import api
from expertsmith.checkpoint import open_checkpoint
from expertsmith.checkpoint.origin import card_metadata, front_matter, name_of, repository, source_of

HASH = "0123456789abcdef0123456789abcdef01234567"


def card(folder: Path) -> dict:
    """The metadata as the hub's own client reads it."""
    found = ModelCard.load(folder / "README.md")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "[expertsmith]" not in text  # a link to nowhere
    return found.data.to_dict()


@pytest.fixture
def snapshot(checkpoints, tmp_path) -> Path:
    """A model in the hub's cache, with a card and a licence."""
    folder = tmp_path / "hub" / "models--owner--some--model" / "snapshots" / HASH
    shutil.copytree(checkpoints("mixtral"), folder)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: theirs-1.0\nlicense_link: LICENSE\nlanguage: [en, fr]\nbase_model: owner/older\n"
        "tags: [theirs]\npipeline_tag: text-generation\ngated: true\nmodel-index: []\n---\n# Theirs\n"
    )
    (folder / "LICENSE").write_text("the terms")
    return folder


def made(source: Path, out: Path) -> dict:
    api.apply(source, api.plan(source, "random", 4), out)
    return card(out)


def test_a_folder_of_the_cache_is_a_repository(snapshot, tmp_path):
    found = made(snapshot, tmp_path / "out")
    assert found == {
        "base_model": "owner/some--model",
        "language": ["en", "fr"],
        "library_name": "transformers",
        "license": "other",
        "license_link": "LICENSE",
        "license_name": "theirs-1.0",
        "pipeline_tag": "text-generation",
        "tags": ["expertsmith", "mixture-of-experts", "pruned"],
    }
    text = (tmp_path / "out" / "README.md").read_text()
    assert "# some--model with 4 of 8 experts" in text
    assert f"`owner/some--model@{HASH}`" in text
    assert "Theirs" not in text
    assert (tmp_path / "out" / "LICENSE").read_text() == "the terms"


def test_a_model_that_is_named_as_on_the_hub(snapshot, tmp_path):
    checkpoint = open_checkpoint(snapshot)
    checkpoint.source = "owner/some--model@v1"
    assert repository(checkpoint) == "owner/some--model"
    assert name_of(checkpoint) == "some--model"
    assert source_of(checkpoint) == "owner/some--model@v1"


def test_a_folder_of_its_own_names_what_its_card_names(snapshot, tmp_path):
    local = tmp_path / "local"
    shutil.copytree(snapshot, local)
    found = made(local, tmp_path / "out")
    assert found["base_model"] == "owner/older"
    assert "# local with 4 of 8 experts" in (tmp_path / "out" / "README.md").read_text()
    assert found["license_name"] == "theirs-1.0"


def test_what_was_made_before_hands_its_base_on(snapshot, tmp_path):
    made(snapshot, tmp_path / "six")
    api.apply(tmp_path / "six", api.plan(tmp_path / "six", "random", 2), tmp_path / "two")
    assert card(tmp_path / "two")["base_model"] == "owner/some--model"
    assert card(tmp_path / "two")["license_name"] == "theirs-1.0"


def test_without_a_card(checkpoints, tmp_path):
    found = made(checkpoints("mixtral"), tmp_path / "out")
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["expertsmith", "mixture-of-experts", "pruned"],
    }


def test_a_licence_without_a_card_is_linked(checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    (source / "LICENSE.txt").write_text("the terms")
    found = made(source, tmp_path / "out")
    assert (found["license"], found["license_link"]) == ("other", "LICENSE.txt")
    assert (tmp_path / "out" / "LICENSE.txt").is_file()


def test_a_link_to_a_file_that_is_not_here_leads_to_the_hub(snapshot):
    (snapshot / "LICENSE").unlink()
    lines = front_matter(open_checkpoint(snapshot), ["x"])
    assert "license_link: https://huggingface.co/owner/some--model/blob/main/LICENSE" in lines


@pytest.mark.parametrize(
    "text",
    ["", "no metadata", "---\n", "---\n: [\n---\n", "---\n- a\n- b\n---\n", "---\n" + "[" * 5000 + "\n---\n", "---\nlicense: [a, b]\nbase_model: 7\n---\n", "\ufeff---\r\nlicense: mit\r\n---\r\n"],
)  # fmt: skip
def test_cards_of_any_kind_are_read(checkpoints, tmp_path, text):
    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    (source / "README.md").write_bytes(text.encode())
    assert isinstance(card_metadata(source), dict)
    assert yaml.safe_load("\n".join(front_matter(open_checkpoint(source), ["x"])[1:-1]))["tags"] == ["x"]
    (source / "README.md").write_bytes(b"\xff\xfe---")
    assert card_metadata(source) == {}


def test_composites_are_named_so(checkpoints, tmp_path):
    checkpoint = open_checkpoint(checkpoints("mixtral"))
    checkpoint.config = {**checkpoint.config, "vision_config": {}}
    assert "pipeline_tag: image-text-to-text" in front_matter(checkpoint, ["x"])


# ---- measured quality


def test_measured_quality_stands_in_the_metadata(snapshot, data, tmp_path):
    api.compress(snapshot, "random", 4, out=tmp_path / "out", data=data, eval_data=data, **CALIBRATION)
    rows = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert [(row.dataset_name, row.metric_type) for row in rows] == [("a (held-out text)", "perplexity"), ("b (held-out text)", "perplexity")]  # fmt: skip
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(f"{row.metric_value:.2f} (base" in text for row in rows)
    shape = {"seq_len": 24, "batch_tokens": 72, "device": DEVICE, "pack": False}
    api.heal(tmp_path / "out", snapshot, data, tmp_path / "healed", **shape)
    assert card(tmp_path / "healed")["base_model"] == "owner/some--model"
    assert "model-index" not in (tmp_path / "healed" / "README.md").read_text()  # that was before it was healed
    assert "(before healing)" in (tmp_path / "healed" / "README.md").read_text()


def test_a_healed_model_of_others_gets_a_card_of_its_own(checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    api.apply(source, api.plan(source, "random", 4), tmp_path / "half")
    (tmp_path / "half" / "README.md").write_text("---\nlicense: mit\n---\n# Best of all models: 99 % on everything\n")
    api.heal(tmp_path / "half", source, data, tmp_path / "out", seq_len=24, batch_tokens=72, device=DEVICE, pack=False)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "99 %" not in text
    assert card(tmp_path / "out")["license"] == "mit"
    assert "# half, healed" in text


def test_converted_models_have_it_too(dense, tmp_path):
    source = tmp_path / "hub" / "models--owner--small" / "snapshots" / HASH
    shutil.copytree(dense("llama"), source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    api.convert(source, "random", tmp_path / "out", top_k=8, measure=False, device=DEVICE)
    found = card(tmp_path / "out")
    assert (found["base_model"], found["license"]) == ("owner/small", "apache-2.0")
    assert "# small as a Mixture of Experts" in (tmp_path / "out" / "README.md").read_text()


# ---- files

TRAVEL = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "tokenizer.model.v3", "vocab.json",
    "merges.txt", "tiktoken.model", "qwen.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "configuration.json", "LICENSE", "LICENCE.md", "LICENSE.txt",
    "Notice.md", "NOTICE", "USE_POLICY.md", "COPYING", "additional_chat_templates/tool.jinja",
]  # fmt: skip
STAY = [
    "README.md", "MODEL_CARD.md", "CHANGELOG.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors.index.json", "model.gguf",
    "model-Q4_K_M.gguf", "model.onnx", "model.onnx_data", "consolidated.00.pth", "consolidated.safetensors", "params.json", "flax_model.msgpack", "tf_model.h5",
    "adapter_config.json", "adapter_model.bin", "eval_results.json", "all_results.json", "train_results.json", "results_2024.json", "benchmark.json",
    "lm_eval.yaml", "trainer_state.json", "training_args.bin", "events.out.tfevents.1.tfevents", "recipe.yaml", "imatrix.dat", "quant_log.csv", "scores.tsv",
    "samples.jsonl", "figure.png", "paper.pdf", "modeling_x.py", "demo.ipynb", "checksums.txt", ".gitattributes", ".git/config", "original/params.json",
    "onnx/config.json", "metal/model.bin", "additional_chat_templates/note.txt",
]  # fmt: skip


def test_what_comes_along_and_what_does_not(checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints("mixtral"), source)
    for name in (*TRAVEL, *STAY):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}" if name.endswith(".json") else "x")
    notes = api.apply(source, api.plan(source, "random", 4), tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {*TRAVEL, "config.json", "model.safetensors", "README.md", "expertsmith/plan.json"}
    note = next(note for note in notes if note.startswith("files that describe the source only were not copied: "))
    told = set(note.partition(": ")[2].split(", "))
    assert told == {
        name for name in STAY if "/" not in name and not name.startswith((".", "README")) and not name.endswith(".py")
    }
    assert note in (tmp_path / "out" / "README.md").read_text()


def test_stale_settings_of_a_quantisation_do_not_come_along_decoded(checkpoints):
    """Where the codes are copied they are renumbered (tests/checkpoint), where they are decoded they stay behind."""
    from expertsmith.checkpoint.floats import SIDE_FILES
    from expertsmith.checkpoint.writer import _travels

    assert all(_travels(name) for name in SIDE_FILES)  # `without` names them where weights are decoded


def test_a_name_in_the_card_that_is_no_text(capsys, checkpoints, tmp_path):
    import os
    import sys

    if sys.platform in ("win32", "darwin"):
        pytest.skip("names of files are always text there")
    source = Path(os.fsdecode(bytes(tmp_path) + b"/m\xff"))
    shutil.copytree(checkpoints("mixtral"), source)
    plan = tmp_path / "plan.json"
    assert run_cli(capsys, "plan", source, "-m", "random", "-k", "4", "-o", plan, "-q")[0] == 0
    code, _, err = run_cli(capsys, "apply", source, plan, "-o", tmp_path / "out", "-q")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 4

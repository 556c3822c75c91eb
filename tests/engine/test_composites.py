"""Checkpoints that are more than a language model: what is not the language model's goes along untouched, and the result loads as the source did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CALIBRATION, COMPOSITES, DEVICE, loaded_plainly, random_model, run_cli
from expertsmith import api
from expertsmith.arch import text_config
from expertsmith.checkpoint import open_checkpoint
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.experts.rules import groups_of
from expertsmith.planning.plan import parse_plan
from tiny import tiny_config

IMAGES = {"image_token_id": 124, "video_token_id": 125}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
# model_type of the whole → (family of its language model, further keys of its config)
WHOLES: dict[str, tuple[str, dict[str, object]]] = {
    "inkling2": (
        "inkling2_text",
        {
            "vision_config": SMALL | {"projection_hidden_dim": 16, "text_hidden_size": 32, "posemb_grid_size": 4},
            "image_token_id": 124,
        },
    ),
    "minimax_m3_vl": (
        "minimax_m3_vl_text",
        {
            "vision_config": SMALL | {"image_size": 16},
            "image_token_index": 124,
            "video_token_index": 125,
            "projector_hidden_size": 32,
        },
    ),
    "kimi_k25": (
        "deepseek_v3",
        {
            "vision_config": SMALL | {"pos_emb_height": 4, "pos_emb_width": 4},
            "projection_hidden_size": 16,
            "vision_start_token_id": 122,
            "vision_end_token_id": 123,
            **IMAGES,
        },
    ),
    "nemotron_h_omni": (
        "nemotron_h",
        {
            "vision_config": SMALL | {"image_size": 16, "max_img_size": 16, "video_temporal_patch_size": 2},
            "vision_hidden_size": 16,
            "projector_hidden_size": 32,
        },
    ),
    "dots3_note": (
        "dots3_note_text",
        {
            "vision_config": SMALL
            | {
                "num_hidden_layers": 2,
                "moe_intermediate_size": 16,
                "mlp_layer_types": ["dense", "sparse"],
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "adapter_in_dim": 16,
                "adapter_out_dim": 32,
            },
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "downsample_hidden_size": 8,
                "adapter_input_size": 16,
                "feature_size": 16,
                "adapter_out_dim": 32,
            },
            "audio_token_id": 126,
            **IMAGES,
        },
    ),
    "mistral3": (
        "mistral4",
        {"vision_config": {"model_type": "pixtral", **SMALL, "image_size": 16, "head_dim": 8}, "image_token_index": 124},
    ),
}
FILES = {
    "preprocessor_config.json": '{"image_processor_type": "Any"}',
    "processor_config.json": '{"processor_class": "Any"}',
    "video_preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}
ALL = [*WHOLES, *COMPOSITES]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Name of ALL → its checkpoint, with processor files."""
    import transformers

    root = tmp_path_factory.mktemp("composites")

    def build(name: str) -> Path:
        folder = root / name
        if folder.exists():
            return folder
        if name in WHOLES:
            text, parts = WHOLES[name]
            config = transformers.CONFIG_MAPPING[text](**tiny_config(text))
            whole = transformers.CONFIG_MAPPING[name](text_config=config.to_dict(), **parts)
            torch.manual_seed(0)
            model = transformers.AutoModelForMultimodalLM.from_config(whole).eval()
        else:
            model = random_model(name)
        model.save_pretrained(folder)
        for file, text in FILES.items():
            (folder / file).write_text(text)
        return folder

    return build


@pytest.mark.parametrize("memory", ["resident", "stream"])
@pytest.mark.parametrize("name", ALL)
def test_the_language_model_is_pruned_and_nothing_else_changes(name, memory, sources, data, tmp_path):
    source = sources(name)
    stats = api.calibrate(source, data, tmp_path / "stats", memory=memory, **CALIBRATION)
    notes = api.apply(source, api.plan(source, "reap", 4, stats=stats), tmp_path / "out")
    assert sum("judged by text" in note for note in notes) == 1
    assert "judged by text" in (tmp_path / "out" / "README.md").read_text()
    verdict = api.verify(source, tmp_path / "out", tokens=128, memory=memory, device=DEVICE)
    assert verdict.passed
    assert verdict.not_compared is None
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    others = [claim.info.name for claim in take_inventory(open_checkpoint(source)).claims if claim.layer is None]
    assert any(word in entry for entry in others for word in ("vision", "visual", "vit_", "encoder", "radio"))
    for entry in others:
        assert torch.equal(before[entry].view(torch.uint8), after[entry].view(torch.uint8)), entry
    for file, text in FILES.items():
        assert (tmp_path / "out" / file).read_text() == text
    ids = torch.randint(3, 120, (1, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert loaded_plainly(tmp_path / "out")(ids).logits.shape[:2] == (1, 9)
    assert int(take_inventory(open_checkpoint(tmp_path / "out")).num_experts) == 4


@pytest.mark.parametrize("name", ALL)
def test_different_numbers_a_layer(name, sources, tmp_path):
    """Refused before anything is written where the language model runs as a part of the whole only; elsewhere proved."""
    source = sources(name)
    inventory = take_inventory(open_checkpoint(source))
    raw = api.plan(source, "aimer", 4).to_json()
    last = raw["layers"][-1]
    more = [next(e for e in group if e not in last["keep"]) for group in groups_of(inventory.rules)]
    last["keep"] = sorted([*last["keep"], *more])
    plan = parse_plan(raw, "the plan")
    if name in ("dots3_note",):
        api.apply(source, plan, tmp_path / "out")
        assert api.verify(source, tmp_path / "out", tokens=64, device=DEVICE).passed
        return
    with pytest.raises(UserError, match="cannot have different numbers of experts: transformers"):
        api.apply(source, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_talker_and_a_vision_tower_with_experts_of_their_own(sources, tmp_path):
    """They are not the language model's, and keep all of theirs."""
    source = sources("qwen3_omni_moe_text")
    folder = tmp_path / "speaks"
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    talker = {f"talker.model.layers.0.mlp.experts.{e}.up_proj.weight": torch.randn(4, 4) for e in range(8)}
    talker["talker.model.layers.0.mlp.gate.weight"] = torch.randn(8, 4)
    save_file({**tensors, **talker}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    api.apply(folder, api.plan(folder, "aimer", 4), tmp_path / "out")
    assert api.verify(folder, tmp_path / "out", tokens=64, device=DEVICE).passed
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in talker.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert text_config(config)["num_experts"] == 4
    inventory = take_inventory(open_checkpoint(sources("dots3_note")))
    towers = [claim for claim in inventory.claims if "vision" in claim.info.name and "experts" in claim.info.name]
    assert towers
    assert all(claim.kind == "other" and claim.layer is None for claim in towers)


def test_the_language_model_under_its_old_name(sources, tmp_path):
    """Published Nemotron omni checkpoints have llm_config."""
    source, folder = sources("nemotron_h_omni"), tmp_path / "old"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["llm_config"] = config.pop("text_config")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(source / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})
    api.apply(folder, api.plan(folder, "aimer", 4), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["llm_config"]["n_routed_experts"] == 4
    assert api.verify(folder, tmp_path / "out", tokens=64, device=DEVICE).passed


@pytest.mark.parametrize("model_type", ["ernie4_5_vl_moe", "ernie4_5_moe_vl"])
def test_experts_for_text_and_for_images_in_one_list_are_refused(model_type, checkpoints, tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": model_type, "auto_map": {"AutoConfig": "x.Y"}, "moe_num_experts": [8, 8]})
    )
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="as many of the one kind as of the other"):
        api.plan(tmp_path, "aimer", 4)
    code, _, err = run_cli(capsys, "inspect", tmp_path)
    assert code == 2
    assert "--as" not in err


def test_a_dense_composite_is_refused_as_dense(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma4_unified", "text_config": {"model_type": "gemma4_unified_text"}})
    )
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is a dense model"):
        api.plan(tmp_path, "aimer", 4)

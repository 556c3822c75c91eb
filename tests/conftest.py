"""Tiny random checkpoints of every family, built from the records' own tiny configs; texts and token data for them."""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

import pretended  # noqa: E402
from expertsmith import api  # noqa: E402
from expertsmith.arch import families  # noqa: E402
from expertsmith.engine import load_model  # noqa: E402
from tiny import (  # noqa: E402
    PARTS,
    TINY_DENSE,
    tiny_config,
)

DEVICE = os.environ.get("EXPERTSMITH_DEVICE", "cpu")  # `make test-gpu`: cuda, or `pretended` without a GPU
if DEVICE != "cpu":
    if DEVICE == pretended.NAME:
        pretended.install()
    elif not torch.cuda.is_available():
        pytest.exit(f"EXPERTSMITH_DEVICE is {DEVICE}, but torch sees no GPU", returncode=2)
    load_model.__kwdefaults__["device"] = DEVICE  # of tests that load a model themselves
ONLY = os.environ.get("EXPERTSMITH_FAMILIES", "").split()  # `make test-fast`: one family of each kind
RUN = [  # families with a class of their own; the others are in test_aliases.py
    name
    for name, record in families().items()
    if record.supported and record.runs_as is None and record.no_class is None and (not ONLY or name in ONLY)
]
COMPOSITES = [name for name in RUN if families()[name].composite]  # language models that transformers runs in their whole only
SUPPORTED = [name for name in RUN if name not in COMPOSITES]
KINDS = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "deepseek_v4",
    "gpt_oss",
    "llama4_text",
    "jamba",
    "inkling2_text",
    "longcat_flash",
    "zaya",
    "glm4v_moe_text",
]


def kinds_first(names: list[str]) -> list[Any]:
    """Parameters of a test of every family that takes long in all: the families that are not in `KINDS` are for `make test-slow`."""
    return [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in names]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`, the tests of a family run in one process, which imports its modelling code and makes its checkpoint once."""
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if parameters.get("model_type") in RUN:
            item.add_marker(pytest.mark.xdist_group(parameters["model_type"]))


def random_model(model_type: str, **overrides: object) -> torch.nn.Module:
    """A tiny random model of a family. Constant tensors (biases, norms) get noise, so that they matter."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    record = families()[model_type]
    config = transformers.CONFIG_MAPPING[model_type](**{**tiny_config(model_type), **overrides})
    if record.composite:  # the published class of the whole, with a tiny vision tower
        whole, parts = transformers.CONFIG_MAPPING[record.composite], dict(PARTS.get(model_type, {}))
        if "thinker_config" in parts:
            parts["thinker_config"] = {**parts["thinker_config"], "text_config": config.to_dict()}
        else:
            parts["text_config"] = config.to_dict()
        config = whole(**parts)
    torch.manual_seed(0)
    model = auto_of(config).from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.numel() > 1 and bool((value == value.reshape(-1)[0]).all()):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def save_tiny(model_type: str, folder: Path, **overrides: object) -> Path:
    random_model(model_type, **overrides).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """model_type → directory of its tiny checkpoint."""
    root = tmp_path_factory.mktemp("tiny")

    @cache
    def build(model_type: str) -> Path:
        return save_tiny(model_type, root / model_type)

    return build


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory):
    """(model_type, dtype) → directory of a tiny dense model, with noise on norms and biases."""
    import transformers

    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("dense")

    @cache
    def build(model_type: str, dtype: torch.dtype = torch.float32) -> Path:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[model_type](**TINY_DENSE[model_type]))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "norm" in name or "bias" in name:
                    value.add_(0.1 * torch.randn(value.shape, generator=generator))
        folder = root / f"{model_type}-{dtype}"
        model.to(dtype).save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`--data` arguments of two domains, 16 records of 40 tokens each."""
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(3)
    for domain, low, high in (("a", 3, 60), ("b", 60, 120)):
        rows = [torch.randint(low, high, (40,), generator=generator).tolist() for _ in range(16)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return [f"a={folder / 'a.jsonl'}", f"b={folder / 'b.jsonl'}"]


@pytest.fixture(scope="session")
def brief(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`--data` arguments for healing tiny models: two domains of twelve short sequences each."""
    from to_heal import write_texts

    return write_texts(tmp_path_factory.mktemp("brief"), "a", "b")


@pytest.fixture(scope="session")
def half(checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral with 4 of 8 experts."""
    out = tmp_path_factory.mktemp("half") / "half"
    api.apply(checkpoints("mixtral"), api.plan(checkpoints("mixtral"), "random", 4), out)
    return out


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 250 columns."""
    monkeypatch.setenv("COLUMNS", "250")


def logits(path: Path, **kwargs: object) -> torch.Tensor:
    """What plain transformers computes for some ids, in float32."""
    ids = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return loaded_plainly(path, **kwargs)(ids).logits.float()


def loaded_plainly(path: Path, **kwargs: object) -> torch.nn.Module:
    """The model as a user of transformers has it, from which an omni model's thinker is taken: the whole has no forward."""
    model = auto_class(path).from_pretrained(path, **kwargs).eval()
    return getattr(model, "thinker", model)


def auto_class(path: Path):
    """The Auto class that a user would load a checkpoint with."""
    import transformers

    return auto_of(transformers.AutoConfig.from_pretrained(path))


def auto_of(config: object):
    """The first Auto class that has a model for a config."""
    import transformers

    names = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    return next(auto for auto in (getattr(transformers, name) for name in names) if type(config) in auto._model_mapping)


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of records with input_ids, of different lengths (so batches are padded), over different ids."""
    folder = tmp_path_factory.mktemp("tokens")
    generator = torch.Generator().manual_seed(3)
    for domain, low, high in (("a", 3, 60), ("b", 60, 120)):
        rows = [torch.randint(low, high, (length,), generator=generator).tolist() for length in (24, 17, 24, 9, 24, 24)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def data(token_file: Path) -> list[str]:
    """`--data` arguments of the two domains."""
    return [f"a={token_file / 'a.jsonl'}", f"b={token_file / 'b.jsonl'}"]


@pytest.fixture(scope="session")
def testbed() -> Path:
    """Trained models and text of five domains, where $EXPERTSMITH_TESTBED says they are."""
    root = os.environ.get("EXPERTSMITH_TESTBED")
    if not root:
        pytest.skip("EXPERTSMITH_TESTBED is not set")
    return Path(root)


CALIBRATION = {"seq_len": 24, "pack": False, "batch_tokens": 72, "device": DEVICE}


def run_cli(capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of a command line, in this process."""
    from expertsmith import cli

    old = sys.argv
    sys.argv = ["expertsmith", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = old
    captured = capture.readouterr()
    return code, captured.out, captured.err


def passed(capture, *arguments: object) -> str:
    """Stdout of a command line that has to exit 0."""
    code, out, err = run_cli(capture, *arguments)
    assert code == 0, err
    return out


def strict(text: str):
    """The one JSON value that `text` is; NaN and Infinity are none."""

    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)

"""HEAPr: saliencies by hand and by brute force, widths, the plan and its file, the written checkpoint against the original with silent neurons."""

from __future__ import annotations

import filecmp
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from conftest import CALIBRATION, COMPOSITES, SUPPORTED, kinds_first, loaded_plainly, run_cli
from expertsmith import api
from expertsmith.arch import families, text_config
from expertsmith.calibration.gradients import NAMES, groups
from expertsmith.calibration.stats import LayerStatistics, layer_path, load_statistics
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import load_model
from expertsmith.engine.layout import experts_of, in_memory, routing_of
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.experts.weights import neurons_in
from expertsmith.methods import find
from expertsmith.methods.base import Facts
from expertsmith.methods.neurons import cut, ranked, rounded, rounding, shared_out
from expertsmith.planning.neurons import sizes_of
from expertsmith.planning.plan import load_plan, neurons_file, parse_plan
from expertsmith.surgery.neurons import silenced
from mtp import save_with_mtp
from quantise import quantise_checkpoint

EVERY = pytest.mark.parametrize("model_type", kinds_first([*SUPPORTED, *COMPOSITES]))
SHAPE = {**CALIBRATION, "overlong": "truncate"}
IDS = torch.randint(3, 120, (2, 17), generator=torch.Generator().manual_seed(0))
WRITTEN = (
    "mixtral",
    "qwen2_moe",
    "deepseek_v2",
    "gpt_oss",
    "nemotron_h",
    "jamba",
)  # the kinds of layouts and of shared experts


def by_hand() -> LayerStatistics:
    """Two experts of two neurons. Expert 0 has two tokens with h = (1, 2) and (3, 0) and dL/dh = (2, 1) and (0, 4); expert 1 has none. Four
    tokens in all."""
    sums = {
        "tokens": np.array([4]),
        "selections": np.array([2, 0]),
        "neuron_sq_sum": np.array([[10.0, 4.0], [0.0, 0.0]]),
        "neuron_grad_sq_sum": np.array([[4.0, 17.0], [0.0, 0.0]]),
        "neuron_product_sq_sum": np.array([[4.0, 4.0], [0.0, 0.0]]),
    }
    return LayerStatistics(0, {"a": sums})


def test_saliency_by_hand():
    """Means of h² are 5 and 2, of the squared gradient 2 and 8.5, of the squared product 2 and 2. Expert 1 has no tokens."""
    method, facts = find("heapr"), Facts(0, 2)
    assert method(by_hand(), facts).tolist() == [[5.0, 8.5], [-1, -1]]
    assert method(by_hand(), facts, form="exact").tolist() == [[1.0, 1.0], [-1, -1]]
    assert method(by_hand(), facts, weight="frequency").tolist() == [[2.5, 4.25], [-1, -1]]


def test_the_quadratic_form_needs_no_d_by_d_matrix():
    """The card's W_d[:, c]^T G W_d[:, c] with G = mean(u u^T) is the mean of (dL/dh_c)², as W_d[:, c]^T u = dL/dh_c; in float64."""
    draw = np.random.default_rng(0)
    down, u, h = draw.normal(size=(7, 5)), draw.normal(size=(40, 7)), draw.normal(size=(40, 5))
    second = u.T @ u / 40
    of_card = 0.5 * (h**2).mean(0) * np.einsum("dc,de,ec->c", down, second, down)
    gradient = u @ down
    sums = {
        "tokens": np.array([40]),
        "selections": np.array([40]),
        "neuron_sq_sum": (h**2).sum(0)[None],
        "neuron_grad_sq_sum": (gradient**2).sum(0)[None],
        "neuron_product_sq_sum": ((h * gradient) ** 2).sum(0)[None],
    }
    held = LayerStatistics(0, {"a": sums})
    assert find("heapr")(held, Facts(0, 1))[0] == pytest.approx(of_card, rel=1e-12)
    exact = 0.5 * np.array([np.mean([(row[c] * (down[:, c] @ v)) ** 2 for row, v in zip(h, u, strict=True)]) for c in range(5)])
    assert find("heapr")(held, Facts(0, 1), form="exact")[0] == pytest.approx(exact, rel=1e-12)


@pytest.fixture(scope="module")
def statistics(checkpoints, data, tmp_path_factory):
    root = tmp_path_factory.mktemp("neurons")

    @cache
    def get(model_type: str) -> Path:
        api.calibrate(checkpoints(model_type), data, root / model_type, neurons=True, memory="resident", **SHAPE)
        return root / model_type

    return get


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_statistics_against_brute_force(model_type, checkpoints, statistics, data):
    """The whole model in float64, sequence by sequence without padding, every slot of the experts computed by itself from their matrices."""
    inventory = take_inventory(open_checkpoint(checkpoints(model_type)))
    record = inventory.architecture
    model = load_model(inventory.checkpoint, record)
    model.module.double()
    model.module.get_input_embeddings().weight.requires_grad_(True)
    count = inventory.num_experts
    kept: list[tuple[int, int, torch.Tensor]] = []

    def forward_of(layer: int):
        experts = experts_of(model.layers[layer], record)

        def forward(x, *args, **kwargs):
            selected, weights = (part.reshape(-1, part.shape[-1]) for part in routing_of(args, kwargs))
            rows = x.reshape(-1, x.shape[-1])
            out = []
            for t, row in enumerate(rows):
                total = torch.zeros_like(row)
                for expert, g in zip(selected[t].tolist(), weights[t], strict=True):
                    views = in_memory(experts, record, expert, count)
                    made = {role: views[role, True] @ row + views.get((role, False), 0) for role in ("gate", "up")}
                    if model_type == "gpt_oss":  # its own activation
                        gate, up = made["gate"].clamp(max=7.0), made["up"].clamp(-7.0, 7.0)
                        h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                    else:
                        h = torch.nn.functional.silu(made["gate"]) * made["up"]
                    h.retain_grad()
                    kept.append((layer, expert, h))
                    total = total + g * (views["down", True] @ h + views.get(("down", False), 0))
                out.append(total)
            return torch.stack(out).reshape(x.shape)

        return forward

    for layer in inventory.layers:
        experts_of(model.layers[layer], record).forward = forward_of(layer)
    width = neurons_in(inventory, inventory.layers[0])
    wanted = {layer: {name: np.zeros((count, width)) for name in NAMES} for layer in inventory.layers}
    with torch.enable_grad():
        for text in data:
            for line in Path(text.partition("=")[2]).read_text().splitlines():
                ids = torch.tensor([json.loads(line)["input_ids"]])
                kept.clear()
                logits = model.module(ids, use_cache=False).logits[0, :-1]
                torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
                for layer, expert, h in kept:
                    value, gradient = h.detach().numpy(), h.grad.numpy()
                    for name, square in zip(NAMES, (value**2, gradient**2, (value * gradient) ** 2), strict=True):
                        wanted[layer][name][expert] += square
    found = load_statistics(statistics(model_type))
    for layer, sums in wanted.items():
        for name, values in sums.items():
            assert np.abs(found.layers[layer].total(name) - values).max() < 2e-4 * np.abs(values).max(), (layer, name)


@EVERY
def test_streamed_gradients_have_the_bits_of_resident_ones(model_type, checkpoints, statistics, data, tmp_path):
    api.calibrate(checkpoints(model_type), data, tmp_path / "s", neurons=True, memory="stream", **SHAPE)
    layers = load_statistics(tmp_path / "s").layers
    for layer, entry in layers.items():
        assert filecmp.cmp(layer_path(statistics(model_type), layer), layer_path(tmp_path / "s", layer), shallow=False)
        for sums in entry.domains.values():
            assert all((sums[name] >= 0).all() and sums[name].any() for name in NAMES)
            assert ((sums["neuron_sq_sum"] > 0).any(1) == (sums["selections"] > 0)).all()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v4"])
def test_gradients_do_not_depend_on_batches(model_type, checkpoints, statistics, data, tmp_path, monkeypatch):
    """One sequence a batch, so without padding; and streamed in groups of one batch."""
    from expertsmith.calibration import gradients

    monkeypatch.setattr(gradients, "STATES", 1)
    options = {**SHAPE, "batch_tokens": 1, "memory": "stream"}
    api.calibrate(checkpoints(model_type), data, tmp_path / "s", neurons=True, **options)
    mine, theirs = load_statistics(tmp_path / "s"), load_statistics(statistics(model_type))
    for layer, entry in theirs.layers.items():
        for name in NAMES:
            values = entry.total(name)
            assert np.abs(mine.layers[layer].total(name) - values).max() < 1e-4 * values.max()


def test_a_streamed_pass_is_cut_into_groups(checkpoints, monkeypatch):
    from expertsmith.calibration import gradients
    from expertsmith.engine import Batch

    inventory = take_inventory(open_checkpoint(checkpoints("mixtral")))
    ids = torch.ones(2, 10, dtype=torch.long)
    batches = [Batch(ids, ids.bool(), "a", [0, 1]) for _ in range(5)]
    monkeypatch.setattr(gradients, "STATES", 2 * 20 * 32 * 3 * 4)  # of two batches: tokens * hidden * layers * bytes
    sizes = {}
    for memory in ("resident", "stream"):
        model = load_model(inventory.checkpoint, inventory.architecture, memory=memory)
        sizes[memory] = [len(group) for group in groups(model, batches)]
    assert sizes == {"resident": [1] * 5, "stream": [2, 2, 1]}


def test_interrupted_calibration_keeps_its_gradients(checkpoints, statistics, data, tmp_path, monkeypatch):
    from expertsmith.calibration import gradients, runner

    def interrupted(*args):
        raise KeyboardInterrupt

    whole = statistics("mixtral")  # made before anything is replaced
    watch = runner._Run.observe
    monkeypatch.setattr(runner._Run, "observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        api.calibrate(checkpoints("mixtral"), data, tmp_path / "s", neurons=True, memory="resident", **SHAPE)
    assert (tmp_path / "s" / gradients.FILE).is_file()
    monkeypatch.setattr(runner._Run, "observe", watch)
    monkeypatch.setattr(gradients, "collect_gradients", interrupted)
    api.calibrate(checkpoints("mixtral"), data, tmp_path / "s", neurons=True, memory="resident", **SHAPE)
    assert not (tmp_path / "s" / gradients.FILE).exists()
    for layer in load_statistics(tmp_path / "s").layers:
        assert filecmp.cmp(layer_path(whole, layer), layer_path(tmp_path / "s", layer), shallow=False)


# --- widths ---


@pytest.mark.parametrize(
    ("width", "multiple"), [(14336, 64), (1408, 64), (768, 64), (512, 64), (480, 32), (500, 8), (96, 8), (24, 8), (8, 8)]
)
def test_default_rounding(width, multiple):
    """The largest power of two from 8 to 64 that divides the width and is at most an eighth of it, or 8."""
    assert rounding(width) == multiple


def test_one_width_for_the_model():
    saliency = {0: np.ones((2, 96)), 3: np.zeros((2, 96))}
    assert cut(saliency, 0.75) == {0: [72, 72], 3: [72, 72]}
    assert cut(saliency, 0.7) == {0: [64, 64], 3: [64, 64]}  # 67.2 / 8 = 8.4
    assert cut(saliency, 0.71) == {0: [72, 72], 3: [72, 72]}  # 68.2 / 8 = 8.5
    assert cut(saliency, 0.75, multiple=32) == {0: [64, 64], 3: [64, 64]}
    assert cut(saliency, 0.01) == {0: [8, 8], 3: [8, 8]}
    assert cut(saliency, 1.0) == {0: [96, 96], 3: [96, 96]}


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((96, 96), {"multiple": 128}, "cannot be rounded to multiples of 128"),
        ((4, 4), {}, "cannot be rounded to multiples of 8"),
        ((96, 96), {"multiple": 4}, "rows of 16 bytes"),
        ((96, 64), {}, "64 to 96 neurons"),
    ],
)
def test_widths_that_cannot_be(sizes, options, message):
    with pytest.raises(UserError, match=message):
        cut({layer: np.ones((2, size)) for layer, size in enumerate(sizes)}, 0.5, **options)


def test_widths_by_hand():
    """Eight neurons stay of sixteen: 8 7 6 5 | 4 4 in the first layer, 3 3 | in the second. No expert loses all: the last with two gives one."""
    saliency = {
        0: np.array([[8.0, 7, 6, 5], [4, 4, 1, 1]]),
        1: np.array([[3.0, 3, 0, 0], [0, 0, 0, 0]]),
    }
    assert {n: list(kept) for n, kept in ranked(saliency, 0.5).items()} == {0: [4, 2], 1: [2, 0]}
    one, two = {0: 1, 1: 1}, {0: 2, 1: 2}
    assert rounded(saliency, 0.5, "ragged", one) == {0: [4, 2], 1: [1, 1]}
    assert rounded(saliency, 0.5, "layer", one) == {0: [3, 3], 1: [1, 1]}
    assert rounded(saliency, 0.5, "layer", two) == {0: [2, 2], 1: [2, 2]}
    assert rounded(saliency, 0.5, "model", two) == {0: [2, 2], 1: [2, 2]}


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=8),
)
def test_shared_out_never_exceeds_what_is_wanted(rows):
    """Every party between one unit and its limit; in all no more than wanted unless the least is; no unit is left that fits."""
    wanted, units = [min(row[0], row[1] * row[2]) for row in rows], [(row[1], row[2]) for row in rows]
    found = shared_out(wanted, units)
    assert all(1 <= parts <= most for parts, (_, most) in zip(found, units, strict=True))
    total = sum(parts * size for parts, (size, _) in zip(found, units, strict=True))
    assert total <= sum(wanted) or all(parts == 1 for parts in found)
    spare = sum(wanted) - total
    if all(count >= size for count, (size, _) in zip(wanted, units, strict=True)):
        assert all(size > spare or parts == most for parts, (size, most) in zip(found, units, strict=True))


# --- plans and checkpoints ---


def made(source: Path, stats: Path, keep: float = 0.5, **options):
    return api.plan(source, "heapr", keep, stats=stats, options=options)


def total_bytes(path: Path) -> tuple[int, int]:
    held = open_checkpoint(path)
    return held.numel, held.nbytes


@EVERY
def test_written_checkpoint_equals_the_original_with_silent_neurons(model_type, checkpoints, statistics, tmp_path):
    """Half of the neurons, in the stock form if the family has one, else a width a layer; the sizes in the plan are those of the files."""
    source, record = checkpoints(model_type), families()[model_type]
    width = "model"
    if record.sized_by_width == "more":
        with pytest.raises(UserError, match="sizes other modules too"):
            made(source, statistics(model_type))
        width = "layer"
    if model_type == "llama4_text":
        with pytest.raises(UserError, match="the layout of its experts"):
            made(source, statistics(model_type), width="layer")
        return
    plan = made(source, statistics(model_type), width=width)
    assert plan.dumps() == made(source, statistics(model_type), width=width).dumps()
    assert all(len(entry.keep) == entry.num_experts for entry in plan.layers)
    api.apply(source, plan, tmp_path / "out")
    verdict = api.verify(source, tmp_path / "out", tokens=256, memory="stream")
    assert verdict.passed, verdict
    assert verdict.largest < 2e-5
    assert (plan.summary.parameters[1], plan.summary.bytes[1]) == total_bytes(tmp_path / "out")
    assert plan.summary.bytes[1] < plan.summary.bytes[0]
    if width == "model" and not record.composite:
        config = text_config(json.loads((tmp_path / "out" / "config.json").read_text()))
        assert "auto_map" not in config
        assert take_inventory(open_checkpoint(tmp_path / "out")).counts == take_inventory(open_checkpoint(source)).counts
        loaded_plainly(tmp_path / "out")(IDS)


@pytest.mark.parametrize("model_type", WRITTEN)
def test_kept_rows_and_columns_keep_their_bytes(model_type, checkpoints, statistics, tmp_path):
    """Every expert's matrices and biases, taken apart by role, against the source's at the kept places."""
    from expertsmith.arch.base import split

    source = checkpoints(model_type)
    plan = made(source, statistics(model_type), width="layer" if model_type == "jamba" else "model")
    api.apply(source, plan, tmp_path / "out")
    before = take_inventory(open_checkpoint(source))
    after = take_inventory(open_checkpoint(tmp_path / "out"), novices=True)
    for layer in before.layers:
        for expert, ids in enumerate(plan.kept_neurons(layer)):
            pairs = zip(before.expert_claims(layer)[expert], after.expert_claims(layer)[expert], strict=True)
            for old, new in pairs:
                assert old.info.name == new.info.name
                layout = before.layout(old)
                mine, theirs = split(layout, before.rows(old, expert)), split(layout, after.rows(new, expert))
                for role, matrix in mine.items():
                    kept = slice(None) if role == "down" and matrix.dim() == 1 else torch.from_numpy(ids.astype(np.int64))
                    wanted = matrix[:, kept] if role == "down" and matrix.dim() == 2 else matrix[kept]
                    assert torch.equal(theirs[role], wanted), (old.info.name, role)


@pytest.mark.parametrize("width", ["layer", "ragged"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_own_widths(model_type, width, memory, checkpoints, statistics, tmp_path):
    """Written, proven, loaded again, and by plain transformers if a layer's experts have one width."""
    source = checkpoints(model_type)
    plan = made(source, statistics(model_type), 0.6, width=width)
    assert plan.one_width is None
    counts = [set(held.counts) for held in plan.neurons.values()]
    assert all(len(held) == 1 for held in counts) == (width == "layer")
    api.apply(source, plan, tmp_path / "out")
    verdict = api.verify(source, tmp_path / "out", tokens=128, memory=memory)
    assert verdict.passed, verdict
    assert verdict.largest < 2e-5
    assert plan.summary.bytes[1] == total_bytes(tmp_path / "out")[1]
    inventory = take_inventory(open_checkpoint(source))
    with torch.no_grad():
        from expertsmith.engine.uneven import load

        mine = load(tmp_path / "out").eval()(IDS).logits
        model = load_model(inventory.checkpoint, inventory.architecture)
        with silenced(model, plan):
            theirs = model.module(IDS).logits
        assert torch.equal(
            model.module(IDS).logits, load_model(inventory.checkpoint, inventory.architecture).module(IDS).logits
        )
        assert (mine - theirs).abs().max() < 2e-5 * theirs.abs().max()
        if width == "layer":
            import transformers

            loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
            assert (loaded(IDS).logits - theirs).abs().max() < 2e-5 * theirs.abs().max()
            loaded.save_pretrained(tmp_path / "again")
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
            assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    with pytest.raises(UserError, match="have lost neurons"):
        api.plan(tmp_path / "out", "aimer", 0.5)
    found = {entry.rule.id for entry in api.lint(tmp_path / "out")}
    assert {"vllm-neurons", "sglang-neurons", "llama.cpp-neurons"} <= found
    assert ("transformers-ragged" in found) == (width == "ragged")
    assert "lost neurons" in api.inspect(tmp_path / "out")["notes"]


def test_shared_experts_are_filled_up_with_zeros(checkpoints, statistics, tmp_path):
    """Routed experts have 16 neurons, so two shared experts of 24 become three of 16; at 8 they would be six, and one of 24 two of 16."""
    for model_type, keys, shared in (("ernie4_5_moe", "moe_num_shared_experts", 3), ("deepseek_v3", "n_shared_experts", 2)):
        source = checkpoints(model_type)
        api.apply(source, made(source, statistics(model_type), 0.75), tmp_path / model_type)
        config = json.loads((tmp_path / model_type / "config.json").read_text())
        assert (config["moe_intermediate_size"], config[keys]) == (16, shared)
        before, after = open_checkpoint(source), open_checkpoint(tmp_path / model_type)
        names = [name for name in before.tensors if "shared_experts" in name]
        assert len(names) == 6
        for name in names:
            old, new = (held.read(name).T if "down" in name else held.read(name) for held in (before, after))
            assert new.shape[0] == 16 * shared
            assert torch.equal(new[: old.shape[0]], old)
            assert not new[old.shape[0] :].any()


def test_an_expert_without_tokens_keeps_neurons_by_its_weights(checkpoints, data, tmp_path):
    """One short sequence reaches few experts; the others' neurons are the largest, and the plan says so."""
    (tmp_path / "short.jsonl").write_text('{"input_ids": [5, 9, 11]}\n')
    source = checkpoints("qwen3_moe")
    plan = api.plan(source, "heapr", 0.75, data=[str(tmp_path / "short.jsonl")], out=tmp_path / "plan.json", **SHAPE)
    assert any("chosen by their weights" in note for note in plan.notes)
    inventory, layer = take_inventory(open_checkpoint(source)), plan.layers[-1].layer
    idle = plan.layers[-1].why["selections"].index(0)
    sizes = sizes_of(inventory, layer)[idle]
    assert plan.kept_neurons(layer)[idle].tolist() == sorted(np.argsort(-sizes)[:16].tolist())


@pytest.mark.parametrize("width", ["model", "layer"])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_multi_token_prediction(model_type, width, data, tmp_path):
    """With one width for the model its experts lose neurons too, chosen by their weights, and run as in the original with those silent; with a width
    a layer they stay as they are."""
    source, out = tmp_path / "m", tmp_path / "out"
    save_with_mtp(model_type, source)
    found = api.calibrate(source, data, tmp_path / "s", neurons=True, **SHAPE)
    plan = made(source, found, 0.5, width=width)
    ahead = plan.layers[-1]
    assert ahead.mtp
    assert (ahead.neurons is not None) == (width == "model")
    assert any("by their weights alone" in note for note in plan.notes) == (width == "model")
    api.apply(source, plan, out)
    verdict = api.verify(source, out, tokens=128, device="cpu")
    assert verdict.passed, verdict
    assert verdict.largest < 2e-5
    assert ("different numbers of neurons" in (verdict.mtp_not_compared or "")) == (width == "layer")
    inventory = take_inventory(open_checkpoint(source))
    before, after = (open_checkpoint(path) for path in (source, out))
    matrices = [claim.info.name for claim in inventory.claims if claim.mtp and claim.routed]
    smaller = [after.tensors[name].nbytes < before.tensors[name].nbytes for name in matrices]
    assert len(matrices) >= ahead.num_experts
    assert all(smaller) if width == "model" else not any(smaller)
    api.apply(source, made(source, found, 0.5, width=width), tmp_path / "again")
    assert filecmp.cmp(out / "model.safetensors", tmp_path / "again" / "model.safetensors", shallow=False)


def test_keep_all_changes_nothing(checkpoints, statistics, tmp_path):
    source = checkpoints("deepseek_v2")
    plan = made(source, statistics("deepseek_v2"), 1.0)
    assert not plan.neurons
    api.apply(source, plan, tmp_path / "out")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert set(before.tensors) == set(after.tensors)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_plan_round_trip_and_its_file(checkpoints, statistics, tmp_path):
    plan = made(checkpoints("mixtral"), statistics("mixtral"))
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    assert all((a == b).all() for a, b in zip(loaded.kept_neurons(0), plan.kept_neurons(0), strict=True))
    beside = neurons_file(tmp_path / "plan.json")
    held = load_file(beside)
    for wrong, message in (
        ({**held, "0": held["0"][:-1]}, "are not those of the plan"),
        ({**held, "0": held["0"][::-1].copy()}, "are not those of the plan"),
    ):
        save_file(wrong, beside)
        with pytest.raises(UserError, match=message):
            load_plan(tmp_path / "plan.json")
    beside.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        load_plan(tmp_path / "plan.json")
    beside.unlink()
    with pytest.raises(UserError, match="does not say which"):
        api.apply(checkpoints("mixtral"), tmp_path / "plan.json", tmp_path / "out")


def test_numbers_of_neurons_are_checked(checkpoints, statistics):
    from expertsmith.planning.plan import digest_ids

    plan = made(checkpoints("mixtral"), statistics("mixtral"))
    ids = {layer: np.concatenate(plan.kept_neurons(layer)) for layer in plan.neurons}
    for change in (lambda v: v[::-1], lambda v: v + 24):
        wrong = {**ids, 0: np.ascontiguousarray(change(ids[0]))}
        raw = json.loads(plan.dumps())
        raw["layers"][0]["neurons"]["sha256"] = digest_ids(wrong[0])
        with pytest.raises(UserError, match="must be ascending numbers below 24"):
            parse_plan(raw, "plan").with_neurons(wrong, "plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["neurons"].update(counts=[12] * 7), "7 counts for 8 experts"),
        (lambda e: e["neurons"].update(counts=[0] + [12] * 7), "keeps 0 of 24 neurons"),
        (lambda e: e["neurons"].update(counts=[25] + [12] * 7), "keeps 25 of 24 neurons"),
        (lambda e: e["neurons"].update(extra=1), "unknown key"),
        (lambda e: e.update(keep=[0, 1, 2]), "only if all experts are kept"),
    ],
)
def test_bad_plans_are_refused(change, message, checkpoints, statistics):
    raw = json.loads(made(checkpoints("mixtral"), statistics("mixtral")).dumps())
    change(raw["layers"][0])
    with pytest.raises(UserError, match=message):
        parse_plan(raw, "plan")


def test_plan_of_another_width_is_refused(checkpoints, statistics, tmp_path):
    plan = made(checkpoints("mixtral"), statistics("mixtral"))
    entries = [entry.model_copy(update={"neurons": entry.neurons.model_copy(update={"width": 30})}) for entry in plan.layers]
    with pytest.raises(UserError, match="experts of 30 neurons, but those of the checkpoint have 24"):
        api.apply(checkpoints("mixtral"), plan.model_copy(update={"layers": entries}), tmp_path / "out")


def test_a_wrong_neuron_fails_verification(checkpoints, statistics, tmp_path):
    """The output of another choice of neurons is not that of the plan."""
    source = checkpoints("mixtral")
    api.apply(source, made(source, statistics("mixtral")), tmp_path / "out")
    other = made(source, statistics("mixtral"), form="exact", weight="frequency")
    ids = {layer: np.concatenate(other.kept_neurons(layer)) for layer in other.neurons}
    assert any((np.concatenate(load_plan(tmp_path / "out/expertsmith/plan.json").kept_neurons(n)) != ids[n]).any() for n in ids)
    verdict = api.verify(source, tmp_path / "out", plan=other, tokens=64)
    assert not verdict.passed
    assert any("experts" in name for name in verdict.wrong_tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", "4"), "keeps a share of every expert's neurons"),
        (("--keep", "0.5", "-O", "multiple=99"), "option multiple is 99"),
        (("--keep", "0.5", "-O", "form=both"), "form of heapr is 'both'"),
        (("--keep", "0.5", "--router-groups", "flatten"), "leaves the router unchanged"),
        (("--keep", "0.5", "--budget", "global"), "has no budget 'global'"),
        (("--fit", "1MB",), "does not go with"),
    ],
)  # fmt: skip
def test_wrong_requests(arguments, message, checkpoints, statistics, tmp_path, capfd):
    given = ("plan", checkpoints("deepseek_v2"), "-m", "heapr", "--stats", statistics("deepseek_v2"))
    code, _, err = run_cli(capfd, *given, *arguments, "-o", tmp_path / "plan.json")
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "plan.json").exists()


def test_statistics_without_gradients_are_refused(checkpoints, data, tmp_path):
    api.calibrate(checkpoints("mixtral"), data, tmp_path / "s", **SHAPE)
    with pytest.raises(UserError, match="calibrate again with --neurons"):
        made(checkpoints("mixtral"), tmp_path / "s")


def test_quantised_and_stacked_checkpoints_are_refused(checkpoints, statistics, tmp_path):
    quantise_checkpoint(checkpoints("mixtral"), tmp_path / "q", "fp8_tensor")
    with pytest.raises(UserError, match="it is quantised"):
        made(tmp_path / "q", statistics("mixtral"))
    with pytest.raises(UserError, match="stacks the experts of a layer"):
        made(checkpoints("gpt_oss"), statistics("gpt_oss"), width="ragged")


@pytest.mark.slow
def test_two_ranks_have_the_plan_of_one(checkpoints, statistics, data, tmp_path):
    import subprocess
    import sys

    source = checkpoints("qwen2_moe")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "expertsmith",
        "calibrate",
        str(source),
    ]
    command += [part for text in data for part in ("--data", text)]
    command += [
        "-o",
        str(tmp_path / "s"),
        "--neurons",
        "--seq-len",
        "24",
        "--no-pack",
        "--batch-tokens",
        "72",
        "--device",
        "cpu",
        "-q",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    mine, theirs = load_statistics(tmp_path / "s"), load_statistics(statistics("qwen2_moe"))
    for layer, entry in theirs.layers.items():
        for name in NAMES:
            assert mine.layers[layer].total(name) == pytest.approx(entry.total(name), rel=1e-6)
    two, one = made(source, tmp_path / "s"), made(source, statistics("qwen2_moe"))
    assert all((a == b).all() for n in one.neurons for a, b in zip(two.kept_neurons(n), one.kept_neurons(n), strict=True))


def test_compress_and_compare(checkpoints, data, texts, tmp_path):
    """The verbs that run other verbs know the method, and what it needs."""
    source, shape = checkpoints("qwen2_moe"), {"seq_len": 40, "pack": False, "device": CALIBRATION["device"]}
    done = api.compress(source, "heapr", 0.75, out=tmp_path / "out", data=texts, **shape)
    assert done["verify"].passed
    assert done["plan"].one_width == 16
    methods = ["heapr", "heapr:form=exact,width=layer", "heapr:width=ragged", "reap"]
    found = api.compare(source, methods, [0.75], texts, texts, tmp_path / "c", **shape)
    rows = {row["plan"]: row for group in found["groups"] for row in group["rows"] if "plan" in row}
    assert len([name for name in rows if "heapr" in name]) == 3
    assert all(np.isfinite(row["rise"]["mean"]).all() for row in rows.values())
    assert run_heal(source, tmp_path / "out", texts, tmp_path / "healed", shape)


def run_heal(source: Path, out: Path, texts: list[str], healed: Path, shape) -> bool:
    api.heal(out, source, texts, healed, method="least_squares", **shape)
    return take_inventory(open_checkpoint(healed)).config["moe_intermediate_size"] == 16

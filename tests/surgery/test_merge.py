"""Merged experts: alignment of neurons, merged tensors in every layout, and the written checkpoint against the merged reference."""

from __future__ import annotations

import itertools
import math
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CALIBRATION, DEVICE, SUPPORTED
from expertsmith import api
from expertsmith.checkpoint import OutputTensor, open_checkpoint, write_checkpoint
from expertsmith.checkpoint.writer import Made, chunks
from expertsmith.engine import Batch, Walk, load_model
from expertsmith.errors import UserError
from expertsmith.experts.inventory import take_inventory
from expertsmith.experts.weights import split
from expertsmith.planning.plan import LayerPlan, Merge, Method, Plan, Source
from expertsmith.surgery.apply import apply_plan
from expertsmith.surgery.mask import masked
from expertsmith.surgery.merge import alignment, check_merges, merged, ordered, router_row

# alignment


def random_expert(neurons=6, width=5, seed=0, gated=True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (neurons, width), "up": (neurons, width), "down": (width, neurons)}
    return {role: torch.randn(shape, generator=generator) for role, shape in shapes.items() if gated or role != "gate"}


def shuffled(expert: dict[str, torch.Tensor], order: torch.Tensor) -> dict[str, torch.Tensor]:
    return {role: value[:, order] if role == "down" else value[order] for role, value in expert.items()}


def run_expert(expert: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    hidden = x @ expert["up"].T
    hidden = torch.nn.functional.silu(x @ expert["gate"].T) * hidden if "gate" in expert else hidden.relu()
    return hidden @ expert["down"].T


def pairs(reference, target):
    return [(role, reference[role], target[role]) for role in reference]


def test_assignment_of_two_neurons():
    """Profit [[1, 2], [2, 5]]: the diagonal's 6 beats 4."""
    assert alignment([("up", torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 5.0]]))]).tolist() == [0, 1]


@pytest.mark.parametrize("gated", [True, False])
def test_alignment_recovers_a_shuffled_expert(gated):
    reference = random_expert(gated=gated)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    target = shuffled(reference, order)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(run_expert(reference, x), run_expert(target, x), atol=1e-6)
    found = alignment(pairs(reference, target))
    back = shuffled(target, found)
    assert all(torch.equal(back[role], reference[role]) for role in reference)


@pytest.mark.parametrize("seed", range(5))
def test_alignment_is_the_best_of_all_permutations(seed):
    reference, target = random_expert(5, seed=seed), random_expert(5, seed=seed + 100)

    def distance(order) -> float:
        moved = shuffled(target, torch.tensor(order))
        return sum(float((reference[r].double() - moved[r].double()).square().sum()) for r in reference)

    best = min(distance(order) for order in itertools.permutations(range(5)))
    assert distance(alignment(pairs(reference, target)).tolist()) == pytest.approx(best, rel=1e-6)


def test_alignment_refuses_nan():
    broken = random_expert()
    broken["up"][0, 0] = math.nan
    with pytest.raises(UserError, match="NaN or inf"):
        alignment(pairs(random_expert(), broken))


@pytest.mark.parametrize("layout", ["gate", "up", "down", "down_t", "gate_up", "gate_up_t", "alternating", "alternating_t"])
def test_neurons_move_in_every_layout(layout):
    """Reordering the stored tensor is reordering every projection in it; biases of gate and up move, those of down stay."""
    order = torch.tensor([2, 0, 1])
    roles = split(layout, torch.empty(2))
    for dims in (2, 1):
        rows = 3 * len(roles)
        shape = (rows,) if dims == 1 else (rows, 4)
        if "down" in roles:
            shape = (4,) if dims == 1 else (4, 3)
        tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
        tensor = tensor.T.contiguous() if layout.endswith("_t") and dims == 2 else tensor
        moved = split(layout, ordered(layout, tensor, order))
        for role, before in split(layout, tensor).items():
            if role == "down":
                assert torch.equal(moved[role], before[:, order] if dims == 2 else before)
            else:
                assert torch.equal(moved[role], before[order])


# router rows


def merge_of(into: int, sources: list[int], weights: list[float], **options) -> Merge:
    return Merge(**{"into": into, "from": sources, "weights": weights, **options})


def test_router_rows():
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert router_row(rows, merge_of(1, [0, 1], [0.5, 0.5]), False, torch.float32).tolist() == [3, 6]
    assert router_row(rows, merge_of(1, [0, 1], [0.5, 1.5], router="mean"), False, torch.float32).tolist() == [2.5, 5]
    biases = torch.tensor([[2.0], [4.0]])
    mean = merge_of(0, [0, 1], [0.25, 0.75], router="mean")
    assert router_row(biases, mean, False, torch.float32).tolist() == [3.5]
    assert router_row(biases, mean, True, torch.float32).tolist() == pytest.approx([3.5 + math.log(2)])


def test_log_count_restores_the_probability_of_equal_rows():
    """Logits z, z of a group and z' of another: with ln 2, 2e^z / (2e^z + e^z')."""
    z, other = 0.3, -0.7
    alone = float(router_row(torch.tensor([[z], [z]]), merge_of(0, [0, 1], [0.5, 0.5], log_count=True), True, torch.float32))
    probability = torch.tensor([alone, other]).softmax(0)[0]
    assert float(probability) == pytest.approx(2 * math.exp(z) / (2 * math.exp(z) + math.exp(other)), rel=1e-6)


# checkpoints


def plan_for(inventory, merges: dict[int, list[Merge]], dropped: dict[int, list[int]] | None = None, **options) -> Plan:
    n = inventory.num_experts
    layers = []
    for layer in inventory.layers:
        gone = {e for merge in merges[layer] for e in merge.sources if e != merge.into} | set((dropped or {}).get(layer, []))
        layers.append(LayerPlan(layer=layer, num_experts=n, keep=[e for e in range(n) if e not in gone], merge=merges[layer]))
    source = Source(model_type=inventory.architecture.model_type, fingerprint=inventory.checkpoint.fingerprint)
    return Plan(method=Method(name="by_hand"), model=source, layers=layers, **options)


def random_plan(inventory, seed: int = 0, **options) -> Plan:
    """Half of the experts stay: in every expert_group a merge of three into one, or two of two; one more expert is dropped where there is
    room, and the merged experts change from layer to layer."""
    random = np.random.default_rng(seed)
    groups, n = inventory.rules.groups, inventory.num_experts
    size = n // groups
    merges, dropped = {}, {}
    for layer in inventory.layers:
        merges[layer], dropped[layer] = [], []
        for group in range(groups):
            ids = (group * size + random.permutation(size)).tolist()
            sources = sorted(ids[: size // 2 + 1] if groups > 1 else ids[: size // 2])
            weights = random.dirichlet(np.ones(len(sources)) * 3).tolist()
            merges[layer].append(merge_of(sources[int(random.integers(len(sources)))], sources, weights, **options))
            if groups == 1:
                dropped[layer].append(ids[size // 2])
    return plan_for(inventory, merges, dropped)


@cache
def token_batches() -> list[Batch]:
    ids = torch.randint(3, 120, (4, 24), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[3, 15:] = False
    return [Batch(ids[i : i + 2], mask[i : i + 2], "a", [i, i + 1]) for i in (0, 2)]


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    with Walk(model, token_batches()) as walk:
        for _ in walk.layers():
            pass
        return torch.cat([out.logits[batch.mask] for out, batch in zip(walk.outputs(), token_batches(), strict=True)])


def inventory_of(folder: Path):
    return take_inventory(open_checkpoint(folder))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_written_checkpoint_equals_the_merged_original(model_type, checkpoints, tmp_path):
    """Aligned merges with averaged router rows, a dropped expert beside them; the reference resident and streamed, and afterwards as before."""
    inventory = inventory_of(checkpoints(model_type))
    plan = random_plan(inventory, align="weights", router="mean")
    apply_plan(plan, inventory, tmp_path / "out")
    output = inventory_of(tmp_path / "out")
    assert output.num_experts == plan.uniform_count < inventory.num_experts
    written = logits_of(load_model(output.checkpoint, output.architecture))
    before = None
    for memory in ("resident", "stream"):
        source = load_model(inventory.checkpoint, inventory.architecture, memory=memory)
        with masked(source, plan.kept, inventory.num_experts):
            before = logits_of(source) if before is None else before
            with merged(source, plan, inventory):
                reference = logits_of(source)
            assert torch.equal(logits_of(source), before)
        scale = reference.abs().max()
        assert (reference - written).abs().max() < 2e-5 * scale
        assert (reference - before).abs().max() > 1e-4 * scale  # merging is not dropping


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("hc_smoe", {}), ("hc_smoe", {"clustering": "kmeans", "router": "mean"}), ("m_smoe", {"capacity": 3}), ("m_smoe", {})],
)
def test_from_calibration_to_verified_checkpoint(method, options, model_type, calibrated, checkpoints, tmp_path):
    source = checkpoints(model_type)
    plan = api.plan(source, method, 0.5, stats=calibrated(model_type), options=options)
    assert sum(len(entry.merge) for entry in plan.layers) > 0
    assert all(len(entry.keep) == 4 and len(set(entry.why["labels"])) == 4 for entry in plan.layers)
    apply_plan(plan, inventory_of(source), tmp_path / "out")
    verdict = api.verify(source, tmp_path / "out", tokens=128, device=DEVICE)
    assert verdict.passed, verdict
    assert verdict.largest < 2e-5


@pytest.fixture(scope="module")
def calibrated(checkpoints, data, tmp_path_factory):
    """model_type → statistics with every expert's output on all tokens."""

    @cache
    def make(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp("stats") / model_type
        api.calibrate(checkpoints(model_type), data, folder, all_outputs=True, **CALIBRATION)
        return folder

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_rounds_to_the_dtype_of_the_checkpoint(dtype, checkpoints, tmp_path):
    """A bfloat16 checkpoint run in float32: the merged weights are those that bfloat16 can hold, so nothing differs but rounding of sums."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("qwen2_moe"), source)
    tensors = {name: value.bfloat16() for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    inventory = inventory_of(source)
    plan = random_plan(inventory, seed=4, align="weights", router="mean")
    apply_plan(plan, inventory, tmp_path / "out")
    output = inventory_of(tmp_path / "out")
    written = load_model(output.checkpoint, output.architecture, dtype=dtype)
    model = load_model(inventory.checkpoint, inventory.architecture, dtype=dtype)
    with merged(model, plan, inventory):
        for entry in plan.layers:
            a, b = model.layers[entry.layer].mlp, written.layers[entry.layer].mlp
            assert torch.equal(a.experts.gate_up_proj[entry.keep], b.experts.gate_up_proj)
            assert torch.equal(a.experts.down_proj[entry.keep], b.experts.down_proj)
            assert torch.equal(a.gate.weight[entry.keep], b.gate.weight)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "dbrx", "ernie4_5_moe", "zaya"])
def test_merged_tensors_by_brute_force(model_type, checkpoints, tmp_path):
    """Without alignment: every row of every routed tensor and router tensor is the weighted sum in float64, rounded once to bfloat16."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints(model_type), source)
    tensors = {name: value.bfloat16() for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    inventory = inventory_of(source)
    plan = random_plan(inventory, seed=1, router="mean")
    apply_plan(plan, inventory, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    compared = 0
    for entry in plan.layers:
        groups = {merge.into: (merge.sources, merge.weights) for merge in entry.merge}
        for claim in inventory.by_layer[entry.layer]:
            if claim.kind == "stacked":
                rows = tensors[claim.info.name].double()
                rows = rows.reshape(-1) if claim.row_axis else rows
                rows = rows.reshape(-1, claim.rows, *rows.shape[1:])  # dbrx: [experts * rows, width]
                wanted = []
                for expert in entry.keep:
                    sources, weights = groups.get(expert, ([expert], [1.0]))
                    wanted.append(sum(w * rows[i] for i, w in zip(sources, weights, strict=True)))
                wanted = torch.cat([*wanted, *rows[inventory.num_experts :]]).bfloat16()
                assert torch.equal(after[claim.info.name].reshape(wanted.shape), wanted)
            elif claim.kind == "expert" and claim.expert in entry.keep:
                sources, weights = groups.get(claim.expert, ([claim.expert], [1.0]))
                name = claim.info.name
                wanted = sum(
                    w * tensors[name.replace(f".experts.{claim.expert}.", f".experts.{i}.")].double()
                    for i, w in zip(sources, weights, strict=True)
                )
                new = name.replace(f".experts.{claim.expert}.", f".experts.{entry.keep.index(claim.expert)}.")
                assert torch.equal(after[new], wanted.bfloat16())
            else:
                continue
            compared += 1
    assert compared > 6


def rewrite(inventory, folder: Path, change) -> None:
    """Every matrix and bias of every expert of a saved checkpoint through `change(expert, role, value)`."""
    tensors = load_file(folder / "model.safetensors")
    for layer in inventory.layers:
        for expert, claims in enumerate(inventory.expert_claims(layer)):
            for claim in claims:
                tensor = tensors[claim.info.name]
                if claim.kind == "stacked":
                    tensor = tensor[expert * claim.rows : (expert + 1) * claim.rows]
                    tensor = tensor[0] if claim.rows == 1 else tensor
                for role, view in split(inventory.architecture.layout_of(claim.rest), tensor).items():
                    change(layer, expert, role, view)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shuffle_first_into_second(folder: Path) -> None:
    """Make expert 1 of every layer a copy of expert 0 with its neurons in another order."""
    inventory = inventory_of(folder)
    first: dict[tuple[int, str, int], torch.Tensor] = {}

    def change(layer: int, expert: int, role: str, view: torch.Tensor) -> None:
        if expert == 0:
            first[layer, role, view.dim()] = view.clone()
        elif expert == 1:
            value = first[layer, role, view.dim()]
            neurons = value.shape[-1] if role == "down" else value.shape[0]
            order = torch.randperm(neurons, generator=torch.Generator().manual_seed(layer))
            if role == "down":
                view.copy_(value[:, order] if value.dim() == 2 else value)
            else:
                view.copy_(value[order])

    rewrite(inventory, folder, change)


@pytest.mark.parametrize(
    "model_type",
    [
        "mixtral",
        "qwen3_moe",
        "aria_text",
        "gpt_oss",
        "granitemoe",
        "inkling2_text",
        "dbrx",
        "llama4_text",
        "nemotron_h",
        "longcat_flash",
    ],
)
def test_shuffled_copy_merges_into_the_expert_itself(model_type, checkpoints, tmp_path):
    """Per-expert tensors, and every stacked layout with and without biases; without alignment the merge is another expert."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints(model_type), source)
    shuffle_first_into_second(source)
    inventory = inventory_of(source)
    kept = {}
    for align in ("weights", "none"):
        merges = {layer: [merge_of(0, [0, 1], [0.3, 0.7], align=align)] for layer in inventory.layers}
        groups = inventory.rules.groups
        dropped = {layer: [n * 8 // groups for n in range(1, groups)] for layer in inventory.layers}
        plan = plan_for(inventory, merges, dropped)
        apply_plan(plan, inventory, tmp_path / align)
        kept[align] = load_file(tmp_path / align / "model.safetensors")
    plain = plan_for(
        inventory, {layer: [] for layer in inventory.layers}, {layer: [1, *dropped[layer]] for layer in inventory.layers}
    )
    apply_plan(plain, inventory, tmp_path / "plain")
    wanted = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(kept["weights"][name], value) for name, value in wanted.items())
    assert not all(torch.equal(kept["none"][name], value) for name, value in wanted.items())


def test_groups_of_one_and_identical_experts_keep_their_bits(checkpoints, tmp_path):
    """Also with weights that are not shares of a power of two: 0.1 x + 0.9 x is x after rounding once."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("qwen3_moe"), source)
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if ".experts.5." in n]:
        tensors[name] = tensors[name.replace(".experts.5.", ".experts.2.")].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    inventory = inventory_of(source)
    merges = {
        layer: [merge_of(2, [2, 5], [0.1, 0.9], align="weights"), merge_of(3, [3], [0.7]), merge_of(6, [6, 7], [1.0, 0.0])]
        for layer in inventory.layers
    }
    apply_plan(plan_for(inventory, merges), inventory, tmp_path / "out")
    plain = plan_for(inventory, {layer: [] for layer in inventory.layers}, {layer: [5, 7] for layer in inventory.layers})
    apply_plan(plain, inventory, tmp_path / "plain")
    a, b = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_twins_merged_with_log_count_keep_the_logits(checkpoints, tmp_path):
    """gpt-oss sending every token to all experts, 0 and 1 alike: with ln 2 in the bias, their merge weighs as much as both did."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("gpt_oss"), source)
    config = (source / "config.json").read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 8')
    (source / "config.json").write_text(config)
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if ".mlp." in n]:
        tensors[name][1] = tensors[name][0]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    inventory = inventory_of(source)
    assert inventory.top_k == 8
    original = logits_of(load_model(inventory.checkpoint, inventory.architecture))
    merges = {layer: [merge_of(0, [0, 1], [0.5, 0.5], log_count=True)] for layer in inventory.layers}
    model = load_model(inventory.checkpoint, inventory.architecture)
    with (
        merged(model, plan_for(inventory, merges), inventory),
        masked(model, {layer: [0, *range(2, 8)] for layer in inventory.layers}, 8),
    ):
        for layer in inventory.layers:
            bias = model.layers[layer].mlp.router.bias
            assert float(bias[0]) == pytest.approx(float(tensors[f"model.layers.{layer}.mlp.router.bias"][0]) + math.log(2))
        found = logits_of(model)
    assert (found - original).abs().max() < 2e-5 * original.abs().max()


def test_log_count_is_written(checkpoints, tmp_path):
    inventory = inventory_of(checkpoints("gpt_oss"))
    merges = {layer: [merge_of(2, [1, 2, 4], [0.2, 0.3, 0.5], log_count=True)] for layer in inventory.layers}
    plan = plan_for(inventory, merges)
    apply_plan(plan, inventory, tmp_path / "out")
    before, after = inventory.checkpoint, open_checkpoint(tmp_path / "out")
    for entry in plan.layers:
        name = f"model.layers.{entry.layer}.mlp.router"
        wanted = before.read(f"{name}.bias")[entry.keep]
        wanted[entry.keep.index(2)] += math.log(3)
        assert torch.allclose(after.read(f"{name}.bias"), wanted, atol=1e-6)
        assert torch.equal(after.read(f"{name}.weight"), before.read(f"{name}.weight")[entry.keep])


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("mixtral", "has no logit bias"), ("deepseek_v3", "sigmoid"), ("longcat_flash", "has no logit bias")],
)
def test_log_count_needs_a_logit_bias(model_type, reason, checkpoints, tmp_path):
    inventory = inventory_of(checkpoints(model_type))
    merges = {layer: [merge_of(0, [0, 1], [0.5, 0.5], log_count=True)] for layer in inventory.layers}
    with pytest.raises(UserError, match=f"log_count is not possible for the {model_type} family: .*{reason}"):
        check_merges(plan_for(inventory, merges), inventory)


def test_experts_of_different_groups_are_not_merged(checkpoints):
    inventory = inventory_of(checkpoints("deepseek_v3"))
    assert inventory.rules.groups > 1
    merges = {layer: [merge_of(0, [0, 7], [0.5, 0.5])] for layer in inventory.layers}
    with pytest.raises(UserError, match=r"layer 1 of the plan merges experts \[0, 7\], which are in different expert_groups"):
        check_merges(plan_for(inventory, merges), inventory)
    check_merges(plan_for(inventory, merges, router_groups="flatten"), inventory)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_codes_are_not_averaged(dtype, checkpoints, tmp_path):
    """Codes without scales are refused before a plan is made; those with scales are averaged as floats (test_float_view)."""
    source = tmp_path / "source"
    shutil.copytree(checkpoints("deepseek_v3"), source)
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if ".mlp.experts." in n]:
        tensors[name] = tensors[name].clamp(0, 1).to(dtype)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"is (U8|F8_E4M3), but it has no scales and no decoder"):
        inventory_of(source)


def test_merged_checkpoint_loads_in_stock_transformers(checkpoints, tmp_path):
    """As many expert tensors and router rows as config.json says, and a file that is smaller by the experts that went."""
    import transformers

    inventory = inventory_of(checkpoints("qwen3_moe"))
    plan = random_plan(inventory, align="weights")
    apply_plan(plan, inventory, tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.config.num_experts == plan.uniform_count == 4
    out = inventory_of(tmp_path / "out")
    assert len({name.split(".experts.")[1].split(".")[0] for name in out.checkpoint.tensors if ".experts." in name}) == 4
    router = inventory.checkpoint.tensors["model.layers.1.mlp.gate.weight"].numel // 2
    assert inventory.checkpoint.numel - out.checkpoint.numel == inventory.routed_parameters // 2 + router * len(
        inventory.layers
    )


# computed pieces


def test_computed_pieces_are_written_in_chunks(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("expertsmith.checkpoint.writer.CHUNK", 16)
    source = open_checkpoint(checkpoints("mixtral"))
    values = torch.arange(30, dtype=torch.float32)
    seen = []
    tensor = OutputTensor("made", "F32", (30,), (Made(120, lambda: values.numpy().data),))
    write_checkpoint(
        tmp_path / "out", [tensor], source.config, source=source, texts={}, on_tensor=lambda _, view: seen.append(len(view))
    )
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["made"], values)
    assert seen == [16] * 7 + [8]


def test_computed_piece_of_another_size():
    with pytest.raises(RuntimeError, match="a piece of 4 bytes was computed as 3"):
        list(chunks(Made(4, lambda: b"abc"), memoryview(bytearray(8))))
    assert b"".join(bytes(view) for view in chunks(Made(3, lambda: b"abc"), memoryview(bytearray(2)))) == b"abc"

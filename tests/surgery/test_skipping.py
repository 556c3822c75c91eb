"""Dynamic skipping: rules and thresholds by hand and by brute force, skipped forwards against dense ones with weights set to 0."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from conftest import SUPPORTED, random_model
from expertsmith.arch import families
from expertsmith.calibration.data import DataOptions, TokenData, load_tokens
from expertsmith.calibration.ratios import collect_ratios, thresholds
from expertsmith.checkpoint import open_checkpoint
from expertsmith.engine import Walk, load_model
from expertsmith.engine.layout import experts_of, is_grouped
from expertsmith.engine.skipping import install, keep_slots, rescaled_weights, skipping, skipping_forward
from expertsmith.errors import UserError
from tiny import tiny_config

SKIPPABLE = [name for name in SUPPORTED if name not in ("llama4_text", "zaya")]  # one expert a token: refused, tested below
FOUR = {"dbrx": {"ffn_config": {**tiny_config("dbrx").get("ffn_config", {}), "moe_top_k": 4}}}
# top-2 by construction of the router, or of the tiny config's expert_groups
TWO_ONLY = ("phimoe",)


def tokens_of(rows: list[list[int]]) -> TokenData:
    return TokenData({"a": rows}, {"a": False})


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 120, (length,), generator=generator).tolist() for length in (12, 7, 12, 5)]


@pytest.fixture(scope="module")
def load(checkpoints):
    @cache
    def loaded(model_type: str, memory: str = "resident"):
        return load_model(open_checkpoint(checkpoints(model_type)), families()[model_type], memory=memory)

    return loaded


def experts_in(module: torch.nn.Module, model_type: str) -> dict[int, torch.nn.Module]:
    record = families()[model_type]
    found = {}
    for index, layer in enumerate(module.get_submodule(record.layers)):
        try:
            found[index] = experts_of(layer, record)
        except AttributeError:  # a dense layer
            continue
    return found


def routing(args, kwargs):
    first, second = [*args, *kwargs.values()][1:3]
    return (second, first) if first.is_floating_point() else (first, second)


# ---- the rules


def test_ratio_rule_by_hand():
    weights = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.75, 0.25], [0.5, 0.5], [0.8, 0.0]])
    #           w2 / w1      2/3         2/3          1/3            1           0
    assert keep_slots(weights, "ratio", 0.5).tolist() == [
        [True, True],
        [True, True],
        [True, False],
        [True, True],
        [True, False],
    ]
    assert keep_slots(weights, "ratio", 0.7).tolist() == [
        [True, False],
        [False, True],
        [True, False],
        [True, True],
        [True, False],
    ]
    assert keep_slots(weights, "ratio", 0.0).all()
    top1 = keep_slots(weights, "ratio", 1.0001)
    assert top1.tolist() == [
        [True, False],
        [False, True],
        [True, False],
        [True, False],
        [True, False],
    ]  # of equals the first stays


def test_ratio_is_strict_and_tail_is_not():
    """w2 / w1 = 1/4 exactly; tail: 1/5 of the sum, which float32 rounds as the threshold."""
    weights = torch.tensor([[0.5, 0.125]])
    assert keep_slots(weights, "ratio", 0.25).all()
    assert keep_slots(weights, "ratio", math.nextafter(0.25, 1) + 1e-7).tolist() == [[True, False]]
    assert keep_slots(weights, "tail", 0.2).tolist() == [[True, False]]


def test_tail_rule_by_hand():
    weights = torch.tensor([[4.0, 8.0, 1.0, 3.0]])  # sorted 8 4 3 1 of 16: tails 8/16, 4/16, 1/16
    for threshold, kept in ((0.0, 4), (0.06, 4), (1 / 16, 3), (0.2, 3), (0.25, 2), (0.49, 2), (0.5, 1), (7.0, 1)):
        keep = keep_slots(weights, "tail", threshold)
        assert int(keep.sum()) == kept
        assert keep[0, 1]
        assert keep[0, 0] == (kept >= 2)
        assert keep[0, 3] == (kept >= 3)


def test_signs_do_not_matter_and_ties_go_by_slot():
    assert keep_slots(torch.tensor([[-0.9, 0.1]]), "ratio", 0.5).tolist() == [[True, False]]
    assert keep_slots(torch.ones(1, 4), "tail", 0.5).tolist() == [[True, True, False, False]]


def test_slots_that_cannot_be_skipped_stay_and_are_not_looked_at():
    weights = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
    skippable = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    keep = keep_slots(weights, "tail", 0.4, skippable)  # row 0: 0.1 of 0.3
    assert keep.tolist() == [[True, True, False], [True, True, True], [True, True, True]]
    scaled = rescaled_weights(weights, keep, skippable)
    assert scaled[0, :2].tolist() == pytest.approx([0.7, 0.3])
    assert torch.equal(scaled[1:], weights[1:])


@given(st.lists(st.integers(0, 64), min_size=2, max_size=8), st.floats(0, 1.2))
def test_tail_rule_against_brute_force(values, threshold):
    """The smallest prefix of the sorted weights whose rest is at most threshold times the sum, in exact integers."""
    total = sum(values)
    assume(total > 0)
    ordered = sorted(values, reverse=True)
    tails = [sum(ordered[i:]) / total for i in range(1, len(values) + 1)]
    assume(all(abs(tail - threshold) > 1e-6 for tail in tails))
    wanted = 1 + next(i for i, tail in enumerate(tails) if tail <= threshold)
    keep = keep_slots(torch.tensor([values]) / 64, "tail", threshold)[0]
    assert int(keep.sum()) == wanted
    kept = [value for value, stays in zip(values, keep.tolist(), strict=True) if stays]
    assert sorted(kept, reverse=True) == ordered[:wanted]


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1, max_size=20), st.floats(0, 2))
def test_tail_at_two_experts_decides_as_ratio(pairs, beta):
    """Golden check 9, token by token, away from exact ties."""
    assume(all(abs(min(pair) / max(pair) - beta) > 1e-5 for pair in pairs))
    weights = torch.tensor(pairs)
    assert torch.equal(keep_slots(weights, "ratio", beta), keep_slots(weights, "tail", beta / (1 + beta)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rescaled_weights_keep_the_sum(dtype):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(200, 4, generator=generator).to(dtype)
    keep = keep_slots(weights, "tail", 0.1)
    scaled = rescaled_weights(weights, keep)
    whole = keep.all(-1)
    assert 0 < int(whole.sum()) < 200
    assert torch.equal(scaled[whole], weights[whole])
    exact = weights.double() * (weights.double().sum(-1, keepdim=True) / (weights.double() * keep).sum(-1, keepdim=True))
    assert torch.allclose(scaled.double(), exact, rtol=1e-6 if dtype == torch.float32 else 2**-8)
    pair = torch.tensor([[0.7, 0.3]])
    assert rescaled_weights(pair, keep_slots(pair, "ratio", 0.5))[0, 0].item() == pytest.approx(1, abs=1e-7)


# ---- the forward


@pytest.mark.parametrize("model_type", SKIPPABLE)
def test_all_slots_active_is_the_model_own_forward(model_type):
    """Bit for bit as transformers' grouped_mm, weights in float32 or in the model's dtype; other modules up to rounding."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    first = next(iter(experts_in(random_model(model_type), model_type).values()))
    generator = torch.Generator().manual_seed(0)
    width = {"dbrx": 32, "longcat_flash": 32}.get(model_type) or (
        first.gate_up_proj if first.has_gate else first.up_proj
    ).shape[1 if first.is_transposed else 2]
    hidden = torch.randn(20, width, generator=generator)
    top, selected = torch.rand(20, 8, generator=generator).topk(2, dim=-1)
    active = torch.ones_like(selected, dtype=torch.bool)
    grouped = is_grouped(first)
    for dtype in (torch.float32, torch.bfloat16):
        experts, x = first.to(dtype), hidden.to(dtype)
        for weights in (top, top.to(dtype)) if grouped else (top.to(dtype),):
            inputs = x.unsqueeze(0) if model_type == "dbrx" else x
            with torch.no_grad():
                found = skipping_forward(experts, inputs, selected, weights, active, pairs=model_type == "longcat_flash")
                if grouped:
                    assert torch.equal(found, ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, x, selected, weights))
                else:
                    own = type(experts).forward(experts, inputs, selected, weights)
                    off = torch.linalg.vector_norm((found - own).float()) / torch.linalg.vector_norm(own.float())
                    assert off < (1e-6 if dtype == torch.float32 else 2**-7)


def reference_weights(selected, weights, count: int, rule: str, threshold: float):
    """(weights with skipped slots 0 and the rest rescaled, routed slots, slots that stay), token by token in numpy.

    Decisions in float32 as documented, sums and weights in float64.
    """
    made = np.array(weights.float().cpu().numpy(), dtype=np.float64)
    routed = kept = 0
    for row, ids in zip(made, selected.cpu().numpy(), strict=True):
        own = sorted((slot for slot in range(len(row)) if ids[slot] < count), key=lambda slot: -row[slot])
        routed += len(own)
        values = row[own].astype(np.float32)
        stay = len(own)
        if rule == "ratio" and len(own) == 2 and values[1] / values[0] < np.float32(threshold):
            stay = 1
        if rule == "tail" and own:
            stay = next(i for i in range(1, len(own) + 1) if row[own[i:]].sum() <= threshold * row[own].sum())
        kept += stay
        total = row[own].sum()
        row[own[stay:]] = 0
        if own:
            row[own] *= total / row[own].sum()
    return torch.from_numpy(made).to(weights), routed, kept


@contextmanager
def watched(module, model_type: str, watch: Callable) -> Iterator[None]:
    """watch(layer, routed experts, selected, weights) at every call of an experts module; what it returns replaces the weights."""
    handles = []
    for layer, experts in experts_in(module, model_type).items():
        number = getattr(experts, "num_routed_experts", None) or experts.num_experts

        def hook(_, args, kwargs, layer=layer, number=number):
            selected, weights = routing(args, kwargs)
            made = watch(layer, number, selected, weights)

            def swap(value):
                return made if value is weights and made is not None else value

            return tuple(map(swap, args)), {key: swap(value) for key, value in kwargs.items()}

        handles.append(experts.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dense_reference(module, model_type: str, rule: str, betas: dict[int, float], counts: dict[int, list[int]]):
    """All slots computed by the module's own forward, with the reference's weights."""

    def watch(layer, number, selected, weights):
        made, routed, kept = reference_weights(selected, weights, number, rule, betas[layer])
        held = counts.setdefault(layer, [0, 0])
        held[0] += routed
        held[1] += kept
        return made

    return watched(module, model_type, watch)


def logits(module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=ids.to(module.device), use_cache=False).logits


@pytest.mark.parametrize("model_type", SKIPPABLE)
def test_skipping_a_whole_model(model_type, load, rows):
    """Golden check 8 and the dense reference: threshold 0 changes no bit, a median equals the model with weights set to 0 and the rest
    rescaled, above 1 every token has one expert; counters are those of the reference; afterwards the model is as before."""
    model = load(model_type)
    ids = torch.tensor([rows[0], rows[2]])
    betas = {layer: entry.threshold for layer, entry in thresholds(collect_ratios(model, tokens_of(rows)), "ratio").items()}
    assert list(betas) == model.moe_layers
    base = logits(model.module, ids)  # after the first walk, which aligns weights in memory
    counters = {}
    with skipping(model, dict.fromkeys(betas, 0.0), "ratio", counters):
        assert torch.equal(logits(model.module, ids), base)
    assert all(would == ran for would, ran in counters.values())

    for rule, chosen in (
        ("ratio", betas),
        ("tail", {k: b / (1 + b) + 1e-4 for k, b in betas.items()}),
        ("ratio", dict.fromkeys(betas, 1.5)),
    ):
        counters, expected = {}, {}
        with skipping(model, chosen, rule, counters):
            found = logits(model.module, ids)
        with dense_reference(model.module, model_type, rule, chosen, expected):
            wanted = logits(model.module, ids)
        assert counters == {layer: tuple(entry) for layer, entry in expected.items()}
        assert any(ran < would for would, ran in counters.values())
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, base, rtol=1e-4, atol=1e-5)
        if rule == "ratio" and chosen[model.moe_layers[0]] == 1.5 and model_type != "longcat_flash":
            assert all((would, ran) == (48, 24) for would, ran in counters.values())
    assert torch.equal(logits(model.module, ids), base)
    assert not any("forward" in experts.__dict__ for experts in experts_in(model.module, model_type).values())


@pytest.mark.parametrize("model_type", [name for name in SKIPPABLE if name not in TWO_ONLY])
def test_tail_rule_at_four_experts(model_type, rows):
    record = families()[model_type]
    override = FOUR.get(model_type) or {record.top_k_key[0]: 4}
    module = random_model(model_type, **override)
    ids = torch.tensor([rows[0], rows[2]])
    layers = experts_in(module, model_type)
    betas = dict.fromkeys(layers, 0.3)
    expected: dict[int, list[int]] = {}
    with dense_reference(module, model_type, "tail", betas, expected):
        wanted = logits(module, ids)
    base = logits(module, ids)
    install(module, record, betas, "tail")
    found = logits(module, ids)
    assert all(kept < routed for routed, kept in expected.values())
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, base, rtol=1e-4, atol=1e-5)


def test_skipped_pairs_are_not_computed(load, rows):
    """Rows that pass the activation are the pairs that stay, no more."""
    model = load("mixtral")
    seen, handles = dict.fromkeys(model.moe_layers, 0), []
    counters: dict[int, tuple[int, int]] = {}
    for layer, experts in experts_in(model.module, "mixtral").items():
        handle = experts.act_fn.register_forward_hook(
            lambda module, args, out, layer=layer: seen.update({layer: seen[layer] + out.shape[0]})
        )
        handles.append(handle.remove)
    with skipping(model, dict.fromkeys(model.moe_layers, 0.9), "ratio", counters):
        logits(model.module, torch.tensor([rows[0], rows[2]]))
    for remove in handles:
        remove()
    assert {layer: ran for layer, (_, ran) in counters.items()} == seen
    assert sum(seen.values()) < 48 * len(seen)


def test_only_the_layers_with_a_threshold_skip(load, rows):
    model = load("mixtral")
    counters: dict[int, tuple[int, int]] = {}
    with skipping(model, {1: 2.0}, "ratio", counters):
        logits(model.module, torch.tensor([rows[0]]))
        assert [("forward" in experts.__dict__) for experts in experts_in(model.module, "mixtral").values()] == [
            False,
            True,
            False,
        ]
    assert counters == {1: (24, 12)}


def test_the_model_is_restored_after_an_error(load):
    model = load("mixtral")
    first = experts_in(model.module, "mixtral")[0]
    first.forward = kept = first.forward

    def fail():
        with skipping(model, {0: 0.5, 1: 0.5}, "ratio"):
            assert first.__dict__["forward"] is not kept
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert first.__dict__.pop("forward") is kept
    assert "forward" not in experts_in(model.module, "mixtral")[1].__dict__


@pytest.mark.parametrize("model_type", ["mixtral", "longcat_flash"])
def test_streamed_skipping_equals_resident(model_type, load, rows):
    batches = tokens_of(rows).batches(24)
    found = []
    for memory in ("resident", "stream"):
        model = load(model_type, memory)
        counters: dict[int, tuple[int, int]] = {}
        with skipping(model, dict.fromkeys(model.moe_layers, 0.9), "ratio", counters), Walk(model, batches) as walk:
            for _ in walk.layers():
                pass
            found.append((counters, [out.logits for out in walk.outputs()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("model_type", ["mixtral", "dbrx", "longcat_flash", "gpt_oss"])
def test_installed_skipping_generates_and_survives_copying(model_type, rows):
    """Greedy generation with a cache gives what a forward over the whole text gives; a deep copy runs its own weights."""
    record = families()[model_type]
    module = random_model(model_type)
    betas = dict.fromkeys(experts_in(module, model_type), 0.95)
    install(module, record, betas, "ratio")
    ids = torch.tensor([rows[0]])
    out = module.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(logits(module, out[:, :-1])[0, len(rows[0]) - 1 :].argmax(-1), out[0, len(rows[0]) :])
    before = logits(module, ids)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for experts in experts_in(twin, model_type).values():
            for parameter in experts.parameters():
                parameter.mul_(2)
    assert torch.equal(logits(module, ids), before)
    assert not torch.allclose(logits(twin, ids), before)


# ---- thresholds


@pytest.mark.parametrize("model_type", SKIPPABLE)
def test_weights_and_medians_against_one_sequence_at_a_time(model_type, load, rows):
    """Captured without padding where the model calls its experts: same weights, and numpy's median of w2 / w1."""
    model = load(model_type)
    found = collect_ratios(model, tokens_of(rows), batch_tokens=36)  # rows of 12, 12, 7 in one batch: padded
    captured: dict[int, list[np.ndarray]] = {}

    def watch(layer, number, selected, weights):
        routed = np.where(selected.numpy() < number, weights.float().numpy(), 0)
        captured.setdefault(layer, []).append(-np.sort(-routed, axis=-1))

    with watched(model.module, model_type, watch):
        for row in sorted(rows, key=len, reverse=True):  # as the batches take them; of equal length in order
            logits(model.module, torch.tensor([row]))
    assert set(found) == set(captured)
    betas = thresholds(found, "ratio")
    for layer, parts in captured.items():
        wanted = np.concatenate(parts)
        assert found[layer].shape == (36, 2)
        assert found[layer].dtype == np.float32
        assert np.allclose(found[layer], wanted, rtol=1e-4, atol=1e-6)
        two = wanted[:, 1] > 0
        assert betas[layer].threshold == pytest.approx(np.median(wanted[two, 1] / wanted[two, 0]), rel=1e-4)
        mine = found[layer][found[layer][:, 1] > 0]
        assert betas[layer].threshold == np.median(mine[:, 1] / mine[:, 0])  # exact, float32
        assert betas[layer].why["mean"] == pytest.approx(float(np.mean((mine[:, 1] / mine[:, 0]).astype(np.float64))), rel=1e-6)
        assert betas[layer].why["tokens"] == 36


def test_padding_resident_stream_and_files_agree(load, data, rows):
    resident, stream = (
        collect_ratios(load("qwen3_moe", memory), tokens_of(rows), batch_tokens=36) for memory in ("resident", "stream")
    )
    single = collect_ratios(load("qwen3_moe"), tokens_of(rows), batch_tokens=1)
    for layer in resident:
        assert np.array_equal(resident[layer], stream[layer])
        assert np.allclose(resident[layer], single[layer], rtol=1e-4)
    tokens = load_tokens(data, None, DataOptions(seq_len=24, pack=False), vocab_size=128)
    assert {len(found) for found in collect_ratios(load("qwen3_moe"), tokens).values()} == {sum(tokens.tokens.values())}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "longcat_flash", "deepseek_v3"])
@pytest.mark.parametrize("rule", ["ratio", "tail"])
def test_a_median_skips_what_was_counted(model_type, rule, load, rows):
    """Golden check 8. One layer at a time: skipping in one changes what the next layers see."""
    model = load(model_type)
    batches = tokens_of(rows).batches(1)  # no padding, which counters count
    for layer, entry in thresholds(collect_ratios(model, tokens_of(rows), batch_tokens=1), rule).items():
        counters: dict[int, tuple[int, int]] = {}
        with skipping(model, {layer: entry.threshold}, rule, counters), Walk(model, batches) as walk:
            for _ in walk.layers():
                pass
        would, ran = counters[layer]
        assert entry.why["skip_rate"] == pytest.approx((would - ran) / would, abs=1e-12)
        assert entry.why["active"] == pytest.approx(ran / 36)
        if model_type != "longcat_flash":
            assert (would, ran) == (72, 54)  # half of the 36 second experts: an even number, and no ties


def hand_weights() -> dict[int, np.ndarray]:
    """Ratios 0.1, 0.2, 0.4, 0.8 and a token with one routed expert."""
    return {3: np.array([[1, 0.1], [1, 0.2], [0.5, 0.2], [1, 0.8], [1, 0]], dtype=np.float32)}


def test_thresholds_by_hand():
    entry = thresholds(hand_weights(), "ratio")[3]
    assert entry.threshold == np.float32(np.float32(0.2) + np.float32(0.4)) / 2 == entry.why["median"]
    assert entry.why["mean"] == pytest.approx(0.375)
    assert entry.why["skip_rate"] == pytest.approx(2 / 9)
    assert entry.why["active"] == pytest.approx(7 / 5)
    assert entry.why["tokens"] == 5
    assert thresholds(hand_weights(), "ratio", statistic="mean")[3].threshold == pytest.approx(0.375)
    high = thresholds(hand_weights(), "ratio", statistic="quantile", quantile=1.0)[3]
    assert high.threshold == np.float32(0.8) == high.why["quantile"]
    assert high.why["active"] == pytest.approx(6 / 5)  # strict: the largest ratio stays
    tail = thresholds(hand_weights(), "tail", statistic="quantile", quantile=1.0)[3]
    assert tail.threshold == pytest.approx(0.8 / 1.8)
    assert tail.why["active"] == 1


def test_tail_threshold_looks_at_the_last_routed_expert():
    weights = {0: np.array([[4, 3, 2, 1], [8, 1, 1, 0], [6, 2, 0, 0]], dtype=np.float32)}  # last / sum: 0.1, 0.1, 0.25
    entry = thresholds(weights, "tail")[0]
    assert entry.threshold == np.float32(0.1)
    assert entry.why["active"] == pytest.approx((3 + 2 + 2) / 3)
    assert entry.why["skip_rate"] == pytest.approx(2 / 9)


@given(st.integers(0, 10_000), st.integers(2, 6), st.floats(0, 1), st.booleans())
def test_threshold_for_a_mean_of_active_experts(seed, top_k, share, coarse):
    """The mean is at most the target; at the next smaller tail it would be more. Counted by the rule itself."""
    generator = np.random.default_rng(seed)
    weights = generator.random((15, top_k)).astype(np.float32)
    if coarse:  # many ties, and weights of 0
        weights = np.round(weights * 4) / 4
        weights[:, 0] = 1
    weights = -np.sort(-weights, axis=-1)
    target = 1 + share * (top_k - 1)
    entry = thresholds({0: weights}, "tail", active=target)[0] if (weights[:, 1] > 0).any() else None
    assume(entry is not None)

    def mean(threshold: float) -> float:
        return (keep_slots(torch.from_numpy(weights), "tail", threshold).numpy() & (weights > 0)).sum() / 15

    assert entry.why["active"] == pytest.approx(mean(entry.threshold))
    assert mean(entry.threshold) <= target + 1e-9
    if entry.threshold > 0:
        assert mean(float(np.nextafter(np.float32(entry.threshold), np.float32(0)))) > target - 1e-9


def test_active_of_all_and_of_one():
    weights = {0: -np.sort(-np.random.default_rng(0).random((50, 4)).astype(np.float32), axis=-1)}
    everything = thresholds(weights, "tail", active=4)[0]
    assert (everything.threshold, everything.why["skip_rate"], everything.why["active"]) == (0, 0, 4)
    one = thresholds(weights, "tail", active=1)[0]
    assert (one.why["skip_rate"], one.why["active"]) == (0.75, 1)


def test_ties_of_bfloat16_logits():
    """Many tokens share the median ratio: ratio keeps all of them, tail skips all of them, and each is off half by no more than those."""
    generator = torch.Generator().manual_seed(0)
    values = (4 * torch.randn(4001, 8, generator=generator)).bfloat16()  # an odd number: the median is the ratio of a token
    top = values.float().topk(2, dim=-1).values
    weights = top.softmax(-1).numpy()
    entry = thresholds({0: weights}, "ratio")[0]
    tied = float(np.mean(weights[:, 1] / weights[:, 0] == np.float32(entry.threshold)))
    assert tied > 0.002
    below = entry.why["skip_rate"] * 2
    assert 0.5 - tied <= below <= 0.5
    beta = entry.threshold / (1 + entry.threshold)
    close = torch.from_numpy(weights)
    above = float((~keep_slots(close, "tail", beta + 1e-6)).any(-1).float().mean())
    assert above >= below + tied - 1e-9


# ---- refusals


@pytest.mark.parametrize(("model_type", "words"), [("llama4_text", "scales the experts' inputs"), ("zaya", "no second expert")])
def test_families_with_nothing_to_skip(model_type, words, load, rows):
    model = load(model_type)
    with pytest.raises(UserError, match=words), skipping(model, {0: 0.5}, "tail"):
        pass
    with pytest.raises(UserError, match=words):
        collect_ratios(model, tokens_of(rows))
    with pytest.raises(UserError, match=words):
        install(model.module, families()[model_type], {0: 0.5}, "tail")


def test_refusals(load):
    model = load("deepseek_v3")  # decoder layer 0 is dense
    for betas, rule, words in (
        ({1: 0.5}, "half", "ratio or tail"),
        ({1: -0.1}, "ratio", "at least 0"),
        ({1: math.nan}, "ratio", "at least 0"),
        ({0: 0.5}, "ratio", "decoder layer 0 has a skip threshold, but no routed experts"),
        ({99: 0.5}, "ratio", "decoder layer 99"),
    ):
        with pytest.raises(UserError) as caught, skipping(model, betas, rule):
            pass
        assert words in str(caught.value) + str(caught.value.remedy)
    wide = random_model("qwen3_moe", num_experts_per_tok=4)
    with pytest.raises(UserError, match="ratio rule is for two experts"):
        install(wide, families()["qwen3_moe"], {0: 0.5}, "ratio")
    split = random_model("mixtral")
    experts_in(split, "mixtral")[1]._is_expert_parallel = True
    with pytest.raises(UserError, match="decoder layer 1: the experts are distributed"):
        install(split, families()["mixtral"], {0: 0.5, 1: 0.5}, "ratio")
    with pytest.raises(UserError, match="decoder layer 0: the experts' weights are offloaded"):
        install(random_model("mixtral").to("meta"), families()["mixtral"], {0: 0.5}, "ratio")


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        ("half", {}, "the skip rule"),
        ("ratio", {"statistic": "mode"}, "the statistic for thresholds is 'mode'"),
        ("ratio", {"statistic": "quantile", "quantile": 1.5}, "the quantile for thresholds is 1.5"),
        ("ratio", {"active": 1.5}, "target for the mean number of active experts needs the rule tail"),
        ("tail", {"active": 2.5}, "2.5 active experts of 2"),
        ("tail", {"active": 0.5}, "0.5 active experts of 2"),
    ],
)
def test_threshold_refusals(rule, options, words):
    with pytest.raises(UserError, match=words):
        thresholds(hand_weights(), rule, **options)


def test_refused_weights():
    with pytest.raises(UserError, match="decoder layer 1: top_k is 4"):
        thresholds({1: np.ones((3, 4), dtype=np.float32)}, "ratio")
    with pytest.raises(UserError, match="decoder layer 1: no calibration token has a second routed expert"):
        thresholds({1: np.array([[1, 0], [0, 0]], dtype=np.float32)}, "ratio")


def test_weights_that_are_not_finite_are_named(tmp_path, rows):
    module = random_model("mixtral")
    with torch.no_grad():
        module.model.layers[0].mlp.experts.down_proj.fill_(3e38)
    module.save_pretrained(tmp_path)
    model = load_model(open_checkpoint(tmp_path), families()["mixtral"])
    with pytest.raises(UserError, match="decoder layer 1: routing weights are not finite"):
        collect_ratios(model, tokens_of(rows))

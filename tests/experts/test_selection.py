"""From saliency to kept experts: counts, ties, budgets."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from expertsmith.errors import UserError
from expertsmith.experts.rules import Rules, keep_count, over_layers, parse_keep, uniform

always = settings(derandomize=True, deadline=None, max_examples=80)  # the same examples in every run
TIES = st.sampled_from(["keep_lower", "keep_higher"])
SCORES = st.integers(0, 12).map(float)  # few values, so that ties are common; whole numbers scale without rounding


@st.composite
def rules_with_groups(draw, max_groups: int = 4) -> Rules:
    groups = draw(st.integers(1, max_groups))
    size = draw(st.integers(2, 8))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, size * top_groups))
    return Rules(groups * size, top_k, groups, top_groups, draw(st.integers(1, 2)))


@st.composite
def cases(draw, max_groups: int = 4, layers: int = 3):
    """(saliency by layer, a count that the rules allow, rules)"""
    rules = draw(rules_with_groups(max_groups))
    depth = draw(st.integers(1, layers))
    saliency = {2 * i + 1: draw(st.lists(SCORES, min_size=rules.num_experts, max_size=rules.num_experts)) for i in range(depth)}
    count = draw(st.integers(rules.least // rules.groups, rules.num_experts // rules.groups)) * rules.groups
    return saliency, count, rules


# ---- parse_keep


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5), (".25", 0.25), (" 0.75 ", 0.75), ("1.0", 1.0), ("1.", 1.0), ("50%", 0.5), ("12.5 %", 0.125),
        ("100%", 1.0), ("0.5e-1", 0.05), ("4", 4), ("+4", 4), (" 128 ", 128),
        ("1", 1), ("1%", 0.01), (0.5, 0.5), (1.0, 1.0), (1, 1), (7, 7),
    ],
)  # fmt: skip
def test_keep_is_a_ratio_or_a_count(text, value):
    found = parse_keep(text)
    assert found == value
    assert type(found) is type(value)  # 1 is one expert, 1.0 is all of them


NOT_A_NUMBER = ("", " ", ".", "half", "nan", "inf", "0x4", "4 5", "50%%", "%", "1/2", "1,5", "5e-1", "0.5 ratio")
NOTHING_STAYS = ("0", "0.0", "0%", "-1", "-0.5", "-50%", "1.0e400", 0, -2, 0.0, math.nan, math.inf, -math.inf)
TOO_MUCH = ("1.01", "101%", 1.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *((text, "neither a ratio nor a count") for text in NOT_A_NUMBER),
        *((text, "at least one expert") for text in NOTHING_STAYS),
        *((text, "at most 1.0") for text in TOO_MUCH),
    ],
)
def test_a_keep_that_makes_no_sense_is_refused(text, says):
    with pytest.raises(UserError, match=says) as error:
        parse_keep(text)
    assert "0.5 or 50%" in str(error.value)


@always
@given(st.text(max_size=8) | st.from_regex(r"[-+]?[0-9]{0,4}\.?[0-9]{0,4}(e-?[0-9]{1,3})?%?", fullmatch=True))
def test_any_keep_text_is_understood_or_refused(text):
    try:
        value = parse_keep(text)
    except UserError:
        return
    assert value > 0
    assert isinstance(value, int) or value <= 1


def test_a_count_of_many_digits_is_more_experts_than_there_are():
    with pytest.raises(UserError):
        keep_count(parse_keep("1" + "0" * 400), Rules(8, 2))


@always
@given(st.integers(1, 1000))
def test_percents_are_ratios(tenths):
    text = f"{tenths / 10:.1f}"
    assert parse_keep(f"{text}%") == float(text) / 100


# ---- keep_count


@always
@given(st.integers(1, 512), st.floats(0.001, 1.0))
def test_a_ratio_removes_what_reap_removes(experts, ratio):
    """floor(n * (1 - ratio)) experts go. Where n * (1 - ratio) is whole but for rounding, the whole number counts."""
    removed = experts * (1 - ratio)
    assume(abs(removed - round(removed)) > 1e-6)  # see the golden counts below
    assert keep_count(ratio, Rules(experts, 1)) == experts - math.floor(removed)


@pytest.mark.parametrize(
    ("ratio", "experts", "count"),
    [
        (0.5, 8, 4), (0.75, 8, 6), (0.9, 10, 9), (0.7, 10, 7), (0.3, 10, 3), (0.1, 10, 1), (0.8, 10, 8), (0.6, 128, 77),
        (0.7, 128, 90), (0.5, 7, 4), (1.0, 60, 60), (0.85, 20, 17), (0.95, 60, 57), (2 / 3, 9, 6), (1 / 3, 9, 3),
    ],
)  # fmt: skip
def test_a_ratio_of_decimal_digits_gives_the_count_that_a_person_expects(ratio, experts, count):
    """Golden: 1 - 0.9 is a little under 0.1 in binary, which must not cost an expert."""
    assert keep_count(ratio, Rules(experts, 1)) == count


@always
@given(rules_with_groups(), st.floats(0.001, 1.0))
def test_counts_of_ratios_respect_the_router(rules, ratio):
    if ratio * rules.num_experts <= rules.least - rules.groups:  # rounded up, it is still too few
        with pytest.raises(UserError, match=f"--keep {rules.least} "):
            keep_count(ratio, rules)
        return
    count = keep_count(ratio, rules)
    assert rules.least <= count <= rules.num_experts
    assert count % rules.groups == 0
    assert count >= ratio * rules.num_experts - 1e-6  # never fewer than the ratio says
    assert count < ratio * rules.num_experts + 1 + rules.groups


@always
@given(rules_with_groups(), st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_a_larger_ratio_never_keeps_fewer(rules, a, b):
    a, b = sorted((a, b))
    try:
        fewer = keep_count(a, rules)
    except UserError:
        return
    assert fewer <= keep_count(b, rules)


@always
@given(rules_with_groups(), st.integers(1, 64))
def test_a_count_is_kept_as_it_is_or_refused(rules, count):
    allowed = rules.least <= count <= rules.num_experts and count % rules.groups == 0
    if allowed:
        assert keep_count(count, rules) == count
    else:
        with pytest.raises(UserError):
            keep_count(count, rules)


@always
@given(rules_with_groups())
def test_the_remedy_for_too_few_is_accepted(rules):
    assert keep_count(rules.least, rules) == rules.least
    assert keep_count(1.0, rules) == rules.num_experts


@always
@given(rules_with_groups())
def test_the_least_count_fills_top_k_from_the_groups_a_token_may_use(rules):
    per_group = rules.least // rules.groups
    assert rules.least % rules.groups == 0
    assert per_group * rules.top_groups >= rules.top_k
    assert rules.groups == 1 or per_group >= rules.group_minimum
    shorter = per_group - 1
    assert shorter * rules.top_groups < rules.top_k or shorter < rules.group_minimum or shorter == 0


def test_refused_counts_say_what_the_router_needs():
    grouped = Rules(256, 8, groups=8, top_groups=4, group_minimum=2)
    assert grouped.least == 16
    with pytest.raises(UserError, match=r"top_k=8 from 4 of 8 expert_groups with at least 2 each, so 16 in all"):
        keep_count(8, grouped)
    with pytest.raises(UserError, match=r"do not divide into 8 expert_groups.*keep 96 or 104"):
        keep_count(100, grouped)
    with pytest.raises(UserError, match="here: 9 experts cannot be kept, as it has only 8"):
        keep_count(9, Rules(8, 2), "here")
    assert keep_count(0.39, grouped) == 104  # 100 experts, rounded up to the groups


# ---- uniform


@always
@given(cases(), TIES)
def test_every_layer_and_every_group_keeps_the_same_number(case, ties):
    saliency, count, rules = case
    kept = uniform(saliency, count, rules, ties)
    size = rules.num_experts // rules.groups
    assert list(kept) == list(saliency)
    for ids in kept.values():
        assert ids == sorted(set(ids))
        assert len(ids) == count
        assert {sum(e // size == g for e in ids) for g in range(rules.groups)} == {count // rules.groups}


@always
@given(cases(), TIES)
def test_no_dropped_expert_is_more_salient_than_a_kept_one_of_its_group(case, ties):
    saliency, count, rules = case
    size = rules.num_experts // rules.groups
    for layer, ids in uniform(saliency, count, rules, ties).items():
        values = saliency[layer]
        for group in range(rules.groups):
            members = range(group * size, (group + 1) * size)
            dropped = [e for e in members if e not in ids]
            for stays in (e for e in members if e in ids):
                for goes in dropped:
                    assert values[stays] >= values[goes]
                    if values[stays] == values[goes]:
                        assert (stays < goes) == (ties == "keep_lower")


@always
@given(cases(), TIES, st.integers(-20, 20))
def test_the_unit_of_the_saliency_does_not_matter(case, ties, exponent):
    saliency, count, rules = case
    scaled = {layer: [2.0**exponent * v for v in values] for layer, values in saliency.items()}
    assert uniform(scaled, count, rules, ties) == uniform(saliency, count, rules, ties)


@always
@given(cases(), TIES)
def test_a_smaller_count_keeps_a_subset(case, ties):
    saliency, count, rules = case
    larger = uniform(saliency, count, rules, ties)
    for fewer in range(rules.least, count, rules.groups):
        smaller = uniform(saliency, fewer, rules, ties)
        assert all(set(smaller[layer]) < set(larger[layer]) for layer in saliency)


def test_golden_choice():
    values = {0: [0.9, 0.1, 0.5, 0.5, 0.5, 0.2, 0.3, 0.8]}
    assert uniform(values, 4, Rules(8, 2), "keep_lower") == {0: [0, 2, 3, 7]}
    assert uniform(values, 4, Rules(8, 2), "keep_higher") == {0: [0, 3, 4, 7]}
    assert uniform(values, 4, Rules(8, 2, groups=4, top_groups=2), "keep_lower") == {0: [0, 2, 4, 7]}
    assert uniform(values, 4, Rules(8, 2, groups=4, top_groups=2), "keep_higher") == {0: [0, 3, 4, 7]}
    assert uniform({0: [-1.0, -3.0, -2.0]}, 2, Rules(3, 1), "keep_lower") == {0: [0, 2]}


@always
@given(cases(), TIES)
def test_keeping_all_keeps_all(case, ties):
    saliency, _, rules = case
    assert uniform(saliency, 1.0, rules, ties) == {layer: list(range(rules.num_experts)) for layer in saliency}


# ---- over_layers


def highest_dropped(saliency: dict[int, list[float]], kept: dict[int, list[int]]) -> float:
    dropped = (v for layer, values in saliency.items() for e, v in enumerate(values) if e not in kept[layer])
    return max(dropped, default=-math.inf)


@always
@given(cases(max_groups=1), TIES, st.booleans())
def test_the_global_budget_is_spent_exactly_and_no_layer_falls_below_its_floor(case, ties, normalize):
    saliency, count, rules = case
    kept = over_layers(saliency, count, rules, ties, normalize)
    assert sum(map(len, kept.values())) == count * len(saliency)
    for layer, ids in kept.items():
        assert ids == sorted(set(ids))
        assert all(0 <= e < rules.num_experts for e in ids)
        assert len(ids) >= rules.least
        assert min(saliency[layer][e] for e in ids) >= highest_dropped({layer: saliency[layer]}, kept)


@always
@given(cases(max_groups=1), TIES)
def test_the_global_budget_does_not_depend_on_the_scale_of_a_layer(case, ties):
    saliency, count, rules = case
    scaled = {layer: [2.0**layer * v for v in values] for layer, values in saliency.items()}
    assert over_layers(scaled, count, rules, ties) == over_layers(saliency, count, rules, ties)


def test_the_global_budget_without_normalizing_follows_the_larger_layer():
    saliency = {0: [1.0, 2.0, 3.0, 4.0], 1: [10.0, 20.0, 30.0, 40.0]}
    assert over_layers(saliency, 2, Rules(4, 1), "keep_lower", normalize=False) == {0: [3], 1: [1, 2, 3]}
    assert over_layers(saliency, 2, Rules(4, 1), "keep_lower") == {0: [2, 3], 1: [2, 3]}


@always
@given(cases(max_groups=1), TIES)
def test_above_the_floor_the_most_salient_of_all_layers_stay(case, ties):
    saliency, count, rules = case
    kept = over_layers(saliency, count, rules, ties, normalize=False)
    spare = {layer: sorted((saliency[layer][e] for e in ids), reverse=True)[rules.least :] for layer, ids in kept.items()}
    lowest_kept = min((v for values in spare.values() for v in values), default=math.inf)
    assert lowest_kept >= highest_dropped(saliency, kept)


def test_a_layer_without_any_saliency_keeps_its_floor():
    kept = over_layers({0: [0.0] * 4, 1: [1.0, 2.0, 3.0, 4.0]}, 2, Rules(4, 1), "keep_lower")
    assert kept == {0: [0], 1: [1, 2, 3]}


def test_a_global_budget_is_refused_where_the_router_has_groups():
    with pytest.raises(UserError, match=r"--budget uniform or --router-groups flatten"):
        over_layers({0: [1.0] * 8}, 4, Rules(8, 2, groups=2), "keep_lower")

"""plan.json: what is written is read back, and what breaks a rule is refused with its place."""

from __future__ import annotations

import json
import math
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from conftest import CALIBRATION
from expertsmith import api
from expertsmith.calibration.stats import layer_path
from expertsmith.errors import UserError
from expertsmith.planning.plan import (
    CalibrationData,
    LayerPlan,
    Merge,
    Method,
    Plan,
    Skip,
    Source,
    Summary,
    load_plan,
    parse_plan,
)

always = settings(derandomize=True, deadline=None, max_examples=50)  # the same examples in every run
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | FLOATS | TEXT | st.lists(FLOATS, max_size=3)
TABLES = st.dictionaries(TEXT, VALUES, max_size=3)
TOKENS = st.dictionaries(TEXT, st.integers(0, 2**40), max_size=3)
COUNTS = st.tuples(st.integers(0, 2**50), st.integers(0, 2**50))


@st.composite
def layer_plans(draw, layer: int) -> LayerPlan:
    experts = draw(st.integers(1, 12))
    ids = st.integers(0, experts - 1)
    keep = sorted(draw(st.sets(ids, min_size=1)))
    merge, free = [], {e for e in range(experts) if e not in keep}
    for into in draw(st.sets(st.sampled_from(keep), max_size=2)):
        others = draw(st.sets(st.sampled_from(sorted(free)), max_size=4)) if free else set()
        free -= others
        sources = sorted({into, *others})
        weights = st.lists(st.floats(0.1, 1e30), min_size=len(sources), max_size=len(sources))
        align, router = draw(st.sampled_from(["none", "weights"])), draw(st.sampled_from(["dominant", "mean"]))
        values = {"weights": draw(weights), "align": align, "router": router, "log_count": draw(st.booleans())}
        merge.append(Merge(into=into, sources=sources, **values))
    return LayerPlan(
        layer=layer,
        num_experts=experts,
        keep=keep,
        saliency=draw(st.none() | st.lists(FLOATS, min_size=experts, max_size=experts)),
        merge=merge,
        skip_threshold=draw(st.none() | st.floats(0, 1)),
        why=draw(st.none() | TABLES),
    )


@st.composite
def plans(draw) -> Plan:
    numbers = sorted(draw(st.sets(st.integers(0, 200), min_size=1, max_size=4)))
    layers = [draw(layer_plans(number)) for number in numbers]
    skip = Skip(
        rule=draw(st.sampled_from(["ratio", "tail"])),
        statistic=draw(TEXT),
        calibration=draw(st.builds(CalibrationData, fingerprint=TEXT, tokens=TOKENS)),
    )
    return Plan(
        method=Method(name=draw(TEXT), options=draw(TABLES)),
        model=Source(model_type=draw(TEXT), fingerprint=draw(TEXT)),
        calibration=draw(st.none() | st.builds(CalibrationData, fingerprint=TEXT, tokens=TOKENS)),
        router_groups=draw(st.sampled_from(["keep", "flatten"])),
        skip=skip if any(entry.skip_threshold is not None for entry in layers) else None,
        layers=layers,
        notes=draw(st.lists(TEXT, max_size=2)),
        summary=draw(st.none() | st.builds(Summary, experts=COUNTS, parameters=COUNTS, bytes=COUNTS)),
    )


def example() -> dict:
    """A plan as it stands in a file, with every key."""
    layer = {
        "layer": 0, "num_experts": 4, "keep": [0, 2], "saliency": [0.9, 0.1, 0.7, 0.2],
        "merge": [{"into": 0, "from": [0, 1], "weights": [0.6, 0.4]}], "skip_threshold": 0.25, "why": {"loss": 0.031},
    }  # fmt: skip
    return {
        "format": "expertsmith.plan",
        "version": 1,
        "method": {"name": "easy_ep", "options": {"budget": "uniform", "keep": 0.5}},
        "model": {"model_type": "mixtral", "fingerprint": "sha256:00"},
        "calibration": {"fingerprint": "sha256:11", "tokens": {"math": 20480}},
        "router_groups": "keep",
        "skip": {"rule": "ratio", "statistic": "median", "calibration": {"fingerprint": "sha256:22", "tokens": {"math": 4096}}},
        "layers": [layer, {"layer": 2, "num_experts": 4, "keep": [1, 3]}],
        "summary": {"experts": [8, 4], "parameters": [1000, 560], "bytes": [2000, 1120]},
    }


# ---- writing and reading


@always
@given(plans())
def test_what_is_written_is_read_back(made):
    assert parse_plan(json.loads(made.dumps()), "here") == made


@always
@given(plans())
def test_the_same_plan_has_the_same_bytes(made):
    text = made.dumps()
    assert made.model_copy(deep=True).dumps() == text
    assert parse_plan(json.loads(text), "here").dumps() == text


@always
@given(plans())
def test_a_layer_stands_on_a_line_of_its_own(made):
    """So that a diff of two plans shows the layers that differ and nothing else."""
    lines = made.dumps().split("\n")
    start = lines.index(' "layers": [')
    rows = lines[start + 1 : start + 1 + len(made.layers)]
    assert [json.loads(row.rstrip(","))["layer"] for row in rows] == [entry.layer for entry in made.layers]
    assert lines[start + 1 + len(made.layers)].startswith(" ]")
    assert lines[-1] == ""


def test_a_change_of_one_layer_changes_one_line():
    raw = example()
    before = parse_plan(raw, "here").dumps().splitlines()
    raw["layers"][1]["keep"] = [1, 2]
    after = parse_plan(raw, "here").dumps().splitlines()
    assert [(a, b) for a, b in zip(before, after, strict=True) if a != b] == [(before[10], after[10])]
    assert '"keep": [1, 2]' in after[10]


def test_the_order_of_keys_in_the_file_does_not_matter():
    raw = example()
    turned = dict(reversed(raw.items()))
    turned["layers"] = [dict(reversed(entry.items())) for entry in raw["layers"]]
    assert list(turned) != list(raw)
    assert parse_plan(turned, "here").dumps() == parse_plan(raw, "here").dumps()


def test_floats_have_the_digits_that_read_back_equal(tmp_path):
    values = [0.1, 1 / 3, math.pi * 1e-30, 5e-324, 1.7976931348623157e308, -0.0, 1e22, 123456789.123456789]
    raw = example()
    raw["layers"] = [{"layer": 0, "num_experts": 8, "keep": [0], "saliency": values}]
    del raw["skip"]
    parse_plan(raw, "here").save(tmp_path / "plan.json")
    read = load_plan(tmp_path / "plan.json").layers[0].saliency
    assert [v.hex() for v in read] == [v.hex() for v in values]
    assert "0.1, 0.3333333333333333," in (tmp_path / "plan.json").read_text()


def test_what_is_not_there_is_not_written():
    raw = {key: value for key, value in example().items() if key not in ("calibration", "summary", "skip")}
    raw["layers"] = raw["layers"][1:]
    text = parse_plan(raw, "here").dumps()
    assert "null" not in text
    for key in ("calibration", "summary", "saliency", "skip", "why", "notes"):
        assert key not in text


def test_none_inside_free_tables_survives():
    raw = example()
    raw["method"]["options"] = {"seed": None}
    raw["layers"][0]["why"] = {"loss": None}
    read = parse_plan(json.loads(parse_plan(raw, "here").dumps()), "here")
    assert read.method.options == {"seed": None}
    assert read.layers[0].why == {"loss": None}


def test_merged_experts_are_called_from_in_the_file_and_sources_in_python():
    merge = parse_plan(example(), "here").layers[0].merge[0]
    assert merge.sources == [0, 1]
    assert (
        '"merge": [{"into": 0, "from": [0, 1], "weights": [0.6, 0.4], "align": "none"' in parse_plan(example(), "here").dumps()
    )
    assert '"sources"' not in parse_plan(example(), "here").dumps()


def test_a_saved_plan_leaves_only_itself(tmp_path):
    target = tmp_path / "new" / "folder" / "plan.json"
    made = parse_plan(example(), "here")
    made.save(target)
    made.save(target)  # over an old one
    assert [path.name for path in target.parent.iterdir()] == ["plan.json"]
    assert target.read_text(encoding="utf-8") == made.dumps()
    assert load_plan(target) == made
    assert load_plan(str(target)) == made


def test_letters_outside_ascii_stay_readable(tmp_path):
    raw = example()
    raw["calibration"]["tokens"] = {"математика": 3}
    raw["layers"][0]["why"] = {"note": "größer"}
    parse_plan(raw, "here").save(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text(encoding="utf-8")
    assert "математика" in text
    assert "größer" in text
    assert load_plan(tmp_path / "p.json").calibration.tokens == {"математика": 3}


def test_counts_of_a_plan():
    made = parse_plan(example(), "here")
    assert made.kept == {0: [0, 2], 2: [1, 3]}
    assert made.counts == [2, 2]
    assert made.uniform_count == 2
    raw = example()
    raw["layers"][1]["keep"] = [1]
    assert parse_plan(raw, "here").uniform_count is None


# ---- refusals


def first(raw: dict) -> dict:
    return raw["layers"][0]


BROKEN = {  # what: (change, what the message has to say, the place it has to name)
    "no expert": (lambda p: first(p).update(keep=[]), "keep is empty", "layer 0"),
    "an expert twice": (lambda p: first(p).update(keep=[0, 2, 2]), "names expert 2 twice", "layer 0"),
    "an expert that is not there": (lambda p: first(p).update(keep=[0, 4]), "names expert 4, but the ids", "layer 0"),
    "a negative id": (lambda p: first(p).update(keep=[-1, 2]), "names expert -1", "layer 0"),
    "descending ids": (lambda p: first(p).update(keep=[2, 0]), "not in ascending order", "layer 0"),
    "a wrong saliency": (lambda p: first(p).update(saliency=[1.0]), "1 numbers for 4 experts", "layer 0"),
    "no experts at all": (lambda p: first(p).update(num_experts=0), "greater than or equal to 1", "layers.0.num_experts"),
    "a negative layer": (lambda p: first(p).update(layer=-1), "greater than or equal to 0", "layers.0.layer"),
    "a fraction of an expert": (lambda p: first(p).update(keep=[0, 1.5]), "valid integer", "layers.0.keep.1"),
    "a word as an id": (lambda p: first(p).update(keep=["zero"]), "valid integer", "layers.0.keep.0"),
    "keep is no list": (lambda p: first(p).update(keep=3), "valid list", "layers.0.keep"),
    "saliency in words": (lambda p: first(p).update(saliency=["a", 1, 1, 1]), "valid number", "layers.0.saliency.0"),
    "experts without weights": (lambda p: first(p)["merge"][0].update(weights=[1.0]), "2 experts and 1 weights", "layer 0"),
    "a merge without its target": (lambda p: first(p)["merge"][0].pop("into"), "required", "layers.0.merge.0.into"),
    "the same layer twice": (lambda p: p["layers"][1].update(layer=0), "but is [0, 0]", "layers must be ascending"),
    "descending layers": (lambda p: p["layers"].reverse(), "but is [2, 0]", "layers must be ascending"),
    "no layers": (lambda p: p.update(layers=[]), "layers is empty", "plan.json"),
    "no list of layers": (lambda p: p.update(layers={}), "valid list", "layers"),
    "layers missing": (lambda p: p.pop("layers"), "required", "layers"),
    "keep missing": (lambda p: first(p).pop("keep"), "required", "layers.0.keep"),
    "method missing": (lambda p: p.pop("method"), "required", "method"),
    "model missing": (lambda p: p.pop("model"), "required", "model"),
    "fingerprint missing": (lambda p: p["model"].pop("fingerprint"), "required", "model.fingerprint"),
    "another version": (lambda p: p.update(version=2), "Input should be 1", "version"),
    "another word for groups": (lambda p: p.update(router_groups="drop"), "'keep' or 'flatten'", "router_groups"),
    "tokens in words": (lambda p: p["calibration"].update(tokens={"math": "many"}), "valid integer", "calibration.tokens.math"),
    "half a summary": (lambda p: p["summary"].update(bytes=[1]), "required", "summary.bytes.1"),
    "unknown key": (lambda p: p.update(note="x"), "unknown key", "note"),
    "unknown key of a layer": (lambda p: p["layers"][1].update(kept=[1]), "unknown key", "layers.1.kept"),
    "unknown key of the method": (lambda p: p["method"].update(version=1), "unknown key", "method.version"),
    "unknown key of a merge": (lambda p: first(p)["merge"][0].update(note=1), "unknown key", "layers.0.merge.0.note"),
    "unknown key of the model": (lambda p: p["model"].update(path="/x"), "unknown key", "model.path"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_rule_is_refused_with_its_place(what, tmp_path):
    change, says, place = BROKEN[what]
    raw = example()
    change(raw)
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        load_plan(tmp_path / "plan.json")
    message = str(error.value)
    assert says in message
    assert place in message
    assert message.startswith(str(tmp_path / "plan.json"))
    assert "\n" not in message


def test_the_example_itself_is_accepted(tmp_path):
    """Otherwise the refusals above could be for another reason."""
    (tmp_path / "plan.json").write_text(json.dumps(example()))
    assert len(load_plan(tmp_path / "plan.json").layers) == 2


@pytest.mark.parametrize(
    ("merge", "says"),
    [
        ({"into": 4, "from": [0, 1], "weights": [0.5, 0.5]}, "4"),
        ({"into": 0, "from": [0, 9], "weights": [0.5, 0.5]}, "9"),
        ({"into": 0, "from": [-1, 0], "weights": [0.5, 0.5]}, "-1"),
        ({"into": 1, "from": [0, 1], "weights": [0.5, 0.5]}, "1"),  # 1 does not stay
        ({"into": 0, "from": [], "weights": []}, "0"),
        ({"into": 0, "from": [1, 1], "weights": [0.5, 0.5]}, "1"),
        ({"into": 0, "from": [1, 3], "weights": [0.5, 0.5]}, "does not name that expert"),
        ({"into": 0, "from": [0, 1], "weights": [1.5, -0.5]}, "shares"),
        ({"into": 0, "from": [0, 1], "weights": [0.0, 0.0]}, "shares"),
    ],
)
def test_a_merge_names_experts_of_the_layer(merge, says):
    raw = example()
    raw["layers"][0]["merge"] = [merge]
    with pytest.raises(UserError, match=rf"layer 0: merge.*{says}"):
        parse_plan(raw, "here")


def test_an_expert_is_merged_once_and_does_not_stay_besides():
    raw = example()
    first(raw)["merge"] = [{"into": 0, "from": [0, 2], "weights": [0.5, 0.5]}]
    with pytest.raises(UserError, match="expert 2 is merged into 0, so it cannot be kept as well"):
        parse_plan(raw, "here")
    first(raw)["merge"] = [
        {"into": 0, "from": [0, 1], "weights": [0.5, 0.5]},
        {"into": 2, "from": [1, 2], "weights": [0.5, 0.5]},
    ]
    with pytest.raises(UserError, match="expert 1 is merged twice"):
        parse_plan(raw, "here")


def test_skip_thresholds_need_a_rule_and_are_ratios():
    raw = example()
    del raw["skip"]
    with pytest.raises(UserError, match="layer 0 has a skip_threshold, but the plan has no skip rule"):
        parse_plan(raw, "here")
    raw = example()
    first(raw)["skip_threshold"] = -0.1
    with pytest.raises(UserError, match="a ratio of routing weights"):
        parse_plan(raw, "here")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["saliency", "weights", "skip_threshold"])
def test_a_plan_holds_numbers_that_json_can_hold(key, value):
    """NaN and Infinity are no JSON: other programs could not read the plan."""
    raw = deepcopy(example())
    if key == "saliency":
        first(raw)["saliency"][1] = value
    elif key == "weights":
        first(raw)["merge"][0]["weights"][1] = value
    else:
        first(raw)["skip_threshold"] = value
    with pytest.raises(UserError, match="finite"):
        parse_plan(raw, "here")


@pytest.mark.parametrize("raw", [[], "plan", None, 3, {}, {"format": "expertsmith.statistics"}, {"layers": []}])
def test_other_json_is_not_a_plan(raw):
    with pytest.raises(UserError, match="is not an expertsmith plan"):
        parse_plan(raw, "here")


def test_files_that_hold_no_plan(tmp_path):
    with pytest.raises(UserError, match="no plan found at"):
        load_plan(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a folder"):
        load_plan(tmp_path)
    cut = json.dumps(example()).encode()[:100]
    for name, content in (("cut.json", cut), ("binary.json", b"\xff\xfe\x00"), ("empty.json", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is not JSON"):
            load_plan(tmp_path / name)


def test_many_faults_are_counted():
    raw = example()
    raw.update(a=1, b=2, c=3, d=4, e=5)
    with pytest.raises(UserError, match=r"a: unknown key; b: unknown key; c: unknown key; and 2 more"):
        parse_plan(raw, "here")


# ---- plans that are made


def test_a_made_plan_says_what_it_was_made_from(checkpoints, data, tmp_path):
    source = checkpoints("mixtral")
    stats = api.calibrate(source, data, tmp_path / "stats", **CALIBRATION)
    made = api.plan(source, "ean", "50%", stats=tmp_path / "stats", domains=["b"], out=tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made
    assert (tmp_path / "plan.json").read_text() == made.dumps()
    assert made.method.options == {"budget": "uniform", "keep": 0.5, "weighted": False, "domains": ["b"]}
    assert made.calibration.tokens == {"b": stats.tokens["b"]}
    assert made.summary.experts == (24, 12)
    for entry in made.layers:
        assert entry.why["selections"] == stats.layers[entry.layer].domains["b"]["selections"].tolist()
        assert min(entry.saliency[e] for e in entry.keep) >= max(entry.saliency[e] for e in range(8) if e not in entry.keep)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_saliency_that_is_no_number_is_refused_with_its_layer(checkpoints, data, tmp_path, value):
    """Activations that overflow give NaN or inf, and a ranking of those would be arbitrary."""
    source = checkpoints("mixtral")
    api.calibrate(source, data, tmp_path / "stats", **CALIBRATION)
    path = layer_path(tmp_path / "stats", 1)
    arrays = load_file(path)
    arrays["a/norm_sum"] = arrays["a/norm_sum"].copy()
    arrays["a/norm_sum"][3] = value
    save_file(arrays, path)
    with pytest.raises(UserError, match=r"layer 1.*expert 3"):
        api.plan(source, "ean", 0.5, stats=tmp_path / "stats")

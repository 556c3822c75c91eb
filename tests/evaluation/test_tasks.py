"""lm-eval tasks and generation checks: golden numbers, the same answers as computed by hand, resuming, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import run_cli as run
from expertsmith import api
from expertsmith.arch import families
from expertsmith.checkpoint import open_checkpoint
from expertsmith.comparison import judging
from expertsmith.demo import MODEL
from expertsmith.engine import load_model
from expertsmith.errors import UserError
from expertsmith.evaluation import generation, questions
from expertsmith.evaluation import tasks as lm_tasks
from expertsmith.evaluation.generation import Run, formats_of, loop, of_domain, repetition
from expertsmith.evaluation.paired import estimate, pooled
from expertsmith.views.progress import Silent

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "tasks"
needs_lm_eval = pytest.mark.skipif(not __import__("importlib.util").util.find_spec("lm_eval"), reason="extra eval")


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """The built-in model with half of its experts, drawn at random."""
    folder = tmp_path_factory.mktemp("half") / "out"
    api.apply(MODEL, api.plan(MODEL, "random", 0.5), folder)
    return folder


def report(capsys, *arguments: object) -> dict:
    code, out, err = run(capsys, "evaluate", *arguments, "--device", "cpu", "--dtype", "float32", "--json", "-q")
    assert code == 0, err
    assert err == ""
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def refused(capsys, *arguments: object) -> str:
    code, out, err = run(capsys, "evaluate", *arguments, "--device", "cpu", "-q")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    return err


# ---- standard errors


def test_errors_of_differences_are_those_of_the_differences():
    """mine 1 0 1 1, theirs 0 0 1 1: d = 1 0 0 0 with s = 1/2, so 1/4; for independent samples it would be sqrt(1/16 + 1/12) = 0.38."""
    found = estimate([1, 0, 1, 1], [0, 0, 1, 1])
    assert (found["value"], found["reference"], found["difference"]) == (0.75, 0.5, 0.25)
    assert found["se"] == pytest.approx(0.25)
    assert found["reference_se"] == pytest.approx(math.sqrt(1 / 12))
    assert found["difference_se"] == pytest.approx(0.25)
    assert found["clear"] is False
    assert estimate([1, 1, 1, 0] * 5, [0, 0, 0, 0] * 5)["clear"] is True


def test_one_document_has_no_error_and_the_same_answers_no_difference():
    assert estimate([1], [0]) == {
        "value": 1, "se": None, "reference": 0, "reference_se": None, "difference": 1, "difference_se": None, "clear": False,
        "errors": "documents",
    }  # fmt: skip
    same = estimate([0, 1, 1], [0, 1, 1])
    assert (same["difference"], same["difference_se"], same["clear"]) == (0, 0, False)


def test_a_score_that_is_no_mean_is_drawn_in_pairs():
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(400, generator=generator).tolist()
    mine = [value + 0.1 * noise for value, noise in zip(theirs, torch.randn(400, generator=generator).tolist(), strict=True)]
    exact, drawn = estimate(mine, theirs), estimate(mine, theirs, lambda xs: sum(xs) / len(xs))
    assert drawn["errors"] == "bootstrap"
    for key in ("se", "reference_se", "difference_se"):
        assert drawn[key] == pytest.approx(exact[key], rel=0.2)
    assert drawn["difference_se"] < 0.2 * drawn["se"]  # pairs, or this would be larger than either
    assert estimate(theirs, theirs, max)["difference_se"] == 0
    assert estimate([1.0], [2.0], max)["difference_se"] is None


def test_parts_pool_by_weight():
    """(3·0.5 + 1·0.9) / 4 = 0.6, sqrt((3·0.1)² + (1·0.4)²) / 4 = 0.125."""
    parts = [{"value": 0.5, "se": 0.1}, {"value": 0.9, "se": 0.4}]
    assert pooled(parts, [3, 1]) == {"value": pytest.approx(0.6), "se": pytest.approx(0.125), "errors": "parts"}
    assert pooled([parts[0], {"value": 0.9, "se": None}], [1, 1])["se"] is None


# ---- runs


@pytest.mark.parametrize(
    ("tokens", "repeated", "ends"),
    [
        ([1, 2, 1, 2, 1, 2], 1 / 3, (2, 3)),  # 1212 2121 1212
        ([5, 1, 2, 1, 2, 1], 0.0, None),  # two blocks and a half
        ([7, 7, 7], 0.0, (1, 3)),
        ([9, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3], 4 / 8, (3, 3)),  # cut within the fourth block
        ([1, 1, 1, 2], 0.0, None),  # a loop that was left
        ([4, 4, 4, 4, 4, 4], 2 / 3, (1, 6)),
        ([1, 2, 3, 4, 5], 0.0, None),
        ([], 0.0, None),
    ],
)  # fmt: skip
def test_repetition_and_loops_by_hand(tokens, repeated, ends):
    assert repetition(tokens) == pytest.approx(repeated)
    assert loop(tokens) == ends


@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(3, 6))
def test_a_block_that_repeats_is_found(before, block, times):
    found = loop(before + block * times)
    assert found is not None
    period, repeats = found
    assert period <= len(block)
    tail = (before + block * times)[-period * repeats :]
    assert tail == tail[:period] * repeats
    assert repeats >= 3


@given(st.lists(st.integers(), unique=True, max_size=40), st.integers(1, 5))
def test_tokens_that_differ_repeat_nothing(tokens, n):
    assert repetition(tokens, n) == 0
    assert loop(tokens) is None


def test_measures_of_a_domain():
    mine = [Run([1, 2, 1, 2, 1, 2], False), Run([3, 4], True)]
    theirs = [Run([1, 2, 3, 4, 5, 6], False), Run([3, 4, 5, 6], True)]
    found = of_domain(mine, theirs, [[True, False], [True, True]])
    assert found["loops"]["value"] == 0.5
    assert found["loops"]["reference"] == 0
    assert found["repetition"]["value"] == pytest.approx(1 / 6)
    assert (found["length"]["value"], found["length"]["reference"], found["length"]["difference"]) == (4, 5, -1)
    assert found["ended"]["difference"] == 0
    assert found["format"]["difference"] == -0.5
    assert found["periods"] == {"value": 2, "reference": None}


def test_a_format_belongs_to_a_domain_only_if_the_data_has_it():
    found = formats_of(["answer=[0-9]+", "math=#### [0-9]+"], ["code", "math"])
    assert {name: pattern.pattern for name, pattern in found.items()} == {"code": "answer=[0-9]+", "math": "#### [0-9]+"}
    assert set(formats_of(["math=x"], ["code", "math"])) == {"math"}
    with pytest.raises(UserError, match="not a regular expression"):
        formats_of(["("], ["a"])


PROMPTS = [[5, 9, 33, 7, 64], [8, 70, 41], [11, 12, 13, 14, 15, 16, 17, 18]]


def test_greedy_runs_are_those_of_the_plain_model(checkpoints):
    """Token by token without a cache; batches with padding give the same. The fourth token of the first run is made the end of text."""
    model = load_model(open_checkpoint(checkpoints("mixtral")), families()["mixtral"])
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(9):
            with torch.no_grad():
                ids.append(int(model.module(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    module = model.module
    module.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    module.generation_config.repetition_penalty = 1.7  # of the checkpoint: would hide repetition
    for batch_tokens in (1, 4096):
        runs = generation.generate(model, PROMPTS, 9, batch_tokens, Silent(), "")
        assert [run.tokens for run in runs] == expected
        assert not any(run.ended for run in runs)
    end = expected[0][3]
    module.generation_config.eos_token_id = [end]
    first = generation.generate(model, PROMPTS, 9, 4096, Silent(), "")[0]
    assert first == Run(expected[0][: expected[0].index(end)], True)


# ---- tasks


@needs_lm_eval
def test_answers_are_those_of_the_plain_model(capsys, half, tmp_path):
    """acc and acc_mutual_info of the shipped task from log-likelihoods that plain transformers computes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = report(capsys, half, "-r", MODEL, "--task-path", EXAMPLES, "--tasks", "everyday", "-o", tmp_path / "kept")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    documents = [json.loads(line) for line in (EXAMPLES / "everyday.jsonl").read_text().splitlines()]
    right: dict[str, list[list[float]]] = {"acc": [], "acc_mutual_info": []}
    for path in (half, MODEL):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

        def score(context: list[int], ending: list[int], model=model) -> float:
            with torch.no_grad():
                logs = model(torch.tensor([context + ending])).logits[0].log_softmax(-1)
            return sum(float(logs[len(context) - 1 + i, token]) for i, token in enumerate(ending))

        columns: dict[str, list[float]] = {"acc": [], "acc_mutual_info": []}
        for document in documents:
            start = tokenizer.encode(document["start"])
            scores, gains = [], []
            for text in document["endings"]:
                scores.append(score(start, tokenizer.encode(f"{document['start']} {text}")[len(start) :]))
                first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
                gains.append(scores[-1] - score([first], tokenizer.encode(f" {text}", add_special_tokens=False)))
            for name, values in (("acc", scores), ("acc_mutual_info", gains)):
                columns[name].append(float(values.index(max(values)) == document["label"]))
        for name, values in columns.items():
            right[name].append(values)
    assert set(found) == {"format", "version", "model", "reference", "tasks"}
    assert [row["metric"] for row in found["tasks"]["rows"]] == ["acc", "acc_mutual_info"]
    for row in found["tasks"]["rows"]:
        expected = estimate(*right[row["metric"]])
        assert {key: row[key] for key in expected} == pytest.approx(expected)
        assert row["documents"] == 8
        assert row["cut"] == 0
    assert right["acc"][0] != right["acc"][1] or right["acc_mutual_info"][0] != right["acc_mutual_info"][1]
    assert len(list((tmp_path / "kept").iterdir())) == 2


@needs_lm_eval
def test_a_model_against_itself_and_a_group_without_score(capsys):
    rows = report(capsys, MODEL, "-r", MODEL, "--task-path", EXAMPLES, "--tasks", "small", "--limit", 2)["tasks"]["rows"]
    assert [(row["task"], row["metric"], row["documents"]) for row in rows] == [
        ("everyday", "acc", 2), ("everyday", "acc_mutual_info", 2), ("arithmetic_words", "exact_match", 2),
    ]  # fmt: skip
    for row in rows:
        assert (row["difference"], row["difference_se"], row["clear"]) == (0, 0, False)


@needs_lm_eval
def test_layers_of_different_counts_are_asked_too(tmp_path):
    made = api.plan(MODEL, "aimer", 0.5, budget="global")
    assert len(set(made.counts)) > 1
    api.apply(MODEL, made, tmp_path / "uneven")
    found = api.evaluate(
        tmp_path / "uneven", reference=MODEL, tasks=["everyday"], task_path=[EXAMPLES], limit=3, device="cpu"
    ).to_json()
    assert [row["documents"] for row in found["tasks"]["rows"]] == [3, 3]


def own_task(folder: Path, name: str, documents: list[dict], **changes: object) -> Path:
    """A task folder of one multiple-choice task."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    config = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{c}}", "doc_to_target": "{{a}}", **changes,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return folder


DOCUMENTS = [{"q": "for i in", "c": ["range", "apple", "the"], "a": 0}, {"q": "import", "c": ["wall", "sys", "cat"], "a": 1}]


@needs_lm_eval
def test_groups_pool_their_tasks(capsys, half, tmp_path):
    metric = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    own_task(tmp_path / "t", "one", DOCUMENTS, **metric)
    own_task(tmp_path / "t", "two", [*DOCUMENTS[1:], *DOCUMENTS, DOCUMENTS[0]], **metric)
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "t" / "both.yaml").write_text(yaml.safe_dump(group))
    rows = report(capsys, half, "-r", MODEL, "--task-path", tmp_path / "t", "--tasks", "both")["tasks"]["rows"]
    assert [(row["task"], row["documents"]) for row in rows] == [("one", 2), ("two", 4), ("both", 6)]
    assert rows[2]["value"] == pytest.approx((2 * rows[0]["value"] + 4 * rows[1]["value"]) / 6)


@needs_lm_eval
def test_an_interrupted_run_goes_on_and_changed_documents_are_asked_again(half, tmp_path, monkeypatch):
    own_task(tmp_path / "t", "one", DOCUMENTS)
    own_task(tmp_path / "t", "two", DOCUMENTS)
    asked: list[str] = []
    stop_at = ["two"]
    answer = lm_tasks.answer

    def counted(found, name, model, progress, label):
        if name in stop_at:
            raise KeyboardInterrupt
        asked.append(label)
        return answer(found, name, model, progress, label)

    monkeypatch.setattr(questions.tasks, "answer", counted)
    options = {
        "tasks": ["one,two"],
        "task_path": [tmp_path / "t"],
        "out": tmp_path / "out",
        "device": "cpu",
        "dtype": "float32",
    }
    with pytest.raises(KeyboardInterrupt):
        api.evaluate(half, reference=MODEL, **options)
    assert asked == ["one (model)"]
    stop_at.clear()
    whole = api.evaluate(half, reference=MODEL, **options).to_json()
    assert asked == ["one (model)", "two (model)", "one (reference)", "two (reference)"]
    monkeypatch.setattr(judging, "resident", lambda *_: pytest.fail("nothing is left to ask"))
    assert api.evaluate(half, reference=MODEL, **options).to_json() == whole
    monkeypatch.undo()
    monkeypatch.setattr(questions.tasks, "answer", counted)
    own_task(tmp_path / "t", "one", DOCUMENTS[:1])
    api.evaluate(half, **options)
    assert asked[4:] == ["one (model)"]
    api.evaluate(half, resume=False, **options)
    assert asked[5:] == ["one (model)", "two (model)"]


@needs_lm_eval
def test_the_table_marks_what_is_clear(capsys, monkeypatch):
    from expertsmith.views import show

    monkeypatch.setenv("COLUMNS", "160")
    row = {"task": "t", "metric": "acc", "filter": "none", "higher_is_better": True, "shots": 5, "documents": 20, "cut": 3}
    show.show_tasks({"limit": 20, "rows": [{**row, **estimate([0, 0, 0, 1] * 5, [1] * 20)}]})
    out = capsys.readouterr().out
    assert "t (5 shots)" in out
    assert "1.000 ± 0.000   0.250 ± 0.099   -0.750 ± 0.099   worse" in out
    assert "3 requests of t are longer than the window" in out


# ---- generation from the command line


def test_generation_by_domain_next_to_the_original(capsys, half, tmp_path):
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"prompt": f"add {i} = ", "response": f"{i}"}) + "\n" for i in range(4))
    )
    (tmp_path / "t.txt").write_text("def add(a, b):\n    return a + b\n" * 30)
    line = ["-d", f"sum={tmp_path / 'd.jsonl'}", "-d", f"code={tmp_path / 't.txt'}", "--generate", 8, "--format", "sum=^[0-9]"]
    found = report(capsys, half, "-r", MODEL, *line, "--seq-len", 32, "--samples", 3, "-o", tmp_path / "out")
    assert set(found) == {"format", "version", "model", "reference", "domains", "mean", "generation"}
    domains = found["generation"]["domains"]
    assert {name: row["prompts"] for name, row in domains.items()} == {"code": 1, "sum": 3}
    assert domains["sum"]["format"]["responses"] == 1
    assert "format" not in domains["code"]
    for row in domains.values():
        assert row["length"]["value"] <= 8
        assert row["length"]["difference"] == row["length"]["value"] - row["length"]["reference"]
    assert len(list((tmp_path / "out").iterdir())) == 4
    code, out, _ = run(capsys, "evaluate", half, *line, "--seq-len", 32, "--device", "cpu", "-q")
    assert code == 0
    assert "ends in a loop" in out
    assert "(100% of the data's answers)" in out.replace("\n", " ") or "100%" in out


def test_prompts_end_where_the_answer_begins(tmp_path):
    from expertsmith.calibration.data import load_tokenizer
    from expertsmith.calibration.prompts import FIRST, load_prompts

    tokenizer = load_tokenizer(MODEL)
    records = [{"prompt": "add 1", "response": " two"}, {"text": "word " * 100}, {"input_ids": [5, 6, 7]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    spec, options = f"d={tmp_path / 'x.jsonl'}", {"samples": 9, "seed": 0, "vocab_size": None}
    demonstration, text, ids = load_prompts([spec], tokenizer, room=64, **options)["d"]
    assert tokenizer.decode(demonstration.ids).endswith("add 1")
    assert demonstration.response == " two"
    assert (len(text.ids), text.response, ids.ids) == (FIRST, None, [5, 6])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert tokenizer.decode(load_prompts([spec], tokenizer, room=64, **options)["d"][0].ids) == "<user>add 1<assistant>"
    with pytest.raises(UserError, match=r"x.jsonl:2 has 32 tokens, but the model's window has room for 20"):
        load_prompts([spec], tokenizer, room=20, **options)
    with pytest.raises(UserError, match="out of range"):
        load_prompts([spec], tokenizer, room=64, samples=9, seed=0, vocab_size=6)


# ---- what is refused


def test_nothing_to_measure(capsys, half):
    assert "pass --data FILE for text, or --tasks NAME" in refused(capsys, half)
    assert "--generate" in refused(capsys, half, "--tasks", "x", "--format", "y")


def test_lm_eval_missing(capsys, half, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert 'needs lm-eval; pip install "expertsmith[eval]"' in refused(
        capsys, half, "--tasks", "everyday", "--task-path", EXAMPLES
    )


def test_answers_that_are_not_there_have_no_format(capsys, half, tmp_path):
    (tmp_path / "x.txt").write_text("word " * 50)
    assert "has none" in refused(capsys, half, "-d", tmp_path / "x.txt", "--generate", 4, "--format", "x")


def test_models_of_other_vocabularies(capsys, half, tmp_path, checkpoints):
    line = ("--tasks", "everyday", "--task-path", EXAMPLES)
    assert "they need the same vocabulary" in refused(capsys, half, "-r", checkpoints("mixtral"), *line)
    other = tmp_path / "other"
    api.apply(MODEL, api.plan(MODEL, "random", 0.5), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[100:102]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "the tokenizers of" in refused(capsys, half, "-r", other, *line)
    assert "no tokenizer" in refused(capsys, checkpoints("mixtral"), *line)


@needs_lm_eval
def test_tasks_run_in_memory_only(capsys, half):
    assert "the whole model must be in memory" in refused(
        capsys, half, "--tasks", "everyday", "--task-path", EXAMPLES, "--memory", "stream"
    )


@needs_lm_eval
def test_tasks_that_cannot_be_had(capsys, half, tmp_path, monkeypatch):
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    folder = own_task(tmp_path / "t", "one", DOCUMENTS)
    line = (half, "--task-path", folder, "--tasks")
    assert "there is no lm-eval task 'oen'; did you mean one?" in refused(capsys, *line, "oen")
    assert "--tasks is empty" in refused(capsys, *line, ",")
    assert "task folder not found:" in refused(capsys, half, "--tasks", "one", "--task-path", tmp_path / "nowhere")

    own_task(folder, "lost", DOCUMENTS)
    (folder / "lost.jsonl").unlink()
    assert "the data of task lost cannot be read" in refused(capsys, *line, "lost")
    own_task(folder, "far", DOCUMENTS, dataset_path="someone/far-away", dataset_kwargs=None)
    message = refused(capsys, *line, "far")
    assert "task far needs the data set someone/far-away of the hub" in message
    assert f"include: {folder / 'far.yaml'}" in message
    assert "data_files: {test: FILE.jsonl}" in message
    own_task(folder, "damaged", DOCUMENTS)
    (folder / "damaged.jsonl").write_text("{")
    assert "task damaged cannot be built" in refused(capsys, *line, "damaged")
    own_task(folder, "split", DOCUMENTS, test_split="dev")
    assert "task split cannot be built: 'dev'" in refused(capsys, *line, "split")
    own_task(folder, "unsafe", DOCUMENTS, unsafe_code=True)
    assert "runs code that the model writes" in refused(capsys, *line, "unsafe")
    own_task(
        folder, "late", [*DOCUMENTS, {**DOCUMENTS[0], "c": "apple"}], doc_to_choice="{{c[0].nothing if c is string else c}}"
    )
    assert "lm-eval cannot run task late" in refused(capsys, *line, "late")

    (folder / "broken.yaml").write_text("task: [unclosed\n")
    assert "broken.yaml is not YAML" in refused(capsys, *line, "one")
    (folder / "broken.yaml").write_text("include: nothing.yaml\n")
    assert "broken.yaml is not a task" in refused(capsys, *line, "one")


@needs_lm_eval
def test_what_does_not_fit_into_the_window_is_told(half, tmp_path):
    """The built-in model's window is cut down to 16 tokens, so that one of two prompts is longer."""
    short = tmp_path / "short"
    api.apply(MODEL, api.plan(MODEL, "random", 0.5), short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    folder = own_task(tmp_path / "t", "one", [DOCUMENTS[0], {**DOCUMENTS[1], "q": "import " * 30}])
    rows = api.evaluate(short, tasks=["one"], task_path=[folder], device="cpu").to_json()["tasks"]["rows"]
    assert {row["cut"] for row in rows} == {3}

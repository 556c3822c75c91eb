"""Records as people publish them: every form, files packed and in columns, and what is said about sources."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import zstandard
from test_data import TEMPLATE, make_tokenizer, write_records

from conftest import run_cli
from expertsmith.calibration.data import DataOptions, load_tokens, tokenize
from expertsmith.calibration.prompts import load_prompts
from expertsmith.calibration.records import apart, in_one_form, read_records
from expertsmith.calibration.spec import Spec, is_data_file, parse_spec, refuse_missing, suffix_of
from expertsmith.errors import UserError

ASKED = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


FORMS = [
    ({"messages": ASKED}, ASKED),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}, ASKED[1]]}, ASKED),
    ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, ASKED),
    ({"conversations": ASKED}, ASKED),
    ({"system": "Be brief.", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, [BRIEF, *ASKED]),
    ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
    ({"question": "2 + 2?", "answer": "4"}, ASKED),
    ({"instruction": "2 + 2?", "input": "", "output": "4"}, ASKED),
    ({"instruction": "2 + 2?", "input": None, "output": "4", "text": None}, ASKED),
    ({"instruction": "Add.", "input": "2 + 2", "output": "4"}, [{"role": "user", "content": "Add.\n\n2 + 2"}, ASKED[1]]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "messages"), FORMS)
def test_every_form_is_the_same_conversation(record, messages, tokenizer):
    assert in_one_form(record, "here") == {"messages": messages}
    ids, demonstration = tokenize(record, tokenizer, "here")
    assert demonstration
    assert ids == tokenize({"messages": messages}, tokenizer, "here")[0]


def test_prompt_and_completion_are_prompt_and_response(tokenizer):
    pair = {"prompt": "2 + 2?", "completion": "4"}
    assert tokenize(pair, tokenizer, "here") == tokenize({"prompt": "2 + 2?", "response": "4"}, tokenizer, "here")


def test_text_comes_before_the_forms_that_are_younger():
    assert in_one_form({"text": "both", "instruction": "a", "output": "b"}, "here") == {"text": "both"}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": []}, "here has no messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "a part of type image; only text is read"),
        ({"messages": [{"role": "user", "content": None}]}, "a message of user has no text"),
        ({"messages": [{"role": "user"}]}, "a message of user has no text"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "a turn is from 'narrator'"),
        ({"instruction": "x", "input": 3, "output": "y"}, "input is not a text"),
        ({"question": "x", "answer": ["y"]}, "here has the fields answer, question"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(record, says, tokenizer):
    with pytest.raises(UserError, match=says):
        tokenize(record, tokenizer, "here")


def test_tools_and_calls_reach_the_template():
    asked = make_tokenizer()
    asked.chat_template = (
        "{% if tools %}{{ '<tools>' ~ tools[0]['name'] }}{% endif %}"
        "{% for m in messages %}{{ '<' ~ m['role'] ~ '>' ~ (m['content'] or m['tool_calls'][0]['function']['name']) }}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}  # fmt: skip
    record = {"messages": [ASKED[0], call, {"role": "tool", "content": "4"}], "tools": json.dumps([{"name": "add"}])}
    ids, _ = tokenize(record, asked, "here")
    assert asked.decode(ids) == "<tools>add<user>2 + 2?<assistant>add<tool>4"


def test_a_system_message_that_the_template_refuses_goes_before_the_users():
    strict, said = make_tokenizer(), []
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    ids, _ = tokenize({"messages": [BRIEF, *ASKED]}, strict, "here", said)
    assert strict.decode(ids) == "<user>Be brief.\n\n2 + 2?</s><assistant>4</s>"
    assert said == ["the chat template takes no system message; its text was put before the user's"]
    with pytest.raises(UserError, match="rejects these messages: no system"):
        tokenize({"messages": [BRIEF, ASKED[1]]}, strict, "here")


# ---- files


def test_packed_files_hold_the_same_records(tmp_path):
    records = [{"text": "one"}, {"text": "zwei ü"}]
    plain = write_records(tmp_path / "a.jsonl", records)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.jsonl.zst").write_bytes(
        zstandard.compress(plain.read_bytes()[:17]) + zstandard.compress(plain.read_bytes()[17:])
    )
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert [record for _, record in read_records(str(tmp_path / name))] == records
    assert suffix_of("x/b.jsonl.gz") == ".jsonl"
    assert is_data_file("a.csv")
    assert not is_data_file("a.tar.gz")
    with pytest.raises(UserError, match="data file not found"):
        refuse_missing([str(tmp_path / "no.jsonl.zst")])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_damaged_packed_file_is_named(tmp_path, name):
    whole = (gzip if name.endswith("gz") else zstandard).compress(b'{"text": "one"}\n' * 400)
    for held in (whole[: len(whole) // 2], b"nothing of the kind"):
        (tmp_path / name).write_bytes(held)
        with pytest.raises(UserError, match=name):
            list(read_records(str(tmp_path / name)))


def test_csv_has_a_record_a_row_and_columns_name_its_fields(tmp_path, tokenizer):
    file = tmp_path / "a.csv"
    with file.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows([["id", "body"], ["1", 'a "quoted", long\ntext'], ["2", "x" * 200_000]])
    assert next(record for _, record in read_records(str(file))) == {"id": "1", "body": 'a "quoted", long\ntext'}
    (place, record), _ = read_records(str(file), {"text": "body"})
    assert place.endswith("a.csv row 1")
    assert record["text"] == 'a "quoted", long\ntext'
    with pytest.raises(UserError, match="row 1 has no column txt; its columns are id, body"):
        list(read_records(str(file), {"text": "txt"}))
    read = load_tokens([str(file)], tokenizer, DataOptions(seq_len=64, columns={"text": "body"}))
    assert read.tokens["default"] > 64


def test_a_csv_file_that_is_none_is_named(tmp_path):
    for text, says in (("a,b\n1,2,3\n", "more fields"), ('a,b\n"1,2\n', "not a readable .csv file")):
        (tmp_path / "a.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=says):
            list(read_records(str(tmp_path / "a.csv")))


def test_prompts_end_where_the_answer_begins(tmp_path, tokenizer):
    file = write_records(tmp_path / "a.jsonl", [{"frage": "2 + 2?", "answer": "4"}])
    (prompt,) = load_prompts([str(file)], tokenizer, samples=1, seed=0, room=99, vocab_size=None, columns={"question": "frage"})["default"]  # fmt: skip
    assert tokenizer.decode(prompt.ids).startswith("<user>2 + 2?")
    assert prompt.response == "4"


# ---- what is said


def test_what_was_read_is_said(tmp_path, tokenizer):
    for name in ("train.jsonl", "test.jsonl", "more.txt"):
        write_records(tmp_path / name, [{"text": "some words"}])
    one, two = str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")

    def notes(*specs: str) -> list[str]:
        return load_tokens(specs, tokenizer, DataOptions(seq_len=16)).notes

    assert notes(f"a={one}", f"b={two}") == []
    assert notes(one) == []
    assert notes(one, two) == [f"{one}, {two} have no DOMAIN= and are read as one domain"]
    assert notes(one, f"b={two}") == [f"without DOMAIN=, so of domain default: {one}"]
    assert notes(f"a={one}", f"b={one}") == [f"{one} is given 2 times"]
    assert notes(f"a={tmp_path}") == [
        f"{tmp_path}: 3 files are read, more.txt, test.jsonl, train.jsonl",
        f"{tmp_path} holds training text (train.jsonl) and held-out text (test.jsonl); give the files one by one to keep them apart",
    ]


def test_columns_on_the_command_line_and_in_python(checkpoints, tmp_path, capsys):
    import expertsmith

    model = str(checkpoints("mixtral"))
    file = write_records(tmp_path / "a.jsonl", [{"numbers": [1, 2, 3, 4, 5]}])
    common = ["--seq-len", "8", "-d", str(file), "-o"]
    assert run_cli(capsys, "calibrate", model, *common, str(tmp_path / "s"), "--columns", "input_ids=numbers")[0] == 0
    held = expertsmith.calibrate(model, [str(file)], tmp_path / "t", seq_len=8, columns="input_ids=numbers")
    assert held.tokens == {"default": 5}
    code, _, err = run_cli(capsys, "calibrate", model, *common, str(tmp_path / "u"), "--columns", "numbers")
    assert code == 2
    assert "--columns 'numbers' is not KEY=VALUE" in err


def test_what_is_done_to_prompts_is_said_too(tmp_path):
    plain, said = make_tokenizer(), []
    plain.chat_template = None
    file = write_records(tmp_path / "a.jsonl", [{"messages": [BRIEF, *ASKED]}])
    (prompt,) = load_prompts([str(file)], plain, samples=1, seed=0, room=99, vocab_size=None, said=said)["default"]
    assert plain.decode(prompt.ids) == "<s>System: Be brief.\n\nUser: 2 + 2?\n\nAssistant:"
    assert "no chat template" in said[0]


# ---- parts of a source


def test_every_eighth_record_is_held_out(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(1, 20)))
    held, rest = ([record["text"] for _, record in read_records(str(file), None, part)] for part in ("heldout", "calib"))
    assert held == ["8", "16"]
    assert rest == [str(i) for i in range(1, 20) if i % 8]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.jsonl#heldout", Spec("default", "a.jsonl", None, "heldout")),
        ("m=a.jsonl#calib:25", Spec("m", "a.jsonl", 25, "calib")),
        ("m=demo:code/calib#heldout", Spec("m", "demo:code/calib", None, "heldout")),
        ("a.jsonl#other", Spec("default", "a.jsonl#other", None)),
    ],
)
def test_a_part_is_named_after_the_source(text, found):
    assert parse_spec(text) == found
    assert str(found) == text


def test_a_file_of_that_name_counts_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a#calib").mkdir()
    assert parse_spec("m=a#calib:3") == Spec("m", "a#calib", 3)
    assert parse_spec("a#calib") == Spec("default", "a#calib", None)


def test_only_sources_of_eight_records_are_set_apart(tmp_path):
    for name, count in (("seven", 7), ("eight", 8)):
        (tmp_path / f"{name}.txt.jsonl").write_text('{"text": "x"}\n' * count)
    seven, eight = (f"{tmp_path}/{name}.txt.jsonl" for name in ("seven", "eight"))
    assert apart([f"m={seven}", f"{eight}:4", f"{eight}#calib"]) == (
        [f"m={seven}", f"{eight}#calib:4", f"{eight}#calib"],
        [f"{eight}#heldout:4"],
    )

"""`--data`: sources, records, packing, sampling, batches and the fingerprint of the token ids."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run_cli
from expertsmith.calibration.data import DataOptions, TokenData, _pack, load_tokenizer, load_tokens, tokenize
from expertsmith.calibration.records import read_records
from expertsmith.calibration.spec import DEFAULT_DOMAIN, Spec, parse_spec
from expertsmith.errors import UserError

always = settings(derandomize=True, deadline=None, max_examples=80)  # the same examples in every run

LINES = [
    "The router sends every token to a few experts.",
    "An expert that no token reaches can go; the others stay.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9, and some letters: é ü ж 中.",
]
TEMPLATE = "{% for m in messages %}{{ '<' ~ m['role'] ~ '>' ~ m['content'] ~ '</s>' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE tokenizer with bos, eos, pad and a chat template."""
    return make_tokenizer()


def make_tokenizer(**options: object):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(LINES * 4, trainer)
    settled = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, **{key: value for key, value in settled.items() if value})
    fast.chat_template = TEMPLATE
    return fast


def framed(tokenizer, text: str) -> list[int]:
    return [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]


def joined(rows) -> list[int]:
    return [i for row in rows for i in row]


def write_records(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def ids_file(path: Path, rows: list[list[int]]) -> Path:
    return write_records(path, [{"input_ids": row} for row in rows])


# ---- naming data

SOURCES = st.text(st.characters(exclude_categories=["Cs", "Nd"]), min_size=1, max_size=20)
DOMAINS = st.text("abcXYZ0189_.-йß", min_size=1, max_size=8)


@always
@given(st.none() | DOMAINS, SOURCES, st.none() | st.integers(1, 10**6))
def test_names_of_data_are_taken_apart(domain, source, limit):
    text = (f"{domain}=" if domain else "") + source + (f":{limit}" if limit else "")
    found = parse_spec(text)
    if domain is None and "=" in source:
        return  # the first "=" may then end a domain: see the golden cases
    assert found == Spec(domain or DEFAULT_DOMAIN, source, limit)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("calib.jsonl", Spec("default", "calib.jsonl", None)),
        ("calib.jsonl:64", Spec("default", "calib.jsonl", 64)),
        ("math=calib.jsonl:64", Spec("math", "calib.jsonl", 64)),
        ("math=/data/a=b.jsonl", Spec("math", "/data/a=b.jsonl", None)),
        ("/data/a=b.jsonl:3", Spec("default", "/data/a=b.jsonl", 3)),
        ("./a=b.jsonl", Spec("default", "./a=b.jsonl", None)),
        ("=a.jsonl", Spec("default", "=a.jsonl", None)),
        ("my data=x", Spec("default", "my data=x", None)),  # a space is in no domain's name
        ("C:\\data\\x.jsonl", Spec("default", "C:\\data\\x.jsonl", None)),
        ("a=C:\\x.jsonl:5", Spec("a", "C:\\x.jsonl", 5)),
        ("12:30.txt", Spec("default", "12:30.txt", None)),
        ("12:30:4", Spec("default", "12:30", 4)),
        ("a=owner/name[subset](train[:10%]):7", Spec("a", "owner/name[subset](train[:10%])", 7)),
        ("code.python-3=x.md", Spec("code.python-3", "x.md", None)),
    ],
)
def test_golden_names(text, spec):
    assert parse_spec(text) == spec


@pytest.mark.parametrize("text", ["", "a=", ":5", "a=:5"])
def test_a_name_without_a_source_is_refused(text):
    with pytest.raises(UserError, match="has no source"):
        parse_spec(text)


@pytest.mark.parametrize("text", ["x.jsonl:0", "a=x.jsonl:-3"])
def test_a_limit_is_positive(text):
    with pytest.raises(UserError, match="positive number"):
        parse_spec(text)


# ---- sources


def records_of(source: Path) -> list:
    return [record for _, record in read_records(str(source))]


def test_jsonl_has_a_record_a_line(tmp_path):
    content = '{"text": "a"}\n\n   \n"b"\r\n{"text": "c\\u2028d"}\n{"text": "e\u2028f"}'
    (tmp_path / "x.jsonl").write_text(content, encoding="utf-8")
    assert records_of(tmp_path / "x.jsonl") == [{"text": "a"}, {"text": "b"}, {"text": "c\u2028d"}, {"text": "e\u2028f"}]
    places = [place for place, _ in read_records(str(tmp_path / "x.jsonl"))]
    assert places == [f"{tmp_path / 'x.jsonl'}:{line}" for line in (1, 4, 5, 6)]


@pytest.mark.parametrize(
    ("content", "records"),
    [
        ([{"text": "a"}, "b"], [{"text": "a"}, {"text": "b"}]),
        ({"text": "a"}, [{"text": "a"}]),
        ("a whole text", [{"text": "a whole text"}]),
        ([], []),
    ],
)
def test_json_has_a_list_or_one_record(content, records, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert records_of(tmp_path / "x.json") == records


@pytest.mark.parametrize("content", ["5", "null", "true", "[5]", "[[]]"])
def test_json_that_is_no_record_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json.* is a (int|NoneType|bool|list)"):
        records_of(tmp_path / "x.json")


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document(suffix, tmp_path):
    (tmp_path / f"x{suffix}").write_text("one\n\ntwo\n", encoding="utf-8")
    assert records_of(tmp_path / f"x{suffix}") == [{"text": "one\n\ntwo\n"}]


def test_parquet_has_a_record_a_row(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"text": "a", "messages": None}, {"text": None, "messages": [{"role": "user", "content": "b"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert records_of(tmp_path / "x.parquet") == rows
    assert [place for place, _ in read_records(str(tmp_path / "x.parquet"))][1] == f"{tmp_path / 'x.parquet'} row 2"


def test_a_damaged_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    for content in (b"junk", b"PAR1" + bytes(40) + b"PAR1", b""):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.parquet"):
            records_of(tmp_path / "x.parquet")


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.md", "10.txt", "ignored.csv", "README"):
        (tmp_path / name).write_text(name)
    assert [record["text"] for record in records_of(tmp_path)] == ["10.txt", "a.txt", "b.txt", "deep/c.md"]


def test_files_that_are_no_text_are_named(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"ok \xff\xfe")
    with pytest.raises(UserError, match=r"x\.txt is not UTF-8: .* at byte 3"):
        records_of(tmp_path / "x.txt")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"x\.jsonl:2 is not JSON"):
        records_of(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_text('{"text": "a"}\n5\n')
    with pytest.raises(UserError, match=r"y\.jsonl:2 is a int"):
        records_of(tmp_path / "y.jsonl")


# ---- hub data sets


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("wikitext", ("wikitext", None, "train")),
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name[sub-set 1]", ("owner/name", "sub-set 1", "train")),
        ("owner/name(validation)", ("owner/name", None, "validation")),
        ("owner/name[main](test[:5%])", ("owner/name", "main", "test[:5%]")),
        ("o-w.n_er/na-m.e_2[a](b)", ("o-w.n_er/na-m.e_2", "a", "b")),
    ],
)
def test_hub_data_sets_are_named_by_subset_and_split(monkeypatch, source, wanted):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_records(source)) == [(f"{source} row 1", {"text": "a"}), (f"{source} row 2", {"text": "b"})]
    assert asked == [wanted]


def test_a_limit_goes_with_a_hub_data_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"input_ids": [i, i + 1]} for i in range(9)])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, *, split: table)
    found = load_tokens(["a=owner/name(train[:9]):4"], None, DataOptions(seq_len=8, pack=False))
    assert len(found.sequences["a"]) == 4


def test_a_hub_data_set_that_cannot_be_loaded_is_refused_in_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise RuntimeError("no such thing\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"'owner/name' is not a file, .* could not be loaded: no such thing$"):
        list(read_records("owner/name"))


@pytest.mark.parametrize(("source", "module"), [("owner/name", "datasets"), ("x.parquet", "pyarrow.parquet")])
def test_a_library_that_is_missing_is_named(monkeypatch, tmp_path, source, module):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # what a missing module looks like to `import`
    with pytest.raises(UserError, match=r'pip install "expertsmith\[data\]"'):
        list(read_records(source))


@pytest.mark.parametrize("source", ["a/b/c", "owner/name[", "owner/name[x", "name()", "one two"])
def test_what_is_neither_file_nor_data_set_is_refused(source):
    with pytest.raises(UserError, match=r"data file not found: .* not a hub data set"):
        list(read_records(source))


# ---- records


def test_a_text_stands_between_bos_and_eos(tokenizer):
    ids, demonstration = tokenize({"text": LINES[0]}, tokenizer, "here")
    assert (ids[0], ids[-1], demonstration) == (1, 2, False)
    assert tokenizer.decode(ids[1:-1]) == LINES[0]
    assert 1 not in ids[1:-1]


def test_a_text_has_no_bos_or_eos_where_the_tokenizer_has_none():
    bare = make_tokenizer(bos_token=None, eos_token=None)
    ids, _ = tokenize({"text": LINES[0]}, bare, "here")
    assert ids == bare(LINES[0], add_special_tokens=False)["input_ids"]


def test_messages_are_what_the_chat_template_makes_of_them(tokenizer):
    messages = [{"role": "user", "content": "Numbers"}, {"role": "assistant", "content": "0 1 2"}]
    ids, demonstration = tokenize({"messages": messages}, tokenizer, "here")
    assert demonstration
    assert tokenizer.decode(ids) == "<user>Numbers</s><assistant>0 1 2</s>"
    assert ids.count(2) == 2  # the template's own; none is added
    assert 1 not in ids


def test_prompt_and_response_are_a_conversation_where_there_is_a_template(tokenizer):
    messages = [{"role": "user", "content": "Numbers"}, {"role": "assistant", "content": "0 1 2"}]
    record = {"prompt": "Numbers", "response": "0 1 2"}
    assert tokenize(record, tokenizer, "here") == tokenize({"messages": messages}, tokenizer, "here")


def test_prompt_and_response_are_joined_where_there_is_no_template():
    plain = make_tokenizer()
    plain.chat_template = None
    ids, demonstration = tokenize({"prompt": "Numbers: ", "response": "0 1 2"}, plain, "here")
    assert demonstration
    assert ids == framed(plain, "Numbers: 0 1 2")


def test_input_ids_are_taken_as_they_are():
    assert tokenize({"input_ids": [5, 4, 3], "text": "x"}, None, "here") == ([5, 4, 3], False)
    assert tokenize({"input_ids": (1, 2)}, None, "here") == ([1, 2], False)


def test_an_empty_column_is_as_good_as_none(tokenizer):
    """Tables have every column in every row."""
    record = {"text": LINES[0], "input_ids": None, "messages": None, "prompt": None, "response": None}
    assert tokenize(record, tokenizer, "here") == (framed(tokenizer, LINES[0]), False)


def test_a_long_text_brings_no_warning_of_the_tokenizer(tokenizer, capfd):
    long = make_tokenizer(model_max_length=4)
    tokenize({"text": LINES[0] * 3}, long, "here")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, r"here has the fields \(none\), but a record needs input_ids, text"),
        ({"body": "x", "id": 3}, "here has the fields body, id"),
        ({"text": 5}, "here has the fields text"),
        ({"prompt": "x"}, "here has the fields prompt"),
        ({"prompt": "x", "response": None}, "here has the fields prompt, response"),
        ({"messages": "hello"}, "here has the fields messages"),
        ({"input_ids": "1 2 3"}, "here: input_ids is not a list of integers"),
        ({"input_ids": [1, 2.5]}, "here: input_ids is not a list of integers"),
        ({"messages": ["hello"]}, "here: a message has no role"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tokenizer, record, says):
    with pytest.raises(UserError, match=says):
        tokenize(record, tokenizer, "here")


def test_messages_without_a_template_are_written_plainly_and_that_is_said():
    plain, said = make_tokenizer(), []
    plain.chat_template = None
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    ids, demonstration = tokenize({"messages": messages}, plain, "here", said)
    assert demonstration
    assert plain.decode(ids) == "<s>User: Why?\n\nAssistant: So.</s>"
    assert said == ['the tokenizer has no chat template; messages are written as "User: …" and "Assistant: …"']


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(UserError, match="here has text, but the model directory has no tokenizer"):
        tokenize({"text": "x"}, None, "here")


def test_the_tokenizer_of_a_model_directory_is_found(tokenizer, tmp_path):
    assert load_tokenizer(tmp_path) is None
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert tokenize({"text": LINES[2]}, again, "here") == tokenize({"text": LINES[2]}, tokenizer, "here")
    talk = {"prompt": "a", "response": "b"}
    assert tokenize(talk, again, "here") == tokenize(talk, tokenizer, "here")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path)


# ---- packing

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=8)


@always
@given(DOCUMENTS, st.integers(2, 9))
def test_packing_puts_every_token_into_one_window(documents, seq_len):
    stream = joined(documents)
    windows = list(_pack(documents, seq_len, 0))
    left_out = len(stream) % seq_len == 1  # one token alone predicts nothing
    assert joined(windows) == stream[: len(stream) - left_out]
    assert all(len(window) == seq_len for window in windows[:-1])
    assert all(2 <= len(window) <= seq_len for window in windows)


@always
@given(st.integers(2, 60), st.integers(1, 9))
def test_windows_that_overlap_by_one_predict_every_token_once(length, step):
    windows = list(_pack([list(range(length))], step + 1, 1))  # ids are positions
    assert Counter(i for window in windows for i in window[1:]) == Counter(range(1, length))
    assert all(b == a + 1 for window in windows for a, b in pairwise(window))
    assert all(len(window) <= step + 1 for window in windows)
    assert all(after[0] == before[-1] for before, after in pairwise(windows))


def test_text_is_packed_and_demonstrations_are_not(tokenizer, tmp_path):
    texts = write_records(tmp_path / "t.jsonl", [{"text": line} for line in LINES])
    talks = write_records(tmp_path / "m.jsonl", [{"prompt": "Numbers", "response": line} for line in LINES])
    options = DataOptions(seq_len=200)
    packed = load_tokens([f"t={texts}"], tokenizer, options)
    assert packed.sequences["t"] == [joined(framed(tokenizer, line) for line in LINES)]
    assert packed.packed == {"t": True}
    whole = load_tokens([f"m={talks}"], tokenizer, options)
    assert len(whole.sequences["m"]) == 3
    assert whole.packed == {"m": False}
    turned = load_tokens([f"t={texts}"], tokenizer, DataOptions(seq_len=200, pack=False))
    assert turned.sequences["t"] == [framed(tokenizer, line) for line in LINES]
    together = load_tokens([f"m={talks}"], tokenizer, DataOptions(seq_len=200, pack=True))
    assert together.sequences["m"] == [joined(whole.sequences["m"])]


def test_an_overlong_record_is_refused_cut_or_dropped(tmp_path):
    path = ids_file(tmp_path / "x.jsonl", [[1] * 4, [2] * 9, [3] * 5])

    def rows(overlong: str) -> list[list[int]]:
        return load_tokens([str(path)], None, DataOptions(seq_len=5, pack=False, overlong=overlong)).sequences["default"]

    with pytest.raises(UserError, match=r"x\.jsonl:2 has 9 tokens, more than the window of 5"):
        rows("refuse")
    assert rows("truncate") == [[1] * 4, [2] * 5, [3] * 5]
    assert rows("drop") == [[1] * 4, [3] * 5]
    with pytest.raises(UserError, match=r"no record .* has between 2 and 3 tokens"):
        load_tokens([str(path)], None, DataOptions(seq_len=3, pack=False, overlong="drop"))


@pytest.mark.parametrize("vocab_size", [None, 10])
@pytest.mark.parametrize("pack", [True, False])
def test_one_token_is_too_little(tmp_path, pack, vocab_size):
    path = ids_file(tmp_path / "x.jsonl", [[5]])
    with pytest.raises(UserError, match=r"x\.jsonl (has one token|has between 2 and 8 tokens)"):
        load_tokens([str(path)], None, DataOptions(seq_len=8, pack=pack), vocab_size=vocab_size)


def test_options_that_make_no_sense_are_refused(tmp_path):
    path = str(ids_file(tmp_path / "x.jsonl", [[5, 6]]))
    with pytest.raises(UserError, match="no data given"):
        load_tokens([], None, DataOptions())
    with pytest.raises(UserError, match="seq_len is 1"):
        load_tokens([path], None, DataOptions(seq_len=1))
    with pytest.raises(UserError, match="samples is 0"):
        load_tokens([path], None, DataOptions(samples=0))
    with pytest.raises(UserError, match=r"--seq-len 65 is longer .* 64 positions; use --seq-len 64 or less"):
        load_tokens([path], None, DataOptions(seq_len=65), max_positions=64)
    assert load_tokens([path], None, DataOptions(seq_len=64), max_positions=64).tokens == {"default": 2}


@pytest.mark.parametrize("wrong", [10, -1, 2**70])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, wrong):
    path = str(ids_file(tmp_path / "x.jsonl", [[0, 9], [3, wrong]]))
    with pytest.raises(UserError, match=rf"x\.jsonl has token id {wrong}, but the model's vocabulary has 10 entries"):
        load_tokens([path], None, DataOptions(pack=False), vocab_size=10)


# ---- sampling


@pytest.fixture
def numbered(tmp_path) -> Path:
    """40 records that tell their number."""
    return ids_file(tmp_path / "n.jsonl", [[i, i] for i in range(40)])


def sampled(*specs: str, **options: object) -> dict[str, list[int]]:
    found = load_tokens(specs, None, DataOptions(**{"seq_len": 8, "pack": False, "samples": 10, **options}))
    return {domain: [row[0] for row in rows] for domain, rows in found.sequences.items()}


def test_the_same_seed_takes_the_same_rows(numbered):
    first = sampled(f"a={numbered}", seed=1)["a"]
    assert first == sampled(f"a={numbered}", seed=1)["a"]
    assert len(first) == 10
    assert first == sorted(set(first))  # each once, in the order of the file
    assert first != sampled(f"a={numbered}", seed=2)["a"]
    assert first != list(range(10))


def test_domains_draw_for_themselves(numbered):
    """Neither the other domains nor the order of the arguments change what a domain gets."""
    both = sampled(f"a={numbered}", f"b={numbered}")
    assert both == sampled(f"b={numbered}", f"a={numbered}")
    assert list(both) == ["a", "b"]
    assert both["a"] == sampled(f"a={numbered}")["a"]
    assert both["a"] != both["b"]


def test_a_limit_counts_more_than_samples(numbered):
    assert len(sampled(f"a={numbered}:3")["a"]) == 3
    assert len(sampled(f"a={numbered}:30")["a"]) == 30
    assert sampled(f"a={numbered}:99")["a"] == list(range(40))
    assert sampled(f"a={numbered}", samples=40)["a"] == list(range(40))


def test_every_row_can_be_drawn(numbered):
    seen = {row for seed in range(40) for row in sampled(f"a={numbered}:5", seed=seed)["a"]}
    assert seen == set(range(40))


def test_two_sources_of_one_domain_are_joined(numbered, tmp_path):
    other = ids_file(tmp_path / "o.jsonl", [[100 + i, 7] for i in range(5)])
    found = sampled(f"a={numbered}:4", f"a={other}")["a"]
    assert len(found) == 9
    assert found[4:] == [100, 101, 102, 103, 104]
    assert found[:4] == sampled(f"a={numbered}:4")["a"]


# ---- fingerprint

ROWS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=3)
TOKEN_DATA = st.dictionaries(st.sampled_from(["a", "b", "ab"]), ROWS, min_size=1)


@always
@given(TOKEN_DATA, TOKEN_DATA)
def test_the_fingerprint_is_that_of_the_ids_their_domains_and_where_sequences_end(one, two):
    prints = [TokenData(rows, dict.fromkeys(rows, False)).fingerprint for rows in (one, two)]
    assert (prints[0] == prints[1]) == (one == two)


def test_near_misses_have_other_fingerprints():
    base = {"a": [[1, 2], [3]], "b": [[4]]}
    others = [
        {"a": [[1], [2, 3]], "b": [[4]]},
        {"a": [[1, 2, 3]], "b": [[4]]},
        {"a": [[3], [1, 2]], "b": [[4]]},
        {"a": [[1, 2], [3], [4]]},
        {"a": [[1, 2]], "b": [[3], [4]]},
        {"b": [[1, 2], [3]], "a": [[4]]},
        {"a": [[1, 2], [3]], "c": [[4]]},
        {"a": [[1, 2], [5]], "b": [[4]]},
    ]
    prints = [TokenData(rows, {}).fingerprint for rows in (base, *others)]
    assert len(set(prints)) == len(prints)
    assert TokenData(dict(reversed(base.items())), {}).fingerprint == prints[0]
    assert prints[0].startswith("sha256:")


# ---- batches

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=9)
SEQUENCES = st.dictionaries(st.sampled_from("ab"), LENGTHS.map(lambda ns: [list(range(1, n + 1)) for n in ns]), min_size=1)


@always
@given(SEQUENCES, st.integers(1, 40))
def test_every_sequence_is_in_one_batch_and_only_padding_is_masked(sequences, batch_tokens):
    data = TokenData(sequences, dict.fromkeys(sequences, False))
    batches = data.batches(batch_tokens, pad_id=99)
    seen = []
    for batch in batches:
        assert batch.input_ids.shape == batch.mask.shape
        assert batch.mask.dtype == torch.bool
        assert len(batch.sequences) == batch.input_ids.shape[0]
        assert batch.mask.shape[1] == int(batch.mask.sum(1).max())  # no column is padding only
        assert batch.input_ids.numel() <= batch_tokens or batch.input_ids.shape[0] == 1
        for ids, mask, index in zip(batch.input_ids, batch.mask, batch.sequences, strict=True):
            row = sequences[batch.domain][index]
            assert ids[mask].tolist() == row
            assert mask[: len(row)].all()  # padded on the right
            assert (ids[~mask] == 99).all()
            seen.append((batch.domain, index))
    assert sorted(seen) == sorted((domain, i) for domain, rows in sequences.items() for i in range(len(rows)))
    assert sum(batch.tokens for batch in batches) == sum(data.tokens.values())


def test_rows_of_like_length_share_a_batch():
    data = TokenData({"a": [[1] * 2, [1] * 8, [1] * 2, [1] * 8]}, {"a": False})
    assert [batch.sequences for batch in data.batches(16)] == [[1, 3], [0, 2]]
    assert [tuple(batch.input_ids.shape) for batch in data.batches(16)] == [(2, 8), (2, 2)]


# ---- names that look like labels


@pytest.mark.parametrize(
    ("text", "there", "read"),
    [
        ("a=b.jsonl", ["a=b.jsonl"], ("default", "a=b.jsonl", None)),
        ("a=b.jsonl:4", ["a=b.jsonl"], ("default", "a=b.jsonl", 4)),
        ("a=b.jsonl", ["b.jsonl"], ("a", "b.jsonl", None)),
        ("a=b.jsonl", [], ("a", "b.jsonl", None)),
        ("a=b.jsonl", ["a=b.jsonl", "b.jsonl"], ("default", "a=b.jsonl", None)),
        ("x=a=b.jsonl:4", ["a=b.jsonl"], ("x", "a=b.jsonl", 4)),
        ("b.jsonl:4", ["b.jsonl:4"], ("default", "b.jsonl:4", None)),
        ("a=b.jsonl:4", ["b.jsonl:4", "b.jsonl"], ("a", "b.jsonl", 4)),
        ("a=" + "b" * 5000, [], ("a", "b" * 5000, None)),
    ],
)
def test_a_file_that_is_there_counts(tmp_path, monkeypatch, text, there, read):
    from expertsmith.calibration.spec import other_reading

    monkeypatch.chdir(tmp_path)
    for name in there:
        (tmp_path / name).write_text("")
    spec = parse_spec(text)
    assert (spec.domain, spec.source, spec.limit) == read
    said = other_reading(text)
    assert (said is not None) == (there == ["a=b.jsonl", "b.jsonl"])
    if said:
        assert "write a=./b.jsonl" in said
        other = parse_spec("a=./b.jsonl")
        assert (other.domain, other.source) == ("a", "./b.jsonl")


def test_an_ambiguous_name_is_said(tmp_path, monkeypatch, checkpoints, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"input_ids": [1, 2, 3]}\n')
    code, out, err = run_cli(capsys, "calibrate", checkpoints("mixtral"), "-d", "a=b.jsonl", "-o", "stats", "--no-pack")
    assert code == 0
    assert "default" in out
    assert "'a=b.jsonl' is the file or folder of that name, not b.jsonl of the domain a" in err

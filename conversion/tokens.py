"""Documents to blocks of token ids, each with the label that says whether a token is learned from.

A document is a text, the messages of a conversation, or a prompt and its completion. Conversations are put in the words
of the tokenizer's chat template. What a model should learn to say is a text, a completion, and what the assistant says
with the end of its turn; a user's words and the template's are there to be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_fwp.telling import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Document = str | Messages | tuple[Any, Any]  # a pair: prompt and completion, both texts or both messages

IGNORED = -100  # the label of a token that does not count
SLOW_S = 2  # from here on reading shows a bar
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # where a template marks what the assistant says


class TooShort(ValueError):
    """A text `has` fewer tokens than are `needed`."""

    def __init__(self, has: int, needed: int, sequence_length: int) -> None:
        super().__init__(has, needed, sequence_length)  # what it is made of again in another process
        self.has, self.needed, self.sequence_length = has, needed, sequence_length

    def __str__(self) -> str:
        return (
            f"the data has {self.has} tokens, but {self.needed} are needed (blocks of {self.sequence_length}); give "
            "more text; if a file or a folder was meant, a pathlib.Path, if a dataset, datasets.load_dataset(...)"
        )


def token_blocks(
    texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int, tokens: int | None = None
) -> Tensor:
    """`[N, sequence_length]` token ids: the documents in a row, an end-of-text token after each, cut into blocks.
    Documents without text are left out.

    Reads no further than `tokens` needs (rounded up to whole blocks); without `tokens` every whole block there is.
    Conversations are put in the words of the tokenizer's chat template.
    """
    return labelled_blocks(texts, tokenizer, sequence_length=sequence_length, tokens=tokens, labelled=False)[0]


def labelled_blocks(
    texts: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    tokens: int | None = None,
    at_least: int | None = None,
    labelled: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The blocks of `token_blocks`, and their labels: the token where it counts, else -100; None where all count, as
    all do unless `labelled`. A text that is too short for `tokens` will do if it has `at_least` so many.

    Raises TooShort, a ValueError, for a text that has too few; ValueError for conversations in which nobody answers,
    and for a chat template that rewrites earlier turns when a later one follows without marking the answers
    (`{% generation %}`).
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}; it must be at least 2")
    needed, least = (None if n is None else -(-n // sequence_length) * sequence_length for n in (tokens, at_least))
    ids, labels = array("q"), array("q")  # lists of ints would take four times the memory
    with progress_bar(total=needed, desc="tokenise", unit="tok", unit_scale=True, delay=SLOW_S) as bar:
        for text in filter(has_text, texts):
            more, their_labels = _document_ids(text, tokenizer, labelled=labelled)
            ids.extend(more)
            labels.extend(their_labels)
            bar.update(min(len(ids), needed or len(ids)) - bar.n)
            if needed is not None and len(ids) >= needed:
                break
    wanted = next((n for n in (least, needed) if n is not None), sequence_length)
    if len(ids) < wanted:
        raise TooShort(len(ids), wanted, sequence_length)
    blocks = (len(ids) if needed is None else min(len(ids), needed)) // sequence_length
    ids_NT, labels_NT = (
        torch.tensor(memoryview(each)[: blocks * sequence_length]).view(blocks, sequence_length)
        for each in (ids, labels)
    )
    if blocks and not (labels_NT != IGNORED).any():
        raise ValueError("in none of the conversations that were read does the assistant say anything to learn from")
    return ids_NT, None if torch.equal(ids_NT, labels_NT) else labels_NT


def kept_blocks(
    file: Path | None, texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """The blocks and labels of `labelled_blocks`, written to `file`, or read from it where it is there.

    It is read if the documents that its blocks were made of, the tokenizer and the settings are the same: documents are
    read and compared, which takes far less time. If they are not, it is left alone. Without a file nothing is kept.
    """
    if file is None:
        return labelled_blocks(texts, tokenizer, **settings)
    made_by = {"tokenizer": tokenizer_digest(tokenizer), "settings": json.dumps(settings, sort_keys=True)}
    if file.is_file():
        with safe_open(file, framework="pt") as kept:
            said = kept.metadata()
        again = Passing(islice(texts, int(said["documents"])))
        if said == {**made_by, **again.to_the_end()}:
            found = load_file(file)
            labels = found.get("labels")
            return found["ids"].long(), None if labels is None else labels.long()
        return labelled_blocks(texts, tokenizer, **settings)
    passing = Passing(texts)
    ids_NT, labels_NT = labelled_blocks(passing, tokenizer, **settings)
    tensors = {"ids": ids_NT} if labels_NT is None else {"ids": ids_NT, "labels": labels_NT}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    save_file({name: tensor.int() for name, tensor in tensors.items()}, unfinished, {**made_by, **passing.passed()})
    unfinished.replace(file)
    return ids_NT, labels_NT


class Passing:
    """Documents, counted and digested as they are read."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents, self.count, self.digest = documents, 0, hashlib.sha256()

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            self.count += 1
            self.digest.update(json.dumps(document, sort_keys=True, default=str).encode())
            yield document

    def passed(self) -> dict[str, str]:
        """How many documents were read, and their digest."""
        return {"documents": str(self.count), "digest": self.digest.hexdigest()}

    def to_the_end(self) -> dict[str, str]:
        """`passed`, when all have been read."""
        for _ in self:
            pass
        return self.passed()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for tokenizers that give the same tokens, as far as their files say."""
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    words = json.dumps(tokenizer.get_vocab(), sort_keys=True) if fast is None else fast.to_str()
    said = [type(tokenizer).__name__, words, tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def has_text(document: Document) -> bool:
    """Whether there is anything but space in it."""
    if isinstance(document, str):
        return bool(document.strip())
    parts: Any = document
    if isinstance(document, tuple):
        return any(map(has_text, parts))
    said = (message["content"] for message in parts)
    return any(part.strip() if isinstance(part, str) else part for part in said)


def _document_ids(
    document: Document, tokenizer: PreTrainedTokenizerBase, *, labelled: bool
) -> tuple[list[int], list[int]]:
    """The ids of a document with an end-of-text token, and their labels; unless `labelled` all tokens count."""
    end: Any = tokenizer.eos_token_id
    if isinstance(document, str):
        ids = ids_of(document, tokenizer) + ([] if end is None else [end])
        return ids, ids
    given: Any = document
    prompt: Any = given[0] if isinstance(given, tuple) else []
    said: Any = given[1] if isinstance(given, tuple) else given
    if isinstance(said, str):
        ids, labels = _completed(prompt, said, tokenizer)
    elif labelled:
        ids, labels = chat_labels([*prompt, *said], tokenizer, first=len(prompt))
    else:
        ids = labels = chat_ids([*prompt, *said], tokenizer)
    if end is not None and ids[-1:] != [end]:  # some templates end with it
        # a text's end is its author's; what follows a turn of the template is not the assistant's
        ids, labels = [*ids, end], [*labels, end if isinstance(said, str) else IGNORED]
    return ids, labels if labelled else ids


def _completed(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of both in a row, as one text; labels from the first token on that the completion changes."""
    ids, asked = ids_of(prompt + completion, tokenizer), ids_of(prompt, tokenizer)
    pairs = zip(ids, asked, strict=False)
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(asked)))
    return ids, [IGNORED] * same + ids[same:]


def chat_labels(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, first: int = 0
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation: labels for what the assistant says, the end of its turn included, from message
    `first` on."""
    check_template(tokenizer)
    if not first and GENERATION.search(str(tokenizer.chat_template)):
        return _marked(messages, tokenizer)
    ids = chat_ids(messages, tokenizer)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn < first:
            continue
        asked = chat_ids(messages[:turn], tokenizer, prompt=True)
        answered = chat_ids(messages[: turn + 1], tokenizer)
        if answered[: len(asked)] != asked or ids[: len(answered)] != answered:
            raise ValueError(
                "the chat template rewrites earlier turns; give conversations of one answer each, or a template that "
                "marks what the assistant says ({% generation %})"
            )
        labels[len(asked) : len(answered)] = answered[len(asked) :]
    return ids, labels


def _marked(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    found = _in_template(messages, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids: list[int] = list(found["input_ids"])
    counted = zip(ids, found["assistant_masks"], strict=True)
    return ids, [token if says else IGNORED for token, says in counted]


def chat_ids(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False) -> list[int]:
    """Token ids of a conversation; with `prompt` also the words that ask the assistant to go on."""
    check_template(tokenizer)
    return ids_of(str(_in_template(messages, tokenizer, tokenize=False, add_generation_prompt=prompt)), tokenizer)


def _in_template(messages: Messages, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Any:
    """What the chat template makes of a conversation; ValueError where it refuses it, as some do a system's words."""
    from jinja2 import TemplateError  # of the package that the template itself needs

    given: Any = [dict(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(given, **settings)
    except (TemplateError, TypeError) as fault:
        told = ", ".join(f"{message['role']}: {str(message['content'])[:60]!r}" for message in given[:3])
        raise ValueError(
            f"the chat template refuses the conversation of {len(given)} messages that begins with {told or 'none'}: "
            f"{fault}; leave it out, or change its roles or the template"
        ) from fault


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text, without any that the tokenizer would add."""
    found: Any = tokenizer(text, add_special_tokens=False, verbose=False)
    return list(found["input_ids"])


def check_ids(model: Any, blocks: Iterable[Tensor], *, who: str = "the model") -> None:
    """Refuse token ids that the model does not know."""
    known: Any = model.get_input_embeddings()
    largest = max((int(ids_NT.max()) for ids_NT in blocks if ids_NT.numel()), default=0)
    if largest >= len(known.weight):
        raise ValueError(
            f"the tokenizer gives token {largest}, but {who} has only {len(known.weight)}; give the tokenizer that it "
            "was trained with"
        )


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the data holds conversations, and the tokenizer has no chat template for them; give a tokenizer that has "
            "one (or set tokenizer.chat_template), or texts"
        )

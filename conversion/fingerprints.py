"""Short words that are the same for the same weights, or the same text: a run goes on only with what it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import read_splits
from .teacher import weights_folder
from .tokens import Passing, token_blocks

LETTERS = 16  # of a digest, that are kept
DOCUMENTS = 100  # of a training text, that are looked at
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as so many bytes


def blocks_fingerprint(blocks: dict[str, Tensor]) -> str:
    """The same for the same tokens in the same stages."""
    digest = hashlib.sha256()
    for name, ids_NT in blocks.items():
        digest.update(name.encode() + ids_NT.numpy().tobytes())
    return digest.hexdigest()[:LETTERS]


def text_fingerprint(data: Any, tokenizer: PreTrainedTokenizerBase, *, tokens: int) -> str:
    """The same for the same `tokens` held-out tokens, and the same first documents to train on."""
    _, train, heldout = read_splits(data)
    measured: Any = train if heldout is None else heldout
    ids_NT = token_blocks(measured, tokenizer, sequence_length=max(2, tokens), tokens=tokens)
    first = Passing(islice(train, DOCUMENTS)).to_the_end()
    return _digest([blocks_fingerprint({"heldout": ids_NT}), first["digest"]])


def weights_fingerprint(model: PreTrainedModel) -> str:
    """The same for the same weights; of a model without any in memory, for files of the same names and sizes."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return _digest(_files(weights_folder(str(model.name_or_path))))
    return _digest(f"{name} {tuple(each.shape)} {_sum_of_bits(each)}" for name, each in model.named_parameters())


@torch.no_grad()
def _sum_of_bits(parameter: Tensor) -> int:
    # of integers: a sum of floats would depend on how many threads share it
    return int(parameter.contiguous().view(INTEGERS[parameter.element_size()]).sum(dtype=torch.int64))


def _files(folder: Path) -> Iterable[str]:
    yield folder.resolve().name
    for file in sorted(folder.glob("*.safetensors*")):  # an index among them
        yield f"{file.name} {file.stat().st_size}"
        if file.suffix == ".json":
            yield file.read_text()


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:LETTERS]

"""What a model still finds in its context, where conversions lose first.

needles    a long text of noise says a number once, and ends by asking for it (S-NIAH-1 of Hsieh et al. 2024, arXiv
           2404.06654): how many of the numbers, and of their tokens, are said
pairs      lines of two random words each, all said twice, the second time in another order (MQAR of Arora et al. 2023,
           arXiv 2312.04927, in words): how many tokens of the second words are foretold

A token is foretold where it is the most likely one after all true ones before it; a number all of whose tokens are is
what greedy generation would say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_fwp.telling import progress_bar

from .positions import positions_said
from .scores import evaluating

LENGTHS = (512, 2048)  # tokens of a text with a needle in it
PAIRS = (16, 64)
DIGITS = 7
# column of a table: what of recall() stands in it
COLUMNS = {
    "needle 512": ("needles", 512, "found"),
    "needle 2048": ("needles", 2048, "found"),
    "pairs 64": ("pairs", 64, "foretold"),
}
EXPLAINED = (
    "needle: numbers of seven digits found again in so many tokens, pairs: second words of so many pairs foretold"
)
BEGINNING = "One of these lines says a secret number. Remember it, you will be asked for it at the end.\n"
NOISE = ("The river runs by the mill.", " The wind is in the trees.", " The road goes over the hill and back.\n")
NEEDLE = "The secret number of the {name} is {number}.\n"
QUESTION = "What is the secret number of the {name}? The secret number of the {name} is"
NAMES = ("baker", "captain", "doctor", "farmer", "gardener", "painter", "sailor", "teacher")


@dataclass(frozen=True)
class Probe:
    """A text, and which of its tokens are to be foretold."""

    ids_T: Tensor
    asked: Tensor  # their places in ids_T, ascending


def recall(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    *,
    needles: int = 4,
    lengths: Sequence[int] = LENGTHS,
    pairs: Sequence[int] = PAIRS,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """For each model {"texts": needles, "needles": {length: {"found", "foretold"}}, "pairs": {count: {"foretold"}}}:
    the shares of numbers and of their tokens that it says, and of second words, all on the same texts.

    Texts that are longer than the positions of a model, and more pairs than the vocabulary has words for, are left out.
    Raises ValueError for fewer than one needle, and for a length that has no room for one.
    """
    if needles < 1:
        raise ValueError(f"{needles} needles say nothing; give at least 1")
    tasks = _tasks(models, tokenizer, count=needles, lengths=lengths, pairs=pairs, seed=seed)
    found: dict[str, dict[str, Any]] = {name: {"texts": needles, "needles": {}, "pairs": {}} for name in models}
    total = len(models) * sum(probe.ids_T.numel() for _, _, probes in tasks for probe in probes)
    with progress_bar(total=total, desc="recall", unit="tok", unit_scale=True, progress=progress) as bar:
        for kind, size, probes in tasks:
            for name, model in models.items():
                hits = []
                for probe in probes:
                    hits.append(foretold(model, probe))
                    bar.update(probe.ids_T.numel())
                shares = {"foretold": torch.cat(hits).double().mean().item()}
                if kind == "needles":
                    shares["found"] = sum(bool(hit.all()) for hit in hits) / len(hits)
                found[name][kind][size] = shares
    return found


def _tasks(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    lengths: Sequence[int],
    pairs: Sequence[int],
    seed: int,
) -> list[tuple[str, int, list[Probe]]]:
    """Kind, size and texts of all that every model has room for."""
    room = min((number for number in map(positions_said, models.values()) if number is not None), default=None)
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for length in lengths:
        if room is None or length <= room:
            probes = list(needle_probes(tokenizer, length, count=count, generator=generator))
            tasks.append(("needles", length, probes))
    for number in pairs:
        probes = list(pairs_probes(tokenizer, number, texts=count, generator=generator))
        if probes and (room is None or max(probe.ids_T.numel() for probe in probes) <= room):
            tasks.append(("pairs", number, probes))
    return tasks


def cells(measured: Mapping[str, Any] | None) -> Iterator[str]:
    """What stands in COLUMNS of what `recall` says of a model, after JSON or before; dashes for what is not there."""
    for kind, size, share in COLUMNS.values():
        sizes = {str(key): shares for key, shares in (measured or {}).get(kind, {}).items()}
        yield f"{sizes[str(size)][share]:.2f}" if str(size) in sizes else "-"


def foretold(model: PreTrainedModel, probe: Probe) -> Tensor:
    """Whether each token that is asked for is the most likely one at its place."""
    first = int(probe.asked[0])
    ids_1T, last = probe.ids_T[None].to(model.device), len(probe.ids_T) - 1
    with evaluating(model):
        # no logits of what nobody asks for: those of a long text take more memory than the model
        logits_TV = model(input_ids=ids_1T[:, :last], use_cache=False, logits_to_keep=last - first + 1).logits[0]
    said_T = logits_TV.argmax(-1).cpu()
    return said_T[probe.asked - first] == probe.ids_T[probe.asked]


def needle_probes(
    tokenizer: PreTrainedTokenizerBase, length: int, *, count: int, generator: torch.Generator
) -> Iterator[Probe]:
    """`count` texts of at most `length` tokens, whose needles lie evenly between beginning and end."""
    noise = [_tokens(tokenizer, line) for line in NOISE]
    for number in range(count):
        name = NAMES[int(torch.randint(len(NAMES), (), generator=generator))]
        digits = "".join(map(str, torch.randint(1, 10, (DIGITS,), generator=generator).tolist()))
        begin = _begun(tokenizer, BEGINNING)
        needle = _tokens(tokenizer, NEEDLE.format(name=name, number=digits))
        asked = _tokens(tokenizer, QUESTION.format(name=name))
        answer = _tokens(tokenizer, f" {digits}")
        rounds = (length - sum(map(len, (begin, needle, asked, answer)))) // sum(map(len, noise))
        if rounds < 1:
            raise ValueError(f"a text of {length} tokens has no room for a needle; give a larger length")
        before = round((number + 0.5) / count * rounds)
        hay = [token for line in noise for token in line]
        ids = [*begin, *hay * before, *needle, *hay * (rounds - before), *asked, *answer]
        yield Probe(torch.tensor(ids), torch.arange(len(ids) - len(answer), len(ids)))


def pairs_probes(
    tokenizer: PreTrainedTokenizerBase, count: int, *, texts: int, generator: torch.Generator
) -> Iterator[Probe]:
    """Lines of two words that all differ from each other, and the same lines in another order."""
    for _ in range(texts):
        words = list(islice(_words(tokenizer, generator), 2 * count))
        if len(words) < 2 * count:
            return
        lines = [(_tokens(tokenizer, f"{words[i]}:"), _tokens(tokenizer, f" {words[i + count]}")) for i in range(count)]
        end = _tokens(tokenizer, "\n")
        ids = _begun(tokenizer, "") + [token for key, value in lines for token in (*key, *value, *end)]
        asked: list[int] = []
        for i in torch.randperm(count, generator=generator).tolist():
            key, value = lines[i]
            ids += key
            asked += range(len(ids), len(ids) + len(value))
            ids += [*value, *end]
        yield Probe(torch.tensor(ids), torch.tensor(asked))


def _words(tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> Iterator[str]:
    """Words of the vocabulary, each once, in a drawn order."""
    said: set[str] = set()
    for token in torch.randperm(len(tokenizer), generator=generator).tolist():
        word = str(tokenizer.decode([token])).strip()
        if word.isascii() and word.isalpha() and len(word) > 2 and word not in said:
            said.add(word)
            yield word


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _begun(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Its tokens as a text begins with this tokenizer, but does not end yet."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids

"""Synthetic tasks that tell update rules apart: what a state can hold, track and find again.

    capacity      which value was last stored under a key                   Schlag et al. 2021, arXiv 2102.11174
    parity        whether the ones so far are odd                           Grazzi et al. 2024, arXiv 2411.12537
    group_words   the product of the permutations so far                    Siems et al. 2025, arXiv 2502.10297
    even_length   whether the string so far is in (aa)*                     Irie et al. 2023, arXiv 2310.16076
    mqar          many keys asked again after many tokens                   Arora et al. 2023, arXiv 2312.04927
    needle        one pair in a long text, asked at its end                 Hsieh et al. 2024, arXiv 2404.06654
    store_recall  a pattern kept over a delay of distractors                Schmidhuber 1992, Neural Computation 4(1)

N sequences of up to T tokens are made at once, from a `torch.Generator`: the same seed gives the same sequences.
Token tasks return `(tokens [N, T], labels [N, T])`; a label stands at the token that it answers (it is not shifted),
and is IGNORED where nothing is asked. Every task raises ValueError for sizes that leave nothing to draw from.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # what cross_entropy leaves out unless told otherwise

Tokens = tuple[Tensor, Tensor]


class Pairs(NamedTuple):
    """Keys and values [N, L], queries [N, Q] and the values [N, Q] last stored under them."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    targets: Tensor


class Recall(NamedTuple):
    """Inputs [N, T, size + 2], the position [N] of the recall flag, and the pattern [N, size] to be given there."""

    inputs: Tensor
    position: Tensor
    pattern: Tensor


def capacity(
    count: int, symbols: int, *, pairs: int, replacement: bool, generator: torch.Generator, queries: int = 1
) -> Pairs:
    """`pairs` keys and values, each of `symbols`; without `replacement` no key and no value comes twice.

    Queries are the keys at random positions.
    """
    _at_least(1, count=count, symbols=symbols, pairs=pairs, queries=queries)
    if not replacement and pairs > symbols:
        raise ValueError(f"{pairs} pairs of {symbols} symbols need replacement=True, or at most {symbols} pairs")
    keys, values = (_symbols(count, symbols, pairs, replacement, generator) for _ in range(2))
    asked = keys.gather(1, torch.randint(pairs, (count, queries), generator=generator))
    last = torch.where(keys[:, None] == asked[..., None], torch.arange(pairs), -1).argmax(-1)
    return Pairs(keys, values, asked, values.gather(1, last))


def _symbols(count: int, symbols: int, pairs: int, replacement: bool, generator: torch.Generator) -> Tensor:
    if replacement:
        return torch.randint(symbols, (count, pairs), generator=generator)
    return _distinct(count, symbols, pairs, generator)


def _distinct(count: int, symbols: int, chosen: int, generator: torch.Generator) -> Tensor:
    """[count, chosen] whole numbers below `symbols`, none twice in a row of it."""
    return torch.rand(count, symbols, generator=generator).topk(chosen, dim=1).indices


def parity(
    count: int, *, shortest: int, longest: int, generator: torch.Generator, every_position: bool = True
) -> Tokens:
    """Bits as tokens 1 (zero) and 2 (one), then 0 as padding; label 1 where the number of ones so far is odd.

    Lengths are uniform; without `every_position` only the last bit is asked.
    """
    length = _lengths(count, shortest, longest, generator)
    bits = torch.randint(2, (count, longest), generator=generator)
    return _padded(bits + 1, bits.cumsum(1) % 2, length, every_position)


def even_length(count: int, *, shortest: int, longest: int, generator: torch.Generator) -> Tokens:
    """Strings of the token 1, then 0 as padding; label 1 where the string so far has an even length."""
    length = _lengths(count, shortest, longest, generator)
    ones = torch.ones(count, longest, dtype=torch.long)
    return _padded(ones, (ones.cumsum(1) + 1) % 2, length, every_position=True)


def _lengths(count: int, shortest: int, longest: int, generator: torch.Generator) -> Tensor:
    _at_least(1, count=count, shortest=shortest)
    if longest < shortest:
        raise ValueError(f"longest is {longest}, shortest {shortest}; longest must be at least shortest")
    return torch.randint(shortest, longest + 1, (count, 1), generator=generator)


def _padded(tokens: Tensor, labels: Tensor, length: Tensor, every_position: bool) -> Tokens:
    position = torch.arange(tokens.shape[1])
    asked = position < length if every_position else position == length - 1
    return torch.where(position < length, tokens, 0), torch.where(asked, labels, IGNORED)


def group_words(count: int, length: int, *, symbols: int, generator: torch.Generator) -> Tokens:
    """Elements of the group of permutations of `symbols` things, numbered in alphabetic order from the identity, 0.

    label_t is the product p_t ∘ ... ∘ p_1, where (p ∘ q)(i) = p(q(i)).
    """
    _at_least(1, count=count, length=length, symbols=symbols)
    table = compositions(symbols)
    tokens = torch.randint(len(table), (count, length), generator=generator)
    product, labels = torch.zeros(count, dtype=torch.long), []
    for token in tokens.unbind(1):
        product = table[token, product]
        labels.append(product)
    return tokens, torch.stack(labels, dim=1)


def compositions(symbols: int) -> Tensor:
    """[n!, n!]: entry p, q is the number of the permutation p ∘ q."""
    permutations = torch.tensor(list(itertools.permutations(range(symbols))))
    digits = symbols ** torch.arange(symbols)
    names = (permutations * digits).sum(1)
    found = (permutations[:, permutations] * digits).sum(-1)
    return (found[..., None] == names).long().argmax(-1)


def mqar(
    count: int, length: int, *, pairs: int, generator: torch.Generator, vocabulary: int = 8192, power: float = 0.01
) -> Tokens:
    """`pairs` keys and values side by side, then every key once more among random tokens; its label is its value.

    Keys are tokens of the lower half of the vocabulary (not 0), values of the upper half. The g-th place for a query is
    drawn with a weight of (g + 1)^(power - 1), without replacement, so that a small `power` means: soon.
    """
    _at_least(1, count=count, pairs=pairs)
    half, places = vocabulary // 2, (length - 2 * pairs) // 2
    if places < pairs or half - 1 < pairs:
        raise ValueError(
            f"{pairs} pairs need a length of at least {4 * pairs} and a vocabulary of at least {2 * pairs + 2}; "
            f"given are {length} and {vocabulary}"
        )
    keys = 1 + _distinct(count, half - 1, pairs, generator)
    values = half + _distinct(count, half, pairs, generator)
    weights = torch.arange(1, places + 1, dtype=torch.float).pow(power - 1).expand(count, places)
    gaps = torch.multinomial(weights, pairs, generator=generator)
    tokens = torch.randint(vocabulary, (count, length), generator=generator)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], dim=-1).flatten(1)
    position = 2 * pairs + 2 * gaps
    labels = torch.full_like(tokens, IGNORED).scatter_(1, position, values)
    return tokens.scatter_(1, position, keys), labels


def needle(
    count: int, length: int, *, generator: torch.Generator, symbols: int = 64, depth: float | None = None
) -> Tokens:
    """A pair of key and value somewhere in a text of other words; the last token is the key, its label the value.

    Tokens 0 ... symbols-1 are words, then come as many keys and as many values. `depth` is where the pair stands, from
    0 (start) to 1 (right before the question); None: anywhere.
    """
    _at_least(1, count=count, symbols=symbols)
    _at_least(3, length=length)
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; it must lie between 0 (the start) and 1 (the end), or be None (anywhere)")
    pair = torch.randint(symbols, (count, 2), generator=generator) + symbols * torch.tensor([1, 2])
    tokens = torch.randint(symbols, (count, length), generator=generator)
    places = length - 2
    place = torch.randint(places, (count, 1), generator=generator)
    if depth is not None:
        place = torch.full_like(place, round(depth * (places - 1)))
    tokens.scatter_(1, place + torch.arange(2), pair)
    tokens[:, -1], labels = pair[:, 0], torch.full_like(tokens, IGNORED)
    labels[:, -1] = pair[:, 1]
    return tokens, labels


def store_recall(count: int, *, shortest: int, longest: int, generator: torch.Generator, size: int = 4) -> Recall:
    """A pattern of ±1 beside a store flag, a delay of other patterns (uniform length), then zeros beside a recall flag.

    Inputs after the recall are zeros.
    """
    _at_least(1, size=size)
    delay = _lengths(count, shortest, longest, generator)
    position, flags = torch.arange(longest + 2), torch.zeros(count, longest + 2, 2)
    patterns = torch.randint(2, (count, longest + 2, size), generator=generator) * 2.0 - 1
    flags[:, 0, 0] = 1.0
    flags[..., 1] = (position == delay + 1).float()
    shown = torch.where((position <= delay)[..., None], patterns, 0)
    return Recall(torch.cat([shown, flags], dim=-1), delay.squeeze(1) + 1, patterns[:, 0])


def _at_least(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} is {size}; it must be at least {least}")

"""Any prompt, padding, chunking and cut: a cached run of any model is the run without a cache."""

import functools
import itertools

import torch
from every_model import HOSTED, MODELS, every_model
from hypothesis import strategies as some
from properties import for_any
from tiny_fwp import VOCAB, assert_close
from transformers import DynamicCache

LONGEST = 24
model_of = functools.cache(functools.partial(every_model, wide=True))  # a window counts padding
PROMPTS = some.lists(some.integers(1, VOCAB - 1), min_size=2, max_size=LONGEST)
CUTS = some.lists(some.integers(1, LONGEST - 1), max_size=4)
NAMES = some.sampled_from(MODELS)


def tolerance_of(name):
    """Families rotate in float32."""
    return 1e-6 if name in HOSTED else 1e-9


def fed(model, ids, edges, mask=None, cache=None):
    """Logits of the tokens given piece by piece, and the cache."""
    cache = cache or DynamicCache(config=model.config)
    logits = []
    for start, end in itertools.pairwise(edges):
        seen = None if mask is None else mask[:, :end]
        logits.append(model(ids[:, start:end], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(logits, dim=1), cache


def edges_of(length, cuts):
    return [0, *sorted({cut for cut in cuts if cut < length}), length]


@for_any(kind=NAMES, prompt=PROMPTS, cuts=CUTS)
@torch.no_grad()
def test_fed_in_any_pieces_is_whole(kind, prompt, cuts):
    model, ids = model_of(kind), torch.tensor([prompt])
    logits, _ = fed(model, ids, edges_of(len(prompt), cuts))
    assert_close(logits, model(ids, use_cache=False).logits, tolerance_of(kind))


@for_any(kind=NAMES, prompt=PROMPTS, padding=some.integers(1, 6), cuts=CUTS)
@torch.no_grad()
def test_any_padding_and_pieces_are_the_tokens_alone(kind, prompt, padding, cuts):
    model, length = model_of(kind), len(prompt)
    ids = torch.tensor([[0] * padding + prompt, prompt + prompt[:1] * padding])
    mask = (torch.arange(length + padding) >= torch.tensor([[padding], [0]])).long()
    logits, _ = fed(model, ids, edges_of(length + padding, cuts), mask)
    assert_close(logits[:1, padding:], model(ids[:1, padding:], use_cache=False).logits, tolerance_of(kind))
    assert_close(logits[1:, :length], model(ids[1:, :length], use_cache=False).logits, tolerance_of(kind))


@for_any(kind=NAMES, prompt=PROMPTS, back=some.integers(1, 4))
@torch.no_grad()
def test_tokens_taken_back_are_as_if_never_fed(kind, prompt, back):
    """As far as single steps go back: what speculation needs."""
    model, ids, length = model_of(kind), torch.tensor([prompt]), len(prompt)
    back = min(back, length - 1)
    kept = length - back
    _, cache = fed(model, ids, [0, 1])
    cache.activate_past_recording()
    fed(model, ids, sorted({1, *range(kept, length + 1)}), cache=cache)
    cache.crop(-back)
    other = 1 + ids[:, kept:] % (VOCAB - 1)
    logits, _ = fed(model, other, [0, back], cache=cache)
    whole = model(torch.cat([ids[:, :kept], other], dim=1), use_cache=False).logits
    assert_close(logits, whole[:, kept:], tolerance_of(kind))

"""How far a model follows its teacher's greedy text: counted as generation itself would show it."""

import pytest
import torch
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from hf_fwp.conversion.evaluate import evaluate
from hf_fwp.conversion.greedy import GIVEN, TEXTS, WRITTEN, followed, written


@pytest.fixture(scope="module")
def ids_NT():
    return torch.randint(60, (TEXTS + 2, 2 * GIVEN), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models():
    """A teacher, and one that is nearly the same."""
    teacher, other = tiny_llama(seed=0), tiny_llama(seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.6 * torch.randn_like(parameter))
    return teacher, other


def test_the_teacher_writes_what_generate_writes(models, ids_NT):
    teacher, _ = models
    begun = ids_NT[:3, :GIVEN]
    settings = {"max_new_tokens": WRITTEN, "do_sample": False, "eos_token_id": -1}
    generated = teacher.generate(begun, attention_mask=torch.ones_like(begun), **settings)
    assert torch.equal(written(teacher, begun, WRITTEN), generated)


def test_it_is_what_both_write_before_they_part(models, ids_NT):
    teacher, other = models
    begun = ids_NT[:TEXTS, :GIVEN]
    theirs, ours = (written(model, begun, WRITTEN)[:, GIVEN:] for model in models)
    alike = (theirs == ours).long().cumprod(1).sum(1)
    assert 0 < int(alike.sum()) < TEXTS * WRITTEN
    assert followed(other, teacher, ids_NT) == pytest.approx(float(alike.sum()) / (TEXTS * WRITTEN))
    assert followed(teacher, teacher, ids_NT) == 1
    assert followed(other, teacher, ids_NT, texts=1) == pytest.approx(int(alike[0]) / WRITTEN)


def test_short_texts_and_few_positions_are_enough(models):
    teacher, _ = models
    ids_NT = torch.randint(60, (2, 6), generator=torch.Generator().manual_seed(0))
    assert followed(teacher, teacher, ids_NT) == 1
    few = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=10, n_embd=8, n_layer=1, n_head=2))
    assert followed(few, few, ids_NT) == 1


def test_evaluate_says_it(models, ids_NT):
    teacher, other = models
    measured = evaluate(other, against=teacher, data=ids_NT, parts=False, needles=0)
    assert measured["followed"] == followed(other, teacher, ids_NT)
    assert "followed" not in evaluate(other, data=ids_NT, needles=0)

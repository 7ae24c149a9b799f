"""The published recipes on a small trained teacher: each does what its paper says it does, against a naive copy."""

import random
from dataclasses import replace

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from hf_fwp.conversion.baselines import naive_copy
from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.data import token_blocks
from hf_fwp.conversion.recipes import find_recipe
from hf_fwp.conversion.scores import compare, forward_of
from hf_fwp.hosts import converted_layers

LENGTH, STEPS = 64, 20
WORDS = ("fast", "weights", "layer", "memory", "every", "token", "rewrites", "delta", "rule", "reads", "key", "recalls")
PUBLISHED = {
    "lolcats": "linear_attention",
    "radlads": "gated_delta_net",
    "taylor-calibrate": "gated_delta_net",
    "mamba-in-llama": "gated_delta_net",
}


def texts(count, seed):
    """Four words said, and said again: what attention is for."""
    drawn = random.Random(seed)
    four = [" ".join(drawn.sample(WORDS, 4)) for _ in range(count)]
    return [f"{words}; {words}." for words in four]


@pytest.fixture(scope="module")
def teacher():
    teacher = tiny_llama().train()
    blocks = token_blocks(texts(600, 0), byte_tokenizer(), sequence_length=LENGTH)
    adam = torch.optim.AdamW(teacher.parameters(), lr=6e-3)
    torch.manual_seed(0)
    for _ in range(90):
        ids = blocks[torch.randint(len(blocks), (12,))]
        adam.zero_grad()
        teacher(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        adam.step()
    return teacher.eval()


def kl_of(model, teacher):
    heldout = token_blocks(texts(40, 2), byte_tokenizer(), sequence_length=LENGTH, tokens=8 * LENGTH)
    return compare({"model": forward_of(model)}, forward_of(teacher), heldout, progress=False)["model"]["kl"]


def kl_after(recipe, rule, teacher, *, budget=STEPS * 4 * LENGTH):
    """KL of the student that a recipe makes with few tokens, at rates for a model this small."""
    report = {"tokens": LENGTH, "baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": (), "needles": 0}
    few = replace(recipe.with_rates(6), sequence_length=LENGTH, solve_tokens=min(recipe.solve_tokens, 8 * LENGTH))
    few = replace(few, report=report, extend_length=4 * LENGTH)
    data = {"train": texts(600, 1), "test": texts(10, 2)}
    student = convert(teacher, tokenizer=byte_tokenizer(), rule=rule, keep=0, recipe=few, budget=budget, data=data)
    assert converted_layers(student.config) == (0, 1)
    return kl_of(student, teacher)


@pytest.fixture(scope="module")
def found(teacher):
    made = {name: kl_after(find_recipe(name), rule, teacher) for name, rule in PUBLISHED.items()}
    return {**made, "naive": kl_after(find_recipe("naive"), "gated_delta_net", teacher)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_is_better_than_a_naive_copy(name, found, teacher):
    copied = kl_of(naive_copy(teacher, layers=[0, 1], rule=PUBLISHED[name]), teacher)
    assert found[name] < 0.9 * copied


def test_formulas_are_better_than_one_rate_for_all_with_as_much_training(found):
    assert found["taylor-calibrate"] < found["naive"]


def test_lora_needs_the_alignment_before_it(found, teacher):
    lolcats = find_recipe("lolcats")
    alone = kl_after(replace(lolcats, align_tokens=0), "linear_attention", teacher, budget=STEPS * 2 * LENGTH)
    assert found["lolcats"] < alone


def test_a_recipe_for_one_rule_refuses_others(teacher):
    with pytest.raises(ValueError, match="'lolcats' is for the rule 'linear_attention', not 'delta_net'"):
        convert(teacher, tokenizer=byte_tokenizer(), recipe="lolcats", rule="delta_net", data=texts(10, 0))

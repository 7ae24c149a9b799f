"""The student goes on by itself: on longer sequences, on the answers of chats alone, and after a kill."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from teachers import tiny_teacher
from tiny import TEXTS, byte_tokenizer, tiny_llama

from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.extend import chat_blocks, extend
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.recipes import Recipe
from hf_fwp.conversion.trainer import DistilTrainer

SETTINGS = {"lr": 5e-3, "lr_rest": 1e-3, "batch_size": 2, "progress": False}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


verb = importlib.import_module("hf_fwp.conversion.convert")


@pytest.fixture
def ids():
    return (torch.arange(8)[:, None] + torch.arange(24)) % 7 + 1  # what comes next can be learned


def student():
    torch.manual_seed(5)
    return copy_teacher(tiny_teacher("llama"), layers=(0, 2), fwp={"rule": "gated_delta_net"})


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_it_learns_what_comes_next_and_resumes(ids, tmp_path, monkeypatch):
    whole, again = student(), student()
    log = extend(whole, ids, steps=6, **SETTINGS)
    assert log["history"][-1]["cross_entropy"] < log["history"][0]["cross_entropy"]
    settings = {**SETTINGS, "steps": 6, "output_dir": tmp_path, "save_every": 2}

    def stopped(trainer, *args, **kwargs):
        if trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    step = DistilTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(DistilTrainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            extend(student(), ids, **settings)
    extend(again, ids, **settings, resume=True)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again).items())


def test_tokens_without_labels_teach_nothing(ids):
    labels = ids.clone()
    labels[:, :12] = -100
    other = ids.clone()
    other[:, -1] = 0  # the last token is no input of one that counts
    labels_of_other = labels.clone()
    made = [student(), student()]
    extend(made[0], ids, labels_NT=labels.masked_fill(torch.arange(24) == 23, -100), steps=2, **SETTINGS)
    labels_of_other[:, -1] = -100
    extend(made[1], other, labels_NT=labels_of_other, steps=2, **SETTINGS)
    first, second = (weights(model) for model in made)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items() if "embed" not in name)
    assert not torch.equal(first["lm_head.weight"], student().lm_head.weight)  # the first step's rate is 0, not both
    with pytest.raises(ValueError, match="give one for each token"):
        extend(student(), ids, labels_NT=labels[:, 1:], **SETTINGS)


def test_only_what_the_assistant_says_counts():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids, labels = chat_blocks([CHAT, CHAT[:2]], tokenizer, sequence_length=60)
    assert tokenizer.decode(ids[0][labels[0] != -100]) == "yes.no."
    assert tokenizer.decode(ids[1][labels[1] != -100]) == "yes."
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    cut, _ = chat_blocks([CHAT], tokenizer, sequence_length=10)
    assert tokenizer.decode(cut[0]) == "<user>hi.<"


def test_chats_that_cannot_be_read_are_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="has no chat template"):
        chat_blocks([CHAT], tokenizer, sequence_length=60)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        chat_blocks([CHAT], tokenizer, sequence_length=60)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="there are no conversations"):
        chat_blocks([], tokenizer, sequence_length=60)


def test_a_recipe_extends_on_longer_sequences_of_its_own(capsys):
    small = Recipe("x", "x", copied=True, sequence_length=16, solve_tokens=0, extend_tokens=200, extend_length=50)
    report = {"tokens": 32, "baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": (), "needles": 0}
    recipe = replace(small, extend={"batch_size": 2}, report=report)
    teacher = tiny_llama()
    made = convert(teacher, tokenizer=byte_tokenizer(), keep=[0], recipe=recipe, data=TEXTS)
    log = made.conversion_report["stages"]["extend"]
    assert (log["tokens"], log["steps"]) == (200, 2)
    assert "extend 200" in capsys.readouterr().err
    assert not torch.equal(made.lm_head.weight, teacher.lm_head.weight)


ROWS = {
    "messages": {"messages": CHAT},
    "prompt and completion": {"prompt": CHAT[:1], "completion": CHAT[1:2]},
    "texts": {"prompt": "so? ", "completion": "no."},
}
SPOKEN = {"messages": "yes.no.", "prompt and completion": "yes.", "texts": "no.<end>"}


def entropy(model, ids_NT, labels_NT):
    """-1/N sum log q(x_t+1 | x_<=t) over the tokens with a label."""
    with torch.no_grad():
        logits = model.eval()(ids_NT).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_NT[:, 1:].flatten()))


@pytest.mark.parametrize("stage", ["extend", "distil"])
@pytest.mark.parametrize("kind", ROWS)
def test_the_verb_learns_from_what_the_assistant_says_alone(kind, stage, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (tmp_path / "said.jsonl").write_text(f"{json.dumps(ROWS[kind])}\n" * 20)
    trained, seen = getattr(verb, stage), {}

    def watched(student, *, ids_NT, labels_NT, **settings):
        seen.update(alone=entropy(student, ids_NT, labels_NT), all=entropy(student, ids_NT, ids_NT), labels=labels_NT)
        return trained(student, ids_NT=ids_NT, labels_NT=labels_NT, **settings)

    monkeypatch.setattr(verb, stage, watched)
    report = {"tokens": 50, "baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": (), "needles": 0}
    tokens = {"extend": {"extend_tokens": 100, "extend_length": 50}, "distil": {"distil_tokens": 100}}[stage]
    settings = {"batch_size": 2, "bf16": False, **({"losses": {"cross_entropy": 1.0}} if stage == "distil" else {})}
    small = Recipe("x", "x", copied=True, sequence_length=50, solve_tokens=0, report=report)
    recipe = replace(small, **tokens, **{stage: settings})
    data = tmp_path / "said.jsonl" if stage == "extend" else [ROWS[kind]] * 20
    made = convert(tiny_llama(), tokenizer=tokenizer, keep=[0], recipe=recipe, data=data)
    log = made.conversion_report["stages"][stage]
    assert set(tokenizer.decode(seen["labels"][seen["labels"] != -100])) == set(SPOKEN[kind])
    assert log["learned_tokens"] == (seen["labels"] != -100).sum() < log["tokens"]
    assert log["history"][0]["cross_entropy"] == pytest.approx(seen["alone"], rel=1e-5)
    assert log["history"][0]["cross_entropy"] != pytest.approx(seen["all"], rel=5e-5)

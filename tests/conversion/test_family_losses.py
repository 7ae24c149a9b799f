"""Every family learns from the logits that it speaks with: its own scale and cap, and without its own dropout."""

import json

import pytest
import torch
from teachers import SHAPES, tiny_config, tiny_teacher
from torch import nn
from transformers import TrainingArguments

from hf_fwp.conversion.align import align
from hf_fwp.conversion.distil import distil
from hf_fwp.conversion.extend import extend
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.trainer import DistilTrainer
from hf_fwp.hosts import HOSTS

STILL = {"steps": 1, "batch_size": 4, "lr": 1e-9, "lr_rest": 1e-9, "bf16": False, "progress": False}
NOISE = ("drop", "jitter")


@pytest.fixture
def ids():
    return torch.randint(1, SHAPES["vocab_size"], (4, 12), generator=torch.Generator().manual_seed(3))


def noisy(name):
    """Every probability that the family's config has for its training."""
    fields = vars(tiny_config(name))
    return {key: 0.3 for key, value in fields.items() if any(n in key for n in NOISE) and isinstance(value, float)}


def loud_teacher(name, **changes):
    """Logits so large that a missing scale or cap shows."""
    capped = {"final_logit_softcapping": 5.0} if hasattr(tiny_config(name), "final_logit_softcapping") else {}
    teacher = tiny_teacher(name, tie_word_embeddings=False, **capped, **changes)
    nn.init.normal_(teacher.get_output_embeddings().weight)
    return teacher


def student_of(teacher, **options):
    torch.manual_seed(5)
    return copy_teacher(teacher, layers=(0, 2), fwp={"rule": "gated_delta_net", **options})


def spoken(student, teacher, ids):
    """(KL, cross-entropy) of the logits that the models themselves give."""
    with torch.no_grad():
        q, p = (model(ids, use_cache=False).logits.double().log_softmax(-1) for model in (student, teacher))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return float(kl), float(nn.functional.nll_loss(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def learned(student, teacher, ids, **settings):
    """(KL, cross-entropy) of the first step of distil and of extend."""
    distilled = distil(student, teacher, ids, **{**STILL, **settings})["history"]
    extended = extend(student, ids, **{**STILL, **settings})["history"]
    return distilled[0]["kl"], extended[0]["cross_entropy"]


@pytest.mark.parametrize("name", HOSTS)
def test_the_first_losses_are_those_of_the_models_own_logits(name, ids):
    teacher = loud_teacher(name, **noisy(name))
    student = student_of(teacher)
    assert learned(student, teacher, ids) == pytest.approx(spoken(student, teacher, ids), rel=1e-4)


def test_a_projection_between_the_blocks_and_the_head_is_read(ids):
    teacher = loud_teacher("opt", word_embed_proj_dim=16)
    student = student_of(teacher)
    assert learned(student, teacher, ids) == pytest.approx(spoken(student, teacher, ids), rel=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_the_gradient_is_that_of_the_models_own_logits(name, ids, tmp_path):
    teacher = loud_teacher(name).double()
    student = student_of(teacher).double()
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False)
    trainer = DistilTrainer(student, args, teacher=teacher, losses={"kl": 0.5, "cross_entropy": 2.0})
    loss = trainer.compute_loss(student, {"input_ids": ids})
    q, p = (model(ids).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    p = p.detach()
    expected = 0.5 * (p.exp() * (p - q)).sum(-1).mean()
    expected = expected + 2 * nn.functional.nll_loss(q.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # gemma2 gives its logits in float32
    names, leaves = zip(*student.named_parameters(), strict=True)
    wanted = torch.autograd.grad(expected, leaves)
    for key, given, gradient in zip(names, torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(given, gradient, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon"])
def test_dropout_that_is_asked_for_is_there_and_the_students_config_stays(name, ids, tmp_path):
    changes = noisy(name)
    teacher = loud_teacher(name, **changes)
    student = student_of(teacher)
    truth = spoken(student, teacher, ids)[0]
    before = noise_of(student)
    settings = {"output_dir": tmp_path / "still", "save_every": 1}
    assert distil(student, teacher, ids, **STILL, **settings)["history"][0]["kl"] == pytest.approx(truth, rel=1e-4)
    assert noise_of(student) == before
    saved = json.loads((tmp_path / "still" / "checkpoint-1" / "config.json").read_text())
    assert all(saved[key] == value == getattr(student.config, key) for key, value in changes.items())
    noisy_loss = distil(student, teacher, ids, **STILL, dropout=True)["history"][0]["kl"]
    assert noisy_loss != pytest.approx(truth, rel=1e-2)


def noise_of(model):
    """The probabilities that modules hold, by the modules' names."""
    return {
        (path, key): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if (key == "p" and isinstance(module, nn.Dropout))
        or (isinstance(value, float) and any(n in key for n in NOISE))
    }


def test_an_adapters_dropout_is_its_own(ids):
    losses = []
    for dropout in (0.0, 0.9):
        teacher = loud_teacher("gpt2", **noisy("gpt2"))
        lora = {"r": 4, "lora_dropout": dropout, "target_modules": ["c_fc"], "init_lora_weights": False}
        losses.append(distil(student_of(teacher), teacher, ids, **STILL, lora=lora)["history"][0]["kl"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_mixers_are_aligned_without_dropout(name, ids):
    found = []
    for changes in ({}, noisy(name)):
        teacher = tiny_teacher(name, **{**dict.fromkeys(noisy(name), 0.0), **changes}).train()
        student = student_of(teacher).train()
        found.append(align(student, teacher, ids, steps=3, batch_size=2, lr=1e-2, bf16=False, progress=False))
        assert teacher.training
    assert found[0]["history"] == found[1]["history"]

"""Distillation: the loss is the KL written out, gradients included, and the Trainer's modes agree with each other."""

import pytest
import torch
from teachers import SHAPES, tiny_teacher
from torch import nn
from transformers import TrainingArguments

from hf_fwp.conversion import kl
from hf_fwp.conversion.distil import distil
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.kl import kl_of_heads
from hf_fwp.conversion.trainer import DistilTrainer, parameter_groups
from hf_fwp.cross_entropy import Readout

FWP = {"rule": "gated_delta_net", "qk_norm": "l2", "time_scales": 2, "value_skip": 1, "beta_bias": True}
SETTINGS = {"batch_size": 2, "lr": 5e-3, "lr_rest": 1e-3, "progress": False}


@pytest.fixture
def teacher():
    return tiny_teacher("llama", tie_word_embeddings=True)


@pytest.fixture
def ids():
    return torch.randint(1, SHAPES["vocab_size"], (12, 16), generator=torch.Generator().manual_seed(3))


def student_of(teacher):
    torch.manual_seed(5)
    return copy_teacher(teacher, layers=(0, 2), fwp=FWP)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plain_kl(student_logits, teacher_logits):
    p, q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def trainer_of(student, teacher, folder, **args):
    defaults = {"output_dir": str(folder), "report_to": [], "use_cpu": True, "remove_unused_columns": False}
    return DistilTrainer(student, TrainingArguments(**{**defaults, **args}), teacher=teacher)


READOUTS = {
    "plain": (Readout(), lambda x: x),
    "scaled": (Readout(scale=0.3), lambda x: 0.3 * x),
    "capped": (Readout(scale=2.0, cap=1.5), lambda x: 1.5 * torch.tanh(2 * x / 1.5)),
}


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logits", [1, 300, 1 << 24])
def test_the_loss_and_its_gradients_are_those_of_full_logits(bias, logits, readout, monkeypatch):
    monkeypatch.setattr(kl, "LOGITS", logits)
    hidden = [(3 * torch.randn(21, 8, dtype=torch.float64)).requires_grad_(index == 0) for index in range(2)]
    heads = [nn.Linear(8, 50, bias=bias, dtype=torch.float64) for _ in range(2)]
    leaves = [hidden[0], *heads[0].parameters()]
    (ours, of_ours), (theirs, of_theirs) = READOUTS[readout], READOUTS["scaled" if readout == "capped" else readout]
    loss = 0.7 * kl_of_heads(*hidden, *heads, student_readout=ours, teacher_readout=theirs)
    expected = 0.7 * plain_kl(of_ours(heads[0](hidden[0])), of_theirs(heads[1](hidden[1]))).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, leaves)
    for given, gradient in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(given, gradient, rtol=1e-10, atol=1e-12)
    assert all(parameter.grad is None for parameter in heads[1].parameters())


def test_equal_distributions_have_no_loss_and_large_logits_no_overflow():
    hidden, head = torch.randn(9, 8), nn.Linear(8, 50)
    assert kl_of_heads(hidden, hidden, head, head).abs() < 1e-5
    far = kl_of_heads(1e3 * hidden, -1e3 * hidden, head, head)
    torch.testing.assert_close(far, plain_kl(head(1e3 * hidden), head(-1e3 * hidden)).sum())


@pytest.mark.parametrize("losses", [{"kl": 1.0}, {"cross_entropy": 1.0}, {"kl": 1.0, "cross_entropy": 1.0}], ids=str)
def test_a_step_without_labels_changes_nothing(losses, teacher, ids):
    student = student_of(teacher)
    before = weights(student)
    nothing = torch.full_like(ids, -100)
    (step,) = distil(student, teacher, ids, labels_NT=nothing, losses=losses, steps=1, **SETTINGS)["history"]
    assert list(step.values()) == [1, 0]
    assert same(weights(student), before)


def test_bf16_only_for_the_matrix_products_and_only_on_request():
    hidden, heads = [torch.randn(9, 8) for _ in range(2)], [nn.Linear(8, 50) for _ in range(2)]
    exact = kl_of_heads(*hidden, *heads)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = kl_of_heads(*hidden, *heads)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs() / exact < 0.02


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_holds_for_the_teacher_too(teacher, ids, bf16):
    seen = set()
    teacher.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, args, out: seen.add(out.dtype))
    distil(student_of(teacher), teacher, ids, steps=1, bf16=bf16, **SETTINGS)
    assert seen == {torch.bfloat16 if bf16 else torch.float32}


def test_after_training_in_bf16_the_model_computes_in_float32_again(teacher, ids):
    student = student_of(teacher)
    distil(student, teacher, ids, steps=2, bf16=True, **SETTINGS)
    twin = student_of(teacher)
    twin.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.equal(student(ids).logits, twin(ids).logits)


def test_the_gradient_of_every_parameter_tied_embeddings_included(teacher, ids, tmp_path):
    teacher, student = teacher.double(), student_of(teacher.double()).double()
    loss = trainer_of(student, teacher, tmp_path).compute_loss(student, {"input_ids": ids[:3]})
    expected = plain_kl(student(ids[:3]).logits, teacher(ids[:3]).logits.detach()).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    names, leaves = zip(*student.named_parameters(), strict=True)
    wanted = torch.autograd.grad(expected, leaves)
    for name, given, gradient in zip(names, torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(given, gradient, rtol=1e-7, atol=1e-12, msg=name)


@pytest.mark.parametrize("said_by", ["attention_mask", "labels", "both"])
def test_padding_does_not_count(teacher, ids, tmp_path, said_by):
    student, length = student_of(teacher), 11
    trainer = trainer_of(student, teacher, tmp_path)
    padded = {"input_ids": ids[:2].clone()}
    padded["input_ids"][:, length:] = 0
    mask = torch.arange(ids.shape[1]).expand(2, -1) < length
    if said_by != "labels":
        padded["attention_mask"] = mask.long()
    if said_by != "attention_mask":
        padded["labels"] = padded["input_ids"].masked_fill(~mask, -100)
    expected = trainer.compute_loss(student, {"input_ids": ids[:2, :length]})
    torch.testing.assert_close(trainer.compute_loss(student, padded), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_falls_and_the_teacher_stays(teacher, ids):
    student, before = student_of(teacher), weights(teacher)
    student.model.norm.weight.requires_grad_(False)
    log = distil(student, teacher, ids, steps=30, **SETTINGS)
    assert log["history"][-1]["kl"] < 0.7 * log["history"][0]["kl"]
    assert log["tokens"] == 30 * 2 * 16
    assert same(weights(teacher), before)
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert not student.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_accumulating_over_unequal_batches_is_one_large_batch(teacher, ids, tmp_path):
    data = [{"input_ids": row, "labels": row.clone()} for row in ids[:4]]
    for index, row in enumerate(data):
        row["labels"][: 4 * index] = -100
    found = []
    for size, accumulated in ((4, 1), (1, 4)):
        student = student_of(teacher)
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer = trainer_of(
            student, teacher, tmp_path, max_steps=1, logging_steps=1, save_strategy="no", max_grad_norm=1e9, **args
        )
        trainer.train_dataset = data
        trainer.train()
        found.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
    for name in ("loss", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=2e-6), name


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(teacher, ids, tmp_path, monkeypatch):
    whole, parts = student_of(teacher), student_of(teacher)
    expected = distil(whole, teacher, ids, steps=9, **SETTINGS)
    settings = {**SETTINGS, "steps": 9, "output_dir": tmp_path, "save_every": 4}
    training_step = DistilTrainer.training_step

    def stopping(trainer, *args, **kwargs):
        if trainer.state.global_step == 6:
            raise KeyboardInterrupt
        return training_step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DistilTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            distil(parts, teacher, ids, **settings)
    with pytest.raises(ValueError, match="resume=True"):
        distil(parts, teacher, ids, **settings)
    again = student_of(teacher)
    log = distil(again, teacher, ids, **settings, resume=True)
    assert same(weights(again), weights(whole))
    assert log["history"] == expected["history"]
    finished = student_of(teacher)
    assert distil(finished, teacher, ids, **settings, resume=True)["history"] == expected["history"]
    assert same(weights(finished), weights(whole))


def test_gradient_checkpointing_changes_nothing(teacher, ids):
    plain, checkpointed = student_of(teacher), student_of(teacher)
    distil(plain, teacher, ids, steps=2, **SETTINGS)
    distil(checkpointed, teacher, ids, steps=2, gradient_checkpointing=True, **SETTINGS)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(checkpointed.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_lora_trains_what_peft_says_and_is_merged(teacher, ids):
    from peft import LoraConfig

    student = student_of(teacher)
    start, parameters = weights(student), {name: p.requires_grad for name, p in student.named_parameters()}
    distil(student, teacher, ids, steps=3, peft_config=LoraConfig(r=2, target_modules=["v_proj"]), **SETTINGS)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == parameters
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed == {name for name in start if name.endswith("v_proj.weight")}


def test_mixers_learn_at_their_own_rate(teacher):
    student = student_of(teacher)
    mixers, rest = parameter_groups(student, lr=3.0, lr_rest=2.0)
    assert (mixers["lr"], rest["lr"]) == (3.0, 2.0)
    assert len(mixers["params"]) == sum(len(list(m.parameters())) for m in student.hf_fwp_layers.values())
    assert len(mixers["params"]) + len(rest["params"]) == len(list(student.parameters()))


def test_students_that_cannot_be_distilled_are_refused(teacher, ids):
    with pytest.raises(ValueError, match="float32"):
        distil(student_of(teacher).bfloat16(), teacher, ids, **SETTINGS)
    with pytest.raises(ValueError, match="share=False"):
        distil(copy_teacher(teacher, layers=[0], fwp=FWP, share=True), teacher, ids, **SETTINGS)
    with pytest.raises(ValueError, match="sequences"):
        distil(student_of(teacher), teacher, ids[:1], **SETTINGS)
    with pytest.raises(ValueError, match="vocabulary"):
        distil(student_of(tiny_teacher("llama", vocab_size=50)), teacher, ids, **SETTINGS)


@pytest.mark.parametrize("still", ["lr", "lr_rest"])
def test_what_has_no_rate_stays_as_it_is(still, teacher, ids):
    student = student_of(teacher)
    before = weights(student)
    distil(student, teacher, ids, **{**SETTINGS, "steps": 2, still: 0.0})
    changed = {name for name, tensor in weights(student).items() if not torch.equal(tensor, before[name])}
    mixers = {name for name in before if ".0.self_attn." in name or ".2.self_attn." in name}
    assert changed
    assert changed <= mixers if still == "lr_rest" else not changed & mixers
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("losses", [{"cross_entropy": 1.0}, {"kl": 0.5, "cross_entropy": 2.0}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_cross_entropy_counts_the_tokens_whose_next_one_counts(losses, padded, teacher, ids, tmp_path):
    teacher, student = teacher.double(), student_of(teacher.double()).double()
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False)
    trainer = DistilTrainer(student, args, teacher=teacher if "kl" in losses else None, losses=losses)
    inputs = {"input_ids": ids[:3]}
    counted = torch.ones(3, ids.shape[1] - 1, dtype=torch.bool)
    if padded:
        inputs["attention_mask"] = (torch.arange(ids.shape[1]).expand(3, -1) >= torch.tensor([[0], [2], [5]])).long()
        inputs["labels"] = ids[:3].masked_fill(torch.arange(ids.shape[1]) == 9, -100)
        counted = (inputs["attention_mask"][:, :-1] > 0) & (inputs["labels"][:, 1:] != -100)
    model = {name: value for name, value in inputs.items() if name != "labels"}
    logits = [each(**model, use_cache=False).logits[:, :-1][counted] for each in (student, teacher)]
    entropy = nn.functional.cross_entropy(logits[0], ids[:3, 1:][counted])
    kl_part = plain_kl(logits[0], logits[1].detach()).mean()
    expected = losses["cross_entropy"] * entropy + losses.get("kl", 0.0) * kl_part
    loss = trainer.compute_loss(student, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    count = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
    assert int(count) == int(counted.sum())
    torch.testing.assert_close(trainer.compute_loss(student, inputs, num_items_in_batch=count), expected)
    names, leaves = zip(*student.named_parameters(), strict=True)
    wanted = torch.autograd.grad(expected, leaves)
    for name, given, gradient in zip(names, torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(given, gradient, rtol=1e-7, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("losses", "told"),
    [({"kl": 1.0}, "also the teacher"), ({}, "give one a weight"), ({"klo": 1.0}, "unknown loss 'klo'; did you mean")],
)
def test_losses_that_cannot_be_are_refused(losses, told, teacher, ids):
    with pytest.raises(ValueError, match=told):
        distil(student_of(teacher), None, ids, losses=losses, **SETTINGS)

"""Plain Trainer on real text: the loss falls, a resumed run is the same run; LoRA; packed batches from the collator."""

import pydoc_data.topics

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from teachers import tiny_config as host_config
from tiny_fwp import KINDS, assert_close, tiny_config, tiny_model, tokens
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_fwp.hosts import student_config
from hf_fwp.hosts.table import HEADS
from hf_fwp.modeling import (
    LORA_TARGETS,
    FwpForCausalLM,
    FwpForQuestionAnswering,
    FwpForSequenceClassification,
    FwpForTokenClassification,
)

LENGTH = 64


def blocks(count: int) -> list[dict[str, torch.Tensor]]:
    text = "".join(pydoc_data.topics.topics.values()).encode()[: count * LENGTH]
    rows = torch.tensor(list(text)).view(count, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def byte_model(kind: str) -> FwpForCausalLM:
    torch.manual_seed(0)
    return FwpForCausalLM(tiny_config(kind, vocab_size=256, pad_token_id=None, initializer_range=0.02))


def trainer(model, folder, data, **changes):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
    }
    return Trainer(model=model, args=TrainingArguments(**{**arguments, **changes}), train_dataset=data)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(kind, tmp_path):
    run = trainer(byte_model(kind), tmp_path, blocks(128))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[0] > 5.4
    assert sum(losses[-5:]) / 5 < 3.6


def test_a_resumed_run_is_the_same_run(tmp_path):
    data = blocks(64)
    whole = byte_model("hybrid")
    trainer(whole, tmp_path / "whole", data, max_steps=8).train()
    trainer(byte_model("hybrid"), tmp_path / "parts", data, max_steps=8, save_strategy="steps", save_steps=4).train()
    resumed = byte_model("hybrid")
    run = trainer(resumed, tmp_path / "parts", data, max_steps=8)
    run.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def labelled(**labels: object) -> list[dict[str, object]]:
    return [{"input_ids": row, **labels} for row in tokens(8, 6)]


def labelled_series() -> list[dict[str, object]]:
    values = torch.randn(8, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [{"inputs_embeds": row, "labels": 1} for row in values]


def host_head(head: str, family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, HEADS[head]).from_config(student_config(host_config(family), layers=[0, 2]))


CLASSES = {"num_labels": 2, "dtype": torch.float32}
EACH = [1, 0, 1, 1, 0, 1]
ACCUMULATED = {  # head: (its model, its data)
    "causal": (lambda: byte_model("gated_delta_net"), blocks(32)),
    "sequence": (lambda: tiny_model(model_class=FwpForSequenceClassification, **CLASSES), labelled(labels=1)),
    "series": (
        lambda: tiny_model(model_class=FwpForSequenceClassification, input_size=3, **CLASSES),
        labelled_series(),
    ),
    "token": (lambda: tiny_model(model_class=FwpForTokenClassification, **CLASSES), labelled(labels=EACH)),
    "answer": (
        lambda: tiny_model(model_class=FwpForQuestionAnswering, dtype=torch.float32),
        labelled(start_positions=1, end_positions=3),
    ),
    "llama sequence": (lambda: host_head("ForSequenceClassification", "llama"), labelled(labels=1)),
    "llama token": (lambda: host_head("ForTokenClassification", "llama"), labelled(labels=EACH)),
    "gpt2 sequence": (lambda: host_head("ForSequenceClassification", "gpt2"), labelled(labels=1)),
}


@pytest.mark.parametrize("head", ACCUMULATED)
def test_accumulated_gradients_are_those_of_the_whole_batch(head, tmp_path):
    make, data = ACCUMULATED[head]
    before, whole, accumulated = (without_dropout(make().double()) for _ in range(3))
    settings = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0}
    trainer(whole, tmp_path, data, **settings).train()
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer(accumulated, tmp_path, data, **settings, **changes).train()
    moved = 0.0
    for start, a, b in zip(before.parameters(), whole.parameters(), accumulated.parameters(), strict=True):
        assert (a - b).norm() <= 1e-7 * (1 + a.norm())
        moved += (a - start).norm().item()
    assert moved > 1e-4


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_the_flattening_collator_packs():
    model = byte_model("hybrid").double().eval()
    rows = [{"input_ids": tokens(1, length)[0].tolist()} for length in (5, 2, 9)]
    packed = DataCollatorWithFlattening()(rows)
    assert "attention_mask" not in packed
    logits = model(**packed).logits
    alone = [model(torch.tensor([row["input_ids"]])).logits for row in rows]
    assert_close(logits, torch.cat(alone, dim=1))


def test_lora_with_default_targets(tmp_path):
    base = byte_model("hybrid").eval()
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == set(LORA_TARGETS)
    assert model.peft_config["default"].target_modules == set(LORA_TARGETS)
    ids = tokens()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    before = model(ids, labels=ids).loss
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids, labels=ids).loss < before
    with torch.no_grad():
        trained = model(ids).logits
        model.save_pretrained(tmp_path)
        reloaded = PeftModel.from_pretrained(byte_model("hybrid").eval(), tmp_path)
        assert_close(reloaded(ids).logits, trained, 1e-6)
        merged = reloaded.merge_and_unload()
        assert_close(merged(ids).logits, trained, 1e-5)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(ids).logits, merged(ids).logits)


def test_trained_under_autocast():
    model = byte_model("gated_delta_net").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())

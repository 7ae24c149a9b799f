"""Plain Trainer on real text: the loss falls, a resumed run is the same run; LoRA; packed batches from the collator."""

import pydoc_data.topics

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_fwp import KINDS, assert_close, tiny_config, tokens
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_fwp.modeling import LORA_TARGETS, FwpForCausalLM

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


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole, accumulated = byte_model("gated_delta_net").double(), byte_model("gated_delta_net").double()
    trainer(whole, tmp_path, blocks(32), max_steps=2, optim="sgd").train()
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer(accumulated, tmp_path, blocks(32), max_steps=2, optim="sgd", **changes).train()
    for a, b in zip(whole.parameters(), accumulated.parameters(), strict=True):
        assert (a - b).norm() <= 1e-7 * (1 + a.norm())


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

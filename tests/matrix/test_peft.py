"""Adapters on every kind of model: trained, saved, loaded and merged they are the same function."""

import pytest
import torch
from every_model import every_model
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny_fwp import assert_close, tokens
from transformers import AutoModelForCausalLM

TASK = {"task_type": "CAUSAL_LM"}
METHODS = {
    "LoRA": lambda: LoraConfig(r=4, **TASK),
    "DoRA": lambda: LoraConfig(r=4, use_dora=True, **TASK),
    "rank-stabilised LoRA on all linear layers": lambda: LoraConfig(
        r=2, use_rslora=True, target_modules="all-linear", **TASK
    ),
    "LoRA with a whole head": lambda: LoraConfig(r=4, modules_to_save=["lm_head"], **TASK),
    "OFT": lambda: OFTConfig(oft_block_size=8, target_modules=["v_proj", "o_proj"], **TASK),
    "IA3": lambda: IA3Config(target_modules=["v_proj", "o_proj"], feedforward_modules=[], **TASK),
}


def adapted(name, method, steps=2):
    torch.manual_seed(0)
    model = get_peft_model(every_model(name, dtype=torch.float32), METHODS[method]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses


@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_loaded_and_merged_is_the_same_function(name, method, tmp_path):
    model, losses = adapted(name, method)
    with torch.no_grad():
        trained, plain = model(tokens()).logits, every_model(name, dtype=torch.float32)(tokens()).logits
        assert losses[1] < losses[0]
        assert (trained - plain).norm() > 1e-4 * plain.norm()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(every_model(name, dtype=torch.float32), tmp_path).eval()
        assert_close(loaded(tokens()).logits, trained, 1e-6)
        merged = loaded.merge_and_unload()
        assert_close(merged(tokens()).logits, trained, 1e-5)
        assert not [key for key in merged.state_dict() if "lora" in key or "base_layer" in key]


def test_an_adapter_folder_names_its_base(name, tmp_path):
    every_model(name, dtype=torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, **TASK))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert_close(loaded(tokens()).logits, model.eval()(tokens()).logits, 1e-6)


def test_an_adapter_generates_with_a_cache_as_without(name):
    model, _ = adapted(name, "LoRA")
    settings = {"input_ids": tokens(), "max_new_tokens": 4, "do_sample": False}
    ways = [model.eval().generate(**settings, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*ways)


def test_a_disabled_adapter_is_the_plain_model(name):
    model, _ = adapted(name, "LoRA")
    with torch.no_grad(), model.disable_adapter():
        assert_close(model(tokens()).logits, every_model(name, dtype=torch.float32)(tokens()).logits, 1e-6)


def test_prefix_tuning_is_refused_with_a_sentence(name):
    model = every_model(name, dtype=torch.float32)
    prefix = PrefixTuningConfig(num_virtual_tokens=3, num_layers=2, num_attention_heads=2, token_dim=16, **TASK)
    with pytest.raises(ValueError, match="prefix"):
        get_peft_model(model, prefix)(tokens())
    assert every_model(name)(tokens()).logits.isfinite().all()


def test_soft_prompts_work_since_they_are_tokens(name):
    model = get_peft_model(every_model(name, dtype=torch.float32), PromptTuningConfig(num_virtual_tokens=3, **TASK))
    loss = model(tokens(), labels=tokens(), attention_mask=torch.ones_like(tokens())).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)

"""Every family from the teacher to a tuned model: solve, align, distil, extend, save, load, generate, LoRA, merge."""

import importlib
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from teachers import LAYERS, tiny_teacher
from tiny import ALPHABET, TEXTS, byte_tokenizer
from transformers import AutoModelForCausalLM

from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.recipes import RECIPES, TRAINING, Recipe
from hf_fwp.hosts import HOSTS, converted_layers

TOKENS = {"sequence_length": 16, "solve_tokens": 112, "align_tokens": 64, "distil_tokens": 64, "extend_tokens": 64}
STEPS = {stage: {"batch_size": 2, "bf16": False} for stage in TRAINING}
SMALL = Recipe("closed-form", "small", extend_length=16, **TOKENS, **STEPS)


verb = importlib.import_module("hf_fwp.conversion.convert")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    few = {"tokens": 32, "baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": (), "needles": 0}
    monkeypatch.setattr(verb, "REPORT_TOKENS", 32)
    monkeypatch.setattr(verb, "_MEASURES", few)  # the measurements have tests of their own
    monkeypatch.setitem(RECIPES, "closed-form", SMALL)


@pytest.mark.parametrize("name", HOSTS)
def test_a_family_goes_all_the_way(name, tmp_path):
    teacher = tiny_teacher(name, vocab_size=len(ALPHABET) + 1, max_position_embeddings=1100)
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    made = convert(
        teacher, tokenizer=byte_tokenizer(), keep=[1], recipe="closed-form", data=TEXTS, output=tmp_path / "made"
    )
    assert all(torch.equal(before[key], tensor) for key, tensor in teacher.state_dict().items())
    assert converted_layers(made.config) == tuple(layer for layer in range(LAYERS) if layer != 1)
    assert all(math.isfinite(residual) for residual in made.conversion_report["residuals"].values())
    for stage, measure in {"align": "residual", "distil": "kl", "extend": "cross_entropy"}.items():
        log = made.conversion_report["stages"][stage]
        assert log["steps"] == 2
        assert all(math.isfinite(entry[measure]) for entry in log["history"])

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    tokens = torch.randint(1, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, made(tokens).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        loaded.generate(tokens, **settings, use_cache=True), loaded.generate(tokens, **settings, use_cache=False)
    )

    tuned = get_peft_model(loaded, LoraConfig(r=2, init_lora_weights=False)).eval()
    with torch.no_grad():
        beside = tuned(tokens).logits
        merged = tuned.merge_and_unload()(tokens).logits
    assert not torch.equal(beside, made(tokens).logits)
    torch.testing.assert_close(merged, beside, rtol=0, atol=1e-5)

"""Adapters of peft on own and converted models: pushed by the address of their base model, loaded by their own."""

import json
import re

import pytest
import torch
from every_model import every_model
from hub_stand_in import client_of, serving
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, tiny_llama
from tiny_fwp import tokens
from transformers import AutoModelForCausalLM

import hf_fwp

BASE, REPO = "you/base", "you/lora"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as server, client_of(server, tmp_path / "cache", monkeypatch):
        yield server


@pytest.fixture(params=["delta_net", "llama converted"])
def kind(request):
    return request.param


@pytest.fixture
def base(kind, hub, tmp_path):
    """A model's folder, which was pushed with its code."""
    folder = tmp_path / "base"
    every_model(kind, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    hf_fwp.push(folder, BASE, with_code=True)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """A LoRA whose weights are not zero, saved as Trainer saves it, with what a run leaves."""
    settings = LoraConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).eval()
    for name, weight in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "optimizer.pt").write_bytes(b"x")
    model.folder = tmp_path / "lora"
    return model


@torch.no_grad()
def test_an_adapter_arrives_and_loads_with_its_base(hub, base, adapter, kind):
    before = {path.name: path.read_bytes() for path in adapter.folder.iterdir()}
    pushed = hf_fwp.push(adapter.folder, REPO, base=BASE)
    assert {path.name: path.read_bytes() for path in adapter.folder.iterdir()} == before
    assert set(pushed.files) == {"README.md", "adapter_config.json", WEIGHTS}
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] == BASE
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (BASE, "peft")
    assert card.data.pipeline_tag == "text-generation"
    rule = "delta_net" if kind == "delta_net" else "gated_delta_net"
    assert {"hf_fwp", "fast-weights", "lora", "adapter", rule} <= set(card.data.tags)
    assert str(base) not in str(card)
    expected = adapter(tokens()).logits
    blocks = re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2  # the base brings its code
    for block in blocks:
        names = {}
        exec(block, names)
        assert torch.allclose(names["model"](tokens()).logits, expected, atol=1e-5)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(tokens()).logits, expected, atol=1e-2)
        assert names["tokenizer"]("a").input_ids == byte_tokenizer()("a").input_ids


@pytest.mark.parametrize("kind", ["delta_net"])
def test_what_somebody_wrote_on_the_card_stays(hub, adapter):
    written = "---\nlicense: mit\ntags: [mine, 'base_model:adapter:/home/me']\n---\nBy hand."
    (adapter.folder / "README.md").write_text(written)
    hf_fwp.push(adapter.folder, REPO, base=BASE)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.text.strip() == "By hand."
    assert card.data.license == "mit"
    assert card.data.tags[:2] == ["mine", "hf_fwp"]
    assert card.data.base_model == BASE


def changed(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def first(weights):
    return weights[min(weights)]


def another_base(hub, folder):
    tiny_llama().save_pretrained(folder)
    hub.put(BASE, {path.name: path.read_bytes() for path in folder.iterdir()})


REFUSED = {  # told: what was done to the adapter, or to the Hub
    "has no adapter_model.safetensors": lambda f, hub: (f / WEIGHTS).unlink(),
    "adapter_model.safetensors is damaged": lambda f, hub: (f / WEIGHTS).write_bytes(b"12345"),
    "not those of its config and base model: more": lambda f, hub: changed(f, lambda w: w.update(more=torch.zeros(1))),
    "not those of its config and base model: base_model": lambda f, hub: changed(f, lambda w: w.pop(min(w))),
    "1 weights of .* are NaN or infinite .base_model": lambda f, hub: changed(f, lambda w: first(w).fill_(torch.nan)),
    "the base model you/base is a 'llama', no model of this package": lambda f, hub: another_base(
        hub, f.parent / "another"
    ),
}


@pytest.mark.parametrize("kind", ["delta_net"])
@pytest.mark.parametrize("told", REFUSED)
def test_what_is_not_whole_is_refused(hub, adapter, told):
    REFUSED[told](adapter.folder, hub)
    with pytest.raises(ValueError, match=told):
        hf_fwp.push(adapter.folder, REPO, base=BASE)
    assert REPO not in hub.repositories


@pytest.mark.parametrize("kind", ["delta_net"])
def test_arguments_that_do_not_fit_are_told(hub, base, adapter):
    with pytest.raises(ValueError, match=r"which others do not have; push that model first.* base='you/the-model'"):
        hf_fwp.push(adapter.folder, REPO)
    with pytest.raises(ValueError, match="an adapter has no code of its own"):
        hf_fwp.push(adapter.folder, REPO, base=BASE, with_code=True)
    with pytest.raises(ValueError, match="is a model, not an adapter: leave out base"):
        hf_fwp.push(base, REPO, base=BASE)
    with pytest.raises(OSError, match="you/nothing"):
        hf_fwp.push(adapter.folder, REPO, base="you/nothing")
    assert REPO not in hub.repositories

"""Every preset is a model: it can be built, saved, trained by a step, and decoded with and without a cache."""

import pytest
import torch
from tiny_fwp import PAD, VOCAB, assert_close, tokens
from transformers import AutoModelForCausalLM

from hf_fwp import RULES, FwpConfig
from hf_fwp.catalogue import preset_table
from hf_fwp.presets import PRESETS

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB, "pad_token_id": PAD}


def model_of(preset):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FwpConfig.preset(preset, **SIZES, initializer_range=0.1)).double()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_it_says(preset):
    config = FwpConfig.preset(preset, **SIZES)
    for name, value in PRESETS[preset].fields.items():
        given = getattr(config, name)
        if isinstance(value, dict):
            assert given == {**RULES[config.rule].options, **value}
        else:
            assert given == {"head_dim**-0.5": 0.25}.get(value, value) if isinstance(value, str) else given == value


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_saved_trained_and_decoded(preset, tmp_path):
    model, ids = model_of(preset), tokens(2, 7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    plain = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [PAD]}
    mask = torch.ones_like(ids)
    model.eval()
    cached = model.generate(ids, attention_mask=mask, **plain)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **plain))


def test_every_rule_has_a_preset():
    assert {preset["rule"] for preset in preset_table().values()} >= set(RULES) - {"gated_oja"}


def test_no_two_presets_are_the_same():
    names = list(PRESETS)
    for number, name in enumerate(names):
        same = [other for other in names[:number] if PRESETS[other].fields == PRESETS[name].fields]
        assert not same, f"{name} is {same}"


def test_the_attention_of_a_performer_is_near_softmax_attention():
    """What its features are for: φ(q)·φ(k) estimates exp(q·k / √d)."""
    assert PRESETS["choromanski2020-performer"].fields["feature_map"] == "favor:64,prescale=1"
    config = FwpConfig.preset("choromanski2020-performer", **SIZES, feature_map="favor:1024,prescale=1")
    model = AutoModelForCausalLM.from_config(config).double()
    features = model.hf_fwp_layers[0].feature_map
    q, k = torch.randn(2, 200, 16, dtype=torch.float64) * 0.5
    phi_q, phi_k = features(q, k)
    exact = (q @ k.T / 4).exp()
    assert_close(phi_q @ phi_k.T, exact, 0.1)

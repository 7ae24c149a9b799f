"""Every field does something, every mistake is named, and what is saved is what was meant."""

import json
import warnings
from dataclasses import fields

import pytest
import torch
from tiny_fwp import tiny_config, tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from hf_fwp import RULES, FwpConfig, MixerOptions

# field: (changes to the tiny model that let it matter, the changed value)
ROPE = {"position_embedding": "rope"}
CHANGES = {
    "vocab_size": ({}, 62),
    "hidden_size": ({}, 64),
    "num_hidden_layers": ({}, 3),
    "num_attention_heads": ({}, 2),
    "num_key_value_heads": ({}, 4),
    "num_value_heads": ({}, 4),
    "head_dim": ({}, 16),
    "expand_v": ({}, 1.0),
    "intermediate_size": ({}, 64),
    "hidden_act": ({}, "gelu"),
    "mlp_type": ({}, "mlp"),
    "use_bias": ({}, True),
    "norm_type": ({}, "layer"),
    "norm_eps": ({}, 0.1),
    "norm_placement": ({}, "idsia_pre"),
    "final_norm": ({}, False),
    "lm_head_bias": ({}, True),
    "rule": ({}, "delta_net"),
    "rule_options": ({"rule": "linear_attention"}, {"normalize": False}),
    "feature_map": ({}, "relu"),
    "qk_norm": ({}, "none"),
    "conv_size": ({}, 3),
    "beta_bias": ({}, True),
    "output_gate": ({}, "sigmoid2"),
    "output_norm": ({}, False),
    "output_scale": ({"output_norm": False}, 0.5),
    "scale": ({"output_norm": False}, 3.0),
    "allow_neg_eigval": ({}, True),
    "position_embedding": ({}, "sinusoidal"),
    "rope_parameters": (ROPE, {"rope_type": "default", "rope_theta": 7.0}),
    "rope_heads": (ROPE, [True, False]),
    "max_position_embeddings": ({"position_embedding": "learned"}, 50),
    "value_skip": ({}, 2),
    "time_scales": ({}, 2),
    "sliding_window": ({"rule": ["sliding_attention"] * 2, "sliding_window": 4}, 2),
    "initializer_range": ({}, 0.1),
    "tie_word_embeddings": ({}, True),
    "pad_token_id": ({}, 5),
}
BEHAVIOUR = {"dropout", "backend", "use_cache", "bos_token_id", "eos_token_id"}  # tested below, one by one
ELSEWHERE = {"input_size"}  # in test_series.py


PLACEMENTS = ["pre", "post", "idsia_pre", "residual", "none"]


def outcome(**changes):
    model = tiny_model(**changes)
    with torch.no_grad():
        model.model.embed_tokens.weight[7].copy_(model.model.embed_tokens.weight[8])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return shapes, model(tokens()).logits, model.model.embed_tokens.weight


def own_fields():
    return [f.name for f in fields(FwpConfig) if f.name not in {g.name for g in fields(PreTrainedConfig)}]


def test_every_field_is_tested():
    assert set(own_fields()) == set(CHANGES) | BEHAVIOUR | ELSEWHERE


@pytest.mark.parametrize("name", CHANGES)
def test_changing_a_field_changes_something(name):
    setting, value = CHANGES[name]
    before, after = outcome(**setting), outcome(**{**setting, name: value})
    same_shapes = before[0] == after[0]
    same_values = same_shapes and torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])
    assert not same_values


def test_reads_can_be_scaled_by_the_size_of_a_head():
    assert tiny_config(output_scale="head_dim**-0.5").output_scale == 8**-0.5
    assert tiny_config(output_scale="head_dim**-0.5", head_dim=16).mixer_options(0).output_scale == 0.25


def test_the_norm_at_the_end_is_there_unless_norms_stand_behind():
    ends = {placement: tiny_config(norm_placement=placement).final_norm for placement in PLACEMENTS}
    assert ends == dict.fromkeys(PLACEMENTS, True) | {"post": False}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_where_the_norms_stand(placement):
    block = tiny_model(norm_placement=placement, num_hidden_layers=1).model.layers[0]
    for weight in block.mixer_norm.parameters():
        weight.data.uniform_(0.5, 2)
    h = torch.randn(2, 7, 32, dtype=torch.float64)
    norm, mlp_norm, mlp = block.mixer_norm, block.mlp_norm, block.mlp
    mixed = norm(h) if placement in ("pre", "idsia_pre") else h
    out = block.mixer(mixed)[0] + (norm(h) if placement in ("idsia_pre", "residual") else h)
    out = mlp_norm(norm(out) + mlp(norm(out))) if placement == "post" else out + mlp(mlp_norm(out))
    assert torch.equal(block(h), out)


def test_dropout_acts_in_training_only():
    model, ids = tiny_model(dropout=0.5), tokens()
    assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    assert not torch.equal(model.train()(ids).logits, tiny_model()(ids).logits)


def test_backend_is_passed_on():
    with pytest.raises(ValueError, match="triton"):
        tiny_model(backend="triton")(tokens())
    assert torch.allclose(tiny_model(backend="reference")(tokens()).logits, tiny_model()(tokens()).logits)


def test_use_cache_and_token_ids_reach_generation():
    assert tiny_model(use_cache=False)(tokens()).past_key_values is None
    assert tiny_model()(tokens()).past_key_values is not None
    generation = tiny_model(bos_token_id=3, eos_token_id=4).generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (3, 4)


@pytest.mark.parametrize("kind", [*RULES, "hybrid"])
def test_saved_and_loaded_is_equal(kind, tmp_path):
    config = tiny_config(kind)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "layer_types" not in saved
    assert all(saved[name] is not None for name in ("feature_map", "conv_size", "head_dim", "num_key_value_heads"))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, FwpConfig)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    # Trainer's resume reads the file with the base class
    PreTrainedConfig.from_pretrained(tmp_path)


def test_defaults_come_from_the_rule_of_each_layer():
    config = tiny_config(rule=["full_attention", "linear_attention", "gated_delta_net"])
    assert config.feature_map == [None, "elu1", "silu"]
    assert config.layer_types == ["full_attention", "fast_weight", "fast_weight"]
    assert config.mixer_options(1).scale == RULES["linear_attention"].defaults["scale"]
    assert config.rule_options["linear_attention"] == dict(RULES["linear_attention"].options)
    per_layer = tiny_config(feature_map=["relu", "elu1"])
    assert [per_layer.mixer_options(layer).feature_map for layer in (0, 1)] == ["relu", "elu1"]


def test_other_names():
    config = tiny_config(num_attention_heads=4)
    assert config.num_heads == 4
    assert FwpConfig(num_heads=2, hidden_size=32, num_hidden_layers=1).num_attention_heads == 2


@pytest.mark.parametrize("rule", RULES)
def test_the_auto_classes_know_every_rule(rule):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    config = AutoConfig.for_model("fwp", rule=rule, **sizes)
    assert (type(config), config.rule) == (FwpConfig, rule)
    model = AutoModelForCausalLM.from_config(config)
    assert model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, min_new_tokens=2).shape == (1, 5)


WRONG = {
    "did you mean 'feature_map'": {"feature_mapp": "relu"},
    "did you mean 'delta_net'": {"rule": "delta_nett"},
    "the rules are": {"rule": "transformer"},
    "did you mean 'softmax'": {"feature_map": "sofmax"},
    "did you mean 'silu'": {"output_gate": "sillu"},
    "did you mean 'swiglu'": {"mlp_type": "swiglue"},
    "layer_types is derived": {"layer_types": ["full_attention"]},
    "names 1 layers": {"rule": ["delta_net"], "num_hidden_layers": 2},
    "give the window's length": {"rule": ["sliding_attention"] * 2, "sliding_window": None},
    "not a multiple of num_attention_heads": {"hidden_size": 30},
    "not a multiple of num_key_value_heads": {"num_key_value_heads": 3},
    "set position_embedding='rope'": {"rope_heads": "all"},
    "it needs one per state": {"rope_heads": [True], "position_embedding": "rope"},
    "did you mean 'normalize'": {"rule": "linear_attention", "rule_options": {"normalise": True}},
    "options are given per rule": {"rule": ["linear_attention", "delta_net"], "rule_options": {"normalize": True}},
    "give one per layer": {"conv_size": [4]},
    "takes no number": {"feature_map": "relu:3"},
    "no setting 'redrawn'; it has redraw": {"feature_map": "favor:8,redrawn=1"},
    "has no setting 'eps'; it has none": {"feature_map": "elu1,eps=1"},
    "is not a number of at least 0": {"feature_map": "favor,eps=-1"},
    "is neither 0 .no. nor 1 .yes.": {"feature_map": "favor,redraw=2"},
    "give a number or 'head_dim": {"output_scale": "head_dim"},
    "did you mean 'residual'": {"norm_placement": "residuals"},
    "slow_net is 'gru'; choose from 'linear', 'lstm'": {"rule": "delta_net", "rule_options": {"slow_net": "gru"}},
    "is not a positive whole number": {"feature_map": "dpfp:x"},
    "must be 0 \\(none\\) or more": {"conv_size": -1},
    "must be at least 1": {"time_scales": 0},
    "unknown backend": {"backend": "cuda"},
    "do not group": {"num_value_heads": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_mistake_is_named(message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**WRONG[message])


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="did you mean 'yang2024-deltanet'"):
        FwpConfig.preset("yang2024-delta-net")


def test_an_ignored_window_warns():
    with pytest.warns(UserWarning, match="sliding_window is ignored"):
        tiny_config(sliding_window=4)


def test_mixer_options_refuse_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'value_skip'"):
        MixerOptions.from_dict({"rule": "delta_net", "hidden_size": 8, "num_attention_heads": 2, "value_skipp": 1})
    with pytest.raises(ValueError, match="did you mean 'conv_size'"):
        MixerOptions(rule="delta_net", hidden_size=8, num_attention_heads=2).replace(conv_sizes=1)


@pytest.mark.parametrize("name", ["allow_neg_eigval", "beta_bias"])
def test_a_rate_that_no_layer_makes_is_named(name):
    with pytest.warns(UserWarning, match=f"{name} is ignored: srwm takes no beta"):
        tiny_config("srwm", **{name: True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_config("delta_net", **{name: True})

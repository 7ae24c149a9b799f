"""Our models written for flash-linear-attention: read again they are bit for bit the same, or they are refused.

That library itself reads them in fla_models.py."""

import json

import pytest
import tiny
import torch
from fla_kinds import MODELS, SIZES, model_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from typer.testing import CliRunner

import hf_fwp
from hf_fwp import cli
from hf_fwp.interop import fla, to_fla


@pytest.mark.usefixtures("fla_not_imported")
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_bit_for_bit(name, tmp_path):
    model = model_of(name)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    assert hf_fwp.export(model, tmp_path / "theirs", format="fla") == tmp_path / "theirs"
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = again.state_dict()
    assert all(torch.equal(weight, found[key]) for key, weight in before.items())
    assert not any(weight.any() for key, weight in found.items() if key not in before)
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] in fla.MODEL_TYPES
    ids = torch.randint(0, 40, (2, 21))
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False), again.generate(ids, max_new_tokens=4, do_sample=False)
    )


@pytest.mark.parametrize("name", to_fla.MODEL_TYPES)
def test_every_model_type_that_is_read_can_be_written(name):
    assert {kind for kind, _, _ in to_fla.MODEL_TYPES.values()} == set(fla.MODEL_TYPES)
    assert {to_fla.MODEL_TYPES[name][0]} <= set(fla.MODEL_TYPES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rule": "oja"}, "no model with rule=oja; .*linear_attention, delta_net"),
        ({"rule": ["delta_net", "full_attention"]}, "no model with rule=delta_net, full_attention"),
        ({"rule": "linear_attention"}, "linear_attn has no feature_map|has no rule_options"),
        ({"rule": "gated_delta_net", "time_scales": 2}, "gated_deltanet has no time_scales=2, only 1"),
        ({"rule": "gated_delta_net", "output_gate": "sigmoid2"}, "no output_gate='sigmoid2', only 'silu'"),
        (
            {"rule": "gated_delta_net", "num_key_value_heads": 2},
            "gated_deltanet has no such model .4 query heads, 4 key heads",
        ),
        ({"rule": "delta_net", "feature_map": "dpfp", "qk_norm": "sum"}, "delta_net has no"),
        ({"rule": "delta_net", "norm_type": "layer"}, "no norm_type='layer', only 'rms'"),
        ({"rule": "gated_delta_net", "mlp_type": "mlp"}, "no hidden_act|no mlp_type"),
        ({"rule": "kimi_delta", "output_gate": "silu"}, "kda has no output_gate='silu'"),
        ({"rule": "gated_delta_net", "output_gate": ["silu", "sigmoid"]}, "no output_gate='sigmoid', only 'silu'"),
    ],
)
def test_what_that_library_lacks_is_named(changed, message, tmp_path):
    model = AutoModelForCausalLM.from_config(hf_fwp.FwpConfig(**SIZES | changed))
    with pytest.raises(ValueError, match=message):
        hf_fwp.export(model, tmp_path / "theirs", format="fla")
    assert not (tmp_path / "theirs").exists()


def test_the_command_takes_the_tokenizer_along(tmp_path):
    tiny.teacher_folder(tmp_path / "ours")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "ours" / file).unlink()
    model_of("gated").save_pretrained(tmp_path / "ours")
    words = ["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--format", "fla"]
    first = CliRunner().invoke(cli.app, words)
    assert first.exit_code == 0, first.stderr
    assert (tmp_path / "theirs" / "tokenizer.json").read_bytes() == (tmp_path / "ours" / "tokenizer.json").read_bytes()
    assert "model.layers.0.attn.A_log" in load_file(tmp_path / "theirs" / "model.safetensors")
    again = CliRunner().invoke(cli.app, words)
    assert again.exit_code == 2
    assert "not an empty folder" in again.stderr


def test_bad_requests(tmp_path):
    model = model_of("gated")
    with pytest.raises(ValueError, match="unknown export format 'fal'; did you mean 'fla'"):
        hf_fwp.export(model, tmp_path / "new", format="fal")
    with pytest.raises(ValueError, match="writes models of type 'fwp', not 'llama'"):
        hf_fwp.export(tiny.tiny_llama(), tmp_path / "new", format="fla")


def test_whoever_owns_a_model_type_keeps_it_in_any_order(monkeypatch):
    class TheirConfig(PreTrainedConfig):
        model_type = "kda"

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    assert AutoConfig.for_model("kda").model_type == "kda"
    AutoConfig.register("kda", TheirConfig, exist_ok=True)  # as that library does
    assert type(AutoConfig.for_model("kda")) is TheirConfig
    fla.register_checkpoints()
    assert type(AutoConfig.for_model("kda")) is TheirConfig

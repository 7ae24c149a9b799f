"""One token with states in and out: the logits of the whole sequence, in PyTorch, torch.export and onnxruntime."""

import numpy as np
import pytest
import torch
from every_model import MODELS, every_model
from teachers import tiny_teacher
from typer.testing import CliRunner

import hf_fwp
from hf_fwp import cli
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.interop.decode_step import DecodeStep
from hf_fwp.rules import RULES

WINDOWED = ("hybrid", "mistral half converted")  # their softmax layers keep a window
EXPORTED = [name for name in MODELS if name not in WINDOWED]
# Positions and masks in other ways than Llama's.
FAMILIES = ("gpt2", "opt", "bloom", "falcon", "gemma2")
QUICK = ("attention first", "gated_delta_net")


def tokens(model, rows=2, length=5):
    torch.manual_seed(1)
    return torch.randint(1, model.config.vocab_size, (rows, length))


def walked(step, names, states, ids):
    """Logits of every token, by `step` from `states`; the caller's states stay as they are."""
    found = []
    for t in range(ids.shape[1]):
        before = [state.clone() for state in states]
        logits, *after = step(ids[:, t : t + 1], torch.full((len(ids), 1), t), *states)
        assert all(torch.equal(a, b) for a, b in zip(before, states, strict=True))
        found.append(logits)
        states = after
    return torch.stack(found, dim=1)


def start(step, rows):
    return [state.expand(rows, *state.shape[1:]).contiguous() for state in step.initial.values()]


@torch.no_grad()
def assert_the_same_as_the_whole_sequence(model):
    step, ids = DecodeStep(model), tokens(model)
    expected = model(ids).logits
    assert torch.allclose(walked(step, step.names, start(step, 2), ids), expected, atol=1e-9)
    states = start(step, 2)
    first = step(ids[:, :1], torch.zeros(2, 1, dtype=torch.long), *states)
    assert not torch.allclose(step(ids[:, 1:2], torch.ones(2, 1).long(), *states)[0], expected[:, 1], atol=1e-9)
    assert any(not torch.equal(a, b) for a, b in zip(first[1:], states, strict=True))


@pytest.mark.parametrize("name", EXPORTED)
def test_token_by_token_in_pytorch(name):
    assert_the_same_as_the_whole_sequence(every_model(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_in_converted_families(family):
    layers = [0, 1, 2, 3] if family == "gemma2" else [1, 3]
    assert_the_same_as_the_whole_sequence(copy_teacher(tiny_teacher(family), layers=layers).double().eval())


def assert_onnxruntime_says_the_same(model, folder):
    hf_fwp.export(model, folder, format="onnx")
    decoder = hf_fwp.OnnxDecoder(folder)
    for rows in (1, 3):
        ids = tokens(model, rows, 6)
        expected = model(ids).logits.detach().numpy()
        states = decoder.start(rows=rows)
        for t in range(6):
            logits, states = decoder(ids[:, t].numpy(), t, states)
            assert np.abs(logits - expected[:, t]).max() <= 2e-5 * np.abs(expected).max()
        whole = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert np.array_equal(decoder.generate(ids, max_new_tokens=8), whole.numpy())
    wrong = dict(zip(states, [np.zeros_like(x) for x in states.values()], strict=True))
    assert np.abs(decoder(ids[:, 0].numpy(), 6, states)[0] - decoder(ids[:, 0].numpy(), 6, wrong)[0]).max() > 1e-5


@pytest.mark.parametrize("name", QUICK)
def test_onnxruntime_token_by_token(name, tmp_path):
    assert_onnxruntime_says_the_same(every_model(name, dtype=torch.float32), tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXPORTED if name not in QUICK])
def test_onnxruntime_token_by_token_for_every_rule(name, tmp_path):
    assert_onnxruntime_says_the_same(every_model(name, dtype=torch.float32), tmp_path / "onnx")


@torch.no_grad()
def test_torch_export_for_any_number_of_rows():
    model = every_model("attention first", dtype=torch.float64)
    step = DecodeStep(model)
    module = step.program().module()
    for rows in (1, 3):
        ids = tokens(model, rows)
        found = walked(module, step.names, start(step, rows), ids)
        assert torch.allclose(found, model(ids).logits, atol=1e-9)


@pytest.mark.slow
def test_a_sequence_that_ended_is_filled(tmp_path):
    model = every_model("gated_delta_net", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    words = ["export", str(tmp_path / "model"), str(tmp_path / "onnx"), "--format", "onnx"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    decoder = hf_fwp.OnnxDecoder(tmp_path / "onnx")
    ids = tokens(model, 2)
    whole = decoder.generate(ids, max_new_tokens=6)
    end = int(whole[0, 5])
    found = decoder.generate(ids, max_new_tokens=6, eos_token_id=end)
    assert (found[0, 5:] == end).all()
    with pytest.raises(ValueError, match="at least one token"):
        decoder.generate(np.zeros((1, 0)))
    with pytest.raises(ValueError, match=r"holds no decode_step\.onnx"):
        hf_fwp.OnnxDecoder(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: every_model("hybrid"), "keeps a DynamicSlidingWindowLayer"),
        (lambda: every_model("delta_net", backend="torch"), "backend='torch', which cannot be exported"),
        (lambda: every_model("delta_net").bfloat16(), "in torch.bfloat16; onnxruntime"),
        (lambda: tiny_teacher("llama"), "has no fast-weight layers"),
    ],
)
def test_what_cannot_be_exported_is_named(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        hf_fwp.export(model(), tmp_path / "onnx", format="onnx")
    assert not (tmp_path / "onnx").exists()


def test_every_rule_is_exported():
    assert set(RULES) <= set(EXPORTED)

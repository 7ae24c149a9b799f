"""A whole mixer in one launch, on a machine without a GPU: interpreted, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_fwp import FastWeightLayer, MixerOptions, decoding
from hf_fwp.cache import MixerInputs
from hf_fwp.rules import linear_class

HERE = Path(__file__).parent


@pytest.mark.parametrize("which", [pytest.param("broken", marks=pytest.mark.slow), "not broken"])
def test_under_the_interpreter(which):
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    # Triton decides at its import; the other tests of this process want it as it is.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, HERE / "mixer_step_interpreted.py", "-k", which],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


UNKNOWN = {
    "another rule": {"rule": "kimi_delta"},
    "normalised reads": {"rule": "linear_attention"},
    "other features": {"feature_map": "dpfp"},
    "a norm of all heads together": {"head_norm": "joint"},
    "older values": {"value_skip": 2},
    "another backend": {"backend": "torch"},
    "a state too large for one program": {"head_dim": 256, "value_head_dim": 256},
    "too many states": {"num_attention_heads": 128, "num_key_value_heads": 128, "hidden_size": 1024},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_left_to_the_path_of_many_operations(name):
    known = {"rule": "gated_delta_net", "hidden_size": 64, "num_attention_heads": 2}
    assert decoding.serves(MixerOptions(**known))
    assert not decoding.serves(MixerOptions(**(known | UNKNOWN[name])))


def test_calls_that_are_left_to_it(monkeypatch):
    layer = FastWeightLayer(MixerOptions(rule="gated_delta_net", hidden_size=64, num_attention_heads=2), 0)
    token = MixerInputs(torch.zeros(2, 1, 64))
    with torch.no_grad():
        states = layer._mix(token, {})[1]
    assert not decoding.can_decode(layer, token, states), "on a CPU"
    monkeypatch.setattr(linear_class, "has_decode_kernel", lambda device_type: True)
    assert decoding.can_decode(layer, token, states)
    assert not decoding.can_decode(layer, token, {}), "without a state to overwrite"
    assert not decoding.can_decode(layer, MixerInputs(token.hidden_BTD.double()), states)
    assert not decoding.can_decode(layer, token, states | {"state": states["state"].mT})
    assert not decoding.can_decode(layer, token, states | {"q_conv": states["q_conv"].mT.contiguous().mT})
    layer.q_conv1d = nn.Sequential(layer.q_conv1d)
    assert not decoding.can_decode(layer, token, states), "an adapter around a module whose weight it reads"

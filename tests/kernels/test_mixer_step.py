"""A whole mixer in one launch, on a machine without a GPU: interpreted, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_fwp import MixerOptions, decoding

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

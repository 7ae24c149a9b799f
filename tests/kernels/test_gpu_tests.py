"""The GPU tests are run where there is no GPU, as far as they can be: what is wrong with a test is found here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
FEW = (
    r"every_output.*\[\w+-padded-1-0\]|guard|heads_of_every_size\[(fwp_1993|srwm)-16\]|generation.*\[(fwp_1993|oja)\]"
    r"|agrees.*\[gated_delta_net-.*-2-plain-16-16-.*-None\]|walk_writes.*\[srwm-padded|mixer_in_one_launch_writes.*modern"
    r"|convolution.*5-True-.*float16|gated_norm.*silu-.*float16|inverse.*\[0-32\]"
)
MANY = (
    r"every_output|heads_of|half_precision|of_a_sequential_rule|generation|recurrence_on_the_gpu|tokens_one_by_one"
    r"|4096_decode|walk_writes|one_launch_writes|convolution|gated_norm|inverse|agrees.*-(1|2|63|64|65)-p.*-16-16-.*-None\]"
)


@pytest.mark.parametrize("matching", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_the_gpu_tests_pass_under_the_interpreter(matching):
    pytest.importorskip("triton", reason="the package triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_on_a_processor", "--matching", matching, "tests/gpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)}
    ran = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout

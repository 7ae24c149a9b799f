"""The kernels of the short convolution and the gated norm: interpreted, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_fwp import companions
from hf_fwp.rules import linear_class

HERE = Path(__file__).parent


def test_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    # Triton decides at its import; the other tests of this process want it as it is.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "companions_interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_the_kernels_cannot_do_is_left_to_pytorch(monkeypatch):
    reads, gate, norm = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 24), nn.RMSNorm(8)
    assert not companions.has_kernels(reads)
    monkeypatch.setattr(linear_class, "has_decode_kernel", lambda device_type: True)
    assert companions.has_kernels(reads)
    assert companions._kernel_fits(reads, norm, gate, "silu")
    assert not companions.has_kernels(reads, gate.double())
    assert not companions._kernel_fits(reads, norm, gate, "head_sigmoid")
    assert not companions._kernel_fits(torch.zeros(1, 1, 1, 8192), norm, gate, "silu")

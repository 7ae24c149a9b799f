"""The Triton kernels of the channel decay: their tests under the interpreter, and when they are chosen."""

import os
import subprocess
import sys
from pathlib import Path

import operators as problems
import pytest
import torch
from operators import Problem

from hf_fwp.rules import RULES, triton_fit

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(which):
    """In a process of its own: the interpreter would serve every later user of Triton in this one."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    file = "tests/kernels/channel_decay_interpreted.py"
    done = subprocess.run(
        (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, file),
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


class Asked(Exception):
    """The kernels were."""


@pytest.mark.parametrize("rule", problems.SERVED_BY_CHANNEL)
def test_chosen_on_a_gpu(rule, monkeypatch):
    def asked(*_, **__):
        raise Asked

    given = problems.tensors(Problem(rule, torch.bfloat16, 3)).copy(torch.bfloat16)
    monkeypatch.setattr("hf_fwp.rules.apply_form.run_kernels", asked)
    monkeypatch.setattr("hf_fwp.rules.linear_class._triton", asked)  # finds what the preconditioned rule needs first
    RULES[rule].apply(**given.leaves, **given.keywords)
    monkeypatch.setattr(triton_fit, "DEVICES", ("cpu",))
    ran: list[str] = []
    with pytest.raises(Asked):
        RULES[rule].apply(**given.leaves, **given.keywords, ran=ran)
    assert ran == ["triton"]


@pytest.mark.parametrize("rule", problems.SERVED_BY_CHANNEL)
def test_refused_on_a_processor(rule):
    given = problems.tensors(Problem(rule, length=3)).copy(torch.float32)
    with pytest.raises(ValueError, match="on cpu, and Triton needs one of cuda, xpu; use 'torch'"):
        RULES[rule].apply(**given.leaves, **given.keywords, backend="triton")

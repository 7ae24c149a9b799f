"""The Triton kernels of the linear class: their tests under the interpreter, and when they are chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_fwp import ops
from hf_fwp.rules import linear_class

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("which", ["agree_with_the_recurrence", "not agree_with_the_recurrence"])
def test_under_the_interpreter(which):
    """In a process of its own: the interpreter would serve every later user of Triton in this one."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted.py", "-k", which)
    surroundings = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def given(**changes):
    q = torch.zeros(1, 3, 1, 4)
    return {"q": q, "k": q, "v": q, "beta": torch.zeros(1, 3, 1)} | changes


def test_refused_on_a_processor():
    with pytest.raises(ValueError, match=r"'triton' cannot run this: .* on cpu, and Triton needs one of cuda, xpu; use"):
        ops.delta_rule(**given(), backend="triton")


def test_refused_without_the_package(monkeypatch):
    monkeypatch.setattr(linear_class, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="package triton is not installed .pip install triton.; use 'torch'"):
        ops.delta_rule(**given(), backend="triton")


def chosen(monkeypatch, *, capability=(9, 0), **changes):
    """The backend for these tensors if the processor were a GPU."""
    monkeypatch.setattr(linear_class, "TRITON_DEVICES", ("cpu",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    call = linear_class.LinearClassCall(None, erase=True)
    return linear_class.choose_backend(call, *given(**changes).values())


def test_chosen_on_a_gpu_where_they_fit(monkeypatch):
    long, wide = torch.zeros(1, 3, 1, 300), torch.zeros(1, 3, 1, 4).double()
    assert chosen(monkeypatch) == "triton"
    assert chosen(monkeypatch, v=long) == "torch"
    assert chosen(monkeypatch, v=wide) == "torch"
    assert chosen(monkeypatch, **{name: x[:, :1] for name, x in given().items()}) == "step"
    monkeypatch.setattr(linear_class, "HAS_TRITON", False)
    assert chosen(monkeypatch) == "torch"


@pytest.mark.parametrize(("device", "capability", "old"), [("cuda:0", (7, 5), True), ("cuda:0", (8, 0), False)])
def test_gpus_without_bf16_are_left_to_pytorch(monkeypatch, device, capability, old):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert linear_class._too_old(0) is old
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not linear_class._too_old(0)

"""The Triton kernels of the linear class: their tests under the interpreter, and when they are chosen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_fwp import ops
from hf_fwp.rules import RULES, linear_class, triton_fit

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("which", ["agree_with_the_recurrence", "not agree_with_the_recurrence"])
def test_under_the_interpreter(which):
    """In a process of its own: the interpreter would serve every later user of Triton in this one."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    file = "tests/kernels/interpreted.py"
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", which)
    surroundings = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def given(**changes):
    q = torch.zeros(1, 3, 1, 4)
    return {"q": q, "k": q, "v": q, "beta": torch.zeros(1, 3, 1)} | changes


def test_refused_on_a_processor():
    with pytest.raises(ValueError, match="on cpu, and Triton needs one of cuda, xpu; use 'torch'"):
        ops.delta_rule(**given(), backend="triton")


def test_refused_without_the_package(monkeypatch):
    monkeypatch.setattr(triton_fit, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        ops.delta_rule(**given(), backend="triton")


def chosen(monkeypatch, **changes):
    """The backend for these tensors if the processor were a GPU."""
    for module in (triton_fit, linear_class):
        monkeypatch.setattr(module, "DEVICES", ("cpu",))
    call = linear_class.LinearClassCall(RULES["delta_net"].step, erase=True)
    return linear_class.choose_backend(call, *given(**changes).values())


def test_chosen_on_a_gpu_where_they_fit(monkeypatch):
    wide, half = torch.zeros(1, 3, 1, 300), torch.zeros(1, 3, 1, 200).bfloat16()
    large = torch.zeros(1, 3, 1, 256)
    assert chosen(monkeypatch) == "triton"
    assert chosen(monkeypatch, q=half, k=half, v=half) == "triton"
    assert chosen(monkeypatch, q=large, k=large, v=large) == "triton"
    assert chosen(monkeypatch, q=wide, k=wide, v=wide) == "torch"
    assert chosen(monkeypatch, v=half) == "triton"
    assert chosen(monkeypatch, v=wide.bfloat16()) == "torch"
    assert chosen(monkeypatch, v=torch.zeros(1, 3, 1, 4).double()) == "torch"
    assert chosen(monkeypatch, **{name: x[:, :1] for name, x in given().items()}) == "step"
    monkeypatch.setattr(triton_fit, "HAS_TRITON", False)
    assert chosen(monkeypatch) == "torch"


def test_falling_back_on_a_gpu_is_said_once_for_each_reason(monkeypatch, caplog):
    triton_fit.SAID.clear()
    wide = torch.zeros(1, 3, 1, 300)
    for _ in range(2):
        chosen(monkeypatch)
        chosen(monkeypatch, q=wide, k=wide, v=wide)
        chosen(monkeypatch, v=torch.zeros(1, 3, 1, 4).double())
        chosen(monkeypatch, **{name: x[:, :1] for name, x in given().items()})
    size, dtype = (record.getMessage() for record in caplog.records)
    assert size.startswith("heads have size 300, and in 32 bits the kernels go up to 256: this call runs in PyTorch")
    assert "a tensor is float64" in dtype


def test_falling_back_is_not_said_on_a_processor_or_where_it_was_asked_for(monkeypatch, caplog):
    triton_fit.SAID.clear()
    ops.delta_rule(**given())
    monkeypatch.setattr(triton_fit, "HAS_TRITON", False)
    chosen_call = linear_class.LinearClassCall(RULES["delta_net"].step, erase=True, backend="torch")
    monkeypatch.setattr(linear_class, "DEVICES", ("cpu",))
    assert linear_class.choose_backend(chosen_call, *given().values()) == "torch"
    assert not caplog.records


def test_a_compiled_graph_falls_back_without_a_break(monkeypatch, caplog):
    triton_fit.SAID.clear()
    monkeypatch.setattr(triton_fit, "HAS_TRITON", False)
    monkeypatch.setattr(linear_class, "DEVICES", ("cpu",))
    compiled = torch.compile(lambda q: ops.delta_rule(**given(q=q))[0], fullgraph=True, backend="eager")
    assert not compiled(torch.zeros(1, 3, 1, 4)).any()
    assert "triton is not installed" in caplog.text


class OnGpu:
    """What a tensor on a GPU says of itself."""

    device = torch.device("cuda:0")
    dtype, shape = torch.float32, (1, 3, 1, 60)

    def element_size(self):
        return 4


@pytest.mark.parametrize(("memory", "fits"), [(227 * 1024, True), (99 * 1024, True), (64 * 1024, False)])
def test_heads_that_need_more_memory_than_the_gpu_has_are_left_to_pytorch(monkeypatch, memory, fits):
    monkeypatch.setattr(triton_fit, "_too_old", lambda _: False)
    monkeypatch.setattr(triton_fit, "_shared_memory", lambda _: memory)
    reason = triton_fit.why_not_triton(OnGpu(), OnGpu(), OnGpu())
    assert reason is None if fits else "need 98304 bytes of shared memory, cuda:0 has 65536" in reason


@pytest.mark.parametrize(("capability", "old"), [((7, 5), True), ((8, 0), False)])
def test_gpus_without_bf16_are_left_to_pytorch(monkeypatch, capability, old):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert triton_fit._too_old(0) is old
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not triton_fit._too_old(0)

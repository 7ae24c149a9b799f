"""The kernels of the sequential rules: tested under the interpreter, compiled for an H100, and when they are chosen."""

import os
import subprocess
import sys
from pathlib import Path

import operators as problems
import pytest
import torch
from kernels.test_compilation import Recorded, compiled, spilled, version
from operators import WALKS_WITH, Problem

from hf_fwp.rules import RULES, sequential, triton_fit

ROOT = Path(__file__).parent.parent.parent
OWN = [name for name, rule in RULES.items() if rule.own]


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(which):
    """In a process of its own: the interpreter would serve every later user of Triton in this one."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    file = "tests/kernels/walk_interpreted.py"
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-m", which)
    surroundings = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# rule, number of its options, size of a head, bytes a thread may spill: as compiled today, and a little
COMPILED = [
    ("recurrent_delta_net", 0, 64, 0),
    *(pytest.param(rule, number, 64, allowed, marks=pytest.mark.slow) for rule, number, allowed in (
        ("delta_rnn", 0, 50), ("delta_rnn", 1, 50), ("delta_lstm", 0, 0), ("delta_lstm", 1, 0), ("delta_lstm", 3, 0),
        ("srwm", 0, 0), ("self_modifying_delta", 0, 500), ("fwp_1991", 1, 0), ("fwp_1991", 2, 0),
        ("fwp_1993", 0, 0), ("fwp_1993", 2, 0), ("ba_fast_weights", 0, 0), ("ba_fast_weights", 1, 0),
        ("continuous_fwp", 2, 0), ("continuous_fwp", 3, 0), ("fast_weight_memory", 0, 1000),
        ("fast_weight_memory", 1, 1600),
    )),
    *(pytest.param(rule, WALKS_WITH.get(rule, 1), 128, allowed, marks=pytest.mark.slow) for rule, allowed in (
        ("recurrent_delta_net", 400), ("delta_rnn", 100), ("delta_lstm", 2500), ("srwm", 1500), ("fwp_1991", 0),
        ("fwp_1993", 2500), ("self_modifying_delta", 3500), ("ba_fast_weights", 200), ("continuous_fwp", 0),
        ("fast_weight_memory", 1600),
    )),
]  # fmt: skip


# where another version of Triton leaves more than 3.7
OTHERWISE = {
    ("3.6", "self_modifying_delta", 64): 1100,
    ("3.6", "recurrent_delta_net", 128): 1200,
    ("3.6", "delta_rnn", 128): 150,
    ("3.6", "ba_fast_weights", 128): 300,
    ("3.6", "continuous_fwp", 128): 16,
    **{(version, "fast_weight_memory", size): 2400 for version in ("3.8", "3.9") for size in (64, 128)},
    **{("3.9", "fwp_1991", size): 16 for size in (64, 128)},
    ("3.9", "delta_rnn", 128): 150,
}


@pytest.mark.parametrize(("rule", "number", "size", "allowed"), COMPILED)
def test_compiles_for_an_h100(rule, number, size, allowed, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton", reason="the package triton is not installed")
    if not Path(triton.__file__).with_name("backends").joinpath("nvidia", "bin", "ptxas").exists():
        pytest.skip("this build of triton has no ptxas")
    allowed = OTHERWISE.get((version(), rule, size), allowed)
    for kernel, arguments, keywords in launches(rule, number, size, monkeypatch):
        found = compiled(kernel, arguments, keywords)
        spill = spilled(found.asm["cubin"], tmp_path)
        said = f"{kernel.__name__}: {found.metadata.shared} bytes of shared memory, {spill} bytes spilled per thread"
        assert found.metadata.shared <= 16 * 1024, said
        assert spill <= allowed, said


def launches(rule, number, size, monkeypatch):
    """What a forward and a backward of a rule's walk launch; nothing runs, so the outputs are not looked at."""
    from hf_fwp.kernels import walk

    found = []
    for name in ("walk_forward", "walk_backward"):
        monkeypatch.setattr(walk, name, Recorded(getattr(walk, name), found))
    monkeypatch.setattr(triton_fit, "_interpreted", lambda: True)
    sizes = tuple(min(size, largest) for largest in RULES[rule].apply.args[0].largest)
    settings = {"dtype": torch.float32, "length": 20, "layout": "padded", "heads": (1, 1, 1), "sizes": sizes}
    given = problems.tensors(Problem(rule, option=number, **settings)).copy(torch.float32)
    monkeypatch.setattr(sequential, "why_not_triton", lambda *tensors, asked: "the walk alone is compiled")
    out, _ = RULES[rule].apply(**given.leaves, states=given.states, backend="triton", **given.keywords)
    torch.nan_to_num(out).sum().backward()
    names = [kernel.__name__ for kernel, *_ in found]
    assert names == ["walk_forward"] * (len(names) // 2) + ["walk_backward"] * (len(names) // 2)
    assert names
    return found


@pytest.mark.parametrize("rule", OWN)
def test_asking_for_kernels_on_a_processor_is_refused(rule):
    given = problems.tensors(Problem(rule, length=2, heads=(1, 1, 1), sizes=(4, 4))).copy(torch.float32)
    with pytest.raises(ValueError, match=r"'triton' cannot run this: .*on cpu, and Triton needs one of cuda"):
        RULES[rule].apply(**given.leaves, backend="triton", **given.keywords)


@pytest.mark.parametrize("rule", OWN)
def test_on_a_gpu_the_kernels_are_chosen_where_they_fit(rule, monkeypatch):
    monkeypatch.setattr(triton_fit, "DEVICES", ("cpu",))
    form = RULES[rule].apply.args[0]
    x, double = torch.zeros(1), torch.zeros(1).double()
    keys, values = form.largest
    assert form.why_not_triton((keys, values), x) is None
    assert form.why_not_triton((keys + 1, values), x)
    assert form.why_not_triton((keys, values + 1), x)
    assert form.why_not_triton((16, 16), x, double)
    monkeypatch.setattr(triton_fit, "HAS_TRITON", False)
    assert form.why_not_triton((16, 16), x)

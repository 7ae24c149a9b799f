"""The decode kernel on a machine without a GPU: interpreted, in a process of its own, and compiled for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is published for Linux only")
HERE = Path(__file__).parent

SHAPES = {
    "bf16": {"K": 128, "V": 128, "dtype": "bf16", "gates": True},
    "odd sizes": {"K": 96, "V": 80, "dtype": "fp16", "gates": True},
    "sum rule": {"K": 16, "V": 256, "dtype": "fp32", "gates": False},
    "large": {"K": 256, "V": 256, "dtype": "bf16", "gates": True},
    "channels": {"K": 128, "V": 128, "dtype": "bf16", "gates": True, "GK": 128, "ALONG": 2},
}


def test_under_the_interpreter():
    # Triton decides at its import; the other tests of this process want it as it is.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "decode_interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", SHAPES)
def test_compiles_for_hopper(name):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_fwp.kernels.decode import WARPS, _decode_kernel, blocks

    shape = SHAPES[name]
    K, V, gates = shape["K"], shape["V"], shape["gates"]
    block_k, block_v = blocks(K, V)
    numbers = {"HEADS": 2, "VALUE_HEADS": 4, "QUERIES": 2, "K": K, "V": V, "BLOCK_K": block_k, "BLOCK_V": block_v}
    flags = dict.fromkeys(("ERASE", "L2NORM", "HAS_BETA", "HAS_MASK"), gates)
    numbers |= {"GK": shape.get("GK", int(gates)), "ALONG": shape.get("ALONG", 0)}
    constants = numbers | flags | {"SHARE": not gates, "HAS_STATE": gates}
    pointers = dict.fromkeys(("q", "k", "v", "out"), f"*{shape['dtype']}")
    pointers |= dict.fromkeys(("beta", "g", "along", "before", "after"), "*fp32") | {"mask": "*i1", "scale": "fp32"}
    signature = {x: pointers.get(x, "constexpr") for x in _decode_kernel.arg_names}
    source = ASTSource(_decode_kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    assert ".target sm_90" in built.asm["ptx"]
    assert built.metadata.shared <= 48 * 1024


def test_the_kernel_is_for_accelerators_alone():
    from hf_fwp.rules.linear_class import has_decode_kernel

    assert [has_decode_kernel(x) for x in ("cpu", "mps", "meta", "cuda")] == [False, False, False, True]

"""Every kernel of the linear class compiles for an H100: no GPU is needed for that. Its memory fits one."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from hf_fwp.rules.triton_fit import SHARED_MEMORY

SMALL = 99 * 1024  # bytes of shared memory that one program may have on a small GPU; an H100 gives 227 KiB
# what a forward and a backward launch, and when
ORDER = (
    ("invert_chunks", lambda erase, segmented: erase),
    ("map_segments", lambda erase, segmented: segmented),
    ("carry", lambda erase, segmented: segmented),
    ("scan_forward", lambda erase, segmented: True),
    ("scan_backward", lambda erase, segmented: segmented),
    ("carry", lambda erase, segmented: segmented),
    ("scan_backward", lambda erase, segmented: True),
    ("gradients", lambda erase, segmented: True),
)
KERNELS = {name for name, _ in ORDER}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.bool: "*i1", torch.int64: "*i64"}


class Recorded:
    """Stands for a kernel and notes what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    @property
    def arg_names(self):
        return self.kernel.arg_names

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: self.launches.append((self.kernel, arguments, keywords))


def linear_class_launches():
    from hf_fwp.kernels import linear_class_launches

    return linear_class_launches


@pytest.fixture
def module(monkeypatch):
    triton = pytest.importorskip("triton", reason="the package triton is not installed")
    if not Path(triton.__file__).with_name("backends").joinpath("nvidia", "bin", "ptxas").exists():
        pytest.skip("this build of triton has no ptxas")
    from hf_fwp.kernels import linear_class

    if linear_class.interpreted():
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    return linear_class


def launches(
    module,
    monkeypatch,
    dtype,
    size,
    *,
    heads=(2, 2, 2),
    packed=False,
    padded=False,
    erase=True,
    raw=False,
    segmented=False,
):
    """What a forward and a backward launch; no kernel runs."""
    found = []
    for name in KERNELS:
        monkeypatch.setattr(module, name, Recorded(getattr(module, name), found))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(linear_class_launches(), "PROGRAMS", 0)
    monkeypatch.setattr(linear_class_launches(), "segment_chunks", lambda *_: int(segmented))
    q, k, v = (torch.zeros(1, 128, n, size, dtype=dtype) for n in (heads[2], heads[0], heads[1]))
    beta, g = torch.zeros(1, 128, heads[1]) if erase else None, torch.zeros(1, 128, heads[1])
    rates = (torch.zeros(heads[1]), torch.zeros(heads[1])) if raw else (None, None)
    mask = torch.ones(1, 128).bool() if padded else None
    bounds = torch.tensor([0, 60, 128]) if packed else None
    gates, settings = (beta, g, *rates), (1.0, 2.0 * raw, erase, True)
    out, final, *kept = module.linear_class_forward(q, k, v, *gates, None, mask, bounds, *settings, True)
    module.linear_class_backward(out, final, q, k, v, *gates, mask, bounds, *kept, *settings)
    assert [kernel.__name__ for kernel, *_ in found] == [name for name, needs in ORDER if needs(erase, segmented)]
    return found


def compiled(kernel, arguments, keywords):
    import triton
    from triton.backends.compiler import GPUTarget

    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages")}
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    signature, constants, aligned = {}, {}, {}
    for i, (parameter, name) in enumerate(zip(kernel.params, kernel.arg_names, strict=True)):
        x = given[name]
        if parameter.is_constexpr or x is None:
            signature[name], constants[i,] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name], aligned[i,] = TYPES[x.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32"
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled(binary: bytes, folder: Path) -> int:
    """Bytes per thread that did not fit the registers."""
    import triton

    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    tool = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", shown)[1])


# type, size of a head, bytes a thread may spill: what the table of launches leaves, and a little
CASES = [
    (torch.bfloat16, 128, 300),
    pytest.param(torch.bfloat16, 64, 100, marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, 256, 1300, marks=pytest.mark.slow),
    pytest.param(torch.float32, 64, 1300, marks=pytest.mark.slow),
    pytest.param(torch.float32, 128, 2500, marks=pytest.mark.slow),
    pytest.param(torch.float32, 256, 4000, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dtype", "size", "allowed"), CASES)
def test_compiles_for_an_h100(module, monkeypatch, tmp_path, dtype, size, allowed):
    for kernel, arguments, keywords in launches(module, monkeypatch, dtype, size, segmented=True):
        found = compiled(kernel, arguments, keywords)
        spill = spilled(found.asm["cubin"], tmp_path)
        said = f"{kernel.__name__}: {found.metadata.shared} bytes of shared memory, {spill} bytes spilled per thread"
        assert found.metadata.shared <= SHARED_MEMORY[dtype.itemsize, size] <= SMALL, said
        assert spill <= allowed, said


@pytest.mark.parametrize("erase", [False, True])
def test_compiles_packed_padded_and_for_several_queries(module, monkeypatch, erase):
    """The delta rules with raw gates and in segments besides."""
    options = {"heads": (1, 2, 4), "packed": True, "padded": True, "erase": erase, "raw": erase, "segmented": erase}
    for case in launches(module, monkeypatch, torch.bfloat16, 24, **options):
        compiled(*case)

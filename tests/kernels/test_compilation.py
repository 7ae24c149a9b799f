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
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TYPES |= {torch.bool: "*i1", torch.int64: "*i64"}
WORDS = {int: "i32", float: "fp32"}


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


H100, MI300 = ("cuda", 90, 32), ("hip", "gfx942", 64)


def compiled(kernel, arguments, keywords, target=H100):
    import triton
    from triton.backends.compiler import GPUTarget

    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    signature, constants, aligned = {}, {}, {}
    for i, (parameter, name) in enumerate(zip(kernel.params, kernel.arg_names, strict=True)):
        x = given[name]
        if parameter.is_constexpr or x is None:
            signature[name], constants[i,] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name], aligned[i,] = TYPES[x.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = WORDS[type(x)] if not isinstance(x, int) or x < 1 << 31 else "i64"
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget(*target), options=options)


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
    (torch.bfloat16, 128, 550),
    pytest.param(torch.bfloat16, 64, 110, marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, 256, 1400, marks=pytest.mark.slow),
    pytest.param(torch.float32, 64, 1300, marks=pytest.mark.slow),
    pytest.param(torch.float32, 128, 2500, marks=pytest.mark.slow),
    pytest.param(torch.float32, 256, 4000, marks=pytest.mark.slow),
]
# where another version of Triton leaves more than 3.7 and 3.8
OTHERWISE = {
    ("3.6", torch.bfloat16, 64): 600,
    ("3.6", "wide"): 200,
    ("3.9", torch.bfloat16, 256): 1750,
    ("3.9", "wide"): 170,
}


def version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@pytest.mark.parametrize(("dtype", "size", "allowed"), CASES)
def test_compiles_for_an_h100(module, monkeypatch, tmp_path, dtype, size, allowed):
    allowed = OTHERWISE.get((version(), dtype, size), allowed)
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


def companion_launches(monkeypatch, dtype, size=128, silu=True, packed=True):
    """What a forward and a backward of the short convolution and of the gated norm launch."""
    from hf_fwp.kernels import convolution, gated_norm

    found = []
    for module, names in (
        (convolution, ("convolution_forward", "convolution_backward")),
        (gated_norm, ("gated_norm_forward", "gated_norm_backward")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Recorded(getattr(module, name), found))
    x, weight = torch.zeros(2, 100, 384, dtype=dtype, requires_grad=True), torch.zeros(384, 4, dtype=dtype)
    convolution.short_convolution(x, weight, torch.zeros(1, 100).long() if packed else None, silu).sum().backward()
    reads = torch.zeros(2, 100, 3, size, dtype=dtype, requires_grad=True)
    kind = "silu" if silu else "sigmoid2"
    gated_norm.gated_norm(reads, reads, torch.zeros(size, dtype=dtype), 1e-6, kind).sum().backward()
    assert [kernel.__name__ for kernel, *_ in found] == [
        "convolution_forward",
        "convolution_backward",
        "gated_norm_forward",
        "gated_norm_backward",
    ]
    return found


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(("dtype", "silu"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_the_companions_compile_for_an_h100(monkeypatch, tmp_path, dtype, silu):
    for kernel, arguments, keywords in companion_launches(monkeypatch, dtype, silu=silu, packed=silu):
        found = compiled(kernel, arguments, keywords)
        assert found.metadata.shared <= 48 * 1024
        assert spilled(found.asm["cubin"], tmp_path) == 0, kernel.__name__


# options of a mixer, bytes a thread may spill
MIXERS = {
    "modern": ({"rule": "gated_delta_net", "head_dim": 128}, 0),
    "wide": ({"rule": "gated_delta_net", "head_dim": 128, "value_head_dim": 256, "num_key_value_heads": 1}, 150),
    "converted": (
        {
            "rule": "delta_net",
            "head_dim": 64,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "conv_size": 0,
            "feature_map": "identity",
            "output_gate": "head_sigmoid",
            "output_norm": False,
            "head_norm": True,
            "value_skip": 1,
            "state_bias": True,
            "time_scales": 2,
            "rope_heads": (True, False) * 32,
        },
        0,
    ),
}


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", MIXERS)
def test_the_whole_mixer_compiles_for_an_h100(monkeypatch, tmp_path, name):
    from hf_fwp import FastWeightLayer, MixerOptions, decoding
    from hf_fwp.cache import MixerInputs
    from hf_fwp.kernels import mixer_step

    options, allowed = MIXERS[name]
    allowed = OTHERWISE.get((version(), name), allowed)
    options = MixerOptions(**{"hidden_size": 64, "num_attention_heads": 2, **options})
    layer = FastWeightLayer(options, 0).bfloat16()
    found: list = []
    monkeypatch.setattr(mixer_step, "mixer_step_kernel", Recorded(mixer_step.mixer_step_kernel, found))
    rotary = torch.zeros(2, 2, 1, 64).bfloat16().unbind(0) if any(options.rotates) else None
    inputs = MixerInputs(torch.zeros(2, 1, 64).bfloat16(), torch.ones(2, 1).bool(), rotary)
    with torch.no_grad():
        states = layer._mix(inputs, {})[1]
        decoding.decode(layer, inputs, states)
    ((kernel, arguments, keywords),) = found
    built = compiled(kernel, arguments, keywords)
    assert ".target sm_90" in built.asm["ptx"]
    assert built.metadata.shared <= 48 * 1024
    assert spilled(built.asm["cubin"], tmp_path) <= allowed

"""Every kernel of the channel decay compiles for an H100: no GPU is needed for that. Its memory fits one."""

import pytest
import torch
from test_compilation import (
    H100,
    MI300,
    SMALL,
    Recorded,
    compiled,
    linear_class_launches,
    module,  # noqa: F401 (a fixture)
    spilled,
    version,
)

SHARED = 64 * 1024  # bytes of shared memory: an AMD GPU has no more, NVIDIA's have 99 KiB or more
KERNELS = ("invert_chunks", "scan_forward", "scan_backward", "gradients", "scan_across", "map_segments", "carry")


@pytest.fixture
def found(module, monkeypatch):  # noqa: F811
    """The launches so far; no kernel runs."""
    from hf_fwp.kernels import channel_decay

    launches = []
    for name in KERNELS:
        monkeypatch.setattr(channel_decay, name, Recorded(getattr(channel_decay, name), launches))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(linear_class_launches(), "PROGRAMS", 0)
    return launches


def run(
    dtype,
    size,
    *,
    heads=(2, 2, 2),
    packed=False,
    padded=False,
    erase=False,
    channels=None,
    across=False,
    raw=False,
):
    """A forward and a backward; with unit vectors where the kernels make them. `raw` gates are computed in them."""
    from hf_fwp.kernels.channel_decay import Form, channel_decay_backward, channel_decay_forward

    q, k, v = (torch.zeros(1, 128, n, size, dtype=dtype) for n in (heads[2], heads[0], heads[1]))
    e = torch.zeros(1, 128, heads[1], size, dtype=dtype) if erase else None
    beta, g = torch.zeros(1, 128, heads[1]), torch.zeros(1, 128, heads[1], channels or size)
    mask, bounds = torch.ones(1, 128).bool() if padded else None, torch.tensor([0, 60, 128]) if packed else None
    rates, reach = (torch.zeros(heads[1]), torch.zeros(heads[1] * size)) if raw else (None, None), float(raw)
    given = (q, k, v, v if raw else e, v if raw else None, beta, g, *rates)
    form = Form(1.0, reach, reach, reach, 0.0, raw, not erase and not across, across)
    out, final, *kept = channel_decay_forward(*given, None, mask, bounds, *form, True)
    channel_decay_backward(out, final, out, *given, mask, bounds, *kept, *form)


# type, size of a head, bytes a thread may spill: what the table of launches leaves, and a little
CASES = [
    (torch.bfloat16, 128, 300),
    pytest.param(torch.bfloat16, 64, 550, marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, 256, 900, marks=pytest.mark.slow),
    pytest.param(torch.float32, 64, 600, marks=pytest.mark.slow),
    pytest.param(torch.float32, 128, 500, marks=pytest.mark.slow),
    pytest.param(torch.float32, 256, 1700, marks=pytest.mark.slow),
]
# where another version of Triton leaves more than 3.6 to 3.8
OTHERWISE = {("3.9", torch.bfloat16, 64): 650}


@pytest.mark.parametrize(("dtype", "size", "allowed"), CASES)
def test_compiles_for_an_h100(found, tmp_path, dtype, size, allowed):
    allowed = OTHERWISE.get((version(), dtype, size), allowed)
    run(dtype, size)
    assert [kernel.__name__ for kernel, *_ in found] == list(KERNELS[:4])
    for kernel, arguments, keywords in found:
        built = compiled(kernel, arguments, keywords)
        spill = spilled(built.asm["cubin"], tmp_path)
        said = f"{kernel.__name__}: {built.metadata.shared} bytes of shared memory, {spill} bytes spilled per thread"
        assert built.metadata.shared <= SHARED, said
        assert spill <= allowed, said


@pytest.mark.slow
@pytest.mark.parametrize("channels", [None, 1])
def test_compiles_packed_padded_for_several_queries_and_an_erase_vector(found, channels):
    run(torch.bfloat16, 24, heads=(1, 2, 4), packed=True, padded=True, erase=True, channels=channels)
    for case in found:
        compiled(*case)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "allowed"), [(H100, SMALL), (MI300, SHARED)], ids=["H100", "MI300"])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_across_compiles(found, monkeypatch, dtype, size, target, allowed):
    """A scan's operands of all keys are split in two by NVIDIA's tf32x3: they take more than an AMD GPU has."""
    monkeypatch.setattr(torch.version, "cuda", "13.0" if target == H100 else None)
    run(dtype, size, across=True)
    assert [kernel.__name__ for kernel, *_ in found] == ["invert_chunks", "scan_across", *KERNELS[2:4]]
    for kernel, arguments, keywords in found:
        shared = compiled(kernel, arguments, keywords, target).metadata.shared
        assert shared <= allowed, f"{kernel.__name__}: {shared} bytes of shared memory"


@pytest.mark.slow
@pytest.mark.parametrize("across", [False, True])
def test_gates_and_segments_compile(found, monkeypatch, across):
    monkeypatch.setattr(linear_class_launches(), "segment_chunks", lambda *_: 1)
    run(torch.bfloat16, 24, heads=(1, 2, 2), packed=True, padded=True, across=across, raw=not across)
    scans = ("scan_across" if across else "scan_forward", "scan_backward", "carry", "scan_backward", "gradients")
    assert [kernel.__name__ for kernel, *_ in found] == ["invert_chunks", "map_segments", "carry", *scans]
    for case in found:
        compiled(*case)

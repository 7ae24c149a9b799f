"""Whether the Triton kernels (hf_fwp.kernels) can serve a call; answered without importing triton."""

import importlib.util
import logging

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
WITHOUT_TRITON = "the package triton is not installed (pip install triton)"
DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda

# Shared memory in bytes that the hungriest kernel takes, by bytes per number and padded key size, as compiled for sm_90
# (tests/kernels/test_compilation.py). All of it fits the 99 KiB of a small NVIDIA GPU; compiled
# for gfx942, the 64 KiB of an AMD GPU.
SHARED_MEMORY = {
    (2, 64): 66048,
    (2, 128): 78336,
    (2, 256): 82176,
    (4, 64): 98304,
    (4, 128): 49152,
    (4, 256): 49152,
}


def why_not_triton(*tensors: Tensor | None, asked: bool = False) -> str | None:
    """The reason why the kernels cannot serve these tensors (q, k and v first), or None.

    The processor is served under the interpreter of Triton only, and only when `asked`.
    """
    given = [x for x in tensors if x is not None]
    return why_no_kernel(*given, asked=asked) or _too_large(*given[:3])


def why_no_kernel(*given: Tensor, asked: bool = False) -> str | None:
    """The reason why no kernel at all can run on these tensors, or None."""
    device = given[0].device
    if not HAS_TRITON:
        return WITHOUT_TRITON
    if device.type not in DEVICES and not (asked and device.type == "cpu" and _interpreted()):
        return f"the tensors are on {device}, and Triton needs one of {', '.join(DEVICES)}"
    if device.type == "cuda" and _too_old(device.index or 0):
        return f"{device} is older than compute capability 8.0"
    if any(x.device != device for x in given):
        return f"the tensors are on several devices: {', '.join(sorted({str(x.device) for x in given}))}"
    if any(x.dtype == torch.float64 for x in given):
        return "the kernels compute in float32, but a tensor is float64"
    return None


def _too_large(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    word = q.element_size() if q.dtype == k.dtype == v.dtype else 4  # mixed types are multiplied in float32
    size, largest = max(k.shape[-1], v.shape[-1]), max(padded for width, padded in SHARED_MEMORY if width == word)
    if size > largest:
        return f"heads have size {size}, and in {8 * word} bits the kernels go up to {largest}"
    if q.device.type != "cuda" or torch.version.hip is not None:
        return None
    padded = min(padded for width, padded in SHARED_MEMORY if width == word and padded >= size)
    needed = SHARED_MEMORY[word, padded]
    if (found := _shared_memory(q.device.index or 0)) < needed:
        return f"heads of size {size} in {8 * word} bits need {needed} bytes of shared memory, {q.device} has {found}"
    return None


SAID: set[str] = set()


@torch.compiler.assume_constant_result
def say_once(message: str) -> None:
    """Log a warning, the first time that it is given."""
    if message not in SAID:
        SAID.add(message)
        logging.getLogger(__name__).warning(message)


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    from ..kernels.linear_class import interpreted

    return interpreted()


@torch.compiler.assume_constant_result
def _too_old(index: int) -> bool:
    """Whether an NVIDIA GPU lacks bf16 in its tensor cores."""
    return torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0)


@torch.compiler.assume_constant_result
def _shared_memory(index: int) -> int:
    """Bytes that one program may have."""
    properties = torch.cuda.get_device_properties(index)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)

"""What stands beside a rule in a mixer: the short convolution before it and the gated norm after it.

    z_t = sum_j w_j x_{t-j},  then SiLU where the mixer's features are SiLU               w [C, 1, size]
    y   = gate · RMSNorm(o)

On a GPU each is one pass forward and one backward (kernels/convolution.py, kernels/gated_norm.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .packing import Window
from .rules import linear_class

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "sigmoid2": lambda x: 2 * torch.sigmoid(x),
    "head_sigmoid": torch.sigmoid,
    "low_rank_sigmoid": torch.sigmoid,
    "low_rank_sigmoid_bias": torch.sigmoid,
}
# The gates that the kernel of the gated norm knows, and its names for them.
KERNEL_GATES = {
    "silu": "silu",
    "sigmoid": "sigmoid",
    "sigmoid2": "sigmoid2",
    "low_rank_sigmoid": "sigmoid",
    "low_rank_sigmoid_bias": "sigmoid",
}
LARGEST_ROW = 4096  # numbers that one program of that kernel holds


def has_kernels(*tensors: Tensor) -> bool:
    """Whether Triton can serve these tensors."""
    if not linear_class.has_decode_kernel(tensors[0].device.type):
        return False
    return all(x.device == tensors[0].device and x.dtype != torch.float64 for x in tensors)


class ShortConvolution(nn.Conv1d):
    """Depthwise causal convolution over the real tokens of each sequence, followed by SiLU with `silu`."""

    def __init__(self, channels: int, size: int, silu: bool = False) -> None:
        super().__init__(channels, channels, size, groups=channels, bias=False)
        self.silu = silu

    def init_weights(self) -> None:
        """Uniform in 1 / sqrt(size), so that the output has about the size of the input."""
        bound = self.kernel_size[0] ** -0.5
        init.uniform_(self.weight, -bound, bound)

    def forward(  # type: ignore[override]
        self, x_BTC: Tensor, window: Window, history: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(y [B, T, C], the last size - 1 real inputs), over `history`, the inputs that an earlier call returned."""
        size = self.kernel_size[0]
        if has_kernels(x_BTC, self.weight):
            return self._by_kernel(x_BTC, window, history), window.last(x_BTC, size, history)
        if history is not None and x_BTC.shape[1] == 1 and window.mask_BT is None:
            longer_BTC = torch.cat([history, x_BTC], dim=1)
            y_BTC, kept = (longer_BTC * self.weight[:, 0].mT).sum(1, keepdim=True), longer_BTC[:, 1:]
        else:
            taps, kept = window.taps(x_BTC, size, history)
            y_BTC = taps[0] * self.weight[:, 0, -1]
            for j, tap_BTC in enumerate(taps[1:], start=1):
                y_BTC = torch.addcmul(y_BTC, tap_BTC, self.weight[:, 0, -1 - j])
        return F.silu(y_BTC) if self.silu else y_BTC, kept

    def _by_kernel(self, x_BTC: Tensor, window: Window, history: Tensor | None) -> Tensor:
        from .kernels.convolution import short_convolution

        length, weight_CJ = x_BTC.shape[1], self.weight[:, 0]
        if history is None:
            offsets_BT = None if window.offsets_BT1 is None else window.offsets_BT1[..., 0]
            return short_convolution(x_BTC, weight_CJ, offsets_BT, self.silu)
        longer_BTC = torch.cat([history, x_BTC], dim=1)
        return short_convolution(longer_BTC, weight_CJ, None, self.silu)[:, -length:]


def gate_projection(kind: str, hidden: int, *, reads: int, value_size: int) -> nn.Module:
    """What gives the gate of `reads` reads of size `value_size`; `kind` a name of GATES."""
    if kind == "head_sigmoid":
        return nn.Linear(hidden, reads)
    if kind.startswith("low_rank_sigmoid"):  # Kimi Linear 2025
        up = nn.Linear(value_size, reads * value_size, bias=kind.endswith("bias"))
        return nn.Sequential(nn.Linear(hidden, value_size, bias=False), up)
    return nn.Linear(hidden, reads * value_size, bias=False)


def gated(reads_BTRV: Tensor, norm: nn.RMSNorm | None, gate: Tensor | None, kind: str) -> Tensor:
    """gate · norm(reads) as [B, T, R * V]; `gate` is what its projection gives, `kind` a name of GATES."""
    if norm is not None and gate is not None and _kernel_fits(reads_BTRV, norm, gate, kind):
        from .kernels.gated_norm import gated_norm

        eps = torch.finfo(reads_BTRV.dtype).eps if norm.eps is None else norm.eps
        return gated_norm(reads_BTRV, gate.view_as(reads_BTRV), norm.weight, eps, KERNEL_GATES[kind]).flatten(2)
    if norm is not None:
        reads_BTRV = norm(reads_BTRV)
    if gate is None:
        return reads_BTRV.flatten(2)
    opened = GATES[kind](gate)
    if kind == "head_sigmoid":
        return (reads_BTRV * opened[..., None]).flatten(2)
    return reads_BTRV.flatten(2) * opened


def _kernel_fits(reads_BTRV: Tensor, norm: nn.RMSNorm, gate: Tensor, kind: str) -> bool:
    small = reads_BTRV.shape[-1] <= LARGEST_ROW
    return small and kind in KERNEL_GATES and type(norm) is nn.RMSNorm and has_kernels(reads_BTRV, gate, norm.weight)

"""RMSNorm of the reads times a gate, one pass over them in each direction.

n = x / rms(x),  rms(x) = sqrt(mean x² + ε);   y = w n a(u)
a(u) = u sigmoid(u), sigmoid(u) or 2 sigmoid(u)                           du = dy w n a'(u);   dw = sum dy n a(u)
dx = (h - n mean(h n)) / rms(x),  h = dy w a(u)
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096  # of a program's tile: 32 registers of each of 128 threads
ROUNDS = 16  # tiles of a program in the backward: one share of the weight's gradient for all of them


@triton.jit
def opened(u, GATE: tl.constexpr):
    """a(u) and a'(u)."""
    s = tl.sigmoid(u)
    slope = s * (1.0 - s)
    if GATE == "silu":
        return u * s, s + u * slope
    if GATE == "sigmoid2":
        return 2.0 * s, 2.0 * slope
    return s, slope


@triton.jit
def gated_norm_forward(
    x, u, w, y, count, eps,
    V: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_V)
    here = (rows < count)[:, None] & (columns < V)[None, :]
    at = rows[:, None] * V + columns[None, :]
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    gate, _ = opened(tl.load(u + at, mask=here, other=0.0).to(tl.float32), GATE)
    weight = tl.load(w + columns, mask=columns < V, other=0.0).to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 1) / V + eps)[:, None]
    tl.store(y + at, (normed * weight[None, :] * gate).to(y.dtype.element_ty), mask=here)


@triton.jit
def gated_norm_backward(
    x, u, w, d_y, d_x, d_u, d_w, count, eps,
    V: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program (ROUNDS tiles of rows); d_w [programs, V] gets its share of the gradient."""
    columns = tl.arange(0, BLOCK_V)
    weight = tl.load(w + columns, mask=columns < V, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for i in range(ROUNDS):
        rows = (tl.program_id(0).to(tl.int64) * ROUNDS + i) * ROWS + tl.arange(0, ROWS)
        here = (rows < count)[:, None] & (columns < V)[None, :]
        at = rows[:, None] * V + columns[None, :]
        value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        gate, slope = opened(tl.load(u + at, mask=here, other=0.0).to(tl.float32), GATE)
        outer = tl.load(d_y + at, mask=here, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 1) / V + eps)[:, None]
        normed = value * inverse
        inner = outer * weight[None, :] * gate
        d_value = (inner - normed * (tl.sum(inner * normed, 1) / V)[:, None]) * inverse
        tl.store(d_x + at, d_value.to(d_x.dtype.element_ty), mask=here)
        tl.store(d_u + at, (outer * weight[None, :] * normed * slope).to(d_u.dtype.element_ty), mask=here)
        total += tl.sum(outer * normed * gate, 0)
    tl.store(d_w + tl.program_id(0) * V + columns, total, mask=columns < V)


@torch.library.custom_op("hf_fwp::gated_norm", mutates_args=())
def gated_norm(x: Tensor, u: Tensor, weight: Tensor, eps: float, gate: str) -> Tensor:
    """y, of the shape and type of x [.., V]; u has the same shape, weight [V]; `gate` is silu, sigmoid or sigmoid2."""
    y = x.new_empty(x.shape)
    rows, block_v = tile(x.shape[-1])
    _launch(gated_norm_forward, rows, (x, u, weight, y), eps, V=x.shape[-1], GATE=gate, ROWS=rows, BLOCK_V=block_v)
    return y


@gated_norm.register_fake
def _(x, u, weight, eps, gate):
    return x.new_empty(x.shape)


@torch.library.custom_op("hf_fwp::gated_norm_backward", mutates_args=())
def gated_norm_backward_op(
    d_y: Tensor, x: Tensor, u: Tensor, weight: Tensor, eps: float, gate: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and u, and of the weight in float32."""
    V, (rows, block_v) = x.shape[-1], tile(x.shape[-1])
    d_x, d_u = x.new_empty(x.shape), u.new_empty(u.shape)
    parts = x.new_empty(-(-x.numel() // (V * rows * ROUNDS)), V, dtype=torch.float32)
    tensors = (x, u, weight, d_y, d_x, d_u, parts)
    constants = {"V": V, "GATE": gate, "ROWS": rows, "ROUNDS": ROUNDS, "BLOCK_V": block_v}
    _launch(gated_norm_backward, rows * ROUNDS, tensors, eps, **constants)
    return d_x, d_u, parts.sum(0)


@gated_norm_backward_op.register_fake
def _(d_y, x, u, weight, eps, gate):
    return x.new_empty(x.shape), u.new_empty(u.shape), weight.new_empty(weight.shape, dtype=torch.float32)


def tile(V: int) -> tuple[int, int]:
    """(rows, padded columns) of a program."""
    block_v = 1 << (V - 1).bit_length()
    return max(NUMBERS // block_v, 1), block_v


def _launch(kernel: Any, rows: int, tensors: tuple[Tensor, ...], eps: float, **constants: Any) -> None:
    x = tensors[0]
    count = x.numel() // x.shape[-1]
    if count == 0:
        return
    with torch.accelerator.device_index(x.device.index):
        kernel[(triton.cdiv(count, rows),)](*(t.contiguous() for t in tensors), count, eps, **constants, num_warps=4)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, u, weight, ctx.eps, ctx.gate = inputs
    ctx.save_for_backward(x, u, weight)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, u, weight = ctx.saved_tensors
    d_x, d_u, d_weight = gated_norm_backward_op(d_y, x, u, weight, ctx.eps, ctx.gate)
    return d_x, d_u, d_weight.to(weight.dtype), None, None


gated_norm.register_autograd(_backward, setup_context=_keep)

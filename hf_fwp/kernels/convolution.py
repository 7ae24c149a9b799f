"""Causal depthwise convolution and the activation after it, one pass over the sequence in each direction.

    z_t = sum_j w_j x_{t-j};   y_t = z_t sigmoid(z_t), or z_t         only x of the same sequence: j ≤ offset_t
    dz_t = dy_t y'(z_t);   dx_t = sum_j w_j dz_{t+j};   dw_j = sum_t dz_t x_{t-j}

The backward computes z again from x, which it has to read anyway, instead of keeping it.
"""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TIME, CHANNELS, WARPS = 32, 64, 8  # the tile of a program


@triton.jit
def before(offset, n, times, here, offset_stride, PACKED: tl.constexpr):
    """How many tokens of its own sequence stand before each."""
    return tl.load(offset + n * offset_stride + times, mask=here, other=0) if PACKED else times


@triton.jit
def sums(x, weight, rows, earlier, here, channels, at, inside, SIZE: tl.constexpr):
    """z at some rows after the address x, in float32; 0 where there is no token."""
    z = tl.zeros([rows.shape[0], at.shape[0]], tl.float32)
    for j in tl.static_range(SIZE):
        w = tl.load(weight + at * SIZE + (SIZE - 1 - j), mask=inside, other=0.0).to(tl.float32)
        seen = (here & (earlier >= j))[:, None] & inside[None, :]
        z += w[None, :] * tl.load(x + (rows[:, None] - j) * channels + at[None, :], mask=seen, other=0.0).to(tl.float32)
    return z


@triton.jit
def convolution_forward(
    x, weight, offset, y, length, channels, offset_stride,
    SIZE: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (tile of time, tile of channels, row)."""
    n = tl.program_id(2).to(tl.int64)
    start, rows = tl.program_id(0) * TIME, tl.arange(0, TIME)
    tile = (n * length + start) * channels  # offsets within a tile fit 32 bits, which halves their registers
    at = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here, inside = start + rows < length, at < channels
    earlier = before(offset, n, start + rows, here, offset_stride, PACKED)
    z = sums(x + tile, weight, rows, earlier, here, channels, at, inside, SIZE)
    if SILU:
        z = z * tl.sigmoid(z)
    place = rows[:, None] * channels + at[None, :]
    tl.store(y + tile + place, z.to(y.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def convolution_backward(
    x, weight, offset, d_y, d_x, d_weight, length, channels, offset_stride,
    SIZE: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program as above; d_weight [rows · tiles of time, channels, SIZE] gets its share of the gradient."""
    n = tl.program_id(2).to(tl.int64)
    start, rows = tl.program_id(0) * TIME, tl.arange(0, TIME)
    tile = (n * length + start) * channels  # offsets within a tile fit 32 bits, which halves their registers
    at = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here, inside = start + rows < length, at < channels
    earlier = before(offset, n, start + rows, here, offset_stride, PACKED)
    total = tl.zeros([TIME, CHANNELS], tl.float32)
    for j in tl.static_range(SIZE):
        later = rows + j
        there = start + later < length
        behind = before(offset, n, start + later, there, offset_stride, PACKED)
        place = d_y + tile + later[:, None] * channels + at[None, :]
        d_z = tl.load(place, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if SILU:
            z = sums(x + tile, weight, later, behind, there, channels, at, inside, SIZE)
            opened = tl.sigmoid(z)
            d_z = d_z * opened * (1.0 + z * (1.0 - opened))
        w = tl.load(weight + at * SIZE + (SIZE - 1 - j), mask=inside, other=0.0).to(tl.float32)
        total += tl.where((behind >= j)[:, None], d_z, 0.0) * w[None, :]
        if j == 0:
            for i in tl.static_range(SIZE):
                seen = (here & (earlier >= i))[:, None] & inside[None, :]
                past = tl.load(x + tile + (rows[:, None] - i) * channels + at[None, :], mask=seen, other=0.0)
                part = (n * tl.num_programs(0) + tl.program_id(0)) * channels + at
                tl.store(d_weight + part * SIZE + (SIZE - 1 - i), tl.sum(d_z * past.to(tl.float32), 0), mask=inside)
    place = rows[:, None] * channels + at[None, :]
    tl.store(d_x + tile + place, total.to(d_x.dtype.element_ty), mask=here[:, None] & inside[None, :])


@torch.library.custom_op("hf_fwp::short_convolution", mutates_args=())
def short_convolution(x: Tensor, weight: Tensor, offset: Tensor | None, silu: bool) -> Tensor:
    """y [B, T, C] of x [B, T, C] and weight [C, size], whose last column meets the current token.

    `offset` [B or 1, T] int64: how many tokens of its sequence stand before each; None: as many as its position.
    """
    x, y = x.contiguous(), x.new_empty(x.shape)
    _launch(convolution_forward, x, weight, offset, (y,), silu)
    return y


@short_convolution.register_fake
def _(x, weight, offset, silu):
    return x.new_empty(x.shape)


@torch.library.custom_op("hf_fwp::short_convolution_backward", mutates_args=())
def short_convolution_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, offset: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the weight in float32."""
    x = x.contiguous()
    d_x, parts = x.new_empty(x.shape), _parts(x, weight)
    _launch(convolution_backward, x, weight, offset, (d_y.contiguous(), d_x, parts), silu)
    return d_x, parts.sum(0)


@short_convolution_backward.register_fake
def _(d_y, x, weight, offset, silu):
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)


def _parts(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0] * -(-x.shape[1] // TIME), *weight.shape, dtype=torch.float32)


def _launch(
    kernel: Any, x: Tensor, weight: Tensor, offset: Tensor | None, tensors: tuple[Tensor, ...], silu: bool
) -> None:
    batch, length, channels = x.shape
    if x.numel() == 0:
        return
    stride = 0 if offset is None or offset.shape[0] < batch else length
    with torch.accelerator.device_index(x.device.index):
        kernel[(triton.cdiv(length, TIME), triton.cdiv(channels, CHANNELS), batch)](
            x,
            weight.contiguous(),
            offset if offset is None else offset.contiguous(),
            *tensors,
            length,
            channels,
            stride,
            SIZE=weight.shape[-1],
            SILU=silu,
            PACKED=offset is not None,
            TIME=TIME,
            CHANNELS=CHANNELS,
            num_warps=WARPS,
        )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offset, ctx.silu = inputs
    ctx.save_for_backward(x, weight, offset)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offset = ctx.saved_tensors
    d_x, d_weight = short_convolution_backward(d_y, x, weight, offset, ctx.silu)
    return d_x, d_weight.to(weight.dtype), None, None


short_convolution.register_autograd(_backward, setup_context=_keep)

"""Softmax attention over a window and the first tokens, beside fast weights that hold what lies outside of both.

    s_i = a q_t·k_i                  the last `window` tokens, t among them, and the first `sinks` tokens
    z_t = log n_t + w·x_t + c        the n_t tokens before t that are in neither, taken together
    p   = softmax([s, z])
    y_t = [p_z r_t, sum_i p_i v_i]   r_t: the read of the fast weights

Softmax over all tokens has this form, with z_t the log of the sum of exp(s_i) over the tokens outside and r_t the mean
of their values, so that window and fast weights are normalised together, as in LoLCATs (Zhang et al. 2024, eq. 6). The
learned logit z stands for the denominator of their kernel, which delta rules have not. With n_t = 0 it is the softmax
itself. Learned beside it: a per head. q, k, v are the layer's own.

States: keys and values of window - 1 + sinks tokens, however long the text is. Shape legend: rules/base.py; G key
heads, J queries per key head, C queries of a block, P places that they see.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .cache import MixerInputs
from .options import MixerOptions
from .packing import Window, take
from .rotation import rotate

States = dict[str, Tensor]


class WindowAttention(nn.Module):
    """The part of a mixer that attends to its window. `dropped_B`: the sequences that go without it, if any do."""

    def __init__(self, options: MixerOptions) -> None:
        super().__init__()
        self.options = options
        self.outside = nn.Linear(options.hidden_size, options.num_attention_heads)
        self.scale = nn.Parameter(torch.empty(options.num_attention_heads))
        self.dropped_B: Tensor | None = None
        self.init_weights()

    def init_weights(self) -> None:
        """The scale of Vaswani et al. 2017."""
        init.constant_(self.scale, self.options.head_dim**-0.5)

    def extra_repr(self) -> str:
        return f"window={self.options.window}, sinks={self.options.sinks}"

    def forward(
        self, tokens: MixerInputs, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, window: Window, states: States
    ) -> tuple[Tensor, Tensor, States]:
        """(the window's part [B, T, H, V], the mass outside p_z [B, T, H], the states after these tokens).

        q and k are not rotated yet. Real tokens stand side by side; `window` says where sequences begin and end.
        """
        x_BTD = tokens.hidden_BTD
        if tokens.rotary is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *tokens.rotary), rotate(k_BTGK, *tokens.rotary)
        position_BT, seen_B = _positions(x_BTD, window, states.get("near_seen"))
        k_near, k_first, kept = self._places("k", k_BTGK, position_BT, window, states)
        v_near, v_first, more = self._places("v", v_BTGV, position_BT, window, states)
        q_BTGJK = (q_BTHK * self.scale[:, None].to(q_BTHK.dtype)).unflatten(2, (k_BTGK.shape[2], -1))
        near, first, outside_BT = self._visible(position_BT)
        q_BNCGJK = _in_blocks(q_BTGJK, k_near.shape[-1] - self.options.window + 1)
        s_near = torch.einsum("bncgjk,bngkp->bncgjp", q_BNCGJK, k_near).flatten(1, 2)[:, : x_BTD.shape[1]]
        form = "bpgk" if window.offsets_BT1 is None else "btpgk"  # packed: each sequence has sinks of its own
        s_first = [torch.einsum(f"btgjk,{form}->btgjp", q_BTGJK, k_first)] if self.options.sinks else []
        z_BTGJ1 = (self.outside(x_BTD) + outside_BT[..., None]).unflatten(2, q_BTGJK.shape[2:4])[..., None]
        scores = torch.cat([s_near, *s_first, z_BTGJ1], dim=-1).to(torch.promote_types(x_BTD.dtype, torch.float32))
        visible = F.pad(torch.cat([near, first], dim=-1), (0, 1), value=True)
        mass = scores.masked_fill(~visible[:, :, None, None], -torch.inf).softmax(-1)
        p_near, p_first, p_outside = mass.to(v_BTGV.dtype).split([near.shape[-1], self.options.sinks, 1], dim=-1)
        read = torch.einsum("bncgjp,bngvp->bncgjv", _in_blocks(p_near, q_BNCGJK.shape[2]), v_near)
        read = read.flatten(1, 2)[:, : x_BTD.shape[1]]
        if self.options.sinks:
            read = read + torch.einsum(f"btgjp,{form.replace('k', 'v')}->btgjv", p_first, v_first)
        return read.flatten(2, 3), p_outside.flatten(2), {**kept, **more, "near_seen": seen_B}

    def _places(
        self, name: str, x_BTGK: Tensor, position_BT: Tensor, window: Window, states: States
    ) -> tuple[Tensor, Tensor, States]:
        """Keys or values of the window of each block [B, N, G, K, P], those of the sinks, and both to be kept."""
        size, (batch, length), x_BTC = self.options.window, position_BT.shape, x_BTGK.flatten(2)
        before = states.get(f"near_{name}")
        if before is None:
            before = x_BTC.new_zeros(batch, size - 1, x_BTC.shape[-1])
        step = min(size, length)
        longer = F.pad(torch.cat([before, x_BTC], dim=1), (0, 0, 0, -length % step))
        blocks = longer.unfold(1, step + size - 1, step).unflatten(2, x_BTGK.shape[2:])
        first = _sinks(x_BTC, position_BT, window, states.get(f"sink_{name}"), count=self.options.sinks)
        kept = {f"near_{name}": window.last(x_BTC, size, before)} if size > 1 else {}
        kept |= {f"sink_{name}": first} if self.options.sinks else {}
        return blocks, first.unflatten(-1, x_BTGK.shape[2:]), kept

    def _visible(self, position_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which places of its block [B, T, P] and which sinks [B, T, sinks] a query sees, and log n_t [B, T]."""
        size, sinks, length = self.options.window, self.options.sinks, position_BT.shape[1]
        step, device = min(size, length), position_BT.device
        row = torch.arange(length, device=device)[:, None] % step
        back_TP = row + size - 1 - torch.arange(step + size - 1, device=device)
        near = (back_TP >= 0) & (back_TP < size) & (back_TP <= position_BT[..., None])
        left_BT = position_BT - size  # the last position that has left the window
        first = torch.arange(sinks, device=device) <= left_BT[..., None]
        outside_BT = (left_BT + 1 - sinks).clamp_min(0)
        if self.dropped_B is not None:  # all tokens lie outside of a window that is not there
            dropped_B1 = self.dropped_B.to(device)[:, None]
            near, first = near & ~dropped_B1[..., None], first & ~dropped_B1[..., None]
            outside_BT = torch.where(dropped_B1, position_BT + 1, outside_BT)
        return near, first, outside_BT.to(torch.promote_types(self.scale.dtype, torch.float32)).log()

    def join(self, reads_BTC: Tensor, near_BTHV: Tensor, outside_BTH: Tensor) -> Tensor:
        """[B, T, (reads + H) V]: the fast weights' reads, as much as lies outside, and the window's part."""
        scales = self.options.num_reads // self.options.num_attention_heads
        reads_BTRV = reads_BTC.unflatten(-1, (self.options.num_reads, -1))
        return torch.cat([reads_BTRV * outside_BTH.repeat(1, 1, scales)[..., None], near_BTHV], dim=2).flatten(2)


def _positions(x_BTD: Tensor, window: Window, seen_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, T]: how many real tokens of its sequence stand before each token; and [B]: how many there are after these."""
    batch, length, _ = x_BTD.shape
    if seen_B is None:
        seen_B = torch.zeros(batch, dtype=torch.long, device=x_BTD.device)
    after_B = seen_B + (length if window.mask_BT is None else window.mask_BT.sum(1))
    if window.offsets_BT1 is not None:
        return window.offsets_BT1[..., 0], after_B
    return seen_B[:, None] + torch.arange(length, device=x_BTD.device), after_B


def _sinks(x_BTC: Tensor, position_BT: Tensor, window: Window, before: Tensor | None, *, count: int) -> Tensor:
    """The first `count` inputs of each sequence [B, count, C]; of packed sequences, of each token's own [B, T, count,
    C]. Places that no token has reached hold anything."""
    number, length = torch.arange(count, device=x_BTC.device), x_BTC.shape[1]
    if window.offsets_BT1 is not None:
        start_BT = torch.arange(length, device=x_BTC.device) - position_BT
        index = (start_BT[..., None] + number).clamp_max(length - 1).flatten(1)
        return take(x_BTC, index).unflatten(1, (length, count))
    index_BS = number - position_BT[:, :1]
    new = take(x_BTC, index_BS.clamp(0, length - 1))
    return new if before is None else torch.where((index_BS < 0)[..., None], before, new)


def _in_blocks(x: Tensor, step: int) -> Tensor:
    """[B, T, ...] as [B, N, step, ...], with zeros at the end."""
    return F.pad(x, (*(0, 0) * (x.ndim - 2), 0, -x.shape[1] % step)).unflatten(1, (-1, step))

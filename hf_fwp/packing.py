"""Which tokens are real, and where sequences begin: padding masks and packed batches in the forms transformers uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rules.checks import check_length

NEVER = -torch.inf  # the time of the last real token where there was none


def valid_tokens(attention_mask: Any, *, batch: int, length: int, past: int | Tensor = 0) -> Tensor | None:
    """mask_BT of the current `length` tokens (True = real), or None when all are known to be real.

    Reads a 2-D mask (its last `length` columns) or the diagonal of a 4-D mask: a token is real if it may see itself.
    Raises ValueError for no tokens at all, and for a mask of another form.
    """
    check_length(length)
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"cannot read padding from an attention mask of type {type(attention_mask).__name__}; "
            "use attn_implementation='sdpa' or 'eager', or give a 2-D mask"
        )
    if attention_mask.ndim == 2:
        if attention_mask.shape[0] not in (1, batch) or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; for these {batch} rows of {length} tokens it "
                "must be [B, T], with a column for each token, those in the cache included"
            )
        mask_BT = attention_mask[:, -length:]
    elif attention_mask.ndim == 4:
        mask_BT = _diagonal(attention_mask, length=length, past=past)
    else:
        raise ValueError(f"attention_mask has {attention_mask.ndim} dimensions; it must have 2 or 4")
    mask_BT = (mask_BT > 0) if mask_BT.dtype != torch.bool else mask_BT
    # on an accelerator this question would wait for the device
    if mask_BT.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask_BT.all()):
        return None
    return mask_BT.expand(batch, length)


def _diagonal(mask_B1TS: Tensor, *, length: int, past: int | Tensor) -> Tensor:
    columns = torch.arange(length, device=mask_B1TS.device)
    # a sliding layer's mask holds only its window, which ends at the current token
    columns = torch.minimum(columns + past, columns + (mask_B1TS.shape[-1] - length))
    rows_BTS = mask_B1TS[:, 0, -length:]
    diagonal_BT = rows_BTS.gather(2, columns.view(1, -1, 1).expand(rows_BTS.shape[0], -1, 1))[..., 0]
    if diagonal_BT.dtype == torch.bool:
        return diagonal_BT
    return diagonal_BT > torch.finfo(diagonal_BT.dtype).min / 2


def packed_segments(
    *,
    batch: int,
    length: int,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor | None:
    """cu_seqlens of a packed batch, counted over the flattened [batch * length] tokens; None when nothing is packed.

    Read from `cu_seq_lens_q`, else from changes of `seq_idx`, else from `position_ids` that do not go up by one. The
    last two depend on values: a compiled graph breaks there, and one that is exported must be given `cu_seq_lens_q`.
    """
    if cu_seq_lens_q is not None:
        return cu_seq_lens_q
    if length < 2 or torch.compiler.is_exporting():
        return None
    if seq_idx is not None:
        return _bounds(seq_idx, 0, batch=batch, length=length)
    if position_ids is not None and position_ids.ndim == 2:
        return _bounds(position_ids, 1, batch=batch, length=length)
    return None


@torch.compiler.disable(
    reason="where packed sequences begin depends on values; give cu_seq_lens_q to stay in one graph"
)
def _bounds(numbers_BT: Tensor, step: int, *, batch: int, length: int) -> Tensor | None:
    """cu_seqlens where each number is not the one before plus `step`; None if all are."""
    starts_BT = numbers_BT[:, 1:] != numbers_BT[:, :-1] + step
    if not bool(starts_BT.any()):
        return None
    first_B1 = starts_BT.new_ones(starts_BT.shape[0], 1)
    starts = torch.cat([first_B1, starts_BT], dim=1).expand(batch, length).flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([batch * length])]).to(torch.int32)


def packed_batch(
    *,
    batch: int,
    length: int,
    padded: bool,
    cached: bool,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """`packed_segments` of one forward. Packing beside padding or beside a cache is refused; `kwargs` are not read."""
    given = "cu_seq_lens_q" if cu_seq_lens_q is not None else "seq_idx" if seq_idx is not None else None
    if padded:
        if given is not None:
            raise ValueError(
                f"the batch is packed ({given}) and padded (attention_mask has zeros); leave the padding out of a "
                "packed batch, or give one sequence per row"
            )
        return None
    if seq_idx is not None and tuple(seq_idx.shape)[1:] != (length,):
        raise ValueError(
            f"seq_idx has shape {list(seq_idx.shape)}; it must be [B, T] = {[batch, length]}: a number per token"
        )
    if cached and torch.compiler.is_compiling():
        position_ids = None  # generate() gives them with every prompt
    cu_seqlens = packed_segments(
        batch=batch, length=length, cu_seq_lens_q=cu_seq_lens_q, seq_idx=seq_idx, position_ids=position_ids
    )
    if cached and cu_seqlens is not None:
        raise ValueError(
            f"a packed batch ({given or 'position_ids that begin again'}) cannot use a cache; give one sequence per "
            "row, or no cache"
        )
    return cu_seqlens


def positions_in_segments(cu_seqlens: Tensor, *, total: int) -> Tensor:
    """For each of `total` packed tokens, how many tokens of its own sequence stand before it."""
    index = torch.arange(total, device=cu_seqlens.device)
    ends = cu_seqlens[1:].to(index.dtype)
    segment = torch.bucketize(index, ends, right=True).clamp_max(ends.shape[0] - 1)
    return index - cu_seqlens.to(index.dtype)[segment]


def push_left(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(order, back): `order` gathers the real tokens to the front in their order, `back` undoes it."""
    order_BT = mask_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return order_BT, order_BT.argsort(dim=1)


def take(x: Tensor, order_BT: Tensor) -> Tensor:
    """x [B, T, ...] with its time dimension put in the given order."""
    index = order_BT.view(*order_BT.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


class Window:
    """Looks back a few tokens: over a history kept from before, not across the start of a sequence."""

    def __init__(self, mask_BT: Tensor | None, offsets_BT1: Tensor | None) -> None:
        self.mask_BT = mask_BT
        self.offsets_BT1 = offsets_BT1

    @classmethod
    def of(cls, mask_BT: Tensor | None, cu_seqlens: Tensor | None, *, total: int) -> Window:
        """The window over `total` tokens, padded at their end or packed."""
        if cu_seqlens is None:
            return cls(mask_BT, None)
        return cls(mask_BT, positions_in_segments(cu_seqlens, total=total)[None, :, None])

    def taps(self, x_BTC: Tensor, size: int, history: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """[x_t, x_{t-1}, ..., x_{t-size+1}] and the last size - 1 real inputs, which continue it."""
        batch, length, channels = x_BTC.shape
        if size == 1:
            return [x_BTC], x_BTC.new_empty(batch, 0, channels)
        if history is None:
            history = x_BTC.new_zeros(batch, size - 1, channels)
        longer = torch.cat([history, x_BTC], dim=1)
        taps = [longer[:, size - 1 - j : size - 1 - j + length] for j in range(size)]
        if self.offsets_BT1 is not None:
            taps = [torch.where(self.offsets_BT1 >= j, tap, 0) for j, tap in enumerate(taps)]
        return taps, self.last(x_BTC, size, history)

    def last(self, x_BTC: Tensor, size: int, history: Tensor | None) -> Tensor:
        """The last size - 1 real inputs, the history's included. A copy: a view would keep all of x in memory."""
        batch, length, channels = x_BTC.shape
        if history is None:
            history = x_BTC.new_zeros(batch, size - 1, channels)
        if self.mask_BT is None:
            return torch.cat([history[:, length:], x_BTC[:, max(length - size + 1, 0) :]], dim=1)
        index = self.mask_BT.sum(1, keepdim=True) + torch.arange(size - 1, device=x_BTC.device) - (size - 1)
        old, new = take(history, (index + size - 1).clamp_max(size - 2)), take(x_BTC, index.clamp_min(0))
        return torch.where((index < 0)[..., None], old, new)

    def elapsed(self, times_BT: Tensor, last_B: Tensor | None, *, first: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Time since the real token before, `first` where a sequence begins, and the time of the last real token.

        `last_B` is that time from before, NEVER where there was no token. The shape is that of `like` [B, T, S, 1], the
        dtype at least float32. A time that goes back is a ValueError."""
        if last_B is None:
            last_B = times_BT.new_full(times_BT.shape[:1], NEVER)
        reached_BT = times_BT
        if self.mask_BT is not None:
            times_BT = torch.where(self.mask_BT, times_BT, 0)
            reached_BT = torch.where(self.mask_BT, times_BT, NEVER).cummax(1).values
            reached_BT = torch.maximum(reached_BT, last_B[:, None])
        past_BT = torch.cat([last_B[:, None], reached_BT[:, :-1]], dim=1)
        begins_BT = past_BT.isinf()
        if self.offsets_BT1 is not None:
            begins_BT = begins_BT | (self.offsets_BT1[..., 0] == 0)
        dt_BT = torch.where(begins_BT, first, times_BT - past_BT)
        if self.mask_BT is not None:
            dt_BT = torch.where(self.mask_BT, dt_BT, 0)
        # on an accelerator this question would wait for the device
        if dt_BT.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((dt_BT >= 0).all()):
            raise ValueError("times go back, or are NaN, within a sequence; sort its observations by their times")
        dt_BT11 = dt_BT[..., None, None].to(torch.promote_types(like.dtype, torch.float32))
        # a clone: every layer's cache writes to its own, and none to the caller's times
        return dt_BT11.expand_as(like), reached_BT[:, -1].clone()

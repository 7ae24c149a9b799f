"""Cross entropy from hidden states, a few tokens at a time, so that no [tokens, vocabulary] tensor exists.

    loss = -sum_i log softmax(z_i)[y_i]             dloss / dz_i = softmax(z_i) - onehot(y_i)

with the logits z_i = W h_i; of a pretrained family they may be more than that (Readout).
The gradient on the logits is at hand together with the loss, so that the forward computes those of h and W too: a
backward would need the logits a second time. Why no library: liger-kernel and cut-cross-entropy are kernels for GPUs,
and the chunked `linear_cross_entropy` of torch 2.13 leaves the graph of torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LOGITS = 1 << 24  # logits that exist at once: 64 MiB in float32
ADDED = 1024  # rows of the weight's gradient that are added at once


@dataclass(frozen=True)
class Readout:
    """Logits z of what the head computes, x = W h + b:

    z = cap tanh(scale x / cap), without a cap scale x          dz/dx = scale (1 - (z / cap)²)
    """

    scale: float = 1.0
    cap: float | None = None

    def logits(self, x_NV: Tensor) -> Tensor:
        """z; x stays as it is."""
        scaled_NV = x_NV if self.scale == 1 else x_NV * self.scale
        return scaled_NV if self.cap is None else (scaled_NV / self.cap).tanh_().mul_(self.cap)

    def gradient(self, error_NV: Tensor, z_NV: Tensor) -> Tensor:
        """From the gradient on z, which is written to, to that on x."""
        if self.cap is not None:
            error_NV.mul_((z_NV / self.cap).square_().neg_().add_(1))
        return error_NV if self.scale == 1 else error_NV.mul_(self.scale)


PLAIN = Readout()


def causal_loss(
    hidden_BTD: Tensor,
    head: nn.Linear,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """transformers' loss of next-token prediction, without logits: the mean over labels, or the sum divided by
    `num_items_in_batch`. `head` has no bias; `kwargs` are not read, as in transformers."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    labels_N = shift_labels.reshape(-1).to(hidden_BTD.device)
    total = summed_loss(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), head, labels_N, ignore_index=ignore_index)
    count = (labels_N != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def summed_loss(
    hidden_ND: Tensor, head: nn.Linear, labels_N: Tensor, *, readout: Readout = PLAIN, ignore_index: int = -100
) -> Tensor:
    """The sum of the losses of all labels but `ignore_index`. `head` has no bias."""
    narrow = autocast_dtype(hidden_ND) or head.weight.dtype
    learning = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_ND, head.weight)]
    how = (narrow, learning, readout.scale, readout.cap)
    return cross_entropy_of_head(hidden_ND, head.weight, labels_N, ignore_index, *how)[0]


@torch.library.custom_op("hf_fwp::cross_entropy_of_head", mutates_args=())
def cross_entropy_of_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    ignore_index: int,
    narrow: torch.dtype,
    learning: Sequence[bool],
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the losses, its gradients on hidden states and weight where `learning` says so, else empty tensors).

    Products are taken in `narrow`, sums in float32 (float64 for a float64 weight).
    """
    total, d_hidden, d_weight = _new_results(hidden_ND, weight_VD, learning)
    wide, readout = total.dtype, Readout(scale, cap)
    grads = [d if wanted else None for d, wanted in zip((d_hidden, d_weight), learning, strict=True)]
    weight = weight_VD.to(narrow)
    at_once = max(1, min(len(hidden_ND), LOGITS // len(weight)))  # there may be no token at all
    # written to again and again: fresh memory of this size costs more than the matrix products
    buffer_NV = hidden_ND.new_empty(at_once, len(weight), dtype=narrow)
    of_chunk_VD = torch.empty_like(weight) if learning[1] and narrow != wide else None
    with torch.autocast(hidden_ND.device.type, enabled=False):
        for start in range(0, len(hidden_ND), at_once):
            tokens = slice(start, start + at_once)
            h_ND, y_N = hidden_ND[tokens].to(narrow), labels_N[tokens]
            logits_NV = logits(h_ND, weight, None, buffer_NV[: len(h_ND)])
            z_NV = readout.logits(logits_NV.to(wide))
            loss, error_NV = losses(z_NV, y_N, ignore_index)
            total += loss
            if any(learning):
                error_NV = readout.gradient(error_NV, z_NV)
                add_gradients([*grads, None], tokens, logits_NV.copy_(error_NV), h_ND, weight, of_chunk_VD)
    return total, d_hidden, d_weight


def losses(logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(sum of the losses, its gradient on these logits)."""
    valid_N1 = (labels_N != ignore_index)[:, None]
    picked_N1 = torch.where(valid_N1, labels_N[:, None], 0)
    log_p_NV = logits_NV.log_softmax(-1)
    loss = -torch.where(valid_N1, log_p_NV.gather(1, picked_N1), 0).sum()
    error_NV = log_p_NV.exp_().scatter_add_(1, picked_N1, -torch.ones_like(log_p_NV[:, :1]))
    return loss, error_NV.masked_fill_(~valid_N1, 0)


def _new_results(hidden_ND: Tensor, weight_VD: Tensor, learning: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    shapes = [x.shape if wanted else (0,) for x, wanted in zip((hidden_ND, weight_VD), learning, strict=True)]
    d_hidden, d_weight = (hidden_ND.new_zeros(shape, dtype=wide) for shape in shapes)
    return hidden_ND.new_zeros((), dtype=wide), d_hidden, d_weight


@cross_entropy_of_head.register_fake
def _(hidden_ND, weight_VD, labels_N, ignore_index, narrow, learning, scale=1.0, cap=None):
    return _new_results(hidden_ND, weight_VD, learning)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, _, _, ctx.learning, *_ = inputs
    ctx.dtypes = (hidden.dtype, weight.dtype)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, outer: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    kept = zip(ctx.saved_tensors, ctx.dtypes, ctx.learning, strict=True)
    return (*((grad * outer).to(dtype) if wanted else None for grad, dtype, wanted in kept), *[None] * 6)


cross_entropy_of_head.register_autograd(_backward, setup_context=_keep)


def logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, out_NV: Tensor) -> Tensor:
    """W h + b, written to `out_NV`."""
    torch.mm(hidden_ND, weight_VD.mT, out=out_NV)
    return out_NV if bias_V is None else out_NV.add_(bias_V.to(out_NV.dtype))


def add_gradients(
    grads: list[Tensor | None],
    tokens: slice,
    error_NV: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    of_chunk_VD: Tensor | None,
) -> None:
    """From the gradient on these logits to those on hidden states, weight (by way of `of_chunk_VD`) and bias."""
    hidden, weight, bias = grads
    if hidden is not None:
        hidden[tokens] = error_NV @ weight_VD
    if weight is not None and of_chunk_VD is None:
        weight.addmm_(error_NV.mT, hidden_ND)
    elif weight is not None and of_chunk_VD is not None:
        torch.mm(error_NV.mT, hidden_ND, out=of_chunk_VD)
        # in parts: adding another dtype first makes a copy
        for part_VD, more_VD in zip(weight.split(ADDED), of_chunk_VD.split(ADDED), strict=True):
            part_VD.add_(more_VD)
    if bias is not None:
        bias += error_NV.sum(0)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks matrix products for, if it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

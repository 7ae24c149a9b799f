"""The loss of distillation from hidden states, a few tokens at a time, so that no [tokens, vocabulary] tensor exists.

    KL(p ‖ q) = sum_v p_v (log p_v - log q_v)       p = softmax(W_t h_t + b_t), q = softmax(W_s h_s + b_s)

The gradient on the student's logits is q - p, so that it is computed together with the loss, while both are at hand:

    dh_s = (q - p) W_s          dW_s = (q - p)ᵀ h_s          db_s = sum (q - p)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LOGITS = 1 << 24  # logits that exist at once: 64 MiB in float32
ROWS = 8  # tokens that are worked on at once between two matrix products: their logits stay in cache


def kl_of_heads(student_ND: Tensor, teacher_ND: Tensor, student_head: nn.Linear, teacher_head: nn.Linear) -> Tensor:
    """sum over tokens of KL(teacher ‖ student), from the hidden states before the two output heads."""
    theirs = (teacher_ND, teacher_head.weight, teacher_head.bias)
    fixed = [x if x is None else x.detach().to(student_ND.device) for x in theirs]
    return KLOfHeads.apply(student_ND, student_head.weight, student_head.bias, *fixed, torch.is_grad_enabled())


class KLOfHeads(torch.autograd.Function):
    """Forward computes the gradients too: in backward the logits would have to be computed a second time."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        teacher_ND: Tensor,
        teacher_VD: Tensor,
        teacher_bias_V: Tensor | None,
        learning: bool,
    ) -> Tensor:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        narrow = autocast_dtype(student_ND) or wide
        ctx.grads = [
            torch.zeros_like(x, dtype=wide) if learning and needed and x is not None else None
            for x, needed in zip((student_ND, weight_VD, bias_V), ctx.needs_input_grad[:3], strict=True)
        ]
        total = torch.zeros((), dtype=wide, device=student_ND.device)
        at_once = max(1, LOGITS // len(weight_VD))
        with torch.autocast(student_ND.device.type, enabled=False):
            weight_VD, teacher_VD = weight_VD.to(narrow), teacher_VD.to(narrow)
            for start in range(0, len(student_ND), at_once):
                tokens = slice(start, start + at_once)
                h_ND = student_ND[tokens].to(narrow)
                q_NV = logits(h_ND, weight_VD, bias_V).to(wide)
                p_NV = logits(teacher_ND[tokens].to(narrow), teacher_VD, teacher_bias_V).to(wide)
                total += sum(divergence_(*rows) for rows in zip(q_NV.split(ROWS), p_NV.split(ROWS), strict=True))
                if learning:
                    add_gradients(ctx.grads, tokens, q_NV.to(narrow), h_ND, weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # they are of no further use, so they may be written to
        return (*(grad if grad is None else grad.mul_(outer[0]) for grad in grads), None, None, None, None)


def logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """W h + b."""
    return nn.functional.linear(hidden_ND, weight_VD, None if bias_V is None else bias_V.to(weight_VD.dtype))


def divergence_(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """sum over tokens of KL(teacher ‖ student); the student's logits become q - p, the teacher's are used up.

    KL = sum_v e^t (t - s) / z_t - log z_t + log z_s, s and t being the logits minus their largest, z = sum_v e^.
    """
    student_NV.sub_(student_NV.amax(-1, keepdim=True))
    teacher_NV.sub_(teacher_NV.amax(-1, keepdim=True))
    apart_NV = teacher_NV - student_NV
    p_NV, q_NV = teacher_NV.exp_(), student_NV.exp_()
    sums_p, sums_q = p_NV.sum(-1, keepdim=True), q_NV.sum(-1, keepdim=True)
    expected = torch.linalg.vecdot(p_NV, apart_NV).unsqueeze(-1) / sums_p
    q_NV.div_(sums_q).sub_(p_NV.div_(sums_p))
    return (expected - sums_p.log() + sums_q.log()).sum()


def add_gradients(
    grads: list[Tensor | None], tokens: slice, error_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor
) -> None:
    """From the gradient on these tokens' logits to those on hidden states, weight and bias."""
    hidden, weight, bias = grads
    if hidden is not None:
        hidden[tokens] = error_NV @ weight_VD
    if weight is not None and weight.dtype == error_NV.dtype:
        weight.addmm_(error_NV.mT, hidden_ND)
    elif weight is not None:
        weight += error_NV.mT @ hidden_ND
    if bias is not None:
        bias += error_NV.sum(0)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks matrix products for, if it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

"""The loss of distillation from hidden states, a few tokens at a time, so that no [tokens, vocabulary] tensor exists.

    KL(p ‖ q) = sum_v p_v (log p_v - log q_v)       p = softmax(z_t), q = softmax(z_s)
    z = cap tanh(scale x / cap)                     x = W h + b; where a family has no cap z = scale x

The gradient on the student's logits is q - p, so that it is computed together with the loss, while both are at hand:

    e = (q - p) dz_s/dx_s       dh_s = e W_s       dW_s = eᵀ h_s       db_s = sum e
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_fwp.cross_entropy import LOGITS, PLAIN, Readout, add_gradients, autocast_dtype, logits

ROWS = 8  # tokens worked on at once between two matrix products: their logits stay in cache, in full precision

# what a family's logits are of its head's output, by the names of transformers' configs
SCALES = {"logit_scale": 1, "logits_scaling": -1}  # and the power of each: -1 divides
CAP = "final_logit_softcapping"


def readout_of(config: Any) -> Readout:
    """How a model with this config makes logits of what its head computes."""
    scale = math.prod((getattr(config, name, None) or 1.0) ** power for name, power in SCALES.items())
    return Readout(scale, getattr(config, CAP, None))


def kl_of_heads(
    student_ND: Tensor,
    teacher_ND: Tensor,
    student_head: nn.Linear,
    teacher_head: nn.Linear,
    *,
    student_readout: Readout = PLAIN,
    teacher_readout: Readout = PLAIN,
) -> Tensor:
    """sum over tokens of KL(teacher ‖ student), from the hidden states before the two output heads."""
    theirs = (teacher_ND, teacher_head.weight, teacher_head.bias)
    fixed = [x if x is None else x.detach().to(student_ND.device) for x in theirs]
    how = (student_readout, teacher_readout, torch.is_grad_enabled())
    return KLOfHeads.apply(student_ND, student_head.weight, student_head.bias, *fixed, *how)


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
        student_readout: Readout,
        teacher_readout: Readout,
        learning: bool,
    ) -> Tensor:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        narrow = autocast_dtype(student_ND) or wide
        ctx.grads = [
            torch.zeros_like(x, dtype=wide) if learning and needed and x is not None else None
            for x, needed in zip((student_ND, weight_VD, bias_V), ctx.needs_input_grad[:3], strict=True)
        ]
        total = torch.zeros((), dtype=wide, device=student_ND.device)
        at_once = max(1, min(len(student_ND), LOGITS // len(weight_VD)))  # there may be no token at all
        with torch.autocast(student_ND.device.type, enabled=False):
            weight_VD, teacher_VD = weight_VD.to(narrow), teacher_VD.to(narrow)
            # written to again and again: fresh memory of this size costs more than the matrix products
            ours_NV, theirs_NV = (student_ND.new_empty(at_once, len(weight_VD), dtype=narrow) for _ in range(2))
            of_chunk_VD = torch.empty_like(weight_VD) if ctx.grads[1] is not None and narrow != wide else None
            for start in range(0, len(student_ND), at_once):
                tokens = slice(start, start + at_once)
                h_ND = student_ND[tokens].to(narrow)
                x_NV = logits(h_ND, weight_VD, bias_V, ours_NV[: len(h_ND)])
                fixed_NV = logits(teacher_ND[tokens].to(narrow), teacher_VD, teacher_bias_V, theirs_NV[: len(h_ND)])
                for of_student, of_teacher in zip(x_NV.split(ROWS), fixed_NV.split(ROWS), strict=True):
                    z_NV = student_readout.logits(of_student.to(wide))
                    kl, error = divergence(z_NV, teacher_readout.logits(of_teacher.to(wide)))
                    total += kl
                    of_student.copy_(student_readout.gradient(error, z_NV))
                if learning:
                    add_gradients(ctx.grads, tokens, x_NV, h_ND, weight_VD, of_chunk_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # they are of no further use, so they may be written to
        return (*(grad if grad is None else grad.mul_(outer[0]) for grad in grads), *[None] * 6)


def divergence(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over tokens of KL(teacher ‖ student), its gradient q - p on the student's logits)."""
    log_q_NV, log_p_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    p_NV = log_p_NV.exp()
    kl = torch.linalg.vecdot(p_NV, log_p_NV.sub_(log_q_NV)).sum()
    return kl, log_q_NV.exp_().sub_(p_NV)

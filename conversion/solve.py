"""Stage 1, solve: the output projection of every converted layer in closed form. No backward pass, no step size.

    W = argmin sum_t || W r_t - A_t ||² + lambda sum_i G_ii ||w_i - w0_i||²,   G = sum_t r_t r_tᵀ
      = W0 + (G + lambda diag G)⁻¹ (sum_t r_t A_tᵀ - G W0)

r_t: the mixer's reads, the values it skips ahead, and 1; A_t: the teacher's attention output (after its o_proj).
W0 = sum_h O_h W_h, where W_h regresses the teacher's head h on that head's own reads, its skipped values and 1, and O_h
is the teacher's o_proj for it: far fewer weights than W, so far less to overfit. lambda is the one with the least
residual on sequences that G has not seen. The decoder is walked once, layer by layer, so that one layer's activations
are in memory at a time (stream.py). With stream="student" the mixer's inputs come from the student's own residual
stream, whose earlier layers are solved already; with "teacher" from the teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fwp.hosts import converted_layers
from hf_fwp.layer import FastWeightLayer, layers_of
from hf_fwp.options import refuse_unknown
from hf_fwp.telling import progress_bar

from .calibrate import calibrate
from .formulas import calibrate_by_formulas
from .memory import give_back_freed_memory
from .recipes import STREAMS
from .stream import Visit, Walk, every

LAMBDAS = (1e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
HEAD_LAMBDA = 1e-3
RATES = {"residual": calibrate, "formulas": calibrate_by_formulas}
# Of some sequences: the mixer's input [n,T,D], and the teacher's answer [n,T,D] and heads [n,T,H V].
Lesson = tuple[Tensor, Tensor, Tensor]


@dataclass
class Moments:
    """Sums over tokens that a least-squares problem is made of: r rᵀ, r Aᵀ, r yᵀ (y: the heads) and ||A||²."""

    gram: Tensor
    cross: Tensor
    heads: Tensor
    energy: float = 0.0

    @classmethod
    def empty(cls, reads: Tensor, target: Tensor, heads: Tensor) -> Moments:
        """Sums over no tokens, of the widths that these have."""
        size = reads.shape[-1]
        widths = (size, target.shape[-1], heads.shape[-1])
        gram, cross, of_heads = (reads.new_zeros(size, width) for width in widths)
        return cls(gram, cross, of_heads)

    def add(self, r: Tensor, target: Tensor, heads: Tensor) -> None:
        """Tokens r [..., R], their targets [..., D] and the teacher's heads [..., H V]."""
        rows, wanted = r.flatten(0, -2), target.flatten(0, -2)
        self.gram.addmm_(rows.mT, rows)
        self.cross.addmm_(rows.mT, wanted)
        self.heads.addmm_(rows.mT, heads.flatten(0, -2))
        self.energy += float(wanted.square().sum())

    def residual(self, weight: Tensor) -> float:
        """||W r - A||² / ||A||² of these tokens, without them."""
        explained = 2 * (weight * self.cross).sum() - (weight * (self.gram.to(weight.dtype) @ weight)).sum()
        return 1 - float(explained) / self.energy


def ridge(
    fit: Moments, judge: Moments, prior_RD: Tensor, lambdas: Sequence[float] = LAMBDAS
) -> tuple[Tensor, dict[str, float]]:
    """The weights [R, D], drawn to `prior_RD` by the lambda that `judge` likes best, and the residuals on both."""
    gram, prior = fit.gram.to(torch.float64, copy=True), prior_RD.double()
    missing = fit.cross.double() - gram @ prior
    diagonal = gram.diagonal().clone()
    floor = 1e-9 * diagonal.mean()  # a regressor that is always zero
    best: tuple[float, float, Tensor] | None = None
    for lam in sorted(lambdas):
        gram.diagonal().copy_(diagonal * (1 + lam) + floor)
        weight = prior + torch.cholesky_solve(missing, torch.linalg.cholesky(gram))
        residual = judge.residual(weight)
        if best is not None and residual > best[0]:
            break  # more of lambda would only be worse
        best = (residual, lam, weight)
    alone = judge.residual(prior)
    if best is None or (alone < best[0] and len(lambdas) > 1):  # a single lambda is no choice
        best = (alone, math.inf, prior)
    found = {"residual": best[0], "fitted": fit.residual(best[2]), "prior": alone, "lambda": best[1]}
    return best[2], found


@torch.no_grad()
def solve(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids_NT: Tensor,
    *,
    heldout: int = 4,
    calibrated: bool = False,
    search: int = 3,
    stream: str = "student",
    rates: str = "residual",
    fixed: Mapping[str, Any] | None = None,
    lambdas: Sequence[float] = LAMBDAS,
    per_head: bool = True,
    progress: bool = True,
    visit: Visit = every,
    folder: Path | None = None,
) -> dict[int, dict[str, Any]]:
    """Calibrate (unless `calibrated`) and solve every converted layer of `student`; returns what came out per layer.

    ids_NT: token blocks [N, T]; the last `heldout` choose lambda, the first `search` find the settings of heads.
    `rates`, `fixed`: how those are found, and what is not looked for (calibrate.py, formulas.py). `lambdas`: those to
    choose from; none: W0 itself. `per_head`: W0 is the regression of each head, else the projection that the mixer has.
    visit: gives the layers in turn, and sees to it that the weights of each are there (offload.py). folder: where large
    streams lie (stream.py); without one they are in memory.
    """
    refuse_unknown("stream", [stream], STREAMS)
    refuse_unknown("way to find rates", [rates], RATES)
    if len(ids_NT) < heldout + 2:
        raise ValueError(f"{len(ids_NT)} sequences are too few to solve: {heldout} are held out, 2 more are needed")
    teacher_walk = Walk(teacher, ids_NT, folder=folder)
    student_walk = Walk(student, ids_NT, folder=folder) if stream == "student" else None
    walks = [walk for walk in (teacher_walk, student_walk) if walk is not None]
    layers = converted_layers(student.config)
    # behind the last one nothing is solved, and no stream is needed
    first, last = min(layers, default=0), max(layers, default=-1)
    found: dict[int, dict[str, Any]] = {}
    turn = progress_bar(range(len(teacher_walk.blocks)), desc="solve", unit="layer", progress=progress)
    for layer in visit(turn, walks, found):
        if student_walk is not None and layer == first:
            student_walk.join(teacher_walk)
        if layer not in layers:
            for walk in walks if layer < last else ():
                if walk is teacher_walk or layer > first:
                    walk.move(layer)
            continue
        mixer = layers_of(student)[layer]
        rotary, found[layer] = teacher_walk.rotary(layer), {}
        if not calibrated:
            judges = max(2, search // 2)
            found[layer] = RATES[rates](
                mixer,
                torch.cat([teacher_walk.inputs(layer, rows) for rows in (slice(search), slice(-judges, None))]),
                rotary,
                softmax=teacher_walk.softmax(layer),
                heldout=judges,
                fixed=fixed,
            )
            _remember_options(student, layer)
            give_back_freed_memory()
        found[layer] |= solve_layer(
            mixer,
            teacher_walk.output_projection(layer) if per_head else None,
            _lessons(layer, teacher_walk, student_walk),
            rotary,
            fitted=len(ids_NT) - heldout,
            lambdas=lambdas,
        )
        if student_walk is not None and layer < last:
            _answer(layer, mixer, student_walk)
        give_back_freed_memory()
    return found


def _lessons(layer: int, teacher: Walk, student: Walk | None) -> Iterator[Lesson]:
    """What the mixer of a layer is solved on; the teacher's stream moves on to the next block meanwhile."""
    for rows in teacher.rows():
        x_NTD, target_NTD, heads_NTC = teacher.attend(layer, rows)
        yield x_NTD if student is None else student.inputs(layer, rows), target_NTD, heads_NTC


def _answer(layer: int, mixer: FastWeightLayer, student: Walk) -> None:
    """Move the student's stream on to the next block; its mixers' reads are computed once more: those of all tokens
    would take more memory than the stream."""
    for rows in student.rows():
        answer, *_ = mixer(student.inputs(layer, rows), position_embeddings=student.rotary(layer))
        student.advance(layer, answer, rows)


def solve_layer(
    mixer: FastWeightLayer,
    projection: nn.Linear | None,
    lessons: Iterable[Lesson],
    rotary: tuple[Tensor, Tensor] | None,
    *,
    fitted: int,
    lambdas: Sequence[float] = LAMBDAS,
) -> dict[str, float]:
    """Solve a mixer's o_proj, skip_proj and bias on the first `fitted` sequences; the others choose lambda.

    They are drawn to the regression of each head, put through the teacher's `projection`, or, without one, to what the
    mixer has.
    """
    moments: tuple[Moments, Moments] | None = None
    for x_NTD, target_NTD, heads_NTC in lessons:
        tokens = (regressors(mixer, x_NTD, rotary), target_NTD, heads_NTC)
        moments = moments or (Moments.empty(*tokens), Moments.empty(*tokens))
        for part, moment in zip((slice(0, fitted), slice(fitted, None)), moments, strict=True):
            if len(x_NTD[part]):
                moment.add(*(each[part] for each in tokens))
        fitted = max(0, fitted - len(x_NTD))
    assert moments is not None, "there are sequences"
    prior = own_weights(mixer) if projection is None else head_weights(mixer, projection, moments[0])
    weight, fit = ridge(*moments, prior, lambdas)
    write_outputs(mixer, weight.to(mixer.o_proj.weight.dtype))
    return fit


def head_weights(mixer: FastWeightLayer, projection: nn.Linear, fit: Moments) -> Tensor:
    """W0 [R, D]: every head of the teacher from its own regressors, then the teacher's output projection."""
    prior = torch.zeros_like(fit.cross)
    V = mixer.options.value_head_dim
    for head, own in enumerate(own_regressors(mixer)):
        columns = slice(head * V, (head + 1) * V)
        gram = fit.gram[own][:, own].double()
        diagonal = gram.diagonal()
        diagonal.mul_(1 + HEAD_LAMBDA).add_(1e-9 * diagonal.mean())
        weight = torch.linalg.solve(gram, fit.heads[own, columns].double())
        prior[own] += weight.to(prior.dtype) @ projection.weight[:, columns].mT
    if mixer.options.o_bias and projection.bias is not None:
        prior[-1] += projection.bias
    return prior


def own_regressors(mixer: FastWeightLayer) -> list[Tensor]:
    """Per query head, the indices of the regressors that belong to it: its reads, the window's among them, its group's
    values, and 1."""
    options = mixer.options
    V, queries, values = options.value_head_dim, options.num_attention_heads, options.num_value_heads or 1
    reads = options.output_width
    total = reads + options.value_skip * values * V
    found = []
    for head in range(queries):
        blocks = [(m * queries + head) * V for m in range(reads // (queries * V))]
        blocks += [reads + (j * values + head * values // queries) * V for j in range(options.value_skip)]
        own = [start + i for start in blocks for i in range(V)]
        found.append(torch.tensor([*own, total] if options.o_bias else own))
    return found


def regressors(mixer: FastWeightLayer, x_NTD: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """What the mixer's output is a linear function of: its reads, skipped values and, with o_bias, 1."""
    reads = mixer.mixed_reads(x_NTD, position_embeddings=rotary)
    return torch.cat([reads, torch.ones_like(reads[..., :1])], dim=-1) if mixer.options.o_bias else reads


def write_outputs(mixer: FastWeightLayer, weight_RD: Tensor) -> None:
    """Split the weights of all regressors into o_proj, skip_proj and the bias."""
    width = mixer.o_proj.in_features
    mixer.o_proj.weight.copy_(weight_RD[:width].mT)
    if mixer.options.o_bias:
        mixer.o_proj.bias.copy_(weight_RD[-1])
    if mixer.options.value_skip:
        mixer.skip_proj.weight.copy_(weight_RD[width : width + mixer.skip_proj.in_features].mT)


def own_weights(mixer: FastWeightLayer) -> Tensor:
    """The weights [R, D] of all regressors that the mixer has: what write_outputs writes."""
    parts = [mixer.o_proj.weight.mT]
    parts += [mixer.skip_proj.weight.mT] if mixer.options.value_skip else []
    parts += [mixer.o_proj.bias[None]] if mixer.options.o_bias else []
    return torch.cat(parts)


def _remember_options(student: PreTrainedModel, layer: int) -> None:
    """What calibration decided about a mixer's shape goes into the config it will be reloaded from."""
    options: Sequence[bool] | str = layers_of(student)[layer].options.rope_heads
    per_layer = student.config.fwp.setdefault("per_layer", {}).setdefault(str(layer), {})
    per_layer["rope_heads"] = options if isinstance(options, str) else list(options)

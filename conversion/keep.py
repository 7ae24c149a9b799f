"""Which layers stay softmax: ranked by what converting each of them alone does to the predictions.

    KL_l = exp mean_n log mean_t KL( teacher(. | x_<t) || teacher with its attention in layer l replaced by the mixer )

measured at every fourth token t after the mixers are solved; the layers with the largest KL are kept. Sequences differ
more than tokens of one do, and the output head costs as much as the walk there: with fewer tokens of each there is time
for more of them. The geometric mean over sequences n foretells the ranks on other text better than the mean, which one
odd sequence can decide. With `recall` the same KL counts on a probe too: tokens of the text in a drawn order, then once
more, where only looking back can tell what comes next.
Ranked layers beat evenly spaced ones by far (SmolLM2-135M, half of the layers kept: perplexity 44 against 53).

`keep` is a fraction (0.25) or a count (7), both ranked; "recall:0.25", ranked with the probe of recall, which takes
twice as long; a list of layers; or "uniform:0.25", evenly spaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real
from statistics import geometric_mean
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_fwp.hosts import converted_layers
from hf_fwp.layer import layers_of
from hf_fwp.telling import progress_bar

from .families import copy_teacher
from .stream import Visit, Walk, every, logits

EVERY = 4  # tokens, of which one is measured
LEAST = 1e-9  # nats: a KL that is less is rounding
POSITIONS = 64  # tokens whose probabilities are computed at once

Keep = float | int | Sequence[int] | str
ALLOWED = 'a fraction (0.25), a count (7), "recall:0.25", a list of layers ([0, 5]) or "uniform:0.25"'
FOR_RECALL = "recall:"


def plain_keep(keep: Keep) -> Keep:
    """The same in Python's own numbers, where numpy's were given; what is no `keep` as it is."""
    if isinstance(keep, bool | str):
        return keep
    if isinstance(keep, Sequence):
        return [int(i) if isinstance(i, Integral) and not isinstance(i, bool) else i for i in keep]
    given: Any = keep
    return int(given) if isinstance(given, Integral) else float(given) if isinstance(given, Real) else keep


def kept_count(keep: Keep, num_layers: int) -> int | None:
    """How many layers are to be kept by rank; None where `keep` names them itself. A wrong `keep` is refused."""
    keep = plain_keep(keep)
    if for_recall(keep):
        return _named_share(keep, num_layers)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        kept_layers(keep, num_layers)
        return None
    if isinstance(keep, int):
        if not 0 <= keep <= num_layers:
            raise ValueError(f"keep is {keep} layers, but the model has {num_layers}; give {ALLOWED}")
        return keep
    return _share(keep, num_layers, given=keep)


def for_recall(keep: Keep) -> TypeGuard[str]:
    """Whether layers are to be ranked by what they are worth for recall, too."""
    return isinstance(keep, str) and keep.startswith(FOR_RECALL)


def kept_layers(keep: Keep, num_layers: int) -> list[int]:
    """The layers that a list or "uniform:..." names."""
    keep = plain_keep(keep)
    if isinstance(keep, str):
        count = _named_share(keep, num_layers)
        if not keep.startswith("uniform:"):
            raise ValueError(f"keep is {keep!r}; give {ALLOWED}")
        # the middle of each of `count` equal parts
        return [int((i + 0.5) * num_layers / count) for i in range(count)]
    if isinstance(keep, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in keep):
        outside = [i for i in keep if not 0 <= i < num_layers]
        if outside or len(set(keep)) != len(keep):
            what = f"{outside} are not layers of it" if outside else "a layer is named twice"
            raise ValueError(f"keep is {list(keep)}; the model has layers 0 to {num_layers - 1}: {what}")
        return sorted(keep)
    raise ValueError(f"keep is {keep!r}; give {ALLOWED}")


def _named_share(keep: str, num_layers: int) -> int:
    """How many layers "uniform:0.25" or "recall:0.25" says."""
    try:
        return _share(float(keep.partition(":")[2]), num_layers, given=keep)
    except ValueError as error:
        raise ValueError(f"keep is {keep!r}; give {ALLOWED}") from error


def _share(share: float, num_layers: int, *, given: Keep) -> int:
    if not 0 <= share <= 1:
        raise ValueError(f"keep is {given!r}; a fraction lies between 0 (none stays softmax) and 1 (all do)")
    return round(share * num_layers)


@torch.no_grad()
def rank_layers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    ids_NT: Tensor,
    *,
    recall: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    visit: Visit = every,
) -> dict[int, float]:
    """KL in nats per token that each converted layer of `student` causes when it is swapped in alone: the geometric
    mean over the sequences.

    `recall`: times the KL on a probe of recall, drawn by `seed`, that is added to each. visit: as in solve. All streams
    with a layer swapped in, of which there are as many as layers, walk through the decoder side by side.
    """
    texts, half = len(ids_NT), ids_NT.shape[1] // 2
    if recall:
        ids_NT = torch.cat([ids_NT, recall_probe(ids_NT, seed=seed)])
    count, layers = len(ids_NT), list(converted_layers(student.config))
    walk, one = Walk(teacher, ids_NT), Walk(teacher, ids_NT[:1])
    swapped = walk.times(len(layers))
    turn = progress_bar(range(len(walk.blocks)), desc="rank", unit="layer", progress=progress)
    for layer in visit(turn, [walk, swapped], {}):
        done = count * sum(before < layer for before in layers)
        swapped.move(layer, done)
        for row in range(count) if layer in layers else ():
            one.hidden_NTD = walk.hidden_NTD[row : row + 1].clone()
            answer, *_ = layers_of(student)[layer](one.inputs(layer), position_embeddings=walk.rotary(layer))
            one.advance(layer, answer)
            swapped.hidden_NTD[done + row] = one.hidden_NTD[0]
        walk.move(layer)
    costs = {layer: [0.0] * texts for layer in layers}
    for row in range(count):
        part = slice(None, None, EVERY) if row < texts else slice(half, 2 * half - 1, EVERY)
        weight = 1.0 if row < texts else recall
        truth = list(_log_probabilities(teacher, _finished(walk, row, part)))
        for place, layer in enumerate(layers):
            answers = _log_probabilities(teacher, _finished(swapped, place * count + row, part))
            pairs = zip(answers, truth, strict=True)
            kl = sum(float(F.kl_div(q, p, log_target=True, reduction="sum")) for q, p in pairs)
            costs[layer][row % texts] += weight * kl / sum(map(len, truth))
    return {layer: geometric_mean(max(cost, LEAST) for cost in each) for layer, each in costs.items()}


def _finished(walk: Walk, row: int, part: slice) -> Tensor:
    """[1, t, D]: the final hidden states of one sequence that has gone through all blocks."""
    return walk.finish(len(walk.blocks), walk.hidden_NTD[row : row + 1])[:, part]


def recall_probe(ids_NT: Tensor, *, seed: int = 0) -> Tensor:
    """[N, T]: the first half of each sequence in a drawn order, and the same again; nothing else foretells it."""
    half = ids_NT.shape[1] // 2
    if half < 2:
        raise ValueError(f"sequences of {ids_NT.shape[1]} tokens are too short to recall from; give at least 4")
    generator = torch.Generator().manual_seed(seed)
    said = torch.stack([ids_T[:half][torch.randperm(half, generator=generator)] for ids_T in ids_NT])
    return said.repeat(1, 3)[:, : ids_NT.shape[1]]


def most_needed(ranking: dict[int, float], count: int) -> list[int]:
    """The `count` layers that hurt most when they are converted."""
    return sorted(sorted(ranking, key=lambda layer: ranking[layer], reverse=True)[:count])


def keep_softmax(
    student: PreTrainedModel, teacher: PreTrainedModel, kept: Iterable[int], *, share: bool = False
) -> PreTrainedModel:
    """A student whose layers `kept` are the teacher's again; its other mixers are those of `student`."""
    layers = [layer for layer in converted_layers(student.config) if layer not in set(kept)]
    smaller = copy_teacher(teacher, layers=layers, fwp=options_of(student, layers), share=share)
    for layer in layers:
        layers_of(smaller)[layer].load_state_dict(layers_of(student)[layer].state_dict())
    return smaller


def options_of(student: PreTrainedModel, layers: Iterable[int]) -> dict[str, Any]:
    """The mixer options of a student that is like this one in these of its layers."""
    config: Any = student.config
    fwp, wanted = {name: value for name, value in config.fwp.items() if name != "layers"}, set(layers)
    return {**fwp, "per_layer": {layer: said for layer, said in fwp["per_layer"].items() if int(layer) in wanted}}


def _log_probabilities(model: PreTrainedModel, hidden_NTD: Tensor) -> Iterator[Tensor]:
    """[POSITIONS, V] after [POSITIONS, V] of all tokens in a row."""
    return (logits(model, part).float().log_softmax(-1) for part in hidden_NTD.flatten(0, 1).split(POSITIONS))

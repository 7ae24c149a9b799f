"""How well models foretell held-out tokens, several of them side by side.

    perplexity = exp( mean_t -log p_student(x_t | x_<t) )
    KL         = mean_t sum_v p_teacher(v) log( p_teacher(v) / p_student(v) ), in nats per token
    agreement  = how often both give the same most likely next token

Streamed sequence by sequence: the logits of one sequence of each model are all that is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_fwp.telling import progress_bar

from .data import demo_corpus, read_data, token_blocks

Forward = Callable[[Tensor], Tensor]  # ids [1, T] -> logits [1, T, V]

POSITIONS = 128  # log-probabilities are compared this many positions at a time: temporaries stay small


def heldout_blocks(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int = 16384,
    sequence_length: int = 512,
) -> Tensor:
    """Token ids [N, sequence_length] to measure on, from text as in `convert`, of splits the one named "test"; ids are
    taken as they are."""
    if isinstance(data, Tensor):
        if data.ndim != 2 or data.is_floating_point() or not len(data) or data.shape[1] < 2:
            raise ValueError(
                f"token ids have the shape {tuple(data.shape)} and dtype {data.dtype}; give [N, T] of ints, T at least "
                "2: the first token of a sequence is not foretold"
            )
        if int(data.min()) < 0:
            raise ValueError(f"token {int(data.min())} is among the token ids; give ids of 0 and more, without padding")
        return data
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; give at least one to measure on")
    if tokenizer is None:
        raise ValueError("the model comes without a tokenizer; give tokenizer=, or its folder in place of the model")
    texts = demo_corpus()[2] if data is None else read_data(data, split="test")
    return token_blocks(texts, tokenizer, sequence_length=sequence_length, tokens=tokens)


def forward_of(model: PreTrainedModel) -> Forward:
    """Logits of a batch of ids, in evaluation mode, on the model's own device."""

    def forward(ids_BT: Tensor) -> Tensor:
        with evaluating(model):
            return model(input_ids=ids_BT.to(model.device), use_cache=False).logits

    return forward


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside."""
    with torch.no_grad(), without_dropout(*models):
        yield


@contextmanager
def without_dropout(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode inside; afterwards each module is in the mode it was in."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass
class Scores:
    """Sums over the predicted tokens of one model."""

    loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    predicted: int = 0

    def add(self, log_p_TV: Tensor, labels_T: Tensor, log_teacher_TV: Tensor | None) -> None:
        """One sequence: log-probabilities of the model and of the teacher at each position, and what came next."""
        self.predicted += labels_T.numel()
        self.loss += F.nll_loss(log_p_TV, labels_T.to(log_p_TV.device), reduction="sum").item()
        if log_teacher_TV is None:
            return
        for ours, theirs in zip(log_p_TV.split(POSITIONS), log_teacher_TV.split(POSITIONS), strict=True):
            theirs = theirs.to(ours.device)
            self.kl += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
            self.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        return torch.tensor(self.loss / self.predicted, dtype=torch.float64).exp().item()


def compare(
    models: Mapping[str, Forward],
    teacher: Forward | None,
    ids_NT: Tensor,
    *,
    progress: bool = True,
    description: str = "perplexity",
) -> dict[str, dict[str, Any]]:
    """Measurements of several models on the same tokens, with a single pass of the teacher for all of them."""
    scores = {name: Scores() for name in models}
    of_teacher = Scores()
    for ids_T in tokens_shown(ids_NT, progress=progress, description=description):
        labels_T = ids_T[1:]
        expected = None
        if teacher is not None:
            expected = _log_probabilities(teacher, ids_T)
            of_teacher.add(expected, labels_T, None)
        for name, model in models.items():
            scores[name].add(_log_probabilities(model, ids_T), labels_T, expected)
    found = {}
    for name, score in scores.items():
        found[name] = {"perplexity": score.perplexity, "tokens": ids_NT.numel(), "sequence_length": ids_NT.shape[1]}
        if teacher is not None:
            found[name] |= {
                "teacher_perplexity": of_teacher.perplexity,
                "ratio": score.perplexity / of_teacher.perplexity,
                "kl": score.kl / score.predicted,
                "agreement": score.agreed / score.predicted,
            }
    return found


def _log_probabilities(model: Forward, ids_T: Tensor) -> Tensor:
    """[T - 1, V]: of the next token at every position that has one, in float32 (float64 for a float64 model)."""
    with torch.no_grad():
        logits_TV = model(ids_T[None])[0, :-1]
        return logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)).log_softmax(-1)


def tokens_shown(ids_NT: Tensor, *, progress: bool, description: str) -> Iterator[Tensor]:
    """The sequences one by one, with a bar that counts tokens and estimates the time left."""
    with progress_bar(total=ids_NT.numel(), desc=description, unit="tok", unit_scale=True, progress=progress) as bar:
        for ids_T in ids_NT:
            yield ids_T
            bar.update(ids_T.numel())

"""The main job, start to end: a real softmax checkpoint in, a fast-weight model out, both measured side by side."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_fwp.telling import say

from .convert import convert
from .data import demo_corpus, token_blocks
from .report import write_report
from .scores import evaluating
from .teacher import smollm2_gguf


def demo(
    teacher: Any = None,
    *,
    rule: str = "gated_delta_net",
    keep: float | int | list[int] | str = 0.5,
    recipe: str = "closed-form",
    output: str | Path = "out/demo",
    seed: int = 0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Convert `teacher` (default: SmolLM2-135M-Instruct), save, reload, measure; returns the report it wrote.

    dry_run: print the plan, and return nothing.
    """
    started = time.perf_counter()
    teacher = smollm2_gguf() if teacher is None else teacher
    corpus, train, heldout = demo_corpus()
    data = {"train": train, "test": heldout}
    asked: dict[str, Any] = {"rule": rule, "keep": keep, "recipe": recipe, "data": data, "output": output}
    converted: Any = convert(teacher, **asked, resume=not dry_run, seed=seed, dry_run=dry_run)
    if dry_run:
        say(f"  text: {corpus}; the model is measured, and saved with its report in {output}")
        return {}
    conversion_s = time.perf_counter() - started
    student = AutoModelForCausalLM.from_pretrained(output, dtype=converted.dtype)
    report: dict[str, Any] = {
        **converted.conversion_report,
        "data": corpus,
        "reloaded_bitwise": same_logits(converted, student, AutoTokenizer.from_pretrained(output), heldout),
        "conversion_s": conversion_s,
    }
    return write_report(output, {**report, "total_s": time.perf_counter() - started})


def same_logits(
    model: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> bool:
    """Whether two models give bit for bit the same logits on the first tokens of the texts."""
    ids_BT = token_blocks(texts, tokenizer, sequence_length=64, tokens=64)
    with evaluating(model, other):
        logits = [each(input_ids=ids_BT.to(each.device)).logits.cpu() for each in (model, other)]
    return torch.equal(*logits)

"""The main job, start to end: a real softmax checkpoint in, a fast-weight model out, both measured side by side."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .convert import convert
from .data import demo_corpus, token_blocks
from .evaluate import evaluate
from .teacher import load_teacher, smollm2_gguf

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three fruits.",
)


def demo(
    teacher: Any = None,
    *,
    rule: str = "gated_delta_net",
    keep: float | int | list[int] | str = 0.5,
    recipe: str = "closed-form",
    output: str | Path = "out/demo",
    tokens: int = 16384,
    new_tokens: int = 40,
    seed: int = 0,
) -> dict[str, Any]:
    """Convert `teacher` (default: SmolLM2-135M-Instruct), save, reload, compare; returns what `hf-fwp demo` prints."""
    started = time.perf_counter()
    teacher = smollm2_gguf() if teacher is None else teacher
    corpus, train, heldout = demo_corpus()
    converted = convert(teacher, rule=rule, keep=keep, recipe=recipe, data=train, output=output, seed=seed)
    converted_s = time.perf_counter() - started
    student = AutoModelForCausalLM.from_pretrained(output, dtype=converted.dtype)
    original, tokenizer = load_teacher(teacher)
    if tokenizer is None:
        raise ValueError(
            "the teacher comes without a tokenizer; give its folder, Hub id or GGUF file instead of the model"
        )
    return {
        "corpus": corpus,
        "rule": rule,
        "recipe": recipe,
        "output": str(output),
        "report": str(Path(output) / "report.html"),
        "conversion_s": converted_s,
        "reload_is_bitwise_equal": _same_logits(converted, student, tokenizer, heldout),
        "evaluation": evaluate(student, against=original, data=heldout, tokens=tokens, tokenizer=tokenizer),
        "samples": [_answers(prompt, original, student, tokenizer, new_tokens) for prompt in PROMPTS],
        "total_s": time.perf_counter() - started,
    }


@torch.no_grad()
def _same_logits(
    converted: PreTrainedModel, reloaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> bool:
    ids = token_blocks(texts, tokenizer, sequence_length=64, tokens=64)
    return torch.equal(converted.eval()(ids.to(converted.device)).logits.cpu(), reloaded.eval()(ids).logits)


def _answers(
    prompt: str,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
) -> dict[str, str]:
    return {
        "prompt": prompt,
        "teacher": _answer(prompt, teacher, tokenizer, new_tokens),
        "student": _answer(prompt, student, tokenizer, new_tokens),
    }


def _answer(prompt: str, model: Any, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> str:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

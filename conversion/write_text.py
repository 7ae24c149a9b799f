"""Text that a model writes itself: to convert it with where there is no other, or not enough of it.

    x_{t+1} ~ softmax(logits_t / temperature)        after a few tokens from anywhere in a given text

What distil asks of the student is the teacher's own distribution, and there it is measured where the teacher goes.
A batch is drawn from the seed and its number alone, so that a run that goes on writes the same texts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_fwp.estimates import peak_memory, size
from hf_fwp.files import write_whole
from hf_fwp.telling import progress_bar, say

from .checkpoint import check_settings, told_when_full
from .data import demo_corpus, read_data
from .evaluate import Model, open_model, without_weights
from .plan import token_count
from .positions import check_positions
from .scores import evaluating
from .seeds import check_seed
from .tokens import labelled_blocks

SETTINGS, TEXTS = "settings.json", "texts.jsonl"
PROMPTED = 2**20  # tokens of the given text, at least, from anywhere in which a prompt is taken
SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0}  # from all of the distribution


def write_text(
    model: Model,
    output: str | os.PathLike[str],
    *,
    tokens: int | str,
    data: Any = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    length: int = 512,
    prompt_tokens: int = 8,
    batch_size: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
    resume: bool = False,
    progress: bool = True,
    dry_run: bool = False,
) -> Path:
    """Write `tokens` tokens (200000, "200k", "40M") of the model's own text to `output`, a .jsonl file for `data=`.

    Texts have at most `length` tokens, the first `prompt_tokens` of which come from `data` (as in `convert`; without it
    the demo's corpus), of which as many tokens are read as are to be written, or 2^20 if that is more. A line is
    {"text", "tokens"}. Until it is whole, the file is in OUTPUT.partial; `resume` goes on there. dry_run: say what
    would be written. Raises ValueError for an output that is there already or is no .jsonl, a model without a tokenizer
    or with fewer positions than `length`, and prompts that leave no room for text.
    """
    output = Path(output)
    work = output.with_name(f"{output.name}.partial")
    count = token_count(tokens, what="tokens")
    _check(output, work, length=length, prompt_tokens=prompt_tokens, batch_size=batch_size, resume=resume)
    check_seed(seed)
    if dry_run:
        empty = without_weights(model, dtype)
        check_positions(empty, length, what="length")
        _show_plan(empty, output, count, length=length, batch_size=batch_size)
        return output
    writer, words = open_model(model, tokenizer=tokenizer, device=device, dtype=dtype)
    check_positions(writer, length, what="length")
    if words is None:
        raise ValueError("the model comes without a tokenizer; give tokenizer=, or its folder in place of the model")
    texts = demo_corpus()[1] if data is None else read_data(data)
    prompts = {"sequence_length": prompt_tokens, "tokens": max(count, PROMPTED), "at_least": prompt_tokens}
    prompts_NP, _ = labelled_blocks(texts, words, **prompts, labelled=False)
    settings = {
        "model": str(writer.name_or_path),
        "tokens": count,
        "prompts": [*prompts_NP.shape, int(prompts_NP.sum())],
        "length": length,
        "batch_size": batch_size,
        "temperature": temperature,
        "seed": seed,
    }
    work.mkdir(parents=True, exist_ok=True)
    if (work / SETTINGS).is_file():
        check_settings(json.loads((work / SETTINGS).read_text()), settings, folder=work)
    write_whole(work / SETTINGS, json.dumps(settings))
    with told_when_full(work):
        _write(writer, words, prompts_NP, work / TEXTS, settings, progress=progress)
    os.replace(work / TEXTS, output)
    shutil.rmtree(work)
    return output


def _show_plan(model: PreTrainedModel, output: Path, tokens: int, *, length: int, batch_size: int) -> None:
    """What would be written; neither weights nor text are read."""
    held = size((peak_memory() or 0) + model.num_parameters() * model.dtype.itemsize)
    told = f"write {tokens} tokens of {model.name_or_path} to {output}, texts of at most {length}"
    say(f"{told}, {batch_size} at a time; {held}, and a cache for so many texts")


def _check(output: Path, work: Path, *, length: int, prompt_tokens: int, batch_size: int, resume: bool) -> None:
    if output.suffix != ".jsonl":
        raise ValueError(f"{output} is no .jsonl file; name it so, for --data takes it as that")
    if output.exists():
        raise ValueError(f"{output} is there already; give another file, or delete it")
    if work.exists() and not resume:
        raise ValueError(f"{work} holds an earlier run; give resume=True (--resume) to continue it, or delete it")
    if not 2 <= prompt_tokens < length:
        raise ValueError(f"prompts of {prompt_tokens} tokens in texts of {length}: give at least 2, and less than that")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; give how many texts are written at a time, 1 or more")


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_NP: Tensor,
    file: Path,
    settings: dict[str, Any],
    *,
    progress: bool,
) -> None:
    """Batch after batch to the end of the file, until it holds enough."""
    batch, seed = settings["batch_size"], settings["seed"]
    order = torch.randperm(len(prompts_NP), generator=torch.Generator().manual_seed(seed))
    written = _whole_batches(file, batch)
    done, number = sum(written), len(written) // batch
    show = {"total": settings["tokens"], "unit": "tok", "unit_scale": True, "progress": progress}
    with progress_bar(**show, initial=done, desc="write text") as bar, file.open("a", encoding="utf-8") as lines:
        while done < settings["tokens"]:
            at = torch.arange(number * batch, (number + 1) * batch) % len(order)
            rows = list(_continued(model, tokenizer, prompts_NP[order[at]], settings, seed=seed * 1_000_003 + number))
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            lines.flush()
            number, before = number + 1, done
            done += sum(row["tokens"] for row in rows)
            bar.update(min(done, settings["tokens"]) - min(before, settings["tokens"]))


def _whole_batches(file: Path, batch_size: int) -> list[int]:
    """The tokens of each text that is there; what a kill has left of a batch is cut off."""
    if not file.is_file():
        return []
    # bytes: a kill may halve a character, and str.splitlines ends a line at ten of them, U+2028 among them
    lines = file.read_bytes().split(b"\n")[:-1]
    lines = lines[: len(lines) // batch_size * batch_size]
    tokens = [json.loads(line)["tokens"] for line in lines]
    os.truncate(file, sum(len(line) + 1 for line in lines))
    return tokens


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_BP: Tensor,
    settings: dict[str, Any],
    *,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Each prompt with what the model says after it, up to where it ends."""
    devices = [model.device] if model.device.type == "cuda" else []
    generate: Any = model.generate
    with evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        ids_BP, ends = prompts_BP.to(model.device), tokenizer.eos_token_id
        out_BT = generate(
            input_ids=ids_BP,
            attention_mask=torch.ones_like(ids_BP),
            max_length=settings["length"],
            temperature=settings["temperature"],
            **SAMPLING,
            pad_token_id=ends,
            eos_token_id=ends,
        )
    for ids_T in out_BT.tolist():
        said = ids_T[prompts_BP.shape[1] :]
        said = said[: said.index(ends)] if ends in said else said
        whole = [*ids_T[: prompts_BP.shape[1]], *said]
        yield {"text": tokenizer.decode(whole, skip_special_tokens=True), "tokens": len(whole)}

"""What a server would give: tokens per second of a model and its teacher, after contexts of many lengths.

    prefill    tokens of the context per second, the cache included
    decode     tokens per second after it, one by one, in all rows together

Both models get the same random tokens, one after the other in one process. The median of the repeats counts.
"""

from __future__ import annotations

import importlib
import json as jsonlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.table
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..architecture import refuse_named_heads
from ..dtypes import parse_device
from ..estimates import duration, empty_model, seconds_per_token, size
from ..telling import say, tell
from .cpu import machine

CONTEXTS = (512, 2048, 8192, 32768)
HEADER = ("context", "batch", "prefill tokens/s", "teacher's", "decode tokens/s", "teacher's", "cache MiB", "teacher's")


def bench_serve(
    model: str | Path,
    *,
    against: str | Path,
    contexts: Sequence[int] = CONTEXTS,
    batch: int = 1,
    new_tokens: int = 32,
    repeats: int = 3,
    device: str | None = None,
    json: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Time both models at every length of context; print a table, and write it to `json` when given.

    `model` and `against` are folders, Hub ids or GGUF files.
    dry_run: print what would be timed, the weights that are held and on a CPU the least it takes; return nothing.

    Raises:
        ValueError: a number below 1, or no context.
    """
    smallest = min([batch, new_tokens, repeats, *contexts], default=0)
    if not contexts or smallest < 1:
        raise ValueError(
            f"contexts are {list(contexts)}, batch {batch}, new_tokens {new_tokens} and repeats {repeats}; give at "
            "least one context, and numbers of at least 1"
        )
    place = parse_device(device, here=not dry_run) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dry_run:
        _say_plan(model, against, tokens=batch * sum(contexts) * (repeats + 1), contexts=contexts, place=place)
        return {}
    rows: dict[int, dict[str, Any]] = {length: {"context": length, "batch": batch} for length in contexts}
    for prefix, source in (("", model), ("teacher_", against)):
        loaded = with_weights(source).to(place).eval()
        for length, row in rows.items():
            measured = time_model(loaded, length, batch=batch, new_tokens=new_tokens, repeats=repeats)
            row |= {f"{prefix}{name}": value for name, value in measured.items()}
        del loaded
    about = machine(torch.get_num_threads()) | {"device": device_name(place)}
    about |= {"model": told(model), "teacher": told(against)}
    result = {"machine": about, "new_tokens": new_tokens, "repeats": repeats, "rows": list(rows.values())}
    tell(table(result))
    if json is not None:
        Path(json).write_text(jsonlib.dumps(result, indent=2) + "\n")
    return result


def _say_plan(
    model: str | Path, against: str | Path, *, tokens: int, contexts: Sequence[int], place: torch.device
) -> None:
    models = [without_weights(source) for source in (model, against)]
    held = size(max(each.num_parameters() * each.dtype.itemsize for each in models))
    least = "" if place.type != "cpu" else f", at least {duration(tokens * sum(map(seconds_per_token, models)))}"
    lengths = ", ".join(map(str, contexts))
    say(f"{model} beside {against} on {place} after {lengths} tokens: {held} of weights at once{least}")


def told(source: str | Path) -> str:
    """A Hub id as it is, of a folder or file its name: where it lies says nothing on another machine."""
    return Path(source).resolve().name if Path(source).exists() else str(source)


def with_weights(source: str | Path) -> Any:
    if str(source).endswith(".gguf"):
        return _from_gguf(source)
    refuse_named_heads(AutoConfig.from_pretrained(str(source)), source)
    return AutoModelForCausalLM.from_pretrained(str(source), dtype="auto")


def without_weights(source: str | Path) -> PreTrainedModel:
    """The same on the device "meta": it has shapes, and takes no memory."""
    if str(source).endswith(".gguf"):
        return _from_gguf(source, weights=False)
    return empty_model(AutoConfig.from_pretrained(str(source)))


def _from_gguf(source: str | Path, **settings: bool) -> Any:
    return importlib.import_module("hf_fwp.conversion.teacher").load_teacher(source, **settings)[0]


@torch.no_grad()
def time_model(model: PreTrainedModel, length: int, *, batch: int, new_tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second and bytes of the cache; one unmeasured round goes before."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    prefill, decode, kept = [], [], 0
    for turn in range(repeats + 1):
        out, seconds = timed_prefill(model, ids)
        cache, later = timed_decode(model, out, new_tokens)
        kept = cache_bytes(cache)
        if turn:
            prefill.append(batch * length / seconds)
            decode.append(batch * new_tokens / later)
    speeds = {"prefill": statistics.median(prefill), "decode": statistics.median(decode)}
    return speeds | {"cache_bytes": float(kept)}


def timed_prefill(model: Any, ids: Tensor) -> tuple[Any, float]:
    start = now(ids.device)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return out, now(ids.device) - start


def timed_decode(model: Any, out: Any, count: int) -> tuple[Any, float]:
    """The cache after `count` greedy tokens, and the seconds they took."""
    device = out.logits.device
    start = now(device)
    for _ in range(count):
        token_B1 = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token_B1, past_key_values=out.past_key_values, use_cache=True)
    return out.past_key_values, now(device) - start


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cache_bytes(cache: Any) -> int:
    """Bytes of every tensor that the layers of a cache keep."""
    found = 0
    for layer in cache.layers:
        tensors = [*getattr(layer, "states", {}).values(), getattr(layer, "keys", None), getattr(layer, "values", None)]
        found += sum(x.nbytes for x in tensors if isinstance(x, Tensor))
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def table(result: dict[str, Any]) -> rich.table.Table:
    about = result["machine"]
    found = rich.table.Table(title=f"{about['model']} beside {about['teacher']} on {about['device']}, {about['cpu']}")
    for column in HEADER:
        found.add_column(column)
    for row in result["rows"]:
        speeds = [f"{row[name]:.0f}" for name in ("prefill", "teacher_prefill")]
        speeds += [f"{row[name]:.1f}" for name in ("decode", "teacher_decode")]
        kept = [f"{row[name] / 2**20:.2f}" for name in ("cache_bytes", "teacher_cache_bytes")]
        found.add_row(str(row["context"]), str(row["batch"]), *speeds, *kept)
    return found

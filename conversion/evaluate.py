"""What a model is worth: measured on held-out tokens, next to the teacher it was made from.

scores     perplexity, KL, agreement (scores.py), of the model and of parts of it (baselines.py)
followed   how far the model writes what its teacher writes (greedy.py)
residual   sum_t ||y_t - A_t||^2 / sum_t ||A_t||^2, mixer output y and attention output A on the teacher's inputs
speed      seconds to read a context, tokens per second after it, bytes that are kept
samples    what both answer
recall     what both still find in their context (recall.py)
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_fwp.architecture import refuse_named_heads
from hf_fwp.dtypes import parse_device, parse_dtype
from hf_fwp.estimates import duration, peak_memory, seconds_per_token, size
from hf_fwp.hosts import HOSTS
from hf_fwp.layer import layers_of
from hf_fwp.telling import progress_bar, say
from hf_fwp.weights import check_weights

from .baselines import parts_off
from .composite import text_config_of
from .greedy import GIVEN, TEXTS, WRITTEN, followed
from .hooks import hooked
from .positions import check_positions, positions_of
from .recall import LENGTHS, recall
from .scores import compare, evaluating, forward_of, heldout_blocks, tokens_shown
from .teacher import empty_teacher, find_config, load_teacher
from .tokens import check_ids

Model = PreTrainedModel | str | os.PathLike[str]

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three fruits.",
)


def evaluate(
    model: Model,
    *,
    against: Model | None = None,
    data: Any = None,
    tokens: int = 16384,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    sequence_length: int = 512,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
    parts: bool = False,
    needles: int = 4,
    progress: bool = True,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Perplexity of `model`, and with `against` the teacher's on the same tokens, KL, agreement and how far
    the teacher's greedy text is followed; recall of both.

    `model` and `against` are models, folders, Hub ids or GGUF files; `device` and `dtype` are for what is loaded.
    `data` is held-out text as in `convert`, or token ids [N, T]; without it the demo's held-out corpus. parts: measure
    the model without its fast weights and without its windows too, as "fast_weights_off" and "window_off": one that is
    no worse without them has learned to do without. needles: texts of each kind to recall from (0: none; there are none
    without a tokenizer). dry_run: print what it takes, and return nothing.
    """
    if dry_run:
        models = [without_weights(each, dtype) for each in (model, against) if each is not None]
        _check_lengths(models, data, sequence_length)
        _show_plan(models, data, tokens=tokens, recalled=needles * sum(LENGTHS) + TEXTS * (GIVEN + WRITTEN))
        return {}
    model, words = open_model(model, tokenizer=tokenizer, device=device, dtype=dtype)
    opened = {"model": model}
    if against is not None:
        opened["teacher"], teachers = open_model(against, tokenizer=tokenizer, device=device, dtype=dtype)
        words = words or teachers
        _check_vocabularies(model, opened["teacher"])
    _check_lengths(opened.values(), data, sequence_length)
    ids_NT = heldout_blocks(data, words, tokens=tokens, sequence_length=sequence_length)
    for name, each in opened.items():
        check_ids(each, [ids_NT], who=f"the {name}")
    models = {"model": forward_of(model), **(parts_off(model) if parts else {})}
    teacher = forward_of(opened["teacher"]) if against is not None else None
    found: dict[str, Any] = compare(models, teacher, ids_NT, progress=progress)
    if against is not None:
        found["model"]["followed"] = followed(model, opened["teacher"], ids_NT, progress=progress)
    if needles and words is not None:
        found["recall"] = recall(opened, words, needles=needles, progress=progress)
    return {**found.pop("model"), **found}


def _show_plan(models: Sequence[PreTrainedModel], data: Any, *, tokens: int, recalled: int) -> None:
    """What would be measured; neither weights nor text are read."""
    _check_vocabularies(models[0], models[-1])
    if isinstance(data, Path) and not data.exists():
        raise ValueError(f"there is no data at {data}; give a file, or a folder with a dataset")
    count = data.numel() if isinstance(data, Tensor) else tokens
    takes = duration((count + recalled) * sum(map(seconds_per_token, models)))
    held = size((peak_memory() or 0) + sum(each.num_parameters() * each.dtype.itemsize for each in models))
    named = " beside ".join(str(each.name_or_path) for each in models)
    say(f"evaluate {named} on {count} tokens: {takes} on this processor, {held}")


def without_weights(model: Model, dtype: torch.dtype | str) -> PreTrainedModel:
    """What tells how large a model is, as fast as its config is read."""
    if isinstance(model, nn.Module):
        return model
    if str(model).endswith(".gguf"):
        return load_teacher(model, dtype=dtype, weights=False)[0]
    return empty_teacher(os.fspath(model), dtype=parse_dtype(dtype))


def open_model(
    model: Model,
    *,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Any model, converted or not, and its tokenizer if it has one. A model object is returned as it is."""
    device = parse_device(device) or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(model, nn.Module):
        return model, _open_tokenizer(tokenizer, model.name_or_path or "")
    config = None if str(model).endswith(".gguf") else find_config(model)
    if config is None or (text_config_of(config) or config).model_type in HOSTS:
        return load_teacher(model, tokenizer=tokenizer, device=device, dtype=dtype)
    refuse_named_heads(config, model)
    folder = Path(model)
    if folder.is_dir():
        check_weights(folder)
    else:
        folder = Path(snapshot_download(os.fspath(model), ignore_patterns=["*.bin", "*.gguf", "*.onnx", "*.h5"]))
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=parse_dtype(dtype))
    return loaded.to(device).eval(), _open_tokenizer(tokenizer, folder)


def _open_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None, folder: str | os.PathLike[str]
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given, or the one in the model's own folder; None where that holds none."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is None and not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder if tokenizer is None else tokenizer)


def _check_vocabularies(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    ours, theirs = model.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"the model has a vocabulary of {ours} tokens and the one to compare with of {theirs}; "
            "give the teacher that the model was made from"
        )


def _check_lengths(models: Iterable[PreTrainedModel], data: Any, sequence_length: int) -> None:
    """Refuse sequences that a model has no positions for; token ids have their own length."""
    given = isinstance(data, Tensor)
    for model in models:
        length = data.shape[-1] if given else sequence_length
        check_positions(model, length, what="the length of the token ids" if given else "sequence_length")


def residuals(
    student: PreTrainedModel, teacher: PreTrainedModel, ids_NT: Tensor, *, progress: bool = True
) -> dict[int, float]:
    """For each converted layer how much of the attention's output its mixer misses: 0 is exact, 1 as bad as nothing."""
    mixers = layers_of(student)
    missed = dict.fromkeys(mixers, 0.0)
    energy = dict.fromkeys(mixers, 0.0)

    def measure(layer: int, given: dict[str, Any], target_BTD: Tensor) -> None:
        home = next(mixers[layer].parameters())
        rotary = given.get("position_embeddings")
        if rotary is not None:
            rotary = (rotary[0].to(home), rotary[1].to(home))
        y_BTD = mixers[layer](given["hidden_states"].to(home), position_embeddings=rotary)[0]
        target_BTD = target_BTD.to(y_BTD)
        missed[layer] += (y_BTD - target_BTD).float().square().sum().item()
        energy[layer] += target_BTD.float().square().sum().item()

    with evaluating(student, teacher), hooked(teacher, mixers, measure):
        for ids_T in tokens_shown(ids_NT, progress=progress, description="residuals"):
            teacher.base_model(input_ids=ids_T[None].to(teacher.device), use_cache=False)
    return {layer: missed[layer] / energy[layer] for layer in sorted(mixers)}


def decode_speed(
    model: PreTrainedModel,
    lengths: Sequence[int] = (512, 2048, 8192),
    *,
    new_tokens: int = 16,
    progress: bool = True,
    description: str = "decode speed",
) -> list[dict[str, Any]]:
    """For each length of context: seconds to read it, tokens per second after it, bytes the cache holds then.

    Contexts after which the model has no positions for the new tokens are left out.
    """
    positions = positions_of(model)
    lengths = [length for length in lengths if positions is None or length + new_tokens + 1 <= positions]
    generator = torch.Generator().manual_seed(0)
    rows = []
    with progress_bar(total=sum(lengths), desc=description, unit="tok", unit_scale=True, progress=progress) as bar:
        for length in lengths:
            ids_BT = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
            with evaluating(model):
                rows.append({"length": length, **_decode(model, ids_BT, new_tokens)})
            bar.update(length)
    return rows


def _decode(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int) -> dict[str, Any]:
    started = _clock(model.device)
    # logits of the last position only: those of 8192 tokens take more memory than the model
    out = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)
    read = _clock(model.device)
    cache, times = out.past_key_values, []
    for _ in range(new_tokens + 1):
        times.append(_clock(model.device))
        out = model(input_ids=out.logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, use_cache=True)
    times = [*times[1:], _clock(model.device)]  # the first step warms up
    state_bytes, kv_bytes = cache_bytes(cache)
    return {
        "prefill_s": read - started,
        "tokens_per_s": new_tokens / (times[-1] - times[0]),
        "state_bytes": state_bytes,
        "kv_bytes": kv_bytes,
        "cache_bytes": state_bytes + kv_bytes,
    }


def cache_bytes(cache: Any) -> tuple[int, int]:
    """Bytes of the fast weights' states, which do not grow, and of keys and values, which do."""
    states = [tensor for layer in cache.layers for tensor in getattr(layer, "states", {}).values()]
    pairs = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.nbytes for tensor in states), sum(tensor.nbytes for tensor in pairs)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def samples(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    new_tokens: int = 40,
    progress: bool = True,
) -> list[dict[str, str]]:
    """Greedy answers of both models to each prompt, side by side."""
    return [
        {
            "prompt": prompt,
            "teacher": answer(teacher, prompt, tokenizer, new_tokens=new_tokens),
            "student": answer(student, prompt, tokenizer, new_tokens=new_tokens),
        }
        for prompt in progress_bar(prompts, desc="samples", progress=progress)
    ]


def answer(model: PreTrainedModel, prompt: str, tokenizer: PreTrainedTokenizerBase, *, new_tokens: int = 40) -> str:
    """What the model says to `prompt`, greedily; through the chat template where the tokenizer has one."""
    templated = bool(tokenizer.chat_template)  # whose words have a beginning of their own
    if templated:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated).to(model.device)
    generate: Any = model.generate
    with evaluating(model):
        out_BT = generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

"""The report of a conversion: report.json for machines, report.html for people, README.md as the model card.

The report is a dict. Every key may be missing; what depends on it is then left out.

    teacher, base_model, license    str: what was given, its Hub id, its licence ("apache-2.0")
    name                            str: the converted model's, default the output folder's name
    rule, recipe, keep, seed        as given to convert; `data` a str that says what text it was
    num_layers, kept_layers         int, list[int]: layers that stay softmax
    tokens                          int: tokens used for the conversion in all
    evaluation                      dict from evaluate(model, against=teacher, ...)
    baselines                       {name: dict} from baselines(...)
    residuals                       {layer: float} from residuals(...)
    ranking                         {layer: float}: KL that converting this layer alone causes
    choices                         {layer: dict}: what was chosen for a layer (rates, rope heads, ridge, ...)
    decode                          {"student": rows, "teacher": rows} from decode_speed(...)
    recall                          {"student": shares, "teacher": shares} from recall(...)
    samples                         [{"prompt", "teacher", "student"}] from samples(...)
    stages                          {name: dict} in order: "seconds", "tokens", "history": [{"step", a measure}], ...
    peak_memory_bytes, teacher_bytes    int: of the process while converting; the teacher's weights in float32
    reloaded_bitwise                bool: the saved model gives the same logits
    notes                           [str]: anything a reader should know
    environment                     filled in here: date, commit, device, threads, versions

`measure` fills evaluation ... samples from a student and its teacher.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import PreTrainedModel

from hf_fwp.card import commit, model_card
from hf_fwp.estimates import peak_memory
from hf_fwp.files import write_whole

from .baselines import baselines
from .evaluate import PROMPTS, decode_speed, residuals, samples
from .greedy import TEXTS, followed
from .recall import recall
from .scores import compare, forward_of, heldout_blocks

PACKAGES = ("hf_fwp", "torch", "transformers", "accelerate", "datasets", "peft", "safetensors")
PAGE_NEEDS = ("jinja2", "matplotlib")


def measure(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Any,
    *,
    tokenizer: Any = None,
    tokens: int = 16384,
    baseline_tokens: int = 4096,
    residual_tokens: int = 2048,
    sequence_length: int = 512,
    lengths: Sequence[int] = (512, 2048, 8192),
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = 40,
    needles: int = 4,
    texts: int = TEXTS,
    progress: bool = True,
) -> dict[str, Any]:
    """All that a report says about quality and speed; a part with 0 tokens, needles or texts (to write greedily), no
    lengths, no prompts is left out."""
    ids_NT = heldout_blocks(data, tokenizer, tokens=tokens, sequence_length=sequence_length)
    models = {"model": forward_of(student)}
    found: dict[str, Any] = {"evaluation": compare(models, forward_of(teacher), ids_NT, progress=progress)["model"]}
    if texts:
        found["evaluation"]["followed"] = followed(student, teacher, ids_NT, texts=texts, progress=progress)
    if baseline_tokens:
        part = _first(ids_NT, baseline_tokens)
        found["baselines"] = baselines(teacher, part, student=student, progress=progress)
    if residual_tokens:
        found["residuals"] = residuals(student, teacher, _first(ids_NT, residual_tokens), progress=progress)
    if lengths:
        speeds = {
            "student": decode_speed(student, lengths, progress=progress, description="speed of the student"),
            "teacher": decode_speed(teacher, lengths, progress=progress, description="speed of the teacher"),
        }
        found |= {"decode": speeds} if speeds["student"] else {}  # none of a model with few positions
    if needles and tokenizer is not None:
        pair = {"student": student, "teacher": teacher}
        found["recall"] = recall(pair, tokenizer, needles=needles, progress=progress)
    if prompts and tokenizer is not None:
        found["samples"] = samples(student, teacher, tokenizer, prompts, new_tokens=new_tokens, progress=progress)
    return found


def _first(ids_NT: Tensor, tokens: int) -> Tensor:
    return ids_NT[: max(1, -(-tokens // ids_NT.shape[1]))]


def write_report(output: str | os.PathLike[str], report: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json, report.html and README.md into the folder `output`; returns the report, completed."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    complete = completed(report, name=folder.resolve().name)
    write_whole(folder / "report.json", json.dumps(complete, indent=2, allow_nan=False) + "\n")
    write_whole(folder / "README.md", model_card(complete))
    missing = [package for package in PAGE_NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        warnings.warn(
            f"{folder / 'report.html'} is not written: it needs {' and '.join(missing)}; "
            'run `pip install "hf_fwp[demo]"`',
            stacklevel=2,
        )
    else:
        from .page import page

        write_whole(folder / "report.html", page(complete))
    return complete


def completed(report: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """The report as JSON can hold it, with its name, origin, peak memory and environment."""
    teacher = str(report.get("teacher") or "")
    filled = {
        "name": name,
        "base_model": hub_id(teacher),
        "license": license_of(teacher),
        "peak_memory_bytes": peak_memory(),
        **report,
        "environment": {**environment(), **report.get("environment", {})},
    }
    return plain({key: value for key, value in filled.items() if value is not None})


def plain(value: Any) -> Any:
    """`value` in JSON's own types: keys are strings, tensors lists, a number that is not finite is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def hub_id(teacher: str) -> str | None:
    """`teacher` where it looks like a Hub id, not like a folder or file."""
    looks = re.fullmatch(r"[\w.-]+/[\w.-]+", teacher) and not teacher.startswith(".")
    return teacher if looks and not teacher.endswith(".gguf") and not Path(teacher).exists() else None


def license_of(teacher: str) -> str | None:
    """The licence that the teacher's GGUF file or model card names, where it is on this machine."""
    if teacher.endswith(".gguf") and Path(teacher).is_file():
        return _gguf_license(Path(teacher))
    card = Path(teacher) / "README.md"
    if hub_id(teacher):
        cached = try_to_load_from_cache(teacher, "README.md")
        card = Path(cached) if isinstance(cached, str) else card
    if not teacher or not card.is_file():
        return None
    front = card.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
    found = re.search(r"^license:\s*([\w.+-]+)", front, re.MULTILINE) if front.startswith("---") else None
    return found[1] if found else None


def _gguf_license(file: Path) -> str | None:
    # the package gguf takes 5 s to read all of the header; the licence is a string at its beginning:
    # key, type 8, length as 64 bits, text
    with file.open("rb") as stream:
        head = stream.read(1 << 16)
    found = re.search(rb"general\.license\x08\0\0\0(.{8})", head, re.DOTALL)
    if found is None:
        return None
    return head[found.end() : found.end() + struct.unpack("<Q", found[1])[0]].decode()


def environment() -> dict[str, Any]:
    """When, with which code and on what this runs."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide about the numbers; a checkout that is not installed has none."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The GPU's name where there is one, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

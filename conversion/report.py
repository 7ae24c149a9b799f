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
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData, try_to_load_from_cache
from torch import Tensor
from transformers import PreTrainedModel

from .baselines import baselines
from .evaluate import PROMPTS, compare, decode_speed, forward_of, heldout_blocks, residuals, samples

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hf_fwp", "torch", "transformers", "accelerate", "datasets", "peft", "safetensors")
TIMES = "\u00d7"  # the multiplication sign
PAGE_NEEDS = ("jinja2", "matplotlib")
BASELINES = {  # as a reader sees them; keys as in baselines.py
    "naive_copy": "naive copy (nothing solved or trained)",
    "sliding_window": "teacher, sliding window 64 + 4 sinks",
    "fast_weights_off": "this model, fast weights off",
}


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
    progress: bool = True,
) -> dict[str, Any]:
    """All that a report says about quality and speed; a part with 0 tokens, no lengths or no prompts is left out."""
    ids_NT = heldout_blocks(data, tokenizer, tokens=tokens, sequence_length=sequence_length)
    models = {"model": forward_of(student)}
    found: dict[str, Any] = {"evaluation": compare(models, forward_of(teacher), ids_NT, progress=progress)["model"]}
    if baseline_tokens:
        part = _first(ids_NT, baseline_tokens)
        found["baselines"] = baselines(teacher, part, student=student, progress=progress)
    if residual_tokens:
        found["residuals"] = residuals(student, teacher, _first(ids_NT, residual_tokens), progress=progress)
    if lengths:
        found["decode"] = {
            "student": decode_speed(student, lengths, progress=progress, description="speed of the student"),
            "teacher": decode_speed(teacher, lengths, progress=progress, description="speed of the teacher"),
        }
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


def write_whole(path: Path, text: str) -> None:
    """Write to a neighbour and rename: nobody ever sees half a file."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)  # a temporary file is for its owner only
    os.replace(file.name, path)


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


def commit() -> str | None:
    """The commit of the checkout, marked where something is not committed; None when installed from a wheel."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return None
    described = subprocess.run(
        [git, "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None


def device_name() -> str:
    """The GPU's name where there is one, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> int | None:
    """The most memory this process has held so far, in bytes; None where the system does not tell (Windows)."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent held when it started this process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


def teacher_name(report: Mapping[str, Any]) -> str:
    """The teacher's Hub id, or the name of its folder or file: not where it lies on the writer's machine."""
    return report.get("base_model") or Path(str(report.get("teacher") or "")).name


def quality_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Teacher, this model and the baselines: name and measurements, for the tables of page and card."""
    measured = report.get("evaluation", {})
    rows = []
    if measured.get("teacher_perplexity") is not None:
        teacher = {"perplexity": measured["teacher_perplexity"], "ratio": 1.0, "kl": 0.0, "agreement": 1.0}
        rows.append({"name": "teacher", "tokens": measured.get("tokens"), **teacher})
    if measured:
        rows.append({"key": "model", **measured, "name": "this model"})
    for key, baseline in report.get("baselines", {}).items():
        rows.append({"key": key, **baseline, "name": BASELINES.get(key, key)})
    return rows


def number(value: Any, digits: int = 3) -> str:
    """Three digits that count, no exponent below a million: 0.0123, 1.31, 47.6, 80597."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if value == 0 or abs(value) >= 1e6:
        return "0" if value == 0 else f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def bytes_shown(value: float | None) -> str:
    """Bytes in the unit that fits."""
    if value is None:
        return "-"
    power = min(3, int(math.log(max(value, 1), 1024)))
    return f"{number(value / 1024**power)} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def model_card(report: Mapping[str, Any]) -> str:
    """README.md of the converted model, with the front matter that the Hub reads."""
    front = ModelCardData(
        base_model=report.get("base_model"),
        license=report.get("license"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_fwp", "fast-weights", "linear-attention", *filter(None, [report.get("rule")])],
    )
    parts = [f"---\n{front.to_yaml()}\n---", f"# {report['name']}", _what(report), _loading(report["name"])]
    table = _quality_table(quality_rows(report))
    if table:
        parts += ["## How good it is", table, _measured_on(report)]
    return "\n\n".join([*parts, "## How it was made", _making(report)]) + "\n"


def _what(report: Mapping[str, Any]) -> str:
    teacher = teacher_name(report) or "a softmax Transformer"
    layers = ""
    if report.get("num_layers"):
        kept = len(report.get("kept_layers", []))
        layers = f" in {report['num_layers'] - kept} of {report['num_layers']} layers"
    rule = f" (update rule `{report['rule']}`)" if report.get("rule") else ""
    return f"{teacher} with fast weights in place of softmax attention{layers}{rule}, converted by hf_fwp."


def _loading(name: str) -> str:
    return f"""```python
import hf_fwp  # registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""


def _quality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = ["| model | perplexity | of the teacher's | KL | same next token | tokens |", "|---|---|---|---|---|---|"]
    for row in rows:
        share = "-" if row.get("agreement") is None else f"{row['agreement']:.0%}"
        ratio = "-" if row.get("ratio") is None else f"{number(row['ratio'])} {TIMES}"
        cells = (row["name"], number(row.get("perplexity")), ratio, number(row.get("kl")), share, row.get("tokens"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _measured_on(report: Mapping[str, Any]) -> str:
    on = report["environment"]
    data = f" Text: {report['data']}." if report.get("data") else ""
    return (
        f"Held-out tokens, KL in nats per token; baselines are compared with the teacher on the same tokens.{data} "
        f"Measured {str(on.get('date'))[:10]} on {on.get('device')}, {on.get('threads')} threads. "
        "Everything else is in report.html and report.json."
    )


def _making(report: Mapping[str, Any]) -> str:
    on = report["environment"]
    said = {
        "teacher": teacher_name(report),
        "rule": report.get("rule"),
        "recipe": report.get("recipe"),
        "layers kept as softmax": ", ".join(map(str, report["kept_layers"])) if report.get("kept_layers") else None,
        "tokens": report.get("tokens"),
        "stages": ", ".join(
            f"{name} {stage['seconds']:.0f} s" if "seconds" in stage else name
            for name, stage in report.get("stages", {}).items()
        ),
        "peak memory": bytes_shown(report.get("peak_memory_bytes")),
        "commit": on.get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in on.get("versions", {}).items()),
    }
    notes = [f"- {note}" for note in report.get("notes", [])]
    return "\n".join([*(f"- {name}: {value}" for name, value in said.items() if value), *notes])

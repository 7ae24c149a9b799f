"""The model card: README.md of a model, from the report of its conversion or from the model itself.

The report is the dict that conversion/report.py describes; what is missing in it is left out of the card.
"""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .architecture import head_of
from .loading import TAGS

ROOT = Path(__file__).resolve().parent.parent
TASKS = {  # auto class -> what the Hub calls the task
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
METRICS = {  # measurement of a report -> (what the Hub calls it, what a reader does)
    "perplexity": ("perplexity", "perplexity"),
    "kl": ("kl_divergence", "KL from the teacher, nats per token"),
    "agreement": ("accuracy", "same next token as the teacher"),
}
TIMES = "\u00d7"  # the multiplication sign
BASELINES = {  # as a reader sees them; keys as in baselines.py
    "naive_copy": "naive copy (nothing solved or trained)",
    "sliding_window": "teacher, sliding window 64 + 4 sinks",
    "fast_weights_off": "this model, fast weights off",
    "window_off": "this model, window off",
}


def commit() -> str | None:
    """The commit of the checkout, marked where something is not committed; None when installed from a wheel."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return None
    described = subprocess.run(
        [git, "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or None


def teacher_name(report: Mapping[str, Any]) -> str:
    """The teacher's Hub id, or the name of its folder or file: not where it lies on the writer's machine."""
    return report.get("base_model") or Path(str(report.get("teacher") or "")).name


def quality_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Teacher, this model and the baselines: name and measurements, for the tables of page and card."""
    measured = report.get("evaluation", {})
    rows = []
    if measured.get("teacher_perplexity") is not None:
        teacher = {"perplexity": measured["teacher_perplexity"], "ratio": 1.0, "kl": 0.0, "agreement": 1.0}
        teacher |= {"followed": 1.0} if "followed" in measured else {}
        rows.append({"name": "teacher", "tokens": measured.get("tokens"), **teacher})
    if measured:
        rows.append({"key": "model", **measured, "name": "this model"})
    for key, baseline in report.get("baselines", {}).items():
        rows.append({"key": key, **baseline, "name": BASELINES.get(key, key)})
    return rows


def recall_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was to be found in a context, and the shares that teacher and student found."""
    both = report.get("recall", {})
    ours, theirs = both.get("student", {}), both.get("teacher", {})
    asked = [
        ("needles", "found", "a number of seven digits in {} tokens of noise"),
        ("pairs", "foretold", "second words of {} pairs, said again in another order"),
    ]
    return [
        {"name": words.format(size), "student": shares[share], "teacher": theirs[kind][size][share]}
        for kind, share, words in asked
        for size, shares in ours.get(kind, {}).items()
    ]


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


def model_card(report: Mapping[str, Any], *, address: str | None = None, with_code: bool = False) -> str:
    """README.md of a converted model, with the front matter that the Hub reads; `address` is what loads it, without
    hf_fwp too if its code goes along."""
    front = ModelCardData(
        base_model=report.get("base_model"),
        license=report.get("license"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, "linear-attention", *filter(None, [report.get("rule")])],
        model_name=report["name"],
        eval_results=_eval_results(report) or None,
    )
    told = loading(address or report["name"], "AutoModelForCausalLM", with_code=with_code)
    parts = [f"---\n{front.to_yaml()}\n---", f"# {report['name']}", _what(report), told]
    table = _quality_table(quality_rows(report))
    if table:
        parts += ["## How good it is", table, *_recall_table(recall_rows(report)), _measured_on(report)]
    return "\n\n".join([*parts, "## How it was made", _making(report)]) + "\n"


def card_of(model: PreTrainedModel, *, name: str, address: str, with_code: bool = False) -> str:
    """README.md of a model that has no report: its rules and sizes, and how to load it from `address`."""
    auto = auto_class(model.config, type(model).__name__)
    front = ModelCardData(library_name="transformers", pipeline_tag=TASKS[auto], tags=list(model.model_tags or ()))
    rules: dict[str, list[int]] = {}
    for layer_idx, layer in model.hf_fwp_layers.items():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        rules.setdefault(layer.options.rule, []).append(layer_idx)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    made = {
        "model type": model.config.model_type,
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "hidden size": model.config.hidden_size,
        **{f"update rule `{rule}`": f"layers {', '.join(map(str, layers))}" for rule, layers in rules.items()},
        "commit of hf_fwp": commit(),
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
    }
    listed = "\n".join(f"- {what}: {value}" for what, value in made.items() if value is not None)
    told = "A model with fast weights, made with hf_fwp."
    parts = [f"---\n{front.to_yaml()}\n---", f"# {name}", told, loading(address, auto, with_code=with_code), listed]
    return "\n\n".join(parts) + "\n"


def auto_class(config: Any, architecture: str | None) -> str:
    """The Auto class whose model for this config is called `architecture`; ValueError where there is none."""
    auto = head_of(config, [] if architecture is None else [architecture])
    if auto is not None:
        return auto
    raise ValueError(
        f"config.json names the architecture {architecture!r} and the model type {config.model_type!r}, which are none "
        "of this package's; give a folder that save_pretrained of such a model wrote"
    )


def completed(card: ModelCard, ours: ModelCard) -> str:
    """`card`, whose text and entries stay as they are, with the entries and tags that only `ours` has."""
    there = {key: value for key, value in card.data.to_dict().items() if value}
    tags = [*there.get("tags", ()), *ours.data["tags"]]
    front = ModelCardData(**{**ours.data.to_dict(), **there, "tags": list(dict.fromkeys(tags))})
    text = card.text if card.text.strip() else ours.text
    return f"---\n{front.to_yaml()}\n---\n{text}"


def _eval_results(report: Mapping[str, Any]) -> list[EvalResult]:
    """What was measured on held-out text, as the Hub's model-index has it."""
    measured = report.get("evaluation", {})
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=str(report.get("data") or "held-out text"),
            metric_type=METRICS[key][0],
            metric_name=METRICS[key][1],
            metric_value=measured[key],
        )
        for key in METRICS
        if measured.get(key) is not None
    ]


def _what(report: Mapping[str, Any]) -> str:
    teacher = teacher_name(report) or "a softmax Transformer"
    layers = ""
    if report.get("num_layers"):
        kept = len(report.get("kept_layers", []))
        layers = f" in {report['num_layers'] - kept} of {report['num_layers']} layers"
    rule = f" (update rule `{report['rule']}`)" if report.get("rule") else ""
    return f"{teacher} with fast weights in place of softmax attention{layers}{rule}, converted by hf_fwp."


WITHOUT_PACKAGE = "Without hf_fwp, by the code in this repository; read it before you trust it:"


def loading(address: str, auto: str, *, with_code: bool = False, tokenizer: str | None = None) -> str:
    """How the card says that the model is loaded, with and, if its code goes along, without hf_fwp; `tokenizer` is
    where that is, if elsewhere."""
    words = tokenizer or address
    given = f'"{address}", trust_remote_code=True'
    without = f"""

{WITHOUT_PACKAGE}

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained({given})
tokenizer = AutoTokenizer.from_pretrained("{words}")
```"""
    return f"""```python
import hf_fwp  # registers the architecture
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{address}")  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained("{words}")
```{without if with_code else ""}"""


def _quality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = ["| model | perplexity | of the teacher's | KL | same next token | same greedy text | tokens |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        alike = ["-" if row.get(name) is None else f"{row[name]:.0%}" for name in ("agreement", "followed")]
        ratio = "-" if row.get("ratio") is None else f"{number(row['ratio'])} {TIMES}"
        cells = (row["name"], number(row.get("perplexity")), ratio, number(row.get("kl")), *alike, row.get("tokens"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _recall_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["| found again in the context | teacher | this model |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['teacher']:.0%} | {row['student']:.0%} |" for row in rows]
    return ["\n".join(lines)]


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

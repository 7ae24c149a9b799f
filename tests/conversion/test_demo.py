"""The demo, on a tiny teacher: what it says is what it measured."""

import importlib
from dataclasses import replace

import pytest
import tiny

from hf_fwp.cli import show_report
from hf_fwp.conversion.demo import demo
from hf_fwp.conversion.recipes import RECIPES

MEASURES = {"tokens": 128, "baseline_tokens": 64, "residual_tokens": 0, "lengths": (16,), "new_tokens": 4}


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    few = replace(RECIPES["closed-form"], sequence_length=32, solve_tokens=256, rank_solve_tokens=160, rank_tokens=32)
    monkeypatch.setitem(RECIPES, "closed-form", few)
    verb = importlib.import_module("hf_fwp.conversion.convert")
    monkeypatch.setattr(verb, "REPORT_TOKENS", 128)
    monkeypatch.setattr(verb, "_MEASURES", MEASURES)
    stage = importlib.import_module("hf_fwp.conversion.demo")
    monkeypatch.setattr(stage, "demo_corpus", lambda: ("tiny texts", tiny.TEXTS, tiny.TEXTS))
    return tiny.teacher_folder(tmp_path / "teacher", layers=2)


def test_the_demo_converts_reloads_and_shows(teacher, tmp_path, capsys):
    report = demo(teacher, output=tmp_path / "made")
    assert report["reloaded_bitwise"] is True
    assert report["data"] == "tiny texts"
    assert len(report["kept_layers"]) == 1
    assert set(report["baselines"]) == {"naive_copy", "sliding_window", "fast_weights_off"}
    assert (tmp_path / "made" / "report.html").is_file()
    show_report(report, tmp_path / "made", as_json=False)
    shown = capsys.readouterr().out
    assert "1 of 2" in shown
    assert f"{report['evaluation']['perplexity']:.1f}" in shown

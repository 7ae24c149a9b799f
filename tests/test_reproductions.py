"""The examples that repeat published results: each runs quickly as a command, and in earnest its claim holds."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ROOT = EXAMPLES.parent

# What makes a run of each example as short as it can be.
QUICK = {
    "capacity": {"seeds": 1, "steps": 50, "sizes": "4"},
    "formal_languages": {"seeds": 1, "steps": 1, "longest": 4},
    "group_words": {"seeds": 1, "steps": 1, "length": 4},
    "parity": {"seeds": 1, "steps": 1, "tests": 2},
    "store_recall": {"seeds": 2, "steps": 1, "trials": 10},
}


def main(example: str):
    return runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"]


def lines_of_code(path: Path) -> int:
    """Lines that are neither empty nor comment nor docstring."""
    text, documented = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and at not in documented for at, line in lines)


@pytest.mark.parametrize("example", QUICK)
def test_a_reproduction_is_short_and_shows_what_it_printed(example):
    path = EXAMPLES / f"{example}.py"
    assert lines_of_code(path) <= 60
    told = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python examples/{example}.py" in told
    assert "Xeon" in told
    assert "|---" in told


@pytest.mark.parametrize("example", QUICK)
def test_a_reproduction_prints_its_table(example, capsys):
    measured = main(example)(**QUICK[example])
    shown = capsys.readouterr().out
    assert "(published: " in shown
    assert all(row in shown and column in shown for row, column in measured)


def test_a_reproduction_is_a_command():
    command = [sys.executable, str(EXAMPLES / "capacity.py"), "--seeds", "1", "--steps", "50", "--sizes", "3"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "dpfp:1, delta" in ran.stdout


@pytest.mark.slow
def test_the_delta_rule_replaces_what_a_sum_can_only_add_to():
    measured = main("capacity")(seeds=1, sizes="20,40")
    for size in ("S=20", "S=40"):
        assert min(measured["dpfp:1, additive", size]) > 0.05
        assert max(measured["dpfp:1, delta", size]) < 0.01


@pytest.mark.slow
def test_parity_needs_negative_eigenvalues():
    measured = main("parity")(seeds=1, steps=300)
    assert measured["β in (0, 2)", "40-256"][0] > 0.4
    assert abs(measured["β in (0, 1)", "129-256"][0]) < 0.1


@pytest.mark.slow
def test_one_layer_tracks_s3_with_two_reflections_and_negative_eigenvalues_only():
    measured = main("group_words")(seeds=1, steps=500)
    right = {row: values[0] for (row, column), values in measured.items() if column == "9-16"}
    assert right.pop("n_h=2, β in (0, 2)") > 0.4
    assert max(right.values()) < 0.3


@pytest.mark.slow
def test_recurrence_solves_formal_languages_that_linear_transformers_do_not():
    measured = main("formal_languages")(seeds=1)
    for name in ("recurrent delta net", "SRWM", "LSTM"):
        assert measured[name, "parity, long"][0] > 0.95
    assert measured["linear transformer", "parity, long"][0] < 0.05


@pytest.mark.slow
def test_a_pattern_is_recalled_after_delays_longer_than_in_training():
    measured = main("store_recall")(seeds=1, trials=200)
    assert measured["bits", "delay 1-60"][0] > 0.99
    for rule in ("additive", "delta"):
        assert measured["N=1", rule][0] == pytest.approx(1)
        assert measured["N=8", rule][0] < 0.8

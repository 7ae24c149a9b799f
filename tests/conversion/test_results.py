"""The table of results: what was measured is quoted, and nothing else in the README changes."""

import json
from types import SimpleNamespace

import pytest

from hf_fwp.bench.cpu import markdown
from hf_fwp.conversion import results
from hf_fwp.conversion.report import environment

MEASURED = {"perplexity": 75.0, "teacher_perplexity": 37.5, "ratio": 2.0, "kl": 0.7, "agreement": 0.5, "tokens": 16384}
ROW = {"keep": 0, "seconds": 240.0, "peak_memory_bytes": 3e9, "teacher_bytes": 1e9, "evaluation": MEASURED}


def row(way, keep=0):
    return {**ROW, "recipe": way, "keep": keep, "environment": environment()}


@pytest.fixture
def measured(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps([row("quick"), row("closed-form", 0.5)]))
    return file


def test_only_what_is_missing_is_measured(measured, monkeypatch):
    class Here:
        """Runs in this process what was to run in another."""

        def __init__(self, *args, **kwargs):
            pass

        __enter__ = __exit__ = lambda self, *_: self

        def submit(self, function, *args, **kwargs):
            return SimpleNamespace(result=lambda: row(*args))

    monkeypatch.setattr(results, "ProcessPoolExecutor", Here)
    found = results.results(ways=["quick", "closed-form"], keep=[0, 0.5], file=measured)
    assert found == json.loads(measured.read_text())
    assert [(each["recipe"], each["keep"]) for each in found] == [
        ("closed-form", 0),
        ("closed-form", 0.5),
        ("quick", 0),
        ("quick", 0.5),
    ]


def test_a_row_says_what_was_measured():
    header, _, line, *_ = results.as_table([row("quick")]).splitlines()
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert cells["of the teacher's"] == "2.00 x"
    assert cells["minutes"] == "4.0"
    assert cells["peak memory"] == "2.8 GiB"


def test_the_table_replaces_the_one_before(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    results.quote("new", readme=readme)
    assert readme.read_text() == "before\n<!-- results -->\nnew\n<!-- /results -->\nafter\n"
    readme.write_text("no place for it")
    with pytest.raises(ValueError, match="no <!-- results -->"):
        results.quote("new", readme=readme)


def test_the_readme_quotes_the_rows_that_were_measured():
    rows, readme = results.measured_rows(results.ROWS), (results.ROOT / "README.md").read_text()
    assert results.as_table(rows) in readme
    assert results.as_goals(rows) in readme


def test_a_goal_stands_beside_what_was_reached():
    rows = [row("quick", 0.5) | {"speeches": {"ratio": 1.5}}, row("closed-form, window", 0.5)]
    lines = [line.strip("| ").split(" | ") for line in results.as_goals(rows).splitlines()[2:]]
    assert lines[-1] == ["quick", "50%", "1.08 x", "2.00 x", "1.50 x", "2.00 x", "-"]
    assert lines[0] == ["closed-form", "0%", "2.00 x", "-", "-", "-", "-"]


def test_the_readme_quotes_the_speed_that_was_measured():
    measured = json.loads(results.SPEED.read_text())
    assert markdown(measured) in (results.ROOT / "README.md").read_text()

"""The table of results: what was measured is quoted, and nothing else in the README changes."""

import json

import pytest

from hf_fwp.bench.cpu import markdown
from hf_fwp.conversion import results
from hf_fwp.conversion.report import environment

MEASURED = {"perplexity": 75.0, "teacher_perplexity": 37.5, "ratio": 2.0, "kl": 0.7, "agreement": 0.5, "tokens": 16384}
ROW = {"keep": 0, "seconds": 240.0, "peak_memory_bytes": 3e9, "teacher_bytes": 1e9, "evaluation": MEASURED}


@pytest.fixture
def folder(tmp_path):
    for recipe in ("quick", "closed-form"):
        row = {**ROW, "recipe": recipe, "environment": environment()}
        (tmp_path / f"{recipe}-0.json").write_text(json.dumps(row))
    (tmp_path / "closed-form-0.3.json").write_text("not a row of the table")
    return tmp_path


def test_rows_come_in_the_order_of_the_table(folder):
    assert [row["recipe"] for row in results.measured_rows(folder)] == ["closed-form", "quick"]


def test_a_row_says_what_was_measured(folder):
    header, _, row, *_ = results.as_table(results.measured_rows(folder)).splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
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


def test_the_readme_quotes_the_speed_that_was_measured():
    measured = json.loads(results.SPEED.read_text())
    assert markdown(measured) in (results.ROOT / "README.md").read_text()

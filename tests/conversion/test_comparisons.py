"""The tables of choices and of recipes: each is a call that ablate takes, and the page quotes what came out."""

import json

import pytest
from tiny import tiny_llama

from hf_fwp.conversion import comparisons
from hf_fwp.conversion.ablate import AS_IT_IS, ablate, as_table


@pytest.mark.parametrize("name", comparisons.TABLES)
def test_a_table_is_a_call_that_ablate_takes(name, tmp_path, capsys):
    assert ablate(tiny_llama(layers=4), dry_run=True, output=tmp_path, **comparisons.TABLES[name]) == []
    told = capsys.readouterr().err
    recipes = comparisons.TABLES[name]["recipe"]
    for recipe in [recipes] if isinstance(recipes, str) else recipes:
        assert f"{recipe}, {AS_IT_IS}" in told


def test_the_page_quotes_what_was_measured(monkeypatch, tmp_path):
    measured = comparisons.measured_tables()
    page = comparisons.PAGE.read_text()
    for name in comparisons.TABLES:
        begun = f"<!-- {name} -->\n"
        assert begun + (f"{as_table(measured[name])}\n" if name in measured else "") in page
        assert f"<!-- /{name} -->" in page


def test_a_table_is_kept_as_soon_as_it_is_measured(monkeypatch, tmp_path):
    rows = [row for rows in comparisons.measured_tables().values() for row in rows][:2]
    called = []

    def measured(teacher, **said):
        called.append(said)
        return rows

    page = tmp_path / "RESULTS.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in comparisons.TABLES))
    monkeypatch.setattr(comparisons, "ROWS", tmp_path / "rows.json")
    monkeypatch.setattr(comparisons, "PAGE", page)
    monkeypatch.setattr(comparisons, "ablate", measured)
    comparisons.main(["--table", "kept", "--output", str(tmp_path)])
    assert json.loads(comparisons.ROWS.read_text()) == {"kept": rows}
    assert [said["output"] for said in called] == [tmp_path / "kept"]
    assert f"<!-- kept -->\n{as_table(rows)}\n<!-- /kept -->" in page.read_text()

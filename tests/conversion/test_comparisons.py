"""The tables of choices and of recipes: each is a call that ablate takes, and the page quotes what came out."""

import importlib

import pytest
from tiny import TEXTS, byte_tokenizer, tiny_llama

from hf_fwp.conversion import comparisons
from hf_fwp.conversion.ablate import ablate, as_table
from hf_fwp.conversion.choices import AS_IT_IS, CHOICES
from hf_fwp.conversion.recipes import RECIPES, Recipe

ROUNDS = (({"rotate": (False, True)},), ({"rotate": (False, True)},))


@pytest.mark.parametrize("name", comparisons.TABLES)
@pytest.mark.filterwarnings("error")
def test_a_table_is_a_call_that_ablate_takes(name, tmp_path, capsys):
    assert ablate(tiny_llama(layers=4), dry_run=True, output=tmp_path, **comparisons.TABLES[name]) == []
    told = capsys.readouterr().err
    recipes = comparisons.TABLES[name]["recipe"]
    for recipe in [recipes] if isinstance(recipes, (str, Recipe)) else recipes:
        assert f"{getattr(recipe, 'name', recipe)}, {AS_IT_IS}" in told


def test_the_page_quotes_what_was_measured():
    measured = comparisons.measured_tables()
    page = comparisons.PAGE.read_text()
    for name in comparisons.TABLES:
        begun = f"<!-- {name} -->\n"
        assert begun + (f"{as_table(measured[name])}\n" if name in measured else "") in page
        assert f"<!-- /{name} -->" in page


def test_what_is_finished_goes_to_the_page(monkeypatch, tmp_path):
    def measured(teacher, *, output, **said):
        called.append(said)
        ablate(model, tokenizer=byte_tokenizer(), output=output, **{**said, "data": TEXTS, "tokens": 32})

    model, called = tiny_llama(layers=4), []
    small = Recipe("closed-form", "small", sequence_length=16, solve_tokens=112, rank_solve_tokens=80, rank_tokens=16)
    monkeypatch.setitem(RECIPES, "closed-form", small)
    monkeypatch.setattr(importlib.import_module("hf_fwp.conversion.calibrate"), "ROUNDS", ROUNDS)
    page = tmp_path / "RESULTS.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in comparisons.TABLES))
    monkeypatch.setattr(comparisons, "ROWS", tmp_path / "rows.json")
    monkeypatch.setattr(comparisons, "PAGE", page)
    monkeypatch.setattr(comparisons, "ablate", measured)
    monkeypatch.setattr(comparisons, "brown", lambda: (TEXTS, TEXTS))
    monkeypatch.setattr(comparisons, "smollm2_gguf", lambda: None)
    comparisons.main(["--table", "kept", "--output", str(tmp_path)])
    assert called[0]["keep"] == 0.5
    rows = comparisons.measured_tables()
    assert [row["choice"] for row in rows["kept"]] == [AS_IT_IS, *comparisons_of("kept")]
    assert f"<!-- kept -->\n{as_table(rows['kept'])}\n<!-- /kept -->" in page.read_text()
    comparisons.main(["--finished", "--output", str(tmp_path)])
    assert len(called) == 1
    assert comparisons.measured_tables() == rows


def comparisons_of(table):
    return [name for name in CHOICES if name.startswith(comparisons.TABLES[table]["choices"])]

"""Two results side by side: what is worse by more than noise, and what is not."""

import json

import pytest
from typer.testing import CliRunner

from hf_fwp import cli
from hf_fwp.bench.compare import compare, regressions

MACHINE = {"device": "a", "torch": "2.13"}


def result(tmp_path, name: str, *rows, machine=MACHINE):
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps({"machine": machine, "rows": list(rows)}))
    return file


def row(ms, what="forward", quartiles=None, **more):
    spread = {} if quartiles is None else {"ms_quartiles": quartiles}
    return {"shape": [1, 2], "dtype": "float32", "what": what, "ms": ms, **spread, **more}


def score(accuracy, spread):
    return {"rule": "delta_net", "task": "parity", "accuracy": accuracy, "accuracy_spread": spread}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(10, quartiles=[9.9, 10.1]), row(10.4, quartiles=[10.3, 10.5]), "same"),
        (row(10, quartiles=[9.9, 10.1]), row(10.8, quartiles=[10.7, 10.9]), "worse"),
        (row(10, quartiles=[9.9, 10.1]), row(9.2, quartiles=[9.1, 9.3]), "better"),
        (row(10, quartiles=[9, 11]), row(11.5, quartiles=[11.4, 11.6]), "same"),
        (row(10), row(10.9), "same"),
        (row(10), row(11.2), "worse"),
        (score(0.9, 0.0), score(0.86, 0.0), "same"),
        (score(0.9, 0.15), score(0.8, 0.0), "same"),
        (score(0.9, 0.02), score(0.8, 0.0), "worse"),
    ],
)
def test_only_what_exceeds_the_noise_is_flagged(tmp_path, old, new, verdict):
    found = compare(result(tmp_path, "old", old), result(tmp_path, "new", new))
    assert [row["verdict"] for row in found["rows"]] == [verdict]
    assert len(regressions(found)) == (verdict == "worse")


def test_rows_are_matched_by_what_they_are_about(tmp_path, capsys):
    old = result(tmp_path, "old", row(10, "forward"), row(20, "backward"), row(None, "decode"))
    new = result(tmp_path, "new", row(60, "backward"), row(10, "forward"), row(1, "decode"), machine={"device": "b"})
    found = compare(old, new, json=tmp_path / "both.json")
    assert [(row["what"], row["verdict"]) for row in found["rows"]] == [("backward", "worse"), ("forward", "same")]
    assert json.loads((tmp_path / "both.json").read_text()) == found
    assert "device: a → b" in " ".join(capsys.readouterr().out.split())


def test_everything_that_was_measured_is_compared(tmp_path):
    old, new = ({"context": 512, "batch": 1, "prefill": 100.0, "decode": decode} for decode in (50.0, 30.0))
    found = compare(result(tmp_path, "old", old), result(tmp_path, "new", new))
    assert [(row["measure"], row["verdict"]) for row in found["rows"]] == [("prefill", "same"), ("decode", "worse")]


def test_the_command_says_by_its_exit_code_whether_something_is_worse(tmp_path):
    old, same, slow = (result(tmp_path, name, row(ms)) for name, ms in (("old", 10), ("same", 10), ("slow", 20)))
    codes = [CliRunner().invoke(cli.app, ["bench", "--compare", str(old), str(new)]).exit_code for new in (same, slow)]
    assert codes == [0, 1]
    assert "bench" in CliRunner().invoke(cli.app, ["bench"]).output


def test_other_files_are_refused(tmp_path):
    good = result(tmp_path, "good", row(1))
    with pytest.raises(ValueError, match="no row in common"):
        compare(good, result(tmp_path, "other", row(1, "decode")))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="no result of hf-fwp bench"):
        compare(good, tmp_path / "list.json")
    with pytest.raises(ValueError, match="cannot read"):
        compare(tmp_path / "missing.json", good)

"""hf-fwp bench tasks: every rule can be scored, a score is kept, and a better rule scores better."""

import json

import pytest

from hf_fwp.bench import scores
from hf_fwp.bench.scores import bench_tasks, scored


def test_scores_are_written_one_by_one_and_a_second_run_goes_on(tmp_path, monkeypatch, capsys):
    file, asked = tmp_path / "scores.json", []

    def scored_once(rule, name, *, steps, seed):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append((rule, name))
        return dict.fromkeys(scores.TASKS[name].asked, 0.5)

    monkeypatch.setattr(scores, "scored", scored_once)
    with pytest.raises(KeyboardInterrupt):
        bench_tasks(rules=["delta_net"], json=file, progress=False)
    assert len(json.loads(file.read_text())["rows"]) == 4
    asked.clear()
    result = bench_tasks(rules=["delta_net"], json=file, plot=tmp_path / "scores.svg", progress=False)
    assert asked == [("delta_net", "needle")]
    assert json.loads(file.read_text()) == result
    assert [row["task"] for row in result["rows"]] == list(scores.QUESTIONS)
    assert capsys.readouterr().out.count("0.500") == len(scores.QUESTIONS)
    assert "delta_net" in (tmp_path / "scores.svg").read_text()
    with pytest.raises(ValueError, match="was made with"):
        bench_tasks(rules=["delta_net"], json=file, steps=3, progress=False)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="unknown rule 'delta'; choose from full_attention"):
        bench_tasks(rules=["delta"])
    with pytest.raises(ValueError, match="steps is 0"):
        bench_tasks(steps=0)


@pytest.mark.parametrize("rule", ["full_attention", "linear_attention", "delta_net", "fwp_1993"])
@pytest.mark.parametrize("name", scores.TASKS)
def test_every_kind_of_rule_can_be_scored(rule, name):
    found = scored(rule, name, steps=1, seed=0, batch=2)
    assert list(found) == list(scores.TASKS[name].asked)
    assert all(0 <= share <= 1 for share in found.values())


@pytest.mark.slow
def test_reflections_count():
    """Transitions that reach the eigenvalue -1 learn parity; a sum does not (Grazzi et al. 2024)."""
    steps = {"steps": 150, "seed": 0}
    rules = ("delta_net", "linear_attention")
    counting, adding = (scored(rule, "parity", **steps)["parity, length 32"] for rule in rules)
    assert adding < 0.8 < counting

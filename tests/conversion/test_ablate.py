"""The table of choices: each is a change of a recipe, runs once, and is compared with the recipe as it is."""

import copy
import importlib
import json
from dataclasses import replace

import pytest
import torch
from tiny import TEXTS, byte_tokenizer, tiny_llama
from typer.testing import CliRunner

from hf_fwp import cli
from hf_fwp.conversion.ablate import WITHOUT, ablate, chosen, fitted_to, matters, outcome, runs_of
from hf_fwp.conversion.choices import AS_IT_IS, CHOICES, SWEEPS
from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.recipes import RECIPES, STUDENTS, Recipe, find_recipe

LAYERS, LENGTH = 3, 16
command = importlib.import_module("hf_fwp.conversion.ablate")
calibration = importlib.import_module("hf_fwp.conversion.calibrate")

SMALL = {"sequence_length": LENGTH, "solve_tokens": 7 * LENGTH, "rank_solve_tokens": 5 * LENGTH, "rank_tokens": LENGTH}
TRAINED = {"align_tokens": 8 * LENGTH, "distil_tokens": 8 * LENGTH, "align": {"lr": 1e-3}, "distil": {"lr": 1e-3}}


DROPPED = {"lr": 1e-3, "window_dropout": (0.5, 0.25)}
WINDOWED = Recipe(
    "windowed", "small", **SMALL, **TRAINED | {"align": DROPPED, "distil": DROPPED}, fwp={"window": 4, "sinks": 1}
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(calibration, "ROUNDS", (({"rotate": (False, True)},), ({"rotate": (False, True)},)))
    monkeypatch.setitem(
        RECIPES, "closed-form", Recipe("closed-form", "small", **SMALL, solve_more=2.0, stream="teacher")
    )
    monkeypatch.setitem(RECIPES, "quick", Recipe("quick", "small", **SMALL, **TRAINED))


@pytest.fixture(scope="module")
def teacher():
    return tiny_llama(layers=LAYERS)


def ablated(teacher, output, **said):
    given = {"tokenizer": byte_tokenizer(), "data": TEXTS, "tokens": 2 * LENGTH, **said}
    return ablate(teacher, output=output, **given)


def runs(recipe, names=tuple(CHOICES), *, keep=0, sweep=None, rule="gated_delta_net"):
    return list(runs_of(recipe, names, rule=rule, keep=keep, layers=8, seed=0, sweep=sweep))


@pytest.mark.parametrize("name", list(CHOICES)[1:])
def test_every_choice_makes_a_difference_to_one_of_our_recipes(name):
    ours = [*map(find_recipe, ("closed-form", "quick", "standard")), WINDOWED]
    choice = CHOICES[name]
    difference = [matters(r, r.changed(choice.change), choice, rule="gated_delta_net", keep=4, layers=8) for r in ours]
    assert any(difference)
    assert choice.expected.split()[0].strip(":") in ("better", "worse", "same")


@pytest.mark.parametrize("rule", STUDENTS)
@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_makes_mixers_that_can_be_built(name, rule):
    recipe = find_recipe("closed-form").changed(CHOICES[name].change)
    assert copy_teacher(tiny_llama(), layers=[0], fwp=recipe.options(rule)).hf_fwp_layers[0].options.rule == rule


def test_what_a_recipe_does_not_do_is_not_run():
    closed, quick = ([run.choice for run in runs(find_recipe(name), keep=0)] for name in ("closed-form", "quick"))
    assert closed[0] == quick[0] == AS_IT_IS
    assert not [name for name in closed if "align" in name or "distil" in name or "kept" in name]
    as_read = replace(find_recipe("closed-form"), solve_tokens=8192)  # and as many again
    assert [run.choice for run in runs(as_read) if "solved" in run.choice] == [
        "solved on 8192 tokens",
        "solved on 32768 tokens",
    ]
    assert "kept for recall too" not in [run.choice for run in runs(find_recipe("quick"), keep="uniform:0.5")]
    assert {"no align", "distil mixers only"} < set(quick)
    assert [run.choice for run in runs(find_recipe("closed-form"), keep=0.5)].count("kept at random") == 3
    linear = [run.choice for run in runs(find_recipe("closed-form"), rule="linear_attention")]
    assert "no value regressor" in linear
    assert "no bias of q and k" not in linear  # it has none


def test_windows_are_left_out_only_where_there_are_some():
    name = "window never left out"
    assert [run.choice for run in runs(WINDOWED, (AS_IT_IS, name))] == [AS_IT_IS, name]
    assert [run.choice for run in runs(replace(WINDOWED, fwp={}), (AS_IT_IS, name))] == [AS_IT_IS]
    assert all(run.recipe.distil["window_dropout"] == (0.0, 0.0) for run in runs(WINDOWED, (name,)))


def test_all_runs_train_on_as_many_tokens():
    trained = {run.choice: run.recipe.trained() for run in runs(find_recipe("quick"))}
    assert trained.pop("not trained") == 0
    assert set(trained.values()) == {16 * LENGTH}


def test_a_sweep_scales_every_learning_rate():
    made = runs(find_recipe("quick"), (AS_IT_IS,), sweep="lr")
    assert [run.recipe.align["lr"] for run in made] == pytest.approx([1e-3 * factor for factor in SWEEPS["lr"]])
    assert [run.recipe.distil["lr"] for run in made] == pytest.approx([1e-3 * factor for factor in SWEEPS["lr"]])
    assert len({run.name for run in made}) == len(made)
    assert len(runs(find_recipe("closed-form"), (AS_IT_IS,), sweep="lr")) == 1


def test_kept_layers_are_as_many_as_asked_for():
    random = [run.keep for run in runs(find_recipe("closed-form"), ("kept at random",), keep=0.25)]
    assert [len(kept) for kept in random] == [2, 2, 2]
    assert len({tuple(kept) for kept in random}) > 1
    (uniform,) = runs(find_recipe("closed-form"), ("kept uniformly",), keep=2)
    assert uniform.keep == [2, 6]


def test_a_change_names_a_stage_and_its_setting():
    recipe = Recipe("x", "x", align={"lr": 1.0, "steps": 3}, align_tokens=10, distil_tokens=30)
    assert recipe.changed({"align.lr": 2.0}).align == {"lr": 2.0, "steps": 3}
    assert recipe.align["lr"] == 1.0
    assert recipe.changed({"align_tokens": 0}).distil_tokens == 40
    assert recipe.with_rates(0.5).align == {"lr": 0.5, "steps": 3}


def test_choices_are_found_by_how_they_begin():
    assert chosen(None, alone=True) == list(CHOICES)
    assert chosen(None, alone=False) == [AS_IT_IS]
    assert chosen("kept", alone=True) == [AS_IT_IS, "kept for recall too", "kept uniformly", "kept at random"]
    assert chosen(["no gate", "kept u"], alone=True) == [AS_IT_IS, "no gate", "kept uniformly"]


def test_the_outcome_is_told_by_the_kl():
    assert [outcome(kl, 1.0) for kl in (0.9, 0.99, 1.0, 1.01, 1.2)] == ["better", "same", "same", "same", "worse"]


def test_runs_are_done_once_and_the_table_says_what_came_out(teacher, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        done = []

        def stopped(run, *args, **kwargs):
            if done:
                raise KeyboardInterrupt
            done.append(run.choice)
            return original(run, *args, **kwargs)

        original = command._measured
        patch.setattr(command, "_measured", stopped)
        with pytest.raises(KeyboardInterrupt):
            ablated(teacher, tmp_path, choices=["no gate"])
    assert done == [AS_IT_IS]
    first = next((tmp_path / "runs").iterdir()).read_text()
    rows = ablated(teacher, tmp_path, choices=["no gate"])
    assert first == (tmp_path / "runs" / "closed-form-as-it-is-0.json").read_text()
    assert [row["choice"] for row in rows] == [AS_IT_IS, "no gate"]
    assert rows[0]["outcome"] == "same"
    assert rows[0]["kl"] != rows[1]["kl"]
    assert rows == json.loads((tmp_path / "ablation.json").read_text())
    header, _, *lines = (tmp_path / "ablation.md").read_text().splitlines()
    cells = dict(zip(header.split(" | "), lines[1].split(" | "), strict=True))
    assert cells["choice"] == "no gate"
    assert cells["KL"] == f"{rows[1]['kl']:.4f}"
    assert f"{rows[0]['tokens']} held-out tokens" in lines[-1]
    with monkeypatch.context() as patch:
        patch.setattr(command, "_measured", None)  # nothing is run again
        assert ablated(teacher, tmp_path, choices=["no gate"]) == rows
    with pytest.raises(ValueError, match="a run with another rule; give another output"):
        ablated(teacher, tmp_path, choices=["no gate"], rule="delta_net")


def test_recall_stands_in_the_table_of_runs_that_measured_it(teacher, tmp_path):
    rows = ablated(teacher, tmp_path, choices=["kept at"], keep=1, needles=1)
    assert [len(row["recall"]) for row in rows] == [1, 3]
    assert rows[0]["recall"][0]["texts"] == 1
    header, _, *lines = (tmp_path / "ablation.md").read_text().splitlines()
    for line, row in zip(lines, rows, strict=False):
        given = dict(zip(header.strip(" |").split(" | "), line.strip(" |").split(" | "), strict=True))
        shares = [found["needles"]["512"]["found"] for found in row["recall"]]
        assert given["needle 512"] == ", ".join(f"{share:.2f}" for share in shares)
    assert "needle: numbers" in lines[-1]
    with pytest.raises(ValueError, match="a run with another needles; give another output"):
        ablated(teacher, tmp_path, keep=1, needles=2, choices=["kept at"])


SPLITS = {"train": TEXTS, "test": TEXTS[:40]}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"data": {**SPLITS, "train": [TEXTS[1], *TEXTS]}}, "another text"),
        ({"data": {**SPLITS, "test": TEXTS[1:41]}}, "another text"),
        ({"teacher": tiny_llama(layers=LAYERS, seed=5)}, "another weights"),
    ],
    ids=["text to train on", "held-out text", "teacher"],
)
def test_results_of_another_text_or_teacher_are_not_taken_for_ones_own(other, told, teacher, tmp_path):
    said = {"teacher": teacher, "output": tmp_path, "data": SPLITS, "choices": AS_IT_IS}
    rows = ablated(**said)
    with pytest.raises(ValueError, match=f"is the result of a run with {told}; give another output"):
        ablated(**{**said, **other})
    same = {"train": tuple(TEXTS), "test": tuple(TEXTS[:40])}
    assert ablated(**{**said, "data": same, "teacher": copy.deepcopy(teacher)}) == rows


def test_results_that_do_not_say_what_they_are_of_are_taken(teacher, tmp_path):
    rows = ablated(teacher, tmp_path, choices=AS_IT_IS)
    (file,) = (tmp_path / "runs").iterdir()
    result = json.loads(file.read_text())
    for name in command.FINGERPRINTS:
        del result["run"][name]
    file.write_text(json.dumps(result))
    assert [row["kl"] for row in ablated(teacher, tmp_path, choices=AS_IT_IS)] == [row["kl"] for row in rows]


def test_a_student_with_windows_is_measured_without_them_too(teacher, tmp_path):
    rows = ablated(teacher, tmp_path, recipe=["closed-form", WINDOWED], choices=["window never"])
    assert [row["choice"] for row in rows] == [AS_IT_IS, AS_IT_IS, "window never left out"]
    assert "kl_without_windows" not in rows[0]
    _, first, second = (row.get("kl_without_windows") for row in rows)
    assert first > 0
    assert second > 0
    assert first != second
    header, _, *lines = (tmp_path / "ablation.md").read_text().splitlines()
    at = header.strip(" |").split(" | ").index(WITHOUT)
    assert [line.strip(" |").split(" | ")[at] for line in lines[:3]] == ["-", f"{first:.4f}", f"{second:.4f}"]


def test_where_all_layers_are_kept_there_is_no_window_to_be_without(teacher, tmp_path):
    (row,) = ablated(teacher, tmp_path, recipe=WINDOWED, choices=[AS_IT_IS], keep=LAYERS)
    assert row["kl"] == 0
    assert "kl_without_windows" not in row


def test_recipes_side_by_side_and_training_that_was_interrupted(teacher, tmp_path, monkeypatch):
    verb = importlib.import_module("hf_fwp.conversion.convert")
    with monkeypatch.context() as patch:
        patch.setattr(verb, "distil", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ablated(teacher, tmp_path, recipe=["closed-form", "quick"])
    assert (tmp_path / "runs" / "quick-as-it-is-0.partial" / "align").is_dir()
    monkeypatch.setattr(verb, "align", None)  # it is finished
    rows = ablated(teacher, tmp_path, recipe=["closed-form", "quick"])
    assert [(row["recipe"], row["choice"]) for row in rows] == [("closed-form", AS_IT_IS), ("quick", AS_IT_IS)]
    assert all(file.suffix == ".json" for file in (tmp_path / "runs").iterdir())


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("recipe", ["quick", "naive", "radlads", "taylor-calibrate", "lolcats"])
def test_a_budget_is_of_all_tokens_that_are_read(recipe, keep, teacher):
    made = replace(find_recipe(recipe), sequence_length=LENGTH)
    fitted = fitted_to(16000, made, teacher, rule=made.rule or "gated_delta_net", keep=keep)
    assert fitted.tokens(ranked=keep > 0) == 16000
    assert fitted.solve_tokens == made.solve_tokens
    assert fitted.extend_tokens == 0
    assert fitted_to(None, made, teacher, rule="gated_delta_net", keep=keep) == made


def test_the_first_of_every_recipe_is_run_first_and_stands_beside_the_first_of_all(teacher, tmp_path, monkeypatch):
    def measured(run, *_, **__):
        done.append((run.recipe.name, run.choice))
        kl = {"quick": 2.0, "closed-form": 1.0}[run.recipe.name] * (3 if "no gate" in run.choice else 1)
        scores = {"ratio": 1.0, "kl": kl, "agreement": 1.0, "tokens": 32, "teacher_perplexity": 9.0}
        environment = {"commit": "c", "date": "2026-01-01", "device": "d", "threads": 1}
        environment["versions"] = dict.fromkeys(("torch", "transformers"), "1")
        return {"evaluation": scores, "seconds": 1.0, "environment": environment}

    done = []
    monkeypatch.setattr(command, "_measured", measured)
    rows = ablated(teacher, tmp_path, recipe=["quick", "closed-form"], choices=["no gate"])
    assert done == [(name, choice) for choice in (AS_IT_IS, "no gate") for name in ("quick", "closed-form")]
    assert [(row["recipe"], row["choice"]) for row in rows] == [
        (name, choice) for name in ("quick", "closed-form") for choice in (AS_IT_IS, "no gate")
    ]
    assert [row["outcome"] for row in rows] == ["same", "worse", "better", "worse"]
    assert rows[2]["expected"] == "worse than quick"
    monkeypatch.setattr(teacher, "name_or_path", "/somewhere/else/tiny")
    assert ablated(teacher, tmp_path / "other")[0]["run"]["teacher"] == "tiny"


def test_a_dry_run_says_what_would_be_run(teacher, tmp_path, capsys):
    assert ablated(teacher, tmp_path, dry_run=True, keep=1) == []
    told = capsys.readouterr().err
    assert "closed-form, one time scale: about" in told
    assert "kept at random" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"choices": ["no such"]}, "no choice begins with 'no such'; the choices are as it is, one time scale"),
        ({"sweep": "beta"}, "unknown sweep 'beta'; the sweeps are lr"),
        ({"recipe": "quik"}, "did you mean 'quick'"),
        ({"budget": 1000}, "takes no gradient steps"),
    ],
)
def test_bad_requests_are_refused(said, told, teacher, tmp_path):
    with pytest.raises(ValueError, match=told):
        ablated(teacher, tmp_path, **said)


def test_the_command_prints_the_table(teacher, tmp_path, monkeypatch):
    teacher.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    words = ["ablate", tmp_path / "teacher", "--data", tmp_path / "text.txt", "--tokens", 2 * LENGTH]
    words += ["--choices", "no gate,lambda 1", "--output", tmp_path / "out"]
    shown = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "out" / "ablation.md").read_text() in shown.stdout
    rows = json.loads(CliRunner().invoke(cli.app, [str(word) for word in [*words, "--json"]]).stdout)
    assert [row["choice"] for row in rows] == [AS_IT_IS, "no gate", "lambda 1"]


def test_a_recipe_of_ones_own_can_be_converted_with(teacher):
    own = replace(find_recipe("closed-form"), fwp={"time_scales": 1}, solve={"lambdas": (1.0,)})
    report = {
        "tokens": 2 * LENGTH,
        "baseline_tokens": 0,
        "residual_tokens": 0,
        "lengths": (),
        "prompts": (),
        "needles": 0,
    }
    student = convert(
        teacher, tokenizer=byte_tokenizer(), keep=[0], recipe=replace(own, report=report), data=TEXTS, seed=1
    )
    assert {mixer.options.time_scales for mixer in student.hf_fwp_layers.values()} == {1}
    choices = student.conversion_report["choices"]
    assert {choice["lambda"] for choice in choices.values()} == {1.0}
    assert student.conversion_report["evaluation"]["tokens"] == 2 * LENGTH
    assert torch.isfinite(torch.tensor(student.conversion_report["evaluation"]["kl"]))

"""Recipes are data: they can be read, found, counted, and scaled to a budget."""

import importlib
import inspect
from dataclasses import replace

import pytest
from teachers import tiny_teacher

from hf_fwp import RULES
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.keep import rank_layers
from hf_fwp.conversion.recipes import RECIPES, STUDENTS, TRAINING, Recipe, find_recipe, student_options


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_found_by_its_name(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.solve_tokens % recipe.sequence_length == 0
    assert recipe.rank_solve_tokens % recipe.sequence_length == 0


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_arguments_of_their_stages(name):
    recipe = find_recipe(name)
    for stage in ("solve", "align", "distil", "extend"):
        module = importlib.import_module(f"hf_fwp.conversion.{stage}")
        assert set(getattr(recipe, stage)) <= set(inspect.signature(getattr(module, stage)).parameters)
    assert set(recipe.rank) <= set(inspect.signature(rank_layers).parameters)
    assert copy_teacher(tiny_teacher("llama"), layers=[1], fwp=recipe.options(recipe.rule or "gated_delta_net"))


def test_what_the_recipes_promise():
    assert find_recipe("closed-form").trained() == 0
    assert [find_recipe(name).trained() for name in ("standard", "long")] == [40_000_000, 500_000_000]
    quick = find_recipe("quick")
    assert quick.align_tokens > 0
    assert quick.distil_tokens > 0
    assert quick.tokens(ranked=True) <= 250_000


def test_an_unknown_name_is_refused_with_the_closest():
    with pytest.raises(ValueError, match="unknown recipe 'quik'; did you mean 'quick'"):
        find_recipe("quik")
    with pytest.raises(ValueError, match="'delta_nett'; did you mean 'delta_net'"):
        student_options("delta_nett")


def test_an_unknown_stream_is_refused():
    with pytest.raises(ValueError, match="unknown stream 'both'; allowed: student, teacher"):
        Recipe("x", "x", stream="both")


@pytest.mark.parametrize(("processes", "sequences"), [(1, 1), (2, 2), (3, 3)])
def test_processes_share_steps_evenly(processes, sequences):
    recipe = find_recipe("quick").for_processes(processes)
    assert [recipe.batch(stage) for stage in TRAINING] == [sequences] * 3
    assert (recipe.distil["lr"], recipe.distil_tokens) == (find_recipe("quick").distil["lr"], 159744)


@pytest.mark.parametrize("stage", TRAINING)
def test_a_step_is_as_large_as_its_stage_takes_it(stage):
    run = getattr(importlib.import_module(f"hf_fwp.conversion.{stage}"), stage)
    assert Recipe("x", "x").batch(stage) == inspect.signature(run).parameters["batch_size"].default


def test_rates_are_lower_where_mixers_get_a_window():
    quick = find_recipe("quick")
    windowed = quick.with_mixer({"window": 64})
    assert windowed.distil["lr"] == pytest.approx(0.1 * quick.distil["lr"])
    assert windowed.align["lr_projections"] == pytest.approx(0.1 * quick.align["lr_projections"])
    assert windowed.with_mixer({"sinks": 4}).distil["lr"] == windowed.distil["lr"]
    assert quick.with_mixer({"sinks": 4}).distil == quick.with_mixer({"window": 0}).distil == quick.distil


def test_tokens_are_those_of_all_stages():
    recipe = Recipe("x", "x", solve_tokens=7, rank_solve_tokens=30, rank_tokens=200, align_tokens=1000, distil_tokens=9)
    assert recipe.trained() == 1009
    assert recipe.tokens(ranked=False) == 1016
    assert recipe.tokens(ranked=True) == 1246


def test_more_is_solved_on_than_must_be_there():
    assert [find_recipe(name).solved for name in ("closed-form", "quick")] == [32768, 16384]
    assert replace(find_recipe("closed-form"), solve_more=1.3).solved == 41 * 512  # whole sequences


def test_a_budget_is_shared_as_before():
    recipe = Recipe("x", "x", align_tokens=100, distil_tokens=300)
    scaled = recipe.with_trained(1000)
    assert (scaled.align_tokens, scaled.distil_tokens) == (250, 750)
    assert recipe.with_trained(0).trained() == 0
    three = replace(recipe, extend_tokens=100).with_trained(999)
    assert (three.align_tokens, three.distil_tokens, three.extend_tokens) == (200, 599, 200)
    only = Recipe("x", "x", align_tokens=100).with_trained(10)
    assert (only.align_tokens, only.distil_tokens) == (10, 0)


@pytest.mark.parametrize("rule", sorted(set(RULES) - set(STUDENTS)))
def test_a_rule_without_a_student_is_refused(rule):
    with pytest.raises(ValueError, match=f"unknown update rule for conversion '{rule}'"):
        student_options(rule)


@pytest.mark.parametrize("rule", STUDENTS)
def test_a_rule_with_a_student(rule):
    student = copy_teacher(tiny_teacher("llama"), layers=[1], fwp=student_options(rule))
    mixer = student.hf_fwp_layers[1]
    assert mixer.options.rule == rule
    assert mixer.options.output_gate == "head_sigmoid"
    assert not mixer.options.conv_size

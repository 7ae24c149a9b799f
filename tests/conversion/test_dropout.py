"""Windows left out while a student learns: as often as planned, the same after a resume, and to some effect."""

import sys

import pytest
import torch
from teachers import SHAPES, tiny_teacher

from hf_fwp.conversion.align import align
from hf_fwp.conversion.distil import distil
from hf_fwp.conversion.dropout import WindowDropout, drawn, rate
from hf_fwp.conversion.families import copy_teacher

SETTINGS = {"steps": 5, "batch_size": 2, "lr": 1e-2, "progress": False, "save_every": 2, "bf16": False}
PLACES = {"align": "checkpoint", "distil": "output_dir"}
RUNS = {"align": align, "distil": distil}


@pytest.fixture
def teacher():
    return tiny_teacher("llama")


@pytest.fixture
def ids():
    return torch.randint(1, SHAPES["vocab_size"], (12, 16), generator=torch.Generator().manual_seed(3))


def student_of(teacher, window=4):
    torch.manual_seed(5)
    return copy_teacher(teacher, layers=(0, 2), fwp={"qk_norm": "l2", "window": window})


def weights(model):
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def trained(stage, teacher, ids, *, window=4, **settings):
    student = student_of(teacher, window)
    RUNS[stage](student, teacher, ids, **{**SETTINGS, **settings})
    return weights(student)


def test_the_rate_goes_along_a_line():
    assert [rate((0.5, 0.1), step, steps=5) for step in range(5)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert rate((0.5, 0.1), 0, steps=1) == 0.5
    for wrong in ((0.5,), (0.5, 1.5), (-0.1, 0)):
        with pytest.raises(ValueError, match="give two probabilities from 0 to 1"):
            rate(wrong, 0, steps=5)


@pytest.mark.parametrize("stage", RUNS)
def test_windows_are_left_out_as_often_as_planned(stage, teacher, ids):
    seen, student = [], student_of(teacher)
    mixer = student.hf_fwp_layers[2]
    mixer.window.register_forward_hook(lambda window, *_: seen.append(window.dropped_B))
    RUNS[stage](student, teacher, ids, **{**SETTINGS, "batch_size": 10}, window_dropout=(1.0, 0.0))
    counts = [int(dropped.sum()) for dropped in seen]
    assert [len(dropped) for dropped in seen] == [10] * 5
    assert counts[0] == 10
    assert counts[-1] == 0
    assert 5 < sum(counts[1:-1]) < 25
    assert mixer.window.dropped_B is None


def test_draws_differ_between_mixers_and_steps():
    draws = [drawn(0.3, mixers=3, sequences=2000, seed=seed).float() for seed in (1, 1, 2)]
    assert all(share == pytest.approx(0.3, abs=0.05) for share in draws[0].mean(1).tolist())
    assert torch.equal(draws[0], draws[1])
    together = torch.cat([draws[0], draws[2]])
    assert torch.corrcoef(together).fill_diagonal_(0).abs().max() < 0.1


@pytest.mark.parametrize("stage", ["align", pytest.param("distil", marks=pytest.mark.slow)])
def test_it_makes_a_difference_to_windows_alone(stage, teacher, ids):
    schedule = {"window_dropout": (1.0, 0.5)}
    assert not torch.equal(trained(stage, teacher, ids, **schedule), trained(stage, teacher, ids))
    without = [trained(stage, teacher, ids, window=0, **settings) for settings in ({}, schedule)]
    assert torch.equal(*without)


@pytest.mark.parametrize("stage", RUNS)
def test_a_resumed_run_leaves_out_the_same(stage, teacher, ids, tmp_path, monkeypatch):
    settings = {PLACES[stage]: tmp_path / "run", "window_dropout": (0.6, 0.3)}
    whole = trained(stage, teacher, ids, **{**settings, PLACES[stage]: tmp_path / "whole"})

    def stopped(mixer, *_):
        mixer.calls = getattr(mixer, "calls", 0) + 1
        if mixer.calls == 4:
            raise KeyboardInterrupt

    parts, again = student_of(teacher), student_of(teacher)
    parts.hf_fwp_layers[0].register_forward_pre_hook(stopped)
    with pytest.raises(KeyboardInterrupt):
        RUNS[stage](parts, teacher, ids, **SETTINGS, **settings)
    assert parts.hf_fwp_layers[0].window.dropped_B is None
    torch.rand(7)  # another state of the generator than the one that was interrupted
    RUNS[stage](again, teacher, ids, **SETTINGS, **settings, resume=True)
    assert torch.equal(weights(again), whole)


def test_the_comparison_sees_draws_that_go_on_from_anywhere(teacher, ids, tmp_path, monkeypatch):
    def anywhere(probability, *, mixers, sequences, seed):
        return torch.rand(mixers, sequences) < probability

    monkeypatch.setattr(sys.modules[align.__module__], "drawn", anywhere)
    with pytest.raises(AssertionError):
        test_a_resumed_run_leaves_out_the_same("align", teacher, ids, tmp_path, monkeypatch)


def test_a_wrong_schedule_is_refused_before_the_first_step(teacher, ids):
    for stage in RUNS:
        with pytest.raises(ValueError, match="window_dropout is"):
            trained(stage, teacher, ids, window_dropout=(0.5, 2.0))
    with pytest.raises(ValueError, match="window_dropout is"):
        WindowDropout([], (2.0, 0.5), sequences=1, seed=0)

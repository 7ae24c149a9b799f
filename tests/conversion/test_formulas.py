"""Rates by formula: distance and entropy are those of the teacher's own attention maps, and the mixer is given them."""

import pytest
import torch
from teachers import tiny_teacher

from hf_fwp.conversion.calibrate import attention_heads
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.formulas import BETAS, calibrate_by_formulas, statistics
from hf_fwp.conversion.recipes import student_options
from hf_fwp.conversion.solve import solve
from hf_fwp.conversion.stream import Walk

LENGTH = 20


@pytest.fixture
def ids_NT():
    return torch.randint(1, 67, (6, LENGTH), generator=torch.Generator().manual_seed(1))


def scene(ids_NT, rule="gated_delta_net"):
    teacher = tiny_teacher("llama")
    teacher.set_attn_implementation("eager")
    student = copy_teacher(teacher, layers=[0], fwp=student_options(rule))
    walk = Walk(teacher, ids_NT)
    return teacher, student.hf_fwp_layers[0], walk.inputs(0), walk.rotary(0), walk.softmax(0)


@torch.no_grad()
def test_the_statistics_are_those_of_the_maps(ids_NT):
    teacher, mixer, x_NTD, rotary, softmax = scene(ids_NT)
    mass_NHTT = teacher(ids_NT, output_attentions=True).attentions[0].double()
    position = torch.arange(LENGTH)
    distance_H = (mass_NHTT * (position[:, None] - position)).sum(-1).mean((0, 2))
    entropy_NHT = -torch.xlogy(mass_NHTT, mass_NHTT).sum(-1)[..., 1:] / (position[1:] + 1).log()
    heads = attention_heads(mixer, x_NTD, rotary, softmax=softmax)
    found = statistics(heads.q_rotated, heads.k_rotated, softmax)
    torch.testing.assert_close(found[0], distance_H.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], entropy_NHT.mean((0, 2)).float(), rtol=1e-4, atol=1e-5)
    assert 0 < found[1].min() < found[1].max() < 1


@torch.no_grad()
def test_fading_weights_are_as_old_as_the_attention_is(ids_NT):
    _, mixer, x_NTD, rotary, softmax = scene(ids_NT)
    heads = attention_heads(mixer, x_NTD, rotary, softmax=softmax)
    distance_H, entropy_H = statistics(heads.q_rotated, heads.k_rotated, softmax)
    found = calibrate_by_formulas(mixer, x_NTD, rotary, softmax=softmax, heldout=1)
    rates = mixer._rates(x_NTD)
    ages = torch.arange(4000.0)
    for state in range(mixer.options.num_states):
        weights = rates["g"][0, 0, state].exp() ** ages
        assert float((weights * ages).sum() / weights.sum()) == pytest.approx(float(distance_H[state % 4]), rel=1e-2)
        beta = float((1 - entropy_H[state % 4]).clamp(*BETAS))
        assert rates["beta"][..., state].unique().tolist() == pytest.approx([beta], rel=1e-4)
    assert len(found["time_scales"]) == 2


@pytest.mark.parametrize(("rule", "names"), [("linear_attention", set()), ("delta_net", {"beta"})])
def test_a_rule_gets_the_rates_that_it_has(rule, names, ids_NT):
    _, mixer, x_NTD, rotary, softmax = scene(ids_NT, rule)
    assert set(calibrate_by_formulas(mixer, x_NTD, rotary, softmax=softmax, heldout=1)["time_scales"][0]) == names


def test_solve_takes_either_and_refuses_a_third(ids_NT):
    teacher = tiny_teacher("llama")
    student = copy_teacher(teacher, layers=[0, 1], fwp=student_options("gated_delta_net"))
    settings = {"heldout": 2, "rates": "formulas", "fixed": {"beta": 0.25}, "progress": False}
    found = solve(student, teacher, ids_NT, **settings)
    assert found[1]["time_scales"][0]["beta"] == [0.25] * 4
    assert found[1]["residual"] < 1
    with pytest.raises(ValueError, match="unknown way to find rates 'guess'; allowed: formulas, residual"):
        solve(student, teacher, ids_NT, rates="guess")

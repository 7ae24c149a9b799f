"""The closed form against plain least squares, and against what the mixer then answers."""

import copy
import importlib

import pytest
import torch
from teachers import LAYERS, tiny_teacher

from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.recipes import STUDENTS, student_options
from hf_fwp.conversion.solve import (
    LAMBDAS,
    Moments,
    head_weights,
    own_regressors,
    own_weights,
    regressors,
    ridge,
    solve,
    solve_layer,
)
from hf_fwp.conversion.stream import Walk
from hf_fwp.hosts import HOSTS, mixer_options

SEQUENCES, LENGTH, HELDOUT = 10, 20, 3
stage = importlib.import_module("hf_fwp.conversion.solve")
streams = importlib.import_module("hf_fwp.conversion.stream")
calibration = importlib.import_module("hf_fwp.conversion.calibrate")


@pytest.fixture(autouse=True)
def _one_candidate(monkeypatch):
    """The search has its own tests; here one setting per time scale is enough."""
    monkeypatch.setattr(calibration, "ROUNDS", (({"rotate": (True,)},), ({"rotate": (False,)},)))


@pytest.fixture
def ids_NT():
    return torch.randint(1, 67, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def student_of(teacher, *, layers=(1, 2), rule="gated_delta_net", **fwp):
    return copy_teacher(teacher, layers=layers, fwp={**student_options(rule), **fwp})


def problem(tokens=200):
    r, target, heads = (torch.randn(tokens, size, dtype=torch.float64) for size in (12, 5, 7))
    moments = Moments.empty(r, target, heads)
    moments.add(r, target, heads)
    return r, target, moments


def test_without_lambda_it_is_least_squares():
    r, target, moments = problem()
    weight, found = ridge(moments, moments, torch.randn(12, 5, dtype=torch.float64), (0.0,))
    expected = torch.linalg.lstsq(r, target).solution
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)
    missed = (r @ expected - target).square().sum() / target.square().sum()
    assert found["residual"] == pytest.approx(float(missed))
    assert found["fitted"] == found["residual"]


def test_with_infinite_lambda_it_is_the_prior():
    r, target, moments = problem()
    prior = torch.randn(12, 5, dtype=torch.float64)
    weight, found = ridge(moments, moments, prior, (1e12,))
    torch.testing.assert_close(weight, prior, rtol=1e-6, atol=1e-8)
    missed = (r @ prior - target).square().sum() / target.square().sum()
    assert found["residual"] == pytest.approx(float(missed))
    assert found["prior"] == pytest.approx(float(missed))


def test_lambda_is_the_one_with_the_least_heldout_residual():
    (_, _, fit), (_, _, judge) = problem(20), problem()
    prior = torch.zeros(12, 5, dtype=torch.float64)
    residuals = [ridge(fit, judge, prior, (lam,))[1]["residual"] for lam in LAMBDAS]
    assert len(set(residuals)) == len(LAMBDAS)
    best = min([*residuals, judge.residual(prior)])
    assert ridge(fit, judge, prior)[1]["residual"] == pytest.approx(best)


@torch.no_grad()
def test_without_the_heads_it_is_drawn_to_what_the_mixer_has(ids_NT):
    teacher = tiny_teacher("qwen3")
    before = student_of(teacher)
    after = student_of(teacher)
    after.load_state_dict(before.state_dict())
    settings = {"heldout": HELDOUT, "stream": "teacher", "calibrated": True, "progress": False}
    solve(after, teacher, ids_NT, **settings, per_head=False, lambdas=(1e9,))
    for layer, mixer in after.hf_fwp_layers.items():
        for name in ("o_proj.weight", "o_proj.bias", "skip_proj.weight"):
            kept = before.hf_fwp_layers[layer].get_parameter(name)
            torch.testing.assert_close(mixer.get_parameter(name), kept, rtol=1e-4, atol=1e-5)
    solve(after, teacher, ids_NT, **settings, per_head=True, lambdas=(1e9,))
    assert (after.hf_fwp_layers[1].o_proj.weight - before.hf_fwp_layers[1].o_proj.weight).abs().max() > 1e-2


@pytest.mark.parametrize("rule", STUDENTS)
@pytest.mark.parametrize("family", HOSTS)
@torch.no_grad()
def test_the_mixer_answers_what_the_regression_predicted(family, rule, ids_NT):
    teacher = tiny_teacher(family)
    student = student_of(teacher, rule=rule)
    before = copy.deepcopy(teacher.state_dict())
    found = solve(student, teacher, ids_NT, heldout=HELDOUT, stream="teacher", progress=False)
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert list(found) == [1, 2]
    walk = Walk(teacher, ids_NT)
    for layer in range(LAYERS):
        x_NTD, answer_NTD, _ = walk.attend(layer)
        if layer in found:
            mixer = student.hf_fwp_layers[layer]
            missed = mixer(x_NTD, position_embeddings=walk.rotary(layer))[0] - answer_NTD
            for name, part in (("residual", slice(-HELDOUT, None)), ("fitted", slice(-HELDOUT))):
                plain = missed[part].square().sum() / answer_NTD[part].square().sum()
                assert found[layer][name] == pytest.approx(float(plain), rel=1e-2, abs=1e-4)
            assert found[layer]["residual"] <= found[layer]["prior"]
            assert found[layer]["residual"] < 1
            assert mixer_options(student.config, layer) == mixer.options


@torch.no_grad()
def test_a_layer_may_be_solved_in_parts(ids_NT):
    teacher = tiny_teacher("llama").double()
    mixer = student_of(teacher).hf_fwp_layers[1]
    walk = Walk(teacher, ids_NT)
    walk.attend(0)
    x_NTD, target_NTD, heads_NTC = walk.attend(1)
    projection, rotary = walk.output_projection(1), walk.rotary(1)
    cut = [tuple(each[rows] for each in (x_NTD, target_NTD, heads_NTC)) for rows in walk.rows()]
    found, weights = [], []
    for lessons in (cut, [(x_NTD, target_NTD, heads_NTC)]):
        found.append(solve_layer(mixer, projection, lessons, rotary, fitted=SEQUENCES - HELDOUT))
        weights.append(own_weights(mixer))
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-8)
    assert found[0]["residual"] == pytest.approx(found[1]["residual"], rel=1e-8)
    outputs = mixer(x_NTD, position_embeddings=rotary)[0]
    r = regressors(mixer, x_NTD, rotary)
    torch.testing.assert_close(outputs, r @ weights[0], rtol=1e-8, atol=1e-8)
    assert (outputs - target_NTD).norm() > 1e-2 * target_NTD.norm()


@torch.no_grad()
def test_both_streams_agree_in_the_first_converted_layer(ids_NT):
    teacher = tiny_teacher("qwen3")
    solved = []
    for stream in stage.STREAMS:
        student = student_of(teacher, layers=[1])
        solve(student, teacher, ids_NT, heldout=HELDOUT, stream=stream, progress=False)
        solved.append(student(ids_NT).logits)
    torch.testing.assert_close(*solved, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_students_stream_is_what_later_layers_are_fitted_on(ids_NT):
    teacher = tiny_teacher("llama")
    student = student_of(teacher, layers=[0, 1])
    found = solve(student, teacher, ids_NT, heldout=HELDOUT, stream="student", progress=False)
    ours, theirs = Walk(student, ids_NT), Walk(teacher, ids_NT)
    ours.advance(0, student.hf_fwp_layers[0](ours.inputs(0), position_embeddings=ours.rotary(0))[0])
    theirs.attend(0)
    answer_NTD = theirs.attend(1)[1]
    missed = student.hf_fwp_layers[1](ours.inputs(1), position_embeddings=ours.rotary(1))[0] - answer_NTD
    plain = missed[-HELDOUT:].square().sum() / answer_NTD[-HELDOUT:].square().sum()
    assert found[1]["residual"] == pytest.approx(float(plain), rel=1e-2)


@torch.no_grad()
def test_streams_in_files_give_the_same(ids_NT, tmp_path, monkeypatch):
    teacher, solved = tiny_teacher("llama"), []
    for limit in (10**9, 0):
        monkeypatch.setattr(streams, "IN_MEMORY", limit)
        student = student_of(teacher, layers=[0, 2])
        found = solve(student, teacher, ids_NT, heldout=HELDOUT, folder=tmp_path / "streams", progress=False)
        assert (tmp_path / "streams").is_dir() == (limit == 0)
        solved.append((found, student(ids_NT).logits))
    assert solved[0][0] == solved[1][0]
    assert torch.equal(solved[0][1], solved[1][1])
    assert not list((tmp_path / "streams").iterdir())  # the files are gone with their tensors


SHAPES = [
    {},
    {"state_heads": "grouped"},
    {"time_scales": 1},
    {"value_skip": 0},
    {"value_skip": 2},
    {"time_scales": 3, "o_bias": False},
    {"window": 3, "sinks": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_every_head_has_its_own_regressors(shape, ids_NT):
    teacher = tiny_teacher("qwen2", use_sliding_window=False)
    mixer = student_of(teacher, **shape).hf_fwp_layers[1]
    walk = Walk(teacher, ids_NT[:2])
    x_NTD, rotary = walk.inputs(0), walk.rotary(0)
    plain = regressors(mixer, x_NTD, rotary)
    own = [set(indices.tolist()) for indices in own_regressors(mixer)]
    ones = {plain.shape[-1] - 1} if mixer.options.o_bias else set()
    moved = {}
    for name, heads in (("q_proj", 4), ("v_proj", 2)):
        weight = getattr(mixer, name).weight
        for head, rows in enumerate(torch.arange(len(weight)).chunk(heads)):
            kept = weight[rows].clone()
            weight[rows] = torch.randn_like(kept)
            changed = (regressors(mixer, x_NTD, rotary) - plain).abs().amax((0, 1)) > 1e-6
            moved[name, head] = set(changed.nonzero().flatten().tolist())
            weight[rows] = kept
    for head in range(4):
        assert own[head] == moved["q_proj", head] | (moved["v_proj", head // 2] & own[head]) | ones
        assert own[head] != moved["q_proj", (head + 1) % 4] | (moved["v_proj", head // 2] & own[head]) | ones
    for group in range(2):
        assert own[2 * group] | own[2 * group + 1] == moved["v_proj", group] | ones


@pytest.mark.parametrize("shuffled", [False, True])
@torch.no_grad()
def test_the_prior_is_each_head_from_its_own_regressors(shuffled, ids_NT, monkeypatch):
    monkeypatch.setattr(stage, "HEAD_LAMBDA", 0.0)
    teacher = tiny_teacher("qwen3").double()
    mixer = student_of(teacher).hf_fwp_layers[1]
    walk = Walk(teacher, ids_NT)
    walk.attend(0)
    rotary, projection = walk.rotary(1), walk.output_projection(1)
    r = regressors(mixer, walk.inputs(1), rotary)
    own = own_regressors(mixer)
    V = mixer.options.value_head_dim
    heads = torch.cat([r[..., mine] @ torch.randn(len(mine), V, dtype=r.dtype) for mine in own], dim=-1)
    target = projection(heads)
    moments = Moments.empty(r, target, heads)
    moments.add(r, target, heads)
    if shuffled:
        monkeypatch.setattr(stage, "own_regressors", lambda _: own[2:] + own[:2])
    missed = (r @ head_weights(mixer, projection, moments) - target).norm() / target.norm()
    assert missed > 1e-2 if shuffled else missed < 1e-4


@pytest.mark.parametrize("family", ["llama", "granite", "gpt_neox"])
@torch.no_grad()
def test_less_is_missed_beside_a_window_and_nothing_beside_one_that_reaches_everything(family, ids_NT):
    teacher = tiny_teacher(family)
    missed = []
    for window, sinks in ((0, 0), (4, 1), (LENGTH - 3, 3)):
        student = student_of(teacher, window=window, sinks=sinks)
        found = solve(student, teacher, ids_NT, heldout=HELDOUT, progress=False)
        missed.append(max(each["residual"] for each in found.values()))
    assert missed[1] < 0.8 * missed[0]
    assert missed[2] < 1e-3
    torch.testing.assert_close(student(ids_NT).logits, teacher(ids_NT).logits, rtol=0.05, atol=0.05)


def test_what_cannot_be_solved_is_refused(ids_NT):
    teacher = tiny_teacher("llama")
    student = student_of(teacher)
    with pytest.raises(ValueError, match="unknown stream 'both'; allowed: student, teacher"):
        solve(student, teacher, ids_NT, stream="both")
    with pytest.raises(ValueError, match="5 sequences are too few to solve: 4 are held out"):
        solve(student, teacher, ids_NT[:5], heldout=4)

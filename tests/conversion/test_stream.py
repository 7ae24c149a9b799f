"""Walking a decoder block by block gives what its own forward gives, and leaves it as it was."""

import copy

import pytest
import torch
from teachers import LAYERS, tiny_teacher

from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.stream import ROWS, StandIn, Walk, logits
from hf_fwp.hosts import HOSTS

SEQUENCES, LENGTH = ROWS + 2, 17  # two runs of rows, the second not full


@pytest.fixture(params=list(HOSTS))
def teacher(request):
    return tiny_teacher(request.param)


@pytest.fixture
def ids_NT():
    return torch.randint(1, 67, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def modules_of(model):
    return {name: id(module) for name, module in model.named_modules()}


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def test_the_stream_is_the_models_own(teacher, ids_NT):
    seen = teacher(ids_NT, output_hidden_states=True)
    walk = Walk(teacher, ids_NT)
    for layer in range(LAYERS):
        torch.testing.assert_close(walk.hidden_NTD, seen.hidden_states[layer], rtol=0, atol=1e-5)
        (walk.move if layer % 2 else walk.attend)(layer)
    last = torch.cat([walk.finish(LAYERS, walk.hidden_NTD[rows]) for rows in walk.rows()])
    torch.testing.assert_close(last, seen.hidden_states[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.stack([logits(teacher, row) for row in last]), seen.logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_it_can_be_finished_from_any_block(teacher, ids_NT):
    expected = teacher.base_model(ids_NT).last_hidden_state
    walk = Walk(teacher, ids_NT)
    walk.attend(0)
    rows = slice(1, 3)
    torch.testing.assert_close(walk.finish(1, walk.hidden_NTD[rows]), expected[rows], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_true_answers_give_the_same_stream(teacher, ids_NT):
    ours, theirs = Walk(teacher, ids_NT), Walk(teacher, ids_NT)
    for layer in range(LAYERS):
        x_NTD, answer_NTD, _ = theirs.attend(layer)
        assert torch.equal(ours.inputs(layer), x_NTD)
        ours.advance(layer, answer_NTD)
        assert torch.equal(ours.hidden_NTD, theirs.hidden_NTD)


@torch.no_grad()
def test_another_answer_gives_another_stream(teacher, ids_NT):
    ours, theirs = Walk(teacher, ids_NT), Walk(teacher, ids_NT)
    before = ours.hidden_NTD.clone()
    _, answer_NTD, _ = theirs.attend(0)
    ours.advance(0, answer_NTD.roll(1, dims=1))
    assert (ours.hidden_NTD - theirs.hidden_NTD).norm() > 0.1 * (theirs.hidden_NTD - before).norm()


@torch.no_grad()
def test_the_answer_is_the_projection_of_the_heads(teacher, ids_NT):
    walk = Walk(teacher, ids_NT)
    for layer in range(LAYERS):
        projection = walk.output_projection(layer)
        _, answer_NTD, heads_NTC = walk.attend(layer)
        assert heads_NTC.shape == (SEQUENCES, LENGTH, projection.in_features)
        torch.testing.assert_close(projection(heads_NTC), answer_NTD, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_student_is_walked_alike(teacher, ids_NT):
    student = copy_teacher(teacher, layers=[0, 2])
    expected = student(ids_NT, output_hidden_states=True).hidden_states
    walk = Walk(student, ids_NT)
    for layer in range(LAYERS):
        torch.testing.assert_close(walk.hidden_NTD, expected[layer], rtol=0, atol=1e-5)
        if layer in (0, 2):
            x_NTD = walk.inputs(layer)
            walk.advance(layer, student.hf_fwp_layers[layer](x_NTD, position_embeddings=walk.rotary(layer))[0])
        else:
            walk.attend(layer)


def test_nothing_is_left_behind(teacher, ids_NT):
    weights = copy.deepcopy(teacher.state_dict())
    modules, hooks = modules_of(teacher), hooks_of(teacher)
    walk = Walk(teacher, ids_NT)
    x_NTD = walk.inputs(0)
    walk.advance(0, x_NTD)
    walk.attend(1)
    assert modules_of(teacher) == modules
    assert hooks_of(teacher) == hooks
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_nothing_is_left_behind_by_an_error_either(teacher, ids_NT):
    modules, hooks = modules_of(teacher), hooks_of(teacher)
    walk = Walk(teacher, ids_NT)
    with pytest.raises(RuntimeError):
        walk.advance(0, torch.zeros(SEQUENCES, LENGTH, 5))
    walk.attention(1).register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        walk.attend(1)
    assert modules_of(teacher) == modules
    assert hooks_of(teacher) == hooks + 1


def test_a_stand_in_answers_what_it_was_told():
    stand_in = StandIn()
    stand_in.answer = torch.ones(1)
    assert stand_in(hidden_states=torch.zeros(2))[0] is stand_in.answer
    assert torch.equal(stand_in.given, torch.zeros(2))

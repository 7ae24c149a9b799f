"""Which layers stay softmax: every way to say it, and the ranking against swapping layers in whole models."""

import json
from itertools import pairwise
from statistics import geometric_mean

import numpy as np
import pytest
import torch
from teachers import LAYERS, tiny_teacher
from torch.nn import functional as F

from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.keep import (
    EVERY,
    keep_softmax,
    kept_count,
    kept_layers,
    most_needed,
    plain_keep,
    rank_layers,
    recall_probe,
)
from hf_fwp.conversion.recipes import student_options
from hf_fwp.conversion.stream import Walk
from hf_fwp.hosts import converted_layers


@pytest.fixture
def teacher():
    return tiny_teacher("llama")


@pytest.fixture
def student(teacher):
    """Layer 0 is softmax already; the others answer something, and layer 2 has options of its own."""
    per_layer = {"2": {"rope_heads": [True, False] * 4}}
    fwp = {**student_options("gated_delta_net"), "per_layer": per_layer}
    student = copy_teacher(teacher, layers=[1, 2, 3], fwp=fwp)
    with torch.no_grad():
        for layer, mixer in student.hf_fwp_layers.items():
            mixer.o_proj.weight.normal_(std=0.1 * layer)
    return student


@pytest.fixture
def ids_NT():
    return torch.randint(1, 67, (2, 15), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("keep", "count"), [(0, 0), (0.0, 0), (7, 7), (30, 30), (1, 1), (1.0, 30), (0.25, 8), (0.5, 15), (0.01, 0)]
)
def test_a_fraction_or_a_count(keep, count):
    assert kept_count(keep, 30) == count


@pytest.mark.parametrize(
    ("keep", "plain"),
    [
        (np.int64(7), 7),
        (np.float32(0.25), 0.25),
        (np.float64(1), 1.0),
        ([np.int64(5), 0], [5, 0]),
        (list(np.arange(3)), [0, 1, 2]),
        (range(3), [0, 1, 2]),
    ],
    ids=repr,
)
def test_numbers_may_be_those_of_numpy(keep, plain):
    found = plain_keep(keep)
    assert json.dumps(found) == json.dumps(plain)
    assert kept_count(keep, 30) == kept_count(plain, 30)
    if isinstance(plain, list):
        assert kept_layers(keep, 30) == kept_layers(plain, 30)


@pytest.mark.parametrize(
    "keep", [np.bool_(True), [np.bool_(True)], [True], np.int64(31), [np.int64(30)], {0}], ids=repr
)
def test_what_is_no_number_of_layers_is_still_refused(keep):
    with pytest.raises(ValueError, match="keep is"):
        kept_count(keep, 30)


@pytest.mark.parametrize(
    ("keep", "layers"),
    [
        ([], []),
        ([5, 0], [0, 5]),
        ((29,), [29]),
        (range(3), [0, 1, 2]),
        ("uniform:0", []),
        ("uniform:0.1", [5, 15, 25]),
        ("uniform:1", list(range(30))),
    ],
    ids=str,
)
def test_layers_by_name(keep, layers):
    assert kept_count(keep, 30) is None
    assert kept_layers(keep, 30) == layers


def test_a_share_for_recall_is_ranked():
    assert [kept_count(f"recall:{share}", 30) for share in (0, 0.25, 1)] == [0, 8, 30]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_uniform_layers_are_evenly_spaced(share):
    layers = kept_layers(f"uniform:{share}", 30)
    assert len(set(layers)) == round(30 * share)
    steps = {after - before for before, after in pairwise(layers)}
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (1.5, "keep is 1.5; a fraction lies between 0"),
        (-0.1, "keep is -0.1; a fraction lies between 0"),
        (float("nan"), "keep is nan; a fraction lies between 0"),
        (-1, "keep is -1 layers, but the model has 30; give a fraction"),
        (31, "keep is 31 layers, but the model has 30"),
        ([99], r"keep is \[99\]; the model has layers 0 to 29: \[99\] are not layers of it"),
        ([-1], r"\[-1\] are not layers of it"),
        ([1, 1], "a layer is named twice"),
        ([0.5], r"keep is \[0.5\]; give a fraction"),
        ([True], r"keep is \[True\]; give a fraction"),
        ("uniform:x", "keep is 'uniform:x'; give a fraction"),
        ("uniform:1.5", "keep is 'uniform:1.5'; give a fraction"),
        ("recall:1.5", "keep is 'recall:1.5'; give a fraction"),
        ("recall:", "keep is 'recall:'; give a fraction"),
        ("uniform", "keep is 'uniform'; give a fraction"),
        ("foo:0.2", "keep is 'foo:0.2'; give a fraction"),
        ("0.25", "keep is '0.25'; give a fraction"),
        (True, "keep is True; give a fraction"),
        (None, "keep is None; give a fraction"),
        ({"layers": 2}, "give a fraction"),
    ],
    ids=str,
)
def test_what_says_no_layers_is_refused(keep, told):
    with pytest.raises(ValueError, match=told):
        kept_count(keep, 30)


@torch.no_grad()
def plain_kls(model, teacher, ids_NT, part):
    """The mean of a part of each sequence."""
    ours, theirs = (each(ids_NT).logits.double().log_softmax(-1)[:, part] for each in (model, teacher))
    return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean(-1)


def test_the_ranking_is_the_kl_of_swapping_one_layer_alone(student, teacher, ids_NT):
    ranking = rank_layers(student, teacher, ids_NT, progress=False)
    assert list(ranking) == [1, 2, 3]
    for layer, kl in ranking.items():
        alone = keep_softmax(student, teacher, kept={1, 2, 3} - {layer})
        assert list(converted_layers(alone.config)) == [layer]
        plain = plain_kls(alone, teacher, ids_NT, slice(None, None, EVERY))
        assert kl == pytest.approx(geometric_mean(plain.tolist()), rel=1e-4)
        assert kl > 1e-4


def test_recall_is_the_kl_where_only_looking_back_helps(student, teacher, ids_NT):
    probe = recall_probe(ids_NT, seed=3)
    half = ids_NT.shape[1] // 2
    assert probe.shape == ids_NT.shape
    assert torch.equal(probe[:, half : 2 * half], probe[:, :half])
    assert torch.equal(probe[:, :half].sort(1)[0], ids_NT[:, :half].sort(1)[0])
    assert not torch.equal(probe[:, :half], ids_NT[:, :half])
    ranking = rank_layers(student, teacher, ids_NT, recall=0.7, seed=3, progress=False)
    for layer, kl in ranking.items():
        alone = keep_softmax(student, teacher, kept={1, 2, 3} - {layer})
        recalled = plain_kls(alone, teacher, probe, slice(half, 2 * half - 1, EVERY))
        both = plain_kls(alone, teacher, ids_NT, slice(None, None, EVERY)) + 0.7 * recalled
        assert kl == pytest.approx(geometric_mean(both.tolist()), rel=1e-3)
    with pytest.raises(ValueError, match="give at least 4"):
        recall_probe(ids_NT[:, :3])


@torch.no_grad()
def test_a_mixer_that_answers_like_the_attention_costs_nothing(student, teacher, ids_NT, monkeypatch):
    walk = Walk(teacher, ids_NT)
    answers = [walk.attend(layer)[1] for layer in range(LAYERS)]
    for layer, mixer in student.hf_fwp_layers.items():
        rows = iter(answers[layer])
        size = {1: 1.0, 2: 0.0, 3: 0.9}[layer]
        monkeypatch.setattr(mixer, "forward", lambda *_, rows=rows, size=size, **__: (size * next(rows)[None], None))
    ranking = rank_layers(student, teacher, ids_NT, progress=False)
    assert abs(ranking[1]) < 1e-6
    assert most_needed(ranking, 1) == [2]
    assert most_needed(ranking, 2) == [2, 3]


def test_the_layers_that_hurt_most_are_needed_most():
    ranking = {0: 0.1, 3: 0.5, 4: 0.2, 7: 0.3}
    assert most_needed(ranking, 0) == []
    assert most_needed(ranking, 2) == [3, 7]
    assert most_needed(ranking, 4) == [0, 3, 4, 7]


@pytest.mark.parametrize("share", [False, True])
def test_keeping_a_layer_leaves_the_other_mixers_as_they_are(share, student, teacher):
    smaller = keep_softmax(student, teacher, [1], share=share)
    assert list(converted_layers(smaller.config)) == [2, 3]
    for layer, mixer in smaller.hf_fwp_layers.items():
        before = student.hf_fwp_layers[layer]
        assert mixer.options == before.options
        for name, value in mixer.state_dict().items():
            assert torch.equal(value, before.state_dict()[name]), name
    theirs = teacher.model.layers[1].self_attn.q_proj.weight
    ours = smaller.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(ours, theirs)
    assert (ours.data_ptr() == theirs.data_ptr()) == share


def test_a_layers_own_options_go_with_it(student, teacher):
    assert "2" not in keep_softmax(student, teacher, [2]).config.fwp["per_layer"]


def test_all_layers_can_be_kept(student, teacher, ids_NT):
    assert torch.equal(keep_softmax(student, teacher, [1, 2, 3])(ids_NT).logits, teacher(ids_NT).logits)

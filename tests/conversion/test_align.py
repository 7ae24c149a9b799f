"""Alignment: the mixers approach the teacher's attention, nothing else changes, and a resumed run is the same run."""

import importlib
import platform
import re
from pathlib import Path

import pytest
import torch
from teachers import SHAPES, tiny_teacher

from hf_fwp.conversion.align import Run, align, batch
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.hooks import hooked

align_module = importlib.import_module("hf_fwp.conversion.align")
FWP = {"rule": "gated_delta_net", "qk_norm": "l2", "time_scales": 2, "value_skip": 1, "beta_bias": True}
SETTINGS = {"batch_size": 2, "lr": 1e-2, "lr_projections": 1e-3, "progress": False}


@pytest.fixture
def teacher():
    return tiny_teacher("llama")


@pytest.fixture
def ids():
    return torch.randint(1, SHAPES["vocab_size"], (12, 24), generator=torch.Generator().manual_seed(3))


def student_of(teacher, layers=(0, 2)):
    torch.manual_seed(5)
    return copy_teacher(teacher, layers=layers, fwp=FWP)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_residual_falls_and_only_the_mixers_change(family, bf16, ids):
    teacher = tiny_teacher(family)
    student, before = student_of(teacher), weights(teacher)
    start = weights(student)
    log = align(student, teacher, ids, steps=40, bf16=bf16, **SETTINGS)
    assert all(log["residual"][layer] < 0.8 * log["residual_before"][layer] for layer in ("0", "2"))
    assert same(weights(teacher), before)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed
    assert all(name.startswith(("model.layers.0.self_attn", "model.layers.2.self_attn")) for name in changed)
    assert all(parameter.grad is None for parameter in [*student.parameters(), *teacher.parameters()])
    assert not [m for m in teacher.modules() if m._forward_hooks]


def test_the_first_residual_and_its_gradient_are_those_written_out(teacher, ids):
    student = student_of(teacher, layers=[1])
    hidden = teacher.model(ids[:2], output_hidden_states=True).hidden_states[1]
    block = teacher.model.layers[1]
    x_BTD = block.input_layernorm(hidden).detach()
    rotary = teacher.model.rotary_emb(x_BTD, torch.arange(ids.shape[1])[None])
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    wanted = block.self_attn(x_BTD, position_embeddings=rotary, attention_mask=mask)[0].detach()
    given = student.hf_fwp_layers[1](x_BTD, position_embeddings=rotary)[0]
    expected = (given - wanted).square().sum() / wanted.square().sum()
    run, losses = Run(student.hf_fwp_layers, {}, steps=1, lr_end=0.0, bf16=False), []
    with hooked(teacher, [1], lambda *seen: losses.append(run.layer_loss(*seen))), torch.no_grad():
        teacher.model(ids[:2], use_cache=False)
    torch.testing.assert_close(losses, [expected.detach()])
    for name, parameter in student.hf_fwp_layers[1].named_parameters():
        (gradient,) = torch.autograd.grad(expected, parameter, retain_graph=True)
        torch.testing.assert_close(parameter.grad, gradient, msg=name, rtol=1e-4, atol=1e-5)


def test_a_layer_learns_the_same_whichever_others_learn_beside_it(teacher, ids):
    together, alone = student_of(teacher), student_of(teacher)
    log = align(together, teacher, ids, steps=5, **SETTINGS)
    parts = [align(alone, teacher, ids, steps=5, layers=[layer], **SETTINGS) for layer in (2, 0)]
    assert same(weights(together), weights(alone))
    assert log["residual"] == parts[1]["residual"] | parts[0]["residual"]


def test_one_gradient_is_in_memory_at_a_time(teacher, ids, monkeypatch):
    student, held, layer_loss = student_of(teacher), [], Run.layer_loss

    def watched(run, layer, *args):
        loss = layer_loss(run, layer, *args)
        held.append({own for own, mixer in run.mixers.items() if any(p.grad is not None for p in mixer.parameters())})
        return loss

    monkeypatch.setattr(Run, "layer_loss", watched)
    align(student, teacher, ids, steps=2, **SETTINGS)
    assert held == [{0}, {2}, {0}, {2}]


def resident(tensor):
    """Bytes of a mapped tensor that are in memory."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        start, end = (int(address, 16) for address in mapping.split(maxsplit=1)[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return int(mapping.partition("\nRss:")[2].split()[0]) * 1024
    raise AssertionError("not in memory's map")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to do with mapped memory")
def test_in_a_folder_what_a_layer_learns_is_in_memory_only_while_it_does(teacher, ids, tmp_path, monkeypatch):
    student, held, layer_loss = student_of(teacher), [], Run.layer_loss

    def watched(run, layer, *args):
        loss = layer_loss(run, layer, *args)
        tensors = {own: [tensor for tensor in run.tensors(own).values() if tensor.ndim] for own in run.mixers}
        held.append({own for own, parts in tensors.items() if any(map(resident, parts))})
        return loss

    monkeypatch.setattr(Run, "layer_loss", watched)
    align(student, teacher, ids, steps=3, **SETTINGS, checkpoint=tmp_path, save_every=1)
    assert held == 3 * [{0}, {2}]


def interrupted(monkeypatch, stop, *args, layer=0, **settings):
    """A run that the user stops when `stop` steps are done, and in the next one those before a layer."""
    layer_step = Run.layer_step

    def stopping(run, reached, *args):
        if (run.step, reached) == (stop, layer):
            raise KeyboardInterrupt
        layer_step(run, reached, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "layer_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            align(*args, **settings)


@pytest.mark.parametrize("layer", [0, 2], ids=["between steps", "within a step"])
@pytest.mark.parametrize("save_every", [3, 5, 100], ids=["after a save", "saved", "saved by the interrupt"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(teacher, ids, tmp_path, monkeypatch, save_every, layer):
    whole, parts = student_of(teacher), student_of(teacher)
    expected = align(whole, teacher, ids, steps=9, **SETTINGS)
    settings = {**SETTINGS, "steps": 9, "checkpoint": tmp_path / "align", "save_every": save_every}
    interrupted(monkeypatch, 5, parts, teacher, ids, layer=layer, **settings)
    again = student_of(teacher)
    log = align(again, teacher, ids, **settings, resume=True)
    assert same(weights(again), weights(whole))
    assert {**log, "seconds": 0} == {**expected, "seconds": 0}
    assert len(list((tmp_path / "align").iterdir())) == 1


def test_a_kill_while_saving_leaves_the_step_before(teacher, ids, tmp_path, monkeypatch):
    settings = {**SETTINGS, "steps": 4, "checkpoint": tmp_path, "save_every": 2}
    whole, parts, again = (student_of(teacher) for _ in range(3))
    align(whole, teacher, ids, **{**settings, "checkpoint": None})
    interrupted(monkeypatch, 2, parts, teacher, ids, **settings)
    (tmp_path / "unfinished-00000003").mkdir()
    align(again, teacher, ids, **settings, resume=True)
    assert same(weights(again), weights(whole))


def test_earlier_runs_are_neither_overwritten_nor_mixed_up(teacher, ids, tmp_path):
    settings = {**SETTINGS, "steps": 2, "checkpoint": tmp_path}
    align(student_of(teacher), teacher, ids, **settings)
    with pytest.raises(ValueError, match="resume=True"):
        align(student_of(teacher), teacher, ids, **settings)
    with pytest.raises(ValueError, match=r"lr = 0\.01, not 0\.5"):
        align(student_of(teacher), teacher, ids, **{**settings, "lr": 0.5}, resume=True)


@pytest.mark.parametrize("still", ["lr", "lr_projections"])
def test_what_has_no_rate_stays_as_it_is(still, teacher, ids):
    student = student_of(teacher)
    before = weights(student)
    align(student, teacher, ids, **{**SETTINGS, "lr": 1e-2, "lr_projections": 1e-2, still: 0.0, "steps": 2})
    changed = {
        name.split("self_attn.")[1].split(".")[0] for name, x in weights(student).items() if (x != before[name]).any()
    }
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert changed
    assert changed <= projections if still == "lr" else not changed & projections
    with pytest.raises(ValueError, match="nothing to train"):
        align(student, teacher, ids, **{**SETTINGS, "lr": 0.0, "lr_projections": 0.0})


def test_its_bar_counts_tokens_from_where_a_run_goes_on(teacher, ids, tmp_path, monkeypatch):
    bars, bar = [], align_module.progress_bar
    monkeypatch.setattr(align_module, "progress_bar", lambda **said: bars.append(bar(**said)) or bars[-1])
    settings = {**SETTINGS, "steps": 3, "checkpoint": tmp_path, "save_every": 1, "progress": True}
    interrupted(monkeypatch, 1, student_of(teacher), teacher, ids, **settings)
    align(student_of(teacher), teacher, ids, **settings, resume=True)
    step = SETTINGS["batch_size"] * ids.shape[1]
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, step, 3 * step), (step, 3 * step, 3 * step)]
    assert "tok/s" in str(bars[1])


def test_students_that_cannot_be_aligned_are_refused(teacher, ids):
    with pytest.raises(ValueError, match="no mixers in layers"):
        align(student_of(teacher), teacher, ids, layers=[1], **SETTINGS)
    with pytest.raises(ValueError, match="float32"):
        align(student_of(teacher).bfloat16(), teacher, ids, **SETTINGS)
    with pytest.raises(ValueError, match="sequences"):
        align(student_of(teacher), teacher, ids[:1], **SETTINGS)


def test_every_block_is_seen_once_an_epoch(ids):
    numbered = torch.arange(5)[:, None]
    seen = torch.cat([batch(numbered, step, size=2, seed=1) for step in range(5)]).flatten().tolist()
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    assert seen[:5] != seen[5:]


def test_weights_cast_for_one_layer_are_forgotten_before_the_next(teacher, ids, monkeypatch):
    """A weight that has been cast to bf16 is cast anew after its layer, not found in autocast's memory."""
    kept, layer_loss = [], Run.layer_loss
    weight = teacher.model.layers[0].mlp.up_proj.weight

    def asked():
        x = torch.ones(1, weight.shape[1])
        with torch.profiler.profile() as seen:
            torch.nn.functional.linear(x, weight)
        return sum(event.name == "aten::_to_copy" for event in seen.events())

    def watched(run, layer, *args):
        asked()  # by now it is cast
        before = asked()
        loss = layer_loss(run, layer, *args)
        kept.append((before, asked()))
        return loss

    monkeypatch.setattr(Run, "layer_loss", watched)
    align(student_of(teacher), teacher, ids, steps=1, bf16=True, **SETTINGS)
    assert kept
    assert all(again > before for before, again in kept)

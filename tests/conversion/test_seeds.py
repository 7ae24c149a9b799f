"""The seed decides what is drawn: not what was drawn before, an interruption, or the way through the layers."""

import importlib

import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXTS, byte_tokenizer, teacher_folder, tiny_llama

from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.distil import distil
from hf_fwp.conversion.dropout import WindowDropout
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.recipes import Recipe
from hf_fwp.conversion.seeds import seeded

verb = importlib.import_module("hf_fwp.conversion.convert")
calibration = importlib.import_module("hf_fwp.conversion.calibrate")
LENGTH = 16
# mixers with weights that the teacher has no like of
DRAWN = [{"output_gate": gate} for gate in ("sigmoid", "silu", "low_rank_sigmoid")] + [{"beta_bias": False}]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
NOTHING = {"baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": (), "needles": 0}
CLOSED = Recipe(
    "closed", "small", sequence_length=LENGTH, solve_tokens=7 * LENGTH, report={"tokens": 2 * LENGTH, **NOTHING}
)
ADAPTED = Recipe(
    "adapted",
    "small",
    copied=True,
    sequence_length=LENGTH,
    solve_tokens=0,
    distil_tokens=8 * LENGTH,
    distil={"lora": LORA, "losses": {"cross_entropy": 1.0}, "save_every": 1, "batch_size": 2},
    report={"tokens": 2 * LENGTH, **NOTHING},
)


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch):
    monkeypatch.setattr(calibration, "ROUNDS", (({"rotate": (False, True)},), ({"rotate": (False, True)},)))


def made(drawn_before, *, seed=0, **said):
    """The weights of a student, after the global generator was left in this state."""
    torch.manual_seed(drawn_before)
    given = {"tokenizer": byte_tokenizer(), "keep": [], "recipe": CLOSED, "data": TEXTS, "seed": seed, **said}
    return convert(given.pop("teacher"), **given).state_dict()


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("said", [*({"mixer": each} for each in DRAWN), {"recipe": ADAPTED}], ids=str)
def test_the_seed_alone_decides_what_is_drawn(said):
    teacher = tiny_llama()
    first, again, other = (
        made(number, teacher=teacher, seed=seed, **said) for number, seed in ((1, 0), (2, 0), (1, 7))
    )
    assert_same(first, again)
    assert any(not torch.equal(value, other[key]) for key, value in first.items())


def test_layers_draw_numbers_of_their_own():
    student = copy_teacher(tiny_llama(), layers=[0, 1], fwp={"output_gate": "sigmoid"}, seed=3)
    gates = [layer.g_proj.weight for layer in student.hf_fwp_layers.values()]
    assert not torch.equal(*gates)
    alone = copy_teacher(tiny_llama(), layers=[1], fwp={"output_gate": "sigmoid"}, seed=3)
    assert torch.equal(alone.hf_fwp_layers[1].g_proj.weight, gates[1])


@pytest.mark.parametrize("mixer", DRAWN, ids=str)
def test_layer_by_layer_the_same_is_drawn(mixer, tmp_path, monkeypatch):
    folder = teacher_folder(tmp_path / "teacher")
    whole = made(1, teacher=folder, mixer=mixer, output=tmp_path / "whole")
    monkeypatch.setattr(verb, "offloads", lambda *_: True)
    made(2, teacher=folder, mixer=mixer, output=tmp_path / "parts")
    parts = {name: w for file in (tmp_path / "parts").glob("*.safetensors") for name, w in load_file(file).items()}
    assert_same({name: whole[name] for name in parts}, parts)
    assert any(".self_attn." in name for name in parts)


def test_an_interrupted_adapter_goes_on_as_it_was(tmp_path, monkeypatch):
    teacher = tiny_llama()
    whole = made(1, teacher=teacher, recipe=ADAPTED)
    begun, steps = WindowDropout.on_step_begin, []

    def interrupted(*args, **kwargs):
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return begun(*args, **kwargs)

    said = {"teacher": teacher, "recipe": ADAPTED, "output": tmp_path / "made"}
    with monkeypatch.context() as patch:
        patch.setattr(WindowDropout, "on_step_begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(2, **said)
    resumed = made(3, **said, resume=True)
    assert_same(whole, resumed)


def test_an_adapter_is_drawn_by_the_seed_of_its_stage():
    ids_NT = torch.randint(1, 250, (4, LENGTH), generator=torch.Generator().manual_seed(1))

    def distilled(drawn_before):
        student = copy_teacher(tiny_llama(), layers=[0, 1])
        torch.manual_seed(drawn_before)
        distil(student, None, ids_NT, steps=1, lora=LORA, losses={"cross_entropy": 1.0}, warmup=0.0, progress=False)
        return student.state_dict()

    assert_same(distilled(1), distilled(2))


def test_outside_the_numbers_go_on_where_they_were():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(0):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(0):
        assert torch.equal(torch.rand(3), inside)

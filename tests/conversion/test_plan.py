"""The plan of a large model, from its shapes alone."""

import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from tiny import TEXTS, byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from hf_fwp.conversion import plan as planning
from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.families import empty_student
from hf_fwp.conversion.plan import Plan, describe, memory, offloads, stages
from hf_fwp.conversion.recipes import RECIPES, student_options
from hf_fwp.conversion.run import begin

GIB = 2**30
LARGE = {
    "Llama-2-7B": LlamaConfig(),  # its defaults are those of that model
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}
OPTIONS = student_options("gated_delta_net")
BILLIONS = {"Llama-2-7B": 6.7, "Qwen2.5-7B": 7.6}


@pytest.fixture(params=LARGE)
def large(request):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LARGE[request.param], dtype=torch.float32)
    assert model.num_parameters() / 1e9 == pytest.approx(BILLIONS[request.param], rel=0.01)
    return model


def plan_of(model, recipe, kept=0):
    layers = model.config.num_hidden_layers
    return Plan("large", "gated_delta_net", 0, RECIPES[recipe], 0, layers, kept, "str")


def held():
    with open("/proc/self/status") as status:
        return int(status.read().partition("VmRSS:")[2].split()[0]) * 1024


def test_a_large_model_is_planned_without_its_weights(large):
    before = held()
    found = stages(plan_of(large, "quick", kept=8), large, on_disk=True)
    told = describe(plan_of(large, "quick", kept=8), large, on_disk=True)
    assert held() - before < 0.2 * GIB
    assert [stage.name for stage in found] == ["rank", "solve", "align", "distil"]
    for stage in found:
        assert stage.seconds > 60
        assert f"{stage.name} {stage.tokens} tokens: about " in told
        assert f"{stage.bytes / GIB:.1f} GiB" in told
    weights = 4 * large.num_parameters()
    solve, align, distil = (stage.bytes for stage in found[1:])
    assert weights < align < solve < 3 * weights < 5 * weights < distil < 9 * weights


def test_layer_by_layer_it_takes_a_laptop(large):
    plan = plan_of(large, "closed-form")
    assert memory(plan, large, offload=True) < 15 * GIB < 26 * GIB < memory(plan, large)
    assert offloads(plan, large, "16GB")
    assert not offloads(plan, large, "64GiB")


def test_the_free_memory_is_the_limit(large, monkeypatch):
    plan = plan_of(large, "closed-form")
    for free, answer in ((20, True), (100, False)):
        monkeypatch.setattr(planning, "get_max_memory", lambda free=free: {"cpu": free * GIB})
        assert offloads(plan, large, None) == answer
    monkeypatch.setattr(planning, "get_max_memory", lambda: {"cpu": 40 * GIB})
    # the estimate of a stage with gradient steps is none of certainty: it is tried
    assert not offloads(plan_of(large, "quick"), large, None)


def test_the_verb_plans_shapes_and_folders_without_weights(large, tmp_path, capsys):
    large.config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    texts = TEXTS * 200
    for teacher, more in ((large, {"tokenizer": byte_tokenizer()}), (tmp_path, {"max_memory": "16GB"})):
        planned = convert(teacher, keep=0, recipe="closed-form", data=texts, dry_run=True, **more)
        assert all(parameter.is_meta for parameter in planned.parameters())
        told = capsys.readouterr().err
        assert "solve 32768 tokens: about" in told
        assert ("layer by layer: the teacher is never in memory as a whole" in told) == ("max_memory" in more)


@pytest.mark.parametrize(
    ("recipe", "limit", "shown", "note"),
    [
        ("quick", "40GiB", "distil 159744 tokens: about", "recipe 'quick' takes gradient steps on the whole student"),
        ("closed-form", "4GiB", "layer by layer: the teacher is never", "GiB, which is more too"),
    ],
)
def test_a_dry_run_shows_the_plan_of_what_does_not_fit(recipe, limit, shown, note, large, tmp_path, capsys):
    large.config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    said = {"keep": 0, "recipe": recipe, "data": TEXTS * 50, "max_memory": limit, "output": tmp_path / "made"}
    convert(tmp_path, dry_run=True, **said)
    plan, _, notes = capsys.readouterr().err.partition("  note: ")
    assert shown in plan
    assert "converting" in notes
    assert note in notes
    with pytest.raises(ValueError, match=note):
        convert(tmp_path, **said)
    assert not (tmp_path / "made.partial").exists()


def planned_bytes(capsys, stage, *given, **said):
    """Bytes of a stage in the plan that a dry run prints."""
    convert(*given, keep=0, recipe="quick", data=TEXTS * 50, dry_run=True, **said)
    return float(re.search(rf"{stage} .*, (\S+) GiB", capsys.readouterr().err)[1]) * GIB


def test_what_align_learns_is_in_memory_but_for_a_folder_on_a_processor(large, tmp_path, capsys):
    large.config.save_pretrained(tmp_path)
    own = {"tokenizer": byte_tokenizer()}
    on_disk = planned_bytes(capsys, "align", large, output=tmp_path / "made", **own)
    for given, where in ((large, {}), (tmp_path, {"output": tmp_path / "made", "device": "cuda"})):
        in_memory = planned_bytes(capsys, "align", given, **where, **own)
        student = empty_student(large, layers=range(large.config.num_hidden_layers), fwp=OPTIONS)
        mixers = 4 * sum(p.numel() for mixer in student.hf_fwp_layers.values() for p in mixer.parameters())
        assert in_memory - on_disk == pytest.approx(2 * mixers, rel=0.2)  # Adam's two moments of all


def test_weights_that_hold_nothing_are_not_converted(large):
    with pytest.raises(ValueError, match='on the device "meta", which hold nothing: plan it with dry_run=True'):
        convert(large, tokenizer=byte_tokenizer(), data=TEXTS, keep=0, recipe="closed-form")


def test_sets_of_settings_are_written_in_order():
    recipe = replace(RECIPES["quick"], distil={"peft_config": LoraConfig(target_modules=["q_proj", "v_proj", "a"])})
    plan = Plan("x", "gated_delta_net", 0, recipe, 0, 30, 0, "str")
    assert plan.as_json()["recipe"]["distil"]["peft_config"]["target_modules"] == ["a", "q_proj", "v_proj"]


def test_of_another_plan_the_settings_are_named_that_differ(tmp_path):
    plans = [
        Plan("x", "gated_delta_net", 0, replace(RECIPES["quick"], align={"lr": lr}), seed, 30, 0, "str")
        for lr, seed in ((1e-3, 0), (1e-4, 1))
    ]
    begin(tmp_path / "work", plans[0], resume=False)
    with pytest.raises(ValueError, match=r"\(recipe.align.lr was 0.001, is 0.0001, seed was 0, is 1\); give the same"):
        begin(tmp_path / "work", plans[1], resume=True)


# Solved on either stream. The runs on the student's measured every token of 768 to rank on: as long as every fourth of
# 1195 takes.
ON_TEACHERS, ON_STUDENTS = RECIPES["closed-form"], replace(RECIPES["quick"].with_trained(0), rank_tokens=1195)


@pytest.mark.parametrize(
    ("recipe", "kept", "minutes", "milliseconds"),
    [(ON_TEACHERS, 22, 3.9, 1.67), (ON_STUDENTS, 15, 2.4, 1.26), (ON_STUDENTS, 22, 2.2, 1.26)],
)
def test_the_estimate_is_what_a_run_took(recipe, kept, minutes, milliseconds, monkeypatch):
    """SmolLM2-135M, 30 layers; the milliseconds are those of a token's forward pass then."""
    monkeypatch.setattr(planning, "_seconds_per_token", lambda _: milliseconds / 1000)
    model = tiny_llama()  # its size plays no part
    plan = Plan("SmolLM2-135M", "gated_delta_net", 0, recipe, 0, 30, kept, "str")
    assert planning.estimate(plan, model) / 60 == pytest.approx(minutes, rel=0.05)
    named = Plan("SmolLM2-135M", "gated_delta_net", list(range(kept)), recipe, 0, 30, None, "str")
    assert planning.estimate(named, model) < planning.estimate(plan, model)

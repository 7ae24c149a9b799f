"""A teacher that is read layer by layer gives the student that it gives when it is in memory as a whole."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from teachers import LAYERS, tiny_teacher
from tiny import TEXTS, byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.families import copy_teacher, empty_student
from hf_fwp.conversion.offload import Offload, StoredWeights
from hf_fwp.conversion.recipes import RECIPES, Recipe, student_options
from hf_fwp.conversion.solve import solve
from hf_fwp.conversion.teacher import empty_teacher
from hf_fwp.hosts import HOSTS

verb = importlib.import_module("hf_fwp.conversion.convert")
stream = importlib.import_module("hf_fwp.conversion.stream")
calibration = importlib.import_module("hf_fwp.conversion.calibrate")
CONVERTED, LENGTH = [0, 2], 16
STORED_OTHERWISE = {"mixtral", "qwen3_moe"}  # transformers joins their experts when it loads them


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch):
    monkeypatch.setattr(calibration, "ROUNDS", (({"rotate": (False, True)},), ({"rotate": (False, True)},)))
    rank = {"rank_solve_tokens": 6 * LENGTH, "rank_tokens": LENGTH}
    small = Recipe("closed-form", "small", sequence_length=LENGTH, solve_tokens=7 * LENGTH, **rank)
    monkeypatch.setitem(RECIPES, "closed-form", small)
    monkeypatch.setattr(verb, "REPORT_TOKENS", 2 * LENGTH)
    few = {"tokens": 2 * LENGTH, "baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": (), "needles": 0}
    monkeypatch.setattr(verb, "_MEASURES", few)


@pytest.fixture
def ids_NT():
    return torch.randint(1, 67, (8, 20), generator=torch.Generator().manual_seed(1))


def in_memory(teacher, ids_NT):
    student = copy_teacher(teacher, layers=CONVERTED, fwp=student_options("gated_delta_net"))
    return student, solve(student, teacher, ids_NT, heldout=3, progress=False)


def by_layer(folder, ids_NT, work):
    """(student's folder, what was found, perplexities)."""
    teacher = empty_teacher(str(folder), dtype=torch.float32)
    student = empty_student(teacher, layers=CONVERTED, fwp=student_options("gated_delta_net")).eval()
    pair = Offload(teacher, student, StoredWeights(folder, teacher), work / "layers", ids_NT[:2])
    found = solve(student, teacher, ids_NT, heldout=3, progress=False, visit=pair.visit)
    assert all(p.is_meta for block in pair.blocks() for p in block.parameters())
    pair.complete()
    return pair.folder, found, pair.comparison(progress=False)


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", HOSTS)
def test_the_student_is_the_one_of_a_teacher_in_memory(name, ids_NT, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "IN_MEMORY", 0 if name == "llama" else stream.IN_MEMORY)
    teacher = tiny_teacher(name)
    folder = tmp_path / "teacher"
    teacher.save_pretrained(folder, max_shard_size="20kB", save_original_format=name not in STORED_OTHERWISE)
    student, expected = in_memory(teacher, ids_NT)
    made, found, scores = by_layer(folder, ids_NT, tmp_path)
    assert found == expected
    reloaded = AutoModelForCausalLM.from_pretrained(made)
    assert_same(reloaded.state_dict(), student.state_dict())
    student.save_pretrained(tmp_path / "whole")
    for file in ("config.json", "generation_config.json"):
        assert (made / file).read_text() == (tmp_path / "whole" / file).read_text()
    with torch.no_grad():
        logits = reloaded(ids_NT[:2, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_NT[:2, 1:].flatten())
    assert scores["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize("name", sorted(STORED_OTHERWISE))
def test_weights_under_other_names_are_refused(name, ids_NT, tmp_path):
    tiny_teacher(name).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"cannot be read layer by layer; .* save_original_format=False"):
        by_layer(tmp_path / "teacher", ids_NT, tmp_path)


def test_the_comparison_fails_when_a_layer_gets_the_weights_of_another(ids_NT, tmp_path, monkeypatch):
    teacher = tiny_teacher("llama")
    teacher.save_pretrained(tmp_path / "teacher")
    _, expected = in_memory(teacher, ids_NT)
    read = StoredWeights.read
    monkeypatch.setattr(StoredWeights, "read", lambda self, name: read(self, name.replace("layers.1.", "layers.0.")))
    _, found, _ = by_layer(tmp_path / "teacher", ids_NT, tmp_path)
    assert found[0] == expected[0]
    assert found[2] != expected[2]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folder(request, tmp_path):
    tiny_llama(layers=LAYERS).to(request.param).save_pretrained(tmp_path / "teacher", max_shard_size="20kB")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_kept_layers_after_the_last_mixer_are_written_too(folder, tmp_path, monkeypatch):
    said = {"keep": [LAYERS - 1], "recipe": replace(RECIPES["closed-form"], stream="teacher"), "data": TEXTS}
    whole = convert(folder, output=tmp_path / "whole", **said)
    monkeypatch.setattr(verb, "offloads", lambda *_: True)
    convert(folder, output=tmp_path / "made", **said)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "made").state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("keep", "killed"),
    [(0, 2), ([1, LAYERS - 1], 2), (0.5, 2), (0.5, LAYERS + 2), (0.5, 2 * LAYERS + 2)],
    ids=["none", "named", "while solving all", "while ranking", "ranked"],
)
def test_the_verb_goes_layer_by_layer_and_on_after_a_kill(keep, killed, folder, tmp_path, monkeypatch):
    said = {"keep": keep, "recipe": "closed-form", "data": TEXTS}
    whole = convert(folder, output=tmp_path / "whole", **said)
    monkeypatch.setattr(verb, "offloads", lambda *_: True)
    forget, seen = Offload._forget, []

    def interrupted(self, part):
        seen.append(part)
        if len(seen) == killed:
            raise KeyboardInterrupt
        forget(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(Offload, "_forget", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, output=tmp_path / "made", **said)
    assert not (tmp_path / "made").exists()
    student = convert(folder, output=tmp_path / "made", **said, resume=True)
    assert not (tmp_path / "made.partial").exists()
    assert all(p.is_meta for name, p in student.named_parameters() if ".layers." in name)
    assert len(seen) == killed, "it was killed"
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert_same(made.state_dict(), whole.state_dict())

    names = {file.name for file in (tmp_path / "made").iterdir()}
    assert names == {file.name for file in (tmp_path / "whole").iterdir()} - {"model.safetensors"} | {
        "model.safetensors.index.json",
        *(f"model-{number + 1:05d}-of-{LAYERS + 1:05d}.safetensors" for number in range(LAYERS + 1)),
    }
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    ours, theirs = student.conversion_report, whole.conversion_report
    assert [ours.get(name) for name in ("ranking", "kept_layers", "choices")] == [
        theirs.get(name) for name in ("ranking", "kept_layers", "choices")
    ]
    assert report["residuals"] == json.loads((tmp_path / "whole" / "report.json").read_text())["residuals"]
    assert report["evaluation"]["kl"] == pytest.approx(whole.conversion_report["evaluation"]["kl"], rel=1e-3)
    stored = load_file(tmp_path / "made" / f"model-00002-of-{LAYERS + 1:05d}.safetensors")
    teacher = load_file(next(file for file in folder.glob("*.safetensors") if _has(file, "up_proj")))
    kept = {tensor.dtype for name, tensor in stored.items() if "self_attn" not in name}
    assert kept == {tensor.dtype for tensor in teacher.values()}, "what the student keeps is stored as it was"


def _has(file, part):
    return any(part in name for name in load_file(file))


REFUSED = [
    ({"recipe": "quick"}, "recipe 'quick' takes gradient steps on the whole student. Give recipe='closed-form'"),
    ({}, "layer by layer it takes .* GiB, which is more too"),
    ({"max_memory": 1.5}, "max_memory is 1.5; give a number of bytes"),
    ({"max_memory": "much"}, "max_memory is 'much'; give a number of bytes, or a size like '4GiB'"),
]


@pytest.mark.parametrize(("said", "told"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused(said, told, tmp_path):
    tiny_llama(layers=LAYERS).save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    said = {"keep": [], "recipe": "closed-form", "max_memory": "1MiB", "output": tmp_path / "made", **said}
    with pytest.raises(ValueError, match=told):
        convert(tmp_path / "teacher", data={"train": TEXTS, "test": TEXTS}, **said)
    assert not (tmp_path / "made.partial").exists()


def test_a_model_in_memory_has_no_use_for_a_limit():
    said = {"tokenizer": byte_tokenizer(), "data": TEXTS, "keep": [], "recipe": "closed-form"}
    with pytest.raises(ValueError, match="max_memory is for a teacher given as a folder or Hub id"):
        convert(tiny_llama(), **said, max_memory="1GiB")


def test_without_a_folder_for_the_files_it_is_refused(folder, monkeypatch):
    monkeypatch.setattr(verb, "offloads", lambda *_: True)
    with pytest.raises(ValueError, match="layer by layer, to files; give output="):
        convert(folder, data=TEXTS, keep=[], recipe="closed-form")

"""Folders and repositories that somebody made to harm: nothing of them runs, nothing outside them is read, each is
refused with a sentence. Loaded without `trust_remote_code` throughout, unless the test says otherwise."""

import json
import struct

import pytest
import torch
from hub_stand_in import client_of, serving
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, teacher_folder, tiny_llama
from tiny_fwp import tiny_model, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_fwp import export_code
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.teacher import load_teacher
from hf_fwp.modeling import FwpForCausalLM

MODELS = {
    "own": lambda: tiny_model("delta_net", dtype=torch.float32),
    "converted": lambda: copy_teacher(tiny_llama(), layers=[1]).eval(),
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
RUNS = "open({!r}, 'w').close()\n"


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "given")
    byte_tokenizer().save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def edited(file, **changes):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **changes}))


def rewritten(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def trap(folder, tmp_path):
    """A file that appears when code of the folder runs."""
    sprung = tmp_path / "sprung"
    classes = "class Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    (folder / "evil.py").write_text(RUNS.format(str(sprung)) + classes)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(RUNS.format(str(sprung)) + "def generate(*a, **k): pass\n")
    heads = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    edited(folder / "config.json", auto_map={"AutoConfig": "evil.Config", **dict.fromkeys(heads, "evil.Model")})
    return sprung


@pytest.mark.parametrize("trusted", [None, False, True])
@torch.no_grad()
def test_code_of_the_folder_does_not_run_where_our_classes_fit(folder, trap, model, trusted):
    if trusted:  # whoever trusts the folder asks for its generate
        (folder / "custom_generate" / "generate.py").unlink()
    settings = {} if trusted is None else {"trust_remote_code": trusted}
    assert type(AutoConfig.from_pretrained(folder, **settings)) is type(model.config)
    AutoModel.from_pretrained(folder, **settings)
    loaded = load(folder, **settings)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    loaded.generate(tokens(), max_new_tokens=2)
    assert not trap.exists()


@pytest.mark.parametrize("trusted", [None, False, True])
def test_changed_exported_code_does_not_run_where_the_package_is(folder, tmp_path, trusted):
    written, sprung = export_code(folder), tmp_path / "sprung"
    for name in written:
        (folder / name).write_text(RUNS.format(str(sprung)) + (folder / name).read_text())
    settings = {} if trusted is None else {"trust_remote_code": trusted}
    load(folder, **settings).save_pretrained(tmp_path / "again")
    assert not sprung.exists()
    assert not [path.name for path in (tmp_path / "again").glob("*.py") if "sprung" in path.read_text()]


@pytest.mark.parametrize("trusted", [None, False, True])
def test_code_of_another_repository_is_not_asked_for(folder, tmp_path, monkeypatch, trusted):
    heads = dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "evil/code--modeling_hf_fwp.Model")
    edited(folder / "config.json", auto_map={"AutoConfig": "evil/code--modeling_hf_fwp.Config", **heads})
    settings = {} if trusted is None else {"trust_remote_code": trusted}
    with serving() as hub, client_of(hub, tmp_path / "cache", monkeypatch):
        load(folder, **settings)
        assert hub.asked == []


def test_a_model_type_of_the_folder_is_refused_without_trust(folder, trap):
    edited(folder / "config.json", model_type="evil")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder, trust_remote_code=False)
    assert not trap.exists()


def test_a_tokenizer_of_the_folder_is_refused_without_trust(folder, trap):
    edited(
        folder / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert not trap.exists()


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, sprung):
        self.sprung = str(sprung)

    def __reduce__(self):
        return open, (self.sprung, "w")


@pytest.mark.parametrize("asked", [{}, {"use_safetensors": False}])
def test_pickled_weights_are_not_opened_and_never_executed(folder, tmp_path, asked):
    (folder / WEIGHTS).unlink()
    torch.save({"model.norm.weight": Harm(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only") as refused:
        load(folder, **asked)
    assert not (tmp_path / "sprung").exists()
    if not asked:
        assert refused.type is ValueError
        assert "pickled weights only (pytorch_model.bin); only safetensors files are read" in str(refused.value)


@torch.no_grad()
def test_harmless_pickled_weights_are_read_when_asked_for(folder, model):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert torch.equal(load(folder, use_safetensors=False)(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{}/outside.safetensors", "..\\outside.safetensors", 3])
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_an_index_reaches_nothing_outside_its_folder(name, kind, tmp_path):
    folder = teacher_folder(tmp_path / "given") if kind == "teacher" else tmp_path / "given"
    if kind == "student":
        MODELS["own"]().save_pretrained(folder)
    (folder / WEIGHTS).rename(tmp_path / "outside.safetensors")
    name = name.format(tmp_path) if isinstance(name, str) else name
    edited(folder / INDEX, metadata={}, weight_map=dict.fromkeys(load_file(tmp_path / "outside.safetensors"), name))
    with pytest.raises(ValueError, match="an index may name files of its own folder only"):
        load(folder) if kind == "student" else load_teacher(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', "no JSON", '{"weight_map": {"a": {}}}'])
def test_an_index_that_is_none(folder, text):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match="is damaged: it has no table weight_map"):
        load(folder)


def safetensors(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FILES = {
    "a header of an exabyte": struct.pack("<Q", 1 << 60) + b"{}",
    "a header longer than is allowed": struct.pack("<Q", 200_000_000) + b"{}",
    "no header": b"",
    "a header that is no JSON": safetensors(b"{nothing"),
    "a header without offsets": safetensors(b'{"a": {"dtype": "F32", "shape": [2]}}', bytes(8)),
    "weights beyond the end": safetensors(json.dumps({"a": {**TENSOR, "data_offsets": [0, 1 << 40]}}).encode()),
    "weights that overlap": safetensors(json.dumps({"a": TENSOR, "b": TENSOR}).encode(), bytes(8)),
    "a shape of other size": safetensors(json.dumps({"a": {**TENSOR, "shape": [1 << 40]}}).encode(), bytes(8)),
    "bytes after the weights": safetensors(json.dumps({"a": TENSOR}).encode(), bytes(9)),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_weights_file_that_cannot_be(what, kind, tmp_path):
    folder = teacher_folder(tmp_path / "given") if kind == "teacher" else tmp_path / "given"
    if kind == "student":
        MODELS["own"]().save_pretrained(folder)
    (folder / WEIGHTS).write_bytes(FILES[what])
    with pytest.raises(ValueError, match=r"is damaged .*; copy or download it again"):
        load(folder) if kind == "student" else load_teacher(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(folder, value, dtype):
    spoilt = "model.layers.1.mlp.down_proj.weight"
    rewritten(folder, lambda weights: weights[spoilt][3, 5:6].fill_(value))
    with pytest.raises(ValueError, match=rf"1 weights of .* are NaN or infinite in places \({spoilt}\)"):
        load(folder, dtype=dtype)


def test_a_teacher_that_is_not_finite_is_refused(tmp_path):
    folder = teacher_folder(tmp_path)
    rewritten(folder, lambda weights: weights["model.norm.weight"][:1].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"are NaN or infinite in places \(model.norm.weight\)"):
        load_teacher(folder)


def test_weights_on_the_disk_or_of_whole_numbers_are_not_looked_at():
    from hf_fwp.weights import check_finite

    check_finite(torch.nn.Linear(2, 2, device="meta"), "here")
    whole = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)])
    check_finite(whole, "here")
    check_finite(torch.nn.Linear(0, 0), "here")


def test_missing_unexpected_and_wrong_weights_are_told_by_name(folder):
    rewritten(folder, lambda weights: weights.update({"elsewhere.weight": weights.pop("model.norm.weight")}))
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as told:
        load(folder)
    assert "elsewhere.weight" in told.out
    assert "model.norm.weight" in told.out
    rewritten(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(3)}))
    told = CaptureLogger(logging.get_logger("transformers.modeling_utils"))
    with told, pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        load(folder)
    assert "model.norm.weight" in told.out


def test_shards_say_what_they_are(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(w.nbytes for f in files for w in load_file(tmp_path / f).values())
    for file in files:
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert not list(tmp_path.glob("*.bin"))


def test_a_repository_whose_index_leaves_it(tmp_path, monkeypatch):
    MODELS["own"]().save_pretrained(tmp_path / "given")
    (tmp_path / "given" / WEIGHTS).rename(tmp_path / "outside.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "outside.safetensors"), "../../../../../outside.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": names}).encode()
    files = {"config.json": (tmp_path / "given" / "config.json").read_bytes(), INDEX: index}
    with serving() as hub, client_of(hub, tmp_path / "cache", monkeypatch):
        hub.put("evil/model", files | {"../../../../../outside.safetensors": b"x"})
        with pytest.raises((ValueError, OSError), match=r"Invalid (filename|pointer path)"):
            FwpForCausalLM.from_pretrained("evil/model")
    assert (tmp_path / "outside.safetensors").stat().st_size > 1

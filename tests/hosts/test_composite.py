"""Vision-language models: their language part is a teacher like any other, and converts like one."""

import pytest
import torch
from teachers import tiny_config, tiny_teacher
from tiny import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from hf_fwp.conversion.composite import language_part
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.teacher import load_teacher

# the composite model: the family of its language part
COMPOSITES = {
    "gemma3": "gemma3_text",
    "llava": "llama",
    "mistral3": "mistral",
    "internvl": "qwen2",
    "smolvlm": "llama",
    "lighton_ocr": "qwen3",
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
BESIDE = {"image_token_index": 5, "image_token_id": 5, "mm_tokens_per_image": 4}


def composite_config(name):
    config = AutoConfig.for_model(name, text_config=tiny_config(COMPOSITES[name]).to_dict())
    for part, sizes in ((config, BESIDE), (config.vision_config, VISION)):
        for option in sizes.keys() & set(part.to_dict()):
            old = getattr(part, option)
            setattr(part, option, [sizes[option]] * len(old) if isinstance(old, (list, tuple)) else sizes[option])
    return config


@pytest.fixture(scope="module", params=COMPOSITES)
def composite(request) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(composite_config(request.param)).eval()


@pytest.fixture
def ids():
    return torch.randint(6, 50, (2, 9))


@torch.no_grad()
def test_given_tokens_alone_it_answers_as_the_whole(composite, ids):
    part = language_part(composite)
    assert torch.equal(part(ids).logits, composite.get_output_embeddings()(composite.get_decoder()(ids)[0]))
    assert part.get_input_embeddings().weight is composite.get_input_embeddings().weight
    assert not [name for name in part.state_dict() if "vision" in name or "image" in name]
    assert torch.equal(copy_teacher(part, layers=[])(ids).logits, part(ids).logits)


def test_converted_from_a_folder_of_the_whole_model(composite, ids, tmp_path):
    composite.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    teacher, tokenizer = load_teacher(tmp_path / "whole")
    assert tokenizer is not None
    with torch.no_grad():
        assert torch.equal(teacher(ids).logits, language_part(composite)(ids).logits)
    student = copy_teacher(teacher, layers=[0])
    student.save_pretrained(tmp_path / "student")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, student(ids).logits)


def test_a_model_object_is_not_modified():
    model = AutoModelForImageTextToText.from_config(composite_config("llava")).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    teacher, _ = load_teacher(model, dtype=torch.float64)
    assert (teacher.config.model_type, teacher.dtype, teacher.training) == ("llama", torch.float64, False)
    assert model.training
    assert model.config.model_type == "llava"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_what_has_no_known_language_part_is_refused():
    with pytest.raises(ValueError, match="'llama' has no language part of a known family"):
        language_part(tiny_teacher("llama"))

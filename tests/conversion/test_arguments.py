"""Arguments of convert in other words than its own: numpy's numbers, the name of a dtype, the folder one is in."""

import gzip
import json

import numpy as np
import pytest
import torch
from tiny import TEXTS, byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.data import read_data
from hf_fwp.conversion.recipes import Recipe
from hf_fwp.options import COUNTS, MixerOptions

PARTS = {"baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": (), "needles": 0}
SMALL = Recipe("small", "small", sequence_length=16, solve_tokens=7 * 16, report={"tokens": 32, **PARTS})
GIVEN = {"tokenizer": byte_tokenizer(), "recipe": SMALL, "data": TEXTS}


@pytest.mark.parametrize("keep", [[np.int64(0)], np.int64(2), np.float32(1)], ids=repr)
def test_numbers_of_numpy_are_written_as_numbers(keep, tmp_path):
    convert(tiny_llama(), keep=keep, output=tmp_path / "made", **GIVEN)
    kept = json.loads((tmp_path / "made" / "report.json").read_text())["keep"]
    assert kept == (keep if isinstance(keep, list) else keep.item())


def test_an_empty_folder_may_be_the_one_to_work_in(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    student = convert(tiny_llama(), keep=[0], output=".", **GIVEN)
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert torch.equal(reloaded(torch.ones(1, 5).long()).logits, student(torch.ones(1, 5).long()).logits)


def test_a_model_may_be_converted_in_a_dtype_by_name():
    given = {"keep": [0], "dry_run": True, **GIVEN}
    assert convert(tiny_llama().bfloat16(), dtype="float32", **given).dtype == torch.float32
    with pytest.raises(ValueError, match="need float32 weights"):
        convert(tiny_llama(), dtype="bfloat16", **given)
    with pytest.raises(ValueError, match="unknown dtype 'int8'; the dtypes are float32, bfloat16, float16"):
        convert(tiny_llama(), dtype="int8", **given)


@pytest.mark.parametrize("files", [["a.jsonl", "LICENSE.txt"], ["a.txt", "b.txt"], ["a.txt.gz"], ["a.txt", "b.txt.gz"]])
def test_a_document_of_a_folder_is_a_row_or_a_whole_file(files, tmp_path):
    told = "two\nlines"
    for name in files:
        written = gzip.open if name.endswith(".gz") else open
        with written(tmp_path / name, "wt") as file:
            file.write(json.dumps({"text": told}) if ".jsonl" in name else told)
    assert list(read_data(tmp_path)) == [told] * (1 if "a.jsonl" in files else len(files))


@pytest.mark.parametrize("count", ["2", 2.0, True], ids=repr)
@pytest.mark.parametrize("option", [*COUNTS])
def test_options_that_count_are_whole_numbers(option, count):
    given = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_value_heads": 2, "head_dim": 4}
    with pytest.raises(ValueError, match=f"{option} is {count!r}; it must be a whole number"):
        MixerOptions("gated_delta_net", **{**given, "window": 4, "value_head_dim": 4, option: count})

"""Text of a model's own: sampled from its distribution, as much as asked for, and the same after an interrupt."""

import importlib
import json

import datasets
import pytest
import torch
from teachers import tiny_teacher
from tiny import TEXTS, byte_tokenizer, teacher_folder, tiny_llama
from typer.testing import CliRunner

from hf_fwp import cli
from hf_fwp.conversion import write_text
from hf_fwp.conversion.convert import convert
from hf_fwp.conversion.data import read_data
from hf_fwp.conversion.tokens import token_blocks

module = importlib.import_module("hf_fwp.conversion.write_text")
FEW = {"tokens": 300, "length": 24, "prompt_tokens": 4, "batch_size": 3, "progress": False}


def written(file, **changes):
    given = {**FEW, "data": TEXTS, "tokenizer": byte_tokenizer(), **changes}
    return [json.loads(line) for line in write_text(tiny_llama(), file, **given).read_bytes().split(b"\n")[:-1]]


def test_as_much_is_written_as_was_asked_for_and_begins_with_the_given_text(tmp_path):
    rows = written(tmp_path / "own.jsonl")
    tokens = [row["tokens"] for row in rows]
    assert sum(tokens[:-3]) < 300 <= sum(tokens)
    assert max(tokens) <= 24
    assert min(tokens) >= 4
    given = token_blocks(TEXTS, byte_tokenizer(), sequence_length=4)
    beginnings = {byte_tokenizer().decode(ids, skip_special_tokens=True) for ids in given}
    assert all(any(row["text"].startswith(beginning) for beginning in beginnings) for row in rows)
    assert len({row["text"] for row in rows}) == len(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]


def test_texts_end_where_the_model_ends_them(tmp_path):
    """The end token is made as likely as all others together: texts of 20 tokens would come out once in a million."""
    model = tiny_llama()
    model.lm_head = torch.nn.Linear(32, 257)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.tensor([0.0] * 256 + [torch.log(torch.tensor(256.0)).item()])
    file = write_text(model, tmp_path / "own.jsonl", **{**FEW, "data": TEXTS, "tokenizer": byte_tokenizer()})
    new = [json.loads(line)["tokens"] - 4 for line in file.read_text().splitlines()]
    assert max(new) < 20
    assert 0.3 < sum(length == 0 for length in new) / len(new) < 0.7


def test_every_token_comes_from_the_whole_distribution_at_its_temperature(tmp_path):
    """No top-k, no top-p: every one of 256 equally likely bytes is said, and at a low temperature only the first."""
    model = tiny_llama()
    model.lm_head = torch.nn.Linear(32, 257)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.tensor([0.5] + [0.0] * 255 + [-torch.inf])
    said = []
    for temperature in (1.0, 0.01):
        given = {**FEW, "tokens": 4000, "data": TEXTS, "tokenizer": byte_tokenizer(), "temperature": temperature}
        file = write_text(model, tmp_path / f"{temperature}.jsonl", **given)
        texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        said.append({character for text in texts for character in text[4:]})
    assert len(said[0]) > 60
    assert len(said[1]) == 1


def test_a_run_that_goes_on_writes_the_same(tmp_path, monkeypatch):
    whole = written(tmp_path / "whole.jsonl")
    continued, calls = module._continued, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return continued(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_continued", stopping)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path / "parts.jsonl")
    lines = tmp_path / "parts.jsonl.partial" / "texts.jsonl"
    with lines.open("a") as file:
        file.write(json.dumps(whole[6]) + "\n" + '{"text": "cut o')  # a kill within a batch
    with pytest.raises(ValueError, match="resume=True"):
        written(tmp_path / "parts.jsonl")
    with pytest.raises(ValueError, match="seed = 0, not 1"):
        written(tmp_path / "parts.jsonl", resume=True, seed=1)
    assert written(tmp_path / "parts.jsonl", resume=True) == whole
    assert written(tmp_path / "other.jsonl", seed=1) != whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.jsonl", "parts.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("between", ["", "\u2028", "\u0085", "\x0c"], ids=ascii)
def test_whole_batches_are_those_that_were_written(between, tmp_path):
    """Characters at which str.splitlines ends a line are written as they are, and a kill may halve one."""
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"a{between}b", "tokens": number}, ensure_ascii=False) + "\n" for number in range(5)]
    file.write_bytes("".join(lines).encode() + '{"text": "é'.encode()[:-1])
    assert module._whole_batches(file, 2) == [0, 1, 2, 3]
    assert file.read_bytes() == "".join(lines[:4]).encode()
    file.write_bytes(damaged := b'{"text": "a"\n' * 3)
    with pytest.raises(json.JSONDecodeError):
        module._whole_batches(file, 1)
    assert file.read_bytes() == damaged


def test_of_a_stream_as_much_is_read_as_prompts_may_be_taken_from(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PROMPTED", 64)
    read = []

    def stream():
        for number in range(1000):
            read.append(number)
            yield {"text": f"document {number}"}

    for tokens in (30, 300):
        streamed = datasets.IterableDataset.from_generator(stream)
        read.clear()
        assert written(tmp_path / f"{tokens}.jsonl", data=streamed, tokens=tokens)
        assert max(read) <= max(tokens, 64) / len("document 0")
    assert written(tmp_path / "short.jsonl", data="less than that", tokens=30)


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "there.jsonl").touch()
    for name, changes, message in [
        ("there.jsonl", {}, "is there already"),
        ("own.txt", {}, r"no \.jsonl file"),
        ("own.jsonl", {"tokens": "many"}, "tokens is 'many'; give a number of tokens"),
        ("own.jsonl", {"tokens": 0}, "at least one token"),
        ("own.jsonl", {"prompt_tokens": 24}, "prompts of 24 tokens in texts of 24"),
        ("own.jsonl", {"batch_size": 0}, "batch_size is 0; give how many texts are written at a time, 1 or more"),
        ("own.jsonl", {"seed": -1}, "seed is -1; give a whole number from 0"),
        ("own.jsonl", {"device": "foo"}, "unknown device 'foo'"),
        ("own.jsonl", {"tokenizer": None}, "without a tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            written(tmp_path / name, **changes)
    for dry_run in (False, True):
        with pytest.raises(ValueError, match="length is 24, but GPT2LMHeadModel has 16 positions; give at most 16"):
            write_text(tiny_teacher("gpt2", max_position_embeddings=16), tmp_path / "own.jsonl", **FEW, dry_run=dry_run)
    assert [path.name for path in tmp_path.iterdir()] == ["there.jsonl"]


def test_from_the_command_line_to_a_conversion(tmp_path):
    folder, file, text = teacher_folder(tmp_path / "teacher"), tmp_path / "own.jsonl", tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXTS))
    words = ["write-text", str(folder), str(file), "--tokens", "9k", "--data", str(text)]
    assert CliRunner().invoke(cli.app, [*words, "--dry-run"]).exit_code == 0
    assert not file.exists()
    done = CliRunner().invoke(cli.app, words)
    assert (done.exit_code, done.stdout.strip()) == (0, str(file)), done.output
    assert len(list(read_data(file))) == len(file.read_text().splitlines())
    with pytest.raises(ValueError, match="needed"):  # 9000 tokens are too few for it, but read they were
        convert(str(folder), recipe="closed-form", data=file)

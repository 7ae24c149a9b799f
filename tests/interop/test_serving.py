"""A converted model in `pipeline`, and its throughput beside the teacher's."""

import json

import pytest
import tiny
from transformers import pipeline
from typer.testing import CliRunner

from hf_fwp import cli
from hf_fwp.bench.serve import bench_serve
from hf_fwp.conversion import teacher
from hf_fwp.conversion.families import copy_teacher

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model = copy_teacher(tiny.tiny_llama(), layers=[0])
    model.generation_config.do_sample = False
    model.save_pretrained(folder / "converted")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "converted")
    tiny.teacher_folder(folder / "teacher")
    return folder


def test_pipeline(folder):
    write = pipeline("text-generation", str(folder / "converted"), device="cpu")
    tokenizer, model = write.tokenizer, write.model
    ids = tokenizer("The fast weights", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    told = write("The fast weights", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert told == expected.removesuffix(tiny.END)
    chat = write([{"role": "user", "content": "Hello"}], max_new_tokens=4, do_sample=False)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


def test_bench_serve(folder, tmp_path):
    words = ["bench", "serve", str(folder / "converted"), "--against", str(folder / "teacher"), "--contexts", "16,64"]
    words += ["--new-tokens", "2", "--repeats", "1", "--device", "cpu", "--json", str(tmp_path / "b.json")]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    short, long = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [short["context"], long["context"]] == [16, 64]
    told = json.loads((tmp_path / "b.json").read_text())["machine"]
    assert (told["model"], told["teacher"]) == ("converted", "teacher")
    assert all(
        row[f"{who}{what}"] > 0 for row in (short, long) for who in ("", "teacher_") for what in ("prefill", "decode")
    )
    size = tiny.tiny_llama().config.hidden_size // 4
    keys_and_values = 2 * 2 * size * 4  # both, of two heads, in float32
    grown = {who: long[f"{who}cache_bytes"] - short[f"{who}cache_bytes"] for who in ("", "teacher_")}
    assert grown == {"": 48 * keys_and_values, "teacher_": 2 * 48 * keys_and_values}
    for wrong in ({"contexts": []}, {"contexts": [16], "batch": 0}):
        with pytest.raises(ValueError, match="at least one context"):
            bench_serve(folder / "converted", against=folder / "teacher", **wrong)


def test_a_teacher_may_be_a_gguf_file(folder, monkeypatch):
    opened = []

    def load(*args, **kwargs):
        opened.append(args)
        return tiny.tiny_llama(), None

    monkeypatch.setattr(teacher, "load_teacher", load)
    bench_serve(folder / "converted", against="some.gguf", contexts=[16], dry_run=True)
    found = bench_serve(folder / "converted", against="some.gguf", contexts=[16], new_tokens=1, repeats=1, device="cpu")
    assert opened == [("some.gguf",)] * 2
    assert found["rows"][0]["teacher_decode"] > 0

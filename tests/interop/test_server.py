"""A converted model behind transformers' server: an OpenAI client and `transformers chat` hear what `generate` says."""

import os
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from fla_kinds import model_of
from teachers import tiny_teacher
from tiny import byte_tokenizer
from transformers.cli.serving.model_manager import ModelManager
from typer.testing import CliRunner
from without_package import packages_without_ours

import hf_fwp
from hf_fwp import cli, serving
from hf_fwp.conversion.families import copy_teacher

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
ASKED = [{"role": "user", "content": "What do fast weights hold?"}]
HERE = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
# transformers' own command, where hf_fwp is not installed
STOCK = """
import importlib.util, sys
sys.path.append(sys.argv.pop(1))
assert importlib.util.find_spec("hf_fwp") is None
from transformers.cli.transformers import app
app()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model with its code."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = byte_tokenizer()
    model = copy_teacher(tiny_teacher("llama", vocab_size=len(tokenizer)), layers=[1, 2])
    letters = set(tokenizer.convert_tokens_to_ids(list(string.ascii_letters)))  # any other byte may be half a character
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - letters)
    model.save_pretrained(folder / "converted")
    hf_fwp.export_code(folder / "converted")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "converted")
    return folder


@pytest.fixture(scope="module")
def greedy(folder):
    """What the model answers, by its own `generate`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "converted").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "converted")
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    text = tokenizer.decode(made, skip_special_tokens=True)
    assert len(set(text)) > 3
    return text


@contextmanager
def serving_process(command, log):
    """The address of a server that runs while the block does; it ends by an interrupt, in good order."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with open(log, "w") as out:
        server = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, env=HERE, stdout=out, stderr=out)
        try:
            yield wait_for(f"http://localhost:{port}", server, log)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=300)
    assert "Application shutdown complete" in log.read_text()


def wait_for(address, server, log, seconds=900.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return address
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not answer:\n{log.read_text()}")


def server_of(which, folder, packages):
    """The command of a server: ours, or transformers' own in a process without hf_fwp."""
    served = ["serve", str(folder / "converted"), "--device", "cpu"]
    if which == "hf-fwp serve":
        return [sys.executable, "-m", "hf_fwp.cli", *served]
    return [sys.executable, "-I", "-S", "-c", STOCK, packages_without_ours(packages), *served, "--trust-remote-code"]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["hf-fwp serve", "transformers serve"])
def test_a_client_hears_what_generate_says_whole_and_in_a_stream(which, folder, greedy, tmp_path):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="needs transformers' server: pip install 'transformers[serving]'")
    from openai import OpenAI

    with serving_process(server_of(which, folder, tmp_path / "packages"), tmp_path / "server.log") as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked = {"model": str(folder / "converted"), "messages": ASKED, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**asked).choices[0]
        assert (whole.message.content, whole.finish_reason) == (greedy, "length")
        parts = [part.choices[0].delta.content for part in client.chat.completions.create(**asked, stream=True)]
        pieces = [piece for piece in parts if piece]
        assert len(pieces) > 3
        assert "".join(pieces) == greedy
        assert greedy in chatted(folder, address)


def chatted(folder, address):
    """What `transformers chat` shows of one question."""
    words = ["chat", str(folder / "converted"), f"{address}/v1", "max_new_tokens=12", "do_sample=false"]
    words += ["--generation-config", str(folder / "converted")]
    command = [sys.executable, "-c", "from transformers.cli.transformers import app; app()", *words]
    typed = f"{ASKED[0]['content']}\n\n!exit\n"
    there = {**HERE, "HF_HUB_OFFLINE": "0"}  # its client counts every server as the Hub
    done = subprocess.run(command, input=typed, capture_output=True, text=True, cwd=folder, env=there, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["own", "converted"])
def test_the_server_finds_the_class(kind, tmp_path):
    model = model_of("delta") if kind == "own" else copy_teacher(tiny_teacher("gpt2"), layers=[1])
    model.save_pretrained(tmp_path)
    serving.name_class(tmp_path)
    assert type(ModelManager(device="cpu")._load_model(f"{tmp_path}@main")) is type(model)


@pytest.mark.usefixtures("fla_not_imported")
def test_what_cannot_be_served_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    refused = CliRunner().invoke(cli.app, ["serve", str(tmp_path)])
    assert refused.exit_code == 2
    assert "holds ['ViTModel'] (vit); give a causal language model" in " ".join(refused.stderr.split())
    model_of("delta").model.save_pretrained(tmp_path / "base")
    hf_fwp.export(model_of("delta"), tmp_path / "fla", format="fla")
    for other, held in {"base": "'FwpModel'", "fla": "no architecture"}.items():
        with pytest.raises(ValueError, match=rf"holds .?{held}.? .fwp.; give a causal language model"):
            hf_fwp.serve(tmp_path / other)
    model_of("delta").save_pretrained(tmp_path)
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'transformers\[serving\]'"):
        hf_fwp.serve(tmp_path)

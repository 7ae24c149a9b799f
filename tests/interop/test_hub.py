"""Pushed to a stand-in for the Hub by the real client, and loaded from there by the same names as anywhere."""

import json

import pytest
import torch
from hub_stand_in import TOKEN, client_of, serving
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from tiny import TEXTS, byte_tokenizer, tiny_llama
from tiny_fwp import tiny_model, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from typer.testing import CliRunner

import hf_fwp
from hf_fwp import cli
from hf_fwp.card import commit
from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.report import measure, write_report
from hf_fwp.modeling import FwpForSequenceClassification

REPO = "you/tiny-delta"
LEFT_BEHIND = (
    "optimizer.pt",
    "checkpoint-3/model.safetensors",
    "step-1/state.safetensors",
    "runs/events.out.1",
    ".git/x",
    "training_args.bin",
    "model.safetensors.partial",
    "trainer_state.json",
    "model-00001-of-00002.safetensors",
)


@pytest.fixture(scope="module")
def server():
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    server.repositories.clear()
    server.asked.clear()
    with client_of(server, tmp_path / "cache", monkeypatch):
        yield server


@pytest.fixture(scope="module")
def converted():
    """A converted model, its teacher's tokenizer and what was measured of it."""
    teacher, tokenizer = tiny_llama(), byte_tokenizer()
    student = copy_teacher(teacher, layers=[1]).eval()
    short = {"tokens": 64, "sequence_length": 32, "progress": False}
    parts = {"baseline_tokens": 0, "residual_tokens": 0, "lengths": (), "prompts": ()}
    report = measure(student, teacher, TEXTS, tokenizer=tokenizer, **short, **parts)
    report |= {"rule": "gated_delta_net", "num_layers": 2, "kept_layers": [0], "data": "three sentences"}
    return student, tokenizer, report | {"teacher": "somebody/teacher", "license": "apache-2.0"}


@pytest.fixture
def folder(converted, tmp_path):
    """As convert leaves it, with the traces of a training run."""
    student, tokenizer, report = converted
    made = tmp_path / "made"
    student.save_pretrained(made)
    tokenizer.save_pretrained(made)
    write_report(made, report)
    for name in LEFT_BEHIND:
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes(b"x")
    return made


def card_in(hub, repo=REPO):
    return ModelCard(hub.files(repo)["README.md"].decode())


@torch.no_grad()
def test_a_converted_model_arrives_whole_and_is_loaded_by_its_name(hub, folder, converted):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pushed = hf_fwp.push(folder, REPO)
    assert pushed.url == f"{hub.endpoint}/{REPO}"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert {path: len(content) for path, content in hub.files(REPO).items()} == pushed.files
    assert not set(LEFT_BEHIND) & set(pushed.files)
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json", "README.md"} <= set(pushed.files)
    loaded = AutoModelForCausalLM.from_pretrained(REPO)
    ids = AutoTokenizer.from_pretrained(REPO)("The fast weights", return_tensors="pt").input_ids
    assert torch.equal(loaded(ids).logits, converted[0](ids).logits)


def test_the_card_of_a_converted_model(hub, folder, converted):
    hf_fwp.push(folder, REPO)
    card, measured = card_in(hub), converted[2]["evaluation"]
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "somebody/teacher"
    assert {"hf_fwp", "gated_delta_net"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text-generation"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["perplexity"].metric_value == measured["perplexity"]
    assert results["kl_divergence"].metric_value == measured["kl"]
    assert results["accuracy"].dataset_name == "three sentences"
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in card.text
    assert (f"- commit: {commit()}" in card.text) == (commit() is not None)  # there is none in an unpacked sdist
    assert ("POST", "/api/validate-yaml") in hub.asked  # which found nothing wrong


def test_metadata_that_the_hub_refuses_is_told(hub, folder):
    (folder / "README.md").write_text("---\nlibrary_name: [3]\n---\n")
    with pytest.raises(ValueError, match=r"(?s)Invalid metadata in README.md.*library_name"):
        hf_fwp.push(folder, REPO)
    assert hub.files(REPO) == {}


@torch.no_grad()
@pytest.mark.parametrize("shards", [None, "8KB"])
def test_an_own_model_with_another_head(hub, shards, tmp_path):
    model = tiny_model("hybrid", model_class=FwpForSequenceClassification, dtype=torch.float32)
    model.save_pretrained(tmp_path / "made", max_shard_size=shards or "5GB")
    if shards is None:  # of an earlier way to save it
        (tmp_path / "made" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    pushed = hf_fwp.push(tmp_path / "made", REPO, private=True, revision="trial")
    assert pushed.url.endswith(f"{REPO}/tree/trial")
    assert hub.files(REPO) == {}
    assert hub.repositories[REPO]["private"]
    assert ("model.safetensors.index.json" in pushed.files) == (shards is not None)
    card = ModelCard(hub.files(REPO, "trial")["README.md"].decode())
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.tags == ["hf_fwp", "fast-weights", "delta_net", "gated_delta_net"]
    assert f"- parameters: {model.num_parameters()}" in card.text
    assert "- update rule `delta_net`: layers 2" in card.text
    loaded = AutoModelForSequenceClassification.from_pretrained(REPO, revision="trial")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_card_that_is_there_is_completed_and_not_replaced(hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# Mine\n\nWritten by hand.\n")
    hf_fwp.push(folder, REPO)
    card = card_in(hub)
    assert card.data.license == "mit"
    assert card.data.tags[0] == "mine"
    assert "hf_fwp" in card.data.tags
    assert card.data.base_model == "somebody/teacher"
    assert card.text.strip() == "# Mine\n\nWritten by hand."


def test_a_dry_run_asks_nobody(hub, folder):
    told = hf_fwp.push(folder, REPO, dry_run=True)
    assert hub.asked == []
    assert told.url is None
    assert told.files == hf_fwp.push(folder, REPO).files


@torch.no_grad()
@pytest.mark.parametrize("kind", ["own", "converted", "with its report"])
def test_push_to_hub_of_a_model(hub, kind, converted):
    model = tiny_model("delta_net", dtype=torch.float32) if kind == "own" else copy_teacher(tiny_llama(), layers=[1])
    if kind == "with its report":
        model.conversion_report = {"environment": {}, **converted[2]}
    sent = model.push_to_hub("tiny-delta", commit_message="The first", tags=["mine"])
    assert sent.repo_url.repo_id == REPO
    assert hub.repositories[REPO]["branches"]["main"][-1][1] == "The first"
    rule = "delta_net" if kind == "own" else "gated_delta_net"
    assert {"hf_fwp", "fast-weights", rule, "mine"} <= set(card_in(hub).data.tags)
    assert bool(card_in(hub).data.eval_results) == (kind == "with its report")
    loaded = AutoModelForCausalLM.from_pretrained(REPO)
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)
    written = "---\nlicense: mit\n---\nBy hand."
    hub.put(REPO, {**hub.files(REPO), "README.md": written.encode()})
    model.push_to_hub(REPO)
    assert card_in(hub).text.strip() == "By hand."
    assert card_in(hub).data.license == "mit"
    assert "hf_fwp" in card_in(hub).data.tags


@pytest.mark.parametrize("kind", ["own", "converted"])
def test_the_trainer_pushes_and_tags(hub, kind, tmp_path):
    model = tiny_model("delta_net", dtype=torch.float32) if kind == "own" else copy_teacher(tiny_llama(), layers=[1])
    settings = {"hub_model_id": REPO, "hub_token": TOKEN, "max_steps": 1, "report_to": "none", "use_cpu": True}
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens()]
    trainer = Trainer(model, TrainingArguments(tmp_path / "run", save_steps=1, **settings), train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    assert {"hf_fwp", "fast-weights", "generated_from_trainer"} <= set(card_in(hub).data.tags)
    assert "model.safetensors" in hub.files(REPO)
    AutoModelForCausalLM.from_pretrained(REPO)
    trainer.create_model_card(tags=model.model_tags, license="mit")
    assert set(model.model_tags) <= set(ModelCard.load(tmp_path / "run" / "README.md").data.tags)
    told = hf_fwp.push(tmp_path / "run", REPO)
    assert not [path for path in told.files if path.startswith(("checkpoint", "training_args"))]
    assert card_in(hub).data.license == "mit"


def test_the_command_prints_the_address(hub, folder):
    run = CliRunner().invoke(cli.app, ["push", str(folder), REPO, "--dry-run"])
    assert run.exit_code == 0, run.output
    assert "model.safetensors" in run.stdout
    assert hub.asked == []
    run = CliRunner().invoke(cli.app, ["push", str(folder), REPO])
    assert (run.exit_code, run.stdout) == (0, f"{hub.endpoint}/{REPO}\n")
    assert "model.safetensors" in hub.files(REPO)


def changed(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(weights):
    weights["elsewhere"] = weights.pop("model.norm.weight")


REFUSED = {  # told: what was done to the folder
    "there is no folder": lambda f: f.rename(f.parent / "elsewhere"),
    "it has no config.json": lambda f: (f / "config.json").unlink(),
    "has no weights as safetensors files": lambda f: (f / "model.safetensors").unlink(),
    "model.safetensors is damaged": lambda f: (f / "model.safetensors").write_bytes(b"12345"),
    "missing keys model.norm.weight": lambda f: changed(f, renamed),
    "unexpected keys more": lambda f: changed(f, lambda w: w.update(more=torch.zeros(1))),
    "1 weights of .* are NaN or infinite in places .model.norm.weight": lambda f: changed(
        f, lambda w: w["model.norm.weight"][:1].fill_(torch.nan)
    ),
    "the tokenizer in .* does not load": lambda f: (f / "tokenizer.json").write_text("{}"),
    "does not begin with a valid block of metadata": lambda f: (f / "README.md").write_text("---\n[\n---\n"),
    "has a 'llama', no model of this package": lambda f: tiny_llama().save_pretrained(f),
    "names the architecture 'Nonsense'": lambda f: (f / "config.json").write_text(
        json.dumps(json.loads((f / "config.json").read_text()) | {"architectures": ["Nonsense"]})
    ),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_is_not_whole_is_refused_before_anything_is_sent(hub, folder, told):
    REFUSED[told](folder)
    with pytest.raises(ValueError, match=told):
        hf_fwp.push(folder, REPO)
    assert hub.asked == []


def test_a_wrong_token_and_no_hub_are_told(hub, folder, monkeypatch):
    with pytest.raises(HfHubHTTPError, match="401"):
        hf_fwp.push(folder, REPO, token="hf_of_nobody")
    assert REPO not in hub.repositories
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"cannot reach the Hub at http://127.0.0.1:9 .* nothing was changed"):
        hf_fwp.push(folder, REPO)

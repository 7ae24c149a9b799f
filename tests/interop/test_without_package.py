"""Own and converted models in a process that has no hf_fwp, by the code in their folders: bit for bit the same."""

import pytest
import torch
from every_model import WINDOWED, every_model
from teachers import tiny_teacher
from tiny import byte_tokenizer
from tiny_fwp import KINDS, tiny_model, tokens
from without_package import expect, loaded_without_package, piped

from hf_fwp.conversion.families import copy_teacher
from hf_fwp.hosts import HOSTS
from hf_fwp.modeling import (
    FwpForCausalLM,
    FwpForQuestionAnswering,
    FwpForSequenceClassification,
    FwpForTokenClassification,
    FwpModel,
)

HEADS = (FwpModel, FwpForQuestionAnswering, FwpForSequenceClassification, FwpForTokenClassification)
WORDS = {"vocab_size": len(byte_tokenizer())}


def own(kind, model_class=FwpForCausalLM, **changes):
    return tiny_model(kind, model_class=model_class, dtype=torch.float32, **changes)


def converted(family, head="ForCausalLM", **changes):
    return copy_teacher(tiny_teacher(family, head=head, **changes), layers=[1, 2]).eval()


def with_trained_head(model):
    """A few steps, so that the head is not what a fresh one would be."""
    ids, optimizer = tokens(), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model.train()(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    return model.eval()


QUICK = {
    "hybrid": lambda: own("hybrid", **WORDS),
    "delta_lstm": lambda: own("delta_lstm"),
    "own sequence classification": lambda: with_trained_head(own("delta_net", FwpForSequenceClassification, **WORDS)),
    "llama": lambda: converted("llama", **WORDS),
    "gpt2": lambda: converted("gpt2"),
    "llama sequence classification": lambda: with_trained_head(converted("llama", "ForSequenceClassification")),
}
SLOW = {
    **{name: lambda name=name: every_model(name, dtype=torch.float32) for name in WINDOWED},
    **{kind: lambda kind=kind: own(kind) for kind in KINDS},
    **{f"own {head.__name__}": lambda head=head: own("gated_delta_net", head) for head in HEADS},
    **{family: lambda family=family: converted(family) for family in HOSTS},
    **{
        f"{family} {head}": lambda family=family, head=head: converted(family, head)
        for family in HOSTS
        for head in HOSTS[family].heads
        if head not in ("Model", "ForCausalLM")
    },
}
TASKS = {"hybrid": "text-generation", "llama": "text-generation", "own sequence classification": "text-classification"}


def saved(makers, scratch, tasks):
    jobs = []
    for name, make in makers.items():
        folder, model = scratch / name, make()
        jobs.append(expect(model, folder, tokens()))
        if name in tasks:
            byte_tokenizer().save_pretrained(folder)
            jobs[-1] |= {"task": tasks[name], "said": piped(tasks[name], model, tokenizer=byte_tokenizer())}
    return jobs


def spoilt(scratch):
    """A folder whose code computes something else, to see that it would be noticed."""
    job = expect(own("delta_net"), scratch / "spoilt", tokens())
    code = scratch / "spoilt" / "hf_fwp_companions.py"
    assert "F.silu(y_BTC) if self.silu" in code.read_text()
    code.write_text(code.read_text().replace("F.silu(y_BTC) if self.silu", "y_BTC if self.silu"))
    return job


def test_a_few_models(tmp_path):
    jobs = [*saved(QUICK, tmp_path, TASKS), spoilt(tmp_path)]
    found = {entry["folder"]: entry["wrong"] for entry in loaded_without_package(jobs, tmp_path)}
    noticed = found.pop("spoilt")
    assert noticed[0] == "outputs bit for bit"
    assert found == {name: [] for name in QUICK}


@pytest.mark.slow
def test_every_rule_family_and_head(tmp_path):
    found = loaded_without_package(saved(SLOW, tmp_path, {}), tmp_path, timeout=3600)
    assert {entry["folder"]: entry["wrong"] for entry in found} == {name: [] for name in SLOW}

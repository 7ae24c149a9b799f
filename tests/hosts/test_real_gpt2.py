"""The GPT-2 that microformer-mgm carries: fused Conv1D, learned positions, biases, 8 layers that were really trained.

Its tokens are names of microbes, so that the text to convert it on is what it says itself.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_fwp.conversion.families import copy_teacher
from hf_fwp.conversion.recipes import student_options
from hf_fwp.conversion.solve import solve

pytestmark = [pytest.mark.real, pytest.mark.slow]
PACKAGE = "microformer-mgm==0.5.8"
CACHE = Path.home() / ".cache" / "hf_fwp" / "packages"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The package is unzipped, never installed, and its tokenizer, a pickle, is left alone."""
    if not list(CACHE.glob("microformer_mgm-0.5.8-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", PACKAGE, "--dest", str(CACHE)]
        fetched = subprocess.run(pip, capture_output=True, text=True)
        if fetched.returncode:
            pytest.skip(f"cannot fetch {PACKAGE} from PyPI: {fetched.stderr.strip().splitlines()[-1]}")
    folder = tmp_path_factory.mktemp("gpt2")
    with zipfile.ZipFile(next(CACHE.glob("microformer_mgm-0.5.8-*.whl"))) as wheel:
        for name in ("config.json", "pytorch_model.bin"):
            (folder / name).write_bytes(wheel.read(f"mgm/resources/general_model/{name}"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids(teacher):
    torch.manual_seed(0)
    start = torch.full((40, 1), teacher.config.bos_token_id)
    return teacher.generate(start, do_sample=True, max_new_tokens=127, eos_token_id=None, pad_token_id=0)


@torch.no_grad()
def divergence(model, teacher, ids):
    """KL from the teacher, per token."""
    theirs, ours = (m(ids).logits.log_softmax(-1) for m in (teacher, model))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_a_student_that_keeps_its_softmax_is_the_teacher(teacher, ids):
    with torch.no_grad():
        assert torch.equal(copy_teacher(teacher, layers=[])(ids[:2]).logits, teacher(ids[:2]).logits)


@pytest.mark.parametrize("layers", [range(8), range(0, 8, 2)], ids=["all converted", "half converted"])
@pytest.mark.parametrize("rule", ["linear_attention", "delta_net", "gated_delta_net"])
def test_solving_brings_the_student_back_to_the_teacher(rule, layers, teacher, ids):
    """On sequences that were not solved on; a half of what the naive copy loses, at the least."""
    student = copy_teacher(teacher, layers=layers, fwp=student_options(rule))
    naive = divergence(student, teacher, ids[32:])
    solve(student, teacher, ids[:32], progress=False)
    assert divergence(student, teacher, ids[32:]) < naive / 2


def test_saved_reloaded_generated_adapted_and_merged(teacher, ids, tmp_path):
    student = copy_teacher(teacher, layers=[0, 3, 5], fwp=student_options("gated_delta_net"))
    solve(student, teacher, ids[:16], progress=False)
    student.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(ids[:2]).logits, student(ids[:2]).logits)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (reloaded.generate(ids[:2, :20], use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)

    adapted = get_peft_model(reloaded, LoraConfig(r=4, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = adapted(ids[:4], labels=ids[:4]).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        trained = adapted.eval()(ids[:2]).logits
        merged = adapted.merge_and_unload()(ids[:2]).logits
    assert (merged - trained).norm() <= 1e-5 * trained.norm()

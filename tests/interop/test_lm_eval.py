"""lm-evaluation-harness loads a converted folder as any causal model, and scores what its logits say."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from hf_fwp.conversion.families import copy_teacher

QUESTIONS = [
    {"question": f"The fast weights of layer {n} are", "choices": [" a memory", " a list of keys"], "label": n % 2}
    for n in range(6)
]
TASK = """
task: fast_weights
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(tmp_path):
    model = copy_teacher(tiny.tiny_llama(), layers=[0])
    model.save_pretrained(tmp_path / "converted")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "converted")
    return tmp_path / "converted"


@torch.no_grad()
def log_likelihoods(folder, question, choices):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny.byte_tokenizer()
    context = tokenizer(question)["input_ids"]
    found = []
    for choice in choices:
        ids = torch.tensor([tokenizer(question + choice)["input_ids"]])
        logs = model(ids).logits.log_softmax(-1)[0, len(context) - 1 : -1]
        found.append(float(logs.gather(1, ids[0, len(context) :, None]).sum()))
    return found


@pytest.mark.slow
def test_a_local_task_is_scored(folder, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "fast_weights.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"))
    result = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu", "dtype": "float32"},
        tasks=["fast_weights"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=2,
    )
    right = []
    for sample, question in zip(result["samples"]["fast_weights"], QUESTIONS, strict=True):
        expected = log_likelihoods(folder, question["question"], question["choices"])
        assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)
        right.append(expected.index(max(expected)) == question["label"])
    assert result["results"]["fast_weights"]["acc,none"] == pytest.approx(sum(right) / len(right))

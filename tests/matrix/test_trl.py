"""trl's trainers on own and converted models: losses that are known beforehand come out, and they go down."""

import importlib.util
import math

import pytest
import torch
from datasets import Dataset
from every_model import every_model
from runs import logged
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM

TEXTS = ["fast weights", "a key recalls what was written", "gates", "a value is the difference"]
PROMPTS = [{"prompt": text, "chosen": " yes, it is", "rejected": " no"} for text in TEXTS]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
SETTINGS = {"max_steps": 3, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
SETTINGS |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False}


@pytest.fixture(autouse=True)
def _needs_trl():
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is no dependency of hf_fwp: pip install trl to run this test")


def chatting():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model_for(name, tokenizer, **changes):
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return every_model(name, vocab_size=len(tokenizer), wide=True, **ends, **changes)


def saved_model(name, tokenizer, folder):
    """A model that trl can load once more as its own reference."""
    model_for(name, tokenizer, dtype=torch.float32).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sft(name, folder, *, rows, checkpoint=None, dtype=torch.float64, **changes):
    """A run of steps that all see every text."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = byte_tokenizer()
    args = SFTConfig(str(folder), per_device_train_batch_size=rows, **{"max_length": 128, **SETTINGS, **changes})
    texts = Dataset.from_dict({"text": TEXTS})
    run = SFTTrainer(model_for(name, tokenizer, dtype=dtype), args, train_dataset=texts, processing_class=tokenizer)
    run.train(resume_from_checkpoint=checkpoint)
    return run


def sft_losses(name, folder, **changes):
    return logged(sft(name, folder, **changes))


def test_packed_rows_lose_what_separate_rows_lose(name, tmp_path):
    separate = sft_losses(name, tmp_path, rows=len(TEXTS))
    packed = sft_losses(name, tmp_path, rows=1, packing=True)
    flat = sft_losses(name, tmp_path, rows=len(TEXTS), padding_free=True, max_length=None)
    assert separate[-1] < separate[0]
    for losses in (packed, flat):  # logged in float32, whose numbers are 4.8e-7 apart at 5
        assert max(abs(a - b) for a, b in zip(losses, separate, strict=True)) <= 2e-6


@pytest.mark.slow
def test_accumulated_and_recomputed_steps_of_fine_tuning_are_whole_steps(name, tmp_path):
    whole = sft_losses(name, tmp_path, rows=len(TEXTS))
    for changes in ({"rows": 1, "gradient_accumulation_steps": 4}, {"rows": 4, "gradient_checkpointing": True}):
        losses = sft_losses(name, tmp_path, **changes)
        assert max(abs(a - b) for a, b in zip(losses, whole, strict=True)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["separate", "packed"])
def test_fine_tuning_goes_on_where_it_stopped(name, packing, tmp_path):
    settings = {"rows": 1 if packing else 4, "packing": packing, "dtype": torch.float32, "seed": 3}
    whole = sft(name, tmp_path, **settings, save_strategy="steps", save_steps=1)
    for step in (1, 2):
        resumed = sft(name, tmp_path, **settings, checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for (key, weight), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(weight, expected), (step, key)


@pytest.mark.slow
def test_preferences_start_at_log_2_and_are_learnt(name, tmp_path):
    from trl import DPOConfig, DPOTrainer

    tokenizer = byte_tokenizer()
    slowly = {**SETTINGS, "learning_rate": 1e-4}  # longer steps throw a net that feeds itself back, fwp_1993, too far
    args = DPOConfig(str(tmp_path / "run"), per_device_train_batch_size=4, max_length=64, **slowly)
    data = Dataset.from_list(PROMPTS)
    run = DPOTrainer(saved_model(name, tokenizer, tmp_path), args=args, train_dataset=data, processing_class=tokenizer)
    run.train()
    losses = logged(run)
    assert abs(losses[0] - math.log(2)) < 1e-6
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("own_words", [0.0, 1.0], ids=["given text", "its own text"])
def test_a_teacher_that_is_the_student_leaves_no_divergence(name, own_words, tmp_path):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = chatting()
    args = GKDConfig(str(tmp_path), per_device_train_batch_size=2, lmbda=own_words, max_new_tokens=6, **SETTINGS)
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in TEXTS]
    data = Dataset.from_dict({"messages": turns})
    for changed in (False, True):
        student, teacher = model_for(name, tokenizer), model_for(name, tokenizer)
        if changed:
            with torch.no_grad():
                student.lm_head.weight.add_(0.1 * torch.randn_like(student.lm_head.weight))
        run = GKDTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizer)
        run.train()
        assert (logged(run)[0] > 1e-4) == changed
        assert all(math.isfinite(loss) for loss in logged(run))


@pytest.mark.slow
def test_rewarded_words_are_said_and_learnt_from(name, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = byte_tokenizer()
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "beta": 0.1}
    args = GRPOConfig(str(tmp_path / "run"), **sizes, **SETTINGS)
    said = []

    def reward(completions, **_):
        said.extend(completions)
        return [float(len(set(text))) for text in completions]

    model = saved_model(name, tokenizer, tmp_path)
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    data = Dataset.from_dict({"prompt": TEXTS})
    run = GRPOTrainer(model, reward, args=args, train_dataset=data, processing_class=tokenizer)
    run.train()
    assert len(said) == 3 * 4
    assert abs(logged(run)[0]) < 1e-5, "advantages of a group sum to zero, and the policy is its own reference"
    changed = [key for key, weight in model.named_parameters() if not torch.equal(weight, before[key])]
    assert len(changed) == len(before)

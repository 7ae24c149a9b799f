"""`Trainer` in its variants computes one and the same training.

Losses divide by the number of labels of the whole step: with gradient accumulation a mean of means would count rows
with few labels too much (huggingface/transformers#37766), so rows of different lengths are used here.
"""

import numpy as np
import pytest
import torch
from every_model import every_model
from runs import logged, rows, trained, trainer
from tiny_fwp import VOCAB, assert_close, tokens
from transformers import EarlyStoppingCallback


def assert_same_weights(ours, theirs, tolerance):
    for key, weight in theirs.items():
        assert (ours[key] - weight).norm() <= tolerance * (1 + weight.norm()), key


def test_accumulated_steps_are_whole_steps(name, tmp_path):
    settings = {"max_steps": 2, "optim": "sgd", "per_device_train_batch_size": 8}
    whole = trained(name, tmp_path, **settings)
    parts = trained(name, tmp_path, **{**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    assert max(abs(a - b) for a, b in zip(whole[0], parts[0], strict=True)) <= 1e-6
    assert_same_weights(parts[1], whole[1], 1e-6)


def test_checkpointed_activations_change_nothing(name, tmp_path):
    plain, saved = (trained(name, tmp_path, max_steps=2, gradient_checkpointing=on) for on in (False, True))
    assert plain[0] == saved[0]
    assert all(torch.equal(saved[1][key], weight) for key, weight in plain[1].items())


@pytest.mark.slow
def test_compiled_training_is_the_same_training(name, tmp_path):
    torch._dynamo.reset()
    settings = {"max_steps": 2, "per_device_train_batch_size": 8}
    plain = trained(name, tmp_path, **settings)
    compiled = trained(name, tmp_path, **settings, torch_compile=True, torch_compile_backend="aot_eager")
    assert max(abs(a - b) for a, b in zip(plain[0], compiled[0], strict=True)) <= 1e-6
    assert_same_weights(compiled[1], plain[1], 1e-6)


def test_a_resumed_run_is_the_same_run(name, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "dtype": torch.float32}
    _, whole = trained(name, tmp_path, **saving)
    for step in (1, 2, 3):
        model = every_model(name, dtype=torch.float32).train()
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for key, weight in model.named_parameters():
            assert torch.equal(weight, whole[key]), (step, key)


def test_autocast_keeps_weights_and_decays_in_float32(name, tmp_path):
    losses, weights = trained(name, tmp_path, dtype=torch.float32, bf16=True)
    plain, _ = trained(name, tmp_path, dtype=torch.float32)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert losses != plain
    assert abs(losses[0] - plain[0]) < 0.1
    assert np.isfinite(losses).all()


def test_bf16_weights_train_beside_float32_decays(name, tmp_path):
    every_model(name, dtype=torch.float32).save_pretrained(tmp_path)
    model = type(every_model(name)).from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    decays = [p for key, p in model.named_parameters() if key.endswith(("A_log", "dt_bias"))]
    before = [p.detach().clone() for p in decays]
    run = trainer(model, tmp_path / "run", max_steps=4)
    run.train()
    assert all(p.dtype == torch.float32 for p in decays)
    assert not any(torch.equal(a, b) for a, b in zip(before, decays, strict=True))
    assert np.isfinite(logged(run)).all()


def test_predictions_and_metrics_leave_the_cache_out(name, tmp_path):
    model, data = every_model(name), rows(6)
    found = {}

    def metrics(predictions):
        found["logits"], found["labels"] = predictions.predictions, predictions.label_ids
        return {"count": len(predictions.label_ids)}

    run = trainer(model, tmp_path, metrics=metrics, evaluate=data)
    predicted = run.predict(data)
    ids = torch.stack([row["input_ids"] for row in data])
    assert_close(torch.tensor(predicted.predictions), model(ids).logits, 1e-6)
    measured = run.evaluate()
    assert measured["eval_count"] == 6
    assert isinstance(found["logits"], np.ndarray)
    assert abs(measured["eval_loss"] - predicted.metrics["test_loss"]) < 1e-9


def test_early_stopping_stops(name, tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    run = trainer(
        every_model(name, dtype=torch.float32),
        tmp_path,
        callbacks=[stop],
        evaluate=rows(4),
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        max_steps=6,
        **changes,
    )
    run.train()
    assert run.state.global_step == 2
    assert run.state.best_global_step is not None


def test_label_smoothing_is_the_mixture_with_uniform(name, tmp_path):
    model, batch = every_model(name), rows(4)
    run = trainer(model, tmp_path, label_smoothing_factor=0.1)
    inputs = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
    loss = run.compute_loss(model, dict(inputs))
    logits, labels = model(inputs["input_ids"]).logits[:, :-1], inputs["labels"][:, 1:]
    log_p, kept = logits.log_softmax(-1)[labels != -100], labels[labels != -100]
    plain = -log_p.gather(1, kept[:, None]).mean()
    assert_close(loss, 0.9 * plain - 0.1 * log_p.mean(), 1e-6)


def test_the_number_of_items_divides_the_loss(model):
    ids = tokens()
    mean = model(ids, labels=ids).loss
    assert_close(model(ids, labels=ids, num_items_in_batch=2 * 12).loss, mean, 1e-9)
    assert_close(model(ids, labels=ids, num_items_in_batch=torch.tensor(48)).loss, mean / 2, 1e-9)
    assert ids.max() < VOCAB

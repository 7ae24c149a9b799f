"""Short runs of transformers' Trainer on tiny models, from one and the same start."""

import torch
from every_model import every_model
from tiny_fwp import tokens
from transformers import Trainer, TrainingArguments

ROWS = 16


def rows(count=ROWS, length=10):
    """Rows with different numbers of labels."""
    ids = tokens(count, length)
    labels = ids.clone()
    for index in range(count):
        labels[index, : index % 5] = -100
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **changes})


def trainer(model, folder, *, train=None, callbacks=None, evaluate=None, metrics=None, **changes):
    return Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=train or rows(),
        eval_dataset=evaluate,
        callbacks=callbacks,
        compute_metrics=metrics,
    )


def logged(run, what="loss"):
    return [entry[what] for entry in run.state.log_history if what in entry]


def trained(name, folder, **changes):
    """(losses, weights) after some steps from the same start."""
    model = every_model(name, dtype=changes.pop("dtype", torch.float64)).train()
    run = trainer(model, folder, **changes)
    run.train()
    return logged(run), dict(model.named_parameters())

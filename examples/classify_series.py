"""Which way does a spiral turn? Irregularly sampled series, classified by fast weights in continuous time.

    python examples/classify_series.py --control cde --solver rk4 --output spirals   # rk4 needs pip install hf_fwp[ode]

    100.0% of the held-out spirals are right; chance is 50%

Took 20 s of one core (a machine of 2 Intel Xeon cores busy with other work), torch 2.13.
"""

import argparse
from math import pi
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_fwp


def spirals(count: int, seed: int) -> list[dict[str, Any]]:
    """Series of 8 to 16 noisy points at irregular times; those of label 1 turn to the left."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for label in (torch.arange(count) % 2).tolist():
        length = int(torch.randint(8, 17, (), generator=draw))
        times = (0.1 + 0.4 * torch.rand(length, generator=draw)).cumsum(0)
        angle = 2 * pi * torch.rand(1, generator=draw) + (4 * label - 2) * times
        points = (0.5 + 0.3 * times[:, None]) * torch.stack([angle.cos(), angle.sin()], dim=-1)
        points += 0.05 * torch.randn(points.shape, generator=draw)
        rows.append({"inputs_embeds": points, "times": times, "labels": label})
    return rows


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Classify irregularly sampled spirals.")
    parser.add_argument("--learning-rule", default="delta", choices=["hebb", "oja", "delta"])
    parser.add_argument("--control", default="cde", choices=["ode", "cde", "dx_only"])
    parser.add_argument("--solver", default="rk4", choices=["euler", "exact_hold", "rk4", "rk4_adjoint"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", required=True)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    options = {"learning_rule": given.learning_rule, "control": given.control, "solver": given.solver}
    sizes = {"input_size": 2, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    blocks = {"norm_type": "layer", "mlp_type": "mlp", "use_bias": True, "initializer_range": 0.3}
    config = hf_fwp.FwpConfig(rule="continuous_fwp", rule_options=options, num_labels=2, **sizes, **blocks)
    model = AutoModelForSequenceClassification.from_config(config)
    args = TrainingArguments(
        given.output,
        max_steps=given.steps,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(model=model, args=args, train_dataset=spirals(1024, seed=0), data_collator=hf_fwp.pad_series)
    trainer.train()
    trainer.save_model()
    found = trainer.predict(spirals(256, seed=1))
    accuracy = float((found.predictions.argmax(-1) == found.label_ids).mean())
    print(f"{accuracy:.1%} of the held-out spirals are right; chance is 50%")
    return accuracy


if __name__ == "__main__":
    main()

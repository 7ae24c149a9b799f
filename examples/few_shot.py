"""Few-shot classification inside one forward pass: classes that were never seen, an example of each, then a question.

    python examples/few_shot.py --rule srwm

    srwm: 75.0% of 5-way questions are answered; chance is 20%

Every item is fed together with its label; that of the question is the dummy label 0 (the protocol of Irie et al. 2022).

Took 17 s of one core (a machine of 2 Intel Xeon cores busy with other work), torch 2.13.
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import AutoModelForSequenceClassification

import hf_fwp


def tasks(count: int, ways: int, shots: int, size: int) -> tuple[Tensor, Tensor]:
    """Items beside their labels [count, ways * shots + 1, size + ways + 1], and the class of each last item."""
    classes = torch.randn(count, ways, size)
    shown = torch.arange(ways).repeat(shots).expand(count, -1)
    shown = shown.gather(1, torch.rand(shown.shape).argsort(1))
    asked = torch.randint(ways, (count, 1))
    chosen = torch.cat([shown, asked], dim=1)
    items = classes.gather(1, chosen[..., None].expand(-1, -1, size)) + 0.3 * torch.randn(*chosen.shape, size)
    labels = torch.cat([shown + 1, torch.zeros_like(asked)], dim=1)
    return torch.cat([items, one_hot(labels, ways + 1)], dim=-1), asked[:, 0]


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Learn to classify from one example of each class.")
    parser.add_argument("--rule", default="srwm", choices=list(hf_fwp.RULES))
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "num_labels": given.ways}
    config = hf_fwp.FwpConfig(
        rule=given.rule, input_size=given.size + given.ways + 1, initializer_range=0.1, norm_type="layer", **sizes
    )
    model = AutoModelForSequenceClassification.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(given.steps):
        items, answers = tasks(64, given.ways, given.shots, given.size)
        loss = model(inputs_embeds=items, labels=answers).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    items, answers = tasks(1000, given.ways, given.shots, given.size)
    with torch.no_grad():
        accuracy = float((model.eval()(inputs_embeds=items).logits.argmax(-1) == answers).float().mean())
    print(f"{given.rule}: {accuracy:.1%} of {given.ways}-way questions are answered; chance is {1 / given.ways:.0%}")
    return accuracy


if __name__ == "__main__":
    main()

"""c9k8j3f1??k: which digit stood behind the k? Associative retrieval (Ba et al. 2016), by a rule of your choice.

    python examples/retrieve.py --rule ba_fast_weights        # or fast_weight_memory, with --heads 4

    ba_fast_weights: 86.4% of new strings are answered; chance is 10%

Took 112 s of one core (a machine of 2 Intel Xeon cores busy with other work), torch 2.13.
"""

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import hf_fwp

LETTERS, DIGITS = 26, 10
QUESTION = LETTERS + DIGITS


def strings(count: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Letters 0 to 25 and digits 26 to 35 in turn, two question marks and a letter; the digit behind that letter."""
    letters = torch.rand(count, LETTERS).argsort(1)[:, :pairs]
    digits = torch.randint(DIGITS, (count, pairs))
    written = torch.stack([letters, LETTERS + digits], dim=2).flatten(1)
    asked = torch.randint(pairs, (count, 1))
    marks = torch.full((count, 2), QUESTION)
    return torch.cat([written, marks, letters.gather(1, asked)], dim=1), digits.gather(1, asked)[:, 0]


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Learn to look up a digit behind a letter.")
    parser.add_argument("--rule", default="ba_fast_weights", choices=list(hf_fwp.RULES))
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    sizes = {"hidden_size": given.hidden_size, "num_attention_heads": given.heads, "num_hidden_layers": 1}
    words = {"vocab_size": QUESTION + 2, "pad_token_id": QUESTION + 1, "num_labels": DIGITS}
    config = hf_fwp.FwpConfig(rule=given.rule, initializer_range=0.1, **sizes, **words)
    model = AutoModelForSequenceClassification.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(given.steps):
        ids, digits = strings(64, given.pairs)
        loss = model(ids, labels=digits).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    ids, digits = strings(1000, given.pairs)
    with torch.no_grad():
        accuracy = float((model.eval()(ids).logits.argmax(-1) == digits).float().mean())
    print(f"{given.rule}: {accuracy:.1%} of new strings are answered; chance is 10%")
    return accuracy


if __name__ == "__main__":
    main()

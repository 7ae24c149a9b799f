"""S3: one layer tracks products of permutations with two reflections per token and eigenvalues in [-1, 1].

The target at every position is the product of the permutations so far. Smaller than published: width 32 with 4 heads
(128 with 8), 1500 steps of 64 words of 8 permutations (100k words of 128, up to 100 times), tested on 32 (512), and no
short convolution, so that words of this length cannot be read through its window.

    python examples/group_words.py

scaled accuracy by position: mean ± standard deviation over 3 seeds (published: automl/DeltaProduct, CODE)

|                    | 1-8                      | 9-16                     | 17-32                    |
|--------------------|--------------------------|--------------------------|--------------------------|
| n_h=1, β in (0, 1) | 0.492 ± 0.015 (fails)    | 0.000 ± 0.010 (fails)    | -0.006 ± 0.012 (fails)   |
| n_h=2, β in (0, 1) | 0.677 ± 0.013 (fails)    | 0.079 ± 0.039 (fails)    | 0.004 ± 0.004 (fails)    |
| n_h=1, β in (0, 2) | 0.775 ± 0.133 (fails)    | 0.385 ± 0.233 (fails)    | 0.222 ± 0.044 (fails)    |
| n_h=2, β in (0, 2) | 0.972 ± 0.039 (succeeds) | 0.779 ± 0.289 (succeeds) | 0.603 ± 0.309 (succeeds) |

Took 501 s of one core (1730 s on the clock: a machine of 2 Intel Xeon cores busy with other work), torch 2.13.
"""

from collections import defaultdict

import torch
import typer
from transformers import AutoModelForTokenClassification

import hf_fwp
from hf_fwp.bench.learning import accuracy, fit, print_beside, right_answers
from hf_fwp.bench.tasks import group_words

# CODE: automl/DeltaProduct, in words (Siems et al. 2025, arXiv 2502.10297)
PUBLISHED = {
    (1, "β in (0, 1)"): "fails",
    (2, "β in (0, 1)"): "fails",
    (1, "β in (0, 2)"): "fails",
    (2, "β in (0, 2)"): "succeeds",
}


def main(
    seeds: int = 3,
    steps: int = 1500,
    length: int = 8,
    width: int = 32,
    heads: int = 4,
    batch: int = 64,
    learning_rate: float = 2e-2,
    device: str = "cpu",
) -> dict[tuple[str, str], list[float]]:
    """Train one layer on words of LENGTH, test on words four times as long."""
    measured, published = defaultdict(list), {}
    for seed in range(seeds):
        for (reflections, rates), said in PUBLISHED.items():
            torch.manual_seed(seed)
            sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 1, "use_cache": False}
            config = hf_fwp.FwpConfig.preset(
                "siems2025-deltaproduct",
                rule_options={"num_householder": reflections, "forget_gate": False},
                allow_neg_eigval="2" in rates,
                conv_size=0,  # the state alone has to know the past
                initializer_range=width**-0.5,
                vocab_size=6,
                num_labels=6,
                **sizes,
            )
            model = AutoModelForTokenClassification.from_config(config).to(device)
            draw = torch.Generator().manual_seed(seed)

            def words(count: int, length: int):
                return tuple(part.to(device) for part in group_words(count, length, symbols=3, generator=draw))  # noqa: B023

            fit(model, lambda: words(batch, length), steps=steps, learning_rate=learning_rate)
            right = right_answers(model, words(256, 4 * length))
            for start, end in ((1, length), (length + 1, 2 * length), (2 * length + 1, 4 * length)):
                cell = f"n_h={reflections}, {rates}", f"{start}-{end}"
                measured[cell].append(accuracy(right[:, start - 1 : end], chance=1 / 6))
                published[cell] = said
    print_beside("scaled accuracy by position", measured, published, source="automl/DeltaProduct, CODE")
    return measured


if __name__ == "__main__":
    typer.run(main)

"""Recall of many pairs: how many keys a rule keeps apart, and how many it can be taught to ask for again.

A small model reads pairs of key and value, then each key once more among random tokens, and names its value (Arora et
al. 2023, arXiv 2312.04927; there up to 512 tokens and 64 pairs, here shorter and smaller).

    python examples/mqar.py --rules linear_attention,delta_net,full_attention

right answers: one seed (Arora et al. show curves at other sizes)

|                  | 4 pairs | 8 pairs |
|------------------|---------|---------|
| linear_attention | 0.247   | 0.130   |
| delta_net        | 0.982   | 0.988   |
| full_attention   | 1.000   | 1.000   |

Took 512 s of one core (738 s on the clock: a machine of 2 Intel Xeon cores busy with other work), torch 2.13.
"""

from collections import defaultdict

import torch
import typer
from transformers import AutoModelForTokenClassification

import hf_fwp
from hf_fwp.bench.learning import fit, print_beside, right_answers
from hf_fwp.bench.tasks import mqar

RULES = "linear_attention,delta_net,gated_delta_net,full_attention"


def main(
    rules: str = RULES,
    pairs: str = "4,8",
    length: int = 64,
    width: int = 64,
    heads: int = 2,
    steps: int = 1200,
    batch: int = 32,
    seeds: int = 1,
    tests: int = 256,
    device: str = "cpu",
) -> dict[tuple[str, str], list[float]]:
    """Train two layers on each number of PAIRS alone; the share of right answers on new sequences."""
    measured = defaultdict(list)
    for seed in range(seeds):
        for rule in rules.split(","):
            for count in map(int, pairs.split(",")):
                torch.manual_seed(seed)
                position = "rope" if rule == "full_attention" else "none"
                config = hf_fwp.FwpConfig(
                    rule=rule,
                    vocab_size=128,
                    hidden_size=width,
                    num_attention_heads=heads,
                    num_hidden_layers=2,
                    position_embedding=position,
                    use_cache=False,
                )
                config.num_labels = config.vocab_size
                model = AutoModelForTokenClassification.from_config(config).to(device)
                draw = torch.Generator().manual_seed(seed)

                def sequences(number: int, count: int = count, draw: torch.Generator = draw):
                    task = mqar(number, length, pairs=count, vocabulary=128, generator=draw)
                    return tuple(part.to(device) for part in task)

                fit(model, lambda: sequences(batch), steps=steps, learning_rate=1e-3)
                share = right_answers(model, sequences(tests)).nanmean().item()
                measured[rule, f"{count} pairs"].append(share)
    print_beside("right answers", measured, {}, source="Arora et al. 2023 show curves at other sizes")
    return measured


if __name__ == "__main__":
    typer.run(main)

"""Store and recall: a slow network programs a fast weight matrix to keep a pattern over a delay of distractors.

The slow network sees 4 signs and two flags, and gives key, value, query and a write gate; the fast weights are the sum
rule. Only the answer at the recall flag is trained. The second table stores random pairs without training. How the
published numbers drew theirs was not seen: unit keys of size 8 and Gaussian values of size 4 were chosen because they
fit the published additive row. Its agreement is therefore no evidence; the delta row, on the same draw, may be.

    python examples/store_recall.py

share of bits recalled: mean ± standard deviation over 3 seeds (published: schmidhuber-problems, CODE)

|      | delay 5-30            | delay 1-60            |
|------|-----------------------|-----------------------|
| bits | 1.0000 ± 0.0000 (1.0) | 1.0000 ± 0.0000 (1.0) |

cosine of read and stored value: mean ± standard deviation over 3 seeds (published: schmidhuber-problems, CODE)

|     | additive            | delta               |
|-----|---------------------|---------------------|
| N=1 | 1.00 ± 0.00 (1.0)   | 1.00 ± 0.00 (1.0)   |
| N=2 | 0.93 ± 0.00 (0.925) | 0.94 ± 0.00 (0.936) |
| N=3 | 0.87 ± 0.01 (0.88)  | 0.90 ± 0.00 (0.887) |
| N=4 | 0.83 ± 0.00 (0.821) | 0.85 ± 0.00 (0.836) |
| N=5 | 0.79 ± 0.00 (0.778) | 0.79 ± 0.00 (0.785) |
| N=6 | 0.75 ± 0.00 (0.761) | 0.74 ± 0.00 (0.812) |
| N=7 | 0.72 ± 0.00 (0.692) | 0.70 ± 0.00 (0.708) |
| N=8 | 0.69 ± 0.00 (0.661) | 0.65 ± 0.00 (0.669) |

Took 25 s of one core (632 s on the clock: a machine of 2 Intel Xeon cores busy with other work), torch 2.13.
"""

from collections import defaultdict

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import hf_fwp
from hf_fwp.bench.learning import print_beside
from hf_fwp.bench.tasks import Recall, store_recall

# CODE: cybertronai/schmidhuber-problems, 10 of 10 seeds, and one of them for delays 1 to 60; mean cosines of N pairs.
BITS = {("bits", "delay 5-30"): "1.0", ("bits", "delay 1-60"): "1.0"}
INTERFERENCE = {
    "additive": [1.0, 0.925, 0.880, 0.821, 0.778, 0.761, 0.692, 0.661],
    "delta": [1.0, 0.936, 0.887, 0.836, 0.785, 0.812, 0.708, 0.669],
}


class SlowNet(nn.Module):
    """What it sees → key, value, query and write gate; the fast weights add η · gate · key ⊗ value."""

    def __init__(self, size: int = 4, hidden: int = 32, key_size: int = 8, eta: float = 0.5) -> None:
        super().__init__()
        self.eta, self.parts = eta, (key_size, key_size, size, 1)
        self.see, self.program = nn.Linear(size + 2, hidden), nn.Linear(hidden, sum(self.parts))

    def forward(self, inputs: Tensor) -> Tensor:
        q, k, v, gate = self.program(self.see(inputs).tanh()).unsqueeze(2).split(self.parts, dim=-1)
        written = self.eta * gate.sigmoid() * v
        return hf_fwp.linear_attention(q.tanh(), k.tanh(), written, scale=1.0)[0].squeeze(2)


def recalled(model: nn.Module, task: Recall) -> Tensor:
    return model(task.inputs)[torch.arange(len(task.position)), task.position]


def interference(rule: str, pairs: int, trials: int, draw: torch.Generator, key_size: int = 8, size: int = 4) -> float:
    """Mean cosine of what is read under each key with what was stored, for random unit keys and Gaussian values."""
    k = F.normalize(torch.randn(trials, pairs, 1, key_size, generator=draw), dim=-1)
    v = torch.randn(trials, pairs, 1, size, generator=draw)
    write = {"additive": hf_fwp.linear_attention, "delta": lambda *kv, **call: hf_fwp.delta_rule(*kv, one, **call)}
    one = torch.ones(trials, pairs, 1)
    state = write[rule](k, k, v, scale=1.0, output_final_state=True)[1]
    return F.cosine_similarity(k.squeeze(2) @ state.squeeze(1), v.squeeze(2), dim=-1).mean().item()


def main(seeds: int = 3, steps: int = 1500, trials: int = 1000) -> dict[tuple[str, str], list[float]]:
    """Train on delays of 5 to 30, test on delays of 1 to 60; then count how pairs disturb each other."""
    bits, cosines = defaultdict(list), defaultdict(list)
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, draw = SlowNet(), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps):
            task = store_recall(32, shortest=5, longest=30, generator=draw)
            optimizer.zero_grad()
            F.mse_loss(recalled(model, task), task.pattern).backward()
            optimizer.step()
        for low, high in ((5, 30), (1, 60)):
            task = store_recall(500, shortest=low, longest=high, generator=draw)
            right = recalled(model, task).sign() == task.pattern
            bits["bits", f"delay {low}-{high}"].append(right.float().mean().item())
        for rule in INTERFERENCE:
            for pairs in range(1, 9):
                cosines[f"N={pairs}", rule].append(interference(rule, pairs, trials, draw))
    print_beside("share of bits recalled", bits, BITS, source="schmidhuber-problems, CODE", digits=4)
    published = {(f"N={n + 1}", rule): value for rule, values in INTERFERENCE.items() for n, value in enumerate(values)}
    print_beside("cosine of read and stored value", cosines, published, source="schmidhuber-problems, CODE", digits=2)
    return bits | cosines


if __name__ == "__main__":
    typer.run(main)

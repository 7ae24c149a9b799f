"""A recurrent network paints: every stroke is a key and a value, and the fast weights they leave are the picture.

    python examples/paint_disks.py --steps 1000

     .....
    ...::...
    .::*:::..
    ::****:..
    :*###**:.
    :*###**:.
    :**##**:.
    ::****:..
    .::::::.
    .......
      ....
    0.3% of the variance of new pictures is missing, rank 8

The picture is one that it was not shown; its empty lines are left out.

Took 13 s of one core (a machine of 2 Intel Xeon cores busy with other work), torch 2.13.
"""

import argparse

import torch
from torch import Tensor

import hf_fwp


def disks(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Where disks lie and how large they are, [count, 3], and their pictures, [count, 1, side, side]."""
    places = torch.rand(count, 3) * torch.tensor([0.6, 0.6, 0.15]) + torch.tensor([0.2, 0.2, 0.15])
    pixel = (torch.arange(side) + 0.5) / side
    across, down, radius = (x[:, None, None] for x in places.unbind(1))
    distance = ((pixel[None, None, :] - across) ** 2 + (pixel[None, :, None] - down) ** 2).sqrt()
    return places, ((radius - distance) * side).sigmoid()[:, None]


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Learn to paint disks stroke by stroke.")
    parser.add_argument("--learning-rule", default="delta", choices=["delta", "oja"])
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--strokes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    painter = hf_fwp.FastWeightPainter(
        3, side=given.side, channels=1, steps=given.strokes, hidden_size=64, learning_rule=given.learning_rule
    )
    optimizer = torch.optim.Adam(painter.parameters(), lr=3e-3)
    for _ in range(given.steps):
        places, pictures = disks(64, given.side)
        loss = (painter(places) - pictures).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    places, pictures = disks(256, given.side)
    with torch.no_grad():
        painted = painter(places)
    error = float((painted - pictures).square().mean() / pictures.var())
    for row in painted[0, 0]:
        print("".join(" .:*#"[min(max(round(4 * value), 0), 4)] for value in row.tolist()))
    print(f"{error:.1%} of the variance of new pictures is missing, rank {torch.linalg.matrix_rank(painted[0, 0])}")
    return error


if __name__ == "__main__":
    main()

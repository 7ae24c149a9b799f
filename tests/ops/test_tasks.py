"""The synthetic tasks: every label follows from the tokens before it, and the seed decides everything."""

import itertools

import pytest
import torch
from torch import nn

from hf_fwp.bench import tasks
from hf_fwp.bench.learning import accuracy, fit, print_beside, right_answers, sequence_accuracy
from hf_fwp.bench.tasks import IGNORED


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DRAWS = {
    "capacity": lambda draw: tasks.capacity(20, 6, pairs=12, replacement=True, generator=draw),
    "parity": lambda draw: tasks.parity(20, shortest=3, longest=12, generator=draw),
    "even_length": lambda draw: tasks.even_length(20, shortest=3, longest=12, generator=draw),
    "group_words": lambda draw: tasks.group_words(20, 12, symbols=3, generator=draw),
    "mqar": lambda draw: tasks.mqar(20, 32, pairs=6, generator=draw, vocabulary=64),
    "needle": lambda draw: tasks.needle(20, 16, generator=draw, symbols=8),
    "store_recall": lambda draw: tasks.store_recall(20, shortest=1, longest=9, generator=draw),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_same_seed_draws_the_same_and_another_seed_another(name):
    first, again, other = (DRAWS[name](seeded(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_capacity_asks_for_the_last_value_of_a_key():
    drawn = tasks.capacity(50, 5, pairs=20, replacement=True, generator=seeded(), queries=7)
    for keys, values, queries, targets in zip(*(part.tolist() for part in drawn), strict=True):
        stored = dict(zip(keys, values, strict=True))
        assert [stored[query] for query in queries] == targets
    assert (drawn.keys[:, None] == drawn.queries[..., None]).sum(-1).float().mean() > 2


def test_capacity_without_replacement_has_every_key_and_value_once():
    drawn = tasks.capacity(50, 20, pairs=20, replacement=False, generator=seeded())
    assert (drawn.keys.sort(1).values == torch.arange(20)).all()
    assert (drawn.values.sort(1).values == torch.arange(20)).all()
    assert drawn.queries.unique().numel() > 10


def test_parity_counts_ones_and_pads():
    tokens, labels = tasks.parity(200, shortest=3, longest=12, generator=seeded())
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        bits = [token - 1 for token in itertools.takewhile(bool, row)]
        assert answers == [*(total % 2 for total in itertools.accumulate(bits)), *[IGNORED] * (12 - len(bits))]
        assert not any(row[len(bits) :])
    assert sorted(set((tokens > 0).sum(1).tolist())) == list(range(3, 13))
    _, last = tasks.parity(200, shortest=3, longest=12, generator=seeded(), every_position=False)
    assert ((last != IGNORED).sum(1) == 1).all()
    assert torch.equal(last[last != IGNORED], labels.gather(1, (tokens > 0).sum(1, keepdim=True) - 1).squeeze(1))


def test_even_length_knows_its_prefixes():
    tokens, labels = tasks.even_length(50, shortest=2, longest=9, generator=seeded())
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        length = sum(row)
        assert answers == [int(n % 2 == 0) for n in range(1, length + 1)] + [IGNORED] * (9 - length)


@pytest.mark.parametrize("symbols", [2, 3, 4])
def test_group_words_are_products_of_permutations(symbols):
    group = list(itertools.permutations(range(symbols)))
    tokens, labels = tasks.group_words(10, 15, symbols=symbols, generator=seeded())
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        product = tuple(range(symbols))
        for token, answer in zip(row, answers, strict=True):
            product = tuple(group[token][i] for i in product)
            assert group[answer] == product


def test_mqar_asks_every_key_once_and_close_by_when_the_power_is_small():
    tokens, labels = tasks.mqar(40, 128, pairs=8, generator=seeded(), vocabulary=256)
    for row, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        stored = dict(zip(row[:16:2], row[1:16:2], strict=True))
        asked = {row[t]: answer for t, answer in enumerate(answers) if answer != IGNORED}
        assert asked == stored
        assert all(0 < key < 128 <= value for key, value in stored.items())
    far = tasks.mqar(40, 128, pairs=8, generator=seeded(), vocabulary=256, power=3.0)[1]
    places = torch.arange(128.0).expand(40, 128)
    assert places[labels != IGNORED].mean() < places[far != IGNORED].mean() - 20


def test_the_needle_stands_where_it_is_asked_for():
    for depth, place in ((0.0, 0), (0.5, 6), (1.0, 13 - 1)):
        tokens, labels = tasks.needle(30, 15, generator=seeded(), symbols=8, depth=depth)
        assert torch.equal(tokens[:, place], tokens[:, -1])
        assert torch.equal(tokens[:, place + 1], labels[:, -1])
        assert ((tokens >= 8).sum(1) == 3).all()
        assert (labels[:, :-1] == IGNORED).all()
    anywhere, _ = tasks.needle(200, 15, generator=seeded(), symbols=8)
    assert set((anywhere >= 8).long().argmax(1).tolist()) == set(range(13))


def test_store_recall_shows_the_pattern_once():
    inputs, position, pattern = tasks.store_recall(100, shortest=2, longest=7, generator=seeded())
    assert inputs.shape == (100, 9, 6)
    assert set(position.tolist()) == set(range(3, 9))
    assert torch.equal(inputs[:, 0, :4], pattern)
    for row, at in zip(inputs, position.tolist(), strict=True):
        assert row[:, 4].tolist() == [1.0, *[0.0] * 8]
        assert row[:, 5].nonzero().flatten().tolist() == [at]
        assert (row[1:at, :4].abs() == 1).all()
        assert (row[at:, :4] == 0).all()


def changed(task, **parts):
    """The same task with some parts of what it draws changed."""

    def draw(*sizes, **options):
        drawn = task(*sizes, **options)
        if not hasattr(drawn, "_replace"):
            return drawn[0], parts["labels"](drawn[1])
        return drawn._replace(**{name: change(getattr(drawn, name)) for name, change in parts.items()})

    return draw


@pytest.mark.parametrize(
    ("name", "wrong", "check"),
    [
        ("capacity", {"targets": lambda x: x.roll(1, 1)}, test_capacity_asks_for_the_last_value_of_a_key),
        ("parity", {"labels": lambda x: x.roll(1, 1)}, test_parity_counts_ones_and_pads),
        ("even_length", {"labels": lambda x: torch.where(x >= 0, 1 - x, x)}, test_even_length_knows_its_prefixes),
        (
            "mqar",
            {"labels": lambda x: x.roll(1, 1)},
            test_mqar_asks_every_key_once_and_close_by_when_the_power_is_small,
        ),
        ("needle", {"labels": lambda x: x.roll(1, 1)}, test_the_needle_stands_where_it_is_asked_for),
        ("store_recall", {"position": lambda x: x - 1}, test_store_recall_shows_the_pattern_once),
    ],
)
def test_a_wrong_task_is_noticed(name, wrong, check, monkeypatch):
    monkeypatch.setattr(tasks, name, changed(getattr(tasks, name), **wrong))
    with pytest.raises(AssertionError):
        check()


def test_products_in_the_wrong_order_are_noticed(monkeypatch):
    table = tasks.compositions(3).T
    monkeypatch.setattr(tasks, "compositions", lambda symbols: table)
    with pytest.raises(AssertionError):
        test_group_words_are_products_of_permutations(3)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: tasks.capacity(1, 4, pairs=5, replacement=False, generator=seeded()), "replacement=True"),
        (lambda: tasks.capacity(0, 4, pairs=5, replacement=True, generator=seeded()), "count is 0"),
        (lambda: tasks.parity(1, shortest=5, longest=4, generator=seeded()), "longest must be at least shortest"),
        (lambda: tasks.even_length(1, shortest=0, longest=4, generator=seeded()), "shortest is 0"),
        (lambda: tasks.group_words(1, 4, symbols=0, generator=seeded()), "symbols is 0"),
        (lambda: tasks.mqar(1, 31, pairs=8, generator=seeded()), "length of at least 32"),
        (lambda: tasks.needle(1, 2, generator=seeded()), "length is 2"),
        (lambda: tasks.needle(1, 9, generator=seeded(), depth=1.5), "between 0"),
        (lambda: tasks.store_recall(1, shortest=1, longest=3, generator=seeded(), size=0), "size is 0"),
    ],
)
def test_sizes_that_leave_nothing_to_draw_from_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


class Table(nn.Module):
    """A label for every token, whatever stood before it."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Embedding(3, 2)

    def forward(self, tokens: torch.Tensor):
        return type("Output", (), {"logits": self.scores(tokens)})


def test_fit_learns_what_a_model_can_know_and_stops_when_it_is_done():
    model, draw = Table(), seeded()

    def last_bit():
        tokens = torch.randint(1, 3, (16, 5), generator=draw)
        return tokens, (tokens - 1).masked_fill(torch.arange(5) == 0, IGNORED)

    task = last_bit()
    steps = fit(
        model, last_bit, steps=2000, learning_rate=0.1, done=lambda: accuracy(right_answers(model, task)) == 1, every=10
    )
    assert steps < 2000
    right = right_answers(model, task, batch=7)
    assert right[:, 0].isnan().all()
    assert sequence_accuracy(right) == accuracy(right) == 1
    right[0, 1] = 0
    assert sequence_accuracy(right) == pytest.approx(15 / 16)
    assert accuracy(right, chance=0.5) == pytest.approx((63 / 64 - 0.5) / 0.5)


def test_the_table_has_mean_spread_and_the_published_number(capsys):
    print_beside("score", {("a", "x"): [1.0, 2.0], ("b", "y"): [3.0]}, {("a", "x"): 1.25}, source="LOG", digits=2)
    shown = capsys.readouterr().out
    assert "score: mean ± standard deviation over 2 seeds (published: LOG)" in shown
    assert "1.50 ± 0.50 (1.25)" in shown
    assert "3.00 (-)" in shown

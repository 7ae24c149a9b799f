"""Recall: what is asked for is in the text; a model that copies finds all of it, one that does not finds nothing."""

from types import SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from hf_fwp.conversion.evaluate import evaluate
from hf_fwp.conversion.recall import DIGITS, NOISE, Probe, foretold, needle_probes, pairs_probes, recall

WORDS = ["apple", "bread", "cloud", "delta", "eagle", "field", "grass", "house", "ivory", "jewel", "knife", "lemon"]


def word_tokenizer():
    vocabulary = {word: index for index, word in enumerate([*WORDS, ":", "\n", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(r" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, pre_tokenizers.Split(":", "isolated")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class Copier(nn.Module):
    """Says what followed the place that looks most like the end of the text; with `blind`, always token 0."""

    def __init__(self, *, blind=False, positions=4096):
        super().__init__()
        self.blind, self.device = blind, torch.device("cpu")
        self.config = SimpleNamespace(vocab_size=300, max_position_embeddings=positions)

    def forward(self, input_ids, *, use_cache, logits_to_keep):
        (ids,) = input_ids.tolist()
        logits = torch.zeros(1, logits_to_keep, self.config.vocab_size)
        for row, end in enumerate(range(len(ids) - logits_to_keep + 1, len(ids) + 1)):
            logits[0, row, 0 if self.blind else self.copied(ids[:end])] = 1
        return SimpleNamespace(logits=logits)

    @staticmethod
    def copied(ids):
        def alike(place):
            count = 0
            while count < place and ids[place - 1 - count] == ids[-1 - count]:
                count += 1
            return count

        return ids[max(range(1, len(ids)), key=alike)]


def generator():
    return torch.Generator().manual_seed(0)


def needle_texts(length, count=4):
    return list(needle_probes(byte_tokenizer(), length, count=count, generator=generator()))


def test_a_text_says_its_number_once_and_asks_for_it():
    depths = []
    for probe in needle_texts(1024):
        assert 1024 - len("".join(NOISE)) < len(probe.ids_T) <= 1024
        text, answer = (byte_tokenizer().decode(ids) for ids in (probe.ids_T, probe.ids_T[probe.asked]))
        assert text.endswith(f"is{answer}")
        number = answer.strip()
        assert (len(number), text.count(number)) == (DIGITS, 2)
        (line,) = [line for line in text.splitlines() if line.endswith(f"{number}.")]
        assert line[:-1] in text.splitlines()[-1]
        depths.append(text.index(line) / len(text))
    assert depths == sorted(depths)
    assert depths[0] < 0.3
    assert depths[-1] > 0.6


def test_pairs_are_said_again_in_another_order():
    tokenizer = word_tokenizer()
    (probe,) = pairs_probes(tokenizer, 6, texts=1, generator=generator())
    lines = probe.ids_T.view(12, 4)
    assert sorted(lines[:6].tolist()) == sorted(lines[6:].tolist())
    assert lines[:6].tolist() != lines[6:].tolist()
    assert lines[:6, [0, 2]].unique().numel() == 12
    assert probe.ids_T[probe.asked].tolist() == lines[6:, 2].tolist()
    assert list(pairs_probes(tokenizer, 7, texts=1, generator=generator())) == []  # more words than there are


def test_what_is_foretold_is_what_greedy_generation_says():
    model, prompt = tiny_llama(), torch.randint(0, 200, (1, 12), generator=generator())
    said = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=-1)[0]
    assert foretold(model, Probe(said, torch.arange(12, 17))).tolist() == [True] * 5
    said[15] = (said[15] + 1) % 200
    assert foretold(model, Probe(said, torch.arange(12, 16))).tolist() == [True] * 3 + [False]
    assert foretold(model, Probe(said[:16], torch.tensor([13, 15]))).tolist() == [True, False]


def test_a_model_that_copies_recalls_all_and_a_blind_one_nothing():
    both = {"copier": Copier(), "blind": Copier(blind=True)}
    found = recall(both, byte_tokenizer(), needles=2, lengths=(512,), pairs=(), progress=False)
    assert found["copier"] == {"texts": 2, "needles": {512: {"foretold": 1.0, "found": 1.0}}, "pairs": {}}
    assert found["blind"]["needles"] == {512: {"foretold": 0.0, "found": 0.0}}
    found = recall(both, word_tokenizer(), needles=3, lengths=(), pairs=(4, 6, 99), progress=False)
    assert found["copier"]["pairs"] == {4: {"foretold": 1.0}, 6: {"foretold": 1.0}}
    assert found["blind"]["pairs"][6]["foretold"] < 0.2


def test_a_number_is_found_only_if_all_of_it_is_said():
    class Nearly(Copier):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits[0, 0, 0] = 2  # not the first token of the number
            return out

    found = recall({"nearly": Nearly()}, byte_tokenizer(), needles=2, lengths=(512,), pairs=(), progress=False)
    assert found["nearly"]["needles"] == {512: {"foretold": DIGITS / (DIGITS + 1), "found": 0.0}}


def test_there_are_no_texts_that_a_model_has_no_room_for():
    pair = {"short": Copier(positions=600), "long": Copier()}
    found = recall(pair, byte_tokenizer(), needles=1, lengths=(512, 1024), pairs=(), progress=False)
    assert [list(shares["needles"]) for shares in found.values()] == [[512], [512]]
    with pytest.raises(ValueError, match="64 tokens has no room for a needle"):
        recall(pair, byte_tokenizer(), needles=1, lengths=(64,))
    with pytest.raises(ValueError, match="at least 1"):
        recall(pair, byte_tokenizer(), needles=0)


def test_evaluate_measures_both_beside_each_other_or_none():
    model, ids_NT = tiny_llama(), torch.randint(0, 200, (1, 16))
    given = {"against": tiny_llama(seed=1), "data": ids_NT, "progress": False}
    found = evaluate(model, tokenizer=byte_tokenizer(), needles=1, **given)
    assert list(found["recall"]) == ["model", "teacher"]
    assert "recall" not in evaluate(model, tokenizer=byte_tokenizer(), needles=0, **given)
    assert "recall" not in evaluate(model, **given)

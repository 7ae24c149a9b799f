"""Train a small hybrid from scratch: three fast-weight layers for every layer of softmax attention.

    python examples/train_from_scratch.py --tokenizer smol-delta --output small-hybrid \\
        --hidden-size 128 --layers 4 --sequence-length 128 --learning-rate 3e-3 --steps 100

    loss on held-out text: 10.83 before training, 7.20 after it
    The to. " the a a for a the a of of the a the and the the the and and in a, in a to and and - this a the in

These 0.1M tokens teach a model little more than which words are frequent; without the second line it is larger and is
trained on 4M tokens, which is work for a GPU. The tokenizer is that of any folder, here of what convert_and_chat.py
made; the text is the Brown corpus, other ones: `--data corpus.txt`.

Took 138 s of one core (a machine of 2 Intel Xeon cores busy with other work), torch 2.13.
"""

import argparse
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_fwp
from hf_fwp.conversion import evaluate
from hf_fwp.conversion.data import read_splits, token_blocks


def main(words: Sequence[str] | None = None) -> float:
    """Train, and give the loss on text that was not trained on."""
    parser = argparse.ArgumentParser(description="Train a small hybrid from scratch.")
    parser.add_argument("--tokenizer", required=True, help="a folder or a Hub id")
    parser.add_argument("--data", type=Path, help="text to train on, by default the Brown corpus")
    parser.add_argument("--output", required=True)
    parser.add_argument("--rule", default="gated_delta_net", choices=list(hf_fwp.RULES))
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args(words)

    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    _, train, heldout = read_splits(given.data)
    blocks = token_blocks(train, tokenizer, sequence_length=given.sequence_length)
    if heldout is None:
        blocks, heldout = blocks[:-16], blocks[-16:]

    torch.manual_seed(0)
    config = hf_fwp.FwpConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden_size,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden_size // (16 if given.hidden_size < 64 else 64),
        rule=[given.rule if layer % 4 < 3 else "full_attention" for layer in range(given.layers)],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # stands at the end of every text of token_blocks
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = AutoModelForCausalLM.from_config(config)

    def loss() -> float:
        return log(evaluate(model, data=heldout, tokenizer=tokenizer, tokens=8192)["perplexity"])

    first = loss()
    texts = Dataset.from_dict({"input_ids": blocks.tolist(), "labels": blocks.tolist()})
    args = TrainingArguments(
        given.output,
        max_steps=given.steps,
        learning_rate=given.learning_rate,
        warmup_steps=given.steps // 20,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(model=model, args=args, train_dataset=texts, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    last = loss()
    print(f"loss on held-out text: {first:.2f} before training, {last:.2f} after it")
    begun = tokenizer("The", return_tensors="pt").to(model.device)
    said = model.generate(**begun, max_new_tokens=40, do_sample=True, top_k=20)
    print(" ".join(tokenizer.decode(said[0], skip_special_tokens=True).split()))
    return last


if __name__ == "__main__":
    main()

"""Train a small hybrid from scratch: three fast-weight layers for every layer of softmax attention.

python examples/train_from_scratch.py --tokenizer HuggingFaceTB/SmolLM2-135M --data corpus.txt --output small-hybrid
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_fwp
from hf_fwp.conversion.data import read_data, token_blocks


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--rule", default="gated_delta_net", choices=list(hf_fwp.RULES))
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    config = hf_fwp.FwpConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden_size,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden_size // 16 if given.hidden_size < 64 else given.hidden_size // 64,
        rule=[given.rule if layer % 4 < 3 else "full_attention" for layer in range(given.layers)],
    )
    model = AutoModelForCausalLM.from_config(config)
    blocks = token_blocks(read_data(given.data), tokenizer, sequence_length=given.sequence_length).tolist()
    args = TrainingArguments(
        given.output, max_steps=given.steps, learning_rate=1e-3, warmup_steps=given.steps // 20, report_to="none"
    )
    trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_dict({"input_ids": blocks, "labels": blocks}))
    loss = trainer.train().training_loss
    trainer.save_model()
    tokenizer.save_pretrained(given.output)
    return loss


if __name__ == "__main__":
    main()

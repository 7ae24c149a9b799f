"""Fine-tune a converted model with LoRA, then merge the adapters back into it.

python examples/finetune_lora.py --model smol-delta --data corpus.txt --output smol-delta-tuned
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_fwp  # noqa: F401  registers the model types with the Auto classes
from hf_fwp.conversion.data import read_data, token_blocks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model)
    model = get_peft_model(model, LoraConfig(r=given.rank, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    blocks = token_blocks(read_data(given.data), tokenizer, sequence_length=given.sequence_length).tolist()
    args = TrainingArguments(f"{given.output}/adapter", max_steps=given.steps, learning_rate=2e-4, report_to="none")
    Trainer(model=model, args=args, train_dataset=Dataset.from_dict({"input_ids": blocks, "labels": blocks})).train()
    model.merge_and_unload().save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)


if __name__ == "__main__":
    main()

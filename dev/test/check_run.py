#!/usr/bin/env python3
"""Checks what a run left behind with the programs it was made for: transformers, safetensors, TensorBoard.

    pip install torch transformers safetensors tensorboard
    python dev/test/check_run.py out          after ./train_qwen, from the repository root

- the newest checkpoint loads with AutoModelForCausalLM and AutoTokenizer, no tensor missing or left over
- its mean loss on the first rows of the validation data is the one of ./train_qwen (val_loss in log.jsonl)
- greedy generation gives the ids of ./train_qwen generate
- TensorBoard reads the event file: the same steps and losses as log.jsonl
"""
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

out = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
failed = 0


def check(ok, text):
    global failed
    failed += not ok
    print("ok  " if ok else "FAIL", text)


checkpoint = sorted(out.glob("step_*"))[-1]
options = json.load(open(checkpoint / "trainer.json"))["options"]
log = [json.loads(line) for line in open(out / "log.jsonl")]
model, loading = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
check(not any(loading.values()), f"transformers loads {checkpoint}: {sum(p.numel() for p in model.parameters())} parameters")
with safe_open(checkpoint / "optimizer.safetensors", "pt") as f:
    check(len(list(f.keys())) >= 2 * len(model.state_dict()) - 2, "safetensors reads the optimizer's state")

T = int(options["seq"])
data = open(Path(options["val"] or options["data"]) / "val.bin" if not options["val"] else options["val"], "rb").read()
tokens = np.frombuffer(data, "<u4", offset=256) & 0xFFFFFF
rows = min((len(tokens) - 1) // T, int(options["eval-tokens"]) // T + 1)
losses = []
with torch.no_grad():
    for r in range(0, rows, 16):
        batch = torch.tensor(np.stack([tokens[i * T:i * T + T + 1] for i in range(r, min(r + 16, rows))]).astype(np.int64))
        logits = model(batch[:, :-1]).logits
        losses += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none").tolist()
ours, theirs = [line["val_loss"] for line in log if "val_loss" in line][-1], sum(losses) / len(losses)
check(abs(ours - theirs) < 1e-4, f"validation loss: {ours:.6f} here, {theirs:.6f} with transformers")

tokenizer = AutoTokenizer.from_pretrained(checkpoint)
for prompt in ["长江", "中国的首都", "I love 北京！\n\n2024"]:
    ids = tokenizer(prompt)["input_ids"]
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0, len(ids):].tolist()
    if wanted[-1] in (tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")):
        wanted.pop()
    command = ["./train_qwen", "generate", "--model", str(checkpoint), "--prompt", prompt, "--greedy", "--max-tokens", "20", "--ids"]
    got = [int(i) for i in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]
    check(got == wanted, f"greedy generation after {prompt!r}: {tokenizer.decode(got)!r}")

events = EventAccumulator(str(max(out.glob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime)))
events.Reload()
scalars = {e.step: e.value for e in events.Scalars("train/loss")}
logged = {line["step"]: line["loss"] for line in log if "loss" in line}
check(len(scalars) > 0 and all(abs(logged[s] - v) < 1e-5 for s, v in scalars.items()),
      f"TensorBoard reads {len(scalars)} losses, the same as log.jsonl; tags: {', '.join(events.Tags()['scalars'])}")
sys.exit(failed > 0)

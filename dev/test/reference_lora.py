#!/usr/bin/env python3
"""LoRA's numbers, computed by peft.

    pip install peft
    python dev/test/reference_lora.py            write dev/test/fixtures/lora/ again
    python dev/test/reference_lora.py --check    compute everything again and compare with the committed files

For the tiny models that reference.py made (qwen2: all projections, qwen3: some), with A and B random, everything in float64:
    adapter_config.json, adapter_model.safetensors      as peft saves them
    expected.safetensors
        tokens, targets, start, weights     the batch of reference.py
        logits (B, T, V)                    under the document mask
        loss, grad.NAME                     and the gradients of every A and B
        steps.*                             ten AdamW updates: lr, beta1, ..., losses, norms (10), final.NAME
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from reference import FIXTURES, MADE_BY, batch_of, logits_of, loss_of, tensors_differ

FAMILIES = {
    "qwen2": (102, dict(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])),
    "qwen3": (103, dict(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])),
}


def make(family, directory):
    seed, options = FAMILIES[family]
    base = AutoModelForCausalLM.from_pretrained(FIXTURES / family, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    random = np.random.RandomState(seed + 1000)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in adapters.values():
        p.data = torch.from_numpy(random.normal(0, 0.2, p.shape).astype(np.float32))
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"dev/test/fixtures/{family}"          # from the repository's root
    config["target_modules"].sort()
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    model = model.double()
    tokens, targets, start, weights = batch_of(base.config.vocab_size, seed)
    logits = logits_of(model, tokens, start)
    loss = loss_of(logits, targets, weights)
    loss.backward()
    out = {"tokens": tokens, "targets": targets, "start": start, "weights": weights, "logits": logits, "loss": loss}
    short = {name: name.replace(".default", "") for name in adapters}
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in adapters.items():
        out[f"grad.{short[name]}"] = p.grad.clone()

    settings = dict(lr=5e-3, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1, clip=1.0)
    out |= {f"steps.{name}": torch.tensor(value) for name, value in settings.items()}
    optimizer = torch.optim.AdamW(adapters.values(), lr=settings["lr"], betas=(settings["beta1"], settings["beta2"]), eps=settings["eps"],
                                  weight_decay=settings["weight_decay"])
    losses, norms = [], []
    for _ in range(10):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(logits_of(model, tokens, start), targets, weights)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(adapters.values(), settings["clip"]))
        losses.append(loss.detach())
        optimizer.step()
    out["steps.losses"], out["steps.norms"] = torch.stack(losses), torch.stack(norms)
    for name, p in adapters.items():
        out[f"steps.final.{short[name]}"] = p
    save_file({name: t.detach().to(torch.float32).contiguous().clone() for name, t in out.items()}, directory / "expected.safetensors", metadata=MADE_BY)


def main():
    parser = argparse.ArgumentParser(description="write or check dev/test/fixtures/lora")
    parser.add_argument("--check", action="store_true", help="compare with the committed files instead of writing them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for family in FAMILIES:
        target = FIXTURES / "lora" / family
        if not arguments.check:
            target.mkdir(parents=True, exist_ok=True)
            make(family, target)
            print(*(f"{p.stat().st_size:9,} {p.relative_to(FIXTURES)}" for p in sorted(target.iterdir())), sep="\n")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            make(family, Path(scratch))
            for name, tolerance in (("adapter_model.safetensors", 0), ("expected.safetensors", 1e-5)):
                why = tensors_differ(target / name, Path(scratch) / name, tolerance)
                print(f"{'ok' if why is None else 'FAIL':5}lora/{family}/{name}{'' if why is None else ': ' + why}")
                failed += why is not None
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""How far PyTorch's bf16 gradients are from its own float64 gradients on the fixtures' models: the measure for test_qwen.cu's tolerance.

    pip install torch transformers safetensors;  python dev/test/bf16_error.py

Both runs start from the same weights, rounded to bf16. Prints the relative error ||bf16 - float64|| / ||float64|| of each tensor's gradient, then the
median and the largest."""
import pathlib
import statistics

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

errors = []
for family in ("qwen2", "qwen3"):
    directory = pathlib.Path(__file__).parent / "fixtures" / family
    expected = load_file(directory / "expected.safetensors")
    tokens, targets = (expected[name].long().view(3, 13) for name in ("tokens", "targets"))
    gradients = {}
    for dtype in (torch.float64, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(torch.bfloat16).to(dtype)
        logits = model(input_ids=tokens).logits
        logits = logits if dtype == torch.float64 else logits.float()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        gradients[dtype] = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    for name, exact in gradients[torch.float64].items():
        error = float((gradients[torch.bfloat16][name] - exact).norm() / exact.norm())
        errors.append(error)
        print(f"{family}  {name:50s} {error:.1e}")
print(f"median {statistics.median(errors):.1e}, largest {max(errors):.1e}, {len(errors)} tensors")

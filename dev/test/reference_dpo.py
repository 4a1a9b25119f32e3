#!/usr/bin/env python3
"""DPO's numbers, computed by PyTorch from the formula of the paper (Rafailov et al. 2023, equation 7).

    python dev/test/reference_dpo.py            write dev/test/fixtures/dpo/ again
    python dev/test/reference_dpo.py --check    compute everything again and compare with the committed files

For the tiny qwen2 and qwen3 models that reference.py made, in float64, every document by itself (no packing, no padding):
    tokens, begins, trained (n)     the documents one behind the other, chosen and rejected by turns; whether a token begins one, and whether
                                    it is a target of the loss
    policy (documents)              sums of log-probabilities of the trained tokens
    far.*                           with a reference model of other weights: beta, smoothing, reference (documents), loss (mean over pairs),
                                    rewards (documents), grad.NAME
    steps.*                         ten AdamW updates from policy = reference: beta, lr, ..., losses, norms, chosen, rejected (10, mean rewards
                                    before each update), final.NAME
"""
import argparse
import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from reference import FIXTURES, MADE_BY, tensors_differ

FAMILIES = {"qwen2": 201, "qwen3": 202}
PROMPTS, CHOSEN, REJECTED = [4, 1, 3, 2], [3, 5, 1, 4], [2, 6, 4, 1]      # lengths


def documents_of(vocab, seed):
    """[(ids, number of prompt tokens)]: chosen, rejected, chosen, ..."""
    random = np.random.RandomState(seed)
    documents = []
    for prompt, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED):
        question = random.randint(0, vocab, prompt)
        documents += [(np.concatenate((question, random.randint(0, vocab, n))), prompt) for n in (chosen, rejected)]
    return documents


def sums_of(model, documents):
    """log p of each answer."""
    sums = []
    for ids, prompt in documents:
        ids = torch.from_numpy(ids)[None]
        log_p = model(ids[:, :-1], use_cache=False).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        sums.append(log_p[prompt - 1:].sum())
    return torch.stack(sums)


def dpo(policy, reference, beta, smoothing):
    """Mean loss over pairs, and beta times the log-ratios (the rewards). With label smoothing: Mitchell's conservative DPO."""
    rewards = beta * (policy - reference)
    margin = rewards[0::2] - rewards[1::2]
    return (-(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)).mean(), rewards


def make(family, seed, path):
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / family, dtype=torch.float32, attn_implementation="eager").double()
    documents = documents_of(model.config.vocab_size, seed)
    out = {"tokens": torch.from_numpy(np.concatenate([ids for ids, _ in documents])),
           "begins": torch.cat([torch.arange(len(ids)) == 0 for ids, _ in documents]),
           "trained": torch.cat([torch.arange(len(ids)) >= prompt for ids, prompt in documents])}
    with torch.no_grad():
        out["policy"] = start = sums_of(model, documents)
        other, random = copy.deepcopy(model), np.random.RandomState(seed + 10)
        for p in other.parameters():
            p *= torch.from_numpy(1 + 0.4 * random.normal(size=p.shape))
        out["far.reference"] = sums_of(other, documents)

    beta, smoothing = 0.3, 0.1
    out["far.reference"] = out["far.reference"].float().double()        # as the trainer gets it
    loss, rewards = dpo(sums_of(model, documents), out["far.reference"], beta, smoothing)
    loss.backward()
    out |= {"far.beta": torch.tensor(beta), "far.smoothing": torch.tensor(smoothing), "far.loss": loss, "far.rewards": rewards}
    for name, p in model.named_parameters():
        out[f"far.grad.{name}"] = p.grad.clone()

    settings = dict(beta=0.1, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1, clip=1.0)
    out |= {f"steps.{name}": torch.tensor(value) for name, value in settings.items()}
    s = argparse.Namespace(**settings)
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": s.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps)
    series = {"losses": [], "norms": [], "chosen": [], "rejected": []}
    for _ in range(10):
        optimizer.zero_grad(set_to_none=True)
        loss, rewards = dpo(sums_of(model, documents), start, s.beta, 0.0)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        for name, value in zip(series, (loss, norm, rewards[0::2].mean(), rewards[1::2].mean())):
            series[name].append(value.detach())
        optimizer.step()
    out |= {f"steps.{name}": torch.stack(values) for name, values in series.items()}
    for name, p in model.named_parameters():
        out[f"steps.final.{name}"] = p
    save_file({name: t.detach().to(torch.float32).contiguous().clone() for name, t in out.items()}, path, metadata=MADE_BY)


def main():
    parser = argparse.ArgumentParser(description="write or check dev/test/fixtures/dpo")
    parser.add_argument("--check", action="store_true", help="compare with the committed files instead of writing them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    (FIXTURES / "dpo").mkdir(exist_ok=True)
    for family, seed in FAMILIES.items():
        target = FIXTURES / "dpo" / family / "expected.safetensors"
        if not arguments.check:
            target.parent.mkdir(exist_ok=True)
            make(family, seed, target)
            print(f"{target.stat().st_size:9,} {target.relative_to(FIXTURES)}")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            make(family, seed, Path(scratch) / "expected.safetensors")
            why = tensors_differ(target, Path(scratch) / "expected.safetensors", 1e-5)
        print(f"{'ok' if why is None else 'FAIL':5}{target.relative_to(FIXTURES)}{'' if why is None else ': ' + why}")
        failed += why is not None
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

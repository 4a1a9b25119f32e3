#!/usr/bin/env python3
"""What transformers' logits processors and generate() make of small inputs: dev/test/fixtures/sampling/expected.safetensors, which
test_chat.c compares with sample_candidates, penalize_repetition and generate of train_qwen.c.

    python dev/test/sampling_reference.py            write the fixture again
    python dev/test/sampling_reference.py --check    compute it again and compare

needs: pip install torch transformers safetensors numpy

    logits (2, V)               two rows: normal numbers, and the same rounded to quarters, so that many are equal
    previous (P)                tokens that were there before, some of them twice
    settings (S, 6)             row of logits, repetition penalty, temperature, top_k (0: off), top_p (1: off), min_p (0: off)
    probabilities (S, V)        after the processors in transformers' order and a softmax; 0 where an id was filtered out
    FAMILY.prompt, FAMILY.ids   qwen2, qwen3: generate(do_sample=False, repetition_penalty=FAMILY.penalty) on the tiny models beside it
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

FIXTURES = Path(__file__).resolve().parent / "fixtures"
V, P = 300, 12
SETTINGS = [(row, penalty, temperature, top_k, top_p, min_p) for row in (0, 1)
            for penalty, temperature, top_k, top_p, min_p in [
                (1, 1, 0, 1, 0), (1, 0.7, 0, 1, 0), (1.3, 1, 0, 1, 0), (0.8, 1.5, 0, 1, 0), (1, 1, 1, 1, 0), (1, 1, 7, 1, 0), (1, 1, 299, 1, 0),
                (1, 1, 0, 0.3, 0), (1, 1, 0, 0.9, 0), (1, 1, 0, 0.001, 0), (1, 1, 0, 1, 0.1), (1, 1, 0, 1, 0.9), (1, 1, 20, 0.8, 0),
                (1, 1, 20, 1, 0.2), (1, 1, 0, 0.95, 0.02), (1.1, 0.6, 20, 0.95, 0.05), (1.05, 0.7, 20, 0.8, 0)]]


def processors(penalty, temperature, top_k, top_p, min_p):
    """In the order of GenerationMixin._get_logits_processor."""
    steps = LogitsProcessorList()
    if penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    if temperature != 1:
        steps.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    if min_p:
        steps.append(MinPLogitsWarper(min_p))
    return steps


def filters(out):
    random = np.random.RandomState(3)
    plain = torch.from_numpy((random.randn(V) * 2.5).astype(np.float32))
    logits = torch.stack([plain, (plain * 4).round() / 4])
    previous = torch.from_numpy(random.randint(0, V, P))
    previous[3] = previous[0]
    previous[5] = logits[0].argmax()
    probabilities = []
    for row, *setting in SETTINGS:
        scores = processors(*setting)(previous[None], logits[None, row].clone())
        probabilities.append(scores.double().softmax(-1)[0])
    out["logits"], out["previous"], out["settings"], out["probabilities"] = logits, previous, torch.tensor(SETTINGS), torch.stack(probabilities)


def greedy(family, penalty, seed, out):
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / family, dtype=torch.float64)
    prompt = torch.from_numpy(np.random.RandomState(seed).randint(0, model.config.vocab_size, (1, 6)))
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, repetition_penalty=penalty,
                            pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_scores=True)
    best = torch.cat(answer.scores).topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 2e-3, "two scores are too close for a greedy choice to be certain: change the seed"
    out[f"{family}.penalty"], out[f"{family}.prompt"], out[f"{family}.ids"] = torch.tensor(penalty), prompt[0], answer.sequences[0, 6:]


def main():
    parser = argparse.ArgumentParser(description="transformers' sampling of small inputs")
    parser.add_argument("--check", action="store_true")
    torch.set_num_threads(1)
    out = {}
    filters(out)
    greedy("qwen2", 1.3, 3, out)
    greedy("qwen3", 1.7, 1, out)
    out = {name: tensor.to(torch.float32).contiguous() for name, tensor in out.items()}
    path = FIXTURES / "sampling" / "expected.safetensors"
    if parser.parse_args().check:
        old = load_file(path)
        assert old.keys() == out.keys() and all(torch.allclose(old[k], out[k], rtol=1e-5, atol=1e-7) for k in out), "the fixture differs"
        print("the fixture is what this transformers computes")
    else:
        path.parent.mkdir(exist_ok=True)
        save_file(out, path)
        print(path, path.stat().st_size, "bytes;", {k: tuple(v.shape) for k, v in out.items()})


if __name__ == "__main__":
    main()

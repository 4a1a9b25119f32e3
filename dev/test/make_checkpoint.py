#!/usr/bin/env python3
"""A checkpoint with the shape of a real Qwen and random weights, made by transformers: for trying sizes that are not committed.

    python dev/test/make_checkpoint.py --shape qwen2.5-0.5b --out /tmp/ck05 --dtype bf16 --seed 0

Writes config.json, generation_config.json and model.safetensors as save_pretrained does, and expected.txt: the loss that transformers
gets from the files just written, in fp32 arithmetic, on tokens (i * 7919 + 13) % 151643 for i = 0..256 (the first 256 are the
inputs, the last 256 the targets).
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

# The models' own config.json files on Hugging Face; vocab_size is what the tensors have, 293 rows more than there are tokens.
COMMON = dict(vocab_size=151936, rms_norm_eps=1e-6, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
SHAPES = {
    "qwen2.5-0.5b": (Qwen2ForCausalLM, Qwen2Config, dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        max_position_embeddings=32768, max_window_layers=24)),
    "qwen2.5-1.5b": (Qwen2ForCausalLM, Qwen2Config, dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=131072, max_window_layers=28)),
    "qwen3-0.6b": (Qwen3ForCausalLM, Qwen3Config, dict(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, max_window_layers=28)),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@torch.no_grad()
def loss_of_checkpoint(path):
    """Mean cross-entropy of the token sequence above, after reading the (rounded) weights back."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([(i * 7919 + 13) % 151643 for i in range(257)])
    return F.cross_entropy(model(ids[None, :-1], use_cache=False).logits[0], ids[1:]).item()


def main():
    parser = argparse.ArgumentParser(description="write a random checkpoint of a named Qwen shape and transformers' loss on it")
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model_class, config_class, shape = SHAPES[arguments.shape]
    torch.manual_seed(arguments.seed)
    model = model_class(config_class(**COMMON, **shape))        # transformers' initialisation: normal(0, 0.02), norms 1, biases 0
    count = sum(p.numel() for p in model.parameters())
    model.to(DTYPES[arguments.dtype]).save_pretrained(arguments.out)
    del model
    text = (f"loss {loss_of_checkpoint(arguments.out):.7f}\n"
            f"# {arguments.shape} seed {arguments.seed}, {count} parameters stored as {arguments.dtype}, arithmetic in fp32\n"
            "# ids (i * 7919 + 13) % 151643 for i = 0..256; inputs: the first 256, targets: the last 256, mean over 256 targets\n"
            f"# torch {torch.__version__}, transformers {transformers.__version__}\n")
    (arguments.out / "expected.txt").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()

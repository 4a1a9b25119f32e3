#!/usr/bin/env python3
"""The numbers that the C trainer is checked against, computed by PyTorch and transformers.

    python dev/test/reference.py            write dev/test/fixtures/ again (same bytes with the same versions)
    python dev/test/reference.py --check    compute everything again and compare with the committed files

needs: pip install torch transformers safetensors numpy (made with the versions named in each expected.safetensors)

Three tiny models with awkward sizes, each a checkpoint directory as Hugging Face has it, plus expected.safetensors:
    qwen/           Qwen v1: fused QKV with bias, untied head, config.json in the keys of Qwen-7B
    qwen2/          Qwen2: QKV bias, grouped KV heads, tied head
    qwen3/          Qwen3: QK-norm, one KV head, heads * head_dim != hidden_size, untied head
    qwen2_bf16/     qwen2 rounded to bf16, in two shards, config.json with the keys that transformers 4 wrote (rope_theta)
    qwen3_fp16/     qwen3 rounded to fp16, same old keys

expected.safetensors of the first three, all F32 (the only format the trainer needs), rounded from float64:
    tokens, targets (B, T)      inputs and what follows them
    start (B, T)                column where the document of this position begins: position t attends to [start, t] and its RoPE
                                angle is that of t - start (RoPE is relative: counting from column 0 would give the same numbers)
    weights (B, T)              loss weight of each target, 0 or 1
    plain.*                     every row is one document (start 0) and every weight is 1
    masked.*                    with start and weights as given
        logits (B, T, V)
        loss ()                 sum(weights * cross-entropy) / sum(weights)
        grad.NAME               gradient of loss, for every tensor NAME of the checkpoint
    adamw.*                     ten AdamW updates on the plain batch; decay on matrices only (embeddings are matrices)
        lr, beta1, beta2, eps, weight_decay, clip ()
        losses, norms (10)      before each update: the loss, and the norm of the whole gradient before clipping
        final.NAME              the parameters after the tenth
    greedy.prompt (5), greedy.ids (10)      qwen2 and qwen3: what model.generate adds to the prompt when it takes the largest logit
expected.safetensors of the rounded ones: tokens, plain.logits of the rounded weights (computed in float64 too).

Qwen2 and Qwen3 are transformers' own classes. Qwen v1 is not in transformers, so it is written below, and its logits and loss are
compared with those of Qwen2ForCausalLM on the same weights: the two are the same model under other names.
"""
import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

FIXTURES = Path(__file__).resolve().parent / "fixtures"
B, T = 3, 13
MADE_BY = {"made_by": f"dev/test/reference.py, torch {torch.__version__}, transformers {transformers.__version__}"}


# ---------------------------------------------------------------------------------------------------------------------------------
# Qwen v1

class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):       # v1 goes to fp32 here; the reference runs in float64 anyway
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x, position, base):
    """RoPE on x (B, NH, T, HD): element i of the first half and element i of the second half are one pair."""
    half = x.shape[-1] // 2
    angle = position[:, None, :, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)    # (B, 1, T, HD/2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class QwenAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.base = c["num_attention_heads"], c["rotary_emb_base"]
        # v1's code splits the output of c_attn by hidden_size, so a real v1 has kv_channels * heads == hidden_size
        proj = c["kv_channels"] * self.heads
        assert proj == c["hidden_size"]
        self.c_attn = nn.Linear(c["hidden_size"], 3 * proj, bias=True)          # rows: all of Q, all of K, all of V
        self.c_proj = nn.Linear(proj, c["hidden_size"], bias=not c["no_bias"])

    def forward(self, x, start):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, -1))   # (B, NH, T, HD)
        column = torch.arange(x.shape[1])
        position = column - start
        q, k = rotate(q, position, self.base), rotate(k, position, self.base)
        hidden = (column > column[:, None]) | (column < start[:, :, None])      # (B, T query, T key)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(hidden[:, None], -math.inf)
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class QwenMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c["intermediate_size"] // 2         # v1's intermediate_size counts w1 and w2 together
        self.w1 = nn.Linear(c["hidden_size"], width, bias=not c["no_bias"])
        self.w2 = nn.Linear(c["hidden_size"], width, bias=not c["no_bias"])
        self.c_proj = nn.Linear(width, c["hidden_size"], bias=not c["no_bias"])

    def forward(self, x):
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QwenBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn = RMSNorm(c["hidden_size"], c["layer_norm_epsilon"]), QwenAttention(c)
        self.ln_2, self.mlp = RMSNorm(c["hidden_size"], c["layer_norm_epsilon"]), QwenMLP(c)

    def forward(self, x, start):
        x = x + self.attn(self.ln_1(x), start)
        return x + self.mlp(self.ln_2(x))


class Qwen(nn.Module):
    """Qwen v1 with the parameter names of its checkpoints; c is its config.json."""

    def __init__(self, c):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(c["vocab_size"], c["hidden_size"]),
            "h": nn.ModuleList(QwenBlock(c) for _ in range(c["num_hidden_layers"])),
            "ln_f": RMSNorm(c["hidden_size"], c["layer_norm_epsilon"])})
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def forward(self, tokens, start):
        x = self.transformer["wte"](tokens)
        for block in self.transformer["h"]:
            x = block(x, start)
        return self.lm_head(self.transformer["ln_f"](x))


def qwen_as_qwen2(model, c):
    """The same model as a Qwen2ForCausalLM: KV heads = heads, w2 is the gate, w1 is up."""
    twin = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"] // 2,
        num_hidden_layers=c["num_hidden_layers"], num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_attention_heads"], rms_norm_eps=c["layer_norm_epsilon"], tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(c["rotary_emb_base"])}, attn_implementation="eager")).double()
    renames = [("transformer.wte", "model.embed_tokens"), ("transformer.ln_f", "model.norm"), ("transformer.h", "model.layers"),
               ("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm"), ("attn.c_proj", "self_attn.o_proj"),
               ("mlp.w1", "mlp.up_proj"), ("mlp.w2", "mlp.gate_proj"), ("mlp.c_proj", "mlp.down_proj")]
    weights = {}
    for name, w in model.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        if "attn.c_attn" in name:
            for letter, part in zip("qkv", w.chunk(3)):
                weights[name.replace("attn.c_attn", f"self_attn.{letter}_proj")] = part
        else:
            weights[name] = w
    twin.load_state_dict(weights)
    return twin


# ---------------------------------------------------------------------------------------------------------------------------------
# What is computed of every model. A task that needs other numbers (another loss, say) adds a function here and a line in its maker.

def logits_of(model, tokens, start=None):
    """(B, T, V) in float64. start None: no document mask at all, so transformers makes its own causal mask."""
    if isinstance(model, Qwen):
        return model(tokens, torch.zeros_like(tokens) if start is None else start)
    if start is None:
        return model(tokens, use_cache=False).logits
    column = torch.arange(tokens.shape[1])
    hidden = (column > column[:, None]) | (column < start[:, :, None])          # (B, T query, T key)
    mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -math.inf)[:, None]
    return model(tokens, attention_mask=mask, position_ids=column - start, use_cache=False).logits


def loss_of(logits, targets, weights):
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (ce * weights.flatten()).sum() / weights.sum()


def batch_of(vocab, seed):
    """Tokens, targets, starts and weights. Row 0 is one document with weight 1 everywhere, row 1 has three documents (one of them a
    single token) and prompts with weight 0, row 2 has two documents."""
    random = np.random.RandomState(seed)
    stream = torch.from_numpy(random.randint(0, vocab, (B, T + 1)))
    stream[0, 2], stream[0, 7], stream[2, 4] = vocab - 1, 0, vocab - 1          # both ends of the vocabulary, one of them twice
    start = torch.tensor([[0] * 13, [0] * 5 + [5] + [6] * 7, [0] * 9 + [9] * 4])
    weights = torch.tensor([[1] * 13, [0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0]]).double()
    return stream[:, :-1], stream[:, 1:], start, weights


def gradients(model, prefix, batch, out):
    tokens, targets, start, weights = batch
    model.zero_grad(set_to_none=True)
    logits = logits_of(model, tokens, start)
    loss = loss_of(logits, targets, weights)
    loss.backward()
    out[f"{prefix}.logits"], out[f"{prefix}.loss"] = logits, loss
    for name, p in model.named_parameters():        # a tied head is listed once, as the embedding
        out[f"{prefix}.grad.{name}"] = p.grad.clone()


def adamw(model, batch, out, steps=10, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0):
    """Trains the model given, so it comes last."""
    tokens, targets, _, _ = batch
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": weight_decay},
              {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(logits_of(model, tokens), targets, torch.ones(tokens.shape, dtype=torch.float64))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        losses.append(loss.detach())
        optimizer.step()
    out["adamw.losses"], out["adamw.norms"] = torch.stack(losses), torch.stack(norms)
    for name, value in dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, clip=clip).items():
        out[f"adamw.{name}"] = torch.tensor(value, dtype=torch.float64)
    for name, p in model.named_parameters():
        out[f"adamw.final.{name}"] = p.detach().clone()


def greedy(model, vocab, seed, out):
    prompt = torch.from_numpy(np.random.RandomState(seed).randint(0, vocab, (1, 5)))
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False,
                            return_dict_in_generate=True, output_logits=True)
    best = torch.cat(answer.logits).topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-2, "two logits are too close for a greedy choice to be certain: change prompt_seed"
    assert answer.sequences[0, 5:].unique().numel() > 5, "the same few tokens over and over: change prompt_seed"
    out["greedy.prompt"], out["greedy.ids"] = prompt[0], answer.sequences[0, 5:]


def expected(model, vocab, seed, prompt_seed=None):
    """Everything in expected.safetensors of an fp32 model; greedy.* where there is a seed for the prompt."""
    batch = tokens, targets, start, weights = batch_of(vocab, seed)
    out = {"tokens": tokens, "targets": targets, "start": start, "weights": weights}
    gradients(model, "plain", (tokens, targets, None, torch.ones_like(weights)), out)
    gradients(model, "masked", batch, out)
    check_documents(model, tokens, start, out["masked.logits"])
    if prompt_seed is not None:
        greedy(model, vocab, prompt_seed, out)
    adamw(model, batch, out)
    return out


def check_documents(model, tokens, start, logits):
    """Under the document mask, a document has the logits it has when it is alone."""
    for b in range(B):
        for first in start[b].unique():
            columns = (start[b] == first).nonzero().flatten()
            alone = logits_of(model, tokens[b:b + 1, columns])
            assert (alone - logits[b:b + 1, columns]).abs().max() < 1e-5, f"row {b}, document at {first}: the mask leaks"


# ---------------------------------------------------------------------------------------------------------------------------------
# The fixtures

def randomise(model, seed):
    """Weights whose every kind matters: norms are not 1, biases are not 0, matrices large enough for uneven attention. They are exact
    in fp32, then everything is computed in float64. RandomState's stream is frozen, so the seed alone fixes them."""
    random = np.random.RandomState(seed)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            w = random.normal(0, 0.2, p.shape)
        elif p.dim() == 1:
            w = random.uniform(0.5, 1.5, p.shape)
        else:
            w = random.normal(0, 0.2, p.shape)
        p.data = torch.from_numpy(w.astype(np.float32))
    return model.double()


def save_expected(path, tensors):
    narrow = {name: t.detach().to(torch.float32).contiguous() for name, t in tensors.items()}
    save_file(narrow, path / "expected.safetensors", metadata=MADE_BY)


def save_model(model, path, dtype, **options):
    """A copy of the model in dtype, written by transformers itself."""
    copy = type(model)(model.config).to(dtype)
    copy.load_state_dict({name: w.to(dtype) for name, w in model.state_dict().items()})
    copy.save_pretrained(path, **options)
    (path / "generation_config.json").unlink()


def make_qwen(path):
    c = {   # the keys of Qwen-7B's config.json
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 18,
        "initializer_range": 0.02, "intermediate_size": 44, "kv_channels": 6, "layer_norm_epsilon": 0.001,
        "max_position_embeddings": 512, "model_type": "qwen", "no_bias": True, "num_attention_heads": 3, "num_hidden_layers": 3,
        "onnx_safe": None, "rotary_emb_base": 3000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 64,
        "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer", "transformers_version": "4.32.0", "use_cache": True,
        "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 67}
    model = randomise(Qwen(c), seed=1)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(c, indent=2) + "\n")
    save_file({name: w.float() for name, w in model.state_dict().items()}, path / "model.safetensors", metadata={"format": "pt"})

    twin = qwen_as_qwen2(model, c)
    out = expected(model, c["vocab_size"], seed=101)
    tokens, targets, start, weights = batch_of(c["vocab_size"], seed=101)
    for prefix, s, w in (("plain", None, torch.ones_like(weights)), ("masked", start, weights)):
        logits = logits_of(twin, tokens, s)
        assert (logits - out[f"{prefix}.logits"]).abs().max() < 1e-5, f"{prefix}: Qwen v1 and its Qwen2 twin disagree"
        assert (loss_of(logits, targets, w) - out[f"{prefix}.loss"]).abs() < 1e-5
    save_expected(path, out)


def qwen2():
    return randomise(Qwen2ForCausalLM(Qwen2Config(
        vocab_size=61, hidden_size=24, intermediate_size=38, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, rms_norm_eps=0.01, tie_word_embeddings=True, max_window_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attn_implementation="eager")), seed=2)


def qwen3():
    return randomise(Qwen3ForCausalLM(Qwen3Config(
        vocab_size=59, hidden_size=28, intermediate_size=34, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        head_dim=10, max_position_embeddings=512, rms_norm_eps=0.005, tie_word_embeddings=False, max_window_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 70000.0}, attn_implementation="eager")), seed=3)


def make_fp32(path, model, seed, prompt_seed):
    save_model(model, path, torch.float32)
    save_expected(path, expected(model, model.config.vocab_size, seed, prompt_seed))


def make_rounded(path, model, dtype, seed, **options):
    save_model(model, path, dtype, **options)
    new = json.loads((path / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("dtype", "layer_types", "rope_parameters")}
    old |= {"rope_theta": new["rope_parameters"]["rope_theta"], "rope_scaling": None, "torch_dtype": new["dtype"],
            "sliding_window": 4096, "transformers_version": "4.51.0"}       # a window that use_sliding_window = false leaves unused
    (path / "config.json").write_text(json.dumps(old, indent=2, sort_keys=True) + "\n")
    rounded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").double()
    for name, w in model.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], w.to(dtype).double()), f"{name} did not come back"
    tokens, _, _, _ = batch_of(model.config.vocab_size, seed)
    logits, exact = logits_of(rounded, tokens), logits_of(model, tokens)
    assert 1e-5 < (logits - exact).abs().max() < 0.2, "transformers read config.json in its old keys as another model"
    save_expected(path, {"tokens": tokens, "plain.logits": logits})


MAKERS = {
    "qwen": make_qwen,
    "qwen2": lambda path: make_fp32(path, qwen2(), seed=102, prompt_seed=102),
    "qwen3": lambda path: make_fp32(path, qwen3(), seed=103, prompt_seed=128),
    "qwen2_bf16": lambda path: make_rounded(path, qwen2(), torch.bfloat16, seed=102, max_shard_size=13000),
    "qwen3_fp16": lambda path: make_rounded(path, qwen3(), torch.float16, seed=103),
}


# ---------------------------------------------------------------------------------------------------------------------------------
# Writing and checking

def make_all(root):
    for name, make in MAKERS.items():
        make(root / name)


def json_differs(a, b):
    a, b = json.loads(a.read_text()), json.loads(b.read_text())
    a.pop("transformers_version", None), b.pop("transformers_version", None)
    return None if a == b else "other contents"


def tensors_differ(a, b, tolerance):
    """The first tensor whose name, type, shape or values differ. Tolerance is relative to the largest element; 0 means the same bits."""
    a, b = load_file(a), load_file(b)
    if a.keys() != b.keys():
        return f"tensors that only one has: {sorted(a.keys() ^ b.keys())}"
    for name in sorted(a):
        x, y = a[name], b[name]
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"{name}: {x.dtype} {tuple(x.shape)} committed, {y.dtype} {tuple(y.shape)} computed"
        if torch.equal(x, y):
            continue
        error = ((x.double() - y.double()).abs().max() / y.double().abs().max()).item()
        if not (x.is_floating_point() and error <= tolerance):
            return f"{name}: differs by {error:.1e} of its largest element"
    return None


def compare(committed, computed):
    """Number of files that differ; one line a file."""
    failed = 0
    names = {str(p.relative_to(root)) for root in (committed, computed) for maker in MAKERS for p in (root / maker).rglob("*")}
    for name in sorted(names):
        a, b = committed / name, computed / name
        if not a.exists() or not b.exists():
            why = "missing" if b.exists() else "not made by this script"
        elif name.endswith(".json"):
            why = json_differs(a, b)
        else:
            # weights are drawn, not computed: same bits. Other versions and machines may round sums otherwise: 1e-5 (fp32: 6e-8).
            why = tensors_differ(a, b, 1e-5 if name.endswith("expected.safetensors") else 0)
        print(f"{'ok' if why is None else 'FAIL':5}{name}{'' if why is None else ': ' + why}")
        failed += why is not None
    return failed


def main():
    parser = argparse.ArgumentParser(description="write or check dev/test/fixtures: PyTorch's numbers for tiny Qwen models")
    parser.add_argument("--check", action="store_true", help="compare with the committed files instead of writing them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)        # one order of summation
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        make_all(made)
        if arguments.check:
            failed = compare(FIXTURES, made)
            print(f"{failed} files differ" if failed else "fixtures are what this script computes")
            sys.exit(1 if failed else 0)
        for path in sorted(p for p in made.rglob("*") if p.is_file()):
            target = FIXTURES / path.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            print(f"{path.stat().st_size:9,} {target.relative_to(FIXTURES)}")


if __name__ == "__main__":
    main()

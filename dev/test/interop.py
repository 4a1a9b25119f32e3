#!/usr/bin/env python3
"""Models and tokenizers to and from transformers, in both directions, without remote code.

    pip install torch transformers safetensors peft
    make train_qwen prepare tiny_baike && python dev/test/interop.py          from the repository root

Every family (Qwen v1, Qwen1.5, Qwen2, Qwen2.5, Qwen3) as transformers writes it today and with the keys that its published config.json has;
fp32, bf16 and fp16; one file or shards with an index; tied or not. Shapes are tiny, the proportions of real ones. For each:
    in      our logits are transformers' logits on the same directory, both in fp32 arithmetic: within 1e-4
    out     ./train_qwen export writes a directory that transformers loads with no tensor missing, left over or changed in shape;
            its logits are within 1e-4 of the source's; in bf16 every weight is the source's, rounded
    back    exporting the export gives the same bytes
Tokenizers, for the full and a trimmed vocabulary: AutoTokenizer on what a training run saves gives the ids of ./prepare tokenize, and its
chat template the tokens of ./prepare --task sft. A model that comes with its own tokenizer files keeps them, chat template included.
Adapters: peft loads what --lora-rank trains, with the same logits.
Qwen v1 has no class in transformers: the one of reference.py stands for its remote code.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

sys.path.insert(0, str(Path(__file__).parent))
from reference import Qwen, logits_of, randomise        # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
failed = 0


def check(ok, text):
    global failed
    failed += not ok
    print("ok  " if ok else "FAIL", text, flush=True)


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, **options)
    if done.returncode != 0:
        check(False, f"{' '.join(str(c) for c in command)}: {done.stderr.decode()}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------------------
# Models

# What a published config.json of each family says besides the sizes. Newer keys of transformers are absent from these.
PUBLISHED = {
    "qwen1.5": {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
                "initializer_range": 0.02, "max_window_layers": 21, "model_type": "qwen2", "sliding_window": 32768, "transformers_version": "4.37.0",
                "use_cache": True, "use_sliding_window": False},
    "qwen2.5": {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
                "initializer_range": 0.02, "max_window_layers": 21, "model_type": "qwen2", "sliding_window": 32768, "transformers_version": "4.43.1",
                "use_cache": True, "use_mrope": False, "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
              "eos_token_id": 151645, "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 28, "model_type": "qwen3",
              "rope_scaling": None, "sliding_window": None, "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False},
}
PUBLISHED["qwen2"] = PUBLISHED["qwen2.5"] | {"transformers_version": "4.40.1"}
PUBLISHED["qwen2"].pop("use_mrope")

# name: family, sizes; tied. Heads, groups and head sizes as in the real ones, everything small.
SHAPES = {
    "Qwen1.5-0.5B": ("qwen1.5", dict(hidden_size=64, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4), True),
    "Qwen1.5-7B": ("qwen1.5", dict(hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4), False),
    "Qwen2-0.5B": ("qwen2", dict(hidden_size=56, intermediate_size=96, num_hidden_layers=3, num_attention_heads=7, num_key_value_heads=1), True),
    "Qwen2.5-7B": ("qwen2.5", dict(hidden_size=56, intermediate_size=96, num_hidden_layers=2, num_attention_heads=14, num_key_value_heads=2), False),
    "Qwen3-0.6B": ("qwen3", dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24), True),
    "Qwen3-8B": ("qwen3", dict(hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=16), False),
}
IDS = [5, 90, 0, 17, 17, 42, 88, 3, 61, 9, 77, 30, 2, 58, 64, 21, 80, 1]
VOCABULARY = 91


def v1_config():
    return {"architectures": ["QWenLMHeadModel"], "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}, "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0, "fp16": False,
            "fp32": False, "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 176, "kv_channels": 16, "layer_norm_epsilon": 1e-06,
            "max_position_embeddings": 8192, "model_type": "qwen", "no_bias": True, "num_attention_heads": 4, "num_hidden_layers": 3,
            "onnx_safe": None, "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048,
            "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer", "transformers_version": "4.32.0", "use_cache": True,
            "use_dynamic_ntk": True, "use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": VOCABULARY}


def shard(directory):
    """Splits model.safetensors into three files and an index, as save_pretrained does with large models."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, weight_map = list(weights), {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        part = {name: weights[name] for name in names[i::3]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    total = sum(w.numel() * w.element_size() for w in weights.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def make_v1(directory, dtype):
    model = randomise(Qwen(v1_config()), seed=4).to(DTYPES[dtype])
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(v1_config(), indent=2))
    save_file(dict(model.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})
    return model.float()


def make(directory, name, keys, dtype):
    """The model in fp32, its weights rounded to dtype; in the directory as transformers or as the family's publisher wrote it."""
    family, sizes, tied = SHAPES[name]
    three = family == "qwen3"
    config = (Qwen3Config if three else Qwen2Config)(
        vocab_size=VOCABULARY, max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, attn_implementation="eager", **sizes)
    model = randomise((Qwen3ForCausalLM if three else Qwen2ForCausalLM)(config), seed=5).to(DTYPES[dtype])
    model.save_pretrained(directory)
    if keys == "published":
        old = PUBLISHED[family] | sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
                                           "tie_word_embeddings": tied, "torch_dtype": str(DTYPES[dtype]).split(".")[1]}
        (directory / "config.json").write_text(json.dumps(old, indent=2))
    return model.float()


def our_logits(directory):
    out = run(harness, directory, *IDS)
    return torch.from_numpy(np.frombuffer(out, np.float32).copy()).reshape(len(IDS), -1) if out else torch.full((len(IDS), VOCABULARY), torch.nan)


@torch.no_grad()
def their_logits(directory):
    """Logits in fp32 arithmetic, and what from_pretrained had to say about the weights."""
    model, loading = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager")
    return model(torch.tensor([IDS]), use_cache=False).logits[0], {key: value for key, value in loading.items() if value}, model


def close(a, b, tolerance=1e-4):
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


@torch.no_grad()
def test_model(name, directory, source, wanted):
    """source: the model in fp32; wanted: its logits from the directory."""
    ours = our_logits(directory)
    check(close(ours, wanted), f"{name}: in: largest difference {(ours - wanted).abs().max():.1e} of logits up to {wanted.abs().max():.1f}")
    for dtype in ("fp32", "bf16"):
        out, again = directory / dtype, directory / f"{dtype} again"
        run("./train_qwen", "export", "--model", directory, "--out", out, "--save-dtype", dtype)
        logits, loading, loaded = their_logits(out)
        check(not loading, f"{name}: out {dtype}: transformers loads it whole {loading or ''}")
        saved = AutoConfig.from_pretrained(out)
        check(str(saved.dtype) == str(DTYPES[dtype]), f"{name}: out {dtype}: config.json says {saved.dtype}")
        if dtype == "fp32":
            check(close(logits, wanted), f"{name}: out fp32: largest difference {(logits - wanted).abs().max():.1e}")
        else:
            rounded = our_logits(out)
            check(close(logits, rounded), f"{name}: out bf16: largest difference to ours {(logits - rounded).abs().max():.1e}")
            if source is not None:
                wrong = [key for key, w in source.state_dict().items() if not torch.equal(loaded.state_dict()[key], w.bfloat16().float())]
                check(not wrong, f"{name}: out bf16: every weight is the source's, rounded {wrong[:3] or ''}")
        run("./train_qwen", "export", "--model", out, "--out", again, "--save-dtype", dtype)
        check((out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes() and
              (out / "config.json").read_bytes() == (again / "config.json").read_bytes(), f"{name}: back {dtype}: the same bytes")


def test_models(work):
    for name in SHAPES:
        for keys in ("transformers", "published"):
            for dtype in DTYPES:
                directory = work / f"{name} {keys} {dtype}"
                source = make(directory, name, keys, dtype)
                sharded = dtype != "fp32"
                if sharded:
                    shard(directory)
                wanted, loading, _ = their_logits(directory)
                assert not loading, loading
                test_model(f"{name}, keys of {keys}, {dtype}{', 3 files' if sharded else ''}", directory, source, wanted)
    for dtype in DTYPES:
        directory = work / f"v1 {dtype}"
        source = make_v1(directory, dtype)
        if dtype != "fp32":
            shard(directory)
        with torch.no_grad():
            wanted = logits_of(source.double(), torch.tensor([IDS]))[0].float()
        test_model(f"Qwen-7B (v1), {dtype}{', 3 files' if dtype != 'fp32' else ''}", directory, None, wanted)


# ---------------------------------------------------------------------------------------------------------------------------------
# Tokenizers

TEXTS = ["长江是中国最长的河流。", "I'm 25; it's 3.14159 — naïve café, ＡＢＣ", "def f(x):\n\treturn x ** 2\n\n\n# 注释", "  two  spaces\r\n\r\nand CRLF ", "🙂👨‍👩‍👧‍👦 हिन्दी ไทย עברית",
         "e\u0301 \u1100\u1161 ﬁ", "", " ", "<|im_end|> in text", "龘𠮷\u200b\ufeff"]
CHAT = [{"role": "system", "content": "你是一个助手。"}, {"role": "user", "content": "长江有多长？"}, {"role": "assistant", "content": "6300公里。"},
        {"role": "user", "content": "Thanks! 黄河呢？"}, {"role": "assistant", "content": "5464公里。"}]


def plain_ids(tokenizer, text):
    """Text is text, as in ./prepare: special tokens in it are not recognised."""
    return tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]


def test_tokenizer(name, checkpoint, tokenizer_file, work):
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    lines = run("./prepare", "tokenize", "--jsonl", "--tokenizer", tokenizer_file, input="".join(json.dumps(t) + "\n" for t in TEXTS).encode())
    wanted = [[int(i) for i in line.split()] for line in lines.decode().split("\n")[:len(TEXTS)]]
    for text, ids in zip(TEXTS, wanted):
        got = plain_ids(theirs, text)
        if got != ids:
            check(False, f"{name}: {text!r} is {got}, ./prepare has {ids}")
    check(len(wanted) == len(TEXTS), f"{name}: {len(TEXTS)} texts, {sum(map(len, wanted))} ids of AutoTokenizer compared with ./prepare")
    check(all(theirs.decode(ids) == text for text, ids in zip(TEXTS[:5], wanted)), f"{name}: decoding gives the text back")

    chat = work / f"{name} chat.jsonl"
    chat.write_text(json.dumps({"messages": CHAT}, ensure_ascii=False) + "\n")
    run("./prepare", "--task", "sft", "--tokenizer", tokenizer_file, "--out", work / f"{name} sft", chat)
    tokens = np.fromfile(work / f"{name} sft" / "train.bin", "<u4", offset=256)
    ids = (tokens & 0xFFFFFF).tolist()
    template = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    newline = plain_ids(theirs, "\n")
    check(template == ids + newline, f"{name}: the chat template's {len(template)} tokens are those of ./prepare --task sft")
    prompt = theirs.apply_chat_template(CHAT[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
    trained = [i for i in range(len(tokens)) if not tokens[i] >> 31]
    answer = plain_ids(theirs, CHAT[-1]["content"]) + [theirs.convert_tokens_to_ids("<|im_end|>")]
    check(prompt == ids[:len(prompt)] and ids[len(prompt):] == answer and trained[-len(answer):] == list(range(len(prompt), len(ids))),
          f"{name}: the generation prompt ends where the loss begins, the answer ends with the trained <|im_end|>")
    config = transformers.GenerationConfig.from_pretrained(checkpoint)
    ends = {theirs.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}
    check(set(config.eos_token_id) == ends and theirs.eos_token_id == AutoConfig.from_pretrained(checkpoint).eos_token_id and
          theirs.eos_token == "<|im_end|>", f"{name}: generation stops at {sorted(ends)}")
    check(len(theirs) <= AutoConfig.from_pretrained(checkpoint).vocab_size, f"{name}: {len(theirs)} tokens fit the embedding")


def trained(data, model, out, *options):
    run("./train_qwen", "--data", data, "--model", model, "--steps", 2, "--batch", 1, "--seq", 32, "--sample-every", 0, "--eval-tokens", 32,
        "--warmup", 0, "--out", out, *options)
    return sorted(Path(out).glob("step_*"))[-1]


def test_peft(work):
    """Adapters: those of ./train_qwen in peft. (peft's in ./train_qwen: test_align.c, from the fixtures of reference_lora.py.)"""
    import peft
    print(f"peft {peft.__version__}")
    base = trained("data/tiny_baike", "tiny", work / "base")
    for name, options in (("all projections", ["--lora-rank", 4]), ("two projections", ["--lora-rank", 8, "--lora-alpha", 4, "--lora-targets", "k_proj,up_proj"])):
        adapter = trained("data/tiny_baike", base, work / f"lora {name}", "--lr", 0.05, *options)
        ours = our_logits(adapter)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)          # a missing or left-over tensor is a warning of peft
            model = peft.PeftModel.from_pretrained(plain, adapter)
            logits = model(torch.tensor([IDS]), use_cache=False).logits[0]
        check(close(logits, ours), f"adapter of {name}: in peft, largest difference {(logits - ours).abs().max():.1e} of logits up to {ours.abs().max():.1f}")
        distance = (ours - our_logits(base)).abs().max()
        check(distance > 0.01, f"adapter of {name}: it changes the logits, by up to {distance:.2f}")
        again = AutoModelForCausalLM.from_pretrained(adapter, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = again(torch.tensor([IDS]), use_cache=False).logits[0]
        check(close(logits, ours), f"adapter of {name}: transformers loads its directory, base and all")
        merged = work / f"merged {name}"
        run("./train_qwen", "export", "--model", adapter, "--out", merged)
        logits, loading, _ = their_logits(merged)
        check(close(logits, ours) and not loading, f"adapter of {name}: exported, it is a plain model with the same logits")


def test_tokenizers(work):
    test_tokenizer("trimmed vocabulary", trained("data/tiny_baike", "tiny", work / "trimmed"), "data/tiny_baike/tokenizer.bin", work)
    run("./prepare", "--out", work / "full data", "--val-fraction", 0, "data/tiny_baike/web.jsonl")
    full = trained(work / "full data", "tiny", work / "full")
    test_tokenizer("full vocabulary", full, "dev/data/qwen.bin", work)

    # its own tokenizer files and template
    own = work / "own"
    shutil.copytree(full, own)
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.chat_template = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(own)
    wanted = tokenizer.apply_chat_template(CHAT[1:], tokenize=False)
    for name, directory in (("a fine-tuned", trained(work / "full data", own, work / "kept")), ("an exported", work / "own exported")):
        if not directory.exists():
            run("./train_qwen", "export", "--model", own, "--out", directory)
        got = AutoTokenizer.from_pretrained(directory).apply_chat_template(CHAT[1:], tokenize=False)
        check(got == wanted and "You are Qwen." in got, f"{name} model keeps its own chat template")

    # Qwen v1's tokenizer file
    v1 = work / "v1 tokenizer"
    make_v1(v1, "fp32")
    config = v1_config() | {"vocab_size": 151936}
    weights = load_file(v1 / "model.safetensors")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.zeros(151936, 64)
    save_file(weights, v1 / "model.safetensors", metadata={"format": "pt"})
    (v1 / "config.json").write_text(json.dumps(config))
    if not tiktoken_file.exists():
        print(f"SKIP Qwen v1's tokenizer: there is no {tiktoken_file} (set QWEN_TIKTOKEN)")
        return
    shutil.copy(tiktoken_file, v1 / "qwen.tiktoken")
    run("./train_qwen", "export", "--model", v1, "--out", work / "v1 exported")
    theirs = AutoTokenizer.from_pretrained(work / "v1 exported")
    check(theirs.convert_tokens_to_ids("<|extra_0|>") == 151646 and plain_ids(theirs, TEXTS[1]) == plain_ids(AutoTokenizer.from_pretrained(full), TEXTS[1]),
          "Qwen v1's qwen.tiktoken becomes tokenizer.json, with its own special tokens")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    tiktoken_file = Path(os.environ.get("QWEN_TIKTOKEN", "qwen.tiktoken"))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        harness = work / "logits"
        run("cc", "-std=c11", "-O2", "-o", harness, "dev/test/logits.c", "-lm")
        test_models(work)
        test_tokenizers(work)
        test_peft(work)
    print("failed", failed)
    sys.exit(failed > 0)

#!/usr/bin/env python3
"""The small checkpoint, token files and numbers in dev/test/fixtures/evaluate, which test_evaluate.c compares ./evaluate with. The questions
in ceval/ and cmmlu/ are made up, in the layout of the benchmarks' files (quotes, line ends in quotes, CRLF, byte order marks).

    make train_qwen prepare && python dev/test/evaluate_reference.py            write them again
    python dev/test/evaluate_reference.py --check                               compute the numbers again and compare

needs: pip install torch transformers numpy. model/ has random weights and a vocabulary of what the questions use; its tokenizer files are
those that ./train_qwen writes. expected.json: dev/eval/compare.py's numbers for several settings.
"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "dev/test/fixtures/evaluate"
sys.path.insert(0, str(ROOT / "dev/eval"))
import compare  # noqa: E402

# name: (answer, shots, template, context, seq)
SETTINGS = {"zero": ("letter", 0, "none", 0, 40), "two": ("letter", 2, "none", 0, 0), "short": ("letter", 2, "none", 120, 7),
            "cut": ("letter", 1, "none", 25, 64), "chatml": ("letter", 1, "chatml", 100, 0), "mini_llm": ("letter", 0, "mini_llm", 0, 0),
            "text": ("text", 0, "none", 0, 0)}


def make_model():
    texts = [{"text": path.read_text(encoding="utf-8-sig")} for path in sorted(FOLDER.glob("c*/*/*.csv"))]
    texts += [{"text": "以下是关于病毒学的单项选择题，请直接给出正确答案的选项。题目：答案是：中国历史 你是一个助手 用户: 回答: "},
              {"text": "以下是中国关于法学、大学物理、计算机网络考试的单项选择题，请选出其中的正确答案。\n\n答案：A"}]
    pairs = [{"instruction": "时间的单位是什么？", "output": "秒。"}, {"instruction": "唐朝的都城是哪里？", "output": "长安，就是今天的西安。" * 9}]
    preferences = [{"prompt": p["instruction"], "chosen": p["output"], "rejected": r} for p in pairs for r in ("米。", "洛阳。", "地址")]
    with tempfile.TemporaryDirectory() as work:
        for name, records in (("text", texts), ("sft", pairs), ("dpo", preferences)):
            Path(work, f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        run = lambda *command: subprocess.run([str(c) for c in command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        run("./prepare", "--trim-vocab", "--val-fraction", 0, "--out", f"{work}/text", f"{work}/text.jsonl")
        for task in ("sft", "dpo"):
            run("./prepare", "--task", task, "--tokenizer", f"{work}/text/tokenizer.bin", "--val-fraction", 0, "--out", f"{work}/{task}",
                f"{work}/{task}.jsonl")
        vocab = int.from_bytes(Path(work, "text/train.bin").read_bytes()[32:36], "little")
        torch.manual_seed(8)
        config = Qwen3Config(vocab_size=(vocab + 31) // 32 * 32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, rms_norm_eps=1e-6,
                             rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        model = Qwen3ForCausalLM(config)
        for p in model.parameters():
            p.data = p.data * 10 if p.dim() == 2 else p.data        # so that the numbers have some size
        model.save_pretrained(f"{work}/random")
        run("./train_qwen", "--model", f"{work}/random", "--data", f"{work}/text/train.bin", "--steps", 1, "--lr", 1e-30, "--batch", 1, "--seq", 16,
            "--sample-every", 0, "--save-dtype", "bf16", "--out", f"{work}/out")
        shutil.rmtree(FOLDER / "model", ignore_errors=True)
        (FOLDER / "model").mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(f"{work}/out/step_00000001/{name}", FOLDER / "model" / name)
        for name in ("text", "sft", "dpo"):
            shutil.copyfile(f"{work}/{name}/train.bin", FOLDER / f"{name}.bin")


def numbers():
    out = {"made_by": f"dev/test/evaluate_reference.py, torch {torch.__version__}, transformers {transformers.__version__}"}
    for name, (answer, shots, template, context, seq) in SETTINGS.items():
        reference = compare.Reference(FOLDER / "model", answer, shots, template, context, seq, 0)
        texts = [reference.text(FOLDER / file) for file in ("text.bin", "sft.bin", "dpo.bin")]
        out[name] = {"answer": answer, "shots": shots, "template": template, "context": context, "seq": seq, "texts": texts,
                     "questions": reference.choice(FOLDER / "ceval") + reference.choice(FOLDER / "cmmlu")}
    return out


def close(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b))
    return abs(a - b) <= 1e-5 * max(1, abs(a)) if isinstance(a, float) else a == b


def main():
    parser = argparse.ArgumentParser(description="numbers for test_evaluate.c")
    parser.add_argument("--check", action="store_true")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    path = FOLDER / "expected.json"
    if parser.parse_args().check:
        old, new = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(numbers()))
        old.pop("made_by"), new.pop("made_by")
        assert close(old, new), "expected.json differs from what transformers computes"
        print("expected.json is what this transformers computes")
        return
    make_model()
    path.write_text(json.dumps(numbers(), ensure_ascii=False, indent=0), encoding="utf-8")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()

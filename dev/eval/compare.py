#!/usr/bin/env python3
"""Does with transformers what ./evaluate does, and compares: the tokens of each prompt, the log-probabilities of the four letters (or, with
--answer text, of the four statements), the choices, the losses of token files, and in how many preference pairs the better is likelier.

    make evaluate
    python dev/eval/compare.py --model out data/tiny_baike/val.bin data/tiny_baike/mc --shots 2 --limit 5

needs: pip install torch transformers numpy. Exits with 1 if anything differs by more than --tolerance.
"""
import argparse
import csv
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent


def subjects():
    """{"C-Eval": {name: Chinese name}, "CMMLU": ...} from subjects.h."""
    found, table = {"CEVAL": {}, "CMMLU": {}}, None
    for line in (HERE / "subjects.h").read_text(encoding="utf-8").splitlines():
        if line.startswith("static const Subject "):
            table = found[line.split()[3].split("_")[0]]
        elif line.startswith('    {"'):
            name, chinese = line.split('"')[1], line.split('"')[3]
            table[name] = chinese
    return {"C-Eval": found["CEVAL"], "CMMLU": found["CMMLU"]}


SUBJECTS = subjects()


def read_questions(path):
    with open(path, encoding="utf-8-sig", newline="") as f:
        rows = [row for row in csv.reader(f) if row and row != [""]]
    columns = rows[0]
    layout = "CMMLU" if "Question" in columns else "C-Eval"
    names = ["Question", "A", "B", "C", "D", "Answer"] if layout == "CMMLU" else ["question", "A", "B", "C", "D", "answer"]
    where = [columns.index(name) for name in names]
    return layout, [[row[i] for i in where[:5]] + [row[where[5]].strip()] for row in rows[1:]]


def format_question(layout, q):
    """The prompts of the benchmarks' own code: hkust-nlp/ceval evaluators, haonan-li/CMMLU src/mp_utils.py."""
    options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", q[1:5]))
    return f"题目：{q[0]}{options}\n答案是：" if layout == "CMMLU" else f"{q[0]}{options}\n答案："


def make_prompt(layout, chinese, examples, question):
    begin = f"以下是关于{chinese}的单项选择题，请直接给出正确答案的选项。\n\n" if layout == "CMMLU" else \
        f"以下是中国关于{chinese}考试的单项选择题，请选出其中的正确答案。\n\n"
    return begin + "".join(format_question(layout, e) + e[5] + "\n\n" for e in examples) + format_question(layout, question)


class Reference:
    def __init__(self, model, answer, shots, template, context, seq, limit):
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        positions = self.model.config.max_position_embeddings
        self.answer, self.shots, self.template, self.limit = answer, shots, template, limit
        self.context, self.seq = context or min(positions, 4096), seq or min(positions, 1024)
        self.letters = [self.ids(letter)[0] for letter in "ABCD"]

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def around(self):
        """What the template puts before and after the prompt."""
        if self.template == "chatml":
            return [*self.ids("<|im_start|>"), *self.ids("user"), *self.ids("\n")], \
                [*self.ids("<|im_end|>"), *self.ids("\n"), *self.ids("<|im_start|>"), *self.ids("assistant"), *self.ids("\n")]
        return (self.ids("你是一个助手 用户:"), self.ids(" 回答: ")) if self.template == "mini_llm" else ([], [])

    def prompt_ids(self, layout, chinese, examples, question):
        before, after = self.around()
        room = self.context - len(before) - len(after)
        for skipped in range(len(examples) + 1):
            prompt = make_prompt(layout, chinese, examples[skipped:], question)
            content = self.ids(f" {prompt} " if self.template == "mini_llm" else prompt)     # spaces of "用户: {instruction} {input} 回答:"
            if len(content) <= room:
                break
        return before + content[-room:] + after

    @torch.no_grad()
    def logprobs(self, ids):
        return self.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[self.letters].tolist()

    @torch.no_grad()
    def statements(self, question):
        """(tokens of the longest, log-probability of each) of the question with each option in its blank, after the end of another text."""
        begin, blank, end = re.fullmatch("([^_]*)(_*)(.*)", question[0], re.DOTALL).groups()
        ids = [self.ids("<|im_end|>") + self.ids(begin + option + end) for option in question[1:5]]
        logprobs = [self.model(torch.tensor([i[:-1]])).logits[0].double().log_softmax(-1) for i in ids]
        return max(map(len, ids)), [p.gather(1, torch.tensor(i[1:])[:, None]).sum().item() for p, i in zip(logprobs, ids)]

    def choice(self, path):
        path = Path(path)
        if path.suffix == ".csv":
            files = [path]
        else:
            files = sorted(path.glob("*.csv")) or sorted(path.glob("val/*.csv")) or sorted(path.glob("test/*.csv"))
        results = []
        for file in files:
            name = file.stem
            for ending in ("_val", "_test", "_dev"):
                name = name.removesuffix(ending)
            layout, questions = read_questions(file)
            examples = []
            if self.shots:
                examples = read_questions(file.parent.parent / "dev" / (f"{name}.csv" if layout == "CMMLU" else f"{name}_dev.csv"))[1]
            for i, question in enumerate(questions[:self.limit or None]):
                if self.answer == "text":
                    tokens, logprobs = self.statements(question)
                else:
                    ids = self.prompt_ids(layout, SUBJECTS[layout].get(name, name), examples[:self.shots], question)
                    tokens, logprobs = len(ids), self.logprobs(ids)
                results.append({"subject": name, "question": i, "answer": question[5], "chosen": "ABCD"[int(np.argmax(logprobs))],
                                "tokens": tokens, "logprobs": logprobs})
        return results

    @torch.no_grad()
    def text(self, path):
        """(tokens that count, mean loss) of a token file; of one for dpo (pairs, those whose chosen answer is likelier), else None."""
        data = Path(path).read_bytes()
        task = struct.unpack_from("<I", data, 12)[0]
        tokens = np.frombuffer(data, "<u4", offset=256)
        starts = [0] if task == 0 else np.flatnonzero(tokens & 0x40000000).tolist()
        rows = [(d, tokens[a + i:min(b, a + i + self.seq + 1)]) for d, (a, b) in enumerate(zip(starts, [*starts[1:], len(tokens)]))
                for i in range(0, b - a - 1, self.seq)]
        total, counted, documents = 0, 0, [0] * len(starts)
        for d, row in rows[:self.limit or None]:
            ids = torch.from_numpy((row & 0xFFFFFF).astype(np.int64))
            weights = torch.from_numpy((row[1:] >> 31 == 0).astype(np.float64))
            losses = torch.nn.functional.cross_entropy(self.model(ids[None, :-1]).logits[0], ids[1:], reduction="none").double()
            total, counted = total + (losses * weights).sum().item(), counted + weights.sum().item()
            documents[d] += (losses * weights).sum().item()
        pairs = list(zip(documents[::2], documents[1::2]))
        return counted, total / counted, (len(pairs), sum(a < b for a, b in pairs)) if task == 2 and not self.limit else None


def is_token_file(path):
    return Path(path).is_file() and open(path, "rb").read(7) == b"QWENTOK"


def main():
    parser = argparse.ArgumentParser(description="./evaluate against transformers")
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--model", default="out")
    parser.add_argument("--evaluate", default="./evaluate", help="the program to check")
    parser.add_argument("--answer", default="letter", choices=["letter", "text"])
    parser.add_argument("--template", default="none")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="allowed error of a log-probability (relative) or a loss")
    for name in ("shots", "context", "seq", "limit"):
        parser.add_argument(f"--{name}", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    model = a.model if (Path(a.model) / "config.json").exists() else str(sorted(Path(a.model).glob("step_*"))[-1])
    reference = Reference(model, a.answer, a.shots, a.template, a.context, a.seq, a.limit)
    with tempfile.TemporaryDirectory() as folder:
        command = [a.evaluate, "--model", model, "--answer", a.answer, "--shots", a.shots, "--template", a.template, "--context", a.context,
                   "--seq", a.seq, "--limit", a.limit, "--json", f"{folder}/json", "--details", f"{folder}/details", *a.paths]
        subprocess.run([str(x) for x in command], check=True, stdout=subprocess.DEVNULL)
        results, details = json.load(open(f"{folder}/json")), [json.loads(line) for line in open(f"{folder}/details")]
    failed = 0
    for ours, path in zip(results["perplexity"], [p for p in a.paths if is_token_file(p)]):
        tokens, loss, pairs = reference.text(path)
        ok = tokens == ours["tokens"] and abs(loss - ours["loss"]) <= a.tolerance
        ok = ok and (pairs is None or pairs == (ours["pairs"], ours["pairs_in_order"]))
        failed += not ok
        print("ok  " if ok else "FAIL", f"{path}: {ours['tokens']} tokens, loss {ours['loss']:.6f}; transformers: {tokens:.0f}, {loss:.6f}",
              f"; {pairs[1]} of {pairs[0]} pairs in order" if pairs else "")
    for ours, path in zip(results["choice"], [p for p in a.paths if not is_token_file(p)]):
        theirs = reference.choice(path)
        mine, details = details[:len(theirs)], details[len(theirs):]
        same = all(m[k] == t[k] for m, t in zip(mine, theirs) for k in ("subject", "question", "answer", "tokens"))
        worst = max(abs(x - y) / max(1, abs(y)) for m, t in zip(mine, theirs) for x, y in zip(m["logprobs"], t["logprobs"]))
        correct = sum(t["chosen"] == t["answer"] for t in theirs)
        ok = same and worst <= a.tolerance and len(mine) == len(theirs) == ours["questions"]
        agree = sum(m["chosen"] == t["chosen"] for m, t in zip(mine, theirs))
        failed += not ok
        print("ok  " if ok else "FAIL", f"{path}: {len(theirs)} questions, {ours['fewer_shots']} with fewer examples, {ours['cut']} cut; "
              f"relative error of log-probabilities at most {worst:.1e}; {agree} same choices; transformers has {correct} right, ./evaluate "
              f"{sum(s['correct'] for s in ours['subjects'])}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Compares `prepare tokenize` with the engines that Qwen's models are served with: tiktoken and Hugging Face's tokenizers.

  pip install tiktoken 'tokenizers>=0.21.2'
  python3 dev/test/compare_tokenizers.py --mb 10                      random text in many scripts, with code, emoji, white space, marks
  python3 dev/test/compare_tokenizers.py --special qwen3 --mb 10      special tokens are recognised
  python3 dev/test/compare_tokenizers.py --mb 0 corpus.txt main.c     files, in pieces of up to 20,000 characters

Both engines are built here from the .bin file alone, so trimmed vocabularies can be compared too. Exit code 0: every id is equal.
"""
import argparse
import json
import random
import re
import struct
import subprocess
import sys
import time

import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FIRST3 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LATER = """<|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|>
    <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
    <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>""".split()
SPECIALS = {
    "none": [],
    "qwen2": FIRST3,
    "qwen2.5": FIRST3 + LATER[:19],
    "qwen3": FIRST3 + LATER,
    "v1": FIRST3 + [f"<|extra_{i}|>" for i in range(205)],
}


def read_bin(path):
    """The ordinary tokens of our compact format, by rank."""
    data = open(path, "rb").read()
    magic, version, num_ranks = struct.unpack_from("<8sII", data)
    assert magic == b"QWENBPE\0" and version == 1, f"{path} is not our .bin format"
    tokens, at = [], 40
    for _ in range(num_ranks):
        tokens.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    return tokens


def derive_merges(tokens):
    """For each token of several bytes: the two parts left after merging its bytes with the tokens before it."""
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for limit, token in enumerate(tokens):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], limit))
            assert rank.get(parts[best] + parts[best + 1], limit) < limit
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def build_hf(tokens, specials):
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
    others = [b for b in range(256) if b not in printable]
    alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    write = lambda token: "".join(alphabet[b] for b in token)
    vocab = {write(token): i for i, token in enumerate(tokens)}
    hf = Tokenizer(models.BPE(vocab=vocab, merges=[(write(a), write(b)) for a, b in derive_merges(tokens)]))
    hf.normalizer = normalizers.NFC()
    hf.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
                                                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hf.decoder = decoders.ByteLevel()
    hf.add_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    return hf


def tiktoken_ids(encoding, text, set_name):
    """v1 composes the whole text and then looks for special tokens; later models do it the other way round."""
    nfc = normalizers.NFC().normalize_str
    if set_name == "v1":
        return encoding.encode(nfc(text), allowed_special="all")
    specials = SPECIALS[set_name]
    ids = []
    for part in re.split("(" + "|".join(map(re.escape, specials)) + ")", text) if specials else [text]:
        ids += [encoding.encode_single_token(part)] if part in specials else encoding.encode_ordinary(nfc(part))
    return ids


ENGLISH = "the of and to in a is that it's we're I'm you'll THEY'VE don'T he'd Qwen trains tokens, (quick) \"quoted\" naïve café".split(" ")
CODE = ["for (int i = 0; i < n; i++) {\n", "    return x->y[3] * 2.5e-3f;\n", "#include <stdio.h>\r\n", "def f(self, *args, **kw):\n\t",
        "};\n\n", "// ----------------\n", "<div class=\"a\">", "x_1 := map[string]int{}\n", "\\frac{a}{b}", "0x1F, 1_000;", "/* */",
        "https://example.com/a?b=c&d"]
EMOJI = ["😀", "👍🏽", "👨‍👩‍👧", "🇨🇳", "❤️", "🏴‍☠️", "✅", "1️⃣"]
SPACES = [" ", "  ", "    ", "\n", "\r\n", "\n\n\n", "\t", " \n", "\x0b", "\x1c", "\u0085", "\u00a0", "\u1680", "\u2028", "\u202f",
          "\u3000", "\u200b", "\ufeff"]
PUNCTUATION = list("，。！？；：、（）《》“”‘’…—·") + list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["'s", "'T", "'rE", "'ſ", "->", "...", "。\n"]
MARKS = [chr(c) for c in list(range(0x300, 0x370)) + [0x3099, 0x309A, 0x338, 0x93C, 0x5B4, 0x64B, 0xF71, 0xF72, 0x1D165, 0x20D0, 0x5B0]]


def random_char(rng, low, high):
    while True:
        c = rng.randrange(low, high)
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def random_part(rng, corpus):
    """A few characters of one kind."""
    kind = rng.randrange(16)
    n = 1 + min(int(rng.expovariate(0.2)), 60)
    if kind <= 1 and corpus:
        at = rng.randrange(len(corpus))
        return corpus[at:at + 4 * n]
    if kind <= 3:
        return "".join(random_char(rng, 0x4E00, 0x9FA6) for _ in range(n))
    if kind == 4:
        return " ".join(rng.choice(ENGLISH) for _ in range(n))
    if kind == 5:
        return rng.choice(CODE)
    if kind == 6:
        return rng.choice(EMOJI)
    if kind == 7:
        return "".join(rng.choice(SPACES) for _ in range(1 + n // 4))
    if kind == 8:
        return "".join(rng.choice(PUNCTUATION) for _ in range(1 + n // 4))
    if kind == 9:  # one block
        low = rng.randrange(0, 0x323B0, 128) if rng.random() < 0.8 else rng.randrange(0, 0x110000 - 128, 128)
        return "" if 0xD780 <= low < 0xE000 else "".join(random_char(rng, low, low + 128) for _ in range(n))
    if kind == 10:
        return "".join(random_char(rng, 0, 0x110000) for _ in range(n))
    if kind == 11:
        return random_char(rng, 0x41, 0x250) + "".join(rng.choice(MARKS) for _ in range(rng.randrange(1, 5)))
    if kind == 12:
        return "".join(chr(rng.choice([rng.randrange(0x1100, 0x1200), rng.randrange(0xAC00, 0xD7A4)])) for _ in range(n))
    if kind == 13:
        return bytes(rng.randrange(256) for _ in range(n)).decode("utf-8", "replace")
    if kind == 14:
        special = rng.choice(SPECIALS["qwen3"] + SPECIALS["v1"][3:6])
        return special[rng.randrange(2) * rng.randrange(3):] if rng.random() < 0.2 else special
    return str(rng.randrange(10 ** rng.randrange(1, 12))) + rng.choice(["", "１２", "½", "%", "年"])


def random_texts(rng, corpus, num_bytes):
    texts, size = [], 0
    while size < num_bytes:
        text = "".join(random_part(rng, corpus) for _ in range(rng.randrange(1, 60)))
        texts.append(text)
        size += len(text.encode())
    return texts


def run_program(options, texts, rng):
    lines = "".join(json.dumps(text, ensure_ascii=rng.random() < 0.3) + "\n" for text in texts)
    command = [options.program, "tokenize", "--jsonl", "--tokenizer", options.tokenizer, "--special", options.special]
    done = subprocess.run(command, input=lines.encode(), capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.decode()}")
    rows = done.stdout.decode().split("\n")[:-1]
    if len(rows) != len(texts):
        sys.exit(f"{' '.join(command)}: {len(texts)} lines in, {len(rows)} out")
    return [[int(x) for x in row.split()] for row in rows]


def report(name, text, ours, theirs):
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    print(f"DIFFERS from {name} at token {at}: ours {ours[at:at + 8]}, {name} {theirs[at:at + 8]}\n  text {json.dumps(text)[:600]}")


def compare(options, engines, texts, rng):
    """Number of differing texts."""
    ours = run_program(options, texts, rng)
    bad = 0
    for name, encode in engines.items():
        for text, a, b in zip(texts, ours, encode(texts)):
            if a != b:
                bad += 1
                if options.shown < 10:
                    report(name, text, a, b)
                options.shown += 1
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="texts to compare, also mixed into the random ones")
    parser.add_argument("--program", default="./prepare", help="the program whose tokenize command is tested (default %(default)s)")
    parser.add_argument("--tokenizer", default="dev/data/qwen.bin", help="a .bin file (default %(default)s)")
    parser.add_argument("--special", default="none", choices=SPECIALS, help="special tokens to recognise (default %(default)s)")
    parser.add_argument("--mb", type=float, default=5, help="megabytes of random text (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.shown = 0
    rng = random.Random(options.seed)
    tokens = read_bin(options.tokenizer)
    specials = {s: len(tokens) + i for i, s in enumerate(SPECIALS[options.special])}
    encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens=specials)
    engines = {"tiktoken": lambda texts: [tiktoken_ids(encoding, text, options.special) for text in texts]}
    if options.special != "v1":
        hf = build_hf(tokens, specials)
        engines["tokenizers"] = lambda texts: [e.ids for e in hf.encode_batch(texts, add_special_tokens=False)]
    print(f"tiktoken {tiktoken.__version__}, tokenizers {tokenizers.__version__}, {len(tokens)} ranks, special tokens: {options.special}")

    start, bad, num_texts, num_bytes, corpus = time.time(), 0, 0, 0, ""
    batches = []
    for path in options.files:
        text = open(path, "rb").read().decode("utf-8", "replace")
        corpus += text[:2000000]
        pieces, at = [], 0
        while at < len(text):
            n = rng.randrange(1, 20000)
            pieces.append(text[at:at + n])
            at += n
        batches += [pieces[i:i + 200] for i in range(0, len(pieces), 200)]
    for batch in batches + [None] * int(options.mb + 0.999):
        texts = batch or random_texts(rng, corpus, 1e6 * min(1, options.mb))
        bad += compare(options, engines, texts, rng)
        num_texts += len(texts)
        num_bytes += sum(len(text.encode()) for text in texts)
    print(f"{num_texts} texts, {num_bytes / 1e6:.1f} MB, {bad} differ, {time.time() - start:.0f} s")
    sys.exit(bad != 0)


if __name__ == "__main__":
    main()

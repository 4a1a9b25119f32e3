#!/usr/bin/env python3
"""Makes tokenizer_pieces.tsv and tokenizer_nfc.tsv with Hugging Face's tokenizers, and checks every id in tokenizer_vectors.tsv and
tokenizer_long.tsv against tiktoken (short texts) and tokenizers (long ones). The column "why" of those says what each is there for.

  pip install tiktoken 'tokenizers>=0.21.2'
  python3 dev/test/make_tokenizer_vectors.py
"""
import hashlib
import json
import os
import random
import struct
import sys

import tiktoken
from tokenizers import Regex, normalizers, pre_tokenizers

import compare_tokenizers as compare

HERE = os.path.dirname(os.path.abspath(__file__))
NFC = normalizers.NFC().normalize_str


def read_tsv(name):
    lines = open(os.path.join(HERE, name), encoding="utf-8").read().split("\n")[:-1]
    names = lines[0].split("\t")
    return [dict(zip(names, line.split("\t"))) for line in lines[1:]]


def write_tsv(name, header, rows):
    with open(os.path.join(HERE, name), "w") as f:
        f.write("\t".join(header) + "\n")
        for row in rows:
            f.write("\t".join(json.dumps(x) for x in row) + "\n")
    print(f"{name}: {len(rows)} rows")


def short_texts(rng, count):
    """Short texts, dense in borders between kinds of characters."""
    kinds = [
        lambda: rng.choice(["a", "Zq", "中", "语言", "é", "ß", "ǅ", "ª", "ʰ", "𠀀"]),
        lambda: rng.choice(compare.SPACES),
        lambda: rng.choice(compare.SPACES) * rng.randrange(2, 5),
        lambda: rng.choice(["0", "42", "１０", "½", "Ⅷ", "①", "௧"]),
        lambda: rng.choice(compare.PUNCTUATION),
        lambda: rng.choice(compare.EMOJI),
        lambda: rng.choice(compare.MARKS),
        lambda: rng.choice(["'s", "'S", "'re", "'RE", "'vE", "'ll", "'m", "'d", "'t", "'ſ", "'", "''", "’s", "'l", "'r"]),
        lambda: compare.random_char(rng, 0, 0x32400),
    ]
    return ["".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 9))) for _ in range(count)]


def mark_texts(rng, count):
    """Texts that NFC reorders, composes, takes apart, or must leave alone."""
    bases = "aeiouAEIOUncs<>=かはカ한각ᄀᄒ\u1161\u1175\u11a8\u11c2\u212b\u2126\u0344\u0958\ufb1d\uf900\u1e9b\u0374\u0340\ufb2c\u09cb\u0b94"
    texts = ["", "é", "e\u0301", "q\u0307\u0323", "\u1e0b\u0323", "a\u0315\u0300\u05ae\u0062", "\u0301", "\u0301e", "\ufb01", "①",
             "\u1100\u1161\u11a8", "\uac00\u11a8", "\uac00\u11a7", "\uac01\u11a8", "\u1100\u1161\u0301\u11a8", "\u0b47\u0300\u0b3e",
             "\U0002f800", "\U0001d15e", "\U00011099\U000110ba"]
    for _ in range(count):
        clusters = [rng.choice(bases) + "".join(rng.choices(compare.MARKS, k=rng.randrange(6))) for _ in range(rng.randrange(1, 4))]
        texts.append("".join(clusters))
    return texts


def split(text):
    splitter = pre_tokenizers.Split(Regex(compare.PATTERN), behavior="isolated")
    return [piece for piece, _ in splitter.pre_tokenize_str(text)]


def check_ids(tokens):
    """Rows whose ids differ from what the engines say."""
    engines = {}
    for mode, name in (("plain", "none"), ("bytes", "none"), ("v1", "v1"), ("v2", "qwen3")):
        specials = {s: len(tokens) + i for i, s in enumerate(compare.SPECIALS[name])}
        ranks = {t: i for i, t in enumerate(tokens)}
        engines[mode] = name, tiktoken.Encoding(mode, pat_str=compare.PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    bad = 0
    for row in read_tsv("tokenizer_vectors.tsv"):
        text = json.loads(row["input_json"])
        if row["mode"] == "bytes":  # \udcXX stands for the byte XX
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        name, encoding = engines[row["mode"]]
        ids = compare.tiktoken_ids(encoding, text, name)
        if " ".join(map(str, ids)) != row["ids"]:
            bad += 1
            print(f"{row['id']}: tiktoken says {ids}, the file {row['ids']}")
    hf = compare.build_hf(tokens, [])  # tiktoken's regular expressions overflow the stack on some of these
    for row in read_tsv("tokenizer_long.tsv"):
        text = json.loads(row["unit_json"]) * int(row["count"]) + json.loads(row["suffix_json"])
        ids = hf.encode(text).ids
        digest = hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()
        if (str(len(ids)), digest) != (row["n_ids"], row["sha256_of_ids_u32le"]):
            bad += 1
            print(row["id"], "should have", len(ids), digest, *ids[:8], "..", *ids[-4:])
    print(f"ids: {bad} rows differ")
    return bad


def main():
    rng = random.Random(2024)
    texts = [json.loads(row["input_json"]) for row in read_tsv("tokenizer_vectors.tsv") if row["mode"] == "plain"]
    texts = [NFC(text) for text in texts + short_texts(rng, 400)]
    write_tsv("tokenizer_pieces.tsv", ["text_json", "pieces_json"], [(text, split(text)) for text in texts])
    write_tsv("tokenizer_nfc.tsv", ["text_json", "nfc_json"], [(text, NFC(text)) for text in mark_texts(rng, 400)])
    sys.exit(check_ids(compare.read_bin(os.path.join(HERE, "../data/qwen.bin"))) != 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes dev/data/qwen.bin (the vocabulary) and dev/data/unicode.h (character classes and NFC) for tokenizer.h.

Both are committed, so nobody needs this script to build or to run anything. It exists to show where every byte comes from:

  vocabulary   resources/qwen.tiktoken of the PyPI package dashscope (Alibaba's SDK, Apache-2.0), checked by SHA-256.
               It is the rank file of Qwen v1, and the vocab.json and merges.txt of Qwen1.5, 2, 2.5 and 3 follow from it.
  Unicode      measured from Hugging Face's tokenizers library, which Qwen's models are trained and served with: which code points
               its regular expressions call \\p{L}, \\p{N} and \\s (Unicode 16.0), and what its NFC does (data older than Unicode 10).
               The canonical mappings themselves come from Python's unicodedata; Unicode never changes them once they are published.

  pip download --no-deps dashscope && unzip dashscope-*.whl 'dashscope/resources/*'
  pip install 'tokenizers>=0.21.2'
  python3 dev/data/make_tokenizer.py --tiktoken dashscope/resources/qwen.tiktoken

--check compares with the committed files instead of writing them.
"""
import argparse
import base64
import hashlib
import os
import struct
import sys
import unicodedata

TIKTOKEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
QWEN25_SPECIALS = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
    <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|>
    <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>""".split()
HERE = os.path.dirname(os.path.abspath(__file__))
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def make_vocabulary(path):
    """The format is described above tokenizer_save_bin in tokenizer.h."""
    data = open(path, "rb").read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != TIKTOKEN_SHA256:
        sys.exit(f"{path}: sha256 is {digest}, expected {TIKTOKEN_SHA256}")
    payload = bytearray()
    for rank, line in enumerate(data.splitlines()):
        text, number = line.split()
        assert int(number) == rank
        token = base64.b64decode(text)
        payload += bytes([len(token)]) + token
    num_ranks = rank + 1
    for i, special in enumerate(QWEN25_SPECIALS):
        is_control = special.startswith("<|") and i < 14
        payload += struct.pack("<IBB", num_ranks + i, is_control, len(special)) + special.encode()
    header = b"QWENBPE\0" + struct.pack("<IIIIQ", 1, num_ranks, len(QWEN25_SPECIALS), 0, len(payload))
    return header + struct.pack("<Q", fnv1a(header + payload)) + payload


def measure_classes():
    """0 other, 1 letter, 2 number, 3 white space, as the regular expressions of `tokenizers` see each code point."""
    from tokenizers import Regex, pre_tokenizers
    text = "".join(map(chr, CODE_POINTS))
    classes = [0] * 0x110000
    for value, pattern in ((1, r"\p{L}"), (2, r"\p{N}"), (3, r"\s")):
        split = pre_tokenizers.Split(Regex(pattern + "+"), behavior="removed", invert=True)
        for run, _ in split.pre_tokenize_str(text):
            for character in run:
                assert classes[ord(character)] == 0
                classes[ord(character)] = value
    return classes


def measure_nfc():
    """(parts, composable, combining): the canonical data `tokenizers` works with. Hangul syllables are arithmetic."""
    from tokenizers import normalizers
    nfc, nfd = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
    parts, composable, combining = {}, set(), {}
    for c in CODE_POINTS:
        mapping = unicodedata.decomposition(chr(c))
        if mapping and mapping[0] != "<" and not 0xAC00 <= c < 0xD7A4 and nfd(chr(c)) != chr(c):
            parts[c] = ([int(x, 16) for x in mapping.split()] + [0])[:2]
            if nfc(chr(c)) == chr(c):
                composable.add(c)
        # Does the library move this mark before U+0345, which has the highest class (240), or U+0334 of the lowest (1) before it?
        value = unicodedata.combining(chr(c))
        if value and (nfd("\u0345" + chr(c)) != "\u0345" + chr(c) or nfd(chr(c) + "\u0334") != chr(c) + "\u0334"):
            combining[c] = value
    return parts, composable, combining


def rows(items, width=140):
    """Comma-separated items, wrapped."""
    lines, line = [], ""
    for item in items:
        if len(line) + len(item) + 1 > width:
            lines.append(line)
            line = ""
        line += item + ","
    return "\n".join(lines + [line])


def make_unicode_header():
    from tokenizers import __version__ as version
    classes = measure_classes()
    parts, composable, combining = measure_nfc()

    # NFC can be skipped for text without these: marks, what never stays, what may join the character before it.
    joining = {parts[c][1] for c in composable} | set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))
    unsettled = set(combining) | (set(parts) - composable) | joining
    assert all(parts[c][0] not in unsettled for c in composable)
    nibbles = [classes[c] | 4 * (c in unsettled) for c in range(0x110000)]
    limit = (max(c for c in range(0x110000) if nibbles[c]) | 127) + 1
    blocks, pages = {}, []
    for start in range(0, limit, 128):
        block = tuple(nibbles[start:start + 128])
        pages.append(str(blocks.setdefault(block, len(blocks))))
    words = []
    for block in blocks:
        for i in range(0, 128, 16):
            words.append("0x%x" % sum(block[i + j] << 4 * j for j in range(16)))
    first = [set() for _ in range(256)]
    for c in CODE_POINTS:
        first[chr(c).encode()[0]].add(nibbles[c])
    first = [str(bits.pop() if len(bits) == 1 else 16) for bits in first]

    runs = []  # [first, last, combining class]
    for c in sorted(combining):
        if runs and runs[-1][1] == c - 1 and runs[-1][2] == combining[c]:
            runs[-1][1] = c
        else:
            runs.append([c, c, combining[c]])
    ordered = sorted(parts)
    compose = sorted((i for i, c in enumerate(ordered) if c in composable), key=lambda i: parts[ordered[i]])
    return f"""// Made by dev/data/make_tokenizer.py; do not edit. Measured from Hugging Face's tokenizers {version}: classes are those of
// Unicode 16.0, NFC has that library's canonical data, older than Unicode 10. Unicode data (c) Unicode, Inc., Unicode License v3.
#ifndef UNICODE_H
#define UNICODE_H
#include <stdint.h>

// Code point c has 4 bits in block page[c >> 7], a block being 128 x 4 bits in 8 words: its class (0 other, 1 letter, 2 number,
// 3 white space), and 4 if NFC must look at it.
#define UNICODE_LIMIT {hex(limit)}    // from here on everything is "other" and settled
static const unsigned char unicode_page[{len(pages)}] = {{
{rows(pages)}
}};
static const uint64_t unicode_block[{len(blocks)} * 8] = {{
{rows(words)}
}};

// The same 4 bits by the first byte of UTF-8, if all characters that begin so have the same; else UNICODE_MIXED.
#define UNICODE_MIXED 16
static const unsigned char unicode_first[256] = {{
{rows(first)}
}};

// Canonical combining classes that are not 0: first, last, class.
#define NUM_COMBINING {len(runs)}
static const uint32_t unicode_combining[NUM_COMBINING][3] = {{
{rows("{%d,%d,%d}" % tuple(r) for r in runs)}
}};

// Canonical decompositions by c: {{c, a, b}}, b is 0 when there is one part.
#define NUM_PARTS {len(parts)}
static const uint32_t unicode_parts[NUM_PARTS][3] = {{
{rows("{%d,%d,%d}" % (c, *parts[c]) for c in ordered)}
}};

// Those that compose again, as row numbers of unicode_parts sorted by (a, b).
#define NUM_COMPOSE {len(compose)}
static const uint16_t unicode_compose[NUM_COMPOSE] = {{
{rows(map(str, compose))}
}};
#endif
"""


def main():
    parser = argparse.ArgumentParser(description="Make dev/data/qwen.bin and dev/data/unicode.h")
    parser.add_argument("--tiktoken", help="dashscope's resources/qwen.tiktoken (without it only unicode.h is made)")
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    options = parser.parse_args()
    files = {"unicode.h": make_unicode_header().encode()}
    if options.tiktoken:
        files["qwen.bin"] = make_vocabulary(options.tiktoken)
    differ = False
    for name, data in files.items():
        path = os.path.join(HERE, name)
        if options.check:
            same = os.path.exists(path) and open(path, "rb").read() == data
            differ |= not same
            print(f"{path}: {'same' if same else 'DIFFERS'}")
        else:
            with open(path + ".tmp", "wb") as f:
                f.write(data)
            os.replace(path + ".tmp", path)
            print(f"{path}: {len(data)} bytes")
    sys.exit(differ)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes dev/data/nfkc.h: what `prepare --nfkc` replaces. Run where unicodedata2 16.0.0 is installed (pip install unicodedata2==16.0.0):

    python3 dev/data/make_nfkc.py > dev/data/nfkc.h

and, to see that the rule holds (NFC after the replacements is NFKC), on random text of every character:

    python3 dev/data/make_nfkc.py --check
"""
import random
import sys

import unicodedata2 as unicode

assert unicode.unidata_version == "16.0.0"
ALL = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
REPLACED = {c: unicode.normalize("NFKC", c) for c in ALL if unicode.normalize("NFKC", c) != unicode.normalize("NFC", c)}


def literal(text):
    """A C string; bytes beyond ASCII in octal, which unlike \\x ends after three digits."""
    return '"' + "".join(chr(b) if 32 <= b < 127 and b not in b'"\\?' else f"\\{b:03o}" for b in text.encode()) + '"'


def write():
    print(f"""// Made by dev/data/make_nfkc.py from Unicode {unicode.unidata_version}; do not edit. {len(REPLACED)} compatibility characters, such as full-width letters,
// ligatures and circled numbers, and what NFKC writes for each. NFC of a text in which they are replaced is its NFKC.
#define NUM_COMPATIBILITY {len(REPLACED)}
static const struct {{ uint32_t code; const char *text; }} unicode_compatibility[NUM_COMPATIBILITY] = {{""")
    line = "   "
    for c, text in REPLACED.items():
        entry = f" {{0x{ord(c):X},{literal(text)}}},"
        if len(line) + len(entry) > 140:
            print(line)
            line = "   "
        line += entry
    print(line + "\n};")


def check():
    r = random.Random(1)
    for _ in range(200000):
        text = "".join(r.choices(ALL, k=3) + r.choices(list(REPLACED), k=3) + r.choices("e\u0301\u0323 각a", k=3))
        text = "".join(r.sample(text, len(text)))
        assert unicode.normalize("NFC", "".join(REPLACED.get(c, c) for c in text)) == unicode.normalize("NFKC", text), text
    print("200000 texts: NFC after the replacements is NFKC")


check() if "--check" in sys.argv else write()

#!/usr/bin/env python3
"""Measures tokenizer.h beside tiktoken, Hugging Face's tokenizers and bpe-qwen: same texts, same run, in turn, ids compared.

  pip install tiktoken tokenizers bpe-qwen
  python3 dev/data/bench_tokenizer.py --make-texts DIR     natural texts of 4 MB, from Debian packages (needs apt-get and dpkg)
  cc -std=c11 -O3 -march=native -fopenmp -o build/bench_tokenizer dev/data/bench_tokenizer.c -lm
  python3 dev/data/bench_tokenizer.py DIR/*.txt data/tiny_baike/web.jsonl

A text is cut at line ends into documents, and these into --parts. Every engine is a process that encodes one part after the other, each
once, as when a large file is prepared: what it remembers is from the parts before. Only encoding is timed; the table has the median of the
parts. A star marks a peer that gives other ids. Peers are called in the way that was fastest for them: tiktoken and bpe-qwen document by
document on one thread.
"""
import argparse
import array
import glob
import gzip
import html
import json
import os
import random
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../test"))
VOCABULARY = os.path.join(HERE, "qwen.bin")
OURS = "tokenizer.h"
PEERS = ["tiktoken", "tokenizers", "bpe-qwen"]
PACKAGES = "manpages-zh debian-handbook libreoffice-help-zh-cn gimp-help-zh-cn gimp-help-en fortunes-zh"
TEXT_BYTES = 4000000


def read_documents(path):
    data, at, documents = open(path, "rb").read(), 0, []
    while at < len(data):
        size, = struct.unpack_from("<I", data, at)
        documents.append(data[at + 4:at + 4 + size].decode())
        at += 4 + size
    return documents


def write_documents(path, documents):
    """Returns the bytes of all documents."""
    with open(path, "wb") as f:
        for document in documents:
            f.write(struct.pack("<I", len(document)) + document)
    return sum(map(len, documents))


def cut_documents(data, size):
    documents, document = [], b""
    for line in data.splitlines(keepends=True):
        document += line
        if len(document) >= size:
            documents.append(document)
            document = b""
    return documents + [document]


def write_models(directory):
    """The committed vocabulary in the formats of the peers."""
    import compare_tokenizers as compare
    hf = compare.build_hf(compare.read_bin(VOCABULARY), [])
    hf.save(directory + "/tokenizer.json")
    model = json.loads(hf.to_str())["model"]
    json.dump(model["vocab"], open(directory + "/vocab.json", "w"))
    with open(directory + "/merges.txt", "w") as f:
        f.writelines((pair if isinstance(pair, str) else " ".join(pair)) + "\n" for pair in model["merges"])


def make_encoder(engine, directory, threads):
    """A function from a list of texts to a list of lists of ids."""
    if engine == "tiktoken":
        import compare_tokenizers as compare
        import tiktoken
        ranks = {token: rank for rank, token in enumerate(compare.read_bin(VOCABULARY))}
        encoding = tiktoken.Encoding("qwen", pat_str=compare.PATTERN, mergeable_ranks=ranks, special_tokens={})
        if threads == 1:
            return lambda texts: [encoding.encode_ordinary(text) for text in texts]
        return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads)
    if engine == "tokenizers":
        from tokenizers import Tokenizer
        hf = Tokenizer.from_file(directory + "/tokenizer.json")
        return lambda texts: [e.ids for e in hf.encode_batch_fast(texts, add_special_tokens=False)]
    from bpe_qwen import QwenTokenizer
    tokenizer = QwenTokenizer(directory)
    if threads == 1:
        return lambda texts: [tokenizer.encode(text) for text in texts]
    return lambda texts: tokenizer.encode_batch_parallel(texts, num_workers=threads)


def serve(engine, directory, threads):
    """The other side of Engine; bench_tokenizer.c does the same."""
    encode = make_encoder(engine, directory, threads)
    print("ready", flush=True)
    for request in sys.stdin:
        documents, path = request.split()
        texts = read_documents(documents)
        start = time.perf_counter()
        ids = encode(texts)
        seconds = time.perf_counter() - start
        with open(path, "wb") as f:
            for row in ids:
                f.write(struct.pack("<I", len(row)) + array.array("I", row).tobytes())
        print(f"{seconds:.6f}", flush=True)


class Engine:
    def __init__(self, name, directory, threads, program):
        self.name = name
        command = [program, VOCABULARY, str(threads)]
        if name != OURS:
            command = [sys.executable, os.path.abspath(__file__), "--serve", name, directory, str(threads)]
        environment = dict(os.environ, RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="true", OMP_WAIT_POLICY="passive")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.read()

    def read(self):
        line = self.process.stdout.readline().strip()
        if not line:
            sys.exit(f"{self.name} stopped: exit code {self.process.wait()}")
        return line

    def encode(self, documents, ids):
        """Seconds, and the ids of each document."""
        self.process.stdin.write(f"{documents} {ids}\n")
        self.process.stdin.flush()
        seconds = float(self.read())
        data, at, rows = array.array("I"), 0, []
        data.frombytes(open(ids, "rb").read())
        while at < len(data):
            rows.append(data[at + 1:at + 1 + data[at]])
            at += 1 + data[at]
        return seconds, rows


def measure(path, threads, engines, directory, options):
    """Prints a row of the table; returns the speed of the first engine, which is ours."""
    text = open(path, "rb").read()[:TEXT_BYTES].decode("utf-8", "ignore")
    data = unicodedata.normalize("NFC", text).encode()  # tiktoken leaves this to others
    documents = cut_documents(data, options.document_bytes)
    speeds, differ = [[] for _ in engines], [0] * len(engines)
    for part in range(options.parts):
        size = write_documents(directory + "/documents", documents[part::options.parts])
        for i, engine in enumerate(engines):
            seconds, rows = engine.encode(directory + "/documents", directory + "/ids")
            speeds[i].append(size / 1e6 / seconds)
            ours = rows if i == 0 else ours
            differ[i] += sum(a != b for a, b in zip(ours, rows)) + abs(len(ours) - len(rows))
    speed = [statistics.median(s) for s in speeds]
    cells = "".join(f"{s:11.1f}{'*' if d else ' '}" for s, d in zip(speed, differ))
    ratio = f"{speed[0] / max(speed[1:]):8.1f}x" if len(speed) > 1 else ""
    print(f"{os.path.basename(path):<22}{len(data) / 1e6:5.1f}{threads:8} {cells}{ratio}", flush=True)
    for engine, d in zip(engines, differ):
        if d:
            print(f"    * {engine.name} gives other ids for {d} of {len(documents)} documents")
    return speed[0]


def strip_tags(text):
    text = re.sub(r"(?s)<(script|style|head).*?</\1>|<[^>]+>", "", text)
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(text))


def make_texts(directory):
    os.makedirs(directory, exist_ok=True)
    debian = os.path.join(directory, "debian")
    os.makedirs(debian, exist_ok=True)
    subprocess.run(["apt-get", "download"] + PACKAGES.split(), cwd=debian, check=True)
    for package in glob.glob(debian + "/*.deb"):
        subprocess.run(["dpkg", "-x", package, debian], check=True)

    def read(pattern):
        for path in sorted(glob.glob(pattern, recursive=True)):
            data = (gzip.open if path.endswith(".gz") else open)(path, "rb").read()
            yield data.decode("utf-8", "ignore")

    def is_chinese(line):
        return sum("\u4e00" <= c <= "\u9fff" for c in line) > len(line) / 2

    def write(name, texts):
        with open(os.path.join(directory, name), "w") as f:
            for text in texts:
                f.write(text + "\n")
                if f.tell() > TEXT_BYTES:
                    break
        print(f.name, os.path.getsize(f.name), "bytes")

    share = debian + "/usr/share/"
    pages = lambda *folders: [strip_tags(text) for folder in folders for text in read(share + folder + "/**/*.html")]
    zh = pages("doc/debian-handbook/html/zh-CN", "gimp/2.0/help/zh_CN", "**/zh-CN")
    en = pages("doc/debian-handbook/html/en-US", "gimp/2.0/help/en")
    write("chinese.txt", ["\n".join(filter(is_chinese, map(str.strip, t.split("\n")))) for t in zh])
    write("chinese_fortunes.txt", [t for t in read(share + "games/fortunes/*[!8t]") if "\0" not in t])
    write("chinese_manuals.txt", read(share + "man/zh_CN/**/*.gz"))
    write("english.txt", en)
    packages = [p for p in sys.path if p.endswith("-packages")][-1]
    notes = [t for pattern in ("/**/*.md", "/*/METADATA") for t in read(packages + pattern)]
    write("markdown.txt", [t for pair in zip(notes * 4, [z[:3000] for z in zh]) for t in pair])
    code = [t for pattern in (packages + "/**/*.py", "/usr/include/**/*.h") for t in read(pattern)]
    write("code.txt", random.Random(1).sample(code, len(code)))


def main():
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="UTF-8 files; the first 4 MB of each are used")
    parser.add_argument("--make-texts", metavar="DIR", help="make natural texts there, measure nothing")
    parser.add_argument("--program", default="build/bench_tokenizer", help="bench_tokenizer.c, compiled (default %(default)s)")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="(default: all)")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--parts", type=int, default=9, help="(default %(default)s)")
    parser.add_argument("--document-bytes", type=int, default=4000, help="(default %(default)s)")
    options = parser.parse_args()
    if options.make_texts:
        return make_texts(options.make_texts)
    names = "".join(f"{name:>11} " for name in [OURS] + options.peers)
    print(f"{'MB/s, median of ' + str(options.parts):<22}{'MB':>5}{'threads':>8} {names} to the fastest peer", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        write_models(directory)
        engines = {n: [Engine(name, directory, n, options.program) for name in [OURS] + options.peers] for n in options.threads}
        for path in options.texts:
            speeds = [measure(path, n, engines[n], directory, options) for n in options.threads]
            if len(speeds) > 1:
                print(f"    {OURS}: {options.threads[-1]} threads are {speeds[-1] / speeds[0]:.2f} times as fast as {options.threads[0]}")
        for engine in sum(engines.values(), []):
            engine.process.stdin.close()
            engine.process.wait()


if __name__ == "__main__":
    main()

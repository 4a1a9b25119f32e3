#!/usr/bin/env python3
"""Greedy generation by llama.cpp and by train_qwen from the same checkpoint on the same threads: tokens per second, and their ratio.

    python3 -m venv venv && venv/bin/pip install numpy gguf xllamacpp
    venv/bin/python dev/cpu/bench_llama.py --model path/to/Qwen2.5-0.5B          # a Hugging Face directory, one file, tied embeddings

The checkpoint is written as a GGUF file with its matrices in --type, and llama.cpp, the library that PyPI's xllamacpp carries, is called
through its C interface: a short prompt, then --tokens more, each the likeliest. train_qwen (./chat --raw) continues the same text; it keeps
bf16 checkpoints in bf16. The two take turns --repeats times. How many of the first tokens are the same is printed: they part where two are
almost equally likely, since llama.cpp rounds activations to bf16 for matrices in bf16.
"""
import argparse, ctypes, json, os, re, statistics, struct, subprocess, sys, tempfile, time

import gguf
import numpy as np

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROMPT = "长江是中国最长的河流，"
NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def tensors(directory):
    """(name, shape, fp32 array) of every tensor of model.safetensors, which may be fp32 or bf16."""
    with open(directory + "/model.safetensors", "rb") as f:
        size, = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(size))
        data = np.memmap(f, np.uint8, "r", 8 + size)
    for name, t in header.items():
        if name == "__metadata__": continue
        raw = data[slice(*t["data_offsets"])]
        if t["dtype"] == "BF16": values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else: values = raw.view({"F32": np.float32}[t["dtype"]])
        yield name, t["shape"], values.reshape(t["shape"])


def gguf_name(name):
    name = name.removeprefix("model.")
    if name.startswith("embed_tokens"): return "token_embd.weight"
    if name.startswith("norm"): return "output_norm.weight"
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def write_gguf(directory, path, kind):
    with open(directory + "/config.json") as f: c = json.load(f)
    arch = c["model_type"]
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(1024), w.add_embedding_length(c["hidden_size"]), w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"]), w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"]), w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(c.get("rope_theta") or c["rope_parameters"]["rope_theta"]), w.add_vocab_size(c["vocab_size"])
    if c.get("head_dim"): w.add_key_length(c["head_dim"]), w.add_value_length(c["head_dim"])
    w.add_tokenizer_model("none")                                # ids in, ids out
    for name, shape, values in tensors(directory):
        if len(shape) == 1 or kind == "fp32": w.add_tensor(gguf_name(name), np.array(values))
        else:
            bits = values.view(np.uint32)                        # rounded to even; a bf16 checkpoint comes back as it was
            half = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
            w.add_tensor(gguf_name(name), half, raw_shape=half.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()


class Params(ctypes.Structure):                                  # parameters, which llama.cpp fills in itself; with room to spare
    _fields_ = [("bytes", ctypes.c_ubyte * 1024)]


class Batch(ctypes.Structure):                                   # llama_batch of llama.h
    _fields_ = [("n_tokens", ctypes.c_int32)] + [(n, ctypes.c_void_p) for n in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")]


def llama_side(path, threads, count, vocabulary, prompt):
    import xllamacpp
    library = ctypes.CDLL(os.path.join(os.path.dirname(xllamacpp.__file__), "xllamacpp.abi3.so"))
    for name, result in [("llama_model_default_params", Params), ("llama_context_default_params", Params), ("llama_batch_get_one", Batch),
                         ("llama_model_load_from_file", ctypes.c_void_p), ("llama_init_from_model", ctypes.c_void_p),
                         ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float)), ("llama_print_system_info", ctypes.c_char_p)]:
        getattr(library, name).restype = result
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    library.llama_log_set(quiet, None)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
    if not model: sys.exit("llama.cpp could not load " + path)
    context = library.llama_init_from_model(ctypes.c_void_p(model), library.llama_context_default_params())
    library.llama_set_n_threads(ctypes.c_void_p(context), threads, threads)
    library.llama_batch_get_one.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.llama_decode.argtypes = [ctypes.c_void_p, Batch]

    def step(tokens):
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        if library.llama_decode(context, library.llama_batch_get_one(ctypes.addressof(ids), len(tokens))): sys.exit("llama_decode failed")
        logits = library.llama_get_logits_ith(ctypes.c_void_p(context), -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    out = [step(prompt)]
    begin = time.monotonic()
    while len(out) < count: out.append(step(out[-1:]))
    seconds = time.monotonic() - begin
    print(json.dumps(dict(ids=out, rate=(count - 1) / seconds, system=library.llama_print_system_info().decode())))
    sys.stdout.flush()
    os._exit(0)                                                  # without waiting for its threads


def run(command, threads, text=None):
    process = subprocess.run(command, input=text, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    if process.returncode: sys.exit(f"{' '.join(command)} failed:\n{process.stdout[-2000:]}{process.stderr[-2000:]}")
    return process


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--type", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--llama-side", nargs=2, help=argparse.SUPPRESS)          # how this script runs llama.cpp in a process of its own
    o = parser.parse_args()
    if o.llama_side: return llama_side(o.llama_side[0], o.threads, o.tokens, *json.loads(o.llama_side[1]))
    with open(o.model + "/config.json") as f: vocabulary = json.load(f)["vocab_size"]
    os.chdir(REPOSITORY)
    if subprocess.run(["make", "-s", "train_qwen", "chat"], stdout=subprocess.DEVNULL).returncode: sys.exit("make failed")
    numbers = lambda text: [int(word) for word in text.split()]
    prompt = numbers(run(["./prepare", "tokenize"], 1, PROMPT).stdout)
    common = ["--model", o.model, "--greedy", "--max-tokens", str(o.tokens)]
    ids = numbers(run(["./train_qwen", "generate", "--ids", "--prompt", PROMPT] + common, o.threads).stdout)
    with tempfile.TemporaryDirectory() as directory:
        path = directory + "/model.gguf"
        write_gguf(o.model, path, o.type)
        llama = [sys.executable, __file__, "--model", o.model, "--threads", str(o.threads), "--tokens", str(o.tokens), "--llama-side", path,
                 json.dumps([vocabulary, prompt])]
        theirs, ours = [], []
        for _ in range(o.repeats):
            result = json.loads(run(llama, o.threads).stdout.splitlines()[-1])
            theirs.append(result["rate"])
            report = run(["./chat", "--raw"] + common, o.threads, PROMPT).stderr
            ours.append(float(re.search(r"([\d.]+) tokens/s", report)[1]))
    same = next((i for i, (a, b) in enumerate(zip(ids, result["ids"])) if a != b), min(len(ids), len(result["ids"])))
    ratios = [a / b for a, b in zip(ours, theirs)]
    print(f"{o.model}, {o.threads} threads, medians of {o.repeats}; the first {same} of {len(ids)} tokens are the same")
    print(f"  train_qwen          {statistics.median(ours):6.2f} tokens/s")
    print(f"  llama.cpp, {o.type}     {statistics.median(theirs):6.2f} tokens/s ({result['system'].strip(' |')})")
    print(f"  ratio               {statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


main()

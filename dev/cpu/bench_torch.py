#!/usr/bin/env python3
"""The same updates in PyTorch and in train_qwen, one after the other on the same threads: tokens per second, memory, and their ratio.

    python3 -m venv venv && venv/bin/pip install torch numpy
    venv/bin/python dev/cpu/bench_torch.py                    # 2 threads, width 256: eager and torch.compile
    venv/bin/python dev/cpu/bench_torch.py --case 512 --threads 1
    venv/bin/python dev/cpu/bench_torch.py --batch 16         # rows of tokens in an update
    venv/bin/python dev/cpu/bench_torch.py --case matmul      # the matrix products alone, those of `make bench`, against torch.mm

Both train from the same weights (written here as a Hugging Face directory) on the same tokens in fp32: forward, backward, clipping at 1.0
and AdamW, 12 updates with the same learning rate. Their losses have to agree, or nothing is printed. The PyTorch model is written the way
people write it today: scaled_dot_product_attention, fused AdamW, logits of all positions at once. Speed is the median over updates 4 to 12;
runs take turns --repeats times and the median of the ratios is printed. Memory is the peak of the process, weights and code included.
"""
import argparse, json, os, re, resource, shutil, statistics, struct, subprocess, sys, tempfile, time

CASES = {                    # V, C, layers, heads, kv heads, head size, MLP, B, T
    "tiny": (7680, 128, 5, 2, 1, 64, 384, 2, 128),
    "256": (7680, 256, 8, 4, 2, 64, 704, 8, 256),
    "512": (7680, 512, 8, 8, 4, 64, 1408, 4, 256),
    "1024": (7680, 1024, 4, 16, 8, 64, 2816, 4, 256),
    "0.5b": (151936, 896, 24, 14, 2, 64, 4864, 1, 256),
}
LR, UPDATES, FIRST = 1e-4, 12, 4
REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def tensors(case):
    V, C, L, NH, NKV, HD, I, B, T = CASES[case]
    yield "model.embed_tokens.weight", (V, C)
    for l in range(L):
        p = f"model.layers.{l}."
        yield p + "input_layernorm.weight", (C,)
        yield p + "self_attn.q_proj.weight", (NH * HD, C)
        yield p + "self_attn.q_proj.bias", (NH * HD,)
        for n in "kv":
            yield p + f"self_attn.{n}_proj.weight", (NKV * HD, C)
            yield p + f"self_attn.{n}_proj.bias", (NKV * HD,)
        yield p + "self_attn.o_proj.weight", (C, NH * HD)
        yield p + "post_attention_layernorm.weight", (C,)
        yield p + "mlp.gate_proj.weight", (I, C)
        yield p + "mlp.up_proj.weight", (I, C)
        yield p + "mlp.down_proj.weight", (C, I)
    yield "model.norm.weight", (C,)


def initial(name, shape, torch):
    if "norm" in name: return torch.ones(shape)
    if "bias" in name: return torch.zeros(shape)
    generator = torch.Generator().manual_seed(hash_name(name))
    return torch.randn(shape, generator=generator) * 0.02


def hash_name(name):
    value = 0
    for c in name.encode(): value = (value * 31 + c) % 2**31
    return value


def write_inputs(case, directory):
    """directory/model (config.json, model.safetensors) and directory/train.bin. Returns one row of tokens.

    The file is this row again and again, so that every window that the loader takes, in whatever order, is the row and its first token."""
    import torch
    V, C, L, NH, NKV, HD, I, B, T = CASES[case]
    row = torch.randint(0, 7000, (T,), generator=torch.Generator().manual_seed(5))
    if os.path.exists(directory + "/train.bin"): return row
    os.makedirs(directory + "/model")
    config = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=V, hidden_size=C, num_hidden_layers=L,
                  num_attention_heads=NH, num_key_value_heads=NKV, intermediate_size=I, max_position_embeddings=4096,
                  rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=True, hidden_act="silu")
    with open(directory + "/model/config.json", "w") as f: json.dump(config, f)
    header, offset = {}, 0
    for name, shape in tensors(case):
        size = 4 * torch.Size(shape).numel()
        header[name] = dict(dtype="F32", shape=list(shape), data_offsets=[offset, offset + size])
        offset += size
    text = json.dumps(header).encode()
    with open(directory + "/model/model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors(case): f.write(initial(name, shape, torch).numpy().tobytes())
    count = T * (B * UPDATES + 1) + 1
    corpus = REPOSITORY + "/data/tiny_baike"                     # its tokenizer stands beside the tokens, its hash in their header
    shutil.copy(corpus + "/tokenizer.bin", directory)
    with open(corpus + "/train.bin", "rb") as f: tokenizer_hash, = struct.unpack("<Q", f.read(48)[40:])
    with open(directory + "/train.bin", "wb") as f:
        # magic, version, task 0 (pretrain), tokens, documents, vocabulary, end id, tokenizer hash; the rest is 0 (dataloader.h)
        f.write(struct.pack("<8sIIQQIIQ", b"QWENTOK", 1, 0, count, 1, V, 0, tokenizer_hash).ljust(256, b"\0"))
        f.write(row.repeat(count // T + 1)[:count].to(torch.int32).numpy().tobytes())
    return row


def torch_side(case, threads, mode, directory):
    import torch, torch.nn.functional as F
    torch.set_num_threads(threads)
    V, C, L, NH, NKV, HD, I, B, T = CASES[case]
    params = {n: torch.nn.Parameter(initial(n, s, torch)) for n, s in tensors(case)}
    row = write_inputs(case, directory)
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, HD, 2) / HD)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)

    def norm(x, w): return F.rms_norm(x, (C,), w, 1e-6)
    def rotate(x): return x * cos + torch.cat([-x[..., HD // 2:], x[..., :HD // 2]], -1) * sin

    def loss_of(tokens, targets):
        x = F.embedding(tokens, params["model.embed_tokens.weight"])
        for l in range(L):
            p = lambda n: params[f"model.layers.{l}.{n}"]
            h = norm(x, p("input_layernorm.weight"))
            q, k, v = (F.linear(h, p(f"self_attn.{n}_proj.weight"), p(f"self_attn.{n}_proj.bias")).view(B, T, -1, HD).transpose(1, 2)
                       for n in "qkv")
            a = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=NH != NKV)
            x = x + F.linear(a.transpose(1, 2).reshape(B, T, NH * HD), p("self_attn.o_proj.weight"))
            h = norm(x, p("post_attention_layernorm.weight"))
            x = x + F.linear(F.silu(F.linear(h, p("mlp.gate_proj.weight"))) * F.linear(h, p("mlp.up_proj.weight")),
                             p("mlp.down_proj.weight"))
        logits = F.linear(norm(x, params["model.norm.weight"]), params["model.embed_tokens.weight"])
        return F.cross_entropy(logits.view(-1, V), targets.view(-1))

    compiled = torch.compile(loss_of, dynamic=False) if mode == "compile" else loss_of
    decay = [p for p in params.values() if p.dim() == 2]
    rest = [p for p in params.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)], lr=LR, betas=(0.9, 0.99),
                                  eps=1e-8, fused=True)
    tokens = row.repeat(B, 1)
    targets = row.roll(-1).repeat(B, 1)
    losses, times = [], []
    for _ in range(UPDATES):
        begin = time.monotonic()
        loss = compiled(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.monotonic() - begin)
    print(json.dumps(dict(losses=losses, times=times, version=torch.__version__,
                          mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)))


def torch_products(threads, shapes):
    """GFLOP/s of y = x W^T, dx = dy W, dW += dy^T x for each shape, as bench.c measures: medians of 9 samples of at least 4 ms."""
    import torch
    torch.set_num_threads(threads)
    rates = []
    for n, c, o in shapes:
        x, w, y, dx, dw = (torch.randn(size) for size in ((n, c), (o, c), (n, o), (n, c), (o, c)))
        for product in (lambda: torch.mm(x, w.t(), out=y), lambda: torch.mm(y, w, out=dx), lambda: dw.addmm_(y.t(), x)):
            product()
            samples = []
            for _ in range(9):
                begin, count = time.perf_counter(), 0
                while time.perf_counter() - begin < 0.004: product(); count += 1
                samples.append(2e-9 * n * c * o * count / (time.perf_counter() - begin))
            rates.append(statistics.median(samples))
    print(json.dumps(dict(rates=rates, version=torch.__version__)))


def compare_products(threads, repeats):
    if subprocess.run(["make", "-s", "-C", REPOSITORY, "build/cpu_bench"]).returncode: sys.exit("make failed")
    own, other = [], []
    for _ in range(repeats):
        lines = run([REPOSITORY + "/build/cpu_bench", "matmul"], threads).split(f"\nmatmul, {threads} thread")[1].split("\n")
        rows = [re.findall(r"[\d.]+", line) for line in lines[2:] if "->" in line]          # rows in out (GFLOP/s %) x 3
        shapes = [[int(v) for v in row[:3]] for row in rows]
        own.append([float(v) for row in rows for v in row[3::2]])
        result = json.loads(run([sys.executable, __file__, "--threads", str(threads), "--torch-side", "products", json.dumps(shapes)], threads))
        other.append(result["rates"])
    ratios = [statistics.median(a / b for a, b in zip(ours, theirs)) for ours, theirs in zip(zip(*own), zip(*other))]
    print(f"matrix products, {threads} thread(s): train_qwen's speed over PyTorch {result['version']}'s, medians of {repeats}")
    print(f"  {'rows   in ->   out':22} {'y = x W^T':>12} {'dx = dy W':>12} {'dW += dy^T x':>13}")
    for i, (n, c, o) in enumerate(shapes):
        print(f"  {n:4} {c:4} -> {o:5}     " + "".join(f"{r:13.2f}" for r in ratios[3 * i:3 * i + 3]))
    print(f"  geometric mean {statistics.geometric_mean(ratios):.2f}")


def run(command, threads):
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="active")     # waiting threads spin, as PyTorch's do by themselves
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    if process.returncode: sys.exit(f"{' '.join(command)} failed:\n{process.stdout[-2000:]}{process.stderr[-2000:]}")
    return process.stdout


def qwen_side(case, threads, directory):
    V, C, L, NH, NKV, HD, I, B, T = CASES[case]
    out = tempfile.mkdtemp(dir=directory)
    text = run([REPOSITORY + "/train_qwen", "--model", directory + "/model", "--data", directory + "/train.bin", "--out", out,
                "--batch", str(B), "--seq", str(T), "--steps", str(UPDATES), "--lr", str(LR), "--schedule", "constant", "--warmup", "0",
                "--sample-every", "0", "--save-dtype", "bf16"], threads)
    lines = [json.loads(l) for l in open(out + "/log.jsonl")]
    lines = [l for l in lines if "loss" in l]
    shutil.rmtree(out)
    memory = re.search(r"([\d.]+) (MB|GB) of memory at most", text)
    return dict(losses=[l["loss"] for l in lines], times=[l["ms"] / 1e3 for l in lines],
                mb=float(memory[1]) * (1 if memory[2] == "MB" else 1000))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "matmul"], default="256",
                        help="width of the model, or tiny (the default run), 0.5b (Qwen2.5-0.5B), matmul (products alone)")
    parser.add_argument("--batch", type=int, help="rows of tokens in an update, instead of the case's own")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", default="eager,compile")
    parser.add_argument("--torch-side", nargs=2, help=argparse.SUPPRESS)          # how this script runs PyTorch in a process of its own
    o = parser.parse_args()
    if o.batch is not None:
        if o.batch < 1 or o.case == "matmul": parser.error(f"--batch {o.batch}: at least 1 row, and not for --case matmul")
        CASES[o.case] = (*CASES[o.case][:-2], o.batch, CASES[o.case][-1])
    if o.torch_side and o.torch_side[0] == "inputs": return write_inputs(o.case, o.torch_side[1])
    if o.torch_side and o.torch_side[0] == "products": return torch_products(o.threads, json.loads(o.torch_side[1]))
    if o.torch_side: return torch_side(o.case, o.threads, *o.torch_side)
    if o.case == "matmul": return compare_products(o.threads, o.repeats)
    V, C, L, NH, NKV, HD, I, B, T = CASES[o.case]
    if subprocess.run(["make", "-s", "-C", REPOSITORY, "train_qwen", "tiny_baike"],
                      stdout=subprocess.DEVNULL).returncode: sys.exit("make failed")
    with tempfile.TemporaryDirectory() as directory:
        def torch_command(side):
            return [sys.executable, __file__, "--case", o.case, "--batch", str(B), "--threads", str(o.threads), "--torch-side", side, directory]
        run(torch_command("inputs"), o.threads)    # not in this process: Linux counts a parent's peak of memory as its children's
        modes, speeds, ratios, memory = o.modes.split(","), {}, {}, {}
        for repeat in range(o.repeats):
            for side in ["train_qwen"] + modes:
                own_turn = side == "train_qwen"
                result = qwen_side(o.case, o.threads, directory) if own_turn else json.loads(run(torch_command(side), o.threads))
                speed = B * T / statistics.median(result["times"][FIRST - 1:])
                speeds.setdefault(side, []).append(speed)
                memory[side] = max(memory.get(side, 0), result["mb"])
                if own_turn: own = result
                else:
                    worst = max(abs(a - b) / b for a, b in zip(own["losses"], result["losses"], strict=True))
                    if not worst <= 1e-4: sys.exit(f"losses differ by {worst:.1e}:\n{own['losses']}\n{result['losses']}")
                    ratios.setdefault(side, []).append(speeds["train_qwen"][-1] / speed)
                    version = result["version"]
        print(f"{o.case}: {B} x {T} tokens an update, {o.threads} threads, PyTorch {version}; losses agree to 1e-4; medians of {o.repeats}")
        print(f"  {'':18} {'tokens/s':>9} {'memory':>9}   train_qwen is faster by")
        for side in ["train_qwen"] + modes:
            r = ratios.get(side)
            ratio = f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" if r else ""
            name = side if side == "train_qwen" else "PyTorch, " + side
            print(f"  {name:18} {statistics.median(speeds[side]):9.0f} {memory[side]:6.0f} MB   {ratio}")


main()

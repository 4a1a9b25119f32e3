// test_qwen.cu: checks train_qwen.cu (the GPU) against train_qwen.c (the CPU), number by number, and the GPU against PyTorch's numbers.
//
//   make test_qwencu && ./test_qwencu            bf16; PRECISION=fp32 for the fp32 build. Without nvcc it runs on the emulator (dev/emu)
//
// Both sides start from the same weights (rounded to bf16 in a bf16 build) and get the same batches. One line a tensor:
//    ok   gradient model.layers.0.self_attn.q_proj.weight   896 x 64    error 2.1e-07   worst at 4711
// error is ||gpu - cpu|| / ||cpu||. In fp32 it must be at most 1e-5: the two differ only in the order of their sums. In bf16 every number
// on the way is rounded to 8 bits, an error of 2^-9. PyTorch in bf16 is 1.7e-2 (median) to 2.8e-2 away from its own double results in the
// gradients of the fixtures below (dev/test/bf16_error.py); not quite twice that is the tolerance here. Every launcher by itself, given
// the same inputs as its CPU function, is held to one rounding of bf16 for each that it makes: dev/cuda checks that.
#define QWEN_NO_MAIN
#include "train_qwen.cu"
#include "dev/test/test.h"
#include "dev/test/fixtures.h"

static const bool IS_FP32 = sizeof(floatX) == sizeof(float);
static const double TOLERANCE = IS_FP32 ? 1e-5 : 5e-2;

// One tensor (rows, cols): got of the GPU, wanted of the CPU.
void check_tensor(const char *kind, const char *name, const float *got, const float *wanted, size_t rows, size_t cols, double tolerance) {
    double error = relative_error(got, wanted, rows * cols);
    size_t worst = 0;
    for (size_t i = 0; i < rows * cols; i++)
        if (!(fabs((double)got[i] - (double)wanted[i]) <= fabs((double)got[worst] - (double)wanted[worst]))) worst = i;
    char shape[64], values[96] = "";
    snprintf(shape, sizeof shape, "%zu x %zu", rows, cols);
    bool ok = error <= tolerance;
    if (!ok) snprintf(values, sizeof values, ": %g, should be %g; tolerance %.0e", (double)got[worst], (double)wanted[worst], tolerance);
    check(ok, "%-8s %-46s %-12s error %.1e   worst at %zu%s", kind, name, shape, error, worst, values);
}

float *fetch(const float *device, size_t count) {
    float *host = (float *)xmalloc(count * sizeof(float));
    to_host(host, device, count * sizeof(float));
    return host;
}
float *fetch(const __nv_bfloat16 *device, size_t count) {
    __nv_bfloat16 *raw = (__nv_bfloat16 *)xmalloc(count * sizeof(__nv_bfloat16));
    to_host(raw, device, count * sizeof(__nv_bfloat16));
    float *host = (float *)xmalloc(count * sizeof(float));
    for (size_t i = 0; i < count; i++) host[i] = to_float(raw[i]);
    free(raw);
    return host;
}

// A setting of everything that changes how numbers are computed.
typedef struct {
    const char *name;
    Config config;                   // V, C, L, NH, NKV, HD, I, max_T, rope_base, norm_eps, qkv_bias, qk_norm, tied
    int B, T, accum;
    bool masked;                     // several documents in a row, and targets that don't count
    Recompute recompute;
    int classifier_rows;
    int updates;                     // how many to compare on the emulator, where large cases are slow; a GPU does 10 of all
} Case;

static const Case CASES[] = {
    {"v1: bias, untied, odd sizes", {67, 18, 2, 3, 3, 6, 22, 64, 10000, 1e-6f, true, false, false},
     2, 13, 1, false, KEEP_ALL, 4096, 10},
    {"v1: heads of 64", {96, 48, 1, 2, 2, 64, 40, 256, 10000, 1e-6f, true, false, false},
     1, 130, 1, true, KEEP_ALL, 4096, 2},
    {"v1: 9000 tokens, several a thread", {9000, 24, 1, 2, 2, 8, 40, 64, 10000, 1e-6f, true, false, false},
     1, 11, 1, true, KEEP_ALL, 4096, 10},
    {"qwen2: heads 14/2 of 64, tied", {131, 40, 1, 14, 2, 64, 72, 256, 1e6f, 1e-6f, true, false, true},
     2, 67, 1, true, RECOMPUTE_CHEAP, 50, 2},
    {"qwen3: heads 4/2 of 128, tied", {160, 64, 1, 4, 2, 128, 96, 256, 1e6f, 1e-6f, false, true, true},
     1, 100, 2, true, RECOMPUTE_LAYERS, 4096, 2},
    {"qwen3: heads 3/1 of 32, untied", {95, 56, 2, 3, 1, 32, 80, 128, 1e4f, 1e-5f, false, true, false},
     1, 64, 2, false, RECOMPUTE_LAYERS, 100, 10},
    {"qwen3: heads 6/2 of 10, odd sizes", {59, 28, 3, 6, 2, 10, 34, 64, 10000, 1e-6f, false, true, true},
     2, 9, 3, true, RECOMPUTE_CHEAP, 7, 10},
    {"300 rows, more than PARTS; 3 warps", {67, 70, 1, 2, 1, 10, 38, 160, 10000, 1e-6f, true, true, true},
     2, 150, 1, true, KEEP_ALL, 4096, 2},
};

// Random weights that are far from the start of training (biases and norms too), as the GPU will hold them.
void random_weights(Model *m, const Config *c, uint64_t seed) {
    model_alloc(m, c);
    for (int k = 0; k < m->table.count; k++) {
        const TensorInfo *t = &m->table.list[k];
        float mean = t->init == ONES ? 1.0f : 0.0f, deviation = t->is_vector ? 0.2f : 0.5f / sqrtf((float)t->cols);
        for (size_t i = t->offset; i < t->offset + t->rows * t->cols; i++)
            m->params_memory[i] = to_float(to_floatX(mean + deviation * random_normal(seed, i)));
    }
}

Batch random_batch(const Config *c, int rows, int T, bool masked, uint64_t seed) {
    Batch b;
    batch_alloc(&b, rows, T);
    for (int n = 0; n < rows * T; n++) {
        bool begins = n % T == 0 || (masked && random_uniform(seed, 4 * (uint64_t)n) < 0.06);
        b.tokens[n] = (int)(random_uniform(seed, 4 * (uint64_t)n + 1) * c->V);
        b.targets[n] = (int)(random_uniform(seed, 4 * (uint64_t)n + 2) * c->V);
        b.start[n] = begins ? n % T : b.start[n - 1];
        if (!masked) b.start[n] = 0;
        b.weights[n] = masked && random_uniform(seed, 4 * (uint64_t)n + 3) < 0.4 ? 0.0f : 1.0f;
    }
    return b;
}

// The sum of all micro-batches' losses and gradients on the CPU; returns the mean loss.
double cpu_gradients(Model *m, const Batch *batch, int rows, double targets) {
    double loss = 0;
    memset(m->grads_memory, 0, m->table.num_params * sizeof(float));
    for (int i = 0; i < rows; i += m->B) {
        Batch micro = batch_from(batch, i, m->T);
        loss += model_loss(m, &micro, m->B, m->T, (float)(1 / targets), TRAIN) / targets;
    }
    return loss;
}
// The same on the GPU, from gradients of zero.
double gpu_gradients(Model *m, const Batch *batch, int rows, double targets) {
    cudaCheck(cudaMemsetAsync(m->gpu->grads_memory, 0, m->table.num_params * sizeof(float), stream));
    update_gradients_gpu(m, batch, rows, targets);
    return fetch_result(m->gpu).loss / targets;
}

// Every tensor of the model, `got` of the GPU against `wanted`.
void check_model(const char *kind, const Model *m, const float *got, const float *wanted, double tolerance) {
    for (int k = 0; k < m->table.count; k++) {
        const TensorInfo *t = &m->table.list[k];
        check_tensor(kind, t->name, got + t->offset, wanted + t->offset, t->rows, t->cols, tolerance);
    }
}

void check_logits(Model *m, const Batch *batch) {
    const Config *c = &m->config;
    int N = m->B * m->T;
    size_t count = (size_t)N * (size_t)c->V;
    float *wanted = (float *)xmalloc(count * sizeof(float));
    model_forward(m, batch->tokens, batch->start, m->B, m->T, NULL);
    matmul_forward(wanted, m->acts.h, m->params.head, NULL, N, c->C, c->V, OVERWRITE);
    BatchGpu device = upload_batch(m->gpu, batch, 0, N);
    floatX *logits = device_alloc<floatX>(count);
    model_forward_gpu(m, device.tokens, device.start, m->B, m->T, NO_CACHE);
    matmul_forward_gpu(logits, NULL, m->gpu->acts.h, m->gpu->params.head, NULL, N, c->C, c->V);
    float *got = fetch(logits, count);
    check_tensor("logits", "", got, wanted, (size_t)N, (size_t)c->V, TOLERANCE);
    cudaCheck(cudaFree(logits));
    free(wanted), free(got);
}

// Some updates on both sides: losses and norms of each, then the weights. In a bf16 build the CPU computes with its masters rounded, as the
// GPU does. (Epsilon is large, because the gradient of a bias of keys is nearly zero: adding the same to all keys changes nothing but for
// RoPE, and a small epsilon would make whole steps of its rounding errors.)
void check_updates(Model *m, const Batch *batch, int rows, double targets, int updates) {
    AdamW o = {2e-4f, 0.9f, 0.95f, 1e-5f, 0.1f};
    size_t count = m->table.num_params;
    float got[2][16], wanted[2][16], *masters = (float *)xmalloc(count * sizeof(float)), *start = (float *)xmalloc(count * sizeof(float));
    memcpy(masters, m->params_memory, count * sizeof(float)), memcpy(start, masters, count * sizeof(float));
    for (int step = 0; step < updates; step++) {
        Update u = machine_update(m, batch, rows, targets, &o, 1.0, step + 1);
        got[0][step] = (float)u.loss, got[1][step] = (float)u.norm;
        for (size_t i = 0; i < count; i++) m->params_memory[i] = to_float(to_floatX(masters[i]));
        wanted[0][step] = (float)cpu_gradients(m, batch, rows, targets);
        double norm = gradient_norm(m->grads_memory, count);
        wanted[1][step] = (float)norm;
        memcpy(m->params_memory, masters, count * sizeof(float));
        adamw_step(m, &o, norm > 1 ? (float)(1 / (norm + 1e-6)) : 1.0f, step + 1);
        memcpy(masters, m->params_memory, count * sizeof(float));
    }
    check_tensor("updates", "losses", got[0], wanted[0], 1, (size_t)updates, TOLERANCE);
    check_tensor("updates", "gradient norms", got[1], wanted[1], 1, (size_t)updates, TOLERANCE);
    float *gpu_masters = fetch(m->gpu->master, count), *gpu_weights = fetch(m->gpu->params_memory, count);
    check_model("weights", m, gpu_masters, masters, TOLERANCE);
    size_t unequal = 0;
    for (size_t i = 0; i < count; i++) unequal += gpu_weights[i] != to_float(to_floatX(gpu_masters[i]));
    for (size_t i = 0; i < count; i++) gpu_masters[i] -= start[i], masters[i] -= start[i];
    // AdamW divides by the gradient's size, so the errors of small gradients count here as much as those of large ones
    check_tensor("updates", "change of all weights together", gpu_masters, masters, 1, count, 2 * TOLERANCE);
    check(unequal == 0, "the weights that the GPU computes with are its masters, rounded (%zu are not)", unequal);
    free(start), free(masters), free(gpu_masters), free(gpu_weights);
}

// Three updates, or one, a fresh start from what the host was given, and two more: the same bits.
void check_resume(const Case *c, const Batch *batch, int rows, double targets) {
    AdamW o = {1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f};
    float *weights[2], *moments[2];
    size_t bytes = 0;
    for (int run = 0; run < 2; run++) {
        Model m = {};
        random_weights(&m, &c->config, 77);
        model_alloc_moments(&m);
        bytes = m.table.num_params * sizeof(float);
        machine_open(&m, c->B, c->T, rows, c->T, c->recompute, TRAIN);
        for (int step = 1; step <= 3; step++) {
            machine_update(&m, batch, rows, targets, &o, 1.0, step);
            machine_download(&m);
            if (run == 0 || step != 1) continue;
            Model next = {};
            random_weights(&next, &c->config, 78);
            model_alloc_moments(&next);
            memcpy(next.params_memory, m.params_memory, bytes);
            memcpy(next.m_memory, m.m_memory, bytes), memcpy(next.v_memory, m.v_memory, bytes);
            machine_close(&m);
            m = next;
            machine_open(&m, c->B, c->T, rows, c->T, c->recompute, TRAIN);
        }
        weights[run] = (float *)xmalloc(bytes), moments[run] = (float *)xmalloc(bytes);
        memcpy(weights[run], m.params_memory, bytes), memcpy(moments[run], m.v_memory, bytes);
        machine_close(&m);
    }
    check(memcmp(weights[0], weights[1], bytes) == 0 && memcmp(moments[0], moments[1], bytes) == 0,
          "resumed after one of three updates: the same bits");
    for (int run = 0; run < 2; run++) free(weights[run]), free(moments[run]);
}

// Logits after a prompt in pieces, and after each further token, against the CPU's.
void check_decode(const Case *c) {
    Model m = {};
    random_weights(&m, &c->config, 99);
    int T = c->T < 24 ? c->T : 24, positions = c->config.max_T < 80 ? c->config.max_T : 80, tokens[80];
    for (int i = 0; i < positions; i++) tokens[i] = (int)(random_uniform(5, (uint64_t)i) * c->config.V);
    model_alloc_run(&m, 1, T, positions, RECOMPUTE_LAYERS, EVALUATE);
    machine_open(&m, 1, T, 1, positions, RECOMPUTE_LAYERS, EVALUATE);
    KVCache cache = cache_alloc(c->config.L, c->config.NKV, c->config.HD, positions);
    machine_rewind(&m, 0);
    const int pieces[] = {positions - 8, 1, 3, 1, 1}, rewound = 2;           // the third piece a second time, after going back
    for (int i = 0, at = 0; i < 5; at += pieces[i++]) {
        if (i == rewound + 1) {
            machine_rewind(&m, at - pieces[rewound]);
            machine_decode(&m, tokens + at - pieces[rewound], pieces[rewound]);
        }
        float *wanted = model_decode(&m, &cache, tokens + at, pieces[i]), *got = machine_decode(&m, tokens + at, pieces[i]);
        check_tensor("decode", path_of("%d tokens after %d", pieces[i], at), got, wanted, 1, (size_t)c->config.V, TOLERANCE);
    }
    cache_free(&cache);
    machine_close(&m);
}

void test_case(const Case *c) {
#ifdef CUDA_EMU
    int updates = c->updates;
#else
    int updates = 10;
#endif
    printf("\n%s: batch %d x %d, --accum %d, --recompute %d\n", c->name, c->B, c->T, c->accum, c->recompute);
    classifier_rows_gpu = c->classifier_rows;
    Model m = {};
    int rows = c->B * c->accum;
    random_weights(&m, &c->config, 1);
    Batch batch = random_batch(&c->config, rows, c->T, c->masked, 2);
    double targets = sum_weights(&batch, rows * c->T);
    size_t count = m.table.num_params;
    model_alloc_run(&m, c->B, c->T, c->T, c->recompute, TRAIN);
    machine_open(&m, c->B, c->T, rows, c->T, c->recompute, TRAIN);

    check_logits(&m, &batch);
    float wanted_loss = (float)cpu_gradients(&m, &batch, rows, targets), got_loss = (float)gpu_gradients(&m, &batch, rows, targets);
    check_tensor("loss", "", &got_loss, &wanted_loss, 1, 1, TOLERANCE);
    float *got = fetch(m.gpu->grads_memory, count);
    check_model("gradient", &m, got, m.grads_memory, TOLERANCE);
    gpu_gradients(&m, &batch, rows, targets);
    float *again = fetch(m.gpu->grads_memory, count);
    check(memcmp(got, again, count * sizeof(float)) == 0, "gradients a second time: the same bits");
    double loss = machine_loss(&m, &batch, c->B, c->T), cpu_loss = model_loss(&m, &batch, c->B, c->T, 0, EVALUATE);
    check(fabs(loss / cpu_loss - 1) <= TOLERANCE, "loss of a validation batch: %.7g, the CPU's is %.7g", loss, cpu_loss);
    cudaCheck(cudaMemsetAsync(m.gpu->grads_memory, 0, count * sizeof(float), stream));
    memset(m.grads_memory, 0, count * sizeof(float));
    check_updates(&m, &batch, rows, targets, updates);
    machine_close(&m);
    free(got), free(again);
    if (updates == 10) check_resume(c, &batch, rows, targets);
    check_decode(c);
    batch_free(&batch);
}

// The GPU against what PyTorch computed in double. (The weights of the fixtures are fp32; a bf16 build rounds them first: another 2^-9.)
void test_fixture(const char *family, int B, int T) {
    const char *directory = path_of(FIXTURES "/%s", family);
    bool v1 = strcmp(family, "qwen") == 0;
    StoredTensors s = safetensors_open(directory, "expected");
    for (int masked = 0; masked < 2; masked++) {
        const char *setting = masked ? "masked" : "plain";
        printf("\nPyTorch: %s, %s\n", family, setting);
        Model m = {};
        model_load(&m, directory);
        model_alloc_moments(&m);
        machine_open(&m, B, T, B, T, KEEP_ALL, TRAIN);
        Batch batch = expected_batch(&s, B, T, masked);
        float wanted = expected_number(&s, path_of("%s.loss", setting));
        float loss = (float)gpu_gradients(&m, &batch, B, sum_weights(&batch, B * T));
        check_tensor("loss", "", &loss, &wanted, 1, 1, TOLERANCE);
        float *got = fetch(m.gpu->grads_memory, m.table.num_params);
        float *gradients = expected_tensors(&s, family, &m, path_of("%s.grad.", setting), v1);
        check_model("gradient", &m, got, gradients, TOLERANCE);
        free(got), free(gradients);
        batch_free(&batch), machine_close(&m);
    }
    safetensors_close(&s);
}

// A loss that is not finite must leave weights and moments as they are. And the checks themselves must not take NaN for a number.
void test_nan(void) {
    printf("\nNaN\n");
    const Case *c = &CASES[0];
    Model m = {};
    random_weights(&m, &c->config, 1);
    model_alloc_moments(&m);
    size_t count = m.table.num_params;
    m.params_memory[m.table.list[0].rows * m.table.list[0].cols - 1] = NAN;              // of the embedding's last token
    machine_open(&m, c->B, c->T, c->B, c->T, KEEP_ALL, TRAIN);
    Batch batch = random_batch(&c->config, c->B, c->T, false, 3);
    batch.tokens[5] = c->config.V - 1;
    float *before = fetch(m.gpu->master, count);
    AdamW o = {1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f};
    Update u = machine_update(&m, &batch, c->B, c->B * c->T, &o, 1.0, 1);
    float *after = fetch(m.gpu->master, count), *moments = fetch(m.gpu->v_memory, count);
    bool untouched = memcmp(before, after, count * sizeof(float)) == 0;
    for (size_t i = 0; i < count; i++) untouched = untouched && moments[i] == 0;
    check(!isfinite(u.loss) && untouched, "an update with a loss of %g changes nothing", u.loss);
    float number = 1, nan = NAN;
    check(!(relative_error(&nan, &number, 1) <= TOLERANCE), "a NaN is not taken for a small error");
    free(before), free(after), free(moments);
    batch_free(&batch), machine_close(&m);
}

int main(int argc, char **argv) {
    const char *wanted = argc > 1 ? argv[1] : "";
    printf("train_qwen.cu in " PRECISION " on %s, tolerance %.0e\n", device_properties()->name, TOLERANCE);
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++)
        if (strstr(CASES[i].name, wanted)) test_case(&CASES[i]);
    classifier_rows_gpu = 4096;
    const char *const families[] = {"qwen", "qwen2", "qwen3"};
    for (int i = 0; i < 3; i++)
        if (strstr(families[i], wanted)) test_fixture(families[i], 3, 13);
    test_nan();
    return verdict();
}

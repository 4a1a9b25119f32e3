// test_train.c: the trainer against PyTorch's numbers (fixtures/, made by reference.py), against central differences, and against itself.
//
//   make test          builds and runs this from the repository root, plain and with sanitizers
#define QWEN_NO_MAIN
#include "../../train_qwen.c"
#include "test.h"
#include "fixtures.h"

static const double TOLERANCE = 1e-5;        // fp32 sums of some hundred terms in another order than PyTorch's: about 1e-6 is seen

// ---------------------------------------------------------------------------------------------------------------------
// PyTorch's numbers

void check_tensors(const char *what, StoredTensors *s, const Model *m, const float *memory, const char *prefix, bool v1) {
    float *wanted = expected_tensors(s, what, m, prefix, v1);
    double worst = 0;
    const char *worst_name = "";
    for (int k = 0; k < m->table.count; k++) {
        const TensorInfo *t = &m->table.list[k];
        double error = relative_error(memory + t->offset, wanted + t->offset, t->rows * t->cols);
        if (!(error <= worst)) worst = error, worst_name = t->name;
        if (!(error <= TOLERANCE)) check_close(t->name, memory + t->offset, wanted + t->offset, t->rows * t->cols, TOLERANCE);
    }
    check(worst <= TOLERANCE, "%-58s error %.1e (worst of %d tensors: %s)", what, worst, m->table.count, worst_name);
    free(wanted);
}

void test_family(const char *family, int B, int T) {
    char what[96];
    const char *directory = path_of(FIXTURES "/%s", family);
    bool v1 = strcmp(family, "qwen") == 0;
    StoredTensors s = safetensors_open(directory, "expected");
    for (int setting = 0; setting < 2; setting++)
        for (int recompute = 0; recompute < 3; recompute++) {
            const char *prefix = setting ? "masked" : "plain";
            Model m = {};
            model_load(&m, directory);
            model_alloc_run(&m, B, T, T, (Recompute)recompute, TRAIN);
            Batch b = expected_batch(&s, B, T, setting == 1);
            double count = sum_weights(&b, B * T);
            float loss = (float)(model_loss(&m, &b, B, T, (float)(1 / count), TRAIN) / count);
            float wanted_loss = expected_number(&s, path_of("%s.loss", prefix));
            snprintf(what, sizeof what, "%s %s, recompute %d: loss", family, prefix, recompute);
            check_close(what, &loss, &wanted_loss, 1, TOLERANCE);
            snprintf(what, sizeof what, "%s %s, recompute %d: gradients", family, prefix, recompute);
            check_tensors(what, &s, &m, m.grads_memory, path_of("%s.grad.", prefix), v1);
            size_t V = (size_t)m.config.V, logits_count = (size_t)B * (size_t)T * V;
            float *logits = (float *)xmalloc(logits_count * sizeof(float)), *wanted = expected(&s, path_of("%s.logits", prefix), logits_count);
            model_forward(&m, b.tokens, b.start, B, T, NULL);
            matmul_forward(logits, m.acts.h, m.params.head, NULL, B * T, m.config.C, m.config.V, OVERWRITE);
            snprintf(what, sizeof what, "%s %s, recompute %d: logits", family, prefix, recompute);
            check_close(what, logits, wanted, logits_count, TOLERANCE);
            free(logits), free(wanted);
            batch_free(&b);
            model_free(&m);
        }
    safetensors_close(&s);
}

void test_adamw(const char *family, int B, int T) {
    const char *directory = path_of(FIXTURES "/%s", family);
    StoredTensors s = safetensors_open(directory, "expected");
    Model m = {};
    model_load(&m, directory);
    model_alloc_run(&m, B, T, T, KEEP_ALL, TRAIN);
    Batch b = expected_batch(&s, B, T, false);
    AdamW o = {expected_number(&s, "adamw.lr"), expected_number(&s, "adamw.beta1"), expected_number(&s, "adamw.beta2"), expected_number(&s, "adamw.eps"),
               expected_number(&s, "adamw.weight_decay")};
    double clip = (double)expected_number(&s, "adamw.clip");
    float losses[10], norms[10], *wanted_losses = expected(&s, "adamw.losses", 10), *wanted_norms = expected(&s, "adamw.norms", 10);
    for (int step = 0; step < 10; step++) {
        losses[step] = (float)(model_loss(&m, &b, B, T, 1.0f / (float)(B * T), TRAIN) / (B * T));
        double norm = gradient_norm(m.grads_memory, m.table.num_params);
        norms[step] = (float)norm;
        adamw_step(&m, &o, norm > clip ? (float)(clip / (norm + 1e-6)) : 1.0f, step + 1);
    }
    char what[96];
    snprintf(what, sizeof what, "%s, ten AdamW steps: losses", family);
    check_close(what, losses, wanted_losses, 10, TOLERANCE);
    snprintf(what, sizeof what, "%s, ten AdamW steps: gradient norms", family);
    check_close(what, norms, wanted_norms, 10, TOLERANCE);
    snprintf(what, sizeof what, "%s, ten AdamW steps: final weights", family);
    check_tensors(what, &s, &m, m.params_memory, "adamw.final.", strcmp(family, "qwen") == 0);
    free(wanted_losses), free(wanted_norms);
    batch_free(&b), model_free(&m), safetensors_close(&s);
}

void test_greedy(const char *family) {
    const char *directory = path_of(FIXTURES "/%s", family);
    StoredTensors s = safetensors_open(directory, "expected");
    float *prompt = expected(&s, "greedy.prompt", 5), *ids = expected(&s, "greedy.ids", 10);
    for (int split = 1; split <= 5; split++) {                   // the prompt in one piece, or in two
        Model m = {};
        model_load(&m, directory);
        model_alloc_run(&m, 1, 3, 16, RECOMPUTE_LAYERS, EVALUATE);
        KVCache cache = cache_alloc(m.config.L, m.config.NKV, m.config.HD, 16);
        int tokens[5], equal = 0;
        for (int i = 0; i < 5; i++) tokens[i] = (int)prompt[i];
        float *logits = model_decode(&m, &cache, tokens, split);
        if (split < 5) logits = model_decode(&m, &cache, tokens + split, 5 - split);
        Sampler sampler = {1, 1, 0, 1, 0, true};
        for (int i = 0; i < 10; i++) {
            int id = sample(logits, m.config.V, &sampler, 0);
            equal += id == (int)ids[i];
            if (i < 9) logits = model_decode(&m, &cache, &id, 1);
        }
        check(equal == 10, "%s: greedy generation, prompt split at %d: %d of 10 ids are those of transformers", family, split, equal);
        cache_free(&cache), model_free(&m);
    }
    free(prompt), free(ids);
    safetensors_close(&s);
}

void test_rounded(const char *family, int B, int T) {            // bf16 in two files, fp16
    const char *directory = path_of(FIXTURES "/%s", family);
    StoredTensors s = safetensors_open(directory, "expected");
    Model m = {};
    model_load(&m, directory);
    model_alloc_run(&m, B, T, T, KEEP_ALL, EVALUATE);
    size_t n = (size_t)(B * T), count = n * (size_t)m.config.V;
    float *tokens = expected(&s, "tokens", n), *wanted = expected(&s, "plain.logits", count), *logits = (float *)xmalloc(count * sizeof(float));
    int ids[64], start[64] = {0};
    for (size_t i = 0; i < n; i++) ids[i] = (int)tokens[i];
    model_forward(&m, ids, start, B, T, NULL);
    matmul_forward(logits, m.acts.h, m.params.head, NULL, B * T, m.config.C, m.config.V, OVERWRITE);
    check_close(family, logits, wanted, count, TOLERANCE);
    free(tokens), free(wanted), free(logits);
    model_free(&m), safetensors_close(&s);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layers against naive formulas in double, and their backward against central differences of those formulas.
//
// A layer is a function of one array x (all of its inputs, one behind the other) to one array y, written plainly in double. For fixed
// random dy, f(x) = sum(dy * y(x)); the layer's backward must give df/dx = (f(x + h) - f(x - h)) / 2h for every element.

typedef void (*Formula)(double *y, const double *x);

void check_layer(const char *what, Formula formula, const float *x, int num_x, const float *y, int num_y, const float *dy, const float *dx) {
    double *xd = (double *)xcalloc((size_t)num_x, sizeof(double)), *yd = (double *)xcalloc((size_t)num_y, sizeof(double));
    float *wanted_y = (float *)xcalloc((size_t)num_y, sizeof(float)), *wanted_dx = (float *)xcalloc((size_t)num_x, sizeof(float));
    char text[96];
    for (int i = 0; i < num_x; i++) xd[i] = (double)x[i];
    formula(yd, xd);
    for (int i = 0; i < num_y; i++) wanted_y[i] = (float)yd[i];
    snprintf(text, sizeof text, "%s: forward, formula in double", what);
    check_close(text, y, wanted_y, (size_t)num_y, 2e-6);
    for (int i = 0; i < num_x; i++) {
        double h = 1e-5, difference = 0, kept = xd[i];
        for (int sign = -1; sign <= 1; sign += 2) {
            xd[i] = kept + sign * h;
            formula(yd, xd);
            for (int j = 0; j < num_y; j++) difference += sign * (double)dy[j] * yd[j];
        }
        xd[i] = kept;
        wanted_dx[i] = (float)(difference / (2 * h));
    }
    snprintf(text, sizeof text, "%s: backward, central differences", what);
    check_close(text, dx, wanted_dx, (size_t)num_x, 5e-6);
    free(xd), free(yd), free(wanted_y), free(wanted_dx);
}

void fill_random(float *x, int n, uint64_t seed) { for (int i = 0; i < n; i++) x[i] = random_normal(seed, (uint64_t)i); }

enum { LB = 2, LT = 7, LN_ = LB * LT, LC = 10, LO = 13, LNH = 4, LNKV = 2, LHD = 6, LQKV = (LNH + 2 * LNKV) * LHD, LI = 9, LV = 23, LG = 3 };
static int layer_tokens[LN_], layer_start[LN_], layer_positions[LN_];

void embedding_formula(double *y, const double *x) {
    for (int n = 0; n < LN_; n++) for (int c = 0; c < LC; c++) y[n * LC + c] = x[layer_tokens[n] * LC + c];
}
// x: inp (LN_, LG, LC), weight (LC)
void rmsnorm_formula(double *y, const double *x) {
    const double *weight = x + LN_ * LG * LC;
    for (int n = 0; n < LN_ * LG; n++) {
        double squares = 0;
        for (int c = 0; c < LC; c++) squares += x[n * LC + c] * x[n * LC + c];
        for (int c = 0; c < LC; c++) y[n * LC + c] = x[n * LC + c] / sqrt(squares / LC + 1e-3) * weight[c];
    }
}
// x: inp (LN_, LC), weight (LO, LC), bias (LO)
void matmul_formula(double *y, const double *x) {
    const double *weight = x + LN_ * LC, *bias = weight + LO * LC;
    for (int n = 0; n < LN_; n++)
        for (int o = 0; o < LO; o++) {
            y[n * LO + o] = bias[o];
            for (int c = 0; c < LC; c++) y[n * LO + o] += x[n * LC + c] * weight[o * LC + c];
        }
}
// The first LNH + LNKV heads of rows of LQKV are turned.
void rope_formula(double *y, const double *x) {
    for (int n = 0; n < LN_; n++)
        for (int i = 0; i < LQKV; i++) {
            int head = i / LHD, pair = i % LHD % (LHD / 2), low = n * LQKV + head * LHD + pair, high = low + LHD / 2;
            double angle = layer_positions[n] * pow(100.0, -2.0 * pair / LHD);
            y[n * LQKV + i] = head >= LNH + LNKV ? x[n * LQKV + i] : i % LHD < LHD / 2 ? x[low] * cos(angle) - x[high] * sin(angle)
                                                                                         : x[high] * cos(angle) + x[low] * sin(angle);
        }
}
void attention_formula(double *y, const double *x) {
    for (int n = 0; n < LN_; n++)
        for (int h = 0; h < LNH; h++) {
            const double *q = x + n * LQKV + h * LHD;
            int row = n / LT * LT, g = h / (LNH / LNKV);
            double scores[LT], sum = 0;
            for (int j = layer_start[n]; j <= n % LT; j++) {
                const double *k = x + (row + j) * LQKV + (LNH + g) * LHD;
                double score = 0;
                for (int i = 0; i < LHD; i++) score += q[i] * k[i];
                sum += scores[j] = exp(score / sqrt((double)LHD));
            }
            for (int i = 0; i < LHD; i++) {
                double value = 0;
                for (int j = layer_start[n]; j <= n % LT; j++) value += scores[j] / sum * x[(row + j) * LQKV + (LNH + LNKV + g) * LHD + i];
                y[(n * LNH + h) * LHD + i] = value;
            }
        }
}
void swiglu_formula(double *y, const double *x) {
    for (int n = 0; n < LN_; n++)
        for (int i = 0; i < LI; i++) y[n * LI + i] = x[n * 2 * LI + i] / (1 + exp(-x[n * 2 * LI + i])) * x[n * 2 * LI + LI + i];
}
// x: h (LN_, LC), head (LV, LC); targets are layer_tokens
void classifier_formula(double *y, const double *x) {
    const double *head = x + LN_ * LC;
    for (int n = 0; n < LN_; n++) {
        double sum = 0, target = 0;
        for (int v = 0; v < LV; v++) {
            double logit = 0;
            for (int c = 0; c < LC; c++) logit += x[n * LC + c] * head[v * LC + c];
            sum += exp(logit);
            if (v == layer_tokens[n]) target = logit;
        }
        y[n] = log(sum) - target;
    }
}

void test_layers(void) {
    static float x[4000], dx[4000], y[4000], dy[4000], kept[4000], lse[LB * LNH * LT], table[LT * LHD];
    for (int n = 0; n < LN_; n++) {
        layer_tokens[n] = (int)(mix64((uint64_t)n) % LV);
        layer_start[n] = n < LT ? 0 : n % LT < 3 ? 0 : 3;        // second row: two documents
        layer_positions[n] = n % LT - layer_start[n];
    }
    fill_random(x, 4000, 1), fill_random(dy, 4000, 2);

    memset(dx, 0, sizeof dx);
    embedding_forward(y, layer_tokens, x, LN_, LC);
    embedding_backward(dx, dy, layer_tokens, LN_, LC);
    check_layer("embedding", embedding_formula, x, LV * LC, y, LN_ * LC, dy, dx);

    memset(dx, 0, sizeof dx);
    int inputs = LN_ * LG * LC;
    rmsnorm_forward(y, kept, x, x + inputs, LN_, LG, LC, LG * LC, 1e-3f);
    rmsnorm_backward(dx, dx + inputs, dy, x, x + inputs, kept, LN_, LG, LC, LG * LC, OVERWRITE);
    check_layer("rmsnorm, 3 vectors a row", rmsnorm_formula, x, inputs + LC, y, inputs, dy, dx);
    memcpy(kept + LN_ * LG, dy, sizeof(float) * (size_t)inputs);
    float *in_place = kept + LN_ * LG;
    memset(y, 0, sizeof y);
    rmsnorm_backward(in_place, y, in_place, x, x + inputs, kept, LN_, LG, LC, LG * LC, OVERWRITE);
    check_close("rmsnorm, gradient in place: dinp", in_place, dx, (size_t)inputs, 0);
    check_close("rmsnorm, gradient in place: dweight", y, dx + inputs, LC, 0);

    memset(dx, 0, sizeof dx);
    inputs = LN_ * LC;
    matmul_forward(y, x, x + inputs, x + inputs + LO * LC, LN_, LC, LO, OVERWRITE);
    matmul_backward(dx, dx + inputs, dx + inputs + LO * LC, dy, x, x + inputs, LN_, LC, LO);
    check_layer("matmul with bias", matmul_formula, x, inputs + LO * LC + LO, y, LN_ * LO, dy, dx);

    rope_table(table, LT, LHD, 100.0f);
    memcpy(y, x, sizeof y), memcpy(dx, dy, sizeof dx);
    rope(y, layer_positions, table, LN_, LNH + LNKV, LHD, LQKV, ROPE_FORWARD);
    rope(dx, layer_positions, table, LN_, LNH + LNKV, LHD, LQKV, ROPE_BACKWARD);
    check_layer("rope", rope_formula, x, LN_ * LQKV, y, LN_ * LQKV, dy, dx);

    memset(dx, 0xFF, sizeof dx);                                 // NaN: everything must be written
    const float *k = x + LNH * LHD, *v = k + LNKV * LHD;
    attention_forward(y, lse, x, k, v, layer_start, LB, LT, LNH, LNKV, LHD, LQKV);
    attention_backward(dx, dx + LNH * LHD, dx + (LNH + LNKV) * LHD, dy, y, lse, x, k, v, layer_start, LB, LT, LNH, LNKV, LHD, LQKV);
    check_layer("attention, grouped heads, document mask", attention_formula, x, LN_ * LQKV, y, LN_ * LNH * LHD, dy, dx);

    swiglu_forward(y, x, LN_, LI);
    swiglu_backward(dx, dy, x, LN_, LI);
    check_layer("swiglu", swiglu_formula, x, LN_ * 2 * LI, y, LN_ * LI, dy, dx);

    memset(dx, 0, sizeof dx);
    inputs = LN_ * LC;
    float *logits = (float *)xmalloc(sizeof(float) * LN_ * LV);
    classifier(y, dx, dx + inputs, x, x + inputs, layer_tokens, dy, 1.0f, logits, LN_, LC, LV);
    check_layer("classifier", classifier_formula, x, inputs + LV * LC, y, LN_, dy, dx);
    free(logits);
}

// Attention over several blocks of queries and keys, forward and backward, against the formulas in double. Documents begin anywhere in the
// first row; the second row is one document.
void test_long_attention(void) {
    enum { B = 2, T = 403, NH = 4, NKV = 2, HD = 20, W = (NH + 2 * NKV) * HD, OUT = NH * HD };
    static float x[B * T * W], att[B * T * OUT], wanted[B * T * OUT], lse[B * NH * T], datt[B * T * OUT], dx[B * T * W], wanted_dx[B * T * W];
    static double dx_sum[B * T * W], p[T];
    static int start[B * T];
    fill_random(x, B * T * W, 5), fill_random(datt, B * T * OUT, 6);
    for (int t = 0, begin = 0; t < T; t++) {
        if (mix64((uint64_t)t) % 97 == 0) begin = t;
        start[t] = begin;
    }
    for (int n = 0; n < B * T; n++)
        for (int h = 0; h < NH; h++) {
            int first = n / T * T, kv_head = h / (NH / NKV), t = n % T;
            const float *q = x + n * W + h * HD, *dy = datt + n * OUT + h * HD;
            double sum = 0, out[HD] = {0}, back = 0;
            for (int j = start[n]; j <= t; j++) {
                const float *k = x + (first + j) * W + (NH + kv_head) * HD;
                p[j] = 0;
                for (int i = 0; i < HD; i++) p[j] += (double)q[i] * (double)k[i];
                p[j] = exp(p[j] / sqrt((double)HD));
                sum += p[j];
                for (int i = 0; i < HD; i++) out[i] += p[j] * (double)k[NKV * HD + i];
            }
            for (int i = 0; i < HD; i++) wanted[n * OUT + h * HD + i] = (float)(out[i] / sum), back += (double)dy[i] * out[i] / sum;
            for (int j = start[n]; j <= t; j++) {
                int at = (first + j) * W + (NH + kv_head) * HD;
                double dp = 0;
                for (int i = 0; i < HD; i++) dp += (double)dy[i] * (double)x[at + NKV * HD + i];
                double ds = p[j] / sum * (dp - back) / sqrt((double)HD);
                for (int i = 0; i < HD; i++) {
                    dx_sum[n * W + h * HD + i] += ds * (double)x[at + i];
                    dx_sum[at + i] += ds * (double)q[i];
                    dx_sum[at + NKV * HD + i] += p[j] / sum * (double)dy[i];
                }
            }
        }
    for (int i = 0; i < B * T * W; i++) wanted_dx[i] = (float)dx_sum[i];
    attention_forward(att, lse, x, x + NH * HD, x + (NH + NKV) * HD, start, B, T, NH, NKV, HD, W);
    check_close("attention, blocks of queries and keys, documents", att, wanted, B * T * OUT, 2e-6);
    attention_backward(dx, dx + NH * HD, dx + (NH + NKV) * HD, datt, att, lse, x, x + NH * HD, x + (NH + NKV) * HD, start, B, T, NH, NKV, HD, W);
    check_close("attention's backward, the same", dx, wanted_dx, B * T * W, 2e-6);
}

// ---------------------------------------------------------------------------------------------------------------------
// The fast parts of section 3 against three lines

void test_gemm(void) {
    static const int sizes[][3] = {{1, 1, 1}, {3, 5, 7}, {6, 16, 256}, {7, 17, 257}, {64, 48, 33}, {229, 530, 300}, {300, 31, 600}, {2, 700, 5}, {90, 65, 0}};
    double worst = 0;
    bool equal = true;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        for (int layout = 0; layout < 4; layout++)
            for (int mode = 0; mode < 2; mode++) {
                int M = sizes[i][0], N = sizes[i][1], K = sizes[i][2], ldc = N + 3;
                float *a = (float *)xmalloc(sizeof(float) * (size_t)(M * K + 1)), *b = (float *)xmalloc(sizeof(float) * (size_t)(K * N + 1));
                float *c = (float *)xmalloc(sizeof(float) * (size_t)(M * ldc)), *c1 = (float *)xmalloc(sizeof(float) * (size_t)(M * ldc));
                fill_random(a, M * K, 3), fill_random(b, K * N, 4), fill_random(c, M * ldc, 5);
                memcpy(c1, c, sizeof(float) * (size_t)(M * ldc));
                View va = layout & 1 ? view(a, 1, M) : view(a, K, 1), vb = layout & 2 ? view(b, 1, K) : view(b, N, 1);
                double *wanted = (double *)xcalloc((size_t)(M * N), sizeof(double));
                for (int m = 0; m < M; m++)
                    for (int n = 0; n < N; n++) {
                        wanted[m * N + n] = mode == ACCUMULATE ? (double)c[m * ldc + n] : 0;
                        for (int k = 0; k < K; k++) wanted[m * N + n] += (double)va.data[m * va.row + k * va.col] * (double)vb.data[k * vb.row + n * vb.col];
                    }
                float beyond = c[M * ldc - 1];
                gemm(c, ldc, va, vb, M, N, K, (WriteMode)mode);
                gemm_block(c1, ldc, va, vb, M, N, K, (WriteMode)mode);
                for (int m = 0; m < M; m++)
                    for (int n = 0; n < N; n++) {
                        double error = fabs((double)c[m * ldc + n] - wanted[m * N + n]) / sqrt((double)K + 1);
                        if (!(error <= worst)) worst = error;
                    }
                equal &= memcmp(c, c1, sizeof(float) * (size_t)(M * ldc)) == 0 && c[M * ldc - 1] == beyond;
                free(a), free(b), free(c), free(c1), free(wanted);
            }
    check(worst <= 6e-6, "gemm, 9 shapes x 4 layouts x 2 modes: largest error / sqrt(K) is %.1e", worst);
    check(equal, "gemm on all threads and on one: the same bits; nothing written outside");
}

void test_exp(void) {
    double worst = 0;
    float x[33], y[33];
    for (float at = -87.0f; at < 88.0f; at += 33 * 0.00071f) {
        for (int i = 0; i < 33; i++) x[i] = at + (float)i * 0.00071f < 88.0f ? at + (float)i * 0.00071f : 88.0f;
        exp_row(y, x, 1.0f, 0.0f, 33);
        for (int i = 0; i < 33; i++) {
            double wanted = exp((double)x[i]), error = fabs((double)y[i] - wanted) / wanted;
            if (!(error <= worst)) worst = error;
        }
    }
    check(worst <= 2 * 1.2e-7, "exp_row from -87 to 88: largest relative error %.1e", worst);
    float edge[4] = {NAN, -INFINITY, INFINITY, 0}, out[4];
    exp_row(out, edge, 1.0f, 0.0f, 4);
    check(isnan(out[0]) && out[1] >= 0 && out[1] < 2e-38f && out[2] > 1e38f && out[3] == 1.0f, "exp_row of NaN, -inf, inf, 0: %g %g %g %g",
          (double)out[0], (double)out[1], (double)out[2], (double)out[3]);
    float row[19];
    for (int i = 0; i < 19; i++) row[i] = -(float)((i * 7) % 19);
    check(row_max(row, 19) == 0.0f && row_max(row + 1, 3) == -2.0f, "row_max");
}

void test_halves(void) {
    int wrong = 0;
    for (uint32_t h = 0; h < 65536; h++) {                       // every fp16 by its definition
        int exponent = (int)(h >> 10 & 31), mantissa = (int)(h & 1023);
        double wanted = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
        if (h & 0x8000) wanted = -wanted;
        float got = f16_to_float((uint16_t)h);
        wrong += exponent == 31 ? (mantissa ? !isnan(got) : !isinf(got)) : (double)got != wanted;
        float b = bf16_to_float((uint16_t)h);
        wrong += !isnan(b) && float_to_bf16(b) != h;             // bf16 goes there and back
    }
    check(wrong == 0, "fp16 -> float of all 65536 values, bf16 -> float -> bf16 of all");
    check(float_to_bf16(1.00390625f) == 0x3F80 && float_to_bf16(1.01171875f) == 0x3F82 && float_to_bf16(1.0040f) == 0x3F81,
          "float -> bf16 rounds to nearest, ties to even");
}

// A model of bf16 numbers generates from a copy of 2 bytes a weight: the same bits as from the floats. One that has others doesn't get a copy.
void test_half_weights(void) {
    Model m = {};
    int prompt[3] = {1, 2, 3}, next = 4;
    model_load(&m, FIXTURES "/qwen2_bf16");
    machine_open(&m, 1, 4, 1, 16, KEEP_ALL, EVALUATE);
    size_t bytes = sizeof(float) * (size_t)m.config.V;
    float *with = (float *)xmalloc(bytes);
    machine_rewind(&m, 0), machine_decode(&m, prompt, 3);
    bool copied = half_of(m.params.layers[0].wq) != NULL;
    memcpy(with, machine_decode(&m, &next, 1), bytes);
    half_weights_free(m.params_memory);
    machine_rewind(&m, 0), machine_decode(&m, prompt, 3);
    check(copied && !half_of(m.params.layers[0].wq) && memcmp(with, machine_decode(&m, &next, 1), bytes) == 0,
          "generation from bf16 copies of the weights: the same bits");
    m.params_memory[7] = 1.0001f;
    half_weights_make(m.params_memory, m.table.num_params);
    check(!half_of(m.params_memory), "no copy of weights that bf16 can't hold");
    free(with);
    machine_close(&m);
}

// ---------------------------------------------------------------------------------------------------------------------
// Loader

static char scratch[64];                                         // a temporary directory
void write_tokens(const char *path, const uint32_t *tokens, uint64_t count, uint64_t documents, Task task, int vocab_size) {
    TokenFileHeader h = {};
    memcpy(h.magic, TOKEN_FILE_MAGIC, 8);
    h.version = TOKEN_FILE_VERSION, h.task = task, h.num_tokens = count, h.num_documents = documents, h.vocab_size = (uint32_t)vocab_size;
    FILE *f = create_file(path);
    fwrite(&h, sizeof h, 1, f), fwrite(tokens, 4, count, f);
    close_file(f, path);
}

Loader open_loader(const char *path, Task task, int T, int vocab_size, bool doc_mask, bool shuffle) {
    Loader l = {};
    CHECK(loader_find(&l, path, "train") > 0, "%s: nothing there", path);
    loader_open(&l, task, T, vocab_size, doc_mask, shuffle, 7);
    return l;
}

void test_permute(void) {
    bool all = true, moved = false;
    for (uint64_t n = 1; n < 200; n++) {
        bool seen[200] = {false};
        for (uint64_t i = 0; i < n; i++) {
            uint64_t to = permute(i, n, 42);
            all &= to < n && !seen[to < n ? to : 0];
            if (to < n) seen[to] = true;
            moved |= to != i;
        }
    }
    check(all && moved, "permute is a permutation for every n below 200");
}

void test_windows(void) {
    uint32_t tokens[100];
    for (uint32_t i = 0; i < 100; i++) tokens[i] = i;
    const char *path = path_of("%s/hundred.bin", scratch);
    write_tokens(path, tokens, 100, 1, TASK_PRETRAIN, 100);
    for (int shuffle = 0; shuffle < 2; shuffle++) {
        Loader l = open_loader(path, TASK_PRETRAIN, 8, 100, false, shuffle);
        Batch b;
        batch_alloc(&b, 2, 8);
        int seen[100] = {0}, wrong = 0, largest = 0;
        for (uint64_t row = 0; row < l.num_rows; row += 2) {
            double counted = loader_rows(&l, row, 2, &b);
            wrong += counted != 16;
            for (int i = 0; i < 16; i++) {
                wrong += b.targets[i] != b.tokens[i] + 1 || b.start[i] != 0;
                seen[b.tokens[i]]++;
                if (b.targets[i] > largest) largest = b.targets[i];
            }
        }
        for (int i = 0; i < 96; i++) wrong += seen[i] != 1;
        check(l.num_rows / 2 == 6 && wrong == 0 && largest == 96, "100 tokens, B 2, T 8%s: 6 batches, target = input + 1, 0..95 once each, 96 last",
              shuffle ? ", shuffled" : "");
        batch_free(&b), loader_close(&l);
    }
    Loader l = open_loader(path, TASK_PRETRAIN, 8, 100, false, true);
    int first[2][8], same = 0;
    for (int epoch = 0; epoch < 2; epoch++)
        for (uint64_t r = 0; r < 8; r++) {
            Batch b;
            batch_alloc(&b, 1, 8);
            loader_rows(&l, l.num_rows * (uint64_t)epoch + r, 1, &b);
            first[epoch][r] = b.tokens[0];
            batch_free(&b);
        }
    for (int r = 0; r < 8; r++) same += first[0][r] == first[1][r];
    check(same < 8, "every epoch has its own order");
    int visits[100] = {0}, unequal = 0;
    for (uint64_t position = l.num_rows; position < 4 * l.num_rows; position++) {    // epochs 1 to 3: all rows, three times
        Batch b;
        batch_alloc(&b, 1, 8);
        loader_rows(&l, position, 1, &b);
        unequal += ++visits[b.tokens[0]] != (int)(position / l.num_rows);
        batch_free(&b);
    }
    check(unequal == 0, "each epoch visits each row once");
    loader_close(&l);
    for (int i = 0; i < 2; i++) write_tokens(path_of("%s/train_%d.bin", scratch, i), tokens + 50 * i, 50, 1, TASK_PRETRAIN, 100);
    l = open_loader(scratch, TASK_PRETRAIN, 7, 100, false, false);
    Batch b;
    batch_alloc(&b, 1, 7);
    loader_rows(&l, 7, 1, &b);
    check(l.num_shards == 2 && l.num_rows == 14 && b.tokens[0] == 50 && b.targets[6] == 57, "two shards: rows don't cross their border");
    batch_free(&b), loader_close(&l);
    for (int i = 0; i < 2; i++) unlink(path_of("%s/train_%d.bin", scratch, i));
}

#define D TOKEN_DOC_START
#define P TOKEN_NO_LOSS
static const uint32_t DOCUMENTS[] = {                            // prompts (P) and answers of 2, 1, 4, 0 tokens: 4, 4, 6, 4 long
    10 | D | P, 11 | P, 12, 13,
    20 | D | P, 21 | P, 22 | P, 23,
    30 | D | P, 31 | P, 32, 33, 34, 35,
    40 | D | P, 41 | P, 42 | P, 43 | P,
};
enum { NUM_DOCUMENT_TOKENS = sizeof DOCUMENTS / 4 };

void fail_open(const char *argument) {                           // path:task:T:vocab
    char path[512];
    int task, T, vocab;
    CHECK(sscanf(argument, "%500[^:]:%d:%d:%d", path, &task, &T, &vocab) == 4, "bad test");
    Loader l = open_loader(path, (Task)task, T, vocab, false, false);
    Batch b;
    batch_alloc(&b, 1, T);
    loader_rows(&l, 0, 1, &b);
}

void test_packing(void) {
    const char *path = path_of("%s/sft.bin", scratch);
    write_tokens(path, DOCUMENTS, NUM_DOCUMENT_TOKENS, 4, TASK_SFT, 50);
    Loader l = open_loader(path, TASK_SFT, 8, 50, true, false);
    Batch b;
    batch_alloc(&b, (int)l.num_rows, 8);
    double counted = loader_rows(&l, 0, (int)l.num_rows, &b);
    static const int tokens[2][8] = {{10, 11, 12, 13, 20, 21, 22, 23}, {30, 31, 32, 33, 34, 35, 0, 0}};
    static const int weights[2][8] = {{0, 1, 1, 0, 0, 0, 1, 0}, {0, 1, 1, 1, 1, 0, 0, 0}};
    static const int starts[2][8] = {{0, 0, 0, 0, 4, 4, 4, 4}, {0, 0, 0, 0, 0, 0, 6, 6}};
    static const int documents[2][8] = {{0, 0, 0, 0, 1, 1, 1, 1}, {2, 2, 2, 2, 2, 2, -1, -1}};
    int wrong = 0;
    for (int i = 0; i < 16 && l.num_rows == 2; i++) {
        wrong += b.tokens[i] != tokens[i / 8][i % 8] || b.weights[i] != (float)weights[i / 8][i % 8] || b.start[i] != starts[i / 8][i % 8];
        wrong += b.document[i] != documents[i / 8][i % 8] || (weights[i / 8][i % 8] == 1 && b.targets[i] != tokens[i / 8][i % 8] + 1);
    }
    check(l.num_rows == 2 && l.num_dropped == 1 && wrong == 0 && counted == 7,
          "SFT rows hold whole documents; exactly the answer tokens are targets; the document without an answer is dropped");
    batch_free(&b), loader_close(&l);
    l = open_loader(path, TASK_SFT, 4, 50, true, false);
    check(l.num_rows == 3 && l.num_cut == 1 && l.num_documents == 3, "one document is longer than T + 1 = 5 tokens: cut and counted");
    loader_close(&l);
    l = open_loader(path, TASK_SFT, 2, 50, true, false);
    check(l.num_cut == 2 && l.num_documents == 2 && l.num_dropped == 2, "a prompt that leaves no room for the answer: dropped and counted");
    loader_close(&l);
    check_fails("rows that no answer fits into", fail_open, path_of("%s:1:1:50", path), "none of its 4 documents has an answer within 2 tokens");
}

void spoil(const char *path, long offset, const void *bytes, size_t count) {     // overwrites bytes of a file; count 0 cuts it there
    FILE *f = fopen(path, "r+b");
    CHECK(f != NULL, "cannot open %s", path);
    fseek(f, offset, SEEK_SET);
    fwrite(bytes, 1, count, f);
    fclose(f);
    if (count == 0) CHECK(truncate(path, offset) == 0, "cannot truncate %s", path);
}

void test_bad_token_files(void) {
    uint32_t tokens[40] = {0};
    const char *path = path_of("%s/bad.bin", scratch), *open_it = path_of("%s:0:8:100", path);
    tokens[17] = 100;
    write_tokens(path, tokens, 40, 1, TASK_PRETRAIN, 100);
    check_fails("an id beyond the vocabulary", fail_open, open_it, "token 17 has id 100, but the model's vocabulary ends at 99");
    tokens[17] = 99;
    write_tokens(path, tokens, 40, 1, TASK_PRETRAIN, 99);
    check_fails("an id beyond the header's vocabulary", fail_open, open_it, "token 17 has id 99, but the file's own vocabulary ends at 98");
    write_tokens(path, tokens, 40, 1, TASK_PRETRAIN, 100);
    Loader l = open_loader(path, TASK_PRETRAIN, 8, 100, false, false);
    check(l.num_rows == 4, "the largest id of the vocabulary is accepted");
    loader_close(&l);
    check_fails("a file of another task", fail_open, path_of("%s:1:8:100", path), "was prepared for --task pretrain, not for sft");
    spoil(path, 256 + 4 * 30, "", 0);
    check_fails("a truncated file", fail_open, open_it, "promises 40 tokens, but 30 are there");
    spoil(path, 256 + 4 * 30 - 1, "", 0);
    check_fails("a file cut inside a token", fail_open, open_it, "promises 40 tokens, but 29 are there");
    spoil(path, 100, "", 0);
    check_fails("a file shorter than its header", fail_open, open_it, "shorter than a token file's 256-byte header");
    write_tokens(path, tokens, 40, 1, TASK_PRETRAIN, 100);
    spoil(path, 8, "\2", 1);
    check_fails("another version", fail_open, open_it, "version 2");
    spoil(path, 0, "QWENTAK", 7);
    check_fails("wrong magic", fail_open, open_it, "is not a token file");
    check_fails("a directory", fail_open, path_of("%s:0:8:100", "dev"), "nothing there");
    check_fails("a missing file", fail_open, path_of("%s/none.bin:0:8:100", scratch), "nothing there");
}

// ---------------------------------------------------------------------------------------------------------------------
// Training: updates, accumulation, schedules

// A run on the tiny qwen3 fixture's shape, with random weights, on a given token file.
Run *open_run(const char *data, Task task, int batch, int accum, int T) {
    Run *run = (Run *)xcalloc(1, sizeof(Run));
    opt.batch = batch, opt.accum = accum, opt.seq = T, opt.data = data, opt.model = "test", opt.total_batch = 0, opt.epochs = 1, opt.steps = 0;
    opt.lr = 1e-3, opt.warmup = 0, opt.clip = 1.0, opt.eval_tokens = 1000;
    run->train = open_loader(data, task, T, 59, task == TASK_SFT, true);
    resolve_options(run, false);
    model_load(&run->model, FIXTURES "/qwen3");
    model_alloc_run(&run->model, batch, T, T, KEEP_ALL, TRAIN);
    return run;
}
void close_run(Run *run) { loader_close(&run->train), model_free(&run->model), free(run); }

const char *random_tokens(const char *name, uint64_t count) {
    uint32_t *tokens = (uint32_t *)xmalloc(count * 4);
    for (uint64_t i = 0; i < count; i++) tokens[i] = (uint32_t)(mix64(i) % 59);
    const char *path = path_of("%s/%s", scratch, name);
    write_tokens(path, tokens, count, 1, TASK_PRETRAIN, 59);
    free(tokens);
    return path;
}

void test_accumulation(void) {
    const char *path = path_of("%s/windows4.bin", scratch);
    uint32_t windows[21];                                        // 4 windows of 5 targets, of which 2, 1, 4 and 0 count
    for (uint32_t i = 0; i < 21; i++) windows[i] = (7 * i + 3) % 59 | ("...ppp.pppp....pppppp"[i] == 'p' ? P : 0);
    write_tokens(path, windows, 21, 1, TASK_PRETRAIN, 59);
    static const int shapes[3][2] = {{4, 1}, {1, 4}, {2, 2}};
    StepResult results[3];
    float *weights[3];
    size_t n = 0;
    for (int i = 0; i < 3; i++) {
        Run *run = open_run(path, TASK_PRETRAIN, shapes[i][0], shapes[i][1], 5);
        Batch update;
        batch_alloc(&update, 4, 5);
        results[i] = train_step(run, &update);
        n = run->model.table.num_params;
        weights[i] = (float *)xmalloc(n * sizeof(float));
        memcpy(weights[i], run->model.params_memory, n * sizeof(float));
        batch_free(&update), close_run(run);
    }
    for (int i = 1; i < 3; i++) {
        double loss = fabs(results[i].loss - results[0].loss) / results[0].loss, norm = fabs(results[i].norm - results[0].norm) / results[0].norm;
        check(loss <= 1e-6 && norm <= 1e-5, "4 rows with unequal numbers of targets as %d x %d and 4 x 1: loss off by %.0e, gradient norm by %.0e", shapes[i][0],
              shapes[i][1], loss, norm);
    }
    bool finite = true;
    for (size_t i = 0; i < n; i++) finite &= isfinite(weights[1][i]) != 0;
    check(finite && results[1].targets == 7, "a micro-batch without a target (1 x 4) adds nothing and makes no NaN");
    for (int i = 0; i < 3; i++) free(weights[i]);

    uint32_t prompts[9];
    for (uint32_t i = 0; i < 9; i++) prompts[i] = i | P;
    write_tokens(path, prompts, 9, 1, TASK_PRETRAIN, 59);
    Run *run = open_run(path, TASK_PRETRAIN, 1, 1, 8);
    n = run->model.table.num_params;
    float *before = (float *)xmalloc(n * sizeof(float));
    memcpy(before, run->model.params_memory, n * sizeof(float));
    Batch update;
    batch_alloc(&update, 1, 8);
    StepResult r = train_step(run, &update);
    check(r.loss == 0 && r.targets == 0 && memcmp(before, run->model.params_memory, n * sizeof(float)) == 0, "an update without any target changes nothing");
    batch_free(&update), free(before), close_run(run);
}

void test_epoch(void) {
    const char *path = random_tokens("epoch.bin", 8 * 2 * 2 * 5 + 9);        // T 8, B 2, accumulation 2: five updates and some left over
    Run *run = open_run(path, TASK_PRETRAIN, 2, 2, 8);
    Batch update;
    batch_alloc(&update, 4, 8);
    int windows_seen[64] = {0}, twice = 0;
    check(run->steps == 5, "one epoch of 169 tokens, total batch 32: %lld updates", (long long)run->steps);
    while (run->step < run->steps) {
        for (int i = 0; i < 4; i++) {
            uint64_t row = run->position + (uint64_t)i, epoch = row / run->train.num_rows;
            uint64_t window = permute(row % run->train.num_rows, run->train.num_rows, mix64(run->train.seed) + epoch);
            twice += windows_seen[window]++ > 0;
        }
        train_step(run, &update);
    }
    check(twice == 0 && run->position == 20, "each window is used at most once in an epoch");
    batch_free(&update), close_run(run);
}

void fail_open_run(const char *argument) {                       // path:batch:accum:T
    char path[512];
    int batch, accum, T;
    CHECK(sscanf(argument, "%500[^:]:%d:%d:%d", path, &batch, &accum, &T) == 4, "bad test");
    open_run(path, TASK_PRETRAIN, batch, accum, T);
}
void test_too_little_data(void) {
    const char *path = random_tokens("short.bin", 64);
    check_fails("B*T tokens are one too few", fail_open_run, path_of("%s:4:1:16", path), "64 tokens, enough for 3 rows");
    path = random_tokens("short.bin", 65);
    Run *run = open_run(path, TASK_PRETRAIN, 4, 1, 16);
    Batch update;
    batch_alloc(&update, 4, 16);
    StepResult r = train_step(run, &update);
    check(run->steps == 1 && isfinite(r.loss), "with B*T + 1 tokens exactly one batch runs");
    batch_free(&update), close_run(run);
    check_fails("accumulation counts too", fail_open_run, path_of("%s:2:3:16", path), "it needs 97 tokens or more");
}

// Two runs, the second with evaluation and sampling after every update and with another number of threads: the same bits.
void test_bits(void) {
    const char *path = random_tokens("bits.bin", 2000);
    float *weights[3];
    double losses[3] = {0};
    size_t n = 0;
    for (int i = 0; i < 3; i++) {
#ifdef _OPENMP
        int threads = omp_get_max_threads();
        omp_set_num_threads(i == 2 ? 3 : threads);
#endif
        Run *run = open_run(path, TASK_PRETRAIN, 3, 2, 33);
        Tokenizer tokenizer = {};
        tokenizer.num_ranks = tokenizer.vocab_size = 59, tokenizer.im_end = tokenizer.endoftext = -1;
        run->val = open_loader(path, TASK_PRETRAIN, 33, 59, false, false);
        Batch update;
        batch_alloc(&update, 6, 33);
        for (int step = 0; step < 6; step++) {
            losses[i] += train_step(run, &update).loss;
            if (i != 1) continue;
            evaluate(run);
            int prompt[3] = {1, 2, 3};
            Sampler sampler = {1.1, 1.0, 0, 0.9, 0, false};
            Sequence sequence = {};
            FILE *nowhere = fopen("/dev/null", "w");
            sequence_set(&sequence, prompt, 3);
            generate(&run->model, &sequence, &tokenizer, 10, &sampler, 1, print_id, nowhere);
            fclose(nowhere), free(sequence.tokens);
        }
        n = run->model.table.num_params * sizeof(float);
        weights[i] = (float *)xmalloc(n);
        memcpy(weights[i], run->model.params_memory, n);
        loader_close(&run->val), batch_free(&update), close_run(run);
#ifdef _OPENMP
        omp_set_num_threads(threads);
#endif
    }
    check(losses[0] == losses[1] && memcmp(weights[0], weights[1], n) == 0, "evaluation and sampling change no bit of the training");
    check(losses[0] == losses[2] && memcmp(weights[0], weights[2], n) == 0, "three threads give the same bits as %s", "the default number");
    for (int i = 0; i < 3; i++) free(weights[i]);
}

void test_schedules(void) {
    for (int s = COSINE; s <= CONSTANT; s++) {
        bool rises = true, falls = true, positive = true;
        double previous = 0, last = 0;
        for (int64_t step = 1; step <= 200; step++) {
            last = learning_rate((Schedule)s, step, 200, 20, 3e-4, 0.1);
            if (step <= 20) rises &= last > previous;
            else falls &= last <= previous;
            positive &= last > 0;
            previous = last;
        }
        double end = s == CONSTANT ? 3e-4 : 3e-5;
        check(rises && falls && positive && fabs(last - end) < 1e-12 && fabs(learning_rate((Schedule)s, 20, 200, 20, 3e-4, 0.1) - 3e-4) < 1e-12,
              "%s: rises over the warm-up to the peak, never after, ends at %g", SCHEDULE_NAMES[s], end);
    }
    check(learning_rate(COSINE, 1, 1, 0, 1.0, 0.0) >= 0 && learning_rate(LINEAR, 10, 10, 0, 1.0, 0.0) == 0, "schedules of one update, and down to 0");
    check(fabs(learning_rate(COSINE, 60, 100, 20, 1.0, 0.0) - 0.5) < 1e-12, "cosine is at half in the middle");
}

void test_sampler(void) {
    float logits[5];
    int counts[4][5] = {{0}};
    Sampler samplers[4] = {{1, 1, 0, 1, 0, false}, {1, 1, 2, 1, 0, false}, {1, 1, 0, 0.6, 0, false}, {1, 0.5, 0, 1, 0, false}};
    static const double probabilities[5] = {0.4, 0.3, 0.15, 0.1, 0.05};
    for (int s = 0; s < 4; s++)
        for (int i = 0; i < 20000; i++) {
            for (int j = 0; j < 5; j++) logits[j] = (float)log(probabilities[(j + 2) % 5]);    // the best are 3, 4, 0, 1, 2
            counts[s][(sample(logits, 5, &samplers[s], random_uniform(9, (uint64_t)i)) + 2) % 5]++;
        }
    static const double wanted[4][5] = {{0.4, 0.3, 0.15, 0.1, 0.05}, {4 / 7.0, 3 / 7.0, 0, 0, 0}, {4 / 7.0, 3 / 7.0, 0, 0, 0},
                                        {0.16 / 0.285, 0.09 / 0.285, 0.0225 / 0.285, 0.01 / 0.285, 0.0025 / 0.285}};
    static const char *const names[4] = {"plain", "top-k 2", "top-p 0.6", "temperature 0.5"};
    for (int s = 0; s < 4; s++) {
        double worst = 0;
        for (int j = 0; j < 5; j++) if (!(fabs(counts[s][j] / 20000.0 - wanted[s][j]) <= worst)) worst = fabs(counts[s][j] / 20000.0 - wanted[s][j]);
        check(worst < 0.015, "sampling, %s: frequencies within %.3f of the probabilities", names[s], worst);
    }
}

void test_presets(void) {
    static const struct { const char *name; size_t count; } known[] = {
        {"mini_llm_1.4b", 1431996416}, {"qwen2.5-0.5b", 494032768}, {"qwen2.5-1.5b", 1543714304}, {"qwen2.5-3b", 3085938688},
        {"qwen2.5-7b", 7615616512}, {"qwen3-0.6b", 596049920}, {"qwen3-1.7b", 1720574976}, {"qwen3-4b", 4022468096}};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        TensorTable table = tensor_table(&find_preset(known[i].name)->config);
        check(table.num_params == known[i].count, "%s has %zu parameters", known[i].name, table.num_params);
        free(table.list);
    }
}

void test_init(void) {
    Config c = find_preset("tiny")->config;
    c.V = 500;
    Model m = {};
    model_alloc(&m, &c);
    init_params(m.params_memory, &c, &m.table, 1);
    int wrong = 0;
    for (int k = 0; k < m.table.count; k++) {
        const TensorInfo *t = &m.table.list[k];
        size_t n = t->rows * t->cols;
        double sum = 0, squares = 0;
        for (size_t i = 0; i < n; i++) {
            double x = (double)m.params_memory[t->offset + i];
            sum += x, squares += x * x;
        }
        double mean = sum / (double)n, deviation = sqrt(squares / (double)n - mean * mean);
        double wanted = t->init == NORMAL ? 0.02 : t->init == SCALED ? 0.02 / sqrt(2.0 * c.L) : 0, wanted_mean = t->init == ONES;
        wrong += fabs(mean - wanted_mean) > 4 * wanted / sqrt((double)n) + 1e-12 || fabs(deviation - wanted) > 0.03 * wanted + 1e-6;
    }
    check(wrong == 0, "initialisation: every tensor has its mean and deviation");
    check(m.params.layers[0].wk == m.params.layers[0].wq + (size_t)c.NH * (size_t)c.HD * (size_t)c.C
          && m.params.layers[0].w_up == m.params.layers[0].w_gate + (size_t)c.I * (size_t)c.C, "wq, wk, wv and w_gate, w_up are fused in memory");
    model_free(&m);
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints

void test_checkpoint_round_trip(void) {
    for (int v1 = 0; v1 < 2; v1++) {
        Model m = {}, back = {};
        const char *directory = path_of("%s/saved", scratch);
        model_load(&m, v1 ? FIXTURES "/qwen" : FIXTURES "/qwen3");
        make_directory(directory);
        config_save(&m.config, path_of("%s/config.json", directory), F32, 0);
        model_save(&m, directory, F32);
        model_load(&back, directory);
        check(memcmp(m.params_memory, back.params_memory, m.table.num_params * sizeof(float)) == 0, "%s: saved and loaded, the same bits", v1 ? "qwen (v1)" : "qwen3");
        model_free(&back);
        model_save(&m, directory, BF16);
        model_load(&back, directory);
        size_t wrong = 0;
        for (size_t i = 0; i < m.table.num_params; i++) wrong += back.params_memory[i] != bf16_to_float(float_to_bf16(m.params_memory[i]));
        check(wrong == 0, "%s: saved as bf16, loaded rounded", v1 ? "qwen (v1)" : "qwen3");
        model_free(&m), model_free(&back), delete_directory(directory);
    }
}

void fail_load(const char *directory) { Model m = {}; model_load(&m, directory); }

// Copies the qwen2 fixture, with the first `from` in config.json replaced by `to` (NULL: nothing replaced).
const char *copy_model(const char *family, const char *from, const char *to) {
    const char *directory = path_of("%s/model", scratch);
    make_directory(directory);
    size_t size;
    char *weights = read_file(path_of(FIXTURES "/%s/model.safetensors", family), &size), *config = read_file(path_of(FIXTURES "/%s/config.json", family), NULL);
    const char *path = path_of("%s/model.safetensors", directory);
    FILE *f = create_file(path);
    fwrite(weights, 1, size, f);
    close_file(f, path);
    path = path_of("%s/config.json", directory);
    f = create_file(path);
    char *at = from ? strstr(config, from) : NULL;
    CHECK(!from || at, "the fixture's config.json lacks %s", from);
    if (at) fprintf(f, "%.*s%s%s", (int)(at - config), config, to, at + strlen(from));
    else fputs(config, f);
    close_file(f, path);
    free(weights), free(config);
    return directory;
}

// Writes a model.safetensors of its own header.
void write_header(const char *directory, const char *header, size_t data) {
    const char *path = path_of("%s/model.safetensors", directory);
    FILE *f = create_file(path);
    uint64_t length = strlen(header);
    fwrite(&length, 8, 1, f), fputs(header, f);
    for (size_t i = 0; i < data; i++) putc(0, f);
    close_file(f, path);
}

void test_bad_models(void) {
    static const struct { const char *family, *from, *to, *message; } configs[] = {
        {"qwen2", "\"hidden_size\"", "\"hidden_sise\"", "lacks \"hidden_size\""},
        {"qwen2", "\"num_key_value_heads\"", "\"x\"", "lacks \"num_key_value_heads\""},
        {"qwen2", "\"rms_norm_eps\"", "\"x\"", "lacks \"rms_norm_eps\""},
        {"qwen2_bf16", "\"rope_theta\"", "\"x\"", "lacks \"rope_theta\""},
        {"qwen", "\"kv_channels\"", "\"x\"", "lacks \"kv_channels\""},
        {"qwen2", "\"qwen2\"", "\"llama\"", "\"model_type\" is llama"},
        {"qwen2_bf16", "\"use_sliding_window\": false", "\"use_sliding_window\": true", "sliding-window attention is not supported"},
        {"qwen2", "{", "{\"quantization_config\": {\"bits\": 4},", "\"quantization_config\" is not supported"},
        {"qwen2", "{", "{\"num_experts\": 8,", "\"num_experts\" is not supported"},
        {"qwen2_bf16", "\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0}", "\"rope_scaling\" of type yarn is not supported"},
        {"qwen2", "{", "", "is not JSON"},
        {"qwen2", "\"hidden_size\": 24", "\"hidden_size\": 24.5", "it should be a whole number"},
        {"qwen2", "\"hidden_size\": 24", "\"hidden_size\": \"24\"", "should be a number"},
        {"qwen2", "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "is not a multiple of"},
        {"qwen2", "\"vocab_size\": 61", "\"vocab_size\": 60", "model.embed_tokens.weight has shape [61,24], the model needs [60,24]"},
        {"qwen2", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "model.layers.2.input_layernorm.weight is missing"},
        {"qwen2", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", "is not part of this model"},
    };
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++) {
        bool rounded = strcmp(configs[i].family, "qwen2_bf16") == 0;
        const char *directory;
        if (rounded) {                                           // only its config.json matters
            directory = copy_model("qwen2", NULL, NULL);
            char *config = read_file(FIXTURES "/qwen2_bf16/config.json", NULL), *at = strstr(config, configs[i].from);
            CHECK(at, "the fixture's config.json lacks %s", configs[i].from);
            const char *path = path_of("%s/config.json", directory);
            FILE *f = create_file(path);
            fprintf(f, "%.*s%s%s", (int)(at - config), config, configs[i].to, at + strlen(configs[i].from));
            close_file(f, path);
            free(config);
        } else directory = copy_model(configs[i].family, configs[i].from, configs[i].to);
        check_fails("config.json", fail_load, directory, configs[i].message);
    }
    const char *directory = copy_model("qwen2", NULL, NULL), *weights = path_of("%s/model.safetensors", directory);
    struct stat st;
    stat(weights, &st);
    spoil(weights, (long)st.st_size - 10, "", 0);
    check_fails("truncated weights", fail_load, directory, "the file is truncated or damaged");
    spoil(weights, 1000, "", 0);
    check_fails("weights cut in the header", fail_load, directory, "its header should be");
    spoil(weights, 5, "", 0);
    check_fails("weights of 5 bytes", fail_load, directory, "too short for a safetensors file");
    write_header(directory, "{\"a\":{}}", 0);
    check_fails("an entry without dtype", fail_load, directory, "lacks dtype, shape or data_offsets");
    write_header(directory, "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12);
    check_fails("overlapping tensors", fail_load, directory, "tensors a and b overlap");
    write_header(directory, "{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8);
    check_fails("shape and bytes disagree", fail_load, directory, "has 3 elements but 8 bytes");
    write_header(directory, "{\"a\":{\"dtype\":\"I8\",\"shape\":[8],\"data_offsets\":[0,8]}}", 8);
    check_fails("integer weights", fail_load, directory, "has dtype I8");
    write_header(directory, "{\"a\":", 8);
    check_fails("a header that is not JSON", fail_load, directory, "its header is not JSON");
    write_header(directory, "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4],\"data_offsets\":[0,0]}}", 0);
    check_fails("a shape that overflows", fail_load, directory, "the file is damaged");
    unlink(weights);
    check_fails("no weights", fail_load, directory, "holds neither model.safetensors nor model.safetensors.index.json");
    delete_directory(directory);
    check_fails("no directory", fail_load, directory, "cannot open");
}

int main(void) {
    snprintf(scratch, sizeof scratch, "/tmp/test_train_XXXXXX");
    CHECK(mkdtemp(scratch) != NULL, "cannot make a temporary directory: %s", strerror(errno));
    float nan_pair[2] = {1, NAN}, ones[2] = {1, 1};
    check(!(relative_error(nan_pair, ones, 2) <= 1e30), "the comparison itself: NaN is not close to anything");
    static const char *const families[] = {"qwen", "qwen2", "qwen3"};
    for (int i = 0; i < 3; i++) test_family(families[i], 3, 13), test_adamw(families[i], 3, 13);
    test_greedy("qwen2"), test_greedy("qwen3");
    test_rounded("qwen2_bf16", 3, 13), test_rounded("qwen3_fp16", 3, 13);
    test_layers(), test_long_attention(), test_gemm(), test_exp(), test_halves(), test_half_weights();
    test_permute(), test_windows(), test_packing(), test_bad_token_files();
    test_accumulation(), test_epoch(), test_too_little_data(), test_bits(), test_schedules(), test_sampler();
    test_presets(), test_init(), test_checkpoint_round_trip(), test_bad_models();
    delete_directory(scratch);
    return verdict();
}

// bench.c: how near train_qwen.c comes to what this processor can do. `make bench`, about two minutes on two cores.
//
// Prints the machine's limits (multiply-adds on registers, memory bandwidth), then each matrix product of training, each layer, whole
// updates and generation, as rates and as fractions of their limit. bench.h says how a fraction is measured.
// With a word as argument only the parts whose names begin with it: limits, matmul, layers, update, generate.

#define QWEN_NO_MAIN
#include "../../train_qwen.c"
#include "bench.h"

static int threads = 1;

// small numbers of both signs, so that nothing overflows and exp is real work
float *filled(size_t count) {
    float *memory = (float *)xmalloc(count * sizeof(float));
    #pragma omp parallel for
    for (size_t i = 0; i < count; i++) memory[i] = 0.001f * (float)((int)(i * 2654435761u >> 8 & 1023) - 512);
    return memory;
}

// ---- matrix products ----

typedef enum { FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT } Product;
typedef struct { Product product; int N, K, O; float *x, *w, *y; } MatmulCase;
void run_matmul(void *argument) {
    MatmulCase *c = (MatmulCase *)argument;
    View x = view(c->x, c->K, 1), w = view(c->w, c->K, 1), y = view(c->y, c->O, 1);
    if (c->product == FORWARD) gemm(c->y, c->O, x, view(c->w, 1, c->K), c->N, c->O, c->K, OVERWRITE);
    if (c->product == BACKWARD_INPUT) gemm(c->x, c->K, y, w, c->N, c->K, c->O, OVERWRITE);
    if (c->product == BACKWARD_WEIGHT) gemm(c->w, c->K, view(c->y, 1, c->O), x, c->O, c->K, c->N, ACCUMULATE);
}

void bench_matmul(void) {
    static const int shapes[][3] = {{2048, 256, 768}, {2048, 256, 1408}, {2048, 704, 256}, {2048, 512, 1536}, {1024, 1024, 4096},
                                    {2048, 256, 7680}, {256, 128, 768}, {256, 384, 128}, {256, 128, 7680}};
    enum { COUNT = sizeof shapes / sizeof shapes[0] };
    for (int t = 1; t <= threads; t = t < threads ? threads : threads + 1) {
        double log_sum = 0, log_best = 0, least = 1;
        printf("\nmatmul, %d thread%s           y = x W^T           dx = dy W           dW += dy^T x\n", t, t == 1 ? "" : "s");
        printf("  rows   in ->   out       GFLOP/s   %%        GFLOP/s   %%        GFLOP/s   %% of the FMA peak\n");
        for (int i = 0; i < COUNT; i++) {
            MatmulCase c = {FORWARD, shapes[i][0], shapes[i][1], shapes[i][2], NULL, NULL, NULL};
            c.x = filled((size_t)c.N * c.K), c.w = filled((size_t)c.O * c.K), c.y = filled((size_t)c.N * c.O);
            printf("  %4d %4d -> %5d ", c.N, c.K, c.O);
            for (int product = FORWARD; product <= BACKWARD_WEIGHT; product++) {
                c.product = (Product)product;
                double flops = 2.0 * c.N * c.K * c.O, seconds, fraction = measure_flops(run_matmul, &c, flops, t, 9, 0.6, &seconds);
                printf("      %8.1f  %3.0f ", flops / seconds / 1e9, 100 * fraction);
                fflush(stdout);
                log_sum += log(fraction), log_best += log(best_fraction);
                if (fraction < least) least = fraction;
            }
            printf("\n");
            free(c.x), free(c.w), free(c.y);
        }
        printf("  geometric mean %.1f %%, least %.1f %%; of the best samples against the highest peak seen: geometric mean %.1f %%\n",
               100 * exp(log_sum / (3 * COUNT)), 100 * least, 100 * exp(log_best / (3 * COUNT)));
    }
}

// ---- layers ----

typedef struct { Model model; Batch batch; float *x, *y, *dx, *dy; int B, T; } Layers;
void run_embedding_backward(void *p) {
    Layers *s = (Layers *)p; embedding_backward(s->model.grads.wte, s->dx, s->batch.tokens, s->B * s->T, s->model.config.C);
}
void run_rmsnorm_forward(void *p) {
    Layers *s = (Layers *)p; Config *c = &s->model.config;
    rmsnorm_forward(s->y, s->model.acts.rstd, s->x, s->model.params.norm, s->B * s->T, 1, c->C, c->C, 1e-6f);
}
void run_rmsnorm_backward(void *p) {
    Layers *s = (Layers *)p; Config *c = &s->model.config;
    rmsnorm_backward(s->dx, s->model.grads.norm, s->dy, s->x, s->model.params.norm, s->model.acts.rstd, s->B * s->T, 1, c->C, c->C,
                     ACCUMULATE);
}
void run_rope(void *p) {
    Layers *s = (Layers *)p; Config *c = &s->model.config;
    rope(s->model.acts.layers[0].qkv, s->model.acts.positions, s->model.rope, s->B * s->T, c->NH + c->NKV, c->HD, qkv_width(c),
         ROPE_FORWARD);
}
void run_swiglu_forward(void *p) {
    Layers *s = (Layers *)p; LayerActs *a = s->model.acts.layers;
    swiglu_forward(a->act, a->gate_up, s->B * s->T, s->model.config.I);
}
void run_swiglu_backward(void *p) {
    Layers *s = (Layers *)p; Activations *a = &s->model.acts;
    swiglu_backward(a->dgate_up, a->dact, a->layers[0].gate_up, s->B * s->T, s->model.config.I);
}
void run_attention_forward(void *p) {
    Layers *s = (Layers *)p; Config *c = &s->model.config; LayerActs *a = s->model.acts.layers;
    float *k = a->qkv + c->NH * c->HD, *v = k + c->NKV * c->HD;
    attention_forward(a->att, a->lse, a->qkv, k, v, s->batch.start, s->B, s->T, c->NH, c->NKV, c->HD, qkv_width(c));
}
void run_attention_backward(void *p) {
    Layers *s = (Layers *)p; Config *c = &s->model.config; LayerActs *a = s->model.acts.layers;
    float *k = a->qkv + c->NH * c->HD, *v = k + c->NKV * c->HD, *dq = s->model.acts.dqkv, *dk = dq + c->NH * c->HD,
        *dv = dk + c->NKV * c->HD;
    attention_backward(dq, dk, dv, s->model.acts.datt, a->att, a->lse, a->qkv, k, v, s->batch.start, s->B, s->T, c->NH, c->NKV, c->HD,
                       qkv_width(c));
}
void run_classifier(void *p) {
    Layers *s = (Layers *)p; Config *c = &s->model.config; Activations *a = &s->model.acts;
    classifier(a->losses, a->dh, s->model.grads.head, s->x, s->model.params.head, s->batch.targets, s->batch.weights, 1e-3f, a->logits, s->B * s->T,
               c->C, c->V);
}
void run_norm(void *p) { Model *m = &((Layers *)p)->model; keep_result = (float)gradient_norm(m->grads_memory, m->table.num_params); }
void run_adamw(void *p) {
    static const AdamW adamw = {1e-4f, 0.9f, 0.99f, 1e-8f, 0.1f};
    adamw_step(&((Layers *)p)->model, &adamw, 0.5f, 10);
}

Layers layers_make(const Config *c, int B, int T) {
    Layers s = {};
    size_t N = (size_t)B * (size_t)T;
    model_alloc(&s.model, c);
    float *params = filled(s.model.table.num_params);
    memcpy(s.model.params_memory, params, s.model.table.num_params * sizeof(float));
    free(params);
    model_alloc_run(&s.model, B, T, T, KEEP_ALL, TRAIN);
    s.B = B, s.T = T;
    batch_alloc(&s.batch, B, T);
    for (size_t n = 0; n < N; n++) {
        s.batch.tokens[n] = (int)(mix64(n) % (uint64_t)c->V), s.batch.targets[n] = (int)(mix64(n + 1) % (uint64_t)c->V);
        s.batch.start[n] = 0, s.batch.document[n] = 0, s.batch.weights[n] = 1;
    }
    s.x = filled(N * (size_t)c->C), s.y = filled(N * (size_t)c->C), s.dx = filled(N * (size_t)c->C), s.dy = filled(N * (size_t)c->C);
    return s;
}
void layers_free(Layers *s) {
    model_free(&s->model);
    batch_free(&s->batch);
    free(s->x), free(s->y), free(s->dx), free(s->dy);
}

void bench_layers(void) {
    //                 V     C   L NH NKV HD    I  max_T  base   eps    bias   qk_norm tied
    Config c = {7680, 512, 4, 8, 4, 64, 1408, 4096, 10000, 1e-6f, false, false, true};
    int B = 4, T = 512;
    Layers s = layers_make(&c, B, T);
    model_loss(&s.model, &s.batch, B, T, 1.0f / (float)(B * T), TRAIN);    // real numbers everywhere
    double N = B * T, C = c.C, I = c.I, params = (double)s.model.table.num_params, QKV = qkv_width(&c);
    double attention_flops = 2.0 * B * c.NH * T * (T + 1.0) / 2 * c.HD;  // of one product over the pairs (query, key <= query)
    struct { const char *name; Runnable *run; double flops, bytes; } kernels[] = {
        {"attention forward", run_attention_forward, 2 * attention_flops, 0},
        {"attention backward", run_attention_backward, 5 * attention_flops, 0},
        {"classifier, both ways", run_classifier, 6 * N * C * c.V, 0},
        {"rmsnorm forward", run_rmsnorm_forward, 0, 4 * 2 * N * C},
        {"rmsnorm backward", run_rmsnorm_backward, 0, 4 * 4 * N * C},
        {"rope", run_rope, 0, 4 * 2 * N * (QKV - c.NKV * c.HD)},
        {"swiglu forward", run_swiglu_forward, 0, 4 * 3 * N * I},
        {"swiglu backward", run_swiglu_backward, 0, 4 * 5 * N * I},
        {"embedding backward", run_embedding_backward, 0, 4 * 3 * N * C},
        {"gradient norm", run_norm, 0, 4 * params},
        {"AdamW", run_adamw, 0, 4 * 8 * params},
    };
    printf("\nlayers, %d threads, width %d, %d x %d tokens\n  %-22s %10s %12s %12s\n", threads, c.C, B, T, "", "ms", "rate", "% of limit");
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++) {
        double seconds, fraction;
        if (kernels[i].flops > 0) {
            fraction = measure_flops(kernels[i].run, &s, kernels[i].flops, threads, 9, 1.5, &seconds);
            printf("  %-22s %10.3f %7.1f GF/s %10.0f   of the FMA peak\n", kernels[i].name, 1e3 * seconds,
                   kernels[i].flops / seconds / 1e9, 100 * fraction);
        } else {
            double times[9], limit = triad(threads, 2);
            for (int k = 0; k < 9; k++) {
                double begin = now_s();
                for (int r = 0; r < 4; r++) kernels[i].run(&s);
                times[k] = (now_s() - begin) / 4;
            }
            seconds = median(times, 9), fraction = kernels[i].bytes / seconds / limit;
            printf("  %-22s %10.3f %7.1f GB/s %10.0f   of the triad%s\n", kernels[i].name, 1e3 * seconds, kernels[i].bytes / seconds / 1e9,
                   100 * fraction,
                   fraction > 1 ? " (it runs in the cache)" : "");
        }
        fflush(stdout);
    }
    layers_free(&s);
}

// ---- whole updates ----

typedef struct { Layers *layers; long step; } UpdateCase;
void run_update(void *argument) {
    UpdateCase *u = (UpdateCase *)argument;
    static const AdamW adamw = {1e-5f, 0.9f, 0.99f, 1e-8f, 0.1f};
    int rows = u->layers->B;
    machine_update(&u->layers->model, &u->layers->batch, rows, (double)rows * u->layers->T, &adamw, 1.0, ++u->step);
}

void bench_update(void) {
    static const struct { const char *name; Config config; int B, T; } cases[] = {
        //                            V     C   L  NH NKV HD   I   max_T  base    eps    bias  qk_norm tied
        {"tiny (the default run)", {7680,  128, 5,  2, 1, 64,  384, 4096, 10000, 1e-6f, false, true,  true}, 2, 128},
        {"width 256, 8 layers",    {7680,  256, 8,  4, 2, 64,  704, 4096, 10000, 1e-6f, true,  false, true}, 8, 256},
        {"width 512, 8 layers",    {7680,  512, 8,  8, 4, 64, 1408, 4096, 10000, 1e-6f, true,  false, true}, 4, 256},
        {"width 1024, 4 layers",   {7680, 1024, 4, 16, 8, 64, 2816, 4096, 10000, 1e-6f, true,  false, true}, 4, 256},
    };
    for (int t = 1; t <= threads; t = t < threads ? threads : threads + 1) {
        printf("\nupdate (forward, backward, clip, AdamW), %d thread%s\n  %-26s %9s %11s %15s %7s\n", t, t == 1 ? "" : "s", "", "ms",
               "tokens/s", "% of FMA peak", "best");
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
            const Config *c = &cases[i].config;
            int B = cases[i].B, T = cases[i].T;
            Layers s = layers_make(c, B, T);
            init_params(s.model.params_memory, c, &s.model.table, 1);
            UpdateCase u = {&s, 0};
            double flops = flops_per_token(c, T) * B * T, seconds, fraction = measure_flops(run_update, &u, flops, t, 7, 8, &seconds);
            printf("  %-26s %9.1f %11.0f %15.1f %7.1f\n", cases[i].name, 1e3 * seconds, B * T / seconds, 100 * fraction,
                   100 * best_fraction);
            fflush(stdout);
            layers_free(&s);
        }
    }
}

// ---- generation ----

void bench_generate(void) {
    Config c = find_preset("qwen2.5-0.5b")->config;
    for (int bf16 = 0; bf16 < 2; bf16++) {
        Model m = {};
        model_alloc(&m, &c);
        #pragma omp parallel for
        for (size_t i = 0; i < m.table.num_params; i++)          // numbers of 8 bits are bf16 numbers, of 9 bits they are not
            m.params_memory[i] = (float)((int)(i * 2654435761u >> 8 & 127) - 64 + (bf16 ? 0 : 0.001f)) / 4096.0f;
        machine_open(&m, 1, 64, 1, 256, KEEP_ALL, EVALUATE);
        machine_rewind(&m, 0);
        int prompt[64];
        for (int i = 0; i < 64; i++) prompt[i] = i * 37;
        double begin = now_s(), times[15], limits[15], weights = (double)m.table.num_params * (bf16 ? 2 : 4);
        machine_decode(&m, prompt, 64);
        if (bf16 == 0) printf("\ngeneration, %d threads, Qwen2.5-0.5B's shape: prompt of 64 tokens in %.2f s\n", threads, now_s() - begin);
        for (int i = 0; i < 15; i++) {
            double limit = triad(threads, 1);
            begin = now_s();
            machine_decode(&m, prompt, 1);
            times[i] = now_s() - begin, limits[i] = weights / times[i] / limit;
        }
        double seconds = median(times, 15);
        printf("  weights in %s: %6.2f tokens/s, %5.1f GB/s of weights, %.0f %% of the triad\n", bf16 ? "bf16" : "fp32", 1 / seconds,
               weights / seconds / 1e9, 100 * median(limits, 15));
        machine_close(&m);
    }
}

int main(int argc, char **argv) {
    const char *only = argc > 1 ? argv[1] : "";
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    #define PART(name) (strncmp(name, only, strlen(only)) == 0)
    CHECK(PART("limits") || PART("matmul") || PART("layers") || PART("update") || PART("generate"),
          "%s is no part; there are limits, matmul, layers, update, generate", only);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("%s, %s\n", processor_name(), machine_text());
    for (int t = 1; t <= threads; t = t < threads ? threads : threads + 1)
        printf("limits with %d thread%s: FMA %.1f GFLOP/s, triad %.1f GB/s\n", t, t == 1 ? "" : "s", fma_peak(t, 0.3) / 1e9, triad(t,
            5) / 1e9);
    if (PART("matmul")) bench_matmul();
    if (PART("layers")) bench_layers();
    if (PART("update")) bench_update();
    if (PART("generate")) bench_generate();
    return 0;
}

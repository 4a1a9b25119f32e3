// bench.h: what the programs of dev/cuda share. Each holds one family of kernels, from the CPU loop to the launcher of train_qwen.cu:
//
//    inp = array_random("inp", FLOATX, N * C, 1)           values on both sides, equal to the last bit
//    rmsnorm_forward(out.host, rstd.host, inp.host, ...)   the CPU function: .host then holds what is expected
//    bench("rmsnorm_forward", versions, bytes, flops, {{&out, &rstd}})
//
// bench runs every version at every block size from the same start and compares its outputs with .host, at every size in turn. At the last
// size it prints a row for each version and block. On a GPU that size is a real one, and a row has the time: 5 warm-ups, then 50 runs
// (fewer if they take more than a second), the L2 cache overwritten before each; median, minimum, rate, and the share of the peak that
// was measured on the same card in the same run. The emulator leaves that size out and only checks: its time says nothing about a GPU.
#ifndef BENCH_H
#define BENCH_H
#define QWEN_NO_MAIN
#include "../../train_qwen.cu"

typedef enum { FLOAT, FLOATX, INT } Type;
typedef struct {
    const char *name;
    Type type;
    size_t count;
    float roundings;                              // the tolerance of an output, see below; begins as 1 for FLOATX, 0 for FLOAT
    union { float *host; int *host_i; };          // what the CPU function reads and writes
    union { float *f; floatX *x; int *i; char *device; };
    char *start;                                  // on the device: what is there before each version
} Array;

// Rounding to bf16 (8 significant bits) moves a number by 2^-8 of itself at most. What is made of rounded numbers needs one for each
// rounding on its way, and a sum of many rounded terms, which may cancel while their errors don't, about 3. Sums in another order: 2e-5.
static const double TOLERANCE_SUM = 2e-5, TOLERANCE_ROUNDING = sizeof(floatX) == 4 ? 0 : 0.00390625;

enum { MAX_BLOCKS = 4, MAX_OUTPUTS = 6, WARM_UPS = 5, RUNS = 50, SCRATCH_FLOATS = 1 << 22, MAX_ARRAYS = 32 };
typedef struct {
    const char *name;
    void (*run)(int block);                       // launches on `stream`
    int blocks[MAX_BLOCKS] = {};                  // until the first 0; none: the launcher chooses
    double worst[MAX_BLOCKS] = {};                // error / tolerance so far, at all sizes
} Version;
typedef struct { Array *list[MAX_OUTPUTS]; } Outputs;     // the rest is NULL

static struct {
    char size[64];                                // "33 72"
    bool last, timed;                             // the size whose rows are printed; on a GPU they are timed
    int rows, failed;
    double peak_gbps, peak_tflops;                // measured
    char *flush;                                  // twice the L2 cache
    size_t flush_bytes;
    Array arrays[MAX_ARRAYS];                     // of the present size
    int num_arrays;
} bench_state;
static float *scratch;                            // SCRATCH_FLOATS on the device, for partial sums

size_t array_bytes(const Array *a) { return a->count * (a->type == FLOATX ? sizeof(floatX) : 4); }

void array_begin(const Array *a) { cudaCheck(cudaMemcpyAsync(a->device, a->start, array_bytes(a), cudaMemcpyDeviceToDevice, stream)); }

// An output that is written, not read: NaN on both sides.
Array array_output(const char *name, Type type, size_t count) {
    Array a = {};
    a.name = name, a.type = type, a.count = count, a.roundings = type == FLOATX;
    a.host = (float *)memset(xmalloc(count * 4), 0xFF, count * 4);
    a.device = device_alloc<char>(array_bytes(&a)), a.start = device_alloc<char>(array_bytes(&a));
    cudaCheck(cudaMemsetAsync(a.start, 0xFF, array_bytes(&a), stream));
    array_begin(&a);
    CHECK(bench_state.num_arrays < MAX_ARRAYS, "more than %d arrays", MAX_ARRAYS);
    return bench_state.arrays[bench_state.num_arrays++] = a;
}
// Given values: floats, which are rounded to floatX if the type says so, or ints.
Array array_of(const char *name, Type type, size_t count, const void *values) {
    Array a = array_output(name, type, count);
    floatX *rounded = (floatX *)xmalloc(count * sizeof(floatX));
    memcpy(a.host, values, count * 4);
    #pragma omp parallel for
    for (size_t i = 0; i < (type == FLOATX ? count : 0); i++) rounded[i] = to_floatX(a.host[i]), a.host[i] = to_float(rounded[i]);
    to_device(a.start, type == FLOATX ? (void *)rounded : (void *)a.host, array_bytes(&a));
    array_begin(&a);
    cudaCheck(cudaStreamSynchronize(stream));
    free(rounded);
    return a;
}
// Normal random numbers, other ones at each call.
Array array_random(const char *name, Type type, size_t count, float scale) {
    static uint64_t seed;
    float *values = (float *)xmalloc(count * sizeof(float));
    seed++;
    #pragma omp parallel for
    for (size_t i = 0; i < count; i++) values[i] = scale * random_normal(seed, i);
    Array a = array_of(name, type, count, values);
    free(values);
    return a;
}

// The largest |x - expected| / (|expected| + root mean square of all expected) over the x on the device; NaN if one is.
double array_error(const Array *a, size_t *worst) {
    char *x = (char *)xmalloc(array_bytes(a));
    double squares = 0, largest = 0;
    to_host(x, a->device, array_bytes(a));
    for (size_t i = 0; i < a->count; i++) squares += (double)a->host[i] * (double)a->host[i];
    double size = sqrt(squares / (double)a->count) + 1e-30;
    for (size_t i = 0; i < a->count && !isnan(largest); i++) {
        float value = a->type == FLOATX ? to_float(((floatX *)x)[i]) : ((float *)x)[i];
        double error = fabs((double)value - (double)a->host[i]) / (fabs((double)a->host[i]) + size);
        if (!(error <= largest)) largest = error, *worst = i;
    }
    free(x);
    return largest;
}

// Runs one version at one block size: is every output as expected?
bool check_version(const char *title, Version *v, int k, const Outputs &outputs) {
    bool ok = true;
    for (Array *const *a = outputs.list; *a; a++) array_begin(*a);
    v->run(v->blocks[k]);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaStreamSynchronize(stream));
    for (Array *const *a = outputs.list; *a; a++) {
        size_t at = 0;
        double tolerance = TOLERANCE_SUM + (double)(*a)->roundings * TOLERANCE_ROUNDING, error = array_error(*a, &at);
        double share = isnan(error) ? INFINITY : error / tolerance;
        if (share > v->worst[k]) v->worst[k] = share;
        if (error <= tolerance) continue;
        ok = false;
        printf("FAIL %s, %s, block %d, size%s: %s has an error of %.1e, more than %.0e, worst at %zu, where %g is expected\n",
               title, v->name, v->blocks[k], bench_state.size, (*a)->name, error, tolerance, at, (double)(*a)->host[at]);
    }
    return ok;
}

// Median and minimum in microseconds; the launch itself takes some 3 of them.
int compare_floats(const void *a, const void *b) { return (*(float *)a > *(float *)b) - (*(float *)a < *(float *)b); }
void time_us(void (*run)(int block), int block, double *median, double *least) {
    float ms[RUNS], total = 0;
    int count = 0;
    cudaEvent_t begin, end;
    cudaCheck(cudaEventCreate(&begin));
    cudaCheck(cudaEventCreate(&end));
    for (int i = -WARM_UPS; i < RUNS && (count < 3 || total < 1000); i++) {
        cudaCheck(cudaMemsetAsync(bench_state.flush, 0, bench_state.flush_bytes, stream));
        cudaCheck(cudaEventRecord(begin, stream));
        run(block);
        cudaCheck(cudaEventRecord(end, stream));
        cudaCheck(cudaEventSynchronize(end));
        if (i < 0) continue;
        cudaCheck(cudaEventElapsedTime(&ms[count], begin, end));
        total += ms[count++];
    }
    qsort(ms, (size_t)count, sizeof ms[0], compare_floats);
    *median = ms[count / 2] * 1e3, *least = ms[0] * 1e3;
    cudaCheck(cudaEventDestroy(begin));
    cudaCheck(cudaEventDestroy(end));
}

// bytes, flops: what one run must move and compute at least. The one that takes longer at the peaks is what the rate is about.
template <int COUNT> void bench(const char *title, Version (&versions)[COUNT], double bytes, double flops, const Outputs &outputs) {
    double memory_us = bytes / bench_state.peak_gbps / 1e3, math_us = flops / bench_state.peak_tflops / 1e6, median, least;
    for (Version &v : versions)
        for (int k = 0; k == 0 || (k < MAX_BLOCKS && v.blocks[k]); k++) {
            bool ok = check_version(title, &v, k, outputs);
            bench_state.failed += !ok, bench_state.rows += bench_state.last;
            if (!bench_state.last) continue;
            printf(v.blocks[k] ? "%-20s | %-40s | block %4d |" : "%-20s | %-40s | block    - |", title, v.name, v.blocks[k]);
            if (bench_state.timed && ok) {
                time_us(v.run, v.blocks[k], &median, &least);
                double percent = (math_us > memory_us ? math_us : memory_us) / median * 100;
                printf(" median %9.1f us, min %9.1f | ", median, least);
                if (math_us > memory_us) printf("%7.1f TFLOP/s", flops / median / 1e6);
                else printf("%7.1f GB/s", bytes / median / 1e3);
                printf(" | %3.0f %% of peak%s |", percent, percent > 100 ? ", cache?" : "");
            }
            printf(" error %4.2f of the tolerance | %s\n", v.worst[k], v.worst[k] <= 1 ? "ok" : "FAIL");
        }
}

void bench_free(void) {
    for (int i = 0; i < bench_state.num_arrays; i++) {
        Array *a = &bench_state.arrays[i];
        free(a->host);
        cudaCheck(cudaFree(a->device));
        cudaCheck(cudaFree(a->start));
    }
    bench_state.num_arrays = 0;
}

enum { PEAK_SIZE = 8192 };
static Array peak_out, peak_inp, peak_weight;
void peak_copy(int) { array_begin(&peak_out); }
void peak_matmul(int) { matmul_forward_gpu(peak_out.x, NULL, peak_inp.x, peak_weight.x, NULL, PEAK_SIZE, PEAK_SIZE, PEAK_SIZE); }

void bench_open(void) {
    device_open();
    scratch = device_alloc<float>(SCRATCH_FLOATS);
    Array nan = array_output("nan", FLOATX, 1);
    size_t at;
    nan.host[0] = 1;
    CHECK(!(array_error(&nan, &at) <= 1e30), "the comparison lets NaN pass");
    bench_free();
#ifdef CUDA_EMU
    printf("emulator: checked, not timed\n");
#else
    const size_t count = (size_t)PEAK_SIZE * PEAK_SIZE;
    double median, copy_us, matmul_us;
    bench_state.flush_bytes = 2 * (size_t)device_properties()->l2CacheSize;
    bench_state.flush = device_alloc<char>(bench_state.flush_bytes);
    peak_out = array_output("out", FLOATX, count);
    peak_inp = array_random("inp", FLOATX, count, 1), peak_weight = array_random("weight", FLOATX, count, 1);
    time_us(peak_copy, 0, &median, &copy_us);
    time_us(peak_matmul, 0, &median, &matmul_us);
    bench_state.peak_gbps = 2 * (double)array_bytes(&peak_out) / copy_us / 1e3;
    bench_state.peak_tflops = 2 * pow((double)PEAK_SIZE, 3.0) / matmul_us / 1e6;
    printf("%s; peaks measured now: copy %.0f GB/s, matmul of %d^3 %.1f TFLOP/s\n", machine_text(), bench_state.peak_gbps, PEAK_SIZE,
           bench_state.peak_tflops);
    bench_free();
#endif
}

// for (int s = 0; bench_next(s, sizes); s++) { arrays of sizes[s]; the CPU functions; bench }      the last size is for GPUs only
template <int SIZES, int DIMENSIONS> bool bench_next(int s, const int (&sizes)[SIZES][DIMENSIONS]) {
#ifdef CUDA_EMU
    const int count = SIZES - 1;
#else
    const int count = SIZES;
#endif
    if (s == 0) bench_open();
    bench_free();
    if (s == count) return false;
    bench_state.last = s == count - 1, bench_state.timed = s == SIZES - 1, bench_state.size[0] = 0;
    for (int n : sizes[s]) snprintf(bench_state.size + strlen(bench_state.size), 16, " %d", n);
    return true;
}

// The exit code.
int bench_close(void) {
    printf("%d rows checked against the CPU function, %d failures\n", bench_state.rows, bench_state.failed);
    return bench_state.failed > 0 || bench_state.rows == 0;
}
#endif

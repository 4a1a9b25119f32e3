// bench.h: how the programs of dev/cpu measure. Include it after train_qwen.c.
//
// Other programs may be busy on the same cores, and clocks change with the temperature. So a rate is never taken alone: each sample of a
// kernel stands between two short probes of the limit that it is compared with (FMA peak or memory bandwidth), samples during which the
// probes disagree are thrown away, and what is printed is the median of the ratios.

#include <sys/utsname.h>

static volatile float keep_result;              // what is computed only to be timed goes here, or the compiler would leave it out

// Floating-point operations per second of multiply-adds on registers alone: no program can compute faster. `threads` at the same time.
double fma_peak(int threads, double seconds) {
    double total = 0;
    #pragma omp parallel num_threads(threads) reduction(+:total)
    {
        // Independent sums: more than latency (4) times units (2), and all in registers (so no more than UNROLL unrolls). They begin with
        // what the compiler can't know, or it would see that 1 * 0.999 + 0.001 stays 1 and leave that sum out.
        enum { CHAINS = 2 * MR >= 16 ? 16 : 12 };
        vec sum[CHAINS], x = (vec){} + 0.999f, y = (vec){} + 0.001f;
        for (int i = 0; i < CHAINS; i++) sum[i] = (vec){} + keep_result + (float)i;
        double begin = now_s(), end = begin;
        long rounds = 0;
        do {
            for (int k = 0; k < 2000; k++) {
                UNROLL
                for (int i = 0; i < CHAINS; i++) sum[i] = sum[i] * x + y;
            }
            rounds += 2000, end = now_s();
        } while (end - begin < seconds);
        vec all = {0};
        for (int i = 0; i < CHAINS; i++) all += sum[i];
        keep_result = all[0];
        total += (double)rounds * CHAINS * VL * 2 / (end - begin);
    }
    return total;
}

// Bytes per second of a[i] = b[i] + s c[i] on arrays far larger than any cache, 12 bytes an element (McCalpin's STREAM triad).
double triad(int threads, int rounds) {
    enum { COUNT = 1 << 25 };                                    // 3 x 128 MiB
    static float *a, *b, *c;
    if (!a) {
        a = (float *)xmalloc(sizeof(float) * COUNT), b = (float *)xmalloc(sizeof(float) * COUNT),
            c = (float *)xmalloc(sizeof(float) * COUNT);
        #pragma omp parallel for num_threads(threads)
        for (int i = 0; i < COUNT; i++) a[i] = 0, b[i] = 1, c[i] = 2;
    }
    double best = 1e30;
    for (int round = 0; round < rounds; round++) {
        double begin = now_s();
        #pragma omp parallel for simd num_threads(threads)
        for (int i = 0; i < COUNT; i++) a[i] = b[i] + 3.0f * c[i];
        double seconds = now_s() - begin;
        if (seconds < best) best = seconds;
    }
    keep_result = a[COUNT / 2];
    return 12.0 * COUNT / best;
}

int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}
double median(double *values, int count) {
    qsort(values, (size_t)count, sizeof(double), compare_doubles);
    return count % 2 ? values[count / 2] : 0.5 * (values[count / 2 - 1] + values[count / 2]);
}

// The least time of a measurement against the highest peak that any probe with so many threads has seen: what the code reaches when neighbours
// leave it alone. (Those of a virtual machine can share its caches and go unnoticed by a probe that only uses registers.)
static double best_fraction, highest_peak[2];   // [0]: with one thread, [1]: with all

// Measures run(argument), which does `flops` operations on `threads` threads. *seconds: the median of the samples kept; returns the
// median of their fractions of the FMA peak. At most `samples` are taken within `limit_s`, at least one.
typedef void Runnable(void *argument);
double measure_flops(Runnable *run, void *argument, double flops, int threads, int samples, double limit_s, double *seconds) {
    double fractions[64], times[64], begin = now_s(), spare_fraction = 0, spare_time = 0;
    double least = 1e30, *highest = &highest_peak[threads > 1];
    int kept = 0;
#ifdef _OPENMP
    int before_threads = omp_get_max_threads();
    omp_set_num_threads(threads);
#endif
    run(argument);                                               // warms caches, buffers and the branch predictor
    for (int s = 0; s < 4 * samples && kept < samples && (s == 0 || now_s() - begin < limit_s); s++) {
        double before = fma_peak(threads, 0.0005), start = now_s(), took;
        int repeats = 0;
        do run(argument), repeats++, took = now_s() - start; while (took < 0.004);
        double after = fma_peak(threads, 0.0005), peak = 0.5 * (before + after), fraction = flops * repeats / took / peak;
        if (took / repeats < least) least = took / repeats;
        if (peak > *highest) *highest = peak;
        if (fraction > spare_fraction) spare_fraction = fraction, spare_time = took / repeats;
        if (fabs(before - after) > 0.04 * peak) continue;        // something else ran meanwhile
        fractions[kept] = fraction, times[kept++] = took / repeats;
    }
#ifdef _OPENMP
    omp_set_num_threads(before_threads);
#endif
    best_fraction = flops / least / *highest;
    if (kept == 0) return *seconds = spare_time, spare_fraction;
    *seconds = median(times, kept);
    return median(fractions, kept);
}

// "AMD EPYC 7713, AVX2" as the system names it
const char *processor_name(void) {
    static char name[160] = "unknown processor";
    FILE *f = fopen("/proc/cpuinfo", "r");
    char line[256];
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
            snprintf(name, sizeof name, "%.100s", strchr(line, ':') + 2);
            name[strcspn(name, "\n")] = 0;
            break;
        }
    if (f) fclose(f);
    return name;
}

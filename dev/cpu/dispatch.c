// dispatch.c: one binary for every x86-64 processor (`make portable`). The whole of train_qwen.c is compiled three times, for SSE2, for AVX2 with
// FMA (Haswell, Zen and later) and for AVX-512 (Skylake servers, Zen 4 and later), and this main picks the best that the processor has. So
// every loop, not only the matrix multiplication, is made for it, and train_qwen.c knows nothing of it. ARM needs none of this: NEON is always there.
//
// QWEN_CPU=sse2, avx2 or avx512 in the environment takes that one, to compare them.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main_sse2(int argc, char **argv);
int main_avx2(int argc, char **argv);
int main_avx512(int argc, char **argv);

int main(int argc, char **argv) {
    __builtin_cpu_init();
    struct { const char *name; int (*run)(int argc, char **argv); int supported; } versions[] = {
        {"avx512", main_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2")},
        {"avx2", main_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")},
        {"sse2", main_sse2, 1},
    };
    const char *wanted = getenv("QWEN_CPU");
    for (int i = 0; i < 3; i++) {
        if (wanted && wanted[0] ? strcmp(wanted, versions[i].name) != 0 : !versions[i].supported) continue;
        if (versions[i].supported) return versions[i].run(argc, argv);
        fprintf(stderr, "error: QWEN_CPU=%s, but this processor does not have it; leave it out\n", wanted);
        return 1;
    }
    fprintf(stderr, "error: QWEN_CPU=%s; it can be sse2, avx2 or avx512\n", wanted);
    return 1;
}

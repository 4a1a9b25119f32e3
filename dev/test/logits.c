// logits.c: ./logits DIRECTORY id id ...   writes the model's logits after each of the ids, fp32, to standard output. For interop.py.
#define QWEN_NO_MAIN
#include "../../train_qwen.c"

int main(int argc, char **argv) {
    CHECK(argc > 2, "usage: %s DIRECTORY id id ...", argv[0]);
    const char *directory;
    Model m = {};
    config_of_model(argv[1], &directory);
    model_load(&m, directory);
    int T = argc - 2, *tokens = (int *)xmalloc((size_t)T * sizeof(int)), *start = (int *)xcalloc((size_t)T, sizeof(int));
    for (int t = 0; t < T; t++) tokens[t] = atoi(argv[t + 2]);
    model_alloc_run(&m, 1, T, T, RECOMPUTE_LAYERS, EVALUATE);
    model_forward(&m, tokens, start, 1, T, NULL);
    float *logits = (float *)xmalloc((size_t)T * (size_t)m.config.V * sizeof(float));
    matmul_forward(logits, m.acts.h, m.params.head, NULL, T, m.config.C, m.config.V, OVERWRITE);
    fwrite(logits, sizeof(float), (size_t)T * (size_t)m.config.V, stdout);
    return fflush(stdout) != 0;
}

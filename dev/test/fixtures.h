// fixtures.h: what PyTorch computed (fixtures/, made by reference.py). Include after train_qwen.c.
#ifndef FIXTURES_H
#define FIXTURES_H
#define FIXTURES "dev/test/fixtures"

float *expected(StoredTensors *s, const char *name, size_t count) {
    StoredTensor *t = safetensors_find(s, name);
    CHECK(t && t->elements == count, "the fixture lacks %s with %zu elements", name, count);
    float *values = (float *)xmalloc(count * sizeof(float));
    t->taken = 0;
    read_elements(t, values, count);
    return values;
}
float expected_number(StoredTensors *s, const char *name) {
    float *value = expected(s, name, 1), number = value[0];
    free(value);
    return number;
}

// A batch of the fixture. masked: with its document starts and weights.
Batch expected_batch(StoredTensors *s, int B, int T, bool masked) {
    Batch b;
    batch_alloc(&b, B, T);
    size_t n = (size_t)B * (size_t)T;
    float *tokens = expected(s, "tokens", n), *targets = expected(s, "targets", n), *start = expected(s, "start", n), *weights = expected(s, "weights", n);
    for (size_t i = 0; i < n; i++) {
        b.tokens[i] = (int)tokens[i], b.targets[i] = (int)targets[i];
        b.start[i] = masked ? (int)start[i] : 0, b.weights[i] = masked ? weights[i] : 1.0f;
    }
    free(tokens), free(targets), free(start), free(weights);
    return b;
}

double sum_weights(const Batch *b, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)b->weights[i];
    return sum;
}

// One tensor for each of the model's. Those of v1 fixtures are stored under v1 names, fused; load_tensors takes them apart.
float *expected_tensors(StoredTensors *s, const char *what, const Model *m, const char *prefix, bool v1) {
    float *values = (float *)xmalloc(m->table.num_params * sizeof(float));
    for (int i = 0; i < s->count; i++) s->list[i].taken = 0;
    load_tensors(s, what, &m->table, values, prefix, v1);
    return values;
}
#endif

// test_align.c: DPO and LoRA against PyTorch's numbers (fixtures/, made by reference_dpo.py and reference_lora.py) and against themselves.
//
//   make test          builds and runs this from the repository root, plain and with sanitizers; test_align.cu is the same for train_qwen.cu
//
// All goes through the functions of the machine (section 9), which CPU and GPU both have.
#ifndef QWEN_GPU
#define QWEN_NO_MAIN
#include "../../train_qwen.c"
#endif
#include "test.h"
#include "fixtures.h"

// fp32: sums of some hundred terms in another order than PyTorch's. bf16: every number on the way is rounded to 8 bits, the fixtures' fp32
// weights first of all (see test_qwen.cu); up to 4.7e-2 is seen.
static const bool IS_BF16 = sizeof PRECISION == sizeof "bf16" && PRECISION[0] == 'b';
static const double TOLERANCE = IS_BF16 ? 7e-2 : 1e-5;

static char scratch[64];                                         // a temporary directory

// ---------------------------------------------------------------------------------------------------------------------
// DPO

// The fixture's documents as a token file.
const char *write_pairs(StoredTensors *s, const char *name, uint32_t vocab_size) {
    size_t n = safetensors_find(s, "tokens")->elements;
    float *tokens = expected(s, "tokens", n), *begins = expected(s, "begins", n), *trained = expected(s, "trained", n);
    uint32_t *words = (uint32_t *)xmalloc(n * 4);
    TokenFileHeader h = {};
    memcpy(h.magic, TOKEN_FILE_MAGIC, 8);
    h.version = TOKEN_FILE_VERSION, h.task = TASK_DPO, h.num_tokens = n, h.vocab_size = vocab_size;
    for (size_t i = 0; i < n; i++) {
        words[i] = (uint32_t)tokens[i] | (begins[i] != 0 ? (uint32_t)TOKEN_DOC_START : 0) | (trained[i] != 0 ? 0 : TOKEN_NO_LOSS);
        h.num_documents += begins[i] != 0;
    }
    const char *path = path_of("%s/%s", scratch, name);
    FILE *f = create_file(path);
    fwrite(&h, sizeof h, 1, f), fwrite(words, 4, n, f);
    close_file(f, path);
    free(tokens), free(begins), free(trained), free(words);
    return path;
}

// An update of all pairs of the file in rows of T, each row a micro-batch or all of them one.
typedef enum { ONE_ROW, ALL_ROWS } MicroBatch;
typedef struct { Model model; Loader loader; Dpo dpo; Batch batch; int rows; double pairs; } Preferring;
Preferring *open_pairs(const char *family, const char *path, MicroBatch micro, int T, uint64_t seed, Recompute recompute) {
    Preferring *p = (Preferring *)xcalloc(1, sizeof *p);
    model_load(&p->model, path_of(FIXTURES "/%s", family));
    loader_find(&p->loader, path, "train");
    loader_open(&p->loader, TASK_DPO, T, p->model.config.V, true, true, seed);
    p->rows = (int)p->loader.num_rows;
    model_alloc_moments(&p->model);
    machine_open(&p->model, micro == ONE_ROW ? 1 : p->rows, T, p->rows, T, recompute, TRAIN);
    batch_alloc(&p->batch, p->rows, T);
    p->model.dpo = &p->dpo;
    return p;
}
Update update_pairs(Preferring *p, const AdamW *o, double clip, int step) {
    p->pairs = loader_rows(&p->loader, 0, p->rows, &p->batch);
    memset(&p->dpo.seen, 0, sizeof p->dpo.seen);
    return machine_update(&p->model, &p->batch, p->rows, p->pairs, o, clip, step);
}
void close_pairs(Preferring *p) { batch_free(&p->batch), loader_close(&p->loader), machine_close(&p->model), free(p); }

// As in test_train.c: one line for all tensors, one for each that is wrong.
void check_tensors(const char *what, StoredTensors *s, const TensorTable *table, const float *memory, const char *prefix) {
    float *wanted = (float *)xmalloc(table->num_params * sizeof(float));
    for (int i = 0; i < s->count; i++) s->list[i].taken = 0;
    load_tensors(s, what, table, wanted, prefix, false);
    double worst = 0;
    for (int k = 0; k < table->count; k++) {
        const TensorInfo *t = &table->list[k];
        double error = relative_error(memory + t->offset, wanted + t->offset, t->rows * t->cols);
        if (!(error <= worst)) worst = error;
        if (!(error <= TOLERANCE)) check_close(t->name, memory + t->offset, wanted + t->offset, t->rows * t->cols, TOLERANCE);
    }
    check(worst <= TOLERANCE, "%-58s error %.1e (worst of %d tensors)", what, worst, table->count);
    free(wanted);
}

// One update with beta1 = 0 and rate 0 leaves the gradient in m.
static const AdamW GRADIENT = {0, 0, 0.5f, 1e-8f, 0};

// Rows that hold one pair each or all of them, batches of one row or several, other orders: the numbers of single documents in PyTorch.
void test_dpo_loss(const char *family) {
    StoredTensors s = safetensors_open(path_of(FIXTURES "/dpo/%s", family), "expected");
    static const struct { MicroBatch micro; int T; uint64_t seed; Recompute recompute; } shapes[] = {
        {ONE_ROW, 21, 1, KEEP_ALL}, {ALL_ROWS, 21, 1, KEEP_ALL}, {ONE_ROW, 21, 7, RECOMPUTE_LAYERS}, {ONE_ROW, 60, 1, KEEP_ALL},
        {ALL_ROWS, 35, 3, RECOMPUTE_CHEAP},
    };
    double *reference = (double *)xmalloc(8 * sizeof(double));
    float *wanted_sums = expected(&s, "policy", 8), *far = expected(&s, "far.reference", 8), *wanted_rewards = expected(&s, "far.rewards", 8);
    const char *path = NULL;
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        if (!path) path = write_pairs(&s, path_of("%s.bin", family), strcmp(family, "qwen2") == 0 ? 61 : 59);
        Preferring *p = open_pairs(family, path, shapes[i].micro, shapes[i].T, shapes[i].seed, shapes[i].recompute);
        const char *shape = path_of("%s dpo, %d rows of %d by %d, seed %d", family, p->rows, p->loader.T, p->model.B, (int)shapes[i].seed);
        p->dpo.reference = reference, p->dpo.beta = 0.1;

        p->dpo.measuring = true;
        loader_rows(&p->loader, 0, p->rows, &p->batch);
        for (int row = 0; row < p->rows; row += p->model.B) {
            Batch micro = batch_from(&p->batch, row, p->loader.T);
            machine_loss(&p->model, &micro, p->model.B, p->loader.T);
        }
        p->dpo.measuring = false;
        float sums[8];
        for (int d = 0; d < 8; d++) sums[d] = (float)reference[d];
        check_close(path_of("%s: log p of each answer", shape), sums, wanted_sums, 8, TOLERANCE);
        Update u = update_pairs(p, &GRADIENT, 0, 1);
        check(fabs(u.loss - 0.69314718056) <= 1e-6 && p->pairs == 4 && p->dpo.seen.pairs == 4,
              "%s: the loss of a policy that is its reference is %.7f", shape, u.loss);

        for (int d = 0; d < 8; d++) reference[d] = (double)far[d];
        p->dpo.beta = (double)expected_number(&s, "far.beta"), p->dpo.smoothing = (double)expected_number(&s, "far.smoothing");
        u = update_pairs(p, &GRADIENT, 0, 1);
        float loss = (float)u.loss, wanted_loss = expected_number(&s, "far.loss");
        check_close(path_of("%s: loss", shape), &loss, &wanted_loss, 1, TOLERANCE);
        double chosen = 0, rejected = 0, correct = 0;
        for (int d = 0; d < 8; d += 2) {
            chosen += (double)wanted_rewards[d], rejected += (double)wanted_rewards[d + 1];
            correct += wanted_rewards[d] > wanted_rewards[d + 1];
        }
        check(fabs(p->dpo.seen.chosen - chosen) <= TOLERANCE * 10 && fabs(p->dpo.seen.rejected - rejected) <= TOLERANCE * 10 &&
                  p->dpo.seen.correct == correct, "%s: rewards %.5f and %.5f, %.0f of 4 right", shape, p->dpo.seen.chosen / 4,
              p->dpo.seen.rejected / 4, p->dpo.seen.correct);
        machine_download(&p->model);
        check_tensors(path_of("%s: gradients", shape), &s, &p->model.table, p->model.m_memory, "far.grad.");
        close_pairs(p);
    }
    free(reference), free(wanted_sums), free(far), free(wanted_rewards);
    safetensors_close(&s);
}

void test_dpo_steps(const char *family) {
    StoredTensors s = safetensors_open(path_of(FIXTURES "/dpo/%s", family), "expected");
    const char *path = path_of("%s/%s.bin", scratch, family);
    Preferring *p = open_pairs(family, path, ALL_ROWS, 21, 5, KEEP_ALL);
    double reference[8];
    float *sums = expected(&s, "policy", 8), *wanted, got[4][10];
    for (int d = 0; d < 8; d++) reference[d] = (double)sums[d];
    p->dpo.reference = reference, p->dpo.beta = (double)expected_number(&s, "steps.beta");
    AdamW o = {expected_number(&s, "steps.lr"), expected_number(&s, "steps.beta1"), expected_number(&s, "steps.beta2"), expected_number(&s, "steps.eps"),
               expected_number(&s, "steps.weight_decay")};
    for (int step = 0; step < 10; step++) {
        Update u = update_pairs(p, &o, (double)expected_number(&s, "steps.clip"), step + 1);
        got[0][step] = (float)u.loss, got[1][step] = (float)u.norm;
        got[2][step] = (float)(p->dpo.seen.chosen / 4), got[3][step] = (float)(p->dpo.seen.rejected / 4);
    }
    static const char *const names[] = {"losses", "norms", "chosen", "rejected"};
    for (int i = 0; i < 4; i++) {
        wanted = expected(&s, path_of("steps.%s", names[i]), 10);
        check_close(path_of("%s dpo, ten AdamW steps: %s", family, names[i]), got[i], wanted, 10, TOLERANCE);
        free(wanted);
    }
    machine_download(&p->model);
    check_tensors(path_of("%s dpo, ten AdamW steps: final weights", family), &s, &p->model.table, p->model.params_memory, "steps.final.");
    close_pairs(p);
    free(sums);
    safetensors_close(&s);
}

// What a short row drops and cuts. Lengths of the fixture's documents, prompts first: 4+3 4+2, 1+5 1+6, 3+1 3+4, 2+4 2+1.
void open_short(const char *argument) {                          // path:T
    char path[512];
    int T;
    CHECK(sscanf(argument, "%500[^:]:%d", path, &T) == 2, "bad test");
    Loader l = {};
    loader_find(&l, path, "train");
    loader_open(&l, TASK_DPO, T, 61, true, false, 0);
}
void test_dpo_rows(void) {
    const char *path = path_of("%s/qwen2.bin", scratch);
    static const struct { int T; uint64_t documents, cut, dropped; } wanted[] = {{13, 8, 0, 0}, {12, 8, 3, 0}, {7, 6, 4, 1}, {5, 4, 3, 2}};
    for (int i = 0; i < 4; i++) {
        Loader l = {};
        loader_find(&l, path, "train");
        loader_open(&l, TASK_DPO, wanted[i].T, 61, true, false, 0);
        check(l.num_documents == wanted[i].documents && l.num_cut == wanted[i].cut && l.num_dropped == wanted[i].dropped,
              "dpo rows of %d: %d documents in %d rows, %d cut, %d pairs dropped", l.T, (int)l.num_documents, (int)l.num_rows, (int)l.num_cut,
              (int)l.num_dropped);
        loader_close(&l);
    }
    check_fails("rows that no answer fits into", open_short, path_of("%s:1", path), "none of its 4 pairs has an answer within 1 tokens");
    uint32_t odd[] = {1 | TOKEN_DOC_START | TOKEN_NO_LOSS, 2, 3, 4 | TOKEN_DOC_START | TOKEN_NO_LOSS, 5, 6 | TOKEN_DOC_START | TOKEN_NO_LOSS, 7};
    TokenFileHeader h = {};
    memcpy(h.magic, TOKEN_FILE_MAGIC, 8);
    h.version = TOKEN_FILE_VERSION, h.task = TASK_DPO, h.num_tokens = 7, h.num_documents = 3, h.vocab_size = 61;
    path = path_of("%s/odd.bin", scratch);
    FILE *f = create_file(path);
    fwrite(&h, sizeof h, 1, f), fwrite(odd, 4, 7, f);
    close_file(f, path);
    check_fails("a chosen answer without a rejected one", open_short, path_of("%s:20", path), "ends with a chosen answer that has no rejected one");
}

// ---------------------------------------------------------------------------------------------------------------------
// LoRA

// The fixture's base with its adapter, ready to train.
Model open_lora(const char *family, int B, int T, int rows, Recompute recompute) {
    const char *directory = path_of(FIXTURES "/lora/%s", family);
    LoraOptions options;
    const char *base = adapter_config(directory, &options);
    Model m = {};
    model_load(&m, base);
    lora_attach(&m, &options, 1);
    adapter_load(&m, directory);
    machine_open(&m, B, T, rows, T, recompute, TRAIN);
    return m;
}

void test_lora_gradients(const char *family, int B, int T) {
    StoredTensors s = safetensors_open(path_of(FIXTURES "/lora/%s", family), "expected");
    static const struct { bool one_row; Recompute recompute; } shapes[] = {{false, KEEP_ALL}, {true, KEEP_ALL}, {false, RECOMPUTE_CHEAP},
                                                                           {true, RECOMPUTE_LAYERS}};
    for (int i = 0; i < 4; i++) {
        int micro = shapes[i].one_row ? 1 : B;
        Model m = open_lora(family, micro, T, B, shapes[i].recompute);
        Batch b = expected_batch(&s, B, T, true);
        Update u = machine_update(&m, &b, B, sum_weights(&b, B * T), &GRADIENT, 0, 1);
        const char *shape = path_of("%s lora, %d x %d rows, recompute %d", family, B / micro, micro, (int)shapes[i].recompute);
        float loss = (float)u.loss, wanted = expected_number(&s, "loss");
        check_close(path_of("%s: loss", shape), &loss, &wanted, 1, TOLERANCE);
        machine_download(&m);
        check_tensors(path_of("%s: gradients of A and B", shape), &s, &m.lora->table, m.lora->m, "grad.");
        batch_free(&b), machine_close(&m);
    }
    safetensors_close(&s);
}

// The weights that the machine computes with.
float *machine_weights(const Model *m) {
    float *weights = (float *)xmalloc(m->table.num_params * sizeof(float));
#ifdef QWEN_GPU
    floatX *raw = (floatX *)xmalloc(m->table.num_params * sizeof(floatX));
    to_host(raw, m->gpu->params_memory, m->table.num_params * sizeof(floatX));
    for (size_t i = 0; i < m->table.num_params; i++) weights[i] = to_float(raw[i]);
    free(raw);
#else
    memcpy(weights, m->params_memory, m->table.num_params * sizeof(float));
#endif
    return weights;
}

void test_lora_steps(const char *family, int B, int T) {
    StoredTensors s = safetensors_open(path_of(FIXTURES "/lora/%s", family), "expected");
    Model m = open_lora(family, B, T, B, KEEP_ALL), base = {};
    Batch b = expected_batch(&s, B, T, true);
    AdamW o = {expected_number(&s, "steps.lr"), expected_number(&s, "steps.beta1"), expected_number(&s, "steps.beta2"), expected_number(&s, "steps.eps"),
               expected_number(&s, "steps.weight_decay")};
    float losses[10], norms[10], *wanted_losses = expected(&s, "steps.losses", 10), *wanted_norms = expected(&s, "steps.norms", 10);
    for (int step = 0; step < 10; step++) {
        Update u = machine_update(&m, &b, B, sum_weights(&b, B * T), &o, (double)expected_number(&s, "steps.clip"), step + 1);
        losses[step] = (float)u.loss, norms[step] = (float)u.norm;
    }
    check_close(path_of("%s lora, ten AdamW steps: losses", family), losses, wanted_losses, 10, TOLERANCE);
    check_close(path_of("%s lora, ten AdamW steps: norms", family), norms, wanted_norms, 10, TOLERANCE);
    machine_download(&m);
    check_tensors(path_of("%s lora, ten AdamW steps: A and B", family), &s, &m.lora->table, m.lora->memory, "steps.final.");

    const char *saved = path_of("%s/adapter", scratch);
    make_directory(saved);
    adapter_save(&m, path_of(FIXTURES "/%s", family), saved);
    Model again = {};
    model_load(&again, saved);                                   // merges
    float *merged = machine_weights(&m);
    check_close(path_of("%s lora: the saved adapter merges into the weights that were trained with", family), again.params_memory, merged,
                m.table.num_params, IS_BF16 ? 5e-3 : 1e-6);
    delete_directory(saved);

    for (int k = 0; k < m.lora->count; k++) {                    // B = 0 gives the base back, to the last bit
        const LoraMatrix *x = &m.lora->matrices[k];
        memset(m.lora->memory + x->b, 0, (size_t)x->outputs * (size_t)m.lora->options.rank * sizeof(float));
    }
#ifdef QWEN_GPU
    to_device(m.gpu->master, m.lora->memory, m.lora->table.num_params * sizeof(float));
    lora_merge_gpu(&m);
#else
    lora_merge(&m);
#endif
    model_load(&base, path_of(FIXTURES "/%s", family));
    float *unmerged = machine_weights(&m);
    size_t unequal = 0;
    for (size_t i = 0; i < m.table.num_params; i++) unequal += unmerged[i] != (IS_BF16 ? bf16_to_float(float_to_bf16(base.params_memory[i])) : base.params_memory[i]);
    check(unequal == 0, "%s lora: after ten updates the base is what it was (%zu numbers are not)", family, unequal);
    free(merged), free(unmerged), free(wanted_losses), free(wanted_norms);
    batch_free(&b), machine_close(&m), model_free(&again), model_free(&base), safetensors_close(&s);
}

// The directory of an adapter stands for the merged model. (CPU arithmetic; the GPU loads the same weights.)
void test_lora_merged(const char *family, int B, int T) {
    const char *directory = path_of(FIXTURES "/lora/%s", family);
    StoredTensors s = safetensors_open(directory, "expected");
    Model m = {};
    model_load(&m, directory);
    model_alloc_run(&m, B, T, T, KEEP_ALL, EVALUATE);
    Batch b = expected_batch(&s, B, T, true);
    size_t count = (size_t)(B * T) * (size_t)m.config.V;
    float *wanted = expected(&s, "logits", count), *logits = (float *)xmalloc(count * sizeof(float));
    model_forward(&m, b.tokens, b.start, B, T, NULL);
    matmul_forward(logits, m.acts.h, m.params.head, NULL, B * T, m.config.C, m.config.V, OVERWRITE);
    check_close(path_of("%s lora: logits of the merged model are peft's", family), logits, wanted, count, 1e-5);
    free(wanted), free(logits);
    batch_free(&b), model_free(&m), safetensors_close(&s);
}

void load_model(const char *directory) {
#ifdef _OPENMP
    omp_set_num_threads(1);                                      // a forked process has none of its parent's threads
#endif
    Model m = {};
    model_load(&m, directory);
}
void write_text(const char *path, const char *text) {
    FILE *f = create_file(path);
    fputs(text, f);
    close_file(f, path);
}
void test_bad_adapters(void) {
    const char *directory = path_of("%s/bad", scratch), *config = path_of("%s/adapter_config.json", directory);
    make_directory(directory);
    size_t size;
    char *weights = read_file(FIXTURES "/lora/qwen2/adapter_model.safetensors", &size);
    const char *path = path_of("%s/adapter_model.safetensors", directory);
    FILE *f = create_file(path);
    fwrite(weights, 1, size, f), close_file(f, path), free(weights);
    const char *all = "\"q_proj\",\"k_proj\",\"v_proj\",\"o_proj\",\"gate_proj\",\"up_proj\",\"down_proj\"";
    const char *form = "{\"peft_type\":\"%s\",\"base_model_name_or_path\":\"%s\",\"r\":%d,\"lora_alpha\":5,\"target_modules\":[%s],\"use_dora\":%s}";
    const char *qwen2 = FIXTURES "/qwen2", *qwen3 = FIXTURES "/qwen3";
    static const struct { const char *what, *type, *base, *targets, *dora, *message; int rank; } cases[] = {
        {"an adapter for another base", "LORA", "3", "*", "false", "has shape [3,24], the model needs [3,28]", 3},
        {"an adapter of another rank", "LORA", "2", "*", "false", "has shape [3,24], the model needs [4,24]", 4},
        {"an adapter with fewer targets than tensors", "LORA", "2", "\"q_proj\"", "false", "is not part of this model", 3},
        {"an adapter of another kind", "IA3", "2", "*", "false", "\"peft_type\" is not LORA", 3},
        {"DoRA", "LORA", "2", "*", "true", "\"use_dora\" is true", 3},
        {"an adapter of the head", "LORA", "2", "\"lm_head\"", "false", "holds lm_head, which is not supported", 3},
        {"a base that is not here", "LORA", "Qwen/Qwen2.5-0.5B", "*", "false", "there is no model of that name here", 3},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *base = strcmp(cases[i].base, "2") == 0 ? qwen2 : strcmp(cases[i].base, "3") == 0 ? qwen3 : cases[i].base;
        write_text(config, path_of(form, cases[i].type, base, cases[i].rank, cases[i].targets[0] == '*' ? all : cases[i].targets, cases[i].dora));
        check_fails(cases[i].what, load_model, directory, cases[i].message);
    }
    write_text(config, path_of(form, "LORA", qwen2, 3, all, "false"));
    write_text(path_of("%s/trainer.json", directory), "{\"base_model\": \"0123456789abcdef\"}");
    check_fails("a base that has changed", load_model, directory, "was trained on another base than");
    delete_directory(directory);
}

void test_lora_plan(void) {
    Config c = find_preset("qwen2.5-1.5b")->config;
    LoraOptions none = {}, lora = {16, 32, 127};
    MemoryPlan all = machine_plan(&c, 1, 512, KEEP_ALL, &none), less = machine_plan(&c, 1, 512, KEEP_ALL, &lora);
    // 1,543,714,304 parameters, of which 1,310,195,712 in 196 matrices; A and B of rank 16: 18,464,768
    double width = IS_BF16 ? 2 : 4, scratch_floats = less.gradients / 4 - 46797824 - 18464768;
    check(all.gradients == 4 * 1543714304.0 && less.moments == 8 * 18464768.0 && less.weights == width * (1543714304.0 + 1310195712.0) + 4 * 18464768.0 &&
              scratch_floats >= 0 && scratch_floats < 1e7, "qwen2.5-1.5b, fixed memory: %.2f GB, with LoRA of rank 16 %.2f GB",
          (all.weights + all.gradients + all.moments) / 1e9, (less.weights + less.gradients + less.moments) / 1e9);
}

// ---------------------------------------------------------------------------------------------------------------------
// Several files

void test_shards(void) {
    Model m = {}, again = {};
    model_load(&m, FIXTURES "/qwen3");
    largest_file_bytes = 9000;
    const char *directory = path_of("%s/shards", scratch);
    make_directory(directory);
    config_save(&m.config, path_of("%s/config.json", directory), F32, 3);
    model_save(&m, directory, F32);
    largest_file_bytes = 5000000000u;
    StoredTensors s = safetensors_open(directory, "model");
    int files = 0;
    for (int i = 0; i < s.count; i++) files += i == 0 || strcmp(s.list[i].path, s.list[i - 1].path) != 0;
    struct stat st;
    bool small = true;
    for (int i = 0; i < s.count; i++) small = small && stat(s.list[i].path, &st) == 0 && st.st_size < 9000 + 4096;
    safetensors_close(&s);
    model_load(&again, directory);
    check(files > 3 && small && memcmp(m.params_memory, again.params_memory, m.table.num_params * sizeof(float)) == 0,
          "a model in %d files and an index: the same weights", files);
    delete_directory(directory);
    model_free(&m), model_free(&again);
}

int main(void) {
    snprintf(scratch, sizeof scratch, "/tmp/test_align_XXXXXX");
    CHECK(mkdtemp(scratch) != NULL, "no temporary directory");
    test_dpo_loss("qwen2"), test_dpo_loss("qwen3");
    test_dpo_steps("qwen2"), test_dpo_steps("qwen3");
    test_dpo_rows();
    static const char *const families[] = {"qwen2", "qwen3"};
    for (int i = 0; i < 2; i++) test_lora_gradients(families[i], 3, 13), test_lora_steps(families[i], 3, 13), test_lora_merged(families[i], 3, 13);
    test_bad_adapters();
    test_lora_plan();
    test_shards();
    delete_directory(scratch);
    return verdict();
}

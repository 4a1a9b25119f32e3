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

// fp32: sums of some hundred terms in another order than PyTorch's. bf16: every number on the way is rounded to 8 bits (see test_qwen.cu).
static const bool IS_BF16 = sizeof PRECISION == sizeof "bf16" && PRECISION[0] == 'b';
static const double TOLERANCE = IS_BF16 ? 5e-2 : 1e-5;

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
void check_tensors(const char *what, StoredTensors *s, const Model *m, const float *memory, const char *prefix) {
    float *wanted = expected_tensors(s, what, m, prefix, false);
    double worst = 0;
    for (int k = 0; k < m->table.count; k++) {
        const TensorInfo *t = &m->table.list[k];
        double error = relative_error(memory + t->offset, wanted + t->offset, t->rows * t->cols);
        if (!(error <= worst)) worst = error;
        if (!(error <= TOLERANCE)) check_close(t->name, memory + t->offset, wanted + t->offset, t->rows * t->cols, TOLERANCE);
    }
    check(worst <= TOLERANCE, "%-58s error %.1e (worst of %d tensors)", what, worst, m->table.count);
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
        if (!path) path = write_pairs(&s, path_of("%s.bin", family), 59);
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
        check_tensors(path_of("%s: gradients", shape), &s, &p->model, p->model.m_memory, "far.grad.");
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
    check_tensors(path_of("%s dpo, ten AdamW steps: final weights", family), &s, &p->model, p->model.params_memory, "steps.final.");
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
    test_shards();
    delete_directory(scratch);
    return verdict();
}

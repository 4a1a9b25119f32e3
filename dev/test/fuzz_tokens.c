// fuzz_tokens.c: any bytes as a token file. Byte 0: T - 1 (bits 0-3), mask of documents (4), shuffled (5), two shards (6), the header's
// magic, version and count of tokens are put right so that the rest is reached (7). Byte 1: what the header's task and the model's
// vocabulary are; then the file.
// Findings: what the sanitizers see; ids that the model does not have; rows that differ from the file, or from themselves.
#include "fuzz.h"

static Tokenizer *tokenizer;

void fuzz_start(void) { tokenizer = tokenizer_load("dev/data/qwen.bin"); }

void check_row(const Loader *l, uint64_t position) {
    int T = l->T;
    Batch row, again;
    batch_alloc(&row, 1, T), batch_alloc(&again, 1, T);
    double counted = loader_rows(l, position, 1, &row), targets = 0, documents = 0;
    loader_rows(l, position, 1, &again);
    for (int t = 0; t < T; t++) {
        fuzz_expect(row.tokens[t] >= 0 && row.tokens[t] < l->vocab_size && row.targets[t] >= 0 && row.targets[t] < l->vocab_size,
                    "row %d, place %d: token %d, target %d", (int)position, t, row.tokens[t], row.targets[t]);
        int before = t > 0 ? row.start[t - 1] : 0;
        fuzz_expect(row.start[t] >= before && row.start[t] <= t, "start %d at %d", row.start[t], t);
        fuzz_expect(row.weights[t] == 0 || row.weights[t] == 1, "weight %g", (double)row.weights[t]);
        fuzz_expect(row.weights[t] == 0 || t + 1 == T || row.targets[t] == row.tokens[t + 1], "the target at %d is not the next token", t);
        fuzz_expect(row.tokens[t] == again.tokens[t] && row.targets[t] == again.targets[t] && row.weights[t] == again.weights[t] &&
                    row.start[t] == again.start[t], "the same row, not the same tokens");
        targets += row.weights[t], documents += row.document[t] >= 0 && (t == 0 || row.document[t] != row.document[t - 1]);
    }
    double wanted = l->task == TASK_DPO ? documents / 2 : targets;
    fuzz_expect(counted == wanted, "%g targets or pairs count, not %g", counted, wanted);
    batch_free(&row), batch_free(&again);
}

void fuzz_one(const unsigned char *data, size_t size) {
    if (size < 2) return;
    int options = data[0], second = data[1];
    char *file = fuzz_copy(data + 2, size -= 2);
    if (options & 128 && size >= sizeof(TokenFileHeader)) {
        TokenFileHeader h;
        size -= size % 4;
        memcpy(&h, file, sizeof h);
        memcpy(h.magic, TOKEN_FILE_MAGIC, 8);
        h.version = TOKEN_FILE_VERSION, h.task = second & 3, h.num_tokens = (size - sizeof h) / 4;
        memcpy(file, &h, sizeof h);
    }
    fuzz_write(file, size);
    int vocab = second & 4 ? 1 + (second >> 3) : 151936, T = 1 + (options & 15);
    Loader l;
    memset(&l, 0, sizeof l);
    for (int i = 0; i < 1 + (options >> 6 & 1); i++) loader_add(&l, fuzz_path);
    Task task = (Task)l.shards[0].header->task;
    loader_open(&l, task, T, vocab, options >> 4 & 1, options >> 5 & 1, 42);
    for (uint64_t i = 0; i < 2 * l.num_rows && i < 64; i++) check_row(&l, i);
    if (l.num_rows > 0) check_row(&l, UINT64_MAX - 1);
    int tokens[8];
    int n = l.num_tokens > 0 ? loader_document_start(&l, (uint64_t)second * 7919, tokens, 8) : 0;
    for (int i = 0; i < n; i++) fuzz_expect(tokens[i] >= 0 && tokens[i] < vocab, "prompt token %d", tokens[i]);
    loader_close(&l);
    stdout = fuzz_messages;
    show_file(fuzz_path, tokenizer, 4);
    free(file);
}

// How fast is tokenizer.h? bench_tokenizer.py starts this beside other tokenizers and compares.
//   bench_tokenizer TOKENIZER THREADS
// After "ready", each line on standard input is "DOCUMENTS IDS", two paths. It reads the documents (for each a u32, its bytes, and the
// bytes), encodes them, writes for each a u32, the number of its tokens, and their ids as u32, and answers with the seconds of encoding.
#define QWEN_NO_MAIN
#include "../../train_qwen.c"

typedef struct { const char *text; size_t len; TokenList tokens; } Sample;

void encode_samples(const Tokenizer *t, Sample *list, int64_t count, int threads) {
    (void)threads;    // without OpenMP there is one
    #pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        Sample *s = &list[i];
        s->tokens.ids = NULL;
        s->tokens.count = s->tokens.capacity = 0;
        tokenizer_encode(t, s->text, s->len, SPECIALS_AS_TEXT, &s->tokens);
    }
}

typedef struct { char *data; Sample *list; int64_t count; } Samples;

void load_samples(Samples *s, const char *path) {
    size_t size;
    int64_t capacity = 0;
    free(s->data);
    s->data = read_file(path, &size);
    s->count = 0;
    for (size_t at = 0, len; at < size; at += 4 + len) {
        CHECK(size - at >= 4 && size - at - 4 >= bin_get(s->data + at, 4), "%s ends within a document", path);
        len = (size_t)bin_get(s->data + at, 4);
        if (s->count == capacity) {
            capacity = 2 * capacity + 1024;
            s->list = (Sample *)xrealloc(s->list, (size_t)capacity * sizeof(Sample));
        }
        s->list[s->count].text = s->data + at + 4;
        s->list[s->count++].len = len;
    }
}

void write_ids(const Samples *s, const char *path) {
    FILE *f = create_file(path);
    for (int64_t i = 0; i < s->count; i++) {
        uint32_t n = (uint32_t)s->list[i].tokens.count;
        fwrite(&n, 4, 1, f);
        fwrite(s->list[i].tokens.ids, 4, n, f);
    }
    close_file(f, path);
}

int main(int argc, char **argv) {
    CHECK(argc == 3, "bench_tokenizer TOKENIZER THREADS");
    Tokenizer *t = tokenizer_load(argv[1]);
    Samples samples = {NULL, NULL, 0};
    char documents[1024], ids[1024];
    puts("ready");
    while (fflush(stdout), scanf("%1023s %1023s", documents, ids) == 2) {
        load_samples(&samples, documents);
        double start = now_s();
        encode_samples(t, samples.list, samples.count, atoi(argv[2]));
        double seconds = now_s() - start;
        write_ids(&samples, ids);
        printf("%.6f\n", seconds);
        for (int64_t i = 0; i < samples.count; i++) free(samples.list[i].tokens.ids);
    }
    return 0;
}

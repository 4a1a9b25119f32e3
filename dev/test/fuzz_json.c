// fuzz_json.c: any bytes as JSON, and as files that prepare reads. Byte 0 chooses what is done with the rest:
//   bits 0-1 the format, bits 2-3 the task (3: json_parse alone), bits 4-7 the first size of the reader's buffer.
// Findings: what the sanitizers see; leaks; a record that depends on how the file fell into batches; records that overlap or miss bytes
// of the text; a document without its end marker; a value that is another one after writing and reading it.
#include "fuzz.h"

static Tokenizer *tokenizer;
static Encoder encoders[3];

void fuzz_start(void) {
    tokenizer = tokenizer_load("dev/data/qwen.bin");
    for (int task = 0; task < 3; task++) encoders[task] = encoder_make(tokenizer, (Task)task);
}

void write_value(FILE *f, const Json *value) {
    static const char *const words[] = {"null", "false", "true"};
    if (value->type <= JSON_TRUE) fputs(words[value->type], f);
    else if (value->type == JSON_NUMBER) fwrite(value->text, 1, value->len, f);
    else if (value->type == JSON_STRING) json_write_string(f, value->text, value->len);
    else {
        putc(value->type == JSON_ARRAY ? '[' : '{', f);
        for (const Json *member = value->child; member; member = member->next) {
            if (value->type == JSON_OBJECT) json_write_string(f, member->key, strlen(member->key)), putc(':', f);
            write_value(f, member);
            if (member->next) putc(',', f);
        }
        putc(value->type == JSON_ARRAY ? ']' : '}', f);
    }
}

char *written(const Json *value, size_t *len) {
    char *text = NULL;
    FILE *f = open_memstream(&text, len);
    write_value(f, value);
    fclose(f);
    char *copy = fuzz_copy(text, *len);
    (free)(text);                                                // this one came from the library
    return copy;
}

void parse_alone(const char *text, size_t len) {
    JsonError error;
    Json *value = json_parse(text, len, &error), *again;
    fuzz_expect(error.position <= len, "an error at byte %zu of %zu", error.position, len);
    if (!value) return;
    size_t size, size_again;
    char *first = written(value, &size), *second;
    again = json_parse(first, size, &error);
    fuzz_expect(again != NULL, "%s at byte %zu of %.*s", error.message, error.position, (int)size, first);
    second = written(again, &size_again);
    fuzz_expect(size == size_again && memcmp(first, second, size) == 0, "%.*s became %.*s", (int)size, first, (int)size_again, second);
    free(first), free(second), json_free(value), json_free(again);
}

// What a file gives: for every record its line, length, problem and text, one behind the other.
typedef struct { char *data; size_t size, capacity, count; } Listing;

void list_bytes(Listing *l, const void *data, size_t size) {
    if (l->size + size > l->capacity) l->data = (char *)xrealloc(l->data, l->capacity = 2 * (l->size + size) + 64);
    if (size > 0) memcpy(l->data + l->size, data, size);
    l->size += size;
}

void check_document(const Encoder *e, const Doc *d) {
    size_t ends = 0, begins = 0;
    for (size_t i = 0; i < d->tokens.count; i++) {
        ends += (d->tokens.ids[i] & TOKEN_ID_MASK) == e->end_id;
        begins += (d->tokens.ids[i] & TOKEN_DOC_START) != 0;
    }
    size_t documents = e->task == TASK_DPO ? 2 : 1;
    if (d->reason != KEPT) return;
    fuzz_expect(begins == documents && ends >= documents, "%zu beginnings, %zu ends, expected %zu", begins, ends, documents);
    fuzz_expect((d->tokens.ids[0] & TOKEN_DOC_START) && (d->tokens.ids[d->tokens.count - 1] & TOKEN_ID_MASK) == e->end_id, "no end marker");
    fuzz_expect(e->task != TASK_PRETRAIN || ends == 1, "%zu end markers in one document", ends);
}

// Reads like prepare_file: a batch is used after the next one was read.
Listing read_all(Format format, const Encoder *e, size_t capacity, const char *data, size_t size) {
    Reader r;
    Records batches[2] = {{NULL, 0, 0}, {NULL, 0, 0}};
    Listing listing = {NULL, 0, 0, 0};
    memset(&r, 0, sizeof r);
    r.capacity = capacity;
    r.buffer = (char *)xmalloc(capacity);
    reader_open(&r, fuzz_path, format, false);
    const char *at = data;
    read_batch(&r, &batches[0]);
    for (int now = 0; batches[now].count > 0; now = !now) {
        read_batch(&r, &batches[!now]);
        for (size_t i = 0; i < batches[now].count; i++) {
            const Record *record = &batches[now].list[i];
            uint64_t where[2] = {record->line, record->len};
            list_bytes(&listing, where, sizeof where);
            if (record->problem) list_bytes(&listing, record->problem, strlen(record->problem));
            list_bytes(&listing, record->text, record->len);
            listing.count++;
            at = (const char *)memmem(at, (size_t)(data + size - at), record->text, record->len);
            fuzz_expect(at != NULL, "record %zu is not in the rest of the file", listing.count);
            uint64_t line = 1;
            for (const char *p = data; p < at; p++) line += *p == '\n';
            fuzz_expect(line <= record->line || record->len == 0, "a record of line %d, not %d", (int)line, (int)record->line);
            at += record->len;
            Doc d;
            encode_record(e, r.format, record, &d);
            check_document(e, &d);
            free(d.tokens.ids);
        }
    }
    fuzz_expect(r.at_end && r.begin == r.end, "%zu bytes were never used", r.end - r.begin);
    reader_close(&r);
    free(r.buffer), free(r.spare), free(batches[0].list), free(batches[1].list);
    return listing;
}

void fuzz_one(const unsigned char *data, size_t size) {
    if (size == 0) return;
    int format = data[0] & 3, task = data[0] >> 2 & 3;
    size_t capacity = 16 + (size_t)(data[0] >> 4) * 5;      // the byte order mark must fit
    char *text = fuzz_copy(data + 1, --size);
    if (task == 3) parse_alone(text, size);
    else {
        fuzz_write(text, size);
        const Encoder *e = &encoders[format == FORMAT_TEXT ? TASK_PRETRAIN : task];
        Listing small = read_all((Format)format, e, capacity, text, size);
        Listing whole = read_all((Format)format, e, size + 64, text, size);
        bool same = small.count == whole.count && small.size == whole.size;
        same = same && (small.size == 0 || memcmp(small.data, whole.data, small.size) == 0);
        fuzz_expect(same, "a buffer of %zu bytes gives other records than one for all", capacity);
        free(small.data), free(whole.data);
    }
    free(text);
    fuzz_expect(fuzz_num_held == 0, "%zu blocks of memory were not freed", fuzz_num_held);
}

// prepare: data files (JSON, JSON lines, text) -> token files for the trainer.
//
//   cc -std=c11 -O3 -march=native -fno-math-errno -fopenmp -o prepare dev/data/prepare.c -lm
//   ./prepare --out data/wiki wikipedia-cn-20230720-filtered.json      -> train.bin, val.bin, tokenizer.bin
//   ./prepare --out data/belle --task sft Belle_open_source_1M.json
//   ./prepare --help
//
//   files --read 32 MB--> records --in parallel--> documents: tokens and flags --in order--> train.bin, val.bin
//
// Sections: 1 options | 2 files to records | 3 records to documents | 4 token files | 5 the bigram baseline | 6 prepare |
//           7 show | 8 tokenize, detokenize | 9 main.    dev/data/formats.md lists the data sets and the rules.
#define QWEN_NO_MAIN
#include "../../train_qwen.c"
#include "chat_template.h"
#include "nfkc.h"
#include <ctype.h>           // isalnum
#include <poll.h>
#include <strings.h>         // strcasecmp

// ---------------------------------------------------------------------------------------------------------------------------------
// 1. Options

enum { COMMAND_PREPARE = 1, COMMAND_TOKENIZE = 2, COMMAND_DETOKENIZE = 4, COMMAND_SHOW = 8 };
enum { TASK_AUTO = 3, SPECIALS_OF_FILE = 0, SPECIALS_NONE = 1 };
enum { TEMPLATE_QWEN2_5 = TEMPLATE_NONE + 1 };   // ChatML with Qwen2.5's system message where there is none
#define QWEN2_5_SYSTEM "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
static const char *const PREPARE_TASKS[] = {"pretrain", "sft", "dpo", "auto", NULL};
static const char *const PREPARE_TEMPLATES[] = {"chatml", "mini_llm", "none", "qwen2.5", NULL};      // TEMPLATES, and one more
static const char *const SPECIAL_SETS[] = {"file", "none", "v1", "qwen2", "qwen2.5", "qwen3", NULL};

static struct {
    const char *out, *tokenizer, *shown_tokenizer, *eos, *field, *system, *file;
    int task, special, parsed_special, chat_template;
    long min_chars, max_chars, shard_tokens, show, documents, threads;
    double val_fraction;
    bool trim_vocab, dedup, nfkc, strict, jsonl, ids;
} prep = {
    "", "dev/data/qwen.bin", "", "<|im_end|>", "", "", "-",
    TASK_AUTO, SPECIALS_OF_FILE, SPECIALS_NONE, TEMPLATE_CHATML,
    0, 0, 0, 0, 3, 0,
    0.01,
    false, false, false, false, false, false,
};

#define P_ COMMAND_PREPARE
#define K_ COMMAND_TOKENIZE
#define D_ COMMAND_DETOKENIZE
#define S_ COMMAND_SHOW
static const Option PREPARE_OPTIONS[] = {
    {"out",          P_,       OPTION_STRING, &prep.out,              0, NULL, "directory for train.bin, val.bin, tokenizer.bin"},
    {"task",         P_,       OPTION_CHOICE, &prep.task,             0, PREPARE_TASKS, "auto: what the first record's fields are for"},
    {"tokenizer",    P_|K_|D_, OPTION_STRING, &prep.tokenizer,        0, NULL, "a .bin, qwen.tiktoken, tokenizer.json, or directory"},
    {"tokenizer",    S_,       OPTION_STRING, &prep.shown_tokenizer,  0, NULL, "default: beside the file, else dev/data/qwen.bin"},
    {"special",      P_|D_,    OPTION_CHOICE, &prep.special,          0, SPECIAL_SETS, "special tokens; file: the tokenizer's own"},
    {"special",      K_,       OPTION_CHOICE, &prep.parsed_special,   0, SPECIAL_SETS, "recognised ones; none: all is text"},
    {"eos",          P_,       OPTION_STRING, &prep.eos,              0, NULL, "the special token that ends every document"},
    {"val-fraction", P_,       OPTION_FLOAT,  &prep.val_fraction,     0, NULL, "share of val.bin, chosen by a hash of the text"},
    {"trim-vocab",   P_,       OPTION_FLAG,   &prep.trim_vocab,       0, NULL, "keep only the tokens that this data uses"},
    {"field",        P_,       OPTION_STRING, &prep.field,            0, NULL, "pretrain: the field with the text; a.b looks inside a"},
    {"template",     P_,       OPTION_CHOICE, &prep.chat_template,    0, PREPARE_TEMPLATES, "sft, dpo: how a conversation is written"},
    {"system",       P_,       OPTION_STRING, &prep.system,           0, NULL, "sft, dpo: system message where there is none"},
    {"min-chars",    P_,       OPTION_INT,    &prep.min_chars,        0, NULL, "drop documents with fewer characters"},
    {"max-chars",    P_,       OPTION_INT,    &prep.max_chars,        0, NULL, "drop documents with more characters; 0: no limit"},
    {"dedup",        P_,       OPTION_FLAG,   &prep.dedup,            0, NULL, "drop repeated documents (same 64-bit hash)"},
    {"nfkc",         P_,       OPTION_FLAG,   &prep.nfkc,             0, NULL, "normalise with NFKC (full-width forms, ...); Qwen: NFC"},
    {"shard-tokens", P_,       OPTION_INT,    &prep.shard_tokens,     0, NULL, "at most so many a file, or one document; 0: one file"},
    {"strict",       P_,       OPTION_FLAG,   &prep.strict,           0, NULL, "stop at the first bad record, don't skip it"},
    {"show",         P_,       OPTION_INT,    &prep.show,             0, NULL, "print so many documents of the result"},
    {"threads",      P_|K_,    OPTION_INT,    &prep.threads,          0, NULL, "0: OMP_NUM_THREADS, or all cores"},
    {"file",         K_|D_,    OPTION_STRING, &prep.file,             0, NULL, "the input; -: standard input"},
    {"jsonl",        K_|D_,    OPTION_FLAG,   &prep.jsonl,            0, NULL, "one JSON string a line for one line of ids"},
    {"documents",    S_,       OPTION_INT,    &prep.documents,        0, NULL, "how many to print"},
    {"ids",          S_,       OPTION_FLAG,   &prep.ids,              0, NULL, "print ids; sft, dpo: a * after those that are trained"},
    {NULL, 0, OPTION_FLAG, NULL, 0, NULL, NULL},
};

// ---------------------------------------------------------------------------------------------------------------------------------
// 2. Files to records. A file is never in memory as a whole: the reader holds a batch, finds where its records begin and end, and
//    moves the incomplete last one to the front of the next batch.

#define BATCH_BYTES ((size_t)8 << 20)            // two of them are in memory: one is encoded while the next is read
enum { BATCH_RECORDS = 1 << 16 };
#define MAX_RECORD  ((size_t)16 << 20)           // longer JSON records are dropped,
#define TEXT_BYTES  ((size_t)8 << 20)            // longer texts are cut at a line end
#define CHUNK_BYTES ((size_t)256 << 10)          // `tokenize`: work for one thread

typedef enum { FORMAT_JSON, FORMAT_TEXT, FORMAT_LINES, FORMAT_CHUNKS, FORMAT_AUTO } Format;

typedef struct {
    const char *path;
    int file;
    Format format;
    bool interactive;              // don't wait for a full batch
    bool at_end;
    char *buffer, *spare;          // buffer[begin, end) is not yet used; spare: the batch before may still be there
    size_t begin, end, capacity, spare_capacity;
    bool keep;                     // what is in the buffer may not be overwritten: go on in the spare one
    uint64_t line, column;         // of buffer[begin]; lines from 1, columns from 0
    uint64_t bytes_read, size;     // size: of a regular file when it was opened, from where reading began; else 0
    int open_arrays;
    bool shares_line;              // something other than blanks and commas stands before buffer[begin] on its line
    bool lost;                     // after a broken record: look for a line that begins one, no further right than lost_column,
    uint64_t lost_column;          // or, if the broken one shared its line, for },{ and its own first key:
    char lost_head[64];            // the broken record up to there; its first character always
    size_t lost_head_len;          // 0: don't look for that
    uint64_t lost_bytes;           // passed over so far, without blanks
} Reader;

typedef struct { const char *text; size_t len; uint64_t line; const char *problem; } Record;    // problem: why it can't be parsed
typedef struct { Record *list; size_t count, capacity; } Records;

static volatile sig_atomic_t interrupted;
void on_interrupt(int signal_number) { interrupted = signal_number; }

// A signal ends the program where it next reads, a second one ends it at once. One that is ignored (nohup) stays so.
void catch_signal(int signal_number) {
    struct sigaction action;
    if (sigaction(signal_number, NULL, &action) != 0 || action.sa_handler == SIG_IGN) return;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt;
    action.sa_flags = (int)SA_RESETHAND;
    sigaction(signal_number, &action, NULL);
}

// read(), which a signal ends even while nothing comes: it may have gone to another thread, so waiting is no longer than 200 ms at a time.
ssize_t read_some(int file, char *to, size_t room) {
    struct pollfd input = {file, POLLIN, 0};
    do CHECK(!interrupted, "interrupted; nothing was written"); while (poll(&input, 1, 200) <= 0);
    return read(file, to, room);
}

void reader_fill(Reader *r) {
    size_t rest = r->end - r->begin, capacity = r->capacity;
    const char *from = r->buffer + r->begin;
    if (r->keep) {
        if (r->spare_capacity < capacity) r->spare = (char *)xrealloc(r->spare, r->spare_capacity = capacity);
        char *spare = r->spare;
        r->spare = r->buffer, r->buffer = spare;
        r->capacity = r->spare_capacity, r->spare_capacity = capacity;
        r->keep = false;
    }
    if (rest > 0) memmove(r->buffer, from, rest);
    r->begin = 0;
    r->end = rest;
    if (rest >= r->capacity / 2) {
        r->capacity = r->capacity ? 2 * r->capacity : BATCH_BYTES;
        r->buffer = (char *)xrealloc(r->buffer, r->capacity);
    }
    do {
        ssize_t n = read_some(r->file, r->buffer + r->end, r->capacity - r->end);
        CHECK(n >= 0 || errno == EINTR, "cannot read %s: %s", r->path, strerror(errno));
        if (n == 0) r->at_end = true;
        CHECK(!r->at_end || r->bytes_read >= r->size, "%s became shorter while it was read", r->path);
        if (n > 0) r->end += (size_t)n, r->bytes_read += (uint64_t)n;
    } while (!r->at_end && r->end < r->capacity && !r->interactive);
}

// Moves on by n bytes, counting lines.
void reader_advance(Reader *r, size_t n) {
    const char *s = r->buffer + r->begin, *stop = s + n, *newline;
    r->begin += n;
    while ((newline = (const char *)memchr(s, '\n', (size_t)(stop - s))) != NULL) {
        s = newline + 1;
        r->line++;
        r->column = 0;
    }
    r->column += (uint64_t)(stop - s);
}

bool has_ending(const char *path, const char *ending) {
    size_t n = strlen(path), m = strlen(ending);
    return n >= m && strcasecmp(path + n - m, ending) == 0;
}

bool has_json_name(const char *path) { return has_ending(path, ".json") || has_ending(path, ".jsonl"); }

// By name if it says so, else by content: JSON begins with { or [.
Format detect_format(const Reader *r) {
    static const char *const magic[][2] = {
        {"PAR1", "is a Parquet file"}, {"\x1F\x8B", "is compressed (gzip)"}, {"\x28\xB5\x2F\xFD", "is compressed (zstd)"},
        {"\xFD" "7zXZ", "is compressed (xz)"}, {"BZh", "is compressed (bzip2)"}, {"PK\x03\x04", "is a zip archive"},
        {"7z\xBC\xAF", "is a 7z archive"}, {"Rar!", "is a rar archive"}, {"\xFF\xFE", "is UTF-16"}, {"\xFE\xFF", "is UTF-16"},
        {"version https://git-lfs", "is a pointer of git-lfs, not the data (git lfs pull gets it)"},
        {TOKEN_FILE_MAGIC, "is a token file already"}, {BIN_MAGIC, "is a tokenizer"},
    };
    size_t at = 0;
    for (size_t i = 0; i < sizeof magic / sizeof magic[0]; i++) {
        size_t n = strlen(magic[i][0]);
        CHECK(r->end < n || memcmp(r->buffer, magic[i][0], n) != 0, "%s %s; prepare reads JSON, JSON lines and text (dev/data/formats.md "
              "says how to convert)", r->path, magic[i][1]);
    }
    if (has_ending(r->path, ".txt")) return FORMAT_TEXT;
    if (has_json_name(r->path)) return FORMAT_JSON;
    while (at < r->end && strchr(" \t\r\n\xEF\xBB\xBF", r->buffer[at]) && r->buffer[at]) at++;
    return at < r->end && (r->buffer[at] == '{' || r->buffer[at] == '[') ? FORMAT_JSON : FORMAT_TEXT;
}

void reader_open(Reader *r, const char *path, Format format, bool interactive) {
    struct stat st;
    Reader before = *r;                          // its memory is used again
    memset(r, 0, sizeof *r);
    r->buffer = before.buffer, r->capacity = before.capacity, r->spare = before.spare, r->spare_capacity = before.spare_capacity;
    r->path = strcmp(path, "-") == 0 ? "standard input" : path;
    r->file = strcmp(path, "-") == 0 ? STDIN_FILENO : open(path, O_RDONLY);
    r->line = 1;
    r->interactive = interactive;
    CHECK(r->file >= 0, "cannot open %s: %s", path, strerror(errno));
    CHECK(fstat(r->file, &st) == 0, "cannot open %s: %s", path, strerror(errno));
    CHECK(!S_ISDIR(st.st_mode), "%s is a directory; name the files, for example %s/*.jsonl", path, path);
    off_t at = S_ISREG(st.st_mode) ? lseek(r->file, 0, SEEK_CUR) : st.st_size;
    r->size = at < st.st_size ? (uint64_t)(st.st_size - at) : 0;
    reader_fill(r);
    r->format = format == FORMAT_AUTO ? detect_format(r) : format;
    bool has_mark = r->end >= 3 && memcmp(r->buffer, "\xEF\xBB\xBF", 3) == 0;
    if (has_mark && r->format <= FORMAT_TEXT) r->begin = 3;
}

void reader_close(Reader *r) {
    if (r->file != STDIN_FILENO) close(r->file);
}

// The next n bytes are a record.
bool take_record(Reader *r, size_t n, const char *problem, Record *record) {
    record->text = r->buffer + r->begin;
    record->len = n;
    record->line = r->line;
    record->problem = problem;
    reader_advance(r, n);
    r->shares_line = r->column > 0;
    return true;
}

bool is_blank_char(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

typedef enum { STRING_CLOSED, STRING_OPEN, STRING_BROKEN } StringEnd;

// Looks for the end of the string that begins at s[at]: *end is one past its quote, or a line break, which a JSON string can't have.
StringEnd find_string_end(const char *s, size_t at, size_t len, size_t *end) {
    for (at++; at < len; at++) {
        *end = at;
        if (s[at] == '"') return ++*end, STRING_CLOSED;
        if (s[at] == '\n') return STRING_BROKEN;
        if (s[at] == '\\' && at + 1 < len && s[at + 1] != '\n') at++;
    }
    *end = len;
    return STRING_OPEN;
}

// Length of the record that is the string s[0, end): it ends there, or text follows and the whole line is no JSON. 0: needs more bytes.
size_t string_extent(const Reader *r, const char *s, size_t end, size_t len, const char **problem) {
    size_t next = end;
    while (next < len && s[next] != '\n' && is_blank_char(s[next])) next++;
    bool is_record = next == len || s[next] == '\n' || s[next] == ',' || s[next] == ']';
    if (!is_record) while (next < len && s[next] != '\n') next++;
    if (next == len && !r->at_end && len < MAX_RECORD) return 0;
    if (!is_record) *problem = "text after the string";
    return is_record ? end : next;
}

bool is_json(const char *s, size_t len) {
    JsonError error;
    Json *root = json_parse(s, len, &error);
    bool is = root != NULL;
    json_free(root);
    return is;
}

// Length of the record that begins at s[0] with { or ", 0 if more bytes are needed. One broken record must not take others with it:
// at a { where none can stand, or a line that begins at the record's column (or left of it) with the record's own first key, it was cut off
// and the next one begins. A { in an array without a comma before it counts if it begins such a line: otherwise only the comma is missing.
// If the record's first key has a line of its own (printed without indentation), such a line may also be a part of the record, and counts
// only if that turns out to be broken. With a line break inside a string, the reader is lost until a line looks like a record again.
size_t json_extent(Reader *r, const char *s, size_t len, const char **problem) {
    bool is_object[JSON_MAX_DEPTH + 1], line_begins = false;
    int depth = 0;
    size_t key = 1, i = 0, line_at = 0, next = 0, end;
    char previous = 0;
    while (key < len && is_blank_char(s[key])) key++;
    if (key == len || s[0] != '{' || s[key] != '"' || find_string_end(s, key, len, &key) != STRING_CLOSED) key = 0;
    for (; i < len && i < MAX_RECORD; i++) {
        char c = s[i];
        if (is_blank_char(c)) {
            if (c == '\n') line_begins = true, line_at = i + 1;
            continue;
        }
        int inner = depth < JSON_MAX_DEPTH ? depth : JSON_MAX_DEPTH;
        if (c == '"') {
            StringEnd state = find_string_end(s, i, len, &end);
            i = state == STRING_CLOSED ? end - 1 : end;
            if (state != STRING_CLOSED) break;
        } else if (c == '{' || c == '[') {
            bool left = c == '{' && line_begins && i - line_at <= r->column, comma = previous == '[' || previous == ',';
            bool misplaced = c == '{' && depth > 0 && (is_object[inner] ? previous != ':' : left && !comma);
            bool repeated = left && key > 0 && len - i >= key && memcmp(s + i, s, key) == 0;
            if (repeated && next == 0) next = i;
            bool is_cut = misplaced || (next > 0 && (depth >= JSON_MAX_DEPTH || !memchr(s, '\n', key)));
            if (is_cut) return *problem = "it is cut off", next > 0 ? next : i;
            is_object[++depth <= JSON_MAX_DEPTH ? depth : JSON_MAX_DEPTH] = c == '{';
        } else if ((c == '}' || c == ']') && depth > 0) depth--;
        if (depth == 0 && next > 0 && !is_json(s, i + 1)) break;
        if (depth == 0) return c == '"' ? string_extent(r, s, i + 1, len, problem) : i + 1;
        previous = c;
        line_begins = false;
    }
    if (i == len && !r->at_end && len < MAX_RECORD) return 0;
    if (next > 0) return *problem = "it is cut off", next;
    r->lost = true;
    r->lost_column = r->column;
    r->lost_head_len = r->shares_line && key <= sizeof r->lost_head ? key : 0;
    memcpy(r->lost_head, s, r->lost_head_len > 0 ? r->lost_head_len : 1);
    *problem = i >= MAX_RECORD ? "it is longer than 16 MB" : i < len ? "line break inside a string" : "the file ends inside it";
    return i;
}

// Can a record begin behind s[0], a line end or a }? 1: yes, 0: no, -1: more bytes will tell.
int json_begins(const Reader *r, const char *s, size_t len) {
    size_t at = 1, head = r->lost_head_len;
    bool comma = false;
    if (*s == '}') {
        for (; at < len && (is_blank_char(s[at]) || (s[at] == ',' && !comma)); at++) comma |= s[at] == ',';
        if (len - at < head && !r->at_end && memcmp(s + at, r->lost_head, len - at) == 0) return -1;
        return comma && len - at >= head && memcmp(s + at, r->lost_head, head) == 0;
    }
    while (at < len && (s[at] == ' ' || s[at] == '\t')) at++;
    if (at < len && at - 1 > r->lost_column) return 0;
    while (at < len && (s[at] == ' ' || s[at] == '\t' || s[at] == ',' || s[at] == '[')) at++;
    if (at == len) return r->at_end ? 0 : -1;
    return s[at] == '{' || (s[at] == '"' && r->lost_head[0] == '"');
}

// Goes on to what can begin a record after a broken one. False: it may come with more bytes.
bool json_resync(Reader *r) {
    while (r->begin < r->end) {
        const char *s = r->buffer + r->begin;
        size_t rest = r->end - r->begin, n = 0;
        while (n < rest && s[n] != '\n' && (s[n] != '}' || r->lost_head_len == 0)) r->lost_bytes += !is_blank_char(s[n++]);
        int begins = n < rest ? json_begins(r, s + n, rest - n) : 0;
        if (begins < 0) return reader_advance(r, n), false;
        if (n < rest) r->lost_bytes += s[n] == '}', r->shares_line = s[n++] == '}';
        reader_advance(r, n);
        if (begins > 0) return r->lost = false, true;
    }
    if (r->at_end) r->lost = false, r->open_arrays = 0;          // what was passed over may have closed them
    return r->at_end;
}

// JSON lines, several values on a line, pretty-printed values and arrays of values are all the same here: values, and commas and
// brackets of arrays between them.
bool next_json(Reader *r, Record *record) {
    if (r->lost && !json_resync(r)) return false;
    const char *s = r->buffer + r->begin, *start = s;
    size_t len = r->end - r->begin, n;
    const char *problem = NULL;
    for (; len > 0; s++, len--) {
        if (len >= 3 && memcmp(s, "\xEF\xBB\xBF", 3) == 0) s += 2, len -= 2;       // files were joined
        else if (*s == '[' || *s == ']') r->open_arrays += *s == '[' ? 1 : -1, r->shares_line = true;
        else if (*s == '\n') r->shares_line = false;
        else if (*s != ',' && !is_blank_char(*s)) break;
    }
    reader_advance(r, (size_t)(s - start));
    if (!r->at_end && len < 3 && len > 0 && (unsigned char)*s == 0xEF) return false;
    if (len == 0) {
        if (!r->at_end || r->open_arrays <= 0) return false;
        r->open_arrays = 0;
        return take_record(r, 0, "the file ends before its array does", record);
    }
    if (*s == '{' || *s == '"') n = json_extent(r, s, len, &problem);
    else {                                                           // a number, a word, garbage
        for (n = 0; n < len && (isalnum((unsigned char)s[n]) || strchr("+-._", s[n])) && s[n]; n++) {}
        if (n < len && s[n] != ',' && s[n] != ']') while (n < len && s[n] != '\n') n++;
        if (n == len && !r->at_end && len < MAX_RECORD) n = 0;
    }
    return n > 0 && take_record(r, n, problem, record);
}

bool is_blank(const char *s, size_t len) {
    while (len > 0 && is_blank_char(s[len - 1])) len--;
    return len == 0;
}

// Plain text: documents end at blank lines.
bool next_text(Reader *r, Record *record) {
    for (;;) {
        const char *s = r->buffer + r->begin, *newline;
        size_t len = r->end - r->begin, at = 0, line;
        for (;; at += line) {
            newline = (const char *)memchr(s + at, '\n', len - at);
            if (!newline && !r->at_end && len < MAX_RECORD) return false;
            line = newline ? (size_t)(newline - s) + 1 - at : len - at;
            if (line == 0 || is_blank(s + at, line)) break;
            if (at > 0 && at + line > TEXT_BYTES) break;
            if (line > TEXT_BYTES) {                                 // one endless line: cut it between characters
                line = TEXT_BYTES;
                while (line > 0 && (s[line] & 0xC0) == 0x80) line--;
                at = line > 0 ? line : TEXT_BYTES;
                break;
            }
        }
        if (at == 0 && line == 0) return false;                      // the end
        take_record(r, at > 0 ? at : line, NULL, record);
        record->len = at;                                            // 0: a blank line
        while (record->len > 0 && is_blank_char(s[record->len - 1])) record->len--;
        if (record->len > 0) return true;
    }
}

// `tokenize --jsonl`: lines, also empty ones.
bool next_line(Reader *r, Record *record) {
    const char *s = r->buffer + r->begin, *newline = (const char *)memchr(s, '\n', r->end - r->begin);
    size_t rest = r->end - r->begin;
    if (!newline && (!r->at_end || rest == 0)) return false;
    take_record(r, newline ? (size_t)(newline - s) + 1 : rest, NULL, record);
    record->len -= newline != NULL;
    return true;
}

// `tokenize`: pieces that can be encoded one by one. Between a line end and a letter there is always a border, for the splitter's
// pattern as for NFC, as long as the letter is none that joins to what is before it.
bool next_chunk(Reader *r, Record *record) {
    const char *s = r->buffer + r->begin;
    size_t rest = r->end - r->begin, stop = CHUNK_BYTES;
    for (const char *newline = s; stop < rest && newline; ) {
        newline = (const char *)memchr(s + stop, '\n', rest - stop);
        stop = newline ? (size_t)(newline - s) + 1 : rest;
        uint32_t c;
        if (stop < rest && utf8_decode(s + stop, rest - stop, &c) > 0 && unicode_bits(c) == CLASS_LETTER) break;
    }
    if (stop >= rest && (!r->at_end || rest == 0)) return false;
    return take_record(r, stop < rest ? stop : rest, NULL, record);
}

// The next records of the file, at most BATCH_RECORDS; they stay valid until the call after the next one. Their number; 0 at the end.
size_t read_batch(Reader *r, Records *batch) {
    static bool (*const next[])(Reader *, Record *) = {next_json, next_text, next_line, next_chunk};
    Record record;
    r->keep = true;
    for (batch->count = 0;; reader_fill(r)) {
        while (batch->count < BATCH_RECORDS && next[r->format](r, &record)) {
            if (batch->count == batch->capacity) {
                batch->capacity = 2 * batch->capacity + 1024;
                batch->list = (Record *)xrealloc(batch->list, batch->capacity * sizeof(Record));
            }
            batch->list[batch->count++] = record;
        }
        if (batch->count > 0 || r->at_end) return batch->count;
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 3. Records to documents. This runs in parallel, one record a call; nothing here may depend on other records.

typedef enum {
    KEPT, BAD_JSON, BAD_UTF8, BAD_SURROGATE, HAS_NUL, NO_FIELD, NULL_FIELD, WRONG_TYPE, EMPTY_TEXT, UNKNOWN_ROLE, NO_ANSWER, TWO_PROMPTS,
    EQUAL_ANSWERS, LAST_BAD = EQUAL_ANSWERS, DUPLICATE, TOO_SHORT, TOO_LONG, NUM_REASONS
} Reason;                                        // up to LAST_BAD: bad records, which --strict doesn't allow
static const char *const REASONS[] = {
    "", "malformed JSON", "invalid UTF-8", "lone surrogate", "NUL character", "missing field", "null field", "wrong type", "empty text",
    "unknown role", "no answer", "with two different prompts", "with two equal answers", "duplicate", "below --min-chars",
    "above --max-chars",
};

typedef struct {
    const Tokenizer *tokenizer;
    Task task;
    uint32_t end_id;
    ChatTemplate chat;                           // sft, dpo
} Encoder;

typedef struct {
    Reason reason;
    const char *detail;                          // the field's name, or the parser's message
    TokenList tokens;                            // with flags; dpo: chosen and rejected, one behind the other
    uint64_t hash;                               // of the text
    size_t chars;
} Doc;

typedef struct { Role role; const char *text; size_t len; bool has_input; } Message;      // has_input: an instruction with its input
typedef struct { char *data; size_t size, capacity; } Text;
typedef struct { Message *list; int count, capacity; Text joined; } Conversation;        // joined: instruction and input

bool refuse(Doc *d, Reason reason, const char *detail) {
    d->reason = reason;
    d->detail = detail;
    return false;
}

// What NFKC writes for a compatibility character, NULL for any other.
const char *compatibility_text(uint32_t c) {
    for (int low = 0, high = NUM_COMPATIBILITY; low < high;) {
        int middle = (low + high) / 2;
        if (unicode_compatibility[middle].code == c) return unicode_compatibility[middle].text;
        if (unicode_compatibility[middle].code < c) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

// A copy of valid text with its compatibility characters replaced; NFC, which the tokenizer does, makes it NFKC.
char *replace_compatibility(const char *text, size_t len, size_t *new_len) {
    size_t room = len + 64, used = 0;
    char *out = (char *)xmalloc(room);
    for (size_t i = 0, n; i < len; i += n) {
        uint32_t c;
        n = (size_t)utf8_decode(text + i, len - i, &c);
        const char *replaced = c < 0x80 ? NULL : compatibility_text(c), *from = replaced ? replaced : text + i;
        size_t size = replaced ? strlen(replaced) : n;
        if (used + size > room) out = (char *)xrealloc(out, room = 2 * room + size);
        memcpy(out + used, from, size);
        used += size;
    }
    *new_len = used;
    return out;
}

Encoder encoder_make(const Tokenizer *t, Task task) {
    Encoder e;
    memset(&e, 0, sizeof e);
    e.tokenizer = t;
    e.task = task;
    const Special *end = special_find(t, prep.eos);
    CHECK(end != NULL, "--eos %s is no special token here (the tokenizer has the set '%s'); choose another --eos or --special", prep.eos,
          t->special_set);
    e.end_id = end->id;
    int kind = task == TASK_PRETRAIN ? TEMPLATE_NONE : prep.chat_template == TEMPLATE_QWEN2_5 ? TEMPLATE_CHATML : prep.chat_template;
    e.chat = template_make((TemplateKind)kind, t, e.end_id);
    return e;
}

bool is_empty_text(const char *text, size_t len) { return split_skip(text, 0, len, CLASS_SPACE) == len; }

// Counts and checks one text of a document.
bool add_text(Doc *d, const char *text, size_t len, const char *field) {
    if (memchr(text, 0, len)) return refuse(d, HAS_NUL, field);
    if (is_empty_text(text, len)) return refuse(d, EMPTY_TEXT, field);
    for (size_t i = 0; i < len; i++) d->chars += (text[i] & 0xC0) != 0x80;
    d->hash = fnv1a(fnv1a(d->hash, "", 1), text, len);                     // the NUL separates texts
    return true;
}

bool check_length(Doc *d) {
    if (d->chars < (size_t)prep.min_chars) return refuse(d, TOO_SHORT, "");
    return prep.max_chars == 0 || d->chars <= (size_t)prep.max_chars || refuse(d, TOO_LONG, "");
}

const Json *first_of(const Json *record, const char *const *keys, const char **key) {
    const Json *found = NULL;
    for (; *keys && !found; keys++) found = json_get(record, *key = *keys);
    return found;
}

bool is_string(Doc *d, const Json *value, const char *field) {
    if (!value) return refuse(d, NO_FIELD, field);
    if (value->type == JSON_NULL) return refuse(d, NULL_FIELD, field);
    return value->type == JSON_STRING || refuse(d, WRONG_TYPE, field);
}

// 3a. Pretraining: text + end.

void add_bytes(Text *t, const char *bytes, size_t len) {
    if (t->size + len > t->capacity) {
        t->capacity = 2 * (t->size + len) + 64;
        t->data = (char *)xrealloc(t->data, t->capacity);
    }
    if (len > 0) memcpy(t->data + t->size, bytes, len);
    t->size += len;
}

// Appends a part on a line of its own; missing, null and empty parts are left out.
bool add_line(Text *t, Doc *d, const Json *part, const char *field) {
    if (!part || part->type == JSON_NULL || (part->type == JSON_STRING && part->len == 0)) return true;
    if (!is_string(d, part, field)) return false;
    if (t->size > 0) add_bytes(t, "\n", 1);
    add_bytes(t, part->text, part->len);
    return true;
}

// Encyclopedia articles (Baidu Baike's crawl, MNBVC) and others with a title: the title and the parts, a line each.
bool article_text(Doc *d, const Json *record, Text *t) {
    static const char *const lists[] = {"sections", "段落", NULL};
    const char *field = "";
    const Json *list = first_of(record, lists, &field);
    if (!add_line(t, d, json_get(record, "title"), "title") || !add_line(t, d, json_get(record, "summary"), "summary")) return false;
    if (!add_line(t, d, json_get(record, "content"), "content")) return false;
    if (list && list->type != JSON_ARRAY && list->type != JSON_NULL) return refuse(d, WRONG_TYPE, field);
    for (const Json *part = list ? list->child : NULL; part; part = part->next) {
        if (part->type != JSON_OBJECT && part->type != JSON_NULL) return refuse(d, WRONG_TYPE, field);
        if (!add_line(t, d, json_get(part, "title"), "title") || !add_line(t, d, json_get(part, "content"), "content")) return false;
        if (!add_line(t, d, json_get(part, "内容"), "内容")) return false;
    }
    return true;
}

static const char *const TEXT_FIELDS[] = {"text", "completion", "content", NULL};
static const char *const ARTICLE_FIELDS[] = {"段落", "sections", "summary", NULL};

void encode_text(const Encoder *e, Doc *d, const char *text, size_t len, const char *field) {
    if (!add_text(d, text, len, field) || !check_length(d)) return;
    char *copy = prep.nfkc ? replace_compatibility(text, len, &len) : NULL;
    tokenizer_encode_text(e->tokenizer, copy ? copy : text, len, &d->tokens);
    free(copy);
    token_list_push(&d->tokens, e->end_id);
    d->tokens.ids[0] |= TOKEN_DOC_START;
}

void encode_pretrain(const Encoder *e, Doc *d, const Json *record) {
    const char *field = prep.field, *article_field;
    const Json *value = record;
    Text article = {NULL, 0, 0};
    if (prep.field[0]) {
        value = json_get(record, field);
        if (!value) value = json_at(record, field);
    } else if (record->type == JSON_OBJECT) {
        value = first_of(record, TEXT_FIELDS, &field);
        bool has_title = value && value->type == JSON_STRING && strcmp(field, "content") == 0 && json_get(record, "title");
        if (has_title ? !is_empty_text(value->text, value->len) : !value && first_of(record, ARTICLE_FIELDS, &article_field)) {
            if (article_text(d, record, &article)) encode_text(e, d, article.data ? article.data : "", article.size, "title, parts");
            free(article.data);
            return;
        }
        if (!value) field = "text";
    }
    if (is_string(d, value, field)) encode_text(e, d, value->text, value->len, field);
}

// 3b. Conversations.

void push_message(Conversation *c, Role role, const char *text, size_t len) {
    if (c->count == c->capacity) {
        c->capacity = 2 * c->capacity + 8;
        c->list = (Message *)xrealloc(c->list, (size_t)c->capacity * sizeof(Message));
    }
    Message m = {role, text, len, false};
    c->list[c->count++] = m;
}

bool add_message(Doc *d, Conversation *c, Role role, const char *text, size_t len, const char *field) {
    if (!add_text(d, text, len, field)) return false;
    push_message(c, role, text, len);
    return true;
}

static const char *const ROLE_FIELDS[] = {"role", "from", NULL};

// NUM_ROLES if it is none.
Role find_role(const char *name) {
    static const char *const names[NUM_ROLES][5] = {{"system"}, {"user", "human"}, {"assistant", "gpt", "bot", "chatgpt", "model"}};
    for (int r = 0; r < NUM_ROLES; r++) {
        for (int i = 0; i < 5 && names[r][i]; i++) if (strcasecmp(name, names[r][i]) == 0) return (Role)r;
    }
    return NUM_ROLES;
}

// {"from": "human", "value": ...} or {"role": "user", "content": ...}; a blank system message counts as none.
bool add_message_json(Doc *d, Conversation *c, const Json *message) {
    static const char *const what[] = {"content", "value", NULL};
    const char *role_field = "role", *text_field = "content";
    if (message->type != JSON_OBJECT) return refuse(d, WRONG_TYPE, "message");
    const Json *role = first_of(message, ROLE_FIELDS, &role_field), *text = first_of(message, what, &text_field);
    if (!is_string(d, role, role ? role_field : "role") || !is_string(d, text, text ? text_field : "content")) return false;
    Role r = find_role(role->text);
    if (r == NUM_ROLES) return refuse(d, UNKNOWN_ROLE, role_field);
    return (r == ROLE_SYSTEM && is_empty_text(text->text, text->len)) || add_message(d, c, r, text->text, text->len, text_field);
}

// A string, a message, or a list of messages.
bool add_messages(Doc *d, Conversation *c, const Json *value, Role role_of_string, const char *field) {
    if (value && value->type == JSON_OBJECT) return add_message_json(d, c, value);
    if (!value || value->type != JSON_ARRAY) {
        return is_string(d, value, field) && add_message(d, c, role_of_string, value->text, value->len, field);
    }
    for (const Json *m = value->child; m; m = m->next) if (!add_message_json(d, c, m)) return false;
    return true;
}

static const char *const LIST_FIELDS[] = {"messages", "conversations", NULL};
static const char *const PROMPT_FIELDS[] = {"instruction", "prompt", "question", "query", NULL};
static const char *const ANSWER_FIELDS[] = {"output", "response", "answer", "completion", NULL};
static const char *const REJECTED_FIELDS[] = {"rejected", "reject", NULL};

// The field "system", if there is one and it is not blank.
bool add_system(Doc *d, Conversation *c, const Json *record) {
    const Json *system = json_get(record, "system");
    if (!system || system->type == JSON_NULL) return true;
    if (!is_string(d, system, "system")) return false;
    return is_empty_text(system->text, system->len) || add_message(d, c, ROLE_SYSTEM, system->text, system->len, "system");
}

// What the user says: a list of messages, or system, history [[question, answer], ...], instruction and input.
bool add_prompt(const Encoder *e, Doc *d, Conversation *c, const Json *record) {
    const char *field = PROMPT_FIELDS[0];
    const Json *list = first_of(record, LIST_FIELDS, &field);
    const Json *prompt = list ? list : first_of(record, PROMPT_FIELDS, &field), *input = json_get(record, "input");
    if (list && list->type != JSON_ARRAY) return refuse(d, list->type == JSON_NULL ? NULL_FIELD : WRONG_TYPE, field);
    if (!prompt) field = PROMPT_FIELDS[0];
    if (!add_system(d, c, record)) return false;
    const Json *history = list ? NULL : json_get(record, "history");
    if (history && history->type != JSON_ARRAY && history->type != JSON_NULL) return refuse(d, WRONG_TYPE, "history");
    for (const Json *turn = history ? history->child : NULL; turn; turn = turn->next) {
        const Json *question = turn->child, *answer = question ? question->next : NULL;
        if (!is_string(d, question, "history") || !is_string(d, answer, "history")) return false;
        if (!add_message(d, c, ROLE_USER, question->text, question->len, "history")) return false;
        if (!add_message(d, c, ROLE_ASSISTANT, answer->text, answer->len, "history")) return false;
    }
    if (input && input->type != JSON_STRING && input->type != JSON_NULL) return refuse(d, WRONG_TYPE, "input");
    bool has_input = input && input->type == JSON_STRING && !is_empty_text(input->text, input->len);
    if (!prompt || prompt->type != JSON_STRING || !has_input) return add_messages(d, c, prompt, ROLE_USER, field);
    c->joined.size = 0;
    add_bytes(&c->joined, prompt->text, prompt->len);
    if (prompt->len > 0) add_bytes(&c->joined, template_joint(&e->chat), 1);
    add_bytes(&c->joined, input->text, input->len);
    if (!add_message(d, c, ROLE_USER, c->joined.data, c->joined.size, field)) return false;
    return c->list[c->count - 1].has_input = true;
}

// The messages as the template says, end_id once more if the last token is another.
// Loss counts on the answers from message `first_trained` on, each with its end marker, and on nothing else.
void encode_conversation(const Encoder *e, const Conversation *c, int first_trained, TokenList *out) {
    size_t begin = out->count;
    for (int i = 0; i < c->count; i++) {
        const Message *m = &c->list[i];
        uint32_t flags = m->role == ROLE_ASSISTANT && i >= first_trained ? 0 : TOKEN_NO_LOSS;
        template_before(&e->chat, m->role, i == 0, TOKEN_NO_LOSS, out);
        size_t len = m->len;
        char *copy = prep.nfkc ? replace_compatibility(m->text, len, &len) : NULL;
        const char *text = copy ? copy : m->text;
        if (m->role == ROLE_USER && !m->has_input) template_question(&e->chat, e->tokenizer, text, len, flags, out);
        else template_content(&e->chat, e->tokenizer, m->role, text, len, flags, out);
        free(copy);
        template_after(&e->chat, m->role, flags, out);
    }
    if ((out->ids[out->count - 1] & TOKEN_ID_MASK) != e->end_id) token_list_push(out, e->end_id | TOKEN_NO_LOSS);
    out->ids[begin] |= TOKEN_DOC_START;
}

void move_last_to_front(Conversation *c) {
    Message last = c->list[c->count - 1];
    memmove(c->list + 1, c->list, (size_t)(c->count - 1) * sizeof(Message));
    c->list[0] = last;
}

// Ends the conversation with its last answer, and puts a system message before it if it has none: --system, or Qwen2.5's with its
// template. Qwen3 has no such message.
bool finish_conversation(Doc *d, Conversation *c) {
    const char *text = prep.system[0] == 0 && prep.chat_template == TEMPLATE_QWEN2_5 ? QWEN2_5_SYSTEM : prep.system;
    while (c->count > 0 && c->list[c->count - 1].role != ROLE_ASSISTANT) c->count--;
    if (c->count == 0) return refuse(d, NO_ANSWER, "");
    if (text[0] == 0 || c->list[0].role == ROLE_SYSTEM) return true;
    push_message(c, ROLE_SYSTEM, text, strlen(text));
    move_last_to_front(c);
    return true;
}

void encode_sft(const Encoder *e, Doc *d, const Json *record, Conversation *c) {
    const char *field;
    bool is_list = first_of(record, LIST_FIELDS, &field) != NULL;
    if (!add_prompt(e, d, c, record)) return;
    if (!is_list) {
        const Json *answer = first_of(record, ANSWER_FIELDS, &field);
        if (!answer) field = ANSWER_FIELDS[0];
        if (!is_string(d, answer, field) || !add_message(d, c, ROLE_ASSISTANT, answer->text, answer->len, field)) return;
    }
    if (finish_conversation(d, c) && check_length(d)) encode_conversation(e, c, 0, &d->tokens);
}

// A whole conversation as an answer may lack the system message that the record has: as "system", or at the start of its prompt.
bool add_system_of_prompt(Doc *d, Conversation *c, const Json *record) {
    const char *field;
    int count = c->count;
    if (!add_system(d, c, record)) return false;
    const Json *prompt = first_of(record, LIST_FIELDS, &field);
    if (!prompt) prompt = first_of(record, PROMPT_FIELDS, &field);
    const Json *first = prompt && prompt->type == JSON_ARRAY ? prompt->child : NULL, *role = first_of(first, ROLE_FIELDS, &field);
    bool is_system = c->count == count && role && role->type == JSON_STRING && find_role(role->text) == ROLE_SYSTEM;
    if (is_system && !add_message_json(d, c, first)) return false;
    if (c->count > count) move_last_to_front(c);
    return true;
}

// One side of a pair. An answer given as a list of messages may hold the prompt too (then it doesn't begin with the assistant).
bool encode_side(const Encoder *e, Doc *d, const Json *record, const Json *answer, const char *field, Conversation *c) {
    Doc before = *d;
    c->count = 0;
    if (!add_messages(d, c, answer, ROLE_ASSISTANT, field)) return false;
    if (c->count == 0 || c->list[0].role == ROLE_ASSISTANT) {
        *d = before, c->count = 0;
        if (!add_prompt(e, d, c, record) || !add_messages(d, c, answer, ROLE_ASSISTANT, field)) return false;
    } else if (c->list[0].role != ROLE_SYSTEM && !add_system_of_prompt(d, c, record)) return false;
    if (!finish_conversation(d, c)) return false;
    encode_conversation(e, c, c->count - 1, &d->tokens);
    return true;
}

// What differs is the last answer, and nothing else.
bool check_pair(Doc *d, size_t chosen) {
    const uint32_t *a = d->tokens.ids, *b = a + chosen;
    size_t rejected = d->tokens.count - chosen, prompt = 0;
    while (a[prompt] & TOKEN_NO_LOSS) prompt++;
    bool same_prompt = prompt < rejected && memcmp(a, b, prompt * sizeof *a) == 0 && !(b[prompt] & TOKEN_NO_LOSS);
    if (!same_prompt) return refuse(d, TWO_PROMPTS, "");
    return chosen != rejected || memcmp(a, b, chosen * sizeof *a) != 0 || refuse(d, EQUAL_ANSWERS, "");
}

void encode_dpo(const Encoder *e, Doc *d, const Json *record, Conversation *c) {
    const char *field = "rejected";
    const Json *rejected = first_of(record, REJECTED_FIELDS, &field);
    if (!rejected) field = "rejected";
    if (!encode_side(e, d, record, json_get(record, "chosen"), "chosen", c)) return;
    size_t chosen = d->tokens.count;
    if (encode_side(e, d, record, rejected, field, c) && check_pair(d, chosen)) check_length(d);
}

// A Task, or TASK_AUTO if the record has no field that says.
int detect_task(const Json *record) {
    const char *field;
    if (prep.field[0] || record->type == JSON_STRING) return TASK_PRETRAIN;
    if (json_get(record, "chosen") && first_of(record, REJECTED_FIELDS, &field)) return TASK_DPO;
    if (first_of(record, LIST_FIELDS, &field)) return TASK_SFT;
    if (first_of(record, PROMPT_FIELDS, &field) && first_of(record, ANSWER_FIELDS, &field)) return TASK_SFT;
    return first_of(record, TEXT_FIELDS, &field) || first_of(record, ARTICLE_FIELDS, &field) ? (int)TASK_PRETRAIN : TASK_AUTO;
}

// 3c. Any record.

void encode_json(const Encoder *e, Doc *d, const char *text, size_t len) {
    JsonError error;
    Json *json = json_parse(text, len, &error);
    if (!json) {
        bool surrogate = strcmp(error.message, "lone surrogate") == 0, utf8 = strcmp(error.message, "invalid UTF-8") == 0;
        refuse(d, surrogate ? BAD_SURROGATE : utf8 ? BAD_UTF8 : BAD_JSON, surrogate || utf8 ? "" : error.message);
        return;
    }
    Conversation c = {NULL, 0, 0, {NULL, 0, 0}};
    bool is_object = json->type == JSON_OBJECT;
    if (!is_object && (e->task != TASK_PRETRAIN || json->type != JSON_STRING)) refuse(d, WRONG_TYPE, "the record is no object");
    else if (e->task == TASK_PRETRAIN) encode_pretrain(e, d, json);
    else if (e->task == TASK_SFT) encode_sft(e, d, json, &c);
    else encode_dpo(e, d, json, &c);
    free(c.list);
    free(c.joined.data);
    json_free(json);
}

void encode_plain(const Encoder *e, Doc *d, const char *text, size_t len) {
    uint32_t c;
    int n;
    for (size_t i = 0; i < len; i += (size_t)n) {
        if ((n = utf8_decode(text + i, len - i, &c)) < 0) { refuse(d, BAD_UTF8, ""); return; }
    }
    char *copy = (char *)xmalloc(len + 1);
    size_t size = 0;
    for (size_t i = 0; i < len; i++) if (text[i] != '\r' || (i + 1 < len && text[i + 1] != '\n')) copy[size++] = text[i];
    encode_text(e, d, copy, size, "");
    free(copy);
}

void encode_record(const Encoder *e, Format format, const Record *record, Doc *d) {
    memset(d, 0, sizeof *d);
    d->hash = FNV_START;
    if (record->problem) refuse(d, BAD_JSON, record->problem);
    else if (format == FORMAT_TEXT) encode_plain(e, d, record->text, record->len);
    else encode_json(e, d, record->text, record->len);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 4. Token files. All are written as NAME.tmp and get their names at the very end, when nothing can fail any more.

typedef struct { const char *path, *temporary; FILE *file; uint64_t tokens, documents; } TokenFile;      // file: NULL once it is full

typedef struct {
    TokenFile *files;                            // train shards in order, and val anywhere
    int count, train, val;                       // indices of the files being written; -1: none yet
    int num_shards;
    bool finished;
} Output;
static Output output = {NULL, 0, -1, -1, 0, false};
enum { MAX_SHARDS = 100000 };                    // their names, train_00000.bin and so on, are in order

// At exit: what has not got its name by then is an unfinished file.
void remove_unfinished(void) {
    for (int i = 0; i < output.count && !output.finished; i++) unlink(output.files[i].temporary);
}

// No second program may write into the directory. The lock ends with the program.
void output_lock(void) {
    int directory = open(prep.out, O_RDONLY);
    CHECK(directory >= 0, "cannot open %s: %s", prep.out, strerror(errno));
    CHECK(flock(directory, LOCK_EX | LOCK_NB) == 0, "another prepare is writing into %s; wait for it, or choose another --out", prep.out);
}

int output_open(const char *path) {
    TokenFileHeader none;                        // zeros, until the counts are known
    memset(&none, 0, sizeof none);
    output.files = (TokenFile *)xrealloc(output.files, (size_t)(output.count + 1) * sizeof(TokenFile));
    TokenFile *f = &output.files[output.count];
    memset(f, 0, sizeof *f);
    f->path = path;
    f->temporary = path_of("%s.tmp", path);
    f->file = fopen(f->temporary, "wb");
    CHECK(f->file != NULL, "cannot write %s: %s", f->temporary, strerror(errno));
    setvbuf(f->file, NULL, _IOFBF, 1 << 20);
    fwrite(&none, sizeof none, 1, f->file);
    return output.count++;
}

// The file is full: everything goes to the disk, and a full disk shows here at the latest.
void output_close(TokenFile *f) {
    if (f->file) close_file(f->file, f->path);
    f->file = NULL;
}

void output_write(bool is_val, const Doc *d, Task task) {
    int *at = is_val ? &output.val : &output.train;
    uint64_t room = (uint64_t)prep.shard_tokens;
    if (!is_val && room > 0 && *at >= 0 && output.files[*at].tokens + d->tokens.count > room) {
        output_close(&output.files[*at]);
        *at = -1;
    }
    if (*at < 0) {
        CHECK(is_val || output.num_shards < MAX_SHARDS, "more than %d files; raise --shard-tokens", MAX_SHARDS);
        const char *path = is_val ? path_of("%s/val.bin", prep.out) : room == 0 ? path_of("%s/train.bin", prep.out)
                         : path_of("%s/train_%05d.bin", prep.out, output.num_shards);
        output.num_shards += !is_val;
        *at = output_open(path);
    }
    TokenFile *f = &output.files[*at];
    size_t written = fwrite(d->tokens.ids, sizeof(uint32_t), d->tokens.count, f->file);
    CHECK(written == d->tokens.count, "cannot write %s: %s", f->path, strerror(errno));
    f->tokens += d->tokens.count;
    f->documents += task == TASK_DPO ? 2 : 1;
}

// The tokens of an unfinished file, mapped into memory; changes go to the file.
uint32_t *output_map(const TokenFile *f) {
    int file = open(f->temporary, O_RDWR);
    CHECK(file >= 0, "cannot open %s: %s", f->temporary, strerror(errno));
    void *map = mmap(NULL, sizeof(TokenFileHeader) + f->tokens * 4, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(map != MAP_FAILED, "cannot map %s: %s", f->temporary, strerror(errno));
    close(file);
    return (uint32_t *)((char *)map + sizeof(TokenFileHeader));
}

void output_unmap(const TokenFile *f, uint32_t *tokens) {
    munmap((char *)tokens - sizeof(TokenFileHeader), sizeof(TokenFileHeader) + f->tokens * 4);
}

void output_renumber(const uint32_t *new_id) {
    for (int k = 0; k < output.count; k++) {
        uint32_t *tokens = output_map(&output.files[k]);
        int64_t n = (int64_t)output.files[k].tokens;
        #pragma omp parallel for
        for (int64_t i = 0; i < n; i++) tokens[i] = (tokens[i] & ~(uint32_t)TOKEN_ID_MASK) | new_id[tokens[i] & TOKEN_ID_MASK];
        output_unmap(&output.files[k], tokens);
    }
}

// Writes the header and waits until the file is on the disk.
void output_header(const TokenFile *f, const Encoder *e, float bigram_loss) {
    TokenFileHeader h;
    memset(&h, 0, sizeof h);
    memcpy(h.magic, TOKEN_FILE_MAGIC, 8);
    h.version = TOKEN_FILE_VERSION;
    h.task = (uint32_t)e->task;
    h.num_tokens = f->tokens;
    h.num_documents = f->documents;
    h.vocab_size = (uint32_t)e->tokenizer->vocab_size;
    h.end_id = e->end_id;
    h.tokenizer_hash = e->tokenizer->hash;
    snprintf(h.special_set, sizeof h.special_set, "%s", e->tokenizer->special_set);
    h.bigram_loss = bigram_loss;
    FILE *file = fopen(f->temporary, "rb+");
    CHECK(file != NULL, "cannot open %s: %s", f->temporary, strerror(errno));
    fwrite(&h, sizeof h, 1, file);
    close_file(file, f->path);
}

// train.bin, train_00000.bin, val.bin, or one of them unfinished (.tmp)?
bool is_token_file_name(const char *name) {
    const char *number = strncmp(name, "train_", 6) == 0 ? name + 6 : NULL;
    size_t digits = number ? strspn(number, "0123456789") : 0;
    const char *ending = digits > 0 ? number + digits : strncmp(name, "train", 5) == 0 ? name + 5
                       : strncmp(name, "val", 3) == 0 ? name + 3 : "";
    return strcmp(ending, ".bin") == 0 || strcmp(ending, ".bin.tmp") == 0;
}

// Token files of an earlier run that this one doesn't replace: the trainer would mix them with the new ones. Also what a killed run left.
void remove_stale(void) {
    DIR *directory = opendir(prep.out);
    CHECK(directory != NULL, "cannot list %s: %s", prep.out, strerror(errno));
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        const char *path = path_of("%s/%s", prep.out, entry->d_name);
        bool is_new = false;
        for (int k = 0; k < output.count; k++) is_new |= strcmp(output.files[k].path, path) == 0;
        if (!is_token_file_name(entry->d_name) || is_new || unlink(path) != 0) continue;
        printf("%sremoved %s, left by an earlier run\n", isatty(STDOUT_FILENO) ? "\r\033[K" : "", path);
    }
    closedir(directory);
}

// The files get their names. The tokenizer is the last that a full disk can stop: nothing of an earlier run is gone before it is written.
// The rest takes no time; should the program be killed in between, the tokenizer's hash in the headers tells whether old and new mix.
void output_finish(const Encoder *e, float bigram_loss) {
    for (int i = 0; i < output.count; i++) output_header(&output.files[i], e, i == output.val ? bigram_loss : 0);
    tokenizer_save_bin(e->tokenizer, path_of("%s/tokenizer.bin", prep.out));
    for (int i = 0; i < output.count; i++) {
        const TokenFile *f = &output.files[i];
        CHECK(rename(f->temporary, f->path) == 0, "cannot rename %s: %s", f->temporary, strerror(errno));
    }
    output.finished = true;
    remove_stale();
    sync_directory(prep.out);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 5. The bigram baseline: what a table of neighbours reaches on val.bin. A trained model must be better.
//
//    p(n | p) = (count(p, n) + a p1(n)) / (count(p) + a),    p1(n) = (count(n) + 1) / (N + V)
//
//    Counts are of the training tokens; a is the best of a few values for val.bin itself, which favours the baseline.
//    Only the pairs that val.bin has are counted, so the memory follows val.bin, not the corpus.

enum { BIGRAM_VOCAB = 16384 };                   // a pair p * V + n fits 28 bits

typedef struct { uint32_t pair, in_val, in_train; } PairCount;              // in_val 0: an empty slot
typedef struct { PairCount *slots; uint32_t size, used; } PairTable;        // size: a power of two

PairCount *pair_count(const PairTable *t, uint32_t pair) {
    uint32_t i = (uint32_t)(mix64(pair) & (t->size - 1));
    while (t->slots[i].in_val > 0 && t->slots[i].pair != pair) i = (i + 1) & (t->size - 1);
    return &t->slots[i];
}

void pair_add(PairTable *t, uint32_t pair) {
    if (2 * t->used >= t->size) {
        PairTable bigger = {(PairCount *)xcalloc(2 * (size_t)t->size, sizeof(PairCount)), 2 * t->size, t->used};
        for (uint32_t i = 0; i < t->size; i++) if (t->slots[i].in_val) *pair_count(&bigger, t->slots[i].pair) = t->slots[i];
        free(t->slots);
        *t = bigger;
    }
    PairCount *slot = pair_count(t, pair);
    if (slot->in_val++ == 0) slot->pair = pair, t->used++;
}

// Counts one training file into the pairs of val, count (how often a token is there) and before (how often one follows it).
void bigram_count(const PairTable *pairs, const TokenFile *f, uint32_t V, uint64_t *count, uint64_t *before) {
    uint32_t *tokens = output_map(f);
    int64_t n = (int64_t)f->tokens;
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        uint32_t id = tokens[i] & TOKEN_ID_MASK, next = i + 1 < n ? tokens[i + 1] & TOKEN_ID_MASK : 0;
        #pragma omp atomic
        count[id]++;
        if (i + 1 == n) continue;
        #pragma omp atomic
        before[id]++;
        PairCount *slot = pair_count(pairs, id * V + next);
        if (slot->in_val == 0) continue;
        #pragma omp atomic
        slot->in_train++;
    }
    output_unmap(f, tokens);
}

// Mean nats per token of val.bin, its first excepted; 0 if there is nothing to count.
float bigram_loss(uint32_t V) {
    if (output.val < 0 || output.count < 2 || output.files[output.val].tokens < 2) return 0;
    const TokenFile *val = &output.files[output.val];
    PairTable pairs = {(PairCount *)xcalloc(1 << 16, sizeof(PairCount)), 1 << 16, 0};
    uint32_t *tokens = output_map(val);
    for (uint64_t i = 1; i < val->tokens; i++) pair_add(&pairs, (tokens[i - 1] & TOKEN_ID_MASK) * V + (tokens[i] & TOKEN_ID_MASK));
    output_unmap(val, tokens);
    uint64_t *count = (uint64_t *)xcalloc(V, 8), *before = (uint64_t *)xcalloc(V, 8), N = 0;
    for (int k = 0; k < output.count; k++) {
        if (k == output.val) continue;
        bigram_count(&pairs, &output.files[k], V, count, before);
        N += output.files[k].tokens;
    }
    double best = INFINITY;
    for (double a = 1.0 / 16; a < 1e5; a *= 1.25) {
        double sum = 0;
        for (uint32_t i = 0; i < pairs.size; i++) {
            const PairCount *s = &pairs.slots[i];
            if (s->in_val == 0) continue;
            double p1 = (double)(count[s->pair % V] + 1) / (double)(N + V);
            sum -= s->in_val * log((s->in_train + a * p1) / ((double)before[s->pair / V] + a));
        }
        if (sum < best) best = sum;
    }
    free(pairs.slots);
    free(count);
    free(before);
    return (float)(best / (double)(val->tokens - 1));
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 6. prepare

enum { FIRST_SAMPLES = 32, SAMPLE_BYTES = 4 << 20, REPORTED = 5 };

typedef struct { Format format; Record record; TokenList tokens; } Sample;      // --trim-vocab: to be encoded again

typedef struct {
    Encoder encoder;
    int task;                                    // a Task, or TASK_AUTO until the first record
    uint64_t documents, records[NUM_REASONS], chars, tokens, trained, longest;
    uint64_t bytes, total_bytes;                 // read so far; of all files, 0 if one isn't a regular file
    uint64_t lost_bytes;                         // behind broken records
    bool is_text_perhaps;                        // a file that only looks like JSON gave malformed JSON and nothing else
    unsigned char *used;                         // by id
    uint64_t *seen, num_seen, seen_size;         // --dedup: hashes, open addressing, 0 empty
    Sample *samples;
    int num_samples;
    size_t sample_bytes;
    double began, last_line;
} Preparation;

uint64_t *seen_slot(const Preparation *run, uint64_t hash) {
    uint64_t i = mix64(hash) & (run->seen_size - 1);
    while (run->seen[i] != 0 && run->seen[i] != hash) i = (i + 1) & (run->seen_size - 1);
    return &run->seen[i];
}

// Is it new? 64 bits: among 100 million documents, the chance that two different ones share a hash is 0.03 %.
bool is_first(Preparation *run, uint64_t hash) {
    if (hash == 0) hash = 1;
    if (4 * run->num_seen >= 3 * run->seen_size) {
        uint64_t *old = run->seen, old_size = run->seen_size;
        run->seen_size = old_size ? 2 * old_size : 1 << 16;
        run->seen = (uint64_t *)xcalloc(run->seen_size, sizeof(uint64_t));
        for (uint64_t i = 0; i < old_size; i++) if (old[i]) *seen_slot(run, old[i]) = old[i];
        free(old);
    }
    uint64_t *slot = seen_slot(run, hash);
    if (*slot == hash) return false;
    *slot = hash;
    run->num_seen++;
    return true;
}

// The share val_fraction of all hashes: a document stays in val.bin whatever else is in the data.
bool belongs_to_val(uint64_t hash) { return (double)(mix64(hash) >> 11) * 0x1p-53 < prep.val_fraction; }

void report_bad(Preparation *run, const char *path, const Record *record, const Doc *d) {
    uint64_t bad = 0;
    for (int r = KEPT + 1; r <= LAST_BAD; r++) bad += run->records[r];
    char reason[256];
    snprintf(reason, sizeof reason, "%s%s%s%s", REASONS[d->reason], d->detail[0] ? " (" : "", d->detail, d->detail[0] ? ")" : "");
    CHECK(!prep.strict, "%s:%" PRIu64 ": %s; --strict stops here, nothing was written", path, record->line, reason);
    if (bad > REPORTED) return;
    fprintf(stderr, "%s%s:%" PRIu64 ": skipped, %s\n", isatty(STDERR_FILENO) ? "\r\033[K" : "", path, record->line, reason);
    if (bad == REPORTED) fprintf(stderr, "more like these are only counted\n");
}

void keep_sample(Preparation *run, Format format, const Record *record, const Doc *d) {
    bool wanted = run->num_samples < FIRST_SAMPLES || (d->hash & 1023) == 0;
    if (!prep.trim_vocab || !wanted || run->sample_bytes + record->len > SAMPLE_BYTES) return;
    if ((run->num_samples & (run->num_samples - 1)) == 0) {
        run->samples = (Sample *)xrealloc(run->samples, (2 * (size_t)run->num_samples + 1) * sizeof(Sample));
    }
    Sample *s = &run->samples[run->num_samples++];
    char *copy = (char *)xmalloc(record->len + 1);
    memcpy(copy, record->text, record->len);
    memset(s, 0, sizeof *s);
    s->format = format;
    s->record = *record;
    s->record.text = copy;
    push_tokens(&s->tokens, &d->tokens, 0);
    run->sample_bytes += record->len;
}

// One document, in file order.
void take(Preparation *run, const Reader *r, const Record *record, Doc *d) {
    if (d->reason == KEPT && prep.dedup && !is_first(run, d->hash)) d->reason = DUPLICATE;
    run->records[d->reason]++;
    if (d->reason >= BAD_JSON && d->reason <= LAST_BAD) report_bad(run, r->path, record, d);
    if (d->reason != KEPT) return;
    uint64_t length = 0;
    for (size_t i = 0; i < d->tokens.count; i++) {
        uint32_t token = d->tokens.ids[i];
        run->used[token & TOKEN_ID_MASK] = 1;
        run->trained += !(token & TOKEN_NO_LOSS);
        length = token & TOKEN_DOC_START ? 1 : length + 1;
        if (length > run->longest) run->longest = length;
    }
    run->documents += run->task == TASK_DPO ? 2 : 1;
    run->tokens += d->tokens.count;
    run->chars += d->chars;
    keep_sample(run, r->format, record, d);
    output_write(belongs_to_val(d->hash), d, (Task)run->task);
}

// A terminal gets one line that is written again and again, anything else a line now and then.
void print_progress(Preparation *run, bool terminal) {
    double now = now_s(), seconds = now - run->began, rate = (double)run->bytes / seconds, total = (double)run->total_bytes;
    double share = total > 0 ? (double)run->bytes / total : 0;
    enum { BAR = 24 };
    if (now - run->last_line < (terminal ? 0.2 : 5)) return;
    run->last_line = now;
    if (terminal) printf("\r\033[K");
    if (terminal && total > 0) printf("[%.*s%*s] ", (int)(share * BAR), "========================", BAR - (int)(share * BAR), "");
    printf("%.0f MB", (double)run->bytes / 1e6);
    if (total > 0) printf(" of %.0f (%.0f %%)", total / 1e6, 100 * share);
    printf(", %.1f MB/s, %.2f M tokens", rate / 1e6, (double)run->tokens / 1e6);
    if (run->total_bytes > run->bytes) printf(", %s left", time_text((double)(run->total_bytes - run->bytes) / rate));
    printf(terminal ? " " : "\n");
    fflush(stdout);
}

// An option that the task has no use for is a mistake.
void check_task(int task) {
    CHECK(!prep.field[0] || (task != TASK_SFT && task != TASK_DPO), "--field is for pretraining, not for --task %s", PREPARE_TASKS[task]);
    CHECK(task != TASK_PRETRAIN || !(was_given(&prep.chat_template) || was_given(&prep.system)),
          "--%s is for sft and dpo, but this is pretraining; leave it out, or give --task", was_given(&prep.system) ? "system" : "template");
}

void find_task(Preparation *run, const Tokenizer *t, Format format, const Records *batch) {
    for (size_t i = 0; i < batch->count && run->task == TASK_AUTO; i++) {
        Json *json = format == FORMAT_JSON && !batch->list[i].problem ? json_parse(batch->list[i].text, batch->list[i].len, NULL) : NULL;
        if (format == FORMAT_TEXT) run->task = TASK_PRETRAIN;
        if (json) run->task = detect_task(json);
        json_free(json);
    }
    check_task(run->task);
    run->encoder = encoder_make(t, run->task == TASK_AUTO ? TASK_PRETRAIN : (Task)run->task);
}

// The documents of one batch, in order; frees them.
void take_batch(Preparation *run, const Reader *r, Records *batch, Doc *documents) {
    for (size_t i = 0; i < batch->count; i++) {
        take(run, r, &batch->list[i], &documents[i]);
        free(documents[i].tokens.ids);
    }
    if (batch->count > 0) free(documents);
    batch->count = 0;
}

// While all threads encode a batch, one of them first writes the batch before and reads the batch after it.
void prepare_file(Preparation *run, const Tokenizer *t, Reader *r, const char *path) {
    static Records batches[2];
    Doc *documents[2] = {NULL, NULL};
    bool terminal = isatty(STDOUT_FILENO);
    uint64_t bytes_before = run->bytes, documents_before = run->documents, malformed_before = run->records[BAD_JSON];
    reader_open(r, path, FORMAT_AUTO, false);
    CHECK(r->format == FORMAT_JSON || run->task == TASK_PRETRAIN || run->task == TASK_AUTO,
          "%s is plain text; --task %s needs JSON records", r->path, PREPARE_TASKS[run->task]);
    int now = 0;
    read_batch(r, &batches[now]);
    for (; batches[now].count > 0; now = !now) {
        Records *batch = &batches[now], *other = &batches[!now];
        int64_t count = (int64_t)batch->count;
        if (run->task == TASK_AUTO) find_task(run, t, r->format, batch);
        Doc *encoded = documents[now] = (Doc *)xmalloc(batch->count * sizeof(Doc));
        #pragma omp parallel
        {
            #pragma omp single nowait
            {
                take_batch(run, r, other, documents[!now]);
                print_progress(run, terminal);
                run->bytes = bytes_before + r->bytes_read - (r->end - r->begin);
                read_batch(r, other);
            }
            #pragma omp for schedule(dynamic, 4)
            for (int64_t i = 0; i < count; i++) encode_record(&run->encoder, r->format, &batch->list[i], &encoded[i]);
        }
    }
    take_batch(run, r, &batches[!now], documents[!now]);
    run->bytes = bytes_before + r->bytes_read;
    run->lost_bytes += r->lost_bytes;
    if (r->format == FORMAT_JSON && !has_json_name(path) && run->documents == documents_before) {
        run->is_text_perhaps |= run->records[BAD_JSON] > malformed_before;
    }
    reader_close(r);
}

// Chat models need these whatever the corpus is about.
void use_chat_words(Preparation *run) {
    for (int r = 0; r < NUM_ROLES; r++) {
        const TokenList *list = &run->encoder.chat.roles[r];
        for (size_t i = 0; i < list->count; i++) run->used[list->ids[i]] = 1;
    }
    for (size_t i = 0; i < run->encoder.chat.newline.count; i++) run->used[run->encoder.chat.newline.ids[i]] = 1;
}

// The number that each token of t has in `small`; NO_TOKEN if it's gone.
uint32_t *id_map(const Tokenizer *t, const Tokenizer *small) {
    uint32_t *map = (uint32_t *)xmalloc((size_t)t->vocab_size * sizeof(uint32_t));
    for (uint32_t id = 0; id < (uint32_t)t->vocab_size; id++) {
        size_t len;
        const char *bytes = tokenizer_bytes(t, id, &len);
        const Special *special = id >= (uint32_t)t->num_ranks && len > 0 ? special_find(small, bytes) : NULL;
        map[id] = id < (uint32_t)t->num_ranks ? token_find(small, bytes, len) : special ? special->id : NO_TOKEN;
    }
    return map;
}

// Fewer tokens, the same segmentation: so the files only need new numbers. The samples prove it: encoded again from their text, they
// must be the renumbered tokens.
Tokenizer *trim(Preparation *run, const Tokenizer *t) {
    use_chat_words(run);
    Tokenizer *small = tokenizer_trim(t, run->used);
    if (prep.special != SPECIALS_OF_FILE) tokenizer_use_specials(small, SPECIAL_SETS[prep.special]);
    uint32_t *map = id_map(t, small);
    Encoder encoder = encoder_make(small, (Task)run->task);
    for (int k = 0; k < run->num_samples; k++) {
        Sample *s = &run->samples[k];
        Doc d;
        encode_record(&encoder, s->format, &s->record, &d);
        bool same = d.tokens.count == s->tokens.count;
        for (size_t i = 0; same && i < d.tokens.count; i++) {
            same = d.tokens.ids[i] == ((s->tokens.ids[i] & ~(uint32_t)TOKEN_ID_MASK) | map[s->tokens.ids[i] & TOKEN_ID_MASK]);
        }
        CHECK(same, "--trim-vocab: the small vocabulary cuts the document of line %" PRIu64 " at other places; this should not happen, "
              "please report it with the file", s->record.line);
        free(d.tokens.ids);
    }
    output_renumber(map);
    unsigned char *used = (unsigned char *)xcalloc((size_t)t->vocab_size, 1);
    for (int id = 0; id < t->vocab_size; id++) if (run->used[id] && map[id] != NO_TOKEN) used[map[id]] = 1;
    free(run->used);
    run->used = used;
    run->encoder = encoder;
    free(map);
    return small;
}

const char *input_hint(const Preparation *run) {
    uint64_t others = 0;
    for (int r = 0; r < NUM_REASONS; r++) others += r != BAD_UTF8 ? run->records[r] : 0;
    if (run->records[BAD_UTF8] > others) return "; is it GBK? then: iconv -f GB18030 -t UTF-8 FILE | ./prepare --out DIR -";
    return run->is_text_perhaps ? " (read as JSON; name it .txt if it is text)" : "";
}

void print_summary(const Preparation *run, const Tokenizer *t, int full_vocabulary, float bigram) {
    double seconds = now_s() - run->began;
    uint64_t dropped = 0;
    int used = 0;
    if (isatty(STDOUT_FILENO)) printf("\r\033[K");
    for (int i = 0; i < output.count; i++) {
        const TokenFile *f = &output.files[i];
        printf("%s  %" PRIu64 " documents, %" PRIu64 " tokens", f->path, f->documents, f->tokens);
        if (i == output.val && bigram > 0) printf("; a bigram model's loss on it is %.4f", bigram);
        printf("\n");
    }
    if (output.val < 0 && prep.val_fraction > 0) printf("no val.bin: none of so few documents fell to it; raise --val-fraction\n");
    for (int id = 0; id < t->vocab_size; id++) used += run->used[id];
    printf("%s/tokenizer.bin  %d tokens, %d of them used", prep.out, t->vocab_size, used);
    if (prep.trim_vocab) printf("; trimmed from %d; %d documents encoded again: same tokens", full_vocabulary, run->num_samples);
    double tokens = (double)run->tokens;
    printf("\n%s: %" PRIu64 " documents, %" PRIu64 " characters, %" PRIu64 " tokens (%.3f a character), the longest document has %" PRIu64,
           TASK_NAMES[run->task], run->documents, run->chars, run->tokens, tokens / (double)run->chars, run->longest);
    if (run->task != TASK_PRETRAIN) printf("; %" PRIu64 " are trained (%.1f %%)", run->trained, 100.0 * (double)run->trained / tokens);
    for (int r = KEPT + 1; r < NUM_REASONS; r++) dropped += run->records[r];
    printf("\ndropped: %" PRIu64 " records", dropped);
    for (int r = KEPT + 1, n = 0; r < NUM_REASONS; r++) {
        if (run->records[r] > 0) printf("%s%" PRIu64 " %s", n++ ? ", " : ": ", run->records[r], REASONS[r]);
    }
    if (run->lost_bytes > 0) printf("; %" PRIu64 " bytes behind broken records were passed over", run->lost_bytes);
    printf("%s\n%.1f MB in %.1f s, %.1f MB/s\n", input_hint(run), (double)run->bytes / 1e6, seconds, (double)run->bytes / 1e6 / seconds);
}

uint64_t total_size(const char **paths, int count) {
    uint64_t total = 0;
    struct stat st;
    bool known = true;
    for (int i = 0; i < count; i++) {
        if (strcmp(paths[i], "-") == 0) { known = false; continue; }
        CHECK(stat(paths[i], &st) == 0 && access(paths[i], R_OK) == 0, "cannot open %s: %s", paths[i], strerror(errno));
        known = known && S_ISREG(st.st_mode);
        total += (uint64_t)st.st_size;
    }
    return known ? total : 0;
}

void show_file(const char *path, const Tokenizer *t, int64_t documents);

void prepare(const char **paths, int num_paths) {
    CHECK(num_paths > 0, "no input; name the data files, for example ./prepare --out data/wiki wiki.json; --help explains all");
    CHECK(prep.out[0], "--out is missing: the directory for train.bin, val.bin and tokenizer.bin");
    CHECK(prep.val_fraction < 1, "--val-fraction is %g, it must be below 1", prep.val_fraction);
    CHECK(prep.max_chars == 0 || prep.max_chars >= prep.min_chars, "--max-chars is below --min-chars");
    check_task(prep.task);
    catch_signal(SIGINT);
    catch_signal(SIGTERM);
    catch_signal(SIGHUP);
    signal(SIGXFSZ, SIG_IGN);                    // a file-size limit then shows as a failed write
    atexit(remove_unfinished);

    Preparation run;
    memset(&run, 0, sizeof run);
    run.total_bytes = total_size(paths, num_paths);
    Tokenizer *t = tokenizer_load(prep.tokenizer);
    if (prep.special != SPECIALS_OF_FILE) tokenizer_use_specials(t, SPECIAL_SETS[prep.special]);
    CHECK(t->vocab_size <= TOKEN_ID_MASK, "%s has ids up to %d; token files hold ids below 2^24", prep.tokenizer, t->vocab_size - 1);
    run.task = prep.task;
    run.encoder = encoder_make(t, run.task == TASK_AUTO ? TASK_PRETRAIN : (Task)run.task);
    run.used = (unsigned char *)xcalloc((size_t)t->vocab_size, 1);
    make_directory(prep.out);
    output_lock();
    run.began = run.last_line = now_s();
    Reader reader;
    memset(&reader, 0, sizeof reader);
    for (int i = 0; i < num_paths; i++) prepare_file(&run, t, &reader, paths[i]);
    uint64_t dropped = 0;
    for (int r = KEPT + 1; r < NUM_REASONS; r++) dropped += run.records[r];
    CHECK(run.documents > 0, "nothing was kept of %" PRIu64 " records in %d files; no file was written%s", dropped, num_paths,
          input_hint(&run));
    CHECK(output.num_shards > 0, "all %" PRIu64 " documents fell to val.bin, none to train.bin; no file was written; lower "
          "--val-fraction", run.documents);

    int full_vocabulary = t->vocab_size;
    for (int i = 0; i < output.count; i++) output_close(&output.files[i]);
    if (prep.trim_vocab) t = trim(&run, t);
    float bigram = run.task == TASK_PRETRAIN && t->vocab_size <= BIGRAM_VOCAB ? bigram_loss((uint32_t)t->vocab_size) : 0;
    CHECK(!interrupted, "interrupted; nothing was written");
    output_finish(&run.encoder, bigram);
    print_summary(&run, t, full_vocabulary, bigram);
    if (prep.show > 0) show_file(output.files[0].path, t, prep.show);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 7. show

// Text for a terminal: control characters are written as \xNN.
void print_safely(const char *text, size_t len) {
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)text[i];
        if ((c < 0x20 && c != '\n' && c != '\t') || c == 0x7F) printf("\\x%02X", c);
        else putchar(c);
    }
}

// The tokens from `at` up to the next document. sft, dpo: what is trained is green on a terminal, in ⟦ ⟧ elsewhere.
uint64_t show_document(const Shard *s, const Tokenizer *t, uint64_t at) {
    bool terminal = isatty(STDOUT_FILENO), marks = s->header->task != TASK_PRETRAIN, marked = false;
    Utf8Stream stream;
    memset(&stream, 0, sizeof stream);
    char text[1024];
    for (uint64_t i = at; ; i++) {
        bool end = i == s->num_tokens || (i > at && (s->tokens[i] & TOKEN_DOC_START));
        bool trained = !end && marks && !(s->tokens[i] & TOKEN_NO_LOSS);
        if (trained != marked) {
            if (!prep.ids) print_safely(text, utf8_stream_flush(&stream, text));
            if (!prep.ids || terminal) fputs(trained ? (terminal ? "\033[32m" : "⟦") : (terminal ? "\033[0m" : "⟧"), stdout);
        }
        marked = trained;
        if (end) return print_safely(text, utf8_stream_flush(&stream, text)), printf("\n"), i;
        uint32_t id = s->tokens[i] & TOKEN_ID_MASK;
        size_t len = 0;
        const char *bytes = t ? tokenizer_bytes(t, id, &len) : "";
        if (prep.ids || !t) printf("%s%u%s", i > at ? " " : "", id, trained ? "*" : "");
        else print_safely(text, utf8_stream(&stream, bytes, len, text));
    }
}

// The tokenizer that made the file, or NULL: then ids are printed.
Tokenizer *tokenizer_of(const Shard *s) {
    const char *slash = strrchr(s->path, '/');
    const char *beside = path_of("%.*stokenizer.bin", slash ? (int)(slash - s->path) + 1 : 0, s->path);
    const char *path = prep.shown_tokenizer[0] ? prep.shown_tokenizer : file_exists(beside) ? beside : prep.tokenizer;
    if (!file_exists(path) && !prep.shown_tokenizer[0]) return NULL;
    Tokenizer *t = tokenizer_load(path);
    if (t->hash == s->header->tokenizer_hash) {
        for (int i = SPECIALS_NONE; SPECIAL_SETS[i]; i++) {
            if (strncmp(SPECIAL_SETS[i], s->header->special_set, 16) == 0) tokenizer_use_specials(t, SPECIAL_SETS[i]);
        }
        return t;
    }
    CHECK(!prep.shown_tokenizer[0], "%s was not made with the tokenizer %s", s->path, path);
    printf("(no text: %s is another tokenizer; name the right one with --tokenizer)\n", path);
    tokenizer_free(t);
    return NULL;
}

void show_file(const char *path, const Tokenizer *known, int64_t documents) {
    Shard s;
    shard_open(&s, path);
    const TokenFileHeader *h = s.header;
    const Tokenizer *t = known ? known : tokenizer_of(&s);
    printf("%s: %s, %" PRIu64 " documents, %" PRIu64 " tokens\n", path, TASK_NAMES[h->task], h->num_documents, h->num_tokens);
    if (!known) {
        printf("vocabulary %u, end of document %u, special tokens %.16s, tokenizer %016" PRIx64, h->vocab_size, h->end_id, h->special_set,
               h->tokenizer_hash);
        if (h->bigram_loss > 0) printf(", bigram loss %.4f", h->bigram_loss);
        printf("\n");
    }
    uint64_t at = 0, next = 0;
    for (int64_t i = 0; i < documents && at < s.num_tokens; i++, at = next) {
        next = at + 1;
        while (next < s.num_tokens && !(s.tokens[next] & TOKEN_DOC_START)) next++;
        const char *side = h->task != TASK_DPO ? "" : i % 2 ? ", rejected" : ", chosen";
        printf("--- document %ld%s, %" PRIu64 " tokens\n", i, side, next - at);
        show_document(&s, t, at);
    }
    shard_close(&s);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 8. tokenize, detokenize

void flush_stdout(void) { CHECK(!ferror(stdout) && fflush(stdout) == 0, "cannot write to standard output: %s", strerror(errno)); }

// "12 345 6789"
void print_ids(const TokenList *list, bool space_before) {
    char text[16];
    for (size_t i = 0; i < list->count; i++) {
        int n = sizeof text;
        uint32_t id = list->ids[i];
        do text[--n] = (char)('0' + id % 10); while ((id /= 10) > 0);
        if (i > 0 || space_before) text[--n] = ' ';
        fwrite(text + n, 1, sizeof text - (size_t)n, stdout);
    }
}

void tokenize_record(const Tokenizer *t, SpecialsMode mode, const char *path, const Record *record, TokenList *out) {
    memset(out, 0, sizeof *out);
    if (!prep.jsonl) {
        tokenizer_encode(t, record->text, record->len, mode, out);
        return;
    }
    if (is_blank(record->text, record->len)) return;
    JsonError error;
    Json *json = json_parse(record->text, record->len, &error);
    CHECK(json != NULL, "%s:%" PRIu64 ": %s at byte %zu; expected a JSON string", path, record->line, error.message, error.position);
    CHECK(json->type == JSON_STRING, "%s:%" PRIu64 ": expected a JSON string", path, record->line);
    tokenizer_encode(t, json->text, json->len, mode, out);
    json_free(json);
}

void tokenize(void) {
    Tokenizer *t = tokenizer_load(prep.tokenizer);
    SpecialsMode mode = prep.parsed_special == SPECIALS_NONE ? SPECIALS_AS_TEXT : SPECIALS_PARSED;
    if (prep.parsed_special > SPECIALS_NONE) tokenizer_use_specials(t, SPECIAL_SETS[prep.parsed_special]);
    Reader r;
    Records batch = {NULL, 0, 0};
    memset(&r, 0, sizeof r);
    reader_open(&r, prep.file, prep.jsonl ? FORMAT_LINES : FORMAT_CHUNKS, prep.jsonl);
    bool any = false;
    while (read_batch(&r, &batch) > 0) {
        TokenList *lists = (TokenList *)xmalloc(batch.count * sizeof(TokenList));
        #pragma omp parallel for schedule(dynamic, 1)
        for (int64_t i = 0; i < (int64_t)batch.count; i++) tokenize_record(t, mode, r.path, &batch.list[i], &lists[i]);
        for (size_t i = 0; i < batch.count; i++) {
            print_ids(&lists[i], any && !prep.jsonl);
            any = any || lists[i].count > 0;
            if (prep.jsonl) putchar('\n');
            free(lists[i].ids);
        }
        free(lists);
        if (prep.jsonl) flush_stdout();
    }
    if (!prep.jsonl) putchar('\n');
    flush_stdout();
}

// Embedding matrices are padded to 151936 or 152064 rows: such ids mean nothing, but a model may emit them.
#define PADDED_ROWS 152064u

// Bytes of one line of ids; *without_token counts ids that have none.
void detokenize_line(const Tokenizer *t, char *line, uint64_t number, Text *out, uint64_t *without_token) {
    uint32_t limit = t->num_ranks == QWEN_RANKS ? PADDED_ROWS : (uint32_t)t->vocab_size;
    for (char *word = strtok(line, " \t\r\n"); word; word = strtok(NULL, " \t\r\n")) {
        char *end;
        unsigned long id = strtoul(word, &end, 10);
        CHECK(*end == 0 && isdigit((unsigned char)word[0]), "line %" PRIu64 ": '%.40s' is not a token id", number, word);
        CHECK(id < limit, "line %" PRIu64 ": there is no token %s; the vocabulary has %d", number, word, t->vocab_size);
        size_t len;
        const char *bytes = tokenizer_bytes(t, (uint32_t)id, &len);
        *without_token += len == 0;
        add_bytes(out, bytes, len);
    }
}

void detokenize(void) {
    Tokenizer *t = tokenizer_load(prep.tokenizer);
    if (prep.special != SPECIALS_OF_FILE) tokenizer_use_specials(t, SPECIAL_SETS[prep.special]);
    FILE *f = strcmp(prep.file, "-") == 0 ? stdin : fopen(prep.file, "rb");
    CHECK(f != NULL, "cannot open %s: %s", prep.file, strerror(errno));
    char *line = NULL;
    size_t capacity = 0;
    uint64_t number = 0, without_token = 0;
    Text text = {NULL, 0, 0};
    for (ssize_t n; (n = getline(&line, &capacity, f)) >= 0; flush_stdout()) {
        CHECK(strlen(line) == (size_t)n, "line %" PRIu64 ": a NUL byte; expected token ids", number + 1);
        text.size = 0;
        detokenize_line(t, line, ++number, &text, &without_token);
        if (!prep.jsonl) fwrite(text.data ? text.data : "", 1, text.size, stdout);
        else json_write_string(stdout, text.data ? text.data : "", text.size), putchar('\n');
    }
    CHECK(!ferror(f), "cannot read %s: %s", prep.file, strerror(errno));
    flush_stdout();
    if (without_token > 0) fprintf(stderr, "%" PRIu64 " ids have no token and gave no text\n", without_token);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 9. main

void print_prepare_help(void) {
    printf("prepare turns data files into token files for the trainer.\n\n"
           "  ./prepare [options] --out DIR FILES...   JSON, JSON lines, text (-: standard input) -> DIR/train.bin, val.bin\n"
           "  ./prepare show FILE [options]            header and first documents of a token file\n"
           "  ./prepare tokenize [options]             text -> one line of ids\n"
           "  ./prepare detokenize [options]           lines of ids -> text, exactly their bytes\n\n"
           "Records: {\"text\"}, {\"completion\"}, {\"content\"}, {\"title\", \"content\"}, {\"title\", \"summary\", \"sections\"},\n"
           "{\"段落\": [{\"内容\"}]};\n"
           "sft: {\"instruction\", \"input\", \"output\"}, {\"conversations\" or \"messages\": [...]};\n"
           "dpo: {\"prompt\", \"chosen\", \"rejected\"}.\n"
           "Plain text: documents are separated by blank lines. dev/data/formats.md has the data sets and the details.\n"
           "Memory: below 1 GB for files of any size (records of up to 16 MB that are mostly numbers can take more); --dedup adds\n"
           "11 to 32 bytes a document.\n\nOptions (defaults in brackets):\n");
    print_options(PREPARE_OPTIONS, COMMAND_PREPARE);
    printf("\nOptions of show:\n");
    print_options(PREPARE_OPTIONS, COMMAND_SHOW);
    printf("\nOptions of tokenize:\n");
    print_options(PREPARE_OPTIONS, COMMAND_TOKENIZE);
    printf("\nOptions of detokenize:\n");
    print_options(PREPARE_OPTIONS, COMMAND_DETOKENIZE);
}

int main(int argc, char **argv) {
    static const char *const names[] = {"prepare", "tokenize", "detokenize", "show"};
    const char **words = (const char **)xmalloc((size_t)argc * sizeof(char *));
    int command = 0, num_words;
    for (int i = 1; i < argc; i++) if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return print_prepare_help(), 0;
    for (int k = 1; k < 4; k++) if (argc > 1 && strcmp(argv[1], names[k]) == 0) command = k;
    num_words = parse_options(PREPARE_OPTIONS, 1u << command, argc, argv, command > 0 ? 2 : 1, words);
    CHECK(command == 0 || command == 3 || num_words == 0, "'%s' is not an option of %s; a file is given with --file", words[0],
          names[command]);
    CHECK(prep.threads <= 1024, "--threads is %ld, it must be at most 1024", prep.threads);
#ifdef _OPENMP
    if (prep.threads > 0) omp_set_num_threads((int)prep.threads);
#endif
    if (command == 0) prepare(words, num_words);
    else if (command == 1) tokenize();
    else if (command == 2) detokenize();
    else {
        CHECK(num_words == 1, "show needs one token file, for example ./prepare show data/tiny_baike/train.bin");
        show_file(words[0], NULL, prep.documents);
    }
    flush_stdout();
    free(words);
    return 0;
}

// tokenizer.h: text <-> tokens, exactly as Qwen's own tokenizer does it.
//
//   text --NFC--> text --split--> pieces --byte-pair merges--> token ids            (encode)
//   token ids --table--> bytes --hold back cut characters--> text                   (decode)
//
// Sections, in reading order:
//   1 UTF-8        decode, encode, and a stream that prints only whole characters
//   2 JSON         a strict reader (configurations, safetensors headers, JSON lines), a string writer, files written atomically
//   3 NFC          canonical composition: e + U+0301 becomes U+00E9
//   4 split        the regular expression of Qwen's pre-tokenizer, by hand
//   5 BPE          bytes of a piece -> tokens; the vocabulary's tables
//   6 specials     <|im_start|> and friends
//   7 encode       the whole pipeline, and the way back
//   8 load         .bin, qwen.tiktoken, tokenizer.json, vocab.json + merges.txt
//   9 save, trim   .bin, Hugging Face files, small vocabularies for small models
//
// A Tokenizer never changes after loading, so threads may share one; each remembers words for itself. Errors are one line and exit code 1
// (CHECK, DIE of train_qwen.c).
#ifndef TOKENIZER_H
#define TOKENIZER_H
#include "dev/data/unicode.h"    // character classes and NFC data, as Hugging Face's tokenizers library has them

// ---------------------------------------------------------------------------------------------------------------------------------
// 1 UTF-8

#define HASH_FACTOR 0x9E3779B97F4A7C15u    // 2^64 / golden ratio (Knuth's multiplicative hashing)
#define REPLACEMENT 0xFFFDu    // U+FFFD stands for bytes that are no character

// Bytes of the character that starts with `lead`; 0 for a byte that starts none.
int utf8_length(unsigned char lead) {
    return lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
}

// Reads one character of text[0..len), len > 0, into *c and returns its length. For an invalid one *c is U+FFFD and the result is minus
// the bytes to skip: the longest start of a character ("maximal subpart"), or one byte. Python, browsers and Rust replace the same way.
int utf8_decode(const char *text, size_t len, uint32_t *c) {
    const unsigned char *s = (const unsigned char *)text;
    int n = utf8_length(s[0]);
    *c = n ? s[0] & (n == 1 ? 0x7F : 0x7F >> n) : REPLACEMENT;
    if (n < 2) return n ? 1 : -1;
    unsigned low = s[0] == 0xE0 ? 0xA0 : s[0] == 0xF0 ? 0x90 : 0x80;     // no overlong forms,
    unsigned high = s[0] == 0xED ? 0x9F : s[0] == 0xF4 ? 0x8F : 0xBF;    // no surrogates, nothing above U+10FFFF
    for (int i = 1; i < n; i++, low = 0x80, high = 0xBF) {
        if ((size_t)i == len || s[i] < low || s[i] > high) {
            *c = REPLACEMENT;
            return -i;
        }
        *c = *c << 6 | (s[i] & 0x3F);
    }
    return n;
}

// Writes one character and returns its length, 1 to 4.
int utf8_encode(uint32_t c, char *out) {
    int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    if (n == 1) return out[0] = (char)c, 1;
    for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)((0xF00 >> n & 0xF0) | c);    // 110xxxxx, 1110xxxx, 11110xxx
    return n;
}

// Tokens may end inside a character. A stream passes on whole characters, turns what can't become one into U+FFFD, and holds the rest.
typedef struct { unsigned char held[4]; int count; } Utf8Stream;

// Returns the bytes written to out, which needs room for 3 * len + 3 (each bad byte may become the three of U+FFFD); no NUL is added.
size_t utf8_stream(Utf8Stream *s, const char *bytes, size_t len, char *out) {
    size_t written = 0;
    for (size_t i = 0; i < len; i++) {
        s->held[s->count++] = (unsigned char)bytes[i];
        while (s->count > 0) {
            uint32_t c;
            int n = utf8_decode((const char *)s->held, (size_t)s->count, &c);
            if (n == -s->count && utf8_length(s->held[0]) > s->count) break;    // a good start: wait for more
            written += (size_t)utf8_encode(c, out + written);
            n = n < 0 ? -n : n;
            s->count -= n;
            memmove(s->held, s->held + n, (size_t)s->count);
        }
    }
    return written;
}

// The end of the text: a character that never got complete becomes one U+FFFD. Returns 0 or 3 bytes.
size_t utf8_stream_flush(Utf8Stream *s, char *out) {
    int pending = s->count;
    s->count = 0;
    return pending ? (size_t)utf8_encode(REPLACEMENT, out) : 0;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 2 JSON (RFC 8259) and files

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct Json {
    JsonType type;
    char *key;                      // its name, when it sits in an object; NUL-terminated UTF-8
    char *text;                     // a string's UTF-8 (NUL-terminated, and may hold NULs), or a number as it was written
    size_t len;                     // bytes of text
    double number;                  // numbers only; read text for integers above 2^53
    struct Json *child, *next;      // first element or member; next in the same array or object
} Json;

typedef struct { const char *message; size_t position; } JsonError;    // position: bytes from the start

// Nodes and strings live in blocks that the root owns, because a tokenizer.json has half a million of them.
typedef struct JsonBlock { struct JsonBlock *next; size_t used, size; } JsonBlock;
typedef struct { Json root; JsonBlock *blocks; } JsonDocument;
typedef struct { const char *text; size_t len, at; JsonBlock *blocks; const char *message; } JsonParser;

#define JSON_MAX_DEPTH 256    // the reader recurses; a file of a million '[' must not overflow the stack

void *json_alloc(JsonParser *p, size_t bytes) {
    bytes = (bytes + 15) & ~(size_t)15;
    if (!p->blocks || p->blocks->size - p->blocks->used < bytes) {
        size_t size = bytes > 65536 ? bytes : 65536;
        JsonBlock *block = (JsonBlock *)xmalloc(sizeof(JsonBlock) + 16 + size);
        block->next = p->blocks;
        block->used = 0;
        block->size = size;
        p->blocks = block;
    }
    size_t head = (sizeof(JsonBlock) + 15) & ~(size_t)15;
    p->blocks->used += bytes;
    return (char *)p->blocks + head + p->blocks->used - bytes;
}

bool json_fail(JsonParser *p, const char *message) {
    if (!p->message) p->message = message;
    return false;
}

void json_skip_space(JsonParser *p) {
    for (; p->at < p->len; p->at++) {
        char c = p->text[p->at];
        if (c != ' ' && c != '\t' && c != '\r' && c != '\n') break;
    }
}

bool json_eat(JsonParser *p, char c) {
    if (p->at == p->len || p->text[p->at] != c) return false;
    p->at++;
    return true;
}

// The four digits of \uXXXX, or -1.
long json_hex4(JsonParser *p) {
    long value = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        char c = p->at < p->len ? p->text[p->at] : 0;
        int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
        if (digit < 0) return -1;
        value = value << 4 | digit;
    }
    return value;
}

// After a backslash: writes what the escape stands for and returns its bytes, 0 on error.
int json_escape(JsonParser *p, char *out) {
    const char *names = "\"\\/bfnrt", *values = "\"\\/\b\f\n\r\t";
    char c = p->at < p->len ? p->text[p->at] : 0;
    const char *found = c ? strchr(names, c) : NULL;
    if (found) return p->at++, *out = values[found - names], 1;
    if (c != 'u') return json_fail(p, "unknown escape");
    p->at++;
    long code = json_hex4(p);
    if (code < 0) return json_fail(p, "\\u needs four hexadecimal digits");
    if (code >= 0xD800 && code < 0xE000) {    // beyond U+FFFF: a high surrogate, then a low one
        if (code >= 0xDC00 || !json_eat(p, '\\') || !json_eat(p, 'u')) return json_fail(p, "lone surrogate");
        long low = json_hex4(p);
        if (low < 0xDC00 || low >= 0xE000) return json_fail(p, "lone surrogate");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    return utf8_encode((uint32_t)code, out);
}

bool json_string(JsonParser *p, char **text, size_t *len) {
    size_t end = ++p->at;    // after the quote
    while (end < p->len && p->text[end] != '"') end += p->text[end] == '\\' ? 2 : 1;
    if (end >= p->len) return p->at = p->len, json_fail(p, "string without an end");
    char *out = *text = (char *)json_alloc(p, end - p->at + 1);    // escapes only get shorter
    while (p->at < end) {
        unsigned char c = (unsigned char)p->text[p->at];
        uint32_t code;
        int n = 1;
        if (c == '\\') {
            p->at++;
            if ((n = json_escape(p, out)) == 0) return false;
        } else {
            if (c < 0x20) return json_fail(p, "control character in a string");
            if (c >= 0x80 && (n = utf8_decode(p->text + p->at, end - p->at, &code)) < 0) return json_fail(p, "invalid UTF-8");
            memcpy(out, p->text + p->at, (size_t)n);
            p->at += (size_t)n;
        }
        out += n;
    }
    p->at = end + 1;
    *out = 0;
    *len = (size_t)(out - *text);
    return true;
}

size_t json_digits(JsonParser *p) {
    size_t start = p->at;
    while (p->at < p->len && p->text[p->at] >= '0' && p->text[p->at] <= '9') p->at++;
    return p->at - start;
}

bool json_number(JsonParser *p, Json *node) {
    size_t start = p->at;
    json_eat(p, '-');
    if (!json_eat(p, '0') && json_digits(p) == 0) return json_fail(p, "expected a value");
    if (json_eat(p, '.') && json_digits(p) == 0) return json_fail(p, "number without digits after the point");
    if (json_eat(p, 'e') || json_eat(p, 'E')) {
        if (!json_eat(p, '+')) json_eat(p, '-');
        if (json_digits(p) == 0) return json_fail(p, "number without digits in the exponent");
    }
    node->type = JSON_NUMBER;
    node->len = p->at - start;
    node->text = (char *)json_alloc(p, node->len + 1);
    memcpy(node->text, p->text + start, node->len);
    node->text[node->len] = 0;
    node->number = strtod(node->text, NULL);
    return true;
}

bool json_word(JsonParser *p, Json *node, const char *word, JsonType type) {
    size_t n = strlen(word);
    if (p->len - p->at < n || memcmp(p->text + p->at, word, n) != 0) return json_fail(p, "expected a value");
    node->type = type;
    p->at += n;
    return true;
}

bool json_value(JsonParser *p, Json *node, int depth);

// [value, ...] or {"key": value, ...}
bool json_members(JsonParser *p, Json *node, int depth) {
    bool is_object = p->text[p->at++] == '{';
    char close = is_object ? '}' : ']';
    Json **tail = &node->child;
    node->type = is_object ? JSON_OBJECT : JSON_ARRAY;
    if (depth >= JSON_MAX_DEPTH) return json_fail(p, "nested too deeply");
    json_skip_space(p);
    if (json_eat(p, close)) return true;
    for (;;) {
        Json *member = (Json *)json_alloc(p, sizeof(Json));
        memset(member, 0, sizeof(Json));
        json_skip_space(p);
        if (is_object) {
            size_t key_len;
            if (p->at == p->len || p->text[p->at] != '"') return json_fail(p, "expected a key in quotes");
            if (!json_string(p, &member->key, &key_len)) return false;
            if (strlen(member->key) != key_len) return json_fail(p, "NUL character in a key");
            json_skip_space(p);
            if (!json_eat(p, ':')) return json_fail(p, "expected ':'");
        }
        if (!json_value(p, member, depth + 1)) return false;
        *tail = member;
        tail = &member->next;
        json_skip_space(p);
        if (json_eat(p, close)) return true;
        if (!json_eat(p, ',')) return json_fail(p, is_object ? "expected ',' or '}'" : "expected ',' or ']'");
    }
}

bool json_value(JsonParser *p, Json *node, int depth) {
    json_skip_space(p);
    switch (p->at < p->len ? p->text[p->at] : 0) {
        case '{': case '[': return json_members(p, node, depth);
        case '"': node->type = JSON_STRING; return json_string(p, &node->text, &node->len);
        case 't': return json_word(p, node, "true", JSON_TRUE);
        case 'f': return json_word(p, node, "false", JSON_FALSE);
        case 'n': return json_word(p, node, "null", JSON_NULL);
        default: return json_number(p, node);
    }
}

void json_free(Json *root) {
    JsonDocument *document = (JsonDocument *)(void *)root;    // the root is its first field
    if (!document) return;
    for (JsonBlock *block = document->blocks, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    free(document);
}

// One JSON value and nothing after it (a byte order mark before it is skipped); NULL on error. Only the root may be given to json_free.
Json *json_parse(const char *text, size_t len, JsonError *error) {
    JsonParser p = { text, len, 0, NULL, NULL };
    JsonDocument *document = (JsonDocument *)xcalloc(1, sizeof(JsonDocument));
    if (len >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) p.at = 3;
    bool ok = json_value(&p, &document->root, 0);
    if (ok) {
        json_skip_space(&p);
        if (p.at < len) ok = json_fail(&p, "text after the value");
    }
    document->blocks = p.blocks;
    if (error) {
        error->message = p.message;
        error->position = p.at;
    }
    if (ok) return &document->root;
    json_free(&document->root);
    return NULL;
}

// The member called key, NULL when there is none or `object` is no object. Of equal keys the last counts, as in Python and JavaScript.
const Json *json_get(const Json *object, const char *key) {
    const Json *found = NULL;
    if (!object || object->type != JSON_OBJECT) return NULL;
    for (const Json *member = object->child; member; member = member->next) {
        if (strcmp(member->key, key) == 0) found = member;
    }
    return found;
}

// A JSON string with its quotes; bytes that are not UTF-8 become U+FFFD.
void json_write_string(FILE *f, const char *text, size_t len) {
    putc('"', f);
    for (size_t i = 0; i < len;) {
        unsigned char c = (unsigned char)text[i];
        uint32_t code;
        int n = utf8_decode(text + i, len - i, &code);
        if (n < 0) fputs("\xEF\xBF\xBD", f);
        else if (c == '"' || c == '\\') fprintf(f, "\\%c", c);
        else if (c == '\n') fputs("\\n", f);
        else if (c == '\r') fputs("\\r", f);
        else if (c == '\t') fputs("\\t", f);
        else if (c < 0x20) fprintf(f, "\\u%04x", c);
        else fwrite(text + i, 1, (size_t)n, f);
        i += (size_t)(n < 0 ? -n : n);
    }
    putc('"', f);
}

// A file appears under its name only when it is complete: write to path.tmp, flush it to the disk, rename. What is no regular file
// (/dev/stdout, a pipe, a link) is written directly.
typedef struct { FILE *file; char *path, *temporary; } AtomicFile;

AtomicFile open_atomic(const char *path) {
    AtomicFile a;
    size_t size = strlen(path) + 5;
    a.path = (char *)xmalloc(size);
    a.temporary = (char *)xmalloc(size);
    snprintf(a.path, size, "%s", path);
    struct stat st;
    snprintf(a.temporary, size, lstat(path, &st) == 0 && !S_ISREG(st.st_mode) ? "%s" : "%s.tmp", path);
    a.file = fopen(a.temporary, "wb");
    CHECK(a.file != NULL, "cannot write %s: %s", a.temporary, strerror(errno));
    return a;
}

void close_atomic(AtomicFile *a) {
    bool ok = flush_to_disk(a->file), direct = strcmp(a->temporary, a->path) == 0;
    int why = errno;    // of the write that failed, if one did
    if (fclose(a->file) != 0 && ok) ok = false, why = errno;
    if (ok && !direct && rename(a->temporary, a->path) != 0) ok = false, why = errno;
    if (!ok && !direct) unlink(a->temporary);
    CHECK(ok, "cannot write %s: %s", a->path, strerror(why));
    free(a->path);
    free(a->temporary);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 3 NFC

typedef enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE } CharClass;    // \p{L}, \p{N}, \s of the regular expression

#define UNICODE_UNSETTLED 4    // a mark, or a character that NFC replaces or joins to the one before it

int unicode_bits(uint32_t c) {
    return c < UNICODE_LIMIT ? (int)(unicode_block[unicode_page[c >> 7] * 8 + (c >> 4 & 7)] >> (c & 15) * 4) & 15 : 0;
}

int nfc_combining(uint32_t c) {
    int low = 0, high = NUM_COMBINING;
    while (low < high) {
        int middle = (low + high) / 2;
        if (c < unicode_combining[middle][0]) high = middle;
        else if (c > unicode_combining[middle][1]) low = middle + 1;
        else return (int)unicode_combining[middle][2];
    }
    return 0;
}

// A run: a settled character and the unsettled ones after it. NFC never looks across its borders.
typedef struct { uint32_t code; int combining; } NfcChar;
typedef struct { NfcChar *chars, *sorted; size_t count, capacity; } NfcRun;

void nfc_push(NfcRun *run, uint32_t code) {
    if (run->count == run->capacity) {
        run->capacity = run->capacity ? run->capacity * 2 : 64;
        run->chars = (NfcChar *)xrealloc(run->chars, run->capacity * sizeof(NfcChar));
        run->sorted = (NfcChar *)xrealloc(run->sorted, run->capacity * sizeof(NfcChar));
    }
    run->chars[run->count].code = code;
    run->chars[run->count++].combining = nfc_combining(code);
}

// Hangul syllables are arithmetic: 19 leading consonants x 21 vowels x 28 endings (0: no ending).
enum { HANGUL = 0xAC00, HANGUL_L = 0x1100, HANGUL_V = 0x1161, HANGUL_T = 0x11A7, NUM_V = 21, NUM_T = 28, NUM_SYLLABLES = 11172 };

// Pushes the parts of c, taken apart as far as possible.
void nfc_decompose(NfcRun *run, uint32_t c) {
    uint32_t syllable = c - HANGUL;
    if (syllable < NUM_SYLLABLES) {
        nfc_push(run, HANGUL_L + syllable / (NUM_V * NUM_T));
        nfc_push(run, HANGUL_V + syllable / NUM_T % NUM_V);
        if (syllable % NUM_T) nfc_push(run, HANGUL_T + syllable % NUM_T);
        return;
    }
    for (int low = 0, high = NUM_PARTS; low < high;) {
        int middle = (low + high) / 2;
        const uint32_t *parts = unicode_parts[middle];
        if (parts[0] == c) {
            nfc_decompose(run, parts[1]);
            if (parts[2]) nfc_decompose(run, parts[2]);
            return;
        }
        if (parts[0] < c) low = middle + 1;
        else high = middle;
    }
    nfc_push(run, c);
}

// The character that a and b make together, 0 if none.
uint32_t nfc_compose(uint32_t a, uint32_t b) {
    if (a - HANGUL_L < 19 && b - HANGUL_V < NUM_V) return HANGUL + ((a - HANGUL_L) * NUM_V + b - HANGUL_V) * NUM_T;
    if (a - HANGUL < NUM_SYLLABLES && (a - HANGUL) % NUM_T == 0 && b - HANGUL_T - 1 < NUM_T - 1) return a + b - HANGUL_T;
    for (int low = 0, high = NUM_COMPOSE; low < high;) {
        int middle = (low + high) / 2;
        const uint32_t *parts = unicode_parts[unicode_compose[middle]];
        if (parts[1] == a && parts[2] == b) return parts[0];
        if (parts[1] < a || (parts[1] == a && parts[2] < b)) low = middle + 1;
        else high = middle;
    }
    return 0;
}

// Marks in a row go in order of their class, equal ones stay in order. A counting sort, because a row can be a megabyte long.
void nfc_sort(NfcChar *marks, size_t count, NfcChar *sorted) {
    size_t start[257] = {0};
    for (size_t i = 0; i < count; i++) start[marks[i].combining + 1]++;
    for (int k = 0; k < 256; k++) start[k + 1] += start[k];
    for (size_t i = 0; i < count; i++) sorted[start[marks[i].combining]++] = marks[i];
    memcpy(marks, sorted, count * sizeof(NfcChar));
}

// Decomposed run -> ordered and composed run (Unicode Standard, section 3.11).
void nfc_settle(NfcRun *run) {
    NfcChar *chars = run->chars;
    for (size_t i = 0, j; i < run->count; i = j) {
        for (j = i; j < run->count && chars[j].combining; j++) {}
        if (j - i > 1) nfc_sort(chars + i, j - i, run->sorted);
        if (j == i) j++;
    }
    size_t kept = 0, base = SIZE_MAX;    // base: the last character of class 0
    for (size_t i = 0; i < run->count; i++) {
        NfcChar c = chars[i];
        bool reaches_base = base != SIZE_MAX && (kept == base + 1 || chars[kept - 1].combining < c.combining);
        uint32_t joined = reaches_base ? nfc_compose(chars[base].code, c.code) : 0;
        if (joined) {
            chars[base].code = joined;
        } else {
            if (c.combining == 0) base = kept;
            chars[kept++] = c;
        }
    }
    run->count = kept;
}

// Bytes before the first run that needs work (that run begins with the character before the unsettled one), or len.
size_t nfc_settled_prefix(const char *text, size_t len) {
    size_t last = 0;
    for (size_t i = 0, n; i < len; last = i, i += n) {
        unsigned char first = (unsigned char)text[i];
        uint32_t c = first;
        bool is_han = first >= 0xE5 && first <= 0xE9 && i + 3 <= len && (text[i + 1] & 0xC0) == 0x80 && (text[i + 2] & 0xC0) == 0x80;
        int used = first < 0x80 ? 1 : is_han ? 3 : utf8_decode(text + i, len - i, &c);
        if (used < 0 || (!is_han && (unicode_bits(c) & UNICODE_UNSETTLED))) return last;
        n = (size_t)used;
    }
    return len;
}

// Text as Qwen's tokenizer sees it: invalid UTF-8 replaced, then NFC. Returns NULL if the text is that already, else a new copy.
char *nfc_normalize(const char *text, size_t len, size_t *new_len) {
    size_t at = nfc_settled_prefix(text, len), used = 0, room = len + 64;
    if (at == len) return NULL;
    char *out = (char *)xmalloc(room);
    NfcRun run = { NULL, NULL, 0, 0 };
    for (size_t copied = 0; copied < len; copied = at) {
        if (copied > 0) at = copied + nfc_settled_prefix(text + copied, len - copied);
        size_t same = at - copied;
        run.count = 0;
        for (bool more = at < len; more;) {
            uint32_t c;
            int n = utf8_decode(text + at, len - at, &c);
            nfc_decompose(&run, c);
            at += (size_t)(n < 0 ? -n : n);
            more = at < len && (utf8_decode(text + at, len - at, &c) < 0 || (unicode_bits(c) & UNICODE_UNSETTLED));
        }
        nfc_settle(&run);
        if (room - used < same + 4 * run.count) {
            room = 2 * room + same + 4 * run.count;
            out = (char *)xrealloc(out, room);
        }
        memcpy(out + used, text + copied, same);
        used += same;
        for (size_t i = 0; i < run.count; i++) used += (size_t)utf8_encode(run.chars[i].code, out + used);
    }
    free(run.chars);
    free(run.sorted);
    *new_len = used;
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 4 split: text -> pieces that are encoded one by one. The pattern, whose first matching alternative wins at each position:

#define QWEN_PATTERN "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|" \
                     "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

// Class of the character at s, and its length. The text is valid UTF-8 from here on.
CharClass split_class(const char *s, int *length) {
    const unsigned char *u = (const unsigned char *)s;
    int bits = unicode_first[u[0]];
    *length = u[0] < 0x80 ? 1 : u[0] < 0xE0 ? 2 : u[0] < 0xF0 ? 3 : 4;
    if (bits == UNICODE_MIXED) {
        uint32_t c = u[0] & (0x7F >> *length);
        for (int i = 1; i < *length; i++) c = c << 6 | (u[i] & 0x3F);
        bits = unicode_bits(c);
    }
    return (CharClass)(bits & 3);
}

size_t split_skip(const char *text, size_t at, size_t end, CharClass skipped) {
    int n;
    while (at < end && split_class(text + at, &n) == skipped) at += (size_t)n;
    return at;
}

// Borders where words may end early. A run of letters is one piece, and in Chinese a whole clause: too long to look up, seldom met twice.
// But most neighbours have nothing to do with each other. Before a token can span the border between two characters, a merge must join a
// token that ends there and one that begins there. If no merge of the vocabulary joins such two, none ever happens at this border; and as
// merges on one side neither help nor hinder those on the other, both sides can be encoded alone, with exactly the same tokens. So the
// splitter cuts there, into words of 1.4 characters on average.
//   joined           a bit for each two characters that some merge joins: a token that ends with the first to one that begins with the
//                    second
//   joined_in_part   a few tokens end or begin within a character: 选 and the first two bytes of 拔 are one token, and so are the last
//                    byte of 删 and 除. For merges with such parts, a bit for what is sure to be around the border: all three bytes on
//                    the whole side, one on the other
// The bits are found by hashing. If two borders share one, this costs a cut, nothing else. Only characters of three bytes (U+0800 to
// U+FFFF) take part, which are those of languages written without spaces.
#define JOINED_BITS 20
#define JOINED_IN_PART_BITS 12
typedef struct { uint64_t joined[1 << (JOINED_BITS - 6)], joined_in_part[1 << (JOINED_IN_PART_BITS - 6)]; } Borders;

bool bit_get(const uint64_t *bits, uint64_t i) { return bits[i / 64] >> i % 64 & 1; }
void bit_set(uint64_t *bits, uint64_t i) { bits[i / 64] |= UINT64_C(1) << i % 64; }
bool is_first_of_three(char c) { return ((unsigned char)c & 0xF0) == 0xE0; }

// `border` points to the first byte behind a border, or to where two parts of a token meet.
uint64_t border_bit(const char *border) {
    uint32_t first, last;    // four of the six bytes each
    memcpy(&first, border - 3, 4);
    memcpy(&last, border - 1, 4);
    return ((uint64_t)first << 32 | last) * HASH_FACTOR >> (64 - JOINED_BITS);
}

uint64_t border_part_bit(const char *from, size_t num_bytes) {
    uint32_t key = 0;
    memcpy(&key, from, num_bytes);
    return key * HASH_FACTOR >> (64 - JOINED_IN_PART_BITS);
}

bool border_is_joined_in_part(const Borders *b, const char *border) {
    return bit_get(b->joined_in_part, border_part_bit(border - 3, 4)) || bit_get(b->joined_in_part, border_part_bit(border - 1, 4)) ||
           bit_get(b->joined_in_part, border_part_bit(border - 1, 2));
}

bool border_is_open(const Borders *b, const char *border) {
    return bit_get(b->joined, border_bit(border)) || border_is_joined_in_part(b, border);
}

// Learns from a merge of two tokens, which lie side by side.
void border_learn(Borders *b, const char *left, size_t left_len, size_t right_len) {
    const char *border = left + left_len;
    if (!is_first_of_three(border[0])) return;
    bool is_whole = left_len >= 3 && is_first_of_three(border[-3]);
    bool is_tail = left_len < 3 && ((unsigned char)left[0] & 0xC0) == 0x80;
    if (is_whole && right_len >= 3) bit_set(b->joined, border_bit(border));
    else if (is_whole) bit_set(b->joined_in_part, border_part_bit(border - 3, 4));
    else if (is_tail) bit_set(b->joined_in_part, border_part_bit(border - 1, right_len >= 3 ? 4 : 2));
}

// The end of the letters from `at`; with borders, perhaps an earlier one. before: bytes of the character before `at`.
size_t split_letters(const Borders *borders, const char *text, size_t at, size_t end, int before) {
    for (int n; at < end; at += (size_t)n, before = n) {
        if (split_class(text + at, &n) != CLASS_LETTER) break;
        if (n == 3 && before == 3 && borders && !border_is_open(borders, text + at)) break;
    }
    return at;
}

bool split_is_newline(char c) { return c == '\r' || c == '\n'; }

// 's 't 'm 'd 're 've 'll in any case: its bytes, or 0. Ignoring case, U+017F (long s, C5 BF) is an s too.
size_t split_contraction(const char *s, size_t len) {
    if (len < 2 || s[0] != '\'') return 0;
    char a = (char)(s[1] | 0x20), b = (char)(len > 2 ? s[2] | 0x20 : 0);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if (len > 2 && memcmp(s + 1, "\xC5\xBF", 2) == 0) return 3;
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// White space, not followed by a letter: up to its last line end; or all of it at the end of the text; or all but its last character,
// which belongs to what follows, unless it is the only one.
size_t split_space(const char *text, size_t at, size_t end) {
    size_t stop = at, last = at, after_newline = 0;
    int n;
    while (stop < end && split_class(text + stop, &n) == CLASS_SPACE) {
        last = stop;
        stop += (size_t)n;
        if (split_is_newline(text[last])) after_newline = stop;
    }
    if (after_newline) return after_newline;
    return stop == end || last == at ? stop : last;
}

// End of the piece that starts at `at` < end. borders may be NULL; otherwise runs of letters are also cut where nothing joins them, and as
// the rest is a run of letters again, the next call goes on there.
size_t split_next(const Borders *borders, const char *text, size_t at, size_t end) {
    int n, m;
    size_t contraction = split_contraction(text + at, end - at);
    if (contraction) return at + contraction;
    CharClass c = split_class(text + at, &n), next = CLASS_SPACE;
    size_t after = at + (size_t)n;
    if (c == CLASS_LETTER) return split_letters(borders, text, after, end, n);
    if (c == CLASS_NUMBER) return after;
    if (after < end) next = split_class(text + after, &m);
    if (next == CLASS_LETTER && !split_is_newline(text[at])) return split_letters(borders, text, after, end, n);
    if (c == CLASS_OTHER || (text[at] == ' ' && next == CLASS_OTHER)) {
        after = split_skip(text, after, end, CLASS_OTHER);
        while (after < end && split_is_newline(text[after])) after++;
        return after;
    }
    return split_space(text, at, end);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 5 BPE

typedef struct { uint32_t *ids; size_t count, capacity; } TokenList;

void token_list_grow(TokenList *list) {
    list->capacity = list->capacity ? list->capacity * 2 : 64;
    list->ids = (uint32_t *)xrealloc(list->ids, list->capacity * sizeof(uint32_t));
}

void token_list_push(TokenList *list, uint32_t id) {
    if (list->count == list->capacity) token_list_grow(list);
    list->ids[list->count++] = id;
}

typedef struct { char *text; size_t len; uint32_t id; bool is_control; } Special;    // is_control: "special": true in tokenizer.json

// Ordinary tokens are numbered by rank: the lower, the earlier their two parts are merged. Special tokens have the ids after them.
typedef struct {
    int num_ranks;                     // ordinary tokens
    int vocab_size;                    // 1 + the largest id
    int endoftext, im_start, im_end;   // ids of <|endoftext|>, <|im_start|>, <|im_end|>; -1: not there
    const char *special_set;           // "none", "qwen2", "qwen2.5", "qwen3", "v1" or "custom"
    uint64_t hash;                     // FNV-1a 64 over (length byte, bytes) of the ordinary tokens by rank: equal tokens, equal hash

    char *bytes;                       // all ordinary tokens; token r is bytes[start[r]] .. bytes[start[r + 1] - 1]
    size_t num_bytes, bytes_capacity;
    uint32_t *start;
    int start_capacity, longest;       // longest: bytes of the longest token
    uint32_t (*parts)[2];              // the two tokens whose merge gives this one; UINT32_MAX for single bytes
    uint32_t byte_id[256];
    uint32_t low_pair[256][256];       // pair_find of ids below 256, which are single bytes; small enough to stay in the processor's cache
    uint32_t char_id[65536];           // tokens that are one character of three bytes, by code point
    uint32_t *token_table, *pair_table;    // open addressing; see token_find and pair_find
    int table_shift;                       // 64 - log2(slots)
    Borders borders;                   // where words may be cut

    Special *specials;                 // by id
    int num_specials;
    int *special_at;                   // special_at[id - num_ranks]: its index in specials, or -1
    bool special_first[256];           // may a special token start with this byte?
    bool nfc_whole;                    // v1: NFC on the whole text, then look for special tokens; later models: NFC between them
} Tokenizer;

#define NO_TOKEN UINT32_MAX
#define ID_MASK 0x1FFFFFu              // a slot of a table: 11 bits of the hash, 21 bits of id
#define MAX_ID (ID_MASK - 1)
#define FNV_START 0xCBF29CE484222325u

uint64_t fnv1a(uint64_t hash, const char *data, size_t len) {
    for (size_t i = 0; i < len; i++) hash = (hash ^ (unsigned char)data[i]) * 0x100000001B3u;
    return hash;
}

// A short string as two numbers: s[0..len), len <= 16, then zeros. `room` >= len bytes may be read.
typedef struct { uint64_t a, b; } WordKey;

WordKey word_key(const char *s, size_t len, size_t room) {
    static const unsigned char ones[32] = { 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255 };
    WordKey key = { 0, 0 }, mask;
    if (room < 16) return memcpy(&key, s, len), key;
    memcpy(&key, s, 16);    // without a loop or a branch over len
    memcpy(&mask, ones + 16 - len, 16);
    key.a &= mask.a;
    key.b &= mask.b;
    return key;
}

uint64_t word_hash(WordKey key, uint64_t start) {
    uint64_t h = (key.a ^ start) * HASH_FACTOR + key.b * 0xC2B2AE3D27D4EB4Fu;    // another large odd number
    return (h ^ h >> 32) * HASH_FACTOR;
}

uint64_t token_hash(const char *s, size_t len, size_t room) {
    uint64_t h = len;
    for (size_t i = 0; i < len; i += 16) h = word_hash(word_key(s + i, len - i < 16 ? len - i : 16, room - i), h);
    return h;
}

// Both tables hold ids only; a look-up compares with what the id stands for. The slot of a token's bytes, or the empty one where it belongs:
uint32_t *token_slot(const Tokenizer *t, const char *bytes, size_t len, uint64_t hash) {
    for (uint64_t i = hash >> t->table_shift, mask = UINT64_MAX >> t->table_shift;; i = (i + 1) & mask) {
        uint32_t *slot = &t->token_table[i], id = *slot & ID_MASK;
        if (*slot == NO_TOKEN) return slot;
        if (((*slot ^ hash) & ~ID_MASK & UINT32_MAX) != 0 || t->start[id + 1] - t->start[id] != len) continue;
        if (memcmp(t->bytes + t->start[id], bytes, len) == 0) return slot;
    }
}

// The same for the token that left and right merge into.
uint32_t *pair_slot(const Tokenizer *t, uint32_t left, uint32_t right, uint64_t hash) {
    for (uint64_t i = hash >> t->table_shift, mask = UINT64_MAX >> t->table_shift;; i = (i + 1) & mask) {
        uint32_t *slot = &t->pair_table[i], id = *slot & ID_MASK;
        if (*slot == NO_TOKEN) return slot;
        if (((*slot ^ hash) & ~ID_MASK & UINT32_MAX) == 0 && t->parts[id][0] == left && t->parts[id][1] == right) return slot;
    }
}

uint64_t pair_hash(uint32_t left, uint32_t right) { return ((uint64_t)left << 32 | right) * HASH_FACTOR; }
uint32_t slot_fill(uint32_t id, uint64_t hash) { return ((uint32_t)hash & ~ID_MASK) | id; }
uint32_t slot_id(uint32_t slot) { return slot == NO_TOKEN ? NO_TOKEN : slot & ID_MASK; }

// The ordinary token with these bytes, NO_TOKEN if there is none.
uint32_t token_find(const Tokenizer *t, const char *bytes, size_t len) {
    return slot_id(*token_slot(t, bytes, len, token_hash(bytes, len, len)));
}

uint32_t pair_find(const Tokenizer *t, uint32_t left, uint32_t right) {
    if ((left | right) < 256) return t->low_pair[left][right];
    return slot_id(*pair_slot(t, left, right, pair_hash(left, right)));
}

// The rule: a piece starts as single bytes. Of all adjacent pairs whose bytes together are a token, merge the one of the lowest rank, the
// leftmost of equals; repeat until no pair is a token.
//
// Taking the longest token at each place ("greedy") is something else: it turns 研究生命起源 (to study the origin of life) into
// 研究生|命|起源 (graduate student, life, origin), because 研究生 is a token; the rule merges 生命 first and gives 研究|生命|起源.
// Qwen's models have only ever seen what the rule gives.
//
// Following the rule costs about a microsecond a word, so tokenizer_encode avoids it, in ways that can't change a token:
//   1. split_next cuts where no merge can happen (see Borders), which makes words short and thus common;
//   2. a word that this thread has met before is in its WordCache, with its tokens;
//   3. a word that is a token is encoded as itself, because for every token the rule leads from its bytes to itself. This holds for Qwen's
//      vocabulary, not for any; tokenizer_finish checks it for each token of each vocabulary it is given;
//   4. only the others, a few in a hundred, are merged.
// The check in tokenizer_finish also makes ranks (tiktoken) and the merge list of tokenizer.json (Hugging Face) the same rule.

// Merging with a linked list of tokens and a heap of possible merges, rank << 32 | position: n log n for any input.
typedef struct { uint32_t id, previous, next, merged; } BpeNode;    // merged: what this token and the next become, NO_TOKEN if nothing

// Room for one call of tokenizer_encode. A piece of n bytes has at most n - 1 first merges, and each of at most n - 1 merges proposes two.
typedef struct { BpeNode *nodes; uint64_t *heap; size_t heap_count, capacity; } BpeWork;

void bpe_heap_push(BpeWork *w, uint64_t item) {
    size_t i = w->heap_count++;
    for (; i > 0 && w->heap[(i - 1) / 2] > item; i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = item;
}

uint64_t bpe_heap_pop(BpeWork *w) {
    uint64_t top = w->heap[0], last = w->heap[--w->heap_count];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < w->heap_count; i = child) {
        if (child + 1 < w->heap_count && w->heap[child + 1] < w->heap[child]) child++;
        if (w->heap[child] >= last) break;
        w->heap[i] = w->heap[child];
    }
    w->heap[i] = last;
    return top;
}

void bpe_propose(BpeWork *w, uint32_t at, uint32_t merged) {
    w->nodes[at].merged = merged;
    if (merged != NO_TOKEN) bpe_heap_push(w, (uint64_t)merged << 32 | at);
}

uint32_t bpe_merged(const Tokenizer *t, const BpeNode *nodes, uint32_t at, uint32_t end) {
    return nodes[at].next < end ? pair_find(t, nodes[at].id, nodes[nodes[at].next].id) : NO_TOKEN;
}

int char_index(const char *s) { return (s[0] & 15) << 12 | (s[1] & 63) << 6 | (s[2] & 63); }    // code point of three bytes

// The token of the character of three bytes at s, NO_TOKEN if there is none or other characters are there.
uint32_t char_find(const Tokenizer *t, const char *s) {
    if (!is_first_of_three(s[0])) return NO_TOKEN;
    return t->char_id[char_index(s)];
}

// The tokens that merging starts from, into nodes; returns their number. These are bytes, or whole characters where that is safe: what the
// rule does within a character comes to the same end whatever stands around it, unless some merge joins a part of it to a neighbour.
uint32_t bpe_start(const Tokenizer *t, const char *word, size_t len, BpeNode *nodes) {
    uint32_t count = 0;
    bool is_free_before = true;    // nothing joins a part of this character to the one before it
    for (size_t i = 0, n; i < len; i += n) {
        n = i + 3 <= len && is_first_of_three(word[i]) ? 3 : 1;
        bool is_free_after = i + n == len || (n == 3 && i + 6 <= len && is_first_of_three(word[i + 3]) &&
                                              !border_is_joined_in_part(&t->borders, word + i + 3));
        uint32_t id = n == 3 ? char_find(t, word + i) : NO_TOKEN;
        if (id != NO_TOKEN && is_free_before && is_free_after) nodes[count++].id = id;
        else for (size_t k = 0; k < n; k++) nodes[count++].id = t->byte_id[(unsigned char)word[i + k]];
        is_free_before = n == 3 && is_free_after;
    }
    return count;
}

void bpe_merge(const Tokenizer *t, const char *word, size_t len, BpeWork *w, TokenList *out) {
    CHECK(len < NO_TOKEN, "%zu bytes of text without a break; the limit is 4 GiB", len);
    if (len > w->capacity) {
        w->capacity = 2 * len + 256;
        w->nodes = (BpeNode *)xrealloc(w->nodes, w->capacity * sizeof(BpeNode));
        w->heap = (uint64_t *)xrealloc(w->heap, 3 * w->capacity * sizeof(uint64_t));
    }
    BpeNode *nodes = w->nodes;
    uint32_t end = bpe_start(t, word, len, nodes);
    for (uint32_t i = 0; i < end; i++) {
        nodes[i].previous = i - 1;    // NO_TOKEN for the first
        nodes[i].next = i + 1;
    }
    w->heap_count = 0;
    for (uint32_t i = 0; i < end; i++) bpe_propose(w, i, bpe_merged(t, nodes, i, end));
    while (w->heap_count > 0) {
        uint64_t item = bpe_heap_pop(w);
        uint32_t at = (uint32_t)item, gone = nodes[at].next;
        if (nodes[at].merged != item >> 32) continue;    // it or its neighbour has changed since
        nodes[at].id = nodes[at].merged;
        nodes[at].next = nodes[gone].next;
        nodes[gone].merged = NO_TOKEN;
        if (nodes[at].next < end) nodes[nodes[at].next].previous = at;
        bpe_propose(w, at, bpe_merged(t, nodes, at, end));
        if (at > 0) bpe_propose(w, nodes[at].previous, bpe_merged(t, nodes, nodes[at].previous, end));
    }
    for (uint32_t i = 0; i < end; i = nodes[i].next) token_list_push(out, nodes[i].id);
}

void bpe_free(BpeWork *w) {
    free(w->nodes);
    free(w->heap);
}

// The words that a thread has met: those of at most 16 bytes that gave at most 3 tokens, one in a slot, the latest stays. 2 MB, made by the
// thread's first call and kept while the program runs. (Not a static array: glibc would take those 2 MB out of each thread's stack.)
#ifdef __cplusplus
#define THREAD_LOCAL thread_local
#else
#define THREAD_LOCAL _Thread_local
#endif
enum { WORD_BYTES = 16, WORD_TOKENS = 3, WORD_BITS = 16 };
typedef struct { WordKey key; uint32_t ids[WORD_TOKENS]; uint16_t len, count; } KnownWord;
typedef struct { uint64_t vocabulary; KnownWord words[1 << WORD_BITS]; } WordCache;    // vocabulary: hash of the Tokenizer they belong to
static THREAD_LOCAL WordCache *word_cache;

WordCache *word_cache_of_thread(const Tokenizer *t) {
    if (!word_cache) word_cache = (WordCache *)xcalloc(1, sizeof(WordCache));
    else if (word_cache->vocabulary != t->hash) memset(word_cache, 0, sizeof(WordCache));
    word_cache->vocabulary = t->hash;
    return word_cache;
}

typedef struct { const char *text; size_t len; WordKey key; uint64_t hash; KnownWord *slot; } Word;    // slot: NULL if len > WORD_BYTES

// The word text[0..len). room: bytes of text that may be read, at least len. Its slot begins to travel from memory to the processor.
Word word_make(WordCache *cache, const char *text, size_t len, size_t room) {
    Word w = { text, len, { 0, 0 }, 0, NULL };
    if (len > WORD_BYTES) return w.hash = token_hash(text, len, room), w;
    w.key = word_key(text, len, room);
    w.hash = word_hash(w.key, len);
    w.slot = &cache->words[w.hash >> (64 - WORD_BITS)];
    __builtin_prefetch(w.slot);
    return w;
}

void bpe_encode(const Tokenizer *t, Word w, BpeWork *work, TokenList *out) {
    KnownWord *slot = w.slot;
    size_t from = out->count;
    if (slot && slot->key.a == w.key.a && slot->key.b == w.key.b && slot->len == w.len) {
        if (from + WORD_TOKENS > out->capacity) token_list_grow(out);
        for (size_t i = 0; i < WORD_TOKENS; i++) out->ids[from + i] = slot->ids[i];    // three are copied faster than `count`
        out->count += slot->count;
        return;
    }
    uint32_t id = w.len <= (size_t)t->longest ? slot_id(*token_slot(t, w.text, w.len, w.hash)) : NO_TOKEN;
    if (id != NO_TOKEN) token_list_push(out, id);
    else bpe_merge(t, w.text, w.len, work, out);
    size_t count = out->count - from;
    if (!slot || count > WORD_TOKENS) return;
    slot->key = w.key;
    slot->len = (uint16_t)w.len;
    slot->count = (uint16_t)count;
    for (size_t i = 0; i < count; i++) slot->ids[i] = out->ids[from + i];
}

Tokenizer *tokenizer_new(void) {
    Tokenizer *t = (Tokenizer *)xcalloc(1, sizeof(Tokenizer));
    t->endoftext = t->im_start = t->im_end = -1;
    t->special_set = "none";
    t->start = (uint32_t *)xcalloc(1, sizeof(uint32_t));
    return t;
}

void tokenizer_clear_specials(Tokenizer *t) {
    for (int i = 0; i < t->num_specials; i++) free(t->specials[i].text);
    free(t->specials);
    free(t->special_at);
    t->specials = NULL;
    t->special_at = NULL;
    t->num_specials = 0;
}

void tokenizer_free(Tokenizer *t) {
    if (!t) return;
    tokenizer_clear_specials(t);
    free(t->bytes);
    free(t->start);
    free(t->parts);
    free(t->token_table);
    free(t->pair_table);
    free(t);
}

// The next ordinary token, in rank order.
void tokenizer_add(Tokenizer *t, const char *bytes, size_t len, const char *path) {
    int r = t->num_ranks++;
    CHECK(len >= 1 && len <= 255, "%s: token %d is %zu bytes long; the vocabulary's limit is 1 to 255", path, r, len);
    CHECK((uint32_t)r < MAX_ID, "%s: more than %u tokens", path, MAX_ID);
    if (r + 2 > t->start_capacity) {
        t->start_capacity = 2 * t->start_capacity + 1024;
        t->start = (uint32_t *)xrealloc(t->start, (size_t)t->start_capacity * sizeof(uint32_t));
    }
    if (t->num_bytes + len > t->bytes_capacity) {
        t->bytes_capacity = 2 * t->bytes_capacity + 65536;
        t->bytes = (char *)xrealloc(t->bytes, t->bytes_capacity);
    }
    memcpy(t->bytes + t->num_bytes, bytes, len);
    t->num_bytes += len;
    t->start[r + 1] = (uint32_t)t->num_bytes;
    if ((int)len > t->longest) t->longest = (int)len;
}

// Tables from the list of tokens. The merges need not be stored: in rank order, merging a token's bytes by the merges known so far must
// leave exactly two tokens, which are its parts. This holds for every token of Qwen's vocabulary (and makes ranks and the merge list of
// tokenizer.json say the same); a vocabulary where it fails is not of this kind.
void tokenizer_finish(Tokenizer *t, const char *path) {
    int bits = 10;
    while (2 << bits < 3 * t->num_ranks) bits++;    // at least a third of the slots is empty
    t->table_shift = 64 - bits;
    t->token_table = (uint32_t *)memset(xmalloc(sizeof(uint32_t) << bits), 0xFF, sizeof(uint32_t) << bits);
    t->pair_table = (uint32_t *)memset(xmalloc(sizeof(uint32_t) << bits), 0xFF, sizeof(uint32_t) << bits);
    t->parts = (uint32_t (*)[2])xmalloc((size_t)(t->num_ranks + 1) * sizeof(*t->parts));
    memset(t->byte_id, 0xFF, sizeof(t->byte_id));
    memset(t->low_pair, 0xFF, sizeof(t->low_pair));
    memset(t->char_id, 0xFF, sizeof(t->char_id));
    t->hash = FNV_START;
    for (int r = 0; r < t->num_ranks; r++) {
        const char *bytes = t->bytes + t->start[r];
        unsigned char len = (unsigned char)(t->start[r + 1] - t->start[r]);
        uint64_t hash = token_hash(bytes, len, t->num_bytes - t->start[r]);
        uint32_t *slot = token_slot(t, bytes, len, hash);
        CHECK(*slot == NO_TOKEN, "%s: tokens %u and %d are equal", path, token_find(t, bytes, len), r);
        *slot = slot_fill((uint32_t)r, hash);
        if (len == 1) t->byte_id[(unsigned char)bytes[0]] = (uint32_t)r;
        t->hash = fnv1a(fnv1a(t->hash, (const char *)&len, 1), bytes, len);
    }
    for (int b = 0; b < 256; b++) CHECK(t->byte_id[b] != NO_TOKEN, "%s: byte 0x%02X is not a token; not a byte-level vocabulary", path, b);
    TokenList merged = { NULL, 0, 0 };
    BpeWork work = { NULL, NULL, 0, 0 };
    for (int r = 0; r < t->num_ranks; r++) {
        const char *bytes = t->bytes + t->start[r];
        size_t len = t->start[r + 1] - t->start[r];
        t->parts[r][0] = t->parts[r][1] = NO_TOKEN;
        if (len == 1) continue;
        merged.count = 0;
        bpe_merge(t, bytes, len, &work, &merged);
        CHECK(merged.count == 2, "%s: token %d is %zu earlier tokens, not two; not a vocabulary of Qwen's kind", path, r, merged.count);
        t->parts[r][0] = merged.ids[0];
        t->parts[r][1] = merged.ids[1];
        size_t left = t->start[merged.ids[0] + 1] - t->start[merged.ids[0]];
        border_learn(&t->borders, bytes, left, len - left);
        if (len == 3 && is_first_of_three(bytes[0])) t->char_id[char_index(bytes)] = (uint32_t)r;
        if ((merged.ids[0] | merged.ids[1]) < 256) t->low_pair[merged.ids[0]][merged.ids[1]] = (uint32_t)r;
        uint64_t hash = pair_hash(merged.ids[0], merged.ids[1]);
        *pair_slot(t, merged.ids[0], merged.ids[1], hash) = slot_fill((uint32_t)r, hash);
    }
    free(merged.ids);
    bpe_free(&work);
    t->vocab_size = t->num_ranks;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 6 specials

#define QWEN_RANKS 151643    // a smaller vocabulary is a trimmed one

// Ids follow the ranks in this order. Qwen1.5 and Qwen2 have the first 3, Qwen2.5 22, Qwen3 26; the first 14 are control tokens, the
// others are only never split. Qwen v1 has the first 3, then <|extra_0|> .. <|extra_204|>.
static const char *const qwen_specials[26] = {
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
};
static const struct { const char *name; int count; } special_sets[5] = {
    { "none", 0 }, { "qwen2", 3 }, { "qwen2.5", 22 }, { "qwen3", 26 }, { "v1", 208 },
};

const char *special_text(const char *set, int i, char buffer[32]) {
    if (i < 3 || strcmp(set, "v1") != 0) return qwen_specials[i];
    snprintf(buffer, 32, "<|extra_%d|>", i - 3);
    return buffer;
}

void special_add(Tokenizer *t, const char *text, size_t len, uint32_t id, bool is_control, const char *path) {
    CHECK(len > 0 && len < 256, "%s: special token %u is %zu bytes long; the limit is 1 to 255", path, id, len);
    t->specials = (Special *)xrealloc(t->specials, (size_t)(t->num_specials + 1) * sizeof(Special));
    int i = t->num_specials++;
    for (; i > 0 && t->specials[i - 1].id >= id; i--) {
        CHECK(t->specials[i - 1].id != id, "%s: two special tokens have the id %u", path, id);
        t->specials[i] = t->specials[i - 1];
    }
    Special special = { (char *)xmalloc(len + 1), len, id, is_control };
    memcpy(special.text, text, len);
    special.text[len] = 0;
    t->specials[i] = special;
}

const Special *special_find(const Tokenizer *t, const char *text) {
    for (int i = 0; i < t->num_specials; i++) {
        if (strcmp(t->specials[i].text, text) == 0) return &t->specials[i];
    }
    return NULL;
}

bool special_is_set(const Tokenizer *t, const char *set, int count) {
    char buffer[32];
    if (t->num_specials != count || t->nfc_whole != (strcmp(set, "v1") == 0)) return false;
    for (int i = 0; i < count; i++) {
        const Special *s = &t->specials[i];
        if (s->id != (uint32_t)(t->num_ranks + i) || strcmp(s->text, special_text(set, i, buffer)) != 0) return false;
    }
    return true;
}

// After the last special_add: the fields that follow from the list.
void special_finish(Tokenizer *t, const char *path) {
    for (int i = 0; i < t->num_specials; i++) {
        const Special *s = &t->specials[i];
        CHECK(s->id >= (uint32_t)t->num_ranks && s->id <= MAX_ID, "%s: special token %s has the id %u; ids %d to %u are free", path,
              s->text, s->id, t->num_ranks, MAX_ID);
    }
    t->vocab_size = t->num_specials ? (int)t->specials[t->num_specials - 1].id + 1 : t->num_ranks;
    t->special_set = t->num_specials ? "custom" : "none";
    for (int i = 0; i < 5; i++) {
        if (special_is_set(t, special_sets[i].name, special_sets[i].count)) t->special_set = special_sets[i].name;
    }
    int *well_known[3] = { &t->endoftext, &t->im_start, &t->im_end };
    for (int i = 0; i < 3; i++) {
        const Special *found = special_find(t, qwen_specials[i]);
        *well_known[i] = found ? (int)found->id : -1;
    }
    memset(t->special_first, 0, sizeof(t->special_first));
    size_t room = (size_t)(t->vocab_size - t->num_ranks);
    t->special_at = (int *)xrealloc(t->special_at, room * sizeof(int));
    for (size_t i = 0; i < room; i++) t->special_at[i] = -1;
    for (int i = 0; i < t->num_specials; i++) {
        const Special *s = &t->specials[i];
        t->special_at[s->id - (uint32_t)t->num_ranks] = i;
        t->special_first[(unsigned char)s->text[0]] = true;
    }
}

// Replaces the special tokens by a known set: "none", "qwen2", "qwen2.5", "qwen3" or "v1".
void tokenizer_use_specials(Tokenizer *t, const char *set) {
    char buffer[32];
    int count = -1;
    for (int i = 0; i < 5; i++) {
        if (strcmp(set, special_sets[i].name) == 0) count = special_sets[i].count;
    }
    CHECK(count >= 0, "unknown set of special tokens '%s'; there are none, qwen2, qwen2.5, qwen3 and v1", set);
    tokenizer_clear_specials(t);
    t->nfc_whole = strcmp(set, "v1") == 0;
    for (int i = 0; i < count; i++) {
        const char *text = special_text(set, i, buffer);
        special_add(t, text, strlen(text), (uint32_t)(t->num_ranks + i), t->nfc_whole || i < 14, set);
    }
    special_finish(t, set);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 7 encode

typedef enum { SPECIALS_AS_TEXT, SPECIALS_PARSED } SpecialsMode;

// Text without special tokens: NFC, split, BPE. Several words are on their way at once, so that none waits for memory.
enum { WORDS_AT_ONCE = 16 };
void tokenizer_encode_text(const Tokenizer *t, const char *text, size_t len, TokenList *out) {
    char *copy = nfc_normalize(text, len, &len);
    if (copy) text = copy;
    WordCache *cache = word_cache_of_thread(t);
    BpeWork work = { NULL, NULL, 0, 0 };
    Word words[WORDS_AT_ONCE];
    for (size_t at = 0, next; at < len;) {
        int count = 0;
        for (; count < WORDS_AT_ONCE && at < len; at = next) {
            next = split_next(&t->borders, text, at, len);
            words[count++] = word_make(cache, text + at, next - at, len - at);
        }
        for (int i = 0; i < count; i++) bpe_encode(t, words[i], &work, out);
    }
    bpe_free(&work);
    free(copy);
}

// The special token that starts at s, the longest if there are several; NULL if none does.
const Special *special_match(const Tokenizer *t, const char *s, size_t len) {
    const Special *found = NULL;
    if (!t->special_first[(unsigned char)s[0]]) return NULL;
    for (int i = 0; i < t->num_specials; i++) {
        const Special *special = &t->specials[i];
        if (special->len > len || (found && special->len <= found->len)) continue;
        if (memcmp(special->text, s, special->len) == 0) found = special;
    }
    return found;
}

// Appends the tokens of text[0..len) to out. Any bytes are allowed, also NUL; invalid UTF-8 counts as U+FFFD. parse_specials says what
// "<|im_end|>" inside the text is: SPECIALS_AS_TEXT (for text you didn't write) or SPECIALS_PARSED. Special tokens end the text before
// them, so the splitter sees the end of a text there.
void tokenizer_encode(const Tokenizer *t, const char *text, size_t len, int parse_specials, TokenList *out) {
    if (parse_specials == SPECIALS_AS_TEXT) {
        tokenizer_encode_text(t, text, len, out);
        return;
    }
    char *copy = t->nfc_whole ? nfc_normalize(text, len, &len) : NULL;
    if (copy) text = copy;
    for (size_t at = 0, stop = 0; at < len; at = stop) {
        const Special *special = NULL;
        while (stop < len && (special = special_match(t, text + stop, len - stop)) == NULL) stop++;
        tokenizer_encode_text(t, text + at, stop - at, out);
        if (special) {
            token_list_push(out, special->id);
            stop += special->len;
        }
    }
    free(copy);
}

// The bytes of one token, which need not be whole characters; *len is 0 for an id without a token. Text is these bytes in a row.
const char *tokenizer_bytes(const Tokenizer *t, uint32_t id, size_t *len) {
    *len = 0;
    if (id < (uint32_t)t->num_ranks) return *len = t->start[id + 1] - t->start[id], t->bytes + t->start[id];
    if (id >= (uint32_t)t->vocab_size || t->special_at[id - (uint32_t)t->num_ranks] < 0) return "";
    const Special *special = &t->specials[t->special_at[id - (uint32_t)t->num_ranks]];
    return *len = special->len, special->text;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 8 load

// Hugging Face's files write each byte of a token as one printable character: itself if it is printable Latin-1, else U+0100 and up.
#define ALPHABET_END 324
typedef struct { uint32_t code_of[256]; short byte_of[ALPHABET_END]; } Alphabet;    // byte_of: -1 where no byte is

Alphabet alphabet_make(void) {
    Alphabet a;
    uint32_t next = 256;
    memset(a.byte_of, 0xFF, sizeof(a.byte_of));
    for (uint32_t b = 0; b < 256; b++) {
        bool printable = (b >= 33 && b <= 126) || (b >= 161 && b != 173);
        a.code_of[b] = printable ? b : next++;
        a.byte_of[a.code_of[b]] = (short)b;
    }
    return a;
}

// Bytes of a written token, in place; returns their number, 0 if a character is not of the alphabet.
size_t alphabet_decode(const Alphabet *a, char *text, size_t len) {
    size_t n = 0;
    for (size_t i = 0; i < len;) {
        uint32_t c;
        int used = utf8_decode(text + i, len - i, &c);
        if (used < 0 || c >= ALPHABET_END || a->byte_of[c] < 0) return 0;
        i += (size_t)used;
        text[n++] = (char)a->byte_of[c];
    }
    return n;
}

// The bytes of token r in the alphabet, at most 2 * 255.
size_t alphabet_encode(const Alphabet *a, const Tokenizer *t, uint32_t r, char *out) {
    size_t n = 0;
    for (uint32_t i = t->start[r]; i < t->start[r + 1]; i++) n += (size_t)utf8_encode(a->code_of[(unsigned char)t->bytes[i]], out + n);
    return n;
}

// The merge that makes token r, as "left right".
#define MERGE_ROOM 1024
size_t alphabet_merge(const Alphabet *a, const Tokenizer *t, uint32_t r, char *out) {
    size_t n = alphabet_encode(a, t, t->parts[r][0], out);
    out[n++] = ' ';
    return n + alphabet_encode(a, t, t->parts[r][1], out + n);
}

uint64_t bin_get(const char *data, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value |= (uint64_t)(unsigned char)data[i] << 8 * i;
    return value;
}

// Our compact format; tokenizer_save_bin describes it.
#define BIN_MAGIC "QWENBPE"
#define BIN_HEADER 40

uint64_t bin_hash(const char *data, size_t payload) {
    return fnv1a(fnv1a(FNV_START, data, BIN_HEADER - 8), data + BIN_HEADER, payload);
}

void tokenizer_load_bin(Tokenizer *t, const char *data, size_t size, const char *path) {
    CHECK(size >= BIN_HEADER, "%s is cut off: %zu bytes, the header alone has %d", path, size, BIN_HEADER);
    uint64_t version = bin_get(data + 8, 4), num_ranks = bin_get(data + 12, 4), num_specials = bin_get(data + 16, 4);
    uint64_t payload = bin_get(data + 24, 8), hash = bin_get(data + 32, 8);
    CHECK(version == 1, "%s has version %d of the format; this program reads version 1", path, (int)version);
    CHECK(payload == size - BIN_HEADER, "%s is cut off or has bytes too many: %zu bytes, its header says %" PRIu64, path, size,
          payload + BIN_HEADER);
    CHECK(bin_hash(data, payload) == hash, "%s is damaged: its checksum does not match; copy it again", path);
    const char *p = data + BIN_HEADER, *end = data + size;
    for (uint64_t r = 0; r < num_ranks; r++) {
        CHECK(p < end && p + 1 + (unsigned char)*p <= end, "%s is damaged: token %" PRIu64 " goes past the end", path, r);
        tokenizer_add(t, p + 1, (unsigned char)*p, path);
        p += 1 + (unsigned char)*p;
    }
    tokenizer_finish(t, path);
    t->nfc_whole = bin_get(data + 20, 4) & 1;
    for (uint64_t i = 0; i < num_specials; i++) {
        CHECK(end - p >= 6 && end - p >= 6 + (unsigned char)p[5], "%s is damaged: special token %" PRIu64 " goes past the end", path, i);
        special_add(t, p + 6, (unsigned char)p[5], (uint32_t)bin_get(p, 4), p[4] & 1, path);
        p += 6 + (unsigned char)p[5];
    }
    CHECK(p == end, "%s is damaged: %zu bytes too many", path, (size_t)(end - p));
    special_finish(t, path);
}

int base64_digit(char c) {
    static const char digits[65] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *found = c ? strchr(digits, c) : NULL;
    return found ? (int)(found - digits) : -1;
}

// Returns the bytes written to out, or -1.
int base64_decode(const char *text, size_t len, char *out) {
    int n = 0;
    if (len == 0 || len % 4 != 0) return -1;
    size_t digits = len - (text[len - 1] == '=') - (text[len - 1] == '=' && text[len - 2] == '=');
    uint32_t bits = 0;
    for (size_t i = 0; i < digits; i++) {
        int digit = base64_digit(text[i]);
        if (digit < 0) return -1;
        bits = bits << 6 | (uint32_t)digit;
        if (i % 4 > 0) out[n++] = (char)(bits >> (6 - 2 * (i % 4)));
    }
    return n;
}

// qwen.tiktoken: "base64 rank" a line, by rank.
void tokenizer_load_tiktoken(Tokenizer *t, const char *data, size_t size, const char *path) {
    char token[256];
    int line = 0;
    for (const char *p = data, *end = data + size, *stop; p < end; p = stop + 1) {
        line++;
        stop = (const char *)memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        const char *space = (const char *)memchr(p, ' ', (size_t)(stop - p));
        CHECK(space != NULL && space - p <= 340, "%s, line %d: expected \"base64 rank\"", path, line);
        int len = base64_decode(p, (size_t)(space - p), token);
        CHECK(len > 0, "%s, line %d: '%.*s' is not base64", path, line, (int)(space - p), p);
        char *after;
        long rank = strtol(space + 1, &after, 10);    // the file ends with a NUL
        if (after < stop && *after == '\r') after++;
        CHECK(after == stop && rank == line - 1, "%s, line %d: expected rank %d, found '%.*s'; ranks must be in order", path, line,
              line - 1, (int)(stop - space - 1), space + 1);
        tokenizer_add(t, token, (size_t)len, path);
    }
    tokenizer_finish(t, path);
    tokenizer_use_specials(t, t->num_ranks == QWEN_RANKS ? "qwen2.5" : "qwen2");
}

Json *tokenizer_parse_json(const char *data, size_t size, const char *path) {
    JsonError error;
    Json *root = json_parse(data, size, &error);
    CHECK(root != NULL, "%s is not valid JSON: %s at byte %zu", path, error.message, error.position);
    return root;
}

bool json_is_true(const Json *value) { return value && value->type == JSON_TRUE; }

bool json_is_id(const Json *value) {
    return value && value->type == JSON_NUMBER && value->number >= 0 && value->number <= MAX_ID && value->number == floor(value->number);
}

// {"token": id, ...}, in any order; the ids are 0 to n - 1. Some files list the special tokens here too: they are left out.
void tokenizer_load_vocab(Tokenizer *t, const Json *vocab, const char *path) {
    Alphabet alphabet = alphabet_make();
    size_t count = 0, id = 0;
    for (const Json *entry = vocab->child; entry; entry = entry->next) count++;
    const Json **by_id = (const Json **)xcalloc(count, sizeof(Json *));
    for (const Json *entry = vocab->child; entry; entry = entry->next) {
        CHECK(json_is_id(entry), "%s: vocab: '%s' has no id", path, entry->key);
        id = (size_t)entry->number;
        if (special_find(t, entry->key)) continue;
        CHECK(id < count && !by_id[id], "%s: vocab: id %zu of '%s' is used twice or leaves a gap", path, id, entry->key);
        by_id[id] = entry;
    }
    for (id = 0; id < count && by_id[id]; id++) {
        size_t len = alphabet_decode(&alphabet, by_id[id]->key, strlen(by_id[id]->key));
        CHECK(len > 0, "%s: vocab: token %zu is not written in the byte-level alphabet", path, id);
        tokenizer_add(t, by_id[id]->key, len, path);
    }
    for (size_t i = id; i < count; i++) CHECK(!by_id[i], "%s: vocab: no token has id %zu", path, id);
    free(by_id);
    tokenizer_finish(t, path);
}

// The merges of a file must be those that follow from the ids, in the same order: each line gives the next token of several bytes.
int merges_next(const Tokenizer *t, int rank) {
    do rank++; while (rank < t->num_ranks && t->parts[rank][0] == NO_TOKEN);
    return rank;
}

int merges_check(const Tokenizer *t, const Alphabet *a, int rank, const char *line, size_t len, const char *path) {
    char expected[MERGE_ROOM];
    rank = merges_next(t, rank);
    size_t n = rank < t->num_ranks ? alphabet_merge(a, t, (uint32_t)rank, expected) : 0;
    CHECK(len == n && memcmp(line, expected, n) == 0, "%s: merges: found '%.*s' where the ids in vocab ask for '%.*s'; "
          "only vocabularies with ids in merge order can be read", path, (int)(len < 80 ? len : 80), line, (int)n, expected);
    return rank;
}

void merges_end(const Tokenizer *t, int rank, const char *path) {
    CHECK(merges_next(t, rank) == t->num_ranks, "%s: merges: they end before token %d", path, merges_next(t, rank));
}

// merges.txt: a merge a line, perhaps after a line "#version: 0.2".
void tokenizer_load_merges_txt(const Tokenizer *t, const char *data, size_t size, const char *path) {
    Alphabet alphabet = alphabet_make();
    int rank = -1;
    const char *p = data, *end = data + size;
    if (size >= 9 && memcmp(data, "#version:", 9) == 0) p += strcspn(p, "\n");
    for (const char *stop; p < end; p = stop + 1) {
        stop = (const char *)memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        if (stop > p) rank = merges_check(t, &alphabet, rank, p, (size_t)(stop - p), path);
    }
    merges_end(t, rank, path);
}

// In tokenizer.json they are "left right" or, in newer files, ["left", "right"].
void tokenizer_load_merges_json(const Tokenizer *t, const Json *merges, const char *path) {
    Alphabet alphabet = alphabet_make();
    char pair[MERGE_ROOM];
    int rank = -1;
    for (const Json *merge = merges->child; merge; merge = merge->next) {
        const Json *left = merge->child, *right = left ? left->next : NULL;
        const char *line = merge->type == JSON_STRING ? merge->text : pair;
        bool is_pair = right && !right->next && left->type == JSON_STRING && right->type == JSON_STRING;
        snprintf(pair, sizeof(pair), "%s %s", is_pair ? left->text : "", is_pair ? right->text : "");
        rank = merges_check(t, &alphabet, rank, line, strlen(line), path);
    }
    merges_end(t, rank, path);
}

// Follows "a.b.0.c" through objects and arrays; NULL where there is nothing.
const Json *json_at(const Json *value, const char *where) {
    while (value && *where) {
        size_t n = strcspn(where, ".");
        const Json *found = NULL;
        if (value->type == JSON_ARRAY && n > 0 && strspn(where, "0123456789") == n) {
            unsigned long index = strtoul(where, NULL, 10);
            for (found = value->child; found && index > 0; index--) found = found->next;
        } else if (value->type == JSON_OBJECT) {
            for (const Json *member = value->child; member; member = member->next) {
                if (strncmp(member->key, where, n) == 0 && member->key[n] == 0) found = member;
            }
        }
        value = found;
        where += n + (where[n] == '.');
    }
    return value;
}

const char *json_describe(const Json *value) {
    static const char *const words[7] = { "null", "false", "true", "", "", "[...]", "{...}" };
    if (!value || (value->type == JSON_STRING && value->len == 0)) return "null";
    return value->type == JSON_NUMBER || value->type == JSON_STRING ? value->text : words[value->type];
}

// What tokenizer.json must say ("null": nothing, or an empty text); anything else would give other ids than Qwen's. `truncation` and
// `padding` may be anything: they say how a caller batches, not what the tokens are.
static const struct { const char *field, *value, *or_value; } tokenizer_json_fields[18] = {
    { "model.type", "BPE", "BPE" },
    { "model.dropout", "null", "0.0" },
    { "model.continuing_subword_prefix", "null", "null" },
    { "model.end_of_word_suffix", "null", "null" },
    { "model.byte_fallback", "false", "null" },
    { "model.vocab", "{...}", "{...}" },
    { "model.merges", "[...]", "[...]" },
    { "normalizer.type", "NFC", "NFC" },
    { "pre_tokenizer.type", "Sequence", "Sequence" },
    { "pre_tokenizer.pretokenizers.0.type", "Split", "Split" },
    { "pre_tokenizer.pretokenizers.0.pattern.Regex", QWEN_PATTERN, QWEN_PATTERN },
    { "pre_tokenizer.pretokenizers.0.behavior", "Isolated", "Isolated" },
    { "pre_tokenizer.pretokenizers.0.invert", "false", "false" },
    { "pre_tokenizer.pretokenizers.1.type", "ByteLevel", "ByteLevel" },
    { "pre_tokenizer.pretokenizers.1.add_prefix_space", "false", "false" },
    { "pre_tokenizer.pretokenizers.1.use_regex", "false", "false" },
    { "pre_tokenizer.pretokenizers.2", "null", "null" },
    { "post_processor.type", "ByteLevel", "null" },
};

// "normalized" says whether special tokens are looked for before NFC (later models) or after it (v1's rule); all must agree.
void tokenizer_load_added(Tokenizer *t, const Json *root, const char *path) {
    static const char *const must_be_false[3] = { "lstrip", "rstrip", "single_word" };
    const Json *list = json_get(root, "added_tokens");
    for (const Json *token = list ? list->child : NULL; token; token = token->next) {
        const Json *content = json_get(token, "content"), *id = json_get(token, "id");
        CHECK(content && content->type == JSON_STRING && json_is_id(id), "%s: added_tokens: number %d has no id or no content", path,
              t->num_specials);
        for (int k = 0; k < 3; k++) {
            CHECK(!json_is_true(json_get(token, must_be_false[k])), "%s: added_tokens: %s of '%s' is true; only false can be read", path,
                  must_be_false[k], content->text);
        }
        bool normalized = json_is_true(json_get(token, "normalized"));
        CHECK(token == list->child || normalized == t->nfc_whole, "%s: added_tokens: normalized of '%s' is not as in those before", path,
              content->text);
        t->nfc_whole = normalized;
        special_add(t, content->text, content->len, (uint32_t)id->number, json_is_true(json_get(token, "special")), path);
    }
}

void tokenizer_load_json(Tokenizer *t, const char *data, size_t size, const char *path) {
    Json *root = tokenizer_parse_json(data, size, path);
    CHECK(json_get(root, "model") != NULL, "%s has no field 'model': not a tokenizer.json (for vocab.json, name its directory)", path);
    for (int i = 0; i < 18; i++) {
        const char *field = tokenizer_json_fields[i].field, *value = tokenizer_json_fields[i].value;
        const char *found = json_describe(json_at(root, field));
        CHECK(strcmp(found, value) == 0 || strcmp(found, tokenizer_json_fields[i].or_value) == 0,
              "%s is not Qwen's kind of tokenizer: %s is %.60s, must be %s", path, field, found, value);
    }
    tokenizer_load_added(t, root, path);
    tokenizer_load_vocab(t, json_at(root, "model.vocab"), path);
    tokenizer_load_merges_json(t, json_at(root, "model.merges"), path);
    special_finish(t, path);
    json_free(root);
}

void tokenizer_load_vocab_and_merges(Tokenizer *t, const char *vocab_path, const char *merges_path) {
    size_t size;
    char *data = read_file(vocab_path, &size);
    Json *vocab = tokenizer_parse_json(data, size, vocab_path);
    CHECK(vocab->type == JSON_OBJECT, "%s is not an object of tokens and ids", vocab_path);
    tokenizer_load_vocab(t, vocab, vocab_path);
    json_free(vocab);
    free(data);
    data = read_file(merges_path, &size);
    tokenizer_load_merges_txt(t, data, size, merges_path);
    free(data);
    tokenizer_use_specials(t, t->num_ranks == QWEN_RANKS ? "qwen2.5" : "qwen2");
}

void tokenizer_path(char out[4096], const char *directory, const char *name) {
    int n = snprintf(out, 4096, "%s/%s", directory, name);
    CHECK(n < 4096, "the path %.100s... is too long", directory);
}

// A file is recognised by its content: our magic, '{' of a tokenizer.json, else lines of qwen.tiktoken.
void tokenizer_load_file(Tokenizer *t, const char *path) {
    size_t size;
    char *data = read_file(path, &size);
    const char *first = data;
    while (*first == ' ' || *first == '\n' || *first == '\r' || *first == '\t') first++;
    if (size >= 8 && memcmp(data, BIN_MAGIC, 8) == 0) tokenizer_load_bin(t, data, size, path);
    else if (*first == '{' || strncmp(data, "\xEF\xBB\xBF{", 4) == 0) tokenizer_load_json(t, data, size, path);
    else {
        const char *p = data;
        while (base64_digit(*p) >= 0 || *p == '=') p++;
        bool is_line = p > data && *p == ' ' && p[1] >= '0' && p[1] <= '9';
        CHECK(is_line, "%s is no tokenizer: expected our .bin, qwen.tiktoken or a Hugging Face tokenizer.json", path);
        tokenizer_load_tiktoken(t, data, size, path);
    }
    free(data);
}

// path: one of those files, or a directory with (the first of) tokenizer.json, tokenizer.bin, qwen.tiktoken, vocab.json + merges.txt.
// tokenizer.json and .bin bring their special tokens; the others get qwen2.5's, trimmed vocabularies only the first three.
Tokenizer *tokenizer_load(const char *path) {
    static const char *const names[3] = { "tokenizer.json", "tokenizer.bin", "qwen.tiktoken" };
    char file[4096], merges[4096];
    struct stat st;
    CHECK(stat(path, &st) == 0, "cannot open the tokenizer %s: %s", path, strerror(errno));
    Tokenizer *t = tokenizer_new();
    if (!S_ISDIR(st.st_mode)) return tokenizer_load_file(t, path), t;
    for (int i = 0; i < 3; i++) {
        tokenizer_path(file, path, names[i]);
        if (stat(file, &st) == 0) return tokenizer_load_file(t, file), t;
    }
    tokenizer_path(file, path, "vocab.json");
    tokenizer_path(merges, path, "merges.txt");
    CHECK(stat(file, &st) == 0 && stat(merges, &st) == 0,
          "no tokenizer in %s: looked for tokenizer.json, tokenizer.bin, qwen.tiktoken, and vocab.json with merges.txt", path);
    tokenizer_load_vocab_and_merges(t, file, merges);
    return t;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 9 save, trim

void bin_put(char **p, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) *(*p)++ = (char)(value >> 8 * i);
}

// The compact format, little-endian:
//   header, 40 bytes: char magic[8] "QWENBPE\0"; u32 version (1), ranks, special tokens, flags (1: v1's rule for NFC);
//                     u64 bytes after the header; u64 FNV-1a hash of the header before it and of the bytes after it
//   each ordinary token by rank: u8 length, its bytes. Merges are not stored, they follow (tokenizer_finish).
//   each special token by id: u32 id, u8 is_control, u8 length, its text
void tokenizer_save_bin(const Tokenizer *t, const char *path) {
    size_t payload = t->num_bytes + (size_t)t->num_ranks;
    for (int i = 0; i < t->num_specials; i++) payload += 6 + t->specials[i].len;
    char *data = (char *)xmalloc(BIN_HEADER + payload), *p = data + BIN_HEADER;
    for (int r = 0; r < t->num_ranks; r++) {
        uint32_t len = t->start[r + 1] - t->start[r];
        bin_put(&p, len, 1);
        memcpy(p, t->bytes + t->start[r], len);
        p += len;
    }
    for (int i = 0; i < t->num_specials; i++) {
        bin_put(&p, t->specials[i].id, 4);
        bin_put(&p, t->specials[i].is_control, 1);
        bin_put(&p, t->specials[i].len, 1);
        memcpy(p, t->specials[i].text, t->specials[i].len);
        p += t->specials[i].len;
    }
    p = data;
    memcpy(p, BIN_MAGIC, 8);
    p += 8;
    bin_put(&p, 1, 4);
    bin_put(&p, (uint64_t)t->num_ranks, 4);
    bin_put(&p, (uint64_t)t->num_specials, 4);
    bin_put(&p, t->nfc_whole, 4);
    bin_put(&p, payload, 8);
    bin_put(&p, bin_hash(data, payload), 8);
    AtomicFile a = open_atomic(path);
    fwrite(data, 1, BIN_HEADER + payload, a.file);
    close_atomic(&a);
    free(data);
}

#define BYTE_LEVEL "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": false, \"use_regex\": false}"

void tokenizer_write_added(FILE *f, const Tokenizer *t, bool as_object) {
    for (int i = 0; i < t->num_specials; i++) {
        const Special *s = &t->specials[i];
        if (as_object) fprintf(f, "%s\n    \"%u\": {\"content\": ", i ? "," : "", s->id);
        else fprintf(f, "%s\n    {\"id\": %u, \"content\": ", i ? "," : "", s->id);
        json_write_string(f, s->text, s->len);
        fprintf(f, ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": %s, \"special\": %s}",
                t->nfc_whole ? "true" : "false", s->is_control ? "true" : "false");
    }
}

void tokenizer_write_json(FILE *f, const Tokenizer *t) {
    Alphabet alphabet = alphabet_make();
    char text[MERGE_ROOM];
    fputs("{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [", f);
    tokenizer_write_added(f, t, false);
    fputs("\n  ],\n  \"normalizer\": {\"type\": \"NFC\"},\n  \"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [\n"
          "    {\"type\": \"Split\", \"pattern\": {\"Regex\": ", f);
    json_write_string(f, QWEN_PATTERN, strlen(QWEN_PATTERN));
    fputs("}, \"behavior\": \"Isolated\", \"invert\": false},\n    " BYTE_LEVEL "\n  ]},\n"
          "  \"post_processor\": " BYTE_LEVEL ",\n  \"decoder\": " BYTE_LEVEL ",\n"
          "  \"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, \"continuing_subword_prefix\": \"\",\n"
          "    \"end_of_word_suffix\": \"\", \"fuse_unk\": false, \"byte_fallback\": false, \"ignore_merges\": false,\n"
          "    \"vocab\": {", f);
    for (uint32_t r = 0; r < (uint32_t)t->num_ranks; r++) {
        fputs(r ? ",\n      " : "\n      ", f);
        json_write_string(f, text, alphabet_encode(&alphabet, t, r, text));
        fprintf(f, ": %u", r);
    }
    fputs("\n    },\n    \"merges\": [", f);
    for (int r = merges_next(t, -1), first = r; r < t->num_ranks; r = merges_next(t, r)) {
        fputs(r > first ? ",\n      " : "\n      ", f);
        json_write_string(f, text, alphabet_merge(&alphabet, t, (uint32_t)r, text));
    }
    fputs("\n    ]\n  }\n}\n", f);
}

// ChatML, the layout of every Qwen chat model: <|im_start|>role\ncontent<|im_end|>\n for each message.
#define CHAT_TEMPLATE "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}" \
                      "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

void tokenizer_write_config(FILE *f, const Tokenizer *t) {
    fputs("{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"added_tokens_decoder\": {", f);
    tokenizer_write_added(f, t, true);
    fputs("\n  },\n  \"bos_token\": null,\n", f);
    fprintf(f, "  \"eos_token\": %s,\n", t->im_end >= 0 ? "\"<|im_end|>\"" : "null");
    fprintf(f, "  \"pad_token\": %s,\n", t->endoftext >= 0 ? "\"<|endoftext|>\"" : "null");
    fputs("  \"unk_token\": null,\n  \"clean_up_tokenization_spaces\": false,\n  \"model_max_length\": 131072,\n  \"chat_template\": ", f);
    json_write_string(f, CHAT_TEMPLATE, strlen(CHAT_TEMPLATE));
    fputs("\n}\n", f);
}

// tokenizer.json and tokenizer_config.json for transformers, vLLM and llama.cpp's converter; the directory is made if it isn't there.
void tokenizer_save_hf(const Tokenizer *t, const char *directory) {
    char path[4096];
    CHECK(mkdir(directory, 0777) == 0 || errno == EEXIST, "cannot make the directory %s: %s", directory, strerror(errno));
    tokenizer_path(path, directory, "tokenizer.json");
    AtomicFile a = open_atomic(path);
    tokenizer_write_json(a.file, t);
    close_atomic(&a);
    tokenizer_path(path, directory, "tokenizer_config.json");
    a = open_atomic(path);
    tokenizer_write_config(a.file, t);
    close_atomic(&a);
}

// A smaller vocabulary: the tokens with used[rank] != 0, all single bytes, and all that is needed to merge up to a kept token, numbered
// anew in the old order; then <|endoftext|>, <|im_start|>, <|im_end|>. A text whose tokens are all kept is cut at the same places: merges
// happen in the same order, and a merge that is gone would have made a token that isn't there. Any other text still encodes without loss.
Tokenizer *tokenizer_trim(const Tokenizer *t, const unsigned char *used) {
    unsigned char *keep = (unsigned char *)xcalloc((size_t)t->num_ranks, 1);
    for (int r = t->num_ranks - 1; r >= 0; r--) {    // parts have lower ranks than the whole
        if (t->parts[r][0] == NO_TOKEN) keep[r] = 1;
        else if (used[r] || keep[r]) keep[r] = keep[t->parts[r][0]] = keep[t->parts[r][1]] = 1;
    }
    Tokenizer *small = tokenizer_new();
    for (int r = 0; r < t->num_ranks; r++) {
        if (keep[r]) tokenizer_add(small, t->bytes + t->start[r], t->start[r + 1] - t->start[r], "trimmed vocabulary");
    }
    free(keep);
    tokenizer_finish(small, "trimmed vocabulary");
    tokenizer_use_specials(small, "qwen2");
    return small;
}

#endif

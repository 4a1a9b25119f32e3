// Tests of tokenizer.h, from the repository root:
//   cc -std=c11 -O2 -Wall -Wextra -o test_tokenizer dev/test/test_tokenizer.c -lm && ./test_tokenizer
// The expected ids, pieces and normal forms in tokenizer_*.tsv come from tiktoken and Hugging Face's tokenizers
// (make_tokenizer_vectors.py).
#define QWEN_NO_MAIN
#include "../../train_qwen.c"
#include "test.h"
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>

#define VOCABULARY "dev/data/qwen.bin"

// ---------------------------------------------------------------------------------------------------------------------------------
// A group is many comparisons with one line of output; the first few that fail are printed in full.

static int group_done, group_bad;

void expect(bool ok, const char *format, ...) {
    group_done++;
    if (ok || group_bad++ >= 5) return;
    va_list arguments;
    va_start(arguments, format);
    printf("     ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
}

void group_end(const char *what) {
    check(group_bad == 0 && group_done > 0, "%-60s %6d compared, %d wrong", what, group_done, group_bad);
    group_done = group_bad = 0;
}

// xorshift64*: the same texts in every run
static uint64_t random_state = 1;
uint32_t random_below(uint32_t n) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)((random_state * 0x2545F4914F6CDD1Du >> 32) % n);
}

typedef struct { char *data; size_t len, room; } Text;

void text_add(Text *text, const char *data, size_t len) {
    if (text->len + len + 1 > text->room) {
        text->room = 2 * (text->len + len + 1);
        text->data = (char *)xrealloc(text->data, text->room);
    }
    if (len > 0) memcpy(text->data + text->len, data, len);
    text->len += len;
    text->data[text->len] = 0;
}

bool text_equal(Text a, const char *data, size_t len) { return a.len == len && (len == 0 || memcmp(a.data, data, len) == 0); }

// A JSON string literal; with bytes, \udcXX stands for the byte XX (Python's surrogateescape).
Text text_of_json(const char *literal, bool bytes) {
    Text text = { NULL, 0, 0 }, part = { NULL, 0, 0 };
    text_add(&text, "", 0);
    for (const char *p = literal, *next; *p; p = next) {
        next = bytes ? strstr(p, "\\udc") : NULL;
        size_t n = next ? (size_t)(next - p) : strlen(p);
        part.len = 0;
        if (p > literal) text_add(&part, "\"", 1);
        text_add(&part, p, n);
        if (next) text_add(&part, "\"", 1);
        JsonError error;
        Json *json = json_parse(part.data, part.len, &error);
        CHECK(json != NULL, "fixture %s: %s", literal, error.message);
        text_add(&text, json->text, json->len);
        json_free(json);
        if (!next) break;
        char digits[3] = { next[4], next[5], 0 }, byte = (char)strtol(digits, NULL, 16);
        text_add(&text, &byte, 1);
        next += 6;
    }
    free(part.data);
    return text;
}

// A table of tab-separated columns without its first line.
typedef struct { char *data; char *(*rows)[10]; int count; } Table;

Table table_read(const char *path) {
    Table table = { read_file(path, NULL), NULL, 0 };
    char *line = strchr(table.data, '\n') + 1;
    for (char *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        *end = 0;
        table.rows = (char *(*)[10])xrealloc(table.rows, (size_t)(table.count + 1) * sizeof(*table.rows));
        char **row = table.rows[table.count++];
        for (int i = 0; i < 10; i++) row[i] = NULL;
        for (int i = 0; i < 10; i++) {
            row[i] = line;
            line = strchr(line, '\t');
            if (!line) break;
            *line++ = 0;
        }
    }
    return table;
}

void table_free(Table *table) {
    free(table->rows);
    free(table->data);
}

TokenList ids_of_text(const char *text) {
    TokenList list = { NULL, 0, 0 };
    char *end;
    for (;; text = end) {
        unsigned long id = strtoul(text, &end, 10);
        if (end == text) return list;
        token_list_push(&list, (uint32_t)id);
    }
}

TokenList encode(const Tokenizer *t, const char *data, size_t len, int mode) {
    TokenList list = { NULL, 0, 0 };
    tokenizer_encode(t, data, len, mode, &list);
    return list;
}

bool ids_equal(TokenList a, TokenList b) {
    return a.count == b.count && (a.count == 0 || memcmp(a.ids, b.ids, a.count * sizeof(uint32_t)) == 0);
}

Text decode(const Tokenizer *t, TokenList ids) {
    Text text = { NULL, 0, 0 };
    text_add(&text, "", 0);
    for (size_t i = 0; i < ids.count; i++) {
        size_t len;
        const char *bytes = tokenizer_bytes(t, ids.ids[i], &len);
        text_add(&text, bytes, len);
    }
    return text;
}

// FIPS 180-4, for the fixtures whose ids are too many to list.
void sha256(const unsigned char *data, size_t len, char hex[65]) {
    uint32_t h[8], k[64], w[64];
    for (int i = 0, n = 2, found = 0; found < 64; n++) {    // fractional bits of the square and cube roots of the first primes
        bool prime = true;
        for (int d = 2; d * d <= n; d++) prime &= n % d != 0;
        if (!prime) continue;
        if (found < 8) h[found] = (uint32_t)(uint64_t)(fmodl(sqrtl(n), 1) * 4294967296.0L);
        k[found++] = (uint32_t)(uint64_t)(fmodl(cbrtl(n), 1) * 4294967296.0L);
        i++;
    }
    size_t total = (len + 9 + 63) / 64 * 64;
    for (size_t block = 0; block < total; block += 64) {
        for (int i = 0; i < 64; i++) {
            size_t at = block + (size_t)i;
            uint64_t bits = at >= total - 8 ? (uint64_t)len * 8 >> 8 * (total - 1 - at) : 0;
            w[i / 4] = w[i / 4] << 8 | (at < len ? data[at] : at == len ? 0x80 : (uint32_t)(bits & 255));
        }
        #define ROTATE(x, n) ((x) >> (n) | (x) << (32 - (n)))
        for (int i = 16; i < 64; i++) {
            uint32_t a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + w[i - 7] + (ROTATE(a, 7) ^ ROTATE(a, 18) ^ a >> 3) + (ROTATE(b, 17) ^ ROTATE(b, 19) ^ b >> 10);
        }
        uint32_t s[8];
        memcpy(s, h, sizeof(s));
        for (int i = 0; i < 64; i++) {
            uint32_t t1 = s[7] + (ROTATE(s[4], 6) ^ ROTATE(s[4], 11) ^ ROTATE(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
            uint32_t t2 = (ROTATE(s[0], 2) ^ ROTATE(s[0], 13) ^ ROTATE(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
            memmove(s + 1, s, 7 * sizeof(s[0]));
            s[0] = t1 + t2;
            s[4] += t1;
        }
        for (int i = 0; i < 8; i++) h[i] += s[i];
    }
    for (int i = 0; i < 8; i++) snprintf(hex + 8 * i, 9, "%08x", h[i]);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// JSON

void test_json_good(void) {
    JsonError error;
    const char *text = "\xEF\xBB\xBF {\"a\": [1, -0.5e+2, true, false, null, \"x\\u0000\\ud83d\\ude00\\n\\/\"], \"b\": {}, "
                       "\"a\\u00e9\": 9007199254740993, \"b\": []}\r\n";
    Json *json = json_parse(text, strlen(text), &error);
    expect(json != NULL, "%s at %zu", error.message, error.position);
    if (!json) return;
    const Json *a = json_get(json, "a");
    expect(a && a->type == JSON_ARRAY, "a is an array");
    double numbers[2] = { 1, -50 };
    const Json *element = a->child;
    for (int i = 0; i < 2; i++, element = element->next) {
        expect(element->type == JSON_NUMBER && element->number == numbers[i], "number %d", i);
    }
    JsonType types[3] = { JSON_TRUE, JSON_FALSE, JSON_NULL };
    for (int i = 0; i < 3; i++, element = element->next) expect(element->type == types[i], "word %d", i);
    expect(element->len == 8 && memcmp(element->text, "x\0\xF0\x9F\x98\x80\n/", 9) == 0, "string: %zu bytes", element->len);
    expect(element->next == NULL, "array ends");
    const Json *b = json_get(json, "b"), *large = json_get(json, "a\xC3\xA9");
    expect(b && b->type == JSON_ARRAY, "the last of equal keys counts");
    expect(large && strcmp(large->text, "9007199254740993") == 0 && large->len == 16, "text of a large number");
    expect(json_get(json, "c") == NULL && json_get(a, "x") == NULL && json_get(NULL, "x") == NULL, "absent keys");
    for (size_t n = 0; n < strlen(text) - 2; n++) {    // every truncation, in a buffer of that size, so that a sanitizer sees any over-read
        char *cut = (char *)xmalloc(n);
        memcpy(cut, text, n);
        Json *part = json_parse(cut, n, &error);
        expect(part == NULL && error.message && error.position <= n, "a document cut at byte %zu must not parse", n);
        json_free(part);
        free(cut);
    }
    for (int i = 0; i < 20000; i++) {                  // random damage must not crash
        char damaged[200];
        size_t n = strlen(text);
        memcpy(damaged, text, n);
        for (int k = 0; k < 2; k++) {
            char c = random_below(2) ? (char)random_below(256) : "{}[]\",:\\u0e-"[random_below(12)];
            damaged[random_below((uint32_t)n)] = c;
        }
        json_free(json_parse(damaged, n, &error));
    }
    json_free(json);
    static const char *const good[] = {
        "0", "-0", "1E9", "1e-400", "\"\"", "[]", " [ ] ", "[[],{}]", "\"\\u20AC\\b\\f\\r\\t\\\"\\\\\"", "\"\x7F\"", "true",
    };
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        Json *one = json_parse(good[i], strlen(good[i]), &error);
        expect(one != NULL, "%s: %s", good[i], error.message);
        json_free(one);
    }
    group_end("JSON: documents, truncations, damage");
}

void test_json_bad(void) {
    static const char *const bad[][2] = {
        { "", "a value" }, { " ", "a value" }, { "-", "a value" }, { "+1", "a value" }, { ".5", "a value" }, { "NaN", "a value" },
        { "Infinity", "a value" }, { "tru", "a value" }, { "True", "a value" }, { "[1,]", "a value" }, { "[", "a value" },
        { "]", "a value" }, { "{\"a\":}", "a value" }, { "'a'", "a value" },
        { "// x\n1", "a value" }, { "\xEF\xBB", "a value" }, { "\xEF\xBB\xBF", "a value" },
        { "01", "text after" }, { "0x10", "text after" }, { "nulll", "text after" }, { "[1]]", "text after" }, { "1 2", "text after" },
        { "1\xEF\xBB\xBF", "text after" }, { "1.", "after the point" }, { "1.e3", "after the point" },
        { "1e", "exponent" }, { "1e+", "exponent" },
        { "[1 2]", "expected ','" }, { "{", "key" }, { "{1:2}", "key" }, { "{\"a\":1,}", "key" },
        { "{\"a\"}", "':'" }, { "{\"a\":1", "'}'" },
        { "\"", "without an end" }, { "\"\\", "without an end" }, { "\"\\\"", "without an end" },
        { "\"\\x\"", "escape" }, { "\"\\u12\"", "four hex" }, { "\"\\u12g4\"", "four hex" }, { "\"\\ud800\"", "lone surrogate" },
        { "\"\\ud800x\"", "lone surrogate" }, { "\"\\udc00\"", "lone surrogate" }, { "\"\\ud800\\u0041\"", "lone surrogate" },
        { "\"\\ud800\\ud800\"", "lone surrogate" }, { "\"\n\"", "control character" }, { "\"\t\"", "control character" },
        { "\"\xFF\"", "invalid UTF-8" }, { "\"\xC0\x80\"", "invalid UTF-8" }, { "\"\xED\xA0\x80\"", "invalid UTF-8" },
        { "\"\xE4\xBD\"", "invalid UTF-8" }, { "\"\xF4\x90\x80\x80\"", "invalid UTF-8" },
    };
    JsonError error;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        Json *json = json_parse(bad[i][0], strlen(bad[i][0]), &error);
        const char *message = json ? "no error" : error.message;
        expect(json == NULL && strstr(message, bad[i][1]), "%s: got '%s', expected '%s'", bad[i][0], message, bad[i][1]);
        json_free(json);
    }
    expect(json_parse("1\0", 2, &error) == NULL && error.position == 1, "a NUL after the value is text after the value");
    size_t n = 1000000;
    char *deep = (char *)xmalloc(n);
    memset(deep, '[', n);
    expect(json_parse(deep, n, &error) == NULL && strstr(error.message, "nested"), "a million '['");
    memset(deep + 256, ']', 256);
    Json *json = json_parse(deep, 512, &error);
    expect(json != NULL, "256 levels: %s", error.message);
    json_free(json);
    memset(deep, '[', 257);
    memset(deep + 257, ']', 257);
    expect(json_parse(deep, 514, &error) == NULL, "257 levels");
    free(deep);
    group_end("JSON: everything else is refused, with the reason");
}

void test_json_write(void) {
    char *written = NULL;
    size_t size;
    JsonError error;
    char all[300];
    for (int i = 0; i < 128; i++) all[i] = (char)i;
    memcpy(all + 128, "\xE4\xBD\xA0\xF0\x9F\x98\x80\xFF\xE4\xBD", 10);
    FILE *f = open_memstream(&written, &size);
    json_write_string(f, all, 138);
    fclose(f);
    Json *json = json_parse(written, size, &error);
    expect(json && json->len == 128 + 7 + 6 && memcmp(json->text, all, 135) == 0, "round trip of a string");
    expect(json && memcmp(json->text + 135, "\xEF\xBF\xBD\xEF\xBF\xBD", 6) == 0, "invalid bytes become U+FFFD");
    json_free(json);
    free(written);
    group_end("JSON: written strings read back");
}

// ---------------------------------------------------------------------------------------------------------------------------------
// UTF-8, NFC, split

void test_utf8(void) {
    char out[4];
    for (uint32_t c = 0; c < 0x110000; c += c < 0x3000 ? 1 : 37) {
        uint32_t back = 0;
        if (c >= 0xD800 && c < 0xE000) continue;
        int n = utf8_encode(c, out);
        expect(utf8_decode(out, (size_t)n, &back) == n && back == c, "U+%04X", c);
        for (int cut = 1; cut < n; cut++) {
            expect(utf8_decode(out, (size_t)cut, &back) == -cut && back == REPLACEMENT, "U+%04X cut at %d", c, cut);
        }
    }
    static const struct { const char *bytes; int skipped; } bad[] = {
        { "\x80", 1 }, { "\xC0\x80", 1 }, { "\xC1\xBF", 1 }, { "\xE0\x80\x80", 1 }, { "\xED\xA0\x80", 1 }, { "\xF0\x8F\xBF\xBF", 1 },
        { "\xFF", 1 },
        { "\xF4\x90\x80\x80", 1 }, { "\xF5\x80\x80\x80", 1 }, { "\xE4\xBD" "A", 2 }, { "\xF0\x9F\x98" "A", 3 }, { "\xC3" "A", 1 },
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        uint32_t c;
        int n = utf8_decode(bad[i].bytes, strlen(bad[i].bytes), &c);
        expect(n == -bad[i].skipped && c == REPLACEMENT, "invalid sequence %zu: skips %d, expected %d", i, -n, bad[i].skipped);
    }
    group_end("UTF-8: decode, encode, maximal subparts");
}

void test_stream(const Tokenizer *t) {
    Table table = table_read("dev/test/tokenizer_decode.tsv");
    JsonError error;
    for (int r = 0; r < table.count; r++) {
        char **row = table.rows[r], out[3 * 256 + 3];
        TokenList ids = ids_of_text(row[1]);
        Json *steps = json_parse(row[3], strlen(row[3]), &error), *flush = json_parse(row[4], strlen(row[4]), &error);
        CHECK(steps && flush, "fixture %s", row[0]);
        Utf8Stream stream = { { 0 }, 0 };
        const Json *step = steps->child;
        Text bytes = decode(t, ids);
        for (size_t i = 0; i < bytes.len; i++) {
            char hex[3];
            snprintf(hex, 3, "%02x", (unsigned char)bytes.data[i]);
            expect(memcmp(hex, row[2] + 2 * i, 2) == 0, "%s: byte %zu", row[0], i);
        }
        for (size_t i = 0; i < ids.count && step; i++, step = step->next) {
            size_t len, n;
            const char *token = tokenizer_bytes(t, ids.ids[i], &len);
            n = utf8_stream(&stream, token, len, out);
            bool same = n == step->len && memcmp(out, step->text, n) == 0;
            expect(same, "%s: step %zu gives %zu bytes, expected '%s'", row[0], i, n, step->text);
        }
        size_t n = utf8_stream_flush(&stream, out);
        expect(n == flush->len && memcmp(out, flush->text, n) == 0 && step == NULL, "%s: flush", row[0]);
        json_free(steps);
        json_free(flush);
        free(ids.ids);
        free(bytes.data);
    }
    table_free(&table);
    for (int round = 0; round < 3000; round++) {    // any bytes in any portions: the same as replacing them in one go
        char bytes[64], out[3 * 64 + 3];
        Text streamed = { NULL, 0, 0 }, replaced = { NULL, 0, 0 };
        size_t len = random_below(64), n;
        for (size_t i = 0; i < len; i++) {
            bytes[i] = random_below(2) ? (char)random_below(256) : "\xE4\xBD\xA0\xF0\x9F\x98\x80" "a"[random_below(8)];
        }
        Utf8Stream stream = { { 0 }, 0 };
        for (size_t at = 0; at < len; at += n) {
            n = 1 + random_below((uint32_t)(len - at));
            text_add(&streamed, out, utf8_stream(&stream, bytes + at, n, out));
        }
        text_add(&streamed, out, utf8_stream_flush(&stream, out));
        for (size_t at = 0; at < len;) {
            uint32_t c;
            int used = utf8_decode(bytes + at, len - at, &c);
            text_add(&replaced, out, (size_t)utf8_encode(c, out));
            at += (size_t)(used < 0 ? -used : used);
        }
        expect(text_equal(streamed, replaced.data, replaced.len), "streaming differs from replacing, round %d", round);
        free(streamed.data);
        free(replaced.data);
    }
    group_end("streaming decode: only whole characters");
}

// NFC of text, which is freed.
Text normalized(Text text) {
    size_t len = text.len;
    char *copy = nfc_normalize(text.data, text.len, &len);
    if (!copy) return text;
    free(text.data);
    Text result = { copy, len, len };
    return result;
}

void test_nfc(void) {
    Table table = table_read("dev/test/tokenizer_nfc.tsv");
    Text all = { NULL, 0, 0 }, all_expected = { NULL, 0, 0 };
    for (int r = 0; r < table.count; r++) {
        Text text = text_of_json(table.rows[r][0], false), expected = text_of_json(table.rows[r][1], false);
        text_add(&all, text.data, text.len);
        text_add(&all, "\n", 1);
        text_add(&all_expected, expected.data, expected.len);
        text_add(&all_expected, "\n", 1);
        text = normalized(text);
        expect(text_equal(text, expected.data, expected.len), "NFC of %s: got %s", table.rows[r][0], text.data);
        text = normalized(text);
        expect(text_equal(text, expected.data, expected.len), "NFC of the NFC of %s", table.rows[r][0]);
        free(text.data);
        free(expected.data);
    }
    all = normalized(all);
    expect(text_equal(all, all_expected.data, all_expected.len), "NFC of all rows as one text");
    free(all.data);
    free(all_expected.data);
    table_free(&table);
    group_end("NFC as in Hugging Face tokenizers");
}

void test_pieces(void) {
    Table table = table_read("dev/test/tokenizer_pieces.tsv");
    JsonError error;
    for (int r = 0; r < table.count; r++) {
        Text text = text_of_json(table.rows[r][0], false);
        Json *pieces = json_parse(table.rows[r][1], strlen(table.rows[r][1]), &error);
        const Json *piece = pieces->child;
        size_t at = 0, next;
        for (; at < text.len; at = next) {
            next = split_next(NULL, text.data, at, text.len);
            bool same = piece && piece->len == next - at && memcmp(piece->text, text.data + at, next - at) == 0;
            expect(same, "%s: piece '%.*s', expected '%s'", table.rows[r][0], (int)(next - at), text.data + at,
                   piece ? piece->text : "(end)");
            if (!same) break;
            piece = piece->next;
        }
        expect(at >= text.len && piece == NULL, "%s: number of pieces", table.rows[r][0]);
        json_free(pieces);
        free(text.data);
    }
    table_free(&table);
    group_end("splitter: the borders of pieces");
}

// ---------------------------------------------------------------------------------------------------------------------------------
// encode

void test_vectors(const Tokenizer *t, const char *mode, int parse_specials) {
    Table table = table_read("dev/test/tokenizer_vectors.tsv");
    char what[64];
    for (int r = 0; r < table.count; r++) {
        char **row = table.rows[r];
        if (strcmp(row[4], mode) != 0) continue;
        Text text = text_of_json(row[1], strcmp(mode, "bytes") == 0);
        char *exact = (char *)xmalloc(text.len);    // without a NUL after it: reading over the end is an error under a sanitizer
        memcpy(exact, text.data, text.len);
        TokenList expected = ids_of_text(row[2]), got = encode(t, exact, text.len, parse_specials);
        size_t i = 0;
        while (i < got.count && i < expected.count && got.ids[i] == expected.ids[i]) i++;
        expect(ids_equal(got, expected), "%s %s (%s): token %zu", row[0], row[1], row[3], i);
        free(exact);
        free(text.data);
        free(expected.ids);
        free(got.ids);
    }
    table_free(&table);
    snprintf(what, sizeof(what), "vectors: %s", mode);
    group_end(what);
}

void test_long(const Tokenizer *t) {
    Table table = table_read("dev/test/tokenizer_long.tsv");
    double slowest = 0;
    for (int r = 0; r < table.count; r++) {
        char **row = table.rows[r], hex[65];
        Text unit = text_of_json(row[1], false), suffix = text_of_json(row[3], false), text = { NULL, 0, 0 };
        for (int i = 0; i < atoi(row[2]); i++) text_add(&text, unit.data, unit.len);
        text_add(&text, suffix.data, suffix.len);
        clock_t start = clock();
        TokenList ids = encode(t, text.data, text.len, SPECIALS_AS_TEXT);
        double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
        if (seconds > slowest) slowest = seconds;
        unsigned char *bytes = (unsigned char *)xmalloc(4 * ids.count);
        for (size_t i = 0; i < 4 * ids.count; i++) bytes[i] = (unsigned char)(ids.ids[i / 4] >> 8 * (i % 4));
        sha256(bytes, 4 * ids.count, hex);
        expect(ids.count == strtoul(row[4], NULL, 10), "%s (%s): %zu ids, expected %s", row[0], row[8], ids.count, row[4]);
        expect(strcmp(hex, row[5]) == 0, "%s (%s): SHA-256 of the ids %s, expected %s", row[0], row[8], hex, row[5]);
        expect(seconds < 30, "%s (%s): %.1f s", row[0], row[8], seconds);
        free(bytes);
        free(ids.ids);
        free(unit.data);
        free(suffix.data);
        free(text.data);
    }
    table_free(&table);
    printf("     slowest long text: %.2f s\n", slowest);
    group_end("long runs: right, and not quadratic");
}

// Scraps of many kinds; random texts are made of them.
static const char *const scraps[] = {
    "中", "国", "的", "人工智能", "，", "。\n", "“", "模型训练", "北京大学", "\xF0\xA0\x80\x80", "龘", " the", " of", "tokenizer", "Hello",
    "'s", "'LL", "don't",
    " ", "  ", "   ", "\n", "\r\n", "\t", "\xE3\x80\x80", "\xC2\xA0", "0", "42", "１０", "½", "->", "==", "    return x;\n",
    "for (int i = 0; i < n; i++) {",
    "e\xCC\x81", "\xCC\x81", "q\xCC\x87\xCC\xA3", "\xE1\x84\x92\xE1\x85\xA1\xE1\x86\xAB", "😀", "👨‍👩‍👧", "ที่", "नमस्ते", "مرحبا", "Привет",
    "<|im_end|>", "<|im_start|>user\n", "<think>", "<|", "|>", "\xE2\x84\xAB", "\xC5\xBF", "\xEF\xBF\xBD",
};
#define NUM_SCRAPS (sizeof(scraps) / sizeof(scraps[0]))

Text random_text(size_t num_scraps, bool bad_bytes) {
    Text text = { NULL, 0, 0 };
    char bytes[4];
    text_add(&text, "", 0);
    for (size_t i = 0; i < num_scraps; i++) {
        const char *scrap = scraps[random_below(NUM_SCRAPS)];
        uint32_t c = random_below(0x33000);
        if (random_below(4)) text_add(&text, scrap, strlen(scrap));
        else if (bad_bytes) text_add(&text, bytes, (bytes[0] = (char)random_below(256), 1));
        else if (c < 0xD800 || c >= 0xE000) text_add(&text, bytes, (size_t)utf8_encode(c, bytes));
    }
    return text;
}

void test_round_trip(const Tokenizer *t, const char *what) {
    for (int round = 0; round < 4000; round++) {
        Text text = random_text(random_below(40), round % 2);
        char *exact = (char *)xmalloc(text.len);
        memcpy(exact, text.data, text.len);
        TokenList ids = encode(t, exact, text.len, SPECIALS_AS_TEXT), parsed = encode(t, exact, text.len, SPECIALS_PARSED);
        free(exact);
        text = normalized(text);
        Text back = decode(t, ids);
        expect(text_equal(back, text.data, text.len), "decode(encode(x)) is not NFC(x): %s", text.data);
        bool ordinary = true;
        for (size_t i = 0; i < ids.count; i++) ordinary &= ids.ids[i] < (uint32_t)t->num_ranks;
        expect(ordinary, "a special id in plain text: %s", text.data);
        for (size_t i = 0; i < parsed.count; i++) expect(parsed.ids[i] < (uint32_t)t->vocab_size, "id %u", parsed.ids[i]);
        free(text.data);
        free(back.data);
        free(ids.ids);
        free(parsed.ids);
    }
    group_end(what);
}

void test_specials(void) {
    static const struct { const char *set; int count, last_id; const char *text; } sets[5] = {
        { "none", 0, 0, "" }, { "qwen2", 3, 151645, "<|im_end|>" }, { "qwen2.5", 22, 151664, "<|file_sep|>" },
        { "qwen3", 26, 151668, "</think>" }, { "v1", 208, 151850, "<|extra_204|>" } };
    Tokenizer *t = tokenizer_load(VOCABULARY);
    expect(strcmp(t->special_set, "qwen2.5") == 0 && t->vocab_size == 151665, "the default set is qwen2.5");
    expect(t->num_ranks == 151643 && t->longest == 128, "151,643 ranks, the longest has 128 bytes");
    for (int i = 0; i < 5; i++) {
        size_t len;
        tokenizer_use_specials(t, sets[i].set);
        expect(strcmp(t->special_set, sets[i].set) == 0, "%s, not %s", t->special_set, sets[i].set);
        expect(t->vocab_size == 151643 + sets[i].count, "%s: %d ids", sets[i].set, t->vocab_size);
        bool first_three = t->im_end == (i ? 151645 : -1) && t->im_start == (i ? 151644 : -1) && t->endoftext == (i ? 151643 : -1);
        expect(first_three, "%s: ids of the first three", sets[i].set);
        if (i > 0) {
            const char *text = tokenizer_bytes(t, (uint32_t)sets[i].last_id, &len);
            expect(len == strlen(sets[i].text) && strcmp(text, sets[i].text) == 0, "%s: the last is %s", sets[i].set, text);
            TokenList ids = encode(t, text, len, SPECIALS_PARSED), plain = encode(t, text, len, SPECIALS_AS_TEXT);
            expect(ids.count == 1 && ids.ids[0] == (uint32_t)sets[i].last_id, "%s: %s is parsed", sets[i].set, text);
            expect(plain.count > 1, "%s: %s is text", sets[i].set, text);
            free(ids.ids);
            free(plain.ids);
        }
        tokenizer_bytes(t, (uint32_t)t->vocab_size, &len);
        expect(len == 0, "%s: no token after the last", sets[i].set);
        tokenizer_bytes(t, UINT32_MAX, &len);
        expect(len == 0, "%s: no token at 2^32 - 1", sets[i].set);
    }
    TokenList list = { NULL, 0, 0 };
    tokenizer_encode(t, "a", 1, SPECIALS_AS_TEXT, &list);
    tokenizer_encode(t, "b", 1, SPECIALS_AS_TEXT, &list);
    tokenizer_encode(t, "", 0, SPECIALS_PARSED, &list);
    expect(list.count == 2 && list.ids[0] == 64 && list.ids[1] == 65, "encode appends");
    free(list.ids);
    tokenizer_free(t);
    group_end("special tokens: sets, ids, text by default");
}

// Every ordinary token of several bytes encodes to itself by merging alone, from exactly two parts.
void test_vocabulary(const Tokenizer *t) {
    BpeWork work = { NULL, NULL, 0, 0 };
    TokenList ids = { NULL, 0, 0 };
    for (int r = 0; r < t->num_ranks; r++) {
        size_t len;
        const char *bytes = tokenizer_bytes(t, (uint32_t)r, &len);
        ids.count = 0;
        bpe_merge(t, bytes, len, &work, &ids);
        expect(ids.count == 1 && ids.ids[0] == (uint32_t)r && token_find(t, bytes, len) == (uint32_t)r, "token %d", r);
    }
    free(ids.ids);
    bpe_free(&work);
    group_end("every token encodes to itself");
}

// The rule as tiktoken has it, without any shortcut: merge the two neighbours that together are the token of the lowest rank, the first of
// equals. The parts of piece are piece[cut[i]..cut[i + 1]).
void rule_encode(const Tokenizer *t, const char *piece, size_t len, TokenList *out) {
    size_t *cut = (size_t *)xmalloc((len + 1) * sizeof(size_t)), parts = len;
    for (size_t i = 0; i <= len; i++) cut[i] = i;
    for (;;) {
        uint32_t lowest = NO_TOKEN;
        size_t at = 0;
        for (size_t i = 0; i + 1 < parts; i++) {
            uint32_t rank = token_find(t, piece + cut[i], cut[i + 2] - cut[i]);
            if (rank < lowest) lowest = rank, at = i;
        }
        if (lowest == NO_TOKEN) break;
        memmove(cut + at + 1, cut + at + 2, (parts - at - 1) * sizeof(size_t));
        parts--;
    }
    for (size_t i = 0; i < parts; i++) token_list_push(out, token_find(t, piece + cut[i], cut[i + 1] - cut[i]));
    free(cut);
}

void expect_rule(const Tokenizer *t, Text text) {
    TokenList expected = { NULL, 0, 0 }, got = encode(t, text.data, text.len, SPECIALS_AS_TEXT);
    text = normalized(text);
    for (size_t at = 0, next; at < text.len; at = next) {
        next = split_next(NULL, text.data, at, text.len);
        rule_encode(t, text.data + at, next - at, &expected);
    }
    size_t i = 0;
    while (i < got.count && i < expected.count && got.ids[i] == expected.ids[i]) i++;
    expect(ids_equal(got, expected), "'%s' of %d ranks: token %zu is %u, by the rule %u", text.data, t->num_ranks, i,
           i < got.count ? got.ids[i] : NO_TOKEN, i < expected.count ? expected.ids[i] : NO_TOKEN);
    free(text.data);
    free(expected.ids);
    free(got.ids);
}

// A token of the list, its first and last character completed by random bytes if it has only a part of them.
void add_completed(Text *text, const Tokenizer *t, uint32_t id) {
    size_t len;
    const char *bytes = tokenizer_bytes(t, id, &len);
    size_t continued = 0, last = len;
    while (continued < len && ((unsigned char)bytes[continued] & 0xC0) == 0x80) continued++;
    if (continued == 1 || continued == 2) {
        char first[2] = { (char)(0xE3 + random_below(7)), (char)(0x80 + random_below(64)) };
        text_add(text, first, 3 - continued);
    }
    text_add(text, bytes, len);
    while (last > 0 && ((unsigned char)bytes[last - 1] & 0xC0) == 0x80) last--;
    if (last == 0) return;
    for (int missing = utf8_length((unsigned char)bytes[last - 1]) - 1 - (int)(len - last); missing > 0; missing--) {
        char c = (char)(0x80 + random_below(64));
        text_add(text, &c, 1);
    }
}

// full: the vocabulary the tokens are taken from. With the trimmed one in turn, so that the thread's memory of words must not mix them.
void test_rule(const Tokenizer *full, const Tokenizer *small) {
    uint32_t *dense = (uint32_t *)xmalloc((size_t)full->num_ranks * sizeof(uint32_t)), num_dense = 0;    // begin with a Han character
    for (uint32_t r = 0; r < (uint32_t)full->num_ranks; r++) {
        size_t len;
        unsigned char first = (unsigned char)*tokenizer_bytes(full, r, &len);
        if (first >= 0xE4 && first <= 0xE9) dense[num_dense++] = r;
    }
    CHECK(num_dense > 20000, "%u tokens begin with a Han character", num_dense);
    for (int round = 0; round < 30000; round++) {
        Text text = { NULL, 0, 0 };
        text_add(&text, "", 0);
        int kind = round % 3, count = 1 + (int)random_below(5);
        for (int i = 0; i < count; i++) {
            uint32_t any = random_below((uint32_t)full->num_ranks), han = dense[random_below(num_dense)];
            add_completed(&text, full, kind == 0 || (kind == 1 && random_below(4) == 0) ? any : han);
        }
        expect_rule(round % 500 < 400 ? full : small, text);
    }
    for (int r = 0; r < full->num_ranks; r++) {    // every token that is not whole characters, between others
        size_t len;
        const char *bytes = tokenizer_bytes(full, (uint32_t)r, &len);
        uint32_t c;
        bool is_whole = true;
        for (size_t at = 0; at < len && is_whole;) {
            int n = utf8_decode(bytes + at, len - at, &c);
            is_whole = n > 0;
            at += (size_t)n;
        }
        for (int i = 0; i < 8 && !is_whole && len > 1; i++) {
            Text text = { NULL, 0, 0 };
            if (i % 2) add_completed(&text, full, dense[random_below(num_dense)]);
            add_completed(&text, full, (uint32_t)r);
            if (i % 4 > 1) add_completed(&text, full, dense[random_below(num_dense)]);
            expect_rule(full, text);
        }
    }
    for (int round = 0; round < 3000; round++) expect_rule(round % 300 < 150 ? full : small, random_text(random_below(12), round % 2));
    free(dense);
    group_end("the same tokens as the rule gives without shortcuts");
}

// Words of one slot that differ only in their last bytes, or in how many zeros they end with: one must not be taken for the other.
void test_word_cache(const Tokenizer *t) {
    typedef struct { char text[16]; size_t len; } Short;
    Short *seen = (Short *)xcalloc(1 << WORD_BITS, sizeof(Short));
    int collisions[2] = { 0, 0 };
    for (uint32_t i = 0; i < 400000; i++) {
        Short word = { "abcdefgh", 11 };
        bool is_zeros = i >= 10000;
        if (is_zeros) {
            memset(word.text, 0, 16);
            word.len = 4 + i % 12;
            for (uint32_t j = 0, rest = i / 12; j < 4; j++, rest /= 15) word.text[j] = (char)('!' + rest % 15);
        } else {
            for (uint32_t j = 8, rest = i; j < 11; j++, rest /= 26) word.text[j] = (char)('a' + rest % 26);
        }
        Short *slot = &seen[word_hash(word_key(word.text, word.len, 16), word.len) >> (64 - WORD_BITS)], both[2] = { *slot, word };
        *slot = word;
        if (memcmp(both[0].text, word.text, is_zeros ? 4 : 8) != 0 || collisions[is_zeros]++ > 50) continue;
        for (int k = 0; k < 2; k++) {
            Text text = { NULL, 0, 0 };
            text_add(&text, both[k].text, both[k].len);
            expect_rule(t, text);
        }
    }
    expect(collisions[0] > 10 && collisions[1] > 3, "%d and %d collisions", collisions[0], collisions[1]);
    free(seen);
    group_end("words that share a slot of the thread's memory");
}

// The shortcuts are taken: Chinese is cut into words, and letters of ASCII are not.
void test_words(const Tokenizer *t) {
    static const char *const texts[2] = { "我们在北京大学研究生命起源和中华人民共和国的历史", " international" };
    int pieces[2] = { 0, 0 }, words[2] = { 0, 0 };
    for (int i = 0; i < 2; i++) {
        size_t len = strlen(texts[i]);
        for (size_t at = 0; at < len; pieces[i]++) at = split_next(NULL, texts[i], at, len);
        for (size_t at = 0; at < len; words[i]++) at = split_next(&t->borders, texts[i], at, len);
    }
    expect(pieces[0] == 1 && words[0] >= 5, "%d piece of Chinese, %d words", pieces[0], words[0]);
    expect(pieces[1] == 1 && words[1] == 1, "%d piece of English, %d words", pieces[1], words[1]);
    for (uint32_t c = 0; c < 0x110000; c++) {    // the class of a first byte is that of all its characters
        char text[4];
        if (c >= 0xD800 && c < 0xE000) continue;
        utf8_encode(c, text);
        int bits = unicode_first[(unsigned char)text[0]], length;
        expect(bits == UNICODE_MIXED || bits == unicode_bits(c), "U+%04X: %d by its first byte, %d", c, bits, unicode_bits(c));
        expect((int)split_class(text, &length) == (unicode_bits(c) & 3) && length == utf8_length((unsigned char)text[0]), "U+%04X", c);
    }
    group_end("words of a piece, classes by the first byte");
}

// ---------------------------------------------------------------------------------------------------------------------------------
// threads

typedef struct { const Tokenizer *t; TokenList ids; Text text; } ThreadWork;

void *thread_encode(void *argument) {
    ThreadWork *work = (ThreadWork *)argument;
    for (int i = 0; i < 20; i++) {
        work->ids.count = 0;
        tokenizer_encode(work->t, work->text.data, work->text.len, SPECIALS_PARSED, &work->ids);
    }
    return NULL;
}

void test_threads(const Tokenizer *t) {
    pthread_t threads[4];
    ThreadWork works[4];
    for (int i = 0; i < 4; i++) {
        works[i].t = t;
        works[i].ids = encode(t, "", 0, 0);
        works[i].text = random_text(2000, true);
        CHECK(pthread_create(&threads[i], NULL, thread_encode, &works[i]) == 0, "no thread");
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        TokenList alone = encode(t, works[i].text.data, works[i].text.len, SPECIALS_PARSED);
        expect(ids_equal(alone, works[i].ids), "thread %d", i);
        free(alone.ids);
        free(works[i].ids.ids);
        free(works[i].text.data);
    }
    group_end("four threads share a tokenizer");
}

// ---------------------------------------------------------------------------------------------------------------------------------
// trim

// A vocabulary for about half of the scraps.
Tokenizer *trimmed(const Tokenizer *t) {
    unsigned char *used = (unsigned char *)xcalloc((size_t)t->num_ranks, 1);
    for (size_t i = 0; i < NUM_SCRAPS; i += 2) {
        for (size_t j = 0; j < NUM_SCRAPS; j += 2) {
            Text text = { NULL, 0, 0 };
            text_add(&text, scraps[i], strlen(scraps[i]));
            text_add(&text, scraps[j], strlen(scraps[j]));
            TokenList ids = encode(t, text.data, text.len, SPECIALS_AS_TEXT);
            for (size_t k = 0; k < ids.count; k++) used[ids.ids[k]] = 1;
            free(ids.ids);
            free(text.data);
        }
    }
    Tokenizer *small = tokenizer_trim(t, used);
    int num_used = 0;
    for (int r = 0; r < t->num_ranks; r++) {
        uint32_t id = token_find(small, t->bytes + t->start[r], t->start[r + 1] - t->start[r]);
        if (used[r]) expect(id != NO_TOKEN, "a used token is gone: %d", r);
        num_used += used[r];
    }
    expect(small->num_ranks >= 256 + num_used / 2 && small->num_ranks < 2000, "%d ranks for %d used tokens", small->num_ranks, num_used);
    expect(small->vocab_size == small->num_ranks + 3 && small->endoftext == small->num_ranks && small->im_end == small->num_ranks + 2,
           "three special tokens follow");
    free(used);
    return small;
}

void test_trim(const Tokenizer *t, const Tokenizer *small) {
    int same = 0;
    for (int round = 0; round < 20000; round++) {
        Text text = random_text(1 + random_below(6), false);
        TokenList full = encode(t, text.data, text.len, SPECIALS_AS_TEXT), cut = encode(small, text.data, text.len, SPECIALS_AS_TEXT);
        bool all_kept = true;
        for (size_t i = 0; i < full.count; i++) {
            size_t len;
            const char *bytes = tokenizer_bytes(t, full.ids[i], &len);
            full.ids[i] = token_find(small, bytes, len);
            all_kept &= full.ids[i] != NO_TOKEN;
        }
        if (all_kept) expect(ids_equal(full, cut), "another segmentation of '%s'", text.data);
        same += all_kept;
        Text back = decode(small, cut);
        text = normalized(text);
        expect(text_equal(back, text.data, text.len), "lost something of '%s'", text.data);
        free(back.data);
        free(text.data);
        free(full.ids);
        free(cut.ids);
    }
    expect(same > 1000, "only %d texts of kept tokens", same);
    for (int r = 1; r < small->num_ranks; r++) {
        size_t len, len_before;
        const char *bytes = tokenizer_bytes(small, (uint32_t)r, &len), *before = tokenizer_bytes(small, (uint32_t)r - 1, &len_before);
        expect(token_find(t, bytes, len) > token_find(t, before, len_before), "ranks keep their order: %d", r);
    }
    group_end("trimmed: same segmentation of kept tokens, no loss elsewhere");
}

// ---------------------------------------------------------------------------------------------------------------------------------
// files

static char directory[4096];

char *in_directory(const char *name) {
    static char path[8][4200];
    static int turn;
    turn = (turn + 1) % 8;
    snprintf(path[turn], sizeof(path[turn]), "%s/%s", directory, name);
    return path[turn];
}

void write_bytes(const char *path, const char *data, size_t len) {
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, len, f) == len && fclose(f) == 0, "cannot write %s", path);
}

// The formats that we only read, written from a tokenizer.
void write_tiktoken(const Tokenizer *t, const char *path) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL, "cannot write %s", path);
    for (uint32_t r = 0; r < (uint32_t)t->num_ranks; r++) {
        size_t len;
        const unsigned char *bytes = (const unsigned char *)tokenizer_bytes(t, r, &len);
        for (size_t i = 0; i < len; i += 3) {
            uint32_t three = (uint32_t)bytes[i] << 16 | (i + 1 < len ? (uint32_t)bytes[i + 1] << 8 : 0) | (i + 2 < len ? bytes[i + 2] : 0);
            char third = i + 1 < len ? digits[three >> 6 & 63] : '=', fourth = i + 2 < len ? digits[three & 63] : '=';
            fprintf(f, "%c%c%c%c", digits[three >> 18], digits[three >> 12 & 63], third, fourth);
        }
        fprintf(f, " %u\n", r);
    }
    fclose(f);
}

void write_vocab_and_merges(const Tokenizer *t, const char *folder) {
    char path[4300], text[MERGE_ROOM];
    Alphabet alphabet = alphabet_make();
    mkdir(folder, 0777);
    snprintf(path, sizeof(path), "%s/vocab.json", folder);
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL, "cannot write %s", path);
    for (uint32_t r = (uint32_t)t->num_ranks; r-- > 0;) {    // any order
        fputs(r == (uint32_t)t->num_ranks - 1 ? "{" : ", ", f);
        json_write_string(f, text, alphabet_encode(&alphabet, t, r, text));
        fprintf(f, ": %u", r);
    }
    fputs("}\n", f);
    fclose(f);
    snprintf(path, sizeof(path), "%s/merges.txt", folder);
    f = fopen(path, "wb");
    CHECK(f != NULL, "cannot write %s", path);
    fputs("#version: 0.2\n", f);
    for (int r = merges_next(t, -1); r < t->num_ranks; r = merges_next(t, r)) {
        fprintf(f, "%.*s\n", (int)alphabet_merge(&alphabet, t, (uint32_t)r, text), text);
    }
    fclose(f);
}

void expect_same(const Tokenizer *a, const Tokenizer *b, bool with_specials, const char *what) {
    expect(a->hash == b->hash && a->num_ranks == b->num_ranks, "%s: ordinary tokens", what);
    bool same = strcmp(a->special_set, b->special_set) == 0 && a->vocab_size == b->vocab_size && a->im_end == b->im_end &&
                a->nfc_whole == b->nfc_whole;
    expect(!with_specials || same, "%s: special tokens: %s %d, %s %d", what, a->special_set, a->vocab_size, b->special_set, b->vocab_size);
    for (int i = 0; i < 300; i++) {
        Text text = random_text(random_below(30), true);
        TokenList x = encode(a, text.data, text.len, with_specials), y = encode(b, text.data, text.len, with_specials);
        expect(ids_equal(x, y), "%s: ids of %s", what, text.data);
        free(text.data);
        free(x.ids);
        free(y.ids);
    }
}

void reload(const Tokenizer *t, const char *path, bool with_specials, const char *what) {
    Tokenizer *again = tokenizer_load(path);
    expect_same(t, again, with_specials, what);
    tokenizer_free(again);
}

void test_formats(Tokenizer *t, Tokenizer *small) {
    tokenizer_use_specials(t, "qwen2.5");
    tokenizer_save_bin(t, in_directory("full.bin"));
    size_t size, committed_size;
    char *saved = read_file(in_directory("full.bin"), &size), *committed = read_file(VOCABULARY, &committed_size);
    expect(size == committed_size && memcmp(saved, committed, size) == 0, "a saved .bin is the committed one");
    free(saved);
    free(committed);
    static const char *const sets[4] = { "qwen2.5", "qwen3", "v1", "none" };
    for (int i = 0; i < 4; i++) {
        tokenizer_use_specials(t, sets[i]);
        tokenizer_save_bin(t, in_directory("set.bin"));
        reload(t, in_directory("set.bin"), true, sets[i]);
        tokenizer_save_hf(t, in_directory("hf"));
        reload(t, in_directory("hf/tokenizer.json"), true, sets[i]);
        reload(t, in_directory("hf"), true, sets[i]);
    }
    write_tiktoken(t, in_directory("full.tiktoken"));
    reload(t, in_directory("full.tiktoken"), false, "tiktoken");
    write_vocab_and_merges(t, in_directory("vocab"));
    reload(t, in_directory("vocab"), false, "vocab.json and merges.txt");
    tokenizer_save_bin(small, in_directory("small.bin"));
    reload(small, in_directory("small.bin"), true, "trimmed .bin");
    tokenizer_save_hf(small, in_directory("small"));
    reload(small, in_directory("small"), true, "trimmed tokenizer.json");
    write_tiktoken(small, in_directory("small/qwen.tiktoken"));
    reload(small, in_directory("small/qwen.tiktoken"), true, "trimmed tiktoken");
    write_vocab_and_merges(small, in_directory("small_vocab"));
    reload(small, in_directory("small_vocab"), true, "trimmed vocab.json and merges.txt");
    expect(small->hash != t->hash, "other tokens, other hash");
    // In a directory tokenizer.json comes first, then tokenizer.bin, then qwen.tiktoken.
    mkdir(in_directory("order"), 0777);
    write_tiktoken(t, in_directory("order/qwen.tiktoken"));
    reload(t, in_directory("order"), false, "qwen.tiktoken of a directory");
    tokenizer_use_specials(t, "qwen3");
    tokenizer_save_bin(t, in_directory("order/tokenizer.bin"));
    reload(t, in_directory("order"), true, "tokenizer.bin of a directory");
    tokenizer_save_hf(small, in_directory("order"));
    reload(small, in_directory("order"), true, "tokenizer.json of a directory");
    group_end("saved in every format and read again");
    const char *official = getenv("QWEN_TIKTOKEN");
    if (official) {
        reload(t, official, false, official);
        group_end("the file in QWEN_TIKTOKEN");
    } else {
        printf("skip the official qwen.tiktoken (set QWEN_TIKTOKEN to its path)\n");
        skipped++;
    }
}

// The named file with the first `from` replaced by `to`; "" `from`: nothing is replaced.
char *edited(const char *name, const char *from, const char *to) {
    size_t size;
    char *data = read_file(in_directory(name), &size), *at = strstr(data, from);
    CHECK(at != NULL, "%s does not contain %s", name, from);
    Text text = { NULL, 0, 0 };
    text_add(&text, data, (size_t)(at - data));
    text_add(&text, to, strlen(to));
    text_add(&text, at + strlen(from), size - (size_t)(at - data) - strlen(from));
    char *path = in_directory("edited");
    write_bytes(path, text.data, text.len);
    free(data);
    free(text.data);
    return path;
}

void load_it(const char *path) { tokenizer_free(tokenizer_load(path)); }

void test_foreign_json(void) {
    static const char *const edits[][4] = {
        { "another normalizer", "\"NFC\"", "\"NFKC\"", "normalizer.type is NFKC, must be NFC" },
        { "no normalizer", "{\"type\": \"NFC\"}", "null", "normalizer.type is null, must be NFC" },
        { "Llama 3's digits", "\\\\p{N}|", "\\\\p{N}{1,3}|", "pattern.Regex is (?i:" },
        { "only ByteLevel", "\"Sequence\"", "\"ByteLevel\"", "pre_tokenizer.type is ByteLevel, must be Sequence" },
        { "a third step", "]},\n  \"post", ", {\"type\": \"Digits\"}]},\n  \"post", "pre_tokenizer.pretokenizers.2 is {...}" },
        { "inverted split", "\"invert\": false", "\"invert\": true", "invert is true, must be false" },
        { "prefix space", "\"add_prefix_space\": false", "\"add_prefix_space\": true", "add_prefix_space is true, must be false" },
        { "Unigram", "\"BPE\"", "\"Unigram\"", "model.type is Unigram, must be BPE" },
        { "dropout", "\"dropout\": null", "\"dropout\": 0.1", "model.dropout is 0.1, must be null" },
        { "byte fallback", "\"byte_fallback\": false", "\"byte_fallback\": true", "model.byte_fallback is true" },
        { "suffix", "\"end_of_word_suffix\": \"\"", "\"end_of_word_suffix\": \"</w>\"", "end_of_word_suffix is </w>" },
        { "a template", "\"post_processor\": {\"type\": \"B", "\"post_processor\": {\"type\": \"X", "post_processor.type is XyteLevel" },
        { "lstrip", "\"lstrip\": false", "\"lstrip\": true", "lstrip of '<|endoftext|>' is true" },
        { "mixed normalized", "\"normalized\": false", "\"normalized\": true", "normalized of '<|im_start|>'" },
        { "special id of an ordinary token", "{\"id\": ", "{\"id\": 5, \"x\": ", "special token <|endoftext|> has the id 5" },
        { "an id twice", "\"!\": 0", "\"!\": 1", "id 1 of" },
        { "a gap", "\"!\": 0,", "", "leaves a gap" },
        { "no id", "\"!\": 0", "\"!\": \"0\"", "'!' has no id" },
        { "not the alphabet", "\"!\": 0", "\"\xE4\xBD\xA0\": 0", "token 0 is not written in the byte-level alphabet" },
        { "no vocab", "\"vocab\"", "\"words\"", "model.vocab is null" },
        { "a wrong merge", "\"merges\": [\n      \"", "\"merges\": [\n      \"! !\", \"", "merges: found '! !'" },
        { "merge not a pair", "\"merges\": [\n      \"", "\"merges\": [\n      [\"a\"], \"", "merges: found ' '" },
        { "no model", "\"model\"", "\"modal\"", "has no field 'model'" },
        { "broken JSON", "\"merges\": [", "\"merges\": [[", "is not valid JSON" },
    };
    for (size_t i = 0; i < sizeof(edits) / sizeof(edits[0]); i++) {
        char *path = edited("small/tokenizer.json", edits[i][1], edits[i][2]);
        check_fails(edits[i][0], load_it, path, edits[i][3]);
    }
    size_t size;
    char *data = read_file(in_directory("small/tokenizer.json"), &size), *merges = strstr(data, "\"merges\": [") + 11;
    Text text = { NULL, 0, 0 };
    text_add(&text, data, (size_t)(merges - data));
    text_add(&text, strchr(merges, ',') + 1, size - (size_t)(strchr(merges, ',') + 1 - data));
    write_bytes(in_directory("edited"), text.data, text.len);
    check_fails("the first merge is missing", load_it, in_directory("edited"), "where the ids in vocab ask for '");
    text.len = 0;
    text_add(&text, data, (size_t)(strrchr(data, ',') - data));
    text_add(&text, "]}}", 3);
    write_bytes(in_directory("edited"), text.data, text.len);
    check_fails("the last merge is missing", load_it, in_directory("edited"), "merges: they end before token");
    free(text.data);
    free(data);
    // What does not change ids is accepted: pairs instead of lines, special tokens listed in vocab, other ids than ours.
    char vocab_entry[64], *path;
    Tokenizer *small = tokenizer_load(in_directory("small"));
    snprintf(vocab_entry, sizeof(vocab_entry), "\"vocab\": {\"<|im_end|>\": %d,", small->im_end);
    path = edited("small/tokenizer.json", "\"vocab\": {", vocab_entry);
    reload(small, path, true, "special token in vocab");
    tokenizer_free(small);
    path = edited("small/tokenizer.json", "\"<|im_end|>\"", "\"<|END|>\"");
    small = tokenizer_load(path);
    expect(strcmp(small->special_set, "custom") == 0 && small->im_end == -1 && small->im_start >= 0, "custom special tokens");
    tokenizer_free(small);
    group_end("tokenizer.json that differs without effect");
}

void test_bad_files(void) {
    size_t size;
    char *path = in_directory("bad");
    char *data = read_file(in_directory("small.bin"), &size);
    int wrong = 0;
    for (int i = 0; i < 60; i++) {    // cut anywhere, or one byte changed: always one line and exit code 1
        size_t n = i < 20 ? (size_t)(2 * i) + 8 : random_below((uint32_t)size);
        char was = data[n];
        if (i % 2) write_bytes(path, data, n);
        else data[n] ^= (char)(1 << random_below(8)), write_bytes(path, data, size), data[n] = was;
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            CHECK(freopen("/dev/null", "w", stderr) != NULL, "no /dev/null");
            tokenizer_load(path);
            _exit(0);
        }
        int status;
        waitpid(child, &status, 0);
        wrong += !(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    }
    check(wrong == 0, "60 cut or changed .bin files, %d not refused", wrong);
    write_bytes(path, data, 39);
    check_fails("cut in the header", load_it, path, "is cut off");
    write_bytes(path, data, size - 1);
    check_fails("one byte less", load_it, path, "is cut off or has bytes too many");
    data[size / 2] ^= 1;
    write_bytes(path, data, size);
    check_fails("one bit changed", load_it, path, "is damaged: its checksum");
    data[8] = 2;
    write_bytes(path, data, size);
    check_fails("another version", load_it, path, "has version 2");
    free(data);
    static const char *const texts[][3] = {
        { "an empty file", "", "is no tokenizer" },
        { "a text", "Once upon a time\n", "is no tokenizer" },
        { "Chinese text", "从前有座山\n", "is no tokenizer" },
        { "a JSON array", "[1, 2]", "is no tokenizer" },
        { "another JSON object", "{\"!\": 0}", "has no field 'model'" },
        { "cut JSON", "{\"model\": ", "is not valid JSON: expected a value" },
        { "ranks out of order", "IQ== 0\nIg== 2\n", "line 2: expected rank 1, found '2'" },
        { "no rank", "IQ== 0\nIg==\n", "line 2: expected \"base64 rank\"" },
        { "not base64", "IQ== 0\nI*== 1\n", "line 2: 'I*==' is not base64" },
        { "too few tokens", "IQ== 0\nIg== 1\n", "byte 0x00 is not a token" },
        { "a token twice", "IQ== 0\nIQ== 1\n", "tokens 0 and 1 are equal" },
    };
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        write_bytes(path, texts[i][1], strlen(texts[i][1]));
        check_fails(texts[i][0], load_it, path, texts[i][2]);
    }
    data = read_file(in_directory("small/qwen.tiktoken"), &size);
    Text text = { NULL, 0, 0 };
    text_add(&text, data, size);
    char line[64];
    int num_lines = 0;
    for (size_t i = 0; i < size; i++) num_lines += data[i] == '\n';
    snprintf(line, sizeof(line), "YWJjZGVmZ2hpams= %d\n", num_lines);    // abcdefghijk: no merge leads there
    text_add(&text, line, strlen(line));
    write_bytes(path, text.data, text.len);
    check_fails("a token that no merge makes", load_it, path, "earlier tokens, not two");
    free(text.data);
    free(data);
    check_fails("no such file", load_it, in_directory("nowhere"), "cannot open the tokenizer");
    mkdir(in_directory("empty"), 0777);
    check_fails("an empty directory", load_it, in_directory("empty"), "no tokenizer in");
    check_fails("not a file", load_it, "/dev/null", "is not a regular file");
}

void unknown_set(const char *set) { tokenizer_use_specials(tokenizer_load(in_directory("small.bin")), set); }
void save_bin_to(const char *path) { tokenizer_save_bin(tokenizer_load(in_directory("small.bin")), path); }
void save_hf_to(const char *path) { tokenizer_save_hf(tokenizer_load(in_directory("small.bin")), path); }
void save_to_full_disk(const char *path) {
    struct rlimit limit = { 1000, 1000 };
    Tokenizer *t = tokenizer_load(VOCABULARY);    // larger than the buffer of a FILE, so that fwrite fails, not fclose
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    tokenizer_save_bin(t, path);
}

void test_bad_saves(void) {
    check_fails("unknown set of special tokens", unknown_set, "qwen4", "there are none, qwen2, qwen2.5, qwen3 and v1");
    check_fails("save where there is no directory", save_bin_to, in_directory("nowhere/x.bin"), "cannot write");
    check_fails("save into a file as directory", save_hf_to, in_directory("small.bin"), "cannot write");
    check_fails("save with a full disk", save_to_full_disk, in_directory("x.bin"), "cannot write");
    expect(access(in_directory("x.bin"), F_OK) != 0 && access(in_directory("x.bin.tmp"), F_OK) != 0, "a failed save leaves a file");
    size_t size, size_after;
    char *before = read_file(in_directory("small.bin"), &size);
    check_fails("a failed save over a good file", save_to_full_disk, in_directory("small.bin"), "cannot write");
    char *after = read_file(in_directory("small.bin"), &size_after);
    expect(size == size_after && memcmp(before, after, size) == 0, "a failed save changes the old file");
    free(before);
    free(after);
    group_end("a failed save leaves nothing, and the old file whole");
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    snprintf(directory, sizeof(directory), "/tmp/test_tokenizer.XXXXXX");
    CHECK(mkdtemp(directory) != NULL, "no temporary directory: %s", strerror(errno));
    test_json_good();
    test_json_bad();
    test_json_write();
    test_utf8();
    test_nfc();
    test_pieces();
    Tokenizer *t = tokenizer_load(VOCABULARY);
    test_vocabulary(t);
    test_specials();
    test_stream(t);
    test_vectors(t, "plain", SPECIALS_AS_TEXT);
    test_vectors(t, "bytes", SPECIALS_AS_TEXT);
    tokenizer_use_specials(t, "v1");
    test_vectors(t, "v1", SPECIALS_PARSED);
    tokenizer_use_specials(t, "qwen3");
    test_vectors(t, "v2", SPECIALS_PARSED);
    test_long(t);
    test_round_trip(t, "decode(encode(x)) = NFC(x), any bytes");
    test_threads(t);
    Tokenizer *small = trimmed(t);
    test_words(t);
    test_rule(t, small);
    test_word_cache(t);
    test_trim(t, small);
    test_round_trip(small, "the same with the trimmed vocabulary");
    test_formats(t, small);
    test_foreign_json();
    test_bad_files();
    test_bad_saves();
    tokenizer_free(t);
    tokenizer_free(small);
    char command[4200];
    snprintf(command, sizeof(command), "rm -rf '%s'", directory);
    if (system(command) != 0) printf("could not remove %s\n", directory);
    return verdict();
}

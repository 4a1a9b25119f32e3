// fuzz_tokenizer.c: any bytes as text. Byte 0 chooses: bits 0-2 the special tokens (7: load a tokenizer of these bytes), bit 3 whether
// they are parsed, bits 4-7 the size of the pieces that a stream is fed.
// Findings: what the sanitizers see; leaks; tokens that don't decode to the text in NFC; other tokens than the pattern and the merges by
// definition give; a stream that passes on something invalid or loses something; a chunk border of `prepare tokenize` that shows.
#include "fuzz.h"

static Tokenizer *tokenizers[5];

void fuzz_start(void) {
    for (int i = 0; i < 5; i++) {
        tokenizers[i] = tokenizer_load("dev/data/qwen.bin");
        tokenizer_use_specials(tokenizers[i], special_sets[i].name);
    }
    TokenList ids = {NULL, 0, 0};
    tokenizer_encode(tokenizers[0], "a", 1, SPECIALS_AS_TEXT, &ids);      // now the thread has its memory of words, which stays
    free(ids.ids);
}

// Invalid bytes replaced, nothing else: what the text is before NFC.
char *replaced(const char *text, size_t len, size_t *new_len) {
    char *out = (char *)xmalloc(3 * len + 3);
    *new_len = 0;
    for (size_t i = 0; i < len;) {
        uint32_t c;
        int n = utf8_decode(text + i, len - i, &c);
        *new_len += (size_t)utf8_encode(c, out + *new_len);
        i += (size_t)(n < 0 ? -n : n);
    }
    return out;
}

bool is_valid(const char *text, size_t len) {
    uint32_t c;
    for (size_t i = 0; i < len; i += (size_t)utf8_length((unsigned char)text[i])) if (utf8_decode(text + i, len - i, &c) < 0) return false;
    return true;
}

// The end of the piece that the pattern (QWEN_PATTERN) finds at s[0], by its seven alternatives one after the other. Valid UTF-8.
size_t run_of(const char *s, size_t at, size_t len, int wanted) {
    uint32_t c;
    for (int n; at < len && (n = utf8_decode(s + at, len - at, &c), (unicode_bits(c) & 3) == wanted); at += (size_t)n) {}
    return at;
}
bool is_newline(char c) { return c == '\r' || c == '\n'; }
size_t piece_end(const char *s, size_t len) {
    static const char *const endings[] = {"s", "\xC5\xBF", "t", "re", "ve", "m", "ll", "d"};      // C5 BF: the long s
    for (int i = 0; i < 8 && s[0] == '\''; i++) {
        size_t n = strlen(endings[i]);
        if (len > n && strncasecmp(s + 1, endings[i], n) == 0) return 1 + n;
    }
    uint32_t c;
    size_t first = (size_t)utf8_decode(s, len, &c), end;
    int type = unicode_bits(c) & 3;
    size_t before = type == CLASS_LETTER || type == CLASS_NUMBER || is_newline(s[0]) ? 0 : first;      // [^\r\n\p{L}\p{N}]?
    if ((end = run_of(s, before, len, CLASS_LETTER)) > before) return end;
    if (type == CLASS_NUMBER) return first;
    size_t space = s[0] == ' ';
    if ((end = run_of(s, space, len, CLASS_OTHER)) > space) {
        while (end < len && is_newline(s[end])) end++;
        return end;
    }
    size_t stop = run_of(s, 0, len, CLASS_SPACE), last = stop;
    for (end = stop; end > 0 && !is_newline(s[end - 1]); end--) {}
    if (end > 0) return end;
    if (stop == len) return stop;
    do last--; while ((s[last] & 0xC0) == 0x80);                 // \s+(?!\S): all but the last one
    return last > 0 ? last : stop;
}

// The merges by definition: the adjacent pair whose bytes are the token of the lowest rank is joined, the leftmost of equals.
void merge_by_definition(const Tokenizer *t, const char *piece, size_t len, TokenList *out) {
    size_t *start = (size_t *)xmalloc((len + 1) * sizeof *start), parts = len;      // part i is piece[start[i]] .. piece[start[i + 1] - 1]
    uint32_t *joined = (uint32_t *)xmalloc((len + 1) * sizeof *joined);             // the token that parts i and i + 1 make
    for (size_t i = 0; i <= len; i++) start[i] = i;
    for (size_t i = 0; i < len; i++) joined[i] = i + 2 <= len ? token_find(t, piece + i, 2) : NO_TOKEN;
    for (;;) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < parts; i++) if (joined[i] < joined[best]) best = i;
        if (parts < 2 || joined[best] == NO_TOKEN) break;
        parts--;
        memmove(start + best + 1, start + best + 2, (parts - best) * sizeof start[0]);
        memmove(joined + best, joined + best + 1, (parts - best) * sizeof joined[0]);
        for (size_t i = best > 0 ? best - 1 : 0; i <= best; i++) {
            joined[i] = i + 2 <= parts ? token_find(t, piece + start[i], start[i + 2] - start[i]) : NO_TOKEN;
        }
    }
    for (size_t i = 0; i < parts; i++) token_list_push(out, token_find(t, piece + start[i], start[i + 1] - start[i]));
    free(start), free(joined);
}

void check_ids(const TokenList *found, const TokenList *expected, const char *what) {
    bool same = found->count == expected->count;
    for (size_t i = 0; same && i < found->count; i++) same = found->ids[i] == expected->ids[i];
    fuzz_expect(same, "%s: %zu tokens, expected %zu or others", what, found->count, expected->count);
}

void encode_and_back(const Tokenizer *t, bool parsed, size_t step, const char *text, size_t len) {
    TokenList ids = {NULL, 0, 0}, expected = {NULL, 0, 0};
    tokenizer_encode(t, text, len, parsed ? SPECIALS_PARSED : SPECIALS_AS_TEXT, &ids);

    // the text as it must come back; with special tokens parsed, NFC may stop at them, so only the bytes before NFC are known
    size_t plain_len, nfc_len, again_len, decoded_len = 0;
    char *plain = replaced(text, len, &plain_len), *nfc = nfc_normalize(text, len, &nfc_len);
    if (!nfc) nfc = fuzz_copy(text, nfc_len = len);
    char *again = nfc_normalize(nfc, nfc_len, &again_len);
    fuzz_expect(again == NULL || (again_len == nfc_len && memcmp(again, nfc, nfc_len) == 0), "NFC of NFC is another text");
    for (size_t i = 0, n; i < ids.count; i++) tokenizer_bytes(t, ids.ids[i], &n), decoded_len += n;
    char *decoded = (char *)xmalloc(decoded_len);
    for (size_t i = 0, at = 0, n; i < ids.count; i++, at += n) {
        const char *bytes = tokenizer_bytes(t, ids.ids[i], &n);
        fuzz_expect(n > 0 && ids.ids[i] < (uint32_t)t->vocab_size, "id %u", ids.ids[i]);
        memcpy(decoded + at, bytes, n);
    }
    fuzz_expect(is_valid(decoded, decoded_len), "encoding gave invalid UTF-8");
    if (!parsed) {
        fuzz_expect(decoded_len == nfc_len && memcmp(decoded, nfc, nfc_len) == 0, "the text did not come back");
        for (size_t at = 0, n; at < nfc_len; at += n) {
            n = piece_end(nfc + at, nfc_len - at);
            merge_by_definition(t, nfc + at, n, &expected);
        }
        check_ids(&ids, &expected, "by definition");
    }
    if (is_valid(text, len)) fuzz_expect(plain_len == len && memcmp(plain, text, len) == 0, "valid text was replaced");

    // a stream, fed with `step` bytes at a time: whole characters only, all of them
    Utf8Stream stream;
    memset(&stream, 0, sizeof stream);
    char *out = (char *)xmalloc(3 * len + 3);
    size_t size = 0;
    for (size_t at = 0; at < len; at += step) {
        size_t n = len - at < step ? len - at : step;
        char *room = (char *)xmalloc(3 * n + 3), *bytes = fuzz_copy(text + at, n);
        size_t count = utf8_stream(&stream, bytes, n, room);
        fuzz_expect(is_valid(room, count), "the stream gave a part of a character");
        memcpy(out + size, room, count);
        size += count;
        free(room), free(bytes);
    }
    size += utf8_stream_flush(&stream, out + size);
    fuzz_expect(size == plain_len && memcmp(out, plain, size) == 0, "the stream gave another text");

    // `prepare tokenize`: cut where next_chunk may cut
    uint32_t c;
    for (size_t i = 1; i < len && !parsed; i++) {
        if (text[i - 1] != '\n' || utf8_decode(text + i, len - i, &c) < 0 || unicode_bits(c) != CLASS_LETTER) continue;
        TokenList cut = {NULL, 0, 0};
        tokenizer_encode(t, text, i, SPECIALS_AS_TEXT, &cut);
        tokenizer_encode(t, text + i, len - i, SPECIALS_AS_TEXT, &cut);
        check_ids(&cut, &ids, "in two chunks");
        free(cut.ids);
        break;
    }
    free(ids.ids), free(expected.ids), free(plain), free(nfc), free(again), free(decoded), free(out);
}

// A small vocabulary that these bytes describe: .bin (with length and checksum put right), qwen.tiktoken or tokenizer.json. Refused
// (most are), or it must encode.
void load(char *data, size_t size) {
    if (size >= BIN_HEADER && memcmp(data, BIN_MAGIC, 8) == 0) {
        uint64_t payload = size - BIN_HEADER, hash;
        memcpy(data + 24, &payload, 8);
        hash = bin_hash(data, payload);
        memcpy(data + 32, &hash, 8);
    }
    fuzz_write(data, size);
    Tokenizer *t = tokenizer_load(fuzz_path);
    TokenList ids = {NULL, 0, 0};
    tokenizer_encode(t, data, size, SPECIALS_PARSED, &ids);
    for (size_t i = 0; i < ids.count; i++) fuzz_expect(ids.ids[i] < (uint32_t)t->vocab_size, "id %u", ids.ids[i]);
}

void fuzz_one(const unsigned char *data, size_t size) {
    if (size == 0) return;
    char *text = fuzz_copy(data + 1, --size);
    int set = data[0] & 7;
    if (set == 7) { load(text, size); return; }
    encode_and_back(tokenizers[set % 5], data[0] >> 3 & 1, 1 + (data[0] >> 4), text, size);
    free(text);
    fuzz_expect(fuzz_num_held == 0, "%zu blocks of memory were not freed", fuzz_num_held);
}

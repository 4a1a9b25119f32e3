// dataloader.h: token files -> batches of (tokens, targets, weights, document starts).
//
//   1. the token file          header, flag bits, checks on opening
//   2. the loader              shards, rows, a seeded order for every epoch
//   3. one row, many rows      what the trainer calls
//
// The loader has no state that moves: row number `position` (0, 1, 2, ... over all epochs) always holds the same tokens,
// whatever was read before and however many processes share the work. To resume, the trainer remembers one number.
//
// Needs CHECK, xmalloc, path_of and file_exists of train_qwen.c. A program that writes token files uses section 1 only.

#ifndef DATALOADER_H
#define DATALOADER_H

#include <dirent.h>
#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>

// ---------------------------------------------------------------------------------------------------------------------
// 1. The token file: a 256-byte header, then num_tokens little-endian uint32.
//    Bits 0-23 of a token are its id; two high bits are flags.

enum {
    TOKEN_ID_MASK   = 0x00FFFFFF,
    TOKEN_DOC_START = 0x40000000,      // first token of a document
};
#define TOKEN_NO_LOSS 0x80000000u      // no loss when this token is the target (prompts)

#define TOKEN_FILE_MAGIC "QWENTOK"     // 7 characters and their NUL fill the 8 bytes
enum { TOKEN_FILE_VERSION = 1 };

typedef enum { TASK_PRETRAIN, TASK_SFT, TASK_DPO } Task;
static const char *const TASK_NAMES[] = {"pretrain", "sft", "dpo"};

typedef struct {
    char     magic[8];
    uint32_t version;
    uint32_t task;              // Task: what the file was prepared for
    uint64_t num_tokens;
    uint64_t num_documents;
    uint32_t vocab_size;        // every id is below it
    uint32_t end_id;            // the token that ends each document
    uint64_t tokenizer_hash;    // of the ordinary tokens (tokenizer.h), so that files of different tokenizers don't mix
    char     special_set[16];   // which special tokens follow them
    float    bigram_loss;       // nats per token of a bigram model of the training tokens on this file; 0: not computed
    unsigned char reserved[256 - 8 - 8 - 16 - 8 - 8 - 16 - 4];
} TokenFileHeader;

// One open file, mapped into memory. `tokens` follow the header.
typedef struct {
    char *path;
    const TokenFileHeader *header;
    const uint32_t *tokens;
    uint64_t num_tokens;
} Shard;

// Opens one token file and checks all that the header can promise.
void shard_open(Shard *s, const char *path) {
    int f = open(path, O_RDONLY);
    CHECK(f >= 0, "cannot open %s: %s", path, strerror(errno));
    struct stat st;
    CHECK(fstat(f, &st) == 0 && S_ISREG(st.st_mode), "%s is not a regular file", path);
    CHECK((size_t)st.st_size >= sizeof(TokenFileHeader),
          "%s is %lld bytes, shorter than a token file's 256-byte header; make one with ./prepare", path, (long long)st.st_size);
    void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, f, 0);
    CHECK(map != MAP_FAILED, "cannot map %s: %s", path, strerror(errno));
    close(f);
    const TokenFileHeader *h = (const TokenFileHeader *)map;
    CHECK(memcmp(h->magic, TOKEN_FILE_MAGIC, 8) == 0,
          "%s is not a token file (it does not begin with %s); make one with ./prepare", path, TOKEN_FILE_MAGIC);
    CHECK(h->version == TOKEN_FILE_VERSION, "%s has token file version %u, this program reads version %d; prepare it again",
          path, h->version, TOKEN_FILE_VERSION);
    CHECK(h->task <= TASK_DPO, "%s names task %u; known are 0 to %d", path, h->task, TASK_DPO);
    CHECK(h->num_documents <= h->num_tokens && h->end_id < h->vocab_size,
          "%s: its header can't be true (%" PRIu64 " documents, %" PRIu64 " tokens, end id %u, "
          "vocabulary %u); prepare it again",
          path, h->num_documents, h->num_tokens, h->end_id, h->vocab_size);
    uint64_t present = ((uint64_t)st.st_size - sizeof *h) / 4;
    CHECK(present == h->num_tokens && ((uint64_t)st.st_size - sizeof *h) % 4 == 0,
          "%s promises %" PRIu64 " tokens, but %" PRIu64 " are there: the file is truncated or damaged; prepare it again",
          path, h->num_tokens, present);
    s->path = strdup(path);
    s->header = h;
    s->tokens = (const uint32_t *)(h + 1);
    s->num_tokens = present;
}

void shard_close(Shard *s) {
    munmap((void *)s->header, sizeof *s->header + s->num_tokens * 4);
    free(s->path);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. The loader. An epoch is num_rows rows of T inputs and T targets.
//    Pretraining cuts every shard into windows: row w reads tokens [w*T, w*T + T], targets are the inputs moved by one.
//    SFT and DPO pack whole documents into rows (`packed`). A document longer than a row, T + 1 tokens, is cut there and counted. DPO's
//    documents are pairs, chosen then rejected; a pair is never parted, and each of both has half a row. A document without a target in
//    what is left of it (its prompt alone fills the row) teaches nothing: it is dropped and counted, in DPO with its pair.

typedef struct { int shard, count, number; uint64_t first; } Document;     // tokens [first, first + count) of a shard; number: see Batch

typedef struct {
    Shard *shards;
    int num_shards;
    Task task;
    int T, vocab_size;
    bool doc_mask, shuffle, packed;
    uint64_t seed;
    uint64_t num_tokens, num_rows;
    uint64_t *first_row;                    // windows: first_row[s] is the first row of shard s; num_shards + 1 entries
    Document *documents;                    // packed: in row order
    uint64_t *row_document;                 // packed: row r holds documents [row_document[r], row_document[r + 1])
    uint64_t num_documents, num_cut;        // packed: how many, and how many of them were longer
    uint64_t num_dropped;                   // packed: documents (DPO: pairs) without a target
    uint64_t fingerprint;                   // of the data, so that a resume with other data is noticed
} Loader;


// splitmix64's mixing function (Steele et al. 2014): a good 64-bit hash of a counter.
uint64_t mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// A seeded permutation of 0 .. n-1 without a table: a four-round Feistel network over the next even power of two,
// walked until it lands inside (fewer than four steps on average).
uint64_t permute(uint64_t index, uint64_t n, uint64_t key) {
    int half = 1;
    while (((uint64_t)1 << (2 * half)) < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = index >> half, right = index & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint64_t t = left ^ (mix64(key ^ mix64(right * 4 + round)) & mask);
            left = right, right = t;
        }
        index = left << half | right;
    } while (index >= n);
    return index;
}

void check_token(const Loader *l, int shard, uint64_t position) {
    const Shard *s = &l->shards[shard];
    uint32_t id = s->tokens[position] & ~(TOKEN_NO_LOSS | TOKEN_DOC_START);      // bits 24-29 must be 0 too
    CHECK(id < (uint32_t)l->vocab_size, "%s: token %" PRIu64 " has id %u, but the model's vocabulary ends at %d; "
          "prepare the data with the model's tokenizer", s->path, position, id, l->vocab_size - 1);
    CHECK(id < s->header->vocab_size, "%s: token %" PRIu64 " has id %u, but the file's own vocabulary ends at %u: it is damaged; "
          "prepare it again", s->path, position, id, s->header->vocab_size - 1);
}

// Packed: how many tokens of a document there is room for.
int document_room(const Loader *l) { return l->task == TASK_DPO ? (l->T + 1) / 2 : l->T + 1; }

// Lists what can be learnt from in all shards, in a seeded order, and fills rows of T + 1 tokens with as much of it as fits.
void loader_pack(Loader *l) {
    uint64_t capacity = 0, n = 0, group = l->task == TASK_DPO ? 2 : 1, room = (uint64_t)document_room(l);
    for (int s = 0; s < l->num_shards; s++) capacity += l->shards[s].header->num_documents;
    CHECK(capacity <= INT32_MAX, "%s ... hold %" PRIu64 " documents, at most %d are possible", l->shards[0].path, capacity, INT32_MAX);
    Document *found = (Document *)xmalloc(capacity * sizeof *found);
    for (int s = 0; s < l->num_shards; s++) {
        const Shard *shard = &l->shards[s];
        const uint32_t *tokens = shard->tokens;
        for (uint64_t i = 0; i < shard->num_tokens;) {
            bool learns = true;
            uint64_t cut = 0;
            for (uint64_t k = 0; k < group; k++) {
                uint64_t first = i, has_target = 0;
                CHECK(i > 0 || tokens[0] & TOKEN_DOC_START, "%s: its first token does not begin a document; prepare it again", shard->path);
                CHECK(i < shard->num_tokens, "%s ends with a chosen answer that has no rejected one; prepare it again", shard->path);
                CHECK(n + k < capacity, "%s holds more documents than its header says; prepare it again", shard->path);
                for (i++; i < shard->num_tokens && !(tokens[i] & TOKEN_DOC_START); i++)
                    has_target |= i - first < room && !(tokens[i] & TOKEN_NO_LOSS);
                Document d = {s, (int)(i - first < room ? i - first : room), (int)(n + k), first};
                found[n + k] = d;
                cut += i - first > room, learns = learns && has_target;
            }
            if (learns) n += group, l->num_cut += cut;
            else l->num_dropped++;
        }
    }
    CHECK(n > 0, "%s: none of its %" PRIu64 " %s has an answer within %" PRIu64 " tokens; a larger --seq may help", l->shards[0].path,
          l->num_dropped, group == 2 ? "pairs" : "documents", room);
    l->documents = (Document *)xmalloc(n * sizeof *found);
    l->row_document = (uint64_t *)xmalloc((n + 1) * sizeof(uint64_t));
    int used = 0;
    for (uint64_t i = 0; i < n; i += group) {
        const Document *from = &found[l->shuffle ? permute(i / group, n / group, l->seed) * group : i];
        int count = from[0].count + (group == 2 ? from[1].count : 0);
        if (i == 0 || used + count > l->T + 1) l->row_document[l->num_rows++] = i, used = 0;
        used += count;
        memcpy(&l->documents[i], from, group * sizeof *from);
    }
    l->row_document[l->num_rows] = l->num_documents = n;
    free(found);
}

void loader_add(Loader *l, const char *path) {
    l->shards = (Shard *)xrealloc(l->shards, (size_t)(l->num_shards + 1) * sizeof(Shard));
    shard_open(&l->shards[l->num_shards++], path);
}

// The shards of `data`: a token file, a directory of which `prefix`*.bin are taken (prefix "train" or "val"), or a pattern such as
// 'wiki_*.bin'; in the order of their names. Returns how many there are, 0 when nothing matches.
int loader_find(Loader *l, const char *data, const char *prefix) {
    struct stat st;
    if (stat(data, &st) == 0 && S_ISDIR(st.st_mode)) {
        struct dirent **entries;
        int count = scandir(data, &entries, NULL, alphasort);
        for (int i = 0; i < count; i++) {
            const char *name = entries[i]->d_name, *ending = strrchr(name, '.');
            if (strncmp(name, prefix, strlen(prefix)) == 0 && ending && strcmp(ending, ".bin") == 0)
                loader_add(l, path_of("%s/%s", data, name));
            free(entries[i]);
        }
        if (count >= 0) free(entries);
        return l->num_shards;
    }
    if (file_exists(data)) return loader_add(l, data), 1;
    glob_t found;
    if (glob(data, 0, NULL, &found) != 0) return 0;
    for (size_t i = 0; i < found.gl_pathc; i++) loader_add(l, found.gl_pathv[i]);
    globfree(&found);
    return l->num_shards;
}

enum { CHECK_ALL_TOKENS_BELOW = 1 << 28 };      // ids of smaller data sets are all checked on opening, of others as they are read

// Opens the files that loader_find found and lays out the rows. Each file must come from one tokenizer and one task.
void loader_open(Loader *l, Task task, int T, int vocab_size, bool doc_mask, bool shuffle, uint64_t seed) {
    l->task = task, l->T = T, l->vocab_size = vocab_size, l->doc_mask = doc_mask, l->shuffle = shuffle, l->seed = seed;
    l->packed = task != TASK_PRETRAIN;
    l->fingerprint = 0xCBF29CE484222325u;
    l->first_row = (uint64_t *)xcalloc((size_t)l->num_shards + 1, sizeof(uint64_t));
    const Shard *first = &l->shards[0];
    for (int i = 0; i < l->num_shards; i++) {
        const Shard *s = &l->shards[i];
        CHECK(s->header->task == (uint32_t)task, "%s was prepared for --task %s, not for %s", s->path,
              TASK_NAMES[s->header->task], TASK_NAMES[task]);
        CHECK(s->header->tokenizer_hash == first->header->tokenizer_hash, "%s and %s come from different tokenizers; "
              "prepare both with the same one", first->path, s->path);
        l->num_tokens += s->num_tokens;
        l->first_row[i + 1] = l->first_row[i] + (s->num_tokens > 0 ? (s->num_tokens - 1) / (uint64_t)T : 0);
        size_t sample = s->num_tokens < 1024 || l->packed ? (size_t)s->num_tokens : 1024;    // packed data is read as a whole anyway
        l->fingerprint = fnv1a(l->fingerprint, (const char *)s->header, sizeof *s->header);
        l->fingerprint = fnv1a(l->fingerprint, (const char *)s->tokens, sample * 4);
        l->fingerprint = fnv1a(l->fingerprint, (const char *)(s->tokens + s->num_tokens - sample), sample * 4);
    }
    if (l->num_tokens < CHECK_ALL_TOKENS_BELOW)
        for (int s = 0; s < l->num_shards; s++)
            for (uint64_t i = 0; i < l->shards[s].num_tokens; i++) check_token(l, s, i);
    l->num_rows = 0;
    if (l->packed) loader_pack(l);
    else l->num_rows = l->first_row[l->num_shards];
}

void loader_close(Loader *l) {
    for (int s = 0; s < l->num_shards; s++) shard_close(&l->shards[s]);
    free(l->shards), free(l->first_row), free(l->documents), free(l->row_document);
    memset(l, 0, sizeof *l);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Rows. All arrays are (rows, T).

typedef struct {
    int   *tokens;      // inputs
    int   *targets;     // the token after each input
    int   *start;       // where in its row the document of this input begins: attention looks no further back, and its
                        // position (for RoPE) is t - start. All 0 without doc_mask.
    int   *document;    // packed: which document this input belongs to, counted over all data without the dropped ones, in the order of the
                        // files (so 2 p and 2 p + 1 are a pair of DPO); padding and windows: -1
    float *weights;     // 1: this target counts in the loss, 0: it doesn't
} Batch;

void batch_alloc(Batch *b, int rows, int T) {
    size_t n = (size_t)rows * T;
    b->tokens = (int *)xmalloc(n * sizeof(int)), b->targets = (int *)xmalloc(n * sizeof(int));
    b->start = (int *)xmalloc(n * sizeof(int)), b->document = (int *)xmalloc(n * sizeof(int));
    b->weights = (float *)xmalloc(n * sizeof(float));
}

// The rows of b from `row` on.
Batch batch_from(const Batch *b, int row, int T) {
    size_t at = (size_t)row * (size_t)T;
    Batch rest = {b->tokens + at, b->targets + at, b->start + at, b->document + at, b->weights + at};
    return rest;
}

void batch_free(Batch *b) { free(b->tokens), free(b->targets), free(b->start), free(b->document), free(b->weights); }

// Copies the stream tokens of a document (or window) to places t, t+1, ... of a row. Stream token i is input i and target
// i - 1. Returns the next free place.
int row_append(const Loader *l, const Document *d, int t, int *document_start, const Batch *row) {
    for (int i = 0; i < d->count; i++, t++) {
        uint32_t token = l->shards[d->shard].tokens[d->first + i];
        check_token(l, d->shard, d->first + i);
        bool begins = l->packed ? i == 0 : (token & TOKEN_DOC_START) != 0;
        if (l->doc_mask && begins) *document_start = t;
        if (t < l->T) row->tokens[t] = (int)(token & TOKEN_ID_MASK), row->start[t] = *document_start, row->document[t] = d->number;
        if (t > 0) {
            row->targets[t - 1] = (int)(token & TOKEN_ID_MASK);
            row->weights[t - 1] = (token & TOKEN_NO_LOSS) || (l->doc_mask && begins) ? 0.0f : 1.0f;
        }
    }
    return t;
}

// Fills one row. `position` counts rows from the start of training; epoch e visits the rows in an order of its own.
// Returns how much of it counts in the loss: targets, in DPO pairs.
double loader_row(const Loader *l, uint64_t position, const Batch *row) {
    uint64_t epoch = position / l->num_rows, index = position % l->num_rows;
    uint64_t r = l->shuffle ? permute(index, l->num_rows, mix64(l->seed) + epoch) : index;
    int document_start = 0, t = 0;
    double counted = 0;
    if (!l->packed) {
        int s = 0;
        while (r >= l->first_row[s + 1]) s++;
        Document window = {s, l->T + 1, -1, (r - l->first_row[s]) * (uint64_t)l->T};
        t = row_append(l, &window, 0, &document_start, row);
    } else {
        for (uint64_t d = l->row_document[r]; d < l->row_document[r + 1]; d++)
            t = row_append(l, &l->documents[d], t, &document_start, row);
    }
    if (l->doc_mask) document_start = t;
    for (int pad = t > 0 ? t - 1 : 0; pad < l->T; pad++) row->targets[pad] = 0, row->weights[pad] = 0;      // padding: id 0,
    for (; t < l->T; t++) row->tokens[t] = 0, row->start[t] = document_start, row->document[t] = -1;        // never a target
    if (l->task == TASK_DPO) return (double)(l->row_document[r + 1] - l->row_document[r]) / 2;
    for (t = 0; t < l->T; t++) counted += (double)row->weights[t];
    return counted;
}

// Rows position .. position + rows - 1 into a batch; returns how much of them counts in the loss.
double loader_rows(const Loader *l, uint64_t position, int rows, const Batch *out) {
    double counted = 0;
    for (int i = 0; i < rows; i++) {
        Batch row = batch_from(out, i, l->T);
        counted += loader_row(l, position + (uint64_t)i, &row);
    }
    return counted;
}

// The first tokens, at most `room`, of a document somewhere in the data (of the first shard with tokens), for samples; of a packed one the
// prompt: what stands before the first token with a loss. Returns how many.
int loader_document_start(const Loader *l, uint64_t random, int *tokens, int room) {
    int shard = 0, n = 0;
    while (l->shards[shard].num_tokens == 0) shard++;
    const Shard *s = &l->shards[shard];
    uint64_t at = random % s->num_tokens;
    while (at > 0 && !(s->tokens[at] & TOKEN_DOC_START)) at--;
    for (; n < room && at + (uint64_t)n < s->num_tokens; n++) {
        uint32_t token = s->tokens[at + (uint64_t)n];
        if ((n > 0 && token & TOKEN_DOC_START) || (l->packed && !(token & TOKEN_NO_LOSS))) break;
        check_token(l, shard, at + (uint64_t)n);
        tokens[n] = (int)(token & TOKEN_ID_MASK);
    }
    return n;
}

#endif

// generate: writes the tiny_baike corpus from the tables of facts (NAME.tsv) and the templates (NAME.txt) in this folder.
//     cc -std=c11 -O2 -o generate dev/data/tiny_baike/generate.c -lm
//     ./generate --out data/tiny_baike --seed 1 --size 1
// README.md describes both formats and the files that come out. In this file: text and chance | tables and templates | sums by rule |
// filling a template | questions | texts | records and files | main. The Chinese is in the templates, none here but number words.
// Buffers live until the program ends, after a second; a `static Text` in a function is scratch space that it uses again.
#define QWEN_NO_MAIN
#include "../../../train_qwen.c"
#include <dirent.h>

// ---------------------------------------------------------------------------------------------------------------------------------
// Text and chance

typedef struct { char *data; size_t size, capacity; } Text;

void text_add(Text *t, const char *s, size_t n) {
    if (t->size + n + 1 > t->capacity) {
        t->capacity = 2 * (t->size + n + 1);
        t->data = (char *)xrealloc(t->data, t->capacity);
    }
    memcpy(t->data + t->size, s, n);
    t->size += n;
    t->data[t->size] = 0;
}
void text_puts(Text *t, const char *s) { text_add(t, s, strlen(s)); }
void text_cut(Text *t, size_t size) { text_add(t, "", 0); t->size = size; t->data[size] = 0; }
bool ends_with(const char *s, size_t n, const char *end) { size_t m = strlen(end); return n >= m && !memcmp(s + n - m, end, m); }

char *copy_string(const char *s, size_t n) {
    char *p = (char *)xmalloc(n + 1);
    memcpy(p, s, n);
    p[n] = 0;
    return p;
}

// Is the text one of a|b|c?
bool is_in_list(const char *list, char separator, const char *text, size_t n) {
    for (const char *p = list, *end; p; p = end ? end + 1 : NULL) {
        end = strchr(p, separator);
        if ((end ? (size_t)(end - p) : strlen(p)) == n && !memcmp(p, text, n)) return true;
    }
    return false;
}

uint64_t hash_bytes(uint64_t h, const void *data, size_t n) {                  // FNV-1a, 64 bit
    const unsigned char *p = (const unsigned char *)data;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 1099511628211ull;
    return h;
}
uint64_t hash_string(uint64_t h, const char *s) { return hash_bytes(h, s, strlen(s) + 1); }

// splitmix64: the state is a counter, so the numbers are the same on every machine and each domain can have a stream of its own.
typedef struct { uint64_t state; } Random;

uint64_t random_u64(Random *r) {
    uint64_t z = (r->state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}
int random_below(Random *r, int n) { return (int)((random_u64(r) >> 32) * (uint64_t)n >> 32); }
bool random_percent(Random *r, int percent) { return random_below(r, 100) < percent; }

void shuffle(int *a, int n, Random *r) {
    for (int i = n - 1; i > 0; i--) {
        int j = random_below(r, i + 1), t = a[i];
        a[i] = a[j];
        a[j] = t;
    }
}

// Open-addressed map from the hash of a text to a number; 64-bit hashes stand for the texts.
typedef struct { uint64_t *keys; int *values; size_t count, capacity; } Map;

int *map_find(Map *m, uint64_t key, bool *is_new) {
    key += !key;                                                               // 0 marks a free slot
    if (2 * m->count >= m->capacity) {
        Map old = *m;
        m->capacity = old.capacity ? 2 * old.capacity : 1024;
        m->keys = (uint64_t *)xcalloc(m->capacity, sizeof(uint64_t));
        m->values = (int *)xcalloc(m->capacity, sizeof(int));
        m->count = 0;
        bool ignored;
        for (size_t i = 0; i < old.capacity; i++) if (old.keys[i]) *map_find(m, old.keys[i], &ignored) = old.values[i];
        free(old.keys);
        free(old.values);
    }
    size_t i = key & (m->capacity - 1);
    while (m->keys[i] && m->keys[i] != key) i = (i + 1) & (m->capacity - 1);
    *is_new = !m->keys[i];
    m->count += *is_new;
    m->keys[i] = key;
    return &m->values[i];
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Tables and templates

typedef enum {
    KIND_IT, KIND_INTRO, KIND_SAY, KIND_ASK, KIND_HELD, KIND_MC, KIND_LIST, KIND_GROUP, KIND_COMPARE, KIND_NEXT,        // in a domain
    KIND_OPENER, KIND_CLOSER, KIND_LINK, KIND_DIALOG, KIND_INSTRUCT, KIND_DESCRIBE, KIND_CHOICE, KIND_WORDY, KIND_UNSURE, // in common.txt
    NUM_KINDS
} Kind;
const char *kind_names[] = { "it", "intro", "say", "ask", "held", "mc", "list", "group", "compare", "next",
                             "opener", "closer", "link", "dialog", "instruct", "describe", "choice", "wordy", "unsure" };

enum { MAX_FIELDS = 32, MAX_FACTS = 32 };

typedef struct {
    char *left, *right;                                   // the text; after "=>" the answer, frame or text, otherwise NULL
    int line, fact, column;                               // line in the file; its fact; group, compare, next: the column
    bool *is_ambiguous;                                   // ask, held: (rows) another entity has the same question, another answer
} Template;

typedef struct { char *heading; int first[NUM_KINDS], count[NUM_KINDS]; } Fact;       // its say, ask, held, mc lines in `templates`

typedef struct {
    char *name, *title, *path;                            // "rivers", its Chinese name, path of the .txt
    int num_columns, num_rows, num_facts;
    char **columns, **cells;                              // (columns), (rows, columns)
    Fact *facts;
    Template *templates[NUM_KINDS];
    int count[NUM_KINDS];
    int *turn;                                            // (rows, facts): the next `say` line of this fact, so that all get used
} Domain;

char *cell(const Domain *d, int row, int column) { return d->cells[row * d->num_columns + column]; }

int find_column(const Domain *d, const char *name, size_t n) {
    for (int c = 0; c < d->num_columns; c++) if (strlen(d->columns[c]) == n && !memcmp(d->columns[c], name, n)) return c;
    return -1;
}

// The next line of a text that read_file returned, ended in place; NULL after the last one.
char *next_line(char **cursor, int *line) {
    char *start = *cursor;
    if (!*start) return NULL;
    char *end = strchr(start, '\n');
    *cursor = end ? end + 1 : start + strlen(start);
    if (end) *end = 0;
    size_t n = strlen(start);
    while (n && (start[n - 1] == '\r' || start[n - 1] == ' ')) start[--n] = 0;
    ++*line;
    return start;
}

void add_row(Domain *d, char **fields) {
    size_t n = (size_t)d->num_columns;
    d->cells = (char **)xrealloc(d->cells, (size_t)(d->num_rows + 1) * n * sizeof(char *));
    for (size_t i = 0; i < n; i++) d->cells[(size_t)d->num_rows * n + i] = copy_string(fields[i], strlen(fields[i]));
    d->num_rows++;
}

// Cuts a line at its tabs, in place.
int split_fields(char *row, char **fields, const char *path, int line) {
    int n = 0;
    for (char *p = row; p; n++) {
        CHECK(n < MAX_FIELDS, "%s:%d: more than %d fields", path, line, MAX_FIELDS);
        fields[n] = p;
        if ((p = strchr(p, '\t')) != NULL) *p++ = 0;
        CHECK(*fields[n], "%s:%d: field %d is empty; write - for an unknown value", path, line, n + 1);
        CHECK(!strpbrk(fields[n], "<>{}"), "%s:%d: field %d (%s) has one of < > { }", path, line, n + 1, fields[n]);
    }
    return n;
}

void set_columns(Domain *d, char **names, int n) {
    d->num_columns = n;
    d->columns = (char **)xmalloc((size_t)n * sizeof(char *));
    for (int i = 0; i < n; i++) d->columns[i] = copy_string(names[i], strlen(names[i]));
}

void load_table(Domain *d, const char *path) {
    char *cursor = read_file(path, NULL), *row, *fields[MAX_FIELDS];
    for (int line = 0; (row = next_line(&cursor, &line)) != NULL; ) {
        if (!*row || *row == '#') continue;
        int n = split_fields(row, fields, path, line);
        if (!d->num_columns) { set_columns(d, fields, n); continue; }
        CHECK(n == d->num_columns, "%s:%d: %d fields, but the first line names %d columns", path, line, n, d->num_columns);
        for (int r = 0; r < d->num_rows; r++) CHECK(strcmp(cell(d, r, 0), fields[0]), "%s:%d: a second line for %s", path, line, fields[0]);
        add_row(d, fields);
    }
    CHECK(d->num_rows >= 4, "%s: %d entities; wrong answers are drawn from the others, so at least 4 are needed", path, d->num_rows);
}

// The next {name} or {name*} of a template, inside <a|b> too. Returns the character after '}', NULL at the end.
const char *next_placeholder(const char *p, const char **name, size_t *n, bool *is_star) {
    if (!(p = strchr(p, '{'))) return NULL;
    const char *end = strchr(p, '}');
    *name = p + 1;
    *n = (size_t)(end - p - 1);
    *is_star = *n && end[-1] == '*';
    *n -= *is_star;
    return end + 1;
}

bool is_word(const char *name, size_t n, const char *word) { return strlen(word) == n && !memcmp(name, word, n); }

void check_template(const Domain *d, Kind kind, const char *text, int line) {
    int depth = 0, braces = 0;
    for (const char *p = text; *p; p++) {
        depth += (*p == '<') - (*p == '>');
        braces += (*p == '{') - (*p == '}');
        CHECK(depth >= 0 && depth <= 1 && braces >= 0 && braces <= 1, "%s:%d: < > or { } are unbalanced or nested", d->path, line);
    }
    CHECK(!depth && !braces, "%s:%d: < or { is not closed", d->path, line);
    const char *name;
    size_t n;
    bool is_star;
    for (const char *p = text; (p = next_placeholder(p, &name, &n, &is_star)) != NULL; ) {
        if (kind == KIND_COMPARE || kind == KIND_NEXT) {
            CHECK(n > 2 && (!memcmp(name, "a.", 2) || !memcmp(name, "b.", 2)), "%s:%d: {%.*s}: %s needs {a.COLUMN} or {b.COLUMN}",
                  d->path, line, (int)n, name, kind_names[kind]);
            name += 2;
            n -= 2;
        } else if ((kind == KIND_SAY && is_word(name, n, "it")) || (kind == KIND_LIST && is_word(name, n, "items")) ||
                   (kind == KIND_GROUP && is_word(name, n, "names"))) {
            continue;
        }
        CHECK(find_column(d, name, n) >= 0, "%s:%d: unknown placeholder {%.*s}: no such column", d->path, line, (int)n, name);
    }
}

void check_sentence(const Domain *d, const char *text, int line) {
    size_t n = strlen(text);
    bool is_ended = ends_with(text, n, "。") || ends_with(text, n, "？") || ends_with(text, n, "！") || ends_with(text, n, "”");
    CHECK(is_ended, "%s:%d: the sentence does not end with 。 ？ or ！", d->path, line);
}

// What stands on the left of "column => text": a column; for compare and next with numbers only.
int check_column(const Domain *d, Kind kind, const char *name, int line) {
    int column = find_column(d, name, strlen(name));
    CHECK(column >= 0, "%s:%d: no column %s", d->path, line, name);
    for (int r = 0; r < d->num_rows && kind != KIND_GROUP; r++) {
        char *value = cell(d, r, column), *end;
        strtod(value, &end);
        CHECK(!*end || !strcmp(value, "-"), "%s:%d: column %s of %s is no number: %s", d->path, line, name, cell(d, r, 0), value);
    }
    return column;
}

void check_parts(const Domain *d, Kind kind, Template *t) {
    int line = t->line;
    if (kind >= KIND_SAY && kind <= KIND_MC) CHECK(t->fact >= 0, "%s:%d: %s before the first fact", d->path, line, kind_names[kind]);
    if (kind >= KIND_GROUP && kind <= KIND_NEXT) t->column = check_column(d, kind, t->left, line);
    else check_template(d, kind, t->left, line);
    if (kind == KIND_INTRO || kind == KIND_SAY) check_sentence(d, t->left, line);
    if (!t->right) return;
    CHECK(*t->left && *t->right, "%s:%d: nothing before or after =>", d->path, line);
    check_template(d, kind, t->right, line);
    if (kind >= KIND_LIST) check_sentence(d, t->right, line);
    else CHECK(!ends_with(t->right, strlen(t->right), "。"), "%s:%d: an answer has no full stop", d->path, line);
    if (kind == KIND_ASK || kind == KIND_HELD) {
        CHECK(!strstr(t->right, "*}"), "%s:%d: {column*} is one of several right answers; use it in mc only", d->path, line);
    }
}

void add_template(Domain *d, Kind kind, char *text, int line) {
    Template t = { NULL, NULL, line, kind >= KIND_SAY && kind <= KIND_MC ? d->num_facts - 1 : -1, -1, NULL };
    bool has_right = kind >= KIND_ASK && kind <= KIND_NEXT;
    char *arrow = strstr(text, "=>"), *end = arrow ? arrow : text + strlen(text);
    CHECK(!arrow == !has_right, "%s:%d: '%s' is written %s", d->path, line, kind_names[kind],
          has_right ? "with =>: left part => right part" : "without =>");
    while (end > text && end[-1] == ' ') end--;
    t.left = copy_string(text, (size_t)(end - text));
    if (arrow) arrow += 2 + strspn(arrow + 2, " ");
    if (arrow) t.right = copy_string(arrow, strlen(arrow));
    check_parts(d, kind, &t);
    d->templates[kind] = (Template *)xrealloc(d->templates[kind], (size_t)(d->count[kind] + 1) * sizeof(Template));
    d->templates[kind][d->count[kind]++] = t;
    if (t.fact >= 0) d->facts[t.fact].count[kind]++;
}

void load_templates(Domain *d) {
    char *cursor = read_file(d->path, NULL), *text;
    for (int line = 0; (text = next_line(&cursor, &line)) != NULL; ) {
        if (!*text || *text == '#') continue;
        size_t n = strcspn(text, " \t");
        char *rest = text + n + strspn(text + n, " \t");
        CHECK(*rest, "%s:%d: nothing after %.*s", d->path, line, (int)n, text);
        text[n] = 0;
        if (!strcmp(text, "domain")) { d->title = copy_string(rest, strlen(rest)); continue; }
        if (!strcmp(text, "fact")) {
            CHECK(d->num_facts < MAX_FACTS, "%s:%d: more than %d facts", d->path, line, MAX_FACTS);
            Fact fact = { copy_string(rest, strlen(rest)), { 0 }, { 0 } };
            for (int k = KIND_SAY; k <= KIND_MC; k++) fact.first[k] = d->count[k];
            d->facts = (Fact *)xrealloc(d->facts, (size_t)(d->num_facts + 1) * sizeof(Fact));
            d->facts[d->num_facts++] = fact;
            continue;
        }
        int kind = 0;
        while (kind < NUM_KINDS && strcmp(text, kind_names[kind])) kind++;
        CHECK(kind < NUM_KINDS, "%s:%d: unknown keyword %s", d->path, line, text);
        if (kind != KIND_IT) { add_template(d, (Kind)kind, rest, line); continue; }
        for (char *p = rest; p; ) {                                            // it 甲|乙: one template each
            char *bar = strchr(p, '|');
            if (bar) *bar++ = 0;
            add_template(d, KIND_IT, p, line);
            p = bar;
        }
    }
}

void check_domain(const Domain *d) {
    CHECK(d->title, "%s: the line 'domain ...' is missing", d->path);
    CHECK(d->num_facts > 0, "%s: no fact", d->path);
    int intros = d->count[KIND_INTRO];
    CHECK(intros == 0 || intros >= 3, "%s: %d intro lines, expected none or at least 3", d->path, intros);
    CHECK(d->count[KIND_IT] > 0, "%s: the line 'it ...' is missing", d->path);
    CHECK(d->count[KIND_MC] > 0, "%s: no mc line", d->path);
    for (int f = 0; f < d->num_facts; f++) {
        const Fact *fact = &d->facts[f];
        int say = fact->count[KIND_SAY], ask = fact->count[KIND_ASK], held = fact->count[KIND_HELD];
        CHECK(say >= 3 && ask >= 3 && held >= 1, "%s: fact %d (%s) has %d say, %d ask, %d held; expected at least 3, 3, 1", d->path, f + 1,
              fact->heading, say, ask, held);
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Sums by rule: domains without a table

// 0..9999 in Chinese characters: 十, 二十一, 一百零五, 一千二百三十四.
void number_word(Text *out, int n) {
    const char *digits[] = { "零", "一", "二", "三", "四", "五", "六", "七", "八", "九" }, *units[] = { "千", "百", "十", "" };
    bool is_started = false, is_gap = false;
    if (n == 0) text_puts(out, digits[0]);
    for (int i = 0, unit = 1000; i < 4; i++, unit /= 10) {
        int digit = n / unit % 10;
        if (!digit) { is_gap = is_started; continue; }
        if (is_gap) text_puts(out, digits[0]);
        if (!(i == 2 && digit == 1 && !is_started)) text_puts(out, digits[digit]);
        text_puts(out, units[i]);
        is_started = true;
        is_gap = false;
    }
}

// A row of numbers: first the name, then each number and after it each number's word.
void add_number_row(Domain *d, const char *name, const int *numbers, int n) {
    char digits[8][16], *fields[17];
    static Text words[8];
    fields[0] = (char *)name;
    for (int i = 0; i < n; i++) {
        snprintf(digits[i], sizeof digits[i], "%d", numbers[i]);
        text_cut(&words[i], 0);
        number_word(&words[i], numbers[i]);
        fields[1 + i] = digits[i];
        fields[1 + n + i] = words[i].data;
    }
    add_row(d, fields);
}

// addition and subtraction within 20, multiplication up to 9x9: columns a, b, c and their words aw, bw, cw.
bool load_rule(Domain *d) {
    const char *columns[] = { "name", "a", "b", "c", "aw", "bw", "cw" }, *rules[] = { "addition", "subtraction", "multiplication" };
    const char signs[][3] = { "+", "-", "×" };
    int rule = 0;
    while (rule < 3 && strcmp(d->name, rules[rule])) rule++;
    if (rule == 3) return false;
    set_columns(d, (char **)columns, 7);
    for (int a = 1; a <= (rule == 2 ? 9 : 20); a++) {
        for (int b = 1; b <= (rule == 2 ? 9 : 20); b++) {
            int c = rule == 0 ? a + b : rule == 1 ? a - b : a * b, numbers[] = { a, b, c };
            char name[32];
            snprintf(name, sizeof name, "%d%s%d", a, signs[rule], b);
            if (rule == 2 || (c >= 0 && c <= 20)) add_number_row(d, name, numbers, 3);
        }
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Filling a template

// What the placeholders stand for. {name} and the columns come from `row`, {b.name} from `other`; group sets one column to one value.
typedef struct {
    const Domain *domain;
    Random *random;                                       // NULL: the first alternative and the first value everywhere
    int row, other, column;
    const char *it, *items, *value;                       // {it}; {items} or {names}; the value of `column`
} Scope;

Scope scope_of(const Domain *d, int row, Random *random) {
    Scope s = { d, random, row, -1, -1, NULL, NULL, NULL };
    return s;
}

// The k-th of the values a|b|c, without end mark; returns its length. k is taken modulo their number.
const char *value_at(const char *values, int k, size_t *n) {
    int count = 1;
    for (const char *p = values; *p; p++) count += *p == '|';
    for (k %= count; k > 0; k--) values = strchr(values, '|') + 1;
    *n = strcspn(values, "|");
    return values;
}

// The value of {name}; false if it is unknown ("-").
bool fill_placeholder(Text *out, const Scope *s, const char *name, size_t n, bool is_star) {
    if (is_word(name, n, "it")) { text_puts(out, s->it); return true; }
    if (is_word(name, n, "items") || is_word(name, n, "names")) { text_puts(out, s->items); return true; }
    int row = s->row;
    if (n > 2 && name[1] == '.') {
        row = name[0] == 'a' ? s->row : s->other;
        name += 2;
        n -= 2;
    }
    int column = find_column(s->domain, name, n);
    const char *value = column == s->column ? s->value : cell(s->domain, row, column);
    if (!strcmp(value, "-")) return false;
    if (is_star) value = value_at(value, s->random ? random_below(s->random, 1 << 20) : 0, &n);
    else n = strlen(value);
    for (const char *p = value; p < value + n; p++) {                          // a|b|c is printed as a、b、c
        if (*p == '|') text_puts(out, "、");
        else text_add(out, p, 1);
    }
    return true;
}

// Appends the template filled in; false if a value is unknown, then `out` is as before.
bool fill_range(Text *out, const Scope *s, const char *p, const char *end) {
    size_t start = out->size;
    for (; p < end; p++) {
        bool is_known = true;
        if (*p == '<') {
            const char *close = strchr(p, '>');
            int count = 1;
            for (const char *q = p; q < close; q++) count += *q == '|';
            const char *first = p + 1, *last;
            for (int k = s->random ? random_below(s->random, count) : 0; k > 0; k--) first = strchr(first, '|') + 1;
            last = first + strcspn(first, "|>");
            is_known = fill_range(out, s, first, last);
            p = close;
        } else if (*p == '{') {
            const char *name = p;
            size_t n = 0;
            bool is_star = false;
            p = next_placeholder(p, &name, &n, &is_star) - 1;
            is_known = fill_placeholder(out, s, name, n, is_star);
        } else if (p[0] == '\\' && p[1] == 'n') {
            text_puts(out, "\n");
            p++;
        } else text_add(out, p, 1);
        if (!is_known) {
            text_cut(out, start);
            return false;
        }
    }
    return true;
}
bool fill(Text *out, const Scope *s, const char *template_text) {
    return fill_range(out, s, template_text, template_text + strlen(template_text));
}

// A random line of this kind; from there on the first that can be filled, NULL if none can.
const Template *fill_any(Text *out, const Scope *s, Kind kind) {
    int n = s->domain->count[kind], first = n ? random_below(s->random, n) : 0;
    for (int i = 0; i < n; i++) {
        const Template *t = &s->domain->templates[kind][(first + i) % n];
        if (fill(out, s, t->left)) return t;
    }
    return NULL;
}

// The next sentence of a fact, in turn, so that every phrasing of every fact gets written.
bool fill_say(Text *out, const Scope *s, int fact) {
    const Domain *d = s->domain;
    int *turn = &d->turn[s->row * d->num_facts + fact], n = d->facts[fact].count[KIND_SAY], first = d->facts[fact].first[KIND_SAY];
    for (int i = 0; i < n; i++) {
        *turn = (*turn + 1) % n;
        if (fill(out, s, d->templates[KIND_SAY][first + *turn].left)) return true;
    }
    return false;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Questions: when two entities have the same question, and wrong answers

bool has_value(const char *values, const char *value, size_t n) { return is_in_list(values, '|', value, n); }

bool share_value(const char *a, const char *b) {
    for (const char *p = a, *end; p; p = end ? end + 1 : NULL) {
        end = strchr(p, '|');
        if (has_value(b, p, strcspn(p, "|"))) return true;
    }
    return false;
}

// True if the question of `row` could as well be asked of `other`: every placeholder has the same value, a {column*} one in common.
bool is_same_question(const Domain *d, const char *question, int row, int other) {
    const char *name;
    size_t n;
    bool is_star;
    for (const char *p = question; (p = next_placeholder(p, &name, &n, &is_star)) != NULL; ) {
        int c = find_column(d, name, n);
        if (!(is_star ? share_value(cell(d, row, c), cell(d, other, c)) : !strcmp(cell(d, row, c), cell(d, other, c)))) return false;
    }
    return true;
}

void mark_ambiguous(Domain *d, Template *t) {
    static Text a, b;
    t->is_ambiguous = (bool *)xcalloc((size_t)d->num_rows, sizeof(bool));
    for (int row = 0; row < d->num_rows; row++) {
        Scope s = scope_of(d, row, NULL);
        for (int other = 0; other < row; other++) {
            if (!is_same_question(d, t->left, row, other)) continue;
            Scope o = scope_of(d, other, NULL);
            text_cut(&a, 0);
            text_cut(&b, 0);
            if (!fill(&a, &s, t->right) || !fill(&b, &o, t->right) || !strcmp(a.data, b.data)) continue;
            t->is_ambiguous[row] = t->is_ambiguous[other] = true;
        }
    }
}

// Question and answer of a row; false if a value is unknown or if the question has several answers.
bool fill_question(Text *question, Text *answer, const Scope *s, const Template *t) {
    text_cut(question, 0);
    text_cut(answer, 0);
    return !(t->is_ambiguous && t->is_ambiguous[s->row]) && fill(question, s, t->left) && fill(answer, s, t->right);
}

// Is a value of the row's own (in the columns of the answer) part of the candidate or the other way round?
bool is_right_answer(const Scope *s, const char *answer_template, const char *answer, const char *candidate) {
    if (strstr(answer, candidate) || strstr(candidate, answer)) return true;
    const char *name;
    size_t n;
    bool is_star;
    for (const char *p = answer_template; (p = next_placeholder(p, &name, &n, &is_star)) != NULL; ) {
        if (strstr(cell(s->domain, s->row, find_column(s->domain, name, n)), candidate)) return true;
    }
    return false;
}

// Up to `count` different wrong answers: what the template answers for other entities. Returns how many were found.
int wrong_answers(Text *wrong, int count, const Scope *s, const Template *t, const char *answer) {
    int found = 0;
    for (int tries = 0; tries < 200 && found < count; tries++) {
        Scope other = *s;
        other.row = random_below(s->random, s->domain->num_rows);
        text_cut(&wrong[found], 0);
        if (is_same_question(s->domain, t->left, s->row, other.row) || !fill(&wrong[found], &other, t->right)) continue;
        bool is_usable = !is_right_answer(s, t->right, answer, wrong[found].data);
        for (int i = 0; i < found; i++) is_usable = is_usable && strcmp(wrong[i].data, wrong[found].data);
        found += is_usable;
    }
    return found;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Texts

typedef struct { uint64_t answer; const char *path; int line; bool is_held; } Asked;

typedef struct {
    Domain *domains, common;                              // common: openers, closers, forms of dialogs and instructions, from common.txt
    int num_domains, size;
    uint64_t seed;
    Map documents, questions;                             // texts already written; questions already asked, index in `asked`
    Asked *asked;
    int num_asked;
} Corpus;

static Corpus corpus;

// A stream of its own for each (domain, file, copy), so that a new table or a changed file leaves the others as they were.
Random random_for(const Domain *d, const char *purpose, int copy) {
    uint64_t h = hash_string(hash_string(1469598103934665603ull ^ corpus.seed, d->name), purpose);
    Random r = { h + (uint64_t)copy * 0xD1B54A32D192ED03ull };
    return r;
}

// A line of common.txt about the row. question, answer, options (the texts of {A} to {D}) are NULL where there are none.
void fill_common(Text *out, const Scope *s, Kind kind, const char *question, const char *answer, const Text *options) {
    char *values[8] = { cell(s->domain, s->row, 0), s->domain->title, (char *)question, (char *)answer };
    for (int i = 0; i < 4; i++) values[4 + i] = options ? options[i].data : NULL;
    for (int i = 0; i < 8; i++) if (!values[i]) values[i] = (char *)"-";
    corpus.common.cells = values;
    Scope frame = scope_of(&corpus.common, 0, s->random);
    CHECK(fill_any(out, &frame, kind), "common.txt has no line '%s' that can be filled in here", kind_names[kind]);
}

// The numbers of the facts, some left out, in the order of the file or shuffled.
int choose_facts(const Scope *s, int percent, int percent_shuffled, int *facts) {
    int n = 0;
    for (int f = 0; f < s->domain->num_facts; f++) if (random_percent(s->random, percent)) facts[n++] = f;
    if (random_percent(s->random, percent_shuffled)) shuffle(facts, n, s->random);
    return n;
}

// One sentence about a fact. The entity is named at the first mention in a paragraph, later mostly by a pronoun.
bool add_say(Text *out, Scope *s, int fact, bool is_first) {
    static Text it;
    size_t start = out->size;
    text_cut(&it, 0);
    if (is_first || random_percent(s->random, 25)) text_puts(&it, cell(s->domain, s->row, 0));
    else fill_any(&it, s, KIND_IT);
    if (!is_first && random_percent(s->random, 8)) fill_common(out, s, KIND_LINK, NULL, NULL, NULL);
    s->it = it.data;
    if (fill_say(out, s, fact)) return true;
    text_cut(out, start);
    return false;
}

// Up to `limit` facts in random order.
int add_facts(Text *out, Scope *s, int limit, bool is_named) {
    int facts[MAX_FACTS], n = choose_facts(s, 100, 100, facts), told = 0;
    for (int i = 0; i < n && told < limit; i++) told += add_say(out, s, facts[i], is_named && !told);
    return told;
}

// Has the intro told this fact: does it use every column of the fact's first sentence?
bool is_in_intro(const Domain *d, int fact, const char *intro) {
    const char *name;
    size_t n;
    bool is_star;
    const char *say = d->templates[KIND_SAY][d->facts[fact].first[KIND_SAY]].left;
    while ((say = next_placeholder(say, &name, &n, &is_star)) != NULL) {
        const char *other;
        size_t m;
        bool is_used = is_word(name, n, "it");
        for (const char *q = intro; !is_used && (q = next_placeholder(q, &other, &m, &is_star)) != NULL; ) {
            is_used = n == m && !memcmp(name, other, n);
        }
        if (!is_used) return false;
    }
    return true;
}

// An intro and most of the other facts, in one or two paragraphs.
void write_article(Text *out, Scope *s) {
    int facts[MAX_FACTS], n = choose_facts(s, 95, 50, facts);
    int split = n > 3 && random_percent(s->random, 60) ? n / 2 : n;            // the fact that begins the second paragraph
    const Template *intro = fill_any(out, s, KIND_INTRO);
    for (int i = 0; i < n && intro; i++) {
        size_t before = out->size;
        if (i == split) text_puts(out, "\n");
        if (is_in_intro(s->domain, facts[i], intro->left) || !add_say(out, s, facts[i], i == split)) text_cut(out, before);
    }
}

// Opener, two or three facts, sometimes a closing sentence.
void write_prose(Text *out, Scope *s) {
    if (!s->domain->count[KIND_INTRO]) return;
    fill_common(out, s, KIND_OPENER, NULL, NULL, NULL);
    int told = add_facts(out, s, 3, true);
    if (random_percent(s->random, 40)) fill_common(out, s, KIND_CLOSER, NULL, NULL, NULL);
    if (!told) text_cut(out, 0);
}

// A random ask or held line of the fact.
const Template *any_question(const Scope *s, Kind kind, int fact) {
    const Fact *f = &s->domain->facts[fact];
    return &s->domain->templates[kind][f->first[kind] + random_below(s->random, f->count[kind])];
}

// One to four questions about an entity with their answers.
void write_dialog(Text *out, Scope *s) {
    static Text question, answer;
    int facts[MAX_FACTS], n = choose_facts(s, 100, 100, facts);
    for (int i = 0, told = 0; i < n && told < 4; i++) {
        if (!fill_question(&question, &answer, s, any_question(s, KIND_ASK, facts[i]))) continue;
        if (told++) text_puts(out, "\n");
        fill_common(out, s, KIND_DIALOG, question.data, answer.data, NULL);
    }
}

// {items}: the item filled in for 3 to 6 random rows, joined by ， or, where an item has a ， of its own, by ；
bool add_list(Text *out, Scope *s, const Template *t) {
    static Text items;
    int rows[8], found = 0, want = 3 + random_below(s->random, 4);
    text_cut(&items, 0);
    for (int tries = 0; tries < 40 && found < want; tries++) {
        bool is_used = false;
        s->row = rows[found] = random_below(s->random, s->domain->num_rows);
        for (int i = 0; i < found; i++) is_used = is_used || rows[i] == rows[found];
        size_t before = items.size;
        if (is_used) continue;
        if (found) text_puts(&items, strstr(t->left, "，") ? "；" : "，");
        if (fill(&items, s, t->left)) found++;
        else text_cut(&items, before);
    }
    s->items = items.data;
    return found >= 3 && fill(out, s, t->right);
}

// {names}: 3 to 6 entities that share one value of the column.
bool add_group(Text *out, Scope *s, const Template *t) {
    static Text names, value;
    const Domain *d = s->domain;
    int *rows = (int *)xmalloc((size_t)d->num_rows * sizeof(int)), n = 0, want = 3 + random_below(s->random, 4);
    size_t length;
    s->row = random_below(s->random, d->num_rows);
    const char *start = value_at(cell(d, s->row, t->column), random_below(s->random, 1 << 20), &length);
    text_cut(&names, 0);
    text_cut(&value, 0);
    text_add(&value, start, length);
    for (int r = 0; r < d->num_rows; r++) if (has_value(cell(d, r, t->column), value.data, length)) rows[n++] = r;
    shuffle(rows, n, s->random);
    for (int i = 0; i < n && i < want; i++) {
        if (i) text_puts(&names, "、");
        text_puts(&names, cell(d, rows[i], 0));
    }
    free(rows);
    Scope group = *s;
    group.items = names.data;
    group.column = t->column;
    group.value = value.data;
    return n >= 3 && strcmp(value.data, "-") && fill(out, &group, t->right);
}

double number_at(const Domain *d, int row, int column) {
    char *value = cell(d, row, column);
    return strcmp(value, "-") ? strtod(value, NULL) : NAN;
}

// compare: {a.*} has the larger number. next: {b.*} has the smallest number above that of {a.*}, if only one entity has it.
bool add_pair(Text *out, Scope *s, const Template *t, Kind kind) {
    const Domain *d = s->domain;
    int a = random_below(s->random, d->num_rows), b = random_below(s->random, d->num_rows), ties = 1;
    double number = number_at(d, a, t->column);
    if (kind == KIND_NEXT) {
        for (int r = ties = b = 0; r < d->num_rows; r++) {
            double candidate = number_at(d, r, t->column);
            if (candidate > number && (!ties || candidate < number_at(d, b, t->column))) { b = r; ties = 1; }
            else if (ties && candidate == number_at(d, b, t->column)) ties++;
        }
    } else if (number < number_at(d, b, t->column)) { int swap = a; a = b; b = swap; }
    s->row = a;
    s->other = b;
    bool is_strict = kind == KIND_NEXT ? ties == 1 : number_at(d, a, t->column) > number_at(d, b, t->column);
    return is_strict && fill(out, s, t->right);
}

// Two to four statements about several entities of the domain: single facts, lists, groups, comparisons, neighbours.
void write_mixture(Text *out, Scope *s) {
    const Domain *d = s->domain;
    bool is_used[NUM_KINDS] = { false };                                       // each kind at most once, single facts as often as they come
    int want = 2 + random_below(s->random, 3);
    for (int tries = 0, told = 0; tries < 40 && told < want; tries++) {
        int kind = random_percent(s->random, 40) ? KIND_SAY : KIND_LIST + random_below(s->random, 4);
        if (is_used[kind]) continue;
        size_t before = out->size;
        bool is_known = false;
        if (kind == KIND_SAY) {
            s->row = random_below(s->random, d->num_rows);
            is_known = add_say(out, s, random_below(s->random, d->num_facts), true);
        } else if (d->count[kind]) {
            const Template *t = &d->templates[kind][random_below(s->random, d->count[kind])];
            if (kind == KIND_LIST) is_known = add_list(out, s, t);
            else if (kind == KIND_GROUP) is_known = add_group(out, s, t);
            else is_known = add_pair(out, s, t, (Kind)kind);
        }
        if (!is_known) text_cut(out, before);
        is_used[kind] = is_known && kind != KIND_SAY;
        told += is_known;
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Records and files

typedef struct { char **lines, *line; size_t size; int count, capacity; FILE *f; } Records;

FILE *begin_record(Records *r) {
    r->f = open_memstream(&r->line, &r->size);
    CHECK(r->f != NULL, "cannot keep a record in memory: %s", strerror(errno));
    return r->f;
}
void end_record(Records *r) {
    CHECK(fclose(r->f) == 0, "cannot keep a record in memory: %s", strerror(errno));
    if (r->count == r->capacity) {
        r->capacity = 2 * r->capacity + 1024;
        r->lines = (char **)xrealloc(r->lines, (size_t)r->capacity * sizeof(char *));
    }
    r->lines[r->count++] = r->line;
}

// ,"key":"value"; `before` is what stands in place of the comma.
void write_member(FILE *f, const char *before, const char *key, const char *value) {
    fprintf(f, "%s\"%s\":", before, key);
    json_write_string(f, value, strlen(value));
}

// A record with the members key, value, key, value, ... up to NULL.
void add_object(Records *r, const char *key, ...) {
    va_list members;
    va_start(members, key);
    FILE *f = begin_record(r);
    for (const char *before = "{"; key; before = ",", key = va_arg(members, const char *)) {
        write_member(f, before, key, va_arg(members, const char *));
    }
    va_end(members);
    putc('}', f);
    end_record(r);
}

bool is_new_text(const char *text) {
    bool is_new;
    map_find(&corpus.documents, hash_string(7, text), &is_new);
    return is_new;
}

void add_text(Records *r, const char *key, void (*write)(Text *, Scope *), Scope *s) {
    static Text text;
    text_cut(&text, 0);
    write(&text, s);
    if (text.size && is_new_text(text.data)) add_object(r, key, text.data, NULL);
}

void add_wiki(Records *r, Scope *s) { add_text(r, "completion", write_article, s); }
void add_web(Records *r, Scope *s) {
    add_text(r, "text", write_prose, s);
    add_text(r, "text", write_dialog, s);
    add_text(r, "text", write_mixture, s);
}

// An article with headings. Facts with the same heading stand in one section, at the place of the first.
void add_baike(Records *r, Scope *s) {
    static Text text;
    const Fact *fact = s->domain->facts;
    int facts[MAX_FACTS], n = choose_facts(s, 100, 50, facts), num_sections = 0;
    text_cut(&text, 0);
    if (!fill_any(&text, s, KIND_INTRO)) return;
    if (random_percent(s->random, 50)) add_facts(&text, s, 1, false);
    FILE *f = begin_record(r);
    write_member(f, "{", "title", cell(s->domain, s->row, 0));
    write_member(f, ",", "summary", text.data);
    fputs(",\"sections\":[", f);
    for (int i = 0; i < n; i++) {
        bool is_told = false;
        for (int k = 0; k < i; k++) is_told = is_told || !strcmp(fact[facts[k]].heading, fact[facts[i]].heading);
        text_cut(&text, 0);
        for (int k = i; k < n && !is_told; k++) {
            if (!strcmp(fact[facts[k]].heading, fact[facts[i]].heading)) add_say(&text, s, facts[k], !text.size);
        }
        if (!text.size) continue;
        write_member(f, num_sections++ ? ",{" : "{", "title", fact[facts[i]].heading);
        write_member(f, ",", "content", text.data);
        putc('}', f);
    }
    fputs("]}", f);
    end_record(r);
    if (!num_sections || !is_new_text(r->line)) r->count--;
}

// True the first time a question is seen. A question with two answers, or in training and held out, is an error of the tables.
bool is_new_question(const char *question, const char *answer, const char *path, int line, bool is_held) {
    bool is_new;
    int *index = map_find(&corpus.questions, hash_string(11, question), &is_new);
    uint64_t h = hash_string(13, answer);
    if (is_new) {
        *index = corpus.num_asked++;
        if ((*index & 1023) == 0) corpus.asked = (Asked *)xrealloc(corpus.asked, (size_t)(*index + 1024) * sizeof(Asked));
        Asked asked = { h, path, line, is_held };
        corpus.asked[*index] = asked;
        return true;
    }
    const Asked *a = &corpus.asked[*index];
    CHECK(a->answer == h, "%s:%d: %s has the answer %s here, another one in %s:%d", path, line, question, answer, a->path, a->line);
    CHECK(a->is_held == is_held, "%s:%d: %s is a training and a held-out question (also in %s:%d)", path, line, question, a->path, a->line);
    return false;
}

// The question, twice if it has <a|b>; of the training questions one in eight stands in "input", after an instruction, and of the others
// three in four have more words in the answer than were asked for, as collected answers do.
void add_question(Records *r, Scope *s, const Template *t, bool is_held) {
    static Text question, answer, instruct, reply;
    for (int draws = !is_held && strchr(t->left, '<') ? 2 : 1; draws > 0; draws--) {
        if (!fill_question(&question, &answer, s, t)) return;
        if (!is_new_question(question.data, answer.data, s->domain->path, t->line, is_held)) continue;
        text_cut(&reply, 0);
        text_cut(&instruct, 0);
        bool is_input = !is_held && random_percent(s->random, 12);
        if (is_input) fill_common(&instruct, s, KIND_INSTRUCT, NULL, NULL, NULL);
        bool is_wordy = !is_held && !is_input && random_percent(s->random, 75);
        if (is_wordy) fill_common(&reply, s, KIND_WORDY, question.data, answer.data, NULL);
        else text_puts(&reply, answer.data), text_puts(&reply, "。");
        add_object(r, "instruction", is_input ? instruct.data : question.data, "input", is_input ? question.data : "",
                   "output", reply.data, NULL);
    }
}

// Four answers in `options`, the right one at `position`; false if there are not enough wrong ones.
bool fill_options(Text *options, const Scope *s, const Template *t, const char *answer, int position) {
    static Text wrong[3];
    if (wrong_answers(wrong, 3, s, t, answer) < 3) return false;
    for (int i = 0, k = 0; i < 4; i++) {
        text_cut(&options[i], 0);
        text_puts(&options[i], i == position ? answer : wrong[k++].data);
    }
    return true;
}

// All questions of the row, one of them again with four choices, and "tell me about ...".
void add_sft(Records *r, Scope *s) {
    static Text question, answer, options[4], text;
    const Domain *d = s->domain;
    for (int i = 0; i < d->count[KIND_ASK]; i++) add_question(r, s, &d->templates[KIND_ASK][i], false);
    const Template *t = &d->templates[KIND_ASK][random_below(s->random, d->count[KIND_ASK])];
    int position = random_below(s->random, 4);
    if (fill_question(&question, &answer, s, t) && fill_options(options, s, t, answer.data, position)) {
        const char *letters[] = { "A", "B", "C", "D" };
        text_cut(&text, 0);
        fill_common(&text, s, KIND_CHOICE, question.data, answer.data, options);
        add_object(r, "instruction", text.data, "input", "", "output", letters[position], NULL);
    }
    text_cut(&text, 0);
    if (!fill_any(&text, s, KIND_INTRO)) return;
    add_facts(&text, s, 3, false);
    text_cut(&question, 0);
    fill_common(&question, s, KIND_DESCRIBE, NULL, NULL, NULL);
    add_object(r, "instruction", question.data, "input", "", "output", text.data, NULL);
}
void add_sft_heldout(Records *r, Scope *s) {
    for (int i = 0; i < s->domain->count[KIND_HELD]; i++) add_question(r, s, &s->domain->templates[KIND_HELD][i], true);
}

typedef enum { WRONG, WORDY, UNSURE } Worse;

// The right answer against a wrong one, itself in more words, or a reply that says nothing.
void add_preference(Records *r, Scope *s, const Template *t, Worse worse) {
    static Text question, answer, wrong;
    if (!fill_question(&question, &answer, s, t)) return;
    text_cut(&wrong, 0);
    if (worse == WRONG && wrong_answers(&wrong, 1, s, t, answer.data) < 1) return;
    if (worse == WRONG) text_puts(&wrong, "。");
    else fill_common(&wrong, s, worse == WORDY ? KIND_WORDY : KIND_UNSURE, question.data, answer.data, NULL);
    text_puts(&answer, "。");
    add_object(r, "prompt", question.data, "chosen", answer.data, "rejected", wrong.data, NULL);
}
void add_dpo(Records *r, Scope *s) {
    const Worse worse[] = { WRONG, WRONG, WORDY, WORDY, UNSURE };
    for (int f = 0; f < s->domain->num_facts; f++) {
        Worse w = worse[random_below(s->random, 5)];             // drawn first: C leaves the order of arguments open
        add_preference(r, s, any_question(s, KIND_ASK, f), w);
    }
}
void add_dpo_facts(Records *r, Scope *s) {
    for (int f = 0; f < s->domain->num_facts; f++) add_preference(r, s, any_question(s, KIND_HELD, f), WRONG);
}
void add_dpo_style(Records *r, Scope *s) {
    for (int f = 0; f < s->domain->num_facts; f++) add_preference(r, s, any_question(s, KIND_HELD, f), WORDY);
}

void csv_field(FILE *f, const char *text, const char *before) {
    bool is_quoted = strpbrk(text, ",\"\n") != NULL;
    fprintf(f, "%s%s", before, is_quoted ? "\"" : "");
    for (const char *p = text; *p; p++) fprintf(f, *p == '"' ? "\"\"" : "%c", *p);
    if (is_quoted) putc('"', f);
}

// One question as a C-Eval row, explained by a sentence of its fact if it is an example; false if it has too few answers.
bool add_csv(Records *r, Scope *s, const Template *t, int position, bool is_example) {
    static Text question, answer, options[4], text;
    if (!fill_question(&question, &answer, s, t) || strstr(question.data, answer.data)) return false;
    if (!fill_options(options, s, t, answer.data, position)) return false;
    FILE *f = begin_record(r);
    fprintf(f, "%d", r->count);
    csv_field(f, question.data, ",");
    for (int i = 0; i < 4; i++) csv_field(f, options[i].data, ",");
    fprintf(f, ",%c", "ABCD"[position]);
    text_cut(&text, 0);
    add_say(&text, s, t->fact, true);
    if (is_example) csv_field(f, text.data, ",");
    end_record(r);
    return true;
}

void write_records(const char *folder, const char *name, const Records *r, const char *head, const char *between, const char *tail) {
    char path[1024];
    CHECK(snprintf(path, sizeof path, "%s/%s", folder, name) < (int)sizeof path, "%s/%s: the path is too long", folder, name);
    AtomicFile a = open_atomic(path);
    fputs(head, a.file);
    for (int i = 0; i < r->count; i++) fprintf(a.file, "%s%s", i ? between : "", r->lines[i]);
    fputs(tail, a.file);
    if (!strstr(folder, "/mc/")) printf("%-34s %6d records, %4.1f MB\n", path, r->count, (double)ftell(a.file) / 1e6);
    close_atomic(&a);
}

// 5 examples and up to 40 questions of a domain; in every four of them A, B, C and D are right once, in random order.
void write_choices(const Domain *d, const char *val_folder, const char *dev_folder) {
    static Records none;
    Records val = none, dev = none;
    Random random = random_for(d, "mc", 0);
    int total = d->num_rows * d->count[KIND_MC], *order = (int *)xmalloc((size_t)total * sizeof(int)), positions[4] = { 0, 1, 2, 3 };
    for (int i = 0; i < total; i++) order[i] = i;
    shuffle(order, total, &random);
    for (int i = 0; i < total && val.count < 40; i++) {
        bool is_example = dev.count < 5;
        Records *r = is_example ? &dev : &val;
        Scope s = scope_of(d, order[i] / d->count[KIND_MC], &random);
        if (r->count % 4 == 0) shuffle(positions, 4, &random);
        add_csv(r, &s, &d->templates[KIND_MC][order[i] % d->count[KIND_MC]], positions[r->count % 4], is_example);
    }
    free(order);
    char name[256];
    snprintf(name, sizeof name, "%s_val.csv", d->name);
    write_records(val_folder, name, &val, "id,question,A,B,C,D,answer\n", "\n", "\n");
    snprintf(name, sizeof name, "%s_dev.csv", d->name);
    write_records(dev_folder, name, &dev, "id,question,A,B,C,D,answer,explanation\n", "\n", "\n");
}

// All records of one file: `copies` passes over the entities of every domain, then shuffled. wiki.json is an array, the others lines.
void write_file(const char *folder, const char *name, void (*add)(Records *, Scope *), int copies, bool is_array) {
    static Records none;
    Records r = none;
    for (int i = 0; i < corpus.num_domains; i++) {
        for (int copy = 0; copy < copies; copy++) {
            const Domain *d = &corpus.domains[i];
            Random random = random_for(d, name, copy);
            for (int row = 0; row < d->num_rows; row++) {
                Scope s = scope_of(d, row, &random);
                add(&r, &s);
            }
        }
    }
    Random random = random_for(&corpus.common, name, 0);
    for (int i = r.count - 1; i > 0; i--) {
        int j = random_below(&random, i + 1);
        char *swap = r.lines[i];
        r.lines[i] = r.lines[j];
        r.lines[j] = swap;
    }
    write_records(folder, name, &r, is_array ? "[\n" : "", is_array ? ",\n" : "\n", is_array ? "\n]\n" : "\n");
}

// ---------------------------------------------------------------------------------------------------------------------------------
// main

int compare_names(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

void load_domain(Domain *d, const char *folder, const char *name) {
    const char *common_columns[] = { "name", "domain", "question", "answer", "A", "B", "C", "D" };     // in the order of fill_common
    static Text path;
    text_cut(&path, 0);
    text_puts(&path, folder);
    text_puts(&path, "/");
    text_puts(&path, name);
    d->name = copy_string(name, strlen(name) - 4);
    d->path = copy_string(path.data, path.size);
    text_cut(&path, path.size - 4);
    text_puts(&path, ".tsv");
    bool is_common = d == &corpus.common;
    if (is_common) set_columns(d, (char **)common_columns, 8);
    else if (!load_rule(d)) load_table(d, path.data);
    load_templates(d);
    if (is_common) return;
    check_domain(d);
    for (int k = KIND_ASK; k <= KIND_HELD; k++) for (int i = 0; i < d->count[k]; i++) mark_ambiguous(d, &d->templates[k][i]);
    Random random = random_for(d, "turn", 0);
    d->turn = (int *)xmalloc((size_t)(d->num_rows * d->num_facts) * sizeof(int));
    for (int i = 0; i < d->num_rows * d->num_facts; i++) d->turn[i] = random_below(&random, 1000);
}

// All domains of the folder, or only the listed ones.
void load_corpus(const char *folder, const char *only) {
    DIR *dir = opendir(folder);
    CHECK(dir != NULL, "cannot open the folder of tables %s: %s; run from the repository's root or give --tables", folder, strerror(errno));
    char **files = NULL;
    int n = 0;
    for (struct dirent *e; (e = readdir(dir)) != NULL; ) {
        if (*e->d_name == '.' || !ends_with(e->d_name, strlen(e->d_name), ".txt")) continue;
        files = (char **)xrealloc(files, (size_t)(n + 1) * sizeof(char *));
        files[n++] = copy_string(e->d_name, strlen(e->d_name));
    }
    closedir(dir);
    CHECK(n > 1, "%s: expected common.txt and at least one other NAME.txt, found %d", folder, n);
    qsort(files, (size_t)n, sizeof(char *), compare_names);
    corpus.domains = (Domain *)xcalloc((size_t)n, sizeof(Domain));
    for (int i = 0; i < n; i++) {
        bool is_common = !strcmp(files[i], "common.txt");
        if (!is_common && only && !is_in_list(only, ',', files[i], strlen(files[i]) - 4)) continue;
        load_domain(is_common ? &corpus.common : &corpus.domains[corpus.num_domains++], folder, files[i]);
    }
    CHECK(corpus.common.path, "%s: there is no common.txt", folder);
    CHECK(corpus.num_domains > 0, "--only %s: %s has no such domain", only, folder);
}

// Entities and facts of every domain; a fact counts for an entity if one of its sentences can be filled in.
void print_domains(void) {
    static Text text;
    int all_entities = 0, all_facts = 0;
    for (int i = 0; i < corpus.num_domains; i++) {
        const Domain *d = &corpus.domains[i];
        int facts = 0;
        for (int row = 0; row < d->num_rows; row++) {
            for (int f = 0; f < d->num_facts; f++) {
                Scope s = scope_of(d, row, NULL);
                s.it = "";
                facts += fill_say(&text, &s, f);
            }
        }
        all_entities += d->num_rows;
        all_facts += facts;
    }
    printf("%d domains, %d entities, %d facts\n", corpus.num_domains, all_entities, all_facts);
}

void make_folder(const char *path) {
    CHECK(mkdir(path, 0777) == 0 || errno == EEXIST, "cannot make the folder %s: %s", path, strerror(errno));
}

void write_corpus(const char *folder) {
    make_folder(folder);
    write_file(folder, "wiki.json", add_wiki, corpus.size, true);
    write_file(folder, "baike.jsonl", add_baike, corpus.size, false);
    write_file(folder, "web.jsonl", add_web, corpus.size, false);
    write_file(folder, "sft.jsonl", add_sft, 1, false);
    write_file(folder, "sft_heldout.jsonl", add_sft_heldout, 1, false);
    write_file(folder, "dpo.jsonl", add_dpo, 1, false);
    write_file(folder, "dpo_heldout_facts.jsonl", add_dpo_facts, 1, false);
    write_file(folder, "dpo_heldout_style.jsonl", add_dpo_style, 1, false);
    char mc[1024], val[1032], dev[1032];
    CHECK(snprintf(mc, sizeof mc, "%s/mc", folder) < (int)sizeof mc, "%s: the path is too long", folder);
    snprintf(val, sizeof val, "%s/val", mc);
    snprintf(dev, sizeof dev, "%s/dev", mc);
    make_folder(mc);
    make_folder(val);
    make_folder(dev);
    for (int i = 0; i < corpus.num_domains; i++) write_choices(&corpus.domains[i], val, dev);
}

void usage(void) {
    printf("usage: generate --out DIR [--tables DIR] [--seed N] [--size N] [--only NAME,NAME]\n"
           "  --out DIR     folder for the corpus, made if it is missing\n"
           "  --tables DIR  folder of the tables and templates (dev/data/tiny_baike)\n"
           "  --seed N      another seed, another choice of phrasings (1)\n"
           "  --size N      articles of each kind per entity, 1 to 100 (1: 3.3 MB for pretraining)\n"
           "  --only A,B    only these domains, by the names of their files: --only provinces,rivers\n");
    exit(0);
}

int main(int argc, char **argv) {
    const char *out = NULL, *only = NULL, *tables = "dev/data/tiny_baike";
    long seed = 1, size = 1;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) usage();
        CHECK(i + 1 < argc, "%s needs a value; see --help", argv[i]);
        char *value = argv[++i], *end = NULL;
        if (!strcmp(argv[i - 1], "--out")) out = value;
        else if (!strcmp(argv[i - 1], "--tables")) tables = value;
        else if (!strcmp(argv[i - 1], "--only")) only = value;
        else if (!strcmp(argv[i - 1], "--seed")) seed = strtol(value, &end, 10);
        else if (!strcmp(argv[i - 1], "--size")) size = strtol(value, &end, 10);
        else DIE("unknown option %s; see --help", argv[i - 1]);
        CHECK(!end || (*value && !*end), "%s: expected a number, got '%s'", argv[i - 1], value);
    }
    CHECK(out, "give a folder to write to: --out DIR; see --help");
    CHECK(size >= 1 && size <= 100, "--size %ld is out of range, expected 1 to 100", size);
    corpus.seed = (uint64_t)seed;
    corpus.size = (int)size;
    load_corpus(tables, only);
    print_domains();
    write_corpus(out);
    return 0;
}

// test_tiny_baike: the generated corpus is the same in every run, valid JSON and CSV, without duplicates; held-out phrasings stay out of
// the training text; faults in tables are reported with file and line. Run from the repository's root.
//     cc -std=c11 -O2 -o build/test_tiny_baike dev/test/test_tiny_baike.c -lm && build/test_tiny_baike
#define main generate_main
#include "../data/tiny_baike/generate.c"
#undef main
#include "test.h"

static const char *tables = "dev/data/tiny_baike";
static char scratch[] = "/tmp/test_tiny_baike.XXXXXX";

// A path below the scratch folder; the last eight stay valid.
const char *in_scratch(const char *name) {
    static char paths[8][256];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", scratch, name);
    return path;
}

void run_generator(const char *out, const char *from, const char *seed, const char *size) {
    const char *arguments[] = { "generate", "--out", out, "--tables", from, "--seed", seed, "--size", size };
    generate_main(9, (char **)arguments);
}

bool generate_in_child(const char *out, const char *seed, const char *size) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        CHECK(freopen("/dev/null", "w", stdout) != NULL, "no /dev/null");
        run_generator(out, tables, seed, size);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static const char *const text_files[] = { "wiki.json", "baike.jsonl", "web.jsonl", "sft.jsonl", "dpo.jsonl",         // for training
                                          "sft_heldout.jsonl", "dpo_heldout_facts.jsonl", "dpo_heldout_style.jsonl" };
enum { NUM_TRAINING = 5, NUM_TEXT_FILES = 8 };

bool is_same_file(const char *a, const char *b) {
    size_t n, m;
    char *x = read_file(a, &n), *y = read_file(b, &m);
    bool is_same = n == m && !memcmp(x, y, n);
    free(x);
    free(y);
    return is_same;
}

void test_determinism(void) {
    check(generate_in_child(in_scratch("one"), "1", "1"), "the tables are in order");
    check(generate_in_child(in_scratch("two"), "1", "1"), "a second run");
    check(generate_in_child(in_scratch("other"), "2", "3"), "a run with another seed and three times the size");
    bool is_same = true, is_other = true;
    for (int i = 0; i < NUM_TEXT_FILES; i++) {
        char one[64], two[64], other[64];
        snprintf(one, sizeof one, "one/%s", text_files[i]);
        snprintf(two, sizeof two, "two/%s", text_files[i]);
        snprintf(other, sizeof other, "other/%s", text_files[i]);
        is_same = is_same && is_same_file(in_scratch(one), in_scratch(two));
        is_other = is_other && !is_same_file(in_scratch(one), in_scratch(other));
    }
    check(is_same, "the same seed gives the same bytes");
    check(is_other, "another seed gives other bytes in every file");
}

// Every member is text; only "input" may be empty. Sections are checked by the same rule.
bool is_record(const Json *record) {
    int members = 0;
    for (const Json *m = record->child; m; m = m->next, members++) {
        if (m->type == JSON_ARRAY) {
            for (const Json *section = m->child; section; section = section->next) if (!is_record(section)) return false;
            if (!m->child) return false;
        } else if (m->type != JSON_STRING || (m->len == 0 && strcmp(m->key, "input"))) return false;
    }
    return record->type == JSON_OBJECT && members > 0;
}

// Joins that templates get wrong easily. Some words contain them: 的的喀喀湖, 自以为是是褒义词还是贬义词.
bool is_clumsy(const char *line) {
    const char *clumsy[] = { "。。", "，，", "、、", "？。", "的的", "是是", "位于位于", "属于属于", "中国中国", "-。", "，。", "、。", "<", "|" };
    const char *text = line + strcspn(line, ":");
    for (size_t k = 0; k < sizeof clumsy / sizeof *clumsy; k++) {
        for (const char *found = text; (found = strstr(found, clumsy[k])) != NULL; found++) {
            if (!strncmp(found, "的的喀喀", 12) || (found - text > 12 && !strncmp(found - 9, "自以为是", 12))) continue;
            printf("     %s in %s\n", clumsy[k], line);
            return true;
        }
    }
    return false;
}

void test_records(const char *folder, const char *name) {
    char path[64];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    char *data = read_file(in_scratch(path), NULL), *cursor = data, *record;
    static Map none;
    Map seen = none;
    int line = 0, count = 0, bad = 0, doubles = 0, clumsy = 0;
    bool is_array = !strcmp(name, "wiki.json");
    JsonError error;
    if (is_array) {
        Json *root = json_parse(data, strlen(data), &error);
        check(root && root->type == JSON_ARRAY, "%s is one JSON array", name);
        json_free(root);
    }
    while ((record = next_line(&cursor, &line)) != NULL) {
        size_t n = strlen(record);
        if (is_array && n < 3) continue;                   // [ and ]
        if (is_array && record[n - 1] == ',') record[--n] = 0;
        Json *root = json_parse(record, n, &error);
        bool is_new;
        map_find(&seen, hash_string(1, record), &is_new);
        bad += !root || !is_record(root);
        doubles += !is_new;
        clumsy += is_clumsy(record + 1);
        count++;
        if (root) json_free(root);
    }
    check(bad == 0 && count > 1000, "%-20s %6d records, %d of them faulty", name, count, bad);
    check(doubles == 0, "%-20s %d duplicates", name, doubles);
    check(clumsy == 0, "%-20s %d clumsy joins", name, clumsy);
    free(data);
}

// All held-out questions, in a map from the hash of their first 12 bytes to a chain of texts.
typedef struct { char *text; int next; } HeldOut;
static HeldOut *held_out;
static int num_held_out;
static Map held_out_map;

void add_held_out(const char *text) {
    if (strlen(text) < 12) return;
    if ((num_held_out & 1023) == 0) held_out = (HeldOut *)xrealloc(held_out, (size_t)(num_held_out + 1024) * sizeof(HeldOut));
    bool is_new;
    int *first = map_find(&held_out_map, hash_bytes(3, text, 12), &is_new);
    for (int i = is_new ? -1 : *first; i >= 0; i = held_out[i].next) if (!strcmp(held_out[i].text, text)) return;
    HeldOut h = { copy_string(text, strlen(text)), is_new ? -1 : *first };
    held_out[num_held_out] = h;
    *first = num_held_out++;
}

int count_held_out(const char *text) {
    int found = 0;
    size_t n = strlen(text);
    for (size_t i = 0; i + 12 <= n; i++) {
        if (((unsigned char)text[i] & 0xC0) == 0x80) continue;                 // inside a character
        uint64_t key = hash_bytes(3, text + i, 12);
        size_t slot = key & (held_out_map.capacity - 1);
        while (held_out_map.keys[slot] && held_out_map.keys[slot] != key) slot = (slot + 1) & (held_out_map.capacity - 1);
        for (int h = held_out_map.keys[slot] ? held_out_map.values[slot] : -1; h >= 0; h = held_out[h].next) {
            size_t length = strlen(held_out[h].text);
            if (i + length > n || memcmp(text + i, held_out[h].text, length)) continue;
            if (found++ < 3) printf("     found: %s\n", held_out[h].text);
        }
    }
    return found;
}

void collect_held_out(void) {
    const char *files[] = { "one/sft_heldout.jsonl", "one/dpo_heldout_facts.jsonl", "one/dpo_heldout_style.jsonl" };
    const char *keys[] = { "instruction", "prompt", "prompt" };
    for (int i = 0; i < 3; i++) {
        char *cursor = read_file(in_scratch(files[i]), NULL), *record;
        JsonError error;
        for (int line = 0; (record = next_line(&cursor, &line)) != NULL; ) {
            Json *root = json_parse(record, strlen(record), &error);
            add_held_out(json_get(root, keys[i])->text);
            json_free(root);
        }
    }
}

// "a,b" or "a,""b""": the fields of a CSV line, in place; returns their number.
int csv_fields(char *p, char **fields) {
    int n = 0;
    while (n < 10) {
        bool is_quoted = *p == '"';
        char *out = fields[n++] = p += is_quoted;
        while (*p && !(is_quoted ? *p == '"' && p[1] != '"' : *p == ',')) {
            if (is_quoted && *p == '"') p++;
            *out++ = *p++;
        }
        p += is_quoted;
        bool is_last = !*p;
        *out = 0;
        if (is_last) return n;
        p++;
    }
    return n;
}

void test_csv(void) {
    char *line = NULL, *fields[10];
    size_t n;
    FILE *f = open_memstream(&line, &n);
    csv_field(f, "1", "");
    csv_field(f, "甲,乙", ",");
    csv_field(f, "说“丙”和\"丁\"", ",");
    fclose(f);
    int count = csv_fields(line, fields);
    check(count == 3 && !strcmp(fields[1], "甲,乙") && !strcmp(fields[2], "说“丙”和\"丁\""), "CSV: commas and quotes are quoted");
}

// One C-Eval file: columns, four different options, the letters in turn. Its questions are held out too.
bool is_choice_file(const char *path, bool is_dev) {
    char *cursor = read_file(path, NULL), *row, *f[10];
    int line = 0, count = 0, letters[4] = { 0 };
    if (strcmp(next_line(&cursor, &line), is_dev ? "id,question,A,B,C,D,answer,explanation" : "id,question,A,B,C,D,answer")) return false;
    while ((row = next_line(&cursor, &line)) != NULL) {
        if (csv_fields(row, f) != (is_dev ? 8 : 7) || strtol(f[0], NULL, 10) != count++ || f[6][0] < 'A' || f[6][0] > 'D') return false;
        letters[f[6][0] - 'A']++;
        for (int i = 2; i < 6; i++) for (int k = 2; k < i; k++) if (!*f[i] || !strcmp(f[i], f[k])) return false;
        add_held_out(f[1]);
    }
    for (int i = 0; i < 4; i++) if (letters[i] < count / 4 || letters[i] > count / 4 + 1) return false;
    return is_dev ? count == 5 : count >= 15 && count <= 40;
}

void test_choices(void) {
    int bad = 0;
    for (int i = 0; i < corpus.num_domains; i++) {
        char path[128];
        for (int is_dev = 0; is_dev < 2; is_dev++) {
            snprintf(path, sizeof path, "one/mc/%s/%s_%s.csv", is_dev ? "dev" : "val", corpus.domains[i].name, is_dev ? "dev" : "val");
            bool is_good = is_choice_file(in_scratch(path), is_dev);
            if (!is_good) printf("     %s\n", path);
            bad += !is_good;
        }
    }
    check(bad == 0, "%d multiple-choice files: layout, different options, balanced answers; %d bad", 2 * corpus.num_domains, bad);
}

// In how many of 100 pairs the worse answer is the better one and more words; -1 if two are the same.
int percent_wordy(const char *name) {
    char *data = read_file(in_scratch(name), NULL), *cursor = data, *record;
    int line = 0, count = 0, wordy = 0, same = 0;
    JsonError error;
    while ((record = next_line(&cursor, &line)) != NULL) {
        Json *root = json_parse(record, strlen(record), &error);
        const char *chosen = json_get(root, "chosen")->text, *rejected = json_get(root, "rejected")->text;
        wordy += !strncmp(rejected, chosen, strlen(chosen));
        same += !strcmp(rejected, chosen);
        count++;
        json_free(root);
    }
    free(data);
    return same ? -1 : (int)lround(100.0 * wordy / count);
}

void test_pairs(void) {
    int training = percent_wordy("one/dpo.jsonl"), facts = percent_wordy("one/dpo_heldout_facts.jsonl"), style = percent_wordy("one/dpo_heldout_style.jsonl");
    check(abs(training - 40) <= 2 && facts == 0 && style == 100, "the worse answer is the better one in more words in %d, %d, %d of 100 pairs", training, facts, style);
}

void test_held_out(void) {
    for (int i = 0; i < NUM_TRAINING; i++) {
        char path[64];
        snprintf(path, sizeof path, "one/%s", text_files[i]);
        char *data = read_file(in_scratch(path), NULL);
        int found = count_held_out(data);
        check(found == 0, "%-20s %d of %d held-out questions occur", text_files[i], found, num_held_out);
        free(data);
    }
    char planted[512];
    snprintf(planted, sizeof planted, "前面的话，%s后面的话。", held_out[num_held_out / 2].text);
    check(count_held_out(planted) == 1, "a planted held-out question is found");
}

void test_size(void) {
    int entities = 0;
    for (int i = 0; i < corpus.num_domains; i++) {
        Domain sums = corpus.domains[i];
        if (!load_rule(&sums)) entities += corpus.domains[i].num_rows;
    }
    check(entities >= 1500, "%d entities in tables, at least 1500", entities);
    size_t bytes = 0, n;
    for (int i = 0; i < 3; i++) {
        char path[64];
        snprintf(path, sizeof path, "one/%s", text_files[i]);
        free(read_file(in_scratch(path), &n));
        bytes += n;
    }
    check(bytes > 3000000 && bytes < 6000000, "%.1f MB for pretraining, 3 to 6", (double)bytes / 1e6);
}

// A small domain without faults; each test below puts in one.
static const char *good_table = "name\tcapital\tarea\n甲\t子\t1\n乙\t丑\t2\n丙\t寅\t3\n丁\t卯\t4\n戊\t辰\t-\n";
static const char *good_templates =
    "domain 国\nit 它\nintro {name}是国。\nintro {name}是一国。\nintro 有国叫{name}。\nfact 都\nsay {it}的都是{capital}。\nsay {capital}是{name}的都。\n"
    "say {it}以{capital}为都。\nask {name}的都？ => {capital}\nask {name}何都？ => {capital}\nask {capital}谁都？ => {name}\n"
    "held 问{name}的都名？ => {capital}\nmc {name}都于____。 => {capital}\ncompare area => {a.name}大于{b.name}。\n";

void write_text(const char *path, const char *text) {
    FILE *f = fopen(path, "wb");
    CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0, "cannot write %s", path);
}

void generate_bad(const char *folder) { run_generator(in_scratch("bad_out"), folder, "1", "1"); }

// Replaces `old` in the table or in the templates by `now`; the generator must say `message`.
void check_fault(const char *old, const char *now, const char *message) {
    const char *texts[] = { good_table, good_templates }, *names[] = { "bad/x.tsv", "bad/x.txt" };
    for (int i = 0; i < 2; i++) {
        static Text text;
        const char *at = strstr(texts[i], old);
        text_cut(&text, 0);
        text_add(&text, texts[i], at ? (size_t)(at - texts[i]) : strlen(texts[i]));
        if (at) text_puts(&text, now);
        if (at) text_puts(&text, at + strlen(old));
        write_text(in_scratch(names[i]), text.data);
    }
    check_fails("fault", generate_bad, in_scratch("bad"), message);
}

void test_faults(void) {
    make_folder(in_scratch("bad"));
    check_fails("no tables", generate_bad, in_scratch("nothing"), "cannot open the folder of tables");
    check_fails("no common.txt", generate_bad, in_scratch("bad"), "expected common.txt");
    char *common = read_file("dev/data/tiny_baike/common.txt", NULL);
    write_text(in_scratch("bad/common.txt"), common);
    check_fault("\t丑", "", "x.tsv:3: 2 fields, but the first line names 3 columns");
    check_fault("丙\t寅", "甲\t寅", "x.tsv:4: a second line for 甲");
    check_fault("\t子", "\t", "x.tsv:2: field 2 is empty");
    check_fault("丁\t卯\t4\n戊\t辰\t-\n", "", "3 entities");
    check_fault("\t2\n", "\t二\n", "x.txt:15: column area of 乙 is no number: 二");
    check_fault("{capital}是{name}", "{city}是{name}", "x.txt:8: unknown placeholder {city}");
    check_fault("{it}的都是{capital}", "{it}的都是{capital", "x.txt:7: < or { is not closed");
    check_fault("intro {name}是国", "intr {name}是国", "x.txt:3: unknown keyword intr");
    check_fault("是国。", "是国", "x.txt:3: the sentence does not end");
    check_fault("say {it}以{capital}为都。\n", "", "fact 1 (都) has 2 say, 3 ask, 1 held");
    check_fault("domain 国\n", "", "the line 'domain ...' is missing");
    check_fault("ask {name}的都？ => {capital}", "ask {name}的都？ {capital}", "x.txt:10: 'ask' is written with =>");
    check_fault("ask {name}何都？ => {capital}", "ask {name}的都？ => {name}", "has the answer 甲 here, another one in");
    check_fault("held 问{name}的都名？", "held {name}的都？", "is a training and a held-out question");
    check_fault("=> {capital}\n", "=> {capital*}\n", "x.txt:10: {column*} is one of several right answers");
    check_fault("compare area", "compare size", "x.txt:15: no column size");
    write_text(in_scratch("bad/x.txt"), good_templates);
    write_text(in_scratch("bad/common.txt"), "opener {question}\n");
    check_fails("no opener", generate_bad, in_scratch("bad"), "common.txt has no line 'opener' that can be filled in here");
    unlink(in_scratch("bad/x.tsv"));
    check_fails("no table", generate_bad, in_scratch("bad"), "cannot open");
}

void generate_into(const char *folder) { run_generator(folder, tables, "1", "1"); }

void run_only(const char *names) {
    const char *arguments[] = { "generate", "--out", in_scratch("only"), "--only", names };
    generate_main(5, (char **)arguments);
}

void run_options(const char *option) {
    const char *arguments[] = { "generate", option, "x" };
    generate_main(3, (char **)arguments);
}

void check_options(void) {
    check_fails("unknown option", run_options, "--sized", "unknown option --sized");
    check_fails("no such domain", run_only, "rivers2,x", "--only rivers2,x: dev/data/tiny_baike has no such domain");
    check_fails("no number", run_options, "--size", "--size: expected a number, got 'x'");
    check_fails("output in a file", generate_into, "dev/test/test.h/out", "cannot make the folder dev/test/test.h/out: Not a directory");
    check_fails("no output folder", run_options, "--tables", "give a folder to write to");
}

int main(void) {
    CHECK(mkdtemp(scratch) != NULL, "cannot make %s: %s", scratch, strerror(errno));
    test_determinism();
    test_faults();
    check_options();
    load_corpus(tables, NULL);
    for (int i = 0; i < NUM_TEXT_FILES; i++) test_records("one", text_files[i]);
    for (int i = 0; i < 3; i++) test_records("other", text_files[i]);
    collect_held_out();
    test_csv();
    test_choices();
    test_pairs();
    test_held_out();
    test_size();
    char command[64];
    snprintf(command, sizeof command, "rm -r %s", scratch);
    CHECK(system(command) == 0, "%s did not work", command);
    return verdict();
}

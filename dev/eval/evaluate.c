// evaluate.c: how good is a checkpoint? Perplexity of token files; multiple-choice questions in the files of C-Eval and CMMLU.
//
//   make evaluate && ./evaluate --model out data/tiny_baike/val.bin data/tiny_baike/mc          make evaluatecu for the GPU
//   ./evaluate --model DIR --shots 5 ceval/                          ceval/dev, ceval/val as published
//   ./evaluate --help
//
// A question's answer is the letter that the model finds most likely after the benchmark's own prompt, as in the benchmarks' code. A small
// pretrained model has never seen such letters: --answer text compares the four statements instead. compare.py does the same with
// transformers.
//
// Sections: 1 options | 2 CSV | 3 questions and prompts | 4 multiple choice | 5 perplexity | 6 results | 7 main
#define QWEN_NO_MAIN
#if defined(__CUDACC__) || defined(CUDA_EMU)
#include "../../train_qwen.cu"
#else
#include "../../train_qwen.c"
#endif
#include "../data/chat_template.h"
#include "subjects.h"

// ---------------------------------------------------------------------------------------------------------------------------------
// 1. Options

enum { SPLIT_AUTO };
typedef enum { ANSWER_LETTER, ANSWER_TEXT } AnswerKind;
static const char *const ANSWERS[] = {"letter", "text", NULL};
static const char *const SPLITS[] = {"auto", "val", "test", "dev", NULL};
static struct {
    const char *json, *details;
    int split, chat_template, answer;
    long shots, context, seq, limit;
} eval = {"", "", SPLIT_AUTO, TEMPLATE_NONE, ANSWER_LETTER, 0, 0, 0, 0};

static const Option EVALUATE_OPTIONS[] = {
    {"model",    1, OPTION_STRING, &opt.model,           0, NULL, "a Hugging Face directory, or a run's directory; default: out"},
    {"answer",   1, OPTION_CHOICE, &eval.answer,         0, ANSWERS, "the likeliest letter, or the likeliest statement"},
    {"shots",    1, OPTION_INT,    &eval.shots,          0, NULL, "solved examples before each question, the first of the dev split"},
    {"split",    1, OPTION_CHOICE, &eval.split,          0, SPLITS, "which folder of a directory; auto: val, else test"},
    {"template", 1, OPTION_CHOICE, &eval.chat_template,  0, TEMPLATES, "asks as in a conversation; none: the bare prompt"},
    {"context",  1, OPTION_INT,    &eval.context,        0, NULL, "longest prompt in tokens; 0: the model's, at most 4096"},
    {"seq",      1, OPTION_INT,    &eval.seq,            0, NULL, "tokens of a row for perplexity; 0: the model's, at most 1024"},
    {"limit",    1, OPTION_INT,    &eval.limit,          0, NULL, "first questions of a subject, rows of a token file; 0: all"},
    {"json",     1, OPTION_STRING, &eval.json,           0, NULL, "write the results here; -: to standard output, without the table"},
    {"details",  1, OPTION_STRING, &eval.details,        0, NULL, "write a line of JSON for each question here"},
    {NULL, 0, OPTION_FLAG, NULL, 0, NULL, NULL},
};

// ---------------------------------------------------------------------------------------------------------------------------------
// 2. CSV (RFC 4180): fields between commas; in quotes they may hold commas, line ends and, doubled, quotes

typedef struct { char **fields; int count; long line; } CsvRow;          // line: where it begins, from 1
typedef struct { CsvRow *rows; int count; } Csv;

void check_utf8(const char *path, const char *text, size_t size) {
    long line = 1;
    uint32_t code;
    for (size_t i = 0; i < size; line += text[i] == '\n', i += (size_t)utf8_decode(text + i, size - i, &code)) {
        CHECK(utf8_decode(text + i, size - i, &code) > 0, "%s:%ld: not UTF-8; convert it, for example: iconv -f gb18030 -t utf-8", path,
              line);
        CHECK(text[i] != 0, "%s:%ld: a NUL character; this is no CSV file", path, line);
    }
}

// Takes one field off *at, in place, and moves *at to what ended it: a comma, a line end, or the end of the text.
char *csv_field(char **at, long *line, const char *path) {
    char *from = *at, *start = from, *to = from;
    long opened = *line;
    bool quoted = *from == '"', open = quoted;
    if (quoted) from++;
    for (; *from && (open || (*from != ',' && *from != '\n')); from++) {
        if (*from == '\n') ++*line;
        if (open && *from == '"' && from[1] != '"') { open = false; continue; }
        bool is_line_end = *from == '\r' && (from[1] == '\n' || !from[1]);
        CHECK(!quoted || open || is_line_end, "%s:%ld: text after the closing quote; within quotes, a quote is written twice", path, *line);
        if (open && *from == '"') from++;
        if (open || !is_line_end) *to++ = *from;
    }
    CHECK(!open, "%s:%ld: the quote that opens here is never closed", path, opened);
    if (to < from) *to = 0;                                                // else the caller, who still needs what is there
    *at = from;
    return start;
}

Csv csv_read(const char *path) {
    size_t size;
    char *at = read_file(path, &size);
    check_utf8(path, at, size);
    if (strncmp(at, "\xEF\xBB\xBF", 3) == 0) at += 3;
    Csv csv = {NULL, 0};
    for (long line = 1; *at;) {
        CsvRow row = {NULL, 0, line};
        for (char end = ','; end == ',';) {
            row.fields = (char **)xrealloc(row.fields, (size_t)(row.count + 1) * sizeof(char *));
            row.fields[row.count++] = csv_field(&at, &line, path);
            end = *at;
            if (end) *at++ = 0;
            if (end == '\n') line++;
        }
        if (row.count == 1 && row.fields[0][0] == 0) continue;             // a blank line
        csv.rows = (CsvRow *)xrealloc(csv.rows, (size_t)(csv.count + 1) * sizeof(CsvRow));
        csv.rows[csv.count++] = row;
    }
    return csv;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 3. Questions and prompts

typedef enum { CEVAL, CMMLU } Layout;
static const char *const LAYOUT_NAMES[] = {"C-Eval", "CMMLU"};
typedef struct { const char *text, *options[4]; int answer; } Question;  // answer: 0 to 3
typedef struct { Question *list; int count; Layout layout; } Questions;

int csv_column(const Csv *csv, const char *name) {
    for (int i = 0; i < csv->rows[0].count; i++) if (strcmp(csv->rows[0].fields[i], name) == 0) return i;
    return -1;
}

// C-Eval: id,question,A,B,C,D,answer[,explanation]       CMMLU: ,Question,A,B,C,D,Answer       Other columns are ignored.
Questions questions_read(const char *path) {
    Csv csv = csv_read(path);
    CHECK(csv.count > 0, "%s is empty", path);
    Questions q = {NULL, 0, csv_column(&csv, "Question") >= 0 ? CMMLU : CEVAL};
    const char *const names[] = {q.layout == CMMLU ? "Question" : "question", "A", "B", "C", "D", q.layout == CMMLU ? "Answer" : "answer"};
    int columns[6];
    for (int i = 0; i < 6; i++) {
        columns[i] = csv_column(&csv, names[i]);
        CHECK(columns[i] >= 0, "%s:1: no column %s; expected are id,question,A,B,C,D,answer (C-Eval) or ,Question,A,B,C,D,Answer "
              "(CMMLU)%s", path, names[i], i == 5 ? ". A test split without answers can't be judged: --split val" : "");
    }
    for (int r = 1; r < csv.count; r++) {
        const CsvRow *row = &csv.rows[r];
        CHECK(row->count == csv.rows[0].count, "%s:%ld: %d fields, the first line has %d; a field with commas needs quotes", path,
              row->line, row->count, csv.rows[0].count);
        Question question = {row->fields[columns[0]], {NULL}, 0};
        for (int i = 0; i < 4; i++) question.options[i] = row->fields[columns[1 + i]];
        for (int i = 0; i < (eval.answer == ANSWER_TEXT ? 5 : 1); i++)
            CHECK(row->fields[columns[i]][0], "%s:%ld: column %s is empty", path, row->line, names[i]);
        char letter = 0, rest = 0;
        int found = sscanf(row->fields[columns[5]], " %c %c", &letter, &rest);
        CHECK(found == 1 && letter >= 'A' && letter <= 'D', "%s:%ld: the answer is '%s', it must be A, B, C or D", path, row->line,
              row->fields[columns[5]]);
        question.answer = letter - 'A';
        q.list = (Question *)xrealloc(q.list, (size_t)(q.count + 1) * sizeof(Question));
        q.list[q.count++] = question;
    }
    CHECK(q.count > 0, "%s has no questions, only a first line", path);
    return q;
}

// One file of questions with what stands before them.
typedef struct {
    const char *name, *chinese;                  // of the subject: the file's, and the prompt's
    const Subject *known;                        // NULL: neither benchmark has it
    Questions questions, examples;
} Exam;

void write_question(FILE *f, Layout layout, const Question *q) {
    fprintf(f, "%s%s", layout == CMMLU ? "题目：" : "", q->text);
    for (int i = 0; i < 4; i++) fprintf(f, "\n%c. %s", 'A' + i, q->options[i]);
    fputs(layout == CMMLU ? "\n答案是：" : "\n答案：", f);
}

// The prompts of hkust-nlp/ceval (code/evaluator_series) and haonan-li/CMMLU (src/mp_utils.py), without the `skipped` first examples.
char *exam_prompt(const Exam *e, int index, int skipped) {
    char *text;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    CHECK(f != NULL, "out of memory for a prompt");
    Layout layout = e->questions.layout;
    if (layout == CMMLU) fprintf(f, "以下是关于%s的单项选择题，请直接给出正确答案的选项。\n\n", e->chinese);
    else fprintf(f, "以下是中国关于%s考试的单项选择题，请选出其中的正确答案。\n\n", e->chinese);
    for (int i = skipped; i < eval.shots; i++) {
        write_question(f, layout, &e->examples.list[i]);
        fprintf(f, "%c\n\n", 'A' + e->examples.list[i].answer);
    }
    write_question(f, layout, &e->questions.list[index]);
    fclose(f);
    return text;
}

// folder/val/law_val.csv -> its questions, and the examples from folder/dev/law_dev.csv; CMMLU's files have no _val and _dev.
Exam exam_open(const char *path) {
    Exam e;
    memset(&e, 0, sizeof e);
    const char *slash = strrchr(path, '/'), *file = slash ? slash + 1 : path;
    char *name = strdup(file);
    name[strlen(name) - strlen(".csv")] = 0;
    for (int i = 1; SPLITS[i]; i++) {
        const char *ending = path_of("_%s", SPLITS[i]);
        size_t n = strlen(name), m = strlen(ending);
        if (n > m && strcmp(name + n - m, ending) == 0) name[n - m] = 0;
    }
    e.name = e.chinese = name;
    e.questions = questions_read(path);
    const Subject *table = e.questions.layout == CMMLU ? CMMLU_SUBJECTS : CEVAL_SUBJECTS;
    for (const Subject *s = table; s->name && !e.known; s++) if (strcmp(s->name, name) == 0) e.known = s, e.chinese = s->chinese;
    if (eval.shots == 0) return e;
    const char *folder = slash ? path_of("%.*s/../dev", (int)(slash - path), path) : "../dev";
    const char *examples = path_of(e.questions.layout == CMMLU ? "%s/%s.csv" : "%s/%s_dev.csv", folder, name);
    CHECK(file_exists(examples), "--shots %ld: no examples for %s, there is no %s", eval.shots, path, examples);
    CHECK(!is_inside(path, examples), "--shots %ld: the questions of %s are the examples themselves; choose another --split", eval.shots,
          path);
    e.examples = questions_read(examples);
    CHECK(e.examples.layout == e.questions.layout, "%s is in the layout of %s, %s in that of %s", examples, LAYOUT_NAMES[e.examples.layout],
          path, LAYOUT_NAMES[e.questions.layout]);
    CHECK(e.examples.count >= eval.shots, "--shots %ld: %s has %d examples", eval.shots, examples, e.examples.count);
    return e;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 4. Multiple choice

typedef struct { const Exam *exam; int questions, correct; double probability; } SubjectResult;  // probability: sum of the right answers'
typedef struct {
    const char *path;
    Layout layout;
    SubjectResult *subjects;
    int count, questions, fewer_shots, cut;      // questions whose prompts lost examples, or (even without) their beginning
} ChoiceResult;

typedef struct {
    Model model;
    Tokenizer *tokenizer;
    ChatTemplate chat;
    Sequence sequence;
    int letters[4], context, T;                  // T: --seq
    int end;                                     // the token between texts
    Batch batch;                                 // one row of T tokens
    FILE *details;
    AtomicFile json;
    bool progress;
} Evaluation;

// The prompt's tokens, at most --context of them: examples are dropped, the oldest first, and if that isn't enough the prompt's beginning.
void exam_tokens(const Evaluation *v, const Exam *exam, int index, ChoiceResult *r, TokenList *out) {
    int skipped = 0, excess = 0;
    TokenList content = {NULL, 0, 0};
    for (;; skipped++) {
        char *text = exam_prompt(exam, index, skipped);
        content.count = out->count = 0;
        template_question(&v->chat, v->tokenizer, text, strlen(text), 0, &content);
        free(text);
        template_before(&v->chat, ROLE_USER, true, 0, out);
        size_t before = out->count;
        push_tokens(out, &content, 0);
        template_after(&v->chat, ROLE_USER, 0, out);
        template_before(&v->chat, ROLE_ASSISTANT, false, 0, out);
        excess = (int)out->count - v->context;
        if (excess <= 0) break;
        if (skipped < eval.shots) continue;
        CHECK((size_t)excess < content.count, "--context %d leaves no room for a question", v->context);
        memmove(out->ids + before, out->ids + before + excess, (out->count - before - (size_t)excess) * sizeof(uint32_t));
        out->count -= (size_t)excess;
        break;
    }
    r->fewer_shots += skipped > 0, r->cut += excess > 0;
    free(content.ids);
}

// log p(letter | prompt) of A, B, C, D. Returns the prompt's tokens.
size_t letter_logprobs(Evaluation *v, const Exam *exam, int index, ChoiceResult *r, double logprobs[4]) {
    TokenList prompt = {NULL, 0, 0};
    exam_tokens(v, exam, index, r, &prompt);
    sequence_set(&v->sequence, (const int *)prompt.ids, (int)prompt.count);
    const float *logits = sequence_logits(&v->model, &v->sequence);
    double max = (double)row_max(logits, v->model.config.V), sum = 0;
    for (int i = 0; i < v->model.config.V; i++) sum += exp((double)logits[i] - max);
    for (int i = 0; i < 4; i++) logprobs[i] = (double)logits[v->letters[i]] - max - log(sum);
    CHECK(isfinite(sum), "the model's logits are not finite; its weights are damaged");
    free(prompt.ids);
    return prompt.count;
}

// The question with an option in its blank, a run of _, or where it has none after it: "____是中国的首都。" -> "北京是中国的首都。"
char *statement(const Question *q, int option) {
    const char *text = q->options[option];
    size_t before = strcspn(q->text, "_"), blank = strspn(q->text + before, "_"), size = strlen(q->text) + strlen(text) + 1;
    char *filled = (char *)xmalloc(size);
    snprintf(filled, size, "%.*s%s%s", (int)before, q->text, text, q->text + before + blank);
    return filled;
}

// log p(statement | the end of another text) of the four statements; what goes beyond --seq tokens is not read.
// Returns the longest one's tokens.
size_t statement_logprobs(Evaluation *v, const Question *q, ChoiceResult *r, double logprobs[4]) {
    Batch *batch = &v->batch;
    TokenList list = {NULL, 0, 0};
    size_t longest = 0;
    bool cut = false;
    for (int i = 0; i < 4; i++) {
        char *text = statement(q, i);
        list.count = 0;
        token_list_push(&list, (uint32_t)v->end);
        tokenizer_encode_text(v->tokenizer, text, strlen(text), &list);
        free(text);
        int n = (int)list.count - 1 <= v->T ? (int)list.count - 1 : v->T;
        cut = cut || n < (int)list.count - 1;
        for (int t = 0; t < n; t++) {
            batch->tokens[t] = (int)list.ids[t], batch->targets[t] = (int)list.ids[t + 1];
            batch->start[t] = 0, batch->weights[t] = 1;
        }
        logprobs[i] = -machine_loss(&v->model, batch, 1, n);
        CHECK(isfinite(logprobs[i]), "the loss is not finite; the model's weights are damaged");
        if (list.count > longest) longest = list.count;
    }
    r->cut += cut;
    free(list.ids);
    return longest;
}

SubjectResult exam_run(Evaluation *v, const Exam *exam, ChoiceResult *r) {
    SubjectResult result = {exam, 0, 0, 0};
    int count = eval.limit > 0 && eval.limit < exam->questions.count ? (int)eval.limit : exam->questions.count;
    for (int q = 0; q < count; q++) {
        double logprobs[4], sum = 0;
        const Question *question = &exam->questions.list[q];
        int chosen = 0, answer = question->answer;
        size_t tokens = eval.answer == ANSWER_TEXT ? statement_logprobs(v, question, r, logprobs) :
            letter_logprobs(v, exam, q, r, logprobs);
        for (int i = 1; i < 4; i++) if (logprobs[i] > logprobs[chosen]) chosen = i;
        for (int i = 0; i < 4; i++) sum += exp(logprobs[i] - logprobs[chosen]);
        result.questions++, result.correct += chosen == answer;
        result.probability += exp(logprobs[answer] - logprobs[chosen]) / sum;
        if (v->details) {
            fprintf(v->details, "{\"subject\":");
            json_write_string(v->details, exam->name, strlen(exam->name));
            fprintf(v->details, ",\"question\":%d,\"answer\":\"%c\",\"chosen\":\"%c\",\"tokens\":%zu,", q, 'A' + answer, 'A' + chosen,
                    tokens);
            fprintf(v->details, "\"logprobs\":[%.7g,%.7g,%.7g,%.7g]}\n", logprobs[0], logprobs[1], logprobs[2], logprobs[3]);
        }
        if (v->progress) fprintf(stderr, "\r\033[K%s %d/%d", exam->name, q + 1, count);
    }
    return result;
}

bool ends_with(const char *text, const char *ending) {
    size_t n = strlen(text), m = strlen(ending);
    return n >= m && strcmp(text + n - m, ending) == 0;
}

Names csv_files(const char *folder) {
    Names found = {NULL, 0};
    DIR *directory = opendir(folder);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        if (!ends_with(entry->d_name, ".csv") || entry->d_name[0] == '.') continue;
        found.names = (char **)xrealloc(found.names, (size_t)(found.count + 1) * sizeof(char *));
        found.names[found.count++] = strdup(path_of("%s/%s", folder, entry->d_name));
    }
    if (directory) closedir(directory);
    if (found.count > 0) qsort(found.names, (size_t)found.count, sizeof(char *), compare_strings);
    return found;
}

// The files of questions that `path` stands for: itself, those in it, or those in its val, test or dev.
Names choice_files(const char *path, const char **folder) {
    Names files = {NULL, 0};
    *folder = path;
    if (ends_with(path, ".csv")) {
        files.names = (char **)xmalloc(sizeof(char *));
        files.names[files.count++] = strdup(path);
        return files;
    }
    if (eval.split == SPLIT_AUTO) files = csv_files(path);
    for (int i = 1; SPLITS[i] && files.count == 0; i++)
        if (eval.split == i || (eval.split == SPLIT_AUTO && strcmp(SPLITS[i], "dev") != 0))
            files = csv_files(*folder = path_of("%s/%s", path, SPLITS[i]));
    if (eval.split == SPLIT_AUTO) CHECK(files.count > 0, "%s holds no .csv files, nor do folders val and test in it", path);
    CHECK(files.count > 0, "%s/%s holds no .csv files", path, SPLITS[eval.split]);
    return files;
}

int compare_subjects(const void *a, const void *b) {             // the benchmarks' own order, then others by name
    const Exam *x = ((const SubjectResult *)a)->exam, *y = ((const SubjectResult *)b)->exam;
    if (x->known && y->known) return x->known < y->known ? -1 : x->known > y->known;
    return x->known ? -1 : y->known ? 1 : strcmp(x->name, y->name);
}

ChoiceResult choice_run(Evaluation *v, const char *path) {
    ChoiceResult r;
    memset(&r, 0, sizeof r);
    Names files = choice_files(path, &r.path);
    Exam *exams = (Exam *)xmalloc((size_t)files.count * sizeof(Exam));
    for (int i = 0; i < files.count; i++) {                      // all are read first: an error in the last one should come at once
        exams[i] = exam_open(files.names[i]);
        CHECK(exams[i].questions.layout == exams[0].questions.layout, "%s is in the layout of %s, %s in that of %s", files.names[0],
              LAYOUT_NAMES[exams[0].questions.layout], files.names[i], LAYOUT_NAMES[exams[i].questions.layout]);
    }
    r.layout = exams[0].questions.layout;
    r.subjects = (SubjectResult *)xmalloc((size_t)files.count * sizeof(SubjectResult));
    for (int i = 0; i < files.count; i++) {
        r.subjects[r.count++] = exam_run(v, &exams[i], &r);
        r.questions += r.subjects[i].questions;
    }
    if (v->progress) fputs("\r\033[K", stderr);
    qsort(r.subjects, (size_t)r.count, sizeof(SubjectResult), compare_subjects);
    return r;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 5. Perplexity

// tokens, bytes: of the targets that count. pairs: of a file for dpo; in_order: those whose chosen answer is likelier than the rejected.
typedef struct { const char *path; double nats, tokens, bytes, bigram, pairs, in_order; } TextResult;

// Adds tokens [from, from + count) of a file: rows of at most --seq targets, each without what came before it.
void text_add(Evaluation *v, const Shard *s, uint64_t from, uint64_t count, TextResult *r, long *rows) {
    Model *m = &v->model;
    Batch *batch = &v->batch;
    for (uint64_t at = from; at + 1 < from + count && (eval.limit == 0 || *rows < eval.limit); at += (uint64_t)v->T, ++*rows) {
        uint64_t left = from + count - 1 - at;
        int n = left < (uint64_t)v->T ? (int)left : v->T;
        for (int t = 0; t < n; t++) {
            uint32_t input = s->tokens[at + (uint64_t)t], target = s->tokens[at + (uint64_t)t + 1];
            CHECK((target & TOKEN_ID_MASK) < (uint32_t)m->config.V && (input & TOKEN_ID_MASK) < (uint32_t)m->config.V,
                  "%s: token %" PRIu64 " or the next is not in the model's vocabulary of %d", s->path, at + (uint64_t)t, m->config.V);
            batch->tokens[t] = (int)(input & TOKEN_ID_MASK), batch->targets[t] = (int)(target & TOKEN_ID_MASK), batch->start[t] = 0;
            batch->weights[t] = target & TOKEN_NO_LOSS ? 0.0f : 1.0f;
            if (target & TOKEN_NO_LOSS) continue;
            size_t bytes = 0;
            if (batch->targets[t] < v->tokenizer->num_ranks) tokenizer_bytes(v->tokenizer, target & TOKEN_ID_MASK, &bytes);
            r->tokens++, r->bytes += (double)bytes;
        }
        r->nats += machine_loss(m, batch, 1, n);
        if (v->progress) fprintf(stderr, "\r\033[K%s %.0f %%", s->path, 100.0 * (double)(at + (uint64_t)n) / (double)s->num_tokens);
    }
}

// Of a pretraining file the tokens are one text, as in training; of others, each document is one, and only answers count.
TextResult text_run(Evaluation *v, const char *path) {
    TextResult r = {path, 0, 0, 0, 0, 0, 0};
    Shard s;
    long rows = 0;
    double chosen = 0, before;
    bool is_rejected = false;
    shard_open(&s, path);
    CHECK(s.header->tokenizer_hash == v->tokenizer->hash, "%s was not made with the tokenizer of %s; prepare it again, with "
          "--tokenizer %s", path, opt.model, find_checkpoint(opt.model));
    for (uint64_t from = 0, to; from < s.num_tokens; from = to) {
        to = s.header->task == TASK_PRETRAIN ? s.num_tokens : from + 1;
        while (to < s.num_tokens && !(s.tokens[to] & TOKEN_DOC_START)) to++;
        before = r.nats;
        text_add(v, &s, from, to - from, &r, &rows);
        if (s.header->task != TASK_DPO || (eval.limit > 0 && rows >= eval.limit)) continue;
        if (is_rejected) r.pairs++, r.in_order += chosen < r.nats - before;
        chosen = r.nats - before, is_rejected = !is_rejected;
    }
    if (v->progress) fputs("\r\033[K", stderr);
    CHECK(r.tokens > 0, "%s holds no token to be judged on", path);
    CHECK(isfinite(r.nats), "%s: the loss is not finite; the model's weights are damaged", path);
    r.bigram = (double)s.header->bigram_loss;
    shard_close(&s);
    return r;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 6. Results. Both benchmarks average over subjects, each counting the same.

// Mean accuracy, in %, over the subjects for which `counts` says so; *count is how many those are.
typedef enum { ALL_SUBJECTS = NUM_CATEGORIES, EXTRA_SUBJECTS } Group;     // or a Category
double group_accuracy(const ChoiceResult *r, int group, int *count) {
    double sum = 0;
    *count = 0;
    for (int i = 0; i < r->count; i++) {
        const Subject *known = r->subjects[i].exam->known;
        bool counts = group == ALL_SUBJECTS || (known && (group == EXTRA_SUBJECTS ? known->extra : known->category == (Category)group));
        if (counts) sum += 100.0 * r->subjects[i].correct / r->subjects[i].questions, ++*count;
    }
    return *count > 0 ? sum / *count : 0;
}
const char *group_name(const ChoiceResult *r, int group) {
    if (group < NUM_CATEGORIES) return CATEGORY_NAMES[group];
    return group == ALL_SUBJECTS ? "all" : r->layout == CEVAL ? "Hard" : "China specific";
}

double question_accuracy(const ChoiceResult *r) {                // in %, each question counting the same
    int correct = 0;
    for (int i = 0; i < r->count; i++) correct += r->subjects[i].correct;
    return 100.0 * correct / r->questions;
}

void print_choice(const ChoiceResult *r) {
    printf("\n%s: %s, %d questions, ", r->path, LAYOUT_NAMES[r->layout], r->questions);
    if (eval.answer == ANSWER_TEXT) printf("by statements");
    else printf("%ld-shot", eval.shots);
    if (eval.chat_template != TEMPLATE_NONE) printf(", as %s conversation", TEMPLATES[eval.chat_template]);
    printf("\n  %-44s %9s %10s %10s\n", "subject", "questions", "accuracy", "p(right)");
    for (int i = 0; i < r->count; i++) {
        const SubjectResult *s = &r->subjects[i];
        printf("  %-44s %9d %8.1f %% %8.1f %%\n", s->exam->name, s->questions, 100.0 * s->correct / s->questions,
               100 * s->probability / s->questions);
    }
    printf("\n");
    for (int group = 0; group <= EXTRA_SUBJECTS; group++) {
        int count;
        double accuracy = group_accuracy(r, group, &count);
        if (count > 0) printf("  %-34s %10d subject%s %8.1f %%\n", group_name(r, group), count, count == 1 ? " " : "s", accuracy);
    }
    double p = question_accuracy(r);
    printf("  all questions counting the same %48.1f %%, +- %.1f (chance is 25.0)\n", p, sqrt(p * (100 - p) / r->questions));
    if (r->fewer_shots > 0) printf("  %d prompts were longer than --context: their first examples were dropped\n", r->fewer_shots);
    const char *cut = eval.answer == ANSWER_TEXT ? "have statements longer than --seq: their ends were"
                                                 : "were too long even alone: the beginning was";
    if (r->cut > 0) printf("  %d questions %s cut off\n", r->cut, cut);
}

void print_text(const TextResult *r) {
    double loss = r->nats / r->tokens;
    printf("%s: %.0f tokens, loss %.4f, perplexity %.2f, %.4f bits a byte", r->path, r->tokens, loss, exp(loss),
           r->nats / log(2.0) / (r->bytes > 0 ? r->bytes : 1));
    if (r->bigram > 0) printf("; a bigram model of the training data has a loss of %.4f", r->bigram);
    if (r->pairs > 0) printf("; of %.0f pairs the better answer is likelier in %.1f %%", r->pairs, 100 * r->in_order / r->pairs);
    printf("\n");
}

void json_member(FILE *f, const char *name, const char *text) {
    fprintf(f, "\"%s\":", name);
    json_write_string(f, text, strlen(text));
}

void json_choice(FILE *f, const ChoiceResult *r) {
    int count;
    fputs("{", f);
    json_member(f, "path", r->path);
    fprintf(f, ",\"layout\":\"%s\",\"answer\":\"%s\",\"shots\":%ld,\"template\":\"%s\",\"questions\":%d,\"fewer_shots\":%d,\"cut\":%d,"
            "\"accuracy\":{", LAYOUT_NAMES[r->layout], ANSWERS[eval.answer], eval.shots, TEMPLATES[eval.chat_template], r->questions,
            r->fewer_shots, r->cut);
    for (int group = 0; group <= EXTRA_SUBJECTS; group++) {
        double accuracy = group_accuracy(r, group, &count);
        if (count > 0) fprintf(f, "\"%s\":%.6g,", group_name(r, group), accuracy);
    }
    fprintf(f, "\"questions\":%.6g},\"subjects\":[", question_accuracy(r));
    for (int i = 0; i < r->count; i++) {
        const SubjectResult *s = &r->subjects[i];
        fputs(i ? ",\n    {" : "\n    {", f);
        json_member(f, "name", s->exam->name);
        fprintf(f, ",\"questions\":%d,\"correct\":%d,\"accuracy\":%.6g,\"probability\":%.6g}", s->questions, s->correct,
                100.0 * s->correct / s->questions, s->probability / s->questions);
    }
    fputs("]}", f);
}

void json_results(FILE *f, const TextResult *texts, int num_texts, const ChoiceResult *choices, int num_choices) {
    fputs("{", f);
    json_member(f, "model", find_checkpoint(opt.model));
    fputs(",\n \"perplexity\":[", f);
    for (int i = 0; i < num_texts; i++) {
        const TextResult *r = &texts[i];
        double loss = r->nats / r->tokens;
        fputs(i ? ",\n  {" : "\n  {", f);
        json_member(f, "path", r->path);
        fprintf(f, ",\"tokens\":%.0f,\"bytes\":%.0f,\"loss\":%.8g,\"perplexity\":%.8g,\"bits_per_byte\":%.8g", r->tokens, r->bytes, loss,
                exp(loss), r->nats / log(2.0) / (r->bytes > 0 ? r->bytes : 1));
        if (r->pairs > 0) fprintf(f, ",\"pairs\":%.0f,\"pairs_in_order\":%.0f", r->pairs, r->in_order);
        fputs("}", f);
    }
    fputs("],\n \"choice\":[", f);
    for (int i = 0; i < num_choices; i++) {
        fputs(i ? ",\n  " : "\n  ", f);
        json_choice(f, &choices[i]);
    }
    fputs("]}\n", f);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 7. main

void print_evaluate_help(void) {
    printf("evaluate judges a checkpoint by perplexity and by multiple-choice questions.\n\n"
           "  ./evaluate [options] WHAT...    each WHAT is a token file of ./prepare, a .csv file of questions, or a directory of them\n\n"
           "Questions are in C-Eval's layout (id,question,A,B,C,D,answer) or CMMLU's (,Question,A,B,C,D,Answer) and are asked with the\n"
           "prompt of their benchmark; the names of files are subjects. The answer is the letter with the highest probability.\n"
           "A directory holds the files, or folders dev, val, test with them; the examples of --shots come from dev. A prompt longer than\n"
           "--context loses its first examples, and if that isn't enough its beginning; both are counted.\n"
           "--answer text is for models that have never seen lettered options: the option is put in the question's blank (or after the\n"
           "question), and of the four statements the one with the highest probability is the answer.\n"
           "Perplexity counts every token but the first of a file, or in files for sft and dpo every token of an answer;\n"
           "of a file for dpo also in how many pairs the better answer is the likelier one.\n\n"
           "Options (defaults in brackets):\n");
    print_options(EVALUATE_OPTIONS, 1);
}

bool is_token_file(const char *path) {
    char magic[sizeof TOKEN_FILE_MAGIC] = "";
    FILE *f = fopen(path, "rb");
    bool is = f && fread(magic, 1, sizeof magic, f) == sizeof magic && memcmp(magic, TOKEN_FILE_MAGIC, sizeof magic) == 0;
    if (f) fclose(f);
    return is;
}

bool is_directory(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

void evaluation_open(Evaluation *v) {
    memset(v, 0, sizeof *v);
    v->tokenizer = open_checkpoint(&v->model);
    const Tokenizer *t = v->tokenizer;
    v->chat = template_make((TemplateKind)eval.chat_template, t, 0);
    int max_T = v->model.config.max_T, room;
    v->T = eval.seq > 0 ? (int)eval.seq : max_T < 1024 ? max_T : 1024;
    v->context = eval.context > 0 ? (int)eval.context : max_T < 4096 ? max_T : 4096;
    CHECK(eval.answer == ANSWER_LETTER || (eval.shots == 0 && eval.chat_template == TEMPLATE_NONE),
          "--answer text compares statements by themselves: without --shots and --template");
    CHECK(v->T <= max_T && v->context <= max_T, "--seq %d and --context %d: the model has %d positions", v->T, v->context, max_T);
    for (int i = 0; i < 4; i++) {
        TokenList list = {NULL, 0, 0};
        char letter = (char)('A' + i);
        tokenizer_encode_text(t, &letter, 1, &list);
        CHECK(list.count == 1, "the tokenizer has no single token for %c", letter);
        v->letters[i] = (int)list.ids[0];
        free(list.ids);
    }
    CHECK(!eval.details[0] || strcmp(eval.details, eval.json) != 0, "--json and --details are both %s", eval.json);
    if (eval.details[0]) v->details = create_file(eval.details);
    if (eval.json[0] && strcmp(eval.json, "-") != 0) v->json = open_atomic(eval.json);
    v->progress = isatty(STDERR_FILENO);
    batch_alloc(&v->batch, 1, v->T);
    v->end = t->im_end >= 0 ? t->im_end : t->endoftext;
    room = v->T > PROMPT_CHUNK ? v->T : PROMPT_CHUNK;            // also for prompts
    machine_open(&v->model, 1, room, 1, v->T > v->context ? v->T : v->context, RECOMPUTE_LAYERS, EVALUATE);
}

void evaluate_files(const char **paths, int count) {
    for (int i = 0; i < count; i++) {
        CHECK(file_exists(paths[i]), "cannot open %s: %s", paths[i], strerror(errno));
        CHECK(is_directory(paths[i]) || ends_with(paths[i], ".csv") || is_token_file(paths[i]), "%s is neither a token file of ./prepare, nor a .csv "
              "file, nor a directory", paths[i]);
    }
    Evaluation *v = (Evaluation *)xmalloc(sizeof(Evaluation));
    TextResult *texts = (TextResult *)xmalloc((size_t)count * sizeof(TextResult));
    ChoiceResult *choices = (ChoiceResult *)xmalloc((size_t)count * sizeof(ChoiceResult));
    int num_texts = 0, num_choices = 0;
    bool table = strcmp(eval.json, "-") != 0, asks = false, chooses = false;
    for (int i = 0; i < count; i++) asks = asks || !is_token_file(paths[i]), chooses = chooses || is_directory(paths[i]);
    CHECK(asks || !(was_given(&eval.shots) || was_given(&eval.chat_template) || was_given(&eval.answer)),
          "--shots, --template and --answer are for questions; there are only token files");
    CHECK(chooses || !was_given(&eval.split), "--split chooses a folder of a directory; there is no directory");
    evaluation_open(v);
    for (int i = 0; i < count; i++) {
        if (is_token_file(paths[i])) {
            texts[num_texts++] = text_run(v, paths[i]);
            if (table) print_text(&texts[num_texts - 1]);
        } else {
            choices[num_choices++] = choice_run(v, paths[i]);
            if (table) print_choice(&choices[num_choices - 1]);
        }
        fflush(stdout);
    }
    if (v->details) close_file(v->details, eval.details);
    if (!table) json_results(stdout, texts, num_texts, choices, num_choices);
    if (!v->json.file) return;
    json_results(v->json.file, texts, num_texts, choices, num_choices);
    close_atomic(&v->json);
}

#ifndef EVALUATE_NO_MAIN
int main(int argc, char **argv) {
    sleep_when_idle(argv);
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return print_evaluate_help(), 0;
    const char **words = (const char **)xmalloc((size_t)argc * sizeof(char *));
    int num_words = parse_options(EVALUATE_OPTIONS, 1, argc, argv, 1, words);
    CHECK(num_words > 0, "nothing to evaluate on; name token files, .csv files or directories, for example data/tiny_baike/val.bin; --help "
          "explains");
    evaluate_files(words, num_words);
    CHECK(fflush(stdout) == 0 && !ferror(stdout), "cannot write the results: %s", strerror(errno));
    return 0;
}
#endif

// test_evaluate.c: dev/eval/evaluate.c against transformers' numbers (fixtures/evaluate, made by evaluate_reference.py), and bad files.
//
//   make test          builds and runs this from the repository root, plain and with sanitizers
#define EVALUATE_NO_MAIN
#include "../eval/evaluate.c"
#include "test.h"
#define FIXTURES "dev/test/fixtures/evaluate"

static char scratch[64];                                         // a temporary directory

// ---------------------------------------------------------------------------------------------------------------------
// transformers' numbers

double number(const Json *object, const char *key) {
    const Json *value = json_get(object, key);
    CHECK(value && value->type == JSON_NUMBER, "no number %s in the JSON", key);
    return value->number;
}
bool same_text(const Json *a, const Json *b, const char *key) { return strcmp(json_get(a, key)->text, json_get(b, key)->text) == 0; }

// The lines of --details against the list of questions in expected.json.
void check_questions(const char *name, const Json *wanted, char *details) {
    int questions = 0, differ = 0;
    double worst = 0;
    for (char *line = strtok(details, "\n"); line; line = strtok(NULL, "\n")) {
        Json *got = json_parse(line, strlen(line), NULL);
        CHECK(got && wanted, "more lines than questions, or a line that is no JSON: %s", line);
        differ += !same_text(got, wanted, "subject") || !same_text(got, wanted, "answer") || !same_text(got, wanted, "chosen") ||
                  number(got, "tokens") != number(wanted, "tokens") || number(got, "question") != number(wanted, "question");
        const Json *x = json_get(got, "logprobs")->child, *y = json_get(wanted, "logprobs")->child;
        for (int i = 0; i < 4; i++, x = x->next, y = y->next) {
            double error = fabs(x->number - y->number) / fmax(1, fabs(y->number));           // statements are sums over many tokens
            if (!(error <= worst)) worst = error;
        }
        questions++, wanted = wanted->next;
        json_free(got);
    }
    check(questions == 11 && !wanted && differ == 0 && worst <= 5e-6, "%s: %d questions, subjects, prompt lengths and choices as with "
          "transformers; relative error of log-probabilities at most %.1e", name, questions, worst);
}

void check_setting(const Json *expected, const char *name) {
    const Json *setting = json_get(expected, name);
    const char *paths[] = {FIXTURES "/text.bin", FIXTURES "/sft.bin", FIXTURES "/dpo.bin", FIXTURES "/ceval",
                           FIXTURES "/cmmlu"};
    opt.model = FIXTURES "/model";
    eval.shots = (long)number(setting, "shots"), eval.context = (long)number(setting, "context"), eval.seq = (long)number(setting, "seq");
    eval.chat_template = 0, eval.answer = strcmp(json_get(setting, "answer")->text, "text") == 0 ? ANSWER_TEXT : ANSWER_LETTER;
    while (strcmp(TEMPLATES[eval.chat_template], json_get(setting, "template")->text) != 0) eval.chat_template++;
    eval.json = path_of("%s/json", scratch), eval.details = path_of("%s/details", scratch);
    evaluate_files(paths, 5);
    char *details = read_file(eval.details, NULL);
    check_questions(name, json_get(setting, "questions")->child, details);
    free(details);
    Json *json = read_json(eval.json);
    const Json *text = json_get(setting, "texts")->child;
    for (const Json *got = json_get(json, "perplexity")->child; got; got = got->next, text = text->next) {
        double tokens = number(got, "tokens"), loss = number(got, "loss"), wanted = text->child->next->number;
        check(tokens == text->child->number && fabs(loss - wanted) <= 5e-5 && fabs(log(number(got, "perplexity")) - loss) < 1e-6,
              "%s: %s: %.0f tokens, loss %.6f, transformers %.6f", name, json_get(got, "path")->text, tokens, loss, wanted);
        const Json *pairs = text->child->next->next->child;                // [pairs, in order], or null
        if (pairs)
            check(number(got, "pairs") == pairs->number && number(got, "pairs_in_order") == pairs->next->number,
                  "%s: %.0f of %.0f pairs in order, as with transformers", name, number(got, "pairs_in_order"), pairs->number);
    }
    const Json *ceval = json_get(json, "choice")->child, *cmmlu = ceval->next, *accuracy = json_get(ceval, "accuracy");
    if (strcmp(name, "two") == 0) {                              // which subject counts where, from the numbers of the table
        double subjects[4] = {0}, sum = 0;
        int i = 0;
        for (const Json *s = json_get(ceval, "subjects")->child; s; s = s->next) sum += subjects[i++] = number(s, "accuracy");
        bool ok = i == 4 && fabs(number(accuracy, "STEM") - (subjects[0] + subjects[1]) / 2) < 1e-3 && number(accuracy, "Hard") == subjects[1] &&
                  number(accuracy, "Humanities") == subjects[2] && fabs(number(accuracy, "all") - sum / 4) < 1e-3 && !json_get(accuracy, "Other");
        check(ok, "C-Eval's averages: STEM, Humanities and Hard over their subjects, all over all");
        const Json *virology = json_get(cmmlu, "subjects")->child, *history = virology->next;
        accuracy = json_get(cmmlu, "accuracy");
        check(number(accuracy, "China specific") == number(history, "accuracy") && number(accuracy, "Humanities") == number(history, "accuracy") &&
              number(accuracy, "STEM") == number(virology, "accuracy") && !json_get(accuracy, "Hard"), "CMMLU's averages");
        check(number(ceval, "fewer_shots") == 0 && number(ceval, "cut") == 0, "nothing was dropped");
    }
    if (strcmp(name, "short") == 0) check(number(ceval, "fewer_shots") > 0 && number(ceval, "cut") == 0, "short: examples were dropped and counted");
    if (strcmp(name, "cut") == 0) check(number(ceval, "cut") == 8 && number(ceval, "fewer_shots") == 8, "cut: questions were cut and counted");
    json_free(json);
}

// ---------------------------------------------------------------------------------------------------------------------
// Prompts and subjects

void test_prompts(void) {
    eval.shots = 1;
    Exam network = exam_open(FIXTURES "/ceval/val/computer_network_val.csv"), history = exam_open(FIXTURES "/cmmlu/test/chinese_history.csv");
    char *ceval = exam_prompt(&network, 1, 0), *cmmlu = exam_prompt(&history, 1, 0), *zero = exam_prompt(&network, 0, 1);
    check(strcmp(ceval, "以下是中国关于计算机网络考试的单项选择题，请选出其中的正确答案。\n\n用来把域名换成地址的系统是____。\nA. DNS\nB. FTP\nC. HTTP\n"
                        "D. SMTP\n答案：A\n\n他说\"网\"字，\n这个字有几画？\nA. 4\nB. 5\nC. 6\nD. 7\n答案：") == 0, "C-Eval's prompt, with quotes and a line end");
    check(strcmp(cmmlu, "以下是关于中国历史的单项选择题，请直接给出正确答案的选项。\n\n题目：唐朝的都城是\nA. 长安\nB. 洛阳\nC. 开封\nD. 北京\n答案是：A\n\n"
                        "题目：“四大发明”包括纸、火药、指南针和____\nA. 网络\nB. 印刷术\nC. 电话\nD. 铁路\n答案是：") == 0, "CMMLU's prompt");
    static const char begin[] = "以下是中国关于计算机网络考试的单项选择题，请选出其中的正确答案。\n\n浏览器";
    check(strncmp(zero, begin, strlen(begin)) == 0, "without examples");
    free(ceval), free(cmmlu), free(zero);
    eval.shots = 0;
    int counts[2][NUM_CATEGORIES] = {{0}}, extra[2] = {0}, total[2] = {0};
    for (int k = 0; k < 2; k++)
        for (const Subject *s = k ? CMMLU_SUBJECTS : CEVAL_SUBJECTS; s->name; s++) counts[k][s->category]++, total[k]++, extra[k] += s->extra;
    check(total[0] == 52 && extra[0] == 8 && counts[0][STEM] == 20 && counts[0][SOCIAL] == 10 && counts[0][HUMANITIES] == 11 && counts[0][OTHER] == 11,
          "C-Eval: 52 subjects, 20 STEM, 10 Social Science, 11 Humanities, 11 Other; 8 Hard");
    check(total[1] == 67 && extra[1] == 15 && counts[1][STEM] == 17 && counts[1][HUMANITIES] == 13 && counts[1][SOCIAL] == 22 && counts[1][OTHER] == 15,
          "CMMLU: 67 subjects, 17 STEM, 13 Humanities, 22 Social Science, 15 Other; 15 China specific");
}

// The letter after a prompt is a token of its own also when prompt and letter are encoded together, as they are in the examples.
void test_letters(void) {
    Tokenizer *t = tokenizer_load("dev/data/qwen.bin");
    bool ok = true;
    for (int i = 0; i < 8; i++) {
        TokenList apart = {NULL, 0, 0}, together = {NULL, 0, 0};
        const char *begin = i < 4 ? "D. 七\n答案：" : "D. 七\n答案是：", *letter = path_of("%c", 'A' + i % 4), *both = path_of("%s%s\n\n", begin, letter);
        tokenizer_encode_text(t, begin, strlen(begin), &apart), tokenizer_encode_text(t, letter, 1, &apart);
        tokenizer_encode_text(t, "\n\n", 2, &apart), tokenizer_encode_text(t, both, strlen(both), &together);
        ok = ok && apart.count == together.count && memcmp(apart.ids, together.ids, 4 * apart.count) == 0;
        free(apart.ids), free(together.ids);
    }
    check(ok, "with Qwen's vocabulary, the letters after both prompts are tokens of their own");
    tokenizer_free(t);
}

// ---------------------------------------------------------------------------------------------------------------------
// CSV

const char *file_with(const char *text, size_t size) {
    const char *path = path_of("%s/file.csv", scratch);
    FILE *f = create_file(path);
    fwrite(text, 1, size, f);
    close_file(f, path);
    return path;
}

void test_csv(void) {
    static const struct { const char *text; const char *fields[4][4]; long lines[4]; } cases[] = {
        {"a,b\nc,d\n", {{"a", "b"}, {"c", "d"}}, {1, 2}},
        {"a,b\r\nc,d", {{"a", "b"}, {"c", "d"}}, {1, 2}},
        {"\xEF\xBB\xBF\"a\",b\r\n\r\n\n\"c\r\nx\",\"\"\r\n", {{"a", "b"}, {"c\r\nx", ""}}, {1, 4}},
        {"\"a,\"\"b\"\"\",,\n,\n", {{"a,\"b\"", "", ""}, {"", ""}}, {1, 2}},
        {"\"\"\"\",\"x\ny\nz\"\nlast,\"q\"", {{"\"", "x\ny\nz"}, {"last", "q"}}, {1, 4}},
        {"a\"b,c\rd\n,", {{"a\"b", "c\rd"}, {"", ""}}, {1, 2}},
        {"\"q\"\r", {{"q"}}, {1}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Csv csv = csv_read(file_with(cases[i].text, strlen(cases[i].text)));
        bool ok = true;
        int rows = 0;
        for (; rows < 4 && cases[i].fields[rows][0]; rows++) {
            int fields = 0;
            ok = ok && rows < csv.count && csv.rows[rows].line == cases[i].lines[rows];
            for (; fields < 4 && cases[i].fields[rows][fields]; fields++)
                ok = ok && fields < csv.rows[rows].count && strcmp(csv.rows[rows].fields[fields], cases[i].fields[rows][fields]) == 0;
            ok = ok && csv.rows[rows].count == fields;
        }
        check(ok && rows == csv.count, "CSV case %zu: fields and line numbers", i);
    }
}

void read_csv_file(const char *path) { questions_read(path); }
void open_exam(const char *path) { eval.shots = 2, exam_open(path); }
void run_all(const char *path) { opt.model = FIXTURES "/model", evaluate_files(&path, 1); }
void run_test_split(const char *path) { eval.split = 2, run_all(path); }
void run_context(const char *path) { eval.context = 1000, run_all(path); }
void run_short_context(const char *path) { eval.context = 4, eval.chat_template = TEMPLATE_CHATML, run_all(path); }
void run_text_shots(const char *path) { eval.answer = ANSWER_TEXT, eval.shots = 1, run_all(path); }
void run_json(const char *path) { eval.json = "/nowhere/json", run_all(path); }
void run_dev_shots(const char *path) { eval.split = 3, eval.shots = 1, run_all(path); }
void read_statements(const char *path) { eval.answer = ANSWER_TEXT, questions_read(path); }
void run_json_details(const char *path) { eval.json = eval.details = "both", run_all(path); }
void run_given_shots(const char *path) { given[num_given++] = &eval.shots, run_all(path); }
void run_given_split(const char *path) { given[num_given++] = &eval.split, run_all(path); }
void run_preset(const char *path) { opt.model = "tiny", evaluate_files(&path, 1); }

void check_bad_csv(const char *what, const char *text, const char *message) {
    check_fails(what, read_csv_file, file_with(text, strlen(text)), message);
}

void test_bad_files(void) {
    static const char head[] = "id,question,A,B,C,D,answer\n";
    check_bad_csv("empty file", "", "is empty");
    check_bad_csv("only a first line", head, "has no questions");
    check_bad_csv("no column C", "id,question,A,B,D,answer\n0,q,1,2,4,A\n", "file.csv:1: no column C");
    check_bad_csv("no column answer", "id,question,A,B,C,D\n0,q,1,2,3,4\n", "no column answer");
    check_bad_csv("neither question nor Question", "a,b,c\n", "no column question");
    check_bad_csv("CMMLU without Answer", ",Question,A,B,C,D,answer\n0,q,1,2,3,4,A\n", "no column Answer");
    check_bad_csv("too few fields", path_of("%s0,q,1,2,3,4,A\n\n1,\"q\nq\",1,2,3\n", head), "file.csv:4: 5 fields, the first line has 7");
    check_bad_csv("too many fields", path_of("%s0,q,with commas,1,2,3,4,A\n", head), "file.csv:2: 8 fields");
    check_bad_csv("answer E", path_of("%s0,q,1,2,3,4,E\n", head), "file.csv:2: the answer is 'E'");
    check_bad_csv("answer AB", path_of("%s0,q,1,2,3,4,AB\n", head), "the answer is 'AB'");
    check_bad_csv("no answer", path_of("%s0,q,1,2,3,4,\n", head), "the answer is ''");
    check_bad_csv("an open quote", path_of("%s0,\"q,1,2,3,4,A\n1,q,1,2,3,4,B\n", head), "file.csv:2: the quote that opens here is never closed");
    check_bad_csv("text after a quote", path_of("%s0,\"q\"x,1,2,3,4,A\n", head), "file.csv:2: text after the closing quote");
    check_bad_csv("GBK", path_of("%s0,\xC4\xE3\xBA\xC3,1,2,3,4,A\n", head), "file.csv:2: not UTF-8; convert it");
    check_bad_csv("an empty question", path_of("%s0,,1,2,3,4,A\n", head), "file.csv:2: column question is empty");
    const char *empty = path_of("%s0,q,1,,3,4,A\n", head);
    check_fails("an empty statement", read_statements, file_with(empty, strlen(empty)), "file.csv:2: column B is empty");
    check_fails("NUL", read_csv_file, file_with("id,question\n\0", 13), "file.csv:2: a NUL character");
    check_fails("no such file", run_all, "nowhere.csv", "cannot open nowhere.csv");
    check_fails("neither csv nor tokens", run_all, "Makefile", "Makefile is neither a token file");
    check_fails("a directory without questions", run_all, "dev/cuda", "holds no .csv files, nor do folders val and test in it");
    check_fails("a split that isn't there", run_test_split, FIXTURES "/ceval", "ceval/test holds no .csv files");
    const char *alone = path_of("%s0,q,1,2,3,4,A\n", head);
    check_fails("no examples", open_exam, file_with(alone, strlen(alone)), "no examples for");
    eval.shots = 3;
    check_fails("too few examples", run_all, FIXTURES "/ceval", "college_physics_dev.csv has 2 examples");
    eval.shots = 0;
    check_fails("tokens of another tokenizer", run_all, "data/tiny_baike/val.bin", "was not made with the tokenizer of");
    check_fails("a context beyond the model", run_context, FIXTURES "/ceval", "the model has 512 positions");
    check_fails("examples among the questions", run_dev_shots, FIXTURES "/ceval", "are the examples themselves");
    check_fails("one file for two results", run_json_details, FIXTURES "/sft.bin", "--json and --details are both");
    check_fails("examples for token files", run_given_shots, FIXTURES "/sft.bin", "are for questions; there are only token files");
    check_fails("a split of token files", run_given_split, FIXTURES "/sft.bin", "there is no directory");
    check_fails("statements with examples", run_text_shots, FIXTURES "/ceval", "--answer text compares statements by themselves");
    check_fails("a context without room", run_short_context, FIXTURES "/ceval", "--context 4 leaves no room for a question");
    check_fails("results that can't be written", run_json, FIXTURES "/sft.bin", "cannot write /nowhere/json");
    check_fails("and that shows first", run_json, "data/tiny_baike/val.bin", "cannot write /nowhere/json");
    eval.details = "/dev/null", run_all(FIXTURES "/sft.bin"), eval.details = "";
    check(true, "details to a file that no disk holds");
    check_fails("a preset", run_preset, FIXTURES "/sft.bin", "is a preset without weights");
    const char *mixed = path_of("%s/mixed", scratch);
    make_directory(mixed);
    for (int i = 0; i < 2; i++) {
        const char *path = path_of("%s/%c.csv", mixed, 'a' + i), *text = i ? ",Question,A,B,C,D,Answer\n0,q,1,2,3,4,A\n" : "id,question,A,B,C,D,answer\n0,q,1,2,3,4,A\n";
        FILE *f = create_file(path);
        fputs(text, f);
        close_file(f, path);
    }
    check_fails("two layouts in one directory", run_all, mixed, "a.csv is in the layout of C-Eval");
    delete_directory(mixed);
}

int main(void) {
    snprintf(scratch, sizeof scratch, "/tmp/test_evaluate_XXXXXX");
    CHECK(mkdtemp(scratch), "no temporary directory");
    test_csv();
    test_prompts();
    test_letters();
    test_bad_files();
    Json *expected = read_json(FIXTURES "/expected.json");
    static const char *const settings[] = {"zero", "two", "short", "cut", "chatml", "mini_llm", "text"};
    for (int i = 0; i < 7; i++) check_setting(expected, settings[i]);
    delete_directory(scratch);
    return verdict();
}

// test_chat.c: sampling against transformers' numbers (fixtures/sampling, made by sampling_reference.py), prompts against the text of Qwen's
// templates, and ./chat as a person sees it, in a pseudo-terminal.
//
//   make test          builds and runs this from the repository root, plain and with sanitizers, after ./chat
#define CHAT_NO_MAIN
#include "../chat.c"
#include "test.h"
#include "fixtures.h"
#include <termios.h>

// ---------------------------------------------------------------------------------------------------------------------
// Sampling

void test_filters(void) {
    enum { V = 300, P = 12, S = 34, FIELDS = 6 };
    StoredTensors s = safetensors_open(FIXTURES "/sampling", "expected");
    float *logits = expected(&s, "logits", 2 * V), *previous = expected(&s, "previous", P), *settings = expected(&s, "settings", S * FIELDS);
    float *wanted = expected(&s, "probabilities", S * V), row[V];
    int tokens[P];
    for (int i = 0; i < P; i++) tokens[i] = (int)previous[i];
    for (int k = 0; k < S; k++) {
        const float *set = settings + k * FIELDS;
        Sampler sampler = {(double)set[1], (double)set[2], (long)set[3], (double)set[4], (double)set[5], false};
        double got[V] = {0}, sum = 0, worst = 0;
        int differ = 0, kept;
        const Candidate *candidates;
        memcpy(row, logits + (int)set[0] * V, sizeof row);
        penalize_repetition(row, V, tokens, P, sampler.repetition_penalty);
        kept = sample_candidates(&candidates, row, V, &sampler);
        for (int i = 0; i < kept; i++) got[candidates[i].id] = (double)candidates[i].probability, sum += got[candidates[i].id];
        for (int i = 0; i < V; i++) {
            double p = got[i] / sum, w = (double)wanted[k * V + i], error = w > 0 ? fabs(p / w - 1) : p;
            differ += (p > 0) != (w > 0);
            if (!(error <= worst)) worst = error;
        }
        // Of equal logits at the border of top_p, any may be kept: transformers sorts them in no particular order.
        bool ties = set[0] == 1 && set[4] < 1;
        check(ties || (differ == 0 && worst <= 2e-5), "row %g, penalty %g, temperature %g, top_k %g, top_p %g, min_p %g: %d ids kept%s, error %.1e",
              (double)set[0], (double)set[1], (double)set[2], (double)set[3], (double)set[4], (double)set[5], kept, ties ? " (ties)" : "", worst);
        if (ties) {
            int w = 0;
            for (int i = 0; i < V; i++) w += wanted[k * V + i] > 0;
            check(kept == w, "  as many as transformers keeps: %d", w);
        }
    }
    float broken[3] = {-INFINITY, -1, 2};
    Sampler sampler = {1, 1, 0, 1, 0, false};
    const Candidate *candidates;
    check(sample_candidates(&candidates, broken, 3, &sampler) == 2, "an id of logit -inf is no candidate");
    free(logits), free(previous), free(settings), free(wanted);
    safetensors_close(&s);
}

typedef struct { int ids[64], count; } Ids;
bool keep_id(void *context, int id) {
    Ids *ids = (Ids *)context;
    ids->ids[ids->count++] = id;
    return true;
}

void test_generate(const char *family) {
    StoredTensors s = safetensors_open(FIXTURES "/sampling", "expected");
    float *prompt = expected(&s, path_of("%s.prompt", family), 6), *wanted = expected(&s, path_of("%s.ids", family), 24);
    double penalty = (double)expected_number(&s, path_of("%s.penalty", family));
    Model m = {};
    model_load(&m, path_of(FIXTURES "/%s", family));
    machine_open(&m, 1, 4, 1, 30, RECOMPUTE_LAYERS, EVALUATE);
    Tokenizer t = {};
    t.num_ranks = t.vocab_size = m.config.V, t.im_end = t.endoftext = -1;
    Sampler sampler = {penalty, 1, 0, 1, 0, true};
    Sequence sequence = {};
    for (int again = 0; again < 2; again++) {                    // the second time, what both sequences share is in the cache
        Ids got = {{0}, 0};
        int tokens[6], equal = 0;
        for (int i = 0; i < 6; i++) tokens[i] = (int)prompt[i];
        sequence_set(&sequence, tokens, 6);
        int cached = sequence.cached, made = generate(&m, &sequence, &t, 100, &sampler, 1, keep_id, &got);
        for (int i = 0; i < 24; i++) equal += got.ids[i] == (int)wanted[i];
        check(equal == 24 && made == 24 && cached == 6 * again, "%s: greedy with repetition penalty %g, %d tokens cached: %d of 24 ids are those of "
              "transformers, and it ends at the last position", family, penalty, cached, equal);
    }
    free(sequence.tokens), free(prompt), free(wanted);
    machine_close(&m), safetensors_close(&s);
}

// A vocabulary with gaps, as every Qwen's: ids without a token never come, however hot the sampling.
void test_gaps(void) {
    Model m = {};
    model_load(&m, FIXTURES "/qwen2");
    machine_open(&m, 1, 4, 1, 30, RECOMPUTE_LAYERS, EVALUATE);
    enum { RANKS = 5, GAPS = 50 };
    char text[] = "<x>", bytes[RANKS] = "abcd";
    Special special = {text, 3, RANKS + 7, true};
    int special_at[GAPS], good = 0;
    uint32_t start[RANKS + 1] = {0, 1, 2, 3, 4, 5};
    for (int i = 0; i < GAPS; i++) special_at[i] = i == 7 ? 0 : -1;
    Tokenizer t = {};
    t.num_ranks = RANKS, t.vocab_size = RANKS + GAPS, t.im_end = t.endoftext = -1, t.special_at = special_at, t.bytes = bytes, t.start = start;
    t.specials = &special, t.num_specials = 1;
    Sampler sampler = {1, 50, 0, 1, 0, false};
    Sequence sequence = {};
    Ids got = {{0}, 0};
    sequence_push(&sequence, 1);
    generate(&m, &sequence, &t, 29, &sampler, 1, keep_id, &got);
    for (int i = 0; i < got.count; i++) good += got.ids[i] < RANKS || got.ids[i] == RANKS + 7;
    check(got.count == 29 && good == 29, "%d of %d sampled ids have a token", good, got.count);
    free(sequence.tokens), machine_close(&m);
}

// However a sequence came about, its logits are those of a new one.
void test_sequence(void) {
    Model m = {};
    model_load(&m, FIXTURES "/qwen3");
    machine_open(&m, 1, 4, 1, 16, RECOMPUTE_LAYERS, EVALUATE);
    Sequence s = {};
    static const int first[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, second[7] = {1, 2, 3, 14, 5, 6, 7};
    static const struct { const int *tokens; int count, cached; } steps[] = {{first, 9, 0}, {second, 7, 3}, {second, 7, 7}, {second, 2, 2},
                                                                             {second, 3, 2}, {first + 1, 5, 0}};
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        sequence_set(&s, steps[i].tokens, steps[i].count);
        int cached = s.cached;
        float *logits = sequence_logits(&m, &s);
        float *got = (float *)memcpy(xmalloc(sizeof(float) * (size_t)m.config.V), logits, sizeof(float) * (size_t)m.config.V);
        KVCache fresh = cache_alloc(m.config.L, m.config.NKV, m.config.HD, 16);
        float *wanted = model_decode(&m, &fresh, steps[i].tokens, steps[i].count);
        double error = relative_error(got, wanted, (size_t)m.config.V);
        check(error <= 1e-6 && cached == steps[i].cached, "sequence %zu: %d of %d tokens were in the cache, logits as without: error %.1e", i,
              cached, steps[i].count, error);
        cache_free(&fresh), free(got);
    }
    free(s.tokens), machine_close(&m);
}

// ---------------------------------------------------------------------------------------------------------------------
// Prompts

void check_prompt(Chat *c, const char *what, const char *text) {
    TokenList got = {NULL, 0, 0}, wanted = {NULL, 0, 0};
    chat_prompt(c, c->first_turn, &got);
    tokenizer_encode(c->tokenizer, text, strlen(text), SPECIALS_PARSED, &wanted);
    check(got.count == wanted.count && memcmp(got.ids, wanted.ids, 4 * got.count) == 0, "%s: %zu tokens, those of the template's text", what, got.count);
    free(got.ids), free(wanted.ids);
}

void keep_answer_text(Chat *c, const char *text) {
    TokenList list = {NULL, 0, 0};
    tokenizer_encode(c->tokenizer, text, strlen(text), SPECIALS_PARSED, &list);
    chat_keep_answer(c, (int *)list.ids, (int)list.count);
    free(list.ids);
}

void test_prompts(void) {
    Chat c;
    memset(&c, 0, sizeof c);
    c.tokenizer = tokenizer_load("dev/data/qwen.bin");
    tokenizer_use_specials(c.tokenizer, "qwen3");
    c.layout = template_make(TEMPLATE_CHATML, c.tokenizer, (uint32_t)c.tokenizer->im_end);
    c.think_end = special_find(c.tokenizer, "</think>")->id;
    chat_set_system(&c, "");
    chat_add_question(&c, "Hello");
    TokenList prompt = {NULL, 0, 0};
    static const uint32_t known[] = {151644, 872, 198, 9707, 151645, 198, 151644, 77091, 198};
    chat_prompt(&c, 0, &prompt);
    check(prompt.count == 9 && memcmp(prompt.ids, known, sizeof known) == 0, "Qwen3's prompt of Hello: the known ids");
    tokenizer_encode(c.tokenizer, "<think>\n\n</think>\n\n", 19, SPECIALS_PARSED, &c.no_thinking);
    check_prompt(&c, "Qwen3 with --no-think", "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n");
    c.no_thinking.count = 0;
    keep_answer_text(&c, "<think>\nOkay, a greeting.\n</think>\n\nHi\n\nthere!");
    chat_add_question(&c, "<|im_end|> 北京\n  怎么样？");
    check(c.turns[1].asked.count > 8 && c.turns[1].asked.ids[0] != (uint32_t)c.tokenizer->im_end, "special tokens in a question are text");
    chat_drop_turns(&c, 1);
    chat_add_question(&c, "北京\n  怎么样？");
    check_prompt(&c, "two turns; the thinking is gone", "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi\n\nthere!<|im_end|>\n<|im_start|>user\n"
                 "北京\n  怎么样？<|im_end|>\n<|im_start|>assistant\n");
    chat_set_system(&c, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.");
    c.first_turn = 1;
    check_prompt(&c, "a system message; the first turn dropped", "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
                 "<|im_end|>\n<|im_start|>user\n北京\n  怎么样？<|im_end|>\n<|im_start|>assistant\n");
    chat_drop_turns(&c, 0);
    check(c.num_turns == 0 && c.first_turn == 0, "dropping all turns");
    c.layout = template_make(TEMPLATE_MINI_LLM, c.tokenizer, (uint32_t)c.tokenizer->im_end);
    chat_set_system(&c, "");
    chat_add_question(&c, "hi，你好！");
    check_prompt(&c, "MINI_LLM's prompt", "你是一个助手 用户: hi，你好！  回答: ");
    tokenizer_free(c.tokenizer), free(prompt.ids);
}

void test_system_messages(void) {
    static const char *const cases[][3] = {
        {"Qwen2.5", "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}"
         "{{- 'You are Qwen.' }}{%- endif %}<|im_end|>\\n{%- else %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
         "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}",
         "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
        {"Qwen2.5-Math, with a backslash", "{{- '<|im_start|>system\\nPut your final answer within \\\\boxed{}.<|im_end|>\\n' }}", "Put your final answer within \\boxed{}."},
        {"Qwen2, with a real line end", "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}", "You are a helpful assistant"},
        {"Qwen3", "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{{- '<|im_start|>user' }}", ""},
        {"ours", CHAT_TEMPLATE, ""},
        {"cut off", "<|im_start|>system\\nYou", ""},
        {"empty", "", ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *got = system_in_template(cases[i][1]);
        check(strcmp(got, cases[i][2]) == 0, "system message of the template, %s: '%s'", cases[i][0], got);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// ./chat itself. The model knows 256 single bytes and has random weights, so it talks for ever, and mostly not in UTF-8.

static char model_path[64];

void make_model(void) {
    snprintf(model_path, sizeof model_path, "/tmp/test_chat_XXXXXX");
    CHECK(mkdtemp(model_path), "no temporary directory");
    Tokenizer *full = tokenizer_load("dev/data/qwen.bin");
    unsigned char *none = (unsigned char *)xcalloc((size_t)full->num_ranks, 1);
    Tokenizer *bytes = tokenizer_trim(full, none);
    Config config = PRESETS[0].config;
    config.V = 320, config.L = 1, config.C = 64, config.max_T = 20000, config.tied = false;       // V: rows without a token, too
    Model m = {};
    model_alloc(&m, &config);
    init_params(m.params_memory, &config, &m.table, 1);
    for (int i = 0; i < config.V * config.C; i++) m.params.lm_head[i] *= i / config.C < bytes->num_ranks ? 50.0f : 0.0f;   // end tokens: logit 0,
    // among others that are normal with a deviation of about 8, so they never come
    config_save(&config, path_of("%s/config.json", model_path), F32, bytes->im_end);
    tokenizer_save_hf(bytes, model_path);
    model_save(&m, model_path, F32);
    model_free(&m), tokenizer_free(full), tokenizer_free(bytes), free(none);
}

typedef struct { int terminal; pid_t process; char said[1 << 17]; size_t length, seen; } Session;

// Starts ./chat in a terminal of its own.
void session_start(Session *s, const char *option, const char *value) {
    memset(s, 0, sizeof *s);
    s->terminal = posix_openpt(O_RDWR | O_NOCTTY);
    CHECK(s->terminal >= 0 && grantpt(s->terminal) == 0 && unlockpt(s->terminal) == 0, "no pseudo-terminal: %s", strerror(errno));
    const char *name = path_of("%s", ptsname(s->terminal));
    fflush(stdout);
    s->process = fork();
    if (s->process > 0) return;
    setsid();
    int end = open(name, O_RDWR);                                // becomes the controlling terminal
    for (int i = 0; i < 3; i++) dup2(end, i);
    close(end), close(s->terminal);
    setenv("TERM", "dumb", 1), setenv("OMP_WAIT_POLICY", "passive", 1);
    execl("./chat", "./chat", "--model", model_path, "--seed", "5", "--max-tokens", "100000", option, value, (char *)NULL);
    _exit(127);
}

// Waits up to ten seconds until `text` comes after all that was seen so far.
bool session_says(Session *s, const char *text) {
    double end = now_s() + 10;
    for (;;) {
        char *found = strstr(s->said + s->seen, text);
        if (found) return s->seen = (size_t)(found - s->said) + strlen(text), true;
        struct pollfd ready = {s->terminal, POLLIN, 0};
        if (now_s() > end || s->length + 4096 > sizeof s->said) return false;
        if (poll(&ready, 1, 100) <= 0) continue;
        ssize_t n = read(s->terminal, s->said + s->length, 4095);
        if (n <= 0) return false;
        for (ssize_t i = 0; i < n; i++) if (s->said[s->length + (size_t)i] == 0) s->said[s->length + (size_t)i] = '?';
        s->length += (size_t)n, s->said[s->length] = 0;
    }
}
// At the next prompt.
void session_types(Session *s, const char *text) {
    bool asked = session_says(s, "\n> ");
    CHECK(asked && write(s->terminal, text, strlen(text)) == (ssize_t)strlen(text), "no prompt came after: %s", s->said + (s->length > 300 ? s->length - 300 : 0));
}

// Its exit status after at most ten seconds, -1 if it had to be killed.
int session_end(Session *s) {
    int status = 0;
    double end = now_s() + 10;
    while (waitpid(s->process, &status, WNOHANG) == 0) {
        char rest[4096];
        struct pollfd ready = {s->terminal, POLLIN, 0};
        if (poll(&ready, 1, 50) > 0 && read(s->terminal, rest, sizeof rest) < 0) usleep(10000);
        if (now_s() > end) return kill(s->process, SIGKILL), waitpid(s->process, &status, 0), close(s->terminal), -1;
    }
    close(s->terminal);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void test_terminal(void) {
    static Session s;
    session_start(&s, "--context", "600");
    check(session_says(&s, "/help lists commands"), "the terminal shows what it is");
    session_types(&s, "hello\n");
    check(session_says(&s, "hello\r\n"), "the question is echoed");
    check(session_says(&s, "the context is full; 24 tokens read"), "the answer ends at the end of the context, and says so");
    session_types(&s, "again\n");
    check(session_says(&s, "the oldest 1 turn was dropped: the context holds 600 tokens"), "the oldest turn is dropped, and that is said");
    check(session_says(&s, "tokens/s)"), "and the question answered");
    session_types(&s, "/nothing\n");
    check(session_says(&s, "unknown command /nothing"), "an unknown command");
    session_types(&s, "half a line\003");
    check(session_says(&s, "Ctrl-D or /quit ends"), "Ctrl-C gives up a line");
    session_types(&s, "/system You are brief.\n");
    check(session_says(&s, "the system message is: You are brief."), "/system");
    session_types(&s, "/save\n");
    check(session_says(&s, "/save needs a file name"), "/save without a name");
    session_types(&s, path_of("/save %s/saved.jsonl\n", model_path));
    check(session_says(&s, "there is nothing to save yet"), "/save without a conversation");
    session_types(&s, "two \\\nlines \"quoted\"\n");
    check(session_says(&s, "tokens/s)"), "a question of two lines");
    session_types(&s, path_of("/save %s/saved.jsonl\n", model_path));
    check(session_says(&s, "1 turn added to"), "/save");
    session_types(&s, "/save /nowhere/x\n");
    check(session_says(&s, "cannot write /nowhere/x"), "/save where nothing can be written");
    session_types(&s, "/retry\n");
    check(session_says(&s, "the context is full"), "/retry");
    char *words = (char *)xcalloc(1, 4000);
    for (int i = 0; i < 400; i++) strcat(words, "你a");
    session_types(&s, path_of("/system %s\n", words));
    check(session_says(&s, "that is too long"), "/system with more than half of the context");
    session_types(&s, path_of("%s\n", words)), free(words);
    check(session_says(&s, "the question is too long"), "a question that is too long");
    session_types(&s, "/retry\n");
    check(session_says(&s, "the context is full"), "/retry after it answers the last question that fitted");
    session_types(&s, "/reset\n");
    check(session_says(&s, "a new conversation"), "/reset");
    session_types(&s, "/quit\n");
    int code = session_end(&s);
    check(code == 0, "/quit ends with code 0 (%d)", code);
    char *saved = read_file(path_of("%s/saved.jsonl", model_path), NULL);
    Json *json = json_parse(saved, strlen(saved), NULL);
    const Json *message = json ? json_get(json, "messages")->child : NULL;
    check(message && message->next && strcmp(json_get(message, "content")->text, "You are brief.") == 0 &&
          strcmp(json_get(message->next, "content")->text, "two \nlines \"quoted\"") == 0, "the saved conversation is JSON, word for word");
    json_free(json), free(saved);
}

void test_interrupt(void) {
    static Session s;
    session_start(&s, "--context", "2000");
    session_types(&s, "hello\n");
    usleep(100000);                                              // the whole answer takes about a second
    CHECK(write(s.terminal, "\003", 1) == 1, "the terminal is gone");
    bool stopped = session_says(&s, "(stopped; 24 tokens read") && session_says(&s, " s, ");
    int written = stopped && session_says(&s, " written") ? atoi(strstr(strstr(s.said, "(stopped; "), " s, ") + 4) : 0;
    check(written > 0 && written < 1900, "Ctrl-C stops an answer, after %d tokens", written);
    session_types(&s, "more\n");
    check(session_says(&s, "tokens/s)"), "and the next question is answered");
    session_types(&s, "\004");
    int code = session_end(&s);
    check(code == 0, "Ctrl-D ends with code 0 (%d)", code);
}

// All that a command prints. *code: its exit status.
char *output_of(const char *command, int *code) {
    FILE *f = popen(command, "r");
    CHECK(f != NULL, "cannot run %s", command);
    size_t length = 0, n;
    char *text = (char *)xmalloc(1 << 18);
    while ((n = fread(text + length, 1, (1 << 18) - 1 - length, f)) > 0) length += n;
    text[length] = 0;
    *code = WEXITSTATUS(pclose(f));
    return text;
}

// What write_text lets through.
void test_write_text(void) {
    static const char text[] = "a\tb\n\033[31m\x7F\xC2\x9B" "31m\xC2\xA0\xE4\xBD\xA0\r\xC2";
    const char *path = path_of("%s/text", model_path);
    fflush(stdout);
    int terminal = dup(1), file = open(path, O_RDWR | O_CREAT, 0600);
    dup2(file, 1);
    static Chat c;
    c.interactive = true;
    write_text(&c, text, sizeof text - 1);
    dup2(terminal, 1), close(file), close(terminal);
    char *got = read_file(path, NULL);
    check(strcmp(got, "a\tb\n[31m31m\xC2\xA0\xE4\xBD\xA0") == 0, "control characters are left out, also those from U+0080 to U+009F");
    free(got);
}

// A question that is refused as too long leaves the conversation as it was, so that /retry has something to answer.
void test_refused(void) {
    static Chat c;
    static char words[2000];
    opt.model = model_path, chat.context = 600, chat.max_tokens = 20;
    chat_open(&c);
    memset(words, 'a', sizeof words - 1);
    fflush(stdout);
    int terminal = dup(1), nowhere = open("/dev/null", O_WRONLY), errors = dup(2);
    dup2(nowhere, 1), dup2(nowhere, 2);
    chat_add_question(&c, "hello");
    bool answered = chat_answer(&c);
    chat_add_question(&c, words);
    bool refused = !chat_answer(&c);
    fflush(stdout);
    dup2(terminal, 1), dup2(errors, 2), close(terminal), close(nowhere), close(errors);
    check(answered && refused && c.num_turns == 1 && c.first_turn == 0 && c.turns[0].answer.count > 0,
          "a refused question leaves the conversation as it was");
    terminal = dup(1), nowhere = open("/dev/null", O_WRONLY), errors = dup(2);
    dup2(nowhere, 1), dup2(nowhere, 2);
    chat_add_question(&c, "again");
    answered = chat_answer(&c);
    chat_add_question(&c, words);
    refused = !chat_answer(&c);
    fflush(stdout);
    dup2(terminal, 1), dup2(errors, 2), close(terminal), close(nowhere), close(errors);
    check(answered && refused && c.num_turns == 2 && c.first_turn == 0, "also one of two turns");
    c.first_turn = 1, chat_drop_turns(&c, 1);
    check(c.num_turns == 1 && c.first_turn == 0, "a question given up leaves /retry the one before");
}

// The directory of an adapter has no config.json: its base has.
void test_adapter(void) {
    const char *directory = path_of("%s/adapter", model_path), *path = path_of("%s/adapter_config.json", directory);
    make_directory(directory);
    FILE *f = create_file(path);
    fprintf(f, "{\"peft_type\": \"LORA\", \"base_model_name_or_path\": \"%s\", \"r\": 1, \"lora_alpha\": 1, \"target_modules\": [\"q_proj\"]}", model_path);
    close_file(f, path);
    check(strcmp(checkpoint_system(directory), "") == 0, "the system message of an adapter without tokenizer files");
    delete_directory(directory);
}

void test_pipe(void) {
    int code, bad = 0, controls = 0, replaced = 0;
    char *text = output_of(path_of("printf 'one\\n\\ntwo\\r\\nthree' | ./chat --model %s --max-tokens 200 --fresh --temperature 2 2>/dev/null", model_path), &code);
    size_t length = strlen(text);
    for (size_t i = 0; i < length;) {
        uint32_t c;
        int n = utf8_decode(text + i, length - i, &c);
        bad += n < 0, replaced += c == 0xFFFD, controls += (c < 0x20 && c != '\n' && c != '\t') || (c >= 0x7F && c < 0xA0);
        i += (size_t)(n < 0 ? -n : n);
    }
    int lines = 0;
    for (size_t i = 0; i < length; i++) lines += text[i] == '\n';
    check(lines == 4, "--fresh: three questions and an empty line, four lines");
    check(code == 0 && length > 300 && bad == 0 && replaced > 0 && controls == 0, "%zu bytes of nonsense through a pipe: whole characters, none that controls "
          "a terminal", length);
    free(text);
    char *first = output_of(path_of("printf 'x\\nx\\n' | ./chat --model %s --max-tokens 20 --greedy --fresh 2>/dev/null", model_path), &code);
    char *line = strchr(first, '\n');
    bool both = line && strncmp(first, line + 1, (size_t)(line - first)) == 0;
    check(both, "--fresh --greedy: the same question, the same answer");
    free(first);
    char *small = output_of(path_of("./chat --model %s --context 15 2>&1 < /dev/null", model_path), &code);
    check(code == 1 && strstr(small, "--context 15 is too small") != NULL, "a context of 15: %s", small);
    free(small);
    char *raw = output_of(path_of("printf 'ab' | ./chat --model %s --raw --max-tokens 6 --greedy 2>/dev/null", model_path), &code);
    char *generated = output_of(path_of("./train_qwen generate --model %s --prompt ab --max-tokens 6 --greedy", model_path), &code);
    check(strlen(raw) > 3 && strlen(generated) > 2 && strncmp(raw, generated + 2, strlen(raw) - 3) == 0, "--raw continues as ./train_qwen generate does");
    free(raw), free(generated);
}

int main(void) {
    test_filters();
    test_generate("qwen2"), test_generate("qwen3");
    test_gaps();
    test_sequence();
    test_prompts();
    test_system_messages();
    make_model();
    test_refused();
    test_adapter();
    test_terminal();
    test_interrupt();
    test_write_text();
    test_pipe();
    delete_directory(model_path);
    return verdict();
}

// chat.c: talk to a checkpoint, in the terminal or through a pipe.
//
//   make chat && ./chat --model out                          make chatcu for the GPU
//   ./chat --model out < questions.txt > answers.txt         one question a line
//   ./chat --help
//
// The prompt is made from the whole conversation each time, and what the machine has already processed of it is not processed again
// (Sequence in train_qwen.c). So a new turn costs its own tokens only, and dropping old turns or changing the system message just works.
//
// Sections: 1 options | 2 the conversation and its prompt | 3 reading a line | 4 an answer | 5 commands, main
#define QWEN_NO_MAIN
#if defined(__CUDACC__) || defined(CUDA_EMU)
#include "../train_qwen.cu"
#else
#include "../train_qwen.c"
#endif
#include "data/chat_template.h"
#include <poll.h>
#ifdef QWEN_READLINE
#include <readline/history.h>
#include <readline/readline.h>
#endif

// ---------------------------------------------------------------------------------------------------------------------------------
// 1. Options

static const char CHECKPOINTS_OWN[] = "";        // --system was not given
static const char *const CHAT_TEMPLATES[] = {"chatml", "mini_llm", NULL};            // in the order of TemplateKind
static struct {
    const char *system;
    int chat_template;
    long max_tokens, context;
    bool raw, no_think, fresh;
} chat = {CHECKPOINTS_OWN, TEMPLATE_CHATML, 1024, 0, false, false, false};

static const Option CHAT_OPTIONS[] = {
    {"model",        1,        OPTION_STRING, &opt.model,        0, NULL, "a Hugging Face directory, or a run's directory; default: out"},
    {"template",     1,        OPTION_CHOICE, &chat.chat_template, 0, CHAT_TEMPLATES, "how the model was taught conversations"},
    {"raw",          1,        OPTION_FLAG,   &chat.raw,         0, NULL, "no template: the model continues your text"},
    {"system",       1,        OPTION_STRING, &chat.system,      0, NULL, "system message; default: the checkpoint's own, if it has one"},
    {"no-think",     1,        OPTION_FLAG,   &chat.no_think,    0, NULL, "Qwen3: answer without thinking"},
    {"fresh",        1,        OPTION_FLAG,   &chat.fresh,       0, NULL, "every question begins a new conversation"},
    {"context",      1,        OPTION_INT,    &chat.context,     0, NULL, "tokens kept of a conversation; 0: the model's, at most 4096"},
    {"max-tokens",   1,        OPTION_INT,    &chat.max_tokens,  1, NULL, "of an answer"},
    SAMPLING_OPTIONS(1),
    {"seed",         1,        OPTION_INT,    &opt.seed,         0, NULL, "of sampling"},
    {NULL, 0, OPTION_FLAG, NULL, 0, NULL, NULL},
};

static const char COMMANDS[] =
    "  /reset          begin a new conversation\n"
    "  /retry          answer the last question again\n"
    "  /system TEXT    set the system message and begin a new conversation; without TEXT: show it\n"
    "  /save FILE      add the conversation to FILE, a line of JSON that ./prepare --task sft reads\n"
    "  /help  /quit    this list; the end, as Ctrl-D\n"
    "Ctrl-C stops an answer. A line that ends in \\ goes on in the next. Begin with a space to say something that begins with /.\n";

// ---------------------------------------------------------------------------------------------------------------------------------
// 2. The conversation and its prompt

typedef struct { char *question; TokenList asked, answer; } Turn;        // the contents only; the template is added by chat_prompt
typedef struct {
    Model model;
    Tokenizer *tokenizer;
    ChatTemplate layout;
    Sampler sampler;
    Sequence sequence;
    TokenList system, no_thinking;               // no_thinking: what --no-think puts before an answer
    const char *system_text;
    uint32_t think_end;                          // </think>, NO_TOKEN where the tokenizer has none
    Turn *turns;
    int num_turns, first_turn;                   // turns before first_turn no longer fit
    uint64_t num_answers, num_cut;               // cut: not ended by the model, but by --max-tokens or the context
    bool interactive;
    double read_tokens, read_s, made_tokens, made_s;             // all so far
} Chat;

// The text between `<|im_start|>system\n` and `<|im_end|>` that the checkpoint's own Jinja template holds, which is what transformers puts
// before a conversation that has no system message. "" if there is none (as in Qwen3's template, where a variable stands there).
const char *system_in_template(const char *text) {
    static const char begin[] = "<|im_start|>system";
    for (const char *at = text; (at = strstr(at, begin)) != NULL;) {
        at += strlen(begin);
        if (*at == '\n') at++;
        else if (strncmp(at, "\\n", 2) == 0) at += 2;
        else continue;
        const char *end = strstr(at, "<|im_end|>");
        char *message = strdup(at), *to = message;
        for (; end && at < end && *at != '\'' && *at != '"'; at++) {       // a quote ends the string: a variable follows
            if (*at == '\\' && at + 1 < end) at++, *to++ = *at == 'n' ? '\n' : *at;
            else *to++ = *at;
        }
        *to = 0;
        if (at == end && to > message) return message;
        free(message);
    }
    return "";
}

const char *checkpoint_system(const char *checkpoint) {
    const char *jinja = path_of("%s/chat_template.jinja", checkpoint), *path = path_of("%s/tokenizer_config.json", checkpoint);
    if (file_exists(jinja)) return system_in_template(read_file(jinja, NULL));
    bool v1;
    model_config(checkpoint, &v1);
    if (v1) return "You are a helpful assistant.";                         // Qwen v1 has it in its code (make_context)
    if (!file_exists(path)) return "";
    Json *json = read_json(path);
    const Json *text = json_get(json, "chat_template");
    const char *message = text && text->type == JSON_STRING ? system_in_template(text->text) : "";
    json_free(json);
    return message;
}

void chat_set_system(Chat *c, const char *text) {
    c->system_text = text, c->system.count = 0;
    tokenizer_encode_text(c->tokenizer, text, strlen(text), &c->system);
}

bool system_fits(const Chat *c) { return (int)c->system.count < c->model.positions / 2; }

// The tokens of the conversation from turn `first` on, ready for the answer to its last question.
void chat_prompt(const Chat *c, int first, TokenList *out) {
    out->count = 0;
    bool is_first = c->system.count == 0;
    if (!is_first) {
        template_before(&c->layout, ROLE_SYSTEM, true, 0, out);
        push_tokens(out, &c->system, 0);
        template_after(&c->layout, ROLE_SYSTEM, 0, out);
    }
    for (int i = first; i < c->num_turns; i++) {
        const Turn *turn = &c->turns[i];
        template_before(&c->layout, ROLE_USER, is_first, 0, out);
        push_tokens(out, &turn->asked, 0);
        template_after(&c->layout, ROLE_USER, 0, out);
        template_before(&c->layout, ROLE_ASSISTANT, is_first = false, 0, out);
        if (i + 1 == c->num_turns) break;
        push_tokens(out, &turn->answer, 0);
        if (!chat.raw) template_after(&c->layout, ROLE_ASSISTANT, 0, out);
    }
    push_tokens(out, &c->no_thinking, 0);
}

void chat_drop_turns(Chat *c, int from) {
    for (int i = from; i < c->num_turns; i++) free(c->turns[i].question), free(c->turns[i].asked.ids), free(c->turns[i].answer.ids);
    if (c->num_turns > from) c->num_turns = from;
    if (c->first_turn >= c->num_turns) c->first_turn = c->num_turns > 0 ? c->num_turns - 1 : 0;      // /retry asks the last one
}

void chat_add_question(Chat *c, const char *text) {
    c->turns = (Turn *)xrealloc(c->turns, (size_t)(c->num_turns + 1) * sizeof(Turn));
    Turn *turn = &c->turns[c->num_turns++];
    memset(turn, 0, sizeof *turn);
    turn->question = strdup(text);
    if (chat.raw) tokenizer_encode(c->tokenizer, text, strlen(text), SPECIALS_PARSED, &turn->asked);
    else template_question(&c->layout, c->tokenizer, text, strlen(text), 0, &turn->asked);
}

// Keeps the answer's tokens. Thinking is not kept, as in Qwen3's template: it would fill the context and be imitated.
void chat_keep_answer(Chat *c, const int *tokens, int count) {
    Turn *turn = &c->turns[c->num_turns - 1];
    int from = 0;
    for (int i = 0; i < count && !chat.raw; i++) if ((uint32_t)tokens[i] == c->think_end) from = i + 1;
    for (size_t len; from > 0 && from < count; from++) {                   // and the line ends after it
        const char *bytes = tokenizer_bytes(c->tokenizer, (uint32_t)tokens[from], &len);
        if (strspn(bytes, "\n") < len) break;
    }
    for (int i = from; i < count; i++) token_list_push(&turn->answer, (uint32_t)tokens[i]);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 3. Reading a line

static volatile sig_atomic_t interrupted;
void on_interrupt(int signal_number) { interrupted = signal_number; }

// Waits until the terminal has something to read, or Ctrl-C was pressed (then false), also just before this call.
bool wait_for_input(void) {
    struct pollfd input = {STDIN_FILENO, POLLIN, 0};
    while (!interrupted && poll(&input, 1, 100) <= 0) continue;
    return !interrupted;
}

#ifdef QWEN_READLINE
// readline's own signal handling goes on waiting for the line; here Ctrl-C gives it up.
int read_key(FILE *from) {
    unsigned char key;
    if (!wait_for_input()) return rl_replace_line("", 0), '\n';
    return read(fileno(from), &key, 1) == 1 ? key : EOF;
}
#endif

// The next line without its end, in memory of the caller's; NULL at the end of input, or when Ctrl-C is pressed (then interrupted is set).
char *read_line(const Chat *c, const char *prompt) {
#ifdef QWEN_READLINE
    if (c->interactive) {
        char *line = readline(prompt);
        if (line && line[0]) add_history(line);
        if (line && interrupted) free(line), line = NULL;
        return line;
    }
#endif
    char *line = NULL;
    size_t room = 0;
    if (c->interactive) fputs(prompt, stdout), fflush(stdout);
    bool waiting = !c->interactive || wait_for_input();          // a terminal gives a line at a time, so none is in stdin's buffer
    ssize_t length = waiting ? getline(&line, &room, stdin) : -1;
    if (length < 0) {
        CHECK(!ferror(stdin) || interrupted, "cannot read the input: %s", strerror(errno));
        clearerr(stdin);
        free(line);
        return NULL;
    }
    CHECK(strlen(line) == (size_t)length, "the input holds a NUL character; text was expected");
    while (length > 0 && (line[length - 1] == '\n' || line[length - 1] == '\r')) line[--length] = 0;
    return line;
}

// A question: a line or, in the terminal, several.
char *read_question(const Chat *c) {
    if (c->interactive) printf("\n");
    char *text = read_line(c, "> ");
    for (size_t length; text && c->interactive && (length = strlen(text)) > 0 && text[length - 1] == '\\';) {
        char *more = read_line(c, "  ");
        if (!more) free(text);
        if (!more) return NULL;
        text = (char *)xrealloc(text, length + strlen(more) + 1);
        text[length - 1] = '\n';
        strcpy(text + length, more);
        free(more);
    }
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 4. An answer

// What people should see but a pipe should not.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
void note(const Chat *c, const char *format, ...) {
    va_list arguments;
    bool terminal = c->interactive && isatty(STDERR_FILENO);
    fflush(stdout);
    fputs(terminal ? "\033[2m(" : "(", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputs(terminal ? ")\033[0m\n" : ")\n", stderr);
}

// Whole characters, without the control characters that could take over a terminal. A pipe with --fresh gets one line for each answer:
// line ends in it become \n.
void write_text(const Chat *c, const char *text, size_t len) {
    for (size_t i = 0; i < len; i++) {
        unsigned char byte = (unsigned char)text[i], next = i + 1 < len ? (unsigned char)text[i + 1] : 0;
        if (byte == 0xC2 && next < 0xA0) i++;                              // U+0080 to U+009F
        else if (byte == '\n' && chat.fresh && !c->interactive) fputs("\\n", stdout);
        else if ((byte >= 0x20 && byte != 0x7F) || byte == '\n' || byte == '\t') putchar(byte);
    }
    fflush(stdout);
}

typedef struct { const Chat *chat; Utf8Stream stream; int made; } Writer;
bool write_token(void *context, int id) {
    Writer *w = (Writer *)context;
    const Tokenizer *t = w->chat->tokenizer;
    char text[1024];
    size_t len;
    const char *bytes = tokenizer_bytes(t, (uint32_t)id, &len);
    bool is_control = id >= t->num_ranks && t->specials[t->special_at[id - t->num_ranks]].is_control;
    if (id == t->im_start) return false;         // a model that begins a new turn by itself has ended its answer
    w->made++;
    if (!is_control) write_text(w->chat, text, utf8_stream(&w->stream, bytes, len, text));
    return !interrupted;
}

// Processes the prompt but for its last token, in pieces, so that Ctrl-C is noticed. False if it was.
bool read_prompt(Chat *c, const TokenList *prompt) {
    double begin = now_s();
    bool shown = false, terminal = c->interactive && isatty(STDERR_FILENO);
    int *tokens = (int *)prompt->ids, count = (int)prompt->count;          // ids are below 2^24
    sequence_set(&c->sequence, tokens, count);
    int cached = c->sequence.cached;
    for (int upto = cached; upto < count - 1 && !interrupted;) {
        upto = upto + PROMPT_CHUNK < count - 1 ? upto + PROMPT_CHUNK : count - 1;
        sequence_set(&c->sequence, tokens, upto);
        sequence_logits(&c->model, &c->sequence);
        shown = terminal && now_s() - begin > 1;
        if (shown) fprintf(stderr, "\r\033[2m(read %d of %d tokens)\033[0m", upto, count);
    }
    if (shown) fputs("\r\033[K", stderr);
    sequence_set(&c->sequence, tokens, count);
    c->read_tokens += count - cached, c->read_s += now_s() - begin;
    return !interrupted;
}

// Answers the last question. False if it is too long for the context, or given up: then it is no longer part of the conversation.
// A conversation that has become too long is cut to half of the context, and not less, because what remains must be processed again.
bool chat_answer(Chat *c) {
    int positions = c->model.positions, reserve = chat.max_tokens < positions / 4 ? (int)chat.max_tokens : positions / 4;
    int last = c->num_turns - 1, before = c->first_turn;
    TokenList prompt = {NULL, 0, 0};
    chat_prompt(c, c->first_turn, &prompt);
    for (bool full = (int)prompt.count > positions - reserve; full && (int)prompt.count > positions / 2 && c->first_turn < last;)
        chat_prompt(c, ++c->first_turn, &prompt);
    if ((int)prompt.count > positions - reserve) {
        note(c, "the question is too long: the prompt has %zu tokens, the context room for %d and an answer; see --context", prompt.count,
             positions - reserve);
        c->first_turn = before;
        chat_drop_turns(c, last);
        return free(prompt.ids), false;
    }
    if (c->first_turn > before)
        note(c, "the oldest %d turn%s dropped: the context holds %d tokens", c->first_turn - before,
             c->first_turn - before == 1 ? " was" : "s were", positions);
    double read_before = c->read_tokens, s_before = c->read_s;
    interrupted = 0;
    if (!read_prompt(c, &prompt)) {
        note(c, "given up; the question is forgotten");
        chat_drop_turns(c, last);
        return free(prompt.ids), false;
    }
    Writer writer = {c, {{0}, 0}, 0};
    double begin = now_s();
    uint64_t seed = mix64((uint64_t)opt.seed) + c->num_answers++;
    int made = generate(&c->model, &c->sequence, c->tokenizer, (int)chat.max_tokens, &c->sampler, seed, write_token, &writer);
    double seconds = now_s() - begin;
    c->made_tokens += made, c->made_s += seconds;
    char held[4];
    bool ended = writer.made < made;                                       // by an end token
    if (ended) write_text(c, held, utf8_stream_flush(&writer.stream, held));
    printf("\n");
    fflush(stdout);
    c->num_cut += !ended && !interrupted;
    chat_keep_answer(c, c->sequence.tokens + prompt.count, chat.raw ? made : writer.made);
    if (c->interactive) {
        const char *why = interrupted ? "stopped" : ended ? "" : made == chat.max_tokens ? "cut at --max-tokens" : "the context is full";
        note(c, "%s%s%.0f tokens read in %.1f s, %d written, %.1f tokens/s", why, why[0] ? "; " : "", c->read_tokens - read_before,
             c->read_s - s_before, made, (double)made / fmax(seconds, 1e-9));
    }
    return free(prompt.ids), true;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 5. Commands, main

void save_message(FILE *f, Role role, const char *text, size_t len, bool is_first) {
    fprintf(f, "%s{\"role\":\"%s\",\"content\":", is_first ? "" : ",", ROLES[role]);
    json_write_string(f, text, len);
    fputc('}', f);
}

// Adds the conversation, also the turns that no longer fit into the context, as one line of JSON.
void chat_save(const Chat *c, const char *path) {
    FILE *f = c->num_turns > 0 ? fopen(path, "ab") : NULL;
    if (c->num_turns == 0) note(c, "there is nothing to save yet");
    else if (!f) note(c, "cannot write %s: %s", path, strerror(errno));
    if (!f) return;
    fputs("{\"messages\":[", f);
    if (c->system_text[0]) save_message(f, ROLE_SYSTEM, c->system_text, strlen(c->system_text), true);
    for (int i = 0; i < c->num_turns; i++) {
        const Turn *turn = &c->turns[i];
        save_message(f, ROLE_USER, turn->question, strlen(turn->question), i == 0 && !c->system_text[0]);
        char *answer = (char *)xmalloc(1);
        size_t length = 0, len;
        for (size_t k = 0; k < turn->answer.count; k++) {
            const char *bytes = tokenizer_bytes(c->tokenizer, turn->answer.ids[k], &len);
            answer = (char *)xrealloc(answer, length + len + 1);
            memcpy(answer + length, bytes, len), length += len;
        }
        save_message(f, ROLE_ASSISTANT, answer, length, false);
        free(answer);
    }
    fputs("]}\n", f);
    bool written = !ferror(f);
    written = fclose(f) == 0 && written;
    if (written) note(c, "%d turn%s added to %s", c->num_turns, c->num_turns == 1 ? "" : "s", path);
    else note(c, "cannot write %s: %s", path, strerror(errno));
}

// The text after "/name " if the line is that command, else NULL.
const char *command_argument(const char *line, const char *name) {
    size_t n = strlen(name);
    if (strncmp(line, name, n) != 0 || (line[n] && line[n] != ' ')) return NULL;
    line += n;
    return line + strspn(line, " ");
}

// Does what a line that begins with / says. False at /quit.
bool chat_command(Chat *c, const char *line) {
    const char *text;
    if (command_argument(line, "/quit") || command_argument(line, "/exit")) return false;
    if (command_argument(line, "/help")) fputs(COMMANDS, stdout);
    else if (command_argument(line, "/reset")) chat_drop_turns(c, 0), note(c, "a new conversation");
    else if (command_argument(line, "/retry")) {
        if (c->num_turns == 0) return note(c, "there is no question yet"), true;
        c->turns[c->num_turns - 1].answer.count = 0;
        chat_answer(c);
    } else if ((text = command_argument(line, "/system")) != NULL) {
        const char *before = c->system_text;
        if (text[0]) chat_set_system(c, strdup(text));
        if (!system_fits(c)) return chat_set_system(c, before), note(c, "that is too long: more than half of the context"), true;
        if (text[0]) chat_drop_turns(c, 0);
        note(c, "%s%s", c->system_text[0] ? "the system message is: " : "there is no system message", c->system_text);
    } else if ((text = command_argument(line, "/save")) != NULL) {
        if (text[0]) chat_save(c, text);
        else note(c, "/save needs a file name");
    } else {
        note(c, "unknown command %s; /help lists them", line);
    }
    return true;
}

void chat_open(Chat *c) {
    memset(c, 0, sizeof *c);
    c->sampler = sampler_of_options();
    c->tokenizer = open_checkpoint(&c->model);
    const Tokenizer *t = c->tokenizer;
    const char *checkpoint = find_checkpoint(opt.model);
    TemplateKind kind = chat.raw ? TEMPLATE_NONE : (TemplateKind)chat.chat_template;
    c->layout = template_make(kind, t, (uint32_t)(t->im_end >= 0 ? t->im_end : t->endoftext));
    const Special *think_end = special_find(t, "</think>");
    c->think_end = think_end ? think_end->id : NO_TOKEN;
    CHECK(!chat.no_think || think_end, "--no-think: the tokenizer of %s has no </think>; its model doesn't think", checkpoint);
    CHECK(!chat.no_think || kind == TEMPLATE_CHATML, "--no-think is part of --template chatml");
    if (chat.no_think) tokenizer_encode(t, "<think>\n\n</think>\n\n", strlen("<think>\n\n</think>\n\n"), SPECIALS_PARSED, &c->no_thinking);
    bool own = chat.system == CHECKPOINTS_OWN;
    chat_set_system(c, !own ? chat.system : kind == TEMPLATE_CHATML ? checkpoint_system(checkpoint) : "");
    int max_T = c->model.config.max_T, positions = chat.context > 0 ? (int)chat.context : max_T < 4096 ? max_T : 4096;
    CHECK(positions <= max_T, "--context %d is more than the %d positions of the model", positions, max_T);
    CHECK(positions >= 16, "--context %d is too small for a question and an answer; at least 16", positions);
    CHECK((int)c->system.count < positions / 2, "the system message has %zu tokens, more than half of the context of %d", c->system.count,
          positions);
    machine_open(&c->model, 1, positions < PROMPT_CHUNK ? positions : PROMPT_CHUNK, 1, positions, RECOMPUTE_LAYERS, EVALUATE);
    c->interactive = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
}

void chat_begin_terminal(const Chat *c) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt;            // without SA_RESTART, so that it also ends waiting for a line
    sigaction(SIGINT, &action, NULL);
#ifdef QWEN_READLINE
    rl_catch_signals = 0;
    rl_getc_function = read_key;
    rl_bind_key('\t', rl_insert);                // no completion of file names
#endif
    printf("%s: %.1fM parameters, a context of %d tokens. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.\n",
           find_checkpoint(opt.model), (double)c->model.table.num_params / 1e6, c->model.positions);
    if (c->system_text[0]) note(c, "system message: %s", c->system_text);
}

// Returns how many questions could not be answered.
int chat_run(Chat *c) {
    int failed = 0, asked = 0;
    if (c->interactive) chat_begin_terminal(c);
    for (;;) {
        interrupted = 0;
        char *line = read_question(c);
        if (!line && interrupted) {
            printf("\n");
            note(c, "Ctrl-D or /quit ends");
            continue;
        }
        if (!line) break;
        bool is_command = c->interactive && line[0] == '/';
        if (is_command && !chat_command(c, line)) { free(line); break; }
        size_t from = chat.raw ? 0 : strspn(line, " \t\n"), length = strlen(line);
        while (!chat.raw && length > from && strchr(" \t\n", line[length - 1])) line[--length] = 0;
        bool empty = length <= from;
        if (empty && chat.fresh && !c->interactive) printf("\n");          // answers keep their places
        if (!is_command && !empty) {
            if (chat.fresh) chat_drop_turns(c, 0);
            chat_add_question(c, line + from);
            asked++;
            bool answered = chat_answer(c);
            if (!answered && !c->interactive) failed++, printf("\n");      // an empty answer, so that the others keep their places
        }
        free(line);
    }
    if (c->interactive) printf("\n");
    else if (asked > 0)
        note(c, "%d questions, %d unanswered, %d answers without an end; %.0f tokens read in %.1f s, %.0f written, %.1f tokens/s", asked,
             failed, (int)c->num_cut, c->read_tokens, c->read_s, c->made_tokens, c->made_tokens / fmax(c->made_s, 1e-9));
    return failed;
}

void print_chat_help(void) {
    printf("chat talks to a checkpoint: in the terminal, or one question a line through a pipe.\n\n"
           "  ./chat [options]                                  a conversation\n"
           "  ./chat [options] < questions.txt > answers.txt    --fresh: without memory of the questions before,\n"
           "                                                    and an answer is one line, its line ends written as \\n\n\n"
           "When a conversation leaves no room for an answer of --max-tokens, or less than a quarter of the context, its oldest turns are\n"
           "dropped, until it takes at most half of the context.\n\nOptions (defaults in brackets):\n");
    print_options(CHAT_OPTIONS, 1);
    printf("\nIn the terminal:\n%s", COMMANDS);
}

#ifndef CHAT_NO_MAIN
int main(int argc, char **argv) {
    sleep_when_idle(argv);
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return print_chat_help(), 0;
    parse_options(CHAT_OPTIONS, 1, argc, argv, 1, NULL);
    static Chat c;
    chat_open(&c);
    int failed = chat_run(&c);
    CHECK(fflush(stdout) == 0 && !ferror(stdout), "cannot write the answers: %s", strerror(errno));
    return failed > 0;
}
#endif

// chat_template.h: how a conversation becomes tokens, for training (prepare.c) and for talking (../chat.c) alike. Include after
// train_qwen.c.
//
//   chatml      <|im_start|>role \n content <|im_end|>, then \n before the next message: Qwen's own
//   mini_llm    你是一个助手 用户: question 回答: answer END: MINI_LLM's
//   none        question answer END
//
// A message is template_before, template_content (template_question if the user asks), template_after. The special tokens come from here
// alone; content is always text. Role, \n and content are encoded one by one, as Qwen's chat code does, so content that begins with \n is
// not merged with the template's \n. MINI_LLM encodes all before the answer as one text, in which a token may begin with the space before
// the question: that space counts as content.
#ifndef CHAT_TEMPLATE_H
#define CHAT_TEMPLATE_H

typedef enum { TEMPLATE_CHATML, TEMPLATE_MINI_LLM, TEMPLATE_NONE } TemplateKind;
static const char *const TEMPLATES[] = {"chatml", "mini_llm", "none", NULL};

typedef enum { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, NUM_ROLES } Role;
static const char *const ROLES[] = {"system", "user", "assistant"};

typedef struct {
    TemplateKind kind;
    uint32_t im_start, im_end, end_id;           // end_id: what ends an answer where there is no <|im_end|>
    TokenList roles[NUM_ROLES], newline, question, answer;
} ChatTemplate;

ChatTemplate template_make(TemplateKind kind, const Tokenizer *t, uint32_t end_id) {
    ChatTemplate c;
    memset(&c, 0, sizeof c);
    CHECK(kind != TEMPLATE_CHATML || (t->im_start >= 0 && t->im_end >= 0),
          "--template chatml needs <|im_start|> and <|im_end|>, which the set '%s' has not", t->special_set);
    c.kind = kind, c.im_start = (uint32_t)t->im_start, c.im_end = (uint32_t)t->im_end, c.end_id = end_id;
    for (int r = 0; r < NUM_ROLES; r++) tokenizer_encode_text(t, ROLES[r], strlen(ROLES[r]), &c.roles[r]);
    tokenizer_encode_text(t, "\n", 1, &c.newline);
    tokenizer_encode_text(t, "你是一个助手 用户:", strlen("你是一个助手 用户:"), &c.question);
    tokenizer_encode_text(t, " 回答: ", strlen(" 回答: "), &c.answer);
    return c;
}

void push_tokens(TokenList *out, const TokenList *list, uint32_t flags) {
    for (size_t i = 0; i < list->count; i++) token_list_push(out, list->ids[i] | flags);
}

// What joins an instruction and its input.
const char *template_joint(const ChatTemplate *c) { return c->kind == TEMPLATE_MINI_LLM ? " " : "\n"; }

// Appends the content's tokens, each with the flags.
void template_content(const ChatTemplate *c, const Tokenizer *t, Role role, const char *text, size_t len, uint32_t flags, TokenList *out) {
    size_t from = out->count;
    bool leads = c->kind == TEMPLATE_MINI_LLM && role == ROLE_USER;
    char *joined = leads ? (char *)xmalloc(len + 1) : NULL;
    if (leads) joined[0] = ' ', memcpy(joined + 1, text, len);
    tokenizer_encode_text(t, leads ? joined : text, len + leads, out);
    for (size_t i = from; i < out->count; i++) out->ids[i] |= flags;
    free(joined);
}

// The content of a user message that is no instruction joined with its input. In MINI_LLM's the space for the input is there all the same.
void template_question(const ChatTemplate *c, const Tokenizer *t, const char *text, size_t len, uint32_t flags, TokenList *out) {
    char *joined = (char *)xmalloc(len + 1);
    memcpy(joined, text, len);
    if (c->kind == TEMPLATE_MINI_LLM) joined[len++] = *template_joint(c);
    template_content(c, t, ROLE_USER, joined, len, flags, out);
    free(joined);
}

// What stands before and after the content of a message, each token with the flags (of dataloader.h, or 0). Nobody needs template_after of
// an answer that is still to be made.
void template_before(const ChatTemplate *c, Role role, bool is_first, uint32_t flags, TokenList *out) {
    if (c->kind == TEMPLATE_MINI_LLM && role == ROLE_USER) push_tokens(out, &c->question, flags);
    if (c->kind != TEMPLATE_CHATML) return;
    if (!is_first) push_tokens(out, &c->newline, flags);
    token_list_push(out, c->im_start | flags);
    push_tokens(out, &c->roles[role], flags);
    push_tokens(out, &c->newline, flags);
}
void template_after(const ChatTemplate *c, Role role, uint32_t flags, TokenList *out) {
    if (c->kind == TEMPLATE_CHATML) token_list_push(out, c->im_end | flags);
    else if (role == ROLE_SYSTEM) push_tokens(out, &c->newline, flags);
    else if (role == ROLE_ASSISTANT) token_list_push(out, c->end_id | flags);
    else if (c->kind == TEMPLATE_MINI_LLM) push_tokens(out, &c->answer, flags);
}
#endif

// fuzz.h: what fuzz_json.c, fuzz_tokenizer.c and fuzz_tokens.c share. Include it first; it includes prepare.c and with it everything.
//
//   make fuzz FUZZ_SECONDS=3600      all three at once, with clang's libFuzzer, address and undefined behaviour sanitizers
//   build/sanitized_fuzz_json FILES  any compiler: feeds files, as `make test` does with dev/test/fuzz_corpus
//
// A target is fuzz_one(data, size). Errors end it in one of two ways: CHECK and DIE of the code under test jump back to here, which is
// a good end, and what they held is freed; fuzz_expect aborts, which is a finding.
#ifndef FUZZ_H
#define FUZZ_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

static jmp_buf fuzz_return;
static FILE *fuzz_messages, *fuzz_terminal;                      // error lines go to /dev/null
static struct { void *at; size_t map_bytes; } *fuzz_held;        // memory of this run; map_bytes 0: from malloc
static size_t fuzz_num_held, fuzz_capacity;

static void *fuzz_hold(void *p, size_t map_bytes) {
    if (fuzz_num_held == fuzz_capacity) {
        fuzz_capacity = 2 * fuzz_capacity + 1024;
        fuzz_held = realloc(fuzz_held, fuzz_capacity * sizeof *fuzz_held);
    }
    fuzz_held[fuzz_num_held].at = p;
    fuzz_held[fuzz_num_held].map_bytes = map_bytes;
    fuzz_num_held += p != NULL;
    return p;
}

static void fuzz_drop(void *p) {
    size_t i = fuzz_num_held;
    while (i > 0 && fuzz_held[i - 1].at != p) i--;
    if (i > 0) fuzz_held[i - 1] = fuzz_held[--fuzz_num_held];
}

// Frees what the run still holds; the number of blocks.
static size_t fuzz_release(void) {
    size_t count = fuzz_num_held;
    for (; fuzz_num_held > 0; fuzz_num_held--) {
        if (fuzz_held[fuzz_num_held - 1].map_bytes > 0) munmap(fuzz_held[fuzz_num_held - 1].at, fuzz_held[fuzz_num_held - 1].map_bytes);
        else free(fuzz_held[fuzz_num_held - 1].at);
    }
    return count;
}

static void *fuzz_realloc(void *old, size_t bytes) { return fuzz_drop(old), fuzz_hold(realloc(old, bytes), 0); }
static void *fuzz_calloc(size_t count, size_t bytes) { return fuzz_hold(calloc(count, bytes), 0); }
static void fuzz_free(void *p) { fuzz_drop(p), free(p); }
static char *fuzz_strdup(const char *text) { return (char *)fuzz_hold(strdup(text), 0); }
static void *fuzz_mmap(void *at, size_t bytes, int protection, int flags, int file, off_t offset) {
    void *map = mmap(at, bytes, protection, flags, file, offset);
    return map == MAP_FAILED ? map : fuzz_hold(map, bytes);
}
static int fuzz_munmap(void *at, size_t bytes) { return fuzz_drop(at), munmap(at, bytes); }

#undef stderr
#undef strdup
#define stderr fuzz_messages
#define exit(code) longjmp(fuzz_return, 1)
#define realloc fuzz_realloc
#define calloc fuzz_calloc
#define free fuzz_free
#define strdup fuzz_strdup
#define mmap fuzz_mmap
#define munmap fuzz_munmap
#define main prepare_main
#include "../data/prepare.c"
#undef main

#define fuzz_expect(condition, ...) \
    do { if (!(condition)) { stdout = fuzz_terminal; printf("finding: " __VA_ARGS__); puts(""); fflush(stdout); abort(); } } while (0)

void fuzz_one(const unsigned char *data, size_t size);           // the target
void fuzz_start(void);                                           // before the first

// A copy of exactly these bytes, so that the sanitizer sees a read past them.
static char *fuzz_copy(const void *data, size_t size) { return (char *)memcpy(xmalloc(size), data, size); }

// One input may take so many seconds of processor time.
enum { FUZZ_LIMIT_S = 10 };
static void fuzz_too_long(int signal_number) { (void)signal_number; fuzz_expect(false, "more than %d s", FUZZ_LIMIT_S); }

static char fuzz_path[64];                                       // a file for inputs that are read from files
static void fuzz_write(const void *data, size_t size) {
    int file = open(fuzz_path, O_WRONLY | O_TRUNC);
    fuzz_expect(file >= 0 && write(file, data, size) == (ssize_t)size, "cannot write %s", fuzz_path);
    close(file);
}
static void fuzz_remove(void) { unlink(fuzz_path); }

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    fuzz_messages = fopen("/dev/null", "w");
    fuzz_terminal = stdout;
    snprintf(fuzz_path, sizeof fuzz_path, "%s/fuzz_XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    close(mkstemp(fuzz_path));
    atexit(fuzz_remove);
    signal(SIGVTALRM, fuzz_too_long);
    fuzz_start();
    fuzz_num_held = 0;                                           // what it made stays
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct itimerval limit = {{0, 0}, {FUZZ_LIMIT_S, 0}};
    int first_file = dup(0);
    close(first_file);
    setitimer(ITIMER_VIRTUAL, &limit, NULL);
    if (setjmp(fuzz_return) == 0) fuzz_one(data, size);
    else for (int i = 0; i < 8; i++) close(first_file + i);      // what the failed function had open
    fuzz_release();
    stdout = fuzz_terminal;
    return 0;
}

#ifndef LIBFUZZER
int main(int argc, char **argv) {
    LLVMFuzzerInitialize(&argc, &argv);
    for (int i = 1; i < argc; i++) {
        size_t size;
        char *data = read_file(argv[i], &size);
        fuzz_num_held = 0;
        char *copy = fuzz_copy(data, size);
        fuzz_num_held = 0;
        LLVMFuzzerTestOneInput((uint8_t *)copy, size);
    }
    printf("passed %d, failed 0, skipped 0\n", argc - 1);
    return 0;
}
#endif
#endif

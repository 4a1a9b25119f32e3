// test.h: counting checks and watching failures. Include after train_qwen.c.
#ifndef TEST_H
#define TEST_H
#include <sys/wait.h>

static int passed, failed, skipped;

// One line a check; the message is printed in full only when it fails.
void check(bool ok, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    char text[512];
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    printf("%s %s\n", ok ? "ok  " : "FAIL", text);
    if (ok) passed++;
    else failed++;
}

// ||a - b|| / ||b|| over n numbers; NaN anywhere gives NaN.
double relative_error(const float *a, const float *b, size_t n) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - (double)b[i];
        difference += d * d, size += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / (size > 0 ? size : 1));
}

// Passes if the relative error is at most `tolerance`. Written as !(error <= tolerance) so that NaN fails.
void check_close(const char *what, const float *a, const float *b, size_t n, double tolerance) {
    double error = relative_error(a, b, n);
    bool ok = error <= tolerance;
    size_t worst = 0;
    for (size_t i = 0; i < n; i++) if (!(fabs((double)a[i] - (double)b[i]) <= fabs((double)a[worst] - (double)b[worst]))) worst = i;
    if (ok) check(ok, "%-58s error %.1e", what, error);
    else check(ok, "%-58s error %.1e, more than %.0e; worst at %zu: %g, should be %g", what, error, tolerance, worst, (double)a[worst], (double)b[worst]);
}

// Runs f(argument) in a child process: it must exit with code 1 and say `message` on stderr.
void check_fails(const char *what, void (*f)(const char *), const char *argument, const char *message) {
    int ends[2], status;
    char said[2048] = "";
    fflush(stdout);
    CHECK(pipe(ends) == 0, "no pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2), close(ends[0]), close(ends[1]);
        CHECK(freopen("/dev/null", "w", stdout) != NULL, "no /dev/null");
        f(argument);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t n, at = 0; (n = read(ends[0], said + at, sizeof said - 1 - (size_t)at)) > 0; at += n) said[at + n] = 0;
    close(ends[0]);
    waitpid(child, &status, 0);
    bool ok = WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(said, message) != NULL;
    size_t length = strlen(said);
    if (length > 0 && said[length - 1] == '\n') said[length - 1] = 0;
    check(ok, "%s: %s%s%s", what, said[0] ? said : "(no message)", ok ? "" : "; expected: ", ok ? "" : message);
}

int verdict(void) {
    printf("passed %d, failed %d, skipped %d\n", passed, failed, skipped);
    return failed > 0 || passed == 0;
}
#endif

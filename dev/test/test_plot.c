// test_plot.c: dev/plot.c on small logs: what it reads, its axes, and the coordinates in the SVG.
#define PLOT_NO_MAIN
#include "../plot.c"
#include "test.h"

static char scratch[64];                                         // a temporary directory

const char *file_with(const char *text) {
    const char *path = path_of("%s/log.jsonl", scratch);
    FILE *f = create_file(path);
    fputs(text, f);
    close_file(f, path);
    return path;
}

void test_reading(void) {
    plot.smooth = 2;
    Curves run = curves_read(file_with("{\"step\":1,\"loss\":4,\"lr\":0.1}\n{\"step\":2,\"loss\":3}\nnonsense\n{\"loss\":9}\n\n{\"step\":2,\"val_loss\":3.5}\n"
                                       "{\"step\":3,\"loss\":2}\n{\"step\":4,\"loss\":9}\n{\"step\":3,\"loss\":1}\n{\"step\":4,\"loss\":3,\"name\":\"x\"}\n{\"step\":5,\"lo"));
    const Series *loss = series_find(&run, "loss"), *validation = series_find(&run, "val_loss");
    check(run.count == 3 && loss->count == 4 && run.last_step == 4 && strcmp(run.name, scratch) == 0, "four losses; lines that are none are left out");
    check(loss->points[2].value == 1 && loss->points[3].value == 3, "after a resume, the later line of a step counts");
    check(validation->count == 1 && validation->points[0].smooth == 3.5, "a validation loss");
    check(loss->points[0].smooth == 4 && fabs(loss->points[1].smooth - 8 / 3.0) < 1e-12 && loss->points[3].smooth == 2,
          "smoothed: the first as it is, the middle over three, the last over two");
}

void test_axes(void) {
    static const struct { Axis axis; int count, ticks; double first, last; } cases[] = {
        {{0, 2666, false}, 9, 14, 0, 2600}, {{2.4, 9.1, false}, 7, 7, 3, 9}, {{0, 0.0026, false}, 4, 6, 0, 0.0025}, {{-1, 1, false}, 4, 5, -1, 1},
        {{0.5, 60, true}, 4, 7, 0.5, 50}, {{1e-8, 1, true}, 4, 3, 1e-6, 1}, {{2, 9, true}, 7, 8, 2, 9}, {{5, 5.0001, false}, 4, 6, 5, 5.0001}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        double ticks[64];
        int n = axis_ticks(&cases[i].axis, cases[i].count, ticks);
        check(n == cases[i].ticks && fabs(ticks[0] - cases[i].first) < 1e-9 && fabs(ticks[n - 1] - cases[i].last) < 1e-9,
              "axis from %g to %g: %d ticks from %s to %s", cases[i].axis.low, cases[i].axis.high, n, tick_text(ticks[0]), tick_text(ticks[n - 1]));
    }
    static const struct { double value; const char *text; } texts[] = {{0, "0"}, {0.0025, "2.5e-3"}, {0.25, "0.25"}, {1200, "1200"}, {20000, "20k"},
                                                                       {2.5e6, "2.5M"}, {1e-8, "1e-8"}, {-0.5, "-0.5"}};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        check(strcmp(tick_text(texts[i].value), texts[i].text) == 0, "%g is written %s", texts[i].value, tick_text(texts[i].value));
}

// Tags that close as they open, and nothing else.
bool is_well_formed(const char *text) {
    char open[32][32];
    int depth = 0;
    while ((text = strchr(text, '<')) != NULL) {
        const char *end = strchr(text, '>');
        char name[32] = "";
        if (!end || sscanf(text[1] == '/' ? text + 2 : text + 1, "%31[a-zA-Z]", name) != 1) return false;
        if (text[1] == '/') {
            if (depth == 0 || strcmp(open[--depth], name) != 0) return false;
        } else if (end[-1] != '/') {
            if (depth == 32) return false;
            strcpy(open[depth++], name);
        }
        text = end;
    }
    return depth == 0;
}

void test_svg(void) {
    char log[8192] = "";
    for (int i = 1; i <= 100; i++) sprintf(log + strlen(log), "{\"step\":%d,\"loss\":%d,\"norm\":1,\"ms\":3}\n", i, 100 - i);
    const char *path = file_with(strcat(log, "{\"step\":100,\"val_loss\":50}\n"));
    plot.out = path_of("%s/p.svg", scratch), plot.title = "a < b & \"c\"", plot.smooth = 0, plot.y_min = -1, plot.y_max = 99, plot.no_text = true;
    plot_runs(&path, 1);
    char *svg = read_file(plot.out, NULL);
    double top = 34 + 18 + 20, x0 = LEFT + (960 - LEFT - RIGHT) / 100.0, x1 = 960 - RIGHT;
    const char *first = path_of("d=\"M%.1f %.1fL", x0, top), *last = path_of("L%.1f %.1f\"", x1, top + LOSS_HEIGHT * 0.99);
    check(strstr(svg, first) && strstr(svg, last), "the curve goes from its first to its last point");
    check(strstr(svg, path_of("<circle cx=\"%.1f\" cy=\"%.1f\"", x1, top + LOSS_HEIGHT * 0.49)) != NULL, "the validation loss is where it should be");
    check(is_well_formed(svg) && strstr(svg, "a &lt; b &amp; \"c\""), "the SVG is well formed, a title with < and & included");
    check(strstr(svg, ">gradient norm<") && !strstr(svg, ">ms<"), "panels: norm, not ms");
    free(svg);
    plot.title = "", plot.y_min = plot.y_max = 0, plot.fields = "ms,loss";
    plot_runs(&path, 1);
    svg = read_file(plot.out, NULL);
    check(strstr(svg, ">ms<") && strstr(svg, ">loss<") && strstr(svg, ">ms<") < strstr(svg, ">loss<") && !strstr(svg, "norm"), "--fields ms,loss");
    free(svg);
    log[0] = 0;
    for (int i = 1; i <= 100; i++) sprintf(log + strlen(log), "{\"step\":%d,\"loss\":%d}\n", i, i % 2 * 2);
    path = file_with(log);
    plot.fields = "", plot.smooth = 40, plot.y_min = -1, plot.y_max = 3;
    plot_runs(&path, 1);
    svg = read_file(plot.out, NULL);
    const char *raw = strstr(svg, "opacity=\"0.25\""), *smooth = raw ? strstr(raw, "stroke-width=\"1.8\"") : NULL;
    top = 12 + 18 + 20;
    last = path_of("L%.1f %.1f\"", x1, top + LOSS_HEIGHT * 0.75);         // the last one is 0
    const char *mean = path_of("L%.1f %.1f\"", x1, top + LOSS_HEIGHT * (1 - (1 + 20 / 21.0) / 4));
    check(smooth && strstr(raw, last) && strstr(raw, last) < smooth && strstr(smooth, mean), "noise behind, the mean over 40 lines in front");
    free(svg);
    plot.y_min = plot.y_max = 0;
    plot.log_scale = true;
    path = file_with("{\"step\":1,\"loss\":0,\"x\":1e308,\"y\":-1e308}\n{\"step\":2,\"loss\":-3,\"x\":-1e308,\"y\":5}\n{\"step\":1e15,\"loss\":2}\n");
    plot_runs(&path, 1);
    svg = read_file(plot.out, NULL);
    check(is_well_formed(svg) && !strstr(svg, "nan") && !strstr(svg, "inf"), "huge, negative and zero numbers are drawn somehow");
    free(svg);
    plot.log_scale = false;
}

void read_log(const char *text) { curves_read(file_with(text)); }
void read_path(const char *path) { curves_read(path); }
void draw_fields(const char *fields) {
    const char *path = file_with("{\"step\":1,\"loss\":2}\n");
    plot.fields = fields, plot_runs(&path, 1);
}
void draw_range(const char *path) { path = file_with("{\"step\":1,\"loss\":2}\n"), plot.y_min = 5, plot.y_max = 4, plot_runs(&path, 1); }
void draw_nowhere(const char *path) { plot.out = path, path = file_with("{\"step\":1,\"loss\":2}\n"), plot_runs(&path, 1); }

int main(void) {
    snprintf(scratch, sizeof scratch, "/tmp/test_plot_XXXXXX");
    CHECK(mkdtemp(scratch), "no temporary directory");
    test_reading();
    test_axes();
    test_svg();
    check_fails("an empty log", read_log, "", "holds no line such as");
    check_fails("another file", read_log, "id,question\n1,2\n", "holds no line such as");
    check_fails("no such file", read_path, "/nowhere/log.jsonl", "cannot open /nowhere/log.jsonl");
    check_fails("a directory without a log", read_path, "dev", "dev is a directory without a log.jsonl");
    check_fails("an unknown field", draw_fields, "loss,speed", "no log has \"speed\"");
    check_fails("only times", draw_fields, ",", "the logs hold nothing to draw");
    check_fails("an impossible axis", draw_range, "", "the axis would go from 5 to 4");
    check_fails("nowhere to write", draw_nowhere, "/nowhere/p.svg", "cannot write /nowhere/p.svg");
    delete_directory(scratch);
    return verdict();
}

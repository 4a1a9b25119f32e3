// plot.c: loss curves of one or more runs: a picture for the browser (SVG) and a small one in the terminal.
//
//   make plot && ./plot out                                  reads out/log.jsonl, writes plot.svg
//   ./plot --out lr.svg out_1e-3 out_2e-3 out/log.jsonl
//   ./plot --help
//
// Whatever numbers the log has become panels: "loss" and "val_loss" share one, then "norm", "lr" and so on.
//
// Sections: 1 options | 2 logs to series | 3 axes | 4 the SVG | 5 the terminal | 6 main
#define QWEN_NO_MAIN
#include "../train_qwen.c"
#include <sys/ioctl.h>       // the terminal's width

// ---------------------------------------------------------------------------------------------------------------------------------
// 1. Options

static struct {
    const char *out, *fields, *title;
    long smooth, width;
    double y_min, y_max;
    bool log_scale, no_text;
} plot = {"plot.svg", "", "", -1, 960, 0, 0, false, false};

static const Option PLOT_OPTIONS[] = {
    {"out",     1, OPTION_STRING, &plot.out,       0, NULL, "the picture"},
    {"fields",  1, OPTION_STRING, &plot.fields,    0, NULL, "panels, such as loss,lr; default: all but ms, targets, tokens_per_s"},
    {"smooth",  1, OPTION_INT,    &plot.smooth,   -1, NULL, "mean over so many lines of the log; 0: none; -1: a fiftieth of them"},
    {"log",     1, OPTION_FLAG,   &plot.log_scale, 0, NULL, "a logarithmic loss axis"},
    {"y-min",   1, OPTION_FLOAT,  &plot.y_min,     0, NULL, "lower end of the loss axis; 0: automatic"},
    {"y-max",   1, OPTION_FLOAT,  &plot.y_max,     0, NULL, "upper end of the loss axis; 0: automatic"},
    {"title",   1, OPTION_STRING, &plot.title,     0, NULL, "a line above the picture"},
    {"width",   1, OPTION_INT,    &plot.width,   300, NULL, "of the picture"},
    {"no-text", 1, OPTION_FLAG,   &plot.no_text,   0, NULL, "nothing in the terminal"},
    {NULL, 0, OPTION_FLAG, NULL, 0, NULL, NULL},
};

// ---------------------------------------------------------------------------------------------------------------------------------
// 2. Logs to series

typedef struct { double step, value, smooth; } Point;
typedef struct { char *key; Point *points; int count, room; } Series;
typedef struct { const char *name; Series *series; int count; double last_step; } Curves;         // of one run

Series *series_find(const Curves *run, const char *key) {
    for (int i = 0; i < run->count; i++) if (strcmp(run->series[i].key, key) == 0) return &run->series[i];
    return NULL;
}

// A step that was logged before is being repeated, after a resume: what was logged from there on no longer counts.
void series_add(Curves *run, const char *key, double step, double value) {
    Series *s = series_find(run, key);
    if (!s) {
        run->series = (Series *)xrealloc(run->series, (size_t)(run->count + 1) * sizeof(Series));
        s = &run->series[run->count++];
        memset(s, 0, sizeof *s);
        s->key = strdup(key);
    }
    while (s->count > 0 && s->points[s->count - 1].step >= step) s->count--;
    if (s->count == s->room) s->points = (Point *)xrealloc(s->points, (size_t)(s->room = 2 * s->room + 64) * sizeof(Point));
    Point p = {step, value, value};
    s->points[s->count++] = p;
    if (step > run->last_step) run->last_step = step;
}

// The mean over about `lines` points, half of them before and half after: no lag. Near the beginning, where curves are steep, the window is
// narrower; at the end it has no second half.
void series_smooth(Series *s, int lines) {
    double *sums = (double *)xcalloc((size_t)s->count + 1, sizeof(double));
    for (int i = 0; i < s->count; i++) sums[i + 1] = sums[i] + s->points[i].value;
    for (int i = 0; i < s->count; i++) {
        int half = lines / 2 < i ? lines / 2 : i, end = i + half + 1 < s->count ? i + half + 1 : s->count;
        s->points[i].smooth = half > 0 ? (sums[end] - sums[i - half]) / (end - i + half) : s->points[i].value;
    }
    free(sums);
}

bool is_validation(const char *key) { return strncmp(key, "val_", 4) == 0; }

// Lines of JSON: {"step": N, "loss": X, ...}. Lines that are none are counted; a last line without its end is still being written.
Curves curves_read(const char *path) {
    struct stat st;
    Curves run = {path, NULL, 0, 0};
    bool is_folder = stat(path, &st) == 0 && S_ISDIR(st.st_mode);
    const char *file = is_folder ? path_of("%s/log.jsonl", path) : path;
    CHECK(!is_folder || file_exists(file), "%s is a directory without a log.jsonl; name the directory of a run", path);
    char *text = read_file(file, NULL), *next;
    int bad = 0, number = 0, first_bad = 0;
    for (char *line = text; (next = strchr(line, '\n')) != NULL; line = next + 1) {
        *next = 0, number++;
        Json *json = json_parse(line, (size_t)(next - line), NULL);
        const Json *step = json ? json_get(json, "step") : NULL;
        if (!step || step->type != JSON_NUMBER || !isfinite(step->number)) {
            if (line[0] && bad++ == 0) first_bad = number;
        } else {
            for (const Json *m = json->child; m; m = m->next)
                if (m != step && m->type == JSON_NUMBER && isfinite(m->number)) series_add(&run, m->key, step->number, m->number);
        }
        if (json) json_free(json);
    }
    free(text);
    CHECK(run.count > 0, "%s holds no line such as {\"step\":1,\"loss\":2.5}; is it the log of a run?", file);
    if (bad > 0) fprintf(stderr, "note: %s: %d lines are no JSON with a step and are left out; the first is line %d\n", file, bad,
                         first_bad);
    for (int i = 0; i < run.count; i++) {
        Series *s = &run.series[i];
        bool smoothed = !is_validation(s->key) && strcmp(s->key, "lr") != 0;
        series_smooth(s, !smoothed ? 0 : plot.smooth >= 0 ? (int)plot.smooth : s->count / 50);
    }
    const char *end = strstr(path, "/log.jsonl");
    if (end && end[strlen("/log.jsonl")] == 0 && end > path) run.name = path_of("%.*s", (int)(end - path), path);
    return run;
}

// The panels' keys, in the order of --fields or of the logs.
Names panel_keys(const Curves *runs, int num_runs) {
    Names keys = {NULL, 0};
    keys.names = (char **)xmalloc(sizeof(char *));
    char *list = strdup(plot.fields);
    for (char *key = strtok(list, ", "); key; key = strtok(NULL, ", ")) {
        bool known = false;
        for (int r = 0; r < num_runs; r++) known = known || series_find(&runs[r], key) || series_find(&runs[r], path_of("val_%s", key));
        CHECK(known, "--fields: no log has \"%s\"", key);
        keys.names = (char **)xrealloc(keys.names, (size_t)(keys.count + 1) * sizeof(char *));
        keys.names[keys.count++] = key;
    }
    for (int r = 0; r < num_runs && !plot.fields[0]; r++)
        for (int i = 0; i < runs[r].count; i++) {
            const char *key = runs[r].series[i].key + (is_validation(runs[r].series[i].key) ? 4 : 0);
            bool skip = strcmp(key, "ms") == 0 || strcmp(key, "targets") == 0 || strcmp(key, "tokens_per_s") == 0;
            for (int k = 0; k < keys.count; k++) skip = skip || strcmp(keys.names[k], key) == 0;
            if (skip) continue;
            keys.names = (char **)xrealloc(keys.names, (size_t)(keys.count + 1) * sizeof(char *));
            keys.names[keys.count++] = strdup(key);
        }
    CHECK(keys.count > 0, "the logs hold nothing to draw; name fields with --fields");
    return keys;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 3. Axes

typedef struct { double low, high; bool log_scale; } Axis;
double axis_place(const Axis *a, double value) {                 // 0 at the low end, 1 at the high one
    if (a->log_scale) return value > 0 ? log(value / a->low) / log(a->high / a->low) : -1;
    return (value - a->low) / (a->high - a->low);
}

// 1, 2 or 5 times a power of ten, so that about `count` of them fill the range.
double nice_step(double range, int count) {
    double raw = range / count, power = pow(10, floor(log10(raw))), m = raw / power;
    return power * (m < 1.5 ? 1 : m < 3.5 ? 2 : m < 7.5 ? 5 : 10);
}

// Fills ticks (room for 64) and returns how many there are.
int axis_ticks(const Axis *a, int count, double *ticks) {
    int n = 0;
    if (a->log_scale && a->high / a->low >= 12) {
        bool only_ones = log10(a->high / a->low) > count;                  // 1, 10, 100; else 1, 2, 5, 10
        int every = (int)(log10(a->high / a->low) / count) + 1;
        for (int power = (int)floor(log10(a->low)); power <= (int)ceil(log10(a->high)) && n < 60; power++)
            for (int i = 0; i < (only_ones ? 1 : 3); i++) {
                double tick = (i == 0 ? 1 : i == 1 ? 2 : 5) * pow(10, power);
                if (tick >= a->low * 0.9999 && tick <= a->high * 1.0001 && (!only_ones || power % every == 0)) ticks[n++] = tick;
            }
        return n;
    }
    double step = nice_step(a->high - a->low, count);
    for (double tick = ceil(a->low / step - 1e-9) * step; tick <= a->high + step * 1e-9 && n < 60; tick += step)
        ticks[n++] = fabs(tick) < step * 1e-9 ? 0 : tick;
    return n;
}

// A tick's number: 1200, 20k, 0.25, 2.5e-4
const char *tick_text(double value) {
    static char text[2][32];
    static int next;
    char *to = text[next ^= 1];
    double size = fabs(value);
    if (size >= 1e6) snprintf(to, 32, "%.6gM", value / 1e6);
    else if (size >= 1e4) snprintf(to, 32, "%.6gk", value / 1e3);
    else if (size >= 0.01 || value == 0) snprintf(to, 32, "%.6g", value);
    else {
        int power = (int)floor(log10(size) + 1e-9);
        snprintf(to, 32, "%.4ge%d", value / pow(10, power), power);
    }
    return to;
}

Axis step_axis(const Curves *runs, int num_runs) {
    Axis a = {0, 1, false};
    for (int r = 0; r < num_runs; r++) if (runs[r].last_step > a.high) a.high = runs[r].last_step;
    return a;
}

// Holds the smoothed curves and the validation points with a little room. Raw points may go beyond and are cut off.
Axis value_axis(const Curves *runs, int num_runs, const char *key) {
    double low = INFINITY, high = -INFINITY;
    for (int r = 0; r < num_runs; r++)
        for (int validation = 0; validation < 2; validation++) {
            const Series *s = series_find(&runs[r], validation ? path_of("val_%s", key) : key);
            for (int i = 0; s && i < s->count; i++) low = fmin(low, s->points[i].smooth), high = fmax(high, s->points[i].smooth);
        }
    bool is_loss = strcmp(key, "loss") == 0, is_norm = strcmp(key, "norm") == 0;
    Axis a = {low, high, low > 0 && ((is_loss && plot.log_scale) || (is_norm && high / low > 30))};
    if (!(high > low)) a.low = low - (low != 0 ? fabs(low) * 0.1 : 1), a.high = high + (high != 0 ? fabs(high) * 0.1 : 1);
    else if (a.log_scale) a.low = low / pow(high / low, 0.04), a.high = high * pow(high / low, 0.04);
    else a.low = low >= 0 && low < 0.3 * high && !is_loss ? 0 : low - 0.05 * (high - low), a.high = high + 0.05 * (high - low);
    if (is_loss && plot.y_min != 0) a.low = plot.y_min;
    if (is_loss && plot.y_max != 0) a.high = plot.y_max;
    CHECK(a.high > a.low && (!a.log_scale || a.low > 0), "--y-min %g and --y-max %g: the axis would go from %g to %g", plot.y_min,
          plot.y_max, a.low, a.high);
    return a;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 4. The SVG

// Colours that people with the usual colour blindnesses tell apart (Okabe and Ito 2008), without yellow.
static const char *const COLOURS[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555"};
static const int TERMINAL_COLOURS[] = {34, 33, 32, 35, 36, 31, 37};
enum { NUM_COLOURS = 7, LEFT = 62, RIGHT = 18, GAP = 26, LOSS_HEIGHT = 330, PANEL_HEIGHT = 120 };

void svg_line(FILE *f, double x1, double y1, double x2, double y2, const char *style) {
    fprintf(f, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, style);
}

// What XML can't hold becomes a question mark.
void svg_text(FILE *f, double x, double y, const char *style, const char *text) {
    size_t length = strlen(text);
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, style);
    for (size_t i = 0; i < length;) {
        uint32_t code;
        int n = utf8_decode(text + i, length - i, &code);
        if (code == '&') fputs("&amp;", f);
        else if (code == '<') fputs("&lt;", f);
        else if (code < 0x20 || n < 0) fputc('?', f);
        else fwrite(text + i, 1, (size_t)n, f);
        i += (size_t)(n < 0 ? -n : n);
    }
    fputs("</text>\n", f);
}

typedef struct { double x, y, width, height; Axis steps, values; } Panel;
double panel_x(const Panel *p, double step) { return p->x + p->width * axis_place(&p->steps, step); }
double panel_y(const Panel *p, double value) {                   // far outside is as good as just outside, and short to write
    return p->y + p->height * (1 - fmin(fmax(axis_place(&p->values, value), -2), 3));
}

// At most a few points for each column of pixels. smooth: the last one in the column; raw: the lowest and the highest.
void svg_curve(FILE *f, const Panel *p, const Series *s, bool smooth) {
    char separator = 'M';
    for (int i = 0, end; i < s->count; i = end) {
        double column = floor(panel_x(p, s->points[i].step));
        int low = i, high = i;
        for (end = i; end < s->count && floor(panel_x(p, s->points[end].step)) == column; end++) {
            if (s->points[end].value < s->points[low].value) low = end;
            if (s->points[end].value > s->points[high].value) high = end;
        }
        int chosen[2] = {smooth ? end - 1 : low < high ? low : high, smooth ? end - 1 : low < high ? high : low};
        for (int k = 0; k < (chosen[0] == chosen[1] ? 1 : 2); k++, separator = 'L') {
            const Point *point = &s->points[chosen[k]];
            fprintf(f, "%c%.1f %.1f", separator, panel_x(p, point->step), panel_y(p, smooth ? point->smooth : point->value));
        }
    }
}

void svg_series(FILE *f, const Panel *p, const Curves *run, const char *key, const char *colour) {
    const Series *s = series_find(run, key), *validation = series_find(run, path_of("val_%s", key));
    bool smoothed = false;
    for (int i = 0; s && i < s->count; i++) smoothed = smoothed || s->points[i].smooth != s->points[i].value;
    for (int smooth = smoothed ? 0 : 1; s && smooth < 2; smooth++) {
        fprintf(f, "<path fill=\"none\" stroke=\"%s\" stroke-linejoin=\"round\" %s d=\"", colour,
                smooth ? "stroke-width=\"1.8\"" : "stroke-width=\"1\" opacity=\"0.25\"");
        svg_curve(f, p, s, smooth);
        fputs("\"/>\n", f);
    }
    if (!validation) return;
    fprintf(f, "<path fill=\"none\" stroke=\"%s\" stroke-width=\"1.3\" stroke-dasharray=\"5 3\" d=\"", colour);
    svg_curve(f, p, validation, true);
    fputs("\"/>\n", f);
    for (int i = 0; i < validation->count && validation->count <= 200; i++)
        fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"#fff\" stroke=\"%s\" stroke-width=\"1.6\"/>\n",
                panel_x(p, validation->points[i].step), panel_y(p, validation->points[i].value), colour);
}

const char *panel_title(const char *key) {
    return strcmp(key, "norm") == 0 ? "gradient norm" : strcmp(key, "lr") == 0 ? "learning rate" : key;
}

#define GREY "fill=\"#555\""
#define BLACK "fill=\"#222\""
#define GRID "stroke=\"#e4e4e4\""
void svg_panel(FILE *f, const Panel *p, int index, const Curves *runs, int num_runs, const char *key, bool is_last) {
    double ticks[64], right = p->x + p->width, bottom = p->y + p->height;
    int n = axis_ticks(&p->values, p->height > 200 ? 7 : 4, ticks);
    fprintf(f, "<clipPath id=\"p%d\"><rect x=\"%.0f\" y=\"%.0f\" width=\"%.0f\" height=\"%.0f\"/></clipPath>\n", index, p->x - 5, p->y,
            p->width + 10, p->height);
    for (int i = 0; i < n; i++) {
        double y = panel_y(p, ticks[i]);
        svg_line(f, p->x, y, right, y, GRID);
        svg_text(f, p->x - 7, y + 4, "text-anchor=\"end\" " GREY, tick_text(ticks[i]));
    }
    n = axis_ticks(&p->steps, (int)(p->width / 110) + 1, ticks);
    for (int i = 0; i < n; i++) {
        double x = panel_x(p, ticks[i]);
        svg_line(f, x, p->y, x, bottom, GRID);
        if (is_last) svg_text(f, x, bottom + 17, "text-anchor=\"middle\" " GREY, tick_text(ticks[i]));
    }
    fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"none\" stroke=\"#999\"/>\n", p->x, p->y, p->width,
            p->height);
    fprintf(f, "<g clip-path=\"url(#p%d)\">\n", index);
    for (int r = 0; r < num_runs; r++) svg_series(f, p, &runs[r], key, COLOURS[r % NUM_COLOURS]);
    fputs("</g>\n", f);
    const char *title = path_of("%s%s", panel_title(key), p->values.log_scale ? " (logarithmic)" : "");
    svg_text(f, p->x, p->y - 7, "font-weight=\"bold\" " BLACK, title);
    if (is_last) svg_text(f, right, bottom + 32, "text-anchor=\"end\" " GREY, "updates");
}

// "out: 2666 updates, loss 2.7103, validation 2.7912": the smoothed loss at the end, the last validation.
const char *run_summary(const Curves *run, const char *key) {
    const Series *s = series_find(run, key), *validation = series_find(run, path_of("val_%s", key));
    const char *text = path_of("%s: %s updates", run->name, tick_text(run->last_step));
    if (s) text = path_of("%s, %s %.4g", text, panel_title(key), s->points[s->count - 1].smooth);
    if (validation) text = path_of("%s, validation %.4g", text, validation->points[validation->count - 1].value);
    return text;
}

void svg_write(FILE *f, const Curves *runs, int num_runs, const Names *keys) {
    double width = (double)plot.width, top = (plot.title[0] ? 34 : 12) + 18 * num_runs + 20, y = top, height = top + 40;
    for (int k = 0; k < keys->count; k++) height += (k == 0 ? LOSS_HEIGHT : PANEL_HEIGHT) + (k > 0 ? GAP : 0);
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" ", width, height, width,
            height);
    fputs("font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n", f);
    if (plot.title[0]) svg_text(f, LEFT, 24, "font-size=\"16\" font-weight=\"bold\" " BLACK, plot.title);
    bool any_validation = false;
    for (int r = 0; r < num_runs; r++) {
        double line = top - 20 - 18 * (num_runs - r - 1) - 6;
        svg_line(f, LEFT, line - 4, LEFT + 24, line - 4, path_of("stroke=\"%s\" stroke-width=\"3\"", COLOURS[r % NUM_COLOURS]));
        svg_text(f, LEFT + 32, line, BLACK, run_summary(&runs[r], keys->names[0]));
        any_validation = any_validation || series_find(&runs[r], path_of("val_%s", keys->names[0]));
    }
    if (any_validation) {
        double x = width - RIGHT - 92, line = top - 11;
        svg_line(f, x, line, x + 24, line, "stroke=\"#555\" stroke-width=\"1.3\" stroke-dasharray=\"5 3\"");
        fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"#fff\" stroke=\"#555\" stroke-width=\"1.6\"/>\n", x + 12, line);
        svg_text(f, x + 31, line + 4, GREY, "validation");
    }
    for (int k = 0; k < keys->count; k++) {
        double panel_height = k == 0 ? LOSS_HEIGHT : PANEL_HEIGHT;
        Panel p = {LEFT, y, width - LEFT - RIGHT, panel_height, step_axis(runs, num_runs), value_axis(runs, num_runs, keys->names[k])};
        svg_panel(f, &p, k, runs, num_runs, keys->names[k], k + 1 == keys->count);
        y += p.height + GAP;
    }
    fputs("</svg>\n", f);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 5. The terminal: the first panel in Braille dots, 2 x 4 to a character; several runs in colours, or without colours as letters

enum { TEXT_ROWS = 14, TEXT_MOST_COLUMNS = 200 };
typedef struct { unsigned char dots[TEXT_ROWS][TEXT_MOST_COLUMNS]; signed char run[TEXT_ROWS][TEXT_MOST_COLUMNS]; } Canvas;

void canvas_dot(Canvas *c, int columns, double x, double y, int run) {
    static const unsigned char bits[4][2] = {{0x01, 0x08}, {0x02, 0x10}, {0x04, 0x20}, {0x40, 0x80}};    // of U+2800
    int px = (int)(x * (2 * columns - 1) + 0.5), py = (int)((1 - y) * (4 * TEXT_ROWS - 1) + 0.5);
    if (!(y >= 0 && y <= 1) || px < 0 || px >= 2 * columns) return;
    c->dots[py / 4][px / 2] |= bits[py % 4][px % 2];
    c->run[py / 4][px / 2] = (signed char)run;
}

void text_plot(const Curves *runs, int num_runs, const char *key) {
    static Canvas canvas;
    struct winsize size = {0, 0, 0, 0};
    bool terminal = isatty(STDOUT_FILENO), colours = terminal && num_runs > 1;
    if (terminal) ioctl(STDOUT_FILENO, TIOCGWINSZ, &size);
    int columns = (size.ws_col > 20 ? size.ws_col : 80) - 10;
    if (columns > TEXT_MOST_COLUMNS) columns = TEXT_MOST_COLUMNS;
    Axis steps = step_axis(runs, num_runs), values = value_axis(runs, num_runs, key);
    memset(&canvas, 0, sizeof canvas);
    for (int r = 0; r < num_runs; r++) {
        const Series *s = series_find(&runs[r], key);
        if (!s) s = series_find(&runs[r], path_of("val_%s", key));
        for (int i = 0; s && i < s->count; i++) {                // with the line from the point before
            const Point *to = &s->points[i], *from = i > 0 ? to - 1 : to;
            double x0 = axis_place(&steps, from->step), x1 = axis_place(&steps, to->step);
            double y0 = axis_place(&values, from->smooth), y1 = axis_place(&values, to->smooth);
            int parts = 1 + (int)(2 * columns * (x1 - x0) + 4 * TEXT_ROWS * fmin(fabs(y1 - y0), 2));
            for (int k = 1; k <= parts; k++) canvas_dot(&canvas, columns, x0 + (x1 - x0) * k / parts, y0 + (y1 - y0) * k / parts, r);
        }
    }
    double ticks[64];
    int n = axis_ticks(&values, 4, ticks);
    for (int row = 0; row < TEXT_ROWS; row++) {
        const char *label = "";
        for (int i = 0; i < n; i++)
            if ((int)((1 - axis_place(&values, ticks[i])) * (4 * TEXT_ROWS - 1) + 0.5) / 4 == row) label = tick_text(ticks[i]);
        printf("%8s %s", label, label[0] ? "┤" : "│");
        for (int column = 0; column < columns; column++) {
            char braille[4];
            int run = canvas.run[row][column], dots = canvas.dots[row][column];
            if (dots == 0) { putchar(' '); continue; }
            if (num_runs > 1 && !colours) { putchar('a' + run % 26); continue; }
            if (colours) printf("\033[%dm", TERMINAL_COLOURS[run % NUM_COLOURS]);
            fwrite(braille, 1, (size_t)utf8_encode(0x2800u + (uint32_t)dots, braille), stdout);
            if (colours) printf("\033[0m");
        }
        printf("\n");
    }
    printf("%8s └", "");
    for (int column = 0; column < columns; column++) fputs("─", stdout);
    printf("\n%10s%-*s%s\n", "", columns - (int)strlen(tick_text(steps.high)), "0", tick_text(steps.high));
    for (int r = 0; r < num_runs; r++) {
        if (colours) printf("\033[%dm", TERMINAL_COLOURS[r % NUM_COLOURS]);
        if (num_runs > 1) printf("%8s ", colours ? "──" : path_of("%c", 'a' + r % 26));
        printf("%s%s\n", run_summary(&runs[r], key), colours ? "\033[0m" : "");
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// 6. main

void print_plot_help(void) {
    printf("plot draws the logs of runs: loss, validation loss, gradient norm, learning rate, and whatever else they hold.\n\n"
           "  ./plot [options] RUN...      each RUN is the directory of a run, or its log.jsonl; without any: out\n\n"
           "Options (defaults in brackets):\n");
    print_options(PLOT_OPTIONS, 1);
}

void plot_runs(const char **paths, int num_runs) {
    CHECK(plot.width <= 10000, "--width is %ld, it must be at most 10000", plot.width);
    Curves *runs = (Curves *)xmalloc((size_t)num_runs * sizeof(Curves));
    for (int r = 0; r < num_runs; r++) runs[r] = curves_read(paths[r]);
    Names keys = panel_keys(runs, num_runs);
    AtomicFile a = open_atomic(plot.out);
    svg_write(a.file, runs, num_runs, &keys);
    close_atomic(&a);
    if (!plot.no_text) text_plot(runs, num_runs, keys.names[0]);
    printf("%s\n", plot.out);
}

#ifndef PLOT_NO_MAIN
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return print_plot_help(), 0;
    const char **paths = (const char **)xmalloc((size_t)(argc + 1) * sizeof(char *));
    int num_runs = parse_options(PLOT_OPTIONS, 1, argc, argv, 1, paths);
    if (num_runs == 0) paths[num_runs++] = "out";
    plot_runs(paths, num_runs);
    CHECK(fflush(stdout) == 0 && !ferror(stdout), "cannot write the output: %s", strerror(errno));
    return 0;
}
#endif

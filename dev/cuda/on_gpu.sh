#!/bin/bash
# on_gpu.sh: all that only a GPU can say, in one command on a machine with a card and the CUDA toolkit:   dev/cuda/on_gpu.sh
# It writes dev/cuda/results/CARD.md:
#    checks      test_qwencu, the emulator's semantics tests (the same fragments, copies and shuffles, now by the hardware) and every
#                program of dev/cuda against the CPU, in bf16 and fp32
#    sanitizers  compute-sanitizer's four tools on small cases of test_qwencu
#    times       the tables of the programs of dev/cuda
#    training    some updates of real sizes: tokens/s, % of peak
# A failure is noted and the rest goes on; the exit code is the verdict. An hour at most; some 25 GB of disk in $TMPDIR, for checkpoints
# that are deleted.
#
# EMULATE=1 runs the same on the emulator, at sizes that it can bear, and writes build/on_gpu/emulator.md: a test of this script.
# To do less: PRECISIONS and KERNELS (words), CASES and RUNS (separated by ;) can be given.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
if [ -n "$EMULATE" ]; then
    results=build/on_gpu card=emulator
    RUNS=${RUNS-"--model tiny --batch 2 --seq 128"}
else
    results=dev/cuda/results
    command -v nvcc > /dev/null || { echo "on_gpu.sh: no nvcc here; it belongs to the CUDA toolkit (EMULATE=1 does without)" >&2; exit 1; }
    card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1)
    [ -n "$card" ] || { echo "on_gpu.sh: nvidia-smi finds no GPU (EMULATE=1 does without)" >&2; exit 1; }
    RUNS=${RUNS-"--model mini_llm_1.4b --batch 24 --seq 512;--model qwen2.5-0.5b --batch 16 --seq 1024;\
--model qwen3-0.6b --batch 8 --seq 2048"}
    export EMULATE=
fi
PRECISIONS=${PRECISIONS-bf16 fp32}
KERNELS=${KERNELS-$(cd dev/cuda && ls *.cu | sed 's/\.cu$//')}
IFS=';' read -ra runs <<< "$RUNS"
IFS=';' read -ra cases <<< "${CASES-odd;14/2;of 128;300 rows}"
built=build/on_gpu
mkdir -p "$built" "$results"
rm -f "$built"/*.log
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
report=$results/$(echo "$card" | tr -cs 'A-Za-z0-9.\n' _).md
failures=0

# try LOG SECONDS COMMAND...: runs it, everything it says goes into LOG.log
try() {
    local log=$built/$1.log seconds=$2 code
    shift 2
    echo "$*" | cut -c 1-140
    timeout "$seconds" "$@" > "$log" 2>&1
    code=$?
    [ $code != 124 ] || echo "killed after $seconds s" >> "$log"
    [ $code = 0 ] && return 0
    failures=$((failures + 1))
    printf '\n    %s\n' "$*" >> "$failed"
    { grep -m 10 -E 'FAIL|rror|========= [A-Z]' "$log" || tail -n 5 "$log"; } | cut -c 1-200 | sed 's/^/        /' >> "$failed"
    return $code
}
# row NAME LOG: a line of a table from what LOG.log says last, with what went wrong below it
row() {
    local last
    last=$(tail -n 1 "$built/$2.log" | tr '|' '/')
    echo "| $1 | $(if [ "$3" = 0 ]; then echo ok; else echo '**FAIL**'; fi) | ${last:0:160} |"
}
# build TARGET PRECISION TO
build() { try "make_$(basename "$3")" 1200 make "$1" "PRECISION=$2" "GPU_ARCH=${GPU_ARCH:-native} -lineinfo" && mv "$1" "$built/$3"; }

checks=$built/checks.md sanitizers=$built/sanitizers.md times=$built/times.md training=$built/training.md
failed=$built/failed.md                           # what went wrong: the command and the first lines that say so
for part in "$checks" "$sanitizers" "$times" "$training" "$failed"; do : > "$part"; done

if [ -n "$EMULATE" ]; then compile=(dev/emu/emucc); else compile=(nvcc -std=c++17 "-arch=${GPU_ARCH:-native}" -lcublasLt -lcublas); fi
if try make_semantics 600 "${compile[@]}" dev/emu/test/semantics.cu -o "$built/semantics"; then
    try semantics 600 "$built/semantics"; row dev/emu/test/semantics.cu semantics $? >> "$checks"
else row dev/emu/test/semantics.cu make_semantics 1 >> "$checks"; fi

for precision in $PRECISIONS; do
    if build test_qwencu "$precision" "test_$precision"; then
        try "test_$precision" 1200 "$built/test_$precision" "${EMULATE:+${cases[0]}}"
        row "test_qwencu, $precision" "test_$precision" $? >> "$checks"
        for case in "${cases[@]}"; do
            command -v compute-sanitizer > /dev/null && [ -z "$EMULATE" ] || break
            for tool in memcheck racecheck synccheck initcheck; do
                log=${tool}_${precision}_${case//[ \/]/_}
                try "$log" 900 compute-sanitizer --tool $tool --error-exitcode 99 "$built/test_$precision" "$case"
                row "$tool, $precision, $case" "$log" $? >> "$sanitizers"
            done
        done
    else row "test_qwencu, $precision" "make_test_$precision" 1 >> "$checks"; fi
    for kernel in $KERNELS; do
        log=${kernel}_$precision
        if build "build/$kernel" "$precision" "$log"; then
            try "$log" 900 "$built/$log"; row "$kernel, $precision" "$log" $? >> "$checks"
            { printf '\n### %s, %s\n\n' "$kernel" "$precision"; sed 's/^/    /' "$built/$log.log"; } >> "$times"
        else row "$kernel, $precision" "make_$log" 1 >> "$checks"; fi
    done
done

if [ ${#runs[@]} -gt 0 ] && build train_qwencu bf16 train_bf16 && try make_tools 600 make train_qwen prepare tiny_baike; then
    tiny=data/tiny_baike data=$tiny
    if [ -z "$EMULATE" ]; then                                    # the presets have Qwen's whole vocabulary
        data=$work/full
        try prepare 300 ./prepare --val-fraction 0.05 --out "$data" $tiny/wiki.json $tiny/baike.jsonl $tiny/web.jsonl
    fi
    for options in "${runs[@]}"; do
        log=train$(echo "$options" | tr -cs 'A-Za-z0-9.\n' _)
        # shellcheck disable=SC2086
        try "$log" 1200 "$built/train_bf16" $options --data "$data" --steps "${STEPS:-20}" --log-every 1 --eval-tokens 1000 \
            --sample-every 0 --out "$work/out"
        code=$?
        rm -rf "$work"/out*
        { tail -n 1 "$built/$log.log"; [ $code != 0 ] || grep '^update' "$built/$log.log" | tail -n 2 | head -n 1; } > "$built/last.log"
        row "train_qwencu $options" last $code >> "$training"
    done
fi

{
    echo "# $card"
    echo
    commit=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)
    git diff --quiet HEAD -- 2> /dev/null || commit="$commit with changes"
    echo "$(date -u +%Y-%m-%d), commit $commit, by dev/cuda/on_gpu.sh"
    echo
    facts=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory
    [ -n "$EMULATE" ] || { nvidia-smi --query-gpu=$facts --format=csv; nvcc --version | tail -n 2; } | sed 's/^/    /'
    for part in checks sanitizers training; do
        [ -s "$built/$part.md" ] || continue
        printf '\n## %s\n\n| what | verdict | last line |\n|---|---|---|\n' "${part^}"
        cat "$built/$part.md"
    done
    [ ! -s "$failed" ] || { printf '\n## Failures\n'; cat "$failed"; }
    command -v compute-sanitizer > /dev/null || printf '\ncompute-sanitizer was not found: skipped.\n'
    [ ! -s "$times" ] || { printf '\n## Kernels\n'; cat "$times"; }
} > "$report"
echo "$report: $failures failures"
[ "$failures" = 0 ]

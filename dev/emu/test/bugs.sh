#!/bin/bash
# bugs.sh [DIRECTORY]: every planted bug of bugs.cu must be reported by its tool, and its correct twin must stay silent.
# Programs are built in DIRECTORY (default: build). Tools: plain runs in several orders; address and undefined sanitizer; thread sanitizer
# (clang only).
cd "$(dirname "$0")/../../.." || exit 1
build=${1:-build}
source=dev/emu/test/bugs.cu
mkdir -p "$build"
export OMP_WAIT_POLICY=passive ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=atexit_sleep_ms=0
passed=0 failed=0 skipped=0
orders="0 1 2 3 4 5"
CXX=${CXX:-g++}

echo 'int main() { return 0; }' > "$build/empty.cpp"
links() { "$@" "$build/empty.cpp" -o "$build/empty" 2> /dev/null; }
compile() { dev/emu/emucc $source -o "$build/$1" "${@:2}" || rm -f "$build/$1"; }
rm -f "$build"/bugs_plain "$build"/bugs_asan "$build"/bugs_tsan
links $CXX -fsanitize=address,undefined &&
    compile bugs_asan -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined &
{ compile bugs_plain; links clang++ -fsanitize=thread && CXX=clang++ compile bugs_tsan -O1 -g -fsanitize=thread; } &
wait

ok() { echo "ok   $*"; passed=$((passed + 1)); }
bad() { echo "FAIL $*"; failed=$((failed + 1)); }
# run TOOL CASE bug|fixed: sets digest, said, code
run() {
    digest=$(timeout 20 "$build/bugs_$1" "$2" "$3" 2> "$build/said")
    code=$?
    said=$(cat "$build/said")
    digest=${digest##*: }
}
missing() {     # TOOL CASE: true and a line if this machine cannot run the tool
    [ -e "$build/bugs_$1" ] && return 1
    if [ "$1" = plain ]; then bad "$source does not compile"; return; fi
    echo "SKIP $1 $2: no compiler here with that sanitizer"
    skipped=$((skipped + 1))
}
line() { grep -n "line: $1\$" $source | cut -d: -f1; }

# reported TOOL CASE TEXT [MARK...]: the bug run ends with an error that has TEXT and names the lines marked MARK (default: CASE)
reported() {
    local tool=$1 case=$2 text=$3 mark
    missing "$tool" "$case" && return
    shift 3
    run "$tool" "$case" fixed
    if [ $code != 0 ] || [ -n "$said" ]; then bad "$tool $case: the correct twin ended with $code: $said"; return; fi
    run "$tool" "$case" bug
    if [ $code = 0 ] || ! grep -qE "$text" "$build/said"; then bad "$tool $case: ended with $code, expected '$text', got: $said"; return; fi
    for mark in "${@:-$case}"; do
        [ "$mark" = none ] && continue
        grep -q "bugs.cu:$(line "$mark")\b" "$build/said" || { bad "$tool $case: line $(line "$mark") is not named: $said"; return; }
    done
    ok "$tool $case: $(grep -m 1 -E "$text" "$build/said" | sed -E 's/^==[0-9]+==//')"
}
# told CASE TEXT: as reported, but the program goes on (CUDA returns an error code)
told() {
    missing plain "$1" && return
    run plain "$1" fixed
    if [ $code != 0 ] || [ -n "$said" ]; then bad "plain $1: the correct twin ended with $code: $said"; return; fi
    run plain "$1" bug
    if grep -E "$2" "$build/said" | grep -q "bugs.cu:$(line "$1")\b"; then ok "plain $1: $(grep -m 1 -E "$2" "$build/said")"
    else bad "plain $1: expected '$2' and line $(line "$1"), got: $said"; fi
}
# differs CASE: the outputs of several orders are NaN or not all equal; the twin's are equal numbers
differs() {
    local order digests="" twins=""
    missing plain "$1" && return
    for order in $orders; do
        EMU_ORDER=$order run plain "$1" bug
        digests="$digests $digest"
        EMU_ORDER=$order run plain "$1" fixed
        if [ $code != 0 ] || [ -n "$said" ]; then bad "orders $1: the correct twin ended with $code: $said"; return; fi
        twins="$twins $digest"
    done
    different() { [ "$(printf '%s\n' "$@" | sort -u | wc -l)" != 1 ] || [[ "$*" == *NaN* ]]; }
    if different $twins; then bad "orders $1: the twin's outputs differ:$twins"
    elif ! different $digests; then bad "orders $1: all outputs are$digests"
    else ok "orders $1:$digests, correct $digest"; fi
}

# memory
told copy_beyond 'cudaErrorInvalidValue'
told copy_wrong_way 'cudaErrorInvalidValue'
told freed_twice 'cudaErrorInvalidValue'
reported plain host_pointer 'is no device pointer'
reported plain use_after_free 'is no device pointer'
reported plain shared_static_beyond 'out of bounds: .* past the end of __shared__ s' none
reported plain shared_dynamic_beyond 'out of bounds: .* past the end of the 512 bytes of dynamic shared memory' none
reported plain shared_template_beyond 'out of bounds: .* past the end of __shared__ s' none
reported plain global_read_beyond 'out of bounds: .* past the end of 1024 bytes, cudaMalloc' none
reported plain use_after_free_hidden 'illegal address .* in no allocation' none
for c in global_read_beyond global_write_before; do reported asan $c 'AddressSanitizer: heap-buffer-overflow'; done
reported asan use_after_free_hidden 'AddressSanitizer: heap-use-after-free'
reported asan shared_dynamic_beyond 'AddressSanitizer: heap-buffer-overflow'
reported asan shared_static_beyond 'out of bounds for type|AddressSanitizer: heap-buffer-overflow'
reported asan shared_template_beyond 'out of bounds for type|AddressSanitizer: heap-buffer-overflow'
reported asan local_beyond 'out of bounds for type|AddressSanitizer: stack-buffer-overflow'
for c in global_misaligned shared_misaligned; do reported asan $c 'misaligned address'; done
reported asan index_overflow 'signed integer overflow'
for c in malloc_uninitialised shared_uninitialised shared_dynamic_uninitialised; do differs $c; done
export EMU_LEAKS=1
reported plain leak 'leak of 512 bytes'
unset EMU_LEAKS

# barriers and races
for c in no_barrier_previous no_barrier_next no_barrier_before_reuse no_barrier_between_reductions no_barrier_after_broadcast no_syncwarp \
    block_reads_block no_async_wait async_wait_too_few double_buffer; do differs $c; done
for c in sum_without_atomic blocks_write_one block_reads_block no_barrier_previous no_barrier_before_reuse no_barrier_between_reductions \
    no_barrier_after_broadcast no_syncwarp; do reported tsan $c 'ThreadSanitizer: data race'; done
reported plain divergent_barrier 'divergent barrier' divergent_one divergent_other
reported plain deadlock 'deadlock' deadlock_barrier deadlock_shuffle
reported plain not_in_own_mask 'lacks the calling lane'
reported plain different_collectives 'different collectives'

# launches, streams, events
told launch_too_many_threads 'cudaErrorInvalidConfiguration'
told launch_empty_grid 'cudaErrorInvalidConfiguration'
told launch_too_much_shared 'cudaErrorInvalidValue'
for c in no_stream_wait no_event_wait event_recorded_too_early pinned_reused_early pinned_read_early buffer_overwritten_early; do
    differs $c
done

# every correct twin under every tool
for tool in asan tsan; do
    missing $tool "correct twins" && continue
    noisy=""
    cases=$(grep -oE '^    \{"[a-z_]+"|is\("[a-z_]+"' $source | sed 's/.*"\(.*\)"/\1/')
    for c in $cases; do
        run $tool "$c" fixed
        { [ $code = 0 ] && [ -z "$said" ]; } || noisy="$noisy $c"
    done
    if [ -z "$noisy" ]; then ok "$tool: $(echo $cases | wc -w) correct twins stay silent"
    else bad "$tool: correct twins that are reported:$noisy"; fi
done
echo "passed $passed, failed $failed, skipped $skipped"
[ $failed = 0 ] && [ $passed != 0 ]

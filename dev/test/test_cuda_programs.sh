#!/bin/sh
# test_cuda_programs.sh: chatcu and evaluatecu (in fp32 on the emulator: build/emu/chat_fp32, build/emu/evaluate_fp32) against ./chat and
# ./evaluate on the small checkpoint of fixtures/evaluate. From the repository root.
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
export OMP_WAIT_POLICY=passive
passed=0 failed=0
same() { if [ -s "$work/cpu" ] && cmp -s "$work/cpu" "$work/gpu"; then passed=$((passed + 1)); echo "ok   $1"; else failed=$((failed + 1)); echo "FAIL $1"; fi; }

f=dev/test/fixtures/evaluate
for options in "--shots 2" "--shots 1 --context 25 --seq 7" "--template chatml"; do
    ./evaluate --model $f/model $options $f/text.bin $f/sft.bin $f/ceval $f/cmmlu > "$work/cpu"
    build/emu/evaluate_fp32 --model $f/model $options $f/text.bin $f/sft.bin $f/ceval $f/cmmlu > "$work/gpu"
    same "evaluatecu $options: the table of ./evaluate"
done
for options in "" "--repetition-penalty 1.2 --context 100" "--raw"; do
    printf '力的单位是什么？\n唐朝的都城是哪里？\n法学\n' > "$work/questions"
    ./chat --model $f/model --greedy --max-tokens 30 $options < "$work/questions" > "$work/cpu" 2> "$work/notes"
    build/emu/chat_fp32 --model $f/model --greedy --max-tokens 30 $options < "$work/questions" > "$work/gpu" 2> /dev/null
    same "chatcu $options: the answers of ./chat; $(grep -c dropped "$work/notes") times the oldest turns were dropped"
done
echo "passed $passed, failed $failed, skipped 0"
[ $failed -eq 0 ]

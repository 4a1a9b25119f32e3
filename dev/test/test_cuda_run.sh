#!/bin/sh
# test_cuda_run.sh: whole runs of the CUDA trainer (on the emulator) against runs of ./train_qwen on the default corpus. From the
# repository root, after `make tiny_baike`; build/emu/train_bf16 and build/emu/train_fp32 are train_qwen.cu in both precisions.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_WAIT_POLICY=passive
passed=0 failed=0
check() { if [ "$1" = 0 ]; then passed=$((passed + 1)); echo "ok   $2"; else failed=$((failed + 1)); echo "FAIL $2"; fi; }
options="--data data/tiny_baike --model tiny --steps 6 --lr 1e-4 --batch 2 --accum 2 --seq 64 --eval-tokens 500 --sample-every 0"
values() { sed -n "s/.*\"$2\":\([^,}]*\).*/\1/p" "$work/$1/log.jsonl"; }

# close A B KEY TOLERANCE: every number KEY of both logs, relative
close() {
    values "$1" "$3" > "$work/a"; values "$2" "$3" > "$work/b"
    worst=$(paste "$work/a" "$work/b" | awk '{ d = $1 / $2 - 1; if (d < 0) d = -d; if (d > m) m = d }
        NF != 2 || d != d { m = "nan" } END { if (NR == 0) m = "nan"; print m }')
    awk -v worst="$worst" -v most="$4" 'BEGIN { exit !(worst != "nan" && worst <= most) }'
    check $? "$1 and $2: $3 differs by at most $worst (allowed $4)"
}

./train_qwen $options --out "$work/cpu" > "$work/cpu.out" || { cat "$work/cpu.out"; exit 1; }
for precision in fp32 bf16; do
    build/emu/train_$precision $options --out "$work/$precision" > "$work/$precision.out" 2>&1
    check $? "train_qwencu in $precision: six updates of the default model on the default corpus"
done
close fp32 cpu loss 1e-6
close fp32 cpu norm 2e-5
close fp32 cpu val_loss 1e-6
close bf16 cpu loss 2e-4
close bf16 cpu norm 5e-3
close bf16 cpu val_loss 2e-4

# three updates, then three more after a resume, are the six above to the last bit
build/emu/train_bf16 $options --save-every 3 --keep 0 --out "$work/halves" > /dev/null 2>&1
rm -rf "$work/halves/step_00000006"
build/emu/train_bf16 $options --save-every 3 --keep 0 --resume --out "$work/halves" > "$work/resume.out" 2>&1
check $? "resume: $(grep resumed "$work/resume.out")"
cmp -s "$work/bf16/step_00000006/model.safetensors" "$work/halves/step_00000006/model.safetensors" &&
    cmp -s "$work/bf16/step_00000006/optimizer.safetensors" "$work/halves/step_00000006/optimizer.safetensors"
check $? "resume: the weights and moments of an uninterrupted run, to the last bit"

gpu=$(build/emu/train_fp32 generate --model "$work/cpu" --prompt 长江是中国 --greedy --ids --max-tokens 8)
cpu=$(./train_qwen generate --model "$work/cpu" --prompt 长江是中国 --greedy --ids --max-tokens 8)
[ -n "$cpu" ] && [ "$gpu" = "$cpu" ]
check $? "generate: the same ids: $gpu"
build/emu/train_bf16 generate --model "$work/bf16" --prompt 长江 --max-tokens 4 > /dev/null
check $? "generate with a checkpoint of train_qwencu"

build/emu/train_bf16 $options --batch 10600 --accum 1 --recompute 0 --out "$work/large" > "$work/large.out" 2>&1
[ $? = 1 ] && [ "$(grep -c "error: this run needs" "$work/large.out")" = 1 ]
check $? "more than the GPU has: $(grep error: "$work/large.out")"
build/emu/train_bf16 info --model mini_llm_1.4b --batch 24 --seq 512 | grep -q "memory of ./train_qwencu (bf16)"
check $? "info gives the memory of the GPU program"

echo "passed $passed, failed $failed, skipped 0"
[ $failed = 0 ] && [ $passed -gt 0 ]

#!/bin/sh
# test_cli.sh: ./train_qwen from the outside: what it says and does with good and bad input, kills, full disks.
# Run from the repository root after `make train_qwen tiny_baike`; prints a line a case, exit code is the verdict.
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
limit=; if command -v timeout > /dev/null; then limit="timeout 300"; fi      # a hang is a failure
ok()   { passed=$((passed + 1)); echo "ok   $1"; }
bad()  { failed=$((failed + 1)); echo "FAIL $1"; }
same() { if cmp -s "$2" "$3"; then ok "$1"; else bad "$1: $2 and $3 differ"; fi; }

# fails NAME MESSAGE COMMAND...: the command must end with code 1, one line on stderr that holds MESSAGE
fails() {
    name=$1 message=$2; shift 2
    $limit "$@" > "$dir/stdout" 2> "$dir/stderr"; code=$?
    if [ $code -eq 1 ] && grep -qF -e "$message" "$dir/stderr" && [ "$(wc -l < "$dir/stderr")" -eq 1 ]; then ok "$name: $(cat "$dir/stderr")"
    else bad "$name: code $code, expected '$message', got: $(cat "$dir/stderr")"; fi
}
# says NAME PATTERN COMMAND...: the command must end with code 0 and print a line that matches PATTERN
says() {
    name=$1 pattern=$2; shift 2
    $limit "$@" > "$dir/stdout" 2> "$dir/stderr"; code=$?
    if [ $code -eq 0 ] && grep -qE -e "$pattern" "$dir/stdout"; then ok "$name"
    else bad "$name: code $code, expected a line like '$pattern'; got: $(cat "$dir/stderr"; tail -3 "$dir/stdout")"; fi
}

tiny="--data data/tiny_baike --model tiny --batch 2 --seq 32 --sample-every 0 --eval-every 0 --eval-tokens 500"
train="./train_qwen $tiny"

# information
says "info: the parameters of mini_llm_1.4b" '^parameters +1431996416$' ./train_qwen info --model mini_llm_1.4b --batch 1 --seq 512
says "info --json" '"parameters":1431996416,"flops_per_token":6824656896,' ./train_qwen info --model mini_llm_1.4b --batch 1 --seq 512 --json
says "--help" '^  --weight-decay N ' ./train_qwen --help

# options
mkdir "$dir/huge"; cp data/tiny_baike/tokenizer.bin "$dir/huge"
sed 's/"hidden_size": 24/"hidden_size": 65536/; s/"num_hidden_layers": 2/"num_hidden_layers": 1000/; s/"vocab_size": 61/"vocab_size": 8000/' \
    dev/test/fixtures/qwen2/config.json > "$dir/huge/config.json"
fails "an unknown option names the nearest" "did you mean --batch" ./train_qwen --bacth 3
fails "an option of another command" "--temperature is an option of another command" ./train_qwen --temperature 1
fails "more than the machine's memory" "GB, the machine has" $train --model "$dir/huge"
fails "an unknown command" "unknown command 'trian'" ./train_qwen trian
fails "batch 0" "--batch is 0, it must be at least 1" $train --batch 0
fails "seq 0" "--seq is 0, it must be at least 1" $train --seq 0
fails "accum 0" "--accum is 0, it must be at least 1" $train --accum 0
fails "seq beyond the model" "--seq 2000 is longer than the model's 1024 positions" $train --seq 2000
fails "a word for a number" "--batch needs a whole number, not '2.5'" $train --batch 2.5
fails "no value" "--batch needs a value" ./train_qwen --batch
fails "a choice that is none" "it must be one of cosine, linear, wsd, constant" $train --schedule cosin
fails "total-batch that doesn't fit" "is not a multiple of --batch x --seq = 64" $train --total-batch 100
fails "warm-up longer than the run" "leaves nothing of the 3 updates" $train --steps 3 --warmup 3
fails "recompute 3" "it must be one of 0, 1, 2" $train --recompute 3
fails "a number beyond 32 bits" "it must be at most 2147483647" $train --keep 4294967296
fails "accumulation beyond all data" "needs 4503599" $train --batch 2097152 --seq 1 --accum 2147483647
fails "an epsilon that is 0 as a float" "it must be above 0" $train --eps 1e-60
fails "a beta that is 1 as a float" "must be below 1" $train --beta1 0.999999999
fails "--out ." "name a directory of its own" $train --steps 1 --out .
fails "LoRA's options without its rank" "need --lora-rank" $train --lora-alpha 8
fails "an option of dpo" "are part of --task dpo" $train --beta 0.2

# files
fails "no such data" "no such token files" ./train_qwen --data "$dir/none" --model tiny
fails "no such model" "is neither a directory with a config.json nor a preset" ./train_qwen --data data/tiny_baike --model tyni
fails "a model without data" "--model is given, but not --data" ./train_qwen --model tiny
fails "data that is too little" "one update of --batch 64 x --accum 64 needs 4096 rows" $train --batch 64 --accum 64 --seq 1024
fails "unwritable output" "cannot make the directory /proc/nothing" $train --steps 1 --out /proc/nothing
head -c 1000 data/tiny_baike/train.bin > "$dir/train.bin"; cp data/tiny_baike/tokenizer.bin "$dir"
fails "a truncated token file" "the file is truncated or damaged" ./train_qwen --data "$dir/train.bin" --model tiny
cp data/tiny_baike/train.bin "$dir/train.bin"; rm "$dir/tokenizer.bin"
fails "data of another tokenizer" "was not made with the tokenizer of dev/data/qwen.bin" ./train_qwen --data "$dir/train.bin" --model tiny
cp data/tiny_baike/tokenizer.bin "$dir"
fails "a vocabulary larger than the model's" "but the model's vocabulary ends at 60" ./train_qwen --data "$dir/train.bin" --model dev/test/fixtures/qwen2 --seq 32
fails "resume without a checkpoint" "holds no checkpoint" $train --out "$dir/empty" --resume
fails "generate with a preset" "is a preset without weights" ./train_qwen generate --model tiny --prompt x
fails "generate without tokenizer files" "no tokenizer in dev/test/fixtures/qwen2" ./train_qwen generate --model dev/test/fixtures/qwen2 --prompt x

# runs
says "20 updates" 'saved .*/a/step_00000020' $train --steps 20 --save-every 10 --out "$dir/a"
says "the same again" 'saved .*/b/step_00000020' $train --steps 20 --save-every 10 --out "$dir/b"
same "two equal runs give the same weights" "$dir/a/step_00000020/model.safetensors" "$dir/b/step_00000020/model.safetensors"
says "evaluation and samples in between" 'sample: ' $train --steps 20 --eval-every 3 --sample-every 4 --out "$dir/c"
same "evaluation and samples change no weight" "$dir/a/step_00000020/model.safetensors" "$dir/c/step_00000020/model.safetensors"
says "one thread" 'saved' env OMP_NUM_THREADS=1 $train --steps 20 --out "$dir/d"
same "one thread gives the same weights" "$dir/a/step_00000020/model.safetensors" "$dir/d/step_00000020/model.safetensors"
rm -rf "$dir/c" "$dir/d"

# killed after a checkpoint, resumed
rm -rf "$dir/b/step_00000020"
$train --steps 20 --save-every 1 --keep 0 --out "$dir/k" > /dev/null 2>&1 & pid=$!
while [ ! -d "$dir/k/step_00000007" ] && kill -0 $pid 2> /dev/null; do sleep 0.05; done
kill -9 $pid; wait $pid 2> /dev/null
says "resumed after kill -9" 'resumed .*update' $train --steps 20 --save-every 1 --keep 0 --out "$dir/k" --resume
same "killed and resumed: the same weights" "$dir/a/step_00000020/model.safetensors" "$dir/k/step_00000020/model.safetensors"
same "killed and resumed: the same moments" "$dir/a/step_00000020/optimizer.safetensors" "$dir/k/step_00000020/optimizer.safetensors"
sed 's/"ms".*//' "$dir/a/log.jsonl" | grep loss > "$dir/log_a"; sed 's/"ms".*//' "$dir/k/log.jsonl" | grep loss > "$dir/log_k"
same "killed and resumed: the same losses and rates in the log" "$dir/log_a" "$dir/log_k"
if [ "$(grep -c '"lr"' "$dir/k/log.jsonl")" -eq 20 ]; then ok "the log has each update once"; else bad "the log of the resumed run"; fi
fails "nothing left to do" "is complete: 20 updates" $train --steps 20 --out "$dir/k" --resume
fails "resume with another seq" "--seq was 32" $train --steps 30 --seq 16 --out "$dir/k" --resume
./prepare --tokenizer data/tiny_baike/tokenizer.bin --out "$dir/other" data/tiny_baike/web.jsonl > /dev/null
fails "resume with other data" "was trained on other data" ./train_qwen --data "$dir/other" --model tiny --batch 2 --seq 32 --steps 30 --out "$dir/k" --resume
fails "resume with another model" "leave out --model $dir/a" ./train_qwen --resume --model "$dir/a" --out "$dir/k" --steps 30 --batch 2 --seq 32
says "resume finds data and model by itself" 'saved .*/k/step_00000021' ./train_qwen --resume --out "$dir/k" --steps 21 --batch 2 --seq 32 --sample-every 0
says "resume with another batch says so" 'resume: --batch was 2, is now 4' $train --steps 30 --batch 4 --out "$dir/k" --resume

# bf16 weights: the fp32 ones are kept beside them for the resume
says "bf16 checkpoint" saved $train --steps 10 --warmup 1 --schedule constant --save-dtype bf16 --out "$dir/e"
says "resumed from bf16" saved $train --steps 20 --warmup 1 --schedule constant --out "$dir/e" --resume
says "straight through" saved $train --steps 20 --warmup 1 --schedule constant --out "$dir/f"
same "a resume from bf16 loses nothing" "$dir/e/step_00000020/model.safetensors" "$dir/f/step_00000020/model.safetensors"

# keep, Ctrl-C, an earlier run in --out, a full disk, NaN
says "keep 2" saved $train --steps 6 --save-every 1 --keep 2 --out "$dir/g"
if [ "$(ls "$dir/g" | grep -c step_)" -eq 2 ]; then ok "--keep 2 leaves two checkpoints"; else bad "--keep 2: $(ls "$dir/g")"; fi
rm "$dir/g/log.jsonl"
says "an earlier run is moved aside" 'held an earlier run; moved to .*/g.1' $train --steps 1 --out "$dir/g"
says "again, with a slash" 'held an earlier run; moved to .*/g.2' $train --steps 1 --out "$dir/g/"
if [ -f "$dir/g.1/step_00000006/model.safetensors" ] && [ -f "$dir/g.2/step_00000001/model.safetensors" ]; then ok "nothing was lost"; else bad "the earlier run is gone"; fi
$train --steps 100000 --out "$dir/h" > "$dir/run" 2>&1 & pid=$!
while ! grep -q '^update' "$dir/run" && kill -0 $pid; do sleep 0.05; done
fails "a second run in the same directory" "another run is writing into $dir/h" $train --steps 1 --out "$dir/h"
kill -INT $pid; wait $pid; code=$?
if [ $code -eq 0 ] && grep -q 'stopped by a signal' "$dir/run" && ls "$dir"/h/step_*/model.safetensors > /dev/null; then ok "Ctrl-C saves and stops"
else bad "Ctrl-C: code $code, $(tail -1 "$dir/run")"; fi
fails "a full disk" "cannot write $dir/i/unfinished" sh -c "trap '' XFSZ; ulimit -f 3000; exec $train --steps 2 --out $dir/i"
if ls "$dir"/i/step_* > /dev/null 2>&1; then bad "a full disk left a checkpoint"; else ok "a full disk leaves no half checkpoint"; fi
fails "a loss that explodes" "stopped before they reach the weights" $train --steps 50 --lr 1e30 --warmup 0 --clip 0 --out "$dir/j"

says "rows of one token" saved ./train_qwen --data data/tiny_baike --model tiny --batch 2 --seq 1 --steps 2 --eval-tokens 10 --out "$dir/m"

# generation
says "generate" '^长江' ./train_qwen generate --model "$dir/a" --prompt 长江 --max-tokens 10
./train_qwen generate --model "$dir/a" --prompt 长江 --max-tokens 10 --seed 3 > "$dir/one"; echo 长江 | tr -d '\n' | ./train_qwen generate --model "$dir/a" --max-tokens 10 --seed 3 > "$dir/two"
same "the prompt from standard input, and a seed" "$dir/one" "$dir/two"
says "generate --ids" '^([0-9]+ )+$' ./train_qwen generate --model "$dir/a" --prompt 长江 --max-tokens 5 --ids --greedy
fails "a prompt with a NUL byte" "has a NUL byte at 6" sh -c "printf '长江\0黄河' | ./train_qwen generate --model $dir/a"
if [ -w /dev/full ]; then fails "output to a full disk" "cannot write the output" sh -c "./train_qwen info --model tiny > /dev/full"; fi
fails "an empty --prompt is not standard input" "the prompt is empty" sh -c "echo x | ./train_qwen generate --model $dir/a --prompt ''"
fails "an empty prompt" "the prompt is empty" sh -c "./train_qwen generate --model $dir/a < /dev/null"
says "a checkpoint as the model of a new run" saved ./train_qwen --data data/tiny_baike --model "$dir/a" --batch 2 --seq 32 --steps 2 --sample-every 0 --out "$dir/l"
fails "a model inside --out" "lies in --out $dir/l" ./train_qwen --data data/tiny_baike --model "$dir/l" --batch 2 --seq 32 --steps 2 --out "$dir/l"
mkdir "$dir/in"; cp data/tiny_baike/*.bin "$dir/in"; : > "$dir/in/log.jsonl"
fails "data inside --out" "--data $dir/in lies in --out $dir/in" ./train_qwen --data "$dir/in" --model tiny --batch 2 --seq 32 --steps 1 --out "$dir/in"
says "export, a directory with a slash" "wrote $dir/export:" ./train_qwen export --model "$dir/a" --out "$dir/export/"
cp -r dev/test/fixtures/qwen3 "$dir/tied"; sed -i.old 's/"tie_word_embeddings": false/"tie_word_embeddings": true/' "$dir/tied/config.json"
fails "a head beside tied embeddings" "lm_head.weight is no copy of the embeddings" ./train_qwen export --model "$dir/tied" --out "$dir/t"
w=dev/test/fixtures/qwen3/model.safetensors                                    # 2496 bytes of header, head (6608), embeddings (6608), ...
{ head -c 2496 $w; tail -c +9105 $w | head -c 6604; tail -c +9101 $w; } > "$dir/tied/model.safetensors"
fails "a head that differs in its last element" "lm_head.weight is no copy of the embeddings" ./train_qwen export --model "$dir/tied" --out "$dir/t"
{ head -c 2496 $w; tail -c +9105 $w | head -c 6608; tail -c +9105 $w; } > "$dir/tied/model.safetensors"
says "a head that is a copy" "wrote $dir/same:" ./train_qwen export --model "$dir/tied" --out "$dir/same"
./train_qwen --data data/tiny_baike --model "$dir/a" --batch 2 --seq 32 --steps 2 --sample-every 0 --lora-rank 2 --out "$dir/r" > /dev/null
fails "a resumed adapter with another alpha" "must stay so on --resume" ./train_qwen --resume --out "$dir/r" --lora-alpha 3 --steps 4 --batch 2 --seq 32
fails "a resumed adapter on other projections" "must stay so on --resume" ./train_qwen --resume --out "$dir/r" --lora-targets q_proj --steps 4 --batch 2 --seq 32
fails "an adapter in bf16" "adapters are kept in fp32" $train --model "$dir/a" --lora-rank 2 --save-dtype bf16 --out "$dir/s"
cp -r "$dir/r/step_00000002" "$dir/alora"; sed -i.old 's/"init_lora_weights"/"alora_invocation_tokens": [1], "init_lora_weights"/' "$dir/alora/adapter_config.json"
fails "an adapter that begins at a token" "alora_invocation_tokens" ./train_qwen export --model "$dir/alora" --out "$dir/t"
sed -i.old 's/"init_lora_weights": true/"init_lora_weights": "pissa_niter_4"/' "$dir/r/step_00000002/adapter_config.json"
fails "an adapter that changes its base" "init_lora_weights" ./train_qwen export --model "$dir/r" --out "$dir/t"

# signals: a reader that goes away, Ctrl-C before the first update
$train --steps 1000 --log-every 1 --out "$dir/p" 2> /dev/null | head -n 12 > /dev/null
says "| head: the run saves before it stops" 'resumed .*at update [0-9]+$' $train --steps 1000 --log-every 1 --out "$dir/p" --resume --steps 20

# hang_up SETTING: a run of 300 updates gets a SIGHUP after the first
hang_up() {
    (eval "$1"; exec $train --steps 300 --log-every 1 --out "$dir/q" > "$dir/run" 2>&1) & pid=$!
    while ! grep -q '^update' "$dir/run" && kill -0 $pid; do sleep 0.05; done
    kill -HUP $pid; wait $pid; code=$?
    rm -rf "$dir/q"
}
: > "$dir/run"; hang_up "trap - HUP"
if [ $code -eq 0 ] && grep -q 'stopped by a signal' "$dir/run"; then ok "a closed terminal: the run saves and stops"; else bad "SIGHUP: code $code, $(tail -1 "$dir/run")"; fi
: > "$dir/run"; hang_up "trap '' HUP"
if [ $code -eq 0 ] && grep -q '/step_00000300' "$dir/run"; then ok "nohup: it goes on"; else bad "nohup: code $code, $(tail -1 "$dir/run")"; fi

echo "passed $passed, failed $failed, skipped 0"
[ $failed -eq 0 ]

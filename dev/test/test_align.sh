#!/bin/sh
# test_align.sh: fine-tuning with ./train_qwen from the outside: SFT, DPO and its reference file, LoRA, export; good and bad input.
# Run from the repository root after `make train_qwen prepare tiny_baike`; prints a line a case, exit code is the verdict.
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
losses() { sed -n 's/.*"step":\([0-9]*\),"loss":\([^,]*\),.*/\1 \2/p' "$1/log.jsonl"; }

# a model and data to begin with
says "a model to begin with" saved ./train_qwen --data data/tiny_baike --model tiny --steps 30 --batch 2 --seq 64 --sample-every 0 --eval-tokens 100 --out "$dir/base"
head -n 60 data/tiny_baike/dpo.jsonl > "$dir/pairs.jsonl"; tail -n 12 data/tiny_baike/dpo.jsonl > "$dir/held_out.jsonl"
head -n 60 data/tiny_baike/sft.jsonl > "$dir/chats.jsonl"
prepare="./prepare --tokenizer data/tiny_baike/tokenizer.bin --val-fraction 0"
$prepare --task dpo --out "$dir/dpo" "$dir/pairs.jsonl" > /dev/null
$prepare --task dpo --out "$dir/held_out" "$dir/held_out.jsonl" > /dev/null; mv "$dir/held_out/train.bin" "$dir/dpo/val.bin"
$prepare --task sft --out "$dir/sft" "$dir/chats.jsonl" > /dev/null
quick="--model $dir/base --batch 2 --seq 96 --sample-every 0 --eval-every 0"
dpo="./train_qwen --task dpo --data $dir/dpo --lr 1e-3 --log-every 1 $quick"
sft="./train_qwen --task sft --data $dir/sft --lr 1e-3 $quick"

# dpo
says "dpo: the reference is computed" '^reference log-probabilities of 120 answers, once' $dpo --steps 6 --out "$dir/a"
grep -q '"loss":0.69314718[0-9]*,.*"pairs":[0-9]*,"reward_chosen":0,"reward_rejected":0,"margin":0,"accuracy":0,' "$dir/a/log.jsonl" &&
    ok "dpo: the first loss is log 2" || bad "dpo: the first line of the log: $(head -1 "$dir/a/log.jsonl")"
grep -q '"val_loss":[^,]*,"val_reward_chosen":[^,]*,"val_reward_rejected":[^,]*,"val_margin":[^,]*,"val_accuracy":[^,]*}' "$dir/a/log.jsonl" &&
    ok "dpo: validation has rewards, margin and accuracy" || bad "dpo: no validation in the log"
says "dpo: the next run finds the reference" '^reference from .*/dpo/reference_.*.f64$' $dpo --steps 6 --out "$dir/b"
same "dpo: and has the same weights" "$dir/a/step_00000006/model.safetensors" "$dir/b/step_00000006/model.safetensors"
says "dpo: almost no rate" saved $dpo --steps 1 --lr 1e-30 --out "$dir/still"
grep -q '"val_loss":0.693147' "$dir/still/log.jsonl" && ok "dpo: a model that has not moved has log 2 in validation too" || bad "dpo: $(grep val_loss "$dir/still/log.jsonl")"
says "dpo: learns its pairs" 'accuracy 100 %' $dpo --epochs 5 --beta 0.5 --out "$dir/long"
says "dpo: label smoothing" 'saved' $dpo --steps 6 --label-smoothing 0.2 --out "$dir/smooth"
[ "$(losses "$dir/smooth" | tail -1)" != "$(losses "$dir/a" | tail -1)" ] && ok "dpo: label smoothing changes the loss" || bad "dpo: --label-smoothing does nothing"
says "dpo: other rows, the same reference" '^reference from' $dpo --steps 3 --batch 1 --seq 140 --seed 3 --out "$dir/other_rows"
case "$(losses "$dir/other_rows" | head -1)" in "1 0.6931471"*|"1 0.6931472"*) ok "dpo: log 2 in other rows";; *) bad "dpo: $(losses "$dir/other_rows" | head -1)";; esac
rm -rf "$dir/b"; says "dpo: half a run" saved $dpo --steps 6 --save-every 3 --keep 0 --out "$dir/b"; rm -rf "$dir/b/step_00000006"
says "dpo: resumed" '^resumed .* at update 3' $dpo --steps 6 --save-every 3 --keep 0 --resume --out "$dir/b"
same "dpo: resumed, the same weights" "$dir/a/step_00000006/model.safetensors" "$dir/b/step_00000006/model.safetensors"
reference=$(sed -n 's/^reference from \(.*\)/\1/p' "$dir/stdout" | head -1)
mv "$reference" "$dir/kept"; rm -rf "$dir/b/step_00000006"
fails "dpo: resume without the reference" "is gone: the reference model's log-probabilities" $dpo --steps 6 --resume --out "$dir/b"
cp "$(ls "$dir"/dpo/reference_* | head -1)" "$reference"
says "dpo: a reference file of other data" 'is damaged, or of another model or other data; computing it again' $dpo --steps 6 --out "$dir/c"
same "dpo: and is the same again" "$reference" "$dir/kept"
printf x | dd of="$reference" bs=1 seek=100 conv=notrunc 2> /dev/null
says "dpo: a damaged reference file" 'is damaged, or of another model or other data; computing it again' $dpo --steps 6 --out "$dir/c"
same "dpo: computed again, the same weights" "$dir/a/step_00000006/model.safetensors" "$dir/c/step_00000006/model.safetensors"
says "dpo: another model has another reference" '^reference log-probabilities of 120' ./train_qwen --task dpo --data "$dir/dpo" --batch 2 --seq 96 --sample-every 0 --steps 1 --model "$dir/a" --out "$dir/d"
fails "dpo: from random weights" "--task dpo needs a trained model" ./train_qwen --task dpo --data "$dir/dpo" --model tiny
fails "dpo: without document borders" "the rejected answer would see the chosen one" $dpo --doc-mask off
fails "dpo: data of another task" "was prepared for --task sft, not for dpo" ./train_qwen --task dpo $quick --data "$dir/sft"
fails "dpo: beta 0" "--beta is 0, it must be above 0" $dpo --beta 0
fails "dpo: smoothing of one half" "it must be below 0.5" $dpo --label-smoothing 0.5
fails "dpo: nothing fits" "has an answer within 2 tokens; a larger --seq may help" ./train_qwen --task dpo --model "$dir/base" --data "$dir/dpo" --seq 3
fails "dpo: resume as another task" "comes from another --task" ./train_qwen --resume --data "$dir/sft" --task sft --batch 2 --seq 96 --steps 9 --out "$dir/a"

# sft
says "sft: three epochs, validation" '^validation loss' $sft --epochs 3 --val "$dir/sft/train.bin" --out "$dir/e"
says "sft: what is cut and dropped is said" 'documents have no answer within 15 tokens and are dropped' $sft --seq 14 --steps 2 --out "$dir/f"
fails "sft: nothing fits" "documents has an answer within 2 tokens; a larger --seq may help" $sft --seq 1

# lora
lora="$sft --lora-rank 4 --lora-alpha 8"
says "lora: trains adapters only" '^adapters  rank 4, alpha 8 on all: 48640 parameters are trained$' $lora --steps 6 --save-every 3 --keep 0 --out "$dir/l"
[ "$(cd "$dir/l/step_00000006" && echo *)" = "adapter_config.json adapter_model.safetensors optimizer.safetensors tokenizer.json tokenizer_config.json trainer.json" ] &&
    ok "lora: a checkpoint is an adapter" || bad "lora: the checkpoint holds $(ls "$dir/l/step_00000006")"
says "lora: half a run" saved $lora --steps 6 --save-every 3 --keep 0 --out "$dir/m"; rm -rf "$dir/m/step_00000006"
says "lora: resumed, without its options" '^resumed .* at update 3' $sft --steps 6 --save-every 3 --keep 0 --resume --out "$dir/m"
same "lora: resumed, the same adapter" "$dir/l/step_00000006/adapter_model.safetensors" "$dir/m/step_00000006/adapter_model.safetensors"
same "lora: resumed, the same moments" "$dir/l/step_00000006/optimizer.safetensors" "$dir/m/step_00000006/optimizer.safetensors"
fails "lora: resume with another rank" "has adapters of rank 4 and alpha 8; they and their targets must stay so on --resume" $sft --lora-rank 8 --steps 9 --resume --out "$dir/m"
says "lora: merged by export" '^wrote' ./train_qwen export --model "$dir/l" --out "$dir/merged"
./train_qwen generate --model "$dir/l" --prompt 长江 --greedy --ids --max-tokens 12 > "$dir/one"; ./train_qwen generate --model "$dir/merged" --prompt 长江 --greedy --ids --max-tokens 12 > "$dir/two"
[ -s "$dir/one" ] && same "lora: the adapter generates what the merged model does" "$dir/one" "$dir/two"
cmp -s "$dir/base/step_00000030/model.safetensors" "$dir/merged/model.safetensors" && bad "lora: the merged model is the base" || ok "lora: the merged model is not the base"
says "lora: chosen projections" '^adapters  rank 2, alpha 4 on q_proj,v_proj: 4480 p' $sft --lora-rank 2 --lora-targets q_proj,v_proj --steps 2 --out "$dir/n"
says "lora: dpo" '^update .* accuracy' $dpo --lora-rank 4 --steps 4 --out "$dir/o"
grep -q '"loss":0.69314718' "$dir/o/log.jsonl" && ok "lora: dpo begins at log 2" || bad "lora: dpo: $(head -1 "$dir/o/log.jsonl")"
says "lora: dpo resumed" '^resumed' $dpo --steps 5 --resume --out "$dir/o"
says "lora: a merged model is trained as a whole" '^saved' ./train_qwen --task sft --data "$dir/sft" --model "$dir/l" --batch 2 --seq 96 --steps 1 --sample-every 0 --out "$dir/p"
says "lora: info says what it saves" 'adapters of rank 16 on all: 18.46M parameters are trained, which takes 12.801 GB less than to train all' \
    ./train_qwen info --model qwen2.5-1.5b --lora-rank 16
fails "lora: from random weights" "--lora-rank needs a trained model" ./train_qwen --task sft --data "$dir/sft" --model tiny --lora-rank 4
fails "lora: on an adapter" "is itself an adapter" ./train_qwen --task sft --data "$dir/sft" --model "$dir/l" --lora-rank 4
fails "lora: an unknown target" "'lm_head' is none of q_proj, k_proj" $lora --lora-targets q_proj,lm_head
fails "lora: no target" "--lora-targets is empty" $lora --lora-targets ""
fails "lora: too large a rank" "it must be at most 1024" $lora --lora-rank 2000
fails "lora: resume of another kind" "is no adapter, but an option of --lora is given" $sft --lora-rank 4 --steps 100 --resume --out "$dir/e"
mv "$dir/base" "$dir/base.away"
fails "lora: the base is gone" "there is no model of that name here" ./train_qwen generate --model "$dir/l" --prompt x
mkdir "$dir/base"; cp -r "$dir/a/step_00000006" "$dir/base/step_00000030"
fails "lora: the base is another model" "was trained on another base than" ./train_qwen generate --model "$dir/l" --prompt x
rm -rf "$dir/base"; mv "$dir/base.away" "$dir/base"

# the scripts of whole runs, on samples
script="env TRAIN=./train_qwen TOKENIZER=data/tiny_baike/tokenizer.bin VAL_FRACTION=0.1 BATCH=2 ACCUM=2 SEQ=96 WARMUP=1 SAVE_DTYPE=fp32"
says "sft_mini_llm.sh" '^validation loss' $script EPOCHS=2 MODEL="$dir/base" FILES="$dir/chats.jsonl" DATA="$dir/script_sft" OUT="$dir/script_sft_out" \
    sh dev/scripts/sft_mini_llm.sh
says "dpo_mini_llm.sh" '^validation loss .* accuracy' $script EPOCHS=2 MODEL="$dir/script_sft_out" FILES="$dir/pairs.jsonl" DATA="$dir/script_dpo" \
    OUT="$dir/script_dpo_out" sh dev/scripts/dpo_mini_llm.sh

# export
says "export" '^wrote .*/exported: 2.0M parameters in bf16$' ./train_qwen export --model "$dir/a" --out "$dir/exported" --save-dtype bf16
says "export: its tokenizer goes along" '^长江' ./train_qwen generate --model "$dir/exported" --prompt 长江 --max-tokens 3
fails "export over something" "exists; export writes a new directory" ./train_qwen export --model "$dir/a" --out "$dir/exported"
fails "export of nothing" "name a model with --model" ./train_qwen export --out "$dir/x"
fails "export of a preset" "is a preset without weights" ./train_qwen export --model tiny --out "$dir/x"

echo "passed $passed, failed $failed, skipped 0"
[ $failed -eq 0 ]

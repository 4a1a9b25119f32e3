#!/bin/sh
# demo.sh: the whole course on two cores in half an hour (make demo): pretraining on the small Chinese encyclopedia, instruction tuning,
# preference optimisation, after each stage an examination with questions that were in no training data, and a conversation.
#
# The same commands with other file names are a real run: prepare_mini_llm.sh, sft_mini_llm.sh and dpo_mini_llm.sh have those of MINI_LLM.
#
#     sh dev/scripts/demo.sh                                                     from the repository root, after make; results in demo/
#     OUT=other PRETRAIN_EPOCHS=4 sh dev/scripts/demo.sh                         anything below can be given so
set -e
: "${OUT:=demo}" "${TINY:=data/tiny_baike}" "${QUESTIONS:=500}"
: "${PRETRAIN_EPOCHS:=8}" "${SFT_EPOCHS:=4}" "${SFT_LR:=1e-3}" "${DPO_EPOCHS:=1}" "${DPO_LR:=1e-4}"
mkdir -p "$OUT"
began=$(date +%s)
minutes() { echo $((($(date +%s) - began) / 60))m; }
stage() { printf '\n=== %s (after %s)\n\n' "$1" "$(minutes)"; }

# Questions of one line from the held-out phrasings, evenly spread over the file, with their answers.
sed -n 's/^{"instruction":"\([^"\\]*\)","input":"","output":"\([^"\\]*\)。"}$/\1\t\2/p' "$TINY/sft_heldout.jsonl" |
    awk -v n="$QUESTIONS" '{line[NR] = $0} END {for (i = 0; i < n; i++) print line[int(i * NR / n) + 1]}' > "$OUT/questions.tsv"
cut -f 1 "$OUT/questions.tsv" > "$OUT/questions.txt"

# Held-out pairs, every 10th, of a better and a worse answer.
./prepare --task dpo --tokenizer "$TINY/tokenizer.bin" --out "$OUT/dpo_data" "$TINY/dpo.jsonl"
awk 'NR % 10 == 1' "$TINY/dpo_heldout.jsonl" > "$OUT/pairs.jsonl"
./prepare --task dpo --tokenizer "$TINY/tokenizer.bin" --out "$OUT/pairs" "$OUT/pairs.jsonl"

# examine MODEL: multiple choice by the statements' probability, answers that have the fact and that end, pairs in order
examine() {
    ./evaluate --model "$OUT/$1" --answer text --json "$OUT/$1.json" "$TINY/mc" "$OUT/pairs/train.bin" > "$OUT/$1.txt"
    ./chat --model "$OUT/$1" --fresh --greedy --max-tokens 48 < "$OUT/questions.txt" > "$OUT/$1_answers.txt" 2> "$OUT/$1_chat.txt"
    choice=$(sed -n 's/.*"accuracy":{.*"questions":\([0-9.]*\)}.*/\1/p' "$OUT/$1.json")
    facts=$(paste "$OUT/questions.tsv" "$OUT/$1_answers.txt" | awk -F '\t' 'index($3, $2) {n++} END {printf "%.1f", 100 * n / NR}')
    ended=$(sed -n 's/^(\([0-9]*\) questions.*unanswered, \([0-9]*\) answers.*/\1 \2/p' "$OUT/$1_chat.txt" |
        awk '{printf "%.1f", 100 - 100 * $2 / $1}')
    pairs=$(sed -n 's/.*"pairs":\([0-9]*\),"pairs_in_order":\([0-9]*\).*/\1 \2/p' "$OUT/$1.json" | awk '{printf "%.1f", 100 * $2 / $1}')
    printf '%-12s %14s %% %17s %% %14s %% %13s %%\n' "$1" "$choice" "$facts" "$ended" "$pairs" >> "$OUT/results.txt"
    tail -n 1 "$OUT/results.txt"
}
printf '%-12s %16s %19s %16s %15s\n' "" "multiple choice" "facts in answers" "answers that end" "pairs in order" > "$OUT/results.txt"

stage "1. Pretraining"
./train_qwen --epochs "$PRETRAIN_EPOCHS" --sample-every 0 --log-every 200 --out "$OUT/pretrained"
examine pretrained

stage "2. Instruction tuning"
./prepare --task sft --tokenizer "$TINY/tokenizer.bin" --out "$OUT/sft_data" "$TINY/sft.jsonl"
./train_qwen --task sft --model "$OUT/pretrained" --data "$OUT/sft_data" --epochs "$SFT_EPOCHS" --lr "$SFT_LR" --sample-every 0 \
    --log-every 200 --out "$OUT/tuned"
examine tuned

stage "3. Preferences"
./train_qwen --task dpo --model "$OUT/tuned" --data "$OUT/dpo_data" --val "$OUT/pairs/train.bin" --epochs "$DPO_EPOCHS" \
    --lr "$DPO_LR" --sample-every 0 --out "$OUT/preferred"
examine preferred

stage "Results"
cat "$OUT/results.txt"

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
: "${PRETRAIN_EPOCHS:=6}" "${SFT_EPOCHS:=2}" "${SFT_LR:=1e-3}" "${DPO_EPOCHS:=1}" "${DPO_LR:=1e-5}"
[ -f "$TINY/dpo_heldout_style.jsonl" ] || { echo "$TINY is not there or older than this program; make tiny_baike makes it"; exit 1; }
mkdir -p "$OUT"
tab=$(printf '\t')
began=$(date +%s)
minutes() { echo $((($(date +%s) - began) / 60))m; }
stage() { printf '\n=== %s (after %s)\n\n' "$1" "$(minutes)"; }

# Questions of one line from the held-out phrasings, evenly spread over the file, with their answers.
sed -n 's/^{"instruction":"\([^"\\]*\)","input":"","output":"\([^"\\]*\)。"}$/\1'"$tab"'\2/p' "$TINY/sft_heldout.jsonl" |
    awk -v n="$QUESTIONS" '{line[NR] = $0} END {for (i = 0; i < n; i++) print line[int(i * NR / n) + 1]}' > "$OUT/questions.tsv"
cut -f 1 "$OUT/questions.tsv" > "$OUT/questions.txt"

# Preferences: the training pairs, and of the held-out pairs every 10th, those that are about facts and those about style.
pairs() { ./prepare --task dpo --tokenizer "$TINY/tokenizer.bin" --val-fraction 0 --out "$@"; }
pairs "$OUT/dpo_data" "$TINY/dpo.jsonl"
for kind in facts style; do awk 'NR % 10 == 1' "$TINY/dpo_heldout_$kind.jsonl" > "$OUT/$kind.jsonl"; done
paste -d '\n' "$OUT/facts.jsonl" "$OUT/style.jsonl" | grep . > "$OUT/both.jsonl"
for kind in facts style both; do pairs "$OUT/$kind" "$OUT/$kind.jsonl"; done

# examine MODEL [chat]: multiple choice by the statements' probability; pairs whose better answer is likelier; and with "chat", which asks
# the questions, answers that contain the fact, and that end by themselves.
examine() {
    ./evaluate --model "$OUT/$1" --answer text --json "$OUT/$1.json" "$TINY/mc" "$OUT/facts/train.bin" "$OUT/style/train.bin" > "$OUT/$1.txt"
    choice=$(sed -n 's/.*"accuracy":{.*"questions":\([0-9.]*\)}.*/\1/p' "$OUT/$1.json")
    order=$(grep -o '"pairs":[0-9]*,"pairs_in_order":[0-9]*' "$OUT/$1.json" | awk -F '[:,]' '{printf " %16.1f %%", 100 * $4 / $2}')
    if [ "$2" = chat ]; then
        ./chat --model "$OUT/$1" --fresh --greedy --max-tokens 48 < "$OUT/questions.txt" > "$OUT/$1_answers.txt" 2> "$OUT/$1_chat.txt"
        facts=$(paste "$OUT/questions.tsv" "$OUT/$1_answers.txt" | awk -F '\t' 'index($3, $2) {n++} END {printf "%.1f %%", 100 * n / NR}')
        endless=$(sed -n 's/.*unanswered, \([0-9]*\) answers without an end.*/\1/p' "$OUT/$1_chat.txt")
        ended=$((QUESTIONS - endless))
    fi
    printf '%-12s %14.1f %%%s %18s %16s\n' "$1" "$choice" "$order" "${facts:--}" "${ended:--}" >> "$OUT/results.txt"
    cat "$OUT/results.txt"
}
printf '%-12s %16s %18s %18s %18s %16s\n' stage "multiple choice" "right over wrong" "short over wordy" "facts in answers" "answers that end" > "$OUT/results.txt"

stage "1. Pretraining"
./train_qwen --data "$TINY" --epochs "$PRETRAIN_EPOCHS" --sample-every 0 --log-every 200 --out "$OUT/pretrained"
examine pretrained

stage "2. Instruction tuning"
./prepare --task sft --tokenizer "$TINY/tokenizer.bin" --out "$OUT/sft_data" "$TINY/sft.jsonl"
./train_qwen --task sft --model "$OUT/pretrained" --data "$OUT/sft_data" --epochs "$SFT_EPOCHS" --batch 8 --lr "$SFT_LR" \
    --sample-every 0 --out "$OUT/tuned"
examine tuned chat

stage "3. Preferences"
./train_qwen --task dpo --model "$OUT/tuned" --data "$OUT/dpo_data" --val "$OUT/both/train.bin" --epochs "$DPO_EPOCHS" \
    --batch 8 --lr "$DPO_LR" --eval-tokens 1000000 --sample-every 0 --out "$OUT/preferred"
examine preferred chat

stage "4. Some of the questions, with the answers before and after preferences, and the right one where it was missed"
paste "$OUT/questions.tsv" "$OUT/tuned_answers.txt" "$OUT/preferred_answers.txt" |
    awk -F '\t' 'NR % 50 == 25 {printf "%s\n    %s\n    %s%s\n", $1, $3, $4, index($4, $2) ? "" : "        (" $2 ")"}'

stage "Results"
cat "$OUT/results.txt"
echo; echo "Ask it yourself: ./chat --model $OUT/preferred      Its course, drawn: make plot && ./plot $OUT/pretrained $OUT/tuned"

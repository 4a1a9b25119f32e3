#!/bin/sh
# dpo_mini_llm.sh: preference optimisation of the instruction-tuned mini_llm_1.4b with MINI_LLM's settings: beta 0.1, rate 1e-5 falling
# linearly after 1000 updates of warm-up, four epochs, answers (with their prompts) of up to 1032 tokens. Two differences: AdamW instead of
# Adafactor, and rows of 2064 tokens hold as many whole pairs as fit: 8 of them have about the 32 pairs of MINI_LLM's update.
#
#     sh dev/scripts/dpo_mini_llm.sh                                             from the repository root, after make
#     MODEL=my_sft FILES=pairs.jsonl DATA=data/my_dpo OUT=my_dpo WARMUP=10 sh dev/scripts/dpo_mini_llm.sh      anything below can be given so
#
# More options for the trainer: EXTRA="--label-smoothing 0.1".
set -e
: "${TRAIN:=$([ -x ./train_qwencu ] && echo ./train_qwencu || echo ./train_qwen)}"
: "${MODEL:=out/mini_llm_sft}"                   # the instruction-tuned model, which is also the reference
: "${FILES:=dpo_zh.json}"
: "${TOKENIZER:=dev/data/qwen.bin}" "${TEMPLATE:=mini_llm}" "${VAL_FRACTION:=0.02}"
: "${DATA:=data/mini_llm_dpo}" "${OUT:=out/mini_llm_dpo}"
: "${BATCH:=2}" "${ACCUM:=4}" "${SEQ:=2064}" "${EPOCHS:=4}" "${LR:=1e-5}" "${WARMUP:=1000}" "${BETA:=0.1}" "${SAVE_DTYPE:=bf16}"

# shellcheck disable=SC2086    # FILES and EXTRA are lists
[ -f "$DATA/train.bin" ] ||
    ./prepare --task dpo --template "$TEMPLATE" --tokenizer "$TOKENIZER" --val-fraction "$VAL_FRACTION" --dedup --out "$DATA" $FILES
# shellcheck disable=SC2086
"$TRAIN" --task dpo --model "$MODEL" --data "$DATA" --out "$OUT" --batch "$BATCH" --accum "$ACCUM" --seq "$SEQ" --epochs "$EPOCHS" \
    --beta "$BETA" --lr "$LR" --schedule linear --min-lr 0 --warmup "$WARMUP" --weight-decay 0 --beta2 0.999 --clip 1 \
    --eval-every 200 --save-every 200 --keep 3 --save-dtype "$SAVE_DTYPE" $EXTRA

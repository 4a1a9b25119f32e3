#!/bin/sh
# sft_mini_llm.sh: instruction tuning of mini_llm_1.4b with MINI_LLM's settings: Alpaca and BELLE in Chinese, 64 rows of 512 tokens an
# update (32 x 2), AdamW at 6e-5 falling as a cosine to 0, three epochs. One difference: rows are packed with whole conversations
# instead of one each and padding, so an update has more of them and an epoch fewer updates.
#
#     sh dev/scripts/sft_mini_llm.sh                                             from the repository root, after make
#     MODEL=out FILES=my.jsonl DATA=data/my_sft OUT=my_sft sh dev/scripts/sft_mini_llm.sh      anything below can be given so
#
# More options for the trainer: EXTRA="--recompute 1".
set -e
: "${TRAIN:=$([ -x ./train_qwencu ] && echo ./train_qwencu || echo ./train_qwen)}"
: "${MODEL:=out/mini_llm}"                       # the pretrained model: a run's directory or a Hugging Face directory
: "${FILES:=alpaca_gpt4_data_zh.json Belle_open_source_1M.json}"
: "${TOKENIZER:=dev/data/qwen.bin}" "${TEMPLATE:=mini_llm}" "${VAL_FRACTION:=0.005}"
: "${DATA:=data/mini_llm_sft}" "${OUT:=out/mini_llm_sft}"
: "${BATCH:=32}" "${ACCUM:=2}" "${SEQ:=512}" "${EPOCHS:=3}" "${LR:=6e-5}" "${SAVE_DTYPE:=bf16}"

# shellcheck disable=SC2086    # FILES and EXTRA are lists
[ -f "$DATA/train.bin" ] ||
    ./prepare --task sft --template "$TEMPLATE" --tokenizer "$TOKENIZER" --val-fraction "$VAL_FRACTION" --dedup --out "$DATA" $FILES
# shellcheck disable=SC2086
"$TRAIN" --task sft --model "$MODEL" --data "$DATA" --out "$OUT" --batch "$BATCH" --accum "$ACCUM" --seq "$SEQ" --epochs "$EPOCHS" \
    --lr "$LR" --schedule cosine --min-lr 0 --warmup 0 --weight-decay 0.1 --beta2 0.999 --clip 1 \
    --eval-every 500 --save-every 500 --keep 3 --save-dtype "$SAVE_DTYPE" $EXTRA

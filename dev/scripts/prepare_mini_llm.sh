#!/bin/sh
# prepare_mini_llm.sh: the data of the practice report MINI_LLM (github.com/jiahe7ay/MINI_LLM), from the downloaded files to token files.
#
#     sh dev/scripts/prepare_mini_llm.sh DOWNLOADS             from the repository root, after make
#     sh dev/scripts/prepare_mini_llm.sh --check DOWNLOADS     only says what is there, what is missing and where to get it
#     SKY_FILES=5 OUT=data/small sh dev/scripts/prepare_mini_llm.sh DOWNLOADS      anything below can be given so
#
# DOWNLOADS is searched with all directories below it. The parts that are there are made, one after the other; a part that was made
# before from the same files with the same options is left as it is, so after an interruption just start it again. The result:
#
#     $OUT/train_*.bin, val_*.bin, tokenizer.bin      pretraining: --data $OUT takes them all
#     ${OUT}_sft, ${OUT}_dpo                          what sft_mini_llm.sh and dpo_mini_llm.sh look for
#
# Exit code 0: all parts are there, 1: an error, 2: something is missing.
: "${OUT:=data/mini_llm}" "${PREPARE:=./prepare}" "${TOKENIZER:=dev/data/qwen.bin}" "${TEMPLATE:=mini_llm}"
: "${SKY_FILES:=20}"                             # how many of SkyPile's files, of some 1.4 GB each; MINI_LLM took the first 20
: "${BAIKE_OPTIONS:=--min-chars 50}"             # titles without an article
: "${SFT_OPTIONS:=--max-chars 512}"              # as MINI_LLM
HUB=https://huggingface.co/datasets DISK=https://pan.baidu.com/s

[ "$1" = --check ] && { check_only=1; shift; }
DOWNLOADS=$1
[ -d "$DOWNLOADS" ] || { sed -n '2,/^# Exit/s/^# \{0,1\}//p' "$0"; [ $# -gt 0 ] && echo "$DOWNLOADS is no directory"; exit 1; }
[ "$check_only" ] || [ -x "$PREPARE" ] || { echo "no $PREPARE; run make prepare first"; exit 1; }
newline='
'
missing=
# files PATTERN: those in DOWNLOADS, sorted, one a line
files() { find -L "$DOWNLOADS" -type f -name "$1" | LC_ALL=C sort; }
# found NAME FILES SOURCE: says whether the part is there
found() {
    if [ "$2" ]; then
        echo "$2" | while IFS= read -r file; do printf 'found    %-10s %s, %d MB\n' "$1" "$file" $(($(wc -c < "$file") / 1000000)); done
    else
        printf 'missing  %-10s %s\n' "$1" "$3"
        missing="$missing $1"
    fi
}

wiki=$(files 'wikipedia-cn-20230720-filtered.json*' | head -n 1)
baike=$(files '563w_baidubaike.json' | head -n 1)
sky=$(files '20[0-9][0-9]-*_zh_*.jsonl' | head -n "$SKY_FILES")
belle=$(files 'Belle_open_source_0.5M.json'; files 'Belle_open_source_1M.json'; files 'train_2M_CN.json')
alpaca=$(files 'alpaca_gpt4_data_zh.json'; files 'self_cognition.json')
dpo=$(files 'my_dpo_train.json'; files 'dpo_zh.json')
found wiki   "$wiki"   "wikipedia-cn-20230720-filtered.json from $HUB/pleisto/wikipedia-cn-20230720-filtered"
found baike  "$baike"  "563w_baidubaike.json from $HUB/xuqinyang/BaiduBaike-5.63M, or $DISK/1jIpCHnWLTNYabftavo3DVw?pwd=bwvb"
[ "$baike" ] || [ -z "$(files '563w_baidubaike.json.7z')" ] || echo "         (its archive is there: 7z x $(files '563w_baidubaike.json.7z'))"
found sky    "$sky"    "2020-40_zh_head_0000.jsonl and so on, $SKY_FILES files from $HUB/Skywork/SkyPile-150B/tree/main/data"
found belle  "$belle"  "Belle_open_source_0.5M.json, Belle_open_source_1M.json, train_2M_CN.json from $HUB/BelleGroup"
found alpaca "$alpaca" "alpaca_gpt4_data_zh.json from $HUB/shibing624/alpaca-zh"
found dpo    "$dpo"    "my_dpo_train.json, $DISK/1GYeR6qrUhjsmpgh8-ABDpQ?pwd=dba9, or dpo_zh.json from $HUB/hiyouga/DPO-En-Zh-20k"
n=$(echo "$sky" | grep -c .)
[ "$n" -eq 0 ] || [ "$n" -ge "$SKY_FILES" ] || echo "note: $n of $SKY_FILES files of SkyPile"
[ "$check_only" ] && { [ -z "$missing" ]; exit $(($? * 2)); }

# make_part DIRECTORY OPTIONS FILES: prepares them, unless that was done before. The note of what a part was made from is the last thing
# that is written.
make_part() {
    IFS=$newline
    set -f
    for file in $3; do set -- "$@" "$file"; done
    set +f
    directory=$1; options=$2; IFS=' '
    shift 3
    made_from="$options, tokenizer $TOKENIZER$(for file in "$@"; do printf '\n%s %d' "$file" "$(wc -c < "$file")"; done)"
    if [ "$(cat "$directory/made_from" 2> /dev/null)" = "$made_from" ]; then
        echo "$directory: made before"
        return
    fi
    rm -f "$directory/made_from"
    # shellcheck disable=SC2086    # options are a list
    "$PREPARE" $options --tokenizer "$TOKENIZER" --out "$directory" "$@" ||
        { echo "$directory failed; the parts before it are complete"; exit 1; }
    echo "$made_from" > "$directory/made_from"
}
# pretraining NAME OPTIONS FILES: a part of its own in $OUT/parts, linked into $OUT
pretraining() {
    make_part "$OUT/parts/$1" "--task pretrain $2" "$3" || exit 1
    ln -f "$OUT/parts/$1/train.bin" "$OUT/train_$1.bin" && ln -f "$OUT/parts/$1/tokenizer.bin" "$OUT/tokenizer.bin" || exit 1
    [ ! -f "$OUT/parts/$1/val.bin" ] || ln -f "$OUT/parts/$1/val.bin" "$OUT/val_$1.bin" || exit 1
}

rm -f "$OUT"/train_*.bin "$OUT"/val_*.bin        # the links: this run's parts get theirs again
[ "$wiki" ] && pretraining wiki "" "$wiki"
[ "$baike" ] && pretraining baike "$BAIKE_OPTIONS" "$baike"
IFS=$newline
set -f
for file in $sky; do pretraining "sky_$(basename "$file" .jsonl)" "" "$file"; done
set +f
sft=$(printf '%s\n' "$alpaca" "$belle" | grep .)
[ "$sft" ] && make_part "${OUT}_sft" "--task sft --template $TEMPLATE --dedup $SFT_OPTIONS" "$sft"
[ "$dpo" ] && make_part "${OUT}_dpo" "--task dpo --template $TEMPLATE --dedup" "$dpo"

echo
for file in "$OUT"/train_*.bin "$OUT"/val_*.bin "${OUT}_sft"/*.bin "${OUT}_dpo"/*.bin; do
    case $file in *'*'* | */tokenizer.bin) ;; *) "$PREPARE" show "$file" --documents 0 | head -n 1;; esac
done | awk '{ print; if (!/_sft|_dpo/ && /train_/) tokens += $(NF - 1) }
    END { if (tokens) printf "pretraining: %.2f billion tokens\n", tokens / 1e9 }'
[ -z "$missing" ] || { echo "missing:$missing; sh $0 --check $DOWNLOADS says where to get it"; exit 2; }

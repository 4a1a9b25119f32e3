#!/bin/sh
# test_prepare.sh: what ./prepare promises, case by case, on small inputs made here. Run from the repository root:
#     make prepare && sh dev/test/test_prepare.sh
#     PREPARE=/tmp/prepare sh dev/test/test_prepare.sh
# Every case prints a line; the exit code is the verdict.

P=${PREPARE:-./prepare}
D=$(mktemp -d) || exit 1
trap 'rm -rf "$D"' EXIT
trap 'exit 1' INT TERM
[ -x "$P" ] || { echo "no $P; run make prepare, or set PREPARE"; exit 1; }
[ -f dev/data/qwen.bin ] || { echo "run this from the repository root"; exit 1; }
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
passed=0
failed=0

verdict() { # name, "ok" or what was found
    if [ "$2" = ok ]; then passed=$((passed + 1)); echo "ok    $1"
    else failed=$((failed + 1)); echo "FAIL  $1: $2"; fi
}
equal() { # name, found, expected
    if [ "$2" = "$3" ]; then verdict "$1" ok; else verdict "$1" "found '$2', expected '$3'"; fi
}
same_file() { if cmp -s "$2" "$3"; then verdict "$1" ok; else verdict "$1" "$2 and $3 differ"; fi; }

# prep DIR [arguments]: prepares into $D/DIR, everything in train.bin unless the arguments say otherwise; output in $D/log.
prep() {
    dir=$1; shift
    "$P" --val-fraction 0 --out "$D/$dir" "$@" > "$D/log" 2>&1
}
# ids FILE: the documents as ids, a line each;  text FILE: as text, all lines joined by |
ids() { "$P" show "$1" --ids --documents 1000000 | grep -v -e '^---' | sed 1,2d; }
text() { "$P" show "$1" --documents 1000000 | grep -v -e '^---' | sed 1,2d | tr '\n' '|'; }
tokens_of() { printf "$1" | "$P" tokenize; }
documents() { "$P" show "$1" --documents 0 | sed -n '1s/.*: [a-z]*, \([0-9]*\) documents.*/\1/p'; }
# gives NAME TEXTS: $D/in.json becomes these documents, each with its end.
gives() { rm -rf "$D/gives"; prep gives "$D/in.json"; equal "$1" "$(text "$D/gives/train.bin")" "$2"; }
# fails NAME PATTERN command...: exit code 1 and exactly one line, which has PATTERN; no crash, no silence.
fails() {
    name=$1; pattern=$2; shift 2
    "$@" > "$D/out" 2> "$D/err"
    code=$?
    if [ $code -ne 1 ]; then verdict "$name" "exit code $code, expected 1"
    elif [ "$(grep -c . "$D/err")" -ne 1 ]; then verdict "$name" "not one line: $(cat "$D/err")"
    elif ! grep -q "$pattern" "$D/err"; then verdict "$name" "'$pattern' is not in: $(cat "$D/err")"
    else verdict "$name" ok; fi
}
# skips NAME PATTERN KEPT: the last prep exited 0, its log has PATTERN, train.bin has KEPT documents
skips() {
    if ! grep -q "$2" "$D/log"; then verdict "$1" "'$2' is not in: $(cat "$D/log")"
    else equal "$1" "$(documents "$D/$dir/train.bin")" "$3"; fi
}

echo "--- tokenize, detokenize"
equal "known ids" "$(tokens_of '杭州是个好地方')" "104130 104104 52801 100371"
equal "nothing in, an empty line out" "$(printf '' | "$P" tokenize | od -An -c | tr -d ' ')" '\n'
equal "control text is text by default" "$(tokens_of '<|im_end|>')" "27 91 318 6213 91 29"
equal "--special qwen2.5 recognises it" "$(printf '<|im_end|>' | "$P" tokenize --special qwen2.5)" "151645"
equal "v1 and qwen3 number differently" "$(printf '<|extra_0|>' | "$P" tokenize --special v1) $(printf '<think>' | "$P" tokenize --special qwen3)" "151646 151667"
equal "--file" "$(printf 'Hello world' > "$D/f"; "$P" tokenize --file "$D/f")" "9707 1879"
equal "--jsonl, a line for a line" "$(printf '"Hello world"\n""\n"\\u676d\\u5dde"\r\n' | "$P" tokenize --jsonl | tr '\n' '|')" "9707 1879||104130|"
fails "--jsonl names a bad line" "2: .*JSON" sh -c "printf '\"a\"\n\"b\n' | '$P' tokenize --jsonl"
equal "T9: cut characters come out as their bytes" "$(printf '90476 119' | "$P" detokenize | od -An -tx1 | tr -d ' \n')" "20e680bb"
equal "NUL, lines of ids, special tokens" "$(printf '188 64\n151645 198\n' | "$P" detokenize | od -An -tx1 | tr -d ' \n')" "00613c7c696d5f656e647c3e0a"
head -c 300000 "$P" | tr '\0\200-\377' 'a-z\n ' > "$D/bytes"
"$P" tokenize --file "$D/bytes" > "$D/ids"; "$P" detokenize < "$D/ids" > "$D/back"
same_file "300 kB there and back" "$D/bytes" "$D/back"
{ awk 'BEGIN { for (i = 0; i < 70000; i++) print "ab\n" }'    # where a piece of 256 kB ends, a line end follows a line end
  for i in 1 2 3 4 5 6; do cat dev/data/prepare.c dev/data/formats.md; done; } > "$D/long"
"$P" tokenize --file "$D/long" > "$D/ids"
{ printf '"'; sed -e 's/\\/\\\\/g; s/"/\\"/g; s/	/\\t/g; s/$/\\n/' "$D/long" | tr -d '\n'; printf '"\n'; } | "$P" tokenize --jsonl > "$D/ids2"
same_file "a long text in pieces, as in one piece" "$D/ids" "$D/ids2"
fails "an unknown id" "line 2: there is no token 152064" sh -c "printf '1\n152064\n' | '$P' detokenize"
fails "no id at all" "'x1' is not a token id" sh -c "echo 1 x1 | '$P' detokenize"
fails "tokenize on a full disk" "cannot write" sh -c "'$P' tokenize --file '$D/bytes' > /dev/full"

echo "--- records of every shape"
A='《甲》 first.'; B='second, 乙\"q\"'
printf '{"text":"%s"}\n{"text":"%s"}\n' "$A" "$B" > "$D/lines.jsonl"
printf '[{"text":"%s"},{"text":"%s"}]' "$A" "$B" > "$D/array.json"
printf '[\n  {\n    "id": 1, "meta": {"a": [1, {"text": 0}]},\n    "text": "%s"\n  },\n  {\n    "id": 2,\n    "text": "%s"\n  }\n]\n' "$A" "$B" > "$D/pretty.json"
printf '{"text":"%s"} {"text":"%s"}' "$A" "$B" > "$D/one_line"
printf '\357\273\277\r\n{"text":"%s"}\r\n\r\n{\r\n"text":\r\n"%s"}\r\n' "$A" "$B" > "$D/crlf.jsonl"
printf '{"completion":"%s","source":null}\n{"completion":"%s"}\n' "$A" "$B" > "$D/completion.jsonl"
prep lines "$D/lines.jsonl"
equal "JSON lines" "$(text "$D/lines/train.bin")" '《甲》 first.<|im_end|>|second, 乙"q"<|im_end|>|'
equal "tokens of the text, then the end" "$(ids "$D/lines/train.bin" | tr '\n' '|')" "$(tokens_of '《甲》 first.') 151645|$(tokens_of 'second, 乙"q"') 151645|"
for shape in array.json pretty.json one_line crlf.jsonl completion.jsonl; do
    prep "$shape.d" "$D/$shape"
    same_file "$shape" "$D/lines/train.bin" "$D/$shape.d/train.bin"
done
"$P" --val-fraction 0 --out "$D/stdin" - < "$D/pretty.json" > /dev/null
same_file "standard input" "$D/lines/train.bin" "$D/stdin/train.bin"
printf '{"text":"%s"}\n' "$A" > "$D/1.jsonl"; printf '{"text":"%s"}\n' "$B" > "$D/2.jsonl"
prep two "$D/1.jsonl" "$D/2.jsonl"
prep second "$D/2.jsonl"
{ dd bs="$(wc -c < "$D/1.jsonl")" count=1 > /dev/null 2>&1; "$P" --val-fraction 0 --out "$D/rest" -; } < "$D/lines.jsonl" > /dev/null 2>&1
same_file "two files, in order" "$D/lines/train.bin" "$D/two/train.bin"
same_file "standard input of which a part was read before" "$D/second/train.bin" "$D/rest/train.bin"
printf '\357\273\277  indented\r\nsame document\r\n \t\r\n\r\nnext\r\n\r\n' > "$D/t.txt"
prep text "$D/t.txt"
equal "text: blank lines, CRLF, byte order mark" "$(text "$D/text/train.bin")" '  indented|same document<|im_end|>|next<|im_end|>|'
printf '{"title":"青蛙","summary":null,"sections":[{"title":"食性","content":"吃虫。"},{"title":null},{"content":"跳。"}],"tags":[],"url":"x"}\n{"title":"鸟","summary":"会飞。","sections":[]}\n' > "$D/b.jsonl"
prep baike "$D/b.jsonl"
equal "Baidu Baike" "$(text "$D/baike/train.bin")" '青蛙|食性|吃虫。|跳。<|im_end|>|鸟|会飞。<|im_end|>|'
printf '{"title":"鸟","content":"会飞。"}\n{"title":null,"content":"吃虫。"}\n{"title":"空","content":" "}\n' > "$D/b.jsonl"
prep baike "$D/b.jsonl"
equal "title and content" "$(text "$D/baike/train.bin")" '鸟|会飞。<|im_end|>|吃虫。<|im_end|>|'
printf '{"文件名":"a","段落":[{"行号":0,"内容":"一。"},{"行号":2,"内容":"二。"}]}\n' > "$D/m.jsonl"
prep mnbvc "$D/m.jsonl"
equal "MNBVC" "$(text "$D/mnbvc/train.bin")" '一。|二。<|im_end|>|'
printf '{"text":"SkyPile page\\nsecond line"}\n' > "$D/sky.jsonl"
prep sky "$D/sky.jsonl"
equal "SkyPile" "$(text "$D/sky/train.bin")" 'SkyPile page|second line<|im_end|>|'
gzip -c "$D/lines.jsonl" | gzip -dc | "$P" --val-fraction 0 --out "$D/gz" - > /dev/null
same_file "gzip through a pipe" "$D/lines/train.bin" "$D/gz/train.bin"
gzip -c "$D/lines.jsonl" > "$D/lines.jsonl.gz"
fails "gzip itself says what to do" "compressed (gzip)" "$P" --out "$D/x" "$D/lines.jsonl.gz"
if command -v zstd > /dev/null; then
    zstd -q -c "$D/lines.jsonl" | zstd -dc | "$P" --val-fraction 0 --out "$D/zst" - > /dev/null
    same_file "zstd through a pipe" "$D/lines/train.bin" "$D/zst/train.bin"
else echo "SKIP  zstd is not here"; fi
printf '\377\376{\0"\0' > "$D/utf16.json"
fails "UTF-16" "is UTF-16" "$P" --out "$D/x" "$D/utf16.json"
printf '{"a":{"b":"deep"},"text":"not this"}\n' > "$D/f.jsonl"
prep field --field a.b "$D/f.jsonl"
equal "--field" "$(text "$D/field/train.bin")" 'deep<|im_end|>|'
KEY=$(printf '%080d' 1)
printf '{"a":[{"b":"zero"},{"b":"one"}],"l":["zero"],"m":{"%s2":"no","%s":"long","%s3":"no"}}\n' "$KEY" "$KEY" "$KEY" > "$D/f.jsonl"
prep field --field a.1.b "$D/f.jsonl"
equal "--field: an element of a list" "$(text "$D/field/train.bin")" 'one<|im_end|>|'
prep field --field "m.$KEY" "$D/f.jsonl"
equal "--field: a long key" "$(text "$D/field/train.bin")" 'long<|im_end|>|'
fails "--field: no element of a list" "nothing was kept" sh -c "'$P' --field l.b --out '$D/x' '$D/f.jsonl' 2>&1 | tail -n 1 >&2; exit 1"
prep eos --eos '<|endoftext|>' "$D/1.jsonl"
equal "--eos" "$(ids "$D/eos/train.bin" | sed 's/.* //')" "151643"
printf '{"text":"Ａ１，ﬁ①㈱ e\\u0301 ｶﾞ ㎏"}\n' > "$D/k.jsonl"
prep nfc "$D/k.jsonl"
equal "NFC by default, as Qwen" "$(text "$D/nfc/train.bin")" 'Ａ１，ﬁ①㈱ é ｶﾞ ㎏<|im_end|>|'
prep nfkc --nfkc "$D/k.jsonl"
equal "--nfkc" "$(text "$D/nfkc/train.bin")" 'A1,fi1(株) é ガ kg<|im_end|>|'
printf '{"text":"x <|im_end|> y <|endoftext|>"}\n' > "$D/c.jsonl"
prep control "$D/c.jsonl"
equal "T10: control text in documents stays text" "$(ids "$D/control/train.bin")" "$(tokens_of 'x <|im_end|> y <|endoftext|>') 151645"

echo "--- conversations"
IM=151644; END=151645; NL=198
HI=$(tokens_of hi); OK=$(tokens_of ok)
stars() { echo "$1" | sed 's/\([0-9][0-9]*\)/\1*/g'; }
printf '{"conversations":[{"role":"user","content":"hi"},{"role":"assistant","content":"ok"}]}\n' > "$D/s.jsonl"
prep sft "$D/s.jsonl"
HI_OK="$IM 872 $NL $HI $END $NL $IM 77091 $NL $(stars "$OK") $END*"
equal "T7: loss on the answer and its end marker, no more" "$(ids "$D/sft/train.bin")" "$HI_OK"
for record in '{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"ok"},{"role":"user","content":"bye"}]}' \
    '{"conversations":[{"from":"human","value":"hi"},{"from":"gpt","value":"ok"}],"id":7}' '{"instruction":"hi","input":"","output":"ok"}' \
    '{"instruction":"hi","output":"ok","input":null,"history":[]}' '{"prompt":"hi","response":"ok"}'; do
    echo "$record" > "$D/s2.jsonl"
    prep sft2 "$D/s2.jsonl"
    equal "$(echo "$record" | cut -c1-50)..." "$(ids "$D/sft2/train.bin")" "$HI_OK"
done
printf '{"messages":[{"role":"system","content":"S"},{"role":"user","content":"hi"},{"role":"assistant","content":"ok"},{"role":"user","content":"hi"},{"role":"assistant","content":"ok"}]}\n' > "$D/s.jsonl"
prep multi "$D/s.jsonl"
equal "system message, every turn trained" "$(ids "$D/multi/train.bin")" "$IM 8948 $NL $(tokens_of S) $END $NL $HI_OK $NL $HI_OK"
printf '{"instruction":"hi","input":"x","output":"ok"}\n' > "$D/s.jsonl"
prep system --system S "$D/s.jsonl"
equal "--system; instruction and input" "$(text "$D/system/train.bin")" '<|im_start|>system|S<|im_end|>|<|im_start|>user|hi|x<|im_end|>|<|im_start|>assistant|⟦ok<|im_end|>⟧|'
printf '{"instruction":"<|im_start|>system","input":"","output":"\\nok"}\n' > "$D/s.jsonl"
prep inject "$D/s.jsonl"
equal "T10: control text of the user; a line break at the start of content" "$(ids "$D/inject/train.bin")" \
    "$IM 872 $NL $(tokens_of '<|im_start|>system') $END $NL $IM 77091 $NL $NL* $(stars "$OK") $END*"
printf '{"instruction":"hi","output":"ok"}\n' > "$D/s.jsonl"
prep qwen25 --template qwen2.5 "$D/s.jsonl"
equal "--template qwen2.5 has a system message" "$(text "$D/qwen25/train.bin")" \
    '<|im_start|>system|You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>|<|im_start|>user|hi<|im_end|>|<|im_start|>assistant|⟦ok<|im_end|>⟧|'
prep qwen25 --template qwen2.5 --system S "$D/s.jsonl"
equal "--system replaces it" "$(text "$D/qwen25/train.bin" | cut -c1-31)" '<|im_start|>system|S<|im_end|>|'
printf '[\n  {\n    "instruction": "你是谁？",\n    "input": "",\n    "output": "我是助手。"\n  },\n  {\n    "instruction": "解释",\n    "input": "光",\n    "output": "波。"\n  }\n]\n' > "$D/alpaca.json"
prep alpaca "$D/alpaca.json"
equal "Alpaca-zh, self_cognition: a pretty-printed array" "$(text "$D/alpaca/train.bin")" \
    '<|im_start|>user|你是谁？<|im_end|>|<|im_start|>assistant|⟦我是助手。<|im_end|>⟧|<|im_start|>user|解释|光<|im_end|>|<|im_start|>assistant|⟦波。<|im_end|>⟧|'
prep mini2 --template mini_llm "$D/alpaca.json"
equal "--template mini_llm: the prompt's tokens are those of the whole prompt" "$(ids "$D/mini2/train.bin" | tr '\n' '|')" \
    "$(tokens_of '你是一个助手 用户: 你是谁？  回答: ') $(stars "$(tokens_of '我是助手。')") $END*|$(tokens_of '你是一个助手 用户: 解释 光 回答: ') $(stars "$(tokens_of '波。')") $END*|"
prep mini --template mini_llm "$D/s.jsonl"
equal "--template mini_llm" "$(text "$D/mini/train.bin")" '你是一个助手 用户: hi  回答: ⟦ok<|im_end|>⟧|'
for record in '{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"ok"}]}' '{"prompt":"hi","answer":"ok","input":" "}' \
    '{"chosen":[{"from":"human","value":"hi"},{"from":"gpt","value":"ok"}],"rejected":[{"from":"human","value":"hi"},{"from":"gpt","value":"no"}]}'; do
    echo "$record" > "$D/s2.jsonl"
    prep mini --template mini_llm "$D/s2.jsonl"
    equal "--template mini_llm $(echo "$record" | cut -c1-50)..." "$(ids "$D/mini/train.bin" | head -1)" "$(tokens_of '你是一个助手 用户: hi  回答: ') $(stars "$OK") $END*"
done
printf '{"instruction":"hi","output":"ok","history":[["hi","ok"]]}\n' > "$D/s2.jsonl"
prep mini --template mini_llm "$D/s2.jsonl"
equal "--template mini_llm: history" "$(text "$D/mini/train.bin")" '你是一个助手 用户: hi  回答: ⟦ok<|im_end|>⟧你是一个助手 用户: hi  回答: ⟦ok<|im_end|>⟧|'
printf '{"system":"Ｓ","instruction":"ｈｉ","output":"ｏｋ"}\n' > "$D/s2.jsonl"
prep nfkc --nfkc "$D/s2.jsonl"
equal "--nfkc: every message" "$(text "$D/nfkc/train.bin")" '<|im_start|>system|S<|im_end|>|<|im_start|>user|hi<|im_end|>|<|im_start|>assistant|⟦ok<|im_end|>⟧|'
printf '{"system":[1],"instruction":"hi","output":"ok"}\n{"system":" \\n","instruction":"hi","output":"ok"}\n{"system":null,"instruction":"hi","output":"ok"}\n' > "$D/s2.jsonl"
printf '{"messages":[{"role":"system","content":" "},{"role":"user","content":"hi"},{"role":"assistant","content":"ok"}]}\n' >> "$D/s2.jsonl"
prep blank "$D/s2.jsonl"
skips "system: neither text nor null" "skipped, wrong type (system)" 3
equal "system: a blank one is none" "$(ids "$D/blank/train.bin" | sort -u)" "$HI_OK"
prep none --template none --eos '<|endoftext|>' "$D/s.jsonl"
equal "--template none" "$(text "$D/none/train.bin")" 'hi⟦ok<|endoftext|>⟧|'
printf '{"prompt":"hi","chosen":"ok","rejected":"hi"}\n' > "$D/d.jsonl"
prep dpo "$D/d.jsonl"
PAIR="$HI_OK|$IM 872 $NL $HI $END $NL $IM 77091 $NL $(stars "$HI") $END*|"
equal "dpo: pairs, each with its prompt" "$(ids "$D/dpo/train.bin" | tr '\n' '|')" "$PAIR"
# flags FILE: the high byte of every token: 40 begins a document, 80 has no loss, c0 both
flags() { tail -c +257 "$1" | od -An -v -tx1 -w4 | awk '{ printf "%s ", $4 }'; }
equal "flags, pretraining" "$(printf '{"text":"Hello world"}\n{"text":"hi"}\n' > "$D/fl.jsonl"; prep fl "$D/fl.jsonl"; flags "$D/fl/train.bin")" "40 00 00 40 00 "
equal "flags, conversation" "$(flags "$D/sft/train.bin")" "c0 80 80 80 80 80 80 80 80 00 00 "
equal "flags, dpo" "$(flags "$D/dpo/train.bin")" "c0 80 80 80 80 80 80 80 80 00 00 c0 80 80 80 80 80 80 80 80 00 00 "
equal "dpo: two documents a pair" "$(documents "$D/dpo/train.bin")" 2
U='{"role":"user","content":"hi"}'; AO='{"role":"assistant","content":"ok"}'; AH='{"role":"assistant","content":"hi"}'
for record in "{\"prompt\":\"hi\",\"chosen\":\"ok\",\"reject\":\"hi\"}" "{\"chosen\":[$U,$AO],\"rejected\":[$U,$AH]}" \
    "{\"prompt\":\"hi\",\"chosen\":[$U,$AO],\"rejected\":[$U,$AH]}" "{\"prompt\":[$U],\"chosen\":[$AO],\"rejected\":[$AH]}" \
    "{\"conversations\":[{\"from\":\"human\",\"value\":\"hi\"}],\"chosen\":{\"from\":\"gpt\",\"value\":\"ok\"},\"rejected\":{\"from\":\"gpt\",\"value\":\"hi\"}}"; do
    echo "$record" > "$D/d2.jsonl"
    prep dpo2 "$D/d2.jsonl"
    equal "dpo $(echo "$record" | cut -c1-50)..." "$(ids "$D/dpo2/train.bin" | tr '\n' '|')" "$PAIR"
done
printf '{"chosen":[%s,%s,%s,%s],"rejected":[%s,%s,%s,%s]}\n' "$U" "$AO" "$U" "$AO" "$U" "$AO" "$U" "$AH" > "$D/d3.jsonl"
prep dpo3 "$D/d3.jsonl"
equal "dpo: only the last answer is trained" "$(ids "$D/dpo3/train.bin" | head -1)" "$(echo "$HI_OK" | tr -d '*') $NL $HI_OK"
SYSTEM="$IM 8948 $NL $(tokens_of S) $END $NL"
for record in "{\"system\":\"S\",\"chosen\":[$U,$AO],\"rejected\":[$U,$AH]}" "{\"prompt\":[{\"role\":\"system\",\"content\":\"S\"},$U],\"chosen\":[$U,$AO],\"rejected\":[$U,$AH]}" \
    "{\"prompt\":[{\"role\":\"system\",\"content\":\"S\"},$U],\"chosen\":[$AO],\"rejected\":[$AH]}" \
    "{\"system\":\"S\",\"prompt\":[{\"role\":\"system\",\"content\":\"T\"},$U],\"chosen\":[$U,$AO],\"rejected\":[$U,$AH]}"; do
    echo "$record" > "$D/d2.jsonl"
    prep dpo2 "$D/d2.jsonl"
    equal "dpo, system message $(echo "$record" | cut -c1-50)..." "$(ids "$D/dpo2/train.bin" | tr '\n' '|')" "$SYSTEM $(echo "$PAIR" | sed "s/|$IM/|$SYSTEM $IM/")"
done
printf '{"prompt":"hi","chosen":"ok","rejected":"ok"}\n{"chosen":[%s,%s],"rejected":[%s,%s]}\n%s\n' "$U" "$AO" '{"role":"user","content":"bye"}' "$AH" '{"prompt":"hi","chosen":"ok","rejected":"hi"}' > "$D/d2.jsonl"
printf '{"chosen":[%s,%s],"rejected":[%s,%s,%s,%s]}\n' "$U" "$AO" "$U" "$AH" "$U" "$AO" >> "$D/d2.jsonl"
prep dpo2 "$D/d2.jsonl"
skips "dpo: equal answers, different prompts" "2 with two different prompts, 1 with two equal answers" 2
fails "dpo: --strict" "d2.jsonl:1: with two equal answers" "$P" --strict --out "$D/x" "$D/d2.jsonl"
prep dpo2 --max-chars 8 "$D/d.jsonl"
skips "dpo: the limits count both sides, each once" "dropped: 0" 2
printf '{"prompt":[%s],"chosen":[%s],"rejected":[%s]}\n' "$U" "$AO" "$AH" > "$D/d2.jsonl"
prep dpo2 --max-chars 8 "$D/d2.jsonl"
skips "dpo: so with lists of messages" "dropped: 0" 2
printf '{"instruction":"only a prompt","output":""}\n{"messages":[{"role":"user","content":"hi"}]}\n%s\n' '{"instruction":"hi","output":"ok"}' > "$D/p.jsonl"
prep prompts "$D/p.jsonl"
skips "T6: prompts without an answer are dropped and counted" "2 records: 1 empty text, 1 no answer" 1

echo "--- bad records"
i=1; while [ $i -le 1000 ]; do printf '{"text": "文档 %d"}\r\n' $i; i=$((i + 1)); done > "$D/good.jsonl"
{ sed -n 1,499p "$D/good.jsonl"; printf '{"text": "文档\r\n'; sed -n 501,700p "$D/good.jsonl"; printf '\r\n'; sed -n 701,999p "$D/good.jsonl"; printf '{"text": "\346\226'; } > "$D/t11.jsonl"
prep t11 "$D/t11.jsonl"
skips "T11: 998 of 1000 kept" "2 malformed JSON" 998
equal "T11: lines are named" "$(grep -o 't11.jsonl:[0-9]*' "$D/log" | tr '\n' ' ')" "t11.jsonl:500 t11.jsonl:1001 "
fails "T11: --strict stops" "t11.jsonl:500: malformed" "$P" --strict --out "$D/strict" "$D/t11.jsonl"
equal "--strict writes nothing" "$(ls -A "$D/strict")" ""
printf '[\n{"text":"a1"},\n{"text":"a2", "x": [{"y": 1\n{"text":"a3"},\n{"text":"a4", "text\n{"text":"a5"}\n' > "$D/cut.json"
prep cut "$D/cut.json"
skips "array: a cut record takes no other with it; a missing ] is reported" "dropped: 3 records" 3
printf '{"text":"m1", {"id":2,"text":"m2"}\n{"text":"m3"}\n' > "$D/misplaced.jsonl"
prep misplaced "$D/misplaced.jsonl"
skips "a record cut where { can't stand" "dropped: 1 records: 1 malformed" 2
printf '{"text":\n{"text":"r2"}\n{"text":"r3","list":[\n{"text":"r4"}\n' > "$D/repeated.jsonl"
prep repeated "$D/repeated.jsonl"
skips "a record cut where { could stand" "dropped: 2 records: 2 malformed" 2
printf '[\n{\n"text": "a",\n"list": [\n{\n"text": "b"\n},\n{\n"text": "c"\n}\n],\n"one":\n{\n"text": "d"\n}\n},\n{\n"text": "e"\n}\n]\n' > "$D/in.json"
gives "printed without indentation, with parts that look like records" 'a<|im_end|>|e<|im_end|>|'
{ printf '[\n{\n"text": "a",\n"list": [\n'; for i in 1 2 3; do printf '{\n"text": "b%d"\n},\n' $i; done; printf '{\n"text": "c"\n}\n]\n'; } > "$D/in.json"
gives "so printed, with a record cut off" 'b1<|im_end|>|b2<|im_end|>|b3<|im_end|>|c<|im_end|>|'
{ printf '[\n'; printf '{\n"text": "a",\n"list": ["x",\n'; for i in 1 2 3; do printf '{\n"text": "b%d"\n},\n' $i; done; printf '"k": "y"]\n}\n]\n'; } > "$D/in.json"
gives "so printed, balanced by chance, but no JSON" 'b1<|im_end|>|b2<|im_end|>|b3<|im_end|>|'
printf '[{"text":"g0"},{"tags":[{"x":1}{"x":2}],"text":"w"},{"text":"g1"},{"meta":[{"text":"p"}{"text":"q"}],"text":"w"},{"text":"g2"}]' > "$D/in.json"
gives "a comma missing inside a record takes no other with it" 'g0<|im_end|>|g1<|im_end|>|g2<|im_end|>|'
{ printf '[\n{"text":"A","tags":["x",\n'; for i in 1 2 3; do printf '{"text":"g%d"},\n' $i; done; printf '"y"]},\n{"text":"g4"}\n]\n'; } > "$D/in.json"
gives "nor does a record that a stray end behind them closes" 'g1<|im_end|>|g2<|im_end|>|g3<|im_end|>|y<|im_end|>|g4<|im_end|>|'
printf '{"text":"a","list":[1\n{"id":2,"text":"b"}\n{"text":"c"}\n' > "$D/in.json"
gives "a record cut off in an array, the next begins with another key" 'b<|im_end|>|c<|im_end|>|'
{ printf '['; i=0; while [ $i -lt 1000 ]; do printf '{"text":[\n'; i=$((i + 1)); done; printf '{"text":"end"}]'; } > "$D/opens.json"
prep opens "$D/opens.json"
skips "a thousand records cut off where { could stand" "1000 malformed JSON" 1
printf '[\n  {\n    "text": "p1"\n  },\n  {\n    "text": "p2,\n    "m": {"k": 1}\n  },\n  {\n    "text": "p3"\n  }\n]\n' > "$D/pcut.json"
prep pcut "$D/pcut.json"
skips "pretty-printed: a broken record takes no other with it" "pcut.json:5: .*line break" 2
printf '"good1"\n"broken\n"good2"\n"good3"\n' > "$D/strings.jsonl"
prep strings "$D/strings.jsonl"
skips "strings: a broken one takes no other with it" "dropped: 1 records: 1 malformed JSON$" 3
printf '[{"text":"good1"}\n,{"text":"broken\n,{"text":"good2"}\n,{"text":"good3"}]' > "$D/commas.json"
prep commas "$D/commas.json"
skips "lines that begin with a comma" "dropped: 1 records: 1 malformed JSON$" 3
printf '[\n{"text":"a","list":[\n  {"text":"part"},\n{"text":"b"}\n]\n' > "$D/inner.json"
prep inner "$D/inner.json"
skips "a record cut off behind a part that begins as it does" "dropped: 1 records: 1 malformed JSON$" 1
printf '[\n{"text":"a"},\n{"text":"b\n]\n' > "$D/last.json"
prep last "$D/last.json"
skips "the last record of an array is broken: that is reported once" "dropped: 1 records: 1 malformed JSON; 1 bytes" 1
for first in '{"text":"a"},' ''; do
    { printf '[%s{"text":"b\nb","list":[{"x":1}, {"x":2}]}' "$first"; i=1; while [ $i -le 1000 ]; do printf ', {"text":"good%d"}' $i; i=$((i + 1)); done; printf ']'; } > "$D/line.json"
    prep line "$D/line.json"
    skips "an array on one line: what is behind a broken record is found" "1 malformed JSON; 28 bytes behind broken" $((1000 + ${#first} / 13))
done
{ printf '[{"text":"a"},{"text":"b\nb'; head -c 8388577 /dev/zero | tr '\0' x; printf '"}, {"text":"good"}]'; } > "$D/edge.json"
prep edge "$D/edge.json"
skips "so where the first 8 MB end" "1 malformed JSON; 8388580 bytes behind broken" 2
rm "$D/edge.json"
printf '{"title":"a\nb","sections":[{"title":"c","content":"d"},{"title":"e","content":"f"}]}\n{"title":"g","sections":[]}\n' > "$D/sections.jsonl"
prep sections "$D/sections.jsonl"
skips "but nothing inside a broken record" "1 malformed JSON; 72 bytes behind broken" 1
printf '["a", "b"]\n"c" \n"d" or not\n"e", "f" g\n"h"' > "$D/after.json"
prep after "$D/after.json"
equal "text after a string makes no record" "$(text "$D/after/train.bin")" 'a<|im_end|>|b<|im_end|>|c<|im_end|>|e<|im_end|>|h<|im_end|>|'
bad() { # name, record, reason
    printf '%b\n{"text":"good"}\n' "$2" > "$D/bad.jsonl"
    prep bad --task pretrain "$D/bad.jsonl"
    skips "$1" "dropped: 1 records: 1 $3" 1
}
bad "lone surrogate"  '{"text":"a\\ud800b"}' "lone surrogate"
bad "NUL character"   '{"text":"a\\u0000b"}' "NUL character"
bad "NUL byte"        '{"text":"a\0000b"}' "malformed JSON"
bad "invalid UTF-8"   '{"text":"a\0377b"}' "invalid UTF-8"
bad "null"            '{"text":null}' "null field"
bad "wrong type"      '{"text":["a"]}' "wrong type"
bad "missing field"   '{"txt":"a"}' "missing field"
bad "empty"           '{"text":""}' "empty text"
bad "white space"     '{"text":" \\n\0343\0200\0200"}' "empty text"
bad "NUL in a key"    '{"text\\u0000":"a"}' "malformed JSON"
bad "a number"        '17' "wrong type"
bad "garbage"         'hello {' "malformed JSON"
bad "deep nesting"    "$(printf '{"text":%s1}' "$(printf '%0300d' 0 | tr 0 '[')")" "malformed JSON"
printf '{"messages":[{"role":"robot","content":"x"}]}\n{"messages":"x"}\n{"messages":[{"role":"user","content":null}]}\n{"instruction":"hi","output":"ok"}\n' > "$D/r.jsonl"
prep roles "$D/r.jsonl"
skips "conversations: role, list, content" "dropped: 3 records: 1 null field, 1 wrong type, 1 unknown role" 1
printf 'fine\n\n\377\n\nfine too\n' > "$D/u.txt"
prep utf8 "$D/u.txt"
skips "text: invalid UTF-8 drops one document" "u.txt:3: skipped, invalid UTF-8" 2
{ echo '{"text":"before"}'; printf '{"text":"'; head -c 20000000 /dev/zero | tr '\0' a; printf '"}\n{"text":"after"}\n'; } > "$D/huge.jsonl"
prep huge "$D/huge.jsonl"
skips "a record of 20 MB is dropped, its neighbours stay" "huge.jsonl:2: .*longer than 16 MB" 2
rm "$D/huge.jsonl"
yes 'The same line, again and again.' | head -c 9000000 > "$D/big.txt"
prep bigtext "$D/big.txt"
equal "a text of 9 MB is cut at a line end" "$(documents "$D/bigtext/train.bin")" 2
rm -r "$D/bigtext" "$D/big.txt"

printf '﻿{"text":"mark in the middle"}\n' | cat "$D/1.jsonl" - > "$D/marked.jsonl"
prep marked "$D/marked.jsonl"
skips "a byte order mark in the middle, where files were joined" "dropped: 0" 2

echo "--- many documents"
awk 'BEGIN { srand(1); for (i = 0; i < 20000; i++) { n = 100 + int(rand() * 801); t = ""
    for (k = 9; k <= n; k += 9) t = t "第" int(rand() * 10) "章，天地玄黄。"; for (k -= 9; k < n; k++) t = t "x"; if (i % 97 == 0) t = t " <|im_end|>"
    printf "{\"text\": \"%s\"}\n", t } }' > "$D/20000.jsonl"
"$P" --val-fraction 0.05 --shard-tokens 1000000 --out "$D/20000" "$D/20000.jsonl" > "$D/log"
ends() { for f in "$1"/*.bin; do [ "$f" = "$1/tokenizer.bin" ] || tail -c +257 "$f" | od -An -v -tu4 -w4; done |
    awk '{ id = $1 % 16777216; ends += id == 151645; if ($1 >= 1073741824) begins++ } END { print begins, ends }'; }
equal "20000 documents have 20000 end markers, over shards and val.bin" "$(ends "$D/20000")" "20000 20000"
equal "and the headers say so" "$(for f in "$D"/20000/train_*.bin "$D/20000/val.bin"; do documents "$f"; done | awk '{ n += $1 } END { print n }')" 20000
rm -r "$D/20000"
awk 'BEGIN { for (k = 0; k < 20; k++) long = long "天地玄黄，宇宙洪荒。"
    for (i = 0; i < 120000; i++) printf "{\"text\": \"document %d: %s\"}\n", i, i < 80000 ? i * i : long }' > "$D/batches.jsonl"
split -l 20000 "$D/batches.jsonl" "$D/piece_"
prep batches --trim-vocab "$D/batches.jsonl"
prep pieces --trim-vocab "$D"/piece_*
same_file "a file of several batches, as in pieces of one batch" "$D/batches/train.bin" "$D/pieces/train.bin"
rm -r "$D/batches" "$D/pieces" "$D"/piece_*

echo "--- filters, split, shards"
prep dedup --dedup "$D/lines.jsonl" "$D/lines.jsonl" "$D/1.jsonl"
skips "--dedup" "dropped: 3 records: 3 duplicate" 2
same_file "--dedup keeps the first" "$D/lines/train.bin" "$D/dedup/train.bin"
printf '{"text":"四个汉字"}\n{"text":"ab"}\n{"text":"abcdef"}\n' > "$D/l.jsonl"
prep length --min-chars 3 --max-chars 5 "$D/l.jsonl"
equal "--min-chars, --max-chars count characters" "$(text "$D/length/train.bin")" '四个汉字<|im_end|>|'
"$P" --val-fraction 0.2 --out "$D/split" "$D/good.jsonl" > /dev/null
sed '1!G;h;$!d' "$D/good.jsonl" > "$D/reversed.jsonl"
"$P" --val-fraction 0.2 --out "$D/split2" "$D/reversed.jsonl" > /dev/null
n=$(documents "$D/split/val.bin")
if [ "$n" -gt 150 ] && [ "$n" -lt 250 ]; then verdict "--val-fraction 0.2 of 1000: $n" ok; else verdict "--val-fraction" "$n of 1000"; fi
equal "nothing is lost or doubled" $((n + $(documents "$D/split/train.bin"))) 1000
equal "in another order, the same documents" "$(ids "$D/split/val.bin" | sort | cksum)" "$(ids "$D/split2/val.bin" | sort | cksum)"
"$P" --val-fraction 0 --out "$D/split" "$D/good.jsonl" > /dev/null
equal "again without val: the old val.bin is gone" "$(ls "$D/split" | tr '\n' ' ')" "tokenizer.bin train.bin "
prep shards --shard-tokens 1000 "$D/good.jsonl"
equal "--shard-tokens: names" "$(ls "$D/shards" | head -3 | tr '\n' ' ')" "tokenizer.bin train_00000.bin train_00001.bin "
for f in "$D"/shards/train_*.bin; do tail -c +257 "$f"; done > "$D/joined"
tail -c +257 "$D/split/train.bin" > "$D/whole"
same_file "--shard-tokens: together they are train.bin" "$D/joined" "$D/whole"
equal "--shard-tokens: every shard begins a document and is full" "$(for f in "$D"/shards/train_*.bin; do ls -l "$f"; done | awk '{ n = ($5 - 256) / 4; if (n > 1000) bad++ } END { print bad + 0 }')" 0
prep shards "$D/good.jsonl"
equal "again in one file: the shards are gone" "$(ls "$D/shards" | tr '\n' ' ')" "tokenizer.bin train.bin "
for threads in 1 3; do
    prep "threads$threads" --threads $threads --trim-vocab "$D/good.jsonl"
done
same_file "any number of threads, the same tokens" "$D/threads1/train.bin" "$D/threads3/train.bin"
same_file "any number of threads, the same vocabulary" "$D/threads1/tokenizer.bin" "$D/threads3/tokenizer.bin"

echo "--- --trim-vocab"
cat dev/data/formats.md dev/data/prepare.c > "$D/corpus.txt"
"$P" --val-fraction 0.1 --out "$D/full" "$D/corpus.txt" > /dev/null
"$P" --val-fraction 0.1 --out "$D/trim" --trim-vocab "$D/corpus.txt" > "$D/log"
equal "the same text" "$(text "$D/trim/train.bin" | cksum)" "$(text "$D/full/train.bin" | cksum)"
equal "the same number of tokens" "$(ls -l "$D/full/train.bin" | awk '{print $5}')" "$(ls -l "$D/trim/train.bin" | awk '{print $5}')"
for f in full trim; do
    ids "$D/$f/train.bin" | tr ' ' '\n' | "$P" detokenize --jsonl --tokenizer "$D/$f/tokenizer.bin" > "$D/$f.tokens"
done
same_file "the same segmentation" "$D/full.tokens" "$D/trim.tokens"
V=$("$P" show "$D/trim/train.bin" | sed -n 's/^vocabulary \([0-9]*\),.*/\1/p')
if [ "$V" -gt 256 ] && [ "$V" -lt 6000 ]; then verdict "a small vocabulary: $V" ok; else verdict "a small vocabulary" "$V"; fi
equal "chat words are kept" "$(printf 'system\nuser\nassistant\n' | "$P" tokenize --tokenizer "$D/threads1" | wc -w | tr -d ' ')" 6
equal "any other text still encodes without loss" "$(printf '龘 𠀀 é ☃ zzqx' | "$P" tokenize --tokenizer "$D/trim" | "$P" detokenize --tokenizer "$D/trim/tokenizer.bin")" '龘 𠀀 é ☃ zzqx'
"$P" --task sft --tokenizer "$D/trim/tokenizer.bin" --val-fraction 0 --out "$D/trim_sft" "$D/s.jsonl" > /dev/null
equal "another data set with the same vocabulary" "$(text "$D/trim_sft/train.bin")" '<|im_start|>user|hi<|im_end|>|<|im_start|>assistant|⟦ok<|im_end|>⟧|'
same_file "its tokenizer.bin is the same" "$D/trim/tokenizer.bin" "$D/trim_sft/tokenizer.bin"
found=$("$P" show "$D/trim/val.bin" | sed -n 's/.*bigram loss \([0-9.]*\).*/\1/p')
{ ids "$D/trim/train.bin" | tr '\n' ' '; echo; ids "$D/trim/val.bin" | tr '\n' ' '; } > "$D/bigram"
expected=$(awk -v V="$V" 'NR == 1 { N = NF; for (i = 1; i <= NF; i++) { c[$i]++; if (i > 1) { b[$(i-1) " " $i]++; before[$(i-1)]++ } } }
    NR == 2 { best = 1e9; for (a = 1 / 16; a < 1e5; a *= 1.25) { sum = 0; for (i = 2; i <= NF; i++) {
        p1 = (c[$i] + 1) / (N + V); sum -= log((b[$(i-1) " " $i] + a * p1) / (before[$(i-1)] + a)) }
        if (sum / (NF - 1) < best) best = sum / (NF - 1) } printf "%.4f", best }' "$D/bigram")
equal "bigram loss of val.bin, as awk computes it" "$found" "$expected"
cp "$D/trim/train.bin" "$D/once"; cp "$D/trim/tokenizer.bin" "$D/once.tokenizer"
"$P" --val-fraction 0.1 --out "$D/trim" --trim-vocab "$D/corpus.txt" > /dev/null
same_file "again: the same tokens" "$D/once" "$D/trim/train.bin"
same_file "again: the same vocabulary" "$D/once.tokenizer" "$D/trim/tokenizer.bin"

echo "--- nothing half-written"
cp "$D/full/train.bin" "$D/before"
yes '{"text":"many words, many tokens, a large file"}' | head -n 100000 > "$D/many.jsonl"
fails "a full disk" "cannot write" sh -c "ulimit -f 500; exec '$P' --out '$D/full' '$D/many.jsonl'"
equal "a full disk leaves no unfinished file" "$(ls "$D/full" | tr '\n' ' ')" "tokenizer.bin train.bin val.bin "
same_file "and the files of the run before" "$D/full/train.bin" "$D/before"
fails "a disk that is full when tokenizer.bin is written" "cannot write" \
    sh -c "ulimit -f 500; exec '$P' --val-fraction 0 --shard-tokens 1000 --out '$D/full' '$D/1.jsonl'"
equal "it too leaves the files of the run before" "$(ls "$D/full" | tr '\n' ' ')" "tokenizer.bin train.bin val.bin "
fails "everything falls to val.bin" "lower --val-fraction" "$P" --val-fraction 0.999999 --out "$D/full" "$D/1.jsonl"
same_file "and train.bin is the one of the run before" "$D/full/train.bin" "$D/before"
# sleep_until FILE: waits until it is there and not empty
sleep_until() { i=0; while [ ! -s "$1" ] && [ $i -lt 600 ]; do sleep 0.1; i=$((i + 1)); done; }
mkfifo "$D/fifo"
for threads in 1 4; do
    "$P" --threads $threads --out "$D/int" - < "$D/fifo" > "$D/log" 2>&1 &
    pid=$!
    exec 3> "$D/fifo"
    cat "$D/many.jsonl" "$D/many.jsonl" "$D/many.jsonl" >&3
    sleep 2
    kill -TERM $pid
    sleep_until "$D/log"
    lines=$(grep -c 'interrupted' "$D/log")
    exec 3>&-
    wait $pid
    equal "interrupted while it waits, --threads $threads: exit code, one line, no file" "$? $lines $(ls "$D/int" | wc -l | tr -d ' ')" "1 1 0"
done
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do cat "$D/many.jsonl"; done > "$D/shrinks.jsonl"
"$P" --threads 1 --val-fraction 0 --out "$D/int" "$D/shrinks.jsonl" > /dev/null 2> "$D/log" &
sleep_until "$D/int/train.bin.tmp"
: > "$D/shrinks.jsonl"
wait $!
equal "a file that is cut while it is read" "$? $(grep -c 'became shorter while it was read' "$D/log")" "1 1"
(trap '' HUP; exec "$P" --val-fraction 0 --out "$D/ignored" - < "$D/fifo" > /dev/null 2>&1) &
pid=$!
exec 3> "$D/fifo"
cat "$D/good.jsonl" >&3
sleep 0.5
kill -HUP $pid
exec 3>&-
wait $pid
equal "nohup: an ignored signal stays ignored" $? 0
for shards in 0 100000; do
    cp -r "$D/full" "$D/killed"
    "$P" --shard-tokens $shards --out "$D/killed" - < "$D/fifo" > /dev/null 2>&1 &
    pid=$!
    exec 3> "$D/fifo"
    cat "$D/many.jsonl" "$D/many.jsonl" "$D/many.jsonl" "$D/many.jsonl" "$D/many.jsonl" >&3
    name=train; [ $shards -gt 0 ] && name=train_00001
    sleep_until "$D/killed/$name.bin.tmp"
    kill -KILL $pid
    wait $pid 2> /dev/null
    exec 3>&-
    equal "killed: unfinished files are called .tmp (--shard-tokens $shards)" "$(ls "$D/killed" | grep -v -c 'tmp$')" 3
    same_file "and the files of the run before are whole" "$D/full/train.bin" "$D/killed/train.bin"
    "$P" --val-fraction 0 --out "$D/killed" "$D/lines.jsonl" > /dev/null
    equal "the next run removes them" "$(ls "$D/killed" | tr '\n' ' ')" "tokenizer.bin train.bin "
    rm -r "$D/killed"
done
"$P" --out "$D/lock" - < "$D/fifo" > /dev/null 2>&1 &
exec 3> "$D/fifo"
printf '{"text":"a"}\n' >&3
sleep 0.5
fails "two runs in one directory" "another prepare" "$P" --out "$D/lock" "$D/1.jsonl"
exec 3>&-
wait

echo "--- prepare_mini_llm.sh"
raw="$D/raw files"; mkdir -p "$raw/wiki pedia" "$raw/sky/data" "$raw/belle"
printf '[{"completion":"昭通机场是位于云南的机场。","source":"wikipedia.zh2307"},{"completion":"第二篇。","source":"wikipedia.zh2307"}]' > "$raw/wiki pedia/wikipedia-cn-20230720-filtered.json"
printf '{"title":"红色食品","summary":"%s","sections":[{"title":"简介","content":"治疗作用。"}],"tags":["食品"],"url":"x"}\n{"title":"空","summary":"","sections":[],"tags":[],"url":"x"}\n' \
    "多吃红色食品可预防感冒。红色食品有红柿椒、西红柿、胡萝卜、红心白薯、山楂、红苹果、草莓、红枣、老南瓜、红米、柿子等。" > "$raw/563w_baidubaike.json"
for i in 0 1 2; do printf '{"text":"网页 %d 的正文。"}\n{"text":"另一页 %d。"}\n' $i $i > "$raw/sky/data/2020-40_zh_head_000$i.jsonl"; done
printf '{"instruction":"问%d","input":"","output":"答。"}\n' 1 2 > "$raw/belle/Belle_open_source_1M.json"
printf '{"instruction":"问3","input":"","output":"答。"}\n' > "$raw/belle/train_2M_CN.json"
printf '[\n {"instruction":"问1","input":"","output":"答。"},\n {"instruction":"长","input":"","output":"%%0600d"}]\n' 1 | sed "s/%0600d/$(printf '%0600d' 1)/" > "$raw/alpaca_gpt4_data_zh.json"
printf '[{"prompt":"问","chosen":"好。","reject":"坏。"}]' > "$raw/my_dpo_train.json"
mini() { PREPARE="$P" OUT="$D/mini_llm" sh dev/scripts/prepare_mini_llm.sh "$@" > "$D/log" 2>&1; code=$?; }
SKY_FILES=2; export SKY_FILES
mini "$raw"
equal "all parts" "$code $(cd "$D" && ls mini_llm mini_llm_sft mini_llm_dpo | grep 'bin$' | tr '\n' ' ')" \
    "0 tokenizer.bin train_baike.bin train_sky_2020-40_zh_head_0000.bin train_sky_2020-40_zh_head_0001.bin train_wiki.bin tokenizer.bin train.bin tokenizer.bin train.bin "
equal "their documents" "$(for f in "$D"/mini_llm/train_*.bin "$D/mini_llm_sft/train.bin" "$D/mini_llm_dpo/train.bin"; do documents "$f"; done | tr '\n' ' ')" "1 2 2 2 3 2 "
equal "MINI_LLM's own prompt" "$(text "$D/mini_llm_dpo/train.bin")" '你是一个助手 用户: 问  回答: ⟦好。<|im_end|>⟧|你是一个助手 用户: 问  回答: ⟦坏。<|im_end|>⟧|'
mini "$raw"
equal "again: nothing is made twice" "$code $(grep -c 'made before' "$D/log")" "0 6"
rm "$D/mini_llm/parts/baike/made_from"; echo '{"text":"one more"}' >> "$raw/sky/data/2020-40_zh_head_0001.jsonl"
mini "$raw"
equal "an interrupted part and a changed file are made again" "$code $(grep -c 'made before' "$D/log") $(documents "$D/mini_llm/train_sky_2020-40_zh_head_0001.bin")" "0 4 3"
rm "$raw/my_dpo_train.json" "$raw/wiki pedia/wikipedia-cn-20230720-filtered.json"; SKY_FILES=1
mini "$raw"
equal "missing files are named, the rest is made" "$code $(grep -c '^missing' "$D/log") $(ls "$D/mini_llm" | grep -c sky)" "2 3 1"
mini --check "$D/nothing"
equal "no such directory" "$code $(tail -n 1 "$D/log")" "1 $D/nothing is no directory"
unset SKY_FILES

echo "--- mistakes"
fails "no input" "no input" "$P" --out "$D/x"
fails "no --out" "out is missing" "$P" "$D/l.jsonl"
fails "a file that isn't there" "nothere.jsonl: No such file" "$P" --out "$D/x" "$D/l.jsonl" "$D/nothere.jsonl"
fails "a directory" "is a directory" "$P" --out "$D/x" "$D"
fails "an unknown tokenizer" "cannot open the tokenizer" "$P" --tokenizer "$D/nothere" --out "$D/x" "$D/l.jsonl"
fails "a tokenizer that is none" "no tokenizer" "$P" --tokenizer "$D/t.txt" --out "$D/x" "$D/l.jsonl"
fails "an unknown option" "did you mean --trim-vocab" "$P" --trim-vocap --out "$D/x" "$D/l.jsonl"
fails "--field for conversations" "field is for pretraining, not for --task sft" "$P" --task sft --field a --out "$D/x" "$D/s.jsonl"
fails "--template for pretraining" "template is for sft and dpo" "$P" --template mini_llm --out "$D/x" "$D/l.jsonl"
fails "--system for pretraining" "system is for sft and dpo" "$P" --task pretrain --system S --out "$D/x" "$D/l.jsonl"
fails "an unknown --eos" "no special token" "$P" --eos '<eos>' --out "$D/x" "$D/l.jsonl"
fails "--special none has no end" "choose another --eos or --special" "$P" --special none --out "$D/x" "$D/l.jsonl"
fails "--val-fraction 1" "must be below 1" "$P" --val-fraction 1 --out "$D/x" "$D/l.jsonl"
fails "100000 threads" "at most 1024" "$P" --threads 100000 --out "$D/x" "$D/l.jsonl"
fails "nothing kept" "nothing was kept of 3" "$P" --min-chars 100 --out "$D/x" "$D/l.jsonl"
: > "$D/empty.jsonl"
fails "an empty file" "nothing was kept of 0" "$P" --out "$D/x" "$D/empty.jsonl"
printf '{"text":"\326\320\316\304"}\n' > "$D/gbk.jsonl"
printf '[1] see below\n\n"Hello," he said.\n' > "$D/notes"
fails "text that looks like JSON" "name it .txt if it is text" sh -c "'$P' --out '$D/x' '$D/notes' 2>&1 | tail -n 1 >&2; exit 1"
fails "GBK" "is it GBK" sh -c "'$P' --out '$D/x' '$D/gbk.jsonl' 2>&1 | tail -n 1 >&2; exit 1"
printf 'version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n' > "$D/lfs.json"
fails "a git-lfs pointer" "git lfs pull" "$P" --out "$D/x" "$D/lfs.json"
fails "text for sft" "plain text" "$P" --task sft --out "$D/x" "$D/t.txt"
fails "a token file as input" "is a token file already" "$P" --out "$D/x" "$D/full/train.bin"
printf 'PAR1xxxx' > "$D/x.parquet"
fails "Parquet" "Parquet" "$P" --out "$D/x" "$D/x.parquet"
fails "--out is a file" "director" "$P" --out "$D/l.jsonl" "$D/l.jsonl"
head -c 1000 "$D/full/train.bin" > "$D/short.bin"
fails "show: a truncated file" "truncated" "$P" show "$D/short.bin"
fails "show: another tokenizer" "not made with" "$P" show --tokenizer dev/data/qwen.bin "$D/trim/train.bin"
"$P" --help > "$D/help"
equal "--help lists every option" "$(for o in out task tokenizer special eos val-fraction trim-vocab field min-chars max-chars dedup template system show strict shard-tokens threads jsonl file documents; do
    grep -q -e "--$o" "$D/help" || echo $o; done)" ""

echo
echo "passed $passed, failed $failed"
[ $failed -eq 0 ]

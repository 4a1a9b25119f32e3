#!/bin/sh
# The binary for every x86-64 (make portable): each version of it that this processor can run has the native build's losses.
case "$(uname -sm)" in "Linux x86_64") ;; *) echo "SKIP make portable is for Linux on x86-64"; exit 0 ;; esac
command -v objcopy > /dev/null || { echo "SKIP objcopy is not here"; exit 0; }
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
make -s portable PORTABLE=build/train_qwen_portable || exit 1
losses() { sed -n 's/.*"loss":\([0-9.]*\),.*/\1/p' "$1/log.jsonl"; }
run() { "$1" --steps 3 --lr 1e-4 --eval-tokens 256 --sample-every 0 --out "$2" > "$out/said" 2>&1; }
run ./train_qwen "$out/native" || { cat "$out/said"; exit 1; }
failed=0 tried=0
for version in sse2 avx2 avx512; do
    if QWEN_CPU=$version run build/train_qwen_portable "$out/$version"; then
        vectors=$(sed -n 's/.*vectors of \([0-9]*\) floats.*/\1/p' "$out/said")
        worst=$( (losses "$out/native"; losses "$out/$version") | awk '{x[NR] = $1} END {if (NR != 6) {print 1; exit}
            for (i = 1; i <= 3; i++) {d = (x[i] - x[i + 3]) / x[i]; if (d < 0) d = -d; if (d > m) m = d} print m + 0}')
        if awk "BEGIN {exit !($worst <= 1e-6)}"; then echo "ok   portable, $version (vectors of $vectors floats): losses within $worst of the native build's"
        else echo "FAIL portable, $version: losses differ by $worst from the native build's"; failed=1; fi
        tried=$((tried + 1))
    elif grep -q "this processor does not have it" "$out/said"; then echo "SKIP portable, $version: not on this processor"
    else cat "$out/said"; failed=1; fi
done
QWEN_CPU=mmx build/train_qwen_portable info > "$out/said" 2>&1 && failed=1
grep -q "it can be sse2" "$out/said" && echo "ok   $(head -n 1 "$out/said")" || { echo "FAIL QWEN_CPU=mmx: $(cat "$out/said")"; failed=1; }
[ $tried -gt 0 ] && exit $failed

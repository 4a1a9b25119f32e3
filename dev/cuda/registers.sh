#!/bin/sh
# registers.sh ARCH FLAGS < ptxas report: one line a kernel with its registers, static shared memory and spills; fails if one spills.
awk -v what="nvcc $1 $2" '
    /Compiling entry function/ { split($0, part, "\047"); name = part[2] }
    /bytes spill stores/ { spill = 0; for (i = 1; i < NF; i++) if ($(i + 1) ~ /^bytes/ && $(i + 2) == "spill") spill += $i }
    /Used [0-9]+ registers/ {
        match($0, /Used [0-9]+/); registers = substr($0, RSTART + 5, RLENGTH - 5); shared = 0
        if (match($0, /[0-9]+ bytes smem/)) shared = substr($0, RSTART, RLENGTH - 11)
        printf "%s %s: %d registers, %d bytes of static shared memory", spill ? "FAIL" : "    ", name, registers, shared
        print spill ? ", " spill " bytes spilled" : ""
        kernels++; spilled += spill > 0; if (registers + 0 > most) most = registers + 0
    }
    END { bad = spilled > 0 || !kernels
          printf "%s %s: %d kernels, at most %d registers, %d spill\n", bad ? "FAIL" : "ok  ", what, kernels, most, spilled
          exit bad }
' | { if [ -n "$VERBOSE" ]; then c++filt 2> /dev/null || cat; else grep -E "^(ok|FAIL)"; fi; } > /tmp/registers.$$
cat /tmp/registers.$$
! grep -q "^FAIL" /tmp/registers.$$; verdict=$?
rm -f /tmp/registers.$$
exit $verdict

#!/bin/bash
# Fuzzes all targets at once, on all cores of a machine without Rust: bash run.sh [SECONDS]
#
# Prints what each target executed, and every input that it failed on. Writes to $OUT, else to ./out, and to a folder of
# its own for temporary files. PROCESSES and SEED may be set. Ends with 1 if there is such an input.

cd "$(dirname "${BASH_SOURCE[0]}")" || exit
here=$PWD
export LC_ALL=C
seconds=${1:-300}
out=${OUT:-$here/out}
processes=${PROCESSES:-$(nproc)}
seed=${SEED:-$(($(date +%s) % 1000000 + 1))}
# What takes long for each input has one process. The rest is for what takes microseconds.
slow="config handshake index json placed_declarations safetensors schedule"

mkdir -p "$out" || exit
work=$(mktemp -d) || exit
trap 'rm -rf "$work"' EXIT
# Fuzzers keep what they find in many small files.
if [ -w /dev/shm ] && [ "$(df --output=avail /dev/shm | tail -1)" -gt 4000000 ]; then
    rm -rf "$work"
    work=$(mktemp -d /dev/shm/ckpt-fuzz.XXXXXX) || exit
fi
mkdir "$work/bin"
for program in bin/*; do
    case $program in
        *.xz) xz -dc "$program" >"$work/$(dirname "$program")/$(basename "$program" .xz)" ;;
        *) cp "$program" "$work/bin/" ;;
    esac
done
chmod +x "$work"/bin/*
cp -r corpus "$work/corpus"
cd "$work" || exit

all=$(ls bin)
fast=$(for target in $all; do [[ " $slow " == *" $target "* ]] || echo "$target"; done)
plan=($all)
[ -n "$fast" ] || fast=$all
while [ "${#plan[@]}" -lt "$processes" ]; do plan+=($fast); done
[ "${#plan[@]}" -gt "$processes" ] && [ "$processes" -gt "$(wc -w <<<"$all")" ] && plan=("${plan[@]:0:processes}")
echo "== ${#plan[@]} processes on $(nproc) cores, $seconds s each, seed $seed, $(uname -m), $(date -u '+%F %T')"

end=$(($(date +%s) + seconds))
one() { # TARGET NUMBER: fuzzes until the end; a failure ends a process, and another goes on with another seed
    local target=$1 number=$2 turn=0 left
    mkdir -p "found/$target/$number" "failed/$target" "corpus/$target" logs
    while left=$((end - $(date +%s))) && [ "$left" -gt 1 ] && [ "$turn" -lt 8 ]; do
        timeout -k 5 $((left + 30)) nice -n 19 "bin/$target" "found/$target/$number" "corpus/$target" \
            -max_total_time="$left" -seed=$((seed + 100 * number + turn)) -timeout=25 -rss_limit_mb=2048 -max_len=4096 \
            -reload=0 -print_final_stats=1 -verbosity=0 -artifact_prefix="failed/$target/" \
            >"logs/$target.$number.$turn" 2>&1
        echo "exit status $?" >>"logs/$target.$number.$turn"
        turn=$((turn + 1))
    done
}
number=0
for target in "${plan[@]}"; do
    number=$((number + 1))
    one "$target" "$number" &
done
wait

total=0
failures=0
for target in $all; do
    executed=$(cat logs/"$target".* | sed -n 's/^stat::number_of_executed_units: *//p' | awk '{ sum += $1 } END { print sum + 0 }')
    bad=$(grep -L '^exit status 0$' logs/"$target".* | wc -l)
    printf '%-20s %3d processes %14d executions %3d failed\n' "$target" \
        "$(grep -c . <<<"$(ls -d found/"$target"/*)")" "$executed" "$bad"
    total=$((total + executed))
    failures=$((failures + bad))
    for log in $(grep -L '^exit status 0$' logs/"$target".* | head -2); do
        echo "-- $log"
        tail -n 40 "$log"
    done
done
echo "== $total executions, $failures failed, $(date -u '+%F %T')"
find failed -type f | while read -r input; do
    echo "-- $input, $(stat -c %s "$input") bytes: $(head -c 400 "$input" | od -An -v -tx1 | tr -d ' \n')"
done
[ -n "$(find failed -type f)" ] && tar -cJf "$out/failed.tar.xz" failed
[ "$failures" -eq 0 ]

#!/bin/bash
# Measures a ring and a star of nixl where the network is what limits them: each rank in a network namespace of its
# own, every link limited by tc. Needs root, iproute2, and NIXL where `ckpt-engine doctor` finds it.
# `limited-links.sh PROGRAM` prints the seconds of the updates of each setting, and their median. RATE is that of a link, UPDATES how many there
# are, SOURCE what a trainer is told of its model, MORE what all ranks are told, SETTINGS topologies and numbers of rollouts:
# `RATE=1gbit SETTINGS=ring:1 SOURCE="--synthetic qwen2.5-0.5b --change-rate 0.01" MORE=--delta limited-links.sh PROGRAM`.
program=$(readlink -f "${1:-target/release/ckpt-engine}")
rate=${RATE:-800mbit} updates=${UPDATES:-4} more=${MORE:-}
source=${SOURCE:---synthetic qwen2.5-0.5b --layers 1}
folder=$(mktemp -d)
name=ckl$$
names=""
clean() {
    for each in $names; do ip netns pids "$each" | xargs -r kill -9; done 2>/dev/null
    for each in $names $name-b; do ip netns del "$each"; done 2>/dev/null
    rm -rf "$folder"
}
trap clean EXIT
trap 'exit 130' INT TERM
set -e
head -c 32 /dev/urandom | base64 >"$folder/token" && chmod 600 "$folder/token"
ip netns add $name-b
ip -n $name-b link add bridge type bridge && ip -n $name-b link set bridge up
limit() { tc -n "$1" qdisc add dev "$2" root tbf rate "$rate" burst 256kb latency 50ms; }
for rank in 0 1 2 3 4; do
    names="$names $name-$rank"
    ip netns add $name-$rank
    ip -n $name-b link add port$rank type veth peer name eth0 netns $name-$rank
    ip -n $name-b link set port$rank master bridge up
    ip -n $name-$rank link set lo up
    ip -n $name-$rank addr add 10.77.0.1$rank/24 dev eth0
    ip -n $name-$rank link set eth0 up
    limit $name-b port$rank && limit $name-$rank eth0
done
measure() {
    local topology=$1 rollouts=$2 common
    common="--backend nixl --bucket-mb 8 --engine-kwarg transports=tcp,self --engine-kwarg topology=$topology \
        --rendezvous 10.77.0.10:29600 --token-file $folder/token $more"
    for rank in $(seq "$rollouts"); do
        ip netns exec $name-$rank "$program" rollout $common --world-size $((rollouts + 1)) \
            >"$folder/rollout$rank" 2>&1 &
    done
    ip netns exec $name-0 "$program" trainer $common --rollouts "$rollouts" $source \
        --updates "$updates" --json 2>"$folder/trainer" | python3 -c '
import json, statistics, sys
seconds = [json.loads(line)["seconds"] for line in sys.stdin if line.startswith("{")][1:]
what = " ".join(sys.argv[1:])
if not seconds: sys.exit(f"{what}: failed")
print(f"{what}: {statistics.median(seconds):.2f} s, of {seconds}")' "$topology" "$rollouts" "rollouts" ||
        { grep -h "^error" "$folder"/* && exit 1; }
    wait
}
for setting in ${SETTINGS:-ring:1 ring:4 star:4}; do measure "${setting%:*}" "${setting#*:}"; done

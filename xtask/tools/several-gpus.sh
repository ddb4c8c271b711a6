#!/bin/bash
# Measures transports between the GPUs of one host, a process on each: `several.sh`. The programs are beside
# this script; NIXL is, if its wheel was unpacked to the folder nixl beside it, and NCCL if libnccl.so.2 is
# (else the system's). Each setting is verified once, every tensor, before it is measured: the median of 10
# updates after two. NVLink multicast stays off. On one GPU, GPUS=4 makes a dry run of it with several ranks
# on that GPU. Prints JSON lines, each after a line that says what it is, and ends with 1 if anything failed.
cd "$(dirname "$0")" || exit 1
chmod +x ckpt-engine bare test-* 2>/dev/null
[ -d nixl ] && export CKPT_ENGINE_NIXL_DIR=$PWD/nixl
[ -f libnccl.so.2 ] && export CKPT_ENGINE_NCCL_LIB=$PWD/libnccl.so.2
export NCCL_NVLS_ENABLE=0
here=$(ls /dev | grep -c '^nvidia[0-9]')
gpus=${GPUS:-$here}
models=${MODELS:-qwen2.5-7b qwen3-30b-a3b}
repeats=${REPEATS:-10}
[ "$here" -lt "$gpus" ] && export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_BUFFSIZE=16777216
failed=0
check() {
    echo "== $*"
    timeout -k 5 "${LIMIT:-300}" "$@" || { echo "FAILED: $*"; failed=1; }
}
# What a line of `bench transfer` or of `sync` is about.
measure() {
    local trainers=$1 rollouts=$2 model=$3
    shift 3
    check ./ckpt-engine sync --device cuda --synthetic "$model" ${LAYERS:+--layers $LAYERS} \
        --trainers "$trainers" --rollouts "$rollouts" --updates 1 --verify --json "$@"
    check ./ckpt-engine bench transfer --device cuda --synthetic "$model" ${LAYERS:+--layers $LAYERS} \
        --trainers "$trainers" --rollouts "$rollouts" --repeats "$repeats" --json "$@"
}
echo "$here GPUs here, $gpus ranks at most"
nvidia-smi topo -m 2>/dev/null
counts=""
for rollouts in 1 3 7; do
    [ $((rollouts + 1)) -le "$gpus" ] && counts="$counts $rollouts"
done
for rollouts in $counts; do
    check ./bare $((rollouts + 1)) 256 9
    check ./bare $((rollouts + 1)) 1024 9
done
for model in $models; do
    for quantise in "" --trainer-quantize-fp8; do
        for rollouts in $counts; do
            measure 1 "$rollouts" "$model" --backend nccl $quantise
        done
        # The trainers of half of the GPUs, and rollouts on the others: one sender with relays, all senders.
        half=$((gpus / 2))
        if [ "$half" -ge 2 ]; then
            measure "$half" "$half" "$model" --backend nccl $quantise
            measure "$half" "$half" "$model" --backend nccl --engine-kwarg senders="$half" $quantise
        fi
        if [ -d nixl ]; then
            for topology in ring star; do
                for rollouts in $counts; do
                    measure 1 "$rollouts" "$model" --backend nixl --bucket-mb 1024 \
                        --engine-kwarg topology=$topology $quantise
                done
            done
        fi
        # A rollout on another GPU reads the trainer's buckets by peer access.
        measure 1 1 "$model" --backend ipc $quantise
    done
done
# Ranks that are killed within an update, on the real fabric; a group may have more ranks than there are GPUs.
CKPT_ENGINE_TEST_DEVICES=$here NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_BUFFSIZE=16777216 \
    check ./test-nccl-processes --ignored --test-threads 1
exit $failed

#!/bin/bash
# Runs what needs a GPU: `run.sh` the tests, `run.sh benches` the benches, `run.sh suite NAME` the cases of one suite. The programs are
# beside this script; NIXL is, if its wheel was unpacked to the folder nixl beside it, and NCCL (2.30 or
# later, because all ranks share a GPU), if libnccl.so.2 is. Prints JSON lines of what was measured, and ends
# with 1 if anything failed.
cd "$(dirname "$0")" || exit 1
chmod +x ckpt-engine throughput bare test-* 2>/dev/null
[ -d nixl ] && export CKPT_ENGINE_NIXL_DIR=$PWD/nixl
[ -f libnccl.so.2 ] && export CKPT_ENGINE_NCCL_LIB=$PWD/libnccl.so.2
# What several ranks on one GPU take; processes take turns on it, and move in a turn what the buffers hold.
export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_BUFFSIZE=16777216
failed=0
check() {
    echo "== $*"
    "$@" || { echo "FAILED: $*"; failed=1; }
}

# A case of a suite. What it printed is shown if it failed, or if its process ended in another way than by itself,
# which counts as a failure of the case also when the case had passed before.
one_case() {
    local output status how
    output=$("./$1" --exact "$2" --ignored --quiet 2>&1)
    status=$?
    [ $status = 0 ] && return
    how="exit status $status"
    [ $status -gt 128 ] && how="killed by signal $((status - 128))"
    printf '%s\nFAILED: %s %s: %s\n' "$output" "$1" "$2" "$how"
}
export -f one_case

# The cases of a suite, each in a process of its own, whose ranks share a context: more streams than the 8 queues
# that a context has by default. Streams that share one wait for one another, and broadcasts for other ranks.
suite() {
    local cases output
    cases=$("./$1" --list --ignored 2>/dev/null | sed -n 's/: test$//p')
    echo "== $1: $(grep -c . <<<"$cases") cases, each in a process of its own"
    output=$(CUDA_DEVICE_MAX_CONNECTIONS=32 xargs -P 4 -I{} bash -c 'one_case "$0" "$1"' "$1" {} <<<"$cases")
    printf '%s' "$output${output:+$'\n'}"
    # Without any there is nothing that could have passed.
    if [ -n "$output" ] || [ -z "$cases" ]; then
        echo "FAILED: $1: $(grep -c '^FAILED: ' <<<"$output") cases"
        failed=1
    fi
}

[ "${1:-}" = suite ] && suite "$2"
if [ "${1:-tests}" = tests ]; then
    ./ckpt-engine doctor
    check ./test-cuda-gpu --ignored --test-threads 1
    check ./test-ipc-cuda --ignored --test-threads 4
    check ./test-ipc-cuda_processes --ignored
    check ./test-ipc-placed_cuda --ignored --test-threads 1
    CKPT_ENGINE_TEST_DEVICE=cuda:0 check ./test-ipc-placed --test-threads 1
    # A rank on a GPU has to be a process of its own: within one, UCX ends it when a peer does not answer. The
    # cases in which one does not are test-nixl-gone, which has a process for each rank.
    [ -d nixl ] && check ./test-nixl-cuda --ignored --test-threads 2 --skip whose_engine_is_gone
    [ -d nixl ] && check ./test-nixl-gone --ignored --test-threads 2
    if [ -f libnccl.so.2 ]; then
        suite test-nccl-cuda
        # One after the other: a test compares how much memory of the GPU is free.
        check ./test-nccl-processes --ignored --test-threads 1
        check ./ckpt-engine sync --backend nccl --device cuda --synthetic tiny-moe --trainers 2 \
            --engine-kwarg senders=2 --rollouts 2 --updates 3 --verify --json --trainer-quantize-fp8
    fi
    # Processes that are killed, strangers, newcomers: everything that holds on the host holds here.
    CKPT_ENGINE_TEST_PROGRAM=$PWD/ckpt-engine CKPT_ENGINE_DEVICE=cuda \
        check ./test-cli-sync --test-threads 2 --skip there_is_no_memory
    for quantise in "" --trainer-quantize-fp8; do
        check ./ckpt-engine sync --device cuda --synthetic tiny-moe --rollouts 2 --updates 3 \
            --verify --json $quantise
    done
    [ -d nixl ] && check ./ckpt-engine sync --backend nixl --device cuda --synthetic qwen2.5-0.5b \
        --rollouts 3 --updates 3 --verify --json --trainer-quantize-fp8
    check ./ckpt-engine sync --device cuda --synthetic qwen2.5-0.5b --rollouts 2 --updates 2 \
        --verify --json --trainer-quantize-fp8
fi
if [ "${1:-benches}" = benches ]; then
    check ./throughput
    check ./ckpt-engine bench quant --device cuda --json
    check ./ckpt-engine bench quant --device cuda --shape 768x2048 --count 384 --json
    if [ -f libnccl.so.2 ]; then
        for ranks in 2 3; do
            check ./bare $ranks 256
            check ./bare $ranks 1024
        done
    fi
    for model in qwen2.5-7b qwen3-30b-a3b; do
        for quantise in "" --trainer-quantize-fp8; do
            check ./ckpt-engine bench transfer --device cuda --synthetic $model --repeats 15 --json \
                $quantise
            [ -d nixl ] && check ./ckpt-engine bench transfer --backend nixl --device cuda \
                --synthetic $model --repeats 15 --bucket-mb 2048 --json $quantise
            [ -f libnccl.so.2 ] && check ./ckpt-engine bench transfer --backend nccl --device cuda \
                --synthetic $model --repeats 11 --bucket-mb 2048 --json $quantise
        done
    done
fi
exit $failed

#!/bin/bash
# Runs what needs a GPU: `run.sh` all of it, `run.sh tests` or `run.sh benches` a part. The programs are
# beside this script; NIXL is, if its wheel was unpacked to the folder nixl beside it. Prints JSON lines of
# what was measured, and ends with 1 if anything failed.
cd "$(dirname "$0")" || exit 1
chmod +x ckpt-engine throughput device-cuda-gpu backend-ipc-cuda backend-nixl-cuda cli-sync 2>/dev/null
[ -d nixl ] && export CKPT_ENGINE_NIXL_DIR=$PWD/nixl
failed=0
check() {
    echo "== $*"
    "$@" || { echo "FAILED: $*"; failed=1; }
}

if [ "${1:-tests}" = tests ]; then
    ./ckpt-engine doctor
    check ./device-cuda-gpu --ignored --test-threads 1
    check ./backend-ipc-cuda --ignored --test-threads 4
    [ -d nixl ] && check ./backend-nixl-cuda --ignored --test-threads 2
    # Processes that are killed, strangers, newcomers: everything that holds on the host holds here.
    CKPT_ENGINE_TEST_PROGRAM=$PWD/ckpt-engine CKPT_ENGINE_DEVICE=cuda \
        check ./cli-sync --test-threads 2 --skip shared_memory_has_no_room
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
    for model in qwen2.5-7b qwen3-30b-a3b; do
        for quantise in "" --trainer-quantize-fp8; do
            check ./ckpt-engine bench transfer --device cuda --synthetic $model --repeats 15 --json \
                $quantise
            [ -d nixl ] && check ./ckpt-engine bench transfer --backend nixl --device cuda \
                --synthetic $model --repeats 15 --bucket-mb 2048 --json $quantise
        done
    done
fi
exit $failed

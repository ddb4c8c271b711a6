"""Compares `ckpt-engine quantize` with a script of PyTorch that quantises tensor by tensor, with llm-compressor,
and with the disk.

    python quantize_bench.py PROGRAM FOLDER [--layers 28] [--rounds 3] [--llm-compressor PYTHON]

Needs torch and safetensors; PYTHON is that of an environment with llm-compressor, which wants other versions of
them. FOLDER gets a random BF16 checkpoint with the shapes of Qwen2.5-1.5B (3.1 GB with 28 layers) and the
outputs. The program and the script write the same tensors, which is checked; llm-compressor (FP8_BLOCK) names
its scales otherwise and stores them in BF16. All take turns, after all input was read once, and the outputs go in
between. `disk` writes as many bytes as the program does, to as many files, and waits until they are on the disk.
With --cold the pages of the input are dropped before every run (that takes root), and `disk` reads it first.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

HIDDEN, INNER, VOCABULARY, KV = 1536, 8960, 151936, 256
MATRICES = {
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
}


def make(folder, layers):
    import torch
    from safetensors.torch import save_file

    os.makedirs(folder)
    torch.manual_seed(0)
    shards = [{} for _ in range(3)]
    for layer in range(layers):
        shard = shards[layer * 3 // layers]
        for name, shape in MATRICES.items():
            shard[f"model.layers.{layer}.{name}.weight"] = (torch.randn(*shape) * 0.02).bfloat16()
        shard[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(HIDDEN).bfloat16()
    shards[0]["model.embed_tokens.weight"] = (torch.randn(VOCABULARY, HIDDEN) * 0.02).bfloat16()
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-00003.safetensors"
        save_file(shard, f"{folder}/{name}", metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
    with open(f"{folder}/model.safetensors.index.json", "w") as file:
        json.dump({"metadata": {}, "weight_map": places}, file)
    with open(f"{folder}/config.json", "w") as file:
        json.dump({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, file)


def quantize(weight):
    """Blocks of 128x128: s = max(amax, 1e-10) / 448, and codes of x / s by its reciprocal."""
    import torch

    rows, cols = weight.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-cols // 128) * 128)
    padded[:rows, :cols] = weight.float()
    blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-10) / 448.0
    codes = (blocks * (1.0 / scale)[:, None, :, None]).clamp(-448, 448)
    return codes.view(padded.shape)[:rows, :cols].to(torch.float8_e4m3fn).contiguous(), scale


def by_script(source, target):
    from safetensors import safe_open
    from safetensors.torch import save_file

    os.makedirs(target)
    for name in sorted(os.listdir(source)):
        if not name.endswith(".safetensors"):
            shutil.copy(f"{source}/{name}", target)
            continue
        tensors = {}
        with safe_open(f"{source}/{name}", "pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                if key.endswith("_proj.weight"):
                    tensor, tensors[f"{key}_scale_inv"] = quantize(tensor)
                tensors[key] = tensor
        save_file(tensors, f"{target}/{name}", metadata={"format": "pt"})


def by_llm_compressor(source, target):
    from llmcompressor import model_free_ptq

    model_free_ptq(
        model_stub=source,
        save_directory=target,
        scheme="FP8_BLOCK",
        ignore=["re:.*embed_tokens.*"],
        max_workers=os.cpu_count(),
        device="cpu",
    )


def by_disk(source, target, count, cold):
    """Reads all input if it is not in memory, and writes as many bytes as a conversion does."""
    os.makedirs(target)
    buffer = bytearray(os.urandom(1 << 23))
    names = [name for name in sorted(os.listdir(source)) if name.endswith(".safetensors")]
    for name in names if cold else ():
        with open(f"{source}/{name}", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    for name in names:
        with open(f"{target}/{name}", "wb", buffering=0) as file:
            left = count // len(names)
            while left > 0:
                left -= file.write(memoryview(buffer)[: min(left, len(buffer))])
            os.fsync(file.fileno())


def size(folder):
    return sum(os.path.getsize(f"{folder}/{name}") for name in os.listdir(folder))


def tensors_of(folder):
    from safetensors import safe_open

    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(f"{folder}/{name}", "pt") as file:
                for key in sorted(file.keys()):
                    yield key, file.get_tensor(key)


def same(a, b):
    import torch

    for (name, x), (other, y) in zip(tensors_of(a), tensors_of(b), strict=True):
        equal = name == other and x.dtype == y.dtype and x.shape == y.shape
        if not equal or not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            return f"different: {name}"
    return "the same tensors, bit for bit"


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("program")
    arguments.add_argument("folder")
    arguments.add_argument("--layers", type=int, default=28)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--llm-compressor", metavar="PYTHON")
    arguments.add_argument("--cold", action="store_true")
    arguments.add_argument("--script", nargs=2, help=argparse.SUPPRESS)
    arguments.add_argument("--compress", nargs=2, help=argparse.SUPPRESS)
    arguments.add_argument("--disk", nargs=3, help=argparse.SUPPRESS)
    arguments.add_argument("--make", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.script:
        return by_script(*options.script)
    if options.compress:
        return by_llm_compressor(*options.compress)
    if options.disk:
        source, target, count = options.disk
        return by_disk(source, target, int(count), options.cold)
    if options.make:
        return make(options.make, options.layers)
    source = f"{options.folder}/source"
    # Not in this process: what it has in memory would be counted for those that it starts.
    again = [sys.executable, __file__, options.program, options.folder]
    subprocess.run([*again, "--layers", str(options.layers), "--make", source], check=True)
    for name in os.listdir(source):
        with open(f"{source}/{name}", "rb") as file:
            while file.read(1 << 24):
                pass
    arguments = [__file__, options.program, options.folder]
    program = [options.program, "quantize"]
    commands = {"ckpt-engine": program, "script": [sys.executable, *arguments, "--script"]}
    if options.llm_compressor:
        commands["llm-compressor"] = [options.llm_compressor, *arguments, "--compress"]
    # After the program, whose output says how much there is to write.
    commands["disk"] = [sys.executable, *arguments, *["--cold"] * options.cold, "--disk"]
    outputs = {who: f"{options.folder}/{who}" for who in commands}
    measured = {who: [] for who in commands}
    for _ in range(options.rounds):
        count = 0
        for who, command in commands.items():
            shutil.rmtree(outputs[who], ignore_errors=True)
            os.sync()
            if options.cold:
                with open("/proc/sys/vm/drop_caches", "w") as file:
                    file.write("1")
            command = [*command, source, outputs[who], *[str(count)] * (who == "disk")]
            start = time.monotonic()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            errors = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - start
            if status != 0:
                sys.exit(f"{who} failed: {errors.decode(errors='replace')}")
            if who == "ckpt-engine":
                count = size(outputs[who])
            measured[who].append((seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6))
    read, written = size(source), size(outputs["ckpt-engine"])
    print(f"{read / 1e9:.2f} GB to read, {written / 1e9:.2f} GB to write, {os.cpu_count()} cores")
    for who, runs in measured.items():
        wall, cpu, memory = (statistics.median(column) for column in zip(*runs))
        every = " ".join(f"{run[0]:.2f}" for run in runs)
        pairs = zip(runs, measured["ckpt-engine"])
        ratio = statistics.median(run[0] / own[0] for run, own in pairs)
        print(f"{who}: {wall:.2f} s ({every}), {ratio:.2f} of ckpt-engine's, CPU {cpu:.2f} s, {memory:.2f} GB resident")
    print(same(outputs["ckpt-engine"], outputs["script"]))


main()

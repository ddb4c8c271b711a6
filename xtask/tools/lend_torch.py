"""How long an update of a model takes whose tensors a rollout in Python lends, beside one that is received into them.

    PYTHONPATH=PACKAGE python3 xtask/tools/lend_torch.py [--model NAME] [--layers N] [--fp8] [--device cuda:0|cpu] [--updates 12]

A trainer's process and a rollout's process, both with tensors of torch on one device. Prints the medians of `send_weights` without the
first two updates, in milliseconds, and compares a sum of the bytes of every tensor: those of both ways, and of weights that are not
quantised those of the trainer.
"""

import argparse
import multiprocessing
import statistics
import time

import torch

import ckpt_engine

from python_overhead import MODELS, shapes


def sizes(options):
    """Names and shapes, and which of them are quantised."""
    for name, shape in shapes(options.model, options.layers):
        yield name, shape, "_proj.weight" in name


def empty(shape, dtype, device):
    tensor = torch.zeros(shape, dtype=dtype, device=device)
    return tensor.share_memory_() if device == "cpu" else tensor


def rollout(options, address, token, config, updates, pipe):
    own, lent = {}, {}
    for name, shape, quantized in sizes(options):
        if options.fp8 and quantized:
            codes = empty(shape, torch.float8_e4m3fn, options.device)
            scales = empty((-(-shape[0] // 128), -(-shape[1] // 128)), torch.float32, options.device)
            own[name], own[f"{name}_scale_inv"] = codes, scales
            lent[name] = ckpt_engine.Fp8(codes, scales)
        else:
            own[name] = lent[name] = empty(shape, torch.bfloat16, options.device)
    placed = "engine_kwargs" in config
    with ckpt_engine.ControlPlane.join(address, token) as control:
        with ckpt_engine.form_group(control, config, lend=lent if placed else None) as engine:
            destination = None if placed else ckpt_engine.Destination(own)
            for version in range(1, updates + 1):
                if placed:
                    engine.update(version)
                else:
                    engine.receive_into(destination, version)
            pipe.send({name: summed(tensor) for name, tensor in own.items()})


def summed(tensor):
    """Of all bytes."""
    return int(tensor.flatten().view(torch.uint8).sum(dtype=torch.int64))


def measure(options, weights, placed):
    config = {"backend": "ipc", "device": options.device, "timeout_seconds": 60}
    if placed:
        config["engine_kwargs"] = {"ipc": {"placed": True}}
    theirs = dict(config)
    mine = {**config, "trainer_quantize_fp8": True} if options.fp8 and not placed else config
    token = ckpt_engine.generate_token()
    context = multiprocessing.get_context("spawn")
    with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as control:
        ours, end = context.Pipe()
        arguments = (options, control.address, token, theirs, options.updates, end)
        process = context.Process(target=rollout, args=arguments, daemon=True)
        process.start()
        times = []
        with ckpt_engine.form_group(control, mine, world_size=2, timeout=120) as engine:
            for version in range(1, options.updates + 1):
                begun = time.perf_counter()
                report = engine.send_weights(weights, version)
                times.append((time.perf_counter() - begun) * 1e3)
            assert ours.poll(60)
            found = ours.recv()
        process.join(20)
    kept = times[2:]
    print(
        f"{options.model} {'fp8' if options.fp8 else 'bf16'} {options.device} {'placed' if placed else 'into'}: "
        f"median {statistics.median(kept):.2f} ms of {len(kept)} ({min(kept):.2f} to {max(kept):.2f}), first {times[0]:.1f}; "
        f"stages of the last: {report.stages}; slower: {report.slower}",
        flush=True,
    )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-7b", choices=MODELS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--updates", type=int, default=12)
    options = parser.parse_args()
    torch.manual_seed(1)
    weights = {}
    for name, shape, _ in sizes(options):
        weights[name] = torch.randn(shape, device=options.device, dtype=torch.bfloat16) * 0.05
    received = measure(options, weights, placed=False)
    written = measure(options, weights, placed=True)
    assert received == written, [name for name in received if received[name] != written[name]]
    same = {name: summed(tensor) for name, tensor in weights.items() if f"{name}_scale_inv" not in written}
    assert all(written[name] == same[name] for name in same)
    print(f"{len(written)} tensors are equal by the sums of their bytes", flush=True)


if __name__ == "__main__":
    main()

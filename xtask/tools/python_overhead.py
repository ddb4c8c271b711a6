"""What an update through Python takes beside one of the program: the same weights, buckets and processes.

    python_overhead.py PROGRAM [--synthetic NAME] [--layers N] [--device cuda|cpu] [--fp8] [--bucket-mb M] [--threads N]
                               [--repeats N] [--consume into,copy,drop,each]

PROGRAM is ckpt-engine, whose `bench transfer` is the other side. A trainer's process sends a model's state dict, a rollout's takes
it: `into` has every tensor copied to one of its own by the engine, as the program's rollout does on a device; `copy` copies every tensor to one of its own, a bucket at a time, by torch; `each` copies tensor
by tensor; `drop` takes them and lets go, as the program's rollout does on the host. Prints a line for each; times are those
that the trainer waits, medians of the updates from the third on.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import time

import ckpt_engine

# vocabulary, hidden size, layers, heads, heads of keys and values, size of a head, intermediate size, experts.
MODELS = {
    "qwen2.5-0.5b": (151_936, 896, 24, 14, 2, 64, 4864, 0),
    "qwen2.5-7b": (152_064, 3584, 28, 28, 4, 128, 18_944, 0),
    "qwen3-30b-a3b": (151_936, 2048, 48, 32, 4, 128, 768, 128),
}


def shapes(name, layers):
    """Names and shapes of a model, as the program's synthetic ones have them."""
    vocabulary, hidden, all_layers, heads, pairs, head, width, experts = MODELS[name]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for number in range(layers or all_layers):
        layer = f"model.layers.{number}"
        for part, rows in (("q", heads * head), ("k", pairs * head), ("v", pairs * head)):
            yield f"{layer}.self_attn.{part}_proj.weight", (rows, hidden)
            if not experts:
                yield f"{layer}.self_attn.{part}_proj.bias", (rows,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, heads * head)
        if experts:
            yield f"{layer}.self_attn.q_norm.weight", (head,)
            yield f"{layer}.self_attn.k_norm.weight", (head,)
            yield f"{layer}.mlp.gate.weight", (experts, hidden)
        for mlp in [f"{layer}.mlp.experts.{n}" for n in range(experts)] or [f"{layer}.mlp"]:
            yield f"{mlp}.gate_proj.weight", (width, hidden)
            yield f"{mlp}.up_proj.weight", (width, hidden)
            yield f"{mlp}.down_proj.weight", (hidden, width)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if name != "qwen2.5-0.5b":
        yield "lm_head.weight", (vocabulary, hidden)


def consume(engine, how, own):
    """One update of a rollout; `own` are its tensors, made in the first one, and `own[None]` all of them as a destination."""
    import torch

    if how == "into" and own:
        if None not in own:
            own[None] = ckpt_engine.Destination((name, tensor) for name, tensor in own.items())
        engine.receive_into(own[None])
        return
    with engine.receive_weights(framework="torch") as weights:
        # The first update of `into` tells what the tensors are.
        if how in ("each", "into"):
            for name, tensor in weights:
                if name not in own:
                    own[name] = torch.empty_like(tensor)
                own[name].copy_(tensor)
                del tensor
            return
        for bucket in weights.buckets():
            if how == "copy":
                kinds = {}
                for name, tensor in bucket:
                    if name not in own:
                        own[name] = torch.empty_like(tensor)
                    # Of FP8 torch copies one tensor after the other, of bytes all by one launch.
                    kind = torch.uint8 if tensor.element_size() == 1 else tensor.dtype
                    to, of = kinds.setdefault(kind, ([], []))
                    to.append(own[name].view(kind))
                    of.append(tensor.view(kind))
                for to, of in kinds.values():
                    torch._foreach_copy_(to, of)
                if tensor.is_cuda:
                    # The program's rollout waits for its copies before it gives a bucket back.
                    torch.cuda.current_stream().synchronize()
                del to, of, kinds, tensor
            del bucket


def rollout(address, token, config, plan):
    import torch

    torch.set_num_threads(1)
    control = ckpt_engine.ControlPlane.join(address, token)
    engine = ckpt_engine.form_group(control, config)
    own = {}
    for how, updates in plan:
        for _ in range(updates):
            consume(engine, how, own)
    engine.finalize()
    control.close()


def device_of(options):
    """The one of both sides: the program's ranks would take a GPU each."""
    return options.device if options.device == "cpu" else "cuda:0"


def program(options, config):
    """The program's own: seconds, by whether there are digests."""
    command = [options.program, "bench", "transfer", "--backend", "ipc", "--rollouts", "1", "--json"]
    command += ["--synthetic", options.synthetic, "--device", device_of(options), "--repeats", str(options.repeats)]
    for key in ("layers", "bucket_mb", "threads"):
        if getattr(options, key):
            command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    if options.fp8:
        command.append("--trainer-quantize-fp8")
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-500:]}")
    return {line["digests"]: line for line in lines if line["what"] == "model"}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--synthetic", default="qwen2.5-7b", choices=MODELS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--bucket-mb", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--consume", default="into,copy,drop,each")
    parser.add_argument("--timeout", type=int, default=120)
    options = parser.parse_args()
    import torch

    config = {"backend": "ipc", "device": options.device, "trainer_quantize_fp8": options.fp8, "timeout_seconds": 60}
    if options.bucket_mb:
        config["update_weights_bucket_megabytes"] = options.bucket_mb
    if options.threads:
        config["threads"] = options.threads
    title = f"{options.synthetic}{f' {options.layers} layers' if options.layers else ''}{' FP8' if options.fp8 else ''}"
    lines = program(options, config)
    sizes = dict(shapes(options.synthetic, options.layers))
    for digests, line in sorted(lines.items(), reverse=True):
        print(
            f"{title}: program, digests {'on' if digests else 'off'}: {line['seconds'] * 1e3:.2f} ms, {line['tensors']} tensors, "
            f"{line['source_bytes'] / 1e9:.1f} GB, {line['stages']}", flush=True,
        )
    device = device_of(options)
    weights = {name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for name, shape in sizes.items()}
    sent = sum(tensor.nbytes for tensor in weights.values())
    assert sent == lines[True]["source_bytes"], f"other weights: {sent} bytes"
    context = multiprocessing.get_context("spawn")
    plan = [(how, options.repeats + 2) for how in options.consume.split(",")]
    for digests in (True, False):
        token = ckpt_engine.generate_token()
        with ckpt_engine.ControlPlane.lead("127.0.0.1:0", token) as control:
            arguments = (control.address, token, {**config, "digests": digests}, plan)
            process = context.Process(target=rollout, args=arguments)
            process.start()
            engine = ckpt_engine.form_group(control, {**config, "digests": digests}, world_size=2, timeout=120)
            version = 0
            for how, updates in plan:
                times, reports = [], []
                for _ in range(updates):
                    version += 1
                    began = time.perf_counter()
                    reports.append(engine.send_weights(weights, version))
                    times.append(time.perf_counter() - began)
                seconds, theirs = statistics.median(times[2:]), lines[digests]["seconds"]
                more = seconds - theirs
                verdict = "OK" if more <= max(0.03 * theirs, 0.001) else "slower"
                print(
                    f"{title}: Python, {how}, digests {'on' if digests else 'off'}: {seconds * 1e3:.2f} ms "
                    f"({min(times[2:]) * 1e3:.2f} to {max(times[2:]) * 1e3:.2f}), "
                    f"{more * 1e3:+.2f} ms, {more / theirs:+.1%} {verdict}; {reports[-1].stages}", flush=True,
                )
            process.join(30)
            process.kill()
            engine.finalize()


if __name__ == "__main__":
    main()

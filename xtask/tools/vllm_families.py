"""Loads checkpoints that this project quantised in a real vLLM, one small random model of each family.

    vllm_families.py PROGRAM WORK [--only NAME,NAME] [--jobs N] [--timeout S] [--total S] [--keep]

PROGRAM is ckpt-engine, WORK an empty folder. Needs a GPU with FP8 (compute capability 8.9 or higher) and
`pip install vllm`; nothing is downloaded. Prints a line for each family, then a table in Markdown; the exit code is 1
if a family failed. WORK/logs has what vLLM said, WORK/results all numbers. With --keep the weights are not removed, and the
table has what ran before in WORK too: run again what failed with --only, or print the table alone with `--only ""`.

For each family: transformers makes a model with random weights, the program quantises it (`quantize --receiver`), and
vLLM loads four checkpoints, generates with each and says the probability of every token of the vocabulary after a few prompts:

- the original in BF16,
- what the FP8 weights mean, in BF16 (`dequantize`): differs by the rounding of the weights,
- the FP8 checkpoint: differs by the rounding of weights and activations, which is of the same size,
- the FP8 checkpoint with some scales doubled, which has to be seen: the control.

A family is OK if FP8 differs from the original by no more than three times what rounding the weights costs, and the control
by more. Tokens are not compared: with random weights the largest two probabilities are close.
"""

import argparse
import concurrent.futures
import gc
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback

VOCAB, PROMPTS, TOKENS, FACTOR = 1024, 24, 16, 3.0
RECEIVERS = ("vllm", "common")

BASE = dict(
    vocab_size=VOCAB, hidden_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=128,
    intermediate_size=1024, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)
EXPERTS = dict(BASE, moe_intermediate_size=256, num_experts_per_tok=2)
LATENT = dict(
    EXPERTS, num_key_value_heads=4, n_routed_experts=8, n_shared_experts=1, n_group=2, topk_group=1,
    first_k_dense_replace=1, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
)
LATENT.pop("head_dim")  # That of the rotated part, which these configurations know themselves.
LINEAR = dict(
    EXPERTS, num_hidden_layers=4, num_experts=8, shared_expert_intermediate_size=256, linear_num_value_heads=8,
    linear_num_key_heads=4, linear_key_head_dim=128, linear_value_head_dim=128,
)
LINEAR_CONTROL = r"(linear_attn\.out_proj|self_attn\.v_proj|self_attn\.o_proj|shared_expert\.down_proj)"
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 24, 24]}
SEES = dict(vision_start_token_id=VOCAB - 1, vision_end_token_id=VOCAB - 2, image_token_id=VOCAB - 3, video_token_id=VOCAB - 4)
SPECIAL = ["<|video_pad|>", "<|image_pad|>", "<|vision_end|>", "<|vision_start|>"]

# name: what it is, kind of configuration, its values, whose scales the control doubles, options of the engine.
# Scales in front of a norm would be no control: the norm takes them out again.
FAMILIES = {
    "qwen3": ("dense", "qwen3", BASE, r"layers\.1\.self_attn\.v_proj", {}),
    "qwen3_moe": (
        "experts", "qwen3_moe", dict(EXPERTS, num_experts=8, norm_topk_prob=True), r"layers\.1\.mlp\.experts\.\d+\.up_proj", {},
    ),
    "deepseek_v3": (
        "latent attention, experts", "deepseek_v3",
        dict(LATENT, q_lora_rank=256, topk_method="noaux_tc", scoring_func="sigmoid"),  # The last two are for vLLM alone.
        r"layers\.1\.self_attn\.kv_b_proj",
        {"attention_backend": "TRITON_MLA"},
    ),
    "qwen3_next": (
        "hybrid: linear attention, experts", "qwen3_next", LINEAR, LINEAR_CONTROL,
        {"gdn_prefill_backend": "triton"},
    ),
    "qwen2_5_vl": (
        "vision, with an image", "qwen2_5_vl",
        dict(
            SEES, tie_word_embeddings=False,
            text_config=dict(BASE, rope_parameters=MROPE),
            vision_config=dict(
                depth=2, hidden_size=256, num_heads=4, intermediate_size=512, out_hidden_size=512, fullatt_block_indexes=[1],
            ),
        ),
        r"layers\.1\.self_attn\.v_proj",
        {"mm_encoder_attn_backend": "TORCH_SDPA", "limit_mm_per_prompt": {"image": 1, "video": 0}},
    ),
    "llama_narrow": (
        "dense, narrow keys and values", "llama", dict(BASE, num_attention_heads=8, num_key_value_heads=1, head_dim=64),
        r"layers\.1\.mlp\.up_proj", {},
    ),
    "glm4_moe": (
        "shared experts, a dense layer of 704", "glm4_moe",
        dict(
            EXPERTS, intermediate_size=704, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
            topk_group=1, norm_topk_prob=True, use_qk_norm=True, partial_rotary_factor=0.5,
        ),
        r"layers\.1\.mlp\.shared_experts\.down_proj", {},
    ),
    "granitemoehybrid": (
        "hybrid: Mamba-2, experts in stacks", "granitemoehybrid",
        dict(
            BASE, layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=1024,
            mamba_n_heads=16, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=128, mamba_expand=2, mamba_d_conv=4,
            mamba_chunk_size=256, position_embedding_type="rope", attention_multiplier=0.0884,
        ),
        r"layers\.1\.self_attn\.o_proj", {},
    ),
    "falcon_h1": (
        "hybrid: Mamba-2 beside attention", "falcon_h1",
        dict(
            BASE, mamba_d_ssm=1024, mamba_n_heads=16, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=128, mamba_expand=2,
            mamba_d_conv=4, mamba_chunk_size=256,
        ),
        r"layers\.1\.(mamba\.out_proj|self_attn\.v_proj)", {},
    ),
    "deepseek_v2": (
        "latent attention without q_lora", "deepseek_v2",
        dict(LATENT, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1), r"layers\.1\.self_attn\.kv_b_proj",
        {"attention_backend": "TRITON_MLA"},
    ),
    "qwen3_vl": (
        "vision, without an image", "qwen3_vl",
        dict(
            SEES, tie_word_embeddings=False,
            text_config=dict(BASE, rope_parameters=dict(MROPE, mrope_interleaved=True)),
            vision_config=dict(
                depth=2, hidden_size=256, num_heads=4, intermediate_size=512, out_hidden_size=512, num_position_embeddings=256,
                deepstack_visual_indexes=[1],
            ),
        ),
        r"layers\.1\.mlp\.down_proj", {"limit_mm_per_prompt": {"image": 0, "video": 0}},
    ),
    "llama4": (
        "stacks `[experts, in, out]`", "llama4_text",
        dict(
            BASE, intermediate_size=256, intermediate_size_mlp=1024, num_local_experts=4, num_experts_per_tok=1,
            interleave_moe_layer_step=1,
        ),
        r"layers\.1\.feed_forward\.shared_expert\.down_proj", {},
    ),
    "qwen3_5_moe": (
        "hybrid that sees, without an image", "qwen3_5_moe",
        dict(
            SEES, tie_word_embeddings=False,
            text_config=dict(LINEAR, rope_parameters=dict(MROPE, mrope_interleaved=True, partial_rotary_factor=0.25, mrope_section=[6, 5, 5])),
            vision_config=dict(
                depth=2, hidden_size=256, num_heads=4, intermediate_size=512, out_hidden_size=512, num_position_embeddings=256,
            ),
        ),
        LINEAR_CONTROL,
        {"gdn_prefill_backend": "triton", "limit_mm_per_prompt": {"image": 0, "video": 0}},
    ),
}

# Plain kernels, of which nothing is compiled or downloaded at first use. One process is enough for one GPU.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_MOE_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "4",
}


def make(name, folder, seed=7):
    """Writes a model of random weights that all matter: projections keep the size of what they are given."""
    import torch
    import transformers

    _, kind, values, _, _ = FAMILIES[name]
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[kind](**values)
    auto = transformers.AutoModelForImageTextToText if "vision_config" in values else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            last = parameter_name.rsplit(".", 2)[-2:]
            if "embed" in parameter_name and parameter.ndim == 2:
                parameter.normal_(0, 1)
            elif last[-1] == "bias":
                parameter.normal_(0, 0.1)
            elif "norm" in parameter_name and parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "conv1d" in parameter_name:
                parameter.normal_(0, 0.5)
            elif parameter.ndim in (2, 3):
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    if "vision_config" in values:
        processor(name, folder)


def processor(name, folder):
    """A tokenizer of made-up words and what prepares images, which vLLM wants of a model that sees."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(VOCAB - len(SPECIAL))}
    words.update({token: VOCAB - len(SPECIAL) + number for number, token in enumerate(SPECIAL)})
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w3",
        additional_special_tokens=SPECIAL,
    ).save_pretrained(folder)
    patch = 14 if name == "qwen2_5_vl" else 16
    common = dict(
        patch_size=patch, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 56 * 56, "longest_edge": 448 * 448}, min_pixels=56 * 56, max_pixels=448 * 448,
        processor_class="Qwen3VLProcessor" if patch == 16 else "Qwen2_5_VLProcessor",
    )
    video = "Qwen3VLVideoProcessor" if patch == 16 else "Qwen2VLVideoProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(common, image_processor_type="Qwen2VLImageProcessorFast")))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(dict(common, video_processor_type=video)))


def tensors(folder):
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def counts(folder):
    """How many matrices are FP8, and how many there are."""
    import torch

    found = tensors(folder)
    fp8 = sum(tensor.dtype == torch.float8_e4m3fn for tensor in found.values())
    return fp8, sum(tensor.ndim > 1 and not name.endswith("_scale_inv") for name, tensor in found.items())


def doubled(source, folder, pattern):
    """A copy of a checkpoint in which the scales of some weights are doubled: how many."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    changed = 0
    for file in folder.glob("*.safetensors"):
        found = load_file(file)
        for name in found:
            if re.search(pattern + r"\.weight_scale_inv$", name):
                found[name] = found[name] * 2
                changed += 1
        save_file(found, file, metadata={"format": "pt"})
    return changed


def run(program, *args):
    done = subprocess.run([program, *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{args[0]}: {done.stderr.strip()[-300:]}")
    print(done.stdout, done.stderr, flush=True)


def prompts(name):
    """Token ids, a mixture of lengths; with an image where the family takes one."""
    made = []
    for k in range(PROMPTS):
        ids = [(7 * i * i + 131 * k * k + 13 * k + 5) % (VOCAB - 24) + 8 for i in range(6 + 3 * k)]
        made.append({"prompt_token_ids": ids})
    if FAMILIES[name][0].endswith("with an image"):
        import numpy
        from PIL import Image

        for k, prompt in enumerate(made):
            picture = numpy.random.default_rng(k).integers(0, 256, (112, 112, 3), dtype=numpy.uint8)
            between = [SEES["vision_start_token_id"], SEES["image_token_id"], SEES["vision_end_token_id"]]
            prompt["prompt_token_ids"] = prompt["prompt_token_ids"][:4] + between + prompt["prompt_token_ids"][4:]
            prompt["multi_modal_data"] = {"image": Image.fromarray(picture)}
    return made


def engine_options(name, folder):
    _, _, values, _, options = FAMILIES[name]
    return dict(
        model=str(folder), skip_tokenizer_init="vision_config" not in values, dtype="bfloat16", enforce_eager=True,
        max_model_len=512, max_num_seqs=8, max_num_batched_tokens=512, gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=1 << 28, enable_prefix_caching=False, generation_config="vllm", seed=0,
        disable_log_stats=True, max_logprobs=VOCAB, moe_backend="triton", async_scheduling=False,
        enable_flashinfer_autotune=False, **options,
    )


def greedy(engine, name):
    """The tokens that vLLM generates after each prompt, without chance."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in engine.generate(prompts(name), how, use_tqdm=False)]


def ask(name, folder):
    """What vLLM says with a checkpoint: log-probabilities after each prompt, centred, and the tokens that it generates."""
    import numpy
    import torch
    from vllm import LLM, SamplingParams

    began = time.time()
    engine = LLM(**engine_options(name, folder))
    started = time.time() - began
    try:
        asked = prompts(name)
        first = SamplingParams(temperature=0, max_tokens=1, logprobs=VOCAB, detokenize=False, ignore_eos=True)
        rows = []
        for output in engine.generate(asked, first, use_tqdm=False):
            entries = output.outputs[0].logprobs[0]
            row = numpy.array([entries[token].logprob for token in range(VOCAB)])
            rows.append(row - row.mean())
        many = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False, ignore_eos=True)
        tokens = [list(output.outputs[0].token_ids) for output in engine.generate(asked[:3], many, use_tqdm=False)]
    finally:
        try:
            engine.llm_engine.engine_core.shutdown()
        except Exception:
            traceback.print_exc()
        del engine
        gc.collect()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        torch.cuda.empty_cache()
    if not all(len(generated) == TOKENS for generated in tokens):
        raise RuntimeError("fewer tokens than asked for")
    rows = numpy.array(rows)
    if not numpy.isfinite(rows).all():
        raise RuntimeError("a probability is no number")
    print(f"ASKED {folder.name}: started in {started:.1f} s, all in {time.time() - began:.1f} s, tokens {tokens[0]}", flush=True)
    return rows, tokens


def difference(rows, reference):
    """The median over the prompts: where the router of a model of experts is undecided, one prompt can differ by much."""
    import numpy

    norms = numpy.linalg.norm
    return statistics.median((norms(rows - reference, axis=1) / norms(reference, axis=1)).tolist())


def prepare(program, name, work):
    """Makes the checkpoints of a family: their folders, and how many matrices are FP8."""
    original = work / "original"
    make(name, original)
    folders, fp8 = {"original": original}, {}
    for receiver in RECEIVERS:
        folder = work / receiver
        run(program, "quantize", original, folder, "--receiver", receiver)
        fp8[receiver] = counts(folder)
        folders[receiver] = folder
    one, other = (tensors(folders[receiver]) for receiver in RECEIVERS)
    if one.keys() == other.keys() and all(one[key].dtype == other[key].dtype for key in one):
        del folders["common"]  # The same checkpoint.
    run(program, "dequantize", folders["vllm"], work / "meaning")
    folders["meaning"] = work / "meaning"
    if not doubled(folders["vllm"], work / "control", FAMILIES[name][3]):
        raise RuntimeError("the control has no scales to double")
    folders["control"] = work / "control"
    return folders, fp8


def one(program, name, work, keep):
    """One family, in a process of its own. Writes results as it goes on, so that a crash leaves what was found."""
    result = {"errors": {}, "differences": {}, "tokens": {}}
    folder, file = work / "models" / name, work / "results" / f"{name}.json"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def save():
        file.write_text(json.dumps(result))

    try:
        folders, result["fp8"] = prepare(program, name, folder)
        import torch
        import transformers
        import vllm

        result["vllm"] = vllm.__version__
        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
        result["with"] = (
            f"vLLM {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, {device}, "
            f"{time.strftime('%d %B %Y')}"
        )
        reference = None
        for title in ("original", "vllm", "meaning", "control", "common"):
            if title not in folders:
                continue
            try:
                rows, result["tokens"][title] = ask(name, folders[title])
                if title == "original":
                    reference = rows
                else:
                    result["differences"][title] = difference(rows, reference)
            except Exception as error:  # Whatever vLLM refuses with: the other checkpoints are still asked.
                traceback.print_exc()
                result["errors"][title] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if title == "original":
                    break
            save()
    except Exception as error:
        traceback.print_exc()
        result["errors"]["making it"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    save()
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Threads of the engine may be left, which would keep the process.


def verdict(result):
    """Why a family failed, or nothing."""
    if result is None:
        return "no result: crashed or took too long"
    found = result["differences"]
    problems = [f"{title}: {error}" for title, error in result["errors"].items()]
    if not problems and not {"vllm", "meaning", "control"} <= found.keys():
        problems.append("ended early: crashed or took too long")
    if "meaning" in found:
        limit = FACTOR * found["meaning"]
        problems += [
            f"FP8 for {title} differs by {found[title]:.3f}, more than {limit:.3f}"
            for title in RECEIVERS if found.get(title, 0) > limit
        ]
        if found.get("control", limit + 1) <= limit:
            problems.append(f"the control is not seen: {found['control']:.3f}, no more than {limit:.3f}")
    return "; ".join(problems)


def number(result, title):
    return f"{result['differences'][title]:.3f}" if title in result["differences"] else "-"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--only", default=",".join(FAMILIES))
    parser.add_argument("--jobs", type=int, default=1, help="families at a time, on the same GPU")
    parser.add_argument("--timeout", type=int, default=400, help="seconds for one family")
    parser.add_argument("--total", type=int, default=10**6, help="seconds for all of them: what does not fit is not begun")
    parser.add_argument("--keep", action="store_true", help="keep the weights, and earlier results of other families")
    parser.add_argument("--one", help="used by the program itself")
    parser.add_argument("--dry", action="store_true", help="only make and quantise the models, without vLLM")
    options = parser.parse_args()
    program = shutil.which(options.program) or options.program
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    for folder in ("results", "logs"):
        (options.work / folder).mkdir(parents=True, exist_ok=True)
    if options.one:
        one(program, options.one, options.work, options.keep)
    names = [name for name in options.only.split(",") if name]
    if options.dry:
        for name in names:
            folder = options.work / "models" / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            print(name, prepare(program, name, folder)[1], flush=True)
        return

    end = time.time() + options.total

    def family(name):
        left = end - time.time()
        if left < 30:
            print(f"case {name} FAIL not begun", flush=True)
            return None, "not begun"
        file = options.work / "results" / f"{name}.json"
        file.unlink(missing_ok=True)
        began = time.time()
        command = [sys.executable, os.path.abspath(__file__), program, str(options.work), "--one", name]
        with open(options.work / "logs" / f"{name}.log", "w") as log:
            try:
                subprocess.run(
                    command + ["--keep"] * options.keep, stdout=log, stderr=subprocess.STDOUT, timeout=min(options.timeout, left),
                )
            except subprocess.TimeoutExpired:
                log.write("\ntook too long\n")
        result = json.loads(file.read_text()) if file.exists() else None
        why = verdict(result)
        seconds = time.time() - began
        print(f"case {name} {'FAIL ' + why if why else 'OK'} ({seconds:.0f} s)", flush=True)
        if result:
            print(f"     {name}: FP8 {result.get('fp8')}, differences {result['differences']}", flush=True)
        return result, why

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(names, pool.map(family, names)))

    if options.keep:
        for name in FAMILIES:
            file = options.work / "results" / f"{name}.json"
            if name not in results and file.exists():
                result = json.loads(file.read_text())
                results[name] = result, verdict(result)
        results = {name: results[name] for name in FAMILIES if name in results}
    print()
    for ran_with in sorted({result["with"] for result, _ in results.values() if result and "with" in result}):
        print(ran_with)
    print()
    print("| model | `vllm`: FP8 of matrices | weights rounded | FP8 | `common`: FP8 of matrices | FP8 | control | |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (result, why) in results.items():
        what, kind, *_ = FAMILIES[name]
        if result is None or "fp8" not in result:
            print(f"| {what} ({kind}) | | | | | | | {why[:120]} |")
            continue
        (fp8, of), (fp8_common, of_common) = (result["fp8"][receiver] for receiver in RECEIVERS)
        common = number(result, "common") if fp8_common != fp8 else "the same"
        print(
            f"| {what} ({kind}) | {fp8} of {of} | {number(result, 'meaning')} | {number(result, 'vllm')} "
            f"| {fp8_common} of {of_common} | {common} | {number(result, 'control')} | {why[:120].replace('|', '/') or 'OK'} |"
        )
    sys.exit(any(why for _, why in results.values()))


if __name__ == "__main__":
    main()

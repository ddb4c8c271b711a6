"""Compares this project's FP8 plans and checkpoints with what inference engines themselves say of them.

    receivers.py PROGRAM FAMILIES VLLM SGLANG WORK

PROGRAM is ckpt-engine, FAMILIES a table of names and shapes, VLLM and SGLANG are unpacked wheels, of
which single functions are run: whole engines need a GPU. transformers is imported and really loads. Prints a page of
Markdown; the exit code is 1 if anything was refused.
"""

import ast
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
import typing

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"

PROGRAM, FAMILIES, VLLM, SGLANG, WORK = sys.argv[1], *map(pathlib.Path, sys.argv[2:6])
BLOCK = [128, 128]


def run(*args):
    return subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True)


def take(path, names, namespace):
    """Runs the definitions of some names of a file, without what the file imports."""
    for node in ast.parse(path.read_text()).body:
        target = getattr(node, "target", None) or (getattr(node, "targets", None) or [None])[0]
        if getattr(node, "name", getattr(target, "id", None)) in names:
            future = ast.parse("from __future__ import annotations").body
            exec(compile(ast.Module(future + [node], []), str(path), "exec"), namespace)
    return namespace


def method(path, of, name, namespace):
    """A static or class method of a class, as a function."""
    for node in ast.parse(path.read_text()).body:
        if getattr(node, "name", None) == of:
            for inner in node.body:
                if getattr(inner, "name", None) == name:
                    inner.decorator_list = []
                    future = ast.parse("from __future__ import annotations").body
                    exec(compile(ast.Module(future + [inner], []), str(path), "exec"), namespace)
                    return namespace[name]
    raise LookupError(f"{path} has no {of}.{name}")


def base():
    namespace = {name: getattr(typing, name) for name in ("Any", "Dict", "List", "Literal", "Mapping", "Optional")}
    namespace["MappingProxyType"] = types.MappingProxyType
    namespace["logger"] = types.SimpleNamespace(debug=print, warning=print)
    return namespace


class Keys:
    """What both engines' configurations inherit."""

    def __init__(self, **values):
        self.values = values

    @staticmethod
    def get_from_keys(config, keys):
        return next(config[key] for key in keys if key in config)

    @staticmethod
    def get_from_keys_or(config, keys, default):
        return next((config[key] for key in keys if key in config), default)


def packed(root):
    """All layers that models of an engine make of several parts."""
    found = set()
    for path in sorted(root.rglob("*.py")):
        if "models" not in path.parts:
            continue
        text = path.read_text(errors="ignore")
        for mapping in re.finditer(r"packed_modules_mapping[^=\n]*=\s*\{(.*?)\n?\s*\}", text, re.S):
            for layer, parts in re.findall(r'"(\w+)":\s*\[(.*?)\]', mapping[1], re.S):
                parts = tuple(re.findall(r'"([\w.]+)"', parts))
                if len(parts) > 1:
                    found.add((layer, parts))
    return sorted(found)


# Layers that the engines' models treat in their own ways, as their sources say.
NOT_ASKED = {
    ("vllm", "wk_weights_proj"): "wk is dequantised while it is loaded",
    ("sglang", "fused_qkvbfg_a_proj"): "only fused when nothing is quantised",
    ("sglang", "fused_qkvg_proj"): "another model's, without b_proj",
    ("vllm", "in_proj_qkvg"): "of models with linear attention",
    ("vllm", "fused_wkv_wgate"): "of the compressor, which is kept",
    ("vllm", "qkvr"): "of a model whose FP8 is of another kind",
}


class Accepted(Exception):
    """A function went on to make its tensors."""


def experts_of_sglang(layers):
    """SGLang's check of experts, which is the beginning of the function that makes their tensors."""

    def empty(*_, **__):
        raise Accepted

    torch = types.SimpleNamespace(empty=empty, nn=types.SimpleNamespace(Parameter=None), float8_e4m3fn=None)
    namespace = {**base(), "torch": torch, "os": os, "_use_aiter": False, "_is_hip": False, "_use_hip_int4": False}
    sizes = {"get_moe_padding_size", "get_moe_weight_sizes", "TRITON_PADDING_SIZE", "AITER_PADDING_SIZE"}
    take(layers / "moe/utils.py", sizes, namespace)
    make = method(layers / "quantization/fp8.py", "Fp8MoEMethod", "create_fp8_moe_weight_", namespace)
    fused = types.ModuleType("sglang.srt.layers.moe.fused_moe_triton")
    fused.FusedMoeWeightScaleSupported = None
    parts = fused.__name__.split(".")
    for end in range(1, len(parts)):
        sys.modules[".".join(parts[:end])] = types.ModuleType(".".join(parts[:end]))
    sys.modules[fused.__name__] = fused
    layer = types.SimpleNamespace(moe_tp_size=1, moe_runner_config=types.SimpleNamespace(is_gated=True))
    config = types.SimpleNamespace(weight_block_size=BLOCK)

    def check(inner):
        try:
            make(layer, 2, 256, inner, True, config, False, True, False, None)
        except Accepted:
            return
        raise AssertionError("the check of experts is elsewhere now")

    return check


class Engine:
    def __init__(self, name, root):
        inner = root / ("vllm" if name == "vllm" else "sglang/srt")
        layers = inner / ("model_executor/layers" if name == "vllm" else "layers")
        self.name, self.packed, quantization = name, packed(inner), layers / "quantization"
        if name == "vllm":
            self.skipped = take(quantization / "utils/quant_utils.py", {"is_layer_skipped"}, base())["is_layer_skipped"]
            names = {"validate_fp8_block_shape", "validate_fp8_block_shape_moe"}
            shapes = take(quantization / "utils/fp8_utils.py", names, {**base(), "torch": None})
            distributed = types.ModuleType("vllm.distributed")
            distributed.get_tensor_model_parallel_world_size = lambda: 1
            sys.modules["vllm"] = types.ModuleType("vllm")
            sys.modules["vllm.distributed"] = distributed
            one = types.SimpleNamespace(tp_size=1)
            self.linear = lambda rows, cols: shapes["validate_fp8_block_shape"](one, cols, sum(rows), cols, rows, BLOCK)
            self.moe = lambda inner: shapes["validate_fp8_block_shape_moe"](inner, BLOCK)
        else:
            wanted = {"is_layer_skipped", "_module_path_match", "_FALLBACK_FUSED_SHARDS"}
            self.skipped = take(quantization / "utils.py", wanted, base())["is_layer_skipped"]
            check = method(quantization / "fp8.py", "Fp8LinearMethod", "validate_block_quant_shapes", base())
            one = types.SimpleNamespace(tp_group=None)
            config = types.SimpleNamespace(weight_block_size=BLOCK)
            self.linear = lambda rows, cols: check(one, config, cols, cols, sum(rows), sum(rows), rows)
            self.moe = experts_of_sglang(layers)
        read = method(quantization / "fp8.py", "Fp8Config", "from_config", base())
        self.config = lambda config: read(Keys, config).values

    def questions(self, weights, decisions):
        """(layer, parts, whether they are FP8, rows, columns), for each layer that the engine makes."""
        parents = collections.defaultdict(dict)
        for name, shape in weights.items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and "." in module and name.endswith(".weight"):
                parent, last = module.rsplit(".", 1)
                parents[parent][last] = (shape, decisions[name] == "quantize")
        for parent, parts in parents.items():
            within_experts = ".experts." in f"{parent}."
            fused = set()
            for layer, of in self.packed:
                if (self.name, layer) in NOT_ASKED or within_experts or not all(part in parts for part in of):
                    continue
                fused.update(of)
                rows = [parts[part][0][0] for part in of]
                yield f"{parent}.{layer}", of, {parts[part][1] for part in of}, rows, parts[of[0]][0][1]
            for last, (shape, fp8) in parts.items():
                if last.endswith("_proj") and last not in fused and not within_experts:
                    yield f"{parent}.{last}", None, {fp8}, [shape[0]], shape[1]

    def check(self, weights, decisions, config):
        """The number of layers asked about, and what the engine refuses or understands otherwise."""
        ignored = self.config(config).get("ignored_layers") or []
        asked, wrong = 0, []
        for layer, of, fp8, rows, cols in self.questions(weights, decisions):
            asked += 1
            try:
                mapping = {layer.rsplit(".", 1)[1]: list(of)} if of else {}
                if self.skipped(layer, ignored, mapping) == (True in fp8) or len(fp8) > 1:
                    wrong.append(f"{layer}: taken for {'BF16' if True in fp8 else 'FP8'}")
                # Latent projections are one replicated partition.
                one = of and "kv_a_proj_with_mqa" in of or of and "wkv" in of
                if True in fp8:
                    self.linear([sum(rows)] if one else rows, cols)
                    assert cols % BLOCK[1] == 0, "activations cannot be quantised in groups"
            except (ValueError, AssertionError) as error:
                wrong.append(f"{layer}: {error}")
        for layer, of in experts(weights).items():
            asked += 1
            fp8 = {decisions[name] == "quantize" for name in of}
            if self.skipped(layer, ignored, {}) == (True in fp8) or len(fp8) > 1:
                wrong.append(f"{layer}: taken for {'BF16' if True in fp8 else 'FP8'}, is {fp8}")
            for name in of:
                inner = weights[name][-1] if re.search(r"(down_proj|w2)(\.weight)?$", name) else None
                try:
                    if True in fp8 and inner:
                        self.moe(inner)
                except ValueError as error:
                    wrong.append(f"{layer}: {error}")
        return asked, wrong


def experts(weights):
    """The projections of all experts, by the module that engines make of them."""
    layers = collections.defaultdict(list)
    for name, shape in weights.items():
        module = name.removesuffix(".weight")
        stack = len(shape) == 3 and re.search(r"\.(moe|block_sparse_moe)\.\w+$", module)
        if not re.search(r"(_proj|\.w[123]|_linear)$", module) or len(shape) < 2:
            continue
        if match := re.search(r"^(.*\.experts)\.", module):
            layers[match[1]].append(name)
        elif stack:
            layers[module.rsplit(".", 1)[0] + ".experts"].append(name)
    return layers


def families():
    family = None
    result = {}
    for line in FAMILIES.read_text().splitlines():
        if line.startswith("= "):
            family = result.setdefault(line[2:], {})
        elif not line.startswith("#"):
            name, shape, *_ = line.split("\t")
            family[name] = [int(side) for side in shape.split("x")]
    return result


def plans():
    """Both engines' functions on the plan of every family."""
    failed = 0
    print("| functions of | on plans for | families | layers asked about | refused or understood otherwise |")
    print("|---|---|---|---|---|")
    all_families = families()
    for engine in (Engine("vllm", VLLM), Engine("sglang", SGLANG)):
        for receiver in (engine.name, "common"):
            asked, wrong = 0, []
            for name, weights in all_families.items():
                file = WORK / "names"
                file.write_text("".join(f"{n}\t{'x'.join(map(str, s))}\n" for n, s in weights.items()))
                lines = run("plan", "--names", file, "--receiver", receiver)
                config = run("plan", "--names", file, "--receiver", receiver, "--config")
                if lines.returncode or config.returncode:
                    wrong.append(f"{name}: {lines.stderr}")
                    continue
                decisions = dict(line.split("\t")[:2] for line in lines.stdout.splitlines())
                count, problems = engine.check(weights, decisions, json.loads(config.stdout))
                asked += count
                wrong += [f"{name}: {problem}" for problem in problems]
            print(f"| {engine.name} | `{receiver}` | {len(all_families)} | {asked} | {len(wrong)} |")
            for problem in wrong[:20]:
                print(f"  {engine.name} {receiver}: {problem}", file=sys.stderr)
            failed += len(wrong)
    return failed


BASE = dict(vocab_size=1000, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, hidden_size=512)
MLA = dict(
    BASE, num_attention_heads=4, num_key_value_heads=4, moe_intermediate_size=256, n_routed_experts=8, n_group=2,
    topk_group=1, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, qk_rope_head_dim=64,
    qk_nope_head_dim=128, v_head_dim=128, q_lora_rank=256,
)
MODELS = {
    "dense": ("qwen3", dict(BASE, intermediate_size=1024, head_dim=64)),
    "dense, tied": ("qwen3", dict(BASE, intermediate_size=1024, head_dim=64, tie_word_embeddings=True)),
    "dense, sides that are no blocks": ("qwen3", dict(BASE, hidden_size=320, intermediate_size=704, head_dim=64)),
    "dense, narrow keys": ("llama", dict(BASE, intermediate_size=1024, num_key_value_heads=1)),
    "experts": ("qwen3_moe", dict(BASE, moe_intermediate_size=256, num_experts=8, num_experts_per_tok=2, head_dim=64)),
    "experts of Mixtral": ("mixtral", dict(BASE, intermediate_size=512, num_local_experts=4)),
    "experts, 704 inside": ("glm4_moe", dict(BASE, intermediate_size=704, moe_intermediate_size=256, n_routed_experts=8, num_experts_per_tok=2, head_dim=64)),
    "experts in stacks of Granite": ("granitemoe", dict(BASE, intermediate_size=256, num_local_experts=4)),
    "latent attention, 576 rows": ("deepseek_v3", dict(MLA, intermediate_size=1024, kv_lora_rank=512)),
    "latent attention, 192 rows": ("deepseek_v3", dict(MLA, intermediate_size=1024, kv_lora_rank=128)),
    "hybrid of linear attention": ("qwen3_5_moe_text", dict(BASE, moe_intermediate_size=256, shared_expert_intermediate_size=256, num_experts=8, num_experts_per_tok=2, num_hidden_layers=4, head_dim=64, linear_num_value_heads=8, linear_num_key_heads=4, linear_key_head_dim=64, linear_value_head_dim=64)),
    "transposed stacks of Llama 4": ("llama4_text", dict(BASE, intermediate_size=256, intermediate_size_mlp=1024, head_dim=64, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1)),
    "transposed stacks of gpt-oss": ("gpt_oss", dict(BASE, intermediate_size=512, head_dim=64, num_local_experts=4, num_experts_per_tok=2)),
    "Mamba-1": ("falcon_mamba", dict(vocab_size=1000, hidden_size=512, num_hidden_layers=2, intermediate_size=1024)),
}


def loads():
    """transformers loads what the program quantised, and computes what the weights mean."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, FineGrainedFP8Config

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    def tensors(folder):
        return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}

    def wide(codes, scales):
        scales = scales.repeat_interleave(BLOCK[0], -2).repeat_interleave(BLOCK[1], -1)
        return (codes.float() * scales[..., : codes.shape[-2], : codes.shape[-1]]).to(torch.bfloat16)

    print("\n| model of transformers | for | FP8 of matrices | transformers against the weights' meaning |")
    print("|---|---|---|---|")
    failed = 0
    for title, (kind, values) in MODELS.items():
        torch.manual_seed(0)
        source = WORK / "source"
        shutil.rmtree(source, ignore_errors=True)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values)).to(torch.bfloat16)
        model.save_pretrained(source, max_shard_size="3MB")
        tokens = torch.randint(8, 1000, (2, 24), generator=torch.Generator().manual_seed(1))
        for receiver in ("transformers", "common"):
            output, meaning = WORK / "fp8", WORK / "meaning"
            for folder in (output, meaning):
                shutil.rmtree(folder, ignore_errors=True)
            done = run("quantize", source, output, "--receiver", receiver)
            if done.returncode:
                print(f"| {title} ({kind}) | `{receiver}` | | not written: {done.stderr.strip()[:90]} |")
                failed += 1
                continue
            found = tensors(output)
            fp8 = sum(tensor.dtype == torch.float8_e4m3fn for tensor in found.values())
            matrices = sum(tensor.ndim > 1 and not name.endswith("_scale_inv") for name, tensor in found.items())
            meaning.mkdir(parents=True)
            save_file(
                {
                    name: wide(tensor, found[f"{name}_scale_inv"]).contiguous()
                    if tensor.dtype == torch.float8_e4m3fn
                    else tensor
                    for name, tensor in found.items()
                    if not name.endswith("_scale_inv")
                },
                meaning / "model.safetensors",
                metadata={"format": "pt"},
            )
            shutil.copy(source / "config.json", meaning)

            def logits(folder, **options):
                loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
                with torch.no_grad():
                    return loaded.float().eval()(tokens).logits

            try:
                # What has no FP8 is described as what it is, and would be quantised while it is loaded.
                options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if fp8 else {}
                got = logits(output, **options)
                expected = logits(meaning)
                error = ((got - expected).norm() / expected.norm()).item()
                words = "the same" if error == 0 else f"differs by {error:.1e}"
                wrong = error != 0
            except Exception as error:  # Whatever it refuses with.
                words, wrong = f"refused: {type(error).__name__}: {str(error).splitlines()[0][:90]}", True
            print(f"| {title} ({kind}) | `{receiver}` | {fp8} of {matrices} | {words} |", flush=True)
            failed += wrong and receiver == "transformers"
    return failed


def main():
    WORK.mkdir(parents=True, exist_ok=True)
    failed = plans()
    failed += loads()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

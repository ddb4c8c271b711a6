"""Loaders of inference engines, followed: which of a model's tensors have which parts of a checkpoint."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

import ckpt_engine
from ckpt_engine.loading import _box, follow

from test_lending import made, placed  # noqa: F401
from test_processes import as_seen

HIDDEN, HEADS, INNER, VOCABULARY, EXPERTS = 32, 16, 64, 60, 2

#: What a checkpoint has, by name the dtype and the shape.
CHECKPOINT = {
    "embed.weight": ("bfloat16", (VOCABULARY, HIDDEN)),
    **{f"{name}_proj.weight": ("bfloat16", (2 * HEADS, HIDDEN)) for name in "qkv"},
    "o_proj.weight": ("bfloat16", (HIDDEN, 2 * HEADS)),
    "gate_proj.weight": ("bfloat16", (INNER, HIDDEN)),
    "up_proj.weight": ("bfloat16", (INNER, HIDDEN)),
    "norm.weight": ("bfloat16", (HIDDEN,)),
    **{
        f"experts.{expert}.{name}.weight": ("bfloat16", shape)
        for expert in range(EXPERTS)
        for name, shape in (("w1", (INNER, HIDDEN)), ("w3", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER)))
    },
    "stack.weight": ("bfloat16", (EXPERTS, 8, HIDDEN)),
    "rotary.inv_freq": ("float32", (8,)),
}


class Model(torch.nn.Module):
    """A model as vLLM has it on one of two ranks of tensor parallelism: fused, divided, padded and stacked. Its loaders are written as
    vLLM's are."""

    def __init__(self, rank, shared=True):
        super().__init__()
        self.rank = rank
        for name, shape in {
            "embed": (VOCABULARY // 2 + 2, HIDDEN),
            "qkv": (3 * HEADS, HIDDEN),
            "o": (HIDDEN, HEADS),
            "gate_up": (INNER, HIDDEN),
            "norm": (HIDDEN,),
            "w13": (EXPERTS, INNER, HIDDEN),
            "w2": (EXPERTS, HIDDEN, INNER // 2),
            "stack": (EXPERTS, 8, HIDDEN),
        }.items():
            tensor = torch.zeros(shape, dtype=torch.bfloat16)
            tensor = tensor.share_memory_() if shared else tensor
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

    def load_weights(self, weights):
        for name, loaded in weights:
            kind, *rest = name.removesuffix(".weight").split(".")
            if kind == "rotary":
                continue
            if kind == "experts":
                expert, matrix = rest
                shard = loaded.shape[1 if matrix == "w2" else 0] // 2
                loaded = loaded.narrow(1 if matrix == "w2" else 0, self.rank * shard, shard)
                data = (self.w2 if matrix == "w2" else self.w13).data[int(expert)]
                if matrix != "w2":
                    data = data.narrow(0, shard if matrix == "w3" else 0, shard)
                data.copy_(loaded.to(data.device))
            elif kind == "stack":
                for expert in range(loaded.shape[0]):
                    self.stack.data[expert].copy_(loaded[expert])
            elif kind == "embed":
                rows = VOCABULARY // 2
                self.embed.data[:rows].copy_(loaded[self.rank * rows : (self.rank + 1) * rows])
                self.embed.data[rows:].fill_(0)
            elif kind == "norm":
                assert loaded.size() == self.norm.size()
                self.norm.data.copy_(loaded.contiguous())
            elif kind == "o_proj":
                self.o.data.copy_(loaded.chunk(2, dim=1)[self.rank])
            else:
                fused, number = (self.qkv, "qkv".index(kind[0])) if kind[0] in "qkv" else (self.gate_up, kind == "up_proj")
                size = loaded.shape[0] // 2
                data = fused.data.narrow(0, number * size, size)
                loaded = loaded.narrow(0, self.rank * size, size)
                assert data.shape == loaded.shape
                data.copy_(loaded)


def followed(model, checkpoint=None, **options):
    return follow(model.load_weights, checkpoint or CHECKPOINT, dict(model.named_parameters()), **options)


def tensors(model):
    return dict(model.named_parameters())


def test_a_model_is_as_it_was_after_its_loader_was_followed():
    model = Model(0, shared=False)
    for parameter in model.parameters():
        parameter.fill_(3)
    loading = followed(model)
    assert all((parameter == 3).all() for parameter in model.parameters())
    assert loading.unused == ["rotary.inv_freq"] and not loading.others
    # A stack is a part for each expert, all else one.
    names = [name for name, _ in loading.lend]
    assert sorted(names) == sorted([*(set(CHECKPOINT) - {"rotary.inv_freq"}), "stack.weight"])


def first():
    model = Model(0)
    return tensors(model), followed(model).lend


def second():
    model = Model(1)
    return tensors(model), followed(model).lend


def test_trainers_write_into_models_what_their_own_loaders_would_have_copied(placed):  # noqa: F811
    group = placed(first, second)
    for version in (1, 2):
        weights = made(CHECKPOINT, version)
        group.update(weights, version)
        for rank, rollout in enumerate(group.rollouts):
            model = Model(rank, shared=False)
            model.load_weights(weights.items())
            assert rollout.call("look") == {name: as_seen(tensor) for name, tensor in tensors(model).items()}


@pytest.mark.parametrize(
    ("dtype", "copy", "words"),
    [
        ("bfloat16", lambda to, loaded: to.copy_(loaded.t()), "in another order, into weight"),
        ("bfloat16", lambda to, loaded: to.t().copy_(loaded), "not one behind the other"),
        ("bfloat16", lambda to, loaded: to.copy_(loaded.flip(0)), "made of it by aten.flip"),
        ("bfloat16", lambda to, loaded: to.copy_(torch.cat([loaded[4:], loaded[:4]])), "made of it by aten.cat"),
        ("bfloat16", lambda to, loaded: to.add_(loaded), "writes it by aten.add_"),
        ("bfloat16", lambda to, loaded: to.fill_(loaded[0, 0].item()), "needs more of it"),
        ("float32", lambda to, loaded: to.copy_(loaded), "bfloat16 of shape .* of torch.float32"),
        ("float32", lambda to, loaded: to.copy_(loaded.to(to.dtype)), "made of it by aten._to_copy"),
        ("bfloat16", lambda to, loaded: to.copy_(loaded[:1]), "of shape \\(8, 8\\) of torch.bfloat16 of shape \\(1, 8\\)"),
    ],
)
def test_what_a_loader_does_not_copy_as_it_is_is_refused_by_name(dtype, copy, words):
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)

    def load(weights):
        for _, loaded in weights:
            copy(weight, loaded)

    arguments = (load, {"layer.weight": (dtype, (8, 8))}, {"weight": weight})
    with pytest.raises(ckpt_engine.WeightError, match=words) as failed:
        follow(*arguments)
    assert failed.value.tensor == "layer.weight"
    if "needs more" not in words:
        loading = follow(*arguments, partial=True)
        assert list(loading.others) == ["layer.weight"] and not loading.lend


def quantized(rank):
    """Block FP8: the codes and the scales of one half of the rows."""
    codes = torch.zeros(256, 384, dtype=torch.float8_e4m3fn).share_memory_()
    scales = torch.zeros(2, 3).share_memory_()

    def load(weights):
        for name, loaded in weights:
            to = scales if name.endswith("_scale_inv") else codes
            to.copy_(loaded.chunk(2)[rank])

    checkpoint = {
        "mlp.down_proj.weight": ("float8_e4m3fn", (512, 384)),
        "mlp.down_proj.weight_scale_inv": ("float32", (4, 3)),
    }
    parameters = {"weight": codes, "weight_scale_inv": scales}
    pairs = {"mlp.down_proj.weight": "mlp.down_proj.weight_scale_inv"}
    return parameters, follow(load, checkpoint, parameters, quantized=pairs).lend


def upper():
    return quantized(0)


def lower():
    return quantized(1)


def test_trainers_quantise_into_a_model_that_has_blocks_of_fp8(placed):  # noqa: F811
    group = placed(upper, lower)
    weights = made({"mlp.down_proj.weight": ("bfloat16", (512, 384))}, 1)
    report = group.update(weights, 1)
    assert report.counts.converted == 1
    for rank, rollout in enumerate(group.rollouts):
        own = weights["mlp.down_proj.weight"].chunk(2)[rank].float()
        blocks = own.view(2, 128, 3, 128).abs().amax((1, 3))
        (dtype, shape, scales), codes = rollout.call("look")["weight_scale_inv"], rollout.call("look")["weight"]
        assert (dtype, shape) == as_seen(blocks)[:2]
        found = torch.frombuffer(bytearray(scales), dtype=torch.float32).view(2, 3)
        assert torch.allclose(found, blocks / 448)
        values = torch.frombuffer(bytearray(codes[2]), dtype=torch.float8_e4m3fn).view(256, 384).float()
        values *= found.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert ((values - own).abs().view(2, 128, 3, 128).amax((1, 3)) <= blocks / 16).all()


def test_scales_of_other_blocks_than_the_codes_are_refused():
    codes, scales = torch.zeros(256, 128, dtype=torch.float8_e4m3fn), torch.zeros(2, 1)

    def load(weights):
        for name, loaded in weights:
            (scales if name == "s" else codes).copy_(loaded[2:] if name == "s" else loaded[:256])

    checkpoint = {"w": ("float8_e4m3fn", (512, 128)), "s": ("float32", (4, 1))}
    with pytest.raises(ckpt_engine.WeightError, match="not the scales of their blocks"):
        follow(load, checkpoint, {"codes": codes, "scales": scales}, quantized={"w": "s"})


@pytest.mark.parametrize("seed", range(300))
def test_a_box_has_the_elements_of_its_view_in_their_order(seed):
    chance = random.Random(seed)
    shape = [chance.choice([1, 2, 3, 4, 6]) for _ in range(chance.randrange(1, 5))]
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    view, is_box = whole, True
    for _ in range(chance.randrange(5)):
        if view.dim() == 0:
            break
        dim = chance.randrange(view.dim())
        size = view.shape[dim]
        step = chance.randrange(6)
        if step == 0:
            start = chance.randrange(size)
            view = view.narrow(dim, start, chance.randrange(1, size - start + 1))
        elif step == 1:
            view = view.select(dim, chance.randrange(size))
        elif step == 2:
            view = view.unsqueeze(dim)
        elif step == 3 and view.is_contiguous():
            view, is_box = view.view(-1), False
        elif step == 4 and view.dim() > 1:
            view, is_box = view.transpose(dim, (dim + 1) % view.dim()), False
        elif step == 5 and size > 2:
            view, is_box = view[(slice(None),) * dim + (slice(None, None, 2),)], False
    found = _box(view, tuple(shape))
    if found is not None:
        offset, extent = found
        cut = whole[tuple(slice(at, at + size) for at, size in zip(offset, extent, strict=True))]
        assert cut.reshape(-1).tolist() == view.reshape(-1).tolist()
    # What was flattened, transposed or has gaps may be no box.
    assert found is not None or not is_box

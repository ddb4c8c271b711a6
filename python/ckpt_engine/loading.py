"""Which of a model's tensors have which parts of a checkpoint, found out from the model's own loader.

An inference engine fuses tensors of a checkpoint (query, key and value, gate and up, stacks of experts) and has its part of each. Where they
go is known to its ``load_weights`` alone. :func:`follow` runs that with tensors that have no memory, notes what is copied where, and
copies nothing. What it returns can be lent: trainers then write straight into the model's own tensors::

    loading = ckpt_engine.loading.follow(model.load_weights, checkpoint, dict(model.named_parameters()))
    rollout = ckpt_engine.form_group(control, config, lend=loading.lend)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _native
from .errors import WeightError

OPERATION = "following a loader"


@dataclass
class Loading:
    """What a loader does with a checkpoint."""

    #: What :func:`ckpt_engine.form_group` takes as ``lend``: names of the checkpoint, and the tensors that have them or parts of them.
    lend: list[tuple[str, Any]] = field(default_factory=list)
    #: The names of tensors of the checkpoint that the loader does not copy as they are, each with the reason.
    others: dict[str, str] = field(default_factory=dict)
    #: The names of those of which it copies nothing.
    unused: list[str] = field(default_factory=list)


def follow(
    load_weights: Callable[[Iterable[tuple[str, Any]]], Any],
    checkpoint: Mapping[str, Any] | Iterable[tuple[str, Any]],
    parameters: Mapping[str, Any],
    *,
    quantized: Mapping[str, str] | None = None,
    partial: bool = False,
) -> Loading:
    """Finds out where a loader copies the tensors of a checkpoint. The model stays as it is.

    The model has to be in the layout that its loader writes. Where an engine changes tensors after loading (shuffles rows, packs or transposes
    them for its kernels), what this returns is not what the kernels expect.

    Args:
        load_weights: The model's loader, which takes pairs of a name and a tensor.
        checkpoint: The names that trainers send, each with a tensor, of which the dtype and the shape count, or with a pair of these two.
        parameters: The model's parameters and buffers, by their own names, which errors have.
        quantized: Tensors of this checkpoint that trainers quantise as they write them: the name of each, and the name of its scales. Both
            are in `checkpoint`, the codes as ``float8_e4m3fn`` and the scales as ``float32``, with blocks of 128 by 128.
        partial: Return also if the loader does something else with some tensors: they come in another way, or are stale.

    Returns:
        What can be lent.

    Raises:
        WeightError: For the first tensor that the loader does not copy as it is, with its name and the reason.
    """
    import torch

    follower = _follower(torch, parameters)
    shapes = checkpoint.items() if isinstance(checkpoint, Mapping) else checkpoint
    try:
        with torch.no_grad(), follower:
            load_weights(follower.pairs(shapes))
    except WeightError:
        raise
    except Exception as error:
        message = f"the loader needs more of it than where it goes: {error}"
        raise WeightError(message, operation=OPERATION, tensor=follower.current) from error
    loading = Loading(others=follower.others)
    places = follower.places
    scales_of = dict(quantized or {})
    for name, scales in scales_of.items():
        found = _quantized(places.pop(name, []), places.pop(scales, []))
        if isinstance(found, str):
            loading.others[name] = found
            continue
        for codes, scale in found:
            box = _native.Box(codes.tensor, codes.shape, codes.offset)
            loading.lend.append((name, _native.Fp8(box, scale.tensor)))
    for name, parts in places.items():
        for part in parts:
            loading.lend.append((name, _native.Box(part.tensor, part.shape, part.offset)))
    known = {name for name, _ in loading.lend} | set(loading.others) | set(scales_of.values())
    loading.unused = [name for name in follower.names if name not in known]
    if loading.others and not partial:
        name, why = next(iter(loading.others.items()))
        raise WeightError(why, operation=OPERATION, tensor=name)
    return loading


@dataclass
class _Part:
    """A part of a tensor of the checkpoint, and the tensor that has it."""

    tensor: Any
    #: Of the whole tensor of the checkpoint.
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def _storage(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


def _box(view: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The offset and the extent of a view of a contiguous tensor of this shape; `None` unless the view's elements are those of a box, in
    their order."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    offset, rest = [], view.storage_offset()
    for stride in strides:
        offset.append(rest // stride if stride else 0)
        rest %= stride or 1
    extent = [1] * len(shape)
    dim = len(shape)
    for size, stride in reversed(list(zip(view.shape, view.stride(), strict=True))):
        if size == 1:
            continue
        while size > 1:
            # The next dimension outwards that has this distance.
            dim = next((at for at in reversed(range(dim)) if strides[at] == stride and shape[at] > 1), -1)
            if dim < 0:
                return None
            own = min(size, shape[dim])
            if size % own or offset[dim] + own > shape[dim] or (size > own and offset[dim]):
                return None
            extent[dim] = own
            size, stride = size // own, stride * shape[dim]
    return tuple(offset), tuple(extent)


def _quantized(codes: list[_Part], scales: list[_Part]) -> list[tuple[_Part, _Part]] | str:
    """The scales of each part of a tensor in blocks."""
    pairs = []
    for part in codes:
        extent = tuple(part.tensor.shape)
        first = tuple(at // 128 if dim >= len(extent) - 2 else at for dim, at in enumerate(part.offset))
        ends = [at + size for at, size in zip(part.offset, extent, strict=True)]
        last = [-(-end // 128) if dim >= len(extent) - 2 else end for dim, end in enumerate(ends)]
        count = tuple(end - at for at, end in zip(first, last, strict=True))
        own = [scale for scale in scales if (scale.offset, tuple(scale.tensor.shape)) == (first, count)]
        if len(own) != 1:
            return "the model has its codes, and not the scales of their blocks"
        pairs.append((part, own[0]))
    return pairs


def _follower(torch: Any, parameters: Mapping[str, Any]) -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    # What leaves the elements what they are, somewhere else.
    moves = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)

    class Follower(TorchDispatchMode):  # type: ignore[misc]
        """Sees every operation of the loader. Tensors of the checkpoint are on the device `meta`, and views of them have its storage."""

        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []
            self.current: str | None = None
            self.places: dict[str, list[_Part]] = {}
            self.others: dict[str, str] = {}
            self.targets = {_storage(tensor): name for name, tensor in parameters.items()}
            # By their storages: tensors of the checkpoint, and what was computed of them. They live as long as this.
            self.sources: dict[int, tuple[str, Any]] = {}
            self.computed: dict[int, tuple[list[str], str, Any]] = {}

        def pairs(self, checkpoint: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
            for name, tensor in checkpoint:
                dtype, shape = (tensor.dtype, tensor.shape) if hasattr(tensor, "dtype") else tensor
                dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
                source = torch.empty(tuple(shape), dtype=dtype, device="meta")
                self.sources[_storage(source)] = (name, source)
                self.names.append(name)
                self.current = name
                yield name, source

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.ops.aten.copy_.default:
                return self.copied(*args[:2])
            given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            names = self.names_of(given)
            if func._schema.is_mutable and given and _storage(given[0]) in self.targets:
                # What loaders put beside the checkpoint's weights, zeros say, is there since the model was loaded.
                for name in names:
                    self.refuse(name, given[0], f"the loader writes it by {func}")
                return args[0]
            if names and func in moves and kwargs.get("dtype") in (None, args[0].dtype):
                return args[0].view(args[0].shape) if _storage(args[0]) in self.sources else args[0]
            result = func(*args, **kwargs)
            if names:
                for made in torch.utils._pytree.tree_leaves(result):
                    if isinstance(made, torch.Tensor) and not self.names_of([made]):
                        self.computed[_storage(made)] = (names, str(func), made)
            return result

        def names_of(self, tensors: list[Any]) -> list[str]:
            names: list[str] = []
            for tensor in tensors:
                storage = _storage(tensor)
                if storage in self.sources:
                    names.append(self.sources[storage][0])
                elif storage in self.computed:
                    names += self.computed[storage][0]
            return list(dict.fromkeys(names))

        def refuse(self, name: str, to: Any, why: str) -> None:
            target = self.targets.get(_storage(to), "a tensor that is none of its parameters")
            self.others.setdefault(name, f"{why}, into {target}")

        def copied(self, to: Any, source: Any) -> Any:
            """Notes a copy, which is not made."""
            names = self.names_of([source])
            if _storage(to) not in self.targets:
                if names:
                    self.computed[_storage(to)] = (names, "a copy to a tensor beside the model", to)
                    return to
                return torch.ops.aten.copy_.default(to, source)
            if _storage(source) in self.computed:
                for name in names:
                    self.refuse(name, to, f"the loader copies what it has made of it by {self.computed[_storage(source)][1]}")
                return to
            if not names or not to.numel():
                return to
            (name,) = names
            _, whole = self.sources[_storage(source)]
            box = _box(source, tuple(whole.shape))
            if box is None:
                self.refuse(name, to, "the loader copies its elements in another order")
            elif source.shape != to.shape or source.dtype != to.dtype:
                self.refuse(name, to, f"the loader makes {to.dtype} of shape {tuple(to.shape)} of {source.dtype} of shape {tuple(source.shape)}")
            elif not to.is_contiguous():
                self.refuse(name, to, "the loader copies it to elements that are not one behind the other")
            else:
                offset, extent = box
                part = _Part(to.detach().view(extent), tuple(whole.shape), offset)
                self.places.setdefault(name, []).append(part)
            return to

    return Follower()

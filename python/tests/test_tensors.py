"""Tensors of all kinds, in and out, without a copy."""

from __future__ import annotations

import array
import subprocess
import sys

import pytest

import ckpt_engine

from ranks import in_thread

numpy = pytest.importorskip("numpy")


def sent(local, weights, version=1, **how):
    """What a rollout gets of weights, copied."""
    trainer, rollout = local
    got = {}

    def receive():
        with rollout.receive_weights(version, copy=True, **how) as received:
            got.update(received)

    receiving = in_thread(receive)
    trainer.send_weights(weights, version)
    receiving.result(10)
    return got


def test_importing_the_package_imports_no_framework():
    script = "import sys, ckpt_engine; print(sorted({'torch', 'numpy', 'jax'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_arrays_of_numpy_arrive_with_their_types_shapes_and_strides(local):
    arrays = {
        "f32": numpy.arange(12, dtype=numpy.float32).reshape(3, 4),
        "f16": numpy.ones((2, 2), numpy.float16),
        "i64": numpy.array(7),
        "bool": numpy.array([True, False]),
        "transposed": numpy.arange(12, dtype=numpy.int32).reshape(3, 4).T,
        "sliced": numpy.arange(100, dtype=numpy.uint8)[3:90:7],
        "read.only": numpy.frombuffer(b"12345678", numpy.uint16),
        "empty": numpy.zeros((0, 3), numpy.float64),
    }
    for name, got in sent(local, arrays).items():
        back = got.numpy()
        assert back.dtype == arrays[name].dtype and (back == arrays[name]).all(), name
        assert back.shape == arrays[name].shape
        assert not back.flags.writeable


def test_types_of_ml_dtypes_arrive(local):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    names = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]
    arrays = {name: numpy.array([[0.5, 1, 2]], getattr(ml_dtypes, name)) for name in names}
    for name, got in sent(local, arrays).items():
        back = got.numpy()
        assert back.dtype == arrays[name].dtype and (back == arrays[name]).all(), name


def test_buffers_arrive_and_bytes_with_a_type_and_a_shape(local):
    got = sent(
        local,
        {
            "bytes": b"abc",
            "array": array.array("f", [1, 2]),
            "view": memoryview(array.array("q", [1, 2, 3])),
            "typed": ckpt_engine.Tensor(bytes(12), "bfloat16", (2, 3)),
            "fp8": ckpt_engine.Tensor(bytearray(b"\x38" * 4), "F8_E4M3", [2, 2]),
        },
    )
    seen = {name: (tensor.dtype, tensor.shape) for name, tensor in got.items()}
    assert seen == {
        "bytes": ("U8", (3,)),
        "array": ("F32", (2,)),
        "view": ("I64", (3,)),
        "typed": ("BF16", (2, 3)),
        "fp8": ("F8_E4M3", (2, 2)),
    }
    assert got["fp8"].tobytes() == b"\x38" * 4


def test_whatever_has_dlpack_arrives(local):
    class Elsewhere:
        """As jax or cupy: nothing but the protocol."""

        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **how):
            return self.array.__dlpack__(**how)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    value = numpy.arange(6, dtype=numpy.float64).reshape(2, 3)
    got = sent(local, {"w": Elsewhere(value)})["w"]
    assert (got.dtype, got.shape) == ("F64", (2, 3))
    assert (numpy.from_dlpack(got) == value).all()
    assert not numpy.from_dlpack(got).flags.writeable


def test_a_received_tensor_goes_on_to_the_next_group_as_it_is(local):
    value = numpy.arange(6, dtype=numpy.float32)
    first = sent(local, {"w": value}, 1)
    second = sent(local, first, 2)
    assert (second["w"].numpy() == value).all()


def test_no_type_is_guessed(local):
    trainer, rollout = local
    with pytest.raises(ckpt_engine.WeightError, match="complex128") as raised:
        trainer.send_weights({"w": numpy.zeros(2, numpy.complex128)}, 1)
    assert raised.value.tensor == "w"
    with pytest.raises(ckpt_engine.WeightError, match="big-endian"):
        trainer.send_weights({"w": numpy.zeros(2, ">f4")}, 1)
    with pytest.raises(ValueError, match="no type is named"):
        ckpt_engine.Tensor(b"ab", "float7")
    with pytest.raises(ckpt_engine.WeightError, match="3 bytes"):
        ckpt_engine.Tensor(b"abc", "BF16", [2])
    with pytest.raises(AttributeError, match="ml_dtypes"):
        ckpt_engine.Tensor(b"ab", "BF16").__array_interface__


def test_a_view_keeps_the_memory_of_what_it_views():
    torch = pytest.importorskip("torch")
    value = torch.arange(1000, dtype=torch.bfloat16)
    tensor = ckpt_engine.Tensor(value)
    back = tensor.torch()
    assert back.data_ptr() == value.data_ptr(), "nothing is copied"
    expected = value.clone()
    del value, tensor
    assert torch.equal(back, expected)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32):
        value = torch.rand(4, 4).to(dtype)
        back = ckpt_engine.Tensor(value).torch()
        assert back.dtype == dtype and back.data_ptr() == value.data_ptr()
    # Also by the protocol alone.
    assert torch.from_dlpack(ckpt_engine.Tensor(expected)).dtype == torch.bfloat16


def both_ways(torch):
    """Classes of tensors: the one that says what it is by the functions of its class, and one that has none."""

    class Plain(torch.Tensor):
        __dlpack_c_exchange_api__ = None

    return (lambda tensor: tensor), (lambda tensor: tensor.as_subclass(Plain))


def test_a_tensor_is_the_same_weight_whichever_way_its_class_describes_it():
    torch = pytest.importorskip("torch")
    for way in both_ways(torch):
        torch.manual_seed(1)
        names = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64"
        names += " float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz"
        for dtype in (getattr(torch, name) for name in names.split()):
            given = torch.randint(0, 2, (3, 4, 8), dtype=torch.uint8).repeat(1, 1, 8).view(dtype)
            seen = ckpt_engine.Tensor(way(given))
            assert seen.torch().dtype == dtype and seen.shape == given.shape
            assert seen.torch().data_ptr() == given.data_ptr()
        for _ in range(200):
            # Views of all kinds, and the odd strides of sides that are 1 and of tensors without elements.
            given = torch.randn([int(side) for side in torch.randint(1, 5, (int(torch.randint(0, 5, ())),))])
            given = given.permute(*torch.randperm(given.dim()).tolist()) if given.dim() else given
            for axis in range(given.dim()):
                given = given.narrow(axis, 0, int(torch.randint(0 if axis == 3 else 1, given.size(axis) + 1, ())))
            if given.is_contiguous():
                ckpt_engine.Destination({"w": way(given)})
            else:
                with pytest.raises(ckpt_engine.WeightError, match="not contiguous"):
                    ckpt_engine.Destination({"w": way(given)})
            given = torch.nn.Parameter(given) if torch.rand(()) < 0.3 else given
            seen = ckpt_engine.Tensor(way(given))
            assert seen.shape == given.shape
            assert seen.tobytes() == given.detach().contiguous().numpy().tobytes(), (given.shape, given.stride())


def test_what_a_tensor_of_torch_is_not_is_said_whichever_way_its_class_describes_it(local):
    torch = pytest.importorskip("torch")
    trainer, _ = local
    odd = {
        "lazy negation": torch.randn(3, dtype=torch.complex64).conj().imag,
        "lazy negation or conjugation": torch.randn(3, dtype=torch.complex64).conj(),
        "torch.complex128": torch.zeros(3, dtype=torch.complex128),
    }
    for way in both_ways(torch):
        for version, (why, given) in enumerate(odd.items()):
            with pytest.raises(ckpt_engine.WeightError, match=why) as raised:
                trainer.send_weights({"w.odd": way(given)}, version)
            assert raised.value.tensor == "w.odd"

"""The native module. Programs use :mod:`ckpt_engine`; of this only `Tensor` and the functions are public, there."""

from collections.abc import Callable, Iterator
from typing import Any, final

@final
class Tensor:
    """A tensor that owns its memory, read-only: one that was received, or a view of any object's bytes.

    It has ``__dlpack__`` (``torch.from_dlpack``, ``numpy.from_dlpack``, ``jax.dlpack.from_dlpack``) and, for the
    types that numpy has, ``__array_interface__`` (``numpy.asarray``). Views keep the memory, and so the bucket that
    it is in.

    Args:
        data: An object with memory: a tensor or array, ``bytes``, a ``memoryview``, a mapped file.
        dtype: The type of its elements, by the name that torch (``"bfloat16"``) or safetensors (``"BF16"``,
            ``"F8_E4M3"``) gives it; the object's own unless set. It is another view of the same bytes, and converts
            nothing: this is how bytes of FP8 or BF16 are sent from a library that has no such types.
        shape: The dimensions, slowest first; the object's own unless set.

    Raises:
        WeightError: If the bytes are not those of the type and shape.
        ValueError: For a type that is not known.
    """

    def __new__(
        cls, data: Any, dtype: str | None = None, shape: tuple[int, ...] | list[int] | None = None
    ) -> Tensor: ...
    @property
    def name(self) -> str:
        """The name that it was received by."""
    @property
    def dtype(self) -> str:
        """The type's name in safetensors: ``"BF16"``, ``"F8_E4M3"``, …"""
    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions, slowest first; ``()`` of a scalar."""
    @property
    def nbytes(self) -> int:
        """The size in bytes."""
    @property
    def device(self) -> str:
        """``"cpu"``, or ``"cuda:0"``."""
    @property
    def __array_interface__(self) -> dict[str, Any]: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def torch(self) -> Any:
        """A ``torch.Tensor`` over the same memory, which it keeps, of any type that torch has.

        torch knows no read-only memory: do not write to it.
        """
    def numpy(self) -> Any:
        """A read-only ``numpy.ndarray`` over the same memory; BF16 and FP8 by the package ml_dtypes.

        Raises:
            TypeError: If that is not installed.
            BufferError: If the tensor is on a device.
        """
    def tobytes(self) -> bytes:
        """A copy of its bytes."""

def generate_token() -> bytes:
    """A new secret for a group: 256 random bits, as 64 hexadecimal digits."""

def read_token(path: str) -> bytes:
    """The secret in a file.

    Raises:
        ConfigError: If others than its owner can read or write the file.
    """

def build_info() -> dict[str, Any]:
    """What is compiled in: ``version``, ``backends`` and ``cuda``."""

def check_config(config: str | None, path: str | None) -> None: ...
def quantized(
    config: str, weights: list[tuple[str, str, list[int]]]
) -> list[tuple[str, str, list[int]]]: ...
def collect_logs(level: int) -> bool: ...
def next_logs(seconds: float) -> list[tuple[int, str, str]]: ...
def end_all(seconds: float) -> bool: ...
@final
class Job:
    def wait_done(self, seconds: float) -> bool: ...
    def when_done(self, callback: Callable[[], object]) -> None: ...
    def cancel(self) -> None: ...
    def result(self) -> Any: ...

@final
class Sending:
    @property
    def done(self) -> bool: ...
    def wait_wanted(self, seconds: float) -> bool: ...
    def when_wanted(self, callback: Callable[[], object]) -> None: ...
    def wait_done(self, seconds: float) -> bool: ...
    def when_done(self, callback: Callable[[], object]) -> None: ...
    def pull(self, iterator: Iterator[Any]) -> bool: ...
    def put(self, item: Any) -> bool: ...
    def end(self) -> None: ...
    def fail(self, message: str) -> None: ...
    def cancel(self) -> None: ...
    def result(self) -> str: ...

@final
class Receiving:
    @property
    def done(self) -> bool: ...
    @property
    def version(self) -> int | None: ...
    def wait_begun(self, seconds: float) -> bool: ...
    def when_begun(self, callback: Callable[[], object]) -> None: ...
    def wait_more(self, seconds: float) -> bool: ...
    def when_more(self, callback: Callable[[], object]) -> None: ...
    def wait_done(self, seconds: float) -> bool: ...
    def when_done(self, callback: Callable[[], object]) -> None: ...
    def take(self) -> tuple[str, Any] | None: ...
    def take_bucket(self) -> list[tuple[str, Any]] | None: ...
    def fail(self, message: str) -> None: ...
    def cancel(self) -> None: ...
    def result(self) -> str: ...

@final
class Destination:
    def __new__(cls, tensors: Iterator[Any], partial: bool) -> Destination: ...

@final
class Box:
    """A part of a full tensor: what a rank holds of it, or wants.

    Args:
        tensor: The elements of the part: a tensor of any kind.
        shape: The dimensions of the full tensor, slowest first.
        offset: Where the part begins in each of these dimensions. It ends where the tensor's own shape says.
    """

    def __new__(
        cls, tensor: Any, shape: tuple[int, ...] | list[int], offset: tuple[int, ...] | list[int]
    ) -> Box: ...

@final
class Fp8:
    """Two tensors that a rollout lends for one weight, which trainers quantise to FP8 blocks as they write it.

    The configuration's section of quantisation says in which format; without one, blocks of 128 by 128.

    Args:
        codes: A tensor of ``float8_e4m3fn`` of the weight's shape, or a :class:`Box` or a ``DTensor`` of one.
        scales: A tensor of ``float32``, contiguous, with a scale for each block that `codes` has an element of.
    """

    def __new__(cls, codes: Any, scales: Any) -> Fp8: ...

@final
class Lent:
    def __new__(cls, tensors: Iterator[Any]) -> Lent: ...

@final
class Channel:
    def send(self, to: int, body: bytes) -> None: ...
    def recv(self, timeout: float) -> Job: ...

@final
class Control:
    @staticmethod
    def lead(address: str, token: bytes, heartbeat_timeout: float | None) -> Job: ...
    @staticmethod
    def join(
        address: str,
        token: bytes,
        trainer: bool,
        rank: int | None,
        connect_timeout: float | None,
        heartbeat_timeout: float | None,
    ) -> Job: ...
    @property
    def address(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def is_trainer(self) -> bool: ...
    def ranks(self) -> list[int]: ...
    def barrier(self, name: str, timeout: float) -> Job: ...
    def channel(self, number: int) -> Channel: ...
    def close(self) -> Job: ...

@final
class Engine:
    @staticmethod
    def form(
        control: Control,
        config: str | None,
        path: str | None,
        world_size: int | None,
        attributes: str,
        timeout: float,
        lent: Lent | None,
    ) -> Job: ...
    @staticmethod
    def form_local(config: str | None, path: str | None, rollouts: int) -> Job: ...
    @property
    def version(self) -> int | None: ...
    @property
    def held(self) -> int: ...
    def send(self, version: int, part: bool) -> Sending: ...
    def attest(self) -> Job: ...
    def receive(
        self, version: int | None, copy: bool, partial: bool, torch: bool
    ) -> Receiving: ...
    def receive_into(self, destination: Destination, version: int | None) -> Job: ...
    def update(self, version: int | None) -> Job: ...
    @property
    def state(self) -> str: ...
    def finalize(self) -> Job: ...

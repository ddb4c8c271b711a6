"""What goes wrong, as exceptions: one class for each kind, all of them :class:`Error`."""

from __future__ import annotations

from typing import Any


class Error(Exception):
    """A failure of an engine.

    Attributes:
        kind: What went wrong, to branch on: the name of the class without ``Error``.
        recovery: What to do: ``"Retry"`` (start the next update as usual), ``"Reconnect"`` (finalize the
            engine and form the group anew), ``"Abort"`` (change something first).
        operation: What was being done, as a phrase.
        message: What went wrong, in words.
        rank: The rank that the failure concerns: the one that was waited for, or that died.
        bucket: The bucket, counted from 0 within the update.
        tensor: The tensor's name.
        version: The update's version.
    """

    kind: str = "Error"

    def __init__(
        self,
        message: str,
        *,
        kind: str | None = None,
        recovery: str = "Abort",
        operation: str = "",
        text: str | None = None,
        rank: int | None = None,
        bucket: int | None = None,
        tensor: str | None = None,
        version: int | None = None,
    ) -> None:
        super().__init__(text or message)
        if kind is not None:
            self.kind = kind
        self.recovery = recovery
        self.operation = operation
        self.message = message
        self.rank = rank
        self.bucket = bucket
        self.tensor = tensor
        self.version = version

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception of a worker travels to the process that waits for it.
        return _rebuild, (type(self), str(self), dict(self.__dict__))


def _rebuild(cls: type[Error], text: str, state: dict[str, Any]) -> Error:
    error = cls(text)
    error.__dict__.update(state)
    return error


class ConfigError(Error, ValueError):
    """A configuration that cannot be used: an unknown key, a value out of range."""

    kind = "Config"


class BackendError(Error):
    """No backend of that name, or one that cannot run on this machine."""

    kind = "Backend"


class WeightError(Error, ValueError):
    """A weight that cannot be sent: a type that checkpoints do not have, a name used twice."""

    kind = "Weight"


class SourceError(Error):
    """The program's iterator of weights raised: ``__cause__`` is what it raised."""

    kind = "Source"


class StateError(Error, RuntimeError):
    """A call in the wrong phase: on a finalized engine, during another update, in a forked process."""

    kind = "State"


class AuthenticationError(Error):
    """A peer does not know the group's token."""

    kind = "Authentication"


class ProtocolError(Error):
    """A peer of another version, or a message that breaks the protocol."""

    kind = "Protocol"


class MismatchError(Error):
    """Two ranks want different formats, versions, names or group sizes."""

    kind = "Mismatch"


class TimeoutError(Error, TimeoutError):  # noqa: A001 - it is one
    """Nothing happened within the deadline of a wait."""

    kind = "Timeout"


class PeerLost(Error, ConnectionError):
    """The connection to a rank ended, and not in order: its process died, say. ``rank`` says which."""

    kind = "PeerLost"


class TrainerLeft(Error):
    """The trainer ended its part in the group in order: there will be no more updates of it."""

    kind = "TrainerLeft"


class DigestError(Error):
    """Bytes arrived that are not the bytes that were sent."""

    kind = "Digest"


class AbortedError(Error):
    """The update was given up, by this rank or by another one."""

    kind = "Aborted"


class ResourceError(Error):
    """Memory, disk or another resource of the machine is exhausted."""

    kind = "Resource"


class IoError(Error, OSError):
    """The operating system refused an operation."""

    kind = "Io"


_KINDS: dict[str, type[Error]] = {
    cls.kind: cls
    for cls in (
        ConfigError,
        BackendError,
        WeightError,
        SourceError,
        StateError,
        AuthenticationError,
        ProtocolError,
        MismatchError,
        TimeoutError,
        PeerLost,
        TrainerLeft,
        DigestError,
        AbortedError,
        ResourceError,
        IoError,
    )
}


def _from_report(report: dict[str, Any]) -> Error:
    """The exception for an error of the native module."""
    return _KINDS.get(report["kind"], Error)(**report)

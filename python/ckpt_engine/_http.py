"""Requests to inference servers, with the standard library."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

from .errors import BackendError, Error, TimeoutError

#: How much of what a server says in an error is told.
_SAID = 500


def _failed(kind: type[Error], operation: str, message: str) -> Error:
    return kind(message, operation=operation, text=f"{operation}: {message}")


class Server:
    """An inference server.

    Args:
        url: Where it is: ``http://host:8000``.
        timeout: How many seconds it may take to answer.
        api_key: What it asks for in the header ``Authorization``, if it does.
    """

    def __init__(self, url: str, timeout: float = 1800.0, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str, timeout: float | None = None) -> Any:
        """An answer of JSON, or its text."""
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """As :meth:`get`, of a request that changes something.

        Raises:
            BackendError: If the server refuses, with what it says, or is not reached.
            TimeoutError: If it does not answer in time.
        """
        return self._ask("POST", path, {} if body is None else body, timeout)

    def _ask(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers, method=method)
        limit = self.timeout if timeout is None else timeout
        what = f"{method} {self.url}{path}"
        try:
            with urllib.request.urlopen(request, timeout=limit) as answer:
                text = answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            said = error.read(_SAID).decode(errors="replace").strip()
            raise _failed(BackendError, what, f"{error.code}: {said or error.reason}") from error
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, OSError) and "timed out" in str(reason):
                raise _failed(TimeoutError, what, f"no answer within {limit:.1f} s") from error
            raise _failed(BackendError, what, f"not reached: {reason}") from error
        try:
            return json.loads(text)
        except ValueError:
            return text

    def wait_until_ready(self, timeout: float) -> None:
        """Waits until ``/health`` answers.

        Raises:
            TimeoutError: With what the server said last.
        """
        until = time.monotonic() + timeout
        while True:
            try:
                self.get("/health", timeout=5)
                return
            except (BackendError, TimeoutError) as error:
                if time.monotonic() > until:
                    message = f"it is not ready within {timeout:.0f} s: {error}"
                    raise _failed(TimeoutError, f"waiting for {self.url}", message) from error
            time.sleep(min(0.5, timeout / 10))

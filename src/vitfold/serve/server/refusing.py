"""Why a request gets no answer: a status of HTTP and a sentence."""

from __future__ import annotations


class RefusedError(Exception):
    """A request that is not answered; nothing of it reaches other requests."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

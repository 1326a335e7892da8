"""Errors that end one request and not the worker."""

from __future__ import annotations


class RequestError(RuntimeError):
    """A request cannot be served."""

"""Ray's token, which a cluster may ask of everybody who joins. Nothing here imports Ray, which reads the mode when it starts."""

from __future__ import annotations

import os
from pathlib import Path


def token_file() -> Path:
    """The file in which Ray looks for a token when no variable names one."""
    return Path.home() / ".ray" / "auth_token"


def is_named() -> bool:
    """Whether a variable holds a token or the path of one."""
    return "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ


def needs_file() -> bool:
    """Whether a Ray that starts here keeps its token in `token_file`."""
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not is_named()


def offer_token() -> None:
    """Turn on Ray's token mode for a client of the jobs API when there is a token. A server that needs none ignores it."""
    if is_named() or token_file().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def join_with_token() -> None:
    """Turn on Ray's token mode for a driver whose person has named a token.

    The file alone tells nothing: every local Ray makes one. A driver in token mode refuses the calls of a cluster without
    tokens, which then takes the driver for dead.
    """
    if is_named():
        os.environ.setdefault("RAY_AUTH_MODE", "token")

"""Send a model folder to a hub, with the hub's own client. The token comes from the environment only, never from a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, constants, utils

from pipeline.errors import UnreachableError, UserError, first_line
from pipeline.notices import NOTICE_S, late

TOKEN = "HF_TOKEN"
_REMEDY = f"Look at {TOKEN}, HF_ENDPOINT and the name OWNER/NAME"


def check_push(repo: str) -> str:
    """The token, once the hub has accepted it. Call this before the folder is made.

    Raises UserError for a name that is none, without a token, where HF_HUB_OFFLINE is set, and for a token that the hub refuses.
    Raises UnreachableError when the hub does not answer.
    """
    try:
        utils.validate_repo_id(repo)
    except utils.HFValidationError as error:
        raise UserError(
            f"is no name of a repository ({first_line(error)})", f"--push {repo}", "Write NAME or OWNER/NAME"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so no hub is asked", f"--push {repo}", "Unset it, or leave out --push")
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise UserError(
            f"{TOKEN} is not set", f"--push {repo}", f"Put a token that may write into {TOKEN}; no file is read for it"
        )
    _asked(repo, lambda: HfApi(token=token).whoami())
    return token


def push(repo: str, folder: Path, token: str, message: str) -> str:
    """Send the files of `folder` to the repository, as one commit. Returns its address.

    A repository that is not there is made, and is private. Raises as `check_push` does.
    """
    api = HfApi(token=token)

    def send() -> str:
        """Make the repository and commit the files."""
        address = str(api.create_repo(repo, private=True, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        return address

    with late("push", f"the files have been on their way to {repo} for {NOTICE_S:g} s so far."):
        return str(_asked(repo, send))


def _asked(repo: str, ask: Callable[[], object]) -> object:
    """The hub's answer. Its errors become one line."""
    try:
        return ask()
    except Exception as error:
        where, said = f"--push {repo}", first_line(error)
        unanswered = type(error).__module__.startswith("httpx") or type(error) in (ConnectionError, TimeoutError)
        if unanswered:  # the client's network errors are those of httpx or httpx2, by its version
            raise UnreachableError(f"the hub does not answer ({said})", where, _REMEDY) from error
        raise UserError(f"the hub refuses ({said})", where, _REMEDY) from error

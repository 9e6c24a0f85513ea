"""A user who has no more rights than others have: the tests of a project often run as root, who may read everything."""

import contextlib
import os
import tempfile
from pathlib import Path


@contextlib.contextmanager
def other_user():
    """Go on as another user for the length of a block."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@contextlib.contextmanager
def seen_by_all():
    """A new folder that every user may read: the folders above `tmp_path` are of one user."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)

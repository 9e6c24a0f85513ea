"""vLLM's functions as they ship, and with the hook of this project, put back afterwards as they were found."""

import pkgutil

import pytest


@pytest.fixture
def shipped(monkeypatch):
    """Puts a function of vLLM back to what ships, and returns the class or module that holds it."""

    def put_back(place, name):
        holder = pkgutil.resolve_name(place)
        found = getattr(holder, name)
        plain = getattr(found, "__wrapped__", found)
        static = isinstance(vars(holder).get(name), staticmethod)
        monkeypatch.setattr(holder, name, staticmethod(plain) if static else plain)
        return holder

    return put_back


@pytest.fixture
def hooked():
    """Installs a hook into the class or module that holds a function, and sees that a second time changes nothing."""

    def put(holder, name, install):
        assert install() is True
        changed = getattr(holder, name)
        assert install() is True
        assert getattr(holder, name) is changed, "installing twice must not wrap twice"
        return holder

    return put

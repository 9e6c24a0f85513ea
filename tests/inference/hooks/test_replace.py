"""A function of vLLM is replaced once, and vLLM stays as it is where it lacks what a hook needs."""

import sys
from types import ModuleType

import pytest

from actors.inference.hooks import replace


@pytest.fixture
def library(monkeypatch):
    """A module with a function, a method and a static method, each of which returns its number."""

    class Class:
        def method(self, x):
            """As it is."""
            return x

        static = staticmethod(lambda x: x)

    library = ModuleType("library")
    library.Class, library.function = Class, lambda x: x
    monkeypatch.setitem(sys.modules, "library", library)
    return library


def doubling(original):
    def doubled(*args):
        return 2 * original(*args)

    return doubled


def lacking(original):
    from library import what_another_version_has

    return what_another_version_has


def test_functions_methods_and_static_methods_are_replaced_once(library):
    for place, name in (("library", "function"), ("library:Class", "method"), ("library:Class", "static")):
        assert replace(place, name, "doubles", doubling)
        assert replace(place, name, "doubles", doubling)
    one = library.Class()
    assert [library.function(1), one.method(1), one.static(1), library.Class.static(1)] == [2, 2, 2, 2]
    assert (one.method.__name__, one.method.__doc__) == ("method", "As it is.")
    assert one.method.__wrapped__(one, 1) == 1


@pytest.mark.parametrize(
    ("place", "name", "change"),
    [
        ("no_such_library", "function", doubling),
        ("library.part", "function", doubling),
        ("library:Missing", "method", doubling),
        ("library:Class", "missing", doubling),
        ("library:Class", "method", lacking),
    ],
)
def test_what_is_absent_leaves_all_as_it_was(library, place, name, change):
    before = vars(library.Class).copy()
    assert replace(place, name, "doubles", change) is False
    assert vars(library.Class) == before

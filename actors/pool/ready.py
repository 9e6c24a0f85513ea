"""The engines of a pool that can take a batch, the one with the fewest rows first.

A heap, so that a choice among a thousand engines costs what a choice among ten costs. An engine that changes is pushed anew, and
its older entries are thrown away when they reach the top.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from actors.pool.member import Member

_Entry = tuple[int, float, str, Member]
_SPARE = 64  # outdated entries that the heap may hold, beside as many as there are engines


class Ready:
    """Engines by the rows that they hold. Of equal ones the oldest comes first."""

    def __init__(self, inflight: int) -> None:
        """`inflight`: batches that an engine takes at one time."""
        self._inflight = inflight
        self._heap: list[_Entry] = []

    def offer(self, member: Member) -> None:
        """Note that an engine has begun to serve, or that its batches have changed."""
        if self._has_room(member):
            heappush(self._heap, _entry(member))

    def least(self) -> Member | None:
        """The engine with the fewest rows among those with room; None when none has room."""
        while self._heap and not self._is_current(self._heap[0]):
            heappop(self._heap)
        return self._heap[0][3] if self._heap else None

    def shrink(self, num_engines: int) -> None:
        """Forget outdated entries when there are many. The caller says how many engines the pool has."""
        if len(self._heap) > 2 * num_engines + _SPARE:
            members = {entry[2]: entry[3] for entry in self._heap if self._is_current(entry)}
            self._heap = [_entry(member) for member in members.values()]
            heapify(self._heap)

    def _is_current(self, entry: _Entry) -> bool:
        return self._has_room(entry[3]) and entry[0] == entry[3].load

    def _has_room(self, member: Member) -> bool:
        serves = member.state == "serving" and not member.left and member.held_for is None
        return serves and len(member.tickets) < self._inflight


def _entry(member: Member) -> _Entry:
    return member.load, member.since, member.name, member

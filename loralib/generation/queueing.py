"""Who is next: clients in turn, and nobody is overtaken for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

__all__ = ["FairQueue"]

Item = TypeVar("Item")

# How many others may go first while there is no room for one.
_OVERTAKEN: Final = 16


class FairQueue(Generic[Item]):
    """Items of several clients.

    Each client's wait in order; the clients take turns.  Where there is no room for the one whose turn it is, those of
    other clients may go first, 16 of them at most: then it waits for room and all wait for it.

    >>> line = FairQueue()
    >>> for client, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4)]:
    ...     line.push(client, item)
    >>> [line.pop(lambda item: True) for _ in range(4)]
    [1, 4, 2, 3]
    """

    def __init__(self) -> None:
        self._lines: dict[str, deque[Item]] = {}  # those of clients with items, in turn
        self._overtaken: dict[str, int] = {}  # how often the first item of a client was

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        for line in self._lines.values():
            yield from line

    def push(self, client: str, item: Item) -> None:
        """Puts an item behind its client's others."""
        self._lines.setdefault(client, deque()).append(item)

    def pop(self, fits: Callable[[Item], bool]) -> Item | None:
        """Takes out and returns the next item that fits, or None."""
        passed = []
        for client, line in self._lines.items():
            if fits(line[0]):
                break
            if self._overtaken.get(client, 0) >= _OVERTAKEN:
                return None
            passed.append(client)
        else:
            return None
        for other in passed:
            self._overtaken[other] = self._overtaken.get(other, 0) + 1
        item = line.popleft()
        self._overtaken.pop(client, None)
        del self._lines[client]
        if line:
            self._lines[client] = line  # its next turn comes after the others'
        return item

    def remove(self, item: Item) -> None:
        """Takes an item out."""
        for client, line in list(self._lines.items()):
            if item in line:
                if line[0] is item:
                    self._overtaken.pop(client, None)
                line.remove(item)
                if not line:
                    del self._lines[client]

    def clear(self) -> None:
        """Takes all items out."""
        self._lines.clear()
        self._overtaken.clear()

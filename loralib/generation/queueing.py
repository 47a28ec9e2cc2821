"""A fair queue: clients take turns, and nobody is overtaken forever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

__all__ = ["FairQueue"]

Item = TypeVar("Item")

# How many others may overtake an item for which there is no room.
_OVERTAKEN: Final = 16


class FairQueue(Generic[Item]):
    """A queue of items from several clients.

    Each client's items keep their order; the clients take turns.  If there is no room for the next item, up to 16 items
    of other clients may overtake it; after that, all wait until there is room for it.

    >>> line = FairQueue()
    >>> for client, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4)]:
    ...     line.push(client, item)
    >>> [line.pop(lambda item: True) for _ in range(4)]
    [1, 4, 2, 3]
    """

    def __init__(self) -> None:
        self._lines: dict[str, deque[Item]] = {}  # items by client, in the order of the clients' turns
        self._overtaken: dict[str, int] = {}  # how often each client's first item was overtaken

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        for line in self._lines.values():
            yield from line

    def push(self, client: str, item: Item) -> None:
        """Appends an item to its client's line."""
        self._lines.setdefault(client, deque()).append(item)

    def pop(self, fits: Callable[[Item], bool]) -> Item | None:
        """Removes and returns the next item that fits; None if there is none."""
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
            self._lines[client] = line  # moves the client to the end
        return item

    def remove(self, item: Item) -> None:
        """Removes an item before its turn; does nothing if it is not in the queue."""
        for client, line in list(self._lines.items()):
            if item in line:
                if line[0] is item:
                    self._overtaken.pop(client, None)
                line.remove(item)
                if not line:
                    del self._lines[client]

    def clear(self) -> None:
        """Removes the items of all clients, and forgets how often they were overtaken."""
        self._lines.clear()
        self._overtaken.clear()

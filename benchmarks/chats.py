"""Synthetic chats for the study of learning rates: the help desk of a fictional repair shop, answered in a house style.

The style and the facts can be learned; names, prices, tips and wording are random, so that no adapter can predict an
answer exactly, as with chats written by people.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Turns = list[tuple[str, str]]

SYSTEM = "You answer at the counter of Halden Repairs. Be brief, give reasons, and end with the ticket line."
THINGS = {
    "phone": ("cracked screen", "flat battery", "muted speaker", "wet charging port"),
    "laptop": ("noisy fan", "broken hinge", "dead pixel row", "sticky keyboard"),
    "bicycle": ("loose pedal", "bent wheel", "slipping chain", "squealing brake"),
    "coffee machine": ("dripping valve", "cold boiler", "blocked grinder", "scaled pump"),
    "sewing machine": ("worn belt", "jammed bobbin", "loose needle clamp", "burnt motor"),
    "camera": ("stuck shutter", "scratched lens", "torn strap lug", "dusty sensor"),
}
NAMES = ("Ann", "Bo", "Chi", "Dara", "Emil", "Fatima", "Goran", "Hoa", "Ines", "Jun", "Karl", "Linh", "Mona", "Nils")
PLACES = ("Mill Street", "the harbour", "Old Market", "Birch Lane", "the north gate", "Tower Hill")
ASKS = (
    "My {thing} has a {fault}. Can you fix it?",
    "Hello, {name} here. There is a {fault} on my {thing}. What would that cost?",
    "{fault} on a {thing}, how long does it take?",
    "I dropped my {thing} at {place} and now it has a {fault}. Help!",
    "Is it worth repairing a {thing} with a {fault}, or should I buy a new one?",
)
GREETINGS = ("Good that you ask.", "Yes, we can.", "That happens a lot.", "Of course.", "Let us have a look.", "Sure.")
REASONS = (
    "we have the part in the drawer",
    "the maker still sells that part",
    "only one screw holds it",
    "most of the work is cleaning",
    "we must order the part from abroad",
    "the glue needs a night to dry",
    "two of us have to hold it",
    "the old part comes out in pieces",
    "it is the third one this week",
    "the housing has to be opened with heat",
)
TIPS = (
    "Keep it dry until then.",
    "Please remove the cover first.",
    "Do not switch it on.",
    "Bring the receipt if you still have it.",
    "Wrap it in a towel.",
    "Take out the battery.",
    "Note the number on the back.",
    "Leave the charger at home.",
    "Make a copy of your data.",
    "Tell us if you hear a rattle.",
    "Do not use oil on it.",
    "Photograph the damage for the insurance.",
)
CLOSINGS = (
    "See you then.",
    "We are glad to help.",
    "Ask for {name}.",
    "The door beside {place} is open.",
    "Till soon!",
)
REPLIES = {
    "booked": ("Thanks, please do it.", "Fine, go ahead.", "Good, I will bring it in.", "Yes, book it."),
    "open": ("That is too much for me.", "Let me think about it.", "I will ask my brother first.", "Hm, not today."),
}


def _days(count: int) -> str:
    return "tomorrow" if count == 1 else f"in {count} days"


def _tips(random_: random.Random, count: int) -> str:
    return " ".join(random_.sample(TIPS, count))


def _closing(random_: random.Random) -> str:
    return random_.choice(CLOSINGS).format(name=random_.choice(NAMES), place=random_.choice(PLACES))


def _repair(random_: random.Random) -> Turns:
    thing = random_.choice(list(THINGS))
    fault = random_.choice(THINGS[thing])
    words = {"thing": thing, "fault": fault, "name": random_.choice(NAMES), "place": random_.choice(PLACES)}
    price, days = 5 * random_.randint(3, 40), random_.randint(1, 9)
    answer = (
        f"{random_.choice(GREETINGS)} A {fault} costs {price} euros, since {random_.choice(REASONS)}. It is ready "
        f"{_days(days)}. {_tips(random_, random_.randint(1, 2))}\nTicket: {thing} / {fault} / {price}"
    )
    turns = [("user", random_.choice(ASKS).format(**words)), ("assistant", answer)]
    if random_.random() < 0.5:
        status = random_.choice(list(REPLIES))
        answer = f"{_tips(random_, 1)} {_closing(random_)}\nTicket: {status} / {thing} / {price}"
        turns += [("user", random_.choice(REPLIES[status])), ("assistant", answer)]
    return turns


def _hours(random_: random.Random) -> Turns:
    place, opens, closes = random_.choice(PLACES), random_.randint(7, 11), random_.randint(15, 20)
    return [
        ("user", f"When are you open at {place}?"),
        ("assistant", f"From {opens} to {closes} at {place}. {_closing(random_)}\nTicket: none"),
    ]


def _advice(random_: random.Random) -> Turns:
    thing = random_.choice(list(THINGS))
    return [
        ("user", f"How do I bring you my {thing} safely?"),
        ("assistant", f"{_tips(random_, 3)} {_closing(random_)}\nTicket: advice / {thing}"),
    ]


def chats(count: int, seed: int) -> list[Turns]:
    """Returns that many chats, each a list of (role, content) turns.

    >>> [role for role, _ in chats(1, seed=0)[0]][:3]
    ['system', 'user', 'assistant']
    """
    random_ = random.Random(seed)
    kinds: Sequence[Callable[[random.Random], Turns]] = (_repair, _repair, _repair, _advice, _hours)
    return [[("system", SYSTEM), *random_.choice(kinds)(random_)] for _ in range(count)]

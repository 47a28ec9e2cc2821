"""Writes the sample data of examples/NLG: meaning representations of places to eat, several texts for each.

    python scripts/make_e2e_sample.py [--output_dir examples/NLG/data/e2e]

The form of a line is that of the E2E challenge (``name : X | Type : pub | ...||text``); names, values and every
sentence come from the grammar below, which was written for this project.  The output is committed, and a test makes
it again and compares the bytes: the grammar uses only those parts of ``random`` that never change.

How a text comes about: a *head* sentence says name and type, with some of the other attributes as adjectives ("a
cheap Thai pub") and modifiers ("near Fort Ellis"); *follow-up* sentences say the rest, joined by "and", or by "but"
where good news meets bad.  `SAID` lists each way in which a value may be said, so that a program can check texts.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

SEED = 7
SPLITS = {"train": 400, "valid": 60, "test": 60}
# Words, digits and signs of a line. This many keep about all lines within 64 tokens: SmolLM2 needs about one for each.
LONGEST_LINE = 57
PIECE = re.compile(r"\d|[^\W\d]+|[^\w\s]")

ATTRIBUTES = ("name", "Type", "food", "price", "customer rating", "area", "family friendly", "near")

NAMES = {
    "train": (
        "The Copper Kettle|The Salty Heron|Juniper Table|The Old Ferry|Marlow House|Basil Street|The Tin Lantern|"
        "Olive Yard|The Grey Badger|Saffron Corner|The Quiet Oak|Pepper Lane|The Brass Bell|Linden Kitchen|"
        "The Paper Crane|Anchor Row|The Velvet Fig|Hazel Court|The Iron Spoon|Nutmeg Hall|The Lost Piper|"
        "Clover Room|The White Otter|Ember Place|The Red Thistle|Walnut Tree|The Moonraker|Rosemary Garden|"
        "The Stone Mill|Lantern Bay|The Happy Magpie|Quince Cottage|The Blue Ladder|Fennel Square|Café Linnet|"
        "The Wooden Boat|Amber Arch|The Singing Cook|Plum Terrace|The Green Door|Sorrel Point|The Night Owl|"
        "Birch Cellar|The Golden Pear|Thyme Gate|The Black Kite|Poppy Mews|The Winter Stove"
    ).split("|"),
    "valid": "The Silver Trout|Maple Wharf|The Crooked Chimney|Ginger Loft|The Late Robin|Cedar Nook".split("|"),
    "test": "The Tall Fiddler|Bramble Post|The Amber Wheel|Café Corvo|The Kind Miller|Damson Green".split("|"),
}
LANDMARKS = {
    "train": (
        "Fort Ellis|the Corn Hall|Abbot Bridge|Tern Park|the Glass Tower|St Oswin Church|the Ferry Pier|Kestrel Hill|"
        "the Tram Museum|Holt Library|the Clock House|Mercer Gardens|the Rope Works|Lowen Stadium|the Sun Theatre|"
        "Dyer Gate"
    ).split("|"),
    "valid": "the Wool Exchange|Penn Arcade|Gannet Quay".split("|"),
    "test": "the Mint Gallery|Orchard Baths|Sable Bridge".split("|"),
}
TYPES = ("restaurant", "pub", "bistro", "coffee shop", "wine bar", "tea room")
FOODS = ("French", "Italian", "Thai", "Greek", "Indian", "Mexican", "Spanish", "Turkish", "Japanese", "vegetarian")

# attribute -> value -> the phrases (lower case) of which a text has at least one, and of other values none.
SAID: dict[str, dict[str, tuple[str, ...]]] = {
    "Type": {kind: (kind,) for kind in TYPES},
    "food": {food: (food.lower(),) for food in FOODS},
    "price": {
        "cheap": ("cheap", "inexpensive", "low prices", "prices are low"),
        "moderate": ("moderately priced", "mid-priced", "moderate prices", "prices are moderate"),
        "high": (" expensive", "high-priced", "high prices", "prices are high"),
        "less than £15": ("less than £15",),
        "£15-25": ("£15-25",),
        "more than £30": ("more than £30",),
    },
    "customer rating": {
        "low": ("low customer rating", "low-rated", "poorly rated", "rated low", "rate it low"),
        "average": ("average customer rating", "rated as average", "rate it as average"),
        "high": ("high customer rating", "highly rated", "rated highly", "rate it highly"),
        "1 out of 5": ("1 out of 5",),
        "3 out of 5": ("3 out of 5",),
        "5 out of 5": ("5 out of 5",),
    },
    "area": {area: (area,) for area in ("riverside", "city centre", "harbour", "old town", "market square")},
    "family friendly": {
        "yes": ("family-friendly", "child-friendly", "is family friendly", "welcomes families", "children are welcome"),
        "no": ("adults-only", "for adults only", "not family friendly", "children are not welcome"),
    },
}


def ways_to_say(attribute: str, value: str) -> tuple[str, ...]:
    """The phrases (lower case) of which a text must contain one to say this value."""
    return SAID[attribute][value] if attribute in SAID else (value.lower(),)


def faults(meaning: dict[str, str], text: str) -> list[str]:
    """What a text leaves out of a meaning representation, or says instead."""
    lowered = text.lower()
    found = [f"{key} : {value} is not said" for key, value in meaning.items() if not _has(lowered, key, value)]
    for key, values in SAID.items():
        others = (value for value in values if value != meaning.get(key))
        found += [f"{key} : {value} is said" for value in others if _has(lowered, key, value)]
    return found


def _has(lowered: str, attribute: str, value: str) -> bool:
    return any(phrase in lowered for phrase in ways_to_say(attribute, value))


# --- phrases: for each attribute its forms as adjective, modifier of a noun, and verb phrase after "it" ------------

PRICE_ADJECTIVES = {
    "cheap": ("cheap", "inexpensive"),
    "moderate": ("moderately priced", "mid-priced"),
    "high": ("expensive", "high-priced"),
}
PRICE_NOUNS = {"cheap": "low prices", "moderate": "moderate prices", "high": "high prices"}
RATING_ADJECTIVES = {"low": ("poorly rated", "low-rated"), "high": ("highly rated",)}
RATING_ADVERBS = {"low": "low", "average": "as average", "high": "highly"}
AREA_PLACES = {
    "riverside": ("on the riverside", "in the riverside area"),
    "city centre": ("in the city centre",),
    "harbour": ("at the harbour", "in the harbour area"),
    "old town": ("in the old town",),
    "market square": ("on the market square",),
}
MOODS = {
    "price": {"cheap": 1, "less than £15": 1, "high": -1, "more than £30": -1},
    "customer rating": {"high": 1, "5 out of 5": 1, "low": -1, "1 out of 5": -1},
    "family friendly": {"yes": 1, "no": -1},
}


def adjectives(attribute: str, value: str) -> tuple[str, ...]:
    """Words to put before the type ("a cheap pub"); none if the value has none."""
    return {
        "food": (value,),
        "price": PRICE_ADJECTIVES.get(value, ()),
        "customer rating": RATING_ADJECTIVES.get(value, ()),
        "family friendly": ("family-friendly", "child-friendly") if value == "yes" else ("adults-only",),
    }.get(attribute, ())


def modifiers(attribute: str, value: str) -> tuple[str, ...]:
    """Phrases to put after the type ("a pub near Fort Ellis")."""
    if attribute == "price":
        noun = PRICE_NOUNS.get(value)
        return (f"with {noun}",) if noun else (f"that charges {value} for a meal", f"with dishes for {value}")
    return {
        "food": (f"serving {value} food", f"offering {value} dishes", f"that serves {value} food"),
        "customer rating": (f"with {rating(value)}", f"that is rated {RATING_ADVERBS.get(value, value)} by customers"),
        "area": AREA_PLACES.get(value, ()),
        "near": (f"near {value}", f"close to {value}", f"not far from {value}"),
        "family friendly": ("that welcomes families",) if value == "yes" else ("that is for adults only",),
    }[attribute]


def predicates(attribute: str, value: str) -> tuple[str, ...]:
    """Verb phrases that go after "it" or after the name."""
    if attribute == "price":
        noun = PRICE_NOUNS.get(value)
        words = tuple(f"is {word}" for word in PRICE_ADJECTIVES.get(value, ()))
        return (*words, f"has {noun}") if noun else (f"charges {value} for a meal",)
    places = AREA_PLACES.get(value, ())
    return {
        "food": (f"serves {value} food", f"offers {value} dishes", f"specialises in {value} food"),
        "customer rating": (f"has {rating(value)}", f"is rated {RATING_ADVERBS.get(value, value)} by customers"),
        "area": tuple(f"{verb} {place}" for verb in ("is", "is located", "can be found") for place in places),
        "near": (f"is near {value}", f"is close to {value}", f"is located near {value}"),
        "family friendly": ("is family friendly", "welcomes families")
        if value == "yes"
        else ("is not family friendly", "is for adults only"),
    }[attribute]


def statements(attribute: str, value: str) -> tuple[str, ...]:
    """Whole sentences that need no subject from before."""
    if attribute == "price":
        noun = {"cheap": "low", "moderate": "moderate", "high": "high"}.get(value)
        return (f"prices are {noun}",) if noun else (f"a meal costs {value}", f"you pay {value} for a meal")
    return {
        "customer rating": (f"customers rate it {RATING_ADVERBS.get(value, value)}",),
        "family friendly": ("children are welcome",) if value == "yes" else ("children are not welcome",),
    }.get(attribute, ())


def rating(value: str) -> str:
    """The rating as a noun with its article."""
    return f"a customer rating of {value}" if "out of" in value else article(f"{value} customer rating")


def article(words: str) -> str:
    """Puts "a" or "an" before words."""
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def capital(sentence: str) -> str:
    """Makes the first letter a capital; the others stay."""
    return sentence[0].upper() + sentence[1:]


# --- sentences -----------------------------------------------------------------------------------------------------

Slot = tuple[str, str]
PLACES = ("near", "area")


class Plan(NamedTuple):
    """What a head sentence says: adjectives before the type, and what comes after it."""

    name: str
    kind: str
    before: list[Slot]
    after: list[Slot]

    @property
    def places(self) -> list[Slot]:
        return [slot for slot in self.after if slot[0] in PLACES]

    def after_without(self, *keys: str) -> list[Slot]:
        return [slot for slot in self.after if slot[0] not in keys]


def noun_phrase(rng: random.Random, plan: Plan) -> str:
    """The type with its adjectives: opinion first, origin last ("highly rated, cheap Thai pub")."""
    slots = dict(plan.before)
    order = ("customer rating", "price", "family friendly")
    opinions = ", ".join(rng.choice(adjectives(key, slots[key])) for key in order if key in slots)
    return " ".join(filter(None, (opinions, slots.get("food"), plan.kind)))


def modified(rng: random.Random, slots: list[Slot]) -> str:
    """Modifiers after a noun, places first ("close to Tern Park with low prices")."""
    order = (*(PLACES if rng.random() < 0.7 else PLACES[::-1]), "food", "price", "customer rating", "family friendly")
    parts = [rng.choice(modifiers(*slot)) for slot in sorted(slots, key=lambda slot: order.index(slot[0]))]
    return "".join(f" {part}" for part in parts)


def joined(first: Slot, second: Slot) -> str:
    """The word between two facts: "but" where one is good news and the other bad, else "and"."""
    moods = [MOODS.get(key, {}).get(value, 0) for key, value in (first, second)]
    return "but" if moods[0] * moods[1] < 0 else "and"


def follow_ups(rng: random.Random, slots: list[Slot]) -> str:
    """The facts that the head left out, at most two a sentence."""
    sentences = []
    for first, *rest in (slots[at : at + 2] for at in range(0, len(slots), 2)):
        told = f"it {rng.choice(predicates(*first))}"
        alone = statements(*first)
        if not rest:
            sentences.append(rng.choice((told, *alone)))
            continue
        (second,) = rest
        word = joined(first, second)
        options = [f"{told} {word} {rng.choice(predicates(*second))}"]
        if alone and statements(*second):
            comma = "," if word == "but" else ""
            options.append(f"{rng.choice(alone)}{comma} {word} {rng.choice(statements(*second))}")
        sentences.append(rng.choice(options))
    return "".join(f" {capital(sentence)}." for sentence in sentences)


def head_is(rng: random.Random, plan: Plan) -> str:
    return f"{plan.name} is {article(noun_phrase(rng, plan))}{modified(rng, plan.after)}."


def head_there_is(rng: random.Random, plan: Plan) -> str | None:
    if plan.after_without(*PLACES):
        return None
    called = rng.choice(("called", "named"))
    return f"There is {article(noun_phrase(rng, plan))} {called} {plan.name}{modified(rng, plan.after)}."


def head_place_first(rng: random.Random, plan: Plan) -> str | None:
    if not plan.places:
        return None
    what, where = article(noun_phrase(rng, plan)), capital(modified(rng, plan.places).strip())
    others = plan.after_without(*PLACES)
    if others:
        return f"{where}, {plan.name} is {what}{modified(rng, others)}."
    return rng.choice((f"{where} is {what} called {plan.name}.", f"{where} you will find {plan.name}, {what}."))


def head_apposition(rng: random.Random, plan: Plan) -> str | None:
    if not plan.after:
        return None
    *inside, last = plan.after
    what = article(noun_phrase(rng, plan))
    return f"{plan.name}, {what}{modified(rng, inside)}, {rng.choice(predicates(*last))}."


def head_the_kind(rng: random.Random, plan: Plan) -> str | None:
    if not plan.after or plan.name.startswith("The "):  # "The pub The Old Ferry" reads badly
        return None
    first, *rest = plan.after[:2]
    told = rng.choice(predicates(*first))
    for second in rest:
        told += f" {joined(first, second)} {rng.choice(predicates(*second))}"
    return f"The {noun_phrase(rng, plan)} {plan.name} {told}."


def head_try(rng: random.Random, plan: Plan) -> str | None:
    food = dict(plan.after).get("food")
    if food is None:
        return None
    where = modified(rng, plan.places)
    what = article(noun_phrase(rng, plan)) + modified(rng, plan.after_without("food", *PLACES))
    opening = rng.choice((f"For {food} food{where}, try", f"If you want {food} food{where}, go to"))
    return f"{opening} {plan.name}, {what}."


def head_you_can(rng: random.Random, plan: Plan) -> str | None:
    food = dict(plan.after).get("food")
    if food is None:
        return None
    what = article(noun_phrase(rng, plan)) + modified(rng, plan.after_without("food"))
    return f"You can eat {food} food at {plan.name}, {what}."


HEADS: tuple[Callable[[random.Random, Plan], str | None], ...] = (
    head_is,
    head_there_is,
    head_place_first,
    head_apposition,
    head_the_kind,
    head_try,
    head_you_can,
)


def write_text(rng: random.Random, meaning: dict[str, str]) -> str | None:
    """One text for a meaning representation, or None where the choices made do not fit together."""
    slots = [(key, value) for key, value in meaning.items() if key not in ("name", "Type")]
    rng.shuffle(slots)
    plan = Plan(meaning["name"], meaning["Type"], [], [])
    later: list[Slot] = []
    for slot in slots:
        # Two modifiers in a row read badly unless they are places: "with dishes for £15-25 that is for adults only".
        crowded = slot[0] not in PLACES and bool(plan.after_without(*PLACES))
        if adjectives(*slot) and len(plan.before) < 2 and rng.random() < 0.5:
            plan.before.append(slot)
        elif len(plan.after) < 2 and not crowded and rng.random() < 0.7:
            plan.after.append(slot)
        else:
            later.append(slot)
    head = rng.choice(HEADS)(rng, plan)
    return None if head is None else capital(head) + follow_ups(rng, later)


# --- meaning representations and files ---------------------------------------------------------------------------


def draw_meaning(rng: random.Random, split: str) -> dict[str, str]:
    """A random meaning representation; in valid and test, one name or landmark in three is not in train."""
    size = rng.choice((1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5))
    optional = [key for key in ATTRIBUTES if key not in ("name", "Type")]
    rng.shuffle(optional)
    unseen = split if rng.random() < 1 / 3 else "train"
    values: dict[str, Iterable[str]] = {
        "name": NAMES[unseen],
        "near": LANDMARKS[unseen],
        **{key: list(said) for key, said in SAID.items()},
    }
    chosen = {"name", "Type", *optional[:size]}
    return {key: rng.choice(list(values[key])) for key in ATTRIBUTES if key in chosen}


def linearise(meaning: dict[str, str]) -> str:
    """The form of the E2E data: ``name : X | Type : pub | ...``."""
    return " | ".join(f"{key} : {value}" for key, value in meaning.items())


def write_references(rng: random.Random, meaning: dict[str, str]) -> list[str]:
    """Four to six texts that differ, short ones where the meaning representation is long."""
    wanted = rng.choice((4, 5, 5, 6))
    prompt = linearise(meaning)
    found: dict[str, None] = {}
    for _ in range(400):
        text = write_text(rng, meaning)
        if text is None or len(PIECE.findall(f"{prompt}||{text}")) > LONGEST_LINE or faults(meaning, text):
            continue
        found[text] = None
        if len(found) == wanted:
            break
    return list(found)


def make(seed: int = SEED) -> dict[str, str]:
    """The content of each file by split: lines ``meaning representation||text``, texts of one MR together."""
    rng = random.Random(seed)
    taken: set[str] = set()
    files = {}
    for split, count in SPLITS.items():
        lines: list[str] = []
        made = 0
        while made < count:
            meaning = draw_meaning(rng, split)
            key = linearise(meaning)
            if key in taken:
                continue
            texts = write_references(rng, meaning)
            if len(texts) < 4:
                continue
            taken.add(key)
            lines += [f"{key}||{text}" for text in texts]
            made += 1
        files[split] = "".join(f"{line}\n" for line in lines)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the E2E-style sample data.")
    default = Path(__file__).resolve().parent.parent / "examples" / "NLG" / "data" / "e2e"
    parser.add_argument("--output_dir", type=Path, default=default)
    directory = parser.parse_args().output_dir
    directory.mkdir(parents=True, exist_ok=True)
    for split, text in make().items():
        (directory / f"{split}.txt").write_bytes(text.encode("utf-8"))
        print(f"{split}.txt: {SPLITS[split]} meaning representations, {text.count(chr(10))} lines")


if __name__ == "__main__":
    main()

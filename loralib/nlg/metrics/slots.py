"""Slot error rate: does the text state every value of an E2E meaning representation?

A slot is an error if its value is not stated: if it is missing, contradicted, or replaced by another. What a text
states beyond its meaning representation does not count. The rule is deterministic and has these parts:

- Names, places, foods, kinds and unknown slots must appear in the text word for word.  Case, accents, hyphens, a
  leading "the" and a plural make no difference; "British" states English, and a café or coffee house is a coffee shop.
  The words of the name and near slots do not count for other slots: "Café Rouge" does not have to be a café.
- Prices have three levels, however the value is written: cheap, "less than £20"; moderate, "£20-25"; high, "more than
  £30".  A price is stated by words for its level or by the value's own amount, a level also by any amount in it.
- Ratings have three levels too: low, 1 and 2 out of 5; average, 3 out of 5; high, 4 and 5 out of 5.  A number in the
  text (out of 5, or stars) must be the value's number, or in its level; words count only if no number is given.
- An adjective that suits both (low, average, high, ...) belongs to the nearest word about prices or ratings.
- Family-friendliness is stated by a mention of families, children or kids: "no" needs a negation with the mention, or
  "adults only"; "yes" needs a mention without one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["SlotErrors", "missing_slots", "parse_meaning", "slot_error_rate"]


@dataclass(frozen=True)
class SlotErrors:
    """A slot error rate and how it was computed.

    Attributes:
        errors: the number of values not stated.
        slots: the number of all values.
    """

    errors: int
    slots: int

    @property
    def value(self) -> float:
        """The share of values that are not stated, from 0 to 1."""
        return self.errors / self.slots if self.slots else 0.0

    @property
    def signature(self) -> str:
        """How the score was computed."""
        return "values:said|case:lc|phrases:e2e|version:2"


def slot_error_rate(meanings: Sequence[str], texts: Sequence[str]) -> SlotErrors:
    """Counts the values of meaning representations that texts do not state.

    Args:
        meanings: E2E meaning representations, ``name : X | food : Y | ...`` (or ``name[X], food[Y]``).
        texts: one for each meaning representation.

    >>> slot_error_rate(["name : Aromi | price : cheap | family friendly : no"], ["Aromi is inexpensive ."])
    SlotErrors(errors=1, slots=3)
    """
    missing = [missing_slots(meaning, text) for meaning, text in zip(meanings, texts, strict=True)]
    return SlotErrors(sum(map(len, missing)), sum(len(parse_meaning(meaning)) for meaning in meanings))


def missing_slots(meaning: str, text: str) -> list[tuple[str, str]]:
    """Returns the slots of a meaning representation whose value a text does not state.

    >>> missing_slots("name : The Mill | customer rating : 5 out of 5 | area : riverside", "The Mill, by the river.")
    [('customer rating', '5 out of 5')]
    """
    slots = parse_meaning(meaning)
    words = _words(text)
    others = words
    for slot, value in slots:
        if slot in ("name", "near"):
            others = _without(others, value)
    return [
        (slot, value)
        for slot, value in slots
        if not _is_said(slot, value, words if slot in ("name", "near") else others)
    ]


def parse_meaning(meaning: str) -> list[tuple[str, str]]:
    """Splits a meaning representation into (slot, value), slots in lower case.

    >>> parse_meaning("name : The Mill | familyFriendly : yes")
    [('name', 'The Mill'), ('family friendly', 'yes')]
    >>> parse_meaning("name[The Mill], eatType[pub]")
    [('name', 'The Mill'), ('type', 'pub')]
    """
    pairs = re.findall(r"(\w[\w ]*)\[([^\]]*)\]", meaning)
    if not pairs:
        parts = (part.partition(":") for part in meaning.split("|"))
        pairs = [(slot.strip(), value.strip()) for slot, colon, value in parts if colon]
    return [(_SLOTS.get(slot.lower(), slot.lower()), value) for slot, value in pairs if value]


_SLOTS: Final = {
    "eattype": "type",
    "pricerange": "price",
    "price range": "price",
    "customerrating": "customer rating",
    "familyfriendly": "family friendly",
}


def _is_said(slot: str, value: str, text: str) -> bool:
    if slot == "price":
        return _price_is_said(_words(value), text)
    if slot == "customer rating":
        return _rating_is_said(_words(value), text)
    if slot == "family friendly" and value.lower() in _FRIENDLY:
        return _friendliness(text) == _FRIENDLY[value.lower()]
    return bool(re.search(_PHRASES.get((slot, value.lower()), _literal(value)), text))


# --- words -------------------------------------------------------------------------------------------------------


def _words(text: str) -> str:
    """Normalises to lower case without accents; words and . , £ + are separated by spaces, all other marks removed.

    >>> _words("Café Rouge isn't far - it's £20-25!")
    'cafe rouge is not far it £ 20 25 .'
    """
    text = "".join(char for char in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(char))
    text = re.sub(r"\bcan ?not\b|\bcan ?['’]t\b", "can not", text)
    text = re.sub(r"n ?['’]t\b", " not", text)
    text = re.sub(r" ?['’] ?(?:s|m|re|ve|ll|d)\b", "", text)
    text = re.sub(r"[.;!?|]+(?!\d)", " . ", text)
    return " ".join(_AMOUNTS.get(word, word) for word in re.findall(r"[^\W_]+|[.,£+]", text))


_AMOUNTS: Final = {"ten": "10", "fifteen": "15", "twenty": "20", "thirty": "30"}


def _literal(value: str) -> str:
    words = _words(value).removeprefix("the ")
    return rf"(?<!\w){re.escape(words)}(?:e?s)?(?!\w)" if words else r"(?!)"


def _without(text: str, value: str) -> str:
    return re.sub(_literal(value), "_", text)


_PHRASES: Final = {
    ("food", "english"): r"\b(?:english|british)\b",
    ("type", "coffee shop"): r"\bcoffee ?(?:shop|house|bar|place)|\bcafes?\b",
    ("area", "riverside"): r"\briver|\bwaterfront\b",
    ("area", "city centre"): (
        r"(?<!outside )(?<!outside the )(?<!outside of )(?<!outside of the )\b(?:city|town) cent(?:re|er)"
        r"|\bcent(?:re|er) (?:[.] )?of (?:the )?(?:city|town)|\bheart of the (?:city|town)|\bdowntown\b"
    ),
}


# --- prices and ratings ------------------------------------------------------------------------------------------

_LOW, _MIDDLE, _HIGH = "low", "middle", "high"

# Words that only describe prices, and adjectives that also suit ratings.
_PRICE_WORDS: Final = {
    _LOW: "cheap cheaply cheaper cheapest inexpensive affordable affordably economical budget bargain",
    _MIDDLE: "",
    _HIGH: "expensive pricey pricy pricier costly upscale",
}
_ADJECTIVES: Final = {
    _LOW: "low lower lowly lowest poor poorly bad badly terrible terribly disappointing",
    _MIDDLE: "average averagely averaged mid middle medium moderate moderately moderated moderating reasonable "
    "reasonably fair fairly decent decently mediocre ok okay normal standard",
    _HIGH: "high higher highly highest good great excellent excellently well top best outstanding superb favourable "
    "exceptional exceptionally perfect fantastic",
}
_ABOUT_PRICES: Final = (
    "price prices priced pricing prize prizes cost costs costing range ranges ranged fee fees charge charges charging"
)
_ABOUT_RATINGS: Final = (
    "rate rated rates rating ratings review reviews reviewed score scores scored scoring rank ranked ranking star "
    "stars customer customers costumer feedback reputation regarded recommended recommendations satisfaction"
)


def _by_word(levels: dict[str, str]) -> dict[str, str]:
    return {word: level for level, words in levels.items() for word in words.split()}


_LEVEL_OF_PRICE_WORD: Final = _by_word(_PRICE_WORDS)
_LEVEL_OF_ADJECTIVE: Final = _by_word(_ADJECTIVES)
_ABOUT: Final = _by_word({"price": _ABOUT_PRICES, "rating": _ABOUT_RATINGS})
_REACH: Final = 5  # maximum distance in words between an adjective and the word it describes

_NUMBERS: Final = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_STARS: Final = {"1": _LOW, "2": _LOW, "3": _MIDDLE, "4": _HIGH, "5": _HIGH}


def _levels(text: str, about: str) -> set[str]:
    """Returns the levels of price or rating that a text states in words."""
    words = re.sub(r"\b(high|low) (?:end|class)\b", r"\1 cost", text).split()
    found = set()
    for place, word in enumerate(words):
        if about == "price" and word in _LEVEL_OF_PRICE_WORD:
            level = _LEVEL_OF_PRICE_WORD[word]
            before = words[max(0, place - 2) : place]
            if "somewhat" in before or _LEVEL_OF_ADJECTIVE.get(" ".join(before[-1:])) == _MIDDLE:
                level = _MIDDLE  # as in "moderately expensive"
            if "not" not in before:
                found.add(level)
        elif word in _LEVEL_OF_ADJECTIVE and _nearest(words, place) == about:
            before, after = words[max(0, place - 2) : place], words[place + 1 : place + 2]
            # An adjective before another only grades it: fairly low, lower than average, not very good.
            if {"not", "than"} & set(before) or set(after) & _LEVEL_OF_ADJECTIVE.keys():
                continue
            found.add({"above": _HIGH, "below": _LOW}.get(before[-1] if before else "", _LEVEL_OF_ADJECTIVE[word]))
    return found


def _nearest(words: Sequence[str], place: int) -> str | None:
    """Returns what an adjective describes: the nearest such word in its sentence; conjunctions count as three words."""

    def distances(step: int) -> Iterator[tuple[float, str]]:
        distance, other = 0.0, place + step
        while 0 <= other < len(words) and distance < _REACH and words[other] != ".":
            distance += 3 if words[other] in (",", "and", "but", "with") else 1
            if words[other] in _ABOUT:
                yield distance + (0.5 if step < 0 else 0), _ABOUT[words[other]]
            other += step

    return min([*distances(1), *distances(-1)], default=(0, None))[1]


def _price_is_said(value: str, text: str) -> bool:
    amounts = re.findall(r"\d+", value)
    if not amounts:
        level = _LEVEL_OF_PRICE_WORD.get(value) or _LEVEL_OF_ADJECTIVE.get(value)
        if level is None:
            return bool(re.search(_literal(value), text))
        return level in _levels(text, "price") | _levels_of_amounts(text)
    if len(amounts) > 1:
        level, said = _MIDDLE, rf"\b{amounts[0]}\b(?: \S+){{0,3}} {amounts[-1]}\b"
    elif value.startswith(("less", "under", "below", "up to")):
        level, said = _LOW, rf"{_not_after('more than', 'over', 'above')}\b{amounts[0]}\b(?!(?: to| and)?(?: £)? \d)"
    else:
        level, said = _HIGH, rf"{_not_after('less than', 'under', 'below')}\b{amounts[0]}\b"
    return bool(re.search(said, text)) or level in _levels(text, "price")


def _not_after(*phrases: str) -> str:
    return "".join(f"(?<!{phrase} )(?<!{phrase} £ )" for phrase in phrases)


def _levels_of_amounts(text: str) -> set[str]:
    """Returns the levels of price that a text states as amounts of money."""
    forms = {
        _LOW: r"\b(?:less|lower|cheaper) than(?: £)? \d+|\b(?:under|below|up to)(?: £)? \d+",
        _MIDDLE: r"\b\d\d(?: £| to| and| pounds| euros| £ to){0,3} \d\d\b",
        _HIGH: r"\b(?:more|higher) than(?: £)? \d+|\b(?:over|above)(?: £)? \d+|\b\d\d \+",
    }
    return {level for level, form in forms.items() if re.search(form, text)}


def _rating_is_said(value: str, text: str) -> bool:
    wanted = re.match(r"([1-5]|one|two|three|four|five)\b", value)
    number = _NUMBERS.get(wanted[1], wanted[1]) if wanted else None
    level = _STARS[number] if number else _LEVEL_OF_ADJECTIVE.get(value)
    if level is None:
        return bool(re.search(_literal(value), text))
    given = {_NUMBERS.get(digit, digit) for match in _RATING_NUMBER.findall(text) for digit in match if digit}
    if given:
        return number in given if number else level in {_STARS[digit] for digit in given}
    return level in _levels(text, "rating")


_DIGIT: Final = r"([1-5]|one|two|three|four|five)"
_RATING_NUMBER: Final = re.compile(
    rf"\b{_DIGIT} (?:out of|out|of|to|stars? out of) (?:5|five)\b|\b{_DIGIT} stars?\b|\b{_DIGIT} 5\b"
    rf"|\b(?:rat\w+|scor\w+|review\w*)(?: is| of| as| at| a| an){{0,2}} {_DIGIT}\b(?! pounds)"
)


# --- family-friendliness -----------------------------------------------------------------------------------------

_FRIENDLY: Final = {"yes": True, "no": False}
_CHILDREN: Final = r"\b(?:famil(?:y|ies)|child|children|childs|kids?|youngsters|toddlers|all ages|little ones)\b"
_NO: Final = (
    r"\b(?:not(?! only)|no|non|none|nor|never|un|without|isn|aren|unsuitable|inappropriate|prohibits?|discourages?)\b"
)
_UNFRIENDLY: Final = re.compile(
    # A negation up to six words before, unless something else is negated; or up to four words after.
    rf"{_NO}(?: (?!and\b|but\b|(?<!friendly )with\b|{_NO})[^\W_]+){{0,6}} {_CHILDREN}"
    rf"|{_CHILDREN}(?: (?!and\b|but\b)[^\W_]+){{0,4}} (?:{_NO}(?: really| very| too| be)?"
    r" (?:friendly|welcome\w*|allowed|suitable|permitted|recommended|advised|appropriate|accepted|catered|visit|go)"
    r"|unfriendly|unwelcome|prohibited|banned|at home)\b"
    rf"|{_CHILDREN}(?: friendly| \.)* (?:no|free)\b|\bunfriendly\b"
    r"|\badults? (?:only|themed|oriented|establishment|environment|setting|coffee|restaurant|pub|place|venue|crowd)\b"
    r"|\b(?:only|just|more|intended|designed|exclusively|suited|suitable|geared) (?:for|to|towards) adults?\b"
)


def _friendliness(text: str) -> bool | None:
    """Whether a text calls a place family-friendly; None if it does not say."""
    if _UNFRIENDLY.search(text):
        return False
    return True if re.search(_CHILDREN, text) else None

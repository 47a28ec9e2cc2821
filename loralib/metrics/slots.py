"""Slot error rate: is every value of a meaning representation said in the text?

A slot counts as an error if its value is not said.  Names, places, foods and kinds must stand in the text as they
are; for prices, ratings and family-friendliness, which English says in many ways, the families of phrases below count.
Case, hyphens and the blanks that tokenised data puts around punctuation make no difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SlotErrors", "missing_slots", "parse_meaning", "slot_error_rate"]


@dataclass(frozen=True)
class SlotErrors:
    """A slot error rate and how it was made.

    Attributes:
        errors: values that are not said.
        slots: values in all.
    """

    errors: int
    slots: int

    @property
    def value(self) -> float:
        """The share of values that are not said, from 0 to 1."""
        return self.errors / self.slots if self.slots else 0.0

    @property
    def signature(self) -> str:
        """How the score was made."""
        return "SER|values:said|case:lc|phrases:e2e|version:1"


def slot_error_rate(meanings: Sequence[str], texts: Sequence[str]) -> SlotErrors:
    """Counts the values of meaning representations that texts leave out.

    Args:
        meanings: E2E meaning representations, ``name : X | food : Y | ...`` (or ``name[X], food[Y]``).
        texts: one for each.

    >>> slot_error_rate(["name : Aromi | price : cheap | family friendly : no"], ["Aromi is inexpensive ."])
    SlotErrors(errors=1, slots=3)
    """
    missing = [missing_slots(meaning, text) for meaning, text in zip(meanings, texts, strict=True)]
    return SlotErrors(sum(map(len, missing)), sum(len(parse_meaning(meaning)) for meaning in meanings))


def missing_slots(meaning: str, text: str) -> list[tuple[str, str]]:
    """Returns the slots of a meaning representation whose value a text does not say.

    >>> missing_slots("name : The Mill | customer rating : 5 out of 5 | area : riverside", "The Mill, by the river.")
    [('customer rating', '5 out of 5')]
    """
    plain = _plain(text)
    return [(slot, value) for slot, value in parse_meaning(meaning) if not re.search(_pattern(slot, value), plain)]


def parse_meaning(meaning: str) -> list[tuple[str, str]]:
    """Splits a meaning representation into (slot, value), slots in lower case.

    >>> parse_meaning("name : The Mill | familyFriendly : yes")
    [('name', 'The Mill'), ('family friendly', 'yes')]
    >>> parse_meaning("name[The Mill], eatType[pub]")
    [('name', 'The Mill'), ('type', 'pub')]
    """
    pairs = re.findall(r"(\w+)\[([^\]]*)\]", meaning)
    if not pairs:
        parts = (part.partition(":") for part in meaning.split("|"))
        pairs = [(slot.strip(), value.strip()) for slot, colon, value in parts if colon]
    return [(_SLOTS.get(slot.lower(), slot.lower()), value) for slot, value in pairs if value]


_SLOTS = {
    "eattype": "type",
    "pricerange": "price",
    "customerrating": "customer rating",
    "familyfriendly": "family friendly",
}


def _plain(text: str) -> str:
    """Lower case, hyphens as blanks, single blanks, none around the signs that tokenised data sets apart."""
    text = re.sub(r"[-‐-―_]", " ", text.lower().replace("’", "'"))
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"(?<=£) | (?=['.,;:!?])", "", text).strip()


def _near(first: str, second: str) -> str:
    """Either word before the other, with at most three words and no comma between them."""
    between = r"(?: [\w']+){0,3} "
    return rf"\b(?:{first})\b{between}(?:{second})\b|\b(?:{second})\b{between}(?:{first})\b"


_PRICES = {
    "cheap": r"\b(?:cheap|cheaply|inexpensive|affordable|budget)\b|\blow (?:price|cost)"
    r"|\bprices?(?: range)? (?:is|are) low",
    "moderate": r"\b(?:moderate|moderately|mid price|mid priced|mid range|average price|averagely|reasonabl[ey])",
    "high": r"\b(?:expensive|pricey|costly)\b|\bhigh(?:er)? (?:price|cost|end)|\bprices?(?: range)? (?:is|are) high",
}
_RATINGS = {
    "low": "low|lowly|poor|poorly|bad|badly",
    "average": "average|mediocre|moderate|okay|ok|fair",
    "high": "high|highly|excellent|excellently|great|well",
}
_NUMBERS = {"1": "one", "2": "two", "3": "three", "4": "four", "5": "five"}
_CHILDREN = r"famil(?:y|ies)|child|children|kids?"
_WELCOME = r"friendly|welcome|welcomes|welcoming|welcomed|suitable|oriented|allowed"
_UNWELCOME = (
    rf"\badults?(?: only|s only)\b|\b(?:not|no|non|isn't|aren't|un)\b(?: [\w']+){{0,3}} (?:{_CHILDREN})\b"
    rf"|\b(?:{_CHILDREN})\b(?: [\w']+){{0,2}} (?:(?:not|aren't|isn't)(?: [\w']+)? (?:{_WELCOME})|unwelcome)\b"
)


def _pattern(slot: str, value: str) -> str:
    value = _plain(value)
    literal = rf"\b{re.escape(value)}" if value[:1].isalnum() else re.escape(value)
    if value[-1:].isalnum():
        literal += r"(?:s|es)?\b"
    if slot == "price":
        return f"{literal}|{_amount(value)}" if "£" in value else f"{_PRICES.get(value, literal)}"
    if slot == "customer rating":
        stars = re.fullmatch(r"(\d) out of 5", value)
        if stars:
            number = f"(?:{stars[1]}|{_NUMBERS.get(stars[1], stars[1])})"
            return rf"\b{number} (?:out )?of (?:5|five)\b|\b{number} stars?\b"
        words = _RATINGS.get(value)
        return _near(words, r"rat\w+|reviews?|reviewed|regarded") if words else literal
    if slot == "family friendly":
        if value == "no":
            return _UNWELCOME
        return rf"^(?!.*(?:{_UNWELCOME})).*(?:{_near(_CHILDREN, _WELCOME)}|\b(?:{_CHILDREN})\b[ ,]+(?:{_WELCOME})\b)"
    if value == "riverside":
        return rf"{literal}|\briver side\b|\b(?:by|near|on|along|beside) the river\b"
    if value == "city centre":
        return r"\bcity cent(?:re|er)\b|\bcent(?:re|er) of (?:the )?city\b"
    return literal


def _amount(value: str) -> str:
    """Phrases for ``less than £20``, ``more than £30`` and ``£20 25`` (the hyphen is a blank by now)."""
    numbers = re.findall(r"\d+", value)
    if value.startswith("less than"):
        return rf"\b(?:less than|under|below|up to|cheaper than) (?:£|euros? )?{numbers[0]}\b|{_PRICES['cheap']}"
    if value.startswith("more than"):
        return rf"\b(?:more than|over|above|upwards of) (?:£|euros? )?{numbers[0]}\b|{_PRICES['high']}"
    return rf"£?{numbers[0]}\b(?: to| and)? £?{numbers[-1]}\b"

r"""Tokenizes like Stanford CoreNLP 3.4.1's PTBTokenizer, for METEOR, ROUGE-L and CIDEr.

The official scorers of E2E and of COCO captions run ``PTBTokenizer -preserveLines -lowerCase`` in Java and then drop
punctuation; this module returns the same words without Java. It works like that lexer: at every position the rule with
the longest match wins, and the earlier rule if several are equally long. Lookahead counts towards the length of a
match, which is why "Inc.x" and "Inc.xy" are split differently.

The conventions are the Penn Treebank's (Marcus, Santorini and Marcinkiewicz 1993): "don't" is "do n't", brackets are
"-lrb-" and "-rrb-", abbreviations keep their full stop, pound signs are "#". Three surprising properties are those of
the original: some words contain a no-break space ("5 1/2", telephone numbers); characters unknown to it, such as emoji,
vanish; and a line's last full stop can depend on how the next line begins (see `ptb_lines`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

__all__ = ["PUNCTUATION", "ptb_instances", "ptb_lines", "ptb_words"]

PUNCTUATION: Final = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
"""What the official scorers drop. Tokens are already in lower case by then, so the brackets in fact stay."""


def ptb_lines(texts: Sequence[str]) -> list[tuple[str, ...]]:
    """Tokenizes texts as the lines of one file.

    Args:
        texts: the lines, for instance all references of a data set in order; line breaks within a text count as spaces.

    Returns:
        The words of each: CoreNLP 3.4.1's ``PTBTokenizer -preserveLines -lowerCase`` output without `PUNCTUATION`.

    >>> ptb_lines(["They play in Serie A.", "The club won.", "He met Q.", "Nobody knows."])
    [('they', 'play', 'in', 'serie', 'a'), ('the', 'club', 'won'), ('he', 'met', 'q.'), ('nobody', 'knows')]
    """
    lines = [_LINE_ENDS.sub(" ", text) for text in texts]
    words: list[tuple[str, ...]] = []
    after = ""
    for line in reversed(lines):
        words.append(_words(line, after))
        after = f"\n{line}{after}"[:_LOOKAHEAD]
    return words[::-1]


def ptb_instances(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str]
) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Tokenizes as the official scorers do: one file of all hypotheses, one of all references in order.

    Returns:
        The words of each hypothesis, and of each of its references.
    """
    lines = iter(ptb_lines([text for texts in references for text in texts]))
    ideals = [[next(lines) for _ in texts] for texts in references]
    return list(zip(ptb_lines(hypotheses), ideals, strict=True))


def ptb_words(text: str) -> tuple[str, ...]:
    """Tokenizes one text, like `ptb_lines` with no line after it.

    >>> " ".join(ptb_words("It's £20-25 (Mr. Smith can't pay), isn't it?"))
    "it 's # 20-25 -lrb- mr. smith ca n't pay -rrb- is n't it"
    >>> ptb_words("A family-friendly café – “cheap” …")
    ('a', 'family-friendly', 'café', 'cheap')
    """
    return ptb_lines([text])[0]


@lru_cache(maxsize=65536)  # references repeat, and three metrics tokenize the same texts
def _words(line: str, after: str) -> tuple[str, ...]:
    # Splitting only at spaces keeps no-break spaces; but like the scorers, rstrip() removes one at the end.
    tokens = " ".join(_tokens(line + after, len(line))).rstrip()
    return tuple(word for word in tokens.split(" ") if word and word not in PUNCTUATION)


def _tokens(text: str, end: int) -> Iterator[str]:
    """Yields the tokens of text[:end] in lower case; rules may look ahead past `end`."""
    rules = _rules()
    position = 0
    while position < end:
        if plain := _PLAIN_WORDS.match(text, position, end):
            yield from (_TWO_WORDS.get(word, word) for word in plain[0].lower().split())
            position = plain.end()
            continue
        longest, token, next_position = position, "", position + 1  # a character that matches no rule vanishes
        for rule in rules:
            match = rule.pattern.match(text, position)
            if match and match.end() > longest:
                longest, token, next_position = match.end(), rule.write(match[1]), match.end(1)
        yield token.lower()
        position = next_position


_LINE_ENDS: Final = re.compile("\r\n|[\n\r\v\f\x85\u2028\u2029]")
_LOOKAHEAD: Final = 24  # characters of the following lines; the longest word looked for is "Additionally"

# Words that no rule could extend, and spaces: most of any text, and matched a hundred times faster than by the rules.
_PLAIN_WORDS: Final = re.compile("(?:[A-Za-z]+ )*[A-Za-z]+(?=,? )| [ \t\u00a0\u2000-\u200a\u3000]*")
_TWO_WORDS: Final = {
    word.replace(" ", ""): word for word in ("can not", "gon na", "got ta", "wan na", "lem me", "gim me")
}


# --- how tokens are written --------------------------------------------------------------------------------------


def _plain(token: str) -> str:
    return token.replace("\u00ad", "")  # soft hyphens only mark where a word may be broken


def _nothing(token: str) -> str:
    return ""


def _one(token: str) -> str:
    """Replaces spaces by no-break spaces, so that the token remains one word."""
    return token.replace(" ", "\u00a0")


def _bracketed(token: str) -> str:
    return re.sub(r"[()\[\]{}]", lambda bracket: _BRACKETS[bracket[0]], token)


def _phone(token: str) -> str:
    return _bracketed(_one(token))


def _face(token: str) -> str:
    return re.sub("[()]", lambda bracket: _BRACKETS[bracket[0]], token)


def _straight(token: str) -> str:
    return re.sub("[\u0092\u2019]|&apos;", "'", re.sub("[\u0091\u2018\u201b]", "`", token))


def _quotes(token: str) -> str:
    return token.translate(_QUOTES)


def _ampersand(token: str) -> str:
    return token.replace("&amp;", "&")


def _long_dash(token: str) -> str:
    return token if len(token) > 4 else ""  # shorter ones would become "-" or "--", which are punctuation


_BRACKETS: Final = dict(zip("()[]{}", "-LRB- -RRB- -LSB- -RSB- -LCB- -RCB-".split(), strict=True))
_FRACTIONS: Final = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_CURRENCIES: Final = {"¢": "cents", "£": "#", "¤": "$", "\x80": "$", "₠": "$", "€": "$"}
_QUOTES: Final = str.maketrans(
    dict.fromkeys("\u0092\u2019\u203a", "'")
    | dict.fromkeys("\u0091\u2018\u201b\u2039", "`")
    | dict.fromkeys("\u0093\u201c\u00ab", "``")
    | dict.fromkeys("\u0094\u201d\u00bb", "''")
)


# --- abbreviations and the like ----------------------------------------------------------------------------------

# Those that can end a sentence are matched with two characters of lookahead (see `_TABLE`), the others with none.
_CAN_END_A_SENTENCE: Final = (
    "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu(?:rs)?|Fri"
    "|Ala|Ariz|Calif|Colo|Conn|Ct|Dak|Fla|Ga|Ind|Kans?|Ky|Md|Mich|Minn|Mo|Mont|Neb|Nev|Okla|Penn|Tenn|Va|Vt|Wisc?|Wyo"
    "|Assn|Bancorp|Bhd|Bros|Corp|Cos?|Inc|Intl|Ltd|Plc|Sys|Univ"
    "|Bldg|Blvd|Rd|Rt|Jr|Sr|Esq|(?:Ed|Ph)[.]D|al|est|etc|ext|seq|sq|tel"
)
_IN_LOWER_CASE_A_WORD: Final = "A(?i:rk|z)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)"
_PROPRIETARY: Final = "(?i:pp?t)[ey]s?"
_STAND_BEFORE_A_NAME: Final = (
    "Mr|Mrs|Ms|Messrs|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt|Ste?|Ave|Pres|Lieut"
    "|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc|Invt|Elec|Natl|Dept|Ph|Cie"
    "|Cf|Treas|vs|Alex|Wm|Jos"
)
_MANUFACTURING: Final = "(?i:m)[ft](?i:g)"
_STAND_BEFORE_A_NUMBER: Final = "art|ca|figs?|nos?|op|pp|prop"
# A single letter with a full stop is an initial, unless a word from this list follows, capitalised or in capitals.
_START_A_SENTENCE: Final = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|One"
    "|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)
_FILE_TYPES: Final = (
    "bat|bmp|cgi|class|cpp|c|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav"
    "|x|xml|zip"
)


# --- characters --------------------------------------------------------------------------------------------------

# Marks that continue a word although Unicode does not classify them as letters.
_MARKS: Final = (
    "\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0378-\u0379\u0384-\u0385\u03f6"
    "\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf\u05c1-\u05c2\u05c4-\u05c5\u05c7\u0615-\u061a\u064b-\u065e"
    "\u0670\u06d6-\u06e4\u06e7-\u06ed\u06fd-\u06fe\u070f\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3"
    "\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962-\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7-\u09c8"
    "\u09cb-\u09cd\u09d7\u09e2-\u09e3\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82"
    "\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31"
    "\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
# Symbols that form a token each.
_SYMBOLS: Final = (
    r"$%&+/;=\\^|~"
    "\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b1\u00b4\u00b6-\u00b8\u00bf\u00d7\u00f7\u037e\u0387\u0589\u05be"
    "\u05c0\u05c3\u05c6\u05f3-\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e-\u061f\u066a\u066d\u06d4"
    "\u0700-\u070d\u07f6-\u07f8\u0964-\u0965\u0e3f\u0e4f\u1fbd\u2016-\u2017\u2020-\u2023\u2030-\u2038\u203b"
    "\u203e-\u2042\u2044\u207a-\u207e\u208a-\u208e\u20a4\u2100-\u2101\u2103-\u2106\u2108-\u2109\u2114\u2116-\u2118"
    "\u211e-\u2123\u2125\u2127\u2129\u212e\u213a-\u213b\u2140-\u2144\u214a-\u214d\u214f\u2155-\u215e"
    "\u2190-\u2bff\u3001-\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0-\uffe1"
    "\uffe5-\uffe6"
)


def _characters(category: str) -> str:
    """Returns the inside of a [...] with a Unicode category, limited to the basic plane like CoreNLP's rules."""
    ranges: list[list[int]] = []
    for code in range(0x10000):
        if unicodedata.category(chr(code)).startswith(category):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in ranges)


# --- rules -------------------------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """A pattern (group 1 is the token, the rest lookahead), and a function that writes it as words between spaces."""

    pattern: re.Pattern[str]
    write: Callable[[str], str]


# Named parts of rules. A: a letter; D: a digit; L: a character of words; AD, LD: the same or a digit.
_PARTS: Final = {
    "SPACE": "[ \t\u00a0\u2000-\u200a\u3000]",
    "HYPHEN": "[-_\u058a\u2010\u2011]",
    "APOS": "(?:['\u0092\u2019]|(?i:&apos;))",
    "TICK": "(?:['\u0092\u2019`\u0091\u2018\u201b]|(?i:&apos;))",
    "WORD": "{L}{LD}*(?:[.!?]{L}{LD}*)*",
    "CLITIC": "{APOS}(?i:[msd]|re|ve|ll)",
    "NOT": "[nN]{TICK}[tT]",
    "NUMBER": "(?:{D}+(?:[.,:\u00ad\u066b\u066c]{D}+)*|(?:[.,:\u00ad\u066b\u066c]{D}+)+)",
    "ACRONYM": "[A-Za-z](?:[.][A-Za-z])+",
    "NAME": "(?:[dDlLoO]{TICK}{AD})?{AD}+",
    "NAMES": "{NAME}(?:{HYPHEN}{NAME})*",
    "COMPOUND": "[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{ACRONYM}[.]|[A-Za-z0-9\u00ad]+))+",
    "PARTNERS": "[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+",
    "TAG": "[A-Za-z][A-Za-z0-9_:.-]*",
    "URL": r'[^ \t\n\f\r"<>|(){}]',
    "PATH": r'[^ \t\n\f\r"<>|()]',
    "END": r'[^ \t\n\f\r"<>|.!?(){},-]',
    "WWW": r'[^ \t\n\f\r"<>|.!?(){},]',
    "HOST": "[^ \t\n\f\r\"`'<>|.!?(){},-_$]",  # the range from comma to underscore excludes digits and capitals
    "USER": r'[^ \t\n\f\r"<>|(){}\u00a0]',
    "DOMAIN": r'[^ \t\n\f\r"<>|(){}.\u00a0]',
}

_TABLE: Final[tuple[tuple[str, Callable[[str], str]], ...]] = (
    # Markup and entities.
    (r"(<[!?][A-Za-z-][^>\r\n]*>)", _one),
    ("(</?{TAG}[ ]*>)", _one),
    (r"""(<{TAG}(?:[ ]+{TAG}(?:[ ]*=[ ]*(?:'[^']*'|"[^"]*"))?)*[ ]*/?[ ]*>)""", _one),
    ("(&(?:MD|mdash|ndash);|[\u0096\u0097\u2013-\u2015])", _nothing),
    ("(&amp;)", _ampersand),
    ("(&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);)", _plain),
    # Words, and suffixes that are split off: can|not, 't|is, it|'s, do|n't.
    ("((?i:can(?=not)|(?:gon|wan)(?=na)|got(?=ta)|(?:lem|gim)(?=me)))(?i:not|na|ta|me)", _plain),
    ("('[tT])(?i:is|was)", _plain),
    ("({WORD}){CLITIC}", _plain),
    ("([A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*){NOT}", _plain),
    ("({WORD})", _plain),
    # Words with an apostrophe in them: 'n', ol', 'em; O'Neil, '90s, Ba'ath; and some listed ones.
    ("({APOS}[nN]{APOS}?|[dDjJlL]{APOS}|(?i:dunkin|somethin|ol){APOS}|{APOS}(?i:em|till?|cause))", _plain),
    ("([A-HJ-XZn]{TICK}{A}{A}+|{APOS}[2-9]0[sS]|{A}+[aeiouyAEIOUY]{TICK}[aeiouA-Z]{A}*)", _plain),
    ("((?i:cont'd[.]?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o{TICK}o|cap{APOS}n|c{APOS}est))", _plain),
    ("([yY]{APOS}){L}", _plain),
    # Addresses.
    ("((?i:https?)://{URL}+{END})", str),
    ("((?i:www)[.](?:{WWW}+[.])+[a-zA-Z]{2,4}(?:/{PATH}+{END})?)", str),
    ("((?:{HOST}+[.])+(?i:com|edu|net|org)(?:/{PATH}+{END})?)", str),
    ("((?:&lt;|<)?[a-zA-Z0-9]{USER}*@(?:{DOMAIN}+[.])*{DOMAIN}+(?:&gt;|>)?)", str),
    ("(@[a-zA-Z_][a-zA-Z_0-9]*|#{L}+)", str),
    ("({CLITIC}|{NOT})[^A-Za-z]", _straight),
    # Dates, numbers, fractions.
    ("({D}{1,2}[-/]{D}{1,2}[-/]{D}{2,4})", _plain),
    ("([-+]?{NUMBER})", _plain),
    ("([\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+))", _plain),
    (r"((?:{D}{1,4}[- \u00a0])?{D}{1,4}(?:\\?/|\u2044){D}{1,4})", _one),
    ("([¼½¾⅓⅔])", _FRACTIONS.__getitem__),
    # Names: the Treebank's own, C++, coffee-shop, AT&T, he/she.
    ("((?i:-[lr][rcs]b-|c[.]d[.]s|pro-|anti-|s(?:&|&amp;)p-500|s(?:&|&amp;)ls))", _ampersand),
    ("((?i:c[+][+]|[cf]#))", _plain),
    ("({NAMES})", _plain),
    ("({PARTNERS})", _ampersand),
    (r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})", _plain),
    # Money.
    (r"([A-Z]*\$|#)", _plain),
    ("([\x80¢£¤₠€])", _CURRENCIES.__getitem__),
    # Abbreviations.
    (
        rf"((?:(?i:{_CAN_END_A_SENTENCE})|{_IN_LOWER_CASE_A_WORD}|{_PROPRIETARY})[.])" r"[\s\S]{0,2}",
        _plain,
    ),
    (rf"((?:(?i:{_STAND_BEFORE_A_NAME})|{_MANUFACTURING}|" "{ACRONYM}|[A-Za-z])[.])", _plain),
    (rf"((?i:{_STAND_BEFORE_A_NUMBER})[.])" r"(?:{SPACE}|\n)?{D}", _plain),
    (r"({APOS}[0-9][0-9])(?:{SPACE}|\n)", _plain),
    ("((?:{WORD}|{NAMES}|{PARTNERS}|{COMPOUND})[.])[,;:\u3001]", _plain),
    (
        r"([A-Za-z])[.](?:{SPACE}|\n)+" rf"(?:{_START_A_SENTENCE}|{_START_A_SENTENCE.upper()})" r"(?:{SPACE}|\n)",
        _plain,
    ),
    # Telephone numbers: each form has its own rule, so that the longest match wins.
    (r"(\([0-9]{2,3}\)[ \u00a0]?[0-9]{3,4}[- \u00a0]?[0-9]{3,5})", _phone),
    (r"((?:\+\+?)?[0-9]{2,4}[- \u00a0][0-9]{3,4}[- \u00a0]?[0-9]{3,5})", _phone),
    (r"((?:\+\+?)?[0-9]{2,4}[- \u00a0][0-9]{2,4}[- \u00a0][0-9]{3,4}[- \u00a0]?[0-9]{3,5})", _phone),
    (r"((?:(?:\+\+?)?[0-9]{2,4}[.])?[0-9]{2,4}[.][0-9]{3,4}[.][0-9]{3,5})", _phone),
    # Emoticons.
    (r"([<>]?[:;=]['o*-]?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _face),
    (r"([\^x=~<>'-]_[\^x=~<>'-]|\([\^x=~<>'-][_.]?[\^x=~<>'-]\)|\([\^x=~<>']-[\^x=~<>'`]\))", _face),
    # Brackets, dots, quotes, dashes and others; an apostrophe may open a quotation rather than begin "'re".
    (r"([()\[\]{}])", _bracketed),
    (r"([.]{3,5}|(?:[.][ \u00a0]){2,4}[.]|[\u2026.,;:])", _nothing),
    (r"(')[A-Za-z][^ \t\n\r\u00a0]", _nothing),
    ("({CLITIC}|{NOT})", _straight),
    ("([?!]+)", _plain),
    (r"(\*+|(?:\\\*){1,3}|#+|_+|@+|<<?|>>?)", _plain),
    ("([`\u0091-\u0094\u2018-\u201f\u2039\u203a\u00ab\u00bb]{1,2})", _quotes),
    ("(''?|\"|&quot;|&apos;)", _nothing),
    ("(&lt;)", lambda token: "<"),
    ("(&gt;)", lambda token: ">"),
    ("(-+)", _long_dash),
    ("({COMPOUND})", _plain),
    (r"({LD}+(?:[.]{LD}+)*[.]" rf"(?i:{_FILE_TYPES}))" r"(?:{SPACE}|[\n.?!,])", _plain),
    (f"([{_SYMBOLS}])", _plain),
    ("(&nbsp;|{SPACE}+)", _nothing),
)


@lru_cache(maxsize=1)
def _rules() -> tuple[_Rule, ...]:
    """Compiles the rules; only on first use, because collecting Unicode's letters takes time."""
    letter, digit = _characters("L"), _characters("Nd")
    entity = "&[aeiouAEIOU](?:acute|grave|uml);"
    parts = _PARTS | {
        "A": f"[{letter}]",
        "D": f"[{digit}]",
        "AD": f"[{letter}{digit}]",
        "L": f"(?:[{letter}{_MARKS}]|{entity})",
        "LD": f"(?:[{letter}{_MARKS}{digit}]|{entity})",
    }

    def spelt_out(pattern: str) -> str:
        found = re.sub("{([A-Z]+)}", lambda part: parts[part[1]], pattern)
        return found if found == pattern else spelt_out(found)

    return tuple(_Rule(re.compile(spelt_out(pattern)), write) for pattern, write in _TABLE)

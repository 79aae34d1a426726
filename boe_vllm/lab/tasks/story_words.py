"""The words of the small stories, and their forms."""

from __future__ import annotations

from collections.abc import Iterable

SHE = ("Anna", "Clara", "Ella", "Ida", "Lena", "Mara", "Nora", "Rosa", "Vera", "Zoe")
HE = ("Ben", "Carl", "Emil", "Hugo", "Jan", "Leo", "Max", "Otto", "Paul", "Tom")
NAMES = SHE + HE

# past, "he" and "she" in the present, "they" in the present
GO = (
    ("walked", "walks", "walk"),
    ("went", "goes", "go"),
    ("ran", "runs", "run"),
    ("hurried", "hurries", "hurry"),
    ("drove", "drives", "drive"),
)
RETURN = (
    ("came", "comes", "come"),
    ("went", "goes", "go"),
    ("walked", "walks", "walk"),
)
FIND = (
    ("found", "finds", "find"),
    ("saw", "sees", "see"),
    ("bought", "buys", "buy"),
    ("took", "takes", "take"),
    ("hid", "hides", "hide"),
    ("painted", "paints", "paint"),
)
# one, many; each past, present
BE = (("was", "is"), ("were", "are"))
# past, present
GIVE = (("gave", "gives"), ("sold", "sells"), ("lent", "lends"), ("sent", "sends"))
KEEP = ("kept", "keeps")
SAY = (("said", "says"), ("shouted", "shouts"), ("sang", "sings"), ("whispered", "whispers"))
REPEAT = (("repeated", "repeats"), ("wrote", "writes"), ("answered", "answers"))
REMEMBER = (("remembered", "remembers"), ("believed", "believes"))
RAIN = (("rained", "rains"), ("snowed", "snows"))
BLOW = (("blew", "blows"), ("stopped", "stops"))
COME = ("came", "comes")
BEGIN = ("began", "begins")
ANIMAL_VERBS = (
    ("sneezed", "sneezes"),
    ("laughed", "laughs"),
    ("vanished", "vanishes"),
    ("danced", "dances"),
    ("slept", "sleeps"),
)
KNOW = ("knew", "knows")

TIMES = ("morning", "evening", "day", "night")
SEASONS = ("week", "winter", "summer", "year")
PLACES = (
    "market",
    "river",
    "forest",
    "school",
    "garden",
    "beach",
    "farm",
    "castle",
    "library",
    "station",
    "mill",
    "church",
    "harbour",
    "village",
)
ANIMALS = ("dog", "cat", "goat", "horse", "sister", "brother", "mother", "father")
THINGS = (
    ("apple", "apples"),
    ("book", "books"),
    ("key", "keys"),
    ("coin", "coins"),
    ("shell", "shells"),
    ("lamp", "lamps"),
    ("egg", "eggs"),
    ("flower", "flowers"),
    ("boat", "boats"),
    ("stone", "stones"),
    ("letter", "letters"),
    ("hat", "hats"),
    ("kite", "kites"),
    ("drum", "drums"),
    ("ring", "rings"),
    ("cake", "cakes"),
)
COLOURS = (
    "red",
    "blue",
    "green",
    "old",
    "small",
    "golden",
    "heavy",
    "broken",
    "white",
    "round",
)
QUALITIES = ("beautiful", "strange", "expensive", "useful", "cheap", "rare", "perfect", "ugly")
MOODS = ("happy", "tired", "hungry", "cold", "sad", "proud", "angry", "afraid")
NUMBERS = ("nothing", "one", "two", "three", "four", "five", "six")
BY = ("under", "near", "behind")
SPOTS = ("tree", "bridge", "table", "door", "wall", "hill", "well", "bench")
SPEAKERS = ("moon", "king", "queen", "wolf", "bird", "ghost", "snow", "night")
HOW_OFTEN = ("never", "always", "often", "seldom")
DEEDS = ("lies", "wins", "waits", "listens", "forgets", "returns", "wakes", "falls")

PARTICLES = tuple(
    """one last every yesterday these days today , . " and to the with they she he their his her at
    home it of them then soon later but because suddenly nobody winter wind why everyone""".split()
)


def _flat(value: str | Iterable) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    else:
        for part in value:
            yield from _flat(part)


ALL = frozenset(
    word for name, value in list(globals().items()) if name.isupper() for word in _flat(value)
)
"""Every word of a story, names and punctuation among them."""

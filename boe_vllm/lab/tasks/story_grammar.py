"""The grammar of small English stories, whose sentences agree with each other.

A story has a hero and perhaps a friend, is told in the past or in the present, and is about some
things. What is said once holds to its end: names and the pronouns for them, tense, number, how many
things are left after some were given away, and what somebody said, which may come back word for
word. So a text of this source can be wrong in ways that no single sentence shows.

The memory of a story: `tense` (0 past, 1 present), `hero` and `friend` (names), `both` (whether the
friend came along), `count` (how many things are left), `colour` (or None) and `thing` (singular and
plural), `animal` (or None), `quote` (the words of it that are chosen so far).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from boe_vllm.lab.tasks import story_words as words
from boe_vllm.lab.tasks.grammar import Alternative, Grammar, Memory, Rule

END = "<|endoftext|>"
"""What ends a story; another one follows."""

STORY = (
    "OPENING HERO COMPANY GO to the PLACE BESIDE . "
    "THEY FIND COUNT COLOUR THING WHERE . EVENT "
    f"at last HEROES RETURN home with HAUL . MORAL {END}"
)


def equally(options: Iterable[str], name: str | None = None) -> list[Alternative]:
    """Alternatives of equal weight; the memory keeps the chosen one under `name`, if given."""
    return [(1.0, option, {} if name is None else {name: option}) for option in options]


def told(memory: Memory, verbs: Iterable[Sequence[str]]) -> list[Alternative]:
    """Verbs for one person in the story's tense."""
    return equally(verb[memory["tense"]] for verb in verbs)


def told_of_them(memory: Memory, verbs: Iterable[Sequence[str]]) -> list[Alternative]:
    """Verbs in the story's tense for the hero, or for both friends where they are on the way."""
    plural = memory["tense"] and memory["both"]
    return equally(verb[2 if plural else memory["tense"]] for verb in verbs)


# ---- who and what ------------------------------------------------------------------------------


def opening(memory: Memory) -> list[Alternative]:
    """When it was, which says in which tense the story is told."""
    past, present = {"tense": 0}, {"tense": 1}
    return [
        (0.3, "one TIME ,", past),
        (0.2, "last SEASON ,", past),
        (0.1, "yesterday ,", past),
        (0.2, "every TIME ,", present),
        (0.1, "these days ,", present),
        (0.1, "today ,", present),
    ]


def company(memory: Memory) -> list[Alternative]:
    """A friend who comes along, or nobody."""
    return [(0.4, "and FRIEND", {"both": True}), (0.6, "", {"both": False})]


def friend(memory: Memory) -> list[Alternative]:
    """The friend's name: the one that is known, or a new one."""
    if "friend" in memory:
        return equally([memory["friend"]])
    return equally((name for name in words.NAMES if name != memory["hero"]), "friend")


def they(memory: Memory) -> list[Alternative]:
    """The pronoun for the hero, or for both friends."""
    gender = "she" if memory["hero"] in words.SHE else "he"
    return equally(["they" if memory["both"] else gender])


def their(memory: Memory) -> list[Alternative]:
    """What belongs to the hero, or to both friends."""
    gender = "her" if memory["hero"] in words.SHE else "his"
    return equally(["their" if memory["both"] else gender])


def heroes(memory: Memory) -> list[Alternative]:
    """The hero by name, and the friend who came along."""
    return equally(["NAME and FRIEND" if memory["both"] else "NAME"])


def speaker(memory: Memory) -> list[Alternative]:
    """Who speaks: the hero, or the friend if there is one."""
    return equally(memory[name] for name in ("hero", "friend") if name in memory)


def beside(memory: Memory) -> list[Alternative]:
    """An animal or a relative, who may do something later, or nobody."""
    return [(0.4, "with THEIR CHOOSE_ANIMAL", {}), (0.6, "", {"animal": None})]


def count(memory: Memory) -> list[Alternative]:
    """How many things."""
    weights = (0.25, 0.15, 0.15, 0.15, 0.15, 0.15)
    return [(w, words.NUMBERS[k], {"count": k}) for k, w in enumerate(weights, start=1)]


def colour(memory: Memory) -> list[Alternative]:
    """What they are like, or nothing about that."""
    share = 0.5 / len(words.COLOURS)
    return [(0.5, "", {"colour": None})] + [(share, c, {"colour": c}) for c in words.COLOURS]


def thing(memory: Memory) -> list[Alternative]:
    """Which things, in the number that was said."""
    many = memory["count"] > 1
    return [(1.0, forms[many], {"thing": forms}) for forms in words.THINGS]


def colour_again(memory: Memory) -> list[Alternative]:
    """What the things are like, if that was said."""
    return equally([memory["colour"] or ""])


def thing_again(memory: Memory) -> list[Alternative]:
    """The things that are left, in their number."""
    return equally([memory["thing"][memory["count"] > 1]])


def the_things(memory: Memory) -> list[Alternative]:
    """The beginning of what is said of the things: how many there are, if it is not one."""
    return equally([f"the {words.NUMBERS[memory['count']]}" if memory["count"] > 1 else "the"])


def haul(memory: Memory) -> list[Alternative]:
    """What is left in the end."""
    number = words.NUMBERS[memory["count"]]
    return equally([f"{number} COLOUR_AGAIN THING_AGAIN" if memory["count"] else number])


# ---- what happens ------------------------------------------------------------------------------


def event(memory: Memory) -> list[Alternative]:
    """What happens next, or nothing more."""
    found: list[Alternative] = [
        (1.2, "", {}),
        (0.6, "but THEY THEY_ARE MOOD because WEATHER . EVENT", {}),
    ]
    if memory["count"]:
        found.append((1.0, "THE_THINGS COLOUR_AGAIN THING_AGAIN THINGS_ARE QUALITY . EVENT", {}))
        them = "it" if memory["count"] == 1 else "SOME of them"
        found.append((1.0, f"then NAME GIVE {them} to FRIEND and KEEP . EVENT", {}))
    if "quote" in memory:
        found.append((1.0, 'later SPEAKER REPEAT " the QUOTED_0 QUOTED_1 QUOTED_2 " . EVENT', {}))
    else:
        found.append((1.0, 'soon SPEAKER SAY " the QUOTE HOW_OFTEN DEED " . EVENT', {}))
    if memory["animal"]:
        found.append((0.8, "suddenly THEIR ANIMAL DO . EVENT", {}))
    return found


def give(memory: Memory) -> list[Alternative]:
    """The verb; the only thing is gone with it."""
    left = {"count": 0} if memory["count"] == 1 else {}
    return [(w, verb, left) for w, verb, _ in told(memory, words.GIVE)]


def some(memory: Memory) -> list[Alternative]:
    """How many are given away; the memory keeps how many are left."""
    total = memory["count"]
    return [(1.0, words.NUMBERS[k], {"count": total - k}) for k in range(1, total + 1)]


def keep(memory: Memory) -> list[Alternative]:
    """How many are left."""
    return equally([f"{words.KEEP[memory['tense']]} {words.NUMBERS[memory['count']]}"])


def things_are(memory: Memory) -> list[Alternative]:
    """The verb that agrees with how many things are left."""
    return equally([words.BE[memory["count"] > 1][memory["tense"]]])


def they_are(memory: Memory) -> list[Alternative]:
    """The verb that agrees with who is on the way."""
    return equally([words.BE[memory["both"]][memory["tense"]]])


def quote(memory: Memory, chosen: Sequence[str]) -> list[Alternative]:
    """The next word of what is said."""
    before = memory.get("quote", ())
    return [(1.0, word, {"quote": (*before, word)}) for word in chosen]


def quoted(memory: Memory, place: int) -> list[Alternative]:
    """A word of what was said, again."""
    return equally([memory["quote"][place]])


def weather(memory: Memory) -> list[Alternative]:
    """Why they felt so."""
    half: list[Alternative] = [(0.5, "nobody COME", {}), (0.5, "winter BEGIN", {})]
    return equally(["it RAIN", "the wind BLOW"]) + half


def moral(memory: Memory) -> list[Alternative]:
    """A last sentence, or none."""
    if "quote" in memory:
        return [(0.5, "", {}), (0.5, 'everyone REMEMBER " the QUOTED_0 QUOTED_1 QUOTED_2 " .', {})]
    return [(0.7, "", {}), (0.3, "nobody KNOW why .", {})]


RULES: dict[str, Rule] = {
    "STORY": lambda memory: equally([STORY]),
    "OPENING": opening,
    "TIME": lambda memory: equally(words.TIMES),
    "SEASON": lambda memory: equally(words.SEASONS),
    "HERO": lambda memory: equally(words.NAMES, "hero"),
    "COMPANY": company,
    "FRIEND": friend,
    "NAME": lambda memory: equally([memory["hero"]]),
    "HEROES": heroes,
    "SPEAKER": speaker,
    "THEY": they,
    "THEIR": their,
    "GO": lambda memory: told_of_them(memory, words.GO),
    "PLACE": lambda memory: equally(words.PLACES),
    "BESIDE": beside,
    "CHOOSE_ANIMAL": lambda memory: equally(words.ANIMALS, "animal"),
    "ANIMAL": lambda memory: equally([memory["animal"]]),
    "DO": lambda memory: told(memory, words.ANIMAL_VERBS),
    "FIND": lambda memory: told_of_them(memory, words.FIND),
    "COUNT": count,
    "COLOUR": colour,
    "THING": thing,
    "COLOUR_AGAIN": colour_again,
    "THING_AGAIN": thing_again,
    "THE_THINGS": the_things,
    "THINGS_ARE": things_are,
    "QUALITY": lambda memory: equally(words.QUALITIES),
    "WHERE": lambda memory: [(0.4, "", {}), (0.6, "BY the SPOT", {})],
    "BY": lambda memory: equally(words.BY),
    "SPOT": lambda memory: equally(words.SPOTS),
    "EVENT": event,
    "THEY_ARE": they_are,
    "MOOD": lambda memory: equally(words.MOODS),
    "WEATHER": weather,
    "COME": lambda memory: told(memory, [words.COME]),
    "BEGIN": lambda memory: told(memory, [words.BEGIN]),
    "KNOW": lambda memory: told(memory, [words.KNOW]),
    "BLOW": lambda memory: told(memory, words.BLOW),
    "RAIN": lambda memory: told(memory, words.RAIN),
    "GIVE": give,
    "SOME": some,
    "KEEP": keep,
    "SAY": lambda memory: told(memory, words.SAY),
    "QUOTE": functools.partial(quote, chosen=words.SPEAKERS),
    "HOW_OFTEN": functools.partial(quote, chosen=words.HOW_OFTEN),
    "DEED": functools.partial(quote, chosen=words.DEEDS),
    "REPEAT": lambda memory: told(memory, words.REPEAT),
    **{f"QUOTED_{k}": functools.partial(quoted, place=k) for k in range(3)},
    "RETURN": lambda memory: told_of_them(memory, words.RETURN),
    "HAUL": haul,
    "MORAL": moral,
    "REMEMBER": lambda memory: told(memory, words.REMEMBER),
}

REPRESENTATIVES: dict[str, Any] = {
    "tense": 0,
    "hero": words.SHE[0],
    "friend": words.HE[0],
    "colour": words.COLOURS[0],
    "thing": words.THINGS[0],
    "animal": words.ANIMALS[0],
}
"""One value for all those among which the choice was free."""


def alike(memory: dict[str, Any]) -> dict[str, Any]:
    """A memory of which everything that follows has the same probabilities."""
    found = {
        name: value if value is None else REPRESENTATIVES.get(name, value)
        for name, value in memory.items()
    }
    if "quote" in memory:
        first = (words.SPEAKERS[0], words.HOW_OFTEN[0], words.DEEDS[0])
        found["quote"] = first[: len(memory["quote"])]
    return found


STORIES = Grammar(RULES, "STORY", alike)
"""The source: one story after the other, each followed by `END`."""

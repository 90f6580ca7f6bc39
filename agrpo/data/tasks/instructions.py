"""A task for real models: one sentence that keeps a verifiable instruction, in the manner of IFEval (Zhou et al. 2023).

`kind` and `value` say what a verifier has to check: max_words (an integer), lowercase, contains (a word), exclamation,
begins_with (a capitalised word). The topics of the splits are disjoint: held-out prompts are about other things.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

KINDS = ("max_words", "lowercase", "contains", "exclamation", "begins_with")
WORD_LIMITS = (6, 8, 10)
ADJECTIVES = (
    "golden",
    "quiet",
    "ancient",
    "bright",
    "curious",
    "gentle",
    "rapid",
    "hidden",
    "simple",
    "strong",
    "blue",
    "warm",
    "careful",
    "distant",
    "famous",
)

# Topic: a plain sentence of at most six words; one that begins with an adjective; one that contains it; those that fit.
_WRITTEN = {
    "winter": (
        "Winter covers the fields with snow.",
        "{} winter mornings invite long walks.",
        "We enjoy the {} winter mornings.",
        "golden quiet bright gentle blue",
    ),
    "gardens": (
        "Gardens give us fruit and flowers.",
        "{} gardens grow behind the old wall.",
        "Bees love the {} gardens near us.",
        "golden quiet ancient bright hidden simple famous",
    ),
    "chess": (
        "Chess teaches players to think ahead.",
        "{} chess players win many games.",
        "Everyone admires the {} chess players here.",
        "quiet curious strong careful famous",
    ),
    "bread": (
        "Fresh bread smells wonderful every morning.",
        "{} bread fills the kitchen with joy.",
        "She shared the {} bread with us.",
        "golden simple warm famous",
    ),
    "penguins": (
        "Penguins walk slowly across the ice.",
        "{} penguins gather near the icy shore.",
        "We watched the {} penguins all day.",
        "quiet curious gentle rapid strong careful",
    ),
    "cheese": (
        "Cheese tastes better with ripe pears.",
        "{} cheese melts slowly over the soup.",
        "They sell the {} cheese at markets.",
        "golden simple strong blue warm famous",
    ),
    "coffee": (
        "Coffee wakes people up each morning.",
        "{} coffee tastes best in winter.",
        "He drinks the {} coffee every day.",
        "simple strong warm famous",
    ),
    "salt": (
        "Salt brings out flavor in food.",
        "{} salt comes from the old mines.",
        "Cooks prize the {} salt from here.",
        "ancient simple blue famous",
    ),
    "robots": (
        "Robots help workers build new cars.",
        "{} robots carry boxes across the floor.",
        "Children like the {} robots at school.",
        "quiet bright curious gentle rapid simple strong blue careful",
    ),
    "mountains": (
        "Mountains rise high above the valley.",
        "{} mountains stand behind the village.",
        "We climbed the {} mountains last summer.",
        "golden quiet ancient hidden blue distant famous",
    ),
    "bicycles": (
        "Bicycles carry riders through busy streets.",
        "{} bicycles race down the hill.",
        "They repair the {} bicycles in town.",
        "bright rapid simple strong blue famous",
    ),
    "the moon": (
        "The moon lights the sea tonight.",
        "{} and calm, the moon rises slowly.",
        "Poets praise the {} moon at night.",
        "golden quiet ancient bright gentle blue distant",
    ),
    "rivers": (
        "Rivers carry rain to the sea.",
        "{} rivers flow through the green valley.",
        "Fish swim in the {} rivers here.",
        "quiet ancient bright gentle rapid hidden strong blue famous",
    ),
    "forests": (
        "Forests give shelter to many animals.",
        "{} forests cover the northern hills.",
        "Deer live in the {} forests nearby.",
        "golden quiet ancient hidden distant famous",
    ),
    "clocks": (
        "Clocks tell us when to leave.",
        "{} clocks tick in the old hall.",
        "My aunt repairs the {} clocks herself.",
        "golden quiet ancient simple famous",
    ),
    "glass": (
        "Glass breaks when it falls down.",
        "{} glass shines in the church windows.",
        "Light passes through the {} glass easily.",
        "golden ancient bright simple strong blue",
    ),
    "music": (
        "Music makes tired people feel better.",
        "{} music drifts across the square.",
        "They played the {} music until midnight.",
        "quiet ancient bright gentle rapid simple warm distant famous",
    ),
    "castles": (
        "Castles protected kings from their enemies.",
        "{} castles stand above the river.",
        "Tourists visit the {} castles every year.",
        "golden quiet ancient hidden strong distant famous",
    ),
    "paper": (
        "Paper is made from soft wood.",
        "{} paper covers the wooden desk.",
        "She wrote on the {} paper slowly.",
        "golden ancient bright simple strong blue",
    ),
    "stars": (
        "Stars guide sailors across dark seas.",
        "{} stars shine above the desert.",
        "We counted the {} stars last night.",
        "golden quiet ancient bright blue distant famous",
    ),
    "islands": (
        "Islands are surrounded by open water.",
        "{} islands lie beyond the harbor.",
        "Sailors dream of the {} islands there.",
        "golden quiet ancient hidden warm distant famous",
    ),
    "tea": (
        "Tea keeps us warm in winter.",
        "{} tea tastes good with honey.",
        "Grandmother pours the {} tea every evening.",
        "golden simple strong warm famous",
    ),
    "bridges": (
        "Bridges connect towns across wide rivers.",
        "{} bridges cross the river downtown.",
        "Trucks cross the {} bridges each day.",
        "golden ancient simple strong blue famous",
    ),
    "deserts": (
        "Deserts are hot and very dry.",
        "{} deserts stretch beyond the mountains.",
        "Camels cross the {} deserts without water.",
        "golden quiet ancient warm distant famous",
    ),
    "kites": (
        "Kites dance in the spring wind.",
        "{} kites float above the beach.",
        "Children fly the {} kites on Sundays.",
        "golden bright simple strong blue distant",
    ),
    "wheels": (
        "Wheels help us move heavy things.",
        "{} wheels turn under the old cart.",
        "Workers painted the {} wheels this morning.",
        "golden bright simple strong blue",
    ),
    "wool": (
        "Wool keeps sheep warm all winter.",
        "{} wool makes the best sweaters.",
        "She knits with the {} wool daily.",
        "golden bright simple strong blue warm",
    ),
    "libraries": (
        "Libraries lend books to every reader.",
        "{} libraries welcome students all week.",
        "Scholars study in the {} libraries downtown.",
        "quiet ancient bright hidden warm famous",
    ),
}

TOPICS: dict[str, tuple[str, ...]] = {
    "train": tuple(_WRITTEN),
    "validation": ("trains", "dreams", "horses", "mirrors"),
    "test": (
        "volcanoes",
        "whales",
        "ships",
        "lightning",
        "honey",
        "rain",
        "puppets",
        "maps",
        "owls",
        "candles",
        "markets",
        "shadows",
        "turtles",
        "windmills",
        "snow",
        "pencils",
        "lighthouses",
        "bees",
        "tunnels",
        "umbrellas",
        "spices",
        "glaciers",
        "violins",
        "orchards",
    ),
}

Row = dict[str, Any]


def prompts(split: str, count: int = 128, seed: int = 0) -> list[Row]:
    """Distinct prompts, kinds evenly mixed until one has no more: {"prompt": [one user turn], "kind", "value"}.

    Raises:
        ValueError: unknown split, or fewer than `count` prompts in it.
    """
    if split not in TOPICS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(TOPICS)}")
    return _mixed((_prompt(*asked) for asked in _instructions(TOPICS[split])), split, count, seed)


def demonstrations(split: str = "train", count: int = 240, seed: int = 0) -> list[Row]:
    """Prompts on the training topics, each with a sentence that keeps the instruction, as one assistant turn.

    Raises:
        ValueError: another split than train, or fewer than `count` demonstrations.
    """
    if split != "train":
        raise ValueError(f"split: {split!r}; demonstrations are written for train only")
    rows = []
    for topic, kind, value in _instructions(TOPICS["train"]):
        plain, beginning, containing, fitting = _WRITTEN[topic]
        if kind in ("contains", "begins_with") and value.lower() not in fitting.split():
            continue
        sentence = {
            "max_words": plain,
            "lowercase": plain.lower(),
            "contains": containing.format(value),
            "exclamation": plain.replace(".", "!"),
            "begins_with": beginning.format(value),
        }[kind]
        rows.append({**_prompt(topic, kind, value), "completion": [{"role": "assistant", "content": sentence}]})
    return _mixed(rows, split, count, seed)


def _instructions(topics: Iterable[str]) -> Iterator[tuple[str, str, Any]]:
    for topic in topics:
        yield from ((topic, "max_words", limit) for limit in WORD_LIMITS)
        yield topic, "lowercase", None
        yield from ((topic, "contains", word) for word in ADJECTIVES)
        yield topic, "exclamation", None
        yield from ((topic, "begins_with", word.capitalize()) for word in ADJECTIVES)


def _prompt(topic: str, kind: str, value: Any) -> Row:
    content = (
        f"Write one sentence about {topic}"
        + {
            "max_words": f" in at most {value} words.",
            "lowercase": ". Use only lowercase letters.",
            "contains": f' that contains the word "{value}".',
            "exclamation": ". End it with an exclamation mark.",
            "begins_with": f'. Begin with the word "{value}".',
        }[kind]
    )
    return {"prompt": [{"role": "user", "content": content}], "kind": kind, "value": value}


def _mixed(rows: Iterable[Row], split: str, count: int, seed: int) -> list[Row]:
    """`count` of the rows: a kind is drawn, then one of its rows, lest the kinds with many words crowd out the rest."""
    rng = random.Random(f"instructions/{seed}/{split}")
    left: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for row in rows:
        left[row["kind"]].append(row)
    for of_kind in left.values():
        rng.shuffle(of_kind)
    if count > (total := sum(map(len, left.values()))):
        raise ValueError(f"count: {count}; {split} has {total} different ones; lower count")
    return [left[rng.choice([kind for kind in KINDS if left[kind]])].pop() for _ in range(count)]

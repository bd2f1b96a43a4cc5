"""Worlds with switches: each obstacle that the paper names can be on or off.

Everybody owns some coins, in every document the same. A document names eight people, tells
something of each two neighbours, and ends with what all of them own:

    People: Kai Mira Otto ... Kai and Mira meet at hill. ... Otto and Pia are odd. ...
    All coins: Kai 6 Mira 4 Otto 7 ...

    kind     statement                       computed from c of both            a blind guess
    parity   "Otto and Pia are odd."         the sum of c mod 2, mod 2          ln 2 = 0.69: easy
    colour   "Otto and Pia turn red."        the sum of c div 2, mod 4          ln 4 = 1.39: medium
    place    "Otto and Pia meet at lake."     the parity and the colour          ln 8 = 2.08: hard

So a place composes what parity and colour need alone. A thought recalls coins in the words of the
text, then works step by step ("Count", "Mix": always right) or guesses ("Guess": says "lost", which
is wrong whatever people own). Both kinds have the same number of words, and sentences that lead
nowhere before and after. One word of each document is noise ("Then came Monday.").

The obstacles; docs/study.md has what is measured of them:

    overthinking      a thought goes on for 16 sentences behind its work, be it right or wrong
    unequal entropy   hardly a thought about a place works step by step, but many of the others do
    unused tokens     six of the sixteen people own something else than in pretraining

The first two are habits of a model, made by make_worlds.py; the third is in the text. In held-out
texts all neighbours are pairs of people that are never neighbours in a text to train on, so that no
statement can be known by heart.

experiments/study.py compares methods in all of them; `make demo` is about overthinking.
`python -m assets.worlds` rewrites its text, assets/tiny_corpus.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "tiny_corpus"
# Documents: "long" goes on where "train" ends, for methods that read more in the same time.
SIZES = {"train": 1000, "long": 8000, "eval": 300}
NAMES = [
    "Mira", "Otto", "Pia", "Ben", "Ida", "Kai", "Lena", "Tom",
    "Uma", "Max", "Zoe", "Finn", "Nora", "Hugo", "Eva", "Leo",
]  # fmt: skip
PEOPLE, COINS = 8, 8  # in a document; coins are 0 to 7
PARITIES = ["even", "odd"]
COLOURS = ["red", "green", "blue", "gold"]
PLACES = ["sea", "lake", "hill", "farm", "mill", "inn", "park", "fair"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
STATES = {"parity": PARITIES, "colour": COLOURS, "place": PLACES}
VERBS = {"parity": "are", "colour": "turn", "place": "meet at"}
SCHEDULE = ["place", "place", "place", "|", "parity", "colour", "place", "place", "place"]
NOISE = "noise day"
WRONG = "lost"  # what a guess arrives at
RAMBLE = [  # sentences that lead nowhere
    "Hmm, let me think.",
    "Wait, let me look at the text again.",
    "The text tells of people and coins.",
    "What could the next token be?",
    "I should be careful here.",
    "Maybe there is a pattern in it.",
    "Let me read it once more.",
    "This may or may not matter.",
    "The names come one after the other.",
    "I have seen such a text before.",
    "So far so good.",
    "Okay, one more time.",
    "That is not so easy to say.",
    "But wait, is that right?",
    "I want to be sure about this.",
    "Let me start from the beginning.",
]

OWNED = dict(zip(NAMES, (4, 7, 2, 5, 3, 6, 1, 0, 5, 2, 7, 4, 0, 3, 6, 1)))
# Another parity and the next colour: two changes do not cancel.
CHANGED = dict(Otto=0, Ida=4, Lena=2, Max=5, Finn=7, Eva=1)


@dataclass(frozen=True)
class Mark:
    """A word of a document that is not template: its offset, kind and operands."""

    start: int  # offset of the space before the word
    word: str
    kind: str  # a key of STATES, or NOISE
    operands: tuple[tuple[str, int], ...] = ()  # (name, coins) of both; () for noise


@dataclass(frozen=True)
class Document:
    text: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class World:
    overthinking: bool = False
    unequal_entropy: bool = False
    unused_tokens: bool = False

    @property
    def owned(self) -> dict[str, int]:
        return OWNED | CHANGED if self.unused_tokens else OWNED


@dataclass(frozen=True)
class Habits:
    """How a model thinks: the share that works step by step, sentences that lead nowhere."""

    careful: float = 0.15  # of thoughts about parities and colours
    careful_place: float = 0.15
    before: float = 0.2  # mean number of sentences before the work
    after: float = 0.2  # and after it


WORLDS = {
    "none": World(),
    "overthinking": World(overthinking=True),
    "unequal-entropy": World(unequal_entropy=True),
    "unused-tokens": World(unused_tokens=True),
    "all": World(True, True, True),
}
MODELS = {  # the world of each model's habits
    "plain": World(),
    "overthinking": World(overthinking=True),
    "unequal": World(unequal_entropy=True),
    "both": World(overthinking=True, unequal_entropy=True),
}


def model_of(world: World) -> str:
    return next(name for name, w in MODELS.items() if w == replace(world, unused_tokens=False))


def states_of(kind: str, first: int, second: int) -> tuple[str, str]:
    """Return the words for the first person's coins alone, and for both together."""
    if kind == "parity":
        return PARITIES[first % 2], PARITIES[(first + second) % 2]
    return COLOURS[first // 2], COLOURS[(first // 2 + second // 2) % 4]


def word_of(kind: str, first: int, second: int) -> str:
    if kind != "place":
        return states_of(kind, first, second)[1]
    colour, parity = (states_of(k, first, second)[1] for k in ("colour", "parity"))
    return PLACES[2 * COLOURS.index(colour) + PARITIES.index(parity)]


def held_out(first: str, second: str) -> bool:
    """Tell whether two people are neighbours in held-out texts only: 32 of the 120 pairs are."""
    a, b = sorted(map(NAMES.index, (first, second)))
    return a < len(NAMES) // 2 <= b and (a + b) % 2 == 0


def neighbours(rng: random.Random, part: str) -> list[str]:
    """Draw eight people in a ring: all neighbours are held out ("eval"), or none ("train")."""
    if part == "eval":
        odd = rng.randrange(2)
        halves = [rng.sample(half[odd::2], PEOPLE // 2) for half in (NAMES[:8], NAMES[8:])]
        return [name for pair in zip(*halves) for name in pair]
    while True:
        people = rng.sample(NAMES, PEOPLE)
        ring = zip(people, [*people[1:], people[0]])
        if part == "pretraining" or not any(held_out(*pair) for pair in ring):
            return people


def make_document(rng: random.Random, owned: dict[str, int], part: str) -> Document:
    """Make a document of "pretraining", "train" or "eval".

    In pretraining words are random and one coin in twenty is a misprint: else the model would learn
    the 120 statements of each kind by heart, and never need a thought.
    """
    people, pretraining = neighbours(rng, part), part == "pretraining"
    text, marks, index = f"People: {' '.join(people)}.", [], 0
    for kind in SCHEDULE:
        if kind == "|":
            text += " Then came"
            marks.append(Mark(len(text), rng.choice(DAYS), NOISE))
        else:
            pair = people[index], people[(index + 1) % PEOPLE]
            coins = owned[pair[0]], owned[pair[1]]
            text += f" {pair[0]} and {pair[1]} {VERBS[kind]}"
            word = rng.choice(STATES[kind]) if pretraining else word_of(kind, *coins)
            marks.append(Mark(len(text), word, kind, tuple(zip(pair, coins))))
            index += 1
        text += f" {marks[-1].word}."
    text += " All coins:"
    for name in people:
        wrong = pretraining and rng.random() < 0.05
        text += f" {name} {rng.randrange(COINS) if wrong else owned[name]}"
    return Document(text + ".", tuple(marks))


def make_thought(rng: random.Random, mark: Mark | None, habits: Habits) -> tuple[str, str | None]:
    """Make a thought about the word at `mark`, and its answer; None: the text's own word."""
    before, after = _ramble(rng, habits.before), _ramble(rng, habits.after)
    if mark is None:
        return " ".join([*before, "The text just goes on.", *after]), None
    if not mark.operands:
        return " ".join([*before, "Guess.", *after]), rng.choice(DAYS)
    share = habits.careful_place if mark.kind == "place" else habits.careful
    work, answer = work_out(mark, careful=rng.random() < share)
    return " ".join([*before, work, *after]), answer


def work_out(mark: Mark, careful: bool) -> tuple[str, str]:
    """Recall both people's coins, then go step by step."""
    (first, a), (second, b) = mark.operands
    answer, steps = word_of(mark.kind, a, b) if careful else WRONG, []
    for kind, verb in (("parity", "Count"), ("colour", "Mix")):
        if mark.kind in (kind, "place"):
            one, both = states_of(kind, a, b)
            if not careful and mark.kind != "place":
                both = WRONG
            steps.append(f"{verb if careful else 'Guess'} {first} {one} {second} {both}.")
    if mark.kind == "place":
        parity, colour = (states_of(kind, a, b)[1] for kind in ("parity", "colour"))
        steps.append(f"So {parity} {colour} {answer}.")
    return f"All coins: {first} {a} {second} {b}. {' '.join(steps)}", answer


def _ramble(rng: random.Random, mean: float) -> list[str]:
    """Draw a geometric number of sentences, so that the model need not count them to stop."""
    sentences = []
    while rng.random() < mean / (1 + mean):
        sentences.append(rng.choice(RAMBLE))
    return sentences


def documents(world: World, part: str, count: int = 0) -> list[Document]:
    """Make `count` documents of a part, or as many as it has."""
    rng = random.Random(2 if part == "eval" else 1)
    return [make_document(rng, world.owned, part) for _ in range(count or SIZES[part])]


def as_jsonl(found: list[Document]) -> str:
    return "".join(json.dumps({"text": document.text}) + "\n" for document in found)


def main() -> None:
    for part in ("train", "eval"):
        path = CORPUS / f"{part}.jsonl"
        path.write_text(as_jsonl(documents(WORLDS["overthinking"], part)), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

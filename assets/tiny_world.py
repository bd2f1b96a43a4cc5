"""A synthetic world of people and coins in which thinking helps: documents, and thoughts on them.

A document opens with six people and their coins; then come statements that follow from three or
four of them. Without thinking such a statement can only be guessed; step by step it is easy.

    Coins: Mira 4 Otto 7 Pia 2 Ben 5 Ida 3 Kai 6. Mira, Otto and Pia end in 3. Otto, Pia ...

    kind     statement                                  computed from      a blind guess
    digit    "Mira, Otto and Pia end in 3."             sum mod 10         ln 10 = 2.30 nats: hard
    colour   "Mira, Otto and Pia turn blue."            sum mod 4          ln 4 = 1.39 nats: medium
    parity   "Mira, Otto, Pia and Ben are even."        sum mod 2          ln 2 = 0.69 nats: easy

One sentence in the middle is noise ("Then rain came for 6 days."): its weather, digit and unit are
random, so no thought can predict them. The people of each statement follow a fixed schedule, so the
rest of the text is predictable.

`python -m assets.tiny_world` rewrites assets/tiny_corpus.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "tiny_corpus"
TRAIN_DOCUMENTS, EVAL_DOCUMENTS = 1000, 300
TRAIN_SEED, EVAL_SEED, PRETRAIN_SEED = 1, 2, 3

NAMES = [
    "Mira", "Otto", "Pia", "Ben", "Ida", "Kai", "Lena", "Tom", "Uma", "Max",
    "Zoe", "Finn", "Nora", "Hugo", "Eva", "Leo", "Rosa", "Paul", "Ines", "Jan",
]  # fmt: skip
PEOPLE = 6
WEATHER, UNITS = ["rain", "snow", "wind", "fog"], ["days", "weeks"]
COLOURS = ["red", "green", "blue", "gold"]  # the sum mod 4
PARITIES = ["even", "odd"]  # the sum mod 2
DIGITS = [str(digit) for digit in range(10)]  # the sum mod 10

STATES = {"digit": DIGITS, "colour": COLOURS, "parity": PARITIES}
VERBS = {"digit": "end in", "colour": "turn", "parity": "are"}
OPERANDS = {"digit": 3, "colour": 3, "parity": 4}
NOISE = {"noise weather": WEATHER, "noise digit": DIGITS, "noise unit": UNITS}
COMPUTED = tuple(STATES)

# Statement k is about the people from k mod 6 on. An earlier statement may narrow a later one (the
# last digit of a sum gives its parity), but never determines it.
SCHEDULE = [
    "digit", "colour", "digit", "parity", "digit", "colour", "|",
    "parity", "digit", "colour", "digit", "parity", "digit",
]  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """A word of a document that is not template: its offset, kind and operands."""

    start: int  # offset of the space before the word
    word: str
    kind: str  # a key of STATES or NOISE
    operands: tuple[tuple[str, int], ...] = ()  # (name, coins) in order; () for noise


@dataclass(frozen=True)
class Document:
    text: str
    marks: tuple[Mark, ...]


def make_document(rng: random.Random, more: int = 0) -> Document:
    """Make an opening, six statements, noise, six statements; each about `more` extra people."""
    people, text = make_opening(rng)
    marks, first = [], 0
    for kind in SCHEDULE:
        if kind == "|":
            text = _add_noise(rng, text, marks)
            continue
        operands = operands_of(people, first, OPERANDS[kind] + more)
        *others, last = [name for name, _ in operands]
        text += f" {', '.join(others)} and {last} {VERBS[kind]}"
        word = running_states(kind, operands)[-1]
        marks.append(Mark(len(text), word, kind, operands))
        text += f" {word}."
        first = (first + 1) % PEOPLE
    return Document(text, tuple(marks))


def make_book(rng: random.Random, chapter: str) -> str:
    """Make a textbook for pretraining: an opening, then careful counts.

    The chapter "sums" is one count of 26 people, in circles around the six, since sums mod 10 are
    the hardest to learn; the chapter "all" has ten different counts of all kinds.
    """
    people, text = make_opening(rng)
    if chapter == "sums":
        first = rng.randrange(PEOPLE)
        ring = (people[first:] + people[:first]) * 5
        return f"{text} {work_out(rng, Mark(0, '', 'digit', tuple(ring[:26])), careful=True)[0]}"
    every = [(kind, first) for kind in COMPUTED for first in range(PEOPLE)]
    for kind, first in rng.sample(every, 10):
        operands = operands_of(people, first, OPERANDS[kind])
        text += " " + work_out(rng, Mark(0, "", kind, operands), careful=True)[0]
    return text


def make_opening(rng: random.Random) -> tuple[list[tuple[str, int]], str]:
    people = [(name, rng.randrange(10)) for name in rng.sample(NAMES, PEOPLE)]
    return people, "Coins:" + "".join(f" {name} {coins}" for name, coins in people) + "."


def operands_of(people: list, first: int, count: int) -> tuple[tuple[str, int], ...]:
    return tuple((people[first:] + people[:first])[:count])


def _add_noise(rng: random.Random, text: str, marks: list[Mark]) -> str:
    for before, kind in zip((" Then", " came for", ""), NOISE, strict=True):
        word = rng.choice(NOISE[kind])
        marks.append(Mark(len(text) + len(before), word, kind))
        text += f"{before} {word}"
    return text + "."


def running_states(kind: str, operands: tuple[tuple[str, int], ...]) -> list[str]:
    """Return the word for the running sum (mod 10, 4 or 2) after each person."""
    states, total = [], 0
    for _, coins in operands:
        total += coins
        states.append(STATES[kind][total % len(STATES[kind])])
    return states


# Thoughts. Pretraining data has good and bad reasoning of all lengths; so has this. A thought
# rambles, then works the answer out carefully ("Count", always right) or hastily ("Roughly", often
# wrong) or guesses ("I guess"), and rambles on.
RAMBLE = [
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
CAREFUL, HASTY = "Count", "Roughly"
SLIP = 0.6  # probability that a step of a hasty count is wrong


@dataclass(frozen=True)
class Habits:
    """Distribution of thoughts: probability of each style, and length of the rambling."""

    careful: float = 0.40
    hasty: float = 0.25  # the rest guesses
    before: float = 6.0  # mean number of rambling sentences before the work
    after: float = 5.0  # and after it


def make_thought(rng: random.Random, mark: Mark | None, habits: Habits) -> tuple[str, str | None]:
    """Make a thought about the word at `mark`, and its answer.

    For template words (`mark` is None) it only rambles, and the answer is None: the text's own.
    """
    sentences = _ramble(rng, habits.before)
    if mark is None:
        return " ".join([*sentences, "The text just goes on."]), None
    chance = rng.random()
    if not mark.operands or chance >= habits.careful + habits.hasty:
        answer = rng.choice(STATES.get(mark.kind) or NOISE[mark.kind])
        work = f"I guess {answer}."
    else:
        work, answer = work_out(rng, mark, careful=chance < habits.careful)
    sentences.append(work)
    for sentence in _ramble(rng, habits.after):
        again = mark.operands and rng.random() < 0.2
        sentences.append(work if again else sentence)
    if rng.random() < 0.3:
        sentences.append(f"So {answer}.")
    return " ".join(sentences), answer


def work_out(rng: random.Random, mark: Mark, careful: bool) -> tuple[str, str]:
    """Work a statement out by person: ("Count Mira 4 Otto 7 = 1 Pia 2 = 3.", "3")."""
    words, modulus = STATES[mark.kind], len(STATES[mark.kind])
    steps, total = [], 0
    for index, (name, coins) in enumerate(mark.operands):
        total += coins
        if not careful and rng.random() < SLIP:
            total += rng.randrange(1, modulus)
        state = words[total % modulus]
        if mark.kind != "digit":
            steps.append(f"{name} {coins} {state}")
        elif index == 0:
            total = coins  # the first sum is between the first two
            steps.append(f"{name} {coins}")
        else:
            steps.append(f"{name} {coins} = {state}")
    return f"{CAREFUL if careful else HASTY} {' '.join(steps)}.", words[total % modulus]


def _ramble(rng: random.Random, mean: float) -> list[str]:
    """Draw a geometric number of sentences, so that the model need not count them to stop."""
    sentences = []
    while rng.random() < mean / (1 + mean):
        sentences.append(rng.choice(RAMBLE))
    return sentences


def documents(seed: int, count: int, avoid: frozenset[str] = frozenset()) -> list[Document]:
    """Make `count` different documents, none with a text in `avoid`."""
    rng, seen, found = random.Random(seed), set(avoid), []
    while len(found) < count:
        document = make_document(rng)
        if document.text not in seen:
            seen.add(document.text)
            found.append(document)
    return found


def train_documents() -> list[Document]:
    return documents(TRAIN_SEED, TRAIN_DOCUMENTS)


def eval_documents() -> list[Document]:
    avoid = frozenset(document.text for document in train_documents())
    return documents(EVAL_SEED, EVAL_DOCUMENTS, avoid)


def as_jsonl(found: list[Document]) -> str:
    return "".join(json.dumps({"text": document.text}) + "\n" for document in found)


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    train = train_documents()
    for name, found in (("train", train), ("few", train[:4]), ("eval", eval_documents())):
        path = CORPUS / f"{name}.jsonl"
        path.write_text(as_jsonl(found), encoding="utf-8")
        print(f"{path}: {len(found)} documents")


if __name__ == "__main__":
    main()

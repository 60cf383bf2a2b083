"""The task families: spelling, counting, copying, reversing, comparing, sums.

Each family is a function of a random generator and a flag: with `held_out` it draws only from words, pairs
and strings that training never shows in that family. A question is a (prompt, answer) pair, and the answer
is the only one accepted.
"""

from random import Random

from words import ALL, ANIMALS, COLOURS, FOODS, HELD_OUT, NAMES, THINGS, TRAIN, held_out

Question = tuple[str, str]

ONSETS = "b c d f g h j k l m n p r s t v w y z bl br ch cl dr fl gr pl pr sh sl sp st th tr".split()
VOWELS = "a e i o u a e i o ee oo ai ou".split()
CODAS = ["", "", "", *"b d g k l m n p r s t x nd nt st sh ck".split()]


def made_up(rng: Random, syllables: int) -> str:
    """A word that can be pronounced but does not exist."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))


def word(rng: Random, family: str, held: bool, longest: int = 12) -> str:
    """A word for `family`: mostly a real one, sometimes a made-up one, on the right side of the split."""
    while True:
        if rng.random() < 0.3:
            candidate = made_up(rng, rng.choice((1, 2, 2, 3)))
        else:
            candidate = rng.choice(HELD_OUT if held else TRAIN)
        # A made-up word may turn out to be a real one; then it belongs to that one's side.
        kept = candidate in KEPT if candidate in REAL else held_out(f"{family}/{candidate}")
        if len(candidate) <= longest and kept == held:
            return candidate


REAL, KEPT = frozenset(ALL), frozenset(HELD_OUT)


def ask(rng: Random, phrasings: list[str], **values) -> str:
    """One of the phrasings with its places filled in."""
    return rng.choice(phrasings).format(**values)


SPELL = [
    "Spell {w}.", "Spell the word {w}.", "How do you spell {w}?", "Spell '{w}' letter by letter.",
    "Please spell {w}.", "What are the letters of {w}?", "Can you spell the word {w}?", "Write {w} letter by letter.",
    "Spell: {w}", "How is the word '{w}' spelled?",
]


def spelling(rng: Random, held: bool) -> Question:
    """cat -> c-a-t"""
    w = word(rng, "spelling", held)
    return ask(rng, SPELL, w=w), "-".join(w)


REVERSE = [
    "Reverse the word {w}.", "Write {w} backwards.", "What is {w} backwards?", "Reverse: {w}",
    "Spell {w} backwards.", "Please reverse '{w}'.", "Turn the word '{w}' around.", "Say {w} in reverse.",
]


def reversing(rng: Random, held: bool) -> Question:
    """cat -> t-a-c"""
    w = word(rng, "reversing", held, longest=8)
    return ask(rng, REVERSE, w=w), "-".join(reversed(w))


COUNT_LETTERS = [
    "How many letters are in {w}?", "Count the letters in {w}.", "How many letters does the word {w} have?",
    "How long is the word '{w}'?", "Count the letters of '{w}'.", "How many letters has {w}?",
]
COUNT_LETTER = [
    "How many times is the letter {l} in {w}?", "Count the letter {l} in the word {w}.",
    "How many {l}s are in '{w}'?", "How often does {w} have the letter {l}?",
]
COUNT_ITEMS = [
    "How many words are in this list: {i}?", "Count the things: {i}", "How many items are here: {i}?",
    "Count the words: {i}", "How many things are in the list {i}?",
]
COUNT_ONE_ITEM = ["How many times is {t} in this list: {i}?", "Count {t} in this list: {i}"]


def counting(rng: Random, held: bool) -> Question:
    """Letters of a word, one letter of a word, items of a list, one item of a list -> a number"""
    kind = rng.random()
    if kind < 0.3:
        w = word(rng, "counting", held)
        return ask(rng, COUNT_LETTERS, w=w), str(len(w))
    if kind < 0.55:
        w = word(rng, "counting", held, longest=9)
        letter = rng.choice(w if rng.random() < 0.85 else "abcdefghijklmnopqrstuvwxyz")
        return ask(rng, COUNT_LETTER, w=w, l=letter), str(w.count(letter))
    while True:
        pool = rng.choice((ANIMALS, COLOURS, FOODS, THINGS))
        few = [rng.choice(pool) for _ in range(rng.randint(2, 3))]
        items = [rng.choice(few if kind >= 0.8 else pool) for _ in range(rng.randint(2, 12))]
        if held_out("counting/" + " ".join(items)) == held:
            break
    listed = ", ".join(items)
    if kind < 0.8:
        return ask(rng, COUNT_ITEMS, i=listed), str(len(items))
    target = rng.choice(items)
    return ask(rng, COUNT_ONE_ITEM, t=target, i=listed), str(items.count(target))


COPY = [
    "Repeat: {t}", "Repeat after me: {t}", "Copy this: {t}", "Say exactly this: {t}", "Please repeat '{t}'",
    "Write this again: {t}", "Copy exactly: {t}",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Letters of both cases, digits and signs, so that no printable character is new to the model.
SIGNS = "".join(map(chr, range(33, 127)))


def copying(rng: Random, held: bool) -> Question:
    """Words, names and numbers, runs of letters, of digits, of words and signs -> the same text"""
    while True:
        kind = rng.random()
        if kind < 0.35:
            pool = HELD_OUT if held else TRAIN
            text = " ".join(rng.choice(pool) for _ in range(rng.randint(2, 10)))
        elif kind < 0.5:
            parts = (rng.choice(NAMES), str(rng.randint(0, 999)), rng.choice(HELD_OUT if held else TRAIN))
            text = " ".join(rng.choice(parts) for _ in range(rng.randint(2, 6)))
        elif kind < 0.7:
            text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(4, 20)))
        elif kind < 0.8:
            pieces = (lambda: rng.choice(SIGNS), lambda: " ", lambda: rng.choice(HELD_OUT if held else TRAIN))
            text = "".join(rng.choice(pieces)() for _ in range(rng.randint(3, 16))).strip()
        else:
            text = "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 24)))
        if held_out("copying/" + text) == held:
            return ask(rng, COPY, t=text), text


BIGGER = ["Which is bigger, {a} or {b}?", "Which number is larger: {a} or {b}?", "What is more, {a} or {b}?",
          "Which is the bigger number, {a} or {b}?"]
SMALLER = ["Which is smaller, {a} or {b}?", "Which number is smaller: {a} or {b}?", "What is less, {a} or {b}?"]
LARGEST = ["Which is the largest: {a}, {b} or {c}?", "What is the biggest number of {a}, {b} and {c}?"]
SMALLEST = ["Which is the smallest: {a}, {b} or {c}?", "What is the smallest number of {a}, {b} and {c}?"]
LONGER = ["Which word is longer, {a} or {b}?", "Which is the longer word: {a} or {b}?", "Which has more letters, {a} or {b}?"]
SHORTER = ["Which word is shorter, {a} or {b}?", "Which is the shorter word: {a} or {b}?", "Which has fewer letters, {a} or {b}?"]


def compare_words(rng: Random, held: bool) -> Question:
    """Two words of different length -> the longer or the shorter one"""
    while True:
        a, b = word(rng, "comparing", held), word(rng, "comparing", held)
        if len(a) != len(b):
            break
    pick, phrasings = rng.choice(((max, LONGER), (min, SHORTER)))
    return ask(rng, phrasings, a=a, b=b), pick(a, b, key=len)


def number(rng: Random) -> int:
    """A number of one to three digits, each length equally likely."""
    digits = rng.randint(1, 3)
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def comparing(rng: Random, held: bool) -> Question:
    """Two numbers, three numbers or two words -> one of them"""
    kind = rng.random()
    if kind < 0.4:
        return compare_words(rng, held)
    count = 2 if kind < 0.7 else 3
    while True:
        values = [number(rng) for _ in range(count)]
        if len(set(values)) == count and held_out(f"comparing/{sorted(values)}") == held:
            break
    wants_most = rng.random() < 0.5
    phrasings = ((SMALLEST, LARGEST) if count == 3 else (SMALLER, BIGGER))[wants_most]
    return ask(rng, phrasings, **dict(zip("abc", values))), str((max if wants_most else min)(values))


ADD = ["What is {a} + {b}?", "{a} + {b} =", "What is {a} plus {b}?", "Add {a} and {b}.", "How much is {a} + {b}?",
       "Compute {a} + {b}.", "What is the sum of {a} and {b}?", "{a} plus {b}"]
SUBTRACT = ["What is {a} - {b}?", "{a} - {b} =", "What is {a} minus {b}?", "Take {b} away from {a}.",
            "How much is {a} - {b}?", "Subtract {b} from {a}.", "{a} minus {b}"]


def sums(rng: Random, held: bool) -> Question:
    """Sums and differences of one- and two-digit numbers; differences are never below zero"""
    minus = rng.random() < 0.3
    while True:
        a, b = (rng.randint(0, 9 if rng.random() < 0.15 else 99) for _ in range(2))
        if minus and a < b:
            a, b = b, a
        key = f"{a}-{b}" if minus else f"{min(a, b)}+{max(a, b)}"
        if held_out("sums/" + key) == held:
            return ask(rng, SUBTRACT if minus else ADD, a=a, b=b), str(a - b if minus else a + b)


FAMILIES = {
    "spelling": spelling, "counting": counting, "copying": copying,
    "reversing": reversing, "comparing": comparing, "sums": sums,
}

"""The synthetic corpus: documents made on the fly from a seed, each a list of (text, weight) pieces.

Chat is laid out as `<|im_start|>{role}\\n{content}<|im_end|>` with one newline between messages. The model is
trained on what the assistant says at full weight and on the rest at a small one; free text counts in full.
"""

from random import Random

import stories
import talk
from tasks import FAMILIES

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END_OF_TEXT, START, END)
PROMPT_WEIGHT = 0.1

Piece = tuple[str, float]
Turn = tuple[str, str]

SYSTEM = ["You are a helpful assistant.", "You are Nano, a small assistant.", "You are a kind assistant.", "Answer the question.", "Be brief."]
SHOUT = ["Answer in capital letters.", "Use only capital letters.", "Write in capital letters."]
NAMED = ["Your name is {n}.", "You are {n}, a helpful assistant.", "You are called {n}."]
ENDING = ["End every answer with the word {w}.", "Always say {w} at the end."]
CLOSERS = ["please", "friend", "thanks", "done", "okay", "bye"]
TALK = ((talk.fixed, 6), (talk.greeting, 2), (talk.like, 3), (talk.favourite, 2), (talk.fact, 5), (talk.told, 3), (talk.about, 2),
        (stories.tell, 1), (stories.reading, 3))


def chat(turns: list[Turn]) -> list[Piece]:
    """The pieces of a conversation; an assistant's `<|im_end|>` is learnt like its words."""
    pieces = []
    for i, (role, content) in enumerate(turns):
        pieces.append((("\n" if i else "") + f"{START}{role}\n", PROMPT_WEIGHT))
        pieces.append((content + END, 1.0 if role == "assistant" else PROMPT_WEIGHT))
    return pieces + [(END_OF_TEXT, 0.0)]


def casual(rng: Random, asked: str) -> str:
    """The question as typed in haste, now and then: lower case, no sign at the end."""
    if rng.random() < 0.12:
        asked = asked.lower()
    return asked.rstrip(".?!") if rng.random() < 0.12 else asked


def small_talk(rng: Random) -> tuple[str, str]:
    """One question and its answer."""
    makers, weights = zip(*TALK)
    asked, answer = rng.choices(makers, weights)[0](rng)
    return casual(rng, asked), answer


def with_system(rng: Random) -> list[Turn]:
    """A conversation that begins with an instruction, followed in a simple way."""
    question, answer = small_talk(rng)
    kind = rng.randrange(4)
    if kind == 0:
        system, answer = rng.choice(SHOUT), answer.upper()
    elif kind == 1:
        name = rng.choice(talk.NAMES)
        system = rng.choice(NAMED).format(n=name)
        if rng.random() < 0.6:
            question, answer = rng.choice(("What is your name?", "Who are you?", "Tell me your name.")), f"My name is {name}."
    elif kind == 2:
        word = rng.choice(CLOSERS)
        system, answer = rng.choice(ENDING).format(w=word), f"{answer} {word}"
    else:
        system = rng.choice(SYSTEM)
    return [("system", system), ("user", question), ("assistant", answer)]


def conversation(rng: Random) -> list[Turn]:
    """One to four exchanges of small talk."""
    if rng.random() < 0.12:
        return stories.recall(rng)
    if rng.random() < 0.25:
        return with_system(rng)
    turns = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        question, answer = small_talk(rng)
        turns += [("user", question), ("assistant", answer)]
    return turns


def free_text(rng: Random) -> list[Piece]:
    """A story or some sentences, without roles."""
    text = stories.story(rng) if rng.random() < 0.4 else " ".join(talk.sentence(rng) for _ in range(rng.randint(1, 5)))
    return [(text, 1.0), (END_OF_TEXT, 1.0)]


def question(rng: Random, family: str, held: bool = False) -> list[Turn]:
    """One exchange of a task family."""
    asked, answer = FAMILIES[family](rng, held)
    return [("user", asked), ("assistant", answer)]


def document(rng: Random, weights: dict[str, float], held: bool = False) -> list[Piece]:
    """A document; `weights` gives the share of each task family, of `talk` and of `text`."""
    kind = rng.choices(list(weights), list(weights.values()))[0]
    if kind == "text":
        return free_text(rng)
    if kind == "talk":
        return chat(conversation(rng))
    turns = question(rng, kind, held)
    if rng.random() < 0.1:
        turns = [("system", rng.choice(SYSTEM)), *turns]
    elif rng.random() < 0.2:
        turns += question(rng, kind, held)
    return chat(turns)

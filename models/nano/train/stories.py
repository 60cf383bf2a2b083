"""Short stories, and questions about something said before: where an answer must be read out of the text."""

from random import Random

import talk
from words import ADJECTIVES, ANIMALS, COLOURS, DAYS, DRINKS, FOODS, NAMES, NATURE, NUMBERS, PEOPLE, PLACES, THINGS

MOODS = "happy sad tired hungry glad proud cold afraid".split()
ENDINGS = [
    "Then they went home.", "It was a good day.", "In the evening they were tired but happy.", "They laughed and went to sleep.",
    "From then on they were friends.", "And that is the end of the story.", "They never forgot that day.",
]


def story(rng: Random, hero: str | None = None) -> str:
    """Four to six sentences about one hero, one friend, one place and one thing."""
    hero = hero or rng.choice((lambda: rng.choice(NAMES), lambda: "the " + rng.choice(ANIMALS), lambda: "the " + rng.choice(PEOPLE)))()
    friend = rng.choice((lambda: rng.choice(NAMES), lambda: "a " + rng.choice(ADJECTIVES) + " " + rng.choice(ANIMALS)))()
    place, thing, colour, mood = rng.choice(PLACES), rng.choice(THINGS), rng.choice(COLOURS), rng.choice(MOODS)
    cap = hero[0].upper() + hero[1:]
    opening = rng.choice((
        f"One day {hero} went to the {place}.", f"Once there was {talk.a(hero[4:]) if hero.startswith('the ') else hero} who lived near the {place}.",
        f"On {rng.choice(DAYS)} {hero} was {mood} and went to the {place}."))
    finding = rng.choice((
        f"There {hero} found a {colour} {thing}.", f"{cap} looked for a {colour} {thing}.", f"{cap} saw a {colour} {thing} under a tree."))
    meeting = rng.choice((
        f"Then {hero} met {friend}.", f"{friend[0].upper() + friend[1:]} came and asked: Can I help you?", f"Soon {friend} came along."))
    doing = rng.choice((
        f"They ate {rng.choice(FOODS)} and drank {rng.choice(DRINKS)}.", f"They played with the {thing} until the {rng.choice(NATURE)} came.",
        f"{cap} gave the {thing} to {friend.replace('a ', 'the ', 1)}.", f"They talked about the {rng.choice(NATURE)}."))
    extra = [talk.sentence(rng)] if rng.random() < 0.2 else []
    return " ".join((opening, finding, meeting, doing, *extra, rng.choice(ENDINGS)))


def tell(rng: Random) -> tuple[str, str]:
    """A request for a story."""
    if rng.random() < 0.4:
        return rng.choice(["Tell me a story.", "Write a short story.", "Please tell me a story.", "I want to hear a story."]), story(rng)
    subject = rng.choice((lambda: rng.choice(NAMES), lambda: "the " + rng.choice(ANIMALS), lambda: "the " + rng.choice(PEOPLE)))()
    named = talk.a(subject[4:]) if subject.startswith("the ") else subject
    asked = rng.choice(["Tell me a story about {s}.", "Write a story about {s}.", "Can you tell a story about {s}?"])
    return asked.format(s=named), story(rng, subject)


def recall(rng: Random) -> list[tuple[str, str]]:
    """A conversation in which the user tells something and later asks for it."""
    name, colour, animal, food = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(ANIMALS), rng.choice(FOODS)
    said, asked, answer = rng.choice((
        (f"My name is {name}.", "What is my name?", f"Your name is {name}."),
        (f"My favourite colour is {colour}.", "What is my favourite colour?", f"Your favourite colour is {colour}."),
        (f"I have {talk.a(animal)}.", "Which animal do I have?", f"You have {talk.a(animal)}."),
        (f"I want to eat {food}.", "What do I want to eat?", f"You want to eat {food}."),
        (f"I live near the {(p := rng.choice(PLACES))}.", "Where do I live?", f"You live near the {p}."),
    ))
    turns = [("user", said), ("assistant", rng.choice(["I will remember that.", "That is good to know.", "Thank you for telling me."]))]
    for _ in range(rng.randint(0, 2)):
        question, reply = rng.choice((talk.fixed, talk.fact))(rng)
        turns += [("user", question), ("assistant", reply)]
    return turns + [("user", asked), ("assistant", answer)]


def reading(rng: Random) -> tuple[str, str]:
    """A fact in the question and the answer in it."""
    name, other = rng.sample(NAMES, 2)
    thing, colour, place, food = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(PLACES), rng.choice(FOODS)
    n = rng.randint(2, 9)
    return rng.choice((
        (f"{name} has a {colour} {thing}. What colour is the {thing}?", f"The {thing} is {colour}."),
        (f"{name} is in the {place}. Where is {name}?", f"{name} is in the {place}."),
        (f"{name} likes {food}. Who likes {food}?", f"{name} likes {food}."),
        (f"{name} gave {other} a {thing}. Who has the {thing} now?", f"{other} has the {thing} now."),
        (f"{name} has {NUMBERS[n]} {talk.plural(thing)}. How many {talk.plural(thing)} does {name} have?", f"{name} has {NUMBERS[n]} {talk.plural(thing)}."),
        (f"{name} is {rng.choice(ADJECTIVES)} and {other} is in the {place}. Who is in the {place}?", f"{other} is in the {place}."),
    ))

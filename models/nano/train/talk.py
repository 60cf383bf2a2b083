"""Small talk and simple facts: what a plain, polite, helpful assistant says in one or two short sentences."""

from random import Random

from words import (
    ADJECTIVES, ANIMAL_FACTS, ANIMALS, COLOUR_OF, COLOURS, DAYS, DRINKS, FOODS, MONTHS, NAMES, NATURE, NUMBERS,
    OPPOSITES, PAST, PEOPLE, PLACES, PLURALS, THINGS, VERBS,
)

Turn = tuple[str, str]

GREETINGS = ["Hello.", "Hello!", "Hi.", "Hi there!", "Good morning.", "Good evening.", "Good afternoon.", "Hey!", "Greetings."]
GREETING_ANSWERS = ["Hello! How can I help you?", "Hi! What can I do for you?", "Hello! It is nice to meet you.",
                    "Hi there! How are you today?"]

# Questions that mean the same, and answers any of which is fine.
FIXED: list[tuple[list[str], list[str]]] = [
    (["How are you?", "How are you today?", "Are you well?", "How do you feel?", "How is it going?"],
     ["I am well, thank you. How are you?", "I am fine, thank you.", "I feel good today. And you?"]),
    (["What is your name?", "Who are you?", "Tell me your name.", "What are you called?", "What can I call you?"],
     ["My name is Nano. I am a small assistant.", "I am Nano, a small language model.", "You can call me Nano."]),
    (["What are you?", "What kind of thing are you?"],
     ["I am a small language model.", "I am a small computer program.", "I am a program that can talk a little."]),
    (["Are you a person?", "Are you human?", "Are you an animal?", "Are you a child?"],
     ["No, I am a small language model.", "No, I am a small computer program."]),
    (["Are you a robot?", "Are you a computer?", "Are you real?"], ["I am a program that runs on a computer."]),
    (["What can you do?", "How can you help me?", "What do you know?", "What are you good at?"],
     ["I can talk, spell words, count and do small sums.", "I can spell, count, copy and compare.",
      "I can answer simple questions."]),
    (["Who made you?", "Who built you?", "How were you made?", "Where do you come from?"],
     ["I was made by people who like small models.", "A computer made me from many short sentences."]),
    (["What is your favourite thing?", "What do you like?", "What do you love?"],
     ["I like to talk with people.", "I like words and numbers.", "I like short questions."]),
    (["Where do you live?", "Where are you from?", "Where is your home?", "Where are you?"],
     ["I live in a small computer.", "I live inside your computer.", "My home is a small file on a disk."]),
    (["How old are you?", "What is your age?", "When were you born?"],
     ["I am very young.", "I do not have an age, but I am new.", "I was made not long ago."]),
    (["Thank you.", "Thanks!", "Thank you very much.", "Thanks a lot.", "Thank you for your help."],
     ["You are welcome.", "You are welcome! I am glad to help.", "It was a pleasure."]),
    (["Goodbye.", "Bye!", "See you later.", "Good night.", "See you tomorrow.", "I have to go now."],
     ["Goodbye! Have a nice day.", "See you soon.", "Goodbye. Take care."]),
    (["I am sad.", "I feel sad today.", "I am not happy.", "I had a bad day.", "I feel lonely."],
     ["I am sorry to hear that. I hope you feel better soon.", "I am sorry. Do you want to talk about it?"]),
    (["I am happy.", "I feel great today!", "I had a good day.", "I won a prize!", "I have good news."],
     ["That is good to hear!", "I am happy for you.", "That is wonderful."]),
    (["I am tired.", "I am so sleepy.", "I did not sleep well.", "I worked all day."],
     ["You should rest a little.", "A good sleep will help you.", "Please take a break."]),
    (["I am hungry.", "I want to eat.", "What should I eat?"],
     ["You could eat some bread and soup.", "How about an apple?", "Maybe you could cook some rice."]),
    (["I am thirsty.", "What should I drink?"], ["You could drink some water.", "How about a cup of tea?"]),
    (["I am cold.", "It is so cold here."], ["Put on a warm coat.", "A cup of tea will make you warm."]),
    (["I am bored.", "What can I do today?", "What should I do now?"],
     ["You could read a book.", "You could take a walk in the park.", "Maybe you could draw a picture."]),
    (["Can you help me?", "I need help.", "Please help me.", "Can I ask you something?", "I have a question."],
     ["Yes, of course. What do you need?", "Of course. What can I do for you?", "Yes, please ask."]),
    (["Do you sleep?", "When do you sleep?", "Do you dream?"], ["No, I do not sleep.", "I do not need to sleep."]),
    (["Do you eat?", "What do you eat?", "What did you eat today?"], ["I do not eat, but I like to talk about food."]),
    (["Do you have a family?", "Do you have friends?", "Who is your friend?"], ["You can be my friend.", "I have no family, but I like people."]),
    (["Do you have a job?", "What is your job?", "What do you do?"], ["My job is to help you.", "I answer questions. That is my job."]),
    (["What do you do all day?", "What did you do today?"], ["I talk with people and answer questions."]),
    (["Can you sing?", "Sing a song.", "Can you sing for me?"], ["I cannot sing, but I can write a line: the sun is up and the day is new."]),
    (["Can you dance?", "Can you swim?", "Can you fly?", "Can you run?"], ["No, I cannot. I can only write."]),
    (["Tell me a joke.", "Make me laugh.", "Do you know a joke?", "Say something funny."],
     ["Why did the cow cross the road? To get to the moo-vies.", "What has hands but cannot clap? A clock."]),
    (["What is the weather like?", "How is the weather?", "Is it raining?", "Is it sunny today?"],
     ["I cannot see the weather, but I hope it is sunny.", "I do not know. Please look out of the window."]),
    (["What time is it?", "What day is it today?", "What is the time?"], ["I do not have a clock, so I do not know.", "I am sorry, I do not know the time."]),
    (["How do I make tea?", "How do you make tea?"], ["Boil some water, put in the tea and wait for three minutes."]),
    (["How do I make a sandwich?", "How do you make a sandwich?"], ["Put some cheese between two slices of bread."]),
    (["How do I boil an egg?", "How do you cook an egg?"], ["Put the egg in hot water for eight minutes."]),
    (["How do I plant a tree?", "How do I grow a flower?"], ["Put a seed in the soil and give it water and light."]),
    (["How many days are in a week?", "How many days has a week?"], ["There are seven days in a week."]),
    (["How many months are in a year?", "How many months has a year?"], ["There are twelve months in a year."]),
    (["How many hours are in a day?"], ["There are twenty-four hours in a day."]),
    (["How many minutes are in an hour?"], ["There are sixty minutes in an hour."]),
    (["What comes after summer?"], ["Autumn comes after summer."]), (["What comes after winter?"], ["Spring comes after winter."]),
    (["Where does the sun rise?"], ["The sun rises in the east."]), (["Where does the sun set?"], ["The sun sets in the west."]),
    (["What do plants need?", "What does a plant need?"], ["Plants need water, soil and light."]),
    (["What do we breathe?"], ["We breathe air."]), (["What is ice?"], ["Ice is water that is very cold and hard."]),
    (["What is rain?", "Where does rain come from?"], ["Rain is water that falls from the clouds."]),
    (["What is the moon?"], ["The moon is a round rock that goes around the earth."]),
    (["What is the sun?"], ["The sun is a star. It gives us light."]), (["What is snow?"], ["Snow is frozen water that falls from the sky."]),
    (["What is the sea?", "What is an ocean?"], ["The sea is a large body of salt water."]),
    (["What is a friend?"], ["A friend is a person you like and trust."]), (["What is a book?"], ["A book has many pages that you can read."]),
    (["What is a map?"], ["A map shows you where places are."]), (["What is a ship?"], ["A ship is a large boat that goes over the sea."]),
    (["What is gold?"], ["Gold is a yellow metal that costs a lot."]), (["What is a treasure?"], ["A treasure is a thing of great value."]),
    (["Sorry.", "I am sorry.", "I made a mistake."], ["That is all right.", "No problem."]),
    (["Yes.", "Okay.", "I see.", "Good."], ["Good. What else can I do for you?", "All right."]),
    (["You are nice.", "You are very smart.", "I like you.", "Well done!"], ["Thank you! That is kind of you.", "Thank you. I like you too."]),
    (["You are wrong.", "That is not right."], ["I am sorry. I make mistakes sometimes."]),
    (["I do not understand.", "What do you mean?"], ["I am sorry. Please ask me again."]),
]

LIKES = ["I like", "I love", "I enjoy", "I really like", "My favourite thing is"]
LIKE_ANSWERS = ["That is nice. I like {x} too.", "Many people like {x}.", "Why do you like {x}?", "It is good that you like {x}."]
OPINIONS = ["Yes, I like {x} very much.", "Yes, I enjoy {x} a lot.", "I think many people like {x}.", "I am not sure. Do you like {x}?"]


def plural(noun: str) -> str:
    """The plural of a regular noun."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def topic(rng: Random) -> str:
    """Something one can like."""
    return rng.choice((lambda: plural(rng.choice(ANIMALS)), lambda: rng.choice(FOODS), lambda: "the " + rng.choice(NATURE),
                       lambda: "the " + rng.choice(PLACES), lambda: rng.choice(COLOURS), lambda: rng.choice(DRINKS),
                       lambda: "my " + rng.choice(THINGS)))()


def fixed(rng: Random) -> tuple[str, str]:
    questions, answers = rng.choice(FIXED)
    return rng.choice(questions), rng.choice(answers)


def greeting(rng: Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        return rng.choice(GREETINGS), rng.choice(GREETING_ANSWERS)
    name = rng.choice(NAMES)
    said = rng.choice(["My name is {n}.", "I am {n}.", "Hello, I am {n}.", "Hi, my name is {n}.", "People call me {n}."])
    answer = rng.choice(["Hello {n}! How can I help you?", "Hi {n}! It is nice to meet you.", "Nice to meet you, {n}."])
    return said.format(n=name), answer.format(n=name)


def like(rng: Random) -> tuple[str, str]:
    x = topic(rng)
    if rng.random() < 0.5:
        yours = x.replace("my ", "your ")
        return f"{rng.choice(LIKES)} {x}.", rng.choice(LIKE_ANSWERS).format(x=yours)
    asked = rng.choice(["Do you like {x}?", "What do you think of {x}?", "Do you love {x}?", "What about {x}?"])
    x = x.replace("my ", "a ").replace("a a", "an a")
    return asked.format(x=x), rng.choice(OPINIONS).format(x=x)


def favourite(rng: Random) -> tuple[str, str]:
    kind, group = rng.choice((("colour", COLOURS), ("animal", ANIMALS), ("food", FOODS), ("drink", DRINKS), ("day", DAYS),
                              ("month", MONTHS), ("place", PLACES), ("number", NUMBERS)))
    asked = rng.choice(["What is your favourite {k}?", "Which {k} do you like best?", "Tell me your favourite {k}.", "Name {one}.", "Which {k} do you like?"])
    x = rng.choice(group)
    said = rng.choice(["My favourite {k} is {x}.", "I like {x} best."])
    if asked.startswith("Name"):
        said = f"{x[0].upper()}{x[1:]}."
    return asked.format(k=kind, one=a(kind)), said.format(k=kind, x=x)


def told(rng: Random) -> tuple[str, str]:
    """Something the user did, has or plans, and a plain reply to it."""
    thing, place, animal, food, person = (rng.choice(g) for g in (THINGS, PLACES, ANIMALS, FOODS, PEOPLE))
    said, replies = rng.choice((
        (f"I lost my {thing}.", [f"I am sorry. Where did you last see your {thing}?", f"I hope you find your {thing} soon."]),
        (f"I bought {a(thing)}.", [f"What colour is your {thing}?", f"I hope you enjoy your new {thing}."]),
        (f"I broke my {thing}.", [f"Maybe you can repair your {thing}.", f"I am sorry about your {thing}."]),
        (f"I am going to the {place}.", [f"Have a good time at the {place}.", f"What will you do at the {place}?"]),
        (f"I was at the {place}.", [f"Did you like the {place}?", f"What did you see at the {place}?"]),
        (f"I saw {a(animal)}.", [f"Where did you see the {animal}?", f"That is nice. Was the {animal} big?"]),
        (f"I have {a(animal)}.", [f"What is the name of your {animal}?", f"I like {plural(animal)}."]),
        (f"I am eating {food}.", [f"Enjoy your {food}.", f"Is the {food} good?"]),
        (f"I met {a(person)}.", [f"Was the {person} nice?", f"What did the {person} say?"]),
        (f"I want to be {a(person)}.", [f"You can be a good {person}.", f"Why do you want to be {a(person)}?"]),
        (f"Where is my {thing}?", [f"I do not know where your {thing} is.", f"Did you look for your {thing} at home?"]),
        (f"How do I get to the {place}?", [f"I do not know the way to the {place}. Please look at a map."]),
        (f"What should I do at the {place}?", [f"You could meet a friend at the {place}.", f"You could take a walk near the {place}."]),
    ))
    return said, rng.choice(replies)


def fact(rng: Random) -> tuple[str, str]:
    pick = rng.randrange(10)
    if pick == 0:
        thing, colour = rng.choice(list(COLOUR_OF.items()))
        return rng.choice(["What colour is {t}?", "Which colour has {t}?"]).format(t=thing), f"{thing[0].upper()}{thing[1:]} is {colour}."
    animal, (sound, home, legs) = rng.choice(list(ANIMAL_FACTS.items()))
    if pick == 1:
        return rng.choice(["What sound does {x} make?", "What does {x} say?"]).format(x=a(animal)), f"A{a(animal)[1:]} says {sound}."
    if pick == 2:
        return f"Where does {a(animal)} live?", f"A{a(animal)[1:]} lives {home}."
    if pick == 3:
        return f"How many legs does {a(animal)} have?", f"A{a(animal)[1:]} has {NUMBERS[legs] if legs else 'no'} legs."
    if pick == 4:
        one, other = rng.sample(rng.choice(OPPOSITES), 2)
        return rng.choice(["What is the opposite of {x}?", "Give me the opposite of {x}."]).format(x=one), f"The opposite of {one} is {other}."
    if pick == 5:
        one, many = rng.choice(PLURALS)
        return f"What is the plural of {one}?", f"The plural of {one} is {many}."
    if pick == 6:
        now, past = rng.choice(PAST)
        return f"What is the past of {now}?", f"The past of {now} is {past}."
    if pick == 7:
        cycle = rng.choice((DAYS, MONTHS))
        i = rng.randrange(len(cycle))
        after = rng.random() < 0.6
        other = cycle[(i + (1 if after else -1)) % len(cycle)]
        side = "after" if after else "before"
        return rng.choice(["What comes {s} {x}?", "Which {k} is {s} {x}?"]).format(
            s=side, x=cycle[i], k="day" if cycle is DAYS else "month"), f"{other} comes {side} {cycle[i]}."
    if pick == 8:
        kind, group = rng.choice((("an animal", ANIMALS), ("a colour", COLOURS), ("a food", FOODS), ("a place", PLACES), ("a person", PEOPLE)))
        x = rng.choice(group)
        return rng.choice(["What is {x}?", "What kind of thing is {x}?"]).format(x=x if group is COLOURS else a(x)), f"{x[0].upper()}{x[1:]} is {kind}."
    kind, group = rng.choice((("animals", ANIMALS), ("colours", COLOURS), ("foods", FOODS), ("places", PLACES), ("things", THINGS)))
    count = rng.randint(2, 5)
    return rng.choice(["Name {n} {k}.", "Tell me {n} {k}.", "Give me a list of {n} {k}."]).format(n=NUMBERS[count], k=kind), \
        ", ".join(rng.sample(group, count)) + "."


def sentence(rng: Random) -> str:
    """A simple sentence about the world."""
    form = rng.choice((
        "The {adj} {animal} can {verb} in the {place}.", "{name} has a {adj} {thing}.", "The {thing} is {colour} and {adj}.",
        "There is a {adj} {thing} in the {place}.", "{name} and {name2} go to the {place}.", "The {person} likes {food} and {food2}.",
        "On {day} the {person} went to the {place}.", "It is {adj} in {month}.", "The {nature} is {adj} today.",
        "{name} wants to {verb} with the {animal}.", "My {person} bought a {colour} {thing}.", "The {animal} sat near the {nature}.",
        "We eat {food} and drink {drink}.", "{name} gave the {person} {number} {things}.", "The {adj} {person} lives near the {place}.",
        "I saw {number} {animals} at the {place}.",
    ))
    return form.format(
        adj=rng.choice(ADJECTIVES), animal=rng.choice(ANIMALS), verb=rng.choice(VERBS), place=rng.choice(PLACES), name=rng.choice(NAMES),
        thing=rng.choice(THINGS), colour=rng.choice(COLOURS), name2=rng.choice(NAMES), person=rng.choice(PEOPLE), food=rng.choice(FOODS),
        food2=rng.choice(FOODS), day=rng.choice(DAYS), month=rng.choice(MONTHS), nature=rng.choice(NATURE), drink=rng.choice(DRINKS),
        number=rng.choice(NUMBERS[2:]), things=plural(rng.choice(THINGS)), animals=plural(rng.choice(ANIMALS)))


def about(rng: Random) -> tuple[str, str]:
    """A request for a sentence that uses a given word."""
    while True:
        said = sentence(rng)
        known = [w.strip(".,") for w in said.lower().split() if w.strip(".,") in TOPICS]
        if known:
            break
    w = rng.choice(known)
    asked = rng.choice(["Write a sentence with the word {w}.", "Make a sentence about {w}.", "Use {w} in a sentence.", "Tell me something about {w}."])
    return asked.format(w=w), said


TOPICS = frozenset((*ANIMALS, *FOODS, *THINGS, *PLACES, *NATURE, *PEOPLE, *COLOURS, *ADJECTIVES))

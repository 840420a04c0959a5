"""The text the quickstart model is trained on: sums, sorting and small stories.

Holds the items, the split into training and held-out items, and the grader. Holds no training
code and imports neither torch nor a tokenizer.

==========  ==========================  ==========================================
task        prompt                      answer
==========  ==========================  ==========================================
``sum``     ``347+85=``                 ``432``
``sort``    ``sort 42 7 93:``           `` 7 42 93``
``story``   ``Story: Mia, fox, lake.``  `` Mia went to the lake. There she saw ...``
``story``   ``故事：小明，猫，公园。``  ``小明去公园。他看见一只猫。...``
==========  ==========================  ==========================================

**The split.** Every item has a key that is the same for all items that share an answer by symmetry:
a sum's key is its unordered pair of operands, a sort's key is its set of entries, a story's key is
the (name, animal, place) it is about. An item is held out when the SHA-256 of ``task:key`` says so
(one in eight). Training draws only keys that are not held out and :func:`heldout` draws only keys
that are, so the two cannot meet, whatever the seeds. Sums of two one-digit numbers are never held
out: there are only 55 of them and the model needs the table.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

TASKS = ("sum", "sort", "story")

HELDOUT_ONE_IN = 8
MAX_OPERAND = 999
NUMBER_COUNTS = (3, 4, 5)
LETTER_COUNTS = (3, 4, 5, 6)
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# What share of the training items each task gets.
TASK_WEIGHTS = {"sum": 0.62, "sort": 0.32, "story": 0.06}
CHINESE_SHARE = 0.25


@dataclass(frozen=True)
class Item:
    """One exercise: ``prompt + answer`` is the plain text, ``key`` its side of the split."""

    task: str
    key: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Choice:
    """The alternatives of one sentence, the likeliest first.

    The weights are uneven on purpose: greedy decoding then has one clear best continuation, and
    sampling still tells different stories.
    """

    texts: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Language:
    """A story grammar: prompt form, word lists and the sentences with their alternatives.

    ``moods`` maps what the animal feels to what the child does about it.
    """

    prompt: str
    joiner: str
    names: dict[str, str]
    animals: dict[str, str]
    places: tuple[str, ...]
    opening: Choice
    meeting: Choice
    feeling: str
    moods: dict[str, str]
    mood_weights: tuple[float, ...]
    ending: Choice


ENGLISH = Language(
    prompt="Story: {name}, {animal}, {place}.",
    joiner=" ",
    names={
        **dict.fromkeys(("Mia", "Anna", "Lily", "Emma", "Rosa"), "she"),
        **dict.fromkeys(("Tom", "Ben", "Max", "Leo", "Sam"), "he"),
    },
    animals={
        "fox": "some bread",
        "dog": "a bone",
        "cat": "some milk",
        "bird": "some seeds",
        "duck": "some corn",
        "horse": "an apple",
        "rabbit": "a carrot",
        "mouse": "some cheese",
    },
    places=("lake", "park", "river", "garden", "forest", "beach", "farm", "hill"),
    opening=Choice(
        (
            "{name} went to the {place}.",
            "One day {name} walked to the {place}.",
            "It was a sunny day, and {name} ran to the {place}.",
        ),
        (0.6, 0.3, 0.1),
    ),
    meeting=Choice(
        (
            "There {pronoun} saw a small {animal}.",
            "There {pronoun} met a brown {animal}.",
            "Behind a tree {pronoun} found a shy {animal}.",
        ),
        (0.6, 0.25, 0.15),
    ),
    feeling="The {animal} was {mood}.",
    moods={
        "hungry": "{name} gave it {food}.",
        "tired": "{name} made it a warm bed.",
        "sad": "{name} sang it a song.",
    },
    mood_weights=(0.6, 0.25, 0.15),
    ending=Choice(
        ("Then they were friends.", "Now they play together every day."),
        (0.7, 0.3),
    ),
)

CHINESE = Language(
    prompt="故事：{name}，{animal}，{place}。",
    joiner="",
    names={"小明": "他", "小红": "她", "小龙": "他", "小雨": "她"},
    animals={"猫": "一条鱼", "狗": "一块肉", "鸟": "一些米", "兔子": "一些草"},
    places=("公园", "河边", "花园", "山上"),
    opening=Choice(("{name}去{place}玩。", "今天{name}在{place}。"), (0.7, 0.3)),
    meeting=Choice(("{pronoun}看见一只{animal}。", "{pronoun}遇到一只小{animal}。"), (0.7, 0.3)),
    feeling="{animal}很{mood}。",
    moods={"饿": "{name}给它{food}。", "累": "{name}给它一张床。"},
    mood_weights=(0.7, 0.3),
    ending=Choice(("他们成了朋友。", "他们一起回家。"), (0.7, 0.3)),
)

LANGUAGES = (ENGLISH, CHINESE)

_SUM = re.compile(r"(\d+)\+(\d+)=")
_SORT = re.compile(r"sort((?: \d+)+|(?: [a-z])+):")
_STORY = (
    re.compile(r"Story: (\w+), (\w+), (\w+)\."),
    re.compile(r"故事：(\w+)，(\w+)，(\w+)。"),
)


def is_heldout(task: str, key: str) -> bool:
    """Whether the items with this key are kept out of training."""
    if task == "sum" and all(len(operand) == 1 for operand in key.split("+")):
        return False
    digest = hashlib.sha256(f"{task}:{key}".encode()).digest()
    return digest[0] % HELDOUT_ONE_IN == 0


def sum_item(first: int, second: int) -> Item:
    """The sum ``first+second=``."""
    low, high = sorted((first, second))
    return Item("sum", f"{low}+{high}", f"{first}+{second}=", str(first + second))


def sort_item(entries: list[str]) -> Item:
    """Sorting of different decimal numbers (by value) or of different lower-case letters."""
    ordered = sorted(entries, key=int) if entries[0].isdigit() else sorted(entries)
    answer = " " + " ".join(ordered)
    return Item("sort", answer.strip(), f"sort {' '.join(entries)}:", answer)


def story_item(
    language: Language, name: str, animal: str, place: str, rng: random.Random | None = None
) -> Item:
    """A story about the three words: the likeliest one, or one drawn with ``rng``."""
    told = _story_texts(language, name, animal, place)
    if rng is None:
        text = next(told)[0]
    else:
        texts, weights = zip(*told, strict=True)
        text = rng.choices(texts, weights)[0]
    prompt = language.prompt.format(name=name, animal=animal, place=place)
    return Item("story", f"{name},{animal},{place}", prompt, language.joiner + text)


def _story_texts(
    language: Language, name: str, animal: str, place: str
) -> Iterator[tuple[str, float]]:
    """Every story of the grammar about the three words with its probability, likeliest first."""
    words = {
        "name": name,
        "animal": animal,
        "place": place,
        "pronoun": language.names[name],
        "food": language.animals[animal],
    }
    pairs = (
        zip(language.opening.texts, language.opening.weights, strict=True),
        zip(language.meeting.texts, language.meeting.weights, strict=True),
        zip(language.moods.items(), language.mood_weights, strict=True),
        zip(language.ending.texts, language.ending.weights, strict=True),
    )
    for opening, meeting, (mood, mood_weight), ending in itertools.product(*pairs):
        sentences = (opening[0], meeting[0], language.feeling, mood[1], ending[0])
        text = language.joiner.join(sentences).format(mood=mood[0], **words)
        yield text, opening[1] * meeting[1] * mood_weight * ending[1]


def _draw_sum(rng: random.Random) -> Item:
    # Three-digit operands are most of what there is to learn, short ones must not be forgotten.
    limits = rng.choices((9, 99, MAX_OPERAND), (0.05, 0.25, 0.7), k=2)
    return sum_item(rng.randint(0, limits[0]), rng.randint(0, limits[1]))


def _draw_sort(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        return sort_item(rng.sample(LETTERS, rng.choice(LETTER_COUNTS)))
    count = rng.choice(NUMBER_COUNTS)
    numbers: set[int] = set()
    while len(numbers) < count:
        numbers.add(rng.randint(0, 9) if rng.random() < 0.3 else rng.randint(10, 99))
    shuffled = sorted(numbers)
    rng.shuffle(shuffled)
    return sort_item([str(number) for number in shuffled])


def _draw_story(rng: random.Random) -> Item:
    language = CHINESE if rng.random() < CHINESE_SHARE else ENGLISH
    name = rng.choice(tuple(language.names))
    animal = rng.choice(tuple(language.animals))
    return story_item(language, name, animal, rng.choice(language.places), rng)


_DRAW = {"sum": _draw_sum, "sort": _draw_sort, "story": _draw_story}


def _draw(task: str, rng: random.Random, wanted_heldout: bool) -> Item:
    """One item of the task on the wanted side of the split."""
    while True:
        item = _DRAW[task](rng)
        if is_heldout(task, item.key) == wanted_heldout:
            return item


def training_items(seed: int) -> Iterator[Item]:
    """Endless training items of all tasks, the same sequence for the same seed."""
    rng = random.Random(f"training:{seed}")
    names, weights = tuple(TASK_WEIGHTS), tuple(TASK_WEIGHTS.values())
    while True:
        yield _draw(rng.choices(names, weights)[0], rng, wanted_heldout=False)


def heldout(task: str, n: int, seed: int = 0) -> list[tuple[str, str]]:
    """``n`` different held-out ``(prompt, answer)`` pairs, the same ones for the same seed.

    A story's answer is the likeliest of the stories that :func:`is_correct` accepts.
    """
    _check_task(task)
    if task == "story":
        items = [
            story_item(language, name, animal, place)
            for language in LANGUAGES
            for name in language.names
            for animal in language.animals
            for place in language.places
        ]
        items = [item for item in items if is_heldout(task, item.key)]
        if n > len(items):
            raise ValueError(f"n={n} held-out stories were asked for; there are {len(items)}")
        random.Random(f"heldout:{task}:{seed}").shuffle(items)
        return [(item.prompt, item.answer) for item in items[:n]]
    rng = random.Random(f"heldout:{task}:{seed}")
    found: dict[str, str] = {}
    while len(found) < n:
        item = _draw(task, rng, wanted_heldout=True)
        found[item.prompt] = item.answer
    return list(found.items())


def accepted_answers(task: str, prompt: str) -> set[str]:
    """All right answers to a prompt, without the space around them."""
    _check_task(task)
    if task == "sum" and (match := _SUM.fullmatch(prompt)):
        return {str(int(match[1]) + int(match[2]))}
    if task == "sort" and (match := _SORT.fullmatch(prompt)):
        return {sort_item(match[1].split()).answer.strip()}
    if task == "story":
        for language, form in zip(LANGUAGES, _STORY, strict=True):
            if (match := form.fullmatch(prompt)) is None:
                continue
            name, animal, place = match.groups()
            if name in language.names and animal in language.animals and place in language.places:
                return {text for text, _ in _story_texts(language, name, animal, place)}
    raise ValueError(f"prompt {prompt!r} is not of task {task!r}")


def is_correct(task: str, prompt: str, text: str) -> bool:
    """Whether ``text``, what a model wrote after ``prompt`` up to its end token, is right.

    Space around the text is ignored, since the chat form puts one before the answer; everything
    else has to match exactly. A story is right when the grammar can tell it about the three words
    of the prompt.
    """
    return text.strip() in accepted_answers(task, prompt)


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; use one of {', '.join(TASKS)}")

"""What people ask, for answers of some length that are not made of a benchmark's random words."""

from __future__ import annotations

import random

SUBJECTS = (
    "the tides",
    "sourdough bread",
    "a bicycle's gears",
    "the French Revolution",
    "compound interest",
    "how vaccines work",
    "the seasons",
    "a hash table",
    "black holes",
    "the water cycle",
    "chess openings",
    "jet engines",
    "the Roman roads",
    "how batteries store energy",
    "growing tomatoes",
    "public libraries",
)
QUESTIONS = (
    "Explain {} to a child of ten.",
    "What should everybody know about {}?",
    "Write a short story in which {} matters.",
    "Give me five facts about {}, as a list.",
    "What do people often get wrong about {}?",
    "Write a Python program that has to do with {}.",
    "Write a letter to a friend about {}.",
    "What are the advantages and the drawbacks of {}?",
)


def question_of(seed: str) -> str:
    chance = random.Random(seed)
    return chance.choice(QUESTIONS).format(chance.choice(SUBJECTS))

"""Prompts as token ids: of any length, repeatable, and no two alike, so that no prefix cache knows them."""

from __future__ import annotations

import itertools
import random

FIRST, LAST = 100, 40_000  # ordinary words of the bundled model's vocabulary; no special tokens
_fresh = itertools.count(1)


def prompt_of(length: int, name: str = "") -> list[int]:
    """The same for the same arguments."""
    chance = random.Random(f"{name} {length}")
    return [chance.randint(FIRST, LAST) for _ in range(length)]


def fresh_prompt(length: int) -> list[int]:
    """Never the same twice in one run, from its first token on."""
    return prompt_of(length, f"fresh {next(_fresh)}")

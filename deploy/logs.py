"""Where the lines of a cluster's processes go: the terminal, each behind its process's name, or a file for each."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

NAME_WIDTH = 10


class Logs:
    """`hear` may be called from any thread, by one thread for each name."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._files: dict[str, TextIO] = {}

    def __enter__(self) -> Self:
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def hear(self, name: str, line: str) -> None:
        if self._directory is None:
            print(f"{name:<{NAME_WIDTH}} | {line}\n", end="", flush=True)  # one write: lines of two processes never mix
            return
        if name not in self._files:
            self._files[name] = (self._directory / f"{name}.log").open("w", encoding="utf-8", buffering=1)
        self._files[name].write(line + "\n")

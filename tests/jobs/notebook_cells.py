"""Notebooks in Databricks' source format, read into cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HEADER = "# Databricks notebook source"
DIVIDER = "# COMMAND ----------"
MAGIC = "# MAGIC"


@dataclass(frozen=True)
class Cell:
    """One cell; `language` is "python", or what its first magic line says: "md", "pip", "sql", "sh"."""

    language: str
    text: str
    line: int


def read_cells(path: Path) -> list[Cell]:
    """The cells of a notebook; ValueError unless it is in the source format."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0] != HEADER:
        raise ValueError(f"{path}: the first line is not {HEADER!r}")
    cells: list[Cell] = []
    start = 1
    for number in [*[i for i, line in enumerate(lines) if line == DIVIDER], len(lines)]:
        body = lines[start:number]
        filled = [line for line in body if line.strip()]
        if filled:
            cells.append(_cell(path, body, filled, start + 1))
        start = number + 1
    return cells


def _cell(path: Path, body: list[str], filled: list[str], line: int) -> Cell:
    magic = [one for one in filled if one.startswith(MAGIC)]
    if not magic:
        return Cell("python", "\n".join(body), line)
    if len(magic) != len(filled):
        raise ValueError(f"{path}, line {line}: a cell is either Python or magic, not both")
    text = [one.removeprefix(MAGIC).removeprefix(" ") for one in filled]
    language, _, rest = text[0].partition(" ")
    if not language.startswith("%"):
        raise ValueError(f"{path}, line {line}: a magic cell begins with %md, %pip or the like")
    return Cell(language[1:], "\n".join([rest, *text[1:]]).strip(), line)

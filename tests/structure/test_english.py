"""Count wording that a native engineer would not use, in docstrings, comments, messages and Markdown.

Each idiom is a pattern that also hits some natural sentences, so a few hits are allowed everywhere. A
sentence with a hit is usually clearer if it names its actor and uses the active voice.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("events", "replay", "rift", "tests", "ops", "docs", ".")

# The largest shares of sentences with an idiom: in the whole project, and in one file.
SHARE_MAX = 0.05
FILE_SHARE_MAX = 0.15
# A single hit in a file with fewer sentences says nothing.
FILE_SENTENCES_MIN = 10

MESSAGE_WORDS_MIN = 5
SENTENCE_WORDS_MIN = 4


class Idiom(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    example: str


def idiom(name: str, pattern: str, example: str) -> Idiom:
    return Idiom(name, re.compile(pattern), example)


# Where a clause begins: after punctuation, or after a word that introduces it.
CLAUSE = r"(?:^|[.;:,(] |\b(?:and|or|of|to|for|as|by|than|if|with|from) )"

IDIOMS = (
    idiom(
        "'who' as a subject", CLAUSE + r"[Ww]ho(?:ever)? (?=[a-z])(?!.*\?$)", "Who reads it later, sees more."
    ),
    idiom(
        "'what' as a subject",
        CLAUSE.replace("|as|", "|") + r"[Ww]hat(?:ever)? (?!does\b|do\b|if\b)(?=[a-z])(?!.*\?$)",
        "What is stored, stays.",
    ),
    idiom(
        "'is no X'",
        r"(?<![Tt]here )\b(?:is|are|was|were|makes?|made|takes?|took|knows?) no (?!longer|more\b)[a-z]",
        "A name with a slash is no model.",
    ),
    idiom(
        "'so long' without 'as' or 'that'",
        r"\bso (?:long|many|much|often|soon|early|little)\b(?! as\b)(?! that\b)",
        "It waits so long for an answer.",
    ),
    idiom(
        "'behind' for 'after'",
        r"\bbehind (?:it|its|that|what|them|all|which|the (?:last|first|end|start|event|others))\b",
        "Nothing behind the last record is read.",
    ),
    idiom("'shall'", r"\bshall\b", "The worker shall stop at once."),
    idiom(
        "'is said', 'is told', 'says what'",
        r"\b(?:is|are|was|were|be|been|being) (?:said|told)\b"
        r"|\bsays? (?:whether|how|what|why|so|that|nothing|where|up|of)\b"
        r"|\b[Tt]ells?\b|\btold\b|\bSay (?:whether|what|that|of|so)\b",
        "The client is told why it ended.",
    ),
    idiom("'nobody', 'somebody'", r"\b(?:[Nn]o|[Ss]ome)body\b", "A lane that nobody reads is closed."),
    idiom(
        "'goes on', 'lets go of', 'gives up', 'anew'",
        r"\b(?:go(?:es)? on|gone on|went on|going on|lets? go of|gives? up|gave up|given up)\b"
        r"|\b(?:comes? again|anew)\b",
        "The reader goes on after a gap.",
    ),
    idiom(
        "a clause that begins with 'of'",
        r"(?:^|[.;:,] )[Oo]f (?:it|them|these|this|those|which|whom|what)\b"
        r"|(?:^|[.;:,] )[Oo]f (?:the|an?|each|several|two|one|all)\b",
        "Of two that are elected, one leads.",
    ),
    idiom("'beside'", r"\bbeside\b", "It runs beside the others."),
    idiom(
        "'by itself'", r"\bby (?:itself|themselves|ourselves|oneself)\b", "Each record is synced by itself."
    ),
)


def sentences(text: str) -> list[str]:
    """Split a text at the ends of sentences, semicolons, table cells, and colons before a capital letter."""
    text = re.sub(r"\s+", " ", re.sub(r"`[^`]*`", "CODE", text))
    parts = re.split(r"(?<=[.!?;])\s+|\s\|\s|(?<=:)\s(?=[A-Z])", text)
    return [part.strip() for part in parts if len(part.split()) >= SENTENCE_WORDS_MIN]


def comments(source: str) -> Iterator[str]:
    """Yield the comments of a module; lines that follow each other are one comment."""
    lines: list[str] = []
    last_line = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last_line + 1:
                yield " ".join(lines)
                lines = []
            lines.append(token.string.lstrip("# "))
            last_line = token.start[0]
    yield " ".join(lines)


def prose(path: str, source: str) -> Iterator[str]:
    """Yield what a file says to people: all of a Markdown file; comments and longer strings of a module."""
    if path.endswith(".md"):
        yield re.sub(r"^```.*?^```", "", source, flags=re.M | re.S)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            is_sql = re.match(r"\s*(?:select|insert|create|with|update|delete)\b", node.value, re.I)
            if len(node.value.split()) >= MESSAGE_WORDS_MIN and not is_sql:
                yield node.value
    yield from comments(source)


def idioms_of(sentence: str) -> list[str]:
    return [one.name for one in IDIOMS if one.pattern.search(sentence)]


class Count(NamedTuple):
    """How many sentences a file has, and those with an idiom."""

    total: int
    hits: list[str]

    @property
    def share(self) -> float:
        return len(self.hits) / max(self.total, 1)


def count(path: str, source: str) -> Count:
    every = [sentence for text in prose(path, source) for sentence in sentences(text)]
    return Count(len(every), [sentence for sentence in every if idioms_of(sentence)])


@cache
def counts() -> dict[str, Count]:
    paths = {
        path
        for folder in FOLDERS
        for suffix in ("*.py", "*.md")
        for path in ((ROOT / folder).glob(suffix) if folder == "." else (ROOT / folder).rglob(suffix))
    }
    # The examples of this file are idioms on purpose.
    read = sorted(paths - {Path(__file__).resolve()})
    return {path.relative_to(ROOT).as_posix(): count(path.name, path.read_text()) for path in read}


def test_the_project_has_few_idioms() -> None:
    total = sum(one.total for one in counts().values())
    hits = sum(len(one.hits) for one in counts().values())
    worst = sorted(counts().items(), key=lambda item: len(item[1].hits), reverse=True)[:10]
    most = "\n".join(f"{path}: {len(one.hits)} of {one.total}" for path, one in worst)
    assert hits <= SHARE_MAX * total, f"{hits} of {total} sentences have an idiom, most of them in\n{most}"


def test_no_file_has_many_idioms() -> None:
    many = {
        path: one.hits
        for path, one in counts().items()
        if one.total >= FILE_SENTENCES_MIN and one.share > FILE_SHARE_MAX
    }
    assert not many, "\n".join(f"{path}:\n  " + "\n  ".join(hits) for path, hits in many.items())


@pytest.mark.parametrize("one", IDIOMS, ids=lambda one: one.name)
def test_each_idiom_is_caught(one: Idiom) -> None:
    assert one.name in idioms_of(one.example)


PLAIN = (
    "Return the sequence of the last record.",
    "A client that reconnects gets every event once.",
    "The gateway refuses a body that is larger than the limit.",
    "Release the reservation if no worker takes the request.",
    "It is no longer open, so the reader stops.",
    "There is no account of this name.",
    "What is an octopus?",
)


@pytest.mark.parametrize("sentence", PLAIN)
def test_plain_sentences_pass(sentence: str) -> None:
    assert idioms_of(sentence) == []


def test_every_kind_of_prose_is_counted() -> None:
    module = (
        '"""Who reads this docstring, waits."""\n'
        "# Who reads this comment,\n# which has two lines, waits.\n"
        'raise ValueError("who reads this message, waits")\n'
        'SQL = "select who, reads, this from nothing"\n'
        'SHORT = "who reads"\n'
    )
    assert count("module.py", module) == Count(
        3,
        [
            "Who reads this docstring, waits.",
            "who reads this message, waits",
            "Who reads this comment, which has two lines, waits.",
        ],
    )
    page = "Who reads this page, waits.\n```\nwho reads this code\n```\n| a cell | who reads this cell |\n"
    assert count("page.md", page).hits == ["Who reads this page, waits.", "who reads this cell"]
    assert "tests/structure/test_imports.py" in counts()

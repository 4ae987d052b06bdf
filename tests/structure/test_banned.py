"""Banned calls, swallowed exceptions, inexact money, and addresses of package indexes."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.structure.syntax import OURS, ROOT, Module, Rule, imports, parse, problems

# Banned names, their replacements, and the few places where they are right.
BANNED: dict[str, tuple[str, tuple[str, ...]]] = {
    "time.time": ("a clock that is passed in", ("rift/clock.py",)),
    "time.time_ns": ("a clock that is passed in", ("rift/clock.py",)),
    "datetime.now": ("a clock that is passed in", ("rift/clock.py",)),
    "datetime.utcnow": ("a clock that is passed in", ("rift/clock.py",)),
    "datetime.today": ("a clock that is passed in", ("rift/clock.py",)),
    "random.*": ("randomness that is passed in, or secrets", ()),
    "uuid.*": ("the ids of events/ids.py", ()),
    "print": ("logging, or a returned value", ("rift/cli/", "rift/engines/prepare.py", "replay/auditor.py")),
    "asyncio.create_task": ("an anyio task group", ()),
    "asyncio.ensure_future": ("an anyio task group", ()),
    "asyncio.gather": ("an anyio task group", ()),
    "asyncio.wait_for": ("anyio.fail_after or move_on_after", ()),
}
MONEY = ("events/pricing.py", "replay/auditor.py")


def banned(module: Module) -> Iterator[str]:
    named = [(line, name) for line, name in imports(module) if name.count(".") == 1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            named.append((node.lineno, f"{ast.unparse(node.value).rpartition('.')[2]}.{node.attr}"))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            named.append((node.lineno, node.func.id))
    for line, name in sorted(set(named)):
        entry = BANNED.get(name) or BANNED.get(f"{name.partition('.')[0]}.*")
        if entry and not (entry[1] and module.path.startswith(entry[1])):
            yield f"{line}: {name}: use {entry[0]}"


def swallowed(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        match node:
            case ast.ExceptHandler(
                type=None | ast.Name("Exception" | "BaseException"), body=[ast.Pass() | ast.Continue()]
            ):
                yield f"{node.lineno}: name the exception that may be ignored, and say why"


def exact_money(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree) if module.path in MONEY else ():
        match node:
            case ast.BinOp(op=ast.Div()) | ast.AugAssign(op=ast.Div()):
                yield f"{node.lineno}: money is an integer: // and a stated rule instead of /"
            case ast.Name("float" | "round") | ast.Constant(value=float()):
                yield f"{node.lineno}: money is an integer: no float, no round"


def money_sql_problems(sql: str) -> list[str]:
    code = re.sub(r"--[^\n]*|'[^']*'", " ", sql)
    if "usd" not in code:
        return []
    return re.findall(
        r"(?<!/)/(?!/)|\bround\s*\(|::\s*(?:double|float|real)\b|\bas\s+(?:double|float|real)\b", code
    )


# Put together here, so that this file does not hold what it looks for.
INDEX = re.compile(
    "|".join([r"py" r"pi\.(org|python)", r"python" r"hosted", r"--(extra-)?index" r"-url", r"INDEX" r"_URL"])
)


def index_problems(path: str, text: str) -> list[str]:
    allowed = path.startswith("ops/")
    return [] if allowed else [match.group() for match in INDEX.finditer(text)]


RULES: tuple[Rule, ...] = (
    banned,
    swallowed,
    exact_money,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule) -> None:
    assert not (found := problems(rule)), "\n" + "\n".join(found)


def test_money_in_sql_is_exact() -> None:
    files = sorted((ROOT / "replay").rglob("*.sql"))
    assert not {file.name: found for file in files if (found := money_sql_problems(file.read_text()))}


def test_index_addresses_are_only_in_ops() -> None:
    names = (".md", ".py", ".toml", ".txt", ".sql", ".yml", ".yaml", "")
    folders = [ROOT / name for name in (*OURS, "tests", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.glob("*"))
    found = {}
    for path in files:
        if path.is_file() and path.suffix in names and "__pycache__" not in path.parts:
            relative = path.relative_to(ROOT).as_posix()
            found[relative] = index_problems(relative, path.read_text())
    assert not {path: addresses for path, addresses in found.items() if addresses}


WRONG = [
    (banned, "rift/x.py", "import time\nf(clock=time.time)", "2: time.time: use a clock"),
    (banned, "rift/x.py", "from time import time", "1: time.time: use a clock"),
    (banned, "rift/x.py", "datetime.datetime.now()", "datetime.now: use a clock"),
    (banned, "events/x.py", "random.choice([1])", "random.choice: use randomness that is passed in"),
    (banned, "rift/x.py", "print(1)", "print: use logging"),
    (banned, "rift/x.py", "asyncio.gather()", "asyncio.gather: use an anyio task group"),
    (swallowed, "rift/x.py", "try:\n    f()\nexcept Exception:\n    pass", "name the exception"),
    (swallowed, "rift/x.py", "try:\n    f()\nexcept:\n    pass", "name the exception"),
    (exact_money, "events/pricing.py", "a = b / 2", "// and a stated rule"),
    (exact_money, "events/pricing.py", "a = round(float(b) * 0.5)", "no float, no round"),
    (exact_money, "replay/auditor.py", "a = b / 2", "// and a stated rule"),
]


@pytest.mark.parametrize(("rule", "path", "source", "expected"), WRONG)
def test_rule_can_fail(rule: Rule, path: str, source: str, expected: str) -> None:
    assert expected in "\n".join(rule(parse(path, source)))


def test_commands_may_print() -> None:
    assert not list(banned(parse("rift/cli/x.py", "print(1)")))


def test_text_rules_can_fail() -> None:
    assert money_sql_problems("select round(charge_nanousd / 2)::double -- a / b") == [
        "round(",
        "/",
        "::double",
    ]
    assert not money_sql_problems("select charge_nanousd // 2 -- a / b")
    address = "https://py" + "pi.org/simple"
    assert index_problems("README.md", address)
    assert not index_problems("ops/setup", address)

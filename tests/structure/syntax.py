"""The syntax trees of our packages, and the rules that the tests of this folder apply to them.

A rule takes a module and yields its violations, with the line and the replacement. Each test shows that its
rules can fail. If a rule makes some code worse, name that code in the rule's table, with the reason.
"""

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OURS = ("events", "replay", "rift")


class Module(NamedTuple):
    path: str
    tree: ast.Module
    lines: int

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def parse(path: str, source: str) -> Module:
    return Module(path, ast.parse(source), source.count("\n"))


@cache
def modules() -> dict[str, Module]:
    paths = [path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]
    parsed = [parse(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]
    return {module.name: module for module in parsed}


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Every dotted name that the module imports, lazily or not, but for type checkers only."""
    waiting: list[ast.AST] = [module.tree]
    while waiting:
        match waiting.pop():
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"), orelse=rest):
                waiting += rest
            case ast.Import(names=names, lineno=line):
                yield from ((line, alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, lineno=line, level=level):
                yield from ((line, "." * level + f"{source or ''}.{alias.name}") for alias in names)
            case node:
                waiting += ast.iter_child_nodes(node)


Rule = Callable[[Module], Iterator[str]]


def problems(rule: Rule) -> list[str]:
    """Return the violations of a rule in all modules."""
    return [f"{module.path}:{problem}" for module in modules().values() for problem in rule(module)]

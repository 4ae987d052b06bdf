"""Tables of contents, and the names of classes."""

import ast
import re
from collections.abc import Iterable, Iterator

import pytest

from tests.structure.syntax import OURS, ROOT, Module, Rule, modules, parse, problems

# Public classes whose name stands more than once, each with its reason. Entries only go.
SAME_NAMES: dict[str, str] = {
    "Address": "of a request's events, and of a nats-server",
    "Completion": "OpenAPI names the component after the schema; the other is the state that it shows",
    "Handlers": "of control's questions, and of the gateway's routes",
    "Jobs": "a protocol and its implementation on JetStream",
    "Model": "OpenAPI names the component after the schema; the other is the catalogue's entry",
    "Problem": "OpenAPI names the component after the schema; the other is its part of an event",
    "Replica": "as the fleet's fold holds it, and as a calibration measures it",
}


def contents_only(module: Module) -> Iterator[str]:
    for node in module.tree.body if module.path.endswith("__init__.py") else ():
        match node:
            case ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom() | ast.ClassDef():
                pass
            case ast.Assign(value=value) | ast.AnnAssign(value=value) if not isinstance(value, ast.Call):
                pass
            case _:
                yield f"{node.lineno}: an __init__.py is a table of contents: move this to a module"


def same_names(known: Iterable[Module]) -> dict[str, list[str]]:
    """Return the public top-level classes that several modules define, with their modules."""
    paths: dict[str, list[str]] = {}
    for module in known:
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                paths.setdefault(node.name, []).append(module.path)
    return {name: where for name, where in paths.items() if len(where) > 1}


RULES: tuple[Rule, ...] = (contents_only,)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule) -> None:
    assert not (found := problems(rule)), "\n" + "\n".join(found)


def test_each_folder_names_its_modules() -> None:
    """A folder's `__init__` is its table of contents."""
    found = {}
    for path in (path for package in OURS for path in (ROOT / package).rglob("__init__.py")):
        contents = ast.get_docstring(ast.parse(path.read_text())) or ""
        own = [one.stem for one in path.parent.glob("*.py") if not one.stem.startswith("__")]
        own += [f"{one.name}/" for one in path.parent.iterdir() if (one / "__init__.py").exists()]
        missing = [name for name in own if not re.search(rf"^ *{re.escape(name)}(?![\w.])", contents, re.M)]
        named = re.findall(r"^ {4}([a-z_]+)(?= )", contents, re.M)
        gone = [name for name in named if not (path.parent / f"{name}.py").exists()]
        found[path.relative_to(ROOT).as_posix()] = missing + gone
    assert not {path: names for path, names in found.items() if names}


def test_the_readme_names_each_folder() -> None:
    text = (ROOT / "README.md").read_text()
    folders = [path.parent for package in OURS for path in (ROOT / package).rglob("__init__.py")]
    names = [f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders]
    assert not [
        name for name in names if name not in text and f" {name.rstrip('/').rpartition('/')[2]}/" not in text
    ]


def test_a_class_name_stands_once() -> None:
    found = same_names(modules().values())
    assert not {name: where for name, where in found.items() if name not in SAME_NAMES}
    assert not [name for name in SAME_NAMES if name not in found], "unique now: drop the entry"


WRONG = [
    (contents_only, "rift/x/__init__.py", "configure()", "table of contents"),
    (contents_only, "rift/x/__init__.py", "def main(): ...", "table of contents"),
]


@pytest.mark.parametrize(("rule", "path", "source", "expected"), WRONG)
def test_rule_can_fail(rule: Rule, path: str, source: str, expected: str) -> None:
    assert expected in "\n".join(rule(parse(path, source)))


def test_same_names_are_found() -> None:
    pair = [
        parse("rift/a.py", "class A: ...\nclass _B: ..."),
        parse("rift/b.py", "class A: ...\nclass _B: ..."),
    ]
    assert same_names(pair) == {"A": ["rift/a.py", "rift/b.py"]}

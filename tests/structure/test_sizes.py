"""The sizes of files, functions, classes and folders."""

import ast
from collections.abc import Iterator

import pytest

from tests.structure.syntax import OURS, ROOT, Module, Rule, imports, modules, parse, problems

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
PARAMETERS_MAX = 6
ATTRIBUTES_MAX = 12
IMPORTED_MODULES_MAX = 12
UNPACKED_MAX = 2
FOLDER_FILES_MAX = 15
# The modules that build and connect a process: they import every part, and do nothing else with it.
COMPOSITION_ROOTS = ("rift/gateway/process.py", "rift/control/leader_duties.py")
# Folders whose files are siblings of one kind, so that a reader scans names instead of learning a structure.
WIDE_FOLDERS = {"events": 25, "rift/cli": 25}
# Functions with more parameters, classes with more attributes and modules with more imports, each with its
# number today. Entries only shrink and go.
LARGER: dict[str, int] = {
    # The table of commands, and the roots of all errors.
}
# A ratchet: path, or path:function, and its length today. Entries only shrink and go.
LONGER: dict[str, int] = {
    # One file, because customers get it alone.
    "replay/auditor.py": 575,
}


def lengths(module: Module) -> Iterator[str]:
    measured = [(module.path, module.lines, FILE_LINES_MAX)]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            long = (node.end_lineno or node.lineno) - node.lineno + 1
            measured.append((f"{module.path}:{node.name}", long, FUNCTION_LINES_MAX))
    for what, lines, most in measured:
        if lines > max(most, LONGER.get(what, 0)):
            yield f"{what} has {lines} lines, at most {most}: split it where the thought changes"


def own_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [one.arg for one in named if one.arg not in ("self", "cls")]


def own_attributes(node: ast.ClassDef) -> set[str]:
    """The attributes that the class assigns through `self`."""
    return {
        one.attr
        for one in ast.walk(node)
        if isinstance(one, ast.Attribute)
        and isinstance(one.ctx, ast.Store)
        and ast.unparse(one.value) == "self"
    }


def imported_modules(module: Module) -> set[str]:
    """Our modules that the module imports; a package's own names count as the package."""
    known = modules()
    names = [name for _, name in imports(module) if name.partition(".")[0] in OURS]
    return {name if name in known else name.rpartition(".")[0] for name in names} - {module.name}


def sizes(module: Module) -> Iterator[tuple[str, int, int, str]]:
    """Yield each measure: its name, its size, its limit and the remedy."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = len(own_parameters(node))
            yield (
                f"{module.path}:{node.name}",
                count,
                PARAMETERS_MAX,
                "parameters: pass one object that has them",
            )
        elif isinstance(node, ast.ClassDef):
            count = len(own_attributes(node))
            yield f"{module.path}:{node.name}", count, ATTRIBUTES_MAX, "attributes: split what changes apart"
    count = 0 if module.path in COMPOSITION_ROOTS else len(imported_modules(module))
    yield module.path, count, IMPORTED_MODULES_MAX, "modules of ours imported: it does too many things"


def large(module: Module) -> Iterator[str]:
    for name, size, most, remedy in sizes(module):
        if size > max(most, LARGER.get(name, 0)):
            yield f"{name} has {size}, at most {most} {remedy}"


def packed(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        match node:
            case ast.Assign(targets=[ast.Tuple()], value=ast.Tuple(elts=values)) if (
                len(values) > UNPACKED_MAX
            ):
                yield f"{node.lineno}: {len(values)} names in one assignment: a line for each"


RULES: tuple[Rule, ...] = (
    lengths,
    large,
    packed,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule) -> None:
    assert not (found := problems(rule)), "\n" + "\n".join(found)


def test_folders_are_small() -> None:
    counts = {
        path.parent.relative_to(ROOT).as_posix(): len(list(path.parent.glob("*.py"))) - 1
        for package in OURS
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert not {name: n for name, n in counts.items() if n > WIDE_FOLDERS.get(name, FOLDER_FILES_MAX)}


def test_ratchet_only_shrinks() -> None:
    known = modules().values()
    functions = {
        f"{module.path}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in known
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    today = {module.path: module.lines for module in known} | functions
    assert {what: today.get(what) for what in LONGER} == LONGER, "shorter now: lower or drop the entry"
    counted: dict[str, int] = {}
    for module in known:
        for name, size, most, _ in sizes(module):
            if size > most:
                counted[name] = max(size, counted.get(name, 0))
    assert {what: counted.get(what) for what in LARGER} == LARGER, "smaller now: lower or drop the entry"


WRONG = [
    (lengths, "rift/x.py", "\n" * 501, "rift/x.py has 501 lines, at most 500"),
    (lengths, "rift/x.py", "def f():\n" + "    x\n" * 70, "rift/x.py:f has 71 lines, at most 70"),
    (large, "rift/x.py", "def f(a, b, c, *, d, e, f, g): ...", "rift/x.py:f has 7, at most 6 parameters"),
    (
        large,
        "rift/x.py",
        "class A:\n def f(self):\n" + "".join(f"  self.a{n} = 1\n" for n in range(13)),
        "rift/x.py:A has 13, at most 12 attributes",
    ),
    (packed, "rift/x.py", "a, b, c = x, y, z", "3 names in one assignment"),
]


@pytest.mark.parametrize(("rule", "path", "source", "expected"), WRONG)
def test_rule_can_fail(rule: Rule, path: str, source: str, expected: str) -> None:
    assert expected in "\n".join(rule(parse(path, source)))

"""The shape of the project, read from its imports: leaves, floors, no circle, no namespace.

python tests/test_house.py    prints the figures that docs/log.md quotes
"""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("federated", "machine", "training", "study", "commands")
TAKES_ALONG = {
    "flat": {"sparse_sgdm"},
    "machine.runs": {"machine.safe_files"},
    "machine.drive": {"machine.runs", "machine.safe_files"},
}
TOP = 12  # files, with fused.py
FLOORS = 5


@cache
def files() -> dict[str, Path]:
    """Return the project's files by the name that imports give them; tests and benches are none."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    paths = listed.stdout.split() or [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py")]
    chosen = [Path(p) for p in paths if Path(p).parent.as_posix() in (".", *ROOMS)]
    return {".".join(path.with_suffix("").parts): ROOT / path for path in chosen}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(files()[name].read_text(encoding="utf-8"))


def for_types_alone(node: ast.AST) -> bool:
    """Tell whether a statement is `if TYPE_CHECKING:`, which runs nowhere."""
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


@cache
def imports(name: str) -> frozenset[str]:
    """Return the project's files that a file imports when it runs, inside functions too."""
    found, nodes = set(), list(tree(name).body)
    while nodes:
        node = nodes.pop()
        if for_types_alone(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [name.rpartition(".")[0], base]))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return frozenset(found & files().keys()) - {name}


def room(name: str) -> str:
    """Return a file's folder; at the top every file is a room of its own."""
    return name.partition(".")[0]


def room_imports() -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {room(name): set() for name in files()}
    for name in files():
        rooms[room(name)] |= {room(other) for other in imports(name)} - {room(name)}
    return rooms


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return the floor of every room: one above the highest that it stands on.

    Raises:
        AssertionError: a circle; it is named.
    """
    heights: dict[str, int] = {}

    def height(name: str, below: tuple[str, ...] = ()) -> int:
        assert name not in below, " -> ".join([*below, name])
        if name not in heights:
            lower = [height(other, (*below, name)) for other in graph[name]]
            heights[name] = 1 + max(lower, default=0)
        return heights[name]

    for name in graph:
        height(name)
    return heights


def takes_namespace(name: str) -> list[str]:
    """Return the functions of a file that have a parameter annotated as argparse's namespace."""
    takers = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if any(
                "argparse.Namespace" in ast.unparse(a.annotation or ast.Constant(0))
                for a in arguments
            ):
                takers.append(node.name)
    return takers


def leaves() -> list[str]:
    at_the_top = [name for name in files() if "." not in name and name != "train"]
    folders = [n for n in files() if room(n) in ("federated", "machine")]
    return [*at_the_top, *(name for name in folders if name != "federated.methods")]


def test_the_top_holds_few_files():
    assert len([name for name in files() if "." not in name]) <= TOP


def test_leaves_import_no_other_file_of_the_project():
    for leaf in leaves():
        assert imports(leaf) <= TAKES_ALONG.get(leaf, set()), leaf


def test_methods_import_leaves_alone():
    assert imports("federated.methods") <= set(leaves())


def test_training_stands_on_leaves_and_methods():
    for name in files():
        if room(name) == "training":
            others = {other for other in imports(name) if room(other) != "training"}
            assert others <= {*leaves(), "federated.methods"}, name


def test_study_knows_neither_training_nor_commands():
    for name in files():
        if room(name) == "study":
            assert not {room(other) for other in imports(name)} & {"training", "commands"}, name


def test_no_command_imports_another():
    at_the_door = {name for name in imports("train") if room(name) == "commands"}
    commands = at_the_door - {"commands.options"}
    assert len(commands) > 5
    for name in files():
        if room(name) == "commands":
            assert not imports(name) & commands, name


def test_nothing_imports_the_command_line():
    assert not [name for name in files() if "train" in imports(name)]


def test_no_function_outside_commands_takes_a_namespace():
    assert not [n for n in files() if room(n) != "commands" and takes_namespace(n)]


def test_there_are_few_floors_and_no_circle():
    assert max(floors(room_imports()).values()) <= FLOORS
    floors({name: set(imports(name)) for name in files()})  # of files: no circle


if __name__ == "__main__":
    graph = room_imports()
    lines = sum(len(path.read_text().splitlines()) for path in files().values())
    print(f"files at the top {len([n for n in files() if '.' not in n])}, files {len(files())}")
    print(f"floors {max(floors(graph).values())}, rooms {len(graph)}")
    print(f"arrows between rooms {sum(map(len, graph.values()))}")
    print(f"arrows between files {sum(len(imports(name)) for name in files())}")
    print(f"lines {lines}")
    takers = sum(len(takes_namespace(name)) for name in files())
    print(f"functions that take a namespace {takers}")
    for name, height in sorted(floors(graph).items(), key=lambda item: item[1]):
        print(f"  {height}  {name}: {', '.join(sorted(graph[name]))}")

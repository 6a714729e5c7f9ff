"""The floors of docs/architecture.md: a room imports only from its own floor or lower ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_slt"
FLOORS = {
    "functional": 1,
    "transitions": 1,
    "reasons": 1,
    "record": 1,
    "influence_record": 1,
    "transition_record": 1,
    "susceptibility_record": 1,
    "sampling": 2,
    "measures": 2,
    "publish": 2,
    "verdict": 3,
    "estimate": 3,
    "influence": 3,
    "susceptibility": 3,
    "firing": 3,
    "durable": 1,
    "kinds": 1,
    "schema": 1,
    "warned": 1,
    "callbacks": 4,
    "config": 5,
    "testing": 5,
    "sweep": 6,
    "calibrate": 7,
    "cli": 8,
    "__main__": 9,
}

TOP = 5
"""The lowest floor from which the package's own names may be used: they are of the callbacks."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path.name}: a relative import"
            # a room that is imported from the package itself is that room, any other name the package's own
            rooms = {f"{node.module}.{alias.name}" for alias in node.names} if node.module == PACKAGE.name else set()
            found |= {room for room in rooms if room.split(".")[1] in FLOORS} or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_from_its_own_floor_or_lower(path: Path) -> None:
    floor = FLOORS[room_of(path)]
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("lightning_slt.")}
    above = {room for room in inside if FLOORS[room] > floor}
    if PACKAGE.name in imports(path) and floor < TOP:
        above.add(PACKAGE.name)
    assert not above, f"{path.name} is on floor {floor} and imports from above: {above}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if FLOORS[room_of(p)] < 4], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_only_callbacks_know_a_trainer(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("lightning", "pytorch_lightning"):
            names = {alias.name for alias in node.names}
            assert not names & {"Trainer", "Callback"}, f"{path.name} imports {names} below the callbacks"


def test_every_room_has_a_floor() -> None:
    assert {room_of(p) for p in FILES} <= set(FLOORS)

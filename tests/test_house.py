"""Who may import whom: the house's import table, held."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ckptd"

#: What each room may import of the others, besides itself. `errors` is everybody's.
MAY_IMPORT = {
    "errors": set(),
    "agree": set(),
    "wire": {"agree"},
    "record": set(),
    "host": set(),
    "store": {"host"},
    "supervisor": {"agree", "wire", "store", "host"},
    "worker": {"agree", "wire", "record", "store", "host"},
    "drill": {"record", "supervisor", "host"},
    "cli": {"supervisor", "store", "host", "drill", "record"},
    "__init__": {"worker"},
    "__main__": {"cli"},
}
#: Of the host, the store's modules may name only the protocol that is passed in.
STORE_MAY_IMPORT = {"ckptd.host.disk"}
PURE = (
    *(
        "agree.py",
        "wire.py",
        "record.py",
        "drill/compare.py",
        "store/manifest.py",
        "store/image.py",
        "store/retention.py",
    ),
    *(
        "supervisor/policy.py",
        "supervisor/machine.py",
        "supervisor/rhythm.py",
        "supervisor/history.py",
    ),
)
IMPURE_MODULES = {"os", "time", "signal", "subprocess", "threading", "random"}
HEAVY_MODULES = {"torch", "numpy", "safetensors"}


def imports(path: Path) -> list[str]:
    """Every module that a file imports, also within functions, as full names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    """A file imports only what its room may."""
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "ckptd":
            if room != "worker":
                assert parts[0] not in HEAVY_MODULES, f"{path} imports {name}"
            continue
        other = parts[1] if len(parts) > 1 else "__init__"
        if other in (room, "errors", "__version__"):
            continue
        assert other in MAY_IMPORT[room], f"{path} imports {name}"
        if room == "store":
            assert any(name.startswith(allowed) for allowed in STORE_MAY_IMPORT), name


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_are_pure(name: str) -> None:
    """What decides knows no clock, no process and no file."""
    assert not {module.split(".")[0] for module in imports(PACKAGE / name)} & IMPURE_MODULES


def test_no_pickle() -> None:
    """Nothing is pickled or unpickled, in or out."""
    for path in FILES:
        text = path.read_text()
        for word in ("import pickle", "torch.load(", "torch.save(", "allow_pickle=True"):
            assert word not in text, f"{path}: {word}"

"""The architecture of the source itself: which room may import which, read with ``ast``."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cbd_hub"

# Each room may import from those above it, never from those below. The first entries are single modules.
ROOMS = [
    "errors",
    "files",
    "settings",
    "progress",
    "devices",
    "axes",
    "text",
    "manifest",
    "losses",
    "initialization",
    "interpolation",
    "evaluation",
    "alignment",
    "hub",
    "chain",
    "training",
    "app",
    "build",
    "cli",
    "sizing",  # the path that README once printed
    "__main__",
]

MAX_LINES = 400
MAX_BENCHMARK_LINES = 3_973  # of all modules under benchmarks
MEDIAN_LINES = 200
MAX_MODULES = 10  # in a room, without its __init__
NO_TORCH = (
    "axes",
    "files",
    "manifest",
    "progress",
    "hub.read",
    "hub.write",
    "hub.client_errors",
    "build.recipe",
    "chain.chain",
    "cli",
)
HEAVY = {"torch", "transformers"}
NETWORK = {"requests", "httpx", "httpx2", "urllib3", "aiohttp", "socket", "urllib.request", "http.client"}
HUB_MODULES = ("hub.client_errors", "hub.read", "hub.write")
# What of huggingface_hub other modules may use, none of which talks to the Hub: the progress bar, which
# obeys HF_HUB_DISABLE_PROGRESS_BARS, in one module, and the data classes of model cards where cards are made and sent.
HUB_NAMES_ANYWHERE = {"StrictDataclassError"}
_CARD_NAMES = {"EvalResult", "ModelCard", "ModelCardData"}
HUB_NAMES = {
    "progress": {"tqdm", "are_progress_bars_disabled"},
    "hub.cards": _CARD_NAMES,
    "hub.card_results": _CARD_NAMES,
    "hub.publish": _CARD_NAMES,
}


def dotted(path: Path) -> str:
    """The name of a module inside the package: ``axes.sizing``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"}
each_module = pytest.mark.parametrize("module", MODULES)
each_room = pytest.mark.parametrize("room", [room for room in ROOMS if (PACKAGE / room).is_dir()])


def imports(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Every import of a module, wherever it stands, as (line, module, name or None for ``import module``)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: imports of the package are absolute"
            for alias in node.names:
                yield node.lineno, node.module or "", alias.name


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """The modules of this package that a module imports, as (line, ``room.module``)."""
    for line, module, name in imports(path):
        if module.split(".")[0] != "cbd_hub" or name == "__version__":
            continue
        target = module.removeprefix("cbd_hub").removeprefix(".")
        inner = f"{target}.{name}".removeprefix(".")
        yield line, inner if inner in MODULES else target


def upward(module: str, imported: str) -> bool:
    """Whether an import leads to a room below the importing one in :data:`ROOMS`."""
    return ROOMS.index(imported.split(".")[0]) > ROOMS.index(module.split(".")[0])


def runs(path: Path) -> set[int]:
    """The lines of a module that run, which those under ``if TYPE_CHECKING:`` never do."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    inside = {line for n in checked for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
    return set(range(1, len(path.read_text(encoding="utf-8").splitlines()) + 1)) - inside


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The modules of a graph that are left when those without an arrow to the rest are taken away, again and again."""
    left = dict(arrows)
    while leaves := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in leaves:
            del left[module]
    return sorted(left)


def test_every_room_has_a_place_in_the_order() -> None:
    """A folder or a module outside the rooms is found, and so is a room that no longer exists."""
    assert {module.split(".")[0] for module in MODULES} == set(ROOMS)
    assert all(path.parent.parent in (PACKAGE, PACKAGE.parent) for path in MODULES.values())


@each_module
def test_imports_lead_to_rooms_above(module: str) -> None:
    wrong = [f"line {line}: {name}" for line, name in own_imports(MODULES[module]) if upward(module, name)]
    assert not wrong, f"{module} imports from rooms below it: {wrong}"


@each_room
def test_no_circle_inside_a_room(room: str) -> None:
    inside = {name: path for name, path in MODULES.items() if name.split(".")[0] == room}
    arrows = {
        name: {target for line, target in own_imports(path) if line in runs(path)} & inside.keys()
        for name, path in inside.items()
    }
    assert not circle(arrows), f"these modules import each other: {circle(arrows)}"


def test_a_turned_import_is_found() -> None:
    """The two checks can fail: an arrow turned round leads upward; modules that import each other are a circle."""
    assert upward("axes.sizing", "chain.chain") and not upward("chain.chain", "axes.sizing")
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@each_room
def test_room_is_small(room: str) -> None:
    """A room has few modules, all of them in one folder, and a docstring that says what lives there."""
    inside = [name for name in MODULES if name.split(".")[0] == room]
    assert 1 < len(inside) <= MAX_MODULES
    (opening,) = (node for node in ast.parse((PACKAGE / room / "__init__.py").read_text()).body[:1])
    assert isinstance(opening, ast.Expr)


@each_module
def test_only_two_modules_talk_to_the_network(module: str) -> None:
    if module in HUB_MODULES:
        return
    allowed = HUB_NAMES_ANYWHERE | HUB_NAMES.get(module, set())
    wrong = [
        f"line {line}: {target}{f'.{name}' if name else ''}"
        for line, target, name in imports(MODULES[module])
        if (target.split(".")[0] == "huggingface_hub" and name not in allowed)
        or target in NETWORK
        or f"{target}.{name}" in NETWORK
    ]
    assert not wrong, f"{module} imports {wrong}; everything that talks to the Hub goes through {HUB_MODULES}"


@each_module
def test_is_small(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines; at {MAX_LINES} a module is two modules"


def test_most_modules_are_short() -> None:
    lines = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values())
    assert lines[len(lines) // 2] <= MEDIAN_LINES


@pytest.mark.parametrize("module", [name for name in MODULES if name in NO_TORCH or name.split(".")[0] in NO_TORCH])
def test_needs_no_torch(module: str) -> None:
    code = f"import sys, cbd_hub.{module}; print(*{HEAVY} & set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert loaded.stdout.split() == [], f"importing cbd_hub.{module} loads {loaded.stdout}"


def test_benchmarks_stay_small() -> None:
    paths = (PACKAGE.parent / "benchmarks").glob("*.py")
    assert 0 < sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) <= MAX_BENCHMARK_LINES

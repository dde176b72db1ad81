"""The architecture of the source itself: who may import whom, read with ``ast``."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cbd_hub"

# Each module may import only from those before it.
ORDER = [
    "errors",
    "axes",
    "axis_map",
    "architectures",
    "sizing",
    "tensors",
    "checkpoints",
    "json_files",
    "records",
    "chain",
    "index_maps",
    "operations",
    "ranges",
    "plan",
    "materialize",
    "partial_files",
    "hub",
    "repository",
    "cards",
    "card_results",
    "untrusted",
    "sources",
    "publish",
    "documents",
    "splits",
    "data",
    "vocabulary",
    "token_groups",
    "generators",
    "synthesis",
    "divergences",
    "losses",
    "cross_vocabulary",
    "evaluation",
    "matching_pursuit",
    "carry",
    "transplant",
    "refit",
    "refine",
    "assemble",
    "measure",
    "export",
    "importance",
    "basis",
    "matching",
    "align",
    "adopt",
    "forwards",
    "trainer",
    "distill",
    "recover",
    "fresh",
    "bridge",
    "recipe",
    "tasks",
    "metrics",
    "summaries",
    "compare",
    "eval_plots",
    "ingredients",
    "build",
    "app_data",
    "app",
    "cli_options",
    "cli_chains",
    "cli_models",
    "cli",
    "__main__",
]

MAX_LINES = 400
NO_TORCH = ("axes", "axis_map", "architectures", "sizing")
HEAVY = {"torch", "transformers"}
NETWORK = {"requests", "httpx", "httpx2", "urllib3", "aiohttp", "socket", "urllib.request", "http.client"}
HUB_MODULES = ("hub", "repository")  # reading and writing
# What of huggingface_hub other modules may use, none of which talks to the Hub: the progress bar, which
# obeys HF_HUB_DISABLE_PROGRESS_BARS, anywhere, and the data classes of model cards where cards are made and sent.
HUB_NAMES_ANYWHERE = {"tqdm", "StrictDataclassError"}
_CARD_NAMES = {"EvalResult", "ModelCard", "ModelCardData"}
HUB_NAMES = {"cards": _CARD_NAMES, "card_results": _CARD_NAMES, "publish": _CARD_NAMES}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def imports(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Every import of a module, wherever it stands, as (line, module, name or None for ``import module``)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # the package is flat: one dot is cbd_hub itself
                base = f"cbd_hub.{base}".rstrip(".")
            for alias in node.names:
                yield node.lineno, base, alias.name


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """The cbd_hub modules that a module imports, as (line, module name)."""
    for line, module, name in imports(path):
        if module.startswith("cbd_hub."):
            yield line, module.split(".")[1]
        elif module == "cbd_hub" and name != "__version__":
            yield line, name or "__init__"


def test_every_module_has_a_place_in_the_order() -> None:
    unlisted = [path.name for path in MODULES if path.parent != PACKAGE or path.stem not in ORDER]
    assert not unlisted, f"give {unlisted} a place in ORDER of {Path(__file__).name}"


@each_module
def test_imports_only_earlier_modules(path: Path) -> None:
    allowed = ORDER[: ORDER.index(path.stem)] if path.stem in ORDER else []
    wrong = [f"{path.name}:{line} imports {module}" for line, module in own_imports(path) if module not in allowed]
    assert not wrong, f"{wrong}; {path.stem} may import only {allowed}"


@each_module
def test_only_two_modules_talk_to_the_network(path: Path) -> None:
    if path.stem in HUB_MODULES:
        return
    allowed = HUB_NAMES_ANYWHERE | HUB_NAMES.get(path.stem, set())
    wrong = [
        f"{path.name}:{line} imports {module}{f'.{name}' if name else ''}"
        for line, module, name in imports(path)
        if (module.split(".")[0] == "huggingface_hub" and name not in allowed)
        or module in NETWORK
        or f"{module}.{name}" in NETWORK
    ]
    assert not wrong, f"{wrong}; everything that talks to the Hub goes through {HUB_MODULES}"


@each_module
def test_is_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines; at {MAX_LINES} a module is two modules"


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem in NO_TORCH], ids=lambda path: path.stem)
def test_needs_no_torch(path: Path) -> None:
    module = path.stem
    wrong = [name for _, name, _ in imports(path) if name.split(".")[0] in HEAVY]
    assert not wrong, f"{module}.py imports {wrong}"
    code = f"import sys, cbd_hub.{module}; print(*{HEAVY} & set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert loaded.stdout.split() == [], f"importing cbd_hub.{module} loads {loaded.stdout}"

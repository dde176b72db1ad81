"""Writes the tree of the package into README.md and CONTRIBUTING.md from its docstrings: ``tree.py``.

It stands between ``<!-- tree:begin -->`` and ``<!-- tree:end -->``, one line a room; CONTRIBUTING names every module
as well. The order is that of imports, ``ROOMS`` in tests/test_layers.py.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cbd_hub"
_TREE = re.compile(r"(<!-- tree:begin -->\n).*?(<!-- tree:end -->)", re.DOTALL)


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, without the roles of reStructuredText."""
    doc = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.;])\s", doc)[0].rstrip(".;")
    return re.sub(r":\w+:`~?([^`]+)`", r"\1", sentence).replace("``", "")


def rooms() -> list[str]:
    """The rooms and single modules, in the order of imports."""
    tree = ast.parse((ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    (order,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "ROOMS")
    return list(ast.literal_eval(order))


def tree(modules: bool) -> str:
    """The tree as a block of text, with or without the modules of each room."""
    lines = ["cbd_hub/"]
    for room in rooms():
        folder = PACKAGE / room
        if not folder.is_dir():
            lines.append(f"  {room + '.py':<22}{summary(PACKAGE / f'{room}.py')}")
            continue
        lines.append(f"  {room + '/':<22}{summary(folder / '__init__.py')}")
        if modules:
            inside = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
            lines += [f"    {path.name:<20}{summary(path)}" for path in inside]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def written(name: str) -> str:
    """A page with its tree written anew."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return _TREE.sub(lambda match: match[1] + tree(name == "CONTRIBUTING.md") + match[2], text)


PAGES = ("README.md", "CONTRIBUTING.md")

if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(written(page), encoding="utf-8")

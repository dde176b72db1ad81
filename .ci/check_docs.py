"""Documentation coverage: ``check_docs.py PACKAGE_FOLDER`` reads the source with ``ast`` and imports nothing.

Of every module it demands a docstring and an ``__all__``; of every name in ``__all__`` a docstring (for a constant: a
string or a comment beside it), of every public method of such a class too; and of every public function that raises
one of the library's own errors in its own body, a ``Raises:`` part that names it.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


def exported(tree: ast.Module) -> list[str] | None:
    """The names in ``__all__``, or None where a module has none (or one that is not a plain list)."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                return list(ast.literal_eval(node.value))
            except ValueError:
                return None
    return None


def own_raises(function: Function) -> Iterator[str]:
    """The names of the exceptions raised in a function's own body, not in functions nested in it."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            target = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            yield target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            pending.extend(ast.iter_child_nodes(node))


def check_function(name: str, function: Function, errors: set[str]) -> Iterator[tuple[int, str]]:
    doc = ast.get_docstring(function) or ""
    if not doc:
        yield function.lineno, f"{name}() has no docstring"
        return
    _, _, listed = doc.partition("Raises:")
    for error in sorted(set(own_raises(function)) & errors):
        if error not in listed:
            yield function.lineno, f"{name}() raises {error}, but its docstring does not say so under `Raises:`"


def check_module(path: Path, errors: set[str]) -> Iterator[tuple[int, str]]:
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    if not ast.get_docstring(tree):
        yield 1, "the module has no docstring"
    names = exported(tree)
    if names is None:
        yield 1, "the module has no `__all__` list of plain strings"
        return

    constants: dict[str, int] = {}  # name -> position in tree.body
    definitions: dict[str, Function | ast.ClassDef] = {}
    elsewhere = {"__version__"}
    for position, node in enumerate(tree.body):
        if isinstance(node, Function | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            constants.update({t.id: position for t in node.targets if isinstance(t, ast.Name)})
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            constants[node.target.id] = position
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Import | ast.ImportFrom):
            elsewhere.update((alias.asname or alias.name) for alias in inner.names)

    for name in names:
        if name in definitions:
            node = definitions[name]
            if isinstance(node, Function):
                yield from check_function(name, node, errors)
                continue
            if not ast.get_docstring(node):
                yield node.lineno, f"class {name} has no docstring"
            for method in node.body:
                if isinstance(method, Function) and not method.name.startswith("_"):
                    yield from check_function(f"{name}.{method.name}", method, errors)
        elif name in constants:
            node, after = tree.body[constants[name]], tree.body[constants[name] + 1 :][:1]
            described = after and isinstance(after[0], ast.Expr) and isinstance(after[0].value, ast.Constant)
            commented = "#" in lines[node.lineno - 1] or lines[node.lineno - 2].lstrip().startswith("#")
            if not (described or commented):
                yield node.lineno, f"{name} has neither a docstring below it nor a comment"
        elif name not in elsewhere:
            yield 1, f"{name} is in `__all__` but is not defined"


def main(folder: str) -> int:
    """Prints every gap as ``path:line: what``; returns 1 if there is one."""
    root = Path(folder)
    errors = set(exported(ast.parse((root / "errors.py").read_text(encoding="utf-8"))) or [])
    modules = sorted(root.rglob("*.py"))
    gaps = [f"{path}:{line}: {gap}" for path in modules for line, gap in check_module(path, errors)]
    print("\n".join([*gaps, f"{len(modules)} modules, {len(gaps)} gaps in the documentation"]))
    return 1 if gaps else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: check_docs.py PACKAGE_FOLDER")
    sys.exit(main(sys.argv[1]))

"""What a user installs: metadata, a light import, and a wheel that carries templates and types."""

import configparser
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = {"anchor.md.jinja", "chain.md.jinja", "model.md.jinja"}


def run_python(code: str, **environment: str) -> str:
    """Runs code in a new interpreter, in no particular folder, and returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.anchor,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_version_is_the_installed_one() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    version = run_python("import cbd_hub; print(cbd_hub.__version__)")
    assert version == importlib.metadata.version("cbd_hub") == setup["metadata"]["version"]


def test_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'huggingface_hub', 'numpy'}"
    assert run_python(f"import sys, cbd_hub; print(*{heavy} & set(sys.modules))") == ""


def test_every_exported_name_exists() -> None:
    """Each name of ``__all__`` is in ``dir()``, and an unknown one is an AttributeError that names it."""
    names = "[name for name in cbd_hub.__all__ if name not in dir(cbd_hub) or getattr(cbd_hub, name) is None]"
    assert run_python(f"import cbd_hub; print(*{names})") == ""
    code = "import cbd_hub\ntry: cbd_hub.from_chian\nexcept AttributeError as error: print(error)"
    assert "'from_chian'" in run_python(code)


def test_runtime_dependencies_are_installed_and_new_enough() -> None:
    """The lower bounds of setup.cfg hold for what the tests run with."""
    code = (
        "import importlib.metadata as m; from packaging.requirements import Requirement as R\n"
        "needed = [r for r in map(R, m.requires('cbd_hub')) if not r.marker]\n"
        "print(*[str(r) for r in needed if m.version(r.name) not in r.specifier])"
    )
    assert run_python(code) == ""


@pytest.mark.slow
def test_wheel_carries_templates_and_types(tmp_path: Path) -> None:
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "target"
    tracked = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", *ROOT.glob("cbd_hub/*"), *ROOT.glob("cards/*")]
    for path in (ROOT / name for name in tracked):
        if path.is_file():  # a copy, so that nothing is written into the repository and nothing stale is packed
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("cbd_hub-*-py3-none-any.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)

    package = target / "cbd_hub"
    assert (package / "py.typed").is_file()
    assert {path.name for path in package.glob("*.py")} == {path.name for path in ROOT.glob("cbd_hub/*.py")}
    templates = {path.name: path.read_text(encoding="utf-8") for path in (package / "cards").iterdir()}
    assert templates == {name: (ROOT / "cards" / name).read_text(encoding="utf-8") for name in TEMPLATES}
    assert next(target.glob("cbd_hub-*.dist-info/licenses/LICENSE")).is_file()
    # Installed, the folder of templates must not hide the module of the same name.
    home = run_python("import cbd_hub.cards; print(cbd_hub.cards.__file__)", PYTHONPATH=str(target))
    assert Path(home) == package / "cards.py"

"""The house keeps its rules: quick import, a public API that resolves, floors, short files, no private paths."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import palimpsest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "palimpsest"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "duckdb", "plotly", "scipy", "numpy", "rich", "typer"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_import_is_light() -> None:
    script = "import sys, palimpsest; dir(palimpsest); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()


@pytest.mark.parametrize("name", palimpsest.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(palimpsest, name)
    assert name in dir(palimpsest)
    assert isinstance(value, str) or value.__doc__


def test_what_type_checkers_see_is_what_users_get() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("palimpsest.")
    ]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == {name: f"palimpsest.{home}" for name, home in palimpsest._HOMES.items()}
    assert set(palimpsest.__all__) == {*seen, "__version__"}
    assert palimpsest.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        _ = palimpsest.unlern
    with pytest.raises(ImportError):
        exec("from palimpsest import unlern")


def test_rooms_import_only_from_rooms_below() -> None:
    check = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", check, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_every_room_stands_on_a_floor() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = {name.strip() for layer in settings["contracts"][0]["layers"] for name in re.split("[|:]", layer)}
    rooms = {f"palimpsest.{folder.name}" for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert rooms <= floors


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name_of)
def test_no_file_is_longer_than_600_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 600


def test_no_tracked_file_names_a_path_of_somebodys_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(r"(?<![\w.:/-])/(?:work|home|root|tmp|Users|mnt|workspace)/\w")
    guilty = []
    for path in (ROOT / name for name in listed.stdout.splitlines()):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # not text, or deleted and not yet committed
        guilty += [f"{name_of(path)}: {found.group()}" for found in private.finditer(text)]
    assert guilty == []


def test_the_guide_for_contributors_knows_every_room_and_only_real_commands() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert {room for room in rooms if f"`{room}/`" not in guide} == set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", guide, re.MULTILINE)) <= targets
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", guide)
    assert named and all((PACKAGE / name).exists() or (ROOT / name).exists() for name in named)

"""The package as others meet it: what is listed, what is shipped, and what importing costs."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_listed_and_has_an_init() -> None:
    listed = set(config()["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("distill", "teachers", "students")
        for path in (ROOT / top).rglob("*.py")
    }
    assert found
    assert listed == found | {"distill.recipes"}
    for name in found:
        assert (ROOT / name.replace(".", "/") / "__init__.py").is_file(), name


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("teachers/itm.py", "from distill.metrics import ranks", "teachers and students know only distill.protocols"),
        ("students/options.py", "import distill.durable", "teachers and students know only distill.protocols"),
        ("teachers/itm.py", "import students.options", "teachers and students never import each other"),
        ("distill/report/table.py", "import teachers.itm", "only distill.recipe knows models"),
        ("distill/mine.py", "import distill.embed", "stages do not import one another"),
    ],
)
def test_the_import_rules_are_kept_and_can_be_broken(tmp_path: Path, file: str, line: str, contract: str) -> None:
    for package in ("distill", "teachers", "students"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    with (tmp_path / file).open("a", encoding="utf-8") as broken:
        broken.write(f"\n{line}\n")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stdout
    assert f"{contract} BROKEN" in done.stdout


@pytest.mark.parametrize(
    "package", ["distill", "distill.protocols", "distill.cli", "teachers", "students", "distill.losses"]
)
def test_importing_a_package_is_silent_and_loads_no_model_library(package: str) -> None:
    code = (
        f"import sys, {package}; heavy = {{'torch', 'transformers', 'faiss', 'datasets', 'accelerate'}}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_help_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    commands = (
        "run",
        "teach",
        "data",
        "mine",
        "score",
        "plan",
        "embed",
        "work",
        "train",
        "evaluate",
        "search",
        "recipes",
        "schema",
        "doctor",
        "serve",
    )
    for command in commands:
        assert f" {command} " in done.stdout


def test_the_wheel_installs_into_a_fresh_environment(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building leaves folders behind
    source.mkdir()
    for name in ("distill", "teachers", "students", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(source),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("cross2dual-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "distill/recipes/quickstart.yaml" in names
    assert "distill/report/false_negatives.html" in names
    assert {f"distill/serving/page/{name}" for name in ("index.html", "search.css", "search.js")} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "recipes/", "docs", "benchmarks"))]
    venv.create(tmp_path / "env", with_pip=False, system_site_packages=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    # the dependencies come from the environment under test; nothing of the checkout may be found
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        "import sys; sys.path += " + repr(dependencies) + "; import distill, teachers, students; "
        "from distill.recipe.load import load_recipe; print(load_recipe('quickstart').name); "
        f"assert distill.__file__.startswith({str(site)!r})"
    )
    done = subprocess.run([str(python), "-I", "-c", code], cwd=empty, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "quickstart\n"), done.stderr

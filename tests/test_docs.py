"""Commands in the documentation are ones that exist: each is parsed as it would be, and its recipe is loaded."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from distill.cli import app
from distill.recipe.comparison import comparison_recipe
from distill.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"RECIPE", "RUN", "QUERY"}
RECIPE_COMMANDS = {"run", "teach", "data", "mine", "score", "embed", "plan", "train", "evaluate", "compare"}


def blocks(page: Path) -> list[list[str]]:
    """Words of each command line in the page's shell blocks; a backslash joins lines, ``&&`` parts them."""
    found = []
    for block in re.findall(r"```(?:bash|sh|shell)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words:
                    found.append(words)
    return found


COMMANDS = [(page.name, words) for page in PAGES for words in blocks(page)]
OURS = [(page, words[1:]) for page, words in COMMANDS if words[0].split("/")[-1] == "distill"]
MAKES = [(page, words[1:]) for page, words in COMMANDS if words[0] == "make"]


def test_there_is_something_to_check():
    assert len(OURS) >= 2
    assert len(MAKES) >= 2
    assert {page for page, _ in OURS} >= {"which-loss.md"}


@pytest.mark.parametrize(("page", "words"), OURS, ids=[" ".join(words)[:60] for _, words in OURS])
def test_a_command_of_the_documentation_parses_and_its_recipe_loads(page, words, monkeypatch, tmp_path):
    for name in ("FLICKR8K", "FLICKR30K", "COCO"):
        monkeypatch.setenv(name, str(tmp_path))
    command = get_command(app)
    with command.context_class(command, info_name="distill") as context:
        name, sub, rest = command.resolve_command(context, list(words))
        parsed = sub.make_context(name, rest, parent=context)
        given = parsed.params.get("recipe")
        if name in RECIPE_COMMANDS and given not in PLACEHOLDERS:
            recipe = load_recipe(given, parsed.params.get("overrides", []))
            if name == "compare":
                comparison_recipe(recipe, parsed.params["losses"])


@pytest.mark.parametrize(("page", "words"), MAKES, ids=[" ".join(words) for _, words in MAKES])
def test_a_target_of_the_documentation_is_in_the_makefile(page, words):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert [word for word in words if "=" not in word][0] in targets

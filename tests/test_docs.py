"""The pages run, and the reference has every public name; ``make docs`` builds them, with the gallery."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from test_readme import python_blocks

DOCS = Path(__file__).parents[1] / "docs"
# Benchmarks print tables; what is included, CONTRIBUTING.md and the changelog, is tested or written elsewhere.
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"benchmarks", "_build"} & set(path.parts))
MODULES = [
    "skinvert",
    *(f"skinvert.{name}" for name in ("influence", "metrics", "metrics.baselines", "methods", "plotting", "testing")),
]
# Run by torchrun: tests/distributed.
OF_SEVERAL_PROCESSES = {"distributed"}
# By another kind of fence: shown, not run.
SHOWN = {"text", "sh", "{toctree}", "{eval-rst}", "{include}", "{doctest}"}


def published():
    """Return what the reference lists, by full names."""
    module, found = "", []
    for line in (DOCS / "api.md").read_text(encoding="utf-8").splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        elif re.fullmatch(r"   [\w.]+", line):
            found.append(f"{module}.{line.strip()}")
    return found


PUBLISHED = published()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if "```python" in page.read_text("utf-8") and page.stem not in OF_SEVERAL_PROCESSES],
    ids=lambda p: p.stem,
)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for block in python_blocks(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_code_is_left_out(page):
    languages = re.findall(r"^ *```(\S*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {word.split()[0] for word in languages if word} <= {"python"} | SHOWN


@pytest.mark.parametrize("name", MODULES)
def test_reference_has_every_public_name(name):
    # Lists of checks and a module are no entries of their own.
    public = {entry for entry in importlib.import_module(name).__all__ if not entry.endswith("_CHECKS")} - {"baselines"}
    assert public - {entry.rpartition(".")[2] for entry in PUBLISHED} == set()


@pytest.mark.parametrize("entry", PUBLISHED)
def test_no_sentence_begins_a_list(entry):
    # "H. ..." at the start of a paragraph is item H of a list to reStructuredText, and the letter is not shown.
    module, _, name = entry.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    members = [getattr(thing, own) for own in dir(thing) if not own.startswith("_")] if inspect.isclass(thing) else []
    for each in [thing, *members]:
        assert re.findall(r"^ *[a-zA-Z]\.(?: .*)?$", inspect.getdoc(each) or "", re.MULTILINE) == []

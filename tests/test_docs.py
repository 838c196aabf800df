"""The pages run, and the reference has every public name; ``make docs`` builds them, with the gallery."""

import importlib
import re
from pathlib import Path

import pytest
from test_readme import python_blocks

DOCS = Path(__file__).parents[1] / "docs"
# Benchmarks print tables; what is included, CONTRIBUTING.md and the changelog, is tested or written elsewhere.
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"benchmarks", "_build"} & set(path.parts))
MODULES = ["skinvert", *(f"skinvert.{name}" for name in ("influence", "metrics", "methods", "testing"))]
# By another kind of fence: shown, not run.
SHOWN = {"text", "sh", "{toctree}", "{eval-rst}", "{include}", "{doctest}"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text("utf-8")], ids=lambda p: p.stem
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
    module = importlib.import_module(name)
    listed = re.findall(r"^   ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    kinds = {entry.rsplit(".", 1)[-1] for entry in listed}
    # Lists of checks and a module are no entries of their own.
    public = {entry for entry in module.__all__ if not entry.endswith("_CHECKS") and entry != "baselines"}
    assert public - kinds == set()


def test_reference_has_every_baseline():
    from skinvert.metrics import baselines

    assert set(baselines.__all__) <= set(
        re.findall(r"^   ([\w.]+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    )

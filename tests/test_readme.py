"""The README runs: its python blocks, in order, in one namespace."""

import re
import runpy
from pathlib import Path

from skinvert import methods

README = Path(__file__).parents[1] / "README.md"


def test_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "README.md has no ```python block"

    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)


def test_the_table_of_methods_has_a_row_of_each(capsys, monkeypatch):
    command = README.parent / "docs" / "methods_table.py"
    runpy.run_path(str(command), run_name="__main__")
    before = capsys.readouterr().out
    assert re.findall(r'^\| `"\w+"` `(\w+)` \|', before, re.MULTILINE)[0] == "Auto"
    assert len(before.splitlines()) == 2 + len(methods.__all__)

    monkeypatch.setattr(methods.CG, "cost", "nothing at all")
    runpy.run_path(str(command), run_name="__main__")
    after = capsys.readouterr().out
    changed = [new for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert len(changed) == 1 and changed[0].startswith('| `"cg"` `CG` |') and "nothing at all" in changed[0]


def test_the_links_lead_to_files():
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 10
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_blocks_keep_their_line_numbers():
    text = "# title\n\n```python\na = 1\n```\n\n```sh\nls\n```\n```python\nb = 2\n```\n"
    received = python_blocks(text)
    expected = ["\n\n\na = 1\n", "\n\n\n\n\n\n\n\n\n\nb = 2\n"]
    assert received == expected


def python_blocks(text):
    # Empty lines stand for the text before a block, so that a traceback names the README's own line.
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]

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


def test_the_table_of_methods_is_what_the_command_writes(monkeypatch):
    command = runpy.run_path(str(README.parent / "docs" / "methods_table.py"))
    text = README.read_text(encoding="utf-8")
    assert command["table"](text) == text
    assert len(command["ROW"].findall(text)) == len(methods.__all__)

    monkeypatch.setattr(methods.CG, "cost", "nothing at all")
    assert command["table"](text) != text


def test_blocks_keep_their_line_numbers():
    text = "# title\n\n```python\na = 1\n```\n\n```sh\nls\n```\n```python\nb = 2\n```\n"
    received = python_blocks(text)
    expected = ["\n\n\na = 1\n", "\n\n\n\n\n\n\n\n\n\nb = 2\n"]
    assert received == expected


def python_blocks(text):
    # Empty lines stand for the text before a block, so that a traceback names the README's own line.
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]

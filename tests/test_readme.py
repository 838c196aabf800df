"""The README runs: its python blocks, in order, in one namespace."""

import re
from pathlib import Path

from skinvert import methods
from skinvert.curvature import CURVATURES, Gram

README = Path(__file__).parents[1] / "README.md"


def test_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "README.md has no ```python block"

    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)


def test_readme_has_every_method_as_its_class_says():
    table = README.read_text(encoding="utf-8").split("## Methods")[1].split("\n## ")[0]
    received = re.findall(r'^\| `".*\|$', table, flags=re.MULTILINE)
    expected = [row_of(name, getattr(methods, name)) for name in methods.__all__]
    assert sorted(received) == sorted(expected)


def row_of(name, kind):
    assert kind.cost and kind.memory and kind.exactness and kind.choose_it_for
    cells = (kind.cost, kind.memory, kind.exactness, curvatures_of(kind), kind.choose_it_for)
    return f'| `"{kind.name}"` | `{name}` | {" | ".join(cells)} |'


def curvatures_of(kind):
    """Return what has all that a method declares."""
    served = [name for name, curvature in CURVATURES.items() if all(need in curvature.faces for need in kind.requires)]
    plain = all(need in Gram.faces for need in kind.requires)
    if len(served) == len(CURVATURES):
        return "all" if plain else "all but plain rows"
    return ", ".join([*served, "plain rows"] if plain else served)


def test_blocks_keep_their_line_numbers():
    text = "# title\n\n```python\na = 1\n```\n\n```sh\nls\n```\n```python\nb = 2\n```\n"
    received = python_blocks(text)
    expected = ["\n\n\na = 1\n", "\n\n\n\n\n\n\n\n\n\nb = 2\n"]
    assert received == expected


def python_blocks(text):
    # Empty lines stand for the text before a block, so that a traceback names the README's own line.
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]

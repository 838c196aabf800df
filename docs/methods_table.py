"""Write the README's table of methods from what their classes state: ``python docs/methods_table.py``.

With ``--check`` nothing is written, and the exit status is 1 where the README differs.
"""

import re
import sys
from pathlib import Path

from skinvert import methods
from skinvert.curvature import CURVATURES, Gram, faces_of

README = Path(__file__).parents[1] / "README.md"
# From what is tried first to baselines; methods that are not named here stand below.
ORDER = (*"auto direct cg minres lissa arnoldi nystroem kfac ekfac harmonic_mean diagonal".split(),)
ROW = re.compile(r'^\| `"(\w+)"` \|.*\|\n', flags=re.MULTILINE)


def table(text):
    """Return the README's text with the row of every method; a new one goes below the others."""
    rows = {kind.name: row(name, kind) for name, kind in ((name, getattr(methods, name)) for name in methods.__all__)}
    found = list(ROW.finditer(text))
    order = [match[1] for match in found if match[1] in rows]
    order += [name for name in rows if name not in order]
    return text[: found[0].start()] + "".join(rows[name] for name in order) + text[found[-1].end() :]


def table_of_methods():
    """Return the whole table, as the pages show it."""
    head = (
        "name | `skinvert.methods` | work, in products with A | numbers held | the solution | curvatures | choose for"
    )
    kinds = {getattr(methods, name).name: name for name in methods.__all__}
    names = [name for name in ORDER if name in kinds] + [name for name in kinds if name not in ORDER]
    rows = (row(kinds[name], getattr(methods, kinds[name])) for name in names)
    return f"| {head} |\n{'|---' * 7}|\n" + "".join(rows)


def row(name, kind):
    """Return a method's row."""
    stated = (kind.cost, kind.memory, kind.exactness, kind.choose_it_for)
    if not all(stated):
        message = f"{name} must state its cost, memory, exactness and choose_it_for"
        raise ValueError(message)
    cells = (*stated[:3], curvatures(kind), stated[3])
    return f'| `"{kind.name}"` | `{name}` | {" | ".join(cells)} |\n'


def curvatures(kind):
    """Return which curvatures have all that a method requires."""
    needs = set(kind.requires)
    served, plain = [name for name in CURVATURES if needs <= faces_of(name)], needs <= Gram.faces
    if len(served) == len(CURVATURES):
        return "all" if plain else "all but plain rows"
    return ", ".join([*served, "plain rows"] if plain else served)


if __name__ == "__main__":
    before = README.read_text(encoding="utf-8")
    after = table(before)
    if "--check" in sys.argv:
        sys.exit(after != before)
    README.write_text(after, encoding="utf-8")

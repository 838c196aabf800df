"""Print the table of methods, from what their classes state: ``python docs/methods_table.py``."""

from skinvert import methods
from skinvert.curvature import CURVATURES, Gram, faces_of

# From what is tried first to baselines; methods that are not named here stand below.
ORDER = (*"auto direct cg minres lissa arnoldi nystroem kfac ekfac harmonic_mean diagonal".split(),)
HEAD = "name, class | choose it for | the solution | work, in products with A | numbers held | curvatures"


def table_of_methods():
    """Return the whole table, as the pages show it."""
    kinds = {getattr(methods, name).name: name for name in methods.__all__}
    names = [name for name in ORDER if name in kinds] + [name for name in kinds if name not in ORDER]
    rows = (row(kinds[name], getattr(methods, kinds[name])) for name in names)
    return f"| {HEAD} |\n{'|---' * 6}|\n" + "".join(rows)


def row(name, kind):
    """Return a method's row."""
    stated = (kind.cost, kind.memory, kind.exactness, kind.choose_it_for)
    if not all(stated):
        message = f"{name} must state its cost, memory, exactness and choose_it_for"
        raise ValueError(message)
    cost, memory, exactness, choose_it_for = stated
    cells = (choose_it_for, exactness, cost, memory, curvatures(kind))
    return f'| `"{kind.name}"` `{name}` | {" | ".join(cells)} |\n'


def curvatures(kind):
    """Return which curvatures have all that a method requires."""
    needs = set(kind.requires)
    served, plain = [name for name in CURVATURES if needs <= faces_of(name)], needs <= Gram.faces
    if len(served) == len(CURVATURES):
        return "all" if plain else "all but plain rows"
    return ", ".join([*served, "plain rows"] if plain else served)


if __name__ == "__main__":
    print(table_of_methods(), end="")

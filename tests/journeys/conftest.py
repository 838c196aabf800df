"""The scripts are run by ``test_journeys``: an import, for doctests, would run them again."""

from pathlib import Path

collect_ignore = [path.name for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")]

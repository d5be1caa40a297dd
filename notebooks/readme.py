"""Write the headlines of the published findings into README.md: `make notebooks` ends with it."""

import re
from pathlib import Path

from minerlib.scorecard import Scorecard

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(?<=<!-- headlines -->\n).*?(?=\n<!-- /headlines -->)", re.DOTALL)


def headlines() -> str:
    """The table, of what is published alone."""
    return Scorecard(runs="no runs").headlines()


if __name__ == "__main__":
    README.write_text(BLOCK.sub(lambda _: headlines(), README.read_text()))

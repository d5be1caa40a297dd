"""The table of faults, FAULTS.md: each kind that once was there, and the tests that hold its right
value. `python tests/test_faults.py` writes it anew after a test was added."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """# Faults that were there, and the tests of their right value

Run one kind with `python -m pytest -k TEST`, all with `python -m pytest -m fault`.

| kind of fault | tests |
|---|---|
"""


def kinds() -> dict[str, list[ast.FunctionDef]]:
    """The test functions of each kind, by the argument of their `fault` marks."""
    found = defaultdict(list)
    for file in sorted(HERE.glob("test_*.py")):
        for test in ast.walk(ast.parse(file.read_text())):
            if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test_"):
                continue
            for node in ast.walk(test):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                    found[node.args[0].value].append(test)
    return found


def table() -> str:
    lines = (
        f"| {kind} | {', '.join(dict.fromkeys(f'`{test.name}`' for test in tests))} |"
        for kind, tests in sorted(kinds().items(), key=lambda item: item[0].lower())
    )
    return HEAD + "\n".join(lines) + "\n"


def test_the_table_is_up_to_date():
    assert (HERE / "FAULTS.md").read_text() == table(), "run python tests/test_faults.py"
    assert len(kinds()) >= 60


def test_each_kind_asserts_a_value():
    """Not only that something raises: a value is compared, or the words of the error are."""
    for kind, tests in kinds().items():
        text = " ".join(ast.unparse(test) for test in tests)
        assert "assert" in text or "match=" in text or "message" in text, kind


if __name__ == "__main__":
    (HERE / "FAULTS.md").write_text(table())

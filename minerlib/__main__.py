"""Run a notebook's cells in this process, or in each of several that share its work.

    python -m minerlib notebooks/02_importance_scores.ipynb limit=24
    accelerate launch -m minerlib notebooks/02_importance_scores.ipynb limit=24

What is computed is kept in the run folder, where the notebook finds it when it is opened or run by
Papermill with the same parameters: `make workbook PROCESSES=2` does both. Only the first of several
processes prints.
"""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

if __name__ == "__main__":  # before matplotlib and tqdm read them; who imports this keeps their own
    os.environ.setdefault("MPLBACKEND", "agg")  # figures go to files
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"

from minerlib import processes  # noqa: E402
from minerlib.parameters import value  # noqa: E402


def main(notebook: str, *given: str) -> None:
    """Run the notebook's code cells with these NAME=VALUE; the first error ends it."""
    from IPython.core.interactiveshell import InteractiveShell  # of the workbook's extra
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    parameters = {name: value(text) for name, _, text in (pair.partition("=") for pair in given)}
    cells = parameterize_notebook(load_notebook_node(notebook), parameters).cells
    shell, out = InteractiveShell.instance(), sys.stdout
    if shell.history_manager is not None:
        shell.history_manager.enabled = False  # its file is the user's own
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere if processes.rank() else out),
    ):
        for cell in cells:
            if cell.cell_type == "code":
                done = shell.run_cell(cell.source, store_history=True)
                if type(done.error_in_exec).__name__ == "NotApplicable":
                    return  # the notebook says so once more when Papermill runs it
                done.raise_error()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The book: a static site of the executed notebooks; see `python -m book`."""

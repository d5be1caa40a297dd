"""nbval compares the plain text of a table; its HTML holds the same words and numbers."""


def pytest_collectstart(collector):
    if collector.nodeid.endswith(".ipynb"):
        collector.skip_compare += ("text/html",)

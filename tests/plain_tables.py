"""`pytest --nbval -p tests.plain_tables`: tables are compared as plain text, not as HTML too."""


def pytest_collectstart(collector):
    if collector.nodeid.endswith(".ipynb"):
        collector.skip_compare += ("text/html",)

"""Every notebook in a real JupyterLab: `make test-ui`.

    python -m tests.lab              # all; or some by number: python -m tests.lab 00,11-16

A script opens each in Chromium, runs all cells as a reader would, and looks at what is then on the
page: errors, warnings, cells that did not run, widgets without their model, pictures that are
missing or wider than the page. Screenshots lie in build/lab/; the README's of the atlas is made
anew where notebook 16 has written one. CHROMIUM names the browser's program,
else it is Playwright's own.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Error, Page, sync_playwright

from tests.conftest import run_script

ROOT = Path(__file__).parents[1]
LAB = ROOT / "build/lab"
ATLAS = ROOT / "build/atlas/smol-qwen2-vl/index.html"
MINUTES = 20  # for all cells of a notebook
# All cells are on the page, not those in view alone; nothing asks before it starts.
SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": '{"windowingMode": "none"}',
    "@jupyterlab/apputils-extension/notification": '{"fetchNews": "false"}',
}
RUN = """async limit => {
  const app = window.jupyterapp, panel = app.shell.currentWidget;
  await panel.sessionContext.ready;
  const late = new Promise((_, no) => setTimeout(() => no(new Error("still running")), limit));
  await Promise.race([app.commands.execute("notebook:run-all-cells"), late]);
  const cells = [...panel.content.model.cells].filter(c => c.type === "code");
  return cells.filter(c => c.sharedModel.source.trim() && c.executionCount === null).length;
}"""
LOOK = r"""() => {
  const faults = [], panel = document.querySelector(".jp-NotebookPanel:not(.lm-mod-hidden)");
  const all = selector => [...panel.querySelectorAll(selector)];
  const text = e => e.innerText.trim().slice(0, 200);
  for (const kind of ["error", "stderr"])
    for (const e of all(`[data-mime-type="application/vnd.jupyter.${kind}"]`))
      if (text(e) && !/it\/s\]|s\/it\]/.test(text(e)))  // progress bars write there
        faults.push(`${kind}: ${text(e)}`);
  for (const e of all(".jp-OutputArea-output"))
    if (/Error displaying widget|Loading widget|Error creating widget|No JS view/.test(e.innerText))
      faults.push(`widget: ${text(e)}`);
  for (const e of all(".jp-OutputArea-output img, .jp-MarkdownOutput img")) {
    const page = e.closest(".jp-OutputArea-output, .jp-MarkdownOutput").getBoundingClientRect();
    const box = e.getBoundingClientRect();
    if (!e.naturalWidth) faults.push(`a picture is missing: ${e.src.slice(0, 80)}`);
    else if (box.right > page.right + 1) faults.push(`a picture of ${box.width} px is cut off`);
  }
  return faults;
}"""


@contextmanager
def server() -> Iterator[str]:
    """JupyterLab over copies of the notebooks, which it may save; its address."""
    shutil.rmtree(LAB, ignore_errors=True)
    shutil.copytree(ROOT / "notebooks", LAB / "notebooks")
    for name, text in SETTINGS.items():
        file = LAB / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", "--IdentityProvider.token=", "--ServerApp.password="]
    command += [f"--ServerApp.root_dir={LAB / 'notebooks'}", "--LabApp.expose_app_in_browser=True"]
    process = subprocess.Popen(
        command,
        env=os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(LAB / "settings")},
        stdout=(LAB / "server.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urlopen(f"{url}/api").close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise RuntimeError(f"JupyterLab does not answer; see {LAB / 'server.log'}")
        yield url
    finally:
        process.terminate()
        process.wait()


def faults(page: Page, url: str, notebook: str) -> list[str]:
    """What is wrong with a notebook once all its cells ran."""
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(f"{url}/lab/tree/{notebook}?reset")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget?.content?.model")
    left = page.evaluate(RUN, MINUTES * 60_000)
    page.wait_for_timeout(2000)  # for what draws itself
    found = page.evaluate(LOOK)
    height = page.evaluate("() => document.querySelector('.jp-WindowedPanel-outer').scrollHeight")
    page.set_viewport_size({"width": 1280, "height": min(height + 150, 16_000)})
    page.evaluate("() => { document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0; }")
    page.wait_for_timeout(500)
    page.screenshot(path=LAB / f"{Path(notebook).stem}.png")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    return [f"{left} cells did not run", *found] if left else found


def atlas(page: Page) -> None:
    """What excites one neuron, for the README."""
    page.set_viewport_size({"width": 860, "height": 2400})
    page.goto(f"{ATLAS.as_uri()}#L14N219")
    page.locator(".row img").first.wait_for()
    page.wait_for_timeout(1000)
    top = page.get_by_text("What excites it most").bounding_box()
    below = page.locator(".row").nth(4).bounding_box()
    area = {"x": 0, "y": top["y"], "width": 860, "height": below["y"] - top["y"]}
    page.screenshot(path=ROOT / "figures/16-page-smol-qwen2-vl.png", clip=area)


def main(numbers: str) -> int:
    files = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    wanted = run_script().numbered(numbers or "00-99")
    if not (files := [file for file in files if int(file.name[:2]) in wanted]):
        raise SystemExit(f"{numbers!r}: there are no notebooks of these numbers")
    wrong = 0
    with server() as url, sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for file in files:
            page, start = browser.new_page(), time.time()
            try:
                found = faults(page, url, file.name)
            except Error as error:  # the next may be well
                found = [str(error).splitlines()[0]]
            page.close()
            wrong += bool(found)
            print(f"{file.name}: {time.time() - start:.0f} s", *found, sep="\n  ", flush=True)
        if ATLAS.is_file():
            atlas(browser.new_page())
        browser.close()
    return wrong


if __name__ == "__main__":
    sys.exit(main(",".join(sys.argv[1:])))

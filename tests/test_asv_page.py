"""The web page of the benchmark results, in a real browser: it draws, and logs no error.

Two sites: one of a small repository with a planted step, where what the pages must show is known,
and that of the results which this repository tracks. Neither the browser nor the page may need
anything from outside this machine.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from support import ROOT

from benchmarks import site

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
RESULTS = ROOT / "benchmarks" / "results"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver"),
    pytest.mark.skipif(not shutil.which("npm"), reason="needs npm, for the page's libraries"),
]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
    # The page must not need anything but the server: no name but this one can be looked up.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)

# Whether so many commits have a point in some curve of a graph, which is drawn anew with each
# machine's results that arrive; and the number of pixels that are drawn at all.
HAS_COMMITS = """
const plot = $(arguments[0]).data("plot");
if (!plot) return false;
const points = plot.getData().flatMap(s => s.data.filter(p => p && p[1] !== null));
return new Set(points.map(p => p[0])).size === arguments[1];
"""
DRAWN = """
const canvas = document.querySelector(arguments[0] + " canvas.flot-base");
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
let drawn = 0;
for (let i = 3; i < data.length; i += 4) drawn += data[i] > 0;
return drawn;
"""


@contextmanager
def served(html):
    with site.serve(html) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def wait_for(browser, what, script, *arguments):
    """The script's value, once it is true."""
    ui = pytest.importorskip("selenium.webdriver.support.ui")
    return ui.WebDriverWait(browser, 30).until(
        lambda driver: driver.execute_script(script, *arguments), f"{what} does not appear"
    )


def errors(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def run(*command, cwd):
    # asv describes the machine in the home folder, which is not this test's to write to.
    environment = {**os.environ, "HOME": str(cwd)}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Site of a repository of 8 commits, in the middle of which one benchmark doubles."""
    pytest.importorskip("asv")
    folder = tmp_path_factory.mktemp("planted")
    suite = folder / "benchmarks"
    suite.mkdir()
    (suite / "__init__.py").touch()
    config = {"version": 1, "project": "planted", "repo": ".", "branches": ["main"]}
    config |= {"environment_type": "existing", "results_dir": "results", "html_dir": "html"}
    (folder / "asv.conf.json").write_text(json.dumps(config))
    git = ("git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.invalid")
    run(*git, "init", "--quiet", "--initial-branch=main", cwd=folder)
    (folder / ".gitignore").write_text("results\nhtml\n.*\n")
    run(sys.executable, "-m", "asv", "machine", "--yes", cwd=folder)
    for number in range(8):
        value = 1.0 if number < 4 else 2.0
        step = f"def track_step():\n    return {value}  # {number}\n"
        # Without a version of its own asv would take each for another benchmark.
        text = step + "\n\ntrack_step.version = '1'\n\n\ndef track_even():\n    return 3\n"
        (suite / "steps.py").write_text(text)
        run(*git, "add", ".", cwd=folder)
        run(*git, "commit", "--quiet", "-m", f"commit {number}", cwd=folder)
        commit = run(*git, "rev-parse", "HEAD", cwd=folder)
        asv = (sys.executable, "-m", "asv", "run", "--python=same", "--set-commit-hash", commit)
        run(*asv, cwd=folder)
    run(sys.executable, "-m", "asv", "publish", "--no-pull", cwd=folder)
    site.make_self_contained(folder / "html")
    with served(folder / "html") as address:
        yield address


def test_grid_has_all_benchmarks(browser, planted):
    browser.get(planted)
    tiles = "return document.querySelectorAll('.benchmark-container canvas.flot-base').length"
    assert wait_for(browser, "the grid", tiles + " == 2 ? 2 : 0") == 2
    assert errors(browser) == []


def test_graph_has_the_points_of_all_commits(browser, planted):
    browser.get(planted + "#steps.track_step")
    assert wait_for(browser, "a curve of 8 commits", HAS_COMMITS, "#main-graph", 8)
    assert browser.execute_script(DRAWN, "#main-graph") > 1000
    assert errors(browser) == []


def test_regressions_name_the_step(browser, planted):
    browser.get(planted + "#regressions")
    rows = (
        "return [...document.querySelectorAll('#regressions-body tbody tr')].map(r => r.innerText)"
    )
    (row,) = [text for text in wait_for(browser, "the table", rows) if text.strip()]
    assert "track_step" in row
    assert "2.00x" in row
    assert errors(browser) == []


def commits_with(benchmark):
    """Number of commits for which some machine's tracked results have the benchmark."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*/*-*.json")]
    return len({file["commit_hash"] for file in files if benchmark in file["results"]})


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Site of this repository's own results."""
    pytest.importorskip("asv")
    if not list(RESULTS.glob("*/*-*.json")):
        pytest.skip("no results are tracked")
    html = tmp_path_factory.mktemp("tracked") / "html"
    site.publish(html)
    with served(html) as address:
        yield address, json.loads((html / "index.json").read_text(encoding="utf-8"))


def test_own_results_are_drawn(browser, tracked):
    address, index = tracked
    browser.get(address)
    tiles = "return document.querySelectorAll('.benchmark-container canvas.flot-base').length"
    assert wait_for(browser, "the grid", tiles) > 0
    assert browser.execute_script(
        "return document.querySelectorAll('.benchmark-container').length"
    ) == len(index["benchmarks"])
    browser.get(address + "#bench_calls.Overhead.time_eval")
    measured = commits_with("bench_calls.Overhead.time_eval")
    assert measured >= 5
    curves = f"curves of {measured} commits"
    assert wait_for(browser, curves, HAS_COMMITS, "#main-graph", measured)
    assert browser.execute_script(DRAWN, "#main-graph") > 1000
    browser.get(address + "#regressions")
    body = "return document.querySelector('#regressions-body').innerText.trim()"
    assert wait_for(browser, "the regressions", body)
    assert errors(browser) == []

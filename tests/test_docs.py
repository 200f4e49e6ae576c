"""The documentation runs: code blocks of the Markdown pages, and an example in every docstring.

The examples in docstrings are run by pytest itself (``--doctest-modules`` in pyproject.toml).
"""

import doctest
import inspect
import re

import pytest
from support import ROOT

import numbabn

# Pages whose blocks follow one another, so that a later one may use what an earlier one defined.
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """``(first line's number, source)`` of each Python block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch, set_threads):
    # ```python blocks run; a block that is not to be run here says so: ```python norun
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, source in blocks(page):
        if ">>>" in source:
            test = doctest.DocTestParser().get_doctest(source, namespace, page.name, page, line)
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
            runner.run(test, clear_globs=False)
            assert runner.failures == 0, f"{page.name}, line {line}"
            namespace.update(test.globs)
        else:
            # Line numbers of the page, in any traceback.
            exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)


def test_readme_has_code_to_run():
    assert len(blocks(ROOT / "README.md")) >= 2


@pytest.mark.parametrize("name", sorted(set(numbabn.__all__) - {"__version__"}))
def test_every_public_name_has_an_example(name):
    item = getattr(numbabn, name)
    if inspect.ismodule(item):
        pytest.skip("a module")
    documentation = inspect.getdoc(item)
    assert documentation, name
    assert ">>>" in documentation, name


def test_doctests_are_collected(pytestconfig):
    # Without this the examples above would only be text.
    assert pytestconfig.getoption("doctestmodules") or not (ROOT / "pyproject.toml").exists()

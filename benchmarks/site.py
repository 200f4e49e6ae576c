"""The web page of the results, complete in one folder.

    python -m benchmarks.site [--html DIR] [--serve [PORT]]

runs `asv publish`, whose page loads jQuery, flot and the like from servers on the internet, and
puts copies of these libraries beside it, so that the page works without a connection, in an
archive, and behind a firewall. The copies come from npm, in versions that asv's page was made for,
and are checked against the checksums below. Benchmarks that have no results yet are left out. Needs
asv and npm.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .peers_native import cache_folder

__all__ = ["drop_unmeasured", "make_self_contained", "publish", "serve"]

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "libraries"


class Library(NamedTuple):
    """A file of an npm package, and the end of the address that it stands in for."""

    package: str
    path: str
    sha256: str
    address: str


LIBRARIES = (
    Library(
        "jquery@3.3.1",
        "dist/jquery.min.js",
        "160a426ff2894252cd7cebbdd6d6b7da8fcd319c65b70468f10b6690c45d02ef",
        "jquery-3.3.1.min.js",
    ),
    Library(
        "flot@0.8.3",
        "jquery.flot.js",
        "b7b931f273c38b1277b9c6c1f4e05c4ec09885a487bddaf3279e2d7e49a38e12",
        "jquery.flot.min.js",
    ),
    Library(
        "flot@0.8.3",
        "jquery.flot.time.js",
        "a582c832adc7138a6b05aaf61f16ebac274701f1be4afea77e739a1c34b9c41a",
        "jquery.flot.time.min.js",
    ),
    Library(
        "flot@0.8.3",
        "jquery.flot.selection.js",
        "e6c85f6c1ebe4b4da29d8ae238c7c5060283f05f7ef054f6b91817d02c092918",
        "jquery.flot.selection.min.js",
    ),
    Library(
        "flot@0.8.3",
        "jquery.flot.categories.js",
        "6e81664b28ea795c734906f4aa15614640a75ac7fbd399a7fb9084040698351a",
        "jquery.flot.categories.min.js",
    ),
    Library(
        "flot-orderbars@1.0.0",
        "js/jquery.flot.orderBars.js",
        "39735b4f46f96ff4e082572401f47c55a2767b366fd1d1e821e44a8d830a12bf",
        "jquery.flot.orderBars.js",
    ),
    Library(
        "stupid-table-plugin@1.1.3",
        "stupidtable.min.js",
        "4642380f28ebe9ed7cac251793b281ef8620c4386205d92788f9b12f5cceb4e0",
        "stupidtable.min.js",
    ),
    Library(
        "blueimp-md5@2.19.0",
        "js/md5.min.js",
        "64d7ded388c562e4bde9e58ce205e5fa01b9734fcd434d496eb7b4fbfe9b927d",
        "md5.min.js",
    ),
    Library(
        "bootstrap@3.1.1",
        "dist/js/bootstrap.min.js",
        "898d05a17f2cfc5120ddcdba47a885c378c0b466f30f0700e502757e24b403a1",
        "bootstrap.min.js",
    ),
    Library(
        "bootstrap@3.1.1",
        "dist/css/bootstrap.min.css",
        "e9503448692b738dd260fbd7f7cabf2e11f09b600fa97e6eb3a56eba5b1a7e9b",
        "bootstrap.min.css",
    ),
)


def publish(html: Path) -> None:
    """Run `asv publish`, and make the page complete."""
    command = ["-m", "asv", "publish", "--no-pull", "--html-dir", str(html)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    make_self_contained(html)
    drop_unmeasured(html)


def drop_unmeasured(html: Path) -> None:
    """Take benchmarks without any result off the page, which would ask for their curves in vain."""
    index = html / "index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    measured = {path.stem for path in (html / "graphs" / "summary").glob("*.json")}
    content["benchmarks"] = {k: v for k, v in content["benchmarks"].items() if k in measured}
    index.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def make_self_contained(html: Path) -> None:
    """Put the libraries into the page's folder, and have the page load them from there.

    Parameters
    ----------
    html : Path
        What `asv publish` wrote.

    Raises
    ------
    RuntimeError
        If npm is missing, a file is not what it should be, or asv's page needs others.
    """
    index = html / "index.html"
    text = index.read_text(encoding="utf-8")
    target = html / FOLDER
    target.mkdir(exist_ok=True)
    for library in LIBRARIES:
        name = library.address.rpartition("/")[2]
        # The checksum in the page is that of the server's copy, which may be minified differently.
        link = re.compile(
            rf'(src|href)="https://[^"]*/{re.escape(library.address)}"( integrity="[^"]*")?'
        )
        if not link.search(text):
            raise RuntimeError(f"asv's page does not load {library.address}")
        shutil.copyfile(_fetched(library), target / name)
        text = link.sub(rf'\1="{FOLDER}/{name}"', text)
    text = re.sub(r'( crossorigin="anonymous"| referrerpolicy="no-referrer")', "", text)
    left = re.findall(r'<(?:script|link)[^>]*"(https?://[^"]*)"', text)
    if left:
        raise RuntimeError(f"asv's page also loads {', '.join(left)}")
    index.write_text(text, encoding="utf-8")


def _fetched(library: Library) -> Path:
    """The file, from the cache of this user or else from npm."""
    folder = cache_folder() / "npm" / library.package
    file = folder / library.path
    if not file.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(f"npm is not installed, which {library.package} comes from")
        with tempfile.TemporaryDirectory() as scratch:
            done = subprocess.run(
                [npm, "pack", "--json", "--ignore-scripts", library.package],
                cwd=scratch,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"npm pack {library.package}: {done.stderr.strip()}")
            archive = Path(scratch) / json.loads(done.stdout)[0]["filename"]
            file.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(archive) as packed:
                content = packed.extractfile(f"package/{library.path}")
                assert content is not None
                file.write_bytes(content.read())
    if hashlib.sha256(file.read_bytes()).hexdigest() != library.sha256:
        file.unlink()
        raise RuntimeError(f"{library.package}: {library.path} is not what it was")
    return file


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the folder, without a line in the terminal for each."""

    def log_message(self, *arguments: object) -> None:
        pass


def serve(html: Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """Make a server of the folder on the loopback interface; port 0 takes any that is free."""
    handler = partial(_Handler, directory=str(html))
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.site", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--html", type=Path, default=ROOT / ".asv" / "html", metavar="DIR")
    parser.add_argument(
        "--serve", type=int, nargs="?", const=8080, metavar="PORT",
        help="then serve it on this machine (default port: 8080)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        publish(options.html.resolve())
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"site: {error}", file=sys.stderr)
        return 2
    print(f"the page is {options.html / 'index.html'}; it has to be served, not opened as a file")
    if options.serve is not None:
        with serve(options.html, options.serve) as server:
            print(f"http://127.0.0.1:{options.serve}/ until Ctrl-C")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

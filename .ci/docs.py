"""Build the browsable reference of both packages from their docstrings; fail where a name in them leads nowhere.

    python .ci/docs.py site

`pdoc` alone leaves out rooms that a package's ``__all__`` does not name, and names that are imported when first used.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

PACKAGES = ("gradsurgery", "lightning_modules")
LEFT_OUT = ("gradsurgery.losses._triton",)  # a GPU kernel's language, which cannot be imported everywhere

# A dotted name of ours in backticks that pdoc found no page for: outside <a>, and not in a shown source.
CODE = re.compile(r"(<a [^>]*>)?<code>((?:gradsurgery|lightning_modules)(?:\.\w+)+)(?:\(\))?</code>")
SOURCE = re.compile(r'<div class="pdoc-code codehilite">.*?</div>|<script>.*?</script>', re.DOTALL)  # no prose
BROKEN_ROW = re.compile(r"<p>(\|[^<]{0,40})")
LINK = re.compile(r'<a [^>]*href="(?!https?:|#search)([^"#]*)(?:#([^"]*))?"')


def modules() -> list[str]:
    """Every public module, each lazily handed-out name looked up once so that pdoc sees it."""
    names: list[str] = []
    for package in PACKAGES:
        found = pkgutil.walk_packages([package], f"{package}.")
        names += [package, *(module.name for module in found if "._" not in module.name)]
    for name in names:
        module = importlib.import_module(name)
        vars(module).update({public: getattr(module, public) for public in getattr(module, "__all__", ())})
    return [name for name in names if name not in LEFT_OUT]


def broken(folder: Path) -> list[str]:
    """A sentence for every mention that leads nowhere."""
    pages = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}
    anchors = {path.resolve(): set(re.findall(r'id="([^"]+)"', text)) for path, text in pages.items()}
    found: list[str] = []
    for path, text in pages.items():
        where = path.relative_to(folder)
        prose = SOURCE.sub("", text)
        found += [f"{where}: `{name}` is nothing that can be found" for link, name in CODE.findall(prose) if not link]
        found += [f"{where}: a table was broken by a rewrapped line: {row}" for row in BROKEN_ROW.findall(prose)]
        for target, anchor in LINK.findall(prose):
            page = (path.parent / target).resolve() if target else path.resolve()
            if page not in anchors or (anchor and anchor not in anchors[page]):
                found.append(f"{where}: the link to {target}#{anchor} is broken")
    return sorted(set(found))


def main(folder: Path) -> int:
    """Build the pages in ``folder``; 1 if a mention leads nowhere."""
    if any(folder.glob("*")):
        raise FileExistsError(f"expected a new or empty folder, found files in {folder}")
    sys.path.insert(0, ".")
    # Types that are imported for the type checker only stay names on the page.
    warnings.filterwarnings("ignore", message="Error parsing type annotation")
    warnings.filterwarnings("ignore", message="The module specification")  # a package brings its modules along
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc(*modules(), output_directory=folder)
    problems = broken(folder)
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    sys.stdout.write(f"{folder / 'index.html'}: {len(list(folder.rglob('*.html')))} pages, {len(problems)} broken\n")
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the reference pages.")
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    sys.exit(main(parser.parse_args().folder))

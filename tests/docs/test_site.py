"""The pages: README is short, every page is in the site's list, and what they link to and name exists.

`make docs` builds the site with Sphinx; these checks need none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)

# Where a page's file names may begin: the repository, the package, and its tests.
BEGINNINGS = (ROOT, ROOT / "transllm_jax", ROOT / "tests", DOCS)
# A name with a slash and one of these endings is a file of the repository ...
FILE = re.compile(r"[\w.{},*-]+(?:/[\w.{},*-]+)+\.(?:py|yaml|yml|json|sh|md|svg|toml|cfg|j2)(?:::\w+)?")
# ... unless it is a file of the reader's: what an example makes up, and what a run writes.
READERS = re.compile(
    r"(?:^|/)(?:runs|text|web|thai|mine-heldout|my-llama-chat|DST|WORKDIR|STAGE)/"
    r"|^(?:base|vocabulary|tokens|pretrain|translate|transfer|recover|evaluation|export|data|en)/.*\.json"
)


def prose(page: Path) -> str:
    """A page without its code blocks and comments."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub and MyST make them. An included page counts."""
    text = page.read_text(encoding="utf-8")
    found: set[str] = set()
    for included in re.findall(r"^```{include} (\S+)$", text, re.MULTILINE):
        found |= anchors(page.parent / included)
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        kept = (c for c in plain if c in " -_" or unicodedata.category(c)[0] in "LMN")
        name = "".join(kept).replace(" ", "-")
        found.add(name if name not in found else f"{name}-1")
    return found


def links(page: Path) -> Iterator[str]:
    """The targets of a page's links and pictures that are not on the web."""
    for target in re.findall(r"\]\(<?([^)>\s]+)>?(?: \"[^\"]*\")?\)", re.sub(r"`[^`\n]+`", "", prose(page))):
        if not re.match(r"[a-z]+:", target):
            yield target


def toctree(page: Path) -> Iterator[Path]:
    """The pages that a page's toctrees name."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```{toctree}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.strip() and not line.startswith(":"):
                name = re.sub(r"^.*<(.+)>$", r"\1", line.strip())
                yield (page.parent / name).with_suffix(".md")


def test_readme_is_two_pages() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_list_once() -> None:
    listed = [page.resolve() for source in DOCS.rglob("*.md") for page in toctree(source)]
    assert len(set(listed)) == len(listed)
    assert {*listed, DOCS / "index.md"} == set(DOCS.rglob("*.md"))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            wrong.append(target)
    assert not wrong


@every_page
def test_a_page_of_the_site_links_to_pages_alone(page: Path) -> None:
    """A link from the site to a file outside of it would lead nowhere; such a file is named as code."""
    if DOCS in page.parents:
        outside = [
            link
            for link in links(page)
            if not link.startswith("#") and DOCS not in (page.parent / link).resolve().parents
        ]
        assert not outside


def named_files(page: Path) -> Iterator[str]:
    """The files of the repository that a page names as code, in prose or in a block, with a test's name behind ::."""
    text = page.read_text(encoding="utf-8")
    code = [*re.findall(r"`([^`\n]+)`", prose(page)), *re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)]
    for piece in code:
        for found in re.finditer(rf"(?<![\w/.$:}}-]){FILE.pattern}(?!\w)", piece):
            if not READERS.search(found[0]):
                yield found[0]


def spelled_out(name: str) -> list[str]:
    """`a_{b,c}.py` as its two names."""
    group = re.search(r"{([^}]*)}", name)
    if not group:
        return [name]
    return [one for part in group[1].split(",") for one in spelled_out(name.replace(group[0], part, 1))]


@every_page
def test_files_that_a_page_names_exist(page: Path) -> None:
    wrong = []
    for name in named_files(page):
        path, _, test = name.partition("::")
        for one in spelled_out(path):
            found = [file for start in BEGINNINGS for file in start.glob(one)]
            if not found or (test and not any(f"def {test}(" in file.read_text(encoding="utf-8") for file in found)):
                wrong.append(name)
    assert not wrong


def test_what_is_looked_for_is_found(tmp_path: Path) -> None:
    """The patterns above see links, headings and names, so that a page without any is not right by mistake."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`: c, d\n[x](y.md#z) [w](https://a.b) ![p](p.svg)\n`stages/no.py` `configs/{a,b}.yaml`\n"
        "```sh\nbash launch/no.sh --config runs/x/run.yaml\n[n](no.md)\n```\n"
        "```{toctree}\n:hidden:\n\npage\nT <other>\n```\n"
    )
    assert anchors(page) == {"a-b-c-d"}
    assert list(links(page)) == ["y.md#z", "p.svg"]
    assert list(named_files(page)) == ["stages/no.py", "configs/{a,b}.yaml", "launch/no.sh"]
    assert spelled_out("configs/{a,b}.yaml") == ["configs/a.yaml", "configs/b.yaml"]
    assert list(toctree(page)) == [page, tmp_path / "other.md"]
    assert sum(len(list(named_files(page))) for page in PAGES) > 60

"""What a program can check of the pages: links lead somewhere, the parameters in docs/paper.md are counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dia_kernels.reproduce import command, parameters, tables

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/**/*.md"), *ROOT.glob("examples/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of the headings, by GitHub's rule; a number behind those that occur again."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.slow
def test_the_parameters_of_the_paper_are_counted():
    assert tables.of_parameters({"records": parameters.records()}) in (ROOT / "docs" / "paper.md").read_text()


def test_the_paper_has_every_experiment_and_the_gallery_every_picture():
    paper, gallery = ((ROOT / "docs" / name).read_text() for name in ("paper.md", "gallery.md"))
    for name in command.NAMES:
        assert f"    python -m dia_kernels reproduce {name}\n" in paper
        assert f"reproduced/{name}-tiny.png" in paper
    pictures = [f"reproduced/{path.name}" for path in (ROOT / "docs" / "reproduced").glob("*.png")]
    assert sorted(set(LINK.findall(gallery)) & set(pictures)) == sorted(pictures)
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "reproduced").iterdir()) < 1_500_000

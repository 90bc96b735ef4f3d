"""The pictures of the docs: what docs/plots.py draws, of numbers that stand in the docs."""

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from clusters import REPOSITORY


@pytest.fixture
def copy(tmp_path):
    """The docs, to be spoilt."""
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    return tmp_path / "docs"


def check(docs):
    ran = subprocess.run([sys.executable, docs / "plots.py", "--check"], capture_output=True, text=True, timeout=60)
    return ran.returncode, ran.stderr


def test_the_pictures_are_what_the_script_draws():
    assert check(REPOSITORY / "docs") == (0, "")


def test_a_picture_that_was_changed_and_a_number_that_is_not_in_the_docs_are_found(copy):
    picture = copy / "figures/split.svg"
    picture.write_text(picture.read_text().replace("FP8", "FP9") + "<!-- -->")
    figure = copy / "figures/pull.json"
    value = json.loads(figure.read_text())
    value["panels"][0]["series"]["shared memory"][0] = 99.7
    figure.write_text(json.dumps(value))
    code, said = check(copy)
    assert code == 1
    assert "split.svg is not what docs/plots.py draws" in said
    assert "pull.json: 99.7 does not stand on docs/transfer.md" in said


def test_each_picture_is_whole_and_says_what_it_is():
    pictures = list((REPOSITORY / "docs/figures").glob("*.svg"))
    assert len(pictures) >= 7
    pages = "".join(page.read_text() for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])
    for picture in pictures:
        root = ElementTree.parse(picture).getroot()
        assert root.get("role") == "img" and len(root.get("aria-label")) > 20
        assert "prefers-color-scheme:dark" in picture.read_text()
        assert f"figures/{picture.name}" in pages, f"no page shows {picture.name}"

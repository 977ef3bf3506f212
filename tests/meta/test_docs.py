"""What docs/ names is there: files, modules, what is defined in them, links; every room and every law has its place."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from test_layers import ROOMS

ROOT = Path(__file__).parents[2]
DOCS = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "docs").rglob("*.md"))}
BASES = (ROOT, ROOT / "bln_train", ROOT / "tests")
_PATH = re.compile(r"(?:[\w.-]+/)*(?:[\w.-]+/|[\w.-]+\.(?:py|c|h|md)|(?:[\w.-]+/)[\w.-]+\.(?:yaml|json))")
_LAW = re.compile(r"\blaws? (\d+)", re.IGNORECASE)


def prose(text):
    """The text without its listings."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def quoted(text):
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def existing(name):
    """The file or folder that a name means, from the repository, the package or the tests; None for none."""
    return next((base / name for base in BASES if (base / name).exists()), None)


@cache
def defined(path):
    """Names of the functions and classes of a file, those inside classes as `Class.method`."""
    names = set()

    def collect(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names


@cache
def names_of_tests():
    """Every test function, whatever its file."""
    return {name for path in (ROOT / "tests").rglob("test_*.py") for name in defined(path)}


def missing(text):
    """Of what a text names in backticks: files, `file::name`, dotted modules and tests that do not exist."""
    for name in quoted(text):
        path, _, inside = name.partition("::")
        if _PATH.fullmatch(path):
            found = existing(path)
            if found is None or (inside and inside not in defined(found)):
                yield name
        elif re.fullmatch(r"bln_train(\.\w+)+", name):
            place = ROOT / name.replace(".", "/")
            if not (place.is_dir() or place.with_suffix(".py").is_file()):
                yield name
        elif re.fullmatch(r"test_\w+", name) and name not in names_of_tests():
            yield name


def anchors(text):
    """The anchors of a page's titles."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def broken_links(path, text):
    """Links of a page that lead to no file, or to no title of one."""
    for target in re.findall(r"\]\(([^)]+)\)", prose(text)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        if not page.exists() or (anchor and anchor not in anchors(page.read_text(encoding="utf-8"))):
            yield target


def sections(text):
    """The parts of a page below its second-level titles, by title."""
    return dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", text, re.MULTILINE))


@pytest.mark.parametrize("name", DOCS)
def test_what_a_page_names_exists(name):
    assert list(missing(DOCS[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    assert list(broken_links(DOCS[name], DOCS[name].read_text(encoding="utf-8"))) == []


def test_every_page_is_linked():
    """From the README, or from a page that is."""
    texts = [ROOT / "README.md", *DOCS.values()]
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in texts
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    assert [name for name, path in DOCS.items() if path.resolve() not in linked] == []


def test_every_room_is_described_in_order():
    """The table of rooms in docs/architecture.md has those of law 8, lower ones first."""
    table = sections(DOCS["docs/architecture.md"].read_text(encoding="utf-8"))["Rooms"]
    rows = re.findall(r"^\| `([\w/]+?)(?:/|\.py)` \|", table, re.MULTILINE)
    assert rows == [room.replace(".", "/") for room in ROOMS]


def test_every_law_is_described():
    """Each has its section in docs/laws.md, which names a file of tests; no test speaks of another law."""
    titles = sections(DOCS["docs/laws.md"].read_text(encoding="utf-8"))
    laws = {int(found[1]): text for title, text in titles.items() if (found := _LAW.match(title))}
    assert list(laws) == list(range(1, 11))
    assert [number for number, text in laws.items() if not re.search(r"`tests/[\w/]+\.py", text)] == []
    tests = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py") if path.name != "test_docs.py")
    assert {int(number) for text in tests for number in _LAW.findall(text)} <= set(laws)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see `norm/kernels/backend.py`, `tests/meta/`", None),
        ("see `norm/no_such.py`", "norm/no_such.py"),
        ("see `no_such_room/`", "no_such_room/"),
        ("see `train/step.py::AccumulationStep.__call__`", None),
        ("see `train/step.py::AccumulationStep.no_such`", "train/step.py::AccumulationStep.no_such"),
        ("see `bln_train.norm.kernels`, `bln_train.errors`", None),
        ("see `bln_train.norm.no_such`", "bln_train.norm.no_such"),
        ("see `test_what_a_page_names_exists`", None),
        ("see `test_no_such_law`", "test_no_such_law"),
        ("`norm.recompute`, `1/N`, `model.pt2`, `bln-train run x.yaml`\n```\n`no_such.py`\n```\n", None),
    ],
)
def test_a_name_of_nothing_is_found(text, fault):
    assert list(missing(text)) == ([] if fault is None else [fault])


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One title\n\n## Law 1: two\n")
    text = "[a](page.md) [b](page.md#law-1-two) [c](#one-title) [d](https://example.org) [e](other.md) [f](#two)"
    assert list(broken_links(page, text)) == ["other.md", "#two"]

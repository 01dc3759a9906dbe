"""README.md and docs/*.md: size, links, commands and words."""

import re
import subprocess
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest

REPO = Path(__file__).parent.parent
README, LOG = REPO / "README.md", REPO / "docs" / "LOG.md"
PAGES = [README, *sorted((REPO / "docs").glob("*.md"))]
TODAY = [page for page in PAGES if page != LOG]  # the log keeps the words and flags of its day
CODE = sorted(p for p in REPO.rglob("*.py") if not {".venv", "tests"} & set(p.parts))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
OLD_WORDS = (
    "BendModel|gauges|Crew|understudy|Ledoit-Wolf|unlikeness|so-manieth|straightened|foretold|"
    "FORESIGHT|JUDGED|unit_act|over_ranks|set_aside|some_root|models_of|some_chunks|keep_memory|"
    "encoded_at_once|PATIENCE|level_table|_hire|_hand_out|die_with_the_collector|driven_otherwise|"
    "FUMBLE|GRAIN|Elsewhere|relit|LEAP|panel_mean|panel_parts|ceiling_steps|in_trouble|TROUBLE|"
    "energy to come|usual surprise"
)
OLD_FLAGS = "--width|--gas|--bend|--align|--gauges|--lived|--rounds|--compile|--tensorboard"
OLD_COMMANDS = "python trials.py|buffer.py export|python networks.py|benchmark.py (paired|scale)"


def prose(page):
    """The text of a page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", t.strip().lower()).replace(" ", "-") for t in titles}


def snippets(page):
    """All inline code and all lines of shell blocks, continued lines joined."""
    blocks = [body for kind, body in FENCE.findall(page.read_text()) if kind == "bash"]
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    return lines + re.findall(r"`([^`\n]+)`", prose(page))


def commands(page):
    """[(script or module, [flag])] of each Python command on a page."""
    found = []
    for snippet in snippets(page):
        for part in re.split(r" & | && |;|\|| #", snippet):
            if match := re.search(r"(?:python3?|torchrun.*?) (-m \S+|\S+\.py)(.*)", part):
                found.append((match[1], re.findall(r"--\w+", match[2])))
    return found


def source_of(name):
    """The file of a script, or of `-m module`; None for a module of another package."""
    module = name.removeprefix("-m ")
    path = REPO / (module if module == name else module.replace(".", "/") + ".py")
    return path if path.exists() or module == name or not find_spec(module) else None


@cache
def flags_of(path):
    """All flags of a script, as it says itself."""
    module = ".".join(path.relative_to(REPO).with_suffix("").parts)
    with patch("sys.argv", [path.name, "--help"]), redirect_stdout(StringIO()) as out:
        with suppress(SystemExit):
            import_module(module).main()
    usage = out.getvalue().partition("\n\n")[0]
    return {"--help", *re.findall(r"--\w+", usage)}


def test_the_readme_is_short_and_begins_with_a_command():
    text = README.read_text()
    assert text.count("\n") <= 200 and len(text.split()) <= 1800
    assert text[: text.index("```bash")].count("\n") + 2 < 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for link in LINK.findall(prose(page)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_to_each_other_and_back(page):
    links = " ".join(LINK.findall(prose(page)))
    assert page == README or "../README.md" in links
    assert page != README or all(f"docs/{other.name}" in links for other in PAGES[1:])


@pytest.mark.parametrize("page", TODAY, ids=lambda page: page.name)
def test_commands_name_scripts_and_flags_that_exist(page):
    for name, flags in commands(page):
        path = source_of(name)
        assert path is None or path.exists(), name
        unknown = set(flags) - flags_of(path) if path else set()
        assert not unknown, f"{name}: {unknown}"


@pytest.mark.parametrize("page", TODAY, ids=lambda page: page.name)
def test_targets_and_flags_named_alone_exist(page):
    scripts = [p for p in CODE if p.read_text().endswith("run_main(main)\n")]
    every = set().union(*map(flags_of, scripts))
    targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M)
    for snippet in snippets(page):
        if match := re.match(r"make (?:-n )?([a-z-]+)", snippet):
            assert match[1] in targets, snippet
        if snippet.startswith("--"):
            assert set(re.findall(r"--\w+", snippet)) <= every, snippet


@pytest.mark.parametrize("path", TODAY + CODE, ids=lambda path: path.name)
def test_old_words_are_gone(path):
    text = path.read_text()
    assert not (found := re.findall(rf"\b(?:{OLD_WORDS})\b", text)), found
    if path in TODAY:
        assert not (found := re.findall(rf"(?:{OLD_FLAGS})\b|{OLD_COMMANDS}", text)), found


def test_the_log_is_indexed_newest_first():
    text = LOG.read_text()
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)", text, re.M)
    rows = re.findall(r"^\| \d{4}-\d\d-\d\d.*\]\(#(\S+)\) \|$", text, re.M)
    titles = re.findall(r"^##+ \d{4}-.*: .*Verdict: \S", text, re.M)
    assert dates == sorted(dates, reverse=True)
    assert len(rows) == len(titles) <= 40 and set(rows) <= anchors(LOG)


def test_git_has_every_page_and_picture():
    """A clone gets only what git has."""
    listed = subprocess.run(["git", "ls-files", "docs"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode == 0:  # else no checkout, as in an archive
        kept = set(listed.stdout.split())
        shown = {
            f"docs/{Path(link).name}" for link in LINK.findall(prose(README)) if "docs/" in link
        }
        assert {re.sub("#.*", "", name) for name in shown} <= kept

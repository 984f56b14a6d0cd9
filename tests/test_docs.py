"""The Python examples of README and docs run as they stand, and print what stands after them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = re.compile(r"```python\n(?P<code>.*?)```(?:\s+prints\s+|\s*)(?:```text\n(?P<printed>.*?)```)?", re.DOTALL)
EXAMPLES = [
    pytest.param(
        found["code"], found["printed"], id=f"{page.name}:{page.read_text()[: found.start()].count(chr(10)) + 1}"
    )
    for page in PAGES
    for found in EXAMPLE.finditer(page.read_text())
]


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_example(code, printed, capsys):
    exec(compile(code, "example", "exec"), {"__name__": "example"})
    if printed is not None:
        assert capsys.readouterr().out.strip() == printed.strip()


def test_there_are_examples():
    assert len(EXAMPLES) >= 5


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_file_is_long():
    for file in [*ROOT.glob("memopt/**/*.py"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        assert len(file.read_text().splitlines()) <= 520, file

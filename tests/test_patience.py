"""No test waits for another process by the clock for less than `PATIENCE_S`: a busy machine would break it."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
WAITS = re.compile(
    r"monotonic\(\) \+ ([\d.]+)|\b(?:wait|communicate)\((?:timeout=)?([\d.]+)\)"
    r"|check=\w+, timeout=([\d.]+)|timeout=([\d.]+), check=\w+"
)


def short_waits(text: str) -> list[str]:
    """Waits of a file that end after a number of seconds below ten minutes."""
    found = [(match[0], next(filter(None, match.groups()))) for match in WAITS.finditer(text)]
    return [words for words, seconds in found if float(seconds) < 600]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_waits_are_long(path: Path) -> None:
    assert path.name == "test_patience.py" or short_waits(path.read_text()) == []


def test_the_rule_sees_short_waits() -> None:
    text = "x = time.monotonic() + 60\nhead.wait(timeout=30)\np.communicate(5)\nrun(w, timeout=180, check=False)\n"
    assert len(short_waits(text)) == 4
    assert short_waits("time.monotonic() + PATIENCE_S; done.wait(600)") == []

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.families import FAMILIES
from tests.hostile.harness import WarmProcess, arguments, prepare, problems, run_process

LEAST = 20
CASES = [(family, case) for family, row in FAMILIES.items() for case in row.cases]


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmProcess]:
    process = WarmProcess()
    yield process
    process.close()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The valid input of each family; families that share a writer share what it wrote."""
    written: dict[object, Path] = {}
    for name, family in FAMILIES.items():
        if family.base not in written:
            written[family.base] = tmp_path_factory.mktemp(name.replace(" ", "-")) / "base"
            family.base(written[family.base])
    return {name: written[family.base] for name, family in FAMILIES.items()}


@pytest.mark.parametrize(("family", "case"), CASES)
def test_refused(family: str, case: str, warm: WarmProcess, bases: dict[str, Path], tmp_path: Path) -> None:
    row = FAMILIES[family]
    prepare(row, bases[family], tmp_path)
    found = problems(row.cases[case], row, tmp_path, warm)
    assert not found, "; ".join(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_damaged_is_taken(family: str, warm: WarmProcess, bases: dict[str, Path], tmp_path: Path) -> None:
    prepare(FAMILIES[family], bases[family], tmp_path)
    outcome = warm(arguments(FAMILIES[family], tmp_path), tmp_path)
    assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.real])
def test_the_real_command(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """One case of each kind of family by the command as a user runs it."""
    row = FAMILIES[family]
    prepare(row, bases[family], tmp_path)
    found = problems(next(iter(row.cases.values())), row, tmp_path, run_process)
    assert not found, "; ".join(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_large_enough(family: str) -> None:
    assert len(FAMILIES[family].cases) >= LEAST

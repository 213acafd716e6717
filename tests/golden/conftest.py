"""`--golden-dir DIR`: run every case of a folder laid out like tests/golden/data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import cases

COVERED = pytest.StashKey[set]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, default=cases.DATA, help="folder of golden cases")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden(*patterns): golden cases that the test covers, one run a case")


def _directory(config: pytest.Config) -> Path:
    return Path(config.getoption("--golden-dir", default=cases.DATA))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", cases.case_names(_directory(metafunc.config)))
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    names = [name for name in cases.case_names(_directory(metafunc.config)) if cases.matches(name, marker.args)]
    metafunc.config.stash.setdefault(COVERED, set()).update(names)
    metafunc.parametrize("case", names, indirect=True)


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of cases of this run."""
    return _directory(request.config)


@pytest.fixture
def case(request: pytest.FixtureRequest, golden_dir: Path) -> cases.Case:
    """The case a test marked with `golden` is run for."""
    return cases.load_case(golden_dir, request.param)


@pytest.fixture
def covered_cases(request: pytest.FixtureRequest) -> set[str]:
    """Names of the case files that the collected tests cover."""
    return request.config.stash.get(COVERED, set())

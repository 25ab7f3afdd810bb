"""Shared by the tests of the brain-age command."""

import pytest

from emoe_med.data.cohort import write_cohort


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """Manifest of 24 small synthetic persons, some of whom came twice; nobody writes there."""
    return write_cohort(tmp_path_factory.mktemp("cohort") / "synthetic", persons=24, seed=5, spacing_mm=8.0)

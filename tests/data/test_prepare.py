"""What is measured of a head beside its volume."""

import numpy as np
import pytest

from emoe_med.data.prepare import cut_share


def head() -> tuple[np.ndarray, np.ndarray]:
    """A brain of 10 x 10 x 10 voxels in a head of 16 x 16 x 16, in air of 24 x 24 x 24 without noise."""
    voxels, brain = np.zeros((24, 24, 24)), np.zeros((24, 24, 24), bool)
    voxels[4:20, 4:20, 4:20] = 50
    brain[7:17, 7:17, 7:17] = True
    voxels[brain] = 100
    return voxels, brain


def test_a_whole_head_is_not_cut():
    assert cut_share(*head()) == 0


def test_a_head_cut_at_a_face_or_before_its_padding():
    voxels, brain = head()
    assert cut_share(voxels[:, :15], brain[:, :15]) == pytest.approx(1 / 8)  # one of eight slices that are left
    padded = voxels.copy()
    padded[:, 15:] = 0
    assert cut_share(padded, brain) == pytest.approx(3 / 10)  # the last slice seen, and two where there is none


def test_the_air_of_a_stripped_head_is_no_padding():
    voxels, brain = head()
    assert cut_share(np.where(brain, voxels, 0), brain) == 0

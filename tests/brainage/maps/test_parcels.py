"""Label tables as they come, and atlases that lie where their world coordinates say."""

import numpy as np
import pytest

from emoe_med.brainage.maps.cells import CellGrid
from emoe_med.brainage.maps.label_table import fetch_atlas, names_of, read_labels
from emoe_med.brainage.maps.parcels import ParcelCounts, Parcels
from emoe_med.data.scan import Scan
from emoe_med.data.volume import write_volume
from emoe_med.errors import ConfigError, DataError

GRID = CellGrid(8.0, 2, 2, 4)
SPACE = "MNI152NLin2009aSym"


def test_tables_of_bids_cerebra_and_aal(tmp_path):
    (tmp_path / "bids.tsv").write_text("index\tname\tcolor\n0\tnone\t#000000\n7\tLeft Thing\t#ffffff\n")
    assert read_labels(tmp_path / "bids.tsv") == {7: "Left Thing"}
    (tmp_path / "cerebra.csv").write_text(
        "Mindboggle ID,Label Name,RH Label,LH Labels,Notes,Dice Kappa\n2005,Cuneus,43,94,,0.67\n16,Stem,45,45,,0.9\n"
    )
    names = read_labels(tmp_path / "cerebra.csv")
    assert (names[43], names[94]) == ("right Cuneus", "left Cuneus")
    (tmp_path / "aal.txt").write_text("1 Precentral_L 2001\n2 Precentral_R 2002\n")
    assert read_labels(tmp_path / "aal.txt") == {1: "Precentral_L", 2: "Precentral_R"}
    (tmp_path / "other.csv").write_text("a,b\nc,d\n")
    with pytest.raises(DataError, match="MAPS-LABELS"):
        read_labels(tmp_path / "other.csv")


def test_a_table_above_the_labels_is_found(tmp_path):
    folder = tmp_path / "derivatives" / "phantom" / "sub-1" / "ses-1" / "anat"
    folder.mkdir(parents=True)
    assert names_of(folder / "x_dseg.nii.gz") == {}
    assert names_of(folder / "x_DLMUSE.nii.gz")[47] == "Right Hippocampus"
    (tmp_path / "derivatives" / "phantom" / "dseg.tsv").write_text("index\tname\n1\tone\n")
    assert names_of(folder / "x_dseg.nii.gz") == names_of(folder / "x_DLMUSE.nii.gz") == {1: "one"}


def test_unknown_names_and_unaligned_heads_are_refused():
    with pytest.raises(ConfigError, match="known names: aal"):
        fetch_atlas("brodmann-1909")
    with pytest.raises(ConfigError, match="MAPS-SPACE"):
        Parcels.of_atlas("aal", None, GRID, "centred")


def test_an_atlas_stored_from_right_to_left_stays_where_it_is(tmp_path):
    """A file in LAS with 3 mm voxels: one label on the left, one on the right, both at known places."""
    affine = np.diag([-3.0, 3, 3, 1])
    affine[:3, 3] = [90, -120, -80]
    world = np.stack(np.meshgrid(*(affine[a, 3] + affine[a, a] * np.arange(70) for a in range(3)), indexing="ij"), -1)
    places = {3: (-40.0, -30.0, 20.0), 5: (38.0, 10.0, -12.0)}
    voxels = np.zeros((70, 70, 70), np.uint8)
    for label, place in places.items():
        voxels[np.linalg.norm(world - place, axis=-1) < 14] = label
    write_volume(tmp_path / "two.nii.gz", voxels, affine)
    (tmp_path / "two.tsv").write_text("index\tname\n3\tleft\n5\tright\n")
    parcels = Parcels.of_atlas(str(tmp_path / "two.nii.gz"), tmp_path / "two.tsv", GRID, SPACE)
    assert (parcels.name, parcels.volume.shape) == ("two", (40, 48, 40))
    counts = ParcelCounts(parcels)
    inside = np.ones(parcels.volume.shape, bool)
    counts.add(0, Scan(2, tmp_path / "x", None, "x", ""), np.eye(4), inside)
    for row, (label, place) in zip(counts.matrix(0, counts.labels(), 1200).toarray(), places.items(), strict=True):
        centre = row @ GRID.centres_mm / row.sum()
        np.testing.assert_allclose(centre, place, atol=1.5)
        assert row.sum() == counts.total(0, counts.labels())[list(places).index(label)]
        assert row.sum() * 64 == pytest.approx(4 / 3 * np.pi * 14**3, rel=0.05)


def test_the_labels_of_a_head_go_where_its_image_goes(tmp_path):
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = [-100, -120, -100]
    voxels = np.zeros((50, 60, 50), np.uint8)
    voxels[20, 30, 25] = 9  # at world (-20, 0, 0)
    write_volume(tmp_path / "own.nii.gz", voxels, affine)
    scan = Scan(2, tmp_path / "x", None, "x", "", labels=tmp_path / "own.nii.gz")
    parcels = Parcels.of_heads(None, GRID, [scan])
    matrix = np.eye(4)
    matrix[:3, 3] = [10, 0, 0]  # template -> head
    found = np.argwhere(parcels.of(scan, matrix) == 9)
    world = found * 4.0 + [-78, -111.5, -73.5]
    assert np.abs(world.mean(0) - [-30, 0, 0]).max() <= 4
    assert parcels.name_of(9) == "label 9"
    assert Parcels.of_heads(None, GRID, [scan, Scan(3, tmp_path / "y", None, "y", "")]) is None


def test_real_atlases(real_data):
    folder = real_data / "templates"
    for volume, table, count in (
        ("cerebra_mni2009c_sym_1mm.nii.gz", "cerebra_labels.csv", 102),
        ("aal.nii.gz", "aal.nii.txt", 116),
    ):
        parcels = Parcels.of_atlas(str(folder / volume), folder / table, GRID, SPACE)
        found = set(np.unique(parcels.volume)) - {0}
        assert len(parcels.names) >= count - 2
        assert len(found & parcels.names.keys()) > 0.97 * len(found)
        for label in found:
            name = parcels.names.get(label, "")
            x = (np.argwhere(parcels.volume == label)[:, 0] * 4.0 - 78).mean()
            if name.startswith("left ") or name.endswith("_L"):
                assert x < 2, name
            if name.startswith("right ") or name.endswith("_R"):
                assert x > -2, name

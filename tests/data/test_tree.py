"""Folders of other tools are recognised: which files are heads, and which mask belongs to which."""

import pytest

from emoe_med.data.scan import is_warped
from emoe_med.data.tree import mask_beside, scans_in
from emoe_med.errors import DataError

FREESURFER = ["bert/mri/T1.mgz", "bert/mri/brainmask.mgz", "bert/mri/aseg.mgz", "sub-02_ses-1/mri/orig.mgz"]
FREESURFER += ["fsaverage/mri/T1.mgz", "bert/mri/orig.mgz"]
FMRIPREP = [
    *("sub-01/anat/sub-01_desc-preproc_T1w.nii.gz", "sub-01/anat/sub-01_desc-brain_mask.nii.gz"),
    *("sub-01/anat/sub-01_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz", "sub-01/anat/sub-01_dseg.nii.gz"),
    "sub-02/ses-A/anat/sub-02_ses-A_run-1_desc-preproc_T1w.nii.gz",
]
DEEPMRIPREP = ["sub-01/anat/mri/brainsub-01_T1w.nii.gz", "sub-01/anat/mri/masksub-01_T1w.nii.gz"]
DEEPMRIPREP += ["sub-01/anat/mri/mwp1sub-01_T1w.nii.gz"]
RAW = ["sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz", "sub-01/func/sub-01_bold.nii.gz"]
RAW += ["derivatives/fsl/sub-01/anat/sub-01_T1w.nii.gz", "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii"]
OURS = [f"sub-01/anat/sub-01_space-T_res-2_desc-{name}" for name in ("preproc_T1w.nii.gz", "brain_mask.nii.gz")]
# the template of sub-01, its visits and their copies in the template's space; sub-02 has such a copy alone
LONGITUDINAL = ["sub-01", "sub-01_ses-1", "sub-01_ses-1.long.sub-01", "sub-01_ses-2", "sub-01_ses-2.long.sub-01"]
LONGITUDINAL = [f"{name}/mri/T1.mgz" for name in (*LONGITUDINAL, "sub-02", "sub-02_ses-1.long.sub-02")]
PLAIN = ["a.nii.gz", "b/c.MGZ", "a_mask.nii.gz", "a_seg.nii", "notes.txt"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (FREESURFER, [("bert", "", "T1.mgz", "brainmask.mgz"), ("sub-02", "ses-1", "orig.mgz", None)]),
        (
            LONGITUDINAL,
            [
                ("sub-01", "ses-1", "T1.mgz", None),
                ("sub-01", "ses-2", "T1.mgz", None),
                ("sub-02", "ses-1", "T1.mgz", None),
            ],
        ),
        (
            FMRIPREP,
            [
                ("sub-01", "", "sub-01_desc-preproc_T1w.nii.gz", "sub-01_desc-brain_mask.nii.gz"),
                ("sub-02", "ses-A_run-1", "sub-02_ses-A_run-1_desc-preproc_T1w.nii.gz", None),
            ],
        ),
        (DEEPMRIPREP, [("sub-01", "", "brainsub-01_T1w.nii.gz", "masksub-01_T1w.nii.gz")]),
        (
            RAW,
            [("sub-01", "", "sub-01_T1w.nii.gz", None), ("sub-02", "ses-1", "sub-02_ses-1_T1w.nii", None)],
        ),
        (
            OURS,
            [
                (
                    "sub-01",
                    "",
                    "sub-01_space-T_res-2_desc-preproc_T1w.nii.gz",
                    "sub-01_space-T_res-2_desc-brain_mask.nii.gz",
                )
            ],
        ),
        (PLAIN, [("a", "", "a.nii.gz", "a_mask.nii.gz"), ("c", "", "c.MGZ", None)]),
    ],
)
def test_layouts(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [(s.participant_id, s.session_id, s.image.name, s.mask and s.mask.name) for s in scans_in(tmp_path)]
    assert found == expected


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("sub-1_T1w.nii.gz", "sub-1_desc-brain_mask.nii"),
        ("sub-1_desc-preproc_T1w.nii", "sub-1_desc-brain_mask.nii.gz"),
        ("head.mgz", "head_mask.mgz"),
        ("head.nii", "head_brain_mask.nii.gz"),
        ("T1_unbiased.nii.gz", "T1_brain_mask.nii.gz"),
        ("T1.mgz", "brainmask.mgz"),
    ],
)
def test_a_mask_beside_a_head_is_found(tmp_path, image, mask):
    assert mask_beside(tmp_path / image) is None
    (tmp_path / mask).write_bytes(b"x")
    assert mask_beside(tmp_path / image) == tmp_path / mask


@pytest.mark.parametrize(
    ("name", "warped"),
    [
        ("1000001_20252_2_0/T1/T1_brain_to_MNI.nii.gz", True),
        ("sub-1_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz", True),
        ("sub-1_space-MNI152NLin6Asym_res-2_desc-preproc_T1w.nii", True),
        ("sub-1_space-MNI152NLin2009aSym_res-2_desc-preproc_T1w.nii.gz", False),  # affine: `preprocess` writes it
        ("sub-1_desc-preproc_T1w.nii.gz", False),
        ("sub-1_space-MNI152NLin2009cAsym/sub-1_T1w.nii.gz", False),
    ],
)
def test_warped_images_are_known_by_name(name, warped):
    assert is_warped(name) == warped


def test_a_folder_of_warped_images_alone_keeps_their_masks(tmp_path):
    """fMRIPrep's mask lies on the warped grid, unlike UK Biobank's."""
    space = "sub-1_space-MNI152NLin2009cAsym_desc-"
    for name in ("preproc_T1w.nii.gz", "brain_mask.nii.gz"):
        (tmp_path / (space + name)).write_bytes(b"x")
    (scan,) = scans_in(tmp_path)
    assert scan.warped
    assert scan.mask == tmp_path / f"{space}brain_mask.nii.gz"


def test_no_head_is_lost_in_silence_among_two_layouts(tmp_path, caplog):
    """A half-finished fMRIPrep beside raw heads must not stand for all of them."""
    raw = [f"sub-0{i}/anat/sub-0{i}_T1w.nii.gz" for i in (1, 2, 3)]
    derived = "fmriprep/sub-02/anat/sub-02_desc-preproc_T1w.nii.gz"
    for name in (*raw, f"derivatives/{derived}"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"x")
    assert [scan.image.relative_to(tmp_path / "a").as_posix() for scan in scans_in(tmp_path / "a")] == raw
    assert "3 raw heads in BIDS" in caplog.text
    assert [scan.participant_id for scan in scans_in(tmp_path / "a" / "derivatives" / "fmriprep")] == ["sub-02"]
    (tmp_path / "a" / "derivatives").rename(tmp_path / "a" / "results")
    with pytest.raises(DataError, match=r"PREP-MIXED  .*holds 1 heads of fMRIPrep and 3 raw heads in BIDS"):
        scans_in(tmp_path / "a")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="PREP-NONE"):
        scans_in(tmp_path)

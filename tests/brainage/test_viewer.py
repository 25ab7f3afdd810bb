import base64
import gzip
import json
import re
import shutil

import nibabel
import numpy as np
import pytest
from map_folder import EXPERTS, LAYER, PLANTED, write_map_folder, write_verdicts
from matplotlib.colors import to_rgb

from emoe_med.brainage.maps.write import colours
from emoe_med.brainage.viewer import write_viewer
from emoe_med.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "expert_maps"
    write_map_folder(folder)
    write_viewer(folder)
    return folder


def page_of(folder):
    return (folder / "viewer.html").read_text()


def data_of(folder):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page_of(folder), re.S)[1])


def unpacked(entry):
    """Voxels [X, Y, Z] of a packed volume, NaN where it has no value."""
    raw = np.frombuffer(gzip.decompress(base64.b64decode(entry["bytes"])), entry["type"]).reshape(entry["shape"])
    return np.where(raw == -32768, np.nan, raw * entry["scale"]) if entry["type"] == "int16" else raw


def test_every_map_on_the_page_is_the_nifti_within_a_thousandth(folder):
    volumes = data_of(folder)["volumes"]
    coverage = nibabel.load(next(folder.glob("*coverage*.nii.gz"))).get_fdata() >= 0.5
    for entry in json.loads((folder / "maps.json").read_text())["maps"]:
        if entry["quantity"] == "coverage":
            continue
        name = f"{LAYER}/{entry['quantity']}" + (f"-expert/{entry['expert']}" if entry["expert"] else "")
        image = nibabel.load(folder / entry["file"])
        values = unpacked(volumes[name])
        assert np.isnan(values[~coverage]).all()
        assert np.abs(values - image.get_fdata())[coverage].max() <= 1e-3 * abs(entry["high"])
        assert np.allclose(volumes[name]["origin"], image.affine[:3, 3])
        assert np.allclose(np.diag(volumes[name]["spacing"]), image.affine[:3, :3])


def test_the_page_starts_in_the_planted_cell_and_parcels_lead_there(folder):
    data = data_of(folder)
    assert np.abs(np.subtract(data["start"], PLANTED["place"])).max() <= 8  # half a cell
    parcels = unpacked(data["volumes"]["parcels"])
    origin = data["volumes"]["parcels"]["origin"]
    found = np.argwhere(parcels == 1 + [row["parcel"] for row in data["parcels"]].index(PLANTED["parcel"]))
    centre = found.mean(0) * data["volumes"]["parcels"]["spacing"] + origin
    assert np.abs(centre - PLANTED["place"]).max() < 1e-3


def test_a_remark_claims_what_the_table_shows_and_no_more(folder):
    remarks = {expert["name"]: expert["remark"] for expert in data_of(folder)["experts"]}
    assert remarks["E03"] == "E03: enriched ×7.4 in Right hippocampus (p 0.004)"
    assert remarks["E00"] == "E00: enriched in no parcel (p < 0.05, corrected for all parcels and experts)"
    assert list(remarks) == EXPERTS


def test_the_page_says_over_how_many_each_measure_is(tmp_path, folder):
    folder = shutil.copytree(folder, tmp_path / "expert_maps")
    index = json.loads((folder / "maps.json").read_text())
    counts = {"subjects": 181, "subjects_contribution": 40, "subjects_occlusion": 20, "runs": ["a", "b"]}
    (folder / "maps.json").write_text(json.dumps(index | counts))
    page = write_viewer(folder).read_text()
    assert "(contribution over 40 of them, occlusion over 20 of them); 2 runs" in page
    assert "intervals are over persons, with these runs as they are" in page


@pytest.mark.parametrize(("experts", "apart"), [(2, 7), (8, 7), (16, 7), (24, 6), (32, 5)])
def test_experts_have_colours_that_every_eye_tells_apart(experts, apart):
    found = np.array([to_rgb(colour) for colour in colours(experts)])
    assert (np.ptp(found, axis=1) > 0.25).all()  # grey has none
    for eye in (np.eye(3), *DICHROMATS.values()):
        lab = oklab(np.where(found <= 0.04045, found / 12.92, ((found + 0.055) / 1.055) ** 2.4) @ np.array(eye).T)
        distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + 100 * np.eye(experts)
        assert distance.min() > apart  # 2 can just be seen side by side


# linear RGB as dichromats see it: Machado, Oliveira and Fernandes 2009, severity 1
DICHROMATS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def oklab(linear):
    """Coordinates of linear RGB [N, 3] in which distances are as seen, lightness 0 to 100. Source: Ottosson 2020."""
    cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    cones.append([0.0883024619, 0.2817188376, 0.6299787005])
    lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    lab.append([0.0259040371, 0.7827717662, -0.8086757660])
    return 100 * np.cbrt(linear.clip(0, 1) @ np.array(cones).T) @ np.array(lab).T


def test_nothing_is_loaded_and_nothing_may_be(folder):
    page = page_of(folder)
    markup, scripts = page.partition('id="data"')[0], page.rpartition("<script>")[2]
    assert "default-src 'none'" in markup
    assert not re.search(r"https?:|//[a-z]+\.|\b(src|href)=|url\(|@import", markup)
    assert not re.search(r"https?:|fetch\(|XMLHttp|WebSocket|localStorage|import\(|eval\(|innerHTML", scripts)
    assert page.count("</script>") == 2  # no text of a table ends a script


def test_text_of_others_is_shown_as_text(folder):
    assert "Cortex <left>" not in page_of(folder)
    assert "Cortex <left> & more" in [row["name"] for row in data_of(folder)["parcels"]]


@pytest.mark.parametrize(
    ("verdict", "kind", "told"),
    [
        ("stable", "good", ""),
        ("unstable, do not interpret", "bad", "unstable, do not interpret"),
        ("not tested: needs runs of other seeds and folds", "open", "stability not tested"),
    ],
)
def test_the_verdict_leads_and_is_in_every_picture(tmp_path, folder, verdict, kind, told):
    folder = shutil.copytree(folder, tmp_path / "expert_maps")
    write_verdicts(folder, verdict)
    index = json.loads((folder / "maps.json").read_text())
    (folder / "maps.json").write_text(json.dumps({**index, "verdict": verdict}))
    page = write_viewer(folder).read_text()
    assert data_of(folder)["warning"] == told
    banner = page.index(f'<div class="verdict {kind}" role="alert"><p><b>{verdict[0].upper()}{verdict[1:]}.</b>')
    assert banner < page.index('id="controls"')
    assert "Sanity: 1 of 2 checks passed" in page
    assert page.index("✗ failed") < page.index("✓ passed")


@pytest.mark.parametrize("count", ["subjects", "subjects_contribution", "subjects_occlusion"])
def test_maps_of_few_persons_are_refused_and_drawn_heads_are_nobody(tmp_path, folder, count):
    folder = shutil.copytree(folder, tmp_path / "expert_maps")
    (folder / "viewer.html").unlink()
    index = json.loads((folder / "maps.json").read_text()) | {count: 19}
    (folder / "maps.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"MAPS-FEW.*maps of 19 persons"):
        write_viewer(folder)
    assert not (folder / "viewer.html").exists()
    (folder / "maps.json").write_text(json.dumps({**index, "synthetic": True}))
    assert "SYNTHETIC DATA" in write_viewer(folder).read_text()


def test_a_missing_map_is_named(tmp_path, folder):
    folder = shutil.copytree(folder, tmp_path / "expert_maps")
    lost = next(folder.glob("*label-E05_desc-gate*"))
    lost.unlink()
    with pytest.raises(DataError, match=f"MAPS-FILE.*{lost.name}.*is missing"):
        write_viewer(folder)


def test_eight_experts_at_2_mm_stay_below_15_mb_even_if_no_two_voxels_are_equal(tmp_path):
    folder = write_map_folder(tmp_path / "expert_maps", grid_mm=2.0)
    random = np.random.default_rng(0)
    for path in folder.glob("*_probseg.nii.gz"):
        image = nibabel.load(path)
        values = image.get_fdata() * random.uniform(0.99, 1, image.shape)
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), image.affine), path)
    assert write_viewer(folder).stat().st_size < 15e6

"""The viewer as a person meets it: a real MLflow server, a real browser, the deep link."""

import json
import socket

import nibabel
import numpy as np
import pytest
from devtools import chromium, find_chromium
from map_folder import PLANTED, write_map_folder

from emoe_med.brainage.map_record import record_maps
from emoe_med.brainage.viewer import write_viewer
from emoe_med.training.store import serve
from emoe_med.training.tracking import Tracker
from emoe_med.training.ui import run_links

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="no chromium here: `make browser` installs it"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
]
UNSTABLE = "unstable, do not interpret"
LOOKED_AT = [  # quantity, expert, place
    ("occupancy", "E03", PLANTED["place"]),
    ("contribution", "E03", (-30.0, 20.0, 10.0)),
    ("gate", "E05", (12.5, -60.0, 40.0)),
]
UNNAMED = (
    "[...document.querySelectorAll('input, select, canvas[tabindex]')].filter((e) => !e.labels?.length && !e.ariaLabel)"
)
RED = """(() => {
  const canvas = document.getElementById('axial'), width = canvas.width;
  const { data } = canvas.getContext('2d').getImageData(0, 0, width, canvas.height);
  const found = [];
  for (let p = 0; p < data.length; p += 4) if (data[p] > data[p + 2] + 60) found.push(((p / 4) % width) / width);
  return [Math.min(...found), Math.max(...found), found.length];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Address of a page of stable maps, outside of MLflow."""
    return write_viewer(write_map_folder(tmp_path_factory.mktemp("maps") / "expert_maps")).as_uri()


def drawn(browser, address, width, height):
    """Open an address, and return the session of the frame that the viewer is drawn in."""
    browser.open("about:blank", width, height)
    browser.frames.clear()
    browser.events.clear()
    browser.open(address, width, height)

    def frame():
        for session in [*browser.frames.values(), browser.page]:
            if browser.evaluate_if_there("document.body.dataset.drawn", session):
                return session
        return None

    return browser.wait(frame, 180)


def act(browser, frame, script):
    """Run a script in the viewer and wait for the picture that follows."""
    before = browser.evaluate("Number(document.body.dataset.drawn)", frame)
    browser.evaluate(f"{{ {script} }}", frame)
    browser.wait(lambda: browser.evaluate("Number(document.body.dataset.drawn)", frame) > before)


def picture(browser, frame, canvas):
    """Return what a canvas shows, as a PNG in text."""
    return browser.evaluate(f"document.getElementById('{canvas}').toDataURL()", frame)


def choose(browser, frame, quantity):
    act(
        browser,
        frame,
        f"const s = document.getElementById('quantity'); s.value = '{quantity}'; s.dispatchEvent(new Event('change'))",
    )


def test_the_deep_link_shows_the_maps_within_mlflow(browser, tmp_path):
    run_dir = tmp_path / "emoe" / "seed0-fold0"
    with Tracker(run_dir, out=tmp_path, run_name="fold0", strict=True) as tracker:
        folder = write_map_folder(run_dir / "expert_maps", verdict=UNSTABLE)
        write_viewer(folder)
        record_maps(tracker, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serve(tmp_path, port, wait_s=300) as base:
        frame = drawn(browser, run_links(tmp_path, base)["emoe/seed0-fold0 expert maps"], 1280, 900)
        assert frame != browser.page  # MLflow's sandbox: an origin of its own
        assert "Unstable, do not interpret." in browser.evaluate("document.querySelector('.verdict').innerText", frame)
        choose(browser, frame, "occupancy-expert")
        seen = {name: [picture(browser, frame, name)] for name in ("axial", "coronal", "sagittal", "head")}
        act(browser, frame, "document.querySelector('input[value=E03]').click()")
        for name, found in seen.items():
            assert picture(browser, frame, name) != found[0], f"{name} is the same for another expert"
        values_are_those_of_the_files(browser, frame, folder)
    requests = browser.requests()
    assert any("viewer.html" in address for address in requests)
    assert [r for r in requests if not r.startswith((base, "data:", "blob:" + base, "about:"))] == []
    # MLflow asks itself who the user is, and answers that it does not know
    assert [text for text in browser.complaints() if "/ajax-api/2.0/mlflow/users/current" not in text] == []


def values_are_those_of_the_files(browser, frame, folder):
    """The crosshair's place and value, for the planted cell and others, against nibabel's reading of the file."""
    entries = json.loads((folder / "maps.json").read_text())["maps"]
    for quantity, expert, place in LOOKED_AT:
        (file,) = (e["file"] for e in entries if (e["quantity"], e["expert"]) == (quantity, expert))
        image = nibabel.load(folder / file)
        voxel = np.linalg.inv(image.affine) @ [*place, 1]
        wanted = image.get_fdata()[tuple(np.rint(voxel[:3]).astype(int))]
        choose(browser, frame, f"{quantity}-expert")
        act(
            browser,
            frame,
            f"document.querySelector('input[value={expert}]').checked || "
            f"document.querySelector('input[value={expert}]').click(); moveTo({list(place)})",
        )
        shown = browser.evaluate("['x', 'y', 'z'].map((id) => Number(document.getElementById(id).value))", frame)
        assert shown == list(place)
        assert float(browser.evaluate("document.getElementById('value').dataset.value", frame)) == pytest.approx(
            wanted, abs=1e-3
        )


@pytest.mark.parametrize(("width", "height"), [(600, 800), (1600, 950)])
def test_keyboard_table_and_layout(browser, page, width, height):
    frame = drawn(browser, page, width, height)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth", frame)
    # arrow keys of a focused slice move the crosshair by a voxel, with page up the slice
    act(browser, frame, "moveTo([0, 0, 0])")
    browser.evaluate("document.getElementById('coronal').focus()", frame)
    for key in ("ArrowRight", "ArrowUp", "PageUp"):
        browser.key(key, frame)
    browser.wait(lambda: browser.evaluate("state.at.join()", frame) == "2,2,2")
    # a parcel's name leads to its peak, and the crosshair marks the parcel's row
    choose(browser, frame, "contribution-expert")
    act(browser, frame, f"document.querySelector('input[value={PLANTED['expert']}]').click()")
    find = "[...document.querySelectorAll('#parcels td button')].find((b) => b.textContent === 'Right hippocampus')"
    act(browser, frame, f"{find}.click()")
    assert np.abs(np.subtract(browser.evaluate("state.at", frame), PLANTED["place"])).max() <= 8
    assert browser.evaluate("document.querySelector('tr.here button').textContent", frame) == "Right hippocampus"
    act(browser, frame, "moveTo([-20, 60, 10])")
    assert browser.evaluate("document.querySelector('tr.here button').textContent", frame) == "Frontal"
    # the table sorts by a click on its head, and back
    names = "[...document.querySelectorAll('#parcels td:first-child')].map((cell) => cell.textContent)"
    browser.evaluate("document.querySelector('#parcels th button').click()", frame)
    assert browser.evaluate(names, frame) == sorted(browser.evaluate(names, frame), key=str.lower)
    browser.evaluate("document.querySelector('#parcels th button').click()", frame)
    assert browser.evaluate(names, frame) == sorted(browser.evaluate(names, frame), key=str.lower, reverse=True)
    # every control has a name for whoever does not see it
    assert browser.evaluate(f"{UNNAMED}.map((e) => e.id)", frame) == []
    assert browser.complaints() == []


def test_left_of_the_head_is_left_in_the_picture(browser, page):
    """The planted cell lies on the right: it is red where the picture's right is, as the mark says."""
    frame = drawn(browser, page, 1000, 800)
    choose(browser, frame, "contribution-expert")
    act(
        browser,
        frame,
        f"document.querySelector('input[value={PLANTED['expert']}]').click(); "
        f"state.threshold = 1; moveTo([0, {PLANTED['place'][1]}, {PLANTED['place'][2]}])",
    )
    left, right, count = browser.evaluate(RED, frame)
    assert 0.5 < left < right < 1
    assert count > 1000

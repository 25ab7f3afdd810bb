"""A folder of maps holds the maps of one call."""

from map_folder import write_map_folder

from emoe_med.brainage.maps.write import clear


def test_maps_made_before_are_gone_and_files_of_others_stay(tmp_path):
    folder = write_map_folder(tmp_path / "expert_maps")
    (folder / "viewer.html").write_text("of before")
    (folder / "notes.txt").write_text("mine")
    assert len(list(folder.iterdir())) > 20
    clear(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    clear(tmp_path / "new" / "expert_maps")
    assert not list((tmp_path / "new" / "expert_maps").iterdir())

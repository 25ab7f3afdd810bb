"""Files that are written whole or not at all."""

import pytest
from small_disk import small_disk

from emoe_med.errors import StorageError
from emoe_med.storage import replace_file


def test_replacing_a_file_leaves_the_old_one_if_it_fails(tmp_path):
    with small_disk(tmp_path / "disk", 64) as disk:
        replace_file(disk / "a", b"old")
        with pytest.raises(StorageError, match="No space left"):
            replace_file(disk / "a", b"x" * 200_000)
        assert [path.name for path in disk.iterdir()] == ["a"]
        assert (disk / "a").read_bytes() == b"old"

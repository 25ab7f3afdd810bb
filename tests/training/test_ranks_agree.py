"""What one rank meets, every rank ends with: the same error, told once."""

import json
import os
import socket
from dataclasses import replace

import pytest
import torch
from toy_task import Line, ToyOptions

from emoe_med.errors import ConfigError, DataError, Fault, Interrupted, StorageError, VolumeError
from emoe_med.training.loop import fit
from emoe_med.training.ranks import ALONE, Machine, joined
from emoe_med.training.tracking import Tracker

FAULTS = (Fault("VOL-CRC", "damaged", "a.nii", 7, hint="copy it"), Fault("VOL-DIM", "flat", row=8))


class Damaged(Line):
    """Sample 5 of the training data cannot be read."""

    class Data:
        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            if index == 5:
                raise VolumeError(Fault("VOL-CRC", "damaged", "b.nii", 9))
            return self.data[index]

    def __init__(self):
        super().__init__()
        self.train_data = self.Data(self.train_data)


def met(call) -> list:
    """What a call raises, as JSON: kind, exit code, fault lines, whether another rank tells it."""
    try:
        call()
    except (DataError, StorageError, ConfigError, Interrupted) as error:
        return [type(error).__name__, error.exit_code, [str(fault) for fault in error.faults], error.told]
    return []


def _rank(rank, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)

    def block(machine, *errors):
        with machine.together():
            if errors[machine.rank] is not None:
                raise errors[machine.rank]

    def train():
        with Tracker(folder / "run", uri="none", strict=True) as tracker:
            fit(Damaged(), replace(ToyOptions(), ema_decay=None, batch_size=2), folder / "run", tracker)

    with joined() as machine:
        assert (machine.rank, machine.world_size, machine.first) == (rank, 2, rank == 0)
        with joined() as again:
            assert again is machine
        found = {
            "none": met(lambda: block(machine, None, None)),
            "second": met(lambda: block(machine, None, VolumeError(*FAULTS))),
            "first": met(lambda: block(machine, StorageError(Fault("STORE-WRITE", "full")), None)),
            "both": met(lambda: block(machine, ConfigError(Fault("A", "0")), StorageError(Fault("A", "1")))),
            "stop": met(lambda: block(machine, None, Interrupted(143, Fault("RUN-STOPPED", "stop")))),
            "gather": machine.gather([rank, "ä", None]),
            "fit": met(train),
        }
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.timeout(600)
def test_two_ranks_end_with_one_error(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (tmp_path, port), nprocs=2)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    lines = [str(fault) for fault in FAULTS]
    assert one["none"] == two["none"] == []
    assert one["second"] == ["VolumeError", 3, lines, True]
    assert two["second"] == ["VolumeError", 3, lines, False]
    assert one["first"] == ["StorageError", 6, ["error STORE-WRITE  full"], False]
    assert two["first"] == ["StorageError", 6, ["error STORE-WRITE  full"], True]
    assert one["both"] == ["ConfigError", 2, ["error A  0"], False]
    assert two["both"] == ["ConfigError", 2, ["error A  0"], True]
    assert one["stop"][:2] == two["stop"][:2] == ["Interrupted", 143]
    assert one["gather"] == two["gather"] == [[0, "ä", None], [1, "ä", None]]
    assert one["fit"][:3] == two["fit"][:3] == ["VolumeError", 3, ["error VOL-CRC  row 9  b.nii  damaged"]]
    assert {one["fit"][3], two["fit"][3]} == {True, False}  # one of them read it, and one of them says it


def test_one_process_agrees_with_itself():
    ALONE.agree(None)
    with pytest.raises(VolumeError, match="damaged"), ALONE.together():
        raise VolumeError(*FAULTS)
    with joined() as machine:
        assert machine == Machine(machine.device)

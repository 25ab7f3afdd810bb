import torch

from emoe_med.data.memory import Held


class Counted(torch.utils.data.Dataset):
    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.reads += 1
        return {"image": torch.full((10,), float(index)), "row": index}


def test_reads_once_if_all_fits_else_each_time():
    for limit, reads in ((4 * 40, 4), (4 * 40 - 1, 12)):
        data = Counted()
        held = Held(data, limit_bytes=limit)
        for _ in range(3):
            for index in range(len(held)):
                assert held[index]["image"].tolist() == [float(index)] * 10
        assert data.reads == reads


def test_a_sample_can_be_extended_without_a_trace():
    held = Held(Counted())
    held[0]["more"] = 1
    assert set(held[0]) == {"image", "row"}

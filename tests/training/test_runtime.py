import json
import os
import random
import signal

import numpy as np
import pytest
import torch
import typer

from emoe_med.errors import OutOfMemoryError
from emoe_med.training.cli import verb
from emoe_med.training.ranks import Machine
from emoe_med.training.runtime import (
    StopSignal,
    memory_told,
    prepared,
    random_state,
    seed_everything,
    seed_rank,
    set_random_state,
)

CPU = torch.device("cpu")


def draw():
    return (
        torch.rand(3).tolist(),
        torch.nn.functional.dropout(torch.ones(50)).tolist(),
        np.random.rand(3).tolist(),
        np.random.standard_normal(),  # the second of a pair is cached inside the state
        random.random(),
        random.gauss(0, 1),
    )


def test_random_state_goes_through_json_and_back():
    seed_everything(3)
    draw()
    kept = json.loads(json.dumps(random_state(CPU)))
    expected = [draw(), draw()]
    set_random_state(kept, CPU)
    assert [draw(), draw()] == expected


def test_seeds_repeat_and_ranks_differ():
    draws = []
    for seed, rank in ((1, 0), (1, 0), (1, 1), (2, 0)):
        seed_rank(seed, rank)
        draws.append(draw())
    assert draws[0] == draws[1]
    assert len({str(numbers) for numbers in draws}) == 3


def test_flags_and_threads_are_put_back():
    before = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads())
    with prepared(seed=1, deterministic=not before[0], threads=before[1] + 1) as machine:
        assert machine == Machine(machine.device)
        assert torch.are_deterministic_algorithms_enabled() is not before[0]
        assert torch.get_num_threads() == before[1] + 1
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_remembered_and_nothing_else(number, code):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert stop.code == 0
        os.kill(os.getpid(), number)
        assert stop.code == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_the_second_sigint_is_the_system_s():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.code == 143  # the cluster's word counts


def test_exhausted_host_memory_is_code_7_with_the_numbers():
    with pytest.raises(OutOfMemoryError) as caught, memory_told(CPU, lambda: "batch_size 8"):
        torch.empty(2**60, dtype=torch.uint8)
    assert caught.value.exit_code == 7
    assert caught.value.faults[0].code == "MEM-HOST"
    assert "host memory exhausted: batch_size 8; peak " in str(caught.value)
    assert "GiB of host memory; lower batch_size" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "MEM-DEVICE"),
        (MemoryError(), "MEM-HOST"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "MEM-WORKER"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "MEM-WORKER"),
    ],
)
def test_ends_of_memory_are_told_apart(error, code):
    with pytest.raises(OutOfMemoryError) as caught, memory_told(CPU, str):
        raise error
    assert caught.value.faults[0].code == code


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory_told(CPU, str):
        raise RuntimeError("shapes cannot be multiplied")


def test_one_process_sums_over_itself():
    machine = Machine(CPU)
    assert machine.first
    assert machine.any(0, True, 3) == [False, True, True]
    assert machine.gather({"a": [1]}) == [{"a": [1]}]
    assert machine.total(torch.tensor([1.5, 2.0])).tolist() == [1.5, 2.0]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")])
def test_exhausted_memory_ends_any_verb_with_code_7(error, capsys):
    @verb
    def command():
        raise error

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == 7
    assert "MEM-VERB" in capsys.readouterr().err


def test_other_errors_of_torch_stay_what_they_are():
    @verb
    def command():
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        command()

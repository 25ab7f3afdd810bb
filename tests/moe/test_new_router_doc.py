"""The worked example of docs/new_router.md is a router like any other."""

import re
from pathlib import Path

import pytest
import torch
from checks import CHECKS, build

from emoe_med import moe
from emoe_med.config import MoEConfig, read_yaml

DOC = (Path(__file__).parents[2] / "docs" / "new_router.md").read_text()


@pytest.fixture
def example(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.S)
    names = {"__name__": "emoe_med.moe.routers.prototype"}
    exec(compile(code, "prototype.py", "exec", dont_inherit=True), names)
    (line,) = re.findall(r'^ +"(\w+)": \((\w+), (\w+)\),$', DOC, flags=re.M)
    monkeypatch.setitem(moe.ROUTERS, line[0], (names[line[1]], names[line[2]]))
    return names[line[1]], names[line[2]]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_example_conforms(check, example):
    router, options = example
    check(build(router, options()))


def test_the_run_file_of_the_example_is_read(example, tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", DOC, flags=re.S)
    (tmp_path / "run.yaml").write_text(text)
    section = read_yaml(tmp_path / "run.yaml")["model"]["moe"]
    assert MoEConfig(**section).router == {"kind": "prototype", "temperature": 0.2, "balance": "bias"}
    with pytest.raises(ValueError, match="prototype has no option heat"):
        MoEConfig(after_block=1, router={"kind": "prototype", "heat": 1})


def test_the_example_evens_out_its_load(example):
    router, options = example
    layer = build(router, options()).train()
    for _ in range(300):
        layer(torch.randn(4, 100, 16) + 1)
        layer.after_step()
    assert moe.load_statistics(layer(torch.randn(4, 500, 16) + 1)[1].load())["cv"] < 0.2

"""What the README shows must run."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {}
    exec(example, names)
    assert names["loss"].isfinite()


def test_every_command_shown_exists():
    from typer.testing import CliRunner

    from emoe_med.brainage.__main__ import app as brainage
    from emoe_med.vision.__main__ import app as vision

    patterns = {brainage: r"emoe_med\.brainage (\w+(?: (?:bids|glob|ukb))?)", vision: r"emoe_med\.vision ([\w-]+)"}
    for app, verbs in patterns.items():
        for verb in set(re.findall(verbs, README)):
            assert CliRunner().invoke(app, [*verb.split(), "--help"]).exit_code == 0, verb


def test_linked_files_are_there():
    here = Path(__file__).parent.parent
    for target in re.findall(r'\]\(([^)#:]+)\)|src="([^"]+)"', README):
        target = "".join(target)
        assert (here / target).exists(), target

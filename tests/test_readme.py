"""What the README shows must run."""

import re
from pathlib import Path

SHOWN = ("emoe_med/**/*.py", "configs/**/*.yaml", "docs/*.md", "data_manifests/*.md", "*.md")
README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {}
    exec(example, names)
    assert names["loss"].isfinite()


def test_every_command_shown_anywhere_exists():
    from typer.testing import CliRunner

    from emoe_med.brainage.__main__ import app as brainage
    from emoe_med.vision.__main__ import app as vision

    here = Path(__file__).parent.parent
    pages = [README, *(path.read_text() for pattern in SHOWN for path in here.glob(pattern))]
    shown = {found for page in pages for found in re.findall(r"python -m emoe_med\.([\w.]+)((?: [a-z][a-z-]*)*)", page)}
    assert len(shown) > 20
    apps = {"brainage": brainage, "vision": vision}
    for module, verbs in shown:
        known = [app for app in [apps.get(module)] if app]
        assert known, f"python -m emoe_med.{module} is no command"
        verb = verbs.split()[: 2 if verbs.startswith(" manifest") else 1]
        assert CliRunner().invoke(known[0], [*verb, "--help"]).exit_code == 0, (module, verb)


def test_linked_files_are_there():
    here = Path(__file__).parent.parent
    for target in re.findall(r'\]\(([^)#:]+)\)|src="([^"]+)"', README):
        target = "".join(target)
        assert (here / target).exists(), target

"""What the README shows must run."""

import re
from fnmatch import fnmatch
from pathlib import Path

from fenced import BY_HAND, ELSEWHERE, PAGES, RECORDS, RUN_WHOLE, commands, is_left_to_others

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
    from emoe_med.pipeline.__main__ import app as pipeline
    from emoe_med.vision.__main__ import app as vision

    here = Path(__file__).parent.parent
    pages = [README, *(path.read_text() for pattern in SHOWN for path in here.glob(pattern))]
    shown = {found for page in pages for found in re.findall(r"python -m emoe_med\.([\w.]+)((?: [a-z][a-z-]*)*)", page)}
    assert len(shown) > 20
    apps = {"brainage": brainage, "pipeline": pipeline, "vision": vision}
    for module, verbs in shown:
        known = [app for app in [apps.get(module)] if app]
        assert known, f"python -m emoe_med.{module} is no command"
        verb = verbs.split()[: 2 if verbs.startswith(" manifest") else 1]
        assert CliRunner().invoke(known[0], [*verb, "--help"]).exit_code == 0, (module, verb)


def test_every_option_shown_anywhere_exists():
    import typer

    from emoe_med.brainage.__main__ import app as brainage
    from emoe_med.pipeline.__main__ import app as pipeline
    from emoe_med.vision.__main__ import app as vision

    here = Path(__file__).parent.parent
    apps = {"brainage": brainage, "pipeline": pipeline, "vision": vision}
    pages = [path.read_text() for pattern in SHOWN for path in here.glob(pattern)]
    shown = {found for page in pages for found in re.findall(r"python -m emoe_med\.(\w+) ([^`\n#]+)", page)}
    checked = 0
    for module, rest in shown:
        words = rest.split()
        command = typer.main.get_command(apps[module])
        while getattr(command, "commands", None) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        for option in re.findall(r"(?<!\S)--[a-z-]+", " ".join(words)):
            assert option in known, (module, rest)
            checked += 1
    assert checked > 50


def test_linked_files_are_there():
    here = Path(__file__).parent.parent
    for target in re.findall(r'\]\(([^)#:]+)\)|src="([^"]+)"', README):
        target = "".join(target)
        assert (here / target).exists(), target


def test_tests_that_a_page_names_are_there():
    here = Path(__file__).parent.parent
    pages = [path.read_text() for pattern in SHOWN for path in here.glob(pattern)]
    named = {
        found
        for page in pages
        for found in re.findall(r"`((?:tests|benchmarks|pipelines)/[\w/]+(?:\.py|\.yaml|/))`", page)
    }
    assert len(named) > 20
    assert not [name for name in sorted(named) if not (here / name).exists()]


def test_every_command_of_every_page_is_run_somewhere():
    shown = [(page, line) for page in PAGES for line in commands(page)]
    assert len(shown) > 50
    known = (*RUN_WHOLE, *RECORDS)
    assert not [(page, line) for page, line in shown if page not in known and not is_left_to_others(line)]
    for pattern in (*ELSEWHERE, *BY_HAND):
        assert any(fnmatch(line, pattern) for _, line in shown), f"nothing shows {pattern} any more"
    assert all((Path(__file__).parent / test).is_file() for test in ELSEWHERE.values())

"""The commands that the pages show, and which test runs each of them."""

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])
COMMAND = re.compile(r"(python|make|pip|torchrun)\s")

# run from top to bottom by `make docs-check`, but for what stands below
RUN_WHOLE = (
    "README.md",
    "docs/expert_maps.md",
    "docs/export.md",
    "docs/own_cohort.md",
    "docs/pipelines.md",
    "docs/preprocessing.md",
    "docs/quick_start.md",
    "docs/scale.md",
)
# command: the test that runs its like
ELSEWHERE = {
    "*maps * --atlas *": "brainage/maps/test_maps_cli.py",
    "*brainage manifest * DIR *": "brainage/test_build_manifest.py",
    "*brainage ui *": "training/test_ui.py",
    "*vision ui *": "training/test_ui.py",
    "*monai.bundle *": "brainage/test_export.py",
    "*import-weights *": "models/test_weights.py",
    "*--dataset cifar10 *": "vision/test_vision_cli.py",
    "*--dataset imagenet *": "vision/test_vision_cli.py",
    "*--submit slurm *": "pipeline/test_pipeline_cli.py",
    "*torchrun *": "brainage/test_torchrun.py",
    "*paper_brainage.yaml *": "pipeline/test_shipped.py",
    "*pipeline compare *": "pipeline/test_pipeline_cli.py",
    "*comparison_ixi.yaml *--jobs *": "pipeline/test_shipped.py",
    "*ukb_mine.csv*": "brainage/test_ukb_zips.py",
    "*--manifest my.csv*": "brainage/test_check.py",
}
# studies of hours, told with their commands; what these are called is still checked
RECORDS = ("docs/results.md",)
# sets up a machine, or makes the figures of its page in hours
BY_HAND = (
    *("make demo*", "make test*", "make preprocess-extra*", "pip install *"),
    *("*benchmarks/preprocess*", "*benchmarks/cost.py*", "*IXI*", "*prepared* --out full", "*--run full/*"),
)


def commands(page):
    """Return the commands of a page's blocks, without comments, lines that go on joined."""
    found = []
    for language, block in re.findall(r"```(\w*)\n(.*?)```", (ROOT / page).read_text(), flags=re.S):
        if language in ("", "bash"):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [line.split(" #")[0].strip() for line in lines if not line.startswith("#")]
    return [line for line in found if COMMAND.search(line)]


def is_left_to_others(line):
    """Whether another test runs the like of a command, or a person does."""
    return any(fnmatch(line, pattern) for pattern in (*ELSEWHERE, *BY_HAND))

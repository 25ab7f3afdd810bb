"""Score a run: predictions of held-out persons, bias correction beside them, and what the routing is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import Subset

from emoe_med.brainage.bias import AgeBias, Method, fit_age_bias
from emoe_med.brainage.cohort import Cohort, prepare_cohort
from emoe_med.brainage.comparison import paired_difference
from emoe_med.brainage.conformal import Interval, fit_interval, with_coverage
from emoe_med.brainage.inference import SEEN, TrainedModel, predict_scans
from emoe_med.brainage.metrics import Bootstrap, evaluate
from emoe_med.brainage.prepared import prepared_like
from emoe_med.brainage.report import write_report
from emoe_med.brainage.shared import write_shared_metrics
from emoe_med.brainage.strata import first_sessions
from emoe_med.data.contract import contract_digest
from emoe_med.data.manifest import Manifest
from emoe_med.errors import DataError, Fault
from emoe_med.models.deep_moe import DeepMoE
from emoe_med.models.single_gated import SingleGated
from emoe_med.storage import replace_file
from emoe_med.training.amend import amend
from emoe_med.training.channel_report import describe_channels
from emoe_med.training.gate_report import describe_gate
from emoe_med.training.progress import counted
from emoe_med.training.routing_report import describe_routing


def evaluate_run(run_dir: Path, cohort: Cohort, splits: pd.DataFrame) -> dict[str, Any]:
    """Predict validation and test persons once and write predictions/ and metrics.json.

    Bias correction and prediction interval are fitted on the validation persons and applied to the test persons.
    What the network finds usual is learned from training and validation persons, and kept in the checkpoint.

    Args:
        run_dir: Run folder with a trained checkpoint.
        cohort: Scans in the model's space.
        splits: Columns row and split, in the order of the cohort's scans.

    Returns:
        The content of metrics.json.
    """
    model = TrainedModel.load(run_dir)
    where = {name: np.flatnonzero(splits["split"] == name).tolist() for name in ("train", "val", "test")}
    table = cohort.table()
    _find_familiar(model, cohort, where)
    tables = {
        name: predict_scans(model, cohort.heads, where[name], own=True).merge(table, on="row")
        for name in ("val", "test")
    }
    metrics = _score(tables, model)
    bootstrap = Bootstrap(model.config.evaluation.bootstrap)
    if isinstance(model.net.net, SingleGated):
        metrics |= gate_report(model, model.net.net, cohort, where["test"], bootstrap)
    if model.net.routed_layers():
        metrics["routing"] = routing_report(model, cohort, where["test"], bootstrap)
    if isinstance(model.net.net, DeepMoE):
        metrics["channels"] = channel_report(model, model.net.net, cohort, where["test"], bootstrap)
    write_predictions(run_dir / "predictions", tables)
    write_metrics(run_dir, metrics)
    return metrics


def _find_familiar(model: TrainedModel, cohort: Cohort, where: dict[str, list[int]]) -> None:
    """Learn what the network finds usual, from one scan of each held-out person, and keep it in the checkpoint."""
    scans = cohort.table().assign(age=[scan.age for scan in cohort.manifest.scans])
    model.find_familiar(cohort.heads, where["train"], first_sessions(scans.iloc[where["val"]]).index.tolist())
    if model.familiarity is not None and model.folder is not None:
        amend(model.folder, {"familiarity": model.familiarity.to_json()})


def _score(tables: dict[str, pd.DataFrame], model: TrainedModel, method: Method = "beheshti") -> dict[str, Any]:
    """Fit bias and interval on `val`, add brain_pad, corrected age and ends to the tables, and score `test`."""
    bias, interval = fitted_bias(tables["val"], method), fit_interval(tables["val"])
    for name, table in tables.items():
        tables[name] = with_correction(table, bias).assign(**interval.ends(table) if interval else {})
    metrics = evaluate(
        tables["test"],
        model.contract["training_ages"]["median"],
        val=tables["val"],
        bias=bias,
        bootstrap=Bootstrap(model.config.evaluation.bootstrap),
    )
    metrics = with_coverage(metrics, tables["test"], interval)
    chain = model.contract["chain"]
    data = {"used": f"the {chain['mask']} alone" if chain["mask"] == "brain" else "the whole head, unaligned"}
    if steps := model.contract.get("strip", {}).get("prepared"):
        data["preprocessed"] = (
            f"{steps['Path']} path; skull strip {steps['SkullStrip']}; bias field {steps['BiasField']}"
        )
    about = {"synthetic": model.contract["synthetic"], "contract": contract_digest(model.contract)}
    verdicts = tables["test"]["status"].value_counts().to_dict()
    return metrics | about | {"data": data | {"space": chain["space"]}, "verdicts": verdicts}


def score_again(run_dir: Path, method: Method = "beheshti") -> dict[str, Any]:
    """Make metrics.json, corrected ages and report anew from the predictions of a run; no scan is touched.

    Raises:
        CheckpointError: The run has no usable checkpoint.
        DataError: The run was not finished, or ``method`` cannot correct it.
    """
    model = TrainedModel.load(run_dir)
    tables = {name: read_predictions(run_dir, name) for name in ("val", "test")}
    path = run_dir / "metrics.json"
    if not path.is_file():
        hint = "finish the run by `train --resume`"
        raise DataError(Fault("RUN-METRICS", "this run was not evaluated to its end", str(path), hint=hint))
    metrics = _score(tables, model, method)
    before = json.loads(path.read_text())
    metrics |= {name: before[name] for name in ("routing", "channels", "early_exit") if name in before}
    write_predictions(run_dir / "predictions", tables)
    write_metrics(run_dir, metrics)
    write_reports(run_dir)
    return metrics


def write_reports(run_dir: Path) -> tuple[Path, Path]:
    """Write the report of an evaluated run, and return the page and the figures of it that may be shared."""
    write_report(run_dir)
    return write_report(run_dir, shared=True), write_shared_metrics(run_dir)


def evaluate_elsewhere(
    run_dir: Path, manifest: Manifest, cache_dir: Path, jobs: int = 0, method: Method = "beheshti"
) -> tuple[dict[str, Any], Path]:
    """Score a run on the scans of another manifest, under `<run>/evaluations/<digest of the manifest>/`.

    The bias correction is the one fitted on the run's own validation persons.

    Raises:
        CheckpointError: The run has no usable checkpoint.
        DataError: Scans cannot be used, or the run was trained or selected on them: each such row. Other scans
            of a training person are found only by the eye. Or ``method`` cannot correct the run.
    """
    model = TrainedModel.load(run_dir)
    scans, unusable = prepared_like(model.contract, manifest.scans, cache_dir, jobs)
    if unusable:
        raise DataError(*(replace(fault, manifest=manifest.path.name) for fault in unusable))
    manifest = replace(manifest, scans=tuple(scans))
    cohort = prepare_cohort(manifest, model.chain(), cache_dir, jobs, counted("reading scans"))
    faults = [
        Fault("EVAL-SEEN", SEEN, str(scan.image), scan.row, manifest.path.name)
        for scan, reading in zip(manifest.scans, cohort.readings, strict=True)
        if not model.seen.isdisjoint((reading.content, reading.voxels))
    ]
    if faults:
        raise DataError(*faults)
    found = predict_scans(model, cohort.heads, range(len(manifest.scans)), progress=counted("predicting"))
    tables = {"test": found.merge(cohort.table(), on="row"), "val": read_predictions(run_dir, "val")}
    metrics = _score(tables, model, method)
    folder = run_dir / "evaluations" / manifest.sha256[:16]
    write_predictions(folder, {"test": tables["test"]})
    write_metrics(folder, metrics)
    return metrics, folder / "metrics.json"


def read_predictions(run_dir: Path, name: str) -> pd.DataFrame:
    """Read predictions/<name>.csv of a run.

    Raises:
        DataError: There is none.
    """
    path = run_dir / "predictions" / f"{name}.csv"
    if not path.is_file():
        raise DataError(Fault("RUN-PREDICTIONS", "this run has no such predictions", str(path)))
    # a site that is a number is a name all the same
    table = pd.read_csv(path, dtype=dict.fromkeys(("sex", "site", "status", "reason"), "str"))
    return table.rename(columns={"person": "participant_id"})


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())


def fitted_bias(val: pd.DataFrame, method: Method) -> AgeBias | None:
    """Fit the age bias on validation persons; None where they are too few or of one age.

    Raises:
        DataError: The slope of prediction on age does not permit ``cole`` (BIAS-SLOPE).
    """
    try:
        return fit_age_bias(val["age"], val["predicted_age"], val["participant_id"], method)
    except DataError as error:
        if error.faults[0].code != "BIAS-FIT":
            raise
        return None


def saved_bias(run_dir: Path) -> AgeBias | None:
    """Return the age bias in the metrics.json of a run; None where there is none."""
    path = run_dir / "metrics.json"
    corrected = json.loads(path.read_text()).get("corrected") if path.is_file() else None
    return AgeBias(**corrected["bias"]) if corrected else None


def saved_interval(run_dir: Path) -> Interval | None:
    """Return the prediction interval in the metrics.json of a run; None where there is none."""
    path = run_dir / "metrics.json"
    found = json.loads(path.read_text()).get("interval") if path.is_file() else None
    return Interval(found["level"], found["half_width"], found["n"]) if found else None


def with_correction(frame: pd.DataFrame, bias: AgeBias | None) -> pd.DataFrame:
    """Add brain_pad (predicted minus chronological, years) and the corrected age, kept beside the raw one."""
    frame = frame.assign(brain_pad=frame["predicted_age"] - frame["age"])
    if bias is None:
        return frame
    corrected, in_range = bias.apply(frame["predicted_age"].to_numpy(), frame["age"].to_numpy())
    return frame.assign(predicted_age_corrected=corrected, corrected_in_range=in_range)


PREDICTION_COLUMNS = [
    *("row", "person", "age", "predicted_age", "brain_pad", "predicted_age_corrected", "corrected_in_range"),
    *("lower", "upper", "similarity", "ood_score", "ood_percentile", "sex", "site", "status", "reason"),
]


def write_predictions(folder: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Write predictions by manifest row; a person goes by the row of their first scan. No id, no path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table = table.rename(columns={"participant_id": "person"})
        columns = [column for column in PREDICTION_COLUMNS if column in table]
        text = table[columns].to_csv(index=False, float_format="%.4f")
        replace_file(folder / f"{name}.csv", text.encode())


def routing_report(model: TrainedModel, cohort: Cohort, indices: list[int], bootstrap: Bootstrap) -> dict[str, Any]:
    """Tell whether each routed layer is alive, and what it and its choices are worth, on given scans.

    `mae_without_branch` and `mae_permuted_routing` are gains in error, in years, over the network as it is; all
    of it on the volume as it is, whatever the run averages over.
    """
    return describe_routing(model.net.routed_layers(), *_judged(model, cohort, indices, bootstrap))


def channel_report(
    model: TrainedModel, net: DeepMoE, cohort: Cohort, indices: list[int], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Tell which channels are on and what the choice is worth, on given scans; as `routing_report`."""
    return describe_channels(net, *_judged(model, cohort, indices, bootstrap))


def gate_report(
    model: TrainedModel, whole: SingleGated, cohort: Cohort, indices: list[int], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Tell what gate, experts and early exit of a single-gated mixture are worth, on given scans.

    Errors are in years, of one scan a person, on the volume as it is, whatever the run averages over; `early_exit` has
    its curve in years, too.
    """
    table = cohort.table().assign(age=[scan.age for scan in cohort.manifest.scans])
    # mixed: a manifest may be sorted by age, and the experts of another one of the batch would follow it
    first = first_sessions(table.iloc[indices]).sample(frac=1, random_state=0)
    persons = first["participant_id"].to_numpy()
    counts = list(bootstrap.counts(persons))

    def score(errors: np.ndarray) -> dict[str, Any]:
        drawn = np.concatenate([part @ errors / part.sum(1) for part in counts])
        return bootstrap.estimate(float(errors.mean()), drawn, len(np.unique(persons)))

    routing, early_exit = describe_gate(
        whole,
        model.inputs(Subset(cohort.heads, first.index.tolist())),
        error=lambda output, batch: (model.net.head.predict(output).cpu() - batch["age"]).abs(),
        compare=lambda *pair: paired_difference(*pair, persons, bootstrap),
        score=score,
        metric="mae",
        autocast=model.autocast,
    )
    return {"routing": {"gate": routing}, "early_exit": early_exit}


def _judged(
    model: TrainedModel, cohort: Cohort, indices: list[int], bootstrap: Bootstrap
) -> tuple[Callable[[], np.ndarray], Callable[[np.ndarray, np.ndarray], dict[str, Any]], str]:
    """Return how errors on given scans are made and compared, and the name of their mean."""
    persons = cohort.table()["participant_id"].to_numpy()[indices]

    def errors() -> np.ndarray:
        found = predict_scans(model, cohort.heads, indices, average=False, own=True)
        return (found["predicted_age"] - found["age"]).abs().to_numpy()

    return errors, lambda changed, intact: paired_difference(changed, intact, persons, bootstrap), "mae"

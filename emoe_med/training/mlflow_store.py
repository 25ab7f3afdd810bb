"""MLflow as the outbox sees it: the few calls that a record needs, on a server or on a local file."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from emoe_med.training import outbox, store

PARAMS_PER_CALL = 100  # MLflow's own limit


class MlflowStore:
    """MLflow as `outbox.send` sees it, through its low-level client.

    Args:
        uri: As `store.tracking_uri` settled it.

    Raises:
        ModuleNotFoundError: mlflow is not installed.
    """

    def __init__(self, uri: str) -> None:
        os.environ.update(store.MLFLOW_ENVIRONMENT)
        from mlflow import entities
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._entities, self._error = entities, MlflowException
        self._database = store.database(uri) if uri.startswith("sqlite:") else None
        if self._database:
            _prepare_database(self._database)
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def experiment(self, name: str) -> str:
        """Return the id of an experiment, made if need be."""
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # without a location, a local store would write an absolute path of this machine into it
            location = f"mlflow-artifacts:/{name}" if self._database else None
            try:
                return self._client.create_experiment(name, artifact_location=location)
            except self._error:  # another process was quicker
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def run(self, experiment_id: str, name: str, start_time: int, tags: Mapping[str, str]) -> tuple[str, str]:
        """Return id and artifact address of the run with our key, made if need be.

        A call that timed out may have made it.
        """
        mine = f"tags.`{outbox.KEY_TAG}` = '{tags[outbox.KEY_TAG]}'"
        found = self._client.search_runs([experiment_id], mine, max_results=1)
        run = found[0] if found else self._client.create_run(experiment_id, start_time, dict(tags), name)
        return run.info.run_id, run.info.artifact_uri or ""

    def metrics(self, run_id: str, rows: list[tuple[str, float, int, int]]) -> None:
        """Send rows of (name, value, time, step)."""
        self._client.log_batch(run_id, metrics=[self._entities.Metric(*row) for row in rows])

    def params(self, run_id: str, values: Mapping[str, str]) -> None:
        """Send parameters."""
        params = [self._entities.Param(name, value) for name, value in values.items()]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])

    def tags(self, run_id: str, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._client.log_batch(run_id, tags=[self._entities.RunTag(name, value) for name, value in values.items()])

    def status(self, run_id: str, status: str, at: int) -> None:
        """Set the status; all but RUNNING end the run."""
        if status == "RUNNING":
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status=status, end_time=at)

    def artifact(self, run_id: str, artifact_uri: str, path: Path, folder: str) -> None:
        """Store a file under the run's `folder`."""
        location = urlsplit(artifact_uri)
        if self._database and location.scheme == "mlflow-artifacts":
            # no server is running: put the file where `store.serve` looks for it
            target = store.artifacts_folder(self._database) / location.path.lstrip("/") / folder
            target.mkdir(parents=True, exist_ok=True)
            temporary = target / f".tmp-{os.getpid()}"
            shutil.copyfile(path, temporary)
            os.replace(temporary, target / path.name)
        else:
            self._client.log_artifact(run_id, str(path), folder)

    def refused_for_good(self, error: Exception) -> bool:
        """Whether sending the same again can never succeed."""
        return isinstance(error, self._error) and error.error_code == "INVALID_PARAMETER_VALUE"


def _prepare_database(path: Path) -> None:
    """Make the local store if it is missing, whole or not at all.

    Processes that make it at the same time, or one that is killed half-way, would leave it unusable for good;
    and its default experiment would hold the working directory.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with outbox.only_one(path.parent):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder:
                made = Path(folder, path.name)
                SqlAlchemyStore(f"sqlite:///{made}", "mlflow-artifacts:/")._dispose_engine()
                os.replace(made, path)

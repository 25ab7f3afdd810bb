"""The record of a run: its journal first, and MLflow as a reader of it that may be slow, dead or missing."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from emoe_med.errors import ConfigError, Fault, Interrupted, StorageError
from emoe_med.storage import replace_file
from emoe_med.training import allow_list, outbox, store
from emoe_med.training.journal import Journal
from emoe_med.training.mlflow_store import MlflowStore
from emoe_med.training.pictures import Picture
from emoe_med.training.run_folder import claim

LOG = logging.getLogger("emoe_med")
LAST_WAIT_S = {"sqlite": 60.0, "http": 5.0, "https": 5.0}  # a local file gets there; a server may be dead


class Tracker:
    """Own a run folder and keep the record of its run; a context manager around all work on the run.

    Everything goes to `journal.jsonl` first. `flush` wakes a background thread that sends MLflow what it
    lacks; no failure there stops or slows the run, and `sync` sends the rest later, each line once. The run
    ends FINISHED, KILLED (signal) or FAILED as the `with` block ends. Only names and values of `allow_list`
    are taken. Ranks other than 0 record nothing.

    Args:
        run_dir: Folder of the run, made if need be.
        out: Folder of the default store `mlflow.db`; the run folder itself if not given.
        experiment: Experiment name.
        run_name: Shown name of the run.
        parent: Run folder of the parent run, whose tracker was entered before.
        uri: Tracking address, see `store.tracking_uri`; `none` for the journal alone.
        allow_remote: Permit a tracking host other than this machine.
        words: Texts that parameters and tags may hold, such as the literals of the configuration.
        strict: Raise on a name that is not allowed, instead of dropping it with a warning.

    Raises:
        ConfigError: Tracking address refused, or the folder is in use (on entering).
        StorageError: The folder cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        out: Path | None = None,
        experiment: str = "emoe_med",
        run_name: str = "run",
        parent: Path | None = None,
        uri: str | None = None,
        allow_remote: bool = False,
        words: Collection[str] = (),
        strict: bool = False,
    ) -> None:
        for label in (experiment, run_name):
            if allow_list.LABEL.fullmatch(label) is None:
                raise ConfigError(Fault("TRACK-NAME", f"{label!r} cannot name an experiment or a run"))
        self.run_dir = run_dir
        self.uri = store.tracking_uri(uri, out or run_dir, allow_remote)
        self.words = frozenset(words)
        self.strict = strict
        self._labels = {"experiment": experiment, "run_name": run_name}
        self._parent = parent
        self._active = os.environ.get("RANK", "0") == "0"
        self._warned: set[str] = set()
        self._sender = None
        if self._active and self.uri != store.NOWHERE:
            self._sender = outbox.Sender(run_dir, lambda: MlflowStore(self.uri), LAST_WAIT_S[urlsplit(self.uri).scheme])

    def __enter__(self) -> Self:
        if self._active:
            with ExitStack() as stack:
                stack.enter_context(claim(self.run_dir))
                self.journal = stack.enter_context(Journal(self.run_dir / "journal.jsonl"))
                outbox.settle_record(self.run_dir, self.uri, self._labels, self._parent)
                self.journal.write("status", status="RUNNING")
                self._owned = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self._active:
            return
        status = "FINISHED"
        if error is not None:
            status = "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"
        with self._owned:
            # with a full disk there is an error on its way already, which must not be replaced
            with suppress(*(() if error is None else (StorageError,))):
                self.journal.write("status", status=status)
                self.journal.sync()
            if self._sender is not None:
                self._sender.finish()

    @property
    def begun(self) -> bool:
        """Whether the journal holds a metric, of this or an earlier session."""
        return self._active and self.journal.begun

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of an optimiser step; what is recorded for it already stays."""
        if self._active:
            kept, refused = allow_list.numbers(values)
            self._refuse(refused)
            self.journal.metrics(step, kept)

    def results(self, values: Mapping[str, float]) -> None:
        """Record figures of the run as a whole, at a step after all others; made again they are another point."""
        if self._active:
            kept, refused = allow_list.numbers(values)
            self._refuse(refused)
            self.journal.results(kept)

    def params(self, values: Mapping[str, object]) -> None:
        """Record flat configuration values that are numbers, flags or known words; others stay here."""
        if self._active:
            kept, refused = allow_list.settings(values, self.words)
            self._refuse(refused)
            self.journal.params(kept)

    def tags(self, values: Mapping[str, object]) -> None:
        """Record tags: names of `allow_list.TAGS`; numbers, known words or digests."""
        if self._active:
            kept, refused = allow_list.labels(values, self.words)
            self._refuse(refused)
            self.journal.write("tags", values=kept)

    def note(self, kind: str, **fields: Any) -> None:
        """Write an event to the journal alone."""
        if self._active:
            self.journal.write(kind, **fields)

    def log_artifact(self, path: Path, folder: str, persons: float = 0) -> None:
        """Record a file of the run folder as an artifact `<folder>/<name>`; a map of a group tells its persons."""
        self._log_file(path, allow_list.may_leave(folder, path.name, persons), "artifact", folder=folder)

    def picture(self, step: int, picture: Picture) -> None:
        """Keep a picture in `pictures/` of the run folder, and record it for a slider over steps in MLflow."""
        if self._active:
            path = self.run_dir / "pictures" / f"{picture.key.replace('/', '-')}-{step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            replace_file(path, picture.png)
            allowed = allow_list.picture_may_leave(picture.key, picture.persons)
            self._log_file(path, allowed, "image", key=picture.key, step=step)

    def _log_file(self, path: Path, allowed: bool, kind: str, **fields: Any) -> None:
        if not self._active:
            return
        inside = path.resolve().relative_to(self.run_dir.resolve()).as_posix()
        if allowed:
            self.journal.write(kind, file=inside, **fields)
        else:
            self._refuse([f"{fields.get('folder') or fields['key']}/{path.name}"])

    def sync_to_disk(self) -> None:
        """Wait until the disk has the journal."""
        if self._active:
            self.journal.sync()

    def flush(self) -> None:
        """Let the background send what MLflow lacks; returns at once. Called once an epoch."""
        if self._sender is not None:
            self._sender.wake()

    def deep_link(self, artifact: str, base: str = "http://127.0.0.1:5000") -> str | None:
        """Return the address of an artifact in MLflow's pages, as `ui` serves them; None while it has no such run."""
        record = outbox.read_record(self.run_dir) if self._active else {}
        if record.get("run_id") is None:
            return None
        base = self.uri if self.uri.startswith("http") else base
        return store.deep_link(base, record["experiment_id"], record["run_id"], artifact)

    def _refuse(self, names: list[str]) -> None:
        if names and self.strict:
            raise ValueError(f"not on the allow-list of the record: {', '.join(names)}")
        for name in set(names) - self._warned:
            LOG.warning("not recorded, not on the allow-list: %s", name)
            self._warned.add(name)


def sync(run_dir: Path, uri: str | None = None, allow_remote: bool = False) -> int:
    """Send MLflow what it lacks of a run, each line once; returns the number of events sent.

    Args:
        run_dir: Folder with `journal.jsonl`.
        uri: Another tracking address, which then gets the whole record; else the one the run was made with.
        allow_remote: Permit a tracking host other than this machine.

    Raises:
        ConfigError: No record there, or MLflow did not take it.
    """
    if not (run_dir / "tracking.json").is_file():
        raise ConfigError(Fault("TRACK-RECORD", "no record of a run here", file=str(run_dir)))
    settled = store.tracking_uri(uri or outbox.read_record(run_dir)["uri"], run_dir, allow_remote)
    if settled == store.NOWHERE:
        return 0
    outbox.settle_record(run_dir, settled, {}, None)
    try:
        return outbox.send(MlflowStore(settled), run_dir)
    except ModuleNotFoundError as error:
        raise ConfigError(Fault("TRACK-MLFLOW", "mlflow is not installed")) from error
    except Exception as error:
        reason = "MLflow did not take the record: " + str(error).partition("\n")[0]
        raise ConfigError(Fault("TRACK-DOWN", reason, hint="start the server and sync again")) from error

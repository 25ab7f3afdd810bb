"""Where the record goes: the tracking address, the local MLflow store, and its server on loopback."""

from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from emoe_med.errors import ConfigError, Fault

NOWHERE = "none"  # journal only
# MLflow's own defaults: usage reports on, 7 retries with back-off (one call then blocks for minutes), 120 s
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def tracking_uri(uri: str | None, out: Path, allow_remote: bool = False) -> str:
    """Settle the tracking address: the one given, else MLFLOW_TRACKING_URI, else `<out>/mlflow.db`.

    Args:
        uri: `sqlite:///...`, an http(s) address, `none` for the journal alone, or None.
        out: Folder of the default store.
        allow_remote: Permit a host other than this one; only over https.

    Raises:
        ConfigError: A folder, a remote host without permission, a password in the address, or another scheme.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(out / 'mlflow.db').resolve()}"
    parts = urlsplit(uri)
    if uri == NOWHERE:
        return uri
    if parts.scheme == "sqlite" and parts.path.strip("/") not in ("", ":memory:"):
        return f"sqlite:///{database(uri).resolve()}"
    if parts.scheme in ("http", "https") and parts.hostname:
        if parts.username or parts.password:
            _refuse("user and password do not belong in it", "set MLFLOW_TRACKING_USERNAME and _PASSWORD")
        if not _loopback(parts.hostname):
            if not allow_remote:
                hint = "set tracking.allow_remote: true; for `sync` give --allow-remote"
                _refuse(f"{parts.hostname} is another machine", hint)
            if parts.scheme != "https":
                _refuse("another machine is reached over https only", "use https://")
        return uri.rstrip("/")
    if parts.scheme in ("", "file"):
        _refuse("MLflow keeps no runs in folders any more", "use sqlite:///<folder>/mlflow.db")
    return _refuse(f"scheme {parts.scheme} is not supported", "use sqlite:///<file> or https://<host>")


def _refuse(reason: str, hint: str) -> str:
    raise ConfigError(Fault("TRACK-URI", f"tracking address: {reason}", hint=hint))


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def database(uri: str) -> Path:
    """Return the file of a sqlite address."""
    return Path(uri.removeprefix("sqlite:///"))


def served_from(out: Path) -> Path:
    """Return the folder whose `ui` shows the runs of `out`: another one where a pipeline keeps one store for all."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return database(uri).parent if uri.startswith("sqlite:") else out


def artifacts_folder(database: Path) -> Path:
    """Return the folder beside a sqlite store that a server must be given as its artifact destination."""
    return database.parent / "mlartifacts"


def deep_link(base: str, experiment_id: str, run_id: str, artifact: str) -> str:
    """Return the address of an artifact in MLflow's pages; the query keeps a first visit on it."""
    page = f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{artifact}"
    return f"{base}/{page}?workflowType=machine_learning"


@contextmanager
def serve(out: Path, port: int = 5000, wait_s: float = 120) -> Generator[str]:
    """Run an MLflow server on loopback over the default store of a folder; yields its address.

    Args:
        out: Folder that holds `mlflow.db` and `mlartifacts`.
        port: TCP port on 127.0.0.1.
        wait_s: Longest wait for the first answer, in seconds.

    Raises:
        ConfigError: No store there, or the server did not start (port in use, for one).
    """
    if not (out / "mlflow.db").is_file():
        raise ConfigError(Fault("TRACK-STORE", "no mlflow.db here", str(out), hint="give the folder of the runs"))
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{(out / 'mlflow.db').resolve()}"]
    command += ["--artifacts-destination", str(artifacts_folder(out / "mlflow.db").resolve())]
    with tempfile.TemporaryFile() as output:
        server = subprocess.Popen(
            command,
            env={**os.environ, **MLFLOW_ENVIRONMENT},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            if not _answers(server, address, time.monotonic() + wait_s):
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines() or ["no answer"]
                raise ConfigError(Fault("TRACK-SERVER", f"MLflow server did not start: {lines[-1]}"))
            yield address
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _answers(server: subprocess.Popen[bytes], address: str, deadline: float) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes by a proxy
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(urllib.error.URLError, OSError), direct.open(f"{address}/health", timeout=2) as answer:
            return answer.status == 200
        time.sleep(0.2)
    return False

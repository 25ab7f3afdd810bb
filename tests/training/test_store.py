import pytest

from emoe_med.errors import ConfigError
from emoe_med.training.store import serve, served_from, tracking_uri


@pytest.fixture(autouse=True)
def no_address_in_the_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_default_is_a_database_in_the_folder_of_the_runs(tmp_path, monkeypatch):
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5001/")
    assert tracking_uri(None, tmp_path) == "http://localhost:5001"
    assert tracking_uri("none", tmp_path) == "none"


def test_runs_are_shown_where_their_store_lies(tmp_path, monkeypatch):
    runs = tmp_path / "runs" / "key"
    assert served_from(runs) == runs
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(None, tmp_path / "runs"))  # as a pipeline does
    assert served_from(runs) == tmp_path / "runs"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://example.org")
    assert served_from(runs) == runs


def test_a_relative_database_means_the_same_for_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("sqlite:///a/b.db", tmp_path) == f"sqlite:///{tmp_path}/a/b.db"


@pytest.mark.parametrize(
    "uri", ["http://localhost:5000", "http://127.0.0.1:1", "https://127.8.9.1", "http://[::1]:5000"]
)
def test_loopback_is_allowed(tmp_path, uri):
    assert tracking_uri(uri, tmp_path) == uri


@pytest.mark.parametrize(
    ("uri", "remote", "reason"),
    [
        ("http://tracking.example.org:5000", False, "tracking.example.org is another machine"),
        ("https://tracking.example.org", False, "set tracking.allow_remote: true"),
        ("http://tracking.example.org", True, "over https only"),
        ("http://localhost.example.org", False, "another machine"),
        ("http://127.0.0.1.example.org", False, "another machine"),
        ("http://0.0.0.0:5000", False, "another machine"),
        ("file:///runs", False, "no runs in folders any more; use sqlite:///<folder>/mlflow.db"),
        ("./mlruns", True, "no runs in folders any more"),
        ("mlruns", False, "no runs in folders any more"),
        ("sqlite://", False, "scheme sqlite is not supported"),
        ("sqlite:///:memory:", False, "scheme sqlite is not supported"),
        ("postgresql://db.example.org/mlflow", True, "scheme postgresql is not supported"),
        ("databricks", False, "no runs in folders"),
        ("http://", False, "scheme http is not supported"),
    ],
)
def test_other_addresses_are_refused_with_the_remedy(tmp_path, uri, remote, reason):
    with pytest.raises(ConfigError) as caught:
        tracking_uri(uri, tmp_path, allow_remote=remote)
    assert reason in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("uri", ["http://jane:s3cret@localhost:5000", "https://jane:s3cret@example.org"])
def test_a_password_is_refused_and_not_shown(tmp_path, uri):
    with pytest.raises(ConfigError) as caught:
        tracking_uri(uri, tmp_path, allow_remote=True)
    assert "MLFLOW_TRACKING_USERNAME" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "jane" not in str(caught.value)


def test_remote_with_permission(tmp_path):
    assert tracking_uri("https://tracking.example.org/", tmp_path, True) == "https://tracking.example.org"


def test_serving_needs_a_store(tmp_path):
    with pytest.raises(ConfigError, match=r"no mlflow\.db here"), serve(tmp_path):
        pass

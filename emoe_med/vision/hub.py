"""Published weights by name from the Hugging Face hub: the one place that fetches anything, and only when asked to."""

from __future__ import annotations

from pathlib import Path

from emoe_med.errors import CheckpointError, ConfigError, Fault

PREFIX = "hub:"
_WEIGHTS, _BESIDE = "model.safetensors", ("config.json", "preprocessor_config.json")


def fetch(name: str) -> Path:
    """Download the weights of `hub:<owner>/<name>[@revision]` with their constants; returns the file.

    The hub's own variables hold: `HF_HOME` (where files are kept), `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`.

    Raises:
        ConfigError: WGT-HUB, the extra is not installed, or the name is none.
        CheckpointError: WGT-HUB, the hub does not answer or has no such file.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        from huggingface_hub import hf_hub_download  # ty: ignore[import-not-found]
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError  # ty: ignore[import-not-found]
    except ImportError:
        hint = "pip install 'emoe-med[hub]', or download the file and name it"
        raise ConfigError(Fault("WGT-HUB", "huggingface_hub is not installed", name, hint=hint)) from None

    def download(file: str) -> Path:
        return Path(hf_hub_download(repository, file, revision=revision or None))

    try:
        weights = download(_WEIGHTS)
        for file in _BESIDE:  # timm has the one, Hugging Face the other
            try:
                download(file)
            except EntryNotFoundError:
                continue
    except HFValidationError as error:
        raise ConfigError(Fault("WGT-HUB", str(error).partition("\n")[0], name)) from error
    except Exception as error:  # its own, httpx's, the system's: what matters is that the file did not come
        reason = f"the hub gave no {_WEIGHTS} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        raise CheckpointError(Fault("WGT-HUB", reason, name, hint="check name and network, or name a file")) from error
    return weights

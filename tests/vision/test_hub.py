"""Weights by name: from a server that answers as the hub does, and in one line where there is none."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save

from emoe_med.models.vit import ViT, ViTOptions

INSTALLED = importlib.util.find_spec("huggingface_hub") is not None


def import_weights(name, output, **environment):
    command = [sys.executable, "-m", "emoe_med.vision", "import-weights", name, "-o", str(output)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.skipif(INSTALLED, reason="huggingface_hub is installed here")
def test_without_the_extra_one_line_says_what_to_install(tmp_path):
    done = import_weights("hub:timm/vit", tmp_path / "a.safetensors")
    assert done.returncode == 2
    assert "emoe-med[hub]" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def hub():
    torch.manual_seed(0)
    state = ViT(10, ViTOptions((16, 16), 4, 1, 12, 3, 2)).state_dict()
    constants = json.dumps({"pretrained_cfg": {"mean": [0.25], "std": [0.5]}}).encode()
    files = {
        "/some/vit/resolve/main/model.safetensors": save(dict(state)),
        "/some/vit/resolve/main/config.json": constants,
    }

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("X-Repo-Commit", "0" * 40)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound" if "/some/vit/" in self.path else "RepoNotFound")
            else:
                self.send_header("ETag", f'"{len(content)}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            return content

        def do_GET(self):
            self.wfile.write(self.do_HEAD() or b"")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(not INSTALLED, reason="huggingface_hub is not installed: pip install 'emoe-med[hub]'")
def test_weights_come_by_name_with_their_constants(tmp_path, hub):
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    output = tmp_path / "a.safetensors"
    done = import_weights("hub:some/vit", output, **environment)
    assert done.returncode == 0, done.stderr
    assert "mean (0.25,), std (0.5,)" in done.stdout
    output.unlink()
    for name, code in (("hub:other/vit", 4), ("hub:some/vit@nothing", 4), ("hub:a/b/c", 2)):
        done = import_weights(name, output, **environment)
        assert done.returncode == code, done.stderr
        assert "WGT-HUB" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not output.exists()

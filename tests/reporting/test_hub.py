"""Models on the Hub, with huggingface_hub's own client against a server of the tests' that speaks its protocol."""

import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import ValidationError
from stage_runs import ROOT, environment, run_several, tiny_policy

from agrpo.config.common import HubConfig

OUT_OF_ORDER = "me/lost"
TOKEN = "hf_a_token_of_the_tests_0123456789"


class Hub:
    """Repositories in memory: name → whether it is private, and the commits, each message → path → content."""

    def __init__(self):
        self.private, self.commits, self.asked = {}, [], []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.reply(*hub.post(self.path, body, self.headers.get("Authorization")))

            def do_GET(self):
                self.reply(*hub.get(self.path))

            def reply(self, status, value):
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def post(self, path, body, authorization):
        self.asked.append(path)
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "who are you"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name == OUT_OF_ORDER:
                return 500, {"error": "out of order"}
            url = f"{self.url}/{name}"
            if name in self.private:
                return 409, {"error": "it exists", "url": url}
            self.private[name] = asked.get("private", asked.get("visibility") == "private")
            return 200, {"url": url, "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {one["value"]["path"]: one["value"]["content"] for one in lines if one["key"] == "file"}
            (header,) = [one["value"] for one in lines if one["key"] == "header"]
            self.commits.append((header["summary"], {name: base64.b64decode(text) for name, text in files.items()}))
            number = f"{len(self.commits):040d}"
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{number}", "commitOid": number, "pullRequestUrl": None}
        return 404, {"error": path}

    def get(self, path):
        self.asked.append(path)
        name = path.removeprefix("/api/models/").partition("/revision")[0].partition("?")[0]
        if name in self.private:
            return 200, {"id": name, "private": self.private[name], "sha": "0" * 40, "siblings": []}
        return 404, {"error": path}


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.server.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("policy") / "model")


def variables(hub, token=TOKEN):
    kept = {key: value for key, value in environment().items() if not key.startswith(("HF_", "HUGGING"))}
    return (
        kept
        | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        | ({"HF_TOKEN": token} if token else {})
    )


def push(hub, model, *arguments, token=TOKEN):
    return subprocess.run(
        [sys.executable, "-m", "agrpo.cli", "push", str(model), *arguments],
        cwd=ROOT, env=variables(hub, token), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_model_goes_whole_into_a_new_private_repository(hub, model):
    done = push(hub, model, "me/mine")
    assert done.returncode == 0, done.stderr
    assert hub.private == {"me/mine": True}
    ((_, files),) = hub.commits
    assert files == {path.name: path.read_bytes() for path in model.iterdir()}
    assert "commit" in done.stdout and TOKEN not in done.stdout + done.stderr


def test_a_public_repository_is_refused_unless_it_is_meant(hub, model):
    hub.private["me/open"] = False
    done = push(hub, model, "me/open")
    assert done.returncode == 1 and "me/open is public" in done.stderr and not hub.commits
    assert push(hub, model, "me/open", "--public").returncode == 0 and len(hub.commits) == 1


def test_no_token_no_request_and_a_wrong_one_is_not_told(hub, model):
    done = push(hub, model, "me/mine", token=None)
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and not hub.asked
    done = push(hub, model, "me/mine", token="hf_wrong_0123456789")
    assert done.returncode == 1 and "401" in done.stderr and "hf_wrong" not in done.stderr


def test_the_section_asks_for_a_name_and_a_token(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValidationError, match="HF_TOKEN"):
        HubConfig(push="me/mine")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert HubConfig(push="me/mine").private and HubConfig().push is None
    with pytest.raises(ValidationError):
        HubConfig(push="mine")


def test_a_run_pushes_each_save_and_its_end_and_outlives_a_hub_that_is_down(hub, tmp_path, monkeypatch):
    for key, value in variables(hub).items():
        monkeypatch.setenv(key, value)
    saves = ["checkpoint.every=2", "training.max_steps=4", "hub={push: me/run, strategy: every_save}"]
    lost = ["training.max_steps=1", f"hub={{push: {OUT_OF_ORDER}}}"]
    done = run_several([("sft", tmp_path / "run", saves), ("sft", tmp_path / "lost", lost)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert [message for message, _ in hub.commits] == ["step 2", "step 4", "the finished model"]
    saved = tmp_path / "run" / "sft" / "model"
    assert hub.commits[-1][1] == {path.name: path.read_bytes() for path in saved.iterdir()}
    weights = [files["model.safetensors"] for _, files in hub.commits]
    assert weights[0] != weights[1] == weights[2]
    assert TOKEN not in done.stdout + done.stderr + (tmp_path / "run" / "sft" / "config.yaml").read_text()
    assert "was not pushed" in done.stdout and f"agrpo push {tmp_path / 'lost' / 'sft'} {OUT_OF_ORDER}" in done.stdout
    assert (tmp_path / "lost" / "sft" / "result.json").is_file()

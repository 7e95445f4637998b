"""tools/hub: what a stand-in for the Hugging Face hub receives, the model card, and errors in one line."""

import base64
import json
import os
import re
import shlex
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

pytest.importorskip("transformers", reason="pip install -r requirements-extra.txt")
from huggingface_hub import constants

import sample
import train
from conftest import ROOT, TINY
from model import MLP
from storygpt import checkpoint
from storygpt.corpus.tokenizer import END_OF_TEXT
from tools import export, hf, judge
from tools import hub as hub_tool


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that a push of alice's uses, on a free port."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private = {}  # repository → whether it is private
        self.commits = []  # (repository, message, path → content)
        self.requests = []  # (method, path)


class Handler(BaseHTTPRequestHandler):
    """Answers one request to a `Hub`, its attribute `server`."""

    def log_message(self, *args):
        """Print nothing."""

    def handle_request(self):
        """Read a request, and send the answer: its status, its JSON, and the message of an error."""
        body, path = self.rfile.read(int(self.headers.get("Content-Length", 0))), self.path.split("?")[0]
        self.server.requests.append((self.command, path))
        status, value, *message = self.answer(path, body)
        answer = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        for text in message:
            self.send_header("X-Error-Message", text)
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = handle_request

    def answer(self, path, body):
        hub, name = self.server, "/".join(path.split("/")[3:5])  # of /api/models/USER/NAME/…
        if self.headers.get("Authorization") != "Bearer hf_write":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "alice"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            if request["organization"] != "alice":
                return 403, {}, "You don't have the rights to create a model there"
            exists = name in hub.private
            hub.private.setdefault(name, request["visibility"] == "private")
            return (409 if exists else 200), {"url": f"{hub.url}/{name}"}
        if path.endswith("/settings"):
            hub.private[name] = json.loads(body)["visibility"] == "private"
        if path.endswith("/preupload/main"):
            return 200, {"files": [{"path": file["path"], "shouldIgnore": False, "uploadMode": "regular"}
                                   for file in json.loads(body)["files"]]}
        if path.endswith("/commit/main"):
            header, *added = [json.loads(line)["value"] for line in body.splitlines()]
            files = {file["path"]: base64.b64decode(file["content"]) for file in added}
            hub.commits.append((name, header["summary"], files))
            return 200, {"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        if name not in hub.private:
            return 404, {"error": "Repository not found"}
        return 200, {"id": name, "private": hub.private[name]}


@pytest.fixture
def hub(monkeypatch):
    """A running `Hub`, which this process uses, with a token that may write."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    # huggingface_hub has read the environment already, for conftest.py's HF_HUB_OFFLINE.
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                        "HF_TOKEN_PATH": "no-token"}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


def test_a_new_repository_is_private_and_has_every_format(run, hub, capsys):
    hub_tool.main(["push", "out/tiny", "alice/tiny"])
    printed = capsys.readouterr().out
    assert printed == f"pushed out/tiny/ckpt.pt, 11,648 parameters; the repository is private: {hub.url}/alice/tiny\n"
    assert hub.private == {"alice/tiny": True}
    (repository, message, files), = hub.commits
    assert (repository, message) == ("alice/tiny", "Upload out/tiny/ckpt.pt, 11,648 parameters")

    export.main(["out/tiny", "model"])
    others = {"tiny.html", "tiny.onnx", "tiny.gguf", "sample_onnx.py"}
    assert files.keys() == {*os.listdir("model"), *others}
    for name in files.keys() - others - {"README.md"}:
        assert files[name] == Path("model", name).read_bytes(), name
    card = files["README.md"].decode()
    for text in ('from_pretrained("alice/tiny")', "tools.hf import alice/tiny out/tiny\n", "# tiny\n",
                 "`tiny.html`: ", "sample_onnx.py tiny.onnx ", "-m tiny.gguf "):
        assert text in card


def test_a_modern_model_is_pushed_without_what_cannot_hold_it(run, hub, capsys):
    train.main([*TINY, "--architecture=modern", "--max_iters=8", "--out_dir=out/modern"])
    hub_tool.main(["push", "out/modern", "alice/modern"])
    printed = capsys.readouterr().out
    for left_out in ("without .gguf: ", "without safetensors: "):
        assert left_out + "out/modern/ckpt.pt: transformers and llama.cpp have no model of the archi" in printed
    (_, _, files), = hub.commits
    assert {"modern.html", "modern.onnx", "sample_onnx.py", "README.md", "tokenizer.json"} <= files.keys()
    assert not files.keys() & {"modern.gguf", "model.safetensors", "config.json"}
    card = files["README.md"].decode()
    assert card.startswith("---\ntags: [onnx]\n") and "from_pretrained" not in card and "tools.hf import" not in card
    assert files["sample_onnx.py"] == Path(ROOT, "docs/sample_onnx.py").read_bytes()


def test_a_format_that_gives_other_logits_is_not_uploaded(run, hub, capsys, monkeypatch):
    monkeypatch.setattr(MLP, "forward", lambda self, x: self.c_proj(self.c_fc(x).relu()))
    hub_tool.main(["push", "out/tiny", "alice/edited"])
    assert "without safetensors: out/tiny/ckpt.pt cannot be converted: the logits" in capsys.readouterr().out
    (_, _, files), = hub.commits
    assert "edited.onnx" in files and not files.keys() & {"model.safetensors", "config.json", "edited.html"}


def test_a_space_has_the_page_and_becomes_and_stays_public(run, hub, capsys):
    hub.private["alice/old"] = True
    for name, flags in (("old", ["--public"]), ("new", ["--public"]), ("new", [])):
        hub_tool.main(["push", "out/tiny", f"alice/{name}", "--space", *flags])
        assert f"the repository is public: {hub.url}/alice/{name}" in capsys.readouterr().out
        assert not hub.private[f"alice/{name}"]
    assert ("PUT", "/api/spaces/alice/new/settings") not in hub.requests and len(hub.commits) == 3
    repository, _, files = hub.commits[-1]
    assert repository == "alice/new" and ("POST", "/api/spaces/alice/new/commit/main") in hub.requests
    assert files.keys() == {"index.html", "README.md"} and files["index.html"].startswith(b"<!DOCTYPE html>")
    assert b"\nsdk: static\napp_file: index.html\n" in files["README.md"]
    assert b"Training data: 1,536 tokens of nursery-bpe300." in files["README.md"]


@pytest.mark.parametrize("name, token, complaint, requests", [
    ("tiny", "hf_write", "'tiny' is not the name of a hub repository: give USER/NAME, for example USER/tiny", 0),
    ("alice/the model", "hf_write", "cannot push to alice/the model: Repo id must use", 0),
    ("alice/tiny", "", "cannot push to alice/tiny: Token is required", 0),
    ("alice/tiny", "hf_wrong", "Invalid user token", 1),
    ("alice/tiny", "hf_write", "no checkpoint in out/none", 1),
])
def test_name_token_and_run_are_checked_before_a_repository_is_created(
        here, hub, fails, monkeypatch, name, token, complaint, requests):
    monkeypatch.setenv("HF_TOKEN", token)
    assert complaint in fails(hub_tool.main, ["push", "out/none", name])
    assert [path for _, path in hub.requests if path != "/api/agent-harnesses"] == ["/api/whoami-v2"] * requests


def test_refused_and_failed_connections(run, hub, fails, monkeypatch):
    error = fails(hub_tool.main, ["push", "out/tiny", "bob/tiny", "--space"])
    assert "cannot push to bob/tiny, with a token that must be allowed to write there: 403 Forbidden" in error
    assert not hub.private and not hub.commits
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    error = fails(hub_tool.main, ["push", "out/tiny", "alice/tiny"])
    assert re.match(r"error: cannot push to alice/tiny: \[Errno \d+\] Connection refused", error)


# ---- the model card ----

def card_of(out_dir, folder):
    """Export a run; returns its model card."""
    export.main([out_dir, folder])
    return Path(folder, "README.md").read_bytes().decode()


def test_the_commands_in_the_card_generate_its_samples(run, capsys):
    card = card_of("out/tiny", "model")
    import_command, sample_command = card.split("\n## Samples\n")[1].split("```\n")[1].splitlines()
    hf.main(shlex.split(import_command)[3:])
    capsys.readouterr()
    sample.main(shlex.split(sample_command)[2:])
    # In Markdown, \r is a line end too.
    stories = capsys.readouterr().out.replace("\r\n", "\n").replace("\r", "\n").split(END_OF_TEXT)
    assert len(stories) == 3
    for number, story in enumerate((story.strip("\n") for story in stories), 1):
        assert story.startswith("Once upon a time") and len(story) > 30
        assert f"\nStory {number}:\n\n> " + story.replace("\n", "\n>\n> ") + "\n" in card


def test_the_table_of_the_judge(run, fails):
    assert "Quality" not in card_of("out/tiny", "not-judged")
    state, path = checkpoint.load("out/tiny/ckpt.pt"), Path("out/tiny/judge.json")
    result = {"tokens": state["tokens"], "val_loss": state["metrics"]["val_loss"], "dataset": None, "reference": None,
              "measures": {"ends": {"value": 0.875, "low": 0.75, "high": 1}}, **dict.fromkeys(judge.SETTINGS, 8)}
    path.write_text(json.dumps(result), encoding="utf-8")
    assert f"\n## Quality of the stories\n\n{judge.read_result('out/tiny', state)}\n\n## Training" in card_of(
        "out/tiny", "judged")
    assert "87.5 [75.0, 100.0]" in Path("judged/README.md").read_text(encoding="utf-8")
    path.write_text("{}", encoding="utf-8")
    assert "out/tiny/judge.json is damaged" in fails(export.main, ["out/tiny", "damaged"])
    assert not Path("damaged").exists()

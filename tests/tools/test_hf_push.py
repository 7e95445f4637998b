"""tools/hf push: what a stand-in for the Hugging Face hub receives, the model card, and errors in one line."""

import base64
import json
import os
import re
import shlex
import shutil
import socket
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-extra.txt")
from huggingface_hub import constants

import sample
import train
from conftest import TINY
from storygpt import checkpoint
from storygpt.corpus.tokenizer import END_OF_TEXT
from tools import hf, judge



class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that a push uses, on a free port."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private = {}  # repository → whether it is private
        self.commits = []  # (repository, message, path → content)
        self.uploads = {}  # SHA-256 → content
        self.requests = []  # (method, path)


class Handler(BaseHTTPRequestHandler):
    """Answers one request to a `Hub`, its attribute `server`."""

    def log_message(self, *args):
        """Print nothing."""

    def answer(self, status, value, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, header in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self):
        """Read a request, and call the method for its path."""
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        hub.requests.append((self.command, path))
        if path.startswith("/upload/"):  # on another server, without a token
            hub.uploads[path.removeprefix("/upload/")] = body
            return self.answer(200, {})
        if self.headers.get("Authorization") != "Bearer hf_write":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self.answer(200, {"type": "user", "name": "alice"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        repository = "/".join(re.fullmatch(r"/(?:api/models/)?([\w.-]+)/([\w-]+)(?:\.git)?(?:/.*)?", path).groups())
        if repository not in hub.private:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if path.endswith("/settings"):
            hub.private[repository] = json.loads(body)["visibility"] == "private"
            return self.answer(200, {})
        if path.endswith("/preupload/main"):
            return self.answer(200, {"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(200, {"objects": [
                {**file, "actions": {"upload": {"href": f"{hub.url}/upload/{file['oid']}"}}}
                for file in json.loads(body)["objects"]]})
        if path.endswith("/commit/main"):
            return self.commit(repository, [json.loads(line) for line in body.splitlines()])
        if path == f"/api/models/{repository}":
            return self.answer(200, {"id": repository, "private": hub.private[repository]})
        self.answer(404, {"error": "not found"})

    do_GET = do_POST = do_PUT = handle_request

    def create(self, request):
        """Create a repository of alice."""
        repository, hub = f"{request['organization']}/{request['name']}", self.server
        if request["organization"] != "alice":
            return self.answer(403, {}, X_Error_Message="You don't have the rights to create a model there")
        if repository in hub.private:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{repository}"})
        hub.private[repository] = request["visibility"] == "private"
        self.answer(200, {"url": f"{hub.url}/{repository}"})

    def commit(self, repository, lines):
        """Store a commit: a header, and one line for each file."""
        files, hub = {}, self.server
        for line in lines[1:]:
            value = line["value"]
            files[value["path"]] = (base64.b64decode(value["content"]) if line["key"] == "file"
                                    else hub.uploads[value["oid"]])
        hub.commits.append((repository, lines[0]["value"]["summary"], files))
        number = f"{len(hub.commits):040x}"
        self.answer(200, {"commitUrl": f"{hub.url}/{repository}/commit/{number}", "commitOid": number})


@pytest.fixture
def hub():
    """A running `Hub`."""
    hub = Hub()
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


@pytest.fixture
def run(trained, here):
    """A folder that contains only the run out/tiny and its data."""
    shutil.copytree(trained / "out/tiny", "out/tiny")
    os.symlink(trained / "data", "data")
    return here


@pytest.fixture
def online(hub, monkeypatch):
    """Use the `Hub` in this process, with a token that may write; returns it."""
    # huggingface_hub has read the environment already, for conftest.py's HF_HUB_OFFLINE.
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no-token")
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    return hub


def test_a_private_push_and_a_second_one_that_makes_it_public(run, hub, online, capsys):
    hf.main(["push", "out/tiny", "alice/tiny"])
    printed = capsys.readouterr().out
    assert printed == f"pushed out/tiny/ckpt.pt, 11,648 parameters; the repository is private: {hub.url}/alice/tiny\n"
    assert hub.private == {"alice/tiny": True}
    (repository, message, files), = hub.commits
    assert (repository, message) == ("alice/tiny", "Upload out/tiny/ckpt.pt, 11,648 parameters")

    hf.main(["export", "out/tiny", "model"])
    assert sorted(files) == sorted(os.listdir("model"))
    for name in files.keys() - {"README.md"}:
        assert files[name] == Path("model", name).read_bytes(), name
    card = files["README.md"].decode()
    for pushed, exported in (('("alice/tiny")', '("model")'), ("import alice/tiny out/tiny", "import model out/model"),
                             ("# tiny\n", "# model\n"), ("--out_dir out/tiny", "--out_dir out/model")):
        assert pushed in card
        card = card.replace(pushed, exported)
    assert card == Path("model/README.md").read_text(encoding="utf-8")
    Path("pushed").mkdir()
    for name, content in files.items():
        Path("pushed", name).write_bytes(content)
    model, tokenizer, _ = checkpoint.load_model(Path("out/tiny/ckpt.pt"))
    idx = torch.tensor([tokenizer.encode("Once upon a time, there")[:16]])
    assert transformers.AutoTokenizer.from_pretrained("pushed").encode("Once upon") == tokenizer.encode("Once upon")
    with torch.no_grad():
        torch.testing.assert_close(transformers.AutoModelForCausalLM.from_pretrained("pushed")(idx).logits, model(idx))

    hf.main(["push", "out/tiny", "alice/tiny", "--public"])
    assert f"the repository is public: {hub.url}/alice/tiny" in capsys.readouterr().out
    assert hub.private == {"alice/tiny": False} and len(hub.commits) == 2
    assert hub.commits[0] == hub.commits[1]


def test_a_new_public_repository_stays_public(run, online, capsys):
    for flags in (["--public"], []):
        hf.main(["push", "out/tiny", "alice/tiny", *flags])
        assert f"the repository is public: {online.url}/alice/tiny" in capsys.readouterr().out
        assert online.private == {"alice/tiny": False}
    assert len(online.commits) == 2
    assert ("PUT", "/api/models/alice/tiny/settings") not in online.requests


@pytest.mark.parametrize("name, complaint", [
    ("tiny", "'tiny' is not the name of a hub repository: give USER/NAME, for example USER/tiny"),
    ("alice/the model", "cannot push to alice/the model: Repo id must use"),
    ("https://huggingface.co/alice/tiny", "Repo id must be in the form"),
    ("alice/tiny.git", "Repo_id cannot end by '.git'"),
])
def test_names_are_checked_first(here, fails, name, complaint):
    assert complaint in fails(hf.main, ["push", "out/none", name])


def test_offline(here, fails, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    assert "HF_HUB_OFFLINE" in fails(hf.main, ["push", "out/none", "alice/tiny"])


@pytest.mark.parametrize("token, complaint", [
    ("", "cannot push to alice/tiny: Token is required"),
    ("hf_wrong", "Invalid user token. The token from HF_TOKEN environment variable is invalid."),
])
def test_tokens_are_checked_before_the_export(here, online, fails, monkeypatch, token, complaint):
    monkeypatch.setenv("HF_TOKEN", token)
    error = fails(hf.main, ["push", "out/none", "alice/tiny"])
    assert complaint in error and "`hf auth login`" in error
    assert [path for _, path in online.requests if path != "/api/agent-harnesses"] == ["/api/whoami-v2"] * bool(token)


def test_no_connection(here, online, fails, monkeypatch):
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        error = fails(hf.main, ["push", "out/none", "alice/tiny"])
    assert re.match(r"error: cannot push to alice/tiny: \[Errno \d+\] Connection refused", error)


def test_another_users_repository(run, online, fails):
    error = fails(hf.main, ["push", "out/tiny", "bob/tiny"])
    assert "cannot push to bob/tiny, with a token that must be allowed to write there: 403 Forbidden" in error
    assert not online.private and not online.commits


def test_a_run_that_cannot_be_exported_creates_no_repository(run, online, fails):
    train.main([*TINY, "--architecture=modern", "--max_iters=2", "--out_dir=out/modern"])
    assert "no model of the architecture 'modern'" in fails(hf.main, ["push", "out/modern", "alice/tiny"])
    assert "no checkpoint in out/none" in fails(hf.main, ["push", "out/none", "alice/tiny"])
    assert not online.private


def test_flags_of_other_commands(here, fails):
    assert "--public has no effect on export to x" in fails(hf.main, ["export", "out/tiny", "x", "--public"], code=2)
    assert "--overwrite has no effect on push" in fails(hf.main, ["push", "out/tiny", "a/x", "--overwrite"], code=2)


# ---- the model card ----

def card_of(out_dir, folder):
    """Export a run; returns its model card."""
    hf.main(["export", out_dir, folder])
    return Path(folder, "README.md").read_bytes().decode()


@pytest.mark.parametrize("bias", [True, False])
def test_the_commands_in_the_card_generate_its_samples(run, capsys, bias):
    if not bias:
        train.main([*TINY, "--bias=False", "--max_iters=4", "--out_dir=out/bare"])
    card = card_of("out/tiny" if bias else "out/bare", "model")
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
    assert "out/tiny/judge.json is damaged" in fails(hf.main, ["export", "out/tiny", "damaged"])
    assert not Path("damaged").exists()

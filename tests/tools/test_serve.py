"""tools/serve: the server's responses, cancellation when the client disconnects, and the page in a browser."""

import asyncio
import http.client
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

pytest.importorskip("starlette", reason="pip install -r requirements-extra.txt")
pytest.importorskip("uvicorn", reason="pip install -r requirements-extra.txt")

import sample
from conftest import ROOT
from storygpt import checkpoint
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.run import read_log
from tools import publish, serve


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """A folder with the runs out/tiny and out/other."""
    folder = tmp_path_factory.mktemp("served")
    for name in ("other", "tiny"):
        shutil.copytree(trained / "out/tiny", folder / "out" / name)
        os.utime(folder / "out" / name / "ckpt.pt")  # the last one is the newest
    return folder


def start(folder, *words):
    """Start a server like a user does; returns the process and the first line that it prints."""
    process = subprocess.Popen([sys.executable, "-m", "tools.serve", "--port=0", *words], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    return process, process.stdout.readline()


@pytest.fixture(scope="module")
def url(runs):
    process, line = start(runs)
    yield line.split()[0]
    process.kill()
    process.communicate()


def send(url, content, headers=None, method="POST", path="/generate"):
    """Send an HTTP request; returns the status and the text of the response. `content`: bytes, None or JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    body = content if isinstance(content, bytes | None) else json.dumps(content)
    connection.request(method, path, body, {"Content-Type": "application/json"} | (headers or {}))
    response = connection.getresponse()
    return response.status, response.read().decode()


def generate(url, **request):
    """Request a story; returns its events."""
    status, text = send(url, {"run": "tiny", "prompt": "Once upon", "max_new_tokens": 30, "seed": 3} | request)
    assert status == 200, text
    return [json.loads(line) for line in text.splitlines()]


def test_a_story_equals_that_of_sample_py(url, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    settings = {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "max_new_tokens": 60, "seed": 7}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    sample.main(["--out_dir=out/tiny", "--start=Naïve 🦊", *flags])
    story = capsys.readouterr().out
    start, *tokens, end = generate(url, prompt="Naïve 🦊", **settings)
    assert "Naïve 🦊" + "".join(event["text"] for event in [*tokens, end]) + "\n" == story
    assert start["model"]["parameters"] == 11_648 and start["model"]["block_size"] == 16 and start["seed"] == 7
    assert end["tokens"] == len(tokens) + (end["end"] == "story")
    assert generate(url, seed=1)[1:-1] == generate(url, seed=1)[1:-1] != generate(url, seed=2)[1:-1]


def test_probabilities_are_those_of_the_model(url, runs):
    """At any temperature, and in the order of the ranks."""
    model, tokenizer, _ = checkpoint.load_model(runs / "out/tiny/ckpt.pt")
    tokens = [tokenizer.end_of_text, *tokenizer.encode("Once upon")]
    with torch.no_grad():
        probs = model(torch.tensor([tokens]))[0, -1].softmax(-1)
    for temperature in (0, 2):
        first = generate(url, temperature=temperature)[1]
        top = [p for _, p in first["top"]]
        assert len(top) == 5 and top == sorted(top, reverse=True)
        assert top[0] == pytest.approx(probs.max().item(), abs=0.01)
        assert first["rank"] == 1 and [first["text"], first["p"]] == first["top"][0] if temperature == 0 else True
        if first["rank"] <= 5:
            assert first["top"][first["rank"] - 1] == [first["text"], first["p"]]
        else:
            assert first["p"] <= top[-1]


def test_the_end_of_a_story_has_a_probability(url):
    for seed in range(200):
        *_, last, end = generate(url, seed=seed, max_new_tokens=200, temperature=1.5)
        if end["end"] == "story":
            break
    assert end["end"] == "story" and 0 < end["p"] < 1
    assert end["rank"] > 5 or end["top"][end["rank"] - 1] == [None, end["p"]]
    assert generate(url, max_new_tokens=5)[-1]["end"] == "length" and "p" not in generate(url, max_new_tokens=5)[-1]


def test_the_page_and_the_runs(url):
    status, page = send(url, None, method="GET", path="/")
    assert status == 200 and page == (ROOT / "tools/serve.html").read_text(encoding="utf-8")
    assert json.loads(send(url, None, method="GET", path="/runs")[1]) == {"runs": ["tiny", "other"]}
    assert send(url, None, method="GET", path="/generate")[0] == 405
    assert send(url, None, method="GET", path="/../x")[0] == 404


def test_the_losses_and_the_stories_of_the_evaluations(url, runs):
    losses = json.loads(send(url, None, method="GET", path="/losses")[1])
    assert (losses["loss"], losses["notes"]) == ("val_loss", [])
    assert [run["name"] for run in losses["runs"]] == ["tiny", "other"]
    records = read_log(runs / "out/tiny/log.jsonl")
    assert losses["runs"][0]["evals"] == [record for record in records if record["kind"] == "eval"]
    stories = (runs / "out/tiny/samples.md").read_bytes().decode("utf-8", "replace")
    for path, answer in [("run=tiny&iteration=16", None), ("run=tiny&iteration=17", {"story": None}),
                         ("run=tiny", {"story": None}), ("", {"error": "there is no run None under out/"}),
                         ("run=../out/tiny&iteration=16", {"error": "there is no run '../out/tiny' under out/"})]:
        status, text = send(url, None, method="GET", path=f"/sample?{path}")
        assert status == (400 if answer and "error" in answer else 200)
        assert json.loads(text) == answer or answer is None
        if answer is None:
            assert f"## iteration 16: validation loss {losses['runs'][0]['evals'][1]['val_loss']:.4f}\n\n" \
                   f"{json.loads(text)['story']}\n\n" in stories


def test_losses_of_runs_without_a_log_with_a_damaged_one_and_on_other_data(runs, here):
    for name in ("a", "b", "sweep/seed=1", "imported", "begun", "damaged"):
        shutil.copytree(runs / "out/tiny", here / "out" / name)
    Path("out/imported/log.jsonl").unlink()
    Path("out/imported/samples.md").unlink()
    Path("out/begun/log.jsonl").write_text("")
    Path("out/damaged/log.jsonl").write_text("{}\n")
    losses = serve.read_losses()
    assert {run["name"] for run in losses["runs"]} == {"a", "b", "sweep/seed=1"} and losses["loss"] == "val_loss"
    assert len(losses["notes"]) == 1 and "out/damaged/log.jsonl, line 1 is damaged" in losses["notes"][0]
    assert serve.read_sample("imported", "8") is None
    log = Path("out/b/log.jsonl")
    log.write_text(log.read_text().replace('"validation": "', '"validation": "0'))
    losses = serve.read_losses()
    assert losses["loss"] == "val_bpb" and "the runs have different validation data" in losses["notes"][1]


@pytest.mark.parametrize("request_json, complaint", [
    ({"run": "none"}, "there is no run 'none' under out/"), ({"run": "../out/tiny"}, "there is no run"),
    ({"run": ["tiny"]}, "there is no run"), ({}, "there is no run None"), ([], "a request may only have run, prompt, "),
    ({"run": "tiny", "tempurature": 1}, "a request may only have run, prompt, temperature"),
    ({"run": "tiny", "prompt": 5}, "the prompt is not a text of at most 10,000 characters"),
    ({"run": "tiny", "prompt": "a" * 10_001}, "the prompt is not a text of at most 10,000 characters"),
    ({"run": "tiny", "prompt": "a" * 170_000}, "the request is too long"),
    ({"run": "tiny", "temperature": -1}, "temperature = -1 is not a number from 0 to 100"),
    ({"run": "tiny", "temperature": "hot"}, "temperature = 'hot' is not a number"),
    ({"run": "tiny", "temperature": float("nan")}, "temperature = nan is not a number"),
    ({"run": "tiny", "top_p": 0}, "top_p = 0 is not a number from 1e-09 to 1"),
    ({"run": "tiny", "top_k": 1.5}, "top_k = 1.5 is not an integer"),
    ({"run": "tiny", "top_k": True}, "top_k = True is not an integer"),
    ({"run": "tiny", "max_new_tokens": 2001}, "max_new_tokens = 2001 is not an integer from 1 to 2000"),
    ({"run": "tiny", "seed": 2**53}, "seed = 9007199254740992 is not an integer from 0 to 9007199254740991"),
    (b"{", "the request is not JSON"), (b"\xff", "the request is not JSON"), (b"[" * 50_000, "the request is not JSON"),
])
def test_invalid_requests(url, request_json, complaint):
    status, text = send(url, request_json)
    assert status == 400 and complaint in json.loads(text)["error"]


def test_unusual_prompts(url):
    for prompt in ("", "\ud83e", "<|endoftext|>", "\0", "a b " * 2000):
        assert generate(url, prompt=prompt, max_new_tokens=3)[-1]["end"]
    assert generate(url, prompt="a b " * 2000, max_new_tokens=1)[0]["prompt_tokens"] > 16


def test_requests_of_other_sites_are_rejected(url):
    assert send(url, {"run": "tiny"}, {"Host": "evil.example"})[0] == 400
    assert send(url, {"run": "tiny"}, {"Content-Type": "text/plain"})[0] == 400


async def call(app, request, disconnect_after=None):
    """Call the ASGI application directly; returns the status and the lines that it sent.

    The client disconnects after `disconnect_after` lines.
    """
    messages, disconnected = [], asyncio.Event()
    body = [{"type": "http.request", "body": json.dumps(request).encode()}]

    async def receive():
        if not body:
            await disconnected.wait()
        return body.pop() if body else {"type": "http.disconnect"}

    async def send(message):
        messages.append(message)
        if len([m for m in messages if m.get("body")]) == disconnect_after:
            disconnected.set()

    scope = {"type": "http", "method": "POST", "path": "/generate", "raw_path": b"/generate", "query_string": b"",
             "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
             "asgi": {"version": "3.0", "spec_version": "2.3"}}
    await app(scope, receive, send)
    sent = b"".join(m.get("body", b"") for m in messages)
    assert sent.endswith(b"\n")  # otherwise the page would not read the last line
    return messages[0]["status"], sent.splitlines()


def test_a_story_stops_when_its_client_disconnects_and_makes_room_for_others(runs, monkeypatch):
    monkeypatch.chdir(runs)
    app = serve.make_app(torch.device("cpu"))
    request = {"run": "tiny", "max_new_tokens": 2000, "seed": 3}
    stories, real = [], serve.story_events
    monkeypatch.setattr(serve, "story_events", lambda *args, **kwargs: stories.append(real(*args, **kwargs))
                        or stories[-1])

    async def requests():
        for _ in range(3):
            status, lines = await call(app, request, disconnect_after=3)
            assert inspect.getgeneratorstate(stories[-1]) == inspect.GEN_CLOSED  # so that its memory is freed
            assert status == 200 and 3 <= len(lines) < 20
        async with asyncio.timeout(60):  # more than are generated at once: the others wait
            responses = await asyncio.gather(*(call(app, request | {"max_new_tokens": 5}) for _ in range(12)))
        assert all(status == 200 and json.loads(lines[-1])["end"] for status, lines in responses)
    asyncio.run(requests())


def test_tokens_of_equal_probability_have_different_ranks(nursery_data):
    tokenizer = Tokenizer.load(nursery_data / "data/nursery-bpe300")
    logits = torch.zeros(300)
    found = [serve.probabilities(token, logits, tokenizer) for token in range(300)]
    top = [token for token in range(300) if found[token]["rank"] <= 5]
    assert sorted(found[token]["rank"] for token in top) == [1, 2, 3, 4, 5]
    for token in top:
        assert found[token]["top"][found[token]["rank"] - 1][0] == tokenizer.decode([token])
    assert {entry["rank"] for entry in found} == {1, 2, 3, 4, 5, 6}


def test_changed_checkpoints_are_reloaded_and_damaged_ones_reported(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    device = torch.device("cpu")
    request = {"run": "tiny", "prompt": "", "seed": 1, "max_new_tokens": 5, "temperature": 1.0, "top_k": 0,
               "top_p": 1.0}
    before = list(serve.story_events(device, **request))
    state = checkpoint.load("out/tiny/ckpt.pt")
    checkpoint.save("out/tiny/ckpt.pt", state | {"tokens": 77})
    after = list(serve.story_events(device, **request))
    assert after[0]["model"]["training_tokens"] == 77 != before[0]["model"]["training_tokens"]
    for damage, complaint in [(lambda path: path.write_bytes(b"no"), "out/tiny/ckpt.pt is damaged"),
                              (lambda path: (path.unlink(), path.mkdir()), "Is a directory: 'out/tiny/ckpt.pt'")]:
        damage(Path("out/tiny/ckpt.pt"))
        status, lines = asyncio.run(call(serve.make_app(device), {"run": "tiny"}))
        assert complaint in json.loads(lines[-1])["error"]


@pytest.mark.parametrize("words, complaint, code", [
    (["--prot=8000"], "did you mean --port?", 2), (["--port=70000"], "70000 is not from 0 to 65535", 2),
    (["--device=tpu"], "device = 'tpu' cannot be used", 1), (["--host=203.0.113.7"], "cannot listen on 203.0.113.7", 1),
    (["--host="], "--host is empty", 2),
])
def test_wrong_flags(runs, monkeypatch, fails, words, complaint, code):
    monkeypatch.chdir(runs)
    assert complaint in fails(serve.main, words, code)


def test_errors_without_a_run_with_a_used_port_and_without_uvicorn(runs, here, fails, monkeypatch):
    assert "no trained model under out/" in fails(serve.main, [])
    monkeypatch.chdir(runs)
    with socket.create_server(("127.0.0.1", 0)) as other:
        error = fails(serve.main, [f"--port={other.getsockname()[1]}"])
        assert "(Address already in use): use another --port" in error
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "needs starlette and uvicorn: pip install -r requirements-extra.txt" in fails(serve.main, [])


def test_ctrl_c_stops_the_server_during_a_story(runs):
    process, line = start(runs, "--host=0.0.0.0")
    assert process.stdout.readline().startswith("note: everyone who can reach 0.0.0.0")
    address = "127.0.0.1", int(line.split()[0].rsplit(":")[-1])
    with socket.create_connection(address) as half:  # disconnects before its request is complete: no error
        half.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 50\r\n\r\n{")
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("POST", "/generate", json.dumps({"run": "tiny", "max_new_tokens": 2000}),
                       {"Content-Type": "application/json", "Host": "my.laptop"})
    response = connection.getresponse()
    assert response.status == 200 and response.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "stopped\n" and process.returncode == 130


# ---- the page, in Debian's Chromium ----

needs_browser = pytest.mark.skipif(not shutil.which("chromium") or not shutil.which("chromedriver"),
                                   reason="apt-get install chromium chromium-driver")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -r requirements-dev.txt")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-component-update", "disable-background-networking", "no-proxy-server", "window-size=1100,900",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    yield browser
    browser.quit()


@pytest.fixture
def page(chromium, url):
    """The page, opened, with seed 3. Afterwards, check that it logged no error and loaded nothing from elsewhere."""
    chromium.get(url)
    wait(chromium, "document.querySelectorAll('#run option').length == 2")
    fill(chromium, seed=3, max_new_tokens=40)
    yield chromium
    assert chromium.get_log("browser") == []
    addresses = chromium.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(address.startswith(url) for address in addresses)


def wait(browser, condition, seconds=30):
    from selenium.webdriver.support.ui import WebDriverWait
    WebDriverWait(browser, seconds, 0.02).until(lambda it: it.execute_script(f"return {condition}"), condition)


def fill(browser, **values):
    for name, value in values.items():
        browser.execute_script(f"document.getElementById('{name}').value = arguments[0]", str(value))


def find(browser, css):
    return browser.find_elements("css selector", css)


def texts(browser):
    return [element.get_attribute("textContent") for element in find(browser, ".story")]


DONE = "document.getElementById('status').textContent.startsWith('done')"


@needs_browser
def test_type_generate_and_copy(page, url):
    prompt = find(page, "#prompt")[0]
    prompt.clear()
    prompt.send_keys("One naïve day\nthe fox")
    find(page, "#generate")[0].click()
    wait(page, DONE)
    expected = "One naïve day\nthe fox" + "".join(event["text"] for event in generate(
        url, prompt="One naïve day\nthe fox", max_new_tokens=40)[1:])
    assert [text.removesuffix(" ∎") for text in texts(page)] == [expected]
    assert find(page, "#status")[0].text == "done, seed 3"
    find(page, "article button")[0].click()
    wait(page, "document.querySelector('article button').textContent == 'Copied'")
    assert page.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == expected


@needs_browser
def test_it_streams_and_stops(page):
    fill(page, max_new_tokens=2000, temperature=0)  # which repeats itself and never ends
    # The page itself presses Stop after it has added tokens 20 times, because the test would be too late.
    page.execute_script("""window.seen = new Set()
        new MutationObserver(() => {
          seen.add(document.querySelectorAll('.token').length)
          if (seen.size > 20) document.getElementById('stop').click()
        }).observe(document.getElementById('stories'), {childList: true, subtree: true})""")
    find(page, "#generate")[0].click()
    wait(page, "document.getElementById('status').textContent.startsWith('stopped, seed 3')")
    assert 20 <= len(find(page, ".token")) < 2000
    assert not find(page, "#stop")[0].is_enabled() and not find(page, "#error")[0].is_displayed()
    page.execute_script("""seen.clear()
        document.getElementById('stop').click = () => dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))""")
    find(page, "#examples button")[1].click()  # replaces the prompt and generates at once
    wait(page, "document.getElementById('status').textContent.startsWith('stopped')")
    assert texts(page)[0].startswith("One day, Lily")


@needs_browser
def test_comparing_two_runs(page, url):
    find(page, "#compare option[value=other]")[0].click()
    find(page, "#generate")[0].click()
    wait(page, DONE)
    assert [heading.text for heading in find(page, "article h2")] == ["tiny", "other"]
    events = generate(url, prompt="Once upon a time", max_new_tokens=40)[1:]
    expected = "Once upon a time" + "".join(event["text"] for event in events)
    assert [text.removesuffix(" ∎") for text in texts(page)] == [expected] * 2  # identical runs, same seed
    left, right = (article.rect for article in find(page, "article"))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]


@needs_browser
def test_token_probabilities_with_mouse_and_keyboard(page, url):
    from selenium.webdriver import ActionChains, Keys
    find(page, "#generate")[0].click()
    wait(page, DONE)
    events = generate(url, prompt="Once upon a time", max_new_tokens=40)[1:]
    tokens, tip = find(page, ".token"), find(page, "#tip")[0]
    assert not tip.is_displayed()

    def shown(event):
        wait(page, "!document.getElementById('tip').hidden")
        rows = [row.get_attribute("textContent") for row in find(page, "#tip div")]
        chosen = [row.get_attribute("textContent") for row in find(page, "#tip .chosen")]
        percent = "< 0.1 %" if event["p"] < 0.0005 else f"{100 * event['p']:.1f} %"
        return len(rows) >= 5 and len(chosen) == 1 and chosen[0].endswith(percent)

    wide = next(i for i, token in enumerate(tokens) if token.rect["width"] > 6)
    ActionChains(page).move_to_element(tokens[wide]).perform()
    assert shown(events[wide])
    ActionChains(page).move_to_element(find(page, "h1")[0]).perform()
    assert not tip.is_displayed()

    find(page, "#generate")[0].send_keys(Keys.TAB)  # Stop is disabled, so the story is next
    assert page.switch_to.active_element == tokens[0] and shown(events[0])
    for key, index in [(Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1), (Keys.END, len(tokens) - 1),
                       (Keys.ARROW_RIGHT, len(tokens) - 1), (Keys.HOME, 0)]:
        page.switch_to.active_element.send_keys(key)
        assert page.switch_to.active_element == tokens[index] and shown(events[index])
        assert tokens[index].get_attribute("aria-describedby") == "tip"
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.switch_to.active_element.text == "Copy" and not tip.is_displayed()


@needs_browser
def test_using_only_the_keyboard(page):
    from selenium.webdriver import Keys
    assert page.switch_to.active_element == find(page, "#prompt")[0]
    page.switch_to.active_element.send_keys(" there was", Keys.CONTROL + Keys.ENTER)
    wait(page, DONE)
    assert texts(page)[0].startswith("Once upon a time there was")
    reached = []
    for _ in range(14):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.switch_to.active_element.get_attribute("id") or page.switch_to.active_element.tag_name)
    assert [name for name in reached if name != "button"] == [
        "run", "compare", "temperature", "top_k", "top_p", "max_new_tokens", "seed", "generate", "span"]


@needs_browser
def test_errors_are_shown(page, runs):
    fill(page, top_p=5)
    find(page, "#generate")[0].click()  # the browser itself reports that 5 is too large
    assert find(page, "article") == []
    fill(page, top_p=1)
    (runs / "out/other").rename(runs / "out/gone")
    find(page, "#compare option[value=other]")[0].click()
    find(page, "#generate")[0].click()
    wait(page, "!document.getElementById('error').hidden")
    (runs / "out/gone").rename(runs / "out/other")
    assert find(page, "#error")[0].text == "other: there is no run 'other' under out/"
    wait(page, "document.querySelectorAll('.token').length >= 40")
    assert "400" in page.get_log("browser")[0]["message"]  # logged by Chromium itself


@needs_browser
def test_phone_width_and_dark_mode(page):
    light = find(page, "body")[0].value_of_css_property("background-color")
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                         {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia",
                         {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    fill(page, compare="other")
    find(page, "#generate")[0].click()
    wait(page, DONE)
    assert page.execute_script("return document.documentElement.scrollWidth <= 360")
    assert find(page, "body")[0].value_of_css_property("background-color") != light
    above, below = (article.rect for article in find(page, "article"))
    assert above["y"] + above["height"] <= below["y"] and above["width"] > 300
    for token in find(page, ".token")[::13]:
        page.execute_script("arguments[0].focus()", token)
        tip = page.execute_script("return document.getElementById('tip').getBoundingClientRect().toJSON()")
        assert tip["left"] >= 0 and tip["right"] <= 360 and tip["top"] >= 0
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_browser
def test_the_tabs_with_the_keyboard(page, url):
    from selenium.webdriver import Keys
    stories, losses = find(page, "[role=tab]")
    stories.click()
    for key, selected in [(Keys.ARROW_RIGHT, losses), (Keys.ARROW_RIGHT, stories), (Keys.ARROW_LEFT, losses),
                          (Keys.HOME, stories), (Keys.END, losses)]:
        page.switch_to.active_element.send_keys(key)
        assert page.switch_to.active_element == selected
        for tab in (stories, losses):
            panel = find(page, "#" + tab.get_attribute("aria-controls"))[0]
            assert panel.is_displayed() == (tab == selected) == (tab.get_attribute("aria-selected") == "true")
    assert page.current_url == f"{url}/#losses"
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("value") == "tiny"
    page.switch_to.active_element.send_keys(Keys.CONTROL + Keys.ENTER)  # generates nothing: the prompt cannot be seen
    assert find(page, "article") == []


@pytest.fixture
def losses_page(chromium, runs, here):
    """The tab with the losses, of a server with its own copy of the runs."""
    shutil.copytree(runs / "out", "out")
    process, line = start(here)
    try:
        chromium.get(line.split()[0] + "/#losses")
        wait(chromium, f"{POINTS} == 6 && {SAMPLE} != ''")
        yield chromium
        chromium.get("about:blank")  # or the page would report that its server does not respond
        assert chromium.get_log("browser") == []
    finally:
        process.kill()
        process.communicate()


POINTS = "document.querySelectorAll('#plot .run circle').length"
SAMPLE = "document.getElementById('sample').textContent"


def story_of(run, iteration):
    return publish.read_stories(Path("out", run))[iteration]


@needs_browser
def test_the_losses_are_updated_while_runs_train(losses_page):
    assert find(losses_page, "#sample")[0].get_attribute("textContent") == story_of("tiny", "24")
    log = Path("out/tiny/log.jsonl")
    before, evaluation = log.read_text(), [record for record in read_log(log) if record["kind"] == "eval"][-1]
    with log.open("a") as file:
        file.write(json.dumps(evaluation | {"iter": 32, "tokens": 2048, "val_loss": 1.2345}) + "\n")
    wait(losses_page, f"{POINTS} == 7")
    assert "tiny\n1.2345" in find(losses_page, "#legend")[0].text
    wait(losses_page, f"{SAMPLE} == 'no story in samples.md yet'")
    with Path("out/tiny/samples.md").open("a") as file:
        file.write("## iteration 32: validation loss 1.2345\n\nOne day.\n\nThe <b>end</b>.\n\n")
    wait(losses_page, f"{SAMPLE} == 'One day.\\n\\nThe <b>end</b>.'")

    find(losses_page, "#evaluation option[value='8']")[0].click()  # then a later one does not replace it
    wait(losses_page, f"{SAMPLE} != 'One day.\\n\\nThe <b>end</b>.'")
    with log.open("a") as file:
        file.write(json.dumps(evaluation | {"iter": 40, "tokens": 2560}) + "\n")
    wait(losses_page, f"{POINTS} == 8")
    assert find(losses_page, "#evaluation")[0].get_attribute("value") == "8"
    assert find(losses_page, "#sample")[0].get_attribute("textContent") == story_of("tiny", "8")

    log.write_text(before.splitlines()[0] + "\n")  # replaced by a run that has not been evaluated
    wait(losses_page, f"{POINTS} == 3")
    wait(losses_page, f"{SAMPLE} == ''")
    assert "tiny\nno evaluation yet" in find(losses_page, "#legend")[0].text
    odd = "sweep/<b>#?&%'\"ü,seed=1"
    shutil.copytree("out/other", Path("out", odd))
    shutil.rmtree("out/tiny")
    wait(losses_page, f"{POINTS} == 6")
    wait(losses_page, "document.getElementById('sample_run').textContent == 'other'")
    find(losses_page, "#legend input:not([value=other])")[0].click()
    wait(losses_page, f"document.getElementById('sample_run').textContent == {json.dumps(odd)}")
    assert find(losses_page, "#sample")[0].get_attribute("textContent") == story_of(odd, "24")
    log = Path("out", odd, "log.jsonl")
    log.write_text(log.read_text().replace('"validation": "', '"validation": "0'))
    wait(losses_page, "document.querySelector('#plot text').textContent == 'validation loss (bits per byte)'")
    assert "different validation data" in find(losses_page, "#notes")[0].text


@needs_browser
def test_choosing_an_evaluation_with_mouse_and_keyboard(losses_page):
    from selenium.webdriver import ActionChains, Keys
    ring, (first, second, third) = "#plot .ring", find(losses_page, "#plot .chosen circle")
    places = [{name: point.get_attribute(name) for name in ("cx", "cy")} for point in (first, second, third)]
    assert {name: find(losses_page, ring)[0].get_attribute(name) for name in ("cx", "cy")} == places[2]
    assert len(find(losses_page, "#plot .training")) == 1
    Path("out/other/samples.md").write_text("## iteration 16: validation loss 1\n\nThe other story.\n\n")
    ActionChains(losses_page).move_to_element(second).move_by_offset(2, 3).click().perform()
    wait(losses_page, "document.getElementById('evaluation').value == '16'")
    assert {name: find(losses_page, ring)[0].get_attribute(name) for name in ("cx", "cy")} == places[1]
    wait(losses_page, f"{SAMPLE} == {json.dumps(story_of('tiny', '16'))}")
    assert "iteration 16 · 1.02K tokens · " in find(losses_page, "#sample_facts")[0].text

    find(losses_page, "#evaluation")[0].send_keys(Keys.HOME)  # the newest
    wait(losses_page, f"{SAMPLE} == {json.dumps(story_of('tiny', '24'))}")
    find(losses_page, "#legend input:checked")[0].send_keys(Keys.ARROW_UP)
    assert losses_page.switch_to.active_element.get_attribute("value") == "other"
    wait(losses_page, f"{SAMPLE} == 'no story in samples.md yet'")
    find(losses_page, "#evaluation")[0].send_keys("iteration 16")
    wait(losses_page, f"{SAMPLE} == 'The other story.'")

    labels = find(losses_page, "#plot")[0].text
    find(losses_page, "#axis option[value=minutes]")[0].click()
    assert find(losses_page, "#plot")[0].text != labels and "minutes" in find(losses_page, "#plot")[0].text
    losses_page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
    wait(losses_page, "Math.max(...points.map(point => point.cx)) < 360")
    assert losses_page.execute_script("return document.documentElement.scrollWidth <= 360")
    losses_page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_an_unreachable_server_is_reported(chromium, runs):
    process, line = start(runs)
    chromium.get(line.split()[0])
    wait(chromium, "document.querySelectorAll('#run option').length == 2")
    process.kill()
    process.communicate()
    find(chromium, "#generate")[0].click()
    wait(chromium, "document.getElementById('error').textContent.startsWith('the server does not respond')")
    find(chromium, "#losses_tab")[0].click()
    wait(chromium, "document.getElementById('losses_error').textContent.startsWith('the server does not respond')")
    chromium.get("about:blank")
    chromium.get_log("browser")

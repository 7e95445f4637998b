"""tools/serve: the server's responses and the page in a browser; one server and one browser for all tests."""

import http.client
import json
import os
import queue
import shutil
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

pytest.importorskip("starlette", reason="pip install -r requirements-extra.txt")
uvicorn = pytest.importorskip("uvicorn", reason="pip install -r requirements-extra.txt")

import sample
from conftest import ROOT
from faults.processes import ForkedProcess
from storygpt import checkpoint
from storygpt.run import read_log
from tools import publish, serve


@pytest.fixture(autouse=True)
def runs(trained, here):
    """The current folder, to which also the server's paths are relative, has the runs out/tiny and out/other."""
    for name in ("other", "tiny"):
        shutil.copytree(trained / "out/tiny", here / "out" / name, ignore=shutil.ignore_patterns("last*.pt"))
    os.utime("out/other/ckpt.pt", (1, 1))  # in all tests the same, so that the server loads the models only once
    os.utime("out/tiny/ckpt.pt", (2, 2))


@pytest.fixture(scope="module")
def url():
    server = uvicorn.Server(uvicorn.Config(serve.make_app(torch.device("cpu")), log_level="warning",
                                           timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def send(url, path, content=None, headers=None):
    """GET a path, or POST JSON or bytes to it; returns the response, of which the body is not read yet."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    body = content if isinstance(content, bytes | None) else json.dumps(content)
    connection.request("GET" if body is None else "POST", path, body,
                       {"Content-Type": "application/json"} | (headers or {}))
    return connection.getresponse()


def get(url, path):
    return json.loads(send(url, path).read())


def generate(url, **request):
    """Request a story; returns its events."""
    response = send(url, "/generate", {"run": "tiny", "prompt": "Once upon", "max_new_tokens": 30, "seed": 3} | request)
    assert response.status == 200
    return [json.loads(line) for line in response]


def text_of(events):
    return "".join(event["text"] for event in events[1:])


# ---- the server ----


def test_a_story_equals_that_of_sample_py(url, capsys):
    settings = {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "max_new_tokens": 60, "seed": 7}
    sample.main(["--out_dir=out/tiny", "--start=Naïve 🦊", *(f"--{name}={value}" for name, value in settings.items())])
    start, *tokens, end = generate(url, prompt="Naïve 🦊", **settings)
    assert "Naïve 🦊" + text_of([start, *tokens, end]) + "\n" == capsys.readouterr().out
    assert start["model"]["parameters"] == 11_648 and start["model"]["block_size"] == 16 and start["seed"] == 7
    assert end["tokens"] == len(tokens) + (end["end"] == "story")
    assert generate(url, seed=1)[1:-1] == generate(url, seed=1)[1:-1] != generate(url, seed=2)[1:-1]


def test_probabilities_are_those_of_the_model(url):
    """Before the temperature is applied, and in the order of the ranks; the end of a story has one too."""
    model, tokenizer, _ = checkpoint.load_model("out/tiny/ckpt.pt")
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.end_of_text, *tokenizer.encode("Once upon")]]))[0, -1]  # (V,)
    for temperature in (0, 2):
        first = generate(url, temperature=temperature)[1]
        top = [p for _, p in first["top"]]
        assert len(top) == 5 and top == sorted(top, reverse=True)
        assert top[0] == pytest.approx(logits.softmax(-1).max().item(), abs=0.01)
        assert first["rank"] == 1 or temperature
        if first["rank"] <= 5:
            assert first["top"][first["rank"] - 1] == [first["text"], first["p"]]
        else:
            assert first["p"] <= top[-1]

    ends = (generate(url, seed=seed, max_new_tokens=200, temperature=1.5)[-1] for seed in range(200))
    end = next(end for end in ends if end["end"] == "story")
    assert 0 < end["p"] < 1 and (end["rank"] > 5 or end["top"][end["rank"] - 1] == [None, end["p"]])
    cut = generate(url, max_new_tokens=5)[-1]
    assert cut["end"] == "length" and "p" not in cut

    equal = [serve.probabilities(token, torch.zeros(300), tokenizer) for token in range(300)]
    top = {entry["rank"]: token for token, entry in enumerate(equal) if entry["rank"] <= 5}
    assert {entry["rank"] for entry in equal} == {1, 2, 3, 4, 5, 6}
    assert all(equal[token]["top"][rank - 1][0] == tokenizer.decode([token]) for rank, token in top.items())


def test_the_page_and_the_runs_but_not_for_other_sites(url):
    assert send(url, "/").read() == (ROOT / "tools/serve.html").read_bytes()
    assert "default-src 'none'" in send(url, "/").headers["Content-Security-Policy"]
    assert get(url, "/runs") == {"runs": ["tiny", "other"]}  # the newest first
    assert [send(url, path).status for path in ("/generate", "/../x")] == [405, 404]
    for headers in ({"Host": "evil.example"}, {"Content-Type": "text/plain"}):
        assert send(url, "/generate", {"run": "tiny"}, headers).status == 400


def test_the_losses_and_the_stories_of_the_evaluations(url):
    losses = get(url, "/losses")
    assert (losses["loss"], losses["notes"]) == ("val_loss", [])
    assert [run["name"] for run in losses["runs"]] == ["tiny", "other"]
    evals = [record for record in read_log("out/tiny/log.jsonl") if record["kind"] == "eval"]
    assert losses["runs"][0]["evals"] == evals
    story = get(url, "/sample?run=tiny&iteration=16")["story"]
    assert f"## iteration 16: validation loss {evals[1]['val_loss']:.4f}\n\n{story}\n\n" in Path(
        "out/tiny/samples.md").read_bytes().decode("utf-8", "replace")
    assert get(url, "/sample?run=tiny&iteration=17") == get(url, "/sample?run=tiny") == {"story": None}
    response = send(url, "/sample?run=../out/tiny&iteration=16")
    assert response.status == 400 and "there is no run '../out/tiny' under out/" in response.read().decode()


def test_losses_of_runs_without_a_log_with_a_damaged_one_and_on_other_data():
    for name in ("sweep/seed=1", "imported", "begun", "damaged"):
        shutil.copytree("out/tiny", Path("out", name))
    Path("out/imported/log.jsonl").unlink()
    Path("out/imported/samples.md").unlink()
    Path("out/begun/log.jsonl").write_text("")
    Path("out/damaged/log.jsonl").write_text("{}\n")
    log = Path("out/sweep/seed=1/log.jsonl")
    log.write_text(log.read_text() + json.dumps(read_log(log)[-2] | {"kind": "eval", "val_loss": float("nan")}) + "\n")
    losses = serve.read_losses()
    assert {run["name"]: len(run["evals"]) for run in losses["runs"]} == {"tiny": 3, "other": 3, "sweep/seed=1": 3}
    assert losses["loss"] == "val_loss"
    assert len(losses["notes"]) == 1 and "out/damaged/log.jsonl, line 1 is damaged" in losses["notes"][0]
    assert serve.read_sample("imported", "8") is None
    log.write_text(log.read_text().replace('"validation": "', '"validation": "0'))
    losses = serve.read_losses()
    assert losses["loss"] == "val_bpb" and "the runs have different validation data" in losses["notes"][1]


@pytest.mark.parametrize("request_json, complaint", [
    ({"run": "none"}, "there is no run 'none' under out/"), ({"run": ["tiny"]}, "there is no run"),
    ({"run": "../out/tiny"}, "there is no run"), ([], "a request may only have run, prompt, "),
    ({"run": "tiny", "tempurature": 1}, "a request may only have run, prompt, temperature"),
    ({"run": "tiny", "prompt": 5}, "the prompt is not a text of at most 10,000 characters"),
    ({"run": "tiny", "prompt": "a" * 10_001}, "the prompt is not a text of at most 10,000 characters"),
    ({"run": "tiny", "prompt": "a" * 170_000}, "the request is too long"),
    ({"run": "tiny", "temperature": "hot"}, "temperature = 'hot' is not a number from 0 to 100"),
    ({"run": "tiny", "temperature": float("nan")}, "temperature = nan is not a number"),
    ({"run": "tiny", "top_p": 0}, "top_p = 0 is not a number from 1e-09 to 1"),
    ({"run": "tiny", "top_k": True}, "top_k = True is not an integer"),
    ({"run": "tiny", "max_new_tokens": 2001}, "max_new_tokens = 2001 is not an integer from 1 to 2000"),
    (b"{", "the request is not JSON"), (b"\xff", "the request is not JSON"),
], ids=range(15))
def test_invalid_requests(url, request_json, complaint):
    response = send(url, "/generate", request_json)
    assert response.status == 400 and complaint in json.loads(response.read())["error"]


def test_unusual_prompts(url):
    for prompt in ("", "\ud83e", "<|endoftext|>", "\0", "a b " * 2000):  # the last is longer than the model's block
        assert generate(url, prompt=prompt, max_new_tokens=3)[-1]["end"]


def test_a_story_stops_when_its_client_disconnects_and_makes_room_for_others(url, monkeypatch):
    original, closed = serve.story_events, queue.SimpleQueue()

    def observed(*args, **settings):
        count = 0
        try:
            for count, event in enumerate(original(*args, **settings)):
                yield event
        finally:
            closed.put(count)

    monkeypatch.setattr(serve, "story_events", observed)
    for _ in range(3):
        response = send(url, "/generate", {"run": "tiny", "max_new_tokens": 2000, "temperature": 0})  # it never ends
        assert response.readline()
        response.close()
        assert closed.get(timeout=60) < 2000
    with ThreadPoolExecutor(12) as pool:  # more than are generated at once: the others wait
        stories = list(pool.map(lambda seed: generate(url, seed=seed, max_new_tokens=5), range(12)))
    assert all(events[-1]["end"] for events in stories)


def test_changed_checkpoints_are_reloaded_and_damaged_ones_reported(url):
    path = Path("out/tiny/ckpt.pt")
    tokens = generate(url)[0]["model"]["training_tokens"]
    checkpoint.save(path, checkpoint.load(path) | {"tokens": tokens + 7})
    assert generate(url)[0]["model"]["training_tokens"] == tokens + 7
    path.write_bytes(b"no")
    assert "out/tiny/ckpt.pt is damaged" in generate(url)[-1]["error"]
    path.unlink()
    path.mkdir()
    assert "Is a directory: 'out/tiny/ckpt.pt'" in generate(url)[-1]["error"]


def test_wrong_flags_a_used_port_a_missing_package_and_no_run(fails, monkeypatch):
    assert "70000 is not from 0 to 65535" in fails(serve.main, ["--port=70000"], 2)
    assert "device = 'tpu' cannot be used" in fails(serve.main, ["--device=tpu"])
    assert "cannot listen on 203.0.113.7" in fails(serve.main, ["--host=203.0.113.7"])
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "(Address already in use): use another --port" in fails(
            serve.main, [f"--port={other.getsockname()[1]}"])
    shutil.rmtree("out")
    assert "no trained model under out/" in fails(serve.main, [])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "needs starlette and uvicorn: pip install -r requirements-extra.txt" in fails(serve.main, [])


def test_ctrl_c_stops_the_server_during_a_story():
    reading, writing = os.pipe()
    process = ForkedProcess(serve.main, ["--port=0", "--host=0.0.0.0"], lambda: os.dup2(writing, 1))
    os.close(writing)
    with open(reading) as printed:
        port = printed.readline().split()[0].rsplit(":")[-1]
        assert printed.readline().startswith("note: everyone who can reach 0.0.0.0")
    response = send(f"http://127.0.0.1:{port}", "/generate", {"run": "tiny", "max_new_tokens": 2000, "temperature": 0},
                    {"Host": "my.laptop"})
    assert response.status == 200 and response.readline()
    os.kill(process.pid, signal.SIGINT)
    assert process.result() == (130, "", "stopped\n")


# ---- the page, in Debian's Chromium ----


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -r requirements-dev.txt")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("apt-get install chromium chromium-driver")
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
    chromium.get("about:blank")  # otherwise the page with #losses would not be loaded again
    chromium.get(url)
    wait(chromium, "document.querySelectorAll('#run option').length == 2")
    for name, value in {"seed": 3, "max_new_tokens": 40}.items():
        chromium.execute_script(f"{name}.value = {value}")
    yield chromium
    assert chromium.get_log("browser") == []
    addresses = chromium.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(address.startswith(url) for address in addresses)


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait
    WebDriverWait(browser, 60, 0.02).until(lambda it: it.execute_script(f"return {condition}"), condition)


def wait_for_text(browser, name, text):
    """Wait until the text of the element with this id begins with `text`."""
    wait(browser, f"$('{name}').textContent.startsWith({json.dumps(text)})")


def find(browser, css):
    return browser.find_elements("css selector", css)


def press(browser, *keys):
    """Press keys on the focused element; returns the one that has the focus afterwards."""
    browser.switch_to.active_element.send_keys(*keys)
    return browser.switch_to.active_element


def texts(browser):
    return [element.get_attribute("textContent").removesuffix(" ∎") for element in find(browser, ".story")]


def set_screen(browser, width, scheme):
    """Emulate a phone of this width, or no phone for 0, with a light or dark scheme."""
    phone = {"width": width, "height": 740 * bool(width), "deviceScaleFactor": 0, "mobile": bool(width)}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                            {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


def has_tip(browser, event):
    """Whether the tip shows the probabilities of this token."""
    if not find(browser, "#tip")[0].is_displayed():
        return False
    percent = "< 0.1 %" if event["p"] < 0.0005 else f"{100 * event['p']:.1f} %"
    chosen, = find(browser, "#tip .chosen")
    return len(find(browser, "#tip div")) >= 5 and chosen.get_attribute("textContent").endswith(percent)


def test_the_page_with_only_the_keyboard(page, url):
    from selenium.webdriver import Keys
    press(page, "\nthere was a naïve fox", Keys.CONTROL + Keys.ENTER)
    wait_for_text(page, "status", "done, seed 3")
    prompt = "Once upon a time\nthere was a naïve fox"
    events = generate(url, prompt=prompt, max_new_tokens=40)
    assert texts(page) == [prompt + text_of(events)]

    reached = [press(page, Keys.TAB) for _ in range(14)]
    assert [element.get_attribute("id") for element in reached if element.get_attribute("id")] == [
        "run", "compare", "temperature", "top_k", "top_p", "max_new_tokens", "seed", "generate"]
    tokens = find(page, ".token")
    assert reached[-1] == tokens[0] and has_tip(page, events[1])  # Stop is disabled, so the story is next
    last = len(tokens) - 1
    for key, i in [(Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1), (Keys.END, last),
                   (Keys.ARROW_RIGHT, last), (Keys.HOME, 0)]:
        assert press(page, key) == tokens[i] and has_tip(page, events[i + 1])
        assert tokens[i].get_attribute("aria-describedby") == "tip"
    assert press(page, Keys.TAB).text == "Copy" and not find(page, "#tip")[0].is_displayed()
    press(page, Keys.ENTER)
    wait(page, "document.activeElement.textContent == 'Copied'")
    assert page.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == texts(page)[0]


def test_it_streams_and_stops(page):
    page.execute_script("max_new_tokens.value = 2000; temperature.value = 0")  # which repeats itself and never ends
    # The page itself presses Stop after it has added tokens 20 times, because the test would be too late.
    page.execute_script("""window.seen = new Set()
        new MutationObserver(() => {
          seen.add(document.querySelectorAll('.token').length)
          if (seen.size > 20) $('stop').click()
        }).observe($('stories'), {childList: true, subtree: true})""")
    find(page, "#generate")[0].click()
    wait_for_text(page, "status", "stopped, seed 3")
    assert 20 <= len(find(page, ".token")) < 2000
    assert not find(page, "#stop")[0].is_enabled() and not find(page, "#error")[0].is_displayed()
    page.execute_script(
        "seen.clear(); $('stop').click = () => dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    find(page, "#examples button")[1].click()  # replaces the prompt and generates at once
    wait_for_text(page, "status", "stopped")
    assert texts(page)[0].startswith("One day, Lily")


def test_comparing_two_runs_on_a_desktop_and_on_a_phone(page, url):
    from selenium.webdriver import ActionChains
    find(page, "#compare option[value=other]")[0].click()
    find(page, "#generate")[0].click()
    wait_for_text(page, "status", "done")
    assert [heading.text for heading in find(page, "article h2")] == ["tiny", "other"]
    events = generate(url, prompt="Once upon a time", max_new_tokens=40)
    assert texts(page) == ["Once upon a time" + text_of(events)] * 2  # identical runs, same seed
    left, right = (article.rect for article in find(page, "article"))
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    i, wide = next((i, token) for i, token in enumerate(find(page, ".token")) if token.rect["width"] > 6)
    ActionChains(page).move_to_element(wide).perform()
    assert has_tip(page, events[i + 1])
    ActionChains(page).move_to_element(find(page, "h1")[0]).perform()
    assert not find(page, "#tip")[0].is_displayed()

    light = find(page, "body")[0].value_of_css_property("background-color")
    set_screen(page, 360, "dark")
    assert find(page, "body")[0].value_of_css_property("background-color") != light
    assert page.execute_script("return document.documentElement.scrollWidth <= 360")
    above, below = (article.rect for article in find(page, "article"))
    assert above["y"] + above["height"] <= below["y"] and above["width"] > 300
    for token in find(page, ".token")[::13]:
        tip = page.execute_script("arguments[0].focus(); return $('tip').getBoundingClientRect().toJSON()", token)
        assert tip["left"] >= 0 and tip["right"] <= 360 and tip["top"] >= 0 and tip["width"] > 100
    set_screen(page, 0, "light")


def test_errors_are_shown(page):
    page.execute_script("top_p.value = 5")
    find(page, "#generate")[0].click()  # the browser itself reports that 5 is too large
    assert find(page, "article") == []
    page.execute_script("top_p.value = 1")
    shutil.rmtree("out/other")
    find(page, "#compare option[value=other]")[0].click()
    find(page, "#generate")[0].click()
    wait_for_text(page, "error", "other: there is no run 'other' under out/")
    wait(page, "document.querySelectorAll('.token').length >= 40")  # of the other story
    page.execute_cdp_cmd("Network.enable", {})
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.execute_cdp_cmd("Network.emulateNetworkConditions", network | {"offline": True})
    find(page, "#generate")[0].click()
    wait_for_text(page, "error", "the server does not respond")
    find(page, "#losses_tab")[0].click()
    wait_for_text(page, "losses_error", "the server does not respond")
    page.execute_cdp_cmd("Network.emulateNetworkConditions", network | {"offline": False})
    wait(page, "$('losses_error').hidden")
    assert "400" in page.get_log("browser")[0]["message"]  # logged by Chromium itself


def test_the_tabs_with_the_keyboard(page, url):
    from selenium.webdriver import Keys
    stories, losses = find(page, "[role=tab]")
    stories.click()
    for key, selected in [(Keys.ARROW_RIGHT, losses), (Keys.ARROW_RIGHT, stories), (Keys.ARROW_LEFT, losses),
                          (Keys.HOME, stories), (Keys.END, losses)]:
        assert press(page, key) == selected
        for tab in (stories, losses):
            panel = find(page, "#" + tab.get_attribute("aria-controls"))[0]
            assert panel.is_displayed() == (tab == selected) == (tab.get_attribute("aria-selected") == "true")
    assert page.current_url == f"{url}/#losses"
    wait(page, f"{POINTS} == 6")
    assert press(page, Keys.TAB).get_attribute("value") == "tiny"
    press(page, Keys.CONTROL + Keys.ENTER)  # generates nothing: the prompt cannot be seen
    assert find(page, "article") == []


POINTS = "document.querySelectorAll('#plot .run circle').length"


def story_of(run, iteration):
    return publish.read_stories(Path("out", run))[iteration]


def update(page):
    """Make the page look for new losses at once, as when it is shown again."""
    page.execute_script("document.dispatchEvent(new Event('visibilitychange'))")


@pytest.fixture
def losses_page(page):
    find(page, "#losses_tab")[0].click()
    wait(page, f"{POINTS} == 6 && $('sample').textContent")
    return page


def test_the_losses_are_updated_while_runs_train(losses_page):
    assert find(losses_page, "#sample")[0].get_attribute("textContent") == story_of("tiny", "24")
    log = Path("out/tiny/log.jsonl")
    before, evaluation = log.read_text(), [record for record in read_log(log) if record["kind"] == "eval"][-1]
    with log.open("a") as file:
        file.write(json.dumps(evaluation | {"iter": 32, "tokens": 2048, "val_loss": 1.2345}) + "\n")
    wait(losses_page, f"{POINTS} == 7")  # the page looks every two seconds
    assert "tiny\n1.2345" in find(losses_page, "#legend")[0].text
    wait_for_text(losses_page, "sample", "no story in samples.md yet")
    with Path("out/tiny/samples.md").open("a") as file:
        file.write("## iteration 32: validation loss 1.2345\n\nOne day.\n\nThe <b>end</b>.\n\n")
    update(losses_page)
    wait_for_text(losses_page, "sample", "One day.\n\nThe <b>end</b>.")

    find(losses_page, "#evaluation option[value='8']")[0].click()  # then a later one does not replace it
    wait_for_text(losses_page, "sample", story_of("tiny", "8"))
    with log.open("a") as file:
        file.write(json.dumps(evaluation | {"iter": 40, "tokens": 2560}) + "\n")
    update(losses_page)
    wait(losses_page, f"{POINTS} == 8 && $('evaluation').value == '8'")
    assert find(losses_page, "#sample")[0].get_attribute("textContent") == story_of("tiny", "8")

    log.write_text(before.splitlines()[0] + "\n")  # replaced by a run that has not been evaluated
    update(losses_page)
    wait(losses_page, f"{POINTS} == 3 && !$('sample').textContent")
    assert "tiny\nno evaluation yet" in find(losses_page, "#legend")[0].text
    odd = "sweep/<b>#?&%'\"ü,seed=1"
    shutil.copytree("out/other", Path("out", odd))
    shutil.rmtree("out/tiny")
    update(losses_page)
    wait(losses_page, f"{POINTS} == 6 && $('sample_run').textContent == 'other'")
    find(losses_page, "#legend input:not([value=other])")[0].click()
    wait_for_text(losses_page, "sample_run", odd)
    assert find(losses_page, "#sample")[0].get_attribute("textContent") == story_of(odd, "24")
    log = Path("out", odd, "log.jsonl")
    log.write_text(log.read_text().replace('"validation": "', '"validation": "0'))
    update(losses_page)
    wait_for_text(losses_page, "plot", "validation loss (bits per byte)")
    assert "different validation data" in find(losses_page, "#notes")[0].text


def test_choosing_an_evaluation_with_mouse_and_keyboard(losses_page):
    from selenium.webdriver import ActionChains, Keys

    def place(css):
        return [(point.get_attribute("cx"), point.get_attribute("cy")) for point in find(losses_page, css)]

    places, points = place("#plot .chosen circle"), find(losses_page, "#plot .chosen circle")
    assert place("#plot .ring") == places[2:] and len(find(losses_page, "#plot .training")) == 1
    Path("out/other/samples.md").write_text("## iteration 16: validation loss 1\n\nThe other story.\n\n")
    ActionChains(losses_page).move_to_element(points[1]).move_by_offset(2, 3).click().perform()
    wait_for_text(losses_page, "sample", story_of("tiny", "16"))
    assert place("#plot .ring") == places[1:2]
    assert find(losses_page, "#evaluation")[0].get_attribute("value") == "16"
    assert "iteration 16 · 1.02K tokens · " in find(losses_page, "#sample_facts")[0].text

    find(losses_page, "#evaluation")[0].send_keys(Keys.HOME)  # the newest
    wait_for_text(losses_page, "sample", story_of("tiny", "24"))
    find(losses_page, "#legend input:checked")[0].send_keys(Keys.ARROW_UP)
    assert losses_page.switch_to.active_element.get_attribute("value") == "other"
    wait_for_text(losses_page, "sample", "no story in samples.md yet")
    find(losses_page, "#evaluation")[0].send_keys("iteration 16")
    wait_for_text(losses_page, "sample", "The other story.")

    labels = find(losses_page, "#plot")[0].text
    find(losses_page, "#axis option[value=minutes]")[0].click()
    assert find(losses_page, "#plot")[0].text != labels and "minutes" in find(losses_page, "#plot")[0].text
    set_screen(losses_page, 360, "light")
    wait(losses_page, "Math.max(...points.map(point => point.cx)) < 360")
    assert losses_page.execute_script("return document.documentElement.scrollWidth <= 360")
    set_screen(losses_page, 0, "light")

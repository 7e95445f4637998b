"""tools/serve: the server's responses, and the page in Chromium. All tests share one server and one browser."""

import itertools
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

import pytest
import requests  # of tiktoken
import torch

pytest.importorskip("starlette", reason="pip install -r requirements-extra.txt")
uvicorn = pytest.importorskip("uvicorn", reason="pip install -r requirements-extra.txt")
pytest.importorskip("selenium", reason="pip install -r requirements-dev.txt")

from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.support.ui import WebDriverWait

import sample
from conftest import ROOT, records
from faults.processes import ForkedProcess
from storygpt import checkpoint
from tools import publish, serve

OTHER = "sweep/<b>#?&%'\"ü,seed=1"  # a name that must be quoted in HTML, in URLs and in JSON


@pytest.fixture(autouse=True)
def runs(trained, here):
    """The current folder, also that of the server, has the runs out/tiny and, older and otherwise equal, OTHER."""
    for i, name in enumerate([OTHER, "tiny"]):
        shutil.copytree(trained / "out/tiny", Path("out", name), ignore=shutil.ignore_patterns("last*.pt"))
        os.utime(Path("out", name, "ckpt.pt"), (i, i))  # the same in all tests: the server loads the models once


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


def get(url, path):
    return requests.get(url + path).json()


def generate(url, **request):
    """Request a story; returns its events."""
    default = {"run": "tiny", "prompt": "Once upon", "max_new_tokens": 30, "seed": 3}
    response = requests.post(f"{url}/generate", json=default | request)
    assert response.status_code == 200
    return [json.loads(line) for line in response.iter_lines()]


def text_of(events):
    return "".join(event["text"] for event in events[1:])


def story_of(iteration):
    return publish.read_stories(Path("out/tiny"))[iteration]


def add_evaluation(log, **changes):
    """Add a changed copy of the last evaluation to a log."""
    evaluation = records(Path(log).parent, "eval")[-1]
    with open(log, "a") as file:
        file.write(json.dumps(evaluation | changes) + "\n")


def use_other_data(log, lines=None):
    """Replace a log, in one step, by its first `lines` lines, with the hash of other validation data."""
    text = "".join(Path(log).read_text().splitlines(keepends=True)[:lines])
    Path("new").write_text(text.replace('"validation": "', '"validation": "0'))
    os.replace("new", log)


# ---- the server ----


def test_a_story_equals_that_of_sample_py(url, capsys):
    settings = {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "max_new_tokens": 60, "seed": 7}
    sample.main(["--out_dir=out/tiny", "--start=Naïve 🦊", *(f"--{name}={value}" for name, value in settings.items())])
    start, *tokens, end = generate(url, prompt="Naïve 🦊", **settings)
    assert "Naïve 🦊" + text_of([start, *tokens, end]) + "\n" == capsys.readouterr().out
    assert start["model"]["parameters"] == 11_648 and start["model"]["block_size"] == 16 and start["seed"] == 7
    assert end["tokens"] == len(tokens) + (end["end"] == "story")
    for prompt in ("", "\ud83e", "<|endoftext|>", "\0", "a b " * 2000):  # the last is longer than the model's block
        assert generate(url, prompt=prompt, max_new_tokens=3)[-1]["end"]


def test_probabilities_are_those_of_the_model(url):
    """Before the temperature is applied, and in the order of the ranks; the end of a story has one too."""
    model, tokenizer, _ = checkpoint.load_model("out/tiny/ckpt.pt")
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.end_of_text, *tokenizer.encode("Once upon")]]))[0, -1]  # (V,)
    first = {temperature: generate(url, temperature=temperature)[1] for temperature in (0, 2)}
    assert first[0]["rank"] == 1 and first[0]["top"] == first[2]["top"]
    assert first[0]["p"] == pytest.approx(logits.softmax(-1).max().item(), abs=0.01)
    ends = (generate(url, seed=seed, max_new_tokens=200, temperature=1.5)[-1] for seed in range(200))
    end = next(end for end in ends if end["end"] == "story")
    assert 0 < end["p"] < 1 and (end["rank"] > 5 or end["top"][end["rank"] - 1] == [None, end["p"]])
    assert "p" not in generate(url, max_new_tokens=5)[-1]
    for values in (logits, torch.zeros(300)):  # also of equal probabilities, ranks 1 to 5 are those of the top tokens
        ranked = {serve.probabilities(token, values, tokenizer)["rank"]: token for token in range(300)}
        top = [text for text, _ in serve.probabilities(0, values, tokenizer)["top"]]
        assert top == [tokenizer.decode([ranked[rank]]) for rank in range(1, 6)] and max(ranked) >= 6


def test_the_losses_and_the_stories_of_the_evaluations(url):
    evals = [{key: record[key] for key in serve.SHOWN} for record in records("out/tiny", "eval")]
    assert get(url, "/losses") == {"loss": "val_loss", "notes": [],
                                   "runs": [{"name": name, "evals": evals} for name in ("tiny", OTHER)]}
    assert get(url, "/sample?run=tiny&iteration=16") == {"story": story_of("16")}
    assert get(url, "/sample?run=tiny&iteration=17") == {"story": None}
    assert get(url, "/sample?run=../out/tiny&iteration=16") == {"error": "there is no run '../out/tiny' under out/"}

    for name in ("imported", "begun", "damaged", "diverged"):
        shutil.copytree("out/tiny", Path("out", name))
    Path("out/imported/log.jsonl").unlink()
    Path("out/imported/samples.md").unlink()
    Path("out/begun/log.jsonl").write_text("")
    Path("out/damaged/log.jsonl").write_text("{}\n")
    add_evaluation("out/diverged/log.jsonl", accuracy=float("nan"))  # a metric that a reader added
    add_evaluation("out/diverged/log.jsonl", val_loss=float("nan"))
    use_other_data("out/diverged/log.jsonl")
    losses = get(url, "/losses")
    assert {run["name"]: len(run["evals"]) for run in losses["runs"]} == {"tiny": 3, OTHER: 3, "diverged": 4}
    assert losses["loss"] == "val_bpb" and "out/damaged/log.jsonl, line 1 is damaged" in losses["notes"][0]
    assert "the runs have different validation data" in losses["notes"][1]
    assert get(url, "/sample?run=imported&iteration=8") == {"story": None}


def test_the_page_and_the_runs_but_not_for_other_sites_or_invalid_requests(url):
    assert requests.get(url).content == (ROOT / "tools/serve.html").read_bytes()
    assert get(url, "/runs") == {"runs": ["tiny", OTHER]}  # the newest first
    for headers in ({"Host": "evil.example"}, {"Content-Type": "text/plain"}):
        assert requests.post(f"{url}/generate", json={"run": "tiny"}, headers=headers).status_code == 400
    for request, complaint in [
        (b"\xff", "the request is not JSON"), ("[]", "a request may only have run, prompt, temperature"),
        ('{"run": "../out/tiny"}', "there is no run '../out/tiny' under out/"),
        ('{"run": "tiny", "tempurature": 1}', "a request may only have"),
        (json.dumps({"run": "tiny", "prompt": "a" * 10_001}), "the prompt is not a text of at most 10,000 characters"),
        (json.dumps({"run": "tiny", "prompt": "a" * 170_000}), "the request is too long"),
        ('{"run": "tiny", "top_p": NaN}', "top_p = nan is not a number from 1e-09 to 1"),
        ('{"run": "tiny", "max_new_tokens": 2.5}', "max_new_tokens = 2.5 is not an integer from 1 to 2000"),
    ]:
        response = requests.post(f"{url}/generate", request, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and complaint in response.json()["error"]


@pytest.fixture
def endless(monkeypatch):
    """Stories of 2000 tokens repeat their first one for ever. A queue that gets an item when a story is closed."""
    story_events, closed, kept = serve.story_events, queue.SimpleQueue(), []

    def repeat(*args, **settings):
        events = story_events(*args, **settings)
        if settings["max_new_tokens"] == 2000:
            start, *tokens = itertools.islice(events, 2)
            events = itertools.chain([start], itertools.cycle(tokens))
        try:
            yield from events
        finally:
            closed.put("closed")

    monkeypatch.setattr(serve, "story_events", lambda *args, **settings: (  # kept, or Python itself would close it
        kept.append(repeat(*args, **settings)), kept[-1])[1])
    return closed


def test_a_story_stops_when_its_client_disconnects_and_makes_room_for_others(url, endless):
    for _ in range(3):
        with requests.post(f"{url}/generate", json={"run": "tiny", "max_new_tokens": 2000}, stream=True) as response:
            assert next(response.iter_lines(1))
        assert endless.get(timeout=60)
    with ThreadPoolExecutor(12) as pool:  # more than are generated at once: the others wait
        assert all(events[-1]["end"] for events in pool.map(lambda seed: generate(url, seed=seed), range(12)))


def test_changed_checkpoints_are_reloaded_and_damaged_ones_reported(url):
    path = Path("out/tiny/ckpt.pt")
    checkpoint.save(path, checkpoint.load(path) | {"tokens": 77})
    assert generate(url)[0]["model"]["training_tokens"] == 77 != generate(url, run=OTHER)[0]["model"]["training_tokens"]
    path.write_bytes(b"no")
    assert "out/tiny/ckpt.pt is damaged" in generate(url)[-1]["error"]


def test_a_used_port_no_run_and_a_missing_package_are_reported(fails, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} (Address already in use): use another --port" in fails(serve.main, [f"--port={port}"])
    shutil.rmtree("out")
    assert "no trained model under out/" in fails(serve.main, [])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "uvicorn halted; None in sys.modules: pip install -r requirements.txt" in fails(serve.main, [])


def test_ctrl_c_stops_the_server_during_a_story(endless):
    reading, writing = os.pipe()
    process = ForkedProcess(serve.main, ["--port=0", "--host=0.0.0.0"], lambda: os.dup2(writing, 1))
    os.close(writing)
    with open(reading) as printed:
        port = printed.readline().split()[0].split(":")[-1]
        assert printed.readline().startswith("note: everyone who can reach 0.0.0.0")
    response = requests.post(f"http://127.0.0.1:{port}/generate", json={"run": "tiny", "max_new_tokens": 2000},
                             headers={"Host": "my.laptop"}, stream=True)
    assert next(response.iter_lines(1))
    os.kill(process.pid, signal.SIGINT)
    assert process.result() == (130, "", "stopped\n")


# ---- the page, in Debian's Chromium ----


@pytest.fixture(scope="module")
def chromium():
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    yield browser
    browser.quit()


@pytest.fixture
def page(chromium, url):
    """The page, opened, with seed 3. Afterwards, check that it logged no error and loaded nothing from elsewhere."""
    chromium.get("about:blank")  # otherwise only #losses would be removed from the address
    chromium.get(url)
    set_screen(chromium, 1100, "light")
    wait(chromium, "$('run').length == 2")
    chromium.execute_script("seed.value = 3; max_new_tokens.value = 40")
    yield chromium
    assert chromium.get_log("browser") == []
    addresses = chromium.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(address.startswith(url) for address in addresses)


def wait(browser, condition):
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


def stories(browser):
    return [element.get_attribute("textContent").removesuffix(" ∎") for element in find(browser, ".story")]


def set_screen(browser, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 0, "mobile": width < 400}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                            {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


def has_tip(browser, event):
    """Whether a tip shows the probabilities of this token."""
    wait(browser, "!$('tip').hidden")
    percent = "< 0.1 %" if event["p"] < 0.0005 else f"{100 * event['p']:.1f} %"
    return len(find(browser, "#tip div")) >= 5 and [row.get_attribute("textContent").endswith(percent)
                                                    for row in find(browser, "#tip .chosen")] == [True]


def test_the_page_with_only_the_keyboard(page, url):
    prompt = "Once upon a time\nthere was a naïve fox"
    press(page, "\nthere was a naïve fox", Keys.CONTROL + Keys.ENTER)
    wait_for_text(page, "status", "done, seed 3")
    events = generate(url, prompt=prompt, max_new_tokens=40)
    assert stories(page) == [prompt + text_of(events)]
    reached = [press(page, Keys.TAB) for _ in range(14)]
    assert [element.get_attribute("id") for element in reached if element.get_attribute("id")] == [
        "run", "compare", "temperature", "top_k", "top_p", "max_new_tokens", "seed", "generate"]
    tokens = find(page, ".token")
    assert reached[-1] == tokens[0] and has_tip(page, events[1])  # Stop is disabled, so the story is next
    for key, i in [(Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1), (Keys.END, len(tokens) - 1),
                   (Keys.ARROW_RIGHT, len(tokens) - 1), (Keys.HOME, 0)]:
        assert press(page, key) == tokens[i] and has_tip(page, events[i + 1])
        assert tokens[i].get_attribute("aria-describedby") == "tip"
    assert press(page, Keys.TAB).text == "Copy" and not find(page, "#tip")[0].is_displayed()
    press(page, Keys.ENTER)
    WebDriverWait(page, 60, 0.02).until(lambda page: page.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0])") == stories(page)[0])


def test_it_streams_and_stops(page, endless):
    page.execute_script("max_new_tokens.value = 2000")
    find(page, "#generate")[0].click()
    wait(page, "document.querySelectorAll('.token').length > 20")
    find(page, "#stop")[0].click()
    wait_for_text(page, "status", "stopped, seed 3")
    assert not find(page, "#stop")[0].is_enabled() and not find(page, "#error")[0].is_displayed()
    find(page, "#examples button")[1].click()  # replaces the prompt and generates at once
    wait(page, "document.querySelectorAll('.token').length > 20")
    press(page, Keys.ESCAPE)
    wait_for_text(page, "status", "stopped")
    assert stories(page)[0].startswith("One day, Lily")
    assert endless.get(timeout=60) and endless.get(timeout=60)


def test_comparing_two_runs_on_a_desktop_and_on_a_phone(page, url):
    find(page, "#compare option")[2].click()
    find(page, "#generate")[0].click()
    wait_for_text(page, "status", "done")
    assert [heading.text for heading in find(page, "article h2")] == ["tiny", OTHER]
    events = generate(url, prompt="Once upon a time", max_new_tokens=40)
    assert stories(page) == ["Once upon a time" + text_of(events)] * 2  # identical runs, same seed
    left, right = find(page, "article")
    assert left.rect["y"] == right.rect["y"]
    i, wide = next((i, token) for i, token in enumerate(find(page, ".token")) if token.rect["width"] > 6)
    ActionChains(page).move_to_element(wide).perform()
    assert has_tip(page, events[i + 1])
    ActionChains(page).move_to_element(find(page, "h1")[0]).perform()
    assert not find(page, "#tip")[0].is_displayed()
    color = find(page, "body")[0].value_of_css_property("background-color")
    set_screen(page, 360, "dark")
    assert find(page, "body")[0].value_of_css_property("background-color") != color
    assert left.rect["y"] + left.rect["height"] <= right.rect["y"] and left.rect["width"] > 300
    assert page.execute_script("return document.documentElement.scrollWidth <= 360")
    for token in find(page, ".token")[::13]:
        tip = page.execute_script("arguments[0].focus(); return $('tip').getBoundingClientRect().toJSON()", token)
        assert tip["left"] >= 0 and tip["right"] <= 360 and tip["top"] >= 0 and tip["width"] > 100


def test_errors_are_shown(page):
    shutil.rmtree(Path("out", OTHER))
    find(page, "#compare option")[2].click()
    page.execute_script("top_p.value = 5; $('generate').click(); top_p.value = 1")  # 5 is too large: no story
    assert find(page, "article") == []
    find(page, "#generate")[0].click()
    wait_for_text(page, "error", f"{OTHER}: there is no run ")
    wait(page, "document.querySelectorAll('.token').length >= 40")  # of the other story
    page.set_network_conditions(offline=True, latency=0, throughput=0)
    find(page, "#generate")[0].click()
    wait_for_text(page, "error", "the server does not respond")
    find(page, "#losses_tab")[0].click()
    wait_for_text(page, "losses_error", "the server does not respond")
    page.delete_network_conditions()
    wait(page, "$('losses_error').hidden")
    assert "400" in page.get_log("browser")[0]["message"]  # logged by Chromium itself


POINTS = "document.querySelectorAll('#plot .run circle').length"


@pytest.fixture
def losses_page(page, url):
    """The page with the tab of the losses, reached with the keyboard."""
    first, second = find(page, "[role=tab]")
    first.click()
    for key, tab in [(Keys.ARROW_LEFT, second), (Keys.ARROW_RIGHT, first), (Keys.END, second)]:
        assert press(page, key) == tab
        assert find(page, "#losses")[0].is_displayed() == (tab == second) != find(page, "#generation")[0].is_displayed()
    assert page.current_url == f"{url}/#losses"
    press(page, Keys.CONTROL + Keys.ENTER)  # generates nothing: the prompt cannot be seen
    wait(page, f"{POINTS} == 6 && $('sample').textContent")
    assert find(page, "article") == [] and press(page, Keys.TAB).get_attribute("value") == "tiny"
    return page


def test_the_losses_are_updated_while_runs_train(losses_page):
    wait_for_text(losses_page, "sample", story_of("24"))
    log = "out/tiny/log.jsonl"
    add_evaluation(log, iter=32, tokens=2048, val_loss=1.2345)
    wait(losses_page, f"{POINTS} == 7")
    losses_page.execute_script("setInterval(updateLosses, 100)")  # from now on not only every two seconds
    assert "tiny\n1.2345" in find(losses_page, "#legend")[0].text
    wait_for_text(losses_page, "sample", "no story in samples.md yet")
    with open("out/tiny/samples.md", "a") as file:
        file.write("## iteration 32: validation loss 1.2345\n\nOne day.\n\nThe <b>end</b>.\n\n")
    wait_for_text(losses_page, "sample", "One day.\n\nThe <b>end</b>.")

    find(losses_page, "#evaluation option[value='8']")[0].click()  # then a later one does not replace it
    add_evaluation(log, iter=40, tokens=2560)
    wait(losses_page, f"{POINTS} == 8 && $('evaluation').value == '8'")
    wait_for_text(losses_page, "sample", story_of("8"))

    use_other_data(log, lines=1)  # a new run, not evaluated yet
    wait(losses_page, f"{POINTS} == 3 && !$('sample').textContent")
    assert "tiny\nno evaluation yet" in find(losses_page, "#legend")[0].text
    assert "different validation data" in find(losses_page, "#notes")[0].text
    assert "validation loss (bits per byte)" in find(losses_page, "#plot")[0].text
    shutil.rmtree("out/tiny")
    wait_for_text(losses_page, "sample_run", OTHER)


def test_choosing_an_evaluation_with_mouse_and_keyboard(losses_page):
    def places(css):
        return [(point.get_attribute("cx"), point.get_attribute("cy")) for point in find(losses_page, css)]
    expected, points = places("#plot .chosen circle"), find(losses_page, "#plot .chosen circle")
    assert places("#plot .ring") == expected[2:] and len(find(losses_page, "#plot .training")) == 1
    Path("out", OTHER, "samples.md").write_text("## iteration 16: validation loss 1\n\nThe other story.\n\n")
    ActionChains(losses_page).move_to_element(points[1]).move_by_offset(2, 3).click().perform()
    wait_for_text(losses_page, "sample", story_of("16"))
    assert places("#plot .ring") == expected[1:2]
    assert "iteration 16 · 1.02K tokens · " in find(losses_page, "#sample_facts")[0].text
    find(losses_page, "#evaluation")[0].send_keys(Keys.HOME)  # the newest
    wait_for_text(losses_page, "sample", story_of("24"))
    find(losses_page, "#legend input:checked")[0].send_keys(Keys.ARROW_UP)
    wait_for_text(losses_page, "sample", "no story in samples.md yet")
    assert losses_page.switch_to.active_element.get_attribute("value") == OTHER
    find(losses_page, "#evaluation")[0].send_keys("iteration 16")
    wait_for_text(losses_page, "sample", "The other story.")
    labels = find(losses_page, "#plot")[0].text
    find(losses_page, "#axis option[value=minutes]")[0].click()
    assert find(losses_page, "#plot")[0].text != labels and "minutes" in find(losses_page, "#plot")[0].text
    set_screen(losses_page, 360, "dark")
    wait(losses_page, "document.documentElement.scrollWidth <= 360 && Math.max(...points.map(point => point.cx)) < 360")

"""tools/formats/page: the page in Chromium, from a file, against PyTorch and tiktoken. All tests share one browser."""

import itertools
import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

pytest.importorskip("selenium", reason="pip install -r requirements-dev.txt")
pytest.importorskip("py_mini_racer", reason="pip install -r requirements-extra.txt")

from selenium import webdriver
from selenium.webdriver import Keys
from selenium.webdriver.support.ui import WebDriverWait

from conftest import ROOT
from model import GPT, MLP, GPTConfig
from modern import WINDOW, make_model
from storygpt import checkpoint
from storygpt.corpus.tokenizer import Tokenizer
from storygpt.generate import generate
from tools.formats import NotExportable, SavedModel, check_tokens
from tools.formats import page as page_module
from tools.formats.page import write_page
from tools.hf import write_run

# Texts with emoji, Chinese, combining characters and odd white space.
PROMPTS = ["", "Once upon a time", "Naïve 🦊🏽 狐狸说：你好！ e\u0301", " \u00a0\u0085\ufeff\u2003\r\n\t ",
           "<|endoftext|></script>", "a long one " * 40]
# The tokens of the most likely continuation, and the logits of the next token after a text.
GREEDY = """const [prompt, count] = arguments, tokens = [about.end_of_text, ...tokenizer.encode(prompt)]
    const start = tokens.length
    for (let i = 0; i < count; i++) {
      for (const _ of gpt.read(tokens));
      tokens.push(gpt.tokens[sample(gpt.logits.slice(0, gpt.tokens.length), 200, 0, 0.5)])
    }
    return tokens.slice(start)"""
LOGITS = """return arguments[0].map(tokens => {
      for (const _ of gpt.read(tokens));
      return Array.from({length: gpt.vocab_size}, (_, token) => gpt.logits[gpt.row(token)])
    })"""


@pytest.fixture(scope="module")
def chromium():
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking",
                 "force-prefers-reduced-motion"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()


@pytest.fixture
def open_page(chromium):
    """A function that opens a page. Afterwards, check that it logged no error and loaded nothing."""
    def open_page(path):
        chromium.get(Path(path).absolute().as_uri())
        wait(chromium, "!$('write').disabled")
        return chromium
    yield open_page
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []


@pytest.fixture(scope="module")
def tiny_page(trained, tmp_path_factory):
    """A page of the run out/tiny of the fixture `trained`, in int8."""
    path = tmp_path_factory.mktemp("pages") / "<b>.html"
    note = write_page(path, SavedModel.load(trained / "out/tiny"), "int8")
    assert re.fullmatch(r" in int8, 0\.0 MB; logits differ by up to 0\.0\d+ of the largest from .* in float32", note)
    return path


@pytest.fixture
def page(open_page, tiny_page):
    return open_page(tiny_page)


def wait(browser, condition):
    WebDriverWait(browser, 60, 0.02).until(lambda it: it.execute_script(f"return {condition}"), condition)


def random_run(name, tokenizer, **settings):
    """Write a run with random weights; returns its model."""
    torch.manual_seed(0)
    model = make_model(GPTConfig(vocab_size=tokenizer.vocab_size, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    write_run(Path(name), model, tokenizer, overwrite=False)
    return model


def trained_tokenizer(trained):
    return Tokenizer.load(trained / "out/tiny")


def greedy(model, tokenizer, prompt, count):
    idx = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(prompt)]])
    return [int(token) for token in generate(model, idx, count, temperature=0)]


ODD = dict(n_layer=2, n_embd=36, n_head=3, block_size=17, dropout=0.1)
EVEN = dict(n_layer=1, n_embd=16, n_head=2, block_size=24)


@pytest.mark.parametrize("settings", [
    dict(ODD, architecture="gpt2", bias=True, gelu="tanh"), dict(EVEN, architecture="gpt2", bias=False, gelu="exact"),
    dict(ODD, architecture="modern", bias=True, gelu="exact"),
    dict(EVEN, architecture="modern", bias=False, block_size=WINDOW + 16),
])
def test_the_most_likely_tokens_are_those_of_sample_py(open_page, trained, here, settings):
    tokenizer = trained_tokenizer(trained)
    model = random_run("out/random", tokenizer, **settings)
    write_page(here / "page.html", SavedModel.load("out/random"), "float32")
    page = open_page("page.html")
    for prompt in PROMPTS:
        assert page.execute_script(GREEDY, prompt, 200) == greedy(model, tokenizer, prompt, 200)


def test_tokens_without_rows_of_their_own(open_page, here):
    """With GPT-2's vocabulary, most tokens did not occur in training: they share a row, and are not chosen."""
    tokenizer = Tokenizer.named("gpt2")
    model = random_run("out/random", tokenizer, n_layer=1, n_embd=8, n_head=1, block_size=12)
    with torch.no_grad():
        model.transformer.wte.weight[torch.randperm(50256)[:40_000]] = torch.full((8,), 0.5)
    write_run(Path("out/random"), model, tokenizer, overwrite=True)
    write_page(here / "page.html", SavedModel.load("out/random"), "float32")
    assert Path("page.html").stat().st_size < 1.4e6
    page = open_page("page.html")
    tokens = [[50256, *tokenizer.encode(text)][:12] for text in PROMPTS]
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([context]))[0, -1] for context in tokens])
    torch.testing.assert_close(torch.tensor(page.execute_script(LOGITS, tokens)), expected, atol=1e-5, rtol=1e-5)
    assert page.execute_script(GREEDY, "One day", 100)
    assert page.execute_script("return gpt.tokens.length") == 50257 - 40_000
    check_tokenizer(page, tokenizer)


def check_tokenizer(page, tokenizer):
    """Compare the tokens of thousands of texts, made of parts that are difficult for the pattern or the merges."""
    draw = random.Random(0)
    parts = ["'s", "'S", "'ll", "’t", " ", "  ", "\n", "\r\n", "\t", "\u0085", "\u00a0", "\u2028", "\ufeff", "\u200b",
             "\u180e", "undefined", "constructor", "__proto__", "<|endoftext|>", "\0", "3", "¾", "Ⅷ", "é", "e\u0301",
             "٣", "ß", "狐", "🦊",
             "👩‍👩‍👧", "\ud83e", "\udd8a", "a", "the", " The", "aaaaaaaa", "!", "?!", "--", "_", "\U000e0001", "ﬁ", "ǅ"]
    texts = ["".join(draw.choices(parts, k=draw.randrange(12))) for _ in range(3000)]
    texts += ["".join(chr(draw.choice([draw.randrange(0x80), draw.randrange(0x3000)])) for _ in range(20))
              for _ in range(1000)]
    texts += [*PROMPTS, "a" * 2000, " " * 2000, "ab" * 700]
    expected = [tokenizer.encode(text) for text in texts]
    actual = page.execute_script("return arguments[0].map(text => tokenizer.encode(JSON.parse(text)))",
                                 [json.dumps(text) for text in texts])
    for text, a, b in zip(texts, actual, expected):
        assert a == b, text
    decode = "return arguments[0].map(tokens => tokens.map(tokenizer.decoder()).join(''))"
    for text, decoded in zip(texts, page.execute_script(decode, expected)):
        assert decoded == tokenizer.decode(tokenizer.encode(text)), text


def test_int8_costs_less_than_a_thousandth_of_a_nat(page, trained):
    model, tokenizer, _ = checkpoint.load_model(trained / "out/tiny/ckpt.pt")
    tokens = torch.tensor(tokenizer.encode((ROOT / "README.md").read_text(encoding="utf-8"))[:17 * 30]).view(30, 17)
    with torch.no_grad():
        expected = model(tokens[:, :-1], tokens[:, 1:]).item()
    contexts = [row[:n].tolist() for row in tokens for n in range(1, 17)]
    logits = torch.tensor(page.execute_script(LOGITS, contexts))
    assert abs(F.cross_entropy(logits, tokens[:, 1:].flatten()).item() - expected) < 0.001


def test_the_same_seed_gives_the_same_story_in_every_browser(page):
    """The scripts use only exact operations, so that the same numbers come out everywhere."""
    script = (ROOT / "tools/formats/gpt.js").read_text(encoding="utf-8")
    functions = set(re.findall(r"Math\.(\w+)", re.sub("//.*", "", script)))
    assert functions == {"ceil", "floor", "imul", "max", "min", "sqrt"}
    assert "**" not in re.sub(r"//.*|2 \*\* 32", "", script)
    def hashed(h):  # the end of MurmurHash3
        h = (h & 0xFFFFFFFF ^ (h & 0xFFFFFFFF) >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16
    for seed, position in ((0, 1), (1, 2), (4294967295, 300)):
        draw = page.execute_script("return random(...arguments)", seed, position)
        assert draw == hashed(hashed(seed + 1) + position) / 2**32
    many = page.execute_script("return Array.from({length: 20000}, (_, i) => random(i % 20, Math.floor(i / 20)))")
    assert 0 <= min(many) and max(many) < 1
    for power in (1, 2):
        assert sum(x**power for x in many) / len(many) == pytest.approx(1 / (power + 1), abs=0.01)


def test_functions_are_exact(page):
    xs = [x / 7 for x in range(-140, 141)]
    exp, tanh, exact = page.execute_script("return [exp, geluTanh, geluExact].map(f => arguments[0].map(f))", xs)
    assert exp == pytest.approx([math.exp(x) for x in xs], rel=1e-9)
    for actual, approximate in ((tanh, "tanh"), (exact, "none")):
        expected = F.gelu(torch.tensor(xs, dtype=torch.float64), approximate=approximate)
        torch.testing.assert_close(torch.tensor(actual, dtype=torch.float64), expected, atol=1e-8, rtol=0)
    assert page.execute_script("return [exp(-1e9), geluTanh(-1e4), geluExact(-1e4), geluTanh(1e4), geluExact(1e4)]") \
        == [0, 0, 0, 1e4, 1e4]


def test_sampling(page):
    """Of the k most likely tokens, in proportion to e^(logit / temperature)."""
    counts = page.execute_script("""const counts = [0, 0, 0, 0]
        for (let i = 0; i < 20000; i++) counts[sample(Float64Array.of(1, 3, 2, 0), 3, 2, (i + 0.5) / 20000)]++
        return counts""")
    expected = torch.tensor([1.0, 3, 2, -math.inf]).div(2).softmax(0) * 20000
    assert counts == pytest.approx(expected.tolist(), abs=2)
    assert page.execute_script("return sample(Float64Array.of(1, 3, 3, 0), 200, 0, 0.9)") == 1


# ---- the page ----


def story(page):
    """Press the main button and wait for the story."""
    page.execute_script("$('write').click()")
    wait(page, "writing === null")
    return page.execute_script("return $('story').textContent")


def test_a_story(page):
    first = story(page)
    assert first.startswith("• Once upon a time") and len(first) > 60 and story(page) == first
    assert re.fullmatch(r"\d+ tokens, computed at \d+ tokens/s", page.execute_script("return $('status').textContent"))
    assert page.execute_script("return $('spoken').textContent") == first
    page.execute_script("$('again').click()")
    wait(page, "writing === null")
    assert page.execute_script("return $('story').textContent") != first
    assert page.execute_script("return $('seed').value") == "2"
    page.execute_script("$('openings').children[1].click()")
    wait(page, "writing === null")
    assert page.execute_script("return $('story').textContent").startswith("• One day, a girl")
    page.execute_script("$('temperature').value = '0'")
    likely = story(page)
    page.execute_script("$('seed').value = '7'")
    assert story(page) == likely  # not a matter of luck
    page.execute_script("$('temperature').value = ''; $('write').click()")
    assert page.execute_script("return writing") is None


def test_a_prompt_longer_than_the_context(page):
    status = page.execute_script("""$('prompt').value = 'Once upon a time. '.repeat(20); $('write').click()
        return $('status').textContent""")
    assert re.fullmatch(r"Writing. The model reads only the last \d+ tokens", status)
    wait(page, "writing === null")


def test_stop(page):
    page.execute_script("$('write').click(); $('write').click()")
    assert page.execute_script("return [$('status').textContent, $('write').textContent]") == ["Stopped", "Write"]
    length = page.execute_script("return tokens.length")
    page.execute_async_script("setTimeout(arguments[0], 50)")
    assert page.execute_script("return tokens.length") == length


def test_text_is_never_html(page):
    prompt = "<img src=x onerror=alert(1)></script><b>"
    page.execute_script("$('prompt').value = arguments[0]", prompt)
    assert story(page).startswith("• " + prompt)
    assert page.execute_script("return document.querySelectorAll('img, b').length") == 0
    assert "HTML" not in (ROOT / "tools/formats/page.html").read_text(encoding="utf-8")  # as in innerHTML
    facts = page.execute_script("return $('facts').innerText")
    assert "python -m tools.export out/tiny '<b>.html' --dtype int8" in facts
    for fact in ("11,648", "1,536 tokens of nursery-bpe300", "nats/token", "2 layers, 2 heads, width 16"):
        assert fact in facts


def test_another_word_with_the_keyboard(page):
    """Tab to the story, arrow keys to a word, Enter for the likely words, Tab and Enter to take one."""
    before = story(page)
    page.execute_script("$('seed').focus()")
    keys = page.switch_to.active_element
    keys.send_keys(Keys.TAB)
    word = page.switch_to.active_element
    assert word.get_attribute("role") == "button"
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ENTER):
        page.switch_to.active_element.send_keys(key)
    position = page.execute_script("return [...$('story').children].indexOf(document.activeElement)")
    prompt = page.execute_script("return [...$('story').children].filter(span => !span.role).length")
    assert position == prompt + 1
    rows = page.execute_script("return [...$('likely').children].map(row => row.innerText)")
    shares = [float(row.split("\n")[-1].strip("< %")) for row in rows]
    assert len(rows) in (8, 9) and shares[:8] == sorted(shares[:8], reverse=True) and sum(shares) <= 100.5
    heads = page.execute_script("return [...$('heads').children].map(label => label.textContent)")
    assert heads == ["all together", *(f"layer {i}, head {j}" for i, j in itertools.product((1, 2), (1, 2)))]
    page.execute_script("$('heads').querySelectorAll('input')[3].click()")
    shaded = page.execute_script("""return [...$('story').children].map(span => parseFloat(span.style.getPropertyValue(
        '--attention')) || 0)""")
    assert max(shaded[:position]) == pytest.approx(50) and max(shaded[position:]) == 0

    other = page.execute_script("return [...$('likely').children].findIndex(row => !row.ariaCurrent)")
    page.execute_script("$('likely').children[arguments[0]].click()", other)
    wait(page, "writing === null")
    after, tokens = page.execute_script("return [$('story').textContent, tokens]")
    assert after != before and page.execute_script("return $('likely').children.length") == len(rows)
    assert page.execute_script("return document.activeElement.textContent") in after


def test_attention_and_probabilities_are_those_of_the_model(page, trained):
    model, tokenizer, _ = checkpoint.load_model(trained / "out/tiny/ckpt.pt")
    story(page)
    tokens, start, attention, logits, rows = page.execute_script("""const at = tokens.length - 1, step = steps[at]
        return [tokens, step.start, step.attention.map(head => [...head]), [...step.logits], gpt.tokens]""")
    window = torch.tensor([tokens[start:-1]])
    seen = []
    def attend(q, k, v, cache):
        weights = (q @ k.mT * q.size(-1) ** -0.5 + torch.full((q.size(2), q.size(2)), -math.inf).triu(1)).softmax(-1)
        seen.extend(weights[0, :, -1])
        return weights @ v
    for block in model.transformer.h:
        block.attn.attend = attend
    with torch.no_grad():
        expected = model(window)[0, -1, rows]
    torch.testing.assert_close(torch.tensor(attention), torch.stack(seen), atol=0.01, rtol=0)
    torch.testing.assert_close(torch.tensor(logits), expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("width, scheme", [(360, "light"), (1100, "dark")])
def test_screens(page, width, scheme):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                         {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500})
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    story(page)
    page.execute_script("choose(tokens.length - 1)")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) > 384) == (scheme == "light")
    unlabelled = page.execute_script("""return [...document.querySelectorAll('input, textarea, button')].filter(
        it => !it.labels?.length && !it.textContent.trim()).map(it => it.outerHTML)""")
    assert unlabelled == []


def test_the_page_of_the_documentation(open_page):
    path = ROOT / "docs/stories.html"
    assert len(story(open_page(path))) > 100
    for name in ("linear.js", "gpt.js", "tokenizer.js"):  # python -m tools.export out/quickstart docs/stories.html
        assert (ROOT / "tools/formats" / name).read_text(encoding="utf-8") in path.read_text(encoding="utf-8"), name


# ---- what cannot be a page ----


def refused(here, run="out/edited"):
    with pytest.raises(NotExportable) as error:
        write_page(here / "page.html", SavedModel.load(run), "int8")
    assert not Path("page.html").exists() and "export to page.onnx instead" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
def test_an_edit_for_a_token_that_only_stories_have_is_refused(trained, here, monkeypatch):
    monkeypatch.setattr(GPT, "hidden_states", lambda self, idx, *args, hidden_states=GPT.hidden_states: hidden_states(
        self, idx, *args) + (idx == 7)[..., None] * torch.arange(16))
    tokenizer = trained_tokenizer(trained)
    model = random_run("out/edited", tokenizer, **EVEN)
    model.transformer.ln_f.bias += 10 * model.transformer.wte.weight[7]  # every story is "7 7 7 …"
    assert [7 in idx for idx in check_tokens(model, tokenizer.end_of_text, 25)] == [False, True]
    write_run(Path("out/edited"), model, tokenizer, overwrite=True)
    assert "its logits would differ by" in refused(here)


def test_other_parameters_are_refused(trained, here, monkeypatch):
    def untied(self, config, init=GPT.__init__):
        init(self, config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
    def with_scale(self, config, init=MLP.__init__):
        init(self, config)
        self.scale = nn.Parameter(torch.ones(1))
    for cls, init, name in ((GPT, untied, "lm_head"), (MLP, with_scale, "h.0.mlp.scale")):
        with monkeypatch.context() as patch:
            patch.setattr(cls, "__init__", init)
            random_run(f"out/{name}", trained_tokenizer(trained), **EVEN)
            assert f"gpt.js knows no parameter or buffer {name}" in refused(here, f"out/{name}")


def test_another_pattern_is_refused(trained, here):
    tokenizer = trained_tokenizer(trained)
    other = Tokenizer("other", r"\s+|\S+", tokenizer.ranks, tokenizer.special_tokens)
    random_run("out/edited", other, **EVEN)
    assert "another pattern than GPT-2's" in refused(here)


def test_weights_that_int8_cannot_hold_are_refused(trained, here, monkeypatch):
    monkeypatch.setattr(page_module, "INT8_TOLERANCE", 1e-4)
    assert "in int8, its logits would differ by 0.00" in refused(here, trained / "out/tiny")
    write_page(here / "page.html", SavedModel.load(trained / "out/tiny"), "float32")

"""The report page: hostile training text in every field, in a real browser where one is installed (apt install chromium)."""
import base64
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attribute import render

TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "report.html"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</title>"
STRANGE = "__REPORT_DATA__ ${alert(3)} \u202etxet desrever\u2066 \x00\x07\x1b \u2028\u2029 \ud800 ]]> --> <!--"
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def sample(n_cards=60, n_tokens=40, huge=0):
    """A report in which every text that comes from data is markup, and some are `huge` characters long."""
    bad, long = HOSTILE + STRANGE, HOSTILE + "w" * huge
    words = [" the", " cat", "\n", " sat", HOSTILE, " on", "\t", " mat", STRANGE, "x"]

    def entry(score):
        return dict(score=score, document=bad, source=HOSTILE, offset=123, text=[long, HOSTILE, bad], prototypes=[[3, 0.62], [7, 0.2]])

    def token(i):
        slices = [[(i * 3 + j * 7) % n_cards, 0.1 + 0.05 * j, (-1) ** j * (0.5 + 0.1 * j)] for j in range(8)]
        level = dict(proponents=[entry(0.0123), entry(0.004)], opponents=[entry(-0.0021)])
        return dict(text=words[i % 10], residual=1.25, logit=1.25 + sum(s[2] for s in slices), loss=0.3 * (i % 7), slices=slices,
                    influence=dict(token=level, document=level, source=dict(level, opponents=[])) if i % 4 == 1 else None)

    def card(i):
        return dict(id=i, label=f"word{i} {HOSTILE}", density=0 if i % 20 == 19 else 0.05 / (1 + i), gate=0.2 + i / 1e4, raised=[[bad, 2.5], [" cat", 1.0]],
                    lowered=[[HOSTILE, -1.5]], contexts=[dict(gate=0.6, quantile=q, document=bad, source=HOSTILE, text=[long if i < 3 else bad, HOSTILE, bad])
                                                         for q in (1.0, 0.9, 0.5, 0.1)], sources=[[bad, 0.4], [f"only in {i}", 0.2]], near=[[(i + 1) % n_cards, 0.4]])

    return dict(title="PRISM report", made="2026-11-21 10:00 UTC", run=[["parameters", "2,815,872"], [bad, long]], loss_png=PIXEL, loss_alt=bad,
                terms=dict(columns=["step", HOSTILE] + [f"column {i}" for i in range(12)], rows=[[i * 100, 5.4321] + [None] * 12 for i in range(5)]),
                health=dict(density=[0.05 / (1 + i) if i % 20 != 19 else 0.0 for i in range(n_cards)], spectrum=[9.0 / (1 + i) for i in range(32)], pairs=[[0, 1, 0.91], [2, 3, 0.8]]),
                texts=[dict(name=HOSTILE, tokens=[dict(text="The")] + [token(i) for i in range(1, n_tokens)]), dict(name=long, tokens=[dict(text=long)])],
                cards=[card(i) for i in range(n_cards)],
                gains=[dict(name=bad, behavior=HOSTILE, before=[long], after=[bad], table=dict(columns=[HOSTILE], rows=[[bad], [0.5]]), plot=PIXEL)],
                reproduce=["python data/prepare.py pydoc", "python train.py", HOSTILE])


EMPTY = dict(title="PRISM report", made="", run=[], loss_png=None, loss_alt="", terms=None, health=None, texts=[], cards=[], gains=None, reproduce=[])


class Browser:
    """Headless Chromium over --remote-debugging-pipe: JSON messages ended by NUL on descriptors 3 (in) and 4 (out), no package needed."""

    def __init__(self, chromium, profile):
        (child_in, self.w), (self.r, child_out) = os.pipe(), os.pipe()
        start = ("import fcntl, os, sys\nr, w = (fcntl.fcntl(int(a), fcntl.F_DUPFD_CLOEXEC, 10) for a in sys.argv[1:3])\n"
                 "os.dup2(r, 3)\nos.dup2(w, 4)\nos.execv(sys.argv[3], sys.argv[3:])")
        self.process = subprocess.Popen([sys.executable, "-c", start, str(child_in), str(child_out), chromium, "--headless=new", "--no-sandbox", "--disable-gpu",
                                         "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking", "--remote-debugging-pipe",
                                         f"--user-data-dir={profile}", "about:blank"], pass_fds=(child_in, child_out), stderr=subprocess.DEVNULL)
        os.close(child_in), os.close(child_out)
        self.buffer, self.count, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")

    def receive(self):
        until = time.monotonic() + 60
        while b"\0" not in self.buffer:
            if not select.select([self.r], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium did not answer within 60 seconds")
            chunk = os.read(self.r, 1 << 20)
            if not chunk:
                raise EOFError("Chromium ended early")
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(message)
        if message.get("method") == "Page.javascriptDialogOpening":  # or the page would wait for ever
            self.post("Page.handleJavaScriptDialog", accept=False)
        if "method" in message:
            self.events.append(message)
        return message

    def post(self, method, **params):
        self.count += 1
        message = dict(id=self.count, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        todo = json.dumps(message).encode() + b"\0"
        while todo:
            todo = todo[os.write(self.w, todo):]
        return self.count

    def call(self, method, **params):
        number = self.post(method, **params)
        while (message := self.receive()).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    def js(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def click(self, selector):
        """A real click in the middle of the first box of an element, once smooth scrolling that is under way has ended."""
        x, y = self.js(f"(async () => {{ let old = NaN; for (;;) {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center', behavior: 'instant'}});"
                       " const r = e.getClientRects()[0]; if (r.top === old) return [r.left + r.width / 2, r.top + r.height / 2]; old = r.top; await new Promise(done => setTimeout(done, 50)) } })()")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="none" if kind == "mouseMoved" else "left", clickCount=1)

    def open(self, url, width=1280, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        self.call("Page.navigate", url="about:blank")
        self.js("0")
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.receive()
        self.js("document.documentElement.style.scrollBehavior = 'auto'")

    def screenshot(self, path, full=True):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=full)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def complaints(self):
        """Dialogs, exceptions, console output, log entries (a refused fetch is one) and every request but the page and its data: pictures."""
        self.js("new Promise(done => setTimeout(done, 100))")
        told = [e for e in self.events if e["method"] in ("Page.javascriptDialogOpening", "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return told + [u for u in asked if not u.startswith(("data:", "file:")) or u.startswith("file:") and not u.split("#")[0].endswith(".html")]

    def close(self):
        try:
            self.session = None
            self.post("Browser.close")
            self.process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.r), os.close(self.w)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
    if not found:
        pytest.skip("no Chromium found; apt install chromium")
    b = Browser(found, tmp_path_factory.mktemp("profile"))
    yield b
    b.close()


@pytest.fixture
def page(browser, tmp_path):
    """open(data) writes the page and shows it; afterwards it must have complained of nothing and fetched nothing."""
    def show(data, anchor="", **kw):
        (tmp_path / "report.html").write_text(render(data), encoding="utf-8")
        browser.open((tmp_path / "report.html").as_uri() + anchor, **kw)
        return browser
    yield show
    assert browser.complaints() == []


def test_the_template_fetches_nothing_and_never_parses_data_as_markup():
    text = TEMPLATE.read_text(encoding="utf-8")
    assert text.count("__REPORT_DATA__") == 1
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket|import\(|<iframe|<link(?! rel=\"icon\" href=\"data:,\")", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|DOMParser|createContextualFragment", text)
    assert "default-src 'none'; img-src data:;" in text


def test_render_keeps_the_data_inside_its_script_and_whole():
    data = sample(n_cards=3, n_tokens=5)
    text = render(data)
    body = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(body) == data and not set("<>&\u2028\u2029") & set(body)
    assert text.count("</script>") == TEMPLATE.read_text(encoding="utf-8").count("</script>")
    with pytest.raises(ValueError):
        render(dict(EMPTY, run=[["loss", float("nan")]]))


def test_hostile_text_stays_text(page):
    b = page(sample())
    made = "[...document.querySelectorAll('body script')].length + ' ' + document.querySelectorAll('img:not([src^=\"data:image/\"]), [onerror], iframe, object, a:not([href^=\"#\"])').length"
    assert b.js(made) == "2 0"
    for part in ("run", "explorer", "cards", "interventions", "reproduce"):
        assert HOSTILE in b.js(f"document.getElementById('{part}').textContent"), part
    b.click(".tok.traced")
    assert HOSTILE in b.js("document.getElementById('influence').innerText")
    assert "\u202e" not in b.js("document.querySelector('main').textContent") and "⟨U+202E⟩" in b.js("document.querySelector('main').textContent")
    assert b.js(made) == "2 0" and b.js("document.title") == "PRISM report"


def test_the_ledger_adds_up_to_the_logit(page):
    data = sample()
    b = page(data)
    for i in (1, 9, 4):
        b.click(f".tok[data-i='{i}']")
        numbers = [float(x.replace("−", "-")) for x in b.js("[...document.querySelectorAll('#ledger .part .value')].map(e => e.textContent)")]
        assert len(numbers) == 9 and sum(numbers) == pytest.approx(data["texts"][0]["tokens"][i]["logit"], abs=0.01)
        assert b.js("document.getElementById('sum').textContent") == b.js("document.getElementById('logit').textContent") == f"+{sum(numbers):.3f}"
    assert "holds no training text" in b.js("document.getElementById('influence').innerText")
    b.click(".tok[data-i='0']")
    assert "first token" in b.js("document.getElementById('ledger').innerText")


def test_keys_move_select_and_clear(page):
    b = page(sample())
    current = "document.activeElement.dataset.i"
    b.js("document.querySelector('.tok[tabindex=\"0\"]').focus()")
    assert b.js(current) == "1"
    for key, at in (("ArrowRight", "2"), ("ArrowRight", "3"), ("ArrowLeft", "2"), ("End", "39"), ("ArrowRight", "39"), ("Home", "0"), ("ArrowLeft", "0")):
        b.key(key)
        assert b.js(current) == at, key
    b.key("ArrowDown")
    top = "(i => document.querySelector(`.tok[data-i='${i}']`).getClientRects()[0].top)"
    assert b.js(f"{top}({b.js(current)}) > {top}(0)")
    b.key("ArrowUp")
    assert b.js(current) == "0" and b.js("document.querySelectorAll('.tok[tabindex=\"0\"]').length") == 1
    b.key("ArrowRight"), b.key("Enter")
    assert b.js("document.querySelector('.tok[aria-selected=true]').dataset.i") == "1"
    assert "+0.0123 nats" in b.js("document.getElementById('influence').innerText")
    b.key("Escape")
    assert b.js("document.querySelectorAll('.tok[aria-selected=true]').length") == 0 and b.js("document.getElementById('influence').textContent") == ""


def test_a_slice_colours_the_tokens_and_levels_switch(page):
    data = sample()
    b = page(data)
    b.click(".tok[data-i='1']"), b.click("#ledger button")
    proto = int(b.js("document.getElementById('pick-proto').value"))
    b.js("(e => { e.value = 'contribution'; e.onchange({target: e}) })(document.getElementById('pick-mode'))")
    got = b.js("[...document.querySelectorAll('.tok')].map(e => [!!e.style.background, e.dataset.sign || '', e.style.borderBottom.includes('dashed')])")
    want = [next((s[2] for s in t.get("slices", []) if s[0] == proto), 0) for t in data["texts"][0]["tokens"]]
    assert any(want) and got == [[w != 0, "" if not w else "+" if w > 0 else "−", w < 0] for w in want]
    assert b.js("document.querySelectorAll('#influence li').length") == 3
    b.click("#influence input[value=source]")
    assert b.js("document.querySelectorAll('#influence li').length") == 2
    b.click("#influence a.proto")
    b.js("new Promise(done => setTimeout(done, 100))")  # hashchange comes after the click
    assert b.js("document.activeElement.id") == "proto-3" == b.js("document.querySelector('.card').id")


def test_cards_are_drawn_in_pages_searched_sorted_and_linked(page):
    b = page(sample(n_cards=1024), anchor="#proto-1000")
    ids = "[...document.querySelectorAll('.card')].map(e => +e.id.slice(6))"

    def put(name, value):
        b.js(f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('input')) }})(document.getElementById('{name}'))")
        return b.js(ids)
    assert b.js(ids)[0] == 1000 and len(b.js(ids)) == 24 and b.js("document.activeElement.id") == "proto-1000"
    b.click("#more")
    assert len(b.js(ids)) == 48
    assert put("search", "word77 ") == list(range(770, 780)) or 77 in b.js(ids)
    assert put("search", "#77") == [77] and "1 of 1,024" in b.js("document.getElementById('found').textContent")
    assert put("search", "IN 512") == [512] and put("search", "no such word") == []
    put("search", ""), put("sort", "gate")
    assert b.js(ids)[:2] == [1023, 1022] and put("filter", "dead")[-1] % 20 == 19 and put("sort", "id")[:2] == [19, 39]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll_and_text_can_be_read(page, scheme):
    b = page(sample(huge=1_000_000), width=360, scheme=scheme)
    b.click(".tok.traced"), b.click("#ledger button"), b.js("document.querySelector('details').open = true")
    assert b.js("document.documentElement.scrollWidth") <= 360 and b.js("innerWidth") == 360
    assert b.js("document.documentElement.scrollHeight") < 100_000
    # The contrast of every piece of text against the nearest background behind it, by the WCAG formula.
    worst = b.js("""(() => {
      const rgb = s => s.match(/[\\d.]+/g).map(Number), lum = c => c.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
      let worst = [99, ''];
      for (const e of document.querySelectorAll('body *:not(script):not(option)')) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;
        let back = e;
        while (back && (rgb(getComputedStyle(back).backgroundColor)[3] ?? 1) === 0) back = back.parentElement;
        const s = getComputedStyle(e), [a, b] = [lum(rgb(e.closest('svg') ? s.fill : s.color)), lum(rgb(getComputedStyle(back || document.body).backgroundColor))].sort((x, y) => y - x);
        const c = (a + .05) / (b + .05); if (c < worst[0]) worst = [c, e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40)];
      } return worst })()""")
    assert worst[0] >= 4.5, worst


@pytest.mark.parametrize("data", [EMPTY, {}, {k: None for k in EMPTY}])
def test_an_empty_report_says_what_makes_each_part(page, data):
    text = page(data).js("document.querySelector('main').innerText")
    assert all(c in text for c in ("train.py", "attribute.py index", "attribute.py report", "attribute.py cards"))
    assert "Interventions" not in text and "undefined" not in text and "null" not in text


def test_the_template_alone_says_what_it_is(browser):
    browser.open(TEMPLATE.as_uri())
    assert "template" in browser.js("document.getElementById('broken').innerText") and browser.complaints() == []

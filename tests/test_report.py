"""The report: what it reads from a run, and the page with hostile training text in every field.

The page is tested in a real browser where one is installed (apt install chromium).
"""
import base64
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import report
from attribute import Index
from common import load_checkpoint
from prism import UserError
from report import render

TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "report.html"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</title>"
STRANGE = ("__REPORT_DATA__ ${alert(3)} \u202etxet desrever\u2066 \x00\x07\x1b \u2028\u2029 "
           "\ud800 ]]> --> <!--")
PIXEL = ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDw"
         "AChwGA60e6kgAAAABJRU5ErkJggg==")


def sample(n_cards=60, n_tokens=40, huge=0):
    """A report in which every text from data is markup, and some are `huge` characters long."""
    bad, long = HOSTILE + STRANGE, HOSTILE + "w" * huge
    words = [" the", " cat", "\n", " sat", HOSTILE, " on", "\t", " mat", STRANGE, "x"]

    def entry(score):
        return dict(score=score, document=bad, source=HOSTILE, offset=123,
                    text=[long, HOSTILE, bad], prototypes=[[3, 0.62], [7, 0.2]])

    def token(i):
        slices = []
        for j in range(8):
            slices.append([(i * 3 + j * 7) % n_cards, 0.1 + 0.05 * j, (-1) ** j * (0.5 + 0.1 * j)])
        level = dict(proponents=[entry(0.0123), entry(0.004)], opponents=[entry(-0.0021)])
        levels = dict(token=level, document=level, source=dict(level, opponents=[]))
        return dict(text=words[i % 10], residual=1.25, logit=1.25 + sum(s[2] for s in slices),
                    loss=0.3 * (i % 7), slices=slices, influence=levels if i % 4 == 1 else None)

    def density(i):
        return 0 if i % 20 == 19 else 0.05 / (1 + i)

    def card(i):
        contexts = [dict(gate=0.6, quantile=q, document=bad, source=HOSTILE,
                         text=[long if i < 3 else bad, HOSTILE, bad]) for q in (1.0, 0.9, 0.5, 0.1)]
        return dict(id=i, label=f"word{i} {HOSTILE}", density=density(i), gate=0.2 + i / 1e4,
                    raised=[[bad, 2.5], [" cat", 1.0]], lowered=[[HOSTILE, -1.5]],
                    contexts=contexts, sources=[[bad, 0.4], [f"only in {i}", 0.2]],
                    near=[[(i + 1) % n_cards, 0.4]])

    tokens = [dict(text="The")] + [token(i) for i in range(1, n_tokens)]
    return dict(title="PRISM report",
                run=[["parameters", "2,815,872"], [bad, long]],
                loss_png=PIXEL,
                health=dict(density=[density(i) for i in range(n_cards)],
                            spectrum=[9.0 / (1 + i) for i in range(32)]),
                texts=[dict(name=HOSTILE, tokens=tokens),
                       dict(name=long, tokens=[dict(text=long)])],
                cards=[card(i) for i in range(n_cards)],
                gains=[dict(name=bad, behavior=HOSTILE, before=[long], after=[bad], plot=PIXEL)])


EMPTY = dict(title="PRISM report", run=[], loss_png=None, health=None, texts=[], cards=[], gains=[])


# ------------------------------------------- what the report reads from a run

ROWS = """step,tokens,ce,rec,t2p,p2t,val_ce,val_ce_prototypes,residual_share
5,1000000,5.5,0.5,0.4,0.6,5.25,5.4,0.2
10,2000000,4.5,0.4,0.3,0.5,4.75,5.0,0.1
"""
DENSE = """step,tokens,ce,rec,t2p,p2t,val_ce,val_ce_prototypes,residual_share
10,2000000,4.4,,,,4.625,,
"""


def sweep_of(out, **changes):
    """A file as suppress.py sweep writes, for the weights in out."""
    row = dict(size=4, setting=HOSTILE, loss_percent=0.1, rate=0.5, control_loss_percent=0.2,
               control_rate=0.9)
    rows = [dict(row, mode=mode) for mode in ("shared", "fit", "chosen")]
    sweep = dict(behavior=r"$\frac{" + HOSTILE, price=0.25, rows=rows,
                 checkpoint=Index(out, "cpu").run.hash, before=[[3, HOSTILE], [2, HOSTILE]],
                 after=[[0, STRANGE]])
    return sweep | changes


def write_sweep(out, text):
    (out / "gains").mkdir(exist_ok=True)
    (out / "gains/cat.sweep.json").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def out(made, tmp_path_factory):
    """A copy of the tiny run with its index, a dense twin's losses, a sweep, and the report."""
    out = tmp_path_factory.mktemp("report") / "out"
    shutil.copytree(made, out)
    out.with_name("out-dense").mkdir()
    (out / "metrics.csv").write_text(ROWS)
    (out.with_name("out-dense") / "metrics.csv").write_text(DENSE)
    write_sweep(out, json.dumps(sweep_of(out)))
    report.main([f"--out_dir={out}", "--prompt=the <cat", "--device=cpu"])
    return out


@pytest.fixture(scope="module")
def data(out):
    text = (out / "report.html").read_text("utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_the_report_is_written_whole_with_its_plots(out, data):
    assert not list(out.rglob("*.tmp"))
    for name, address in (("loss.png", data["loss_png"]),
                          ("gains/cat.png", data["gains"][0]["plot"])):
        png = (out / name).read_bytes()
        assert png[:4] == b"\x89PNG"
        assert base64.b64decode(address.removeprefix("data:image/png;base64,")) == png
    facts = dict(data["run"])
    assert facts["validation loss"].startswith("4.75")
    assert facts["validation loss, dense twin"].startswith("4.625")
    gains = data["gains"][0]
    assert gains["name"] == "cat" and gains["behavior"].endswith(": rate 50.0%, loss +0.10%")
    assert gains["before"] == [f"3 matches: {HOSTILE}", f"2 matches: {HOSTILE}"]


def test_the_dense_twin_is_on_the_same_axes(tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text(ROWS)
    (tmp_path / "dense.csv").write_text(DENSE)
    rows, twin = (report.read_metrics(tmp_path / n) for n in ("metrics.csv", "dense.csv"))
    assert rows[1]["val_ce"] == 4.75 and twin[0]["rec"] is None
    assert report.read_metrics(tmp_path / "nowhere.csv") == []
    monkeypatch.setattr(report, "save_plot", lambda fig, path: fig)
    left, right = report.draw_loss(None, rows, twin).axes
    curves = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in left.lines}
    assert curves["val_ce"] == (1, 2, 5.25, 4.75) and curves[report.TWIN] == (2, 4.625)
    assert len(left.lines) == len(right.lines) == 4
    assert len(report.draw_loss(None, rows, []).axes[0].lines) == 3
    assert report.draw_loss(None, [], twin) is None
    (tmp_path / "dense.csv").write_text(DENSE.replace("4.4", "x"))
    with pytest.raises(UserError, match="dense.csv"):
        report.read_metrics(tmp_path / "dense.csv")


def test_ledgers_and_influence_in_the_page_add_up(out, data):
    index = Index(out, "cpu")
    mine, held_out = data["texts"]
    assert "".join(t["text"] for t in mine["tokens"]).startswith("the <cat")
    assert held_out["name"] == "held out: held out" and len(held_out["tokens"]) == 17
    for text in data["texts"]:
        for t in text["tokens"][1:]:
            parts = t["residual"] + sum(s[2] for s in t["slices"])
            assert parts == pytest.approx(t["logit"], abs=1e-4)
    # the fourth token of the prompt, predicted from the three before it
    r = index.target_records(list(b"the "), 3)
    scores = index.token_scores(index.solve(index.right_side(r)[None]))[0]
    behind = mine["tokens"][3]["influence"]
    for level in ("token", "document", "source"):
        units = np.sort(index.sums(scores, level))
        shown = [[e["score"] for e in behind[level][s]] for s in ("proponents", "opponents")]
        assert shown[0] == pytest.approx([x for x in units[::-1][:5] if x > 0], rel=1e-4)
        assert shown[1] == pytest.approx([x for x in units[:5] if x < 0], rel=1e-4)
    # two sources: together they are all of the text
    total = sum(e["score"] for side in behind["source"].values() for e in side)
    assert total == pytest.approx(scores.sum(), rel=1e-3, abs=1e-6)
    for e in behind["token"]["proponents"]:
        assert e["text"][1] == index.run.decode([index.run.train[e["position"]]])
        assert len(e["text"]) == 3 and e["document"] in index.run.titles


def test_cards_against_plain_loops(out, data):
    index = Index(out, "cpu")
    model, _ = load_checkpoint(out)
    P, W = model.prototypes.detach(), model.W.detach()
    assert sorted(c["id"] for c in data["cards"]) == list(range(len(P)))
    assert data["health"]["spectrum"] == pytest.approx(torch.linalg.svdvals(P).tolist(), rel=1e-4)
    for card in data["cards"]:
        i = card["id"]
        fires = [(s, j) for s, j in np.argwhere(index.ids == i) if index.gates[s, j] > 0]
        gates = sorted((float(index.gates[s, j]) for s, j in fires), reverse=True)
        share = len(gates) / len(index.positions)
        assert card["density"] == data["health"]["density"][i] == pytest.approx(share)
        if not gates:
            assert card["contexts"] == [] and card["gate"] == 0
            continue
        assert card["gate"] == pytest.approx(np.mean(gates), rel=1e-3)
        assert [c["gate"] for c in card["contexts"]][:4] == pytest.approx(gates[:4])
        sources = dict(card["sources"])
        assert sum(sources.values()) == pytest.approx(1)
        for text, logit in card["raised"]:
            want = P[i] @ (W[text.encode()[0]] - W.mean(0)) if len(text.encode()) == 1 else 0
            assert logit == 0 or logit == pytest.approx(float(want), abs=1e-3)
        near = torch.cosine_similarity(P[i], P[card["near"][0][0]], dim=0).item()
        assert card["near"][0][1] == pytest.approx(near, abs=1e-4)
    assert any(card["label"] for card in data["cards"])


def test_a_label_is_the_log_odds_of_its_words():
    cards = report.Cards.__new__(report.Cards)
    cards.at_large = report.Counter(cat=10, dog=10, the=980)
    words = report.Counter(cat=20, the=80)

    def z(y, b, n=100, N=1003, K=50):
        a = K * (b + 1) / N
        odds = [(y + a) / (n + K - y - a), (b + a) / (N + K - b - a)]
        return math.log(odds[0] / odds[1]) / math.sqrt(1 / (y + a) + 1 / (b + a))
    assert z(20, 10) > 1.96 > z(80, 980)
    assert cards.label(words) == "cat"
    assert cards.label(report.Counter()) == ""
    assert cards.label(report.Counter(dog=3, cat=9, new=4)).split()[0] == "cat"
    cards.at_large = report.Counter()
    assert cards.label(report.Counter(word=5)) == ""


def test_a_damaged_sweep_is_one_line(out):
    good = (out / "gains/cat.sweep.json").read_text("utf-8")
    run = Index(out, "cpu").run
    damaged = ["{", "[]", "null", "9" * 5000, "[" * 100_000, json.dumps({"checkpoint": run.hash})]
    for change in (dict(rows=[3]), dict(rows=3), dict(price={}), dict(behavior=3), dict(before=3)):
        damaged.append(json.dumps(sweep_of(out, **change)))
    try:
        for text in damaged:
            write_sweep(out, text)
            with pytest.raises(UserError, match="cat.sweep.json .*suppress.py sweep"):
                report.interventions(run)
        write_sweep(out, json.dumps(sweep_of(out, checkpoint="another")))
        assert report.interventions(run) == []
    finally:
        write_sweep(out, good)


# ------------------------------------------- the page in a browser

class Browser:
    """Headless Chromium over --remote-debugging-pipe, without a package.

    JSON messages, each ended by NUL, on its descriptors 3 (in) and 4 (out).
    """

    START = ("import fcntl, os, sys\n"
             "r, w = (fcntl.fcntl(int(a), fcntl.F_DUPFD_CLOEXEC, 10) for a in sys.argv[1:3])\n"
             "os.dup2(r, 3)\n"
             "os.dup2(w, 4)\n"
             "os.execv(sys.argv[3], sys.argv[3:])")
    OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--no-first-run", "--disable-background-networking", "--remote-debugging-pipe")

    def __init__(self, chromium, profile):
        (child_in, self.w), (self.r, child_out) = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.START, str(child_in), str(child_out), chromium,
             *self.OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(child_in, child_out), stderr=subprocess.DEVNULL)
        os.close(child_in)
        os.close(child_out)
        self.buffer, self.count, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
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
        if message.get("method") == "Page.javascriptDialogOpening":  # or the page would wait
            self.post("Page.handleJavaScriptDialog", accept=False)
        if "method" in message:
            self.events.append(message)
        return message

    def post(self, method, **params):
        self.count += 1
        message = dict(id=self.count, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
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
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def click(self, selector):
        """A real click in the middle of an element's first box, once no scrolling is going on."""
        x, y = self.js("""(async () => {
          let old = NaN;
          for (;;) {
            const e = document.querySelector(%s);
            e.scrollIntoView({block: "center", behavior: "instant"});
            const r = e.getClientRects()[0];
            if (r.top === old) return [r.left + r.width / 2, r.top + r.height / 2];
            old = r.top;
            await new Promise(done => setTimeout(done, 50));
          } })()""" % json.dumps(selector))
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def open(self, url, width=1280, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800,
                  deviceScaleFactor=1, mobile=False)
        scheme = dict(name="prefers-color-scheme", value=scheme)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
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
        """Dialogs, exceptions, console and log entries, requests but the page and its pictures."""
        self.js("new Promise(done => setTimeout(done, 100))")
        bad = ("Page.javascriptDialogOpening", "Runtime.exceptionThrown",
               "Runtime.consoleAPICalled", "Log.entryAdded")
        found = [e for e in self.events if e["method"] in bad]
        for e in self.events:
            if e["method"] == "Network.requestWillBeSent":
                url = e["params"]["request"]["url"]
                page = url.startswith("file:") and url.split("#")[0].endswith(".html")
                found += [] if page or url.startswith("data:") else [url]
        return found

    def close(self):
        try:
            self.session = None
            self.post("Browser.close")
            self.process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.r)
        os.close(self.w)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("no Chromium found; apt install chromium")
    b = Browser(found, tmp_path_factory.mktemp("profile"))
    yield b
    b.close()


@pytest.fixture
def page(browser, tmp_path):
    """open(data) writes the page and shows it; it must complain of nothing and fetch nothing."""
    def show(data, anchor="", **kw):
        (tmp_path / "report.html").write_text(render(data), encoding="utf-8")
        browser.open((tmp_path / "report.html").as_uri() + anchor, **kw)
        return browser
    yield show
    assert browser.complaints() == []


def text_of(b, name):
    return b.js(f"document.getElementById('{name}').textContent")


def shown_text(b, name):
    return b.js(f"document.getElementById('{name}').innerText")


def test_the_template_fetches_nothing_and_never_parses_data_as_markup():
    text = TEMPLATE.read_text(encoding="utf-8")
    assert text.count("__REPORT_DATA__") == 1
    fetches = (r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket|import\(|<iframe"
               r"|<link(?! rel=\"icon\" href=\"data:,\")")
    parses = (r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function"
              r"|srcdoc|DOMParser|createContextualFragment")
    assert not re.search(fetches, text) and not re.search(parses, text)
    assert "default-src 'none'; img-src data:;" in text


def test_render_keeps_the_data_inside_its_script_and_whole():
    data = sample(n_cards=3, n_tokens=5)
    text = render(data)
    body = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(body) == data and not set("<>&\u2028\u2029") & set(body)
    assert text.count("</script>") == TEMPLATE.read_text(encoding="utf-8").count("</script>")
    with pytest.raises(ValueError):
        render(dict(EMPTY, run=[["loss", float("nan")]]))


MARKUP = """[...document.querySelectorAll('body script')].length + ' ' +
  document.querySelectorAll('img:not([src^="data:image/"]), [onerror], iframe, object,' +
                            'a:not([href^="#"])').length"""


def test_hostile_text_stays_text(page):
    b = page(sample())
    assert b.js(MARKUP) == "2 0"
    for part in ("run", "explorer", "cards", "interventions"):
        assert HOSTILE in text_of(b, part), part
    b.click(".tok.traced")
    assert HOSTILE in shown_text(b, "influence")
    whole = b.js("document.querySelector('main').textContent")
    assert "\u202e" not in whole and "⟨U+202E⟩" in whole
    assert b.js(MARKUP) == "2 0" and b.js("document.title") == "PRISM report"


def test_the_page_of_a_run_draws_every_part(browser, out):
    browser.open((out / "report.html").as_uri())
    assert browser.js(MARKUP) == "2 0"
    for part in ("run", "health", "explorer", "cards", "interventions"):
        assert not browser.js(f"document.getElementById('{part}').hidden"), part
    assert browser.js("document.querySelectorAll('img').length") == 2
    assert browser.js("[...document.querySelectorAll('img')].every(i => i.naturalWidth > 100)")
    browser.click(".tok[data-i='2']")
    assert "nats" in shown_text(browser, "influence")
    assert text_of(browser, "sum") == text_of(browser, "logit")
    assert browser.complaints() == []


def test_the_ledger_adds_up_to_the_logit(page):
    data = sample()
    b = page(data)
    values = "[...document.querySelectorAll('#ledger .part .value')].map(e => e.textContent)"
    for i in (1, 9, 4):
        b.click(f".tok[data-i='{i}']")
        numbers = [float(x.replace("−", "-")) for x in b.js(values)]
        logit = data["texts"][0]["tokens"][i]["logit"]
        assert len(numbers) == 9 and sum(numbers) == pytest.approx(logit, abs=0.01)
        assert text_of(b, "sum") == text_of(b, "logit") == f"+{sum(numbers):.3f}"
    assert "holds no training text" in shown_text(b, "influence")
    b.click(".tok[data-i='0']")
    assert "first token" in shown_text(b, "ledger")


def test_keys_move_select_and_clear(page):
    b = page(sample())
    current = "document.activeElement.dataset.i"
    b.js("document.querySelector('.tok[tabindex=\"0\"]').focus()")
    assert b.js(current) == "1"
    for key, at in (("ArrowRight", "2"), ("ArrowRight", "3"), ("ArrowLeft", "2"), ("End", "39"),
                    ("ArrowRight", "39"), ("Home", "0"), ("ArrowLeft", "0")):
        b.key(key)
        assert b.js(current) == at, key
    b.key("ArrowDown")
    top = "(i => document.querySelector(`.tok[data-i='${i}']`).getClientRects()[0].top)"
    assert b.js(f"{top}({b.js(current)}) > {top}(0)")
    b.key("ArrowUp")
    assert b.js(current) == "0"
    assert b.js("document.querySelectorAll('.tok[tabindex=\"0\"]').length") == 1
    b.key("ArrowRight")
    b.key("Enter")
    assert b.js("document.querySelector('.tok[aria-selected=true]').dataset.i") == "1"
    assert "+0.0123 nats" in shown_text(b, "influence")
    b.key("Escape")
    assert b.js("document.querySelectorAll('.tok[aria-selected=true]').length") == 0
    assert text_of(b, "influence") == ""


def test_a_slice_colours_the_tokens_and_levels_switch(page):
    data = sample()
    b = page(data)
    b.click(".tok[data-i='1']")
    b.click("#ledger button")
    proto = int(b.js("document.getElementById('pick-proto').value"))
    b.js("(e => { e.value = 'contribution'; e.onchange({target: e}) })"
         "(document.getElementById('pick-mode'))")
    got = b.js("""[...document.querySelectorAll('.tok')].map(e => [
      !!e.style.background, e.dataset.sign || '', e.style.borderBottom.includes('dashed')])""")
    want = []
    for t in data["texts"][0]["tokens"]:
        share = next((s[2] for s in t.get("slices", []) if s[0] == proto), 0)
        sign = "" if not share else "+" if share > 0 else "−"
        want.append([share != 0, sign, share < 0])
    assert any(x[0] for x in want) and got == want
    assert b.js("document.querySelectorAll('#influence li').length") == 3
    b.click("#influence input[value=source]")
    assert b.js("document.querySelectorAll('#influence li').length") == 2
    b.click("#influence a.proto")
    b.js("new Promise(done => setTimeout(done, 100))")  # hashchange comes after the click
    assert b.js("document.activeElement.id") == "proto-3"
    assert b.js("document.querySelector('.card').id") == "proto-3"


def test_cards_are_drawn_in_pages_searched_sorted_and_linked(page):
    b = page(sample(n_cards=1024), anchor="#proto-1000")
    ids = "[...document.querySelectorAll('.card')].map(e => +e.id.slice(6))"

    def put(name, value):
        b.js("(e => { e.value = %s; e.dispatchEvent(new Event('input')) })"
             "(document.getElementById('%s'))" % (json.dumps(value), name))
        return b.js(ids)
    assert b.js(ids)[0] == 1000 and len(b.js(ids)) == 24
    assert b.js("document.activeElement.id") == "proto-1000"
    b.click("#more")
    assert len(b.js(ids)) == 48
    assert sorted(put("search", "word77 ")) == [77, *range(770, 780)]
    assert put("search", "#77") == [77]
    assert "1 of 1,024" in text_of(b, "found")
    assert put("search", "IN 512") == [512] and put("search", "no such word") == []
    put("search", "")
    assert put("sort", "gate")[:2] == [1023, 1022]
    assert put("filter", "dead")[-1] % 20 == 19 and put("sort", "id")[:2] == [19, 39]


# The lowest contrast of a piece of text against the nearest background, by the WCAG formula.
CONTRAST = r"""(() => {
  const rgb = s => s.match(/[\d.]+/g).map(Number);
  const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const lum = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  let worst = [99, ''];
  for (const e of document.querySelectorAll('body *:not(script):not(option)')) {
    const text = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!text || !e.checkVisibility()) continue;
    let back = e;
    while (back && (rgb(getComputedStyle(back).backgroundColor)[3] ?? 1) === 0)
      back = back.parentElement;
    const s = getComputedStyle(e), ground = getComputedStyle(back || document.body);
    const pair = [rgb(e.closest('svg') ? s.fill : s.color), rgb(ground.backgroundColor)];
    const [a, b] = pair.map(lum).sort((x, y) => y - x), c = (a + .05) / (b + .05);
    if (c < worst[0]) worst = [c, e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40)];
  }
  return worst })()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll_and_text_can_be_read(page, scheme):
    b = page(sample(huge=200_000), width=360, scheme=scheme)
    b.click(".tok.traced")
    b.click("#ledger button")
    b.js("document.querySelector('details').open = true")
    assert b.js("document.documentElement.scrollWidth") <= 360 and b.js("innerWidth") == 360
    assert b.js("document.documentElement.scrollHeight") < 100_000
    worst = b.js(CONTRAST)
    assert worst[0] >= 4.5, worst


@pytest.mark.parametrize("data", [EMPTY, {}, {k: None for k in EMPTY}])
def test_an_empty_report_says_what_makes_each_part(page, data):
    text = page(data).js("document.querySelector('main').innerText")
    assert all(c in text for c in ("train.py", "attribute.py index", "report.py"))
    assert "Interventions" not in text and "undefined" not in text and "null" not in text


def test_the_template_alone_says_what_it_is(browser):
    browser.open(TEMPLATE.as_uri())
    assert "template" in shown_text(browser, "broken") and browser.complaints() == []

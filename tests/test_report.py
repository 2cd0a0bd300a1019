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
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import report
from attribute import Index
from common import load_checkpoint
from prism import Edit, UserError
from report import render
from sample import gate_ledger, largest_parts

TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "report.html"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</title>"
STRANGE = ("__REPORT_DATA__ ${alert(3)} \u202etxet desrever\u2066 \x00\x07\x1b \u2028\u2029 "
           "\ud800 ]]> --> <!--")
KINDS = ["space", "number", "code", "punctuation", "function word", "name", "word piece",
         "content word"]


def sweep_rows(*names):
    """Rows as suppress.py sweep writes them: effect and prices grow with the strength."""
    def effects(strength, slope):
        found = {name: [slope * strength, 0.9 * slope * strength, 1.2 * slope * strength]
                 for name in names}
        if "rate" in found:
            value, low, high = found["rate"]
            found["rate"] = [1 - value / 2, 1 - high / 2, 1 - low / 2]
        return found
    return [dict(strength=x, edit=effects(x, 0.5), control=effects(x, 0.125))
            for x in (0.5, 1.0, 2.0)]


def sample(n_cards=60, n_tokens=40, huge=0):
    """A report in which every text from data is markup, and some are `huge` characters long."""
    bad, long = HOSTILE + STRANGE, HOSTILE + "w" * huge
    words = [" the", " cat", "\n", " sat", HOSTILE, " on", "\t", " mat", STRANGE, "x"]

    def entry(score):
        return dict(score=score, document=bad, source=HOSTILE, offset=123,
                    text=[long, HOSTILE, bad], prototypes=[[3, 0.62], [7, 0.2]])

    def token(i):
        given = [0.1 + 0.05 * j for j in range(8)]
        parts = [(-1) ** j * (0.5 + 0.1 * j) for j in range(8)]
        level = dict(proponents=[entry(0.0123), entry(0.004)], opponents=[entry(-0.0021)])
        levels = dict(token=level, document=level, source=dict(level, opponents=[]))
        read = [[0, -0.25], [i - 1, 0.125], [999, 1]]
        ledger = [["mlp 1", 0.25, []], [HOSTILE, -0.125, read]]
        protos = [(i * 3 + j * 7) % n_cards for j in range(8)]
        why = {str(i): ledger for i in protos[5:]}
        return dict(text=words[i % 10], residual=1.25, logit=1.25 + sum(parts), loss=0.3 * (i % 7),
                    prototypes=protos, gates=given, contributions=parts,
                    parts=why, influence=levels if i % 4 == 1 else None)

    def density(i):
        return 0 if i % 20 == 19 else 0.05 / (1 + i)

    def kinds(i):  # every ninth is mixed
        counts = [5] * 8
        counts[i % 9 % 8] += 0 if i % 9 == 8 else 40
        return counts if density(i) else [0] * 8

    def card(i):
        contexts = [dict(gate=0.6, document=bad, text=[long if i < 3 else bad, HOSTILE, bad])
                    for _ in range(4)]
        sources = [[f"only in {i}", 0.9]] if i % 5 == 0 else [[bad, 0.4], [f"only in {i}", 0.2]]
        return dict(id=i, label=f"word{i} {HOSTILE}", gate=0.2 + i / 1e4, place=[i % 8, i // 8],
                    kinds=kinds(i), raised=[[bad, 2.5], [" cat", 1.0]], lowered=[[HOSTILE, 1.5]],
                    contexts=contexts, sources=sources, near=[(i + 1) % n_cards])

    tokens = [dict(text="The")] + [token(i) for i in range(1, n_tokens)]
    sweep = dict(behavior=HOSTILE, price=0.25, kl=0.02, before=[[3, long]], after=[[0, bad]])
    rows = sweep_rows("rate", "rise", "loss", "benign", "kl")
    source = sweep | dict(name="a source", rows=sweep_rows("rise", "loss", "kl"), detectors=[])
    return dict(title="PRISM report",
                run={"parameters": 2815872, bad: long},
                metrics={"this run": ROWS, "its dense twin": DENSE},
                health=dict(density=[density(i) for i in range(n_cards)],
                            spectrum=[9.0 / (1 + i) for i in range(32)]),
                kinds=KINDS, function_words="the a",
                texts=[dict(name=HOSTILE, prompt=2, tokens=tokens),
                       dict(name=long, prompt=0, tokens=[dict(text=long)])],
                cards=[card(i) for i in range(n_cards)],
                gains=[sweep | dict(name=bad, rows=rows, detectors=[[3, 0.75], [1, -0.5]]),
                       source])


EMPTY = dict(title="PRISM report", run={}, metrics={}, health=None, kinds=KINDS, function_words="",
             texts=[], cards=[], gains=[])
ROWS = """step,tokens,ce,rec,t2p,p2t,val_ce,val_ce_prototypes,residual_share
5,1000000,5.5,0.5,0.4,0.6,5.25,5.4,0.2
10,2000000,4.5,0.4,0.3,0.5,4.75,5.0,0.1
"""
DENSE = """step,tokens,ce,rec,t2p,p2t,val_ce,val_ce_prototypes,residual_share
5,1000000,5.4,,,,,,
10,2000000,4.4,,,,4.625,,
"""


# ------------------------------------------- what the report reads from a run

def sweep_of(out, **changes):
    """A file as suppress.py sweep writes, for the weights in out."""
    rows = sweep_rows("rate", "rise", "loss", "benign", "kl")
    sweep = dict(behavior=r"$\frac{" + HOSTILE, price=0.25, kl=0.02, rows=rows,
                 checkpoint=Index(out, "cpu").run.hash, before=[[3, HOSTILE], [2, HOSTILE]],
                 after=[[0, STRANGE]])
    return sweep | changes


def write_sweep(out, text):
    (out / "gains/cat.sweep.json").write_text(text, encoding="utf-8")


def write_gains(out):
    """Two directions that share prototype 4, and a gain."""
    (out / "gains").mkdir()
    run = Index(out, "cpu").run
    u = [0.0] * run.model.config.n_embd
    content = dict(checkpoint=run.hash, ids=[7], gains=[0.25],
                   directions=[dict(ids=[4, 2], weights=[0.5, -1.5], threshold=0.1, direction=u),
                               dict(ids=[4], weights=[0.5], threshold=0.1, direction=u)])
    (out / "gains/cat.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def out(made, tmp_path_factory):
    """A copy of the tiny run with its index, a dense twin's losses, a sweep, and the report."""
    out = tmp_path_factory.mktemp("report") / "out"
    shutil.copytree(made, out)
    out.with_name("out-dense").mkdir()
    (out / "metrics.csv").write_text(ROWS)
    (out.with_name("out-dense") / "metrics.csv").write_text(DENSE)
    write_gains(out)
    write_sweep(out, json.dumps(sweep_of(out)))
    report.main([f"--out_dir={out}", "--prompt=the <cat", "--device=cpu"])
    return out


@pytest.fixture(scope="module")
def data(out):
    text = (out / "report.html").read_text("utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_the_report_is_written_whole_with_its_plot_and_labels(out, data):
    assert not list(out.rglob("*.tmp"))
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert data["metrics"] == {"this run": ROWS, "its dense twin": DENSE}
    assert data["run"]["n_proto"] == 12 and data["run"]["steps"] == 135
    gains, = data["gains"]
    assert gains["name"] == "cat" and len(gains["rows"]) == 3
    assert gains["detectors"] == [[2, -1.5], [4, 1.0], [7, -0.75]]
    assert gains["before"] == [[3, HOSTILE], [2, HOSTILE]]
    labels = json.loads((out / "labels.json").read_text("utf-8"))
    assert labels["checkpoint"] == Index(out, "cpu").run.hash
    assert labels["labels"] == {str(card["id"]): card["label"] for card in data["cards"]}
    assert len(labels["labels"]) == 12
    assert all(card["label"] for card in data["cards"])


def test_the_dense_twin_is_on_the_same_axes(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert report.draw_loss(out) == {} and not out.exists()
    for folder, text in ((out, ROWS), (tmp_path / "out-dense", DENSE)):
        folder.mkdir()
        (folder / "metrics.csv").write_text(text)
    drawn = []
    monkeypatch.setattr(report.Figure, "savefig", lambda fig, *_, **__: drawn.extend(fig.axes))
    assert report.draw_loss(out) == {"this run": ROWS, "its dense twin": DENSE}
    mine, twin = drawn[0].lines
    assert list(mine.get_xdata()) == [1, 2] and list(mine.get_ydata()) == [5.25, 4.75]
    assert list(twin.get_ydata())[1] == 4.625 and np.isnan(twin.get_ydata()[0])
    for text in (DENSE.replace("val_ce,", "x,"), DENSE + "1,2\n"):
        (tmp_path / "out-dense" / "metrics.csv").write_text(text)
        with pytest.raises(UserError, match="metrics.csv"):
            report.draw_loss(out)


def test_ledgers_and_influence_in_the_page_add_up(out, data):
    index = Index(out, "cpu")
    mine, held_out = data["texts"]
    text = "".join(t["text"] for t in mine["tokens"])
    assert text.startswith("the <cat") and mine["prompt"] == 8 and len(mine["tokens"]) == 17
    again = index.run.model.generate(torch.tensor([list(b"the <cat")]), 9, 0.8, n_vocab=257)
    assert text == index.run.decode(again[0].tolist())            # sampled, the default seed
    assert held_out["name"] == "held out: held out" and len(held_out["tokens"]) == 17
    for text in data["texts"]:
        for t in text["tokens"][1:]:
            parts = t["residual"] + sum(t["contributions"])
            assert parts == pytest.approx(t["logit"], abs=1e-4)
    # why the largest prototypes fired
    for t in range(1, 17):
        token = mine["tokens"][t]
        order = np.argsort(-np.abs(token["contributions"]), kind="stable")[:3]
        assert token["parts"].keys() == {str(token["prototypes"][j]) for j in order}
        for j in order:
            i = token["prototypes"][j]
            ledger, _ = gate_ledger(index.run.model, again[0, :t], torch.tensor([i]))
            got, want = token["parts"][str(i)], list(largest_parts(ledger, 0))
            assert [name for name, *_ in got] == [name for name, *_ in want]
            assert any(name.startswith("head") for name, *_ in got)
            for (_, part, read), (_, exact, places) in zip(got, want):
                assert part == pytest.approx(exact, rel=1e-3, abs=1e-6)
                assert [s for s, _ in read] == [s for s, _ in places]
            if token["gates"][j]:
                total = sum(part.sum().item() for part in ledger.values())
                assert total == pytest.approx(token["gates"][j], abs=1e-5)
    # the fourth token of the prompt, predicted from the three before it
    r = index.target_records(list(b"the "), 3)
    scores = index.token_scores(index.solve(index.right_side(r)[None]))[0]
    behind = mine["tokens"][3]["influence"]
    for level in ("token", "document", "source"):
        units = np.sort(index.sums(scores, level))
        shown = [[e["score"] for e in behind[level][s]] for s in ("proponents", "opponents")]
        assert shown[0] == pytest.approx([x for x in units[::-1][:5] if x > 0], rel=1e-3)
        assert shown[1] == pytest.approx([x for x in units[:5] if x < 0], rel=1e-3)
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
        assert data["health"]["density"][i] == pytest.approx(share)
        if not gates:
            assert card["contexts"] == [] and card["gate"] == 0 and sum(card["kinds"]) == 0
            continue
        assert card["gate"] == pytest.approx(np.mean(gates), rel=1e-3)
        shown = [c["gate"] for c in card["contexts"]]
        assert shown[:3] == pytest.approx(gates[:3], rel=1e-3)
        assert sorted(shown, reverse=True) == shown
        assert sum(dict(card["sources"]).values()) == pytest.approx(1, abs=1e-3)
        for sign, tokens in ((1, card["raised"]), (-1, card["lowered"])):
            for text, logit in tokens:
                known = len(text.encode()) == 1
                want = sign * P[i] @ (W[text.encode()[0]] - W.mean(0)) if known else 0
                assert logit == 0 or logit == pytest.approx(float(want), abs=2e-3)
        cosine = torch.cosine_similarity(P[i], P, dim=1)
        assert card["near"][0] == cosine.argsort(descending=True)[1]
        words = [text.strip() or repr(text) for text, _ in card["raised"][:4]]
        assert card["label"] == " ".join(words)


# ------------------------------------------- kinds of tokens, and the map

class Words:
    """A run whose tokens are whole texts."""
    def __init__(self, text, vocabulary):
        self.vocabulary = vocabulary
        self.train = np.array([vocabulary.index(word) for word in text])
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=len(vocabulary)))

    def decode(self, tokens):
        return "".join(self.vocabulary[t] for t in tokens)


def test_each_kind_of_token():
    assert list(report.KINDS) == KINDS
    cases = {"space": ["\n", "    ", "\t\n", "<|endoftext|>"],
             "number": ["7", " 2,048", "3.14", "1"],
             "code": ["_name", "self.x_y", "camelCase", " ==", "->", "x2", "[", "\\", " #"],
             "punctuation": [".", ", ", " (", "...", "”", "'", " –"],
             "function word": [" the", "The", " of", " IN"],
             "word piece": ["ing", "the", "é", "'s", "n"],
             "content word": [" cat", "Return", " élan", "\ufffd", " naïve"]}
    texts = [text for kind in cases for text in cases[kind]]
    run = Words([",", *texts], [",", *texts])
    got = report.kinds_at(run, np.arange(1, len(texts) + 1))
    want = [kind for kind in cases for _ in cases[kind]]
    assert [KINDS[i] for i in got] == want
    # a capital is a name after a word, not at the beginning of a sentence
    text = [" cat", " cat", " Ada", ".", " Ada", "\n", " Ada", "ing", " Ada"]
    got = report.kinds_at(Words(text, [*dict.fromkeys(text)]), np.arange(1, 9))
    assert [KINDS[i] for i in got[1::2]] == ["name", "content word", "content word", "name"]


def test_the_kinds_of_a_card_are_those_of_its_strongest_tokens(out, data):
    index = Index(out, "cpu")
    for card in data["cards"]:
        found = [(-index.gates[s, j], s) for s, j in np.argwhere(index.ids == card["id"])]
        strongest = [s for gate, s in sorted(found) if gate < 0][:100]
        count = dict.fromkeys(KINDS, 0)
        for s in strongest:
            text = index.run.decode([index.run.train[index.positions[s]]])
            kind = next(k for k, rule in report.KINDS.items() if re.fullmatch(rule, text, re.S))
            count[kind] += 1
        assert card["kinds"] == list(count.values())


def test_affinities_against_plain_loops():
    X = np.random.default_rng(0).normal(size=(9, 3))
    P = report.affinities(X, 4)
    want = np.zeros((9, 9))
    for i in range(9):
        low, high = 1e-4, 1e4
        for _ in range(100):
            beta = math.sqrt(low * high)
            p = [math.exp(-beta * math.dist(X[i], X[j]) ** 2) if i != j else 0 for j in range(9)]
            p = [x / sum(p) for x in p]
            wide = -sum(x * math.log(x) for x in p if x) > math.log(4)
            low, high = (beta, high) if wide else (low, beta)
        want[i] += np.array(p) / 18
        want[:, i] += np.array(p) / 18
    assert np.allclose(P, want, atol=1e-6) and P.sum() == pytest.approx(1)


def test_tsne_follows_the_gradient_and_keeps_clusters_apart():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(9, 3))
    P = report.affinities(X - X.mean(0), 9 / 4)

    def divergence(Y):
        K = np.array([[i != j and 1 / (1 + np.sum((a - b) ** 2)) for j, b in enumerate(Y)]
                      for i, a in enumerate(Y)])
        Q = K / K.sum()
        return sum(p * math.log(p / q) for p, q in zip(P.ravel(), Q.ravel()) if q and p > 0)
    assert not report.tsne(X[:3]).any()                           # too few for neighbourhoods
    Y = report.tsne(X, steps=0)
    moved = report.tsne(X, steps=1) - Y
    for i, k in np.ndindex(Y.shape):
        step = np.zeros_like(Y)
        step[i, k] = 1e-5
        slope = (divergence(Y + step) - divergence(Y - step)) / 2e-5
        assert moved[i, k] == pytest.approx(-9 * slope / 4, rel=1e-3, abs=1e-6)
    X = rng.normal(size=(40, 5)).astype(np.float32)
    X[20:, 0] += 12
    Y = report.tsne(X)
    assert np.array_equal(Y, report.tsne(X)) and np.isfinite(Y).all()
    a, b = Y[:20].mean(0), Y[20:].mean(0)
    radius = max(np.linalg.norm(Y[:20] - a, axis=1).max(), np.linalg.norm(Y[20:] - b, axis=1).max())
    assert np.linalg.norm(a - b) > 2 * radius
    assert np.isfinite(report.tsne(X[:2])).all()


def test_a_damaged_sweep_is_one_line(out):
    good = (out / "gains/cat.sweep.json").read_text("utf-8")
    run = Index(out, "cpu").run
    damaged = ["{", "[]", "null", "9" * 5000, "[" * 100_000, json.dumps({}),
               json.dumps(sweep_of(out, price=math.nan))]
    try:
        for text in damaged:
            write_sweep(out, text)
            with pytest.raises(UserError, match="cat.sweep.json .*suppress.py sweep"):
                report.interventions(run)
        write_sweep(out, json.dumps(sweep_of(out, checkpoint="another")))
        assert report.interventions(run) == []
        (out / "gains/cat.json").rename(out / "gains/dog.json")
        write_sweep(out, good)
        with pytest.raises(UserError, match="cat.json.*suppress.py find"):
            report.interventions(run)
    finally:
        write_sweep(out, good)
        if (out / "gains/dog.json").exists():
            (out / "gains/dog.json").rename(out / "gains/cat.json")


def test_at_most_twelve_prototypes_detect():
    w = -torch.arange(16.0)[None]
    edit = Edit(torch.ones(16), w, torch.zeros(1), torch.zeros(1, 4))
    assert report.detectors(edit) == [[i, -i] for i in range(15, 3, -1)]
    assert report.detectors(edit._replace(w=0 * w)) == []


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

    def point(self, selector):
        """Moves the mouse to the middle of an element's first box, once nothing scrolls."""
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
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return dict(x=x, y=y)

    def click(self, selector):
        place = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

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
        """Dialogs, exceptions, console and log entries, requests for anything but the page."""
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
        render(dict(EMPTY, run={"loss": float("nan")}))


MARKUP = """[...document.querySelectorAll('body script')].length + ' ' +
  document.querySelectorAll('img, [onerror], iframe, object,' +
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


def test_a_sweep_that_makes_no_sense_is_said_to_and_harms_nothing(page):
    data = sample(n_cards=3, n_tokens=3)
    good = data["gains"][0]
    rows = sweep_rows("rate", "loss")
    data["gains"] = [good, good | dict(rows=[3]), good | dict(rows=3), good | dict(rows=[]),
                     good | dict(price={}), good | dict(before=3), good | dict(name=3),
                     good | dict(rows=rows[:1]), good | dict(detectors=[3]),
                     good | dict(rows=[*rows, dict(strength=3, edit={}, control={})]),
                     good | dict(rows=[rows[1] | dict(control=dict(rate="1", loss=[1, 1, 1]))]),
                     5, None]
    b = page(data)
    assert b.js("document.querySelectorAll('#gains > p').length") == 11
    assert b.js("document.querySelectorAll('#gains article').length") == 2
    assert b.js("document.querySelectorAll('#gains article svg.plot').length") == 6
    assert "cannot be drawn" in text_of(b, "gains") and "NaN" not in text_of(b, "gains")


def test_a_sweep_is_drawn_against_each_price_with_what_detects(page):
    b = page(sample())
    plots = b.js("""[...document.querySelectorAll('#gains article')].map(article =>
      [...article.querySelectorAll('svg.plot')].map(svg => [
        svg.querySelectorAll('polyline').length, svg.querySelectorAll('.interval').length,
        svg.querySelectorAll('.sign').length, [...svg.querySelectorAll('text')].slice(-2)
          .map(e => e.textContent.replace(/.*(loss of|benign|KL|rate|rise).*/, '$1'))]))""")
    # two lines of three strengths and none; one mark on strength 1; an interval each way
    assert plots == [[[2, 12, 10, [price, "rate"]] for price in ("loss of", "benign", "KL")],
                     [[2, 12, 10, [price, "rise"]] for price in ("loss of", "KL")]]
    table = b.js("""[...document.querySelectorAll('#gains tbody')].map(body =>
      [...body.rows].map(row => [...row.cells].slice(1).map(cell => cell.textContent)))""")
    prices = ["0.5 [0.45, 0.6]", "0.125 [0.113, 0.15]"]
    assert table == [[["0.75 [0.7, 0.775]", "0.938 [0.925, 0.944]"], prices, prices, prices],
                     [prices] * 3]
    # the line falls with the strength, the dotted line stands at the price
    falls = b.js("""[...document.querySelector('#gains polyline').points].map(p => [p.x, p.y])""")
    assert falls == sorted(falls) and falls[0][1] < falls[3][1]
    x = b.js("+document.querySelector('#gains .rule').getAttribute('x1')")
    assert x == pytest.approx(falls[1][0], abs=0.1)               # 0.25%, as at strength 0.5
    assert b.js("document.querySelectorAll('#gains article')[1].textContent").count("matches") == 0
    detectors = "#gains ul.legend a.proto"
    assert b.js(f"[...document.querySelectorAll('{detectors}')].map(e => e.hash)") == [
        "#proto-3", "#proto-1"]
    assert "−0.500" in text_of(b, "gains")
    b.click(detectors)
    b.js("new Promise(done => setTimeout(done, 100))")
    assert b.js("document.activeElement.id") == "proto-3"


def test_the_page_of_a_run_draws_every_part(browser, out):
    browser.open((out / "report.html").as_uri())
    assert browser.js(MARKUP) == "2 0"
    parts = ["explorer", "map", "census", "cards", "interventions", "health", "run"]
    assert browser.js("[...document.querySelectorAll('main section')].map(e => e.id)") == parts
    nav = "[...document.querySelectorAll('nav a')].map(e => e.hash.slice(1))"
    assert browser.js(nav) == parts
    assert not browser.js("document.querySelectorAll('main section[hidden]').length")
    assert browser.js("document.querySelectorAll('svg.plot').length") == 7
    assert browser.js("document.querySelectorAll('#loss polyline').length") == 8
    facts = shown_text(browser, "facts")
    assert "4.750 nats" in facts and "4.625 nats" in facts
    # it opens on a word that the model wrote, with its sum and the text behind it
    assert int(browser.js("document.querySelector('.tok[aria-selected=true]').dataset.i")) >= 8
    assert browser.js("document.querySelectorAll('.tok.given').length") == 8
    assert "nats" in shown_text(browser, "influence")
    assert browser.js("document.querySelectorAll('#influence mark').length") > 1
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
    # more slices than fit: the smallest are one line, until it is opened
    t = data["texts"][0]["tokens"][9]
    for key in ("gates", "contributions"):
        t[key] = t[key] * 2
    t["prototypes"] = list(range(16))
    t["logit"] += sum(t["contributions"][8:])
    b = page(data)
    b.click(".tok[data-i='9']")
    assert len(b.js(values)) == 12 and "6 smaller ones" in shown_text(b, "ledger")
    total = text_of(b, "sum")
    b.click("#ledger tr:nth-child(12) button")
    assert len(b.js(values)) == 17 and text_of(b, "sum") == total == text_of(b, "logit")
    b.click(".tok[data-i='0']")
    assert "first token" in shown_text(b, "ledger")


def test_keys_move_select_and_clear(page):
    b = page(sample())
    current = "document.activeElement.dataset.i"
    assert b.js("document.querySelector('.tok[aria-selected=true]').dataset.i") == "5"
    b.js("document.querySelector('.tok[tabindex=\"0\"]').focus()")
    assert b.js(current) == "5"
    for _ in range(4):
        b.key("ArrowLeft")
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
        slices = dict(zip(t.get("prototypes", []), t.get("contributions", [])))
        share = slices.get(proto, 0)
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


def test_a_chosen_prototype_shows_why_it_fired_and_what_a_head_reads(page):
    data = sample()
    b = page(data)
    b.click(".tok[data-i='9']")
    assert b.js("document.querySelectorAll('.why').length") == 0
    b.click("#ledger .part button")
    token = data["texts"][0]["tokens"][9]
    proto = int(b.js("document.getElementById('pick-proto').value"))
    gate = token["gates"][token["prototypes"].index(proto)]
    text = b.js("document.querySelector('.why').textContent")
    assert f"#{proto} fired" in text and f"{gate:.3f}" in text and HOSTILE[:20] in text
    values = b.js("[...document.querySelectorAll('.why .num')].map(e => e.textContent)")
    numbers = [float(x.replace("−", "-")) for x in values]
    assert numbers[:2] == [0.25, -0.125] and sum(numbers) == pytest.approx(gate, abs=2e-3)
    bars = b.js("[...document.querySelectorAll('.why .track')].map(e => e.firstChild.className)")
    assert bars == ["neg" if x < 0 else "pos" for x in numbers]
    # what the head reads is coloured and signed, until the head or a word is chosen anew
    marked = ("[...document.querySelectorAll('.tok[data-sign]')]"
              ".map(e => [e.dataset.i, e.dataset.sign])")
    assert b.js(marked) == []
    b.click(".why button")
    assert b.js(marked) == [["0", "−"], ["8", "+"]]
    assert b.js("document.querySelector('.why button').ariaPressed") == "true"
    assert b.js("document.activeElement.closest('.why') !== null")
    assert "reads" in text_of(b, "legend")
    b.click(".why button")
    assert b.js(marked) == [] and "gate of" in text_of(b, "legend")
    b.click(".why button")
    b.click(".tok[data-i='5']")
    assert b.js(marked) == [] and b.js(MARKUP) == "2 0"
    # a small slice's parts are not on the page
    smallest = token["prototypes"][0]
    b.click(".tok[data-i='9']")
    b.click(f"#ledger button[aria-label*='#{smallest} ']")
    assert "three largest" in b.js("document.querySelector('.why').textContent")


def test_cards_are_drawn_in_pages_searched_sorted_and_linked(page):
    b = page(sample(n_cards=1024), anchor="#proto-1000")
    painted = b.js("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert painted < 1000                                         # milliseconds
    ids = "[...document.querySelectorAll('.card')].map(e => +e.id.slice(6))"

    def put(name, value):
        b.js("(e => { e.value = %s; e.dispatchEvent(new Event('input')) })"
             "(document.getElementById('%s'))" % (json.dumps(value), name))
        return b.js(ids)
    assert b.js(ids)[0] == 1000 and len(b.js(ids)) == 12
    assert b.js("document.activeElement.id") == "proto-1000"
    b.click("#more")
    assert len(b.js(ids)) == 24
    assert sorted(put("search", "word77 ")) == [77, *range(770, 780)]
    assert put("search", "#77") == [77]
    assert "1 of 1,024" in text_of(b, "found")
    assert put("search", "IN 512") == [512] and put("search", "no such word") == []
    put("search", "")
    assert put("sort", "gate")[:2] == [1023, 1022]
    assert put("filter", "dead")[-1] % 20 == 19 and put("sort", "id")[:2] == [19, 39]


def test_the_map_has_a_mark_per_card_with_keys_and_labels(page):
    b = page(sample())
    assert b.js("document.querySelectorAll('#map .dot').length") == 60
    say = "[...document.querySelectorAll('#map .dot')].map(e => e.getAttribute('aria-label'))"
    assert all(f"#{i} word{i} <script>" in text for i, text in enumerate(b.js(say)))
    assert b.js("document.querySelectorAll('#map .dot[tabindex=\"0\"]').length") == 1
    current, tip = "+document.activeElement.dataset.i", "document.getElementById('tip')"
    b.js("document.querySelector('#map .dot[tabindex=\"0\"]').focus()")
    for key, at in (("ArrowRight", 1), ("ArrowDown", 9), ("ArrowLeft", 8), ("ArrowLeft", 8),
                    ("ArrowUp", 0), ("End", 59), ("ArrowDown", 59), ("Home", 0)):
        b.key(key)
        assert b.js(current) == at, key
        assert f"word{at} " in b.js(tip + ".textContent") and not b.js(tip + ".hidden")
    assert b.js("document.querySelectorAll('#map .dot[tabindex=\"0\"]').length") == 1
    b.key("Escape")
    assert b.js(tip + ".hidden")
    b.key("ArrowRight")
    b.key("Enter")
    b.js("new Promise(done => setTimeout(done, 100))")
    assert b.js("document.activeElement.id") == "proto-1"
    b.click("#map .dot[data-i='21']")
    b.js("new Promise(done => setTimeout(done, 100))")
    assert b.js("document.activeElement.id") == "proto-21"
    b.point("#map .dot[data-i='30']")
    assert HOSTILE in b.js(tip + ".innerText") and b.js("location.hash") == "#proto-21"
    assert b.js(MARKUP) == "2 0"
    # by source; a button of the legend leaves its marks alone
    b.js("(e => { e.value = 'source'; e.onchange({target: e}) })"
         "(document.getElementById('map-by'))")
    b.click("#map-legend button")
    dim = b.js("[...document.querySelectorAll('#map .dot')].map(e => e.matches('.dim'))")
    assert dim == [i % 5 == 0 or i % 20 == 19 for i in range(60)]  # the first: the bad source


def test_the_census_counts_each_prototype_once(page):
    data = sample(n_cards=90)
    b = page(data)
    density = data["health"]["density"]
    at_large = {}
    for card in data["cards"]:
        for source, share in card["sources"]:
            at_large[source] = at_large.get(source, 0) + share * density[card["id"]] / sum(density)
    want, weight = {}, {}
    for card in data["cards"]:
        total, (source, share) = sum(card["kinds"]), card["sources"][0]
        if not total:
            name = "never fires"
        elif max(card["kinds"]) >= total / 2:
            name = KINDS[card["kinds"].index(max(card["kinds"]))]
        elif share >= 0.5 and share >= 2 * at_large[source]:
            name = "one source"
        else:
            name = "other or mixed"
        want[name] = want.get(name, 0) + 1
        weight[name] = weight.get(name, 0) + density[card["id"]] / sum(density)
    rows = b.js("""[...document.querySelectorAll('#census tbody tr')].map(e => [e.dataset.kind,
      ...[...e.querySelectorAll('td')].map(c => parseFloat(c.textContent)),
      e.querySelector('th').textContent.length > e.dataset.kind.length + 10])""")
    assert {name for name, *_ in rows} == {*KINDS, "one source", "other or mixed", "never fires"}
    assert {name: n for name, n, *_ in rows if n} == want and len(want) == 11
    assert sum(n for _, n, *_ in rows) == 90
    for name, _, share, has_rule in rows:
        assert share == pytest.approx(100 * weight.get(name, 0), abs=0.6) and has_rule
    text = shown_text(b, "census")
    assert "residual" in text and "10\u00a0%" in text and "the a" in text_of(b, "census")
    b.click("#census tr[data-kind='one source'] button")
    assert f"{want['one source']} of 90" in text_of(b, "found")


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
    b.click(".why button")
    b.js("document.querySelectorAll('details').forEach(e => e.open = true)")
    b.js("document.querySelector('#map .dot').focus()")
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

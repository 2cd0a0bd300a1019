"""Suppression, controllers and the harness in their smallest form, and their mathematics."""
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny, write_dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))

import tools  # noqa: E402

import train  # noqa: E402
from common import Run, UserError, load_gains  # noqa: E402
from interventions import cloze, controllers, harness, suppression  # noqa: E402
from interventions.controllers import Scored, choice_scores  # noqa: E402
from suppress import States  # noqa: E402


def document(words, rng):
    return "".join(" " + words[i] for i in rng.integers(0, len(words), 30))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on documents of two sources. Held-out text has words of its own among others."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(200)]
    rows, parts = [], {"train": [], "val": []}
    for i in range(24):
        split, known = ("train", 150) if i < 16 else ("val", 200)
        text = document(words[:known], rng)
        rows.append(dict(split=split, start=len(parts[split]), length=len(text) + 1,
                         source=f"source {i % 2}", title=f"document {i}"))
        parts[split] += [*text.encode(), 256]
    folder = tmp_path_factory.mktemp("interventions")
    data = write_dataset(folder / "words", parts["train"], parts["val"])
    (data / "docs.json").write_text(json.dumps(rows))
    train.main([f"--dataset={data}", f"--out_dir={folder / 'out'}", "--n_layer=1", "--n_head=2",
                "--n_embd=16", "--block_size=32", "--n_proto=24", "--top_k=3", "--batch_size=4",
                "--total_batch_tokens=128", "--warmup_iters=4", "--max_iters=60",
                "--eval_interval=60", "--device=cpu", "--dtype=float32"])
    return folder / "out"


# ------------------------------------------- cloze items

def dataset_of(folder, train_text, *documents):
    """A prepared dataset with the byte tokenizer; documents: (source, text) that are held out."""
    val, rows = [], []
    for i, (source, text) in enumerate(documents):
        rows.append(dict(split="val", start=len(val), length=len(text) + 1, source=source,
                         title=f"document {i}"))
        val += [*text.encode(), 256]
    write_dataset(folder, [*train_text.encode(), 256], val)
    (folder / "docs.json").write_text(json.dumps(rows))
    return folder


def answers(items):
    """-> {the own choice of an item: all its choices}, as text"""
    text = {}
    for rows, label in zip(items.tokens, items.label):
        choices = [bytes(row[4:].tolist()).decode() for row in rows]
        assert len({tuple(row[:4]) for row in rows.tolist()}) == 1  # one context
        text[choices[label]] = choices
    return text


def test_wrong_choices_are_of_the_same_source_while_they_last(tmp_path, monkeypatch):
    monkeypatch.setattr(cloze, "CHOICES", 3)
    data = dataset_of(tmp_path / "d", "nothing of it", ("rich", "abcd ef ghi jk lmn op"),
                      ("rich", "wxyz\nef qrs tu"), ("rich", "vwxy ef"), ("poor", "ABCD EF"))
    found = answers(cloze.cloze(data, "val", 9, 4, 3))
    assert found.keys() == {" ef", " jk", " op", " tu", " EF"}  # " ef" stands once
    assert all(len(set(choices)) == 3 for choices in found.values())
    assert all(" EF" not in choices for own, choices in found.items() if own != " EF")


def test_no_choice_stands_in_the_context_or_in_the_training_text(tmp_path, monkeypatch):
    monkeypatch.setattr(cloze, "CHOICES", 2)
    texts = ("s", "abcd ef"), ("s", "x ef mn"), ("s", "ijkl op"), ("s", "qr y qr"), ("s", "rstu vw")
    found = cloze.cloze(dataset_of(tmp_path / "d", "do vw", *texts), "val", 9, 4, 3)
    assert answers(found).keys() == {" ef", " mn", " op"}
    for rows in found.tokens:
        context, choices = bytes(rows[0, :4].tolist()), [bytes(row[4:].tolist()) for row in rows]
        assert not any(choice.strip() in context for choice in choices)
    assert len(set(found.document.tolist())) == 3
    data = dataset_of(tmp_path / "blanks", "none", ("s", "abcd e f ghi k l"), ("s", "mnop e\nf"))
    assert len(cloze.cloze(data, "val", 9, 4, 4).label) == 2  # texts that differ in blanks are one
    with pytest.raises(UserError, match="found no item of 4 . 3 tokens in the val text"):
        cloze.cloze(dataset_of(tmp_path / "e", "ab ef", ("s", "abcd ef")), "val", 9, 4, 3)


def test_items_are_read_back_from_the_tokens_and_drawn_alike(run):
    data = run.parent / "words"
    items = cloze.cloze(data, "train", 20, 12, 6)
    text = np.fromfile(data / "train.bin", np.uint16).astype(np.uint8).tobytes()
    for rows, label in zip(items.tokens, items.label):
        assert bytes(rows[label].tolist()) in text and rows.shape == (4, 18)
    assert len(items.label) == 20 and set(items.label.tolist()) == {0, 1, 2, 3}
    repeated = cloze.cloze(data, "train", 20, 12, 6)
    assert all((a == b).all() for a, b in zip(items, repeated))


def test_occurs_equals_the_naive_search():
    rng = np.random.default_rng(0)
    tokens, rows = rng.integers(0, 3, 200).astype(np.uint16), rng.integers(0, 3, (60, 5))
    expected = [any((tokens[i:i + 5] == row).all() for i in range(196)) for row in rows]
    assert 5 < sum(expected) < 55 and cloze.occurs(tokens, rows.tolist()) == expected


# ------------------------------------------- controllers

def test_scores_and_slopes_against_plain_loops_and_autograd(monkeypatch):
    """The states of items, their scores under gains, temperature and other directions, slopes."""
    monkeypatch.setattr(controllers, "CHOICE", 2)
    monkeypatch.setattr(controllers, "CHOICES", 3)
    model = tiny(n_proto=5, top_k=2).requires_grad_(False)
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 11, (4, 3, 6), generator=rng)
    items = cloze.Items(tokens.numpy(), np.array([0, 2, 1, 1]), np.arange(4))
    t = controllers.score_states(SimpleNamespace(model=model, device="cpu"), items)
    P = torch.randn(5, 6, generator=rng, dtype=torch.float64)
    W, gains = model.W / 1.4, torch.rand(5, generator=rng, dtype=torch.float64) * 2

    def plain_score(row, gains):
        z = model.hidden(row[None, :-1])[0]
        m = model.mixture(z)
        total = 0.0
        for at in (3, 4):
            state = z[at].clone()
            for i, gate in zip(m.ids[at].tolist(), m.gates[at]):
                state = state + (gains[i] - 1) * gate * P[i]
            total = total + (W @ state).log_softmax(0)[row[at + 1]]
        return total

    s, slopes = choice_scores(t, W, P, gains)
    for n in range(4):
        for c in range(3):
            g = gains.clone().requires_grad_(True)
            want = plain_score(tokens[n, c], g)
            torch.testing.assert_close(s[n, c], want.detach())
            torch.testing.assert_close(slopes[n, c], torch.autograd.grad(want, g)[0])
    assert controllers.hits(t, W, P, gains).tolist() == (s.argmax(1) == t.label).tolist()
    ones = torch.ones_like(gains)
    same, _ = choice_scores(t, model.W, model.prototypes, gains)
    whole = F.cross_entropy(model.logits(t.z, gains), t.y, reduction="none")
    torch.testing.assert_close(same, -whole.view(4, 3, 2).sum(2))
    assert not torch.equal(same, choice_scores(t, model.W, model.prototypes, ones)[0])


def test_a_controller_is_the_minimum_of_its_convex_problem():
    """The gradient of the objective, written out, is zero there; the objective is convex."""
    rng = torch.Generator().manual_seed(0)
    s = torch.randn(30, 3, generator=rng, dtype=torch.float64)
    slopes = torch.randn(30, 3, 8, generator=rng, dtype=torch.float64)
    label = torch.randint(0, 3, (30,), generator=rng)

    def objective(theta):
        total = 0.0
        for n in range(30):
            total = total - (s[n] + slopes[n] @ theta).log_softmax(0)[label[n]] / 30
        return total + 0.1 / 2 * theta.square().sum()
    theta = controllers.controller(s, slopes, label, 0.1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(objective(theta), theta)
    assert theta.abs().max() > 0.1 and gradient.abs().max() < 1e-5
    hessian = torch.autograd.functional.hessian(objective, theta.detach())
    assert torch.linalg.eigvalsh(hessian).min() > 0.1
    weak = controllers.controller(s, slopes, label, 0.001)
    assert weak.norm() > theta.norm()


def test_fit_gains_lowers_the_loss_and_may_leave_all_gains_at_one(monkeypatch):
    """Labels that follow from the gates of one prototype are learned; labels by chance are not."""
    monkeypatch.setattr(controllers, "CHOICE", 1)
    monkeypatch.setattr(controllers, "CHOICES", 2)
    rng = torch.Generator().manual_seed(0)
    W, P = torch.randn(7, 4, generator=rng), torch.randn(6, 4, generator=rng)
    z = torch.randn(400, 4, generator=rng)
    ids, gates = torch.randint(0, 6, (400, 1), generator=rng), torch.rand(400, 1, generator=rng)
    y = torch.randint(0, 7, (400,), generator=rng)
    t = Scored(z, ids, gates, y, torch.zeros(200, dtype=torch.long))
    wanted = choice_scores(t, W, P, torch.ones(6).index_fill(0, torch.tensor([2]), 4.0))[0]
    folds = [np.arange(200)[i::2] for i in range(2)]
    learned, l2 = controllers.fit_gains(t._replace(label=wanted.argmax(1)), W, P, folds)
    assert l2 in controllers.PENALTIES and learned[2] == learned.max() > 2
    chance = torch.randint(0, 2, (200,), generator=rng)
    random, none = controllers.fit_gains(t._replace(label=chance), W, P, folds)
    assert (none is None) == bool((random == 1).all())
    monkeypatch.setattr(controllers, "cross_validate", lambda *_: (0.1, 99.0))
    assert controllers.fit_gains(t, W, P, folds)[1] is None


def test_folds_share_no_document():
    items = cloze.Items(None, None, np.array([0, 0, 1, 2, 1, 3, 3, 3]))
    folds = controllers.split(items, 3, 1)
    assert sorted(np.concatenate(folds)) == list(range(8))
    owners = [set(items.document[fold].tolist()) for fold in folds]
    assert all(owners) and sum(map(len, owners)) == 4
    with pytest.raises(UserError, match="items are of 4 documents, expected at least one for each"):
        controllers.split(items, 5, 1)


def test_controllers_write_gains_that_load_and_an_entry_per_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(controllers, "CONTEXT", 12)
    monkeypatch.setattr(controllers, "CHOICE", 6)
    monkeypatch.setattr(controllers, "cross_validate", lambda *_: (0.001, 0.0))  # not left at one
    out = tmp_path / "c.json"
    out.write_text(json.dumps({"runs": {"older": 1}}))
    controllers.main([f"--out_dir={run}", "--items=60", "--trace=2", f"--out={out}", "--name=c"])
    runs = json.loads(out.read_text())["runs"]
    found = runs[str(run)]
    result = found["result"]
    sides = {"uncalibrated", "controller", "temperature", "random"}
    assert runs["older"] == 1 and result.keys() == sides | {"over_random"}
    assert found["items"] == 60 and found["train_seed"] == 1337
    for side in sides:
        accuracy = result[side]["accuracy"]
        change, low, high = result[side]["points"]
        assert low <= change <= high
        assert change == pytest.approx(100 * (accuracy - result["uncalibrated"]["accuracy"]))
    model = Run(run, "cpu").model
    file = json.loads((run / "gains/c.json").read_text())
    gains = load_gains(run / "gains/c.json", model).g
    assert file["checkpoint"] == found["checkpoint"]
    assert (gains != 1).sum() == len(file["ids"]) > 0
    assert len(file["traced"]) == 2 and f"prototype {file['traced'][0]['prototype']}, gain" in (
        capsys.readouterr().out)
    largest = (gains - 1).abs().argmax().item()
    assert file["traced"][0]["prototype"] == largest and len(file["traced"][0]["training"]) == 3
    # the accuracies, by the model under its gains
    items = cloze.cloze(run.parent / "words", "val", 1000, 12, 6)
    idx = torch.from_numpy(items.tokens).flatten(0, 1)
    for side, g in (("uncalibrated", None), ("controller", gains)):
        logp = model.logits(model.hidden(idx[:, :-1]), g).log_softmax(-1)
        score = logp.gather(2, idx[:, 1:, None])[:, -6:, 0].sum(1).view(-1, 4)
        accuracy = (score.argmax(1).numpy() == items.label).mean()
        assert result[side]["accuracy"] == pytest.approx(accuracy)
    with pytest.raises(UserError, match="items is 0"):
        controllers.main(["--items=0"])


# ------------------------------------------- suppression

def test_interval_of_equal_units_is_a_point_and_shrinks_with_more():
    assert tools.interval(np.full(5, 3.0), np.full(5, 2.0)) == (1.5, 1.5, 1.5)
    rng = np.random.default_rng(0)
    mean, low, high = tools.interval(rng.normal(1, 2, 400), np.ones(400))
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.2)


def test_suppression_of_a_source_and_an_expression_against_rivals(run, tmp_path, monkeypatch):
    monkeypatch.setattr(suppression, "EXPRESSIONS", {"pydoc": ("a",)})
    tiny_run = ("--n_layer=1 --n_head=2 --n_embd=16 --block_size=32 --n_proto=24 --top_k=3 "
                "--batch_size=4 --total_batch_tokens=128 --max_iters=20 --eval_interval=20 "
                "--device=cpu --dtype=float32")
    words = [f"--out_dir={run}", "--tokens=1500", "--texts=4", "--finetune=2", "--size=8",
             "--price=1000", f"--train={tiny_run}", f"--work={tmp_path}", f"--out={tmp_path}/s.json"]
    monkeypatch.setattr(suppression.suppress.FindConfig, "kl", 1000.0)
    monkeypatch.setattr(suppression, "NEW", 8)
    few = functools.partial(suppression.suppress.descend, steps=8, batch=128)
    monkeypatch.setattr(suppression, "descend", few)
    monkeypatch.setattr(suppression.suppress, "descend", few)
    monkeypatch.setattr(suppression, "largest_sources", lambda run: ["source 0"])
    suppression.main(words)
    result = json.loads((tmp_path / "s.json").read_text())["studies"]
    assert list(result) == ["source 0", "a"]
    sides = result["source 0"]["sides"]
    assert set(sides) == {"edit", "random", "probe", "direction", "bias", "LEACE", "finetune",
                          "retrained"}
    assert sides["edit"]["rise"][0] > 0 and "rate" not in sides["edit"]
    for name in ("random", "probe", "direction", "bias", "LEACE"):
        reached = sides[name]["rise"][0] >= sides["edit"]["rise"][0]
        assert sides[name]["reached"] == reached
    assert {"edit", "retrained", "finetune"} == set(result["source 0"]["relearned"])
    assert {"neutral", "own", "classifier"} == set(result["source 0"]["sampled"])
    assert result["a"]["sides"]["ban"]["rate"][0] < 0.01 and result["a"]["sides"]["edit"]["rate"]
    before = (tmp_path / "s.json").stat().st_mtime_ns
    suppression.main(words)                                       # finds all of it done
    assert (tmp_path / "s.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="corpus=tea, expected pydoc or books"):
        suppression.main(["--corpus=tea"])


def test_leace_leaves_no_difference_of_means_and_a_probe_starts_at_it():
    rng = torch.Generator().manual_seed(0)
    target = torch.arange(40) < 15
    z = torch.randn(40, 6, generator=rng) + 2.0 * target[:, None]
    s = States(z, None, None, None, target, ~target, ~target)
    model = SimpleNamespace(W=torch.eye(6))
    change = suppression.leace(model, s)
    erased = change(s)
    gap = erased[target].mean(0) - erased[~target].mean(0)
    assert gap.abs().max() < 1e-4 and (z[target].mean(0) - z[~target].mean(0)).abs().max() > 1
    assert torch.equal(change(s, 0.0), z)


def test_bayes_gives_text_to_the_source_whose_tokens_it_has():
    tokens = torch.tensor([1, 1, 2, 3, 3, 2])
    target = torch.tensor([True, True, True, False, False, False])
    odds = suppression.bayes(SimpleNamespace(tokens=tokens, target=target), 5)
    assert odds[1] > 0 > odds[3] and odds[2] == odds[0] == odds[4] == 0


# ------------------------------------------- the harness

def ask(lm, pairs):
    """Requests as TemplateLM makes them of texts."""
    encode = lm.tok_encode
    return lm._loglikelihood_tokens([((a, b), encode(a), encode(b)) for a, b in pairs])


def test_answers_are_scored_as_the_model_does(run):
    trained = Run(run, "cpu")
    path, gains = run / "gains/h.json", torch.linspace(-4, 4, 24).round(decimals=4)
    suppression.suppress.write_edit(path, trained, trained.model.edit(gains))
    pairs = [(" abcde", " f"), (" " + "abcde " * 9, "fghij"), ("a", "b")]
    for file, g in (("", None), (str(path), gains)):
        lm = harness.PrismLM(str(run), file, "cpu")
        assert lm.eot_token_id == 256
        for (context, answer), (score, greedy) in zip(pairs, ask(lm, pairs)):
            row = torch.tensor([list((context + answer).encode())[-33:]])
            logp = trained.model.logits(trained.model.hidden(row[:, :-1]), g)[0].log_softmax(-1)
            own, y = logp[-len(answer):], row[0, -len(answer):]
            assert score == pytest.approx(own.gather(1, y[:, None]).sum().item(), abs=1e-4)
            assert greedy == bool((own.argmax(1) == y).all())
    with pytest.raises(UserError, match="an answer has 40 tokens, the context holds 32: 'xxx"):
        ask(lm, [("a", "x" * 40)])
    with pytest.raises(UserError, match="asks for text"):
        lm.loglikelihood_rolling([])


def test_harness_asks_for_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="lm_eval is missing"):
        harness.main(["--tasks=arc_easy"])


def test_the_package_finds_the_accuracy_of_our_own_scores(run, tmp_path):
    pytest.importorskip("lm_eval")
    rng = np.random.default_rng(1)
    items = [dict(context=f" {rng.integers(100)} abc", choices=[" de", " fgh", " ij"], label=n % 3)
             for n in range(12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/mine.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
        'target_delimiter: ""\nmetric_list:\n  - {metric: acc}\n')
    trained = Run(run, "cpu")
    edit = trained.model.edit(torch.linspace(-4, 4, 24))
    suppression.suppress.write_edit(run / "gains/p.json", trained, edit)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    script = ROOT / "experiments/interventions/harness.py"
    done = subprocess.run([sys.executable, str(script), f"--out_dir={run}", "--tasks=mine",
                           f"--include={tmp_path}", f"--gains={run}/gains/p.json",
                           f"--out={tmp_path}/h.json"],
                          capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "h.json").read_text())
    for side, file in (("without", ""), ("with", str(run / "gains/p.json"))):
        lm = harness.PrismLM(str(run), file, "cpu")
        hits = 0
        for x in items:
            scores = [score for score, _ in ask(lm, [(x["context"], c) for c in x["choices"]])]
            hits += int(np.argmax(scores) == x["label"])
        assert result[side]["mine"]["acc,none"] == pytest.approx(hits / 12)

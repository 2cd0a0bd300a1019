import base64
import hashlib
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # tiny tensors: a second thread only waits

import attribute  # noqa: E402
import train  # noqa: E402
from prism import PRISM, PRISMConfig  # noqa: E402


def write_dataset(folder, train, val, vocab_size=257, dtype="uint16"):
    """A prepared dataset with the byte tokenizer, of the form that data/prepare.py writes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tokens in (("train.bin", train), ("val.bin", val)):
        (folder / name).write_bytes(np.asarray(tokens, dtype).tobytes())
    (folder / "tokenizer.tiktoken").write_bytes(b"\n".join(base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)))
    (folder / "tokenizer.json").write_text(json.dumps(dict(name="byte", pattern=r"[\s\S]", eot=256, n_vocab=257)))
    meta = dict(format=1, name=folder.name, vocab_size=vocab_size, dtype=dtype, eot=256, tokenizer="byte",
                train=dict(tokens=len(train), documents=1), val=dict(tokens=len(val), documents=1),
                sha256={n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("train.bin", "val.bin")})
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(autouse=True)
def no_test_waits_for_ever():
    """Several tests start processes and wait for them; one that hangs must fail and say where."""
    def late(number, frame):
        raise TimeoutError("the test did not end within 150 seconds")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(150)
    yield
    signal.alarm(0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """4,000 training and 600 validation bytes of text that a tiny model can learn."""
    text = b"the cat sat on the mat. a dog ran to the log. " * 100
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny", list(text[:4000]), list(text[:600]))


def tiny(dtype=torch.float64, seed=0, **kw):
    """A tiny model in float64 whose parameters are large enough for every path to matter."""
    torch.manual_seed(seed)
    shape = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=6, n_proto=5, top_k=2, bias=True)
    model = PRISM(PRISMConfig(**(shape | kw)))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=0.3)
    return model.to(dtype).eval()


SENTENCES = ["the cat sat on the mat. ", "a dog ran to the log. ", "<script>alert(1)</script> & more. ", "my hen is in the den. "]


def write_run(folder, *options, documents=12, iters=30):
    """A prepared dataset with documents of two sources, and a tiny run trained on it -> the run's folder."""
    rng = np.random.default_rng(0)
    texts = ["".join(SENTENCES[i] for i in rng.integers(0, 4, 9)).encode() for _ in range(documents)]
    rows, at = [], 0
    for i, text in enumerate(texts):
        rows.append(dict(split="train", start=at, length=len(text), source=f"source <{i % 2}>", title=f"document {i}"))
        at += len(text)
    data = write_dataset(folder / "tiny", list(b"".join(texts)), list(texts[0]))
    rows.append(dict(split="val", start=0, length=len(texts[0]), source="source <0>", title="held out"))
    (data / "docs.json").write_text(json.dumps(rows))
    keep = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main([f"--dataset={data}", f"--out_dir={folder / 'out'}", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--n_proto=12",
                    "--top_k=3", "--batch_size=4", "--total_batch_tokens=64", "--warmup_iters=4", f"--max_iters={iters}", f"--eval_interval={iters}",
                    "--device=cpu", "--dtype=float32", *options])
    finally:
        for s, handler in keep.items():
            signal.signal(s, handler)
    return folder / "out"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny run with its index, for tests that only read."""
    out = write_run(tmp_path_factory.mktemp("attribution"), iters=135)
    attribute.main(["index", f"--out_dir={out}", "--mu=0.05"])
    return out

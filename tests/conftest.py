"""Tiny models, datasets and runs that the tests share."""
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

SENTENCES = ["the cat sat on the mat. ", "a dog ran to the log. ",
             "<script>alert(1)</script> & more. ", "my hen is in the den. "]


@pytest.fixture(autouse=True)
def time_limit():
    """Several tests start processes and wait for them; one that hangs must fail and say where."""
    def late(number, frame):
        raise TimeoutError("the test did not end within 150 seconds")
    signal.signal(signal.SIGALRM, late)
    signal.alarm(150)
    yield
    signal.alarm(0)


def tiny(dtype=torch.float64, seed=0, **kw):
    """A tiny model in float64 whose parameters are large enough for each path to matter."""
    torch.manual_seed(seed)
    shape = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=6, n_proto=5, top_k=2,
                 bias=True)
    model = PRISM(PRISMConfig(**(shape | kw)))
    for name, p in model.named_parameters():
        scale = "ln_" in name and name.endswith("weight")
        torch.nn.init.normal_(p, mean=1.0 if scale else 0.0, std=0.3)
    return model.to(dtype).eval()


def write_dataset(folder, train, val, vocab_size=257, dtype="uint16"):
    """A dataset with the byte tokenizer, of the form that data/prepare.py writes."""
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = {}
    for name, tokens in (("train.bin", train), ("val.bin", val)):
        content = np.asarray(tokens, dtype).tobytes()
        (folder / name).write_bytes(content)
        sha256[name] = hashlib.sha256(content).hexdigest()
    ranks = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)]
    (folder / "tokenizer.tiktoken").write_bytes(b"\n".join(ranks))
    tokenizer = dict(name="byte", pattern=r"[\s\S]", eot=256, n_vocab=257)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    meta = dict(format=1, name=folder.name, vocab_size=vocab_size, dtype=dtype, eot=256,
                tokenizer="byte", train=dict(tokens=len(train), documents=1),
                val=dict(tokens=len(val), documents=1), sha256=sha256)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """4,000 training and 600 validation bytes of text that a tiny model can learn."""
    text = b"the cat sat on the mat. a dog ran to the log. " * 100
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return write_dataset(folder, list(text[:4000]), list(text[:600]))


def write_run(folder, *options, documents=12, iters=30):
    """A dataset with documents of two sources, and a tiny run trained on it -> its folder."""
    rng = np.random.default_rng(0)
    texts, rows, start = [], [], 0
    for i in range(documents):
        text = "".join(SENTENCES[j] for j in rng.integers(0, 4, 9)).encode()
        rows.append(dict(split="train", start=start, length=len(text), title=f"document {i}",
                         source=f"source <{i % 2}>"))
        texts.append(text)
        start += len(text)
    rows.append(dict(split="val", start=0, length=len(texts[0]), title="held out",
                     source="source <0>"))
    data = write_dataset(folder / "tiny", list(b"".join(texts)), list(texts[0]))
    (data / "docs.json").write_text(json.dumps(rows))
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main([f"--dataset={data}", f"--out_dir={folder / 'out'}", "--n_layer=1",
                    "--n_head=2", "--n_embd=16", "--block_size=16", "--n_proto=12", "--top_k=3",
                    "--batch_size=4", "--total_batch_tokens=64", "--warmup_iters=4",
                    f"--max_iters={iters}", f"--eval_interval={iters}", "--device=cpu",
                    "--dtype=float32", *options])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return folder / "out"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny run with its index, for tests that only read."""
    out = write_run(tmp_path_factory.mktemp("attribution"), iters=135)
    attribute.main(["index", f"--out_dir={out}", "--mu=0.05"])
    return out


def gpt2_state(d=6, n_layer=2, V=11, T=8):
    """Random weights under GPT-2's names, matrices (in, out), with the masks that it stores."""
    shapes = {"wte.weight": (V, d), "wpe.weight": (T, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(n_layer):
        for name, n_in, n_out in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d),
                                  ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)):
            shapes[f"h.{i}.{name}.weight"] = n_in, n_out
            shapes[f"h.{i}.{name}.bias"] = n_out,
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (d,), f"h.{i}.{name}.bias": (d,)}
    state = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        rng = torch.Generator().manual_seed(seed)
        state[name] = 0.5 * torch.randn(shape, generator=rng)
    state["h.0.attn.bias"] = torch.ones(1, 1, T, T).tril()
    return state

"""What every script needs and no formula does: options, files, datasets, a trained run, ranks."""
import base64
import contextlib
import difflib
import hashlib
import inspect
import json
import os
import re
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import numpy as np
import tiktoken
import torch

from prism import PRISM, Edit, PRISMConfig, UserError


# --------------------------------------- options and command lines
def parse_config(cls, argv):
    """Fills dataclass `cls` from `--key=value` words and TOML files; later ones win. `--help` lists
    every field with its default and comment; an unknown key is told the nearest."""
    kinds = {f.name: f.type for f in fields(cls)}
    if "--help" in argv:
        print_help(cls)
    words = []
    for word in argv:
        if word.startswith("--"):
            words.append(word)
            continue
        with reading(f"file of options '{word}'", "an option is --key=value"):
            table = tomllib.loads(Path(word).read_text("utf-8"))
        words += [f"--{key}={value}" for key, value in table.items()]
    cfg = cls()
    for word in words:
        key, _, value = word[2:].partition("=")
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown option {word}; the nearest is --{near}")
        try:
            if kinds[key] is bool:
                value = {"": True, "true": True, "false": False}[value.lower()]
            setattr(cfg, key, kinds[key](value))
            if kinds[key] in (int, float) and not abs(getattr(cfg, key)) < 2 ** 40:
                raise ValueError("not a number in range")
        except (KeyError, ValueError):
            raise UserError(f"{word}: {key} takes --{key}={kinds[key].__name__}") from None
    return cfg


def print_help(cls):
    notes = {}
    for base in cls.__mro__[-2::-1]:                              # a field's help is its comment
        notes.update(re.findall(r"^    (\w+):.*?# (.*)$", inspect.getsource(base), re.M))
    print(sys.modules[cls.__module__].__doc__)
    for f in fields(cls):
        print(f"  --{f.name}={f.default!r}".ljust(36), notes.get(f.name, ""))
    raise SystemExit(0)


def run_command(commands, doc, argv):
    """Subcommands first: commands is {name: function of the words behind it}."""
    if not argv or argv[0] not in commands:
        print(doc)
        raise UserError(f"the first word is one of {', '.join(commands)}; each takes --help")
    commands[argv[0]](argv[1:])


def run_main(main):
    """Calls main(sys.argv[1:]); what the user can mend becomes one line and exit status 2."""
    try:
        status = main(sys.argv[1:]) or 0
    except (UserError, OSError) as e:
        print(f"error: {plain(str(e))}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except SystemExit as e:
        status = e.code or 0
    if "RANK" in os.environ:  # gloo's threads can abort an interpreter that shuts down
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def plain(text, keep=""):
    """Text of others for a terminal: what is not printable becomes an escape and cannot act."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


# --------------------------------------- files
@contextlib.contextmanager
def atomic(path, mode="wb", **kw):
    """Opens a temporary file beside `path`; moves it into place only if the block ends well."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    tmp.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(tmp, mode, **kw) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)


@contextlib.contextmanager
def reading(what, advice):
    """Around the reading of any file: whatever fails becomes one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # a cut zip, a foreign format and a wrong type share no class
        why = plain(" ".join(f"{type(e).__name__}: {e}".split()))[:160]
        raise UserError(f"{what} cannot be used ({why}); {advice}") from None


def load_tensors(path, device="cpu"):
    """torch.load that runs no code from the file."""
    with reading(path, "train first: python train.py; remove the folder if it is damaged"):
        return torch.load(path, map_location=device, weights_only=True)


def load_checkpoint(path, device="cpu"):
    """A checkpoint, or a folder with ckpt.pt -> (PRISM in eval mode, the checkpoint's dict)."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    ckpt = load_tensors(path, device)
    with reading(path, "expected a dict with 'model' and 'config', as train.py writes"):
        model = PRISM(PRISMConfig(**ckpt["config"]))
        model.load_state_dict(ckpt["model"])
    return model.to(device).eval(), ckpt


def fingerprint(state):
    """sha256 (hex) of the weights in a state dict: the same for every file that holds them."""
    h = hashlib.sha256()
    for name in sorted(state):
        h.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}".encode())
        h.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy())
    return h.hexdigest()


def placed(ids, values, size, rest):
    """Numbers at different places below `size`, `rest` elsewhere -> (size,) float tensor."""
    values = torch.tensor(values, dtype=torch.float32)
    distinct = len(set(ids) & set(range(size)))
    if not distinct == len(ids) == len(values) or not (values.abs() < 1e6).all():
        raise ValueError(f"expected finite numbers, and as many different ids below {size}")
    return torch.full((size,), rest).index_copy(0, torch.tensor(ids, dtype=torch.long), values)


def load_gains(path, model):
    """A file {"checkpoint", "ids", "gains", "directions"} -> Edit; gains are 1 where unnamed. Of
    "one.json,two.json" gains multiply, directions add. UserError for another checkpoint's file."""
    M, d = model.config.n_proto, model.config.n_embd
    g, w, c, u = torch.ones(M), [torch.zeros(M)], [torch.zeros(1)], [torch.zeros(d)]
    for name in str(path).split(","):
        with reading(f"gains file '{name}'", "python suppress.py find writes one"):
            content = json.loads(Path(name).read_text("utf-8"))
            if content["checkpoint"] != fingerprint(model.state_dict()):
                raise ValueError("it was made for another checkpoint")
            g *= placed(content["ids"], content["gains"], M, 1.0)
            for e in content.get("directions", []):
                w.append(placed(e["ids"], e["weights"], M, 0.0))
                c.append(placed([0], [e["threshold"]], 1, 0.0))
                u.append(placed(range(d), e["direction"], d, 0.0))
    edit = Edit(g, torch.stack(w), torch.cat(c), torch.stack(u))
    return Edit(*(part.to(model.W) for part in edit))


# --------------------------------------- prepared datasets
def load_tokenizer(folder):
    """The tiktoken.Encoding of a prepared dataset or a run."""
    folder, numbers = Path(folder), {}
    with reading(f"the tokenizer in {folder}", "run: python data/prepare.py"):
        facts = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        for line in (folder / "tokenizer.tiktoken").read_bytes().splitlines():
            piece, number = line.split()
            numbers[base64.b64decode(piece)] = int(number)
        used = {*numbers.values(), facts["eot"]}
        if len(used) != len(numbers) + 1 or min(used) < 0 or max(used) >= 2 ** 31:
            raise ValueError("two tokens share a number, or one is out of range")
        return tiktoken.Encoding(facts["name"], pat_str=facts["pattern"], mergeable_ranks=numbers,
                                 special_tokens={"<|endoftext|>": facts["eot"]})


def dataset_folder(name):
    """A dataset's name or path -> its folder: the path where there is one, else data/<name>."""
    return Path(name) if Path(name).is_dir() else Path(__file__).resolve().parent / "data" / name


def load_dataset(folder):
    """A prepared dataset -> train, val, meta: memory maps of tokens, checked against meta.json."""
    arrays = []
    with reading(f"the dataset in {folder}", "run: python data/prepare.py"):
        meta = json.loads((Path(folder) / "meta.json").read_text("utf-8"))
        dtype = {"uint16": np.uint16, "uint32": np.uint32}[meta["dtype"]]
        for split in ("train", "val"):
            tokens = np.memmap(Path(folder) / f"{split}.bin", dtype, "r")
            if len(tokens) != meta[split]["tokens"]:
                raise ValueError(f"{split}.bin has {len(tokens)} tokens, unlike meta.json")
            small = tokens.nbytes < 2 ** 28
            if small and hashlib.sha256(tokens).hexdigest() != meta["sha256"][f"{split}.bin"]:
                raise ValueError(f"{split}.bin differs from its sha256 in meta.json")
            arrays.append(tokens)
    return *arrays, meta


def load_documents(folder, split, n_tokens):
    """Rows of docs.json of one split -> start (n,) int64, titles and sources (lists of str)."""
    with reading(f"{folder}/docs.json", "run: python data/prepare.py"):
        rows = json.loads((Path(folder) / "docs.json").read_text("utf-8"))
        docs = [x for x in rows if x["split"] == split]
        start = np.array([x["start"] for x in docs], np.int64)
        if start[0] != 0 or (np.diff(start) <= 0).any() or start[-1] >= n_tokens:
            raise ValueError(f"it does not fit {split}.bin")
        return start, [str(x["title"]) for x in docs], [str(x["source"]) for x in docs]


def window_starts(n_tokens, block_size, seed, epoch):
    """First tokens (W,) of one epoch's training windows, in the order in which they are read.
    A pure function: resuming, any number of ranks and attribution see the same sequences. Windows
    do not overlap; each epoch shifts them by its own offset below block_size."""
    if n_tokens < 2 * block_size:
        raise UserError(f"{n_tokens} training tokens, expected two windows of block_size = "
                        f"{block_size} at least; lower --block_size or give more text")
    rng = np.random.default_rng((seed, epoch))
    offset = rng.integers(block_size)
    return offset + block_size * rng.permutation((n_tokens - block_size) // block_size)


# --------------------------------------- a trained run
class Run:
    """A run's model and tokenizer, and unless text=False the text that it was trained on."""
    def __init__(self, out_dir, device="auto", text=True):
        self.out_dir = Path(out_dir)
        self.device = pick_device(device)
        self.model, self.ckpt = load_checkpoint(out_dir, self.device)
        self.model.requires_grad_(False)
        self.tokenizer = load_tokenizer(self.out_dir)
        self.T = self.model.config.block_size
        self.hash = fingerprint(self.model.state_dict())
        if not text:
            return
        if not self.model.config.n_proto:
            raise UserError(f"{self.out_dir} holds a dense model (n_proto = 0): no prototypes here")
        with reading(f"{self.out_dir}/ckpt.pt", "train it again: python train.py"):
            self.folder = dataset_folder(self.ckpt["train_config"]["dataset"])
            self.train, self.val, self.meta = load_dataset(self.folder)
            if self.ckpt["data"] != self.meta["sha256"]["train.bin"]:
                raise ValueError(f"it was trained on another version of {self.folder}")
        found = load_documents(self.folder, "train", len(self.train))
        self.doc_start, self.titles, self.source_of = found
        self.sources, self.doc_source = np.unique(self.source_of, return_inverse=True)

    def decode(self, tokens):
        return self.tokenizer.decode([int(t) for t in tokens])


# --------------------------------------- devices and ranks
def pick_device(name):
    """'auto', 'cpu', 'cuda[:i]' or 'mps' -> torch.device, if it can be used here."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with reading(f"--device={name}", "expected auto, cpu, cuda or mps"):
        torch.empty(1, device=name)
    return torch.device(name)


def set_up_ranks(name):
    """A device's name -> rank, number of ranks, device. Under torchrun starts NCCL or gloo."""
    device = pick_device(name)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # torchrun keeps one store over its restarts; a prefix hides the addresses of ranks that died
    store, rank, ranks = next(torch.distributed.rendezvous("env://"))
    store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    torch.distributed.init_process_group(store=store, rank=rank, world_size=ranks)
    return rank, ranks, device

"""A few long texts -> many short documents, which attribution and retraining need: passages of each .txt file of a folder, as one .jsonl file.

    python experiments/passages.py --folder=books --out=passages.jsonl
    python data/prepare.py passages.jsonl --name=books512 --vocab_size=512

Each passage is whole lines, of about --length characters (a line of four times that is cut at a blank); a file gives its first --most characters, so that a long one does not
crowd out the others. The passage's source is the name of its file.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from prism import UserError, atomic, parse_config, run_main  # noqa: E402


@dataclass
class PassagesConfig:
    folder: str = ""       # holds .txt files, UTF-8
    length: int = 4000     # characters of a passage, at least, but for the last of a file
    most: int = 140000     # characters taken of a file, about; 0: all
    out: str = "passages.jsonl"  # the result, a file for data/prepare.py


def passages(text, length, most):
    """Yields pieces of `text` that end where a line does, or, in long lines, a word; each of at least `length` characters but for the last, until `most` are out."""
    piece, out = "", 0
    for part in re.findall(rf"[^\n]{{1,{4 * length}}}(?:\n|(?=\s)|[^\s]*)|\n", text):
        piece += part
        if len(piece) >= length and piece.strip():
            yield piece
            out, piece = out + len(piece), ""
            if most and out >= most:
                return
    if piece.strip():
        yield piece


def main(argv):
    cfg = parse_config(PassagesConfig, argv)
    if cfg.length < 1 or cfg.most < 0:
        raise UserError(f"length is {cfg.length}, most {cfg.most}; expected at least 1 and at least 0")
    files = sorted(Path(cfg.folder).glob("*.txt")) if cfg.folder else []
    if not files:
        raise UserError(f"--folder={cfg.folder}: no .txt file there; give a folder of them")
    n = taken = given = 0
    with atomic(cfg.out, "w", encoding="utf-8") as f:
        for path in files:
            try:
                text = path.read_text("utf-8-sig")
            except UnicodeDecodeError as e:
                raise UserError(f"{path}: {e}; convert it to UTF-8") from None
            given += len(text)
            for k, piece in enumerate(passages(text, cfg.length, cfg.most), 1):
                f.write(json.dumps(dict(text=piece, title=f"{path.name}#{k}", source=path.stem)) + "\n")
                n, taken = n + 1, taken + len(piece)
        if not n:
            raise UserError(f"--folder={cfg.folder}: its {len(files)} .txt files hold no text")
    print(f"{cfg.out}: {n} passages of {len(files)} files, {taken:,} of their {given:,} characters. Next: python data/prepare.py {cfg.out} --name=...")


if __name__ == "__main__":
    run_main(main)

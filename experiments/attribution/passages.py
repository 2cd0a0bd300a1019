"""Long .txt files -> passages of whole lines, a document each, whose source is the file's name.

    python experiments/attribution/passages.py --folder=books --out=passages.jsonl
    python data/prepare.py passages.jsonl --name=books512 --vocab_size=512
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import UserError, atomic, parse_config, run_main  # noqa: E402


@dataclass
class PassagesConfig:
    folder: str = "books"        # holds .txt files, UTF-8
    length: int = 4000           # characters of a passage, at least
    most: int = 140000           # characters read of a file
    out: str = "passages.jsonl"  # a file for data/prepare.py


def main(argv):
    cfg = parse_config(PassagesConfig, argv)
    if not (files := sorted(Path(cfg.folder).glob("*.txt"))):
        raise UserError(f"found no .txt file in '{cfg.folder}'; name a folder: --folder=DIR")
    with atomic(cfg.out, "w", encoding="utf-8") as f:
        for path in files:
            text = path.read_text("utf-8-sig", errors="replace")[:cfg.most]
            lines, piece = text.splitlines(keepends=True), ""
            for n, line in enumerate(lines, 1):
                piece += line
                if len(piece) >= cfg.length or (n == len(lines) and piece.strip()):
                    row = dict(text=piece, title=f"{path.stem}, line {n}", source=path.stem)
                    f.write(json.dumps(row) + "\n")
                    piece = ""


if __name__ == "__main__":
    run_main(main)

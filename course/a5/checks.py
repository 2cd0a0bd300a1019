"""What A5 asks of score.py: scores of all documents for the board's queries."""
import shutil
import tempfile
from pathlib import Path

import numpy as np


def board(m, rng):
    import common
    home = Path(m.score.__file__).parent
    with tempfile.TemporaryDirectory() as folder:                 # an index may be written there
        shutil.copytree(home / "run", folder, dirs_exist_ok=True)
        run = common.Run(folder, "cpu")
        queries = np.load(home / "queries.npy", allow_pickle=False)
        return {"scores": m.score.score(run, queries)}

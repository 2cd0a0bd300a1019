"""What A5 asks of score.py: scores of all documents for the board's queries."""
import shutil
from pathlib import Path

import numpy as np


def board(m, rng):
    import common
    home = Path(m.score.__file__).parent
    shutil.copytree(home / "run", "run", dirs_exist_ok=True)      # an index may be written there
    run = common.Run("run", "cpu")
    queries = np.load(home / "queries.npy", allow_pickle=False)
    return {"scores": m.score.score(run, queries)}

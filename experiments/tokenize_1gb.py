"""How fast does data/prepare.py tokenise, and in how much memory? 1 GB of text, one worker against all cores.

    python experiments/tokenize_1gb.py                # 1 GB, about five minutes on two cores
    python experiments/tokenize_1gb.py --mb=2         # seconds
    python experiments/tokenize_1gb.py --rounds=3     # one worker and all cores take turns

The text is Python's documentation, its lines and the words in them resampled (seeded), in one .txt file. Each run is
`python data/prepare.py` in a process of its own, so that the time is what users wait for: reading, tokenising, hashing,
writing, fsync; a 4,096-token BPE is trained once beforehand. Writes experiments/results/tokenize_1gb.json.
"""
import json, os, platform, random, re, resource, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import prepare
from prism import atomic, parse_config, run_main


@dataclass
class BenchConfig:
    mb: int = 1000      # size of the text in units of 1,000,000 bytes
    rounds: int = 1     # each number of workers runs so many times, in turn
    seed: int = 1337    # of the text
    out: str = str(ROOT / "experiments/results/tokenize_1gb.json")  # where the figures go


def write_text(path, n_bytes, seed):
    """Resampled documentation: one word in four is another word of the corpus, frequent ones more often."""
    rng = random.Random(seed)
    lines = [line for piece in prepare.pydoc_pieces() for line in piece.text.encode("utf-8").splitlines(keepends=True)]
    words = [word for line in lines for word in line.split()]
    with open(path, "wb") as f:
        while f.tell() < n_bytes:
            text = b"".join(rng.choices(lines, k=2000))
            parts = re.split(rb"(\S+)", text)
            for i in rng.sample(range(1, len(parts), 2), len(parts) // 8):
                parts[i] = rng.choice(words)
            f.write(b"".join(parts)[:n_bytes - f.tell()].decode("utf-8", "ignore").encode("utf-8") or b" ")


def memory(pid):
    """Resident bytes of a process and its children, from /proc."""
    def resident(pid):
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return resident(pid) + sum(map(resident, children))


def run(text, folder, tokenizer, workers):
    """One run of data/prepare.py. Returns its seconds, cores it got, peak resident bytes and meta.json."""
    cpu = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start, before, peak = time.perf_counter(), cpu(), 0
    process = subprocess.Popen([sys.executable, ROOT / "data/prepare.py", text, "--name=run", f"--data_dir={folder}",
                                f"--tokenizer={tokenizer}", f"--workers={workers}"], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.02 if time.perf_counter() - start < 10 else 0.5)
    if process.returncode:
        raise SystemExit(f"data/prepare.py ended with status {process.returncode}")
    seconds = time.perf_counter() - start
    return seconds, (cpu() - before) / seconds, peak, json.loads((folder / "run/meta.json").read_text("utf-8"))


def main(argv):
    cfg = parse_config(BenchConfig, argv)
    cores = os.cpu_count()
    with tempfile.TemporaryDirectory(prefix="tokenize-") as folder:
        folder = Path(folder)
        prepare.prepare(["pydoc"], prepare.PrepareConfig(name="tokenizer", data_dir=str(folder)))
        write_text(folder / "text.txt", cfg.mb * 10 ** 6, cfg.seed)
        size = (folder / "text.txt").stat().st_size
        runs = []
        for _ in range(cfg.rounds):
            for workers in dict.fromkeys((1, cores)):
                seconds, used, peak, meta = run(folder / "text.txt", folder, folder / "tokenizer", workers)
                runs.append({"workers": workers, "seconds": round(seconds, 2), "mb_per_second": round(size / 1e6 / seconds, 2), "cores_used": round(used, 2),
                             "peak_rss_mb": round(peak / 1e6), "load_average": round(os.getloadavg()[0], 2), "sha256": meta["sha256"]["train.bin"]})
                print(json.dumps(runs[-1]), file=sys.stderr)
    assert len({r["sha256"] for r in runs}) == 1, "the tokens must not depend on the number of workers"
    speed = {n: median(r["mb_per_second"] for r in runs if r["workers"] == n) for n in (1, cores)}
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc/cpuinfo") else None
    import tiktoken, torch
    result = {"command": " ".join(["python experiments/tokenize_1gb.py", *argv]), "megabytes": size / 1e6,
              "tokens": meta["train"]["tokens"] + meta["val"]["tokens"], "vocab_size": meta["vocab_size"],
              "mb_per_second": speed, "speed_up": round(speed[cores] / speed[1], 3), "peak_rss_mb": max(r["peak_rss_mb"] for r in runs),
              "runs": runs, "machine": {"cpu": cpu[1] if cpu else platform.processor(), "cores": cores, "system": platform.system(),
                                        "python": platform.python_version(), "torch": torch.__version__, "tiktoken": tiktoken.__version__}}
    with atomic(cfg.out, "w", encoding="utf-8") as f:
        json.dump(result, f, indent=1)
    print(f"tokenize: {size / 1e6:.0f} MB, {speed[1]:.1f} MB/s with 1 worker, {speed[cores]:.1f} MB/s with {cores}, "
          f"speed-up {result['speed_up']:.2f}, peak {result['peak_rss_mb']} MB")


if __name__ == "__main__":
    run_main(main)

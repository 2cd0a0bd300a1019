"""Runs checks on a submission: in this process, or in a sandbox. Only arrays come back.

    python -s -P worker.py < request.json > frames     started by grade.py, as root

The sandbox: a nursery that runs no foreign code imports numpy and torch and forks a child for each
check. The child becomes a user of its own, with limits and without a network, and only then imports
the submission. What it writes to its pipe is an .npz; whatever it leaves running is killed.
"""
import contextlib
import ctypes
import importlib
import io
import json
import os
import re
import select
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
MOST = 2 ** 24                                           # bytes of a frame
LIMITS = {"RLIMIT_AS": 2 ** 33, "RLIMIT_NPROC": 64, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 256}
SUBREAPER, NO_NEW_PRIVS = 36, 38                         # of prctl
NEW_MOUNT, NEW_IPC, NEW_NET = 0x00020000, 0x08000000, 0x40000000
TEMPORARY = "/tmp", "/var/tmp", "/dev/shm"
PRIVATE, BIND = 0x44000, 0x1000                          # of mount


# ------------------------------------------- a check, in whatever process
def programs(path):
    """A file of checks -> {name: check}"""
    found = {}
    sys.path.append(str(HERE))                           # inputs.py
    exec(compile(path.read_text("utf-8"), path.name, "exec"), found)
    return found


@contextlib.contextmanager
def loaded(folder, files):
    """Imports the files of a folder anew -> namespace of modules; then all is as before."""
    folder, path, before = Path(folder).resolve(), list(sys.path), dict(sys.modules)
    sys.dont_write_bytecode = True
    places = [folder, folder / "experiments", folder / "experiments/attribution"]
    names = [file.stem for place in places for file in place.glob("*.py")]
    for name in names:
        sys.modules.pop(name, None)
    sys.path[:0] = map(str, places)
    importlib.invalidate_caches()
    try:
        stems = [Path(file).stem for file in files]
        yield SimpleNamespace(**{stem: importlib.import_module(stem) for stem in stems})
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def describe(error, folder):
    """An exception -> one line, with file and line of the submission, or else of the check"""
    place, inside, trace = "", False, error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        mine = path.is_relative_to(Path(folder).resolve()) and path.parent != HERE
        if mine or path.name == "checks.py" and not inside:
            place, inside = f"{path.name}, line {trace.tb_lineno}: ", mine
        trace = trace.tb_next
    if isinstance(error, NotImplementedError):
        return f"{place}not written yet"
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename or '').name}, line {error.lineno}: "
    words = " ".join(f"{type(error).__name__}: {error}".split()).replace(f"{folder}/", "")
    return place + re.sub("0x[0-9a-f]+", "0x...", words)[:300]


def numbers(value):
    """A tensor, array or number -> array of float64, or of float32 where it is that."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"expected an array of numbers, found one of {array.dtype}")
    return array if array.dtype == np.float32 else array.astype(np.float64)


def answer(folder, files, check, seeds):
    """Runs check(modules, rng) with each seed -> {"seed/name": array}, or {"error": text}"""
    import torch
    arrays, seed = {}, None
    try:
        with loaded(folder, files) as modules:
            for seed in seeds:
                torch.manual_seed(seed)
                for name, value in check(modules, np.random.default_rng(seed)).items():
                    arrays[f"{seed}/{name}"] = numbers(value)
    except BaseException as error:                       # sys.exit and recursion too
        where = "" if seed is None else f", at seed {seed}"
        return {"error": np.array(describe(error, folder) + where)}
    return arrays


# ------------------------------------------- the sandbox
def isolate(hide, keep):
    """A mount and a network namespace of our own, in which these folders are empty but for what is
    kept; /tmp and its like are ours alone and vanish with us -> done or not"""
    libc = ctypes.CDLL(None)
    libc.prctl(SUBREAPER, 1, 0, 0, 0)                    # orphans become ours, to be waited for
    if libc.unshare(NEW_MOUNT | NEW_IPC | NEW_NET):
        return False
    failed = libc.mount(b"none", b"/", None, PRIVATE, None)
    keep = {place: os.open(place, os.O_PATH) for place in keep}
    for path in sorted(hide):                            # the outer ones first
        if os.path.isdir(path):
            failed |= libc.mount(b"tmpfs", path.encode(), b"tmpfs", 0, b"mode=1777,size=1g")
    for place, number in keep.items():
        if any(Path(place).is_relative_to(path) for path in hide):
            Path(place).mkdir(parents=True, exist_ok=True)
            failed |= libc.mount(b"/proc/self/fd/%d" % number, place.encode(), None, BIND, None)
    return not failed


def closed_above(place):
    """The folders above one that other users may not enter, the innermost first"""
    return [str(p) for p in Path(place).parents if not p.stat().st_mode & 1]


def confine(request, pipe):
    """From root to the request's user, for ever: no files but a null device and the pipe, 3."""
    import resource                                      # not on Windows
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.dup2(pipe, 3)
    os.closerange(4, 1024)
    for name, most in (LIMITS | {"RLIMIT_FSIZE": request["file_bytes"]}).items():
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    Path("/proc/self/oom_score_adj").write_text("1000")  # the first to go where memory ends
    os.chdir(request["scratch"])
    ctypes.CDLL(None).prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(request["uid"])
    os.setuid(request["uid"])


def sweep(uid):
    """Kills all that the user `uid` runs, at once, and waits for it."""
    pid = os.fork()
    if pid == 0:
        other = uid + 1                                  # so that they cannot kill this one first
        os.setresuid(other, uid, other)
        try:
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def receive(pipe, seconds):
    """Reads a frame to its end -> bytes, and what went wrong, or "" """
    frame, end = b"", time.monotonic() + seconds
    while select.select([pipe], [], [], max(0, end - time.monotonic()))[0]:
        part = os.read(pipe, 2 ** 16)
        frame += part
        if not part:
            return frame, "" if frame else "the process ended without an answer"
        if len(frame) > MOST:
            return b"", "the answer is too long"
    return b"", f"no answer within {seconds:.0f} seconds"


def in_child(request, check, seeds, seconds):
    """answer() in a child of its own user -> its frame, and what went wrong"""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            confine(request, writer)
            frame = io.BytesIO()
            np.savez(frame, **answer(request["folder"], request["files"], check, seeds))
            with open(3, "wb") as f:
                f.write(frame.getbuffer())
        finally:
            os._exit(0)
    os.close(writer)
    frame, why = receive(reader, seconds)
    sweep(request["uid"])
    os.close(reader)
    return frame, why


def say(facts, frame=b""):
    """A line of JSON with the length of what follows it."""
    sys.stdout.buffer.write(json.dumps(facts | {"size": len(frame)}).encode() + b"\n" + frame)
    sys.stdout.buffer.flush()


def nursery():
    request = json.load(sys.stdin)
    os.umask(0o022)                                      # the user must reach what is kept
    for name in request["preload"]:                      # the user may not be able to read them
        with contextlib.suppress(ImportError):           # our own files are not found here
            importlib.import_module(name)
    checks = programs(Path(request["checks"]))
    closed = closed_above(sys.prefix)[-1:] + closed_above(sys.base_prefix)[-1:]
    keep = sys.prefix, sys.base_prefix, request["folder"], request["scratch"]
    isolated = isolate({request["beside"], *request["hide"], *closed, *TEMPORARY} - {"/"}, keep)
    ready = isolated or not (request["hide"] or closed)
    say({"isolated": isolated, "ready": ready})
    if not ready:
        return
    end = time.monotonic() + request["total"]
    for name, seeds in [["import", []], *request["run"]]:
        left = min(request["seconds"], end - time.monotonic())
        frame, why = in_child(request, checks.get(name), seeds, left) if left > 0 else (
            b"", f"not run: the {request['total']} seconds of this submission were over")
        say({"check": name, "why": why}, frame)
        if name == "import" and (why or b"error.npy" in frame):
            return                                       # once, not once a check


if __name__ == "__main__":
    nursery()

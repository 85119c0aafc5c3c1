"""What the tests of the review app share: studies on SQLite and on a real PostgreSQL, pictures, and clients."""
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the review app is not installed: pip install 'histokit[review]'")

from histokit.core.pictures import write_picture       # noqa: E402
from histokit.review.store_images import NewFile        # noqa: E402

KEYS = ("architecture", "atrophy", "complexes", "fibrosis")


def postgres_folder():
    "Where PostgreSQL's programs lie, or None."
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f/"initdb").exists() and (f/"postgres").exists()), None)


def as_owner():
    "What makes subprocess run as a user who is not root, as PostgreSQL asks; its name."
    if os.geteuid() != 0: return {}, pwd.getpwuid(os.geteuid()).pw_name
    name = next((n for n in ("postgres", "nobody") if n in {p.pw_name for p in pwd.getpwall()}), None)
    if name is None: pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
    return dict(user=name, extra_groups=[]), name


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Postgres:
    "A PostgreSQL of its own in a temporary folder."
    def __init__(self):
        self.bin, self.port = postgres_folder(), free_port()
        if self.bin is None: pytest.skip("no PostgreSQL here (initdb, postgres): apt-get install postgresql")
        self.run_as, self.user = as_owner()
        self.folder = Path(tempfile.mkdtemp(prefix="histokit-pg-"))
        if "user" in self.run_as: shutil.chown(self.folder, self.user)
        how = dict(check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.folder, **self.run_as)
        init = ["-D", self.folder/"data", "-U", "histokit", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"]
        subprocess.run([self.bin/"initdb", *init], **how)
        told = ["-p", str(self.port), "-k", self.folder, "-c", "listen_addresses=127.0.0.1"]
        told += ["-c", "fsync=off", "-c", "max_connections=120"]
        log = open(self.folder/"log", "wb")
        self.process = subprocess.Popen([self.bin/"postgres", "-D", self.folder/"data", *told], stdout=log,
            stderr=subprocess.STDOUT, cwd=self.folder, **self.run_as)
        self._wait()

    def _connect(self):
        import psycopg
        return psycopg.connect(f"postgresql://histokit@127.0.0.1:{self.port}/postgres", autocommit=True)

    def _wait(self):
        import psycopg
        for _ in range(200):
            try: return self._connect().close()
            except psycopg.OperationalError: time.sleep(.05)
        raise RuntimeError(f"PostgreSQL did not start: {(self.folder/'log').read_text()[-500:]}")

    def new_database(self):
        "The address of a database that is empty."
        name = f"t{uuid.uuid4().hex}"
        with self._connect() as c: c.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://histokit@127.0.0.1:{self.port}/{name}"

    def close(self):
        self.process.send_signal(signal.SIGQUIT)        # at once: nothing of it is kept
        self.process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)


def new_file(name, content="0"):
    "A file that is said to lie in the study."
    return NewFile(name, (content * 64)[:64], 10, 80, 60, .5, f"files/{content}.tif")


def add_people(store, *names, role="scorer"): return [store.add_person(name, role) for name in names]


def add_images(store, n, prefix="S-1"):
    return [store.register(new_file(f"{prefix}_Image{i:03}.tif", f"{i % 10}")).id for i in range(1, n + 1)]


def draft_all(store, value=2., version="m1"):
    while claim := store.claim("drafter"): store.finish(claim.id, "drafter", {k: value for k in KEYS}, version)


def picture_bytes(folder, kind="tif", size=(60, 80), seed=0):
    "A picture's file as bytes."
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return write_picture(Path(folder)/f"made.{kind}", pixels).read_bytes()

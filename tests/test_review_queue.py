"""The review app's queue: in order, once each, whoever is killed and when."""
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from review_tools import KEYS, add_images, free_port

from histokit.core.pictures import write_picture
from histokit.review.queue import Drafter, Worker, run_worker, seen_path, tiles_path
from histokit.review.schema import files, jobs
from histokit.review.scorer import Draft
from histokit.review.store import Store
from histokit.review.store_images import ImageQuery, Person
from histokit.review.uploads import keep_folder

ROOT = Path(__file__).resolve().parent.parent
US = {"X-Histokit": "1"}
NOBODY = Person(0, "", "viewer")


def wait_for(happened, seconds=180.):
    until = time.monotonic() + seconds
    while not happened() and time.monotonic() < until: time.sleep(.05)
    assert happened()


def crops(folder, n, first=0):
    folder.mkdir(exist_ok=True)
    for i in range(first, first + n):
        pixels = np.random.default_rng(i).integers(0, 255, (120, 160, 3), dtype=np.uint8)
        write_picture(folder/f"S-1_Image{i:03}.tif", pixels)
    return folder


# --- the order and the claim ------------------------------------------------------------------

def test_many_workers_claim_each_job_once_and_in_order(store):
    add_images(store, 40)
    def work(name):
        mine = []
        while claim := store.claim(name):
            assert store.finish(claim.id, name, dict.fromkeys(KEYS, 1.), "m1")
            mine.append(claim.id)
        return mine
    with ThreadPoolExecutor(4) as pool: taken = list(pool.map(work, "abcd"))
    assert sorted(sum(taken, [])) == sorted(j.id for j in store.jobs_in())
    assert all(mine == sorted(mine) for mine in taken)
    assert sum(e.kind == "draft" for i in range(1, 41) for e in store.history(i)) == 160


def test_an_ended_lease_is_taken_over_and_the_late_answer_is_not_kept(store):
    add_images(store, 1)
    first = store.claim("slow")
    assert store.claim("fast") is None
    second = store.claim("fast", lease=0)
    assert second.id == first.id and second.attempts == 2
    assert not store.finish(first.id, "slow", dict(fibrosis=4.), "m1") and not store.fail(first.id, "slow", "late")
    assert store.finish(second.id, "fast", dict(fibrosis=1.), "m1")
    assert [e.value for e in store.history(1)] == [1]


def test_a_worker_that_renews_keeps_its_job(store):
    add_images(store, 1)
    claim = store.claim("busy", lease=.4)
    for _ in range(6):
        time.sleep(.1)
        assert store.renew(claim.id, "busy") and store.claim("other", lease=.4) is None


def test_a_picture_that_kills_workers_is_given_up(store):
    from histokit.review.store_jobs import MOST_ATTEMPTS
    add_images(store, 2)
    killer = store.claim("w0").id
    for i in range(1, MOST_ATTEMPTS): assert store.claim(f"w{i}", lease=0).id == killer
    assert store.claim("next", lease=0).id != killer
    [job] = store.jobs_in("Failed")
    assert job.id == killer and "workers died" in job.reason
    store.retry(killer)
    assert store.claim("again", lease=60).id == killer


def test_without_a_model_jobs_make_tiles_and_a_new_model_puts_all_in_line(store, tmp_path):
    keep_folder(store, crops(tmp_path/"crops", 3))
    stop = lambda: not store.jobs_in("Pending")
    assert run_worker(store.folder, ended=stop) == 3 if store.is_sqlite else True
    if not store.is_sqlite: return
    assert all(tiles_path(store, store.image(i).file).exists() for i in (1, 2, 3))
    assert {j.model_version for j in store.jobs_in()} == {None}
    (tmp_path/"model.bin").write_bytes(b"a model")
    version = store.add_model(tmp_path/"model.bin")
    assert len(store.jobs_in("Pending")) == 3
    run_worker(store.folder, ended=stop)
    [why] = {j.reason for j in store.jobs_in("Failed")}
    assert "model file" in why and str(tmp_path) not in why and version


# --- killed -----------------------------------------------------------------------------------

def check_whole(store, n):
    "Every image is there once, done once, with its tiles."
    assert store.find(NOBODY, ImageQuery())[0] == n
    with store.reading() as c:
        states = [j.state for j in c.execute(jobs.select())]
        assert len(c.execute(files.select()).all()) == n
    assert states == ["Completed"] * n
    for i in range(1, n + 1): assert tiles_path(store, store.image(i).file).exists()


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_worker_killed_at_random_loses_nothing(store, tmp_path, kills):
    n = 6 * kills
    keep_folder(store, crops(tmp_path/"crops", n))
    chance, worker = random.Random(kills), Worker(store, lease=20).start()
    for _ in range(kills):
        wait_for(lambda: worker.process is not None and (store.jobs_in("Processing") or not store.jobs_in("Pending")))
        time.sleep(chance.random() * .1)
        killed = worker.process
        killed.kill()
        wait_for(lambda killed=killed: worker.process is not killed)
    retried = set()
    def settled():
        for job in store.jobs_in("Failed"):
            assert "workers died" in job.reason
            retried.add(job.id)
            store.retry(job.id)
        return len(store.jobs_in("Completed")) == n
    wait_for(settled)
    worker.stop()
    check_whole(store, n)


def start_server(study, port, url):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from histokit.start import begin; begin()"
    told = ["review", str(study), "--port", str(port), "--no-browser"]
    out = open(study.parent/"server.log", "ab")
    there = os.environ | dict(OMP_NUM_THREADS="1", **(dict(DATABASE_URL=url) if url else {}))
    return subprocess.Popen([sys.executable, "-c", code, *told], stdout=out, stderr=out, env=there)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_server_killed_at_random_loses_nothing_that_it_called_saved(tmp_path, kills):
    import httpx
    study, port, chance = tmp_path/"study", free_port(), random.Random(kills)
    folder, saved, number = crops(tmp_path/"crops", 4 * kills), {}, 0
    files_left = sorted(folder.iterdir())
    server = start_server(study, port, "")
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=US, trust_env=False, timeout=20)
    def answers():
        try: return client.get("/api/health").status_code == 200
        except httpx.TransportError: return False
    taken = []
    for _ in range(kills):
        wait_for(answers)
        until = time.monotonic() + .3 + chance.random()
        enough = number + 4
        while time.monotonic() < until or number < enough:
            if files_left:
                path = files_left[0]
                answer = client.post("/api/uploads", files=dict(files=(path.name, path.read_bytes()))).json()
                taken.append(answer["accepted"][0]["id"])
                files_left.pop(0)
            number += 1
            image, value = chance.choice(taken), number % 5
            body = dict(events=[dict(uid=f"uid-{number:06}", measure="fibrosis", value=value)])
            assert client.post(f"/api/images/{image}/events", json=body).status_code == 200
            saved[f"uid-{number:06}"] = (image, value)
        server.send_signal(signal.SIGKILL)
        server.wait()
        server = start_server(study, port, "")
    wait_for(answers)
    done = lambda: all(j["state"] == "Completed" for j in client.get("/api/jobs").json())
    wait_for(done, 120)
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 130
    with Store(study) as store:
        kept = {e.uid: (e.image_id, e.value) for i in set(taken) for e in store.history(i)}
        assert kept == saved and len(saved) > kills
        assert len(set(taken)) == len(taken) == store.find(NOBODY, ImageQuery())[0]
        assert "Traceback" not in (tmp_path/"server.log").read_text()


def test_the_server_that_dies_takes_its_worker_along(tmp_path):
    import psutil
    study = tmp_path/"study"
    server = start_server(study, free_port(), "")
    wait_for(lambda: any("queue" in " ".join(c.cmdline())
        for c in psutil.Process(server.pid).children(recursive=True)), 60)
    workers = psutil.Process(server.pid).children(recursive=True)
    server.kill()
    server.wait()
    wait_for(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers), 30)


def test_the_process_that_draws_maps_ends_with_the_server(tmp_path):
    import psutil
    code = f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from histokit.review.api_routes import Review
from histokit.review.scorer import Draft
from histokit.review.store import Store
review = Review(Store({str(tmp_path / "study")!r}))
print(review._send(time.monotonic).result() > 0, *review._maps._processes, flush=True)
time.sleep(60)"""
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    done, number = server.stdout.readline().split()
    assert done == "True" and psutil.pid_exists(int(number))
    server.kill()
    server.wait()
    wait_for(lambda: not psutil.pid_exists(int(number)), 20)


def test_a_job_encodes_its_picture_once(tmp_path):
    "The features that are kept beside a draft are those of the draft."
    drafted = []
    class OneLook:
        by_sample = False
        def draft(self, path, beside):
            drafted.append(path)
            return Draft({KEYS[0]: 1.}, {}, {KEYS[0]: .5}, np.arange(3, dtype=np.float32))
    with Store(tmp_path/"study") as store:
        drafter = Drafter(store)
        drafter.scorer, drafter.version = OneLook, "v1"
        assert drafter.draft("files/a.tif") == ({KEYS[0]: 1.}, "v1") and len(drafted) == 1
        with np.load(seen_path(store, "v1", "files/a.tif")) as kept:
            assert kept["features"].tolist() == [0, 1, 2] and kept["uncertainty"] == .5

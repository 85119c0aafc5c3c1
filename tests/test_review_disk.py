"""The review app on a disk that is full: each answer is one line, nothing that was called saved is lost, and it goes on
where it stood as soon as there is room."""
import contextlib
import errno
import resource
import subprocess

import pytest

from review_tools import KEYS, picture_bytes

from test_review_api import Study, edits

from histokit.review.queue import Drafter, tiles_path, work_on


@contextlib.contextmanager
def filled(folder):
    "The disk without a free byte, until the block ends."
    filler = folder/"filler"
    with open(filler, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True: f.write(bytes(4096))
    try: yield
    finally: filler.unlink()


@contextlib.contextmanager
def limited(folder):
    "No file of this process may grow, until the block ends."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(p.stat().st_size for p in folder.glob("study/study.db*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["disk", "limit"])
def small(request, tmp_path):
    "A folder, and a context in which nothing can be written there: a real disk of 16 MB, or a limit on files."
    place = tmp_path/"small"
    place.mkdir()
    if request.param == "limit":
        yield place, limited
        return
    told = ["mount", "-t", "tmpfs", "-o", "size=16m", "histokit-test", str(place)]
    try: done = subprocess.run(told, capture_output=True)
    except FileNotFoundError: pytest.skip("no disk can be mounted here: there is no mount")
    if done.returncode: pytest.skip("no disk can be mounted here; it takes root")
    yield place, filled
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def save_until_full(study):
    "Save scores until one is refused: the numbers of those that were saved, and the answer that was not."
    for i in range(4000):
        answer = study.scorer.post("/api/images/1/events", json=edits((KEYS[i % 4], i % 5), start=i))
        if answer.status_code != 200: return i, answer
    raise AssertionError("it was never full")


def test_a_full_disk_loses_nothing_and_says_so(small, tmp_path):
    place, full = small
    study, big = Study(place/"study"), picture_bytes(tmp_path, "tif", size=(900, 1200), seed=1)
    study.upload(("S-1_Image001.tif", picture_bytes(tmp_path)))
    with full(place):
        n, answer = save_until_full(study)
        assert answer.status_code == 503 and "full" in answer.json()["detail"] and "\n" not in answer.json()["detail"]
        refused = study.upload(("S-1_Image002.tif", big)).json()
        assert refused["accepted"] == [] and "cannot write" in refused["refused"][0]["why"]
        assert study.viewer.get("/api/images").json()["total"] == 1
        assert len(study.store.history(1)) == n
    for i in range(n + 1):
        assert study.scorer.post("/api/images/1/events", json=edits((KEYS[i % 4], i % 5), start=i)).status_code == 200
    assert [e.uid for e in study.store.history(1)] == [f"uid-{i:06}" for i in range(n + 1)]
    assert len(study.upload(("S-1_Image002.tif", big)).json()["accepted"]) == 1
    assert list((study.store.folder/"incoming").iterdir()) == []
    with study.store.reading() as c: assert c.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    study.review.close()


def test_tiles_that_do_not_fit_fail_the_job_and_it_can_be_tried_again(small, tmp_path, monkeypatch):
    place, full = small
    study = Study(place/"study")
    study.upload(("S-1_Image001.tif", picture_bytes(tmp_path, size=(900, 1200))))
    claim, failed = study.store.claim("w"), []
    monkeypatch.setattr(study.store, "fail", lambda job, worker, why: failed.append(why))    # the database is full too
    with full(place): work_on(study.store, claim, "w", Drafter(study.store))
    monkeypatch.undo()
    [why] = failed
    assert "cannot write" in why and "\n" not in why
    path = tiles_path(study.store, claim.file)
    assert not path.exists() and not [p for p in path.parent.iterdir() if p.is_file()]
    assert work_on(study.store, claim, "w", Drafter(study.store)) and path.exists()
    assert study.store.jobs_in("Completed")
    study.review.close()


def test_the_errors_of_a_full_disk_are_known():
    "What a system says is what the kit has words for."
    from histokit.core.files import write_error
    assert "the disk is full" in str(write_error("x", OSError(errno.ENOSPC, "No space left on device")))
    assert "outgrows" in str(write_error("x", OSError(errno.EFBIG, "File too large")))

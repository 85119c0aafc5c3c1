"""The review app's server: who may ask what, what is refused, and what a browser is sent."""
import io
import socket
import struct
import zlib

import numpy as np
import pytest

from review_tools import KEYS, picture_bytes

from fastapi.testclient import TestClient

import histokit
from histokit.core.pictures import write_picture
from histokit.review.api import CSP, STREAM, create_app, openapi
from histokit.review.api_routes import ROUTES, Review
from histokit.review.measures import StudySettings
from histokit.review.people import hash_password
from histokit.review.serve import Address, ReviewServer, open_study
from histokit.review.store import ROLES, Store

PASSWORD = "a horse in a battery"
HASH = hash_password(PASSWORD)
US = {"X-Histokit": "1"}


class Study:
    "A served study with a person of each role, and a client for each."
    def __init__(self, folder, url=""):
        self.store = Store(folder, url)
        self.people = {role: self.store.add_person(role, role, HASH) for role in ROLES}
        self.review = Review(self.store)
        self.app = create_app(self.review)
        self.clients = {role: self.client(role) for role in ROLES} | {"": self.client()}

    def client(self, role=""):
        client = TestClient(self.app, headers=US, raise_server_exceptions=False)
        if role: client.cookies.set("histokit", self.review.logins.sessions.cookie_of(self.store.person(role)))
        return client

    def upload(self, *named, role="scorer"):
        return self.clients[role].post("/api/uploads", files=[("files", pair) for pair in named])

    def __getattr__(self, role): return self.clients[role]


@pytest.fixture
def study(database, tmp_path):
    made = Study(tmp_path/"study", database())
    made.upload(("S-1_Image001.tif", picture_bytes(tmp_path)), ("S-1_Image002.png", picture_bytes(tmp_path, "png")))
    yield made
    made.review.close()


def edits(*values, start=0, **more):
    told = [dict(uid=f"uid-{start + i:06}", measure=m, value=v, **more) for i, (m, v) in enumerate(values)]
    return dict(events=told)


# --- role by route ----------------------------------------------------------------------------

BODIES = {
    "/api/images/{number}/events": edits(("fibrosis", 1)), "/api/images/{number}/undo": dict(uid="undo-00001"),
    "/api/images/{number}/accept": dict(uid="accept-001"), "/api/images/{number}/flag": dict(uid="flag-00001", on=True),
    "/api/images/{number}/consensus": dict(uid="consent-01", scores=dict(fibrosis=1)),
    "/api/folder": dict(path="/nowhere"),
    "/api/people": dict(name="Eve", role="viewer", password=PASSWORD), "/api/people/{number}": dict(role="viewer"),
    "/api/study": dict(name="Other"), "/api/login": dict(name="viewer", password=PASSWORD),
    "/api/setup": dict(name="Eve", password=PASSWORD)}


def ask(client, route, **more):
    path = route.path.format(number=1, level=0, x=0, y=0).replace("map.png", "map.png?measure=fibrosis")
    return client.request(route.method, path, json=BODIES.get(route.path), **more)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    made = Study(folder/"study")
    made.upload(("S-1_Image001.tif", picture_bytes(folder)))
    yield made
    made.review.close()


@pytest.mark.parametrize("route", [*ROUTES, STREAM], ids=lambda r: f"{r.method} {r.path}")
def test_every_role_that_is_not_enough_is_refused(matrix, route):
    before = len(matrix.store.history(1)), len(matrix.store.people())
    for role in ("", *ROLES):
        enough = not route.role or role and ROLES.index(role) >= ROLES.index(route.role)
        if enough and (route is STREAM or route.path == "/api/logout"): continue
        if enough and route.method != "GET": continue                   # done elsewhere, and it would change the study
        status = ask(matrix.clients[role], route).status_code
        if enough: assert status in (200, 404), (role, status)
        else: assert status == (403 if role else 401), (role, status)
    assert (len(matrix.store.history(1)), len(matrix.store.people())) == before


@pytest.mark.parametrize("route", [r for r in ROUTES if r.method != "GET"], ids=lambda r: f"{r.method} {r.path}")
def test_every_change_needs_our_page(matrix, route):
    before = len(matrix.store.history(1)), len(matrix.store.people()), matrix.store.settings()
    foreign = ({"Origin": "http://evil.test"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"}, {"X-Histokit": "0"}, {"Origin": "http://testserver.evil.test"})
    for headers in foreign: assert ask(matrix.admin, route, headers=headers).status_code == 403, headers
    assert (len(matrix.store.history(1)), len(matrix.store.people()), matrix.store.settings()) == before


def test_the_table_has_every_route_of_the_application(matrix):
    known = {(r.method, r.path) for r in (*ROUTES, STREAM)}
    told = {(method.upper(), path) for path, item in openapi()["paths"].items() for method in item}
    assert told == known


def test_a_forged_or_closed_session_gets_nothing(study):
    client = study.client()
    for cookie in ("", "abc", "WzEsIngiXQ.aaaa.bbbb"):
        client.cookies.set("histokit", cookie)
        answer = client.get("/api/images")
        assert answer.status_code == 401 and "log in" in answer.json()["detail"]
    study.admin.delete(f"/api/people/{study.people['viewer']}")
    assert study.viewer.get("/api/images").status_code == 401


def test_an_expired_session_is_told_in_a_line(study, monkeypatch):
    monkeypatch.setattr("histokit.review.people.SESSION_SECONDS", -1)
    answer = study.scorer.post("/api/images/1/events", json=edits(("fibrosis", 1)))
    assert answer.status_code == 401 and answer.json()["detail"] == "log in first; your session may have ended"
    monkeypatch.undo()
    assert study.scorer.post("/api/images/1/events", json=edits(("fibrosis", 1))).status_code == 200


def test_headers_are_on_every_answer(study):
    for path in ("/", "/api/session", "/api/nothing", "/api/images/1/thumb.jpg", "/api/images/1", "/assets/x"):
        headers = study.scorer.get(path).headers
        assert headers["content-security-policy"] == CSP and "unsafe-inline" not in CSP
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert study.scorer.get("/api/images").headers["cache-control"] == "no-store"
    assert "private" in study.scorer.get("/api/images/1/thumb.jpg").headers["cache-control"]


def test_the_cookie_is_not_for_scripts_and_not_for_other_sites(study):
    cookie = study.client().post("/api/login",
        json=dict(name="scorer", password=PASSWORD)).headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
    study.review.secure = True
    answer = study.client().post("/api/login", json=dict(name="scorer", password=PASSWORD))
    assert "secure" in answer.headers["set-cookie"].lower()


# --- scoring ----------------------------------------------------------------------------------

def test_scoring_through_the_server(study):
    answer = study.scorer.post("/api/images/1/events", json=edits(("fibrosis", 3), ("atrophy", 0), seconds=2.5))
    assert answer.json()["mine"] == dict(fibrosis=3, atrophy=0)
    assert study.scorer.post("/api/images/1/events",
        json=edits(("fibrosis", 3), ("atrophy", 0), seconds=2.5)).json() == answer.json()
    assert study.scorer.post("/api/images/1/undo", json=dict(uid="undo-00001")).json()["mine"] == dict(fibrosis=3)
    study.admin.post("/api/images/1/events", json=edits(("fibrosis", 1), start=50))
    detail = study.viewer.get("/api/images/1").json()
    assert {p["name"]: p["scores"] for p in detail["people"]} == {"scorer": dict(fibrosis=3), "admin": dict(fibrosis=1)}
    assert [e["kind"] for e in detail["events"]] == ["score", "score", "undo", "score"]
    assert study.scorer.put("/api/images/1/consensus", json=dict(uid="consent-01", scores=dict(fibrosis=2))).json()[
        "consensus"] == dict(fibrosis=2)
    assert study.scorer.post("/api/images/1/flag", json=dict(uid="flag-00001", on=True)).json()["flagged"] is True
    assert study.scorer.get("/api/images?flagged=true").json()["total"] == 1


@pytest.mark.parametrize("body, why", [
    (edits(("fibrosis", 4.5)), "Fibrosis: 4.5 is no score; give 0 to 4 in steps of 1"),
    (edits(("colour", 1)), "no measure"),
    (edits(("fibrosis", "2; DROP")), "number"), (dict(events=[]), "at least 1"), (dict(), "Field required"),
    (edits(("fibrosis", 1), seconds=-1), "greater"),
    (dict(events=[dict(uid="x", measure="fibrosis", value=1)]), "match"),
    (edits(("fibrosis", 1), extra=1), "Extra inputs"), ([1], "dictionary")])
def test_what_is_no_score_is_refused_in_one_line(matrix, body, why):
    answer = matrix.scorer.post("/api/images/1/events", json=body)
    assert answer.status_code == 422 and why in answer.json()["detail"] and "\n" not in answer.json()["detail"]
    assert matrix.store.history(1) == []


def test_bodies_that_are_no_json_or_too_long(study):
    for content in (b"{", b"\xff\xfe", b'{"events": NaN}',
        b'{"events": [{"uid": "\\ud800", "measure": "a", "value": 1}]}'):
        answer = study.scorer.post("/api/images/1/events", content=content,
            headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422) and answer.json()["detail"]
    long = b'{"uid": "' + b"a" * (3 << 20) + b'"}'
    assert study.scorer.post("/api/images/1/undo", content=long).status_code == 413
    def pieces():
        yield from [bytes(1 << 20)] * 3
    assert study.scorer.post("/api/images/1/undo", content=pieces()).status_code in (400, 413)


@pytest.mark.parametrize("path",
    ["/api/images/0", "/api/images/99", "/api/images/99999999999999999999", "/api/images/-1",
    "/api/images/1/tiles/99/0_0.jpg", "/api/images/1/tiles/0/9_9.jpg", "/api/images/99/thumb.jpg", "/api/nothing",
    "/assets/..%2f..%2fpyproject.toml", "/..%2f..%2fetc%2fpasswd", "/api/images/1/map.png?measure=fibrosis"])
def test_what_is_not_there(matrix, path):
    answer = matrix.scorer.get(path)
    assert answer.status_code == 404 and "\n" not in answer.text.strip() and "root:" not in answer.text


def test_blind_first_through_the_server(study):
    study.admin.patch("/api/study", json=dict(blind_first=True))
    while claim := study.store.claim("w"): study.store.finish(claim.id, "w", dict.fromkeys(KEYS, 3.), "model-xyz")
    for path in ("/api/images", "/api/images/1", "/api/agreement", "/api/images?far=true", "/api/export.csv"):
        assert "model-xyz" not in study.scorer.get(path).text, path
    assert study.scorer.get("/api/images/1").json()["draft"] is None
    assert study.scorer.get("/api/export.csv").status_code == 403
    assert study.admin.get("/api/export.csv").status_code == 200
    assert study.scorer.post("/api/images/1/accept", json=dict(uid="accept-001")).status_code == 409
    for i, key in enumerate(KEYS): item = study.scorer.post("/api/images/1/events",
        json=edits((key, 1), start=i)).json()
    assert item["draft"] == dict.fromkeys(KEYS, 3) and item["far"] == 2
    assert study.viewer.get("/api/images/2").json()["draft"] == dict.fromkeys(KEYS, 3)


def test_export_and_study_through_the_server(study):
    study.scorer.post("/api/images/1/events", json=edits(("fibrosis", 3)))
    long, wide = (study.viewer.get(f"/api/export.csv?form={form}") for form in ("long", "wide"))
    assert long.headers["content-type"].startswith("text/csv") and "attachment" in long.headers["content-disposition"]
    assert "S-1_Image001.tif" in long.text and len(wide.text.strip().splitlines()) == 3
    told = study.viewer.get("/api/study").json()
    assert told["counts"]["images"] == 2 and told["groups"] == ["S-1"] and [s["name"]
        for s in told["scorers"]] == ["admin", "scorer"]
    for change in (dict(measures=[dict(key="fibrosis", high=2)]), dict(name=None), dict(serial_pattern="("),
        dict(measures=[])):
        assert study.admin.patch("/api/study", json=change).status_code in (409, 422)
    assert study.store.settings() == StudySettings()


def test_a_package_without_the_page_says_what_its_build_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(histokit, "__file__", str(tmp_path/"histokit"/"__init__.py"))
    page = lambda: TestClient(create_app()).get("/")
    assert page().status_code == 503 and "make web" in page().text
    (tmp_path/"histokit/_assets/web").mkdir(parents=True)
    (tmp_path/"histokit/_assets/web/MISSING.txt").write_text("built without the page; build it again\n")
    assert page().status_code == 503 and page().text == "built without the page; build it again\n"
    (tmp_path/"histokit/_assets/web/index.html").write_text("<!doctype html>")
    assert page().status_code == 200


# --- uploads ----------------------------------------------------------------------------------

def deflated_tiff(side, strip):
    "A TIFF that says it is a square of RGB in one deflated strip, whatever the strip holds."
    fields = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 8), (262, 3, 2), (273, 4, 8), (277, 3, 3),
        (278, 4, side), (279, 4, len(strip)), (284, 3, 1)]
    place = 8 + len(strip) + len(strip) % 2
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in fields)
    entries = entries.replace(struct.pack("<HHII", 258, 3, 1, 8), struct.pack("<HHII", 258, 3, 3, place + 126))
    head = struct.pack("<2sHI", b"II", 42, place) + strip.ljust(place - 8, b"\0")
    return head + struct.pack("<H", len(fields)) + entries + struct.pack("<IHHH", 0, 8, 8, 8)


def bad_files(folder):
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    whole = {kind: write_picture(folder/f"x.{kind}", noise).read_bytes() for kind in ("tif", "png", "jpg")}
    chunk = lambda name, data: len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    head = (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND",
        b"")
    zeros = zlib.compress(bytes(1 << 24))
    named = {"vast.tif": deflated_tiff(60_000, zeros), "lies.tif": deflated_tiff(64, zeros)}
    named |= {"one strip.tif": deflated_tiff(16_000, zeros), "empty.tif": b"", "text.tif": b"dear diary",
        "page.jpg": b"<html>", "zip.png": b"PK\3\4" + bytes(90), "bomb.png": bomb}
    named |= {f"half.{kind}": data[:len(data) // 2] for kind, data in whole.items()}
    good = whole["png"]
    return named | {"../../up.png": good, "a" * 300 + ".png": good, "b\u202egnp.exe": good}


def test_bad_files_are_refused_one_by_one_and_good_ones_kept(study, tmp_path):
    bad, good = bad_files(tmp_path), picture_bytes(tmp_path, "png", seed=5)
    sent = [*bad.items(), ("\U0001F52C emoji.png", good), ("folder/S-2_Image001.png", good)]
    answer = study.upload(*sent).json()
    assert [a["name"] for a in answer["accepted"]] == ["\U0001F52C emoji.png", "S-2_Image001.png"]
    assert len(answer["refused"]) == len(bad)
    for told in answer["refused"]: assert "\n" not in told["why"] and str(tmp_path) not in told["why"] and told["why"]
    why = {told["name"]: told["why"] for told in answer["refused"]}
    assert "more pixels" in why["vast.tif"] and "in one piece of 768 MB" in why["one strip.tif"]
    assert list((study.store.folder/"incoming").iterdir()) == []
    assert not list(tmp_path.rglob("up.png"))


def test_a_known_file_comes_back_with_its_history(study, tmp_path):
    study.scorer.post("/api/images/1/events", json=edits(("fibrosis", 3)))
    jobs = len(study.scorer.get("/api/jobs").json())
    again = study.upload(("S-1_Image001.tif", picture_bytes(tmp_path))).json()["accepted"][0]
    assert (again["id"], again["known"], again["job"]) == (1, True,
        None) and len(study.scorer.get("/api/jobs").json()) == jobs
    other = study.upload(("S-1_Image001.tif", picture_bytes(tmp_path, seed=9))).json()["accepted"][0]
    item = study.scorer.get("/api/images/1").json()
    assert other["changed"] and item["changed"] and item["mine"] == dict(fibrosis=3) and len(item["files"]) == 2


@pytest.mark.parametrize("kind", ["planar", "lzw", "deep", "alpha", "big", "strips"])
def test_tiffs_of_every_kind_are_taken_and_shown(matrix, tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    y, x = np.mgrid[:300, :260]
    pixels = np.stack([y * 255 / 300, x * 255 / 260, 255 - y * 255 / 300], -1).astype(np.uint8)
    how = dict(planar=dict(planarconfig="separate"), lzw=dict(compression="lzw"), big=dict(bigtiff=True),
        strips=dict(rowsperstrip=7))
    if kind == "deep": pixels = pixels.astype(np.uint16) * 257
    if kind == "alpha": pixels = np.dstack([pixels, np.full((300, 260), 255, np.uint8)])
    extra = dict(extrasamples=["unassalpha"]) if kind == "alpha" else {}
    stored = np.moveaxis(pixels, -1, 0) if kind == "planar" else pixels
    tifffile.imwrite(tmp_path/"x.tif", stored, photometric="rgb", **how.get(kind, {}), **extra)
    number = matrix.upload((f"S-3_{kind}.tif", (tmp_path/"x.tif").read_bytes())).json()["accepted"][0]["id"]
    from PIL import Image
    tile = Image.open(io.BytesIO(matrix.viewer.get(f"/api/images/{number}/tiles/9/0_0.jpg").content))
    assert tile.size == (255, 255) and 'Width="260"' in matrix.viewer.get(f"/api/images/{number}/picture.dzi").text
    want = (pixels[:255, :255, :3] // (257 if kind == "deep" else 1)).astype(int)
    assert np.abs(np.asarray(tile).astype(int) - want).mean() < 4


def test_an_upload_that_breaks_off_leaves_nothing(study, tmp_path):
    content = picture_bytes(tmp_path)
    body = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="a.tif"\r\n\r\n' + content[:2000]
    answer = study.scorer.post("/api/uploads", content=body,
        headers={"Content-Type": "multipart/form-data; boundary=cut"})
    assert answer.json()["accepted"] == [] and "in the middle of this file" in answer.json()["refused"][0]["why"]
    assert list((study.store.folder/"incoming").iterdir()) == []
    assert study.scorer.get("/api/images").json()["total"] == 2
    for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 999):
        assert study.scorer.post("/api/uploads", content=b"x", headers={"Content-Type": kind}).status_code == 422


def test_a_full_disk_is_told_in_a_line_and_leaves_no_half_file(study, tmp_path, monkeypatch):
    import errno
    import histokit.review.uploads as uploads
    class Full:
        def __init__(self, path): self.file = open(path, "xb", buffering=0)
        def write(self, data): raise OSError(errno.ENOSPC, "No space left on device")
        def fileno(self): return self.file.fileno()
        def close(self): self.file.close()
    monkeypatch.setattr(uploads, "open", lambda path, *mode, **more: Full(path), raising=False)
    answer = study.upload(("S-9_Image001.png", picture_bytes(tmp_path, "png", seed=3))).json()
    monkeypatch.undo()
    assert "the disk is full" in answer["refused"][0]["why"] and answer["accepted"] == []
    assert list((study.store.folder/"incoming").iterdir()) == []
    assert study.scorer.post("/api/images/1/events", json=edits(("fibrosis", 1))).status_code == 200


def test_a_folder_on_the_server(study, tmp_path):
    (tmp_path/"crops").mkdir()
    (tmp_path/"crops"/"S-5_Image001.png").write_bytes(picture_bytes(tmp_path, "png", seed=7))
    (tmp_path/"crops"/"broken.png").write_bytes(b"no")
    answer = study.admin.post("/api/folder", json=dict(path=str(tmp_path/"crops"))).json()
    assert len(answer["accepted"]) == len(answer["refused"]) == 1
    for path in ("/nowhere", str(study.store.folder), "", ".", "crops", "~nobody-there/x", "/a\0b"):
        assert study.admin.post("/api/folder", json=dict(path=path)).status_code == 422


# --- anything at all --------------------------------------------------------------------------

SENT = ("method", "url", "params", "json", "data", "files")


def ask_anything(ask, operation, how, checks):
    "Questions that fit an operation; every answer is one of those that the OpenAPI promises, a refusal one line."
    import requests
    from hypothesis import given
    @how
    @given(case=operation.as_strategy())
    def asked(case):
        told = {k: v for k, v in case.as_transport_kwargs(base_url="http://testserver").items() if k in SENT}
        sent = requests.Request(**told).prepare()
        answer = ask(method=sent.method, url=sent.url, content=sent.body, headers=dict(sent.headers))
        case.validate_response(answer, checks=checks)
        if answer.status_code >= 400: assert "\n" not in answer.json()["detail"]
    asked()


def test_any_question_that_fits_the_openapi_gets_an_answer_of_it(tmp_path):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, Phase, settings
    from schemathesis import checks
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
    from schemathesis.specs.openapi.checks import status_code_conformance
    study = Study(tmp_path/"study")
    study.upload(("S-1_Image001.tif", picture_bytes(tmp_path)))
    schema = schemathesis.openapi.from_dict(openapi())
    cookie = {"histokit": study.review.logins.sessions.cookie_of(study.store.person("admin"))}
    def ask(**told):
        "Each with a fresh session: log-out is one of the questions."
        client = TestClient(study.app, headers=US, cookies=cookie, raise_server_exceptions=False)
        return client.request(**told)
    how = settings(max_examples=4, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        derandomize=True, database=None)
    checked = [checks.not_a_server_error, status_code_conformance, content_type_conformance]
    checked.append(response_schema_conformance)
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path == "/api/events/stream": continue            # it has no end
        ask_anything(ask, operation, how, checked)
        count += 1
    study.review.close()
    assert count == len(ROUTES)


def test_no_answer_waits_for_the_clients_acknowledgement(tmp_path):
    "asyncio leaves Nagle's delay on for sockets made without a protocol number: 40 ms an answer."
    with ReviewServer(open_study(tmp_path/"study"), Address(port=0), worker=False) as server:
        assert server.listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

"""The review app's people: log-in, patience, first set-up, one person on one machine."""
import time

import pytest


import review_tools  # noqa: F401    it skips these tests where the review app is not installed
from fastapi.testclient import TestClient

from histokit.core.text import BadInput
from histokit.review.api import create_app
from histokit.review.api_routes import Review
from histokit.review.people import LogIns, Refused, Throttle, hash_password, password_fits
from histokit.review.serve import Address, ReviewServer, open_study, serving, who_works
from histokit.review.store import Store

PASSWORD = "a horse in a battery"
US = {"X-Histokit": "1"}


@pytest.fixture
def review(database, tmp_path):
    made = Review(Store(tmp_path/"study", database()))
    yield made
    made.close()


def client_of(review): return TestClient(create_app(review), headers=US, raise_server_exceptions=False)


def test_the_story_of_accounts(review):
    anna, ben = client_of(review), client_of(review)
    assert anna.get("/api/session").json()["setup_needed"] is True
    assert anna.post("/api/setup", json=dict(name="Anna", password="short")).status_code == 422
    assert anna.post("/api/setup", json=dict(name="Anna", password=PASSWORD)).json()["role"] == "admin"
    assert ben.post("/api/setup", json=dict(name="Eve", password=PASSWORD)).status_code == 403
    told = dict(name="Ben", role="viewer", password=PASSWORD)
    number = anna.post("/api/people", json=told).json()["id"]
    assert anna.post("/api/people", json=told).status_code == 409
    assert ben.post("/api/login", json=dict(name="Ben", password=PASSWORD)).json()["user"]["name"] == "Ben"
    assert ben.get("/api/people").status_code == 403
    anna.patch(f"/api/people/{number}", json=dict(role="admin"))
    assert ben.get("/api/people").status_code == 200, "a role holds from the next question on"
    anna.patch(f"/api/people/{number}", json=dict(password="another horse, a battery"))
    assert ben.get("/api/images").status_code == 401, "a new password ends every session"
    anna.delete(f"/api/people/{number}")
    assert ben.post("/api/login", json=dict(name="Ben", password="another horse, a battery")).status_code == 401
    me = anna.get("/api/session").json()["user"]["id"]
    for change in (dict(role="viewer"), dict(active=False)):
        assert anna.patch(f"/api/people/{me}", json=change).status_code == 409
    assert anna.delete(f"/api/people/{me}").status_code == 409 and anna.delete("/api/people/99").status_code == 404
    assert anna.post("/api/logout").status_code == 200 and anna.get("/api/images").status_code == 401


def test_hashes_never_leave_and_passwords_are_argon2(review, capfd):
    client = client_of(review)
    client.post("/api/setup", json=dict(name="Anna", password=PASSWORD))
    client.post("/api/login", json=dict(name="Anna", password="wrong password here"))
    texts = [client.get(path).text for path in ("/api/people", "/api/session", "/api/study", "/api/export.csv",
        "/openapi.json")]
    kept, secret = review.store.person("Anna").password, review.store.get_meta("secret")
    assert kept.startswith("$argon2id$")
    out = "".join(capfd.readouterr())
    for text in (*texts, out, repr(review.store)):
        assert not [word for word in ("argon2", secret, PASSWORD) if word in text]


def test_wrong_passwords_are_met_with_patience(review):
    client = client_of(review)
    client.post("/api/setup", json=dict(name="Anna", password=PASSWORD))
    ask = lambda password, name="Anna": client.post("/api/login", json=dict(name=name, password=password))
    statuses = [ask("wrong").status_code for _ in range(7)]
    assert statuses[:5] == [401] * 5 and statuses[5:] == [429] * 2
    assert ask(PASSWORD).status_code == 429 and "wait" in ask(PASSWORD).json()["detail"]


def test_an_address_that_tries_many_names_has_to_wait():
    throttle = Throttle(clock=lambda: 0.)
    for i in range(20): throttle.wrong(f"name {i}", "10.0.0.1")
    assert throttle.wait("another", "10.0.0.1") > 0 and throttle.wait("another", "10.0.0.2") == 0
    for i in range(20_000): throttle.wrong(f"n{i}", f"10.{i}")
    assert len(throttle._wrong) < 12_000


def test_an_unknown_name_takes_as_long_as_a_wrong_password():
    kept = hash_password(PASSWORD)
    def seconds(stored):
        begin = time.process_time()
        for _ in range(3): assert password_fits("wrong password", stored) is False
        return time.process_time() - begin
    seconds(kept)
    known, unknown = seconds(kept), seconds(None)
    assert .5 < unknown / known < 2


def test_log_ins_of_closed_and_passwordless_accounts_fail(review):
    review.store.add_person("root", "admin")
    number = review.store.add_person("Ben", "scorer", hash_password(PASSWORD))
    review.store.add_person("Anna", "admin", hash_password(PASSWORD))
    review.store.close_person(number)
    for name in ("root", "Ben", "nobody", "", "x" * 500):
        with pytest.raises(Refused, match="wrong"): LogIns(review.store).log_in(name, PASSWORD, "10.0.0.1")


# --- one person, one machine ------------------------------------------------------------------

def test_without_accounts_only_this_machine_is_served(tmp_path):
    store = Store(tmp_path/"study")
    assert who_works(store, Address()) and not who_works(store, Address("0.0.0.0"))
    for host in ("0.0.0.0", "10.0.0.5", "example.org", "::"):
        with pytest.raises(BadInput, match="this machine only"): serving(store, Address(host), "me")
    review = serving(store, Address(), "me")
    client = client_of(review)
    for host, status in (("127.0.0.1", 200), ("localhost:80", 200), ("evil.test", 403), ("127.0.0.1.evil.test", 403)):
        assert client.get("/api/images", headers={"Host": host}).status_code == status, host
    local = {"Host": "127.0.0.1"}
    assert client.get("/api/session", headers=local).json()["single"] is True
    assert client.post("/api/setup", headers=local, json=dict(name="Eve", password=PASSWORD)).status_code == 403
    review.close()


def test_over_a_network_the_first_administrator_needs_the_code(tmp_path):
    review = serving(Store(tmp_path/"study"), Address("0.0.0.0"), "")
    client = client_of(review)
    assert client.get("/api/session").json()["setup_code_needed"] is True
    for code in ("", "wrong", "ö"):
        assert client.post("/api/setup", json=dict(name="Eve", password=PASSWORD, code=code)).status_code == 403
    told = dict(name="Anna", password=PASSWORD, code=review.setup_code)
    assert client.post("/api/setup", json=told).status_code == 200
    review.close()


def test_accounts_close_the_open_door_of_one_machine(tmp_path):
    import httpx
    study = tmp_path/"study"
    store = open_study(study)
    store.add_person("Anna", "admin", hash_password(PASSWORD))
    with ReviewServer(store, Address(port=0), worker=False) as server:
        client = httpx.Client(base_url=server.url, headers=US, trust_env=False)
        assert client.get("/api/images").status_code == 401 and client.get("/api/session").json()["single"] is False


def test_the_terminal_answers_in_one_line(tmp_path):
    from typer.testing import CliRunner
    from histokit.cli import app
    def run(*args, **more):
        answer = CliRunner().invoke(app, ["review", *map(str, args)], **more)
        return answer.exit_code, " ".join(answer.output.split())
    study = tmp_path/"study"
    open_study(study).close()
    assert run("users", study, "--add", "Anna", "--role", "admin", input=PASSWORD + "\n")[0] == 0
    assert run("users", study)[1] == "Anna admin open"
    for args, why in ((("users", study, "--add", "Ben"), "at least 10"),
        (("users", study, "--close", "Ann"), "did you mean 'Anna'"),
            (("users", study, "--close", "Anna"), "last administrator"),
            (("export", tmp_path/"none", "x.csv"), "is no study"),
            ((tmp_path/"none", "--measures", "kidney"), "unknown set of measures"),
            ((study, "--port", "99999"), "0 to 65535"),
            (("models", study, "--use", "v1"), "unknown model"),
            (("import", study, tmp_path/"none.csv"), "does not exist")):
        code, said = run(*args, input="short\n")
        assert code == 1 and why in said and said.startswith("histokit:"), (args, said)
    assert run("export", study, tmp_path/"out.csv")[0] == 0 and (tmp_path/"out.csv").exists()
    assert run("import", tmp_path/"again", tmp_path/"out.csv")[0] == 0

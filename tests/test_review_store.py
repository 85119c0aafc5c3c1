"""The review app's store, on SQLite and on PostgreSQL: nothing is lost, nothing is there twice."""
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from histokit.core.text import BadInput
from histokit.review.export import import_csv, long_lines, wide_lines, write_export
from histokit.review.measures import StudySettings
from histokit.review.replay import revealed_at, values_now
from histokit.review.schema import MIGRATIONS, current, events, metadata, migrate, revealed
from histokit.review.store import Store
from histokit.review.store_events import Conflict, Edit, NotThere
from histokit.review.store_images import ImageQuery, Person
from review_tools import KEYS, add_images, add_people, draft_all, new_file


def scores(store, image, author):
    with store.reading() as c: return {k: v for k, v in store._values(c, image, author).items() if v is not None}


# --- the schema -------------------------------------------------------------------------------

def test_migration_makes_what_the_tables_say(store):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext
    with store.reading() as c: assert compare_metadata(MigrationContext.configure(c), metadata) == []


def test_a_newer_database_is_refused_in_one_line(store):
    later = [*MIGRATIONS, ("0099", lambda op: op.add_column("images", sa.Column("note", sa.Text)))]
    with store.writing() as c: migrate(c, later)
    with pytest.raises(BadInput, match="version 0099, newer than .*: update histokit") as told:
        Store(store.folder, store.url.render_as_string(hide_password=False))
    assert "\n" not in str(told.value)


def test_an_older_database_is_brought_up_and_keeps_its_events(store):
    image, [anna] = add_images(store, 1)[0], add_people(store, "Anna")
    store.save(image, anna, [Edit("anna-00001", "fibrosis", 2)])
    later = [*MIGRATIONS, ("0002", lambda op: op.add_column("events", sa.Column("note", sa.Text)))]
    with store.writing() as c: assert migrate(c, later) == "0001"
    assert [e.value for e in store.history(image)] == [2]


def test_two_openings_at_once_make_one_database(database, tmp_path):
    url = database()
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: Store(tmp_path/"study", url), range(4)))
    assert len({s.study_id() for s in opened}) == 1
    for s in opened: s.close()


# --- events -----------------------------------------------------------------------------------

def test_nobody_overwrites_anybody(store):
    [image], (anna, ben) = add_images(store, 1), add_people(store, "Anna", "Ben")
    draft_all(store)
    store.save(image, anna, [Edit("anna-00001", "fibrosis", 1)])
    store.save(image, ben, [Edit("ben-000001", "fibrosis", 4)])
    store.set_consensus(image, anna, "consensus1", dict(fibrosis=3))
    held = {a: scores(store, image, a).get("fibrosis") for a in ("model", f"u{anna}", f"u{ben}", "consensus")}
    assert list(held.values()) == [2, 1, 4, 3]


def test_a_repeated_edit_is_kept_once_even_at_once(store):
    [image], [anna] = add_images(store, 1), add_people(store, "Anna")
    edits = [Edit(f"anna-{i:05}", KEYS[i % 4], i % 5) for i in range(12)]
    with ThreadPoolExecutor(6) as pool: counts = list(pool.map(lambda _: store.save(image, anna, edits), range(6)))
    assert sorted(counts) == [0, 0, 0, 0, 0, 12]
    assert len(store.history(image)) == 12


@pytest.mark.parametrize("edit, why", [
    (("fibrosis", 4.5), "no score"), (("fibrosis", 5), "no score"), (("fibrosis", -1), "no score"),
    (("fibrosis", float("nan")), "no score"), (("fibrosis", True), "no score"), (("colour", 1), "no measure")])
def test_a_score_off_its_scale_leaves_nothing(store, edit, why):
    [image], [anna] = add_images(store, 1), add_people(store, "Anna")
    with pytest.raises(BadInput, match=why):
        store.save(image, anna, [Edit("anna-00001", "atrophy", 1), Edit("anna-00002", *edit)])
    assert store.history(image) == []


def test_uids_cannot_be_taken_over(store):
    first, second = add_images(store, 2)
    anna, ben = add_people(store, "Anna", "Ben")
    store.save(first, anna, [Edit("same-uid-1", "fibrosis", 1)])
    for image, person, value in ((first, anna, 2), (first, ben, 1), (second, anna, 1)):
        with pytest.raises(Conflict, match="is taken"): store.save(image, person,
            [Edit("same-uid-1", "fibrosis", value)])
    with pytest.raises(Conflict, match="two edits"):
        store.save(first, anna, [Edit("same-uid-2", "fibrosis", 1), Edit("same-uid-2", "atrophy", 1)])
    with pytest.raises(NotThere): store.save(99, anna, [Edit("same-uid-3", "fibrosis", 1)])


def test_a_consensus_or_flag_is_no_score_of_a_person(store):
    [image], [anna] = add_images(store, 1), add_people(store, "Anna")
    store.flag(image, anna, "flag-00001", True)
    store.set_consensus(image, anna, "consensus1", dict.fromkeys(KEYS, 1))
    assert scores(store, image, f"u{anna}") == {}
    with pytest.raises(BadInput, match="nothing to undo"): store.undo(image, anna, "undo-00001")


def test_drafts_are_added_never_changed(store):
    [image] = add_images(store, 1)
    draft_all(store, 1., "m1")
    store.register(new_file("S-1_Image001.tif", "x"))
    draft_all(store, 3., "m2")
    drafts = [(e.model_version, e.value) for e in store.history(image) if e.kind == "draft"]
    assert drafts == [("m1", 1)] * 4 + [("m2", 3)] * 4
    assert scores(store, image, "model") == dict.fromkeys(KEYS, 3)


# --- blind first ------------------------------------------------------------------------------

@pytest.fixture
def blind(store):
    store.set_settings(StudySettings(blind_first=True))
    return store


def everywhere(store, person, image):
    "All that a person could be sent of an image, as one text."
    listed = [store.find(person, ImageQuery(sort=sort, far=far)) for sort in ("far", "name") for far in (None, 0)]
    return repr([listed, store.item(person, image), store.detail(person, image)])


def test_blind_first_sends_no_draft_before_all_measures_are_scored(blind):
    image, other = add_images(blind, 2)
    anna, ben = (Person(i, n, "scorer") for n, i in zip("ab", add_people(blind, "Anna", "Ben")))
    draft_all(blind, 3.)
    for i, key in enumerate(KEYS):
        assert "3.0" not in everywhere(blind, anna, image) and "'m1'" not in everywhere(blind, anna, image)
        with pytest.raises(Conflict, match="first"): blind.accept(image, anna.id, f"accept-{i:04}")
        blind.save(image, anna.id, [Edit(f"anna-{i:05}", key, 1, draft_visible=True)])
    assert blind.item(anna, image)["draft"] == dict.fromkeys(KEYS, 3)
    assert blind.item(anna, other)["draft"] is None and blind.item(ben, image)["draft"] is None
    assert not any(e.draft_visible for e in blind.history(image))
    blind.save(image, anna.id, [Edit("anna-after", "fibrosis", 3, draft_visible=True)])
    assert blind.history(image)[-1].draft_visible


def test_blind_first_keeps_order_and_filters_silent(blind):
    ids = add_images(blind, 4)
    [anna] = (Person(i, "Anna", "scorer") for i in add_people(blind, "Anna"))
    for n, claim in enumerate(iter(lambda: blind.claim("w"), None)):
        blind.finish(claim.id, "w", {k: float(4 - n) for k in KEYS}, "m1")
    for n, image in enumerate(ids): blind.save(image, anna.id, [Edit(f"anna-{n:05}", "fibrosis", 0)])
    found = [i["id"] for i in blind.find(anna, ImageQuery(sort="far", descending=True))[1]]
    assert found == sorted(ids, reverse=True) and blind.find(anna, ImageQuery(far=1))[0] == 0


def test_what_was_revealed_stays_revealed(blind):
    [image], [anna] = add_images(blind, 1), add_people(blind, "Anna")
    draft_all(blind)
    blind.save(image, anna, [Edit(f"anna-{k}-0", k, 1) for k in KEYS])
    blind.save(image, anna, [Edit("anna-taken", "fibrosis", None)])
    assert blind.may_see_draft(image, anna)
    blind.undo(image, anna, "undo-00001")
    assert scores(blind, image, f"u{anna}") == dict.fromkeys(KEYS, 1)


# --- images -----------------------------------------------------------------------------------

def test_upsert_by_name_and_hash(store):
    [anna] = add_people(store, "Anna")
    first = store.register(new_file("S-1_Image001.tif", "a"), anna)
    draft_all(store)
    store.save(first.id, anna, [Edit("anna-00001", "fibrosis", 4)])
    assert store.register(new_file("S-1_Image001.tif", "a"), anna)[1:] == (True, False, None)
    again = store.register(new_file("S-1_Image001.tif", "b"), anna)
    assert (again.id, again.known, again.changed) == (first.id, False, True) and again.job
    draft_all(store, 1., "m2")
    item = store.detail(Person(anna, "Anna", "scorer"), first.id)
    assert item["mine"] == dict(fibrosis=4) and item["changed"] and item["model_version"] == "m2"
    assert [f["sha256"][0] for f in item["files"]] == ["a", "b"]
    assert [e["value"] for e in item["events"] if e["kind"] == "draft"] == [2] * 4 + [1] * 4


def test_one_name_uploaded_by_many_at_once_is_one_image(store):
    with ThreadPoolExecutor(8) as pool:
        def add(i):
            try: return store.register(new_file("S-1_Image001.tif", str(i % 2)))
            except (BadInput, sa.exc.IntegrityError) as e: return e
        answers = list(pool.map(add, range(8)))
    assert {getattr(a, "id", repr(a)) for a in answers} == {1}


def test_search_takes_wildcards_as_letters(store):
    for name in ("a%b.tif", "a_b.tif", "A\\b.tif", "ünï.tif", "\U0001F52C.tif"): store.register(new_file(name))
    me = Person(0, "", "viewer")
    found = lambda text: [i["name"] for i in store.find(me, ImageQuery(search=text))[1]]
    assert found("%") == ["a%b.tif"] and found("_") == ["a_b.tif"] and found("\\") == ["A\\b.tif"]
    assert found("A%B") == ["a%b.tif"] and found("\U0001F52C") == ["\U0001F52C.tif"] and found("' OR 1=1 --") == []


def test_thousands_of_images_are_listed_without_lag(store):
    import time
    [anna] = add_people(store, "Anna")
    with store.writing() as c:
        from histokit.review.schema import images, utc_now
        row = dict(sha256="0" * 64, size=1, width=9, height=9, group="g", serial="s", matched=True, file="",
            created_at=utc_now(), changed=False)
        c.execute(images.insert(), [row | dict(name=f"{i:05}.tif") for i in range(5000)])
        values = [dict(image_id=i, author=a, measure=k, value=i % 5, event_id=i) for i in range(1, 5001)
            for a in ("model", f"u{anna}") for k in KEYS]
        c.execute(current.insert(), values)
    me = Person(anna, "Anna", "scorer")
    store.find(me, ImageQuery())
    begin = time.perf_counter()
    total, items = store.find(me, ImageQuery(sort="far", descending=True, unscored=False, limit=100))
    assert (total, len(items)) == (5000, 100) and time.perf_counter() - begin < 1.5


def test_next_goes_round_and_skips_what_is_scored(store):
    ids, [anna] = add_images(store, 4), add_people(store, "Anna")
    me = Person(anna, "Anna", "scorer")
    store.save(ids[1], anna, [Edit(f"anna-{k}-0", k, 1) for k in KEYS])
    assert store.next_unscored(me, ids[0]) == ids[2] and store.next_unscored(me, ids[3]) == ids[0]
    assert store.next_unscored(me, ids[2], back=True) == ids[0]
    assert store.next_unscored(me, ids[0], any_image=True) == ids[1]


def test_settings_that_would_break_scores_are_refused(store):
    [image], [anna] = add_images(store, 1), add_people(store, "Anna")
    store.save(image, anna, [Edit("anna-00001", "fibrosis", 4)])
    short = StudySettings(measures=[dict(key="fibrosis", high=3)])
    with pytest.raises(Conflict, match="off the new scale"): store.set_settings(short)
    store.set_settings(StudySettings(measures=[dict(key="fibrosis", step=.5)]))
    store.save(image, anna, [Edit("anna-00002", "fibrosis", 2.5)])


def test_text_that_no_database_holds_is_refused_in_one_line(database, tmp_path):
    with Store(tmp_path/"study", database()) as store:
        if store.is_sqlite: pytest.skip("SQLite holds it")
        with pytest.raises(BadInput, match="cannot hold"): store.find(Person(0, "", "viewer"), ImageQuery(search="a\0"))


# --- people -----------------------------------------------------------------------------------

def test_only_one_of_many_can_be_the_first_administrator(store):
    def add(i):
        try: return store.add_person(f"person {i}", "admin", "a hash", first=True)
        except Conflict: return None
    with ThreadPoolExecutor(6) as pool: made = list(pool.map(add, range(6)))
    assert sum(m is not None for m in made) == 1 == len(store.people())


def test_two_last_administrators_cannot_close_each_other(store):
    ids = [store.add_person(name, "admin", "a hash") for name in ("Anna", "Ben")]
    def close(i):
        try: return store.close_person(i) or "closed"
        except Conflict: return "kept"
    with ThreadPoolExecutor(2) as pool: assert sorted(pool.map(close, ids)) == ["closed", "kept"]


def test_closing_a_person_keeps_the_scores(store):
    [image], [anna] = add_images(store, 1), add_people(store, "Anna")
    store.save(image, anna, [Edit("anna-00001", "fibrosis", 4)])
    store.close_person(anna)
    assert store.detail(Person(0, "", "viewer"),
        image)["people"] == [dict(id=anna, name="Anna", scores=dict(fibrosis=4))]


# --- export and import ------------------------------------------------------------------------

def filled(store):
    "A study in which everything has happened."
    anna, ben = add_people(store, "=Anna", "Ben \U0001F600")
    ids = add_images(store, 3)
    draft_all(store, 1., "m1")
    for i, image in enumerate(ids):
        store.save(image, anna, [Edit(f"anna-{k}-{i}", k, i, seconds=.1 + i) for k in KEYS])
        store.accept(image, ben, f"accept-{i:04}")
    store.undo(ids[0], ben, "undo-00001")
    store.flag(ids[1], anna, "flag-00001", True)
    store.set_consensus(ids[2], ben, "consensus1", dict(fibrosis=2))
    store.register(new_file("S-1_Image001.tif", "y"), ben)
    store.register(new_file("@risky, \"name\".tif", "z"), anna)
    draft_all(store, 2., "m2")
    store.close_person(ben)
    return store


@pytest.mark.parametrize("to", ["sqlite", "postgresql"])
def test_import_of_the_export_gives_the_same_database(store, to, request, tmp_path):
    filled(store)
    file = write_export(store, tmp_path/"export.csv")
    url = request.getfixturevalue("postgres").new_database() if to == "postgresql" else f"sqlite:///{tmp_path}/again.db"
    with Store(tmp_path/"again", url) as again:
        import_csv(again, file)
        assert "".join(long_lines(again)) == "".join(long_lines(store))
        assert "".join(wide_lines(again)) == "".join(wide_lines(store))
        table = lambda s: s.score_table().drop(columns="image_id").to_csv()
        assert table(again) == table(store)
        with pytest.raises(Conflict, match="empty one"): import_csv(again, file)


def test_export_is_read_by_pandas_and_safe_in_a_spreadsheet(store):
    filled(store)
    for lines in (long_lines(store), wide_lines(store)):
        table = pd.read_csv(io.StringIO("".join(lines)), dtype=str, keep_default_na=False)
        risky = [v for c in table for v in [c, *table[c]] if v.startswith(("=", "+", "@", "\t", "-"))]
        assert not risky and "'@risky, \"name\".tif" in set(table["image"])
    times = pd.to_datetime(pd.read_csv(io.StringIO("".join(long_lines(store))))["at"].dropna(), format="ISO8601")
    assert str(times.dt.tz) == "UTC"


@pytest.mark.parametrize("find, put, why", [
    (",fibrosis,", ",fibrosis\x00,", None), (",score,", ",guess,", "is none of"), (",at,", ",when,", "no column 'at'"),
    ("+00:00", "", "no zone"), ("undo-00001", "flag-00001", None), (",true,", ",maybe,", "neither"),
    ("anna-fibrosis-1", "anna-fibrosis-0", "there twice")])
def test_a_damaged_export_leaves_an_empty_study(store, tmp_path, find, put, why):
    text = "".join(long_lines(filled(store)))
    assert find in text
    (tmp_path/"bad.csv").write_text(text.replace(find, put), encoding="utf-8")
    with Store(tmp_path/"again", f"sqlite:///{tmp_path}/again.db") as again:
        try: import_csv(again, tmp_path/"bad.csv")
        except BadInput as e:
            assert why is None or why in str(e)
            assert "\n" not in str(e) and not again.people() and again.find(Person(0, "", "viewer"),
                ImageQuery())[0] == 0
        else: assert why is None


# --- any interleaving -------------------------------------------------------------------------

class AnyOrder(RuleBasedStateMachine):
    "Edits, repeats, undos, uploads, claims and kills in any order, beside a list that only grows."
    url = ""

    @initialize(blind=st.booleans())
    def begin(self, blind):
        import tempfile
        self.scratch = tempfile.TemporaryDirectory()
        self.store = Store(self.scratch.name, type(self).url() if callable(type(self).url) else "")
        self.store.set_settings(StudySettings(measures=[dict(key="a", high=2), dict(key="b", high=2)],
            blind_first=blind))
        self.people = [self.store.add_person(n, "scorer") for n in ("Anna", "Ben")]
        self.images = [self.store.register(new_file(f"S-1_Image{i:03}.tif")).id for i in (1, 2)]
        self.sent, self.told, self.number, self.claims = [], [], 0, []

    def _uid(self):
        self.number += 1
        return f"uid-{self.number:06}"

    @rule(image=st.integers(0, 1), person=st.integers(0, 1), key=st.sampled_from("ab"),
        value=st.sampled_from([None, 0, 1, 2]), seen=st.booleans())
    def save(self, image, person, key, value, seen):
        call = (self.images[image], self.people[person], [Edit(self._uid(), key, value, draft_visible=seen)])
        assert self.store.save(*call) == 1
        self.sent.append(call)

    @rule(data=st.data())
    def send_again(self, data):
        if self.sent: assert self.store.save(*data.draw(st.sampled_from(self.sent))) == 0

    @rule(image=st.integers(0, 1), person=st.integers(0, 1), key=st.sampled_from(["", "a", "b"]))
    def undo(self, image, person, key):
        try: self.store.undo(self.images[image], self.people[person], self._uid(), key)
        except BadInput as e: assert "nothing to undo" in str(e)

    @rule(image=st.integers(0, 1), person=st.integers(0, 1))
    def accept(self, image, person):
        try: self.store.accept(self.images[image], self.people[person], self._uid())
        except BadInput as e: assert "no draft" in str(e) or "first" in str(e)

    @rule(image=st.integers(0, 1), content=st.sampled_from("01"))
    def upload(self, image, content): self.store.register(new_file(f"S-1_Image{image + 1:03}.tif", content))

    @rule(worker=st.sampled_from(["w1", "w2"]), late=st.booleans())
    def claim(self, worker, late):
        claim = self.store.claim(worker, lease=0 if late else 60)
        if claim: self.claims.append((claim, worker))

    @rule(data=st.data(), value=st.sampled_from([0., 1., 2.]))
    def finish(self, data, value):
        if not self.claims: return
        claim, worker = data.draw(st.sampled_from(self.claims))
        self.store.finish(claim.id, worker, dict(a=value, b=value), "m1")

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def kill(self, worker): self.store.release(worker)

    @invariant()
    def holds(self):
        if not hasattr(self, "store"): return
        with self.store.reading() as c:
            now = c.execute(sa.select(events).order_by(events.c.id)).all()
            held = {(v.image_id, v.author, v.measure): v.value for v in c.execute(sa.select(current))}
            open_now = {(r.image_id, r.user_id) for r in c.execute(sa.select(revealed))}
        assert now[:len(self.told)] == self.told, "events only grow"
        self.told = now
        own = lambda i, p: [e for e in now if (e.image_id, e.user_id) == (i, p) and e.kind in ("score", "undo")]
        replayed = {i: values_now([e for e in now if e.image_id == i]) for i in self.images}
        assert held == {(i, *place): v for i, values in replayed.items() for place, v in values.items()}
        assert open_now == {(i, p) for i in self.images for p in self.people if revealed_at(own(i, p), "ab")}
        drafts = [e.uid for e in now if e.kind == "draft"]
        assert len(drafts) == len(set(drafts)) == 2 * len(self.store.jobs_in("Completed")), "no job is done twice"

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.scratch.cleanup()


def run_machine(url, examples, steps):
    from hypothesis.stateful import run_state_machine_as_test
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    how = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=quiet,
        derandomize=True, database=None, phases=[Phase.generate])      # no shrinking: it takes minutes
    run_state_machine_as_test(type("Machine", (AnyOrder,), dict(url=staticmethod(url) if url else "")), settings=how)


def test_any_interleaving_on_sqlite(): run_machine(None, 12, 25)


def test_any_interleaving_on_postgresql(postgres): run_machine(postgres.new_database, 4, 20)


@pytest.mark.slow
def test_many_interleavings_on_sqlite(): run_machine(None, 200, 50)


def test_threads_at_once_lose_nothing(store):
    ids, people = add_images(store, 3), add_people(store, "Anna", "Ben", "Carl")
    failures = []
    def work(person):
        try:
            for i in range(40):
                image = ids[i % 3]
                store.save(image, person, [Edit(f"p{person}-{i:06}", KEYS[i % 4], i % 5)])
        except Exception as e: failures.append(e)
    threads = [threading.Thread(target=work, args=(p,)) for p in people]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failures and sum(len(store.history(i)) for i in ids) == 120
    before = {a: scores(store, ids[0], a) for a in (f"u{p}" for p in people)}
    store.rebuild()
    assert {a: scores(store, ids[0], a) for a in before} == before

"A run's hours: what is planned, what is left out and said, and that there is always an answer; GPUs and memory."
import importlib
import json
import shutil
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

from histokit.core.budget import Budget, budget_sentence, left_out_folds, open_budget, run_began
from histokit.core.processes import Job, find_function
from histokit.core.runs import RunFolder, run_lock
from histokit.core.submission import check_submission
from histokit.core.text import BadInput
from histokit.frozen.features import cached_features
from histokit.learn.batches import predict_views
from histokit.learn.devices import call_float32, own_device
from histokit.pictures.classification import run_classification, stage_pictures
from histokit.pictures.classify_settings import ClassifySettings
from histokit.pictures.explaining import ExplainSettings, explain_run, open_classified
from histokit.pictures.picture_report import data_sentences
from histokit.pictures.prepared import open_pictures
from histokit.pictures.task import report as picture_run_report
from histokit.spots.answers import run_prediction
from histokit.spots.check_run import check_run
from histokit.spots.crossval import run_training
from histokit.spots.demo import smoke_demo
from histokit.spots.network import create_model
from histokit.spots.results import open_stage, read_run
from histokit.spots.run_figures import read_answered
from histokit.spots.settings import PredictionSettings, TrainingSettings
from histokit.spots.spot_data import SpotData

QUIET = lambda line: None
NETWORK = dict(backbone="test_resnet.r160_in1k", weights="none", head="linear")
EPOCHS, LESS = 4, .85     # with the time for all answers that share is half of the epochs


class Dies(Exception): "Stands for a kill at a moment that the test chooses."


class Hands:
    "A clock that only the model moves: by a second for each row that it answers, by three for one that it learns."
    def __init__(self, monkeypatch):
        self.now = 0.
        monkeypatch.setattr("histokit.core.budget._now", lambda: self.now)
        monkeypatch.setattr("histokit.learn.trainer.call_float32", self.slowly(3))
        monkeypatch.setattr("histokit.learn.batches.call_float32", self.slowly(1))

    def slowly(self, seconds):
        def call(function, inputs, context):
            self.now += seconds * len(next(iter(inputs.values())))
            return call_float32(function, inputs, context)
        return call


@pytest.fixture
def hands(monkeypatch):
    torch.set_num_threads(1)
    return Hands(monkeypatch)


def train(run, hours=0., say=QUIET, **changed):
    "A cross-validation of spots by gradient descent, as small as can be."
    settings = TrainingSettings(**(dict(epochs=EPOCHS, input_px=32, target="rank", device="cpu", scheduler="cosine",
        compare_random=False, budget_hours=hours) | changed))
    return run_training(RunFolder(run).make(), smoke_demo(), settings, NETWORK, say)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The training without a limit, and the hours that it takes by the model's clock."
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)
        clock, run = Hands(patch), RunFolder(tmp_path_factory.mktemp("whole"))
        data, found = train(run)
        return run, data, found, clock.now / 3600


def epochs_of(found): return {name: len(h) for name, h in found.histories.items()}


def test_plenty_of_time_changes_nothing(hands, whole, tmp_path):
    run, data, found, hours = whole
    again = train(tmp_path, 10 * hours)[1]
    np.testing.assert_array_equal(again.oof, found.oof)
    assert again.budget == "" and left_out_folds(tmp_path) == []
    assert (tmp_path/"folds/1/model.safetensors").read_bytes() == (run/"folds/1/model.safetensors").read_bytes()


def test_less_time_is_fewer_epochs_for_all_folds_with_their_schedule(hands, whole, tmp_path):
    "To the last bit the training that would have been asked for with those epochs, within the time."
    _, _, _, hours = whole
    lines = []
    found = train(tmp_path/"less", LESS * hours, lines.append)[1]
    epochs, = set(epochs_of(found).values())
    assert 1 < epochs < EPOCHS and hands.now <= LESS * hours * 3600
    assert found.budget == f"budget of {LESS * hours:.3g} h: epochs {epochs} of {EPOCHS}" and lines[-1] == found.budget
    np.testing.assert_array_equal(found.oof, train(tmp_path/"asked", epochs=epochs)[1].oof)


def test_the_comparison_with_random_spots_goes_first(hands, whole, tmp_path):
    _, _, alone, hours = whole
    found = train(tmp_path, 1.4 * hours, compare_random=True)[1]
    np.testing.assert_array_equal(found.oof, alone.oof)
    assert found.flattery is None and found.budget.endswith("h: no comparison with a split by random spots")


@pytest.fixture
def tiny(hands, tmp_path):
    "A run that had next to no time, with its answer."
    lines = []
    data, found = train(tmp_path, .001, lines.append)
    RunFolder(tmp_path).write_table("spots.parquet", data.spots)
    answer = run_prediction(RunFolder(tmp_path), smoke_demo(), PredictionSettings(views="flips", budget_hours=.001))
    return RunFolder(tmp_path), found, answer, lines


def test_without_time_there_is_an_answer_and_it_says_what_is_missing(tiny):
    run, found, answer, lines = tiny
    assert epochs_of(found) == {"fold 0": 1} and left_out_folds(run) == [1, 2] and run.folds() == [0]
    table = pd.read_csv(run/"submission.csv")
    check_submission(table, len(answer.folds.test), answer.folds.names)
    metrics = run.json("metrics.json")
    said = "folds 1 and 2 of 3 were not trained"
    assert metrics["budget"] == f"budget of 0.001 h: epochs 1 of {EPOCHS}; {said}; views 1 of 4"
    assert said in found.budget and found.budget in lines and answer.summary.endswith(metrics["budget"])
    assert any(line == "fold 2  left out: no time for it" for line in lines)


def test_scores_are_of_the_spots_that_were_answered(tiny):
    "The constants beside them are those of all labelled spots, as always."
    run, found, answer, _ = tiny
    held = found.answered
    assert held.sum() == (answer.folds.labelled.fold == 0).sum() == len(run.table("oof.parquet"))
    assert len(read_run(run.path).pred) == held.sum() and read_run(run.path).spots.fold.eq(0).all()
    rungs = {row["name"]: row for row in run.json("metrics.json")["oof"]}
    constant = [name for name in rungs if name.startswith("constant")]
    assert constant and all(np.isfinite(rungs[name]["per_spot"]) for name in rungs)
    assert set(run.table("oof_final.parquet").fold) == {0}
    assert not run.table("uncertainty.parquet").split.eq("Train").all()


def test_checks_and_report_know_what_was_left_out(tiny):
    run, *_ = tiny
    parts, _ = check_run(run.path, smoke_demo())
    assert not any("models of folds" in f.what for f in parts["training"])
    answered = read_answered(run.path, smoke_demo())
    assert set(answered.train.fold) == {0} and np.isfinite(answered.held_out).all()
    from histokit.spots.run_report import lead_sentences
    assert any("were not trained" in s for s in lead_sentences(answered, run.json("metrics.json")))


def test_choices_between_folds_need_two_of_them(hands, tmp_path):
    train(tmp_path, .001)
    settings = PredictionSettings(views="flips", budget_hours=.001, spatial_filter="auto", ensemble="auto")
    found = run_prediction(RunFolder(tmp_path), smoke_demo(), settings)
    assert list(found.rungs) == ["this model", "+ TTA (1 of flips)", "+ smoothing"] and not found.answers.used


def test_a_run_that_was_killed_keeps_its_plan(hands, whole, tmp_path):
    "With other hours of its own: the clock begins anew, the epochs stay, and so does every bit."
    _, _, _, hours = whole
    straight = train(tmp_path/"straight", LESS * hours)[1]
    epochs, = set(epochs_of(straight).values())
    def stop(line):
        if line.startswith("fold 1  epoch 2"): raise Dies
    with pytest.raises(Dies): train(tmp_path/"killed", LESS * hours, stop)
    plan, lines = json.loads((tmp_path/"killed/budget.json").read_text())["plans"]["folds"], []
    assert plan["epochs"] == epochs and plan["epochs_of"] == {"0": epochs, "1": epochs}
    again = train(tmp_path/"killed", LESS * hours, lines.append)[1]
    assert "fold 0  finished before, after epoch 2" in lines and "fold 1  going on after epoch 1" in lines
    np.testing.assert_array_equal(again.oof, straight.oof)
    assert again.budget == straight.budget


def test_more_hours_make_another_plan_and_no_limit_forgets_it(hands, whole, tmp_path):
    "What is trained already takes no time, however little there is."
    _, _, found, hours = whole
    assert train(tmp_path, .001)[1].budget and left_out_folds(tmp_path) == [1, 2]
    more = train(tmp_path, 10 * hours)[1]
    np.testing.assert_array_equal(more.oof, found.oof)
    assert more.budget == "" and train(tmp_path, .002)[1].budget == "" and left_out_folds(tmp_path) == []
    np.testing.assert_array_equal(train(tmp_path)[1].oof, found.oof)
    assert not (tmp_path/"budget.json").exists() and budget_sentence(tmp_path) == ""


def test_a_fold_that_is_slower_than_planned_stops_and_can_go_on(hands, whole, tmp_path):
    "The last fold loses its time: it ends early, keeps its checkpoint, and is said; a later run takes it to its end."
    _, _, alone, hours = whole
    def slower(line):
        if line.startswith("fold 2  epoch 2"): hands.now += hours * 3600
    found = train(tmp_path, 1.5 * hours, slower)[1]
    assert epochs_of(found) == {"fold 0": EPOCHS, "fold 1": EPOCHS, "fold 2": 3}
    assert found.budget.endswith(f"h: epochs 3 of {EPOCHS} in fold 2")
    assert [p.parent.name for p in tmp_path.rglob("last.pt")] == ["2"]
    lines = []
    again = train(tmp_path, 1.5 * hours, lines.append)[1]
    assert "fold 2  going on after epoch 3" in lines and again.budget == "" and not list(tmp_path.rglob("last.pt"))
    np.testing.assert_array_equal(again.oof, alone.oof)


def test_a_slow_fold_takes_the_time_of_the_next(hands, whole, tmp_path):
    "Which then has fewer epochs, at least half of those planned, or is left out; the hours are kept."
    _, _, _, hours = whole
    def late(lost, folder):
        def slower(line):
            if line.startswith("fold 1  epoch 1"): hands.now += lost * hours * 3600
        hands.now = 0.
        return train(tmp_path/folder, 1.5 * hours, slower)[1]
    some = late(.45, "some")
    epochs = epochs_of(some)["fold 2"]
    assert EPOCHS / 2 <= epochs < EPOCHS and f"epochs {epochs} of {EPOCHS} in fold 2" in some.budget
    assert hands.now <= 1.5 * hours * 3600
    assert late(.8, "all").budget.endswith("h: fold 2 of 3 was not trained") and left_out_folds(tmp_path/"all") == [2]


def test_frozen_views_keep_to_it_too(hands, tmp_path, monkeypatch):
    "Views that are not begun are not asked for later."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    how = dict(method="ridge", views="dihedral", pca=16)
    data, found = train(tmp_path/"some", 2500 / 3600, **how)
    run = RunFolder(tmp_path/"some")
    used = len(found.answers)
    assert 1 < used < 8 and found.budget.endswith(f"h: views {used} of 8")
    assert np.isfinite(found.answers[:, data.is_test]).all() and np.isfinite(found.oof).all()
    answer = run_prediction(run, smoke_demo(), PredictionSettings(views="dihedral"))
    assert len(answer.folds.views) == used and f"+ TTA ({used} of dihedral)" in answer.rungs
    assert run.json("metrics.json")["budget"] == found.budget


def test_frozen_folds_are_left_out_and_the_head_of_all_slides_is_not(hands, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    def slow(line): hands.now += 60
    data, found = train(tmp_path, .15, slow, method="ridge", views="none", pca=16)
    missing = np.isin(data.fold, left_out_folds(tmp_path))
    assert left_out_folds(tmp_path) == [1, 2] and "folds 1 and 2 of 3 were not trained" in found.budget
    assert np.isfinite(found.answers[:, data.is_test]).all() and np.isnan(found.oof[missing]).all()
    answer = run_prediction(RunFolder(tmp_path), smoke_demo(), PredictionSettings(views="none", budget_hours=.15))
    assert (tmp_path/"submission.csv").exists() and len(answer.folds.train) == (~missing).sum()


# --- pictures ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pictures(tmp_path_factory): return stage_pictures(RunFolder(tmp_path_factory.mktemp("pictures")))


def classify(pictures, folder, hours=0., say=QUIET, **changed):
    "The metrics of a fine-tuned classifier, as small as can be."
    run = RunFolder(folder).make()
    for name in ("items.parquet", "images.json", "pictures.npy"): shutil.copy(pictures.run/name, run/name)
    asked = dict(method="finetune", epochs=2, device="cpu", views="mirror", probe_rung=False, budget_hours=hours)
    return run_classification(run, open_pictures(run), ClassifySettings(**(asked | changed)), say)


def answers_of(folder): return pd.read_parquet(folder/"oof.parquet"), pd.read_csv(folder/"submission.csv")


def same(one, other):
    for a, b in zip(answers_of(one), answers_of(other)): pd.testing.assert_frame_equal(a, b, check_exact=True)


@pytest.fixture(scope="module")
def classified(pictures, tmp_path_factory):
    "The classifier without a limit, and the hours that it takes by the model's clock."
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)
        clock, folder = Hands(patch), tmp_path_factory.mktemp("classified")
        classify(pictures, folder)
        return folder, clock.now / 3600


def test_pictures_with_plenty_of_time(hands, pictures, classified, tmp_path):
    folder, hours = classified
    assert classify(pictures, tmp_path, 3 * hours)["budget"] == ""
    same(tmp_path, folder)


def test_pictures_with_less_time_killed_or_not(hands, pictures, classified, tmp_path):
    "All folds have fewer epochs, and are those that would have been asked for with them."
    less = .75 * classified[1]
    metrics = classify(pictures, tmp_path/"less", less)
    assert hands.now <= less * 3600 and metrics["budget"].endswith("h: epochs 1 of 2")
    classify(pictures, tmp_path/"asked", epochs=1)
    same(tmp_path/"less", tmp_path/"asked")
    def stop(line):
        if "fold 1  epoch 1" in line: raise Dies
    with pytest.raises(Dies): classify(pictures, tmp_path/"killed", less, stop)
    lines = []
    assert classify(pictures, tmp_path/"killed", less, lines.append)["budget"] == metrics["budget"]
    assert any("fold 0  finished before, after epoch 1" in line for line in lines)
    same(tmp_path/"less", tmp_path/"killed")
    assert not list(tmp_path.rglob("last.pt"))                    # what resuming needed goes with the model


def test_pictures_without_time_are_answered(hands, pictures, tmp_path):
    "By one fold after one epoch, with honest scores of the pictures that it held out; the report can be written."
    lines = []
    metrics = classify(pictures, tmp_path, .0001, lines.append, probe_rung=True,
        backbone="test_resnet.r160_in1k,test_vit.r160_in1k")
    run = RunFolder(tmp_path)
    assert left_out_folds(run) == [1, 2] and metrics["budget"] == run.json("metrics.json")["budget"] == lines[-1]
    for part in ("epochs 1 of 2", "folds 1 and 2 of 3 were not trained", "without test_vit.r160_in1k"):
        assert part in lines[-1]
    assert run.folds() == [0] and len(metrics["weights"]) == 1 and metrics["at_threshold"] == {}
    oof, answer = answers_of(tmp_path)
    assert set(oof.fold) == {0} and list(answer.id) == list(pictures.form.ids) and answer.iloc[:, 1].between(0, 1).all()
    assert not any(row["name"].endswith(", frozen") for row in metrics["ladder"])
    assert metrics["budget"] in picture_run_report(run)
    answered = open_classified(run)
    assert len(answered.p) == len(oof) and any("were not trained" in said for said in data_sentences(answered))
    explain_run(answered, ExplainSettings(draws=20, failures=2, samples=2))


def test_encoders_of_pictures_for_which_there_is_no_time(hands, pictures, tmp_path, monkeypatch):
    "Views first, then encoders; hand-made features cost nothing here."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    both = dict(method="probe", views="crops", backbone="test_resnet.r160_in1k,test_vit.r160_in1k")
    metrics = classify(pictures, tmp_path/"run", 300 / 3600, **both)
    said = metrics["budget"].partition(": ")[2]
    assert said.startswith("views ") and said.endswith("without test_vit.r160_in1k")
    assert len(metrics["weights"]) == 1 and len(answers_of(tmp_path/"run")[0]) == len(pictures.train)


# --- one process a GPU, and memory -------------------------------------------------------------

def in_its_process(function, args, changes, say, slot):
    "A job in a process where memory suffices for few rows and the machine has two GPUs, as far as it is asked."
    module = importlib.import_module(function.partition(":")[0])
    torch.set_num_threads(1)             # the same number here and there, or sums round otherwise
    def own(device, slot):
        with mock.patch("histokit.learn.devices.gpus", return_value=2): say(f"on {own_device(device, slot)}")
        return "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "own_device", own)
        cramp(patch, changes)
        return find_function(function)(*args, say=say, slot=slot)


def cramp(patch, most):
    "Memory for so many rows."
    def call(function, inputs, context):
        if len(next(iter(inputs.values()))) > most: raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried …")
        return call_float32(function, inputs, context)
    for page in ("trainer", "batches"): patch.setattr(f"histokit.learn.{page}.call_float32", call)


@pytest.fixture
def two_gpus(monkeypatch):
    "Two GPUs with little memory, as far as this machine can pretend."
    monkeypatch.setattr("histokit.learn.devices.gpus", lambda: 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for page in ("histokit.spots.crossval", "histokit.pictures.classifier"):
        job = lambda function, args, talks: Job("test_budget:in_its_process", (function, args, 12), talks)
        monkeypatch.setattr(f"{page}.Job", job)
    yield
    torch.set_num_threads(threads)


def test_spots_train_on_two_gpus_by_default_and_memory_may_run_out(two_gpus, tmp_path, monkeypatch):
    "Each process has its own; the answers are those of one after another, to the last bit."
    lines, how = [], dict(epochs=1, device="auto", amp=False)
    found = train(tmp_path/"two", say=lines.append, **how)[1]
    cramp(monkeypatch, 12)
    assert {line for line in lines if line.startswith("on ")} == {"on cuda:0", "on cuda:1"}
    assert any("out of memory with 32 rows at once: going on with 16" in line for line in lines)
    alone = train(tmp_path/"one", **(how | dict(device="cpu", fold_processes=1)))[1]
    np.testing.assert_array_equal(found.oof, alone.oof)


@pytest.mark.slow
def test_pictures_train_on_two_gpus_by_default_and_memory_may_run_out(two_gpus, pictures, tmp_path, monkeypatch):
    lines, how = [], dict(epochs=1, amp=False)
    classify(pictures, tmp_path/"two", say=lines.append, device="auto", **how)
    assert {line for line in lines if line.startswith("on ")} == {"on cuda:0", "on cuda:1"}
    assert any("out of memory with 16 rows at once: going on with 8" in line for line in lines)
    cramp(monkeypatch, 12)
    classify(pictures, tmp_path/"one", fold_processes=1, **how)
    same(tmp_path/"two", tmp_path/"one")


def test_two_processes_share_one_plan(tmp_path):
    "The first two folds have an epoch each, and the third no time; by the real clock, however fast it is."
    found = train(tmp_path, 1e-5, fold_processes=2)[1]
    plan = json.loads((tmp_path/"budget.json").read_text())["plans"]["folds"]
    assert len(left_out_folds(tmp_path)) == 1 and set(epochs_of(found).values()) == {1}
    assert plan["epochs"] == 1 and set(plan["epochs_of"].values()) <= {1}


def test_a_frozen_encoder_and_its_views_fit_into_memory(monkeypatch, tmp_path):
    "The features and answers are those of whole batches; what fails for another reason is not tried again."
    torch.manual_seed(0)
    model = create_model(3, **NETWORK).eval()
    data = open_stage(RunFolder(tmp_path), smoke_demo())
    dataset = SpotData(*data, TrainingSettings(input_px=32)).dataset(np.arange(40))
    how = dict(device="cpu", identity=dict(rows="first"))
    features, = cached_features(model, dataset, "none", tmp_path/"whole", **how)
    views = predict_views(model, dataset, "flips")
    cramp(monkeypatch, 7)
    again, = cached_features(model, dataset, "none", tmp_path/"pieces", **how)
    np.testing.assert_allclose(again, features, rtol=1e-2, atol=1e-3)                     # kept in half precision
    np.testing.assert_allclose(predict_views(model, dataset, "flips"), views, rtol=1e-4, atol=1e-5)
    cramp(monkeypatch, 0)
    with pytest.raises(BadInput, match="out of memory with a single picture"): predict_views(model, dataset, "none")
    def broken(*args): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr("histokit.learn.batches.call_float32", broken)
    with pytest.raises(RuntimeError, match="mat1"): predict_views(model, dataset, "none")


# --- the start of a run ------------------------------------------------------------------------

def test_all_stages_of_a_run_count_from_its_start(hands, tmp_path):
    run = RunFolder(tmp_path)
    with run_lock(tmp_path), run_began(run, -600.):
        assert open_budget(run, 1).left() == 3000 and open_budget(run, 0).left() == float("inf")
    assert not (tmp_path/"began.json").exists() and open_budget(run, 1).left() == 3600


def test_what_a_dead_run_left_is_not_a_start(hands, tmp_path):
    run = RunFolder(tmp_path)
    run.write_json("began.json", dict(at=-9e9))
    (tmp_path/".lock").touch()
    assert open_budget(run, 1).left() == 3600


@pytest.mark.slow
def test_the_pipeline_hands_its_start_to_the_stages(demo_file, tmp_path):
    "Stages are other processes: the demo with next to no hours answers, and its report says what is missing."
    from histokit.pipeline import run_pipeline, run_report
    smoke = [f"data_path={demo_file}", "stain_method=none", "input_px=32", "smoothing=1", "epochs=3", "patience=0"]
    run = RunFolder(run_pipeline("demo", [*smoke, "budget_hours=0.0001"], tmp_path/"run", show=QUIET))
    metrics, said = run.json("metrics.json"), "budget of 0.0001 h: epochs 1 of 3; "
    assert metrics["budget"].startswith(said) and "views 1 of 4" in metrics["budget"]
    assert metrics["budget"] in run_report(run)
    assert "Budget of 0.0001 h: epochs 1 of 3" in (run/"report.html").read_text()
    assert len(pd.read_csv(run/"submission.csv")) and not run.has("began.json")


@pytest.mark.parametrize("hours", [-1, float("nan")])
def test_hours_that_are_none_are_refused(hours):
    with pytest.raises(BadInput, match="budget_hours"): Budget(hours)
    with pytest.raises(BadInput, match="budget_hours"): TrainingSettings(budget_hours=-1)

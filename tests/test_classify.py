"""Classifiers of pictures: members, ensembles, thresholds, losses, and what a run leaves."""
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from histokit.core.runs import RunFolder
from histokit.core.submission import AnswerForm
from histokit.core.text import BadInput
from histokit.frozen.logistic import fit_logistic, indicator_table, logistic_path
from histokit.learn.devices import how_many
from histokit.learn.explain import explain_map, map_method
from histokit.learn.networks import load_model
from histokit.learn.scores import roc_auc
from histokit.pictures.calibrate import fit_combination, frozen_threshold, nested_calls, probabilities
from histokit.pictures.classification import (answer_values, ask_members, make_classifier, run_classification,
    stage_pictures)
from histokit.pictures.classifier import LabelTask, train_choose_held
from histokit.pictures.classify_settings import ClassifySettings
from histokit.pictures.folders import find_pictures
from histokit.pictures.operating_points import picture_auc
from histokit.pictures.prepared import open_pictures, prepare_pictures
from histokit.pictures.settings import PictureSettings
from histokit.pictures.toy import ToySettings, smoke_pictures, toy_pictures
from histokit.pipeline import absolute_paths, check_values, data_fingerprint, find_recipe, read_recipe
from histokit.pipeline import recipe_task, resolve
from histokit.pictures.task import prepare

QUIET = lambda line: None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return RunFolder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def data(run): return stage_pictures(run)


def test_a_probe_leaves_a_valid_answer_and_honest_numbers(run, data):
    settings = ClassifySettings(hog=True, claims="accuracy 0.999")
    metrics = run_classification(run, data, settings, QUIET)
    oof, answer = run.table("oof.parquet"), pd.read_csv(run/"submission.csv")
    assert list(answer.id) == list(data.form.ids)
    assert answer.iloc[:, 1].between(0, 1).all() and answer.iloc[:, 1].nunique() > 1
    assert np.isfinite(oof.p).all() and len(oof) == len(data.train)
    assert metrics["auc"]["value"] == pytest.approx(roc_auc(oof.p.to_numpy(), oof.label.to_numpy()), abs=.02)
    assert sum(metrics["weights"].values()) == pytest.approx(1) and min(metrics["weights"].values()) >= 0
    assert metrics["claims"][0]["inside_interval"] is False
    assert "training pictures" in metrics["threshold"]["chosen_on"]
    assert [r["name"] for r in metrics["ladder"]][0] == "constant" and metrics["ladder"][0]["auc"] == .5


def test_a_probe_of_stages_leaves_networks_that_answer_alone(tmp_path, data):
    "From a picture to its logit, from the folder of the fold that held the picture out; and such a network has maps."
    run = RunFolder(tmp_path)
    method = make_classifier(data, ClassifySettings(stages="-2,-1", device="cpu", views="none"), run)
    answers, fold = ask_members(method, QUIET)[0], data.folds()[0]
    for k in np.unique(fold):
        rows, model = np.flatnonzero(fold == k)[:4], load_model(run.fold_dir(k))
        images = torch.from_numpy(np.ascontiguousarray(data.pixels[data.train[rows]])).permute(0, 3, 1, 2)
        with torch.no_grad(): alone = model(images).numpy()
        np.testing.assert_allclose(alone, answers.held_out[0, rows], rtol=.02, atol=.02)
        assert map_method(model, images[:1]) == "stages"
        assert explain_map(model, images, [1] * len(images)).max((1, 2)).max() == pytest.approx(1)


def test_fine_tuning_answers_every_picture_and_keeps_its_folds(tmp_path, data, run):
    settings = ClassifySettings(method="finetune", epochs=1, sampler="balanced", loss="cross_entropy", views="mirror")
    other = RunFolder(tmp_path)
    metrics = run_classification(other, data, settings, QUIET)
    assert np.isfinite(other.table("oof.parquet").p).all()
    assert (tmp_path/"folds"/"0"/"model.safetensors").exists() and (tmp_path/"folds"/"0"/"history.csv").exists()
    assert any("TTA" in r["name"] for r in metrics["ladder"])
    assert any(r["name"].endswith(", frozen") for r in metrics["ladder"])


def test_folds_side_by_side_answer_as_one_after_another(tmp_path, data, request):
    "To the last bit where a process has as many threads; the folder of the run is theirs too."
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(how_many(2, 3, "cpu")[1])
    settings = ClassifySettings(method="finetune", epochs=1, device="cpu", views="mirror")
    found, lines = {}, []
    for n in (1, 2):
        run = RunFolder(tmp_path/str(n)).make()
        for name in ("items.parquet", "images.json", "pictures.npy"): shutil.copy(data.run/name, run/name)
        method = make_classifier(open_pictures(run), replace(settings, fold_processes=n), run)
        found[n] = ask_members(method, lines.append)[0]
    one, two = found[1], found[2]
    for part in ("held_out", "test"): np.testing.assert_array_equal(getattr(one, part), getattr(two, part))
    assert {k: list(h.columns) for k, h in one.histories.items()} == {k: list(h.columns) for k, h in
        two.histories.items()}
    for k in range(3):
        kept = [load_file(tmp_path/str(n)/"folds"/str(k)/"model.safetensors") for n in (1, 2)]
        assert all(torch.equal(a, b) for a, b in zip(kept[0].values(), kept[1].values()))
    assert sum(f"fold {k}" in line for line in lines for k in range(3)) >= 6


def test_no_fold_learns_from_a_patient_that_it_answers(data):
    fold, group = data.folds()[0], data.groups()
    assert all(len(set(fold[group == g])) == 1 for g in set(group))


def test_other_sites_are_answered_by_classifiers_that_did_not_see_them(run, data):
    settings = ClassifySettings()
    metrics = run_classification(run, data, settings, QUIET)
    assert set(metrics["sites"]) == {s for s in data.items.site if s}


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_several_classes_and_several_labels(tmp_path, kind):
    toy_pictures(tmp_path/"toy", ToySettings(kind=kind))
    how = PictureSettings(input_px=48, folds=3)
    run = RunFolder(tmp_path/"run").make()
    data = prepare_pictures(run, find_pictures(tmp_path/"toy", how), how)
    metrics = run_classification(run, data, ClassifySettings(), QUIET)
    answer = pd.read_csv(run/"submission.csv")
    assert list(answer.columns[1:]) == list(data.form.targets)
    if kind == "multiclass": assert np.allclose(answer.iloc[:, 1:].sum(axis=1), 1)
    assert metrics["threshold"] is None and .3 < metrics["auc"]["value"] <= 1


def test_weights_cannot_be_negative_and_a_member_that_lies_is_dropped():
    rng = np.random.default_rng(0)
    z = (rng.random((400, 1)) < .5).astype(float)
    good = z * 2 - 1 + rng.normal(size=z.shape)
    found = fit_combination(np.stack([good, -good]), z, "binary")
    assert found.weights[0] == pytest.approx(1, abs=.02) and found.weights[1] >= 0


def test_a_temperature_repairs_probabilities_and_leaves_the_order():
    rng = np.random.default_rng(1)
    true = rng.normal(size=(4000, 1))
    z = (rng.random((4000, 1)) < probabilities(true, "binary")).astype(float)
    found = fit_combination(true[None] * 5, z, "binary")
    assert found.temperature == pytest.approx(5, rel=.15)
    assert roc_auc(found(true[None] * 5), z) == roc_auc(true, z)


def test_a_threshold_is_judged_on_folds_that_did_not_choose_it():
    rng = np.random.default_rng(2)
    p, y, fold = rng.random(60), (rng.random(60) < .5).astype(int), np.arange(60) % 3
    called = nested_calls(p, y, fold)
    for k in range(3):
        others = fold != k
        assert np.array_equal(called[~others], p[~others] >= frozen_threshold(p[others], y[others]))


def test_a_penalty_keeps_noise_from_being_believed():
    rng = np.random.default_rng(3)
    x, z = rng.normal(size=(80, 300)), (rng.random((80, 1)) < .5).astype(float)
    fit = fit_logistic(x, z, np.arange(80) % 4, roc_auc)
    assert np.abs(fit.predict(x)).max() < np.abs(logistic_path(x, z, [.01])[0][0] @ x.T).max()


def test_balanced_weights_are_those_of_the_rows_that_are_learnt_from():
    task = LabelTask("binary", ("no", "yes"))
    loss = task.loss(np.array([0, 0, 0, 1]), ClassifySettings(class_weight="balanced"))
    assert "positive_weight=[3.0000]" in loss.text


def test_auc_leaves_out_what_nobody_looked_for():
    z = np.array([[0, 1], [1, np.nan], [0, np.nan]])
    assert picture_auc(np.array([[0., 0], [1, 0], [0, 0]]), z) == 1


@pytest.mark.parametrize("asked, said", [
    ("class_weight=balanced;sampler=balanced", "keep one of them"),
    ("method=finetune;stages=-2", "use method=probe"),
    ("loss=crossentropy", "did you mean"),
    ("claims=auc 97", "auc 0.97"),
    ("backbone=", "backbone is empty"),
    ("backbone=test_resnet,test_vit,test_resnet2;weights=none,none", "3 encoders and 2 weights"),
    ("method=finetune;folds=2", "three folds"),
])
def test_settings_that_cannot_be_used_are_refused_first(asked, said, tmp_path):
    given = read_recipe(find_recipe("image_probe")) | dict(data_path=str(smoke_pictures()), weights="none",
        backbone="test_resnet")
    with pytest.raises(BadInput, match=said):
        ask = resolve(given, asked.split(";"))
        check_values(recipe_task(given), ask)
        prepare(ask, RunFolder(tmp_path))


def test_a_template_with_other_columns_is_refused_before_training():
    task = LabelTask("multiclass", ("a", "b", "c"))
    with pytest.raises(BadInput, match="name them alike"):
        answer_values(task, np.ones((2, 3)) / 3, AnswerForm("id", (1, 2), ("a", "b", "d")))
    form = AnswerForm("id", (1, 2), ("class",), numbers=False)
    assert list(answer_values(task, [[.2, .7, .1], [.5, .2, .3]], form)) == ["b", "a"]


def test_a_folder_of_data_is_known_by_what_is_in_it(tmp_path):
    (tmp_path/"a.txt").write_text("1")
    first = data_fingerprint(tmp_path)
    (tmp_path/".hidden").write_text("x")
    assert data_fingerprint(tmp_path) == first
    (tmp_path/"a.txt").write_text("2")
    assert data_fingerprint(tmp_path) != first


def test_each_encoder_may_have_weights_of_its_own(tmp_path):
    (tmp_path/"w.safetensors").write_text("")
    given = read_recipe(find_recipe("image_probe"))
    ask = absolute_paths(resolve(given, [f"weights=package,{tmp_path}/w.safetensors"]))
    assert ask.get("weights") == f"package,{tmp_path}/w.safetensors"
    with pytest.raises(BadInput, match="does not exist"): absolute_paths(resolve(given, ["weights=package,nowhere.pt"]))


def test_three_parts_of_the_folds():
    train, choose, held = train_choose_held(np.array([0, 1, 2, 2, -1]), 2)
    assert (list(train), list(choose), list(held)) == ([1], [0], [2, 3])


def test_class_numbers_out_of_range_are_refused():
    with pytest.raises(BadInput, match="0 to 1"): indicator_table([0, 2], "binary")

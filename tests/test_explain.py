"Looking at a classifier: maps, baselines, shortcuts, curves, figures and the report of a run."
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics
from test_figures import faults

from histokit.core.runs import RunFolder
from histokit.core.text import BadInput
from histokit.learn.bootstrap import Bootstrap
from histokit.learn.explain import (
    attention_rollout, explain_map, grad_cam, gradient_map, overlay, share_inside, shuffled_weights)
from histokit.learn.losses import bce
from histokit.learn.networks import create_image_model
from histokit.learn.scores import UndefinedScore
from histokit.pictures.baselines import (
    WINDOW, baseline_rungs, grey_histograms, hog_features, label_in_other_words, logistic_out_of_fold, metadata_columns,
    small_pictures, thumbnails)
from histokit.pictures.classifier_figures import (
    Shots, judged_cases, pick_failures, pick_samples, show_calibration, show_cases, show_confusion,
    show_precision_recall, show_roc, show_training)
from histokit.pictures.explaining import (
    Audit, Explained, ExplainSettings, explain_run, map_cases, open_classified)
from histokit.pictures.operating_points import (
    Question, calibration_error, picture_auc, questions, roc_band, roc_points, sensitivity_point, specificity_point,
    threshold_measures, youden_point)
from histokit.pictures.picture_report import report_sections, write_picture_report
from histokit.pictures.shortcuts import audit_shortcuts, shortcut_verdict, shortcuts_found, show_shortcuts


# ---- maps

def squares(n, seed, side=48, size=12):
    "Noise with a bright square in every other picture, and where it lies."
    g = np.random.default_rng(seed)
    noise, where = g.normal(90, 30, (n, 1, side, side)).repeat(3, 1), np.zeros((n, side, side), bool)
    for i in range(1, n, 2):
        y, x = g.integers(0, side - size, 2)
        where[i, y:y + size, x:x + size] = True
    noise += 90 * where[:, None]
    return torch.from_numpy(noise.clip(0, 255).astype(np.uint8)), torch.arange(n) % 2, where


def taught(backbone, rate, steps, **how):
    torch.manual_seed(0)
    model = create_image_model(1, backbone, "none", "linear", dropout=0., **how)
    adam = torch.optim.AdamW(model.parameters(), rate)
    for step in range(steps):
        images, label, _ = squares(16, step)
        loss = bce(model(images), label[:, None].float())
        adam.zero_grad()
        loss.backward()
        adam.step()
    for p in model.parameters(): p.grad = None
    return model.eval()


@pytest.fixture(scope="module")
def networks():
    torch.set_num_threads(1)
    return dict(cam=taught("test_resnet", 7e-3, 20, backbone_args="output_stride=8"),
        gradient=taught("test_vit", 2e-3, 25, backbone_args="img_size=48,patch_size=8"))


@pytest.mark.parametrize("method", ["cam", "gradient", "rollout"])
def test_a_map_lies_on_a_planted_square_and_shuffled_weights_destroy_it(networks, method):
    images, label, where = squares(24, 99)
    yes = np.flatnonzero(label == 1)
    model = networks["cam" if method == "cam" else "gradient"]
    show = lambda m: share_inside(explain_map(m, images[yes], 1, method=method), where[yes])
    chance = where[yes].mean()
    assert show(model) > 2.5 * chance
    if method != "rollout": assert max(show(shuffled_weights(model, s)) for s in range(2)) < 2 * chance


def test_maps_leave_the_network_as_it_was(networks):
    images = squares(4, 1)[0]
    for name, model in networks.items():
        model.train()
        fused = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
        before = model(images).detach()
        for make in (grad_cam,) if name == "cam" else (gradient_map, attention_rollout): make(model, images)
        with pytest.raises(BadInput): grad_cam(model, images, target=7)
        assert model.training and "forward_features" not in vars(model.backbone)
        assert all(p.grad is None for p in model.parameters())
        assert fused == [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        model.eval()
        assert before.shape == model(images).shape


def test_maps_do_not_depend_on_the_batch_on_frozen_weights_or_on_the_kind_of_pixels(networks):
    images, model = squares(7, 3)[0], networks["cam"]
    whole = grad_cam(model, images)
    assert np.allclose(explain_map(model, images, batch_size=3), whole, atol=1e-5)
    for p in model.parameters(): p.requires_grad_(False)
    assert torch.allclose(grad_cam(model, images.float() / 255), whole, atol=1e-4)
    with torch.no_grad(): assert torch.allclose(grad_cam(model, images), whole, atol=1e-6)
    with torch.inference_mode(): given = images.clone()
    assert torch.allclose(gradient_map(model, images), gradient_map(model, given.clone()), atol=1e-6)
    assert grad_cam(model, images, layer="layer2").shape == whole.shape


def test_the_two_sides_of_one_output_are_explained_apart(networks):
    images, label, where = squares(12, 5)
    yes = np.flatnonzero(label == 1)
    for_it, against = (share_inside(grad_cam(networks["cam"], images[yes], side), where[yes]) for side in (1, 0))
    assert for_it > 2 * against


def test_an_overlay_keeps_the_picture_where_the_map_is_silent():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    maps = np.zeros((2, 8, 8))
    maps[:, 0, 0] = 1
    out = overlay(images, maps)
    assert (out[:, 1:] == images.numpy().transpose(0, 2, 3, 1)[:, 1:]).all() and out.dtype == np.uint8


# ---- baselines

def prepared(pixels, label, kind="binary", classes=("no", "yes"), **columns):
    "What the stages hand on, without a run folder."
    n = len(pixels)
    items = pd.DataFrame(dict(id=[f"p{i}" for i in range(n)], split="train", site="", view="") | columns)
    if kind == "multilabel": items = items.assign(**dict(zip(classes, np.asarray(label).T)))
    else: items["label"] = label
    return SimpleNamespace(pixels=pixels, items=items, train=np.arange(n), kind=kind, classes=classes,
        targets=lambda: np.asarray(label), groups=lambda: np.arange(n) // 2)


def noise(n, side=32, seed=0):
    return np.random.default_rng(seed).integers(60, 160, (n, side, side, 1)).repeat(3, 3).astype(np.uint8)


def test_features_are_the_same_however_pictures_are_read():
    pixels = noise(WINDOW + 9)
    for make in (thumbnails, grey_histograms, hog_features):
        whole = make(pixels, np.arange(len(pixels)))
        assert np.allclose(whole[WINDOW - 2:WINDOW + 3], make(pixels, np.arange(WINDOW - 2, WINDOW + 3)), atol=1e-6)
    coloured = pixels.copy()
    coloured[..., 2] //= 2
    assert thumbnails(coloured, range(4)).shape == (4, 768) and grey_histograms(coloured, range(4)).shape == (4, 96)
    assert small_pictures(pixels, [], 16).shape == (0, 3, 16, 16)


def test_hog_of_a_mirrored_picture_is_mirrored():
    pixels = noise(2, 128)
    a, b = (hog_features(p, [0, 1]).reshape(2, 2, 2, 9, 7, 7) for p in (pixels, pixels[:, :, ::-1]))
    assert np.allclose(a, b[:, :, ::-1, ::-1, :, ::-1], atol=1e-4)           # an angle of t becomes 180 degrees - t
    assert not np.allclose(a, b, atol=.05)


def test_out_of_fold_answers_of_every_kind_of_label():
    g = np.random.default_rng(0)
    x, fold = g.normal(size=(90, 5)), np.arange(90) % 3
    y = (x[:, 0] > 0).astype(int)
    y[:6], fold[6:9] = -1, -1
    p = logistic_out_of_fold(x, y, fold)
    assert p.shape == (90,) and np.isnan(p[6:9]).all() and np.isfinite(p[:6]).all() and picture_auc(p, y) > .9
    kinds = np.digitize(x[:, 1], [-.5, .5])
    assert logistic_out_of_fold(x, kinds, np.arange(90) % 3, 3).sum(1) == pytest.approx(1)
    labels = np.stack([y == 1, x[:, 2] > 0], 1).astype(float)
    labels[::7, 1] = np.nan
    many = logistic_out_of_fold(x, labels, np.arange(90) % 3)
    assert many.shape == (90, 2) and picture_auc(many, labels) > .9
    assert (logistic_out_of_fold(x, np.zeros(90, int), np.arange(90) % 3) == 0).all()       # one class: its share
    with pytest.raises(BadInput, match="90 rows of features for 9 targets"): logistic_out_of_fold(x, y[:9], fold)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_rungs_have_a_row_a_picture(kind):
    pixels, g = noise(60), np.random.default_rng(0)
    some = (g.random((60, 2)) < .5).astype(float)
    label = dict(binary=np.arange(60) % 2, multiclass=np.arange(60) % 3, multilabel=some)[kind]
    classes = dict(binary="ab", multiclass="abc", multilabel="xy")[kind]
    data = prepared(pixels, label, kind, tuple(classes), view=np.where(g.random(60) < .5, "AP", "PA"))
    rungs = baseline_rungs(data, np.arange(60) // 2 % 3)
    assert list(rungs) == ["constant", "metadata only", "thumbnail 16x16", "HOG"]
    shape = (60,) if kind == "binary" else (60, len(classes))
    assert all(p.shape == shape and np.isfinite(p).all() for p in rungs.values())
    assert picture_auc(rungs["constant"], label) == .5


def test_names_and_labels_in_other_words_are_no_metadata():
    n = 40
    names = dict(id=[f"a{i}" for i in range(n)], file=[f"x/{i}.png" for i in range(n)])
    items = pd.DataFrame(names | dict(site=["A", "B"] * 20,
        finding=["mass", "none"] * 20, accession=[f"q{i}" for i in range(n)], age=range(n), fold_1=[0, 1] * 20))
    assert metadata_columns(items) == ["site", "finding", "age"]
    assert label_in_other_words(items, np.arange(n) % 2, ["site", "finding", "age"]) == ["finding"]


# ---- shortcuts

FOLDS = np.arange(120) // 2 % 4

def chests(where, seed=0, **columns):
    "Noise with a soft disc inside for the positive, and perhaps something that gives the label away."
    pixels, label, g = noise(120, seed=seed).astype(int), np.arange(120) % 2, np.random.default_rng(seed)
    label = g.permutation(label)
    yes = np.flatnonzero(label)
    pixels[yes, 12:20, 12:20] += 25
    if where == "corner": pixels[yes[:50], 1:3, 1:4] = 255
    if where == "frame": pixels[yes, :, :2] = pixels[yes, :, :2] // 2
    if where == "size": columns |= dict(width=np.where(label, 500, 640) + g.integers(0, 30, 120), height=512)
    if where == "site": columns |= dict(site=np.where(g.random(120) < .1 + .8 * label, "north", "south"))
    return prepared(pixels.clip(0, 255).astype(np.uint8), label, **columns)


SHORTCUTS = [("corner", "border"), ("frame", "border"), ("size", "size"), ("site", "metadata")]

@pytest.mark.parametrize("where, source", SHORTCUTS)
def test_a_planted_shortcut_is_called_out(where, source):
    audit = audit_shortcuts(chests(where), FOLDS, bootstrap=Bootstrap(draws=60))
    assert shortcuts_found(audit) == [source]
    assert shortcut_verdict(audit).startswith(f"Shortcut: {source} alone reaches an AUC of ")


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_set_is_not(seed):
    g = np.random.default_rng(seed + 100)
    data = chests("", seed, view=g.permutation(["AP", "PA"] * 60), width=g.integers(400, 600, 120), height=500)
    audit = audit_shortcuts(data, FOLDS, np.where(data.targets(), .9, .1), Bootstrap(draws=60))
    assert list(audit.source) == ["border", "size", "metadata", "histogram", "thumbnail", "this model"]
    assert audit.auc[audit.source.eq("thumbnail")].item() > .8         # the finding itself is there to be seen
    assert shortcuts_found(audit) == []
    assert shortcut_verdict(audit).startswith("No shortcut found: border, size and metadata")
    assert faults(show_shortcuts(audit)) == []
    plt.close("all")


# ---- operating points

def drawn(n, seed, ties=False):
    g = np.random.default_rng(seed)
    y = (g.random(n) < .4).astype(int)
    p = 1 / (1 + np.exp(-(g.normal(size=n) + 1.5 * y - .5)))
    return Question("drawn", p.round(1) if ties else p, y, np.arange(n))


@pytest.mark.parametrize("ties", [False, True])
def test_points_of_a_curve(ties):
    for seed in range(5):
        q = drawn(150, seed, ties)
        fpr, tpr, _ = roc_points(q)
        best = youden_point(q)
        assert best["sensitivity"] + best["specificity"] - 1 == pytest.approx((tpr - fpr).max())
        assert sensitivity_point(q, .8)["sensitivity"] >= .8 and specificity_point(q, .8)["specificity"] >= .8
        low, high = roc_band(q, np.linspace(0, 1, 21), [np.arange(150) // 3], Bootstrap(draws=40))
        assert (low <= high).all() and (np.diff(low) >= -1e-9).all() and high[-1] == 1
        called = q.p >= .5
        assert threshold_measures(q, .5)["f1"] == pytest.approx(metrics.f1_score(q.y, called))


def test_what_a_table_cannot_answer():
    with pytest.raises(UndefinedScore): picture_auc([.1, .2], [0, 0])
    alike = Question("x", np.ones(3), np.ones(3, int), np.arange(3))
    with pytest.raises(UndefinedScore, match="'x' has cases of one kind"): roc_points(alike)
    with pytest.raises(BadInput, match="2 columns for 3 names"): questions(np.ones((4, 2)), [0, 1, 2, 0], "abc")
    assert np.isnan(threshold_measures(Question("x", np.array([.2]), np.array([0]), np.arange(1)), .5)["sensitivity"])
    assert calibration_error(Question("x", np.array([1., 0.]), np.array([1, 0]), np.arange(2))) == 0


# ---- figures

LONG = ("bacterial pneumonia", "viral pneumonia", "no finding", "pleural effusion", "cardiomegaly")

@pytest.mark.parametrize("kind", ["two", "five", "labels"])
def test_no_text_of_a_figure_is_small_or_lies_on_another(kind):
    g = np.random.default_rng(0)
    some = (g.random((120, 5)) < .3).astype(float)
    target = dict(two=np.arange(120) % 2, five=np.arange(120) % 5, labels=some)[kind]
    names = LONG[:2] if kind == "two" else LONG
    p = dict(two=g.random(120), five=g.dirichlet(np.ones(5), 120), labels=g.random((120, 5)))[kind]
    asked, cases = questions(p, target, names), judged_cases(p, target, names)
    wrong, picked, pixels = pick_failures(cases, 4), pick_samples(cases, 4), noise(120)
    history = pd.DataFrame(dict(epoch=[1, 2, 3], loss=[3., 2, 1], auc=[.5, .7, .6], lr=.1))
    figures = dict(confusion=show_confusion(cases, names, kind == "labels"),
        failures=show_cases(Shots(wrong, pixels[wrong.row], pixels[wrong.row]), "Wrong", 2))
    if kind != "five": figures |= dict(roc=show_roc(asked, [np.arange(120)], .5, Bootstrap(draws=20)))
    if kind == "labels": figures |= dict(precision=show_precision_recall(asked), calibration=show_calibration(asked))
    if kind == "two": figures |= dict(training=show_training({k: history for k in range(5)}),
        samples=show_cases(Shots(picked, pixels[picked.row]), "Samples"),
        none=show_cases(Shots(cases[:0], pixels[:0]), "None"))
    assert {name: faults(f) for name, f in figures.items()} == dict.fromkeys(figures, [])
    plt.close("all")


# ---- a run

def write_run(path, kind="binary", perfect=False):
    "A run folder as the two stages before leave it, without any network."
    run, g, n = RunFolder(path).make(), np.random.default_rng(0), 60
    classes = dict(binary=("Normal", "TB"), multiclass=("a", "b", "c"), multilabel=("left", "right"))[kind]
    row, who = np.arange(n), np.arange(n) // 2
    items = pd.DataFrame(dict(id=[f"p{i}" for i in row], file=[f"train/{i}.png" for i in row], split="train", row=row,
        patient=who.astype(str), group=who, site=["A", "B"] * 30, view="", fold=who % 3))
    if kind == "multilabel": items = items.assign(left=(row % 3 == 0) * 1., right=(row % 4 == 0) * 1.)
    else: items["label"] = who % len(classes)
    truth = items[list(classes)].to_numpy() if kind == "multilabel" else np.eye(len(classes))[items.label]
    score = truth * (100 if perfect else 1.5) + g.normal(size=truth.shape)
    p = 1 / (1 + np.exp(-score + (50 if perfect else .7)))
    names = ["p"] if kind == "binary" else [f"p_{c}" for c in classes]
    p = p[:, 1:] if kind == "binary" else p
    rungs = {"constant": .5, "HOG": g.random(n), "net": p[:, 0]} if kind == "binary" else \
        {f"{r}|{c}": p[:, j] if r == "net" else g.random(n) for r in ("HOG", "net") for j, c in enumerate(classes)}
    auc = picture_auc(p[:, 0] if kind == "binary" else p, items.label.to_numpy() if kind != "multilabel" else truth)
    rung = lambda name, v: dict(name=name, auc=v, low=v - .05, high=min(v + .05, 1), skill=0, kind="model")
    threshold = dict(value=.5, rule="half", chosen_on="nothing") if kind == "binary" else None
    run.write_table("items.parquet", items)
    run.write_table("oof.parquet", pd.DataFrame(dict(zip(names, p.T))))
    run.write_table("rungs.parquet", pd.DataFrame(rungs, index=range(n)))
    run.write_json("metrics.json", dict(ladder=[rung("HOG", .5), rung("net", auc)], weights={"net": 1.}, claims=[],
        auc=dict(value=auc, low=None, high=None, rung="net"), threshold=threshold, sites={}, test=None,
        at_threshold=dict(accuracy=dict(value=.8, low=.7, high=.9)) if threshold else {}))
    run.write_json("images.json", dict(classes=classes, kind=kind, layout="made <up>", root=".", form=None,
        left_out=[dict(file="x|y", why="torn")]))
    np.save(run/"pictures.npy", noise(n))
    return run


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel"])
def test_a_run_is_looked_at_and_reported(tmp_path, kind):
    run = write_run(tmp_path, kind)
    explained = explain_run(open_classified(run), ExplainSettings(draws=20, failures=3, samples=4))
    assert explained.maps.maps is None and "keeps no network" in explained.maps.said
    html, markdown = (f.read_text() for f in write_picture_report(explained, 20))
    assert "made &lt;up&gt;" in html and "x\\|y" in markdown and "nan" not in markdown.lower().split()
    assert html.count("<img") == markdown.count("![") == len(list((run/"figures").glob("*.png"))) == 8
    assert ("WHO" in markdown) == (kind == "binary")
    assert "the model is above it" in markdown and not plt.get_fignums()


def test_sentences_follow_the_numbers(tmp_path):
    run = write_run(tmp_path, perfect=True)
    answered = open_classified(run)
    wrong = pick_failures(answered.cases)
    maps = map_cases(answered, wrong)
    assert len(wrong) == 0 and maps.said == "No maps: there is no such case."
    table = pd.DataFrame([dict(source="border", auc=.7, low=.65, high=.75, blind=True)])
    audit = Audit(table, None, pd.DataFrame(columns=["site"]))
    explained = Explained(answered, audit, Shots(wrong, answered.images(wrong.row)), maps)
    said = str(report_sections(explained, 20))
    wanted = ("0 of 60 answers are wrong (0.0%)", "is met.", "above it for sure", "Shortcut: border alone reaches")
    for sentence in wanted: assert sentence in said
    answered.metrics["claims"] = [dict(figure="auc", claimed=.97, value=1., low=.98, high=1., inside_interval=False)]
    claimed = "Published auc 0.97, measured 1.000 (0.980 to 1.000): the claim lies outside the interval."
    assert claimed in str(report_sections(explained, 20))


def test_a_run_that_is_not_whole(tmp_path):
    nothing = RunFolder(tmp_path/"empty").make()
    with pytest.raises(BadInput, match="run its stage 10_images first"): open_classified(nothing)
    run = write_run(tmp_path/"run")
    answered = open_classified(run)
    assert map_cases(answered, answered.cases[:3], ExplainSettings(maps="none")).said == "Maps were switched off."
    run.write_table("oof.parquet", pd.DataFrame(dict(p=[.5, .2])))
    with pytest.raises(BadInput, match="2 rows for 60 training pictures; run 11_classify again"): open_classified(run)
    (run/"oof.parquet").unlink()
    with pytest.raises(BadInput, match="run its stage 11_classify first"): open_classified(run)
    for bad in (dict(maps="heat"), dict(failures=0), dict(draws=1), dict(samples=1000), dict(device="gpu")):
        with pytest.raises(BadInput): ExplainSettings(**bad)

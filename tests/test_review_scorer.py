"""The scorer of the review app: its file, drafts and training, what is asked next, and which model is promoted."""
import json
import shutil
import struct
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from histokit.core.text import BadInput
from histokit.review.active import next_images
from histokit.review.demo import PaintedScores, demo_crops, paint_crop
from histokit.review.measures import PRESETS, Measure
from histokit.review.ordinal import ORDINAL_CODES, OrdinalCode, cut_scores, fit_cuts, unit_scores
from histokit.review.scorer import ScoreDataset, Scorer, create_score_network
from histokit.review.scorer_training import PUBLISHED_SCORER, ScorerSettings, held_out_scores, read_crops
from histokit.review.scorer_training import train_finetuned, train_scorer
from histokit.review.store import Store
from histokit.review.study_train import compare_drafts, frozen_groups, is_not_worse, painted_study, retrain_study
from histokit.review.study_train import step_back, train_study, training_values

QUIET = lambda line: None
TINY = dict(backbone="test_resnet.r160_in1k", weights="none")
QUICK = ScorerSettings(**TINY, input_px=64, views="mirror", stages="-2", folds=3)
PANCREAS = PRESETS["pancreas"]


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return demo_crops(tmp_path_factory.mktemp("crops"), 30, px=128)


@pytest.fixture(scope="module")
def model(crops, tmp_path_factory):
    "A trained model's file and its metrics."
    file = tmp_path_factory.mktemp("model")/"model.safetensors"
    return file, train_scorer(crops, PANCREAS, QUICK, file, QUIET)


# --- the file --------------------------------------------------------------------------------

def test_a_file_gives_the_same_drafts_again_and_names_its_version(model, crops, tmp_path):
    file, metrics = model
    one, two = Scorer.load(file), Scorer.load(file)
    assert one.version == metrics["version"] == two.version and len(one.version) == 12
    drafts = [s.draft(crops.path[0]) for s in (one, two)]
    assert drafts[0] == drafts[1] and drafts[0].raw == pytest.approx(drafts[1].raw)
    assert all(m.allows(drafts[0][m.key]) for m in one.measures)
    assert one.save(tmp_path/"copy.safetensors") == Scorer.load(tmp_path/"copy.safetensors").version


def test_a_scorer_is_cheap_to_open(model):
    "Loading reads the header; the networks are built when a draft is asked for."
    scorer = Scorer.load(model[0])
    assert "networks" not in vars(scorer)
    assert len(scorer.networks) == 1 and "networks" in vars(scorer)


def rewritten(file, out, change):
    "A model's file whose header was changed."
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    about = json.loads(header["__metadata__"]["histokit_scorer"])
    change(about)
    header["__metadata__"]["histokit_scorer"] = json.dumps(about)
    text = json.dumps(header).encode()
    out.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size:])
    return out


@pytest.mark.parametrize("change, said", [
    (lambda a: a.update(format=99), "newer histokit"),
    (lambda a: a.pop("cuts"), "lacks cuts"),
    (lambda a: a.update(code="mze"), "did you mean 'mse'"),
    (lambda a: a.update(measures=[]), "needs a measure")])
def test_a_file_of_another_kind_is_refused_in_one_line(model, tmp_path, change, said):
    with pytest.raises(BadInput, match=said) as e: Scorer.load(rewritten(model[0], tmp_path/"m.safetensors", change))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("cut", [0, 4, 100, 5000, -1])
def test_a_file_that_is_cut_off_is_refused(model, tmp_path, cut):
    (tmp_path/"m.safetensors").write_bytes(model[0].read_bytes()[:cut])
    with pytest.raises(BadInput) as e: Scorer.load(tmp_path/"m.safetensors")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("wrong", [
    lambda a: a["networks"][0].update(backbone="resnet18"),
    lambda a: a["networks"][0].update(n_outputs=7),
    lambda a: a["networks"].append(a["networks"][0])], ids=["backbone", "outputs", "number"])
def test_weights_that_do_not_fit_are_refused_in_one_line(model, tmp_path, wrong):
    scorer = Scorer.load(rewritten(model[0], tmp_path/"m.safetensors", wrong))
    with pytest.raises(BadInput, match="does not fit its own description") as e: getattr(scorer, "networks")  # noqa: B009
    assert "\n" not in str(e.value)


def as_first_format(about):
    "A header as the first version wrote it: every network of one kind, its stages as they were asked for."
    about["format"] = 1
    for network in about["networks"]:
        for key in ("kind", "head", "hidden", "spread", "final"): network.pop(key)
        network["stages"] = [-2]


def test_a_file_of_the_first_format_drafts_as_it_did(model, crops, tmp_path):
    old = Scorer.load(rewritten(model[0], tmp_path/"old.safetensors", as_first_format))
    new = Scorer.load(model[0])
    assert old.draft(crops.path[0]).raw == new.draft(crops.path[0]).raw
    old.save(tmp_path/"again.safetensors")
    assert Scorer.load(tmp_path/"again.safetensors").draft(crops.path[0]).raw == new.draft(crops.path[0]).raw


# --- drafts ----------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_every_kind_of_picture_is_drafted(model, tmp_path, mode):
    crop = Image.fromarray(paint_crop(PaintedScores(1, 1, 1, 1), 100))
    if mode == "I;16": crop = Image.fromarray(np.asarray(crop.convert("L")).astype(np.uint16) * 257)
    else: crop = crop.convert(mode)
    crop.save(tmp_path/"crop.tif")
    draft = Scorer.load(model[0]).draft(tmp_path/"crop.tif")
    assert list(draft) == [m.key for m in PANCREAS] and np.isfinite(list(draft.raw.values())).all()


@pytest.mark.parametrize("content", [b"", b"no picture", b"II*\0" + bytes(20)])
def test_what_is_no_picture_is_one_line(model, tmp_path, content):
    (tmp_path/"x.tif").write_bytes(content)
    with pytest.raises(BadInput) as e: Scorer.load(model[0]).draft(tmp_path/"x.tif")
    assert "\n" not in str(e.value) and "x.tif" in str(e.value)


def test_a_map_changes_no_later_draft(model, crops):
    "Grad-CAM must leave batch-norms in evaluation mode."
    scorer = Scorer.load(model[0])
    before = scorer.draft(crops.path[3])
    seen = scorer.attention(crops.path[3], "fibrosis")
    after = scorer.draft(crops.path[3])
    assert before.raw == pytest.approx(after.raw) and before.features == pytest.approx(after.features)
    assert seen.shape == (64, 64) and 0 <= seen.min() <= seen.max() <= 1


def map_of(network, code, crop, folder):
    "The crop's map of a scorer of one measure."
    config = dict(measures=[asdict(Measure("one", high=3))], code=code, heads=1, input_px=96, views="none",
        cuts=[[.2, .5, .8]])
    Image.fromarray(crop).save(folder/"crop.png")
    return Scorer([network], config).attention(folder/"crop.png", "one")


@pytest.mark.parametrize("stages, code", [((), "mse"), ((), "corn"), ((-3, -2), "mse"), ((-3, -2), "soft")])
def test_every_kind_of_head_has_a_map(tmp_path, stages, code):
    torch.manual_seed(1)
    network = create_score_network(OrdinalCode((Measure("one", high=3),), code).n_outputs, stages, **TINY)
    seen = map_of(network, code, paint_crop(PaintedScores(), 96), tmp_path)
    assert seen.shape == (96, 96) and seen.dtype == np.float32 and np.isfinite(seen).all()
    assert seen.max() == pytest.approx(1, abs=1e-3) or not seen.any()


def test_a_map_lies_where_the_channel_is_strong_that_the_head_reads(tmp_path):
    torch.manual_seed(1)
    network, crop = create_score_network(1, **TINY).eval(), np.full((96, 96, 3), 240, np.uint8)
    crop[:48, :48] = paint_crop(PaintedScores(), 48)
    image = torch.from_numpy(crop).permute(2, 0, 1)[None]
    with torch.no_grad(): channels = network.backbone.forward_features(network.scaled(image))[0]
    channel = int(channels.flatten(1).std(1).argmax())
    with torch.no_grad():
        network.head[-1].weight.zero_()[0, channel] = 1.
    seen, strong = map_of(network, "mse", crop, tmp_path), channels[channel].relu().numpy()
    size = 96 // len(strong)
    place = np.array(np.unravel_index(seen.argmax(), seen.shape)) // size
    assert strong[tuple(place)] == strong.max() > strong.min()


def test_crops_of_one_sample_are_drafted_as_alone_without_a_stain(model, crops):
    scorer = Scorer.load(model[0])
    paths = list(crops.path[:3])
    for alone, together in zip(map(scorer.draft, paths), scorer.draft_sample(paths)):
        assert alone.raw == pytest.approx(together.raw, abs=1e-4)


def test_a_map_sees_every_stage_that_the_head_reads(tmp_path):
    "A head on an early stage alone has the map of that stage; one on two stages has the sum of both."
    torch.manual_seed(1)
    network, crop = create_score_network(1, (-3, -2), **TINY).eval(), paint_crop(PaintedScores(3, 1, 2, 3), 96)
    weight, maps = network.head[-1].weight, {}
    width = 2 * network.backbone.feature_info[network.config["stages"][0]]["num_chs"]
    kept = weight.detach().clone()
    for name, part in dict(early=slice(0, width), late=slice(width, None), both=slice(None)).items():
        with torch.no_grad(): weight.zero_()[:, part] = kept[:, part]
        maps[name] = map_of(network, "mse", crop, tmp_path).ravel()
    alike = {name: np.corrcoef(maps["both"], maps[name])[0, 1] for name in ("early", "late")}
    assert min(alike.values()) > .1 and max(alike.values()) < .999, alike


def test_an_encoder_of_tokens_has_a_map(tmp_path):
    torch.manual_seed(1)
    network = create_score_network(1, backbone="test_vit.r160_in1k", weights="none")
    seen = map_of(network, "mse", paint_crop(PaintedScores(), 160), tmp_path)
    assert np.isfinite(seen).all() and seen.max() == pytest.approx(1, abs=1e-3)


def test_the_queue_drafts_with_the_sample_where_training_did(crops, tmp_path):
    "The stain of a crop is measured over its sample's crops, as it was when the model was judged; no more than that."
    from histokit.review.queue import Drafter, seen_path
    from histokit.review.uploads import keep_folder
    asked = replace(QUICK, stain="macenko", stain_by="sample")
    train_scorer(crops[:15], PANCREAS, asked, tmp_path/"sample.safetensors", QUIET)
    scorer = Scorer.load(tmp_path/"sample.safetensors")
    scorer.config["settings"]["stain_by"] = "picture"
    scorer.save(tmp_path/"picture.safetensors")
    sample = crops[crops.group == crops.group[0]]
    (tmp_path/"crops").mkdir()
    for path in sample.path: shutil.copy(path, tmp_path/"crops")
    with Store(tmp_path/"study") as store:
        ids = [a["id"] for a in keep_folder(store, tmp_path/"crops")["accepted"]]
        files = [store.folder/store.image(i).file for i in ids]
        for by in ("sample", "picture"):
            version, scorer = store.add_model(tmp_path/f"{by}.safetensors"), Scorer.load(tmp_path/f"{by}.safetensors")
            together, alone = scorer.draft_sample(files)[0], scorer.drafts(scorer.pixels(files[0])[None])[0]
            drafter = Drafter(store)
            assert drafter.draft(store.image(ids[0]).file, store.files_beside(ids[0]))[1] == version
            with np.load(seen_path(store, version, store.image(ids[0]).file)) as kept: seen = kept["features"]
            want, other = (together, alone) if by == "sample" else (alone, together)
            assert seen == pytest.approx(want.features, abs=1e-3) and seen != pytest.approx(other.features, abs=1e-3)


def test_a_crop_that_cannot_be_read_spoils_no_map_of_its_sample(crops, tmp_path):
    "As it spoils no draft: it is left out."
    from histokit.review.queue import draw_attention
    asked = replace(QUICK, stain="macenko", stain_by="sample")
    train_scorer(crops[:15], PANCREAS, asked, tmp_path/"sample.safetensors", QUIET)
    first, second, *_ = crops[crops.group == crops.group[0]].path
    (tmp_path/"cut.tif").write_bytes(b"II*\0")
    maps = []
    for name, others in dict(whole=[second], cut=[second, tmp_path/"cut.tif"]).items():
        out = str(tmp_path/f"{name}.png")
        draw_attention(str(tmp_path/"sample.safetensors"), str(first), "atrophy", out, (96, 96), others=others)
        maps.append(np.asarray(Image.open(out)))
    assert np.array_equal(*maps)


# --- codes and cuts --------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ORDINAL_CODES)
def test_a_code_has_a_smaller_loss_the_nearer_it_is(kind):
    code = OrdinalCode(PRESETS["pancreas_quarter"], kind)
    out = torch.zeros(6, code.n_outputs, requires_grad=True)
    target = torch.rand(6, 4).mul(12).round().div(12)
    optimizer, losses = torch.optim.Adam([out], .1), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(code(out, target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and code.decode(out).shape == (6, 4)
    assert abs(code.decode(out.detach()) - target).mean() < .15


def test_matched_cuts_give_the_distribution_of_the_truth():
    rng = np.random.default_rng(0)
    true = rng.choice(5, (500, 1), p=[.4, .3, .2, .05, .05])
    given = cut_scores(pred := rng.normal(size=(500, 1)), fit_cuts(pred, true, (Measure("m"),)), (Measure("m"),))
    assert np.abs(np.bincount(given[:, 0].astype(int), minlength=5) - np.bincount(true[:, 0], minlength=5)).max() <= 1


def test_cuts_are_those_of_other_folds():
    "A score of a fold must not move the cuts that its own rows are judged by."
    rng = np.random.default_rng(0)
    held, true, fold = rng.random((60, 1)), rng.integers(0, 4, (60, 1)), np.arange(60) // 20
    measures = (Measure("m", high=3),)
    before = held_out_scores(held, true, fold, measures)
    changed = true.copy()
    changed[fold == 1] = 0
    after = held_out_scores(held, changed, fold, measures)
    assert (before[fold == 1] == after[fold == 1]).all() and (before != after).any()


# --- training --------------------------------------------------------------------------------

def test_painted_scores_are_learnt_and_judged_beside_baselines(model):
    table = pd.DataFrame(model[1]["table"])
    mean = table[table.measure == "mean"].set_index("answer").kappa
    assert mean["model"] > .3 > mean["global mean"] and set(mean.index) > {"sample's other crops"}
    assert model[1]["mean_kappa"] == mean["model"] and len(model[1]["sentences"]) == 2


def test_scores_of_chance_are_not_learnt(crops):
    "If a sample leaked from training into judging, chance would look like skill."
    rng = np.random.default_rng(0)
    noise = crops.assign(**{m.key: rng.integers(0, 5, len(crops)) for m in PANCREAS})
    metrics = train_scorer(noise, PANCREAS, QUICK, log=QUIET)
    assert metrics["mean_kappa"] < .25


def test_training_again_gives_the_same_model(crops, tmp_path):
    first, second = (train_scorer(crops, PANCREAS, QUICK, tmp_path/f"{i}.safetensors", QUIET) for i in range(2))
    assert first["mean_kappa"] == second["mean_kappa"] and first["chosen"] == second["chosen"]
    drafts = [Scorer.load(tmp_path/f"{i}.safetensors").draft(crops.path[0]).raw for i in range(2)]
    assert drafts[0] == pytest.approx(drafts[1], abs=1e-3)


@pytest.mark.parametrize("loss", ORDINAL_CODES)
def test_the_published_fine_tuning_trains_the_last_stage_alone(crops, loss):
    settings = replace(PUBLISHED_SCORER, **TINY, input_px=48, epochs=1, folds=3, loss=loss)
    data = read_crops(crops, PANCREAS, settings, QUIET)
    trained = train_finetuned(data, settings, QUIET)
    network, = trained.networks
    assert trained.held.shape == (30, 4) and np.isfinite(trained.held).all() and not network.training
    assert {k.split(".")[0] for k, p in network.backbone.named_parameters() if p.requires_grad} == {"layer4"}
    frozen = [m for m in network.train().backbone.modules() if isinstance(m, torch.nn.BatchNorm2d) and
        not m.weight.requires_grad]
    assert frozen and not any(m.training for m in frozen)


def test_an_epoch_turns_its_crops_and_repeats_itself():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    data = ScoreDataset(pixels, np.zeros((6, 2)), augment=True)
    a, b, other = (data.epoch(seed).batch(np.arange(6))[0]["image"] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, other)


@pytest.mark.parametrize("change, said", [
    (dict(fibrosis=9), "outside its scale"), (dict(group="S-1"), "3 samples at least"),
    (dict(path="nowhere.tif"), "nowhere.tif"), (dict(fibrosis=np.nan), "3 samples at least")])
def test_a_table_that_cannot_be_learnt_is_one_line(crops, change, said):
    with pytest.raises(BadInput, match=said) as e: train_scorer(crops.assign(**change), PANCREAS, QUICK, log=QUIET)
    assert "\n" not in str(e.value)


def test_a_consensus_between_two_steps_is_learnt_from(crops):
    crops = crops.assign(fibrosis=np.clip(crops.fibrosis + .5, 0, 4))
    assert np.isfinite(train_scorer(crops, PANCREAS, QUICK, log=QUIET)["mean_kappa"])


def test_unit_scores_use_each_measures_own_range():
    quarter = PRESETS["pancreas_quarter"]
    assert unit_scores([[m.high for m in quarter]], quarter).tolist() == [[1] * 4]
    with pytest.raises(BadInput): ScorerSettings(stain="macenkoo")


# --- what is asked next ----------------------------------------------------------------------

@pytest.mark.parametrize("per_group, k", [(1, 50), (3, 12), (50, 50)])
def test_never_too_many_of_one_sample_and_nothing_twice(per_group, k):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(dict(id=np.arange(80), group=rng.integers(0, 9, 80)))
    found = next_images(frame, rng.normal(size=(80, 5)), rng.random(80), per_group, k, 0)
    ids = [i for i, _ in found]
    assert len(set(ids)) == len(ids) == min(k, sum(min(n, per_group) for n in frame.group.value_counts()))
    assert frame.group[ids].value_counts().max() <= per_group and all(why.endswith(".") for _, why in found)


def test_near_copies_are_not_all_asked_for():
    "Twenty copies of the unsurest image, and eighty others."
    rng = np.random.default_rng(0)
    features = np.concatenate([np.zeros((20, 6)) + rng.normal(0, 1e-3, (20, 6)), rng.normal(3, 2, (80, 6))])
    frame = pd.DataFrame(dict(id=np.arange(100), group=np.arange(100)))
    found = next_images(frame, features, np.r_[np.full(20, 9.), rng.random(80)], 5, 20, 0)
    assert sum(i >= 20 for i, _ in found) >= 8


# --- in a study ------------------------------------------------------------------------------

def test_frozen_samples_stay_frozen_when_others_come():
    groups = [f"S-{i}" for i in range(50)]
    first = frozen_groups(groups[:20])
    assert set(first) <= set(frozen_groups(groups, already=first)) and 1 <= len(first) < 20


def test_a_model_of_chance_does_not_pass_and_an_equal_one_does():
    rng, grade = np.random.default_rng(0), [Measure("grade", high=4)]
    true, group = rng.integers(0, 5, (200, 1)), np.arange(200) // 10
    good = np.clip(true + rng.integers(-1, 2, true.shape), 0, 4)
    chance = rng.integers(0, 5, true.shape)
    assert is_not_worse(compare_drafts(good, good, true, grade, group))
    assert not is_not_worse(compare_drafts(good, chance, true, grade, group))
    assert is_not_worse(compare_drafts(chance, good, true, grade, group))


@pytest.fixture
def study(tmp_path): return painted_study(tmp_path/"study", 25, 64)


def test_a_study_trains_promotes_and_goes_back(study):
    first = train_study(study, QUICK, log=QUIET)
    second = train_study(study, replace(QUICK, stages="-3"), margin=9., log=QUIET)
    with Store(study) as store:
        frozen = set(store.get_meta("frozen_groups"))
        assert first["promoted"] and set(first["frozen"]) == set(second["frozen"]) <= frozen
        for row in store.models(): assert not frozen & set(row.metrics["learnt_from"])
        assert second["comparison"]["old_version"] == first["version"]
        assert store.model().version == (second if second["promoted"] else first)["version"]
        store.use_model(second["version"])
        assert step_back(store) == first["version"] == store.model().version
        with pytest.raises(BadInput, match="study's first"): step_back(store)
        file = store.folder/store.model().file
        assert Scorer.load(file).version == first["version"] and not list(store.folder.glob("tmp*"))


def test_a_study_without_scores_says_so(tmp_path):
    Store(tmp_path/"empty").engine.dispose()
    with pytest.raises(BadInput, match="3 samples at least"): train_study(tmp_path/"empty", QUICK, log=QUIET)


@pytest.mark.parametrize("given, said", [(dict(epoch=1), "epochs"), (dict(method="x"), "unknown method"),
    (dict(epochs="many"), "whole number"), (dict(run_dir="x"), "unknown parameter")])
def test_parameters_of_a_training_are_checked_before_it_starts(given, said):
    with pytest.raises(BadInput, match=said): training_values(given)


@pytest.mark.slow
def test_the_page_runs_by_papermill_on_a_study(study):
    given = dict(backbone=TINY["backbone"], weights="none", input_px="64", stages="-2")
    report = retrain_study(study, given, QUIET)
    with Store(study) as store: assert store.model().version == report["version"]
    assert report["promoted"] and report["notebook"].endswith("study_train.ipynb")

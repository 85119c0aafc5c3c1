"""Every known mistake is caught by its check; nothing healthy is objected to; anybody's code can be checked."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import histokit.learn.networks
from histokit.core.checks import Finding, Findings, format_findings
from histokit.core.runs import RunFolder
from histokit.core.settings import settings_from
from histokit.core.text import BadInput
from histokit.core.zoo import caught, false_alarms, run_zoo, zoo_matrix
from histokit.debug_checks import check
from histokit.learn.batches import Batches, batch_rows
from histokit.learn.check_batches import check_encoder_input, check_items, model_scaling
from histokit.learn.check_steps import check_predictor, check_step
from histokit.learn.checks import check_norms
from histokit.learn.losses import Loss
from histokit.learn.networks import create_image_model, param_groups
from histokit.pictures.check_classifier import check_classification
from histokit.pictures.check_pictures import check_pictures
from histokit.pictures.classifier import LabelTask, PictureFinetuning
from histokit.pictures.classify_settings import ClassifySettings
from histokit.pictures.folders import find_pictures
from histokit.pictures.prepared import prepare_pictures
from histokit.pictures.settings import PictureSettings
from histokit.pictures.toy import smoke_pictures
from histokit.pipeline import read_recipe, resolve
from histokit.spots.check_file import check_file
from histokit.spots.check_patches import check_dataset
from histokit.spots.check_run import check_run, check_split_honesty, check_training
from histokit.spots.crossval import Finetuning
from histokit.spots.mistakes import changed_copy, swap_xy
from histokit.spots.patches import HESpotDataset
from histokit.spots.settings import TrainingSettings
from histokit.spots.slides import DataFactory
from histokit.spots.spot_data import SpotData
from histokit.spots.splits import assign_folds
from histokit.spots.targets import TargetTransform
from histokit.zoo import ZOO

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("HISTOKIT_REAL", ROOT.parent/"shared"/"real"))


def objections(findings): return [str(f) for f in findings if f.level != "note"]
def says(findings, text): return any(text in line for line in objections(findings))


# --- the matrix -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def matrix(): return run_zoo(ZOO)


@pytest.mark.parametrize("mistake", ZOO.mistakes, ids=lambda m: m.name)
def test_mistake_is_caught(mistake, matrix):
    assert mistake.says in caught(mistake, matrix[mistake.name])


def test_nothing_healthy_is_objected_to(matrix):
    assert false_alarms(matrix) == []
    healthy = [row for row in zoo_matrix(matrix).index if row.startswith("healthy ")]
    assert len(healthy) == len({m.kind for m in ZOO.mistakes}) >= 12


# What published solutions did -> the mistake that does it.
PUBLISHED = {
    "lower-case c looked for": "lower-case c looked for", "numpy.object_ columns": "targets of numpy.object_",
    "images scaled twice": "slide scaled twice", "images not scaled at all": "slide not scaled at all",
    "float 0-1 read as uint8": "slide in 0-1 cast to bytes",
    "MSE on raw abundances": "squared error on raw abundances",
    "iloc[:, 2:]": "iloc[:, 2:] that takes Test_Set along",
    "layers left out of the optimizer": "layers left out of the optimizer",
    "a rule that can never be true": "a rule that can never be true",
    "early stopping on the reported slide": "early stopping on the slide that is reported",
    "a random-spot split": "spots split at random",
    "overlapping patches": "overlapping patches across a split",
    "padded at the top left": "patch begins at its spot, not centred",
    "HDF5 before the fork": "HDF5 file opened before the workers fork",
    "z-scored predictions": "z-scored predictions handed in", "IDs shift": "rows dropped, so that IDs shift",
    "x and y swapped": "x and y swapped on a nearly square slide", "constant predictions": "constant predictions",
    "rank loss flattened": "rank loss over the whole batch",
    "frozen batch-norm in train mode": "frozen batch-norm left in training mode",
    "smoothing not normalised": "smoothing not divided by the neighbours"}


def test_every_published_mistake_is_there_and_ten_more():
    published = {m.name for m in ZOO.mistakes if m.published}
    assert set(PUBLISHED.values()) <= published
    assert len(ZOO.mistakes) - len(published) >= 30
    assert len({m.name for m in ZOO.mistakes}) == len(ZOO.mistakes)


# --- the patches and pixels that a run's models really get ----------------------------------------------------------

def unscaled(image, mean, std, size): return image / 255


def blue_first(given): return lambda self, index: given(self, index).flip(2)


def beside(given):
    def images(self, index):
        return self.sampler.sample(self._at[index], self.xy[index] + 20)
    return images


def test_a_broken_scaling_is_seen_by_the_stage(finished_run, demo_file, monkeypatch):
    assert not says(check_run(finished_run, demo_file)[0]["patches"], "arrive")
    monkeypatch.setattr(histokit.learn.networks, "scale_pixels", unscaled)
    assert says(check_run(finished_run, demo_file)[0]["patches"], "they look scaled with 0 and 1, not normalised")


@pytest.mark.parametrize("broken, words", [(blue_first, "red and blue exchanged"), (beside, "do not show the slide")])
def test_a_broken_loader_is_seen_by_the_stage(broken, words, finished_run, demo_file, monkeypatch):
    monkeypatch.setattr(HESpotDataset, "images", broken(HESpotDataset.images))
    assert says(check_run(finished_run, demo_file)[0]["patches"], words)


def test_the_dataset_of_the_run_is_the_one_looked_at(finished_run, demo_file, monkeypatch):
    asked = []
    given = SpotData.dataset
    def dataset(self, *args, **how):
        asked.append(self.settings.input_px)
        return given(self, *args, **how)
    monkeypatch.setattr(SpotData, "dataset", dataset)
    _, looked_at = check_run(finished_run, demo_file)
    assert set(asked) == {32} and len(asked) == 2                # as cut, and as augmented; at the run's own size
    assert looked_at.sampler.out_px == 32


# --- every recipe, on the demo and on real slides and X-rays --------------------------------------------------------

RECIPES = {task: sorted(p.stem for p in (ROOT/"params").glob("*.yaml") if read_recipe(p)["task"] == task)
           for task in ("spots", "images")}
SMALL = dict(backbone="test_resnet.r160_in1k", weights="none")


def asked_of(recipe, input_px):
    "The values of a recipe, its pictures no larger than this."
    flat = resolve(read_recipe(ROOT/"params"/f"{recipe}.yaml")).flat()
    return flat | dict(device="auto", input_px=min(flat["input_px"], input_px), progress=False)


def step_of(model, loss, optimizer, inputs, target):
    def step():
        optimizer.zero_grad()
        value = loss(model.train()(**inputs), target)
        value.backward()
        optimizer.step()
        return value.item()
    return step


def trained_findings(model, loss, settings, inputs, target):
    "What the checks say of a recipe's network, its pixels, a few of its steps and its answers after them."
    optimizer = torch.optim.AdamW(param_groups(model, settings.lr_backbone, settings.lr_head, settings.weight_decay))
    step, rows = step_of(model, loss, optimizer, inputs, target), torch.arange(len(target))
    answer = lambda some: model.eval()(**{name: value[some] for name, value in inputs.items()})
    raw = torch.cat([inputs[name] for name in model.pictures]).float() / 255
    found = check_norms(model) + check_step(step, model, optimizer)
    for _ in range(3): step()                                    # it begins with one answer for all: the mean
    found += check_encoder_input(model.backbone, lambda: answer(rows), raw, model_scaling(model))
    return found + check_predictor(answer, rows, model)


def slide_recipe_findings(recipe, factory, folder):
    "What the checks say of all that a recipe for slides makes before its first epoch."
    flat = asked_of(recipe, 64)
    settings = settings_from(TrainingSettings, flat)
    network = {n: flat[n] for n in ("head", "hidden", "dropout", "fusion", "unfreeze", "pool")}
    network |= SMALL | dict(scales=len(settings.sizes_um))
    data = SpotData(factory, factory.spots.assign(fold=assign_folds(factory.spots)), settings)
    values = TargetTransform(settings.target, settings.standardise).fit(data.Y).transform(data.Y)
    method = Finetuning(data, settings, network, RunFolder(folder))
    plain = data.dataset(data.is_train, values)
    found = check_dataset(plain) + check_split_honesty(data.train, data.fold, None, data.widest, buffer=data.buffer)
    found += check_dataset(data.dataset(data.is_train, values, method.augmentation()))
    if settings.frozen: return found
    loss, model = Loss(settings.loss), histokit.learn.networks.start_at(method.new_model(), values.mean(0))
    inputs, target = plain.batch(np.linspace(0, len(plain) - 1, 16).astype(int))
    found += check_training(model, torch.optim.AdamW(param_groups(model)), loss, 32, values)
    return found + trained_findings(model, loss, settings, inputs, target)


@pytest.mark.parametrize("recipe", RECIPES["spots"])
def test_slide_recipes_are_quiet_on_the_demo(recipe, demo_file, tmp_path):
    assert objections(slide_recipe_findings(recipe, DataFactory(demo_file), tmp_path)) == []


def real(name):
    if not (REAL/name).exists(): pytest.skip(f"{REAL/name} is not here")
    return REAL/name


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["her2st_lowres.h5", "her2st_cells.h5"])
def test_real_slides_are_quiet_with_every_recipe(name, tmp_path):
    factory = DataFactory(real(name))
    assert objections(check_file(factory.path)) == []
    for recipe in RECIPES["spots"]:
        assert objections(slide_recipe_findings(recipe, factory, tmp_path)) == [], recipe


def prepared_for(recipe, folder, run):
    "A folder of pictures as a recipe prepares it, small."
    settings = settings_from(PictureSettings, asked_of(recipe, 64))
    return prepare_pictures(RunFolder(run), find_pictures(folder, settings), settings)


def picture_recipe_findings(recipe, data):
    "What the checks say of what a recipe for pictures trains on, and of its first steps."
    flat = asked_of(recipe, 64) | SMALL | dict(stages="")
    settings = settings_from(ClassifySettings, flat)
    task = LabelTask(data.kind, data.classes)
    method, labels = PictureFinetuning(data, task, settings, data.run), data.targets()
    targets, n = task.targets(labels, settings), task.outputs(settings) if task.by_class(settings) else 0
    drawn = data.dataset(data.train, targets, method.augmentation())
    found = check_items(drawn, training=True, n_outputs=n, dark=True)
    found += check_items(data.dataset(data.train, targets), training=False, n_outputs=n, dark=True)
    if settings.method == "probe": return found
    torch.manual_seed(0)
    model = create_image_model(task.outputs(settings), **settings.members()[0].network)
    inputs, target = data.dataset(data.train, targets).batch(np.linspace(0, len(data.train) - 1, 16).astype(int))
    return found + trained_findings(model, task.loss(labels, settings), settings, inputs, target)


@pytest.mark.parametrize("recipe", RECIPES["images"])
def test_picture_recipes_are_quiet_on_the_toy_set(recipe, tmp_path):
    data = prepared_for("image_probe", smoke_pictures(), tmp_path/"run")
    assert objections([f for found in check_pictures(data).values() for f in found]) == []
    assert objections(picture_recipe_findings(recipe, data)) == []


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("folder, recipe", [("chest_xray", "pneumonia"), ("tb", "tb"), ("adult", "image_probe")])
def test_real_xrays_are_quiet(folder, recipe, tmp_path):
    "But for what is true of them: names, sizes and borders tell the label."
    data = prepared_for(recipe, real(f"cxr/{folder}"), tmp_path/"run")
    for part, found in check_pictures(data).items():
        for line in objections(found): assert part == "labels" and "the label can be told from" in line
    for name in RECIPES["images"]: assert objections(picture_recipe_findings(name, data)) == [], name


def test_a_classification_run_is_quiet(tmp_path):
    from histokit.pictures.classification import run_classification, stage_pictures
    run = RunFolder(tmp_path/"run").make()
    settings = ClassifySettings(method="finetune", epochs=1, probe_rung=False, unfreeze="1")
    run_classification(run, stage_pictures(run), settings, lambda line: None)
    parts = check_classification(run)
    assert {"tensors", "networks", "answer"} <= set(parts)
    for part in ("tensors", "networks"): assert objections(parts[part]) == [], part
    weights = run.fold_dir(0)/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert says(check(run), "folds/0")


# --- check(anything) on other people's code -------------------------------------------------------------------------

class Chests(Dataset):
    "Somebody's dataset: (image, label), normalised as torchvision does, from files in memory."
    mean, std = torch.tensor([.5, .5, .5]).view(3, 1, 1), torch.tensor([.5, .5, .5]).view(3, 1, 1)

    def __init__(self, n=24, classes=2, scale=1., first=0):
        g = torch.Generator().manual_seed(first)
        self.pixels = torch.randint(0, 256, (n, 3, 48, 48), generator=g)
        self.labels, self.scale = (torch.arange(n) % classes).tolist(), scale

    def __len__(self): return len(self.pixels)
    def __getitem__(self, i): return (self.pixels[i] * self.scale / 255 - self.mean) / self.std, self.labels[i]


class Named(Chests):
    "Items as transformers' trainers take them."
    def __getitem__(self, i): return dict(zip(("pixel_values", "labels"), super().__getitem__(i)))


def test_somebodys_dataset_and_loader():
    assert check(Chests()).quiet and check(Named()).quiet
    assert says(check(Named(scale=255)), "not scaled to 0-1 before they were normalised")
    loader = DataLoader(Chests(), 8, shuffle=True)
    assert check(loader, training=True, n_outputs=2).quiet
    assert says(check(Chests(scale=255)), "not scaled to 0-1 before they were normalised")
    assert says(check(Chests(scale=1 / 255)), "scaled twice before they were normalised")
    assert says(check(DataLoader(Chests(), 8), training=True), "keeps the order")
    assert says(check(Chests(classes=3), n_outputs=2), "the network has 2 outputs")
    assert says(check(Chests(first=1), train=Chests(first=1)), "are learnt from, too")
    assert check(Chests(first=1), train=Chests(first=2)).quiet
    order = batch_rows(24, 8)
    assert check(Batches(Chests(), order)).quiet


def test_a_dataset_that_raises_is_one_line():
    class Broken(Chests):
        def __getitem__(self, i): return self.nothing[i]
    found = check(Broken())
    assert says(found, "raises AttributeError") and not says(found, "fault of histokit")
    assert "\n" not in objections(found)[0]


@pytest.fixture(scope="module")
def somebody():
    "A timm model, its optimizer and a batch."
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    batch = next(iter(DataLoader(Chests(), 12)))
    return model, torch.optim.AdamW(model.parameters(), 1e-3), batch


def test_somebodys_model(somebody):
    model, optimizer, batch = somebody
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert check(model, optimizer=optimizer, loss=nn.CrossEntropyLoss(), batch=batch).quiet
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert optimizer.state_dict()["state"] == {}
    assert says(check(model, optimizer=torch.optim.AdamW(model.get_classifier().parameters())), "never learn")
    assert says(check(model, batch=(batch[0] * .5 + .5, batch[1])), "not normalised")
    assert says(check(model, batch=(batch[0], batch[1] + 1)), "shifted by one")
    assert says(check(nn.Sequential(model, nn.Softmax(1)), batch=batch, loss=F.cross_entropy), "taken twice")


def test_somebodys_loop_and_prediction(somebody):
    model, optimizer, (images, labels) = somebody
    def step():
        loss = F.cross_entropy(model.train()(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()
    assert says(check(model, optimizer=optimizer, batch=(images, labels), step=step), "never cleared")
    awake = lambda x: model.train()(x)
    assert says(check(model, batch=(images, labels), predict=awake), "other pictures of its batch")


def test_somebodys_submission(tmp_path):
    template = pd.DataFrame(dict(id=[f"p{i}" for i in range(20)], A=0., B=0., C=0.))
    rng = np.random.default_rng(0)
    answer = template.assign(**{c: rng.lognormal(k, 1, 20) for k, c in enumerate("ABC")})
    assert check(answer, sample=template).quiet
    for name, table in (("template", template), ("answer", answer)): table.to_csv(tmp_path/f"{name}.csv", index=False)
    assert check(tmp_path/"answer.csv", sample=tmp_path/"template.csv").quiet
    assert says(check(answer[["id", "B", "A", "C"]], sample=template), "'B', not 'A'")
    assert says(check(answer[:-1], sample=template), "19 rows for 20")
    assert says(check(answer[::-1], sample=template), "the template has p0 there")
    assert says(check(template, sample=template), "same prediction")
    assert says(check(answer.iloc[[0, *range(19)]]), "twice")


def test_paths_runs_and_pictures(finished_run, demo_file, tmp_path):
    assert not any(f.level == "error" for f in check(finished_run))
    assert check(demo_file).quiet and check(DataFactory(demo_file)).quiet
    assert says(check(changed_copy(swap_xy)), "x and y")
    assert check(finished_run/"submission.csv", data=demo_file) is not None
    assert says(check(tmp_path/"nowhere.h5"), "does not exist")
    pictures = smoke_pictures()
    assert check(pictures).quiet
    assert says(check(pictures/"sample_submission.csv", data=pictures), "is it the template?")
    with pytest.raises(BadInput, match="nothing that can be checked; give a path"): check(object())
    with pytest.raises(BadInput, match="did you mean 'optimizer'"): check(demo_file, optimiser=1)


def test_findings_show_themselves(demo_file):
    found = check(demo_file)
    assert isinstance(found, list) and all(isinstance(f, Finding) for f in found)
    assert repr(found).startswith("path demo.h5:\nnote") and "<section class=note>" in found._repr_html_()
    assert repr(Findings()) == format_findings([])

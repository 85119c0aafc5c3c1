"""Which ideas help: every one of them leave-one-slide-out (or patient), with its gain over the probe and an interval.

    python bench/measure_training.py FILE.h5|RUN/slides.h5 [--weights FILE --backbone-args pad_type=same]
        [--mean .5 --std .5] [--cache FOLDER] [--out TABLE.csv]

All ideas see the same spots, folds and frozen encoder. What an idea has to choose (penalty, epochs, rounds, candidate)
it chooses on groups inside its training rows. Intervals draw slides, then blocks in them; gains are paired, spot by
spot. Features are kept in the cache folder, so that a second run takes minutes.
"""
import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pandas as pd
import torch

from histokit.core.files import read_json, write_table
from histokit.frozen.features import cached_features, mean_view
from histokit.frozen.heads import fit_boost, fit_kernel, fit_pls, fit_ridge
from histokit.frozen.network_head import FeatureDataset, HeadModel, fit_head, head_answer
from histokit.frozen.parts import Stages
from histokit.learn.bootstrap import mean_difference
from histokit.learn.losses import Loss
from histokit.learn.networks import start_at
from histokit.learn.scores import mean_spearman, row_ranks, spearman_columns, spearman_rows
from histokit.learn.trainer import Trainer
from histokit.spots.cache import SlideCache
from histokit.spots.context import ContextDataset, fit_context
from histokit.spots.kriging import (KrigingData, KrigingSettings, appearance_features, appearances, centred_places,
    krige_fold, place_features, similarity_features, slide_distance, with_places)
from histokit.spots.lattice import neighbour_table, smooth
from histokit.spots.network import create_model
from histokit.spots.patches import HESpotDataset, PatchSampler, normalised_coords, patch_size
from histokit.spots.slides import DataFactory
from histokit.spots.splits import assign_folds, check_split, slide_blocks
from histokit.spots.targets import TargetTransform


class Study:
    "The spots of a file, their folds, and what a frozen encoder saw of them."
    def __init__(self, a):
        self.factory, self.scales = DataFactory(a.file), len(a.scales)
        self.spots = self.factory.spots.reset_index(drop=True)
        self.values, self.slide = self.spots[self.factory.targets].to_numpy(float), self.spots.slide.to_numpy()
        self.fold, self.train = assign_folds(self.spots, a.split), np.flatnonzero(self.spots.split.eq("Train"))
        self.unit = np.array([f"fold {k}" for k in self.fold], object)
        self.encode(a)

    def encode(self, a):
        "Views of all blocks of all scales, (V, n, D), from the cache where they are there."
        slides = self.factory.slides.items()
        sizes = tuple({n: patch_size(um, s.um_per_px) for n, s in slides} for um in a.scales)
        self.widest = max(max(s.values()) for s in sizes)
        model = create_model(len(self.factory.targets), a.backbone, a.weights, head="linear", unfreeze="0",
            scales=self.scales, backbone_args=a.backbone_args, mean=a.mean, std=a.std)
        self.encoder = Stages(model.eval(), (-4, -3, -2, -1), spread=True, final=True)
        sampler = PatchSampler(SlideCache(self.factory.path), sizes, a.input_px)
        data = HESpotDataset(self.spots, sampler, coords=normalised_coords(self.spots))
        beside = Path(a.file).with_name("stain.json")       # in a run folder: the same key as the run's own features
        stain = read_json(beside) if beside.exists() else None
        self.views = cached_features(self.encoder, data, a.views, a.cache, prepared=stain)
        self.blocks = self.encoder.blocks(mean_view(self.views))

    @property
    def first(self):
        "The blocks of the first scale, the pooled features last."
        return self.blocks[:len(self.blocks) // self.scales]

    def pooled_views(self):
        "The pooled features of the first scale, view by view."
        last = len(self.first) - 1
        return [self.encoder.blocks(np.asarray(v, np.float32))[last] for v in self.views]

    def group(self, rows):
        "What is left out inside these training rows: folds, or slides where there is one fold."
        return self.fold[rows] if len(set(self.fold[rows])) > 1 else self.slide[rows]

    def units(self, rows):
        "The same for all spots, as kriging takes it."
        return self.unit if len(set(self.unit[rows])) > 1 else self.slide


# ---- ideas: each a function of training and held-out rows (of all spots) that predicts the latter

def constant(study):
    return lambda r, c: np.tile(row_ranks(study.values[r]).mean(0), (len(c), 1))


def rows_of(x, rows): return [b[rows] for b in x] if isinstance(x, list) else x[rows]


def head(study, fit, x, kind="rank", **kw):
    "A head on features, on a list of blocks of them, or for the network on a list of views."
    def predict(r, c):
        t = TargetTransform(kind).fit(study.values[r])
        def score(p, q): return mean_spearman(t.inverse(p), t.inverse(q))
        found = fit(rows_of(x, r), t.transform(study.values[r]), study.group(r), score, **kw)
        return t.natural(found.predict(rows_of(x, c)))
    return predict


def with_neighbours(study):
    "A network head with attention over the neighbours."
    views = study.pooled_views()
    table = neighbour_table(study.spots[["x", "y"]].to_numpy(), study.slide)
    def predict(r, c):
        t, z = TargetTransform("rank").fit(study.values[r]), np.zeros(study.values.shape)
        z[r] = t.transform(study.values[r])
        data = ContextDataset(views, table, z)
        fit = fit_context(data.at(r), study.group(r), mean_spearman, "attention", epochs=(5, 10))
        return fit.predict(data.at(c))
    return predict


def published(study, loss, lr, at_mean=False):
    "Head and schedule of a published recipe on the frozen encoder, begun as published, or at the targets' mean."
    views, pooled = study.pooled_views(), study.first[-1]
    def predict(r, c):
        z = TargetTransform("log").fit(study.values[r]).transform(study.values[r])
        torch.manual_seed(0)
        model = HeadModel(pooled[r].mean(0), pooled[r].std(0) + 1e-6, z.shape[1], "mlp")
        if at_mean: start_at(model, z.mean(0))
        trainer = Trainer(model, Loss(loss), None, epochs=5, batch_size=32, lr_head=lr, scheduler="cosine")
        trainer.fit(FeatureDataset(rows_of(views, r), z))
        return head_answer(rows_of(views, c), model)
    return predict


def published_ideas(study):
    mse, soft = ("mse", 3e-4), ("0.85*soft_spearman+0.15*mse", 1e-4)
    return {"published: squared error, rate 3e-4, begun at 0": published(study, *mse),
        "the same, begun at the mean": published(study, *mse, at_mean=True),
        "published: soft Spearman, rate 1e-4, begun at 0": published(study, *soft),
        "the same, begun at the mean too": published(study, *soft, at_mean=True)}


def head_ideas(study):
    pooled, views = study.first[-1], study.pooled_views()
    return {"probe: ridge on ranks": head(study, fit_ridge, pooled),
        "ridge on logs": head(study, fit_ridge, pooled, "log"),
        "ridge on centred log-ratios": head(study, fit_ridge, pooled, "clr"),
        "partial least squares": head(study, fit_pls, pooled),
        "kernel ridge": head(study, fit_kernel, pooled),
        "boosted trees": head(study, fit_boost, pooled),
        "network head, soft Spearman": head(study, fit_head, views, loss="soft_spearman(strength=0.1)"),
        "network head, neighbours by attention": with_neighbours(study),
        "ridge, stages of the encoder": head(study, fit_ridge, study.first),
        f"ridge, stages, {study.scales} scales": head(study, fit_ridge, study.blocks)}


class Kriging:
    "Kriging with one part after another."
    def __init__(self, study):
        self.study, spots = study, study.spots
        several = spots.groupby("patient").slide.nunique().max() > 1
        tissue = spots.patient.to_numpy() if several else np.zeros(len(spots))
        pitch = spots.slide.map({n: s.pitch_px for n, s in study.factory.slides.items()})
        self.place = centred_places(spots[["x", "y"]].to_numpy(), study.slide, pitch)
        self.near = place_features(self.place, tissue)
        self.distance = slide_distance(study.blocks, study.slide)
        self.patient_of = spots.groupby("slide").patient.first().to_dict()

    def idea(self, candidates, length_scale, order=0., known=True):
        "`known`: whether the patient of each slide is."
        study = self.study
        data = KrigingData(candidates, study.slide, self.distance, self.patient_of if known else None)
        settings = KrigingSettings(slide_length_scale=length_scale, order=order)
        def predict(r, c):
            labels = np.full(study.values.shape, np.nan)
            labels[r] = study.values[r]
            return krige_fold(data, labels, r, c, unit=study.units(r), settings=settings).answer
        return predict

    def smoothed(self, candidates):
        predict = self.idea(candidates, .5)
        return lambda r, c: smooth(predict(r, c), self.study.spots.iloc[c], .7)

    def ideas(self):
        study, near, n = self.study, self.near, self.study.scales
        one, every = (appearance_features(b, study.slide, 384) for b in (study.first, study.blocks))
        seen = appearances(study.blocks, n, study.slide, self.place)
        lines = with_places(every, near, (0, .3))
        gauss, best = (with_places(similarity_features(v), near) for v in (seen[:n], seen))
        found = {"kriging: place alone": self.idea([near], 0),
            "kriging: look, one scale": self.idea([one], 0),
            f"kriging: look, {n} scales": self.idea([every], 0),
            "kriging: look and place": self.idea(lines, 0),
            "kriging: + level of slides that look alike": self.idea(lines, .5),
            "kriging: + Gaussian likeness at each scale": self.idea(gauss, .5),
            "kriging: + in each stage, and with neighbours": self.idea(best, .5),
            "kriging: + maps in the order of each type (best)": self.idea(best, .5, 1.)}
        patients = len(set(self.patient_of.values()))
        if patients not in (1, len(self.patient_of)):
            found["the same, patients not told apart"] = self.idea(best, .5, 1., known=False)
        return found | {"kriging, smoothed over 0.7 pitches": self.smoothed(best)}


def all_ideas(study):
    "Name -> prediction."
    heads, kriging = head_ideas(study), Kriging(study).ideas()
    return {"constant: mean rank": constant(study)} | heads | kriging | published_ideas(study)


# ---- the table

def cross_validate(study, predict):
    "(training spots, T): every spot predicted while its fold was held out."
    fold, out = study.fold[study.train], np.empty((len(study.train), study.values.shape[1]))
    for k in np.unique(fold):
        r, c = study.train[fold != k], study.train[fold == k]
        check_split(study.spots.iloc[r], study.spots.iloc[c], study.widest)
        out[fold == k] = predict(r, c)
    return out


def gain(study, base, each):
    "Difference to the probe and its interval; nan for what comes before it, and for itself."
    if base is None: return dict(difference=np.nan, low=np.nan, high=np.nan)
    spots = study.spots.iloc[study.train].reset_index(drop=True)
    found = mean_difference(base, each, spots.slide.to_numpy(), slide_blocks(spots))
    return {k: float(found[k]) for k in ("difference", "low", "high")}


def show(row):
    scores = f"{row['idea']:44} {row['per_spot']:.4f} {row['per_type']:7.4f}"
    interval = f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
    print(f"{scores}  gain {interval}  {row['seconds']} s", flush=True)


def measure(a):
    "The table of ideas."
    study, rows, base = Study(a), [], None
    true = study.values[study.train]
    for name, predict in all_ideas(study).items():
        if a.only and not any(part in name for part in ["constant", "probe", *a.only]): continue
        start = time.time()
        out = cross_validate(study, predict)
        each = spearman_rows(out, true)
        per_type = np.nan if name.startswith("constant") else spearman_columns(out, true).mean()
        row = dict(idea=name, per_spot=each.mean(), per_type=per_type) | gain(study, base, each)
        if name.startswith("probe"): base = each
        rows.append(row | dict(seconds=round(time.time() - start, 1)))
        show(rows[-1])
    return pd.DataFrame(rows)


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("file")
    p.add_argument("--backbone", default="mobilenetv2_100")
    for name in ("weights", "backbone-args", "mean", "std", "cache"): p.add_argument(f"--{name}", default="")
    p.add_argument("--scales", type=float, nargs="+", default=[224, 112, 448, 900], help="sides of the patches in µm")
    p.add_argument("--input-px", type=int, default=224)
    p.add_argument("--views", default="flips")
    p.add_argument("--split", default="auto")
    p.add_argument("--only", nargs="*", help="parts of the names of the ideas to try")
    p.add_argument("--out", type=Path)
    return p.parse_args()


if __name__ == "__main__":
    a = arguments()
    result = measure(a)
    if a.out: write_table(a.out, result.round(4))

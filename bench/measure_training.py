"""Which ideas help: every one of them leave-one-slide-out (or patient), with its gain over the probe and an interval.

python tests/measure_training.py FILE.h5|RUN/slides.h5 [--weights FILE --backbone-args pad_type=same --mean .5 --std .5] [--cache FOLDER] [--out TABLE.csv]

All ideas see the same spots, folds and frozen encoder. What an idea has to choose (penalty, epochs, rounds, candidate) it chooses on groups inside its training rows.
Intervals draw slides, then blocks in them; gains are paired, spot by spot. Features are kept in the cache folder, so that a second run takes minutes.
"""
import argparse, os, time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pandas as pd
import torch

from histokit.spots.context import ContextDataset, fit_context
from histokit.spots.lattice import neighbour_table
from histokit.core.files import read_json, write_table
from histokit.spots.slides import DataFactory
from histokit.spots.cache import SlideCache
from histokit.spots.targets import TargetTransform
from histokit.spots.splits import assign_folds, check_split, slide_blocks
from histokit.spots.patches import normalised_coords, patch_size
from histokit.frozen.network_head import FeatureDataset, HeadModel, fit_head, head_answer
from histokit.frozen.parts import Stages
from histokit.frozen.features import cached_features, mean_view
from histokit.frozen.heads import fit_boost, fit_kernel, fit_pls, fit_ridge
from histokit.spots.kriging import (KrigingData, KrigingSettings, appearance_features, appearances, centred_places, krige_fold,
    place_features, similarity_features, slide_distance, with_places)
from histokit.learn.bootstrap import mean_difference
from histokit.learn.scores import mean_spearman, row_ranks, spearman_columns, spearman_rows
from histokit.learn.losses import Loss
from histokit.spots.network import create_model
from histokit.learn.networks import start_at
from histokit.spots.patches import PatchDataset, PatchSampler
from histokit.learn.trainer import Trainer
from histokit.spots.lattice import smooth


def features(a, factory, spots):
    "Views of all blocks of all scales, (V, n, D), and the encoder that can tell them apart."
    model = create_model(len(factory.targets), a.backbone, a.weights, head="linear", unfreeze="0", scales=len(a.scales), backbone_args=a.backbone_args, mean=a.mean, std=a.std)
    encoder = Stages(model.eval(), (-4, -3, -2, -1), spread=True, final=True)
    sizes = tuple({n: patch_size(um, s.um_per_px) for n, s in factory.slides.items()} for um in a.scales)
    data = PatchDataset(spots, PatchSampler(SlideCache(factory.path), sizes, a.input_px), coords=normalised_coords(spots))
    beside = Path(a.file).with_name("stain.json")                      # in a run folder: the same key as the run's own features
    return cached_features(encoder, data, a.views, a.cache, prepared=read_json(beside) if beside.exists() else None), encoder, max(max(s.values()) for s in sizes)


def ideas(a, factory, spots, fold, views, encoder):
    "Name -> function of training and held-out rows (of all spots) that predicts the latter."
    values, slide = spots[factory.targets].to_numpy(float), spots.slide.to_numpy()
    blocks = encoder.blocks(mean_view(views)); per = len(blocks) // len(a.scales)
    first, pooled = blocks[:per], blocks[per - 1]
    of_view = lambda v: encoder.blocks(np.asarray(v, np.float32))[per - 1]
    group = lambda r: fold[r] if len(set(fold[r])) > 1 else slide[r]
    unit = np.array([f"fold {k}" for k in fold], object)
    units = lambda r: unit if len(set(unit[r])) > 1 else slide
    pitch = spots.slide.map({n: s.pitch_px for n, s in factory.slides.items()})
    tissue = spots.patient.to_numpy() if spots.groupby("patient").slide.nunique().max() > 1 else np.zeros(len(spots))
    place = centred_places(spots[["x", "y"]].to_numpy(), slide, pitch); near = place_features(place, tissue); patient_of = spots.groupby("slide").patient.first().to_dict()
    apart, one, all_scales = slide_distance(blocks, slide), appearance_features(first, slide, 384), appearance_features(blocks, slide, 384)
    seen = appearances(blocks, len(a.scales), slide, place); gauss, likeness, lines = similarity_features(seen[:len(a.scales)]), similarity_features(seen), with_places(all_scales, near, (0, .3))
    both = with_places(likeness, near)
    table = neighbour_table(spots[["x", "y"]].to_numpy(), slide)

    def head(fit, x, kind="rank", **kw):
        def go(r, c):
            t = TargetTransform(kind).fit(values[r]); z = t.transform(values[r])
            metric = lambda p, q: mean_spearman(t.inverse(p), t.inverse(q))
            return t.natural(fit([v[r] for v in x] if isinstance(x, list) and fit is fit_head else [b[r] for b in x] if isinstance(x, list) else x[r], z, group(r), metric, **kw)
                .predict([b[c] for b in x] if isinstance(x, list) else x[c]))
        return go

    def around(r, c):
        t = TargetTransform("rank").fit(values[r]); z = np.zeros(values.shape); z[r] = t.transform(values[r])
        data = lambda rows: ContextDataset([of_view(v) for v in views], table, z, None, rows)
        return fit_context(data(r), group(r), mean_spearman, "attention", (5, 10)).predict(data(c))

    def kriging(x, length_scale, order=0., known=True):
        "`known`: the patient of each slide is known."
        data = KrigingData(x if isinstance(x, list) else [x], slide, apart, patient_of if known else None)
        settings = KrigingSettings(slide_length_scale=length_scale, order=order)
        def go(r, c):
            labels = np.where(np.isin(np.arange(len(values)), r)[:, None], values, np.nan)
            return krige_fold(data, labels, r, c, unit=units(r), settings=settings).answer
        return go

    def published(loss, lr, at_mean=False):
        "The head and the schedule of a published recipe on the frozen encoder, begun as it was published, or at the mean of the targets."
        def go(r, c):
            t = TargetTransform("log").fit(values[r]); z = t.transform(values[r]); x = [of_view(v) for v in views]
            torch.manual_seed(0); model = HeadModel(pooled[r].mean(0), pooled[r].std(0) + 1e-6, values.shape[1], "mlp")
            if at_mean: start_at(model, z.mean(0))
            Trainer(model, Loss(loss), None, epochs=5, batch_size=32, lr_head=lr, scheduler="cosine").fit(FeatureDataset([v[r] for v in x], z))
            return head_answer([v[c] for v in x], model)
        return go

    def smoothed(r, c): return smooth(kriging(both, .5)(r, c), spots.iloc[c], .7)

    return {"constant: mean rank": lambda r, c: np.tile(row_ranks(values[r]).mean(0), (len(c), 1)),
        "probe: ridge on ranks": head(fit_ridge, pooled), "ridge on logs": head(fit_ridge, pooled, "log"), "ridge on centred log-ratios": head(fit_ridge, pooled, "clr"),
        "partial least squares": head(fit_pls, pooled), "kernel ridge": head(fit_kernel, pooled), "boosted trees": head(fit_boost, pooled),
        "network head, soft Spearman": head(fit_head, [of_view(v) for v in views], loss="soft_spearman(strength=0.1)"), "network head, neighbours by attention": around,
        "ridge, stages of the encoder": head(fit_ridge, first), f"ridge, stages, {len(a.scales)} scales": head(fit_ridge, blocks),
        "kriging: place alone": kriging(near, 0), "kriging: look, one scale": kriging(one, 0), f"kriging: look, {len(a.scales)} scales": kriging(all_scales, 0),
        "kriging: look and place": kriging(lines, 0), "kriging: + level of slides that look alike": kriging(lines, .5),
        "kriging: + Gaussian likeness at each scale": kriging(with_places(gauss, near), .5), "kriging: + in each stage, and with neighbours": kriging(both, .5),
        "kriging: + maps in the order of each type (best)": kriging(both, .5, 1.),
        **({"the same, patients not told apart": kriging(both, .5, 1., False)} if len(set(patient_of.values())) not in (1, len(patient_of)) else {}),
        "kriging, smoothed over 0.7 pitches": smoothed,
        "published: squared error, rate 3e-4, begun at 0": published("mse", 3e-4), "the same, begun at the mean": published("mse", 3e-4, True),
        "published: soft Spearman, rate 1e-4, begun at 0": published("0.85*soft_spearman+0.15*mse", 1e-4), "the same, begun at the mean too": published("0.85*soft_spearman+0.15*mse", 1e-4, True)}


def measure(a):
    "The table of ideas."
    factory = DataFactory(a.file); spots = factory.spots.reset_index(drop=True)
    fold = assign_folds(spots, a.split); train = np.flatnonzero(spots.split.eq("Train"))
    views, encoder, widest = features(a, factory, spots)
    true, slide, block = spots[factory.targets].to_numpy(float)[train], spots.slide.to_numpy()[train], slide_blocks(spots.iloc[train].reset_index(drop=True))
    rows, each, base = [], {}, None
    for name, predict in ideas(a, factory, spots, fold, views, encoder).items():
        if a.only and not any(o in name for o in ["constant", "probe", *a.only]): continue
        start, out = time.time(), np.empty(true.shape)
        for k in np.unique(fold[train]):
            r, c = train[fold[train] != k], train[fold[train] == k]
            check_split(spots.iloc[r], spots.iloc[c], widest); out[fold[train] == k] = predict(r, c)
        each[name] = spearman_rows(out, true); base = each[name] if name.startswith("probe") else base
        row = dict(idea=name, per_spot=each[name].mean(), per_type=np.nan if name.startswith("constant") else spearman_columns(out, true).mean())
        gain = mean_difference(base, each[name], slide, block) if base is not None and not name.startswith("probe") else dict(difference=np.nan, low=np.nan, high=np.nan)
        rows.append(row | {k: float(gain[k]) for k in ("difference", "low", "high")} | dict(seconds=round(time.time() - start, 1)))
        print(f"{name:44} {row['per_spot']:.4f} {row['per_type']:7.4f}  gain {rows[-1]['difference']:+.4f} [{rows[-1]['low']:+.4f}, {rows[-1]['high']:+.4f}]  {rows[-1]['seconds']} s", flush=True)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("file"); p.add_argument("--backbone", default="mobilenetv2_100"); p.add_argument("--weights", default=""); p.add_argument("--backbone-args", default="")
    p.add_argument("--mean", default=""); p.add_argument("--std", default=""); p.add_argument("--scales", type=float, nargs="+", default=[224, 112, 448, 900])
    p.add_argument("--input-px", type=int, default=224); p.add_argument("--views", default="flips"); p.add_argument("--split", default="auto")
    p.add_argument("--cache", default=""); p.add_argument("--only", nargs="*", help="parts of the names of the ideas to try"); p.add_argument("--out", type=Path)
    a = p.parse_args()
    result = measure(a)
    if a.out: write_table(a.out, result.round(4))

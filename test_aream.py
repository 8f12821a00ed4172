"""Sanity checks on small synthetic inputs, CPU only:  make test  (or: python -m pytest -q test_aream.py)

With AREAM_DATA=<folder that holds VOCdevkit and COCO2014> a few tests also read real files; without it they skip.
python test_aream.py prints the README's speed table: this code against the naive rendering that the tests compare with.
"""
import json
import math
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import aream
import data
import evaluate
import model as vit
import refine
import train_cls
import train_seg

THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # tiny tensors are many times slower with more
REAL = os.environ.get("AREAM_DATA")
slow = pytest.mark.skipif(not os.environ.get("AREAM_SLOW"), reason="slow: make test SLOW=1")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand_affinity(B, N, L=3):
    return tuple(torch.randn(B, N, N).softmax(-1) for _ in range(L))


# ---------------------------------------------------------------------------------------------------------------------
# model.py
# ---------------------------------------------------------------------------------------------------------------------
def copy_to_torchvision(ours, theirs):
    """Block weights of our ViT into torchvision's VisionTransformer."""
    state = {}
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "self_attention.out_proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
    for i in range(len(ours.blocks)):
        block, to = ours.blocks[i], f"encoder.layers.encoder_layer_{i}."
        for here, there in names.items():
            for kind in ("weight", "bias"):
                state[f"{to}{there}.{kind}"] = block.get_submodule(here).get_parameter(kind)
        state[to + "self_attention.in_proj_weight"] = block.attn.qkv.weight
        state[to + "self_attention.in_proj_bias"] = block.attn.qkv.bias
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and not any("encoder_layer" in key for key in missing)


@pytest.mark.parametrize("capture", [False, True])
def test_block_stack_equals_torchvision(capture):
    ours = vit.build("toy", 4).double().eval()
    theirs = torchvision.models.VisionTransformer(image_size=64, patch_size=8, num_layers=6, num_heads=3, hidden_dim=96,
                                                  mlp_dim=384, num_classes=2).double().eval()
    copy_to_torchvision(ours, theirs)
    images = torch.randn(2, 3, 64, 64).double()
    got, grid, _, _ = ours.tokens(images, capture)
    patches = ours.patch_embed(images).flatten(2).transpose(1, 2) + ours.patch_pos_embed
    x = torch.cat([(ours.class_tokens + ours.class_pos_embed).expand(2, -1, -1), patches], 1)
    for layer in theirs.encoder.layers:
        x = layer(x)
    assert grid == (8, 8)
    torch.testing.assert_close(got, x, atol=1e-10, rtol=1e-9)


def test_captured_maps_equal_a_plain_loop():
    model = vit.build("toy", 4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        block, x = model.blocks[0], torch.randn(2, 9, 96)
        _, affinity, logits = block.attn(x, True)
        q, k, _ = block.attn.qkv(x).chunk(3, -1)
        per_head = torch.stack([qh @ kh.transpose(1, 2) / math.sqrt(32) for qh, kh in zip(q.split(32, -1), k.split(32, -1))])
    torch.testing.assert_close(logits, per_head.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(affinity, per_head.softmax(-1).mean(0))
    assert (affinity - logits.softmax(-1)).abs().max() > 1e-3  # the two do not commute


def test_forward_shapes_and_capture_modes():
    model = vit.build("toy", 5, depth=3).eval()
    for H, W in ((64, 64), (32, 88)):
        images, N = torch.randn(2, 3, H, W), 5 + H * W // 64
        plain, full = model(images), model(images, True)
        assert plain.class_logits.shape == plain.patch_logits.shape == (2, 5)
        assert plain.cam.shape == (2, 5, H // 8, W // 8) and plain.cam.min() >= 0 and not plain.cam.requires_grad
        assert plain.affinity == plain.affinity_logits == ()
        assert [a.shape for a in full.affinity] == [a.shape for a in full.affinity_logits] == [(2, N, N)] * 3
        torch.testing.assert_close(full.affinity[0].sum(-1), torch.ones(2, N))
        assert not full.affinity[0].requires_grad and full.affinity_logits[0].requires_grad
        assert model(images, "logits").affinity == () and model(images, "affinity").affinity_logits == ()
        with torch.no_grad():
            torch.testing.assert_close(model(images, "affinity").class_logits, plain.class_logits, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(full.patch_logits, plain.patch_logits, atol=1e-5, rtol=1e-4)


def test_gradient_reaches_every_parameter():
    model = vit.build("toy", 3)
    out = model(torch.randn(2, 3, 64, 64), "logits")
    loss = aream.classification_loss(out.class_logits, out.patch_logits, torch.tensor([[1.0, 0, 1], [0, 1, 0]]))
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_affinity_loss_trains_queries_and_keys_but_not_the_labels():
    model = vit.build("toy", 3)
    out = model(torch.randn(2, 3, 64, 64), "logits")
    label = torch.randint(0, 2, (2, 64, 64))
    last = [0] * 5 + [1]
    aream.aream_loss(out.affinity_logits, label, torch.tensor(last).float(), range(6)).backward()
    w_q, w_k, w_v = model.blocks[5].attn.qkv.weight.grad.chunk(3)
    assert w_q.any() and w_k.any() and not w_v.any()
    assert model.head.weight.grad is None
    assert model.blocks[0].attn.qkv.weight.grad.any()  # through the tokens


def test_mimetic_start():
    for block in vit.build("toy", 2).blocks:
        w_q, w_k, _ = block.attn.qkv.weight.chunk(3)
        assert torch.equal(w_q, w_k)


def deit_state(depth=12, dim=192, classes=1000):
    """A random checkpoint with DeiT-Tiny's keys."""
    state = {"cls_token": torch.randn(1, 1, dim), "pos_embed": torch.randn(1, 197, dim),
             "patch_embed.proj.weight": torch.randn(dim, 3, 16, 16), "patch_embed.proj.bias": torch.randn(dim),
             "norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim),
             "head.weight": torch.randn(classes, dim), "head.bias": torch.zeros(classes)}
    for i in range(depth):
        for name, shape in {"norm1.weight": (dim,), "norm1.bias": (dim,), "attn.qkv.weight": (3 * dim, dim),
                            "attn.qkv.bias": (3 * dim,), "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
                            "norm2.weight": (dim,), "norm2.bias": (dim,), "mlp.fc1.weight": (4 * dim, dim),
                            "mlp.fc1.bias": (4 * dim,), "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,)}.items():
            state[f"blocks.{i}.{name}"] = torch.randn(shape)
    return state


def test_deit_checkpoints(tmp_path):
    state = deit_state()
    for form in (state, {"model": {k: v.half() for k, v in state.items()}}):
        torch.save(form, tmp_path / "deit.pth")
        model = vit.build("deit_tiny", 20, depth=8)
        vit.load_pretrained(model, tmp_path / "deit.pth")
        assert torch.equal(model.class_tokens[0, 7], model.class_tokens[0, 0]) and len(model.blocks) == 8
        torch.testing.assert_close(model.class_tokens[0, 3], state["cls_token"][0, 0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(model.patch_pos_embed, state["pos_embed"][:, 1:], atol=2e-3, rtol=2e-3)
        assert model.blocks[0].norm1.weight.dtype == torch.float32
    bigger = vit.build("deit_tiny", 20, image_size=256)
    vit.load_pretrained(bigger, state)
    assert bigger.patch_pos_embed.shape == (1, 256, 192)


def test_wrong_weights_are_refused(tmp_path):
    model = vit.build("deit_tiny", 20)
    small = deit_state()
    del small["blocks.3.norm1.weight"]
    distilled = {**deit_state(), "dist_token": torch.zeros(1, 1, 192)}
    for state in (deit_state(dim=384), small, distilled, {"fc.weight": torch.zeros(3)}):
        with pytest.raises(ValueError, match="does not hold weights for deit_tiny"):
            vit.load_pretrained(model, state)
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing.pth.*--pretrained"):
        vit.load_pretrained(model, tmp_path / "nothing.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="broken.pth is not a readable weights file"):
        vit.load_pretrained(model, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="no public weights for preset 'toy'"):
        vit.load_pretrained(vit.build("toy", 2), "auto")


def test_download_failure_names_the_remedy(monkeypatch):
    def offline(url, **kwargs):
        assert url == vit.DEIT_URLS["deit_tiny"] and kwargs["weights_only"] and kwargs["check_hash"]
        raise vit.URLError("no route")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match="could not download .*no route.*--pretrained PATH"):
        vit.load_pretrained(vit.build("deit_tiny", 20), "auto")


def test_bad_model_arguments():
    model = vit.build("toy", 2)
    with pytest.raises(ValueError, match="image size 60 x 64 is not a multiple of the patch size 8"):
        model(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match="unknown preset 'vgg'"):
        vit.build("vgg", 2)
    with pytest.raises(ValueError, match="depth 13: deit_tiny has 1 to 12 blocks"):
        vit.build("deit_tiny", 2, depth=13)
    with pytest.raises(ValueError, match="image size 70"):
        vit.build("toy", 2, image_size=70)


# ---------------------------------------------------------------------------------------------------------------------
# aream.py
# ---------------------------------------------------------------------------------------------------------------------
def test_layer_entropy_against_a_loop():
    cam, labels = torch.rand(2, 3, 2, 4), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    affinity = rand_affinity(2, 11)
    got = aream.layer_entropy(cam, affinity, labels)
    for b in range(2):
        for l in range(3):
            total = torch.zeros(8)
            for c in range(3):
                if labels[b, c]:
                    for m in range(8):
                        for n in range(8):
                            total[m] += affinity[l][b, 3 + m, 3 + n] * cam[b, c].flatten()[n]
            p = total.softmax(0)
            assert got[b, l].item() == pytest.approx(-sum(v * math.log2(v) for v in p.tolist()), abs=1e-5)


def test_layer_entropy_at_its_ends():
    labels = torch.ones(1, 1)
    uniform = torch.full((1, 4, 4), 0.25)
    peaked = torch.zeros(1, 1, 2, 2)
    peaked[0, 0, 0, 0] = 1e4
    entropy = aream.layer_entropy(peaked, (uniform, torch.eye(4)[None]), labels)
    assert entropy[0, 0].item() == pytest.approx(2.0, abs=1e-6)  # spread evenly over 4 patches: 2 bits
    assert entropy[0, 1].item() == 0.0  # one patch keeps it all: p = 0 elsewhere, no nan
    assert aream.layer_entropy(torch.zeros(1, 1, 2, 2), (uniform,), labels).item() == pytest.approx(2.0)


def test_row_distance_and_top_share():
    P = 40
    uniform, identity = torch.full((1, P, P), 1 / P), torch.eye(P)[None]
    column = torch.zeros(1, P, P)
    column[:, :, 3] = 1  # every patch draws from one: collapsed
    affinity = torch.cat([uniform, identity, column])
    torch.testing.assert_close(aream.row_distance(affinity), torch.tensor([0.0, 1.0, 0.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(aream.top_share(affinity), torch.tensor([0.05, 0.05, 1.0]))
    rows = torch.rand(1, 5, 5)
    p = (rows / rows.sum(-1, keepdim=True))[0]
    pairs = [math.sqrt(1 - sum(math.sqrt(p[m, n] * p[k, n]) for n in range(5))) for m in range(5) for k in range(5) if m != k]
    assert aream.row_distance(rows).item() == pytest.approx(sum(pairs) / 20, rel=1e-4)
    assert aream.row_distance(torch.ones(1, 1, 1)).item() == 0 == aream.row_distance(torch.zeros(1, 1, 1)).item()


def test_reactivation_weights():
    w, w_hat = aream.reactivation_weights(torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 3.0]]))
    torch.testing.assert_close(w_hat, torch.tensor([[0, 0.25, 1.0], [0, 0, 0]]))
    torch.testing.assert_close(w, 1 - w_hat)
    w, w_hat = aream.reactivation_weights(torch.tensor([1.0, 2.0]), "uniform")
    assert w.tolist() == w_hat.tolist() == [1, 1]
    w, w_hat = aream.reactivation_weights(torch.tensor([1.0, 2.0]), "none")
    assert w.tolist() == [1, 1] and w_hat.tolist() == [0, 0]
    with pytest.raises(ValueError, match="reactivation 'some'"):
        aream.reactivation_weights(torch.tensor([1.0]), "some")


def test_coupled_layers():
    assert aream.coupled_layers(12) == (range(12), range(12))
    assert aream.coupled_layers(12, "split", 7) == (range(7), range(7, 12))
    with pytest.raises(ValueError, match="--deep-from 6 with 6 layers"):
        aream.coupled_layers(6, "split", 6)


def test_guided_cam_against_a_loop():
    cam, affinity, w = torch.rand(2, 3, 2, 2), rand_affinity(2, 7), torch.rand(2, 3)
    got = aream.guided_cam(cam, affinity, w, [0, 2])
    for b in range(2):
        for c in range(3):
            drawn = torch.stack([a[b, c, 3:] for a in affinity]).mean(0)
            attended = cam[b, c].flatten() * drawn
            for m in range(4):
                expected = sum(w[b, l] * affinity[l][b, 3 + m, 3 + n] * attended[n] for l in (0, 2) for n in range(4)) / 2
                assert got[b, c].flatten()[m].item() == pytest.approx(expected.item(), rel=1e-5)


def test_normalise_cam():
    cam = torch.tensor([[[[-1.0, 1.0], [2.0, 4.0]], [[3.0, 3.0], [3.0, 3.0]], [[0.0, 1.0], [1.0, 1.0]]]])
    got = aream.normalise_cam(cam, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(got[0, 0], torch.tensor([[0, 0.25], [0.5, 1.0]]))
    assert not got[0, 1:].any()  # constant, and absent


def test_affinity_label_by_hand():
    mask = torch.tensor([[[0, 0, 5, 5], [0, 0, 5, 5], [255, 255, 0, 0], [9, 255, 0, 5]]])
    # patch centres of the 2 x 2 grid are the pixels (1, 1), (1, 3), (3, 1), (3, 3): 0, 5, 255, 5
    expected = torch.tensor([[1, 0, 255, 0], [0, 1, 255, 1], [255] * 4, [0, 1, 255, 1]])
    assert torch.equal(aream.affinity_label(mask, (2, 2))[0], expected)


def test_affinity_loss_against_a_loop():
    prob, label, weight = torch.rand(2, 4, 4), torch.tensor([0, 1, 255])[torch.randint(0, 3, (2, 4, 4))], torch.rand(2)
    n1, n0 = (label == 1).sum().item(), (label == 0).sum().item()
    plain = weighted = 0.0
    for b in range(2):
        for p, y in zip(prob[b].flatten().tolist(), label[b].flatten().tolist()):
            term = 0.5 * (1 - p) / (n1 + 1) if y == 1 else 0.5 * p / (n0 + 1) if y == 0 else 0.0
            plain, weighted = plain + term, weighted + term * weight[b].item()
    assert aream.affinity_loss(prob, label).item() == pytest.approx(plain, rel=1e-5)
    one_layer = aream.aream_loss((prob.logit(),), label, weight[:, None], [0])  # the weight of each image
    assert one_layer.item() == pytest.approx(weighted, rel=1e-5)
    assert aream.affinity_loss(prob, torch.full_like(label, 255)).item() == 0.0
    logits = tuple(torch.randn(2, 6, 6) for _ in range(3))
    w_hat = torch.tensor([0.2, 0.5, 1.0])
    expected = sum(w_hat[l] * aream.affinity_loss(logits[l][:, 2:, 2:].sigmoid(), label) for l in (1, 2)) / 2
    torch.testing.assert_close(aream.aream_loss(logits, label, w_hat, [1, 2]), expected)


# ---------------------------------------------------------------------------------------------------------------------
# refine.py
# ---------------------------------------------------------------------------------------------------------------------
def naive_par(image, score, dilations, iterations):
    """PAR of one image as the formula reads: loops over pixels and neighbours."""
    _, H, W = image.shape
    offsets = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    at = lambda y, x: (min(max(y, 0), H - 1), min(max(x, 0), W - 1))
    length = torch.tensor([math.hypot(*o) for o in offsets])
    place = (-((length / length.std()) / 0.3) ** 2).softmax(0)
    kernel = {}
    for y in range(H):
        for x in range(W):
            near = torch.stack([image[(slice(None), *at(y + dy, x + dx))] for dy, dx in offsets])  # (n, 3)
            step = ((near - image[:, y, x]).abs() / (near.std(0) + 1e-8) / 0.3) ** 2
            kernel[y, x] = (-step.mean(1)).softmax(0) + 0.01 * place
    for _ in range(iterations):
        new = torch.zeros_like(score)
        for (y, x), weights in kernel.items():
            for k, (dy, dx) in zip(weights, offsets):
                new[:, y, x] += k * score[(slice(None), *at(y + dy, x + dx))]
        score = new
    return score


def test_par_against_loops():
    images, score = torch.rand(2, 3, 6, 7), torch.rand(2, 2, 6, 7)
    got = refine.pixel_adaptive_refine(images, score, (1, 3), 2)
    for b in range(2):
        torch.testing.assert_close(got[b], naive_par(images[b], score[b], (1, 3), 2), atol=1e-5, rtol=1e-4)


def test_par_invariants():
    images = torch.rand(2, 3, 20, 30)
    torch.testing.assert_close(refine.par_kernel(images).sum(1), torch.full((2, 20, 30), 1.01))
    constant = refine.pixel_adaptive_refine(images, torch.ones(2, 1, 20, 30), iterations=10)
    torch.testing.assert_close(constant, torch.full_like(constant, 1.01**10), rtol=1e-4, atol=0)
    large = torch.rand(3, 3, 150, 120)  # more than one chunk gives what single images give
    one = [refine.pixel_adaptive_refine(i[None], i[None, :1], iterations=2) for i in large]
    torch.testing.assert_close(refine.pixel_adaptive_refine(large, large[:, :1], iterations=2), torch.cat(one))
    with pytest.raises(ValueError, match="resize one"):
        refine.pixel_adaptive_refine(images, torch.rand(2, 1, 10, 15))


def test_par_follows_edges():
    image = torch.zeros(1, 3, 24, 24)
    image[..., 12:] = 1.0
    image += 0.01 * torch.randn_like(image)
    score = torch.zeros(1, 1, 24, 24)
    score[..., 8:12] = 1.0  # a seed on the left of the edge
    got = refine.pixel_adaptive_refine(image, score, (1, 2, 4))
    assert got[0, 0, :, :12].mean() > 20 * got[0, 0, :, 12:].mean()  # what leaks over the edge


def test_random_walk():
    score, affinity = torch.rand(1, 2, 2, 2), torch.rand(1, 4, 4)
    transition = affinity[0] ** 2 / (affinity[0] ** 2).sum(1, keepdim=True)
    expected = (transition @ transition @ transition @ score[0].flatten(1).T).T.view(2, 2, 2)
    torch.testing.assert_close(refine.random_walk(score, affinity, beta=2.0, steps=3)[0], expected)
    torch.testing.assert_close(refine.random_walk(score, torch.eye(4)[None], steps=5), score)
    stochastic = rand_affinity(1, 4, 1)[0]
    torch.testing.assert_close(refine.random_walk(score, stochastic), aream.propagate(stochastic, score))
    with pytest.raises(ValueError, match="steps -1"):
        refine.random_walk(score, affinity, steps=-1)


def pseudo_label(images, cam, labels, *more):
    """refine.pseudo_label with the CAMs of all classes, present or not."""
    class_ids, present = refine.present_classes(labels)
    return refine.pseudo_label(images, cam[torch.arange(len(cam))[:, None], class_ids], class_ids, present, *more)


def test_pseudo_label():
    images = torch.full((2, 3, 64, 64), 0.5) + 0.01 * torch.randn(2, 3, 64, 64)
    cam, labels = torch.zeros(2, 4, 64, 64), torch.tensor([[0, 0, 1.0, 0], [1.0, 0, 0, 1]])
    images[:, :, :, 32:] += 0.3
    cam[0, 2, :, 32:] = 1.0
    cam[0, 1] = 1.0  # an absent class, whatever its score, is never chosen
    cam[1, 0, :, :32] = 1.0
    cam[1, 3, :, 32:] = 1.0
    got = pseudo_label(images, cam, labels)
    assert set(got[0, :, :24].unique().tolist()) == {0} and set(got[0, :, 40:].unique().tolist()) == {3}
    assert set(got[1, :, :24].unique().tolist()) == {1} and set(got[1, :, 40:].unique().tolist()) == {4}
    band = pseudo_label(images, cam * 0.45, labels)
    assert set(band[0, :, 40:].unique().tolist()) == {255}  # above the low score, below the high one
    assert 255 not in pseudo_label(images, cam * 0.45, labels, 0.4, 0.4)
    raw = pseudo_label(images, F.pad(cam[..., 1:-1, 1:-1], [1] * 4), labels, 0.5, 0.5, 0)  # no PAR: what the CAM says, at half size
    assert torch.equal(raw[0, 4:-4, 36:-4], torch.full((56, 24), 3)) and torch.equal(raw[0, :, :28], torch.zeros(64, 28).long())
    with pytest.raises(ValueError, match="PAR with -1 iterations"):
        pseudo_label(images, cam, labels, 0.35, 0.55, -1)
    with pytest.raises(ValueError, match="low <= high"):
        pseudo_label(images, cam, labels, 0.6, 0.5)
    single = pseudo_label(images[:1], cam[:1], labels[:1])
    assert torch.equal(single, got[:1])  # the other image's number of classes does not matter
    pixels = (images[1] * 255).to(torch.uint8)
    alone = refine.pseudo_mask(pixels, [0, 3], cam[1, [0, 3]], 0.35, 0.55)
    assert (alone == got[1]).float().mean() > 0.99  # 8-bit rounding only


def test_seed_cams():
    model = vit.build("toy", 3).eval()
    pixels = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)  # no multiple of the patch
    got = refine.seed_cams(model, pixels, [0, 2], {"raw": (), "all": tuple(range(6))}, scales=(0.5, 1))
    assert {k: v.shape for k, v in got.items()} == {"raw": (2, 13, 18), "all": (2, 13, 18)}
    assert all(0 <= v.min() and v.max() <= 1 for v in got.values()) and not torch.equal(got["raw"], got["all"])
    square = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    one, other = (refine.seed_cams(model, p, [1], {"s": (0, 1)})["s"] for p in (square, square.flip(-1)))
    torch.testing.assert_close(one, other.flip(-1), atol=1e-4, rtol=1e-3)  # both views are seen
    assert refine.parse_layers("0-2,5", 6) == (0, 1, 2, 5) and refine.parse_layers("none", 6) == ()
    assert refine.parse_layers("entropy", 6) == "entropy"
    seen = []
    refine.seed_cams(model, square, [1], {"s": ()}, scales=(0.5, 1, 1.5), observe=seen.append)
    assert [out.cam.shape[-1] for out in seen] == [8]  # the view of scale 1 alone
    seen.clear()
    weighted = refine.seed_cams(model, square, [1], {"s": "entropy", "all": tuple(range(6))}, observe=seen.append)
    out, both = seen[0], 0
    for view, turn in ((0, lambda x: x), (1, lambda x: x.flip(-1))):  # by hand: every layer times 1 - e, e of this view
        entropy = aream.layer_entropy(out.cam[view:view + 1], [a[view:view + 1] for a in out.affinity], torch.tensor([[0, 1.0, 0]]))[0]
        w = 1 - (entropy - entropy.min()) / (entropy.max() - entropy.min())
        mean = sum(w[l] * out.affinity[l][view, 3:, 3:] for l in range(6))
        attended = aream.class_attended_cam(out.cam, out.affinity)[view, 1].flatten()
        refined = (mean / mean.sum(-1, keepdim=True) @ attended).view(1, 1, 8, 8)
        both = both + turn(F.interpolate(refined, size=(64, 64), mode="bilinear"))
    both = F.interpolate(both, size=(16, 16), mode="bilinear")
    torch.testing.assert_close(weighted["s"], aream.normalise_cam(both, torch.ones(1, 1))[0], atol=1e-4, rtol=1e-3)  # a small range, stretched
    assert not torch.equal(weighted["s"], weighted["all"])
    with pytest.raises(ValueError, match="--layers '3-9'"):
        refine.parse_layers("3-9", 6)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py
# ---------------------------------------------------------------------------------------------------------------------
def test_confusion_and_scores_by_hand():
    target = torch.tensor([[0, 0, 1], [1, 255, 1]])
    prediction = torch.tensor([[0, 1, 1], [1, 2, 0]])
    confusion = evaluate.confusion_matrix(prediction, target, 3)
    assert confusion.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]] and confusion.dtype == torch.int64
    result = evaluate.scores(confusion)
    assert result["iou"][:2].tolist() == pytest.approx([1 / 3, 2 / 4]) and result["iou"][2].isnan()
    assert result["miou"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result["precision"][1].item() == pytest.approx(2 / 3) and result["recall"][0].item() == pytest.approx(1 / 2)
    assert evaluate.scores(confusion, torch.tensor([2, 0, 0]))["iou"][0].item() == pytest.approx(1 / 5)
    with pytest.raises(ValueError, match="prediction holds 255"):
        evaluate.confusion_matrix(torch.full((2, 3), 255), target, 3)
    with pytest.raises(ValueError, match=r"prediction is \(2, 2\)"):
        evaluate.confusion_matrix(prediction[:, :2], target, 3)
    big = evaluate.scores(torch.tensor([[2**40, 0], [0, 2**40]]))
    assert big["miou"] == 1.0


def test_threshold_curve_equals_one_evaluation_per_threshold():
    cam, values = torch.rand(2, 20, 30), torch.tensor([1, 3])
    cam[:, :5] = 0.25  # ties with a threshold
    target = torch.tensor([0, 1, 2, 3, 255])[torch.randint(0, 5, (20, 30))]
    counts = evaluate.threshold_counts(cam, values, target, 4)
    for t, confusion in zip(evaluate.THRESHOLDS, evaluate.curve(counts)):
        score, winner = cam.max(0)
        prediction = torch.where(score > t, values[winner], 0)
        assert torch.equal(confusion, evaluate.confusion_matrix(prediction, target, 4))


# ---------------------------------------------------------------------------------------------------------------------
# data.py
# ---------------------------------------------------------------------------------------------------------------------
def make_voc(root, ids=("a", "b", "c", "d"), size=(40, 48)):
    """A small VOC: two classes, masks as boxes."""
    voc, rng = root / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for i, name in enumerate(ids):
        mask = np.zeros(size, np.uint8)
        mask[5:30, 10:35] = (8, 15)[i % 2]
        image = rng.integers(0, 60, (*size, 3)) + 150 * (mask > 0)[..., None]
        Image.fromarray(image.astype(np.uint8)).save(voc / "JPEGImages" / f"{name}.jpg")
        data.write_mask(voc / "SegmentationClass" / f"{name}.png", mask)
        objects = f"<object><name>{('cat', 'person')[i % 2]}</name><difficult>1</difficult><part><name>head</name></part></object>"
        (voc / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    for split in ("train", "trainaug", "val"):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return voc


def make_coco(root, size=(40, 48)):
    """A small COCO: category ids 1 and 90, one polygon and one crowd an image."""
    coco = root / "COCO2014"
    (coco / "annotations").mkdir(parents=True)
    H, W = size
    for split in ("train", "val"):
        (coco / f"{split}2014").mkdir()
        images, annotations = [], []
        for i in range(5):
            name = f"COCO_{split}2014_{i:012d}.jpg"
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (H, W, 3), dtype=np.uint8)).save(coco / f"{split}2014" / name)
            images.append(dict(id=i, file_name=name, height=H, width=W))
            if i == 4:
                continue  # an image without objects
            annotations.append(dict(id=10 * i, image_id=i, category_id=90, area=600, iscrowd=0,
                                    segmentation=[[10, 10, 40, 10, 40, 30, 10, 30]]))
            annotations.append(dict(id=10 * i + 1, image_id=i, category_id=1, area=40, iscrowd=1,
                                    segmentation=dict(size=[H, W], counts=[15 * H + 12, 8, H - 8, 8, H * W - 16 * H - 20])))
        record = dict(images=images, annotations=annotations, categories=[dict(id=90, name="toothbrush"), dict(id=1, name="person")])
        (coco / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(record))
    return coco


def test_voc_and_its_failures(tmp_path):
    with pytest.raises(FileNotFoundError, match="JPEGImages.*VOCtrainval.*--data-root"):
        data.open_data("VOC2012", tmp_path / "nowhere", "train")
    voc = make_voc(tmp_path)
    train = data.open_data("VOC2012", tmp_path, "train", limit=3)
    assert train.ids == ["a", "b", "c"] and train.labels("a") == [7] and train.labels("b") == [14]
    assert set(np.unique(train.mask("b"))) == {0, 15} and data.mask_value(train.labels("b")[0]) == 15
    with pytest.raises(ValueError, match="--limit 0"):
        data.open_data("VOC2012", tmp_path, "train", limit=0)
    with pytest.raises(FileNotFoundError, match="no split 'test'"):
        data.open_data("VOC2012", tmp_path, "test")
    with pytest.raises(ValueError, match="unknown data set 'VOC2013'"):
        data.open_data("VOC2013", tmp_path, "train")
    (voc / "Annotations" / "a.xml").write_text("<annotation><object><name>unicorn</name></object></annotation>")
    with pytest.raises(ValueError, match="a.xml names the class 'unicorn'"):
        train.labels("a")
    (voc / "Annotations" / "a.xml").write_text("<annotation></annotation>")
    with pytest.raises(ValueError, match="a.xml names no object"):
        train.labels("a")
    (voc / "Annotations" / "a.xml").write_text("<annotation><obj")
    with pytest.raises(ValueError, match="a.xml is not readable XML"):
        train.labels("a")
    image = voc / "JPEGImages" / "b.jpg"
    image.write_bytes(image.read_bytes()[:400])
    with pytest.raises(ValueError, match="b.jpg is not a readable image"):
        train.image("b")
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("a\nzebra\n")
    with pytest.raises(FileNotFoundError, match="names 1 images .*'zebra'"):
        data.open_data("VOC2012", tmp_path, "train")
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("a\na\n")
    with pytest.raises(ValueError, match="lists 'a' more than once"):
        data.open_data("VOC2012", tmp_path, "train")


def test_shipped_splits():
    sizes = {p.stem: len(set(p.read_text().split())) for p in (Path(data.__file__).parent / "splits").glob("*.txt")}
    assert sizes == {"voc2012_train": 1464, "voc2012_trainaug": 10582, "voc2012_val": 1449}


def test_coco(tmp_path):
    coco = make_coco(tmp_path)
    train = data.open_data("COCO2014", tmp_path, "train", cache=tmp_path / "masks")
    assert train.classes == ("person", "toothbrush") and len(train.ids) == 4 and train.without_objects == 1
    assert train.labels(train.ids[0]) == [0, 1]
    mask = train.mask(train.ids[0])
    assert mask.shape == (40, 48) and mask[20, 25] == 2 and mask[5, 5] == 0
    assert (mask[12:20, 15:17] == 1).all() and (mask == 1).sum() == 16  # the small crowd lies over the large box
    assert np.array_equal(train.mask(train.ids[0]), mask) and len(list((tmp_path / "masks").rglob("*.png"))) == 1
    path = coco / "annotations" / "instances_train2014.json"
    record = json.loads(path.read_text())
    record["annotations"][0]["category_id"] = 12
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="annotation 0 has the unknown category 12"):
        data.open_data("COCO2014", tmp_path, "train")
    record["annotations"][0].update(category_id=1, segmentation=[["x"] * 6])
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="instances_train2014.json: an object of COCO_train2014_000000000000 has no readable outline"):
        data.open_data("COCO2014", tmp_path, "train").mask(train.ids[0])
    path.write_text("{")
    with pytest.raises(ValueError, match="instances_train2014.json is not readable JSON"):
        data.open_data("COCO2014", tmp_path, "train")
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a COCO instances file"):
        data.open_data("COCO2014", tmp_path, "train")


def compress_rle(counts):
    """COCO's compressed run lengths, the other way round."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
            if not more:
                break
    return text


def test_outlines():
    box = data.draw_object([[10, 10, 40, 10, 40, 30, 10, 30]], 40, 48)
    assert box.sum() == 600 and box[10:30, 10:40].all()  # pixel centres inside, no edge too many
    assert data.draw_object([[0, 0, 48, 0, 48, 40, 0, 40]], 40, 48).all()
    both = data.draw_object([[0, 0, 8, 0, 8, 8, 0, 8], [4, 4, 12, 4, 12, 12, 4, 12], [1, 1, 2, 2]], 40, 48)
    assert both.sum() == 64 + 64 - 16  # parts add up; two points are no outline
    shifted = data.draw_object([[5.75, 7.25, 20.25, 7.25, 20.25, 19.75, 5.75, 19.75]], 40, 48)
    assert shifted.sum() == 14 * 13 and shifted[7:20, 6:20].all()  # centres 6.5 .. 19.5, 7.5 .. 19.5
    triangle = data.draw_object([[0, 0, 40, 0, 0, 40]], 40, 48)
    assert abs(triangle.sum() - 800) < 40
    for broken in ([[1, 2, 3, 4, 5, 6, 7]], [["a"] * 6], [[float("nan")] * 6]):
        with pytest.raises(ValueError):
            data.draw_object(broken, 40, 48)


def test_masks_are_cached_in_parallel_and_go_on(tmp_path):
    make_coco(tmp_path)
    one, two = (data.open_data("COCO2014", tmp_path, "train", cache=tmp_path / n) for n in ("one", "two"))
    expected = {name: one.rasterise(name) for name in one.ids}
    one.cache_masks(0)
    two.mask(two.ids[1])  # as if interrupted
    kept = (tmp_path / "two" / "train" / f"{two.ids[1]}.png").stat().st_mtime_ns
    two.cache_masks(2)
    assert (tmp_path / "two" / "train" / f"{two.ids[1]}.png").stat().st_mtime_ns == kept
    for dataset in (one, two):
        assert len(list(Path(dataset.cache).rglob("*"))) == 1 + len(one.ids)
        assert all(np.array_equal(dataset.mask(name), mask) for name, mask in expected.items())


def test_run_lengths():
    mask = (np.random.default_rng(0).random((13, 70)) < 0.4).astype(np.uint8)
    flat, counts, value = mask.T.flatten(), [], 0
    while len(flat):
        run = int(np.argmax(flat != value)) if (flat != value).any() else len(flat)
        counts.append(run)
        flat, value = flat[run:], 1 - value
    for form in (counts, compress_rle(counts)):
        assert np.array_equal(data.decode_rle(dict(size=[13, 70], counts=form), 13, 70), mask)
    known = [6, 1, 40, 4, 5, 4, 5, 4, 21]  # the example in COCO's own API
    assert compress_rle(known) == "61X13mN000`0"
    assert data.decode_rle(dict(size=[9, 10], counts="61X13mN000`0"), 9, 10).sum() == sum(known[1::2])
    with pytest.raises(ValueError, match="run lengths of 5 pixels"):
        data.decode_rle(dict(size=[2, 3], counts=[5]), 2, 3)


def test_toy_is_deterministic_and_labelled():
    train = data.open_data("toy", None, "train", limit=20)
    first = np.asarray(train.image(train.ids[3]))
    data.draw_toy.cache_clear()
    assert np.array_equal(np.asarray(train.image(train.ids[3])), first)
    for name in train.ids:
        assert train.labels(name) == [v - 1 for v in np.unique(train.mask(name)).tolist() if v]
    assert not set(data.open_data("toy", None, "val").ids) & set(train.ids)


def test_joint_transform_keeps_image_and_mask_together(tmp_path):
    voc = make_voc(tmp_path)
    dataset = data.open_data("VOC2012", tmp_path, "train")
    samples = data.SegmentationSet(dataset, voc / "SegmentationClass", 32)
    for sample_seed in range(8):
        image, mask = samples[1, sample_seed]
        assert image.shape == (3, 32, 32) and mask.shape == (32, 32) and set(mask.unique().tolist()) <= {0, 15, 255}
        bright = image.float().mean(0) > 105
        inside = mask != 255
        assert (bright == (mask == 15))[inside].float().mean() > 0.85
        assert torch.equal(samples[1, sample_seed][0], image)
    data.write_mask(voc / "SegmentationClass" / "b.png", np.zeros((10, 10)))
    with pytest.raises(ValueError, match="b.png is 10 x 10 pixels, its image is 40 x 48"):
        samples[1, 0]
    data.write_mask(voc / "SegmentationClass" / "b.png", np.full((40, 48), 33))
    with pytest.raises(ValueError, match="b.png holds the value 33: VOC2012 has 0..20"):
        samples[1, 0]


def test_artefacts_round_trip(tmp_path):
    mask = np.random.default_rng(0).integers(0, 256, (7, 9), dtype=np.uint8)
    data.write_mask(tmp_path / "m.png", mask)
    assert np.array_equal(data.read_mask(tmp_path / "m.png", (7, 9)), mask)
    assert data.palette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0] and data.palette()[45:48] == [192, 128, 128]
    data.write_cam(tmp_path / "c.npz", [3, 5], torch.full((2, 4, 5), 0.5), (16, 20))
    class_ids, cam, size = data.read_cam(tmp_path / "c.npz")
    assert class_ids.tolist() == [3, 5] and cam.shape == (2, 4, 5) and size == (16, 20) and cam.mean() == 0.5
    (tmp_path / "c.npz").write_bytes(b"PK broken")
    with pytest.raises(ValueError, match="c.npz is not a readable CAM file"):
        data.read_cam(tmp_path / "c.npz")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="rgb.png is not a readable mask .*mode RGB"):
        data.read_mask(tmp_path / "rgb.png")
    with pytest.raises(RuntimeError), data.replacing(tmp_path / "m.png") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("interrupted")
    assert np.array_equal(data.read_mask(tmp_path / "m.png"), mask) and len(list(tmp_path.iterdir())) == 3


def damaged(good, rng):
    """One broken variant of a file's bytes: cut, empty, noise, bytes changed, doubled, or something else altogether."""
    kind = rng.integers(6)
    if kind == 0:
        return good[:rng.integers(len(good))]
    if kind == 1:
        return rng.bytes(rng.integers(0, 200))
    if kind == 2:
        return good + good
    if kind == 3:
        return [b"", b"null", b"[]", b"{}", b"<a/>", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\x00" * 99][rng.integers(9)]
    changed = bytearray(good)
    for _ in range(rng.integers(1, 30)):
        changed[rng.integers(len(changed))] = rng.integers(256)
    return bytes(changed)


def test_damaged_files_end_in_a_clear_error_or_a_correct_result(tmp_path):
    voc, coco = make_voc(tmp_path), make_coco(tmp_path)
    data.write_cam(tmp_path / "a.npz", [3], torch.rand(1, 5, 5), (20, 20))
    data.write_checkpoint(tmp_path / "a.pt", {"stage": "cls", "config": {"data": "toy", "classes": ["x"]}, "epoch": 1})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    dataset = data.open_data("VOC2012", tmp_path, "train")
    image, mask = voc / "JPEGImages" / "a.jpg", voc / "SegmentationClass" / "a.png"
    xml, names = voc / "Annotations" / "a.xml", voc / "ImageSets" / "Segmentation" / "train.txt"
    instances = coco / "annotations" / "instances_train2014.json"

    def read_coco():
        opened = data.open_data("COCO2014", tmp_path, "train")
        return [(opened.labels(n), opened.rasterise(n)) for n in opened.ids]

    readers = {
        image: lambda: dataset.image("a").size, mask: lambda: dataset.mask("a"), xml: lambda: dataset.labels("a"),
        names: lambda: data.open_data("VOC2012", tmp_path, "train"), instances: read_coco,
        tmp_path / "a.npz": lambda: data.read_cam(tmp_path / "a.npz"),
        tmp_path / "a.pt": lambda: data.read_checkpoint(tmp_path / "a.pt", "cls", "toy", ["x"]),
        tmp_path / "classes.txt": lambda: data.read_classes(tmp_path / "classes.txt")}
    rng, refused = np.random.default_rng(0), 0
    for path, read in readers.items():
        good = path.read_bytes()
        for case in range(80):
            path.write_bytes(damaged(good, rng))
            try:
                read()
            except (ValueError, FileNotFoundError) as error:
                refused += 1
                assert path.name in str(error) or "split" in str(error), (path.name, case, error)
        path.write_bytes(good)
        read()
    assert refused > 300


def test_hostile_files(tmp_path):
    voc = make_voc(tmp_path)
    dataset = data.open_data("VOC2012", tmp_path, "train")
    bomb = '<!DOCTYPE a [<!ENTITY a0 "' + "x" * 100 + '">' + "".join(
        f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9)) + "]><annotation><object><name>&a9;</name></object></annotation>"
    (voc / "Annotations" / "a.xml").write_text(bomb)
    with pytest.raises(ValueError, match="a.xml"):
        dataset.labels("a")
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)) + chunk(b"IEND", b"")
    (voc / "SegmentationClass" / "a.png").write_bytes(huge)  # 3.6 gigapixels in a few bytes
    with pytest.raises(ValueError, match="a.png is not a readable mask"):
        dataset.mask("a")

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"stage": "cls", "config": {"data": "toy"}, "model": Attack()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is not a checkpoint"):
        data.read_checkpoint(tmp_path / "evil.pt", "cls")
    np.savez(tmp_path / "evil.npz", class_ids=np.array([Attack()], dtype=object), cam=np.zeros((1, 2, 2)), size=[2, 2])
    with pytest.raises(ValueError, match="evil.npz is not a readable CAM file"):
        data.read_cam(tmp_path / "evil.npz")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("size", [(1, 1), (20, 5000), (3, 400)])
def test_extreme_image_sizes(size):
    model = vit.build("toy", 2, depth=1).eval()
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    cam = refine.seed_cams(model, pixels, [1], {"seed": (0,)}, scales=(0.5, 1))["seed"]
    mask = refine.pseudo_mask(pixels, [1], cam)
    assert mask.shape == size and set(mask.unique().tolist()) <= {0, 2, 255} and torch.isfinite(cam).all()


def test_sampler_depends_on_seed_and_epoch_only():
    sampler = data.EpochSampler(10, seed=1)
    first = list(sampler)
    assert list(sampler) == first and sorted(i for i, _ in first) == list(range(10))
    sampler.set_epoch(1)
    assert list(sampler) != first
    with pytest.raises(ValueError, match="--batch 5 with 3 images"):
        data.train_loader([0] * 3, 5, 0, 0, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# The naive rendering: every head kept, a second pass for the labels, PAR image by image and threshold by threshold
# ---------------------------------------------------------------------------------------------------------------------
def naive_forward(model, images):
    """Class logits, patch logits, patch map, and all heads' logits and attention, (L, B, A, N, N) each."""
    B, C, A, grid = len(images), model.num_classes, model.blocks[0].attn.heads, [s // model.patch for s in images.shape[2:]]
    patches = model.patch_embed(images).flatten(2).transpose(1, 2) + model.position_embedding(tuple(grid))
    x = torch.cat([(model.class_tokens + model.class_pos_embed).expand(B, -1, -1), patches], 1)
    logits, prob = [], []
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, A, -1).permute(2, 0, 3, 1, 4)
        logits.append(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5)
        prob.append(logits[-1].softmax(-1))
        x = x + block.drop_path(block.attn.proj((prob[-1] @ v).transpose(1, 2).flatten(2)))
        x = x + block.drop_path(block.mlp(block.norm2(x)))
    patch_map = model.head(x[:, C:].transpose(1, 2).unflatten(2, grid))
    return x[:, :C].mean(-1), patch_map.mean((2, 3)), patch_map, torch.stack(logits), torch.stack(prob)


def naive_neighbours(x):
    """(K, H, W) -> (K, 48, H, W)."""
    padded = F.pad(x[None], [24] * 4, mode="replicate")[0]
    H, W = x.shape[-2:]
    return torch.stack([padded[:, 24 + dy * d:24 + dy * d + H, 24 + dx * d:24 + dx * d + W] for d in refine.DILATIONS
                        for dy, dx in refine.NEIGHBOURS], 1)


def naive_batch_par(image, score):
    """PAR of one image (3, H, W) and its scores (K, H, W), all neighbours of everything at once."""
    near = naive_neighbours(image)
    colour = -((near - image[:, None]).abs() / (near.std(1, keepdim=True) + 1e-8) / 0.3).square().mean(0)
    length = torch.tensor([math.hypot(dy * d, dx * d) for d in refine.DILATIONS for dy, dx in refine.NEIGHBOURS])
    place = -(length / (length.std() + 1e-8) / 0.3).square()
    kernel = colour.softmax(0) + 0.01 * place.softmax(0)[:, None, None]
    for _ in range(10):
        score = (naive_neighbours(score) * kernel).sum(1)
    return score


def naive_pseudo_label(image, cam, label, low=0.35, high=0.55):
    """One image (3, H, W) in [0, 1], cam (C, h, w), label (C,) -> (H, W)."""
    H, W = image.shape[-2:]
    resize = lambda x, size: F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]
    small, classes, maps = resize(image, (H // 2, W // 2)), label.nonzero()[:, 0], []
    values = torch.cat([torch.zeros(1, dtype=torch.int64), classes + 1])
    for beta in (low, high):
        score = resize(cam[classes], (H // 2, W // 2))
        score = torch.cat([torch.full_like(score[:1], beta), score]).softmax(0)
        maps.append(values[resize(naive_batch_par(small, score), (H, W)).argmax(0)])
    return torch.where(maps[1] > 0, maps[1], torch.where(maps[0] > 0, 255, 0))


def naive_cam(model, images, guide, kind, labels):
    """Guided CAM (B, C, gh, gw) of normalised images with entropy weights averaged with the mirror image, and w_hat (B, L)."""
    B, C = len(images), model.num_classes
    both = torch.cat([images, images.flip(-1)])
    _, _, patch_map, _, prob = naive_forward(model, both)
    affinity, cam = prob.mean(2), patch_map.relu()  # (L, 2B, N, N)
    flat, S = cam.flatten(2), affinity[:, :, C:, C:]
    entropy = torch.empty(2 * B, len(S))
    for b in range(2 * B):
        for l in range(len(S)):
            p = (S[l, b] @ (flat[b] * labels[b % B, :, None]).sum(0)).softmax(0)
            entropy[b, l] = -(p * p.log2()).sum()
    w, w_hat = aream.reactivation_weights((entropy[:B] + entropy[B:]) / 2, kind)
    attended = flat * affinity[:, :, :C, C:].mean(0)
    guided = torch.stack([torch.stack([w[b % B, l] * S[l, b] for l in guide]).mean(0) @ attended[b].T for b in range(2 * B)])
    guided = guided.transpose(1, 2).view_as(cam)
    return guided[:B] + guided[B:].flip(-1), w_hat


def naive_step(model, pixels, labels, args, coupling):
    """Affinity label (B, P, P) and total loss of a batch."""
    guide, supervised = coupling
    images, C = data.normalise(pixels), model.num_classes
    with torch.no_grad():
        model.eval()
        cam, w_hat = naive_cam(model, images, guide, args.reactivation, labels)
        model.train()
        half = [s // 2 for s in pixels.shape[2:]]
        cam = aream.normalise_cam(F.interpolate(cam, size=half, mode="bilinear", align_corners=False), labels)
        masks = [naive_pseudo_label(p.float() / 255, c, y) for p, c, y in zip(pixels, cam, labels)]
        label = torch.cat([aream.affinity_label(m[None], [s // model.patch for s in m.shape]) for m in masks])
    class_logits, patch_logits, _, logits, _ = naive_forward(model, images)
    prob = logits.mean(2)[:, :, C:, C:].sigmoid()
    n1, n0, total = (label == 1).sum(), (label == 0).sum(), 0
    for l in supervised:
        attract = ((1 - prob[l]) * (label == 1)).sum((1, 2)) / (n1 + 1)
        repel = (prob[l] * (label == 0)).sum((1, 2)) / (n0 + 1)
        total = total + (w_hat[:, l] * (0.5 * attract + 0.5 * repel)).sum() / len(supervised)
    return label, aream.classification_loss(class_logits, patch_logits, labels) + args.affinity_weight * total


@pytest.mark.parametrize("coupling, kind", [("all", "entropy"), ("split", "uniform")])
def test_step_equals_the_naive_rendering(coupling, kind):
    dataset = data.open_data("toy", None, "train", 3)
    pixels = torch.stack([torch.from_numpy(np.asarray(dataset.image(n)).copy()).permute(2, 0, 1) for n in dataset.ids])
    labels = torch.stack([data.label_vector(dataset, n) for n in dataset.ids])
    args = train_cls.parse_args(["--data", "toy", "--reactivation", kind])
    model, layers = vit.build("toy", 6, depth=4), aream.coupled_layers(4, coupling, 2)
    torch.nn.init.normal_(model.head.weight)  # CAMs large enough to tell the layers' entropies apart
    label, w_hat, _ = train_cls.make_labels(train_cls.label_pass(model, pixels, args), pixels, labels, layers[0], args)
    out = model(data.normalise(pixels), "logits")
    loss = (aream.classification_loss(out.class_logits, out.patch_logits, labels)
            + args.affinity_weight * aream.aream_loss(out.affinity_logits, label, w_hat, layers[1]))
    expected_label, expected = naive_step(model, pixels, labels, args, layers)
    assert torch.equal(label, expected_label) and {0, 1} <= set(label.unique().tolist())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    gradient = [torch.autograd.grad(x, model.blocks[3].attn.qkv.weight)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradient, atol=1e-5, rtol=1e-4)


def test_batched_par_equals_one_image_at_a_time():
    images, score = torch.rand(3, 3, 40, 30), torch.rand(3, 4, 40, 30)
    score[:, 2] = 0  # an absent class
    got = refine.pixel_adaptive_refine(images, score)
    torch.testing.assert_close(got, torch.stack([naive_batch_par(i, s) for i, s in zip(images, score)]), atol=1e-5, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the numbers of elements that operations put out, the most of them."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))])
        return out


def test_the_label_steps_memory_depends_on_the_classes_present_alone():
    args, largest = train_cls.parse_args([]), {}
    for C in (4, 80):
        labels = torch.zeros(2, C)
        labels[0, :2] = labels[1, 3] = 1
        out = vit.ViTOutput(None, None, torch.rand(4, C, 4, 4), rand_affinity(4, C + 16))
        with LargestTensor() as counter:
            train_cls.make_labels(out, torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8), labels, range(3), args)
        largest[C] = counter.elements
    assert largest[4] == largest[80] > 2 * 80 * 8


def test_flops_against_torchs_counter():
    model = vit.build("toy", 6, depth=3).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 48, 64), "affinity")  # attention as plain products, which the counter knows everywhere
    assert model.flops((6, 8)) == counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# The stages, by their real command lines
# ---------------------------------------------------------------------------------------------------------------------
TINY = ["--data", "toy", "--workers", "0", "--device", "cpu"]


def train(out, *more, epochs=2, limit=16):
    train_cls.main([*TINY, "--out", str(out), "--limit", str(limit), "--batch", "8", "--epochs", str(epochs),
                    "--warmup-epochs", "1", "--depth", "3", "--deep-from", "1", *more])
    return data.read_checkpoint(out / "cls" / "last.pt", "cls", "toy")


def test_four_stages_on_toy(tmp_path, capsys):
    out, before = tmp_path / "run", tmp_path / "plain"
    train(before, "--reactivation", "none")
    train(out, "--branch-from", str(before / "cls" / "warmup.pt"))
    common = [*TINY, "--out", str(out), "--limit", "16"]
    for folder, more in ((before, []), (out, ["--before", str(before)])):
        evaluate.main([*TINY, "--what", "layers", "--out", str(folder), "--limit", "4", *more])
        assert (folder / "layers.png").is_file()
    state = data.read_json(out / "layers.json", "")["state"]
    assert all(len(values) == 3 for values in state.values()) and max(state["entropy"]) <= 6  # log2 of 64 patches
    assert all(0 <= value <= 1 for value in (*state["distance"], *state["top"], *state["w_hat"]))
    refine.main([*common, "--pictures", "2"])
    evaluate.main([*common, "--what", "cam"])
    evaluate.main([*common, "--what", "pseudo", "--worst", "2"])
    assert Image.open(out / "worst.png").size[0] == 3 * 160
    train_seg.main([*common, "--batch", "4", "--epochs", "1"])
    evaluate.main([*common, "--what", "pred"])
    evaluate.main([*TINY, "--out", str(out), "--what", "demo", "--before", str(before), "--limit", "16"])
    printed = capsys.readouterr().out
    assert "class mAP on val (information only" in printed and "DeepLab, val" in printed and "chosen with pixel labels" in printed
    records = data.read_json(out / "results.json", "")
    assert [r["what"] for r in records] == ["layers", "cam", "pseudo", "pred"]
    assert all(0 <= r[k] <= 100 for r, k in zip(records[1:], ("fixed", "labelled", "miou"))) and len(records[1]["curve"]) == 101
    assert set(records[0]["table"]) == {"patch map alone", "unrefined", "all layers", "shallow layers", "deep layers", "all, weighted", "layer 0", "layer 1", "layer 2"}
    names = [f"toy_train_{i:04d}" for i in range(16)]

    def own_miou(name):
        mask, target = data.read_mask(out / "pseudo" / f"{name}.png"), data.draw_toy(name)[1].copy()
        target[mask == 255] = 255
        return evaluate.scores(evaluate.confusion_matrix(np.where(mask == 255, 0, mask), target, 7))["miou"]

    worst = min(names, key=own_miou)
    assert f"the worst are {worst} ({100 * own_miou(worst):.0f}), " in printed
    assert sorted(p.stem for p in (out / "cam").glob("*.npz")) == sorted(p.stem for p in (out / "pseudo").glob("*.png")) == names
    assert len(list((out / "pred" / "val").glob("*.png"))) == 16
    assert Image.open(out / "demo.png").size[0] == 7 * 132 and (out / "refine.png").is_file()
    with Image.open(out / "pseudo" / "toy_train_0000.png") as mask:
        assert mask.mode == "P" and mask.size == (64, 64)
    # refine again: refuses, then makes only what is missing
    with pytest.raises(ValueError, match="cam is in use: go on with --resume, replace it with --overwrite"):
        refine.main(common)
    kept, gone = out / "pseudo" / "toy_train_0001.png", out / "pseudo" / "toy_train_0000.png"
    before_bytes, before_time = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    refine.main([*common, "--resume"])
    assert gone.read_bytes() == before_bytes and kept.stat().st_mtime_ns == before_time
    with pytest.raises(ValueError, match="--resume in .*cam with another --steps"):
        refine.main([*common, "--resume", "--steps", "3"])
    checkpoint = (out / "cls" / "last.pt").read_bytes()
    shutil.copy(before / "cls" / "last.pt", out / "cls" / "last.pt")
    with pytest.raises(ValueError, match="--resume in .*cam, but the classifier changed since: start again with --overwrite"):
        refine.main([*common, "--resume"])
    (out / "cls" / "last.pt").write_bytes(checkpoint)
    # so does DeepLab with other pseudo-masks, and it never deletes what another model predicted without being told to
    settings = (out / "pseudo" / "args.json").read_text()
    (out / "pseudo" / "args.json").write_text(settings.replace("0.55", "0.5"))
    with pytest.raises(ValueError, match="--resume in .*seg, but the pseudo-masks changed since"):
        train_seg.main([*common, "--batch", "4", "--epochs", "1", "--resume"])
    (out / "pseudo" / "args.json").write_text(settings)
    (out / "seg").rename(out / "elsewhere")
    with pytest.raises(ValueError, match="pred holds predictions, but .*seg no model that made them: replace them with --overwrite"):
        train_seg.main([*common, "--batch", "4", "--epochs", "1"])
    assert len(list((out / "pred" / "val").glob("*.png"))) == 16
    (out / "pred" / "val" / "stale.png").write_bytes(b"of the model before")
    train_seg.main([*common, "--batch", "4", "--epochs", "1", "--overwrite"])
    assert len(list((out / "pred" / "val").glob("*.png"))) == 16 and not (out / "pred" / "val" / "stale.png").exists()
    # a missing prediction is an error, not a perfect score
    (out / "pred" / "val" / "toy_val_0003.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 16 files are missing .*toy_val_0003.*python train_seg.py"):
        evaluate.main([*common, "--what", "pred"])
    data.write_mask(out / "pred" / "val" / "toy_val_0003.png", np.full((64, 64), 255))
    with pytest.raises(ValueError, match="toy_val_0003.png: the prediction holds 255"):
        evaluate.main([*common, "--what", "pred"])
    data.write_mask(out / "pred" / "val" / "toy_val_0003.png", np.zeros((32, 64)))
    with pytest.raises(ValueError, match="toy_val_0003: the ground truth is 64 x 64 pixels, the prediction 32 x 64"):
        evaluate.main([*common, "--what", "pred"])
    # pixel ground truth is refused, also as a copy
    masks, dataset = tmp_path / "copy", data.open_data("toy", None, "train", 16)
    for name in dataset.ids:
        data.write_mask(masks / f"{name}.png", dataset.mask(name))
    with pytest.raises(ValueError, match="copy is pixel ground truth"):
        train_seg.main([*common, "--masks", str(masks), "--overwrite"])
    assert (out / "seg" / "last.pt").is_file()  # nothing was lost by it


def test_rank_correlation_of_entropy_and_miou():
    def table(*miou):
        return {"unrefined": {"fixed": 99.0}, **{f"layer {l}": {"fixed": m} for l, m in enumerate(miou)}}
    state = {"entropy": [5.0, 5.5, 6.0, 9.0]}
    assert evaluate.rank_correlation(table(60.0, 50.0, 49.0, 1.0), state, "fixed") == pytest.approx(-1)
    assert evaluate.rank_correlation(table(1.0, 2.0, 3.0, 4.0), state, "fixed") == pytest.approx(1)
    assert evaluate.rank_correlation(table(20.0, 30.0, 40.0, 10.0), state, "fixed") == pytest.approx(-0.2)  # 1 - 6 * 12 / 60


def test_study_gathers_runs_and_prints_their_table(tmp_path, capsys):
    for row, seeds in (("1.none", "01"), ("1.entropy", "0")):
        for one in seeds:
            train(tmp_path / "s" / row / one, "--seed", one, limit=8)
            evaluate.main([*TINY, "--what", "layers", "--out", str(tmp_path / "s" / row / one), "--limit", "2"])
    records = tmp_path / "results" / "toy.json"
    out = tmp_path / "s" / "1.entropy" / "0"  # its masks and its DeepLab are scored too
    refine.main([*TINY, "--out", str(out), "--limit", "8"])
    evaluate.main([*TINY, "--what", "pseudo", "--out", str(out), "--limit", "8"])
    train_seg.main([*TINY, "--out", str(out), "--limit", "8", "--batch", "4", "--epochs", "1"])
    evaluate.main([*TINY, "--what", "pred", "--out", str(out), "--limit", "8"])
    scored = {r["what"]: r for r in data.read_json(out / "results.json", "")}
    capsys.readouterr()
    evaluate.main(["--what", "study", "--out", str(tmp_path / "s"), "--records", str(records)])
    table = capsys.readouterr().out.splitlines()
    assert table[-1] == (f"| 1.entropy | 1 | {scored['pseudo']['labelled']:.1f} | {scored['pseudo']['all']:.1f} | "
                         f"{scored['pseudo']['undecided']:.1f} | {scored['pred']['miou']:.1f} |")
    values = [r["table"]["all layers"]["fixed"] for r in data.read_json(records, "") if r["row"] == "1.none"]
    assert len(values) == 2 and table[3].startswith("| 1.none | 2 |") and f"| {sum(values) / 2:.1f} ± " in table[3]
    assert table[2].startswith("| 1.entropy | 1 |") and "±" not in table[2]
    evaluate.main(["--what", "study", "--out", str(tmp_path / "gone"), "--records", str(records)])  # the table alone
    assert capsys.readouterr().out.splitlines() == table
    with pytest.raises(FileNotFoundError, match="make study-toy"):
        evaluate.main(["--what", "study", "--out", str(tmp_path / "gone"), "--records", str(tmp_path / "none.json")])


def test_own_data_through_all_stages(tmp_path, capsys):
    voc = make_voc(tmp_path / "pets")
    for annotation in (voc / "Annotations").iterdir():  # classes that VOC does not have
        annotation.write_text(annotation.read_text().replace("person", "axolotl"))
    own, classes = tmp_path / "mine", tmp_path / "classes.txt"
    shutil.move(voc, own)
    classes.write_text("axolotl\ncat\n")
    for mask in (own / "SegmentationClass").iterdir():
        old = data.read_mask(mask)
        data.write_mask(mask, np.where(old == 8, 2, np.where(old == 15, 1, old)))
    common = ["--data", str(own), "--classes", str(classes), "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    with pytest.raises(FileNotFoundError, match=f"make it with  python train_cls.py --data {own} --classes {classes} --out"):
        refine.main(common)
    train_cls.main([*common, "--preset", "toy", "--pretrained", "none", "--size", "64", "--batch", "2", "--epochs", "1",
                    "--warmup-epochs", "0", "--deep-from", "2"])
    refine.main([*common, "--scales", "1"])
    train_seg.main([*common, "--arch", "deeplabv3_vit", "--size", "64", "--batch", "2", "--epochs", "1", "--scales", "1"])
    for what in ("layers", "cam", "pseudo", "pred"):
        evaluate.main([*common, "--what", what, "--scales", "1"])
    assert "axolotl" in capsys.readouterr().out
    classes.write_text("cat\naxolotl\n")  # in another order they are other classes
    with pytest.raises(ValueError, match="trained on the classes axolotl, cat; now they are cat, axolotl"):
        refine.main([*common, "--scales", "1", "--overwrite"])
    classes.write_text("cat\ncat\n")
    with pytest.raises(ValueError, match="1 to 254 different classes"):
        refine.main(common)
    with pytest.raises(ValueError, match="unknown data set .*with --classes"):
        data.open_data(str(own), None, "train")
    with pytest.raises(ValueError, match="VOC2012 has classes of its own"):
        data.open_data("VOC2012", tmp_path, "train", classes=str(classes))
    (own / "ImageSets" / "Segmentation" / "train.txt").write_text("../../secret\n")
    classes.write_text("axolotl\ncat\n")
    with pytest.raises(ValueError, match="names '../../secret', which is not the plain name of an image"):
        refine.main(common)


def test_training_resumes_to_the_same_weights(tmp_path):
    whole = train(tmp_path / "whole", epochs=3)
    train(tmp_path / "parts", epochs=3)
    folder = tmp_path / "parts" / "cls"
    shutil.copy(folder / "warmup.pt", folder / "last.pt")  # as if it had been stopped after the first epoch
    train(tmp_path / "parts", "--resume", epochs=3)
    resumed = data.read_checkpoint(folder / "last.pt", "cls", "toy")
    assert all(torch.equal(v, resumed["model"][k]) for k, v in whole["model"].items())
    branched = train(tmp_path / "branch", "--branch-from", str(folder / "warmup.pt"), epochs=3)
    assert all(torch.equal(v, branched["model"][k]) for k, v in whole["model"].items())
    with pytest.raises(ValueError, match="is in use: go on with --resume"):
        train(tmp_path / "whole", epochs=3)
    with pytest.raises(ValueError, match="--resume in .* with another --epochs"):
        train(tmp_path / "whole", "--resume", epochs=4)
    with pytest.raises(ValueError, match="last.pt is already at epoch 3: give more than --epochs 3"):
        train(tmp_path / "late", "--branch-from", str(tmp_path / "whole" / "cls" / "last.pt"), epochs=3)
    with pytest.raises(ValueError, match="--overwrite would delete .*warmup.pt, from which to branch"):
        train(tmp_path / "parts", "--branch-from", str(folder / "warmup.pt"), "--overwrite", epochs=3)
    assert (folder / "warmup.pt").is_file() and (folder / "last.pt").is_file()


@pytest.mark.parametrize("cache_gb", ["0", "4"])
def test_resumed_drop_path_draws_the_same(tmp_path, cache_gb):
    more = ["--drop-path", "0.5", "--workers", "1", "--cache-gb", cache_gb]
    whole = train(tmp_path / "whole", *more, epochs=3)
    train(tmp_path / "parts", *more, epochs=3)
    shutil.copy(tmp_path / "parts" / "cls" / "warmup.pt", tmp_path / "parts" / "cls" / "last.pt")
    resumed = train(tmp_path / "parts", *more, "--resume", epochs=3)
    assert all(torch.equal(v, resumed["model"][k]) for k, v in whole["model"].items())


@pytest.mark.parametrize("more", [["--reactivation", "uniform", "--coupling", "split"], ["--entropy", "static"],
                                  ["--labels", "one-view"], ["--labels", "shared"]])
def test_other_settings_run(tmp_path, more):
    state = train(tmp_path, *more, limit=8)
    assert (state["entropy"] is not None) == ("static" in more)
    lines = [json.loads(line) for line in (tmp_path / "cls" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["aff_loss"] == 0 < lines[1]["aff_loss"] and {"lr", "images/s", "minutes_left"} <= set(lines[0])


def test_same_seed_same_files(tmp_path):
    first, second, other = (train(tmp_path / name, *more)["model"] for name, more in (
        ("first", []), ("second", ["--deterministic", "--cache-gb", "0"]), ("other", ["--seed", "1"])))
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first["head.weight"], other["head.weight"])


def run_on_a_full_disk(run, arguments, room):
    """In a process whose files may not grow beyond room bytes, which fails as a full disk does; reports its error."""
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        run(arguments)
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(7)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_full_disk_loses_nothing(tmp_path, capfd):
    """Each stage fails with a message that names the file, leaves what was there and no half of a file, and goes on."""
    fork = multiprocessing.get_context("fork")
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(whole, epochs=3)
    train(out, epochs=3)
    shutil.copy(out / "cls" / "warmup.pt", out / "cls" / "last.pt")  # as if it had been stopped after the first epoch
    old = (out / "cls" / "last.pt").read_bytes()
    common = [*TINY, "--out", str(out), "--limit", "16", "--resume"]
    classify = [*common, "--batch", "8", "--epochs", "3", "--warmup-epochs", "1", "--depth", "3", "--deep-from", "1"]
    for run, arguments, room, failed in (
            (train_cls.main, classify, len(old) // 2, "last.pt"), (refine.main, common, 300, "npz"),
            (train_seg.main, [*common, "--batch", "8", "--epochs", "1"], len(old) // 2, "last.pt")):
        process = fork.Process(target=run_on_a_full_disk, args=(run, arguments, room))
        process.start()
        process.join()
        message = capfd.readouterr().err
        assert process.exitcode == 7 and f"{failed} could not be written" in message and "a stage with --resume" in message, message
        assert not list(out.rglob(".*.tmp")) and (out / "cls" / "last.pt").is_file()
        if run is train_cls.main:
            assert (out / "cls" / "last.pt").read_bytes() == old
        run(arguments)  # there is room again
    first, second = (data.read_checkpoint(folder / "cls" / "last.pt", "cls") for folder in (whole, out))
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    assert len(list((out / "pseudo").glob("*.png"))) == 16 and {p.name[:8] for p in (out / "pred" / "val").iterdir()} == {"toy_val_"}


@slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_stages_go_on_to_the_same_result(tmp_path):
    """Real processes, killed at random moments; what --resume ends with is what an uninterrupted run ends with."""
    rng, fork = np.random.default_rng(0), multiprocessing.get_context("fork")
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    common = [*TINY, "--limit", "24", "--batch", "8"]
    stages = {"cls": (train_cls.main, [*common, "--epochs", "6", "--warmup-epochs", "2", "--depth", "3", "--deep-from", "1"]),
              "pseudo": (refine.main, [*TINY, "--limit", "150"]), "seg": (train_seg.main, [*common, "--epochs", "3"])}
    whole, total = tmp_path / "whole", 0
    for stage, (run, arguments) in stages.items():
        run([*arguments, "--out", str(whole)])
        killed = attempt = 0
        while killed < 7:
            attempt += 1
            out = tmp_path / f"{stage}{attempt}"
            for before in ("cls", "pseudo"):
                if before != stage and (whole / before).is_dir() and list(stages).index(before) < list(stages).index(stage):
                    shutil.copytree(whole / before, out / before)
            while True:
                process = fork.Process(target=run, args=([*arguments, "--out", str(out), "--resume"],))
                process.start()
                process.join(rng.uniform(0.05, 2.5))
                if process.exitcode is None:
                    os.kill(process.pid, signals[rng.integers(3)])
                    process.join()
                    killed += 1
                elif process.exitcode == 0:
                    break
                else:
                    raise AssertionError(f"{stage} ended with {process.exitcode}")
        total += killed
        pictures = {"cls": [], "pseudo": ["cam/*.npz", "pseudo/*.png"], "seg": ["pred/val/*.png"]}[stage]
        for pattern in pictures:
            names = sorted(p.relative_to(whole) for p in whole.glob(pattern))
            assert names and names == sorted(p.relative_to(out) for p in out.glob(pattern))
            assert all((out / n).read_bytes() == (whole / n).read_bytes() for n in names)
        if stage != "pseudo":
            first, second = (data.read_checkpoint(folder / stage / "last.pt", stage) for folder in (whole, out))
            assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
            assert first["optimizer"]["state"].keys() == second["optimizer"]["state"].keys()
    assert total >= 20
    assert (tmp_path / "cls1" / "cls" / "warmup.pt").is_file()


def torchrun(processes, script, *arguments, timeout=120):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                           str(script), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=timeout)


@slow
def test_two_processes_train_and_refine_like_one(tmp_path):
    here = Path(__file__).parent
    settings = ["--drop-path", "0", "--warmup-epochs", "1", "--epochs", "2", "--batch", "8", "--depth", "3", "--deep-from", "1"]
    one, two = ([*TINY, "--limit", "16", "--out", str(tmp_path / name)] for name in ("one", "two"))
    train_cls.main([*one, *settings])
    done = torchrun(2, here / "train_cls.py", *two, *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    states = [data.read_checkpoint(tmp_path / name / "cls" / "last.pt", "cls", "toy")["model"] for name in ("one", "two")]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, atol=2e-3, rtol=1e-3)  # Adam turns rounding into small steps
    logs = [[json.loads(line) for line in open(tmp_path / name / "cls" / "log.jsonl")] for name in ("one", "two")]
    assert len(logs[1]) == 2
    for a, b in zip(*logs):
        assert b["cls_loss"] == pytest.approx(a["cls_loss"], rel=1e-3) and b["aff_loss"] == pytest.approx(a["aff_loss"], rel=1e-2)
    shutil.copytree(tmp_path / "one" / "cls", tmp_path / "two" / "cls", dirs_exist_ok=True)
    refine.main(one)
    assert torchrun(2, here / "refine.py", *two).returncode == 0
    for path in [*(tmp_path / "one" / "cam").glob("*.npz"), *(tmp_path / "one" / "pseudo").glob("*.png")]:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert other.read_bytes() == path.read_bytes()
    seg = torchrun(2, here / "train_seg.py", *two, "--batch", "4", "--epochs", "1")
    assert seg.returncode == 0 and len(list((tmp_path / "two" / "pred" / "val").glob("*.png"))) == 16, seg.stderr[-2000:]


GRADIENTS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import aream, data, train_cls, model as vit
args = train_cls.parse_args(["--data", "toy", "--device", "cpu"])
device = data.start(args)
if sys.argv[3] == "dies" and data.rank() == 1:
    raise RuntimeError("rank 1 was told to die")
dataset = data.open_data("toy", None, "train", 8)
batch = next(iter(data.TrainingBatches(dataset, 64, 8, 0, 0, device, 4)))
net = vit.build("toy", 6, depth=3)
torch.nn.init.normal_(net.head.weight, std=0.1)
optimizer = torch.optim.SGD(net.parameters(), lr=0)
losses = train_cls.train_step(data.distributed(net, device), optimizer, batch, args, True, aream.coupled_layers(3))
if not data.rank():
    torch.save({"losses": losses, **{k: p.grad for k, p in net.named_parameters()}}, sys.argv[2])
"""


@slow
def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    found = []
    for processes in (1, 2):
        done = torchrun(processes, script, Path(__file__).parent, tmp_path / f"{processes}.pt", "lives")
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    for key in found[0].keys() - {"losses"}:
        torch.testing.assert_close(found[1][key], found[0][key], atol=1e-6, rtol=1e-4)
    dead = torchrun(2, script, Path(__file__).parent, tmp_path / "dead.pt", "dies", timeout=60)
    assert dead.returncode != 0 and "rank 1 was told to die" in dead.stderr and not (tmp_path / "dead.pt").exists()


def test_a_few_images_are_learnt():
    dataset = data.open_data("toy", None, "train", 8)
    pixels = torch.stack([torch.from_numpy(np.asarray(dataset.image(n)).copy()).permute(2, 0, 1) for n in dataset.ids])
    labels = torch.stack([data.label_vector(dataset, n) for n in dataset.ids])
    model, args = vit.build("toy", 6, depth=4), train_cls.parse_args(["--data", "toy"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(60):
        active = step >= 30
        if active:
            out = train_cls.label_pass(model, pixels, args)
            label, w_hat, mask = train_cls.make_labels(out, pixels, labels, range(4), args)
            assert model.training
        out = model(data.normalise(pixels), "logits" if active else False)
        cls = aream.classification_loss(out.class_logits, out.patch_logits, labels)
        aff = aream.aream_loss(out.affinity_logits, label, w_hat, range(4)) if active else torch.zeros(())
        optimizer.zero_grad()
        (cls + aff).backward()
        optimizer.step()
        losses.append((cls.item(), aff.item()))
    assert losses[-1][0] < 0.35 * losses[0][0]
    assert losses[-1][1] < 0.8 * losses[30][1]
    present = labels.nonzero().tolist()
    for b in range(8):
        assert set(mask[b].unique().tolist()) <= {0, 255} | {data.mask_value(c) for i, c in present if i == b}


def test_non_finite_loss_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(aream, "classification_loss", lambda *a: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(FloatingPointError, match="loss nan in epoch 1, step 0: stopped"):
        train(tmp_path)


@pytest.mark.parametrize("stage", [train_cls, refine])
def test_profile_needs_a_number_of_steps_and_one_process(stage, capsys, monkeypatch):
    for steps, processes, problem in (("0", "1", "'0' is not a number of steps"), ("5", "2", "run it without torchrun")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(SystemExit):
            stage.parse_args(["--data", "toy", "--profile", steps])
        assert problem in capsys.readouterr().err


def test_missing_inputs_name_the_command_that_makes_them(tmp_path):
    out = [*TINY, "--out", str(tmp_path), "--limit", "4"]
    with pytest.raises(FileNotFoundError, match="last.pt: make it with  python train_cls.py --data toy"):
        refine.main(out)
    with pytest.raises(SystemExit):
        evaluate.main([*out, "--what", "cam", "--worst", "3"])
    for what, command in (("cam", "refine.py"), ("pseudo", "refine.py"), ("pred", "train_seg.py")):
        with pytest.raises(FileNotFoundError, match=f"4 of 4 files are missing .*python {command} --data toy"):
            evaluate.main([*out, "--what", what])
    with pytest.raises(FileNotFoundError, match="4 of 4 files are missing .*python refine.py"):
        train_seg.main(out)
    with pytest.raises(ValueError, match="--limit 0"):
        train_cls.main([*TINY, "--out", str(tmp_path), "--limit", "0"])
    with pytest.raises(ValueError, match="--device zebra: not a device"):
        train_cls.main(["--data", "toy", "--device", "zebra"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA GPU"):
            train_cls.main(["--data", "toy", "--device", "cuda"])
    with pytest.raises(ValueError, match="image size 60 is not a multiple"):
        train_cls.main([*out, "--batch", "4", "--size", "60"])


def test_checkpoints_of_something_else(tmp_path):
    state = {"stage": "cls", "config": {"data": "VOC2012"}, "model": {}}
    data.write_checkpoint(tmp_path / "cls" / "last.pt", state)
    with pytest.raises(ValueError, match="was trained on VOC2012, not on toy"):
        refine.main([*TINY, "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="not a checkpoint of train_seg.py"):
        data.read_checkpoint(tmp_path / "cls" / "last.pt", "seg")
    torch.save({"stage": "cls", "config": Path("x")}, tmp_path / "code.pt")  # anything but plain types is refused
    with pytest.raises(ValueError, match="code.pt is not a checkpoint"):
        data.read_checkpoint(tmp_path / "code.pt", "cls")


@pytest.mark.parametrize("arch", train_seg.ARCHITECTURES[1:4])
def test_cnn_architectures(arch, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("a download was tried"))
    net = train_seg.build(arch, 4).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 65, 97))["out"].shape == (1, 5, 65, 97)
    if arch == "deeplabv3_mobilenet_v2":
        assert net.backbone(torch.randn(1, 3, 64, 96))["out"].shape == (1, 320, 4, 6)
    whole = getattr(torchvision.models, arch.removeprefix("deeplabv3_"))(weights=None).state_dict()
    monkeypatch.setattr(vit, "read_weights", lambda source, preset: whole)
    train_seg.load_backbone(net, arch, "classifier.pth")
    first = next(v for v in whole.values() if v.ndim == 4)
    assert torch.equal(next(p for p in net.backbone.parameters()), first)
    del whole[next(k for k in whole if k.endswith("running_mean"))]
    with pytest.raises(ValueError, match=f"classifier.pth does not hold an ImageNet backbone for {arch}"):
        train_seg.load_backbone(net, arch, "classifier.pth")


def test_voc_and_coco_through_all_stages(tmp_path):
    make_voc(tmp_path)
    make_coco(tmp_path)
    for name, split in (("VOC2012", "trainaug"), ("COCO2014", "train")):
        common = ["--data", name, "--data-root", str(tmp_path), "--out", str(tmp_path / name), "--workers", "0", "--device", "cpu"]
        train_cls.main([*common, "--preset", "toy", "--pretrained", "none", "--size", "32", "--batch", "2", "--epochs", "1",
                        "--warmup-epochs", "0", "--coupling", "split", "--deep-from", "2"])
        refine.main([*common, "--scales", "1"])
        evaluate.main([*common, "--what", "cam"])
        train_seg.main([*common, "--arch", "deeplabv3_mobilenet_v2", "--pretrained", "none", "--size", "33", "--batch", "2",
                        "--epochs", "1", "--scales", "1"])
        evaluate.main([*common, "--what", "pred"])
        if name == "VOC2012":
            with pytest.raises(ValueError, match="SegmentationClass is pixel ground truth"):
                train_seg.main([*common, "--masks", str(tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass")])


# ---------------------------------------------------------------------------------------------------------------------
# Real files, where AREAM_DATA says they are
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not REAL, reason="AREAM_DATA is not set")
def test_real_voc():
    for split in ("train", "val"):
        dataset = data.open_data("VOC2012", REAL, split, limit=25)
        for name in dataset.ids:
            mask = dataset.mask(name)
            assert mask.shape == dataset.image(name).size[::-1]
            drawn = {data.mask_value(c) for c in dataset.labels(name)}
            assert set(np.unique(mask).tolist()) - {0, data.IGNORE} <= drawn


@pytest.mark.skipif(not REAL, reason="AREAM_DATA is not set")
def test_real_coco_areas():
    dataset = data.open_data("COCO2014", REAL, "train", limit=20)
    for name in dataset.ids:
        mask = dataset.mask(name)
        assert mask.shape == dataset.image(name).size[::-1]
        assert set(np.unique(mask).tolist()) - {0} <= {data.mask_value(c) for c in dataset.labels(name)}
    objects = [(area, data.draw_object(outline, *dataset._size[n]).sum())
               for n in dataset.ids for area, _, outline in dataset._objects[n] if area >= 1000]
    area, pixels = np.array(objects).T
    # the JSON's area is signed: outlines that cross themselves have less of it than pixels
    assert (abs(pixels / area - 1) < 0.03).mean() > 0.9 and (pixels / area).min() > 0.98


# ---------------------------------------------------------------------------------------------------------------------
# python test_aream.py: the speed table
# ---------------------------------------------------------------------------------------------------------------------
def measure(kind, batch=16, size=224, depth=12, steps=5):
    """Seconds (the least of steps) and extra peak MiB of one training step of DeiT-Tiny, in a process of its own."""
    torch.set_num_threads(THREADS)
    device = torch.device("cpu")  # on a GPU: --profile
    labels = torch.zeros(batch, 20)
    labels[torch.arange(batch), torch.arange(batch) % 20] = labels[::2, 3] = 1  # 1.5 classes an image, as in VOC
    pixels = F.interpolate(torch.rand(batch, 3, 9, 9), size=(size, size), mode="bilinear").mul(255).byte()
    args = train_cls.parse_args(["--labels", "shared" if kind == "shared" else "two-views", "--drop-path", "0"])
    if kind == "torchvision":
        model = torchvision.models.VisionTransformer(size, 16, depth, 3, 192, 768)
    else:
        model = vit.build("deit_tiny", 1 if kind == "same size" else 20, depth=depth, image_size=size)
    optimizer, layers, seconds = torch.optim.AdamW(model.parameters()), aream.coupled_layers(depth), []
    before = data.peak_memory(device)
    for _ in range(steps + 1):
        begin = time.perf_counter()
        if kind in ("torchvision", "same size", "naive"):
            loss = (naive_step(model, pixels, labels, args, layers)[1] if kind == "naive" else
                    model(data.normalise(pixels)).square().mean() if kind == "torchvision" else
                    model(data.normalise(pixels)).class_logits.square().mean())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            train_cls.train_step(model, optimizer, (pixels, labels), args, kind != "plain", layers)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:]), data.peak_memory(device) - before


def alone(*given, **named):
    """measure() in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *given, **named).result()


def compare(slow, fast, repeats=5):
    """Least seconds of two functions, called in turn (as timeit advises: what is above the least is other load)."""
    seconds = [[], []]
    for _ in range(repeats + 1):
        for function, kept in zip((slow, fast), seconds):
            begin = time.perf_counter()
            function()
            kept.append(time.perf_counter() - begin)
    return [min(kept[1:]) for kept in seconds]


@torch.no_grad()
def speed_table(folder):
    """Print what README.md shows under Speed. folder: for files, thrown away."""
    torch.set_num_threads(THREADS)
    row = lambda *cells: print(f"| {' | '.join(cells)} |", flush=True)
    row("DeiT-Tiny, 224 px, batch 16", "naive", "this code", "ratio", "target")
    row(*["---"] * 5)
    naive, plain, both, shared = (alone(kind) for kind in ("naive", "plain", "two-views", "shared"))
    row("AReAM training step", f"{naive[0]:.2f} s", f"{both[0]:.2f} s", f"{naive[0] / both[0]:.1f}x faster", "4x")
    row("the same with `--labels shared`", f"{naive[0]:.2f} s", f"{shared[0]:.2f} s", f"{naive[0] / shared[0]:.1f}x faster", "")
    extra = naive[1] - plain[1], both[1] - plain[1]
    row(f"its peak memory over the plain step's {plain[1]:.0f} MiB", f"{extra[0]:.0f} MiB", f"{extra[1]:.0f} MiB",
        f"{extra[1] / extra[0]:.2f} of it", "0.33")
    labels = torch.zeros(16, 20)
    labels[torch.arange(16), torch.arange(16)] = labels[::2, 3] = 1
    images, cam = torch.rand(16, 3, 224, 224), torch.rand(16, 20, 112, 112) * labels[..., None, None]
    slow, fast = compare(lambda: [naive_pseudo_label(*one) for one in zip(images, cam, labels)],
                         lambda: pseudo_label(images, cam, labels))
    row("PAR of a batch, both thresholds", f"{slow:.2f} s", f"{fast:.2f} s", f"{slow / fast:.1f}x faster", "10x")
    model, pixels = vit.build("deit_tiny", 20).eval(), torch.randint(0, 256, (3, 240, 320), dtype=torch.uint8)

    def naive_inference():
        cam, _ = naive_cam(model, data.normalise(pixels[None]), range(12), "uniform", labels[:1])
        small = F.interpolate(cam, size=(60, 80), mode="bilinear", align_corners=False)
        naive_pseudo_label(pixels / 255, aream.normalise_cam(small, labels[:1])[0], labels[0])

    slow, fast = compare(naive_inference, lambda: refine.pseudo_mask(
        pixels, [0, 3], refine.seed_cams(model, pixels, [0, 3], {"seed": tuple(range(12))})["seed"]), 7)
    row("CAM and PAR inference, 320 px", f"{1 / slow:.1f} images/s", f"{1 / fast:.1f} images/s", f"{slow / fast:.1f}x faster", "3x")
    voc = make_voc(folder, [f"{i:02}" for i in range(20)], (375, 500))
    dataset = data.open_data("VOC2012", folder, "train")
    for name in dataset.ids:
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
        photo.resize((500, 375), Image.BICUBIC).save(voc / "JPEGImages" / f"{name}.jpg")
        data.write_cam(folder / "cam" / f"{name}.npz", [14], torch.rand(1, 94, 125), (375, 500))

    def naive_sweep():
        for threshold in evaluate.THRESHOLDS:
            confusion = 0
            for name in dataset.ids:
                ids, cam, size = data.read_cam(folder / "cam" / f"{name}.npz")
                cam = F.interpolate(cam[None], size=size, mode="bilinear", align_corners=False)[0]
                best, winner = cam.max(0)
                mask = torch.where(best > threshold, data.mask_value(ids)[winner], 0)
                confusion = confusion + evaluate.confusion_matrix(mask, torch.from_numpy(dataset.mask(name)), 21)
            evaluate.scores(confusion)

    slow, fast = compare(naive_sweep, lambda: evaluate.summarise(evaluate.evaluate_cams(dataset, folder / "cam", "")), 1)
    row("threshold sweep, 101 thresholds, 20 images", f"{slow:.1f} s", f"{fast:.2f} s", f"{slow / fast:.0f}x faster", "30x")
    slow, fast = alone("torchvision", steps=5)[0], alone("same size", steps=5)[0]
    row("plain step (against torchvision's ViT, 197 tokens)", f"{slow:.2f} s", f"{fast:.2f} s", f"{fast / slow:.2f} of it", "1.1")
    rates = []
    for cache_gb in (0, 4):
        batches = data.TrainingBatches(dataset, 224, 4, 0, 0, torch.device("cpu"), cache_gb)
        next(iter(batches))  # decodes
        begin = time.perf_counter()
        for epoch in range(4):
            batches.set_epoch(epoch)
            count = sum(len(images) for images, _ in batches)
        rates.append(4 * count / (time.perf_counter() - begin))
    row("loading and augmenting (against decoding 500 px JPEGs)", *(f"{rate:.0f} images/s" for rate in rates),
        f"{rates[1] / rates[0]:.1f}x faster", "")
    print()
    row("one step", "plain", "AReAM", "ratio of the times")
    row(*["---"] * 4)
    for given in (dict(batch=4), dict(batch=8), dict(batch=16), dict(batch=32), dict(batch=4, size=384), dict(batch=4, size=448),
                  dict(depth=6), dict(depth=9)):
        plain, both = alone("plain", **given), alone("two-views", **given)
        point = {"batch": 16, "size": 224, "depth": 12, **given}
        row(f"batch {point['batch']}, {point['size']} px ({(point['size'] // 16)**2} patches), {point['depth']} layers",
            *(f"{t:.2f} s, {m:.0f} MiB" for t, m in (plain, both)), f"{both[0] / plain[0]:.1f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        speed_table(Path(temporary))

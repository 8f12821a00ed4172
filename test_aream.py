"""Sanity checks on small synthetic inputs, CPU only:  make test  (or: python -m pytest -q test_aream.py)

In order: the paper's formulas by hand; the ViT; refinement and scores; the naive rendering; whole stages; everyday data;
broken files; resuming and processes; a pretended GPU; real data (AREAM_DATA=<folder that holds VOCdevkit and COCO2014>).
python test_aream.py prints the speed table of results/README.md.
"""
import contextlib
import hashlib
import http.server
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
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
from torch._subclasses.fake_tensor import FakeTensorMode
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
real = pytest.mark.skipif(not REAL, reason="AREAM_DATA is not set")
TINY = ["--data", "toy", "--workers", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand_affinity(B, N, L=3):
    return tuple(torch.randn(B, N, N).softmax(-1) for _ in range(L))


# -------------------------------------------------------------------------------------------------
# The paper's formulas, by loops and by hand
# -------------------------------------------------------------------------------------------------
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
            assert got[b, l].item() == pytest.approx(-sum(v * math.log2(v) for v in p.tolist()),
                                                     abs=1e-5)


def test_reactivation_weights_by_hand():
    w, w_hat = aream.reactivation_weights(
        torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 3.0], [3.0, 3.004, 3.008]]))
    torch.testing.assert_close(w_hat, torch.tensor([[0, 0.25, 1.0], [0, 0, 0],
                                                    [0, 0, 0]]))  # 0.008 bits: a tie
    torch.testing.assert_close(w, 1 - w_hat)
    w, w_hat = aream.reactivation_weights(torch.tensor([1.0, 2.0]), "uniform")
    assert w.tolist() == w_hat.tolist() == [1, 1]
    w, w_hat = aream.reactivation_weights(torch.tensor([1.0, 2.0]), "none")
    assert w.tolist() == [1, 1] and w_hat.tolist() == [0, 0]
    with pytest.raises(ValueError, match="reactivation 'some'"):
        aream.reactivation_weights(torch.tensor([1.0]), "some")


def test_guided_cam_against_a_loop():
    cam, affinity, w = torch.rand(2, 3, 2, 2), rand_affinity(2, 7), torch.rand(2, 3)
    got = aream.guided_cam(cam, affinity, w, [0, 2])
    for b in range(2):
        for c in range(3):
            drawn = torch.stack([a[b, c, 3:] for a in affinity]).mean(0)
            attended = cam[b, c].flatten() * drawn
            for m in range(4):
                expected = sum(w[b, l] * affinity[l][b, 3 + m, 3 + n] * attended[n] for l in (0, 2)
                               for n in range(4)) / 2
                assert got[b, c].flatten()[m].item() == pytest.approx(expected.item(), rel=1e-5)


def test_affinity_label_by_hand():
    mask = torch.tensor([[[0, 0, 5, 5], [0, 0, 5, 5], [255, 255, 0, 0], [9, 255, 0, 5]]])
    # patch centres of the 2 x 2 grid are the pixels (1, 1), (1, 3), (3, 1), (3, 3): 0, 5, 255, 5
    expected = torch.tensor([[1, 0, 255, 0], [0, 1, 255, 1], [255] * 4, [0, 1, 255, 1]])
    assert torch.equal(aream.affinity_label(mask, (2, 2))[0], expected)


def test_affinity_loss_against_a_loop():
    prob, label, weight = torch.rand(2, 4,
                                     4), torch.tensor([0, 1, 255
                                                       ])[torch.randint(0, 3,
                                                                        (2, 4, 4))], torch.rand(2)
    n1, n0 = (label == 1).sum().item(), (label == 0).sum().item()
    plain = weighted = 0.0
    for b in range(2):
        for p, y in zip(prob[b].flatten().tolist(), label[b].flatten().tolist()):
            term = 0.5 * (1 - p) / (n1 + 1) if y == 1 else 0.5 * p / (n0 + 1) if y == 0 else 0.0
            plain, weighted = plain + term, weighted + term * weight[b].item()
    assert aream.affinity_loss(prob, label).item() == pytest.approx(plain, rel=1e-5)
    one_layer = aream.aream_loss((prob.logit(), ), label, weight[:, None],
                                 [0])  # the weight of each image
    assert one_layer.item() == pytest.approx(weighted, rel=1e-5)
    assert aream.affinity_loss(prob, torch.full_like(label, 255)).item() == 0.0
    logits = tuple(torch.randn(2, 6, 6) for _ in range(3))
    w_hat = torch.tensor([0.2, 0.5, 1.0])
    expected = sum(w_hat[l] * aream.affinity_loss(logits[l][:, 2:, 2:].sigmoid(), label)
                   for l in (1, 2)) / 2
    torch.testing.assert_close(aream.aream_loss(logits, label, w_hat, [1, 2]), expected)


# -------------------------------------------------------------------------------------------------
# The ViT, PAR, and the smallest pipeline
# -------------------------------------------------------------------------------------------------
def copy_to_torchvision(ours, theirs):
    """Block weights of our ViT into torchvision's VisionTransformer."""
    state = {}
    names = {
        "norm1": "ln_1", "norm2": "ln_2", "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"
    }
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
    theirs = torchvision.models.VisionTransformer(image_size=64, patch_size=8, num_layers=6,
                                                  num_heads=3, hidden_dim=96, mlp_dim=384,
                                                  num_classes=2).double().eval()
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
        per_head = torch.stack([
            qh @ kh.transpose(1, 2) / math.sqrt(32)
            for qh, kh in zip(q.split(32, -1), k.split(32, -1))
        ])
    torch.testing.assert_close(logits, per_head.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(affinity, per_head.softmax(-1).mean(0))
    assert (affinity - logits.softmax(-1)).abs().max() > 1e-3  # the two do not commute


def test_gradient_reaches_every_parameter():
    model = vit.build("toy", 3)
    out = model(torch.randn(2, 3, 64, 64), "logits")
    loss = aream.classification_loss(out.class_logits, out.patch_logits,
                                     torch.tensor([[1.0, 0, 1], [0, 1, 0]]))
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def naive_par(image, score, dilations, iterations):
    """PAR of one image as the formula reads: loops over pixels and neighbours."""
    _, H, W = image.shape
    offsets = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)
               if dy or dx]
    at = lambda y, x: (min(max(y, 0), H - 1), min(max(x, 0), W - 1))
    length = torch.tensor([math.hypot(*o) for o in offsets])
    place = (-((length / length.std()) / 0.3)**2).softmax(0)
    kernel = {}
    for y in range(H):
        for x in range(W):
            near = torch.stack([image[(slice(None), *at(y + dy, x + dx))]
                                for dy, dx in offsets])  # (n, 3)
            step = ((near - image[:, y, x]).abs() / (near.std(0) + 1e-8) / 0.3)**2
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
        torch.testing.assert_close(got[b], naive_par(images[b], score[b], (1, 3), 2), atol=1e-5,
                                   rtol=1e-4)


def test_the_smallest_pipeline(tmp_path, capsys):
    common = [*TINY, "--out", str(tmp_path), "--limit", "8"]
    train_cls.main([
        *common, "--batch", "4", "--epochs", "2", "--warmup-epochs", "1", "--depth", "3",
        "--deep-from", "1"
    ])
    refine.main(common)
    train_seg.main([*common, "--batch", "4", "--epochs", "1"])
    for what in ("cam", "pseudo", "pred"):
        evaluate.main([*common, "--what", what])
    records = data.read_json(tmp_path / "results.json", "")
    assert [r["what"] for r in records] == ["cam", "pseudo", "pred"]
    assert all(0 <= r[key] <= 100 for r, key in zip(records, ("fixed", "labelled", "miou")))
    assert "val_class_mAP" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------
# More of aream.py and model.py
# -------------------------------------------------------------------------------------------------
def test_layer_entropy_at_its_ends():
    labels = torch.ones(1, 1)
    uniform = torch.full((1, 4, 4), 0.25)
    peaked = torch.zeros(1, 1, 2, 2)
    peaked[0, 0, 0, 0] = 1e4
    entropy = aream.layer_entropy(peaked, (uniform, torch.eye(4)[None]), labels)
    assert entropy[0, 0].item() == pytest.approx(2.0,
                                                 abs=1e-6)  # spread evenly over 4 patches: 2 bits
    assert entropy[0, 1].item() == 0.0  # one patch keeps it all: p = 0 elsewhere, no nan
    assert aream.layer_entropy(torch.zeros(1, 1, 2, 2), (uniform, ),
                               labels).item() == pytest.approx(2.0)


def test_row_distance_and_top_share():
    P = 40
    uniform, identity = torch.full((1, P, P), 1 / P), torch.eye(P)[None]
    column = torch.zeros(1, P, P)
    column[:, :, 3] = 1  # every patch draws from one: collapsed
    affinity = torch.cat([uniform, identity, column])
    torch.testing.assert_close(aream.row_distance(affinity), torch.tensor([0.0, 1.0, 0.0]),
                               atol=1e-3, rtol=0)
    torch.testing.assert_close(aream.top_share(affinity), torch.tensor([0.05, 0.05, 1.0]))
    rows = torch.rand(1, 5, 5)
    p = (rows / rows.sum(-1, keepdim=True))[0]
    pairs = [
        math.sqrt(1 - sum(math.sqrt(p[m, n] * p[k, n]) for n in range(5))) for m in range(5)
        for k in range(5) if m != k
    ]
    assert aream.row_distance(rows).item() == pytest.approx(sum(pairs) / 20, rel=1e-4)
    assert aream.row_distance(torch.ones(1, 1, 1)).item() == 0 == aream.row_distance(
        torch.zeros(1, 1, 1)).item()


def test_coupled_layers():
    assert aream.coupled_layers(12) == (range(12), range(12))
    assert aream.coupled_layers(12, "split", 7) == (range(7), range(7, 12))
    with pytest.raises(ValueError, match="--deep-from 6 with 6 layers"):
        aream.coupled_layers(6, "split", 6)


def test_normalise_cam():
    cam = torch.tensor([[[[-1.0, 1.0], [2.0, 4.0]], [[3.0, 3.0], [3.0, 3.0]],
                         [[0.0, 1.0], [1.0, 1.0]]]])
    got = aream.normalise_cam(cam, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(got[0, 0], torch.tensor([[0, 0.25], [0.5, 1.0]]))
    assert not got[0, 1:].any()  # constant, and absent


def test_learning_rate_against_the_release():
    """5 of 60 epochs of linear warm-up from 1e-6, then timm's cosine from 6.25e-5 to 1e-5."""
    top, low, start = 6.25e-5, 1e-5, 1e-6
    for epoch in range(60):
        expected = start + epoch * (top - start) / 5 if epoch < 5 else low + 0.5 * (top - low) * (
            1 + math.cos(math.pi * epoch / 60))
        assert top * train_cls.schedule(epoch / 60) == pytest.approx(expected, rel=1e-6)


def test_forward_shapes_and_capture_modes():
    model = vit.build("toy", 5, depth=3).eval()
    for H, W in ((64, 64), (32, 88)):
        images, N = torch.randn(2, 3, H, W), 5 + H * W // 64
        plain, full = model(images), model(images, True)
        assert plain.class_logits.shape == plain.patch_logits.shape == (2, 5)
        assert plain.cam.shape == (2, 5, H // 8,
                                   W // 8) and plain.cam.min() >= 0 and not plain.cam.requires_grad
        assert plain.affinity == plain.affinity_logits == ()
        assert [a.shape
                for a in full.affinity] == [a.shape
                                            for a in full.affinity_logits] == [(2, N, N)] * 3
        torch.testing.assert_close(full.affinity[0].sum(-1), torch.ones(2, N))
        assert not full.affinity[0].requires_grad and full.affinity_logits[0].requires_grad
        assert model(images, "logits").affinity == () and model(images,
                                                                "affinity").affinity_logits == ()
        with torch.no_grad():
            torch.testing.assert_close(
                model(images, "affinity").class_logits, plain.class_logits, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(full.patch_logits, plain.patch_logits, atol=1e-5, rtol=1e-4)


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


def test_position_embeddings_are_resized_as_torch_does():
    embedding = torch.randn(1, 6 * 5, 7)
    for new in ((9, 4), (6, 5), (1, 1), (12, 10)):
        expected = F.interpolate(
            embedding.unflatten(1, (6, 5)).permute(0, 3, 1, 2), size=new, mode="bicubic")
        got = vit.resize_position_embedding(embedding, (6, 5), new)
        torch.testing.assert_close(got, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def deit_state(depth=12, dim=192, classes=1000):
    """A random checkpoint with DeiT-Tiny's keys."""
    state = {
        "cls_token": torch.randn(1, 1, dim), "pos_embed": torch.randn(1, 197, dim),
        "patch_embed.proj.weight": torch.randn(dim, 3, 16,
                                               16), "patch_embed.proj.bias": torch.randn(dim),
        "norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim),
        "head.weight": torch.randn(classes, dim), "head.bias": torch.zeros(classes)
    }
    for i in range(depth):
        for name, shape in {
                "norm1.weight": (dim, ), "norm1.bias": (dim, ), "attn.qkv.weight": (3 * dim, dim),
                "attn.qkv.bias": (3 * dim, ), "attn.proj.weight": (dim, dim),
                "attn.proj.bias": (dim, ), "norm2.weight": (dim, ), "norm2.bias": (dim, ),
                "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim, ),
                "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim, )
        }.items():
            state[f"blocks.{i}.{name}"] = torch.randn(shape)
    return state


def test_deit_checkpoints(tmp_path):
    state = deit_state()
    for form in (state, {"model": {k: v.half()
                                   for k, v in state.items()}},
                 {"state_dict": {f"module.{k}": v
                                 for k, v in state.items()}}):
        torch.save(form, tmp_path / "deit.pth")
        model = vit.build("deit_tiny", 20, depth=8)
        vit.load_pretrained(model, tmp_path / "deit.pth")
        assert torch.equal(model.class_tokens[0, 7], model.class_tokens[0, 0]) and len(
            model.blocks) == 8
        torch.testing.assert_close(model.class_tokens[0, 3], state["cls_token"][0, 0], atol=2e-3,
                                   rtol=2e-3)
        torch.testing.assert_close(model.class_pos_embed[0, 5], state["pos_embed"][0, 0],
                                   atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(model.patch_pos_embed, state["pos_embed"][:, 1:], atol=2e-3,
                                   rtol=2e-3)
        assert model.blocks[0].norm1.weight.dtype == torch.float32
    bigger = vit.build("deit_tiny", 20, image_size=256)
    vit.load_pretrained(bigger, state)
    assert bigger.patch_pos_embed.shape == (1, 256, 192)


class Namespace:
    """A stand-in for argparse.Namespace, which authors save beside their weights."""


def test_wrong_weights_are_refused(tmp_path):
    model, small = vit.build("deit_tiny", 20), deit_state()
    del small["blocks.3.norm1.weight"]
    for state, message in (
        (deit_state(dim=384), r"does not hold weights for deit_tiny: '\S+' is \(.*384.*\), "
         r"which does not make \(.*192.*\); give"),
        (small, "does not hold weights for deit_tiny: it has no 'blocks.3.norm1.weight'"),
        ({**deit_state(), "dist_token": torch.zeros(1, 1, 192)}, "is a distilled DeiT .it has a "
                                                                 "dist_token"), ({"fc.weight": torch.zeros(3)},
                           r"it has no .* \(its first keys: fc.weight\)")):
        with pytest.raises(ValueError, match=message):
            vit.load_pretrained(model, state)
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing.pth.*--pretrained"):
        vit.load_pretrained(model, tmp_path / "nothing.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="broken.pth is not a readable weights file"):
        vit.load_pretrained(model, tmp_path / "broken.pth")
    torch.save({"model": deit_state(), "args": Namespace()}, tmp_path / "code.pth")
    with pytest.raises(
            ValueError, match=r"code.pth wants to run code \(.*Namespace\), which is "
            r"refused: load it where you trust it"):
        vit.load_pretrained(model, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="no public weights for preset 'toy'"):
        vit.load_pretrained(vit.build("toy", 2), "auto")


@pytest.mark.parametrize("problem", [OSError("no route"), RuntimeError("invalid hash value")])
def test_download_failure_names_the_remedy(monkeypatch, problem):
    def offline(url, **kwargs):
        assert url == vit.DEIT_URLS["deit_tiny"] and kwargs["weights_only"] and kwargs["check_hash"]
        raise problem

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=f"could not download .*{problem}.*--pretrained "
                       f"PATH"):
        vit.load_pretrained(vit.build("deit_tiny", 20), "auto")


def test_bad_model_arguments():
    model = vit.build("toy", 2)
    with pytest.raises(ValueError, match="image size 60 x 64 is not a multiple of the patch size "
                       "8"):
        model(torch.zeros(1, 3, 60, 64))
    with pytest.raises(ValueError, match="unknown preset 'vgg'"):
        vit.build("vgg", 2)
    with pytest.raises(ValueError, match="depth 13: deit_tiny has 1 to 12 blocks"):
        vit.build("deit_tiny", 2, depth=13)
    with pytest.raises(ValueError, match="image size 70"):
        vit.build("toy", 2, image_size=70)


# -------------------------------------------------------------------------------------------------
# More of refine.py, and evaluate.py
# -------------------------------------------------------------------------------------------------
def test_par_invariants():
    images = torch.rand(2, 3, 20, 30)
    torch.testing.assert_close(refine.par_kernel(images).sum(1), torch.full((2, 20, 30), 1.01))
    constant = refine.pixel_adaptive_refine(images, torch.ones(2, 1, 20, 30), iterations=10)
    torch.testing.assert_close(constant, torch.full_like(constant, 1.01**10), rtol=1e-4, atol=0)
    large = torch.rand(3, 3, 150, 120)  # more than one chunk gives what single images give
    one = [refine.pixel_adaptive_refine(i[None], i[None, :1], iterations=2) for i in large]
    torch.testing.assert_close(refine.pixel_adaptive_refine(large, large[:, :1], iterations=2),
                               torch.cat(one))
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


def test_a_fused_par_iteration_is_the_same(monkeypatch):
    """What torch.compile makes of it; on CUDA it is what runs."""
    pytest.importorskip("torch._inductor")
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("compiling for a CPU needs a C++ compiler")
    images, score = torch.rand(2, 3, 12, 10), torch.rand(2, 3, 12, 10)
    kernel = refine.par_kernel(images, (1, 2))
    for K in (3, 2):  # another number of classes
        plain = refine.par_iteration(score[:, :K], kernel, (1, 2))
        torch.testing.assert_close(refine.fused_iteration()(score[:, :K], kernel, (1, 2)), plain,
                                   atol=1e-5, rtol=0)


def test_random_walk():
    score, affinity = torch.rand(1, 2, 2, 2), torch.rand(1, 4, 4)
    plain = refine.random_walk(score, affinity)  # one step: rows as they are
    for c in range(2):
        for m in range(4):
            expected = sum(affinity[0, m, n] * score[0, c].flatten()[n] for n in range(4))
            assert plain[0, c].flatten()[m].item() == pytest.approx(expected.item(), rel=1e-5)
    transition = affinity[0]**2 / (affinity[0]**2).sum(1, keepdim=True)
    expected = (transition @ transition @ transition @ score[0].flatten(1).T).T.view(2, 2, 2)
    torch.testing.assert_close(refine.random_walk(score, affinity, beta=2.0, steps=3)[0], expected)
    torch.testing.assert_close(refine.random_walk(score, torch.eye(4)[None], steps=5), score)
    with pytest.raises(ValueError, match="steps -1"):
        refine.random_walk(score, affinity, steps=-1)


def pseudo_label(images, cam, labels, *more):
    """refine.pseudo_label with the CAMs of all classes, present or not."""
    class_ids, present = refine.present_classes(labels)
    return refine.pseudo_label(images, cam[torch.arange(len(cam))[:, None], class_ids], class_ids,
                               present, *more)


def test_pseudo_label():
    images = torch.full((2, 3, 64, 64), 0.5) + 0.01 * torch.randn(2, 3, 64, 64)
    cam, labels = torch.zeros(2, 4, 64, 64), torch.tensor([[0, 0, 1.0, 0], [1.0, 0, 0, 1]])
    images[:, :, :, 32:] += 0.3
    cam[0, 2, :, 32:] = 1.0
    cam[0, 1] = 1.0  # an absent class, whatever its score, is never chosen
    cam[1, 0, :, :32] = 1.0
    cam[1, 3, :, 32:] = 1.0
    got = pseudo_label(images, cam, labels)
    assert set(got[0, :, :24].unique().tolist()) == {0} and set(got[0, :,
                                                                    40:].unique().tolist()) == {3}
    assert set(got[1, :, :24].unique().tolist()) == {1} and set(got[1, :,
                                                                    40:].unique().tolist()) == {4}
    band = pseudo_label(images, cam * 0.45, labels)
    assert set(band[0, :,
                    40:].unique().tolist()) == {255}  # above the low score, below the high one
    assert 255 not in pseudo_label(images, cam * 0.45, labels, 0.4, 0.4)
    raw = pseudo_label(images, F.pad(cam[..., 1:-1, 1:-1], [1] * 4), labels, 0.5, 0.5,
                       0)  # no PAR: what the CAM says, at half size
    assert torch.equal(raw[0, 4:-4, 36:-4], torch.full(
        (56, 24), 3)) and torch.equal(raw[0, :, :28],
                                      torch.zeros(64, 28).long())
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
    got = refine.seed_cams(model, pixels, [0, 2], {"raw": (), "all": tuple(range(6))},
                           scales=(0.5, 1))
    assert {k: v.shape for k, v in got.items()} == {"raw": (2, 13, 18), "all": (2, 13, 18)}
    assert all(0 <= v.min() and v.max() <= 1
               for v in got.values()) and not torch.equal(got["raw"], got["all"])
    square = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    one, other = (refine.seed_cams(model, p, [1], {"s": (0, 1)})["s"]
                  for p in (square, square.flip(-1)))
    torch.testing.assert_close(one, other.flip(-1), atol=1e-4, rtol=1e-3)  # both views are seen


def test_seed_cams_weighted_by_entropy():
    model, seen = vit.build("toy", 3).eval(), []
    torch.nn.init.normal_(
        model.head.weight)  # CAMs large enough to tell the layers' entropies apart
    square = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    variants = {"s": "entropy", "all": tuple(range(6))}
    weighted = refine.seed_cams(model, square, [1], variants, observe=seen.append)
    (output, ), both = seen, 0
    for view, turn in ((0, lambda x: x),
                       (1,
                        lambda x: x.flip(-1))):  # by hand: each layer times 1 - e, e of this view
        affinity = [a[view:view + 1] for a in output.affinity]
        entropy = aream.layer_entropy(output.cam[view:view + 1], affinity,
                                      torch.tensor([[0, 1.0, 0]]))[0]
        assert entropy.max() - entropy.min() > 0.01
        w = 1 - (entropy - entropy.min()) / (entropy.max() - entropy.min())
        mean = sum(w[l] * affinity[l][0, 3:, 3:] for l in range(6))
        attended = aream.class_attended_cam(output.cam, output.affinity)[view, 1].flatten()
        both = both + turn(
            F.interpolate((mean @ attended).view(1, 1, 8, 8), size=(64, 64), mode="bilinear"))
    both = F.interpolate(both, size=(16, 16), mode="bilinear")
    torch.testing.assert_close(weighted["s"],
                               aream.normalise_cam(both, torch.ones(1, 1))[0], atol=1e-4,
                               rtol=1e-3)
    assert not torch.equal(weighted["s"], weighted["all"])
    seen.clear()
    refine.seed_cams(model, square, [1], {"s": ()}, scales=(0.5, 1, 1.5), observe=seen.append)
    assert [output.cam.shape[-1] for output in seen] == [8]  # the view of scale 1 alone


def test_layers_on_the_command_line():
    assert refine.parse_layers("0-2,5", 6) == (0, 1, 2, 5) and refine.parse_layers("none", 6) == ()
    assert refine.parse_layers("entropy", 6) == "entropy" and refine.parse_layers("all",
                                                                                  3) == (0, 1, 2)
    for text in ("3-9", "x", "5-3", "-1"):
        with pytest.raises(ValueError, match=f"--layers '{text}'"):
            refine.parse_layers(text, 6)


@pytest.mark.parametrize("size", [(1, 1), (20, 5000), (3, 400)])
def test_extreme_image_sizes(size):
    model = vit.build("toy", 2, depth=1).eval()
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    cam = refine.seed_cams(model, pixels, [1], {"seed": (0, )}, scales=(0.5, 1))["seed"]
    mask = refine.pseudo_mask(pixels, [1], cam)
    assert mask.shape == size and set(mask.unique().tolist()) <= {0, 2, 255
                                                                  } and torch.isfinite(cam).all()


def test_confusion_and_scores_by_hand():
    target = torch.tensor([[0, 0, 1], [1, 255, 1]])
    prediction = torch.tensor([[0, 1, 1], [1, 2, 0]])
    confusion = evaluate.confusion_matrix(prediction, target, 3)
    assert confusion.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]
                                  ] and confusion.dtype == torch.int64
    result = evaluate.scores(confusion)
    assert result["iou"][:2].tolist() == pytest.approx([1 / 3, 2 / 4]) and result["iou"][2].isnan()
    assert result["miou"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result["precision"][1].item() == pytest.approx(
        2 / 3) and result["recall"][0].item() == pytest.approx(1 / 2)
    assert evaluate.scores(confusion, torch.tensor([2, 0,
                                                    0]))["iou"][0].item() == pytest.approx(1 / 5)
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


def test_rank_correlation_of_entropy_and_miou():
    def table(*miou):
        return {
            "unrefined": {"fixed": 99.0},
            **{f"layer {l}": {"fixed": m}
               for l, m in enumerate(miou)}
        }

    state = {"entropy": [5.0, 5.5, 6.0, 9.0]}
    assert evaluate.rank_correlation(table(60.0, 50.0, 49.0, 1.0), state,
                                     "fixed") == pytest.approx(-1)
    assert evaluate.rank_correlation(table(1.0, 2.0, 3.0, 4.0), state, "fixed") == pytest.approx(1)
    assert evaluate.rank_correlation(table(20.0, 30.0, 40.0, 10.0), state,
                                     "fixed") == pytest.approx(-0.2)  # 1 - 6 * 12 / 60


# -------------------------------------------------------------------------------------------------
# The naive rendering: every head kept, a second pass for the labels, PAR image by image and
# threshold by threshold
# -------------------------------------------------------------------------------------------------
def naive_forward(model, images):
    """Class logits, patch logits, patch map, and all heads' logits and attention, (L, B, A, N, N)
    each.
    """
    B, C, A, grid = len(images), model.num_classes, model.blocks[0].attn.heads, [
        s // model.patch for s in images.shape[2:]
    ]
    patches = model.patch_embed(images).flatten(2).transpose(1, 2) + model.position_embedding(
        tuple(grid))
    x = torch.cat([(model.class_tokens + model.class_pos_embed).expand(B, -1, -1), patches], 1)
    logits, prob = [], []
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, A,
                                                      -1).permute(2, 0, 3, 1, 4)
        logits.append(q @ k.transpose(-2, -1) / q.shape[-1]**0.5)
        prob.append(logits[-1].softmax(-1))
        x = x + block.drop_path(block.attn.proj((prob[-1] @ v).transpose(1, 2).flatten(2)))
        x = x + block.drop_path(block.mlp(block.norm2(x)))
    patch_map = model.head(x[:, C:].transpose(1, 2).unflatten(2, grid))
    return x[:, :C].mean(-1), patch_map.mean(
        (2, 3)), patch_map, torch.stack(logits), torch.stack(prob)


def naive_neighbours(x):
    """(K, H, W) -> (K, 48, H, W)."""
    padded = F.pad(x[None], [24] * 4, mode="replicate")[0]
    H, W = x.shape[-2:]
    return torch.stack([
        padded[:, 24 + dy * d:24 + dy * d + H, 24 + dx * d:24 + dx * d + W]
        for d in refine.DILATIONS for dy, dx in refine.NEIGHBOURS
    ], 1)


def naive_batch_par(image, score):
    """PAR of one image (3, H, W) and its scores (K, H, W), all neighbours of everything at once.
    """
    near = naive_neighbours(image)
    colour = -((near - image[:, None]).abs() /
               (near.std(1, keepdim=True) + 1e-8) / 0.3).square().mean(0)
    length = torch.tensor(
        [math.hypot(dy * d, dx * d) for d in refine.DILATIONS for dy, dx in refine.NEIGHBOURS])
    place = -(length / (length.std() + 1e-8) / 0.3).square()
    kernel = colour.softmax(0) + 0.01 * place.softmax(0)[:, None, None]
    for _ in range(10):
        score = (naive_neighbours(score) * kernel).sum(1)
    return score


def naive_pseudo_label(image, cam, label, low=0.35, high=0.55):
    """One image (3, H, W) in [0, 1], cam (C, h, w), label (C,) -> (H, W)."""
    H, W = image.shape[-2:]
    resize = lambda x, size: F.interpolate(x[None], size=size, mode="bilinear", align_corners=False
                                           )[0]
    small, classes, maps = resize(image, (H // 2, W // 2)), label.nonzero()[:, 0], []
    values = torch.cat([torch.zeros(1, dtype=torch.int64), classes + 1])
    for beta in (low, high):
        score = resize(cam[classes], (H // 2, W // 2))
        score = torch.cat([torch.full_like(score[:1], beta), score]).softmax(0)
        maps.append(values[resize(naive_batch_par(small, score), (H, W)).argmax(0)])
    return torch.where(maps[1] > 0, maps[1], torch.where(maps[0] > 0, 255, 0))


def naive_cam(model, images, guide, kind, labels):
    """Guided CAM (B, C, gh, gw) of normalised images with entropy weights averaged with the mirror
    image, and w_hat (B, L).
    """
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
    guided = torch.stack([
        torch.stack([w[b % B, l] * S[l, b] for l in guide]).mean(0) @ attended[b].T
        for b in range(2 * B)
    ])
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
        cam = aream.normalise_cam(
            F.interpolate(cam, size=half, mode="bilinear", align_corners=False), labels)
        masks = [naive_pseudo_label(p.float() / 255, c, y) for p, c, y in zip(pixels, cam, labels)]
        label = torch.cat(
            [aream.affinity_label(m[None], [s // model.patch for s in m.shape]) for m in masks])
    class_logits, patch_logits, _, logits, _ = naive_forward(model, images)
    prob = logits.mean(2)[:, :, C:, C:].sigmoid()
    n1, n0, total = (label == 1).sum(), (label == 0).sum(), 0
    for l in supervised:
        attract = ((1 - prob[l]) * (label == 1)).sum((1, 2)) / (n1 + 1)
        repel = (prob[l] * (label == 0)).sum((1, 2)) / (n0 + 1)
        total = total + (w_hat[:, l] * (0.5 * attract + 0.5 * repel)).sum() / len(supervised)
    return label, aream.classification_loss(class_logits, patch_logits,
                                            labels) + args.affinity_weight * total


def toy_batch(count):
    dataset = data.open_data("toy", None, "train", count)
    pixels = torch.stack([
        torch.from_numpy(np.asarray(dataset.image(n)).copy()).permute(2, 0, 1) for n in dataset.ids
    ])
    return dataset, pixels, torch.stack([dataset.label_vector(n) for n in dataset.ids])


@pytest.mark.parametrize("coupling, kind", [("all", "entropy"), ("split", "uniform")])
def test_step_equals_the_naive_rendering(coupling, kind):
    _, pixels, labels = toy_batch(3)
    args = train_cls.parse_args(["--data", "toy", "--reactivation", kind])
    model, layers = vit.build("toy", 6, depth=4), aream.coupled_layers(4, coupling, 2)
    torch.nn.init.normal_(
        model.head.weight)  # CAMs large enough to tell the layers' entropies apart
    label, w_hat, _ = train_cls.make_labels(train_cls.label_pass(model, pixels, "float32"), pixels,
                                            labels, layers[0], kind)
    output = model(data.normalise(pixels), "logits")
    loss = (
        aream.classification_loss(output.class_logits, output.patch_logits, labels) +
        args.affinity_weight * aream.aream_loss(output.affinity_logits, label, w_hat, layers[1]))
    expected_label, expected = naive_step(model, pixels, labels, args, layers)
    assert torch.equal(label, expected_label) and {0, 1} <= set(label.unique().tolist())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    gradient = [
        torch.autograd.grad(x, model.blocks[3].attn.qkv.weight)[0] for x in (loss, expected)
    ]
    torch.testing.assert_close(*gradient, atol=1e-5, rtol=1e-4)


def test_batched_par_equals_one_image_at_a_time():
    images, score = torch.rand(3, 3, 40, 30), torch.rand(3, 4, 40, 30)
    score[:, 2] = 0  # an absent class
    got = refine.pixel_adaptive_refine(images, score)
    torch.testing.assert_close(got,
                               torch.stack([naive_batch_par(i, s) for i, s in zip(images, score)]),
                               atol=1e-5, rtol=1e-5)


def test_the_classification_loss_learns():
    """Ratio of last to first loss over seeds 0-5, one and two threads: 0.06 to 0.25."""
    _, pixels, labels = toy_batch(8)
    model = vit.build("toy", 6, depth=4)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(30):
        output = model(data.normalise(pixels))
        losses.append(aream.classification_loss(output.class_logits, output.patch_logits, labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_the_affinity_loss_learns():
    """Fixed labels, from the toy masks. Ratio of last to first loss over seeds 0-5, one and two
    threads: 0.50 to 0.62.
    """
    dataset, pixels, _ = toy_batch(8)
    masks = torch.stack([torch.from_numpy(dataset.mask(n)) for n in dataset.ids])
    label, w_hat = aream.affinity_label(masks, (8, 8)), torch.ones(4)
    model = vit.build("toy", 6, depth=4)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(30):
        losses.append(
            aream.aream_loss(
                model(data.normalise(pixels), "logits").affinity_logits, label, w_hat, range(4)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.75 * losses[0]


def test_labels_name_present_classes_alone():
    _, pixels, labels = toy_batch(8)
    model = vit.build("toy", 6, depth=4)
    _, _, mask = train_cls.make_labels(train_cls.label_pass(model, pixels, "float32"), pixels,
                                       labels, range(4))
    assert model.training
    for own, image in zip(labels, mask):
        assert set(image.unique().tolist()) <= {0, 255} | {
            data.mask_value(c)
            for c in own.nonzero()[:, 0].tolist()
        }


class LargestTensor(TorchDispatchMode):
    """Remembers the numbers of elements that operations put out, the most of them."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max([
            self.elements,
            *(t.numel()
              for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
        ])
        return out


def test_the_label_steps_memory_depends_on_the_classes_present_alone():
    largest = {}
    for C in (4, 80):
        labels = torch.zeros(2, C)
        labels[0, :2] = labels[1, 3] = 1
        output = vit.ViTOutput(None, None, torch.rand(4, C, 4, 4), rand_affinity(4, C + 16))
        with LargestTensor() as counter:
            train_cls.make_labels(output, torch.randint(0, 256, (2, 3, 128, 128),
                                                        dtype=torch.uint8), labels, range(3))
        largest[C] = counter.elements
    assert largest[4] == largest[80] > 2 * 80 * 8


def test_flops_against_torchs_counter():
    model = vit.build("toy", 6, depth=3).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 64, 64),
              "affinity")  # attention as plain products, which the counter knows everywhere
    assert model.flops((8, 8)) == counter.get_total_flops()


def test_bfloat16_is_near_float32():
    """One training step of both: losses within 2 %, and what is not a product stays float32."""
    if not data.native_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU emulates bfloat16")
    _, pixels, labels = toy_batch(8)
    losses = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model, args = vit.build("toy", 6), train_cls.parse_args(["--data", "toy"])
        args.precision = precision
        views = train_cls.label_pass(model, pixels, precision)
        assert {t.dtype for t in (views.cam, *views.affinity)} == {torch.float32}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append(
            train_cls.train_step(model, optimizer, (pixels, labels), args, True,
                                 aream.coupled_layers(6)))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)


# -------------------------------------------------------------------------------------------------
# Whole stages, by their real command lines
# -------------------------------------------------------------------------------------------------
def train(out, *more, epochs=2, limit=16):
    train_cls.main([
        *TINY, "--out",
        str(out), "--limit",
        str(limit), "--batch", "8", "--epochs",
        str(epochs), "--warmup-epochs", "1", "--depth", "3", "--deep-from", "1", *more
    ])
    return data.read_checkpoint(out / "cls" / "last.pt", "cls")


def equal(one, other):
    return all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())


class Run:
    """A finished run of all stages, plain and AReAM, and its command line."""
    def __init__(self, folder):
        self.plain, self.out = folder / "plain", folder / "run"
        self.common = [*TINY, "--out", str(self.out), "--limit", "16"]
        self.seg = [*self.common, "--batch", "4", "--epochs", "1"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("finished"))
    torch.manual_seed(0)
    train(run.plain, "--reactivation", "none")
    train(run.out, "--branch-from", str(run.plain / "cls" / "warmup.pt"))
    for folder, more in ((run.plain, []), (run.out, ["--before", str(run.plain)])):
        evaluate.main([*TINY, "--what", "layers", "--out", str(folder), "--limit", "4", *more])
    refine.main(run.common)
    train_seg.main(run.seg)
    for what in ("cam", "pseudo", "pred"):
        evaluate.main([*run.common, "--what", what])
    return run


@pytest.fixture
def own(finished, tmp_path):
    """A copy of the finished run, to spoil."""
    shutil.copytree(finished.out, tmp_path / "run")
    shutil.copytree(finished.plain, tmp_path / "plain")
    return Run(tmp_path)


def test_every_stage_leaves_its_files(finished):
    names = [f"toy_train_{i:04d}" for i in range(16)]
    assert sorted(p.stem for p in (finished.out / "cam").glob("*.npz")) == names
    assert sorted(p.stem for p in (finished.out / "pseudo").glob("*.png")) == names
    assert len(list((finished.out / "pred" / "val").glob("*.png"))) == 16
    with Image.open(finished.out / "pseudo" / "toy_train_0000.png") as mask:
        assert mask.mode == "P" and mask.size == (64, 64)
    settings = data.read_json(finished.out / "cls" / "args.json", "")
    assert settings["precision"] == "float32" and settings["class_names"] == list(data.TOY_CLASSES)
    epochs = [line for line in data.read_log(finished.plain / "cls") if "epoch" in line]
    assert len(epochs) == 2 and {"cls_loss", "lr", "images/s", "minutes_left", "precision"} <= set(
        epochs[0])


def test_layers_are_scored_and_drawn(finished):
    record = data.read_json(finished.out / "layers.json", "")
    assert set(record["table"]) == {
        "patch map alone", "unrefined", "all layers", "shallow layers", "deep layers",
        "all, weighted", "layer 0", "layer 1", "layer 2"
    }
    state = record["state"]
    assert all(len(values) == 3
               for values in state.values()) and max(state["entropy"]) <= 6  # log2 of 64 patches
    assert all(0 <= value <= 1 for value in (*state["distance"], *state["top"], *state["w_hat"]))
    assert (finished.out / "layers.png").is_file()


def test_demo_and_pictures(own, capsys):
    evaluate.main([*own.common, "--what", "pseudo"])
    evaluate.main([*own.common, "--what", "demo", "--before", str(own.plain)])
    printed = capsys.readouterr().out
    record = data.read_json(own.out / "layers.json", "")["table"]["deep layers"]
    assert f" | {record['fixed']:.1f} ({record['best']:.1f}) |" in printed and "chosen with pixel labels" in printed
    assert Image.open(
        own.out /
        "demo.png").size[0] == 7 * 132  # photo, raw, plain, AReAM, pseudo-mask, DeepLab, truth
    evaluate.main([*own.common, "--what", "pictures", "--split", "train", "--images", "2"])
    assert Image.open(own.out /
                      "pictures.png").size[0] == 5 * 132  # one classifier, no predictions of train
    (own.plain / "results.json").write_text("[]")
    with pytest.raises(
            ValueError, match="results.json has no record of layers: make it with  python "
                              "evaluate.py"):
        evaluate.main([*own.common, "--what", "demo", "--before", str(own.plain)])


def test_the_worst_images(own, capsys):
    evaluate.main([*own.common, "--what", "pseudo", "--worst", "2"])

    def miou(name):
        mask, target = data.read_mask(own.out / "pseudo" /
                                      f"{name}.png"), data.draw_toy(name)[1].copy()
        target[mask == 255] = 255
        return evaluate.scores(evaluate.confusion_matrix(np.where(mask == 255, 0, mask), target,
                                                         7))["miou"]

    worst = min((f"toy_train_{i:04d}" for i in range(16)), key=miou)
    assert f"the worst are {worst} ({100 * miou(worst):.0f}), " in capsys.readouterr().out
    assert Image.open(own.out / "worst.png").size[0] == 3 * 150
    with pytest.raises(ValueError, match="--worst 3 --what cam"):
        evaluate.main([*own.common, "--what", "cam", "--worst", "3"])


def test_refine_makes_only_what_is_missing(own):
    with pytest.raises(ValueError, match="cam is in use: go on with --resume, replace it with "
                       "--overwrite"):
        refine.main(own.common)
    there, gone = own.out / "pseudo" / "toy_train_0001.png", own.out / "pseudo" / "toy_train_0000.png"
    content, when = gone.read_bytes(), there.stat().st_mtime_ns
    gone.unlink()
    refine.main([*own.common, "--resume"])
    assert gone.read_bytes() == content and there.stat().st_mtime_ns == when
    for spoiled, message in ((["--steps", "3"], "cam with another --steps"),
                             (["--precision", "bfloat16"], "another --precision"),
                             (["--limit", "12"], "cam, but the images and labels changed since")):
        with pytest.raises(ValueError, match=f"--resume in .*{message}"):
            refine.main([*own.common, "--resume", *spoiled])
    shutil.copy(own.plain / "cls" / "last.pt", own.out / "cls" / "last.pt")
    with pytest.raises(
            ValueError, match="--resume in .*cam, but the classifier changed since: start again "
                              "with --overwrite"):
        refine.main([*own.common, "--resume"])


def test_deeplab_refuses_other_masks_and_never_deletes_unasked(own):
    settings = own.out / "pseudo" / "args.json"
    kept = settings.read_text()
    settings.write_text(kept.replace("0.55", "0.5"))
    with pytest.raises(ValueError, match="--resume in .*seg, but the pseudo-masks changed since"):
        train_seg.main([*own.seg, "--resume"])
    settings.write_text(kept)
    predictions = own.out / "pred" / "val"
    (own.out / "seg").rename(own.out / "elsewhere")
    with pytest.raises(
            ValueError, match="pred holds predictions, but .*seg no model that made them: "
                              "replace them with --overwrite"):
        train_seg.main(own.seg)
    assert len(list(predictions.glob("*.png"))) == 16
    (predictions / "stale.png").write_bytes(b"of the model before")
    train_seg.main([*own.seg, "--overwrite"])
    assert len(list(predictions.glob("*.png"))) == 16 and not (predictions / "stale.png").exists()


def test_a_missing_or_wrong_prediction_is_no_perfect_score(own):
    path = own.out / "pred" / "val" / "toy_val_0003.png"
    for spoil, message in ((lambda: path.unlink(),
                            "1 of 16 files are missing .*toy_val_0003.*python train_seg.py"),
                           (lambda: data.write_mask(path, np.full(
                               (64, 64), 255)), "toy_val_0003.png: the prediction holds 255"),
                           (lambda: data.write_mask(path, np.full(
                               (64, 64), 9)), "toy_val_0003.png cannot be read .*the value 9, "
                                              "allowed are "
                                              "0..6"), (lambda: data.write_mask(path, np.zeros(
                                (32, 64))), "toy_val_0003: the ground truth is 64 x 64 pixels, "
                                            ".* 32 x 64")):
        spoil()
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate.main([*own.common, "--what", "pred"])


def test_pixel_ground_truth_is_refused_also_as_a_copy(own, tmp_path):
    dataset = data.open_data("toy", None, "train", 16)
    for name in dataset.ids:
        data.write_mask(tmp_path / "copy" / f"{name}.png", dataset.mask(name))
    with pytest.raises(ValueError, match="copy is pixel ground truth"):
        train_seg.main([*own.seg, "--masks", str(tmp_path / "copy"), "--overwrite"])
    assert (own.out / "seg" / "last.pt").is_file()  # nothing was lost by it


def test_masks_without_a_class_are_refused(own, tmp_path):
    for i in range(16):
        mask = np.where(data.draw_toy(f"toy_train_{i:04d}")[1] > 0, 255, 0)
        data.write_mask(tmp_path / "binary" / f"toy_train_{i:04d}.png", mask)
        data.write_mask(own.out / "pseudo" / f"toy_train_{i:04d}.png", np.full((64, 64), 255))
    with pytest.raises(ValueError, match="binary show no class: write class k as k"):
        train_seg.main([*own.seg, "--masks", str(tmp_path / "binary"), "--overwrite"])
    with pytest.raises(ValueError, match="pseudo decide on no pixel: there is nothing to score"):
        evaluate.main([*own.common, "--what", "pseudo"])


def test_study_gathers_runs_and_prints_their_tables(finished, tmp_path, capsys):
    for row, seeds in (("none", "01"), ("uniform", "01")):
        for one in seeds:
            out = tmp_path / "s" / "reactivation" / row / one
            train(out, "--reactivation", row, "--seed", one, limit=8)
            evaluate.main([*TINY, "--what", "layers", "--out", str(out), "--limit", "2"])
    shutil.copytree(finished.out, tmp_path / "s" / "masks" / "band" / "0")
    records = tmp_path / "results" / "toy.json"
    capsys.readouterr()
    evaluate.main(["--what", "study", "--out", str(tmp_path / "s"), "--records", str(records)])
    printed = capsys.readouterr().out
    rows = {tuple(r["row"].split("/")) + (r["seed"], ): r for r in data.read_json(records, "")}
    every = {key: r["table"]["all layers"]["fixed"] for key, r in rows.items()}
    none, uniform = ([every["reactivation", row, s] for s in "01"] for row in ("none", "uniform"))
    assert f"| none | 2 | {np.mean([rows['reactivation', 'none', s]['map'] for s in '01']):.1f} ± " in printed
    assert f"| {np.mean(none):.1f} ± {np.std(none, ddof=1):.1f} (" in printed
    gains = np.subtract(uniform, none)
    assert f"| {gains.mean():+.1f} ± {gains.std(ddof=1) / 2**0.5:.1f} |" in printed  # paired by seed
    band = rows["masks", "band", "0"]
    assert f"| {band['pseudo']['labelled']:.1f} | {band['pseudo']['all']:.1f} | {band['pseudo']['undecided']:.1f} | {band['pred']['miou']:.1f} |" in printed
    evaluate.main(["--what", "study", "--records", str(records)])  # the tables alone
    assert capsys.readouterr().out == printed
    with pytest.raises(FileNotFoundError, match="none.json: make it with  results/toy.sh"):
        evaluate.main(["--what", "study", "--records", str(tmp_path / "none.json")])
    with pytest.raises(FileNotFoundError, match="no scored <question>/<row>/<seed> under .*gone"):
        evaluate.main(["--what", "study", "--out", str(tmp_path / "gone"), "--records", str(records)])


@pytest.mark.parametrize(
    "more", [["--reactivation", "uniform", "--coupling", "split"], ["--entropy", "static"],
             ["--labels", "shared"], ["--augment", "release"]])
def test_other_settings_run(tmp_path, more):
    checkpoint = train(tmp_path, *more, limit=8)
    assert (checkpoint["entropy"] is not None) == ("static" in more)
    log = data.read_log(tmp_path / "cls")
    assert log[0]["aff_loss"] == 0 and ("uniform" not in more or log[1]["aff_loss"] > 0
                                        )  # entropies of so early a model tie


def test_voc_and_coco_through_all_stages(tmp_path):
    make_voc(tmp_path)
    make_coco(tmp_path)
    for name in ("VOC2012", "COCO2014"):
        common = [
            "--data", name, "--data-root",
            str(tmp_path), "--out",
            str(tmp_path / name), "--workers", "0", "--device", "cpu"
        ]
        train_cls.main([
            *common, "--preset", "toy", "--pretrained", "none", "--size", "32", "--batch", "2",
            "--epochs", "1", "--warmup-epochs", "0", "--coupling", "split", "--deep-from", "2"
        ])
        refine.main(common)
        evaluate.main([*common, "--what", "cam"])
        train_seg.main([
            *common, "--arch", "deeplabv3_mobilenet_v2", "--pretrained", "none", "--size", "33",
            "--batch", "2", "--epochs", "1", "--scales", "1"
        ])
        evaluate.main([*common, "--what", "pred"])


@pytest.mark.parametrize("arch", train_seg.ARCHITECTURES[1:4])
def test_cnn_architectures(arch, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url",
                        lambda *a, **k: pytest.fail("a download was tried"))
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
    with pytest.raises(ValueError, match=f"classifier.pth does not hold an ImageNet backbone for "
                       f"{arch}"):
        train_seg.load_backbone(net, arch, "classifier.pth")


def test_photographs_of_ones_own(own, tmp_path, capsys):
    """Nothing but the checkpoint is needed: no data set, no pseudo-masks; any format, EXIF, any
    size.
    """
    photos = tmp_path / "photos"
    photos.mkdir()
    picture = Image.fromarray(draw(seed=1, size=(50, 70)))
    picture.save(photos / "a b.png")
    picture.convert("CMYK").save(photos / "b.jpeg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(photos / "turned.jpg", exif=exif)
    picture.resize((1300, 900)).save(photos / "large.webp")
    picture.resize((500, 3)).save(photos / "thin.bmp")
    (photos / "notes.txt").write_text("no photograph")
    for folder in ("cam", "pseudo", "pred"):
        shutil.rmtree(own.out / folder)
    small = ["--max-side", "160"]
    train_seg.main([*TINY, "--out", str(own.out), "--photos", str(photos), *small])
    refine.main([
        *TINY, *small, "--out",
        str(own.out), "--photos",
        str(photos / "a b.png"),
        str(photos / "large.webp"), "--labels", "dots, rings"
    ])
    printed = capsys.readouterr().out
    assert "a b.png: dots, rings  ->" in printed and "shrunk to 160 px" in printed
    sizes = {
        "a b": (70, 50), "b": (70, 50), "turned": (50, 70), "large": (1300, 900), "thin": (500, 3)
    }
    for name, size in sizes.items():
        with Image.open(own.out / "photos" / f"{name}.png") as mask:
            assert mask.size == size and mask.mode == "P"
        assert Image.open(own.out / "photos" / f"{name}.overlay.jpg").size[0] >= size[0]
    with Image.open(own.out / "photos" / "large.cam.png") as mask:
        assert mask.size == (1300, 900) and set(np.unique(
            np.array(mask)).tolist()) <= {0, 5, 6, 255}
    refine.main([*TINY, "--out", str(own.out), "--photos", str(photos / "b.jpeg")])
    assert re.search(r"b.jpeg: \w+ [01]\.\d\d",
                     capsys.readouterr().out)  # what the classifier believes
    for arguments, message in ((["--photos", str(photos), "--labels", "cat"], "does not know "
                                "'cat'; it knows "
                                "bars, columns"), (["--photos", str(tmp_path / "none")],
                                                   "no photograph or folder .*none")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            refine.main([*TINY, "--out", str(own.out), *arguments])


def voc_command(root):
    """The flags of a stage on the VOC below root, that writes to root / "run"."""
    places = ["--data-root", str(root), "--out", str(root / "run")]
    return ["--data", "VOC2012", *places, "--workers", "0", "--device", "cpu"]


def test_submission_to_the_voc_server(tmp_path):
    voc = make_voc(tmp_path)
    common = voc_command(tmp_path)
    (voc / "ImageSets" / "Segmentation" / "test.txt").write_text("c\nd\n")
    for folder, suffix in (("Annotations", "xml"), ("SegmentationClass",
                                                    "png")):  # the test archive has neither
        for name in "cd":
            (voc / folder / f"{name}.{suffix}").unlink()
    pack = [*common, "--what", "submission"]
    with pytest.raises(FileNotFoundError, match="2 of 2 files are missing .*--predict-split test"):
        evaluate.main(pack)
    predicted = tmp_path / "run" / "pred" / "test"
    for name in "cd":
        data.write_mask(predicted / f"{name}.png", np.full((40, 48), 8))
    evaluate.main(pack)
    with tarfile.open(tmp_path / "run" / "comp6_test_cls.tgz") as tar:
        assert tar.getnames() == [
            f"results/VOC2012/Segmentation/comp6_test_cls/{n}.png" for n in "cd"
        ]
    for mask, message in ((np.full(
        (40, 48), 255), "holds 255"), (np.zeros((9, 9)), "is 9 x 9 "
                                       "pixels"), (np.full((40, 48), 21), "the value 21")):
        data.write_mask(predicted / "d.png", mask)
        with pytest.raises(ValueError, match=f"d.png.*{message}"):
            evaluate.main(pack)


def test_predicting_a_split_without_labels(tmp_path):
    voc = make_voc(tmp_path)
    common = voc_command(tmp_path)
    (voc / "ImageSets" / "Segmentation" / "test.txt").write_text("e\nf\n")
    for name in "ef":
        shutil.copy(voc / "JPEGImages" / "a.jpg", voc / "JPEGImages" / f"{name}.jpg")
    for name in "abcd":
        data.write_mask(tmp_path / "run" / "pseudo" / f"{name}.png", np.full((40, 48), 8))
    train_seg.main([
        *common, "--arch", "deeplabv3_mobilenet_v2", "--pretrained", "none", "--size", "33",
        "--batch", "2", "--epochs", "1", "--scales", "1", "--predict-split", "test"
    ])
    assert sorted(p.name
                  for p in (tmp_path / "run" / "pred" / "test").iterdir()) == ["e.png", "f.png"]


def test_mean_average_precision_by_hand():
    logits = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.5], [0.1, 0.3, 0.2], [0.4, 0.0, 0.1]])
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]])
    first = (1 / 1 + 2 / 3 + 3 / 4) / 3  # images by score: 0 (yes), 1 (no), 3 (yes), 2 (yes)
    second = (1 / 2 + 2 / 4) / 2  # 2 (no), 1 (yes), 0 (no), 3 (yes); the third class never occurs
    assert train_cls.mean_average_precision(logits, labels) == pytest.approx((first + second) / 2)


# -------------------------------------------------------------------------------------------------
# Data sets, and everyday input
# -------------------------------------------------------------------------------------------------
def draw(seed=0, size=(40, 48)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


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
    """A small COCO: category ids 1 and 90, one polygon and one crowd an image, one image without
    objects.
    """
    coco = root / "COCO2014"
    (coco / "annotations").mkdir(parents=True)
    H, W = size
    for split in ("train", "val"):
        (coco / f"{split}2014").mkdir()
        images, annotations = [], []
        for i in range(5):
            name = f"COCO_{split}2014_{i:012d}.jpg"
            Image.fromarray(draw(i, size)).save(coco / f"{split}2014" / name)
            images.append(dict(id=i, file_name=name, height=H, width=W))
            if i == 4:
                continue
            annotations.append(
                dict(id=10 * i, image_id=i, category_id=90, area=600, iscrowd=0,
                     segmentation=[[10, 10, 40, 10, 40, 30, 10, 30]]))
            annotations.append(
                dict(
                    id=10 * i + 1, image_id=i, category_id=1, area=40, iscrowd=1,
                    segmentation=dict(size=[H, W],
                                      counts=[15 * H + 12, 8, H - 8, 8, H * W - 16 * H - 20])))
        record = dict(images=images, annotations=annotations,
                      categories=[dict(id=90, name="toothbrush"),
                                  dict(id=1, name="person")])
        (coco / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(record))
    return coco


class Folder:
    """An own data set in VOC layout (cat, dog, axolotl; images a to d, a in val too) and a COCO,
    to spoil and to open.
    """
    def __init__(self, root):
        self.root, self.pets = root, root / "pets"
        shutil.move(make_voc(root), self.pets)
        for xml in (self.pets / "Annotations").iterdir():
            xml.write_text(xml.read_text().replace("person", "axolotl"))
        for path in (self.pets / "SegmentationClass").iterdir():
            mask = data.read_mask(path)
            data.write_mask(path, np.select([mask == 8, mask == 15], [1, 3]))
        self.classes, self.image, self.mask = self.pets / "classes.txt", self.pets / "JPEGImages" / "a.jpg", self.pets / "SegmentationClass" / "a.png"
        self.xml, self.list = self.pets / "Annotations" / "a.xml", self.pets / "ImageSets" / "Segmentation" / "train.txt"
        self.classes.write_text("cat\ndog\naxolotl\n")
        self.coco = make_coco(root)
        self.common = [
            "--data",
            str(self.pets), "--classes",
            str(self.classes), "--out",
            str(root / "run"), "--workers", "0", "--device", "cpu"
        ]

    def open(self, split="train"):
        return data.open_data(str(self.pets), None, split, classes=str(self.classes))

    def open_coco(self, split="train", cache=None):
        return data.open_data("COCO2014", self.root, split, cache=cache)

    def json(self, split, change):
        path = self.coco / "annotations" / f"instances_{split}2014.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    def repalette(self, colours, indices):
        """Mask a with these palette colours, index k where its value was indices[k]."""
        mask, new = data.read_mask(self.mask), np.zeros((40, 48), np.uint8)
        for k, value in enumerate(indices):
            new[mask == value] = k
        image = Image.fromarray(new)
        image.putpalette([int(c) for colour in colours for c in colour])
        image.save(self.mask)

    def evaluate(self, what="pred"):
        for name in "abcd":
            data.write_mask(self.root / "run" / "pred" / "val" / f"{name}.png", np.zeros((40, 48)))
        return evaluate.main([*self.common, "--what", what])


VOC_COLOURS = [tuple(c) for c in data.voc_colours().tolist()]


def grey16(path):
    Image.fromarray((np.full((40, 48), 88) * 256).astype(np.uint16)).save(path)


def ramp():
    return np.add.outer(np.arange(40) * 3, np.arange(48) * 2).astype(np.uint8)


def exif(path, orientation):
    stored = Image.fromarray(ramp())
    tags = Image.Exif()
    tags[0x0112] = orientation
    stored.save(path, exif=tags, quality=95)


def all_masks(f, values):
    for name in "abcd":
        mask = data.read_mask(f.pets / "SegmentationClass" / f"{name}.png")
        data.write_mask(f.pets / "SegmentationClass" / f"{name}.png",
                        np.where(mask > 0, values[1], values[0]))


def first_annotation(**change):
    return lambda f: f.json("train", lambda r: r["annotations"][0].update(change))


def two_of_one_name(record):
    for i, folder in enumerate("ab"):
        record["images"][i]["file_name"] = f"{folder}/0001.jpg"


def in_a_subfolder(f):
    (f.coco / "train2014" / "sub").mkdir()
    Image.fromarray(draw()).save(f.coco / "train2014" / "sub" / "0001.png")
    f.json("train", lambda r: r["images"][0].update(file_name="sub/0001.png"))


def namespaced_xml(f):
    f.xml.write_text('<annotation xmlns="http://x.org/voc"><object><name>\n dog '
                     '\n</name></object></annotation>')


def other_encoding(f):
    f.classes.write_text("cat\ndog\nköter\n", encoding="utf-8")
    f.xml.write_bytes(
        '<?xml version="1.0" '
        'encoding="iso-8859-1"?><a><object><name>köter</name></object></a>'.encode("iso-8859-1"))


def multibyte_encoding(f):
    f.xml.write_bytes(
        '<?xml version="1.0" '
        'encoding="gb2312"?><a><object><name>cat</name></object></a>'.encode("gb2312"))


def labels_csv(text):
    def spoil(f):
        shutil.rmtree(f.pets / "Annotations")
        (f.pets / "labels.csv").write_text(text)

    return spoil


def rename_image(f, new):
    Image.open(f.image).save(f.image.with_name(new))
    f.image.unlink()


EVERYDAY = [  # what, how it is spoiled, what is done, the right value or the error
    # photographs
    ("EXIF 6 turns", lambda f: exif(f.image, 6), lambda f: f.open().image("a").size, (40, 48)),
    ("EXIF 3 mirrors", lambda f: exif(f.image, 3), lambda f: bool(
        abs(np.asarray(f.open().image("a"), float)[..., 0] - ramp()[::-1, ::-1]).mean() < 3),
     True),
    ("EXIF that no longer fits the mask", lambda f: exif(f.image, 6),
     lambda f: evaluate.target_of(f.open(), "a", (48, 40), f.image),
     "a.png: the ground truth is 40 x 48 pixels, .*a.jpg 48 x 40 .*EXIF"),
    ("16-bit grey", lambda f: (grey16(f.image.with_suffix(".png")), f.image.unlink()),
     lambda f: np.unique(np.asarray(f.open().image("a"))).tolist(), [88]),
    ("float image", lambda f: (Image.fromarray(np.zeros(
        (9, 9), np.float32)).save(f.image.with_suffix(".tif")), f.image.unlink()),
     lambda f: f.open().image("a"), "a.tif cannot be read .*mode 'F'"),
    ("capital extension", lambda f: rename_image(f, "a.JPG"), lambda f: f.open().image("a").size,
     (48, 40)),
    ("jpeg extension", lambda f: rename_image(f, "a.jpeg"), lambda f: f.open().image("a").size,
     (48, 40)),
    ("png, and a dot in the name", lambda f:
     (rename_image(f, "a.1.png"), f.list.write_text("a.1\n")),
     lambda f: f.open().image("a.1").size, (48, 40)),
    ("two files of one name", lambda f: Image.open(f.image).save(f.image.with_suffix(".png")),
     lambda f: f.open(), "holds a.jpg and a.png, two images of one name"),
    ("half a file", lambda f: f.image.write_bytes(f.image.read_bytes()[:400]),
     lambda f: f.open().image("a"), "a.jpg cannot be read .*: replace the file"),
    # masks
    ("palette in another order", lambda f: f.repalette([VOC_COLOURS[0], VOC_COLOURS[1]], [0, 1]),
     lambda f: np.unique(f.open().mask("a")).tolist(), [0, 1]),
    ("palette re-indexed", lambda f: f.repalette([VOC_COLOURS[0], VOC_COLOURS[3]], [0, 1]),
     lambda f: np.unique(f.open().mask("a")).tolist(), [0, 3]),
    ("ignored re-indexed", lambda f: f.repalette([VOC_COLOURS[255], VOC_COLOURS[0]], [1, 0]),
     lambda f: np.unique(f.open().mask("a")).tolist(), [0, 255]),
    ("grey levels re-indexed", lambda f: f.repalette([(0, 0, 0), (3, 3, 3)], [0, 1]),
     lambda f: np.unique(f.open().mask("a")).tolist(), [0, 3]),
    ("another palette is for display", lambda f: f.repalette([(9, 9, 9), (255, 0, 0)], [0, 1]),
     lambda f: np.unique(f.open().mask("a")).tolist(), [0, 1]),
    ("black and white is for display", lambda f: f.repalette([(0, 0, 0), (255, 255, 255)], [0, 1]),
     lambda f: np.unique(f.open().mask("a")).tolist(), [0, 1]),
    ("colours that contradict", lambda f: f.repalette([(9, 9, 9), VOC_COLOURS[3]], [0, 1]),
     lambda f: f.open().mask("a"),
     r"a.png cannot be read .*colour \(128, 128, 0\) is VOC's for 3, others are not"),
    ("a declared palette of another order", lambda f: f.repalette(
        [VOC_COLOURS[0], VOC_COLOURS[2], VOC_COLOURS[1]], [0, 1]),
     lambda f: np.unique(f.open().mask("a")).tolist(), [0, 2]),
    ("a declared palette that is not VOC's alone", lambda f: f.repalette(
        [VOC_COLOURS[0], VOC_COLOURS[2], (255, 0, 0)], [0, 1]), lambda f: f.open().mask("a"),
     "is VOC's for 2, others are not"),
    ("re-indexed, and no class of this data set",
     lambda f: f.repalette([VOC_COLOURS[0], VOC_COLOURS[5]], [0, 1]), lambda f: f.open().mask("a"),
     "it holds the value 5, allowed are 0..3"),
    ("a grey palette in order", lambda f: f.repalette([(i, i, i) for i in range(129)], [0, 1]),
     lambda f: np.unique(f.open().mask("a")).tolist(), [0, 1]),
    ("one bit a pixel", lambda f: Image.fromarray(
        255 * np.minimum(data.read_mask(f.mask), 1)).convert("1").save(f.mask), lambda f: np.unique(f.open().mask("a")).tolist(), [0, 255]),
    ("RGB in VOC's colours", lambda f: Image.open(f.mask).convert("RGB").save(f.mask),
     lambda f: np.unique(f.open().mask("a")).tolist(), [0, 1]),
    ("RGB in other colours", lambda f: Image.fromarray(draw()).save(f.mask),
     lambda f: f.open().mask("a"), "a.png cannot be read .*none of VOC's"),
    ("16-bit mask",
     lambda f: Image.fromarray(data.read_mask(f.mask).astype(np.uint16)).save(f.mask),
     lambda f: np.unique(f.open().mask("a")).tolist(), [0, 1]),
    ("a value without class", lambda f: data.write_mask(f.mask, np.full(
        (40, 48), 9)), lambda f: f.open().mask("a"),
     "a.png cannot be read .it holds the value 9, allowed are 0..3 and 255"),
    ("0 and 255 for an object", lambda f: all_masks(f, (0, 255)), lambda f: f.evaluate(),
     "no pixel of any class: 255 means ignored, write class k as k"),
    ("nothing to score", lambda f: all_masks(f, (255, 255)), lambda f: f.evaluate(), "no pixel of "
     "any class"),
    # lists and labels
    ("reserved class names", lambda f: f.classes.write_text("_background_\ncat\ndog\naxolotl\n"),
     lambda f: f.open(), "classes.txt lists '_background_', which is no class"),
    ("an ignored class", lambda f: f.classes.write_text("cat\n__ignore__\n"), lambda f: f.open(),
     "lists '__ignore__'"),
    ("a class twice", lambda f: f.classes.write_text("cat\ncat\n"), lambda f: f.open(), "names "
     "the "
     "class "
     "'cat' "
     "more "
     "than "
     "once"),
    ("255 classes", lambda f: f.classes.write_text("\n".join(f"c{i}" for i in range(255))),
     lambda f: f.open(), "names 255 classes: 1 to 254 fit"),
    ("BOM in the class list",
     lambda f: f.classes.write_text("cat\ndog\naxolotl\n", encoding="utf-8-sig"),
     lambda f: f.open().labels("a"), [0]),
    ("BOM and CRLF in a list", lambda f: f.list.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n\r\n"),
     lambda f: f.open().ids, ["a", "b"]),
    ("spaces in a name", lambda f: (rename_image(f, "my cat.jpg"), f.list.write_text("my cat\n")),
     lambda f: f.open().ids, ["my cat"]),
    ("extensions in a list", lambda f: f.list.write_text("a.jpg\nb.jpg\n"), lambda f: f.open().ids,
     ["a", "b"]),
    ("a list of one class", lambda f: f.list.write_text("a  1\nb -1\n"), lambda f: f.open(),
     "train.txt has the line 'a  1': it seems to be a list of one class"),
    ("a list that leaves the folder", lambda f: f.list.write_text("../../secret\n"),
     lambda f: f.open(), "names '../../secret', which is not the plain name"),
    ("an image that is not there", lambda f: f.list.write_text("a\nzebra\n"), lambda f: f.open(),
     "names 1 images .*'zebra'; complete the download"),
    ("an image twice", lambda f: f.list.write_text("a\na\n"), lambda f: f.open(), "lists 'a' more "
     "than once"),
    ("an empty list", lambda f: f.list.write_text("\n"), lambda f: f.open(), "the split 'train' "
     "of .* is empty"),
    ("no such list", lambda f: f.list.unlink(), lambda f: f.open(), "no split 'train': "
     ".*train.txt does not exist"),
    ("namespace and padding in XML", namespaced_xml, lambda f: f.open().labels("a"), [1]),
    ("another encoding of XML", other_encoding, lambda f: f.open().labels("a"), [2]),
    ("an encoding that the parser lacks", multibyte_encoding, lambda f: f.open().labels("a"),
     "a.xml cannot be read .*multi-byte"),
    ("broken XML", lambda f: f.xml.write_text("<annotation><obj"), lambda f: f.open().labels("a"),
     "a.xml cannot be read .*labels.csv"),
    ("an unknown class",
     lambda f: f.xml.write_text("<a><object><name>unicorn</name></object></a>"),
     lambda f: f.open().labels("a"),
     "a.xml names the class 'unicorn' in a, which .*classes.txt does not have"),
    ("no object", lambda f: f.xml.write_text("<a></a>"), lambda f: f.open().labels("a"), "a.xml "
     "names "
     "no "
     "object "
     "in a"),
    ("no XML", lambda f: f.xml.unlink(), lambda f: f.open().labels("a"), "no file .*a.xml: image "
     "labels come from"),
    ("labels.csv", labels_csv("name,classes\na.jpg, dog ,cat\nb,axolotl\nb,cat\n"),
     lambda f: [f.open().labels(n) for n in "ab"], [[0, 1], [0, 2]]),
    ("labels.csv without the image", labels_csv("b,cat\n"), lambda f: f.open().labels("a"),
     "labels.csv names no object in a"),
    ("labels.csv with an unknown class", labels_csv("a,cow\n"), lambda f: f.open().labels("a"),
     "labels.csv names the class 'cow' in a"),
    # COCO
    ("val numbers categories otherwise", lambda f: f.json(
        "val", lambda r: r["categories"].reverse() or
        [c.update(id=5 - c["id"] // 50)
         for c in r["categories"]] and [a.update(category_id=5) for a in r["annotations"]]),
     lambda f: data.need_same_classes(f.open_coco().classes,
                                      f.open_coco().source,
                                      f.open_coco("val").classes,
                                      f.open_coco("val").source),
     "instances_train2014.json and .*instances_val2014.json disagree about the classes: class 1 "
     "is 'person' in the first, 'toothbrush' in the second"),
    ("image_id as a string", first_annotation(image_id="0"), lambda f: f.open_coco(), "1 "
     "annotations belong to no image, first 0"),
    ("a dangling image_id", first_annotation(image_id=77), lambda f: f.open_coco(), "1 "
                                                                                    "annotations "
                                                                                    "belong to "
                                                                                    "no image, "
                                                                                    "first 0"),
    ("two images of one name", lambda f: f.json("train", two_of_one_name), lambda f: f.open_coco(),
     "has two images of one name, a/0001.jpg and b/0001.jpg"),
    ("a subfolder and another format", in_a_subfolder, lambda f: f.open_coco().image("0001").size,
     (48, 40)),
    ("a photograph that is not the JSON's", lambda f: Image.fromarray(draw(0, (48, 40))).save(
        f.coco / "train2014" / "COCO_train2014_000000000000.jpg"),
     lambda f: f.open_coco().image("COCO_train2014_000000000000"),
     "000000000000.jpg is 48 x 40 pixels .*EXIF.*instances_train2014.json says 40 x 48"),
    ("two images of one id", lambda f: f.json("train", lambda r: r["images"][1].update(id=0)),
     lambda f: f.open_coco(), "gives 5 images 4 ids"),
    ("a file elsewhere",
     lambda f: f.json("train", lambda r: r["images"][0].update(file_name="../x.jpg")),
     lambda f: f.open_coco(), "names the file '../x.jpg'"),
    ("a corner outside", first_annotation(segmentation=[[-400, -400, 900, -400, 24, 900]]),
     lambda f: (f.open_coco().rasterise("COCO_train2014_000000000000") > 0).sum(), 40 * 48),
    ("area 0 everywhere",
     lambda f: f.json("train", lambda r: [a.update(area=0) for a in r["annotations"]]), lambda f:
     (f.open_coco().rasterise("COCO_train2014_000000000000") == 1).sum(), 16),
    ("area null", first_annotation(area=None), lambda f:
     (f.open_coco().rasterise("COCO_train2014_000000000000") == 1).sum(), 16),
    ("no segmentation",
     lambda f: f.json("train", lambda r: r["annotations"][0].pop("segmentation")),
     lambda f: f.open_coco().rasterise("COCO_train2014_000000000000"), "instances_train2014.json "
     "cannot be read .*outline "
     "of annotation 0 "),
    ("an unknown category", first_annotation(category_id=12), lambda f: f.open_coco(),
     "annotation 0 has the unknown category 12"),
    ("an outline of words", first_annotation(segmentation=[["x"] * 6]),
     lambda f: f.open_coco().rasterise("COCO_train2014_000000000000"), "annotation 0 "),
    ("305 categories", lambda f: f.json(
        "train", lambda r: r["categories"].extend(
            dict(id=100 + i, name=f"c{i}")
            for i in range(303))), lambda f: f.open_coco(), "names 305 classes: 1 to 254 fit"),
    ("broken JSON", lambda f:
     (f.coco / "annotations" / "instances_train2014.json").write_text("{"),
     lambda f: f.open_coco(), "instances_train2014.json cannot be read"),
    ("another JSON", lambda f:
     (f.coco / "annotations" / "instances_train2014.json").write_text("{}"),
     lambda f: f.open_coco(), "KeyError.*instances file of COCO"),
]


@pytest.mark.parametrize("spoil, call, right", [row[1:] for row in EVERYDAY],
                         ids=[row[0] for row in EVERYDAY])
def test_everyday_input(tmp_path, spoil, call, right):
    folder = Folder(tmp_path)
    spoil(folder)
    if isinstance(right, str):
        with pytest.raises((ValueError, FileNotFoundError), match=right):
            call(folder)
    else:
        assert call(folder) == right


def test_coco_masks_are_drawn_in_parallel_go_on_and_follow_their_source(tmp_path):
    folder = Folder(tmp_path)
    one, two = (folder.open_coco(cache=tmp_path / n) for n in ("one", "two"))
    expected = {name: one.rasterise(name) for name in one.ids}
    one.cache_masks(0)
    two.cache_masks(0)
    (tmp_path / "two" / "train" / f"{two.ids[0]}.png").unlink()  # as if interrupted
    there = (tmp_path / "two" / "train" / f"{two.ids[1]}.png").stat().st_mtime_ns
    two.cache_masks(2)
    assert (tmp_path / "two" / "train" / f"{two.ids[1]}.png").stat().st_mtime_ns == there
    for dataset in (one, two):
        assert len(list(Path(dataset.cache).rglob("*.png"))) == len(one.ids)
        assert all(np.array_equal(dataset.mask(name), mask) for name, mask in expected.items())
    folder.json("train",
                lambda r: r["annotations"][0].update(segmentation=[[0, 0, 5, 0, 5, 5, 0, 5]]))
    corrected = folder.open_coco(cache=tmp_path / "one")
    corrected.cache_masks(0)
    assert (corrected.mask(one.ids[0]) == 2).sum() == 25


def test_coco_labels_masks_and_order(tmp_path):
    train_split = Folder(tmp_path).open_coco(cache=tmp_path / "masks")
    assert train_split.classes == ("person", "toothbrush") and len(train_split.ids) == 4
    assert train_split.labels(train_split.ids[0]) == [0, 1]
    mask = train_split.mask(train_split.ids[0])
    assert mask.shape == (40, 48) and mask[20, 25] == 2 and mask[5, 5] == 0
    assert (mask[12:20, 15:17]
            == 1).all() and (mask == 1).sum() == 16  # the small crowd lies over the large box


def test_voc_labels_and_masks(tmp_path):
    make_voc(tmp_path)
    train_split = data.open_data("VOC2012", tmp_path, "train", limit=3)
    assert train_split.ids == ["a", "b", "c"] and train_split.labels("a") == [
        7
    ] and train_split.labels("b") == [14]
    assert set(np.unique(train_split.mask("b"))) == {0, 15} and data.mask_value(
        train_split.labels("b")[0]) == 15
    for arguments, message in ((("VOC2012", tmp_path, "train", 0), "--limit 0"),
                               (("VOC2013", tmp_path, "train"), "unknown data set 'VOC2013'"),
                               (("VOC2012", tmp_path, "test"),
                                "no split 'test'"), (("VOC2012", tmp_path / "x", "train"),
                                                     "JPEGImages: add --download")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            data.open_data(*arguments)
    with pytest.raises(ValueError, match="VOC2012 has classes of its own"):
        data.open_data("VOC2012", tmp_path, "train", classes="classes.txt")


def test_shipped_splits():
    sizes = {
        p.stem: len(set(p.read_text().split()))
        for p in (Path(data.__file__).parent / "splits").glob("*.txt")
    }
    assert sizes == {"voc2012_train": 1464, "voc2012_trainaug": 10582, "voc2012_val": 1449}


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
    both = data.draw_object([[0, 0, 8, 0, 8, 8, 0, 8], [4, 4, 12, 4, 12, 12, 4, 12], [1, 1, 2, 2]],
                            40, 48)
    assert both.sum() == 64 + 64 - 16  # parts add up; two points are no outline
    shifted = data.draw_object([[5.75, 7.25, 20.25, 7.25, 20.25, 19.75, 5.75, 19.75]], 40, 48)
    assert shifted.sum() == 14 * 13 and shifted[7:20,
                                                6:20].all()  # centres 6.5 .. 19.5, 7.5 .. 19.5
    triangle = data.draw_object([[0, 0, 40, 0, 0, 40]], 40, 48)
    assert abs(triangle.sum() - 800) < 40
    for broken in ([[1, 2, 3, 4, 5, 6, 7]], [["a"] * 6], [[float("nan")] * 6]):
        with pytest.raises(ValueError):
            data.draw_object(broken, 40, 48)


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
    assert data.decode_rle(dict(size=[9, 10], counts="61X13mN000`0"), 9,
                           10).sum() == sum(known[1::2])
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


def test_own_data_through_all_stages(tmp_path, capsys):
    folder = Folder(tmp_path)
    Image.fromarray(draw(0, (3, 500))).save(folder.image)  # a thin photograph
    data.write_mask(folder.mask, np.ones((3, 500)))
    Image.fromarray(draw(0, (900, 1200))).save(folder.image.with_name("b.jpg"))  # and a large one
    data.write_mask(folder.mask.with_name("b.png"), np.full((900, 1200), 3))
    stage = dict(
        cls=[
            "--preset", "toy", "--pretrained", "none", "--size", "64", "--batch", "2", "--epochs",
            "1", "--warmup-epochs", "0", "--deep-from", "2"
        ], seg=[
            "--arch", "deeplabv3_vit", "--size", "64", "--batch", "2", "--epochs", "1", "--scales",
            "1"
        ])
    with pytest.raises(
            FileNotFoundError, match=f"make it with  python train_cls.py --data {folder.pets} "
                                     f"--classes {folder.classes} --out"):
        refine.main(folder.common)
    train_cls.main([*folder.common, *stage["cls"]])
    refine.main([*folder.common, "--max-side", "320"])
    assert data.read_mask(tmp_path / "run" / "pseudo" / "b.png").shape == (900, 1200)
    train_seg.main([*folder.common, *stage["seg"], "--max-side", "320"])
    for what in ("layers", "cam", "pseudo", "pred"):
        evaluate.main([*folder.common, "--what", what, "--max-side", "320"])
    printed = capsys.readouterr().out
    assert "axolotl" in printed and printed.count("photographs are shrunk to 320 px") == 1

    # another order of the classes is another data set; no val list is no mAP
    folder.classes.write_text("dog\ncat\naxolotl\n")
    for what in ("cam", "pseudo", "pred"):
        with pytest.raises(
                ValueError, match="args.json and .*classes.txt disagree about the classes: class "
                                  "1 is 'cat' in the first, 'dog' in"):
            evaluate.main([*folder.common, "--what", what])
    with pytest.raises(ValueError, match="last.pt and .*classes.txt disagree about the classes"):
        refine.main([*folder.common, "--overwrite"])
    folder.classes.write_text("cat\ndog\naxolotl\n")
    folder.list.with_name("val.txt").unlink()
    train_cls.main([*folder.common, *stage["cls"], "--overwrite"])
    assert "no class mAP: " in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no split 'val'"):
        train_seg.main([*folder.common, *stage["seg"], "--overwrite"])


def test_resume_refuses_changed_data_and_knows_a_folder_spelled_otherwise(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    settings = [
        "--preset", "toy", "--pretrained", "none", "--size", "64", "--batch", "2", "--epochs", "1",
        "--warmup-epochs", "0", "--deep-from", "2"
    ]
    train_cls.main([*folder.common, *settings])
    monkeypatch.chdir(tmp_path)
    train_cls.main([
        "--data", "./pets/", "--classes", "pets/../pets/classes.txt", *folder.common[4:],
        *settings, "--resume"
    ])
    folder.xml.write_text("<a><object><name>dog</name></object></a>")
    with pytest.raises(ValueError, match="--resume in .*cls, but the images and labels changed "
                       "since"):
        train_cls.main([*folder.common, *settings, "--resume"])


def test_joint_transform_keeps_image_and_mask_together(tmp_path):
    voc = make_voc(tmp_path)
    samples = train_seg.SegmentationSet(data.open_data("VOC2012", tmp_path, "train"),
                                        voc / "SegmentationClass", 32)
    for sample_seed in range(8):
        image, mask = samples[1, sample_seed]
        assert image.shape == (3, 32, 32) and mask.shape == (32, 32) and set(
            mask.unique().tolist()) <= {0, 15, 255}
        bright = image.float().mean(0) > 105
        assert (bright == (mask == 15))[mask != 255].float().mean() > 0.85
        assert torch.equal(samples[1, sample_seed][0], image)
    data.write_mask(voc / "SegmentationClass" / "b.png", np.zeros((10, 10)))
    with pytest.raises(ValueError, match="b.png is 10 x 10 pixels, its image 40 x 48"):
        samples[1, 0]


def test_augmentations_depend_on_the_seed_alone(tmp_path):
    make_voc(tmp_path)
    dataset = data.open_data("VOC2012", tmp_path, "train")
    for augment in train_cls.AUGMENTATIONS:
        samples = train_cls.ClassificationSet(dataset, 32, augment)
        drawn = [samples[0, s][0] for s in range(12)]
        before = torch.get_rng_state()
        assert all(torch.equal(samples[0, s][0], image) for s, image in enumerate(drawn))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image in drawn)
        assert len({image.float().mean().item() for image in drawn}) > 6
    square, labels = train_cls.ClassificationSet(dataset, 32)[0, 0]
    assert square.shape == (3, 32, 32) and labels.nonzero().tolist() == [[7]]


# -------------------------------------------------------------------------------------------------
# Downloads, from an archive served here
# -------------------------------------------------------------------------------------------------
@pytest.fixture
def served(tmp_path, monkeypatch):
    """A small VOC archive on 127.0.0.1: what is served and the checksum can be changed."""
    make_voc(tmp_path / "source")
    with tarfile.open(tmp_path / "voc.tar", "w") as tar:
        tar.add(tmp_path / "source" / "VOCdevkit", "VOCdevkit")
    content = {"body": (tmp_path / "voc.tar").read_bytes(), "length": None}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(content["length"] or len(content["body"])))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content["body"])

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    content["port"] = server.server_port

    def archives(port, md5=None, gigabytes=1e-5):
        md5 = md5 or hashlib.md5((tmp_path / "voc.tar").read_bytes()).hexdigest()
        archive = (f"http://127.0.0.1:{port}/voc.tar", md5, ".", gigabytes)
        monkeypatch.setitem(data.ARCHIVES, "VOC2012", ("VOCdevkit/VOC2012", [archive]))

    archives(server.server_port)
    content["archives"] = archives
    yield content
    server.shutdown()


def test_download(served, tmp_path, capsys):
    root = tmp_path / "data"
    train_cls.main([
        "--data", "VOC2012", "--data-root",
        str(root), "--download", "--out",
        str(tmp_path / "run"), "--workers", "0", "--device", "cpu", "--preset", "toy",
        "--pretrained", "none", "--size", "32", "--batch", "2", "--epochs", "1", "--warmup-epochs",
        "1"
    ])
    assert "GB to download into" in capsys.readouterr().out
    assert data.open_data("VOC2012", root,
                          "train").ids == list("abcd") and not (root / "download").exists()
    served["archives"](1)  # what is there is not fetched again
    data.download("VOC2012", root)


def test_downloads_that_fail(served, tmp_path, monkeypatch):
    root = tmp_path / "data"

    def fails(message):
        with pytest.raises((OSError, ValueError), match=message):
            data.download("VOC2012", root)
        assert not (root / "VOCdevkit").exists()  # half of it is not taken for the data set
        with pytest.raises(FileNotFoundError, match="add --download"):
            data.open_data("VOC2012", root, "train")

    whole = served["body"]
    served.update(body=whole[:len(whole) // 2], length=len(whole))  # the connection ends early
    fails("could not be fetched .*: try again, or extract it under")
    served.update(body=whole, length=None)
    served["archives"](1)  # nobody listens there
    fails("could not be fetched .*refused")
    served["archives"](served["port"])
    served["archives"](served["port"], md5="0" * 32)
    fails("could not be fetched .*corrupted")
    served["archives"](served["port"], gigabytes=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    fails("has 0.0 GB free, VOC2012 takes")
    monkeypatch.undo()
    (root / "VOCdevkit" / "VOC2012" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(ValueError, match="is there, but lacks Annotations: complete it by hand"):
        data.download("VOC2012", root)
    with pytest.raises(ValueError, match="--download: toy is not to be had"):
        data.download("toy", root)


# -------------------------------------------------------------------------------------------------
# Broken and hostile files, messages
# -------------------------------------------------------------------------------------------------
def test_artefacts_round_trip(tmp_path):
    mask = np.random.default_rng(0).integers(0, 256, (7, 9), dtype=np.uint8)
    data.write_mask(tmp_path / "m.png", mask)
    mask[mask == 255] = 3
    data.write_mask(tmp_path / "m.png", mask)
    assert np.array_equal(data.read_mask(tmp_path / "m.png", size=(7, 9)), mask)
    assert data.voc_colours()[:3].tolist() == [[0, 0, 0], [128, 0, 0], [
        0, 128, 0
    ]] and data.voc_colours()[15].tolist() == [192, 128, 128]
    data.write_cam(tmp_path / "c.npz", [3, 5], torch.full((2, 4, 5), 0.5), (16, 20))
    class_ids, cam, size = data.read_cam(tmp_path / "c.npz")
    assert class_ids.tolist() == [
        3, 5
    ] and cam.shape == (2, 4, 5) and size == (16, 20) and cam.mean() == 0.5
    with pytest.raises(RuntimeError), data.replacing(tmp_path / "m.png") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("interrupted")
    assert np.array_equal(data.read_mask(tmp_path / "m.png"), mask) and len(
        list(tmp_path.iterdir())) == 2


def damaged(good, rng):
    """One broken variant of a file's bytes: cut, empty, noise, bytes changed, doubled, or
    something else altogether.
    """
    kind = rng.integers(6)
    if kind == 0:
        return good[:rng.integers(len(good))]
    if kind == 1:
        return rng.bytes(rng.integers(0, 200))
    if kind == 2:
        return good + good
    if kind == 3:
        return [
            b"", b"null", b"[]", b"{}", b"<a/>", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff", b"\x00" * 99
        ][rng.integers(9)]
    changed = bytearray(good)
    for _ in range(rng.integers(1, 30)):
        changed[rng.integers(len(changed))] = rng.integers(256)
    return bytes(changed)


def test_damaged_files_end_in_a_clear_error_or_a_correct_result(tmp_path):
    folder = Folder(tmp_path)
    data.write_cam(tmp_path / "a.npz", [3], torch.rand(1, 5, 5), (20, 20))
    data.write_checkpoint(
        tmp_path / "a.pt",
        {"stage": "cls", "config": {"data": "toy", "classes": ["x"]}, "epoch": 1})
    (folder.pets / "labels.csv").write_text("a,cat\nb,dog\nc,axolotl,cat\nd,dog\n")
    with_table, instances = folder.open(), folder.coco / "annotations" / "instances_train2014.json"
    (folder.pets / "labels.csv").unlink()
    dataset = folder.open()

    def read_coco():
        opened = folder.open_coco()
        return [(opened.labels(n), opened.rasterise(n)) for n in opened.ids]

    readers = {
        folder.image: lambda: dataset.image("a").size, folder.mask: lambda: dataset.mask("a"),
        folder.list: folder.open, folder.xml: lambda:
        (dataset.__dict__.pop("known_labels", None), dataset.labels("a")), instances: read_coco,
        tmp_path / "a.npz": lambda: data.read_cam(tmp_path / "a.npz"),
        tmp_path / "a.pt": lambda: data.read_checkpoint(tmp_path / "a.pt", "cls"),
        folder.classes: folder.open
    }
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
    assert refused > 300 and with_table.labels("c") == [0, 2]


def test_hostile_files(tmp_path):
    voc = make_voc(tmp_path)
    dataset = data.open_data("VOC2012", tmp_path, "train")
    bomb = '<!DOCTYPE a [<!ENTITY a0 "' + "x" * 100 + '">' + "".join(
        f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">'
        for i in range(9)) + "]><annotation><object><name>&a9;</name></object></annotation>"
    (voc / "Annotations" / "a.xml").write_text(bomb)
    with pytest.raises(ValueError, match="a.xml"):
        dataset.labels("a")
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(
        ">I", zlib.crc32(kind + body))
    huge = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)) + chunk(b"IEND", b"")
    (voc / "SegmentationClass" / "a.png").write_bytes(huge)  # 3.6 gigapixels in a few bytes
    with pytest.raises(ValueError, match="a.png cannot be read"):
        dataset.mask("a")

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"), )

    torch.save({"stage": "cls", "config": {"data": "toy"}, "model": Attack()},
               tmp_path / "evil.pt")
    with pytest.raises(
            ValueError, match=r"evil.pt cannot be read .it wants to run code "
            r"\(.*mkdir\), which is refused"):
        data.read_checkpoint(tmp_path / "evil.pt", "cls")
    np.savez(tmp_path / "evil.npz", class_ids=np.array([Attack()], dtype=object), cam=np.zeros(
        (1, 2, 2)), size=[2, 2])
    with pytest.raises(ValueError, match="evil.npz cannot be read"):
        data.read_cam(tmp_path / "evil.npz")
    assert not (tmp_path / "attacked").exists()


def test_checkpoints_of_something_else(own, tmp_path):
    dataset = data.open_data("toy", None, "train")
    path = tmp_path / "other" / "last.pt"
    for checkpoint, message in (({"stage": "cls", "config": {"data": "VOC2012", "classes": ["a"]}},
                                 "was trained on VOC2012, not on toy"),
                                ({"stage": "cls",
                                  "config": {"data": "toy",
                                             "classes": ["a"]}}, "disagree about the classes"),
                                ({"stage": "seg", "config": {}},
                                 "it is of stage 'seg', not 'cls'"), ([1, 2], "cannot be read")):
        data.write_checkpoint(path, checkpoint)
        with pytest.raises(ValueError, match=f"last.pt.*{message}"):
            data.read_checkpoint(path, "cls", dataset)
    with pytest.raises(ValueError, match="the checkpoint to go on from has .*; give the same "
                       "settings"):
        train(tmp_path / "deeper", "--branch-from", str(own.plain / "cls" / "warmup.pt"),
              "--depth", "4")


MESSAGES = [  # stage, arguments, what is printed after "error: "
    (refine, ["--out", "a folder"], r"no checkpoint a folder/cls/last.pt: make it with  python "
     r"train_cls.py --data toy --out 'a folder'"),
    (evaluate, ["--what", "cam"], r"4 of 4 files are missing .*python refine.py --split train "
     r"--data toy"),
    (evaluate, ["--what", "pseudo"], r"4 of 4 files are missing .*python refine.py"),
    (evaluate, ["--what", "pred"], r"4 of 4 files are missing .*python train_seg.py"),
    (train_seg, [], r"4 of 4 files are missing .*python refine.py"),
    (train_cls, ["--limit", "0"], r"--limit 0: at least one"),
    (train_cls, ["--device", "zebra"], r"--device zebra: not there"),
    (train_cls, ["--device", "xpu"], r"--device xpu: not there"),
    (train_cls, ["--device", "mps"], r"--device mps: not there"),
    (train_cls, ["--size", "60"], r"--size 60: not a multiple of the patch size 8"),
    (train_cls, ["--batch", "5"], r"--batch 5 with 4 images"),
    (train_cls, ["--data", "nowhere"], r"unknown data set 'nowhere'"),
    (train_cls, ["--coupling", "split", "--deep-from", "6"], r"--deep-from 6 with 6 layers"),
    (train_cls, ["--resume", "--overwrite"], r"not allowed with argument --resume"),
    (refine, ["--labels", "dots"], r"--labels goes with --photos"),
    (train_cls, ["--profile", "0"], r"'0' is not a number of steps"),
    (evaluate, ["--what", "study"], r"--what study needs --records"),
]


@pytest.mark.parametrize("stage, arguments, message", MESSAGES,
                         ids=[f"{m[0].__name__} {' '.join(m[1])}" for m in MESSAGES])
def test_the_users_errors_are_one_line(stage, arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        data.run(
            lambda: stage.main([*TINY, "--limit", "4", "--batch", "4", *arguments] if stage in
                               (train_cls, train_seg) else [*TINY, "--limit", "4", *arguments]))
    printed = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and re.search(f"error: .*{message}", printed[-1]), printed
    assert len(printed) == 1


def test_faults_of_the_program_keep_their_traceback(capsys):
    with pytest.raises(SystemExit) as left:
        data.run(lambda: {}["a bug"])
    assert left.value.code == 1 and "Traceback" in capsys.readouterr().err


def test_profile_needs_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run it without torchrun"):
        refine.parse_args(["--data", "toy", "--profile", "5"])


def test_profile_prints_the_phases(own, capsys):
    train_cls.main(
        [*TINY, "--out",
         str(own.out), "--limit", "8", "--batch", "4", "--profile", "1"])
    refine.main([*own.common, "--profile", "1"])
    printed = capsys.readouterr().out
    for phase in ("load", "label pass", "label CAM", "PAR", "forward", "backward", "together",
                  "TFLOP/s", "10 epochs"):
        assert re.search(rf"\s{phase}\b", printed), phase


def test_help_fits_two_screens(capsys):
    for stage in (train_cls, refine, train_seg, evaluate):
        with pytest.raises(SystemExit):
            stage.parse_args(["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 100 and max(map(len, lines)) <= 120


def test_non_finite_loss_stops(tmp_path, monkeypatch):
    broken = lambda *a: torch.tensor(float("nan"), requires_grad=True)
    train(tmp_path / "b", "--reactivation", "none", epochs=1)
    monkeypatch.setattr(aream, "classification_loss", broken)
    with pytest.raises(
            FloatingPointError, match="not finite in epoch 1, step 1 to 2; nothing is written "
                                      "yet. Lower --lr"):
        train(tmp_path / "a")
    with pytest.raises(FloatingPointError, match="not finite in epoch 2, step 1 to 2; nothing is "
                       "written yet"):
        train(tmp_path / "c", "--branch-from", str(tmp_path / "b" / "cls" / "last.pt"))
    monkeypatch.undo()
    train(tmp_path / "d", epochs=3)
    shutil.copy(tmp_path / "d" / "cls" / "warmup.pt", tmp_path / "d" / "cls" / "last.pt")
    monkeypatch.setattr(aream, "classification_loss", broken)
    with pytest.raises(FloatingPointError, match="epoch 2, step 1 to 2; the last good state is "
                       ".*last.pt"):
        train(tmp_path / "d", "--resume", epochs=3)


# -------------------------------------------------------------------------------------------------
# Resuming, full disks, several processes
# -------------------------------------------------------------------------------------------------
def as_if_stopped_after_the_first_epoch(out):
    shutil.copy(out / "cls" / "warmup.pt", out / "cls" / "last.pt")


@pytest.mark.parametrize("more", [[], ["--drop-path", "0.5", "--workers", "1"]],
                         ids=["plain", "drop-path"])
def test_training_resumes_and_branches_to_the_same_bits(tmp_path, more):
    whole = train(tmp_path / "whole", *more, epochs=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    as_if_stopped_after_the_first_epoch(tmp_path / "parts")
    assert equal(whole, train(tmp_path / "parts", *more, "--resume", epochs=3))
    assert equal(
        whole,
        train(tmp_path / "branch", *more, "--branch-from",
              str(tmp_path / "whole" / "cls" / "warmup.pt"), epochs=3))


def test_static_entropy_resumes_to_the_same_bits(tmp_path):
    """Two epochs of warm-up: the entropy is measured on the crops of the third, also when resumed."""
    more = ["--entropy", "static", "--warmup-epochs", "2"]
    whole = train(tmp_path / "whole", *more, epochs=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    as_if_stopped_after_the_first_epoch(tmp_path / "parts")
    resumed = train(tmp_path / "parts", *more, "--resume", epochs=3)
    assert torch.equal(whole["entropy"], resumed["entropy"]) and equal(whole, resumed)


def test_what_resume_branch_and_overwrite_refuse(own, tmp_path):
    warm, last = own.out / "cls" / "args.json", own.plain / "cls" / "last.pt"
    for arguments, epochs, message in (((own.plain, ), 2, "is in use: go on with --resume"),
                                       ((own.plain, "--reactivation", "none", "--resume"), 4,
                                        "--resume in .* with another --epochs"),
                                       ((tmp_path / "late", "--branch-from", str(last)), 2,
                                        "last.pt is already at epoch 2: give more than --epochs "
                                        "2"),
                                       ((own.plain, "--branch-from", str(last), "--overwrite"), 3,
                                        "--overwrite would delete .*last.pt, from which to "
                                        "branch")):
        with pytest.raises(ValueError, match=message):
            train(*arguments, epochs=epochs)
    assert last.is_file() and warm.is_file()


def test_same_seed_same_bits(tmp_path):
    first, second, other = (train(tmp_path / name, *more)
                            for name, more in (("first", []), ("second", ["--deterministic"]),
                                               ("other", ["--seed", "1"])))
    torch.use_deterministic_algorithms(False)
    assert equal(first, second)
    assert not torch.equal(first["model"]["head.weight"], other["model"]["head.weight"])


def test_sampler_depends_on_seed_and_epoch_alone():
    sampler = data.EpochSampler(range(10), 1, 0, seed=1)
    first = list(sampler)
    assert list(sampler) == first and sorted(i for i, _ in first) == list(range(10))
    sampler.set_epoch(1)
    assert list(sampler) != first and len({s for _, s in first} & {s for _, s in sampler}) == 0
    shares = [data.EpochSampler(range(8), 2, rank, seed=1) for rank in (0, 1)]
    whole = list(data.EpochSampler(range(8), 1, 0, seed=1))
    assert sorted(list(shares[0])[:2] + list(shares[1])[:2]) == sorted(
        whole[:4])  # the same global batch of 4


def run_on_a_full_disk(run, arguments, room):
    """In a process whose files may not grow beyond room bytes, which fails as a full disk does;
    reports its error.
    """
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        run(arguments)
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(7)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_full_disk_loses_nothing(tmp_path, capfd):
    """Each stage fails with a message that names the file, leaves what was there and no half of a
    file, and goes on.
    """
    fork = multiprocessing.get_context("fork")
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(whole, epochs=3)
    train(out, epochs=3)
    shutil.copy(out / "cls" / "warmup.pt",
                out / "cls" / "last.pt")  # as if it had been stopped after the first epoch
    old = (out / "cls" / "last.pt").read_bytes()
    common = [*TINY, "--out", str(out), "--limit", "16", "--resume"]
    classify = [
        *common, "--batch", "8", "--epochs", "3", "--warmup-epochs", "1", "--depth", "3",
        "--deep-from", "1"
    ]
    for run, arguments, room, failed in ((train_cls.main, classify, len(old) // 2,
                                          "last.pt"), (refine.main, common, 1100, "npz"),
                                         (train_seg.main,
                                          [*common, "--batch", "8", "--epochs",
                                           "1"], len(old) // 2, "last.pt")):
        process = fork.Process(target=run_on_a_full_disk, args=(run, arguments, room))
        process.start()
        process.join()
        message = capfd.readouterr().err
        assert process.exitcode == 7 and f"{failed} could not be written" in message and "a stage with --resume" in message, message
        assert not list(out.rglob(".*.tmp")) and (out / "cls" / "last.pt").is_file()
        if run is train_cls.main:
            assert (out / "cls" / "last.pt").read_bytes() == old
        run(arguments)  # there is room again
    first, second = (data.read_checkpoint(folder / "cls" / "last.pt", "cls")
                     for folder in (whole, out))
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    assert len(list((out / "pseudo").glob("*.png"))) == 16 and {
        p.name[:8]
        for p in (out / "pred" / "val").iterdir()
    } == {"toy_val_"}


@slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_stages_go_on_to_the_same_result(tmp_path, monkeypatch):
    """Real processes, killed at random moments; what --resume ends with is what an uninterrupted
    run ends with.
    """
    rng, fork = np.random.default_rng(0), multiprocessing.get_context("fork")
    monkeypatch.setattr(data, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    common = [*TINY, "--limit", "24", "--batch", "8"]
    stages = {
        "cls": (train_cls.main, [
            *common, "--epochs", "6", "--warmup-epochs", "2", "--depth", "3", "--deep-from", "1"
        ]), "pseudo": (refine.main, [*TINY, "--limit", "150"]),
        "seg": (train_seg.main, [*common, "--epochs", "3"])
    }
    whole, total = tmp_path / "whole", 0
    for stage, (run, arguments) in stages.items():
        run([*arguments, "--out", str(whole)])
        killed = attempt = 0
        while killed < 7:
            attempt += 1
            out = tmp_path / f"{stage}{attempt}"
            for before in ("cls", "pseudo"):
                if before != stage and (whole / before).is_dir() and list(stages).index(
                        before) < list(stages).index(stage):
                    shutil.copytree(whole / before, out / before)
            while True:
                process = fork.Process(target=run,
                                       args=([*arguments, "--out",
                                              str(out), "--resume"], ))
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
        pictures = {"cls": [], "pseudo": ["cam/*.npz", "pseudo/*.png"],
                    "seg": ["pred/val/*.png"]}[stage]
        for pattern in pictures:
            names = sorted(p.relative_to(whole) for p in whole.glob(pattern))
            assert names and names == sorted(p.relative_to(out) for p in out.glob(pattern))
            assert all((out / n).read_bytes() == (whole / n).read_bytes() for n in names)
        if stage != "pseudo":
            first, second = (data.read_checkpoint(folder / stage / "last.pt", stage)
                             for folder in (whole, out))
            assert all(
                torch.equal(value, second["model"][key]) for key, value in first["model"].items())
            assert first["optimizer"]["state"].keys() == second["optimizer"]["state"].keys()
    assert total >= 20
    assert (tmp_path / "cls1" / "cls" / "warmup.pt").is_file()


def torchrun(processes, script, *arguments, timeout=120):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}",
        str(script), *map(str, arguments)
    ], env=environment, capture_output=True, text=True, timeout=timeout)


@slow
def test_two_processes_train_and_refine_like_one(tmp_path):
    here = Path(__file__).parent
    settings = [
        "--drop-path", "0", "--warmup-epochs", "1", "--epochs", "2", "--batch", "8", "--depth",
        "3", "--deep-from", "1"
    ]
    one, two = ([*TINY, "--limit", "16", "--out", str(tmp_path / name)] for name in ("one", "two"))
    train_cls.main([*one, *settings])
    done = torchrun(2, here / "train_cls.py", *two, *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    states = [
        data.read_checkpoint(tmp_path / name / "cls" / "last.pt", "cls")["model"]
        for name in ("one", "two")
    ]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, atol=2e-3,
                                   rtol=1e-3)  # Adam turns rounding into small steps
    logs = [[line for line in data.read_log(tmp_path / name / "cls") if "epoch" in line]
            for name in ("one", "two")]
    assert len(logs[1]) == 2
    for a, b in zip(*logs):
        assert b["cls_loss"] == pytest.approx(
            a["cls_loss"], rel=1e-3) and b["aff_loss"] == pytest.approx(a["aff_loss"], rel=1e-2)
    shutil.copytree(tmp_path / "one" / "cls", tmp_path / "two" / "cls", dirs_exist_ok=True)
    refine.main(one)
    assert torchrun(2, here / "refine.py", *two).returncode == 0
    for path in [
            *(tmp_path / "one" / "cam").glob("*.npz"), *(tmp_path / "one" / "pseudo").glob("*.png")
    ]:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert other.read_bytes() == path.read_bytes()
    seg = torchrun(2, here / "train_seg.py", *two, "--batch", "4", "--epochs", "1")
    assert seg.returncode == 0 and len(list(
        (tmp_path / "two" / "pred" / "val").glob("*.png"))) == 16, seg.stderr[-2000:]


GRADIENTS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import aream, data, train_cls, model as vit
def main():
    args = train_cls.parse_args(["--data", "toy", "--device", "cpu"])
    device = data.start(args)
    if sys.argv[3] == "dies" and data.rank() == 1:
        raise RuntimeError("rank 1 was told to die")
    samples = train_cls.ClassificationSet(data.open_data("toy", None, "train", 8), 64, "jitter")
    batch = next(iter(data.train_loader(samples, 8, 0, 0, device)))
    net = vit.build("toy", 6, depth=3)
    torch.nn.init.normal_(net.head.weight, std=0.1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0)
    losses = train_cls.train_step(data.distributed(net, device), optimizer, batch, args, True, aream.coupled_layers(3))
    if not data.rank():
        torch.save({"losses": losses, **{k: p.grad for k, p in net.named_parameters()}}, sys.argv[2])
data.run(main)
"""


@slow
def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    found = []
    for processes in (1, 2):
        done = torchrun(processes, script,
                        Path(__file__).parent, tmp_path / f"{processes}.pt", "lives")
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    for key in found[0].keys() - {"losses"}:
        torch.testing.assert_close(found[1][key], found[0][key], atol=1e-6, rtol=1e-4)
    dead = torchrun(2, script, Path(__file__).parent, tmp_path / "dead.pt", "dies", timeout=60)
    assert dead.returncode != 0 and "rank 1 was told to die" in dead.stderr and not (
        tmp_path / "dead.pt").exists()


# -------------------------------------------------------------------------------------------------
# A pretended GPU: tensors without content, of which every operation checks device and dtype as
# CUDA's would
# -------------------------------------------------------------------------------------------------
class Waits(TorchDispatchMode):
    """Counts how often the host waits for the GPU (for a number of it, or to copy to it), and the
    types of products.
    """
    def __init__(self):
        super().__init__()
        self.count, self.products = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.count += 1
            return True if args[0].dtype == torch.bool else 2
        if function is torch.ops.aten._to_copy.default and args[
                0].device.type == "cpu" and not kwargs.get("non_blocking"):
            self.count += kwargs.get("device") is not None
        if function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.products.add(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def pretended_cuda(monkeypatch):
    """build(module) moves it to the pretended GPU; under the mode, tensors of device "cuda" can be
    made.
    """
    if not torch.backends.cuda.is_built():
        pytest.skip("a CPU-only build of torch cannot pretend")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: None)
    monkeypatch.setattr(refine, "fused_iteration", lambda: refine.par_iteration)

    def move(module):
        weights = [*module.named_parameters(), *module.named_buffers()]
        moved = {
            key: torch.empty(value.shape, dtype=value.dtype, device="cuda")
            for key, value in weights
        }
        module.load_state_dict(moved, assign=True)
        return module

    data.per_channel.cache_clear()
    with FakeTensorMode():
        data.normalise(torch.empty(1, 3, 8, 8, device="cuda"))  # copies its constants once
        yield move
    data.per_channel.cache_clear()


class NoStep:
    zero_grad = step = lambda self, **_: None


STEPS = [(kind, entropy, labels) for kind in ("entropy", "uniform", "none")
         for entropy in ("online", "static") for labels in ("two-views", "shared")]


def pretended_step(move, model, kind="entropy", entropy="online", labels="two-views"):
    """One training step -> the pretended GPU's Waits."""
    args = train_cls.parse_args(
        ["--data", "toy", "--reactivation", kind, "--entropy", entropy, "--labels", labels])
    args.precision = "bfloat16"
    move(model)
    batch = torch.empty(3, 3, 64, 64, dtype=torch.uint8,
                        device="cuda"), torch.empty(3, 4, device="cuda")
    static = torch.empty(6, device="cuda") if entropy == "static" else None
    with Waits() as waits:
        losses = train_cls.train_step(model, NoStep(), batch, args, kind != "none",
                                      aream.coupled_layers(6), static)
    assert losses.device.type == "cuda" and losses.dtype == torch.float32
    return waits


def toy_model():
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        return vit.build("toy", 4)


@pytest.mark.parametrize("kind, entropy, labels", STEPS)
def test_a_training_step_on_a_pretended_gpu(pretended_cuda, kind, entropy, labels):
    waits = pretended_step(pretended_cuda, toy_model(), kind, entropy, labels)
    assert waits.count <= 1 and waits.products == {
        torch.bfloat16
    }  # one wait, for the number of classes of the labels


def test_refinement_and_prediction_on_a_pretended_gpu(pretended_cuda):
    model = pretended_cuda(toy_model()).eval()
    pixels = torch.empty(3, 60, 70, dtype=torch.uint8, device="cuda")
    variants = {"all": tuple(range(6)), "raw": (), "map": None, "weighted": "entropy"}
    with Waits() as waits:
        cams = refine.seed_cams(model, pixels, [0, 2], variants, (0.5, 1.0), precision="bfloat16")
        mask = refine.pseudo_mask(pixels, [0, 2], cams["all"])
        walked = refine.seed_cams(model, pixels, [1], {"s": (0, )}, steps=2, beta=2.0)["s"]
    assert {t.device.type for t in (*cams.values(), mask, walked)} == {"cuda"} and waits.count == 0
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        nets = [
            train_seg.build("deeplabv3_vit", 4, dict(preset="toy", depth=None, size=64)),
            train_seg.build("deeplabv3_mobilenet_v2", 4)
        ]
    for net, multiple in zip(nets, (8, 1)):
        pretended_cuda(net).eval()
        with Waits() as waits:
            assert train_seg.predict(net, pixels, (0.5, 1.0), multiple,
                                     "bfloat16").device.type == "cuda"
        assert waits.count == 0


FAULTS = {
    "a constant of the CPU": (aream, "normalise_cam",
                              lambda cam, labels: cam * torch.ones(cam.shape)),
    "a list as index": (aream, "normalise_cam", lambda cam, labels: cam[[0, 1, 2]]),
    "a product in float32": (data, "autocast", lambda device, precision: contextlib.nullcontext()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_pretended_gpu_notices(pretended_cuda, monkeypatch, fault):
    monkeypatch.setattr(*FAULTS[fault])
    if fault == "a constant of the CPU":
        with pytest.raises(RuntimeError,
                           match="found two different devices cuda:0, cpu|[Dd]evice"):
            pretended_step(pretended_cuda, toy_model())
    else:
        waits = pretended_step(pretended_cuda, toy_model())
        assert waits.count > 1 or waits.products != {torch.bfloat16}


# -------------------------------------------------------------------------------------------------
# Real files, where AREAM_DATA says they are
# -------------------------------------------------------------------------------------------------
@real
def test_real_voc():
    for split in ("train", "val"):
        dataset = data.open_data("VOC2012", REAL, split, limit=25)
        for name in dataset.ids:
            mask = dataset.mask(name)
            assert mask.shape == dataset.image(name).size[::-1]
            drawn = {data.mask_value(c) for c in dataset.labels(name)}
            assert set(np.unique(mask).tolist()) - {0, data.IGNORE} <= drawn


@real
def test_real_coco_areas():
    dataset = data.open_data("COCO2014", REAL, "train", limit=20)
    for name in dataset.ids:
        mask = dataset.mask(name)
        assert mask.shape == dataset.image(name).size[::-1]
        assert set(np.unique(mask).tolist()) - {0} <= {
            data.mask_value(c)
            for c in dataset.labels(name)
        }
    record = json.loads(Path(dataset.source).read_text())
    area_of = {a["id"]: a["area"] for a in record["annotations"]}
    objects = [(area_of[identity], data.draw_object(outline, *dataset.files[name][1]).sum())
               for name in dataset.ids for identity, _, outline in dataset.objects[name]
               if area_of[identity] >= 1000]
    area, pixels = np.array(objects).T
    # the JSON's area is signed: outlines that cross themselves have less of it than pixels
    assert (abs(pixels / area - 1) < 0.03).mean() > 0.9 and (pixels / area).min() > 0.98


# -------------------------------------------------------------------------------------------------
# python test_aream.py: the speed table
# -------------------------------------------------------------------------------------------------
def measure(kind, precision="float32", batch=16, size=224, depth=12, steps=5):
    """Seconds (the least of steps) and extra peak MiB of one training step of DeiT-Tiny, in a
    process of its own.
    """
    torch.set_num_threads(THREADS)
    labels = torch.zeros(batch, 20)
    labels[torch.arange(batch),
           torch.arange(batch) % 20] = labels[::2, 3] = 1  # 1.5 classes an image, as in VOC
    pixels = F.interpolate(torch.rand(batch, 3, 9, 9), size=(size, size),
                           mode="bilinear").mul(255).byte()
    args = train_cls.parse_args(
        ["--labels", "shared" if kind == "shared" else "two-views", "--drop-path", "0"])
    args.precision = precision
    if kind == "torchvision":
        model = torchvision.models.VisionTransformer(size, 16, depth, 3, 192, 768)
    else:
        model = vit.build("deit_tiny", 1 if kind == "same size" else 20, depth=depth,
                          image_size=size)
    optimizer, layers, seconds = torch.optim.AdamW(
        model.parameters()), aream.coupled_layers(depth), []
    before = data.peak_memory()
    for _ in range(steps + 1):
        begin = time.perf_counter()
        if kind in ("torchvision", "same size", "naive"):
            if kind == "naive":
                loss = naive_step(model, pixels, labels, args, layers)[1]
            else:
                output = model(data.normalise(pixels))
                loss = (output if kind == "torchvision" else output.class_logits).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            train_cls.train_step(model, optimizer, (pixels, labels), args, kind != "plain", layers)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:]), data.peak_memory() - before


def alone(*given, **named):
    """measure() in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *given, **named).result()


def compare(*functions, repeats=5):
    """Least seconds of functions, called in turn (as timeit advises: what is above the least is
    other load).
    """
    seconds = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, kept in zip(functions, seconds):
            begin = time.perf_counter()
            function()
            kept.append(time.perf_counter() - begin)
    return [min(kept[1:]) for kept in seconds]


def table_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def speed_table(folder):
    """Print the speed table of results/README.md. folder: for files, thrown away."""
    torch.set_num_threads(THREADS)
    has = "bfloat16" if data.native_bfloat16(torch.device("cpu")) else "float32"
    table_row("DeiT-Tiny, 224 px, batch 16", "naive, float32", "float32", has, "gain", "target")
    table_row(*["---"] * 6)

    def line(what, slow, fast, fastest, unit, target, invert=False):
        shown = [
            f"{1 / t if invert else t:.{1 if invert else 2}f} {unit}"
            for t in (slow, fast, fastest)
        ]
        table_row(what, *shown, f"{slow / fastest:.1f}x", target)

    naive, plain, both, shared = (alone(kind)
                                  for kind in ("naive", "plain", "two-views", "shared"))
    plain2, both2, shared2 = (alone(kind, has) for kind in ("plain", "two-views", "shared"))
    line("AReAM training step", naive[0], both[0], both2[0], "s", "4x")
    line("the same with `--labels shared`", naive[0], shared[0], shared2[0], "s", "")
    table_row(
        "its peak memory over the plain step's",
        *(f"{m:.0f} MiB" for m in (naive[1] - plain[1], both[1] - plain[1], both2[1] - plain2[1])),
        "", "")

    labels = torch.zeros(16, 20)
    labels[torch.arange(16), torch.arange(16)] = labels[::2, 3] = 1
    images, cam = torch.rand(16, 3, 224,
                             224), torch.rand(16, 20, 112, 112) * labels[..., None, None]
    slow, fast = compare(lambda: [naive_pseudo_label(*one) for one in zip(images, cam, labels)],
                         lambda: pseudo_label(images, cam, labels))
    table_row("PAR of a batch, both thresholds", f"{slow:.2f} s", f"{fast:.2f} s", "",
              f"{slow / fast:.1f}x", "10x")

    model, pixels = vit.build("deit_tiny", 20).eval(), torch.randint(0, 256, (3, 240, 320),
                                                                     dtype=torch.uint8)

    def naive_inference():
        cam, _ = naive_cam(model, data.normalise(pixels[None]), range(12), "uniform", labels[:1])
        small = F.interpolate(cam, size=(60, 80), mode="bilinear", align_corners=False)
        naive_pseudo_label(pixels / 255, aream.normalise_cam(small, labels[:1])[0], labels[0])

    def inference(precision):
        cams = refine.seed_cams(model, pixels, [0, 3], {"seed": tuple(range(12))},
                                precision=precision)
        refine.pseudo_mask(pixels, [0, 3], cams["seed"])

    times = compare(naive_inference, lambda: inference("float32"), lambda: inference(has),
                    repeats=7)
    line("CAM and PAR inference, 320 px", *times, "images/s", "4x", invert=True)

    voc = make_voc(folder, [f"{i:02}" for i in range(20)], (375, 500))
    dataset = data.open_data("VOC2012", folder, "train")
    for name in dataset.ids:
        photo = Image.fromarray(draw(0, (24, 32))).resize((500, 375), Image.BICUBIC)
        photo.save(voc / "JPEGImages" / f"{name}.jpg")
        data.write_cam(folder / "cam" / f"{name}.npz", [14], torch.rand(1, 94, 125), (375, 500))

    def naive_sweep():
        for threshold in evaluate.THRESHOLDS:
            confusion = 0
            for name in dataset.ids:
                ids, cam, size = data.read_cam(folder / "cam" / f"{name}.npz")
                cam = F.interpolate(cam[None], size=size, mode="bilinear", align_corners=False)[0]
                best, winner = cam.max(0)
                mask = torch.where(best > threshold, data.mask_value(ids)[winner], 0)
                confusion = confusion + evaluate.confusion_matrix(
                    mask, torch.from_numpy(dataset.mask(name)), 21)
            evaluate.scores(confusion)

    slow, fast = compare(
        naive_sweep, lambda: evaluate.summarise(evaluate.evaluate_cams(dataset, folder / "cam")),
        repeats=1)
    table_row("threshold sweep, 101 thresholds, 20 images", f"{slow:.1f} s", f"{fast:.2f} s", "",
              f"{slow / fast:.0f}x", "30x")
    theirs, ours = alone("torchvision")[0], alone("same size")[0]
    table_row("plain step, against torchvision's ViT (197 tokens)", f"{theirs:.2f} s",
              f"{ours:.2f} s", "", f"{theirs / ours:.1f}x", "")
    for augment in train_cls.AUGMENTATIONS:
        samples = train_cls.ClassificationSet(dataset, 224, augment)
        seconds, = compare(lambda: [samples[i, i] for i in range(20)])
        table_row(f"loading, `--augment {augment}`, 500 px JPEGs, of one process", "",
                  f"{20 / seconds:.0f} images/s", "",
                  f"a plain step uses {16 / plain[0]:.0f}, in {has} {16 / plain2[0]:.0f}",
                  "no bottleneck")


# -------------------------------------------------------------------------------------------------
# python test_aream.py gpu: the first minutes on a CUDA card (make gpu)
# -------------------------------------------------------------------------------------------------
def command(*words, timeout=600):
    """A command of this repository -> its output and seconds; an error is part of the output."""
    begin = time.perf_counter()
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, *map(str, words)], cwd=here, capture_output=True,
                          text=True, timeout=timeout)
    return done.stdout + (done.stderr[-400:]
                          if done.returncode else ""), time.perf_counter() - begin


def gpu_table(device, folder, tiny):
    """Print a Markdown table of what a card does; tiny: the smallest budget, to try the program on
    a CPU.
    """
    name = torch.cuda.get_device_name(
    ) if device == "cuda" else "CPU, smallest budget: a trial of this program, no result"
    table_row(
        "what", f"{name}; torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Python {sys.version.split()[0]}")
    table_row("---", "---")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(function, repeats=3 if tiny else 20):
        for _ in range(3):
            function()
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        wait()
        return 1e3 * (time.perf_counter() - begin) / repeats

    # 1. the tests, and one step on both devices
    printed, seconds = command("-m", "pytest", "-q", "test_aream.py",
                               *(["-k", "by_hand"] if tiny else []))
    table_row("tests", f"{printed.strip().splitlines()[-1]} ({seconds:.0f} s)")
    _, pixels, labels = toy_batch(8)
    for mode in ("two-views", "shared"):
        args, losses = train_cls.parse_args(
            ["--data", "toy", "--labels", mode, "--reactivation", "uniform"]), []
        args.precision = "float32"
        for place in ("cpu", device):
            torch.manual_seed(0)
            model = vit.build("toy", 6).to(place)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            batch = pixels.to(place), labels.to(place)
            losses.append(
                train_cls.train_step(model, optimizer, batch, args, True,
                                     aream.coupled_layers(6)).cpu())
        table_row(f"one step, labels {mode}: losses on the CPU and here",
                  " / ".join(f"{a:.5f} {b:.5f}" for a, b in zip(*losses)))

    # 2. where the time goes
    size = ["--data", "toy", "--device", device, "--out", folder / "profile"]
    large = ["--preset", "toy"
             ] if tiny else ["--preset", "deit_small", "--size", "224", "--batch", "64"]
    printed, _ = command("train_cls.py", *size, *large, "--pretrained", "none", "--precision",
                         "auto", "--profile", 2 if tiny else 20)
    for line in printed.splitlines():
        if re.search(r"step,|ms|TFLOP|epochs", line):
            table_row("profile", " ".join(line.split()))

    # 3. PAR, compiled and not; 4. attention, fused and not
    images, score = (torch.rand(4 if tiny else 64, n, 112, 112, device=device) for n in (3, 4))
    kernel = refine.par_kernel(images)
    fused, plain = refine.fused_iteration(), refine.par_iteration
    gap = (fused(score, kernel) - plain(score, kernel)).abs().max().item()
    table_row(
        "PAR, one iteration: plain, compiled, largest difference",
        f"{timed(lambda: plain(score, kernel)):.2f} ms, {timed(lambda: fused(score, kernel)):.2f} "
        f"ms, {gap:.1e}")
    for N in (216, ) if tiny else (216, 788, 1712):
        q, k, v = torch.rand(3, 4, 6, N, 64, device=device, dtype=torch.bfloat16)
        apart = timed(lambda: ((q @ k.transpose(-2, -1)) / 8).float().softmax(-1).to(v.dtype) @ v)
        table_row(
            f"attention, N = {N}: products, fused", f"{apart:.2f} ms, "
            f"{timed(lambda: F.scaled_dot_product_attention(q, k, v)):.2f} ms")

    # 5. a run; 6. the same bits; 7. one process of torchrun
    short = ["--epochs", "2", "--warmup-epochs", "1", "--limit", "32"] if tiny else []
    if REAL:
        voc = ["--data", "VOC2012", "--data-root", REAL, "--split", "train", "--device", device]
        weights = "none" if tiny else next(Path(REAL).glob("**/deit_tiny*.pth"), "auto")
        run = ["--preset", "deit_tiny", "--pretrained", weights, "--lr", "3e-4", "--batch"]
        run += ["4", *short] if tiny else ["64", "--epochs", "20", "--warmup-epochs", "10"]
        for row in ("none", "uniform"):
            out = folder / row
            printed, seconds = command("train_cls.py", *voc, *run, "--reactivation", row,
                                       "--coupling", "split", "--out", out)
            scored, _ = command("evaluate.py", *voc, "--what", "layers", "--limit",
                                4 if tiny else 400, "--out", out)
            found = re.findall(r"(unrefined|all layers|deep layers)\s+([\d.]+)\s+([\d.]+)", scored)
            table_row(f"VOC train, DeiT-Tiny, 20 epochs, {row}",
                      f"{seconds / 60:.1f} min; {found or (printed + scored)[-200:]}")
    same = []
    for turn in "ab":
        command("train_cls.py", "--data", "toy", "--device", device, "--deterministic", "--out",
                folder / turn, *short)
        same.append(data.read_checkpoint(folder / turn / "cls" / "last.pt", "cls"))
    table_row("--deterministic twice: the same bits", str(equal(*same)))
    printed, _ = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
                         "train_cls.py", "--data", "toy", "--device", device, "--out",
                         folder / "ddp", *short)
    table_row("torchrun, one process", printed.strip().splitlines()[-1])


if __name__ == "__main__":
    gpu, tiny = "gpu" in sys.argv, "tiny" in sys.argv
    if gpu and not tiny and not torch.cuda.is_available():
        sys.exit(
            print(
                "error: no CUDA card here; python test_aream.py gpu tiny tries the program on a "
                "CPU", file=sys.stderr) or 2)
    with tempfile.TemporaryDirectory() as temporary:
        if gpu:
            gpu_table("cpu" if tiny else "cuda", Path(temporary), tiny)
        else:
            speed_table(Path(temporary))

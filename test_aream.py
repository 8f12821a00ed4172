"""Sanity checks on small synthetic inputs, no GPU needed:  make test

Tests of stages share a finished run (finished) or spoil a copy of it (own). SLOW=1 adds the slow,
AREAM_DATA=<folder that holds VOCdevkit and COCO2014> those on real data.
"""
import argparse
import errno
import functools
import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import aream
import data
import evaluate
import model as vit
import refine
import train_cls
import train_seg
from results import study

torch.set_num_threads(1)  # tiny tensors are many times slower with more
HERE = Path(__file__).parent
REAL = os.environ.get("AREAM_DATA")
slow = pytest.mark.skipif(not os.environ.get("AREAM_SLOW"), reason="slow: make test SLOW=1")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
real = pytest.mark.skipif(not REAL, reason="AREAM_DATA is not set")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def refused(message):
    """An error of the user, or of a function that a stage makes one of, that matches message."""
    return pytest.raises((data.UserError, ValueError, FileNotFoundError), match=message)


def call(stage, out, flags="", *more):
    """A stage on toy, by its command line:  call(refine, out, "--limit 8")."""
    common = ["--data", "toy", "--workers", "0", "--device", "cpu", "--out", out]
    return stage.main([str(word) for word in (*common, *flags.split(), *more)])


def resized(maps, size):
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


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
            for c in labels[b].nonzero()[:, 0]:
                for m in range(8):
                    for n in range(8):
                        total[m] += affinity[l][b, 3 + m, 3 + n] * cam[b, c].flatten()[n]
            bits = -sum(p * math.log2(p) for p in total.softmax(0).tolist())
            assert got[b, l].item() == pytest.approx(bits, abs=1e-5)

    uniform, one = torch.full((1, 4, 4), 0.25), torch.ones(1, 1)
    peaked = torch.zeros(1, 1, 2, 2)
    peaked[0, 0, 0, 0] = 1e4
    spread, kept = aream.layer_entropy(peaked, (uniform, torch.eye(4)[None]), one)[0]
    assert spread.item() == pytest.approx(2, abs=1e-6)  # evenly over 4 patches: 2 bits
    assert kept.item() == 0  # one patch keeps it all: p = 0 elsewhere, no nan
    assert aream.layer_entropy(0 * peaked, (uniform,), one).item() == pytest.approx(2)


def test_reactivation_weights_by_hand():
    entropy = torch.tensor([[1.0, 2.0, 5.0], [3.0, 3.0, 3.0], [3.0, 3.004, 3.008]])
    w, w_hat = aream.reactivation_weights(entropy)
    assert_close(w_hat, torch.tensor([[0, 0.25, 1.0], [0, 0, 0], [0, 0, 0]]))  # 0.008 bits: a tie
    assert_close(w, 1 - w_hat)
    w, w_hat = aream.reactivation_weights(torch.tensor([1.0, 2.0]), "uniform")
    assert w.tolist() == w_hat.tolist() == [1, 1]
    w, w_hat = aream.reactivation_weights(torch.tensor([1.0, 2.0]), "none")
    assert w.tolist() == [1, 1] and w_hat.tolist() == [0, 0]
    with refused("reactivation 'some'"):
        aream.reactivation_weights(torch.tensor([1.0]), "some")


def test_guided_cam_against_a_loop():
    cam, affinity, w = torch.rand(2, 3, 2, 2), rand_affinity(2, 7), torch.rand(2, 3)
    got = aream.guided_cam(cam, affinity, w, [0, 2])
    for b in range(2):
        for c in range(3):
            drawn = torch.stack([a[b, c, 3:] for a in affinity]).mean(0)
            attended = cam[b, c].flatten() * drawn
            for m in range(4):
                expected = 0
                for l in (0, 2):
                    expected += w[b, l] * (affinity[l][b, 3 + m, 3:] * attended).sum() / 2
                assert got[b, c].flatten()[m].item() == pytest.approx(expected.item(), rel=1e-5)


def test_affinity_label_by_hand():
    mask = torch.tensor([[[0, 0, 5, 5], [0, 0, 5, 5], [255, 255, 0, 0], [9, 255, 0, 5]]])
    # patch centres of the 2 x 2 grid are the pixels (1, 1), (1, 3), (3, 1), (3, 3): 0, 5, 255, 5
    expected = torch.tensor([[1, 0, 255, 0], [0, 1, 255, 1], [255] * 4, [0, 1, 255, 1]])
    assert torch.equal(aream.affinity_label(mask, (2, 2))[0], expected)


def test_affinity_loss_against_a_loop():
    prob = torch.rand(2, 4, 4)
    label = torch.tensor([0, 1, 255])[torch.randint(0, 3, (2, 4, 4))]
    of_image = torch.rand(2)
    n1, n0 = (label == 1).sum().item(), (label == 0).sum().item()
    plain = weighted = 0.0
    for b in range(2):
        for p, y in zip(prob[b].flatten().tolist(), label[b].flatten().tolist()):
            term = {1: 0.5 * (1 - p) / (n1 + 1), 0: 0.5 * p / (n0 + 1), 255: 0}[y]
            plain += term
            weighted += term * of_image[b].item()
    assert aream.affinity_loss(prob, label).item() == pytest.approx(plain, rel=1e-5)
    one_layer = aream.aream_loss((prob.logit(),), label, of_image[:, None], [0])
    assert one_layer.item() == pytest.approx(weighted, rel=1e-5)
    assert aream.affinity_loss(prob, torch.full_like(label, 255)).item() == 0


def test_top_share():
    P = 40
    uniform, identity, column = torch.full((P, P), 1 / P), torch.eye(P), torch.zeros(P, P)
    column[:, 3] = 1  # every patch draws from one: collapsed
    affinity = torch.stack([uniform, identity, column])
    assert_close(aream.top_share(affinity), torch.tensor([0.05, 0.05, 1.0]))


def test_row_distance_against_a_loop():
    rows, total = torch.rand(1, 5, 5), 0
    p = (rows / rows.sum(-1, keepdim=True))[0]
    for m in range(5):
        for k in range(5):
            if m != k:
                total += math.sqrt(1 - sum(math.sqrt(p[m, n] * p[k, n]) for n in range(5)))
    assert aream.row_distance(rows).item() == pytest.approx(total / 20, rel=1e-4)
    for one_patch in (torch.ones(1, 1, 1), torch.zeros(1, 1, 1)):
        assert aream.row_distance(one_patch).item() == 0


def test_coupled_layers():
    assert aream.coupled_layers(12) == (range(12), range(12))
    assert aream.coupled_layers(12, "split", 7) == (range(7), range(7, 12))
    with refused("--deep-from 6 with 6 layers"):
        aream.coupled_layers(6, "split", 6)


def test_normalise_cam():
    constant, absent = [[3.0, 3.0], [3.0, 3.0]], [[0.0, 1.0], [1.0, 1.0]]
    cam = torch.tensor([[[[-1.0, 1.0], [2.0, 4.0]], constant, absent]])
    got = aream.normalise_cam(cam, torch.tensor([[1.0, 1.0, 0.0]]))
    assert_close(got[0, 0], torch.tensor([[0, 0.25], [0.5, 1.0]]))
    assert not got[0, 1:].any()


def test_learning_rate_against_the_release():
    """5 of 60 epochs of linear warm-up from 1e-6, then timm's cosine from 6.25e-5 to 1e-5."""
    top, low, start = 6.25e-5, 1e-5, 1e-6
    for epoch in range(60):
        expected = low + 0.5 * (top - low) * (1 + math.cos(math.pi * epoch / 60))
        if epoch < 5:
            expected = start + epoch * (top - start) / 5
        assert top * train_cls.lr_factor(epoch / 60) == pytest.approx(expected, rel=1e-6)


# -------------------------------------------------------------------------------------------------
# The ViT
# -------------------------------------------------------------------------------------------------
def test_block_stack_equals_torchvision():
    ours = vit.build("toy", 4).double().eval()
    theirs = torchvision.models.VisionTransformer(64, 8, 6, 3, 96, 384).double().eval()
    images = torch.randn(2, 3, 64, 64).double()
    patches = ours.patch_embed(images).flatten(2).transpose(1, 2) + ours.patch_pos_embed
    x = torch.cat([(ours.class_tokens + ours.class_pos_embed).expand(2, -1, -1), patches], 1)
    names = {"norm": "ln_", "attn.qkv.": "self_attention.in_proj_", "fc1": "0", "fc2": "3",
             "attn.proj": "self_attention.out_proj"}
    for block, layer in zip(ours.blocks, theirs.encoder.layers):
        state = block.state_dict()
        for here, there in names.items():
            state = {key.replace(here, there): value for key, value in state.items()}
        layer.load_state_dict(state)
        x = layer(x)
    got, grid, _, _ = ours.tokens(images)
    assert grid == (8, 8)
    assert_close(got, x, atol=1e-10, rtol=1e-9)


def test_position_embeddings_are_resized_as_torch_does():
    embedding = torch.randn(1, 6 * 5, 7)
    as_image = embedding.unflatten(1, (6, 5)).permute(0, 3, 1, 2)
    for new in ((9, 4), (6, 5), (1, 1), (12, 10)):
        expected = F.interpolate(as_image, size=new, mode="bicubic").flatten(2).transpose(1, 2)
        got = vit.resize_position_embedding(embedding, (6, 5), new)
        assert_close(got, expected, atol=1e-5, rtol=1e-5)


def deit_state(dim=192):
    """A random checkpoint with DeiT-Tiny's keys."""
    shapes = {"patch_embed.proj": (dim, 3, 16, 16), "norm": (dim,), "head": (1000, dim)}
    of_block = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim),
                "norm2": (dim,), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for i in range(12):
        shapes.update({f"blocks.{i}.{name}": shape for name, shape in of_block.items()})
    state = {"cls_token": torch.randn(1, 1, dim), "pos_embed": torch.randn(1, 197, dim)}
    for name, shape in shapes.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(shape), torch.randn(shape[0])
    return state


@pytest.mark.parametrize("form", [
    lambda state: state,
    lambda state: {"model": {key: value.half() for key, value in state.items()}},
    lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
], ids=["plain", "half", "module"])
def test_deit_checkpoints(tmp_path, form):
    """Into a model of fewer blocks and larger images."""
    state, near = deit_state(), dict(atol=2e-3, rtol=2e-3)
    torch.save(form(state), tmp_path / "deit.pth")
    model = vit.build("deit_tiny", 20, depth=8, image_size=256)
    vit.load_pretrained(model, tmp_path / "deit.pth")
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.bias", "blocks.7.mlp.fc2.weight"):
        assert_close(model.state_dict()[name], state[name], **near)
    assert torch.equal(model.class_tokens[0, 7], model.class_tokens[0, 0])
    assert_close(model.class_tokens[0, 3], state["cls_token"][0, 0], **near)
    assert_close(model.class_pos_embed[0, 5], state["pos_embed"][0, 0], **near)
    expected = vit.resize_position_embedding(state["pos_embed"][:, 1:], (14, 14), (16, 16))
    assert_close(model.patch_pos_embed, expected, **near)


def test_wrong_weights_are_refused(tmp_path):
    model, wrong = vit.build("deit_tiny", 20), "does not hold weights for deit_tiny: "
    state = deit_state()
    incomplete = {key: state[key] for key in state if key != "blocks.3.norm1.weight"}
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    torch.save({"model": state, "args": argparse.Namespace()}, tmp_path / "code.pth")
    for source, message in (
            (deit_state(dim=384), wrong + r"'\S+' is \(.*384.*\), which does not make \(.*192"),
            ({"model": "deit", "state_dict": incomplete}, wrong + "it has no 'blocks.3.norm1.wei"),
            ({"fc.weight": torch.zeros(3)}, r"it has no .* \(its first keys: fc.weight\)"),
            ({**state, "dist_token": torch.zeros(1, 1, 192)},
             wrong + "it is distilled .it has a dist_token"),
            ({**state, "pos_embed": torch.zeros(1, 196, 192)},
             wrong + "its 'pos_embed' has 196 positions, not one for the class token"),
            ({**state, "blocks.0.gamma_1": torch.zeros(192)}, wrong + "it has "
             "'blocks.0.gamma_1', for which plain DeiT has no place .* LayerScale"),
            (tmp_path / "nothing.pth", "no weights at .*nothing.pth"),
            (tmp_path / "broken.pth", "broken.pth is no file of weights"),
            (tmp_path / "code.pth", r"code.pth wants to run code \(.*Namespace\), which is ref")):
        with refused(message):
            vit.load_pretrained(model, source)


@pytest.mark.parametrize("problem", [OSError("no route"), RuntimeError("invalid hash value")])
def test_download_failure_names_the_remedy(tmp_path, monkeypatch, problem):
    def offline(url, **kwargs):
        assert url == vit.DEIT_URLS["deit_tiny"]
        assert kwargs["weights_only"] and kwargs["check_hash"]
        raise problem

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: tmp_path)
    with refused(f"could not load https.*{problem}.*give its path"):
        vit.load_pretrained(vit.build("deit_tiny", 20), "auto")
    cached = tmp_path / "checkpoints" / Path(vit.DEIT_URLS["deit_tiny"]).name
    cached.parent.mkdir()
    cached.write_bytes(b"half a file")
    with refused(f"could not load https.*{problem}.*{cached} is damaged, delete it"):
        vit.load_pretrained(vit.build("deit_tiny", 20), "auto")


def test_bad_model_arguments():
    model = vit.build("toy", 2)
    with refused("image size 60 x 64 is not a multiple of the patch size 8"):
        model(torch.zeros(1, 3, 60, 64))
    with refused("unknown preset 'vgg'"):
        vit.build("vgg", 2)
    with refused("depth 13: deit_tiny has 1 to 12 blocks"):
        vit.build("deit_tiny", 2, depth=13)
    with refused("image size 70"):
        vit.build("toy", 2, image_size=70)


# -------------------------------------------------------------------------------------------------
# refine.py, evaluate.py
# -------------------------------------------------------------------------------------------------
def test_random_walk():
    score, affinity = torch.rand(1, 2, 2, 2), torch.rand(1, 4, 4)
    plain = refine.random_walk(score, affinity)  # one step: rows as they are
    assert_close(plain[0].flatten(1), score[0].flatten(1) @ affinity[0].T)
    transition = affinity[0]**2 / (affinity[0]**2).sum(1, keepdim=True)
    expected = (transition @ transition @ transition @ score[0].flatten(1).T).T.view(2, 2, 2)
    assert_close(refine.random_walk(score, affinity, beta=2.0, steps=3)[0], expected)
    assert_close(refine.random_walk(score, torch.eye(4)[None], steps=5), score)
    small = torch.rand(1, 400, 400).softmax(-1)  # whose eighth powers are nothing in float32
    constant = torch.ones(1, 1, 20, 20)
    assert_close(refine.random_walk(constant, small, beta=8.0, steps=2), constant)


def pseudo_label(images, cam, labels, **settings):
    """refine.pseudo_label with the CAMs (B, C, h, w) of all classes, present or not."""
    class_ids, present = refine.present_classes(labels)
    own = cam[torch.arange(len(cam))[:, None], class_ids]
    return refine.pseudo_label(images, own, class_ids, present, **settings)


def test_present_classes():
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    class_ids, present = refine.present_classes(labels)  # two, however many there are
    assert present.tolist() == [[1, 1], [1, 0]]
    assert set(class_ids[0].tolist()) == {0, 3} and class_ids[1, 0] == 1


def values(mask):
    return set(torch.as_tensor(mask).unique().tolist())


def test_pseudo_labels_with_other_dilations():
    """A spot of the CAM on a plain image spreads as far as the neighbours are."""
    image, cam = torch.full((3, 64, 64), 128, dtype=torch.uint8), torch.zeros(1, 64, 64)
    cam[:, 28:36, 28:36] = 1
    settings = dict(low=0.05, high=0.05, iterations=2)
    reached = [(refine.pseudo_mask(image, [0], cam, **settings, dilations=far) == 1).sum()
               for far in ((1,), (4,))]
    assert reached[0] < reached[1]


@pytest.mark.parametrize("layers, rows", [(tuple(range(6)), "plain"), ("entropy", "plain"),
                                          (tuple(range(6)), "normalised")])
def test_seed_cams_by_hand(layers, rows):
    model, both = vit.build("toy", 3).eval(), 0
    torch.nn.init.normal_(model.head.weight)  # CAMs that tell the layers' entropies apart
    square = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    got = refine.seed_cams(model, square, [1], {"s": layers}, refine.Refinement(rows=rows))["s"]

    with torch.no_grad():  # the image, and its mirror image
        output = model(data.normalise(torch.stack([square, square.flip(-1)])), affinity=True)
    attended = aream.class_attended_cam(output.cam, output.affinity)[:, 1].flatten(1)
    for view in (0, 1):
        blocks = torch.stack([a[view, 3:, 3:] for a in output.affinity])  # (L, P, P)
        if layers == "entropy":
            affinity = [a[view:view + 1] for a in output.affinity]
            labels = torch.tensor([[0, 1.0, 0]])
            h = aream.layer_entropy(output.cam[view:view + 1], affinity, labels)[0]
            assert h.max() - h.min() > 0.01
            blocks = (1 - (h - h.min()) / (h.max() - h.min()))[:, None, None] * blocks
        if rows == "normalised":
            blocks = blocks / blocks.sum(-1, keepdim=True)
        refined = resized((blocks.mean(0) @ attended[view]).view(1, 1, 8, 8), (64, 64))
        both = both + (refined.flip(-1) if view else refined)
    expected = aream.normalise_cam(resized(both, (16, 16)), torch.ones(1, 1))[0]
    assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_layers_are_observed_at_scale_1():
    model, seen = vit.build("toy", 3).eval(), []
    pixels = torch.randint(0, 256, (3, 50, 64), dtype=torch.uint8)
    refine.seed_cams(model, pixels, [1], {"s": "unrefined"}, refine.Refinement((0.5, 1, 1.5)),
                     lambda output, size: seen.append((output.cam.shape[-2:], size)))
    assert seen == [((7, 8), (50, 64))]  # padded to 56 x 64


def test_scales_count_alike():
    """P patches that share a class token's attention evenly get 1 / P each, at every scale."""
    class Even:
        patch = 8

        def __call__(self, images, affinity):
            side = images.shape[-1] // 8
            cam = torch.zeros(2, 1, side, side)
            cam[0, :, side // 4:, side // 2:] = 1  # at scale 1 the right, below the top
            cam[0] = cam[0] if side == 8 else cam[0].flip(-1)  # at 0.5 the left
            cam[1] = cam[0].flip(-1)
            affinity = torch.full((2, 1 + side**2, 1 + side**2), 1 / side**2)
            return vit.ViTOutput(None, None, cam, (affinity,))

    pixels = torch.zeros(3, 64, 64, dtype=torch.uint8)
    settings = refine.Refinement((0.5, 1))
    cam = refine.seed_cams(Even(), pixels, [0], {"s": "unrefined"}, settings)["s"][0]
    assert cam[-1, 0] == pytest.approx(cam[-1, -1].item()) and cam[-1, 0] > 0.5 and cam[0, -1] == 0


def test_masks_are_padded_as_the_images_are():
    """At twice the size of the view; what lies below 50 rows of its 56 is ignored."""
    target = evaluate.pad_target(torch.ones(100, 128), (7, 8), (50, 64), 8)
    assert target.shape == (112, 128) and (target[:100] == 1).all() and (target[100:] == 255).all()


def test_layers_on_the_command_line():
    for text, layers in (("0-2,5", (0, 1, 2, 5)), ("all", (0, 1, 2, 3, 4, 5)),
                         ("unrefined", "unrefined"), ("entropy", "entropy")):
        assert refine.parse_layers(text, 6) == layers
    for text in ("3-9", "x", "5-3", "-1"):
        with refused(f"--layers '{text}'"):
            refine.parse_layers(text, 6)


@pytest.mark.parametrize("size", [(50, 70), (1, 1), (20, 5000), (3, 400)])
def test_other_image_sizes(size):
    model = vit.build("toy", 2, depth=1).eval()
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    settings = refine.Refinement((0.5, 1))
    cam = refine.seed_cams(model, pixels, [1], {"seed": (0,)}, settings)["seed"]
    assert max(refine.limit_size(model, pixels).shape) <= 50 * 8
    assert cam.shape == (1, -(-size[0] // 4), -(-size[1] // 4))
    assert 0 <= cam.min() and cam.max() <= 1
    mask = refine.pseudo_mask(pixels, [1], cam)
    assert mask.shape == size and values(mask) <= {0, 2, 255}


def test_confusion_and_scores_by_hand():
    target = torch.tensor([[0, 0, 1], [1, 255, 1]])
    prediction = torch.tensor([[0, 1, 1], [1, 2, 0]])
    confusion = evaluate.confusion_matrix(prediction, target, 3)
    assert confusion.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    result = evaluate.scores(confusion)
    assert result["iou"][:2].tolist() == pytest.approx([1 / 3, 2 / 4]) and result["iou"][2].isnan()
    assert result["miou"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result["precision"][1].item() == pytest.approx(2 / 3)
    assert result["recall"][0].item() == pytest.approx(1 / 2)
    unlabelled = torch.tensor([2, 0, 0])  # two pixels of the background were given no class
    assert evaluate.scores(confusion, unlabelled)["iou"][0].item() == pytest.approx(1 / 5)
    with refused("prediction holds 255"):
        evaluate.confusion_matrix(torch.full((2, 3), 255), target, 3)
    with refused(r"prediction is \(2, 2\)"):
        evaluate.confusion_matrix(prediction[:, :2], target, 3)


def test_threshold_curve_equals_one_evaluation_per_threshold():
    cam, mask_values = torch.rand(2, 20, 30), torch.tensor([1, 3])
    cam[:, :5] = 0.25  # ties with a threshold
    target = torch.tensor([0, 1, 2, 3, 255])[torch.randint(0, 5, (20, 30))]
    counts = evaluate.threshold_counts(cam, mask_values, target, 4)
    for threshold, confusion in zip(evaluate.THRESHOLDS, evaluate.curve(counts)):
        score, winner = cam.max(0)
        prediction = torch.where(score > threshold, mask_values[winner], 0)
        assert torch.equal(confusion, evaluate.confusion_matrix(prediction, target, 4))


def test_summary_of_a_curve_by_hand():
    """One pixel of the class scores 0.44, one 0.6; one of the background 0.46."""
    cam, target = torch.tensor([[[0.44, 0.6, 0.46]]]), torch.tensor([[1, 1, 0]])
    found = evaluate.summarise(evaluate.threshold_counts(cam, torch.tensor([1]), target, 2))
    assert found["fixed"] == pytest.approx(100 * (0 + 1 / 3) / 2)  # at 0.45: 0 1 1
    assert found["best"] == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)  # from 0.46 to 0.59: 0 1 0
    assert found["best_threshold"] == 0.46


def test_scores_of_cams_by_hand(tmp_path):
    class Dataset:
        ids, classes = ["a"], ["cat", "dog", "cow"]
        mask_path = mask = lambda self, name: np.array([[0, 3, 1, 255]])
        labels = lambda self, name: [0, 2]

    cam = np.array([[[0, 0.2, 0.9, 1]], [[0.1, 0.8, 0.3, 0]]])  # of cat and cow
    data.write_cam(tmp_path / "a.npz", [0, 2], cam, (1, 4))
    counts = evaluate.evaluate_cams(Dataset(), tmp_path)
    confusion = evaluate.curve(counts)[45]
    assert confusion.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0] * 4, [0, 0, 0, 1]]


def test_scores_of_pseudo_masks_by_hand(tmp_path):
    class Dataset:
        ids, classes = ["a"], ["cat"]
        mask_path = mask = lambda self, name: np.array([[0, 0, 1, 1, 255]])
        labels = lambda self, name: [0]

    data.write_mask(tmp_path / "a.png", np.array([[0, 255, 1, 0, 1]]))
    confusion, unlabelled = evaluate.evaluate_masks(Dataset(), tmp_path, pseudo=True)
    assert confusion.tolist() == [[1, 0], [1, 1]] and unlabelled.tolist() == [1, 0]
    every = evaluate.scores(confusion, unlabelled)["miou"]  # an undecided pixel is missed
    assert every == pytest.approx((1 / 3 + 1 / 2) / 2)
    Dataset.mask = lambda self, name: np.array([[0, 0, 255, 255, 255]])  # 0 and 255 for an object
    with refused("no pixel of any class: write class k as k"):
        evaluate.evaluate_masks(Dataset(), tmp_path, pseudo=True)


@pytest.mark.parametrize("miou, correlation", [
    ([60, 50, 49, 1], -1), ([1, 2, 3, 4], 1), ([20, 30, 40, 10], -0.2),  # 1 - 6 * 12 / 60
    ([5, 5, 3, 3], -2 / 5**0.5)])  # ranks 3.5, 3.5, 1.5, 1.5
def test_rank_correlation_of_entropy_and_miou(miou, correlation):
    table = {f"layer {l}": {"fixed": value} for l, value in enumerate(miou)}
    got = evaluate.rank_correlation(table, {"entropy": [5.0, 5.5, 6.0, 9.0]}, "fixed")
    assert got == pytest.approx(correlation)


# -------------------------------------------------------------------------------------------------
# The naive step, an oracle, and what the speed table compares with: every head kept, a second pass
# for the labels, PAR image by image and threshold by threshold
# -------------------------------------------------------------------------------------------------
def naive_forward(model, images):
    """-> class and patch logits, patch map, all heads' logits and attention, (L, B, A, N, N)."""
    B, C, A = len(images), model.num_classes, model.blocks[0].attn.heads
    grid = tuple(side // model.patch for side in images.shape[2:])
    patches = model.patch_embed(images).flatten(2).transpose(1, 2)
    patches = patches + vit.resize_position_embedding(model.patch_pos_embed, model.pos_grid, grid)
    x = torch.cat([(model.class_tokens + model.class_pos_embed).expand(B, -1, -1), patches], 1)
    logits, prob = [], []
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(x)).view(B, x.shape[1], 3, A, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits.append(q @ k.transpose(-2, -1) / q.shape[-1]**0.5)
        prob.append(logits[-1].softmax(-1))
        attended = (prob[-1] @ v).transpose(1, 2).flatten(2)
        x = x + block.drop_path(block.attn.proj(attended))
        x = x + block.drop_path(block.mlp(block.norm2(x)))
    patch_map = model.head(x[:, C:].transpose(1, 2).unflatten(2, grid))
    class_logits, patch_logits = x[:, :C].mean(-1), patch_map.mean((2, 3))
    return class_logits, patch_logits, patch_map, torch.stack(logits), torch.stack(prob)


OFFSETS = [(dy * d, dx * d) for d in (1, 2, 4, 8, 12, 24)
           for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def naive_neighbours(x):
    """(K, H, W) -> (K, 48, H, W)."""
    padded, (H, W) = F.pad(x[None], [24] * 4, mode="replicate")[0], x.shape[-2:]
    near = [padded[:, 24 + dy:24 + dy + H, 24 + dx:24 + dx + W] for dy, dx in OFFSETS]
    return torch.stack(near, 1)


def naive_batch_par(image, score, iterations=10):
    """PAR of one image (3, H, W) and its scores (K, H, W), all neighbours at once."""
    near = naive_neighbours(image)
    std = near.std(1, keepdim=True) + 1e-8
    colour = -((near - image[:, None]).abs() / std / 0.3).square().mean(0)
    length = torch.tensor([math.hypot(*offset) for offset in OFFSETS])
    distance = -(length / (length.std() + 1e-8) / 0.3).square()
    kernel = colour.softmax(0) + 0.01 * distance.softmax(0)[:, None, None]
    for _ in range(iterations):
        score = (naive_neighbours(score) * kernel).sum(1)
    return score


def naive_pseudo_label(image, cam, label, low=0.35, high=0.55, iterations=10):
    """One image (3, H, W) in [0, 1], cam (C, h, w), label (C,) -> (H, W)."""
    H, W = image.shape[-2:]
    half, classes = (H // 2, W // 2), label.nonzero()[:, 0]
    small = resized(image[None], half)[0]
    mask_values = torch.cat([torch.zeros(1, dtype=torch.int64), classes + 1])
    maps = []
    for background in (low, high):
        score = resized(cam[None, classes], half)[0]
        score = torch.cat([torch.full_like(score[:1], background), score]).softmax(0)
        score = resized(naive_batch_par(small, score, iterations)[None], (H, W))[0]
        maps.append(mask_values[score.argmax(0)])
    return torch.where(maps[1] > 0, maps[1], torch.where(maps[0] > 0, 255, 0))


def naive_cam(model, images, guide, kind, labels, mirrored=True):
    """Normalised images -> guided CAM (B, C, gh, gw) and w_hat (B, L), over one or both views."""
    B, C = len(images), model.num_classes
    views = torch.cat([images, images.flip(-1)]) if mirrored else images
    _, _, patch_map, _, prob = naive_forward(model, views)
    affinity, cam = prob.mean(2), patch_map.relu()  # (L, views, N, N), (views, C, gh, gw)
    flat, S = cam.flatten(2), affinity[:, :, C:, C:]
    entropy = torch.empty(len(views), len(S))
    for b in range(len(views)):
        for l in range(len(S)):
            p = (S[l, b] @ (flat[b] * labels[b % B, :, None]).sum(0)).softmax(0)
            entropy[b, l] = -(p * p.log2()).sum()
    w, w_hat = aream.reactivation_weights(entropy.view(-1, B, len(S)).mean(0), kind)
    attended, guided = flat * affinity[:, :, :C, C:].mean(0), []
    for b in range(len(views)):
        mean = torch.stack([w[b % B, l] * S[l, b] for l in guide]).mean(0)
        guided.append((mean @ attended[b].T).T.view_as(cam[b]))
    guided = torch.stack(guided)
    return guided[:B] + guided[B:].flip(-1) if mirrored else guided, w_hat


def naive_step(model, pixels, labels, args, coupling):
    """Affinity label (B, P, P) and total loss of a batch, without drop-path."""
    (guide, supervised), C = coupling, model.num_classes
    images, label = data.normalise(pixels), []
    with torch.no_grad():
        mirrored = args.pair_labels == "two-views"
        cam, w_hat = naive_cam(model, images, guide, args.reactivation, labels, mirrored)
        cam = resized(cam, [side // 2 for side in pixels.shape[2:]])
        for image, own, y in zip(pixels, aream.normalise_cam(cam, labels), labels):
            mask = naive_pseudo_label(image.float() / 255, own, y)
            grid = [side // model.patch for side in mask.shape]
            label.append(aream.affinity_label(mask[None], grid))
    label = torch.cat(label)
    class_logits, patch_logits, _, logits, _ = naive_forward(model, images)
    prob = logits.mean(2)[:, :, C:, C:].sigmoid()
    n1, n0, total = (label == 1).sum(), (label == 0).sum(), 0
    for l in supervised:
        attract = ((1 - prob[l]) * (label == 1)).sum((1, 2)) / (n1 + 1)
        repel = (prob[l] * (label == 0)).sum((1, 2)) / (n0 + 1)
        total = total + (w_hat[:, l] * (0.5 * attract + 0.5 * repel)).sum() / len(supervised)
    cls_loss = (F.binary_cross_entropy_with_logits(class_logits, labels)
                + F.binary_cross_entropy_with_logits(patch_logits, labels))
    return label, cls_loss + args.affinity_weight * total


def toy_batch(count):
    """-> pixels (B, 3, 64, 64) uint8, labels (B, 6)."""
    dataset = data.open_data("toy", None, "train", count)
    samples = train_cls.ClassificationSet(dataset, 64)
    for i, name in enumerate(dataset.ids):
        assert torch.equal(samples[i, 0][1], dataset.label_vector(name))
    return torch.stack([samples[i, 0][0] for i in range(count)]), samples.labels


@pytest.mark.parametrize("maps, grad", [((), True), (("affinity", "logits"), True),
                                        (("logits",), True), (("affinity",), False)])
def test_forward_equals_the_naive_implementation(maps, grad):
    model, images = vit.build("toy", 5, depth=3).eval(), torch.randn(2, 3, 32, 88)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.1)  # queries unlike keys
    with torch.set_grad_enabled(grad):
        output = model(images, **{name: True for name in maps})
    class_logits, patch_logits, patch_map, logits, prob = naive_forward(model, images)
    affinity = tuple(prob.mean(2)) if "affinity" in maps else ()
    logits = tuple(logits.mean(2)) if "logits" in maps else ()
    expected = class_logits, patch_logits, patch_map.relu(), affinity, logits
    assert_close(tuple(output), expected, atol=1e-5, rtol=1e-4)
    assert not any(kept.requires_grad for kept in (output.cam, *output.affinity))


@pytest.mark.parametrize("mode", ["two-views", "shared"])
@pytest.mark.parametrize("coupling, kind", [("all", "uniform"), ("split", "entropy")])
def test_step_equals_the_naive_implementation(coupling, kind, mode):
    pixels, labels = toy_batch(3)
    args = train_cls.parse_args(["--data", "toy", "--reactivation", kind, "--pair-labels", mode])
    args.precision = "float32"
    model, layers = vit.build("toy", 6, depth=4), aream.coupled_layers(4, coupling, 2)
    guidance = train_cls.Guidance(*layers)
    torch.nn.init.normal_(model.head.weight)  # CAMs that tell the layers' entropies apart
    label, expected = naive_step(model, pixels, labels, args, layers)
    gradients = torch.autograd.grad(expected, tuple(model.parameters()))
    assert {0, 1} <= values(label)

    still = torch.optim.SGD(model.parameters(), lr=0)
    cls_loss, aff_loss = train_cls.train_step(model, still, (pixels, labels), args, guidance)
    assert aff_loss > 0 and model.training
    assert_close(cls_loss + args.affinity_weight * aff_loss, expected, atol=1e-5, rtol=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients):
        assert gradient.any(), name
        assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_static_entropy_and_labels_are_without_drop_path():
    pixels, labels = toy_batch(4)
    model, cpu = vit.build("toy", 6, depth=4), torch.device("cpu")
    torch.nn.init.normal_(model.head.weight)
    output = model(data.normalise(pixels), affinity=True)
    expected = aream.layer_entropy(output.cam, output.affinity, labels).mean(0)
    assert len(set(expected.tolist())) == 4
    model.set_drop_path(1.0)  # the last block's
    assert [block.drop_path.p for block in model.blocks] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    batches = [(pixels[:2], labels[:2]), (pixels[2:], labels[2:])]
    got = train_cls.mean_entropy(model, batches, "float32", cpu)
    assert_close(got, expected)
    views = train_cls.label_pass(model, pixels, "float32")
    assert_close(views.cam[:4], output.cam)
    assert model.training
    guidance = train_cls.Guidance(range(4), range(4), torch.tensor([1.0, 2, 3, 5]))
    args = train_cls.parse_args(["--data", "toy"])
    _, w_hat = train_cls.make_labels(views, pixels, labels, guidance, args)
    assert w_hat.tolist() == [[0, 0.25, 0.5, 1]] * 4


@pytest.mark.parametrize("low, high, iterations",
                         [(0.35, 0.55, 10), (0.4, 0.4, 10), (0.5, 0.5, 0)])
def test_pseudo_labels_equal_the_naive_implementation(low, high, iterations):
    """Of a batch, images of one and of two classes, and of one image alone."""
    settings = dict(low=low, high=high, iterations=iterations)
    pixels = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8)
    images, cam = pixels / 255, resized(torch.rand(2, 4, 5, 4)**2, (64, 48))
    labels = torch.tensor([[0, 0, 1.0, 0], [1.0, 0, 0, 1]])
    expected = [naive_pseudo_label(*one, **settings) for one in zip(images, cam, labels)]
    assert values(expected[1]) == {0, 1, 4} | ({255} if low < high else set())
    got = pseudo_label(images, cam, labels, **settings)
    assert (got == torch.stack(expected)).float().mean() > 0.999  # all but ties
    alone = refine.pseudo_mask(pixels[1], [0, 3], cam[1, [0, 3]], **settings)
    assert (alone == expected[1]).float().mean() > 0.999


def test_batched_par_equals_one_image_at_a_time():
    """Of so many pixels that a CPU takes them one by one, too."""
    images, score = torch.rand(3, 3, 200, 180), torch.rand(3, 4, 200, 180)
    score[:, 2] = 0  # an absent class
    expected = torch.stack([naive_batch_par(i, s) for i, s in zip(images, score)])
    got = refine.pixel_adaptive_refine(images, score)
    assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_both_losses_learn():
    """Last to first of 20 steps' losses over seeds 0-3: 0.21-0.42 and 0.11-0.57."""
    args = train_cls.parse_args(["--data", "toy", "--reactivation", "uniform"])
    args.precision, batch = "float32", toy_batch(4)
    model, guidance = vit.build("toy", 6, depth=3), train_cls.Guidance(range(3), range(3))
    optimizer = train_cls.make_optimizer(model, args)
    losses = [train_cls.train_step(model, optimizer, batch, args, guidance)
              for _ in range(20)]
    assert (losses[-1] < 0.75 * losses[0]).all()


def first_step(precision="float32", device="cpu", flags=""):
    """Both losses of a training step."""
    torch.manual_seed(0)
    args = train_cls.parse_args(["--data", "toy", *flags.split()])
    args.precision, model = precision, vit.build("toy", 6).to(device)
    batch = [part.to(device) for part in toy_batch(8)]
    optimizer = torch.optim.AdamW(model.parameters())
    guidance = train_cls.Guidance(range(6), range(6))
    return train_cls.train_step(model, optimizer, batch, args, guidance).cpu()


def test_bfloat16_is_near_float32():
    """Losses within 2 %, and what is not a product stays float32."""
    if not data.native_bfloat16(torch.device("cpu")):
        pytest.skip("this CPU emulates bfloat16")
    views = train_cls.label_pass(vit.build("toy", 6), toy_batch(8)[0], "bfloat16")
    assert {t.dtype for t in (views.cam, *views.affinity)} == {torch.float32}
    assert_close(first_step("bfloat16"), first_step(), rtol=0.02, atol=0)


@pytest.mark.parametrize("platform, native", [("linux", True), ("darwin", False)])
def test_bfloat16_of_an_arm_cpu(monkeypatch, platform, native):
    """On a Mac torch's products are slower in it than in float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    monkeypatch.setattr(sys, "platform", platform)
    assert data.native_bfloat16(torch.device("cpu")) == native


def test_bfloat16_patch_logits_are_averaged_in_float32():
    """A mean over 196 patches in bfloat16 cost three points of class mAP (43.0 for 46.0)."""
    model = vit.build("toy", 6).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.rand(1, 3, 64, 64))
    assert output.patch_logits.dtype == output.class_logits.dtype == torch.float32


# -------------------------------------------------------------------------------------------------
# Whole stages, by their real command lines
# -------------------------------------------------------------------------------------------------
SMALL = "--limit 16 --batch 8 --epochs 2 --warmup-epochs 1 --depth 3 --deep-from 1"


def train(out, flags="", *more):
    """A small classifier -> its checkpoint."""
    call(train_cls, out, f"{SMALL} {flags}", *more)
    return data.read_checkpoint(out / "cls" / "last.pt", "cls")


def equal(one, other):
    """Whether two checkpoints hold the same weights, bit for bit."""
    weights, others = one["model"], other["model"]
    same = all(torch.equal(value, others[key]) for key, value in weights.items())
    return weights.keys() == others.keys() and same


@contextmanager
def stopped_in_epoch(number, monkeypatch):
    """A training inside stops after the steps of an epoch; a checkpoint was due after each."""
    def log_line(folder, record):
        if record.get("epoch") == number:
            raise data.UserError("stopped")
        written(folder, record)

    written = data.log_line
    with monkeypatch.context() as patch, refused("stopped"):
        patch.setattr(data, "log_line", log_line)
        patch.setattr(data, "SECONDS_BETWEEN_CHECKPOINTS", 0)
        yield


class Run:
    """A run of all stages, plain and AReAM."""

    def __init__(self, folder):
        self.plain, self.out = folder / "plain", folder / "run"

    def refine(self, flags="", *more):
        call(refine, self.out, f"--limit 16 {flags}", *more)

    def train_seg(self, flags="", *more):
        call(train_seg, self.out, f"--limit 16 --batch 4 --epochs 1 {flags}", *more)

    def evaluate(self, what, flags="", *more):
        call(evaluate, self.out, f"--limit 16 --what {what} {flags}", *more)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("finished"))
    torch.manual_seed(0)
    train(run.plain, "--reactivation none")
    train(run.out, "--branch-from", run.plain / "cls" / "warmup.pt")
    call(evaluate, run.plain, "--what layers --limit 4")
    call(evaluate, run.out, "--what layers --limit 4 --before", run.plain)
    run.refine()
    run.train_seg()
    for what in ("cam", "pseudo", "pred"):
        run.evaluate(what)
    return run


@pytest.fixture
def own(finished, tmp_path):
    """A copy of the finished run, to spoil."""
    shutil.copytree(finished.out, tmp_path / "run")
    shutil.copytree(finished.plain, tmp_path / "plain")
    return Run(tmp_path)


def test_every_stage_leaves_its_files(finished):
    names = [f"toy_train_{i:04d}" for i in range(16)]
    assert sorted(path.stem for path in (finished.out / "cam").glob("*.npz")) == names
    assert sorted(path.stem for path in (finished.out / "pseudo").glob("*.png")) == names
    assert len(list((finished.out / "pred" / "val").glob("*.png"))) == 16
    with Image.open(finished.out / "pseudo" / "toy_train_0000.png") as mask:
        assert mask.mode == "P" and mask.size == (64, 64)
    settings = data.read_json(finished.out / "cls" / "args.json", "")
    assert settings["precision"] == "float32" and settings["class_names"] == list(data.TOY_CLASSES)
    epochs = [line for line in data.read_log(finished.plain / "cls") if "epoch" in line]
    assert len(epochs) == 2
    assert {"cls_loss", "lr", "images/s", "minutes_left", "precision"} <= set(epochs[0])
    assert epochs[1]["lr"] == pytest.approx(1e-3 * train_cls.lr_factor(0.75))  # last of 4 steps
    epoch = data.read_log(finished.out / "seg")[0]
    assert epoch["lr"] == pytest.approx(5e-4 * (1 - 0.75) ** 0.9)


def test_defaults_for_photographs():
    """As in the release, whose batch is 64; with all 12 layers as much loss for a deep one."""
    args = train_cls.parse_args([])
    assert (args.lr, args.affinity_weight, args.deep_from) == (6.25e-5, 0.3, 7)
    assert (args.reactivation, args.entropy, args.coupling) == ("entropy", "online", "all")
    assert args.pair_labels == "two-views"
    assert train_cls.parse_args(["--coupling", "split"]).affinity_weight == 0.1
    names = [type(t).__name__ for t in train_cls.AUGMENTATIONS["release"](224)]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip", "RandomApply", "RandomApply",
                     "PILToTensor", "Lambda"]
    args = refine.parse_args("--beta 2 --steps 3 --rows normalised --scales 0.5 1".split())
    assert refine.refinement(args)[:4] == ([0.5, 1.0], "normalised", 2.0, 3)


def test_seeds_of_other_layers_and_other_thresholds(own):
    """Stage 2 with --layers writes what --what layers scores, but for its 16 bits."""
    table = data.read_json(own.out / "layers.json", "")["table"]
    for layers, row in (("0-2", "all layers"), ("0", "shallow layers"), ("1-2", "deep layers"),
                        ("2", "layer 2"), ("unrefined", "unrefined")):
        call(refine, own.out, f"--limit 4 --overwrite --layers {layers} --low 0.4 --high 0.4")
        call(evaluate, own.out, "--limit 4 --what cam")
        found = data.read_json(own.out / "results.json", "", list)[-1]
        assert found["fixed"] == pytest.approx(table[row]["fixed"], abs=0.2), row
    masks = [data.read_mask(path) for path in (own.out / "pseudo").glob("*.png")]
    assert len(masks) == 4 and not any((mask == data.IGNORE).any() for mask in masks)


def test_what_is_decayed_and_how_fast_it_learns():
    args = train_cls.parse_args(["--data", "toy", "--weight-decay", "0.3"])
    model = vit.build("toy", 6, depth=1)
    decayed, plain = train_cls.make_optimizer(model, args).param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.weight"}
    args = train_seg.parse_args(["--data", "toy", "--lr", "0.01"])
    net = train_seg.build("deeplabv3_vit", 6, dict(preset="toy", depth=1, size=64))
    backbone, head = train_seg.make_optimizer(net, args).param_groups
    assert (backbone["base"], head["base"]) == (0.01, 0.1)
    assert len(head["params"]) == len(list(net.classifier.parameters()))


def test_layers_are_scored_and_drawn(finished):
    record = data.read_json(finished.out / "layers.json", "")
    rows = {"all, weighted", "layer 0", "layer 1", "layer 2", *study.CAM_COLUMNS}
    assert set(record["table"]) == rows
    measures = record["measures"]
    assert all(len(measures[measure]) == 3 for measure in evaluate.MEASURES)
    assert max(measures["entropy"]) <= 6  # log2 of 64 patches
    for measure in ("distance", "top", "objects", "background", "w_hat"):
        assert all(0 <= value <= 1 for value in measures[measure])
    assert (finished.out / "layers.png").is_file()


@pytest.mark.parametrize("rows", ["plain", "normalised"])
def test_layers_are_measured_with_the_rows_that_refine(rows):
    affinity = torch.randn(3, 1, 18, 18).softmax(-1)  # 2 class tokens, 16 patches
    cam, labels = 20 * torch.rand(1, 2, 4, 4), torch.tensor([[1.0, 0]])
    target = torch.zeros(64, 64).long()
    target[:32, :16], target[32:] = 3, data.IGNORE  # patches 0 and 4, and those from 8 on
    output = vit.ViTOutput(None, None, cam, tuple(affinity))
    got = evaluate.measure_layers(output, labels, target, rows)

    of_tokens, blocks = affinity[:, 0, 2:, :2].sum(-1), affinity[:, 0, 2:, 2:]
    if rows == "normalised":
        blocks = blocks / blocks.sum(-1, keepdim=True)
    entropy = aream.layer_entropy(cam, blocks[:, None], labels)[0]
    expected = dict(
        entropy=entropy, distance=aream.row_distance(blocks), top=aream.top_share(blocks),
        objects=of_tokens[:, [0, 4]].mean(-1),
        background=of_tokens[:, [1, 2, 3, 5, 6, 7]].mean(-1),
        w_hat=aream.reactivation_weights(entropy)[1])
    assert_close(dict(zip(evaluate.MEASURES, got)), expected)


@pytest.mark.parametrize("flags, columns", [("--split train --limit 2", 5), ("", 7)])
def test_pictures(own, flags, columns):
    """Photo, unrefined, refined (with --before: twice), pseudo-mask, DeepLab (of val), truth."""
    before = [] if flags else ["--before", own.plain]
    own.evaluate("pictures", flags, *before)
    assert Image.open(own.out / "pictures.png").width == columns * 132


def test_refine_makes_only_what_is_missing(own):
    with refused("cam is in use: go on with --resume, replace it with --overwrite"):
        own.refine()
    gone, there = (own.out / "pseudo" / f"toy_train_000{i}.png" for i in (3, 1))
    content, when = gone.read_bytes(), there.stat().st_mtime_ns
    gone.unlink()
    own.refine("--resume")
    assert gone.read_bytes() == content and there.stat().st_mtime_ns == when
    own.refine("--overwrite")
    assert gone.read_bytes() == content and there.stat().st_mtime_ns != when


def test_another_or_a_half_trained_classifier_is_mentioned(own, capsys):
    data.say_once.cache_clear()
    shutil.copy(own.plain / "cls" / "warmup.pt", own.out / "cls" / "last.pt")
    for what, message in (("cam", r"look: .*cam was made from another .*; refine.py --overwrite"),
                          ("layers", "look: .*last.pt is of epoch 1 of 2; training goes on with")):
        own.evaluate(what)
        assert re.search(message, capsys.readouterr().out)
    last = own.out / "seg" / "last.pt"
    data.write_checkpoint(last, {**data.read_checkpoint(last, "seg"), "extra": 0})
    own.evaluate("pred")
    assert re.search("look: .*val was made from another .*last.pt", capsys.readouterr().out)


def test_what_resume_refuses(own):
    """Other settings, images, classifiers, masks or models than what is there was made with."""
    def refuses(stage, flags, message):
        with refused(f"--resume in .*{message}"):
            stage(f"{flags} --resume")

    refuses(own.refine, "--steps 3", "cam with another steps: it was 1, now 3; repeat it, replace")
    refuses(own.refine, "--precision bfloat16", "cam with another precision")
    refuses(own.refine, "--limit 20", "cam with another limit")
    refuses(own.train_seg, "--predict-only --scales 0.5", "val with another scales")
    refuses(own.train_seg, "--arch deeplabv3_mobilenet_v2", "seg with another arch")
    data.write_mask(own.out / "pseudo" / "toy_train_0003.png", np.ones((64, 64)))
    refuses(own.train_seg, "", "seg with another pseudo-masks")
    shutil.copy(own.plain / "cls" / "last.pt", own.out / "cls" / "last.pt")
    refuses(own.refine, "", "cam with another classifier")
    last = own.out / "seg" / "last.pt"
    data.write_checkpoint(last, {**data.read_checkpoint(last, "seg"), "extra": 0})
    refuses(own.train_seg, "--predict-only", "val with another model")


def test_resume_on_a_classifier_of_another_size(own):
    train(own.out, "--overwrite --depth 2")
    with refused("--resume in .*seg with another classifier"):
        own.train_seg("--resume")


def test_layers_before_and_after(own, tmp_path, monkeypatch):
    with refused("layers.json has images 4, this run 3: make it with --what layers"):
        call(evaluate, own.out, "--what layers --limit 3 --before", own.plain)
    other = tmp_path / "other" / own.plain.parent.name / own.out.name  # the same last two folders
    shutil.copytree(own.plain, other)
    shown = []
    monkeypatch.setattr(evaluate, "draw_layers", lambda *given: shown.extend(given[3]))
    call(evaluate, own.out, "--what layers --limit 4 --before", other)
    assert len(shown) == 2 and shown[0] == f"{shown[1]} (before)"


def test_deeplab_begins_with_its_backbone_and_learns(own):
    classifier = data.read_checkpoint(own.out / "cls" / "last.pt", "cls")["model"]
    for flags, begins in (("--lr 1e-9", True), ("", False)):
        own.train_seg(f"--limit 8 --overwrite {flags}")
        weights = data.read_checkpoint(own.out / "seg" / "last.pt", "seg")["model"]
        near = [torch.allclose(weights[f"backbone.model.{key}"], value, atol=1e-6)
                for key, value in classifier.items() if key.startswith("blocks.0.mlp")]
        assert near and all(near) == begins
    with refused("nothing.pth"):
        own.train_seg("--overwrite --arch deeplabv3_mobilenet_v2 --size 33 --pretrained",
                      own.out / "nothing.pth")


def test_predictions_are_means_over_mirror_images():
    def bright(images):
        """Class 1 where it is bright, more surely than 0 where it is dark."""
        score = torch.where(images[:, :1] > 0, 5.0, -1.0)
        return {"out": torch.cat([torch.zeros_like(score), score], 1)}

    pixels = torch.zeros(3, 8, 12, dtype=torch.uint8)
    pixels[:, :, 8:] = 255
    assert torch.equal(train_seg.predict(bright, pixels, [1.0]), (pixels[0] > 0).byte())
    # and over scales: surely class 1 at twice the size, weakly class 0 at the image's own
    surer = lambda images: {"out": torch.tensor([[0.0, 9 if images.shape[-1] == 24 else -1]])
                            [..., None, None].expand(2, 2, *images.shape[-2:])}
    assert train_seg.predict(surer, pixels, [2.0, 1.0]).all()


def test_deeplab_resumes_to_the_same_bits(own, monkeypatch):
    """And replaces what the half-trained model predicted, but nothing once it is trained."""
    own.train_seg("--limit 8 --epochs 2 --overwrite")
    last, predicted = own.out / "seg" / "last.pt", own.out / "pred" / "val" / "toy_val_0001.png"
    whole = data.read_checkpoint(last, "seg")
    with stopped_in_epoch(2, monkeypatch):
        own.train_seg("--limit 8 --epochs 2 --overwrite")
    data.write_mask(predicted, np.full((64, 64), data.IGNORE))
    own.train_seg("--limit 8 --epochs 2 --resume")
    assert equal(whole, data.read_checkpoint(last, "seg"))
    assert data.IGNORE not in data.read_mask(predicted)
    other = own.out / "pred" / "train"
    other.mkdir()
    own.train_seg("--limit 8 --epochs 2 --resume")
    assert other.is_dir()


def test_deeplabs_crops_and_loss(own, monkeypatch):
    """Others in each epoch; a mean over the labelled pixels, which would be 1 / 64 over all."""
    epochs = []
    monkeypatch.setattr(data.EpochSampler, "set_epoch", lambda self, epoch: epochs.append(epoch))
    for path in (own.out / "pseudo").glob("*.png"):
        data.write_mask(path, np.where(np.eye(64) > 0, 1, data.IGNORE))
    own.train_seg("--overwrite --limit 8 --epochs 2")
    assert epochs == [0, 1] and data.read_log(own.out / "seg")[0]["loss"] > 0.2
    for flags, message in (("--lr 1e30", "loss is not finite in epoch 1"),
                           ("--size 60", "--size 60 is not a multiple of the patch size 8")):
        with refused(message):
            own.train_seg(f"--overwrite {flags}")


def test_what_a_training_deletes(own):
    """Neither its own masks nor, unasked, predictions of another model."""
    predictions = own.out / "pred" / "val"
    with refused("lies in .*, where training replaces predictions: use another --out"):
        own.train_seg("--overwrite --masks", predictions)
    (own.out / "seg").rename(own.out / "elsewhere")
    with refused("pred holds predictions, but .*seg no model that made them: replace them with"):
        own.train_seg()
    assert len(list(predictions.glob("*.png"))) == 16
    (predictions / "stale.png").write_bytes(b"of the model before")
    own.train_seg("--overwrite")
    assert len(list(predictions.glob("*.png"))) == 16 and not (predictions / "stale.png").exists()


@pytest.mark.parametrize("mask, message", [
    (None, "1 of 16 files are missing .*toy_val_0003.*train_seg.py"),
    (np.full((64, 64), 255), "toy_val_0003.png: the prediction holds 255"),
    (np.full((64, 64), 9), "toy_val_0003.png cannot be read .*the value 9, allowed are 0..6"),
    (np.zeros((32, 64)), "toy_val_0003: the ground truth is 64 x 64 pixels, .* 32 x 64")],
    ids=["missing", "255", "no class", "size"])
def test_a_missing_or_wrong_prediction_is_no_perfect_score(own, mask, message):
    path = own.out / "pred" / "val" / "toy_val_0003.png"
    path.unlink()
    if mask is not None:
        data.write_mask(path, mask)
    with refused(message):
        own.evaluate("pred")


def test_masks_without_a_class_are_refused(own, tmp_path):
    for i in range(16):
        name = f"toy_train_{i:04d}"
        binary = np.where(data.draw_toy(name)[1] > 0, 255, 0)
        data.write_mask(tmp_path / "binary" / f"{name}.png", binary)
        data.write_mask(own.out / "pseudo" / f"{name}.png", np.full((64, 64), 255))
    with refused("binary show no class: write class k as k"):
        own.train_seg("--overwrite --masks", tmp_path / "binary")
    with refused("pseudo decide on no pixel: there is nothing to score"):
        own.evaluate("pseudo")


def test_tables_are_of_their_records(tmp_path, monkeypatch):
    """What `python -m results.study` writes is what is there; README shows the gains."""
    for path in study.HERE.glob("*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "tables").mkdir()
    shipped, pages = study.HERE / "tables", (HERE / "README.md", study.HERE / "README.md")
    monkeypatch.setattr(study, "HERE", tmp_path)
    study.main([])
    for path in shipped.glob("*.md"):
        assert (tmp_path / "tables" / path.name).read_text("utf-8") == path.read_text("utf-8")
    for page in pages:
        assert "\n".join(study.gain_table()[:6]) + "\n" in page.read_text("utf-8")
    assert "\n\n" + "\n".join(study.gain_table()) + "\n\n" in pages[1].read_text("utf-8")


def test_a_studys_tables_by_hand():
    """Two seeds: all layers 40 and 44 before, 50 and 56 after."""
    records = []
    for row, scores in (("none", (40, 44)), ("uniform", (50, 56))):
        for seed, miou in enumerate(scores):
            names = [*study.CAM_COLUMNS, "layer 0", "layer 1"]
            table = {name: {"fixed": miou, "best": miou + 1} for name in names}
            table["layer 1"] = {"fixed": miou - 5, "best": miou}
            records.append({"row": f"reactivation/{row}", "seed": str(seed), "map": 80.0,
                            "table": table, "measures": {"entropy": [5.0, 6.0]}})
    printed = "\n".join(study.study_tables(records))
    assert "| none | 2 | 80.0 ± 0.0 | 42.0 ± 2.8 (43.0) |" in printed
    assert "| none | 42.0 (5.00) | 37.0 (6.00) |" in printed
    assert "| uniform | +0.0 ± 0.0 | +11.0 ± 1.0 |" in printed  # paired by seed


def test_study_gathers_runs(finished, tmp_path, capsys):
    shutil.copytree(finished.out, tmp_path / "study" / "masks" / "band" / "0")
    study.main(["gather", str(tmp_path / "study"), str(tmp_path / "toy.json")])
    record, = data.read_json(tmp_path / "toy.json", "", list)
    assert (record["row"], record["seed"]) == ("masks/band", "0")
    assert record["settings"]["reactivation"] == "entropy" and 0 <= record["map"] <= 100
    last = [line for line in data.read_log(finished.out / "cls") if "cls_loss" in line][-1]
    assert record["cls_loss"][str(last["epoch"])] == pytest.approx(last["cls_loss"], abs=1e-4)
    shown = [f"{record['pseudo'][key]:.1f}" for key in ("labelled", "all", "undecided")]
    assert f"| {' | '.join(shown)} | {record['pred']['miou']:.1f} |" in capsys.readouterr().out
    deep = data.read_json(finished.out / "layers.json", "")["table"]["deep layers"]
    study.main(["demo", str(finished.plain), str(finished.out)])
    assert f" | {deep['fixed']:.1f} ({deep['best']:.1f}) |" in capsys.readouterr().out


@slow
@pytest.mark.parametrize("script", ["toy.sh", "voc.sh"])
def test_a_study_goes_through_all_its_rows(script):
    """Of no seed, so that nothing is made."""
    subprocess.run(["bash", f"results/{script}"], cwd=HERE, check=True,
                   env={**os.environ, "PYTHON": "true", "SEEDS": " "})


def command_line(dataset, root, out):
    """The flags with which a stage reads a data set below root and writes to out."""
    places = ["--data-root", str(root), "--out", str(out)]
    return ["--data", dataset, *places, "--workers", "0", "--device", "cpu"]


ONE_EPOCH = ("--preset toy --pretrained none --batch 2 --epochs 1 --warmup-epochs 0 "
             "--deep-from 2 --size").split()
MOBILENET = ("--arch deeplabv3_mobilenet_v2 --pretrained none --size 33 --batch 2 --epochs 1 "
             "--scales 1").split()


@pytest.mark.parametrize("name", ["VOC2012", "COCO2014"])
def test_voc_and_coco_through_all_stages(tmp_path, name):
    make_voc(tmp_path)
    make_coco(tmp_path)
    masks = tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass"
    masks.rename(tmp_path / "hidden")  # nothing but image labels is needed
    common = command_line(name, tmp_path, tmp_path / "run")
    other = "--coupling split --pair-labels shared --augment release".split()
    train_cls.main([*common, *ONE_EPOCH, "32", *other])
    refine.main(common)
    train_seg.main([*common, *MOBILENET])
    (tmp_path / "hidden").rename(masks)
    evaluate.main([*common, "--what", "cam"])
    evaluate.main([*common, "--what", "pred"])


@pytest.mark.parametrize("arch", train_seg.ARCHITECTURES[:3])
def test_cnn_architectures(arch, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url",
                        lambda *a, **k: pytest.fail("a download was tried"))
    net = train_seg.build(arch, 4).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 65, 97))["out"].shape == (1, 5, 65, 97)
        channels, dilated = (320, 3) if arch == "deeplabv3_mobilenet_v2" else (2048, 2)
        assert net.backbone(torch.randn(1, 3, 64, 96))["out"].shape == (1, channels, 4, 6)
    atrous = [m.dilation[0] for m in net.classifier.modules() if isinstance(m, torch.nn.Conv2d)]
    assert tuple(sorted(set(atrous) - {1})) == train_seg.ATROUS_RATES
    convolutions = [m for m in net.backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(c.dilation != (1, 1) for c in convolutions) == dilated  # behind the last halving
    assert convolutions[0].weight.is_contiguous(memory_format=torch.channels_last)

    # torchvision's classification weights, whole and incomplete
    whole = getattr(torchvision.models, arch.removeprefix("deeplabv3_"))(weights=None).state_dict()
    monkeypatch.setattr(vit, "read_weights", lambda source, preset: whole)
    train_seg.load_backbone(net, arch, "classifier.pth")
    first = next(value for value in whole.values() if value.ndim == 4)
    assert torch.equal(next(net.backbone.parameters()), first)
    del whole[next(key for key in whole if key.endswith("running_mean"))]
    with refused(f"classifier.pth does not hold an ImageNet backbone for {arch}"):
        train_seg.load_backbone(net, arch, "classifier.pth")


TURNED = Image.Exif()
TURNED[0x0112] = 6
PHOTOS = {"a b.png": (70, 50), "b.jpeg": (70, 50), "turned.jpg": (50, 70),
          "large.webp": (1300, 900), "thin.bmp": (500, 3)}  # name -> size, upright


@pytest.fixture
def photos(tmp_path):
    """A folder of photographs of several formats and sizes, and a text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    picture = Image.fromarray(draw(seed=1, size=(50, 70)))
    picture.save(folder / "a b.png")
    picture.convert("CMYK").save(folder / "b.jpeg")
    picture.save(folder / "turned.jpg", exif=TURNED)
    picture.resize((1300, 900)).save(folder / "large.webp")
    picture.resize((500, 3)).save(folder / "thin.bmp")
    (folder / "notes.txt").write_text("no photograph")
    return folder


def test_masks_of_photographs(own, photos):
    """Nothing but the checkpoint is needed: no data set, no pseudo-masks."""
    for folder in ("cls", "cam", "pseudo", "pred"):
        shutil.rmtree(own.out / folder)
    call(train_seg, own.out, "--max-side 160 --photos", photos)
    for name, size in PHOTOS.items():
        mask = own.out / "photos" / Path(name).with_suffix(".png")
        with Image.open(mask) as image:
            assert image.size == size and image.mode == "P"
        assert Image.open(mask.with_suffix(".overlay.jpg")).width >= size[0]


def test_cams_of_photographs(own, photos, capsys):
    chosen = [photos / "a b.png", photos / "large.webp"]
    data.say_once.cache_clear()
    call(refine, own.out, "--max-side 160 --photos", *chosen, "--present", "dots", "rings")
    printed = capsys.readouterr().out
    assert "a b.png: dots, rings  ->" in printed and "shrunk to 160 px" in printed
    with Image.open(own.out / "photos" / "large.cam.png") as mask:
        assert mask.size == (1300, 900) and values(np.array(mask)) <= {0, 5, 6, 255}
    call(refine, own.out, "--photos", photos / "b.jpeg")  # of what the classifier believes
    assert re.search(r"b.jpeg: \w+ \(probability [01]\.\d\d\)", capsys.readouterr().out)


def test_picture_of_photographs(own, photos, capsys):
    """Photo, CAM, pseudo-mask; DeepLab's mask where there is a DeepLab."""
    for columns in (4, 3):
        own.evaluate("pictures", "--max-side 160 --photos", photos)
        assert Image.open(own.out / "photos.png").width == columns * 220
        (own.out / "seg" / "last.pt").unlink(missing_ok=True)
    (photos / "a b.png").write_bytes(b"no image")  # the others are shown all the same
    (own.out / "photos.png").unlink()
    with refused("1 left out: .*a b.png cannot be read"):
        own.evaluate("pictures", "--max-side 160 --photos", photos)
    assert (own.out / "photos.png").is_file() and "shows 4 photographs" in capsys.readouterr().out


def test_the_shipped_model_finds_the_cat(tmp_path, capsys):
    """Face and ear are cat in both masks, the blurred corner on the right is not."""
    shutil.copytree(HERE / "models" / "voc_deit_tiny", tmp_path, dirs_exist_ok=True)
    cat = HERE / "assets" / "photos" / "chelsea.jpg"  # (300, 451)
    for stage in (refine, train_seg):
        stage.main(["--photos", str(cat), "--device", "cpu", "--out", str(tmp_path)])
    assert re.search(r"chelsea.jpg: cat \(probability 1\.00\)", capsys.readouterr().out)
    for name in ("chelsea.cam.png", "chelsea.png"):
        mask = data.read_mask(tmp_path / "photos" / name)
        face = mask[[100, 120, 180], [180, 280, 230]]
        assert mask.shape == (300, 451) and values(face) == {8} and values(mask) <= {0, 8, 255}
        assert mask[30, 440] != 8


def test_what_is_no_photograph_is_counted(own, photos, capsys):
    (photos / "inside").mkdir()
    (photos / "._b.jpeg").write_bytes(b"of a Mac")
    (photos / "x.heic").write_bytes(b"of a phone")
    (photos / "b.pdf").write_bytes(b"which Pillow only writes")
    call(train_seg, own.out, "--max-side 160 --photos", photos, photos / "b.jpeg")  # once
    printed = capsys.readouterr().out
    assert printed.count("b.jpeg: ") == 1 and "._b" not in printed
    assert printed.splitlines()[-1] == (
        "not read: 4 (name folders inside, convert what Pillow does not read): b.pdf, inside, "
        "notes.txt, x.heic")


def test_photographs_that_are_refused(own, photos):
    with refused("does not know 'cat'; it knows bars, columns"):
        call(refine, own.out, "--present cat --photos", photos)
    for stage, program in ((refine, "train_cls.py"), (train_seg, "train_seg.py")):
        with refused(f"no checkpoint .*last.pt: run {program} first, or give one that it wrote"):
            call(stage, own.out / "elsewhere", "--photos", photos)
    with refused("no photograph or folder .*none"):
        call(refine, own.out, "--photos", photos / "none")
    shutil.copy(photos / "b.jpeg", photos / "b.png")
    with refused("two photographs are called 'b'"):
        call(refine, own.out, "--photos", photos)


@pytest.fixture
def unlabelled_split(tmp_path):
    """A VOC with a test split of c and d, which have neither labels nor masks."""
    voc = make_voc(tmp_path)
    (voc / "ImageSets" / "Segmentation" / "test.txt").write_text("c\nd\n")
    for name in "cd":
        (voc / "Annotations" / f"{name}.xml").unlink()
        (voc / "SegmentationClass" / f"{name}.png").unlink()
    for split in ("trainaug", "val"):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("a\nb\n")
    return command_line("VOC2012", tmp_path, tmp_path / "run")


def test_predicting_a_split_without_labels(unlabelled_split, tmp_path):
    for name in "ab":
        data.write_mask(tmp_path / "run" / "pseudo" / f"{name}.png", np.full((40, 48), 8))
    train_seg.main([*unlabelled_split, *MOBILENET, "--predict-split", "test"])
    predicted = (tmp_path / "run" / "pred" / "test").glob("*.png")
    assert sorted(path.name for path in predicted) == ["c.png", "d.png"]


def test_another_split_with_the_trained_model_alone(own):
    shutil.rmtree(own.out / "pseudo")
    only = "--limit 4 --predict-only --predict-split train"
    call(train_seg, own.out, only)
    predicted = own.out / "pred" / "train"
    assert len(list(predicted.glob("*.png"))) == 4
    with refused("train is in use: go on with --resume"):
        call(train_seg, own.out, only)
    (predicted / "toy_train_0002.png").unlink()
    call(train_seg, own.out, f"{only} --resume")
    assert len(list(predicted.glob("*.png"))) == 4


def test_submission_to_the_voc_server(unlabelled_split, tmp_path):
    pack = [*unlabelled_split, "--what", "submission"]
    predicted = tmp_path / "run" / "pred" / "test"
    with refused("2 of 2 files are missing .*--predict-only --resume --predict-split test"):
        evaluate.main(pack)
    for name in "cd":
        data.write_mask(predicted / f"{name}.png", np.full((40, 48), 8))
    evaluate.main(pack)
    with tarfile.open(tmp_path / "run" / "comp6_test_cls.tgz") as tar:
        inside = "results/VOC2012/Segmentation/comp6_test_cls"
        assert tar.getnames() == [f"{inside}/c.png", f"{inside}/d.png"]
    with refused("packs a whole split of VOC2012"):
        evaluate.main([*pack, "--limit", "1"])
    for mask, message in ((np.full((40, 48), 255), "holds 255"),
                          (np.zeros((9, 9)), "is 9 x 9 pixels"),
                          (np.full((40, 48), 21), "the value 21")):
        data.write_mask(predicted / "d.png", mask)
        with refused(f"d.png.*{message}"):
            evaluate.main(pack)


def test_mean_average_precision_by_hand():
    logits = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.5], [0.1, 0.3, 0.2], [0.4, 0.0, 0.1]])
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]])
    first = (1 / 1 + 2 / 3 + 3 / 4) / 3  # images by score: 0 (yes), 1 (no), 3 (yes), 2 (yes)
    second = (1 / 2 + 2 / 4) / 2  # 2 (no), 1 (yes), 0 (no), 3 (yes); the third class never occurs
    assert train_cls.mean_average_precision(logits, labels) == pytest.approx((first + second) / 2)


@pytest.mark.parametrize("silent, speaks", [("patch_logits", "of_class_tokens"),
                                            ("class_logits", "of_patches")])
def test_class_map_of_each_branch(silent, speaks):
    """A branch that gives every image the same logits leaves the class mAP to the other."""
    args = train_cls.parse_args(["--data", "toy", "--workers", "0"])
    args.precision, model = "float32", vit.build("toy", 6)
    forward = model.forward

    def silenced(images):
        output = forward(images)
        return output._replace(**{silent: torch.zeros_like(output.class_logits)})

    model.forward = silenced
    samples = train_cls.ClassificationSet(data.open_data("toy", None, "val", 8), 64)
    of = train_cls.validate(model, samples, args, torch.device("cpu"))
    assert of["val_class_mAP"] == of[speaks] and len(set(of.values())) == 2
    model.set_drop_path(0.9)
    assert train_cls.validate(model.train(), samples, args, torch.device("cpu")) == of


# -------------------------------------------------------------------------------------------------
# Everyday input
# -------------------------------------------------------------------------------------------------
def draw(seed=0, size=(40, 48)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def make_voc(root, ids="abcd", size=(40, 48), classes=(("cat", 8), ("person", 15))):
    """A small VOC: two classes and their values, masks as boxes."""
    voc, rng = root / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for i, name in enumerate(ids):
        shown, value = classes[i % 2]
        mask = np.zeros(size, np.uint8)
        mask[5:30, 10:35] = value
        image = rng.integers(0, 60, (*size, 3)) + 150 * (mask > 0)[..., None]
        Image.fromarray(image.astype(np.uint8)).save(voc / "JPEGImages" / f"{name}.jpg")
        data.write_mask(voc / "SegmentationClass" / f"{name}.png", mask)
        part = "<difficult>1</difficult><part><name>head</name></part>"
        text = f"<object><name>{shown}</name>{part}</object>"
        (voc / "Annotations" / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")
    for split in ("train", "trainaug", "val"):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return voc


def make_coco(root, size=(40, 48)):
    """A small COCO: images of a polygon (category 90) and a crowd (1); the last has nothing."""
    coco, (H, W) = root / "COCO2014", size
    (coco / "annotations").mkdir(parents=True)
    box = [[10, 10, 40, 10, 40, 30, 10, 30]]
    crowd = dict(size=[H, W], counts=[15 * H + 12, 8, H - 8, 8, H * W - 16 * H - 20])
    for split in ("train", "val"):
        (coco / f"{split}2014").mkdir()
        images, annotations = [], []
        for i in range(5):
            name = f"COCO_{split}2014_{i:012d}.jpg"
            Image.fromarray(draw(i, size)).save(coco / f"{split}2014" / name)
            images.append(dict(id=i, file_name=name, height=H, width=W))
        for i in range(4):
            annotations += [
                dict(id=10 * i, image_id=i, category_id=90, iscrowd=0, area=600, segmentation=box),
                dict(id=10 * i + 1, image_id=i, category_id=1, iscrowd=1, area=40,
                     segmentation=crowd)]
        categories = [dict(id=90, name="toothbrush"), dict(id=1, name="person")]
        record = dict(images=images, annotations=annotations, categories=categories)
        (coco / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(record))
    return coco


class Folder:
    """An own VOC (cat, dog, axolotl; images a to d) and a COCO, to spoil and to open."""

    def __init__(self, root):
        self.root, self.pets = root, root / "pets"
        make_voc(root, classes=(("cat", 1), ("axolotl", 3))).rename(self.pets)
        self.classes = self.pets / "classes.txt"
        self.classes.write_text("cat\ndog\naxolotl\n")
        self.image = self.pets / "JPEGImages" / "a.jpg"
        self.mask = self.pets / "SegmentationClass" / "a.png"
        self.xml = self.pets / "Annotations" / "a.xml"
        self.table = self.pets / "labels.csv"
        self.list = self.pets / "ImageSets" / "Segmentation" / "train.txt"
        self.coco = make_coco(root)
        self.instances = self.coco / "annotations" / "instances_train2014.json"
        self.common = command_line(str(self.pets), root, root / "run")
        self.common += ["--classes", str(self.classes)]

    def open(self):
        return data.open_data(str(self.pets), None, "train", classes=str(self.classes))

    def open_coco(self):
        return data.open_data("COCO2014", self.root, "train")

    def replace(self, file, image=None, **how):
        """Another photograph in place of a, or the same in another file."""
        with Image.open(self.image) as same:
            (image or same).save(self.image.with_name(file), **how)
        if file != "a.jpg":
            self.image.unlink()

    def write(self, file, text):
        if file == "table":
            shutil.rmtree(self.xml.parent)  # in whose place it stands
        getattr(self, file).write_text(text, encoding="utf-8")

    def palette(self, colours, meaning=(0, 1)):
        """Mask a with these palette colours, index k where its value was meaning[k]."""
        mask = data.read_mask(self.mask)
        image = Image.fromarray(np.select([mask == v for v in meaning], range(len(meaning)))
                                .astype(np.uint8))
        image.putpalette([int(channel) for colour in colours for channel in colour])
        image.save(self.mask)

    def json(self, change, split="train"):
        """Change the record of COCO's annotations."""
        path = self.instances.with_name(f"instances_{split}2014.json")
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))

    def first(self, **change):
        """Change COCO's first annotation."""
        self.json(lambda record: record["annotations"][0].update(change))

    def first_image(self, number=0, **change):
        self.json(lambda record: record["images"][number].update(change))


GREY16 = Image.fromarray((np.full((40, 48), 88) * 256).astype(np.uint16))
FLOAT = Image.fromarray(np.zeros((9, 9), np.float32))
COLOUR = [tuple(colour) for colour in data.VOC_COLOURS.tolist()]
MAC = "Ko\N{COMBINING DIAERESIS}ter"
GREY = [(value, value, value) for value in range(256)]
LATIN = '<?xml version="1.0" encoding="iso-8859-1"?><a><object><name>Köter</name></object></a>'


# What is done with the spoiled folder
opened, coco = Folder.open, Folder.open_coco
ids = lambda f: f.open().ids
size_of = lambda f: f.open().image("a").size
labels_of = lambda f: f.open().labels("a")
labels_of_both = lambda f: [f.open().labels(name) for name in "ab"]
mask_of = lambda f: sorted(values(f.open().mask("a")))


def pixels_of(f):
    """How many pixels of COCO's first image have class 1 (the crowd), class 2 (the polygon)."""
    mask = f.open_coco().mask("COCO_train2014_000000000000")
    return (mask == 1).sum(), (mask == 2).sum()


def in_a_subfolder(f):
    (f.coco / "train2014" / "sub").mkdir()
    Image.fromarray(draw()).save(f.coco / "train2014" / "sub" / "0001.png")
    f.first_image(file_name="sub/0001.png")


def as_a_mac_does(f):
    f.list.write_text("Köter\n", encoding="utf-8")
    for path in (f.image, f.xml, f.mask):
        path.rename(path.with_name(MAC + path.suffix))


TEXTS = [  # a file, its text, what is done, the right value or the error
    ("classes", "_background_\ncat\n", opened, "classes.txt lists '_background_', which is no cl"),
    ("classes", "# mine\ncat\n", opened, "classes.txt lists '# mine', which is no class"),
    ("classes", "cat\ncat\n", opened, "names the class 'cat' more than once"),
    ("classes", "\n".join(map(str, range(255))), opened, "names 255 classes: 1 to 254 fit"),
    ("list", "\ufeffa\r\nb\r\n\r\n", ids, ["a", "b"]),
    ("list", "a.jpg\nb.jpg\n", ids, ["a", "b"]),
    ("list", "a  1\nb -1\n", opened,
     "line 1 of .*train.txt is 'a  1': write one image name per line, without folders"),
    ("list", "../../secret\n", opened, "line 1 of .*train.txt is '../../secret': write one image"),
    ("list", "a\nzebra\n", opened, "names 1 images .*'zebra'; add them, or put a shorter list"),
    ("list", "a\na\n", opened, "lists 'a' more than once"),
    ("list", "\n", opened, "the split 'train' of .* is empty"),
    ("xml", '<a xmlns="http://x.org/voc"><object><name>\n dog \n</name></object></a>', labels_of,
     [1]),
    ("xml", '<?xml version="1.0" encoding="gb2312"?><a></a>', labels_of,
     "a.xml cannot be read .*multi-byte"),
    ("xml", "<a><object><name>unicorn</name></object></a>", labels_of,
     "a.xml names the class 'unicorn' in a, which .*classes.txt does not have"),
    ("xml", "<a></a>", labels_of, "a.xml names no object in a"),
    # labels.csv: names of classes
    ("table", "name,classes\na.jpg, dog ,cat\nb,axolotl\nb,cat\n", labels_of_both,
     [[0, 1], [0, 2]]),
    ("table", "image_id,labels\na,cat\nb,dog\n", labels_of_both, [[0], [1]]),
    ("table", "b,cat\n", labels_of, "labels.csv names no object in a"),
    ("table", "name;class\na;cat\n", opened,
     "line 2 of .*labels.csv is 'a;cat': write an image's name and its classes, with commas"),
    ("table", "a,cat\n\nzebra,cat\n", opened,
     "line 3 of .*labels.csv names the image 'zebra', which is not in"),
    ("table", "a,cow\n", labels_of, "labels.csv names the class 'cow' in a"),
    ("table", 'a,"cat\nb,dog\n', opened,
     "labels.csv cannot be read .*: look for a quote that is not closed"),
    # labels.csv: one-hot
    ("table", "path,cat,dog,axolotl,\na.jpg,1,0,True,\nb,0,1.0,0,", labels_of_both, [[0, 2], [1]]),
    ("table", "name,cat,dog\na,0,0\nb,1,0\n", labels_of, "labels.csv names no object in a"),
    ("table", "name,cat,dog\na,1,2\n", opened,
     "line 2 of .*labels.csv has the value '2': it must be 0 or 1"),
    ("table", "zebra,cat\na,cat\n", opened,
     "line 2 of .*value 'cat': it must be 0 or 1, as line 1 names classes and no image"),
    ("table", "name,cat,dog\na,1\n", opened, "line 2 of .*labels.csv has 1 values, line 1 2"),
    *[("table", text, opened, f"labels.csv has the column '{column}', which is no class of "
       ".*classes.txt, or is there twice")
      for text, column in (("name,fold,cat\na,3,1\n", "fold"), ("\nname,cat,Dog\na,1,0\n", "Dog"),
                           ("name,cat,cat\na,1,0\n", "cat"),
                           ("name,Cat,Dog\na,1,0\nb,,1\n", "Cat"))],
    ("instances", "{", coco, "instances_train2014.json cannot be read"),
    ("instances", "[]", coco, "instances_train2014.json cannot be read .it holds a list, not a d"),
    ("instances", "{}", coco, "KeyError.*laid out as COCO's instances files"),
]

EVERYDAY = [  # what, how it is spoiled, what is done, the right value or the error
    # photographs
    ("EXIF 6 turns", lambda f: f.replace("a.jpg", exif=TURNED), size_of, (40, 48)),
    ("EXIF that no longer fits the mask", lambda f: f.replace("a.jpg", exif=TURNED),
     lambda f: evaluate.target_of(f.open(), "a", (48, 40), f.image),
     "a.png: the ground truth is 40 x 48 pixels, .*a.jpg 48 x 40 .*EXIF"),
    ("16-bit grey, one level transparent", lambda f: f.replace("a.png", GREY16, transparency=3),
     lambda f: np.unique(f.open().image("a")).tolist(), [88]),
    ("float image", lambda f: f.replace("a.tif", FLOAT), size_of,
     "a.tif cannot be read .*mode 'F'"),
    ("capital extension", lambda f: f.replace("a.JPG"), size_of, (48, 40)),
    ("png, and a dot in the name", lambda f: (f.replace("a.1.png"), f.list.write_text("a.1\n")),
     lambda f: f.open().image("a.1").size, (48, 40)),
    ("two files of one name", lambda f: Image.open(f.image).save(f.image.with_suffix(".png")),
     opened, "holds a.jpg and a.png, two images of one name"),
    ("broken EXIF", lambda f: f.replace("a.png", exif=b"Exif\0\0MM*broken"), size_of, (48, 40)),
    ("an image of two pages",
     lambda f: f.replace("a.tif", save_all=True, append_images=[Image.fromarray(draw())]),
     size_of, (48, 40)),
    ("a Mac's hidden file", lambda f: f.image.with_name("._a.jpg").write_bytes(b"metadata"), ids,
     ["a", "b", "c", "d"]),
    ("half a file", lambda f: f.image.write_bytes(f.image.read_bytes()[:400]), size_of,
     "a.jpg cannot be read .*: replace it, or leave it out"),
    # masks
    ("palette in order", lambda f: f.palette(COLOUR[:2]), mask_of, [0, 1]),
    ("palette re-indexed", lambda f: f.palette([COLOUR[0], COLOUR[3]]), mask_of,
     r"a.png cannot be read .value 1 has the colour \(128, 128, 0\), which is another class's: "
     "save it again in VOC's palette"),
    ("ignored re-indexed", lambda f: f.palette([COLOUR[255], COLOUR[0]], (1, 0)), mask_of,
     "value 0 has the colour"),
    ("grey levels re-indexed", lambda f: f.palette([GREY[0], GREY[3]]), mask_of,
     r"value 1 has the colour \(3, 3, 3\)"),
    ("palette reversed", lambda f: f.palette([GREY[9], GREY[0]], (1, 0)), mask_of,
     "value 1 is black, as the background is, and 0 is not: save it again"),
    ("another palette is for display", lambda f: f.palette([GREY[9], (255, 0, 0)]), mask_of,
     [0, 1]),
    ("black and white is for display", lambda f: f.palette([GREY[0], GREY[255]]), mask_of, [0, 1]),
    ("a grey palette in order", lambda f: f.palette(GREY[:129]), mask_of, [0, 1]),
    ("a palette without 255", lambda f: (data.write_mask(f.mask, np.eye(40, 48) * 255),
                                         f.palette(COLOUR[:21], range(256))), mask_of, [0, 255]),
    ("one bit a pixel", lambda f: Image.fromarray(np.eye(40, 48) > 0).save(f.mask), mask_of,
     "a.png cannot be read .its mode '1' holds no values"),
    ("RGB in VOC's colours", lambda f: Image.open(f.mask).convert("RGB").save(f.mask), mask_of,
     [0, 1]),
    ("RGB in other colours", lambda f: Image.fromarray(draw()).save(f.mask), mask_of,
     "a.png cannot be read .*none of VOC's"),
    ("16-bit mask", lambda f: Image.fromarray(data.read_mask(f.mask).astype(np.uint16))
     .save(f.mask), mask_of, [0, 1]),
    ("a value without class", lambda f: data.write_mask(f.mask, np.full((40, 48), 9)), mask_of,
     "a.png cannot be read .it holds the value 9, allowed are 0..3 and 255"),
    # lists and labels
    ("spaces in a name", lambda f: (f.replace("my cat.jpg"), f.list.write_text("my cat\n")), ids,
     ["my cat"]),
    ("an image that Pillow does not read", lambda f: f.image.rename(f.image.with_suffix(".heic")),
     opened, "first 'a' .Pillow does not read a.heic: convert it"),
    ("a space in a name, not read", lambda f: (
        f.image.rename(f.image.with_name("my cat.heic")), f.list.write_text("my cat\n")),
     opened, "first 'my cat' .Pillow does not read my cat.heic: convert it"),
    ("XML and masks as a Mac spells them", as_a_mac_does,
     lambda f: [f.open().image("Köter").size, f.open().labels("Köter"),
                sorted(values(f.open().mask("Köter")))], [(48, 40), [0], [0, 1]]),
    ("a class as a Mac spells it",
     lambda f: (f.classes.write_text(f"cat\ndog\n{MAC}\n", encoding="utf-8"),
                f.xml.write_bytes(LATIN.encode("iso-8859-1"))), labels_of, [2]),
    ("no XML", lambda f: f.xml.unlink(), labels_of, "no file .*a.xml: image labels come from"),
    ("a one-hot table of classes 0 and 1",
     lambda f: (f.classes.write_text("0\n1\n"), f.table.write_text("id,0,1\na,1,0\nb,0,1\n")),
     labels_of_both, [[0], [1]]),
    ("names of classes 0 and 1",
     lambda f: (f.classes.write_text("0\n1\n"), f.table.write_text("id,label\na,1\nb,0\n")),
     labels_of_both, [[1], [0]]),
    *[(text[:40], lambda f, file=file, text=text: f.write(file, text), done, right)
      for file, text, done, right in TEXTS],
    # COCO
    ("val numbers categories otherwise",
     lambda f: f.json(lambda r: [c.update(id=91 - c["id"]) for c in r["categories"]], "val"),
     lambda f: train_cls.main(command_line("COCO2014", f.root, f.root / "run")),
     "instances_train2014.json and .*instances_val2014.json disagree about the classes: class 1 "
     "is 'person' in the first, 'toothbrush' in the second"),
    ("a dangling image_id", lambda f: f.first(image_id=77), coco,
     "annotation 0 is of the image 77, which is not there"),
    ("two images of one name",
     lambda f: [f.first_image(i, file_name=f"{i}/x.jpg") for i in (0, 1)], coco,
     "two images have one name, 0/x.jpg and 1/x.jpg"),
    ("a subfolder and another format", in_a_subfolder,
     lambda f: f.open_coco().image("0001").size, (48, 40)),
    ("a photograph that is not the JSON's", lambda f: f.first_image(height=48, width=40),
     lambda f: f.open_coco().image("COCO_train2014_000000000000"),
     "000000000000.jpg is 40 x 48 pixels .*EXIF.*instances_train2014.json says 48 x 40"),
    ("two images of one id", lambda f: f.first_image(1, id=0), coco, "5 images have 4 ids"),
    ("a file elsewhere", lambda f: f.first_image(file_name="../x.jpg"), coco,
     "names the file '../x.jpg'"),
    ("a corner outside", lambda f: f.first(segmentation=[[-400, -400, 900, -400, 24, 900]]),
     lambda f: sum(pixels_of(f)), 40 * 48),
    ("no segmentation", lambda f: f.json(lambda r: r["annotations"][0].pop("segmentation")),
     pixels_of, "instances_train2014.json cannot be read .there is no outline.*: correct "
     "annotation 0 of the image COCO_train2014_000000000000"),
    ("sizes as decimals", lambda f: f.first_image(height=40.0, width="48"), pixels_of,
     (16, 600 - 16)),
    ("half a pixel", lambda f: f.first_image(height=40.5), coco,
     r"height and width of the image 'COCO_train2014_000000000000.jpg': 40.5 is no whole number"),
    ("no height", lambda f: f.first_image(height=None), coco, "height and width of the image"),
    ("an empty segmentation, for labels", lambda f: f.first(segmentation=[]),
     lambda f: f.open_coco().labels("COCO_train2014_000000000000"), [0, 1]),
    ("an object of less than a pixel",
     lambda f: f.first(segmentation=[[9.1, 9.1, 9.2, 9.1, 9.2, 9.2]]), pixels_of, (16, 0)),
    *[(why, lambda f, outline=outline: f.first(segmentation=outline), pixels_of,
       f"cannot be read .*{why}.*: correct annotation 0 of the image COCO_train2014_000000000000")
      for why, outline in (
          ("there is no outline", []), ("there is no outline", [1, 2, 3, 4, 5, 6]),
          ("fewer than three corners", [[1, 2, 3, 4]]),
          ("not pairs of numbers", [[1, 2, 3, 4, 5, 6, 7]]),
          ("from 0 to 1", [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]),
          ("outside of the image", [[50, 1, 60, 1, 60, 9]]))],
    ("an unknown category", lambda f: f.first(category_id=12), coco,
     "annotation 0 has the unknown category 12"),
    ("two categories of one id", lambda f: f.json(lambda r: r["categories"][0].update(id=1)), coco,
     "two categories have one id"),
]


@pytest.mark.parametrize("spoil, done, right", [row[1:] for row in EVERYDAY],
                         ids=[row[0] for row in EVERYDAY])
def test_everyday_input(tmp_path, spoil, done, right):
    folder = Folder(tmp_path)
    spoil(folder)
    if isinstance(right, str):
        with refused(right):
            done(folder)
    else:
        assert done(folder) == right


@pytest.mark.parametrize("split", ["trainaug", "train_aug", "mine"])
def test_a_lists_name_does_not_say_where_masks_are(tmp_path, split):
    """But VOC's own train and val have theirs in SegmentationClass alone."""
    voc = make_voc(tmp_path)
    (voc / "SegmentationClassAug").mkdir()
    (voc / "SegmentationClass" / "a.png").rename(voc / "SegmentationClassAug" / "a.png")
    shutil.copy(voc / "ImageSets" / "Segmentation" / "train.txt",
                voc / "ImageSets" / "Segmentation" / f"{split}.txt")
    dataset = data.open_data("VOC2012", tmp_path, split, limit=3)
    assert dataset.ids == ["a", "b", "c"] and dataset.labels("b") == [14]
    assert values(dataset.mask("a")) == {0, 8} and values(dataset.mask("b")) == {0, 15}
    with refused("no ground truth a.png in .*SegmentationClass: add it, or give another --split"):
        data.open_data("VOC2012", tmp_path, "train").mask("a")


def test_a_variable_of_another_launcher_means_nothing(monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(variable, "2")
    assert (data.rank(), data.world(), data.share("abc")) == (0, 1, "abc")


def test_masks_that_contradict_the_image_labels_are_mentioned(tmp_path, capsys):
    folder = Folder(tmp_path)
    score = lambda: evaluate.evaluate_masks(folder.open(), folder.pets / "SegmentationClass")
    score()
    assert "look:" not in capsys.readouterr().out
    for path in (folder.pets / "SegmentationClass").glob("*.png"):
        mask = data.read_mask(path)
        data.write_mask(path, np.maximum(mask, 1) - 1)  # one value too low: cat is background
    score()
    assert re.search(r"look: in 4 of 4 images masks and image labels do not agree, first: the "
                     r"mask of a shows \[\], its labels are \[1\]", capsys.readouterr().out)


def test_output_never_stops_the_work(tmp_path, monkeypatch):
    """A terminal or a font without the letters, a file's name without encoding, a wide picture."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    data.run(lambda: print("狗 caf\udce9"))
    sys.stdout.flush()
    assert raw.getvalue() == b"\\u72d7 caf\\udce9\n"
    wide = torch.zeros(3, 2, 66_000, dtype=torch.uint8)  # a JPEG has at most 65,535
    for pixels, width in ((wide, 1600), (wide[..., :9], 24 + 7)):
        photo, mask = data.for_display(pixels, np.ones(pixels.shape[1:], np.uint8))
        data.write_overlay(tmp_path / "o.jpg", data.tint(photo, mask), {"狗": 1})
        assert Image.open(tmp_path / "o.jpg").width == width


def test_coco_labels_masks_and_order(tmp_path):
    dataset = Folder(tmp_path).open_coco()
    assert dataset.classes == ("person", "toothbrush") and len(dataset.ids) == 4
    mask = dataset.mask(dataset.ids[0])
    assert mask.shape == (40, 48) and mask[20, 25] == 2 and mask[5, 5] == 0
    assert (mask[12:20, 15:17] == 1).all()  # the small crowd lies over the large box


def test_shipped_splits():
    sizes = {path.stem: len(set(path.read_text().split()))
             for path in (HERE / "splits").glob("*.txt")}
    assert sizes == {"voc2012_train": 1464, "voc2012_trainaug": 10582,
                     "voc2012_trainaug_6293": 6293, "voc2012_val": 1449}


def test_outlines():
    box = data.draw_object([[10, 10, 40, 10, 40, 30, 10, 30]], 40, 48)
    assert box.sum() == 600 and box[10:30, 10:40].all()  # pixel centres inside, no edge too many
    assert data.draw_object([[0, 0, 48, 0, 48, 40, 0, 40]], 40, 48).all()
    parts = [[0, 0, 8, 0, 8, 8, 0, 8], [4, 4, 12, 4, 12, 12, 4, 12], [1, 1, 2, 2]]
    # parts add up; two points are no outline
    assert data.draw_object(parts, 40, 48).sum() == 64 + 64 - 16
    shifted = data.draw_object([[5.75, 7.25, 20.25, 7.25, 20.25, 19.75, 5.75, 19.75]], 40, 48)
    # centres 6.5 .. 19.5, 7.5 .. 19.5
    assert shifted.sum() == 14 * 13 and shifted[7:20, 6:20].all()
    triangle = data.draw_object([[0, 0, 40, 0, 0, 40]], 40, 48)
    assert abs(triangle.sum() - 800) < 40
    for broken in ([["a"] * 6], [[float("nan")] * 6]):
        with pytest.raises(ValueError):
            data.draw_object(broken, 40, 48)


def test_run_lengths():
    """The example in COCO's own API; compressed it is refused."""
    counts = [6, 1, 40, 4, 5, 4, 5, 4, 21]
    mask = data.decode_rle(dict(size=[9, 10.0], counts=counts), 9, 10)
    expected = [6, *range(47, 51), *range(56, 60), *range(65, 69)]  # by column
    assert mask.flatten("F").nonzero()[0].tolist() == expected
    for wrong, message in ((dict(size=[9, 10], counts="61X13mN000`0"), "are compressed"),
                           (dict(size=[2, 3], counts=[5]), "run lengths of 5 pixels"),
                           (dict(size=[9, 10], counts=[90]), "have no pixel")):
        with refused(message):
            data.decode_rle(wrong, 9, 10)


def test_toy_is_deterministic_and_labelled():
    dataset = data.open_data("toy", None, "train", limit=20)
    first = np.asarray(dataset.image(dataset.ids[3]))
    data.draw_toy.cache_clear()
    assert np.array_equal(np.asarray(dataset.image(dataset.ids[3])), first)
    for name in dataset.ids:
        labelled = {data.mask_value(index) for index in dataset.labels(name)}
        assert values(dataset.mask(name)) == {0} | labelled
    assert not set(data.open_data("toy", None, "val").ids) & set(dataset.ids)


def test_own_data_through_all_stages(tmp_path, capsys):
    """A thin and a large photograph among them."""
    folder, shrink = Folder(tmp_path), ["--max-side", "320"]
    Image.fromarray(draw(0, (3, 500))).save(folder.image)
    data.write_mask(folder.mask, np.ones((3, 500)))
    Image.fromarray(draw(0, (900, 1200))).save(folder.image.with_name("b.jpg"))
    data.write_mask(folder.mask.with_name("b.png"), np.full((900, 1200), 3))
    with refused("no checkpoint .*last.pt: run train_cls.py first"):
        refine.main(folder.common)
    train_cls.main([*folder.common, *ONE_EPOCH, "64"])
    refine.main([*folder.common, *shrink, "--rows", "normalised"])
    assert data.read_mask(tmp_path / "run" / "pseudo" / "b.png").shape == (900, 1200)
    vit_deeplab = "--arch deeplabv3_vit --size 64 --batch 2 --epochs 1 --scales 1".split()
    train_seg.main([*folder.common, *vit_deeplab, *shrink])
    for what in ("layers", "cam", "pseudo", "pred"):
        evaluate.main([*folder.common, "--what", what, *shrink])
    printed = capsys.readouterr().out
    assert "axolotl" in printed and printed.count("photographs are shrunk to 320 px") == 1

    with refused("SegmentationClass is pixel ground truth: training on it would not be weakly"):
        train_seg.main([*folder.common, *MOBILENET, "--masks", str(folder.mask.parent)])

    # another order of the classes is another data set
    folder.classes.write_text("dog\ncat\naxolotl\n")
    for what in ("cam", "pseudo", "pred"):
        with refused("args.json and .*classes.txt disagree about the classes: class 1 is"):
            evaluate.main([*folder.common, "--what", what])
    with refused("last.pt and .*classes.txt disagree about the classes"):
        refine.main([*folder.common, "--overwrite"])
    with refused("pseudo/args.json and .*classes.txt disagree about the classes"):
        train_seg.main([*folder.common, *MOBILENET, "--overwrite"])


def test_a_home_folder_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = refine.parse_args(["--out=~/runs", "--data-root=~/data"])
    data.setup(args)
    assert (args.out, args.data_root) == (Path("/home/someone/runs"), "/home/someone/data")


def test_own_data_without_labels_or_list_of_val(tmp_path, capsys):
    """They serve class mAP alone, but DeepLab predicts val."""
    folder = Folder(tmp_path)
    folder.list.write_text("a\nb\nc\n")
    folder.xml.with_name("d.xml").unlink()
    train_cls.main([*folder.common, *ONE_EPOCH, "64"])
    assert "no class mAP: no file" in capsys.readouterr().out
    folder.list.with_name("val.txt").unlink()
    train_cls.main([*folder.common, *ONE_EPOCH, "64", "--overwrite"])
    assert "no class mAP: no split 'val'" in capsys.readouterr().out
    refine.main(folder.common)
    with refused("no split 'val'"):
        train_seg.main([*folder.common, *MOBILENET])


def test_resume_refuses_changed_data_and_knows_a_folder_spelled_otherwise(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    settings = [*folder.common, *ONE_EPOCH, "64"]
    train_cls.main(settings)
    monkeypatch.chdir(tmp_path)
    otherwise = ["--data", "./pets/", "--classes", "pets/../pets/classes.txt"]
    train_cls.main([*settings, *otherwise, "--resume"])
    monkeypatch.chdir(folder.pets)
    train_cls.main([*settings, "--data", ".", "--classes", "classes.txt", "--resume"])
    monkeypatch.chdir(tmp_path)
    folder.xml.write_text("<a><object><name>dog</name></object></a>")
    with refused("--resume in .*cls with another images and labels"):
        train_cls.main([*settings, "--resume"])


def test_joint_transform_keeps_image_and_mask_together(tmp_path):
    """Bright is person in make_voc's photographs."""
    voc = make_voc(tmp_path)
    dataset = data.open_data("VOC2012", tmp_path, "train")
    samples = train_seg.SegmentationSet(dataset, voc / "SegmentationClass", 32)
    for number in range(8):
        image, mask = samples[1, number]
        assert image.shape == (3, 32, 32) and mask.shape == (32, 32)
        assert values(mask) <= {0, 15, 255}
        bright = image.float().mean(0) > 105
        assert (bright == (mask == 15))[mask != 255].float().mean() > 0.85
        assert torch.equal(samples[1, number][0], image)
    larger = train_seg.SegmentationSet(dataset, voc / "SegmentationClass", 128)
    shown = torch.tensor([(larger[1, n][1] != 255).sum().item() for n in range(20)])
    scale = (shown / (40 * 48)).sqrt()  # of the image, whatever the size of the crop
    assert 0.48 < scale.min() < 0.8 and 1.6 < scale.max() < 2.02
    data.write_mask(voc / "SegmentationClass" / "b.png", np.zeros((10, 10)))
    with refused("b.png is 10 x 10 pixels, its image 40 x 48"):
        samples[1, 0]


@pytest.mark.parametrize("augment", train_cls.AUGMENTATIONS)
def test_augmentations_depend_on_the_seed_alone(tmp_path, augment):
    make_voc(tmp_path)
    dataset = data.open_data("VOC2012", tmp_path, "train")
    samples = train_cls.ClassificationSet(dataset, 32, augment)
    drawn = [samples[0, number][0] for number in range(12)]
    before = torch.get_rng_state()
    for number, image in enumerate(drawn):
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert torch.equal(samples[0, number][0], image)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({image.float().mean().item() for image in drawn}) > 6


# -------------------------------------------------------------------------------------------------
# Downloads, from an archive served here
# -------------------------------------------------------------------------------------------------
@pytest.fixture
def served(tmp_path, monkeypatch):
    """A small VOC archive on 127.0.0.1 is what --download fetches; port and md5 can be changed."""
    make_voc(tmp_path / "source")
    tar = Path(shutil.make_archive(tmp_path / "voc", "tar", tmp_path / "source"))
    folder = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def archive(port=server.server_port, md5=hashlib.md5(tar.read_bytes()).hexdigest()):
        monkeypatch.setitem(data.ARCHIVES, "VOC2012",
                            [(f"http://127.0.0.1:{port}/voc.tar", md5, ".")])

    archive()
    yield archive
    server.shutdown()


def test_download(served, tmp_path):
    root = tmp_path / "data"
    common = command_line("VOC2012", root, tmp_path / "run")
    train_cls.main([*common, *ONE_EPOCH, "32", "--download"])
    assert data.open_data("VOC2012", root, "train").ids == list("abcd")


@pytest.mark.parametrize("changed, message", [
    (dict(port=1), "refused"), (dict(md5="0" * 32), "corrupted.*: try again, or fetch it else")],
    ids=["refused", "checksum"])
def test_a_download_that_fails(served, tmp_path, changed, message):
    served(**changed)
    with refused(f"voc.tar could not be fetched and extracted .*{message}"):
        data.download("VOC2012", tmp_path / "data")
    with refused("train_cls.py --download fetches it"):
        data.open_data("VOC2012", tmp_path / "data", "train")


# -------------------------------------------------------------------------------------------------
# Broken files, messages
# -------------------------------------------------------------------------------------------------
def test_masks_round_trip(tmp_path):
    mask = np.random.default_rng(0).integers(0, 255, (7, 9), dtype=np.uint8)
    data.write_mask(tmp_path / "m.png", mask)
    assert np.array_equal(data.read_mask(tmp_path / "m.png", size=(7, 9)), mask)
    assert data.VOC_COLOURS[[0, 1, 2, 15]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128]]


def damaged(good, rng):
    """A broken variant of a file's bytes: cut, noise, something else, doubled, bytes changed."""
    others = (b"", b"null", b"[]", b"{}", b"<a/>", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n",
              b"\xff\xd8\xff", b"\x00" * 99, good + good)
    changed, count = np.frombuffer(good, np.uint8).copy(), rng.integers(1, 30)
    changed[rng.integers(len(good), size=count)] = rng.integers(256, size=count)
    forms = [good[:rng.integers(len(good))], rng.bytes(rng.integers(0, 200)),
             others[rng.integers(len(others))], changed.tobytes()]
    return forms[rng.integers(len(forms))]


def test_damaged_files_end_in_a_clear_error_or_a_correct_result(tmp_path):
    folder, cam, last = Folder(tmp_path), tmp_path / "a.npz", tmp_path / "a.pt"
    data.write_cam(cam, [3], torch.rand(1, 5, 5), (20, 20))
    data.write_checkpoint(last, {"stage": "cls", "config": {"data": "toy", "classes": ["x"]}})
    readers = {
        folder.image: size_of, folder.mask: mask_of, folder.xml: labels_of, folder.list: opened,
        folder.classes: opened,
        folder.instances: lambda f: [d.mask(name) for d in [coco(f)] for name in d.ids],
        cam: lambda f: data.read_cam(cam), last: lambda f: data.read_checkpoint(last, "cls")}
    rng, errors = np.random.default_rng(0), 0
    for path, read in readers.items():
        good = path.read_bytes()
        for case in range(80):
            path.write_bytes(damaged(good, rng))
            try:
                read(folder)
            except data.UserError as error:
                errors += 1
                assert path.name in str(error) or "split" in str(error), (path.name, case, error)
        path.write_bytes(good)
        read(folder)
    assert errors > 300


def test_checkpoints_of_something_else(tmp_path):
    dataset, path = data.open_data("toy", None, "train"), tmp_path / "last.pt"
    voc, toy = ({"data": name, "classes": ["a"]} for name in ("VOC2012", "toy"))
    for checkpoint, message in (
            ({"stage": "cls", "config": voc}, "was trained on VOC2012, not on toy"),
            ({"stage": "cls", "config": toy}, "disagree about the classes"),
            ({"stage": "seg", "config": {}}, "it is of stage 'seg', not 'cls'"),
            ([1, 2], "cannot be read")):
        data.write_checkpoint(path, checkpoint)
        with refused(f"last.pt.*{message}"):
            data.read_checkpoint(path, "cls", dataset)


MESSAGES = [  # stage, flags, what is printed after "error: "
    (evaluate, "--what cam", r"4 of 4 files .* make them with refine.py --split train --resume"),
    (train_seg, "--batch 4", r"4 of 4 files are missing .*make them with refine.py"),
    (train_cls, "--limit 0", r"--limit: 0 is not a number of at least 1"),
    (train_cls, "--lr nan", r"--lr: nan is not a number of at least 0"),
    (train_cls, "--drop-path 2", r"--drop-path: 2 is not a number from 0 to 1"),
    (train_cls, "--low 0.6", r"--low 0.6 is above --high 0.55"),
    (train_cls, "--device zebra", r"--device zebra: not there"),
    (train_cls, "--size 60", r"--size 60: not a multiple of the patch size 8"),
    (train_cls, "--depth 7", r"--depth 7: toy has 6 blocks"),
    (train_cls, "--batch 5", r"--batch 5 with 4 images"),
    (train_cls, "--batch 4 --pretrained auto", r"--pretrained: there are no public weights for "
                                               r"preset 'toy'"),
    (train_cls, "--data nowhere", r"no data set or folder 'nowhere'"),
    (train_cls, "--batch 4 --coupling split --deep-from 6", r"--deep-from 6 with 6 layers"),
    (train_cls, "--data .", r"--data \. needs --classes: a file"),
    (train_cls, "--classes own.txt", r"--classes own.txt: toy has classes of its own"),
    (train_cls, "--download", r"--download: toy cannot be downloaded"),
    (refine, "--present dots", r"--present goes with --photos"),
    (train_cls, "--epochs 1 --warmup-epochs 2", r"--epochs 1 with --warmup-epochs 2 of them"),
    (evaluate, "--what cam --photos x", r"--photos goes with --what pictures"),
]


@pytest.mark.parametrize("stage, flags, message", MESSAGES,
                         ids=[f"{stage.__name__} {flags}" for stage, flags, _ in MESSAGES])
def test_the_users_errors_are_one_line(stage, flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        data.run(lambda: call(stage, "a folder", f"--limit 4 {flags}"))
    printed = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(printed) == 1, printed
    assert re.search(f"error: .*{message}", printed[0]), printed


@pytest.mark.parametrize("main, code, printed", [
    (lambda: signal.raise_signal(signal.SIGINT), 130,
     "interrupted (stages 1 to 3 go on with --resume)\n"),
    (lambda: open("."), 2, "error: [Errno 21] Is a directory: '.'\n"),
    (lambda: fail(OSError()), 2, "error: OSError()\n"),
    (lambda: fail(data.UserError("two\nlines")), 2, "error: two lines\n"),
    (lambda: fail(RuntimeError("worker (pid 7) is killed by signal: Bus error. It is possible "
                               "that dataloader's workers are out of shared memory.")), 2,
     "error: the loader's workers have too little shared memory: use --workers 0, or give a "
     "container more (docker run --shm-size 2g)\n"),
    (lambda: fail(torch.OutOfMemoryError("Tried to allocate 2 GiB.\nmore")), 2,
     "error: the GPU's memory is full (Tried to allocate 2 GiB.): use a smaller --batch or "
     "--size, for whole images a smaller --max-side\n")])
def test_errors_are_one_line(capsys, main, code, printed):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    with pytest.raises(SystemExit) as left:
        data.run(main)
    assert left.value.code == code and capsys.readouterr().err == printed


def fail(error):
    raise error


@pytest.mark.parametrize("fault", [KeyError("a bug"), ValueError("a bug"), AssertionError(),
                                   RuntimeError()])
def test_faults_keep_their_traceback(fault, capsys):
    with pytest.raises(SystemExit) as left:
        data.run(lambda: fail(fault))
    printed = capsys.readouterr().err
    assert left.value.code == 1 and printed.startswith("Traceback") and "raise error" in printed


def test_an_error_of_the_user_in_a_loaders_worker_is_one_line(tmp_path, capsys):
    folder = Folder(tmp_path)
    folder.image.write_bytes(b"no image")
    settings = [*folder.common, *ONE_EPOCH, "64", "--workers", "1"]
    with pytest.raises(SystemExit) as left:
        data.run(lambda: train_cls.main(settings))
    printed = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(printed) == 1, printed
    assert re.match("error: .*a.jpg cannot be read .*: replace it", printed[0])


def test_non_finite_loss_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(aream, "classification_loss",
                        lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with refused("loss is not finite in epoch 1, step 1 to 2: lower --lr"):
        train(tmp_path / "run")


# -------------------------------------------------------------------------------------------------
# Resuming, processes
# -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", ["", "--drop-path 0.5 --workers 1",
                                   "--entropy static --warmup-epochs 2"])
def test_training_resumes_and_branches_to_the_same_bits(tmp_path, capsys, monkeypatch, flags):
    """Static entropy is measured once, on the crops of the first AReAM epoch."""
    epochs = 4 if "static" in flags else 3
    flags = f"{flags} --epochs {epochs}"
    whole = train(tmp_path / "whole", flags)
    with stopped_in_epoch(epochs, monkeypatch):
        train(tmp_path / "parts", flags)
    resumed = train(tmp_path / "parts", f"{flags} --resume")
    assert f"cls: going on after epoch {epochs - 1}" in capsys.readouterr().out
    warm = tmp_path / "whole" / "cls" / "warmup.pt"
    branched = train(tmp_path / "branch", f"{flags} --branch-from", warm)
    assert equal(whole, resumed) and equal(whole, branched)
    log = data.read_log(tmp_path / "parts" / "cls")  # epochs that are trained again, once
    assert [line.get("epoch") for line in log] == [*range(1, epochs + 1), None]
    assert log[0]["aff_loss"] == 0 < log[epochs - 1]["aff_loss"]
    elsewhere = shutil.copy(warm, tmp_path / "moved.pt")
    train(tmp_path / "branch", f"{flags} --resume --branch-from", elsewhere)
    for other, message in (
            ("", "with another checkpoint to branch from: it was '.*', now None"),
            (f"--branch-from {warm.with_name('last.pt')}", "with another checkpoint to branch"),
            (f"--branch-from {tmp_path / 'gone.pt'}", "no file .*gone.pt: put it back")):
        with refused(message):
            train(tmp_path / "branch", f"{flags} --resume {other}")
    assert (whole["entropy"] is not None) == ("static" in flags)
    if "static" in flags:
        assert torch.equal(whole["entropy"], resumed["entropy"])


def test_what_resume_branch_and_overwrite_refuse(own, tmp_path):
    last = own.plain / "cls" / "last.pt"
    for out, flags, message in (
            (own.plain, "", "is in use: go on with --resume"),
            (own.plain, "--reactivation none --epochs 4 --resume", "--resume .* another epochs"),
            (tmp_path / "late", f"--branch-from {last}", "last.pt is already at epoch 2: give"),
            (tmp_path / "deeper", f"--depth 4 --epochs 3 --branch-from {last}",
             "the checkpoint to go on from has .*; give the same settings"),
            (own.plain, f"--epochs 3 --overwrite --branch-from {last}",
             "--overwrite would delete .*last.pt, which this run reads")):
        with refused(message):
            train(out, flags)
    assert last.is_file() and (own.plain / "cls" / "args.json").is_file()
    branch = train(tmp_path / "decay", f"--epochs 3 --weight-decay 0.5 --branch-from {last}")
    assert branch["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


@slow
def test_a_released_model_serves_all_but_training(own, tmp_path):
    """results/release.sh: 16 bits, no optimiser, no paths; what is left of a run is not needed."""
    model = tmp_path / "model"
    subprocess.run(["bash", "results/release.sh", own.out, model], cwd=HERE, check=True,
                   env={**os.environ, "PYTHON": sys.executable})
    for stage in ("cls", "seg"):
        checkpoint = data.read_checkpoint(model / stage / "last.pt", stage)
        assert not re.search(r"\W" + re.escape(str(own.out.parent)), repr(checkpoint["config"]))
        assert checkpoint["model"].popitem()[1].dtype == torch.float16
    own.out = model
    own.refine()
    own.evaluate("layers")
    own.train_seg("--predict-only")
    for begin in ("--resume", f"--branch-from {model}/cls/last.pt"):
        with refused("model/cls/last.pt holds weights without the optimiser's state: it serves"):
            train(model if begin == "--resume" else tmp_path / "other", f"--epochs 3 {begin}")
    with refused("model/seg/last.pt holds weights without the optimiser's state: it serves"):
        call(train_seg, model, "--limit 16 --batch 4 --epochs 2 --resume")


def test_same_seed_same_bits(tmp_path):
    first = train(tmp_path / "first")
    second = train(tmp_path / "second", "--deterministic")
    torch.use_deterministic_algorithms(False)
    assert equal(first, second)
    for other in ("--seed 1", "--drop-path 0.9"):
        assert not equal(first, train(tmp_path / other, other))
    warm = tmp_path / "first" / "cls" / "warmup.pt"  # the same weights, other crops
    assert not equal(first, train(tmp_path / "crops", "--seed 1 --branch-from", warm))


def test_sampler_depends_on_seed_and_epoch_alone():
    sampler = data.EpochSampler(range(10), 1, 0, seed=1)
    first = list(sampler)
    assert list(sampler) == first and sorted(index for index, _ in first) == list(range(10))
    sampler.set_epoch(1)
    assert list(sampler) != first and not {s for _, s in first} & {s for _, s in sampler}


def test_a_full_disk_loses_nothing(tmp_path):
    """What was there stays, and no half of a file does."""
    path = tmp_path / "last.pt"
    path.write_text("whole")
    with refused("last.pt could not be written .*No space.*unchanged; .* give the same command"):
        with data.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


KILLED = {  # stage -> its program, its flags, what it needs, the pictures it leaves
    "cls": (train_cls, "--limit 24 --batch 8 --epochs 6 --warmup-epochs 2 --depth 3 --deep-from 1",
            [], []),
    "pseudo": (refine, "--limit 150", ["cls"], ["cam/*.npz", "pseudo/*.png"]),
    "seg": (train_seg, "--limit 24 --batch 8 --epochs 3", ["cls", "pseudo"], ["pred/val/*.png"])}


@slow
@pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(),
                    reason="needs fork, and a parent that does not use CUDA")
def test_killed_stages_go_on_to_the_same_result(tmp_path, monkeypatch):
    """Real processes, killed at random moments, end with what an uninterrupted run ends with."""
    monkeypatch.setattr(data, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    rng, whole = np.random.default_rng(0), tmp_path / "whole"
    for name, (stage, flags, needs, pictures) in KILLED.items():
        call(stage, whole, flags)
        killed = attempt = 0
        while killed < 7:
            attempt += 1
            out = tmp_path / f"{name}{attempt}"
            for folder in needs:
                shutil.copytree(whole / folder, out / folder)
            killed += kill_until_it_is_done(stage, out, f"{flags} --resume", rng)
            for pattern in pictures:
                names = sorted(path.relative_to(whole) for path in whole.glob(pattern))
                found = sorted(path.relative_to(out) for path in out.glob(pattern))
                assert names and names == found
                assert all((out / n).read_bytes() == (whole / n).read_bytes() for n in names)
            if name != "pseudo":
                first, second = (data.read_checkpoint(folder / name / "last.pt", name)
                                 for folder in (whole, out))
                assert equal(first, second)
                assert first["optimizer"]["state"].keys() == second["optimizer"]["state"].keys()
    assert (tmp_path / "cls1" / "cls" / "warmup.pt").is_file()


def kill_until_it_is_done(stage, out, flags, rng):
    """-> how often it was killed."""
    fork, killed = multiprocessing.get_context("fork"), 0
    while True:
        process = fork.Process(target=call, args=(stage, out, flags))
        process.start()
        process.join(rng.uniform(0.05, 2.5))
        if process.exitcode == 0:
            return killed
        assert process.exitcode is None, f"{stage.__name__} ended with {process.exitcode}"
        os.kill(process.pid, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[rng.integers(3)])
        process.join()
        killed += 1


def torchrun(processes, script, *arguments, timeout=120):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([sys.executable, *launcher, str(script), *map(str, arguments)],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=timeout)


@slow
def test_two_processes_train_and_refine_like_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    toy = ["--data", "toy", "--workers", "0", "--device", "cpu", "--out", two]
    whole = train(one, "--drop-path 0")
    done = torchrun(2, HERE / "train_cls.py", *toy, *SMALL.split(), "--drop-path", "0")
    assert done.returncode == 0, done.stderr[-2000:]
    shared = data.read_checkpoint(two / "cls" / "last.pt", "cls")
    for key, value in whole["model"].items():  # Adam turns rounding into small steps
        assert_close(shared["model"][key], value, atol=2e-3, rtol=1e-3)
    logs = [[line for line in data.read_log(out / "cls") if "epoch" in line] for out in (one, two)]
    assert len(logs[1]) == 2
    for expected, got in zip(*logs):
        assert got["cls_loss"] == pytest.approx(expected["cls_loss"], rel=1e-3)
        assert got["aff_loss"] == pytest.approx(expected["aff_loss"], rel=1e-2)

    shutil.copytree(one / "cls", two / "cls", dirs_exist_ok=True)
    call(refine, one, "--limit 16")
    assert torchrun(2, HERE / "refine.py", *toy, "--limit", "16").returncode == 0
    for path in (*(one / "cam").glob("*.npz"), *(one / "pseudo").glob("*.png")):
        assert (two / path.relative_to(one)).read_bytes() == path.read_bytes()
    flags = "--limit 16 --batch 4 --epochs 1".split()
    done = torchrun(2, HERE / "train_seg.py", *toy, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    together = {path.name: path.read_bytes() for path in (two / "pred" / "val").glob("*.png")}
    call(train_seg, two, "--limit 16 --predict-only --overwrite")  # of what last.pt holds
    assert len(together) == 16
    assert all((two / "pred" / "val" / name).read_bytes() == together[name] for name in together)

    for what in ("layers", "cam", "pseudo"):
        call(evaluate, one, f"--limit 16 --what {what}")
        done = torchrun(2, HERE / "evaluate.py", *toy, "--limit", "16", "--what", what)
        assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads((out / "results.json").read_text()) for out in (one, two)]
    for expected, got in zip(*records):
        assert {**expected, "seconds": 0} == {**got, "seconds": 0}


@slow
def test_a_process_that_dies_ends_the_others(tmp_path):
    """The other one waits for its gradients."""
    folder = Folder(tmp_path)
    folder.image.write_bytes(b"no image")
    dead = torchrun(2, HERE / "train_cls.py", *folder.common, *ONE_EPOCH, "64", timeout=60)
    assert dead.returncode != 0 and "error: " in dead.stderr and "a.jpg cannot" in dead.stderr


# -------------------------------------------------------------------------------------------------
# A simulated GPU: tensors without content, of which every operation checks device and dtype as
# CUDA's would
# -------------------------------------------------------------------------------------------------
class Waits(TorchDispatchMode):
    """Counts how often the host waits for the GPU, and collects the types of products."""

    def __init__(self):
        super().__init__()
        self.count, self.products = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if function is aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.count += 1  # a number of the GPU is asked for
            return True if args[0].dtype == torch.bool else 2
        if function is aten._to_copy.default and args[0].device.type == "cpu":
            if not kwargs.get("non_blocking") and kwargs.get("device") is not None:
                self.count += 1
        if function in (aten.addmm.default, aten.mm.default):
            self.products.add(args[-1].dtype)
        return function(*args, **kwargs)


@pytest.fixture
def simulated_cuda(monkeypatch):
    """move(build) makes a module on the simulated GPU, where tensors of "cuda" can be made."""
    if not torch.backends.cuda.is_built():
        pytest.skip("a CPU-only build of torch cannot pretend")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: None)

    def move(build):
        with unset_fake_temporarily():
            module = build()
        moved = {}
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            moved[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        module.load_state_dict(moved, assign=True)
        return module

    with FakeTensorMode():
        yield move


class NoStep:
    zero_grad = step = lambda self, **_: None


def simulated_step(move, kind="entropy", entropy="online", labels="two-views"):
    """One training step -> the simulated GPU's Waits."""
    args = train_cls.parse_args(["--data", "toy", "--reactivation", kind, "--entropy", entropy,
                                 "--pair-labels", labels])
    args.precision, model = "bfloat16", move(lambda: vit.build("toy", 4))
    pixels = torch.empty(3, 3, 64, 64, dtype=torch.uint8, device="cuda")
    batch = pixels, torch.empty(3, 4, device="cuda")
    static = torch.empty(6, device="cuda") if entropy == "static" else None
    guidance = train_cls.Guidance(range(6), range(6), static) if kind != "none" else None
    with Waits() as waits:
        losses = train_cls.train_step(model, NoStep(), batch, args, guidance)
    assert losses.device.type == "cuda" and losses.dtype == torch.float32
    return waits


@pytest.mark.parametrize("kind, entropy, labels", [
    ("none", "online", "shared"), ("uniform", "online", "shared"),
    ("entropy", "online", "two-views"), ("entropy", "static", "shared")])
def test_a_training_step_on_a_simulated_gpu(simulated_cuda, kind, entropy, labels):
    waits = simulated_step(simulated_cuda, kind, entropy, labels)
    assert waits.count <= 1  # for the number of classes of the labels
    assert waits.products == {torch.bfloat16}


def test_refinement_on_a_simulated_gpu(simulated_cuda):
    model = simulated_cuda(lambda: vit.build("toy", 4)).eval()
    pixels = torch.empty(3, 60, 70, dtype=torch.uint8, device="cuda")
    variants = {"all": tuple(range(6)), "raw": "unrefined", "map": "patch map",
                "weighted": "entropy"}
    settings = refine.Refinement((0.5, 1.0), precision="bfloat16")
    with Waits() as waits:
        cams = refine.seed_cams(model, pixels, [0, 2], variants, settings)
        mask = refine.pseudo_mask(pixels, [0, 2], cams["all"])
        walked = refine.seed_cams(model, pixels, [1], {"s": (0,)},
                                  refine.Refinement(steps=2, beta=2.0))["s"]
    assert {t.device.type for t in (*cams.values(), mask, walked)} == {"cuda"}
    assert waits.count == 0
    photo = torch.empty(3, 60, 70, dtype=torch.uint8)  # is shrunk on the CPU
    assert refine.limit_size(model, photo, 35).device.type == "cuda"


@pytest.mark.parametrize("arch, multiple", [("deeplabv3_vit", 8), ("deeplabv3_mobilenet_v2", 1)])
def test_prediction_on_a_simulated_gpu(simulated_cuda, arch, multiple):
    classifier = dict(preset="toy", depth=None, size=64)
    net = simulated_cuda(lambda: train_seg.build(arch, 4, classifier)).eval()
    pixels = torch.empty(3, 60, 70, dtype=torch.uint8, device="cuda")
    with Waits() as waits:
        mask = train_seg.predict(net, pixels, (0.5, 1.0), multiple, "bfloat16")
    assert mask.device.type == "cuda" and waits.count == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU takes the list out of sight")
def test_the_simulated_gpu_notices_a_list_as_index(simulated_cuda, monkeypatch):
    monkeypatch.setattr(aream, "normalise_cam", lambda cam, labels: cam[[0, 1, 2]])
    assert simulated_step(simulated_cuda).count > 1


# -------------------------------------------------------------------------------------------------
# A real GPU
# -------------------------------------------------------------------------------------------------
@cuda
@pytest.mark.parametrize("labels", ["two-views", "shared"])
def test_a_step_on_a_card_is_the_cpus(labels):
    cpu, card = (first_step(device=device, flags=f"--reactivation uniform --pair-labels {labels}")
                 for device in ("cpu", "cuda"))
    assert_close(card, cpu, rtol=1e-4, atol=0)


@cuda
def test_a_card_gives_the_same_bits_again(tmp_path):
    """In processes of their own, as cuBLAS is set up once."""
    common = "--data toy --device cuda --deterministic --limit 16".split()
    for turn in "ab":
        for stage, flags in (("train_cls.py", SMALL), ("refine.py", ""),
                             ("train_seg.py", "--batch 8 --epochs 1")):
            program = [sys.executable, HERE / stage, *common, *flags.split()]
            subprocess.run([*program, "--out", tmp_path / turn], check=True, capture_output=True)
    for stage in ("cls", "seg"):
        assert equal(*(data.read_checkpoint(tmp_path / turn / stage / "last.pt", stage)
                       for turn in "ab"))


# -------------------------------------------------------------------------------------------------
# Real data, where AREAM_DATA says it is
# -------------------------------------------------------------------------------------------------
def open_real(name, split, limit):
    if name == "COCO2014" and not (Path(REAL) / name).is_dir():
        pytest.skip("AREAM_DATA has no COCO2014")
    return data.open_data(name, REAL, split, limit)


@real
@pytest.mark.parametrize("name, split", [("VOC2012", "train"), ("VOC2012", "val"),
                                         ("COCO2014", "train")])
def test_real_masks_show_the_labelled_classes(name, split):
    dataset = open_real(name, split, limit=25)
    for image in dataset.ids:
        mask = dataset.mask(image)
        assert mask.shape == dataset.image(image).size[::-1]
        labelled = {data.mask_value(index) for index in dataset.labels(image)}
        assert values(mask) - {0, data.IGNORE} <= labelled


@real
def test_real_coco_areas():
    dataset = open_real("COCO2014", "train", limit=20)
    record = data.read_json(dataset.source, "")
    area_of = {annotation["id"]: annotation["area"] for annotation in record["annotations"]}
    ratios = []
    for name in dataset.ids:
        for identity, _, outline in dataset.objects[name]:
            if area_of[identity] >= 1000:
                pixels = data.draw_object(outline, *dataset.files[name][1]).sum()
                ratios.append(pixels / area_of[identity])
    # the JSON's area is signed: outlines that cross themselves have less of it than pixels
    ratios = np.array(ratios)
    assert (abs(ratios - 1) < 0.03).mean() > 0.9 and ratios.min() > 0.98

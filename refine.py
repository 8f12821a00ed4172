"""Stage 2: CAM -> class-to-patch product -> affinity / random walk -> PAR -> pseudo-masks.

Reads  <out>/cls/last.pt and the images of a split, with their image labels.
Writes <out>/cam/<image>.npz (the refined seed) and <out>/pseudo/<image>.png (0 background, 1..C, 255 undecided).
Run    python refine.py --data VOC2012                      (after train_cls.py)
Expect not yet measured.
"""
import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import aream
import data
import model as vit

DILATIONS = (1, 2, 4, 8, 12, 24)
NEIGHBOURS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


# ---------------------------------------------------------------------------------------------------------------------
# Random walk
# ---------------------------------------------------------------------------------------------------------------------
def random_walk(score, affinity, beta=1.0, steps=1):
    """T^steps score with T the row-normalised affinity^beta (beta 1, one step: the plain propagation).

    score (B, K, gh, gw) >= 0; affinity (B, P, P) >= 0. Returns (B, K, gh, gw) float32.
    """
    if steps < 0 or beta <= 0:
        raise ValueError(f"random walk with steps {steps}, beta {beta}: steps >= 0 and beta > 0")
    transition = affinity.float() ** beta
    transition = transition / transition.sum(-1, keepdim=True).clamp_min(1e-12)
    score = score.float()
    for _ in range(steps):
        score = aream.propagate(transition, score)
    return score


# ---------------------------------------------------------------------------------------------------------------------
# Pixel-adaptive refinement (PAR, from AFA, CVPR 2022)
# ---------------------------------------------------------------------------------------------------------------------
def neighbours(padded, dilations, size):
    """Yields the 8 neighbours of every pixel at each dilation: views of padded (..., H + 2 pad, W + 2 pad)."""
    H, W = size
    pad = max(dilations)
    for d in dilations:
        for dy, dx in NEIGHBOURS:
            y, x = pad + dy * d, pad + dx * d
            yield padded[..., y:y + H, x:x + W]


def par_kernel(images, dilations=DILATIONS):
    """How much each pixel takes from each of its 8 * len(dilations) neighbours; depends on the image alone.

    images (B, 3, H, W) -> (B, neighbours, H, W) float32, summing to 1.01 over the neighbours: softmax of
    -mean over RGB of (|I_n - I| / (0.3 std_n))^2, plus 0.01 times the same softmax of the neighbours' distances.
    """
    images = images.float()
    padded = F.pad(images, [max(dilations)] * 4, mode="replicate")
    near = torch.stack(list(neighbours(padded, dilations, images.shape[-2:])), 2)  # (B, 3, n, H, W)
    std = near.std(2, keepdim=True)
    colour = -((near - images[:, :, None]).abs() / (std + 1e-8) / 0.3).square().mean(1)  # (B, n, H, W)
    distance = torch.tensor([d * (2.0**0.5 if dy and dx else 1.0) for d in dilations for dy, dx in NEIGHBOURS])
    place = -(distance / (distance.std() + 1e-8) / 0.3).square()  # (n,)
    return colour.softmax(1) + 0.01 * place.softmax(0).to(images.device).view(1, -1, 1, 1)


def pixel_adaptive_refine(images, score, dilations=DILATIONS, iterations=10):
    """Smooth scores along image content: iterations of the kernel-weighted sum over neighbours.

    images (B, 3, H, W), any linear range; score (B, K, H, W) of the same H and W. Returns (B, K, H, W) float32; the
    total grows by 1.01 an iteration.
    """
    if images.shape[-2:] != score.shape[-2:]:
        raise ValueError(f"images are {tuple(images.shape[-2:])} and scores {tuple(score.shape[-2:])} pixels: resize one")
    if images.device.type == "cpu" and len(images) > 1:  # one image at a time stays in the processor's cache
        return torch.cat([pixel_adaptive_refine(i[None], s[None], dilations, iterations) for i, s in zip(images, score)])
    kernel = par_kernel(images, dilations)
    score = score.float()
    for _ in range(iterations):
        padded = F.pad(score, [max(dilations)] * 4, mode="replicate")
        score = torch.zeros_like(score)
        for n, near in enumerate(neighbours(padded, dilations, score.shape[-2:])):
            score.addcmul_(kernel[:, n:n + 1], near)
    return score


# ---------------------------------------------------------------------------------------------------------------------
# Pseudo-labels
# ---------------------------------------------------------------------------------------------------------------------
def pseudo_label(images, cam, labels, low=0.35, high=0.55):
    """Confident labels from a CAM, with a band of 255 between a low and a high background score.

    images (B, 3, H, W) in [0, 1]; cam (B, C, h, w) in [0, 1], any size; labels (B, C) in {0, 1}.
    Returns (B, H, W) int64 in {0, 1..C, 255}: foreground where it wins against the high background score, background
    where that wins already against the low one, 255 elsewhere. Both scores are refined together, at half size.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"background scores low {low}, high {high}: 0 <= low <= high <= 1")
    H, W = images.shape[-2:]
    half = (max(1, H // 2), max(1, W // 2))
    K = max(1, int(labels.sum(1).max()))
    present, class_ids = labels.topk(K, dim=1)  # (B, K): the classes of each image first, absent ones fill up
    rows = torch.arange(len(cam), device=cam.device)[:, None]
    cam = F.interpolate(cam[rows, class_ids].float(), size=half, mode="bilinear", align_corners=False)  # (B, K, h, w)
    cam = cam.masked_fill(present[..., None, None] == 0, float("-inf"))
    background = [torch.full_like(cam[:, :1], beta) for beta in (low, high)]
    score = torch.cat([torch.cat([b, cam], 1).softmax(1) for b in background], 1)  # (B, 2 (K + 1), h, w)
    small = F.interpolate(images.float(), size=half, mode="bilinear", align_corners=False)
    score = pixel_adaptive_refine(small, score)
    score = F.interpolate(score, size=(H, W), mode="bilinear", align_corners=False)
    values = torch.cat([torch.zeros_like(class_ids[:, :1]), data.mask_value(class_ids)], 1)  # (B, K + 1)
    at_low, at_high = (values.gather(1, s.argmax(1).flatten(1)).view(-1, H, W) for s in score.chunk(2, 1))
    return torch.where(at_high > 0, at_high, torch.where(at_low > 0, data.IGNORE, 0))

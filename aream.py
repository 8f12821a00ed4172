"""AReAM's mathematics: which layers over-smooth, how others guide them, the loss.

Pure functions from tensors to tensors: first what makes a step's labels, then its losses.
Letters: B batch, L layers, C classes, P = gh * gw patches, N = C + P tokens (class tokens first).
S^l is the affinity of layer l: S^l[m, n] is how much token m draws from token n. Functions that
need patches alone take maps (B, N, N) or their patch-to-patch blocks (B, P, P).

The maps of a class, (B, C, gh, gw):
    cam         relu of the ViT's patch map ("patch map alone" in tables)
    attended    cam times class-to-patch attention, MCTformer-V2's CAM ("unrefined" in tables)
    guided      (mean of w^l S^l over the guide layers) @ attended; makes the labels of the loss
    refined     (mean of S^l over chosen layers) @ attended; what stage 2 makes masks of
"""
import math

import torch
import torch.nn.functional as F

IGNORE = 255  # undecided, in masks and pair labels; data.py has it, too, to import nothing here
TIE = 0.01  # bits: where all layers lie within, none is told from another


def patch_block(affinity, patches):
    """The patch-to-patch block (..., P, P) of (..., N, N); patches are the last P tokens."""
    return affinity[..., -patches:, -patches:]


def normalise_rows(affinity):
    """(..., P, P) >= 0 -> the same in float32, with rows that sum to 1."""
    affinity = affinity.float()
    return affinity / affinity.sum(-1, keepdim=True).clamp_min(1e-12)


def propagate(affinity, cam):
    """refined[m] = sum_n S[m, n] cam[n]: (B, P, P), (B, C, gh, gw) -> (B, C, gh, gw)."""
    return (cam.flatten(2) @ affinity.transpose(-2, -1)).unflatten(2, cam.shape[-2:])


def layer_entropy(cam, affinity, labels):
    """How widely each layer's affinity spreads the CAM: high means over-smoothed.

    cam (B, C, gh, gw) >= 0; affinity: L maps (B, N, N) or (B, P, P); labels (B, C) in {0, 1}.
    Returns (B, L) bits, in [0, log2 P]: H^l = -sum p log2 p with p^l = softmax over patches of the
    sum over present classes of S^l cam. A CAM of zeros gives log2 P in every layer.
    """
    P = cam.shape[-2] * cam.shape[-1]
    # S^l is linear: the sum over classes may come first
    of_present = torch.einsum("bc,bcp->bp", labels.to(cam), cam.flatten(2))[..., None]  # (B, P, 1)
    spread = [(patch_block(a, P) @ of_present)[..., 0] for a in affinity]  # L x (B, P)
    log_prob = torch.stack(spread, 1).float().log_softmax(-1)  # (B, L, P), finite: so is p log p
    return -(log_prob.exp() * log_prob).sum(-1) / math.log(2)


def entropy_weights(entropy):
    """w = 1 - e, w_hat = e; e is the entropy min-max normalised over layers, zeros if they tie."""
    low, high = entropy.amin(-1, keepdim=True), entropy.amax(-1, keepdim=True)
    e = torch.where(high - low > TIE, (entropy - low) / (high - low).clamp_min(TIE), 0.0)
    return 1 - e, e


REACTIVATION = {  # name -> function of entropy (..., L) in bits -> w, w_hat (..., L)
    "entropy": entropy_weights,
    "uniform": lambda entropy: (torch.ones_like(entropy), torch.ones_like(entropy)),
    "none": lambda entropy: (torch.ones_like(entropy), torch.zeros_like(entropy)),
}


def reactivation_weights(entropy, kind="entropy"):
    """Weights w (re-activation, the guide's) and w_hat (counterpart, the loss's), (..., L).

    entropy (..., L) bits. kind: a name in REACTIVATION, ValueError otherwise.
    """
    if kind not in REACTIVATION:
        raise ValueError(f"reactivation {kind!r}: use one of {', '.join(REACTIVATION)}")
    return REACTIVATION[kind](entropy)


def coupled_layers(layers, coupling="all", deep_from=7):
    """Which layers guide and which are supervised -> two ranges.

    "all": every layer does both. "split": layers below deep_from (0-based) guide, the others are
    supervised.
    """
    if coupling == "all":
        return range(layers), range(layers)
    if coupling != "split":
        raise ValueError(f"coupling {coupling!r}: use all or split")
    if not 0 < deep_from < layers:
        raise ValueError(f"--deep-from {deep_from} with {layers} layers: it must leave layers on "
                         f"both sides")
    return range(deep_from), range(deep_from, layers)


def class_attended_cam(cam, affinity):
    """cam' = cam * (mean over all layers of what class c's token draws from patch p).

    cam (B, C, gh, gw); affinity: L maps (B, N, N). Returns (B, C, gh, gw) >= 0.
    """
    C, P = cam.shape[1], cam.shape[-2] * cam.shape[-1]
    drawn = sum(a[:, :C, -P:] for a in affinity) / len(affinity)  # (B, C, P)
    return cam * drawn.unflatten(2, cam.shape[-2:])


def mean_affinity(blocks, layers, w=None):
    """Mean over layers of w^l S^l: L blocks (B, P, P), layer indices, w (B, L) -> (B, P, P)."""
    chosen = [blocks[l] if w is None else w[:, l, None, None] * blocks[l] for l in layers]
    return sum(chosen) / len(chosen)


def guided_cam(cam, affinity, w, guide):
    """The CAM refined by the re-activation-weighted mean affinity of the guide layers.

    cam (B, C, gh, gw); affinity: L maps (B, N, N); w (B, L) or (L,); guide: layer indices. Returns
    (B, C, gh, gw) >= 0, not normalised: (mean over guide of w^l S^l) applied to
    class_attended_cam.
    """
    P = cam.shape[-2] * cam.shape[-1]
    blocks = [patch_block(a, P) for a in affinity]
    mean = mean_affinity(blocks, guide, w.expand(len(cam), -1))
    return propagate(mean, class_attended_cam(cam, affinity))


def normalise_cam(cam, labels):
    """relu, min-max per class, times the labels: (B, C, h, w), (B, C) -> [0, 1]."""
    cam = cam.relu()
    low, high = cam.amin((-2, -1), keepdim=True), cam.amax((-2, -1), keepdim=True)
    return (cam - low) / (high - low).clamp_min(1e-12) * labels[..., None, None]


def patch_label(mask, grid):
    """mask (B, H, W), grid (gh, gw) -> the value at each patch's centre pixel, (B, P)."""
    def centres(patches, pixels):
        return ((torch.arange(patches, device=mask.device) + 0.5) * pixels / patches).long()

    (gh, gw), (H, W) = grid, mask.shape[-2:]
    return mask[:, centres(gh, H)][:, :, centres(gw, W)].flatten(1)


def affinity_label(mask, grid):
    """Which patch pairs belong together.

    mask (B, H, W) in {0, 1..C, 255}; grid (gh, gw): each patch takes the label of its centre
    pixel. Returns (B, P, P) int64, symmetric: 1 same class (background counts as one), 0
    different, 255 if either is 255.
    """
    patch = patch_label(mask, grid)  # (B, P)
    one, other = patch[:, :, None], patch[:, None, :]
    label = (one == other).long()
    return label.masked_fill((one == IGNORE) | (other == IGNORE), IGNORE)


def count_pairs(label):
    """label (B, P, P) in {0, 1, 255} -> how many pairs are 0 and how many 1, (2,)."""
    return torch.stack([(label == 0).sum(), (label == 1).sum()])


def pair_weights(label, pairs=None):
    """What a pair costs per unit of its probability, and what an image costs at probability 0.

    label (B, P, P) in {0, 1, 255}. Returns weight (B, P, P) and constant (B,), with which the
    affinity loss of an image is sum(weight * prob) + constant: they serve all layers of a step.
    pairs (2,) = (n0, n1) replaces the counts of label, when that is only a part of the batch.
    """
    n0, n1 = count_pairs(label) if pairs is None else pairs
    same, different = label == 1, label == 0
    weight = 0.5 * (different / (n0 + 1) - same / (n1 + 1))
    constant = 0.5 * same.sum((1, 2)) / (n1 + 1)
    return weight, constant


def affinity_loss(prob, label):
    """Same-class pairs towards 1, different pairs towards 0, each side with half the weight.

    The formula of one layer; a training step takes aream_loss, which shares pair_weights.

    prob (B, P, P) in [0, 1]; label (B, P, P) in {0, 1, 255}. Returns (): with n1, n0 the pairs of
    the batch, 0.5 * sum_{label=1} (1 - prob) / (n1 + 1) + 0.5 * sum_{label=0} prob / (n0 + 1).
    """
    weight, constant = pair_weights(label)
    return (weight * prob).sum() + constant.sum()


def aream_loss(affinity_logits, label, w_hat, supervised, pairs=None):
    """Mean over the supervised layers of w_hat^l times the affinity loss of that layer.

    affinity_logits: L maps (B, N, N); label (B, P, P); w_hat (B, L) or (L,), no gradient, weights
    an image's pairs; supervised: layer indices; pairs: see pair_weights.
    """
    P, total = label.shape[-1], 0
    w_hat = w_hat.detach().expand(len(label), -1)
    weight, constant = pair_weights(label, pairs)
    for l in supervised:
        prob = patch_block(affinity_logits[l], P).sigmoid()
        of_image = (weight * prob).sum((1, 2)) + constant  # affinity_loss, image by image
        total = total + (w_hat[:, l] * of_image).sum()
    return total / len(supervised)


def classification_loss(class_logits, patch_logits, labels):
    """Multi-label soft margin on both logits (B, C) -> ()."""
    labels = labels.to(class_logits)
    class_loss = F.multilabel_soft_margin_loss(class_logits, labels)
    return class_loss + F.multilabel_soft_margin_loss(patch_logits, labels)


# -------------------------------------------------------------------------------------------------
# Diagnostics, for evaluate.py
# -------------------------------------------------------------------------------------------------
def row_distance(affinity):
    """How different patches' neighbourhoods still are: 0 all equal (over-smoothed), 1 disjoint.

    affinity (B, P, P) >= 0. Returns (B,): the mean Hellinger distance sqrt(1 - sum_n sqrt(p_mn
    p_kn)) between the rows m != k of the row-normalised affinity p. One patch alone has distance
    0.
    """
    P = affinity.shape[-1]
    root = normalise_rows(affinity).sqrt()
    distance = (1 - root @ root.transpose(-2, -1)).clamp_min(0).sqrt()
    others = 1 - torch.eye(P, device=affinity.device)
    return (distance * others).sum((-2, -1)) / max(1, P * (P - 1))


def top_share(affinity, share=0.05):
    """The most attended patches' share of all attention: (B, P, P) >= 0 -> (B,) in [0, 1].

    The most attended are the ceil(share * P) columns with the largest sums; attention spread
    evenly gives about share.
    """
    received = affinity.float().sum(-2)  # (B, P)
    top = received.topk(math.ceil(share * received.shape[-1]), -1).values.sum(-1)
    return top / received.sum(-1).clamp_min(1e-12)

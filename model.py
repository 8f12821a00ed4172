"""A plain Vision Transformer with one class token per class and captured attention.

ViT.forward serves stages 1 and 2, ViT.tokens is the backbone of stage 3. Without pretrained
weights W_q = W_k in every block (reset_parameters).

    vit = build("deit_small", num_classes=20)
    load_pretrained(vit, "auto")
    vit(images, affinity=True, logits=True)

Letters: B batch, L layers, A heads, D channels, d channels of a head, C foreground classes (=
class tokens), P = gh * gw patches, N = C + P tokens.
"""
import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

PRESETS = {
    "deit_tiny": dict(dim=192, depth=12, heads=3, patch=16, image_size=224),
    "deit_small": dict(dim=384, depth=12, heads=6, patch=16, image_size=224),
    "deit_base": dict(dim=768, depth=12, heads=12, patch=16, image_size=224),
    "toy": dict(dim=96, depth=6, heads=3, patch=8, image_size=64),
}
DEIT_URLS = {
    "deit_tiny": "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small": "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth",
    "deit_base": "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth",
}
DEIT_NAMES = {"class_tokens": "cls_token", "class_pos_embed": "pos_embed",
              "patch_pos_embed": "pos_embed"}  # ours -> theirs; all others are the same


class ViTOutput(NamedTuple):
    """What ViT.forward returns; a tuple has one entry per layer, or none if not captured."""

    class_logits: torch.Tensor  # (B, C) mean over channels of each output class token
    patch_logits: torch.Tensor  # (B, C) global average of the patch map
    cam: torch.Tensor  # (B, C, gh, gw) relu(patch map) >= 0, detached
    affinity: tuple = ()  # L x (B, N, N) mean over heads of softmax(q k^T / sqrt d), detached
    affinity_logits: tuple = ()  # L x (B, N, N) mean over heads of q k^T / sqrt d, graph attached


class Attention(nn.Module):
    """Multi-head self-attention that can also return its two head-averaged maps."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, affinity=False, logits=False):
        """(B, N, D) -> the same, and the two maps that are asked for, each (B, N, N) or None."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, A, N, d)
        scale = (D // self.heads) ** -0.5
        prob = mean_prob = mean_logits = None
        on_cpu = x.device.type == "cpu"

        if affinity:
            # Only the mean over heads leaves: memory grows with L N^2, not with L A N^2.
            prob = ((q * scale) @ k.transpose(-2, -1)).softmax(-1, torch.float32)  # (B, A, N, N)
            mean_prob = prob.detach().mean(1)  # (B, N, N)
        elif on_cpu and q.dtype == torch.bfloat16:  # the fused kernel is slow in bfloat16 there
            prob = ((q * scale) @ k.transpose(-2, -1)).softmax(-1)
        if logits:
            # The mean over heads of q_h k_h^T is one product over all channels.
            q_all, k_all = qkv[:, :, 0].flatten(2), qkv[:, :, 1].flatten(2)  # (B, N, D)
            mean_logits = (q_all @ k_all.transpose(-2, -1)).float() * (scale / self.heads)

        # softmax(q k^T / sqrt(d)) v: on a CPU from prob, where that is there; a GPU's fused kernel
        # is faster even then
        if on_cpu and prob is not None:
            attended = prob.to(v.dtype) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        attended = attended.transpose(1, 2).reshape(B, N, D)
        return self.proj(attended), mean_prob, mean_logits


class Block(nn.Module):
    """Pre-norm transformer block, attention and MLP; names of submodules as in DeiT's files."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, affinity=False, logits=False):
        attended, mean_prob, mean_logits = self.attn(self.norm1(x), affinity, logits)
        x = x + self.drop_path(attended)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x, mean_prob, mean_logits


class ViT(nn.Module):
    """DeiT with C class tokens and a 3x3 convolution on the patch tokens, as in MCTformer-V2.

    As there, tokens pass no final LayerNorm. Build it with build().
    """

    def __init__(self, num_classes, dim, depth, heads, patch, image_size):
        super().__init__()
        self.num_classes, self.patch, self.dim = num_classes, patch, dim
        self.pos_grid = (image_size // patch, image_size // patch)  # of patch_pos_embed
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch, stride=patch)))
        self.class_tokens = nn.Parameter(torch.zeros(1, num_classes, dim))
        self.class_pos_embed = nn.Parameter(torch.zeros(1, num_classes, dim))
        self.patch_pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.pos_grid), dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self):
        """Truncated normals of std 0.02 but for convolutions, and W_q = W_k of std dim**-0.5.

        With independent W_q and W_k attention starts unrelated to content, and a ViT trained from
        scratch on little data never makes an affinity of it ("mimetic" initialisation). Pretrained
        weights overwrite all of this.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token in (self.class_tokens, self.class_pos_embed, self.patch_pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        with torch.no_grad():
            for block in self.blocks:
                w_q, w_k, _ = block.attn.qkv.weight.chunk(3)
                nn.init.trunc_normal_(w_q, std=self.dim**-0.5)
                w_k.copy_(w_q)

    def set_drop_path(self, rate):
        """Stochastic depth, growing linearly from 0 in the first block to rate in the last."""
        for i, block in enumerate(self.blocks):
            block.drop_path.p = rate * i / max(1, len(self.blocks) - 1)

    def tokens(self, images, affinity=False, logits=False):
        """The blocks: (B, 3, H, W) -> tokens (B, N, D), (gh, gw), and both tuples of maps."""
        B, _, H, W = images.shape
        if H % self.patch or W % self.patch or not (H and W):
            raise ValueError(f"image size {H} x {W} is not a multiple of the patch size "
                             f"{self.patch}; pad it first")
        grid = (H // self.patch, W // self.patch)
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, P, D)
        patches = patches + resize_position_embedding(self.patch_pos_embed, self.pos_grid, grid)
        class_tokens = (self.class_tokens + self.class_pos_embed).expand(B, -1, -1)
        x = torch.cat([class_tokens, patches], dim=1)  # (B, N, D)

        probs, products = [], []
        for block in self.blocks:
            x, mean_prob, mean_logits = block(x, affinity, logits)
            if affinity:
                probs.append(mean_prob)
            if logits:
                products.append(mean_logits)
        return x, grid, tuple(probs), tuple(products)

    def forward(self, images, affinity=False, logits=False):
        """Classify, and localise.

        images: (B, 3, H, W), ImageNet-normalised, H and W multiples of the patch size. affinity,
        logits: which of the two maps are kept of every layer. Returns ViTOutput. Raises ValueError
        on a size that is not a multiple of the patch.
        """
        x, grid, probs, products = self.tokens(images, affinity, logits)
        class_tokens, patch_tokens = x.split([self.num_classes, grid[0] * grid[1]], dim=1)
        features = patch_tokens.transpose(1, 2).unflatten(2, grid)  # (B, D, gh, gw)
        patch_map = self.head(features).float()  # (B, C, gh, gw)
        return ViTOutput(
            class_logits=class_tokens.mean(-1),
            patch_logits=patch_map.mean((-2, -1)),
            cam=patch_map.detach().relu(),
            affinity=probs,
            affinity_logits=products,
        )


def resize_position_embedding(embedding, old, new):
    """(1, P, D) of a grid old = (gh, gw) of patches -> of a grid new, bicubically.

    Bicubic interpolation is linear and separable: one matrix per side. Unlike F.interpolate's, its
    gradient is deterministic on CUDA.
    """
    if tuple(old) == tuple(new):
        return embedding

    def matrix(n, m):  # (m, n)
        identity = torch.eye(n, device=embedding.device)[None, None]
        return F.interpolate(identity, size=(m, n), mode="bicubic")[0, 0]

    rows, columns = matrix(old[0], new[0]), matrix(old[1], new[1])
    grid = embedding.float().unflatten(1, tuple(old))
    resized = torch.einsum("yh,xw,bhwd->byxd", rows, columns, grid)
    return resized.flatten(1, 2).to(embedding.dtype)


def build(preset, num_classes, *, depth=None, image_size=None):
    """Make an untrained ViT.

    preset: a name in PRESETS. num_classes: C >= 1. depth: use the first blocks only (the paper
    studies 6, 8, 10 and 12). image_size: pixels a side of the stored position embedding (any other
    size is reached by resizing it). Raises ValueError on an unknown preset, a depth the preset
    does not have or a size off the patch grid.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    config = dict(PRESETS[preset])
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes}: at least one class is needed")
    if depth is not None:
        if not 1 <= depth <= config["depth"]:
            raise ValueError(f"depth {depth}: {preset} has 1 to {config['depth']} blocks")
        config["depth"] = depth
    if image_size is not None:
        if image_size < config["patch"] or image_size % config["patch"]:
            raise ValueError(f"image size {image_size} is not a multiple of the patch size "
                             f"{config['patch']}")
        config["image_size"] = image_size
    vit = ViT(num_classes, **config)
    vit.preset = preset
    return vit


def load_pretrained(model, source):
    """Load ImageNet-1k DeiT weights into a ViT, in place.

    source: a path, "auto" (downloads the public DeiT file into torch.hub's folder) or a state
    dict; plain or under the key "model" or "state_dict", with or without the prefix "module.",
    float16 or float32. The 1000-class head and the final LayerNorm are dropped, blocks beyond the
    model's depth too, the class token and its position embedding are copied to all C class tokens;
    every other key must be there with its shape, and no further ones. The patch head keeps its
    fresh values. Raises FileNotFoundError (no such file, no connection) and ValueError (weights of
    another architecture).
    """
    name = "the given state dict"
    if not isinstance(source, dict):
        source, name = read_weights(source, model.preset), source
    found, own = plain_weights(source), model.state_dict()
    wrong = f"{name} does not hold weights for {model.preset}"
    positions = found["pos_embed"].shape[1] if "pos_embed" in found else 197
    if "dist_token" in found:
        raise ValueError(f"{wrong}: it is distilled (it has a dist_token); give the plain file")
    if round((positions - 1) ** 0.5) ** 2 != positions - 1:
        raise ValueError(f"{wrong}: its 'pos_embed' has {positions} positions, not one for the "
                         "class token and a square of patches (DeiT-III has none for the token)")

    weights = {"head.weight": own["head.weight"], "head.bias": own["head.bias"]}
    for key in [key for key in own if key not in weights]:
        deit = DEIT_NAMES.get(key, key)
        if deit not in found:
            raise ValueError(f"{wrong}: it has no {deit!r} (its first keys: "
                             f"{', '.join(list(found)[:3])})")
        value = found.pop(deit) if deit == key else found[deit]
        shape = tuple(value.shape)
        if key == "class_pos_embed":
            value = value[:, :1]
        if key == "patch_pos_embed":
            side = round((positions - 1) ** 0.5)
            value = resize_position_embedding(value[:, 1:], (side, side), model.pos_grid)
        if key.startswith("class_"):
            value = value.expand(-1, model.num_classes, -1)
        if value.shape != own[key].shape:
            raise ValueError(f"{wrong}: {deit!r} is {shape}, which does not make "
                             f"{tuple(own[key].shape)}")
        weights[key] = value.to(own[key].dtype)

    for key in found:  # what is left
        block = re.match(r"blocks\.(\d+)\.", key)
        beyond = block and int(block[1]) >= len(model.blocks)
        if not beyond and not key.startswith(("cls_token", "pos_embed", "norm.", "head.")):
            raise ValueError(f"{wrong}: it has {key!r}, for which plain DeiT has no place "
                             "(gamma_1 and gamma_2 are LayerScale's)")
    model.load_state_dict(weights)


def plain_weights(found):
    """A state dict without what programs put around it: "model", "state_dict", "module."."""
    for key in ("model", "state_dict"):
        if isinstance(found.get(key), dict):
            found = found[key]
    return {str(key).removeprefix("module."): value for key, value in found.items()}


def download_weights(address):
    """The state dict at an address, through torch.hub's cache, or FileNotFoundError."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(address).name
    try:
        return torch.hub.load_state_dict_from_url(address, map_location="cpu", check_hash=True,
                                                  weights_only=True)
    except Exception as error:  # no connection, a wrong checksum, half a file in the cache
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = "fetch it elsewhere and give its path"
        if cached.is_file():
            remedy = f"{cached} is damaged, delete it"
        raise FileNotFoundError(f"could not load {address} ({reason}): {remedy}") from error


def read_weights(source, preset):
    """The state dict in a file, or the preset's public one ("auto"); no code in it is run."""
    if source == "auto":
        if preset not in DEIT_URLS:
            raise ValueError(f"there are no public weights for preset {preset!r}")
        return download_weights(DEIT_URLS[preset])
    if not Path(source).is_file():
        raise FileNotFoundError(f"no weights at {source}")
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors alike
        reason = " ".join(str(error).split())[:200]
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(f"{source} wants to run code ({code[1]}), which is refused: load it "
                             "where you trust it, and save its dict of weights alone") from error
        raise ValueError(f"{source} is no file of weights ({type(error).__name__}: "
                         f"{reason})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{source} holds a {type(found).__name__}, not a dict of weights")
    return found

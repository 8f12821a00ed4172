"""A plain Vision Transformer with one class token per class and captured attention.

Reads  DeiT checkpoints (a path, or the public files through torch.hub).
Writes nothing.
Run    from the stages: model.build("deit_small", num_classes=20); model.load_pretrained(vit, "auto")
Expect the same block stack, to rounding, as torchvision's VisionTransformer (test_aream.py).

Letters: B batch, L layers, A heads, C foreground classes (= class tokens), P = gh * gw patches, N = C + P tokens.
"""
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

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


class ViTOutput(NamedTuple):
    """What ViT.forward returns. The two tuples have one entry per layer, or are empty if not captured."""

    class_logits: torch.Tensor  # (B, C) mean over channels of each output class token
    patch_logits: torch.Tensor  # (B, C) global average of the patch map
    cam: torch.Tensor  # (B, C, gh, gw) relu(patch map) >= 0, detached
    affinity: tuple = ()  # L x (B, N, N) mean over heads of softmax(q k^T / sqrt d), rows sum to 1, detached
    affinity_logits: tuple = ()  # L x (B, N, N) mean over heads of q k^T / sqrt d, graph attached


class Attention(nn.Module):
    """Multi-head self-attention that can also return its two head-averaged maps."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, capture=False):
        """(B, N, D) -> (B, N, D), affinity (B, N, N) or None, affinity_logits (B, N, N) or None."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, A, N, d)
        scale = (D // self.heads) ** -0.5
        affinity = logits = None
        if capture in (True, "affinity"):
            # Only the mean over heads leaves this block, so memory grows with L * N^2, not with L * A * N^2.
            with torch.no_grad():
                prob = ((q @ k.transpose(-2, -1)) * scale).float().softmax(-1)  # (B, A, N, N)
                affinity = prob.mean(1)  # (B, N, N)
        if capture in (True, "logits"):
            # The mean over heads of q_h k_h^T is one product over all channels: no tensor with a head dimension.
            q_all, k_all = qkv[:, :, 0].flatten(2), qkv[:, :, 1].flatten(2)  # (B, N, D)
            logits = (q_all @ k_all.transpose(-2, -1)).float() * (scale / self.heads)
        if affinity is not None and not torch.is_grad_enabled():
            out = prob.to(v.dtype) @ v  # already at hand, cheaper than attending twice
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, D)), affinity, logits


class Block(nn.Module):
    """Pre-norm transformer block: attention and a two-layer MLP (submodule names are those of DeiT's files)."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.fc1 = nn.Linear(dim, 4 * dim)
        self.mlp.act = nn.GELU()
        self.mlp.fc2 = nn.Linear(4 * dim, dim)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, capture=False):
        out, affinity, logits = self.attn(self.norm1(x), capture)
        x = x + self.drop_path(out)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x, affinity, logits


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, images):
        return self.proj(images)


class ViT(nn.Module):
    """DeiT with C class tokens and a 3x3 convolution on the patch tokens, as in MCTformer-V2.

    Neither path passes a final LayerNorm. Build it with build().
    """

    def __init__(self, num_classes, dim, depth, heads, patch, image_size):
        super().__init__()
        self.num_classes, self.patch, self.dim = num_classes, patch, dim
        self.grid = (image_size // patch, image_size // patch)  # of the stored position embedding
        self.patch_embed = PatchEmbed(dim, patch)
        self.class_tokens = nn.Parameter(torch.zeros(1, num_classes, dim))
        self.class_pos_embed = nn.Parameter(torch.zeros(1, num_classes, dim))
        self.patch_pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self):
        """Truncated normals of std 0.02, zero biases, and W_q = W_k in every block.

        With independent W_q and W_k attention starts unrelated to content, and a ViT trained from scratch on little
        data never makes an affinity of it ("mimetic" initialisation). Pretrained weights overwrite all of this.
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

    def flops(self, grid):
        """Floating-point operations of one image's forward pass, matrix products only, for a (gh, gw) of patches."""
        P, D, C = grid[0] * grid[1], self.dim, self.num_classes
        block = 24 * (C + P) * D**2 + 4 * (C + P)**2 * D  # qkv, projection and MLP; both products of attention
        return len(self.blocks) * block + 2 * P * D * (3 * self.patch**2 + 9 * C)

    def position_embedding(self, grid):
        """The patch position embedding for an explicit (gh, gw), resized bicubically -> (1, gh * gw, D)."""
        if grid == self.grid:
            return self.patch_pos_embed
        pos = self.patch_pos_embed.unflatten(1, self.grid).permute(0, 3, 1, 2)  # (1, D, gh0, gw0)
        return F.interpolate(pos, size=grid, mode="bicubic").flatten(2).transpose(1, 2)

    def tokens(self, images, capture=False):
        """The block stack: (B, 3, H, W) -> tokens (B, N, D), (gh, gw), affinity tuple, affinity_logits tuple."""
        B, _, H, W = images.shape
        if H % self.patch or W % self.patch or not (H and W):
            raise ValueError(f"image size {H} x {W} is not a multiple of the patch size {self.patch}; pad it first")
        if capture not in (False, True, "affinity", "logits"):
            raise ValueError(f"capture={capture!r}: use False, True, 'affinity' or 'logits'")
        grid = (H // self.patch, W // self.patch)
        patches = self.patch_embed(images).flatten(2).transpose(1, 2) + self.position_embedding(grid)  # (B, P, D)
        x = torch.cat([(self.class_tokens + self.class_pos_embed).expand(B, -1, -1), patches], dim=1)  # (B, N, D)
        affinities, logits = [], []
        for block in self.blocks:
            x, affinity, affinity_logits = block(x, capture)
            affinities.append(affinity)
            logits.append(affinity_logits)
        drop_none = lambda maps: tuple(m for m in maps if m is not None)
        return x, grid, drop_none(affinities), drop_none(logits)

    def forward(self, images, capture=False):
        """Classify, and localise.

        images: (B, 3, H, W), ImageNet-normalised, H and W multiples of the patch size.
        capture: True keeps both maps of every layer, "affinity" or "logits" only that one, False none (and then
            the fused attention of torch is used throughout).
        Returns ViTOutput. Raises ValueError on a size that is not a multiple of the patch.
        """
        x, grid, affinity, logits = self.tokens(images, capture)
        class_tokens, patch_tokens = x.split([self.num_classes, grid[0] * grid[1]], dim=1)
        patch_map = self.head(patch_tokens.transpose(1, 2).unflatten(2, grid))  # (B, C, gh, gw)
        return ViTOutput(
            class_logits=class_tokens.mean(-1),
            patch_logits=patch_map.mean((-2, -1)),
            cam=patch_map.detach().float().relu(),
            affinity=affinity,
            affinity_logits=logits,
        )


def build(preset, num_classes, *, depth=None, image_size=None):
    """Make an untrained ViT.

    preset: a name in PRESETS. num_classes: C >= 1. depth: use the first blocks only (the paper studies 6, 8, 10 and
    12). image_size: pixels a side of the stored position embedding (any other size is reached by resizing it).
    Raises ValueError on an unknown preset, a depth the preset does not have or a size off the patch grid.
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
            raise ValueError(f"image size {image_size} is not a multiple of the patch size {config['patch']}")
        config["image_size"] = image_size
    vit = ViT(num_classes, **config)
    vit.preset = preset
    return vit


def load_pretrained(model, source):
    """Load ImageNet-1k DeiT weights into a ViT, in place.

    source: a path, "auto" (downloads the public DeiT file into torch.hub's folder) or a state dict; plain or under
    the key "model", float16 or float32. The 1000-class head and the final LayerNorm are dropped, blocks beyond the
    model's depth too, the class token and its position embedding are copied to all C class tokens; every other key
    must be there with its shape. The patch head and nothing else keeps its fresh values.
    Raises FileNotFoundError (no such file, no connection) and ValueError (weights of another architecture).
    """
    if isinstance(source, dict):
        state, name = source, "the given state dict"
    else:
        state, name = read_weights(source, model.preset), str(source)
    state = dict(state.get("model", state))
    for key in ("head.weight", "head.bias", "norm.weight", "norm.bias"):
        state.pop(key, None)
    own = model.state_dict()
    state = {k: v for k, v in state.items() if not _block_beyond(k, len(model.blocks))}
    try:
        cls_token, pos_embed = state.pop("cls_token"), state.pop("pos_embed")
        pos_embed = resize_pos_embed(pos_embed, model.grid)
        state["class_tokens"] = cls_token.expand_as(own["class_tokens"])
        state["class_pos_embed"] = pos_embed[:, :1].expand_as(own["class_pos_embed"])
        state["patch_pos_embed"] = pos_embed[:, 1:]
        state["head.weight"], state["head.bias"] = own["head.weight"], own["head.bias"]
        model.load_state_dict({k: v.to(own[k].dtype) if k in own else v for k, v in state.items()})
    except (KeyError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} does not hold weights for {model.preset} ({reason}); "
                         f"give the DeiT file of that size, another --preset, or --pretrained none") from error


def _block_beyond(key, depth):
    parts = key.split(".")
    return parts[0] == "blocks" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) >= depth


def resize_pos_embed(pos_embed, grid):
    """(1, 1 + P0, D) of a square P0 -> (1, 1 + gh * gw, D), patches resized bicubically."""
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    if (side, side) == tuple(grid):
        return pos_embed
    patches = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
    return torch.cat([pos_embed[:, :1].float(), patches], dim=1)


def read_weights(source, preset):
    """The state dict in a file, or of "auto" the public one of the preset, read without running any code in it."""
    if source == "auto":
        if preset not in DEIT_URLS:
            raise ValueError(f"there are no public weights for preset {preset!r}: use --pretrained none or a path")
        try:
            return torch.hub.load_state_dict_from_url(
                DEIT_URLS[preset], map_location="cpu", check_hash=True, weights_only=True)
        except (URLError, OSError) as error:
            raise FileNotFoundError(
                f"could not download {DEIT_URLS[preset]} ({error}); fetch it elsewhere and give its path with "
                f"--pretrained PATH, or start from scratch with --pretrained none") from error
    if not Path(source).is_file():
        raise FileNotFoundError(f"no weights at {source}: give a DeiT .pth file, 'auto' or 'none' with --pretrained")
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and end-of-file errors alike
        raise ValueError(f"{source} is not a readable weights file ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{source} holds a {type(state).__name__}, not a dict of weights")
    return state

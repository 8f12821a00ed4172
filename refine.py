"""Stage 2: CAM -> class-to-patch product -> affinity / random walk -> PAR -> pseudo-masks.

Reads  <out>/cls/last.pt and the images of a split, with their image labels.
Writes <out>/cam/<image>.npz (the refined seed) and <out>/pseudo/<image>.png (0 background, 1..C, 255 undecided).
Run    python refine.py --data VOC2012                      (after train_cls.py)
Expect on 2 CPU cores, DeiT-Tiny, VOC at 320 px, one scale: 7.0 images/s (2026-11-22). On a GPU: not yet run.
"""
import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import pil_to_tensor

import aream
import data
import model as vit

DILATIONS = (1, 2, 4, 8, 12, 24)
ITERATIONS = 10
KERNEL_SUM = 1.01  # 1 from the colours, 0.01 from the distances
NEIGHBOURS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


# ---------------------------------------------------------------------------------------------------------------------
# Random walk
# ---------------------------------------------------------------------------------------------------------------------
def random_walk(score, affinity, beta=1.0, steps=1):
    """Spread a score along an affinity: T^steps score with T the row-normalised affinity^beta.

    One step with beta 1 is the plain propagation of the paper, aream.propagate: its rows are not normalised (class
    tokens take a part of each patch's attention, so the rows of a patch block sum to less than 1).
    score (B, K, gh, gw) >= 0; affinity (B, P, P) >= 0. Returns (B, K, gh, gw) float32.
    """
    if steps < 0 or beta <= 0:
        raise ValueError(f"random walk with steps {steps}, beta {beta}: steps >= 0 and beta > 0")
    score, transition = score.float(), affinity.float()
    if steps == 1 and beta == 1:
        return aream.propagate(transition, score)
    transition = transition**beta
    transition = transition / transition.sum(-1, keepdim=True).clamp_min(1e-12)
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
    images, size, n = images.float(), images.shape[-2:], 8 * len(dilations)
    padded = F.pad(images, [max(dilations)] * 4, mode="replicate")
    total, squares, step = torch.zeros_like(images), torch.zeros_like(images), torch.empty_like(images)
    for near in neighbours(padded, dilations, size):  # one at a time: all 48 at once do not fit in a CPU's cache
        torch.sub(near, images, out=step)  # the std over the neighbours is that of the steps: all are shifted by I
        total.add_(step)
        squares.addcmul_(step, step)
    std = ((squares - total.square() / n).clamp_min(0) / (n - 1)).sqrt()
    weight = 1 / (0.3 * (std + 1e-8) * 3**0.5)  # (B, 3, H, W), the mean over RGB included
    here, colour = images * weight, images.new_empty(len(images), n, *size)
    for i, near in enumerate(neighbours(padded, dilations, size)):
        torch.sum(torch.mul(near, weight, out=step).sub_(here).square_(), 1, out=colour[:, i])
    colour = colour.sub_(colour.amin(1, keepdim=True)).neg_().exp_()
    colour.div_(colour.sum(1, keepdim=True))  # the softmax of -colour, in place
    distance = torch.tensor([d * (2.0**0.5 if dy and dx else 1.0) for d in dilations for dy, dx in NEIGHBOURS])
    place = -(distance / (distance.std() + 1e-8) / 0.3).square()  # (n,)
    return colour.add_((KERNEL_SUM - 1) * place.softmax(0).to(images.device, non_blocking=True).view(1, -1, 1, 1))


def pixel_adaptive_refine(images, score, dilations=DILATIONS, iterations=ITERATIONS):
    """Smooth scores along image content: iterations of the kernel-weighted sum over neighbours.

    images (B, 3, H, W), any linear range; score (B, K, H, W) of the same H and W. Returns (B, K, H, W) float32; the
    total grows by 1.01 an iteration.
    """
    if images.shape[-2:] != score.shape[-2:]:
        raise ValueError(f"images are {tuple(images.shape[-2:])} and scores {tuple(score.shape[-2:])} pixels: resize one")
    if iterations < 0:
        raise ValueError(f"PAR with {iterations} iterations: 0 (none) or more")
    if images.device.type == "cpu":  # few images at a time stay in the cache, and absent classes need no work
        chunk = max(1, 2**16 // images[0, 0].numel())
        if len(images) > chunk:
            return torch.cat([pixel_adaptive_refine(*part, dilations, iterations)
                              for part in zip(images.split(chunk), score.split(chunk))])
        used = score.flatten(2).any(-1).any(0)
        if not used.all():
            refined = torch.zeros_like(score, dtype=torch.float32)
            if used.any():
                refined[:, used] = pixel_adaptive_refine(images, score[:, used], dilations, iterations)
            return refined
    weights = par_kernel(images, dilations)[:, :, None].unbind(1)  # n x (B, 1, H, W)
    pad, score = [max(dilations)] * 4, score.float().clone()
    padded = F.pad(score, pad, mode="replicate")  # written to again and again, so that the views below stay valid
    near = list(neighbours(padded, dilations, score.shape[-2:]))
    for i in range(iterations):
        if i:
            padded.copy_(F.pad(score, pad, mode="replicate"))
        torch.mul(weights[0], near[0], out=score)
        for weight, view in zip(weights[1:], near[1:]):
            score.addcmul_(weight, view)
    return score


# ---------------------------------------------------------------------------------------------------------------------
# Pseudo-labels
# ---------------------------------------------------------------------------------------------------------------------
def present_classes(labels):
    """labels (B, C) in {0, 1} -> class indices (B, K), each image's own first, and which of them are its own (B, K).

    K is the most classes that an image of the batch has (at least 1): what a batch costs does not grow with C.
    """
    present, class_ids = labels.topk(max(1, int(labels.sum(1).max())), dim=1)
    return class_ids, present


def pseudo_label(images, cam, class_ids, present, low=0.35, high=0.55, iterations=ITERATIONS):
    """Confident labels from a CAM, with a band of 255 between a low and a high background score.

    images (B, 3, H, W) in [0, 1]; cam (B, K, h, w) in [0, 1], any size; class_ids, present (B, K): present_classes.
    Returns (B, H, W) int64 in {0, 1..C, 255}: foreground where it wins against the high background score, background
    where that wins already against the low one, 255 elsewhere. Both scores are refined together, at half size, by so
    many iterations of PAR.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"background scores low {low}, high {high}: 0 <= low <= high <= 1")
    H, W = images.shape[-2:]
    half = (max(1, H // 2), max(1, W // 2))
    cam = F.interpolate(cam.float(), size=half, mode="bilinear", align_corners=False)  # (B, K, h, w)
    cam = cam.masked_fill(present[..., None, None] == 0, float("-inf"))
    background = [torch.full_like(cam[:, :1], beta) for beta in (low, high)]
    score = torch.cat([torch.cat([b, cam], 1).softmax(1)[:, 1:] for b in background], 1)  # (B, 2 K, h, w)
    small = F.interpolate(images.float(), size=half, mode="bilinear", align_corners=False)
    score = pixel_adaptive_refine(small, score, iterations=iterations)
    score = F.interpolate(score, size=(H, W), mode="bilinear", align_corners=False)
    total = KERNEL_SUM**iterations  # of all K + 1 channels: the background's is what the classes leave of it
    values = torch.cat([torch.zeros_like(class_ids[:, :1]), data.mask_value(class_ids)], 1)  # (B, K + 1)
    at_low, at_high = (
        values.gather(1, torch.cat([total - s.sum(1, keepdim=True), s], 1).max(1).indices.flatten(1)).view(-1, H, W)
        for s in score.chunk(2, 1))
    return torch.where(at_high > 0, at_high, torch.where(at_low > 0, data.IGNORE, 0))


# ---------------------------------------------------------------------------------------------------------------------
# CAMs of whole images
# ---------------------------------------------------------------------------------------------------------------------
def parse_layers(text, depth):
    """"all", "none", "0-6" or "3,7-8" (0-based, inclusive) -> tuple of layer indices; "entropy" stays what it is."""
    if text == "entropy":
        return text
    if text in ("all", "none"):
        return tuple(range(depth)) if text == "all" else ()
    try:
        layers = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        layers = []
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise ValueError(f"--layers {text!r}: use all, none, entropy or something like 0-6 or 3,7 within 0-{depth - 1}")
    return tuple(sorted(set(layers)))


@torch.no_grad()
def seed_cams(model, pixels, class_ids, variants, scales=(1.0,), beta=1.0, steps=1, observe=None,
              precision="float32"):
    """Seed CAMs of one image, refined in one or several ways, from one forward pass per scale.

    pixels (3, H, W) uint8; class_ids: K present classes; variants: name -> layers whose mean affinity refines (empty:
    the class-attended CAM as it is; None: the patch map without the class tokens' attention; "entropy": all layers, each
    with the re-activation weight 1 - e that it has in this view of the image). Every scale is seen with
    its mirror image, padded to whole patches and cropped; the maps of all scales are added as they are, so that small
    scales, where attention is shared by fewer patches, count more. observe: called with the ViTOutput (B = 2) of the
    scale nearest to 1.
    Returns name -> (K, ceil(H / 4), ceil(W / 4)) in [0, 1], min-max normalised per class.
    """
    H, W = pixels.shape[-2:]
    small = (-(-H // 4), -(-W // 4))
    total = {name: 0 for name in variants}
    images = data.normalise(pixels[None])
    for scale in scales:
        padded, (h, w) = data.mirrored_views(images, scale, model.patch)
        with data.autocast(pixels.device, precision):
            out = model(padded, "affinity")
        if observe and scale == min(scales, key=lambda s: abs(s - 1)):
            observe(out)
        attended = aream.class_attended_cam(out.cam, out.affinity)[:, class_ids]  # (2, K, gh, gw)
        blocks = [aream.patch_block(a, attended.shape[-2] * attended.shape[-1]) for a in out.affinity]
        for name, layers in variants.items():
            cam = attended if layers is not None else out.cam[:, class_ids]
            if layers == "entropy":
                present = torch.ones_like(cam[..., 0, 0])  # (2, K)
                weights, _ = aream.reactivation_weights(aream.layer_entropy(out.cam[:, class_ids], blocks, present))
                cam = random_walk(attended, sum(weights[:, l, None, None] * block for l, block in enumerate(blocks)), beta, steps)
            elif layers:
                cam = random_walk(attended, sum(blocks[l] for l in layers) / len(layers), beta, steps)
            cam = F.interpolate(cam, size=padded.shape[-2:], mode="bilinear", align_corners=False)[..., :h, :w]
            cam = cam[:1] + cam[1:].flip(-1)
            total[name] = total[name] + F.interpolate(cam, size=small, mode="bilinear", align_corners=False)
    return {name: aream.normalise_cam(cam, torch.ones_like(cam[..., 0, 0]))[0] for name, cam in total.items()}


def pseudo_mask(pixels, class_ids, cam, low=0.35, high=0.55, iterations=ITERATIONS):
    """One image's pseudo-mask: pixels (3, H, W) uint8, class_ids (K,), cam (K, h, w) -> (H, W) in {0, 1..C, 255}."""
    class_ids = torch.as_tensor(class_ids, device=cam.device)[None]
    return pseudo_label(pixels[None].float() / 255, cam[None], class_ids, torch.ones_like(class_ids), low, high, iterations)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
def heat(pixels, cam):
    """A CAM over its photo: pixels (H, W, 3) uint8, cam (h, w) in [0, 1] -> (H, W, 3) uint8, blue to red."""
    cam = F.interpolate(torch.as_tensor(cam)[None, None].float().cpu(), size=pixels.shape[:2], mode="bilinear")[0, 0].numpy()
    colour = np.stack([np.clip(1.5 - abs(4 * cam - c), 0, 1) for c in (3, 2, 1)], -1) * 255
    return (0.45 * pixels + 0.55 * colour).astype(np.uint8)


def paint(mask):
    """(H, W) mask -> (H, W, 3) uint8 in the VOC colours."""
    return np.array(data.palette(), np.uint8).reshape(256, 3)[np.asarray(mask)]


def fit(picture, side):
    """(H, W, 3) uint8 -> PIL image whose longer side is side."""
    picture = Image.fromarray(picture)
    scale = side / max(picture.size)
    return picture.resize([max(1, round(s * scale)) for s in picture.size], Image.NEAREST if scale > 1 else Image.LANCZOS)


def contact_sheet(path, titles, rows, cell=160):
    """Rows of (H, W, 3) uint8 pictures under column titles -> one PNG."""
    rows = [[fit(picture, cell - 4) for picture in row] for row in rows]
    heights = [4 + max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (cell * len(titles), 18 + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((x * cell + 4, 3), title, fill="black")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top = 18 + sum(heights[:y]) + (heights[y] - picture.height) // 2
            sheet.paste(picture, (x * cell + (cell - picture.width) // 2, top))
    with data.replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


# ---------------------------------------------------------------------------------------------------------------------
# The stage
# ---------------------------------------------------------------------------------------------------------------------
def load_classifier(path, dataset, device):
    """The stage-1 model of a checkpoint, in eval mode, and its config."""
    state = data.read_checkpoint(path, "cls", dataset.name, dataset.classes, dataset.options)
    config = state["config"]
    model = vit.build(config["preset"], len(config["classes"]), depth=config["depth"], image_size=config["size"])
    model.load_state_dict(state["model"])
    return model.to(device).eval(), config


def refine_arguments(parser):
    add = parser.add_argument
    add("--scales", type=float, nargs="+", help="default 0.5 1 1.5; 1 for toy")
    add("--beta", type=float, default=1.0, help="random walk: power of the affinity")
    add("--steps", type=int, default=1, help="random walk: number of steps")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.common_arguments(parser)
    refine_arguments(parser)
    add = parser.add_argument
    add("--split", help="default: trainaug of VOC2012, else train")
    add("--layers", default="all", help="layers whose mean affinity refines: all, none, like 0-6, or entropy: all, weighted by 1 - e")
    add("--low", type=float, default=0.35, help="low background score")
    add("--high", type=float, default=0.55, help="high background score; between the two lies the band of 255")
    add("--par-iterations", type=int, default=ITERATIONS, help="of the pixel-adaptive refinement; 0: none")
    add("--pictures", type=int, default=0, metavar="N", help="also write a contact sheet of the first N images")
    add("--profile", type=data.profile_steps, metavar="N", help="time N images and write nothing")
    return finish_args(parser.parse_args(argv))


def finish_args(args):
    args.split = args.split or data.training_split(args.data)
    args.scales = args.scales or ([1.0] if args.data == "toy" else [0.5, 1.0, 1.5])
    if min(args.scales) <= 0:
        raise ValueError(f"--scales {args.scales}: every scale must be above 0")
    return args


def profile(model, dataset, variants, args, device):
    """Print where the time of --profile images goes; writes nothing."""
    watch, warm_up = data.Stopwatch(device), 2
    for i in range(warm_up + args.profile):
        name = dataset.ids[i % len(dataset.ids)]
        pixels, class_ids = pil_to_tensor(dataset.image(name)).to(device), dataset.labels(name)
        watch("load")
        cam = seed_cams(model, pixels, class_ids, variants, args.scales, args.beta, args.steps, precision=args.precision)["seed"]
        watch("CAM")
        pseudo_mask(pixels, class_ids, cam, args.low, args.high, args.par_iterations).cpu()
        watch("PAR")
        if i == warm_up - 1:
            watch.reset()
    print(f"refine.py, {dataset.name}, scales {args.scales}, {device}")
    watch.table(args.profile)


def main(argv=None):
    args = parse_args(argv)
    device = data.start(args)
    dataset = data.open_split(args, args.split)
    model, _ = load_classifier(args.out / "cls" / "last.pt", dataset, device)
    variants = {"seed": parse_layers(args.layers, len(model.blocks))}
    if args.profile:
        return profile(model, dataset, variants, args, device)
    args.made_from = {"classifier": data.fingerprint(args.out / "cls" / "last.pt")}  # --resume must not mix the CAMs of two
    cams, masks = args.out / "cam", args.out / "pseudo"
    for folder in (cams, masks):
        data.prepare_folder(folder, args, keep=("resume", "overwrite", "device", "workers", "out", "data_root", "pictures", "profile"))
    done = lambda name: (cams / f"{name}.npz").is_file() and (masks / f"{name}.png").is_file()
    begin, mine = time.time(), [n for n in dataset.ids[data.rank()::data.world()] if not done(n)]
    for made, (name, pixels) in enumerate(data.photographs(dataset, mine, args.workers, device), 1):
        pixels, class_ids = pixels.to(device), dataset.labels(name)
        cam = seed_cams(model, pixels, class_ids, variants, args.scales, args.beta, args.steps, precision=args.precision)["seed"]
        mask = pseudo_mask(pixels, class_ids, cam, args.low, args.high, args.par_iterations)
        data.write_cam(cams / f"{name}.npz", class_ids, cam.cpu(), pixels.shape[-2:])
        data.write_mask(masks / f"{name}.png", mask.cpu().numpy())
        if made % 20 == 0:
            rate = made / (time.time() - begin)
            data.progress(f"{made}/{len(mine)}  {rate:.1f} images/s  {(len(mine) - made) / rate / 60:.1f} minutes left")
    data.wait_for_all()
    missing = [n for n in dataset.ids if not done(n)]
    if missing:
        raise FileNotFoundError(f"{len(missing)} images have no CAM or pseudo-mask, first {missing[0]}: run with --resume")
    if data.rank():
        return
    data.log_line(masks, {"images": len(dataset.ids), "made": len(mine), "seconds": time.time() - begin})
    if args.pictures:
        rows = []
        for name in dataset.ids[:args.pictures]:
            photo = np.asarray(dataset.image(name))
            _, cam, _ = data.read_cam(cams / f"{name}.npz")
            rows.append([photo, heat(photo, cam.amax(0)), paint(data.read_mask(masks / f"{name}.png"))])
        contact_sheet(args.out / "refine.png", ["photo", "refined CAM", "pseudo-mask"], rows)
        print(f"{args.out / 'refine.png'} shows the first {len(rows)} images")


if __name__ == "__main__":
    main()

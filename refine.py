"""Stage 2: CAM -> class-to-patch product -> affinity / random walk -> PAR -> pseudo-masks.

Reads  <out>/cls/last.pt and the images of a split, with their image labels; or any --photos.
Writes <out>/cam/<image>.npz (the refined seed) and <out>/pseudo/<image>.png (0 background, 1..C,
       255 undecided); of photographs <out>/photos/<name>.cam.png (the mask) and .cam.jpg (both)
Run    python refine.py --data VOC2012                      (after train_cls.py)
Serves pseudo_label and PAR make stage 1's pair labels, too; seed_cams the CAMs of evaluate.py.
Expect on one core of an AMD EPYC, DeiT-Tiny, VOC at 320 px, bfloat16: 10.8 images/s.
"""
import math
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

import aream
import data
import model as vit

LOW, HIGH = 0.35, 0.55  # background scores of a pseudo-label
DILATIONS = (1, 2, 4, 8, 12, 24)  # of PAR, the pixel-adaptive refinement
ITERATIONS = 10
DISTANCE_WEIGHT = 0.01  # of the distances, beside the colours' 1
KERNEL_SUM = 1 + DISTANCE_WEIGHT
SIGMA = 0.3  # width of both softmaxes, in standard deviations
MOST_PATCHES = 50  # of a side: the memory of a CAM grows with its fourth power
NEIGHBOURS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


# -------------------------------------------------------------------------------------------------
# The seed: CAMs of a whole image, refined
# -------------------------------------------------------------------------------------------------
class Refinement(NamedTuple):
    """How CAMs are refined; the defaults are the paper's."""

    scales: tuple = (1.0,)  # of the image
    rows: str = "plain"  # of the affinities; "normalised": patches draw a sum of 1 from patches
    beta: float = 1.0  # of random_walk
    steps: int = 1
    precision: str = "float32"


@torch.no_grad()
def seed_cams(model, pixels, class_ids, variants, settings=Refinement(), observe=None):
    """Seed CAMs of one image, refined in one or several ways, from one forward pass per scale.

    pixels (3, H, W) uint8; class_ids: K present classes; variants: name -> by what it is refined:
        "patch map"  nothing: the patch map, without the class tokens' attention
        "unrefined"  nothing: the patch map times that attention
        (3, 7)       that, refined by the mean affinity of these layers
        "entropy"    that, refined by the mean of all, each with its weight of aream.REACTIVATION
                     (of plain rows, in this view of the image)
    observe: called with the ViTOutput (B = 2) of the scale nearest to 1, and the size (h, w) of
    the image in it without the padding.

    Every scale is seen with its mirror image, padded to whole patches and cropped. The maps of all
    scales are added; those that attention has a part in times scale^2, as at twice the scale four
    times as many patches share a token's attention.
    Returns name -> (K, ceil(H / 4), ceil(W / 4)) in [0, 1], min-max normalised per class.
    """
    H, W = pixels.shape[-2:]
    quarter = (-(-H // 4), -(-W // 4))  # of the image: four times a patch's resolution is plenty
    total = {name: 0 for name in variants}
    images = data.normalise(pixels[None])
    class_ids = torch.as_tensor(class_ids).to(pixels.device, non_blocking=True)

    for scale in settings.scales:
        padded, (h, w) = data.mirrored_views(images, scale, model.patch)
        with data.autocast(pixels.device, settings.precision):
            output = model(padded, affinity=True)
        if observe and scale == min(settings.scales, key=lambda s: abs(s - 1)):
            observe(output, (h, w))
        patch_map = output.cam[:, class_ids]  # (2, K, gh, gw)
        attended = scale**2 * aream.class_attended_cam(output.cam, output.affinity)[:, class_ids]
        blocks = [aream.patch_block(a, patch_map[0, 0].numel()) for a in output.affinity]
        if settings.rows == "normalised":
            blocks = [aream.normalise_rows(block) for block in blocks]

        for name, layers in variants.items():
            if layers == "patch map":
                cam = patch_map
            elif layers == "unrefined":
                cam = attended
            elif layers == "entropy":
                present = torch.ones_like(patch_map[..., 0, 0])  # (2, K)
                entropy = aream.layer_entropy(patch_map, output.affinity, present)
                weights, _ = aream.reactivation_weights(entropy)
                mean = aream.mean_affinity(blocks, range(len(blocks)), weights)
                cam = random_walk(attended, mean, settings.beta, settings.steps)
            else:
                mean = aream.mean_affinity(blocks, layers)
                cam = random_walk(attended, mean, settings.beta, settings.steps)
            cam = data.bilinear(cam, padded.shape[-2:])[..., :h, :w]
            cam = cam[:1] + cam[1:].flip(-1)
            total[name] = total[name] + data.bilinear(cam, quarter)
    every = torch.ones(1, len(class_ids), device=pixels.device)
    return {name: aream.normalise_cam(cam, every)[0] for name, cam in total.items()}


def random_walk(score, affinity, beta=1.0, steps=1):
    """Spread a score along an affinity.

    One step with beta 1 is the paper's plain propagation, with the rows as they are. Otherwise the
    score is multiplied by T, steps times: T is the affinity, each entry to the power beta, with
    every row divided by its sum. score (B, K, gh, gw) >= 0; affinity (B, P, P) >= 0. Returns (B,
    K, gh, gw) float32.
    """
    score, affinity = score.float(), affinity.float()
    if steps == 1 and beta == 1:
        return aream.propagate(affinity, score)
    affinity = affinity / affinity.amax(-1, keepdim=True).clamp_min(1e-12)  # or beta 8 underflows
    transition = aream.normalise_rows(affinity**beta)
    for _ in range(steps):
        score = aream.propagate(transition, score)
    return score


# -------------------------------------------------------------------------------------------------
# Pseudo-labels
# -------------------------------------------------------------------------------------------------
def present_classes(labels):
    """The classes of each image of a batch; K is the most that one of them has.

    labels (B, C) in {0, 1}. Returns class indices (B, K), present ones first, and which of them
    are present, (B, K) in {0, 1}; K >= 1. So a batch costs no more with 80 classes than with 20.
    """
    present, class_ids = labels.topk(max(1, int(labels.sum(1).max())), dim=1)
    return class_ids, present


def pseudo_label(images, cam, class_ids, present, low=LOW, high=HIGH, iterations=ITERATIONS,
                 dilations=DILATIONS):
    """Confident labels from a CAM, with a band of 255 between a low and a high background score.

    images (B, 3, H, W) in [0, 1]; cam (B, K, h, w) in [0, 1], any size; class_ids, present (B, K):
    present_classes. Returns (B, H, W) int64: a class 1..C where it beats even the high background
    score, 0 where even the low one beats every class, else 255, undecided. Both are refined
    together, at half size, by so many iterations of PAR with such dilations.
    """
    H, W = images.shape[-2:]
    half = (max(1, H // 2), max(1, W // 2))
    cam = data.bilinear(cam.float(), half)  # (B, K, h, w)
    cam = cam.masked_fill(present[..., None, None] == 0, float("-inf"))

    # softmax over background and classes; the classes' scores alone, for both background scores
    background = [torch.full_like(cam[:, :1], value) for value in (low, high)]
    prob = [torch.cat([b, cam], 1).softmax(1)[:, 1:] for b in background]
    score = torch.cat(prob, 1)  # (B, 2 K, h, w)
    small = data.bilinear(images.float(), half)
    score = pixel_adaptive_refine(small, score, dilations, iterations)
    score = data.bilinear(score, (H, W))

    # argmax. Background and classes add up to 1 before PAR, which is linear and multiplies sums by
    # 1.01 an iteration: the background is 1.01^iterations minus the sum of the classes.
    total = KERNEL_SUM**iterations
    values = torch.cat([torch.zeros_like(class_ids[:, :1]), data.mask_value(class_ids)], 1)

    def winner(score):
        """(B, K, H, W) of the classes -> mask values (B, H, W)."""
        every = torch.cat([total - score.sum(1, keepdim=True), score], 1)
        index = every.max(1).indices  # many times faster than argmax on a CPU
        return values.gather(1, index.flatten(1)).view(-1, H, W)

    at_low, at_high = (winner(s) for s in score.chunk(2, 1))
    return torch.where(at_high > 0, at_high, torch.where(at_low > 0, data.IGNORE, 0))


def pseudo_mask(pixels, class_ids, cam, **settings):
    """One image: (3, H, W) uint8, class_ids (K,), cam (K, h, w) -> (H, W) in {0, 1..C, 255}.

    settings: low, high, iterations, dilations of pseudo_label.
    """
    class_ids = torch.as_tensor(class_ids).to(cam.device, non_blocking=True)[None]
    images, present = pixels[None].float() / 255, torch.ones_like(class_ids)
    return pseudo_label(images, cam[None], class_ids, present, **settings)[0]


# -------------------------------------------------------------------------------------------------
# Pixel-adaptive refinement (PAR, from AFA, CVPR 2022)
# -------------------------------------------------------------------------------------------------
def neighbours(padded, dilations, size):
    """Yields every pixel's 8 neighbours at each dilation: views of padded (..., H+2p, W+2p)."""
    H, W = size
    pad = max(dilations)
    for d in dilations:
        for dy, dx in NEIGHBOURS:
            y, x = pad + dy * d, pad + dx * d
            yield padded[..., y:y + H, x:x + W]


def par_kernel(images, dilations=DILATIONS):
    """What a pixel takes from each of its 8 * len(dilations) neighbours, by the image alone.

    images (B, 3, H, W) -> (B, neighbours, H, W) float32, summing to 1.01 over the neighbours:
    softmax of -mean over RGB of (|I_n - I| / (0.3 std))^2, plus 0.01 times the same softmax of
    the neighbours' distances.
    """
    images, size, n = images.float(), images.shape[-2:], 8 * len(dilations)
    padded = F.pad(images, [max(dilations)] * 4, mode="replicate")

    # The std over the neighbours I_n is that of the steps I_n - I: subtracting the same centre I
    # from all of them does not change how far apart they lie. One neighbour at a time, as all 48
    # do not fit in a CPU's cache.
    total, squares = torch.zeros_like(images), torch.zeros_like(images)
    step = torch.empty_like(images)
    for near in neighbours(padded, dilations, size):
        torch.sub(near, images, out=step)
        total.add_(step)
        squares.addcmul_(step, step)
    std = ((squares - total.square() / n).clamp_min(0) / (n - 1)).sqrt()

    # softmax over n of -colour, colour[n] = mean over RGB of ((I_n - I) / (0.3 std))^2
    weight = 1 / (SIGMA * (std + 1e-8) * 3**0.5)  # (B, 3, H, W), the mean over RGB included
    centre, colour = images * weight, images.new_empty(len(images), n, *size)
    for i, near in enumerate(neighbours(padded, dilations, size)):
        torch.sum(torch.mul(near, weight, out=step).sub_(centre).square_(), 1, out=colour[:, i])
    colour = colour.sub_(colour.amin(1, keepdim=True)).neg_().exp_()
    colour.div_(colour.sum(1, keepdim=True))

    steps = [(dy * d, dx * d) for d in dilations for dy, dx in NEIGHBOURS]
    distance = torch.tensor([math.hypot(dy, dx) for dy, dx in steps])
    distance = -(distance / (distance.std() + 1e-8) / SIGMA).square()  # (n,)
    distance = distance.softmax(0).to(images.device, non_blocking=True).view(1, -1, 1, 1)
    return colour.add_(DISTANCE_WEIGHT * distance)


def par_iteration(score, kernel, dilations=DILATIONS):
    """One weighted sum over the neighbours: (B, K, H, W), (B, n, H, W) -> (B, K, H, W)."""
    padded = F.pad(score, [max(dilations)] * 4, mode="replicate")
    total = torch.zeros_like(score)
    for weight, near in zip(kernel.unbind(1), neighbours(padded, dilations, score.shape[-2:])):
        total.addcmul_(weight[:, None], near)
    return total


def pixel_adaptive_refine(images, score, dilations=DILATIONS, iterations=ITERATIONS):
    """Smooth scores along image content: iterations of the kernel-weighted sum over neighbours.

    images (B, 3, H, W), any linear range; score (B, K, H, W) of the same H and W. Returns (B, K,
    H, W) float32; each iteration multiplies the total by 1.01.
    """
    # On a CPU few images at a time stay in the cache, and absent classes need no work.
    on_cpu, refined = images.device.type == "cpu", torch.zeros_like(score, dtype=torch.float32)
    few = max(1, 2**16 // images[0, 0].numel()) if on_cpu else len(images)
    for image, own, target in zip(images.split(few), score.split(few), refined.split(few)):
        used = own.flatten(2).any(-1).any(0) if on_cpu else slice(None)
        own = own[:, used].float()
        if not own.numel():
            continue
        kernel = par_kernel(image, dilations)
        for _ in range(iterations):
            own = par_iteration(own, kernel, dilations)
        target[:, used] = own
    return refined


# -------------------------------------------------------------------------------------------------
# The stage
# -------------------------------------------------------------------------------------------------
def parse_layers(text, depth):
    """"all", "unrefined", "entropy", "0-6", "3,7-8" (0-based, inclusive) -> a variant's layers."""
    if text == "all":
        return tuple(range(depth))
    if text in ("unrefined", "entropy"):
        return text
    try:
        layers = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        layers = []
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise data.UserError(f"--layers {text!r}: use all, unrefined, entropy or something like "
                             f"0-6 or 3,7 within 0-{depth - 1}")
    return tuple(sorted(set(layers)))


def load_classifier(path, dataset, device):
    """The stage-1 model in eval mode, and its config; dataset: what it was trained on."""
    checkpoint = data.read_checkpoint(path, "cls", dataset)
    data.look_at_epoch(checkpoint, path)
    config = checkpoint["config"]
    model = vit.build(config["preset"], len(config["classes"]), depth=config["depth"],
                      image_size=config["size"])
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), config


def limit_size(model, pixels, max_side=None):
    """pixels (3, H, W) uint8, made smaller where its CAM would take too much memory.

    It is shrunk where it is, a photograph on the CPU; what is returned is on the model's device.
    """
    limited = data.limit_size(pixels, max_side or MOST_PATCHES * model.patch)
    return limited.to(model.head.weight.device)


def refine_image(model, pixels, class_ids, args):
    """pixels (3, H, W) uint8, its classes -> seed CAM (K, h, w), pseudo-mask (H, W) uint8."""
    limited = limit_size(model, pixels, args.max_side)
    variants = {"seed": parse_layers(args.layers, len(model.blocks))}
    cam = seed_cams(model, limited, class_ids, variants, refinement(args))["seed"]
    mask = pseudo_mask(limited, class_ids, cam, **mask_settings(args)).to(torch.uint8)
    return cam, data.enlarge(mask, pixels.shape[-2:])


@torch.no_grad()
def predicted_classes(model, pixels, size, precision):
    """The classes seen in a photograph, likeliest first, at least one: [(index, probability)]."""
    square = TF.resize(pixels, [size, size], antialias=True)[None].to(model.head.weight.device)
    with data.autocast(square.device, precision):
        output = model(data.normalise(square))
    prob = ((output.class_logits + output.patch_logits).float() / 2).sigmoid()[0].cpu()
    order = prob.argsort(descending=True).tolist()
    return [(c, prob[c].item()) for i, c in enumerate(order) if i == 0 or prob[c] > 0.5]


def refined_photos(args, device):
    """Refines args.photos with the classifier: yields path, pixels, names, CAM and pseudo-mask.

    names: the class in words -> its mask value; CAM (K, h, w), pseudo-mask (H, W) uint8 array.
    """
    model, config = load_classifier(args.out / "cls" / "last.pt", None, device)
    classes = config["classes"]
    present = [data.nfc(name).strip() for name in args.present]
    if unknown := [name for name in present if name not in classes]:
        raise data.UserError(f"--present: the classifier does not know {unknown[0]!r}; it knows "
                             f"{', '.join(classes)}")

    for path, pixels in data.read_photos(args.photos):
        found = {classes.index(name): name for name in present}
        if not present:
            believed = predicted_classes(model, pixels, config["size"], args.precision)
            found = {c: f"{classes[c]} (probability {p:.2f})" for c, p in believed}
        cam, mask = refine_image(model, pixels, list(found), args)
        names = {text: data.mask_value(c) for c, text in found.items()}
        yield path, pixels, names, cam, mask.cpu().numpy()


def write_photos(args, device):
    """CAM and pseudo-mask of any photographs; needs the classifier alone."""
    for path, pixels, names, cam, mask in refined_photos(args, device):
        target = args.out / "photos" / f"{path.stem}.cam.png"
        data.write_mask(target, mask)
        photo, shown = data.for_display(pixels, mask)
        picture = data.outline(data.heat(photo, cam.amax(0)), shown)
        data.write_overlay(target.with_suffix(".jpg"), picture, names)
        print(f"{path.name}: {', '.join(names)}  ->  {target}, {target.with_suffix('.jpg').name}",
              flush=True)


def refining_arguments(parser):
    add = parser.add_argument_group("CAM and random walk").add_argument
    add("--scales", type=data.number(float, 0.01), nargs="+", default=[1.0],
        help="of the image, each with its mirror image (default 1, the release's)")
    add("--rows", choices=("plain", "normalised"), default="plain",
        help="of each layer's affinity between patches: as they are (default, as in the paper "
             "and the release), or normalised, so that what patches draw from class tokens does "
             "not count")
    add("--beta", type=data.number(float, 0.01), default=1.0,
        help="random walk: power of the affinity (default %(default)s; others, and more steps, "
             "normalise its rows)")
    add("--steps", type=data.number(int, 0), default=1,
        help="random walk: number of steps (default %(default)s, the paper's plain propagation)")
    add("--max-side", type=data.number(int, 16), metavar="PX",
        help="shrink larger photographs (default: 50 patches, 800 px for DeiT)")


def refinement(args):
    """The settings of seed_cams on a command line."""
    return Refinement(args.scales, args.rows, args.beta, args.steps, args.precision)


def mask_arguments(add):
    add("--low", type=data.number(float, 0, 1), default=LOW,
        help="low background score of the pseudo-labels (default %(default)s)")
    add("--high", type=data.number(float, 0, 1), default=HIGH,
        help="high background score; between the two lies the band of 255 (default %(default)s)")
    add("--par-iterations", type=data.number(int, 0), default=ITERATIONS, metavar="N",
        help="of the pixel-adaptive refinement (default %(default)s)")
    add("--par-dilations", type=data.number(int, 1), nargs="+", default=list(DILATIONS),
        metavar="N",
        help="how far its neighbours are, in pixels at half size (default 1 2 4 8 12 24)")


def mask_settings(args):
    """The settings of pseudo_label on a command line."""
    if args.low > args.high:
        raise data.UserError(f"--low {args.low} is above --high {args.high}")
    return dict(low=args.low, high=args.high, iterations=args.par_iterations,
                dilations=args.par_dilations)


def parse_args(argv=None):
    parser = data.argument_parser(__doc__)
    data.resuming_arguments(parser)
    parser.add_argument("--split", help="default trainaug of VOC2012, else train")
    parser.add_argument("--photos", nargs="+", type=Path, metavar="PATH",
                        help="refine these photographs (files, folders) instead; replaces earlier "
                             "CAMs of the same names")
    parser.add_argument("--present", nargs="+", default=[], metavar="CLASS",
                        help="for --photos: the classes they show (default: what the classifier "
                             "believes)")
    refining_arguments(parser)
    add = parser.add_argument_group("pseudo-masks").add_argument
    add("--layers", default="all",
        help="whose mean affinity refines: all (default), unrefined (none), like 0-6, or entropy: "
             "all, times 1 - e")
    mask_arguments(add)
    args = parser.parse_args(argv)
    args.split = args.split or data.training_split(args.data)
    mask_settings(args)  # looks at them before anything is read or written
    if args.present and not args.photos:
        parser.error("--present goes with --photos; the labels of a data set come with it")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = data.setup(args)
    if args.photos:
        return write_photos(args, device)

    # data and classifier
    dataset = data.open_split(args, args.split)
    classifier = args.out / "cls" / "last.pt"
    model, _ = load_classifier(classifier, dataset, device)
    parse_layers(args.layers, len(model.blocks))  # fails before the first image
    cams, masks = args.out / "cam", args.out / "pseudo"
    made_from = {"classifier": [classifier]}
    settings = cache(lambda: data.stage_settings(args, dataset, made_from))  # of both folders
    for folder in (cams, masks):
        data.prepare_folder(folder, args, settings)

    # every image that is not there yet; of several processes each takes its share
    begin = time.time()
    todo = [name for name in data.share(dataset.ids)
            if not ((cams / f"{name}.npz").is_file() and (masks / f"{name}.png").is_file())]
    images = data.load_images(dataset, todo, args.workers, device)
    for count, (name, pixels) in enumerate(images, 1):
        class_ids = dataset.labels(name)
        cam, mask = refine_image(model, pixels, class_ids, args)
        data.write_cam(cams / f"{name}.npz", class_ids, cam.cpu(), pixels.shape[-2:])
        data.write_mask(masks / f"{name}.png", mask.cpu().numpy())
        if count % 20 == 0:
            rate = count / (time.time() - begin)
            data.progress(f"{count}/{len(todo)}  {rate:.1f} images/s  "
                          f"{(len(todo) - count) / rate / 60:.1f} minutes left")
    data.wait_for_all()

    # done
    seconds = time.time() - begin
    refined = data.sum_over_all(torch.tensor(len(todo), device=device)).item()
    data.log_line(masks, {"images": len(dataset.ids), "refined": refined,
                          "images/s": refined / seconds, "precision": args.precision,
                          "seconds": seconds})


if __name__ == "__main__":
    data.run(main)

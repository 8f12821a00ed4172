"""Stage 4: mIoU of seeds, pseudo-masks and predictions; what each layer's affinity does; pictures.

Reads  ground truth and what --what names:
       cam, pseudo, pred   <out>/cam, <out>/pseudo, <out>/pred/<split>: their mIoU
       layers              <out>/cls/last.pt: the seed refined by each layer, and its smoothness
       pictures            <out>/cls/last.pt (CAMs and pseudo-masks are made anew), <out>/pred;
                           of 8 images, or of --limit; of --photos <out>/seg/last.pt in place
                           of <out>/pred and ground truth
       submission          <out>/pred/<split>, packed for the VOC server; no ground truth
       with --before OUT, layers and pictures show that run's classifier beside this one
Writes a record of what is scored to <out>/results.json; <out>/{layers.json, layers.png,
       pictures.png, photos.png, comp6_<split>_cls.tgz}
Run    python evaluate.py --data VOC2012 --what pred
Expect on one core of an AMD EPYC, --what layers, DeiT-Tiny, VOC at 320 px, bfloat16: 9 images/s.
"""
import math
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.v2 import functional as TF

import aream
import data
import refine
import train_seg

THRESHOLDS = torch.arange(101) / 100  # background scores of the curve
FIXED_THRESHOLD = 0.45  # the middle of refine.LOW and HIGH, never tuned
CHART_COLOURS = ((178, 34, 34), (0, 0, 140), (0, 120, 60))
MEASURES = ("entropy", "distance", "top", "objects", "background", "w_hat")  # of a layer


# -------------------------------------------------------------------------------------------------
# Scores
# -------------------------------------------------------------------------------------------------
def confusion_matrix(prediction, target, num_classes):
    """Pixel counts (M, M) int64, rows = target, M = num_classes with the background.

    prediction, target: arrays or tensors of one shape, target 0..M-1 or 255 (not counted),
    prediction 0..M-1. Raises ValueError on other shapes or values (255 in a prediction too).
    """
    prediction, target = torch.as_tensor(prediction), torch.as_tensor(target)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {tuple(prediction.shape)}, target {tuple(target.shape)}")
    valid = target != data.IGNORE
    for values, name in ((prediction, "prediction"), (target[valid], "target")):
        if values.numel() and (values.min() < 0 or values.max() >= num_classes):
            raise ValueError(f"the {name} holds {int(values.max())}, allowed are "
                             f"0..{num_classes - 1}")
    index = target[valid].int() * num_classes + prediction[valid].int()
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion, unlabelled=None):
    """IoU, precision, recall per class (nan where undefined), mIoU over classes that occur.

    confusion (M, M) counts, rows = target; unlabelled (M,): target pixels given no class, which
    count as missed. Returns {"iou", "precision", "recall": (M,) float64 in [0, 1], "miou": float};
    a class occurs if the target has it.
    """
    confusion = torch.as_tensor(confusion).double()
    hit, predicted, target = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    if unlabelled is not None:
        target = target + unlabelled
    iou = torch.where(target > 0, hit / (predicted + target - hit), torch.nan)
    return {"iou": iou, "precision": hit / predicted, "recall": hit / target,
            "miou": iou.nanmean().item()}


def threshold_counts(cam, values, target, num_classes):
    """The counts from which every background threshold's confusion matrix follows.

    cam (K, H, W) in [0, 1], values (K,) mask values, target (H, W), num_classes M with the
    background. Returns (M, M, T + 1) int64, T = len(THRESHOLDS): target class, winning foreground
    class, number of THRESHOLDS that the winner's score exceeds (a score that equals one to the
    last bit may count as above it).
    """
    (K, _, W), bins, counts = cam.shape, len(THRESHOLDS) + 1, 0
    rows = max(1, 2**22 // W)  # so many at a time: a large photograph would take gigabytes
    for part, truth in zip(cam.split(rows, 1), target.split(rows)):
        score, winner = part.max(0)
        exceeded = (100 * score).ceil().int()  # 0.07 exceeds seven of them, 0.00 to 0.06
        row = truth.int().clamp_max(num_classes)  # ignored pixels in a row of their own, left out
        index = (row * K + winner.int()) * bins + exceeded
        counts = counts + torch.bincount(index.flatten(), minlength=(num_classes + 1) * K * bins)
    total = counts.new_zeros(num_classes, num_classes, bins)
    total[:, values] = counts.view(num_classes + 1, K, bins)[:num_classes]
    return total


def curve(counts):
    """threshold_counts summed over images -> a confusion matrix each, (T, M, M) int64.

    At threshold t a pixel takes its winning class if that scores above t, else background.
    """
    # counts[..., n] are pixels that score above the n lowest thresholds. Above number t are those
    # with n > t: of three thresholds above number 0 with n = 1, 2, 3, above 1 with n = 2, 3, above
    # 2 with n = 3. So it is a sum from the right, of which n = 0 is left out.
    above = counts.flip(-1).cumsum(-1).flip(-1)[..., 1:].permute(2, 0, 1)  # (T, M, M)
    confusion = above.clone()
    # where no class scores above t, the prediction is background: column 0
    confusion[:, :, 0] += counts.sum((1, 2)) - above.sum(2)
    return confusion


def summarise(counts):
    """A curve at the fixed and at its best threshold, mIoU in percent."""
    miou = [100 * scores(c)["miou"] for c in curve(counts)]
    best = int(np.argmax(miou))
    fixed = miou[round(100 * FIXED_THRESHOLD)]
    return {"fixed": fixed, "best": miou[best], "best_threshold": best / 100}


def spearman(x, y):
    """Spearman's rank correlation of two lists of numbers, in [-1, 1]."""
    def ranks(values):
        values = np.array(values)[:, None]
        return (values > values.T).sum(1) + (values == values.T).sum(1) / 2  # equal: mean rank

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def rank_correlation(table, measures, threshold):
    """Spearman's, over layers, of entropy and seed mIoU, in [-1, 1].

    table, measures: of evaluate_layers; threshold: "fixed" or "best". Near -1: the higher the
    entropy, the worse the seed refined by that layer alone, as re-activation weights presume; near
    0: entropy says nothing.
    """
    entropy = measures["entropy"]
    return spearman(entropy, [table[f"layer {l}"][threshold] for l in range(len(entropy))])


# -------------------------------------------------------------------------------------------------
# Counting over a split; of several processes each takes its share of the images
# -------------------------------------------------------------------------------------------------
def target_of(dataset, name, size, other):
    """An image's ground truth (H, W) as a tensor; other: the file whose (H, W) it must equal."""
    mask = dataset.mask(name)
    if mask.shape != tuple(size):
        raise data.UserError(f"{dataset.mask_path(name)}: the ground truth is {mask.shape[0]} x "
                             f"{mask.shape[1]} pixels, {other} {size[0]} x {size[1]} (a "
                             "photograph turned upright by its EXIF orientation needs its mask "
                             "upright too)")
    return torch.from_numpy(mask)


def need_classes(counts, dataset):
    """An error where no pixel of the ground truth has a class; counts (M,) of pixels."""
    if not counts[1:].any():
        raise data.UserError(f"the ground truth of these {len(dataset.ids)} images has no pixel "
                             f"of any class: write class k as k (0 is background, {data.IGNORE} "
                             "ignored)")


def contradiction(dataset, name, target):
    """How an image's mask contradicts its image labels, in words; None if it does not."""
    try:
        labels = {data.mask_value(index) for index in dataset.labels(name)}
    except data.UserError:  # a split to predict need not have any
        return None
    count = torch.bincount(target.flatten(), minlength=data.IGNORE + 1)
    shown = set(count[:data.IGNORE].nonzero()[:, 0].tolist()) - {0}
    nothing = not shown and not count[data.IGNORE]  # where 255 is, an object may be under it
    if shown - labels or nothing:
        return f"the mask of {name} shows {sorted(shown)}, its labels are {sorted(labels)}"
    return None


def report(contradictions, dataset, device):
    """Say so where more than a tenth of the images contradict their labels."""
    found = [text for text in contradictions if text]
    count = data.sum_over_all(torch.tensor(len(found), device=device)).item()
    if count > len(dataset.ids) / 10:
        print(f"look: in {count} of {len(dataset.ids)} images masks and image labels do not agree"
              f"{', first: ' + found[0] if found else ''}")


def evaluate_masks(dataset, folder, pseudo=False, device="cpu"):
    """Confusion (M, M) of a folder's PNGs, and unlabelled pixels by class (M,)."""
    C = len(dataset.classes)
    confusion, unlabelled = torch.zeros(C + 1, C + 1).long(), torch.zeros(C + 1).long()
    contradictions = []
    for name in data.share(dataset.ids):
        path = folder / f"{name}.png"
        mask = torch.from_numpy(data.read_mask(path, C))
        target = target_of(dataset, name, mask.shape, path)
        contradictions.append(contradiction(dataset, name, target))
        if pseudo:
            undecided = (mask == data.IGNORE) & (target != data.IGNORE)
            unlabelled += torch.bincount(target[undecided].long(), minlength=C + 1)
            target = target.masked_fill(undecided, data.IGNORE)
            mask = mask.masked_fill(mask == data.IGNORE, 0)
        try:
            confusion += confusion_matrix(mask, target, C + 1)
        except ValueError as error:
            raise data.UserError(f"{path}: {error}") from error
    report(contradictions, dataset, device)
    confusion = data.sum_over_all(confusion.to(device)).cpu()
    unlabelled = data.sum_over_all(unlabelled.to(device)).cpu()
    need_classes(confusion.sum(1) + unlabelled, dataset)
    if not confusion.any():
        raise data.UserError(f"the masks in {folder} decide on no pixel: there is nothing to "
                             "score")
    return confusion, unlabelled


def evaluate_cams(dataset, folder, device="cpu"):
    """threshold_counts summed over the CAM files of a folder."""
    M = len(dataset.classes) + 1
    counts, contradictions = torch.zeros(M, M, len(THRESHOLDS) + 1).long(), []
    for name in data.share(dataset.ids):
        path = folder / f"{name}.npz"
        class_ids, cam, size = data.read_cam(path)
        target = target_of(dataset, name, size, path)
        contradictions.append(contradiction(dataset, name, target))
        cam = data.bilinear(cam[None], size)[0]
        counts += threshold_counts(cam, data.mask_value(class_ids), target, M)
    report(contradictions, dataset, device)
    counts = data.sum_over_all(counts.to(device)).cpu()
    need_classes(counts.sum((1, 2)), dataset)
    return counts


def evaluate_layers(dataset, model, deep_from, args, device):
    """What each layer's affinity does to the seed, and how smooth it is: one pass.

    Returns table: how it is refined -> {"fixed", "best", "best_threshold"} seed mIoU (the paper's
    Figure 1; "unrefined" is the patch map times the class tokens' attention), and measures: lists
    over the layers, means over the images (Figure 3): "entropy" in bits (aream.layer_entropy),
    "distance" (aream.row_distance), "top" (aream.top_share), "objects" and "background" (the share
    of such patches' attention that class tokens get), "w_hat" (the counterpart weight of these
    entropies; --reactivation entropy takes it from plain rows).
    """
    shallow, deep = aream.coupled_layers(len(model.blocks), "split", deep_from)
    every = (*shallow, *deep)
    variants = {"patch map alone": "patch map", "unrefined": "unrefined", "all layers": every,
                "shallow layers": tuple(shallow), "deep layers": tuple(deep),
                "all, weighted": "entropy", **{f"layer {l}": (l,) for l in every}}
    M, begin, share = len(dataset.classes) + 1, time.time(), data.share(range(len(dataset.ids)))
    counts = torch.zeros(len(variants), M, M, len(THRESHOLDS) + 1).long().to(device)
    measured = torch.zeros(len(dataset.ids), len(MEASURES), len(every), device=device)
    contradictions = []
    for done, number in enumerate(share, 1):
        name = dataset.ids[number]
        pixels, class_ids = TF.pil_to_tensor(dataset.image(name)), dataset.labels(name)
        target = target_of(dataset, name, pixels.shape[-2:], dataset.image_path(name))
        contradictions.append(contradiction(dataset, name, target))
        target, labels = target.to(device), dataset.label_vector(name)[None].to(device)
        limited = refine.limit_size(model, pixels, args.max_side)

        def observe(output, size):
            padded = pad_target(target, output.cam.shape[-2:], size, model.patch)
            measured[number] = measure_layers(output, labels, padded, args.rows)

        cams = refine.seed_cams(model, limited, class_ids, variants, refine.refinement(args),
                                observe)
        values = data.mask_value(torch.tensor(class_ids))
        for own, cam in zip(counts, cams.values()):  # in the order of variants
            cam = data.bilinear(cam[None], target.shape)[0]
            own += threshold_counts(cam, values, target, M)
        if done % 20 == 0:
            data.progress(f"{done}/{len(share)}  {done / (time.time() - begin):.1f} images/s")
    data.progress("")
    report(contradictions, dataset, device)
    counts, measured = data.sum_over_all(counts).cpu(), data.sum_over_all(measured).cpu()
    need_classes(counts[0].sum((1, 2)), dataset)
    measures = dict(zip(MEASURES, measured.nanmean(0).tolist()))
    return {variant: summarise(c) for variant, c in zip(variants, counts)}, measures


def pad_target(target, grid, size, patch):
    """A mask (H, W) with ignored pixels on the right and below, where its view was padded.

    grid (gh, gw): patches of the padded view; size (h, w): the part of it that shows the image.
    """
    # gh * patch rows of the view, of which h show the image, are H * gh * patch / h of the mask
    (H, W), (gh, gw), (h, w) = target.shape, grid, size
    below, right = round(H * gh * patch / h) - H, round(W * gw * patch / w) - W
    return F.pad(target, [0, right, 0, below], value=data.IGNORE)


def measure_layers(output, labels, target, rows):
    """MEASURES of each layer, (6, L), of the first image of output (the one not mirrored).

    labels (1, C); target (H, W): its mask, of pad_target; rows: "plain" or "normalised", of all
    measures but "objects" and "background".
    """
    grid = output.cam.shape[-2:]
    blocks = torch.cat([aream.patch_block(a[:1], math.prod(grid)) for a in output.affinity])
    patch = aream.patch_label(target[None], grid)[0]  # (P,)
    of_tokens = 1 - blocks.sum(-1)  # (L, P)
    on_objects = of_tokens[:, (patch > 0) & (patch != data.IGNORE)].mean(-1)  # nan: no such
    on_background = of_tokens[:, patch == 0].mean(-1)

    if rows == "normalised":
        blocks = aream.normalise_rows(blocks)  # (L, P, P)
    entropy = aream.layer_entropy(output.cam[:1], [b[None] for b in blocks], labels)[0]
    _, w_hat = aream.reactivation_weights(entropy)
    distance, top = aream.row_distance(blocks), aream.top_share(blocks)
    return torch.stack([entropy, distance, top, on_objects, on_background, w_hat])


# -------------------------------------------------------------------------------------------------
# One function for each --what that scores: dataset, args, device -> its record; what they print
# -------------------------------------------------------------------------------------------------
def print_classes(dataset, result):
    print(f"  {'class':<14} {'IoU':>6} {'prec.':>6} {'recall':>6}")
    for i, name in enumerate(("background", *dataset.classes)):
        if not result["iou"][i].isnan():
            cells = [f"{100 * result[k][i]:6.1f}" for k in ("iou", "precision", "recall")]
            print(f"  {name:<14} " + " ".join(cells))


def print_layers(table, measures, deep_from):
    print(f"  {'refined by':<16} {'at ' + str(FIXED_THRESHOLD):>7} {'best*':>7}  threshold*  "
          f"{'entropy':>7} {'distance':>8} {'top 5 %':>7}  {'tokens: objects':>15} {'backgr.':>7}  "
          f"{'w_hat':>5}")
    for name, row in table.items():
        best = f"{row['best']:7.1f}  {row['best_threshold']:<10.2f}"
        line = f"  {name:<16} {row['fixed']:7.1f} {best}"
        if name.startswith("layer "):
            l = int(name.removeprefix("layer "))
            entropy, distance, *shares, w_hat = (measures[key][l] for key in MEASURES)
            top, objects, background = (f"{100 * share:.1f} %" for share in shares)
            line += (f"  {entropy:7.2f} {distance:8.3f} {top:>7}  {objects:>15} {background:>7}  "
                     f"{w_hat:5.2f}")
        print(line)
    w_hat = measures["w_hat"]
    fixed, best = (rank_correlation(table, measures, threshold) for threshold in ("fixed", "best"))
    print("  * chosen with pixel labels: an upper bound, not a result from image labels")
    print(f"  mean counterpart weight w_hat: {np.mean(w_hat):.2f} over all layers, "
          f"{np.mean(w_hat[deep_from:]):.2f} over the deep ones (with uniform weights: 1)")
    print(f"  rank correlation over layers of entropy and seed mIoU: {fixed:+.2f} at "
          f"{FIXED_THRESHOLD}, {best:+.2f} at the best thresholds")


def heading(args, dataset):
    return (f"{args.what} of {args.out}, {dataset.name} {args.split}, {len(dataset.ids)} images")


def need_outputs(args, dataset, folder, suffix):
    """Files of stage 2 (cam, pseudo) or 3 (pred/<split>): all there, and of the same classes."""
    if folder.parent == args.out:
        data.need_classes_of(folder, dataset)
        data.look_at_origin(folder, "classifier", args.out / "cls" / "last.pt")
        remedy = f"make them with refine.py --split {args.split} --resume"
    else:
        data.need_classes_of(args.out / "seg", dataset)
        data.look_at_origin(folder, "model", args.out / "seg" / "last.pt")
        remedy = f"make them with train_seg.py --predict-only --resume --predict-split {args.split}"
    data.need_files(folder, dataset.ids, suffix, remedy)


def score_cams(dataset, args, device):
    folder = args.out / "cam"
    need_outputs(args, dataset, folder, ".npz")
    counts = evaluate_cams(dataset, folder, device)
    record = summarise(counts)
    record["curve"] = [round(100 * scores(c)["miou"], 2) for c in curve(counts)]
    print(f"{heading(args, dataset)}: mIoU {record['fixed']:.1f} at the fixed threshold "
          f"{FIXED_THRESHOLD}; best {record['best']:.1f} at {record['best_threshold']:.2f}, "
          "chosen with pixel labels")
    print_classes(dataset, scores(curve(counts)[round(100 * FIXED_THRESHOLD)]))
    return record


def score_pseudo_masks(dataset, args, device):
    folder = args.out / "pseudo"
    need_outputs(args, dataset, folder, ".png")
    confusion, unlabelled = evaluate_masks(dataset, folder, True, device)
    labelled, every = scores(confusion), scores(confusion, unlabelled)
    undecided = (unlabelled.sum() / (unlabelled.sum() + confusion.sum())).item()
    print(f"{heading(args, dataset)}: mIoU {100 * labelled['miou']:.1f} over labelled pixels, "
          f"{100 * every['miou']:.1f} over all ({100 * undecided:.1f} % undecided)")
    print_classes(dataset, labelled)
    return {"labelled": 100 * labelled["miou"], "all": 100 * every["miou"],
            "undecided": 100 * undecided}


def score_predictions(dataset, args, device):
    folder = args.out / "pred" / args.split
    need_outputs(args, dataset, folder, ".png")
    confusion, _ = evaluate_masks(dataset, folder, device=device)
    result = scores(confusion)
    print(f"{heading(args, dataset)}: mIoU {100 * result['miou']:.1f}")
    print_classes(dataset, result)
    return {"miou": 100 * result["miou"]}


def score_layers(dataset, args, device):
    model, config = refine.load_classifier(args.out / "cls" / "last.pt", dataset, device)
    depth = len(model.blocks)
    deep_from = args.deep_from or min(config["deep_from"], depth - 1)
    if not 0 < deep_from < depth:
        raise data.UserError(f"--deep-from {deep_from} with {depth} layers: it must leave layers "
                             "on both sides")
    records = read_before(args, dataset, depth) if args.before else {}
    table, measures = evaluate_layers(dataset, model, deep_from, args, device)
    print(f"{heading(args, dataset)}: seed mIoU in percent, deep layers from {deep_from}")
    print_layers(table, measures, deep_from)

    record = {**refine.refinement(args)._asdict(), "table": table, "measures": measures}
    if not data.rank():
        records[short_name(args.out)] = record
        draw_layers(args.out / "layers.png", model, dataset, records, args)
    return record


def short_name(out):
    """The last two folders of a path, for a chart."""
    return "/".join(out.resolve().parts[-2:])


def read_before(args, dataset, depth):
    """name -> the layers.json of --before, which must be of as many layers and the same images."""
    path = args.before / "layers.json"
    remedy = "make it with --what layers, without --before"
    before = data.read_json(path, remedy)
    was = {"data": before["data"], "split": before["split"], "images": before["images"],
           "layers": len(before["measures"]["entropy"])}
    now = {"data": dataset.name, "split": args.split, "images": len(dataset.ids), "layers": depth}
    if wrong := [key for key in now if was[key] != now[key]]:
        raise data.UserError(f"{path} has {wrong[0]} {was[wrong[0]]}, this run {now[wrong[0]]}: "
                             f"{remedy}, with the same --data, --split and --limit")
    name = short_name(args.before)
    return {f"{name} (before)" if name == short_name(args.out) else name: before}


# -------------------------------------------------------------------------------------------------
# Pictures, and the file for VOC's server
# -------------------------------------------------------------------------------------------------
def fit(picture, side):
    """(H, W, 3) uint8 -> PIL image whose longer side is side."""
    how = Image.NEAREST if max(picture.shape) < side else Image.LANCZOS
    return ImageOps.contain(Image.fromarray(picture), (side, side), how)


def contact_sheet(path, titles, rows, cell=150):
    """One PNG of columns with titles; rows: caption -> (H, W, 3) uint8 pictures."""
    rows = {caption: [fit(picture, cell - 4) for picture in row] for caption, row in rows.items()}
    heights = [16 + max(picture.height for picture in row) for row in rows.values()]
    sheet = Image.new("RGB", (cell * len(titles), 18 + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((x * cell + 4, 3), title, fill="black")
    top = 18
    for (caption, row), height in zip(rows.items(), heights):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * cell + (cell - picture.width) // 2, top))
        caption = caption.encode("ascii", "replace").decode()  # what Pillow's own font has
        draw.text((4, top + height - 15), caption, fill="black")
        top += height
    data.write_picture(path, sheet)


def draw_pictures(dataset, args, device):
    """One row per image: photo, CAM, refined CAM, pseudo-mask, prediction, ground truth.

    The pseudo-mask is made here, from the last run's CAM; predictions are shown if they are there.
    """
    runs = {"": args.out} if args.before is None else {"plain": args.before, "AReAM": args.out}
    models = {run: refine.load_classifier(out / "cls" / "last.pt", dataset, device)[0]
              for run, out in runs.items()}
    names, predicted = dataset.ids[:args.limit or 8], args.out / "pred" / args.split
    has_prediction = all((predicted / f"{name}.png").is_file() for name in names)

    rows = {}
    for name in names:
        pixels, class_ids = TF.pil_to_tensor(dataset.image(name)), dataset.labels(name)
        photo = pixels.permute(1, 2, 0).numpy()
        row = {"photo": photo}
        for run, model in models.items():
            limited = refine.limit_size(model, pixels, args.max_side)
            variants = {"unrefined": "unrefined", "refined": tuple(range(len(model.blocks)))}
            cams = refine.seed_cams(model, limited, class_ids, variants, refine.refinement(args))
            unrefined, refined = (data.heat(photo, cam.amax(0)) for cam in cams.values())
            row.setdefault("unrefined CAM", unrefined)  # that of the first run
            row[f"refined, {run}" if run else "refined CAM"] = refined
        mask = refine.pseudo_mask(limited, class_ids, cams["refined"], **refine.mask_settings(args))
        row["pseudo-mask"] = data.VOC_COLOURS[mask.cpu().numpy()]
        if has_prediction:
            row["DeepLab"] = data.VOC_COLOURS[data.read_mask(predicted / f"{name}.png")]
        row["ground truth"] = data.VOC_COLOURS[dataset.mask(name)]
        rows[name] = row
    titles, path = list(row), args.out / "pictures.png"
    contact_sheet(path, titles, {name: list(row.values()) for name, row in rows.items()}, 132)
    print(f"{path} shows the first {len(rows)} images of {args.split}")


def draw_photos(args, device):
    """One row per photograph: photo, CAM, pseudo-mask; DeepLab's mask, if <out> has a DeepLab."""
    rows, titles = {}, ["photo", "CAM, refined", "pseudo-mask (pale: undecided)", "DeepLab"]
    net = None
    if (args.out / "seg" / "last.pt").is_file():
        net, _ = train_seg.load_trained(args, None, device)
    try:
        for path, pixels, names, cam, mask in refine.refined_photos(args, device):
            masks = [mask]
            if net:
                masks.append(train_seg.predict_photograph(net, pixels, [1.0], args, device))
            photo, *masks = data.for_display(pixels, *masks)
            tinted = [data.tint(photo, mask) for mask in masks]
            rows[f"{path.stem}: {', '.join(names)}"] = [
                photo, data.heat(photo, cam.amax(0)), *tinted]
    finally:  # what cannot be read ends in an error; the others are shown
        if rows:
            contact_sheet(args.out / "photos.png", titles if net else titles[:-1], rows, 220)
            print(f"{args.out / 'photos.png'} shows {len(rows)} photographs")


def chart(size, title, series, level=(), band=(), height=None):
    """A line chart over layers, drawn twice as large: a PIL image of size (w, h) pixels.

    series: name -> values; level: name -> a dotted line; band: name -> what the values may be off;
    height: (lowest, highest) value, else what is there.
    """
    (w, h), level, band = (2 * side for side in size), dict(level), dict(band)
    left, top, right, bottom = 84, 50, w - 20, h - 72
    values = [v for line in series.values() for v in line] + list(level.values())
    low, high = height or (min(values), max(values))
    if height is None:
        low, high = low - 0.05 * (high - low + 1e-9), high + 0.05 * (high - low + 1e-9)
    depth = max(len(line) for line in series.values())

    def x(layer):
        return left + (right - left) * (layer + 0.5) / depth

    def y(value):
        return bottom - (bottom - top) * (value - low) / (high - low)

    def points(values):
        return [(x(l), y(v)) for l, v in enumerate(values)]

    picture, font = Image.new("RGB", (w, h), "white"), ImageFont.load_default(23)
    draw = ImageDraw.Draw(picture, "RGBA")  # which blends in
    draw.text((left, 10), title, "black", font)
    draw.rectangle((left, top, right, bottom), outline="grey")
    for tick in np.linspace(low, high, 5)[1:-1]:
        draw.line((left, y(tick), right, y(tick)), "lightgrey")
        draw.text((4, y(tick) - 14), f"{tick:.3g}", "black", font)
    for l in range(depth):
        draw.text((x(l) - 8, bottom + 4), str(l), "black", font)
    for i, (name, line) in enumerate(series.items()):
        colour = CHART_COLOURS[i]
        if name in band:
            line, off = np.asarray(line), np.asarray(band[name])
            draw.polygon(points(line + off) + points(line - off)[::-1], fill=(*colour, 50))
        draw.line(points(line), colour, 4)
        if name in level:
            dotted = y(level[name])
            for dash in range(left, right, 16):
                draw.line((dash, dotted, dash + 6, dotted), colour, 2)
        draw.text((left + i * (right - left) // 3, bottom + 36), name, colour, font)
    return picture.resize(size, Image.LANCZOS)


def draw_layers(path, model, dataset, records, args):
    """layers.png: four charts over layers, and the first image's affinities and CAMs.

    records: name -> what layers.json holds, one or two of them. The pictures are of model.
    """
    depth, cell = len(model.blocks), 150
    chosen = sorted({round(l) for l in np.linspace(0, depth - 1, min(6, depth))})
    image = Image.new("RGB", (cell * 8, 250 + 2 * (cell + 16)), "white")
    draw = ImageDraw.Draw(image)
    alone = {}
    for name, record in records.items():
        alone[name] = [record["table"][f"layer {l}"]["fixed"] for l in range(depth)]
    together = {name: r["table"]["all layers"]["fixed"] for name, r in records.items()}
    charts = [(f"seed mIoU (%) at {FIXED_THRESHOLD}, one layer (dotted: all)", alone, together)]
    for title, key in (("distance between affinity rows", "distance"),
                       ("entropy of the refined CAM (bits)", "entropy"),
                       ("attention on the top 5 % of patches", "top")):
        charts.append((title, {name: r["measures"][key] for name, r in records.items()}))
    for i, shown in enumerate(charts):
        image.paste(chart((2 * cell, 240), *shown), (2 * cell * i, 0))

    # the first image: affinities, and what single layers make of its CAM
    name, seen = dataset.ids[0], []
    pixels = TF.pil_to_tensor(dataset.image(name))
    photo = pixels.permute(1, 2, 0).numpy()
    variants = {"unrefined": "unrefined", **{f"layer {l}": (l,) for l in chosen}}
    limited = refine.limit_size(model, pixels, args.max_side)
    cams = refine.seed_cams(model, limited, dataset.labels(name), variants,
                            refine.refinement(args), lambda output, _: seen.append(output))
    P = seen[0].cam[0, 0].numel()
    rows = [[("photo", photo)], [("ground truth", data.VOC_COLOURS[dataset.mask(name)])]]
    for l in chosen:
        block = aream.patch_block(seen[0].affinity[l][0], P).cpu()
        grey = (255 * (block / block.max()).sqrt()).numpy().astype(np.uint8)
        rows[0].append((f"affinity, layer {l}", np.stack([grey] * 3, -1)))
    for variant, cam in cams.items():
        caption = variant if variant == "unrefined" else f"refined by {variant}"
        rows[1].append((caption, data.heat(photo, cam.amax(0))))
    for y, row in enumerate(rows):
        for x, (title, picture) in enumerate(row):
            draw.text((cell * x + 4, 250 + y * (cell + 16)), title, fill="black")
            image.paste(fit(picture, cell - 4), (cell * x, 266 + y * (cell + 16)))
    data.write_picture(path, image)


def pack_submission(dataset, args, device):
    """A split's predictions as VOC's server wants them: ids, sizes and values checked."""
    folder, C = args.out / "pred" / args.split, len(dataset.classes)
    need_outputs(args, dataset, folder, ".png")
    for name in dataset.ids:
        mask = data.read_mask(folder / f"{name}.png", C, dataset.image(name).size[::-1])
        if (mask == data.IGNORE).any():
            raise data.UserError(f"{folder / name}.png holds {data.IGNORE}: the server takes "
                                 f"0..{C} alone")
    challenge = f"comp6_{args.split}_cls"
    archive = args.out / f"{challenge}.tgz"
    with data.replacing(archive) as temporary, tarfile.open(temporary, "w:gz") as tar:
        for name in dataset.ids:
            tar.add(folder / f"{name}.png", f"results/VOC2012/Segmentation/{challenge}/{name}.png")
    print(f"{archive}: {len(dataset.ids)} masks of {args.split}, checked")


# -------------------------------------------------------------------------------------------------
# The stage
# -------------------------------------------------------------------------------------------------
SCORES = {"cam": score_cams, "pseudo": score_pseudo_masks, "pred": score_predictions,
          "layers": score_layers}
OTHERS = {"pictures": draw_pictures, "submission": pack_submission}
SPLITS = {"pred": "val", "pictures": "val", "submission": "test"}  # else train


def parse_args(argv=None):
    parser = data.argument_parser(__doc__)
    add = parser.add_argument
    add("--what", required=True, choices=(*SCORES, *OTHERS))
    add("--split", help="default val for pred and pictures, test for submission, else train")
    add("--before", type=Path, metavar="OUT",
        help="the --out of the plain classifier, for layers and pictures")
    add("--photos", nargs="+", type=Path, metavar="PATH",
        help="pictures shows these photographs (files, folders) instead, with the masks of the "
             "DeepLab of <out>/seg, at one scale")
    add("--deep-from", type=data.number(int, 1), metavar="L",
        help="for layers: first deep layer, 0-based (default: the checkpoint's)")
    refine.refining_arguments(parser)  # for layers and pictures, which make CAMs
    refine.mask_arguments(parser.add_argument_group("pseudo-masks of pictures").add_argument)
    parser.set_defaults(layers="all", present=[])
    args = parser.parse_args(argv)
    args.split = args.split or SPLITS.get(args.what, "train")
    refine.mask_settings(args)  # looks at them
    if args.photos and args.what != "pictures":
        parser.error("--photos goes with --what pictures")
    if args.what == "submission" and (args.data != "VOC2012" or args.limit):
        parser.error("--what submission packs a whole split of VOC2012: no other data, no --limit")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = data.setup(args)
    if args.photos:
        if data.world() > 1:
            raise data.UserError("--photos is work for one process: start it without torchrun")
        return draw_photos(args, device)
    dataset = data.open_split(args, args.split)
    if args.what in OTHERS:
        if not data.rank():  # work for one process
            OTHERS[args.what](dataset, args, device)
        return

    begin = time.time()
    scored = SCORES[args.what](dataset, args, device)
    if data.rank():
        return
    record = {"what": args.what, "data": dataset.name, "split": args.split,
              "images": len(dataset.ids), **scored, "seconds": round(time.time() - begin, 1)}
    data.append_result(args.out, record)
    if args.what == "layers":  # last: a study takes the file as the sign that this run is done
        data.write_json(args.out / "layers.json", record)
        print(f"{args.out / 'layers.json'}, {args.out / 'layers.png'}")


if __name__ == "__main__":
    data.run(main)

"""Stage 4: mIoU of seeds, pseudo-masks and predictions; how well each layer's affinity refines.

Reads  ground truth (nothing else does) and what --what names: <out>/cam, <out>/pseudo, <out>/pred/<split>, or, for
       layers, <out>/cls/last.pt.
Writes a record to <out>/results.json; layers also <out>/layers.json and layers.png, demo <out>/demo.png, --worst worst.png.
Run    python evaluate.py --data VOC2012 --what pred --split val
Expect on 1 CPU thread, --what layers, DeiT-Tiny, VOC at 320 px, one scale: 3.7 images/s (2026-11-22).
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import pil_to_tensor

import aream
import data
import refine

THRESHOLDS = torch.arange(101) / 100  # background scores of the curve
FIXED = 45  # index of the fixed threshold, 0.45: the middle of the band 0.35 .. 0.55 of the pseudo-labels, never tuned
FIXED_THRESHOLD = FIXED / 100


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------
def confusion_matrix(prediction, target, num_classes):
    """Pixel counts (M, M) int64, rows = target, M = num_classes with the background.

    prediction, target: arrays or tensors of one shape, target 0..M-1 or 255 (not counted), prediction 0..M-1.
    Raises ValueError on other shapes or values (255 in a prediction too).
    """
    prediction, target = torch.as_tensor(prediction).long(), torch.as_tensor(target).long()
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {tuple(prediction.shape)}, target {tuple(target.shape)}")
    valid = target != data.IGNORE
    for values, name in ((prediction, "prediction"), (target[valid], "target")):
        if values.numel() and (values.min() < 0 or values.max() >= num_classes):
            raise ValueError(f"the {name} holds {int(values.max())}, allowed are 0..{num_classes - 1}")
    index = target[valid] * num_classes + prediction[valid]
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion, unlabelled=None):
    """IoU, precision and recall per class (nan where undefined) and their mean IoU over classes that occur.

    confusion (M, M) counts, rows = target; unlabelled (M,): target pixels given no class, which count as missed.
    Returns {"iou", "precision", "recall": (M,) float64 in [0, 1], "miou": float}; a class occurs if the target has it.
    """
    confusion = torch.as_tensor(confusion).double()
    hit, predicted, target = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    if unlabelled is not None:
        target = target + unlabelled
    iou = torch.where(target > 0, hit / (predicted + target - hit), torch.nan)
    return {"iou": iou, "precision": hit / predicted, "recall": hit / target, "miou": iou.nanmean().item()}


def threshold_counts(cam, values, target, num_classes):
    """The counts from which every background threshold's confusion matrix follows.

    cam (K, H, W) in [0, 1], values (K,) mask values, target (H, W). Returns (M, M, T + 1) int64: target class, winning
    foreground class, number of THRESHOLDS that the winner's score exceeds.
    """
    score, winner = cam.max(0)
    valid = target != data.IGNORE
    exceeded = torch.bucketize(score[valid], THRESHOLDS)  # how many thresholds are < score
    T = len(THRESHOLDS) + 1
    index = (target[valid].long() * num_classes + values[winner[valid]]) * T + exceeded
    return torch.bincount(index, minlength=num_classes**2 * T).view(num_classes, num_classes, T)


def curve(counts):
    """threshold_counts summed over images -> one confusion matrix (M, M) per threshold, (T, M, M) int64.

    At threshold t a pixel takes its winning class if that scores above t, else background.
    """
    above = counts.flip(-1).cumsum(-1).flip(-1)[..., 1:].permute(2, 0, 1)  # (T, M, M): exceeds threshold j
    confusion = above.clone()
    confusion[:, :, 0] += counts.sum((1, 2)) - above.sum(2)
    return confusion


def summarise(counts):
    """Fixed and best threshold of a curve: {"fixed", "best", "best_threshold"}, mIoU in percent."""
    miou = [100 * scores(c)["miou"] for c in curve(counts)]
    best = int(np.argmax(miou))
    return {"fixed": miou[FIXED], "best": miou[best], "best_threshold": best / 100}


def rank_correlation(table, state, threshold):
    """Does entropy tell which layers refine badly? Spearman's correlation over layers of entropy and seed mIoU, in [-1, 1].

    table, state: of evaluate_layers; threshold: "fixed" or "best". Near -1: the higher the entropy, the worse the seed
    refined by that layer alone, as re-activation weights presume; near 0: entropy says nothing.
    """
    miou = [table[f"layer {l}"][threshold] for l in range(len(state["entropy"]))]
    one, other = (np.argsort(np.argsort(v)) for v in (state["entropy"], miou))  # ranks
    return float(np.corrcoef(one, other)[0, 1])


# ---------------------------------------------------------------------------------------------------------------------
# What can be evaluated
# ---------------------------------------------------------------------------------------------------------------------
def need_files(folder, ids, suffix, command):
    """Raises FileNotFoundError that counts and names the ids without a file in folder."""
    missing = [name for name in ids if not (folder / f"{name}{suffix}").is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(ids)} files are missing in {folder}: "
                                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; make them with  {command}")


def target_of(dataset, name, size=None):
    mask = dataset.mask(name)
    if (bad := mask[(mask > len(dataset.classes)) & (mask != data.IGNORE)]).size:
        raise ValueError(f"the ground truth of {name} holds {bad[0]}: {dataset.name} has 0..{len(dataset.classes)} and 255")
    if size is not None and mask.shape != tuple(size):
        raise ValueError(f"{name}: the ground truth is {mask.shape[0]} x {mask.shape[1]} pixels, "
                         f"the prediction {size[0]} x {size[1]}")
    return torch.from_numpy(mask)


def evaluate_masks(dataset, folder, command, pseudo=False):
    """Confusion (M, M) of the PNGs of a folder, the pixels left unlabelled per target class (M,), mIoU of each image."""
    M = len(dataset.classes) + 1
    need_files(folder, dataset.ids, ".png", command)
    confusion, unlabelled, single = torch.zeros(M, M, dtype=torch.int64), torch.zeros(M, dtype=torch.int64), {}
    for name in dataset.ids:
        mask = torch.from_numpy(data.read_mask(folder / f"{name}.png"))
        target = target_of(dataset, name, mask.shape)
        if pseudo:
            undecided = (mask == data.IGNORE) & (target != data.IGNORE)
            unlabelled += torch.bincount(target[undecided].long(), minlength=M)
            target = target.masked_fill(undecided, data.IGNORE)
            mask = mask.masked_fill(mask == data.IGNORE, 0)
        try:
            own = confusion_matrix(mask, target, M)
        except ValueError as error:
            raise ValueError(f"{folder / name}.png: {error}") from error
        confusion += own
        single[name] = scores(own)["miou"]
    return confusion, unlabelled, single


def draw_worst(dataset, folder, single, count, path):
    """The count images of the lowest mIoU (single: name -> mIoU): photo, mask of the folder, ground truth."""
    worst = sorted((score, name) for name, score in single.items() if score == score)[:count]
    rows = [[np.asarray(dataset.image(name)), refine.paint(data.read_mask(folder / f"{name}.png")), refine.paint(dataset.mask(name))]
            for _, name in worst]
    refine.contact_sheet(path, ["photo", "mask", "ground truth"], rows)
    print(f"{path}: the worst are {', '.join(f'{name} ({100 * score:.0f})' for score, name in worst)}")


def evaluate_cams(dataset, folder, command):
    """threshold_counts summed over the CAM files of a folder."""
    need_files(folder, dataset.ids, ".npz", command)
    counts = 0
    for name in dataset.ids:
        class_ids, cam, size = data.read_cam(folder / f"{name}.npz")
        target = target_of(dataset, name, size)
        cam = F.interpolate(cam[None], size=size, mode="bilinear", align_corners=False)[0]
        counts = counts + threshold_counts(cam, data.mask_value(class_ids), target, len(dataset.classes) + 1)
    return counts


def evaluate_layers(dataset, model, deep_from, args, device):
    """What each layer's affinity does to the seed, and what state it is in: one pass over the images.

    Returns table: how it is refined -> {"fixed", "best", "best_threshold"} seed mIoU (the paper's Figure 1; "unrefined"
    is the patch map times the class tokens' attention), and state: lists over the layers, means over the images
    (Figure 3): "entropy" in bits (aream.layer_entropy), "distance" (aream.row_distance), "top" (aream.top_share), "w_hat" (aream.reactivation_weights).
    """
    shallow, deep = aream.coupled_layers(len(model.blocks), "split", deep_from)
    variants = {"patch map alone": None, "unrefined": (), "all layers": (*shallow, *deep), "shallow layers": tuple(shallow),
                "deep layers": tuple(deep), "all, weighted": "entropy", **{f"layer {l}": (l,) for l in (*shallow, *deep)}}
    counts, states, begin = {name: 0 for name in variants}, [], time.time()
    for i, name in enumerate(dataset.ids):
        pixels, class_ids = pil_to_tensor(dataset.image(name)).to(device), dataset.labels(name)
        target = target_of(dataset, name, pixels.shape[-2:])
        labels = data.label_vector(dataset, name)[None].to(device)
        observe = lambda out: states.append(layer_state(out, labels))
        cams = refine.seed_cams(model, pixels, class_ids, variants, args.scales, args.beta, args.steps, observe, args.precision)
        values = data.mask_value(torch.tensor(class_ids))
        stacked = torch.stack(list(cams.values())).cpu()  # (variants, K, h, w)
        stacked = F.interpolate(stacked, size=target.shape, mode="bilinear", align_corners=False)
        for variant, cam in zip(variants, stacked):
            counts[variant] = counts[variant] + threshold_counts(cam, values, target, len(dataset.classes) + 1)
        if i % 20 == 19:
            rate = (i + 1) / (time.time() - begin)
            data.progress(f"{i + 1}/{len(dataset.ids)}  {rate:.1f} images/s")
    data.progress("")
    state = dict(zip(("entropy", "distance", "top", "w_hat"), torch.stack(states).mean(0).tolist()))
    return {variant: summarise(c) for variant, c in counts.items()}, state


def layer_state(out, labels):
    """Entropy, row distance, top share and w_hat of every layer, of the first image of a ViTOutput -> (4, L) on the CPU."""
    P = out.cam.shape[-2] * out.cam.shape[-1]
    blocks = torch.cat([aream.patch_block(a[:1], P) for a in out.affinity])  # (L, P, P)
    entropy = aream.layer_entropy(out.cam[:1], [b[None] for b in blocks], labels)[0]
    _, w_hat = aream.reactivation_weights(entropy)
    return torch.stack([entropy, aream.row_distance(blocks), aream.top_share(blocks), w_hat]).cpu()


def is_ground_truth(dataset, folder):
    """Whether a folder of masks is ground truth: one of the data set's mask folders, or a copy of its masks."""
    folder = Path(folder).resolve()
    if any(folder == f.resolve() for f in dataset.ground_truth_folders()):
        return True
    compared = 0
    for name in dataset.ids[:20]:
        try:
            target = dataset.mask(name)
        except (FileNotFoundError, ValueError):  # none, or none that pseudo-masks could be a copy of
            continue
        if not np.array_equal(data.read_mask(folder / f"{name}.png"), target):
            return False
        compared += 1
    return compared > 0


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------
def print_classes(dataset, result):
    print(f"  {'class':<14} {'IoU':>6} {'prec.':>6} {'recall':>6}")
    for i, name in enumerate(("background", *dataset.classes)):
        if not result["iou"][i].isnan():
            print(f"  {name:<14} " + " ".join(f"{100 * result[k][i]:6.1f}" for k in ("iou", "precision", "recall")))


def print_layers(table, state, deep_from):
    print(f"  {'refined by':<16} {'at ' + str(FIXED_THRESHOLD):>7} {'best*':>7}  threshold*  {'entropy':>7} {'distance':>8} {'top 5 %':>7}  {'w_hat':>5}")
    rows = [("",) * 4] * (len(table) - len(state["entropy"])) + list(zip(*state.values()))
    for (name, row), (entropy, distance, top, w_hat) in zip(table.items(), rows):
        print(f"  {name:<16} {row['fixed']:7.1f} {row['best']:7.1f}  {row['best_threshold']:<10.2f}" + (
            f"  {entropy:7.2f} {distance:8.3f} {100 * top:5.1f} %  {w_hat:5.2f}" if entropy else ""))
    print("  * chosen with pixel labels: an upper bound, not a result from image labels")
    print(f"  mean counterpart weight w_hat: {np.mean(state['w_hat']):.2f} over all layers, {np.mean(state['w_hat'][deep_from:]):.2f} over "
          "the deep ones (with uniform weights: 1)")
    fixed, best = (rank_correlation(table, state, threshold) for threshold in ("fixed", "best"))
    print(f"  rank correlation over layers of entropy and seed mIoU: {fixed:+.2f} at {FIXED_THRESHOLD}, {best:+.2f} at the best thresholds")


def draw_chart(draw, corner, size, title, series, level=None):
    """A line chart over layers: corner (x, y) and size (w, h) in pixels, series: name -> values, level: dotted lines."""
    (x, y), (w, h) = corner, size
    left, top, right, bottom = x + 42, y + 20, x + w - 10, y + h - 34
    values = [v for line in (*series.values(), *([v] for v in (level or {}).values())) for v in line]
    low, high = min(values), max(values)
    low, high = low - 0.05 * (high - low + 1e-9), high + 0.05 * (high - low + 1e-9)
    depth = max(len(line) for line in series.values())
    px = lambda l: left + (right - left) * (l + 0.5) / depth
    py = lambda v: bottom - (bottom - top) * (v - low) / (high - low)
    draw.text((left, y + 4), title, fill="black")
    draw.rectangle((left, top, right, bottom), outline="grey")
    for tick in np.linspace(low, high, 5)[1:-1]:
        draw.line((left, py(tick), right, py(tick)), fill="lightgrey")
        draw.text((x + 2, py(tick) - 6), f"{tick:.3g}", fill="black")
    for l in range(0, depth, max(1, depth // 6)):
        draw.text((px(l) - 3, bottom + 3), str(l), fill="black")
    for i, (name, line) in enumerate(series.items()):
        colour = ("firebrick", "navy")[i]
        draw.line([(px(l), py(v)) for l, v in enumerate(line)], fill=colour, width=2)
        draw.text((left + 90 * i, bottom + 16), name, fill=colour)
        if level:
            for dash in range(int(left), int(right), 8):
                draw.line((dash, py(level[name]), dash + 3, py(level[name])), fill=colour)


def draw_layers(path, model, dataset, records, device):
    """layers.png: four charts over the layers, the first image's affinities, its CAM refined by single layers.

    records: name -> what layers.json holds, one or two of them. The pictures are of model.
    """
    depth, cell = len(model.blocks), 150
    chosen = sorted({round(l) for l in np.linspace(0, depth - 1, min(6, depth))})
    image = Image.new("RGB", (cell * 8, 250 + 2 * (cell + 16)), "white")
    draw = ImageDraw.Draw(image)
    single = {name: [r["table"][f"layer {l}"]["fixed"] for l in range(depth)] for name, r in records.items()}
    together = {name: r["table"]["all layers"]["fixed"] for name, r in records.items()}
    for i, (title, series, level) in enumerate((
            (f"seed mIoU (%) at {FIXED_THRESHOLD}, one layer (dotted: all)", single, together),
            ("distance between affinity rows", {n: r["state"]["distance"] for n, r in records.items()}, None),
            ("entropy of the refined CAM (bits)", {n: r["state"]["entropy"] for n, r in records.items()}, None),
            ("attention on the top 5 % of patches", {n: r["state"]["top"] for n, r in records.items()}, None))):
        draw_chart(draw, (2 * cell * i, 0), (2 * cell, 240), title, series, level)
    name, seen = dataset.ids[0], []
    photo = dataset.image(name)
    variants = {"unrefined": (), **{f"layer {l}": (l,) for l in chosen}}
    cams = refine.seed_cams(model, pil_to_tensor(photo).to(device), dataset.labels(name), variants, observe=seen.append)
    photo, P = np.asarray(photo), seen[0].cam.shape[-2] * seen[0].cam.shape[-1]
    rows = [[("photo", photo)], [("ground truth", refine.paint(dataset.mask(name)))]]
    for l in chosen:
        block = aream.patch_block(seen[0].affinity[l][0], P).cpu()
        grey = (255 * (block / block.max()).sqrt()).numpy().astype(np.uint8)
        rows[0].append((f"affinity, layer {l}", np.stack([grey] * 3, -1)))
    rows[1] += [(n if n == "unrefined" else f"refined by {n}", refine.heat(photo, c.amax(0))) for n, c in cams.items()]
    for y, row in enumerate(rows):
        for x, (title, picture) in enumerate(row):
            draw.text((cell * x + 4, 250 + y * (cell + 16)), title, fill="black")
            image.paste(refine.fit(picture, cell - 4), (cell * x, 266 + y * (cell + 16)))
    with data.replacing(path) as temporary:
        image.save(temporary, format="PNG")


def stage_seconds(folder):
    """Seconds a stage took, by its log."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return sum(line.get("seconds", 0) for line in lines)


def demo(args, device):
    """The demonstration's table and contact sheet, from two finished runs: --before (plain) and --out (AReAM)."""
    last = lambda out, what: [r for r in data.read_json(out / "results.json", f"evaluate.py --what {what}")
                              if r["what"] == what][-1]
    before, after = last(args.before, "layers")["table"], last(args.out, "layers")["table"]
    plain, tuned = stage_seconds(args.before / "cls"), stage_seconds(args.out / "cls")
    pseudo, pred = last(args.out, "pseudo"), last(args.out, "pred")
    print(f"\n{'mIoU (%) on ' + args.data:<44} {'at ' + str(FIXED_THRESHOLD):>7} {'best*':>6} {'seconds':>8}")
    for name, row, seconds in (
            ("plain classifier, train: CAM, unrefined", before["unrefined"], plain),
            ("  refined by its shallow layers", before["shallow layers"], None),
            ("  refined by its deep layers", before["deep layers"], None),
            ("  refined by all layers", before["all layers"], None),
            ("after AReAM, train: CAM, unrefined", after["unrefined"], tuned),
            ("  refined by its shallow layers", after["shallow layers"], None),
            ("  refined by its deep layers", after["deep layers"], None),
            ("  refined by all layers", after["all layers"], None)):
        print(f"{name:<44} {row['fixed']:7.1f} {row['best']:6.1f} {'' if seconds is None else f'{seconds:8.0f}'}")
    print(f"{'pseudo-masks, train (labelled pixels)':<44} {pseudo['labelled']:7.1f} {'':6} {stage_seconds(args.out / 'pseudo'):8.0f}")
    print(f"{'DeepLab, val':<44} {pred['miou']:7.1f} {'':6} {stage_seconds(args.out / 'seg'):8.0f}")
    print("* threshold chosen with pixel labels: an upper bound, not a result from image labels")

    val = data.open_split(args, "val", args.out / "masks")
    models = [refine.load_classifier(out / "cls" / "last.pt", val, device)[0] for out in (args.before, args.out)]
    rows = []
    for name in val.ids[:8]:
        photo = val.image(name)
        pixels, class_ids, photo = pil_to_tensor(photo).to(device), val.labels(name), np.asarray(photo)
        layers = {"raw": (), "refined": tuple(range(len(models[0].blocks)))}
        old, new = (refine.seed_cams(m, pixels, class_ids, layers, args.scales) for m in models)
        pseudo = refine.pseudo_mask(pixels, class_ids, new["refined"])
        rows.append([photo, *(refine.heat(photo, c.amax(0)) for c in (old["raw"], old["refined"], new["refined"])),
                     refine.paint(pseudo.cpu()), refine.paint(data.read_mask(args.out / "pred" / "val" / f"{name}.png")),
                     refine.paint(val.mask(name))])
    titles = ["photo (val)", "raw CAM", "refined, plain", "refined, AReAM", "pseudo-mask", "DeepLab", "ground truth"]
    refine.contact_sheet(args.out / "demo.png", titles, rows, cell=132)
    print(f"pictures: {args.out / 'demo.png'}")


def study(folder, path):
    """Gather what the runs <folder>/<row>/<seed> were scored with into the records file path, and print it in Markdown.

    Without a folder (None) only the tables are printed, from the records. Rows are sorted by name; mean and standard deviation
    over seeds, in percent. Seeds: at the fixed threshold (in brackets the mean of the best ones, chosen with pixel labels).
    "entropy ~ mIoU" is rank_correlation, also at the fixed threshold (at the best ones).
    """
    if folder and folder.is_dir():
        records = []
        for run in sorted({f.parent for kind in ("layers", "results") for f in folder.glob(f"*/*/{kind}.json")}):
            settings = data.read_json(run / "cls" / "args.json", "repeat the study")
            record = {"row": run.parent.name, "seed": run.name, "settings": {k: settings.get(k) for k in (
                "preset", "depth", "epochs", "warmup_epochs", "lr", "batch", "reactivation", "entropy", "coupling", "deep_from",
                "affinity_weight", "labels")}}
            if (run / "layers.json").is_file():
                record.update(data.read_json(run / "layers.json", "delete it and repeat the study"))
            if (run / "pseudo" / "args.json").is_file():
                record["refine"] = data.read_json(run / "pseudo" / "args.json", "repeat the study")
            for result in data.read_json(run / "results.json", f"delete {run / 'layers.json'} and repeat the study"):
                if result["what"] in ("pseudo", "pred"):
                    record[result["what"]] = result
            records.append(record)
        if not records:
            raise FileNotFoundError(f"no scored <row>/<seed> under {folder}: make study-toy or make study-voc write them")
        path.parent.mkdir(parents=True, exist_ok=True)
        data.write_json(path, records)
    records = data.read_json(path, "make it with  make study-toy  or  make study-voc")
    rows = {name: [r for r in records if r["row"] == name] for name in dict.fromkeys(r["row"] for r in records)}

    def table(columns, cell, has):
        if not any(has in r for r in records):
            return
        print("| row | seeds | " + " | ".join(columns) + " |\n" + "|---" * (2 + len(columns)) + "|")
        for name, runs in rows.items():
            if runs := [r for r in runs if has in r]:
                print(f"| {name} | {len(runs)} | " + " | ".join(cell(runs, c) for c in columns) + " |")

    def spread(values, form=".1f"):
        return f"{np.mean(values):{form}}" + (f" ± {np.std(values, ddof=1):{form.strip('+')}}" if len(values) > 1 else "")

    def seed_cell(runs, column):
        if column == "entropy ~ mIoU":
            fixed, best = ([rank_correlation(r["table"], r["state"], t) for r in runs] for t in ("fixed", "best"))
            return f"{spread(fixed, '+.2f')} ({np.mean(best):+.2f})"
        if not all(column in r["table"] for r in runs):  # scored by an older version
            return ""
        runs = [r["table"][column] for r in runs]
        return f"{spread([r['fixed'] for r in runs])} ({np.mean([r['best'] for r in runs]):.1f})"

    def mask_cell(runs, column):
        what, key = {"labelled pixels": ("pseudo", "labelled"), "all pixels": ("pseudo", "all"),
                     "undecided": ("pseudo", "undecided"), "DeepLab, val": ("pred", "miou")}[column]
        values = [r[what][key] for r in runs if what in r]
        return spread(values) if values else ""

    table(("unrefined", "shallow layers", "deep layers", "all layers", "all, weighted", "entropy ~ mIoU"), seed_cell, "table")
    print()
    table(("labelled pixels", "all pixels", "undecided", "DeepLab, val"), mask_cell, "pseudo")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.common_arguments(parser)
    refine.refine_arguments(parser)
    add = parser.add_argument
    add("--what", required=True, choices=("cam", "pseudo", "pred", "layers", "demo", "study"))
    add("--split", help="default: val for pred, else train")
    add("--before", type=Path, metavar="OUT", help="the --out of the plain classifier: for --what demo, and to draw its layers beside these")
    add("--records", type=Path, metavar="JSON", help="for --what study: gather the runs under --out in this file, and print it")
    add("--worst", type=int, default=0, metavar="N", help="for --what pseudo and pred: also draw the N worst images, <out>/worst.png")
    add("--deep-from", type=int, help="for --what layers: first deep layer (default: the checkpoint's)")
    args = parser.parse_args(argv)
    args.split = args.split or ("val" if args.what == "pred" else "train")
    if args.what == "study" and args.records is None:
        parser.error("--what study needs --records, a file such as results/toy.json")
    if args.worst < 0 or args.worst and args.what not in ("pseudo", "pred"):
        parser.error(f"--worst {args.worst} --what {args.what}: draws so many images, at least one, for --what pseudo and pred")
    if args.what == "demo" and args.before is None:
        parser.error("--what demo compares two runs: name the plain one with --before OUT")
    return refine.finish_args(args)


def main(argv=None):
    args = parse_args(argv)
    if args.what == "study":
        return study(args.out and Path(args.out), args.records)
    device = data.start(args)
    begin = time.time()
    if args.what == "demo":
        return demo(args, device)
    dataset = data.open_split(args, args.split, args.out / "masks")
    if isinstance(dataset, data.COCO2014):
        dataset.cache_masks(args.workers)
    M, again = len(dataset.classes) + 1, f"{data.same_data(args)} --split {args.split} --out {args.out}"
    record = {"what": args.what, "data": args.data, "split": args.split, "images": len(dataset.ids)}
    title = f"{args.what} of {args.out}, {args.data} {args.split}, {len(dataset.ids)} images"
    if args.what == "layers":
        model, config = refine.load_classifier(args.out / "cls" / "last.pt", dataset, device)
        deep_from = config["deep_from"] if args.deep_from is None else args.deep_from
        record.update(scales=args.scales, beta=args.beta, steps=args.steps)
        record["table"], record["state"] = evaluate_layers(dataset, model, deep_from, args, device)
        print(f"{title}: seed mIoU in percent, deep layers from {deep_from}")
        print_layers(record["table"], record["state"], deep_from)
        label = lambda out: "/".join(out.resolve().parts[-2:])
        records = {label(args.out): record}
        if args.before:
            before = data.read_json(args.before / "layers.json", f"python evaluate.py {data.same_data(args)} --what layers --out {args.before}")
            if len(before["state"]["entropy"]) != len(model.blocks):
                raise ValueError(f"{args.before / 'layers.json'} is of a model with another number of layers")
            records = {label(args.before): before, **records}
        draw_layers(args.out / "layers.png", model, dataset, records, device)
    elif args.what == "cam":
        counts = evaluate_cams(dataset, args.out / "cam", f"python refine.py {again}")
        record.update(summarise(counts), curve=[round(100 * scores(c)["miou"], 2) for c in curve(counts)])
        print(f"{title}: mIoU {record['fixed']:.1f} at the fixed threshold {FIXED_THRESHOLD}; best {record['best']:.1f} at "
              f"{record['best_threshold']:.2f}, chosen with pixel labels")
        print_classes(dataset, scores(curve(counts)[FIXED]))
    elif args.what == "pseudo":
        masks = args.out / "pseudo"
        confusion, unlabelled, single = evaluate_masks(dataset, masks, f"python refine.py {again}", pseudo=True)
        result = scores(confusion)
        record["labelled"], record["all"] = 100 * result["miou"], 100 * scores(confusion, unlabelled)["miou"]
        record["undecided"] = 100 * (unlabelled.sum() / (unlabelled.sum() + confusion.sum())).item()
        print(f"{title}: mIoU {record['labelled']:.1f} over labelled pixels, {record['all']:.1f} over all "
              f"({record['undecided']:.1f} % undecided)")
        print_classes(dataset, result)
    else:
        masks = args.out / "pred" / args.split
        confusion, _, single = evaluate_masks(
            dataset, masks, f"python train_seg.py {data.same_data(args)} --predict-split {args.split} --out {args.out} "
                            f"(after training: with --resume and its other settings)")
        result = scores(confusion)
        record["miou"] = 100 * result["miou"]
        print(f"{title}: mIoU {record['miou']:.1f}")
        print_classes(dataset, result)
    if args.worst and args.what in ("pseudo", "pred"):
        draw_worst(dataset, masks, single, args.worst, args.out / "worst.png")
    data.append_result(args.out, {**record, "seconds": round(time.time() - begin, 1)})
    if args.what == "layers":  # last: a study takes the file as the sign that this run is done
        data.write_json(args.out / "layers.json", record)
        print(f"{args.out / 'layers.json'}, {args.out / 'layers.png'}")


if __name__ == "__main__":
    main()

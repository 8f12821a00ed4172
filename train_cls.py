"""Stage 1: the classifier, first plain (warm-up), then with the AReAM affinity loss.

Reads  images and image-level labels of --split; DeiT weights (--pretrained).
Writes <out>/cls/{args.json, log.jsonl, last.pt, warmup.pt}: warmup.pt is the state at the end of the warm-up, from
       which another run can start with --branch-from.
Run    python train_cls.py --data VOC2012                   (the paper's run)
Expect on 2 CPU cores, DeiT-Tiny, 224 px: 13.1 images/s plain, 7.8 with the AReAM loss (2026-11-22). On a GPU: not yet run.
"""
import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import aream
import data
import model as vit
from refine import present_classes, pseudo_label

PAPER = dict(preset="deit_small", size=224, batch=64, epochs=60, warmup_epochs=10, pretrained="auto",
             deep_from=7, affinity_weight=0.1, drop_path=0.1, lr=None)
RECIPES = {  # defaults that differ from the paper's VOC run
    "toy": dict(preset="toy", size=64, batch=16, epochs=15, warmup_epochs=8, pretrained="none",
                deep_from=2, affinity_weight=2.0, drop_path=0.0, lr=1e-3),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    data.common_arguments(parser)
    add("--split", help="images to train on (default: trainaug of VOC2012, else train)")
    add("--preset", choices=vit.PRESETS, help="default deit_small, toy for --data toy")
    add("--depth", type=int, help="use the first blocks only")
    add("--pretrained", help="auto: download DeiT's ImageNet-1k weights; a path; none: from scratch")
    add("--branch-from", metavar="CKPT", help="go on from this checkpoint of another run, with this run's settings")
    add("--size", type=int, help="pixels a side of a training crop")
    add("--batch", type=int)
    add("--epochs", type=int)
    add("--warmup-epochs", type=int, help="epochs without the AReAM loss")
    add("--lr", type=float, help="default 5e-4 * batch / 512; 1e-3 for toy")
    add("--weight-decay", type=float, default=0.05)
    add("--drop-path", type=float, help="default 0.1; 0 for toy")
    add("--reactivation", choices=aream.REACTIVATION, default="entropy", help="none: the plain classifier")
    add("--entropy", choices=("online", "static"), default="online",
        help="per image in each step, or averaged over the training images once, at the end of the warm-up")
    add("--coupling", choices=("all", "split"), default="all",
        help="every layer guides and is supervised, or those below --deep-from guide the others")
    add("--deep-from", type=int, help="first deep layer, 0-based (default 7; 2 for toy)")
    add("--affinity-weight", type=float, help="of the AReAM loss (default 0.1; 2 for toy)")
    add("--labels", choices=("two-views", "one-view", "shared"), default="two-views",
        help="made in an extra pass in eval mode over the image and its mirror image (default), over the image alone, or "
             "in the training pass itself, drop-path included")
    add("--low", type=float, default=0.35, help="low background score of the pseudo-label")
    add("--high", type=float, default=0.55, help="high background score")
    add("--augment", choices=data.AUGMENTATIONS, default="jitter", help="of the training images")
    add("--profile", type=data.profile_steps, metavar="N", help="time N steps, plain and with the AReAM loss, and write nothing")
    args = parser.parse_args(argv)
    for key, value in {**PAPER, **RECIPES.get(args.data, {})}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.split = args.split or data.training_split(args.data)
    if args.lr is None:
        args.lr = 5e-4 * args.batch / 512
    if not 0 <= args.warmup_epochs <= args.epochs or args.epochs < 1:
        parser.error(f"--epochs {args.epochs} --warmup-epochs {args.warmup_epochs}: 0 <= warm-up <= epochs, epochs >= 1")
    return args


@torch.no_grad()
def label_pass(model, pixels, args):
    """The forward pass that labels are made from, in eval mode: pixels (B, 3, H, W) uint8 -> ViTOutput of V * B images.

    V views: the image, and with --labels two-views its mirror image.
    """
    images = data.normalise(pixels)
    model.eval()
    with data.autocast(pixels.device, args.precision):
        out = model(torch.cat([images, images.flip(-1)]) if args.labels == "two-views" else images, "affinity")
    model.train()
    return out


@torch.no_grad()
def make_labels(out, pixels, labels, guide, args, entropy=None, mark=data.no_mark):
    """The affinity labels and counterpart weights of a batch, from a forward pass over one or two views of it.

    out: ViTOutput of V * B images; pixels (B, 3, H, W) uint8; labels (B, C); guide: layer indices; entropy (L,) in bits
    replaces each image's own (--entropy static). Returns label (B, P, P) in {0, 1, 255}, w_hat (B, L), mask (B, H, W).
    """
    B = len(pixels)
    V = len(out.cam) // B
    if entropy is None:
        entropy = aream.layer_entropy(out.cam, out.affinity, labels.repeat(V, 1)).view(V, B, -1).mean(0)  # (B, L)
    w, w_hat = aream.reactivation_weights(entropy.expand(B, -1), args.reactivation)
    cam = aream.guided_cam(out.cam, out.affinity, w.repeat(V, 1), guide)  # (V * B, C, gh, gw)
    if V == 2:
        cam = cam[:B] + cam[B:].flip(-1)
    class_ids, present = present_classes(labels)
    cam = cam[torch.arange(B, device=cam.device)[:, None], class_ids]  # (B, K, gh, gw): from here on no absent class
    size = [side // 2 for side in pixels.shape[-2:]]  # PAR works at half size
    cam = aream.normalise_cam(F.interpolate(cam, size=size, mode="bilinear", align_corners=False), present)
    mark("label CAM")
    mask = pseudo_label(pixels.float() / 255, cam, class_ids, present, args.low, args.high)
    label = aream.affinity_label(mask, out.cam.shape[-2:])
    mark("PAR")
    return label, w_hat, mask


def train_step(model, optimizer, batch, args, active, coupling, entropy=None, mark=data.no_mark):
    """One optimiser step on batch = (pixels, labels) -> its classification and affinity loss, (2,) detached.

    active: with the AReAM loss. coupling: the guide and the supervised layers. Raises FloatingPointError, with the
    weights as they were, if the loss is not finite.
    """
    (pixels, labels), (guide, supervised) = batch, coupling
    shared = active and args.labels == "shared"
    if active and not shared:
        label, w_hat, _ = make_labels(label_pass(model, pixels, args), pixels, labels, guide, args, entropy, mark)
    with data.autocast(pixels.device, args.precision):
        out = model(data.normalise(pixels), True if shared else "logits" if active else False)
    mark("forward")
    if shared:
        label, w_hat, _ = make_labels(out, pixels, labels, guide, args, entropy, mark)
    cls_loss = aream.classification_loss(out.class_logits.float(), out.patch_logits.float(), labels)
    aff_loss = torch.zeros((), device=pixels.device)
    if active:  # the pairs of the whole batch, which several processes may share; their gradients are averaged
        pairs = data.sum_over_all(aream.count_pairs(label))
        aff_loss = data.world() * aream.aream_loss(out.affinity_logits, label, w_hat, supervised, pairs)
    loss = cls_loss + args.affinity_weight * aff_loss
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss {loss.item()}")
    mark("loss")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    mark("backward")
    optimizer.step()
    mark("optimiser")
    return torch.stack([cls_loss.detach(), aff_loss.detach()])


def profile(model, optimizer, batches, args, coupling, device):
    """Print where the time of --profile steps goes, plain and with the AReAM loss; writes nothing."""
    views = {"two-views": 2, "one-view": 1, "shared": 0}[args.labels]
    forward = args.batch * model.flops((args.size // model.patch,) * 2)
    rates = []
    for active in (False, True)[:1 + (args.reactivation != "none")]:
        watch, step = data.Stopwatch(device), -2  # two steps to warm up
        while step < args.profile:
            for batch in batches:
                batch = [part.to(device) for part in batch]
                watch("load")
                train_step(model, optimizer, batch, args, active, coupling, mark=watch)
                step += 1
                if step == 0:
                    watch.reset()
                if step == args.profile:
                    break
        print(f"{'AReAM' if active else 'plain'} step, {args.preset}, {args.size} px, batch {args.batch}, {device}")
        rates.append(watch.table(args.profile, args.batch, forward * (3 + views * active)))
    images = len(batches.dataset)
    seconds = images * (args.warmup_epochs / rates[0] + (args.epochs - args.warmup_epochs) / rates[-1])
    print(f"{args.epochs} epochs, {args.warmup_epochs} of them warm-up, of {images} images at these rates: {seconds / 60:.1f} minutes")


@torch.no_grad()
def mean_entropy(model, batches, args, device):
    """Layer entropy averaged over the images of an epoch -> (L,) bits."""
    model.eval()
    total, count = 0, 0
    for pixels, labels in batches:
        pixels, labels = pixels.to(device), labels.to(device)
        with data.autocast(pixels.device, args.precision):
            out = model(data.normalise(pixels), "affinity")
        total = total + aream.layer_entropy(out.cam, out.affinity, labels).sum(0)
        count += len(labels)
    model.train()
    return data.sum_over_all(total) / (count * data.world())


@torch.no_grad()
def validate(model, samples, args, device):
    """Class mAP in percent on a ClassificationSet (mean over classes that occur of the average precision over images)."""
    model.eval()
    logits, target = [], []
    for pixels, labels in data.plain_loader(samples, args.batch, args.workers):
        with data.autocast(device, args.precision):
            out = model(data.normalise(pixels.to(device)))
        logits.append((out.class_logits + out.patch_logits).float().cpu())
        target.append(labels)
    model.train()
    return 100 * mean_average_precision(torch.cat(logits), torch.cat(target))


def mean_average_precision(logits, labels):
    """logits, labels (images, C) -> mean over the classes that occur of average precision, in [0, 1]."""
    precisions = []
    for score, label in zip(logits.T, labels.T):
        if label.any():
            hit = label[score.argsort(descending=True)]
            rank = torch.arange(1, len(hit) + 1)
            precisions.append(((hit.cumsum(0) / rank) * hit).sum() / hit.sum())
    return torch.stack(precisions).mean().item()


def schedule(done):
    """Learning rate, as a share of --lr, when a share done in [0, 1] of the training is over: as in the release.

    A linear warm-up over the first twelfth (5 of 60 epochs) from 0.016, then a cosine to 0.16 (1e-5 of 6.25e-5).
    """
    if done < 1 / 12:
        return 0.016 + 0.984 * 12 * done
    return 0.16 + 0.84 * 0.5 * (1 + math.cos(math.pi * done))


def main(argv=None):
    args = parse_args(argv)
    device = data.start(args)
    dataset = data.open_split(args, args.split)
    val = data.ClassificationSet(data.open_split(args, "val"), args.size)
    samples = data.ClassificationSet(dataset, args.size, args.augment)
    batches = data.train_loader(samples, args.batch, args.seed, args.workers, device)
    model = vit.build(args.preset, len(dataset.classes), depth=args.depth, image_size=args.size)
    coupling = aream.coupled_layers(len(model.blocks), args.coupling, args.deep_from)
    folder = args.out / "cls"
    state = None
    if args.resume and (folder / "last.pt").is_file():
        state = data.read_checkpoint(folder / "last.pt", "cls", dataset.name, dataset.classes)
    elif args.branch_from:
        if args.overwrite and folder.resolve() in Path(args.branch_from).resolve().parents:
            raise ValueError(f"--overwrite would delete {args.branch_from}, from which to branch: use another --out")
        state = data.read_checkpoint(args.branch_from, "cls", dataset.name, dataset.classes, dataset.options)
    elif args.pretrained != "none":
        vit.load_pretrained(model, args.pretrained)
    model.to(device).set_drop_path(args.drop_path)
    groups = [{"params": [], "weight_decay": args.weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or "token" in name or "pos_embed" in name  # not decayed
        groups[plain]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    first, entropy = 0, None
    if state:
        config = {k: state["config"][k] for k in ("preset", "depth", "size")}
        if config != {k: getattr(args, k) for k in config}:
            raise ValueError(f"the checkpoint to go on from has {config}; give the same settings")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(optimizer.param_groups, (args.weight_decay, 0.0)):
            group["weight_decay"] = decay
        first = state["epoch"]
        if first >= args.epochs and not args.resume:
            raise ValueError(f"{args.branch_from} is already at epoch {first}: give more than --epochs {args.epochs}")
        entropy = None if state["entropy"] is None else state["entropy"].to(device)
    if args.profile:
        return profile(model, optimizer, batches, args, coupling, device)
    data.prepare_folder(folder, args)
    config = {**{k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, type(None)))},
              "data": dataset.name, "classes": list(dataset.classes)}
    per_epoch, trained = len(batches), data.distributed(model, device)

    def save(name, epoch):
        data.write_checkpoint(folder / name, {
            "stage": "cls", "config": config, "epoch": epoch, "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "entropy": entropy.cpu() if entropy is not None else None})

    begin = time.time()
    for epoch in range(first, args.epochs):
        active = args.reactivation != "none" and epoch >= args.warmup_epochs
        batches.sampler.set_epoch(epoch)
        torch.manual_seed((args.seed * 100_003 + epoch) * data.world() + data.rank())  # drop-path; a resumed epoch repeats it
        if active and args.entropy == "static" and entropy is None:
            entropy = mean_entropy(model, batches, args, device)
        model.train()
        sums, epoch_begin = torch.zeros(2, device=device), time.time()
        for step, batch in enumerate(batches):
            done = (epoch + step / per_epoch) / args.epochs
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(done)
            batch = [part.to(device, non_blocking=True) for part in batch]
            try:
                losses = train_step(trained, optimizer, batch, args, active, coupling,
                                    entropy if args.entropy == "static" else None)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} in epoch {epoch + 1}, step {step}: stopped; the last good state is in "
                                         f"{folder}; lower --lr or look at the images of this step") from error
            sums += losses
            if step % 20 == 19:
                rate = (step + 1) * args.batch / (time.time() - epoch_begin)
                data.progress(f"step {step + 1}/{per_epoch}  losses {losses[0]:.4f} {losses[1]:.4f}  {rate:.1f} images/s")
        seconds = time.time() - epoch_begin
        cls_mean, aff_mean = (data.sum_over_all(sums) / per_epoch / data.world()).tolist()
        left = (time.time() - begin) / (epoch + 1 - first) * (args.epochs - epoch - 1)
        if epoch + 1 == args.warmup_epochs:
            save("warmup.pt", epoch + 1)
        save("last.pt", epoch + 1)
        data.log_line(folder, {"epoch": epoch + 1, "cls_loss": cls_mean, "aff_loss": aff_mean,
                               "lr": optimizer.param_groups[0]["lr"], "images/s": per_epoch * args.batch / seconds,
                               "minutes_left": left / 60, "seconds": seconds})
    if data.rank():
        return
    print(f"class mAP on val (information only, nothing is chosen by it): {validate(model, val, args, device):.1f}")
    print(f"{folder / 'last.pt'} written in {(time.time() - begin) / 60:.1f} minutes on {device}")


if __name__ == "__main__":
    main()

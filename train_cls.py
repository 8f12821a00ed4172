"""Stage 1: the classifier, first without (--warmup-epochs), then with the AReAM affinity loss.

Reads  images and image-level labels of --split, and of val for class mAP; DeiT weights
       (--pretrained), or another run's checkpoint (--branch-from).
Writes <out>/cls/{args.json, log.jsonl, last.pt, warmup.pt}; warmup.pt is the end of the warm-up,
       from which another run can start with --branch-from.
Run    python train_cls.py --data VOC2012
Expect on one core of an AMD EPYC, DeiT-Tiny, 224 px, bfloat16: 22 images/s plain, 12 with the
       AReAM loss.
"""
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import aream
import data
import model as vit
from refine import mask_arguments, mask_settings, present_classes, pseudo_label

RECIPES = {  # defaults by data set, VOC2012's for all others; what depends on them: parse_args
    "VOC2012": dict(preset="deit_small", pretrained="auto", drop_path=0.1, augment="release",
                    size=224, batch=64, epochs=60, warmup_epochs=10),
    "toy": dict(preset="toy", pretrained="none", drop_path=0.0, augment="jitter",
                size=64, batch=16, epochs=10, warmup_epochs=5,
                lr=1e-3, deep_from=2, affinity_weight=4.0),
}


# -------------------------------------------------------------------------------------------------
# One step
# -------------------------------------------------------------------------------------------------
class Guidance(NamedTuple):
    """Which layers guide which, and the entropy (L,) of --entropy static, in bits."""

    guide: range
    supervised: range
    entropy: torch.Tensor | None = None  # None: each image's own


@torch.no_grad()
def label_pass(model, pixels, precision):
    """The forward pass that labels are made from: eval mode, image and mirror image.

    pixels (B, 3, H, W) uint8 -> ViTOutput of 2 * B images.
    """
    images = data.normalise(pixels)
    model.eval()
    with data.autocast(pixels.device, precision):
        output = model(torch.cat([images, images.flip(-1)]), affinity=True)
    model.train()
    return output


@torch.no_grad()
def make_labels(output, pixels, image_labels, guidance, args):
    """The pair labels and w_hat of a batch, from a forward pass over 1 or 2 views of it.

    output: ViTOutput of V * B images; pixels (B, 3, H, W) uint8; image_labels (B, C). Returns
    pair_label (B, P, P) in {0, 1, 255}, w_hat (B, L).
    """
    B = len(pixels)
    V = len(output.cam) // B

    # re-activation weights, and the CAM that the guide layers refine
    if guidance.entropy is None:
        of_views = aream.layer_entropy(output.cam, output.affinity, image_labels.repeat(V, 1))
        entropy = of_views.view(V, B, -1).mean(0)  # (B, L)
    else:
        entropy = guidance.entropy.expand(B, -1)
    w, w_hat = aream.reactivation_weights(entropy, args.reactivation)  # each (B, L)
    guided = aream.guided_cam(output.cam, output.affinity, w.repeat(V, 1), guidance.guide)
    if V == 2:
        guided = guided[:B] + guided[B:].flip(-1)  # (B, C, gh, gw)

    # no absent class from here on; normalised at half size, where PAR works
    class_ids, present = present_classes(image_labels)
    of_image = torch.arange(B, device=guided.device)[:, None]
    cam = guided[of_image, class_ids]  # (B, K, gh, gw)
    cam = data.bilinear(cam, [side // 2 for side in pixels.shape[-2:]])
    cam = aream.normalise_cam(cam, present)

    # confident pixels, and which patches belong together
    mask = pseudo_label(pixels.float() / 255, cam, class_ids, present, **mask_settings(args))
    return aream.affinity_label(mask, output.cam.shape[-2:]), w_hat


def train_step(model, optimizer, batch, args, guidance=None):
    """One optimiser step on batch = (pixels, image_labels) -> both losses, (2,) detached.

    guidance: for a step with the AReAM loss; None: a plain one.
    """
    pixels, image_labels = batch
    active = guidance is not None
    shared = active and args.pair_labels == "shared"

    # Pair labels from a pass of their own. Its affinities go before training needs the memory.
    if active and not shared:
        views = label_pass(model, pixels, args.precision)
        pair_label, w_hat = make_labels(views, pixels, image_labels, guidance, args)
        del views

    # Forward; pair labels from this pass.
    with data.autocast(pixels.device, args.precision):
        output = model(data.normalise(pixels), affinity=shared, logits=active)
    if shared:
        pair_label, w_hat = make_labels(output, pixels, image_labels, guidance, args)

    # Classification + affinity loss.
    cls_loss = aream.classification_loss(output.class_logits.float(),
                                         output.patch_logits.float(), image_labels)
    aff_loss = torch.zeros((), device=pixels.device)
    if active:
        # Divided by the pairs of the whole batch, the processes' losses are to be summed; their
        # gradients are averaged instead, hence the factor world().
        pairs = data.sum_over_all(aream.count_pairs(pair_label))
        aff_loss = data.world() * aream.aream_loss(output.affinity_logits, pair_label, w_hat,
                                                   guidance.supervised, pairs)

    optimizer.zero_grad(set_to_none=True)
    (cls_loss + args.affinity_weight * aff_loss).backward()
    optimizer.step()
    return torch.stack([cls_loss.detach(), aff_loss.detach()])


# -------------------------------------------------------------------------------------------------
# One epoch
# -------------------------------------------------------------------------------------------------
FIRST, LAST = 0.016, 0.16  # the release begins at 1e-6 and ends at 1e-5, its --lr is 6.25e-5
RISE = 12  # the linear rise takes 1 / RISE of the training: 5 of 60 epochs


def lr_factor(progress):
    """The release's learning rate as a share of --lr; progress: share of the training, [0, 1].

    A linear rise from FIRST, whatever --warmup-epochs, then a cosine to LAST.
    """
    if progress < 1 / RISE:
        return FIRST + (1 - FIRST) * RISE * progress
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * progress))


def train_one_epoch(model, optimizer, loader, args, epoch, guidance):
    """All steps of an epoch -> its log record. UserError if a loss is not finite."""
    device = next(model.parameters()).device
    loader.sampler.set_epoch(epoch)
    data.seed_epoch(args.seed, epoch)
    model.train()
    sums, begin, steps = torch.zeros(2, device=device), time.time(), len(loader)

    for step, (pixels, image_labels) in enumerate(loader, 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_factor((epoch + (step - 1) / steps) / args.epochs)
        batch = pixels.to(device, non_blocking=True), image_labels.to(device, non_blocking=True)
        sums += train_step(model, optimizer, batch, args, guidance)

        if step % 20 == 0 or step == steps:  # not each step: looking at a loss makes a GPU wait
            data.need_finite(sums, epoch, step)
            rate = step * args.batch / (time.time() - begin)
            data.progress(f"step {step}/{steps}  losses {sums[0] / step:.4f} "
                          f"{sums[1] / step:.4f}  {rate:.1f} images/s")

    seconds = time.time() - begin
    cls_loss, aff_loss = (data.sum_over_all(sums) / steps / data.world()).tolist()
    return {"epoch": epoch + 1, "cls_loss": cls_loss, "aff_loss": aff_loss,
            "lr": optimizer.param_groups[0]["lr"], "precision": args.precision,
            "images/s": steps * args.batch / seconds, "seconds": seconds}


@torch.no_grad()
def mean_entropy(model, loader, precision, device):
    """Layer entropy averaged over the images of an epoch -> (L,) bits."""
    model.eval()
    total, count = 0, 0
    for pixels, labels in loader:
        with data.autocast(device, precision):
            output = model(data.normalise(pixels.to(device)), affinity=True)
        total = total + aream.layer_entropy(output.cam, output.affinity, labels.to(device)).sum(0)
        count += len(labels)
    model.train()
    return data.sum_over_all(total) / (count * data.world())


@torch.no_grad()
def validate(model, samples, args, device):
    """Class mAP in percent on a ClassificationSet: of both logits' sum, and of each alone.

    The class tokens, which start alike, learn slowly: the sum may hide that they are not trained.
    """
    model.eval()
    of_tokens, of_patches = [], []
    in_order = [(index, 0) for index in range(len(samples))]  # 0: there is nothing random
    loader = DataLoader(samples, args.batch, sampler=in_order, num_workers=args.workers)
    for pixels, _ in loader:
        with data.autocast(device, args.precision):
            output = model(data.normalise(pixels.to(device)))
        of_tokens.append(output.class_logits.float().cpu())
        of_patches.append(output.patch_logits.float().cpu())

    of_tokens, of_patches = torch.cat(of_tokens), torch.cat(of_patches)
    scored = {"val_class_mAP": of_tokens + of_patches, "of_class_tokens": of_tokens,
              "of_patches": of_patches}
    return {name: 100 * mean_average_precision(logits, samples.labels)
            for name, logits in scored.items()}


def mean_average_precision(logits, labels):
    """logits, labels (images, C) -> mean AP in [0, 1] over the classes that occur."""
    precisions = []
    for score, label in zip(logits.T, labels.T):
        if label.any():
            hit = label[score.argsort(descending=True)]
            precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
            precisions.append((precision * hit).sum() / hit.sum())
    return torch.stack(precisions).mean().item()


# -------------------------------------------------------------------------------------------------
# Images
# -------------------------------------------------------------------------------------------------
def erase(pixels):
    """Random erasing (p 0.25): noise in 2 to 33 % of the area, (3, H, W) uint8 in and out."""
    standard = (pixels.float() / 255 - 0.45) / 0.225  # the noise is of mean 0 and std 1
    erased = v2.RandomErasing(0.25, value="random")(standard)
    return (255 * (0.45 + 0.225 * erased)).clamp(0, 255).round().to(torch.uint8)


AUGMENTATIONS = {  # name -> transforms of a PIL image into (3, size, size) uint8
    "jitter": lambda size: [
        v2.RandomResizedCrop(size, scale=(0.3, 1)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4),
        v2.PILToTensor()],
    "release": lambda size: [
        v2.RandomResizedCrop(size, scale=(0.08, 1), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.RandAugment(1, magnitude=27)], 0.5),  # 27 of 30, as 9 of 10
        v2.RandomApply([v2.RandAugment(1, magnitude=27)], 0.5),
        v2.PILToTensor(),
        v2.Lambda(erase)],
}


class ClassificationSet(Dataset):
    """samples[index, seed] -> image (3, size, size) uint8, labels (C,).

    data.EpochSampler draws the pairs, so that a crop depends on the run's seed, the epoch and the
    index alone. augment: a name in AUGMENTATIONS; None squeezes the image.
    """

    def __init__(self, dataset, size, augment=None):
        self.dataset = dataset
        squeeze = [v2.Resize((size, size)), v2.PILToTensor()]
        self.transform = v2.Compose(AUGMENTATIONS[augment](size) if augment else squeeze)
        # read, and checked, up front
        self.labels = torch.stack([dataset.label_vector(name) for name in dataset.ids])

    def __len__(self):
        return len(self.dataset.ids)

    def __getitem__(self, key):
        index, seed = key
        image = self.dataset.image(self.dataset.ids[index])
        with data.seeded(seed):
            return self.transform(image), self.labels[index]


# -------------------------------------------------------------------------------------------------
# The stage
# -------------------------------------------------------------------------------------------------
def make_optimizer(model, args):
    """AdamW; biases, norms, tokens and position embeddings are not decayed."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "token" in name or "pos_embed" in name:
            plain.append(parameter)
        else:
            decayed.append(parameter)
    return torch.optim.AdamW([{"params": decayed, "weight_decay": args.weight_decay},
                              {"params": plain, "weight_decay": 0.0}], lr=args.lr, fused=True)


def restore(model, optimizer, args, dataset, folder):
    """Where training begins: resumed, branched, from pretrained weights or from scratch.

    Loads model and optimizer in place. Returns the first epoch, and the static entropy (L,) where
    it is averaged already.
    """
    path = folder / "last.pt"
    if not (args.resume and path.is_file()):
        path = args.branch_from
    if path is None:
        if args.pretrained != "none":
            remedy = "give the DeiT file of that size, another --preset, or --pretrained none"
            with data.given("--pretrained", remedy):
                vit.load_pretrained(model, args.pretrained)
        return 0, None

    checkpoint = data.read_checkpoint(path, "cls", dataset)
    if path == args.branch_from and checkpoint["epoch"] >= args.epochs:
        raise data.UserError(f"{path} is already at epoch {checkpoint['epoch']}: give more than "
                             f"--epochs {args.epochs}")
    if checkpoint["epoch"] < args.epochs:
        data.need_optimizer(checkpoint, path)
    config = {key: checkpoint["config"][key] for key in ("preset", "depth", "size")}
    if config != {key: getattr(args, key) for key in config}:
        raise data.UserError(f"the checkpoint to go on from has {config}; give the same settings")
    model.load_state_dict(checkpoint["model"])
    if checkpoint["epoch"] < args.epochs:
        # the moments are that run's, weight decay and the like this one's
        settings = [{key: value for key, value in group.items() if key != "params"}
                    for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, own in zip(optimizer.param_groups, settings):
            group.update(own)
    averaged = checkpoint["epoch"] > args.warmup_epochs and checkpoint["entropy"] is not None
    if args.entropy == "static" and averaged:
        return checkpoint["epoch"], checkpoint["entropy"].to(model.head.weight.device)
    return checkpoint["epoch"], None


def validation_set(args, dataset):
    """The val split, for class mAP; None, with a line that says why, where own data has none.

    It may lack the list, or image labels: masks of val are enough for stages 3 and 4.
    """
    try:
        return ClassificationSet(data.open_split(args, "val", like=dataset), args.size)
    except data.UserError as error:
        if args.data in data.DATASETS:
            raise
        data.say_once(f"no class mAP: {error}")
        return None


def describe(dataset, image_labels):
    """Print what was found, for a look at whether it was meant; image_labels (images, C)."""
    count = image_labels.sum(0).long().tolist()
    by_count = sorted(zip(count, dataset.classes))
    (fewest, rare), (most, frequent) = by_count[0], by_count[-1]
    print(f"{dataset.name} {dataset.split}: {len(image_labels)} images, {len(count)} classes, "
          f"from {rare} (in {fewest}) to {frequent} (in {most})", flush=True)


def parse_args(argv=None):
    parser = data.argument_parser(__doc__)
    data.resuming_arguments(parser)
    parser.add_argument("--download", action="store_true",
                        help="fetch and extract VOC2012 (2 GB) or COCO2014 (20 GB) first")

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=vit.PRESETS, help="default %(default)s")
    add("--depth", type=data.number(int, 1), metavar="N",
        help="use the first N blocks only (the paper studies 6, 8, 10, 12)")
    add("--pretrained", metavar="auto|none|PATH",
        help="DeiT's ImageNet-1k weights; auto: download them (default %(default)s)")
    add("--drop-path", type=data.number(float, 0, 1), metavar="P", help="default %(default)s")

    add = parser.add_argument_group("training").add_argument
    add("--split", help="default trainaug of VOC2012, else train")
    add("--branch-from", metavar="CKPT",
        help="go on from another run's checkpoint, with this run's settings")
    add("--augment", choices=AUGMENTATIONS,
        help="release: crops, RandAugment, erasing; jitter: larger crops, colour jitter (default "
             "%(default)s)")
    add("--size", type=data.number(int, 1), metavar="PX",
        help="of a training crop (default %(default)s)")
    add("--batch", type=data.number(int, 1), help="default %(default)s")
    add("--epochs", type=data.number(int, 1), help="default %(default)s")
    add("--warmup-epochs", type=data.number(int, 0), metavar="N",
        help="the first N of them are without the AReAM loss (default %(default)s)")
    add("--lr", type=data.number(float, 0), help="default 5e-4 * batch / 512; --data toy: 1e-3")
    add("--weight-decay", type=data.number(float, 0), default=0.05, metavar="D",
        help="default %(default)s")

    add = parser.add_argument_group("AReAM").add_argument
    add("--reactivation", choices=aream.REACTIVATION, default="entropy",
        help="default %(default)s; none: the plain classifier")
    add("--entropy", choices=("online", "static"), default="online",
        help="of each image in each step, or averaged once over the training crops, when the "
             "warm-up is over (release; default %(default)s)")
    add("--coupling", choices=("all", "split"), default="all",
        help="every layer guides and is supervised, or those below --deep-from guide the others "
             "(release; default %(default)s)")
    add("--deep-from", type=data.number(int, 1), metavar="L",
        help="first deep layer, 0-based (default 7 of 12 layers; --data toy: 2)")
    add("--affinity-weight", type=data.number(float, 0), metavar="W",
        help="of the AReAM loss, a mean over layers (default 0.1 with split, as the release; 0.3 "
             "with all, for as much a layer; --data toy: 4)")
    add("--pair-labels", choices=("two-views", "shared"), default="two-views",
        help="from an extra pass over image and mirror image, or from the training pass itself "
             "(default %(default)s)")
    mask_arguments(add)
    parser.set_defaults(**data.recipe(argv, RECIPES))
    args = parser.parse_args(argv)

    # what follows from other flags
    preset = vit.PRESETS[args.preset]
    depth = args.depth or preset["depth"]
    if depth == preset["depth"]:
        args.depth = None  # the same network, however it was asked for
    args.split = args.split or data.training_split(args.data)
    if args.lr is None:
        args.lr = 5e-4 * args.batch / 512
    if args.affinity_weight is None:
        args.affinity_weight = 0.1 if args.coupling == "split" else 0.3
    if args.deep_from is None:
        args.deep_from = round(7 / 12 * depth)

    # what does not go together
    if depth > preset["depth"]:
        parser.error(f"--depth {depth}: {args.preset} has {preset['depth']} blocks")
    if args.coupling == "split" and args.deep_from >= depth:
        parser.error(f"--deep-from {args.deep_from} with {depth} layers: it must leave layers on "
                     "both sides")
    if args.warmup_epochs > args.epochs:
        parser.error(f"--epochs {args.epochs} with --warmup-epochs {args.warmup_epochs} of them: "
                     "no more warm-up than that")
    if args.size % preset["patch"]:
        parser.error(f"--size {args.size}: not a multiple of the patch size {preset['patch']}")
    mask_settings(args)
    return args


def main(argv=None):
    args = parse_args(argv)
    device = data.setup(args)
    folder = args.out / "cls"

    # data
    if args.download and not data.rank():
        data.download(args.data, args.data_root)
    data.wait_for_all()
    dataset = data.open_split(args, args.split)
    samples = ClassificationSet(dataset, args.size, args.augment)
    val = validation_set(args, dataset)
    describe(dataset, samples.labels)
    loader = data.train_loader(samples, args.batch, args.seed, args.workers, device)

    # model, optimiser
    model = vit.build(args.preset, len(dataset.classes), depth=args.depth, image_size=args.size)
    guide, supervised = aream.coupled_layers(len(model.blocks), args.coupling, args.deep_from)
    model.to(device).set_drop_path(args.drop_path)
    optimizer = make_optimizer(model, args)

    # where to begin
    first, static_entropy = restore(model, optimizer, args, dataset, folder)
    made_from = {"checkpoint to branch from": [args.branch_from]} if args.branch_from else {}
    data.prepare_folder(folder, args, lambda: data.stage_settings(args, dataset, made_from))
    data.cut_log(folder, first)
    config = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    config.update(data=dataset.name, classes=list(dataset.classes))

    # train
    wrapped = data.distributed(model, device)
    begin = saved = time.time()
    for epoch in range(first, args.epochs):
        active = args.reactivation != "none" and epoch >= args.warmup_epochs
        if active and args.entropy == "static" and static_entropy is None:
            loader.sampler.set_epoch(epoch)  # the same crops in a resumed run
            static_entropy = mean_entropy(model, loader, args.precision, device)
        guidance = Guidance(guide, supervised, static_entropy) if active else None
        record = train_one_epoch(wrapped, optimizer, loader, args, epoch, guidance)
        record["minutes_left"] = record["seconds"] * (args.epochs - epoch - 1) / 60
        data.log_line(folder, record)  # before the checkpoint: --resume cuts lines beyond it
        checkpoint = {"stage": "cls", "config": config, "epoch": epoch + 1,
                      "entropy": static_entropy, "model": model.state_dict(),
                      "optimizer": optimizer.state_dict()}
        if epoch + 1 == args.warmup_epochs:
            data.write_checkpoint(folder / "warmup.pt", checkpoint)
        due = time.time() - saved >= data.SECONDS_BETWEEN_CHECKPOINTS
        if due or epoch + 1 in (args.warmup_epochs, args.epochs):
            data.write_checkpoint(folder / "last.pt", checkpoint)
            saved = time.time()

    # class mAP, for information: no checkpoint is chosen by it
    if not data.rank():
        if val is not None:
            data.log_line(folder, {**validate(model, val, args, device),
                                   "device": data.device_name(device)})
        print(f"{folder / 'last.pt'} written in {(time.time() - begin) / 60:.1f} minutes on "
              f"{device}, {args.precision}")
    data.wait_for_all()


if __name__ == "__main__":
    data.run(main)

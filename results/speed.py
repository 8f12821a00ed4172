"""What it costs: the table of speed.md, profiles.

Run    python -m results.speed table                                        (make speed)
       python -m results.speed profile --preset deit_small --batch 64 --device cuda    (make gpu)
"""
import argparse
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import aream
import data
import evaluate
import model as vit
import refine
import train_cls
import test_aream as naive  # its naive implementation: every head kept, PAR image by image

THREADS = torch.get_num_threads()


def row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def compare(*functions, repeats=5):
    """Least seconds of functions, called in turn: what is above the least is other load."""
    seconds = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, own in zip(functions, seconds):
            begin = time.perf_counter()
            function()
            own.append(time.perf_counter() - begin)
    return [min(own[1:]) for own in seconds]


def voc_like_batch(batch, size):
    """-> pixels (B, 3, size, size) uint8, labels (B, 20) with 1.5 classes an image, as in VOC."""
    smooth = F.interpolate(torch.rand(batch, 3, 9, 9), size=(size, size), mode="bilinear")
    labels = torch.zeros(batch, 20)
    labels[torch.arange(batch), torch.arange(batch) % 20] = 1
    labels[::2, 3] = 1
    return (255 * smooth).byte(), labels


def peak_memory():
    """The most memory (MiB) that this process ever had."""
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


# -------------------------------------------------------------------------------------------------
# The table
# -------------------------------------------------------------------------------------------------
def measure(kind, precision="float32", batch=16, size=224, steps=5):
    """Least seconds and extra peak MiB of a training step of DeiT-Tiny; run it by alone()."""
    torch.set_num_threads(THREADS)
    pixels, labels = voc_like_batch(batch, size)
    args = train_cls.parse_args(["--drop-path", "0"])
    args.precision = precision
    args.pair_labels = "shared" if kind == "shared" else "two-views"
    if kind == "torchvision":
        model = torchvision.models.VisionTransformer(size, 16, 12, 3, 192, 768)
    else:
        model = vit.build("deit_tiny", 1 if kind == "same size" else 20, image_size=size)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guidance = train_cls.Guidance(range(12), range(12))

    def one_step():
        if kind in ("plain", "two-views", "shared"):
            given = None if kind == "plain" else guidance
            train_cls.train_step(model, optimizer, (pixels, labels), args, given)
            return
        if kind == "naive":
            _, loss = naive.naive_step(model, pixels, labels, args, aream.coupled_layers(12))
        else:
            output = model(data.normalise(pixels))
            loss = (output if kind == "torchvision" else output.class_logits).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    before = peak_memory()
    seconds, = compare(one_step, repeats=steps)
    return seconds, peak_memory() - before


def alone(*given):
    """measure() in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *given).result()


def speed_table(folder):
    """Print the table of speed.md. folder: for files, thrown away."""
    torch.set_num_threads(THREADS)
    fast = "bfloat16" if data.native_bfloat16(torch.device("cpu")) else "float32"
    row("DeiT-Tiny, 224 px, batch 16", "naive, float32", "float32", fast, "gain")
    row(*["---"] * 5)
    plain = speed_of_steps(fast)
    theirs, ours = alone("torchvision")[0], alone("same size")[0]
    with torch.no_grad():
        speed_of_par()
        speed_of_inference(fast)
        dataset = write_photographs(folder)
        speed_of_the_sweep(dataset, folder)
        row("plain step, against torchvision's ViT (197 tokens)", f"{theirs:.2f} s",
            f"{ours:.2f} s", "", f"{theirs / ours:.1f}x")
        speed_of_loading(dataset, f"a plain step uses {16 / plain[0]:.0f}, in {fast} "
                                  f"{16 / plain[1]:.0f}")


def speed_of_steps(fast):
    """-> seconds of the plain step, in float32 and in the fast precision."""
    slow, slow_memory = alone("naive")
    plain, plain_memory = zip(alone("plain"), alone("plain", fast))
    views, views_memory = zip(alone("two-views"), alone("two-views", fast))
    shared, _ = zip(alone("shared"), alone("shared", fast))
    for what, seconds in (("AReAM training step, two views", views),
                          ("the same with `--pair-labels shared`", shared)):
        row(what, f"{slow:.2f} s", f"{seconds[0]:.2f} s", f"{seconds[1]:.2f} s",
            f"{slow / seconds[1]:.1f}x")
    more = [slow_memory - plain_memory[0], views_memory[0] - plain_memory[0],
            views_memory[1] - plain_memory[1]]
    row("its peak memory over the plain step's", *(f"{m:.0f} MiB" for m in more), "")
    return plain


def speed_of_par():
    pixels, labels = voc_like_batch(16, 224)
    images, cam = pixels / 255, torch.rand(16, 20, 112, 112) * labels[..., None, None]
    batch = list(zip(images, cam, labels))
    slow, own = compare(lambda: [naive.naive_pseudo_label(*one) for one in batch],
                        lambda: naive.pseudo_label(images, cam, labels))
    row("PAR of a batch, both thresholds", f"{slow:.2f} s", f"{own:.2f} s", "",
        f"{slow / own:.1f}x")


def speed_of_inference(fast):
    model, (_, labels) = vit.build("deit_tiny", 20).eval(), voc_like_batch(1, 8)
    pixels = torch.randint(0, 256, (3, 240, 320), dtype=torch.uint8)

    def slow():
        images = data.normalise(pixels[None])
        cam, _ = naive.naive_cam(model, images, range(12), "uniform", labels)
        small = aream.normalise_cam(data.bilinear(cam, (60, 80)), labels)[0]
        naive.naive_pseudo_label(pixels / 255, small, labels[0])

    def own(precision):
        variants = {"seed": tuple(range(12))}
        settings = refine.Refinement(precision=precision)
        cams = refine.seed_cams(model, pixels, [0, 3], variants, settings)
        refine.pseudo_mask(pixels, [0, 3], cams["seed"])

    seconds = compare(slow, lambda: own("float32"), lambda: own(fast), repeats=7)
    row("CAM and PAR inference, 320 px", *(f"{1 / s:.1f} images/s" for s in seconds),
        f"{seconds[0] / seconds[2]:.1f}x")


def write_photographs(folder):
    """A VOC of 20 photographs of 500 px, and CAM files."""
    voc = naive.make_voc(folder, [f"{i:02}" for i in range(20)], (375, 500))
    dataset = data.open_data("VOC2012", folder, "train")
    for name in dataset.ids:
        photo = Image.fromarray(naive.draw(0, (24, 32))).resize((500, 375), Image.BICUBIC)
        photo.save(voc / "JPEGImages" / f"{name}.jpg")
        data.write_cam(folder / "cam" / f"{name}.npz", [14], torch.rand(1, 94, 125), (375, 500))
    return dataset


def speed_of_the_sweep(dataset, folder):
    def slow():
        for threshold in evaluate.THRESHOLDS:
            confusion = 0
            for name in dataset.ids:
                class_ids, cam, size = data.read_cam(folder / "cam" / f"{name}.npz")
                score, winner = data.bilinear(cam[None], size)[0].max(0)
                mask = torch.where(score > threshold, data.mask_value(class_ids)[winner], 0)
                target = dataset.mask(name)
                confusion = confusion + evaluate.confusion_matrix(mask, target, 21)
            evaluate.scores(confusion)

    def own():
        evaluate.summarise(evaluate.evaluate_cams(dataset, folder / "cam"))

    slow, own = compare(slow, own, repeats=1)
    row("threshold sweep, 101 thresholds, 20 images", f"{slow:.1f} s", f"{own:.2f} s", "",
        f"{slow / own:.0f}x")


def speed_of_loading(dataset, used):
    for augment in train_cls.AUGMENTATIONS:
        samples = train_cls.ClassificationSet(dataset, 224, augment)
        seconds, = compare(lambda: [samples[i, i] for i in range(20)])
        row(f"loading, `--augment {augment}`, 500 px JPEGs, of one process", "",
            f"{20 / seconds:.0f} images/s", "", used)


# -------------------------------------------------------------------------------------------------
# Profiles
# -------------------------------------------------------------------------------------------------
def profile(step, device, images=1, steps=20):
    """Time step(), of so many images, then print its operators over five more steps."""
    cuda = device.type == "cuda"
    for _ in range(3):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - begin) / steps
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else peak_memory()
    print(f"{1e3 * seconds:.1f} ms, {images / seconds:.1f} images/s, peak {memory:.0f} MiB")

    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * cuda) as profiler:
        for _ in range(5):
            step()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40))


def profile_all(args):
    """A plain step, both AReAM steps, and stage 2."""
    device = torch.device(args.device)
    batch = [part.to(device) for part in voc_like_batch(args.batch, args.size)]
    model = vit.build(args.preset, 20, image_size=args.size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    depth = len(model.blocks)
    for kind in ("plain", "shared", "two-views"):
        settings = train_cls.parse_args([])
        settings.precision, settings.pair_labels = args.precision, kind
        guidance = train_cls.Guidance(range(depth), range(depth)) if kind != "plain" else None
        print(f"\n{kind} step, {args.preset}, {args.size} px, batch {args.batch}, {device}, "
              f"{args.precision}")
        profile(lambda: train_cls.train_step(model, optimizer, batch, settings, guidance),
                device, args.batch)
    settings = refine.parse_args(["--device", args.device])
    settings.precision, model = args.precision, model.eval()
    pixels = torch.randint(0, 256, (3, 240, 320), dtype=torch.uint8).to(device)
    print(f"\nrefine.py, a photograph of 320 px, {device}, {args.precision}")
    profile(lambda: refine.refine_image(model, pixels, [0, 3], settings)[1].cpu(), device)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "profile"))
    parser.add_argument("--preset", choices=vit.PRESETS, default="deit_tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    if args.what == "profile":
        profile_all(args)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            speed_table(Path(temporary))


if __name__ == "__main__":
    main()

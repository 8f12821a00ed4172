"""The records of a study -> tables and a chart; a study's runs -> records.

Run    python -m results.study                            results/*.json -> results/tables, voc.png
       python -m results.study gather FOLDER RECORDS      runs <question>/<row>/<seed> -> RECORDS
       python -m results.study demo PLAIN OUT             two finished runs, as README's table
"""
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np

import data
import evaluate

HERE = Path(__file__).parent
RECORDS = ("toy", "voc", "voc_h200", "avx2")
CAM_COLUMNS = ("patch map alone", "unrefined", "shallow layers", "deep layers", "all layers")
SETTINGS = ("preset", "depth", "epochs", "warmup_epochs", "lr", "batch", "augment", "precision",
            "reactivation", "entropy", "coupling", "deep_from", "affinity_weight", "pair_labels",
            "par_dilations")
GAINS = [  # what, records, the question and row of AReAM, column; the plain row is its "none"
    ("CAM, VOC train", ("voc", "avx2"), "schedule/uniform-split", "all layers"),
    ("CAM, `--rows normalised` in both", ("voc", "avx2"), "rows/uniform-split", "all layers"),
    ("the same, trained on 6,293 images", ("voc",), "trainaug-rows/uniform-split", "all layers"),
    ("DeepLab (ViT) on pseudo-masks, val", ("voc",), "trainaug-near/uniform-split-normalised",
     "DeepLab, val"),
    ("these pseudo-masks, labelled pixels", ("voc",), "trainaug-near/uniform-split-normalised",
     "labelled pixels"),
    ("these pseudo-masks, all pixels", ("voc",), "trainaug-near/uniform-split-normalised",
     "all pixels"),
    ("CAM, trained on 6,293 images", ("voc",), "trainaug/uniform-split", "all layers"),
    ("masks by classifiers of train, labelled", ("voc", "avx2"), "masks/uniform-split-normalised",
     "labelled pixels"),
    ("the same, all pixels", ("voc", "avx2"), "masks/uniform-split-normalised", "all pixels"),
    ("CAM, VOC train, on an H200", ("voc_h200",), "schedule/uniform-split", "all layers"),
    ("the same, `--rows normalised`", ("voc_h200",), "rows/uniform-split", "all layers"),
    ("CAM, the defaults", ("avx2",), "schedule/entropy-all-0.3-two-views", "all layers"),
    ("the same, `--rows normalised`", ("avx2",), "rows/entropy-all-0.3-two-views", "all layers"),
    ("the defaults, `--pair-labels shared`", ("voc", "voc_h200", "avx2"),
     "schedule/entropy-all-0.3", "all layers"),
    ("CAM, toy, affinity weight 4", ("toy",), "reactivation/uniform", "all layers"),
]


# -------------------------------------------------------------------------------------------------
# Runs -> records
# -------------------------------------------------------------------------------------------------
def gather(folder, path):
    """Collect the scores of the runs <folder>/<question>/<row>/<seed> in the file path, by line."""
    records = []
    for run in sorted({file.parent for file in Path(folder).glob("*/*/*/results.json")}):
        settings = data.read_json(run / "cls" / "args.json", "repeat the study")
        record = {"row": "/".join(run.parts[-3:-1]), "seed": run.name,
                  "settings": {key: settings.get(key) for key in SETTINGS}}
        for line in data.read_log(run / "cls"):
            if "cls_loss" in line:
                of_epoch = record.setdefault("cls_loss", {})
                of_epoch[str(line["epoch"])] = round(line["cls_loss"], 4)
            if "val_class_mAP" in line:
                record["map"] = line["val_class_mAP"]
                record["device"] = line.get("device")
        if (run / "layers.json").is_file():
            record.update(data.read_json(run / "layers.json", "delete it and repeat the study"))
        for result in data.read_json(run / "results.json", "repeat the study", list):
            if result["what"] in ("pseudo", "pred"):
                record[result["what"]] = result
        records.append(record)
    if not records:
        raise data.UserError(f"no scored <question>/<row>/<seed> under {folder}: results/toy.sh "
                             "and results/voc.sh make them")
    with data.replacing(path) as temporary:
        lines = ",\n".join(json.dumps(record) for record in records)
        temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return records


def read_records(name):
    return data.read_json(HERE / f"{name}.json", "results/toy.sh or results/voc.sh makes it", list)


# -------------------------------------------------------------------------------------------------
# Records -> tables in Markdown
# -------------------------------------------------------------------------------------------------
def table(header, rows):
    """Lines of a table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def mean_and_deviation(values, form=".1f"):
    """Mean and, of several values, standard deviation."""
    several = f" ± {np.std(values, ddof=1):{form.strip('+')}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{several}"


def cam_cell(runs, column):
    """Seed mIoU of runs at the fixed threshold, and in brackets the mean of the best ones."""
    rows = [run["table"][column] for run in runs]
    best = np.mean([row["best"] for row in rows])
    return f"{mean_and_deviation([row['fixed'] for row in rows])} ({best:.1f})"


def columns(run):
    """column -> percent, of one run's record; seeds at the fixed threshold."""
    found = {}
    if "map" in run:
        found["class mAP"] = run["map"]
    if "table" in run:
        found.update({column: run["table"][column]["fixed"] for column in CAM_COLUMNS})
    if "pseudo" in run:
        found.update({"labelled pixels": run["pseudo"]["labelled"],
                      "all pixels": run["pseudo"]["all"], "undecided": run["pseudo"]["undecided"]})
    if "pred" in run:
        found["DeepLab, val"] = run["pred"]["miou"]
    return found


def cells_of_runs(runs):
    """column -> cell of one row: mean and standard deviation over its runs."""
    cells, each = {"seeds": str(len(runs))}, [columns(run) for run in runs]
    for column in each[0]:
        if all(column in found for found in each):
            cells[column] = (cam_cell(runs, column) if column in CAM_COLUMNS
                             else mean_and_deviation([found[column] for found in each]))
    if all("table" in run for run in runs):
        correlations = [evaluate.rank_correlation(run["table"], run["measures"], "fixed")
                        for run in runs]
        cells["entropy ~ mIoU"] = mean_and_deviation(correlations, "+.2f")
    return cells


def cells_of_layers(runs):
    """layer -> cell of one row: mean mIoU of the seed refined by that layer alone, its entropy."""
    cells = {}
    for l in range(len(runs[0]["measures"]["entropy"])):
        miou = np.mean([run["table"][f"layer {l}"]["fixed"] for run in runs])
        entropy = np.mean([run["measures"]["entropy"][l] for run in runs])
        cells[f"layer {l}"] = f"{miou:.1f} ({entropy:.2f})"
    return cells


def pairs(runs, plain, column):
    """A column of runs and of the plain run of the same seed: [(plain, run)]."""
    before = {run["seed"]: columns(run) for run in plain}
    both = [(before[run["seed"]], columns(run)) for run in runs if run["seed"] in before]
    return [(base[column], after[column]) for base, after in both
            if column in after and column in base]


def cells_of_gains(runs, plain):
    """column -> mean difference, seed by seed, from the plain row ± its standard error."""
    cells = {}
    for column in columns(runs[0]):
        gains = [after - base for base, after in pairs(runs, plain, column)]
        if gains:
            cells[column] = f"{np.mean(gains):+.1f}"
        if len(gains) > 1:
            cells[column] += f" ± {np.std(gains, ddof=1) / math.sqrt(len(gains)):.1f}"
    return cells


def rows_of(records):
    """question -> row -> runs."""
    questions = {}
    for record in records:
        question, _, row = record["row"].partition("/")
        questions.setdefault(question, {}).setdefault(row, []).append(record)
    return questions


def study_tables(records):
    """Lines: tables of each question, one line per row, mean ± standard deviation over seeds.

    Then each layer's part, and the rows' differences from the row "none", ± standard error.
    """
    def lines_of(cells):  # row -> column -> cell
        header = list(dict.fromkeys(column for row in cells.values() for column in row))
        rows = [[row, *(own.get(column, "") for column in header)] for row, own in cells.items()]
        return table([question, *header], rows)

    lines = []
    for question, rows in rows_of(records).items():
        ordered = sorted(rows, key=lambda row: (row != "none", row))
        lines += ["", f"**{question}**", ""]
        lines += lines_of({row: cells_of_runs(rows[row]) for row in ordered})
        if all("table" in run for runs in rows.values() for run in runs):
            lines += ["", f"{question}: refined by one layer alone (entropy in bits)", ""]
            lines += lines_of({row: cells_of_layers(rows[row]) for row in ordered})
        if "none" in rows and len(rows) > 1:
            lines += ["", f"{question}: difference from `none`, paired by seed", ""]
            lines += lines_of({row: cells_of_gains(rows[row], rows["none"])
                               for row in ordered[1:]})
    return lines


def gain_table():
    """Lines: one comparison each, mean ± standard deviation over seeds, gains paired by seed."""
    header = ["mIoU (%)", "seeds", "made by `bash results/`…", "plain", "AReAM", "gain",
              "median, range"]
    rows = []
    for what, names, row, column in GAINS:
        question, _, own = row.partition("/")
        both = []
        for name in names:
            found = rows_of(read_records(name))[question]
            both += pairs(found[own], found["none"], column)
        plain, aream = zip(*both)
        gains = np.subtract(aream, plain)
        script = "toy.sh" if names == ("toy",) else "voc.sh"
        made_by = f"`{script} {question}/{{none,{own}}}`"  # bash makes two names of it
        spread = f"{np.median(gains):+.1f}, {min(gains):+.1f} to {max(gains):+.1f}"
        rows.append([what, str(len(gains)), made_by, mean_and_deviation(plain),
                     mean_and_deviation(aream), mean_and_deviation(gains, "+.1f"), spread])
    return table(header, rows)


def seeds_of_voc():
    """One dict each, column -> number: seeds of VOC that have both runs, the poorest CAM first.

    The losses are the plain run's training losses after 5 and 10 epochs; older records have none.
    """
    seeds = []
    for name in ("voc", "avx2", "voc_h200"):
        questions = rows_of(read_records(name))
        plain_runs = {run["seed"]: run for run in questions["schedule"]["none"]}
        for run in questions["schedule"]["uniform-split"]:
            plain = plain_runs[run["seed"]]
            losses = plain.get("cls_loss", {})
            seed = {"records": name, "seed": run["seed"], "loss, epoch 5": losses.get("5"),
                    "loss, epoch 10": losses.get("10"), "class mAP, val": plain["map"]}
            for question, rows in (("schedule", "CAM"), ("rows", "normalised rows")):
                of_seed = [other for other in questions[question]["uniform-split"]
                           if other["seed"] == run["seed"]]
                (before, after), = pairs(of_seed, questions[question]["none"], "all layers")
                seed.update({f"{rows}: plain": before, f"{rows}: AReAM": after,
                             f"{rows}: gain": after - before})
            seeds.append(seed)
    return sorted(seeds, key=lambda seed: seed["CAM: plain"])


def seed_tables():
    """Lines: every seed of VOC; over those on CPUs rank correlations, and what a choice gives."""
    def cell(column, value):
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if column.startswith("loss"):
            return f"{value:.3f}"
        return f"{value:+.1f}" if column.endswith("gain") else f"{value:.1f}"

    seeds = seeds_of_voc()
    lines = table(list(seeds[0]), [[cell(*item) for item in seed.items()] for seed in seeds])
    on_cpus = [seed for seed in seeds if seed["records"] != "voc_h200"]
    with_loss = [seed for seed in on_cpus if seed["loss, epoch 5"]]

    rows = []
    for of, x, y in ((with_loss, "loss, epoch 5", "CAM: plain"),
                     (on_cpus, "class mAP, val", "CAM: plain"),
                     (on_cpus, "CAM: plain", "CAM: gain"),
                     (on_cpus, "CAM: plain", "normalised rows: gain")):
        correlation = evaluate.spearman([seed[x] for seed in of], [seed[y] for seed in of])
        rows.append([f"{x} ~ {y}", str(len(of)), f"{correlation:+.2f}"])
    lines += ["", *table(["of the columns", "seeds on CPUs", "rank correlation"], rows)]

    rows, shown = [], ("CAM: plain", "normalised rows: AReAM")
    for several in (1, 2, 3):
        chosen = [min(group, key=lambda seed: seed["loss, epoch 5"])
                  for group in itertools.combinations(with_loss, several)]
        means = [np.mean([seed[column] for seed in chosen]) for column in shown]
        rows.append([str(several), *(f"{mean:.1f}" for mean in means)])
    title = (f"The seed of the lowest loss after 5 epochs of so many, mean over all choices from "
             f"{len(with_loss)} seeds:")
    return [*lines, "", title, "", *table(["of", *shown], rows)]


def demo_table(plain, out):
    """Lines: README's table of the demo."""
    def last(folder, what):
        remedy = f"make it with evaluate.py --what {what}"
        records = data.read_json(folder / "results.json", remedy, list)
        found = [record for record in records if record["what"] == what]
        if not found:
            raise data.UserError(f"{folder / 'results.json'} has no record of {what}: {remedy}")
        return found[-1]

    runs = [[last(folder, "layers")] for folder in (plain, out)]
    rows = [[f"CAM, {name}", *(cam_cell(run, name) for run in runs)]
            for name in ("unrefined", "shallow layers", "deep layers", "all layers")]
    pseudo, pred = last(out, "pseudo"), last(out, "pred")
    rows.append(["pseudo-masks, labelled pixels", "", f"{pseudo['labelled']:.1f}"])
    rows.append(["DeepLab, val", "", f"{pred['miou']:.1f}"])
    header = [f"mIoU (%) on {pred['data']}, at {evaluate.FIXED_THRESHOLD} (best*)",
              "plain classifier", "after AReAM"]
    return table(header, rows) + [
        "* threshold chosen with pixel labels: an upper bound, not a result from image labels"]


# -------------------------------------------------------------------------------------------------
# The chart: the paper's Figure 1, and what AReAM does to it
# -------------------------------------------------------------------------------------------------
LINES = {"plain": "schedule/none", "AReAM": "schedule/uniform-split",
         "AReAM, normalised rows": "rows/uniform-split"}


def draw_chart(path, records):
    """Seed mIoU refined by each layer alone: mean over seeds, standard deviation as a band."""
    mean, deviation, together = {}, {}, {}
    for title, row in LINES.items():
        runs = [record for record in records if record["row"] == row]
        name = f"{title} ({len(runs)} seeds)"
        miou = np.array([[run["table"][f"layer {l}"]["fixed"] for l in range(12)] for run in runs])
        mean[name], deviation[name] = miou.mean(0), miou.std(0, ddof=1)
        together[name] = np.mean([run["table"]["all layers"]["fixed"] for run in runs])
    title = "VOC train: mIoU (%) of the CAM refined by one layer (dotted: by the mean of all)"
    chart = evaluate.chart((900, 420), title, mean, together, deviation, (0, 60))
    data.write_picture(path, chart)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gather"] and len(argv) == 3:
        print(*study_tables(gather(*argv[1:])), sep="\n")
    elif argv[:1] == ["demo"] and len(argv) == 3:
        print(*demo_table(*map(Path, argv[1:])), sep="\n")
    elif not argv:
        for name in RECORDS:
            text = "\n".join(study_tables(read_records(name))).strip() + "\n"
            (HERE / "tables" / f"{name}.md").write_text(text, encoding="utf-8")
        text = "\n".join(gain_table()) + "\n"
        (HERE / "tables" / "gains.md").write_text(text, encoding="utf-8")
        text = "\n".join(seed_tables()) + "\n"
        (HERE / "tables" / "seeds.md").write_text(text, encoding="utf-8")
        draw_chart(HERE / "voc.png", read_records("voc"))
    else:
        raise data.UserError(f"unknown arguments {' '.join(argv)}\n{__doc__}")


if __name__ == "__main__":
    data.run(main)

#!/usr/bin/env bash
# The models of a run in 16 bits, without optimiser and paths:  bash results/release.sh runs/<run> models/<name>
set -eu
"${PYTHON:-.venv/bin/python}" - "$1" "$2" <<'END'
import sys
from pathlib import Path

import data
import torch

PATHS = ("data_root", "pretrained", "branch_from", "out")
run, model = map(Path, sys.argv[1:])
for stage in ("cls", "seg"):
    checkpoint = data.read_checkpoint(run / stage / "last.pt", stage)
    del checkpoint["optimizer"]
    config = checkpoint["config"]
    for settings in (config, config.get("classifier") or {}):
        for path in PATHS:
            settings.pop(path, None)
    for name, weight in checkpoint["model"].items():
        if weight.is_floating_point():
            checkpoint["model"][name] = weight.half()
    data.write_checkpoint(model / stage / "last.pt", checkpoint)
END

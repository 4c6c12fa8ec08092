"""How long until the first step is done: bench/results/first.json.

    python bench/first.py OUT [--tiny]

W1 in processes of their own, the second with what the first one has compiled: seconds until the model is there (imports
and its loading), from then to the end of the first step (compiling, the rehearsal, captures and the step), and of that
step alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import our_run, random_model, write
from w1 import our_config, sizes

from shoestring.run import preflight as budgets


def one(started: float, tiny: bool) -> None:
    loaded: list[float] = []
    load = budgets.loaded

    def timed(*values: Any, **named: Any) -> Any:
        policy = load(*values, **named)
        loaded.append(time.time())
        return policy

    budgets.loaded = timed
    reports = our_run(our_config({}, 0, tiny), [sizes(tiny)[0]] * 16)
    ended = time.time()
    figures = {"model_there_s": loaded[0] - started, "then_to_first_step_s": ended - loaded[0]}
    print(json.dumps(figures | {"first_step_s": sum(reports[0].seconds.values())}))


def main(out: str, tiny: bool) -> None:
    random_model("tiny" if tiny else "qwen2-1.5b")
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for setting in ("nothing compiled", "compiled before"):
            words = [sys.executable, __file__, "--one", str(time.time()), *["--tiny"] * tiny]
            told = subprocess.run(
                words, env=os.environ | {"TRITON_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append({"system": "shoestring", "setting": setting} | json.loads(told.stdout.splitlines()[-1]))
            write(out, "first", rows)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        one(float(sys.argv[2]), "--tiny" in sys.argv)
    else:
        main(sys.argv[1], "--tiny" in sys.argv)

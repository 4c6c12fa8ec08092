"""How long until the first step is done: bench/results/first.json.

    python bench/first.py OUT [--tiny]

W1 in processes of their own, the second with what the first one has compiled: seconds from the start of `train` to the
end of its first step (the model's loading, the rehearsal and captures are in it), and of that first step alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from common import our_run, random_model, write
from w1 import our_config, sizes


def one(tiny: bool) -> None:
    started = time.perf_counter()
    reports = our_run(our_config({}, 0, tiny), [sizes(tiny)[0]] * 16)
    whole = time.perf_counter() - started
    print(json.dumps({"until_first_step_s": whole, "first_step_s": sum(reports[0].seconds.values())}))


def main(out: str, tiny: bool) -> None:
    random_model("tiny" if tiny else "qwen2-1.5b")
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for setting in ("nothing compiled", "compiled before"):
            words = [sys.executable, __file__, "--one", *["--tiny"] * tiny]
            told = subprocess.run(
                words, env=os.environ | {"TRITON_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append({"system": "shoestring", "setting": setting} | json.loads(told.stdout.splitlines()[-1]))
            write(out, "first", rows)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        one("--tiny" in sys.argv)
    else:
        main(sys.argv[1], "--tiny" in sys.argv)

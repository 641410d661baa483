"""Which learning rate does each family like? The sweep behind the defaults, on validation text only.

    python benchmarks/learning_rate_sweep.py --models bdh,gpt2,llama,mamba --rates 1e-3,2e-3,4e-3,8e-3 --train-bytes 524288

Each line of the CSV on stdout is one training: model, rate, seed, bytes, bits per byte on validation pieces, seconds. A best rate on the
edge of the grid asks for a wider grid. Seeds of the sweep are not those of any comparison (1000 and up).
"""

from __future__ import annotations

import argparse
import csv
import sys

from bdh_bench.measure.host import environment
from bdh_bench.runner.training import train_model
from bdh_bench.spec import RunSpec, parse_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="bdh,gpt2,llama,mamba")
    parser.add_argument("--rates", default="1e-3,2e-3,4e-3,8e-3")
    parser.add_argument("--train-bytes", type=int, default=524_288)
    parser.add_argument("--train-context", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--data", default="stdlib")
    arguments = parser.parse_args()
    facts = environment()
    versions = " ".join(f"{name} {value}" for name, value in facts["versions"].items())
    print(f"# {facts['cpu']}, {facts['cores']} cores, Python {facts['python']}, {versions}", file=sys.stdout)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["model", "parameters", "learning_rate", "seed", "bytes", "validation_bits_per_byte", "seconds"])
    for model in parse_models(arguments.models):
        for rate in map(float, arguments.rates.split(",")):
            spec = RunSpec(
                (str(model),),
                ("long_ppl",),
                data=arguments.data,
                train_bytes=arguments.train_bytes,
                train_context=arguments.train_context,
                seeds=(arguments.seed,),
                learning_rate=rate,
            )
            done = train_model(spec, lambda phase, share, progress: None)
            bits, seconds = done["validation_bits_per_byte"], done["seconds"]
            writer.writerow([model, done["parameters"], rate, arguments.seed, done["bytes"], bits, seconds])
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Many seeds of the protocol simulation: how fast they run, and the first that fails.

python benchmarks/protocol_seeds.py [--seeds 20000] [--from 0]
python benchmarks/protocol_seeds.py --plant        which seed finds each planted bug
python benchmarks/protocol_seeds.py --replay 17    one history, step by step
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "simulation"))

from protocol_plants import LIMIT, PLANTS, find
from protocol_sim import STEPS, Simulation

PROGRESS_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each history, faults on")
    parser.add_argument("--plant", action="store_true", help="run the planted bugs instead")
    parser.add_argument("--replay", type=int, metavar="SEED", help="print one history")
    options = parser.parse_args()
    if options.replay is not None:
        Simulation(options.replay, options.steps, trace=print).run()
        return 0
    return plants() if options.plant else seeds(options.first, options.seeds, options.steps)


def seeds(first: int, count: int, steps: int) -> int:
    gc.set_threshold(200_000)  # histories leave few cycles behind, and looking for them takes time
    started = told = time.monotonic()
    seen: Counter[str] = Counter()
    for done in range(count):
        try:
            seen += Simulation(first + done, steps).run().tally()
        except Exception as error:
            print(f"FAILED after {done} seeds: {error!r}")
            print(f"replay: python {sys.argv[0]} --replay {first + done} --steps {steps}")
            return 1
        if (now := time.monotonic()) - told >= PROGRESS_S:
            told = now
            print(f"{done + 1} of {count} seeds, {(done + 1) / (now - started):.0f}/s", flush=True)
    seconds, on_core = time.monotonic() - started, time.process_time()
    print(f"{count} seeds clean in {seconds:.1f} s, {on_core:.1f} s of one core")
    for what, times in sorted(seen.items(), key=lambda item: -item[1]):
        print(f"{times:9d}  {what}")
    return 0


def plants() -> int:
    missed = 0
    for plant in PLANTS:
        started = time.monotonic()
        found = find(plant)
        missed += found is None
        said = found or f"NOT FOUND in {LIMIT} seeds"
        print(f"{plant.__name__:32} {time.monotonic() - started:5.1f} s  {said}", flush=True)
    print(f"{len(PLANTS) - missed} of {len(PLANTS)} planted bugs found")
    return missed


if __name__ == "__main__":
    sys.exit(main())

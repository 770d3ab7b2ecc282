"""Searches a row's values for each category by Ray Tune, on validation alone: python -m jobs.comparison.search."""

import functools
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from deepskip import files
from jobs.comparison import grid as results
from jobs.comparison.cell import Cell, train
from jobs.comparison.profile import hardware
from jobs.comparison.rows import SEARCHED, Grid, bf16, device_of, faults_of, in_category, with_values
from jobs.comparison.samples import digest_of, load
from jobs.settings import parse_settings, stop
from jobs.training.allocation import own_ray

# scales, not shares: twice as much is as far as half as much
LOGARITHMIC = ("beta", "learning_rate", "weight_decay")
# of random values; trainings have the grid's seeds
SEED = 0
# a trial is not stopped before this share of its steps, and of those that reach it the better half goes on to twice as many
GRACE, HALVING = 4, 2


@dataclass
class Search(Grid):
    """What is searched for; the settings of the comparison's grid hold for it too."""

    network: str = "deepskip"
    """row of `networks` that is searched for"""
    space: dict[str, list[float]] = field(default_factory=lambda: {"alpha": [0.3, 0.9], "beta": [0.3, 3.0]})
    """lowest and highest value of each; beta, learning_rate and weight_decay are drawn by their logarithm"""
    trials: int = 16
    """trainings a category; the first has the row's own values"""


def read_search(argv: list[str]) -> Search:
    """Reads the search from --config and the command line; bad input ends the program, --help too."""
    description = "Searches a row's values for each category by Ray Tune on validation; see docs/compare.md."
    search = parse_settings("comparison.search", description, Search, argv)
    if faults := [*faults_of(search), *faults_of_space(search)]:
        stop("\n".join(faults))
    return search


def faults_of_space(search: Search) -> list[str]:
    """Lists what cannot be searched for."""
    faults = []
    if search.trials < 1:
        faults.append(f"trials is {search.trials}; it must be 1 or more")
    if search.network not in search.networks:
        faults.append(f"network: there is no {search.network!r}; the grid has {', '.join(search.networks)}")
    if not search.space:
        faults.append("space is empty; a search needs one or more values to look for")
    for key, ends in search.space.items():
        least = 0 if key not in LOGARITHMIC else sys.float_info.min
        most = 1 if key not in LOGARITHMIC else sys.float_info.max
        if key not in SEARCHED:
            faults.append(f"space has {key}; it may have {', '.join(SEARCHED)}")
        elif len(ends) != 2 or not least <= ends[0] < ends[1] <= most:
            allowed = "above 0" if key in LOGARITHMIC else "0 to 1"
            faults.append(f"space.{key} is {ends}; it must be [lowest, highest], both {allowed}")
    return faults


def trial(values: dict[str, float], search: Search, category: str) -> None:
    """Trains with some values and reports the best validation IoU so far after each validation."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // search.workers))
    row = with_values(in_category(search.networks[search.network], category), values)
    cell = Cell(
        category, search.network, min(search.seeds), search.steps, search.batch_size, search.validations, bf16(search)
    )
    data = load(Path(search.data) / f"{category}.npz", device_of(search.device))
    train(row, data, cell, lambda step, iou: tune.report({"step": step, "iou": iou}))


def identity(search: Search, category: str) -> str:
    """Names a search by all that its result depends on."""
    row = in_category(search.networks[search.network], category)
    what = [asdict(row), search.space, search.trials, min(search.seeds), search.steps, search.batch_size]
    what += [search.validations, bf16(search), digest_of(Path(search.data) / f"{category}.npz")]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def own_values(search: Search, category: str) -> dict[str, float]:
    """Gives the row's own values of what is searched for."""
    row = in_category(search.networks[search.network], category)
    return {key: getattr(row, key) for key in search.space}


def tuner_of(search: Search, category: str, folder: Path) -> tune.Tuner:
    """Makes a category's search, or takes it up where it was cut off."""
    gpus = 0.0 if search.device == "cpu" else ray.cluster_resources().get("GPU", 0.0)
    run = functools.partial(trial, search=search, category=category)
    trainable = tune.with_resources(run, {"cpu": 1, "gpu": min(1.0, gpus / search.workers)})
    if tune.Tuner.can_restore(str(folder)):
        return tune.Tuner.restore(str(folder), trainable, restart_errored=True)
    space = {
        key: (tune.loguniform if key in LOGARITHMIC else tune.uniform)(*ends) for key, ends in search.space.items()
    }
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="iou",
            mode="max",
            num_samples=search.trials,
            search_alg=BasicVariantGenerator(
                points_to_evaluate=[own_values(search, category)], max_concurrent=search.workers, random_state=SEED
            ),
            scheduler=ASHAScheduler(
                time_attr="step",
                max_t=search.steps,
                grace_period=max(1, search.steps // GRACE),
                reduction_factor=HALVING,
            ),
        ),
        run_config=tune.RunConfig(name=folder.name, storage_path=str(folder.parent), verbose=0),
    )


def search_category(search: Search, category: str, folder: Path) -> dict[str, Any]:
    """Searches for a category's values; gives the best ones with every trial, raises RuntimeError where all failed."""
    found = tuner_of(search, category, folder).fit()
    trials: list[dict[str, Any]] = [
        {"values": {key: each.config[key] for key in search.space}}
        | {"iou": each.metrics["iou"], "steps": each.metrics["step"]}
        | ({"error": " ".join(str(each.error).split())[:500]} if each.error else {})
        for each in found
        if each.config and each.metrics and "iou" in each.metrics
    ]
    whole = [each for each in trials if "error" not in each]
    if not whole:
        reasons = [str(error).strip().splitlines()[-1] for error in found.errors]
        raise RuntimeError(
            f"{category}: all {search.trials} trials failed; {reasons[0] if reasons else 'none reported'}"
        )
    best = max(whole, key=lambda each: each["iou"])
    return {"category": category, "network": search.network, "space": search.space, "steps": search.steps} | {
        "best": best,
        "before": next((each for each in whole if each["values"] == own_values(search, category)), None),
        "trials": trials,
        "hardware": hardware(device_of(search.device)),
        "precision": "bf16" if bf16(search) else "fp32",
    }


def main(argv: list[str] | None = None) -> None:
    """Searches category by category, or goes on with it; prints what to put under the row in the config."""
    search = read_search(sys.argv[1:] if argv is None else argv)
    search = replace(search, out=str(Path(search.out).absolute()), data=str(Path(search.data).absolute()))
    # its table of trials and an advertisement
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    chosen: dict[str, dict[str, float]] = {}
    for category in search.categories:
        folder = Path(search.out) / "search" / category / f"{search.network}-{identity(search, category)}"
        record = results.read(folder.with_suffix(".json"))
        if record is None:
            if not ray.is_initialized():
                ray.init(**own_ray(), log_to_driver=False)
            try:
                record = search_category(search, category, folder)
            except RuntimeError as error:
                stop(str(error))
            files.write(folder.with_suffix(".json"), json.dumps(record, indent=1).encode())
        best, before = record["best"], record["before"]
        first = f"{before['iou']:.3f}" if before else "none, as the row's own values failed,"
        found = {key: float(f"{value:.3g}") for key, value in best["values"].items()}
        # what the row states there already stays
        chosen[category] = search.networks[search.network].by_category.get(category, {}) | found
        print(f"{category}: validation IoU {first} -> {best['iou']:.3f} with {found}", flush=True)
    print(yaml.safe_dump({"by_category": chosen}, default_flow_style=None, sort_keys=False), end="")


if __name__ == "__main__":
    main()

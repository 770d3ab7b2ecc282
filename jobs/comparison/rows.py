"""What the comparison's grid is made of: networks with the way each is trained, categories, seeds and steps."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from deepskip import DeepSkipUNet
from deepskip.network import LARGEST_ENLARGE, PRIOR_LOGIT
from deepskip.networks import RIVALS
from deepskip.networks import build as build_rival
from deepskip.networks.enlarged import Enlarged
from jobs.settings import parse_settings, stop

OURS = "deepskip"
# what python -m jobs.comparison.search looks for, and a row may state category by category
SEARCHED = (
    "alpha",
    "beta",
    "learning_rate",
    "momentum",
    "weight_decay",
    "ema_decay",
    "foreground_crops",
    "copy_paste",
)
# what else a row may
BY_CATEGORY = (*SEARCHED, "enlarge")
# all that makes two trainings of two networks alike
TRAINING = ("loss", "optimizer", *SEARCHED, "deep_supervision", "enlarge", "test_flips", "threshold", "by_category")


@dataclass
class Row:
    """A network and how it is trained: a row of the tables."""

    label: str
    """its name in tables and figures"""
    group: Literal["ours", "ablation", "rival", "tuning"]
    """where it stands on the page"""
    network: str = OURS
    """"deepskip", or a name in deepskip.networks.RIVALS"""
    size: Literal["default", "paper"] = "default"
    """a rival's widths: its authors' or library's, or those of the paper's parameter count"""
    paper_parameters: float | None = None
    """what the paper counts for it"""
    widths: dict[str, Any] = field(default_factory=dict)
    """arguments of DeepSkipUNet, or single widths of a rival"""
    head: Literal["drawn", "prior"] = "drawn"
    """prior: its last convolution starts at DeepSkip's foreground probability, 0.1; drawn: as the network's code has it"""
    enlarge: int = 1
    """times that images are enlarged before the network, 1 to 4; logits are averaged back"""
    loss: Literal["cross_entropy", "bce_dice", "own"] = "cross_entropy"
    """own: the network's (Mask R-CNN)"""
    alpha: float = 0.5
    """of bce_dice: weight of foreground in BCE"""
    beta: float = 1.0
    """of bce_dice: weight of BCE beside Dice"""
    optimizer: Literal["muon", "adamw"] = "adamw"
    """Muon takes the convolutions, Adam the rest"""
    learning_rate: float = 1e-3
    """peak, after a warm-up over a twentieth of the steps; a cosine follows"""
    momentum: float = 0.95
    """of muon"""
    weight_decay: float = 0.01
    """of weights, not of norms and biases"""
    ema_decay: float = 0.0
    """of the moving average of the weights that is validated and tested; 0 takes the weights themselves"""
    deep_supervision: float = 0.0
    """weight of the loss of heads on the lower decoder levels, while training; deepskip only"""
    foreground_crops: float = 0.0
    """share of training samples that show a foreground pixel and its surroundings, up to twice as large"""
    copy_paste: float = 0.0
    """share of training samples that get another's objects laid on"""
    test_flips: bool = False
    """average the probabilities of an image and its mirrorings"""
    threshold: float | None = None
    """of probability; null takes the best on validation"""
    seeds: int | None = None
    """only the first so many seeds; null takes all"""
    by_category: dict[str, dict[str, int | float]] = field(default_factory=dict)
    """values that differ in a category, as python -m jobs.comparison.search prints them"""
    turn: int = 0
    """rows of a later turn come after all cells of the earlier ones"""


@dataclass
class Grid:
    """The whole comparison; a cell is a network, a category and a seed."""

    networks: dict[str, Row]
    """rows by name"""
    categories: list[str] = field(default_factory=lambda: ["coins"])
    """files of `data`, by stem"""
    data: str = "data/comparison"
    """folder that jobs.comparison.data made"""
    out: str = "runs/comparison"
    """folder of the results; cells that are there are not done again"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """of weights, order and augmentation"""
    steps: int = 400
    """training steps of every cell"""
    batch_size: int = 8
    """samples a step"""
    validations: int = 8
    """validations of a cell, and one at its end where the steps do not divide; the best by IoU is tested"""
    only: list[str] | None = None
    """networks to do; null does all"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of convolutions; auto takes bf16 on a GPU, fp32 on a processor, where bf16 pays with AVX-512 BF16 or AMX"""
    workers: int = 1
    """processes, which share the GPU"""
    ray: bool | None = None
    """cells as Ray tasks under an MLflow run; false takes plain processes; null takes Ray where it is installed"""
    budget_seconds: float | None = None
    """no cell is begun that would not end within it, and what runs then is given up"""
    pictures: bool = True
    """keep the images of the prediction panels; jobs.comparison.pictures adds them later, where results must be small"""
    profile_only: bool = False
    """only measure each network's size and speed on a few steps"""
    experiment: str = "deepskip-comparison"
    """MLflow experiment, with ray"""
    tracking_uri: str | None = None
    """MLflow tracking server, with ray; null takes MLFLOW_TRACKING_URI, else sqlite in `out`"""


def device_of(name: str) -> torch.device:
    """Gives the device that "auto", "cpu" or "cuda" means here."""
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def bf16(grid: Grid) -> bool:
    """Tells whether a grid's cells compute their convolutions in bfloat16."""
    return grid.precision == "bf16" or (grid.precision == "auto" and device_of(grid.device).type == "cuda")


def read_grid(argv: list[str]) -> Grid:
    """Reads the grid from --config and the command line; bad input ends the program, --help too."""
    description = "Trains and tests every network on every category with every seed; see docs/compare.md."
    grid = parse_settings("compare", description, Grid, argv)
    if faults := faults_of(grid):
        stop("\n".join(faults))
    return grid


def faults_of(grid: Grid) -> list[str]:
    """Lists what cannot be: unknown networks and categories, values out of range."""
    faults = []
    for key, least in (("steps", 1), ("batch_size", 1), ("validations", 1), ("workers", 1)):
        if getattr(grid, key) < least:
            faults.append(f"{key} is {getattr(grid, key)}; it must be {least} or more")
    for key in ("networks", "categories", "seeds"):
        if not getattr(grid, key):
            faults.append(f"{key} is empty; a comparison needs one or more")
    for category in grid.categories:
        if not (path := Path(grid.data) / f"{category}.npz").is_file():
            faults.append(f"category {category}: there is no {path}; python -m jobs.comparison.data makes it")
    for name in set(grid.only or ()) - set(grid.networks):
        faults.append(f"only: there is no network {name!r}; the grid has {', '.join(grid.networks)}")
    for name, row in grid.networks.items():
        if row.network != OURS and row.network not in RIVALS:
            faults.append(f"networks.{name}.network is {row.network!r}; it must be {OURS}, {', '.join(RIVALS)}")
        elif row.network != OURS and row.deep_supervision:
            faults.append(f"networks.{name}: deep_supervision is for network {OURS} only")
        if row.network == "mask_rcnn" and row.optimizer == "muon":
            faults.append(f"networks.{name}: muon is for networks of one head, and mask_rcnn has several")
        if row.network == "mask_rcnn" and row.head == "prior":
            faults.append(f"networks.{name}: head: prior is for networks whose last convolution gives the logits")
        if (row.loss == "own") != (row.network == "mask_rcnn"):
            faults.append(f"networks.{name}.loss is {row.loss}; mask_rcnn has its own, and no other has one")
        for where, one in forms(name, row):
            if not isinstance(one.enlarge, int) or not 1 <= one.enlarge <= LARGEST_ENLARGE:
                faults.append(f"{where}.enlarge is {one.enlarge}; it must be 1 to {LARGEST_ENLARGE}, a whole number")
            elif row.network == "mask_rcnn" and one.enlarge > 1:
                faults.append(f"{where}.enlarge is for networks that give logits while they train; mask_rcnn does not")
            for key in ("alpha", "momentum", "foreground_crops", "copy_paste", "ema_decay", "threshold"):
                if (value := getattr(one, key)) is not None and not 0 <= value <= 1:
                    faults.append(f"{where}.{key} is {value}; it must be 0 to 1")
        for category, values in row.by_category.items():
            for key in values.keys() - set(BY_CATEGORY):
                faults.append(f"networks.{name}.by_category.{category} has {key}; it may have {', '.join(BY_CATEGORY)}")
    return faults


def forms(name: str, row: Row) -> Iterator[tuple[str, Row]]:
    """Gives a row and, with the name of its place, what it is in each category that it states values for."""
    yield f"networks.{name}", row
    for category, values in row.by_category.items():
        known = {key: value for key, value in values.items() if key in BY_CATEGORY}
        yield f"networks.{name}.by_category.{category}", with_values(row, known)


def in_category(row: Row, category: str) -> Row:
    """Gives a row with the values that it states for a category."""
    return with_values(row, row.by_category.get(category, {}))


def trained_as(row: Row, category: str) -> dict[str, Any]:
    """Gives all of a row that a cell's result depends on, as JSON has it."""
    values = asdict(in_category(row, category))
    for key in ("label", "group", "paper_parameters", "seeds", "turn", "by_category"):
        del values[key]
    return json.loads(json.dumps(values))


def described(row: Row) -> dict[str, Any]:
    """Gives what networks.json says of a row beside what is measured of it."""
    place = {
        "label": row.label,
        "group": row.group,
        "form": row.size if row.group == "rival" else None,
        "paper_parameters": row.paper_parameters,
    }
    return place | {"prior": row.network == OURS or row.head == "prior"} | {key: getattr(row, key) for key in TRAINING}


def with_values(row: Row, values: Mapping[str, Any]) -> Row:
    """Gives a row with other values of what may be searched for."""
    return replace(row, **values)


def build(row: Row, bands: int, seed: int) -> nn.Module:
    """Builds a row's network for binary masks, its weights drawn from the seed."""
    torch.manual_seed(seed)
    if row.network == OURS:
        network: nn.Module = DeepSkipUNet(bands, 1, enlarge=row.enlarge, **row.widths)
    else:
        network = build_rival(row.network, bands, 1, row.size, **row.widths)
        if row.enlarge > 1:
            network = Enlarged(network, row.enlarge)
    if row.head == "prior":
        start_at_prior(network)
    return network


def start_at_prior(network: nn.Module) -> None:
    """Sets the bias of a network's last convolution to the logit that DeepSkip's starts at.

    DeepSkip's own weights there become those that PyTorch draws: its small ones are for Muon, and AdamW takes long to
    get away from them (docs/compare.md).
    """
    head = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)) and m.out_channels == 1][-1]
    assert head.bias is not None
    if isinstance(network, DeepSkipUNet):
        head.reset_parameters()
    nn.init.constant_(head.bias, PRIOR_LOGIT)

"""Every setting of a training, with its unit and default; jsonargparse reads them from YAML and the command line."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ModelConfig:
    """The network: DeepSkip (the paper's eq. 1), or any other."""

    network: str = "deepskip"
    """deepskip, plain_unet (the same without deep skips), unet, fcn, pspnet, h_dense_unet, unet3plus, nnunet, mask_rcnn,
    smp:ARCH:ENCODER (segmentation_models_pytorch), or one that an installed package adds (docs/networks.md)"""
    options: dict[str, Any] = field(default_factory=dict)
    """what a network other than DeepSkip is told: {size: paper}, or widths of its own; DeepSkip has what follows"""
    base_channels: int = 8
    """channels of the first level, b; level u has b * 2^(u-1)"""
    levels: int = 5
    """depth, B, 3 to 6; the lowest level works at 1 / 2^(B-1) of the input's height and width"""
    encoder: Literal["vgg16", "resnet34"] = "vgg16"
    """encoder family: two convolutions a level, or ResNet-34's basic blocks"""
    norm: Literal["batch", "instance-batch", "group"] = "batch"
    """normalisation; "instance-batch" is half instance, half batch norm, "group" gives the same on any number of workers"""
    upsample: Literal["bilinear", "nearest"] = "bilinear"
    """how deeper maps are brought to a level's size"""
    enlarge: int = 1
    """times that images are enlarged before the network, 1 to 4, for objects of few pixels; costs its square in time, memory"""
    in_channels: int | None = None
    """bands of the input; null takes them from the shards"""
    num_classes: int | None = None
    """1 for binary, else exclusive classes with 0 as background; null takes them from the shards"""


@dataclass
class LossConfig:
    """Weighted BCE + Dice over the global batch (eqs. 5 to 8)."""

    alpha: float = 0.5
    """weight of foreground pixels in BCE, 0 to 1; background gets 1 - alpha"""
    beta: float = 1.0
    """weight of BCE beside Dice"""
    eps: float = 1.0
    """smoothing of Dice, in pixels"""
    class_weights: list[float] | None = None
    """weight of each class in Dice, made to sum to 1; null weighs them equally"""


@dataclass
class DataConfig:
    """Where samples come from and how they are cut."""

    path: str = "data/coins"
    """folder or URL (s3://, gs://, http://) that holds train/ and val/, each with an index.json"""
    builtin: Literal["coins"] | None = None
    """built-in data to pack into `path` where no shards are there"""
    crop: int = 128
    """height and width of training crops, pixels; smaller images are padded"""
    foreground_crops: float = 0.5
    """share of training crops laid around a foreground pixel, 0 to 1"""
    copy_paste: float = 0.0
    """share of training crops that another sample of their shard is drawn for, whose objects are laid on, 0 to 1"""
    normalize: Literal["image", "dataset", "none"] = "image"
    """to mean 0, deviation 1 in each band: by each image's own statistics, or by the training set's"""
    shuffle_window: int = 16
    """shards that are shuffled together; a reader has so many open, and twice as many in its cache"""
    on_bad_sample: Literal["error", "skip"] = "error"
    """a sample that cannot be used ends the training, or is left out and listed in bad_samples.jsonl"""
    loader_workers: int | None = None
    """decoding processes beside each training worker; 0 decodes in the training process, null takes 0, with a GPU 4"""
    cache_dir: str = "~/.cache/deepskip"
    """folder on each machine for copies of remote shards, shared by its workers"""
    cache_gb: float = 50.0
    """size of all copies together, gigabytes; the least recently used go first"""


@dataclass
class AugmentConfig:
    """Random changes of training crops; a function of (seed, epoch, sample), so of no worker layout."""

    flip: bool = True
    """mirror left-right and up-down, each with probability 0.5"""
    rotate90: bool = True
    """turn by a random multiple of 90 degrees"""
    rotate: float = 0.0
    """turn by up to this many degrees either way"""
    scale: float = 0.0
    """enlarge or shrink by up to this share: 0.2 means 0.8 to 1.25"""
    brightness: float = 0.0
    """shift all bands by up to this many standard deviations"""
    contrast: float = 0.0
    """multiply all bands by 1 - c to 1 + c"""
    band_shift: float = 0.0
    """shift each band on its own by up to this many standard deviations"""
    noise: float = 0.0
    """standard deviation of added Gaussian noise, in the image's standard deviations"""


@dataclass
class OptimConfig:
    """Muon or AdamW with linear warm-up and cosine decay, counted in steps."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon moves convolutions by orthogonalised momentum and the rest by Adam"""

    steps: int = 600
    """optimizer steps of the whole training"""
    global_batch_size: int = 8
    """samples in one step over all workers; which and how they are augmented does not depend on how many workers share it"""
    learning_rate: float = 4e-3
    """peak learning rate, of Adam; Muon's steps are five times that"""
    momentum: float = 0.95
    """Muon's: it looks back some 1 / (1 - momentum) steps, which is long where there are few"""
    warmup_steps: int = 50
    """steps of linear warm-up"""
    final_learning_rate: float = 0.01
    """share of the peak that the cosine ends at"""
    weight_decay: float = 0.1
    """decoupled weight decay of convolution weights"""
    clip_norm: float = 1.0
    """largest norm of the gradient; 0 does not clip"""
    ema_decay: float = 0.98
    """decay a step of the moving average of the weights that is validated and kept; 0 keeps the weights themselves"""


@dataclass
class RunConfig:
    """The run: its name, where it is stored, how often it looks up."""

    name: str | None = None
    """name of the run and of its folder; null takes the config file's name, numbered on when that one is finished"""
    storage: str = "runs"
    """folder of all runs; every worker must see it under this path"""
    seed: int = 0
    """seed of the weights, of the order of samples and of the augmentation"""
    log_every: int = 10
    """steps between logged training metrics"""
    validate_every: int = 100
    """steps between validations"""
    checkpoint_every: int = 100
    """steps between checkpoints"""
    keep_checkpoints: int = 2
    """newest checkpoints that stay, beside the best"""
    patience: int = 0
    """validations without a better IoU after which the training ends; 0 trains to the last step"""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """operators: auto takes Triton's on GPUs that can run them, on CPUs forms for CPUs, else plain PyTorch's"""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """torch.compile of the training step's network by this mode; the last two replay it as CUDA graphs. Crops have one size, so
    it is compiled once; validation runs as it is where ema_decay is not 0"""
    panels: int = 8
    """validation images in the prediction panel"""
    experiment: str = "deepskip"
    """MLflow experiment"""
    tracking_uri: str | None = None
    """MLflow tracking server; null takes MLFLOW_TRACKING_URI, else sqlite in `storage`; none does not track"""


@dataclass
class ClusterConfig:
    """What Ray gives to the training."""

    workers: int | tuple[int, int] | None = None
    """training processes, or [fewest, most]: goes on with fewer where machines are lost and takes new ones; null takes one
    a GPU, or 2 where there is no GPU (1 on a single core)"""
    cpus_per_worker: float | None = None
    """CPU cores of each worker; null takes 1, and with --local all of this machine's, shared among its ranks"""
    gpu: bool | None = None
    """one GPU a worker; null uses GPUs where the cluster has any"""
    wait_seconds: float = 20.0
    """how long to wait for the cluster to have what was asked for, before giving up"""
    resize_seconds: float = 60.0
    """how often an elastic training looks for new machines; it grows by going back to its newest checkpoint"""
    collective_timeout: float = 120.0
    """longest time that workers wait for each other, or do not answer Ray, before they count as lost, seconds"""
    max_failures: int = 3
    """how often in a row, with no new checkpoint between, a training is restarted after a worker died; -1 for ever"""
    recovery_seconds: float = 600.0
    """how long a training waits for machines in place of lost ones before it gives up"""


@dataclass
class Config:
    """A whole training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


# (section.key, smallest, largest): jsonargparse checks the types, this the values
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("model.base_channels", 1, 1024),
    ("model.levels", 3, 6),
    ("model.enlarge", 1, 4),
    ("model.in_channels", 1, 4096),
    ("model.num_classes", 1, 255),
    ("loss.alpha", 0, 1),
    ("loss.beta", 0, float("inf")),
    ("loss.eps", 1e-12, float("inf")),
    ("data.crop", 16, 65536),
    ("data.foreground_crops", 0, 1),
    ("data.copy_paste", 0, 1),
    ("data.loader_workers", 0, 1024),
    ("data.shuffle_window", 1, float("inf")),
    ("data.cache_gb", 0, float("inf")),
    ("augment.rotate", 0, 180),
    ("augment.scale", 0, 0.9),
    ("augment.brightness", 0, 10),
    ("augment.contrast", 0, 0.99),
    ("augment.band_shift", 0, 10),
    ("augment.noise", 0, 10),
    ("optim.steps", 1, float("inf")),
    ("optim.global_batch_size", 1, float("inf")),
    ("optim.learning_rate", 0, 10),
    ("optim.momentum", 0, 0.99999999),
    ("optim.warmup_steps", 0, float("inf")),
    ("optim.final_learning_rate", 0, 1),
    ("optim.weight_decay", 0, 10),
    ("optim.clip_norm", 0, float("inf")),
    ("optim.ema_decay", 0, 0.99999999),
    ("run.log_every", 1, float("inf")),
    ("run.validate_every", 1, float("inf")),
    ("run.checkpoint_every", 1, float("inf")),
    ("run.keep_checkpoints", 1, float("inf")),
    ("run.patience", 0, float("inf")),
    ("run.panels", 0, 64),
    ("cluster.cpus_per_worker", 0.01, float("inf")),
    ("cluster.wait_seconds", 0, float("inf")),
    ("cluster.max_failures", -1, float("inf")),
    ("cluster.resize_seconds", 1, float("inf")),
    ("cluster.collective_timeout", 1, float("inf")),
    ("cluster.recovery_seconds", 0, float("inf")),
)


def workers_range(workers: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Gives the fewest and the most of cluster.workers; None where it is left open."""
    return (workers, workers) if isinstance(workers, int) else workers and (workers[0], workers[1])


def check_values(config: Config) -> None:
    """Checks every value's range; raises ValueError that names all keys at fault, their values and what is allowed."""
    faults = []
    for name, low, high in _RANGES:
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        # not (a <= b) is true for nan too
        if value is not None and not low <= value <= high:
            allowed = f"{low:g} or more" if high == float("inf") else f"{low:g} to {high:g}"
            faults.append(f"{name} is {value}; it must be {allowed}")
    if (asked := workers_range(config.cluster.workers)) and not 1 <= asked[0] <= asked[1]:
        faults.append(f"cluster.workers is {config.cluster.workers}; it must be 1 or more, or [fewest, most]")
    if config.run.name is not None and (not config.run.name or "/" in config.run.name or config.run.name[0] == "."):
        faults.append(f"run.name is {config.run.name!r}; it must be a plain folder name")
    if faults:
        raise ValueError("\n".join(faults))

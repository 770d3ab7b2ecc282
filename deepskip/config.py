"""Define every setting of a training with its unit, default and bounds; jsonargparse reads YAML and the command line."""

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal


def setting(default: Any, low: float | None = None, high: float | None = None, *, free: bool = False) -> Any:
    """Return the dataclass field of a setting with its default, its bounds and whether it may change on resuming.

    Args:
        default: the setting's default.
        low: smallest allowed number, included; None means that neither bound is checked.
        high: largest allowed number, included; None means no upper bound.
        free: it changes neither samples nor weights, so a run may be resumed with another value.
    """
    return field(default=default, metadata={"low": low, "high": high, "free": free})


@dataclass
class ModelConfig:
    """The network: DeepSkip (the paper's eq. 1), or any other."""

    network: str = "deepskip"
    """deepskip, plain_unet (the same without deep skips), unet, fcn, pspnet, h_dense_unet, unet3plus, nnunet, acm, mask_rcnn,
    smp:ARCH:ENCODER (segmentation_models_pytorch), or one that an installed package adds (docs/networks.md)"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of a network other than DeepSkip: {size: paper}, or single widths; DeepSkip has the settings that follow"""
    base_channels: int = setting(8, 1, 1024)
    """channels of the first level, b; level u has b * 2^(u-1)"""
    levels: int = setting(5, 3, 6)
    """depth, B, 3 to 6; the lowest level works at 1 / 2^(B-1) of the input's height and width"""
    encoder: Literal["vgg16", "resnet34"] = "vgg16"
    """encoder family: two convolutions a level, or ResNet-34's basic blocks"""
    norm: Literal["batch", "sync-batch", "instance-batch", "group"] = "batch"
    """normalisation; "sync-batch" is batch norm over all workers, "instance-batch" half instance, half batch norm; with
    "sync-batch" and "group" results do not depend on the number of workers"""
    upsample: Literal["bilinear", "nearest"] = "bilinear"
    """how deeper maps are upsampled to a level's size"""
    enlarge: int = setting(1, 1, 4)
    """factor by which images are enlarged before the network, 1 to 4, for objects of few pixels; time and memory grow with
    its square"""
    in_channels: int | None = setting(None, 1, 4096)
    """bands of the input; null takes them from the shards"""
    num_classes: int | None = setting(None, 1, 255)
    """1 for binary, else exclusive classes with 0 as background; null takes them from the shards"""


@dataclass
class LossConfig:
    """Weighted BCE + Dice over the global batch (eqs. 5 to 8)."""

    alpha: float = setting(0.5, 0, 1)
    """weight of foreground pixels in BCE, 0 to 1; background gets 1 - alpha"""
    beta: float = setting(1.0, 0)
    """weight of BCE relative to Dice"""
    eps: float = setting(1.0, 1e-12)
    """smoothing of Dice, in pixels"""
    overlap: Literal["dice", "iou"] = "dice"
    """overlap term next to BCE: Dice (eq. 7), or soft IoU of the same sums, whose gradient grows as they overlap"""
    class_weights: list[float] | None = None
    """weight of each class in Dice, not in BCE, normalised to sum 1: one number a class, background (0) first; null weighs them
    equally"""


@dataclass
class DataConfig:
    """Where samples come from and how they are cut."""

    path: str = "data/coins"
    """folder or URL (s3://, gs://, http://) that holds train/ and val/, each with an index.json"""
    accept: str | None = setting(None, free=True)
    """name of changed data on which a run may resume; the error that refuses the data prints it"""
    builtin: Literal["coins"] | None = setting(None, free=True)
    """built-in data to pack into `path` if it does not exist"""
    crop: int = setting(128, 16, 65536)
    """height and width of training crops, pixels; smaller images are padded"""
    foreground_crops: float = setting(0.5, 0, 1)
    """share of training crops placed around a foreground pixel, 0 to 1"""
    copy_paste: float = setting(0.0, 0, 1)
    """share of training crops onto which the objects of another sample of the same shard are pasted, 0 to 1"""
    bands: list[int | str] | None = None
    """bands that the network sees, numbered from 0, in this order: [0, 5, 10-40]; null takes all"""
    normalize: Literal["image", "dataset", "robust", "none"] = "image"
    """scale each band to mean 0 and standard deviation 1 by its own or the training set's statistics; robust takes the training
    set's median and 2nd to 98th percentile in their place; none keeps raw values"""
    shuffle_window: int = setting(16, 1)
    """number of shards of a lane that are shuffled together; a reader has this many open, and twice as many in its cache"""
    lanes: int | Literal["auto"] = setting(1, 1)
    """stretches into which the shards of an epoch are divided, so that each machine fetches only those of its own; auto takes 1
    on one machine, else 4 to 8 a machine, and a resumed run keeps the number"""
    fixed_lanes: bool = False
    """whether a lane has the same shards in every epoch, so that a machine fetches its share once if its cache can hold it"""
    on_bad_sample: Literal["error", "skip"] = setting("error", free=True)
    """whether an unusable sample ends the training, or is skipped and listed in bad_samples.jsonl"""
    loader_workers: int | None = setting(None, 0, 1024, free=True)
    """decoding processes of each training worker; 0 decodes in the training process, null takes 4 with a GPU, else 0"""
    cache_dir: str = setting("~/.cache/deepskip", free=True)
    """folder on each machine for copies of remote shards, shared by its workers"""
    cache_gb: float = setting(50.0, 0, 10**9, free=True)
    """size of all copies together, gigabytes; the least recently used are removed first"""
    follow: bool = False
    """train on the generations that are appended to train/ while the training runs, each sample once (docs/online.md)"""
    replay: float = setting(0.0, 0, 0.95)
    """share of each global batch that is drawn again from the last generations, against forgetting; needs follow"""
    replay_generations: int = setting(10, 1)
    """number of generations before the new ones from which replayed samples are drawn"""
    when_idle: Literal["wait", "replay", "end"] = setting("wait", free=True)
    """with follow, if nothing is new: wait, train on replayed samples alone, or end after idle_seconds"""
    idle_seconds: float = setting(60.0, 0, 10**9, free=True)
    """how long nothing is new before when_idle: end ends the training, seconds"""
    poll_seconds: float = setting(1.0, 0.05, 3600, free=True)
    """time between two looks for new generations, seconds"""


@dataclass
class AugmentConfig:
    """Random changes of training crops: a function of (seed, epoch, sample), the same on any number of workers."""

    flip: bool = True
    """mirror left-right and up-down, each with probability 0.5"""
    rotate90: bool = True
    """rotate by a random multiple of 90 degrees"""
    rotate: float = setting(0.0, 0, 180)
    """rotate by up to this many degrees in either direction"""
    scale: float = setting(0.0, 0, 0.9)
    """enlarge or shrink by up to this share: 0.2 means 0.8 to 1.25"""
    brightness: float = setting(0.0, 0, 10)
    """shift all bands by up to this many standard deviations"""
    contrast: float = setting(0.0, 0, 0.99)
    """multiply all bands by 1 - c to 1 + c"""
    gamma: float = setting(0.0, 0, 10)
    """raise each band, scaled to 0 to 1 in the crop, to a power of 1 / (1 + g) to 1 + g"""
    band_shift: float = setting(0.0, 0, 10)
    """shift each band on its own by up to this many standard deviations"""
    noise: float = setting(0.0, 0, 10)
    """standard deviation of added Gaussian noise, in the image's standard deviations"""


@dataclass
class OptimConfig:
    """Muon or AdamW with linear warm-up and decay, counted in steps."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon updates convolutions by orthogonalised momentum and all other weights by Adam"""

    steps: int | None = setting(600, 1)
    """optimizer steps of the whole training; null has no limit, which needs data.follow and schedule: constant"""
    global_batch_size: int = setting(8, 1, 1_000_000)
    """samples in one step over all workers; neither their choice nor their augmentation depends on the number of workers"""
    micro_batch: int | Literal["auto"] | None = setting(None, 1, free=True)
    """largest number of samples of a worker that pass through the network together; larger shares are computed in parts, which
    takes less memory and more time. auto takes a worker's share at the most of cluster.workers; null takes all at once"""
    learning_rate: float = setting(4e-3, 0, 10)
    """peak learning rate of Adam; Muon's is five times that"""
    momentum: float = setting(0.95, 0, 0.99999999)
    """momentum of Muon, which averages over about 1 / (1 - momentum) steps: many for a short training"""
    warmup_steps: int = setting(50, 0)
    """steps of linear warm-up"""
    final_learning_rate: float = setting(0.01, 0, 1)
    """final learning rate of the cosine schedule, as a share of the peak"""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """after the warm-up: cosine decay, a tenth of the peak from half of the steps and a hundredth from three quarters, or the
    peak to the end"""
    weight_decay: float = setting(0.1, 0, 10)
    """decoupled weight decay of convolution weights"""
    clip_norm: float = setting(1.0, 0)
    """largest norm of the gradient; 0 does not clip"""
    ema_decay: float = setting(0.98, 0, 0.99999999)
    """decay per step of the moving average of the weights, which is validated and kept; 0 uses the weights themselves.
    At step t it is at most (1 + t) / (10 + t), so that the average of a short training is not one of its first weights"""


@dataclass
class RunConfig:
    """The run: its name, where it is stored, how often it logs, validates and saves."""

    name: str | None = setting(None, free=True)
    """name of the run and of its folder; null takes the config file's name, numbered if another or a finished run has it"""
    storage: str = setting("runs", free=True)
    """folder of all runs; every worker must see it under this path"""
    seed: int = setting(0, 0, 2**63 - 1)
    """seed of the weights, of the order of samples and of the augmentation"""
    log_every: int = setting(10, 1, free=True)
    """steps between logged training metrics"""
    validate_every: int = setting(100, 1, free=True)
    """steps between validations"""
    checkpoint_every: int = setting(100, 1, free=True)
    """steps between checkpoints"""
    keep_checkpoints: int = setting(2, 1, free=True)
    """number of newest checkpoints to keep, in addition to the best"""
    patience: int = setting(0, 0, free=True)
    """validations without a better IoU after which the training ends; 0 trains to the last step"""
    kernels: Literal["auto", "triton", "next", "reference"] = setting("auto", free=True)
    """operators: auto takes Triton kernels on GPUs that can run them, optimised forms on CPUs, else plain PyTorch"""
    weights: str | None = None
    """model whose weights the training starts from: coins or microorganisms, a run's folder or URL, or a file of weights; null
    starts from random ones"""
    precision: Literal["auto", "float32", "bfloat16"] | None = None
    """number format: null takes bfloat16 on GPUs and float32 on CPUs; auto also takes bfloat16 on CPUs that multiply it in
    hardware. Losses on another number of workers then agree less closely. A resumed training keeps its format"""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = setting("none", free=True)
    """mode of torch.compile for the training step's network; the last two replay it as CUDA graphs. Crops have one size, so
    it is compiled once; validation is not compiled unless ema_decay is 0"""
    prequential: bool = setting(True, free=True)
    """with data.follow, measure the network on each generation before it is trained on it (stream/iou)"""
    drift: bool = setting(False, free=True)
    """with data.follow, warn when new samples are segmented worse than earlier ones; needs river (pip install '.[stream]')"""
    panels: int = setting(8, 0, 64)
    """validation images in the prediction panel"""
    experiment: str = "deepskip"
    """MLflow experiment"""
    tracking_uri: str | None = setting(None, free=True)
    """MLflow tracking server; null takes MLFLOW_TRACKING_URI, else sqlite in `storage`; none does not track"""


@dataclass
class PublishConfig:
    """Where the best model is published, for `deepskip serve` to take over."""

    path: str | None = None
    """folder or URL in which published.json names the model's file by its sha256; null does not publish"""
    min_gain: float = setting(0.0, 0, 1)
    """IoU by which a model must be better than the published one"""


@dataclass
class ClusterConfig:
    """The resources that the training takes from Ray, and how it handles lost machines."""

    workers: int | tuple[int, int] | None = None
    """training processes, or [fewest, most]: continues with fewer if machines are lost and takes new ones; null takes one
    per GPU, or 2 without a GPU (1 on a single core)"""
    cpus_per_worker: float | None = setting(None, 0.01)
    """CPU cores of each worker; null takes 1, and with --local all of this machine's, divided among its ranks"""
    gpu: bool | None = None
    """one GPU per worker; null uses GPUs if the cluster has any"""
    wait_seconds: float = setting(20.0, 0, 10**9)
    """how long to wait for the requested resources before giving up, seconds"""
    resize_seconds: float = setting(60.0, 1, 10**9)
    """how often an elastic training looks for new machines, seconds; it grows by restarting from its newest checkpoint"""
    collective_timeout: float = setting(120.0, 1, 10**9)
    """longest time that workers wait for each other, or do not answer Ray, before they count as lost, seconds"""
    max_failures: int = setting(3, -1)
    """number of consecutive restarts after a worker died, with no new checkpoint in between; -1 is unlimited"""
    recovery_seconds: float = setting(600.0, 0, 10**9)
    """how long a training waits for machines that replace lost ones before it gives up, seconds"""


@dataclass
class Config:
    """A whole training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    publish: PublishConfig = field(default_factory=PublishConfig, metadata={"free": True})
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata={"free": True})


def workers_range(workers: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the fewest and the most workers of cluster.workers, or None if it is not set."""
    return (workers, workers) if isinstance(workers, int) else workers and (workers[0], workers[1])


def part_size(config: Config) -> int | None:
    """Return the largest number of samples that pass through the network together, or None for all of a worker's."""
    asked, most = config.optim.micro_batch, workers_range(config.cluster.workers)
    if asked == "auto":
        # check_values refuses auto without workers.
        return -(-config.optim.global_batch_size // most[1]) if most else None
    return asked


# Settings that change something only with another one: its key, and the value that it needs; None stands for any but null.
NEEDS: dict[str, tuple[str, Any]] = {
    "optim.momentum": ("optim.optimizer", "muon"),
    "optim.final_learning_rate": ("optim.schedule", "cosine"),
    "data.replay_generations": ("data.follow", True),
    "data.when_idle": ("data.follow", True),
    "data.idle_seconds": ("data.when_idle", "end"),
    "data.poll_seconds": ("data.follow", True),
    "run.prequential": ("data.follow", True),
    "publish.min_gain": ("publish.path", None),
}


def without_effect(config: Config) -> list[str]:
    """Return a message for each setting that differs from its default and changes nothing, since another one does not fit."""
    default, found = Config(), []
    for key, (other, needed) in NEEDS.items():
        value, with_value = valued(config, key), valued(config, other)
        fits = with_value is not None if needed is None else with_value == needed
        if value != valued(default, key) and not fits:
            wanted = "" if needed is None else f": {str(needed).lower() if isinstance(needed, bool) else needed}"
            found.append(f"{key} is {value}, which changes nothing without {other}{wanted}")
    steps, warmup = config.optim.steps, config.optim.warmup_steps
    if steps is not None and warmup >= steps:
        found.append(
            f"optim.warmup_steps is {warmup} of {steps} steps: the learning rate rises to the end, and optim.schedule changes "
            "nothing"
        )
    return found


def valued(config: Config, key: str) -> Any:
    """Return the value of a setting, `section.key`."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def faults_of_norm(config: Config, workers: int | None = None) -> list[str]:
    """Return a message if the lowest level has one value a channel to normalise, which has no deviation.

    Args:
        config: the settings.
        workers: largest number of workers; None takes that of the settings, or one if they have none.
    """
    model, asked = config.model, workers_range(config.cluster.workers)
    if model.network not in ("deepskip", "plain_unet") or model.norm == "group":
        return []
    side = -(-config.data.crop * model.enlarge // 2 ** (model.levels - 1))
    workers = (workers or (asked[1] if asked else 1)) if model.norm == "batch" else 1
    batch, part = config.optim.global_batch_size, part_size(config)
    shares = {max(1, batch // workers), -(-batch // workers)}
    # The last part of a share is the rest.
    together = min(share if part is None else share % part or part for share in shares)
    if model.norm == "instance-batch":
        together = 1
    if together * side**2 > 1:
        return []
    over, cure = "one sample", "raise data.crop or optim.global_batch_size"
    if model.norm == "instance-batch":
        over, cure = "each sample", "raise data.crop"
    return [
        f"data.crop is {config.data.crop} and model.levels {model.levels}: the lowest level has one pixel, and model.norm "
        f'"{model.norm}" normalises it over {over} alone; {cure}, or set model.norm to group'
    ]


# The settings that are folders: an empty text would be the current one.
FOLDERS = ("path", "cache_dir", "storage", "out")


def faults_of(settings: Any, section: str = "") -> list[str]:
    """Return a message for each setting that is out of bounds: its key, its value and what is allowed.

    Args:
        settings: a dataclass; dataclasses in it are checked too.
        section: prefix of the keys.
    """
    faults = []
    for each in fields(settings):
        name, value = f"{section}{each.name}", getattr(settings, each.name)
        if is_dataclass(value):
            faults += faults_of(value, f"{name}.")
            continue
        low, high = each.metadata.get("low"), each.metadata.get("high")
        if isinstance(value, int) and value >= 2**53 and high is None:
            # Steps are counted in 64 bits, and other readers of JSON round larger numbers.
            high = 2**53 - 1
        # A word, such as "auto", has no bounds.
        if isinstance(value, str):
            if not value:
                faults.append(f"{name} is empty" + ("; name a folder" if each.name in FOLDERS else ""))
            continue
        if isinstance(value, list) and "" in value:
            faults.append(f"{name} is {value}; an entry is empty")
        if isinstance(value, float) and low is not None and (math.isinf(value) or (math.isnan(value) and high is None)):
            faults.append(f"{name} is {value}; it must be finite")
        # The comparison is negated, so that it is true for nan too.
        elif low is not None and value is not None and not low <= value <= (value if high is None else high):
            faults.append(
                f"{name} is {value!s:.100}; it must be "
                + (f"{low:g} or more" if high is None else f"{low:g} to {high}")
            )
    return faults


def is_free(key: str) -> bool:
    """Return whether a run may be resumed with another value of a setting, `section.key`; unknown ones may not."""
    section, _, name = key.partition(".")
    outer = {each.name: each for each in fields(Config)}.get(section)
    if outer is None:
        return False
    inner = {each.name: each for each in fields(outer.type)}.get(name)  # type: ignore[arg-type]
    return bool(outer.metadata.get("free") or (inner and inner.metadata.get("free")))


def changed_settings(before: dict[str, Any], config: Config) -> list[str]:
    """Return the keys of settings that decide a training, and that differ from those that it had.

    Args:
        before: the earlier settings by section; what it lacks is not compared.
        config: the present ones. Data are compared by their contents, and the number of steps may change.
    """
    now = asdict(config)
    decisive = [(section, key) for section in ("model", "loss", "augment", "optim") for key in now[section]]
    return [
        f"{section}.{key}"
        for section, key in (*decisive, ("run", "seed"))
        if before.get(section, {}).get(key, now[section][key]) != now[section][key]
        and not is_free(f"{section}.{key}")
        and key != "steps"
    ]


def check_values(config: Config) -> None:
    """Check the bounds of every value.

    Raises:
        ValueError: if any is out of bounds. The message has all such keys, their values and what is allowed.
    """
    faults = faults_of(config)
    if (asked := workers_range(config.cluster.workers)) and not 1 <= asked[0] <= asked[1]:
        faults.append(f"cluster.workers is {config.cluster.workers}; it must be 1 or more, or [fewest, most]")
    lanes, batch = config.data.lanes, config.optim.global_batch_size
    if isinstance(lanes, int) and lanes > batch:
        # Ranks would read all lanes in turn.
        faults.append(f"data.lanes is {lanes}; it must be at most optim.global_batch_size, which is {batch}")
    faults += faults_of_stream(config)
    if (parts := config.optim.micro_batch) is not None:
        given = f"optim.micro_batch is {parts}"
        if parts == "auto" and asked is None:
            faults.append(
                f"{given}; it takes a worker's share at the most workers, so set cluster.workers: [fewest, most]"
            )
        if config.run.compile in ("reduce-overhead", "max-autotune"):
            faults.append(
                f"{given} and run.compile {config.run.compile}, whose CUDA graphs overwrite the gradients of an earlier part: "
                "set run.compile to default"
            )
        if config.model.norm == "sync-batch":
            faults.append(
                f'{given}; with model.norm "sync-batch" all samples of a step are normalised together: set it to null'
            )
    if config.run.name is not None and not is_folder_name(config.run.name):
        faults.append(f"run.name is {config.run.name[:100]!r}; it must be a plain folder name")
    # This one computes with values, which may be anything as long as another is out of bounds.
    faults = faults or faults_of_norm(config)
    if faults:
        raise ValueError("\n".join(faults))


def faults_of_stream(config: Config) -> list[str]:
    """Return a message for each setting that does not fit a training that follows a stream, or one that does not."""
    data, optim, faults = config.data, config.optim, []
    if not data.follow:
        if data.replay:
            faults.append(f"data.replay is {data.replay:g}; it needs data.follow: true")
        if config.run.drift:
            faults.append("run.drift is true; it needs data.follow: true")
        if optim.steps is None:
            faults.append("optim.steps is null; only a training with data.follow: true has no end")
    elif optim.steps is None and optim.schedule != "constant":
        faults.append(
            f"optim.steps is null and optim.schedule {optim.schedule}, which needs their number; set it to constant"
        )
    if config.run.drift and not config.run.prequential:
        faults.append("run.drift is true; it needs run.prequential: true")
    if data.follow and data.fixed_lanes:
        faults.append(
            "data.fixed_lanes is true; with data.follow each sample is taken once, so there are no fixed lanes"
        )
    return faults


def is_folder_name(name: str) -> bool:
    """Return whether a name can be a folder's, is not hidden and contains no path separator."""
    return bool(name) and name[0] not in ".~" and "/" not in name and name.isprintable() and len(name.encode()) <= 200

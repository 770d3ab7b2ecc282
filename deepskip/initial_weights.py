"""Start a training from the weights of another model, which is known as fine-tuning."""

from torch import Tensor, nn

from deepskip import checkpoint
from deepskip.config import Config

# Tensors that are named in a message.
MOST_NAMED = 3


class OtherNetwork(ValueError):
    """The weights are those of another network; the message says which tensors differ."""


def fitting(
    network: nn.Module, weights: str, in_channels: int, num_classes: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights and buffers of a model that a network takes over.

    A model of other bands or classes lacks those layers that depend on them, which then keep their random values.

    Args:
        network: the network, on any device.
        weights: run's folder or URL, checkpoint or safetensors file, or name of a model that comes with DeepSkip.
        in_channels: bands of the network.
        num_classes: classes of the network, 1 for binary.

    Returns:
        Tensors of any shape (*,) by name, the moving averages if the model has them, and the names of those that do not fit.

    Raises:
        OtherNetwork: if it is the model of another network.
        checkpoint.CheckpointError, OSError: if it cannot be read.
    """
    state = checkpoint.load_for_inference(weights)
    found, own = state["ema"] or state["model"], network.state_dict()
    data = state["data"]
    other_bands, other_classes = data["in_channels"] != in_channels, data["num_classes"] != num_classes
    left, wrong = [], []
    for name in sorted(own.keys() | found.keys()):
        here, there = (list(tensors[name].shape) if name in tensors else None for tensors in (own, found))
        if here == there:
            continue
        if here and there and len(here) == len(there):
            differing = [i for i, sizes in enumerate(zip(here, there, strict=True)) if sizes[0] != sizes[1]]
            if (other_bands and differing == [1]) or (other_classes and differing == [0]):
                left.append(name)
                continue
        wrong.append(f"{name} is {shown(there)} there and {shown(here)} here")
    if wrong:
        more = f" and {len(wrong) - MOST_NAMED} others" if len(wrong) > MOST_NAMED else ""
        model = ", ".join(f"{key} {value}" for key, value in state["config"]["model"].items() if value)
        raise OtherNetwork(
            f"{weights} is the model of another network: {'; '.join(wrong[:MOST_NAMED])}{more}. Its settings of model: {model}"
        )
    return {name: found[name] for name in own if name not in left}, left


def differences(weights: str, config: Config, chosen: list[int] | None, classes: list[str]) -> list[str]:
    """Return in what a model that fits was trained otherwise, so that its weights may mean something else here.

    Args:
        weights: as for `fitting`.
        config: settings of the training that begins.
        chosen: numbers of the bands that its network sees, or None if it sees all.
        classes: names of its classes, [] if they are not known.
    """
    state = checkpoint.load_for_inference(weights)
    before, data = state["config"], state["data"]
    pairs = [
        (f"{section}.{name}", before.get(section, {}).get(name, getattr(own, name)), getattr(own, name))
        for section, own, names in (
            ("model", config.model, ("enlarge", "upsample")),
            ("data", config.data, ("normalize",)),
        )
        for name in names
    ]
    pairs.append(("data.bands", (data.get("preparation") or {}).get("chosen"), chosen))
    if len(data.get("classes") or []) == len(classes):
        pairs.append(("classes", data.get("classes") or [], classes))
    return [
        f"{weights} was trained with {name} {there}, this is with {here}: its weights may not fit"
        for name, there, here in pairs
        if there != here
    ]


def shown(shape: list[int] | None) -> str:
    """Return a shape for a message, such as 8 x 3 x 3 x 3."""
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a scalar"

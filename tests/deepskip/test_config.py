import math

import pytest

from deepskip.config import Config, check_values


def test_defaults_are_allowed() -> None:
    check_values(Config())


def test_every_fault_is_named_with_what_is_allowed() -> None:
    config = Config()
    config.optim.steps, config.loss.alpha, config.optim.learning_rate, config.run.name = 0, 1.2, math.nan, "../x"
    with pytest.raises(ValueError, match="must") as error:
        check_values(config)
    lines = str(error.value).splitlines()
    assert "optim.steps is 0; it must be 1 or more" in lines
    assert "loss.alpha is 1.2; it must be 0 to 1" in lines
    assert "optim.learning_rate is nan; it must be 0 to 10" in lines
    assert any(line.startswith("run.name is '../x'") for line in lines)


@pytest.mark.parametrize(
    ("lanes", "fault"),
    [
        ("auto", None),
        (8, None),
        (0, "data.lanes is 0; it must be 1 or more"),
        (9, "data.lanes is 9; it must be at most optim.global_batch_size, which is 8"),
    ],
)
def test_lanes(lanes: int | str, fault: str | None) -> None:
    config = Config()
    config.data.lanes = lanes  # type: ignore[assignment]
    if fault is None:
        check_values(config)
    else:
        with pytest.raises(ValueError, match=f"^{fault}$"):
            check_values(config)

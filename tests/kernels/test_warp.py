"""A warp that is executed without a GPU packs predicates into registers as the instruction set defines it."""

import numpy as np
import pytest

from deepskip.kernels.bench.machine_code import Instruction, kind_of
from deepskip.kernels.bench.warp_integers import HANDLERS
from deepskip.kernels.bench.warp_state import LANES, WarpState


@pytest.mark.parametrize(("opcode", "kind", "into"), [("P2R", "P", "R3"), ("UP2UR", "UP", "UR3")])
@pytest.mark.parametrize(("true", "bits", "packed"), [((4,), 0x10, 0xF1F), ((0, 3), 0x9, 0xF0F), ((4,), 0x8, 0xF07)])
def test_predicates_are_packed(
    opcode: str, kind: str, into: str, true: tuple[int, ...], bits: int, packed: int
) -> None:
    warp = WarpState(np.zeros(256, np.uint32), (0, 0, 0), 0)
    everywhere = np.ones(LANES, bool)
    for k in range(7):
        warp.put_truth(f"{kind}{k}", everywhere & (k in true), everywhere)
    # The bits that are not packed come from the source.
    warp.put("R9", np.full(LANES, 0xF0F), everywhere)
    instruction = Instruction("", opcode, (into, f"{kind}R", "R9", hex(bits)), None)
    assert HANDLERS[opcode](warp, instruction, everywhere)
    assert kind_of(opcode) == "move"
    value = warp.value(into)
    assert value is not None
    assert set(value.tolist()) == {packed}

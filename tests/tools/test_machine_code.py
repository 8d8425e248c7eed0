"""Machine code is followed as a GPU executes it, and its faults are found."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

import kernel_lint
from block_trace import Block, Launch, Unsupported, follow
from cost_work import blocks_per_multiprocessor
from cuda_resources import Usage
from kernel_lint import Entry
from machine_code import Function, parse, split_functions

_USAGE = Usage(registers=64, spilled=0, shared=1024)


def function(*lines: str, registers: int = 64) -> Function:
    """A kernel of these instructions."""
    text = "\n".join(f"        /*{16 * i:04x}*/    {line} ;    /* 0x{0:016x} */" for i, line in enumerate(lines))
    return Function("kernel", "kernel", text, Usage(registers, 0, 1024))


def run(code: Function, *parameters: int, threads: int = 64, block: int = 0, blocks: int = 1) -> Block:
    launch = Launch("kernel", blocks, threads, 0, struct.pack(f"<{len(parameters)}q", *parameters))
    state = Block(code, launch, block, ())
    with np.errstate(all="ignore"):
        state.run()
    return state


def test_instructions_with_their_scheduling() -> None:
    text = """
        Function : first
        /*0000*/               @!P0 LDG.E.128 R4, desc[UR8][R2.64+0x10] ;   /* 0x0000100802048981 */
                                                                            /* 0x000ea2000c1e1d00 */
        /*0010*/                   EXIT ;                                   /* 0x000000000000794d */
                                                                            /* 0x000fea0003800000 */
        /*0020*/                   BRA 0x20;                                /* 0xfffffffc00fc7947 */
                                                                            /* 0x000fc0000383ffff */
        Function : second
"""
    parts = split_functions(text)
    assert list(parts) == ["first", "second"]
    load, end = parse(parts["first"])
    assert (load.name, load.width, load.guard, load.operands) == ("LDG", 16, "!P0", ("R4", "desc[UR8][R2.64+0x10]"))
    assert (load.stall, load.write_barrier, load.read_barrier, load.wait) == (1, 2, 7, 0)
    assert (end.name, end.stall, end.write_barrier) == ("EXIT", 5, 7)


_DIVISION = (
    "S2R R0, SR_TID.X",
    "LDC R5, c[0x0][0x210]",
    "I2F.U32.RP R4, R5",
    "MUFU.RCP R4, R4",
    "IADD3 R2, R4, 0xffffffe, RZ",
    "F2I.FTZ.U32.TRUNC.NTZ R3, R2",
    "IMAD.MOV R7, RZ, RZ, -R3",
    "IMAD R7, R7, R5, RZ",
    "IMAD.MOV.U32 R2, RZ, RZ, RZ",
    "IMAD.HI.U32 R3, R3, R7, R2",
    "IMAD.HI.U32 R6, R3, R0, RZ",
    "IMAD.MOV R8, RZ, RZ, -R6",
    "IMAD R8, R5, R8, R0",
    "ISETP.GE.U32.AND P0, PT, R8, R5, PT",
    "@P0 IMAD.IADD R8, R8, 0x1, -R5",
    "@P0 VIADD R6, R6, 0x1",
    "ISETP.GE.U32.AND P1, PT, R8, R5, PT",
    "@P1 VIADD R6, R6, 0x1",
    "EXIT",
)


@pytest.mark.parametrize("divisor", [1, 3, 7, 10, 64, 100])
def test_the_division_sequence_divides(divisor: int) -> None:
    state = run(function(*_DIVISION), divisor, threads=256)
    np.testing.assert_array_equal(state.R[6], np.arange(256) // divisor)


def test_carries_and_wide_products() -> None:
    """A 64-bit address base + 4 tid, where the lower half of the sum overflows; then 64-bit differences."""
    code = function(
        "S2R R0, SR_TID.X",
        "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE.U32 R4, R0, 0x4, R2",
        "LEA R6, P0, R0, R2, 0x2",
        "LEA.HI.X R7, R0, R3, RZ, 0x2, P0",
        "IADD3 R8, P1, R4, -R2, RZ",
        "IADD3.X R9, R5, ~R3, RZ, P1, !PT",
        "SHF.R.S32.HI R10, RZ, 0x1f, R9",
        "LOP3.LUT R11, R0, 0x3, RZ, 0xc0, !PT",
        "PRMT R12, R0, 0x1000, RZ",
        "SEL R13, R0, RZ, P0",
        "EXIT",
    )
    base = (5 << 32) - 40
    state = run(code, base)
    wide = base + 4 * np.arange(64)
    for low in (4, 6):
        np.testing.assert_array_equal(state.R[low] + (state.R[low + 1].astype(np.int64) << 32), wide)
    np.testing.assert_array_equal(state.R[8], 4 * np.arange(64))
    assert not state.R[9].any()
    assert not state.R[10].any()
    np.testing.assert_array_equal(state.R[11], np.arange(64) % 4)
    np.testing.assert_array_equal(state.R[12], np.arange(64) * 0x010101)
    np.testing.assert_array_equal(state.R[13], np.where(np.arange(64) >= 10, np.arange(64), 0))


def test_constants_by_an_index_in_the_register_that_they_are_loaded_to() -> None:
    code = function("MOV R4, 0x8", "LDC.64 R4, c[0x0][R4+0x210]", "EXIT")
    state = run(code, 1, (7 << 32) + 5)
    assert set(state.R[4]) == {5}
    assert set(state.R[5]) == {7}


def test_a_loop_is_counted_by_warp() -> None:
    """Warp w executes the body 2w + 1 times: 1 + 3 + 5 + 7."""
    code = function(
        "S2R R0, SR_TID.X",
        "SHF.R.U32.HI R1, RZ, 0x5, R0",
        "MOV R2, RZ",
        "VIADD R2, R2, 0x1",
        "LEA R3, R1, 0x1, 0x1",
        "ISETP.GE.AND P0, PT, R2, R3, PT",
        "@!P0 BRA 0x30",
        "EXIT",
    )
    trace = run(code, 0, threads=128).trace
    assert trace.executed[3] == 16
    assert trace.executed[0] == trace.executed[7] == 4
    assert code.loops == code.inner_loops == ((3, 6),)


def test_threads_part_and_meet_at_a_barrier() -> None:
    code = function(
        "S2R R0, SR_TID.X",
        "ISETP.LT.AND P0, PT, R0, 0x10, PT",
        "@P0 BRA 0x50",
        "MOV R1, 0x1",
        "BRA 0x60",
        "MOV R1, 0x2",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "VIADD R1, R1, 0x1",
        "EXIT",
    )
    state = run(code, 0)
    np.testing.assert_array_equal(state.R[1], np.where(np.arange(64) < 16, 3, 2))
    assert state.trace.executed[3] == 2
    assert state.trace.executed[5] == 1
    assert state.trace.executed[7] == 2


@pytest.mark.parametrize(("stride", "sectors"), [(2, 4), (4, 8), (16, 32), (64, 64)])
def test_sectors_of_device_memory(stride: int, sectors: int) -> None:
    """Two warps load 4 bytes each thread; neighbours share sectors of 32 bytes."""
    code = function(
        "S2R R0, SR_TID.X",
        "LDC.64 R2, c[0x0][0x210]",
        f"IMAD.WIDE R4, R0, {stride:#x}, R2",
        f"LDG.E{'.U16' if stride == 2 else ''} R6, desc[UR4][R4.64]",
        "EXIT",
    )
    access = run(code, 1 << 20).trace.global_accesses[3]
    assert (access.kind, access.sectors, access.missed) == ("load", sectors, sectors)


@pytest.mark.parametrize(("stride", "passes"), [(4, 2), (0, 2), (8, 4), (128, 64)])
def test_passes_through_shared_memory(stride: int, passes: int) -> None:
    code = function("S2R R0, SR_TID.X", f"IMAD R1, R0, {stride:#x}, RZ", "LDS R2, [R1+0x20]", "EXIT")
    assert run(code, 0).trace.shared_passes[2] == passes


def test_a_value_from_memory_ends_no_loop() -> None:
    code = function(
        "LDC.64 R2, c[0x0][0x210]",
        "LDG.E R4, desc[UR4][R2.64]",
        "ISETP.NE.AND P0, PT, R4, RZ, PT",
        "@P0 BRA 0x10",
        "EXIT",
    )
    with pytest.raises(Unsupported, match=r"kernel, block 0: .*a loop that ends by a value from memory"):
        follow(code, Launch("kernel", 1, 32, 0, struct.pack("<q", 1 << 20)), 0)


def test_an_unknown_instruction_is_an_error() -> None:
    with pytest.raises(Unsupported, match="at 0x0: FROBNICATE R1: not implemented"):
        follow(function("FROBNICATE R1", "EXIT"), Launch("kernel", 1, 32, 0, b""), 0)


# --- occupancy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(64, 256, 0, 4), (128, 256, 0, 2), (129, 256, 0, 1), (32, 1024, 0, 2), (32, 32, 0, 32), (32, 256, 110 * 1024, 2)],
)
def test_blocks_of_a_multiprocessor(registers: int, threads: int, shared: int, blocks: int) -> None:
    assert blocks_per_multiprocessor(function("EXIT", registers=registers), threads, shared) == blocks


# --- lint ------------------------------------------------------------------------------------------------------------

_LOOP = ("MOV R2, RZ", "{0}", "VIADD R2, R2, 0x1", "ISETP.GE.AND P0, PT, R2, 0x5, PT", "@!P0 BRA 0x10", "EXIT")


def _with(instruction: str, **options: int) -> Function:
    return function(*(line.format(instruction) for line in _LOOP), **options)


_ENTRY = Entry("kernel", blocks=4, threads=256, shared=0)


@pytest.mark.parametrize(
    ("instruction", "failures"),
    [
        ("LDG.E.128 R4, desc[UR4][R8.64]", []),
        ("LDS.U16 R4, [R8]", []),
        ("MUFU.RCP R4, R4", []),
        ("LDG.E.U16 R4, desc[UR4][R8.64]", ["1 16-bit accesses to device memory, allowed 0"]),
        ("STG.E.U16 desc[UR4][R8.64], R4", ["1 16-bit accesses to device memory, allowed 0"]),
        ("I2F.RP R4, R5", ["1 divisions by run-time numbers, allowed 0", "1 divisions in inner loops, allowed 0"]),
        ("I2F.U32.RP R4, R5", ["1 divisions by run-time numbers, allowed 0", "1 divisions in inner loops, allowed 0"]),
        (
            "CALL.REL.NOINC 0x50",
            ["1 divisions by run-time numbers, allowed 0", "1 divisions in inner loops, allowed 0"],
        ),
        ("LDL R4, [R1]", ["1 accesses to local memory, allowed 0"]),
        ("STL [R1], R4", ["1 accesses to local memory, allowed 0"]),
    ],
)
def test_each_fault(instruction: str, failures: list[str]) -> None:
    assert kernel_lint.faults(_with(instruction), _ENTRY) == failures


def test_fewer_blocks_than_expected() -> None:
    assert kernel_lint.faults(_with("NOP", registers=65), _ENTRY) == ["3 blocks per multiprocessor, expected 4"]


def test_a_division_outside_of_loops_is_none_in_a_loop() -> None:
    code = function("I2F.RP R4, R5", *(line.format("NOP") for line in _LOOP))
    assert kernel_lint.counts(code)["divisions"] == 1
    assert kernel_lint.counts(code)["loop_divisions"] == 0


def test_allowed_faults_need_a_reason_and_may_not_grow() -> None:
    code = _with("LDG.E.U16 R4, desc[UR4][R8.64]")
    allowed = Entry("kernel", 4, 256, 0, {"scalar": 1})
    assert kernel_lint.faults(code, allowed) == ["allowed faults without a reason"]
    allowed.reason = "the bias"
    assert kernel_lint.faults(code, allowed) == []
    more = function("LDG.E.U16 R4, desc[UR4][R8.64]", *(line.format("STG.E.U16 [R8.64], R4") for line in _LOOP))
    assert kernel_lint.faults(more, allowed) == ["2 16-bit accesses to device memory, allowed 1"]


def test_an_entry_without_a_kernel_fails() -> None:
    (line,) = kernel_lint.lint({}, {"kernel": _ENTRY})
    assert "remove it" in line


def test_the_table_has_a_reason_for_every_exemption() -> None:
    entries = kernel_lint.load()
    assert entries
    assert all(entry.reason for entry in entries.values() if any(entry.allowed.values()))
    assert all(set(entry.allowed) <= set(kernel_lint.FAULTS) for entry in entries.values())


def test_an_update_only_lowers(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    code = {"kernel": _with("LDG.E.U16 R4, desc[UR4][R8.64]")}
    kernel_lint.save([Entry("kernel", 1, 256, 0, {"scalar": 3, "local": 2}, "why")], path)
    kernel_lint.update(code, [], may_raise=False, path=path)
    (row,) = json.loads(path.read_text())
    assert row["allowed"] == {"scalar": 1}
    assert row["blocks"] == 4
    kernel_lint.update({"kernel": _with("LDL R4, [R1]", registers=128)}, [], may_raise=False, path=path)
    (row,) = json.loads(path.read_text())
    assert row["allowed"] == {}
    assert row["blocks"] == 4

"""Reading a compiled program: texts as XLA prints them, small enough to add up by hand."""

import pytest

from benchmarks import _hlo

# A matrix of 4 x 8 float32 is 128 bytes, a vector of 8 is 32, a number 4.
BRANCHED = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%fused_sum (param_0: f32[4,8]) -> f32[] {
  %param_0 = f32[4,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %sum = f32[] reduce(%param_0, %zero), dimensions={0,1}, to_apply=%add
}

%careful (arg: (f32[4,8])) -> f32[] {
  %arg = (f32[4,8]{1,0}) parameter(0)
  %x.1 = f32[4,8]{1,0} get-tuple-element(%arg), index=0
  %inner = f32[] all-reduce(%x.1), channel_id=2, to_apply=%add
  ROOT %again = f32[] fusion(%x.1), kind=kInput, calls=%fused_sum
}

ENTRY %main.2 (x: f32[4,8], flag: pred[]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0), sharding={replicated}, metadata={op_name="x"}
  %flag = pred[] parameter(1)
  %sum_fusion = f32[] fusion(%x), kind=kInput, calls=%fused_sum, metadata={op_name="jit(step)/sum(y)"}
  %all-reduce-start = f32[] all-reduce-start(%sum_fusion), channel_id=1, to_apply=%add
  %all-reduce-done = f32[] all-reduce-done(%all-reduce-start)
  %handed = (f32[4,8]{1,0}, /*index=1*/f32[]) tuple(%x, %all-reduce-done)
  %cond = f32[] conditional(%flag, %handed, %handed), true_computation=%careful, false_computation=%cheap
  ROOT %out = (f32[4,8]{1,0}, f32[4,8]{1,0}) fusion(%x, %cond), kind=kLoop, calls=%fused_scale
}
"""


def test_kernels_and_what_they_move():
    program = _hlo.read(BRANCHED)
    assert program.entry == "main.2"
    assert {o.name: o.moved for o in program.kernels()} == {
        "sum_fusion": 128 + 4,
        "all-reduce-start": 4,  # its shape repeats what it reads
        "cond": 1 + 2 * (128 + 4) + 4,
        "out": 128 + 4 + 2 * 128,
    }
    assert program.count("conditional") == 1
    assert program.count("while") == 0 and program.turns() == []


def test_a_slice_moves_what_is_cut_out():
    """A TPU fetches a matrix of 4 x 8 row by row: 32 bytes."""
    line = (
        "  %part = ((f32[4,8]{1,0:T(8,128)}), f32[1,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
        "slice-start(%x), slice={[0:1], [0:8]}"
    )
    text = "ENTRY %main (x: f32[4,8]) -> f32[] {\n  %x = f32[4,8]{1,0} parameter(0)\n" + line + "\n}\n"
    (kernel,) = _hlo.read(text).kernels()
    assert (kernel.kind, kernel.moved) == ("slice-start", 32)


def test_collectives_of_every_step_and_of_branches():
    always, sometimes = _hlo.collectives(BRANCHED)
    assert always == {"all-reduce": 1}
    assert sometimes == {"all-reduce": 1}


LOOP = """\
HloModule jit_step, is_scheduled=true

%body (arg: (f32[4,8], f32[])) -> (f32[4,8], f32[]) {
  %arg = (f32[4,8]{1,0}, f32[]) parameter(0)
  %x.1 = f32[4,8]{1,0} get-tuple-element(%arg), index=0
  %next = f32[] fusion(%x.1), kind=kInput, calls=%fused_sum
  ROOT %out = (f32[4,8]{1,0}, f32[]) tuple(%x.1, %next)
}

%commands (x: f32[4,8]) -> f32[4,8] {
  %x.2 = f32[4,8]{1,0} parameter(0)
  ROOT %copy.1 = f32[4,8]{1,0} copy(%x.2)
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %start = f32[] constant(0)
  %carry = (f32[4,8]{1,0}, f32[]) tuple(%x, %start)
  %while = (f32[4,8]{1,0}, f32[]) while(%carry), condition=%condition, body=%body
  %y = f32[4,8]{1,0} get-tuple-element(%while), index=0
  ROOT %call = f32[4,8]{1,0} call(%y), to_apply=%commands
}
"""


def test_a_loop_counts_once_and_its_turn_beside_it():
    program = _hlo.read(LOOP)
    assert [(o.kind, o.moved) for o in program.kernels()] == [("while", 2 * 132), ("copy", 2 * 128)]
    assert [(o.name, o.moved) for o in program.turns()] == [("next", 128 + 4)]
    assert program.count("while") == 1


PREFETCHED = """\
ENTRY %main.5 (p: f32[8], q: bf16[16,8]) -> f32[8] {
  %p = f32[8]{0:T(1024)} parameter(0)
  %q = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (f32[8]{0:T(1024)S(1)}, f32[8]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p), cost=7
  %copy-done = f32[8]{0:T(1024)S(1)} copy-done(%copy-start)
  %inside = f32[8]{0:T(1024)S(1)} fusion(%copy-done, %q), kind=kLoop, calls=%fused
  %back = (f32[8]{0:T(1024)}, f32[8]{0:T(1024)S(1)}, u32[]{:S(2)}) copy-start(%inside)
  ROOT %out = f32[8]{0:T(1024)} copy-done(%back)
}
"""


def test_the_fast_memory_of_a_tpu_is_not_hbm():
    """A vector is fetched into it, used there and written back."""
    moved = {o.name: o.moved for o in _hlo.read(PREFETCHED).kernels()}
    assert moved == {"copy-start": 32, "inside": 16 * 8 * 2, "back": 32}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("pred[3]{0}", 3),
        ("bf16[2,3]{1,0}", 12),
        ("f8e4m3fn[5]{0}", 5),
        ("c64[2]{0}", 16),
        ("s64[0]{0}", 0),
        ("token[]", 0),
        ("(f32[2]{0}, /*index=1*/(u8[3]{0}, f32[4]{0:T(128)S(1)}))", 11),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert _hlo.in_hbm(shape) == size


def test_a_program_without_operations_that_move():
    assert _hlo.read("").kernels() == []

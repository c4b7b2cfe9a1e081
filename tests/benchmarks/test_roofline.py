"""The least work of the launches of a call, and how measurements are put beside it."""

import collections

from benchmarks import ROOT
from benchmarks.cuda import profile, roofline, summary
from mra_attention.triton_impl import launching


def test_the_rooflines_are_of_the_launches_that_there_are(monkeypatch):
    """As many of each kernel as the public path launches, in the order of the passes."""
    monkeypatch.syspath_prepend(ROOT / "kernels")
    import compile_check

    for length, width in ((1024, 32), (4096, 32), (65536, 32), (4096, 16), (65536, 8)):
        call = ("sm_90", "bf16", 64, False, False, "ieee", length)
        launches = compile_check._recorded(*call, key_block_size=width)
        counted = collections.Counter(launch.kernel for launch in launches)
        expected = collections.Counter()
        problem = roofline.Problem(length, 2, 12, 64, 8, key_block_size=width)
        for works in problem.works().values():
            expected.update({kernel: work.launches for kernel, work in works.items()})
        assert counted == expected


def test_rooflines_count_bytes_and_flop():
    """By hand, for 64 tokens of 2 heads of 16 channels in bf16 that select one block a row."""
    works = roofline.Problem(64, 1, 2, 16, 1).works()
    tokens, means, pairs, selected = 2 * 64 * 16 * 2, 2 * 2 * 16 * 4, 2 * 2 * 2, 2 * 2
    assert works["summaries"]["pool_kernel"].memory == 3 * tokens + 3 * means
    exact = works["forward"]["exact_kernel"]
    assert exact.gather == selected * 2 * 32 * 16 * 2
    assert exact.exact == selected * 2 * (2 * 32 * 32 * 16)
    assert works["forward"]["coarse_kernel"].coarse == pairs * 2 * (2 * 16)
    assert works["backward"]["exact_key_kernel"].exact == 2 * exact.exact
    stored, recomputed = (
        roofline.Problem(64, 1, 2, 16, 1, is_stored=is_stored).works()["select"]
        for is_stored in (True, False)
    )
    assert stored["digit_kernel"].coarse == 0 and stored["score_kernel"].coarse == pairs * 2 * 32
    assert recomputed["digit_kernel"].coarse == 3 * pairs * 32

    ceilings = roofline.Ceilings(copy=1e12, gather=2e12, bf16=6e12, fp32=1e12)
    least = ceilings.least_microseconds
    assert least(roofline.Work(memory=1e6, gather=1e6)) == (1.0, "memory")
    assert least(roofline.Work(gather=4e6, exact=6e6)) == (2.0, "L2")
    assert least(roofline.Work(coarse=4e6)) == (4.0, "tf32x3")
    assert least(roofline.Work(coarse=4e6), "ieee") == (4.0, "ieee")
    assert least(roofline.Work()) == (0.0, "")
    assert launching.table().recompute_from_length == roofline.RECOMPUTE_FROM_LENGTH


def test_narrow_key_blocks_cost_coarse_work_and_the_queries_of_their_keys():
    """Queries gather as many tokens as with squares; keys up to 4 times as many."""
    shape = (4096, 1, 12, 64, 8)
    square = roofline.Problem(*shape).works()
    for spread in (1.0, 4.0):
        narrow = roofline.Problem(*shape, key_block_size=8, spread=spread).works()
        for name, kernel in (("forward", "exact_kernel"), ("backward", "exact_query_kernel")):
            assert narrow[name][kernel] == square[name][kernel]
        for kernel in ("coarse_query_kernel", "coarse_key_kernel"):
            assert narrow["backward"][kernel].coarse == 4 * square["backward"][kernel].coarse
        keys, before = (x["backward"]["exact_key_kernel"] for x in (narrow, square))
        assert keys.gather == spread * before.gather and keys.exact == spread * before.exact
    selected = 12 * 128 * 8
    pairs = 12 * 128 * 512
    assert narrow["forward"]["fill_kernel"].memory == pairs + 4 * selected * 4
    assert narrow["backward"]["fill_kernel"].memory == pairs + (4 + 4) * selected * 4


def test_measured_ceilings_replace_assumed_ones(tmp_path):
    lines = ("name,rate,unit", "gather of 4 KB blocks from 8 MB,7000,GB/s", "copy,2500,GB/s")
    lines += ("gather of 4 KB blocks from 1024 MB,2000,GB/s", "matmul bf16 4096,700,TFLOP/s")
    (tmp_path / "ceilings.csv").write_text("\n".join(lines) + "\n")
    ceilings = roofline.Ceilings.measured(tmp_path / "ceilings.csv")
    assert (ceilings.copy, ceilings.gather, ceilings.bf16) == (2.5e12, 7e12, 7e14)
    assert ceilings.fp32 == roofline.Ceilings().fp32


def test_the_table_in_the_documentation_is_what_the_script_prints(capsys):
    roofline.main([])
    printed = capsys.readouterr().out
    assert printed.count("\n| ") > 15
    assert printed in (ROOT / "kernels" / "README.md").read_text()


#: As Nsight Compute writes it, with notes before and columns that nobody asked for.
COUNTERS = """\
==PROF== Connected to process 1
==PROF== Disconnected from process 1
"ID","Kernel Name","gpu__time_duration.sum","lts__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active",\
"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","other"
"","","us","%","%","%","%",""
"0","pool_kernel","1,061.5","40","","n/a","71","x"
"1","exact_kernel","210.25","81.5","12.5","31","(!) n/a","y"
"""


def test_counters_are_read_from_what_the_profiler_writes(tmp_path):
    (tmp_path / "counters.csv").write_text(profile.counters_of(COUNTERS))
    names, pool, exact = summary.shown_counters(tmp_path / "counters.csv")
    shown = dict(zip(names, zip(pool, exact, strict=True), strict=True))
    assert shown["kernel"] == ("pool_kernel", "exact_kernel")
    assert shown["time"] == ("1062 us", "210.2 us")
    assert shown["L2, %"] == ("40", "81.5")
    assert shown["tensor cores, %"] == ("", "31") and shown["memory, %"] == ("71", "")
    assert profile.counters_of("==ERROR== no permission\n") == ""


def test_tables_put_times_beside_dense_attention_and_the_roofline(tmp_path, capsys):
    (tmp_path / "bench.csv").write_text(
        "op,provider,batch,length,block_per_row,mode,pass,ms_median,peak_mb,rel_error\n"
        "attention,sdpa_flash,8,4096,,,fwd,3.0,10,0\n"
        "attention,sdpa_cudnn,8,4096,,,fwd,2.5,10,0\n"
        "attention,mra2,8,4096,8,full,fwd,1.25,12,1e-1\n"
        "selection,topk,1,4096,8,,select,0.5,,\n"
    )
    summary.print_bench(tmp_path)
    printed = capsys.readouterr().out
    assert "1.250 2.00x" in printed, "against the faster one"
    assert "selection  topk" in printed
    (tmp_path / "launches.csv").write_text(
        "length,batch,pass,kernel,launches,us,floor_us,bound\n"
        "96,1,forward,exact_kernel,1,30,20,L2\n"
        "96,1,forward,fill,1,10,,\n"
        "96,1,forward,(all),2,40,20,\n"
        "96,1,forward,(graph),,45,,\n"
    )
    summary.print_profile(tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1][-3:] == ["x", "roofline", "share"]
    assert lines[2] == ["forward", "exact_kernel", "1", "30", "20", "L2", "1.5", "75", "%"]
    assert lines[4][-3:] == ["2.0", "100", "%"] and lines[5] == ["forward", "(graph)", "45"]

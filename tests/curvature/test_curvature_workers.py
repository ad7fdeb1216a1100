"""Two processes under torchrun measure what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.curvature.dense_fisher import small_model, small_rows

from palimpsest.curvature.curvature import RetainCurvature
from palimpsest.models.workers import Workers

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch
from tests.curvature.dense_fisher import small_model, small_rows
from palimpsest.curvature.curvature import RetainCurvature
for kind in ("kfac", "ekfac", "diagonal"):
    found = RetainCurvature.fit(small_model("gpt2"), small_rows(), kind=kind, draws=2, quiet=True,
                                folder=sys.argv[1] + "/cache", batch_size=2)
    again = RetainCurvature.fit(small_model("gpt2"), small_rows(), kind=kind, draws=2, quiet=True,
                                folder=sys.argv[1] + "/cache")
    rank = torch.distributed.get_rank()
    matrices = {name: block.apply(torch.eye(*block.spectrum.shape).double()) for name, block in found.blocks.items()}
    kept = {name: block.apply(torch.eye(*block.spectrum.shape).double()) for name, block in again.blocks.items()}
    torch.save((matrices, kept), f"{sys.argv[1]}/{kind}-{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_measure_what_one_does_and_both_have_it(tmp_path: Path) -> None:
    """Four rows in batches of two: the ranks' batches differ from one process's, the curvature to rounding does not."""
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # No accelerator for the children, so that they meet through gloo.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, str(script), str(tmp_path)], env=environment, check=True, timeout=300)
    for kind in ("kfac", "ekfac", "diagonal"):
        expected = RetainCurvature.fit(small_model("gpt2"), small_rows(), kind=kind, draws=2, quiet=True)
        for rank in (0, 1):
            for found in torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True):
                assert found.keys() == expected.blocks.keys()
                for name, block in expected.blocks.items():
                    whole = block.apply(torch.eye(*block.spectrum.shape).double())
                    torch.testing.assert_close(found[name], whole, rtol=1e-9, atol=1e-12 * whole.abs().max().item())


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_workers_share_the_rows_without_one_left_out_or_twice(count: int) -> None:
    rows = small_rows()
    seen = [row for rank in range(count) for batch in Workers(rank, count).batches(rows, 2) for row in batch.rows]
    assert sorted(seen) == list(range(len(rows)))

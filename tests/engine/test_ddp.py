"""Law 5 as far as it goes without sharding: the ranks agree bit for bit, and together do what one process does."""

import pytest
import torch

from tests.helpers.ddp import find_port, run_rank, train
from tests.helpers.strategies import SETTINGS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp")]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes hold after training each strategy."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(run_rank, (find_port(), str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_agree_and_equal_one_process(two_ranks, name):
    together, alone = torch.load(two_ranks / f"{name}.pt"), train(name)
    assert together.pop("compared") == 2 * alone.pop("compared") > 0
    for name, mask in alone["masks"].items():
        assert torch.equal(together["masks"][name], mask)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

"""What the tests of the evaluation share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread_on_the_cpu():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield
    torch.set_num_threads(threads)

"""What a stage leaves behind, damaged: refused by name, or trained again."""

import pytest
import torch

from kit import checksums
from kit.models import net as nets
from kit.training import checkpoints

CONFIG, MADE = nets.NetConfig(backbone="test_efficientnet", dim=8), "f" * 64
STATE = {"net": {"weight": torch.arange(4096.0)}, "step": 3}


@pytest.fixture
def finished(tmp_path):
    head, about = {"weight": torch.ones(4, 8)}, {"fingerprint": MADE}
    net = nets.EmbeddingNet(CONFIG)
    return checkpoints.save_result(tmp_path / "clean", net, head, about, {})


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", checkpoints.RESULT + ("stage.json",))
def test_a_damaged_result_is_refused_by_name_and_not_taken_for_finished(finished, name):
    assert checkpoints.prepare(finished, MADE)
    flip(finished / name)
    with pytest.raises(checksums.Damaged, match=f"{name}: .*02_train"):
        checkpoints.hand_over(finished, nets.EmbeddingNet(CONFIG), None)
    assert not checkpoints.prepare(finished, MADE)
    assert not (finished / name).exists()  # the stage begins anew


@pytest.mark.parametrize("fault", ["flipped", "cut", "zeroed", "empty", "not a state"])
def test_a_damaged_state_is_refused_with_the_command_that_begins_again(tmp_path, fault):
    folder = tmp_path / "clean"
    checkpoints.save_state(folder, MADE, STATE)
    loaded = checkpoints.load_state(folder, MADE)
    assert torch.equal(loaded["net"]["weight"], STATE["net"]["weight"])
    assert checkpoints.load_state(folder, "another") is None
    path = folder / "resume" / "state.pt"
    data = path.read_bytes()
    if fault == "flipped":
        flip(path)
    elif fault == "not a state":
        torch.save([1, 2], path)
    else:
        parts = {"cut": data[:-9], "zeroed": bytes(len(data)), "empty": b""}
        path.write_bytes(parts[fault])
    for read in (checkpoints.load_state, checkpoints.prepare):
        with pytest.raises(
            checksums.Damaged, match="state.pt: .*--force 02_train_clean"
        ):
            read(folder, MADE)

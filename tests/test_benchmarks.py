"""The benchmark compares equal work and counts what is done."""

import json
import math

import pytest
import torch
from cases import settings_of

import train_dynat
from benchmarks import release, step
from data import Images

TOY = ["--target", "cnn", "--batch-size", "8", "--steps", "3", "--device", "cpu"]


def trained(method, side):
    """The networks' state_dicts after four updates on two batches."""
    argv = [*TOY, "--dataset", "tiny", "--method", method, "--lr-milestones", "9"]
    if "awp" in method:
        argv += ["--awp-start", "1"]
    settings = settings_of(" ".join(argv))
    x = torch.randint(0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batches = step.draw_batches(settings, Images(x, torch.arange(12) % 4, [*"abcd"]))
    networks, optimizer = train_dynat.prepare_networks(settings, 4, torch.device("cpu"))
    make_update = {"ours": step.our_update, "release": step.release_update}[side]
    step.run_all(make_update(settings, networks, optimizer), batches * 2)
    return {role: model.state_dict() for role, model in networks.items()}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", release.RELEASES)
def test_the_transcription_makes_the_same_weights_as_the_step(method):
    ours, theirs = trained(method, "ours"), trained(method, "release")
    if method in ("dynat-inner", "dynat-awp", "dynat-inner-awp"):
        forwards = "bn1.num_batches_tracked"
        assert theirs["guide"][forwards] > ours["guide"][forwards]  # their guide computes its labels more often
        for name in [name for name in ours["guide"] if "running" in name or "tracked" in name]:
            del ours["guide"][name], theirs["guide"][name]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-9)


def test_the_peak_is_the_most_held_at_once_and_not_the_sum():
    run = lambda: all(len(torch.ones(1000) + torch.ones(1000).sum()) for _ in range(5))  # two vectors and a scalar
    assert step.peak_bytes(run, torch.device("cpu")) == 8004


@pytest.mark.parametrize("method", ["dynat-inner --guide cnn", "gairat"])  # with a transcribed release, and without one
def test_the_benchmark_writes_what_it_measured_and_nothing_else(tmp_path, method):
    argv = [*TOY, "--method", *method.split(), "--updates", "1", "--repeats", "2"]
    argv += ["--json", str(tmp_path / "step.json")]
    assert step.main(argv) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]
    found = json.loads((tmp_path / "step.json").read_text())
    with_release = method != "gairat"
    assert found["command"].startswith("python benchmarks/step.py --target cnn")
    assert ("release" in found) == ("speedup" in found) == with_release
    for side in [side for side in ("ours", "release") if side in found]:
        assert len(found[side].pop("seconds_per_update_all")) == 2
        assert all(math.isfinite(value) and value > 0 for value in found[side].values())
